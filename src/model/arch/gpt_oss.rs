//! gpt-oss: heads with sinks, every other layer with a window; a mixture of experts whose weights are a softmax over the
//! chosen ones, whose maps have biases and whose gate and line are cut off.

use super::{Family, QkNorm, Router, attention, experts, plain};
use crate::model::tape::{Tape, Taps, Var};
use crate::ops::Activation::ClampedSwiglu;
use crate::ops::Gating;

pub static FAMILY: Family = Family {
    name: "gpt-oss",
    models: "gpt-oss-20b, gpt-oss-120b",
    adjust: plain,
    layer,
    permuted: false,
    modules: &[],
    partial_rope: false,
    grouped_values: false,
    mixture: true,
};

/// The norm before the experts is named `post_attention_norm`.
fn layer(t: &mut Tape<'_>, x: Var) -> Taps {
    let attn_in = t.norm(x, "attn_norm");
    let attn_out = attention(t, attn_in, QkNorm::None);
    let mid = t.add(x, attn_out);
    let ffn_in = t.norm(mid, "post_attention_norm");
    let router = Router { gating: Gating::Chosen, normalise: false };
    let ffn_out = experts(t, ffn_in, router, ClampedSwiglu);
    let layer_out = t.add(mid, ffn_out);
    Taps { attn_in, attn_out, ffn_in, ffn_out, layer_out }
}
