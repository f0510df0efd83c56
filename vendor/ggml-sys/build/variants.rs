//! Feature `portable`: ggml's CPU backend again for wider processors, beside the one that the program's own baseline has.
//!
//! ggml's own way to do so (`GGML_CPU_ALL_VARIANTS`) makes shared libraries; here all stand in one program. Every symbol that
//! a variant defines gets its name before it, templates of the C++ library among them, so that no code for a wider processor
//! can take the place of the baseline's. `ggml-ext/cpu.cpp` chooses when the program runs.

use std::collections::BTreeSet;
use std::env;
use std::path::{Path, PathBuf};
use std::process::Command;

/// Name, as in `ggml-ext/cpu.cpp`, and what the compiler is told.
const VARIANTS: [(&str, &[&str]); 2] =
    [("avx512", &["-march=x86-64-v4"]), ("avx512_vnni", &["-march=x86-64-v4", "-mavx512vnni"])];

/// The sources of ggml's CPU backend on x86-64, as its CMakeLists.txt has them.
const SOURCES: [&str; 17] = [
    "ggml-cpu.c",
    "ggml-cpu.cpp",
    "repack.cpp",
    "hbm.cpp",
    "quants.c",
    "traits.cpp",
    "amx/amx.cpp",
    "amx/mmq.cpp",
    "tiled/tiled.cpp",
    "tiled/tiled-kernel.cpp",
    "binary-ops.cpp",
    "unary-ops.cpp",
    "vec.cpp",
    "ops.cpp",
    "llamafile/sgemm.cpp",
    "arch/x86/quants.c",
    "arch/x86/repack.cpp",
];

/// Compiles the variants; whether there are any for this target.
pub fn compile(ext: &Path, llama: &Path) -> bool {
    if env::var("CARGO_CFG_TARGET_ARCH").as_deref() != Ok("x86_64")
        || env::var("CARGO_CFG_TARGET_OS").as_deref() != Ok("linux")
    {
        return false;
    }
    let folder = llama.join("ggml/src/ggml-cpu");
    let waiting = ext.canonicalize().expect("our own folder").join("waiting.h");
    for (name, flags) in VARIANTS {
        let mut objects = Vec::new();
        for (ending, standard) in [("c", "gnu11"), ("cpp", "gnu++17")] {
            let sources = SOURCES.iter().map(|file| folder.join(file));
            let mut build = cc::Build::new();
            build
                .cpp(ending == "cpp")
                .std(standard)
                .warnings(false)
                .opt_level(3)
                .debug(false)
                .define("NDEBUG", None)
                .define("GGML_SCHED_MAX_COPIES", "4")
                .define("GGML_USE_CPU_REPACK", None)
                .define("GGML_USE_LLAMAFILE", None)
                .define("_GNU_SOURCE", None)
                .define("_XOPEN_SOURCE", "600")
                .include(llama.join("ggml/src"))
                .include(&folder)
                .include(llama.join("ggml/include"))
                .files(sources.filter(|file| file.extension().is_some_and(|e| e == ending)))
                .out_dir(
                    PathBuf::from(env::var_os("OUT_DIR").expect("cargo sets OUT_DIR")).join(name),
                );
            if ending == "c" {
                build.flag("-include").flag(&waiting);
            }
            for flag in flags {
                build.flag(flag);
            }
            objects.extend(build.compile_intermediates());
        }
        rename(name, &objects);
        cc::Build::new().objects(objects).compile(&format!("ggml-cpu-{name}"));
    }
    true
}

/// Puts `name` and an underscore before every symbol that the objects define, those of one file among them: a group of
/// sections that the linker keeps once, such as a constructor's, has its name from one of these.
fn rename(name: &str, objects: &[PathBuf]) {
    let listed = Command::new("nm")
        .args(["--defined-only", "--format=posix"])
        .args(objects)
        .output()
        .unwrap_or_else(|e| panic!("nm, of binutils, which the feature `portable` needs: {e}"));
    assert!(listed.status.success(), "nm: {}", String::from_utf8_lossy(&listed.stderr));
    let text = String::from_utf8(listed.stdout).expect("names of symbols");
    // Lines of a symbol have a type and a value; those of a file end with a colon.
    let symbols: BTreeSet<&str> =
        text.lines().filter_map(|line| line.split_once(' ')).map(|(symbol, _)| symbol).collect();
    assert!(symbols.contains("ggml_backend_cpu_reg"), "the backend's own function is among them");
    let map: String = symbols.iter().map(|symbol| format!("{symbol} {name}_{symbol}\n")).collect();
    let path = objects[0].with_file_name(format!("{name}.symbols"));
    std::fs::write(&path, map).expect("write the map of symbols");
    for object in objects {
        let status = Command::new("objcopy").arg("--redefine-syms").arg(&path).arg(object).status();
        let status = status.unwrap_or_else(|e| panic!("objcopy, of binutils: {e}"));
        assert!(status.success(), "objcopy on {}: {status}", object.display());
    }
}
