//! A loaded model and its tensors.

use std::ffi::{CStr, CString};
use std::path::Path;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU64, Ordering};

use ggml_sys as sys;

use super::{Vocab, check, log};
use crate::ggml::{Device, Tensor, Type};
use crate::{Error, Result, ops};

/// Hyperparameters as llama.cpp read them from the file (fields: `ggml-ext/ggml-ext.h`).
pub type Hparams = sys::bupo_hparams;
/// Those of one layer.
pub type LayerHparams = sys::bupo_layer_hparams;

/// Where a model's weights go.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Placement {
    /// The device that computes.
    pub device: Device,
    /// With a GPU: how many layers, from the last one down, lie in its memory; none means all. Training
    /// copies the blocks of the others over the bus for each use, decoding computes them on the CPU.
    pub gpu_layers: Option<usize>,
}

impl Placement {
    /// As llama.cpp counts: -1 means all.
    fn n_gpu_layers(self) -> i32 {
        match self.gpu_layers {
            _ if self.device.is_host() => 0,
            Some(n) => n.min(i32::MAX as usize) as i32,
            None => -1,
        }
    }
}

/// A model in memory: mapped weights in plain blocks, one copy for decoding and training.
pub struct Model {
    raw: NonNull<sys::llama_model>,
    device: Device,
    free_before: Option<u64>,
    gpu_peak_bytes: AtomicU64,
}

// SAFETY: after loading, a llama_model is only read, apart from the list of its adapters, which
// `LiveAdapter` changes under a lock.
unsafe impl Send for Model {}
// SAFETY: as above.
unsafe impl Sync for Model {}

impl Model {
    /// Maps the weights of a GGUF file (of a split set: the first part stands for all).
    ///
    /// Weights are not repacked for the CPU's matrix kernels: training reads their blocks.
    ///
    /// # Errors
    /// [`Error::Engine`] with llama.cpp's own words.
    pub fn load(path: &Path, placement: Placement) -> Result<Model> {
        Model::load_with(path, placement, true)
    }

    /// Reads everything but the weights, for which no memory is taken: such a model can be asked for its
    /// sizes and vocabulary, not computed with.
    ///
    /// # Errors
    /// Those of [`Model::load`].
    pub fn load_outline(path: &Path) -> Result<Model> {
        Model::load_with(path, Placement::default(), false)
    }

    fn load_with(path: &Path, placement: Placement, weights: bool) -> Result<Model> {
        log::start();
        let text = path.to_str().and_then(|p| CString::new(p).ok()).ok_or_else(|| {
            Error::invalid(
                path.display().to_string(),
                "a path in UTF-8",
                "other bytes",
                "rename it",
            )
        })?;
        let free_before = placement.device.free_bytes()?;
        // The GPU, if any, and the end of the list.
        let mut devices =
            [placement.device.raw_device()?.unwrap_or(std::ptr::null_mut()), std::ptr::null_mut()];
        // SAFETY: default parameters with plain fields changed; a NUL-terminated path.
        let raw = unsafe {
            let mut params = sys::llama_model_default_params();
            params.n_gpu_layers = placement.n_gpu_layers();
            params.devices = devices.as_mut_ptr();
            params.load_mode =
                if weights { sys::LLAMA_LOAD_MODE_MMAP } else { sys::LLAMA_LOAD_MODE_NONE };
            params.no_alloc = !weights;
            params.use_extra_bufts = false;
            sys::llama_model_load_from_file(text.as_ptr(), params)
        };
        let raw = NonNull::new(raw).ok_or_else(|| {
            let call = format!("loading {}", path.display());
            Error::engine(call, log::take_last_words(), "check the file with `bupo-gguf inspect`")
        })?;
        let model =
            Model { raw, device: placement.device, free_before, gpu_peak_bytes: AtomicU64::new(0) };
        if weights && placement.device == Device::Cpu {
            let mut columns = [0i64; sys::GGML_TYPE_COUNT as usize];
            for ty in Type::all() {
                columns[ty.raw() as usize] = ops::faster_from(ty).unwrap_or(0) as i64;
            }
            let decoding = sys::bupo_decoding {
                product: Some(ops::weight_product),
                columns: columns.as_ptr(),
                wide: Some(ops::wide_product),
                wide_columns: ops::wide_from().unwrap_or(0) as i64,
                attention: Some(ops::decode_attention),
                most_heads: ops::MOST_HEADS as i64,
            };
            // SAFETY: kernels that keep the header's contract; a number for each type.
            let status = unsafe { sys::bupo_offer_decoding(&decoding) };
            check("offering our products", status, "report it")?;
        }
        Ok(model)
    }

    pub(super) fn raw(&self) -> *mut sys::llama_model {
        self.raw.as_ptr()
    }

    /// Where it is computed.
    pub fn device(&self) -> Device {
        self.device
    }

