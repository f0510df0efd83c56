//! Linear maps with weights of any GGUF type and exact activations, their vjp, and outer products.
//!
//! ```text
//! linear       y[n, t]  = sum_k W[k, n] x[k, t] + scale sum_r B[r, n] u[r, t] + bias[n]
//! linear_back  dx[k, t] = sum_n W[k, n] dy[n, t] + scale sum_r A[k, r] du[r, t] + add[k, t]
//! outer        g[k, n] += scale sum_t x[k, t] dy[n, t]
//! ```
//!
//! `W: [K, N]` is dequantised once per tile and call, never once per token, and never as a whole: a tile
//! fits the L2 cache. F32 weights are read where they lie. Forward: threads share out the N outputs.
//! Backward: they share out K in whole blocks of the type, so that no block is dequantised twice.

use std::ffi::{c_int, c_void};
use std::ops::Range;

use ggml_sys as sys;

use super::gemm::{Matrix, gemm, with_scratch};
use super::rows::partition;
use crate::ggml::{Arena, Tensor, Type};

/// Floats of a dequantised tile: 512 KiB, half of a usual L2 cache.
const TILE: usize = 128 * 1024;
/// Columns of K that threads are given at once in the backward, where the type's blocks are smaller.
const K_STEP: usize = 64;

/// A low-rank term: `scale * factor * input`.
#[derive(Clone, Copy)]
pub struct LowRank<'a> {
    /// B `[r, N]` in [`linear`], A `[K, r]` in [`linear_back`]; F32.
    pub factor: Tensor<'a>,
    /// u `[r, T]` in [`linear`], du `[r, T]` in [`linear_back`]; F32.
    pub input: Tensor<'a>,
    /// Scale.
    pub scale: f32,
}

fn f32_matrix(what: &str, t: Tensor<'_>, shape: [usize; 2]) {
    assert!(t.ty() == Type::F32 && t.is_contiguous(), "{what}: F32 and contiguous, got {t:?}");
    assert_eq!(t.shape(), [shape[0], shape[1], 1, 1], "{what}: {t:?}");
}

fn weight_matrix(w: Tensor<'_>) -> [usize; 2] {
    let [k, n, rest, more] = w.shape();
    assert!(rest == 1 && more == 1 && w.is_contiguous(), "weight {w:?}: a contiguous matrix");
    assert!(w.ty().can_dequantize(), "weight {w:?}: a type with a converter to F32");
    [k, n]
}

/// `y: [N, T]` from `w: [K, N]` of any type and `x: [K, T]` F32; `bias: [N]` F32.
pub fn linear<'a>(
    arena: &'a Arena,
    w: Tensor<'a>,
    x: Tensor<'a>,
    low: Option<LowRank<'a>>,
    bias: Option<Tensor<'a>>,
) -> Tensor<'a> {
    let [k, n] = weight_matrix(w);
    let t = x.shape()[1];
    f32_matrix("linear x", x, [k, t]);
    let mut sources = vec![w, x];
    if let Some(low) = low {
        let r = low.factor.shape()[0];
        f32_matrix("linear factor", low.factor, [r, n]);
        f32_matrix("linear low-rank input", low.input, [r, t]);
        sources.extend([low.factor, low.input]);
    }
    if let Some(bias) = bias {
        f32_matrix("linear bias", bias, [n, 1]);
        sources.push(bias);
    }
    let params = sys::bupo_linear_params {
        op: sys::BUPO_OP_LINEAR,
        scale: low.map_or(0.0, |l| l.scale),
        low_rank: low.is_some() as u32,
        bias: bias.is_some() as u32,
        add: 0,
    };
    arena.custom([n, t, 1, 1], &sources, linear_kernel, params)
}

/// `dx: [K, T]` from `w: [K, N]` of any type and `dy: [N, T]` F32; `add: [K, T]` F32.
pub fn linear_back<'a>(
    arena: &'a Arena,
    w: Tensor<'a>,
    dy: Tensor<'a>,
    low: Option<LowRank<'a>>,
    add: Option<Tensor<'a>>,
) -> Tensor<'a> {
    let [k, n] = weight_matrix(w);
    let t = dy.shape()[1];
    f32_matrix("linear_back dy", dy, [n, t]);
    let mut sources = vec![w, dy];
    if let Some(low) = low {
        let r = low.factor.shape()[1];
        f32_matrix("linear_back factor", low.factor, [k, r]);
        f32_matrix("linear_back low-rank input", low.input, [r, t]);
        sources.extend([low.factor, low.input]);
    }
    if let Some(add) = add {
        f32_matrix("linear_back add", add, [k, t]);
        sources.push(add);
    }
    let params = sys::bupo_linear_params {
        op: sys::BUPO_OP_LINEAR_BACK,
        scale: low.map_or(0.0, |l| l.scale),
        low_rank: low.is_some() as u32,
        bias: 0,
        add: add.is_some() as u32,
    };
    arena.custom([k, t, 1, 1], &sources, linear_back_kernel, params)
}

