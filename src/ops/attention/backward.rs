//! Cotangents of q, k and v.

use std::ffi::{c_int, c_void};
use std::ops::Range;

use ggml_sys as sys;
use pulp::{Simd, WithSimd};

use super::tiles::{Heads, Job, KEYS, Scores, Tile, query_tiles};
use crate::ops::exp::{exp, exp_lanes, softcap};
use crate::ops::gemm::with_scratch;
use crate::ops::panel::{LANES, aligned};
use crate::ops::rows::dot;
use crate::ops::segments::trees;

pub(super) unsafe extern "C" fn kernel(
    dst: *mut sys::ggml_tensor,
    _ith: c_int,
    nth: c_int,
    userdata: *mut c_void,
) {
    // SAFETY: `attention_back` made this node: after q, k, v come out, lse and d_out; dst holds dq, dk, dv.
    unsafe {
        let job = Job::new(dst, userdata);
        let (q_width, kv_width) = (job.q.width, job.k.width);
        let data: *mut f32 = (*dst).data.cast();
        let view = |skip, width| Heads { data: data.add(skip), width, size: job.size };
        let source = |i: usize| (*(*dst).src[i]).data as *const f32;
        let heads = |i| Heads { data: source(i), width: q_width, size: job.size };
        let back = Back {
            out: heads(3),
            lse: source(4),
            d_out: heads(5),
            dq: view(0, q_width),
            dk: view(q_width * job.t, kv_width),
            dv: view((q_width + kv_width) * job.t, kv_width),
            job,
        };
        let trees: Vec<Vec<Tile>> = trees(back.job.segments)
            .map(|tree| query_tiles(tree, back.job.tile_tokens(), back.job.window))
            .collect();
        let (n_kv, simd) = (back.job.n_head_kv, pulp::Arch::new());
        back.job.units.each(trees.len() * n_kv, nth, |unit| {
            let (tiles, kv) = (&trees[unit / n_kv], unit % n_kv);
            with_scratch(OfTree::scratch(&back.job, tiles), |scratch| {
                simd.dispatch(OfTree { back: &back, tiles, kv, scratch });
            });
        });
    }
}

struct Back<'k> {
    job: Job<'k>,
    out: Heads<*const f32>,
    lse: *const f32,
    d_out: Heads<*const f32>,
    dq: Heads<*mut f32>,
    dk: Heads<*mut f32>,
    dv: Heads<*mut f32>,
}

/// A tree's keys and values of one head, packed, and the sums of their cotangents.
struct Tree<'s> {
    first: usize,
    k: &'s [f32],
    v: &'s [f32],
    dk: &'s mut [f32],
    dv: &'s mut [f32],
}

/// Everything of one key/value head in one tree: its tiles lie within the tensors, and no other thread has this unit.
struct OfTree<'b, 'k> {
    back: &'b Back<'k>,
    tiles: &'b [Tile],
    kv: usize,
    /// [`OfTree::scratch`] floats.
    scratch: &'b mut [f32],
}

impl OfTree<'_, '_> {
    /// Tokens of a tree.
    fn tokens(tiles: &[Tile]) -> Range<usize> {
        tiles[0].queries.start..tiles[tiles.len() - 1].queries.end
    }

    /// Keys and values, packed, and the sums of their cotangents; what a tile takes.
    fn scratch(job: &Job<'_>, tiles: &[Tile]) -> usize {
        let columns = job.tile_tokens() * job.group();
        let width = columns.next_multiple_of(LANES);
        let tile = 3 * columns * job.stride() + (2 * job.size + 2 * KEYS + 2) * width;
        4 * OfTree::tokens(tiles).len() * job.stride() + tile + LANES
    }
}

// No closure takes part in what is computed with vectors: it would not be compiled for the processor that was dispatched on.
impl WithSimd for OfTree<'_, '_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let OfTree { back, tiles, kv, scratch } = self;
        let job = &back.job;
        let tokens = OfTree::tokens(tiles);
        let (all, stride) = (tokens.len() * job.stride(), job.stride());
        let (k, rest) = aligned(scratch).split_at_mut(all);
        let (v, rest) = rest.split_at_mut(all);
        let (dk, rest) = rest.split_at_mut(all);
        let (dv, rest) = rest.split_at_mut(all);
        // SAFETY: by what `OfTree` says of its fields.
        unsafe {
            job.k.pack(tokens.clone(), kv, k);
            job.v.pack(tokens.clone(), kv, v);
        }
        dk.fill(0.0);
        dv.fill(0.0);
        let mut tree = Tree { first: tokens.start, k, v, dk, dv };
        for tile in tiles {
            // SAFETY: the same.
            unsafe { back.tile(simd, &mut tree, tile, kv, rest) };
        }
        for (token, i) in tokens.zip((0..).step_by(stride)) {
            // SAFETY: the same.
            unsafe {
                back.dk.row_mut(token, kv).copy_from_slice(&tree.dk[i..i + job.size]);
                back.dv.row_mut(token, kv).copy_from_slice(&tree.dv[i..i + job.size]);
            }
        }
    }
}

