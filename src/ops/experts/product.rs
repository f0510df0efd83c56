//! Products with stacked weights: the four directions, and their kernels.

use std::ffi::{c_int, c_void};
use std::ops::Range;

use ggml_sys as sys;

use super::{Columns, Order, Routes, f32_shape};
use crate::ggml::{Arena, Tensor};
use crate::ops::gemm::{Matrix, gemm, weight_gemm, with_scratch};
use crate::ops::linear::{DEPTH, LowRank, STEP, TILE, Weight, steps};
use crate::ops::queue::Queue;
use crate::ops::rows::rounded;

/// Outputs that one product of a transposed tile sums over.
const BACK_DEPTH: usize = 256;
/// Outputs of a tile where columns are summed up by token: one thread has them for all experts.
const SUM_STEP: usize = 128;
/// Columns that are packed at a time where they lie apart.
const PACKED: usize = 256;

#[repr(C)]
struct Params {
    c: sys::bupo_experts_params,
    units: Queue,
}

/// What a product has beside its weight and its input.
#[derive(Clone, Copy, Default)]
struct Extras<'a> {
    low: Option<LowRank<'a>>,
    // Summed up by token, with these weights [S] or with none.
    sum: bool,
    weights: Option<Tensor<'a>>,
    bias: Option<Tensor<'a>>,
    add: Option<Tensor<'a>>,
}

/// `[N, S]`, sorted, from `w: [K, N, E]` of any type and `x: [K, T]` or `[K, S]`; `low`: B `[r, N, E]` and u `[r, S]`;
/// `bias: [N, E]`.
pub fn experts<'a>(
    arena: &'a Arena,
    w: Tensor<'a>,
    (x, columns): (Tensor<'a>, Columns),
    routes: &Routes<'a>,
    low: Option<LowRank<'a>>,
    bias: Option<Tensor<'a>>,
) -> Tensor<'a> {
    node(arena, w, (x, columns), routes, false, Extras { low, bias, ..Extras::default() })
}

/// `[N, T]`: what [`experts`] gives of `h: [K, S]`, times `weights: [S]`, summed up by token.
pub fn experts_sum<'a>(
    arena: &'a Arena,
    w: Tensor<'a>,
    h: Tensor<'a>,
    weights: Tensor<'a>,
    routes: &Routes<'a>,
    low: Option<LowRank<'a>>,
    bias: Option<Tensor<'a>>,
) -> Tensor<'a> {
    let extras = Extras { low, bias, sum: true, weights: Some(weights), add: None };
    node(arena, w, (h, Columns::Slots), routes, false, extras)
}

/// `[K, S]`, sorted, from `w: [K, N, E]` and `dy: [N, T]` or `[N, S]`; `low`: A `[K, r, E]` and du `[r, S]`.
pub fn experts_back<'a>(
    arena: &'a Arena,
    w: Tensor<'a>,
    (dy, columns): (Tensor<'a>, Columns),
    routes: &Routes<'a>,
    low: Option<LowRank<'a>>,
) -> Tensor<'a> {
    node(arena, w, (dy, columns), routes, true, Extras { low, ..Extras::default() })
}

/// `[K, T]`: what [`experts_back`] gives of `dy: [N, S]`, summed up by token; `add: [K, T]`.
pub fn experts_back_sum<'a>(
    arena: &'a Arena,
    w: Tensor<'a>,
    dy: Tensor<'a>,
    routes: &Routes<'a>,
    low: Option<LowRank<'a>>,
    add: Option<Tensor<'a>>,
) -> Tensor<'a> {
    let extras = Extras { low, add, sum: true, ..Extras::default() };
    node(arena, w, (dy, Columns::Slots), routes, true, extras)
}

