//! From hidden states to logits: what the ops over the vocabulary have in common.

use std::ops::Range;

use ggml_sys as sys;

use super::exp::softcap;
use super::gemm::{Matrix, gemm, weight_gemm};
use super::linear::{LowRank, Weight};
use super::rows::{dot, rounded};
use crate::ggml::{Tensor, Type};

/// `logits(x) = c tanh(z / c)`, `z = scale * E_u x`; `logits = z` without a softcap c. A temperature divides
/// logits after the softcap.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct LogitMap {
    /// Of the products with the unembedding.
    pub scale: f32,
    /// c, above 0.
    pub softcap: Option<f32>,
}

impl Default for LogitMap {
    /// The products as they stand.
    fn default() -> LogitMap {
        LogitMap { scale: 1.0, softcap: None }
    }
}

/// What the logits of some hidden states are made of: `z = map.scale (E_u h + low.scale B u)`.
#[derive(Clone, Copy)]
pub struct Head<'a> {
    /// h: `[D, T]` F32, contiguous.
    pub hidden: Tensor<'a>,
    /// E_u: `[D, V]` of any type.
    pub unembedding: Tensor<'a>,
    /// An adapter's term: B `[r, V]`, and u = A h, `[r, T]`.
    pub low: Option<LowRank<'a>>,
    /// Scale and softcap.
    pub map: LogitMap,
}

impl<'a> Head<'a> {
    /// A head without an adapter.
    pub fn new(hidden: Tensor<'a>, unembedding: Tensor<'a>, map: LogitMap) -> Head<'a> {
        Head { hidden, unembedding, low: None, map }
    }

    /// Hidden states and unembedding, which must fit: the first two sources of `op`.
    pub(super) fn sources(&self, op: &str) -> Vec<Tensor<'a>> {
        let Head { hidden: h, unembedding: e_u, .. } = *self;
        assert!(h.ty() == Type::F32 && h.is_contiguous(), "{op} of {h:?}");
        let fits = e_u.shape()[0] == h.shape()[0] && e_u.ty().can_dequantize();
        assert!(fits, "{op}: {h:?} by {e_u:?}");
        vec![h, e_u]
    }

    /// The kernels' parameters; the low-rank term's factor and input become the last of `sources`.
    pub(super) fn params(&self, op: &str, sources: &mut Vec<Tensor<'a>>) -> sys::bupo_logit_map {
        let LogitMap { scale, softcap } = self.map;
        assert!(scale.is_finite(), "a scale of logits, got {scale}");
        let mut params = sys::bupo_logit_map {
            scale,
            softcap: softcap_param(softcap),
            low_rank: 0,
            low_scale: 0.0,
        };
        if let Some(low) = self.low {
            let [r, v] = [low.factor.shape()[0], self.unembedding.shape()[1]];
            (params.low_rank, params.low_scale) = (sources.len() as u32, low.scale);
            sources.extend(low.sources(op, [r, v], [r, self.hidden.shape()[1]]));
        }
        params
    }
}

/// A [`Head`] as the kernels on the CPU read it.
pub(super) struct RawHead {
    /// D.
    pub d: usize,
    /// Columns.
    pub t: usize,
    /// V.
    pub v: usize,
    /// Of the low-rank term; 0 without.
    pub rank: usize,
    /// Scale and softcap.
    pub map: LogitMap,
    h: *const f32,
    unembedding: Weight,
    // B [r, V], u [r, T], and their scale.
    factor: *const f32,
    input: *const f32,
    low_scale: f32,
    rounded: bool,
}

impl RawHead {
    /// # Safety
    /// Sources `first` and `first + 1` of `dst` are those of [`Head::sources`], and the parameters those that
    /// [`Head::params`] made; all are live and in host memory.
    pub(super) unsafe fn new(
        dst: *const sys::ggml_tensor,
        first: usize,
        params: sys::bupo_logit_map,
    ) -> RawHead {
        // SAFETY: by contract.
        unsafe {
            let src = &(*dst).src;
            let (h, e_u) = (src[first], src[first + 1]);
            let mut head = RawHead {
                d: (*h).ne[0] as usize,
                t: (*h).ne[1] as usize,
                v: (*e_u).ne[1] as usize,
                rank: 0,
                map: LogitMap { scale: params.scale, softcap: softcap_of(params.softcap) },
                h: (*h).data.cast(),
                unembedding: Weight::new(e_u),
                factor: std::ptr::null(),
                input: std::ptr::null(),
                low_scale: params.low_scale,
                rounded: rounded(dst),
            };
            if params.low_rank > 0 {
                let at = params.low_rank as usize;
                head.rank = (*src[at]).ne[0] as usize;
                head.factor = (*src[at]).data.cast();
                head.input = (*src[at + 1]).data.cast();
            }
            head
        }
    }

    /// Floats of scratch that [`RawHead::tile`] takes.
    pub(super) fn scratch(&self, rows: usize) -> usize {
        self.unembedding.scratch(rows, self.d)
    }

    /// Rows `vs` of E_u.
    ///
    /// # Safety
    /// They lie within it, and `scratch` has room for them.
    pub(super) unsafe fn tile(&self, vs: Range<usize>, scratch: &mut [f32]) -> Matrix<*const f32> {
        // SAFETY: by contract.
        unsafe { self.unembedding.tile(vs, 0..self.d, scratch) }
    }

