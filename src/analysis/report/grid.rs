//! The grid of a dump: token by layer, in each cell the likeliest token, coloured by a figure that the reader chooses.

use serde_json::{Value, json};

use super::page::Part;
use crate::analysis::dump::Findings;
use crate::analysis::record::Tap;
use crate::analysis::samples::{Gallery, Glance, View};

/// Cells of a page: what they hold is most of its size.
const CELLS: usize = 9000;
/// Tokens of a completion at least, whatever the number of layers.
const LEAST_TOKENS: usize = 12;

/// The grid of the first completions, under one model or two, and under the first through the other lens; none without
/// completions. `final_norm`: the lens that all was measured through.
pub(super) fn part(findings: &Findings, n_layer: usize, final_norm: bool) -> Option<Part> {
    let first = findings.galleries.first().filter(|gallery| !gallery.views.is_empty())?;
    let taps: usize = first.views[0].taps.len();
    let galleries = findings.galleries.len() + 1;
    let all = first.views.len() * n_layer * taps * galleries;
    let tokens = (CELLS / all).max(LEAST_TOKENS);
    let completions: Vec<Value> = first
        .views
        .iter()
        .enumerate()
        .map(|(i, view)| {
            json!({
                "title": format!("row {}, completion {}", view.row, view.completion),
                "prompt": findings.prompts.get(i),
                "tokens": view.tokens.iter().take(tokens).map(|(_, t)| t).collect::<Vec<_>>(),
            })
        })
        .collect();
    let shown = |gallery: &Gallery| -> Value {
        gallery.views.iter().map(|view| cells(view, tokens)).collect()
    };
    let models: Vec<Value> = findings.galleries.iter().map(shown).collect();
    Some(Part::Grid(json!({
        "completions": completions,
        "models": models,
        "other_lens": shown(&findings.other_lens),
        "final_norm": final_norm,
    })))
}

/// Rows of cells by tap, the lowest layer first, the final policy last.
fn cells(view: &View, tokens: usize) -> Value {
    let row = |glances: &[Glance]| -> Value { glances.iter().take(tokens).map(cell).collect() };
    let of_tap = |(tap, layers): &(Tap, Vec<Vec<Glance>>)| {
        let rows = layers.iter().map(|layer| row(layer)).chain([row(&view.last)]);
        (tap.name().to_string(), rows.collect::<Value>())
    };
    Value::Object(view.taps.iter().map(of_tap).collect())
}

/// Entropy, KL to the final policy, probability and rank of the taken token, then likeliest tokens and their
/// probabilities in turn.
fn cell(glance: &Glance) -> Value {
    let short =
        |x: f32| -> Value { format!("{x:.3e}").parse::<f64>().map_or(Value::Null, Value::from) };
    let mut cell = vec![
        short(glance.entropy),
        glance.kl_to_final.map_or(Value::Null, short),
        short(glance.taken_prob),
        glance.taken_rank.into(),
    ];
    for (text, p) in &glance.top {
        cell.extend([text.as_str().into(), short(*p)]);
    }
    Value::Array(cell)
}
