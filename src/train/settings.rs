//! Settings of a run with nothing left open: what [`TrainConfig`] leaves out is decided here, once, before anything is
//! built, from the model and the data.

use std::ops::Deref;

use super::advantage::{Baseline, Gae};
use super::critic::CriticConfig;
use super::facts::Facts;
use super::layers::{Found, LayerChoice};
use super::loss::{Aggregation, LossConfig};
use super::optimizer::AdamWConfig;
use super::preset::Size;
use super::{Algorithm, TrainConfig};
use crate::data::source;
use crate::ggml::usable_cores;
use crate::model::{Model, Policy};
use crate::rollout::RolloutOptions;
use crate::{Error, Result};

/// Lengths of the demo model's problems and answers, tokens.
const DEMO_LENGTHS: (usize, usize) = (64, 24);
/// Learning rate at which the demo model learns in 40 steps.
const DEMO_LR: f32 = 1e-3;
const OF_DEMO: &str = "the demo model's own";
/// Lengths are multiples of this.
const LENGTH_STEP: usize = 16;
/// Prompts longer than this many times the 99th percentile are outliers.
const OUTLIER: usize = 2;
/// Bytes of text that a token stands for, reckoned low.
const BYTES_PER_TOKEN: usize = 3;
/// Completions at least, where the data has solutions.
const SHORTEST_RESPONSE: usize = 256;
/// Completions are not made shorter than this to save memory.
const SHORTEST_USEFUL: usize = 64;
/// A turn of a dialogue, with what is said to it.
const TURN_TOKENS: usize = 256;
/// Completions of a task of ours.
const TASK_RESPONSE: usize = 256;
/// Completions of a model whose chat template has a place for thoughts.
const THOUGHTS: usize = 4096;
/// Tokens of a micro batch, where none are longer.
const MICRO_BATCH_TOKENS: usize = 4096;
/// Memory for keys and values, MiB.
const KV_MIB: usize = 1024;

/// The settings of a run. The options that are settled already are those of [`TrainConfig`], to which it
/// dereferences; a field of the same name here is what an option was resolved to.
#[derive(Clone, Debug)]
pub struct Settings {
    /// The options as they were given.
    pub options: TrainConfig,
    /// Prompts longer than this lose their beginning, tokens.
    pub max_prompt: usize,
    /// Completions end at this length, tokens.
    pub max_response: usize,
    /// Learning rate after the warm-up.
    pub lr: f32,
    /// Prompts, or rows, per optimiser step.
    pub mini_batch: usize,
    /// Tokens per micro batch; the longest prompt with its response fits.
    pub micro_batch_tokens: usize,
    /// Memory for keys and values of rollouts, MiB.
    pub kv_mib: usize,
    /// Threads.
    pub threads: usize,
    /// The low-rank term is scaled by this over the rank.
    pub alpha: f32,
    /// Layer of the internal phase, from 1; the default where `auto` has not been looked for yet.
    pub internal_layer: usize,
    /// Steps of the internal phase; 0 where the algorithm has none.
    pub internal_steps: u64,
    /// Token loss of the policy gradient.
    pub loss: LossConfig,
    /// What rewards are compared with.
    pub baseline: Baseline,
    /// How token losses become one number.
    pub aggregation: Aggregation,
    /// Times that a step replaces groups without signal.
    pub resample: u64,
    /// What was decided and why, a line each.
    pub reasons: Vec<String>,
}

impl Deref for Settings {
    type Target = TrainConfig;

    fn deref(&self) -> &TrainConfig {
        &self.options
    }
}

/// A value, and why where it was not given.
type Decided<T> = (T, Option<String>);

impl TrainConfig {
    /// Decides what these options leave open.
    ///
    /// # Errors
    /// [`Error::Invalid`] for a micro batch that has no room for the longest prompt with its response.
    pub fn resolve(self, model: &Model, facts: &Facts) -> Result<Settings> {
        let (max_prompt, max_response, mut reasons) = self.lengths(model, facts);
        let (lr, why) = self.learning_rate(model);
        reasons.extend(why);
        let n_layer = model.config().n_layer;
        let internal_steps = self.given_internal_steps();
        let internal_layer = match self.internal_layer {
            Some(LayerChoice::Layer(layer)) => layer,
            Some(LayerChoice::Auto) => Policy::usual_layer(n_layer),
            None => {
                let layer = Policy::usual_layer(n_layer);
                if internal_steps > 0 {
                    let why = format!("three quarters of {n_layer}");
                    reasons.push(format!("--internal-layer {layer}: {why}; auto looks for one"));
                }
                layer
            }
        };
        let longest = facts.longest_row.unwrap_or(max_prompt + max_response);
        let micro_batch_tokens = self.micro_batch_tokens.unwrap_or(MICRO_BATCH_TOKENS.max(longest));
        if micro_batch_tokens < longest && facts.samples {
            return Err(Error::invalid(
                "--micro-batch-tokens",
                format!("at least --max-prompt plus --max-response ({longest})"),
                micro_batch_tokens.to_string(),
                "raise it",
            ));
        }
        Ok(Settings {
            max_prompt,
            max_response,
            lr,
            mini_batch: self.given_mini_batch(),
            micro_batch_tokens,
            kv_mib: self.kv_mib.unwrap_or(KV_MIB),
            threads: self.threads.unwrap_or_else(usable_cores),
            alpha: self.alpha.unwrap_or(2.0 * self.rank as f32),
            internal_layer,
            internal_steps,
            loss: self.given_loss(),
            baseline: self.given_baseline(),
            aggregation: self.given_aggregation(),
            resample: self.given_resample(),
            reasons,
            options: self,
        })
    }

