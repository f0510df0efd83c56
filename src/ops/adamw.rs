//! The optimiser's two ops: sums of squares, for the global norm, and a step of AdamW in place.
//!
//! ```text
//! sum_squares  s[i] = sum of x_j^2 over j in [4096 i, 4096 (i + 1))
//! adamw        g' = clip g,  m = b1 m + (1 - b1) g',  v = b2 v + (1 - b2) g'^2
//!              p -= lr (m unbias1 / (sqrt(v unbias2) + eps) + decay p)
//! ```
//!
//! Runs of 4096 values keep F32 sums exact to about 1e-6; who wants the norm adds them up in F64.

use std::ffi::{c_int, c_void};

use ggml_sys as sys;

use super::rows::{dot, partition};
use crate::ggml::{Arena, Tensor, Type};

/// Values that one sum of [`sum_squares`] is over.
const RUN: usize = sys::BUPO_SUM_SQUARES_RUN as usize;

/// Settings of one step of [`adamw`].
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AdamWStep {
    /// Learning rate.
    pub learning_rate: f32,
    /// Decay of the mean of gradients.
    pub beta1: f32,
    /// Decay of the mean of their squares.
    pub beta2: f32,
    /// Added to the root of the second moment.
    pub eps: f32,
    /// Decoupled weight decay.
    pub weight_decay: f32,
    /// Factor of the gradient.
    pub clip: f32,
    /// Steps of this tensor, this one counted.
    pub t: u64,
}

fn f32_contiguous(op: &str, t: Tensor<'_>) {
    assert!(t.ty() == Type::F32 && t.is_contiguous(), "{op} of {t:?}");
}

/// Sums of squares of `x`, any shape, F32: `[ceil(len / 4096)]`.
pub fn sum_squares<'a>(arena: &'a Arena, x: Tensor<'a>) -> Tensor<'a> {
    f32_contiguous("sum_squares", x);
    let n = x.len().div_ceil(RUN);
    arena.custom([n, 1, 1, 1], &[x], sum_squares_kernel, sys::BUPO_OP_SUM_SQUARES)
}

/// Changes the parameters `p` and the moments `m` and `v` by the gradient `g`; equal shapes, F32.
pub fn adamw<'a>(
    arena: &'a Arena,
    p: Tensor<'a>,
    g: Tensor<'a>,
    m: Tensor<'a>,
    v: Tensor<'a>,
    step: &AdamWStep,
) -> Tensor<'a> {
    for t in [p, g, m, v] {
        f32_contiguous("adamw", t);
        assert_eq!(t.shape(), p.shape(), "adamw of {t:?}");
    }
    let unbias = |beta: f32| (1.0 / (1.0 - (beta as f64).powf(step.t as f64))) as f32;
    let params = sys::bupo_adamw_params {
        op: sys::BUPO_OP_ADAMW,
        learning_rate: step.learning_rate,
        beta1: step.beta1,
        beta2: step.beta2,
        eps: step.eps,
        weight_decay: step.weight_decay,
        clip: step.clip,
        unbias1: unbias(step.beta1),
        unbias2: unbias(step.beta2),
    };
    arena.custom_inplace(p, &[g, m, v], adamw_kernel, params)
}

unsafe extern "C" fn sum_squares_kernel(
    dst: *mut sys::ggml_tensor,
    ith: c_int,
    nth: c_int,
    _userdata: *mut c_void,
) {
    // SAFETY: `sum_squares` made this node: x F32 contiguous, a sum for each run of it; each thread has
    // its own sums.
    unsafe {
        let x = (*dst).src[0];
        let len = sys::ggml_nelements(x) as usize;
        let x = std::slice::from_raw_parts((*x).data.cast::<f32>(), len);
        for i in partition((*dst).ne[0] as usize, ith, nth) {
            let run = &x[i * RUN..len.min((i + 1) * RUN)];
            *(*dst).data.cast::<f32>().add(i) = dot(run, run);
        }
    }
}

unsafe extern "C" fn adamw_kernel(
    dst: *mut sys::ggml_tensor,
    ith: c_int,
    nth: c_int,
    userdata: *mut c_void,
) {
    // SAFETY: `adamw` made this node: dst is a view of p, src[1..4] are g, m and v, of one length; each
    // thread has its own part of all of them.
    unsafe {
        let c = &*userdata.cast::<sys::bupo_adamw_params>();
        let part = partition(sys::ggml_nelements(dst) as usize, ith, nth);
        let of = |t: *mut sys::ggml_tensor| (*t).data.cast::<f32>().add(part.start);
        let src = &(*dst).src;
        let p = std::slice::from_raw_parts_mut(of(dst), part.len());
        let g = std::slice::from_raw_parts(of(src[1]).cast_const(), part.len());
        let m = std::slice::from_raw_parts_mut(of(src[2]), part.len());
        let v = std::slice::from_raw_parts_mut(of(src[3]), part.len());
        for (((p, g), m), v) in p.iter_mut().zip(g).zip(m).zip(v) {
            let g = g * c.clip;
            *m = c.beta1 * *m + (1.0 - c.beta1) * g;
            *v = c.beta2 * *v + (1.0 - c.beta2) * g * g;
            let update = *m * c.unbias1 / ((*v * c.unbias2).sqrt() + c.eps);
            *p -= c.learning_rate * (update + c.weight_decay * *p);
        }
    }
}
