//! llama.cpp's log goes to `tracing`; its last words are kept for our errors.

use std::ffi::{CStr, c_char, c_void};
use std::sync::{Mutex, Once};

use ggml_sys as sys;

static START: Once = Once::new();
static LAST_WORDS: Mutex<String> = Mutex::new(String::new());

/// Starts llama.cpp once per process and takes over its log.
pub(super) fn start() {
    START.call_once(|| {
        let backend = crate::ggml::cpu_backend();
        tracing::info!("ggml's CPU backend: {backend}");
        // SAFETY: the callback is a plain function without data; called once before any other use.
        unsafe {
            sys::llama_log_set(Some(on_log), std::ptr::null_mut());
            sys::llama_backend_init();
        }
    });
}

/// What llama.cpp last complained of; empties the memory of it.
pub(super) fn take_last_words() -> String {
    let mut words = LAST_WORDS.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
    match std::mem::take(&mut *words) {
        empty if empty.is_empty() => "no reason given".into(),
        words => words,
    }
}

unsafe extern "C" fn on_log(level: sys::ggml_log_level, text: *const c_char, _data: *mut c_void) {
    if text.is_null() {
        return;
    }
    // SAFETY: llama.cpp passes a NUL-terminated string that lives for the call.
    let text = unsafe { CStr::from_ptr(text) }.to_string_lossy();
    let text = text.trim();
    if level == sys::GGML_LOG_LEVEL_ERROR {
        tracing::debug!(target: "llama.cpp", "{text}");
        if !text.is_empty() {
            let mut words = LAST_WORDS.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
            text.clone_into(&mut words);
        }
    } else if !text.is_empty() {
        tracing::trace!(target: "llama.cpp", "{text}");
    }
}
