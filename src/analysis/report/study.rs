//! Runs of several seeds and settings on one page: the results of a study, a JSON line a run.
//!
//! ```json
//! {"study": "..", "question": "..", "arm": "GRPO", "seed": 1, "figures": {"accuracy_after": 0.83, ..},
//!  "curves": {"reward": [[1, 0.41], ..], "layers dH_ffn": [[10, [0.2, ..]], ..]}, ..}
//! ```
//!
//! `figures` are numbers; `curves` are points of a step and a number, or of a step and a number for each layer.

use std::collections::BTreeMap;
use std::path::Path;

use serde_json::Value;

use super::chart::{Body, COLOURS, Chart, Series};
use super::page::{Page, Part, Section};
use crate::data::jsonl::JsonLines;
use crate::{Error, Result};

/// Colours of arms; the last one, grey, is for what was before.
const ARM_COLOURS: usize = COLOURS.len() - 1;
/// Curves with at most so many points get bars of their intervals.
const MOST_BARS: usize = 15;

/// One run.
struct Run {
    arm: String,
    seed: i64,
    figures: serde_json::Map<String, Value>,
    curves: serde_json::Map<String, Value>,
}

impl Run {
    /// Points of a curve; none of one that it lacks.
    fn curve(&self, key: &str) -> &[Value] {
        self.curves.get(key).and_then(Value::as_array).map_or(&[], Vec::as_slice)
    }
}

/// What the runs of an arm say of one figure.
struct Estimate {
    mean: f64,
    /// Half the length of the 95 % interval by Student's t; none of a single run.
    half: Option<f64>,
    n: usize,
}

/// The page of a study.
///
/// # Errors
/// The file cannot be read, or a line of it is no run of a study.
pub fn of_study(path: &Path) -> Result<Page> {
    let mut runs = Vec::new();
    let mut head = (String::new(), String::new());
    for row in JsonLines::open(path)? {
        let row = row?;
        let text = |name: &str| row.get(name).and_then(Value::as_str).map(str::to_owned);
        let map = |name: &str| row.get(name).and_then(Value::as_object).cloned();
        let (Some(study), Some(arm), Some(figures)) = (text("study"), text("arm"), map("figures"))
        else {
            let expected = "a run of a study: `study`, `arm`, `seed`, `figures`";
            let advice = "give a file that tools/experiments/run wrote, or folders of runs";
            return Err(Error::invalid(&row.place, expected, row.keys(), advice));
        };
        head = (study, text("question").unwrap_or_default());
        let seed = row.get("seed").and_then(Value::as_i64).unwrap_or_default();
        runs.push(Run { arm, seed, figures, curves: map("curves").unwrap_or_default() });
    }
    let arms = in_order(runs.iter().map(|run| run.arm.as_str()));
    if arms.is_empty() {
        let place = path.display().to_string();
        return Err(Error::invalid(place, "at least one run", "none", "run the study first"));
    }
    let (lines, layers): (Vec<&str>, Vec<&str>) =
        in_order(runs.iter().flat_map(|run| run.curves.keys().map(String::as_str)))
            .into_iter()
            .partition(|key| !key.starts_with("layers "));
    let of_steps = |key: &&str| Part::Chart(over_steps(key, &arms, &runs));
    let mut sections = vec![Section {
        title: "What came out".into(),
        text: "Means over seeds, with 95 % intervals by Student's t. Below: differences from the first row, seed by seed."
            .into(),
        parts: tables(&arms, &runs),
    }];
    if !lines.is_empty() {
        sections.push(Section {
            title: "Step by step".into(),
            text: "Means over seeds; bars are 95 % intervals.".into(),
            parts: std::iter::once(Part::Smoothing).chain(lines.iter().map(of_steps)).collect(),
        });
    }
    if !layers.is_empty() {
        sections.push(Section {
            title: "Layer by layer".into(),
            text: "At the last look of each run (dashed grey: at the first look of the first arm that looked), and on average over layers from \
                   look to look."
                .into(),
            parts: layers
                .iter()
                .flat_map(|key| {
                    let many = runs.iter().any(|run| run.curve(key).len() > 1);
                    let over_time = many.then(|| of_steps(key));
                    std::iter::once(Part::Chart(by_layer(key, &arms, &runs))).chain(over_time)
                })
                .collect(),
        });
    }
    Ok(Page {
        title: head.0,
        subtitle: head.1,
        facts: vec![("runs".into(), runs.len().to_string())],
        sections,
    })
}

