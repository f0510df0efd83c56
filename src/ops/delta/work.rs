//! What both directions share: a chunk's rows, its decays, its two triangles and the system that they make.

use std::ffi::c_void;
use std::ops::Range;

use ggml_sys as sys;

use super::Params;
use super::chunks::{CHUNK, Chunk};
use crate::ops::exp::exp;
use crate::ops::gemm::{Matrix, gemm};
use crate::ops::queue::Queue;
use crate::ops::rows::dot;

/// Floats between packed rows of a head: a power of two would put them on the same few cache lines.
const PAD: usize = 16;
/// Floats from one row of a triangle to the next.
pub(super) const LD: usize = CHUNK + PAD;
/// Rows of a diagonal block of the triangular systems.
const BLOCK: usize = 16;

/// Rows of a matrix, `row` floats apart.
#[derive(Clone, Copy)]
pub(super) struct View<'s> {
    data: &'s [f32],
    row: usize,
    column: usize,
}

/// Rows `ld` floats apart.
pub(super) fn rows(data: &[f32], ld: usize) -> View<'_> {
    View { data, row: ld, column: 1 }
}

/// The transpose of such rows.
pub(super) fn turned(data: &[f32], ld: usize) -> View<'_> {
    View { data, row: 1, column: ld }
}

impl View<'_> {
    fn matrix(&self, n: usize, m: usize) -> Matrix<*const f32> {
        assert!((n - 1) * self.row + (m - 1) * self.column < self.data.len());
        Matrix::new(self.data.as_ptr(), self.row, self.column)
    }
}

/// `C = keep C + alpha A B`, A `m x k`, B `k x n`; C's rows are `ld` floats apart.
pub(super) fn product(
    [m, n, k]: [usize; 3],
    (c, ld): (&mut [f32], usize),
    keep: bool,
    a: View<'_>,
    b: View<'_>,
    alpha: f32,
) {
    assert!((m - 1) * ld + n <= c.len());
    let c = Matrix::new(c.as_mut_ptr(), ld, 1);
    // SAFETY: all three lie within their slices, as just asserted and in `matrix`; C is borrowed alone.
    unsafe { gemm([m, n, k], c, keep, a.matrix(m, k), b.matrix(k, n), alpha) }
}

/// Cuts the next `n` floats off.
pub(super) fn take<'s>(rest: &mut &'s mut [f32], n: usize) -> &'s mut [f32] {
    let (part, behind) = std::mem::take(rest).split_at_mut(n);
    *rest = behind;
    part
}

/// What the kernels read.
pub(super) struct Job<'k> {
    pub trees: &'k [Vec<Chunk>],
    pub units: &'k Queue,
    pub n_k: usize,
    pub n_v: usize,
    /// d
    pub size: usize,
    pub t: usize,
    eps: f32,
    grouped: bool,
    qkv: *const f32,
    alpha: *const f32,
    beta: *const f32,
    decay: *const f32,
    bias: *const f32,
}

