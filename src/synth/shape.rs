//! What a published model's shape is made of.

use super::published::ALL;
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
    /// What scales them.
    pub rope: Rope,
    /// Epsilon of the RMS norms.
    pub rms_eps: f32,
    /// Layers that look back only so far.
    pub window: Option<Window>,
    /// Bounds of logits.
    pub softcaps: Softcaps,
    /// granite's multipliers.
    pub multipliers: Option<Multipliers>,
    /// gemma4's layers.
    pub gemma4: Option<Gemma4>,
    /// The mixture in place of each FFN.
    pub experts: Option<Experts>,
    /// Layers with a gated delta net instead of attention.
    pub delta: Option<DeltaNets>,
}

/// A mixture of experts.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Experts {
    /// How many there are.
    pub count: usize,
    /// How many a token takes.
    pub used: usize,
    /// Width of one.
    pub n_ff: usize,
    /// Width of the one that all tokens take, 0 for none.
    pub n_ff_shared: usize,
}

/// How the rotation's frequencies differ from powers of the base.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Rope {
    /// They do not.
    Plain,
    /// llama3's factor: see [`rope_freqs`].
    Llama3(f32),
    /// All are divided by this factor.
    Linear(f32),
    /// YaRN over a context of `original` tokens; beyond it, the queries' temperature rises.
    Yarn {
        /// Factor of the context length.
        factor: f32,
        /// Context length before it.
        original: usize,
        /// Scale of the attention temperature.
        temperature: f32,
    },
    /// Divisors by frequency for texts beyond `original` tokens, ones below; the first `rotated`
    /// dimensions of a head turn.
    Long {
        /// Dimensions that turn.
        rotated: usize,
        /// Context length up to which the divisors are ones.
        original: usize,
        /// Divisors, `[rotated / 2]`.
        divisors: &'static [f32],
    },
    /// The first so many dimensions of a head turn.
    Partial(usize),
    /// The first `rotated` dimensions of a head turn; their pairs are shared out among axes of positions, which are one in
    /// text.
    Sectioned {
        /// Dimensions that turn.
        rotated: usize,
        /// Pairs of each axis.
        sections: [i32; 4],
    },
}

/// Layers that look back only so far, and which do not.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Window {
    /// Tokens that a windowed layer sees.
    pub size: usize,
    /// The last of every so many layers sees all.
    pub period: usize,
}

/// `c tanh(x / c)` on attention scores and on the final logits.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Softcaps {
    /// On the scores.
    pub attention: Option<f32>,
    /// On the logits.
    pub logits: Option<f32>,
}

/// Factors that other models do not have.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Multipliers {
    /// Of the embedding.
    pub embedding: f32,
    /// Of what a module adds to the residual.
    pub residual: f32,
    /// Of attention scores, in place of `1/sqrt(head size)`.
    pub attention: f32,
    /// What logits are divided by.
    pub logits: f32,
}

/// What differs by layer in gemma4.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Gemma4 {
    /// Head size of the layers without a window; `head_size` is that of the others.
    pub full_head_size: usize,
    /// Last layers, which take keys and values from earlier ones and have an FFN twice as wide.
    pub n_shared: usize,
    /// Width of the embedding that each layer has of its own.
    pub per_layer_embd: usize,
}

/// Gated delta nets, and which layers have attention.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct DeltaNets {
    /// The last of every so many layers has attention.
    pub period: usize,
    /// Heads of keys.
    pub n_k: usize,
    /// Heads of values.
    pub n_v: usize,
    /// Size of a head.
    pub size: usize,
    /// Tokens of the convolution.
    pub kernel: usize,
}

impl DeltaNets {
    /// Width of values.
    pub fn inner(&self) -> usize {
        self.n_v * self.size
    }

    /// Width of queries, keys and values.
    pub fn width(&self) -> usize {
        (2 * self.n_k + self.n_v) * self.size
    }
}

impl Shape {
    /// All of them.
    pub const ALL: [Shape; ALL.len()] = ALL;

    /// The shape of this name.
    ///
    /// # Errors
    /// [`Error::Unsupported`] with the list.
    pub fn find(name: &str) -> Result<Shape> {
        Shape::ALL.into_iter().find(|s| s.name == name).ok_or_else(|| Error::Unsupported {
            what: "shape",
            got: name.into(),
            supported: Shape::names(),
        })
    }

