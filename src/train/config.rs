//! All settings of a run: one struct that the command line and `config.toml` both fill.

use std::path::PathBuf;

use clap::Args;
use serde::{Deserialize, Serialize};

use super::advantage::Baseline;
use super::algorithm::{Algorithm, Defaults};
use super::layers::LayerChoice;
use super::loss::{Aggregation, LossConfig, Ratio, Surrogate};
use super::row_options::RowOptions;
use super::schedule::Schedule;
use crate::data::{Columns, SourceOptions, source};
use crate::env::EnvOptions;
use crate::ggml::{ByteSize, DeviceChoice};
use crate::model::{DEMO, Placement, Targets};
use crate::reward::RewardOptions;
use crate::rollout::{PromptOptions, Sampling};
use crate::{Error, Result};

/// What data a run has where nobody says.
pub(super) const DEFAULT_DATA: &str = "task:add";

/// What a turn of a dialogue is rewarded with.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum TurnCredit {
    /// The sum of the dialogue's rewards.
    Whole,
    /// The rewards from the turn on.
    ToGo,
}

/// Options of a training run. What is left out is settled by [`TrainConfig::resolve`] from the model and the data.
#[derive(Clone, Debug, PartialEq, Args, Serialize, Deserialize)]
#[serde(default, rename_all = "kebab-case")]
pub struct TrainConfig {
    /// Problems: files (Parquet, JSON lines, CSV) and generated tasks (task:add, task:sub, task:max,
    /// task:mul, task:words), with commas between; a.parquet:2,b.jsonl:1 takes two thirds of the prompts from a,
    /// without weights all rows make one pool. With --algo sft a task gives its worked solutions, task:words?rows=200
    /// the first 200
    #[arg(
        long,
        default_value = DEFAULT_DATA,
        value_name = "FILES|task:NAME",
        help_heading = "Data and reward"
    )]
    pub data: String,
    /// Where prompts, answers and difficulties stand.
    #[command(flatten)]
    #[serde(flatten)]
    pub columns: Columns,
    /// Easy problems first, by difficulty, in every epoch
    #[arg(long, help_heading = "Data and reward")]
    pub curriculum: bool,
    /// Leave out problems whose prompt is longer than --max-prompt, instead of cutting its beginning
    #[arg(long, help_heading = "Data and reward")]
    pub drop_long_prompts: bool,
    /// Held-out problems for the accuracy before and after; a task has its own held-out split
    #[arg(long, value_name = "FILES", help_heading = "Data and reward")]
    pub eval_data: Option<String>,
    /// Held-out problems to evaluate on, a seeded sample where there are more
    #[arg(long, default_value_t = 400, value_name = "N", help_heading = "Data and reward")]
    pub eval_problems: usize,
    /// Completions of each held-out problem; the accuracy is the mean over them
    #[arg(long, default_value_t = 1, value_name = "K", help_heading = "Data and reward")]
    pub eval_samples: usize,
    /// Stop after N evaluations in a row without a better one (0 = never); adapter-best.gguf is the best one's
    #[arg(long, default_value_t = 0, value_name = "N", help_heading = "Data and reward")]
    pub early_stop: u64,
    /// Evaluate every N steps, besides before and after (0 = only then)
    #[arg(long, default_value_t = 0, value_name = "N", help_heading = "Data and reward")]
    pub eval_every: u64,
    /// Look at every layer's policy every N steps, on fixed completions of the base model: entropies, KL,
    /// cosines, perplexity in metrics.jsonl and on the page of `report` (0 = never)
    #[arg(long, default_value_t = 0, value_name = "N", help_heading = "Data and reward")]
    pub entropy_every: u64,
    /// How completions are judged.
    #[command(flatten)]
    #[serde(flatten)]
    pub rewards: RewardOptions,
    /// How prompts become tokens.
    #[command(flatten)]
    #[serde(flatten)]
    pub prompts: PromptOptions,
    /// Dialogues in the place of single answers.
    #[command(flatten)]
    #[serde(flatten)]
    pub dialogues: EnvOptions,
    /// Of a dialogue's rewards those of later turns count less by this factor a turn
    #[arg(long, default_value_t = 1.0, value_name = "X", help_heading = "Dialogues")]
    pub turn_discount: f32,
    /// What a turn is rewarded with: whole: the dialogue's sum; to-go: the rewards from the turn on, compared with those of
    /// all turns of the group
    #[arg(long, value_enum, default_value = "whole", help_heading = "Dialogues")]
    pub turn_credit: TurnCredit,

    /// bupo: the internal policy of one layer first, then the model's; the others up to ppo: the model's throughout,
    /// each a choice of the settings below, which can be set apart. sft, dpo, kto, orpo and simpo learn from given
    /// rows, distill from a teacher
    #[arg(long, value_enum, default_value = "bupo", help_heading = "Algorithm")]
    pub algo: Algorithm,
    /// With bupo: the objective of both phases, any other --algo [default: grpo]
    #[arg(long, value_enum, value_name = "ALGO", help_heading = "Algorithm")]
    pub objective: Option<Algorithm>,
    /// Layer of the internal phase, 1..L; auto: the boundary layer, the last whose FFN raises the entropy of
    /// the model's answers to training prompts (see `entropy`) [default: three quarters of L]
    #[arg(long, value_name = "auto|N", help_heading = "Algorithm")]
    pub internal_layer: Option<LayerChoice>,
    /// How the internal layer was chosen where it was left to the program.
    #[arg(skip)]
    pub internal_layer_why: Option<String>,
    /// Steps of the internal phase, of bupo and of what learns from rows or a teacher [default: bupo: a tenth of
    /// --steps, else 0]
    #[arg(long, value_name = "N", help_heading = "Algorithm")]
    pub internal_steps: Option<u64>,
    /// Apply the final norm before the unembedding in the internal phase (the paper's ablation)
    #[arg(long, help_heading = "Algorithm")]
    pub final_norm: bool,
    /// Layers 1..N get no update (the paper's control)
    #[arg(long, default_value_t = 0, value_name = "N", help_heading = "Algorithm")]
    pub freeze_layers: usize,
    /// Learning rate of the layers above --internal-layer, times this (the paper's control)
    #[arg(long, default_value_t = 1.0, value_name = "FACTOR", help_heading = "Algorithm")]
    pub lr_above: f32,
    /// What rewards are compared with [default: the algorithm's, grpo: group-std]
    #[arg(long, value_enum, help_heading = "Algorithm")]
    pub baseline: Option<Baseline>,
    /// Whose probability ratio weights a token [default: the algorithm's, grpo: token]
    #[arg(long, value_enum, help_heading = "Algorithm")]
    pub ratio: Option<Ratio>,
    /// What the ratio does to the loss [default: the algorithm's, grpo: clip]
    #[arg(long, value_enum, help_heading = "Algorithm")]
    pub surrogate: Option<Surrogate>,
    /// How token losses become one number [default: the algorithm's, grpo: token-mean]
    #[arg(long, value_enum, help_heading = "Algorithm")]
    pub loss_agg: Option<Aggregation>,
    /// The ratio may fall to 1 - X [default: the algorithm's, grpo: 0.2]
    #[arg(long, value_name = "X", help_heading = "Algorithm")]
    pub clip_low: Option<f32>,
    /// The ratio may rise to 1 + X [default: the algorithm's, grpo: 0.2]
    #[arg(long, value_name = "X", help_heading = "Algorithm")]
    pub clip_high: Option<f32>,
    /// Replace groups whose rewards are all equal, up to N times a step [default: the algorithm's, dapo: 10]
    #[arg(long, value_name = "N", help_heading = "Algorithm")]
    pub resample: Option<u64>,
    /// PPO: discount of later rewards
    #[arg(long, default_value_t = 1.0, value_name = "X", help_heading = "Algorithm")]
    pub gamma: f32,
    /// PPO: weight of longer estimates of the advantage
    #[arg(long, default_value_t = 1.0, value_name = "X", help_heading = "Algorithm")]
    pub gae_lambda: f32,
    /// PPO: learning rate of the value head
    #[arg(long, default_value_t = 5e-3, value_name = "X", help_heading = "Algorithm")]
    pub value_lr: f32,
    /// Dual clip: a token with a negative advantage costs at most X times its size
    #[arg(long, default_value_t = 10.0, value_name = "X", help_heading = "Algorithm")]
    pub clip_c: f32,
    /// Weight of the KL penalty against the base model (adapter off; 0 = off)
    #[arg(long, default_value_t = 0.0, value_name = "X", help_heading = "Algorithm")]
    pub kl_coef: f32,
    /// Truncated importance sampling: cap of exp(logp_train - logp_rollout), final phase (0 = off)
    #[arg(long, default_value_t = 0.0, value_name = "CAP", help_heading = "Algorithm")]
    pub tis_cap: f32,
    /// Where a step has several mini batches, take the log-probs that sampling gave for those before the update, which
    /// saves a forward; checked in each step against recomputed ones of a prompt, which are taken for all where the mean
    /// difference is above 0.01 nats; final phase
    #[arg(long, help_heading = "Algorithm")]
    pub old_from_rollout: bool,
    /// Sample with our own products throughout (CPU), not only where they are faster than ggml's, which round activations
    /// to 8 bits: log-probs are training's but for the cache's rounding; a few sequences decode up to eight times as slowly
    #[arg(long, help_heading = "Algorithm")]
    pub exact_rollouts: bool,
    /// Form the products of an update from rounded numbers, about 1.4 times as fast: of 16 bits instead of 24 on processors with
    /// a matrix unit (AMX), gradients off by some 1e-5 of themselves; of 13 to 15 on those with VNNI, 2e-3
    #[arg(long, help_heading = "Algorithm")]
    pub fast_products: bool,

    /// Objectives without rewards.
    #[command(flatten)]
    #[serde(flatten)]
    pub rows: RowOptions,

    /// Training steps
    #[arg(long, default_value_t = 40, value_name = "N", help_heading = "Batch")]
    pub steps: u64,
    /// Prompts, or rows, per step
    #[arg(long, default_value_t = 32, value_name = "N", help_heading = "Batch")]
    pub prompts_per_step: usize,
    /// Completions per prompt, at least 2
    #[arg(long, default_value_t = 8, value_name = "N", help_heading = "Batch")]
    pub group: usize,
    /// Prompts, or rows, per optimiser step [default: half of --prompts-per-step, of rows and teachers all]
    #[arg(long, value_name = "N", help_heading = "Batch")]
    pub mini_batch: Option<usize>,
    /// Tokens per micro batch; gradients of a mini batch accumulate over them [default: 4096; on a GPU what --vram
    /// allows]
    #[arg(long, value_name = "N", help_heading = "Batch")]
    pub micro_batch_tokens: Option<usize>,
    /// Compute activations again in the backward instead of keeping them: least memory, a third more time; results
    /// are the same
    #[arg(long, help_heading = "Batch")]
    pub recompute: bool,
    /// Prompts longer than this lose their beginning [default: the longest prompt but for outliers]
    #[arg(long, value_name = "TOKENS", help_heading = "Batch")]
    pub max_prompt: Option<usize>,
    /// Completions end at this length [default: twice the data's own solutions, or by the model's size; at most what
    /// context and memory leave]
    #[arg(long, value_name = "TOKENS", help_heading = "Batch")]
    pub max_response: Option<usize>,

    /// How tokens are drawn.
    #[command(flatten)]
    #[serde(flatten)]
    pub sampling: Sampling,
    /// Memory for the KV cache of rollouts, MiB; sets how many sequences run at once [default: 1024; on a GPU what
    /// --vram allows]
    #[arg(long, value_name = "MIB", help_heading = "Sampling")]
    pub kv_mib: Option<usize>,
    /// Sample completions that do not depend on who is decoded beside them, so that any number of MPI ranks samples the
    /// same ones; with several ranks always on, on the CPU
    #[arg(long, help_heading = "Sampling")]
    pub batch_invariant: bool,

    /// Learning rate [default: by the objective and the model's size]
    #[arg(long, value_name = "X", help_heading = "Optimiser")]
    pub lr: Option<f32>,
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
    /// LoRA+: learning rate of B, times this
    #[arg(long, default_value_t = 1.0, value_name = "FACTOR", help_heading = "Optimiser")]
    pub loraplus_lr_ratio: f32,
    /// Scale gradients down to this global norm (0 = off)
    #[arg(long, default_value_t = 1.0, value_name = "X", help_heading = "Optimiser")]
    pub clip_norm: f32,

    /// Rank of the adapter
    #[arg(long, default_value_t = 16, value_name = "R", help_heading = "Adapter")]
    pub rank: usize,
    /// The low-rank term is scaled by alpha / rank [default: twice the rank]
    #[arg(long, value_name = "X", help_heading = "Adapter")]
    pub alpha: Option<f32>,
    /// Adapted weights: all linear maps of attention and FFN, or some by the names that `inspect` lists, such as
    /// q,k,v,o,gate,up,down (qkv and gate_up where the model has them in one; qkv,z,alpha,beta,out in delta nets). Of a
    /// mixture of experts, shared is among all of them; experts (each of them) and router only if they are named
    #[arg(long, default_value = "all", value_name = "LIST", help_heading = "Adapter")]
    pub targets: Targets,
    /// rsLoRA: scale the adapter by alpha / sqrt(rank) instead of alpha / rank; the file's alpha is alpha sqrt(rank)
    #[arg(long, conflicts_with = "adapter", help_heading = "Adapter")]
    pub rslora: bool,
    /// Of a mixture of experts: the update takes the experts that the rollout took, where rounding would choose others
    #[arg(long, default_value_t = true, action = clap::ArgAction::Set, value_name = "true|false", help_heading = "Adapter")]
    pub replay_routes: bool,
    /// Start from this adapter (GGUF); rank, alpha and targets are its own
    #[arg(long, value_name = "FILE", help_heading = "Adapter")]
    pub adapter: Option<PathBuf>,

    /// Run folder; must be empty or not exist [default: runs/<model>-<algo>-<seed>, with a number where that is taken]
    #[arg(long, value_name = "DIR", help_heading = "Run")]
    pub out: Option<PathBuf>,
    /// Also write event files for TensorBoard, into tensorboard/ of the run folder
    #[arg(long, help_heading = "Run")]
    pub tensorboard: bool,
    /// Write a checkpoint, from which --resume goes on, every N steps and at the end (0 = never)
    #[arg(long, default_value_t = 10, value_name = "N", help_heading = "Run")]
    pub checkpoint_every: u64,
    /// Checkpoints to keep, the newest ones (0 = all)
    #[arg(long, default_value_t = 2, value_name = "N", help_heading = "Run")]
    pub keep_checkpoints: usize,
    /// Memory that the run may take in all, as 12GiB or 800MiB: a plan beyond it is refused, what it leaves keeps
    /// activations for the backward [default: what is free]
    #[arg(long, value_name = "SIZE", help_heading = "Run")]
    pub memory: Option<ByteSize>,
    /// Same seed, same run
    #[arg(long, default_value_t = 1, value_name = "N", help_heading = "Run")]
    pub seed: u64,
    /// Threads [default: all cores]
    #[arg(long, value_name = "N", value_parser = crate::options::at_least_one, help_heading = "Run")]
    pub threads: Option<usize>,
    /// Where to compute: cpu, cuda (the first GPU), cuda:N, cuda:auto (one for each MPI rank
    /// of a machine), or auto; a GPU needs a build with `--features cuda`
    #[arg(long, default_value = "cpu", value_name = "DEVICE", help_heading = "Run")]
    pub device: String,
    /// On a GPU: its memory that the run may take, 12GiB say, for which micro batches and parallel sequences are
    /// planned [default: what is free there]
    #[arg(long, value_name = "SIZE", help_heading = "Run")]
    pub vram: Option<ByteSize>,
    /// On a GPU: layers, from the last one down, whose weights lie in its memory [default: all]
    #[arg(long, value_name = "N", help_heading = "Run")]
    pub gpu_layers: Option<usize>,
    /// On a GPU: multiply in F32 instead of F16
    #[arg(long, help_heading = "Run")]
    pub precise: bool,
}

