//! Quantised rows to F32 or to whole numbers by vector instructions, where ggml's converters take the numbers one at a time.
//!
//! Every format below comes down to sixteen small integers `q` at a time, `y = scale q + add`; the layouts are those of
//! `ggml-common.h`. The values are ggml's up to the rounding of one multiplication and addition.

#[cfg(target_arch = "x86_64")]
use std::arch::x86_64::*;

use super::Type;

/// Turns the whole blocks of `out.len()` elements at `from`, which are readable, into F32.
pub(super) type Converter = unsafe fn(from: *const u8, out: &mut [f32]);

/// Neighbours of a row that a [`Quants`] holds.
pub(crate) const QUANTS: usize = 32;

/// Neighbours of a quantised row, `y = scale q + add`.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub(crate) struct Quants {
    pub q: [i16; QUANTS],
    pub scale: f32,
    pub add: f32,
}

/// The largest q, by [`QuantsReader::share`].
pub(crate) const LARGEST: usize = 4096;

/// How a type's rows are read as whole numbers.
#[derive(Clone, Copy)]
pub(crate) struct QuantsReader {
    /// Reads the whole blocks of `out.len()` times [`QUANTS`] elements at `from`, which are readable.
    pub read: unsafe fn(from: *const u8, out: &mut [Quants]),
    /// Whether anything is ever added.
    pub adds: bool,
    /// So many [`Quants`] have one scale, and their q are at most [`LARGEST`] by as many.
    pub share: usize,
}

/// The reader of a type for this processor, where there is one.
#[cfg(target_arch = "x86_64")]
pub(super) fn quants_reader(ty: Type) -> Option<QuantsReader> {
    let read = has_avx2().then(|| whole::converter(ty)).flatten()?;
    let adds = matches!(ty.name(), "q4_1" | "q5_1" | "q4_K" | "q5_K");
    let share = if matches!(ty.name(), "q4_K" | "q5_K") { 2 } else { 1 };
    Some(QuantsReader { read, adds, share })
}

#[cfg(not(target_arch = "x86_64"))]
pub(super) fn quants_reader(_: Type) -> Option<QuantsReader> {
    None
}

/// The converter of a type for this processor; `None` where ggml's own is to be taken.
#[cfg(target_arch = "x86_64")]
pub(super) fn converter(ty: Type) -> Option<Converter> {
    if !has_avx2() {
        None
    } else if ty == Type::F16 {
        Some(f16)
    } else if has_avx512() {
        avx512::converter(ty)
    } else {
        avx2::converter(ty)
    }
}

#[cfg(not(target_arch = "x86_64"))]
pub(super) fn converter(_: Type) -> Option<Converter> {
    None
}

#[cfg(target_arch = "x86_64")]
fn has_avx512() -> bool {
    is_x86_feature_detected!("avx512f") && is_x86_feature_detected!("avx512bw") && has_avx2()
}

#[cfg(target_arch = "x86_64")]
fn has_avx2() -> bool {
    is_x86_feature_detected!("avx2")
        && is_x86_feature_detected!("fma")
        && is_x86_feature_detected!("f16c")
}

/// The scales, and `-least` times the offsets, six bits each, of the eight parts of a block of `q4_K` or `q5_K`.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2")]
#[inline]
unsafe fn scales_and_adds(packed: *const u8, least: f32) -> ([i8; 8], [f32; 8]) {
    // SAFETY: twelve readable bytes, by the callers' contract.
    let [a, b, c] = unsafe { packed.cast::<[u32; 3]>().read_unaligned() }.map(u32::from_le);
    let (six, four, two) = (0x3f3f_3f3f, 0x0f0f_0f0f, 0x3030_3030);
    let bytes = |first: u32, last: u32| first as u64 | (last as u64) << 32;
    let scales = bytes(a & six, c & four | a >> 2 & two);
    let offsets = bytes(b & six, c >> 4 & four | b >> 2 & two);
    let offsets = _mm256_cvtepu8_epi32(_mm_cvtsi64_si128(offsets as i64));
    let mut adds = [0.0; 8];
    let add = _mm256_mul_ps(_mm256_cvtepi32_ps(offsets), _mm256_set1_ps(-least));
    // SAFETY: eight floats.
    unsafe { _mm256_storeu_ps(adds.as_mut_ptr(), add) };
    (scales.to_le_bytes().map(|scale| scale as i8), adds)
}

/// What the sixteen numbers of `iq4_nl` and `iq4_xs` stand for.
#[cfg(target_arch = "x86_64")]
const IQ4: [i8; 16] = [-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113];

