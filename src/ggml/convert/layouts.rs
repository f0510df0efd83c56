//! How the blocks of each format are laid out (`ggml-common.h`), as converters for any instruction set.

use std::arch::x86_64::*;

/// The scales, and `-least` times the offsets, six bits each, of the eight parts of a block of `q4_K` or `q5_K`.
#[target_feature(enable = "avx2")]
#[inline]
pub(super) unsafe fn scales_and_adds(packed: *const u8, least: f32) -> ([i8; 8], [f32; 8]) {
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
pub(super) const IQ4: [i8; 16] =
    [-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113];

/// Twice the numbers of four bits in floating point (E2M1).
pub(super) const FP4: [i8; 16] = [0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12];

/// Half of 2^(e - 127).
pub(super) fn half_power(e: u8) -> f32 {
    f32::from_bits(if e < 2 { 0x0020_0000 << e } else { (e as u32 - 1) << 23 })
}

/// The scales, six bits each less 32, of the sixteen parts of a block of `q3_K`.
#[inline(always)]
pub(super) unsafe fn q3_scales(packed: *const u8) -> [i8; 16] {
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
#[target_feature(enable = "f16c")]
#[inline]
pub(super) unsafe fn half(from: *const u8) -> f32 {
    // SAFETY: two readable bytes, by the callers' contract.
    let bits = unsafe { from.cast::<u16>().read_unaligned() };
    _mm_cvtss_f32(_mm_cvtph_ps(_mm_cvtsi32_si128(bits as i32)))
}

/// The converters into `$out`, each of `$per` elements, for one instruction set. `put` takes `scale (times q) + add` of two
/// times sixteen signed bytes q, and the place of the first among the elements of `out`.
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
                // Its first byte eight times, then its second.
                let eight_times = _mm_set_epi64x(0x0101_0101_0101_0101, 0);
                let bits = _mm_shuffle_epi8(_mm_cvtsi32_si128(bits as i32), eight_times);
                let single = _mm_set1_epi64x(0x8040_2010_0804_0201u64 as i64);
                where_set(bits, single, 16)
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

            /// The two low bits of `low`, and 4 where the bit is set in `top`, less 4.
            #[target_feature(enable = $features)]
            #[inline]
            fn three(low: __m128i, top: __m128i, bit: __m128i) -> __m128i {
                let low = _mm_and_si128(low, _mm_set1_epi8(3));
                _mm_sub_epi8(_mm_or_si128(low, where_set(top, bit, 4)), _mm_set1_epi8(4))
            }

            #[target_feature(enable = $features)]
            unsafe fn q3_k(mut from: *const u8, out: &mut [$out]) {
                for out in out.chunks_exact_mut(256 / $per) {
                    // SAFETY: whole blocks, by the contract of `Converter`.
                    unsafe {
                        let d = half(from.add(108));
                        let scales = q3_scales(from.add(96));
                        let (third0, third1) = (bytes(from), bytes(from.add(16)));
                        for (half, out) in out.chunks_exact_mut(128 / $per).enumerate() {
                            let a = bytes(from.add(32 + 32 * half));
                            let b = bytes(from.add(48 + 32 * half));
                            let q = [
                                [a, b],
                                [_mm_srli_epi16::<2>(a), _mm_srli_epi16::<2>(b)],
                                [_mm_srli_epi16::<4>(a), _mm_srli_epi16::<4>(b)],
                                [_mm_srli_epi16::<6>(a), _mm_srli_epi16::<6>(b)],
                            ];
                            for (i, q) in q.into_iter().enumerate() {
                                let part = 4 * half + i;
                                let bit = _mm_set1_epi8((1u8 << part) as i8);
                                let q = [three(q[0], third0, bit), three(q[1], third1, bit)];
                                put(q, [scales[2 * part], scales[2 * part + 1]], d, 0.0, out, 32 * i);
                            }
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

            /// Four low bits and two high ones, which stand in the middle of `high`, less 32.
            #[target_feature(enable = $features)]
            #[inline]
            fn six(low: __m128i, high: __m128i) -> __m128i {
                let high = _mm_and_si128(high, _mm_set1_epi8(0x30));
                _mm_sub_epi8(_mm_or_si128(low, high), _mm_set1_epi8(32))
            }

            #[target_feature(enable = $features)]
            unsafe fn q6_k(mut from: *const u8, out: &mut [$out]) {
                for out in out.chunks_exact_mut(256 / $per) {
                    // SAFETY: whole blocks, by the contract of `Converter`.
                    unsafe {
                        let d = half(from.add(208));
                        for (part, out) in out.chunks_exact_mut(128 / $per).enumerate() {
                            let (low_bits, high_bits) = (from.add(64 * part), from.add(128 + 32 * part));
                            let scales = from.add(192 + 8 * part).cast::<[i8; 2]>();
                            let (a0, a1) = (bytes(low_bits), bytes(low_bits.add(16)));
                            let (b0, b1) = (bytes(low_bits.add(32)), bytes(low_bits.add(48)));
                            let (m0, m1) = (bytes(high_bits), bytes(high_bits.add(16)));
                            let q = [
                                [six(low(a0), _mm_slli_epi16::<4>(m0)), six(low(a1), _mm_slli_epi16::<4>(m1))],
                                [six(low(b0), _mm_slli_epi16::<2>(m0)), six(low(b1), _mm_slli_epi16::<2>(m1))],
                                [six(high(a0), m0), six(high(a1), m1)],
                                [six(high(b0), _mm_srli_epi16::<2>(m0)), six(high(b1), _mm_srli_epi16::<2>(m1))],
                            ];
                            put(q[0], *scales, d, 0.0, out, 0);
                            put(q[1], *scales.add(1), d, 0.0, out, 32);
                            put(q[2], *scales.add(2), d, 0.0, out, 64);
                            put(q[3], *scales.add(3), d, 0.0, out, 96);
                        }
                        from = from.add(210);
                    }
                }
            }
        }
    };
}
