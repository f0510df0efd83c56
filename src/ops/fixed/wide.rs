//! Products of many columns with any weights, an update's, where numbers may be rounded.
//!
//! ```text
//! C[t, n] = keep C + alpha sum_b d[b, t] scale[n, b] (sum_{k in b} q[n, k] p[k, t])
//! ```
//!
//! What a weight's type has no whole numbers for, and what is summed over a weight's rows, whose scales differ, is rounded
//! to whole numbers of 13 bits, with one scale for 32 inputs of an output: by at most 1/8190 of the largest of them.

use std::cell::RefCell;
use std::ops::Range;

use super::super::gemm::{Factor, Product};
use super::super::linear::steps;
use super::super::panel::{LANES, Strided, aligned, transpose};
use super::lanes::{Kernel, Pairs, instructions};
use super::work::{
    BLOCK_ROWS, DEPTH, LEAST, PAIRS, Part, QUANTS_FLOATS, VECTORS, load, pack, panels, store,
};
use crate::ggml::{LARGEST, QUANTS, Quants, QuantsForm};

/// Outputs whose whole numbers lie in scratch at a time, and columns whose sums do: what an L2 cache holds.
pub(in super::super) const COLUMNS: usize = 512;
const TOKENS: usize = 512;
/// The largest q.
const MOST: f32 = (LARGEST - 1) as f32;
/// Floats between rows of sums, and of outputs: no powers of two, with which rows would fall on the same few lines of a cache; equal,
/// so that [`transpose`] reads a line of sums once.
const WIDTH: usize = TOKENS + LANES;
const ROW: usize = COLUMNS + LANES;
/// Floats of each part of scratch: whole numbers, a panel of activations, sums, and rows that are to be turned.
const TILE: usize = COLUMNS * DEPTH * QUANTS_FLOATS;
const PANEL: usize = DEPTH * BLOCK_ROWS * VECTORS * LANES;
const SUMS: usize = COLUMNS * WIDTH;
const ROWS: usize = QUANTS * ROW;
const _: () = assert!(LANES * (DEPTH * QUANTS + LANES) <= ROWS && LANES <= QUANTS && ROW <= WIDTH);

thread_local! {
    static SCRATCH: RefCell<Vec<f32>> = const { RefCell::new(Vec::new()) };
}

/// Whether this processor has such products.
pub(in super::super) fn has() -> bool {
    instructions().is_some()
}

/// # Safety
/// [`has`]; the views are valid for their extents, and C overlaps neither A nor B.
pub(in super::super) unsafe fn product(p: Product<'_>) {
    assert!(p.a.column == 1 && p.c.column == 1);
    SCRATCH.with_borrow_mut(|scratch| {
        scratch.resize(TILE + PANEL + SUMS + ROWS + LANES, 0.0);
        // SAFETY: by contract; the processor was asked.
        unsafe { instructions().expect("a processor that has them").run(Wide { p, scratch }) }
    });
}

/// A product, and this thread's memory for it.
struct Wide<'w> {
    p: Product<'w>,
    scratch: &'w mut [f32],
}

impl Kernel for Wide<'_> {
    #[inline(always)]
    unsafe fn run<S: Pairs>(self, simd: S) {
        // SAFETY: by the contract of `product`, the only one that makes it.
        unsafe { run(simd, self.p, self.scratch) }
    }
}

