//! Columns in fixed point, and the kernel.

use std::array::from_fn;

use super::super::linear::steps;
use super::super::narrow::{Narrow, ROWS};
use super::super::panel::{self, MOST_ROWS, Strided, aligned, transpose};
use super::lanes::{Kernel, Pairs, instructions};
use crate::ggml::{LARGEST, QUANTS, Quants, QuantsForm, Type};

/// The largest p: 32 products with q of at most 4096 ([`LARGEST`]) stay below 2^31.
const MOST: f32 = 16383.0;
const _: () = assert!(LARGEST as u64 * MOST as u64 * (QUANTS as u64) < 1 << 31);
/// Smaller ones count as the largest activation of a block: 16383 by much less would overflow, and scales of a column of zeros
/// be denormal, with which Intel's processors take four times as long.
pub(super) const LEAST: f32 = 1e-20;
/// Pairs of p in a block.
pub(super) const PAIRS: usize = QUANTS / 2;
/// Vectors of a block of activations: pairs, their d, the block's sum.
pub(super) const BLOCK_ROWS: usize = PAIRS + 2;
/// Blocks that one pass over a row sums, and what the L1 cache holds of a few rows.
pub(super) const DEPTH: usize = 8;
/// Vectors of columns that go with a few rows: as many sums, whole and floating, as registers hold, and activations as the L1
/// cache holds beside the rows. They lie side by side, block after block: a panel.
pub(super) const VECTORS: usize = 2;
/// Blocks that have one d, at most.
const MOST_SHARE: usize = 2;
/// Floats of a [`Quants`].
pub(super) const QUANTS_FLOATS: usize = size_of::<Quants>() / 4;

/// Whether products with weights of this type are had on this processor.
pub(in super::super) fn serves(ty: Type) -> bool {
    instructions().is_some() && ty.quants_reader().is_some()
}

/// Floats that a call takes.
pub(in super::super) fn scratch(k: usize, t: usize) -> usize {
    let width = t.next_multiple_of(panel::LANES);
    (k / QUANTS * BLOCK_ROWS + ROWS) * width + MOST_ROWS * DEPTH * QUANTS_FLOATS + panel::LANES
}

/// # Safety
/// The contract of [`super::super::narrow::run`]; [`serves`] the weight's type; `scratch` is for the product's sizes.
pub(in super::super) unsafe fn run(p: Narrow<'_>) {
    // SAFETY: by contract; the processor was asked.
    unsafe { instructions().expect("a type that is served").run(p) }
}

impl Kernel for Narrow<'_> {
    #[inline(always)]
    unsafe fn run<S: Pairs>(self, simd: S) {
        // SAFETY: by the contract of the other `run`.
        unsafe { product(simd, self) }
    }
}

#[inline(always)]
unsafe fn product<S: Pairs>(simd: S, p: Narrow<'_>) {
    let [k, n, t] = p.sizes;
    let reader = p.weight.ty().quants_reader().expect("a type that is served");
    let blocks = k / QUANTS;
    let width = t.next_multiple_of(S::F32_LANES);
    let (x, rest) = aligned(p.scratch).split_at_mut(blocks * BLOCK_ROWS * width);
    let (sums, tile) = rest.split_at_mut(ROWS * width);
    // SAFETY: within x, y and scratch by contract; any bits are a `Quants`, which floats are aligned for.
    unsafe {
        for panel in panels::<S>(width) {
            let out = x.as_mut_ptr().add(panel.from * blocks * BLOCK_ROWS);
            let x = Strided(p.x.add(panel.from * k), k);
            pack(simd, x, [k, t - panel.from], reader.form.share, panel, out);
        }
        let tile =
            std::slice::from_raw_parts_mut(tile.as_mut_ptr().cast::<Quants>(), MOST_ROWS * DEPTH);
        for ns in steps(p.ns, ROWS) {
            for bs in steps(0..blocks, DEPTH) {
                p.weight.count(ns.len() * bs.len() * QUANTS);
                for rows in steps(0..ns.len(), MOST_ROWS) {
                    for (row, out) in rows.clone().zip(tile.chunks_exact_mut(DEPTH)) {
                        let out = &mut out[..bs.len()];
                        p.weight.read_quants(reader, ns.start + row, bs.start * QUANTS, out);
                    }
                    for panel in panels::<S>(width) {
                        let first = panel.from * blocks + bs.start * panel.vectors * S::F32_LANES;
                        let part = Part {
                            blocks: bs.len(),
                            w: tile.as_ptr(),
                            x: x.as_ptr().add(first * BLOCK_ROWS),
                            sums: sums.as_mut_ptr().add(rows.start * width + panel.from),
                            width,
                            first: bs.start == 0,
                        };
                        part.run(simd, reader.form, rows.len(), panel.vectors);
                    }
                }
            }
            let to = Strided(p.y.add(ns.start), n);
            transpose(Strided(sums.as_ptr(), width), to, ns.len(), t);
        }
    }
}

#[inline(always)]
pub(super) unsafe fn load<V>(from: *const f32) -> V {
    // SAFETY: a vector lies there, by the caller.
    unsafe { from.cast::<V>().read_unaligned() }
}

