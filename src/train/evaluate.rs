//! Held-out problems, at the run's own sampling settings: what `bupo-gguf eval` does, within a run. Held-out rows: the
//! objective's own loss.

use serde::Serialize;

use super::collect::By;
use super::dialogues::Dialogues;
use super::response::ResponseGroup;
use super::source::Source;
use super::tally::Tally;
use super::{Observer, Phase, TrainConfig, Trainer};
use crate::Result;
use crate::data::{Problem, ProblemSource, SourceOptions};
use crate::eval::{DialogueEvaluator, EvalOptions, Evaluator, Report};
use crate::model::Policy;

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

/// What the objective says of held-out rows, under the final policy.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct HeldOut {
    /// The objective's loss.
    pub eval_loss: f64,
    /// exp of the mean cross-entropy, of sft.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub eval_perplexity: Option<f64>,
    /// Rewards and their like, by the field's names with `eval_` before them.
    #[serde(flatten)]
    pub more: serde_json::Map<String, serde_json::Value>,
}

impl Trainer<'_> {
    /// The objective on the held-out rows (`--eval-data`), with the adapter as it is; none without rows.
    ///
    /// # Errors
    /// Those of the engine.
    pub fn held_out_rows(&mut self) -> Result<Option<HeldOut>> {
        if self.held_out.is_empty() {
            return Ok(None);
        }
        let config = self.update_config(Phase::Final, Policy::full(self.model.config().n_layer));
        let mut tally = Tally::default();
        let mut groups: Vec<ResponseGroup> = self.held_out.clone();
        let eval_loss = self.learner.score(&mut groups, &config, &mut tally)?;
        self.end_updates()?;
        let is_entropy = self.settings.algo == super::Algorithm::Sft;
        let more = tally.means().map(|(name, mean)| (format!("eval_{name}"), mean.into()));
        Ok(Some(HeldOut {
            eval_loss,
            eval_perplexity: is_entropy.then(|| eval_loss.exp()),
            more: more.collect(),
        }))
    }

    /// Figures of the current adapter on the held-out problems; none without problems.
    ///
    /// The same seed is used every time, so that before and after differ by the adapter alone.
    pub fn evaluate(&mut self, what: &str, observer: &mut dyn Observer) -> Result<Option<Report>> {
        let Source::Judged(judged) = &mut self.source else { return Ok(None) };
        if judged.held_out.is_empty() {
            return Ok(None);
        }
        let c = &self.settings;
        let options = EvalOptions {
            samples: c.eval_samples,
            max_prompt: c.max_prompt,
            max_response: c.max_response,
            sampling: c.sampling,
            seed: c.seed,
        };
        let (rollouts, encoder, stop) = (&mut judged.rollouts, &self.encoder, &*self.stop);
        let mut progress = |progress| observer.rollout(what, progress);
        let outcomes = match &mut judged.by {
            By::Judges(pool) => Evaluator { rollouts, encoder, pool, stop }.run(
                &judged.held_out,
                &options,
                None,
                &mut progress,
            )?,
            By::Environment(dialogues) => {
                let Dialogues { pool, judges, .. } = &mut **dialogues;
                let judges = judges.as_mut();
                DialogueEvaluator { rollouts, encoder, pool, judges, stop }.run(
                    &judged.held_out,
                    &options,
                    None,
                    &mut progress,
                )?
            }
        };
        Ok(Some(Report::new(&outcomes, c.seed)))
    }

    /// How good the run is on what is held out: mean share of right completions, or the loss on rows.
    pub(super) fn held_out_score(
        &mut self,
        what: &str,
        observer: &mut dyn Observer,
    ) -> Result<Option<f64>> {
        if self.settings.algo.is_rewarded() {
            // As an f32, which checkpoints of older versions hold.
            Ok(self.evaluate(what, observer)?.map(|report| report.avg_at_k as f32 as f64))
        } else {
            Ok(self.held_out_rows()?.map(|rows| rows.eval_loss))
        }
    }
}