    /// The longest prompt and completion, tokens, with the reasons.
    fn lengths(&self, model: &Model, facts: &Facts) -> (usize, usize, Vec<String>) {
        let context = model.config().n_ctx_train;
        if !facts.samples {
            // Rows say themselves how long they are.
            return (facts.longest_row.unwrap_or(1), 1, Vec::new());
        }
        let (max_prompt, prompt_why) = self.prompt_length(model, facts);
        let room = context.saturating_sub(max_prompt);
        let (max_response, response_why) = self.response_length(model, facts, room);
        let prompt = prompt_why.map(|why| format!("--max-prompt {max_prompt}: {why}"));
        let response = response_why.map(|why| format!("--max-response {max_response}: {why}"));
        (max_prompt, max_response, prompt.into_iter().chain(response).collect())
    }

    fn prompt_length(&self, model: &Model, facts: &Facts) -> Decided<usize> {
        if let Some(given) = self.max_prompt {
            return (given, None);
        }
        let context = model.config().n_ctx_train;
        if model.is_demo() && facts.is_task && !self.dialogues.is_some() {
            return (DEMO_LENGTHS.0, Some(OF_DEMO.into()));
        }
        let Some(longest) = facts.prompts.most() else {
            let guess = 512.min(context / 2);
            return (guess, Some("no prompts were looked at".into()));
        };
        if self.dialogues.is_some() {
            // None of an opening can be left out, and not all of them were looked at.
            let wish = (longest + longest / 4).next_multiple_of(LENGTH_STEP);
            let n = facts.prompts.len();
            let why = format!("a quarter more than the longest of {n} openings ({longest} tokens)");
            return (wish.min(context.saturating_sub(1)), Some(why));
        }
        let usual = facts.prompts.quantile(0.99).unwrap_or(longest);
        let n = facts.prompts.len();
        let (wish, why) = match longest > OUTLIER * usual {
            true => {
                (usual, format!("99 % of {n} prompts are no longer, the longest has {longest}"))
            }
            false => (longest, format!("the longest of {n} prompts has {longest} tokens")),
        };
        let wish = wish.next_multiple_of(LENGTH_STEP);
        match wish > context / 2 {
            true => (context / 2, Some(format!("half of the model's context; {why}"))),
            false => (wish, Some(why)),
        }
    }

    fn response_length(&self, model: &Model, facts: &Facts, room: usize) -> Decided<usize> {
        if let Some(given) = self.max_response {
            return (given, None);
        }
        if self.dialogues.is_some() {
            let turn = self.dialogues.max_turn_tokens.unwrap_or(TURN_TOKENS);
            let wish = turn.saturating_mul(self.dialogues.max_turns);
            let most = facts.room.unwrap_or(usize::MAX).min(room);
            let why = format!(
                "a dialogue after its opening, {} turns of {turn} tokens{}",
                self.dialogues.max_turns,
                if wish > most { ", as far as context and memory reach" } else { "" }
            );
            return (wish.min(most), Some(why));
        }
        if model.is_demo() {
            return (DEMO_LENGTHS.1, Some(OF_DEMO.into()));
        }
        let thinks = model.engine().chat_template().is_some_and(|t| t.contains("<think>"));
        let (wish, why) = match facts.solutions.quantile(0.99) {
            _ if thinks && !facts.is_task => {
                (THOUGHTS, "the chat template has a place for thoughts".to_string())
            }
            Some(bytes) => {
                let tokens = bytes.div_ceil(BYTES_PER_TOKEN);
                let twice = (2 * tokens).next_multiple_of(LENGTH_STEP).max(SHORTEST_RESPONSE);
                (twice, format!("twice what 99 % of the data's solutions take ({bytes} bytes)"))
            }
            None if facts.is_task => (TASK_RESPONSE, "answers of a task are short".into()),
            None => {
                let size = Size::of(model);
                (size.max_response(), format!("the data has no solutions; {}", size.words(model)))
            }
        };
        let mut found = (wish, why);
        if room < found.0 {
            found =
                (room, format!("what --max-prompt leaves of the model's context ({})", found.1));
        }
        match facts.room {
            Some(most) if most < found.0 => {
                (most, Some(format!("what fits into memory, not {} ({})", found.0, found.1)))
            }
            _ => (found.0, Some(found.1)),
        }
    }

