//! Going on with a run: its settings, what was changed of them, its newest sound checkpoint.

use std::path::{Path, PathBuf};

use super::checkpoint::{self, Checkpoint, Damaged};
use super::run_dir::{RunConfig, RunDir};
use super::{TrainConfig, Trainer};
use crate::model::{DEMO, Model};
use crate::team::Team;
use crate::{Error, Result};

/// What a changed setting does to a run that goes on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Effect {
    /// The adapter stays the one of an uninterrupted run with the new setting.
    None,
    /// The steps done were computed otherwise than an uninterrupted run would have.
    Inexact,
    /// The checkpoint does not fit any more.
    Impossible,
}

/// A setting that differs from the run's own.
#[derive(Clone, Debug, PartialEq)]
pub struct Change {
    /// Name in `config.toml`; with `--` before it on the command line.
    pub name: String,
    /// Value until now; none is the default.
    pub old: Option<toml::Value>,
    /// Value from now on.
    pub new: Option<toml::Value>,
    /// What it does.
    pub effect: Effect,
}

impl std::fmt::Display for Change {
    fn fmt(&self, f: &mut std::fmt::Formatter) -> std::fmt::Result {
        let show = |v: &Option<toml::Value>| v.as_ref().map_or("none".into(), |v| v.to_string());
        write!(f, "--{} {} instead of {}", self.name, show(&self.new), show(&self.old))
    }
}

/// Settings that do not touch the adapter of the steps done.
const HARMLESS: [&str; 13] = [
    "eval-data",
    "eval-problems",
    "eval-samples",
    "eval-every",
    "early-stop",
    "entropy-every",
    "checkpoint-every",
    "keep-checkpoints",
    "tensorboard",
    "memory",
    "recompute",
    "vram",
    "out",
];
/// Settings that do not either, unless a program judges: started anew or asked again, it may say something else.
const HARMLESS_WITHOUT_PROGRAM: [&str; 6] = [
    "reward-workers",
    "reward-timeout",
    "judge-retries",
    "judge-batch",
    "env-workers",
    "env-timeout",
];
/// Settings that the adapter of a checkpoint has already.
const SETTLED: [&str; 5] = ["adapter", "rank", "alpha", "rslora", "targets"];

/// The settings that differ, by name. Whatever is not known to be harmless is not.
fn changes(old: &TrainConfig, new: &TrainConfig) -> Result<Vec<Change>> {
    let (before, after) = (old.table()?, new.table()?);
    let names: std::collections::BTreeSet<_> = before.keys().chain(after.keys()).collect();
    // Only a falling learning rate looks at the end of the run.
    let looks_at_end = |c: &TrainConfig| c.schedule != super::Schedule::Constant;
    let program =
        new.rewards.judge(&new.data, new.max_response.unwrap_or(usize::MAX))?.asks_others()
            || new.dialogues.has_program();
    let effect = |name: &str| match name {
        // Older runs did not write it down.
        "reward-folder" if old.rewards.reward_folder.is_none() => Effect::None,
        "steps" if looks_at_end(old) || looks_at_end(new) => Effect::Inexact,
        "steps" => Effect::None,
        _ if HARMLESS.contains(&name) => Effect::None,
        _ if HARMLESS_WITHOUT_PROGRAM.contains(&name) && !program => Effect::None,
        _ if SETTLED.contains(&name) => Effect::Impossible,
        _ => Effect::Inexact,
    };
    Ok(names
        .into_iter()
        .filter(|name| before.get(*name) != after.get(*name))
        .map(|name| Change {
            name: name.clone(),
            old: before.get(name).cloned(),
            new: after.get(name).cloned(),
            effect: effect(name),
        })
        .collect())
}

/// A run that is to go on, its folder taken.
pub struct Resume {
    /// None of a rank that is not the first.
    pub(super) dir: Option<RunDir>,
    pub(super) path: PathBuf,
    pub(super) config: RunConfig,
    pub(super) checkpoint: Option<Checkpoint>,
    pub(super) damaged: Vec<Damaged>,
    pub(super) changes: Vec<Change>,
    allow_change: bool,
    /// What the first rank gave this one, until the run has begun.
    _copy: Option<tempfile::TempDir>,
}

impl Resume {
    /// Takes a run folder and finds its newest checkpoint whose sums are right.
    ///
    /// # Errors
    /// The folder is not there, another run holds it, its settings cannot be read, or it has checkpoints
    /// and all of them are damaged.
    pub fn open(folder: &Path) -> Result<Resume> {
        let folder = &std::path::absolute(folder).map_err(Error::io("find", folder))?;
        let dir = RunDir::reopen(folder)?;
        let mut config = RunConfig::read(folder)?;
        config.train.out = Some(folder.clone());
        let (checkpoint, damaged) = checkpoint::newest(&dir.checkpoints())?;
        if checkpoint.is_none() && !damaged.is_empty() {
            return Err(Error::invalid(
                dir.checkpoints().display().to_string(),
                "a sound checkpoint",
                damaged[0].reason.clone(),
                "restore one from a backup, or start another run (--adapter takes adapter.gguf)",
            ));
        }
        Ok(Resume {
            dir: Some(dir),
            path: folder.clone(),
            config,
            checkpoint,
            damaged,
            changes: vec![],
            allow_change: false,
            _copy: None,
        })
    }

