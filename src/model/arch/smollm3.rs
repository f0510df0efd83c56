//! SmolLM3: as Llama, but every fourth layer knows no positions.

use super::{Family, QkNorm, attention, ffn, pre_norm};
use crate::llama::Hparams;
use crate::model::config::Config;
use crate::model::tape::{Tape, Taps, Var};
use crate::ops::Activation::Silu;

pub static FAMILY: Family = Family {
    name: "smollm3",
    models: "SmolLM3",
    adjust,
    layer,
    permuted: true,
    modules: &[],
    partial_rope: false,
    grouped_values: false,
    mixture: false,
};

/// Of so many layers the last one does not rotate; not in the file.
const STEP: usize = 4;

fn adjust(config: &mut Config, _: &Hparams) {
    config.layers.iter_mut().skip(STEP - 1).step_by(STEP).for_each(|layer| layer.rope = None);
}

fn layer(t: &mut Tape<'_>, x: Var) -> Taps {
    pre_norm(t, x, |t, h| attention(t, h, QkNorm::None), |t, h| ffn(t, h, Silu))
}
