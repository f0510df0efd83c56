//! The page of a training run.

use std::path::Path;

use serde_json::Value;

use super::chart::{Body, Chart, Heat, Series};
use super::completions;
use super::page::{Page, Part, Section};
use super::run::{Steps, TrainingRun};
use crate::Result;

/// The page of the run in `folder`.
///
/// # Errors
/// A file of the run is missing or damaged, or it has no step yet.
pub fn of_run(folder: &Path) -> Result<Page> {
    let run = TrainingRun::read(folder)?;
    let steps = &run.steps;
    let mut page = Page {
        title: format!("Training {}", run.model),
        subtitle: format!("{} steps in {}", steps.records.len(), folder.display()),
        facts: facts(steps),
        sections: vec![Section {
            title: "Step by step".into(),
            text: "The vertical line, where there is one, is the switch from the internal to the final policy: curves of \
                   the trained policy are another policy's before and after it."
                .into(),
            parts: std::iter::once(Part::Smoothing).chain(over_steps(steps)).collect(),
        }],
    };
    let probes = steps.probes();
    if !probes.is_empty() {
        page.sections.push(probe_section(&probes, steps));
    }
    let completions = run.completions()?;
    if !completions.is_empty() {
        page.sections.push(Section {
            title: "Completions".into(),
            text: "Click a heading to sort by it, a row to see it whole.".into(),
            parts: vec![Part::Completions(completions::shown(&completions))],
        });
    }
    let chats = completions::chats(&completions);
    if !chats.is_empty() {
        page.sections.push(Section {
            title: "Dialogues".into(),
            text: "The best and the worst of the first problems of the first and of the last step."
                .into(),
            parts: vec![Part::Chats(chats)],
        });
    }
    page.sections.push(Section {
        title: "Settings".into(),
        text: String::new(),
        parts: vec![Part::Texts(vec![("config.toml".into(), run.config)])],
    });
    Ok(page)
}

/// Figures at the start and at the end, those of the trained policy for each phase alone.
fn facts(steps: &Steps) -> Vec<(String, String)> {
    let from_to = |a: Option<f64>, b: Option<f64>, digits: usize| {
        let shown = |x: Option<f64>| x.map_or("-".into(), |x| format!("{x:.digits$}"));
        format!("{} \u{2192} {}", shown(a), shown(b))
    };
    let fact = |records: &[&Value], key: &str, digits: usize| {
        let of = |s: Option<&&Value>| s.and_then(|s| Steps::number(s, key));
        let (first, last) = (of(records.first()), of(records.last()));
        last.map(|_| from_to(first, last, digits))
    };
    let accuracy = steps.accuracy();
    let ends = accuracy.first().zip(accuracy.last()).filter(|(a, b)| a.0 < b.0);
    let accuracy = ends.map(|((_, a), (_, b))| ("held-out accuracy".into(), from_to(*a, *b, 3)));
    let mut facts: Vec<(String, String)> = accuracy.into_iter().collect();
    let all: Vec<&Value> = steps.records.iter().collect();
    for (name, key, digits) in
        [("reward", "reward", 3), ("response length, tokens", "response_tokens", 1)]
    {
        facts.extend(fact(&all, key, digits).map(|value| (name.into(), value)));
    }
    let phases = steps.phases();
    for (name, key, digits) in [
        ("loss", "loss", 4),
        ("entropy, nats", "entropy_nats", 3),
        ("gradient norm", "gradient_norm", 3),
    ] {
        for (phase, records) in &phases {
            let name = match phases.len() {
                1 => name.to_string(),
                _ => format!("{name} ({phase})"),
            };
            facts.extend(fact(records, key, digits).map(|value| (name, value)));
        }
    }
    facts
}

pub(super) type Curve = (&'static str, &'static str, usize);
/// Name, title, unit, caption, whether zero matters, curves.
pub(super) type Row =
    (&'static str, &'static str, &'static str, &'static str, bool, &'static [Curve]);

/// The curves of a run.
pub(super) const CHARTS: [Row; 15] = [
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
        &[("training", "rewards/accuracies", 0), ("held-out rows", "eval_rewards/accuracies", 1)],
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
        "turns",
        "Turns of a dialogue",
        "mean",
        "Turns of the model, tools called, and segments: more than one where the chat template rewrites what was said.",
        true,
        &[("turns", "turns", 0), ("tool calls", "tool_calls", 1), ("segments", "segments", 6)],
    ),
    (
        "success",
        "Success of dialogues",
        "share",
        "Dialogues that succeeded, and calls of tools that failed.",
        true,
        &[("success", "success", 0), ("calls that failed", "tool_calls_failed", 1)],
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
        "lr",
        "Learning rate",
        "of the step",
        "With warm-up and schedule.",
        true,
        &[("learning rate", "learning_rate", 4)],
    ),
    (
        "speed",
        "Speed",
        "tokens per second",
        "Sampled tokens, and tokens through forward and backward.",
        true,
        &[("rollout", "rollout_tokens_per_s", 0), ("update", "update_tokens_per_s", 1)],
    ),
    (
        "time",
        "Time",
        "seconds of a step",
        "Where they went. The tail is the part of prompts, decoding and sampling that passed with fewer than half as many sequences \
         in work as at most.",
        true,
        &[
            ("prompts", "prompt_seconds", 0),
            ("decoding", "decode_seconds", 1),
            ("sampling", "sampling_seconds", 2),
            ("tail", "tail_seconds", 6),
            ("scoring", "scoring_seconds", 3),
            ("update", "update_seconds", 4),
        ],
    ),
];
/// What is said of the policy that is trained, which is another one in each phase.
const OF_THE_PHASE: [&str; 4] = ["loss", "entropy_nats", "clip_fraction", "gradient_norm"];

fn over_steps(steps: &Steps) -> Vec<Part> {
    let mut parts = Vec::new();
    for (id, title, y, caption, zero, curves) in CHARTS {
        let curves =
            curves.iter().flat_map(|&(name, key, colour)| match OF_THE_PHASE.contains(&key) {
                true => steps.curves_by_phase(name, key, colour),
                false => steps.curve(name, key, colour).into_iter().collect(),
            });
        let series: Vec<Series> = curves.collect();
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
