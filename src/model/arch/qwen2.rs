//! Qwen2 and 2.5: as Llama, with biases on q, k and v; halves of a head rotate together.

use super::{Family, QkNorm, attention, ffn, plain, pre_norm};
use crate::model::tape::{Tape, Taps, Var};
use crate::ops::Activation::Silu;

pub static FAMILY: Family = Family {
    name: "qwen2",
    models: "Qwen2, Qwen2.5, DeepSeek-R1-Distill-Qwen",
    adjust: plain,
    layer,
    permuted: false,
    modules: &[],
    partial_rope: false,
    grouped_values: false,
    mixture: false,
};

fn layer(t: &mut Tape<'_>, x: Var) -> Taps {
    pre_norm(t, x, |t, h| attention(t, h, QkNorm::None), |t, h| ffn(t, h, Silu))
}
