//! The gated delta rule over packed segments with shared prefixes, forward and vjp, in chunks.
//!
//! Value head h reads key head `h mod n_k`. From rows q, k, v, a, b of a token (`|x|^2 = sum x^2`, d the size of a head):
//!
//! ```text
//! q' = q / sqrt(d (|q|^2 + eps))     k' = k / sqrt(|k|^2 + eps)     beta = sigmoid(b)     g = A softplus(a + c)
//! S_t = e^(g_t) S_(t-1) + k'_t u_t^T        u_t = beta_t (v_t - e^(g_t) S_(t-1)^T k'_t)        o_t = S_t^T q'_t
//! ```
//!
//! The state S `[d, d]` is 0 before a sequence's first token; completions go on from their prompt's. Within a chunk of
//! n tokens that finds the state S, with `G_t = g_1 + .. + g_t`, `e_ti = e^(G_t - G_i)`, rows of K, Q, V, O, U:
//!
//! ```text
//! A_ti = e_ti k'_t . k'_i  (i < t)          M_ti = e_ti q'_t . k'_i  (i <= t)
//! Z = V - diag(e^G) K S - A U               U = diag(beta) Z
//! O = diag(e^G) Q S + M U                   S_after = e^(G_n) S + (diag(e_n) K)^T U
//! ```
//!
//! where Z is found from its first row on (A is strictly lower triangular). With D the cotangent of U, dS that of S_after:
//!
//! ```text
//! D = M^T dO + diag(e_n) K dS - A^T dZ      dZ = diag(beta) D      from the last row on
//! dV = dZ     dbeta_t = D_t . Z_t     dA = -dZ U^T     dM = dO U^T
//! dQ = diag(e^G) dO S^T + (dM e) K
//! dK = (dA e) K + (dA e)^T K + (dM e)^T Q - diag(e^G) dZ S^T + diag(e_n) U dS^T
//! dS_before = e^(G_n) dS + (diag(e^G) Q)^T dO - (diag(e^G) K)^T dZ
//! dG_t = row sums - column sums of (dA A + dM M), + q'_t . (diag(e^G) dO S^T)_t - k'_t . (diag(e^G) dZ S^T)_t
//!        - k'_t . (diag(e_n) U dS^T)_t;  and at t = n  + e^(G_n) dS . S + the sum of the last term
//! dg_t = dG_t + .. + dG_n      da = dg A sigmoid(a + c)      db = dbeta beta (1 - beta)
//! ```
//!
//! All are matrix products but A's two triangular systems, which are products off the diagonal blocks. States are kept
//! between chunks, so memory is O(tokens). Sums of g are taken in f64: their differences are what counts.
//! Source: Yang et al., "Gated Delta Networks" (2024), the rule and its chunked form; the way back is derived here.
//! Threads share out key heads of a tree of a prompt and its completions.

mod backward;
mod chunks;
mod forward;
mod work;

use ggml_sys as sys;

use super::queue::Queue;
use super::segments::{Segment, check_segments};
use crate::ggml::{Arena, Tensor, Type};
pub use chunks::delta_flop;
use chunks::{Chunk, chunks};

/// Heads of the gated delta rule.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct DeltaSpec {
    /// Heads of q, and of k.
    pub n_k: usize,
    /// Heads of v; a multiple of `n_k`.
    pub n_v: usize,
    /// Size d of a head.
    pub size: usize,
    /// Added to the squared lengths of q and k.
    pub eps: f32,
    /// Whether the value heads of one key head stand together: value head h reads key head `h / (n_v / n_k)`, not
    /// `h mod n_k`.
    pub grouped: bool,
}

impl DeltaSpec {
    /// Width of the rows q, k, v, one after another.
    pub fn width(&self) -> usize {
        (2 * self.n_k + self.n_v) * self.size
    }

    /// Width of the result.
    pub fn out_width(&self) -> usize {
        self.n_v * self.size
    }
}

/// What goes in.
#[derive(Clone, Copy)]
pub struct DeltaInputs<'a> {
    /// q, k and v heads: `[(2 n_k + n_v) d, T]`.
    pub qkv: Tensor<'a>,
    /// a: `[n_v, T]`.
    pub alpha: Tensor<'a>,
    /// b: `[n_v, T]`.
    pub beta: Tensor<'a>,
    /// A, below 0: `[n_v]`.
    pub decay: Tensor<'a>,
    /// c: `[n_v]`.
    pub bias: Tensor<'a>,
}

/// What the vjp needs of the forward.
#[derive(Clone)]
pub struct DeltaSaved<'a> {
    inputs: DeltaInputs<'a>,
    whole: Tensor<'a>,
    spec: DeltaSpec,
    segments: Vec<Segment>,
}

