//! Products with quantised weights as the whole numbers that they are, and activations in fixed point.
//!
//! ```text
//! y[n, t] = sum_b scale[n, b] d[b, t] (sum_{k in b} q[n, k] p[k, t]) + add[n, b] (sum_{k in b} x[k, t])
//! x[k, t] = d[b, t] p[k, t], rounded; p whole, -16383 to 16383
//! ```
//!
//! b: 32 neighbours of k, for which the weight is `scale q + add`. The inner sum is one of whole numbers, exact, and takes
//! half as many instructions as in F32, for one multiplies and adds two pairs of 16 bits in a lane (AVX-512 VNNI,
//! `vpdpwssd`). An activation is off by at most 1/32766 of the largest of its block, 250 times less than in the 8 bits
//! that ggml's products have. Lanes of a vector are columns: what becomes of a column depends neither on the others nor on
//! their number, nor on that of the threads.

use super::narrow::Narrow;
use crate::ggml::Type;

/// Whether products with weights of this type are had on this processor.
pub(super) fn serves(ty: Type) -> bool {
    has_vnni() && ty.quants_reader().is_some()
}

#[cfg(target_arch = "x86_64")]
fn has_vnni() -> bool {
    is_x86_feature_detected!("avx512f")
        && is_x86_feature_detected!("avx512bw")
        && is_x86_feature_detected!("avx512vnni")
}

#[cfg(not(target_arch = "x86_64"))]
fn has_vnni() -> bool {
    false
}

#[cfg(not(target_arch = "x86_64"))]
pub(super) fn scratch(_: usize, _: usize) -> usize {
    0
}

#[cfg(not(target_arch = "x86_64"))]
pub(super) unsafe fn run(_: Narrow<'_>) {
    unreachable!("no type is served")
}

#[cfg(target_arch = "x86_64")]
pub(super) use vnni::{run, scratch};

#[cfg(target_arch = "x86_64")]
mod vnni {
    use std::arch::x86_64::*;

    use super::super::linear::steps;
    use super::super::narrow::ROWS;
    use super::super::panel::{MOST_ROWS, Strided, aligned, transpose};
    use super::*;
    use crate::ggml::{QUANTS, Quants};

    /// The largest p. So many of the largest q of a type, 4096, in a block of 32 just stay below 2^31.
    const MOST: f32 = 16383.0;
    /// Blocks whose largest activation is smaller count as 0: 16383 by it would overflow.
    const LEAST: f32 = 1e-30;
    /// Columns of a vector.
    const LANES: usize = 16;
    /// Pairs of p in a block.
    const PAIRS: usize = QUANTS / 2;
    /// Rows of a block of activations: pairs, the blocks' d, their sums.
    const BLOCK_ROWS: usize = PAIRS + 2;
    /// Blocks that one pass over a row sums, and what the L1 cache holds of a few rows.
    const DEPTH: usize = 8;
    /// Vectors of columns that go with a few rows: as many sums, whole and floating, as registers hold, and activations as the L1
    /// cache holds beside the rows.
    const MOST_VECTORS: usize = 2;
    /// Floats of a [`Quants`].
    const QUANTS_FLOATS: usize = size_of::<Quants>() / 4;

    /// Floats that a call takes.
    pub(in super::super) fn scratch(k: usize, t: usize) -> usize {
        let width = t.next_multiple_of(LANES);
        (k / QUANTS * BLOCK_ROWS + ROWS) * width + MOST_ROWS * DEPTH * QUANTS_FLOATS + LANES
    }

    /// # Safety
    /// The contract of [`super::super::narrow::run`]; [`super::serves`] the weight's type; `scratch` is for the product's sizes.
    pub(in super::super) unsafe fn run(p: Narrow<'_>) {
        // SAFETY: by contract; the processor was asked.
        unsafe { product(p) }
    }