/// Adds `scale * x dy^T` to `g: [K, N]` in place, from `x: [K, T]` and `dy: [N, T]`, all F32.
pub fn outer<'a>(
    arena: &'a Arena,
    g: Tensor<'a>,
    x: Tensor<'a>,
    dy: Tensor<'a>,
    scale: f32,
) -> Tensor<'a> {
    let [k, n, ..] = g.shape();
    f32_matrix("outer g", g, [k, n]);
    f32_matrix("outer x", x, [k, x.shape()[1]]);
    f32_matrix("outer dy", dy, [n, x.shape()[1]]);
    let params =
        sys::bupo_linear_params { op: sys::BUPO_OP_OUTER, scale, low_rank: 0, bias: 0, add: 0 };
    arena.custom_inplace(g, &[x, dy], outer_kernel, params)
}

/// A weight as the kernels read it.
pub(super) struct Weight {
    ty: Type,
    data: *const u8,
    row_bytes: usize,
}

impl Weight {
    /// # Safety
    /// `tensor` is a live, contiguous matrix in host memory.
    pub(super) unsafe fn new(tensor: *const sys::ggml_tensor) -> Weight {
        // SAFETY: by contract.
        let (raw, data, row_bytes) = unsafe { ((*tensor).type_, (*tensor).data, (*tensor).nb[1]) };
        let ty = Type::from_raw(raw as u32).expect("a live tensor has a known type");
        Weight { ty, data: data.cast(), row_bytes }
    }

    /// Whether tiles are read in place, without scratch.
    pub(super) fn is_f32(&self) -> bool {
        self.ty == Type::F32
    }

    /// Columns `ks` (whole blocks) of rows `ns`: a matrix whose rows are rows of W.
    ///
    /// # Safety
    /// The ranges lie within the tensor; `scratch` has room for the tile.
    pub(super) unsafe fn tile(
        &self,
        ns: Range<usize>,
        ks: Range<usize>,
        scratch: &mut [f32],
    ) -> Matrix<*const f32> {
        let skip = ks.start / self.ty.block_size() * self.ty.block_bytes();
        // SAFETY: within the tensor by contract.
        let from = |n: usize| unsafe { self.data.add(n * self.row_bytes + skip) };
        if self.ty == Type::F32 {
            return Matrix::new(from(ns.start).cast(), self.row_bytes / 4, 1);
        }
        let width = ks.len();
        for (row, n) in scratch.chunks_exact_mut(width).zip(ns) {
            // SAFETY: `width` elements of whole blocks of a row.
            unsafe { self.ty.dequantize_raw(from(n), row) };
        }
        Matrix::new(scratch.as_ptr(), width, 1)
    }
}

unsafe fn f32_data(tensor: *const sys::ggml_tensor) -> *mut f32 {
    // SAFETY: the caller's sources are live tensors.
    unsafe { (*tensor).data.cast() }
}

unsafe extern "C" fn linear_kernel(
    dst: *mut sys::ggml_tensor,
    ith: c_int,
    nth: c_int,
    userdata: *mut c_void,
) {
    // SAFETY: `linear` made this node: its sources, shapes and parameters are as checked there; each
    // thread writes its own outputs n only.
    unsafe {
        let params = &*userdata.cast::<sys::bupo_linear_params>();
        let (n_all, t) = ((*dst).ne[0] as usize, (*dst).ne[1] as usize);
        let src = &(*dst).src;
        let k = (*src[0]).ne[0] as usize;
        let weight = Weight::new(src[0]);
        let x = Matrix::new(f32_data(src[1]) as *const f32, 1, k); // [K, T]: (k, t)
        let y = f32_data(dst);
        let step = (TILE / k).clamp(8, 256);
        let mine = partition(n_all, ith, nth);
        with_scratch(if weight.is_f32() { 0 } else { step * k }, |scratch| {
            for start in mine.clone().step_by(step) {
                let ns = start..(start + step).min(mine.end);
                let tile = weight.tile(ns.clone(), 0..k, scratch); // (n, k)
                let out = Matrix::new(y.add(ns.start), 1, n_all); // (n, t)
                gemm([ns.len(), t, k], out, false, tile, x, 1.0);
            }
        });
        if params.low_rank != 0 {
            let r = (*src[2]).ne[0] as usize;
            let b = Matrix::new(f32_data(src[2]).add(mine.start * r) as *const f32, r, 1); // (n, r)
            let u = Matrix::new(f32_data(src[3]) as *const f32, 1, r); // (r, t)
            let out = Matrix::new(y.add(mine.start), 1, n_all);
            gemm([mine.len(), t, r], out, true, b, u, params.scale);
        }
        if params.bias != 0 {
            let bias = f32_data(src[2 + 2 * params.low_rank as usize]);
            let bias = std::slice::from_raw_parts(bias.add(mine.start), mine.len());
            for t in 0..t {
                let y = std::slice::from_raw_parts_mut(y.add(t * n_all + mine.start), mine.len());
                for (y, b) in y.iter_mut().zip(bias) {
                    *y += b;
                }
            }
        }
    }
}

