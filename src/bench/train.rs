//! Forward and backward of an update: full and internal phase, shared and repeated prompts, cost against
//! tokens and depth.

use super::measure::timed;
use super::{Bench, Row, row};
use crate::Result;
use crate::model::{Batch, Config, Engine, Policy, Target};

/// Names of the cases.
pub(super) const CASES: [&str; 16] = [
    "full phase",
    "full phase, computed again",
    "full phase, half prompt",
    "internal phase",
    "internal phase, half prompt",
    "group of 8, shared prompt",
    "group of 8, repeated prompt",
    "tokens / 4",
    "tokens / 2",
    "tokens x 1",
    "tokens x 2",
    "depth L / 4",
    "depth L / 2",
    "depth 3 L / 4",
    "depth L",
    "forward only",
];

/// What is computed.
struct Case {
    batch: Batch,
    policy: Policy,
    backward: bool,
}

impl Case {
    fn new(bench: &Bench<'_>, name: &str) -> Result<Option<Case>> {
        let config = bench.model.config();
        let (n_layer, v, t) = (config.n_layer, config.n_vocab, bench.options.tokens);
        let full = Policy::full(n_layer);
        let internal = |layer| Policy::internal(layer, n_layer, false);
        let mut batch = Batch::default();
        // `n` sequences of `prompt` tokens and as many more as make `t` inputs, the latter all scored.
        let mut sequences = |n: usize, prompt: usize, t: usize| -> Result<()> {
            for i in 0..n {
                let tokens = bench.tokens(t + 1, i);
                let (prompt, completion) = tokens.split_at(prompt.max(1));
                batch.push_group(prompt, &[completion], v)?;
            }
            Ok(())
        };
        let layer = bench.options.internal_layer(config);
        let policy = match name {
            "full phase"
            | "full phase, computed again"
            | "tokens x 1"
            | "depth L"
            | "forward only" => {
                sequences(2, 1, t)?;
                full
            }
            "full phase, half prompt" => {
                sequences(2, t / 2, t)?;
                full
            }
            "internal phase" => {
                sequences(2, 1, t)?;
                internal(layer)?
            }
            "internal phase, half prompt" => {
                sequences(2, t / 2, t)?;
                internal(layer)?
            }
            "tokens / 4" | "tokens / 2" | "tokens x 2" => {
                let n = ["tokens / 4", "tokens / 2", "", "tokens x 2"];
                let n = n.iter().position(|n| *n == name).expect("one of them");
                sequences(2, 1, (t << n) / 4)?;
                full
            }
            "depth L / 4" | "depth L / 2" | "depth 3 L / 4" => {
                let quarters = 1 + ["L / 4", "L / 2", "3 L / 4"]
                    .iter()
                    .position(|n| name.strip_prefix("depth ") == Some(*n))
                    .expect("one of them");
                sequences(2, 1, t)?;
                internal((quarters * n_layer / 4).max(1))?
            }
            "group of 8, shared prompt" | "group of 8, repeated prompt" => {
                let prompt = bench.tokens(t, 0);
                let completions: Vec<Vec<i32>> =
                    (1..=8).map(|i| bench.tokens((t / 2).max(2), i)).collect();
                let all: Vec<&[i32]> = completions.iter().map(Vec::as_slice).collect();
                if name.contains("shared") {
                    batch.push_group(&prompt, &all, v)?;
                } else {
                    for one in all {
                        batch.push_group(&prompt, &[one], v)?;
                    }
                }
                full
            }
            _ => return Ok(None),
        };
        Ok(Some(Case { batch, policy, backward: name != "forward only" }))
    }

    /// Operations that a perfect implementation needs: each linear map once forward and once for the
    /// cotangent of its input, the head twice; adapters and attention do not count.
    fn useful_flop(&self, config: &Config) -> f64 {
        let passes = 1.0 + self.backward as u8 as f64;
        let layers = self.policy.depth() as f64 * layer_weights(config) * self.batch.len() as f64;
        let head = (config.n_embd * config.n_vocab * self.batch.scored.len()) as f64;
        passes * 2.0 * (layers + head)
    }
}

/// Weights of the linear maps of a layer.
fn layer_weights(c: &Config) -> f64 {
    let (q, kv) = (c.head_size * c.n_head, c.head_size * c.n_head_kv);
    Target::ALL
        .into_iter()
        .map(|target| match target {
            Target::Q | Target::O => c.n_embd * q,
            Target::K | Target::V => c.n_embd * kv,
            Target::Gate | Target::Up | Target::Down => c.n_embd * c.n_ff,
        })
        .sum::<usize>() as f64
}

pub(super) fn run(bench: &Bench<'_>, name: &str) -> Result<Option<Vec<Row>>> {
    let Some(case) = Case::new(bench, name)? else { return Ok(None) };
    let model = bench.model;
    let lora = bench.adapter()?;
    let mut gradients = lora.zeros_like()?;
    let mut engine = Engine::on(bench.model.device(), bench.pool.clone())?;
    engine.keep_up_to(if name.contains("computed again") { 0 } else { bench.options.keep });
    let n = case.batch.scored.len();
    // Signs in turn, as advantages have them.
    let cotangents: Vec<f32> =
        (0..n).map(|i| if i % 2 == 0 { 1.0 } else { -1.0 } / n as f32).collect();
    let flop = case.useful_flop(model.config());
    let timing = timed(bench, flop, || {
        if case.backward {
            engine.forward_to_train(model, &lora, &case.batch, case.policy.depth())?;
        } else {
            engine.forward(model, Some(&lora), &case.batch, case.policy.depth())?;
        }
        engine.score(model, &case.batch, case.policy, 1.0, case.backward)?;
        if case.backward {
            let (batch, policy) = (&case.batch, case.policy);
            engine.backward(model, &lora, &mut gradients, batch, policy, &cotangents)?;
        }
        Ok(())
    })?;
    model.engine().look_at_memory()?;
    Ok(Some(vec![row(
        format!("train/{name}"),
        &[
            ("layers", case.policy.depth() as f64),
            ("tokens", case.batch.len() as f64),
            ("scored", n as f64),
            ("seconds", timing.seconds),
            ("tokens_per_s", case.batch.len() as f64 / timing.seconds),
            ("scored_per_s", n as f64 / timing.seconds),
            ("useful_gflop_per_s", flop / timing.seconds / 1e9),
            ("sgemm_gflop_per_s", timing.sgemm_flop_per_s / 1e9),
            ("share_of_sgemm", timing.share()),
            ("engine_bytes", engine.bytes() as f64),
        ],
    )]))
}
