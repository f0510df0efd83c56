//! One file per architecture: how its layers are joined, by GGUF names. What is the same in many stands here.

mod gemma2;
mod gemma3;
mod gemma4;
mod gpt_oss;
mod granite;
mod granitemoe;
mod llama;
mod mistral3;
mod olmo2;
mod olmoe;
mod phi3;
mod qwen2;
mod qwen3;
mod qwen3moe;
mod qwen3next;
mod qwen35;
mod qwen35moe;
mod smollm3;

use super::config::{Config, Experts};
use super::tape::{Tape, Taps, Var};
use crate::gguf::GgufSet;
use crate::llama::Hparams;
use crate::ops::{Activation, Gating, RouteSpec};
use crate::{Error, Result};

/// Names of linear maps in GGUF and in Hugging Face's modules.
pub type Modules = &'static [(&'static str, &'static str)];

/// An architecture.
#[derive(Debug)]
pub struct Family {
    /// The value of `general.architecture`.
    pub name: &'static str,
    /// Models of this architecture, by the names that people know.
    pub models: &'static str,
    /// What differs from a plain model's settings.
    pub adjust: fn(&mut Config, &Hparams),
    /// A layer's forward, from the residual H^(l-1): `[D, T]`.
    pub layer: fn(&mut Tape<'_>, Var) -> Taps,
    /// Whether the rows of `attn_q` and `attn_k` are reordered within each head, against Hugging Face's: pairs that
    /// rotate together are neighbours.
    pub permuted: bool,
    /// Linear maps by their names in GGUF and in Hugging Face's modules, where they are not the usual ones; a `*` stands
    /// for an expert's number.
    pub modules: &'static [Modules],
    /// Whether a part of each head may rotate, the rest not; llama.cpp asserts that it does not where it does not
    /// expect that.
    pub partial_rope: bool,
    /// Whether the value heads of one key head of a delta net stand together, as in Hugging Face's modules; else those of
    /// all key heads take turns.
    pub grouped_values: bool,
    /// Whether its FFNs are mixtures of experts.
    pub mixture: bool,
}

impl PartialEq for Family {
    fn eq(&self, other: &Family) -> bool {
        self.name == other.name
    }
}

impl Eq for Family {}

/// All architectures that open.
pub static FAMILIES: [&Family; 18] = [
    &llama::FAMILY,
    &qwen2::FAMILY,
    &qwen3::FAMILY,
    &qwen3moe::FAMILY,
    &qwen35::FAMILY,
    &qwen35moe::FAMILY,
    &qwen3next::FAMILY,
    &gemma2::FAMILY,
    &gemma3::FAMILY,
    &gemma4::FAMILY,
    &phi3::FAMILY,
    &olmo2::FAMILY,
    &granite::FAMILY,
    &smollm3::FAMILY,
    &mistral3::FAMILY,
    &gpt_oss::FAMILY,
    &olmoe::FAMILY,
    &granitemoe::FAMILY,
];

/// What other architectures have that none here has, by a part of their tensors' names.
const FOREIGN: [(&str, &str); 9] = [
    (".ssm_", "recurrent layers (state space, delta net)"),
    (".time_mix_", "recurrent layers (RWKV)"),
    (".shortconv.", "short convolutions"),
    (".attn_kv_a_mqa.", "latent attention"),
    (".attn_q_a.", "latent attention"),
    ("altup_", "alternating updates"),
    ("_norm.bias", "layer norms with a bias"),
    ("position_embd.", "learned positions"),
    ("enc.blk.", "an encoder"),
];

impl Family {
    /// The architecture of this name, if it opens.
    pub fn named(name: &str) -> Option<&'static Family> {
        FAMILIES.into_iter().find(|f| f.name == name)
    }

