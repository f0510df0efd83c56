//! What a gated delta net and a gated attention need besides: convolution, delta rule, queries beside their gates.

use super::{Step, Tape, Var};
use crate::ggml::{Arena, Tensor, Type};
use crate::model::config::DeltaConfig;
use crate::ops::{self, DeltaInputs};

impl<'a> Tape<'a> {
    /// The causal convolution of x: `[C, T]` by the weight `[K, C]` of this name, channel by channel, then SiLU.
    pub fn conv_silu(&mut self, x: Var, name: &str, kernel: usize) -> Var {
        let name = format!("{name}.weight");
        let channels = self.node(x).shape()[0];
        let weight = self.weight(&name, &[kernel, channels]);
        if weight.ty() != Type::F32 {
            let full = self.full_name(&name);
            self.refuse(&full, "type f32".into(), weight.ty().name());
            return x;
        }
        self.keep(x);
        let node = ops::conv_silu(self.arena, self.node(x), weight, &self.parts.batch.segments);
        let y = self.push_cheap(node, &[x]);
        self.steps.push(Step::Conv { x, y, weight });
        y
    }

    /// The gated delta rule on rows q, k, v: `[(2 n_k + n_v) d, T]` with gates alpha and beta `[n_v, T]`, and the layer's
    /// decays: `[n_v d, T]`.
    pub fn delta(&mut self, qkv: Var, alpha: Var, beta: Var, delta: &DeltaConfig) -> Var {
        for x in [qkv, alpha, beta] {
            self.keep(x);
        }
        let n_v = delta.n_v;
        let inputs = DeltaInputs {
            qkv: self.node(qkv),
            alpha: self.node(alpha),
            beta: self.node(beta),
            decay: self.weight("ssm_a", &[n_v]),
            bias: self.weight("ssm_dt.bias", &[n_v]),
        };
        let spec = delta.spec(self.parts.config.rms_eps);
        let (arena, segments) = (self.arena, &self.parts.batch.segments);
        let whole = self.memo.node(ops::delta(arena, inputs, segments, spec).1.whole());
        let (out, saved) = ops::delta_kept(arena, whole, inputs, segments, spec);
        let y = self.push(out, false);
        self.steps.push(Step::Delta { qkv, alpha, beta, y, saved });
        y
    }

    /// x: `[2 n, T]`, in which runs of `size` values of two kinds take turns, as the two: `[n, T]` each.
    pub fn halves(&mut self, x: Var, size: usize) -> [Var; 2] {
        let (arena, node) = (self.arena, self.node(x));
        let ys = [0, 1].map(|i| {
            let half = half(arena, node, size, i);
            self.push_cheap(half, &[x])
        });
        self.steps.push(Step::Halves { x, ys, size });
        ys
    }
}

/// The first or the second of each two runs of `size` values of x: `[2 n, T]`.
fn half<'a>(arena: &'a Arena, x: Tensor<'a>, size: usize, which: usize) -> Tensor<'a> {
    let [all, t, ..] = x.shape();
    let pairs = arena.reshape(x, [2 * size, all / (2 * size) * t, 1, 1]);
    let half = arena.contiguous(arena.column_range(pairs, which * size, size));
    arena.reshape(half, [all / 2, t, 1, 1])
}

/// The way back of [`half`], both halves: `[n, T]` each.
pub(super) fn joined<'a>(arena: &'a Arena, halves: [Tensor<'a>; 2], size: usize) -> Tensor<'a> {
    let [n, t, ..] = halves[0].shape();
    let [a, b] = halves.map(|half| arena.reshape(half, [size, n / size * t, 1, 1]));
    arena.reshape(arena.side_by_side(a, b), [2 * n, t, 1, 1])
}
