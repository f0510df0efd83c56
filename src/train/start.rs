//! From settings to a trainer: what is read, planned and made before the first step.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use super::advice::Advice;
use super::collect::{By, Judged};
use super::config::DEFAULT_DATA;
use super::critic::Critic;
use super::dialogues::Dialogues;
use super::layers::LayerChoice;
use super::learner::Learner;
use super::plan::{Plan, Workload, wants_a_gpu};
use super::row_options::refuse_sampling;
use super::rows::{Reader, Rows};
use super::source::{Prompts, Sampled, Source, With};
use super::teacher::{Teacher, TeacherModel, refuse_head};
use super::{
    AdamW, Algorithm, Baseline, Counters, Facts, Reference, ResponseGroup, Settings, State,
    TrainConfig, Trainer, evaluate, layers,
};
use crate::data::{Problem, ProblemSource};
use crate::env::EnvPool;
use crate::ggml::ThreadPool;
use crate::llama::Products;
use crate::model::{AdapterShape, Engine, Lora, Model, Policy};
use crate::rollout::{Encoder, Rollouts};
use crate::team::Team;
use crate::{Error, Result, ops};

/// What is read of the data, before memory is planned for it.
enum Read {
    /// Problems to be answered, held-out ones, and the environments to talk about them with.
    Problems(ProblemSource, Vec<Problem>, Option<Box<EnvPool>>),
    /// Prompts of a task, to be answered for a teacher.
    Task(ProblemSource),
    /// Rows, with completions or without.
    Rows(Rows),
}

