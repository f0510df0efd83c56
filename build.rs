//! With the feature `cuda` llama.cpp comes as shared libraries: the program finds them beside itself, and cuBLAS in
//! the toolkit it was built with; so do these libraries each other, for which the path must be an old RPATH.

fn main() {
    println!("cargo:rerun-if-changed=build.rs");
    if let Some(lib) = std::env::var_os("DEP_GGML_SYS_CUDA_LIB") {
        println!(
            "cargo:rustc-link-arg=-Wl,--disable-new-dtags,-rpath,$ORIGIN:{}",
            lib.to_string_lossy()
        );
    }
}
