//! All settings of a run: one struct that the command line and `config.toml` both fill.

use std::path::PathBuf;

use clap::{Args, ValueEnum};
use serde::{Deserialize, Serialize};

use super::advantage::Baseline;
use super::loss::{Aggregation, LossConfig};
use super::optimizer::AdamWConfig;
use super::schedule::Schedule;
use crate::model::Targets;
use crate::rollout::Sampling;
use crate::{Error, Result};

/// The algorithm of a run.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Algorithm {
    /// Internal layer policy first, then GRPO on the final policy.
    Bupo,
    /// GRPO on the final policy throughout.
    Grpo,
}

/// Settings of a training run. Defaults suit the demo model on two cores; for a real model raise
/// `--max-prompt`, `--max-response` and lower `--lr`.
#[derive(Clone, Debug, PartialEq, Args, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "kebab-case")]
pub struct TrainConfig {
    /// Problems: a JSON-lines file with `prompt` (text or messages) and `answer`, or a generated task
    /// (task:add, task:sub, task:max)
    #[arg(
        long,
        default_value = "task:add",
        value_name = "FILE|task:NAME",
        help_heading = "Data and reward"
    )]
    pub data: String,
    /// Held-out problems for the accuracy before and after; a task has its own held-out split
    #[arg(long, value_name = "FILE", help_heading = "Data and reward")]
    pub eval_data: Option<PathBuf>,
    /// Held-out problems to evaluate on (one sample each)
    #[arg(long, default_value_t = 400, value_name = "N", help_heading = "Data and reward")]
    pub eval_problems: usize,
    /// Evaluate every N steps, besides before and after (0 = only then)
    #[arg(long, default_value_t = 0, value_name = "N", help_heading = "Data and reward")]
    pub eval_every: u64,
    /// boxed: the last \boxed{} compared as number or text; exact: the whole completion as text
    #[arg(long, default_value = "boxed", value_name = "NAME", help_heading = "Data and reward")]
    pub reward: String,
    /// System message put before text prompts
    #[arg(long, value_name = "TEXT", help_heading = "Data and reward")]
    pub system: Option<String>,
    /// tokenizer.json to encode with instead of the GGUF's vocabulary; refused where ids differ
    #[arg(long, value_name = "FILE", help_heading = "Data and reward")]
    pub tokenizer: Option<PathBuf>,

    /// bupo: the internal policy of one layer first, then GRPO; grpo: GRPO throughout
    #[arg(long, value_enum, default_value = "bupo", help_heading = "Algorithm")]
    pub algo: Algorithm,
    /// Layer of the internal phase, 1..L [default: three quarters of L]
    #[arg(long, value_name = "N", help_heading = "Algorithm")]
    pub internal_layer: Option<usize>,
    /// Steps of the internal phase
    #[arg(long, default_value_t = 10, value_name = "N", help_heading = "Algorithm")]
    pub internal_steps: u64,
    /// Apply the final norm before the unembedding in the internal phase (the paper's ablation)
    #[arg(long, help_heading = "Algorithm")]
    pub final_norm: bool,
    /// How a group's rewards become advantages
    #[arg(long, value_enum, default_value = "group-std", help_heading = "Algorithm")]
    pub baseline: Baseline,
    /// How token losses become one number
    #[arg(long, value_enum, default_value = "token-mean", help_heading = "Algorithm")]
    pub loss_agg: Aggregation,
    /// The ratio may fall to 1 - X
    #[arg(long, default_value_t = 0.2, value_name = "X", help_heading = "Algorithm")]
    pub clip_low: f32,
    /// The ratio may rise to 1 + X
    #[arg(long, default_value_t = 0.2, value_name = "X", help_heading = "Algorithm")]
    pub clip_high: f32,
    /// Dual clip: a token with a negative advantage costs at most X times its size
    #[arg(long, default_value_t = 10.0, value_name = "X", help_heading = "Algorithm")]
    pub clip_c: f32,
    /// Weight of the KL penalty against the base model (adapter off; 0 = off)
    #[arg(long, default_value_t = 0.0, value_name = "X", help_heading = "Algorithm")]
    pub kl_coef: f32,
    /// Truncated importance sampling: cap of exp(logp_train - logp_rollout), final phase (0 = off)
    #[arg(long, default_value_t = 0.0, value_name = "CAP", help_heading = "Algorithm")]
    pub tis_cap: f32,

    /// Training steps
    #[arg(long, default_value_t = 40, value_name = "N", help_heading = "Batch")]
    pub steps: u64,
    /// Prompts per step
    #[arg(long, default_value_t = 32, value_name = "N", help_heading = "Batch")]
    pub prompts_per_step: usize,
    /// Completions per prompt, at least 2
    #[arg(long, default_value_t = 8, value_name = "N", help_heading = "Batch")]
    pub group: usize,
    /// Prompts per optimiser step [default: half of --prompts-per-step]
    #[arg(long, value_name = "N", help_heading = "Batch")]
    pub mini_batch: Option<usize>,
    /// Tokens per micro batch; gradients of a mini batch accumulate over them
    #[arg(long, default_value_t = 4096, value_name = "N", help_heading = "Batch")]
    pub micro_batch_tokens: usize,
    /// Memory for activations that an update keeps instead of computing them again, MiB (a third of its
    /// time); results are the same [default: half of what is free]
    #[arg(long, value_name = "MIB", help_heading = "Batch")]
    pub memory: Option<usize>,
    /// Prompts longer than this lose their beginning
    #[arg(long, default_value_t = 64, value_name = "TOKENS", help_heading = "Batch")]
    pub max_prompt: usize,
    /// Completions end at this length
    #[arg(long, default_value_t = 24, value_name = "TOKENS", help_heading = "Batch")]
    pub max_response: usize,

    /// Sampling temperature; log-probs are taken at it too
    #[arg(long, default_value_t = 1.0, value_name = "X", help_heading = "Sampling")]
    pub temperature: f32,
    /// Keep the smallest set of tokens with this probability (1 = all)
    #[arg(long, default_value_t = 1.0, value_name = "X", help_heading = "Sampling")]
    pub top_p: f32,
    /// Keep the N likeliest tokens (0 = all)
    #[arg(long, default_value_t = 0, value_name = "N", help_heading = "Sampling")]
    pub top_k: usize,
    /// Keep tokens with at least X times the likeliest one's probability (0 = all)
    #[arg(long, default_value_t = 0.0, value_name = "X", help_heading = "Sampling")]
    pub min_p: f32,
    /// Memory for the KV cache of rollouts, MiB; sets how many sequences run at once
    #[arg(long, default_value_t = 1024, value_name = "MIB", help_heading = "Sampling")]
    pub kv_mib: usize,

    /// Learning rate
    #[arg(long, default_value_t = 1e-3, value_name = "X", help_heading = "Optimiser")]
    pub lr: f32,
    /// Learning rate after the warm-up
    #[arg(long, value_enum, default_value = "constant", help_heading = "Optimiser")]
    pub schedule: Schedule,
    /// Steps in which the learning rate rises to its value
    #[arg(long, default_value_t = 0, value_name = "N", help_heading = "Optimiser")]
    pub warmup: u64,
    /// AdamW: decay of the mean of gradients
    #[arg(long, default_value_t = 0.9, value_name = "X", help_heading = "Optimiser")]
    pub beta1: f32,
    /// AdamW: decay of the mean of their squares
    #[arg(long, default_value_t = 0.999, value_name = "X", help_heading = "Optimiser")]
    pub beta2: f32,
    /// AdamW: added to the root of the second moment
    #[arg(long, default_value_t = 1e-8, value_name = "X", help_heading = "Optimiser")]
    pub adam_eps: f32,
    /// AdamW: weight decay
    #[arg(long, default_value_t = 0.01, value_name = "X", help_heading = "Optimiser")]
    pub weight_decay: f32,
    /// Scale gradients down to this global norm (0 = off)
    #[arg(long, default_value_t = 1.0, value_name = "X", help_heading = "Optimiser")]
    pub clip_norm: f32,

    /// Rank of the adapter
    #[arg(long, default_value_t = 16, value_name = "R", help_heading = "Adapter")]
    pub rank: usize,
    /// The low-rank term is scaled by alpha / rank [default: twice the rank]
    #[arg(long, value_name = "X", help_heading = "Adapter")]
    pub alpha: Option<f32>,
    /// Adapted weights, any of q,k,v,o,gate,up,down
    #[arg(
        long,
        default_value = "q,k,v,o,gate,up,down",
        value_name = "LIST",
        help_heading = "Adapter"
    )]
    pub targets: Targets,
    /// Start from this adapter (GGUF); rank, alpha and targets are its own
    #[arg(long, value_name = "FILE", help_heading = "Adapter")]
    pub adapter: Option<PathBuf>,

    /// Run folder; must be empty or not exist [default: runs/<model>-<algo>-<seed>]
    #[arg(long, value_name = "DIR", help_heading = "Run")]
    pub out: Option<PathBuf>,
    /// Write a checkpoint, from which --resume goes on, every N steps and at the end (0 = never)
    #[arg(long, default_value_t = 10, value_name = "N", help_heading = "Run")]
    pub checkpoint_every: u64,
    /// Checkpoints to keep, the newest ones (0 = all)
    #[arg(long, default_value_t = 2, value_name = "N", help_heading = "Run")]
    pub keep_checkpoints: usize,
    /// Same seed, same run
    #[arg(long, default_value_t = 1, value_name = "N", help_heading = "Run")]
    pub seed: u64,
    /// Threads [default: all cores]
    #[arg(long, value_name = "N", help_heading = "Run")]
    pub threads: Option<usize>,
    /// Where to compute; this build knows cpu
    #[arg(long, default_value = "cpu", value_name = "cpu", help_heading = "Run")]
    pub device: String,
}

