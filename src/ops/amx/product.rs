//! Products of any size.

use std::cell::RefCell;
use std::sync::OnceLock;

use super::super::linear::steps;
use super::kernel::{Block, DEPTH, ROWS, Shapes, Tile, permitted};
use super::pack::{self, INNER};
use super::{Factor, Product};

/// Rows and columns that a [`Block`] sums up.
const SIDE: usize = 2 * ROWS;
/// Columns of B that are tiles at a time, and bytes of those tiles: half of the L2 cache of the processors that have such a unit.
pub(in super::super) const COLUMNS: usize = 512;
const BYTES: usize = 1 << 20;
/// Floats between rows of sums: not a power of two, with which rows would fall on the same few lines of a cache.
const WIDTH: usize = COLUMNS + ROWS;
/// Tiles that the sums of [`SIDE`] rows take.
const SUMS: usize = (SIDE * WIDTH * size_of::<f32>()).div_ceil(size_of::<Tile>());

/// Whether this processor has such a unit, and the system lets us have it.
pub(in super::super) fn has() -> bool {
    static HAS: OnceLock<bool> = OnceLock::new();
    *HAS.get_or_init(|| {
        let vectors = is_x86_feature_detected!("avx512f")
            && is_x86_feature_detected!("avx512bw")
            && is_x86_feature_detected!("avx512bf16");
        // `amx-tile` and `amx-bf16` are no features that stable Rust asks for.
        #[allow(unused_unsafe)] // safe in later versions of Rust
        // SAFETY: what has AVX-512 has this leaf.
        let unit = || unsafe { std::arch::x86_64::__cpuid_count(7, 0).edx } >> 22 & 0b101 == 0b101;
        vectors && unit() && permitted()
    })
}

thread_local! {
    static TILES: RefCell<Vec<Tile>> = const { RefCell::new(Vec::new()) };
}

/// Lends this thread `n` tiles of reused memory with arbitrary content.
fn with_tiles<R>(n: usize, f: impl FnOnce(&mut [Tile]) -> R) -> R {
    TILES.with_borrow_mut(|tiles| {
        if tiles.len() < n {
            tiles.resize(n, Tile([[0; DEPTH]; ROWS]));
        }
        f(&mut tiles[..n])
    })
}

/// # Safety
/// [`has`]; the views are valid for their extents, and C overlaps neither A nor B.
pub(in super::super) unsafe fn product(p: Product<'_>) {
    // SAFETY: by contract.
    unsafe {
        match p.rounded {
            true => by_parts::<2>(p),
            false => by_parts::<3>(p),
        }
    }
}

unsafe fn by_parts<const P: usize>(p: Product<'_>) {
    let [t, n, k] = p.sizes;
    assert!(p.a.column == 1 && p.c.column == 1);
    if let Factor::Memory(b) = p.b {
        assert!(b.row == 1 || b.column == 1);
    }
    if t == 0 || n == 0 {
        return;
    }
    assert!(k > 0, "something to sum up");
    // Sums over so much of k at a time: C is read and written as often less.
    let inner = p.b.inner();
    let most = BYTES / size_of::<Tile>() / P / (COLUMNS / ROWS) * DEPTH / INNER * INNER;
    let tiles = |k: usize| k.div_ceil(DEPTH) * P;
    let sides = n.min(COLUMNS).next_multiple_of(SIDE) / ROWS;
    let room = tiles(most.min(k)) * sides;
    with_tiles(room + 2 * tiles(most.min(k)) + SUMS, |memory| {
        let (b, memory) = memory.split_at_mut(room);
        let (sums, a) = memory.split_at_mut(SUMS);
        let sums: *mut f32 = sums.as_mut_ptr().cast();
        // SAFETY: by contract; the tiles have room.
        unsafe {
            let _shapes = Shapes::new();
            for ns in steps(0..n, COLUMNS) {
                let sides = ns.len().next_multiple_of(SIDE) / ROWS;
                for run in steps(0..k, most) {
                    // Runs of `inner` behind one another, in each of them the columns.
                    let at = |k: usize| tiles(k - run.start) * sides;
                    for ks in steps(run.clone(), INNER) {
                        pack::factor::<P>(p.b, ns.clone(), ks.clone(), &mut b[at(ks.start)..]);
                    }
                    for ts in steps(0..t, SIDE) {
                        for (i, a) in a.chunks_exact_mut(tiles(run.len())).take(2).enumerate() {
                            let from = (ts.start + i * ROWS).min(ts.end);
                            let ts = from..(from + ROWS).min(ts.end);
                            pack::rows::<P>(p.a, ts, run.clone(), p.alpha, a);
                        }
                        for ks in steps(run.clone(), inner) {
                            let each = tiles(ks.len());
                            for side in steps(ns.clone(), SIDE) {
                                let tile = at(ks.start) + (side.start - ns.start) / ROWS * each;
                                let block = Block {
                                    a: a.as_ptr().add(tiles(ks.start - run.start)),
                                    a_below: tiles(run.len()),
                                    b: b.as_ptr().add(tile),
                                    depth: ks.len().div_ceil(DEPTH),
                                    c: sums.add(side.start - ns.start),
                                    c_row: WIDTH,
                                    keep: ks.start > run.start,
                                };
                                block.run::<P>();
                            }
                        }
                        for (r, t) in ts.enumerate() {
                            let sums = std::slice::from_raw_parts(sums.add(r * WIDTH), ns.len());
                            let c = p.c.data.add(t * p.c.row + ns.start);
                            let c = std::slice::from_raw_parts_mut(c, ns.len());
                            match p.keep || run.start > 0 {
                                true => add(c, sums),
                                false => c.copy_from_slice(sums),
                            }
                        }
                    }
                }
            }
        }
    });
}

