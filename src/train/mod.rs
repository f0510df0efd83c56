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
//! The parts of a step are a source of groups (`source.rs`: sampled and judged, sampled for a teacher, or rows of files),
//! an objective (`objective.rs`: from scores to a loss and cotangents) and the learner (`learner.rs`: scores, walks back,
//! steps). Whatever the objective, its internal phase computes the layers up to l alone.
//!
//! Departures from the reference code: a LoRA is trained instead of all weights; the forward and the
//! backward of the internal phase stop at layer l (the reference computes all layers); the log-probs
//! of a step's first mini batch are their own `old`, since nothing has changed yet; completions without
//! advantage are not computed, since their gradient is zero.

mod advantage;
mod advice;
mod algorithm;
mod check;
mod checkpoint;
mod collect;
mod config;
mod critic;
mod dialogues;
mod evaluate;
mod facts;
mod layers;
mod learner;
mod loss;
pub mod memory;
mod metadata;
mod micro_batch;
mod noise;
mod objective;
mod optimizer;
mod plan;
mod preference;
mod preset;
mod probe;
mod record;
mod replay;
mod response;
mod resume;
mod row_options;
mod rows;
mod run;
mod run_dir;
mod schedule;
mod settings;
mod source;
mod start;
mod state;
mod tally;
mod teacher;
mod together;

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::Instant;

pub use advantage::{Baseline, Gae, advantages, assign, estimate};
pub use algorithm::{Algorithm, Defaults};
pub use checkpoint::{Checkpoint, Damaged};
pub use collect::{Sample, Verdict};
pub use config::{TrainConfig, TurnCredit};
pub use dialogues::{TalkRecord, Talked};
pub use evaluate::HeldOut;
pub use facts::{Facts, Lengths};
pub use layers::LayerChoice;
pub use loss::{
    Aggregation, LossConfig, Ratio, Surrogate, TokenContext, TokenLoss, response_loss, token_loss,
};
pub use noise::Noise;
pub use objective::{Objective, PolicyGradient};
pub use optimizer::{AdamW, AdamWConfig};
pub use plan::{GpuPlan, Part, Plan};
pub use preference::{KtoConfig, Likelihood, PairConfig, PairLoss, PairOutcome};
pub use preset::{Applied, Preset};
pub use record::{Communication, Phase, RolloutRecord, SampledRecord, StepRecord, Summary};
pub use replay::{Replay, dump_gradients};
pub use response::{Response, ResponseGroup, TurnReturn};
pub use resume::{Change, Effect, Resume};
pub use row_options::{DpoLoss, Reference, RowOptions};
pub use run_dir::{RunConfig, RunDir};
pub use schedule::Schedule;
pub use settings::Settings;
pub use state::State;

use crate::model::{Engine, Lora, Model, Policy};
use crate::rollout::{Encoder, Progress, Rollouts};
use crate::team::Team;
use crate::{Error, Result};
use learner::{Learner, UpdateConfig};
use source::{Source, With};
use tally::Tally;

/// Whoever watches a run. All methods may do nothing.
pub trait Observer {
    /// Sequences done while sampling.
    fn rollout(&mut self, _what: &str, _progress: Progress) {}
    /// Tokens of a step's updates that went through forward and backward, and how many there are in all.
    fn update(&mut self, _tokens: usize, _total: usize) {}
    /// Completions of a step that were judged, before the step is complete.
    fn samples(&mut self, _samples: &[Sample]) {}
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
    settings: Settings,
    learner: Learner<'m>,
    source: Source,
    encoder: Encoder<'m>,
    /// Held-out rows; of sampled completions the source has its problems.
    held_out: Vec<ResponseGroup>,
    /// What it may take of memory.
    plan: Plan,
    /// What is worth saying when a run begins.
    notes: Vec<String>,
    /// What was said on its way.
    advice: advice::Advice,
    /// Where the gradients of the only step go.
    dump: Option<PathBuf>,
    stop: Arc<AtomicBool>,
    /// Who shares the work.
    team: Team,
    /// Go on although processors differ.
    allow_mixed: bool,
    /// Completions of the base model that `--entropy-every` looks at; empty until they are wanted.
    probe_set: Vec<crate::analysis::Sample>,
    /// SHA-256 of the model and of the data; empty until a run begins.
    inputs: BTreeMap<String, String>,
    /// Whether a step has begun to change the adapter and is not complete.
    mid_step: bool,
    counters: Counters,
    /// Accuracy on held-out problems, or loss on held-out rows; NaN before it is measured.
    score_before: f64,
    /// The best score of an evaluation between steps; NaN before there is one.
    best_score: f64,
    /// Evaluations since.
    without_gain: f64,
    /// Of all processes that had a part in the run.
    seconds: f64,
    /// When the run began, in seconds of Unix time: the date that chat templates write, to the end.
    began: f64,
}