fn node<'a>(
    arena: &'a Arena,
    w: Tensor<'a>,
    (x, columns): (Tensor<'a>, Columns),
    routes: &Routes<'a>,
    transposed: bool,
    extras: Extras<'a>,
) -> Tensor<'a> {
    routes.check();
    let [k, n, e, more] = w.shape();
    assert!(more == 1 && e == routes.n_expert && w.is_contiguous(), "experts {w:?}: stacked");
    assert!(w.ty().can_dequantize(), "experts {w:?}: a type with a converter to F32");
    let [n_in, n_out] = if transposed { [n, k] } else { [k, n] };
    let across = if extras.sum { routes.tokens } else { routes.slots() };
    f32_shape("experts x", x, [n_in, routes.columns(columns), 1]);
    let mut sources = vec![w, x, routes.order];
    if let Some(low) = extras.low {
        let r = low.input.shape()[0];
        let factor = if transposed { [k, r, e] } else { [r, n, e] };
        f32_shape("experts factor", low.factor, factor);
        f32_shape("experts low-rank input", low.input, [r, routes.slots(), 1]);
        sources.extend([low.factor, low.input]);
    }
    for (what, source, shape) in [
        ("experts weights", extras.weights, [routes.slots(), 1, 1]),
        ("experts bias", extras.bias, [n_out, e, 1]),
        ("experts add", extras.add, [n_out, across, 1]),
    ] {
        if let Some(source) = source {
            f32_shape(what, source, shape);
            sources.push(source);
        }
    }
    let params = sys::bupo_experts_params {
        op: sys::BUPO_OP_EXPERTS,
        n_expert: e as u32,
        used: routes.used as u32,
        transposed: transposed as u32,
        tokens_in: (columns == Columns::Tokens) as u32,
        sum: extras.sum as u32,
        low_rank: extras.low.is_some() as u32,
        weights: extras.weights.is_some() as u32,
        bias: extras.bias.is_some() as u32,
        add: extras.add.is_some() as u32,
        scale: extras.low.map_or(0.0, |low| low.scale),
    };
    let params = Params { c: params, units: Queue::default() };
    arena.custom([n_out, across, 1, 1], &sources, kernel, params)
}

/// A node's sources as the kernel reads them.
struct Job<'k> {
    weight: *const sys::ggml_tensor,
    transposed: bool,
    tokens_in: bool,
    order: Order<'k>,
    x: *const f32,
    n_in: usize,
    n_out: usize,
    rounded: bool,
    low: Option<Low>,
    weights: Option<*const f32>,
    bias: Option<*const f32>,
    add: Option<*const f32>,
}

struct Low {
    factor: *const f32,
    input: *const f32,
    rank: usize,
    scale: f32,
}