#[target_feature(enable = "avx512f")]
fn add(c: &mut [f32], sums: &[f32]) {
    c.iter_mut().zip(sums).for_each(|(c, sum)| *c += sum);
}

#[cfg(test)]
mod tests {
    use super::super::super::gemm::{Matrix, values};
    use super::*;

    /// The largest error, over the root of the sum of squares of what is summed up.
    fn error<const P: usize>(sizes: [usize; 3], b_rows: bool, keep: bool, alpha: f32) -> f64 {
        let [t, n, k] = sizes;
        let (c_row, a_row) = (n + 3, k + 5);
        let (a, b, before) = (values(t * a_row, 1), values(n * k, 2), values(t * c_row, 3));
        let mut c = before.clone();
        let at = |k_i: usize, n_i: usize| if b_rows { k_i * n + n_i } else { n_i * k + k_i };
        let strides = if b_rows { [n, 1] } else { [1, k] };
        // SAFETY: the sizes of these vectors.
        unsafe {
            by_parts::<P>(Product {
                sizes,
                a: Matrix::new(a.as_ptr(), a_row, 1),
                b: Factor::Memory(Matrix::new(b.as_ptr(), strides[0], strides[1])),
                c: Matrix::new(c.as_mut_ptr(), c_row, 1),
                keep,
                alpha,
                rounded: P == 2,
            });
        }
        let mut worst = 0f64;
        for i in 0..t {
            for j in 0..c_row {
                let got = c[i * c_row + j] as f64;
                if j >= n {
                    assert_eq!(got, before[i * c_row + j] as f64, "written beyond its columns");
                    continue;
                }
                let mut want = if keep { before[i * c_row + j] as f64 } else { 0.0 };
                let mut squares = want * want;
                for l in 0..k {
                    let one = alpha as f64 * a[i * a_row + l] as f64 * b[at(l, j)] as f64;
                    want += one;
                    squares += one * one;
                }
                worst = worst.max((got - want).abs() / squares.sqrt());
            }
        }
        worst
    }

    #[test]
    fn products_of_two_parts_are_close_and_of_three_exact() {
        if !has() {
            return eprintln!("skipped: this processor has no such unit");
        }
        let shapes =
            [[1, 1, 1], [32, 32, 32], [5, 70, 40], [33, 31, 257], [70, 545, 600], [16, 96, 512]];
        for sizes in shapes {
            for (b_rows, keep, alpha) in
                [(false, false, 1.0), (true, true, 1.0), (true, false, 0.37)]
            {
                let two = error::<2>(sizes, b_rows, keep, alpha);
                let three = error::<3>(sizes, b_rows, keep, alpha);
                println!("{sizes:?} {b_rows} {two:.2e} {three:.2e}");
                assert!(two < 2e-5 && three < 1e-6, "{sizes:?}: {two:e}, {three:e}");
            }
        }
    }
}
