//! `y = act(g) * u`, the gate of an FFN, of an attention's result or of a normalised one, and its vjp.
//!
//! With `s = sigmoid(w)`:
//!
//! ```text
//! SiLU     act = g s   act' = s (1 + g w' (1 - s))   w = g
//! GELU     the same, w = 2 sqrt(2/pi) (g + 0.044715 g^3), for (1 + tanh(w/2)) / 2 = sigmoid(w): GELU's tanh form
//! sigmoid  act = s     act' = s (1 - s)              w = g
//! dg = dy * u * act'(g)            du = dy * act(g)
//! ```
//!
//! gpt-oss has a gate and a line that are cut off (`SWIGLU_OAI` in llama.cpp):
//!
//! ```text
//! a = min(g, 7), b = min(max(u, -7), 7), s = sigmoid(1.702 a)          y = a s (b + 1)
//! dg = dy (b + 1) s (1 + 1.702 a (1 - s)) where g <= 7                  du = dy a s where |u| <= 7
//! ```
//!
//! GELU is computed as it stands here; llama.cpp's CPU backend looks it up in a table of half floats.

use std::ffi::{c_int, c_void};

use ggml_sys as sys;
use sys::bupo_glu_params as GluParams;

use super::exp::exp;
use super::rows::{Rows, rows_of, source_rows};
use crate::ggml::{Arena, Tensor, Type};

/// What bends the gate.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Activation {
    /// `g sigmoid(g)`.
    Silu,
    /// `g (1 + tanh(sqrt(2/pi) (g + 0.044715 g^3))) / 2`.
    Gelu,
    /// `min(g, 7) sigmoid(1.702 min(g, 7)) (clamp(u, -7, 7) + 1)`.
    ClampedSwiglu,
    /// `sigmoid(g)`.
    Sigmoid,
}

impl Activation {
    fn params(self, op: u32) -> GluParams {
        let activation = match self {
            Activation::Silu => sys::BUPO_ACTIVATION_SILU,
            Activation::Gelu => sys::BUPO_ACTIVATION_GELU,
            Activation::ClampedSwiglu => sys::BUPO_ACTIVATION_CLAMPED_SWIGLU,
            Activation::Sigmoid => sys::BUPO_ACTIVATION_SIGMOID,
        };
        GluParams { op, activation }
    }

    fn of(params: &GluParams) -> Activation {
        match params.activation {
            sys::BUPO_ACTIVATION_SILU => Activation::Silu,
            sys::BUPO_ACTIVATION_GELU => Activation::Gelu,
            sys::BUPO_ACTIVATION_CLAMPED_SWIGLU => Activation::ClampedSwiglu,
            sys::BUPO_ACTIVATION_SIGMOID => Activation::Sigmoid,
            other => unreachable!("activation {other} of a node made here"),
        }
    }
}

fn check(tensors: &[Tensor<'_>]) {
    for t in tensors {
        assert!(t.ty() == Type::F32 && t.is_contiguous(), "glu of {t:?}");
        assert_eq!(t.shape(), tensors[0].shape(), "glu of {tensors:?}");
    }
}

/// `act(gate) * up`, both `[n, T]`, F32 and contiguous.
pub fn glu<'a>(
    arena: &'a Arena,
    gate: Tensor<'a>,
    up: Tensor<'a>,
    activation: Activation,
) -> Tensor<'a> {
    check(&[gate, up]);
    let params = activation.params(sys::BUPO_OP_GLU);
    arena.custom(gate.shape(), &[gate, up], forward, params)
}

/// Cotangents of gate and up, each `[n, T]`, from that of the result.
pub fn glu_back<'a>(
    arena: &'a Arena,
    gate: Tensor<'a>,
    up: Tensor<'a>,
    dy: Tensor<'a>,
    activation: Activation,
) -> (Tensor<'a>, Tensor<'a>) {
    check(&[gate, up, dy]);
    let [n, t, ..] = gate.shape();
    let params = activation.params(sys::BUPO_OP_GLU_BACK);
    // One node writes both: rows [0, T) are d gate, [T, 2 T) are d up.
    let both = arena.custom([n, 2 * t, 1, 1], &[gate, up, dy], backward, params);
    (arena.row_range(both, 0, t), arena.row_range(both, t, t))
}

/// act and its slope.
#[inline(always)]
fn silu(g: f32) -> (f32, f32) {
    let s = 1.0 / (1.0 + exp(-g));
    (g * s, s * (1.0 + g * (1.0 - s)))
}

/// As [`silu`].
#[inline(always)]
fn sigmoid(g: f32) -> (f32, f32) {
    let s = 1.0 / (1.0 + exp(-g));
    (s, s / (1.0 + exp(g)))
}

