//! Rounding that does not eat the change.
//!
//! A base of few bits lies on its own grid. Where a change is smaller than half a step, rounding to nearest
//! puts every weight back where it was: not noise, but the change itself is lost. What an adapter does to an
//! input x it does through `A x`; so the error that counts is that within the rows of A:
//!
//! ```text
//! E_k := T - dequantise(quantise(T_k))                 T: merged weights, T_0 = T
//! T_(k+1) := T_k + E_k P,   P = A^T (A A^T)^-1 A       error feedback within the rows of A
//! ```
//!
//! Errors add up in `T_k` until some weights take the next step, and the sum over a row's weights comes out
//! right although each of them cannot. Any quantiser serves; the scales are chosen anew for each `T_k`. The
//! iterate with the least `||E P||` is taken, as long as its whole error stays within `NOISE` of rounding's.

use super::adapters::Delta;

/// The rows of all A's of a tensor, and what projects onto them.
pub(super) struct Feedback {
    rank: usize,
    /// `[n_in, rank]`
    a: Vec<f32>,
    /// `(A A^T)^-1`, rank x rank
    inverse: Vec<f64>,
}

impl Feedback {
    /// For these terms, of each expert; of a plain map there is one.
    pub fn of_experts(deltas: &[Delta]) -> Vec<Option<Feedback>> {
        let n_expert = deltas.first().map_or(0, |d| d.pair.n_expert);
        (0..n_expert).map(|expert| Feedback::new(deltas, expert)).collect()
    }

    fn new(deltas: &[Delta], expert: usize) -> Option<Feedback> {
        let rank: usize = deltas.iter().map(|d| d.pair.rank).sum();
        let n_in = deltas.first()?.pair.n_in;
        let a: Vec<f32> = deltas.iter().flat_map(|d| d.pair.expert(expert).0).copied().collect();
        let row = |r: usize| &a[r * n_in..(r + 1) * n_in];
        let mut gram = vec![0f64; rank * rank];
        for i in 0..rank {
            for j in 0..rank {
                gram[i * rank + j] = dot(row(i), row(j));
            }
        }
        // Rows that depend on others (a zero row, two adapters alike) leave the sum solvable.
        let trace: f64 = (0..rank).map(|i| gram[i * rank + i]).sum();
        for i in 0..rank {
            gram[i * rank + i] += 1e-6 * trace / rank as f64 + f64::MIN_POSITIVE;
        }
        let inverse = invert(gram, rank)?;
        Some(Feedback { rank, a, inverse })
    }

    /// `e A^T (A A^T)^-1` of rows `e: [n_in, n]`: `[rank, n]`, so that this times A is `e P`; and `||e P||^2`.
    pub fn project(&self, e: &[f32]) -> (Vec<f32>, f64) {
        let n_in = self.a.len() / self.rank;
        let mut out = Vec::with_capacity(e.len() / n_in * self.rank);
        let mut norm = 0.0;
        for e in e.chunks(n_in) {
            let u: Vec<f64> = self.a.chunks(n_in).map(|row| dot(e, row)).collect();
            for i in 0..self.rank {
                let x: f64 = (0..self.rank).map(|j| self.inverse[i * self.rank + j] * u[j]).sum();
                norm += x * u[i];
                out.push(x as f32);
            }
        }
        (out, norm)
    }

    /// The A's, one under another.
    pub fn a(&self) -> &[f32] {
        &self.a
    }

    /// Rows of A.
    pub fn rank(&self) -> usize {
        self.rank
    }
}

fn dot(a: &[f32], b: &[f32]) -> f64 {
    a.iter().zip(b).map(|(a, b)| *a as f64 * *b as f64).sum()
}

/// The inverse of a symmetric positive matrix, by elimination; none where it is singular.
fn invert(mut m: Vec<f64>, n: usize) -> Option<Vec<f64>> {
    let mut inverse = vec![0f64; n * n];
    for i in 0..n {
        inverse[i * n + i] = 1.0;
    }
    for i in 0..n {
        let pivot = m[i * n + i];
        if !(pivot > 0.0 && pivot.is_finite()) {
            return None;
        }
        for k in 0..n {
            m[i * n + k] /= pivot;
            inverse[i * n + k] /= pivot;
        }
        for j in (0..n).filter(|j| *j != i) {
            let factor = m[j * n + i];
            for k in 0..n {
                m[j * n + k] -= factor * m[i * n + k];
                inverse[j * n + k] -= factor * inverse[i * n + k];
            }
        }
    }
    Some(inverse)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::gguf::AdapterPair;

    #[test]
    fn what_lies_in_the_rows_of_a_is_projected_onto_itself() {
        let (n_in, rank) = (24, 3);
        let a: Vec<f32> = (0..n_in * rank).map(|i| ((i * 29 % 17) as f32 - 8.0) / 8.0).collect();
        let pair = AdapterPair {
            weight: "w".into(),
            rank,
            n_in,
            n_out: 1,
            n_expert: 1,
            a: a.clone(),
            b: vec![0.0; rank],
        };
        let feedback = Feedback::new(&[Delta { pair: &pair, scale: 1.0 }], 0).unwrap();
        // e = 2 a_0 - 0.5 a_2
        let e: Vec<f32> = (0..n_in).map(|k| 2.0 * a[k] - 0.5 * a[2 * n_in + k]).collect();
        let (u, norm) = feedback.project(&e);
        for (got, expected) in u.iter().zip([2.0, 0.0, -0.5]) {
            assert!((got - expected).abs() < 1e-3, "{u:?}");
        }
        assert!((norm - dot(&e, &e)).abs() < 1e-3 * norm);
    }
}
