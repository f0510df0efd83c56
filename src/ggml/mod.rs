//! Safe wrappers over ggml: types, tensors, graphs, the CPU backend.

mod backend;
mod mmap;
mod nodes;
mod quantize;
mod tensor;
mod types;

pub use backend::{Computed, Executor, Graph, Input, TensorSet, ThreadPool};
pub use mmap::MappedFile;
pub use nodes::Rope;
pub use tensor::{Arena, Shape, Tensor};
pub use types::Type;
