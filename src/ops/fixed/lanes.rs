//! The vectors that fixed point takes, of 512 bits and of 256.

use std::arch::x86_64::*;

/// A set of instructions. What its methods do in each lane is told by their names.
///
/// # Safety
/// Of every method: the processor has the instructions, and the caller, into which it is compiled, was told so; pointers are
/// valid for a vector.
pub(super) trait Lanes {
    const LANES: usize;
    type Floats: Copy;
    /// Numbers of 32 bits, or pairs of 16, the first one in the low half.
    type Whole: Copy;

    unsafe fn load(from: *const f32) -> Self::Floats;
    unsafe fn store(to: *mut f32, x: Self::Floats);
    unsafe fn each(x: f32) -> Self::Floats;
    unsafe fn add(a: Self::Floats, b: Self::Floats) -> Self::Floats;
    unsafe fn sub(a: Self::Floats, b: Self::Floats) -> Self::Floats;
    unsafe fn mul(a: Self::Floats, b: Self::Floats) -> Self::Floats;
    unsafe fn div(a: Self::Floats, b: Self::Floats) -> Self::Floats;
    /// `a b + c`.
    unsafe fn mul_add(a: Self::Floats, b: Self::Floats, c: Self::Floats) -> Self::Floats;
    unsafe fn max(a: Self::Floats, b: Self::Floats) -> Self::Floats;
    unsafe fn abs(x: Self::Floats) -> Self::Floats;
    unsafe fn load_whole(from: *const f32) -> Self::Whole;
    unsafe fn store_whole(to: *mut f32, x: Self::Whole);
    unsafe fn each_whole(x: i32) -> Self::Whole;
    /// The nearest whole numbers, which 16 bits hold, as pairs.
    unsafe fn pairs(first: Self::Floats, second: Self::Floats) -> Self::Whole;
    unsafe fn floats(x: Self::Whole) -> Self::Floats;
    /// `sum` and the two products of pairs.
    unsafe fn dot(sum: Self::Whole, a: Self::Whole, b: Self::Whole) -> Self::Whole;
}

/// Methods that are one expression of intrinsics.
macro_rules! methods {
    ($($name:ident($($arg:ident: $ty:ty),*) $(-> $to:ty)? = $body:expr;)*) => {
        $(
            #[inline(always)]
            unsafe fn $name($($arg: $ty),*) $(-> $to)? {
                // SAFETY: by the contract of the trait.
                unsafe { $body }
            }
        )*
    };
}

/// `avx512f`, `avx512bw` and `avx512vnni`.
pub(super) struct Avx512Vnni;

impl Lanes for Avx512Vnni {
    const LANES: usize = 16;
    type Floats = __m512;
    type Whole = __m512i;

    methods! {
        load(from: *const f32) -> __m512 = _mm512_loadu_ps(from);
        store(to: *mut f32, x: __m512) = _mm512_storeu_ps(to, x);
        each(x: f32) -> __m512 = _mm512_set1_ps(x);
        add(a: __m512, b: __m512) -> __m512 = _mm512_add_ps(a, b);
        sub(a: __m512, b: __m512) -> __m512 = _mm512_sub_ps(a, b);
        mul(a: __m512, b: __m512) -> __m512 = _mm512_mul_ps(a, b);
        div(a: __m512, b: __m512) -> __m512 = _mm512_div_ps(a, b);
        mul_add(a: __m512, b: __m512, c: __m512) -> __m512 = _mm512_fmadd_ps(a, b, c);
        max(a: __m512, b: __m512) -> __m512 = _mm512_max_ps(a, b);
        abs(x: __m512) -> __m512 = _mm512_abs_ps(x);
        load_whole(from: *const f32) -> __m512i = _mm512_loadu_si512(from.cast());
        store_whole(to: *mut f32, x: __m512i) = _mm512_storeu_si512(to.cast(), x);
        each_whole(x: i32) -> __m512i = _mm512_set1_epi32(x);
        pairs(first: __m512, second: __m512) -> __m512i = {
            let first = _mm512_and_si512(_mm512_cvtps_epi32(first), _mm512_set1_epi32(0xffff));
            _mm512_or_si512(first, _mm512_slli_epi32::<16>(_mm512_cvtps_epi32(second)))
        };
        floats(x: __m512i) -> __m512 = _mm512_cvtepi32_ps(x);
        dot(sum: __m512i, a: __m512i, b: __m512i) -> __m512i = _mm512_dpwssd_epi32(sum, a, b);
    }
}

/// `avx2`, `fma` and `avxvnni`.
pub(super) struct AvxVnni;

impl Lanes for AvxVnni {
    const LANES: usize = 8;
    type Floats = __m256;
    type Whole = __m256i;

    methods! {
        load(from: *const f32) -> __m256 = _mm256_loadu_ps(from);
        store(to: *mut f32, x: __m256) = _mm256_storeu_ps(to, x);
        each(x: f32) -> __m256 = _mm256_set1_ps(x);
        add(a: __m256, b: __m256) -> __m256 = _mm256_add_ps(a, b);
        sub(a: __m256, b: __m256) -> __m256 = _mm256_sub_ps(a, b);
        mul(a: __m256, b: __m256) -> __m256 = _mm256_mul_ps(a, b);
        div(a: __m256, b: __m256) -> __m256 = _mm256_div_ps(a, b);
        mul_add(a: __m256, b: __m256, c: __m256) -> __m256 = _mm256_fmadd_ps(a, b, c);
        max(a: __m256, b: __m256) -> __m256 = _mm256_max_ps(a, b);
        abs(x: __m256) -> __m256 = _mm256_andnot_ps(_mm256_set1_ps(-0.0), x);
        load_whole(from: *const f32) -> __m256i = _mm256_loadu_si256(from.cast());
        store_whole(to: *mut f32, x: __m256i) = _mm256_storeu_si256(to.cast(), x);
        each_whole(x: i32) -> __m256i = _mm256_set1_epi32(x);
        pairs(first: __m256, second: __m256) -> __m256i = {
            let first = _mm256_and_si256(_mm256_cvtps_epi32(first), _mm256_set1_epi32(0xffff));
            _mm256_or_si256(first, _mm256_slli_epi32::<16>(_mm256_cvtps_epi32(second)))
        };
        floats(x: __m256i) -> __m256 = _mm256_cvtepi32_ps(x);
        dot(sum: __m256i, a: __m256i, b: __m256i) -> __m256i = _mm256_dpwssd_avx_epi32(sum, a, b);
    }
}
