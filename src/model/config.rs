//! What a model is made of: sizes, rotary embedding, architecture.

use std::fmt;

use crate::ggml::Rope;
use crate::llama::Hparams;
use crate::{Error, Result};

/// The architectures this program computes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Arch {
    /// Llama 2 and 3, OctoThinker, and their kin: rotated pairs are neighbours.
    Llama,
    /// Qwen2 and 2.5: biases on q, k and v.
    Qwen2,
    /// Qwen3: q and k are normalised per head.
    Qwen3,
}

impl Arch {
    /// All of them.
    pub const ALL: [Arch; 3] = [Arch::Llama, Arch::Qwen2, Arch::Qwen3];

    /// The value of `general.architecture`.
    pub fn name(self) -> &'static str {
        match self {
            Arch::Llama => "llama",
            Arch::Qwen2 => "qwen2",
            Arch::Qwen3 => "qwen3",
        }
    }

    /// The architecture of this name.
    ///
    /// # Errors
    /// [`Error::Unsupported`] with the list of those that are.
    pub fn parse(name: &str) -> Result<Arch> {
        Arch::ALL.into_iter().find(|a| a.name() == name).ok_or_else(|| Error::Unsupported {
            what: "architecture",
            got: name.into(),
            supported: Arch::ALL.map(Arch::name).join(", "),
        })
    }

    /// Whether q and k are normalised per head.
    pub fn has_qk_norm(self) -> bool {
        self == Arch::Qwen3
    }

    /// Whether rotated pairs are `(i, i + n_rot/2)`.
    pub fn rope_is_neox(self) -> bool {
        self != Arch::Llama
    }
}

impl fmt::Display for Arch {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// Sizes and settings of a model, as llama.cpp reads them.
#[derive(Clone, Debug, PartialEq)]
pub struct Config {
    /// Architecture.
    pub arch: Arch,
    /// Number of layers, L.
    pub n_layer: usize,
    /// Width of the residual, D.
    pub n_embd: usize,
    /// Query heads.
    pub n_head: usize,
    /// Key/value heads.
    pub n_head_kv: usize,
    /// Size of a head.
    pub head_size: usize,
    /// Width of the FFN.
    pub n_ff: usize,
    /// Size of the vocabulary, V.
    pub n_vocab: usize,
    /// Context length the model was trained on.
    pub n_ctx_train: usize,
    /// Epsilon of the RMS norms.
    pub rms_eps: f32,
    /// Scale of the attention scores.
    pub attention_scale: f32,
    /// Rotary embedding.
    pub rope: Rope,
}

/// `enum llama_rope_scaling_type`.
const SCALING_NONE: i32 = 0;
const SCALING_LINEAR: i32 = 1;
const SCALING_YARN: i32 = 2;

impl Config {
    /// Reads llama.cpp's hyperparameters and refuses what is not computed here.
    ///
    /// # Errors
    /// [`Error::Unsupported`] for mixtures of experts, layers of different sizes, other rope scalings,
    /// or head sizes the attention op does not take.
    pub fn new(arch: Arch, h: &Hparams, n_vocab: usize) -> Result<Config> {
        let refuse = |what, got: String, supported: &str| {
            Err(Error::Unsupported { what, got, supported: supported.into() })
        };
        if h.n_expert > 0 {
            return refuse("mixture of experts", format!("{} experts", h.n_expert), "dense FFN");
        }
        if h.uniform == 0 {
            return refuse("layout", "layers of different sizes".into(), "equal layers");
        }
        if h.head_size_k != h.head_size_v || h.n_rot != h.head_size_k {
            let got = format!("k {}, v {}, rotated {}", h.head_size_k, h.head_size_v, h.n_rot);
            return refuse("head layout", got, "k, v and rotated size equal");
        }
        let head_size = h.head_size_k as usize;
        if !head_size.is_multiple_of(8) || !(8..=256).contains(&head_size) {
            return refuse("head size", head_size.to_string(), "multiples of 8 up to 256");
        }
        if h.n_head == 0 || h.n_head_kv == 0 || !h.n_head.is_multiple_of(h.n_head_kv) {
            let got = format!("{} query and {} key/value heads", h.n_head, h.n_head_kv);
            return refuse("head count", got, "query heads a multiple of key/value heads");
        }
        if ![SCALING_NONE, SCALING_LINEAR, SCALING_YARN].contains(&h.rope_scaling_type) {
            let got = h.rope_scaling_type.to_string();
            return refuse("rope scaling type", got, "none, linear, yarn, llama3 (rope_freqs)");
        }
        Ok(Config {
            arch,
            n_layer: h.n_layer as usize,
            n_embd: h.n_embd as usize,
            n_head: h.n_head as usize,
            n_head_kv: h.n_head_kv as usize,
            head_size,
            n_ff: h.n_ff as usize,
            n_vocab,
            n_ctx_train: h.n_ctx_train as usize,
            rms_eps: h.rms_eps,
            attention_scale: if h.attention_scale == 0.0 {
                1.0 / (head_size as f32).sqrt()
            } else {
                h.attention_scale
            },
            rope: rope(arch, h),
        })
    }
}

/// Rope settings from the file's, with YaRN's magnitude scale as llama.cpp derives it: the rotation
/// itself multiplies by `1 + 0.1 ln(factor)`, so that factor is cancelled here.
fn rope(arch: Arch, h: &Hparams) -> Rope {
    let freq_scale = if h.rope_scaling_type == SCALING_NONE { 1.0 } else { h.rope_freq_scale };
    let ext_factor = match h.yarn_ext_factor {
        set if set >= 0.0 => set,
        _ if h.rope_scaling_type == SCALING_YARN => 1.0,
        _ => 0.0,
    };
    let mut attn_factor = h.yarn_attn_factor;
    if ext_factor != 0.0 {
        let factor = 1.0 / freq_scale;
        let mscale = |m: f32| if factor <= 1.0 { 1.0 } else { 0.1 * m * factor.ln() + 1.0 };
        attn_factor =
            if h.yarn_log_mul != 0.0 { mscale(1.0) / mscale(h.yarn_log_mul) } else { mscale(1.0) };
        attn_factor /= 1.0 + 0.1 * factor.ln();
    }
    Rope {
        n_rot: h.n_rot as usize,
        neox: arch.rope_is_neox(),
        n_ctx_orig: h.rope_ctx_orig as usize,
        freq_base: h.rope_freq_base,
        freq_scale,
        ext_factor,
        attn_factor: attn_factor * h.rope_attn_factor,
        beta_fast: h.yarn_beta_fast,
        beta_slow: h.yarn_beta_slow,
    }
}