    /// [`Family::named`], or the list of those that open.
    ///
    /// # Errors
    /// [`Error::Unsupported`].
    pub fn of_name(name: &str) -> Result<&'static Family> {
        Family::named(name).ok_or_else(|| unsupported(name, ""))
    }

    /// The architecture of a model's files.
    ///
    /// # Errors
    /// [`Error::Unsupported`] with the list of those that open, and what this one has that they have not.
    pub fn of(files: &GgufSet) -> Result<&'static Family> {
        let name = files.head().architecture()?;
        if let Some(family) = Family::named(name) {
            return Ok(family);
        }
        let mut parts: Vec<_> = FOREIGN
            .iter()
            .filter(|(part, _)| files.tensors().any(|(_, t)| t.name.contains(part)))
            .map(|(_, words)| *words)
            .collect();
        parts.dedup();
        let missing = match parts.is_empty() {
            true => "; how its norms and maps are joined is not known here".to_string(),
            false => format!("; it has {}, which are not computed here", parts.join(", ")),
        };
        Err(unsupported(name, &missing))
    }
}

fn unsupported(name: &str, why: &str) -> Error {
    let supported = format!("{}{why}", FAMILIES.map(|f| f.name).join(", "));
    Error::Unsupported { what: "architecture", got: name.into(), supported }
}

impl std::fmt::Display for Family {
    fn fmt(&self, f: &mut std::fmt::Formatter) -> std::fmt::Result {
        f.write_str(self.name)
    }
}

/// Settings that need no change.
pub fn plain(_: &mut Config, _: &Hparams) {}

/// Gemma's: embeddings grow with the root of the width, logits may be capped.
pub fn gemma(config: &mut Config, h: &Hparams) {
    config.embedding_scale = (config.n_embd as f32).sqrt();
    config.logits.softcap = (h.final_softcap != 0.0).then_some(h.final_softcap);
}

/// How queries and keys are normalised before rotation.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum QkNorm {
    /// Not at all.
    None,
    /// Each head by itself.
    Heads,
    /// All heads together.
    Whole,
}

