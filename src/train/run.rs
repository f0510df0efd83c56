//! A run from its first step to its last, or from a checkpoint on, and what stays of it whatever ends it.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::time::Instant;

use super::checkpoint::{self, Parts};
use super::resume::{Resume, model_path};
use super::run_dir::{RunConfig, RunDir};
use super::source::Source;
use super::{Observer, Reference, Sample, StepRecord, Summary, TrainConfig, Trainer};
use crate::gguf::sha256;
use crate::{Error, Result};

/// Updates in a row whose gradient is not finite before a run gives up.
const SKIPS_MAX: u64 = 10;
/// Steps in a row without a group whose rewards differ before a run gives up.
const SILENT_STEPS_MAX: u64 = 20;

/// Where a run is kept.
struct Keeper {
    /// None of a rank that is not the first.
    dir: Option<RunDir>,
    path: PathBuf,
    /// The text of `config.toml`.
    config: String,
    /// Step of the newest checkpoint.
    kept: Option<u64>,
    /// Whether the run began in this process.
    new: bool,
}

impl Trainer<'_> {
    /// The whole run: evaluation, steps, evaluation; everything is written to `dir`. A run that fails before its first step is
    /// complete leaves nothing there.
    ///
    /// # Errors
    /// The folder is not empty, a file cannot be written, or training cannot learn.
    pub fn run(&mut self, dir: &Path, observer: &mut dyn Observer) -> Result<Summary> {
        if self.team.is_first() {
            RunDir::check(dir)?;
        }
        self.check_gradients()?;
        self.read_inputs()?;
        self.begin_together(observer)?;
        let model = model_path(Path::new(self.model.name()))?;
        let train = TrainConfig { out: Some(dir.into()), ..self.settings.written() }.absolute()?;
        let config = RunConfig { model, train }.text()?;
        let path = dir.to_path_buf();
        let dir = self.team.is_first().then(|| RunDir::create(dir, &config)).transpose()?;
        let keeper = Keeper { dir, path, config, kept: None, new: true };
        self.run_kept(keeper, observer)
    }

    /// The rest of a run, by the trainer that [`Resume::trainer`] made.
    ///
    /// # Errors
    /// As [`Trainer::run`].
    pub fn run_on(&mut self, resume: Resume, observer: &mut dyn Observer) -> Result<Summary> {
        self.check_gradients()?;
        self.read_inputs()?;
        self.begin_together(observer)?;
        resume.notes(self).iter().for_each(|note| observer.note(note));
        let Resume { mut dir, path, config, checkpoint, damaged, changes, .. } = resume;
        let config = RunConfig { train: self.settings.written(), ..config }.text()?;
        if let Some(dir) = &mut dir {
            checkpoint::tidy(&dir.checkpoints(), &damaged)?;
            // It may have ended between a checkpoint and the removal of an older one.
            checkpoint::prune(&dir.checkpoints(), self.settings.keep_checkpoints)?;
            let logs = checkpoint.as_ref().map(|c| c.meta.logs.clone()).unwrap_or_default();
            dir.cut(&logs)?.iter().for_each(|odd| observer.note(odd));
            if !changes.is_empty() {
                dir.write_config(&config)?;
            }
        }
        let kept = checkpoint.map(|c| c.meta.step);
        self.run_kept(Keeper { dir, path, config, kept, new: false }, observer)
    }

    fn run_kept(&mut self, mut keeper: Keeper, observer: &mut dyn Observer) -> Result<Summary> {
        self.notes.drain(..).for_each(|note| observer.note(&note));
        let (start, before) = (Instant::now(), self.seconds);
        let outcome = self.run_steps(&mut keeper, start, observer);
        self.seconds = before + start.elapsed().as_secs_f64();
        let came_to_nothing = keeper.new && self.counters.steps_done == 0;
        let mut outcome = match outcome {
            // There is nothing to be gone on with, and the name is free again.
            Err(error) if came_to_nothing && !matches!(error, Error::Interrupted) => {
                if let Some(Err(stays)) = keeper.dir.map(RunDir::discard) {
                    observer.note(&stays.to_string());
                }
                return Err(error);
            }
            outcome => outcome,
        };
        // Whatever ended the run: between two steps its state is whole, and is kept.
        if !self.mid_step
            && let Err(error) = self.keep(&mut keeper)
        {
            let word = format!(
                "the adapter after step {} was not kept: {error}",
                self.counters.steps_done
            );
            observer.note(&word);
            if outcome.is_ok() || matches!(outcome, Err(Error::Interrupted)) {
                outcome = Err(error);
            }
        }
        let (score_after, interrupted) = match outcome {
            Ok(score) => (score, false),
            Err(Error::Interrupted) => (None, true),
            Err(error) => return Err(self.with_way_on(error, &keeper)),
        };
        let gpu = self.plan.gpu.as_ref().zip(self.model.engine().gpu_peak_bytes());
        if let Some(word) = gpu.and_then(|(plan, used)| plan.verdict(used)) {
            observer.note(&word);
        }
        let rewarded = self.settings.algo.is_rewarded();
        let score_before = Some(self.score_before).filter(|score| !score.is_nan());
        let accuracy = |score: Option<f64>| score.filter(|_| rewarded).map(|score| score as f32);
        let loss = |score: Option<f64>| score.filter(|_| !rewarded);
        let summary = Summary {
            accuracy_before: accuracy(score_before),
            accuracy_after: accuracy(score_after),
            eval_loss_before: loss(score_before),
            eval_loss_after: loss(score_after),
            steps: self.counters.steps_done,
            seconds: self.seconds,
            peak_bytes: super::memory::peak_bytes(),
            gpu_peak_bytes: gpu.map(|(_, used)| used),
            gpu_planned_bytes: gpu.map(|(plan, _)| plan.peak_bytes()),
            interrupted,
            adapter: RunDir::adapter_in(&keeper.path),
        };
        if let Some(Err(error)) = keeper.dir.as_ref().map(|dir| dir.write_summary(&summary)) {
            observer.note(&format!("no summary was written: {error}"));
        }
        Ok(summary)
    }

    /// Says in an error how the run goes on.
    fn with_way_on(&self, error: Error, keeper: &Keeper) -> Error {
        let Some(step) = keeper.kept else { return error };
        let place = format!("training after step {}", self.counters.steps_done);
        let way = format!(
            "the checkpoint of step {step} is sound: bupo-gguf train --resume {}",
            keeper.path.display()
        );
        Error::engine(place, error.to_string(), way)
    }

    fn run_steps(
        &mut self,
        keeper: &mut Keeper,
        start: Instant,
        observer: &mut dyn Observer,
    ) -> Result<Option<f64>> {
        let before = self.seconds;
        if self.counters.steps_done == 0 && self.score_before.is_nan() {
            let score = self.held_out_score("before", observer)?;
            self.score_before = score.unwrap_or(f64::NAN);
        }
        observer.note(&self.words_before());
        if let (0, Some(why)) = (self.counters.steps_done, &self.settings.internal_layer_why) {
            let layer = self.settings.internal_layer;
            observer.note(&format!("internal layer {layer}, {why}"));
        }
        let mut newest = None;
        let mut events = match &mut keeper.dir {
            Some(dir) if self.settings.tensorboard => Some(dir.events(self.began)?),
            _ => None,
        };
        for step in self.counters.steps_done + 1..=self.settings.steps {
            let patience = self.settings.early_stop;
            if patience > 0 && self.without_gain >= patience as f64 {
                observer.note(&format!(
                    "stopped after step {}: {patience} evaluations without a better one than {:.4}",
                    step - 1,
                    self.best_score
                ));
                break;
            }
            let (mut record, samples) = self.guarded_step(step, observer)?;
            let silent = record.rollout.as_ref().is_some_and(|r| r.groups_with_signal == 0.0);
            self.counters.silent_steps = if silent { self.counters.silent_steps + 1 } else { 0 };
            let mut interrupted = false;
            if self.settings.eval_every > 0 && step % self.settings.eval_every == 0 {
                let evaluated = self.evaluate("held-out", observer);
                match evaluated.and_then(|report| Ok((report, self.held_out_rows()?))) {
                    Ok((report, rows)) => {
                        let accuracy = report.as_ref().map(|r| r.avg_at_k as f32 as f64);
                        let score = accuracy.or(rows.as_ref().map(|rows| rows.eval_loss));
                        newest = score.map(|score| (step, score));
                        record.accuracy = report.as_ref().map(|r| r.avg_at_k as f32);
                        record.evaluation = report;
                        record.held_out = rows;
                    }
                    Err(Error::Interrupted) => interrupted = true,
                    Err(error) => return Err(error),
                }
            }
            let every = self.settings.entropy_every;
            if every > 0 && step % every == 0 && !interrupted {
                match self.probe_layers() {
                    Ok(probe) => record.probe = Some(probe),
                    Err(Error::Interrupted) => interrupted = true,
                    Err(error) => return Err(error),
                }
            }
            (self.counters.steps_done, self.mid_step) = (step, false);
            self.seconds = before + start.elapsed().as_secs_f64();
            if let Some(dir) = &mut keeper.dir {
                dir.metrics(&record)?;
                samples.iter().try_for_each(|sample| dir.completion(sample))?;
                dir.flush()?;
            }
            if let Some(events) = &mut events {
                events.step(
                    &json(&record)?,
                    &samples.iter().map(json).collect::<Result<Vec<_>>>()?,
                )?;
            }
            self.keep_best(&record, keeper)?;
            let due = self.settings.checkpoint_every;
            if due > 0
                && step % due == 0
                && let Err(error) = self.keep(keeper)
            {
                let kept = keeper.kept.map_or("none".into(), |step| format!("step {step}"));
                observer.note(&format!(
                    "no checkpoint of step {step}: {error}; the run goes on, newest checkpoint: {kept}"
                ));
            }
            observer.samples(&samples);
            observer.step(&record);
            let silent = self.counters.silent_steps;
            let words = self.advice.after(&record, silent, &self.settings);
            words.iter().for_each(|word| observer.note(word));
            self.give_up_if_hopeless(&record)?;
            if interrupted {
                return Err(Error::Interrupted);
            }
        }
        match newest {
            // It was looked at after the last step.
            Some((step, score)) if step == self.counters.steps_done => Ok(Some(score)),
            _ => self.held_out_score("after", observer),
        }
    }

    /// How good it is before the first step.
    fn words_before(&self) -> String {
        let problems = match &self.source {
            Source::Judged(judged) => judged.held_out.len(),
            _ => 0,
        };
        match (self.score_before, self.settings.algo.is_rewarded()) {
            (a, true) if a.is_nan() => {
                "no held-out problems: give some with --eval-data to see the accuracy".into()
            }
            (a, true) => format!("accuracy before: {a:.3} on {problems} held-out problems"),
            (l, false) if l.is_nan() => {
                "no held-out rows: give some with --eval-data to see the loss on them".into()
            }
            (l, false) => format!("loss before: {l:.4} on {} held-out rows", self.held_out.len()),
        }
    }

    /// A step whose panic, in whichever thread, is an error: the run ends as with any other.
    fn guarded_step(
        &mut self,
        step: u64,
        observer: &mut dyn Observer,
    ) -> Result<(StepRecord, Vec<Sample>)> {
        catch_unwind(AssertUnwindSafe(|| self.step(step, observer))).unwrap_or_else(|panic| {
            // Nobody knows how far it came.
            self.mid_step = true;
            let words = panic.downcast_ref::<String>().map(String::as_str);
            let words = words.or_else(|| panic.downcast_ref::<&str>().copied());
            let reason = words.unwrap_or("a panic without words");
            Err(Error::engine(format!("step {step}"), reason, "report it"))
        })
    }

    /// Writes `adapter-best.gguf` where an evaluation of the step was the best so far.
    fn keep_best(&mut self, record: &StepRecord, keeper: &Keeper) -> Result<()> {
        let (score, is_better) = match (&record.accuracy, &record.held_out) {
            (Some(accuracy), _) => (*accuracy as f64, *accuracy as f64 > self.best_score),
            (None, Some(rows)) => (rows.eval_loss, rows.eval_loss < self.best_score),
            (None, None) => return Ok(()),
        };
        if !is_better && !self.best_score.is_nan() {
            self.without_gain += 1.0;
            return Ok(());
        }
        (self.best_score, self.without_gain) = (score, 0.0);
        keeper.dir.as_ref().map_or(Ok(()), |dir| self.save(&dir.best_adapter()))
    }

    /// Writes `adapter.gguf` and, where checkpoints are wanted, the one of this step.
    fn keep(&mut self, keeper: &mut Keeper) -> Result<()> {
        let Some(dir) = &mut keeper.dir else { return Ok(()) };
        if dir.is_lost() {
            dir.restore(&keeper.config)?;
            keeper.kept = None;
        }
        let adapter = dir.adapter();
        self.save(&adapter)?;
        let step = self.counters.steps_done;
        if self.settings.checkpoint_every == 0 || keeper.kept == Some(step) {
            return dir.flush();
        }
        let (folder, logs, inputs) = (dir.checkpoints(), dir.sync()?, self.inputs.clone());
        let parts = Parts { step, inputs: &inputs, logs, config: &keeper.config };
        checkpoint::write(&folder, parts, &self.state(), &adapter)?;
        keeper.kept = Some(step);
        checkpoint::prune(&folder, self.settings.keep_checkpoints)
    }

    /// SHA-256 of all that the run reads and that makes its steps what they are.
    pub(super) fn read_inputs(&mut self) -> Result<()> {
        if !self.inputs.is_empty() {
            return Ok(());
        }
        let sums = self.model.files().iter().map(|p| sha256(p));
        let sums = sums.collect::<Result<Vec<_>>>()?.join(" ");
        self.inputs.insert("model".into(), sums);
        let c = &self.settings;
        let data = crate::data::source::files(&c.data)?;
        let template: Vec<_> = Some(std::path::PathBuf::from(&c.prompts.template))
            .filter(|t| t.is_file())
            .into_iter()
            .collect();
        let teacher = self.learner.teacher.as_ref().map_or(Vec::new(), |t| t.files().to_vec());
        let reference: Vec<_> = match c.rows.reference {
            Reference::Start => c.adapter.iter().cloned().collect(),
            Reference::Base => Vec::new(),
        };
        // Rows have no rewards, an environment need not.
        let judges = match c.algo.is_rewarded() {
            true => {
                let judge = c.rewards.judge(&c.data, c.max_response)?;
                judge
                    .models()
                    .map(|model| model.path().to_path_buf())
                    .filter(|p| p.is_file())
                    .collect()
            }
            false => Vec::new(),
        };
        for (name, files) in [
            ("judge", judges),
            ("data", data),
            ("tokenizer", c.prompts.tokenizer.iter().cloned().collect()),
            ("template", template),
            ("teacher", teacher),
            ("teacher-adapter", c.rows.teacher_adapter.iter().cloned().collect()),
            ("reference", reference),
        ] {
            let sums = files.iter().map(|p| sha256(p)).collect::<Result<Vec<_>>>()?;
            if !sums.is_empty() {
                self.inputs.insert(name.into(), sums.join(" "));
            }
        }
        Ok(())
    }

    fn give_up_if_hopeless(&self, record: &StepRecord) -> Result<()> {
        if self.counters.skipped_in_row >= SKIPS_MAX {
            return Err(Error::engine(
                format!("training at step {}", record.step),
                format!("{SKIPS_MAX} updates in a row had a gradient that is not finite"),
                "lower --lr, or check the model file",
            ));
        }
        if let Some(rollout) = &record.rollout
            && self.counters.silent_steps >= SILENT_STEPS_MAX
            && rollout.reward < 1.0
        {
            return Err(Error::engine(
                format!("training at step {}", record.step),
                format!(
                    "in {SILENT_STEPS_MAX} steps all completions of each prompt had equal rewards (mean {})",
                    rollout.reward
                ),
                "nothing can be learnt from that: use easier problems, a larger --group, or look at completions.jsonl",
            ));
        }
        Ok(())
    }
}

/// A record as its line in a log.
fn json(record: &impl serde::Serialize) -> Result<serde_json::Value> {
    serde_json::to_value(record)
        .map_err(|e| Error::engine("writing a step", e.to_string(), "report it"))
}
