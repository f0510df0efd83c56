//! Numbers as tiles of bfloat16.

use std::arch::x86_64::*;
use std::ops::Range;

use super::super::gemm::Matrix;
use super::Factor;
use super::kernel::{DEPTH, ROWS, Tile};

/// Columns of B that are packed at a time, at most.
pub(super) const MOST: usize = 512;
/// Rows of B, or A's columns, of which this is asked at a time, at most.
pub(super) const INNER: usize = 256;

/// The first `n` of 16 lanes.
fn first(n: usize) -> __mmask16 {
    ((1u32 << n.min(16)) - 1) as __mmask16
}

/// 32 numbers as bfloat16, the nearest ones.
#[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
#[inline]
fn nearest([a, b]: [__m512; 2]) -> __m512i {
    // SAFETY: vectors of the same 512 bits.
    unsafe { std::mem::transmute::<__m512bh, __m512i>(_mm512_cvtne2ps_pbh(b, a)) }
}

/// What these leave of the numbers.
#[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
#[inline]
fn rest([a, b]: [__m512; 2], near: __m512i) -> [__m512; 2] {
    let low = _mm512_cvtepu16_epi32(_mm512_castsi512_si256(near));
    let high = _mm512_cvtepu16_epi32(_mm512_extracti64x4_epi64::<1>(near));
    let low = _mm512_castsi512_ps(_mm512_slli_epi32::<16>(low));
    let high = _mm512_castsi512_ps(_mm512_slli_epi32::<16>(high));
    [_mm512_sub_ps(a, low), _mm512_sub_ps(b, high)]
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
            let mut numbers = [_mm512_mul_ps(alpha, a), _mm512_mul_ps(alpha, b)];
            for part in 0..P {
                let near = nearest(numbers);
                let to = &mut (*out.add(depth * P + part)).0[r];
                _mm512_store_si512(to.as_mut_ptr().cast(), near);
                if part + 1 < P {
                    numbers = rest(numbers, near);
                }
            }
        }
    }
}

/// B's rows `ks` of columns `ns`: of 16 columns at a time `[depth][P]` tiles, then of the next. What lies beyond is 0.
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
    let each = ks.len().div_ceil(DEPTH) * P;
    // SAFETY: by contract.
    unsafe {
        match b {
            Factor::Memory(b) if b.row != 1 => {
                let row = |k: usize| b.data.add(k * b.row + ns.start);
                pairs::<P>(ks, ns.len(), row, out)
            }
            Factor::Memory(b) => {
                let column =
                    |n: usize, _: &mut [f32]| b.data.add((ns.start + n) * b.column + ks.start);
                columns::<P>(ns.len(), ks.len(), column, out);
            }
            Factor::Columns(weight, first) => {
                weight.count(ns.len() * ks.len());
                let column = |n: usize, numbers: &mut [f32]| {
                    weight.read(first + ns.start + n, ks.clone(), numbers);
                    numbers.as_ptr()
                };
                columns::<P>(ns.len(), ks.len(), column, out);
            }
            Factor::Rows(weight, first) => {
                weight.count(ns.len() * ks.len());
                let mut rows = [[0f32; MOST]; 2];
                let of_weight = first + ns.start..first + ns.end;
                let row = |k: usize| {
                    let row = &mut rows[k % 2];
                    weight.read(k, of_weight.clone(), &mut row[..ns.len()]);
                    row.as_ptr()
                };
                pairs::<P>(ks, ns.len(), row, out)
            }
        }
        debug_assert!(out.len() >= ns.len().div_ceil(ROWS) * each);
    }
}

/// `n` columns of `k` numbers each, at most [`INNER`].
#[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
#[inline]
unsafe fn columns<const P: usize>(
    n: usize,
    k: usize,
    mut column: impl FnMut(usize, &mut [f32]) -> *const f32,
    out: &mut [Tile],
) {
    let each = k.div_ceil(DEPTH) * P;
    let mut numbers = [[0f32; INNER]; ROWS];
    let nothing = [0f32; INNER];
    for (i, tiles) in out.chunks_exact_mut(each).enumerate().take(n.div_ceil(2 * ROWS) * 2) {
        let mut of_tile = [nothing.as_ptr(); ROWS];
        for (r, numbers) in numbers.iter_mut().enumerate() {
            if i * ROWS + r < n {
                of_tile[r] = column(i * ROWS + r, &mut numbers[..k]);
            }
        }
        for (depth, parts) in tiles.chunks_exact_mut(P).enumerate() {
            // SAFETY: sixteen times k numbers, by the caller.
            unsafe { turned(&of_tile, depth * DEPTH, k, parts) };
        }
    }
}

