//! Columns in fixed point, and the kernel.

use std::array::from_fn;
use std::sync::OnceLock;

use super::super::linear::steps;
use super::super::narrow::{Narrow, ROWS};
use super::super::panel::{self, MOST_ROWS, Strided, aligned, transpose};
use super::lanes::{Avx512Vnni, AvxVnni, Lanes};
use crate::ggml::{LARGEST, QUANTS, Quants};

/// The largest p: 32 products with q of at most 4096 ([`LARGEST`]) stay below 2^31.
const MOST: f32 = 16383.0;
const _: () = assert!(LARGEST as u64 * MOST as u64 * (QUANTS as u64) < 1 << 31);
/// Smaller ones count as the largest activation of a block: 16383 by less would overflow.
const LEAST: f32 = 1e-30;
/// Pairs of p in a block.
const PAIRS: usize = QUANTS / 2;
/// Vectors of a block of activations: pairs, their d, the block's sum.
const BLOCK_ROWS: usize = PAIRS + 2;
/// Blocks that one pass over a row sums, and what the L1 cache holds of a few rows.
const DEPTH: usize = 8;
/// Vectors of columns that go with a few rows: as many sums, whole and floating, as registers hold, and activations as the L1
/// cache holds beside the rows. They lie side by side, block after block: a panel.
const VECTORS: usize = 2;
/// Blocks that have one d, at most.
const MOST_SHARE: usize = 2;
/// Floats of a [`Quants`].
const QUANTS_FLOATS: usize = size_of::<Quants>() / 4;

/// Floats that a call takes.
pub(in super::super) fn scratch(k: usize, t: usize) -> usize {
    let width = t.next_multiple_of(panel::LANES);
    (k / QUANTS * BLOCK_ROWS + ROWS) * width + MOST_ROWS * DEPTH * QUANTS_FLOATS + panel::LANES
}

/// What this processor has of them.
#[derive(Clone, Copy)]
pub(super) enum Instructions {
    Avx512Vnni,
    AvxVnni,
}

pub(super) fn instructions() -> Option<Instructions> {
    static HAS: OnceLock<Option<Instructions>> = OnceLock::new();
    *HAS.get_or_init(|| {
        let wide = is_x86_feature_detected!("avx512f")
            && is_x86_feature_detected!("avx512bw")
            && is_x86_feature_detected!("avx512vnni");
        let narrow = is_x86_feature_detected!("avx2")
            && is_x86_feature_detected!("fma")
            && is_x86_feature_detected!("avxvnni");
        let found = [(wide, Instructions::Avx512Vnni), (narrow, Instructions::AvxVnni)];
        found.into_iter().find_map(|(has, which)| has.then_some(which))
    })
}

/// # Safety
/// The contract of [`super::super::narrow::run`]; [`super::serves`] the weight's type; `scratch` is for the product's sizes.
pub(in super::super) unsafe fn run(p: Narrow<'_>) {
    // SAFETY: by contract; the processor was asked.
    unsafe {
        match instructions().expect("a type that is served") {
            Instructions::Avx512Vnni => by_avx512(p),
            Instructions::AvxVnni => by_avx(p),
        }
    }
}

#[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
unsafe fn by_avx512(p: Narrow<'_>) {
    // SAFETY: by contract.
    unsafe { product::<Avx512Vnni>(p) }
}

#[target_feature(enable = "avx2,fma,avxvnni")]
unsafe fn by_avx(p: Narrow<'_>) {
    // SAFETY: by contract.
    unsafe { product::<AvxVnni>(p) }
}

#[inline(always)]
unsafe fn product<L: Lanes>(p: Narrow<'_>) {
    let [k, n, t] = p.sizes;
    let reader = p.weight.ty().quants_reader().expect("a type that is served");
    let blocks = k / QUANTS;
    let width = t.next_multiple_of(L::LANES);
    let (x, rest) = aligned(p.scratch).split_at_mut(blocks * BLOCK_ROWS * width);
    let (sums, tile) = rest.split_at_mut(ROWS * width);
    // SAFETY: within x, y and scratch by contract; any bits are a `Quants`, which floats are aligned for.
    unsafe {
        for panel in panels::<L>(width) {
            let out = x.as_mut_ptr().add(panel.from * blocks * BLOCK_ROWS);
            pack::<L>(p.x.add(panel.from * k), [k, t - panel.from], reader.share, panel, out);
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
                    for panel in panels::<L>(width) {
                        let first = panel.from * blocks + bs.start * panel.vectors * L::LANES;
                        let part = Part {
                            blocks: bs.len(),
                            w: tile.as_ptr(),
                            x: x.as_ptr().add(first * BLOCK_ROWS),
                            sums: sums.as_mut_ptr().add(rows.start * width + panel.from),
                            width,
                            first: bs.start == 0,
                        };
                        match (reader.adds, reader.share) {
                            (true, 1) => part.rows::<L, true, 1>(rows.len(), panel.vectors),
                            (true, _) => part.rows::<L, true, 2>(rows.len(), panel.vectors),
                            (false, _) => part.rows::<L, false, 1>(rows.len(), panel.vectors),
                        }
                    }
                }
            }
            let to = Strided(p.y.add(ns.start), n);
            transpose(Strided(sums.as_ptr(), width), to, ns.len(), t);
        }
    }
}

