//! What a run writes: one record a step, the sampled completions, the adapter.

use std::fs::{self, File, OpenOptions};
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};

use serde::Serialize;

use super::TrainConfig;
use crate::{Error, Result};

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
    /// Seconds of the run, both evaluations included.
    pub seconds: f64,
    /// Whether the user stopped it.
    pub interrupted: bool,
    /// Where the adapter lies.
    pub adapter: PathBuf,
}

/// A run folder that this run owns.
pub struct RunDir {
    path: PathBuf,
    metrics: BufWriter<File>,
    completions: BufWriter<File>,
}

impl RunDir {
    /// Makes the folder and writes `config.toml`.
    ///
    /// # Errors
    /// [`Error::Invalid`] when there is something in it already: nothing is written over.
    pub fn create(path: &Path, model: &str, config: &TrainConfig) -> Result<RunDir> {
        RunDir::check(path)?;
        fs::create_dir_all(path).map_err(Error::io("create", path))?;
        let text = toml::to_string(config)
            .map_err(|e| Error::engine("writing config.toml", e.to_string(), "report it"))?;
        let text = format!(
            "# bupo-gguf train {model}\nmodel = {}\n\n[train]\n{text}",
            toml::Value::from(model)
        );
        crate::gguf::write_atomically(&path.join("config.toml"), |w| {
            w.write_all(text.as_bytes()).map_err(Error::io("write", path.join("config.toml")))
        })?;
        let open = |name: &str| {
            let path = path.join(name);
            let file = OpenOptions::new().create_new(true).append(true).open(&path);
            file.map(BufWriter::new).map_err(Error::io("create", path))
        };
        Ok(RunDir {
            path: path.into(),
            metrics: open("metrics.jsonl")?,
            completions: open("completions.jsonl")?,
        })
    }

    /// Refuses a folder that is not empty, before long work begins.
    pub fn check(path: &Path) -> Result<()> {
        match fs::read_dir(path).map(|mut entries| entries.next().is_some()) {
            Ok(true) => Err(Error::invalid(
                format!("--out {}", path.display()),
                "an empty or new folder",
                "one with files",
                "choose another, or remove it",
            )),
            Err(e) if e.kind() != std::io::ErrorKind::NotFound => {
                Err(Error::Io { action: "read folder", path: path.into(), source: e })
            }
            _ => Ok(()),
        }
    }

    /// Where the adapter lies.
    pub fn adapter(&self) -> PathBuf {
        self.path.join("adapter.gguf")
    }

    /// Appends to `metrics.jsonl`.
    pub fn metrics(&mut self, record: &StepRecord) -> Result<()> {
        line(&mut self.metrics, &self.path.join("metrics.jsonl"), record)
    }

    /// Appends to `completions.jsonl`.
    pub fn completion(&mut self, record: &impl Serialize) -> Result<()> {
        line(&mut self.completions, &self.path.join("completions.jsonl"), record)
    }

    /// Hands everything to the system.
    pub fn flush(&mut self) -> Result<()> {
        self.metrics.flush().map_err(Error::io("write", self.path.join("metrics.jsonl")))?;
        self.completions.flush().map_err(Error::io("write", self.path.join("completions.jsonl")))
    }
}

fn line(out: &mut impl Write, path: &Path, record: &impl Serialize) -> Result<()> {
    serde_json::to_writer(&mut *out, record)
        .map_err(std::io::Error::from)
        .and_then(|()| out.write_all(b"\n"))
        .map_err(Error::io("write", path))
}
