//! Random blocks of every type: random bits, with a scale that gives the wanted spread.
//!
//! Quantising random numbers would take a minute per billion weights on a core; any pattern of a block's
//! quants is valid, so only its scale has to be put right. Means are zero: a scale's sign is random, and
//! where a type has minima they are the middle of its quants.

use half::{bf16, f16};
use rand::{RngCore, SeedableRng};
use rand_chacha::ChaCha8Rng;

use crate::ggml::Type;
use crate::{Error, Result};

/// Where a block keeps its scale.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Scale {
    /// No blocks: values themselves.
    Float,
    /// An f16 at this byte.
    At(usize),
    /// An f16 at this byte, another for the minimum at the next, that many times as large.
    WithMin(usize, f32),
    /// An f16 in the top bits of the last four 16-bit words.
    Spread,
    /// A power of two in the first byte.
    Exponent,
    /// An unsigned float of 4 and 3 bits in each of the first 4 bytes.
    Minifloats,
}

/// What else must be put right in a block of random bits.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Mend {
    Nothing,
    /// 4-bit scales and minima share bytes `[0, n)`: minima become equal to scales.
    Nibbles(usize),
    /// 6-bit scales and minima packed in 12 bytes from here: as above.
    SixBits(usize),
}

/// Makes random blocks of one type.
pub(super) struct Blocks {
    ty: Type,
    scale: Scale,
    mend: Mend,
    /// Root mean square of values at scale 1.
    unit: f32,
}

/// Layouts as in ggml's `ggml-common.h`.
fn layout(ty: Type) -> Option<(Scale, Mend)> {
    let end = ty.block_bytes().saturating_sub(2);
    Some(match ty.name().to_ascii_lowercase().as_str() {
        "f32" | "f16" | "bf16" => (Scale::Float, Mend::Nothing),
        "q4_0" | "q5_0" | "q8_0" | "q1_0" | "q2_0" | "iq4_nl" | "iq4_xs" | "iq2_xxs" | "iq2_xs"
        | "iq2_s" | "iq3_xxs" | "iq3_s" | "iq1_s" => (Scale::At(0), Mend::Nothing),
        "q3_k" | "q6_k" | "tq1_0" | "tq2_0" => (Scale::At(end), Mend::Nothing),
        "q4_1" => (Scale::WithMin(0, -7.5), Mend::Nothing),
        "q5_1" => (Scale::WithMin(0, -15.5), Mend::Nothing),
        "q2_k" => (Scale::WithMin(end - 2, 1.5), Mend::Nibbles(16)),
        "q4_k" => (Scale::WithMin(0, 7.5), Mend::SixBits(4)),
        "q5_k" => (Scale::WithMin(0, 15.5), Mend::SixBits(4)),
        "iq1_m" => (Scale::Spread, Mend::Nothing),
        "mxfp4" => (Scale::Exponent, Mend::Nothing),
        "nvfp4" => (Scale::Minifloats, Mend::Nothing),
        _ => return None,
    })
}

impl Blocks {
    /// # Errors
    /// [`Error::Unsupported`] for a type whose layout is not known here.
    pub(super) fn new(ty: Type) -> Result<Blocks> {
        let Some((scale, mend)) = layout(ty) else {
            let known = Type::all().filter(|ty| layout(*ty).is_some()).map(Type::name);
            let supported = known.collect::<Vec<_>>().join(", ");
            let got = ty.name().into();
            return Err(Error::Unsupported { what: "type for random weights", got, supported });
        };
        let mut blocks = Blocks { ty, scale, mend, unit: 1.0 };
        if scale != Scale::Float {
            // 64 Ki values at scale 1 tell the spread to half a percent.
            let n = (1 << 16) / ty.block_size();
            let mut bytes = vec![0; n * ty.block_bytes()];
            blocks.fill(&mut bytes, 1.0, [0; 3]);
            let mut values = vec![0.0; n * ty.block_size()];
            ty.dequantize(&bytes, &mut values);
            let squares: f64 = values.iter().map(|&x| (x as f64).powi(2)).sum();
            blocks.unit = (squares / values.len() as f64).sqrt() as f32;
        }
        Ok(blocks)
    }

    /// Bytes of a block.
    pub(super) fn bytes(&self) -> usize {
        self.ty.block_bytes()
    }

