//! From settings to a trainer: what is read, planned and made before the first step.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use super::collect::Judged;
use super::critic::Critic;
use super::layers::LayerChoice;
use super::learner::Learner;
use super::plan::{Plan, Workload};
use super::row_options::refuse_sampling;
use super::rows::{Reader, Rows};
use super::source::{Prompts, Sampled, Source};
use super::teacher::{Teacher, TeacherModel, refuse_head};
use super::{
    AdamW, Algorithm, Baseline, Counters, GpuPlan, Reference, ResponseGroup, State, TrainConfig,
    Trainer, evaluate, vram,
};
use crate::data::{Problem, ProblemSource};
use crate::ggml::ThreadPool;
use crate::model::{Engine, Lora, Model, Policy};
use crate::reward::JudgePool;
use crate::rollout::{Encoder, RolloutOptions, Rollouts};
use crate::{Error, Result};

/// What is read of the data, before memory is planned for it.
enum Read {
    /// Problems to be answered, held-out ones, and what judges the answers.
    Problems(ProblemSource, Vec<Problem>, JudgePool),
    /// Prompts of a task, to be answered for a teacher.
    Task(ProblemSource),
    /// Rows, with completions or without.
    Rows(Rows),
}

impl Read {
    /// Whether completions are sampled.
    fn samples(&self) -> bool {
        match self {
            Read::Problems(..) | Read::Task(_) => true,
            Read::Rows(rows) => rows.are_prompts(),
        }
    }
}

/// The critic of a run that has one: a value head at the internal layer, and one at the last.
pub(super) fn new_critic(config: &TrainConfig, model: &Model) -> Result<Option<Critic>> {
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
    /// Checks the settings, reads the data, plans the memory, makes or loads the adapter and the rollout engine.
    ///
    /// # Errors
    /// A setting, the data or the adapter does not fit, or memory is short.
    pub fn new(model: &'m Model, config: TrainConfig) -> Result<Trainer<'m>> {
        let adapter = config.adapter.clone();
        let now = crate::data::chat::unix_now_s() as f64;
        Trainer::begun(model, config, adapter.as_deref(), now)
    }

    /// [`Trainer::new`] of a run that `began` at this second of Unix time, with another adapter to begin from than the
    /// one in the settings.
    pub(super) fn begun(
        model: &'m Model,
        config: TrainConfig,
        adapter: Option<&Path>,
        began: f64,
    ) -> Result<Trainer<'m>> {
        config.check()?;
        vram::wants_a_gpu(config.vram, model.device())?;
        let n_layer = model.config().n_layer;
        let encoder = config.prompts.encoder(model)?;
        // Before rows are read: a chat template may write the date.
        encoder.set_now(began as i64);
        if config.algo == Algorithm::Distill && !model.device().is_host() {
            let expected = "--device cpu: the memory of a teacher is not planned for on a GPU yet";
            let got = config.device.clone();
            return Err(Error::invalid("--algo distill", expected, got, "leave --device out"));
        }
        let teacher = TeacherModel::open(model, &config)?;
        let mut notes = Vec::new();
        let (mut config, Data { read, held_out, longest }) =
            read_data(model, config, &encoder, &mut notes)?;

        let workload = Workload::of(&config, read.samples(), longest, teacher.as_ref());
        let gpu = GpuPlan::of(model, &config, &workload)?;
        if let Some(plan) = &gpu {
            plan.apply(&mut config, read.samples());
        }
        if let Some(longest) = longest {
            config.micro_batch_tokens.get_or_insert(longest.max(4096));
        }
        let mut config = config.resolved(n_layer);
        check_layers(&config, n_layer)?;
        let needs = config.max_prompt + config.max_response;
        if read.samples() {
            // As llama.cpp sizes the contexts of rollouts.
            model.set_context(needs.next_multiple_of(256));
        }
        if read.samples() && needs > model.config().n_ctx_train {
            return Err(Error::invalid(
                "--max-prompt plus --max-response",
                format!("at most the model's context of {} tokens", model.config().n_ctx_train),
                needs.to_string(),
                "lower one of them",
            ));
        }
        let mut lora = begin_from(model, &mut config, adapter)?;
        // Before anything that a plan counts is taken.
        let plan = Plan::of(model, &config, &workload)?;
        let on_gpu = gpu.as_ref().filter(|_| !model.device().is_host());
        if on_gpu.is_none() {
            plan.check()?;
        }
        let memory = on_gpu.map_or_else(|| plan.line(), GpuPlan::line);
        let kept_bytes = gpu.as_ref().map_or(plan.kept_bytes(), |gpu| gpu.kept_bytes as usize);
        let pool = Arc::new(ThreadPool::with(config.threads)?);
        let wanted = config.sequences();
        let mut rollouts = || -> Result<Rollouts> {
            let options = RolloutOptions { n_ctx_seq: needs, kv_bytes: config.kv_mib() << 20 }
                .at_most(wanted, model.engine())?;
            let mut rollouts = Rollouts::new(model.engine(), &pool, options)?;
            if model.config().layers.iter().any(|layer| layer.experts.is_some()) {
                rollouts.keep_experts();
            }
            rollouts.set_adapter(Some(lora.live(model)?))?;
            Ok(rollouts)
        };
        let source = match read {
            Read::Problems(problems, held_out, judges) => {
                Source::Judged(Judged { rollouts: rollouts()?, problems, held_out, judges })
            }
            Read::Rows(rows) if !rows.are_prompts() => Source::Given(rows),
            Read::Rows(rows) => {
                Source::Sampled(Sampled { rollouts: rollouts()?, prompts: Prompts::Rows(rows) })
            }
            Read::Task(task) => {
                Source::Sampled(Sampled { rollouts: rollouts()?, prompts: Prompts::Task(task) })
            }
        };
        let mut engine = Engine::on(model.device(), pool.clone())?;
        engine.keep_up_to(kept_bytes);
        let learner = Learner {
            model,
            optimizer: AdamW::new(&lora, n_layer, config.adamw(n_layer))?,
            gradients: lora.zeros_like()?,
            critic: new_critic(&config, model)?,
            reference: reference(model, &config)?,
            teacher: teacher.map(|teacher| Teacher::new(teacher, &config, pool)).transpose()?,
            engine,
            lora,
        };
        let mut trainer = Trainer {
            model,
            config,
            learner,
            source,
            encoder,
            held_out,
            gpu,
            memory,
            notes,
            dump: None,
            stop: Arc::default(),
            inputs: BTreeMap::new(),
            mid_step: false,
            counters: Counters::default(),
            score_before: f64::NAN,
            best_score: f64::NAN,
            without_gain: 0.0,
            seconds: 0.0,
            began,
            probe_set: Vec::new(),
        };
        if trainer.choose_layer()? {
            // These depend on the layer.
            let (config, learner) = (&trainer.config, &mut trainer.learner);
            learner.optimizer = AdamW::new(&learner.lora, n_layer, config.adamw(n_layer))?;
            learner.critic = new_critic(config, model)?;
        }
        Ok(trainer)
    }

    /// Takes all rows as the one mini batch of the one step, and writes its gradients, before clipping, to `path`.
    ///
    /// # Errors
    /// [`Error::Invalid`] for a run of more steps, or one without rows.
    pub fn dump_gradients_to(&mut self, path: &Path) -> Result<()> {
        let Source::Given(rows) = &self.source else {
            let advice = "give rollouts with --rollouts, or rows with completions with --data";
            return Err(Error::invalid("--dump-gradients", "given completions", "none", advice));
        };
        if self.config.steps != 1 {
            let got = self.config.steps.to_string();
            let advice = "all rows are the mini batch of one step";
            return Err(Error::invalid("--dump-gradients", "--steps 1", got, advice));
        }
        let n = rows.len();
        (self.config.prompts_per_step, self.config.mini_batch) = (n, Some(n));
        self.dump = Some(path.into());
        Ok(())
    }
}

