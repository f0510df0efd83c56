//! The folder of a run: its lock, its settings, its logs. One run at a time writes into it.

use std::collections::BTreeMap;
use std::fs::{self, File, OpenOptions, TryLockError};
use std::io::{BufWriter, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::{StepRecord, Summary, TrainConfig};
use crate::analysis::report::Events;
use crate::data::jsonl::JsonLines;
use crate::{Error, Result};

const LOCK: &str = ".lock";
const CONFIG: &str = "config.toml";
const METRICS: &str = "metrics.jsonl";
const COMPLETIONS: &str = "completions.jsonl";
const SUMMARY: &str = "summary.json";

/// A run folder that this run owns until it is dropped, or until its process ends in whatever way: the
/// system gives the lock back, so none is ever stale.
pub struct RunDir {
    path: PathBuf,
    logs: BTreeMap<String, BufWriter<File>>,
    lock: File,
}

/// The text of `config.toml`: enough to go on with the run.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RunConfig {
    /// Path of the model, or `demo`.
    pub model: PathBuf,
    /// All settings, defaults included.
    pub train: TrainConfig,
}

impl RunConfig {
    /// Reads `config.toml` of a run folder.
    ///
    /// # Errors
    /// [`Error::Io`] when it is not there, [`Error::Invalid`] when it says what no setting is.
    pub fn read(folder: &Path) -> Result<RunConfig> {
        let path = folder.join(CONFIG);
        let wrong = |got: &str| {
            let advice = "restore the file, or start another run";
            Error::invalid(path.display().to_string(), "the settings of a run", got, advice)
        };
        let (model, train) = parts(&path)?;
        let (Some(model), Some(train)) = (model, train) else {
            return Err(wrong("no model or no [train]"));
        };
        // Older runs had MiB in two settings, one for all memory and one for kept activations.
        let older = ["memory-mib", "memory"];
        if let Some(key) = older.iter().find(|key| train.get(**key).is_some_and(|v| v.is_integer()))
        {
            return Err(Error::invalid(
                path.display().to_string(),
                "the settings of a run",
                format!("{key}, as an older version wrote it"),
                "in its place write memory = \"12GiB\", all that the run may take, or nothing",
            ));
        }
        let train = TrainConfig::from_table(train, &path.display().to_string())?;
        train.check()?;
        Ok(RunConfig { model, train })
    }

    /// Model and settings of another run: from a file as `config.toml`, or of settings alone, with `given` in their place.
    /// Its folder, and what was found out for it, are not taken over.
    ///
    /// # Errors
    /// [`Error::Io`] when it is not there, [`Error::Invalid`] when it says what no setting is.
    pub fn template(path: &Path, given: &toml::Table) -> Result<(Option<PathBuf>, TrainConfig)> {
        let (model, train) = parts(path)?;
        let mut settings = train.unwrap_or_default();
        ["out", "internal-layer-why"].iter().for_each(|name| drop(settings.remove(*name)));
        for (option, folder) in [("reward", "reward-folder"), ("env", "env-folder")] {
            if given.contains_key(option) {
                settings.remove(folder);
            }
        }
        settings.extend(given.clone());
        let train = TrainConfig::from_table(settings, &path.display().to_string())?;
        Ok((model, train))
    }

    /// What `config.toml` holds.
    pub fn text(&self) -> Result<String> {
        let mut file = toml::Table::new();
        file.insert("model".into(), self.model.display().to_string().into());
        file.insert("train".into(), self.train.table()?.into());
        let text = toml::to_string(&file)
            .map_err(|e| Error::engine("writing config.toml", e.to_string(), "report it"))?;
        Ok(match &self.train.out {
            Some(out) => {
                format!("# Go on with this run: bupo-gguf train --resume {}\n{text}", out.display())
            }
            None => format!("# Run it: bupo-gguf train --config THIS-FILE\n{text}"),
        })
    }
}