    /// Fills whole blocks with values of mean 0 and standard deviation `spread`; `key` is the seed.
    pub(super) fn fill(&self, out: &mut [u8], spread: f32, key: [u64; 3]) {
        let mut seed = [0; 32];
        for (part, key) in seed.chunks_exact_mut(8).zip(key) {
            part.copy_from_slice(&key.to_le_bytes());
        }
        let mut random = ChaCha8Rng::from_seed(seed);
        random.fill_bytes(out);
        if self.scale == Scale::Float {
            return self.floats(out, spread);
        }
        let scale = spread / self.unit;
        let d = f16::from_f32(scale).to_bits().max(1);
        for block in out.chunks_exact_mut(self.bytes()) {
            self.mend(block);
            match self.scale {
                Scale::Float => unreachable!("returned above"),
                Scale::At(at) => put(block, at, d | sign(block[at])),
                Scale::WithMin(at, times) => {
                    let sign = sign(block[at]);
                    let min = f16::from_f32(f16::from_bits(d).to_f32() * times).to_bits();
                    put(block, at, d ^ sign);
                    put(block, at + 2, min ^ sign);
                }
                Scale::Spread => {
                    let d = d | sign(block[block.len() - 1] >> 7);
                    let scales = block.len() - 8;
                    for i in 0..4 {
                        let high = &mut block[scales + 2 * i + 1];
                        *high = *high & 0x0f | ((d >> (4 * i)) as u8 & 0x0f) << 4;
                    }
                }
                // Scales are few and far apart: blocks take the next lower or higher one, in the
                // proportion that gives the mean square.
                Scale::Exponent => {
                    let value = |code: u8| 2f32.powi(code as i32 - 128);
                    block[0] = between(value, 254, scale, block[0]);
                }
                Scale::Minifloats => {
                    for byte in &mut block[..4] {
                        *byte = between(minifloat, 126, scale, *byte);
                    }
                }
            }
        }
    }

    fn mend(&self, block: &mut [u8]) {
        match self.mend {
            Mend::Nothing => {}
            Mend::Nibbles(n) => block[..n].iter_mut().for_each(|b| *b = (*b & 0x0f) * 0x11),
            Mend::SixBits(at) => {
                block.copy_within(at..at + 4, at + 4);
                block[at + 8..at + 12].iter_mut().for_each(|b| *b = (*b & 0x0f) * 0x11);
            }
        }
    }

    /// Random bits to evenly spread floats.
    fn floats(&self, out: &mut [u8], spread: f32) {
        // Even on [-a, a] has a standard deviation of a / sqrt 3.
        let a = spread * 3f32.sqrt();
        match self.bytes() {
            4 => {
                for x in out.as_chunks_mut::<4>().0 {
                    let even = i32::from_le_bytes(*x) as f32 / 2f32.powi(31);
                    *x = (a * even).to_le_bytes();
                }
            }
            _ => {
                for x in out.as_chunks_mut::<2>().0 {
                    let even = a * i16::from_le_bytes(*x) as f32 / 32768.0;
                    *x = match self.ty {
                        Type::F16 => f16::from_f32(even).to_le_bytes(),
                        _ => bf16::from_f32(even).to_le_bytes(),
                    };
                }
            }
        }
    }
}

/// A sign bit for an f16 from a random byte.
fn sign(byte: u8) -> u16 {
    ((byte & 1) as u16) << 15
}

fn put(block: &mut [u8], at: usize, bits: u16) {
    block[at..at + 2].copy_from_slice(&bits.to_le_bytes());
}

/// 4 bits of exponent, 3 of mantissa.
fn minifloat(bits: u8) -> f32 {
    let (exponent, mantissa) = ((bits >> 3) as i32, (bits & 7) as f32);
    match exponent {
        0 => mantissa * 2f32.powi(-9),
        _ => (1.0 + mantissa / 8.0) * 2f32.powi(exponent - 7),
    }
}

/// The largest code whose value is not above `wanted`, or the next, so that over random bytes the mean of
/// the squares is right. `value` rises with the code, up to `most`.
fn between(value: impl Fn(u8) -> f32, most: u8, wanted: f32, random: u8) -> u8 {
    let (mut low, mut high) = (0u8, most);
    while high - low > 1 {
        let middle = low + (high - low) / 2;
        if value(middle) <= wanted { low = middle } else { high = middle }
    }
    let square = |code: u8| value(code).powi(2);
    let share = (wanted.powi(2) - square(low)) / (square(high) - square(low));
    if (random as f32 + 0.5) / 256.0 < share { high } else { low }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_type_has_mean_zero_and_the_spread_that_was_asked_for() {
        let types: Vec<Type> = Type::all().filter(|ty| ty.can_dequantize()).collect();
        assert!(types.len() >= 25, "{types:?}");
        for ty in types {
            let blocks = Blocks::new(ty).unwrap();
            for spread in [1e-3f32, 0.03, 0.5] {
                let n = (1 << 18) / ty.block_size();
                let mut bytes = vec![0; n * blocks.bytes()];
                blocks.fill(&mut bytes, spread, [1, 2, 3]);
                let mut values = vec![0.0; n * ty.block_size()];
                ty.dequantize(&bytes, &mut values);
                let n = values.len() as f64;
                let mean = values.iter().map(|&x| x as f64).sum::<f64>() / n;
                let squares = values.iter().map(|&x| (x as f64).powi(2)).sum::<f64>() / n;
                let (mean, std) = (mean / spread as f64, squares.sqrt() / spread as f64);
                // The smallest f16 above 0 bounds how fine a scale can be.
                let fine = 0.03 + 3e-8 * blocks.unit as f64 / spread as f64;
                assert!((std - 1.0).abs() < fine, "{ty} {spread}: spread {std}");
                assert!(mean.abs() < 0.05, "{ty} {spread}: mean {mean}");
            }
        }
    }
}
