//! What a run says of itself: one record a step, and a summary.

use std::path::PathBuf;

use serde::Serialize;

use crate::analysis::Probe;
use crate::eval::Report;

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
    /// Mean reward of the step's completions.
    pub reward: f32,
    /// Mean of each part of the reward before its weight, where there are several.
    #[serde(skip_serializing_if = "serde_json::Map::is_empty")]
    pub reward_parts: serde_json::Map<String, serde_json::Value>,
    /// Share of groups whose rewards differ, so that they teach something.
    pub groups_with_signal: f32,
    /// Groups that were replaced because their rewards were equal, with --resample.
    pub groups_dropped: usize,
    /// Mean length of completions, tokens.
    pub response_tokens: f32,
    /// Share of completions that hit the length limit.
    pub truncated: f32,
    /// Mean entropy of the optimised policy on the tokens that were trained on, nats.
    pub entropy_nats: Option<f32>,
    /// Mean loss of the mini batches.
    pub loss: Option<f32>,
    /// Share of tokens whose ratio was clipped.
    pub clip_fraction: Option<f32>,
    /// Mean global norm of the gradients before clipping.
    pub gradient_norm: Option<f32>,
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
    /// Learning rate.
    pub learning_rate: f32,
    /// Optimiser steps done.
    pub updates: u64,
    /// Optimiser steps skipped because the gradient was not finite.
    pub updates_skipped: u64,
    /// Sampled tokens per second of rollout.
    pub rollout_tokens_per_s: f32,
    /// Tokens through forward and backward per second of update.
    pub update_tokens_per_s: f32,
    /// Seconds of the step.
    pub seconds: f32,
    /// Accuracy on held-out problems, when it was measured at this step.
    pub accuracy: Option<f32>,
    /// What the layers think, when it was looked at after this step (--entropy-every).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub probe: Option<Probe>,
    /// All figures of that evaluation.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub evaluation: Option<Report>,
}

/// The end of a run.
#[derive(Clone, Debug, Serialize)]
pub struct Summary {
    /// Held-out accuracy before the first step; none without held-out problems.
    pub accuracy_before: Option<f32>,
    /// Held-out accuracy after the last step; none also when the run was stopped.
    pub accuracy_after: Option<f32>,
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
