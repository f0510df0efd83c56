//! Attention of many sequences that each decode one token, inside llama.cpp's graphs.
//!
//! ```text
//! y[:, h, s] = sum_j p_j v[:, j, h/g, s],  p = softmax_j(scale q[:, h, s] . k[:, j, h/g, s] + mask[j, s])
//! ```
//!
//! g heads of queries read one head of keys and values, whose F16 a tile of keys at a time turns into F32 once for all of
//! them; sums are F32, where ggml adds values up in F16. Tiles come in order and masked keys add nothing, so that a
//! sequence's result does not depend on the others, nor on the number of threads.

use std::ffi::c_int;

use ggml_sys as sys;
use pulp::{Simd, WithSimd};

use super::exp::exp;
use super::gemm::with_scratch;
use super::rows::partition;
use crate::ggml::Type;

/// Keys of a tile.
const TILE: usize = 64;

/// # Safety
/// The contract of `bupo_decoding` in ggml-ext.h: `dst` is a FLASH_ATTN_EXT node `[D, H, 1, S]` of live tensors in host
/// memory, `src[0]` = q `[D, 1, H, S]` F32, `src[1]`, `src[2]` = k, v `[D, n, H_kv, S]` F16, `src[3]` = mask `[n, .., 1, S]`
/// F16 or null, with whole rows; no sinks, slopes or softcap. Each of the `nth` threads calls this with its own `ith`.
pub(crate) unsafe extern "C" fn decode_attention(
    dst: *mut sys::ggml_tensor,
    ith: c_int,
    nth: c_int,
) {
    // SAFETY: by contract; threads write different heads of y.
    unsafe {
        let [q, k, v, mask, ..] = (*dst).src;
        let (heads, shared, streams) = ((*q).ne[2], (*k).ne[2], (*q).ne[3]);
        let scale = f32::from_bits((*dst).op_params[0] as u32);
        let (size, n) = ((*q).ne[0] as usize, (*k).ne[1] as usize);
        let group = (heads / shared) as usize;
        let at = |t: *mut sys::ggml_tensor, head: usize, stream: usize| {
            (*t).data.cast::<u8>().add(head * (*t).nb[2] + stream * (*t).nb[3])
        };
        let arch = pulp::Arch::new();
        with_scratch(2 * TILE * size + group * (TILE + size), |scratch| {
            for job in partition((shared * streams) as usize, ith, nth) {
                let (head, stream) = (job % shared as usize, job / shared as usize);
                let mask = (!mask.is_null()).then(|| at(mask, 0, stream).cast_const());
                arch.dispatch(Group {
                    size,
                    scale,
                    q: (0..group).map(|g| {
                        let row = at(q, head * group + g, stream).cast::<f32>();
                        std::slice::from_raw_parts(row.cast_const(), size)
                    }),
                    // Heads of y lie behind one another, as its sequences do.
                    y: std::slice::from_raw_parts_mut(
                        (*dst)
                            .data
                            .cast::<f32>()
                            .add((stream * heads as usize + head * group) * size),
                        group * size,
                    ),
                    k: Rows { from: at(k, head, stream), stride: (*k).nb[1] },
                    v: Rows { from: at(v, head, stream), stride: (*v).nb[1] },
                    n,
                    mask,
                    scratch: &mut *scratch,
                });
            }
        });
    }
}

/// Rows of F16 some bytes apart.
struct Rows {
    from: *const u8,
    stride: usize,
}

impl Rows {
    /// # Safety
    /// Row `i` is there.
    unsafe fn read(&self, i: usize, out: &mut [f32]) {
        // SAFETY: by contract.
        unsafe { Type::F16.dequantize_raw(self.from.add(i * self.stride), out) }
    }
}

/// The heads of queries of one sequence that share a head of keys and values.
struct Group<'g, Q> {
    size: usize,
    scale: f32,
    q: Q,
    y: &'g mut [f32],
    k: Rows,
    v: Rows,
    n: usize,
    /// Halves.
    mask: Option<*const u8>,
    scratch: &'g mut [f32],
}

impl<'g, Q: Iterator<Item = &'g [f32]> + Clone> WithSimd for Group<'g, Q> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let Group { size, scale, q, y, k, v, n, mask, scratch } = self;
        let (keys, rest) = scratch.split_at_mut(TILE * size);
        let (values, rest) = rest.split_at_mut(TILE * size);
        let group = y.len() / size;
        let (weights, _) = rest.split_at_mut(group * TILE);
        // Largest score and sum of exponentials so far, of each head.
        let mut running = [(f32::NEG_INFINITY, 0f32); MOST_HEADS];
        y.fill(0.0);
        for from in (0..n).step_by(TILE) {
            let width = TILE.min(n - from);
            let mut allowed = [f32::NEG_INFINITY; TILE];
            match mask {
                // SAFETY: n halves.
                Some(mask) => unsafe {
                    Type::F16.dequantize_raw(mask.add(2 * from), &mut allowed[..width]);
                },
                None => allowed[..width].fill(0.0),
            }
            let Some(last) = allowed.iter().rposition(|&m| m > f32::NEG_INFINITY) else {
                continue;
            };
            let width = last + 1;
            for j in 0..width {
                // SAFETY: keys below n.
                unsafe {
                    k.read(from + j, &mut keys[j * size..(j + 1) * size]);
                    v.read(from + j, &mut values[j * size..(j + 1) * size]);
                }
            }
            let heads =
                q.clone().zip(weights.as_chunks_mut::<TILE>().0).zip(y.chunks_exact_mut(size));
            for (((q, weights), y), (largest, sum)) in heads.zip(&mut running) {
                for (w, key) in weights.iter_mut().zip(keys[..width * size].chunks_exact(size)) {
                    *w = dot(simd, q, key);
                }
                let shrink = softmax(weights, &allowed, scale, largest, sum);
                add_rows(simd, y, shrink, &weights[..width], values);
            }
        }
        for (y, (_, sum)) in y.chunks_exact_mut(size).zip(running) {
            let share = 1.0 / sum;
            y.iter_mut().for_each(|y| *y *= share);
        }
    }
}

