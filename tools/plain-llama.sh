# Sourced by the tools that build the program otherwise than usual: they take llama.cpp as the usual build made it,
# since compiling it takes long and its own sources are not what they look at.

# Folder of llama.cpp's libraries in the usual build.
plain_llama() {
    cargo build --release --locked --lib --message-format=json 2>/dev/null |
        sed -n '/"build-script-executed"/{/llama-cpp-sys-2@/s/.*"out_dir":"\([^"]*\)".*/\1/p}' | tail -1
}

# use_plain_llama FOLDER [GGML]: makes FOLDER, in which cargo links the usual build's libllama and, where GGML names
# a folder, the libraries of ggml that lie there.
use_plain_llama() {
    local folder=$1 ggml=${2:-} out
    out=$(plain_llama)
    [[ -e $out/lib/libllama.a ]] || {
        echo "no llama.cpp in '$out': does cargo build --release work?" >&2
        return 1
    }
    mkdir -p "$folder/.cargo"
    cat >"$folder/.cargo/config.toml" <<END
[target.x86_64-unknown-linux-gnu.llama]
rustc-link-search = [${ggml:+"\"native=$ggml\", "}"native=$out", "native=$out/lib", "native=$out/build/common"]
rustc-link-lib = [
    "static=llama_cpp_sys_2_common_wrapper", "static=llama-common", "static=llama-common-base", "static=llama",
    "static=ggml", "static=ggml-cpu", "static=ggml-base", "dylib=stdc++",
]
rustc-env = { OUT_DIR = "$out" }
END
}
