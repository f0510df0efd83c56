//! Finds the llama.cpp sources that the pinned `llama-cpp-sys-2` carries, generates bindings for
//! the public headers the project uses and for our own `ggml-ext.h`, and compiles `ggml-ext/`
//! against them. No llama.cpp source is copied.

use std::{env, path::PathBuf, process::Command};

/// The crate that carries and builds llama.cpp; `Cargo.toml` pins its version.
const CARRIER: &str = "llama-cpp-sys-2";

fn main() {
    println!("cargo:rerun-if-changed=build.rs");
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

    // llama.cpp's own headers come in as system headers: their warnings are not ours to mend.
    cc::Build::new()
        .cpp(true)
        .std("c++17")
        .file(ext.join("bridge.cpp"))
        .include(&ext)
        .flag(format!("-isystem{}", include.display()))
        .flag(format!("-isystem{}", ggml_include.display()))
        .flag(format!("-isystem{}", source.join("src").display()))
        .warnings(true)
        .extra_warnings(true)
        .warnings_into_errors(true)
        .compile("bupo-ggml-ext");
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
