//! Dialogues: a sequence that goes on after its turn has ended, with what somebody else says.
//!
//! A sequence keeps its cache, so a dialogue costs its new tokens alone. While one waits for its partner the others
//! decode; its answer is taken in a fixed number of rounds later ([`Partner::lag`]) and waited for where it has not come by
//! then. Who is decoded together thus depends on no clock, and the same partner gives the same tokens to the last bit. Where
//! nothing depends on who is decoded together ([`super::Rollouts::make_invariant`]), each answer is read by itself.

use super::request::{Completion, Finish};
use crate::Result;

/// A dialogue: which request, and which of its completions.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Which {
    /// Request.
    pub request: usize,
    /// Completion of it.
    pub index: usize,
}

/// What follows a turn.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Answer {
    /// Nothing: the dialogue is over.
    Over,
    /// These tokens, not empty, after all that was said.
    Append(Vec<i32>),
    /// A new segment with this prompt: what was said stands otherwise there.
    Anew(Vec<i32>),
}

/// Whom the model talks to.
pub trait Partner {
    /// Whole rounds of tokens that others decode before an answer is waited for.
    fn lag(&self) -> u64;

    /// Tokens of the dialogue's turn under way, at most.
    fn max_turn(&self, which: Which) -> usize;

    /// A dialogue begins.
    fn began(&mut self, _which: Which) {}

    /// A turn of these tokens has ended, with why; nothing is waited for.
    ///
    /// # Errors
    /// What ends the run.
    fn said(&mut self, which: Which, tokens: &[i32], finish: Finish) -> Result<()>;

    /// What follows it; this waits. After [`Finish::Length`] nothing can.
    ///
    /// # Errors
    /// What ends the run.
    fn answer(&mut self, which: Which) -> Result<Answer>;

    /// There was no room for the answer: the dialogue is over.
    fn cut(&mut self, which: Which);

    /// A dialogue is over, with these segments; the others go on.
    ///
    /// # Errors
    /// What ends the run.
    fn finished(&mut self, _which: Which, _segments: &[Segment]) -> Result<()> {
        Ok(())
    }
}

/// A run of tokens after a prompt, some of which the model said.
#[derive(Clone, Debug, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct Segment {
    /// What they go on from; of a dialogue's first segment the request's prompt.
    pub prompt: Vec<i32>,
    /// All tokens after it, with the log-probs of those that were sampled, else 0; the last one was.
    pub completion: Completion,
    /// Which tokens were sampled.
    pub own: Vec<bool>,
}
