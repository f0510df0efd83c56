//! Numbers as tiles of bfloat16.

use std::arch::x86_64::*;
use std::ops::Range;

use super::super::gemm::Matrix;
use super::super::linear::steps;
use super::Factor;
use super::kernel::{DEPTH, ROWS, Tile};

/// Columns of B that are read at a time, where its rows are contiguous: whole blocks of any type.
const WIDE: usize = 256;
/// Numbers of a column of B that are packed at a time, at most: whole blocks of any type.
pub(super) const INNER: usize = 256;

impl Factor<'_> {
    /// Numbers of a column that are summed up at a time, a part of [`INNER`]. Tiles of 128 of 32 rows and 32 columns lie in the
    /// nearest cache together; where rows are contiguous, fewer sums are worth more.
    pub(super) fn inner(self) -> usize {
        match self {
            Factor::Columns(..) => INNER / 2,
            Factor::Memory(b) if b.row == 1 => INNER / 2,
            Factor::Memory(_) | Factor::Rows(..) => INNER,
        }
    }
}

/// Where the tiles of a part of B lie: runs of `inner` of its `k` rows behind one another, in each of them 16 columns at a time
/// `[depth][P]` tiles.
#[derive(Clone, Copy)]
struct Layout {
    k: usize,
    inner: usize,
    sides: usize,
}

impl Layout {
    /// The first of P tiles of 32 rows and 16 columns.
    fn at<const P: usize>(self, side: usize, depth: usize) -> usize {
        let run = depth * DEPTH / self.inner * self.inner;
        let each = self.inner.min(self.k - run).div_ceil(DEPTH);
        (run / DEPTH * self.sides + side * each + depth - run / DEPTH) * P
    }
}

/// The first `n` of 16 lanes.
fn first(n: usize) -> __mmask16 {
    ((1u32 << n.min(16)) - 1) as __mmask16
}

/// The nearest bfloat16 of each number, as F32, and what that leaves. NaN may become 0 and NaN.
#[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
#[inline]
fn cut([a, b]: [__m512; 2]) -> ([__m512i; 2], [__m512; 2]) {
    let (half, top) = (_mm512_set1_epi32(0x8000), _mm512_set1_epi32(0xffff_0000u32 as i32));
    let near_a = _mm512_and_si512(_mm512_add_epi32(_mm512_castps_si512(a), half), top);
    let near_b = _mm512_and_si512(_mm512_add_epi32(_mm512_castps_si512(b), half), top);
    let rest_a = _mm512_sub_ps(a, _mm512_castsi512_ps(near_a));
    let rest_b = _mm512_sub_ps(b, _mm512_castsi512_ps(near_b));
    ([near_a, near_b], [rest_a, rest_b])
}

/// 32 numbers as the nearest bfloat16, NaN as NaN.
#[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
#[inline]
fn nearest([a, b]: [__m512; 2]) -> __m512i {
    // SAFETY: vectors of the same 512 bits.
    unsafe { std::mem::transmute::<__m512bh, __m512i>(_mm512_cvtne2ps_pbh(b, a)) }
}

/// The order that brings each of the first 16 of 32 together with its like of the last 16.
static PAIRS: [u16; 32] = {
    let mut at = [0; 32];
    let mut i = 0;
    while i < 16 {
        (at[2 * i], at[2 * i + 1]) = (i as u16, 16 + i as u16);
        i += 1;
    }
    at
};
/// The upper halves of 32 times 32 bits.
static ODD: [u16; 32] = {
    let mut at = [0; 32];
    let mut i = 0;
    while i < 32 {
        at[i] = 2 * i as u16 + 1;
        i += 1;
    }
    at
};

#[target_feature(enable = "avx512f")]
#[inline]
fn order(places: &[u16; 32]) -> __m512i {
    // SAFETY: 32 numbers.
    unsafe { _mm512_loadu_si512(places.as_ptr().cast()) }
}

