//! Qwen3.5 and 3.6 with a mixture of experts: the token mixers of `qwen35`; the chosen experts' shares make up the whole, and a
//! shared expert with a gate of its own stands beside them.

use super::qwen35::{DELTA_MODULES, gates, hybrid};
use super::{Family, Router, SHARED_MODULES, experts, plain, shared_expert};
use crate::model::tape::{Tape, Taps, Var};
use crate::ops::Activation::Silu;
use crate::ops::Gating;

pub static FAMILY: Family = Family {
    name: "qwen35moe",
    models: "Qwen3.5-35B-A3B, Qwen3.5-122B-A10B, Qwen3.6-35B-A3B",
    adjust: plain,
    layer,
    permuted: false,
    modules: &[DELTA_MODULES, SHARED_MODULES],
    partial_rope: true,
    grouped_values: false,
    mixture: true,
};

fn layer(t: &mut Tape<'_>, x: Var) -> Taps {
    hybrid(t, x, gates, mixture)
}

/// The chosen experts and the shared one.
pub fn mixture(t: &mut Tape<'_>, h: Var) -> Var {
    let routed = experts(t, h, Router { gating: Gating::Softmax, normalise: true }, Silu);
    let shared = shared_expert(t, h, Silu);
    t.add(routed, shared)
}