/// Heads of queries that may share a head of keys.
pub(crate) const MOST_HEADS: usize = 32;

/// Scores before scale and mask become exponentials over the largest so far, which with their sum is brought up to date;
/// what was summed before is to be multiplied with the result.
#[inline(always)]
fn softmax(
    scores: &mut [f32; TILE],
    allowed: &[f32; TILE],
    scale: f32,
    largest: &mut f32,
    sum: &mut f32,
) -> f32 {
    const LANES: usize = 16;
    let mut most = [*largest; LANES];
    for (scores, allowed) in
        scores.as_chunks_mut::<LANES>().0.iter_mut().zip(allowed.as_chunks::<LANES>().0)
    {
        for i in 0..LANES {
            // What a score that is not allowed was before does not matter.
            scores[i] = if allowed[i] > f32::NEG_INFINITY {
                scale * scores[i] + allowed[i]
            } else {
                allowed[i]
            };
            most[i] = most[i].max(scores[i]);
        }
    }
    let new = most.into_iter().fold(f32::NEG_INFINITY, f32::max);
    let mut sums = [0f32; LANES];
    for scores in scores.as_chunks_mut::<LANES>().0 {
        for i in 0..LANES {
            let e = exp(scores[i] - new);
            scores[i] = if scores[i] > f32::NEG_INFINITY { e } else { 0.0 };
            sums[i] += scores[i];
        }
    }
    let shrink = if *largest > f32::NEG_INFINITY { exp(*largest - new) } else { 0.0 };
    *sum = *sum * shrink + sums.into_iter().sum::<f32>();
    *largest = new;
    shrink
}

#[inline(always)]
fn dot<S: Simd>(simd: S, a: &[f32], b: &[f32]) -> f32 {
    let ((a, a_rest), (b, b_rest)) = (S::as_simd_f32s(a), S::as_simd_f32s(b));
    let mut sum = simd.splat_f32s(0.0);
    for (a, b) in a.iter().zip(b) {
        sum = simd.mul_add_e_f32s(*a, *b, sum);
    }
    let rest: f32 = a_rest.iter().zip(b_rest).map(|(a, b)| a * b).sum();
    simd.reduce_sum_f32s(sum) + rest
}

/// `y = shrink y + sum_j weights[j] rows[j]`
#[inline(always)]
fn add_rows<S: Simd>(simd: S, y: &mut [f32], shrink: f32, weights: &[f32], rows: &[f32]) {
    const AT_ONCE: usize = 4;
    let size = y.len();
    let (y, y_rest) = S::as_mut_simd_f32s(y);
    let whole = y.len() * S::F32_LANES;
    let factor = simd.splat_f32s(shrink);
    for (i, y) in y.chunks_mut(AT_ONCE).enumerate() {
        let mut sums = [simd.splat_f32s(0.0); AT_ONCE];
        for (sum, y) in sums.iter_mut().zip(y.iter()) {
            *sum = simd.mul_f32s(*y, factor);
        }
        // Two sums of each, so that one need not wait for the other.
        let mut odd = [simd.splat_f32s(0.0); AT_ONCE];
        for (weights, rows) in weights.chunks(2).zip(rows.chunks(2 * size)) {
            for (w, (row, sums)) in
                weights.iter().zip(rows.chunks_exact(size).zip([&mut sums, &mut odd]))
            {
                let w = simd.splat_f32s(*w);
                let row = &S::as_simd_f32s(row).0[i * AT_ONCE..][..y.len()];
                for (sum, row) in sums.iter_mut().zip(row) {
                    *sum = simd.mul_add_e_f32s(w, *row, *sum);
                }
            }
        }
        for (y, (even, odd)) in y.iter_mut().zip(sums.into_iter().zip(odd)) {
            *y = simd.add_f32s(even, odd);
        }
    }
    for (i, y) in y_rest.iter_mut().enumerate() {
        let column = rows.iter().skip(whole + i).step_by(size);
        *y = *y * shrink + weights.iter().zip(column).map(|(w, v)| w * v).sum::<f32>();
    }
}