impl Default for TrainConfig {
    fn default() -> TrainConfig {
        crate::options::defaults()
    }
}

/// What an option stands for where it is left out and nothing but other options decide; [`Settings`](super::Settings)
/// has all of it.
impl TrainConfig {
    /// What the objective's name stands for.
    fn defaults(&self) -> Defaults {
        self.objective.unwrap_or(self.algo).defaults()
    }

    /// What rewards are compared with.
    pub(super) fn given_baseline(&self) -> Baseline {
        self.baseline.unwrap_or(self.defaults().baseline)
    }

    /// How token losses become one number.
    pub(super) fn given_aggregation(&self) -> Aggregation {
        self.loss_agg.unwrap_or(self.defaults().aggregation)
    }

    /// Times that a step replaces groups without signal.
    pub(super) fn given_resample(&self) -> u64 {
        self.resample.unwrap_or(self.defaults().resample)
    }

    /// Settings of the loss.
    pub(super) fn given_loss(&self) -> LossConfig {
        let named = self.defaults();
        LossConfig {
            ratio: self.ratio.unwrap_or(named.ratio),
            surrogate: self.surrogate.unwrap_or(named.surrogate),
            clip_low: self.clip_low.unwrap_or(named.clip_low),
            clip_high: self.clip_high.unwrap_or(named.clip_high),
            clip_c: self.clip_c,
            kl_coef: self.kl_coef,
        }
    }

