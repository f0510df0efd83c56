//! What fixed point takes of a processor beside pulp's vectors: products of whole numbers (VNNI), of 512 bits and of 256.

use std::arch::x86_64::*;
use std::sync::OnceLock;

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

/// What a processor has of them, as pulp's vectors that go with them.
#[derive(Clone, Copy)]
pub(super) enum Instructions {
    Avx512Vnni(V4),
    AvxVnni(V3),
}

/// The quickest that this processor has.
pub(super) fn instructions() -> Option<Instructions> {
    static HAS: OnceLock<Option<Instructions>> = OnceLock::new();
    *HAS.get_or_init(|| Instructions::all().into_iter().flatten().next())
}

/// What is compiled for each of them.
pub(super) trait Kernel {
    /// # Safety
    /// The kernel's own; the processor has the instructions. To be inlined.
    unsafe fn run<S: Pairs>(self, simd: S);
}

impl Instructions {
    /// The widest first.
    pub(super) fn all() -> [Option<Instructions>; 2] {
        let wide = V4::try_new().filter(|_| is_x86_feature_detected!("avx512vnni"));
        let narrow = V3::try_new().filter(|_| is_x86_feature_detected!("avxvnni"));
        [wide.map(Instructions::Avx512Vnni), narrow.map(Instructions::AvxVnni)]
    }

    /// # Safety
    /// The kernel's contract.
    pub(super) unsafe fn run(self, kernel: impl Kernel) {
        // SAFETY: by contract; the processor was asked when the vectors were made.
        unsafe {
            match self {
                Instructions::Avx512Vnni(simd) => by_avx512(simd, kernel),
                Instructions::AvxVnni(simd) => by_avx(simd, kernel),
            }
        }
    }
}

// What a processor of x86-64-v4 and -v3 has, which pulp's methods are compiled for, and the products.

#[target_feature(enable = "avx512f,avx512bw,avx512cd,avx512dq,avx512vl,avx512vnni,fma")]
unsafe fn by_avx512(simd: V4, kernel: impl Kernel) {
    // SAFETY: by contract.
    unsafe { kernel.run(simd) }
}

#[target_feature(enable = "avx2,fma,avxvnni")]
unsafe fn by_avx(simd: V3, kernel: impl Kernel) {
    // SAFETY: by contract.
    unsafe { kernel.run(simd) }
}
