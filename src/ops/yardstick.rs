//! The machine's own rate of F32 matrix products, to hold the ops against: measured beside them, since a
//! busy machine has another rate every second.

use std::time::{Duration, Instant};

use super::gemm::{Matrix, gemm};

/// `C = A B` of `n^3` multiply-adds by the same library as the ops', columns shared out over threads.
pub struct Yardstick {
    n: usize,
    threads: usize,
    a: Vec<f32>,
    b: Vec<f32>,
    c: Vec<f32>,
}

impl Yardstick {
    /// Square matrices of `n`. 2048 is beyond the caches and takes a tenth of a second or so.
    pub fn new(n: usize, threads: usize) -> Yardstick {
        let values = |seed: usize| (0..n * n).map(|i| ((i * seed) % 61) as f32 / 61.0).collect();
        Yardstick { n, threads: threads.max(1), a: values(7), b: values(13), c: vec![0.0; n * n] }
    }

    /// Floating-point operations of a run, 2 per multiply-add.
    pub fn flop(&self) -> f64 {
        2.0 * (self.n as f64).powi(3)
    }

    /// One product.
    pub fn run(&mut self) -> Duration {
        let n = self.n;
        let columns = n.div_ceil(self.threads);
        let start = Instant::now();
        std::thread::scope(|scope| {
            let parts = self.c.chunks_mut(columns * n).zip(self.b.chunks(columns * n));
            for (c, b) in parts {
                let a = &self.a;
                let mut work = move || {
                    let wide = c.len() / n;
                    // SAFETY: column-major matrices [n, n], [n, wide] and [n, wide] in these slices.
                    unsafe {
                        let (a, b) = (Matrix::new(a.as_ptr(), 1, n), Matrix::new(b.as_ptr(), 1, n));
                        gemm([n, wide, n], Matrix::new(c.as_mut_ptr(), 1, n), false, a, b, 1.0);
                    }
                };
                if self.threads == 1 { work() } else { drop(scope.spawn(work)) }
            }
        });
        start.elapsed()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_multiplies() {
        for threads in [1, 3] {
            let mut y = Yardstick::new(50, threads);
            y.run();
            let want: f32 = (0..50).map(|k| y.a[k * 50 + 3] * y.b[7 * 50 + k]).sum();
            assert!((y.c[7 * 50 + 3] - want).abs() < 1e-4 * want, "{} {want}", y.c[7 * 50 + 3]);
        }
    }
}
