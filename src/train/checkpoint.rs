//! Checkpoints: `checkpoints/step-N/` in the run folder, from which a run goes on to the bit.
//!
//! ```text
//! adapter.gguf        the adapter, for `generate`, llama.cpp and whoever looks
//! state.safetensors   the state's tensors (masters, moments), F32
//! state.json          step, counters, numbers, lengths of the logs, hashes of model and data
//! config.toml         the run's settings
//! SHA256SUMS          of the above, as `sha256sum -c` reads it; written last
//! ```
//!
//! A checkpoint is written beside its place, each file and the folder synced to disk, and renamed: its name
//! only ever stands for a complete one. What a disk does to it later is found by the sums.
//!
//! Random numbers need no state of their own: a completion's depend on the seed, its prompt's position in
//! the run and its index alone (`rollout/scheduler.rs`), a prompt's position on the step (`data/source.rs`).

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{Read, Write};
use std::path::{Path, PathBuf};

use safetensors::tensor::{Dtype, SafeTensors, View};
use serde::{Deserialize, Serialize};

use super::state::{State, tensor_key};
use crate::error::json_fault;
use crate::ggml::{MappedFile, TensorSet};
use crate::gguf::sha256;
use crate::{Error, Result};

const SUMS: &str = "SHA256SUMS";
const TENSORS: &str = "state.safetensors";
const META: &str = "state.json";
/// The adapter within a checkpoint.
const ADAPTER: &str = "adapter.gguf";
const CONFIG: &str = "config.toml";
/// What a checkpoint consists of, besides the sums.
const FILES: [&str; 4] = [ADAPTER, CONFIG, META, TENSORS];
/// Begins the names of folders in the making or on their way out; whatever has it can be removed.
const PARTIAL: &str = ".partial-";
const DAMAGED: &str = ".damaged";
/// Raised when older programs could not read what is written.
const FORMAT: u32 = 1;
/// Numbers that checkpoints of older versions do not have; they keep what they begin with.
const LATER: [&str; 2] = ["best_score", "without_gain"];
/// Bytes of a sums file or state.json beyond which it is not read.
const MAX_TEXT_BYTES: u64 = 16 << 20;

/// What stands in `state.json`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Meta {
    /// Version of the layout.
    pub format: u32,
    /// Steps done.
    pub step: u64,
    /// Version of the program that wrote it.
    pub program: String,
    /// Processor it was computed on.
    pub processor: String,
    /// Name and SHA-256 of what the run reads: the model, the data.
    pub inputs: BTreeMap<String, String>,
    /// Bytes of each log of the run folder at this step.
    pub logs: BTreeMap<String, u64>,
    counters: BTreeMap<String, u64>,
    // f64 as the 16 hex digits of their bits, since JSON has no NaN and readers round.
    numbers: BTreeMap<String, String>,
}

/// What a checkpoint is made of, besides the state.
pub struct Parts<'p> {
    /// Steps done.
    pub step: u64,
    /// Hashes of model and data.
    pub inputs: &'p BTreeMap<String, String>,
    /// Bytes of each log.
    pub logs: BTreeMap<String, u64>,
    /// The text of `config.toml`.
    pub config: &'p str,
}

/// A complete checkpoint whose sums are right.
#[derive(Debug)]
pub struct Checkpoint {
    path: PathBuf,
    /// What `state.json` says.
    pub meta: Meta,
}

/// Files by name with their bytes.
pub type Files = Vec<(String, Vec<u8>)>;

/// A checkpoint that is not used, and why.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Damaged {
    /// Its folder.
    pub path: PathBuf,
    /// What is wrong with it.
    pub reason: String,
}

/// Writes the checkpoint of a step into `folder`, complete or not at all; `adapter` is a file of the same
/// masters, which is copied.
///
/// # Errors
/// Those of the system. Older checkpoints are then as they were, and what was written of this one is
/// removed.
pub fn write(
    folder: &Path,
    parts: Parts<'_>,
    state: &State<'_>,
    adapter: &Path,
) -> Result<PathBuf> {
    fs::create_dir_all(folder).map_err(Error::io("create", folder))?;
    let name = format!("step-{}", parts.step);
    let partial = folder.join(format!("{PARTIAL}{name}"));
    let done = folder.join(&name);
    let outcome = fill(&partial, parts, state, adapter).and_then(|()| {
        // Only a run that was set back to an older checkpoint finds one here.
        remove(&done)?;
        fs::rename(&partial, &done).map_err(Error::io("rename to", &done))?;
        sync_folder(folder)
    });
    if outcome.is_err() {
        // Best effort: the next start removes what is left of it.
        let _ = fs::remove_dir_all(&partial);
    }
    outcome.map(|()| done)
}

