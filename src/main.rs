//! The `bupo-gguf` command: see [`bupo_gguf::cli`].

fn main() -> std::process::ExitCode {
    bupo_gguf::cli::run()
}