    /// Prompts per optimiser step.
    pub(super) fn given_mini_batch(&self) -> usize {
        let by_default = match self.algo.is_rewarded() {
            true => self.prompts_per_step.div_ceil(2),
            false => self.prompts_per_step,
        };
        self.mini_batch.unwrap_or(by_default)
    }

    /// Steps of the internal phase; 0 where the algorithm has none.
    pub(super) fn given_internal_steps(&self) -> u64 {
        match self.algo {
            // More costs accuracy at the end (docs/EXPERIMENTS.md); the paper's runs have a tenth, too.
            Algorithm::Bupo => self.internal_steps.unwrap_or((self.steps / 10).max(1)),
            algo if algo.has_internal_phase() => self.internal_steps.unwrap_or(0),
            _ => 0,
        }
    }

    /// How data files are read.
    pub fn source(&self) -> SourceOptions {
        SourceOptions {
            seed: self.seed,
            columns: self.columns.clone(),
            curriculum: self.curriculum,
        }
    }

    /// Settings from a table as `config.toml` holds it, `place`; what it leaves out has its default.
    ///
    /// # Errors
    /// [`Error::Invalid`] for what is no setting, and for a value of the wrong kind.
    pub fn from_table(table: toml::Table, place: &str) -> Result<TrainConfig> {
        let command = TrainConfig::augment_args(clap::Command::new("train"));
        let names = command.get_arguments().map(|a| a.get_id().as_str().replace('_', "-"));
        let names: Vec<String> = names
            .chain(["internal-layer-why", "reward-folder", "env-folder"].map(String::from))
            .collect();
        let wrong = |got: String| {
            Error::invalid(place, "settings of `train`", got, "mend it; train --help has them all")
        };
        if let Some(name) = table.keys().find(|name| !names.contains(name)) {
            return Err(wrong(format!("{name}, which is none")));
        }
        let settings = table.try_into();
        settings.map_err(|e: toml::de::Error| wrong(e.to_string().trim_end().replace('\n', " ")))
    }

