//! Causal attention over packed segments with shared prefixes, forward and vjp, memory O(tokens).
//!
//! Token t of a segment `[begin, end)` sees its prefix `[prefix_begin, prefix_end)` in full and
//! `[begin, t]` of its own. With `s_ij = scale q_i . k_j`, `p_ij = e^(s_ij - lse_i)`:
//!
//! ```text
//! o_i = sum_j p_ij v_j                       lse_i = log sum_j e^(s_ij)
//! dv_j = sum_i p_ij do_i                     D_i = do_i . o_i
//! ds_ij = p_ij (do_i . v_j - D_i)            dq_i = scale sum_j ds_ij k_j,  dk_j = scale sum_i ds_ij q_i
//! ```
//!
//! Scores exist for one tile of queries by keys at a time (flash attention: running maximum and sum
//! forward, probabilities again from lse backward). Grouped queries: head h reads key/value head
//! `h / (n_head / n_head_kv)`. Forward, threads share out (key/value head, query tile); backward,
//! (key/value head, tree of a prompt and its completions), so that nobody writes what another writes.

use std::ffi::{c_int, c_void};
use std::ops::Range;

use ggml_sys as sys;
pub use sys::bupo_segment as Segment;

use super::exp::exp;
use super::gemm::{Matrix, gemm, with_scratch};
use super::rows::dot;
use crate::ggml::{Arena, Tensor, Type};

const QUERY_TILE: usize = 64;
const KEY_TILE: usize = 128;

/// Heads and the scale of scores.
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
}

/// What the vjp needs of the forward.
#[derive(Clone)]
pub struct AttentionSaved<'a> {
    q: Tensor<'a>,
    k: Tensor<'a>,
    v: Tensor<'a>,
    out: Tensor<'a>,
    lse: Tensor<'a>,
    spec: AttentionSpec,
    segments: Vec<Segment>,
}

#[repr(C)]
struct Params {
    c: sys::bupo_attention_params,
    segments: Vec<Segment>,
}

fn params(op: u32, spec: AttentionSpec, segments: &[Segment]) -> Params {
    let segments = segments.to_vec();
    Params {
        c: sys::bupo_attention_params {
            op,
            scale: spec.scale,
            n_head: spec.n_head as u32,
            n_head_kv: spec.n_head_kv as u32,
            head_size: spec.head_size as u32,
            n_segments: segments.len() as u32,
            segments: segments.as_ptr(),
        },
        segments,
    }
}

/// `o: [hd * n_head, T]` from `q: [hd * n_head, T]` and `k, v: [hd * n_head_kv, T]`, F32, contiguous.
///
/// `segments` cover `[0, T)` in order without gaps; a prefix is the last segment before that has none:
/// completions follow their prompt, since the threads of the vjp share out such trees.
pub fn attention<'a>(
    arena: &'a Arena,
    q: Tensor<'a>,
    k: Tensor<'a>,
    v: Tensor<'a>,
    segments: &[Segment],
    spec: AttentionSpec,
) -> (Tensor<'a>, AttentionSaved<'a>) {
    let t = q.shape()[1];
    let (q_width, kv_width) = (spec.head_size * spec.n_head, spec.head_size * spec.n_head_kv);
    for (x, width) in [(q, q_width), (k, kv_width), (v, kv_width)] {
        assert!(x.ty() == Type::F32 && x.is_contiguous(), "attention of {x:?}");
        assert_eq!(x.shape(), [width, t, 1, 1], "attention of {x:?}");
    }
    assert!(spec.n_head_kv > 0 && spec.n_head.is_multiple_of(spec.n_head_kv), "{spec:?}");
    check_segments(segments, t);
    let op = params(sys::BUPO_OP_ATTENTION, spec, segments);
    // One result: [hd * n_head, T], then lse [n_head, T].
    let all = arena.custom([(q_width + spec.n_head) * t, 1, 1, 1], &[q, k, v], forward, op);
    let out = arena.part(all, 0, [q_width, t]);
    let lse = arena.part(all, q_width * t, [spec.n_head, t]);
    (out, AttentionSaved { q, k, v, out, lse, spec, segments: segments.to_vec() })
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
    let op = params(sys::BUPO_OP_ATTENTION_BACK, saved.spec, &saved.segments);
    let sources = [saved.q, saved.k, saved.v, saved.out, saved.lse, d_out];
    // One result: dq, then dk, then dv.
    let all = arena.custom([(q_width + 2 * kv_width) * t, 1, 1, 1], &sources, backward, op);
    [
        arena.part(all, 0, [q_width, t]),
        arena.part(all, q_width * t, [kv_width, t]),
        arena.part(all, (q_width + kv_width) * t, [kv_width, t]),
    ]
}

