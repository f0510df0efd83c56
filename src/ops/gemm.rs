//! Matrix products on one thread, by the `gemm` crate, on strided views of F32 memory; those with weights on the processor's
//! matrix unit where it has one.

use super::amx;

/// A strided matrix in memory: element `(i, j)` at `data + i * row + j * column`.
#[derive(Clone, Copy)]
pub(super) struct Matrix<T> {
    pub data: T,
    /// Distance of rows, elements.
    pub row: usize,
    /// Distance of columns, elements.
    pub column: usize,
}

impl<T> Matrix<T> {
    pub(super) fn new(data: T, row: usize, column: usize) -> Matrix<T> {
        Matrix { data, row, column }
    }

    /// Rows as columns.
    pub(super) fn turned(self) -> Matrix<T> {
        Matrix { data: self.data, row: self.column, column: self.row }
    }
}

/// `C = keep C + alpha A B` with A `m x k`, B `k x n`; `keep` is 0 or 1, and with 0 C is not read.
///
/// # Safety
/// The three views are valid for their extents, and C overlaps neither A nor B.
pub(super) unsafe fn gemm(
    [m, n, k]: [usize; 3],
    c: Matrix<*mut f32>,
    keep: bool,
    a: Matrix<*const f32>,
    b: Matrix<*const f32>,
    alpha: f32,
) {
    if m == 0 || n == 0 {
        return;
    }
    // SAFETY: by contract.
    unsafe {
        gemm::gemm(
            m,
            n,
            k,
            c.data,
            c.column as isize,
            c.row as isize,
            keep,
            a.data,
            a.column as isize,
            a.row as isize,
            b.data,
            b.column as isize,
            b.row as isize,
            if keep { 1.0 } else { 0.0 },
            alpha,
            false,
            false,
            false,
            gemm::Parallelism::None,
        );
    }
}

/// [`gemm`] where A is a tile of weights: by [`amx`] where that serves the views, with numbers of 16 bits if they may be
/// `rounded`.
///
/// # Safety
/// As of [`gemm`].
pub(super) unsafe fn weight_gemm(
    [m, n, k]: [usize; 3],
    c: Matrix<*mut f32>,
    keep: bool,
    a: Matrix<*const f32>,
    b: Matrix<*const f32>,
    alpha: f32,
    rounded: bool,
) {
    let serves = c.row == 1 && b.row == 1 && (a.row == 1 || a.column == 1);
    // SAFETY: by contract; there is such a unit.
    unsafe {
        if !(serves && amx::has()) {
            return gemm([m, n, k], c, keep, a, b, alpha);
        }
        let factor = amx::Factor::Memory(a.turned());
        amx::product(amx::Product {
            sizes: [n, m, k],
            a: b.turned(),
            b: factor,
            c: c.turned(),
            keep,
            alpha,
            rounded,
        });
    }
}

thread_local! {
    static SCRATCH: std::cell::RefCell<Vec<f32>> = const { std::cell::RefCell::new(Vec::new()) };
}

/// Lends this thread `n` floats of reused memory with arbitrary content.
pub(super) fn with_scratch<R>(n: usize, f: impl FnOnce(&mut [f32]) -> R) -> R {
    SCRATCH.with_borrow_mut(|scratch| {
        if scratch.len() < n {
            scratch.resize(n, 0.0);
        }
        f(&mut scratch[..n])
    })
}
