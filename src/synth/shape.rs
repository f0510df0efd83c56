//! Published models' shapes, from their `config.json`.

use crate::{Error, Result};

/// Sizes and settings of a model.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Shape {
    /// Name on the command line.
    pub name: &'static str,
    /// `general.architecture`.
    pub arch: &'static str,
    /// Layers, L.
    pub n_layer: usize,
    /// Width of the residual, D.
    pub n_embd: usize,
    /// Width of the FFN.
    pub n_ff: usize,
    /// Query heads.
    pub n_head: usize,
    /// Key/value heads.
    pub n_head_kv: usize,
    /// Size of a head.
    pub head_size: usize,
    /// Rows of the embedding, V.
    pub n_vocab: usize,
    /// Tokens that are bytes or merges; control tokens follow, the rest of the rows is unused.
    pub n_text: usize,
    /// Whether the unembedding is the embedding.
    pub tied: bool,
    /// Context length.
    pub n_ctx: usize,
    /// Base of the rotation's frequencies.
    pub rope_base: f32,
    /// Factor of llama3's frequency scaling.
    pub rope_factor: Option<f32>,
    /// Epsilon of the RMS norms.
    pub rms_eps: f32,
}

/// Qwen3: heads of 128, one vocabulary, rope base 1e6.
const QWEN3: Shape = Shape {
    name: "qwen3",
    arch: "qwen3",
    n_layer: 28,
    n_embd: 1024,
    n_ff: 3072,
    n_head: 16,
    n_head_kv: 8,
    head_size: 128,
    n_vocab: 151_936,
    n_text: 151_643,
    tied: true,
    n_ctx: 40_960,
    rope_base: 1e6,
    rope_factor: None,
    rms_eps: 1e-6,
};

const QWEN2: Shape = Shape { name: "qwen2", arch: "qwen2", n_ctx: 32_768, ..QWEN3 };

/// Llama 3.1 and 3.2: rope base 5e5, scaled frequencies.
const LLAMA3: Shape = Shape {
    name: "llama3",
    arch: "llama",
    n_layer: 28,
    n_embd: 3072,
    n_ff: 8192,
    n_head: 24,
    n_head_kv: 8,
    head_size: 128,
    n_vocab: 128_256,
    n_text: 128_000,
    tied: true,
    n_ctx: 131_072,
    rope_base: 5e5,
    rope_factor: Some(32.0),
    rms_eps: 1e-5,
};

const LLAMA3_8B: Shape = Shape {
    n_layer: 32,
    n_embd: 4096,
    n_ff: 14_336,
    n_head: 32,
    tied: false,
    rope_factor: Some(8.0),
    ..LLAMA3
};

impl Shape {
    /// All of them.
    pub const ALL: [Shape; 13] = [
        Shape {
            name: "tiny",
            n_layer: 4,
            n_embd: 256,
            n_ff: 768,
            n_head: 4,
            n_head_kv: 2,
            head_size: 64,
            n_vocab: 2048,
            n_text: 2040,
            n_ctx: 4096,
            ..QWEN3
        },
        Shape { name: "qwen3-0.6b", ..QWEN3 },
        Shape { name: "qwen3-1.7b", n_embd: 2048, n_ff: 6144, ..QWEN3 },
        Shape { name: "qwen3-4b", n_layer: 36, n_embd: 2560, n_ff: 9728, n_head: 32, ..QWEN3 },
        Shape {
            name: "qwen3-8b",
            n_layer: 36,
            n_embd: 4096,
            n_ff: 12_288,
            n_head: 32,
            tied: false,
            ..QWEN3
        },
        Shape {
            name: "qwen3-14b",
            n_layer: 40,
            n_embd: 5120,
            n_ff: 17_408,
            n_head: 40,
            tied: false,
            ..QWEN3
        },
        Shape {
            name: "qwen2.5-0.5b",
            n_layer: 24,
            n_embd: 896,
            n_ff: 4864,
            n_head: 14,
            n_head_kv: 2,
            head_size: 64,
            ..QWEN2
        },
        Shape {
            name: "qwen2.5-7b",
            n_layer: 28,
            n_embd: 3584,
            n_ff: 18_944,
            n_head: 28,
            n_head_kv: 4,
            n_vocab: 152_064,
            tied: false,
            ..QWEN2
        },
        Shape {
            name: "llama-3.2-1b",
            n_layer: 16,
            n_embd: 2048,
            n_head: 32,
            head_size: 64,
            ..LLAMA3
        },
        Shape { name: "llama-3.2-3b", ..LLAMA3 },
        Shape { name: "llama-3.1-8b", ..LLAMA3_8B },
        // OctoThinker continues the training of Llama 3.2 3B and 3.1 8B.
        Shape { name: "octothinker-3b", ..LLAMA3 },
        Shape { name: "octothinker-8b", ..LLAMA3_8B },
    ];