/// Twice the numbers of four bits in floating point (E2M1).
#[cfg(target_arch = "x86_64")]
const FP4: [i8; 16] = [0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12];

/// Half of 2^(e - 127).
#[cfg(target_arch = "x86_64")]
fn half_power(e: u8) -> f32 {
    f32::from_bits(if e < 2 { 0x0020_0000 << e } else { (e as u32 - 1) << 23 })
}

/// The scales, six bits each less 32, of the sixteen parts of a block of `q3_K`.
#[cfg(target_arch = "x86_64")]
#[inline(always)]
unsafe fn q3_scales(packed: *const u8) -> [i8; 16] {
    // SAFETY: twelve readable bytes, by the callers' contract.
    let [a, b, top] = unsafe { packed.cast::<[u32; 3]>().read_unaligned() }.map(u32::from_le);
    let four = |bits: u32, top: u32| bits & 0x0f0f_0f0f | (top & 0x0303_0303) << 4;
    let words = [four(a, top), four(b, top >> 2), four(a >> 4, top >> 4), four(b >> 4, top >> 6)];
    let mut scales = [0; 16];
    for (scales, word) in scales.as_chunks_mut::<4>().0.iter_mut().zip(words) {
        *scales = word.to_le_bytes().map(|scale| scale as i8 - 32);
    }
    scales
}

