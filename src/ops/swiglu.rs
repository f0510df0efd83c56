//! `h = silu(g) * u` and its vjp.
//!
//! With `s = sigmoid(g)`: `dg = dh * u * s * (1 + g (1 - s))`, `du = dh * g * s`.

use std::ffi::{c_int, c_void};

use ggml_sys as sys;

use super::exp::exp;
use super::rows::{rows_of, source_rows};
use crate::ggml::{Arena, Tensor, Type};

fn check(tensors: &[Tensor<'_>]) {
    for t in tensors {
        assert!(t.ty() == Type::F32 && t.is_contiguous(), "swiglu of {t:?}");
        assert_eq!(t.shape(), tensors[0].shape(), "swiglu of {tensors:?}");
    }
}

/// `silu(gate) * up`, both `[n, T]`, F32 and contiguous.
pub fn swiglu<'a>(arena: &'a Arena, gate: Tensor<'a>, up: Tensor<'a>) -> Tensor<'a> {
    check(&[gate, up]);
    arena.custom(gate.shape(), &[gate, up], forward, sys::BUPO_OP_SWIGLU)
}

/// Cotangents of gate and up, each `[n, T]`.
pub fn swiglu_back<'a>(
    arena: &'a Arena,
    gate: Tensor<'a>,
    up: Tensor<'a>,
    dh: Tensor<'a>,
) -> (Tensor<'a>, Tensor<'a>) {
    check(&[gate, up, dh]);
    let [n, t, ..] = gate.shape();
    // One node writes both: rows [0, T) are d gate, [T, 2 T) are d up.
    let both = arena.custom([n, 2 * t, 1, 1], &[gate, up, dh], backward, sys::BUPO_OP_SWIGLU_BACK);
    (arena.row_range(both, 0, t), arena.row_range(both, t, t))
}

fn sigmoid(x: f32) -> f32 {
    1.0 / (1.0 + exp(-x))
}

unsafe extern "C" fn forward(
    dst: *mut sys::ggml_tensor,
    ith: c_int,
    nth: c_int,
    _userdata: *mut c_void,
) {
    // SAFETY: `swiglu` made this node: F32 contiguous sources of dst's shape.
    unsafe {
        let gate = source_rows(dst, 0).part(ith, nth);
        let up = source_rows(dst, 1).part(ith, nth);
        for ((h, g), u) in rows_of(dst, ith, nth).zip(gate).zip(up) {
            for ((h, &g), u) in h.iter_mut().zip(g).zip(u) {
                *h = g * sigmoid(g) * u;
            }
        }
    }
}

unsafe extern "C" fn backward(
    dst: *mut sys::ggml_tensor,
    ith: c_int,
    nth: c_int,
    _userdata: *mut c_void,
) {
    // SAFETY: `swiglu_back` made this node: F32 contiguous sources [n, T], dst [n, 2 T]; row i and row
    // T + i of dst belong to the thread that has row i of the sources.
    unsafe {
        let (gate, up, dh) = (source_rows(dst, 0), source_rows(dst, 1), source_rows(dst, 2));
        let (n, t) = ((*dst).ne[0] as usize, (*dst).ne[1] as usize / 2);
        let out: *mut f32 = (*dst).data.cast();
        for i in gate.range(ith, nth) {
            let dg = std::slice::from_raw_parts_mut(out.add(i * n), n);
            let du = std::slice::from_raw_parts_mut(out.add((t + i) * n), n);
            let rows = gate.row(i).iter().zip(up.row(i)).zip(dh.row(i));
            for (((&g, u), dh), (dg, du)) in rows.zip(dg.iter_mut().zip(du)) {
                let s = sigmoid(g);
                *du = dh * g * s;
                *dg = dh * u * s * (1.0 + g * (1.0 - s));
            }
        }
    }
}
