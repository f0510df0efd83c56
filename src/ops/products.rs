//! Products with a model's weights inside llama.cpp's graphs, by the kernel of [`super::linear`].

use std::ffi::c_int;

use ggml_sys as sys;

use super::gemm::{Matrix, gemm, with_scratch};
use super::linear::{DEPTH, STEP, TILE, Weight, steps};
use super::rows::partition;
use crate::ggml::Type;

/// From how many columns on our product is faster than ggml's on plain blocks of a type, where it is with as many as
/// rollouts and their prompts have. Measured with AVX-512 by `bench ops MODEL --case ops/columns --threads 1` (docs/LOG.md);
/// a table, and not a measurement at each start, so that what is sampled does not depend on time.
pub fn faster_from(ty: Type) -> Option<usize> {
    match ty.name() {
        // No kernel of ggml's for several columns at once.
        "q4_1" => Some(16),
        "q4_K" => Some(512),
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
        let weight = Weight::new(w);
        let depth = k.min(DEPTH);
        let step = (TILE / depth / STEP * STEP).clamp(STEP, 512);
        let parts = partition(n_all.div_ceil(STEP), ith, nth);
        let own = (parts.start * STEP).min(n_all)..(parts.end * STEP).min(n_all);
        with_scratch(weight.scratch(step, depth), |scratch| {
            for ns in steps(own, step) {
                let y = Matrix::new((*dst).data.cast::<f32>().add(ns.start), 1, n_all); // (n, t)
                for ks in steps(0..k, DEPTH) {
                    let tile = weight.tile(ns.clone(), ks.clone(), scratch); // (n, k)
                    let x = Matrix::new((*x).data.cast::<f32>().add(ks.start) as *const f32, 1, k);
                    gemm([ns.len(), t, ks.len()], y, ks.start > 0, tile, x, 1.0);
                }
            }
        });
    }
}
