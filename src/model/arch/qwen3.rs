//! Qwen3: queries and keys are normalised head by head before they rotate.

use super::{Family, QkNorm, attention, ffn, plain, pre_norm};
use crate::model::tape::{Tape, Taps, Var};
use crate::ops::Activation::Silu;

pub static FAMILY: Family = Family {
    name: "qwen3",
    models: "Qwen3 (dense)",
    adjust: plain,
    layer,
    permuted: false,
    modules: &[],
    partial_rope: false,
    grouped_values: false,
    mixture: false,
};

fn layer(t: &mut Tape<'_>, x: Var) -> Taps {
    pre_norm(t, x, |t, h| attention(t, h, QkNorm::Heads), |t, h| ffn(t, h, Silu))
}