/// The number of a half.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "f16c")]
#[inline]
unsafe fn half(from: *const u8) -> f32 {
    // SAFETY: two readable bytes, by the callers' contract.
    let bits = unsafe { from.cast::<u16>().read_unaligned() };
    _mm_cvtss_f32(_mm_cvtph_ps(_mm_cvtsi32_si128(bits as i32)))
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,f16c")]
unsafe fn f16(from: *const u8, out: &mut [f32]) {
    let (eights, rest) = out.as_chunks_mut::<8>();
    let halves = from.cast::<__m128i>();
    // SAFETY: whole blocks, by the contract of `Converter`.
    unsafe {
        for (i, out) in eights.iter_mut().enumerate() {
            let y = _mm256_cvtph_ps(_mm_loadu_si128(halves.add(i)));
            _mm256_storeu_ps(out.as_mut_ptr(), y);
        }
        for (i, out) in rest.iter_mut().enumerate() {
            *out = half(from.add(2 * (8 * eights.len() + i)));
        }
    }
}

/// The converters into `$out`, each of `$per` elements, for one instruction set. `put` takes `scale (times q) + add` of two
/// times sixteen signed bytes q, and the place of the first among the elements of `out`.
#[cfg(target_arch = "x86_64")]
macro_rules! converters {
    ($name:ident, $features:literal, $out:ty, $per:expr, $put:item) => {
        mod $name {
            use super::*;

            pub(super) fn converter(ty: Type) -> Option<unsafe fn(*const u8, &mut [$out])> {
                Some(match ty.name() {
                    "q4_0" => q4_0,
                    "q4_1" => q4_1,
                    "q5_0" => q5_0,
                    "q5_1" => q5_1,
                    "q8_0" => q8_0,
                    "iq4_nl" => iq4_nl,
                    "mxfp4" => mxfp4,
                    "q3_K" => q3_k,
                    "iq4_xs" => iq4_xs,
                    "q4_K" => q4_k,
                    "q5_K" => q5_k,
                    "q6_K" => q6_k,
                    _ => return None,
                })
            }

            #[target_feature(enable = $features)]
            #[inline]
            $put

            #[target_feature(enable = $features)]
            #[inline]
            unsafe fn bytes(from: *const u8) -> __m128i {
                // SAFETY: sixteen readable bytes, by the callers' contract.
                unsafe { _mm_loadu_si128(from.cast()) }
            }

            #[target_feature(enable = $features)]
            #[inline]
            fn low(q: __m128i) -> __m128i {
                _mm_and_si128(q, _mm_set1_epi8(15))
            }

            #[target_feature(enable = $features)]
            #[inline]
            fn high(q: __m128i) -> __m128i {
                low(_mm_srli_epi16::<4>(q))
            }

            /// Where a bit of `bits` is set in a byte of `q`, `value`; else 0.
            #[target_feature(enable = $features)]
            #[inline]
            fn where_set(q: __m128i, bits: __m128i, value: i8) -> __m128i {
                let set = _mm_cmpeq_epi8(_mm_and_si128(q, bits), bits);
                _mm_and_si128(set, _mm_set1_epi8(value))
            }

            /// 16 where the bit of an element is set, of sixteen bits.
            #[target_feature(enable = $features)]
            #[inline]
            fn fifth_bits(bits: u16) -> __m128i {
                let [a, b] = bits.to_le_bytes().map(|byte| 0x0101_0101_0101_0101 * byte as i64);
                let single = _mm_set1_epi64x(0x8040_2010_0804_0201u64 as i64);
                where_set(_mm_set_epi64x(b, a), single, 16)
            }

            #[target_feature(enable = $features)]
            unsafe fn q4_0(mut from: *const u8, out: &mut [$out]) {
                for out in out.chunks_exact_mut(32 / $per) {
                    // SAFETY: whole blocks, by the contract of `Converter`.
                    unsafe {
                        let (scale, q) = (half(from), bytes(from.add(2)));
                        let eight = _mm_set1_epi8(8);
                        let q = [low(q), high(q)].map(|q| _mm_sub_epi8(q, eight));
                        put(q, [1, 1], scale, 0.0, out, 0);
                        from = from.add(18);
                    }
                }
            }

            #[target_feature(enable = $features)]
            unsafe fn q4_1(mut from: *const u8, out: &mut [$out]) {
                for out in out.chunks_exact_mut(32 / $per) {
                    // SAFETY: whole blocks, by the contract of `Converter`.
                    unsafe {
                        let (scale, add, q) = (half(from), half(from.add(2)), bytes(from.add(4)));
                        put([low(q), high(q)], [1, 1], scale, add, out, 0);
                        from = from.add(20);
                    }
                }
            }

            #[target_feature(enable = $features)]
            unsafe fn q5_0(mut from: *const u8, out: &mut [$out]) {
                for out in out.chunks_exact_mut(32 / $per) {
                    // SAFETY: whole blocks, by the contract of `Converter`.
                    unsafe {
                        let (scale, q) = (half(from), bytes(from.add(6)));
                        let [a, b] = from.add(2).cast::<[u16; 2]>().read_unaligned();
                        let sixteen = _mm_set1_epi8(16);
                        let first = _mm_or_si128(low(q), fifth_bits(a));
                        let second = _mm_or_si128(high(q), fifth_bits(b));
                        let q = [first, second].map(|q| _mm_sub_epi8(q, sixteen));
                        put(q, [1, 1], scale, 0.0, out, 0);
                        from = from.add(22);
                    }
                }
            }

            #[target_feature(enable = $features)]
            unsafe fn q5_1(mut from: *const u8, out: &mut [$out]) {
                for out in out.chunks_exact_mut(32 / $per) {
                    // SAFETY: whole blocks, by the contract of `Converter`.
                    unsafe {
                        let (scale, add, q) = (half(from), half(from.add(2)), bytes(from.add(8)));
                        let [a, b] = from.add(4).cast::<[u16; 2]>().read_unaligned();
                        let first = _mm_or_si128(low(q), fifth_bits(a));
                        let second = _mm_or_si128(high(q), fifth_bits(b));
                        put([first, second], [1, 1], scale, add, out, 0);
                        from = from.add(24);
                    }
                }
            }

            #[target_feature(enable = $features)]
            unsafe fn q8_0(mut from: *const u8, out: &mut [$out]) {
                for out in out.chunks_exact_mut(32 / $per) {
                    // SAFETY: whole blocks, by the contract of `Converter`.
                    unsafe {
                        let scale = half(from);
                        let q = [bytes(from.add(2)), bytes(from.add(18))];
                        put(q, [1, 1], scale, 0.0, out, 0);
                        from = from.add(34);
                    }
                }
            }

            /// What sixteen numbers of four bits stand for.
            #[target_feature(enable = $features)]
            #[inline]
            fn looked_up(q: __m128i, values: [i8; 16]) -> __m128i {
                // SAFETY: sixteen bytes.
                let values = unsafe { _mm_loadu_si128(values.as_ptr().cast()) };
                _mm_shuffle_epi8(values, q)
            }

            #[target_feature(enable = $features)]
            unsafe fn iq4_nl(mut from: *const u8, out: &mut [$out]) {
                for out in out.chunks_exact_mut(32 / $per) {
                    // SAFETY: whole blocks, by the contract of `Converter`.
                    unsafe {
                        let (scale, q) = (half(from), bytes(from.add(2)));
                        let q = [low(q), high(q)].map(|q| looked_up(q, IQ4));
                        put(q, [1, 1], scale, 0.0, out, 0);
                        from = from.add(18);
                    }
                }
            }

            #[target_feature(enable = $features)]
            unsafe fn mxfp4(mut from: *const u8, out: &mut [$out]) {
                for out in out.chunks_exact_mut(32 / $per) {
                    // SAFETY: whole blocks, by the contract of `Converter`.
                    unsafe {
                        let (scale, q) = (half_power(*from), bytes(from.add(1)));
                        let q = [low(q), high(q)].map(|q| looked_up(q, FP4));
                        put(q, [1, 1], scale, 0.0, out, 0);
                        from = from.add(17);
                    }
                }
            }

            #[target_feature(enable = $features)]
            unsafe fn q3_k(mut from: *const u8, out: &mut [$out]) {
                for out in out.chunks_exact_mut(256 / $per) {
                    // SAFETY: whole blocks, by the contract of `Converter`.
                    unsafe {
                        let d = half(from.add(108));
                        let scales = q3_scales(from.add(96));
                        let third = [0, 16].map(|half| bytes(from.add(half)));
                        for (i, out) in out.chunks_exact_mut(32 / $per).enumerate() {
                            let bit = _mm_set1_epi8((1u8 << i) as i8);
                            let low_bits = from.add(32 + 32 * (i / 4));
                            let q = [0, 1].map(|half| {
                                let q = bytes(low_bits.add(16 * half));
                                let q = match i % 4 {
                                    0 => q,
                                    1 => _mm_srli_epi16::<2>(q),
                                    2 => _mm_srli_epi16::<4>(q),
                                    _ => _mm_srli_epi16::<6>(q),
                                };
                                let q = _mm_and_si128(q, _mm_set1_epi8(3));
                                let q = _mm_or_si128(q, where_set(third[half], bit, 4));
                                _mm_sub_epi8(q, _mm_set1_epi8(4))
                            });
                            put(q, [scales[2 * i], scales[2 * i + 1]], d, 0.0, out, 0);
                        }
                        from = from.add(110);
                    }
                }
            }

            #[target_feature(enable = $features)]
            unsafe fn iq4_xs(mut from: *const u8, out: &mut [$out]) {
                for out in out.chunks_exact_mut(256 / $per) {
                    // SAFETY: whole blocks, by the contract of `Converter`.
                    unsafe {
                        let d = half(from);
                        let top = u16::from_le(from.add(2).cast::<u16>().read_unaligned());
                        for (i, out) in out.chunks_exact_mut(32 / $per).enumerate() {
                            let low_bits = *from.add(4 + i / 2) >> (4 * (i % 2)) & 15;
                            let scale = low_bits as i8 | ((top >> (2 * i) & 3) << 4) as i8;
                            let q = bytes(from.add(8 + 16 * i));
                            let q = [low(q), high(q)].map(|q| looked_up(q, IQ4));
                            put(q, [scale - 32; 2], d, 0.0, out, 0);
                        }
                        from = from.add(136);
                    }
                }
            }

            #[target_feature(enable = $features)]
            unsafe fn q4_k(mut from: *const u8, out: &mut [$out]) {
                for out in out.chunks_exact_mut(256 / $per) {
                    // SAFETY: whole blocks, by the contract of `Converter`.
                    unsafe {
                        let (d, least) = (half(from), half(from.add(2)));
                        let (scales, adds) = scales_and_adds(from.add(4), least);
                        for (pair, out) in out.chunks_exact_mut(64 / $per).enumerate() {
                            let q = [0, 16].map(|half| bytes(from.add(16 + 32 * pair + half)));
                            let (a, b) = (2 * pair, 2 * pair + 1);
                            put(q.map(|q| low(q)), [scales[a]; 2], d, adds[a], out, 0);
                            put(q.map(|q| high(q)), [scales[b]; 2], d, adds[b], out, 32);
                        }
                        from = from.add(144);
                    }
                }
            }

            #[target_feature(enable = $features)]
            unsafe fn q5_k(mut from: *const u8, out: &mut [$out]) {
                for out in out.chunks_exact_mut(256 / $per) {
                    // SAFETY: whole blocks, by the contract of `Converter`.
                    unsafe {
                        let (d, least) = (half(from), half(from.add(2)));
                        let (scales, adds) = scales_and_adds(from.add(4), least);
                        let more = [0, 16].map(|half| bytes(from.add(16 + half)));
                        for (pair, out) in out.chunks_exact_mut(64 / $per).enumerate() {
                            let q = [0, 16].map(|half| bytes(from.add(48 + 32 * pair + half)));
                            let (a, b) = (2 * pair, 2 * pair + 1);
                            let fifth = |more, bit| {
                                where_set(more, _mm_set1_epi8((1u8 << bit) as i8), 16)
                            };
                            let both = |q: [__m128i; 2], bit| {
                                [0, 1].map(|i| _mm_or_si128(q[i], fifth(more[i], bit)))
                            };
                            let (first, second) = (q.map(|q| low(q)), q.map(|q| high(q)));
                            put(both(first, a), [scales[a]; 2], d, adds[a], out, 0);
                            put(both(second, b), [scales[b]; 2], d, adds[b], out, 32);
                        }
                        from = from.add(176);
                    }
                }
            }

            #[target_feature(enable = $features)]
            unsafe fn q6_k(mut from: *const u8, out: &mut [$out]) {
                for out in out.chunks_exact_mut(256 / $per) {
                    // SAFETY: whole blocks, by the contract of `Converter`.
                    unsafe {
                        let d = half(from.add(208));
                        for (part, out) in out.chunks_exact_mut(128 / $per).enumerate() {
                            let (low_bits, high_bits) = (from.add(64 * part), from.add(128 + 32 * part));
                            let scales = from.add(192 + 8 * part).cast::<i8>();
                            let halves = [0, 16].map(|half| {
                                let more = bytes(high_bits.add(half));
                                let (a, b) = (bytes(low_bits.add(half)), bytes(low_bits.add(32 + half)));
                                let top = |shifted| {
                                    _mm_slli_epi16::<4>(_mm_and_si128(shifted, _mm_set1_epi8(3)))
                                };
                                let q = [
                                    _mm_or_si128(low(a), top(more)),
                                    _mm_or_si128(low(b), top(_mm_srli_epi16::<2>(more))),
                                    _mm_or_si128(high(a), top(_mm_srli_epi16::<4>(more))),
                                    _mm_or_si128(high(b), top(_mm_srli_epi16::<6>(more))),
                                ];
                                q.map(|q| _mm_sub_epi8(q, _mm_set1_epi8(32)))
                            });
                            for i in 0..4 {
                                let q = halves.map(|half| half[i]);
                                let times = [0, 1].map(|half| *scales.add(2 * i + half));
                                put(q, times, d, 0.0, out, 32 * i);
                            }
                        }
                        from = from.add(210);
                    }
                }
            }
        }
    };
}

#[cfg(target_arch = "x86_64")]
converters!(
    avx512,
    "avx512f,avx512bw,f16c",
    f32,
    1,
    fn put(q: [__m128i; 2], times: [i8; 2], scale: f32, add: f32, out: &mut [f32], at: usize) {
        let halves = out[at..at + 32].as_chunks_mut::<16>().0;
        for ((q, times), out) in q.into_iter().zip(times).zip(halves) {
            let q = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(q));
            let scale = _mm512_set1_ps(scale * times as f32);
            let y = _mm512_fmadd_ps(q, scale, _mm512_set1_ps(add));
            // SAFETY: sixteen floats.
            unsafe { _mm512_storeu_ps(out.as_mut_ptr(), y) }
        }
    }
);

