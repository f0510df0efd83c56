//! Granite 3 with a mixture of experts: Granite's multipliers; the chosen experts' shares make up the whole; some models
//! have a shared expert beside them.

use super::granite::adjust;
use super::{Family, QkNorm, Router, attention, experts, pre_norm, shared_expert};
use crate::model::tape::{Tape, Taps, Var};
use crate::ops::Activation::Silu;
use crate::ops::Gating;

pub static FAMILY: Family = Family {
    name: "granitemoe",
    models: "Granite 3.0 and 3.1 1B-A400M and 3B-A800M",
    adjust,
    layer,
    permuted: true,
    modules: &[],
    partial_rope: false,
    grouped_values: false,
    mixture: true,
};

fn layer(t: &mut Tape<'_>, x: Var) -> Taps {
    let scale = t.config().residual_scale;
    pre_norm(
        t,
        x,
        |t, h| {
            let a = attention(t, h, QkNorm::None);
            t.scale(a, scale)
        },
        |t, h| {
            let router = Router { gating: Gating::Softmax, normalise: true };
            let mut f = experts(t, h, router, Silu);
            if t.has("ffn_up_shexp.weight") {
                let shared = shared_expert(t, h, Silu);
                f = t.add(f, shared);
            }
            t.scale(f, scale)
        },
    )
}
