//! Quantised rows to F32 or to whole numbers by vector instructions, where ggml's converters take the numbers one at a time.
//!
//! Every format comes down to small integers `q`, `y = scale q + add`. The values are ggml's up to the rounding of one
//! multiplication and addition.

#[cfg(target_arch = "x86_64")]
#[macro_use]
mod layouts;
#[cfg(target_arch = "x86_64")]
mod x86;

use super::Type;
#[cfg(target_arch = "x86_64")]
pub(crate) use x86::{LARGEST, QUANTS, Quants, QuantsForm, QuantsReader};
#[cfg(target_arch = "x86_64")]
pub(super) use x86::{converter, quants_reader};

/// Turns the whole blocks of `out.len()` elements at `from`, which are readable, into F32.
pub(super) type Converter = unsafe fn(from: *const u8, out: &mut [f32]);

/// ggml's own are taken.
#[cfg(not(target_arch = "x86_64"))]
pub(super) fn converter(_: Type) -> Option<Converter> {
    None
}
