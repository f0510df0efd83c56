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

/// Neighbours of a quantised row, `y = scale q + add`; q between -4096 and 4096.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub(crate) struct Quants {
    pub q: [i16; QUANTS],
    pub scale: f32,
    pub add: f32,
}

/// Reads the whole blocks of `out.len()` times [`QUANTS`] elements at `from`, which are readable.
pub(super) type QuantsReader = unsafe fn(from: *const u8, out: &mut [Quants]);

/// The reader of a type for this processor, where there is one, and whether its `add` is ever other than 0.
#[cfg(target_arch = "x86_64")]
pub(super) fn quants_reader(ty: Type) -> Option<(QuantsReader, bool)> {
    let adds = matches!(ty.name(), "q4_1" | "q5_1" | "q4_K" | "q5_K");
    has_avx2().then(|| whole::converter(ty)).flatten().map(|reader| (reader, adds))
}

#[cfg(not(target_arch = "x86_64"))]
pub(super) fn quants_reader(_: Type) -> Option<(QuantsReader, bool)> {
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

/// Scales and offsets, six bits each, of the eight parts of a block of `q4_K` or `q5_K`.
#[cfg(target_arch = "x86_64")]
#[inline(always)]
unsafe fn scales_and_offsets(packed: *const u8) -> [[f32; 8]; 2] {
    // SAFETY: twelve readable bytes, by the callers' contract.
    let [a, b, c] = unsafe { packed.cast::<[u32; 3]>().read_unaligned() }.map(u32::from_le);
    let (six, four, two) = (0x3f3f_3f3f, 0x0f0f_0f0f, 0x3030_3030);
    let bytes = |first: u32, last: u32| (first as u64 | (last as u64) << 32).to_le_bytes();
    let scales = bytes(a & six, c & four | a >> 2 & two);
    let offsets = bytes(b & six, c >> 4 & four | b >> 2 & two);
    [scales.map(f32::from), offsets.map(f32::from)]
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

/// The converters into `$out`, each of `$per` elements, for one instruction set. `put` takes `scale (times q) + add` of sixteen
/// signed bytes q, and the place of the first among the elements of `out`.
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
                        put(_mm_sub_epi8(low(q), eight), 1, scale, 0.0, out, 0);
                        put(_mm_sub_epi8(high(q), eight), 1, scale, 0.0, out, 16);
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
                        put(low(q), 1, scale, add, out, 0);
                        put(high(q), 1, scale, add, out, 16);
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
                        put(_mm_sub_epi8(first, sixteen), 1, scale, 0.0, out, 0);
                        put(_mm_sub_epi8(second, sixteen), 1, scale, 0.0, out, 16);
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
                        put(_mm_or_si128(low(q), fifth_bits(a)), 1, scale, add, out, 0);
                        put(_mm_or_si128(high(q), fifth_bits(b)), 1, scale, add, out, 16);
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
                        put(bytes(from.add(2)), 1, scale, 0.0, out, 0);
                        put(bytes(from.add(18)), 1, scale, 0.0, out, 16);
                        from = from.add(34);
                    }
                }
            }

            #[target_feature(enable = $features)]
            unsafe fn q4_k(mut from: *const u8, out: &mut [$out]) {
                for out in out.chunks_exact_mut(256 / $per) {
                    // SAFETY: whole blocks, by the contract of `Converter`.
                    unsafe {
                        let (d, least) = (half(from), half(from.add(2)));
                        let [scales, offsets] = scales_and_offsets(from.add(4));
                        for (pair, out) in out.chunks_exact_mut(64 / $per).enumerate() {
                            let q = from.add(16 + 32 * pair);
                            let [a, b] = [0, 1].map(|i| scales[2 * pair + i]);
                            let [am, bm] = [0, 1].map(|i| offsets[2 * pair + i]);
                            for half in [0, 16] {
                                let q = bytes(q.add(half));
                                put(low(q), 1, d * a, -(least * am), out, half);
                                put(high(q), 1, d * b, -(least * bm), out, 32 + half);
                            }
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
                        let [scales, offsets] = scales_and_offsets(from.add(4));
                        for (pair, out) in out.chunks_exact_mut(64 / $per).enumerate() {
                            let q = from.add(48 + 32 * pair);
                            let [a, b] = [0, 1].map(|i| scales[2 * pair + i]);
                            let [am, bm] = [0, 1].map(|i| offsets[2 * pair + i]);
                            let fifth = |i: usize| _mm_set1_epi8((1u8 << (2 * pair + i)) as i8);
                            for half in [0, 16] {
                                let (q, more) = (bytes(q.add(half)), bytes(from.add(16 + half)));
                                let first = _mm_or_si128(low(q), where_set(more, fifth(0), 16));
                                let second = _mm_or_si128(high(q), where_set(more, fifth(1), 16));
                                put(first, 1, d * a, -(least * am), out, half);
                                put(second, 1, d * b, -(least * bm), out, 32 + half);
                            }
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
                            for half in [0, 16] {
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
                                for (i, q) in q.into_iter().enumerate() {
                                    let q = _mm_sub_epi8(q, _mm_set1_epi8(32));
                                    put(q, *scales.add(2 * i + half / 16), d, 0.0, out, 32 * i + half);
                                }
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
    fn put(q: __m128i, times: i8, scale: f32, add: f32, out: &mut [f32], at: usize) {
        let q = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(q));
        let scale = _mm512_set1_ps(scale * times as f32);
        let y = _mm512_fmadd_ps(q, scale, _mm512_set1_ps(add));
        let out = &mut out[at..at + 16];
        // SAFETY: sixteen floats.
        unsafe { _mm512_storeu_ps(out.as_mut_ptr(), y) }
    }
);

#[cfg(target_arch = "x86_64")]
converters!(
    avx2,
    "avx2,fma,f16c",
    f32,
    1,
    fn put(q: __m128i, times: i8, scale: f32, add: f32, out: &mut [f32], at: usize) {
        let (scale, add) = (_mm256_set1_ps(scale * times as f32), _mm256_set1_ps(add));
        for (q, out) in
            [q, _mm_srli_si128::<8>(q)].into_iter().zip(out[at..at + 16].chunks_exact_mut(8))
        {
            let y = _mm256_fmadd_ps(_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(q)), scale, add);
            // SAFETY: eight floats.
            unsafe { _mm256_storeu_ps(out.as_mut_ptr(), y) }
        }
    }
);

// Sixteen at a time: both halves of a `Quants` have one scale, whose factors of sixteen elements each are in q.
#[cfg(target_arch = "x86_64")]
converters!(
    whole,
    "avx2,f16c",
    Quants,
    QUANTS,
    fn put(q: __m128i, times: i8, scale: f32, add: f32, out: &mut [Quants], at: usize) {
        let part = &mut out[at / QUANTS];
        (part.scale, part.add) = (scale, add);
        let q = _mm256_mullo_epi16(_mm256_cvtepi8_epi16(q), _mm256_set1_epi16(times as i16));
        let half = &mut part.q.as_chunks_mut::<16>().0[at % QUANTS / 16];
        // SAFETY: sixteen numbers.
        unsafe { _mm256_storeu_si256(half.as_mut_ptr().cast(), q) }
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
            "q4_0" | "q5_0" | "q8_0" => &[0],
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
            let Some((reader, adds)) = quants_reader(ty) else { continue };
            agrees(ty, |bytes, out| {
                let mut quants =
                    vec![Quants { q: [0; QUANTS], scale: 0.0, add: 0.0 }; out.len() / QUANTS];
                // SAFETY: as above.
                unsafe { reader(bytes.as_ptr(), &mut quants) };
                for (part, out) in quants.iter().zip(out.chunks_exact_mut(QUANTS)) {
                    assert!(adds || part.add == 0.0, "{ty}");
                    for (q, out) in part.q.iter().zip(out) {
                        assert!(q.unsigned_abs() <= 4096, "{ty}");
                        *out = part.scale.mul_add(*q as f32, part.add);
                    }
                }
            });
        }
        assert!(tried > 0 || !has_avx2());
    }
}