    fn learning_rate(&self, model: &Model) -> Decided<f32> {
        if let Some(given) = self.lr {
            return (given, None);
        }
        if model.is_demo() {
            return (DEMO_LR, Some(format!("--lr {DEMO_LR:e}: {OF_DEMO}")));
        }
        let size = Size::of(model);
        let lr = size.lr(self.algo);
        (lr, Some(format!("--lr {lr:e}: {} for {}", self.algo.name(), size.words(model))))
    }
}

impl Settings {
    /// What `config.toml` holds: every option that means something, filled in, so that it says what was done.
    pub fn written(&self) -> TrainConfig {
        let mut all = self.options.clone();
        all.threads = Some(self.threads);
        if all.internal_layer != Some(LayerChoice::Auto) {
            all.internal_layer = Some(LayerChoice::Layer(self.internal_layer));
        }
        all.mini_batch = Some(self.mini_batch);
        all.micro_batch_tokens = Some(self.micro_batch_tokens);
        all.alpha = Some(self.alpha);
        all.lr = Some(self.lr);
        if self.algo.has_internal_phase() {
            all.internal_steps = Some(self.internal_steps);
        }
        if self.algo.is_rewarded() || self.algo == Algorithm::Distill {
            all.max_prompt.get_or_insert(self.max_prompt);
            all.max_response.get_or_insert(self.max_response);
        }
        if !self.algo.is_rewarded() {
            // The rest means nothing to it.
            return all;
        }
        all.kv_mib = Some(self.kv_mib);
        if !self.dialogues.is_some() {
            // An environment's rewards need no rule beside them.
            all.rewards.reward = Some(self.rewards.spec(&self.data));
        }
        all.ratio = Some(self.loss.ratio);
        all.surrogate = Some(self.loss.surrogate);
        (all.clip_low, all.clip_high) = (Some(self.loss.clip_low), Some(self.loss.clip_high));
        all.baseline = Some(self.baseline);
        all.loss_agg = Some(self.aggregation);
        all.resample = Some(self.resample);
        all
    }

    /// Settings of advantage estimation with a value head.
    pub fn gae(&self) -> Gae {
        Gae { gamma: self.gamma, lambda: self.gae_lambda }
    }

    /// Settings of the value head.
    pub fn critic(&self) -> CriticConfig {
        CriticConfig { lr: self.value_lr, beta1: self.beta1, beta2: self.beta2, eps: self.adam_eps }
    }

    /// Settings of the optimiser.
    pub fn adamw(&self) -> AdamWConfig {
        AdamWConfig {
            beta1: self.beta1,
            beta2: self.beta2,
            eps: self.adam_eps,
            weight_decay: self.weight_decay,
            clip_norm: self.clip_norm,
            freeze_layers: self.freeze_layers,
            slow_above: self.internal_layer,
            slow_factor: self.lr_above,
            b_factor: self.loraplus_lr_ratio,
        }
    }

    /// The alpha of a new adapter's file: what the low-rank term is scaled by, times the rank.
    pub fn file_alpha(&self) -> f32 {
        self.alpha * if self.rslora { (self.rank as f32).sqrt() } else { 1.0 }
    }

    /// Completions that are sampled in one go, at most: of a step, or of an evaluation on held-out problems.
    pub fn sequences(&self) -> usize {
        let is_task = source::files(&self.data).is_ok_and(|files| files.is_empty());
        let evaluates = self.algo.is_rewarded() && (self.eval_data.is_some() || is_task);
        let evaluated = if evaluates { self.eval_problems * self.eval_samples } else { 0 };
        evaluated.max(self.prompts_per_step * self.group)
    }

    /// What completions are sampled with.
    pub(super) fn rollouts(&self) -> RolloutOptions {
        let n_ctx_seq = self.max_prompt + self.max_response;
        RolloutOptions { n_ctx_seq, kv_bytes: self.kv_mib << 20 }
    }

    /// Refuses lengths that the model's context has no room for.
    ///
    /// # Errors
    /// [`Error::Invalid`] naming the options.
    pub(super) fn check_context(&self, model: &Model) -> Result<()> {
        let (context, needs) = (model.config().n_ctx_train, self.max_prompt + self.max_response);
        if self.max_response > 0 && needs <= context {
            return Ok(());
        }
        Err(Error::invalid(
            "--max-prompt plus --max-response",
            format!("at most the model's context of {context} tokens, one of them for a response"),
            needs.to_string(),
            "lower one of them",
        ))
    }

    /// Puts the layer that was looked for in the place of `auto`.
    pub(super) fn choose_layer(&mut self, found: Found) {
        self.internal_layer = found.layer;
        self.options.internal_layer = Some(LayerChoice::Layer(found.layer));
        self.options.internal_layer_why = found.why;
    }

    /// Whether completions could be cut shorter to save memory, nobody having said how long they are.
    pub(super) fn may_shorten(&self) -> bool {
        self.options.max_response.is_none() && self.max_response >= 2 * SHORTEST_USEFUL
    }
}