impl Learner<'_> {
    /// The adapter, the optimiser's moments, the critic.
    pub fn state<'s>(&'s mut self, state: &mut State<'s>) {
        let Learner {
            lora,
            optimizer,
            critic,
            // Given at the start.
            model: _,
            reference: _,
            teacher: _,
            // Cleared or filled anew by every update or forward.
            gradients: _,
            engine: _,
        } = self;
        state.tensors("adapter", lora.tensors_mut());
        optimizer.state(state);
        if let Some(critic) = critic {
            critic.state(state);
        }
    }

    /// Gives memory back, for rollouts to use.
    pub fn release(&mut self) {
        self.engine.release();
        if let Some(teacher) = &mut self.teacher {
            teacher.release();
        }
    }
}

/// What was read.
struct Data {
    read: Read,
    /// Held-out rows.
    held_out: Vec<ResponseGroup>,
    /// Tokens of the longest given row, held-out ones too; none where completions are sampled.
    longest: Option<usize>,
}

/// Reads problems, rows, or a task's prompts, and what is held out; settles the steps of `--epochs`.
fn read_data(
    model: &Model,
    mut config: TrainConfig,
    encoder: &Encoder<'_>,
    notes: &mut Vec<String>,
) -> Result<(TrainConfig, Data)> {
    if config.algo.is_rewarded() {
        let mut problems = ProblemSource::with(&config.data, config.source())?;
        let held_out = evaluate::held_out(&config, &problems)?;
        let judges = config.rewards.judges(&config.data, config.max_response)?;
        if config.drop_long_prompts {
            problems.retain(|p| encoder.fits(&p.prompt, config.max_prompt))?;
        }
        let read = Read::Problems(problems, held_out, judges);
        return Ok((config, Data { read, held_out: Vec::new(), longest: None }));
    }
    let m = model.config();
    let (n_vocab, n_ctx_train) = (m.n_vocab, m.n_ctx_train);
    let reader = Reader { config: &config, encoder, n_vocab, n_ctx_train };
    let held_out = held_out_rows(&reader, notes)?;
    let is_task = crate::data::source::files(&config.data)?.is_empty();
    if is_task && config.algo == Algorithm::Distill {
        if config.rows.epochs.is_some() {
            let advice = "say how many --steps; a task has no end";
            return Err(Error::invalid("--epochs", "rows of a file", config.data, advice));
        }
        let read = Read::Task(ProblemSource::with(&config.data, config.source())?);
        return Ok((config, Data { read, held_out, longest: None }));
    }
    let rows = reader.read(&config.data, notes)?;
    let mut longest = None;
    if !rows.are_prompts() {
        refuse_sampling(&config)?;
        let lengths = held_out.iter().map(ResponseGroup::n_tokens);
        let most = lengths.chain([rows.longest()]).max().unwrap_or(0);
        if let Some(n) = config.micro_batch_tokens.filter(|n| *n < most) {
            return Err(Error::invalid(
                "--micro-batch-tokens",
                format!("at least the longest row with its prompt ({most} tokens)"),
                n.to_string(),
                "raise it, or leave long rows out with --max-length",
            ));
        }
        longest = Some(most);
    }
    if let Some(epochs) = config.rows.epochs {
        let all = epochs * rows.len() as u64;
        config.steps = all.div_ceil(config.prompts_per_step as u64);
    }
    Ok((config, Data { read: Read::Rows(rows), held_out, longest }))
}