/// Distinct names in the order of their first appearance.
fn in_order<'a>(names: impl Iterator<Item = &'a str>) -> Vec<&'a str> {
    let mut known = Vec::new();
    for name in names {
        if !known.contains(&name) {
            known.push(name);
        }
    }
    known
}

/// The figures of each arm, and their differences from the first arm's.
fn tables(arms: &[&str], runs: &[Run]) -> Vec<Part> {
    let keys = in_order(runs.iter().flat_map(|run| run.figures.keys().map(String::as_str)));
    let number = |run: &Run, key: &str| run.figures.get(key).and_then(Value::as_f64);
    // What is the same in all runs says nothing.
    let differs = |key: &&str| {
        let values: Vec<f64> = runs.iter().filter_map(|run| number(run, key)).collect();
        values.len() == 1 || values.windows(2).any(|pair| pair[0] != pair[1])
    };
    let keys: Vec<&str> = keys.into_iter().filter(differs).collect();
    let of = |arm: &str, key: &str| -> BTreeMap<i64, f64> {
        let of_arm = runs.iter().filter(|run| run.arm == arm);
        of_arm.filter_map(|run| Some((run.seed, number(run, key)?))).collect()
    };
    let head = |first: &str| -> Vec<String> {
        [first, "runs"].into_iter().chain(keys.iter().copied()).map(named).collect()
    };
    let count = |arm: &str| runs.iter().filter(|run| run.arm == arm).count();
    let row = |arm: &&str| {
        let cells = keys.iter().map(|key| {
            let values: Vec<f64> = of(arm, key).into_values().collect();
            Estimate::of(&values).map_or("-".into(), |e| e.words(count(arm)))
        });
        [arm.to_string(), count(arm).to_string()].into_iter().chain(cells).collect()
    };
    let mut parts = vec![Part::Table(head("arm"), arms.iter().map(row).collect())];
    let Some((first, others)) = arms.split_first().filter(|(_, others)| !others.is_empty()) else {
        return parts;
    };
    let difference = |arm: &&str| {
        let cells = keys.iter().map(|key| {
            let base = of(first, key);
            let pairs: Vec<f64> = of(arm, key)
                .into_iter()
                .filter_map(|(seed, value)| Some(value - base.get(&seed)?))
                .collect();
            Estimate::of(&pairs).map_or("-".into(), |e| e.signed())
        });
        [arm.to_string(), count(arm).to_string()].into_iter().chain(cells).collect()
    };
    let head = head(&format!("less {first}"));
    parts.push(Part::Table(head, others.iter().map(difference).collect()));
    parts
}

/// A key as a heading.
fn named(key: &str) -> String {
    key.replace('_', " ")
}

/// What a curve is called, and what runs up: in words where the driver's keys are known.
fn words(key: &str) -> (String, String) {
    let (title, y) = match key {
        "reward" => ("Mean reward", "reward"),
        "accuracy" => ("Accuracy on held-out problems", "share right"),
        "response_tokens" => ("Length of answers", "tokens"),
        "truncated" => ("Answers cut off at the limit", "share"),
        "repetition" => ("Repetition", "share of runs of four characters said before"),
        "perplexity" => ("Perplexity of the base model's answers", "perplexity"),
        "final_entropy" => ("Entropy of the final policy on the base model's answers", "nats"),
        "entropy_nats" => ("Entropy of the policy that is trained, on its own answers", "nats"),
        "drift_nats" => ("Drift between rollout and update", "nats"),
        "kl_nats" => ("KL to the reference", "nats"),
        "layers layer_out" => ("Entropy of the layers' own policies", "nats"),
        "layers dH_ffn" => ("Change of entropy by FFNs", "nats"),
        "layers kl_to_final" => ("KL of the layers' policies to the final one", "nats"),
        "layers cos_later" => ("Cosine of the internal layer with those above it", "cosine"),
        _ => return (named(key), named(key)),
    };
    (title.into(), y.into())
}