#[inline(always)]
pub(super) unsafe fn store<V>(to: *mut f32, x: V) {
    // SAFETY: a vector has its place there, by the caller.
    unsafe { to.cast::<V>().write_unaligned(x) }
}

/// Columns from one on, of so many vectors.
#[derive(Clone, Copy)]
pub(super) struct Columns {
    pub from: usize,
    pub vectors: usize,
}

pub(super) fn panels<S: Pairs>(width: usize) -> impl Iterator<Item = Columns> {
    steps(0..width, VECTORS * S::F32_LANES)
        .map(|columns| Columns { from: columns.start, vectors: columns.len() / S::F32_LANES })
}

/// A panel of `x: [K, T]` in fixed point: of each block of k its pairs, d and sums; d is that of `share` blocks. What is beyond K
/// and T is 0.
#[inline(always)]
pub(super) unsafe fn pack<S: Pairs>(
    simd: S,
    x: Strided<*const f32>,
    [k, t]: [usize; 2],
    share: usize,
    panel: Columns,
    out: *mut f32,
) {
    let width = panel.vectors * S::F32_LANES;
    for v in 0..panel.vectors {
        let from = v * S::F32_LANES;
        let columns = S::F32_LANES.min(t - from);
        let mut turned = [0f32; MOST_SHARE * QUANTS * panel::LANES];
        for bs in steps(0..k.div_ceil(QUANTS), share) {
            // SAFETY: x holds these columns, `out` a block's rows for each block of k.
            unsafe {
                let numbers = bs.len() * QUANTS;
                let there = numbers.min(k - bs.start * QUANTS);
                let block = Strided(x.0.add(from * x.1 + bs.start * QUANTS), x.1);
                transpose(block, Strided(turned.as_mut_ptr(), S::F32_LANES), columns, there);
                turned[there * S::F32_LANES..numbers * S::F32_LANES].fill(0.0);
                let number = |i: usize| load::<S::f32s>(turned.as_ptr().add(i * S::F32_LANES));
                let mut most = simd.splat_f32s(LEAST);
                for i in 0..numbers {
                    most = simd.max_f32s(simd.abs_f32s(number(i)), most);
                }
                let times = simd.div_f32s(simd.splat_f32s(MOST), most);
                let d = simd.mul_f32s(most, simd.splat_f32s(1.0 / MOST));
                for (i, b) in bs.enumerate() {
                    let out = out.add(b * BLOCK_ROWS * width + from);
                    let mut sum = simd.splat_f32s(0.0);
                    for pair in 0..PAIRS {
                        let first = number(i * QUANTS + 2 * pair);
                        let second = number(i * QUANTS + 2 * pair + 1);
                        sum = simd.add_f32s(sum, simd.add_f32s(first, second));
                        let pairs =
                            simd.pairs(simd.mul_f32s(first, times), simd.mul_f32s(second, times));
                        store(out.add(pair * width), pairs);
                    }
                    // What is no number stays none.
                    store(out.add(PAIRS * width), simd.add_f32s(d, simd.sub_f32s(sum, sum)));
                    store(out.add((PAIRS + 1) * width), sum);
                }
            }
        }
    }
}

/// A few rows times a run of blocks, added to their sums.
#[derive(Clone, Copy)]
pub(super) struct Part {
    pub blocks: usize,
    /// Rows of [`DEPTH`].
    pub w: *const Quants,
    /// [`BLOCK_ROWS`] rows of a panel a block.
    pub x: *const f32,
    /// Rows of `width`.
    pub sums: *mut f32,
    pub width: usize,
    /// There are no sums yet.
    pub first: bool,
}

impl Part {
    /// So many rows, of a panel of so many vectors.
    #[inline(always)]
    pub(super) unsafe fn run<S: Pairs>(
        self,
        simd: S,
        form: QuantsForm,
        rows: usize,
        vectors: usize,
    ) {
        // SAFETY: by the caller.
        unsafe {
            match (form.adds, form.share) {
                (true, 1) => self.rows::<S, true, 1>(simd, rows, vectors),
                (true, _) => self.rows::<S, true, 2>(simd, rows, vectors),
                (false, _) => self.rows::<S, false, 1>(simd, rows, vectors),
            }
        }
    }

    /// All rows, of a panel of so many vectors.
    #[inline(always)]
    unsafe fn rows<S: Pairs, const ADDS: bool, const SHARE: usize>(
        self,
        simd: S,
        rows: usize,
        vectors: usize,
    ) {
        let mut row = 0;
        while row < rows {
            // SAFETY: rows from this one on lie within w and the sums.
            row += unsafe {
                let w = self.w.add(row * DEPTH);
                let sums = self.sums.add(row * self.width);
                let part = Part { w, sums, ..self };
                match (rows - row, vectors) {
                    (12.., 1) => part.kernel::<S, ADDS, SHARE, 12, 1>(simd),
                    (6.., 1) => part.kernel::<S, ADDS, SHARE, 6, 1>(simd),
                    (6.., _) => part.kernel::<S, ADDS, SHARE, 6, 2>(simd),
                    (2.., 1) => part.kernel::<S, ADDS, SHARE, 2, 1>(simd),
                    (2.., _) => part.kernel::<S, ADDS, SHARE, 2, 2>(simd),
                    (_, 1) => part.kernel::<S, ADDS, SHARE, 1, 1>(simd),
                    (_, _) => part.kernel::<S, ADDS, SHARE, 1, 2>(simd),
                }
            };
        }
    }

