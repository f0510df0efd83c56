//! The blocks a layer is made of, each with its forward and its vector-Jacobian product (vjp).
//!
//! A forward appends nodes to the arena and returns what the vjp needs again. A vjp takes the
//! cotangent of the output (`d_name` is the cotangent of `name`), appends the nodes that accumulate
//! the adapter's gradients, and returns the cotangent of the input.

use super::memo::Memo;
use super::weights::Linear;
use crate::ggml::{Arena, Graph, Rope, Tensor};
use crate::ops::{self, Activation};

/// An adapter's pair on one linear map.
#[derive(Clone, Copy)]
pub struct Pair<'a> {
    /// `[n_in, r]`
    pub a: Tensor<'a>,
    /// `[r, n_out]`
    pub b: Tensor<'a>,
    /// alpha / rank
    pub scale: f32,
    /// Where gradients of A and B are accumulated; none in a forward without training.
    pub gradient: Option<(Tensor<'a>, Tensor<'a>)>,
}

/// `y = W x + bias + s B A x`.
#[derive(Clone, Copy)]
pub struct AdaptedLinear<'a> {
    /// The frozen part.
    pub base: Linear<'a>,
    /// The trained part.
    pub pair: Option<Pair<'a>>,
}

/// What the vjp of an [`AdaptedLinear`] needs.
#[derive(Clone, Copy)]
pub struct LinearSaved<'a> {
    x: Tensor<'a>,         // [n_in, T]
    u: Option<Tensor<'a>>, // A x: [r, T]
}

impl<'a> AdaptedLinear<'a> {
    /// x: `[n_in, T]` to y: `[n_out, T]`.
    pub fn forward(
        &self,
        arena: &'a Arena,
        x: Tensor<'a>,
        memo: &Memo<'a>,
    ) -> (Tensor<'a>, LinearSaved<'a>) {
        let u = self.pair.map(|p| memo.node(|| ops::linear(arena, p.a, x, None, None))); // [r, T]
        let low =
            self.pair.zip(u).map(|(p, u)| ops::LowRank { factor: p.b, input: u, scale: p.scale });
        let y = ops::linear(arena, self.base.weight, x, low, self.base.bias);
        (y, LinearSaved { x, u })
    }

    /// Accumulates dA and dB; gives `dx + add` when `wanted`.
    ///
    /// `dx = W^T dy + s A^T B^T dy`, `dB = s dy (A x)^T`, `dA = s (B^T dy) x^T`.
    pub fn vjp(
        &self,
        arena: &'a Arena,
        graph: &mut Graph<'a>,
        saved: LinearSaved<'a>,
        dy: Tensor<'a>,
        add: Option<Tensor<'a>>,
        wanted: bool,
    ) -> Option<Tensor<'a>> {
        let mut low = None;
        if let (Some(pair), Some(u)) = (self.pair, saved.u) {
            let du = ops::linear_back(arena, pair.b, dy, None, None); // B^T dy: [r, T]
            if let Some((da, db)) = pair.gradient {
                graph.add(ops::outer(arena, db, u, dy, pair.scale)); // [r, n_out]
                graph.add(ops::outer(arena, da, saved.x, du, pair.scale)); // [n_in, r]
            }
            low = Some(ops::LowRank { factor: pair.a, input: du, scale: pair.scale });
        }
        wanted.then(|| ops::linear_back(arena, self.base.weight, dy, low, add))
    }
}

/// `y = x / rms(x) * w`, rows of any leading size.
#[derive(Clone, Copy)]
pub struct RmsNorm<'a> {
    /// `[ne0 of x]`
    pub weight: Tensor<'a>,
    /// Added to the mean square.
    pub eps: f32,
}