/// As [`silu`].
#[inline(always)]
fn gelu(g: f32) -> (f32, f32) {
    const A: f32 = 0.044_715;
    const K: f32 = 1.595_769_2; // 2 sqrt(2/pi)
    // Beyond, s is 0 or 1 to 1e-37, and a square might overflow.
    let x = g.clamp(-10.0, 10.0);
    let square = x * x;
    let e = exp(-K * x * (1.0 + A * square));
    let s = 1.0 / (1.0 + e);
    // e s is 1 - s without the cancellation.
    (g * s, s * (1.0 + x * (K * (1.0 + 3.0 * A * square)) * (e * s)))
}

unsafe extern "C" fn forward(
    dst: *mut sys::ggml_tensor,
    ith: c_int,
    nth: c_int,
    userdata: *mut c_void,
) {
    // SAFETY: `glu` made this node: F32 contiguous sources of dst's shape, GluParams as userdata.
    unsafe {
        let activation = Activation::of(&*userdata.cast());
        let (gate, up) = (source_rows(dst, 0), source_rows(dst, 1));
        let rows = gate.range(ith, nth).map(|i| (gate.row(i), up.row(i)));
        for (y, (gate, up)) in rows_of(dst, ith, nth).zip(rows) {
            match activation {
                Activation::Silu => forward_row(y, gate, up, silu),
                Activation::Gelu => forward_row(y, gate, up, gelu),
                Activation::ClampedSwiglu => clamped_row(y, gate, up),
                Activation::Sigmoid => forward_row(y, gate, up, sigmoid),
            }
        }
    }
}

#[inline(always)]
fn forward_row(y: &mut [f32], gate: &[f32], up: &[f32], act: impl Fn(f32) -> (f32, f32)) {
    for ((y, &g), u) in y.iter_mut().zip(gate).zip(up) {
        *y = act(g).0 * u;
    }
}

/// Where gate and line are cut off, and how steep the gate is.
const LIMIT: f32 = 7.0;
const STEEPNESS: f32 = 1.702;

/// a and s.
#[inline(always)]
fn clamped(g: f32) -> (f32, f32) {
    let a = g.min(LIMIT);
    // Beyond, s is below 1e-37.
    (a, 1.0 / (1.0 + exp(-STEEPNESS * a.max(-50.0))))
}

fn clamped_row(y: &mut [f32], gate: &[f32], up: &[f32]) {
    for ((y, &g), u) in y.iter_mut().zip(gate).zip(up) {
        let (a, s) = clamped(g);
        *y = a * s * (u.clamp(-LIMIT, LIMIT) + 1.0);
    }
}

fn clamped_back_row(d_gate: &mut [f32], d_up: &mut [f32], [gate, up, dy]: [&[f32]; 3]) {
    let sources = gate.iter().zip(up).zip(dy);
    for (((&g, &u), dy), (d_gate, d_up)) in sources.zip(d_gate.iter_mut().zip(d_up)) {
        let (a, s) = clamped(g);
        let line = u.clamp(-LIMIT, LIMIT) + 1.0;
        *d_gate = if g <= LIMIT { dy * line * s * (1.0 + STEEPNESS * a * (1.0 - s)) } else { 0.0 };
        *d_up = if u.abs() <= LIMIT { dy * a * s } else { 0.0 };
    }
}

unsafe extern "C" fn backward(
    dst: *mut sys::ggml_tensor,
    ith: c_int,
    nth: c_int,
    userdata: *mut c_void,
) {
    // SAFETY: `glu_back` made this node: F32 contiguous sources [n, T], dst [n, 2 T], GluParams as
    // userdata; row i and row T + i of dst belong to the thread that has row i of the sources.
    unsafe {
        let activation = Activation::of(&*userdata.cast());
        let sources = [0, 1, 2].map(|i| source_rows(dst, i));
        let (n, t) = ((*dst).ne[0] as usize, (*dst).ne[1] as usize / 2);
        let out: *mut f32 = (*dst).data.cast();
        for i in sources[0].range(ith, nth) {
            let d_gate = std::slice::from_raw_parts_mut(out.add(i * n), n);
            let d_up = std::slice::from_raw_parts_mut(out.add((t + i) * n), n);
            let rows = sources.map(|source: Rows| source.row(i));
            match activation {
                Activation::Silu => backward_row(d_gate, d_up, rows, silu),
                Activation::Gelu => backward_row(d_gate, d_up, rows, gelu),
                Activation::ClampedSwiglu => clamped_back_row(d_gate, d_up, rows),
                Activation::Sigmoid => backward_row(d_gate, d_up, rows, sigmoid),
            }
        }
    }
}

#[inline(always)]
fn backward_row(
    d_gate: &mut [f32],
    d_up: &mut [f32],
    [gate, up, dy]: [&[f32]; 3],
    act: impl Fn(f32) -> (f32, f32),
) {
    let sources = gate.iter().zip(up).zip(dy);
    for (((&g, u), dy), (d_gate, d_up)) in sources.zip(d_gate.iter_mut().zip(d_up)) {
        let (value, slope) = act(g);
        *d_up = dy * value;
        *d_gate = dy * u * slope;
    }
}