    /// All names, for errors and help.
    pub fn names() -> String {
        Shape::ALL.map(|s| s.name).join(", ")
    }

    /// The same with another number of layers. Of gemma4's layers the same share as before, and as many
    /// as keep a windowed layer and a full one last among the others, take keys and values from earlier
    /// ones.
    ///
    /// # Errors
    /// [`Error::Invalid`] for none.
    pub fn with_layers(self, n_layer: usize) -> Result<Shape> {
        if n_layer == 0 {
            return Err(Error::invalid("--layers", "at least 1", "0", "leave it out"));
        }
        let gemma4 = self.gemma4.map(|g| {
            let period = self.window.map_or(1, |w| w.period);
            let own = n_layer * (self.n_layer - g.n_shared) / self.n_layer;
            let own = (own / period * period).max(period).min(n_layer);
            Gemma4 { n_shared: n_layer - own, ..g }
        });
        Ok(Shape { n_layer, gemma4, ..self })
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

    /// Whether layer `i` (from 0) looks back only so far.
    pub fn is_windowed(&self, i: usize) -> bool {
        self.window.is_some_and(|w| !(i + 1).is_multiple_of(w.period))
    }

    /// The gated delta net of layer `i`, if it has one.
    pub fn delta_of(&self, i: usize) -> Option<DeltaNets> {
        self.delta.filter(|delta| !(i + 1).is_multiple_of(delta.period))
    }

    /// Size of a head of layer `i`.
    pub fn head_size_of(&self, i: usize) -> usize {
        match self.gemma4 {
            Some(g) if !self.is_windowed(i) => g.full_head_size,
            _ => self.head_size,
        }
    }

    /// Whether layer `i` has keys and values of its own.
    pub fn has_kv(&self, i: usize) -> bool {
        i < self.n_layer_kv()
    }

    /// Layers with keys and values of their own: the first ones.
    pub fn n_layer_kv(&self) -> usize {
        self.n_layer - self.gemma4.map_or(0, |g| g.n_shared)
    }

    /// Width of the FFN of layer `i`.
    pub fn n_ff_of(&self, i: usize) -> usize {
        if self.has_kv(i) { self.n_ff } else { 2 * self.n_ff }
    }

    /// What the embedding is multiplied with when it enters the first layer.
    pub(super) fn embedding_scale(&self) -> f32 {
        match (self.arch, self.multipliers) {
            ("gemma2" | "gemma3" | "gemma4", _) => (self.n_embd as f32).sqrt(),
            (_, Some(m)) => m.embedding,
            _ => 1.0,
        }
    }

    /// Scale of the attention scores of layer `i`.
    pub(super) fn attention_scale(&self, i: usize) -> f32 {
        match (self.gemma4, self.multipliers) {
            (Some(_), _) => 1.0,
            (_, Some(m)) => m.attention,
            _ => 1.0 / (self.head_size_of(i) as f32).sqrt(),
        }
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
            ("smollm2-135m", 135),
            ("mistral-small-24b", 23_572),
            ("gemma-2-2b", 2614),
            ("gemma-3-270m", 268),
            ("gemma-3-1b", 1000),
            ("gemma-3-4b", 3880),
            ("gemma-3-12b", 11_766),
            ("phi-4-mini", 3836),
            ("granite-3.3-2b", 2534),
            ("smollm3-3b", 3075),
            ("olmo-2-1b", 1485),
            ("qwen3-30b-a3b", 30_532),
            ("gpt-oss-20b", 20_915),
            ("olmoe-1b-7b", 6919),
            // The text part, without the block that predicts further tokens; cards say 0.8, 2, 4, 9, 27 billion.
            ("qwen3.5-0.8b", 752),
            ("qwen3.5-2b", 1882),
            ("qwen3.5-4b", 4206),
            ("qwen3.5-9b", 8954),
            ("qwen3.5-27b", 26_896),
            ("qwen3.5-35b-a3b", 34_661),
            ("qwen3-next-80b-a3b", 79_674),
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