/// Model and settings of a file as `config.toml`; what stands before any table are settings where it has no `[train]`.
fn parts(path: &Path) -> Result<(Option<PathBuf>, Option<toml::Table>)> {
    let text = fs::read_to_string(path).map_err(Error::io("read", path))?;
    let wrong = |got: String| {
        let advice = "mend it; the config.toml of a run is one";
        Error::invalid(path.display().to_string(), "the settings of a run", got, advice)
    };
    let mut file: toml::Table =
        text.parse().map_err(|e: toml::de::Error| wrong(e.to_string().replace('\n', " ")))?;
    let model = match file.remove("model") {
        Some(toml::Value::String(model)) => Some(PathBuf::from(model)),
        Some(other) => return Err(wrong(format!("model = {other}"))),
        None => None,
    };
    match file.remove("train") {
        Some(toml::Value::Table(train)) => match file.keys().next() {
            Some(name) => Err(wrong(format!("unknown {name}"))),
            None => Ok((model, Some(train))),
        },
        Some(_) => Err(wrong("train is no table".into())),
        None if file.is_empty() => Ok((model, None)),
        None => Ok((model, Some(file))),
    }
}

impl RunDir {
    /// Makes the folder of a new run, takes it, and writes `config.toml`.
    ///
    /// # Errors
    /// [`Error::Invalid`] when there is something in it already (nothing is written over) or another run
    /// holds it.
    pub fn create(path: &Path, config: &str) -> Result<RunDir> {
        RunDir::check(path)?;
        fs::create_dir_all(path).map_err(Error::io("create", path))?;
        let dir = RunDir::take(path)?;
        // Again, now that nobody else can write.
        RunDir::check(path)?;
        dir.write_config(config)?;
        Ok(dir)
    }

    /// Takes the folder of a run that is to go on.
    ///
    /// # Errors
    /// [`Error::Invalid`] when another run holds it, [`Error::Io`] when it is not there.
    pub fn reopen(path: &Path) -> Result<RunDir> {
        let config = path.join(CONFIG);
        fs::metadata(&config).map_err(Error::io("read", &config))?;
        RunDir::take(path)
    }

