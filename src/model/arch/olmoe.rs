//! OLMoE: queries and keys are normalised over all heads together; a mixture of experts with a softmax over all of them,
//! whose shares are the weights as they stand.

use super::{
    EXPERT_MODULES, Family, QkNorm, Router, SHARED_MODULES, attention, experts, plain, pre_norm,
};
use crate::model::tape::{Tape, Taps, Var};
use crate::ops::Activation::Silu;
use crate::ops::Gating;

pub static FAMILY: Family = Family {
    name: "olmoe",
    models: "OLMoE-1B-7B",
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
        |t, h| attention(t, h, QkNorm::Whole),
        |t, h| experts(t, h, Router { gating: Gating::Softmax, normalise: false }, Silu),
    )
}
