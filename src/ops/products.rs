//! Products with a model's weights inside llama.cpp's graphs, by the kernels of [`super::amx`], [`super::fixed`] and
//! [`super::narrow`].

use std::ffi::{c_int, c_void};
use std::ops::Range;

use ggml_sys as sys;

use super::gemm::{Factor, Matrix, Product, with_scratch};
use super::linear::{Weight, steps, weight_matrix};
use super::narrow::{self, Narrow};
use super::panel::MOST_ROWS;
use super::{amx, fixed, rows::partition};
use crate::ggml::{Arena, Tensor, Type};

/// How a product is formed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ProductKernel {
    /// F32 by F32 ([`super::narrow`]).
    Exact,
    /// Whole numbers by activations of 15 bits ([`super::fixed`]).
    Fixed,
    /// Numbers of 16 bits of significand, on the processor's matrix unit ([`super::amx`]).
    Tiles,
}

impl ProductKernel {
    /// Whether this processor has it for weights of a type.
    pub fn serves(self, ty: Type) -> bool {
        match self {
            ProductKernel::Exact => true,
            ProductKernel::Fixed => fixed::serves(ty),
            ProductKernel::Tiles => amx::has(),
        }
    }

    /// The quickest for few columns of a type on this processor.
    fn of(ty: Type) -> ProductKernel {
        if fixed::serves(ty) { ProductKernel::Fixed } else { ProductKernel::Exact }
    }

    fn code(self) -> Code {
        let (rows, columns) = (MOST_ROWS, COLUMNS);
        match self {
            ProductKernel::Exact => {
                Code { rows, columns, scratch: narrow::scratch, run: narrow::run }
            }
            ProductKernel::Fixed => {
                Code { rows, columns, scratch: fixed::scratch, run: fixed::run }
            }
            ProductKernel::Tiles => {
                Code { rows: 32, columns: usize::MAX, scratch: |_, _| 0, run: by_tiles }
            }
        }
    }
}

/// # Safety
/// The contract of [`narrow::run`]; there is a matrix unit.
unsafe fn by_tiles(p: Narrow<'_>) {
    let [k, n, t] = p.sizes;
    // SAFETY: by contract.
    unsafe {
        amx::product(Product {
            sizes: [t, p.ns.len(), k],
            a: Matrix::new(p.x, k, 1),
            b: Factor::Columns(p.weight, p.ns.start),
            c: Matrix::new(p.y.add(p.ns.start), n, 1),
            keep: false,
            alpha: 1.0,
            rounded: true,
        });
    }
}

/// From how many columns on our product is faster than ggml's on plain blocks of a type, where it is at all. Measured with
/// AVX-512 by `bench ops MODEL --case ops/columns --threads 1` (docs/LOG.md); a table, and not a measurement at each start,
/// so that what is sampled does not depend on time.
pub fn faster_from(ty: Type) -> Option<usize> {
    match ty.name() {
        // No kernel of ggml's for several columns at once.
        "q4_1" | "q5_1" | "mxfp4" => Some(if fixed::serves(ty) { 4 } else { 8 }),
        "q8_0" => Some(16),
        "q4_0" | "q5_0" | "iq4_nl" | "q3_K" if fixed::serves(ty) => Some(8),
        // ggml's 8-bit products reach twice the rate of sgemm: up to a fifth more than ours, which are 250 times as precise.
        "iq4_xs" | "q4_K" | "q5_K" | "q6_K" if fixed::serves(ty) => Some(16),
        _ => None,
    }
}

/// From how many columns on [`ProductKernel::Tiles`] is the fastest for each of these types; measured as [`faster_from`]. None without a
/// matrix unit.
pub(crate) fn wide_from() -> Option<usize> {
    amx::has().then_some(96)
}

/// The product of [`weight_product`] by [`ProductKernel::Tiles`].
///
/// # Safety
/// The contract of `bupo_product` for `MUL_MAT`; there is a matrix unit ([`wide_from`]).
pub(crate) unsafe extern "C" fn wide_product(dst: *mut sys::ggml_tensor, ith: c_int, nth: c_int) {
    // SAFETY: by contract.
    unsafe { run(dst, ith, nth, ProductKernel::Tiles) }
}

/// `y[n, t] = sum_k W[k, n] x[k, t]`, of experts `y[n, i, t] = sum_k W[k, n, e(i, t)] x[k, i, t]`, by the quickest kernel for W's type on this processor: with x in fixed point of 15 bits
/// where it has the instructions, else exact; ggml would round x to 8 bits for a quantised W. A column's result does not
/// depend on the others, nor on the number of threads.
///
/// # Safety
/// The contract of `bupo_product`: `dst: [N, T]`, `src[0]` = W `[K, N]` of a type with a converter and `src[1]` = x
/// `[K, T]` F32 are live and contiguous in host memory (T may be several extents), and each of the `nth` threads calls this with its own `ith`. Or a
/// `MUL_MAT_ID` node: `dst: [N, used, T]`, W `[K, N, E]`, x `[K, 1 or used, T]`, and in `src[2]` the experts, `[used, T]` I32.
pub(crate) unsafe extern "C" fn weight_product(dst: *mut sys::ggml_tensor, ith: c_int, nth: c_int) {
    // SAFETY: by contract; a kernel for its type.
    unsafe { run(dst, ith, nth, ProductKernel::of(Weight::new((*dst).src[0]).ty())) }
}