impl<'k> Job<'k> {
    /// # Safety
    /// `dst` is a node of `delta` or `delta_back`, `userdata` its parameters.
    pub(super) unsafe fn new(dst: *mut sys::ggml_tensor, userdata: *mut c_void) -> Job<'k> {
        // SAFETY: by contract: qkv, alpha, beta, decay, bias are sources 0 to 4, F32 contiguous of the checked shapes.
        unsafe {
            let params = &*userdata.cast::<Params>();
            let source = |i: usize| (*(*dst).src[i]).data as *const f32;
            Job {
                trees: &params.trees,
                units: &params.units,
                n_k: params.c.n_k as usize,
                n_v: params.c.n_v as usize,
                size: params.c.size as usize,
                t: (*(*dst).src[0]).ne[1] as usize,
                eps: params.c.eps,
                grouped: params.c.grouped != 0,
                qkv: source(0),
                alpha: source(1),
                beta: source(2),
                decay: source(3),
                bias: source(4),
            }
        }
    }

    /// Heads of q, k and v.
    pub(super) fn n_heads(&self) -> usize {
        2 * self.n_k + self.n_v
    }

    /// Value heads that read a key head.
    pub(super) fn value_heads(&self, key_head: usize) -> impl Iterator<Item = usize> {
        let group = self.n_v / self.n_k;
        match self.grouped {
            true => (key_head * group..(key_head + 1) * group).step_by(1),
            false => (key_head..self.n_v).step_by(self.n_k),
        }
    }

    /// Floats from one packed row to the next.
    pub(super) fn stride(&self) -> usize {
        self.size + PAD
    }

    /// Floats of a state.
    pub(super) fn state_len(&self) -> usize {
        self.size * self.size
    }

    /// The row of a token in one of the heads of q, k, v, which stand one after another.
    ///
    /// # Safety
    /// Both lie within the tensor.
    pub(super) unsafe fn row(&self, token: usize, head: usize) -> &'k [f32] {
        // SAFETY: by contract.
        unsafe {
            let at = self.qkv.add((token * self.n_heads() + head) * self.size);
            std::slice::from_raw_parts(at, self.size)
        }
    }

    /// Packs the rows of a head, each times what brings its length to `length`, and gives `1 / sqrt(|x|^2 + eps)`.
    ///
    /// # Safety
    /// As [`Job::row`], of all tokens.
    pub(super) unsafe fn pack_normed(
        &self,
        tokens: Range<usize>,
        head: usize,
        length: f32,
        packed: &mut [f32],
    ) -> [f32; CHUNK] {
        let mut inverse = [0.0; CHUNK];
        for ((to, token), inverse) in packed.chunks_mut(self.stride()).zip(tokens).zip(&mut inverse)
        {
            // SAFETY: by contract.
            let x = unsafe { self.row(token, head) };
            *inverse = 1.0 / (dot(x, x) + self.eps).sqrt();
            let factor = length * *inverse;
            for (y, x) in to.iter_mut().zip(x) {
                *y = factor * x;
            }
        }
        inverse
    }

    /// 1/sqrt(d), the length of a query.
    pub(super) fn query_length(&self) -> f32 {
        1.0 / (self.size as f32).sqrt()
    }

    /// The gates of a value head's tokens.
    ///
    /// # Safety
    /// Both lie within the tensors.
    pub(super) unsafe fn gates(&self, tokens: Range<usize>, head: usize) -> Gates {
        let n = tokens.len();
        let mut gates = Gates::default();
        // SAFETY: by contract.
        let (decay, bias) = unsafe { (*self.decay.add(head) as f64, *self.bias.add(head) as f64) };
        let mut sum = 0.0;
        for (i, token) in tokens.enumerate() {
            // SAFETY: by contract.
            let (a, b) = unsafe {
                let at = token * self.n_v + head;
                (*self.alpha.add(at) as f64 + bias, *self.beta.add(at))
            };
            // softplus and its slope; each without overflow and without cancellation.
            let small = (-a.abs()).exp();
            let softplus = a.max(0.0) + small.ln_1p();
            let slope = if a >= 0.0 { 1.0 } else { small } / (1.0 + small);
            sum += decay * softplus;
            gates.sum[i] = sum;
            gates.slope[i] = (decay * slope) as f32;
            gates.beta[i] = 1.0 / (1.0 + exp(-b));
            gates.rest[i] = 1.0 / (1.0 + exp(b));
        }
        for i in 0..n {
            gates.since[i] = exp(gates.sum[i] as f32);
            gates.until[i] = exp((sum - gates.sum[i]) as f32);
        }
        gates
    }
}

/// Gates of a chunk's tokens.
pub(super) struct Gates {
    /// beta
    pub beta: [f32; CHUNK],
    /// 1 - beta
    pub rest: [f32; CHUNK],
    /// dg / da
    pub slope: [f32; CHUNK],
    /// G
    sum: [f64; CHUNK],
    /// e^G
    pub since: [f32; CHUNK],
    /// e_n
    pub until: [f32; CHUNK],
}

impl Default for Gates {
    fn default() -> Gates {
        let zeros = [0.0; CHUNK];
        Gates {
            beta: zeros,
            rest: zeros,
            slope: zeros,
            sum: [0.0; CHUNK],
            since: zeros,
            until: zeros,
        }
    }
}

/// A chunk's queries and keys of one key head, and their products.
pub(super) struct Keys<'s> {
    /// Q and K: rows every [`Job::stride`] floats.
    pub q: &'s mut [f32],
    pub k: &'s mut [f32],
    /// `k'_t . k'_i` and `q'_t . k'_i`: rows every [`LD`] floats.
    kk: &'s mut [f32],
    qk: &'s mut [f32],
    /// `1 / sqrt(|q|^2 + eps)`, and that of k.
    pub q_inverse: [f32; CHUNK],
    pub k_inverse: [f32; CHUNK],
}

impl<'s> Keys<'s> {
    pub(super) fn floats(job: &Job<'_>) -> usize {
        2 * CHUNK * (job.stride() + LD)
    }

    pub(super) fn new(job: &Job<'_>, rest: &mut &'s mut [f32]) -> Keys<'s> {
        let mut packed = || take(rest, CHUNK * job.stride());
        let (q, k) = (packed(), packed());
        let mut triangle = || take(rest, CHUNK * LD);
        let (kk, qk) = (triangle(), triangle());
        Keys { q, k, kk, qk, q_inverse: [0.0; CHUNK], k_inverse: [0.0; CHUNK] }
    }

    /// # Safety
    /// Tokens and head lie within the tensors.
    pub(super) unsafe fn fill(&mut self, job: &Job<'_>, tokens: Range<usize>, head: usize) {
        let (n, d, ld) = (tokens.len(), job.size, job.stride());
        // SAFETY: by contract.
        unsafe {
            let length = job.query_length();
            self.q_inverse = job.pack_normed(tokens.clone(), head, length, self.q);
            self.k_inverse = job.pack_normed(tokens, job.n_k + head, 1.0, self.k);
        }
        let k = turned(self.k, ld);
        product([n, n, d], (self.kk, LD), false, rows(self.k, ld), k, 1.0);
        product([n, n, d], (self.qk, LD), false, rows(self.q, ld), k, 1.0);
    }
}

