//! Cotangents of q, k and v.

use std::ffi::{c_int, c_void};

use ggml_sys as sys;

use super::tiles::{Heads, Job, LD, Tile, query_tiles};
use crate::ops::exp::{exp, softcap};
use crate::ops::gemm::{Matrix, gemm, with_scratch};
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
        let n_kv = back.job.n_head_kv;
        back.job.units.each(trees.len() * n_kv, nth, |unit| {
            back.tree(&trees[unit / n_kv], unit % n_kv);
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

impl Back<'_> {
    /// Everything of one key/value head in one tree.
    ///
    /// # Safety
    /// The tiles lie within the tensors, and no other thread works on this head of this tree.
    unsafe fn tree(&self, tiles: &[Tile], kv: usize) {
        let job = &self.job;
        let tokens = tiles[0].queries.start..tiles[tiles.len() - 1].queries.end;
        let (all, columns) = (tokens.len() * job.stride(), job.tile_tokens() * job.group());
        let tile = columns * (3 * job.stride() + 2 * LD + 2);
        with_scratch(4 * all + tile, |scratch| {
            let (k, rest) = scratch.split_at_mut(all);
            let (v, rest) = rest.split_at_mut(all);
            let (dk, rest) = rest.split_at_mut(all);
            let (dv, rest) = rest.split_at_mut(all);
            // SAFETY: by contract.
            unsafe {
                job.k.pack(tokens.clone(), kv, k);
                job.v.pack(tokens.clone(), kv, v);
            }
            dk.fill(0.0);
            dv.fill(0.0);
            let mut tree = Tree { first: tokens.start, k, v, dk, dv };
            for tile in tiles {
                // SAFETY: by contract.
                unsafe { self.tile(&mut tree, tile, kv, rest) };
            }
            for (token, i) in tokens.zip((0..).step_by(job.stride())) {
                // SAFETY: by contract.
                unsafe {
                    self.dk.row_mut(token, kv).copy_from_slice(&tree.dk[i..i + job.size]);
                    self.dv.row_mut(token, kv).copy_from_slice(&tree.dv[i..i + job.size]);
                }
            }
        });
    }

    /// One tile of queries: its dq, and what it adds to dk and dv.
    ///
    /// # Safety
    /// As [`Back::tree`].
    unsafe fn tile(&self, tree: &mut Tree<'_>, tile: &Tile, kv: usize, scratch: &mut [f32]) {
        let (job, n, size, stride) =
            (&self.job, tile.queries.len(), self.job.size, self.job.stride());
        let columns = n * job.group();
        let (q, rest) = scratch.split_at_mut(columns * stride);
        let (d_out, rest) = rest.split_at_mut(columns * stride);
        let (dq, rest) = rest.split_at_mut(columns * stride);
        let (p, rest) = rest.split_at_mut(columns * LD);
        let (ds, rest) = rest.split_at_mut(columns * LD);
        let (lse, d) = rest.split_at_mut(columns);
        let place = |c: usize| (tile.queries.start + c % n, kv * job.group() + c / n);
        // SAFETY: by contract.
        unsafe {
            job.pack_group(&job.q, tile, kv, q);
            job.pack_group(&self.d_out, tile, kv, d_out);
            for c in 0..columns {
                let (token, head) = place(c);
                lse[c] = *self.lse.add(token * job.n_head + head);
                d[c] = dot(&d_out[c * stride..][..size], self.out.row(token, head));
            }
        }
        dq.fill(0.0);
        for keys in tile.keys() {
            let (width, at) = (keys.tokens.len(), (keys.tokens.start - tree.first) * stride);
            job.products([&tree.k[at..], q], [width, columns], p, job.scale);
            job.products([&tree.v[at..], d_out], [width, columns], ds, 1.0);
            let both = p.chunks_exact_mut(LD).zip(ds.chunks_exact_mut(LD)).take(columns);
            for (c, (p, ds)) in both.enumerate() {
                let seen = tile.seen(&keys, c % n);
                for hidden in [0..seen.start, seen.end..width] {
                    p[hidden.clone()].fill(0.0);
                    ds[hidden].fill(0.0);
                }
                let (p, ds) = (&mut p[seen.clone()], &mut ds[seen]);
                match job.softcap {
                    None => plain(p, ds, lse[c], d[c]),
                    Some(cap) => capped(p, ds, lse[c], d[c], cap),
                }
            }
            // SAFETY: the views lie within the packed slices.
            unsafe {
                let packed = |x: &[f32]| Matrix::new(x.as_ptr(), 1, stride); // (d, row)
                let sums = |x: &mut [f32]| Matrix::new(x.as_mut_ptr(), 1, stride);
                let turned = |x: &[f32]| Matrix::new(x.as_ptr(), LD, 1); // (i, j)
                let ds_in = Matrix::new(ds.as_ptr(), 1, LD); // (j, i)
                let (dv, dk) = (sums(&mut tree.dv[at..]), sums(&mut tree.dk[at..]));
                gemm([size, width, columns], dv, true, packed(d_out), turned(p), 1.0);
                gemm([size, width, columns], dk, true, packed(q), turned(ds), job.scale);
                let k = packed(&tree.k[at..]);
                gemm([size, columns, width], sums(dq), true, k, ds_in, job.scale);
            }
        }
        for c in 0..columns {
            let (token, head) = place(c);
            // SAFETY: by contract.
            unsafe { self.dq.row_mut(token, head).copy_from_slice(&dq[c * stride..][..size]) };
        }
    }
}

/// Scores `p` of a query become probabilities, the cotangents `ds` of these those of the scores.
#[inline(never)]
fn plain(p: &mut [f32], ds: &mut [f32], lse: f32, d: f32) {
    for (p, ds) in p.iter_mut().zip(ds) {
        *p = exp(*p - lse);
        *ds = *p * (*ds - d);
    }
}

/// The same where a softcap stands between.
#[inline(never)]
fn capped(p: &mut [f32], ds: &mut [f32], lse: f32, d: f32, cap: f32) {
    for (p, ds) in p.iter_mut().zip(ds) {
        let (score, slope) = softcap(*p, cap);
        *p = exp(score - lse);
        *ds = *p * (*ds - d) * slope;
    }
}
