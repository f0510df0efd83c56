//! Training: BuPO and GRPO with LoRA on a quantised model (PAPER section 2).
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
mod config;
mod evaluate;
mod loss;
mod micro_batch;
mod optimizer;
pub mod plan;
mod probe;
mod record;
mod replay;
mod resume;
mod run;
mod run_dir;
mod schedule;
mod state;
mod update;

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

pub use advantage::{Baseline, advantages};
pub use checkpoint::{Checkpoint, Damaged};
pub use config::{Algorithm, TrainConfig};
pub use loss::{Aggregation, LossConfig, TokenContext, TokenLoss, token_loss};
pub use optimizer::{AdamW, AdamWConfig};
pub use record::{Phase, StepRecord, Summary};
pub use replay::{Replay, dump_gradients};
pub use resume::{Change, Effect, Resume};
pub use run_dir::{RunConfig, RunDir};
pub use schedule::Schedule;
pub use state::State;

use crate::data::{Problem, ProblemSource};
use crate::ggml::{TensorSet, ThreadPool};
use crate::model::{Engine, Lora, Model, Policy};
use crate::reward::Reward;
use crate::rollout::{Encoder, Finish, Progress, Request, RolloutOptions, Rollouts};
use crate::{Error, Result};
use update::{Learner, Response, ResponseGroup, Tally, UpdateConfig};

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
    reward: Reward,
    stop: Arc<AtomicBool>,
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
        let n_layer = model.config().n_layer;
        let mut config = config.resolved(n_layer);
        Policy::internal(config.internal_layer(n_layer), n_layer, config.final_norm)?;
        let needs = config.max_prompt + config.max_response;
        if needs > model.config().n_ctx_train {
            return Err(Error::invalid(
                "--max-prompt plus --max-response",
                format!("at most the model's context of {} tokens", model.config().n_ctx_train),
                needs.to_string(),
                "lower one of them",
            ));
        }
        let problems = ProblemSource::open(&config.data, config.seed)?;
        let held_out = evaluate::held_out(&config, &problems)?;
        let reward = Reward::parse(&config.reward)?;
        let encoder = Encoder::new(model, config.tokenizer.as_deref(), config.system.clone())?;
        let mut lora = match adapter {
            Some(path) => {
                let lora = Lora::load(model, path)?;
                (config.rank, config.alpha) = (lora.rank(), Some(lora.alpha()));
                config.targets = lora.targets();
                lora
            }
            None => Lora::new(model, &config.targets, config.rank, config.alpha(), config.seed)?,
        };
        let pool = Arc::new(ThreadPool::with(config.threads)?);
        let options = RolloutOptions { n_ctx_seq: needs, kv_bytes: config.kv_mib << 20 };
        let mut rollouts = Rollouts::new(model.engine(), &pool, options)?;
        rollouts.set_adapter(Some(lora.live(model)?))?;
        let mut engine = Engine::new(pool)?;
        engine.keep_up_to(match config.memory {
            Some(mib) => mib << 20,
            None => plan::available_bytes() as usize / 2,
        });
        Ok(Trainer {
            optimizer: AdamW::new(&lora, n_layer, config.adamw())?,
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
            reward,
            inputs: BTreeMap::new(),
            mid_step: false,
            steps_done: 0,
            updates: 0,
            skipped: 0,
            skipped_in_row: 0,
            silent_steps: 0,
            accuracy_before: f64::NAN,
            seconds: 0.0,
        })
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
            // Given at the start.
            model: _,
            config: _,
            encoder: _,
            problems: _,
            held_out: _,
            reward: _,
            stop: _,
            inputs: _,
            // Cleared or filled anew by every update, rollout or forward.
            gradients: _,
            engine: _,
            rollouts: _,
            // False whenever a checkpoint is written.
            mid_step: _,
        } = self;
        let mut state = State::default();
        state.tensors("adapter", lora.tensors_mut());
        optimizer.state(&mut state);
        state.counter("steps_done", steps_done);
        state.counter("updates", updates);
        state.counter("skipped", skipped);
        state.counter("skipped_in_row", skipped_in_row);
        state.counter("silent_steps", silent_steps);
        state.number("accuracy_before", accuracy_before);
        state.number("seconds", seconds);
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
        let problems = self.batch(step);
        let (mut groups, samples) = self.rollout(step, &problems, observer)?;
        let rollout_seconds = start.elapsed().as_secs_f32();
        let sampled: usize = samples.iter().map(|s| s.tokens).sum();

        for group in &mut groups {
            let rewards: Vec<f32> = group.responses.iter().map(|r| r.reward).collect();
            let advantages = advantages(&rewards, self.config.baseline);
            for (response, advantage) in group.responses.iter_mut().zip(advantages) {
                response.advantage = advantage;
            }
        }
        let learning_rate = self.config.lr
            * self.config.schedule.factor(step, self.config.steps, self.config.warmup);
        let update_start = Instant::now();
        self.engine.take_work();
        let tally = self.update(&mut groups, phase, policy, learning_rate, observer)?;
        let work = self.engine.take_work();
        let update_seconds = update_start.elapsed().as_secs_f32();

        let mean =
            |f: &dyn Fn(&Sample) -> f32| samples.iter().map(f).sum::<f32>() / samples.len() as f32;
        let per_token = |sum: f64| (tally.tokens > 0).then(|| (sum / tally.tokens as f64) as f32);
        let per_update =
            |sum: f64| (tally.updates > 0).then(|| (sum / tally.updates as f64) as f32);
        let with_signal = groups.iter().filter(|g| g.responses.iter().any(|r| r.advantage != 0.0));
        let record = StepRecord {
            step,
            phase,
            layer: policy.depth(),
            reward: mean(&|s| s.reward),
            groups_with_signal: with_signal.count() as f32 / groups.len() as f32,
            response_tokens: mean(&|s| s.tokens as f32),
            truncated: mean(&|s| s.truncated as u8 as f32),
            entropy_nats: per_token(tally.entropy),
            loss: per_update(tally.loss),
            clip_fraction: per_token(tally.clipped as f64),
            gradient_norm: per_update(tally.gradient_norm),
            drift_nats: if phase == Phase::Final { per_token(tally.drift) } else { None },
            kl_nats: if self.config.kl_coef > 0.0 { per_token(tally.kl) } else { None },
            learning_rate,
            updates: self.updates,
            updates_skipped: self.skipped,
            rollout_tokens_per_s: sampled as f32 / rollout_seconds,
            update_tokens_per_s: work.backward_tokens as f32 / update_seconds,
            seconds: start.elapsed().as_secs_f32(),
            accuracy: None,
        };
        Ok((record, samples))
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

    fn batch(&self, step: u64) -> Vec<Problem> {
        let n = self.config.prompts_per_step as u64;
        ((step - 1) * n..step * n).map(|index| self.problems.problem(index)).collect()
    }

    /// Samples a group for each problem from the final policy, and rewards it.
    fn rollout(
        &mut self,
        step: u64,
        problems: &[Problem],
        observer: &mut dyn Observer,
    ) -> Result<(Vec<ResponseGroup>, Vec<Sample>)> {
        let c = &self.config;
        let mut requests = Vec::with_capacity(problems.len());
        for (i, problem) in problems.iter().enumerate() {
            requests.push(Request {
                prompt_tokens: self.encoder.prompt(&problem.prompt, c.max_prompt)?,
                n: c.group,
                seed_stream: (step - 1) * problems.len() as u64 + i as u64,
                max_tokens: c.max_response,
            });
        }
        let sampled = self.rollouts.generate(
            &requests,
            &c.sampling(),
            c.seed,
            &mut |progress| observer.rollout("rollout", progress),
            &self.stop,
        )?;
        let mut groups = Vec::with_capacity(problems.len());
        let mut samples = Vec::with_capacity(problems.len() * c.group);
        for ((problem, request), completions) in problems.iter().zip(requests).zip(sampled) {
            let mut responses = Vec::with_capacity(completions.len());
            for completion in completions {
                let text = self.encoder.text(&completion.tokens);
                let verdict = self.reward.score(problem, &text)?;
                samples.push(Sample {
                    step,
                    problem: problem.id.clone(),
                    answer: problem.answer.clone(),
                    reward: verdict.reward,
                    reason: verdict.reason,
                    tokens: completion.tokens.len(),
                    truncated: completion.finish == Finish::Length,
                    completion: text,
                });
                responses.push(Response {
                    tokens: completion.tokens,
                    rollout: completion.logprobs,
                    reward: verdict.reward,
                    ..Response::default()
                });
            }
            groups.push(ResponseGroup { prompt: request.prompt_tokens, responses });
        }
        Ok((groups, samples))
    }

    /// What holds for all mini batches of a step.
    fn update_config(&self, phase: Phase, policy: Policy) -> UpdateConfig {
        let c = &self.config;
        UpdateConfig {
            policy,
            temperature: c.temperature,
            loss: c.loss(),
            aggregation: c.loss_agg,
            max_response: c.max_response,
            // Rollouts are the final policy's: their log-probs say nothing of an internal one.
            tis_cap: if phase == Phase::Final { c.tis_cap } else { 0.0 },
            micro_batch_tokens: c.micro_batch_tokens,
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
        };
        // Before the first update the policy is the one that `old` means, so the first mini batch
        // needs no pass of its own for it.
        let first = mini_batch.min(groups.len());
        learner.fill_old(&mut groups[first..], &config)?;
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
        Ok(())
    }
}

/// One line of `completions.jsonl`.
#[derive(Clone, Debug, serde::Serialize)]
pub struct Sample {
    /// Step.
    pub step: u64,
    /// Which problem.
    pub problem: String,
    /// The right answer.
    pub answer: String,
    /// Reward.
    pub reward: f32,
    /// Why.
    pub reason: String,
    /// Length.
    pub tokens: usize,
    /// Whether it hit the length limit.
    pub truncated: bool,
    /// Text, control tokens left out.
    pub completion: String,
}
