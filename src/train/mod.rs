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
mod collect;
mod config;
mod critic;
mod evaluate;
mod loss;
mod micro_batch;
mod objective;
mod optimizer;
mod probe;
mod record;
mod replay;
mod schedule;
mod update;

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

pub use advantage::{Baseline, Gae, advantages, assign, estimate};
pub use collect::Sample;
pub use config::TrainConfig;
pub use loss::{
    Aggregation, LossConfig, Ratio, Surrogate, TokenContext, TokenLoss, response_loss, token_loss,
};
pub use objective::{Algorithm, Defaults};
pub use optimizer::{AdamW, AdamWConfig};
pub use record::{Phase, StepRecord, Summary};
pub use replay::{Replay, dump_gradients};
pub use schedule::Schedule;
pub use update::{Response, ResponseGroup};

use crate::data::{Problem, ProblemSource, Template};
use crate::ggml::{TensorSet, ThreadPool};
use crate::gguf::Value;
use crate::model::{Engine, Lora, Model, Policy};
use crate::reward::{Judge, JudgePool};
use crate::rollout::{Encoder, Progress, RolloutOptions, Rollouts};
use crate::{Error, Result};
use critic::Critic;
use record::RunDir;
use update::{Learner, Tally, UpdateConfig};

/// Updates in a row whose gradient is not finite before a run gives up.
const SKIPS_MAX: u64 = 10;
/// Steps in a row without a group whose rewards differ before a run gives up.
const SILENT_STEPS_MAX: u64 = 20;

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
    stop: Arc<AtomicBool>,
    updates: u64,
    skipped: u64,
    skipped_in_row: u64,
    silent_steps: u64,
}

