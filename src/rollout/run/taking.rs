//! Which request is begun next, and whether this rank begins it.

use super::Run;
use crate::Result;

impl Run<'_, '_> {
    /// Whether anything is to be done.
    pub fn is_open(&self) -> bool {
        self.progress.done < self.wanted() || !self.queue.is_empty()
    }

    /// Completions of the requests that were taken.
    pub(super) fn wanted(&self) -> usize {
        self.taken.iter().map(|&r| self.requests[r].n).sum()
    }

    /// The next request to begin, when `claimed` slots are about to be filled; none where there is none, or where it is
    /// better left to another rank.
    pub(super) fn peek(&mut self, claimed: usize) -> Result<Option<usize>> {
        while self.ahead.is_none() && !self.queue.is_empty() {
            if self.queue.is_shared() {
                let running = claimed + self.slots.iter().flatten().count();
                let open = |r: &&usize| self.done[**r].iter().any(Vec::is_empty);
                let open = self.taken.iter().filter(open).count();
                if running >= self.enough || open >= self.queue.share() {
                    return Ok(None);
                }
            }
            let Some(request) = self.queue.take()? else { break };
            self.taken.push(request);
            if self.queue.is_shared() {
                self.progress.total += self.requests[request].n;
            }
            self.ahead = Some(request).filter(|&r| self.requests[r].n > 0);
        }
        Ok(self.ahead)
    }
}
