//! Linear maps with weights of any GGUF type and exact activations, their vjp, and outer products.
//!
//! ```text
//! linear       y[n, t]  = sum_k W[k, n] x[k, t] + scale sum_r B[r, n] u[r, t] + bias[n]
//! linear_back  dx[k, t] = sum_n W[k, n] dy[n, t] + scale sum_r A[k, r] du[r, t] + add[k, t]
//! outer        g[k, n] += scale sum_t x[k, t] dy[n, t]
//! ```
//!
//! `W: [K, N]` is dequantised once per tile and call, never once per token, and never as a whole: a tile
//! stays in the L2 cache. Threads take tiles from a queue, of N outputs forward and of K outputs (whole
//! blocks of the type) backward, so that no block is dequantised twice; only where there are fewer tiles
//! than threads do they share out T too. How a sum is formed does not depend on who takes the tile.

use std::ffi::{c_int, c_void};
use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};

use ggml_sys as sys;

use super::gemm::{Factor, Matrix, Product, gemm, weight_gemm, weight_unit, with_scratch};
use super::queue::Queue;
use super::rows::{each_part, part_of, parts, prefetch, rounded};
use crate::ggml::{Arena, Tensor, Type};
#[cfg(target_arch = "x86_64")]
use crate::ggml::{QUANTS, Quants, QuantsReader};

/// Floats of a dequantised tile: 512 KiB, half of a usual L2 cache.
pub(super) const TILE: usize = 128 * 1024;
/// Inputs that one product of a tile sums over: forward in K, a multiple of every block size; backward in N.
pub(super) const DEPTH: usize = 1024;
const BACK_DEPTH: usize = 256;
/// Outputs of a tile come in multiples of this where there are enough: the rows of gemm's micro kernel.
pub(super) const STEP: usize = 64;
/// Floats between the rows of a tile. Without them the rows of a K that is a power of two fall on the same few
/// cache lines, and packing them takes longer than the product of 64 tokens.
const PAD: usize = 16;
/// So many rows ahead a row is asked for: what a memory takes to answer, the reader takes for a few rows.
const AHEAD: usize = 12;
/// Tokens that `outer` sums over at a time, so that its strided rows stay in the L2 cache.
const OUTER_DEPTH: usize = 128;

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

impl<'a> LowRank<'a> {
    /// Both tensors, which must have these shapes.
    pub(super) fn sources(
        self,
        op: &str,
        factor: [usize; 2],
        input: [usize; 2],
    ) -> [Tensor<'a>; 2] {
        f32_matrix(&format!("{op} factor"), self.factor, factor);
        f32_matrix(&format!("{op} low-rank input"), self.input, input);
        [self.factor, self.input]
    }
}

fn f32_matrix(what: &str, t: Tensor<'_>, shape: [usize; 2]) {
    assert!(t.ty() == Type::F32 && t.is_contiguous(), "{what}: F32 and contiguous, got {t:?}");
    assert_eq!(t.shape(), [shape[0], shape[1], 1, 1], "{what}: {t:?}");
}

