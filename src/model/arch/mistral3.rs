//! Ministral 3: as Llama, with YaRN and queries that grow with their position.

use super::{Family, QkNorm, attention, ffn, plain, pre_norm};
use crate::model::tape::{Tape, Taps, Var};
use crate::ops::Activation::Silu;

pub static FAMILY: Family = Family {
    name: "mistral3",
    models: "Ministral 3, Mistral Small 3.2 and later",
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
