//! Training: BuPO with LoRA on a quantised model (PAPER section 2), and the algorithms it is measured against,
//! each of which can be the objective of both of its phases (`objective.rs`).
//!
//! ```text
//! for step s in 1..=steps
//!     policy := s <= internal_steps ? softmax(H^l E_u^T) : softmax(norm(H^L) E_u^T)      phase
//!     for each prompt: sample a group of completions from the final policy              rollout
//!     R_i := reward(completion_i);  A_i := (R_i - mean R) / (std R + 1e-6)              reward, advantage
//!     old := log-probs of the completions under `policy`, no gradient
//!     for each mini batch of prompts
//!         new := log-probs under `policy`                                               forward to layer l or L
//!         L := mean over tokens of the clipped loss of exp(new - old) and A             loss
//!         adapter := AdamW(adapter, dL / d adapter), layers up to l or L                vjp, step
//! ```
//!
//! Departures from the reference code: a LoRA is trained instead of all weights; the forward and the
//! backward of the internal phase stop at layer l (the reference computes all layers); the log-probs
//! of a step's first mini batch are their own `old`, since nothing has changed yet; completions without
//! advantage are not computed, since their gradient is zero.

mod advantage;
mod checkpoint;
mod collect;
mod config;
mod critic;
mod evaluate;
mod layers;
mod loss;
pub mod memory;
mod micro_batch;
mod objective;
mod optimizer;
mod plan;
mod preset;
mod probe;
mod record;
mod replay;
mod resume;
mod run;
mod run_dir;
mod schedule;
mod state;
mod update;
mod vram;

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

pub use advantage::{Baseline, Gae, advantages, assign, estimate};
pub use checkpoint::{Checkpoint, Damaged};
pub use collect::Sample;
pub use config::TrainConfig;
pub use layers::LayerChoice;
pub use loss::{
    Aggregation, LossConfig, Ratio, Surrogate, TokenContext, TokenLoss, response_loss, token_loss,
};
pub use objective::{Algorithm, Defaults};
pub use optimizer::{AdamW, AdamWConfig};
pub use plan::{Part, Plan};
pub use preset::{Applied, Preset};
pub use record::{Phase, StepRecord, Summary};
pub use replay::{Replay, dump_gradients};
pub use resume::{Change, Effect, Resume};
pub use run_dir::{RunConfig, RunDir};
pub use schedule::Schedule;
pub use state::State;
pub use update::{Response, ResponseGroup};
pub use vram::GpuPlan;

use crate::data::{Problem, ProblemSource};
use crate::ggml::{TensorSet, ThreadPool};
use crate::model::{Engine, Lora, Model, Policy};
use crate::reward::JudgePool;
use crate::rollout::{Encoder, Progress, RolloutOptions, Rollouts};
use crate::{Error, Result};
use critic::Critic;
use update::{Learner, Tally, UpdateConfig};

/// Whoever watches a run. All methods may do nothing.
pub trait Observer {
    /// Sequences done while sampling.
    fn rollout(&mut self, _what: &str, _progress: Progress) {}
    /// Mini batches done of a step.
    fn update(&mut self, _done: usize, _total: usize) {}
    /// A step is complete.
    fn step(&mut self, _record: &StepRecord) {}
    /// A word on what happens or what is odd.
    fn note(&mut self, _text: &str) {}
}

/// An observer that looks away.
pub struct Silent;

impl Observer for Silent {}

/// Everything a run needs; [`Trainer::run`] is the run.
pub struct Trainer<'m> {
    model: &'m Model,
    config: TrainConfig,
    lora: Lora,
    optimizer: AdamW,
    gradients: TensorSet,
    engine: Engine,
    rollouts: Rollouts,
    encoder: Encoder<'m>,
    problems: ProblemSource,
    held_out: Vec<Problem>,
    judges: JudgePool,
    critic: Option<Critic>,
    /// On a GPU.
    gpu: Option<GpuPlan>,
    stop: Arc<AtomicBool>,
    /// Completions of the base model that `--entropy-every` looks at; empty until they are wanted.
    probe_set: Vec<crate::analysis::Sample>,
    /// SHA-256 of the model and of the data; empty until a run begins.
    inputs: BTreeMap<String, String>,
    /// Whether a step has begun to change the adapter and is not complete.
    mid_step: bool,
    steps_done: u64,
    updates: u64,
    skipped: u64,
    skipped_in_row: u64,
    silent_steps: u64,
    /// NaN before it is measured.
    accuracy_before: f64,
    /// Of all processes that had a part in the run.
    seconds: f64,
    /// When the run began, in seconds of Unix time: the date that chat templates write, to the end.
    began: f64,
}

