//! Accuracy on held-out problems: one sampled completion each, at the run's own sampling settings.

use super::{Observer, TrainConfig, Trainer};
use crate::Result;
use crate::data::{Columns, Problem, ProblemSource, read_problems};
use crate::rollout::Request;

/// Keeps the random numbers of evaluations apart from those of training.
const EVAL_STREAM: u64 = 1 << 48;

/// The held-out problems of a run: `--eval-data`, or a task's own split. A data file alone has none.
pub(super) fn held_out(config: &TrainConfig, problems: &ProblemSource) -> Result<Vec<Problem>> {
    let mut held_out = match &config.eval_data {
        Some(path) => read_problems(path, &Columns::default())?,
        None if problems.task().is_some() => problems.eval_problems(config.eval_problems),
        None => Vec::new(),
    };
    held_out.truncate(config.eval_problems);
    Ok(held_out)
}

impl Trainer<'_> {
    /// Share of held-out problems whose sampled completion earns the full reward; none without problems.
    ///
    /// The same seed is used every time, so that before and after differ by the adapter alone.
    pub fn evaluate(&mut self, what: &str, observer: &mut dyn Observer) -> Result<Option<f32>> {
        if self.held_out.is_empty() {
            return Ok(None);
        }
        let c = &self.config;
        let mut requests = Vec::with_capacity(self.held_out.len());
        for (i, problem) in self.held_out.iter().enumerate() {
            requests.push(Request {
                prompt_tokens: self.encoder.prompt(&problem.prompt, c.max_prompt)?,
                n: 1,
                seed_stream: EVAL_STREAM + i as u64,
                max_tokens: c.max_response,
            });
        }
        let completions = self.rollouts.generate(
            &requests,
            &c.sampling(),
            c.seed,
            &mut |progress| observer.rollout(what, progress),
            &self.stop,
        )?;
        let mut right = 0;
        for (problem, completion) in self.held_out.iter().zip(completions.iter().flatten()) {
            let text = self.encoder.text(&completion.tokens);
            right += (self.reward.score(problem, &text)?.reward >= 1.0) as usize;
        }
        Ok(Some(right as f32 / self.held_out.len() as f32))
    }
}