fn fill(partial: &Path, parts: Parts<'_>, state: &State<'_>, adapter: &Path) -> Result<()> {
    match fs::remove_dir_all(partial) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => {
            return Err(Error::Io { action: "remove", path: partial.into(), source: e });
        }
        _ => fs::create_dir(partial).map_err(Error::io("create", partial))?,
    }
    let copy = partial.join(ADAPTER);
    fs::copy(adapter, &copy).map_err(Error::io("write", &copy))?;
    sync_file(&copy)?;
    write_tensors(&partial.join(TENSORS), state)?;
    let meta = Meta {
        format: FORMAT,
        step: parts.step,
        program: env!("CARGO_PKG_VERSION").into(),
        processor: processor(),
        inputs: parts.inputs.clone(),
        logs: parts.logs,
        counters: state.counters.iter().map(|(name, value)| (name.clone(), **value)).collect(),
        numbers: state
            .numbers
            .iter()
            .map(|(name, value)| (name.clone(), format!("{:016x}", value.to_bits())))
            .collect(),
    };
    let text = serde_json::to_string_pretty(&meta)
        .map_err(|e| Error::engine("writing state.json", e.to_string(), "report it"))?;
    write_synced(&partial.join(META), text.as_bytes())?;
    write_synced(&partial.join(CONFIG), parts.config.as_bytes())?;
    let mut sums = String::new();
    for name in FILES {
        sums += &format!("{}  {name}\n", sha256(&partial.join(name))?);
    }
    write_synced(&partial.join(SUMS), sums.as_bytes())?;
    sync_folder(partial)
}

/// One tensor of a set, handed to the writer when its turn comes.
struct Stored<'s> {
    set: &'s TensorSet,
    index: usize,
    shape: Vec<usize>,
}

impl View for Stored<'_> {
    fn dtype(&self) -> Dtype {
        Dtype::F32
    }

    fn shape(&self) -> &[usize] {
        &self.shape
    }

    fn data(&self) -> std::borrow::Cow<'_, [u8]> {
        self.set.values(self.index).iter().flat_map(|x| x.to_le_bytes()).collect::<Vec<_>>().into()
    }

    fn data_len(&self) -> usize {
        4 * self.set.get(self.index).len()
    }
}

/// Extents as safetensors counts them, rows first: `[ne3, ne2, ne1, ne0]`.
fn shape(set: &TensorSet, index: usize) -> Vec<usize> {
    set.get(index).shape().into_iter().rev().collect()
}

fn write_tensors(path: &Path, state: &State<'_>) -> Result<()> {
    let mut views = Vec::new();
    for (group, set) in &state.tensors {
        for index in 0..set.len() {
            let key = tensor_key(group, set, index);
            views.push((key, Stored { set, index, shape: shape(set, index) }));
        }
    }
    safetensors::serialize_to_file(views, None, path).map_err(|e| match e {
        safetensors::SafeTensorError::IoError(source) => {
            Error::Io { action: "write", path: path.into(), source }
        }
        other => {
            Error::engine(format!("writing {}", path.display()), other.to_string(), "report it")
        }
    })?;
    sync_file(path)
}

fn sync_file(path: &Path) -> Result<()> {
    let file = File::open(path).map_err(Error::io("open", path))?;
    file.sync_all().map_err(Error::io("sync", path))
}

fn write_synced(path: &Path, bytes: &[u8]) -> Result<()> {
    let mut file = File::create_new(path).map_err(Error::io("create", path))?;
    file.write_all(bytes).map_err(Error::io("write", path))?;
    file.sync_all().map_err(Error::io("sync", path))
}

/// Makes what was created or renamed in a folder last; only Unix can.
fn sync_folder(folder: &Path) -> Result<()> {
    if cfg!(unix) {
        let handle = File::open(folder).map_err(Error::io("open", folder))?;
        handle.sync_all().map_err(Error::io("sync", folder))?;
    }
    Ok(())
}

