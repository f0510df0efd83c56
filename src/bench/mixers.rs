//! The gated delta rule of a model that has it, beside attention of the same width.

use super::ops::{packed, pairs, time};
use super::{Bench, Row};
use crate::Result;
use crate::ops::{self, AttentionSpec, DeltaInputs};

/// Tokens of a sequence.
const TOKENS: [usize; 3] = [512, 2048, 8192];

pub(super) fn delta(bench: &Bench<'_>) -> Result<Vec<Row>> {
    let config = bench.model.config();
    let Some(delta) = config.layers.iter().find_map(|layer| layer.delta) else {
        return Ok(Vec::new());
    };
    let spec = delta.spec(config.rms_eps);
    // Not used: neither has weights.
    let w = bench.model.weights().output_norm();
    let attention = AttentionSpec {
        n_head: spec.n_v,
        n_head_kv: spec.n_v,
        head_size: spec.size,
        scale: 1.0 / (spec.size as f32).sqrt(),
        window: None,
        softcap: None,
    };
    let mut rows = Vec::new();
    for t in TOKENS {
        let segments = packed(1, t, 0, 0);
        let heads = format!("1 x {t}, {} x {}", spec.n_v, spec.size);
        let [forward, back] = ops::delta_flop(&segments, spec);
        let gates = [spec.n_v, t];
        for (name, flop, backward) in [
            (format!("delta {heads}"), forward, false),
            (format!("delta, delta_back {heads}"), forward + back, true),
        ] {
            rows.push(time(bench, name, flop, w, |arena, graph, inputs| {
                let qkv = inputs.f32(arena, [spec.width(), t]);
                let [alpha, beta] = [gates; 2].map(|shape| inputs.f32(arena, shape));
                let [decay, bias] = [(); 2].map(|()| inputs.f32(arena, [spec.n_v, 1]));
                // Below 0.
                let decay = arena.scale(arena.mul(decay, decay), -1.0);
                let rule = DeltaInputs { qkv, alpha, beta, decay, bias };
                let (out, saved) = ops::delta(arena, rule, &segments, spec);
                if !backward {
                    return graph.output(out);
                }
                let d_out = inputs.f32(arena, [spec.out_width(), t]);
                for d in ops::delta_back(arena, &saved, d_out) {
                    graph.output(d);
                }
            })?);
        }
        let flop = 2.0 * (pairs(&segments, None) * spec.out_width()) as f64;
        let shape = [spec.out_width(), t];
        for (name, flop, backward) in [
            (format!("attention {heads}"), 2.0 * flop, false),
            (format!("attention, attention_back {heads}"), 7.0 * flop, true),
        ] {
            rows.push(time(bench, name, flop, w, |arena, graph, inputs| {
                let [q, k, v] = [shape; 3].map(|shape| inputs.f32(arena, shape));
                let (out, saved) = ops::attention(arena, q, k, v, None, &segments, attention);
                if !backward {
                    return graph.output(out);
                }
                let d_out = inputs.f32(arena, shape);
                for d in ops::attention_back(arena, &saved, d_out) {
                    graph.output(d);
                }
            })?);
        }
    }
    Ok(rows)
}
