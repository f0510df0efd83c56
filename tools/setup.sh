#!/usr/bin/env bash
# Makes sure that what the build needs is there: cmake, a C++ compiler, libclang.
# Installs missing Debian/Ubuntu packages where it may (root or sudo, with apt); else names them and stops.
set -euo pipefail

missing=()
command -v cmake >/dev/null || missing+=(cmake)
command -v ninja >/dev/null || missing+=(ninja-build)
command -v c++ >/dev/null && command -v make >/dev/null || missing+=(build-essential)
# bindgen loads libclang.so; libclang-cpp.so, which LLVM's own packages bring along, is another library.
has_libclang() {
    [ -n "${LIBCLANG_PATH:-}" ] && return 0
    { ldconfig -p 2>/dev/null; compgen -G '/usr/lib/llvm-*/lib/libclang*.so*' || true; } |
        grep -E 'libclang(-[0-9.]+)?\.so' >/dev/null
}
has_libclang || missing+=(libclang-dev)
# The tests of the report page look at it in a browser; only CI insists on one.
if [ -n "${BUPO_REQUIRE_BROWSER:-}" ]; then
    command -v chromium >/dev/null || command -v chromium-browser >/dev/null || command -v google-chrome >/dev/null ||
        missing+=(chromium)
fi
# The tests' trained models come by pip, and a wheel is tried in an environment of its own; only CI insists on them.
if [ -n "${BUPO_REQUIRE_MODELS:-}" ]; then
    python3 -m pip --version >/dev/null 2>&1 || missing+=(python3 python3-pip)
    python3 -c 'import ensurepip, venv' 2>/dev/null || missing+=(python3-venv)
fi
# The feature `mpi` needs an MPI with its headers; only CI insists on one.
if [ -n "${BUPO_REQUIRE_MPI:-}" ]; then
    command -v mpirun >/dev/null && command -v mpicc >/dev/null || missing+=(openmpi-bin libopenmpi-dev)
fi
# Not needed, but it makes a second build of llama.cpp a matter of seconds.
command -v ccache >/dev/null || missing+=(ccache)

if [ ${#missing[@]} -gt 0 ]; then
    echo "setup: missing packages: ${missing[*]}" >&2
    as_root=()
    if [ "$(id -u)" -ne 0 ]; then
        if ! command -v sudo >/dev/null; then
            echo "error: not root and no sudo; ask for these packages: ${missing[*]}" >&2
            exit 1
        fi
        as_root=(sudo)
    fi
    if ! command -v apt-get >/dev/null; then
        echo "error: no apt-get here; install the equivalents of: ${missing[*]}" >&2
        exit 1
    fi
    "${as_root[@]}" apt-get update -qq
    "${as_root[@]}" env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq "${missing[@]}" >&2
fi

if ! command -v cargo >/dev/null; then
    echo "error: no cargo; install Rust 1.89 or newer with rustup (https://rustup.rs)" >&2
    exit 1
fi
