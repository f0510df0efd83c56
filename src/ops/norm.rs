//! RMS norm with its weight, forward and vjp, on rows `[ne0]` of any tensor.
//!
//! `y_i = r x_i w_i`, `r = 1 / sqrt(mean(x^2) + eps)`
//!
//! `dx_i = r g_i - r^3 x_i sum_j(g_j x_j) / n (+ add_i)` with `g_i = dy_i w_i`
//!
//! ggml has both as separate nodes with a product between; here each is one pass over the row.

use std::ffi::{c_int, c_void};

use ggml_sys as sys;
use sys::bupo_norm_params as NormParams;

use super::rows::{dot, rows_of, source_rows};
use crate::ggml::{Arena, Tensor, Type};

fn check(x: Tensor<'_>, weight: Tensor<'_>) {
    assert!(x.ty() == Type::F32 && x.is_contiguous(), "rms_norm of {x:?}");
    let row = [x.shape()[0], 1, 1, 1];
    assert!(weight.ty() == Type::F32 && weight.shape() == row, "rms_norm of {x:?} by {weight:?}");
}

/// `x: [n, ..]` normalised per row and scaled by `weight: [n]`, both F32 and contiguous.
pub fn rms_norm<'a>(arena: &'a Arena, x: Tensor<'a>, weight: Tensor<'a>, eps: f32) -> Tensor<'a> {
    check(x, weight);
    let params = NormParams { op: sys::BUPO_OP_RMS_NORM, eps };
    arena.custom(x.shape(), &[x, weight], forward, params)
}

/// Cotangent of `x` from `dy`, plus `add`; all of x's shape, F32 and contiguous.
pub fn rms_norm_back<'a>(
    arena: &'a Arena,
    x: Tensor<'a>,
    weight: Tensor<'a>,
    dy: Tensor<'a>,
    add: Option<Tensor<'a>>,
    eps: f32,
) -> Tensor<'a> {
    check(x, weight);
    for t in [Some(dy), add].into_iter().flatten() {
        assert!(
            t.ty() == Type::F32 && t.is_contiguous() && t.shape() == x.shape(),
            "rms_norm_back: {t:?}"
        );
    }
    let params = NormParams { op: sys::BUPO_OP_RMS_NORM_BACK, eps };
    match add {
        Some(add) => arena.custom(x.shape(), &[x, weight, dy, add], backward, params),
        None => arena.custom(x.shape(), &[x, weight, dy], backward, params),
    }
}

fn inverse_rms(x: &[f32], eps: f32) -> f32 {
    1.0 / (dot(x, x) / x.len() as f32 + eps).sqrt()
}

unsafe extern "C" fn forward(
    dst: *mut sys::ggml_tensor,
    ith: c_int,
    nth: c_int,
    userdata: *mut c_void,
) {
    // SAFETY: `rms_norm` made this node: F32 contiguous sources of these shapes, NormParams as userdata.
    let (params, w) = unsafe { (&*userdata.cast::<NormParams>(), source_rows(dst, 1).row(0)) };
    // SAFETY: as above; each thread has its own rows of dst.
    for (y, x) in unsafe { rows_of(dst, ith, nth).zip(source_rows(dst, 0).part(ith, nth)) } {
        let r = inverse_rms(x, params.eps);
        for ((y, x), w) in y.iter_mut().zip(x).zip(w) {
            *y = r * x * w;
        }
    }
}

unsafe extern "C" fn backward(
    dst: *mut sys::ggml_tensor,
    ith: c_int,
    nth: c_int,
    userdata: *mut c_void,
) {
    // SAFETY: `rms_norm_back` made this node: F32 contiguous sources, NormParams as userdata.
    let (params, w) = unsafe { (&*userdata.cast::<NormParams>(), source_rows(dst, 1).row(0)) };
    // SAFETY: as above; each thread has its own rows of dst.
    let (xs, dys) = unsafe { (source_rows(dst, 0), source_rows(dst, 2)) };
    // SAFETY: a valid node; src[3] is null or a tensor of dst's shape.
    let add = unsafe { (!(*dst).src[3].is_null()).then(|| source_rows(dst, 3)) };
    // SAFETY: as above.
    let rows = unsafe { rows_of(dst, ith, nth) }.zip(xs.range(ith, nth));
    for (dx, i) in rows {
        // SAFETY: `i` is a row of dst, and the sources have as many.
        let (x, dy) = unsafe { (xs.row(i), dys.row(i)) };
        let r = inverse_rms(x, params.eps);
        let mut gx = 0.0;
        for ((dx, dy), w) in dx.iter_mut().zip(dy).zip(w) {
            *dx = dy * w;
        }
        gx += dot(dx, x);
        let c = r * r * r * gx / x.len() as f32;
        for (dx, x) in dx.iter_mut().zip(x) {
            *dx = r * *dx - c * x;
        }
        if let Some(add) = add {
            // SAFETY: as above.
            for (dx, a) in dx.iter_mut().zip(unsafe { add.row(i) }) {
                *dx += a;
            }
        }
    }
}