/// The triangles of one value head.
pub(super) struct Triangles<'s> {
    /// A, strictly lower.
    pub a: &'s mut [f32],
    /// M, lower.
    pub m: &'s mut [f32],
    /// e, lower.
    pub e: &'s mut [f32],
}

impl<'s> Triangles<'s> {
    pub(super) fn floats() -> usize {
        3 * CHUNK * LD
    }

    pub(super) fn new(rest: &mut &'s mut [f32]) -> Triangles<'s> {
        let mut triangle = || take(rest, CHUNK * LD);
        Triangles { a: triangle(), m: triangle(), e: triangle() }
    }

    pub(super) fn fill(&mut self, keys: &Keys<'_>, gates: &Gates, n: usize) {
        for t in 0..n {
            let at = t * LD..t * LD + n;
            let (a, m, e) =
                (&mut self.a[at.clone()], &mut self.m[at.clone()], &mut self.e[at.clone()]);
            let (kk, qk, own) = (&keys.kk[at.clone()], &keys.qk[at], gates.sum[t]);
            for (e, sum) in e[..=t].iter_mut().zip(&gates.sum) {
                *e = exp((own - sum) as f32);
            }
            for i in 0..=t {
                a[i] = e[i] * kk[i];
                m[i] = e[i] * qk[i];
            }
            a[t] = 0.0;
            for triangle in [a, m, e] {
                triangle[t + 1..].fill(0.0);
            }
        }
    }
}

/// `to += by x`
fn add(to: &mut [f32], by: f32, x: &[f32]) {
    for (to, x) in to.iter_mut().zip(x) {
        *to += by * x;
    }
}

/// Rows `ld` floats apart of `data` before row `i`, and row `i` of width `d`.
fn row_after(data: &mut [f32], i: usize, d: usize, ld: usize) -> (&[f32], &mut [f32]) {
    let (before, own) = data.split_at_mut(i * ld);
    (before, &mut own[..d])
}

/// Solves `z = y - A u`, `u = diag(beta) z` for z and u; z holds y at first.
pub(super) fn solve(
    a: &[f32],
    beta: &[f32],
    (z, u): (&mut [f32], &mut [f32]),
    [n, d, ld]: [usize; 3],
) {
    for first in (0..n).step_by(BLOCK) {
        let end = (first + BLOCK).min(n);
        for t in first..end {
            let (_, z) = row_after(z, t, d, ld);
            let (before, u) = row_after(u, t, d, ld);
            for i in first..t {
                add(z, -a[t * LD + i], &before[i * ld..][..d]);
            }
            for (u, z) in u.iter_mut().zip(z) {
                *u = beta[t] * *z;
            }
        }
        if end < n {
            let below = rows(&a[end * LD + first..], LD);
            let (size, known) = ([n - end, d, end - first], rows(&u[first * ld..], ld));
            product(size, (&mut z[end * ld..], ld), true, below, known, -1.0);
        }
    }
}

/// Solves `c = y - A^T dz`, `dz = diag(beta) c` for c and dz; c holds y at first.
pub(super) fn solve_back(
    a: &[f32],
    beta: &[f32],
    (c, dz): (&mut [f32], &mut [f32]),
    [n, d, ld]: [usize; 3],
) {
    for first in (0..n).step_by(BLOCK).rev() {
        let end = (first + BLOCK).min(n);
        for i in (first..end).rev() {
            let c = &mut c[i * ld..][..d];
            for t in i + 1..end {
                add(c, -a[t * LD + i], &dz[t * ld..][..d]);
            }
            for (dz, c) in dz[i * ld..][..d].iter_mut().zip(c) {
                *dz = beta[i] * *c;
            }
        }
        if first > 0 {
            let beside = turned(&a[first * LD..], LD);
            let (size, known) = ([first, d, end - first], rows(&dz[first * ld..], ld));
            product(size, (c, ld), true, beside, known, -1.0);
        }
    }
}

/// Rows of `from` times `by`, into `to`.
pub(super) fn scaled(from: &[f32], by: &[f32], to: &mut [f32], [n, d, ld]: [usize; 3]) {
    for t in 0..n {
        for (to, from) in to[t * ld..][..d].iter_mut().zip(&from[t * ld..][..d]) {
            *to = by[t] * from;
        }
    }
}
