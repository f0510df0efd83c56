//! The files of a dump: records appended, what is whole noted beside them.

use std::fs::{self, File, OpenOptions};
use std::io::{BufRead, BufReader, BufWriter, Write};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::dump::Settings;
use super::lenses::Lenses;
use super::parquet;
use super::record::{Kind, Record, columns};
use super::samples::{Gallery, SAMPLES};
use crate::error::json_fault;
use crate::gguf::{refuse_filled, write_atomically};
use crate::{Error, Result};

/// Names of the record files by side, without their ending.
pub const RECORDS: [&str; 2] = ["entropy", "compare"];
const PROGRESS: &str = "progress.json";
/// The first completions through the other lens.
const LENS: &str = "lens.json";

/// What of the record files is whole.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Progress {
    settings: Settings,
    /// Rows of the data that are done.
    pub rows: u64,
    /// Completions measured.
    pub samples: u64,
    /// Rows left out.
    pub refused: u64,
    /// Why, of the first.
    pub reasons: Vec<String>,
    // Length of each record file.
    bytes: Vec<u64>,
    /// The first tokens through both lenses.
    #[serde(default)]
    pub lenses: Lenses,
    /// Prompts of the first completions.
    #[serde(default)]
    pub prompts: Vec<String>,
    /// Positions whose hidden states are written.
    #[serde(default)]
    pub hidden: u64,
}

/// The record files in the making.
pub struct DumpFiles {
    out: PathBuf,
    writers: Vec<BufWriter<File>>,
    // Of each side.
    columns: Vec<Vec<(String, Kind)>>,
    progress: Progress,
    other_lens: Gallery,
    // Tokens that `lenses` had taken when LENS was written.
    lens_tokens: usize,
}

impl DumpFiles {
    /// Makes the folder, or goes on with it: then `replay` gets the records that are there, those of both
    /// sides for one place together. `mixtures`: whether a side is a mixture of experts; with no side there are no records,
    /// and what is whole is noted alone.
    ///
    /// # Errors
    /// Without `resume`, a folder that is not empty; with it, one without a dump of these settings.
    pub fn open(
        out: &Path,
        settings: &Settings,
        mixtures: &[bool],
        resume: bool,
        mut replay: impl FnMut(&[Record]),
    ) -> Result<DumpFiles> {
        let sides = mixtures.len();
        let progress = if resume { read_progress(out, settings)? } else { None };
        let paths: Vec<PathBuf> =
            RECORDS[..sides].iter().map(|name| out.join(format!("{name}.jsonl"))).collect();
        let progress = match progress {
            Some(progress) => {
                replay_files(&paths, &progress, &mut replay)?;
                progress
            }
            None => {
                refuse_filled("--out", out, "choose another, or go on with it by --resume")?;
                fs::create_dir_all(out).map_err(Error::io("create", out))?;
                Progress {
                    settings: settings.clone(),
                    rows: 0,
                    samples: 0,
                    refused: 0,
                    reasons: Vec::new(),
                    bytes: vec![0; sides],
                    lenses: Lenses::default(),
                    prompts: Vec::new(),
                    hidden: 0,
                }
            }
        };
        let open = |path: &PathBuf| {
            let file = OpenOptions::new().create(true).append(true).open(path);
            file.map(BufWriter::new).map_err(Error::io("write", path))
        };
        let writers = paths.iter().map(open).collect::<Result<_>>()?;
        let columns = mixtures.iter().map(|&m| columns(settings.look.top_k > 0, m)).collect();
        let other_lens = read_other_lens(out, &progress)?;
        let lens_tokens = progress.lenses.tokens;
        let mut files =
            DumpFiles { out: out.into(), writers, columns, progress, other_lens, lens_tokens };
        if sides == 0 {
            files.note()?;
        }
        Ok(files)
    }

    /// What is whole.
    pub fn progress(&self) -> &Progress {
        &self.progress
    }

    /// The first tokens through both lenses, to be added to; kept with the next commit.
    pub fn lenses(&mut self) -> &mut Lenses {
        &mut self.progress.lenses
    }

    /// The first completions through the other lens, to be added to; kept with the next commit.
    pub fn other_lens(&mut self) -> &mut Gallery {
        &mut self.other_lens
    }

    /// Positions whose hidden states are written, noted with the next commit.
    pub fn hidden(&mut self, positions: u64) {
        self.progress.hidden = positions;
    }

    /// Keeps the prompt of a completion, the `sample`th, where it is one of those that are looked at.
    pub fn keep_prompt(&mut self, sample: u64, prompt: impl FnOnce() -> String) {
        let prompts = &mut self.progress.prompts;
        if sample < SAMPLES as u64 && prompts.len() as u64 == sample {
            prompts.push(prompt());
        }
    }

    /// Takes the JSON lines away, Parquet holding the same, and with them what a resumed dump would need.
    ///
    /// # Errors
    /// [`Error::Io`] when the system refuses.
    pub fn drop_json_lines(out: &Path) -> Result<()> {
        let names = RECORDS.iter().map(|name| format!("{name}.jsonl"));
        for path in names.chain([PROGRESS, LENS].map(Into::into)).map(|name| out.join(name)) {
            if path.exists() {
                fs::remove_file(&path).map_err(Error::io("remove", &path))?;
            }
        }
        Ok(())
    }

    /// Appends the records of one place, one for each side.
    pub fn write(&mut self, records: &[Record]) -> Result<()> {
        for ((record, out), columns) in records.iter().zip(&mut self.writers).zip(&self.columns) {
            record.write(columns, out).map_err(Error::io("write records in", &self.out))?;
        }
        Ok(())
    }

