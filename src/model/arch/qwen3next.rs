//! Qwen3-Next: the layers of `qwen35moe`, with alpha and beta by one map, the value heads of one key head together, and
//! rotation by one axis.
//!
//! `ssm_ba` gives beta and alpha by turns, of the value heads of a key head each.

use super::qwen35::hybrid;
use super::qwen35moe::mixture;
use super::{EXPERT_MODULES, Family, SHARED_MODULES, plain};
use crate::model::config::DeltaConfig;
use crate::model::tape::{Tape, Taps, Var};

pub static FAMILY: Family = Family {
    name: "qwen3next",
    models: "Qwen3-Next-80B-A3B, Qwen3-Coder-Next",
    adjust: plain,
    layer,
    permuted: false,
    // in_proj_qkvz is attn_qkv and attn_gate here (src/export/peft_joined.rs), and ssm_in in files that are not read.
    modules: &[
        &[
            ("ssm_in", "linear_attn.in_proj_qkvz"),
            ("ssm_ba", "linear_attn.in_proj_ba"),
            ("ssm_out", "linear_attn.out_proj"),
        ],
        EXPERT_MODULES,
        SHARED_MODULES,
    ],
    partial_rope: true,
    grouped_values: true,
    mixture: true,
};

fn layer(t: &mut Tape<'_>, x: Var) -> Taps {
    hybrid(t, x, gates, mixture)
}

fn gates(t: &mut Tape<'_>, h: Var, delta: &DeltaConfig) -> [Var; 2] {
    let both = t.linear(h, "ssm_ba", 2 * delta.n_v);
    let [beta, alpha] = t.halves(both, delta.n_v / delta.n_k);
    [alpha, beta]
}
