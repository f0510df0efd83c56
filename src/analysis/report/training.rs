//! The page of a training run, from `config.toml`, `metrics.jsonl`, `completions.jsonl` and, once it has ended,
//! `summary.json` of its folder.

use std::path::Path;

use serde_json::Value;

use super::chart::{Body, Chart, Heat, Mark, Series};
use super::page::{Page, Part, Section};
use crate::data::jsonl::JsonLines;
use crate::error::json_fault;
use crate::{Error, Result};

/// Completions shown of the last step.
const COMPLETIONS: usize = 12;

/// What was measured in a run.
struct Steps {
    /// One JSON object a step.
    records: Vec<Value>,
    /// The run's end: an empty object before.
    summary: Value,
}

impl Steps {
    fn number(step: &Value, key: &str) -> Option<f64> {
        step.get(key).and_then(Value::as_f64)
    }

    /// A curve of one key; none where no step has it.
    fn curve(&self, name: &str, key: &str, colour: usize) -> Option<Series> {
        let point = |s: &Value| Some((Steps::number(s, "step")?, Steps::number(s, key)));
        let points: Vec<_> = match key {
            "accuracy" => self.accuracy(),
            _ => self.records.iter().filter_map(point).collect(),
        };
        points.iter().any(|(_, y)| y.is_some()).then(|| Series::new(name, colour, points))
    }

    /// Held-out accuracy by step, from the one before the first to the one after the last; empty without
    /// held-out problems.
    fn accuracy(&self) -> Vec<(f64, Option<f64>)> {
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
    fn switch(&self) -> Option<Mark> {
        let phase = |s: &Value| s.get("phase").and_then(Value::as_str).map(str::to_owned);
        self.records.windows(2).find_map(|pair| {
            let (before, after) = (phase(&pair[0])?, phase(&pair[1])?);
            let at = Steps::number(&pair[1], "step")? - 0.5;
            (before == "internal" && after == "final")
                .then(|| Mark { at, label: "final policy".into() })
        })
    }

    /// Steps with a probe, and the probes.
    fn probes(&self) -> Vec<(f64, &Value)> {
        let probe = |s: &'_ Value| -> Option<f64> {
            s.get("probe").filter(|p| p.is_object()).and(Steps::number(s, "step"))
        };
        self.records.iter().filter_map(|s| Some((probe(s)?, s.get("probe")?))).collect()
    }
}

