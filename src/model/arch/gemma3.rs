//! Gemma 3 (text): norms before and behind each module, GELU gates, five windowed layers to one full one, each kind
//! with rotation of its own.

use super::{Family, QkNorm, attention, ffn, gemma, sandwich};
use crate::model::tape::{Tape, Taps, Var};
use crate::ops::Activation::Gelu;

pub static FAMILY: Family = Family {
    name: "gemma3",
    models: "Gemma 3",
    adjust: gemma,
    layer,
    permuted: false,
    modules: &[],
    partial_rope: true,
    grouped_values: false,
    mixture: false,
};

fn layer(t: &mut Tape<'_>, x: Var) -> Taps {
    sandwich(t, x, |t, h| attention(t, h, QkNorm::Heads), |t, h| ffn(t, h, Gelu))
}
