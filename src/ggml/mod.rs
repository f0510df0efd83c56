//! Safe wrappers over ggml: types, tensors, graphs, the CPU backend.

mod mmap;
mod types;

pub use mmap::MappedFile;
pub use types::Type;