    /// [`Resume::open`] of a team: the first rank takes the folder, which the others need not see, and gives them
    /// the settings and the checkpoint.
    ///
    /// # Errors
    /// As [`Resume::open`], on every rank.
    pub fn open_in(folder: &Path, team: &Team) -> Result<Resume> {
        if team.is_alone() {
            return Resume::open(folder);
        }
        let mut own = None;
        let (path, config, files) = team.from_first(|| {
            let resume = own.insert(Resume::open(folder)?);
            let files = resume.checkpoint.as_ref().map(Checkpoint::files).transpose()?;
            Ok((resume.path.clone(), resume.config.text()?, files))
        })?;
        if let Some(resume) = own {
            return Ok(resume);
        }
        let copy = tempfile::tempdir().map_err(Error::io("create", "a temporary folder"))?;
        let write =
            |to: PathBuf, bytes: &[u8]| std::fs::write(&to, bytes).map_err(Error::io("write", &to));
        write(copy.path().join("config.toml"), config.as_bytes())?;
        let mut config = RunConfig::read(copy.path())?;
        config.train.out = Some(path.clone());
        let mut checkpoint = None;
        if let Some((name, files)) = files {
            let place = copy.path().join("checkpoints").join(name);
            std::fs::create_dir_all(&place).map_err(Error::io("create", &place))?;
            files.iter().try_for_each(|(name, bytes)| write(place.join(name), bytes))?;
            checkpoint = checkpoint::newest(&copy.path().join("checkpoints"))?.0;
        }
        Ok(Resume {
            dir: None,
            path,
            config,
            checkpoint,
            damaged: vec![],
            changes: vec![],
            allow_change: false,
            _copy: Some(copy),
        })
    }

    /// Model and settings of the run.
    pub fn config(&self) -> &RunConfig {
        &self.config
    }

    /// Where it goes on from; none is its beginning.
    pub fn checkpoint(&self) -> Option<&Checkpoint> {
        self.checkpoint.as_ref()
    }

    /// What was changed.
    pub fn changes(&self) -> &[Change] {
        &self.changes
    }

    /// Goes on with another model path or other settings, as `config.toml` names them.
    ///
    /// # Errors
    /// [`Error::Invalid`] for a setting that does not exist or cannot change any more, and, without
    /// `allow_change`, for one that breaks exactness.
    pub fn change(
        &mut self,
        model: Option<PathBuf>,
        settings: &toml::Table,
        allow_change: bool,
    ) -> Result<()> {
        self.allow_change = allow_change;
        if let Some(model) = model {
            self.config.model = model_path(&model)?;
        }
        let old = &self.config.train;
        let mut table = old.table()?;
        table.extend(settings.clone());
        let mut new = TrainConfig::from_table(table, "settings")?;
        if settings.contains_key("reward") {
            // Another program counts from here.
            new.rewards.reward_folder = None;
        }
        if settings.contains_key("env") {
            new.dialogues.env_folder = None;
        }
        let mut new = new.absolute()?;
        new.out = old.out.clone();
        self.changes = changes(old, &new)?;
        if self.checkpoint.is_some() {
            let list = |effect: Effect| {
                let found = self.changes.iter().filter(|c| c.effect == effect);
                found.map(|c| c.to_string()).collect::<Vec<_>>().join(", ")
            };
            let (impossible, inexact) = (list(Effect::Impossible), list(Effect::Inexact));
            if !impossible.is_empty() {
                let expected = "the adapter's settings as they are";
                let advice = "start another run with --adapter";
                return Err(Error::invalid("--resume", expected, impossible, advice));
            }
            if !inexact.is_empty() && !allow_change {
                let expected = "settings under which the run goes on exactly";
                let advice = "leave them out, or add --allow-change";
                return Err(Error::invalid("--resume", expected, inexact, advice));
            }
        }
        self.config.train = new;
        Ok(())
    }