    /// Rows that were multiplied.
    #[inline(always)]
    unsafe fn kernel<
        S: Pairs,
        const ADDS: bool,
        const SHARE: usize,
        const R: usize,
        const V: usize,
    >(
        self,
        simd: S,
    ) -> usize {
        // SAFETY: R rows and V vectors lie within w, x and the sums, by the caller.
        unsafe {
            let place = |r: usize, v: usize| self.sums.add(r * self.width + v * S::F32_LANES);
            let mut sums = [[simd.splat_f32s(0.0); V]; R];
            if !self.first {
                for (r, sums) in sums.iter_mut().enumerate() {
                    for (v, sum) in sums.iter_mut().enumerate() {
                        *sum = load(place(r, v));
                    }
                }
            }
            for first in (0..self.blocks).step_by(SHARE) {
                let row = |b: usize, i: usize, v: usize| {
                    self.x.add(((b * BLOCK_ROWS + i) * V + v) * S::F32_LANES)
                };
                let w = |r: usize, b: usize| &*self.w.add(r * DEPTH + b);
                let mut whole = [[simd.splat_i32s(0); V]; R];
                for b in first..first + SHARE {
                    for pair in 0..PAIRS {
                        let p: [S::i32s; V] = from_fn(|v| load(row(b, pair, v)));
                        for (r, whole) in whole.iter_mut().enumerate() {
                            let pairs = w(r, b).q.as_ptr().cast::<i32>();
                            let q = simd.splat_i32s(pairs.add(pair).read());
                            for (whole, p) in whole.iter_mut().zip(p) {
                                *whole = simd.dot(*whole, q, p);
                            }
                        }
                    }
                    if ADDS {
                        let of_x: [S::f32s; V] = from_fn(|v| load(row(b, PAIRS + 1, v)));
                        for (r, sums) in sums.iter_mut().enumerate() {
                            let add = simd.splat_f32s(w(r, b).add);
                            for (sum, of_x) in sums.iter_mut().zip(of_x) {
                                *sum = simd.mul_add_e_f32s(add, of_x, *sum);
                            }
                        }
                    }
                }
                let last = first + SHARE - 1;
                let d: [S::f32s; V] = from_fn(|v| load(row(last, PAIRS, v)));
                for (r, (sums, whole)) in sums.iter_mut().zip(whole).enumerate() {
                    let scale = simd.splat_f32s(w(r, last).scale);
                    for ((sum, whole), d) in sums.iter_mut().zip(whole).zip(d) {
                        *sum =
                            simd.mul_add_e_f32s(simd.floats(whole), simd.mul_f32s(scale, d), *sum);
                    }
                }
            }
            for (r, sums) in sums.iter().enumerate() {
                for (v, sum) in sums.iter().enumerate() {
                    store(place(r, v), *sum);
                }
            }
        }
        R
    }
}

#[cfg(test)]
mod tests {
    use super::super::super::linear::Weight;
    use super::super::lanes::Instructions;
    use super::*;
    use crate::ggml::Type;

    #[test]
    fn vectors_of_either_width_give_the_same_bits() {
        let [Some(wide), Some(narrow)] = Instructions::all() else {
            return eprintln!("skipped: this processor has not both");
        };
        for ty in Type::all().filter(|ty| serves(*ty)) {
            for [n, t] in [[5, 1], [30, 9], [61, 33], [12, 70]] {
                let k = 768;
                let byte = |i: usize| (i * 131 % 251) as u8;
                // Halves far from infinity: their high bytes are small.
                let mut bytes: Vec<u8> = (0..n * ty.row_bytes(k).unwrap()).map(byte).collect();
                bytes.iter_mut().for_each(|byte| *byte &= 0x3b);
                let weight = Weight::of_bytes(ty, &bytes, k);
                let x: Vec<f32> = (0..k * t).map(|i| (i * 37 % 101) as f32 - 50.0).collect();
                let results = [wide, narrow].map(|instructions| {
                    let mut y = vec![0f32; n * t];
                    let mut scratch = vec![0f32; scratch(k, t)];
                    let p = Narrow {
                        weight: &weight,
                        sizes: [k, n, t],
                        ns: 0..n,
                        x: x.as_ptr(),
                        y: y.as_mut_ptr(),
                        scratch: &mut scratch,
                    };
                    // SAFETY: the sizes of x, y and scratch; the processor has both.
                    unsafe { instructions.run(p) };
                    y
                });
                assert!(results[0].iter().all(|y| y.is_finite() && *y != 0.0), "{ty} {n} {t}");
                assert_eq!(results[0], results[1], "{ty} {n} {t}");
            }
        }
    }
}
