//! Feature `cuda`: compiles the kernels with nvcc and links the toolkit's libraries.

use std::env;
use std::path::{Path, PathBuf};
use std::process::Command;

/// GPUs since 2018, by compute capability: RTX 20, A100, RTX 30, RTX 40, H100, RTX 50. `architectures.cmake`
/// gives llama.cpp the same.
const USUAL: &str = include_str!("usual-gpus.txt");

/// Compiles `kernels`, the device and the backend for the GPUs of `CMAKE_CUDA_ARCHITECTURES`, which
/// llama.cpp's build reads too.
pub fn compile(ext: &Path, source: &Path, kernels: &[PathBuf]) {
    for name in ["CUDA_PATH", "CUDAToolkit_ROOT", "CUDACXX", "CMAKE_CUDA_ARCHITECTURES"] {
        println!("cargo:rerun-if-env-changed={name}");
    }
    let (nvcc, root) = toolkit();
    // Not by cc's own support of CUDA: it hands a host compiler's flags to an nvcc that has a path, and debug
    // information would turn off the optimisation of device code. tools/gpu-check compiles with the same flags.
    let out = PathBuf::from(env::var_os("OUT_DIR").expect("cargo sets OUT_DIR"));
    let own = ["ops/device-cuda.cu", "backend-cuda.cu"].map(|file| ext.join(file));
    let mut archive = cc::Build::new();
    for file in kernels.iter().chain(&own) {
        let object = out.join(file.file_name().expect("a file")).with_extension("cuda.o");
        let mut command = Command::new(&nvcc);
        command
            .args(["-std=c++17", "-O3", "-Werror=all-warnings"])
            .args(["-Xcompiler=-fPIC,-Wall,-Wextra,-Werror", "-c"])
            .arg(file)
            .arg("-o")
            .arg(&object)
            .arg("-I")
            .arg(ext);
        for folder in ["include", "ggml/include", "ggml/src", "ggml/src/ggml-cuda"] {
            command.arg("-isystem").arg(source.join(folder));
        }
        let status = command.args(architectures(&nvcc)).status().expect("run nvcc");
        assert!(status.success(), "nvcc on {}: {status}; its words stand above", file.display());
        archive.object(object);
    }
    archive.compile("bupo-ggml-cuda");

    let lib = ["lib64", "lib"].map(|name| root.join(name)).into_iter().find(|lib| lib.is_dir());
    let lib =
        lib.unwrap_or_else(|| panic!("no lib64 or lib in the CUDA toolkit {}", root.display()));
    println!("cargo:rustc-link-search=native={}", lib.display());
    println!("cargo:rustc-link-lib=dylib=cublas");
    println!("cargo:rustc-link-lib=dylib=cudart");
    // For the program's run path: llama.cpp's libraries lie where its CMake package does, <out>/lib/cmake.
    let cmake = env::var_os("DEP_LLAMA_GGML_CMAKE_DIR").map(PathBuf::from);
    let llama =
        cmake.as_deref().and_then(Path::parent).expect("llama-cpp-sys-2 says where its package is");
    println!("cargo:cuda_lib={}:{}", llama.display(), lib.display());
}

/// nvcc, and the folder of the toolkit.
fn toolkit() -> (PathBuf, PathBuf) {
    let from =
        |name| env::var_os(name).map(PathBuf::from).filter(|path| !path.as_os_str().is_empty());
    let root = from("CUDA_PATH").or_else(|| from("CUDAToolkit_ROOT"));
    let on_path = || {
        let folders = env::var_os("PATH").unwrap_or_default();
        env::split_paths(&folders).map(|folder| folder.join("nvcc")).find(|nvcc| nvcc.is_file())
    };
    let nvcc = from("CUDACXX")
        .or_else(|| root.as_ref().map(|root| root.join("bin/nvcc")))
        .or_else(on_path)
        .unwrap_or_else(|| PathBuf::from("/usr/local/cuda/bin/nvcc"));
    assert!(
        nvcc.is_file(),
        "the feature `cuda` needs a CUDA toolkit, 12.4 or newer; no nvcc at {}. Set CUDA_PATH, or run \
         `eval \"$(tools/cuda-toolchain)\"`",
        nvcc.display()
    );
    let root = root.or_else(|| Some(nvcc.canonicalize().ok()?.parent()?.parent()?.to_path_buf()));
    (nvcc, root.expect("nvcc lies in the toolkit's bin folder"))
}

/// nvcc's flags for the GPUs asked for, or for the usual ones that this nvcc knows.
fn architectures(nvcc: &Path) -> Vec<String> {
    let asked = env::var("CMAKE_CUDA_ARCHITECTURES").unwrap_or_default();
    if ["native", "all", "all-major"].contains(&asked.as_str()) {
        return vec![format!("-arch={asked}")];
    }
    let asked: Vec<&str> = asked.split([';', ',']).filter(|one| !one.is_empty()).collect();
    if !asked.is_empty() {
        return asked.into_iter().flat_map(generate).collect();
    }
    let out = Command::new(nvcc).arg("--list-gpu-arch").output().expect("run nvcc");
    let known = String::from_utf8_lossy(&out.stdout).into_owned();
    let known: Vec<&str> = known.lines().map(str::trim).collect();
    let usual: Vec<&str> = USUAL
        .split_whitespace()
        .filter(|n| known.contains(&format!("compute_{n}").as_str()))
        .collect();
    let real = usual.iter().map(|n| format!("{n}-real"));
    real.chain(["90-virtual".into()]).flat_map(|n| generate(&n)).collect()
}

/// CMake's `86`, `86-real` or `86-virtual` as nvcc's flags.
fn generate(architecture: &str) -> [String; 2] {
    let (number, kind) = architecture.split_once('-').unwrap_or((architecture, ""));
    let digits = number.trim_end_matches(['a', 'f']);
    assert!(
        digits.chars().all(|c| c.is_ascii_digit()) && (2..=3).contains(&digits.len()),
        "CMAKE_CUDA_ARCHITECTURES: expected native, all, or numbers as in '86-real;89-real', got '{architecture}'"
    );
    let code = match kind {
        "real" => format!("sm_{number}"),
        "virtual" => format!("compute_{number}"),
        _ => format!("[compute_{number},sm_{number}]"),
    };
    ["-gencode".into(), format!("arch=compute_{number},code={code}")]
}
