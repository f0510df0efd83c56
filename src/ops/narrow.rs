//! Products with few columns: decoding, where a tile that is packed for gemm would be used once or twice.
//!
//! `y[n, t] = sum_k W[k, n] x[k, t]`. Lanes of a vector are columns; a few rows of W at a time are dequantised into the L1
//! cache and read number by number. Each sum is formed over k in order, whatever T is: a column's result depends neither
//! on the others nor on their number, nor on that of the threads.

use std::ops::Range;

use pulp::{Simd, WithSimd};

use super::linear::Weight;

/// Inputs that one pass over a row sums: a multiple of every block size, and what the L1 cache holds of a few rows.
const DEPTH: usize = 256;
/// Outputs whose sums lie in scratch at a time.
pub(super) const ROWS: usize = 48;
/// Rows that are dequantised at a time, at most.
pub(super) const MOST_ROWS: usize = 12;
/// Floats of the widest vector.
const WIDEST: usize = 16;

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
    (k + ROWS) * t.next_multiple_of(WIDEST) + MOST_ROWS * DEPTH + WIDEST
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

/// Vectors of columns that a kernel takes at most, and rows of W with so many: as many sums as registers hold beside its
/// operands.
fn most_vectors<S: Simd>() -> usize {
    if S::REGISTER_COUNT >= 32 { 4 } else { 2 }
}

fn rows_with<S: Simd>(vectors: usize) -> usize {
    match (S::REGISTER_COUNT >= 32, vectors) {
        (_, 1) | (true, 2) => 12,
        (true, 3) => 8,
        _ => 6,
    }
}

#[inline(always)]
unsafe fn product<S: Simd>(simd: S, p: Narrow<'_>) {
    let [k, n, t] = p.sizes;
    let width = t.next_multiple_of(S::F32_LANES);
    let skip = p.scratch.as_ptr().align_offset(64).min(WIDEST);
    let (x, rest) = p.scratch[skip..].split_at_mut(k * width);
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
                    let rows = match ns.len() - row {
                        left if left >= fit => fit,
                        left if left >= 2 => 2,
                        _ => 1,
                    };
                    for (r, out) in tile.chunks_exact_mut(DEPTH).enumerate().take(rows) {
                        p.weight.read(ns.start + row + r, ks.clone(), &mut out[..ks.len()]);
                    }
                    let part = Part {
                        depth: ks.len(),
                        w: tile.as_ptr(),
                        x: x.as_ptr().add(ks.start * width),
                        sums: sums.as_mut_ptr().add(row * width),
                        width,
                        first: ks.start == 0,
                    };
                    part.all_columns(simd, rows);
                    row += rows;
                }
            }
            transpose(Strided(sums.as_ptr(), width), Strided(p.y.add(ns.start), n), ns.len(), t);
        }
    }
}

/// A few rows times a run of inputs, added to their sums.
#[derive(Clone, Copy)]
struct Part {
    depth: usize,
    /// Rows of [`DEPTH`].
    w: *const f32,
    /// `depth` rows of `width`.
    x: *const f32,
    /// Rows of `width`.
    sums: *mut f32,
    width: usize,
    /// There are no sums yet.
    first: bool,
}

impl Part {
    #[inline(always)]
    unsafe fn all_columns<S: Simd>(self, simd: S, rows: usize) {
        let mut from = 0;
        while from < self.width {
            let vectors = ((self.width - from) / S::F32_LANES).min(most_vectors::<S>());
            macro_rules! kernel {
                ($rows:literal, $vectors:literal) => {
                    // SAFETY: the columns from `from` on lie within x and the sums.
                    unsafe {
                        let (x, sums) = (self.x.add(from), self.sums.add(from));
                        Part { x, sums, ..self }.kernel::<S, $rows, $vectors>(simd)
                    }
                };
            }
            match (rows, vectors) {
                (12, 1) => kernel!(12, 1),
                (12, 2) => kernel!(12, 2),
                (8, 1) => kernel!(8, 1),
                (8, 2) => kernel!(8, 2),
                (8, 3) => kernel!(8, 3),
                (6, 1) => kernel!(6, 1),
                (6, 2) => kernel!(6, 2),
                (6, 3) => kernel!(6, 3),
                (6, 4) => kernel!(6, 4),
                (2, 1) => kernel!(2, 1),
                (2, 2) => kernel!(2, 2),
                (2, 3) => kernel!(2, 3),
                (2, 4) => kernel!(2, 4),
                (1, 1) => kernel!(1, 1),
                (1, 2) => kernel!(1, 2),
                (1, 3) => kernel!(1, 3),
                (1, 4) => kernel!(1, 4),
                other => unreachable!("rows and vectors {other:?}"),
            }
            from += vectors * S::F32_LANES;
        }
    }

    #[inline(always)]
    unsafe fn kernel<S: Simd, const R: usize, const V: usize>(self, simd: S) {
        // SAFETY: R rows and V vectors lie within w, x and the sums, by the caller.
        unsafe {
            let place = |r: usize, v: usize| {
                self.sums.add(r * self.width + v * S::F32_LANES).cast::<S::f32s>()
            };
            let mut sums = [[simd.splat_f32s(0.0); V]; R];
            if !self.first {
                for (r, sums) in sums.iter_mut().enumerate() {
                    for (v, sum) in sums.iter_mut().enumerate() {
                        *sum = place(r, v).read_unaligned();
                    }
                }
            }
            for k in 0..self.depth {
                let x = self.x.add(k * self.width).cast::<S::f32s>();
                let x: [S::f32s; V] = std::array::from_fn(|v| x.add(v).read_unaligned());
                for (r, sums) in sums.iter_mut().enumerate() {
                    let w = simd.splat_f32s(*self.w.add(r * DEPTH + k));
                    for (sum, x) in sums.iter_mut().zip(x) {
                        *sum = simd.mul_add_e_f32s(w, x, *sum);
                    }
                }
            }
            for (r, sums) in sums.iter().enumerate() {
                for (v, sum) in sums.iter().enumerate() {
                    place(r, v).write_unaligned(*sum);
                }
            }
        }
    }
}

/// Rows of floats a distance apart.
#[derive(Clone, Copy)]
pub(super) struct Strided<P>(pub P, pub usize);

/// `to[j][i] = from[i][j]` for i < m, j < n.
#[inline(always)]
pub(super) unsafe fn transpose(
    from: Strided<*const f32>,
    to: Strided<*mut f32>,
    m: usize,
    n: usize,
) {
    const B: usize = 4;
    let (m_blocks, n_blocks) = (m / B * B, n / B * B);
    // SAFETY: within both, by the caller.
    unsafe {
        let from_row = |i: usize, j: usize| from.0.add(i * from.1 + j);
        let to_row = |j: usize, i: usize| to.0.add(j * to.1 + i);
        for i in (0..m_blocks).step_by(B) {
            for j in (0..n_blocks).step_by(B) {
                let [a, b, c, d]: [[f32; B]; B] =
                    std::array::from_fn(|r| from_row(i + r, j).cast::<[f32; B]>().read_unaligned());
                for r in 0..B {
                    to_row(j + r, i).cast::<[f32; B]>().write_unaligned([a[r], b[r], c[r], d[r]]);
                }
            }
        }
        for i in 0..m {
            for j in if i < m_blocks { n_blocks } else { 0 }..n {
                *to_row(j, i) = *from_row(i, j);
            }
        }
    }
}