/// This thread's part of a `K x T` result: K in steps of `unit`, and T too when there are more threads
/// than such steps.
fn split(k: usize, t: usize, unit: usize, ith: c_int, nth: c_int) -> (Range<usize>, Range<usize>) {
    let steps = k.div_ceil(unit);
    let over_k = steps.min(nth as usize);
    let over_t = nth as usize / over_k;
    let (ik, it) = (ith as usize % over_k, ith as usize / over_k);
    if it >= over_t {
        return (0..0, 0..0);
    }
    let ks = partition(steps, ik as c_int, over_k as c_int);
    let ks = ks.start * unit..(ks.end * unit).min(k);
    (ks, partition(t, it as c_int, over_t as c_int))
}

unsafe extern "C" fn linear_back_kernel(
    dst: *mut sys::ggml_tensor,
    ith: c_int,
    nth: c_int,
    userdata: *mut c_void,
) {
    // SAFETY: `linear_back` made this node: its sources, shapes and parameters are as checked there;
    // each thread writes its own (k, t) only.
    unsafe {
        let params = &*userdata.cast::<sys::bupo_linear_params>();
        let (k, t) = ((*dst).ne[0] as usize, (*dst).ne[1] as usize);
        let src = &(*dst).src;
        let n_all = (*src[0]).ne[1] as usize;
        let weight = Weight::new(src[0]);
        let unit = weight.ty.block_size().max(K_STEP);
        let (ks, ts) = split(k, t, unit, ith, nth);
        if ks.is_empty() || ts.is_empty() {
            return;
        }
        let out = Matrix::new(f32_data(dst).add(ts.start * k + ks.start), 1, k); // (k, t)
        let extent = |inner| [ks.len(), ts.len(), inner];
        let mut keep = params.add != 0;
        if keep {
            let add = f32_data(src[2 + 2 * params.low_rank as usize]);
            for t in 0..ts.len() {
                let from = add.add((ts.start + t) * k + ks.start);
                std::ptr::copy_nonoverlapping(from, out.data.add(t * k), ks.len());
            }
        }
        let step = (TILE / ks.len()).clamp(8, n_all.max(8));
        with_scratch(if weight.is_f32() { 0 } else { step * ks.len() }, |scratch| {
            for start in (0..n_all).step_by(step) {
                let ns = start..(start + step).min(n_all);
                let tile = weight.tile(ns.clone(), ks.clone(), scratch); // (n, k)
                let tile = Matrix::new(tile.data, tile.column, tile.row); // (k, n)
                let dy = f32_data(src[1]).add(ts.start * n_all + ns.start) as *const f32;
                gemm(extent(ns.len()), out, keep, tile, Matrix::new(dy, 1, n_all), 1.0);
                keep = true;
            }
        });
        if params.low_rank != 0 {
            let r = (*src[2]).ne[1] as usize;
            let a = Matrix::new(f32_data(src[2]).add(ks.start) as *const f32, 1, k); // (k, r)
            let du = f32_data(src[3]).add(ts.start * r) as *const f32;
            gemm(extent(r), out, true, a, Matrix::new(du, 1, r), params.scale);
        }
    }
}

unsafe extern "C" fn outer_kernel(
    dst: *mut sys::ggml_tensor,
    ith: c_int,
    nth: c_int,
    userdata: *mut c_void,
) {
    // SAFETY: `outer` made this node: src[0] is g, of which dst is a view; then x and dy, shapes as
    // checked there; each thread writes its own part of g only.
    unsafe {
        let params = &*userdata.cast::<sys::bupo_linear_params>();
        let (k, n) = ((*dst).ne[0] as usize, (*dst).ne[1] as usize);
        let src = &(*dst).src;
        let t = (*src[1]).ne[1] as usize;
        let (mut ks, mut ns) = (0..k, 0..n);
        if k >= n {
            ks = partition(k, ith, nth);
        } else {
            ns = partition(n, ith, nth);
        }
        let g = Matrix::new(f32_data(dst).add(ns.start * k + ks.start), 1, k); // (k, n)
        let x = Matrix::new(f32_data(src[1]).add(ks.start) as *const f32, 1, k); // (k, t)
        let dy = Matrix::new(f32_data(src[2]).add(ns.start) as *const f32, n, 1); // (t, n)
        gemm([ks.len(), ns.len(), t], g, true, x, dy, params.scale);
    }
}