/// 32 numbers as row `r` of P tiles: neighbours of a row of A, or 16 columns of two rows of B, `PAIRED` column by column.
///
/// # Safety
/// P tiles are there.
#[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
#[inline]
unsafe fn put<const P: usize, const PAIRED: bool>(
    [mut a, mut b]: [__m512; 2],
    r: usize,
    to: *mut Tile,
) {
    for part in 0..P {
        let number = if part + 1 < P {
            let near;
            (near, [a, b]) = cut([a, b]);
            match PAIRED {
                true => _mm512_or_si512(_mm512_srli_epi32::<16>(near[0]), near[1]),
                false => _mm512_permutex2var_epi16(near[0], order(&ODD), near[1]),
            }
        } else {
            let near = nearest([a, b]);
            if PAIRED { _mm512_permutexvar_epi16(order(&PAIRS), near) } else { near }
        };
        // SAFETY: by contract.
        unsafe { _mm512_store_si512((*to.add(part)).0[r].as_mut_ptr().cast(), number) };
    }
}

/// The first `left` of 32 numbers, zeros behind them.
///
/// # Safety
/// So many lie there.
#[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
#[inline]
unsafe fn load(from: *const f32, left: usize) -> [__m512; 2] {
    // SAFETY: by contract; masked lanes are not read.
    unsafe {
        if left >= DEPTH {
            return [_mm512_loadu_ps(from), _mm512_loadu_ps(from.add(16))];
        }
        let (low, high) = (first(left), first(left.saturating_sub(16)));
        [_mm512_maskz_loadu_ps(low, from), _mm512_maskz_loadu_ps(high, from.wrapping_add(16))]
    }
}

/// Rows `rows` (up to 16) of a matrix whose rows are contiguous, columns `ks`, times `alpha`: `[depth][P]` tiles of 16 rows.
/// What lies beyond is 0.
///
/// # Safety
/// The ranges lie within the matrix, `out` has room.
#[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
pub(super) unsafe fn rows<const P: usize>(
    from: Matrix<*const f32>,
    rows: Range<usize>,
    ks: Range<usize>,
    alpha: f32,
    out: &mut [Tile],
) {
    for r in 0..ROWS {
        // SAFETY: by contract.
        unsafe {
            match r < rows.len() {
                true => {
                    let at = from.data.add((rows.start + r) * from.row + ks.start);
                    row::<P>(at, ks.len(), alpha, r, out.as_mut_ptr(), from.row);
                }
                false => out.iter_mut().for_each(|tile| tile.0[r] = [0; DEPTH]),
            }
        }
    }
}

/// `k` numbers times `alpha`, as row `r` of `[depth][P]` tiles; what lies `next` numbers on will be wanted soon.
///
/// # Safety
/// So many lie there; `out` has room.
#[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
#[inline]
unsafe fn row<const P: usize>(
    from: *const f32,
    k: usize,
    alpha: f32,
    r: usize,
    out: *mut Tile,
    next: usize,
) {
    let alpha = _mm512_set1_ps(alpha);
    for depth in 0..k.div_ceil(DEPTH) {
        // SAFETY: by contract; a hint may point anywhere.
        unsafe {
            let at = from.add(depth * DEPTH);
            _mm_prefetch::<_MM_HINT_T0>(at.wrapping_add(next).cast());
            _mm_prefetch::<_MM_HINT_T0>(at.wrapping_add(next + 16).cast());
            let [a, b] = load(at, k - depth * DEPTH);
            put::<P, false>(
                [_mm512_mul_ps(alpha, a), _mm512_mul_ps(alpha, b)],
                r,
                out.add(depth * P),
            );
        }
    }
}