/// The critic of a run that has one: a value head at the internal layer, and one at the last.
fn new_critic(config: &TrainConfig, model: &Model) -> Result<Option<Critic>> {
    let (n_layer, d) = (model.config().n_layer, model.config().n_embd);
    match config.baseline() {
        Baseline::Value => {
            let depths = [config.internal_layer(n_layer), n_layer];
            Critic::new(&depths, d, config.critic()).map(Some)
        }
        _ => Ok(None),
    }
}

impl<'m> Trainer<'m> {
    /// Checks the settings, reads the data, makes or loads the adapter and the rollout engine.
    ///
    /// # Errors
    /// A setting, the data or the adapter does not fit, or memory is short.
    pub fn new(model: &'m Model, config: TrainConfig) -> Result<Trainer<'m>> {
        let adapter = config.adapter.clone();
        Trainer::with_adapter(model, config, adapter.as_deref())
    }

    /// [`Trainer::new`] with another adapter to begin from than the one in the settings.
    fn with_adapter(
        model: &'m Model,
        config: TrainConfig,
        adapter: Option<&Path>,
    ) -> Result<Trainer<'m>> {
        config.check()?;
        vram::wants_a_gpu(config.vram, model.device())?;
        let n_layer = model.config().n_layer;
        let gpu = GpuPlan::new(model, &config)?;
        let mut config = config;
        if let Some(plan) = &gpu {
            plan.apply(&mut config);
        }
        let mut config = config.resolved(n_layer);
        Policy::internal(config.internal_layer(n_layer), n_layer, config.final_norm)?;
        let reaches = match config.algo {
            Algorithm::Bupo if config.internal_steps > 0 => config.internal_layer(n_layer),
            _ => n_layer,
        };
        if config.freeze_layers >= reaches {
            return Err(Error::invalid(
                "--freeze-layers",
                format!("below {reaches}, the lowest layer whose policy is optimised"),
                config.freeze_layers.to_string(),
                "nothing would be learnt; lower it",
            ));
        }
        let needs = config.max_prompt + config.max_response;
        // As llama.cpp sizes the contexts of rollouts.
        model.set_context(needs.next_multiple_of(256));
        if needs > model.config().n_ctx_train {
            return Err(Error::invalid(
                "--max-prompt plus --max-response",
                format!("at most the model's context of {} tokens", model.config().n_ctx_train),
                needs.to_string(),
                "lower one of them",
            ));
        }
        let mut problems = ProblemSource::with(&config.data, config.source())?;
        let held_out = evaluate::held_out(&config, &problems)?;
        let judges = config.rewards.judges(&config.data, config.max_response)?;
        let encoder = config.prompts.encoder(model)?;
        if config.drop_long_prompts {
            problems.retain(|p| encoder.fits(&p.prompt, config.max_prompt))?;
        }
        let began = crate::data::chat::unix_now_s() as f64;
        encoder.set_now(began as i64);
        let mut lora = match adapter {
            Some(path) => {
                let lora = Lora::load(model, path)?;
                if lora.frozen().len() == lora.slots().len() {
                    let expected = "a pair on a map of attention or FFN";
                    let advice = "nothing of it would be trained: train a new adapter";
                    let got = lora.frozen().join(", ");
                    return Err(Error::invalid(path.display().to_string(), expected, got, advice));
                }
                (config.rank, config.alpha) = (lora.rank(), Some(lora.alpha()));
                config.targets = lora.targets();
                lora
            }
            None => Lora::new(model, &config.targets, config.rank, config.alpha(), config.seed)?,
        };
        // Before anything that a plan counts is taken.
        let kept_bytes = match &gpu {
            Some(plan) => plan.kept_bytes as usize,
            None => Plan::new(model, &config)?.kept_bytes(),
        };
        let pool = Arc::new(ThreadPool::with(config.threads)?);
        let wanted = config.prompts_per_step * config.group;
        let options = RolloutOptions { n_ctx_seq: needs, kv_bytes: config.kv_mib() << 20 }
            .at_most(wanted.max(held_out.len() * config.eval_samples), model.engine())?;
        let mut rollouts = Rollouts::new(model.engine(), &pool, options)?;
        rollouts.set_adapter(Some(lora.live(model)?))?;
        let mut engine = Engine::on(model.device(), pool)?;
        engine.keep_up_to(kept_bytes);
        let critic = new_critic(&config, model)?;
        let mut trainer = Trainer {
            optimizer: AdamW::new(&lora, n_layer, config.adamw(n_layer))?,
            gradients: lora.zeros_like()?,
            engine,
            stop: Arc::default(),
            model,
            config,
            lora,
            rollouts,
            encoder,
            problems,
            held_out,
            judges,
            critic,
            gpu,
            inputs: BTreeMap::new(),
            mid_step: false,
            steps_done: 0,
            updates: 0,
            skipped: 0,
            skipped_in_row: 0,
            silent_steps: 0,
            accuracy_before: f64::NAN,
            seconds: 0.0,
            began,
            probe_set: Vec::new(),
        };
        if trainer.choose_layer()? {
            // These depend on the layer.
            let config = &trainer.config;
            trainer.optimizer = AdamW::new(&trainer.lora, n_layer, config.adamw(n_layer))?;
            trainer.critic = new_critic(config, model)?;
        }
        Ok(trainer)
    }

