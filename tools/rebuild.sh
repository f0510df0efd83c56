# Sourced by the tools that build the program otherwise than usual: they take what they do not look at from the usual
# build (cargo build --release), since compiling llama.cpp and the dependencies takes long.

# Folder of llama.cpp's libraries in the usual build.
plain_llama() {
    local out
    out=$(cargo build --release --locked --message-format=json 2>/dev/null |
        sed -n '/"build-script-executed"/{/llama-cpp-sys-2@/s/.*"out_dir":"\([^"]*\)".*/\1/p}' | tail -1)
    [[ -e $out/lib/libllama.a ]] || {
        echo "no llama.cpp in '$out': does cargo build --release work?" >&2
        return 1
    }
    echo "$out"
}

# link_plain_llama FOLDER [GGML]: writes FOLDER/config.toml for cargo --config, by which it links the usual build's
# libllama and, where GGML names a folder, the libraries of ggml that lie there.
link_plain_llama() {
    local folder=$1 ggml=${2:-} out
    out=$(plain_llama)
    mkdir -p "$folder"
    cat >"$folder/config.toml" <<END
[target.x86_64-unknown-linux-gnu.llama]
rustc-link-search = [${ggml:+"\"native=$ggml\", "}"native=$out", "native=$out/lib", "native=$out/build/common"]
rustc-link-lib = [
    "static=llama_cpp_sys_2_common_wrapper", "static=llama-common", "static=llama-common-base", "static=llama",
    "static=ggml", "static=ggml-cpu", "static=ggml-base", "dylib=stdc++",
]
rustc-env = { OUT_DIR = "$out" }
END
}

# copy_dependencies FOLDER: the compiled dependencies of the usual build, once, so that FOLDER compiles our code alone.
copy_dependencies() {
    local folder=$1 usual=target/release
    [[ -d $folder/release ]] && return
    mkdir -p "$folder/release"
    (
        cd "$usual"
        find deps \( -name '*.rlib' -o -name '*.rmeta' -o -name '*.so' -o -name '*.d' \) ! -name '*bupo_gguf*' -print
        find build -mindepth 1 -maxdepth 1 ! -name 'llama-cpp-sys-2-*' -print
        echo .fingerprint
    ) | tar -C "$usual" -cf - -T - | tar -C "$folder/release" -xf -
}

# compile_with FOLDER CRATES FLAGS: exports a wrapper around rustc that compiles these crates (a|b) with FLAGS, unstable
# ones too.
compile_with() {
    local folder=$1 crates=$2 flags=$3
    cat >"$folder/rustc" <<END
#!/bin/bash
[[ "\$*" =~ --crate-name\ ($crates)\  ]] && RUSTC_BOOTSTRAP=1 exec "\$@" $flags
exec "\$@"
END
    chmod +x "$folder/rustc"
    export RUSTC_WRAPPER=$folder/rustc CARGO_INCREMENTAL=0
}
