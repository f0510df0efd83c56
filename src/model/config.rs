//! What a model is made of: sizes, rotary embedding, what differs from layer to layer.

use super::arch::Family;
use crate::ggml::Rope;
use crate::llama::{self, Hparams, LayerHparams};
use crate::ops::{DeltaSpec, LogitMap, MAX_CONV};
use crate::{Error, Result};

/// Sizes and settings of a model, as llama.cpp reads them.
#[derive(Clone, Debug, PartialEq)]
pub struct Config {
    /// Architecture.
    pub family: &'static Family,
    /// Number of layers, L.
    pub n_layer: usize,
    /// Width of the residual, D.
    pub n_embd: usize,
    /// Size of the vocabulary, V.
    pub n_vocab: usize,
    /// Context length the model was trained on.
    pub n_ctx_train: usize,
    /// Epsilon of the RMS norms.
    pub rms_eps: f32,
    /// What the token's embedding is multiplied by before layer 1.
    pub embedding_scale: f32,
    /// What attention and FFN are multiplied by before they are added to the residual.
    pub residual_scale: f32,
    /// From a hidden state to logits.
    pub logits: LogitMap,
    /// Scale of the attention scores; none is 1/sqrt(head size).
    pub attention_scale: Option<f32>,
    /// Cap of the attention scores.
    pub attention_softcap: Option<f32>,
    /// How queries grow with their position.
    pub temperature: Option<Temperature>,
    /// Width of the per-layer embeddings; 0 is none.
    pub n_embd_per_layer: usize,
    /// Layers above this one (from 1) read keys and values of earlier layers.
    pub n_layer_kv: usize,
    /// Longest context to which the short of two sets of rope factors applies.
    pub n_ctx_orig: usize,
    /// Layers; layer `l` of the user is at `l - 1`.
    pub layers: Vec<LayerConfig>,
}

/// What can differ from layer to layer.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct LayerConfig {
    /// Query heads.
    pub n_head: usize,
    /// Key/value heads.
    pub n_head_kv: usize,
    /// Size of a head.
    pub head_size: usize,
    /// Width of the FFN.
    pub n_ff: usize,
    /// The mixture of experts that is the FFN; none is a dense one.
    pub experts: Option<Experts>,
    /// Keys that a query sees, its own included; none is all before it.
    pub window: Option<usize>,
    /// Rotary embedding; none in layers without positions.
    pub rope: Option<Rope>,
    /// Whether the model's rope factors, if it has any, apply.
    pub rope_factors: bool,
    /// Whether it has keys and values of its own.
    pub has_kv: bool,
    /// A gated delta net instead of attention, whose sizes above are of no use then.
    pub delta: Option<DeltaConfig>,
}

/// Sizes of a gated delta net.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct DeltaConfig {
    /// Heads of keys, and of queries.
    pub n_k: usize,
    /// Heads of values.
    pub n_v: usize,
    /// Whether those of one key head stand together; else those of all key heads take turns.
    pub grouped: bool,
    /// Size of a head.
    pub size: usize,
    /// Tokens that its convolution looks at.
    pub kernel: usize,
}

impl DeltaConfig {
    /// Its rule.
    pub fn spec(&self, eps: f32) -> DeltaSpec {
        let DeltaConfig { n_k, n_v, grouped, size, .. } = *self;
        DeltaSpec { n_k, n_v, size, eps, grouped }
    }
}

/// A mixture of experts.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Experts {
    /// How many there are, E.
    pub count: usize,
    /// How many a token takes.
    pub used: usize,
    /// Width of one.
    pub n_ff: usize,
    /// Width of the shared one, which all tokens take; 0 is none.
    pub n_ff_shared: usize,
    /// Factor of their weights.
    pub scale: f32,
}