fn check_segments(segments: &[Segment], t: usize) {
    let (mut next, mut root) = (0, None);
    for (i, s) in segments.iter().enumerate() {
        assert!(s.begin == next && s.end > s.begin, "segment {i}: {s:?}");
        next = s.end;
        if s.prefix_begin == s.prefix_end {
            root = Some((s.begin, s.end));
        } else {
            assert_eq!(Some((s.prefix_begin, s.prefix_end)), root, "prefix of segment {i}: {s:?}");
        }
    }
    assert_eq!(next as usize, t, "segments cover all tokens");
}

/// Heads of one tensor: head `h` of token `t` at `data + t * width + h * size`.
#[derive(Clone, Copy)]
struct HeadView<T> {
    data: T,
    width: usize,
    size: usize,
}

impl HeadView<*const f32> {
    unsafe fn at(&self, token: usize, head: usize) -> *const f32 {
        // SAFETY: the callers stay within the tensor.
        unsafe { self.data.add(token * self.width + head * self.size) }
    }

    unsafe fn row(&self, token: usize, head: usize) -> &[f32] {
        // SAFETY: as above.
        unsafe { std::slice::from_raw_parts(self.at(token, head), self.size) }
    }
}

impl HeadView<*mut f32> {
    unsafe fn at(&self, token: usize, head: usize) -> *mut f32 {
        // SAFETY: the callers stay within the tensor.
        unsafe { self.data.add(token * self.width + head * self.size) }
    }
}

/// What both kernels read.
struct Job<'k> {
    segments: &'k [Segment],
    scale: f32,
    n_head: usize,
    n_head_kv: usize,
    size: usize,
    t: usize,
    q: HeadView<*const f32>,
    k: HeadView<*const f32>,
    v: HeadView<*const f32>,
}

impl<'k> Job<'k> {
    /// # Safety
    /// `dst` is a node of `attention` or `attention_back`, `userdata` its parameters.
    unsafe fn new(dst: *mut sys::ggml_tensor, userdata: *mut c_void) -> Job<'k> {
        // SAFETY: by contract: q, k, v are sources 0 to 2, F32 contiguous of the checked shapes.
        unsafe {
            let params = &*userdata.cast::<Params>();
            let src = &(*dst).src;
            let size = params.c.head_size as usize;
            let view = |i: usize| HeadView {
                data: (*src[i]).data as *const f32,
                width: (*src[i]).ne[0] as usize,
                size,
            };
            Job {
                segments: &params.segments,
                scale: params.c.scale,
                n_head: params.c.n_head as usize,
                n_head_kv: params.c.n_head_kv as usize,
                size,
                t: (*src[0]).ne[1] as usize,
                q: view(0),
                k: view(1),
                v: view(2),
            }
        }
    }

    fn heads_of(&self, kv: usize) -> Range<usize> {
        let group = self.n_head / self.n_head_kv;
        kv * group..(kv + 1) * group
    }

    /// Tiles of keys that queries `[first, last)` of a segment see, with whether they are its own
    /// (so that the causal mask applies).
    fn key_tiles(s: &Segment, last: usize) -> impl Iterator<Item = (Range<usize>, bool)> {
        let tiles = |all: Range<usize>, own: bool| {
            all.clone().step_by(KEY_TILE).map(move |j| (j..(j + KEY_TILE).min(all.end), own))
        };
        tiles(s.prefix_begin as usize..s.prefix_end as usize, false)
            .chain(tiles(s.begin as usize..last, true))
    }

    fn query_tiles(s: &Segment) -> impl Iterator<Item = Range<usize>> {
        let all = s.begin as usize..s.end as usize;
        all.clone().step_by(QUERY_TILE).map(move |i| i..(i + QUERY_TILE).min(all.end))
    }

    /// Scores `(j, i)` of a key tile and a query tile into `scores`, keys contiguous.
    unsafe fn scores(
        &self,
        kv: usize,
        h: usize,
        keys: &Range<usize>,
        queries: &Range<usize>,
        scores: &mut [f32],
    ) {
        // SAFETY: the ranges lie within the tensors, `scores` has room.
        unsafe {
            let k = Matrix::new(self.k.at(keys.start, kv), self.k.width, 1); // (j, d)
            let q = Matrix::new(self.q.at(queries.start, h), 1, self.q.width); // (d, i)
            let s = Matrix::new(scores.as_mut_ptr(), 1, keys.len()); // (j, i)
            gemm([keys.len(), queries.len(), self.size], s, false, k, q, self.scale);
        }
    }
}