    /// Notes that all that was written so far is whole, and which rows it covers.
    pub fn commit(
        &mut self,
        rows: u64,
        samples: u64,
        refused: u64,
        reasons: &[String],
    ) -> Result<()> {
        for (out, bytes) in self.writers.iter_mut().zip(&mut self.progress.bytes) {
            let length = out.flush().and_then(|()| out.get_ref().metadata());
            *bytes = length.map_err(Error::io("write records in", &self.out))?.len();
        }
        let p = &mut self.progress;
        (p.rows, p.samples, p.refused, p.reasons) = (rows, samples, refused, reasons.to_vec());
        if self.lens_tokens < p.lenses.tokens {
            self.lens_tokens = p.lenses.tokens;
            write_json(&self.out.join(LENS), &self.other_lens)?;
        }
        self.note()
    }

    fn note(&mut self) -> Result<()> {
        write_json(&self.out.join(PROGRESS), &self.progress)
    }

    /// Cuts off what is not whole and writes the Parquet files.
    pub fn finish(&mut self) -> Result<()> {
        let files = RECORDS.iter().zip(&mut self.writers).zip(&self.progress.bytes);
        for (((name, out), &bytes), columns) in files.zip(&self.columns) {
            let from = self.out.join(format!("{name}.jsonl"));
            out.flush()
                .and_then(|()| out.get_ref().set_len(bytes))
                .map_err(Error::io("cut", &from))?;
            let to = self.out.join(format!("{name}.parquet"));
            parquet::from_json_lines(&from, columns, &to)?;
        }
        Ok(())
    }

    /// Takes the files away again: nothing was measured.
    pub fn discard(self) -> Result<()> {
        let names = RECORDS.iter().flat_map(|n| [format!("{n}.jsonl"), format!("{n}.parquet")]);
        for path in names.chain([PROGRESS, LENS].map(Into::into)).map(|name| self.out.join(name)) {
            if path.exists() {
                fs::remove_file(&path).map_err(Error::io("remove", &path))?;
            }
        }
        match fs::remove_dir(&self.out) {
            Err(e) if e.kind() != std::io::ErrorKind::NotFound => {
                Err(Error::io("remove", &self.out)(e))
            }
            _ => Ok(()),
        }
    }
}

/// On one line: it is written again and again.
fn write_json(path: &Path, what: &impl Serialize) -> Result<()> {
    write_atomically(path, |w| {
        serde_json::to_writer(w, what).map_err(|e| Error::io("write", path)(e.into()))
    })
}

/// The first completions through the other lens, of the rows that are whole.
fn read_other_lens(out: &Path, progress: &Progress) -> Result<Gallery> {
    let path = out.join(LENS);
    let mut gallery: Gallery = match fs::read_to_string(&path) {
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(Gallery::default()),
        other => read_json(&path, &other.map_err(Error::io("read", &path))?)?,
    };
    gallery.views.retain(|view| (view.row as u64) < progress.rows);
    Ok(gallery)
}

fn read_json<T: serde::de::DeserializeOwned>(path: &Path, text: &str) -> Result<T> {
    serde_json::from_str(text).map_err(|e| {
        let advice = "start anew in another folder";
        Error::invalid(path.display().to_string(), "a dump's progress", json_fault(&e), advice)
    })
}

/// The progress of a dump with these settings; none where nothing was begun.
fn read_progress(out: &Path, settings: &Settings) -> Result<Option<Progress>> {
    let path = out.join(PROGRESS);
    let text = match fs::read_to_string(&path) {
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        other => other.map_err(Error::io("read", &path))?,
    };
    let progress: Progress = read_json(&path, &text)?;
    let fields = |s: &Settings| match serde_json::to_value(s) {
        Ok(serde_json::Value::Object(map)) => map,
        _ => serde_json::Map::new(),
    };
    let (was, is) = (fields(&progress.settings), fields(settings));
    if let Some(name) = was.keys().chain(is.keys()).find(|&name| is.get(name) != was.get(name)) {
        let shown = |of: &serde_json::Map<_, serde_json::Value>| {
            of.get(name).map_or("nothing".into(), |v| v.to_string())
        };
        return Err(Error::invalid(
            format!("--resume {}: {}", out.display(), name.replace('_', "-")),
            format!("{} as before", shown(&was)),
            shown(&is),
            "give the same options, or another --out",
        ));
    }
    Ok(Some(progress))
}

/// Cuts record files to what is whole and reads it.
fn replay_files(
    paths: &[PathBuf],
    progress: &Progress,
    replay: &mut impl FnMut(&[Record]),
) -> Result<()> {
    if paths.is_empty() {
        return Ok(());
    }
    let mut readers = Vec::with_capacity(paths.len());
    for (path, &bytes) in paths.iter().zip(&progress.bytes) {
        let file = OpenOptions::new().read(true).write(true).open(path);
        let file = file.map_err(Error::io("open", path))?;
        let there = file.metadata().map_err(Error::io("read", path))?.len();
        if there < bytes {
            let (expected, got) = (format!("{bytes} bytes"), there.to_string());
            let advice = "it was changed since; start anew in another folder";
            return Err(Error::invalid(path.display().to_string(), expected, got, advice));
        }
        file.set_len(bytes).map_err(Error::io("cut", path))?;
        readers.push(BufReader::new(file).lines());
    }
    for line in 1.. {
        let mut records = Vec::with_capacity(paths.len());
        for (path, reader) in paths.iter().zip(&mut readers) {
            let Some(text) = reader.next() else { continue };
            let text = text.map_err(Error::io("read", path))?;
            records.push(Record::read(&text, &format!("{}:{line}", path.display()))?);
        }
        if records.len() < paths.len() {
            break;
        }
        replay(&records);
    }
    Ok(())
}
