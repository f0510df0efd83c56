//! Partial results that threads bring in any order and the last of them merges in a fixed one.

use std::sync::Mutex;

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
