//! Columns times the sigmoid of one number each: the gate of a shared expert.
//!
//! ```text
//! y[n, t] = s_t x[n, t]                 s = sigmoid(g)
//! dx[n, t] = s_t dy[n, t]               dg[t] = s_t (1 - s_t) sum_n dy[n, t] x[n, t]
//! ```

use std::ffi::{c_int, c_void};

use ggml_sys as sys;

use super::rows::{dot, rows_of, source_rows};
use crate::ggml::{Arena, Tensor, Type};

fn check(x: Tensor<'_>, gate: Tensor<'_>) {
    assert!(x.ty() == Type::F32 && x.is_contiguous(), "gate_rows of {x:?}");
    assert!(gate.ty() == Type::F32 && gate.is_contiguous(), "gate_rows by {gate:?}");
    assert_eq!(gate.shape(), [1, x.shape()[1], 1, 1], "gate_rows of {x:?} by {gate:?}");
}

/// `[n, T]` from `x: [n, T]` and `gate: [1, T]`.
pub fn gate_rows<'a>(arena: &'a Arena, x: Tensor<'a>, gate: Tensor<'a>) -> Tensor<'a> {
    check(x, gate);
    arena.custom(x.shape(), &[x, gate], forward, sys::BUPO_OP_GATE_ROWS)
}

/// Cotangents of x `[n, T]` and of the gate `[1, T]` from that of the result, `[n, T]`.
pub fn gate_rows_back<'a>(
    arena: &'a Arena,
    x: Tensor<'a>,
    gate: Tensor<'a>,
    dy: Tensor<'a>,
) -> (Tensor<'a>, Tensor<'a>) {
    check(x, gate);
    check(dy, gate);
    let [n, t, ..] = x.shape();
    // One node writes both: dx, then dg.
    let both =
        arena.custom([(n + 1) * t, 1, 1, 1], &[x, gate, dy], backward, sys::BUPO_OP_GATE_ROWS_BACK);
    (arena.part(both, 0, [n, t]), arena.part(both, n * t, [1, t]))
}

fn sigmoid(x: f32) -> f32 {
    1.0 / (1.0 + (-x).exp())
}

unsafe extern "C" fn forward(
    dst: *mut sys::ggml_tensor,
    ith: c_int,
    nth: c_int,
    _userdata: *mut c_void,
) {
    // SAFETY: `gate_rows` made this node: F32 contiguous, one number per row.
    unsafe {
        let (x, gate) = (source_rows(dst, 0), source_rows(dst, 1));
        for (y, i) in rows_of(dst, ith, nth).zip(x.range(ith, nth)) {
            let s = sigmoid(gate.row(i)[0]);
            y.iter_mut().zip(x.row(i)).for_each(|(y, x)| *y = s * x);
        }
    }
}

unsafe extern "C" fn backward(
    dst: *mut sys::ggml_tensor,
    ith: c_int,
    nth: c_int,
    _userdata: *mut c_void,
) {
    // SAFETY: `gate_rows_back` made this node: x [n, T], gate [1, T], dy [n, T]; row i of dx and number i of dg belong to
    // the thread that has row i of x.
    unsafe {
        let [x, gate, dy] = [0, 1, 2].map(|i| source_rows(dst, i));
        let (n, t) = ((*(*dst).src[0]).ne[0] as usize, (*(*dst).src[0]).ne[1] as usize);
        let out: *mut f32 = (*dst).data.cast();
        for i in x.range(ith, nth) {
            let s = sigmoid(gate.row(i)[0]);
            let dx = std::slice::from_raw_parts_mut(out.add(i * n), n);
            dx.iter_mut().zip(dy.row(i)).for_each(|(dx, dy)| *dx = s * dy);
            *out.add(n * t + i) = s * (1.0 - s) * dot(dy.row(i), x.row(i));
        }
    }
}