impl LayerConfig {
    /// What mixes tokens.
    pub fn mixer(&self) -> &'static str {
        if self.delta.is_some() { "delta net" } else { "attention" }
    }

    /// Width of all queries.
    pub fn q_width(&self) -> usize {
        self.n_head * self.head_size
    }

    /// Width of all that a token goes through in the FFN: of the experts that it takes, and the shared one.
    pub fn ffn_width(&self) -> usize {
        self.experts.map_or(self.n_ff, |e| e.used * e.n_ff + e.n_ff_shared)
    }

    /// Width of all keys, and of all values.
    pub fn kv_width(&self) -> usize {
        self.n_head_kv * self.head_size
    }
}

/// Queries at position p are multiplied by `1 + scale ln(1 + floor((p + offset) / floor))`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Temperature {
    /// 0.1, say.
    pub scale: f32,
    /// Positions per step.
    pub floor: f32,
    /// Added to the position.
    pub offset: f32,
}

impl Temperature {
    /// The factor at a position.
    pub fn at(&self, position: i32) -> f32 {
        let steps = ((position as f32 + self.offset) / self.floor).floor();
        (steps + 1.0).ln() * self.scale + 1.0
    }
}

/// `enum llama_rope_scaling_type`.
const SCALING_NONE: i32 = 0;
const SCALING_LINEAR: i32 = 1;
const SCALING_YARN: i32 = 2;
const SCALING_LONGROPE: i32 = 3;
/// `enum llama_rope_type`.
const ROPE_NORMAL: i32 = 0;
const ROPE_NEOX: i32 = 2;
const ROPE_SECTIONED: i32 = 40;

fn refuse<T>(what: &'static str, got: String, supported: &str) -> Result<T> {
    Err(Error::Unsupported { what, got, supported: supported.into() })
}

impl Config {
    /// Reads llama.cpp's hyperparameters and refuses what is not computed here.
    ///
    /// # Errors
    /// [`Error::Unsupported`] for mixtures of experts where the family has none, other rope scalings, or head sizes that the attention op
    /// does not take.
    pub fn new(family: &'static Family, engine: &llama::Model) -> Result<Config> {
        let h = engine.hparams()?;
        if h.n_expert > 0 && !family.mixture {
            return refuse("mixture of experts", format!("{} experts", h.n_expert), "dense FFN");
        }
        let known = [SCALING_NONE, SCALING_LINEAR, SCALING_YARN, SCALING_LONGROPE];
        if !known.contains(&h.rope_scaling_type) {
            let got = h.rope_scaling_type.to_string();
            let supported = "none, linear, yarn, longrope, llama3 (rope_freqs)";
            return refuse("rope scaling type", got, supported);
        }
        if ![ROPE_NORMAL, ROPE_NEOX, ROPE_SECTIONED].contains(&h.rope_type) {
            return refuse("rope type", h.rope_type.to_string(), "pairs of neighbours, of halves");
        }
        let n_layer = h.n_layer as usize;
        let layers: Vec<_> = (1..=n_layer)
            .map(|layer| LayerConfig::new(family, &h, &engine.layer_hparams(layer)?, layer))
            .collect::<Result<_>>()?;
        if h.windowed != 0 && layers.iter().all(|layer| layer.window.is_none()) {
            // llama.cpp asserts it when it makes a context.
            return refuse("window", "one declared and no layer has it".into(), "some layers");
        }
        let set = |x: f32| (x != 0.0).then_some(x);
        let mut config = Config {
            family,
            n_layer,
            n_embd: h.n_embd as usize,
            n_vocab: engine.vocab().n_tokens(),
            n_ctx_train: h.n_ctx_train as usize,
            rms_eps: h.rms_eps,
            embedding_scale: 1.0,
            residual_scale: 1.0,
            logits: LogitMap::default(),
            attention_scale: set(h.attention_scale),
            attention_softcap: set(h.attention_softcap),
            temperature: set(h.temperature_scale).map(|scale| Temperature {
                scale,
                floor: h.temperature_floor as f32,
                offset: h.temperature_offset,
            }),
            n_embd_per_layer: h.n_embd_per_layer as usize,
            n_layer_kv: h.n_layer_kv as usize,
            n_ctx_orig: h.rope_ctx_orig as usize,
            layers,
        };
        (family.adjust)(&mut config, &h);
        config.check_donors()?;
        Ok(config)
    }

