//! Causal attention over packed segments with shared prefixes, forward and vjp, memory O(tokens).
//!
//! Token t of a segment `[begin, end)` sees its prefix `[prefix_begin, prefix_end)` in full and
//! `[begin, t]` of its own; with a window w only the last w of these. (Positions count from 0 in a prefix and
//! go on in the segments after it, so that w ends within the prefix for the first tokens of a completion.)
//! With `x_ij = scale q_i . k_j`, `s_ij = x_ij` or, with a softcap c, `s_ij = c tanh(x_ij / c)`, and
//! `p_ij = e^(s_ij - lse_i)`:
//!
//! ```text
//! o_i = sum_j p_ij v_j                       lse_i = log sum_j e^(s_ij)
//! dv_j = sum_i p_ij do_i                     D_i = do_i . o_i
//! ds_ij = p_ij (do_i . v_j - D_i)            dx_ij = ds_ij, or ds_ij (1 - tanh^2(x_ij / c))
//! dq_i = scale sum_j dx_ij k_j               dk_j = scale sum_i dx_ij q_i
//! ```
//!
//! A head may have a sink, a score z of its own that takes probability and gives no value: `lse_i = log(e^z + sum_j
//! e^(s_ij))`. All else stays as it is, in the vjp too, for what it would add to D_i is 0.
//!
//! Keys before the window of all queries of a tile are not looked at: time goes with tokens x window.
//! Scores exist for one tile of queries by keys at a time (flash attention: running maximum and sum
//! forward, probabilities again from lse backward). Grouped queries: head h reads key/value head
//! `h / (n_head / n_head_kv)`, and a tile holds the queries of all heads of a group. Threads take from a
//! queue: forward, a query tile of a key/value head; backward, a key/value head of a tree of a prompt and
//! its completions, so that nobody writes what another writes.

mod backward;
mod forward;
mod tiles;

use ggml_sys as sys;

use super::logits::softcap_param;
use super::queue::Queue;
use super::segments::{Segment, check_segments};
use crate::ggml::{Arena, Tensor, Type};

/// Heads, and what is done with their scores.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AttentionSpec {
    /// Query heads.
    pub n_head: usize,
    /// Key/value heads; divides `n_head`.
    pub n_head_kv: usize,
    /// Size of a head.
    pub head_size: usize,
    /// Usually 1/sqrt(head size).
    pub scale: f32,
    /// w, at least 1: key j is seen from query i if `0 <= i - j < w`, in positions of the sequence.
    pub window: Option<usize>,
    /// c, above 0: scores become `c tanh(score / c)`.
    pub softcap: Option<f32>,
}

/// What the vjp needs of the forward.
#[derive(Clone)]
pub struct AttentionSaved<'a> {
    q: Tensor<'a>,
    k: Tensor<'a>,
    v: Tensor<'a>,
    whole: Tensor<'a>,
    out: Tensor<'a>,
    lse: Tensor<'a>,
    spec: AttentionSpec,
    segments: Vec<Segment>,
}

#[repr(C)]
struct Params {
    c: sys::bupo_attention_params,
    segments: Vec<Segment>,
    units: Queue,
}

fn params(op: u32, spec: AttentionSpec, segments: &[Segment], sinks: bool) -> Params {
    let segments = segments.to_vec();
    // A window of more positions than there are is none.
    let window = spec.window.map_or(0, |w| u32::try_from(w).unwrap_or(0));
    Params {
        c: sys::bupo_attention_params {
            op,
            scale: spec.scale,
            softcap: softcap_param(spec.softcap),
            window,
            n_head: spec.n_head as u32,
            n_head_kv: spec.n_head_kv as u32,
            head_size: spec.head_size as u32,
            sinks: sinks as u32,
            n_segments: segments.len() as u32,
            segments: segments.as_ptr(),
        },
        segments,
        units: Queue::default(),
    }
}

