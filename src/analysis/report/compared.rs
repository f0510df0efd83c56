//! Several training runs on one page: their curves on the same axes, and the settings in which they differ.

use std::collections::BTreeSet;
use std::path::PathBuf;

use super::chart::{Body, COLOURS, Chart, Series};
use super::page::{Page, Part, Section};
use super::run::{Steps, TrainingRun};
use super::training::{CHARTS, Row};
use crate::{Error, Result};

/// The page of these runs.
///
/// # Errors
/// A run cannot be read, or there are more than are told apart.
pub fn of_runs(folders: &[PathBuf]) -> Result<Page> {
    if folders.len() > COLOURS.len() {
        let (expected, got) =
            (format!("at most {} runs", COLOURS.len()), folders.len().to_string());
        return Err(Error::invalid("report", expected, got, "compare fewer of them at a time"));
    }
    let runs: Vec<TrainingRun> =
        folders.iter().map(|folder| TrainingRun::read(folder)).collect::<Result<_>>()?;
    let names = names(&runs);
    let charts = CHARTS.iter().flat_map(|row| charts(row, &runs, &names)).map(Part::Chart);
    Ok(Page {
        title: format!("Comparing {}", names.join(", ")),
        subtitle: format!("{} runs, step by step", runs.len()),
        facts: runs
            .iter()
            .zip(&names)
            .map(|(run, name)| (name.clone(), fact(&run.steps)))
            .collect(),
        sections: vec![
            Section {
                title: "Settings that differ".into(),
                text: "What is left out is the same in all.".into(),
                parts: vec![differing(&runs, &names)],
            },
            Section {
                title: "Step by step".into(),
                text: "Dashed: the internal phase, whose policy is a layer's.".into(),
                parts: std::iter::once(Part::Smoothing).chain(charts).collect(),
            },
        ],
    })
}

/// Folder names, or whole paths where two are the same.
fn names(runs: &[TrainingRun]) -> Vec<String> {
    let short: Vec<String> = runs.iter().map(TrainingRun::name).collect();
    let all: BTreeSet<&String> = short.iter().collect();
    if all.len() == short.len() {
        return short;
    }
    runs.iter().map(|run| run.folder.display().to_string()).collect()
}

fn fact(steps: &Steps) -> String {
    let number = |x: Option<f64>| x.map_or("-".into(), |x| format!("{x:.3}"));
    let accuracy = steps.accuracy();
    match (accuracy.first(), accuracy.last()) {
        (Some((_, first)), Some((_, last))) => {
            format!("accuracy {} \u{2192} {}", number(*first), number(*last))
        }
        _ => {
            let key = if steps.records.iter().any(|r| r.get("reward").is_some()) {
                "reward"
            } else {
                "loss"
            };
            let of = |r: Option<&serde_json::Value>| r.and_then(|r| Steps::number(r, key));
            let (first, last) = (of(steps.records.first()), of(steps.records.last()));
            format!("{key} {} \u{2192} {}", number(first), number(last))
        }
    }
}

/// A chart for each of the curves of a row, all runs in it.
fn charts(row: &Row, runs: &[TrainingRun], names: &[String]) -> Vec<Chart> {
    let &(id, title, y, caption, zero, curves) = row;
    let several = curves.len() > 1;
    let chart = |&(name, key, _): &(&str, &str, usize)| {
        let series: Vec<Series> = runs
            .iter()
            .zip(names)
            .enumerate()
            .flat_map(|(colour, (run, of))| of_run(&run.steps, key, of, colour))
            .collect();
        (!series.is_empty()).then(|| Chart {
            id: if several { format!("{id}-{}", key.replace('/', "-")) } else { id.into() },
            title: if several { format!("{title}: {name}") } else { title.into() },
            caption: caption.into(),
            x: "step".into(),
            y: y.into(),
            body: Body::Lines { series, marks: Vec::new(), zero },
        })
    };
    curves.iter().filter_map(chart).collect()
}

/// A run's curve, its internal phase in dashes.
fn of_run(steps: &Steps, key: &str, name: &str, colour: usize) -> Vec<Series> {
    let curves = steps.curves_by_phase(name, key, colour);
    let n = curves.len();
    let one = |(i, series): (usize, Series)| {
        let series = Series { colour, ..series };
        if n > 1 && i == 0 { series.dashed() } else { Series { name: name.into(), ..series } }
    };
    curves.into_iter().enumerate().map(one).collect()
}

/// The settings that are not the same in all runs.
fn differing(runs: &[TrainingRun], names: &[String]) -> Part {
    let skipped = ["out"];
    let keys: BTreeSet<&str> =
        runs.iter().flat_map(|run| run.settings.keys()).map(String::as_str).collect();
    let shown = |value: Option<&toml::Value>| match value {
        Some(toml::Value::String(text)) => text.clone(),
        Some(other) => other.to_string(),
        None => "-".into(),
    };
    let mut rows = Vec::new();
    let mut add = |key: &str, values: Vec<String>| {
        if values.windows(2).any(|pair| pair[0] != pair[1]) {
            rows.push(std::iter::once(key.to_string()).chain(values).collect());
        }
    };
    add("model", runs.iter().map(|run| run.model.clone()).collect());
    for key in keys.into_iter().filter(|key| !skipped.contains(key)) {
        add(key, runs.iter().map(|run| shown(run.settings.get(key))).collect());
    }
    Part::Table(std::iter::once("setting".to_string()).chain(names.iter().cloned()).collect(), rows)
}
