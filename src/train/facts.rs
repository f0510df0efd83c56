//! What of the data decides about settings: how long prompts and solutions are.

use super::{Algorithm, TrainConfig};
use crate::Result;
use crate::data::ProblemSource;
use crate::env::{EnvPool, Task, task_seed};
use crate::rollout::Encoder;

/// Prompts that are looked at, of a file.
const LOOKED_AT: usize = 4096;
/// Prompts that are looked at, of a task.
const OF_TASK: usize = 256;
/// Dialogues that are opened to see how long openings are.
const OPENED: usize = 32;

/// What is known of the data before settings are resolved.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Facts {
    /// Whether completions are sampled.
    pub samples: bool,
    /// Whether a task generates the problems.
    pub is_task: bool,
    /// Lengths of prompts; empty where none were looked at.
    pub prompts: Lengths,
    /// Problems there are in all.
    pub problems: Option<usize>,
    /// Bytes of the worked solutions beside the answers.
    pub solutions: Lengths,
    /// Tokens of the longest given row, held-out ones too; none where completions are sampled.
    pub longest_row: Option<usize>,
    /// Ranks that share the work; 0 where nobody said.
    pub ranks: usize,
    /// The longest completion that memory has room for, where that was found to be less than what is wished for.
    pub room: Option<usize>,
}

/// Lengths, in order.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Lengths(Vec<usize>);

impl FromIterator<usize> for Lengths {
    fn from_iter<I: IntoIterator<Item = usize>>(lengths: I) -> Lengths {
        let mut lengths: Vec<usize> = lengths.into_iter().collect();
        lengths.sort_unstable();
        Lengths(lengths)
    }
}

impl Lengths {
    /// How many there are.
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// The longest.
    pub fn most(&self) -> Option<usize> {
        self.0.last().copied()
    }

    /// The length that this share of them, 0 to 1, does not exceed.
    pub fn quantile(&self, share: f64) -> Option<usize> {
        let place = (share * self.0.len() as f64).ceil() as usize;
        self.0.get(place.saturating_sub(1)).copied()
    }

    /// How many are longer than that.
    pub fn above(&self, limit: usize) -> usize {
        self.0.len() - self.0.partition_point(|&length| length <= limit)
    }
}

impl Facts {
    /// Of settings whose data nobody has read.
    pub fn unread(config: &TrainConfig) -> Facts {
        let samples = config.algo.is_rewarded() || config.algo == Algorithm::Distill;
        let is_task = crate::data::source::files(&config.data).is_ok_and(|files| files.is_empty());
        let rows = config.rows.max_length.or(config.micro_batch_tokens).unwrap_or(4096);
        Facts { samples, is_task, longest_row: (!samples).then_some(rows), ..Facts::default() }
    }

    /// Of problems: their first ones, of a file at most 4096.
    ///
    /// # Errors
    /// A prompt that cannot be encoded.
    pub fn of_problems(source: &ProblemSource, encoder: &Encoder<'_>) -> Result<Facts> {
        let problems = source.epoch_len();
        let (mut prompts, mut solutions) = (Vec::new(), Vec::new());
        for i in 0..problems.map_or(OF_TASK, |n| n.min(LOOKED_AT)) as u64 {
            let problem = source.problem(i);
            prompts.push(encoder.prompt(&problem.prompt, usize::MAX)?.len());
            solutions.extend(Some(problem.solution_bytes).filter(|&bytes| bytes > 0));
        }
        Ok(Facts {
            samples: true,
            is_task: source.task().is_some(),
            prompts: prompts.into_iter().collect(),
            problems,
            solutions: solutions.into_iter().collect(),
            ..Facts::default()
        })
    }

    /// Of dialogues about problems: the openings of the first ones.
    ///
    /// # Errors
    /// An environment that cannot open a dialogue, or messages that the chat template refuses.
    pub fn of_openings(
        source: &ProblemSource,
        encoder: &Encoder<'_>,
        pool: &mut EnvPool,
        seed: u64,
    ) -> Result<Facts> {
        let problems = source.epoch_len();
        let n = problems.map_or(OPENED, |n| n.min(OPENED)) as u64;
        let task =
            |i| Task { problem: source.problem(i), seed: task_seed(seed, i), held_out: false };
        let session = pool.session(encoder, (0..n).map(task).collect(), 1, "look")?;
        Ok(Facts {
            samples: true,
            is_task: source.task().is_some(),
            prompts: session.lengths().collect(),
            problems,
            ..Facts::default()
        })
    }

    /// What is to be said of prompts that lose their beginning, or are left out.
    pub fn cut(&self, max_prompt: usize, drops: bool) -> Option<String> {
        let cut = self.prompts.above(max_prompt);
        let longest = self.prompts.most().filter(|_| cut > 0)?;
        let of = match self.problems {
            Some(all) if all > self.prompts.len() => {
                format!("the first {} (of {all})", self.prompts.len())
            }
            _ => self.prompts.len().to_string(),
        };
        let fate = match drops {
            true => "are left out",
            false => "lose their beginning; --drop-long-prompts leaves them out",
        };
        Some(format!(
            "warning: {cut} of {of} prompts are longer than --max-prompt {max_prompt} (the longest has {longest} tokens) \
             and {fate}"
        ))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantiles_and_what_is_above() {
        let lengths: Lengths = (1..=200).rev().collect();
        assert_eq!((lengths.most(), lengths.quantile(0.99)), (Some(200), Some(198)));
        assert_eq!((lengths.above(198), lengths.above(200), lengths.above(0)), (2, 0, 200));
        assert_eq!(Lengths::default().quantile(0.5), None);
        let facts = Facts { prompts: lengths, problems: Some(900), ..Facts::default() };
        assert_eq!(facts.cut(200, false), None);
        let word = facts.cut(190, false).unwrap();
        assert!(word.contains("10 of the first 200 (of 900) prompts"), "{word}");
    }
}