/// A curve of every arm over the steps; of what has a number for each layer, the mean over layers.
fn over_steps(key: &str, arms: &[&str], runs: &[Run]) -> Chart {
    let series = arms.iter().enumerate().filter_map(|(i, arm)| {
        let mut at: BTreeMap<u64, Vec<f64>> = BTreeMap::new();
        for run in runs.iter().filter(|run| run.arm == *arm) {
            for point in run.curve(key) {
                let y = point[1].as_f64().or_else(|| {
                    let layers: Vec<f64> =
                        point[1].as_array()?.iter().filter_map(Value::as_f64).collect();
                    Estimate::of(&layers).map(|e| e.mean)
                });
                if let (Some(step), Some(y)) = (point[0].as_u64(), y) {
                    at.entry(step).or_default().push(y);
                }
            }
        }
        series(arm, i, at.into_iter().map(|(step, values)| (step as f64, values)))
    });
    let chart = chart(key, "step", series.collect());
    match key.starts_with("layers ") {
        true => Chart {
            id: format!("{}-steps", chart.id),
            title: format!("{}, mean over layers", chart.title),
            ..chart
        },
        false => chart,
    }
}

/// The values by layer at the last look of each arm, and at the first one of the first arm that looked.
fn by_layer(key: &str, arms: &[&str], runs: &[Run]) -> Chart {
    let look = |arm: &str, last: bool| -> BTreeMap<usize, Vec<f64>> {
        let mut at: BTreeMap<usize, Vec<f64>> = BTreeMap::new();
        for run in runs.iter().filter(|run| run.arm == arm) {
            let looks = run.curve(key);
            let chosen = if last { looks.last() } else { looks.first() };
            let values = chosen.and_then(|look| look[1].as_array());
            for (i, y) in values.into_iter().flatten().enumerate() {
                at.entry(i + 1).or_default().extend(y.as_f64());
            }
        }
        at
    };
    let points = |look: BTreeMap<usize, Vec<f64>>| look.into_iter().map(|(l, v)| (l as f64, v));
    let first = arms.iter().map(|arm| look(arm, false)).find(|at| !at.is_empty());
    let before = series("before", 0, points(first.unwrap_or_default())).map(|before| Series {
        colour: ARM_COLOURS,
        dashed: true,
        ..before
    });
    let after =
        arms.iter().enumerate().filter_map(|(i, arm)| series(arm, i, points(look(arm, true))));
    let x = if key == "layers cos_later" { "layers above the internal one" } else { "layer" };
    chart(key, x, before.into_iter().chain(after).collect())
}

fn series(arm: &str, i: usize, points: impl Iterator<Item = (f64, Vec<f64>)>) -> Option<Series> {
    let estimates: Vec<(f64, Estimate)> =
        points.filter_map(|(x, values)| Some((x, Estimate::of(&values)?))).collect();
    let mut series = Series::new(
        arm,
        i % ARM_COLOURS,
        estimates.iter().map(|(x, e)| (*x, Some(e.mean))).collect(),
    );
    if estimates.len() <= MOST_BARS && estimates.iter().any(|(_, e)| e.half.is_some()) {
        series.errors = Some(estimates.iter().map(|(_, e)| e.half.unwrap_or(0.0)).collect());
    }
    // Beyond the colours that are told apart, dashes tell.
    let series = if i >= ARM_COLOURS { series.dashed() } else { series };
    (!estimates.is_empty()).then_some(series)
}

fn chart(key: &str, x: &str, series: Vec<Series>) -> Chart {
    let (title, y) = words(key);
    Chart {
        id: key.replace([' ', '/'], "-"),
        title,
        caption: String::new(),
        x: x.into(),
        y,
        body: Body::Lines { series, marks: Vec::new(), zero: false },
    }
}

impl Estimate {
    fn of(values: &[f64]) -> Option<Estimate> {
        let n = values.len();
        let mean = (n > 0).then(|| values.iter().sum::<f64>() / n as f64)?;
        let half = (n > 1).then(|| {
            let squares: f64 = values.iter().map(|v| (v - mean) * (v - mean)).sum();
            t_quantile(n - 1) * (squares / (n - 1) as f64 / n as f64).sqrt()
        });
        Some(Estimate { mean, half, n })
    }

    /// `0.834 ± 0.012`, and of how many runs where not of all.
    fn words(&self, all: usize) -> String {
        let digits = digits(self.mean);
        let half = self.half.map_or(String::new(), |h| format!(" \u{b1} {h:.digits$}"));
        let of = if self.n < all { format!(" ({} of {all})", self.n) } else { String::new() };
        format!("{:.digits$}{half}{of}", self.mean)
    }

