//! Shares out the parts of one node's work among the threads that run its kernel.

use std::ffi::c_int;
use std::sync::atomic::{AtomicUsize, Ordering};

/// Parts taken in order by whoever is free, so that a thread that the system has put aside holds up
/// nobody. Lives in a node's parameters.
#[derive(Default)]
pub(super) struct Queue {
    next: AtomicUsize,
    finished: AtomicUsize,
}

impl Queue {
    /// Calls `work` with parts of `[0, n)`: over all `nth` threads, each of which calls this once per
    /// run of the node, every part exactly once.
    pub(super) fn each(&self, n: usize, nth: c_int, mut work: impl FnMut(usize)) {
        loop {
            let part = self.next.fetch_add(1, Ordering::Relaxed);
            if part >= n {
                break;
            }
            work(part);
        }
        // The last to finish rewinds, when nobody takes parts any more; ggml's barrier between nodes
        // orders this before the next run.
        if self.finished.fetch_add(1, Ordering::AcqRel) + 1 == nth as usize {
            self.finished.store(0, Ordering::Relaxed);
            self.next.store(0, Ordering::Relaxed);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_part_once_and_again() {
        let queue = Queue::default();
        for _ in 0..100 {
            let taken: [AtomicUsize; 50] = std::array::from_fn(|_| AtomicUsize::new(0));
            std::thread::scope(|scope| {
                for _ in 0..3 {
                    scope.spawn(|| {
                        queue.each(taken.len(), 3, |part| {
                            taken[part].fetch_add(1, Ordering::Relaxed);
                        })
                    });
                }
            });
            assert!(taken.iter().all(|n| n.load(Ordering::Relaxed) == 1));
        }
    }
}