impl<'a> RmsNorm<'a> {
    /// x and y of one shape.
    pub fn forward(&self, arena: &'a Arena, x: Tensor<'a>) -> Tensor<'a> {
        ops::rms_norm(arena, x, self.weight, self.eps)
    }

    /// `dx + add` from the input and `dy`.
    pub fn vjp(
        &self,
        arena: &'a Arena,
        x: Tensor<'a>,
        dy: Tensor<'a>,
        add: Option<Tensor<'a>>,
    ) -> Tensor<'a> {
        ops::rms_norm_back(arena, x, self.weight, dy, add, self.eps)
    }
}

/// What rotates heads: positions and settings.
#[derive(Clone, Copy)]
pub struct Rotary<'a> {
    /// `[T]`, I32
    pub positions: Tensor<'a>,
    /// Frequency divisors.
    pub factors: Option<Tensor<'a>>,
    /// Settings.
    pub rope: Rope,
}

/// q or k of one layer: split in heads, normalise (qwen3), rotate.
#[derive(Clone, Copy)]
pub struct Heads<'a> {
    /// Number of heads.
    pub n: usize,
    /// Size of one.
    pub size: usize,
    /// Norm over a head.
    pub norm: Option<RmsNorm<'a>>,
    /// Rotation.
    pub rotary: Rotary<'a>,
}

impl<'a> Heads<'a> {
    /// x: `[size * n, T]` to the same shape.
    pub fn forward(&self, arena: &'a Arena, x: Tensor<'a>) -> Tensor<'a> {
        let flat = x.shape();
        let mut h = arena.reshape(x, [self.size, self.n, flat[1], 1]);
        if let Some(norm) = self.norm {
            h = norm.forward(arena, h);
        }
        let r = &self.rotary;
        arena.reshape(arena.rope(h, r.positions, r.factors, &r.rope), flat)
    }

    /// dx: `[size * n, T]` from the input and dy.
    pub fn vjp(&self, arena: &'a Arena, x: Tensor<'a>, dy: Tensor<'a>) -> Tensor<'a> {
        let flat = x.shape();
        let heads = [self.size, self.n, flat[1], 1];
        let r = &self.rotary;
        let mut d = arena.rope_back(arena.reshape(dy, heads), r.positions, r.factors, &r.rope);
        if let Some(norm) = self.norm {
            d = norm.vjp(arena, arena.reshape(x, heads), d, None);
        }
        arena.reshape(d, flat)
    }
}

/// Self-attention: q, k, v from one input, causal within segments, mixed by the output map.
pub struct Attention<'a> {
    /// To queries.
    pub q: AdaptedLinear<'a>,
    /// To keys.
    pub k: AdaptedLinear<'a>,
    /// To values.
    pub v: AdaptedLinear<'a>,
    /// From heads to the residual.
    pub o: AdaptedLinear<'a>,
    /// Queries to rotated heads.
    pub q_heads: Heads<'a>,
    /// Keys to rotated heads.
    pub k_heads: Heads<'a>,
    /// Who sees whom.
    pub segments: &'a [ops::Segment],
    /// Scale of the scores.
    pub scale: f32,
}

/// What the vjp of [`Attention`] needs.
pub struct AttentionSaved<'a> {
    linear: [LinearSaved<'a>; 4],
    q_raw: Tensor<'a>,
    k_raw: Tensor<'a>,
    core: ops::AttentionSaved<'a>,
}