    #[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
    unsafe fn product(p: Narrow<'_>) {
        let [k, n, t] = p.sizes;
        let blocks = k / QUANTS;
        let width = t.next_multiple_of(LANES);
        let (x, rest) = aligned(p.scratch).split_at_mut(blocks * BLOCK_ROWS * width);
        let (sums, tile) = rest.split_at_mut(ROWS * width);
        // SAFETY: within x, y and scratch by contract; any bits are a `Quants`, which floats are aligned for.
        unsafe {
            pack(p.x, [k, t], x.as_mut_ptr(), width);
            let tile = std::slice::from_raw_parts_mut(
                tile.as_mut_ptr().cast::<Quants>(),
                MOST_ROWS * DEPTH,
            );
            for ns in steps(p.ns, ROWS) {
                for bs in steps(0..blocks, DEPTH) {
                    let ks = bs.start * QUANTS..bs.end * QUANTS;
                    p.weight.count(ns.len() * ks.len());
                    for rows in steps(0..ns.len(), MOST_ROWS) {
                        let mut adds = false;
                        for (row, out) in rows.clone().zip(tile.chunks_exact_mut(DEPTH)) {
                            let out = &mut out[..bs.len()];
                            adds = p.weight.read_quants(ns.start + row, ks.start, out);
                        }
                        let part = Part {
                            blocks: bs.len(),
                            w: tile.as_ptr(),
                            x: x.as_ptr().add(bs.start * BLOCK_ROWS * width),
                            sums: sums.as_mut_ptr().add(rows.start * width),
                            width,
                            first: bs.start == 0,
                        };
                        match adds {
                            true => part.all_columns::<true>(rows.len()),
                            false => part.all_columns::<false>(rows.len()),
                        }
                    }
                }
                let to = Strided(p.y.add(ns.start), n);
                transpose(Strided(sums.as_ptr(), width), to, ns.len(), t);
            }
        }
    }

