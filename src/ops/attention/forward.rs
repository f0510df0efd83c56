//! `o` and `lse`, tile by tile. Columns, the queries of a tile, are lanes of vectors, so that running maxima and sums
//! are vectors, too.

use std::ffi::{c_int, c_void};

use ggml_sys as sys;
use pulp::{Simd, WithSimd};

use super::tiles::{Block, Heads, Job, KEYS, Scores, Tile, query_tiles};
use crate::ops::exp::{exp, exp_lanes, softcap};
use crate::ops::gemm::with_scratch;
use crate::ops::panel::{LANES, aligned};
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
    let simd = pulp::Arch::new();
    job.units.each(tiles.len() * job.n_head_kv, nth, |unit| {
        // One head's tiles after another: its keys and values stay in the cache.
        let (tile, kv) = (&tiles[unit % tiles.len()], unit / tiles.len());
        with_scratch(Forward::sizes(&job, tile).iter().sum::<usize>() + LANES, |scratch| {
            simd.dispatch(Forward { job: &job, tile, kv, out, lse, scratch });
        });
    });
}

/// One tile of queries of all heads that read key/value head `kv`: both lie within the tensors, and nobody else has this unit.
struct Forward<'j, 'k> {
    job: &'j Job<'k>,
    tile: &'j Tile,
    kv: usize,
    out: Heads<*mut f32>,
    lse: *mut f32,
    /// [`Forward::sizes`], and a vector more.
    scratch: &'j mut [f32],
}

impl Forward<'_, '_> {
    /// Floats of the queries, of their results, of a run of packed keys or values, of scores, and of three numbers a column.
    fn sizes(job: &Job<'_>, tile: &Tile) -> [usize; 5] {
        let columns = tile.queries.len() * job.group();
        let width = columns.next_multiple_of(LANES);
        [job.size * width, columns * job.stride(), KEYS * job.stride(), KEYS * width, 3 * width]
    }
}

// No closure takes part in what is computed with vectors: it would not be compiled for the processor that was dispatched on.
impl WithSimd for Forward<'_, '_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let (size, stride, group) = (self.job.size, self.job.stride(), self.job.group());
        let columns = self.tile.queries.len() * group;
        let width = columns.next_multiple_of(LANES);
        let sizes = Forward::sizes(self.job, self.tile);
        let (q, rest) = aligned(self.scratch).split_at_mut(sizes[0]);
        let (o, rest) = rest.split_at_mut(sizes[1]);
        let (packed, rest) = rest.split_at_mut(sizes[2]);
        let (scores, rest) = rest.split_at_mut(sizes[3]);
        let (max, rest) = rest.split_at_mut(width);
        let (sum, rest) = rest.split_at_mut(width);
        let scale = &mut rest[..width];
        max.fill(f32::NEG_INFINITY);
        sum.fill(0.0);
        // SAFETY: by what `Forward` says of its fields; packed rows lie within the scratch.
        unsafe {
            // Until there are results their rows are the queries'.
            self.job.pack_queries(&self.job.q, self.tile, self.kv, o, q);
            q.iter_mut().for_each(|q| *q *= self.job.scale);
            o.fill(0.0);
            for keys in self.tile.keys() {
                let run = Scores::new(self.tile, &keys, [size, group]);
                self.job.k.pack(keys.tokens.clone(), self.kv, packed);
                run.fill(simd, packed, q, scores);
                if let Some(cap) = self.job.softcap {
                    for (row, _) in run.rows() {
                        scores[row].iter_mut().for_each(|x| *x = softcap(*x, cap).0);
                    }
                }
                run.hide(scores, f32::NEG_INFINITY);
                absorb(simd, &run, scores, max, sum, scale);
                for (o, scale) in o.chunks_exact_mut(stride).zip(&*scale) {
                    if *scale != 1.0 {
                        o.iter_mut().for_each(|o| *o *= scale);
                    }
                }
                self.job.v.pack(keys.tokens.clone(), self.kv, packed);
                run.add_to_queries(simd, scores, packed, o);
            }
            for c in 0..columns {
                let (token, head) = self.job.place(self.tile, self.kv, c);
                let (mut max, mut sum, mut scale) = (max[c], sum[c], 1.0);
                if let Some(sinks) = self.job.sinks {
                    let new = max.max(sinks[head]);
                    scale = exp(max - new);
                    sum = sum * scale + exp(sinks[head] - new);
                    max = new;
                }
                let factor = scale / sum;
                let to = self.out.row_mut(token, head).iter_mut();
                to.zip(&o[c * stride..]).for_each(|(y, o)| *y = o * factor);
                *self.lse.add(token * self.job.n_head + head) = max + sum.ln();
            }
        }
    }
}

/// Takes the scores of a run of keys into the running sums of each column; they become `e^(s - max)`, rows of `max.len()`, and what was
/// summed before is to be scaled by `scale`.
#[inline(always)]
fn absorb<S: Simd>(
    simd: S,
    run: &Scores,
    scores: &mut [f32],
    max: &mut [f32],
    sum: &mut [f32],
    scale: &mut [f32],
) {
    let per_row = max.len() / S::F32_LANES;
    let [scores, max, sum, scale] = [scores, max, sum, scale].map(|x| S::as_mut_simd_f32s(x).0);
    for (v, ((max, sum), scale)) in max.iter_mut().zip(sum).zip(scale).enumerate() {
        let keys = || {
            let has = |block: &&Block| block.columns.contains(&(v * S::F32_LANES));
            run.blocks.iter().filter(has).flat_map(|block| block.keys.clone())
        };
        let new = keys().fold(*max, |new, key| simd.max_f32s(new, scores[key * per_row + v]));
        // Where no key was seen so far there is nothing to scale, and minus infinity less itself is no number.
        let shift = simd.max_f32s(simd.splat_f32s(f32::MIN), new);
        let mut total = simd.splat_f32s(0.0);
        for key in keys() {
            let score = &mut scores[key * per_row + v];
            *score = exp_lanes(simd, simd.sub_f32s(*score, shift));
            total = simd.add_f32s(total, *score);
        }
        *scale = exp_lanes(simd, simd.sub_f32s(*max, shift));
        *sum = simd.mul_add_e_f32s(*sum, *scale, total);
        *max = new;
    }
}
