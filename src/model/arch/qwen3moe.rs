//! Qwen3 with a mixture of experts: the attention of Qwen3; a softmax over all experts, of which the likeliest are taken
//! and weighed by their shares.

use super::{
    EXPERT_MODULES, Family, QkNorm, Router, SHARED_MODULES, attention, experts, plain, pre_norm,
};
use crate::model::tape::{Tape, Taps, Var};
use crate::ops::Activation::Silu;
use crate::ops::Gating;

pub static FAMILY: Family = Family {
    name: "qwen3moe",
    models: "Qwen3-30B-A3B, Qwen3-235B-A22B, Qwen3-Coder-30B-A3B",
    adjust: plain,
    layer,
    permuted: false,
    modules: &[EXPERT_MODULES, SHARED_MODULES],
    partial_rope: false,
    grouped_values: false,
    mixture: true,
};

fn layer(t: &mut Tape<'_>, x: Var) -> Taps {
    pre_norm(
        t,
        x,
        |t, h| attention(t, h, QkNorm::Heads),
        |t, h| experts(t, h, Router { gating: Gating::Softmax, normalise: true }, Silu),
    )
}
