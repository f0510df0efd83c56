//! Following rollouts while they are sampled.

use super::request::Completion;
use crate::Result;

/// How far a call of [`super::Rollouts::generate`] is, after each round of tokens.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Progress {
    /// Completions that have ended.
    pub done: usize,
    /// Completions wanted.
    pub total: usize,
    /// Tokens sampled.
    pub tokens: usize,
    /// The last one of them.
    pub newest: Option<i32>,
}

/// Follows a call of [`super::Rollouts::generate_watched`]; an error ends it.
pub trait Watcher {
    /// After each round of tokens.
    fn progress(&mut self, _progress: Progress) -> Result<()> {
        Ok(())
    }

    /// Completion `index` of request `request` has ended; the others go on.
    fn finished(&mut self, _request: usize, _index: usize, _completion: &Completion) -> Result<()> {
        Ok(())
    }
}

/// A closure that looks at the progress alone.
pub(super) struct ProgressOnly<'w>(pub(super) &'w mut dyn FnMut(Progress) -> Result<()>);

impl Watcher for ProgressOnly<'_> {
    fn progress(&mut self, progress: Progress) -> Result<()> {
        (self.0)(progress)
    }
}