/// Columns from one on, of so many vectors.
#[derive(Clone, Copy)]
struct Columns {
    from: usize,
    vectors: usize,
}

fn panels<L: Lanes>(width: usize) -> impl Iterator<Item = Columns> {
    steps(0..width, VECTORS * L::LANES)
        .map(|columns| Columns { from: columns.start, vectors: columns.len() / L::LANES })
}

/// A panel of `x: [K, T]` in fixed point: of each block of k its pairs, d and sums; d is that of `share` blocks. Columns beyond
/// T are 0.
#[inline(always)]
unsafe fn pack<L: Lanes>(
    x: *const f32,
    [k, t]: [usize; 2],
    share: usize,
    panel: Columns,
    out: *mut f32,
) {
    let width = panel.vectors * L::LANES;
    for v in 0..panel.vectors {
        let from = v * L::LANES;
        let columns = L::LANES.min(t - from);
        let mut turned = [0f32; MOST_SHARE * QUANTS * panel::LANES];
        for bs in steps(0..k / QUANTS, share) {
            // SAFETY: x holds these columns, `out` a block's rows for each block of k.
            unsafe {
                let numbers = bs.len() * QUANTS;
                let block = Strided(x.add(from * k + bs.start * QUANTS), k);
                transpose(block, Strided(turned.as_mut_ptr(), L::LANES), columns, numbers);
                let number = |i: usize| L::load(turned.as_ptr().add(i * L::LANES));
                let mut most = L::each(LEAST);
                for i in 0..numbers {
                    most = L::max(L::abs(number(i)), most);
                }
                let times = L::div(L::each(MOST), most);
                let d = L::mul(most, L::each(1.0 / MOST));
                for (i, b) in bs.enumerate() {
                    let out = out.add(b * BLOCK_ROWS * width + from);
                    let mut sum = L::each(0.0);
                    for pair in 0..PAIRS {
                        let [first, second] =
                            [0, 1].map(|half| number(i * QUANTS + 2 * pair + half));
                        sum = L::add(sum, L::add(first, second));
                        let pairs = L::pairs(L::mul(first, times), L::mul(second, times));
                        L::store_whole(out.add(pair * width), pairs);
                    }
                    // What is no number stays none.
                    L::store(out.add(PAIRS * width), L::add(d, L::sub(sum, sum)));
                    L::store(out.add((PAIRS + 1) * width), sum);
                }
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
    /// [`BLOCK_ROWS`] rows of a panel a block.
    x: *const f32,
    /// Rows of `width`.
    sums: *mut f32,
    width: usize,
    /// There are no sums yet.
    first: bool,
}

impl Part {
    /// All rows, of a panel of so many vectors.
    #[inline(always)]
    unsafe fn rows<L: Lanes, const ADDS: bool, const SHARE: usize>(
        self,
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
                    (12.., 1) => part.kernel::<L, ADDS, SHARE, 12, 1>(),
                    (6.., 1) => part.kernel::<L, ADDS, SHARE, 6, 1>(),
                    (6.., _) => part.kernel::<L, ADDS, SHARE, 6, 2>(),
                    (2.., 1) => part.kernel::<L, ADDS, SHARE, 2, 1>(),
                    (2.., _) => part.kernel::<L, ADDS, SHARE, 2, 2>(),
                    (_, 1) => part.kernel::<L, ADDS, SHARE, 1, 1>(),
                    (_, _) => part.kernel::<L, ADDS, SHARE, 1, 2>(),
                }
            };
        }
    }

    /// Rows that were multiplied.
    #[inline(always)]
    unsafe fn kernel<
        L: Lanes,
        const ADDS: bool,
        const SHARE: usize,
        const R: usize,
        const V: usize,
    >(
        self,
    ) -> usize {
        // SAFETY: R rows and V vectors lie within w, x and the sums, by the caller.
        unsafe {
            let place = |r: usize, v: usize| self.sums.add(r * self.width + v * L::LANES);
            let mut sums = [[L::each(0.0); V]; R];
            if !self.first {
                for (r, sums) in sums.iter_mut().enumerate() {
                    for (v, sum) in sums.iter_mut().enumerate() {
                        *sum = L::load(place(r, v));
                    }
                }
            }
            for first in (0..self.blocks).step_by(SHARE) {
                let row = |b: usize, i: usize, v: usize| {
                    self.x.add(((b * BLOCK_ROWS + i) * V + v) * L::LANES)
                };
                let w = |r: usize, b: usize| &*self.w.add(r * DEPTH + b);
                let mut whole = [[L::each_whole(0); V]; R];
                for b in first..first + SHARE {
                    for pair in 0..PAIRS {
                        let p: [_; V] = from_fn(|v| L::load_whole(row(b, pair, v)));
                        for (r, whole) in whole.iter_mut().enumerate() {
                            let pairs = w(r, b).q.as_ptr().cast::<i32>();
                            let q = L::each_whole(pairs.add(pair).read());
                            for (whole, p) in whole.iter_mut().zip(p) {
                                *whole = L::dot(*whole, q, p);
                            }
                        }
                    }
                    if ADDS {
                        let of_x: [_; V] = from_fn(|v| L::load(row(b, PAIRS + 1, v)));
                        for (r, sums) in sums.iter_mut().enumerate() {
                            let add = L::each(w(r, b).add);
                            for (sum, of_x) in sums.iter_mut().zip(of_x) {
                                *sum = L::mul_add(add, of_x, *sum);
                            }
                        }
                    }
                }
                let last = first + SHARE - 1;
                let d: [_; V] = from_fn(|v| L::load(row(last, PAIRS, v)));
                for (r, (sums, whole)) in sums.iter_mut().zip(whole).enumerate() {
                    let scale = L::each(w(r, last).scale);
                    for ((sum, whole), d) in sums.iter_mut().zip(whole).zip(d) {
                        *sum = L::mul_add(L::floats(whole), L::mul(scale, d), *sum);
                    }
                }
            }
            for (r, sums) in sums.iter().enumerate() {
                for (v, sum) in sums.iter().enumerate() {
                    L::store(place(r, v), *sum);
                }
            }
        }
        R
    }
}

