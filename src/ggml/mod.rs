//! Safe wrappers over ggml: types, tensors, graphs, devices.

mod backend;
mod bytes;
mod convert;
mod cores;
mod device;
mod mmap;
mod neighbours;
mod nodes;
mod processor;
mod quantize;
mod repacked;
mod set;
mod tensor;
mod types;

pub use backend::{Computed, Executor, Graph, Input, Rates, ThreadPool};
pub use bytes::ByteSize;
#[cfg(target_arch = "x86_64")]
pub(crate) use convert::{LARGEST, QUANTS, Quants, QuantsForm, QuantsReader};
pub use cores::usable_cores;
pub use device::{Device, DeviceChoice, Gpu, gpus};
pub use mmap::MappedFile;
pub use nodes::Rope;
pub use processor::{check_processor, cpu_backend};
pub use repacked::Repacked;
pub use set::{TensorSet, ValuesMut};
pub use tensor::{Arena, Shape, Tensor};
pub(crate) use tensor::{parts, rounded};
pub use types::Type;
