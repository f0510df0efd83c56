//! Products with few columns: decoding, where a tile that is packed for gemm would be used once or twice.
//!
//! `y[n, t] = sum_k W[k, n] x[k, t]`. Lanes of a vector are columns; a few rows of W at a time are dequantised into the L1
//! cache and read number by number. Each sum is formed over k in order, whatever T is: a column's result depends neither
//! on the others nor on their number, nor on that of the threads.

use std::ops::Range;

use pulp::{Simd, WithSimd};

use super::linear::Weight;
use super::panel::{LANES, MOST_ROWS, Panel, Strided, aligned, most_vectors, rows_with, transpose};

/// Inputs that one pass over a row sums: a multiple of every block size, and what the L1 cache holds of a few rows.
const DEPTH: usize = 256;
/// Outputs whose sums lie in scratch at a time.
pub(super) const ROWS: usize = 48;

/// Rows `ns` of the product, by a thread.
pub(super) struct Narrow<'p> {
    /// `[K, N]`.
    pub weight: &'p Weight,
    /// K, N, T.
    pub sizes: [usize; 3],
    pub ns: Range<usize>,
    /// `[K, T]`.
    pub x: *const f32,
    /// `[N, T]`.
    pub y: *mut f32,
    /// [`scratch`] floats.
    pub scratch: &'p mut [f32],
}

/// Floats that a call takes.
pub(super) fn scratch(k: usize, t: usize) -> usize {
    (k + ROWS) * t.next_multiple_of(LANES) + MOST_ROWS * DEPTH + LANES
}

/// # Safety
/// x and y are valid for their sizes and do not overlap; nobody else writes rows `ns`.
pub(super) unsafe fn run(p: Narrow<'_>) {
    pulp::Arch::new().dispatch(Dispatched(p));
}

/// What the caller of [`run`] vouches for.
struct Dispatched<'p>(Narrow<'p>);

impl WithSimd for Dispatched<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        // SAFETY: by the contract of `run`, the only one that makes it.
        unsafe { product(simd, self.0) }
    }
}

#[inline(always)]
unsafe fn product<S: Simd>(simd: S, p: Narrow<'_>) {
    let [k, n, t] = p.sizes;
    let width = t.next_multiple_of(S::F32_LANES);
    let (x, rest) = aligned(p.scratch).split_at_mut(k * width);
    let (sums, tile) = rest.split_at_mut(ROWS * width);
    let fit = rows_with::<S>((width / S::F32_LANES).min(most_vectors::<S>()));
    // SAFETY: within x, y and scratch by contract.
    unsafe {
        transpose(Strided(p.x, k), Strided(x.as_mut_ptr(), width), t, k);
        for row in x.chunks_exact_mut(width) {
            row[t..].fill(0.0);
        }
        for ns in super::linear::steps(p.ns, ROWS) {
            for ks in super::linear::steps(0..k, DEPTH) {
                p.weight.count(ns.len() * ks.len());
                let mut row = 0;
                while row < ns.len() {
                    let rows = fit.min(ns.len() - row);
                    for (r, out) in tile.chunks_exact_mut(DEPTH).enumerate().take(rows) {
                        p.weight.read(ns.start + row + r, ks.clone(), &mut out[..ks.len()]);
                    }
                    let part = Panel {
                        sizes: [rows, ks.len()],
                        width,
                        a: tile.as_ptr(),
                        strides: [DEPTH, 1],
                        b: x.as_ptr().add(ks.start * width),
                        b_row: width,
                        c: sums.as_mut_ptr().add(row * width),
                        c_row: width,
                        keep: ks.start > 0,
                    };
                    part.run(simd);
                    row += rows;
                }
            }
            transpose(Strided(sums.as_ptr(), width), Strided(p.y.add(ns.start), n), ns.len(), t);
        }
    }
}
