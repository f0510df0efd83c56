//! Matrix products on one thread, by the `gemm` crate, on strided views of F32 memory; those with weights by what the processor
//! has for them, where it has anything.

use super::linear::Weight;
use super::{amx, fixed};
use crate::ggml::Device;
use crate::{Error, Result};

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

/// `C[t, n] = keep C + alpha sum_k A[t, k] B[k, n]`, of which B are weights.
// Elsewhere nothing reads what nobody multiplies.
#[cfg_attr(not(target_arch = "x86_64"), allow(dead_code))]
#[derive(Clone, Copy)]
pub(super) struct Product<'w> {
    /// t, n, k.
    pub sizes: [usize; 3],
    /// Rows are contiguous.
    pub a: Matrix<*const f32>,
    pub b: Factor<'w>,
    /// Rows are contiguous.
    pub c: Matrix<*mut f32>,
    /// Whether C is added to; else it is not read.
    pub keep: bool,
    pub alpha: f32,
    /// Whether numbers may be rounded to 16 bits of significand and less.
    pub rounded: bool,
}

/// B `[k, n]`.
#[cfg_attr(not(target_arch = "x86_64"), allow(dead_code))]
#[derive(Clone, Copy)]
pub(super) enum Factor<'w> {
    /// In memory; rows, or columns, are contiguous.
    Memory(Matrix<*const f32>),
    /// Columns are rows of a weight, from this one on.
    Columns(&'w Weight, usize),
    /// Rows are those of a weight, from this column of it on, a whole block's first.
    Rows(&'w Weight, usize),
}

/// What forms such products in gemm's place.
#[derive(Clone, Copy)]
pub(super) struct Unit {
    /// The views are valid for their extents, and C overlaps neither A nor B.
    pub product: unsafe fn(Product<'_>),
    /// Columns of B that it is best given at a time.
    pub columns: usize,
    /// Numbers that are summed up, up to which gemm is quicker with what lies in memory: packing is not worth it.
    pub short: usize,
}

/// The processor's matrix unit, where it has one; else, where numbers may be `rounded`, its products of whole numbers.
pub(super) fn weight_unit(rounded: bool) -> Option<Unit> {
    if amx::has() {
        Some(Unit { product: amx::product, columns: amx::COLUMNS, short: 0 })
    } else if rounded && fixed::has() {
        Some(Unit { product: fixed::product, columns: fixed::COLUMNS, short: 128 })
    } else {
        None
    }
}

/// Refuses `--fast-products` where nothing makes them faster.
///
/// # Errors
/// [`Error::Invalid`].
pub fn wants_fast_products(device: Device) -> Result<()> {
    let got = match device.is_host() {
        false => device.to_string(),
        true if weight_unit(true).is_none() => "one without".to_string(),
        true => return Ok(()),
    };
    let expected =
        "a processor with products of whole numbers (VNNI) or a matrix unit (AMX, on Linux)";
    Err(Error::invalid("--fast-products", expected, got, "leave it out: products are in F32 then"))
}

/// [`gemm`] where A is a tile of weights: by the [`weight_unit`] where that serves the views.
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
    let unit = weight_unit(rounded).filter(|unit| serves && k > unit.short);
    // SAFETY: by contract.
    unsafe {
        let Some(unit) = unit else { return gemm([m, n, k], c, keep, a, b, alpha) };
        (unit.product)(Product {
            sizes: [n, m, k],
            a: b.turned(),
            b: Factor::Memory(a.turned()),
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

/// Numbers between -1 and 1 for tests of products, the same for the same seed.
#[cfg(test)]
pub(super) fn values(n: usize, seed: u64) -> Vec<f32> {
    let mut state = seed;
    let mut next = || {
        state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (state >> 40) as f32 / (1 << 23) as f32 - 1.0
    };
    (0..n).map(|_| next()).collect()
}