/// B's rows `ks`, at most [`INNER`] of them, of columns `ns` as tiles, runs of [`Factor::inner`] rows behind one another, in each
/// of them `[depth][P]` tiles of 16 columns at a time. What lies beyond is 0.
///
/// # Safety
/// The ranges lie within B, and are whole blocks of a weight; `out` has room.
#[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
pub(super) unsafe fn factor<const P: usize>(
    b: Factor<'_>,
    ns: Range<usize>,
    ks: Range<usize>,
    out: &mut [Tile],
) {
    let sides = ns.len().next_multiple_of(2 * ROWS) / ROWS;
    let layout = Layout { k: ks.len(), inner: b.inner(), sides };
    assert!(ks.len() <= INNER && out.len() >= sides * ks.len().div_ceil(DEPTH) * P);
    // SAFETY: by contract.
    unsafe {
        match b {
            Factor::Memory(b) if b.row != 1 => {
                let row = |k: usize, of: Range<usize>, _: &mut [f32]| {
                    b.data.add(k * b.row + ns.start + of.start)
                };
                pairs::<P>(ks, ns.len(), row, layout, out)
            }
            Factor::Memory(b) => {
                let column =
                    |n: usize, _: &mut [f32]| b.data.add((ns.start + n) * b.column + ks.start);
                columns::<P>(ns.len(), column, layout, out);
            }
            Factor::Columns(weight, first) => {
                weight.count(ns.len() * ks.len());
                let column = |n: usize, numbers: &mut [f32]| {
                    weight.read(first + ns.start + n, ks.clone(), numbers);
                    numbers.as_ptr()
                };
                columns::<P>(ns.len(), column, layout, out);
            }
            Factor::Rows(weight, first) => {
                weight.count(ns.len() * ks.len());
                let row = |k: usize, of: Range<usize>, numbers: &mut [f32]| {
                    let from = first + ns.start;
                    weight.read(k, from + of.start..from + of.end, numbers);
                    numbers.as_ptr()
                };
                pairs::<P>(ks, ns.len(), row, layout, out)
            }
        }
    }
}

/// `n` columns.
#[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
#[inline]
unsafe fn columns<const P: usize>(
    n: usize,
    mut column: impl FnMut(usize, &mut [f32]) -> *const f32,
    layout: Layout,
    out: &mut [Tile],
) {
    let k = layout.k;
    let mut numbers = [[0f32; INNER]; ROWS];
    let nothing = [0f32; INNER];
    for side in 0..layout.sides {
        let mut of_tile = [nothing.as_ptr(); ROWS];
        for (r, numbers) in numbers.iter_mut().enumerate() {
            if side * ROWS + r < n {
                of_tile[r] = column(side * ROWS + r, &mut numbers[..k]);
            }
        }
        for depth in 0..k.div_ceil(DEPTH) {
            let parts = &mut out[layout.at::<P>(side, depth)..][..P];
            // SAFETY: sixteen times k numbers, by the caller.
            unsafe { turned::<P>(&of_tile, depth * DEPTH, k, parts.as_mut_ptr()) };
        }
    }
}

/// 32 numbers of each of sixteen columns, from one on, of `k`.
#[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
#[inline]
unsafe fn turned<const P: usize>(
    columns: &[*const f32; ROWS],
    from: usize,
    k: usize,
    parts: *mut Tile,
) {
    for half in [0, 16] {
        let left = first(k.saturating_sub(from + half));
        let mut numbers = [_mm512_setzero_ps(); ROWS];
        for r in 0..ROWS {
            // SAFETY: so many are left of the column; masked lanes are not read.
            numbers[r] =
                unsafe { _mm512_maskz_loadu_ps(left, columns[r].wrapping_add(from + half)) };
        }
        let numbers = turn(numbers);
        for pair in 0..ROWS / 2 {
            let numbers = [numbers[2 * pair], numbers[2 * pair + 1]];
            // SAFETY: P tiles, by the caller.
            unsafe { put::<P, true>(numbers, half / 2 + pair, parts) };
        }
    }
}

/// Rows `ks` of `n` numbers each, two and two.
#[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
#[inline]
unsafe fn pairs<const P: usize>(
    ks: Range<usize>,
    n: usize,
    mut row: impl FnMut(usize, Range<usize>, &mut [f32]) -> *const f32,
    layout: Layout,
    out: &mut [Tile],
) {
    // Rows lie apart, so that their like do not fall on the same lines of a cache.
    let mut numbers = [[0f32; WIDE + ROWS]; DEPTH];
    let nothing = [0f32; WIDE];
    for (depth, ks) in steps(ks, DEPTH).enumerate() {
        for part in steps(0..n.next_multiple_of(2 * ROWS), WIDE) {
            let there = part.start..part.end.min(n);
            let mut of_tile = [nothing.as_ptr(); DEPTH];
            for ((k, numbers), of_tile) in ks.clone().zip(&mut numbers).zip(&mut of_tile) {
                *of_tile = row(k, there.clone(), &mut numbers[..there.len()]);
            }
            for side in steps(part, ROWS) {
                let mask = first(n.saturating_sub(side.start));
                let at = side.start - there.start;
                let parts = &mut out[layout.at::<P>(side.start / ROWS, depth)..][..P];
                for pair in 0..ROWS {
                    // SAFETY: rows of n numbers; masked lanes are not read; P tiles.
                    unsafe {
                        let [a, b] = [2 * pair, 2 * pair + 1].map(|k| of_tile[k].wrapping_add(at));
                        let numbers =
                            [_mm512_maskz_loadu_ps(mask, a), _mm512_maskz_loadu_ps(mask, b)];
                        put::<P, true>(numbers, pair, parts.as_mut_ptr());
                    }
                }
            }
        }
    }
}

