//! Llama 2 and 3 and their kin: a norm before each module, neighbours rotate together.

use super::{Family, QkNorm, attention, ffn, plain, pre_norm};
use crate::model::tape::{Tape, Taps, Var};
use crate::ops::Activation::Silu;

pub static FAMILY: Family = Family {
    name: "llama",
    models: "Llama 2, 3, 3.1, 3.2, Mistral 7B, SmolLM2, OctoThinker",
    adjust: plain,
    layer,
    permuted: true,
    modules: &[],
    partial_rope: false,
    grouped_values: false,
    mixture: false,
};

fn layer(t: &mut Tape<'_>, x: Var) -> Taps {
    pre_norm(t, x, |t, h| attention(t, h, QkNorm::None), |t, h| ffn(t, h, Silu))
}
