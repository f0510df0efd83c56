//! Matrix products on one thread, by the `gemm` crate, on strided views of F32 memory.

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