impl<'k> Job<'k> {
    /// # Safety
    /// `dst` is a live node of this file's, with `c` its parameters.
    unsafe fn new(dst: *mut sys::ggml_tensor, c: &sys::bupo_experts_params) -> Job<'k> {
        // SAFETY: by contract: sources in the order in which `node` pushed them.
        unsafe {
            let src = &(*dst).src;
            let data = |i: usize| (*src[i]).data as *const f32;
            let mut next = 3;
            let mut optional = |there: u32| {
                let i = next;
                next += there as usize;
                (there != 0).then_some(i)
            };
            let factor = optional(c.low_rank);
            let input = optional(c.low_rank);
            let low = factor.zip(input).map(|(factor, input)| Low {
                factor: data(factor),
                input: data(input),
                rank: (*src[input]).ne[0] as usize,
                scale: c.scale,
            });
            Job {
                weight: src[0],
                transposed: c.transposed != 0,
                tokens_in: c.tokens_in != 0,
                order: Order::new(src[2], c.n_expert as usize, c.used as usize),
                x: data(1),
                n_in: (*src[1]).ne[0] as usize,
                n_out: (*dst).ne[0] as usize,
                rounded: rounded(dst),
                low,
                weights: optional(c.weights).map(data),
                bias: optional(c.bias).map(data),
                add: optional(c.add).map(data),
            }
        }
    }

    /// Inputs that one product sums over.
    fn depth(&self) -> usize {
        self.n_in.min(if self.transposed { BACK_DEPTH } else { DEPTH })
    }

    /// Outputs of a tile: whole blocks of the type where they are columns of W.
    fn step(&self, weight: &Weight, sum: bool) -> usize {
        let unit = if self.transposed { weight.block_size().max(STEP) } else { STEP };
        let most = if sum { SUM_STEP } else { 512 };
        ((TILE / self.depth()).min(most) / unit * unit).max(unit)
    }

    /// Floats of scratch for the columns of an expert with `most` slots.
    fn packed(&self, most: usize) -> usize {
        if self.tokens_in { PACKED.min(most) * self.depth() } else { 0 }
    }

    /// Outputs `outs` of an expert's slots into `y`, (output, slot), low-rank term and bias included.
    ///
    /// # Safety
    /// Expert and outputs are in range, `y` has room, `tile` for a tile and `packed` as [`Job::packed`] says.
    unsafe fn product(
        &self,
        e: usize,
        outs: Range<usize>,
        y: Matrix<*mut f32>,
        tile: &mut [f32],
        packed: &mut [f32],
    ) {
        let slots = self.order.of(e);
        // SAFETY: by contract.
        unsafe {
            let weight = Weight::of_expert(self.weight, e);
            for ins in steps(0..self.n_in, self.depth()) {
                let w = if self.transposed {
                    let w = weight.tile(ins.clone(), outs.clone(), tile); // (n, k)
                    Matrix::new(w.data, w.column, w.row)
                } else {
                    weight.tile(outs.clone(), ins.clone(), tile)
                }; // (output, input)
                let keep = ins.start > 0;
                if !self.tokens_in {
                    let x = self.x.add(slots.start * self.n_in + ins.start);
                    let x = Matrix::new(x, 1, self.n_in); // (input, slot)
                    weight_gemm(
                        [outs.len(), slots.len(), ins.len()],
                        y,
                        keep,
                        w,
                        x,
                        1.0,
                        self.rounded,
                    );
                    continue;
                }
                for some in steps(slots.clone(), PACKED) {
                    self.pack(some.clone(), ins.clone(), packed);
                    let x = Matrix::new(packed.as_ptr(), 1, ins.len()); // (input, slot)
                    let y = self.at(y, some.start - slots.start);
                    weight_gemm(
                        [outs.len(), some.len(), ins.len()],
                        y,
                        keep,
                        w,
                        x,
                        1.0,
                        self.rounded,
                    );
                }
            }
            self.low_rank(e, outs.clone(), y);
            if let Some(bias) = self.bias {
                let bias =
                    std::slice::from_raw_parts(bias.add(e * self.n_out + outs.start), outs.len());
                for i in 0..slots.len() {
                    let y = std::slice::from_raw_parts_mut(self.at(y, i).data, outs.len());
                    y.iter_mut().zip(bias).for_each(|(y, b)| *y += b);
                }
            }
        }
    }

    /// `y` from its column `i` on.
    unsafe fn at(&self, y: Matrix<*mut f32>, i: usize) -> Matrix<*mut f32> {
        // SAFETY: the caller's column lies within `y`.
        Matrix { data: unsafe { y.data.add(i * y.column) }, ..y }
    }

    /// Copies inputs `ins` of the slots' tokens, one after another.
    ///
    /// # Safety
    /// They are in range, and `packed` has room.
    unsafe fn pack(&self, slots: Range<usize>, ins: Range<usize>, packed: &mut [f32]) {
        for (to, p) in packed.chunks_exact_mut(ins.len()).zip(slots) {
            // SAFETY: by contract.
            unsafe {
                let x = self.x.add(self.order.token(p) * self.n_in + ins.start);
                to.copy_from_slice(std::slice::from_raw_parts(x, ins.len()));
            }
        }
    }

    /// Adds the low-rank term, if there is one.
    ///
    /// # Safety
    /// As [`Job::product`].
    unsafe fn low_rank(&self, e: usize, outs: Range<usize>, y: Matrix<*mut f32>) {
        let Some(Low { factor, input, rank, scale }) = self.low else { return };
        let slots = self.order.of(e);
        // SAFETY: by contract.
        unsafe {
            let own = factor.add(e * self.n_out * rank);
            let factor = match self.transposed {
                true => Matrix::new(own.add(outs.start), 1, self.n_out), // A: (k, r)
                false => Matrix::new(own.add(outs.start * rank), rank, 1), // B: (n, r)
            };
            let input = Matrix::new(input.add(slots.start * rank), 1, rank); // (r, slot)
            gemm([outs.len(), slots.len(), rank], y, true, factor, input, scale);
        }
    }

    /// Outputs `outs` of all experts, one after another, added to their tokens' columns of `dst`.
    ///
    /// # Safety
    /// As [`Job::product`]; `sums` has room for the outputs of the largest expert, and nobody else has these of `dst`.
    unsafe fn sum(
        &self,
        outs: Range<usize>,
        dst: *mut f32,
        chosen: &[usize],
        [tile, packed, sums]: [&mut [f32]; 3],
    ) {
        let n_tokens = self.order.places.len() / self.order.used;
        // SAFETY: by contract.
        unsafe {
            let row = |t: usize| {
                std::slice::from_raw_parts_mut(dst.add(t * self.n_out + outs.start), outs.len())
            };
            for t in 0..n_tokens {
                match self.add {
                    None => row(t).fill(0.0),
                    Some(add) => std::ptr::copy_nonoverlapping(
                        add.add(t * self.n_out + outs.start),
                        row(t).as_mut_ptr(),
                        outs.len(),
                    ),
                }
            }
            for &e in chosen {
                let y = Matrix::new(sums.as_mut_ptr(), 1, outs.len());
                self.product(e, outs.clone(), y, tile, packed);
                for (y, p) in sums.chunks_exact(outs.len()).zip(self.order.of(e)) {
                    let by = self.weights.map_or(1.0, |w| *w.add(p));
                    let row = row(self.order.token(p));
                    row.iter_mut().zip(y).for_each(|(sum, y)| *sum += by * y);
                }
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
    // SAFETY: `node` made this node: its sources, shapes and parameters are as checked there; units of the result do not
    // overlap.
    unsafe {
        let Params { c, units } = &*userdata.cast::<Params>();
        let job = Job::new(dst, c);
        let weight = Weight::of_expert(job.weight, 0);
        let (chosen, most) = (job.order.chosen(), job.order.most());
        let step = job.step(&weight, c.sum != 0);
        let (width, n_tiles) = (step.min(job.n_out), job.n_out.div_ceil(step));
        let tile = match job.transposed {
            true => weight.scratch(job.depth(), width),
            false => weight.scratch(width, job.depth()),
        };
        let sums = if c.sum != 0 { width * most } else { 0 };
        let data: *mut f32 = (*dst).data.cast();
        let outs = |i: usize| i * step..((i + 1) * step).min(job.n_out);
        with_scratch(tile + job.packed(most) + sums, |scratch| {
            let (tile, rest) = scratch.split_at_mut(tile);
            let (packed, sums) = rest.split_at_mut(job.packed(most));
            if c.sum != 0 {
                units.each(n_tiles, nth, |i| {
                    job.sum(outs(i), data, &chosen, [tile, packed, sums]);
                });
                return;
            }
            units.each(chosen.len() * n_tiles, nth, |i| {
                let (e, outs) = (chosen[i / n_tiles], outs(i % n_tiles));
                let y = data.add(job.order.of(e).start * job.n_out + outs.start);
                job.product(e, outs, Matrix::new(y, 1, job.n_out), tile, packed);
            });
        });
    }
}
