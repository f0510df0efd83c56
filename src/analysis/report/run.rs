//! What lies in the folder of a training run: `config.toml`, `metrics.jsonl`, `completions.jsonl` and, once it has ended,
//! `summary.json`.

use std::path::{Path, PathBuf};

use serde_json::Value;

use super::chart::{Mark, Series};
use crate::data::jsonl::JsonLines;
use crate::error::json_fault;
use crate::{Error, Result};

/// A training run as its folder has it.
pub(super) struct TrainingRun {
    pub folder: PathBuf,
    /// The text of `config.toml`.
    pub config: String,
    /// The settings in it.
    pub settings: toml::Table,
    /// Path of the model.
    pub model: String,
    pub steps: Steps,
}

impl TrainingRun {
    /// Reads all but the completions.
    ///
    /// # Errors
    /// A file of the run is missing or damaged, or it has no step yet.
    pub fn read(folder: &Path) -> Result<TrainingRun> {
        refuse_others(folder)?;
        let path = folder.join("config.toml");
        let config = std::fs::read_to_string(&path).map_err(Error::io("read", &path))?;
        let mut parsed: toml::Table = config.parse().map_err(|e: toml::de::Error| {
            let got = e.message().to_string();
            let place = path.display().to_string();
            Error::invalid(place, "a run's settings", got, "give a run folder")
        })?;
        let settings = match parsed.remove("train") {
            Some(toml::Value::Table(settings)) => settings,
            _ => toml::Table::new(),
        };
        let metrics = folder.join("metrics.jsonl");
        let records: Vec<Value> = match metrics.exists() {
            true => JsonLines::open(&metrics)?
                .map(|row| Ok(Value::Object(row?.object)))
                .collect::<Result<_>>()?,
            false => Vec::new(),
        };
        if records.is_empty() {
            let place = folder.join("metrics.jsonl").display().to_string();
            let advice = "wait for the first step";
            return Err(Error::invalid(place, "at least one step", "none", advice));
        }
        Ok(TrainingRun {
            folder: folder.into(),
            config,
            settings,
            model: parsed.get("model").and_then(|m| m.as_str()).unwrap_or("a model").into(),
            steps: Steps { records, summary: summary(folder)? },
        })
    }

    /// The folder's name.
    pub fn name(&self) -> String {
        let path = self.folder.canonicalize().unwrap_or_else(|_| self.folder.clone());
        path.file_name().unwrap_or(path.as_os_str()).to_string_lossy().into_owned()
    }

    /// All completions that were sampled, in their order; none of given rows.
    ///
    /// # Errors
    /// The file is damaged.
    pub fn completions(&self) -> Result<Vec<Value>> {
        let path = self.folder.join("completions.jsonl");
        if !path.exists() {
            return Ok(Vec::new());
        }
        JsonLines::open(&path)?.map(|row| Ok(Value::Object(row?.object))).collect()
    }
}

/// What was measured in a run.
pub(super) struct Steps {
    /// One JSON object a step.
    pub records: Vec<Value>,
    /// The run's end: an empty object before.
    pub summary: Value,
}

impl Steps {
    pub fn number(step: &Value, key: &str) -> Option<f64> {
        step.get(key).and_then(Value::as_f64)
    }

    /// A curve of one key; none where no step has it.
    pub fn curve(&self, name: &str, key: &str, colour: usize) -> Option<Series> {
        let point = |s: &Value| Some((Steps::number(s, "step")?, Steps::number(s, key)));
        let points: Vec<_> = match key {
            "accuracy" => self.accuracy(),
            _ => self.records.iter().filter_map(point).collect(),
        };
        points.iter().any(|(_, y)| y.is_some()).then(|| Series::new(name, colour, points))
    }