    /// The trainer as it was at the checkpoint, or at the beginning where there is none.
    ///
    /// # Errors
    /// The model, the data or the checkpoint does not fit, or, without `allow_change`, the model's or the
    /// data's bytes are not those that the run began with.
    pub fn trainer<'m>(&self, model: &'m Model) -> Result<Trainer<'m>> {
        self.trainer_in(model, &Team::alone())
    }

    /// [`Resume::trainer`] as a rank of a team.
    pub fn trainer_in<'m>(&self, model: &'m Model, team: &Team) -> Result<Trainer<'m>> {
        let config = self.config.train.clone();
        let Some(checkpoint) = &self.checkpoint else {
            return Trainer::in_team(model, config, team);
        };
        let adapter = checkpoint.adapter();
        let began = checkpoint.number("began_unix_s")?;
        let was_invariant = config.batch_invariant;
        let mut trainer = Trainer::begun(model, config, Some(&adapter), began, team)?;
        if trainer.settings().batch_invariant && !was_invariant && !self.allow_change {
            return Err(Error::invalid(
                "--resume with several ranks",
                "a run with --batch-invariant, whose completions any number of ranks samples alike",
                "one without",
                "go on with one rank, or add --allow-change",
            ));
        }
        trainer.read_inputs()?;
        if let Some(change) = self.changed_input(&trainer)
            && !self.allow_change
        {
            let expected = "the bytes that the run began with";
            let advice = "put the old file back, or add --allow-change";
            return Err(Error::invalid("--resume", expected, change, advice));
        }
        checkpoint.restore(&mut trainer.state())?;
        Ok(trainer)
    }

    /// Which input differs from the checkpoint's.
    fn changed_input(&self, trainer: &Trainer<'_>) -> Option<String> {
        let meta = &self.checkpoint.as_ref()?.meta;
        let differs = meta.inputs.iter().find(|(name, sum)| trainer.inputs.get(*name) != Some(sum));
        differs.map(|(name, _)| format!("another {name} (its SHA-256 differs)"))
    }

    /// What is worth saying before the run goes on.
    pub(super) fn notes(&self, trainer: &Trainer<'_>) -> Vec<String> {
        let mut notes = Vec::new();
        for Damaged { path, reason } in &self.damaged {
            notes.push(format!("checkpoint {} is not used: {reason}", path.display()));
        }
        notes.push(match &self.checkpoint {
            Some(c) => format!("going on after step {} from {}", c.meta.step, c.path().display()),
            None => "no checkpoint yet: the run begins again".into(),
        });
        for change in &self.changes {
            let effect = match (&self.checkpoint, change.effect) {
                (Some(_), Effect::Inexact) => " (not the adapter of an uninterrupted run)",
                _ => "",
            };
            notes.push(format!("changed: {change}{effect}"));
        }
        notes.extend(self.changed_input(trainer).map(|input| format!("changed: {input}")));
        if let Some(Checkpoint { meta, .. }) = &self.checkpoint {
            let here = [("program", env!("CARGO_PKG_VERSION").into(), &meta.program)];
            let machine = [("processor", checkpoint::processor(), &meta.processor)];
            for (what, now, then) in here.into_iter().chain(machine) {
                if now != *then {
                    notes.push(format!(
                        "another {what} ({now}, before: {then}): last bits may differ from an uninterrupted run's"
                    ));
                }
            }
        }
        notes
    }
}

/// A model's path as `config.toml` holds it: absolute, or `demo`.
pub(super) fn model_path(path: &Path) -> Result<PathBuf> {
    if path.as_os_str() == DEMO {
        return Ok(path.into());
    }
    std::path::absolute(path).map_err(Error::io("find", path))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ggml::ByteSize;
    use crate::reward::RewardOptions;
    use crate::train::Schedule;

    #[test]
    fn every_setting_counts_as_inexact_unless_it_is_known_to_be_harmless() {
        let all = TrainConfig {
            eval_data: Some("held-out.jsonl".into()),
            memory: Some(ByteSize(1)),
            vram: Some(ByteSize(1)),
            out: Some("run".into()),
            ..TrainConfig::default()
        };
        let table = toml::Table::try_from(all).unwrap();
        for name in HARMLESS.into_iter().chain(HARMLESS_WITHOUT_PROGRAM) {
            assert!(table.contains_key(name), "{name} is no setting");
        }
        let old = TrainConfig::default();
        let new = TrainConfig { lr: Some(0.5), eval_every: 3, rank: 2, steps: 50, ..old.clone() };
        let found: Vec<_> =
            changes(&old, &new).unwrap().into_iter().map(|c| (c.name, c.effect)).collect();
        let expected = [
            ("eval-every", Effect::None),
            ("lr", Effect::Inexact),
            ("rank", Effect::Impossible),
            ("steps", Effect::None),
        ];
        assert!(found.iter().map(|(n, e)| (n.as_str(), *e)).eq(expected), "{found:?}");
        let falling = TrainConfig { schedule: Schedule::Cosine, ..old.clone() };
        let longer = TrainConfig { steps: 50, ..falling.clone() };
        assert_eq!(changes(&falling, &longer).unwrap()[0].effect, Effect::Inexact);
        assert!(changes(&old, &old).unwrap().is_empty());

        // A program may judge otherwise when it is started anew or asked again.
        let judged = |reward: &str, reward_timeout: f32| TrainConfig {
            rewards: RewardOptions {
                reward: Some(reward.into()),
                reward_timeout,
                ..RewardOptions::default()
            },
            ..old.clone()
        };
        for (reward, effect) in [("math", Effect::None), ("cmd:judge", Effect::Inexact)] {
            let found = changes(&judged(reward, 1.0), &judged(reward, 2.0)).unwrap();
            assert_eq!(found[0].effect, effect, "{reward}");
        }
    }
}