    /// Columns `x: [K, T]` in fixed point: for each block of k its pairs, d and sums, rows of `width`. Columns beyond T are 0.
    #[target_feature(enable = "avx512f,avx512bw")]
    unsafe fn pack(x: *const f32, [k, t]: [usize; 2], out: *mut f32, width: usize) {
        // SAFETY: x holds K T numbers, `out` a block's rows for each block of k.
        unsafe {
            for from in (0..width).step_by(LANES) {
                for b in 0..k / QUANTS {
                    let mut pairs = [[0i32; PAIRS]; LANES];
                    let (mut d, mut sum) = ([0f32; LANES], [0f32; LANES]);
                    for lane in 0..LANES.min(t - from) {
                        let x = x.add((from + lane) * k + b * QUANTS);
                        let (low, high) = (_mm512_loadu_ps(x), _mm512_loadu_ps(x.add(LANES)));
                        sum[lane] = _mm512_reduce_add_ps(_mm512_add_ps(low, high));
                        let most = _mm512_max_ps(_mm512_abs_ps(low), _mm512_abs_ps(high));
                        let most = _mm512_reduce_max_ps(most);
                        // What is no number stays none.
                        d[lane] = if sum[lane].is_finite() { most / MOST } else { f32::NAN };
                        let times = _mm512_set1_ps(if most > LEAST { MOST / most } else { 0.0 });
                        let whole =
                            |x| _mm512_cvtsepi32_epi16(_mm512_cvtps_epi32(_mm512_mul_ps(x, times)));
                        let place = pairs[lane].as_mut_ptr().cast::<__m256i>();
                        _mm256_storeu_si256(place, whole(low));
                        _mm256_storeu_si256(place.add(1), whole(high));
                    }
                    let out = out.add(b * BLOCK_ROWS * width + from);
                    let each_lane = _mm512_mullo_epi32(
                        _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0),
                        _mm512_set1_epi32(PAIRS as i32),
                    );
                    for pair in 0..PAIRS {
                        let from = pairs.as_ptr().cast::<i32>().add(pair);
                        let of_lanes = _mm512_i32gather_epi32::<4>(each_lane, from);
                        _mm512_storeu_si512(out.add(pair * width).cast(), of_lanes);
                    }
                    _mm512_storeu_ps(out.add(PAIRS * width), _mm512_loadu_ps(d.as_ptr()));
                    let sums = out.add((PAIRS + 1) * width);
                    _mm512_storeu_ps(sums, _mm512_loadu_ps(sum.as_ptr()));
                }
            }
        }
    }

    /// A few rows times a run of blocks, added to their sums.
    #[derive(Clone, Copy)]
    struct Part {
        blocks: usize,
        /// Rows of [`DEPTH`].
        w: *const Quants,
        /// [`BLOCK_ROWS`] rows of `width` a block.
        x: *const f32,
        /// Rows of `width`.
        sums: *mut f32,
        width: usize,
        /// There are no sums yet.
        first: bool,
    }

    impl Part {
        #[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
        unsafe fn all_columns<const ADDS: bool>(self, rows: usize) {
            let mut from = 0;
            while from < self.width {
                let vectors = ((self.width - from) / LANES).min(MOST_VECTORS);
                let mut row = 0;
                while row < rows {
                    // SAFETY: rows and columns from these on lie within w, x and the sums.
                    row += unsafe {
                        let part = Part {
                            w: self.w.add(row * DEPTH),
                            x: self.x.add(from),
                            sums: self.sums.add(row * self.width + from),
                            ..self
                        };
                        match (rows - row, vectors) {
                            (12.., 1) => part.kernel::<ADDS, 12, 1>(),
                            (6.., 1) => part.kernel::<ADDS, 6, 1>(),
                            (6.., _) => part.kernel::<ADDS, 6, 2>(),
                            (2.., 1) => part.kernel::<ADDS, 2, 1>(),
                            (2.., _) => part.kernel::<ADDS, 2, 2>(),
                            (_, 1) => part.kernel::<ADDS, 1, 1>(),
                            (_, _) => part.kernel::<ADDS, 1, 2>(),
                        }
                    };
                }
                from += vectors * LANES;
            }
        }

        /// Rows that were multiplied.
        #[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
        #[inline]
        unsafe fn kernel<const ADDS: bool, const R: usize, const V: usize>(self) -> usize {
            // SAFETY: R rows and V vectors lie within w, x and the sums, by the caller.
            unsafe {
                let place = |r: usize, v: usize| self.sums.add(r * self.width + v * LANES);
                let mut sums = [[_mm512_setzero_ps(); V]; R];
                if !self.first {
                    for (r, sums) in sums.iter_mut().enumerate() {
                        for (v, sum) in sums.iter_mut().enumerate() {
                            *sum = _mm512_loadu_ps(place(r, v));
                        }
                    }
                }
                for b in 0..self.blocks {
                    let x = self.x.add(b * BLOCK_ROWS * self.width);
                    let row = |i: usize| {
                        std::array::from_fn::<_, V, _>(|v| {
                            _mm512_loadu_ps(x.add(i * self.width + v * LANES))
                        })
                    };
                    let w = |r: usize| self.w.add(r * DEPTH + b);
                    let mut whole = [[_mm512_setzero_si512(); V]; R];
                    for pair in 0..PAIRS {
                        let p = row(pair).map(|p| _mm512_castps_si512(p));
                        for (r, whole) in whole.iter_mut().enumerate() {
                            let pairs = (&raw const (*w(r)).q).cast::<i32>();
                            let q = _mm512_set1_epi32(pairs.add(pair).read());
                            for (whole, p) in whole.iter_mut().zip(p) {
                                *whole = _mm512_dpwssd_epi32(*whole, q, p);
                            }
                        }
                    }
                    let (d, of_x) = (row(PAIRS), row(PAIRS + 1));
                    for (r, (sums, whole)) in sums.iter_mut().zip(whole).enumerate() {
                        let scale = _mm512_set1_ps((*w(r)).scale);
                        for (v, (sum, whole)) in sums.iter_mut().zip(whole).enumerate() {
                            let factor = _mm512_mul_ps(scale, d[v]);
                            *sum = _mm512_fmadd_ps(_mm512_cvtepi32_ps(whole), factor, *sum);
                            if ADDS {
                                *sum = _mm512_fmadd_ps(_mm512_set1_ps((*w(r)).add), of_x[v], *sum);
                            }
                        }
                    }
                }
                for (r, sums) in sums.iter().enumerate() {
                    for (v, sum) in sums.iter().enumerate() {
                        _mm512_storeu_ps(place(r, v), *sum);
                    }
                }
            }
            R
        }
    }
}