pub(super) fn weight_matrix(w: Tensor<'_>) -> [usize; 2] {
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
        sources.extend(low.sources("linear", [r, n], [r, t]));
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
    arena.custom([n, t, 1, 1], &sources, linear_kernel, Params::new(params))
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
        sources.extend(low.sources("linear_back", [k, r], [r, t]));
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
    arena.custom([k, t, 1, 1], &sources, linear_back_kernel, Params::new(params))
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

#[repr(C)]
struct Params {
    c: sys::bupo_linear_params,
    tiles: Queue,
}

impl Params {
    fn new(c: sys::bupo_linear_params) -> Params {
        Params { c, tiles: Queue::default() }
    }
}

static DEQUANTISED: AtomicU64 = AtomicU64::new(0);

/// Weights that the kernels on the CPU have turned into F32 since the program began; tests read it.
pub fn dequantised() -> u64 {
    DEQUANTISED.load(Ordering::Relaxed)
}

/// A weight as the kernels read it.
pub(super) struct Weight {
    ty: Type,
    data: *const u8,
    row_bytes: usize,
    /// Elements of a block, a power of two, by its logarithm, and bytes: asked once, not for every row.
    log_block: u32,
    block_bytes: usize,
}

impl Weight {
    /// # Safety
    /// `tensor` is a live, contiguous matrix in host memory.
    pub(super) unsafe fn new(tensor: *const sys::ggml_tensor) -> Weight {
        // SAFETY: by contract.
        let (raw, data, row_bytes) = unsafe { ((*tensor).type_, (*tensor).data, (*tensor).nb[1]) };
        let ty = Type::from_raw(raw).expect("a live tensor has a known type");
        Weight::of(ty, data.cast(), row_bytes)
    }

    fn of(ty: Type, data: *const u8, row_bytes: usize) -> Weight {
        let block = ty.block_size();
        assert!(block.is_power_of_two(), "blocks of {block} elements of {ty}");
        Weight { ty, data, row_bytes, log_block: block.ilog2(), block_bytes: ty.block_bytes() }
    }

    /// An expert's matrix of a stack `[K, N, E]`.
    ///
    /// # Safety
    /// As [`Weight::new`], of a stack with that many experts.
    pub(super) unsafe fn of_expert(tensor: *const sys::ggml_tensor, expert: usize) -> Weight {
        // SAFETY: by contract.
        unsafe {
            let first = Weight::new(tensor);
            Weight { data: first.data.add(expert * (*tensor).nb[2]), ..first }
        }
    }

    /// Of rows of `k` elements in these bytes, which outlive it.
    #[cfg(all(test, target_arch = "x86_64"))]
    pub(super) fn of_bytes(ty: Type, bytes: &[u8], k: usize) -> Weight {
        Weight::of(ty, bytes.as_ptr(), ty.row_bytes(k).expect("whole blocks"))
    }

    /// Elements of a block.
    pub(super) fn block_size(&self) -> usize {
        1 << self.log_block
    }

    /// Bytes of `k` elements of a row, whole blocks.
    fn bytes(&self, k: usize) -> usize {
        (k >> self.log_block) * self.block_bytes
    }

    /// F32 rows are read where they lie, but for strides that fall on the same few cache lines.
    fn in_place(&self) -> bool {
        self.ty == Type::F32 && !self.row_bytes.is_multiple_of(1024)
    }

    /// Floats of scratch that a tile of this size takes.
    pub(super) fn scratch(&self, rows: usize, width: usize) -> usize {
        if self.in_place() { 0 } else { rows * (width + PAD) }
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
        let skip = self.bytes(ks.start);
        // SAFETY: within the tensor by contract.
        let from = |n: usize| unsafe { self.data.add(n * self.row_bytes + skip) };
        if self.in_place() {
            return Matrix::new(from(ns.start).cast(), self.row_bytes / 4, 1);
        }
        let (width, stride) = (ks.len(), ks.len() + PAD);
        self.count(ns.len() * width);
        for (row, n) in scratch.chunks_exact_mut(stride).zip(ns) {
            // SAFETY: within the tensor by contract.
            unsafe { self.read(n, ks.clone(), &mut row[..width]) };
        }
        Matrix::new(scratch.as_ptr(), stride, 1)
    }

    /// Adds to [`dequantised`].
    pub(super) fn count(&self, n: usize) {
        if self.ty != Type::F32 {
            DEQUANTISED.fetch_add(n as u64, Ordering::Relaxed);
        }
    }

    /// Columns `ks` (whole blocks) of row `n` as floats; the caller counts them.
    ///
    /// # Safety
    /// They lie within the tensor; `out` has as many.
    #[inline]
    pub(super) unsafe fn read(&self, n: usize, ks: Range<usize>, out: &mut [f32]) {
        let from = self.row(n, ks);
        // SAFETY: within the tensor by contract.
        unsafe { self.ty.dequantize_raw(from, out) };
    }

    /// Where columns `ks` (whole blocks) of row `n` lie, which are about to be read. Who reads them goes on to the rows behind
    /// it, a part of each, a pattern that no processor foresees: so it is told.
    #[inline]
    fn row(&self, n: usize, ks: Range<usize>) -> *const u8 {
        let at = self.data.wrapping_add(n * self.row_bytes + self.bytes(ks.start));
        let ahead = at.wrapping_add(AHEAD * self.row_bytes);
        for line in (0..self.bytes(ks.len())).step_by(64) {
            prefetch(ahead.wrapping_add(line));
        }
        at
    }
}

/// Which side of a weight a product sums over.
#[derive(Clone, Copy)]
pub(super) enum Side {
    /// `y[n] = sum_k W[k, n] x[k]`: forward.
    Columns,
    /// `y[k] = sum_n W[k, n] x[n]`: back.
    Rows,
}

impl Weight {
    /// `y = keep y + W x`: outputs `outs` of all inputs, y `(output, t)` from the first of them on, x `(input, t)` with its
    /// extents (outputs, t, inputs). By the processor's [`weight_unit`] for them where it has one.
    ///
    /// # Safety
    /// `outs` lie within the tensor, backward from a whole block to another; the views are valid, and y overlaps nothing;
    /// `scratch` has [`Weight::multiply_scratch`] of a tile of `outs` by [`DEPTH`], backward [`BACK_DEPTH`] by `outs`.
    unsafe fn multiply(
        &self,
        side: Side,
        outs: Range<usize>,
        (y, keep): (Matrix<*mut f32>, bool),
        (x, extent): (Matrix<*const f32>, [usize; 3]),
        rounded: bool,
        scratch: &mut [f32],
    ) {
        let [n, t, inputs] = extent;
        // SAFETY: by contract.
        unsafe {
            if let Some(unit) = weight_unit(rounded) {
                let b = match side {
                    Side::Columns => Factor::Columns(self, outs.start),
                    Side::Rows => Factor::Rows(self, outs.start),
                };
                let (sizes, alpha, a, c) = ([t, n, inputs], 1.0, x.turned(), y.turned());
                return (unit.product)(Product { sizes, a, b, c, keep, alpha, rounded });
            }
            let depth = match side {
                Side::Columns => DEPTH,
                Side::Rows => BACK_DEPTH,
            };
            for ins in steps(0..inputs, depth) {
                let tile = match side {
                    Side::Columns => self.tile(outs.clone(), ins.clone(), scratch),
                    Side::Rows => self.tile(ins.clone(), outs.clone(), scratch).turned(),
                };
                let x = Matrix { data: x.data.add(ins.start * x.row), ..x };
                gemm([n, t, ins.len()], y, keep || ins.start > 0, tile, x, 1.0);
            }
        }
    }

    /// Floats of scratch that [`Weight::multiply`] takes for tiles of this size.
    fn multiply_scratch(&self, rows: usize, width: usize, rounded: bool) -> usize {
        if weight_unit(rounded).is_some() { 0 } else { self.scratch(rows, width) }
    }

    /// The type.
    pub(super) fn ty(&self) -> Type {
        self.ty
    }

    /// Columns of row `n` from `k` on as whole numbers, as many as `out` holds. The caller counts them.
    ///
    /// # Safety
    /// They are whole blocks within the tensor; the reader is that of the weight's type.
    #[cfg(target_arch = "x86_64")]
    #[inline]
    pub(super) unsafe fn read_quants(
        &self,
        reader: QuantsReader,
        n: usize,
        k: usize,
        out: &mut [Quants],
    ) {
        debug_assert!((out.len() * QUANTS).is_multiple_of(self.block_size()));
        let from = self.row(n, k..k + out.len() * QUANTS);
        // SAFETY: within the tensor by contract.
        unsafe { (reader.read)(from, out) }
    }
}

unsafe fn f32_data(tensor: *const sys::ggml_tensor) -> *mut f32 {
    // SAFETY: the caller's sources are live tensors.
    unsafe { (*tensor).data.cast() }
}

/// How outputs `[0, n)` of all tokens are cut up for the queue.
struct Tiling {
    n: usize,
    t: usize,
    n_step: usize,
    t_step: usize,
}

impl Tiling {
    /// At most `most` outputs a tile, in multiples of `unit`, and where possible a tile for every thread.
    fn new(n: usize, t: usize, unit: usize, most: usize, threads: usize) -> Tiling {
        let fair = n.div_ceil(threads).next_multiple_of(unit);
        let n_step = fair.min((most / unit * unit).max(unit));
        let parts = threads / n.div_ceil(n_step).max(1);
        Tiling { n, t, n_step, t_step: t.div_ceil(parts.max(1)).max(1) }
    }

    fn n_tiles(&self) -> usize {
        self.n.div_ceil(self.n_step) * self.t.div_ceil(self.t_step)
    }

    /// Outputs and tokens of tile `i`.
    fn tile(&self, i: usize) -> (Range<usize>, Range<usize>) {
        let across = self.n.div_ceil(self.n_step);
        let (n, t) = (i % across * self.n_step, i / across * self.t_step);
        (n..(n + self.n_step).min(self.n), t..(t + self.t_step).min(self.t))
    }
}

/// `all` in steps of `step`.
pub(super) fn steps(all: Range<usize>, step: usize) -> impl Iterator<Item = Range<usize>> {
    all.clone().step_by(step).map(move |start| start..(start + step).min(all.end))
}

unsafe extern "C" fn linear_kernel(
    dst: *mut sys::ggml_tensor,
    _ith: c_int,
    nth: c_int,
    userdata: *mut c_void,
) {
    // SAFETY: `linear` made this node: its sources, shapes and parameters are as checked there; tiles of
    // the result do not overlap.
    unsafe {
        let Params { c: params, tiles } = &*userdata.cast::<Params>();
        let (n_all, t_all) = ((*dst).ne[0] as usize, (*dst).ne[1] as usize);
        let src = &(*dst).src;
        let k = (*src[0]).ne[0] as usize;
        let (weight, rounded) = (Weight::new(src[0]), rounded(dst));
        let depth = k.min(DEPTH);
        let unit = STEP.min(n_all.next_multiple_of(16));
        let most = weight_unit(rounded).map_or((TILE / depth).min(512), |unit| unit.columns);
        let tiling = Tiling::new(n_all, t_all, unit, most, parts(dst));
        with_scratch(weight.multiply_scratch(tiling.n_step, depth, rounded), |scratch| {
            tiles.each(tiling.n_tiles(), nth, |i| {
                let (ns, ts) = tiling.tile(i);
                let y = f32_data(dst).add(ts.start * n_all + ns.start);
                let y = Matrix::new(y, 1, n_all); // (n, t)
                let extent = |inner| [ns.len(), ts.len(), inner];
                let x = Matrix::new(f32_data(src[1]).add(ts.start * k) as *const f32, 1, k); // (k, t)
                let x = (x, extent(k));
                weight.multiply(Side::Columns, ns.clone(), (y, false), x, rounded, scratch);
                if params.low_rank != 0 {
                    let r = (*src[2]).ne[0] as usize;
                    let b = Matrix::new(f32_data(src[2]).add(ns.start * r) as *const f32, r, 1); // (n, r)
                    let u = Matrix::new(f32_data(src[3]).add(ts.start * r) as *const f32, 1, r); // (r, t)
                    weight_gemm(extent(r), y, true, b, u, params.scale, rounded);
                }
                if params.bias != 0 {
                    let bias = f32_data(src[2 + 2 * params.low_rank as usize]).add(ns.start);
                    let bias = std::slice::from_raw_parts(bias, ns.len());
                    for t in 0..ts.len() {
                        let y = std::slice::from_raw_parts_mut(y.data.add(t * n_all), ns.len());
                        for (y, b) in y.iter_mut().zip(bias) {
                            *y += b;
                        }
                    }
                }
            });
        });
    }
}

unsafe extern "C" fn linear_back_kernel(
    dst: *mut sys::ggml_tensor,
    _ith: c_int,
    nth: c_int,
    userdata: *mut c_void,
) {
    // SAFETY: `linear_back` made this node: its sources, shapes and parameters are as checked there;
    // tiles of the result do not overlap.
    unsafe {
        let Params { c: params, tiles } = &*userdata.cast::<Params>();
        let (k, t_all) = ((*dst).ne[0] as usize, (*dst).ne[1] as usize);
        let src = &(*dst).src;
        let n_all = (*src[0]).ne[1] as usize;
        let (weight, rounded) = (Weight::new(src[0]), rounded(dst));
        let unit = weight.block_size().max(STEP);
        let depth = n_all.min(BACK_DEPTH);
        let most = weight_unit(rounded).map_or(TILE / BACK_DEPTH, |unit| unit.columns);
        let tiling = Tiling::new(k, t_all, unit, most, parts(dst));
        with_scratch(weight.multiply_scratch(depth, tiling.n_step, rounded), |scratch| {
            tiles.each(tiling.n_tiles(), nth, |i| {
                let (ks, ts) = tiling.tile(i);
                let out = Matrix::new(f32_data(dst).add(ts.start * k + ks.start), 1, k); // (k, t)
                let extent = |inner| [ks.len(), ts.len(), inner];
                if params.add != 0 {
                    let add = f32_data(src[2 + 2 * params.low_rank as usize]);
                    for t in 0..ts.len() {
                        let from = add.add((ts.start + t) * k + ks.start);
                        std::ptr::copy_nonoverlapping(from, out.data.add(t * k), ks.len());
                    }
                }
                let dy = f32_data(src[1]).add(ts.start * n_all) as *const f32;
                let dy = (Matrix::new(dy, 1, n_all), extent(n_all)); // (n, t)
                let y = (out, params.add != 0);
                weight.multiply(Side::Rows, ks.clone(), y, dy, rounded, scratch);
                if params.low_rank != 0 {
                    let r = (*src[2]).ne[1] as usize;
                    let a = Matrix::new(f32_data(src[2]).add(ks.start) as *const f32, 1, k); // (k, r)
                    let du = f32_data(src[3]).add(ts.start * r) as *const f32;
                    let du = Matrix::new(du, 1, r);
                    weight_gemm(extent(r), out, true, a, du, params.scale, rounded);
                }
            });
        });
    }
}

unsafe extern "C" fn outer_kernel(
    dst: *mut sys::ggml_tensor,
    ith: c_int,
    nth: c_int,
    userdata: *mut c_void,
) {
    // SAFETY: a live node.
    let parts = unsafe { parts(dst) };
    // SAFETY: `outer` made this node; a thread's parts are its own.
    each_part(parts, ith, nth, |part| unsafe { outer_part(dst, part, parts, userdata) });
}

/// # Safety
/// `outer` made this node; nobody else writes this part of `parts` of g.
unsafe fn outer_part(
    dst: *mut sys::ggml_tensor,
    part: usize,
    parts: usize,
    userdata: *const c_void,
) {
    // SAFETY: src[0] is g, of which dst is a view; then x and dy, shapes as checked by `outer`.
    unsafe {
        let scale = (*userdata.cast::<sys::bupo_linear_params>()).scale;
        let (k, n) = ((*dst).ne[0] as usize, (*dst).ne[1] as usize);
        let src = &(*dst).src;
        let t = (*src[1]).ne[1] as usize;
        let (mut ks, mut ns) = (0..k, 0..n);
        if k >= n.max(STEP) {
            ks = part_of(k, part, parts);
        } else {
            ns = part_of(n, part, parts);
        }
        let x = |t: usize| f32_data(src[1]).add(t * k + ks.start) as *const f32;
        let dy = |t: usize, n0: usize| f32_data(src[2]).add(t * n + n0) as *const f32;
        if k >= STEP {
            let g = Matrix::new(f32_data(dst).add(ns.start * k + ks.start), 1, k); // (k, n)
            for ts in steps(0..t, OUTER_DEPTH) {
                let x = Matrix::new(x(ts.start), 1, k); // (k, t)
                let dy = Matrix::new(dy(ts.start, ns.start), n, 1); // (t, n)
                gemm([ks.len(), ns.len(), ts.len()], g, true, x, dy, scale);
            }
            return;
        }
        // A short K leaves the micro kernel's rows empty: N stands in the rows, the sum is turned after.
        with_scratch(256 * k, |scratch| {
            for ns in steps(ns, 256) {
                let width = ns.len();
                let sums = Matrix::new(scratch.as_mut_ptr(), 1, width); // (n, k)
                for ts in steps(0..t, OUTER_DEPTH) {
                    let dy = Matrix::new(dy(ts.start, ns.start), 1, n); // (n, t)
                    let x = Matrix::new(x(ts.start), k, 1); // (t, k)
                    gemm([width, k, ts.len()], sums, ts.start > 0, dy, x, scale);
                }
                let g = std::slice::from_raw_parts_mut(f32_data(dst).add(ns.start * k), width * k);
                for (n, g) in g.chunks_exact_mut(k).enumerate() {
                    for (g, sum) in g.iter_mut().zip(scratch[n..].iter().step_by(width)) {
                        *g += sum;
                    }
                }
            }
        });
    }
}
