//! Phi-3 and Phi-4: queries, keys and values come from one map, gate and up from another; a part of each head
//! rotates, with factors that go by the context's length.

use super::{Family, QkNorm, attention, plain, pre_norm};
use crate::model::tape::{Tape, Taps, Var};
use crate::ops::Activation::Silu;

pub static FAMILY: Family = Family {
    name: "phi3",
    models: "Phi-3, Phi-3.5-mini, Phi-4, Phi-4-mini",
    adjust: plain,
    layer,
    permuted: false,
    modules: &[&[("attn_qkv", "self_attn.qkv_proj"), ("ffn_up", "mlp.gate_up_proj")]],
    partial_rope: true,
    grouped_values: false,
    mixture: false,
};

fn layer(t: &mut Tape<'_>, x: Var) -> Taps {
    pre_norm(t, x, |t, h| attention(t, h, QkNorm::None), ffn)
}

/// `down(silu(gate h) * (up h))`, gate and up one after another in `ffn_up`.
fn ffn(t: &mut Tape<'_>, h: Var) -> Var {
    let (d, n_ff) = (t.config().n_embd, t.layer().n_ff);
    let [gate, up] = t.linear_rows(h, "ffn_up", [n_ff, n_ff]);
    let inner = t.glu(gate, up, Silu);
    t.linear(inner, "ffn_down", d)
}
