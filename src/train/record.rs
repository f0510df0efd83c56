//! What a run says of itself: one record a step, and a summary.

use std::path::PathBuf;

use serde::Serialize;

use super::critic::explained_variance;
use super::dialogues::TalkRecord;
use super::evaluate::HeldOut;
use super::response::Response;
use super::source::{Batch, Source};
use super::tally::Tally;
use super::{Sample, Trainer};
use crate::analysis::Probe;
use crate::eval::Report;
use crate::model::Policy;
use crate::rollout::Timing;

/// Which policy a step optimises.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Phase {
    /// The internal policy of a layer.
    Internal,
    /// The final policy.
    Final,
}

/// One line of `metrics.jsonl`.
#[derive(Clone, Debug, Serialize)]
pub struct StepRecord {
    /// From 1.
    pub step: u64,
    /// Phase.
    pub phase: Phase,
    /// Layer whose policy is optimised.
    pub layer: usize,
    /// Of sampled and rewarded completions; none of given rows and teachers.
    #[serde(flatten)]
    pub rollout: Option<RolloutRecord>,
    /// Of sampled completions, whoever looks at them; none of given rows.
    #[serde(flatten)]
    pub sampled: Option<SampledRecord>,
    /// Mean entropy of the optimised policy on the tokens that were trained on, nats.
    pub entropy_nats: Option<f32>,
    /// Mean loss of the mini batches.
    pub loss: Option<f32>,
    /// What the objective says of itself, by the field's names: rewards/chosen, rewards/margins, ..
    #[serde(flatten)]
    pub objective: serde_json::Map<String, serde_json::Value>,
    /// Mean global norm of the gradients before clipping.
    pub gradient_norm: Option<f32>,
    /// Learning rate.
    pub learning_rate: f32,
    /// Rows or prompts gone through, in epochs, where there is an end to them.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub epoch: Option<f32>,
    /// Tokens that were trained on.
    pub trained_tokens: usize,
    /// Optimiser steps done.
    pub updates: u64,
    /// Optimiser steps skipped because the gradient was not finite.
    pub updates_skipped: u64,
    /// Tokens through forward and backward per second of update.
    pub update_tokens_per_s: f32,
    /// Seconds of the step: rollout, its rewards awaited, scoring, update.
    pub seconds: f32,
    /// Seconds of it in which log-probs and values before the update, and the reference's, were computed.
    pub scoring_seconds: f32,
    /// Seconds of it in which mini batches were scored, walked back and stepped.
    pub update_seconds: f32,
    /// What sharing it with other ranks took; none of a process alone.
    #[serde(flatten)]
    pub communication: Option<Communication>,
    /// Accuracy on held-out problems, when it was measured at this step.
    pub accuracy: Option<f32>,
    /// Loss on held-out rows, when it was measured at this step.
    #[serde(flatten)]
    pub held_out: Option<HeldOut>,
    /// What the layers think, when it was looked at after this step (--entropy-every).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub probe: Option<Probe>,
    /// All figures of that evaluation.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub evaluation: Option<Report>,
}

/// What a step took to be shared among ranks, as the first of them saw it.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Communication {
    /// Ranks.
    pub ranks: usize,
    /// Seconds in which completions, scores and gradients went from rank to rank.
    pub comm_s: f32,
    /// Seconds in which it waited for other ranks to be as far, and for work to be handed out.
    pub comm_wait_s: f32,
    /// Bytes that it sent and received.
    pub comm_bytes: u64,
}

/// What a step says of the completions that it sampled.
#[derive(Clone, Debug, Serialize)]
pub struct SampledRecord {
    /// Mean length of completions, tokens.
    pub response_tokens: f32,
    /// Share of completions that hit the length limit.
    pub truncated: f32,
    /// Sampled tokens per second of rollout.
    pub rollout_tokens_per_s: f32,
    /// Where the rollout's time went.
    #[serde(flatten)]
    pub timing: Timing,
}

/// What a step says of the completions that it sampled and judged.
#[derive(Clone, Debug, Serialize)]
pub struct RolloutRecord {
    /// Mean reward of the step's completions.
    pub reward: f32,
    /// Mean of each part of the reward before its weight, where there are several.
    #[serde(skip_serializing_if = "serde_json::Map::is_empty")]
    pub reward_parts: serde_json::Map<String, serde_json::Value>,
    /// Share of groups whose rewards differ, so that they teach something.
    pub groups_with_signal: f32,
    /// Groups that were replaced because their rewards were equal, with --resample.
    pub groups_dropped: usize,
    /// Share of tokens whose ratio was clipped.
    pub clip_fraction: Option<f32>,
    /// Mean |logp_rollout - logp_train| of the final policy, nats; none in the internal phase, where
    /// nothing above the layer is computed.
    pub drift_nats: Option<f32>,
    /// Mean KL estimate against the base, nats, with --kl-coef.
    pub kl_nats: Option<f32>,
    /// Mean loss of the value head, with --algo ppo.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub value_loss: Option<f32>,
    /// Share of the variance of returns that the value head explains, before the step's updates.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub explained_variance: Option<f32>,
    /// What dialogues were like, with --env.
    #[serde(flatten, skip_serializing_if = "Option::is_none")]
    pub talk: Option<TalkRecord>,
}