/// Keys of a tile that query `i` sees.
fn seen(keys: &Range<usize>, own: bool, i: usize) -> usize {
    if own { (i + 1).saturating_sub(keys.start).min(keys.len()) } else { keys.len() }
}

unsafe extern "C" fn forward(
    dst: *mut sys::ggml_tensor,
    ith: c_int,
    nth: c_int,
    userdata: *mut c_void,
) {
    // SAFETY: `attention` made this node.
    let job = unsafe { Job::new(dst, userdata) };
    // SAFETY: dst holds the heads of all tokens, then lse [n_head, T].
    let (out, lse) = unsafe {
        let data: *mut f32 = (*dst).data.cast();
        let out = HeadView { data, width: job.size * job.n_head, size: job.size };
        (out, data.add(job.size * job.n_head * job.t))
    };
    let mut unit = 0;
    for s in job.segments {
        for queries in Job::query_tiles(s) {
            for kv in 0..job.n_head_kv {
                let mine = unit % nth as usize == ith as usize;
                unit += 1;
                if mine {
                    for h in job.heads_of(kv) {
                        // SAFETY: tile and heads lie within the tensors; no other thread has this unit.
                        unsafe { forward_tile(&job, s, &queries, kv, h, out, lse) };
                    }
                }
            }
        }
    }
}

unsafe fn forward_tile(
    job: &Job<'_>,
    s: &Segment,
    queries: &Range<usize>,
    kv: usize,
    h: usize,
    out: HeadView<*mut f32>,
    lse: *mut f32,
) {
    let (n, size) = (queries.len(), job.size);
    // SAFETY: the tiles lie within the tensors, by the segments that were checked.
    with_scratch(KEY_TILE * n + size * n, |scratch| unsafe {
        let (p, o) = scratch.split_at_mut(KEY_TILE * n);
        o.fill(0.0);
        let (mut max, mut sum) = ([f32::NEG_INFINITY; QUERY_TILE], [0f32; QUERY_TILE]);
        for (keys, own) in Job::key_tiles(s, queries.end) {
            let width = keys.len();
            job.scores(kv, h, &keys, queries, p);
            for (i, column) in p.chunks_exact_mut(width).take(n).enumerate() {
                let (live, masked) = column.split_at_mut(seen(&keys, own, queries.start + i));
                masked.fill(0.0);
                let new = live.iter().copied().fold(max[i], f32::max);
                if new > max[i] {
                    let scale = exp(max[i] - new);
                    sum[i] *= scale;
                    o[i * size..][..size].iter_mut().for_each(|x| *x *= scale);
                    max[i] = new;
                }
                for x in live.iter_mut() {
                    *x = exp(*x - new);
                }
                sum[i] += live.iter().sum::<f32>();
            }
            let v = Matrix::new(job.v.at(keys.start, kv), 1, job.v.width); // (d, j)
            let p = Matrix::new(p.as_ptr(), 1, width); // (j, i)
            gemm([size, n, width], Matrix::new(o.as_mut_ptr(), 1, size), true, v, p, 1.0);
        }
        for (i, token) in queries.clone().enumerate() {
            let row = std::slice::from_raw_parts_mut(out.at(token, h), size);
            for (y, o) in row.iter_mut().zip(&o[i * size..]) {
                *y = o / sum[i];
            }
            *lse.add(token * job.n_head + h) = max[i] + sum[i].ln();
        }
    });
}

unsafe extern "C" fn backward(
    dst: *mut sys::ggml_tensor,
    ith: c_int,
    nth: c_int,
    userdata: *mut c_void,
) {
    // SAFETY: `attention_back` made this node: after q, k, v come out, lse and d_out; dst holds dq, dk, dv.
    unsafe {
        let job = Job::new(dst, userdata);
        let (q_width, kv_width) = (job.q.width, job.k.width);
        let data: *mut f32 = (*dst).data.cast();
        let view = |skip, width| HeadView { data: data.add(skip), width, size: job.size };
        let source = |i: usize| (*(*dst).src[i]).data as *const f32;
        let heads = |i| HeadView { data: source(i), width: q_width, size: job.size };
        let back = Back {
            out: heads(3),
            lse: source(4),
            d_out: heads(5),
            dq: view(0, q_width),
            dk: view(q_width * job.t, kv_width),
            dv: view((q_width + kv_width) * job.t, kv_width),
            job,
        };
        let mut unit = 0;
        for tree in trees(back.job.segments) {
            for kv in 0..back.job.n_head_kv {
                if unit % nth as usize == ith as usize {
                    back.tree(tree, kv);
                }
                unit += 1;
            }
        }
    }
}

