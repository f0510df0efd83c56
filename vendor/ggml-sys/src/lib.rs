//! Raw bindings to ggml, gguf and llama.cpp as built by the pinned `llama-cpp-sys-2`.
//!
//! Everything here is `unsafe` and undocumented on purpose: the headers are the documentation.
//! Safe wrappers live in `bupo_gguf::ggml` and `bupo_gguf::llama`.
#![allow(non_camel_case_types, non_snake_case, non_upper_case_globals, missing_docs)]
#![allow(clippy::all, unsafe_op_in_unsafe_fn, unnecessary_transmutes)]

// Links the static libraries that its build script made.
use llama_cpp_sys_2 as _;

include!(concat!(env!("OUT_DIR"), "/bindings.rs"));
