//! The instructions of x86-64: AVX2 and AVX-512, by what the processor has.

use std::arch::x86_64::*;

use super::layouts::*;
use super::{Converter, Type};

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

/// The largest q, by [`QuantsForm::share`].
pub(crate) const LARGEST: usize = 4096;

/// Reads the whole blocks of `out.len()` times [`QUANTS`] elements at `from`, which are readable.
type ReadQuants = unsafe fn(from: *const u8, out: &mut [Quants]);

/// How a type's rows are read as whole numbers.
#[derive(Clone, Copy)]
pub(crate) struct QuantsReader {
    pub read: ReadQuants,
    pub form: QuantsForm,
}

/// What is to be known of a row's whole numbers.
#[derive(Clone, Copy)]
pub(crate) struct QuantsForm {
    /// Whether anything is ever added.
    pub adds: bool,
    /// So many [`Quants`] have one scale, and their q are at most [`LARGEST`] by as many.
    pub share: usize,
}

/// The reader of a type for this processor, where there is one.
pub(in crate::ggml) fn quants_reader(ty: Type) -> Option<QuantsReader> {
    let read = quants_readers(ty).into_iter().flatten().next()?;
    let adds = matches!(ty.name(), "q4_1" | "q5_1" | "q4_K" | "q5_K");
    let share = if matches!(ty.name(), "q4_K" | "q5_K") { 2 } else { 1 };
    Some(QuantsReader { read, form: QuantsForm { adds, share } })
}

/// All that this processor has for a type, the quickest first.
fn quants_readers(ty: Type) -> [Option<ReadQuants>; 2] {
    [
        has_avx512().then(|| whole512::converter(ty)).flatten(),
        has_avx2().then(|| whole256::converter(ty)).flatten(),
    ]
}

/// The converter of a type for this processor; `None` where ggml's own is to be taken.
pub(in crate::ggml) fn converter(ty: Type) -> Option<Converter> {
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

fn has_avx512() -> bool {
    is_x86_feature_detected!("avx512f") && is_x86_feature_detected!("avx512bw") && has_avx2()
}

fn has_avx2() -> bool {
    is_x86_feature_detected!("avx2")
        && is_x86_feature_detected!("fma")
        && is_x86_feature_detected!("f16c")
}

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
converters!(
    whole512,
    "avx512f,avx512bw,f16c",
    Quants,
    QUANTS,
    fn put(q: [__m128i; 2], times: [i8; 2], scale: f32, add: f32, out: &mut [Quants], at: usize) {
        let part = &mut out[at / QUANTS];
        (part.scale, part.add) = (scale, add);
        let q = _mm512_cvtepi8_epi16(_mm256_set_m128i(q[1], q[0]));
        let first = _mm512_set1_epi16(times[0] as i16);
        let second = _mm512_set1_epi16(times[1] as i16);
        let times = _mm512_mask_blend_epi16(0xffff_0000, first, second);
        // SAFETY: 32 numbers.
        unsafe {
            _mm512_storeu_si512(part.q.as_mut_ptr().cast(), _mm512_mullo_epi16(q, times));
        }
    }
);

converters!(
    whole256,
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

#[cfg(test)]
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
            for read in quants_readers(ty).into_iter().flatten() {
                agrees(ty, |bytes, out| {
                    let mut quants =
                        vec![Quants { q: [0; QUANTS], scale: 0.0, add: 0.0 }; out.len() / QUANTS];
                    // SAFETY: as above.
                    unsafe { read(bytes.as_ptr(), &mut quants) };
                    for parts in quants.chunks(reader.form.share) {
                        assert!(parts.iter().all(|part| part.scale == parts[0].scale), "{ty}");
                    }
                    for (part, out) in quants.iter().zip(out.chunks_exact_mut(QUANTS)) {
                        assert!(reader.form.adds || part.add == 0.0, "{ty}");
                        for (q, out) in part.q.iter().zip(out) {
                            assert!(
                                q.unsigned_abs() as usize <= LARGEST / reader.form.share,
                                "{ty}"
                            );
                            *out = part.scale.mul_add(*q as f32, part.add);
                        }
                    }
                });
            }
        }
        assert!(tried > 0 || !has_avx2());
    }
}