/// The page of the run in `folder`.
///
/// # Errors
/// A file of the run is missing or damaged, or it has no step yet.
pub fn of_run(folder: &Path) -> Result<Page> {
    refuse_others(folder)?;
    let config_path = folder.join("config.toml");
    let config = std::fs::read_to_string(&config_path).map_err(Error::io("read", &config_path))?;
    let parsed: toml::Table = config.parse().map_err(|e: toml::de::Error| {
        let got = e.message().to_string();
        Error::invalid(
            config_path.display().to_string(),
            "a run's settings",
            got,
            "give a run folder",
        )
    })?;
    let read = |name: &str| -> Result<JsonLines<_>> { JsonLines::open(&folder.join(name)) };
    let records: Vec<Value> =
        read("metrics.jsonl")?.map(|row| Ok(Value::Object(row?.object))).collect::<Result<_>>()?;
    let steps = Steps { records, summary: summary(folder)? };
    let Some(last) = steps.records.last() else {
        let place = folder.join("metrics.jsonl").display().to_string();
        return Err(Error::invalid(place, "at least one step", "none", "wait for the first step"));
    };
    let mut completions: Vec<Value> = Vec::new();
    let completions_path = folder.join("completions.jsonl");
    // Given rows sample none.
    let rows = completions_path.exists().then(|| read("completions.jsonl")).transpose()?;
    for row in rows.into_iter().flatten() {
        let row = Value::Object(row?.object);
        if completions.last().is_some_and(|before| before.get("step") != row.get("step")) {
            completions.clear();
        }
        completions.push(row);
    }
    let model = parsed.get("model").and_then(|m| m.as_str()).unwrap_or("a model");
    let first = steps.records.first();
    let from_to = |a: Option<f64>, b: Option<f64>, digits: usize| {
        let shown = |x: Option<f64>| x.map_or("-".into(), |x| format!("{x:.digits$}"));
        format!("{} \u{2192} {}", shown(a), shown(b))
    };
    let fact = |key: &str, digits: usize| {
        let of = |s: &Value| Steps::number(s, key);
        from_to(first.and_then(of), of(last), digits)
    };
    let accuracy = steps.accuracy();
    let ends = accuracy.first().zip(accuracy.last()).filter(|(a, b)| a.0 < b.0);
    let accuracy = ends.map(|((_, a), (_, b))| ("held-out accuracy".into(), from_to(*a, *b, 3)));
    let figures = [
        ("loss", "loss", 4),
        ("reward", "reward", 3),
        ("response length, tokens", "response_tokens", 1),
        ("entropy, nats", "entropy_nats", 3),
        ("gradient norm", "gradient_norm", 3),
    ];
    let known = |key: &str| Steps::number(last, key).is_some();
    let figures = figures.into_iter().filter(|(_, key, _)| known(key));
    let figures = figures.map(|(name, key, digits)| (name.into(), fact(key, digits)));
    let mut page = Page {
        title: format!("Training {model}"),
        subtitle: format!("{} steps in {}", steps.records.len(), folder.display()),
        facts: accuracy.into_iter().chain(figures).collect(),
        sections: vec![Section {
            title: "Step by step".into(),
            text: "The vertical line, where there is one, is the switch from the internal to the final policy.".into(),
            parts: over_steps(&steps),
        }],
    };
    let probes = steps.probes();
    if !probes.is_empty() {
        page.sections.push(probe_section(&probes, &steps));
    }
    let text = |v: &Value, key: &str| match v.get(key) {
        Some(Value::String(text)) => text.clone(),
        Some(other) => other.to_string(),
        None => String::new(),
    };
    let shown = samples(&completions).into_iter().map(|c| {
        let title = format!(
            "step {}, {}: reward {} ({})",
            text(c, "step"),
            text(c, "problem"),
            text(c, "reward"),
            text(c, "reason")
        );
        (title, format!("{}\n\nright answer: {}", text(c, "completion"), text(c, "answer")))
    });
    if !completions.is_empty() {
        page.sections.push(Section {
            title: "Completions of the last step".into(),
            text: "Of each problem the first of the highest reward and, where rewards differ, the first of the lowest.".into(),
            parts: vec![Part::Texts(shown.collect())],
        });
    }
    page.sections.push(Section {
        title: "Settings".into(),
        text: String::new(),
        parts: vec![Part::Texts(vec![("config.toml".into(), config)])],
    });
    Ok(page)
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

/// Of each problem's completions, which stand together, the best and, where it is another, the worst.
fn samples(completions: &[Value]) -> Vec<&Value> {
    let reward = |c: &Value| Steps::number(c, "reward").unwrap_or(f64::NAN);
    let mut shown = Vec::new();
    for group in completions.chunk_by(|a, b| a.get("problem") == b.get("problem")) {
        let best = group.iter().rev().max_by(|a, b| reward(a).total_cmp(&reward(b)));
        let worst = group.iter().min_by(|a, b| reward(a).total_cmp(&reward(b)));
        let Some((best, worst)) = best.zip(worst) else { continue };
        shown.push(best);
        if reward(worst) < reward(best) {
            shown.push(worst);
        }
    }
    shown.truncate(COMPLETIONS);
    shown
}

fn over_steps(steps: &Steps) -> Vec<Part> {
    type Curve = (&'static str, &'static str, usize);
    // Name, title, unit, caption, whether zero matters, curves.
    type Row = (&'static str, &'static str, &'static str, &'static str, bool, &'static [Curve]);
    let charts: [Row; 11] = [
        (
            "margins",
            "Implicit rewards",
            "of a preference",
            "Log-ratios to the reference, times beta, of chosen and rejected completions, and what is between them.",
            true,
            &[
                ("chosen", "rewards/chosen", 0),
                ("rejected", "rewards/rejected", 1),
                ("margin", "rewards/margins", 6),
            ],
        ),
        (
            "preferred",
            "Preferences that are right",
            "share of pairs",
            "Pairs whose chosen completion has the higher implicit reward.",
            true,
            &[
                ("training", "rewards/accuracies", 0),
                ("held-out rows", "eval_rewards/accuracies", 1),
            ],
        ),
        (
            "reward",
            "Reward",
            "mean",
            "Mean reward of the step's completions, held-out accuracy where it was measured, and the share of groups that teach something.",
            true,
            &[
                ("reward", "reward", 0),
                ("held-out accuracy", "accuracy", 1),
                ("groups with signal", "groups_with_signal", 6),
            ],
        ),
        (
            "loss",
            "Loss",
            "of the objective",
            "Mean over the step's mini batches, and on held-out rows where it was measured.",
            false,
            &[("loss", "loss", 0), ("held-out rows", "eval_loss", 1)],
        ),
        (
            "length",
            "Response length",
            "tokens",
            "Mean length of completions.",
            true,
            &[("response length", "response_tokens", 0)],
        ),
        (
            "truncated",
            "Truncated",
            "share",
            "Completions that hit the length limit.",
            true,
            &[("truncated", "truncated", 1)],
        ),
        (
            "entropy",
            "Entropy of the optimised policy",
            "nats",
            "Mean over the tokens that were trained on.",
            true,
            &[("entropy", "entropy_nats", 0)],
        ),
        (
            "clip",
            "Clip fraction",
            "share of tokens",
            "Tokens whose ratio was clipped.",
            true,
            &[("clipped", "clip_fraction", 1)],
        ),
        (
            "drift",
            "Drift of rollouts from training",
            "nats",
            "Mean |log p(rollout) - log p(training)|; final phase only.",
            true,
            &[("drift", "drift_nats", 3), ("KL to the base", "kl_nats", 2)],
        ),
        (
            "gradient",
            "Gradient norm",
            "norm before clipping",
            "Mean of the step's mini batches.",
            true,
            &[("gradient norm", "gradient_norm", 2)],
        ),
        (
            "speed",
            "Speed",
            "tokens per second",
            "Sampled tokens, and tokens through forward and backward.",
            true,
            &[("rollout", "rollout_tokens_per_s", 0), ("update", "update_tokens_per_s", 1)],
        ),
    ];
    let mut parts = Vec::new();
    for (id, title, y, caption, zero, curves) in charts {
        let series: Vec<Series> = curves
            .iter()
            .filter_map(|&(name, key, colour)| steps.curve(name, key, colour))
            .collect();
        if series.is_empty() {
            continue;
        }
        parts.push(Part::Chart(Chart {
            id: id.into(),
            title: title.into(),
            caption: caption.into(),
            x: "step".into(),
            y: y.into(),
            body: Body::Lines { series, marks: steps.switch().into_iter().collect(), zero },
        }));
    }
    parts
}

/// Charts of the probe: layers over time, and how the internal layer stands to those above it.
fn probe_section(probes: &[(f64, &Value)], steps: &Steps) -> Section {
    let list = |probe: &Value, key: &str| -> Vec<f64> {
        let numbers = probe.get(key).and_then(Value::as_array);
        numbers.map_or(Vec::new(), |list| {
            list.iter().map(|x| x.as_f64().unwrap_or(f64::NAN)).collect()
        })
    };
    let layers = probes.iter().map(|(_, p)| list(p, "layer_out").len()).max().unwrap_or(0);
    let columns: Vec<String> = probes.iter().map(|(step, _)| format!("{step}")).collect();
    let names = |n: usize, first: usize| (first..first + n).map(|l| l.to_string()).collect();
    let heat = |id: &str, title: &str, caption: &str, key: &str, unit: &str, rows: Vec<String>| {
        let row = |r: usize| -> Vec<f32> {
            probes
                .iter()
                .map(|(_, p)| list(p, key).get(r).map_or(f32::NAN, |x| *x as f32))
                .collect()
        };
        let values: Vec<Vec<f32>> = (0..rows.len()).map(row).collect();
        let note = |r: usize, c: usize| {
            vec![
                format!("step {}, layer {}", columns[c], rows[r]),
                format!("{:.4} {unit}", values[r][c]),
            ]
        };
        let notes =
            (0..rows.len()).map(|r| (0..columns.len()).map(|c| note(r, c)).collect()).collect();
        Part::Chart(Chart {
            id: id.into(),
            title: title.into(),
            caption: caption.into(),
            x: "step".into(),
            y: "layer".into(),
            body: Body::Heat(Heat {
                columns: columns.clone(),
                rows: rows.clone(),
                notes,
                values,
                unit: unit.into(),
            }),
        })
    };
    let curve = |name: &str, key: &str, colour: usize| {
        let points = probes.iter().map(|(step, p)| (*step, Steps::number(p, key))).collect();
        Series::new(name, colour, points)
    };
    let lines = |id: &str, title: &str, y: &str, caption: &str, series: Vec<Series>| {
        Part::Chart(Chart {
            id: id.into(),
            title: title.into(),
            caption: caption.into(),
            x: "step".into(),
            y: y.into(),
            body: Body::Lines { series, marks: steps.switch().into_iter().collect(), zero: false },
        })
    };
    let layer = probes[0].1.get("layer").and_then(Value::as_u64).unwrap_or(0) as usize;
    let above = || -> Vec<String> { names(layers.saturating_sub(layer), layer + 1) };
    let mut parts = vec![
        lines(
            "probe-entropy",
            "Final policy's entropy",
            "nats",
            "On the fixed completions of the probe.",
            vec![curve("entropy", "final_entropy", 0)],
        ),
        lines(
            "probe-perplexity",
            "Perplexity",
            "perplexity",
            "Of the fixed completions under the current policy: what a collapse shows first.",
            vec![curve("perplexity", "perplexity", 1)],
        ),
        heat(
            "probe-layers",
            "Entropy of each layer's policy over time",
            "Mean over the probe's tokens.",
            "layer_out",
            "nats",
            names(layers, 1),
        ),
        heat(
            "probe-dh-ffn",
            "dH of each layer's FFN over time",
            "Above zero an FFN explores.",
            "dH_ffn",
            "nats",
            names(layers, 1),
        ),
    ];
    if layer < layers {
        parts.push(heat(
            "probe-cosine",
            &format!("Cosine of H^{layer} with later layers"),
            "Mean over the probe's tokens.",
            "cos_later",
            "",
            above(),
        ));
        let mut rows = above();
        rows.push("final".into());
        parts.push(heat(
            "probe-kl",
            &format!("KL of layer {layer}'s policy to those above it"),
            "Mean over the probe's tokens; at the top the final policy.",
            "kl_later",
            "nats",
            rows,
        ));
    }
    Section {
        title: "The probe".into(),
        text: "The same completions of the base model, looked at every --entropy-every steps."
            .into(),
        parts,
    }
}
