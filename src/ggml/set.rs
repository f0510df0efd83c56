//! Tensors that own their memory.

use std::borrow::Cow;
use std::ops::{Deref, DerefMut};
use std::ptr::NonNull;
use std::sync::Arc;

use ggml_sys as sys;

use super::device::Device;
use super::{Arena, Shape, Tensor, Type};
use crate::{Error, Result};

/// Tensors with memory of their own, zeroed: parameters, gradients, moments, kept activations.
pub struct TensorSet {
    tensors: Vec<NonNull<sys::ggml_tensor>>,
    memory: Arc<Memory>,
}

// SAFETY: headers and buffer are owned; writing goes through `Executor` or `&mut` of the owner.
unsafe impl Send for TensorSet {}
// SAFETY: as above.
unsafe impl Sync for TensorSet {}

/// Headers and data of a [`TensorSet`]; null without tensors.
struct Memory {
    buffer: sys::ggml_backend_buffer_t,
    arena: Arena,
}

// SAFETY: nothing in it is bound to a thread, and the arena is not changed after `TensorSet::zeros`.
unsafe impl Send for Memory {}
// SAFETY: as above.
unsafe impl Sync for Memory {}

impl TensorSet {
    /// Allocates F32 tensors in the memory of `device`, zeroed.
    ///
    /// # Errors
    /// [`Error::Engine`] with the size when there is not that much memory.
    pub fn zeros(device: Device, shapes: &[(String, Shape)]) -> Result<TensorSet> {
        let arena = Arena::new(shapes.len());
        let tensors: Vec<_> = shapes
            .iter()
            .map(|(name, shape)| {
                let tensor = arena.tensor(Type::F32, shape);
                arena.set_name(tensor, name);
                NonNull::new(tensor.raw()).expect("a new header")
            })
            .collect();
        let mut buffer = std::ptr::null_mut();
        if !shapes.is_empty() {
            // SAFETY: the arena's tensors have no memory yet; the result is checked.
            buffer = unsafe {
                sys::ggml_backend_alloc_ctx_tensors_from_buft(
                    arena.context(),
                    device.buffer_type()?,
                )
            };
            if buffer.is_null() {
                let bytes: usize =
                    shapes.iter().map(|(_, s)| s.iter().product::<usize>() * 4).sum();
                return Err(Error::engine(
                    format!("allocating {} MiB on {device}", bytes >> 20),
                    "out of memory",
                    "lower --rank or --micro-batch-tokens",
                ));
            }
            // SAFETY: a live buffer.
            unsafe { sys::ggml_backend_buffer_clear(buffer, 0) };
        }
        Ok(TensorSet { tensors, memory: Arc::new(Memory { buffer, arena }) })
    }

    /// Number of tensors.
    pub fn len(&self) -> usize {
        self.tensors.len()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.tensors.is_empty()
    }

    /// Tensor `index`, in the order given at creation.
    pub fn get(&self, index: usize) -> Tensor<'_> {
        self.memory.arena.wrap(self.tensors[index].as_ptr())
    }

    /// All values of tensor `index`: where they lie in host memory, a copy from a GPU's.
    pub fn values(&self, index: usize) -> Cow<'_, [f32]> {
        let tensor = self.get(index);
        if !tensor.is_host() {
            return Cow::Owned(tensor.read_f32());
        }
        // SAFETY: contiguous F32 in host memory that this set owns; shared while borrowed.
        Cow::Borrowed(unsafe { std::slice::from_raw_parts(tensor.data().cast(), tensor.len()) })
    }

    /// All values of tensor `index`, to change.
    pub fn values_mut(&mut self, index: usize) -> ValuesMut<'_> {
        let tensor = self.get(index);
        if !tensor.is_host() {
            return ValuesMut::Copy { values: tensor.read_f32(), tensor };
        }
        // SAFETY: contiguous F32 in host memory that this set owns, borrowed exclusively.
        ValuesMut::InPlace(unsafe {
            std::slice::from_raw_parts_mut(tensor.data().cast(), tensor.len())
        })
    }

    /// Sets everything to zero.
    pub fn clear(&mut self) {
        if !self.memory.buffer.is_null() {
            // SAFETY: a live buffer.
            unsafe { sys::ggml_backend_buffer_clear(self.memory.buffer, 0) }
        }
    }

    /// Holds headers and data alive for whoever keeps pointers to them (`llama::LiveAdapter`).
    pub(crate) fn keep_alive(&self) -> Arc<dyn std::any::Any + Send + Sync> {
        self.memory.clone()
    }

    /// Bytes of all tensors, padding included.
    pub fn n_bytes(&self) -> usize {
        if self.memory.buffer.is_null() {
            return 0;
        }
        // SAFETY: a live buffer.
        unsafe { sys::ggml_backend_buffer_get_size(self.memory.buffer) }
    }
}

/// Values that are being changed; those of a GPU go back to it when this is dropped.
pub enum ValuesMut<'s> {
    /// In host memory.
    InPlace(&'s mut [f32]),
    /// Of a GPU.
    Copy {
        /// The values.
        values: Vec<f32>,
        /// Where they go.
        tensor: Tensor<'s>,
    },
}

impl Deref for ValuesMut<'_> {
    type Target = [f32];

    fn deref(&self) -> &[f32] {
        match self {
            ValuesMut::InPlace(values) => values,
            ValuesMut::Copy { values, .. } => values,
        }
    }
}

impl DerefMut for ValuesMut<'_> {
    fn deref_mut(&mut self) -> &mut [f32] {
        match self {
            ValuesMut::InPlace(values) => values,
            ValuesMut::Copy { values, .. } => values,
        }
    }
}

impl Drop for ValuesMut<'_> {
    fn drop(&mut self) {
        if let ValuesMut::Copy { values, tensor } = self {
            tensor.write_f32(values);
        }
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        if !self.buffer.is_null() {
            // SAFETY: made in `zeros`, freed once.
            unsafe { sys::ggml_backend_buffer_free(self.buffer) }
        }
    }
}
