//! Granite 3 (dense): as Llama, with multipliers of embeddings, modules, scores and logits.

use super::{Family, QkNorm, attention, ffn, pre_norm};
use crate::llama::Hparams;
use crate::model::config::Config;
use crate::model::tape::{Tape, Taps, Var};
use crate::ops::Activation::Silu;

pub static FAMILY: Family = Family {
    name: "granite",
    models: "Granite 3, 3.1, 3.2, 3.3 (dense)",
    adjust,
    layer,
    permuted: true,
    modules: &[],
    partial_rope: false,
    grouped_values: false,
    mixture: false,
};

pub(super) fn adjust(config: &mut Config, h: &Hparams) {
    let or_one = |x: f32| if x == 0.0 { 1.0 } else { x };
    config.embedding_scale = or_one(h.embedding_scale);
    config.residual_scale = or_one(h.residual_scale);
    config.logits.scale = 1.0 / or_one(h.logit_scale);
}

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
            let f = ffn(t, h, Silu);
            t.scale(f, scale)
        },
    )
}
