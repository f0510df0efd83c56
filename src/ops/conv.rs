//! Causal depthwise convolution over packed segments with shared prefixes, SiLU after it, forward and vjp.
//!
//! With `x_(t-j)` the token j places before t in its own sequence (through the segment's begin into its prefix), 0
//! before the sequence's first:
//!
//! ```text
//! s_t[c] = sum_{j<K} w[K-1-j][c] x_(t-j)[c]            y_t[c] = s_t[c] sigmoid(s_t[c])
//! ds_t = dy_t sigmoid(s_t) (1 + s_t (1 - sigmoid(s_t)))
//! dx_t[c] = sum over the tokens u that lie j < K places behind t in a sequence of  w[K-1-j][c] ds_u[c]
//! ```
//!
//! The last tokens of a prompt are read by the first of each of its completions, and their cotangents are the sum.
//! Source: Yang et al., "Gated Delta Networks" (2024), section 3.4, and the graph of llama.cpp's architecture qwen35.
//! Threads share out blocks of channels of a tree of a prompt and its completions.

use std::ffi::{c_int, c_void};

use ggml_sys as sys;

use super::exp::exp;
use super::queue::Queue;
use super::segments::{Segment, check_segments, trees};
use crate::ggml::{Arena, Tensor, Type};

/// Tokens that a convolution looks at, at most.
pub const MAX_CONV: usize = sys::BUPO_MAX_CONV as usize;
/// Channels that are worked on together.
const CHANNELS: usize = 64;

#[repr(C)]
struct Params {
    c: sys::bupo_conv_params,
    segments: Vec<Segment>,
    units: Queue,
}

fn params(op: u32, segments: &[Segment]) -> Params {
    let segments = segments.to_vec();
    let (n_segments, data) = (segments.len() as u32, segments.as_ptr());
    let c = sys::bupo_conv_params { op, n_segments, segments: data };
    Params { c, segments, units: Queue::default() }
}

fn check(x: Tensor<'_>, weight: Tensor<'_>, segments: &[Segment]) {
    let [channels, t, ..] = x.shape();
    let [k, ..] = weight.shape();
    assert!(x.ty() == Type::F32 && x.is_contiguous(), "convolution of {x:?}");
    assert!(weight.ty() == Type::F32 && weight.is_contiguous(), "convolution by {weight:?}");
    assert_eq!(weight.shape(), [k, channels, 1, 1], "convolution of {x:?} by {weight:?}");
    assert!((1..=MAX_CONV).contains(&k), "convolution by {weight:?}");
    check_segments(segments, t);
}

/// `y: [C, T]` from `x: [C, T]` and `weight: [K, C]`, F32, contiguous, K at most [`MAX_CONV`]; `segments` as for
/// [`super::attention`].
pub fn conv_silu<'a>(
    arena: &'a Arena,
    x: Tensor<'a>,
    weight: Tensor<'a>,
    segments: &[Segment],
) -> Tensor<'a> {
    check(x, weight, segments);
    arena.custom(x.shape(), &[x, weight], forward, params(sys::BUPO_OP_CONV, segments))
}

/// Cotangent of `x` from `dy`, both `[C, T]`, F32, contiguous.
pub fn conv_silu_back<'a>(
    arena: &'a Arena,
    x: Tensor<'a>,
    weight: Tensor<'a>,
    dy: Tensor<'a>,
    segments: &[Segment],
) -> Tensor<'a> {
    check(x, weight, segments);
    assert!(dy.ty() == Type::F32 && dy.is_contiguous(), "convolution back of {dy:?}");
    assert_eq!(dy.shape(), x.shape(), "convolution back of {dy:?}");
    let op = params(sys::BUPO_OP_CONV_BACK, segments);
    arena.custom(x.shape(), &[x, weight, dy], backward, op)
}

/// The token `back` places before `t` in its sequence, if there is one.
fn before(s: &Segment, t: usize, back: usize) -> Option<usize> {
    let own = t - s.begin as usize;
    if back <= own {
        return Some(t - back);
    }
    let into = back - own;
    (into <= (s.prefix_end - s.prefix_begin) as usize).then(|| s.prefix_end as usize - into)
}

/// A block of channels of all tokens, and the weights of these: `w[j]` that of the token j places before.
struct Block {
    first: usize,
    n: usize,
    width: usize,
    w: [[f32; CHANNELS]; MAX_CONV],
    k: usize,
}

