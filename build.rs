//! With the feature `cuda` llama.cpp comes as shared libraries: the program finds them beside itself, and cuBLAS in
//! the toolkit it was built with; so do these libraries each other, for which the path must be an old RPATH.
//! Who builds it past `.cargo/config.toml` for a processor of 2003 is told.

fn main() {
    println!("cargo:rerun-if-changed=build.rs");
    if let Some(lib) = std::env::var_os("DEP_GGML_SYS_CUDA_LIB") {
        println!(
            "cargo:rustc-link-arg=-Wl,--disable-new-dtags,-rpath,$ORIGIN:{}",
            lib.to_string_lossy()
        );
    }
    let of_target = |name: &str| std::env::var(name).unwrap_or_default();
    let features = of_target("CARGO_CFG_TARGET_FEATURE");
    if of_target("CARGO_CFG_TARGET_ARCH") == "x86_64" && !features.split(',').any(|f| f == "avx2") {
        println!(
            "cargo:warning=compiled for plain x86-64, ten times slower than it could be: run cargo within the repository, \
             or set RUSTFLAGS=\"-C target-cpu=native\" (docs/INSTALL.md)"
        );
    }
}