impl<'a> Attention<'a> {
    /// h (normed input): `[D, T]` to A: `[D, T]`.
    pub fn forward(
        &self,
        arena: &'a Arena,
        h: Tensor<'a>,
        memo: &Memo<'a>,
    ) -> (Tensor<'a>, AttentionSaved<'a>) {
        let kept = |map: &AdaptedLinear<'a>| {
            let (y, saved) = map.forward(arena, h, memo);
            (memo.node(|| y), saved)
        };
        let (q_raw, q_saved) = kept(&self.q); // [hd * n_head, T]
        let (k_raw, k_saved) = kept(&self.k); // [hd * n_head_kv, T]
        let (v, v_saved) = kept(&self.v);
        let q = self.q_heads.forward(arena, q_raw);
        let k = self.k_heads.forward(arena, k_raw);
        let spec = ops::AttentionSpec {
            n_head: self.q_heads.n,
            n_head_kv: self.k_heads.n,
            head_size: self.q_heads.size,
            scale: self.scale,
            window: None,
            softcap: None,
        };
        let whole = memo.node(|| ops::attention(arena, q, k, v, self.segments, spec).1.whole());
        let (mixed, core) = ops::attention_kept(arena, whole, q, k, v, self.segments, spec); // [hd * n_head, T]
        let (out, o_saved) = self.o.forward(arena, mixed, memo);
        (out, AttentionSaved { linear: [q_saved, k_saved, v_saved, o_saved], q_raw, k_raw, core })
    }

    /// dh from dA, when `wanted`.
    pub fn vjp(
        &self,
        arena: &'a Arena,
        graph: &mut Graph<'a>,
        saved: &AttentionSaved<'a>,
        d_out: Tensor<'a>,
        wanted: bool,
    ) -> Option<Tensor<'a>> {
        let [q_saved, k_saved, v_saved, o_saved] = saved.linear;
        let d_mixed = self.o.vjp(arena, graph, o_saved, d_out, None, true)?;
        let [dq, dk, dv] = ops::attention_back(arena, &saved.core, d_mixed);
        let dq = self.q_heads.vjp(arena, saved.q_raw, dq);
        let dk = self.k_heads.vjp(arena, saved.k_raw, dk);
        let dh = self.q.vjp(arena, graph, q_saved, dq, None, wanted);
        let dh = self.k.vjp(arena, graph, k_saved, dk, dh, wanted);
        self.v.vjp(arena, graph, v_saved, dv, dh, wanted)
    }
}

/// `F = W_down (silu(W_gate h) * W_up h)`.
pub struct SwiGlu<'a> {
    /// Gate.
    pub gate: AdaptedLinear<'a>,
    /// Up.
    pub up: AdaptedLinear<'a>,
    /// Down.
    pub down: AdaptedLinear<'a>,
}

/// What the vjp of [`SwiGlu`] needs.
pub struct SwiGluSaved<'a> {
    linear: [LinearSaved<'a>; 3],
    gate: Tensor<'a>,
    up: Tensor<'a>,
}

impl<'a> SwiGlu<'a> {
    /// h (normed input): `[D, T]` to F: `[D, T]`.
    pub fn forward(
        &self,
        arena: &'a Arena,
        h: Tensor<'a>,
        memo: &Memo<'a>,
    ) -> (Tensor<'a>, SwiGluSaved<'a>) {
        let kept = |map: &AdaptedLinear<'a>| {
            let (y, saved) = map.forward(arena, h, memo);
            (memo.node(|| y), saved)
        };
        let (gate, gate_saved) = kept(&self.gate); // [n_ff, T]
        let (up, up_saved) = kept(&self.up); // [n_ff, T]
        let (out, down_saved) =
            self.down.forward(arena, ops::glu(arena, gate, up, Activation::Silu), memo);
        (out, SwiGluSaved { linear: [gate_saved, up_saved, down_saved], gate, up })
    }

    /// dh from dF. The caller's residual needs it in any case.
    pub fn vjp(
        &self,
        arena: &'a Arena,
        graph: &mut Graph<'a>,
        saved: &SwiGluSaved<'a>,
        d_out: Tensor<'a>,
    ) -> Tensor<'a> {
        let [gate_saved, up_saved, down_saved] = saved.linear;
        let d_inner = self.down.vjp(arena, graph, down_saved, d_out, None, true);
        let d_inner = d_inner.expect("asked for"); // [n_ff, T]
        let (d_gate, d_up) = ops::glu_back(arena, saved.gate, saved.up, d_inner, Activation::Silu);
        let dh = self.gate.vjp(arena, graph, gate_saved, d_gate, None, true);
        self.up.vjp(arena, graph, up_saved, d_up, dh, true).expect("asked for")
    }
}