    /// `+0.021 ± 0.012`, with a star where the interval leaves out zero.
    fn signed(&self) -> String {
        let digits = digits(self.mean.abs().max(self.half.unwrap_or(0.0)));
        let sure = self.half.is_some_and(|h| h < self.mean.abs());
        let half = self.half.map_or(String::new(), |h| format!(" \u{b1} {h:.digits$}"));
        format!("{:+.digits$}{half}{}", self.mean, if sure { " *" } else { "" })
    }
}

/// Digits after the point, so that three or four of a number are seen.
fn digits(value: f64) -> usize {
    match value.abs() {
        v if v >= 1000.0 => 0,
        v if v >= 100.0 => 1,
        v if v >= 10.0 => 2,
        _ => 3,
    }
}

/// 97.5 % quantile of Student's t.
fn t_quantile(freedom: usize) -> f64 {
    const QUANTILES: [f64; 30] = [
        12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160,
        2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056,
        2.052, 2.048, 2.045, 2.042,
    ];
    QUANTILES.get(freedom - 1).copied().unwrap_or(1.96)
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    #[test]
    fn intervals_are_students() {
        let e = Estimate::of(&[0.8, 0.9, 0.7]).unwrap();
        assert!((e.mean - 0.8).abs() < 1e-12);
        // 4.303 * 0.1 / sqrt(3)
        assert!((e.half.unwrap() - 0.248_434).abs() < 1e-5);
        assert_eq!(e.words(3), "0.800 \u{b1} 0.248");
        assert_eq!(e.words(4), "0.800 \u{b1} 0.248 (3 of 4)");
        assert_eq!(Estimate::of(&[12.0]).unwrap().words(1), "12.00");
        assert!(Estimate::of(&[]).is_none());
        assert_eq!(Estimate::of(&[-0.1, -0.2]).unwrap().signed(), "-0.150 \u{b1} 0.635");
        assert_eq!(Estimate::of(&[0.1, 0.1]).unwrap().signed(), "+0.100 \u{b1} 0.000 *");
    }

    #[test]
    fn a_page_has_means_differences_and_curves() {
        let mut file = tempfile::NamedTempFile::with_suffix(".jsonl").unwrap();
        for (arm, seed, y) in [("a", 1, 0.5), ("a", 2, 0.7), ("b", 1, 0.6), ("b", 2, 0.8)] {
            let row = serde_json::json!({
                "study": "s", "question": "q?", "arm": arm, "seed": seed,
                "figures": {"accuracy_after": y, "word": "x"},
                "curves": {"reward": [[1, 0.1], [2, y]], "layers dH": [[1, [0.0, 0.0]], [9, [1.0, y]]]},
            });
            writeln!(file, "{row}").unwrap();
        }
        let page = of_study(file.path()).unwrap();
        let text = page.markdown();
        assert!(text.contains("| a | 2 | 0.600 \u{b1} 1.271 |"), "{text}");
        assert!(text.contains("| b | 2 | +0.100 \u{b1} 0.000 * |"), "{text}");
        assert!(!text.contains("word"), "{text}");
        let charts: Vec<&Chart> = page.charts().collect();
        assert_eq!(
            charts.iter().map(|c| c.id.as_str()).collect::<Vec<_>>(),
            ["reward", "layers-dH", "layers-dH-steps"]
        );
        let Body::Lines { series, .. } = &charts[0].body else { panic!() };
        assert_eq!(series[1].points, [(1.0, Some(0.1)), (2.0, Some(0.7))]);
        let Body::Lines { series, .. } = &charts[1].body else { panic!() };
        assert_eq!(
            series.iter().map(|s| s.name.as_str()).collect::<Vec<_>>(),
            ["before", "a", "b"]
        );
        assert!(series[0].dashed && series[2].points[1] == (2.0, Some(0.7)));
        let Body::Lines { series, .. } = &charts[2].body else { panic!() };
        assert_eq!(series[0].points, [(1.0, Some(0.0)), (9.0, Some(0.8))]);
    }

    #[test]
    fn what_is_no_study_is_named() {
        let mut file = tempfile::NamedTempFile::with_suffix(".jsonl").unwrap();
        writeln!(file, r#"{{"step": 1, "reward": 0.5}}"#).unwrap();
        let error = of_study(file.path()).err().unwrap().to_string();
        assert!(
            error.contains("expected a run of a study") && error.contains("got step, reward"),
            "{error}"
        );
        let empty = tempfile::NamedTempFile::with_suffix(".jsonl").unwrap();
        let error = of_study(empty.path()).err().unwrap().to_string();
        assert!(error.contains("at least one run"), "{error}");
    }
}
