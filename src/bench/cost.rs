//! What an update costs against tokens, depth and vocabulary: sizes in turn, the shortest time of each.
//!
//! Tokens grow by sequences of one length, so that attention, quadratic in that length, grows as they do.

use std::time::Duration;

use super::measure::once;
use super::train::{Pass, all_scored};
use super::{Bench, Row, row};
use crate::Result;
use crate::ggml::{Arena, Executor, Graph, Input, Type};
use crate::model::{Batch, Policy};
use crate::ops::{self, LogitMap};

/// Sizes of each series, as multiples of the smallest.
const STEPS: usize = 4;

/// What is computed at one size.
enum Work {
    Update(Batch, Policy),
    /// The log-prob head with its gradient, over so many tokens of the vocabulary.
    Head(usize),
}

struct Size {
    series: &'static str,
    size: usize,
    work: Work,
    shortest: Duration,
}

pub(super) fn run(bench: &Bench<'_>) -> Result<Vec<Row>> {
    let config = bench.model.config();
    let (n_layer, v) = (config.n_layer, config.n_vocab);
    let length = (bench.options.tokens / STEPS).max(2);
    let mut sizes = Vec::new();
    let mut size = |series, size, work| {
        sizes.push(Size { series, size, work, shortest: Duration::MAX });
    };
    for i in 1..=STEPS {
        let batch = all_scored(bench, i, length)?;
        size("tokens", batch.len(), Work::Update(batch, Policy::full(n_layer)));
    }
    for i in 1..=STEPS {
        let depth = (i * n_layer / STEPS).max(1);
        let policy = Policy::internal(depth, n_layer, false)?;
        size("layers", depth, Work::Update(all_scored(bench, 2, length)?, policy));
    }
    for i in 1..=STEPS {
        size("vocabulary", i * v / STEPS, Work::Head(i * v / STEPS));
    }
    let mut pass = Pass::new(bench, bench.options.keep)?;
    for rep in 0..bench.options.reps + 1 {
        for size in &mut sizes {
            let time = match &size.work {
                Work::Update(batch, policy) => {
                    let (time, ran) = once(|| pass.run(batch, *policy, true));
                    ran?;
                    time
                }
                Work::Head(v) => head(bench, *v, 2 * length)?,
            };
            // The first round warms up.
            if rep > 0 {
                size.shortest = size.shortest.min(time);
            }
        }
    }
    Ok(sizes.chunk_by(|a, b| a.series == b.series).flat_map(rows).collect())
}

/// A row per size of a series.
fn rows(series: &[Size]) -> Vec<Row> {
    let point = |s: &Size| (s.size as f64, s.shortest.as_secs_f64());
    let ((x0, y0), (x1, y1)) = (point(&series[0]), point(&series[series.len() - 1]));
    let line = |x: f64| y0 + (y1 - y0) * (x - x0) / (x1 - x0).max(1.0);
    series
        .iter()
        .map(|s| {
            let (x, y) = point(s);
            row(
                format!("train/cost, {}", s.series),
                &[("size", x), ("seconds", y), ("over_straight_line", y / line(x))],
            )
        })
        .collect()
}

/// The time of the head over the first `v` tokens of the vocabulary and `t` positions.
fn head(bench: &Bench<'_>, v: usize, t: usize) -> Result<Duration> {
    let unembedding = bench.model.weights().unembedding();
    let d = unembedding.shape()[0];
    let mut executor = Executor::new(bench.model.device(), bench.pool.clone())?;
    let arena = Arena::new(32);
    let mut graph = Graph::new(&arena);
    let h = arena.input("h", Type::F32, &[d, t]);
    let target = arena.input("target", Type::I32, &[t]);
    let part = arena.row_range(unembedding, 0, v);
    let head = ops::Head::new(h, part, LogitMap::default());
    let head = ops::linear_logprob(&arena, head, Some(target), 1.0, true);
    graph.output(head.logprob);
    if let Some(gradient) = head.gradient {
        graph.output(gradient);
    }
    let values: Vec<f32> = (0..d * t).map(|i| (i * 31 % 61) as f32 / 30.0 - 1.0).collect();
    let targets: Vec<i32> = (0..t).map(|i| (i * 7919 % v) as i32).collect();
    let inputs = [(h, Input::F32(&values)), (target, Input::I32(&targets))];
    executor.run(&graph, &inputs)?;
    let (time, ran) = once(|| executor.run(&graph, &[]).map(drop));
    ran?;
    Ok(time)
}
