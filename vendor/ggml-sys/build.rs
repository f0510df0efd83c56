//! Finds the llama.cpp sources that the pinned `llama-cpp-sys-2` carries, generates bindings for
//! the public headers the project uses and for our own `ggml-ext.h`, and compiles `ggml-ext/`
//! against them: the bridge and the kernels as host code, and with the feature `cuda` the kernels for GPUs.
//! No llama.cpp source is copied.

#[path = "build/cuda.rs"]
mod cuda;
#[path = "build/variants.rs"]
mod variants;

use std::env;
use std::path::{Path, PathBuf};
use std::process::Command;

/// The crate that carries and builds llama.cpp; `Cargo.toml` pins its version.
const CARRIER: &str = "llama-cpp-sys-2";

/// Our ops' kernels, `ggml-ext/ops/<name>.cu`.
const KERNELS: [&str; 16] = [
    "activations",
    "linear",
    "logits",
    "logprob",
    "policies",
    "divergence",
    "distill",
    "attention",
    "conv",
    "delta",
    "experts",
    "norm",
    "glu",
    "rows",
    "adamw",
    "yardstick",
];

fn main() {
    println!("cargo:rerun-if-changed=build.rs");
    println!("cargo:rerun-if-changed=build");
    let source = llama_source();
    let ext = PathBuf::from("../../ggml-ext");
    println!("cargo:rerun-if-changed={}", ext.display());

    let include = source.join("include");
    let ggml_include = source.join("ggml/include");
    let bindings = bindgen::Builder::default()
        .header_contents(
            "ggml-sys.h",
            "#include \"ggml.h\"\n#include \"ggml-backend.h\"\n#include \"ggml-alloc.h\"\n\
             #include \"ggml-cpu.h\"\n#include \"gguf.h\"\n#include \"llama.h\"\n\
             #include \"ggml-ext.h\"\n",
        )
        .clang_arg(format!("-I{}", include.display()))
        .clang_arg(format!("-I{}", ggml_include.display()))
        .clang_arg(format!("-I{}", ext.display()))
        .allowlist_item("(ggml|gguf|llama|bupo|GGML|GGUF|LLAMA|BUPO)_.*")
        .allowlist_recursively(true)
        .prepend_enum_name(false)
        .layout_tests(false)
        .generate()
        .unwrap_or_else(|e| {
            panic!(
                "bindgen on the headers in {}: {e}. Is libclang installed? (apt-get install libclang-dev)",
                source.display()
            )
        });
    let out = PathBuf::from(env::var_os("OUT_DIR").expect("cargo sets OUT_DIR"));
    bindings.write_to_file(out.join("bindings.rs")).expect("write bindings.rs");

    let kernels: Vec<PathBuf> = KERNELS.map(|op| ext.join(format!("ops/{op}.cu"))).to_vec();
    let with_cuda = env::var_os("CARGO_FEATURE_CUDA").is_some();
    if with_cuda {
        cuda::compile(&ext, &source, &kernels);
    }

    // The kernels again for the host, where the tests run them.
    let mut emulated = cpp(&ext, &source);
    emulated
        .files(["ops/emulate.cpp", "ops/device-host.cpp", "backend.cpp"].map(|file| ext.join(file)))
        .define("BUPO_EMULATE", None)
        .opt_level(3);
    if with_cuda {
        emulated.define("BUPO_CUDA", None);
    }
    let objects = cpp(&ext, &source)
        .define("BUPO_EMULATE", None)
        .opt_level(3)
        .flag("-xc++")
        .files(&kernels)
        .compile_intermediates();
    emulated.objects(objects).compile("bupo-ggml-emulated");
    // After what uses it: bridge.cpp holds the last error.
    let host = ["bridge.cpp", "cpu.cpp", "products.cpp", "sampler.cpp"].map(|file| ext.join(file));
    let mut host = cpp(&ext, &source).files(host).to_owned();
    if env::var_os("CARGO_FEATURE_PORTABLE").is_some() && variants::compile(&ext, &source) {
        host.define("BUPO_CPU_VARIANTS", None);
    }
    host.compile("bupo-ggml-ext");
}

/// A C++ compilation whose warnings are errors; llama.cpp's headers come in as system headers, for their
/// warnings are not ours to mend.
fn cpp(ext: &Path, source: &Path) -> cc::Build {
    let mut build = cc::Build::new();
    build
        .cpp(true)
        .std("c++17")
        .include(ext)
        .warnings(true)
        .extra_warnings(true)
        .warnings_into_errors(true);
    for folder in ["include", "ggml/include", "ggml/src", "src"] {
        build.flag(format!("-isystem{}", source.join(folder).display()));
    }
    build
}

/// `<registry>/llama-cpp-sys-2-<version>/llama.cpp`, from `cargo metadata`.
fn llama_source() -> PathBuf {
    let cargo = env::var_os("CARGO").expect("cargo sets CARGO");
    let here = env::var_os("CARGO_MANIFEST_DIR").expect("cargo sets CARGO_MANIFEST_DIR");
    let target = env::var("TARGET").expect("cargo sets TARGET");
    let metadata = |offline: &[&str]| {
        Command::new(&cargo)
            .args(["metadata", "--format-version", "1", "--locked", "--filter-platform", &target])
            .args(offline)
            .current_dir(&here)
            .output()
            .expect("run cargo metadata")
    };
    // Cargo has fetched what this build needs, but not what only tests need, and metadata wants to see
    // the manifests of both: where those are missing, it fetches them.
    let mut out = metadata(&["--offline"]);
    if !out.status.success() {
        out = metadata(&[]);
    }
    assert!(
        out.status.success(),
        "cargo metadata failed (without a network run `cargo fetch` first): {}",
        String::from_utf8_lossy(&out.stderr)
    );
    let metadata: serde_json::Value =
        serde_json::from_slice(&out.stdout).expect("cargo metadata prints JSON");
    let manifest = metadata["packages"]
        .as_array()
        .expect("metadata.packages is a list")
        .iter()
        .find(|package| package["name"] == CARRIER)
        .and_then(|package| package["manifest_path"].as_str())
        .unwrap_or_else(|| panic!("{CARRIER} is not among the packages of cargo metadata"));
    PathBuf::from(manifest).with_file_name("llama.cpp")
}