/// The critic of a run that has one: a value head at the internal layer, and one at the last.
pub(super) fn new_critic(settings: &Settings, model: &Model) -> Result<Option<Critic>> {
    let (n_layer, d) = (model.config().n_layer, model.config().n_embd);
    match settings.baseline {
        Baseline::Value => {
            let depths = [settings.internal_layer, n_layer];
            Critic::new(&depths, d, settings.critic()).map(Some)
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
        Trainer::in_team(model, config, &Team::alone())
    }

    /// [`Trainer::new`] as a rank of a team, every one of which makes the same trainer.
    pub fn in_team(model: &'m Model, config: TrainConfig, team: &Team) -> Result<Trainer<'m>> {
        let adapter = config.adapter.clone();
        let now = team.from_first(|| Ok(crate::data::chat::unix_now_s() as f64))?;
        Trainer::begun(model, config, adapter.as_deref(), now, team)
    }

    /// [`Trainer::new`] of a run that `began` at this second of Unix time, with another adapter to begin from than the
    /// one in the settings.
    pub(super) fn begun(
        model: &'m Model,
        mut config: TrainConfig,
        adapter: Option<&Path>,
        began: f64,
        team: &Team,
    ) -> Result<Trainer<'m>> {
        config.check()?;
        config.data = config.dialogues.data(&config.data, DEFAULT_DATA);
        let samples = config.algo.is_rewarded() || config.algo == Algorithm::Distill;
        let invariant = crate::rollout::invariant(config.batch_invariant, model.device(), team)?;
        config.batch_invariant |= samples && invariant;
        if config.exact_rollouts {
            crate::rollout::on_host("--exact-rollouts", model.device(), "leave it out")?;
        }
        if config.fast_products {
            ops::wants_fast_products(model.device())?;
        }
        wants_a_gpu(config.vram, model.device())?;
        let encoder = config.prompts.encoder(model)?;
        // Before rows are read: a chat template may write the date.
        encoder.set_now(began as i64);
        let shape = take_adapter(&mut config, model, adapter)?;
        let teacher = TeacherModel::open(model, &config)?;
        let mut notes = Vec::new();
        let (config, Data { mut read, held_out, mut facts }) =
            read_data(model, config, &encoder, &mut notes)?;
        facts.ranks = team.size();
        // Before anything that a plan counts is taken.
        let work = Workload::new(model, &config, shape, teacher.as_ref())?;
        let (mut settings, plan) = settle(model, config, &mut facts, &work)?;
        notes.extend(settings.reasons.iter().cloned());
        notes.extend(facts.cut(settings.max_prompt, settings.drop_long_prompts));
        if let Read::Problems(problems, ..) = &mut read
            && settings.drop_long_prompts
        {
            problems.retain(|p| encoder.fits(&p.prompt, settings.max_prompt))?;
        }
        let needs = settings.max_prompt + settings.max_response;
        if facts.samples {
            // As llama.cpp sizes the contexts of rollouts.
            model.set_context(needs.next_multiple_of(256));
        }
        let mut lora = begin_from(model, &settings, adapter)?;
        let pool =
            Arc::new(ThreadPool::with(Some(settings.threads))?.rounding(settings.fast_products));
        let mut source = source(model, &settings, read, &pool, &mut lora, team)?;
        let mut engine = Engine::on(model.device(), pool.clone())?;
        engine.keep_up_to(plan.kept_bytes());
        let stop: Arc<AtomicBool> = Arc::default();
        if settings.options.internal_layer == Some(LayerChoice::Auto) {
            let with = With { settings: &settings, encoder: &encoder, stop: &stop, team };
            let found = layers::find(model, &mut engine, &lora, &mut source, with)?;
            settings.choose_layer(found);
        }
        let learner = Learner {
            model,
            optimizer: AdamW::new(&lora, model.config().n_layer, settings.adamw())?,
            gradients: lora.zeros_like()?,
            part: lora.zeros_like()?,
            team: team.clone(),
            critic: new_critic(&settings, model)?,
            reference: reference(model, &settings)?,
            teacher: teacher.map(|teacher| Teacher::new(teacher, &settings, pool)).transpose()?,
            engine,
            lora,
        };
        Ok(Trainer {
            model,
            settings,
            learner,
            source,
            encoder,
            held_out,
            plan,
            notes,
            advice: Advice::default(),
            dump: None,
            stop,
            team: team.clone(),
            allow_mixed: false,
            inputs: BTreeMap::new(),
            mid_step: false,
            counters: Counters::default(),
            score_before: f64::NAN,
            best_score: f64::NAN,
            without_gain: 0.0,
            seconds: 0.0,
            began,
            probe_set: Vec::new(),
        })
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
        if self.settings.steps != 1 {
            let got = self.settings.steps.to_string();
            let advice = "all rows are the mini batch of one step";
            return Err(Error::invalid("--dump-gradients", "--steps 1", got, advice));
        }
        let n = rows.len();
        (self.settings.options.prompts_per_step, self.settings.mini_batch) = (n, n);
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
            part: _,
            engine: _,
            // Who computes.
            team: _,
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
    facts: Facts,
}

/// Reads problems, rows, or a task's prompts, and what is held out; settles the steps of `--epochs`.
fn read_data(
    model: &Model,
    mut config: TrainConfig,
    encoder: &Encoder<'_>,
    notes: &mut Vec<String>,
) -> Result<(TrainConfig, Data)> {
    if config.algo.is_rewarded() {
        let problems = ProblemSource::with(&config.data, config.source())?;
        let held_out = evaluate::held_out(&config, &problems)?;
        let mut pool = match config.dialogues.is_some() {
            true => Some(Box::new(EnvPool::new(&config.dialogues)?)),
            false => None,
        };
        let facts = match &mut pool {
            Some(pool) => Facts::of_openings(&problems, encoder, pool, config.seed)?,
            None => Facts::of_problems(&problems, encoder)?,
        };
        let read = Read::Problems(problems, held_out, pool);
        return Ok((config, Data { read, held_out: Vec::new(), facts }));
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
        let task = ProblemSource::with(&config.data, config.source())?;
        let facts = Facts::of_problems(&task, encoder)?;
        return Ok((config, Data { read: Read::Task(task), held_out, facts }));
    }
    let rows = reader.read(&config.data, false, notes)?;
    // What is settled later must not change which rows are left out when the run goes on.
    let most_tokens = reader.most_tokens().min(1 << 20);
    let mut facts = Facts {
        samples: true,
        prompts: rows.prompt_lengths().collect(),
        problems: Some(rows.len()),
        ..Facts::default()
    };
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
        (facts.samples, facts.longest_row) = (false, Some(most));
    }
    config.rows.max_length = Some(most_tokens);
    if let Some(epochs) = config.rows.epochs {
        let all = epochs * rows.len() as u64;
        config.steps = all.div_ceil(config.prompts_per_step as u64);
    }
    Ok((config, Data { read: Read::Rows(rows), held_out, facts }))
}

/// The rows of `--eval-data`.
fn held_out_rows(reader: &Reader<'_, '_>, notes: &mut Vec<String>) -> Result<Vec<ResponseGroup>> {
    let Some(files) = &reader.config.eval_data else { return Ok(Vec::new()) };
    let mut own = Vec::new();
    let rows = reader.read(files, true, &mut own)?;
    notes.extend(own.into_iter().map(|note| format!("--eval-data: {note}")));
    if rows.are_prompts() {
        let advice = "held-out rows are scored, not answered: give completions";
        let expected = "rows with completions";
        return Err(Error::invalid("--eval-data", expected, "prompts alone", advice));
    }
    Ok(rows.sample(reader.config.eval_problems))
}

/// Settles what the options leave open: a completion that nobody gave a length is halved until memory has room for it.
fn settle(
    model: &Model,
    config: TrainConfig,
    facts: &mut Facts,
    work: &Workload<'_>,
) -> Result<(Settings, Plan)> {
    loop {
        let mut settings = config.clone().resolve(model, facts)?;
        check_layers(&settings, model.config().n_layer)?;
        if facts.samples {
            settings.check_context(model)?;
        }
        let plan = Plan::of(model, &mut settings, facts, work);
        match plan.and_then(|plan| plan.check().map(|()| plan)) {
            Ok(plan) => return Ok((settings, plan)),
            Err(_) if facts.samples && settings.may_shorten() => {
                facts.room = Some(settings.max_response / 2);
            }
            Err(error) => return Err(error),
        }
    }
}

/// Where groups come from, with the rollout engine where completions are sampled, under the adapter.
fn source(
    model: &Model,
    settings: &Settings,
    read: Read,
    pool: &Arc<ThreadPool>,
    lora: &mut Lora,
    team: &Team,
) -> Result<Source> {
    let mut rollouts = || -> Result<Rollouts> {
        let options = settings.rollouts().at_most(settings.sequences(), model.engine())?;
        let mut rollouts = Rollouts::new(model.engine(), pool, options)?;
        if model.config().is_mixture() {
            rollouts.keep_experts();
        }
        if settings.exact_rollouts {
            rollouts.set_products(Products::Exact);
        }
        if settings.batch_invariant {
            rollouts.make_invariant();
        }
        rollouts.share(team);
        rollouts.set_adapter(Some(lora.live(model)?))?;
        Ok(rollouts)
    };
    Ok(match read {
        Read::Problems(problems, held_out, pool) => {
            let judges = || settings.rewards.judges(&settings.data, settings.max_response);
            let by = match pool {
                None => By::Judges(judges()?),
                Some(pool) => {
                    // An environment rewards by itself; a reward that was asked for comes on top.
                    let judges = settings.rewards.reward.is_some().then(judges).transpose()?;
                    By::Environment(Box::new(Dialogues { pool: *pool, judges, told: false }))
                }
            };
            Source::Judged(Judged { rollouts: rollouts()?, problems, held_out, by })
        }
        Read::Rows(rows) if !rows.are_prompts() => Source::Given(rows),
        Read::Rows(rows) => {
            Source::Sampled(Sampled { rollouts: rollouts()?, prompts: Prompts::Rows(rows) })
        }
        Read::Task(task) => {
            Source::Sampled(Sampled { rollouts: rollouts()?, prompts: Prompts::Task(task) })
        }
    })
}

/// Refuses layers that do not exist or would not learn.
fn check_layers(settings: &Settings, n_layer: usize) -> Result<()> {
    if settings.options.internal_layer != Some(LayerChoice::Auto) {
        Policy::internal(settings.internal_layer, n_layer, settings.final_norm)?;
    }
    let reaches = match settings.internal_steps {
        0 => n_layer,
        _ => settings.internal_layer,
    };
    if settings.freeze_layers < reaches {
        return Ok(());
    }
    Err(Error::invalid(
        "--freeze-layers",
        format!("below {reaches}, the lowest layer whose policy is optimised"),
        settings.freeze_layers.to_string(),
        "nothing would be learnt; lower it",
    ))
}

/// What is known of the adapter that a run begins from, whose rank, alpha and targets become the settings'.
///
/// # Errors
/// A file that cannot be read, or does not fit the model.
pub(super) fn take_adapter(
    config: &mut TrainConfig,
    model: &Model,
    adapter: Option<&Path>,
) -> Result<AdapterShape> {
    let Some(path) = adapter else {
        return AdapterShape::new(model, &config.targets, config.rank);
    };
    let shape = AdapterShape::read(model, path)?;
    (config.rank, config.alpha, config.targets) = (shape.rank, shape.alpha, shape.targets.clone());
    Ok(shape)
}

/// The adapter of a file, or a new one.
fn begin_from(model: &Model, settings: &Settings, adapter: Option<&Path>) -> Result<Lora> {
    let Some(path) = adapter else {
        let (c, alpha) = (settings, settings.file_alpha());
        return Lora::new(model, &c.targets, c.rank, alpha, c.seed);
    };
    let lora = Lora::load(model, path)?;
    let frozen = lora.frozen();
    if frozen.len() == lora.slots().len() {
        let expected = "a pair on a map of attention or FFN";
        let advice = "nothing of it would be trained: train a new adapter";
        let place = path.display().to_string();
        return Err(Error::invalid(place, expected, frozen.join(", "), advice));
    }
    if settings.algo == Algorithm::Distill {
        refuse_head(&lora, path)?;
    }
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