impl Block {
    /// # Safety
    /// `dst` is a node of this file, and the block begins within its channels.
    unsafe fn new(dst: *mut sys::ggml_tensor, first: usize) -> Block {
        // SAFETY: by contract: the weight [K, C] is source 1.
        unsafe {
            let width = (*dst).ne[0] as usize;
            let weight = (*dst).src[1];
            let (k, data) = ((*weight).ne[0] as usize, (*weight).data.cast::<f32>());
            let n = CHANNELS.min(width - first);
            let mut w = [[0.0; CHANNELS]; MAX_CONV];
            for (back, w) in w.iter_mut().enumerate().take(k) {
                for (c, w) in w.iter_mut().enumerate().take(n) {
                    *w = *data.add((first + c) * k + (k - 1 - back));
                }
            }
            Block { first, n, width, w, k }
        }
    }

    /// # Safety
    /// The token lies within the tensor, which has the block's channels and lives for `'k`.
    unsafe fn row<'k>(&self, data: *const f32, token: usize) -> &'k [f32] {
        // SAFETY: by contract.
        unsafe { std::slice::from_raw_parts(data.add(token * self.width + self.first), self.n) }
    }

    /// # Safety
    /// As [`Block::row`], and nobody else has this row.
    unsafe fn row_mut<'k>(&self, data: *mut f32, token: usize) -> &'k mut [f32] {
        // SAFETY: by contract.
        unsafe { std::slice::from_raw_parts_mut(data.add(token * self.width + self.first), self.n) }
    }

    /// s_t.
    ///
    /// # Safety
    /// `x` is the source, and the token lies within the segment.
    unsafe fn sum(&self, x: *const f32, s: &Segment, token: usize) -> [f32; CHANNELS] {
        let mut sum = [0.0; CHANNELS];
        for back in (0..self.k).rev() {
            let Some(source) = before(s, token, back) else { continue };
            // SAFETY: by contract.
            let x = unsafe { self.row(x, source) };
            for ((sum, x), w) in sum.iter_mut().zip(x).zip(&self.w[back]) {
                *sum += w * x;
            }
        }
        sum
    }
}

/// Calls `work` with every block of channels of every tree.
///
/// # Safety
/// `dst` is a node of this file, `userdata` its parameters.
unsafe fn each_block(
    dst: *mut sys::ggml_tensor,
    nth: c_int,
    userdata: *mut c_void,
    mut work: impl FnMut(&[Segment], &Block),
) {
    // SAFETY: by contract.
    let (params, width) = unsafe { (&*userdata.cast::<Params>(), (*dst).ne[0] as usize) };
    let trees: Vec<&[Segment]> = trees(&params.segments).collect();
    let blocks = width.div_ceil(CHANNELS);
    params.units.each(trees.len() * blocks, nth, |unit| {
        // SAFETY: by contract; the block begins within the channels.
        let block = unsafe { Block::new(dst, unit % blocks * CHANNELS) };
        work(trees[unit / blocks], &block);
    });
}

unsafe extern "C" fn forward(
    dst: *mut sys::ggml_tensor,
    _ith: c_int,
    nth: c_int,
    userdata: *mut c_void,
) {
    // SAFETY: `conv_silu` made this node: x and dst [C, T]; no two units share channels of a token.
    unsafe {
        let (x, y) = ((*(*dst).src[0]).data.cast::<f32>(), (*dst).data.cast::<f32>());
        each_block(dst, nth, userdata, |tree, block| {
            for s in tree {
                for token in s.begin as usize..s.end as usize {
                    let sum = block.sum(x, s, token);
                    for (y, s) in block.row_mut(y, token).iter_mut().zip(sum) {
                        *y = s / (1.0 + exp(-s));
                    }
                }
            }
        });
    }
}

unsafe extern "C" fn backward(
    dst: *mut sys::ggml_tensor,
    _ith: c_int,
    nth: c_int,
    userdata: *mut c_void,
) {
    // SAFETY: `conv_silu_back` made this node: x, dy and dst [C, T]; a token's cotangents come from its own tree alone.
    unsafe {
        let source = |i: usize| (*(*dst).src[i]).data.cast::<f32>();
        let (x, dy, dx) = (source(0), source(2), (*dst).data.cast::<f32>());
        each_block(dst, nth, userdata, |tree, block| {
            let tokens = tree[0].begin as usize..tree[tree.len() - 1].end as usize;
            tokens.for_each(|token| block.row_mut(dx, token).fill(0.0));
            for s in tree {
                for token in s.begin as usize..s.end as usize {
                    let mut ds = block.sum(x, s, token);
                    for (s, dy) in ds.iter_mut().zip(block.row(dy, token)) {
                        let sigmoid = 1.0 / (1.0 + exp(-*s));
                        *s = dy * sigmoid * (1.0 + *s * (1.0 - sigmoid));
                    }
                    for back in 0..block.k {
                        let Some(source) = before(s, token, back) else { break };
                        let w = &block.w[back];
                        for ((dx, ds), w) in block.row_mut(dx, source).iter_mut().zip(ds).zip(w) {
                            *dx += w * ds;
                        }
                    }
                }
            }
        });
    }
}