impl Back<'_> {
    /// One tile of queries: its dq, and what it adds to dk and dv.
    ///
    /// # Safety
    /// The tile lies within the tensors, and no other thread works on this head of its tree.
    #[inline(always)]
    unsafe fn tile<S: Simd>(
        &self,
        simd: S,
        tree: &mut Tree<'_>,
        tile: &Tile,
        kv: usize,
        scratch: &mut [f32],
    ) {
        let (job, size, stride) = (&self.job, self.job.size, self.job.stride());
        let columns = tile.queries.len() * job.group();
        let width = columns.next_multiple_of(LANES);
        let (q_rows, rest) = scratch.split_at_mut(columns * stride);
        let (d_out_rows, rest) = rest.split_at_mut(columns * stride);
        let (q, rest) = rest.split_at_mut(size * width);
        let (d_out, rest) = rest.split_at_mut(size * width);
        let (dq, rest) = rest.split_at_mut(columns * stride);
        let (p, rest) = rest.split_at_mut(KEYS * width);
        let (ds, rest) = rest.split_at_mut(KEYS * width);
        let (lse, rest) = rest.split_at_mut(width);
        let d = &mut rest[..width];
        // SAFETY: by contract.
        unsafe {
            job.pack_queries(&job.q, tile, kv, q_rows, q);
            job.pack_queries(&self.d_out, tile, kv, d_out_rows, d_out);
            lse.fill(0.0);
            d.fill(0.0);
            for c in 0..columns {
                let (token, head) = job.place(tile, kv, c);
                lse[c] = *self.lse.add(token * job.n_head + head);
                d[c] = dot(&d_out_rows[c * stride..][..size], self.out.row(token, head));
            }
        }
        for q in [&mut *q, &mut *q_rows] {
            q.iter_mut().for_each(|q| *q *= job.scale);
        }
        dq.fill(0.0);
        for keys in tile.keys() {
            let run = Scores::new(tile, &keys, [size, job.group()]);
            let at = (keys.tokens.start - tree.first) * stride;
            run.fill(simd, &tree.k[at..], q, p);
            run.fill(simd, &tree.v[at..], d_out, ds);
            for (row, block) in run.rows() {
                let (p, ds) = (&mut p[row.clone()], &mut ds[row]);
                let (lse, d) = (&lse[block.columns.clone()], &d[block.columns.clone()]);
                match job.softcap {
                    None => plain(simd, p, ds, lse, d),
                    Some(cap) => capped(p, ds, lse, d, cap),
                }
            }
            run.hide(p, 0.0);
            run.hide(ds, 0.0);
            run.add_to_keys(simd, p, d_out_rows, &mut tree.dv[at..]);
            run.add_to_keys(simd, ds, q_rows, &mut tree.dk[at..]);
            run.add_to_queries(simd, ds, &tree.k[at..], dq);
        }
        for c in 0..columns {
            let (token, head) = job.place(tile, kv, c);
            // SAFETY: by contract.
            let to = unsafe { self.dq.row_mut(token, head) }.iter_mut();
            to.zip(&dq[c * stride..]).for_each(|(y, dq)| *y = dq * job.scale);
        }
    }
}

/// Scores `p` become probabilities, the cotangents `ds` of these those of the scores; a number for each column.
#[inline(always)]
fn plain<S: Simd>(simd: S, p: &mut [f32], ds: &mut [f32], lse: &[f32], d: &[f32]) {
    let (p, ds) = (S::as_mut_simd_f32s(p).0, S::as_mut_simd_f32s(ds).0);
    let (lse, d) = (S::as_simd_f32s(lse).0, S::as_simd_f32s(d).0);
    for (((p, ds), lse), d) in p.iter_mut().zip(ds).zip(lse).zip(d) {
        *p = exp_lanes(simd, simd.sub_f32s(*p, *lse));
        *ds = simd.mul_f32s(*p, simd.sub_f32s(*ds, *d));
    }
}

/// The same where a softcap stands between.
#[inline(always)]
fn capped(p: &mut [f32], ds: &mut [f32], lse: &[f32], d: &[f32], cap: f32) {
    for (((p, ds), lse), d) in p.iter_mut().zip(ds).zip(lse).zip(d) {
        let (score, slope) = softcap(*p, cap);
        *p = exp(score - lse);
        *ds = *p * (*ds - d) * slope;
    }
}
