//! An adapter made of our own tensors.

use std::any::Any;
use std::ffi::CString;
use std::ptr::NonNull;
use std::sync::{Arc, Mutex};

use ggml_sys as sys;

use super::{Model, check};
use crate::ggml::Tensor;
use crate::ops;
use crate::{Error, Result};

/// llama.cpp's list of a model's adapters is not made for several threads.
static REGISTRY: Mutex<()> = Mutex::new(());

/// An adapter that decoding applies; its tensors are the optimiser's. What is written into them, the
/// next decode uses.
pub struct LiveAdapter {
    raw: NonNull<sys::llama_adapter_lora>,
    // Freed after the adapter: the model, and the memory of the tensors.
    _model: Arc<Model>,
    _memory: Arc<dyn Any + Send + Sync>,
}

// SAFETY: llama.cpp only reads an adapter; writing its tensors needs `&mut` of their owner.
unsafe impl Send for LiveAdapter {}
// SAFETY: as above.
unsafe impl Sync for LiveAdapter {}

impl LiveAdapter {
    /// `pairs`: name of the base weight, A `[n_in, r]`, B `[r, n_out]`, F32 with data that `memory`
    /// keeps alive.
    ///
    /// # Errors
    /// [`Error::Engine`] when a pair does not fit its weight.
    pub(crate) fn new(
        model: &Arc<Model>,
        alpha: f32,
        pairs: &[(String, Tensor<'_>, Tensor<'_>)],
        memory: Arc<dyn Any + Send + Sync>,
    ) -> Result<LiveAdapter> {
        let names: Vec<CString> = pairs
            .iter()
            .map(|(name, ..)| CString::new(name.as_str()))
            .collect::<Result<_, _>>()
            .map_err(|_| Error::invalid("adapter", "names without NUL", "a NUL", "report it"))?;
        let raw_pairs: Vec<_> = names
            .iter()
            .zip(pairs)
            .map(|(name, (_, a, b))| sys::bupo_lora_pair {
                weight: name.as_ptr(),
                a: a.raw(),
                b: b.raw(),
            })
            .collect();
        let mut raw = std::ptr::null_mut();
        let guard = REGISTRY.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        // SAFETY: a live model; pairs with names and tensors that live for the call, the tensors as long
        // as `memory`, which the result holds; a product that keeps the header's contract.
        let status = unsafe {
            sys::bupo_adapter_new(
                model.raw(),
                alpha,
                raw_pairs.as_ptr(),
                raw_pairs.len(),
                Some(ops::factor_product),
                &mut raw,
            )
        };
        drop(guard);
        check("making the live adapter", status, "the adapter belongs to another model")?;
        let raw = NonNull::new(raw).expect("BUPO_OK gives an adapter");
        Ok(LiveAdapter { raw, _model: model.clone(), _memory: memory })
    }

    pub(super) fn raw(&self) -> *mut sys::llama_adapter_lora {
        self.raw.as_ptr()
    }
}

impl Drop for LiveAdapter {
    fn drop(&mut self) {
        let _guard = REGISTRY.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        // SAFETY: made by bupo_adapter_new, freed once; contexts that used it hold an Arc and are gone.
        unsafe { sys::bupo_adapter_free(self.raw.as_ptr()) }
    }
}