impl Default for TrainConfig {
    fn default() -> TrainConfig {
        // clap holds the defaults, so that --help and config.toml cannot disagree.
        #[derive(clap::Parser)]
        struct Defaults {
            #[command(flatten)]
            config: TrainConfig,
        }
        <Defaults as clap::Parser>::parse_from(["train"]).config
    }
}

impl TrainConfig {
    /// Settings of the token loss.
    pub fn loss(&self) -> LossConfig {
        LossConfig {
            clip_low: self.clip_low,
            clip_high: self.clip_high,
            clip_c: self.clip_c,
            kl_coef: self.kl_coef,
        }
    }

    /// Settings of the optimiser.
    pub fn adamw(&self) -> AdamWConfig {
        AdamWConfig {
            beta1: self.beta1,
            beta2: self.beta2,
            eps: self.adam_eps,
            weight_decay: self.weight_decay,
            clip_norm: self.clip_norm,
        }
    }

    /// Settings of sampling.
    pub fn sampling(&self) -> Sampling {
        Sampling {
            temperature: self.temperature,
            top_p: self.top_p,
            top_k: self.top_k,
            min_p: self.min_p,
        }
    }

    /// Prompts per optimiser step.
    pub fn mini_batch(&self) -> usize {
        self.mini_batch.unwrap_or(self.prompts_per_step.div_ceil(2))
    }