    fn take(path: &Path) -> Result<RunDir> {
        let place = path.join(LOCK);
        let mut options = OpenOptions::new();
        let mut lock = options
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .open(&place)
            .map_err(Error::io("open", &place))?;
        match lock.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => {
                let mut holder = String::new();
                let _ = lock.take(20).read_to_string(&mut holder);
                return Err(Error::invalid(
                    path.display().to_string(),
                    "a folder that no other run writes to",
                    format!("one held by process {}", holder.trim()),
                    "choose another with --out, or wait for that run to end",
                ));
            }
            Err(TryLockError::Error(e)) => {
                return Err(Error::Io { action: "lock", path: place, source: e });
            }
        }
        // What a killed run was writing; nobody else writes here now.
        for entry in fs::read_dir(path).map_err(Error::io("read folder", path))? {
            let entry = entry.map_err(Error::io("read folder", path))?;
            if is_leftover(&entry.file_name()) {
                fs::remove_file(entry.path()).map_err(Error::io("remove", entry.path()))?;
            }
        }
        // For people; the lock itself is the system's.
        let _ = lock.set_len(0).and_then(|()| writeln!(lock, "{}", std::process::id()));
        Ok(RunDir { path: path.into(), logs: BTreeMap::new(), lock })
    }

    /// Refuses a folder that is not empty, before long work begins.
    pub fn check(path: &Path) -> Result<()> {
        let entries = match fs::read_dir(path) {
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(()),
            other => other.map_err(Error::io("read folder", path))?,
        };
        for entry in entries {
            let entry = entry.map_err(Error::io("read folder", path))?;
            // A run that was killed at its very start leaves no more than this.
            let name = entry.file_name();
            if name != LOCK && !is_leftover(&name) {
                return Err(Error::invalid(
                    format!("--out {}", path.display()),
                    "an empty or new folder",
                    "one with files",
                    "choose another, remove it, or go on with its run by --resume",
                ));
            }
        }
        Ok(())
    }

    /// Writes `config.toml`.
    pub fn write_config(&self, text: &str) -> Result<()> {
        let path = self.path.join(CONFIG);
        crate::gguf::write_atomically(&path, |w| {
            w.write_all(text.as_bytes()).map_err(Error::io("write", &path))
        })
    }

    /// The folder.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Where the adapter lies.
    pub fn adapter(&self) -> PathBuf {
        RunDir::adapter_in(&self.path)
    }

    /// Where the adapter of a run in this folder lies.
    pub fn adapter_in(folder: &Path) -> PathBuf {
        folder.join("adapter.gguf")
    }

    /// Where the best adapter of the evaluations between steps lies.
    pub fn best_adapter(&self) -> PathBuf {
        self.path.join("adapter-best.gguf")
    }

    /// An event file for TensorBoard, with what the logs hold so far, so that a run that went back to a checkpoint has
    /// each step once.
    ///
    /// # Errors
    /// A log is damaged, or the disk refuses.
    pub fn events(&mut self, began: f64) -> Result<Events> {
        self.flush()?;
        let mut events = Events::create(&self.path.join("tensorboard"), began)?;
        let read = |name: &str| -> Result<Vec<Value>> {
            let path = self.path.join(name);
            match path.exists() {
                true => JsonLines::open(&path)?.map(|row| Ok(Value::Object(row?.object))).collect(),
                false => Ok(Vec::new()),
            }
        };
        let completions = read(COMPLETIONS)?;
        for record in read(METRICS)? {
            let of_step = completions.iter().filter(|c| c.get("step") == record.get("step"));
            events.step(&record, &of_step.cloned().collect::<Vec<_>>())?;
        }
        Ok(events)
    }

    /// Where checkpoints lie.
    pub fn checkpoints(&self) -> PathBuf {
        self.path.join("checkpoints")
    }

    /// Writes `summary.json`.
    ///
    /// # Errors
    /// [`Error::Io`] when the disk refuses; an older one then stays.
    pub fn write_summary(&self, summary: &Summary) -> Result<()> {
        crate::gguf::write_json_atomically(&self.path.join(SUMMARY), summary)
    }

    /// Appends to `metrics.jsonl`.
    pub fn metrics(&mut self, record: &StepRecord) -> Result<()> {
        self.log(METRICS, record)
    }

    /// Appends to `completions.jsonl`.
    pub fn completion(&mut self, record: &impl Serialize) -> Result<()> {
        self.log(COMPLETIONS, record)
    }

    /// Appends a line to a log of this name; a resume cuts every log back to its checkpoint.
    pub fn log(&mut self, name: &str, record: &impl Serialize) -> Result<()> {
        let path = self.path.join(name);
        if !self.logs.contains_key(name) {
            let file = OpenOptions::new().create(true).append(true).open(&path);
            let file = file.map_err(Error::io("create", &path))?;
            self.logs.insert(name.into(), BufWriter::new(file));
        }
        let out = self.logs.get_mut(name).expect("just opened");
        serde_json::to_writer(&mut *out, record)
            .map_err(std::io::Error::from)
            .and_then(|()| out.write_all(b"\n"))
            .map_err(Error::io("write", &path))
    }

    /// Hands everything to the system, and looks whether the folder is still the one that was opened.
    ///
    /// # Errors
    /// [`Error::Io`] when the disk refuses, [`Error::Invalid`] when the folder was removed meanwhile.
    pub fn flush(&mut self) -> Result<()> {
        for (name, log) in &mut self.logs {
            let path = self.path.join(name);
            log.flush().map_err(Error::io("write", &path))?;
        }
        if self.is_lost() {
            return Err(Error::invalid(
                self.path.display().to_string(),
                "the run's folder to stay where it is",
                "nothing there any more",
                "the run stops; what it had learnt is saved there again: go on with --resume",
            ));
        }
        Ok(())
    }

    /// Whether the folder was removed or replaced since it was taken.
    pub fn is_lost(&self) -> bool {
        let there = fs::metadata(self.path.join(LOCK));
        match (there, self.lock.metadata()) {
            (Ok(there), Ok(ours)) => !is_same_file(&there, &ours),
            _ => true,
        }
    }

    /// Bytes of each log, once they are on the disk.
    pub fn sync(&mut self) -> Result<BTreeMap<String, u64>> {
        self.flush()?;
        let mut lengths = BTreeMap::new();
        for (name, log) in &self.logs {
            let path = self.path.join(name);
            log.get_ref().sync_data().map_err(Error::io("sync", &path))?;
            let bytes = log.get_ref().metadata().map_err(Error::io("read", &path))?.len();
            lengths.insert(name.clone(), bytes);
        }
        Ok(lengths)
    }

    /// Makes the folder again after it was removed: lock, settings, empty logs.
    pub fn restore(&mut self, config: &str) -> Result<()> {
        self.logs.clear();
        fs::create_dir_all(&self.path).map_err(Error::io("create", &self.path))?;
        *self = RunDir::take(&self.path)?;
        self.write_config(config)
    }

    /// Cuts the logs back to these lengths, those without one to nothing, and says what was odd.
    pub fn cut(&mut self, lengths: &BTreeMap<String, u64>) -> Result<Vec<String>> {
        let mut odd = Vec::new();
        self.logs.clear();
        for entry in fs::read_dir(&self.path).map_err(Error::io("read folder", &self.path))? {
            let path = entry.map_err(Error::io("read folder", &self.path))?.path();
            let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
            if !name.ends_with(".jsonl") {
                continue;
            }
            let wanted = lengths.get(&name).copied().unwrap_or(0);
            let mut file = OpenOptions::new()
                .read(true)
                .append(true)
                .open(&path)
                .map_err(Error::io("open", &path))?;
            let has = file.metadata().map_err(Error::io("read", &path))?.len();
            if has < wanted {
                odd.push(format!("{name} has lost lines: {has} of {wanted} bytes are there"));
            }
            let keep =
                last_line_end(&mut file, wanted.min(has)).map_err(Error::io("read", &path))?;
            file.set_len(keep).map_err(Error::io("shorten", &path))?;
            file.sync_all().map_err(Error::io("sync", &path))?;
            self.logs.insert(name, BufWriter::new(file));
        }
        let missing = lengths.keys().filter(|name| !self.logs.contains_key(*name));
        odd.extend(missing.map(|name| format!("{name} is gone: its lines are lost")));
        Ok(odd)
    }
}

/// Whether a name is that of a file which `gguf::write_atomically` had not finished.
fn is_leftover(name: &std::ffi::OsStr) -> bool {
    name.to_string_lossy().starts_with(".partial-")
}

#[cfg(unix)]
fn is_same_file(a: &fs::Metadata, b: &fs::Metadata) -> bool {
    use std::os::unix::fs::MetadataExt;
    (a.dev(), a.ino()) == (b.dev(), b.ino())
}

#[cfg(not(unix))]
fn is_same_file(_: &fs::Metadata, _: &fs::Metadata) -> bool {
    true // Windows does not remove a folder with an open file.
}

/// The end of the last whole line within the first `limit` bytes.
fn last_line_end(file: &mut File, limit: u64) -> std::io::Result<u64> {
    const STEP: u64 = 1 << 16;
    let mut end = limit;
    while end > 0 {
        let start = end.saturating_sub(STEP);
        let mut block = vec![0u8; (end - start) as usize];
        file.seek(SeekFrom::Start(start))?;
        file.read_exact(&mut block)?;
        if let Some(at) = block.iter().rposition(|&b| b == b'\n') {
            return Ok(start + at as u64 + 1);
        }
        end = start;
    }
    Ok(0)
}