/// Rows become columns.
#[target_feature(enable = "avx512f")]
#[inline]
fn turn(v: [__m512; ROWS]) -> [__m512; ROWS] {
    // Pairs of 32 bits, of 64, then of 128 change places. No closures: they are compiled without the instructions, and called.
    let mut by32 = v;
    for i in (0..16).step_by(2) {
        by32[i] = _mm512_unpacklo_ps(v[i], v[i + 1]);
        by32[i + 1] = _mm512_unpackhi_ps(v[i], v[i + 1]);
    }
    let mut by64 = [_mm512_setzero_pd(); ROWS];
    for i in (0..16).step_by(4) {
        let (a, b) = (_mm512_castps_pd(by32[i]), _mm512_castps_pd(by32[i + 1]));
        let (c, d) = (_mm512_castps_pd(by32[i + 2]), _mm512_castps_pd(by32[i + 3]));
        by64[i] = _mm512_unpacklo_pd(a, c);
        by64[i + 1] = _mm512_unpackhi_pd(a, c);
        by64[i + 2] = _mm512_unpacklo_pd(b, d);
        by64[i + 3] = _mm512_unpackhi_pd(b, d);
    }
    // Lane l of by64[4 g + c] holds column 4 l + c of rows 4 g to 4 g + 3.
    let mut columns = v;
    for c in 0..4 {
        let (a, b) = (_mm512_castpd_ps(by64[c]), _mm512_castpd_ps(by64[4 + c]));
        let (d, e) = (_mm512_castpd_ps(by64[8 + c]), _mm512_castpd_ps(by64[12 + c]));
        let (ab_even, ab_odd) =
            (_mm512_shuffle_f32x4::<0x88>(a, b), _mm512_shuffle_f32x4::<0xdd>(a, b));
        let (de_even, de_odd) =
            (_mm512_shuffle_f32x4::<0x88>(d, e), _mm512_shuffle_f32x4::<0xdd>(d, e));
        columns[c] = _mm512_shuffle_f32x4::<0x88>(ab_even, de_even);
        columns[4 + c] = _mm512_shuffle_f32x4::<0x88>(ab_odd, de_odd);
        columns[8 + c] = _mm512_shuffle_f32x4::<0xdd>(ab_even, de_even);
        columns[12 + c] = _mm512_shuffle_f32x4::<0xdd>(ab_odd, de_odd);
    }
    columns
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_become_columns() {
        if !is_x86_feature_detected!("avx512f") {
            return eprintln!("skipped: no vectors of 512 bits");
        }
        let mut numbers = [[0f32; ROWS]; ROWS];
        for (row, numbers) in numbers.iter_mut().enumerate() {
            *numbers = std::array::from_fn(|column| (100 * row + column) as f32);
        }
        type Rows = [[f32; ROWS]; ROWS];
        // SAFETY: any bits are numbers, and the processor was asked.
        let turned = unsafe {
            let vectors = std::mem::transmute::<Rows, [__m512; ROWS]>(numbers);
            std::mem::transmute::<[__m512; ROWS], Rows>(turn(vectors))
        };
        for (row, turned) in turned.iter().enumerate() {
            for (column, number) in turned.iter().enumerate() {
                assert_eq!(*number, numbers[column][row], "{row}, {column}");
            }
        }
    }
}