#[repr(C)]
struct Params {
    c: sys::bupo_delta_params,
    segments: Vec<Segment>,
    trees: Vec<Vec<Chunk>>,
    units: Queue,
}

fn params(op: u32, spec: DeltaSpec, segments: &[Segment]) -> (Params, usize) {
    let segments = segments.to_vec();
    let (trees, states) = chunks(&segments);
    let c = sys::bupo_delta_params {
        op,
        n_k: spec.n_k as u32,
        n_v: spec.n_v as u32,
        size: spec.size as u32,
        eps: spec.eps,
        grouped: spec.grouped as u32,
        n_segments: segments.len() as u32,
        segments: segments.as_ptr(),
    };
    (Params { c, segments, trees, units: Queue::default() }, states)
}

fn check(inputs: &DeltaInputs<'_>, spec: DeltaSpec, segments: &[Segment]) {
    let t = inputs.qkv.shape()[1];
    assert!(spec.n_k > 0 && spec.n_v.is_multiple_of(spec.n_k) && spec.size > 0, "{spec:?}");
    let shapes = [[spec.width(), t], [spec.n_v, t], [spec.n_v, t], [spec.n_v, 1], [spec.n_v, 1]];
    for (x, [width, n]) in inputs.sources().into_iter().zip(shapes) {
        assert!(x.ty() == Type::F32 && x.is_contiguous(), "delta rule of {x:?}");
        assert_eq!(x.shape(), [width, n, 1, 1], "delta rule of {x:?}");
    }
    check_segments(segments, t);
}

impl<'a> DeltaInputs<'a> {
    fn sources(&self) -> [Tensor<'a>; 5] {
        [self.qkv, self.alpha, self.beta, self.decay, self.bias]
    }
}

/// `o: [n_v d, T]`; all F32, contiguous; `segments` as for [`super::attention`].
pub fn delta<'a>(
    arena: &'a Arena,
    inputs: DeltaInputs<'a>,
    segments: &[Segment],
    spec: DeltaSpec,
) -> (Tensor<'a>, DeltaSaved<'a>) {
    check(&inputs, spec, segments);
    let (params, states) = params(sys::BUPO_OP_DELTA, spec, segments);
    let t = inputs.qkv.shape()[1];
    // One result: o [n_v d, T], then the states between chunks, [d, d, n_v] each.
    let len = spec.out_width() * (t + states * spec.size);
    let whole = arena.custom([len, 1, 1, 1], &inputs.sources(), forward::kernel, params);
    delta_kept(arena, whole, inputs, segments, spec)
}

/// What [`delta`] gives, from its result as a whole ([`DeltaSaved::whole`]) computed before.
pub fn delta_kept<'a>(
    arena: &'a Arena,
    whole: Tensor<'a>,
    inputs: DeltaInputs<'a>,
    segments: &[Segment],
    spec: DeltaSpec,
) -> (Tensor<'a>, DeltaSaved<'a>) {
    let out = arena.part(whole, 0, [spec.out_width(), inputs.qkv.shape()[1]]);
    (out, DeltaSaved { inputs, whole, spec, segments: segments.to_vec() })
}

impl<'a> DeltaSaved<'a> {
    /// The forward's result as a whole, for [`delta_kept`].
    pub fn whole(&self) -> Tensor<'a> {
        self.whole
    }
}

/// Cotangents of qkv, alpha and beta from that of the result, `d_out: [n_v d, T]`.
pub fn delta_back<'a>(
    arena: &'a Arena,
    saved: &DeltaSaved<'a>,
    d_out: Tensor<'a>,
) -> [Tensor<'a>; 3] {
    let (spec, t) = (saved.spec, saved.inputs.qkv.shape()[1]);
    assert!(d_out.ty() == Type::F32 && d_out.is_contiguous(), "delta_back of {d_out:?}");
    assert_eq!(d_out.shape(), [spec.out_width(), t, 1, 1], "delta_back of {d_out:?}");
    let (params, _) = params(sys::BUPO_OP_DELTA_BACK, spec, &saved.segments);
    let mut sources = saved.inputs.sources().to_vec();
    sources.extend([saved.whole, d_out]);
    // One result: d qkv, then d alpha, then d beta.
    let (width, n_v) = (spec.width(), spec.n_v);
    let all = arena.custom([(width + 2 * n_v) * t, 1, 1, 1], &sources, backward::kernel, params);
    [
        arena.part(all, 0, [width, t]),
        arena.part(all, width * t, [n_v, t]),
        arena.part(all, (width + n_v) * t, [n_v, t]),
    ]
}