/// The newest checkpoint of a folder whose sums are right, and the newer ones that are not used.
///
/// # Errors
/// [`Error::Io`] when the folder is there and cannot be read.
pub fn newest(folder: &Path) -> Result<(Option<Checkpoint>, Vec<Damaged>)> {
    let mut damaged = Vec::new();
    for (step, path) in steps(folder)?.into_iter().rev() {
        match Checkpoint::open(&path, step) {
            Ok(checkpoint) => return Ok((Some(checkpoint), damaged)),
            Err(reason) => damaged.push(Damaged { path, reason: reason.to_string() }),
        }
    }
    Ok((None, damaged))
}

/// `step-N` folders, by N.
fn steps(folder: &Path) -> Result<BTreeMap<u64, PathBuf>> {
    let mut found = BTreeMap::new();
    for path in entries(folder)? {
        let name = path.file_name().and_then(|n| n.to_str()).unwrap_or_default();
        if let Some(step) = name.strip_prefix("step-").and_then(|n| n.parse().ok()) {
            found.insert(step, path);
        }
    }
    Ok(found)
}

fn entries(folder: &Path) -> Result<Vec<PathBuf>> {
    let entries = match fs::read_dir(folder) {
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        other => other.map_err(Error::io("read folder", folder))?,
    };
    entries.map(|e| e.map(|e| e.path()).map_err(Error::io("read folder", folder))).collect()
}

/// Removes what a run that was killed left half-written, and puts damaged checkpoints aside as
/// `step-N.damaged`. Only for who holds the run folder's lock.
pub fn tidy(folder: &Path, damaged: &[Damaged]) -> Result<()> {
    for path in entries(folder)? {
        if path.file_name().is_some_and(|n| n.to_string_lossy().starts_with(PARTIAL)) {
            fs::remove_dir_all(&path).map_err(Error::io("remove", &path))?;
        }
    }
    for Damaged { path, .. } in damaged {
        let aside = path.with_extension(&DAMAGED[1..]);
        remove(&aside)?;
        fs::rename(path, &aside).map_err(Error::io("rename to", &aside))?;
    }
    Ok(())
}

/// Removes all checkpoints but the newest `keep`; 0 keeps all.
pub fn prune(folder: &Path, keep: usize) -> Result<()> {
    let steps = steps(folder)?;
    let surplus = if keep == 0 { 0 } else { steps.len().saturating_sub(keep) };
    steps.values().take(surplus).try_for_each(|path| remove(path))
}

/// Takes a checkpoint's name away before its files, so that no name stands for a part of one.
fn remove(path: &Path) -> Result<()> {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let away = path.with_file_name(format!("{PARTIAL}removed-{name}"));
    match fs::rename(path, &away) {
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(()),
        other => other.map_err(Error::io("rename to", &away))?,
    }
    fs::remove_dir_all(&away).map_err(Error::io("remove", &away))
}

impl Checkpoint {
    /// Its name, and its files by name with their bytes.
    ///
    /// # Errors
    /// [`Error::Io`] when one cannot be read.
    pub fn files(&self) -> Result<(String, Files)> {
        let read = |name: &str| {
            let path = self.path.join(name);
            Ok((name.to_string(), fs::read(&path).map_err(Error::io("read", &path))?))
        };
        let name = self.path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let files = FILES.into_iter().chain([SUMS]).map(read).collect::<Result<_>>()?;
        Ok((name, files))
    }

    /// Opens a checkpoint and checks every byte of it.
    fn open(path: &Path, step: u64) -> Result<Checkpoint> {
        let sums = read_text(&path.join(SUMS))?;
        for name in FILES {
            let expected = sums
                .lines()
                .find_map(|line| line.strip_suffix(name)?.strip_suffix("  "))
                .unwrap_or("no sum for it in SHA256SUMS");
            let got = sha256(&path.join(name))?;
            if got != expected {
                let place = path.join(name).display().to_string();
                return Err(Error::invalid(
                    place,
                    format!("sha256 {expected}"),
                    got,
                    "the checkpoint is damaged",
                ));
            }
        }
        let place = path.join(META);
        let meta: Meta = serde_json::from_str(&read_text(&place)?).map_err(|e| {
            Error::invalid(place.display().to_string(), "the state", json_fault(&e), "use another")
        })?;
        if (meta.format, meta.step) != (FORMAT, step) {
            return Err(Error::invalid(
                place.display().to_string(),
                format!("format {FORMAT} and step {step}"),
                format!("format {} and step {}", meta.format, meta.step),
                "resume with the program that wrote it",
            ));
        }
        Ok(Checkpoint { path: path.into(), meta })
    }

