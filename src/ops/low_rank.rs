//! Low-rank products outside of our own graphs: added to rows of a plain matrix, which is how an adapter is
//! merged, and the one with B in llama.cpp's graphs.

use std::ffi::c_int;
use std::ops::Range;

use ggml_sys as sys;

use super::gemm::{Matrix, gemm};
use super::rows::partition;

/// Rows `rows` of `W += scale * B A`, on the calling thread.
///
/// `w`: those rows of W `[n_in, n_out]`; `a: [n_in, rank]`, `b: [rank, n_out]`, all F32, ggml order.
///
/// # Panics
/// When the lengths do not agree.
pub fn add_low_rank(
    w: &mut [f32],
    rows: Range<usize>,
    (a, b): (&[f32], &[f32]),
    rank: usize,
    scale: f32,
) {
    let n_in = a.len() / rank.max(1);
    assert_eq!(a.len(), n_in * rank, "A of rank {rank}");
    assert!(b.len().is_multiple_of(rank.max(1)) && rows.end * rank <= b.len(), "B of rank {rank}");
    assert_eq!(w.len(), n_in * rows.len(), "rows of {n_in}");
    if rank == 0 {
        return;
    }
    let w = Matrix::new(w.as_mut_ptr(), n_in, 1); // (n, k)
    let b = Matrix::new(b[rows.start * rank..].as_ptr(), rank, 1); // (n, r)
    let a = Matrix::new(a.as_ptr(), n_in, 1); // (r, k)
    // SAFETY: the views lie within slices of the lengths just checked; `w` is borrowed alone.
    unsafe { gemm([rows.len(), n_in, rank], w, true, b, a, scale) }
}

/// Outputs of one product: what a thread takes are some of these, so that how a sum is formed does not depend on how many
/// threads there are.
const OUTPUTS: usize = 64;

/// `y[n, t] = sum_r B[r, n] u[r, t]`, an adapter's second product while llama.cpp decodes. ggml would add up
/// each of these short sums across a vector of its own, and let threads write to neighbouring cache lines in
/// turn: with rank 16 on two threads a tenth of the time of a decode.
///
/// # Safety
/// The contract of `bupo_product`: `dst: [N, T]`, `src[0]` = B `[r, N]` and `src[1]` = u `[r, T]` are live,
/// contiguous F32 in host memory (T may be several extents), and each of the `nth` threads calls this with its own `ith`.
pub(crate) unsafe extern "C" fn factor_product(dst: *mut sys::ggml_tensor, ith: c_int, nth: c_int) {
    // SAFETY: by contract; threads write different rows of y.
    unsafe {
        let [b, u] = [(*dst).src[0], (*dst).src[1]];
        let (n_all, r) = ((*dst).ne[0] as usize, (*b).ne[0] as usize);
        let t = sys::ggml_nrows(dst) as usize;
        let u = Matrix::new((*u).data as *const f32, 1, r); // (r, t)
        for part in partition(n_all.div_ceil(OUTPUTS), ith, nth) {
            let ns = part * OUTPUTS..((part + 1) * OUTPUTS).min(n_all);
            let b = Matrix::new((*b).data.cast::<f32>().add(ns.start * r) as *const f32, r, 1); // (n, r)
            let y = Matrix::new((*dst).data.cast::<f32>().add(ns.start), 1, n_all); // (n, t)
            gemm([ns.len(), t, r], y, false, b, u, 1.0);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ggml::{Device, TensorSet};

    #[test]
    fn threads_make_the_factor_product_together() {
        let value = |i: usize| ((i * 29 % 17) as f32 - 8.0) / 8.0;
        for (r, n, t) in [(16, 40, 5), (3, 7, 1), (8, 64, 33)] {
            let shapes = [("b", [r, n, 1, 1]), ("u", [r, t, 1, 1]), ("y", [n, t, 1, 1])];
            let shapes = shapes.map(|(name, shape)| (name.to_string(), shape));
            let mut set = TensorSet::zeros(Device::Cpu, &shapes).unwrap();
            for i in 0..2 {
                let mut values = set.values_mut(i);
                values.iter_mut().enumerate().for_each(|(j, x)| *x = value(7 * i + j));
            }
            for threads in [1, 3] {
                set.values_mut(2).fill(f32::NAN);
                let [b, u, y] = [0, 1, 2].map(|i| set.get(i).raw());
                // SAFETY: live F32 matrices of these shapes; one caller after another.
                unsafe {
                    ((*y).src[0], (*y).src[1]) = (b, u);
                    (0..threads).for_each(|ith| factor_product(y, ith, threads));
                }
                for (i, got) in set.values(2).iter().enumerate() {
                    let (row, token) = (i % n, i / n);
                    let terms = (0..r).map(|k| value(row * r + k) * value(7 + token * r + k));
                    let expected: f32 = terms.sum();
                    assert!((got - expected).abs() < 1e-5, "{r} {n} {t}: {got} {expected}");
                }
            }
        }
    }

    #[test]
    fn agrees_with_plain_loops() {
        let (n_in, n_out, rank, scale) = (40, 24, 3, 0.7f32);
        let value = |i: usize| ((i * 29 % 17) as f32 - 8.0) / 8.0;
        let w: Vec<f32> = (0..n_in * n_out).map(value).collect();
        let a: Vec<f32> = (0..n_in * rank).map(|i| value(i + 5)).collect();
        let b: Vec<f32> = (0..n_out * rank).map(|i| value(i + 11)).collect();
        let rows = 5..19;
        let mut got = w[rows.start * n_in..rows.end * n_in].to_vec();
        add_low_rank(&mut got, rows.clone(), (&a, &b), rank, scale);
        for (row, got) in rows.zip(got.chunks(n_in)) {
            for (k, got) in got.iter().enumerate() {
                let ba: f64 =
                    (0..rank).map(|r| b[row * rank + r] as f64 * a[r * n_in + k] as f64).sum();
                let expected = w[row * n_in + k] as f64 + scale as f64 * ba;
                assert!((*got as f64 - expected).abs() < 1e-6, "row {row}, column {k}");
            }
        }
    }
}