    /// The adapter's alpha.
    pub fn alpha(&self) -> f32 {
        self.alpha.unwrap_or(2.0 * self.rank as f32)
    }

    /// Layer of the internal phase for a model of `n_layer` layers.
    pub fn internal_layer(&self, n_layer: usize) -> usize {
        self.internal_layer.unwrap_or((3 * n_layer).div_ceil(4))
    }

    /// The settings that stood on the command line, as `config.toml` names them, for those of a run to be
    /// changed by; `matches` is what clap made this struct from.
    ///
    /// # Errors
    /// [`Error::Engine`] when a value has no form in toml.
    pub fn given(&self, matches: &clap::ArgMatches) -> Result<toml::Table> {
        let mut table = toml::Table::try_from(self)
            .map_err(|e| Error::engine("reading settings", e.to_string(), "report it"))?;
        let given = Some(clap::parser::ValueSource::CommandLine);
        table.retain(|name, _| matches.value_source(&name.replace('-', "_")) == given);
        Ok(table)
    }

    /// Makes paths absolute, so that the run goes on from whichever folder it is resumed in.
    ///
    /// # Errors
    /// [`Error::Io`] when there is no current folder.
    pub fn absolute(mut self) -> Result<TrainConfig> {
        let absolute = |path: &mut PathBuf| -> Result<()> {
            *path = std::path::absolute(&*path).map_err(Error::io("find", &*path))?;
            Ok(())
        };
        [&mut self.eval_data, &mut self.tokenizer, &mut self.adapter, &mut self.out]
            .into_iter()
            .flatten()
            .try_for_each(absolute)?;
        self.data = crate::data::source::absolute(&self.data)?;
        Ok(self)
    }

