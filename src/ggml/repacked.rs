//! Weights in the layout of ggml's repacked kernels.

use std::ffi::CStr;

use ggml_sys as sys;

use super::{Arena, Tensor};
use crate::{Error, Result};

/// A copy of a weight as ggml's repacked kernels want it. Only ggml's own products read it.
pub struct Repacked {
    buffer: sys::ggml_backend_buffer_t,
    arena: Arena,
    raw: *mut sys::ggml_tensor,
}

impl Repacked {
    /// A copy of a contiguous matrix in host memory; none where ggml has no such kernels for its type or
    /// for this processor.
    ///
    /// # Errors
    /// [`Error::Engine`] without memory.
    pub fn new(weight: Tensor<'_>) -> Result<Option<Repacked>> {
        assert!(weight.is_host() && weight.is_contiguous(), "repacking {weight:?}");
        let Some(buffer_type) = buffer_type() else { return Ok(None) };
        let arena = Arena::new(4);
        let tensor = arena.tensor(weight.ty(), &weight.shape());
        let raw = tensor.raw();
        // SAFETY: the arena's only tensor has no memory yet; a live buffer type; results are checked.
        let buffer =
            unsafe { sys::ggml_backend_alloc_ctx_tensors_from_buft(arena.context(), buffer_type) };
        if buffer.is_null() {
            let call = format!("repacking {}", weight.name());
            return Err(Error::engine(call, "out of memory", "free some"));
        }
        let repacked = Repacked { buffer, arena, raw };
        // SAFETY: a live header, to which the buffer has given its kernels, if it has some for the tensor;
        // as many bytes as the tensor has, in host memory.
        unsafe {
            if (*raw).extra.is_null() {
                return Ok(None);
            }
            let bytes = weight.n_bytes();
            sys::ggml_backend_tensor_set(raw, weight.data().cast(), 0, bytes);
        }
        Ok(Some(repacked))
    }

    /// The copy, for [`Arena::mul_mat`].
    pub fn tensor(&self) -> Tensor<'_> {
        self.arena.wrap(self.raw)
    }
}

impl Drop for Repacked {
    fn drop(&mut self) {
        // SAFETY: made in `new`, freed once.
        unsafe { sys::ggml_backend_buffer_free(self.buffer) }
    }
}

/// ggml's buffer type of repacked weights, where it was built with one.
fn buffer_type() -> Option<sys::ggml_backend_buffer_type_t> {
    type ExtraTypes =
        unsafe extern "C" fn(sys::ggml_backend_dev_t) -> *mut sys::ggml_backend_buffer_type_t;
    // SAFETY: the CPU's registry and device always exist; the function of that name has that signature
    // (`ggml_backend_dev_get_extra_bufts_t`) and gives a static list that ends with a null; buffer types
    // have static names.
    unsafe {
        let registry = sys::bupo_cpu_reg();
        let device = sys::ggml_backend_reg_dev_get(registry, 0);
        let name = c"ggml_backend_dev_get_extra_bufts";
        let found = sys::ggml_backend_reg_get_proc_address(registry, name.as_ptr());
        if found.is_null() {
            return None;
        }
        let extra = std::mem::transmute::<*mut std::ffi::c_void, ExtraTypes>(found)(device);
        (0..)
            .map(|i| *extra.add(i))
            .take_while(|ty| !ty.is_null())
            .find(|&ty| CStr::from_ptr(sys::ggml_backend_buft_name(ty)) == c"CPU_REPACK")
    }
}