    /// What the trainer carries from one step to the next. Every field is named here, state or not: a new
    /// one does not compile before that is decided.
    pub fn state(&mut self) -> State<'_> {
        let Trainer {
            lora,
            optimizer,
            steps_done,
            updates,
            skipped,
            skipped_in_row,
            silent_steps,
            accuracy_before,
            seconds,
            began,
            critic,
            // Given at the start.
            model: _,
            config: _,
            encoder: _,
            problems: _,
            held_out: _,
            judges: _,
            gpu: _,
            stop: _,
            inputs: _,
            // Cleared or filled anew by every update, rollout or forward.
            gradients: _,
            engine: _,
            rollouts: _,
            // The same whenever it is sampled.
            probe_set: _,
            // False whenever a checkpoint is written.
            mid_step: _,
        } = self;
        let mut state = State::default();
        state.tensors("adapter", lora.tensors_mut());
        optimizer.state(&mut state);
        if let Some(critic) = critic {
            critic.state(&mut state);
        }
        state.counter("steps_done", steps_done);
        state.counter("updates", updates);
        state.counter("skipped", skipped);
        state.counter("skipped_in_row", skipped_in_row);
        state.counter("silent_steps", silent_steps);
        state.number("accuracy_before", accuracy_before);
        state.number("seconds", seconds);
        state.number("began_unix_s", began);
        state
    }

    /// Settings with every default filled in.
    pub fn config(&self) -> &TrainConfig {
        &self.config
    }

    /// The adapter.
    pub fn lora(&self) -> &Lora {
        &self.lora
    }

    /// The engine that trains, for its counters.
    pub fn engine(&mut self) -> &mut Engine {
        &mut self.engine
    }

    /// Set it to true and the run ends after what it is writing.
    pub fn stop_flag(&self) -> Arc<AtomicBool> {
        self.stop.clone()
    }

    /// One step of the algorithm.
    pub fn step(
        &mut self,
        step: u64,
        observer: &mut dyn Observer,
    ) -> Result<(StepRecord, Vec<Sample>)> {
        let start = Instant::now();
        let (phase, policy) = self.phase(step)?;
        let (mut groups, samples) = self.collect(step, observer)?;
        let rollout_seconds = start.elapsed().as_secs_f32();
        let sampled: usize = samples.iter().map(|s| s.tokens).sum();
        self.end_rollouts()?;

        let learning_rate = self.config.lr
            * self.config.schedule.factor(step, self.config.steps, self.config.warmup);
        let update_start = Instant::now();
        self.engine.take_work();
        let tally = self.update(&mut groups, phase, policy, learning_rate, observer)?;
        let work = self.engine.take_work();
        let update_seconds = update_start.elapsed().as_secs_f32();
        self.end_updates()?;

        let mean =
            |f: &dyn Fn(&Sample) -> f32| samples.iter().map(f).sum::<f32>() / samples.len() as f32;
        let per_token = |sum: f64| (tally.tokens > 0).then(|| (sum / tally.tokens as f64) as f32);
        let per_update =
            |sum: f64| (tally.updates > 0).then(|| (sum / tally.updates as f64) as f32);
        let with_signal = groups.iter().filter(|g| g.responses.iter().any(Response::has_signal));
        let record = StepRecord {
            step,
            phase,
            layer: policy.depth(),
            reward: mean(&|s| s.reward),
            reward_parts: self.mean_parts(&samples),
            groups_with_signal: with_signal.count() as f32 / groups.len() as f32,
            groups_dropped: samples.iter().filter(|s| s.dropped).count() / self.config.group,
            response_tokens: mean(&|s| s.tokens as f32),
            truncated: mean(&|s| s.truncated as u8 as f32),
            entropy_nats: per_token(tally.entropy),
            loss: per_update(tally.loss),
            clip_fraction: per_token(tally.clipped as f64),
            gradient_norm: per_update(tally.gradient_norm),
            drift_nats: if phase == Phase::Final { per_token(tally.drift) } else { None },
            kl_nats: if self.config.kl_coef > 0.0 { per_token(tally.kl) } else { None },
            value_loss: self.critic.is_some().then(|| per_update(tally.value_loss)).flatten(),
            explained_variance: critic::explained_variance(&groups),
            learning_rate,
            updates: self.updates,
            updates_skipped: self.skipped,
            rollout_tokens_per_s: sampled as f32 / rollout_seconds,
            update_tokens_per_s: work.backward_tokens as f32 / update_seconds,
            seconds: start.elapsed().as_secs_f32(),
            accuracy: None,
            evaluation: None,
            probe: None,
        };
        Ok((record, samples))
    }

    /// On a GPU rollouts and updates have its memory in turn: theirs goes to updates.
    fn end_rollouts(&mut self) -> Result<()> {
        if self.gpu.is_some() {
            self.model.engine().look_at_memory()?;
            self.rollouts.release();
        }
        Ok(())
    }

    /// The same the other way round.
    fn end_updates(&mut self) -> Result<()> {
        if self.gpu.is_some() {
            self.model.engine().look_at_memory()?;
            self.engine.release();
        }
        Ok(())
    }

    /// Which policy a step optimises: the internal one while `step <= internal_steps` (BuPO).
    fn phase(&self, step: u64) -> Result<(Phase, Policy)> {
        let n_layer = self.model.config().n_layer;
        let c = &self.config;
        if c.algo == Algorithm::Bupo && step <= c.internal_steps {
            let policy = Policy::internal(c.internal_layer(n_layer), n_layer, c.final_norm)?;
            return Ok((Phase::Internal, policy));
        }
        Ok((Phase::Final, Policy::full(n_layer)))
    }

    /// What holds for all mini batches of a step.
    fn update_config(&self, phase: Phase, policy: Policy) -> UpdateConfig {
        let c = &self.config;
        UpdateConfig {
            policy,
            temperature: c.sampling.temperature,
            loss: c.loss(),
            aggregation: c.aggregation(),
            max_response: c.max_response,
            // Rollouts are the final policy's: their log-probs say nothing of an internal one.
            tis_cap: if phase == Phase::Final { c.tis_cap } else { 0.0 },
            micro_batch_tokens: c.micro_batch_tokens(),
        }
    }

    /// All mini batches of a step.
    fn update(
        &mut self,
        groups: &mut [ResponseGroup],
        phase: Phase,
        policy: Policy,
        learning_rate: f32,
        observer: &mut dyn Observer,
    ) -> Result<Tally> {
        let config = self.update_config(phase, policy);
        let mini_batch = self.config.mini_batch();
        let mut learner = Learner {
            model: self.model,
            lora: &mut self.lora,
            engine: &mut self.engine,
            gradients: &mut self.gradients,
            optimizer: &mut self.optimizer,
            critic: self.critic.as_mut(),
        };
        let (baseline, gae) = (self.config.baseline(), self.config.gae());
        if learner.critic.is_some() {
            learner.fill_old(groups, &config)?;
            assign(groups, baseline, gae);
        } else {
            assign(groups, baseline, gae);
            // Before the first update the policy is the one that `old` means, so the first mini batch
            // needs no pass of its own for it.
            let first = mini_batch.min(groups.len());
            learner.fill_old(&mut groups[first..], &config)?;
        }
        if config.loss.kl_coef > 0.0 {
            learner.fill_base(groups, &config)?;
        }
        let mut tally = Tally::default();
        let total = groups.len().div_ceil(mini_batch);
        // From here on the step is completed: a run only stops between steps, where it can go on.
        if self.stop.load(Ordering::Relaxed) {
            return Err(Error::Interrupted);
        }
        self.mid_step = true;
        for (i, mini) in groups.chunks(mini_batch).enumerate() {
            let applied = learner.update(mini, &config, learning_rate, &mut tally)?;
            self.updates += applied as u64;
            self.skipped += !applied as u64;
            self.skipped_in_row = if applied { 0 } else { self.skipped_in_row + 1 };
            observer.update(i + 1, total);
        }
        Ok(tally)
    }

    /// Every tensor that the phases reach gets a gradient, and none beyond (see `probe`).
    fn check_gradients(&mut self) -> Result<()> {
        let mut tokens = self.encoder.prompt(&self.problems.problem(0).prompt, 32)?;
        if tokens.len() < 4 {
            tokens = tokens.repeat(4);
        }
        let mut policies = vec![self.phase(1)?.1, self.phase(self.config.steps)?.1];
        policies.dedup();
        for policy in policies {
            probe::probe(&mut self.engine, self.model, &mut self.lora, policy, &tokens)?;
        }
        self.end_updates()
    }
}
