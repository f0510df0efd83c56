//! Products whose columns are lanes of vectors: small ones, for which packing tiles for gemm takes as long as they do.
//!
//! `C[i, c] = keep C + sum_k A[i, k] B[k, c]`. A is read number by number, at any distances; rows of B and C are whole
//! vectors. Each sum is formed over k in order: it does not depend on the other columns, nor on their number.

use pulp::Simd;

/// Floats of the widest vector: rows of B and C are padded to a multiple.
pub(super) const LANES: usize = 16;
/// Rows of A that are read at a time, at most.
pub(super) const MOST_ROWS: usize = 12;

/// Scratch from its first whole vector on: up to [`LANES`] floats less.
pub(super) fn aligned(scratch: &mut [f32]) -> &mut [f32] {
    let skip = scratch.as_ptr().align_offset(4 * LANES).min(LANES);
    &mut scratch[skip..]
}

/// One product.
#[derive(Clone, Copy)]
pub(super) struct Panel {
    /// Rows of A, and the numbers of one.
    pub sizes: [usize; 2],
    /// Columns of B, a multiple of the lanes.
    pub width: usize,
    pub a: *const f32,
    /// Distances in A of rows, and of the numbers of one.
    pub strides: [usize; 2],
    pub b: *const f32,
    /// Distance of rows in B.
    pub b_row: usize,
    pub c: *mut f32,
    /// Distance of rows in C.
    pub c_row: usize,
    /// Whether C is added to; else it is not read.
    pub keep: bool,
}

/// Vectors of columns that a kernel takes at most, and rows of A with so many: as many sums as registers hold beside its
/// operands.
pub(super) fn most_vectors<S: Simd>() -> usize {
    if S::REGISTER_COUNT >= 32 { 4 } else { 2 }
}

/// See [`most_vectors`].
pub(super) fn rows_with<S: Simd>(vectors: usize) -> usize {
    match (S::REGISTER_COUNT >= 32, vectors) {
        (_, 1) | (true, 2) => MOST_ROWS,
        (true, 3) => 8,
        _ => 6,
    }
}

impl Panel {
    /// # Safety
    /// A, B and C are valid for their sizes, and C overlaps neither A nor B.
    #[inline(always)]
    pub(super) unsafe fn run<S: Simd>(self, simd: S) {
        let mut from = 0;
        while from < self.width {
            let vectors = ((self.width - from) / S::F32_LANES).min(most_vectors::<S>());
            let fit = rows_with::<S>(vectors);
            let mut row = 0;
            while row < self.sizes[0] {
                let left = self.sizes[0] - row;
                let rows = [12, 8, 6, 4, 2].into_iter().find(|&r| r <= left.min(fit)).unwrap_or(1);
                // SAFETY: the rows and columns lie within A, B and C.
                unsafe {
                    let (a, b) = (self.a.add(row * self.strides[0]), self.b.add(from));
                    let c = self.c.add(row * self.c_row + from);
                    Panel { a, b, c, ..self }.few(simd, rows, vectors);
                }
                row += rows;
            }
            from += vectors * S::F32_LANES;
        }
    }

    #[inline(always)]
    unsafe fn few<S: Simd>(self, simd: S, rows: usize, vectors: usize) {
        macro_rules! kernel {
            ($rows:literal, $vectors:literal) => {
                // SAFETY: so many rows and vectors lie within A, B and C, by the caller.
                unsafe { self.kernel::<S, $rows, $vectors>(simd) }
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
            (4, 1) => kernel!(4, 1),
            (4, 2) => kernel!(4, 2),
            (4, 3) => kernel!(4, 3),
            (4, 4) => kernel!(4, 4),
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
    }

    #[inline(always)]
    unsafe fn kernel<S: Simd, const R: usize, const V: usize>(self, simd: S) {
        // SAFETY: R rows and V vectors lie within A, B and C, by the caller.
        unsafe {
            let place = |r: usize, v: usize| {
                self.c.add(r * self.c_row + v * S::F32_LANES).cast::<S::f32s>()
            };
            let mut sums = [[simd.splat_f32s(0.0); V]; R];
            if self.keep {
                for (r, sums) in sums.iter_mut().enumerate() {
                    for (v, sum) in sums.iter_mut().enumerate() {
                        *sum = place(r, v).read_unaligned();
                    }
                }
            }
            let [row, column] = self.strides;
            for k in 0..self.sizes[1] {
                let b = self.b.add(k * self.b_row).cast::<S::f32s>();
                let b: [S::f32s; V] = std::array::from_fn(|v| b.add(v).read_unaligned());
                for (r, sums) in sums.iter_mut().enumerate() {
                    let a = simd.splat_f32s(*self.a.add(r * row + k * column));
                    for (sum, b) in sums.iter_mut().zip(b) {
                        *sum = simd.mul_add_e_f32s(a, b, *sum);
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
    /// Columns in which rows of either side are walked: what is read or written in part is still in the L1 cache for the rest.
    const RUN: usize = 64;
    let (m_blocks, n_blocks) = (m / B * B, n / B * B);
    // SAFETY: within both, by the caller.
    unsafe {
        let from_row = |i: usize, j: usize| from.0.add(i * from.1 + j);
        let to_row = |j: usize, i: usize| to.0.add(j * to.1 + i);
        let block = |i: usize, j: usize| {
            let rows =
                std::array::from_fn(|r| from_row(i + r, j).cast::<[f32; B]>().read_unaligned());
            for (r, row) in turned(rows).into_iter().enumerate() {
                to_row(j + r, i).cast::<[f32; B]>().write_unaligned(row);
            }
        };
        for run in (0..n_blocks).step_by(RUN) {
            let js = (run..(run + RUN).min(n_blocks)).step_by(B);
            let is = (0..m_blocks).step_by(B);
            // Along the side whose rows lie farther apart, for they share few lines of a cache.
            match to.1 > from.1 {
                true => js.for_each(|j| is.clone().for_each(|i| block(i, j))),
                false => is.for_each(|i| js.clone().for_each(|j| block(i, j))),
            }
        }
        for i in 0..m {
            for j in if i < m_blocks { n_blocks } else { 0 }..n {
                *to_row(j, i) = *from_row(i, j);
            }
        }
    }
}

/// Columns of four rows: by instructions that every x86-64 processor has, which the compiler does not find by itself.
#[cfg(target_arch = "x86_64")]
#[inline(always)]
fn turned(rows: [[f32; 4]; 4]) -> [[f32; 4]; 4] {
    use std::arch::x86_64::*;
    // SAFETY: SSE is part of x86-64; four floats are a vector, and a vector four floats.
    unsafe {
        let [a, b, c, d] = rows.map(|row| _mm_loadu_ps(row.as_ptr()));
        let (ab, cd) = (_mm_unpacklo_ps(a, b), _mm_unpacklo_ps(c, d));
        let (ab_high, cd_high) = (_mm_unpackhi_ps(a, b), _mm_unpackhi_ps(c, d));
        [
            _mm_movelh_ps(ab, cd),
            _mm_movehl_ps(cd, ab),
            _mm_movelh_ps(ab_high, cd_high),
            _mm_movehl_ps(cd_high, ab_high),
        ]
        .map(|column| std::mem::transmute::<__m128, [f32; 4]>(column))
    }
}

#[cfg(not(target_arch = "x86_64"))]
#[inline(always)]
fn turned([a, b, c, d]: [[f32; 4]; 4]) -> [[f32; 4]; 4] {
    std::array::from_fn(|r| [a[r], b[r], c[r], d[r]])
}
