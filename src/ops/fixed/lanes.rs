//! What fixed point takes of a processor beside pulp's vectors: products of whole numbers (VNNI), of 512 bits and of 256.

use std::arch::x86_64::*;

use pulp::x86::{V3, V4};
use pulp::{Simd, cast};

/// Vectors whose lanes hold a whole number of 32 bits, or a pair of 16, the first one in the low half.
///
/// # Safety
/// Of every method: the caller, into which it is compiled, was told of the instructions.
pub(super) trait Pairs: Simd {
    /// The nearest whole numbers, which 16 bits hold, as pairs.
    unsafe fn pairs(self, first: Self::f32s, second: Self::f32s) -> Self::i32s;
    unsafe fn floats(self, x: Self::i32s) -> Self::f32s;
    /// `sum` and the two products of pairs.
    unsafe fn dot(self, sum: Self::i32s, a: Self::i32s, b: Self::i32s) -> Self::i32s;
}

/// With `avx512vnni`.
impl Pairs for V4 {
    #[inline(always)]
    unsafe fn pairs(self, first: Self::f32s, second: Self::f32s) -> Self::i32s {
        // SAFETY: by the contract of the trait.
        unsafe {
            let low = _mm512_and_si512(_mm512_cvtps_epi32(cast(first)), _mm512_set1_epi32(0xffff));
            let high = _mm512_slli_epi32::<16>(_mm512_cvtps_epi32(cast(second)));
            cast(_mm512_or_si512(low, high))
        }
    }

    #[inline(always)]
    unsafe fn floats(self, x: Self::i32s) -> Self::f32s {
        // SAFETY: by the contract of the trait.
        unsafe { cast(_mm512_cvtepi32_ps(cast(x))) }
    }

    #[inline(always)]
    unsafe fn dot(self, sum: Self::i32s, a: Self::i32s, b: Self::i32s) -> Self::i32s {
        // SAFETY: by the contract of the trait.
        unsafe { cast(_mm512_dpwssd_epi32(cast(sum), cast(a), cast(b))) }
    }
}

/// With `avxvnni`.
impl Pairs for V3 {
    #[inline(always)]
    unsafe fn pairs(self, first: Self::f32s, second: Self::f32s) -> Self::i32s {
        // SAFETY: by the contract of the trait.
        unsafe {
            let low = _mm256_and_si256(_mm256_cvtps_epi32(cast(first)), _mm256_set1_epi32(0xffff));
            let high = _mm256_slli_epi32::<16>(_mm256_cvtps_epi32(cast(second)));
            cast(_mm256_or_si256(low, high))
        }
    }

    #[inline(always)]
    unsafe fn floats(self, x: Self::i32s) -> Self::f32s {
        // SAFETY: by the contract of the trait.
        unsafe { cast(_mm256_cvtepi32_ps(cast(x))) }
    }

    #[inline(always)]
    unsafe fn dot(self, sum: Self::i32s, a: Self::i32s, b: Self::i32s) -> Self::i32s {
        // SAFETY: by the contract of the trait.
        unsafe { cast(_mm256_dpwssd_avx_epi32(cast(sum), cast(a), cast(b))) }
    }
}
