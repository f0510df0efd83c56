//! A low-rank product added to rows of a plain matrix: how an adapter is merged.

use std::ops::Range;

use super::gemm::{Matrix, gemm};

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

#[cfg(test)]
mod tests {
    use super::*;

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
