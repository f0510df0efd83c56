//! Tensor element types: names, block sizes, row sizes, dequantisation.

use std::ffi::CStr;
use std::fmt;
use std::sync::OnceLock;

use ggml_sys as sys;

use super::convert::{Converter, converter};
#[cfg(target_arch = "x86_64")]
use super::convert::{QuantsReader, quants_reader};

/// A ggml tensor type that this build of ggml knows, e.g. `F32` or `Q4_K`.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Type(sys::ggml_type);

impl Type {
    /// 32-bit floats.
    pub const F32: Type = Type(sys::GGML_TYPE_F32);
    /// 16-bit floats.
    pub const F16: Type = Type(sys::GGML_TYPE_F16);
    /// bfloat16.
    pub const BF16: Type = Type(sys::GGML_TYPE_BF16);
    /// 8-bit blocks of 32.
    pub const Q8_0: Type = Type(sys::GGML_TYPE_Q8_0);
    /// 32-bit integers.
    pub const I32: Type = Type(sys::GGML_TYPE_I32);

    /// The type with this number in a GGUF file; `None` for numbers that ggml does not know or that it
    /// has withdrawn.
    pub fn from_raw(raw: u32) -> Option<Type> {
        let ty = Type(raw as sys::ggml_type);
        // SAFETY: the number is below GGML_TYPE_COUNT, so the traits table has an entry for it.
        let known = ty.0 < sys::GGML_TYPE_COUNT
            && unsafe { (*sys::ggml_get_type_traits(ty.0)).blck_size } > 0
            && unsafe { (*sys::ggml_get_type_traits(ty.0)).type_size } > 0;
        known.then_some(ty)
    }

    /// [`Type::from_raw`] of ggml's own enumeration, whose sign differs between platforms.
    pub(crate) fn from_ggml(raw: sys::ggml_type) -> Option<Type> {
        #[allow(clippy::unnecessary_cast)]
        Type::from_raw(raw as u32)
    }

    /// Every type this build of ggml knows.
    pub fn all() -> impl Iterator<Item = Type> {
        (0..sys::GGML_TYPE_COUNT).filter_map(Type::from_ggml)
    }

    /// The number in a GGUF file.
    pub fn raw(self) -> u32 {
        #[allow(clippy::unnecessary_cast)]
        let raw = self.0 as u32;
        raw
    }

    /// The name ggml gives it, e.g. `q4_K`.
    pub fn name(self) -> &'static str {
        // SAFETY: a `Type` holds a number ggml knows; the name is a static string.
        unsafe { CStr::from_ptr(sys::ggml_type_name(self.0)) }.to_str().unwrap_or("?")
    }

    /// Elements per block; a row's length must be a multiple of it.
    pub fn block_size(self) -> usize {
        // SAFETY: a `Type` holds a number ggml knows.
        unsafe { sys::ggml_blck_size(self.0) as usize }
    }

    /// Bytes per block.
    pub fn block_bytes(self) -> usize {
        // SAFETY: a `Type` holds a number ggml knows.
        unsafe { sys::ggml_type_size(self.0) }
    }

    /// Bytes of a row of `n` elements; `None` when `n` is not a multiple of the block or it overflows.
    pub fn row_bytes(self, n: usize) -> Option<usize> {
        n.is_multiple_of(self.block_size())
            .then(|| (n / self.block_size()).checked_mul(self.block_bytes()))
            .flatten()
    }

    /// Whether rows of this type can be turned into F32.
    pub fn can_dequantize(self) -> bool {
        self == Type::F32 || self.to_float().is_some()
    }

    /// ggml's own row converter to F32, where it has one.
    pub(crate) fn to_float(self) -> sys::ggml_to_float_t {
        // SAFETY: a `Type` holds a number ggml knows; the table is static.
        unsafe { (*sys::ggml_get_type_traits(self.0)).to_float }
    }

    fn own_converter(self) -> Option<Converter> {
        static OWN: OnceLock<Vec<Option<Converter>>> = OnceLock::new();
        let own = OWN.get_or_init(|| {
            let types = (0..sys::GGML_TYPE_COUNT).map(Type::from_ggml);
            types.map(|ty| ty.and_then(converter)).collect()
        });
        own[self.raw() as usize]
    }

    /// How rows are read as whole numbers, where this processor has the instructions for it and the type is one of those.
    #[cfg(target_arch = "x86_64")]
    pub(crate) fn quants_reader(self) -> Option<QuantsReader> {
        static READERS: OnceLock<Vec<Option<QuantsReader>>> = OnceLock::new();
        let readers = READERS.get_or_init(|| {
            let types = (0..sys::GGML_TYPE_COUNT).map(Type::from_ggml);
            types.map(|ty| ty.and_then(quants_reader)).collect()
        });
        readers[self.raw() as usize]
    }

    /// Dequantises whole blocks: `bytes` holds exactly `out.len()` elements.
    ///
    /// # Panics
    /// When the lengths do not agree, or the type cannot be dequantised (see [`Type::can_dequantize`]).
    pub fn dequantize(self, bytes: &[u8], out: &mut [f32]) {
        assert_eq!(Some(bytes.len()), self.row_bytes(out.len()), "{self}: row of {}", out.len());
        // SAFETY: `bytes` holds exactly the blocks of `out.len()` elements, as just asserted.
        unsafe { self.dequantize_raw(bytes.as_ptr(), out) }
    }

    /// [`Type::dequantize`] from a pointer.
    ///
    /// # Safety
    /// `from` is readable for the bytes of `out.len()` elements, a multiple of the block size.
    pub(crate) unsafe fn dequantize_raw(self, from: *const u8, out: &mut [f32]) {
        if self == Type::F32 {
            // SAFETY: by contract `from` holds out.len() floats; rows in a tensor are 4-byte aligned or
            // are copied bytewise here in any case.
            unsafe {
                std::ptr::copy_nonoverlapping(from, out.as_mut_ptr().cast::<u8>(), size_of_val(out))
            };
            return;
        }
        if let Some(convert) = self.own_converter() {
            // SAFETY: by contract of this function and of `Converter`; the processor was asked.
            return unsafe { convert(from, out) };
        }
        let convert = self.to_float().unwrap_or_else(|| panic!("{self} cannot be dequantised"));
        // SAFETY: by contract of this function and of ggml_to_float_t.
        unsafe { convert(from.cast(), out.as_mut_ptr(), out.len() as i64) }
    }
}

impl fmt::Display for Type {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl fmt::Debug for Type {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str(self.name())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn row_sizes_follow_the_blocks() {
        assert_eq!(Type::F32.row_bytes(5), Some(20));
        assert_eq!(Type::Q8_0.row_bytes(64), Some(68));
        assert_eq!(Type::Q8_0.row_bytes(33), None);
        assert_eq!(Type::from_raw(9999), None);
    }

    #[test]
    fn f16_dequantises() {
        let bytes: Vec<u8> =
            [1.5f32, -2.0].iter().flat_map(|x| half::f16::from_f32(*x).to_le_bytes()).collect();
        let mut out = [0.0; 2];
        Type::F16.dequantize(&bytes, &mut out);
        assert_eq!(out, [1.5, -2.0]);
    }
}