    /// A curve of one key for each phase, where there are two: what it says of the policy of a layer and of the model's
    /// is not the same thing.
    pub fn curves_by_phase(&self, name: &str, key: &str, colour: usize) -> Vec<Series> {
        let phases = self.phases();
        if phases.len() < 2 {
            return self.curve(name, key, colour).into_iter().collect();
        }
        let curves = phases.iter().zip([5, colour]).filter_map(|((phase, records), colour)| {
            let point = |s: &&Value| Some((Steps::number(s, "step")?, Steps::number(s, key)));
            let points: Vec<_> = records.iter().filter_map(point).collect();
            let known = points.iter().any(|(_, y)| y.is_some());
            known.then(|| Series::new(&format!("{name}, {phase}"), colour, points))
        });
        curves.collect()
    }

    /// The steps of each phase, with what it is called: `layer 6`, `final policy`.
    pub fn phases(&self) -> Vec<(String, Vec<&Value>)> {
        let mut phases: Vec<(String, Vec<&Value>)> = Vec::new();
        for record in &self.records {
            let name = match record.get("phase").and_then(Value::as_str) {
                Some("internal") => {
                    format!("layer {}", Steps::number(record, "layer").unwrap_or(f64::NAN))
                }
                _ => "final policy".into(),
            };
            match phases.last_mut() {
                Some((last, records)) if *last == name => records.push(record),
                _ => phases.push((name, vec![record])),
            }
        }
        phases
    }

    /// Held-out accuracy by step, from the one before the first to the one after the last; empty without
    /// held-out problems.
    pub fn accuracy(&self) -> Vec<(f64, Option<f64>)> {
        let end = |key: &str| Steps::number(&self.summary, key);
        let between = self
            .records
            .iter()
            .map(|s| Some((Steps::number(s, "step")?, Steps::number(s, "accuracy")?)));
        let mut points: Vec<(f64, f64)> = std::iter::once(end("accuracy_before").map(|y| (0.0, y)))
            .chain(between)
            .chain(std::iter::once(end("steps").zip(end("accuracy_after"))))
            .flatten()
            .collect();
        points.sort_by(|a, b| a.0.total_cmp(&b.0)); // a summary may be of before a resume
        points.dedup_by_key(|(step, _)| *step);
        points.into_iter().map(|(step, y)| (step, Some(y))).collect()
    }

    /// The step after the last of the internal phase.
    pub fn switch(&self) -> Option<Mark> {
        let phase = |s: &Value| s.get("phase").and_then(Value::as_str).map(str::to_owned);
        self.records.windows(2).find_map(|pair| {
            let (before, after) = (phase(&pair[0])?, phase(&pair[1])?);
            let at = Steps::number(&pair[1], "step")? - 0.5;
            (before == "internal" && after == "final")
                .then(|| Mark { at, label: "final policy".into() })
        })
    }

    /// Steps with a probe, and the probes.
    pub fn probes(&self) -> Vec<(f64, &Value)> {
        let probe = |s: &'_ Value| -> Option<f64> {
            s.get("probe").filter(|p| p.is_object()).and(Steps::number(s, "step"))
        };
        self.records.iter().filter_map(|s| Some((probe(s)?, s.get("probe")?))).collect()
    }
}

/// Refuses the folder of another command, known by the files that only that one writes.
fn refuse_others(folder: &Path) -> Result<()> {
    let others = [
        ("entropy.jsonl", "entropy", "open report.html there: that command wrote its page itself"),
        (
            "settings.json",
            "eval",
            "its figures were printed; `eval --resume --out` prints them again",
        ),
    ];
    for (file, command, advice) in others {
        if folder.join(file).is_file() && !folder.join("config.toml").exists() {
            let got = format!("a folder of `{command}`");
            let place = folder.display().to_string();
            return Err(Error::invalid(place, "a run folder of `train`", got, advice));
        }
    }
    Ok(())
}

/// What a run left at its end; an empty object where it has not ended.
fn summary(folder: &Path) -> Result<Value> {
    let path = folder.join("summary.json");
    match std::fs::read_to_string(&path) {
        Ok(text) => serde_json::from_str(&text).map_err(|e| {
            let place = path.display().to_string();
            Error::invalid(
                place,
                "the summary of a run",
                json_fault(&e),
                "remove it, or train --resume",
            )
        }),
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(Value::Object(Default::default())),
        Err(e) => Err(Error::io("read", &path)(e)),
    }
}