    /// The layer whose keys and values this one (from 1) reads, where it has none of its own: the last of the layers
    /// that have, or with a window the one before it.
    pub fn donor(&self, layer: usize) -> Option<usize> {
        let own = self.layer(layer);
        let back = own.window.is_some() as usize;
        (!own.has_kv).then(|| self.n_layer_kv.saturating_sub(back).max(1))
    }

    fn check_donors(&self) -> Result<()> {
        for layer in (1..=self.n_layer).filter(|&l| !self.layer(l).has_kv) {
            let donor = self.donor(layer).expect("it has none of its own");
            let (own, from) = (self.layer(layer), self.layer(donor));
            let alike = own.window.is_some() == from.window.is_some()
                && own.kv_width() == from.kv_width()
                && own.head_size == from.head_size;
            if !from.has_kv || !alike {
                let got = format!("layer {layer} with those of layer {donor}");
                return refuse("shared keys and values", got, "layers of one kind and size");
            }
        }
        Ok(())
    }

    /// Layer `layer`, from 1.
    pub fn layer(&self, layer: usize) -> &LayerConfig {
        &self.layers[layer - 1]
    }

    /// Layers of which no other is the same in every size: what a plan needs to look at. From 1.
    pub fn kinds(&self, depth: usize) -> Vec<usize> {
        let first = |l: &usize| (1..*l).all(|before| self.layer(before) != self.layer(*l));
        (1..=depth).filter(first).collect()
    }

    /// Whether some layers are mixtures of experts.
    pub fn is_mixture(&self) -> bool {
        self.layers.iter().any(|layer| layer.experts.is_some())
    }

    /// What mixes tokens, layer by layer.
    pub fn mixers(&self) -> Vec<&'static str> {
        self.layers.iter().map(LayerConfig::mixer).collect()
    }

    /// The largest of a size over all layers.
    pub fn most(&self, size: impl Fn(&LayerConfig) -> usize) -> usize {
        self.layers.iter().map(size).max().unwrap_or(0)
    }
}

impl LayerConfig {
    fn new(family: &Family, h: &Hparams, l: &LayerHparams, layer: usize) -> Result<LayerConfig> {
        if l.recurrent != 0 {
            return LayerConfig::recurrent(family, h, l, layer);
        }
        let rotates = l.n_rot == l.head_size_k
            || (family.partial_rope && l.n_rot < l.head_size_k && l.n_rot.is_multiple_of(2));
        if l.head_size_k != l.head_size_v || !rotates {
            let got = format!(
                "k {}, v {}, rotated {} in layer {layer}",
                l.head_size_k, l.head_size_v, l.n_rot
            );
            let supported = match family.partial_rope {
                true => "k and v of one size, an even part of it rotated",
                false => "k, v and rotated size equal",
            };
            return refuse("head layout", got, supported);
        }
        let head_size = l.head_size_k as usize;
        if !head_size.is_multiple_of(8) || !(8..=MAX_HEAD).contains(&head_size) {
            let supported = format!("multiples of 8 up to {MAX_HEAD}");
            return refuse("head size", head_size.to_string(), &supported);
        }
        if l.n_head == 0 || l.n_head_kv == 0 || !l.n_head.is_multiple_of(l.n_head_kv) {
            let got =
                format!("{} query and {} key/value heads in layer {layer}", l.n_head, l.n_head_kv);
            return refuse("head count", got, "query heads a multiple of key/value heads");
        }
        Ok(LayerConfig {
            n_head: l.n_head as usize,
            n_head_kv: l.n_head_kv as usize,
            head_size,
            n_ff: l.n_ff as usize,
            experts: experts(h, l),
            window: (l.window > 0).then_some(l.window as usize),
            rope: (l.rope != 0).then(|| rope(h, l)),
            rope_factors: true,
            has_kv: l.kv != 0,
            delta: None,
        })
    }

