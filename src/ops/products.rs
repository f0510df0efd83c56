//! Products with a model's weights inside llama.cpp's graphs, by the kernel of [`super::narrow`].

use std::ffi::{c_int, c_void};

use ggml_sys as sys;

use super::gemm::with_scratch;
use super::linear::{Weight, weight_matrix};
use super::narrow::{self, MOST_ROWS, Narrow};
use super::rows::partition;
use crate::ggml::{Arena, Tensor, Type};

/// From how many columns on our product is faster than ggml's on plain blocks of a type, where it is at all. Measured with
/// AVX-512 by `bench ops MODEL --case ops/columns --threads 1` (docs/LOG.md); a table, and not a measurement at each start,
/// so that what is sampled does not depend on time.
pub fn faster_from(ty: Type) -> Option<usize> {
    match ty.name() {
        // No kernel of ggml's for several columns at once.
        "q4_1" | "q5_1" => Some(8),
        "q8_0" => Some(16),
        // K quants: ggml's 8-bit products are faster than sgemm.
        _ => None,
    }
}

/// `y[n, t] = sum_k W[k, n] x[k, t]` with exact activations, where ggml would round x to 8 bits for a quantised W. A
/// column's result does not depend on the others, nor on the number of threads.
///
/// # Safety
/// The contract of `bupo_product`: `dst: [N, T]`, `src[0]` = W `[K, N]` of a type with a converter and `src[1]` = x
/// `[K, T]` F32 are live, contiguous matrices in host memory, and each of the `nth` threads calls this with its own `ith`.
pub(crate) unsafe extern "C" fn weight_product(dst: *mut sys::ggml_tensor, ith: c_int, nth: c_int) {
    // SAFETY: by contract; threads write different rows of y.
    unsafe {
        let [w, x] = [(*dst).src[0], (*dst).src[1]];
        let (n_all, t, k) = ((*dst).ne[0] as usize, (*dst).ne[1] as usize, (*w).ne[0] as usize);
        let weight = &Weight::new(w);
        // Threads get runs of as many outputs as a kernel takes.
        let parts = partition(n_all.div_ceil(MOST_ROWS), ith, nth);
        let ns = (parts.start * MOST_ROWS).min(n_all)..(parts.end * MOST_ROWS).min(n_all);
        with_scratch(narrow::scratch(k, t), |scratch| {
            let (x, y) = ((*x).data.cast::<f32>().cast_const(), (*dst).data.cast::<f32>());
            Narrow { weight, sizes: [k, n_all, t], ns, x, y, scratch }.run();
        });
    }
}

/// The product as a node of a graph of ours on the CPU, to measure it and to check it: `[N, T]` from `w: [K, N]` of any
/// type and `x: [K, T]` F32.
pub fn product<'a>(arena: &'a Arena, w: Tensor<'a>, x: Tensor<'a>) -> Tensor<'a> {
    let [k, n] = weight_matrix(w);
    let t = x.shape()[1];
    assert!(x.ty() == Type::F32 && x.is_contiguous() && x.shape() == [k, t, 1, 1], "x: {x:?}");
    arena.custom([n, t, 1, 1], &[w, x], product_kernel, ())
}

unsafe extern "C" fn product_kernel(
    dst: *mut sys::ggml_tensor,
    ith: c_int,
    nth: c_int,
    _: *mut c_void,
) {
    // SAFETY: `product` made this node.
    unsafe { weight_product(dst, ith, nth) }
}