    /// Fills in every default that depends on another setting, on the model or on the machine, so that
    /// `config.toml` says what was done.
    pub fn resolved(mut self, n_layer: usize) -> TrainConfig {
        let cores = || std::thread::available_parallelism().map_or(1, |n| n.get());
        self.threads = Some(self.threads.unwrap_or_else(cores));
        self.internal_layer = Some(self.internal_layer(n_layer));
        self.mini_batch = Some(self.mini_batch());
        self.alpha = Some(self.alpha());
        self
    }

    /// Refuses settings that cannot work, before anything is loaded or written.
    ///
    /// # Errors
    /// [`Error::Invalid`] naming the option.
    pub fn check(&self) -> Result<()> {
        let refuse = |option: &str, expected: &str, got: String, advice: &str| {
            Err(Error::invalid(option, expected, got, advice))
        };
        if self.device != "cpu" {
            let advice = "this build computes on the CPU; leave --device out";
            return refuse("--device", "cpu", self.device.clone(), advice);
        }
        if self.group < 2 {
            let advice = "advantages compare completions of one prompt; try 8";
            return refuse("--group", "at least 2", self.group.to_string(), advice);
        }
        for (option, value) in [
            ("--prompts-per-step", self.prompts_per_step),
            ("--mini-batch", self.mini_batch()),
            ("--micro-batch-tokens", self.micro_batch_tokens),
            ("--max-prompt", self.max_prompt),
            ("--max-response", self.max_response),
            ("--eval-problems", self.eval_problems),
            ("--steps", self.steps as usize),
            ("--kv-mib", self.kv_mib),
        ] {
            if value == 0 {
                return refuse(option, "at least 1", "0".into(), "leave it out for the default");
            }
        }
        let longest = self.max_prompt + self.max_response;
        if self.micro_batch_tokens < longest {
            let expected = format!("at least --max-prompt plus --max-response ({longest})");
            return refuse(
                "--micro-batch-tokens",
                &expected,
                self.micro_batch_tokens.to_string(),
                "raise it",
            );
        }
        if self.mini_batch() > self.prompts_per_step {
            let expected = format!("at most --prompts-per-step ({})", self.prompts_per_step);
            return refuse("--mini-batch", &expected, self.mini_batch().to_string(), "lower it");
        }
        for (option, value, ok, expected) in [
            ("--temperature", self.temperature, self.temperature > 0.0, "above 0"),
            ("--top-p", self.top_p, self.top_p > 0.0 && self.top_p <= 1.0, "above 0, at most 1"),
            ("--min-p", self.min_p, (0.0..1.0).contains(&self.min_p), "0 to below 1"),
            ("--lr", self.lr, self.lr > 0.0, "above 0"),
            ("--clip-low", self.clip_low, (0.0..1.0).contains(&self.clip_low), "0 to below 1"),
            ("--clip-high", self.clip_high, self.clip_high >= 0.0, "at least 0"),
            ("--clip-c", self.clip_c, self.clip_c > 1.0, "above 1"),
            ("--kl-coef", self.kl_coef, self.kl_coef >= 0.0, "at least 0"),
            ("--tis-cap", self.tis_cap, self.tis_cap >= 0.0, "at least 0"),
            ("--beta1", self.beta1, (0.0..1.0).contains(&self.beta1), "0 to below 1"),
            ("--beta2", self.beta2, (0.0..1.0).contains(&self.beta2), "0 to below 1"),
            ("--adam-eps", self.adam_eps, self.adam_eps > 0.0, "above 0"),
            ("--weight-decay", self.weight_decay, self.weight_decay >= 0.0, "at least 0"),
            ("--clip-norm", self.clip_norm, self.clip_norm >= 0.0, "at least 0"),
        ] {
            if !(ok && value.is_finite()) {
                return refuse(option, expected, value.to_string(), "leave it out for the default");
            }
        }
        Ok(())
    }
}
