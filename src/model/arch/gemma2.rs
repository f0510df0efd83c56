//! Gemma 2: as Gemma 3, without norms of queries and keys; scores and logits are capped, every other layer is
//! windowed.

use super::{Family, QkNorm, attention, ffn, gemma, sandwich};
use crate::model::tape::{Tape, Taps, Var};
use crate::ops::Activation::Gelu;

pub static FAMILY: Family = Family {
    name: "gemma2",
    models: "Gemma 2",
    adjust: gemma,
    layer,
    permuted: false,
    modules: &[],
    partial_rope: true,
    grouped_values: false,
    mixture: false,
};

fn layer(t: &mut Tape<'_>, x: Var) -> Taps {
    sandwich(t, x, |t, h| attention(t, h, QkNorm::None), |t, h| ffn(t, h, Gelu))
}