/// What is known when a step is done.
pub(super) struct Done<'d> {
    pub step: u64,
    pub phase: Phase,
    pub policy: Policy,
    pub batch: &'d Batch,
    pub tally: &'d Tally,
    pub learning_rate: f32,
    pub rollout_seconds: f32,
    pub rollout_timing: Timing,
    pub scoring_seconds: f32,
    pub update_seconds: f32,
    pub update_tokens_per_s: f32,
    pub seconds: f32,
    pub communication: Option<Communication>,
}

impl Trainer<'_> {
    /// The line of a step, but for what is measured after it.
    pub(super) fn record(&self, done: Done<'_>) -> StepRecord {
        let (tally, c) = (done.tally, &self.settings);
        let per_update =
            |sum: f64| (tally.updates > 0).then(|| (sum / tally.updates as f64) as f32);
        let epoch = self.source.epoch_len().filter(|_| !c.algo.is_rewarded());
        let objective = tally.means().map(|(name, mean)| (name.to_string(), mean.into()));
        StepRecord {
            step: done.step,
            phase: done.phase,
            layer: done.policy.depth(),
            rollout: self.rollout_record(&done),
            sampled: sampled_record(&done),
            entropy_nats: per_token(tally, tally.entropy),
            loss: per_update(tally.loss),
            objective: objective.collect(),
            gradient_norm: per_update(tally.gradient_norm),
            learning_rate: done.learning_rate,
            epoch: epoch.map(|n| {
                let rows = done.step * c.prompts_per_step as u64;
                let rows = c.rows.epochs.map_or(rows, |epochs| rows.min(epochs * n as u64));
                rows as f32 / n as f32
            }),
            trained_tokens: tally.tokens,
            updates: self.counters.updates,
            updates_skipped: self.counters.skipped,
            update_tokens_per_s: done.update_tokens_per_s,
            seconds: done.seconds,
            scoring_seconds: done.scoring_seconds,
            update_seconds: done.update_seconds,
            communication: done.communication,
            accuracy: None,
            held_out: None,
            evaluation: None,
            probe: None,
        }
    }

    /// What is said of completions that were sampled and judged.
    fn rollout_record(&self, done: &Done<'_>) -> Option<RolloutRecord> {
        let Source::Judged(judged) = &self.source else { return None };
        let (tally, Batch { groups, samples, talk, .. }) = (done.tally, done.batch);
        let verdicts = || samples.iter().filter_map(|s| s.verdict.as_ref());
        let per_update =
            |sum: f64| (tally.updates > 0).then(|| (sum / tally.updates as f64) as f32);
        let with_signal = groups.iter().filter(|g| g.responses.iter().any(Response::has_signal));
        Some(RolloutRecord {
            reward: verdicts().map(|v| v.reward).sum::<f32>() / samples.len() as f32,
            reward_parts: judged.mean_parts(samples),
            groups_with_signal: with_signal.count() as f32 / groups.len() as f32,
            groups_dropped: verdicts().filter(|v| v.dropped).count() / self.settings.group,
            clip_fraction: per_token(tally, tally.clipped as f64),
            drift_nats: match done.phase {
                Phase::Final => {
                    let known = tally.drift_tokens;
                    (known > 0).then(|| (tally.drift / known as f64) as f32)
                }
                Phase::Internal => None,
            },
            kl_nats: match self.settings.kl_coef > 0.0 {
                true => per_token(tally, tally.kl),
                false => None,
            },
            value_loss: self.learner.critic.as_ref().and_then(|_| per_update(tally.value_loss)),
            explained_variance: explained_variance(groups),
            talk: *talk,
        })
    }
}

/// What is said of completions that were sampled.
fn sampled_record(done: &Done<'_>) -> Option<SampledRecord> {
    let Batch { samples, sampled_tokens, .. } = done.batch;
    let mean = |of: fn(&Sample) -> f32| samples.iter().map(of).sum::<f32>() / samples.len() as f32;
    (!samples.is_empty()).then(|| SampledRecord {
        response_tokens: mean(|s| s.tokens as f32),
        truncated: mean(|s| s.truncated as u8 as f32),
        rollout_tokens_per_s: *sampled_tokens as f32 / done.rollout_seconds,
        timing: done.rollout_timing,
    })
}

/// The mean over the tokens of a step; none where there were none.
fn per_token(tally: &Tally, sum: f64) -> Option<f32> {
    (tally.tokens > 0).then(|| (sum / tally.tokens as f64) as f32)
}

/// The end of a run.
#[derive(Clone, Debug, Serialize)]
pub struct Summary {
    /// Held-out accuracy before the first step; none without held-out problems.
    pub accuracy_before: Option<f32>,
    /// Held-out accuracy after the last step; none also when the run was stopped.
    pub accuracy_after: Option<f32>,
    /// Loss on held-out rows before the first step; none without them.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub eval_loss_before: Option<f64>,
    /// The same after the last step; none also when the run was stopped.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub eval_loss_after: Option<f64>,
    /// Steps done.
    pub steps: u64,
    /// Seconds of the run, both evaluations and the time before a resume included.
    pub seconds: f64,
    /// Largest memory of this process so far, bytes, mapped weights included; 0 where the system does not say.
    pub peak_bytes: u64,
    /// Largest memory that was used of the GPU, bytes; none on the CPU.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub gpu_peak_bytes: Option<u64>,
    /// What was planned of it, bytes.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub gpu_planned_bytes: Option<u64>,
    /// Whether the user stopped it.
    pub interrupted: bool,
    /// Where the adapter lies.
    pub adapter: PathBuf,
}