/// `o: [hd * n_head, T]` from `q: [hd * n_head, T]`, `k, v: [hd * n_head_kv, T]` and `sinks: [n_head]`, F32, contiguous.
///
/// `segments` cover `[0, T)` in order without gaps; a prefix is the last segment before that has none:
/// completions follow their prompt, since the threads of the vjp share out such trees.
pub fn attention<'a>(
    arena: &'a Arena,
    q: Tensor<'a>,
    k: Tensor<'a>,
    v: Tensor<'a>,
    sinks: Option<Tensor<'a>>,
    segments: &[Segment],
    spec: AttentionSpec,
) -> (Tensor<'a>, AttentionSaved<'a>) {
    let t = q.shape()[1];
    check_inputs(q, k, v, spec);
    check_segments(segments, t);
    let op = params(sys::BUPO_OP_ATTENTION, spec, segments, sinks.is_some());
    // One result: [hd * n_head, T], then lse [n_head, T].
    let len = spec.n_head * (spec.head_size + 1) * t;
    let mut sources = vec![q, k, v];
    if let Some(sinks) = sinks {
        assert!(sinks.ty() == Type::F32 && sinks.is_contiguous(), "attention with {sinks:?}");
        assert_eq!(sinks.shape(), [spec.n_head, 1, 1, 1], "attention with {sinks:?}");
        sources.push(sinks);
    }
    let all = arena.custom([len, 1, 1, 1], &sources, forward::kernel, op);
    attention_kept(arena, all, q, k, v, segments, spec)
}

/// What [`attention`] gives, from its result as a whole ([`AttentionSaved::whole`]) computed before.
pub fn attention_kept<'a>(
    arena: &'a Arena,
    whole: Tensor<'a>,
    q: Tensor<'a>,
    k: Tensor<'a>,
    v: Tensor<'a>,
    segments: &[Segment],
    spec: AttentionSpec,
) -> (Tensor<'a>, AttentionSaved<'a>) {
    let [q_width, t, ..] = q.shape();
    let out = arena.part(whole, 0, [q_width, t]);
    let lse = arena.part(whole, q_width * t, [spec.n_head, t]);
    (out, AttentionSaved { q, k, v, whole, out, lse, spec, segments: segments.to_vec() })
}

fn check_inputs(q: Tensor<'_>, k: Tensor<'_>, v: Tensor<'_>, spec: AttentionSpec) {
    let t = q.shape()[1];
    let (q_width, kv_width) = (spec.head_size * spec.n_head, spec.head_size * spec.n_head_kv);
    for (x, width) in [(q, q_width), (k, kv_width), (v, kv_width)] {
        assert!(x.ty() == Type::F32 && x.is_contiguous(), "attention of {x:?}");
        assert_eq!(x.shape(), [width, t, 1, 1], "attention of {x:?}");
    }
    assert!(spec.n_head_kv > 0 && spec.n_head.is_multiple_of(spec.n_head_kv), "{spec:?}");
    assert!(spec.window != Some(0), "a token sees itself at least: {spec:?}");
}

impl<'a> AttentionSaved<'a> {
    /// The forward's result as a whole, for [`attention_kept`].
    pub fn whole(&self) -> Tensor<'a> {
        self.whole
    }
}

/// Cotangents of q, k and v from that of the result, `d_out: [hd * n_head, T]`.
pub fn attention_back<'a>(
    arena: &'a Arena,
    saved: &AttentionSaved<'a>,
    d_out: Tensor<'a>,
) -> [Tensor<'a>; 3] {
    let [q_width, t, ..] = saved.q.shape();
    let kv_width = saved.k.shape()[0];
    assert!(d_out.ty() == Type::F32 && d_out.is_contiguous(), "attention_back of {d_out:?}");
    assert_eq!(d_out.shape(), saved.q.shape(), "attention_back of {d_out:?}");
    let op = params(sys::BUPO_OP_ATTENTION_BACK, saved.spec, &saved.segments, false);
    let sources = [saved.q, saved.k, saved.v, saved.out, saved.lse, d_out];
    // One result: dq, then dk, then dv.
    let all = arena.custom([(q_width + 2 * kv_width) * t, 1, 1, 1], &sources, backward::kernel, op);
    [
        arena.part(all, 0, [q_width, t]),
        arena.part(all, q_width * t, [kv_width, t]),
        arena.part(all, (q_width + kv_width) * t, [kv_width, t]),
    ]
}
