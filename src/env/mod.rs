//! Environments: whom a model talks to over several turns, with tools and rewards.
//!
//! An environment opens a dialogue with messages and tools, answers every turn of the model with further messages and a
//! reward, and says when it is over. Those built in are [`builtin`]; any other is a program ([`program`]) that speaks the
//! protocol of `docs/ENVIRONMENTS.md`. Dialogues are sampled together ([`EnvPool`]): while one waits for its environment
//! the others decode.

pub mod builtin;
pub mod calls;
mod options;
mod pool;
mod program;
pub mod protocol;
mod talk;

use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::Result;
use crate::data::Problem;
use crate::reward::JudgePool;

pub use calls::{CallFormat, ToolCall, Turn};
pub use options::EnvOptions;
pub use pool::{Ended, EnvPool, Session};
pub use program::ProgramEnv;
pub use talk::{Counts, Dialogue, Heard, Talk, TurnEnd};

/// What a dialogue is about.
#[derive(Clone, Debug, PartialEq)]
pub struct Task {
    /// The problem.
    pub problem: Problem,
    /// For all chance: the same for every dialogue about this problem at this place of a run.
    pub seed: u64,
    /// Whether it is held out from training.
    pub held_out: bool,
}

/// The seed of a task's chance: the same at the same place of a run, and a number that any program can hold.
pub fn task_seed(seed: u64, stream: u64) -> u64 {
    // Steele and others' SplitMix64.
    let mut x = seed.wrapping_add(stream.wrapping_mul(0x9e37_79b9_7f4a_7c15));
    x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    (x ^ (x >> 31)) >> 33
}

/// Judges the last turn of each dialogue, in groups with the number of their problem; what the judges give is added to its
/// reward, and decides whether it succeeded.
///
/// # Errors
/// A reward that cannot judge.
pub fn judge_ends(
    judges: &mut JudgePool,
    problems: &[Problem],
    groups: &mut [(usize, Vec<Dialogue>)],
) -> Result<()> {
    let ends = groups.iter().flat_map(|(problem, group)| {
        let end =
            |d: &Dialogue| (problems[*problem].clone(), d.last_words(), d.own_tokens(), d.is_cut());
        group.iter().map(end)
    });
    let judged = judges.judge_all(ends.collect())?;
    let dialogues = groups.iter_mut().flat_map(|(_, group)| group);
    for (dialogue, judgement) in dialogues.zip(judged) {
        if let Some(last) = dialogue.turns.last_mut() {
            last.reward += judgement.reward;
        }
        dialogue.success = judgement.right;
        dialogue.reason = judgement.reason;
    }
    Ok(())
}

/// How a dialogue begins.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Opening {
    /// Messages, at least one: objects with `role` and `content`.
    #[serde(with = "talk::as_text")]
    pub messages: Vec<Value>,
    /// Tools: `{"type": "function", "function": {"name": .., "description": .., "parameters": SCHEMA}}`.
    #[serde(with = "talk::as_text")]
    pub tools: Vec<Value>,
}

/// What a turn leads to.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Step {
    /// What the model reads next; not empty unless the dialogue is over.
    pub messages: Vec<Value>,
    /// Reward of the turn, finite.
    pub reward: f32,
    /// Whether the dialogue is over.
    pub done: bool,
    /// Whether it succeeded, for accuracies; none is a sum of rewards of 1 or more.
    pub success: Option<bool>,
    /// Why, in one line.
    pub reason: String,
}

/// An environment, which holds any number of dialogues at a time. It belongs to one thread.
pub trait Environment: Send {
    /// Makes ready, so that the first dialogue need not wait.
    ///
    /// # Errors
    /// It cannot be started.
    fn start(&mut self) -> Result<()> {
        Ok(())
    }

    /// Begins a dialogue of this name.
    ///
    /// # Errors
    /// What ends the run.
    fn reset(&mut self, dialogue: &str, task: &Task) -> Result<Opening>;

    /// The model's turn.
    ///
    /// # Errors
    /// What ends the run.
    fn step(&mut self, dialogue: &str, turn: &Turn) -> Result<Step>;

    /// Nothing more will be said.
    ///
    /// # Errors
    /// What ends the run.
    fn close(&mut self, dialogue: &str) -> Result<()>;
}