impl<'m> Trainer<'m> {
    /// Checks the settings, reads the data, makes or loads the adapter and the rollout engine.
    ///
    /// # Errors
    /// A setting, the data or the adapter does not fit, or memory is short.
    pub fn new(model: &'m Model, config: TrainConfig) -> Result<Trainer<'m>> {
        config.check()?;
        let n_layer = model.config().n_layer;
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
        let judge = Judge::parse(&config.reward, config.judging())?;
        let encoder = Encoder::new(model, config.tokenizer.as_deref(), config.system.clone())?
            .with_template(&Template::parse(&config.template)?)?;
        if config.drop_long_prompts {
            problems.retain(|p| encoder.fits(&p.prompt, config.max_prompt))?;
        }
        let mut lora = match &config.adapter {
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
        let depths = [config.internal_layer(n_layer), n_layer];
        let critic = match config.baseline() {
            Baseline::Value => Some(Critic::new(&depths, model.config().n_embd, config.critic())?),
            _ => None,
        };
        let judges = JudgePool::new(judge, config.reward_workers)?;
        Ok(Trainer {
            optimizer: AdamW::new(&lora, n_layer, config.adamw(n_layer))?,
            gradients: lora.zeros_like()?,
            engine: Engine::new(pool)?,
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
            updates: 0,
            skipped: 0,
            skipped_in_row: 0,
            silent_steps: 0,
        })
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

    /// The whole run: evaluation, steps, evaluation; everything is written to `dir`.
    ///
    /// # Errors
    /// The folder is not empty, a file cannot be written, or training cannot learn.
    pub fn run(&mut self, dir: &Path, observer: &mut dyn Observer) -> Result<Summary> {
        let start = Instant::now();
        RunDir::check(dir)?;
        self.check_gradients()?;
        let mut dir = RunDir::create(dir, self.model.name(), &self.config)?;
        let mut summary = Summary {
            accuracy_before: None,
            accuracy_after: None,
            steps: 0,
            seconds: 0.0,
            interrupted: false,
            adapter: dir.adapter(),
        };
        let outcome = self.run_steps(&mut dir, &mut summary, observer);
        // Whatever ended the run, the newest adapter is kept.
        self.save(&dir.adapter(), summary.steps)?;
        dir.flush()?;
        match outcome {
            Err(Error::Interrupted) => summary.interrupted = true,
            other => other?,
        }
        summary.seconds = start.elapsed().as_secs_f64();
        Ok(summary)
    }

    fn run_steps(
        &mut self,
        dir: &mut RunDir,
        summary: &mut Summary,
        observer: &mut dyn Observer,
    ) -> Result<()> {
        summary.accuracy_before = self.accuracy("before", observer)?;
        observer.note(&match summary.accuracy_before {
            Some(a) => {
                format!("accuracy before: {a:.3} on {} held-out problems", self.held_out.len())
            }
            None => "no held-out problems: give some with --eval-data to see the accuracy".into(),
        });
        for step in 1..=self.config.steps {
            let (mut record, samples) = self.step(step, observer)?;
            if self.config.eval_every > 0 && step % self.config.eval_every == 0 {
                record.accuracy = self.accuracy("held-out", observer)?;
            }
            dir.metrics(&record)?;
            for sample in &samples {
                dir.completion(sample)?;
            }
            dir.flush()?;
            summary.steps = step;
            if self.config.checkpoint_every > 0 && step % self.config.checkpoint_every == 0 {
                self.save(&dir.adapter(), step)?;
            }
            observer.step(&record);
            self.give_up_if_hopeless(&record)?;
        }
        summary.accuracy_after = self.accuracy("after", observer)?;
        Ok(())
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

    /// What holds for all mini batches of a step.
    fn update_config(&self, phase: Phase, policy: Policy) -> UpdateConfig {
        let c = &self.config;
        UpdateConfig {
            policy,
            temperature: c.temperature,
            loss: c.loss(),
            aggregation: c.aggregation(),
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
        for (i, mini) in groups.chunks(mini_batch).enumerate() {
            if self.stop.load(Ordering::Relaxed) {
                return Err(Error::Interrupted);
            }
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

    fn give_up_if_hopeless(&mut self, record: &StepRecord) -> Result<()> {
        self.silent_steps = if record.groups_with_signal > 0.0 { 0 } else { self.silent_steps + 1 };
        if self.skipped_in_row >= SKIPS_MAX {
            return Err(Error::engine(
                format!("training at step {}", record.step),
                format!("{SKIPS_MAX} updates in a row had a gradient that is not finite"),
                "lower --lr, or check the model file",
            ));
        }
        if self.silent_steps >= SILENT_STEPS_MAX && record.reward < 1.0 {
            return Err(Error::engine(
                format!("training at step {}", record.step),
                format!(
                    "in {SILENT_STEPS_MAX} steps all completions of each prompt had equal rewards (mean {})",
                    record.reward
                ),
                "nothing can be learnt from that: use easier problems, a larger --group, or look at completions.jsonl",
            ));
        }
        Ok(())
    }

    /// Writes `adapter.gguf` into a new folder.
    pub fn save_to(&self, folder: &Path) -> Result<()> {
        RunDir::check(folder)?;
        std::fs::create_dir_all(folder).map_err(Error::io("create", folder))?;
        self.save(&folder.join("adapter.gguf"), 1)
    }

    /// Writes the adapter with what made it in its metadata.
    fn save(&self, path: &Path, step: u64) -> Result<()> {
        let c = &self.config;
        let text = |s: &str| Value::String(s.into());
        let extra = vec![
            ("bupo.algorithm".into(), text(&c.algo.name())),
            ("bupo.base".into(), text(self.model.name())),
            ("bupo.internal_layer".into(), Value::U32(c.internal_layer.unwrap_or(0) as u32)),
            ("bupo.internal_steps".into(), Value::U64(c.internal_steps)),
            ("bupo.steps".into(), Value::U64(step)),
            ("bupo.seed".into(), Value::U64(c.seed)),
        ];
        self.lora.save(self.model, path, extra)
    }
}