    fn recurrent(
        family: &Family,
        h: &Hparams,
        l: &LayerHparams,
        layer: usize,
    ) -> Result<LayerConfig> {
        let [n_k, n_v, size] = [h.ssm_groups, h.ssm_heads, h.ssm_state].map(|n| n as usize);
        let divides = n_k > 0 && n_v > 0 && n_v.is_multiple_of(n_k);
        if !divides || n_v * size != h.ssm_inner as usize || !(1..=MAX_HEAD).contains(&size) {
            let got = format!(
                "{n_k} key and {n_v} value heads of {size}, {} in all, in layer {layer}",
                h.ssm_inner
            );
            let supported = format!("value heads a multiple of key heads, sizes up to {MAX_HEAD}");
            return refuse("head count", got, &supported);
        }
        let kernel = h.ssm_conv as usize;
        if !(1..=MAX_CONV).contains(&kernel) {
            let supported = format!("1 to {MAX_CONV} tokens");
            return refuse("convolution", format!("{kernel} tokens"), &supported);
        }
        Ok(LayerConfig {
            n_head: 0,
            n_head_kv: 0,
            head_size: 0,
            n_ff: l.n_ff as usize,
            experts: experts(h, l),
            window: None,
            rope: None,
            rope_factors: false,
            has_kv: true,
            delta: Some(DeltaConfig { n_k, n_v, grouped: family.grouped_values, size, kernel }),
        })
    }
}

fn experts(h: &Hparams, l: &LayerHparams) -> Option<Experts> {
    (h.n_expert > 0).then_some(Experts {
        count: h.n_expert as usize,
        used: l.n_expert_used as usize,
        n_ff: if l.n_ff_expert > 0 { l.n_ff_expert } else { l.n_ff } as usize,
        n_ff_shared: h.n_ff_shared as usize,
        scale: if h.expert_scale == 0.0 { 1.0 } else { h.expert_scale },
    })
}

/// Head sizes that our attention computes, in steps of 8.
pub const MAX_HEAD: usize = 512;

/// Rope settings from the file's, with YaRN's magnitude scale as llama.cpp derives it: the rotation
/// itself multiplies by `1 + 0.1 ln(factor)`, so that factor is cancelled here.
fn rope(h: &Hparams, l: &LayerHparams) -> Rope {
    let scaled = h.rope_scaling_type != SCALING_NONE;
    // Of the context, by which YaRN's magnitude goes, and of this layer.
    let global = if scaled { h.rope_freq_scale } else { 1.0 };
    let own = if scaled || l.window > 0 { l.rope_freq_scale } else { 1.0 };
    let ext_factor = match h.yarn_ext_factor {
        set if set >= 0.0 => set,
        _ if h.rope_scaling_type == SCALING_YARN => 1.0,
        _ => 0.0,
    };
    let mut attn_factor = h.yarn_attn_factor;
    if ext_factor != 0.0 {
        let factor = 1.0 / global;
        let mscale = |m: f32| if factor <= 1.0 { 1.0 } else { 0.1 * m * factor.ln() + 1.0 };
        attn_factor =
            if h.yarn_log_mul != 0.0 { mscale(1.0) / mscale(h.yarn_log_mul) } else { mscale(1.0) };
        attn_factor /= 1.0 + 0.1 * factor.ln();
    }
    Rope {
        n_rot: l.n_rot as usize,
        neox: h.rope_type != ROPE_NORMAL,
        n_ctx_orig: h.rope_ctx_orig as usize,
        freq_base: l.rope_freq_base,
        freq_scale: own,
        ext_factor,
        attn_factor: attn_factor * h.rope_attn_factor,
        beta_fast: h.yarn_beta_fast,
        beta_slow: h.yarn_beta_slow,
    }
}