#[inline(always)]
unsafe fn run<S: Pairs>(simd: S, p: Product<'_>, scratch: &mut [f32]) {
    let [t, n, k] = p.sizes;
    let (tile, rest) = aligned(scratch).split_at_mut(TILE);
    let (x, rest) = rest.split_at_mut(PANEL);
    let (sums, rows) = rest.split_at_mut(SUMS);
    let form = form(p.b);
    // SAFETY: by contract; any bits are a `Quants`, which floats are aligned for.
    unsafe {
        let tile =
            std::slice::from_raw_parts_mut(tile.as_mut_ptr().cast::<Quants>(), COLUMNS * DEPTH);
        for ns in steps(0..n, COLUMNS) {
            for ts in steps(0..t, TOKENS) {
                let width = ts.len().next_multiple_of(S::F32_LANES);
                for ks in steps(0..k, DEPTH * QUANTS) {
                    let blocks = ks.len().div_ceil(QUANTS);
                    factor(simd, p.b, ns.clone(), ks.clone(), tile, rows);
                    for panel in panels::<S>(width) {
                        let a = p.a.data.add((ts.start + panel.from) * p.a.row + ks.start);
                        let sizes = [ks.len(), ts.len() - panel.from];
                        let a = Strided(a, p.a.row);
                        pack(simd, a, sizes, form.share, panel, x.as_mut_ptr());
                        let part = Part {
                            blocks,
                            w: tile.as_ptr(),
                            x: x.as_ptr(),
                            sums: sums.as_mut_ptr().add(panel.from),
                            width: WIDTH,
                            first: ks.start == 0,
                        };
                        part.run(simd, form, ns.len(), panel.vectors);
                    }
                }
                for columns in steps(0..ts.len(), LANES) {
                    let from = Strided(sums.as_ptr().add(columns.start), WIDTH);
                    transpose(from, Strided(rows.as_mut_ptr(), ROW), ns.len(), columns.len());
                    for (t, row) in columns.zip(rows.chunks_exact(ROW)) {
                        let c = p.c.data.add((ts.start + t) * p.c.row + ns.start);
                        let c = std::slice::from_raw_parts_mut(c, ns.len());
                        match p.keep {
                            true => c.iter_mut().zip(row).for_each(|(c, sum)| *c += p.alpha * sum),
                            false => c.iter_mut().zip(row).for_each(|(c, sum)| *c = p.alpha * sum),
                        }
                    }
                }
            }
        }
    }
}

/// What whole numbers a factor's are.
fn form(b: Factor<'_>) -> QuantsForm {
    match b {
        Factor::Columns(weight, _) => weight.ty().quants_reader().map(|reader| reader.form),
        _ => None,
    }
    .unwrap_or(QuantsForm { adds: false, share: 1 })
}

/// Columns `ns` of B, of its rows `ks`: of each [`DEPTH`] blocks.
#[inline(always)]
unsafe fn factor<S: Pairs>(
    simd: S,
    b: Factor<'_>,
    ns: Range<usize>,
    ks: Range<usize>,
    tile: &mut [Quants],
    rows: &mut [f32],
) {
    let wide = DEPTH * QUANTS + LANES;
    let numbers = rows.as_mut_ptr();
    // SAFETY: the ranges lie within B, whole blocks of a weight; `tile` and `rows` have room.
    unsafe {
        match b {
            Factor::Columns(weight, first) => {
                weight.count(ns.len() * ks.len());
                if let Some(reader) = weight.ty().quants_reader() {
                    for (n, out) in ns.zip(tile.chunks_exact_mut(DEPTH)) {
                        let out = &mut out[..ks.len() / QUANTS];
                        weight.read_quants(reader, first + n, ks.start, out);
                    }
                    return;
                }
                for (some, tile) in steps(ns, LANES).zip(tile.chunks_exact_mut(LANES * DEPTH)) {
                    for (n, row) in some.clone().zip(rows.chunks_exact_mut(wide)) {
                        weight.read(first + n, ks.clone(), &mut row[..ks.len()]);
                    }
                    columns(simd, Strided(numbers, wide), [ks.len(), some.len()], tile);
                }
            }
            Factor::Memory(b) if b.row == 1 => {
                for (some, tile) in steps(ns, LANES).zip(tile.chunks_exact_mut(LANES * DEPTH)) {
                    let from = b.data.add(some.start * b.column + ks.start);
                    columns(simd, Strided(from, b.column), [ks.len(), some.len()], tile);
                }
            }
            Factor::Memory(b) => {
                assert!(b.column == 1, "rows, or columns, are contiguous");
                for (block, ks) in steps(ks, QUANTS).enumerate() {
                    let from = b.data.add(ks.start * b.row + ns.start);
                    let from = Strided(from, b.row);
                    whole(simd, from, [ks.len(), ns.len()], tile[block..].as_mut_ptr());
                }
            }
            Factor::Rows(weight, first) => {
                weight.count(ns.len() * ks.len());
                for (block, ks) in steps(ks, QUANTS).enumerate() {
                    for (k, row) in ks.clone().zip(rows.chunks_exact_mut(ROW)) {
                        weight.read(k, first + ns.start..first + ns.end, &mut row[..ns.len()]);
                    }
                    let from = Strided(numbers.cast_const(), ROW);
                    whole(simd, from, [ks.len(), ns.len()], tile[block..].as_mut_ptr());
                }
            }
        }
    }
}

