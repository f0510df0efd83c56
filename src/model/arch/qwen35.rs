//! Qwen3.5 and 3.6: of four layers three are gated delta nets, one is attention whose result is gated. The norm before the
//! FFN is named `post_attention_norm`.
//!
//! A delta net: `W_out (norm(o) * silu(W_z h))`, o by the gated delta rule from the convolution of `W_qkv h`, with gates
//! `W_alpha h` and `W_beta h`. A gated attention: `W_o (sigmoid(g) * attention)`, queries and g by turns in `attn_q`.

use super::{Family, Modules, QkNorm, attention_scale, ffn, plain, position};
use crate::model::config::DeltaConfig;
use crate::model::tape::{Tape, Taps, Var};
use crate::ops::Activation::{Sigmoid, Silu};

/// Hugging Face's names of a delta net's maps.
pub const DELTA_MODULES: Modules = &[
    ("attn_qkv", "linear_attn.in_proj_qkv"),
    ("attn_gate", "linear_attn.in_proj_z"),
    ("ssm_alpha", "linear_attn.in_proj_a"),
    ("ssm_beta", "linear_attn.in_proj_b"),
    ("ssm_out", "linear_attn.out_proj"),
];

pub static FAMILY: Family = Family {
    name: "qwen35",
    models: "Qwen3.5, Qwen3.6 (dense)",
    adjust: plain,
    layer,
    permuted: false,
    modules: &[DELTA_MODULES],
    partial_rope: true,
    grouped_values: false,
    mixture: false,
};

fn layer(t: &mut Tape<'_>, x: Var) -> Taps {
    hybrid(t, x, gates, |t, h| ffn(t, h, Silu))
}

/// A layer with either token mixer; `gates` gives the delta net's alpha and beta.
pub fn hybrid(
    t: &mut Tape<'_>,
    x: Var,
    gates: impl FnOnce(&mut Tape<'_>, Var, &DeltaConfig) -> [Var; 2],
    ffn: impl FnOnce(&mut Tape<'_>, Var) -> Var,
) -> Taps {
    let attn_in = t.norm(x, "attn_norm");
    let attn_out = match &t.layer().delta {
        Some(delta) => delta_net(t, attn_in, delta, gates),
        None => gated_attention(t, attn_in),
    };
    let mid = t.add(x, attn_out);
    let ffn_in = t.norm(mid, "post_attention_norm");
    let ffn_out = ffn(t, ffn_in);
    let layer_out = t.add(mid, ffn_out);
    Taps { attn_in, attn_out, ffn_in, ffn_out, layer_out }
}

/// Alpha and beta of h by a map each: `[n_v, T]`.
pub fn gates(t: &mut Tape<'_>, h: Var, delta: &DeltaConfig) -> [Var; 2] {
    // On the way back, cotangents are summed up in the reverse order.
    let beta = t.linear(h, "ssm_beta", delta.n_v);
    let alpha = t.linear(h, "ssm_alpha", delta.n_v);
    [alpha, beta]
}

fn delta_net(
    t: &mut Tape<'_>,
    h: Var,
    delta: &DeltaConfig,
    gates: impl FnOnce(&mut Tape<'_>, Var, &DeltaConfig) -> [Var; 2],
) -> Var {
    let (d, spec) = (t.config().n_embd, delta.spec(t.config().rms_eps));
    let [alpha, beta] = gates(t, h, delta);
    let z = t.linear(h, "attn_gate", spec.out_width());
    let qkv = t.linear(h, "attn_qkv", spec.width());
    let mixed = t.conv_silu(qkv, "ssm_conv1d", delta.kernel);
    let o = t.delta(mixed, alpha, beta, delta);
    let o = t.norm_over(o, "ssm_norm", delta.size);
    let gated = t.glu(z, o, Silu);
    t.linear(gated, "ssm_out", d)
}

fn gated_attention(t: &mut Tape<'_>, h: Var) -> Var {
    let (layer, d) = (t.layer(), t.config().n_embd);
    let v = t.linear(h, "attn_v", layer.kv_width());
    let k = t.linear(h, "attn_k", layer.kv_width());
    let both = t.linear(h, "attn_q", 2 * layer.q_width());
    let [q, gate] = t.halves(both, layer.head_size);
    let q = position(t, q, "attn_q_norm", QkNorm::Heads);
    let k = position(t, k, "attn_k_norm", QkNorm::Heads);
    let scale = attention_scale(t);
    let mixed = t.attend(q, k, v, scale);
    let gated = t.glu(gate, mixed, Sigmoid);
    t.linear(gated, "attn_output", d)
}