/// Columns that a kernel of vectors takes at a time.
const COLUMNS: usize = 128;

/// A kernel, and the floats of scratch that it takes for K and T.
#[derive(Clone, Copy)]
struct Code {
    /// Outputs of which threads get whole runs.
    rows: usize,
    /// Columns for which rows are read once.
    columns: usize,
    scratch: fn(usize, usize) -> usize,
    run: unsafe fn(Narrow<'_>),
}

unsafe fn run(dst: *mut sys::ggml_tensor, ith: c_int, nth: c_int, kernel: ProductKernel) {
    let code = kernel.code();
    // SAFETY: by contract; threads write different rows of y.
    unsafe {
        let (w, n) = ((*dst).src[0], (*dst).ne[0] as usize);
        let parts = partition(n.div_ceil(code.rows), ith, nth);
        let ns = (parts.start * code.rows).min(n)..(parts.end * code.rows).min(n);
        if (*dst).op == sys::GGML_OP_MUL_MAT_ID {
            return of_experts(dst, ns, code);
        }
        let (k, t) = ((*w).ne[0] as usize, sys::ggml_nrows(dst) as usize);
        let weight = &Weight::new(w);
        let (x, y) = ((*(*dst).src[1]).data.cast::<f32>(), (*dst).data.cast::<f32>());
        with_scratch((code.scratch)(k, t.min(code.columns)), |scratch| {
            for ts in steps(0..t, code.columns) {
                (code.run)(Narrow {
                    weight,
                    sizes: [k, n, ts.len()],
                    ns: ns.clone(),
                    x: x.add(ts.start * k),
                    y: y.add(ts.start * n),
                    scratch: &mut *scratch,
                });
            }
        });
    }
}

/// Outputs `ns` of what each token's experts give: the columns of an expert side by side, multiplied, and put where they belong.
unsafe fn of_experts(dst: *mut sys::ggml_tensor, ns: Range<usize>, code: Code) {
    // SAFETY: by contract; threads write different rows of y.
    unsafe {
        let [w, x, ids] = [(*dst).src[0], (*dst).src[1], (*dst).src[2]];
        let [k, n, experts] = [0, 1, 2].map(|i| (*w).ne[i] as usize);
        let (used, t_all, of_token) =
            ((*ids).ne[0] as usize, (*ids).ne[1] as usize, (*x).ne[1] as usize);
        let (from, to) = ((*x).data.cast::<f32>(), (*dst).data.cast::<f32>());
        // Places of an expert's columns, in x and in y; ascending.
        let mut places = vec![Vec::new(); experts];
        for t in 0..t_all {
            let ids = (*ids).data.byte_add(t * (*ids).nb[1]).cast::<i32>();
            for i in 0..used {
                places[*ids.add(i) as usize].push((t * of_token + i % of_token, t * used + i));
            }
        }
        let most = places.iter().map(Vec::len).max().unwrap_or(0).min(code.columns);
        with_scratch(most * (k + n) + (code.scratch)(k, most), |scratch| {
            let (x, rest) = scratch.split_at_mut(most * k);
            let (y, scratch) = rest.split_at_mut(most * n);
            for (expert, places) in places.iter().enumerate() {
                let weight = &Weight::of_expert(w, expert);
                for places in places.chunks(code.columns) {
                    for (x, place) in x.chunks_exact_mut(k).zip(places) {
                        x.copy_from_slice(std::slice::from_raw_parts(from.add(place.0 * k), k));
                    }
                    (code.run)(Narrow {
                        weight,
                        sizes: [k, n, places.len()],
                        ns: ns.clone(),
                        x: x.as_ptr(),
                        y: y.as_mut_ptr(),
                        scratch: &mut *scratch,
                    });
                    for (y, place) in y.chunks_exact(n).zip(places) {
                        let to = to.add(place.1 * n + ns.start);
                        std::slice::from_raw_parts_mut(to, ns.len())
                            .copy_from_slice(&y[ns.clone()]);
                    }
                }
            }
        });
    }
}

/// The product by a kernel that serves W's type, as a node of a graph of ours on the CPU, to measure it and to check it: `[N, T]` from
/// `w: [K, N]` of any type and `x: [K, T]` F32.
pub fn product<'a>(
    arena: &'a Arena,
    w: Tensor<'a>,
    x: Tensor<'a>,
    kernel: ProductKernel,
) -> Tensor<'a> {
    let [k, n] = weight_matrix(w);
    let t = x.shape()[1];
    assert!(kernel.serves(w.ty()), "a product of {w:?} by {kernel:?}");
    assert!(x.ty() == Type::F32 && x.is_contiguous() && x.shape() == [k, t, 1, 1], "x: {x:?}");
    arena.custom([n, t, 1, 1], &[w, x], product_kernel, kernel)
}

unsafe extern "C" fn product_kernel(
    dst: *mut sys::ggml_tensor,
    ith: c_int,
    nth: c_int,
    userdata: *mut c_void,
) {
    // SAFETY: `product` made this node, with a kernel that serves its type.
    unsafe { run(dst, ith, nth, *userdata.cast::<ProductKernel>()) }
}