#[cfg(target_arch = "x86_64")]
converters!(
    avx2,
    "avx2,fma,f16c",
    f32,
    1,
    fn put(q: [__m128i; 2], times: [i8; 2], scale: f32, add: f32, out: &mut [f32], at: usize) {
        let halves = out[at..at + 32].as_chunks_mut::<16>().0;
        for ((q, times), out) in q.into_iter().zip(times).zip(halves) {
            let (scale, add) = (_mm256_set1_ps(scale * times as f32), _mm256_set1_ps(add));
            for (q, out) in [q, _mm_srli_si128::<8>(q)].into_iter().zip(out.chunks_exact_mut(8)) {
                let y = _mm256_fmadd_ps(_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(q)), scale, add);
                // SAFETY: eight floats.
                unsafe { _mm256_storeu_ps(out.as_mut_ptr(), y) }
            }
        }
    }
);

// Both halves of a `Quants` have one scale, whose factors of sixteen elements each are in q.
#[cfg(target_arch = "x86_64")]
converters!(
    whole,
    "avx2,f16c",
    Quants,
    QUANTS,
    fn put(q: [__m128i; 2], times: [i8; 2], scale: f32, add: f32, out: &mut [Quants], at: usize) {
        let part = &mut out[at / QUANTS];
        (part.scale, part.add) = (scale, add);
        let halves = part.q.as_chunks_mut::<16>().0;
        for ((q, times), out) in q.into_iter().zip(times).zip(halves) {
            let q = _mm256_mullo_epi16(_mm256_cvtepi8_epi16(q), _mm256_set1_epi16(times as i16));
            // SAFETY: sixteen numbers.
            unsafe { _mm256_storeu_si256(out.as_mut_ptr().cast(), q) }
        }
    }
);

