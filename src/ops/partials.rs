//! Partial results that threads bring in any order and the last of them merges in a fixed one.

use std::ffi::c_int;
use std::ops::Range;
use std::sync::Mutex;

use ggml_sys as sys;

use super::rows::{each_part, part_of, parts};

/// A place for each part of a result. Empty again once all have been taken, so that a graph may run twice.
pub(super) struct Partials<P>(Mutex<Vec<Option<P>>>);

impl<P> Default for Partials<P> {
    fn default() -> Partials<P> {
        Partials(Mutex::default())
    }
}

impl<P> Partials<P> {
    /// Brings part `i` of `n`. Whoever brings the last one gets all, in their order.
    pub(super) fn put(&self, i: usize, n: usize, part: P) -> Option<Vec<P>> {
        let mut parts = self.0.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        parts.resize_with(n, || None);
        parts[i] = Some(part);
        parts.iter().all(Option::is_some).then(|| parts.drain(..).flatten().collect())
    }
}

/// Works on tokens `[0, t)` in tiles of `tile`, on each by the [`parts`] of the vocabulary `[0, v)` that are thread `ith`'s of
/// `nth`; whoever brings a tile's last part finishes it. `partials`: of each tile.
///
/// # Safety
/// `node` is a live node of an op of ours that an executor runs.
pub(super) unsafe fn each_tile<P>(
    partials: &[Partials<P>],
    tile: usize,
    [t, v]: [usize; 2],
    (node, ith, nth): (*const sys::ggml_tensor, c_int, c_int),
    partial: impl Fn(Range<usize>, Range<usize>) -> P,
    finish: impl Fn(Range<usize>, Vec<P>),
) {
    // SAFETY: by contract.
    let parts = unsafe { parts(node) };
    for (i, partials) in partials.iter().enumerate() {
        let tokens = i * tile..((i + 1) * tile).min(t);
        each_part(parts, ith, nth, |part| {
            let partial = partial(tokens.clone(), part_of(v, part, parts));
            if let Some(partials) = partials.put(part, parts, partial) {
                finish(tokens.clone(), partials);
            }
        });
    }
}