/// What a run counts.
#[derive(Clone, Copy, Debug, Default)]
struct Counters {
    steps_done: u64,
    updates: u64,
    skipped: u64,
    skipped_in_row: u64,
    silent_steps: u64,
}

impl Counters {
    fn state<'s>(&'s mut self, state: &mut State<'s>) {
        let Counters { steps_done, updates, skipped, skipped_in_row, silent_steps } = self;
        state.counter("steps_done", steps_done);
        state.counter("updates", updates);
        state.counter("skipped", skipped);
        state.counter("skipped_in_row", skipped_in_row);
        state.counter("silent_steps", silent_steps);
    }
}

impl<'m> Trainer<'m> {
    /// What the trainer carries from one step to the next. Every field is named here, state or not: a new
    /// one does not compile before that is decided.
    pub fn state(&mut self) -> State<'_> {
        let Trainer {
            learner,
            counters,
            score_before,
            best_score,
            without_gain,
            seconds,
            began,
            // Given at the start.
            model: _,
            settings: _,
            encoder: _,
            held_out: _,
            plan: _,
            notes: _,
            // Words alone.
            advice: _,
            dump: _,
            stop: _,
            team: _,
            allow_mixed: _,
            inputs: _,
            // What it gives depends on the step and the settings alone.
            source: _,
            // The same whenever it is sampled.
            probe_set: _,
            // False whenever a checkpoint is written.
            mid_step: _,
        } = self;
        let mut state = State::default();
        learner.state(&mut state);
        counters.state(&mut state);
        state.number("accuracy_before", score_before);
        state.number("best_score", best_score);
        state.number("without_gain", without_gain);
        state.number("seconds", seconds);
        state.number("began_unix_s", began);
        state
    }

    /// What the run does, nothing left open.
    pub fn settings(&self) -> &Settings {
        &self.settings
    }

    /// The adapter.
    pub fn lora(&self) -> &Lora {
        &self.learner.lora
    }

    /// The engine that trains, for its counters.
    pub fn engine(&mut self) -> &mut Engine {
        &mut self.learner.engine
    }

    /// What was planned of memory.
    pub fn plan(&self) -> &Plan {
        &self.plan
    }

    /// What is worth saying before it begins: what was settled and why, what is odd about the data.
    pub fn notes(&self) -> &[String] {
        &self.notes
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
        let with = With {
            settings: &self.settings,
            encoder: &self.encoder,
            stop: &self.stop,
            team: &self.team,
        };
        // Those of an evaluation are none of the step's.
        self.source.rollouts().map(Rollouts::take_timing);
        let mut batch = self.source.collect(with, step, observer)?;
        let rollout_seconds = start.elapsed().as_secs_f32();
        let rollout_timing = self.source.rollouts().map(Rollouts::take_timing).unwrap_or_default();
        self.end_rollouts()?;

        let c = &self.settings;
        let learning_rate = c.lr * c.schedule.factor(step, c.steps, c.warmup);
        let update_start = Instant::now();
        self.learner.engine.take_work();
        let config = self.update_config(phase, policy);
        let mut tally = Tally::default();
        if let Some(nats) = self.learner.prepare(&mut batch.groups, &config)? {
            tally.note("old_from_rollout_nats", nats);
        }
        let scoring_seconds = update_start.elapsed().as_secs_f32();
        self.update(&mut batch.groups, config, learning_rate, &mut tally, observer)?;
        let update_seconds = update_start.elapsed().as_secs_f32();
        self.end_updates()?;
        let ended = self.end_together(step)?;

        let done = record::Done {
            step,
            phase,
            policy,
            batch: &batch,
            tally: &tally,
            learning_rate,
            rollout_seconds,
            rollout_timing,
            scoring_seconds,
            update_seconds: update_seconds - scoring_seconds,
            update_tokens_per_s: ended.backward_tokens as f32 / update_seconds,
            communication: ended.communication,
            seconds: start.elapsed().as_secs_f32(),
        };
        Ok((self.record(done), batch.samples))
    }

    /// Goes on with the work although the processors of the ranks differ in what decides about last bits.
    pub fn allow_mixed(&mut self) {
        self.allow_mixed = true;
    }

    /// On a GPU rollouts and updates have its memory in turn: theirs goes to updates.
    fn end_rollouts(&mut self) -> Result<()> {
        if self.plan.gpu.is_some() {
            self.model.engine().look_at_memory()?;
            if let Some(rollouts) = self.source.rollouts() {
                rollouts.release();
            }
        }
        Ok(())
    }

    /// The same the other way round.
    fn end_updates(&mut self) -> Result<()> {
        if self.plan.gpu.is_some() {
            self.model.engine().look_at_memory()?;
            self.learner.release();
        }
        Ok(())
    }

    /// Which policy a step optimises: the internal one while `step <= internal_steps` (BuPO, and
    /// each objective without rewards).
    fn phase(&self, step: u64) -> Result<(Phase, Policy)> {
        let n_layer = self.model.config().n_layer;
        let c = &self.settings;
        if step <= c.internal_steps {
            let policy = Policy::internal(c.internal_layer, n_layer, c.final_norm)?;
            return Ok((Phase::Internal, policy));
        }
        Ok((Phase::Final, Policy::full(n_layer)))
    }

    /// What holds for all mini batches of a step.
    fn update_config(&self, phase: Phase, policy: Policy) -> UpdateConfig {
        let c = &self.settings;
        UpdateConfig {
            policy,
            objective: Objective::new(c, phase),
            temperature: c.sampling.temperature,
            mini_batch: c.mini_batch,
            micro_batch_tokens: c.micro_batch_tokens,
            replay_routes: c.replay_routes,
            old_from_rollout: c.old_from_rollout && phase == Phase::Final,
            noise: (c.rows.neftune > 0.0).then_some(Noise {
                alpha: c.rows.neftune,
                seed: c.seed,
                update: self.counters.updates + self.counters.skipped,
            }),
        }
    }

    /// All mini batches of a step.
    fn update(
        &mut self,
        groups: &mut [ResponseGroup],
        mut config: UpdateConfig,
        learning_rate: f32,
        tally: &mut Tally,
        observer: &mut dyn Observer,
    ) -> Result<()> {
        let (mut done, total) = (0, self.learner.trained_tokens(groups, &config));
        // From here on the step is completed: a run only stops between steps, where it can go on.
        if self.team.stops(&self.stop)? {
            return Err(Error::Interrupted);
        }
        self.mid_step = true;
        for mini in groups.chunks(config.mini_batch) {
            let mut more = |tokens| {
                done += tokens;
                observer.update(done.min(total), total);
            };
            let applied = self.learner.update(mini, &config, learning_rate, tally, &mut more)?;
            let counters = &mut self.counters;
            counters.updates += applied as u64;
            counters.skipped += !applied as u64;
            counters.skipped_in_row = if applied { 0 } else { counters.skipped_in_row + 1 };
            config.noise.iter_mut().for_each(|noise| noise.update += 1);
        }
        if let Some(path) = self.dump.as_ref().filter(|_| self.team.is_first()) {
            dump_gradients(&self.learner.lora, &self.learner.gradients, path)?;
        }
        Ok(())
    }

    /// Every tensor that the phases reach gets a gradient, and none beyond (see `probe`).
    fn check_gradients(&mut self) -> Result<()> {
        let with = With {
            settings: &self.settings,
            encoder: &self.encoder,
            stop: &self.stop,
            team: &self.team,
        };
        let mut tokens = self.source.prompt(with, 0)?;
        tokens.drain(..tokens.len().saturating_sub(32));
        if tokens.len() < 4 {
            tokens = tokens.repeat(4);
        }
        let mut policies = vec![self.phase(1)?.1, self.phase(self.settings.steps)?.1];
        policies.dedup();
        for policy in policies {
            let learner = &mut self.learner;
            probe::probe(&mut learner.engine, self.model, &mut learner.lora, policy, &tokens)?;
        }
        self.end_updates()
    }
}