/// The residual H^(l-1) to H^l where both modules have a norm before them: `x + A + F`.
pub fn pre_norm(
    t: &mut Tape<'_>,
    x: Var,
    attention: impl FnOnce(&mut Tape<'_>, Var) -> Var,
    ffn: impl FnOnce(&mut Tape<'_>, Var) -> Var,
) -> Taps {
    let attn_in = t.norm(x, "attn_norm");
    let attn_out = attention(t, attn_in);
    let mid = t.add(x, attn_out);
    let ffn_in = t.norm(mid, "ffn_norm");
    let ffn_out = ffn(t, ffn_in);
    let layer_out = t.add(mid, ffn_out);
    Taps { attn_in, attn_out, ffn_in, ffn_out, layer_out }
}

/// The same where both modules have a norm behind them, too: A and F are what these norms give.
pub fn sandwich(
    t: &mut Tape<'_>,
    x: Var,
    attention: impl FnOnce(&mut Tape<'_>, Var) -> Var,
    ffn: impl FnOnce(&mut Tape<'_>, Var) -> Var,
) -> Taps {
    pre_norm(
        t,
        x,
        |t, h| {
            let y = attention(t, h);
            t.norm(y, "post_attention_norm")
        },
        |t, h| {
            let y = ffn(t, h);
            t.norm(y, "post_ffw_norm")
        },
    )
}

/// Self-attention of h: `[D, T]`, from its maps `attn_q`, `attn_k`, `attn_v`, or `attn_qkv`, to `attn_output`.
pub fn attention(t: &mut Tape<'_>, h: Var, norm: QkNorm) -> Var {
    let [q, k, v] = qkv(t, h);
    let (q, k) = (position(t, q, "attn_q_norm", norm), position(t, k, "attn_k_norm", norm));
    let q = match t.config().temperature {
        Some(temperature) => t.scale_by_position(q, |p| temperature.at(p)),
        None => q,
    };
    let scale = attention_scale(t);
    let mixed = t.attend(q, k, v, scale);
    let d = t.config().n_embd;
    t.linear(mixed, "attn_output", d)
}

/// The scale of the layer's attention scores.
pub fn attention_scale(t: &Tape<'_>) -> f32 {
    let derived = || 1.0 / (t.layer().head_size as f32).sqrt();
    t.config().attention_scale.unwrap_or_else(derived)
}

/// Queries, keys and values of h, by one map or by three.
pub fn qkv(t: &mut Tape<'_>, h: Var) -> [Var; 3] {
    let (q_width, kv_width) = (t.layer().q_width(), t.layer().kv_width());
    if t.has("attn_qkv.weight") {
        return t.linear_rows(h, "attn_qkv", [q_width, kv_width, kv_width]);
    }
    // On the way back, cotangents are summed up in the reverse order.
    let v = t.linear(h, "attn_v", kv_width);
    let k = t.linear(h, "attn_k", kv_width);
    let q = t.linear(h, "attn_q", q_width);
    [q, k, v]
}

/// Queries or keys with what tells their positions.
pub fn position(t: &mut Tape<'_>, x: Var, norm_name: &str, norm: QkNorm) -> Var {
    let size = t.layer().head_size;
    let x = match norm {
        QkNorm::None => x,
        QkNorm::Heads => t.norm_over(x, norm_name, size),
        QkNorm::Whole => t.norm(x, norm_name),
    };
    t.rotate(x)
}

/// `down(act(gate h) * (up h))`.
pub fn ffn(t: &mut Tape<'_>, h: Var, act: Activation) -> Var {
    let (d, n_ff) = (t.config().n_embd, t.layer().n_ff);
    let up = t.linear(h, "ffn_up", n_ff);
    let gate = t.linear(h, "ffn_gate", n_ff);
    let inner = t.glu(gate, up, act);
    t.linear(inner, "ffn_down", d)
}

/// Hugging Face's names of the experts' maps, where each expert has modules of its own.
pub const EXPERT_MODULES: Modules = &[
    ("ffn_gate_exps", "mlp.experts.*.gate_proj"),
    ("ffn_up_exps", "mlp.experts.*.up_proj"),
    ("ffn_down_exps", "mlp.experts.*.down_proj"),
];

/// Those of a mixture's router and of its shared expert.
pub const SHARED_MODULES: Modules = &[
    ("ffn_gate_inp", "mlp.gate"),
    ("ffn_gate_shexp", "mlp.shared_expert.gate_proj"),
    ("ffn_up_shexp", "mlp.shared_expert.up_proj"),
    ("ffn_down_shexp", "mlp.shared_expert.down_proj"),
];

/// How a mixture's router weighs the chosen experts.
pub struct Router {
    /// From logits to probabilities.
    pub gating: Gating,
    /// Whether the chosen ones' probabilities are divided by their sum.
    pub normalise: bool,
}

/// The sum of what a token's experts give, `sum_e w_e down_e(act(gate_e h) * (up_e h))`, of h: `[D, T]`; their gate and up
/// are one map or two.
pub fn experts(t: &mut Tape<'_>, h: Var, router: Router, act: Activation) -> Var {
    let (d, e) = (t.config().n_embd, mixture(t));
    let Router { gating, normalise } = router;
    let spec = RouteSpec { used: e.used, gating, normalise, scale: e.scale };
    let to = t.route(h, "ffn_gate_inp", e.count, spec);
    let [gate, up] = if t.has("ffn_gate_up_exps.weight") {
        let both = t.each_expert(h, "ffn_gate_up_exps", 2 * e.n_ff, &to);
        t.halves(both, e.n_ff)
    } else {
        let up = t.each_expert(h, "ffn_up_exps", e.n_ff, &to);
        [t.each_expert(h, "ffn_gate_exps", e.n_ff, &to), up]
    };
    let inner = t.glu(gate, up, act);
    t.sum_experts(inner, "ffn_down_exps", d, &to)
}

/// What the shared expert gives, which all tokens take; times `sigmoid(w . h)` where the model has a gate for it.
pub fn shared_expert(t: &mut Tape<'_>, h: Var, act: Activation) -> Var {
    let (d, n_ff) = (t.config().n_embd, mixture(t).n_ff_shared);
    let up = t.linear(h, "ffn_up_shexp", n_ff);
    let gate = t.linear(h, "ffn_gate_shexp", n_ff);
    let inner = t.glu(gate, up, act);
    let y = t.linear(inner, "ffn_down_shexp", d);
    if !t.has("ffn_gate_inp_shexp.weight") {
        return y;
    }
    let gate = t.linear(h, "ffn_gate_inp_shexp", 1);
    t.gate_tokens(y, gate)
}

fn mixture(t: &Tape<'_>) -> Experts {
    t.layer().experts.expect("the checks before loading want a count of experts")
}