/// Runs of segments: one without prefix and those after it that build on it.
fn trees(segments: &[Segment]) -> impl Iterator<Item = &[Segment]> {
    segments.chunk_by(|_, next| next.prefix_begin != next.prefix_end)
}

struct Back<'k> {
    job: Job<'k>,
    out: HeadView<*const f32>,
    lse: *const f32,
    d_out: HeadView<*const f32>,
    dq: HeadView<*mut f32>,
    dk: HeadView<*mut f32>,
    dv: HeadView<*mut f32>,
}

impl Back<'_> {
    /// Everything of one key/value head in one tree.
    ///
    /// # Safety
    /// No other thread works on this head of this tree.
    unsafe fn tree(&self, tree: &[Segment], kv: usize) {
        let tokens = tree[0].begin as usize..tree[tree.len() - 1].end as usize;
        // SAFETY: tokens and heads lie within the tensors, and belong to this thread by contract.
        unsafe {
            for token in tokens {
                std::ptr::write_bytes(self.dk.at(token, kv), 0, self.job.size);
                std::ptr::write_bytes(self.dv.at(token, kv), 0, self.job.size);
                for h in self.job.heads_of(kv) {
                    std::ptr::write_bytes(self.dq.at(token, h), 0, self.job.size);
                }
            }
            for s in tree {
                for queries in Job::query_tiles(s) {
                    for h in self.job.heads_of(kv) {
                        self.tile(s, &queries, kv, h);
                    }
                }
            }
        }
    }

    unsafe fn tile(&self, s: &Segment, queries: &Range<usize>, kv: usize, h: usize) {
        let (job, n, size) = (&self.job, queries.len(), self.job.size);
        // SAFETY: as in `tree`.
        with_scratch(2 * KEY_TILE * n, |scratch| unsafe {
            let (p, dp) = scratch.split_at_mut(KEY_TILE * n);
            let mut d = [0f32; QUERY_TILE];
            for (i, token) in queries.clone().enumerate() {
                d[i] = dot(self.d_out.row(token, h), self.out.row(token, h));
            }
            let d_out = Matrix::new(self.d_out.at(queries.start, h), 1, self.d_out.width); // (d, i)
            for (keys, own) in Job::key_tiles(s, queries.end) {
                let width = keys.len();
                job.scores(kv, h, &keys, queries, p);
                let v = Matrix::new(job.v.at(keys.start, kv), job.v.width, 1); // (j, d)
                let dp_out = Matrix::new(dp.as_mut_ptr(), 1, width); // (j, i)
                gemm([width, n, size], dp_out, false, v, d_out, 1.0);
                let columns = p.chunks_exact_mut(width).zip(dp.chunks_exact_mut(width));
                for (i, (p, dp)) in columns.take(n).enumerate() {
                    let lse = *self.lse.add((queries.start + i) * job.n_head + h);
                    let live = seen(&keys, own, queries.start + i);
                    for (p, ds) in p[..live].iter_mut().zip(&mut dp[..live]) {
                        *p = exp(*p - lse);
                        *ds = *p * (*ds - d[i]);
                    }
                    p[live..].fill(0.0);
                    dp[live..].fill(0.0);
                }
                let p_t = Matrix::new(p.as_ptr(), width, 1); // (i, j)
                let ds = Matrix::new(dp.as_ptr(), 1, width); // (j, i)
                let ds_t = Matrix::new(dp.as_ptr(), width, 1); // (i, j)
                let into = |to: &HeadView<*mut f32>, token, head| {
                    Matrix::new(to.at(token, head), 1, to.width) // (d, token)
                };
                let q = Matrix::new(job.q.at(queries.start, h), 1, job.q.width); // (d, i)
                let k = Matrix::new(job.k.at(keys.start, kv), 1, job.k.width); // (d, j)
                gemm([size, width, n], into(&self.dv, keys.start, kv), true, d_out, p_t, 1.0);
                gemm([size, n, width], into(&self.dq, queries.start, h), true, k, ds, job.scale);
                gemm([size, width, n], into(&self.dk, keys.start, kv), true, q, ds_t, job.scale);
            }
        });
    }
}