/// All blocks of up to [`LANES`] outputs of `k` inputs each, which are contiguous.
#[inline(always)]
unsafe fn columns<S: Pairs>(
    simd: S,
    from: Strided<*const f32>,
    [k, outs]: [usize; 2],
    tile: &mut [Quants],
) {
    let mut turned = [0f32; QUANTS * LANES];
    for (block, ks) in steps(0..k, QUANTS).enumerate() {
        // SAFETY: `outs` times k numbers, by the caller.
        unsafe {
            let to = Strided(turned.as_mut_ptr(), LANES);
            transpose(Strided(from.0.add(ks.start), from.1), to, outs, ks.len());
            let from = Strided(turned.as_ptr(), LANES);
            whole(simd, from, [ks.len(), outs], tile[block..].as_mut_ptr());
        }
    }
}

/// A block of each of `outs` outputs, which are contiguous in each of up to [`QUANTS`] rows, the inputs, as whole numbers of
/// 13 bits: that of the next output [`DEPTH`] further on in `to`, which has room for a multiple of [`LANES`].
#[inline(always)]
unsafe fn whole<S: Pairs>(
    simd: S,
    from: Strided<*const f32>,
    [inputs, outs]: [usize; 2],
    to: *mut Quants,
) {
    let zero = simd.splat_f32s(0.0);
    let mut rest = [0f32; QUANTS * LANES];
    for some in steps(0..outs, S::F32_LANES) {
        // SAFETY: rows of `outs` numbers; a vector is read where so many are left.
        unsafe {
            let mut from = Strided(from.0.add(some.start), from.1);
            if some.len() < S::F32_LANES {
                for (row, out) in rest.chunks_exact_mut(LANES).take(inputs).enumerate() {
                    let row = std::slice::from_raw_parts(from.0.add(row * from.1), some.len());
                    out[..some.len()].copy_from_slice(row);
                }
                from = Strided(rest.as_ptr(), LANES);
            }
            let (mut most, mut odd) = (simd.splat_f32s(LEAST), zero);
            for i in 0..inputs {
                let number = load::<S::f32s>(from.0.add(i * from.1));
                most = simd.max_f32s(simd.abs_f32s(number), most);
                odd = simd.add_f32s(odd, simd.sub_f32s(number, number));
            }
            let times = simd.div_f32s(simd.splat_f32s(MOST), most);
            let scale = simd.mul_f32s(most, simd.splat_f32s(1.0 / MOST));
            let mut pairs = [0f32; PAIRS * LANES];
            for pair in 0..PAIRS {
                let [mut first, mut second] = [zero; 2];
                if 2 * pair < inputs {
                    first = load(from.0.add(2 * pair * from.1));
                }
                if 2 * pair + 1 < inputs {
                    second = load(from.0.add((2 * pair + 1) * from.1));
                }
                let both = simd.pairs(simd.mul_f32s(first, times), simd.mul_f32s(second, times));
                store(pairs.as_mut_ptr().add(pair * S::F32_LANES), both);
            }
            let to = to.add(some.start * DEPTH);
            let q = Strided(to.cast::<f32>(), DEPTH * QUANTS_FLOATS);
            transpose(Strided(pairs.as_ptr(), S::F32_LANES), q, PAIRS, S::F32_LANES);
            let mut scales = [0f32; LANES];
            // What is no number stays none.
            store(scales.as_mut_ptr(), simd.add_f32s(scale, odd));
            for (i, scale) in scales[..S::F32_LANES].iter().enumerate() {
                let out = to.add(i * DEPTH);
                (*out).scale = *scale;
                (*out).add = 0.0;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::super::gemm::{Matrix, values};
    use super::super::super::linear::Weight;
    use super::*;
    use crate::ggml::Type;

    /// The largest error, over what rounding allows: half a unit of every number's block. `b(k, n)` is what `factor` stands for, as
    /// whole numbers of its own or not.
    fn error(
        [t, n, k]: [usize; 3],
        factor: Factor<'_>,
        (b, is_whole): (&dyn Fn(usize, usize) -> f32, bool),
        keep: bool,
        alpha: f32,
    ) -> f64 {
        let (a_row, c_row) = (k + 5, n + 3);
        let (a, before) = (values(t * a_row, 1), values(t * c_row, 3));
        let mut c = before.clone();
        // SAFETY: the sizes of these vectors.
        unsafe {
            product(Product {
                sizes: [t, n, k],
                a: Matrix::new(a.as_ptr(), a_row, 1),
                b: factor,
                c: Matrix::new(c.as_mut_ptr(), c_row, 1),
                keep,
                alpha,
                rounded: true,
            });
        }
        let largest = |x: &mut dyn Iterator<Item = f32>| x.fold(0f32, |m, x| m.max(x.abs())) as f64;
        let mut worst = 0f64;
        for i in 0..t {
            for j in 0..c_row {
                let (got, old) = (c[i * c_row + j] as f64, before[i * c_row + j] as f64);
                if j >= n {
                    assert_eq!(got, old, "beyond the columns");
                    continue;
                }
                let (mut want, mut most) = (if keep { old } else { 0.0 }, 1e-7);
                for ls in steps(0..k, form(factor).share * QUANTS) {
                    let a = |l: usize| a[i * a_row + l];
                    let half_a = largest(&mut ls.clone().map(a)) / (2.0 * 16383.0);
                    let half_b = largest(&mut ls.clone().map(|l| b(l, j))) / (2.0 * MOST as f64);
                    let half_b = if is_whole { 0.0 } else { half_b };
                    for (a, b) in ls.map(|l| (a(l) as f64, b(l, j) as f64)) {
                        want += alpha as f64 * a * b;
                        most += a.abs() * half_b + b.abs() * half_a + half_a * half_b;
                        most += 1e-6 * (a * b).abs();
                    }
                }
                worst = worst.max((got - want).abs() / most);
            }
        }
        worst
    }

    #[test]
    fn products_are_close_whatever_the_sizes_and_the_order_of_numbers() {
        if !has() {
            return eprintln!("skipped: a processor without");
        }
        for sizes in [[1, 1, 1], [3, 17, 31], [33, 40, 256], [40, 530, 300], [515, 20, 65]] {
            let [_, n, k] = sizes;
            let b = values(n * k, 2);
            for (keep, alpha) in [(false, 1.0), (true, 0.5)] {
                let rows = Factor::Memory(Matrix::new(b.as_ptr(), n, 1));
                let by_rows = error(sizes, rows, (&|l, j| b[l * n + j], false), keep, alpha);
                let columns = Factor::Memory(Matrix::new(b.as_ptr(), 1, k));
                let by_columns = error(sizes, columns, (&|l, j| b[j * k + l], false), keep, alpha);
                assert!(by_rows < 1.0 && by_columns < 1.0, "{sizes:?}: {by_rows}, {by_columns}");
            }
        }
    }

    #[test]
    fn weights_of_every_type_are_multiplied_from_either_side() {
        if !has() {
            return eprintln!("skipped: a processor without");
        }
        for ty in Type::all().filter(|ty| ty.can_dequantize()) {
            let (n, k, t) = (37, 768, 35);
            // Halves far from infinity: their high bytes are small.
            let bytes: Vec<u8> = (0..n * ty.row_bytes(k).unwrap())
                .map(|i| ((i * 2_654_435_761) >> 9) as u8 & 0x3b)
                .collect();
            let weight = Weight::of_bytes(ty, &bytes, k);
            let mut w = vec![0f32; n * k];
            for (i, row) in w.chunks_exact_mut(k).enumerate() {
                // SAFETY: whole rows.
                unsafe { weight.read(i, 0..k, row) };
            }
            let is_whole = ty.quants_reader().is_some();
            let b = |l: usize, j: usize| w[(5 + j) * k + l];
            let forward =
                error([t, n - 5, k], Factor::Columns(&weight, 5), (&b, is_whole), false, 1.0);
            let b = |l: usize, j: usize| w[l * k + 256 + j];
            let back = error([t, 512, n], Factor::Rows(&weight, 256), (&b, false), true, 1.0);
            assert!(forward < 1.0 && back < 1.0, "{ty}: {forward} forward, {back} back");
        }
    }

    #[test]
    fn what_is_no_number_stays_none() {
        if !has() {
            return eprintln!("skipped: a processor without");
        }
        let (n, k) = (20, 64);
        let mut b = vec![1f32; n * k];
        b[7 * k + 40] = f32::NAN;
        b[9 * k + 3] = f32::INFINITY;
        let (a, mut c) = (vec![1f32; k], vec![0f32; n]);
        // SAFETY: the sizes of these vectors.
        unsafe {
            product(Product {
                sizes: [1, n, k],
                a: Matrix::new(a.as_ptr(), k, 1),
                b: Factor::Memory(Matrix::new(b.as_ptr(), 1, k)),
                c: Matrix::new(c.as_mut_ptr(), n, 1),
                keep: false,
                alpha: 1.0,
                rounded: true,
            });
        }
        for (j, c) in c.iter().enumerate() {
            assert_eq!(c.is_finite(), j != 7 && j != 9, "{j}: {c}");
        }
    }
}