#[cfg(test)]
mod tests {
    use super::super::super::linear::Weight;
    use super::*;
    use crate::ggml::Type;

    #[test]
    fn vectors_of_either_width_give_the_same_bits() {
        let both = instructions().is_some_and(|has| matches!(has, Instructions::Avx512Vnni))
            && is_x86_feature_detected!("avxvnni");
        if !both {
            return eprintln!("skipped: this processor has not both");
        }
        for ty in Type::all().filter(|ty| super::super::serves(*ty)) {
            for [n, t] in [[5, 1], [30, 9], [61, 33], [12, 70]] {
                let k = 768;
                let byte = |i: usize| (i * 131 % 251) as u8;
                // Halves far from infinity: their high bytes are small.
                let mut bytes: Vec<u8> = (0..n * ty.row_bytes(k).unwrap()).map(byte).collect();
                bytes.iter_mut().for_each(|byte| *byte &= 0x3b);
                let weight = Weight::of_bytes(ty, &bytes, k);
                let x: Vec<f32> = (0..k * t).map(|i| (i * 37 % 101) as f32 - 50.0).collect();
                let results = [by_avx512, by_avx].map(|by| {
                    let mut y = vec![0f32; n * t];
                    let mut scratch = vec![0f32; scratch(k, t)];
                    // SAFETY: the sizes of x, y and scratch; the processor has both.
                    unsafe {
                        by(Narrow {
                            weight: &weight,
                            sizes: [k, n, t],
                            ns: 0..n,
                            x: x.as_ptr(),
                            y: y.as_mut_ptr(),
                            scratch: &mut scratch,
                        })
                    };
                    y
                });
                assert!(results[0].iter().all(|y| y.is_finite() && *y != 0.0), "{ty} {n} {t}");
                assert_eq!(results[0], results[1], "{ty} {n} {t}");
            }
        }
    }
}