#[cfg(all(test, target_arch = "x86_64"))]
mod tests {
    use rand::{RngCore, SeedableRng};

    use super::*;

    /// Where halves stand in a block.
    fn halves(ty: Type) -> &'static [usize] {
        match ty.name() {
            "f16" => &[0],
            "q4_0" | "q5_0" | "q8_0" | "iq4_nl" | "iq4_xs" => &[0],
            "q3_K" => &[108],
            "mxfp4" => &[],
            "q6_K" => &[208],
            _ => &[0, 2],
        }
    }

    /// `n` blocks of random bits, with small numbers where a block has halves.
    fn blocks(ty: Type, n: usize) -> Vec<u8> {
        let mut random = rand_chacha::ChaCha8Rng::seed_from_u64(1);
        let mut bytes = vec![0; n * ty.block_bytes()];
        random.fill_bytes(&mut bytes);
        for (i, block) in bytes.chunks_exact_mut(ty.block_bytes()).enumerate() {
            if ty.name() == "mxfp4" {
                // Powers that a sum holds, and the two that are subnormal.
                block[0] = if i < 2 { i as u8 } else { 115 + i as u8 };
            }
            for &at in halves(ty) {
                // Subnormal ones among them.
                let value =
                    half::f16::from_f32(if i % 5 == 0 { 3e-6 } else { 0.37 } * (i as f32 - 7.5));
                block[at..at + 2].copy_from_slice(&value.to_le_bytes());
            }
        }
        bytes
    }

    fn agrees(ty: Type, convert: impl Fn(&[u8], &mut [f32])) {
        let n = 19 * ty.block_size();
        let bytes = blocks(ty, 19);
        let (mut got, mut want) = (vec![0f32; n], vec![0f32; n]);
        convert(&bytes, &mut got);
        // SAFETY: nineteen blocks; ggml has a converter for each of these types.
        unsafe {
            ty.to_float().expect("a converter")(bytes.as_ptr().cast(), want.as_mut_ptr(), n as i64);
        }
        for (block, (got, want)) in got.chunks(32).zip(want.chunks(32)).enumerate() {
            let largest = want.iter().fold(0f32, |m, x| m.max(x.abs()));
            for (i, (got, want)) in got.iter().zip(want).enumerate() {
                let off = (got - want).abs();
                assert!(off <= 4e-7 * largest, "{ty}, part {block}, {i}: {got} for {want}");
            }
        }
    }

    #[test]
    fn rows_are_those_of_ggml() {
        let mut tried = 0;
        for ty in Type::all() {
            let half = (has_avx2() && ty == Type::F16).then_some(f16 as Converter);
            let wide = has_avx512().then(|| avx512::converter(ty)).flatten();
            let narrow = has_avx2().then(|| avx2::converter(ty)).flatten();
            for convert in half.into_iter().chain(wide).chain(narrow) {
                agrees(ty, |bytes, out| {
                    // SAFETY: whole blocks, on a processor that has what the converter takes.
                    unsafe { convert(bytes.as_ptr(), out) }
                });
                tried += 1;
            }
            let Some(reader) = quants_reader(ty) else { continue };
            agrees(ty, |bytes, out| {
                let mut quants =
                    vec![Quants { q: [0; QUANTS], scale: 0.0, add: 0.0 }; out.len() / QUANTS];
                // SAFETY: as above.
                unsafe { (reader.read)(bytes.as_ptr(), &mut quants) };
                for parts in quants.chunks(reader.share) {
                    assert!(parts.iter().all(|part| part.scale == parts[0].scale), "{ty}");
                }
                for (part, out) in quants.iter().zip(out.chunks_exact_mut(QUANTS)) {
                    assert!(reader.adds || part.add == 0.0, "{ty}");
                    for (q, out) in part.q.iter().zip(out) {
                        assert!(q.unsigned_abs() as usize <= LARGEST / reader.share, "{ty}");
                        *out = part.scale.mul_add(*q as f32, part.add);
                    }
                }
            });
        }
        assert!(tried > 0 || !has_avx2());
    }
}