    /// Rows `vs` of B, `(v, r)`.
    ///
    /// # Safety
    /// There is a low-rank term, and they lie within it.
    unsafe fn factor(&self, vs: &Range<usize>) -> Matrix<*const f32> {
        // SAFETY: by contract.
        Matrix::new(unsafe { self.factor.add(vs.start * self.rank) }, self.rank, 1)
    }

    /// `alpha (E_u h + low_scale B u)` of rows `vs`, whose tile is `e`, and columns `ts`: `(v, t)`, a column of
    /// `vs.len()` values after another in `products`.
    ///
    /// # Safety
    /// Both ranges lie within the sources.
    pub(super) unsafe fn multiply(
        &self,
        e: Matrix<*const f32>,
        vs: &Range<usize>,
        ts: Range<usize>,
        products: &mut [f32],
        alpha: f32,
    ) {
        let (width, n) = (vs.len(), ts.len());
        assert!(products.len() >= width * n, "room for products");
        let out = Matrix::new(products.as_mut_ptr(), 1, width); // (v, t)
        // SAFETY: by contract, and the room just checked.
        unsafe {
            let h = Matrix::new(self.h.add(ts.start * self.d), 1, self.d); // (d, t)
            weight_gemm([width, n, self.d], out, false, e, h, alpha, self.rounded);
            if self.rank > 0 {
                let u = Matrix::new(self.input.add(ts.start * self.rank), 1, self.rank); // (r, t)
                let alpha = alpha * self.low_scale;
                gemm([width, n, self.rank], out, true, self.factor(vs), u, alpha);
            }
        }
    }

    /// Adds rows `vs` of E_u, whose tile is `e`, and of `low_scale B`, weighted by `p: (v, t)`, to `sums`:
    /// `[D + r, n]`.
    ///
    /// # Safety
    /// The rows lie within the sources.
    pub(super) unsafe fn add_rows(
        &self,
        e: Matrix<*const f32>,
        vs: &Range<usize>,
        p: &[f32],
        sums: &mut [f32],
    ) {
        let width = self.d + self.rank;
        let n = sums.len() / width;
        assert!(p.len() >= vs.len() * n, "a weight for each row and column");
        let p = Matrix::new(p.as_ptr(), 1, vs.len()); // (v, t)
        // SAFETY: by contract, and `sums` has n columns.
        unsafe {
            let out = Matrix::new(sums.as_mut_ptr(), 1, width); // (d, t)
            let e = Matrix::new(e.data, e.column, e.row); // (d, v)
            weight_gemm([self.d, n, vs.len()], out, true, e, p, 1.0, self.rounded);
            if self.rank > 0 {
                let out = Matrix::new(out.data.add(self.d), 1, width); // (r, t)
                let b = self.factor(vs);
                let b = Matrix::new(b.data, b.column, b.row); // (r, v)
                gemm([self.rank, n, vs.len()], out, true, b, p, self.low_scale);
            }
        }
    }

    /// Row `v` of E_u and, behind it, of `low_scale B`: `[D + r]`, into `out`. `scratch` has room for a row.
    ///
    /// # Safety
    /// It lies within the sources.
    pub(super) unsafe fn row(&self, v: usize, scratch: &mut [f32], out: &mut [f32]) {
        let (own, low) = out.split_at_mut(self.d);
        // SAFETY: by contract.
        unsafe {
            let e = self.tile(v..v + 1, scratch);
            own.copy_from_slice(std::slice::from_raw_parts(e.data, self.d));
            for (i, low) in low[..self.rank].iter_mut().enumerate() {
                *low = self.low_scale * *self.factor.add(v * self.rank + i);
            }
        }
    }

    /// The logit of row `v`, given as [`RawHead::row`] has it, and column `t`.
    ///
    /// # Safety
    /// The column lies within the sources.
    pub(super) unsafe fn logit(&self, row: &[f32], t: usize) -> f32 {
        let (e, b) = row.split_at(self.d);
        // SAFETY: by contract.
        let (h, u) = unsafe {
            let h = std::slice::from_raw_parts(self.h.add(t * self.d), self.d);
            let u: &[f32] = match self.rank {
                0 => &[],
                r => std::slice::from_raw_parts(self.input.add(t * r), r),
            };
            (h, u)
        };
        let mut logit = [self.map.scale * (dot(e, h) + dot(b, u))];
        self.map.cap(&mut logit);
        logit[0]
    }
}

impl LogitMap {
    /// Logits of the scaled products `z`, in place.
    pub(super) fn cap(&self, z: &mut [f32]) {
        if let Some(c) = self.softcap {
            z.iter_mut().for_each(|z| *z = softcap(*z, c).0);
        }
    }
}

/// A softcap as the kernels' parameters have it: 0 for none.
pub(super) fn softcap_param(softcap: Option<f32>) -> f32 {
    assert!(softcap.is_none_or(|c| c > 0.0 && c.is_finite()), "a softcap above 0, got {softcap:?}");
    softcap.unwrap_or(0.0)
}

/// The softcap that a parameter stands for.
pub(super) fn softcap_of(param: f32) -> Option<f32> {
    (param > 0.0).then_some(param)
}
