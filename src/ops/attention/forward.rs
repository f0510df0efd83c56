//! `o` and `lse`, tile by tile.

use std::ffi::{c_int, c_void};

use ggml_sys as sys;

use super::tiles::{Heads, Job, KEYS, LD, Tile, query_tiles};
use crate::ops::exp::{exp, softcap};
use crate::ops::gemm::{Matrix, gemm, with_scratch};
use crate::ops::rows::maximum;
use crate::ops::segments::trees;

pub(super) unsafe extern "C" fn kernel(
    dst: *mut sys::ggml_tensor,
    _ith: c_int,
    nth: c_int,
    userdata: *mut c_void,
) {
    // SAFETY: `attention` made this node.
    let job = unsafe { Job::new(dst, userdata) };
    // SAFETY: dst holds the heads of all tokens, then lse [n_head, T].
    let (out, lse) = unsafe {
        let data: *mut f32 = (*dst).data.cast();
        let out = Heads { data, width: job.size * job.n_head, size: job.size };
        (out, data.add(job.size * job.n_head * job.t))
    };
    let most = job.tile_tokens();
    let tiles: Vec<Tile> =
        trees(job.segments).flat_map(|tree| query_tiles(tree, most, job.window)).collect();
    job.units.each(tiles.len() * job.n_head_kv, nth, |unit| {
        // SAFETY: tile and heads lie within the tensors; no other thread has this unit.
        unsafe { tile(&job, &tiles[unit / job.n_head_kv], unit % job.n_head_kv, out, lse) };
    });
}

/// One tile of queries of all heads that read key/value head `kv`.
///
/// # Safety
/// Both lie within the tensors, and nobody else writes their results.
unsafe fn tile(job: &Job<'_>, tile: &Tile, kv: usize, out: Heads<*mut f32>, lse: *mut f32) {
    let (n, size, stride) = (tile.queries.len(), job.size, job.stride());
    let columns = n * job.group();
    let sizes = [columns * stride, columns * stride, KEYS * stride, columns * LD, 2 * columns];
    with_scratch(sizes.iter().sum(), |scratch| {
        let (q, rest) = scratch.split_at_mut(sizes[0]);
        let (o, rest) = rest.split_at_mut(sizes[1]);
        let (packed, rest) = rest.split_at_mut(sizes[2]);
        let (p, rest) = rest.split_at_mut(sizes[3]);
        let (max, sum) = rest.split_at_mut(columns);
        // SAFETY: by contract.
        unsafe { job.pack_group(&job.q, tile, kv, q) };
        o.fill(0.0);
        max.fill(f32::NEG_INFINITY);
        sum.fill(0.0);
        for keys in tile.keys() {
            let width = keys.tokens.len();
            // SAFETY: by contract.
            unsafe { job.k.pack(keys.tokens.clone(), kv, packed) };
            job.products([packed, q], [width, columns], p, job.scale);
            for (c, column) in p.chunks_exact_mut(LD).take(columns).enumerate() {
                let o = &mut o[c * stride..][..size];
                let seen = tile.seen(&keys, c % n);
                if let Some(cap) = job.softcap {
                    column[seen.clone()].iter_mut().for_each(|x| *x = softcap(*x, cap).0);
                }
                absorb(&mut column[..width], seen, &mut max[c], &mut sum[c], o);
            }
            // SAFETY: by contract; the products' views lie within the scratch.
            unsafe {
                job.v.pack(keys.tokens.clone(), kv, packed);
                let v = Matrix::new(packed.as_ptr(), 1, stride); // (d, j)
                let p = Matrix::new(p.as_ptr(), 1, LD); // (j, i)
                let o = Matrix::new(o.as_mut_ptr(), 1, stride); // (d, i)
                gemm([size, columns, width], o, true, v, p, 1.0);
            }
        }
        for c in 0..columns {
            let (token, head) = (tile.queries.start + c % n, kv * job.group() + c / n);
            if let Some(sinks) = job.sinks {
                let mut sink = [sinks[head]];
                absorb(&mut sink, 0..1, &mut max[c], &mut sum[c], &mut o[c * stride..][..size]);
            }
            // SAFETY: by contract.
            unsafe {
                for (y, o) in out.row_mut(token, head).iter_mut().zip(&o[c * stride..]) {
                    *y = o / sum[c];
                }
                *lse.add(token * job.n_head + head) = max[c] + sum[c].ln();
            }
        }
    });
}

/// Takes one query's scores of a run of keys into its running sums; scores become `e^(s - max)`, those of
/// keys that it does not see 0.
fn absorb(
    scores: &mut [f32],
    seen: std::ops::Range<usize>,
    max: &mut f32,
    sum: &mut f32,
    o: &mut [f32],
) {
    scores[..seen.start].fill(0.0);
    scores[seen.end..].fill(0.0);
    let live = &mut scores[seen];
    let new = maximum(live).max(*max);
    if new > *max {
        let scale = exp(*max - new);
        *sum *= scale;
        o.iter_mut().for_each(|x| *x *= scale);
        *max = new;
    }
    let mut lanes = [0f32; 16];
    let (chunks, rest) = live.as_chunks_mut::<16>();
    for chunk in chunks {
        for i in 0..16 {
            chunk[i] = exp(chunk[i] - new);
            lanes[i] += chunk[i];
        }
    }
    for (x, lane) in rest.iter_mut().zip(&mut lanes) {
        *x = exp(*x - new);
        *lane += *x;
    }
    *sum += lanes.iter().sum::<f32>();
}
