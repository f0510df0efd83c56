//! Safe wrappers over llama.cpp: model, vocabulary, context, live adapter.
//!
//! What llama.cpp would abort or throw on is checked before the call, or stopped in `ggml-ext/bridge.cpp`.

mod adapter;
mod context;
mod experts;
mod log;
mod model;
mod quantize;
mod vocab;

use std::ffi::CStr;

use ggml_sys as sys;

pub use adapter::LiveAdapter;
pub use context::{Context, ContextOptions, Products, Token, TokenBatch, max_sequences};
pub use model::{Hparams, LayerHparams, Model, Placement};
pub use quantize::{FileType, TensorEntry};
pub use vocab::{Vocab, chat_apply_template};

use crate::{Error, Result};

/// Turns a status of `ggml-ext.h` into a result.
fn check(call: &str, status: sys::bupo_status, advice: &str) -> Result<()> {
    if status == sys::BUPO_OK {
        return Ok(());
    }
    // SAFETY: the string is valid until this thread's next failing call.
    let reason = unsafe { CStr::from_ptr(sys::bupo_last_error()) }.to_string_lossy();
    Err(Error::engine(call, reason, advice))
}