/// The rows of `--eval-data`.
fn held_out_rows(reader: &Reader<'_, '_>, notes: &mut Vec<String>) -> Result<Vec<ResponseGroup>> {
    let Some(files) = &reader.config.eval_data else { return Ok(Vec::new()) };
    let mut own = Vec::new();
    let rows = reader.read(files, &mut own)?;
    notes.extend(own.into_iter().map(|note| format!("--eval-data: {note}")));
    if rows.are_prompts() {
        let advice = "held-out rows are scored, not answered: give completions";
        let expected = "rows with completions";
        return Err(Error::invalid("--eval-data", expected, "prompts alone", advice));
    }
    Ok(rows.sample(reader.config.eval_problems))
}

/// Refuses layers that do not exist or would not learn.
fn check_layers(config: &TrainConfig, n_layer: usize) -> Result<()> {
    if config.internal_layer != Some(LayerChoice::Auto) {
        Policy::internal(config.internal_layer(n_layer), n_layer, config.final_norm)?;
    }
    let reaches = match config.internal_steps() {
        0 => n_layer,
        _ => config.internal_layer(n_layer),
    };
    if config.freeze_layers < reaches {
        return Ok(());
    }
    Err(Error::invalid(
        "--freeze-layers",
        format!("below {reaches}, the lowest layer whose policy is optimised"),
        config.freeze_layers.to_string(),
        "nothing would be learnt; lower it",
    ))
}

/// The adapter of a file, whose sizes become the settings', or a new one.
fn begin_from(model: &Model, config: &mut TrainConfig, adapter: Option<&Path>) -> Result<Lora> {
    let Some(path) = adapter else {
        return Lora::new(model, &config.targets, config.rank, config.file_alpha(), config.seed);
    };
    let lora = Lora::load(model, path)?;
    let frozen = lora.frozen();
    if frozen.len() == lora.slots().len() {
        let expected = "a pair on a map of attention or FFN";
        let advice = "nothing of it would be trained: train a new adapter";
        let place = path.display().to_string();
        return Err(Error::invalid(place, expected, frozen.join(", "), advice));
    }
    if config.algo == Algorithm::Distill {
        refuse_head(&lora, path)?;
    }
    (config.rank, config.alpha) = (lora.rank(), Some(lora.alpha()));
    config.targets = lora.targets();
    Ok(lora)
}

/// The adapter that log-ratios are taken to; none is the base model.
fn reference(model: &Model, config: &TrainConfig) -> Result<Option<Lora>> {
    match (config.rows.reference, &config.adapter) {
        (Reference::Base, _) => Ok(None),
        (Reference::Start, Some(path)) => Lora::load(model, path).map(Some),
        (Reference::Start, None) => {
            let advice = "name the adapter to begin from, or leave --reference out";
            Err(Error::invalid("--reference start", "--adapter FILE", "none", advice))
        }
    }
}
