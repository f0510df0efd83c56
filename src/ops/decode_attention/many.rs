//! Many queries on the same keys: they are the lanes of vectors, so that a tile's scores, and what it adds, are products
//! ([`Panel`]), and a softmax needs no sum over lanes.

use std::ops::Range;

use pulp::Simd;

use super::super::exp::exp_lanes;
use super::super::panel::{LANES, Panel, Strided, transpose};
use super::{LOWEST, MOST, Part, Scratch, TILE, add_values};

/// Queries from which on this is the faster way: half of the widest vector's lanes.
pub(super) const LEAST: usize = LANES / 2;

/// Adds a run of keys to what its readers have summed up, a tile of all heads at a time.
///
/// # Safety
/// The contract of [`super::decode_attention`].
#[inline(always)]
pub(super) unsafe fn add<S: Simd>(simd: S, part: &Part<'_>, scratch: &mut Scratch<'_>) {
    // SAFETY: by contract.
    unsafe {
        pack(part, scratch);
        for tile in part.tiles() {
            let ahead = part.after(tile.end);
            for (i, head) in part.heads.clone().enumerate() {
                let to = (&mut *scratch.keys, &mut *scratch.values);
                part.read((head, tile.clone()), to, (&ahead, i * tile.len()));
                add_tile(simd, part, i, tile.clone(), scratch);
            }
        }
    }
}

/// Queries of a head of keys in whole vectors.
fn width(part: &Part<'_>) -> usize {
    part.queries().len().next_multiple_of(LANES)
}

/// The queries of each head as columns.
#[inline(always)]
unsafe fn pack(part: &Part<'_>, scratch: &mut Scratch<'_>) {
    let (node, n, width) = (part.node, part.queries().len(), width(part));
    let Scratch { keys, columns, .. } = scratch;
    let columns = columns.chunks_exact_mut(node.size * width);
    for (head, columns) in part.heads.clone().zip(columns) {
        columns.fill(0.0);
        // SAFETY: by contract; columns of so many queries.
        unsafe {
            let of_reader = |(reader, _)| (0..node.group()).map(move |g| node.q(head, reader, g));
            let mut rows = part.readers().flat_map(of_reader);
            for from in (0..n).step_by(TILE) {
                let some = TILE.min(n - from);
                for (to, q) in keys.chunks_exact_mut(node.size).take(some).zip(&mut rows) {
                    to.copy_from_slice(q);
                }
                let to = Strided(columns[from..].as_mut_ptr(), width);
                transpose(Strided(keys.as_ptr(), node.size), to, some, node.size);
            }
        }
    }
}

/// Adds a tile that was read to the sums of the `i`th of the part's heads.
#[inline(always)]
unsafe fn add_tile<S: Simd>(
    simd: S,
    part: &Part<'_>,
    i: usize,
    tile: Range<usize>,
    scratch: &mut Scratch<'_>,
) {
    let (node, width) = (part.node, width(part));
    let (size, group, padded) = (node.size, node.group(), node.padded());
    let Scratch { keys, values, weights, columns, sums, largest, total } = scratch;
    let places = part.places(i, part.queries());
    let n = places.len();
    let sums = &mut sums[places.start * padded..places.end * padded];
    let (largest, total) = (&mut largest[places.clone()], &mut total[places]);
    // In whole vectors.
    let (mut most, mut sum, mut shrink) = ([LOWEST; MOST], [0f32; MOST], [1f32; MOST]);
    most[..n].copy_from_slice(largest);
    sum[..n].copy_from_slice(total);
    let scores = &mut weights[..tile.len() * width];
    // SAFETY: by contract; the scratch has room for so many queries.
    unsafe {
        Panel {
            sizes: [tile.len(), size],
            width,
            a: keys.as_ptr(),
            strides: [size, 1],
            b: columns[i * size * width..].as_ptr(),
            b_row: width,
            c: scores.as_mut_ptr(),
            c_row: width,
            keep: false,
        }
        .run(simd);
        let scale = node.cap(scores);
        for (i, (reader, _)) in part.readers().enumerate() {
            let allowed = &node.allowed(reader, tile.clone())[..tile.len()];
            if allowed.iter().any(|&a| a != 0.0) {
                for (row, a) in scores.chunks_exact_mut(width).zip(allowed) {
                    let scores = &mut row[i * group..][..group];
                    scores.iter_mut().for_each(|score| *score += a / scale);
                }
            }
        }
        for at in (0..width).step_by(S::F32_LANES) {
            let state = [&mut most, &mut sum, &mut shrink].map(|c| c[at..].as_mut_ptr());
            softmax(simd, &mut scores[at..], width, scale, state);
        }
        for (sums, &shrink) in sums.chunks_exact_mut(padded).zip(&shrink) {
            sums.iter_mut().for_each(|sum| *sum *= shrink);
        }
        let weights = (scores.as_ptr(), [1, width]);
        add_values(simd, [n, tile.len()], weights, values, sums, padded);
    }
    largest.copy_from_slice(&most[..n]);
    total.copy_from_slice(&sum[..n]);
}

/// Scores of a vector of queries, a row for each key `width` floats apart, become exponentials over the largest so far; it, their
/// sum and what earlier sums are to be multiplied with are brought up to date.
///
/// # Safety
/// A vector lies at each of the pointers.
#[inline(always)]
unsafe fn softmax<S: Simd>(
    simd: S,
    scores: &mut [f32],
    width: usize,
    scale: f32,
    state: [*mut f32; 3],
) {
    let [largest, sum, shrink] = state.map(|at| at.cast::<S::f32s>());
    let scale = simd.splat_f32s(scale);
    // SAFETY: by contract; rows have whole vectors.
    unsafe {
        let before = largest.read_unaligned();
        let mut most = simd.splat_f32s(f32::NEG_INFINITY);
        for row in scores.chunks_mut(width) {
            most = simd.max_f32s(most, row.as_ptr().cast::<S::f32s>().read_unaligned());
        }
        let most = simd.max_f32s(simd.mul_f32s(most, scale), before);
        let less = simd.neg_f32s(most);
        let mut total = simd.splat_f32s(0.0);
        for row in scores.chunks_mut(width) {
            let score = row.as_mut_ptr().cast::<S::f32s>();
            let e = exp_lanes(simd, simd.mul_add_e_f32s(score.read_unaligned(), scale, less));
            score.write_unaligned(e);
            total = simd.add_f32s(total, e);
        }
        let factor = exp_lanes(simd, simd.sub_f32s(before, most));
        largest.write_unaligned(most);
        sum.write_unaligned(simd.mul_add_e_f32s(sum.read_unaligned(), factor, total));
        shrink.write_unaligned(factor);
    }
}