    /// The shape of this name.
    ///
    /// # Errors
    /// [`Error::Unsupported`] with the list.
    pub fn find(name: &str) -> Result<Shape> {
        Shape::ALL.into_iter().find(|s| s.name == name).ok_or_else(|| Error::Unsupported {
            what: "shape",
            got: name.into(),
            supported: Shape::ALL.map(|s| s.name).join(", "),
        })
    }

    /// The same with another number of layers.
    ///
    /// # Errors
    /// [`Error::Invalid`] for none.
    pub fn with_layers(self, n_layer: usize) -> Result<Shape> {
        if n_layer == 0 {
            return Err(Error::invalid("--layers", "at least 1", "0", "leave it out"));
        }
        Ok(Shape { n_layer, ..self })
    }

    /// The same with another vocabulary.
    ///
    /// # Errors
    /// [`Error::Invalid`] for fewer rows than the bytes and the control tokens take, or more than the
    /// generator of merges spells.
    pub fn with_vocab(self, n_vocab: usize) -> Result<Shape> {
        let (least, most) = (512, 400_000);
        if !(least..=most).contains(&n_vocab) {
            let expected = format!("{least} to {most}");
            return Err(Error::invalid("--vocab", expected, n_vocab.to_string(), "leave it out"));
        }
        Ok(Shape { n_vocab, n_text: n_vocab - 8, ..self })
    }
}

/// llama3's divisors of the rotation's frequencies, `[head size / 2]`: wavelengths beyond the original
/// context are stretched by `factor`, those below a quarter of it stay, between them it is blended.
pub(super) fn rope_freqs(shape: &Shape, factor: f32) -> Vec<f32> {
    const ORIGINAL_CONTEXT: f32 = 8192.0;
    const LOW: f32 = 1.0;
    const HIGH: f32 = 4.0;
    (0..shape.head_size / 2)
        .map(|i| {
            let exponent = 2.0 * i as f32 / shape.head_size as f32;
            let wavelength = std::f32::consts::TAU * shape.rope_base.powf(exponent);
            let turns = ORIGINAL_CONTEXT / wavelength;
            let blend = ((turns - LOW) / (HIGH - LOW)).clamp(0.0, 1.0);
            1.0 / ((1.0 - blend) / factor + blend)
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parameter_counts_are_the_published_ones() {
        // In millions, embeddings once where they are tied (model cards and config.json).
        for (name, millions) in [
            ("qwen3-0.6b", 596),
            ("qwen3-1.7b", 1721),
            ("qwen3-4b", 4022),
            ("qwen3-8b", 8191),
            ("qwen3-14b", 14_768),
            ("qwen2.5-0.5b", 494),
            ("qwen2.5-7b", 7616),
            ("llama-3.2-1b", 1236),
            ("llama-3.2-3b", 3213),
            ("llama-3.1-8b", 8030),
        ] {
            let shape = Shape::find(name).unwrap();
            let mixture = super::super::Mixture::parse("f16").unwrap();
            let weights = super::super::Weights::new(&shape, &mixture);
            let n: u64 = weights.0.iter().map(|w| w.shape.iter().product::<u64>()).sum();
            assert_eq!((n as f64 / 1e6).round() as u64, millions, "{name}");
        }
    }

    #[test]
    fn rope_frequencies_blend() {
        let shape = Shape::find("llama-3.2-3b").unwrap();
        let f = rope_freqs(&shape, 32.0);
        assert_eq!(f.len(), 64);
        assert_eq!((f[0], f[63]), (1.0, 32.0));
        assert!(f.windows(2).all(|w| w[0] <= w[1]), "{f:?}");
        assert!(f.iter().any(|&x| x > 1.0 && x < 32.0));
    }
}
