//! Forward and backward of an update: full and internal phase, shared and repeated prompts, cost against
//! tokens, depth and vocabulary.

use super::measure::timed;
use super::{Bench, Row, cost, row};
use crate::Result;
use crate::ggml::TensorSet;
use crate::model::{Batch, Engine, Lora, Map, Model, Policy};

/// Names of the cases.
pub(super) const CASES: [&str; 9] = [
    "full phase",
    "full phase, computed again",
    "full phase, half prompt",
    "internal phase",
    "internal phase, half prompt",
    "group of 8, shared prompt",
    "group of 8, repeated prompt",
    "forward only",
    COST,
];

/// The case that is not one size but many.
const COST: &str = "cost";

/// What is computed.
struct Case {
    batch: Batch,
    policy: Policy,
    backward: bool,
}

/// `n` sequences of a prompt and a completion, `t` inputs each.
fn sequences(bench: &Bench<'_>, n: usize, prompt: usize, t: usize) -> Result<Batch> {
    let mut batch = Batch::default();
    for i in 0..n {
        let tokens = bench.tokens(t + 1, i);
        let (prompt, completion) = tokens.split_at(prompt.max(1));
        batch.push_group(prompt, &[completion], bench.model.config().n_vocab)?;
    }
    Ok(batch)
}

/// `n` sequences of `t` inputs, all of which are scored.
pub(super) fn all_scored(bench: &Bench<'_>, n: usize, t: usize) -> Result<Batch> {
    sequences(bench, n, 1, t)
}

impl Case {
    fn new(bench: &Bench<'_>, name: &str) -> Result<Option<Case>> {
        let config = bench.model.config();
        let (n_layer, v, t) = (config.n_layer, config.n_vocab, bench.options.tokens);
        let full = Policy::full(n_layer);
        let internal = Policy::internal(bench.options.internal_layer(config), n_layer, false)?;
        let (batch, policy) = match name {
            "full phase" | "full phase, computed again" | "forward only" => {
                (all_scored(bench, 2, t)?, full)
            }
            "full phase, half prompt" => (sequences(bench, 2, t / 2, t)?, full),
            "internal phase" => (all_scored(bench, 2, t)?, internal),
            "internal phase, half prompt" => (sequences(bench, 2, t / 2, t)?, internal),
            "group of 8, shared prompt" | "group of 8, repeated prompt" => {
                let prompt = bench.tokens(t, 0);
                let completions: Vec<Vec<i32>> =
                    (1..=8).map(|i| bench.tokens((t / 2).max(2), i)).collect();
                let all: Vec<&[i32]> = completions.iter().map(Vec::as_slice).collect();
                let mut batch = Batch::default();
                if name.contains("shared") {
                    batch.push_group(&prompt, &all, v)?;
                } else {
                    for one in all {
                        batch.push_group(&prompt, &[one], v)?;
                    }
                }
                (batch, full)
            }
            _ => return Ok(None),
        };
        Ok(Some(Case { batch, policy, backward: name != "forward only" }))
    }

    /// Operations that a perfect implementation needs: each linear map once forward and once for the
    /// cotangent of its input, the head twice; adapters and attention do not count.
    fn useful_flop(&self, model: &Model) -> f64 {
        let config = model.config();
        let passes = 1.0 + self.backward as u8 as f64;
        let weights = layer_weights(model, self.policy.depth());
        let layers = weights * self.batch.len() as f64;
        let head = (config.n_embd * config.n_vocab * self.batch.scored.len()) as f64;
        passes * 2.0 * (layers + head)
    }
}

/// Weights of the linear maps of layers 1 to `depth` that a token goes through: of experts those that it takes.
fn layer_weights(model: &Model, depth: usize) -> f64 {
    let used = |map: &Map| match model.config().layer(map.layer).experts {
        Some(experts) if map.n_expert > 1 => experts.used,
        _ => 1,
    };
    let maps = model.maps().iter().filter(|map| map.layer <= depth);
    maps.map(|map| used(map) * map.n_in * map.n_out).sum::<usize>() as f64
}

/// What computes forwards and backwards.
pub(super) struct Pass<'b> {
    model: &'b Model,
    lora: Lora,
    gradients: TensorSet,
    engine: Engine,
}

impl<'b> Pass<'b> {
    /// `memory`: bytes for activations that are kept.
    pub(super) fn new(bench: &Bench<'b>, memory: usize) -> Result<Pass<'b>> {
        let lora = bench.adapter()?;
        let gradients = lora.zeros_like()?;
        let mut engine = Engine::on(bench.model.device(), bench.pool.clone())?;
        engine.keep_up_to(memory);
        Ok(Pass { model: bench.model, lora, gradients, engine })
    }

    /// A micro batch forward, and backward when asked for.
    pub(super) fn run(&mut self, batch: &Batch, policy: Policy, backward: bool) -> Result<()> {
        let Pass { model, lora, gradients, engine } = self;
        if !backward {
            engine.forward(model, Some(lora), batch, policy.depth())?;
            return engine.score(model, Some(lora), batch, policy, 1.0, false).map(drop);
        }
        engine.forward_to_train(model, lora, batch, policy.depth())?;
        engine.score(model, Some(lora), batch, policy, 1.0, true)?;
        // Signs in turn, as advantages have them.
        let n = batch.scored.len();
        let cotangents: Vec<f32> =
            (0..n).map(|i| if i % 2 == 0 { 1.0 } else { -1.0 } / n as f32).collect();
        engine.backward(model, lora, gradients, batch, policy, &cotangents)
    }
}

pub(super) fn run(bench: &Bench<'_>, name: &str) -> Result<Option<Vec<Row>>> {
    if name == COST {
        return cost::run(bench).map(Some);
    }
    let Some(case) = Case::new(bench, name)? else { return Ok(None) };
    let memory = if name.contains("computed again") { 0 } else { bench.options.keep };
    let mut pass = Pass::new(bench, memory)?;
    let n = case.batch.scored.len();
    let flop = case.useful_flop(bench.model);
    let timing = timed(bench, flop, || pass.run(&case.batch, case.policy, case.backward))?;
    bench.model.engine().look_at_memory()?;
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
            ("engine_bytes", pass.engine.bytes() as f64),
        ],
    )]))
}
