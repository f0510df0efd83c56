//! OLMo 2 and 3: no norm before a module, one behind it; queries and keys are normalised over all heads together.
//! OLMo 3 has windows, and YaRN in its full layers alone.

use super::{Family, QkNorm, attention, ffn};
use crate::llama::Hparams;
use crate::model::config::Config;
use crate::model::tape::{Tape, Taps, Var};
use crate::ops::Activation::Silu;

pub static FAMILY: Family = Family {
    name: "olmo2",
    models: "OLMo 2, OLMo 3",
    adjust,
    layer,
    permuted: false,
    modules: &[],
    partial_rope: false,
    grouped_values: false,
    mixture: false,
};

fn adjust(config: &mut Config, _: &Hparams) {
    for layer in config.layers.iter_mut().filter(|layer| layer.window.is_some()) {
        if let Some(rope) = &mut layer.rope {
            (rope.freq_scale, rope.ext_factor, rope.attn_factor) = (1.0, 0.0, 1.0);
        }
    }
}

fn layer(t: &mut Tape<'_>, x: Var) -> Taps {
    let a = attention(t, x, QkNorm::Whole);
    let attn_out = t.norm(a, "post_attention_norm");
    let mid = t.add(x, attn_out);
    let f = ffn(t, mid, Silu);
    let ffn_out = t.norm(f, "post_ffw_norm");
    let layer_out = t.add(mid, ffn_out);
    Taps { attn_in: x, attn_out, ffn_in: mid, ffn_out, layer_out }
}
