//! What stands between sorted slots and a token's weights.
//!
//! ```text
//! slot_weights  w[p]     = weights[place of p]
//! weights_back  dw[k, t] = sum_n g[n, p] h[n, p] + sum_n bias_e[n] dy[n, t],   p the slot of (k, t)
//! ```
//!
//! With `y[t] = sum w(p) (W_e h(p) + bias_e)` and `g(p) = W_e^T dy(t)`, dw is the weights' cotangent.

use std::ffi::{c_int, c_void};

use ggml_sys as sys;

use super::{Order, Routes, f32_shape};
use crate::ggml::{Arena, Tensor};
use crate::ops::rows::{dot, partition, source_rows};

fn params(op: u32, routes: &Routes<'_>, bias: bool) -> sys::bupo_slots_params {
    sys::bupo_slots_params {
        op,
        n_expert: routes.n_expert as u32,
        used: routes.used as u32,
        bias: bias as u32,
    }
}

/// `[S]` in sorted order from `weights: [used, T]`.
pub fn slot_weights<'a>(arena: &'a Arena, weights: Tensor<'a>, routes: &Routes<'a>) -> Tensor<'a> {
    routes.check();
    f32_shape("slot_weights", weights, [routes.used, routes.tokens, 1]);
    let params = params(sys::BUPO_OP_SLOT_WEIGHTS, routes, false);
    arena.custom([routes.slots(), 1, 1, 1], &[weights, routes.order], slots_kernel, params)
}

/// `[used, T]` from `g, h: [F, S]` and, where the experts have a bias, `bias: [D, E]` and `dy: [D, T]`.
pub fn weights_back<'a>(
    arena: &'a Arena,
    g: Tensor<'a>,
    h: Tensor<'a>,
    bias: Option<(Tensor<'a>, Tensor<'a>)>,
    routes: &Routes<'a>,
) -> Tensor<'a> {
    routes.check();
    let f = g.shape()[0];
    f32_shape("weights_back g", g, [f, routes.slots(), 1]);
    f32_shape("weights_back h", h, [f, routes.slots(), 1]);
    let mut sources = vec![g, h, routes.order];
    if let Some((bias, dy)) = bias {
        let d = bias.shape()[0];
        f32_shape("weights_back bias", bias, [d, routes.n_expert, 1]);
        f32_shape("weights_back dy", dy, [d, routes.tokens, 1]);
        sources.extend([bias, dy]);
    }
    let params = params(sys::BUPO_OP_WEIGHTS_BACK, routes, bias.is_some());
    arena.custom([routes.used, routes.tokens, 1, 1], &sources, back_kernel, params)
}

unsafe extern "C" fn slots_kernel(
    dst: *mut sys::ggml_tensor,
    ith: c_int,
    nth: c_int,
    userdata: *mut c_void,
) {
    // SAFETY: `slot_weights` made this node: weights and order as checked there; each thread writes its own part.
    unsafe {
        let params = &*userdata.cast::<sys::bupo_slots_params>();
        let order = Order::new((*dst).src[1], params.n_expert as usize, params.used as usize);
        let weights = (*(*dst).src[0]).data as *const f32;
        for p in partition((*dst).ne[0] as usize, ith, nth) {
            *((*dst).data as *mut f32).add(p) = *weights.add(order.place(p));
        }
    }
}

unsafe extern "C" fn back_kernel(
    dst: *mut sys::ggml_tensor,
    ith: c_int,
    nth: c_int,
    userdata: *mut c_void,
) {
    // SAFETY: `weights_back` made this node: g, h, order, then bias and dy as checked there; each thread writes its own
    // part.
    unsafe {
        let params = &*userdata.cast::<sys::bupo_slots_params>();
        let used = params.used as usize;
        let order = Order::new((*dst).src[2], params.n_expert as usize, used);
        let (g, h) = (source_rows(dst, 0), source_rows(dst, 1));
        let biased = (params.bias != 0).then(|| (source_rows(dst, 3), source_rows(dst, 4)));
        for place in partition(used * (*dst).ne[1] as usize, ith, nth) {
            let p = order.slot(place);
            let mut sum = dot(g.row(p), h.row(p));
            if let Some((bias, dy)) = &biased {
                sum += dot(bias.row(order.expert(p)), dy.row(place / used));
            }
            *((*dst).data as *mut f32).add(place) = sum;
        }
    }
}