    /// Its folder.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The adapter's file.
    pub fn adapter(&self) -> PathBuf {
        self.path.join(ADAPTER)
    }

    /// A number of the state, before the state is there.
    ///
    /// # Errors
    /// [`Error::Invalid`] when there is none of that name.
    pub fn number(&self, name: &str) -> Result<f64> {
        let stored = self.meta.numbers.get(name);
        let bits = stored.and_then(|hex| u64::from_str_radix(hex, 16).ok());
        bits.map(f64::from_bits).ok_or_else(|| {
            let got = stored.map_or("no such entry".into(), String::clone);
            let advice = "the checkpoint belongs to another program version or other settings";
            Error::invalid(format!("{}: {name}", self.path.display()), "16 hex digits", got, advice)
        })
    }

    /// Writes what the checkpoint holds into the state's places.
    ///
    /// # Errors
    /// [`Error::Invalid`] naming the first place that the checkpoint does not hold, holds in another shape,
    /// or holds beyond those of the state. The state may then be half-restored.
    pub fn restore(&self, state: &mut State<'_>) -> Result<()> {
        let place = self.path.join(TENSORS);
        let map = MappedFile::open(&place)?;
        let file = SafeTensors::deserialize(&map).map_err(|e| {
            Error::invalid(place.display().to_string(), "safetensors", e.to_string(), "use another")
        })?;
        let refuse = |name: &str, expected: String, got: String| {
            Error::invalid(
                format!("{}: {name}", self.path.display()),
                expected,
                got,
                "the checkpoint belongs to another program version or other settings",
            )
        };
        let none = || "no such entry".to_string();
        let mut known = Vec::new();
        for (group, set) in &mut state.tensors {
            for index in 0..set.len() {
                let key = tensor_key(group, set, index);
                let expected = shape(set, index);
                let tensor = file
                    .tensor(&key)
                    .map_err(|_| refuse(&key, format!("F32 {expected:?}"), none()))?;
                if tensor.dtype() != Dtype::F32 || tensor.shape() != expected {
                    let got = format!("{:?} {:?}", tensor.dtype(), tensor.shape());
                    return Err(refuse(&key, format!("F32 {expected:?}"), got));
                }
                let mut values = set.values_mut(index);
                for (value, bytes) in values.iter_mut().zip(tensor.data().as_chunks::<4>().0) {
                    *value = f32::from_le_bytes(*bytes);
                }
                known.push(key);
            }
        }
        for (name, value) in &mut state.counters {
            let stored = self.meta.counters.get(name);
            **value = *stored.ok_or_else(|| refuse(name, "a count".into(), none()))?;
        }
        for (name, value) in &mut state.numbers {
            let stored = self.meta.numbers.get(name);
            if stored.is_none() && LATER.contains(&name.as_str()) {
                continue;
            }
            let stored = stored.ok_or_else(|| refuse(name, "a number".into(), none()))?;
            let bits = u64::from_str_radix(stored, 16)
                .map_err(|_| refuse(name, "16 hex digits".into(), stored.clone()))?;
            **value = f64::from_bits(bits);
        }
        let beyond = file
            .names()
            .into_iter()
            .find(|name| !known.iter().any(|k| k == name))
            .or_else(|| unknown(&self.meta.counters, &state.counters))
            .or_else(|| unknown(&self.meta.numbers, &state.numbers));
        match beyond {
            Some(name) => Err(refuse(name, "nothing of that name".into(), "an entry".into())),
            None => Ok(()),
        }
    }
}

/// A name that is stored and that the state does not have.
fn unknown<'n, A, B>(stored: &'n BTreeMap<String, A>, state: &[(String, B)]) -> Option<&'n str> {
    stored.keys().find(|name| !state.iter().any(|(n, _)| n == *name)).map(String::as_str)
}

fn read_text(path: &Path) -> Result<String> {
    let file = File::open(path).map_err(Error::io("open", path))?;
    let mut text = String::new();
    file.take(MAX_TEXT_BYTES).read_to_string(&mut text).map_err(Error::io("read", path))?;
    Ok(text)
}

/// The processor's name; another one may round otherwise in the last bit.
pub fn processor() -> String {
    let text = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let line = text.lines().find(|line| line.starts_with("model name"));
    let name = line.and_then(|line| line.split_once(':')).map(|(_, name)| name.trim().to_string());
    name.unwrap_or_else(|| std::env::consts::ARCH.into())
}
