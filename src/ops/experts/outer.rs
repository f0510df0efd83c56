//! Gradients of the experts' adapters.

use std::ffi::{c_int, c_void};

use ggml_sys as sys;

use super::{Columns, Order, Routes, f32_shape};
use crate::ggml::{Arena, Tensor};
use crate::ops::gemm::{Matrix, gemm, with_scratch};
use crate::ops::linear::steps;
use crate::ops::queue::Queue;

/// Slots that are summed over at a time.
const DEPTH: usize = 128;

#[repr(C)]
struct Params {
    c: sys::bupo_experts_outer_params,
    units: Queue,
}

/// Adds `scale sum_p x(p) dy(p)^T` over each expert's slots to `g: [K, N, E]` in place, from `x: [K, ..]` and
/// `dy: [N, ..]`, all F32. An expert that no token chose is left as it is.
pub fn experts_outer<'a>(
    arena: &'a Arena,
    g: Tensor<'a>,
    x: (Tensor<'a>, Columns),
    dy: (Tensor<'a>, Columns),
    routes: &Routes<'a>,
    scale: f32,
) -> Tensor<'a> {
    routes.check();
    let [k, n, ..] = g.shape();
    f32_shape("experts_outer g", g, [k, n, routes.n_expert]);
    f32_shape("experts_outer x", x.0, [k, routes.columns(x.1), 1]);
    f32_shape("experts_outer dy", dy.0, [n, routes.columns(dy.1), 1]);
    let c = sys::bupo_experts_outer_params {
        op: sys::BUPO_OP_EXPERTS_OUTER,
        n_expert: routes.n_expert as u32,
        used: routes.used as u32,
        tokens_x: (x.1 == Columns::Tokens) as u32,
        tokens_dy: (dy.1 == Columns::Tokens) as u32,
        scale,
    };
    let params = Params { c, units: Queue::default() };
    arena.custom_inplace(g, &[x.0, dy.0, routes.order], kernel, params)
}

/// Columns of one of the two factors.
struct Side {
    data: *const f32,
    width: usize,
    by_token: bool,
}

impl Side {
    /// # Safety
    /// The slots are in range, and `packed` has room for as many columns.
    unsafe fn pack(&self, order: &Order<'_>, slots: std::ops::Range<usize>, packed: &mut [f32]) {
        for (to, p) in packed.chunks_exact_mut(self.width).zip(slots) {
            let column = if self.by_token { order.token(p) } else { p };
            // SAFETY: by contract.
            unsafe {
                let from = self.data.add(column * self.width);
                to.copy_from_slice(std::slice::from_raw_parts(from, self.width));
            }
        }
    }
}

unsafe extern "C" fn kernel(
    dst: *mut sys::ggml_tensor,
    _ith: c_int,
    nth: c_int,
    userdata: *mut c_void,
) {
    // SAFETY: `experts_outer` made this node: src[0] is g, of which dst is a view; then x, dy and the order, shapes as
    // checked there; a unit is one expert's part of g.
    unsafe {
        let Params { c, units } = &*userdata.cast::<Params>();
        let src = &(*dst).src;
        let side = |i: usize, by_token: u32| Side {
            data: (*src[i]).data as *const f32,
            width: (*src[i]).ne[0] as usize,
            by_token: by_token != 0,
        };
        let (x, dy) = (side(1, c.tokens_x), side(2, c.tokens_dy));
        let order = Order::new(src[3], c.n_expert as usize, c.used as usize);
        let chosen = order.chosen();
        let (k, n) = (x.width, dy.width);
        with_scratch(DEPTH * (k + n) + k * n, |scratch| {
            let (packed_x, rest) = scratch.split_at_mut(DEPTH * k);
            let (packed_dy, sums) = rest.split_at_mut(DEPTH * n);
            units.each(chosen.len(), nth, |i| {
                // The longer extent stands in the rows of gemm's micro kernel.
                let (rows, columns) = if k >= n { (k, n) } else { (n, k) };
                let y = Matrix::new(sums.as_mut_ptr(), 1, rows); // (row, column)
                for slots in steps(order.of(chosen[i]), DEPTH) {
                    let keep = slots.start > order.of(chosen[i]).start;
                    x.pack(&order, slots.clone(), packed_x);
                    dy.pack(&order, slots.clone(), packed_dy);
                    let (long, short) = match k >= n {
                        true => (&*packed_x, &*packed_dy),
                        false => (&*packed_dy, &*packed_x),
                    };
                    let long = Matrix::new(long.as_ptr(), 1, rows); // (row, slot)
                    let short = Matrix::new(short.as_ptr(), columns, 1); // (slot, column)
                    gemm([rows, columns, slots.len()], y, keep, long, short, c.scale);
                }
                let g = ((*dst).data as *mut f32).add(chosen[i] * k * n);
                let g = std::slice::from_raw_parts_mut(g, k * n);
                for (i, g) in g.iter_mut().enumerate() {
                    let (k_at, n_at) = (i % k, i / k);
                    *g += if k >= n { sums[n_at * k + k_at] } else { sums[k_at * n + n_at] };
                }
            });
        });
    }
}