    /// Looks how much of its GPU's memory is taken now that was free before it was loaded. To be called when all that
    /// a piece of work takes is there.
    ///
    /// # Errors
    /// See [`Device::free_bytes`].
    pub fn look_at_memory(&self) -> Result<()> {
        if let (Some(before), Some(free)) = (self.free_before, self.device.free_bytes()?) {
            self.gpu_peak_bytes.fetch_max(before.saturating_sub(free), Ordering::Relaxed);
        }
        Ok(())
    }

    /// The most that [`Model::look_at_memory`] has seen, bytes; none before, and on the host.
    pub fn gpu_peak_bytes(&self) -> Option<u64> {
        Some(self.gpu_peak_bytes.load(Ordering::Relaxed)).filter(|&bytes| bytes > 0)
    }

    /// Memory of its GPU that nobody used before it was loaded, bytes; none on the host.
    pub fn free_before(&self) -> Option<u64> {
        self.free_before
    }

    /// Sizes and settings.
    pub fn hparams(&self) -> Result<Hparams> {
        // SAFETY: plain numbers, for which zero is a value.
        let mut out: Hparams = unsafe { std::mem::zeroed() };
        // SAFETY: a live model and a place for the result.
        let status = unsafe { sys::bupo_model_hparams(self.raw(), &mut out) };
        check("reading hyperparameters", status, "report it")?;
        Ok(out)
    }

    /// Sizes and settings of a layer, from 1; see `hparams` for how many there are.
    pub fn layer_hparams(&self, layer: usize) -> Result<LayerHparams> {
        // SAFETY: plain numbers, for which zero is a value.
        let mut out: LayerHparams = unsafe { std::mem::zeroed() };
        // SAFETY: a live model and a place for the result; the bridge checks the index.
        let status =
            unsafe { sys::bupo_model_layer_hparams(self.raw(), layer as u32 - 1, &mut out) };
        check("reading a layer's hyperparameters", status, "use another model")?;
        Ok(out)
    }

    /// Bytes that a decoding context takes for one token's keys and values, F16, all layers that have their own.
    pub fn kv_token_bytes(&self) -> Result<usize> {
        self.over_layers(|h| match h.recurrent {
            0 => 2 * (h.kv * h.n_head_kv * (h.head_size_k + h.head_size_v)) as usize,
            _ => 0,
        })
    }

    /// Bytes that a decoding context takes for one sequence's states, F32, all recurrent layers; 0 where there are none. A
    /// state cannot forget the last tokens that went into it.
    pub fn state_bytes(&self) -> Result<usize> {
        self.over_layers(|h| 4 * h.state as usize)
    }

    fn over_layers(&self, of: impl Fn(&LayerHparams) -> usize) -> Result<usize> {
        (1..=self.hparams()?.n_layer as usize).map(|l| Ok(of(&self.layer_hparams(l)?))).sum()
    }

    /// Tensor `index` of [`Model::tensors`].
    ///
    /// # Panics
    /// For an index out of range.
    pub fn tensor(&self, index: usize) -> Tensor<'_> {
        let (mut name, mut tensor) = (std::ptr::null(), std::ptr::null_mut());
        // SAFETY: a live model; the bridge checks the index; the tensor lives as long as the model.
        unsafe {
            let status = sys::bupo_model_tensor(self.raw(), index, &mut name, &mut tensor);
            assert_eq!(status, sys::BUPO_OK, "an index in range");
            Tensor::from_raw(tensor)
        }
    }

    /// Every tensor of the model, each once.
    pub fn tensors(&self) -> impl Iterator<Item = Tensor<'_>> {
        // SAFETY: a live model.
        let n = unsafe { sys::bupo_model_n_tensors(self.raw()) };
        (0..n).map(|index| self.tensor(index))
    }

    /// The vocabulary.
    pub fn vocab(&self) -> Vocab<'_> {
        // SAFETY: a live model; the vocabulary lives as long.
        unsafe { Vocab::new(sys::llama_model_get_vocab(self.raw())) }
    }

    /// The GGUF's chat template (Jinja), if it has one.
    pub fn chat_template(&self) -> Option<String> {
        // SAFETY: a live model; the default template is asked for by null.
        let text = unsafe { sys::llama_model_chat_template(self.raw(), std::ptr::null()) };
        // SAFETY: a NUL-terminated string of the model.
        (!text.is_null()).then(|| unsafe { CStr::from_ptr(text) }.to_string_lossy().into_owned())
    }

    /// Number of parameters.
    pub fn n_params(&self) -> u64 {
        // SAFETY: a live model.
        unsafe { sys::llama_model_n_params(self.raw()) }
    }

    /// Bytes of all tensors.
    pub fn n_bytes(&self) -> u64 {
        // SAFETY: a live model.
        unsafe { sys::llama_model_size(self.raw()) }
    }
}

impl Drop for Model {
    fn drop(&mut self) {
        // SAFETY: loaded once, freed once; contexts and adapters hold an Arc and are gone.
        unsafe { sys::llama_model_free(self.raw.as_ptr()) }
    }
}