    /// Settings from the words of a command line, the first of which is `train`.
    ///
    /// # Errors
    /// [`Error::Invalid`] with clap's words for what is no option of `train`.
    pub fn from_words(words: &[String]) -> Result<TrainConfig> {
        #[derive(clap::Parser)]
        struct Line {
            #[command(flatten)]
            config: TrainConfig,
        }
        let wrong = |got: String| {
            Error::invalid("--plan", "train and its options", got, "see train --help")
        };
        if words.first().is_none_or(|word| word != "train") {
            return Err(wrong(words.join(" ")));
        }
        <Line as clap::Parser>::try_parse_from(words)
            .map(|line| line.config)
            .map_err(|e| wrong(e.to_string().lines().next().unwrap_or_default().into()))
    }

    /// The settings as `config.toml` names them, numbers as short as they can be written.
    ///
    /// # Errors
    /// [`Error::Engine`] when a value has no form in toml.
    pub fn table(&self) -> Result<toml::Table> {
        let mut table = toml::Table::try_from(self)
            .map_err(|e| Error::engine("reading settings", e.to_string(), "report it"))?;
        for (_, value) in table.iter_mut() {
            // 0.0005, not 0.0005000000237487257: what an f32 is written as.
            if let toml::Value::Float(x) = value
                && (*x as f32) as f64 == *x
            {
                *x = (*x as f32).to_string().parse().unwrap_or(*x);
            }
        }
        Ok(table)
    }

