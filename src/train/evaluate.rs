//! Held-out problems, at the run's own sampling settings: what `bupo-gguf eval` does, within a run.

use super::{Observer, TrainConfig, Trainer};
use crate::Result;
use crate::data::{Problem, ProblemSource, SourceOptions};
use crate::eval::{EvalOptions, Evaluator, Report};

/// The held-out problems of a run: `--eval-data`, or a task's own split. A data file alone has none.
pub(super) fn held_out(config: &TrainConfig, problems: &ProblemSource) -> Result<Vec<Problem>> {
    Ok(match &config.eval_data {
        Some(files) => {
            let options = SourceOptions { curriculum: false, ..config.source() };
            ProblemSource::with(files, options)?.eval_problems(config.eval_problems)
        }
        None if problems.task().is_some() => problems.eval_problems(config.eval_problems),
        None => Vec::new(),
    })
}

impl Trainer<'_> {
    /// Figures of the current adapter on the held-out problems; none without problems.
    ///
    /// The same seed is used every time, so that before and after differ by the adapter alone.
    pub fn evaluate(&mut self, what: &str, observer: &mut dyn Observer) -> Result<Option<Report>> {
        if self.held_out.is_empty() {
            return Ok(None);
        }
        let c = &self.config;
        let options = EvalOptions {
            samples: c.eval_samples,
            max_prompt: c.max_prompt,
            max_response: c.max_response,
            sampling: c.sampling,
            seed: c.seed,
        };
        let mut evaluator = Evaluator {
            rollouts: &mut self.rollouts,
            encoder: &self.encoder,
            pool: &mut self.judges,
            stop: &self.stop,
        };
        let mut progress = |progress| observer.rollout(what, progress);
        let outcomes = evaluator.run(&self.held_out, &options, None, &mut progress)?;
        Ok(Some(Report::new(&outcomes, c.seed)))
    }

    /// Mean share of right completions on the held-out problems.
    pub(super) fn accuracy(
        &mut self,
        what: &str,
        observer: &mut dyn Observer,
    ) -> Result<Option<f32>> {
        Ok(self.evaluate(what, observer)?.map(|report| report.avg_at_k as f32))
    }
}