/// 32 numbers of each of sixteen columns, from one on, of `k`.
#[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
#[inline]
unsafe fn turned(columns: &[*const f32; ROWS], from: usize, k: usize, parts: &mut [Tile]) {
    let mut numbers = [[_mm512_setzero_ps(); 2]; ROWS];
    for r in 0..ROWS {
        // SAFETY: so many are left of the column.
        numbers[r] = unsafe { load(columns[r].add(from), k - from) };
    }
    let last = parts.len() - 1;
    for (part, tile) in parts.iter_mut().enumerate() {
        let mut near = [_mm512_setzero_si512(); ROWS];
        for r in 0..ROWS {
            near[r] = nearest(numbers[r]);
            if part < last {
                numbers[r] = rest(numbers[r], near[r]);
            }
        }
        turn(near, tile);
    }
}

/// Rows `ks` of `n` numbers each, two and two.
#[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
unsafe fn pairs<const P: usize>(
    ks: Range<usize>,
    n: usize,
    mut row: impl FnMut(usize) -> *const f32,
    out: &mut [Tile],
) {
    const TURNS: [u16; 32] = {
        let mut at = [0; 32];
        let mut i = 0;
        while i < 16 {
            (at[2 * i], at[2 * i + 1]) = (i as u16, 16 + i as u16);
            i += 1;
        }
        at
    };
    // SAFETY: 32 numbers.
    let turns = unsafe { _mm512_loadu_si512(TURNS.as_ptr().cast()) };
    let each = ks.len().div_ceil(DEPTH) * P;
    for pair in 0..ks.len().div_ceil(DEPTH) * ROWS {
        let mut of_pair = [None; 2];
        for (k, of_pair) in (ks.start + 2 * pair..ks.end).zip(&mut of_pair) {
            *of_pair = Some(row(k));
        }
        for i in 0..n.div_ceil(2 * ROWS) * 2 {
            let mask = first(n.saturating_sub(i * ROWS));
            // SAFETY: rows of n numbers; masked lanes are not read; the tiles have room.
            unsafe {
                let to = out.as_mut_ptr().add(i * each + pair / ROWS * P);
                let mut numbers = [_mm512_setzero_ps(); 2];
                for (row, numbers) in of_pair.iter().zip(&mut numbers) {
                    if let Some(row) = row {
                        *numbers = _mm512_maskz_loadu_ps(mask, row.wrapping_add(i * ROWS));
                    }
                }
                for part in 0..P {
                    let near = nearest(numbers);
                    let turned = _mm512_permutexvar_epi16(turns, near);
                    let to = &mut (*to.add(part)).0[pair % ROWS];
                    _mm512_store_si512(to.as_mut_ptr().cast(), turned);
                    if part + 1 < P {
                        numbers = rest(numbers, near);
                    }
                }
            }
        }
    }
}

/// Rows of pairs become columns of pairs.
#[target_feature(enable = "avx512f")]
#[inline]
fn turn(v: [__m512i; ROWS], tile: &mut Tile) {
    // Pairs of 32 bits, of 64, then of 128 change places.
    let mut by32 = v;
    for i in (0..16).step_by(2) {
        by32[i] = _mm512_unpacklo_epi32(v[i], v[i + 1]);
        by32[i + 1] = _mm512_unpackhi_epi32(v[i], v[i + 1]);
    }
    let mut by64 = by32;
    for i in (0..16).step_by(4) {
        by64[i] = _mm512_unpacklo_epi64(by32[i], by32[i + 2]);
        by64[i + 1] = _mm512_unpackhi_epi64(by32[i], by32[i + 2]);
        by64[i + 2] = _mm512_unpacklo_epi64(by32[i + 1], by32[i + 3]);
        by64[i + 3] = _mm512_unpackhi_epi64(by32[i + 1], by32[i + 3]);
    }
    // Lane l of by64[4 g + c] holds column 4 l + c of rows 4 g to 4 g + 3.
    for c in 0..4 {
        let [a, b, d, e] = [0, 1, 2, 3].map(|g| by64[4 * g + c]);
        let (ab_even, ab_odd) =
            (_mm512_shuffle_i32x4::<0x88>(a, b), _mm512_shuffle_i32x4::<0xdd>(a, b));
        let (de_even, de_odd) =
            (_mm512_shuffle_i32x4::<0x88>(d, e), _mm512_shuffle_i32x4::<0xdd>(d, e));
        let columns = [
            _mm512_shuffle_i32x4::<0x88>(ab_even, de_even),
            _mm512_shuffle_i32x4::<0x88>(ab_odd, de_odd),
            _mm512_shuffle_i32x4::<0xdd>(ab_even, de_even),
            _mm512_shuffle_i32x4::<0xdd>(ab_odd, de_odd),
        ];
        for (l, column) in columns.into_iter().enumerate() {
            // SAFETY: a row of 512 bits.
            unsafe { _mm512_storeu_si512(tile.0[4 * l + c].as_mut_ptr().cast(), column) };
        }
    }
}