    /// The settings that stood on the command line, as `config.toml` names them, for those of a run to be
    /// changed by; `matches` is what clap made this struct from.
    ///
    /// # Errors
    /// [`Error::Engine`] when a value has no form in toml.
    pub fn given(&self, matches: &clap::ArgMatches) -> Result<toml::Table> {
        let mut table = self.table()?;
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
        let rewards = &mut self.rewards;
        if rewards.judge(&self.data, self.max_response.unwrap_or(usize::MAX))?.lies_somewhere() {
            rewards.reward_folder.get_or_insert(PathBuf::from("."));
        }
        if let Some(rubric) = &mut self.rewards.judge_rubric
            && std::path::Path::new(rubric).is_file()
        {
            *rubric = source::absolute(rubric)?;
        }
        if self.dialogues.has_program() {
            self.dialogues.env_folder.get_or_insert(PathBuf::from("."));
        }
        [
            &mut self.dialogues.env_folder,
            &mut self.prompts.tokenizer,
            &mut self.adapter,
            &mut self.out,
            &mut self.rewards.reward_folder,
            &mut self.rows.teacher_adapter,
        ]
        .into_iter()
        .flatten()
        .try_for_each(absolute)?;
        if let Some(teacher) = self.rows.teacher.as_mut().filter(|t| t.as_os_str() != DEMO) {
            absolute(teacher)?;
        }
        self.data = source::absolute(&self.data)?;
        self.eval_data = self.eval_data.as_deref().map(source::absolute).transpose()?;
        let template = &mut self.prompts.template;
        if std::path::Path::new(template).is_file() {
            *template = source::absolute(template)?;
        }
        Ok(self)
    }

    /// Where the model is to be opened.
    ///
    /// # Errors
    /// The device is not there (see [`DeviceChoice::resolve`]).
    pub fn placement(&self) -> Result<Placement> {
        let choice: DeviceChoice = self.device.parse()?;
        Ok(Placement { device: choice.resolve(self.precise)?, gpu_layers: self.gpu_layers })
    }
}
