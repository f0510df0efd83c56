//! Row-wise kernels' common ground, and the smallest of them.

use std::ffi::{c_int, c_void};
use std::ops::Range;

use ggml_sys as sys;

use crate::ggml::{Arena, Tensor, Type};
pub(super) use crate::ggml::{parts, rounded};

/// Rows `i` with `part(i)` of `n` for thread `ith` of `nth`: contiguous runs of nearly equal length.
pub(super) fn partition(n: usize, ith: c_int, nth: c_int) -> Range<usize> {
    part_of(n, ith as usize, nth as usize)
}

/// Part `i` of `parts` of `n`: contiguous runs of nearly equal length.
pub(super) fn part_of(n: usize, i: usize, parts: usize) -> Range<usize> {
    n * i / parts..n * (i + 1) / parts
}

/// Calls `work` with the [`parts`] that are thread `ith`'s of `nth`.
pub(super) fn each_part(parts: usize, ith: c_int, nth: c_int, work: impl FnMut(usize)) {
    (ith as usize..parts).step_by(nth as usize).for_each(work);
}

/// Has the cache line of an address brought closer, wherever it points to.
#[inline(always)]
pub(super) fn prefetch(at: *const u8) {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: a prefetch never faults.
    unsafe {
        std::arch::x86_64::_mm_prefetch::<{ std::arch::x86_64::_MM_HINT_T1 }>(at.cast())
    };
    #[cfg(not(target_arch = "x86_64"))]
    let _ = at;
}

/// Sum of products in 16 lanes, so that it vectorises and rounds less than one running sum.
pub(super) fn dot(a: &[f32], b: &[f32]) -> f32 {
    let mut lanes = [0f32; 16];
    let (a16, a_rest) = a.as_chunks::<16>();
    let (b16, b_rest) = b.as_chunks::<16>();
    for (a, b) in a16.iter().zip(b16) {
        for i in 0..16 {
            lanes[i] += a[i] * b[i];
        }
    }
    let rest: f32 = a_rest.iter().zip(b_rest).map(|(a, b)| a * b).sum();
    lanes.iter().sum::<f32>() + rest
}

/// The largest value, NaNs apart, in 16 lanes.
pub(super) fn maximum(x: &[f32]) -> f32 {
    let mut lanes = [f32::NEG_INFINITY; 16];
    let (chunks, rest) = x.as_chunks::<16>();
    for chunk in chunks {
        for i in 0..16 {
            lanes[i] = lanes[i].max(chunk[i]);
        }
    }
    lanes.into_iter().chain(rest.iter().copied()).fold(f32::NEG_INFINITY, f32::max)
}

/// Rows `[ne0]` of a contiguous F32 tensor.
#[derive(Clone, Copy)]
pub(super) struct Rows<'k> {
    data: *const f32,
    width: usize,
    n: usize,
    _owner: std::marker::PhantomData<&'k f32>,
}

impl<'k> Rows<'k> {
    /// Row `i`.
    ///
    /// # Safety
    /// `i` is below the number of rows.
    pub(super) unsafe fn row(&self, i: usize) -> &'k [f32] {
        debug_assert!(i < self.n);
        // SAFETY: within the tensor's data by the contract here and of `source_rows`.
        unsafe { std::slice::from_raw_parts(self.data.add(i * self.width), self.width) }
    }

    /// The row numbers of a thread.
    pub(super) fn range(&self, ith: c_int, nth: c_int) -> Range<usize> {
        partition(self.n, ith, nth)
    }

    /// The rows of a thread.
    pub(super) fn part(self, ith: c_int, nth: c_int) -> impl Iterator<Item = &'k [f32]> {
        // SAFETY: the range lies within the rows.
        self.range(ith, nth).map(move |i| unsafe { self.row(i) })
    }
}

/// Rows of source `index`.
///
/// # Safety
/// That source is a live, contiguous F32 tensor in host memory for all of `'k`.
pub(super) unsafe fn source_rows<'k>(dst: *mut sys::ggml_tensor, index: usize) -> Rows<'k> {
    // SAFETY: by contract.
    unsafe {
        let source = &*(*dst).src[index];
        let width = source.ne[0] as usize;
        let n = sys::ggml_nrows(source) as usize;
        Rows { data: source.data.cast(), width, n, _owner: std::marker::PhantomData }
    }
}

/// This thread's rows of the result.
///
/// # Safety
/// `dst` is a live, contiguous F32 tensor in host memory; each thread calls this once with its own
/// `ith`, so that no two get the same row.
pub(super) unsafe fn rows_of<'k>(
    dst: *mut sys::ggml_tensor,
    ith: c_int,
    nth: c_int,
) -> impl Iterator<Item = &'k mut [f32]> {
    // SAFETY: by contract.
    let (data, width, n) = unsafe {
        ((*dst).data.cast::<f32>(), (*dst).ne[0] as usize, sys::ggml_nrows(dst) as usize)
    };
    // SAFETY: rows of different numbers do not overlap.
    partition(n, ith, nth)
        .map(move |i| unsafe { std::slice::from_raw_parts_mut(data.add(i * width), width) })
}

/// Row `t` of `x: [n, T]` times `factors[t]`: the cotangent of a hidden state from that of its log-prob.
pub fn scale_rows<'a>(arena: &'a Arena, x: Tensor<'a>, factors: Tensor<'a>) -> Tensor<'a> {
    assert!(x.ty() == Type::F32 && x.is_contiguous(), "scale_rows of {x:?}");
    assert!(factors.ty() == Type::F32 && factors.is_contiguous(), "scale_rows by {factors:?}");
    assert_eq!(x.len(), x.shape()[0] * factors.len(), "scale_rows of {x:?} by {factors:?}");
    arena.custom(x.shape(), &[x, factors], scale_kernel, sys::BUPO_OP_SCALE_ROWS)
}

unsafe extern "C" fn scale_kernel(
    dst: *mut sys::ggml_tensor,
    ith: c_int,
    nth: c_int,
    _userdata: *mut c_void,
) {
    // SAFETY: `scale_rows` made this node: F32 contiguous, one factor per row.
    unsafe {
        let x = source_rows(dst, 0);
        let factors: *const f32 = (*(*dst).src[1]).data.cast();
        for (y, i) in rows_of(dst, ith, nth).zip(x.range(ith, nth)) {
            let factor = *factors.add(i);
            for (y, x) in y.iter_mut().zip(x.row(i)) {
                *y = factor * x;
            }
        }
    }
}
