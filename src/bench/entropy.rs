//! Entropies of every tap of every layer.

use super::measure::timed;
use super::{Bench, Row, row};
use crate::Result;
use crate::analysis::{Look, measure};
use crate::model::{Batch, Engine};

/// Names of the cases.
pub(super) const CASES: [&str; 1] = ["all taps"];

/// Tokens of the sequence.
const TOKENS: usize = 64;

pub(super) fn run(bench: &Bench<'_>, name: &str) -> Result<Option<Vec<Row>>> {
    if name != CASES[0] {
        return Ok(None);
    }
    let (model, config) = (bench.model, bench.model.config());
    let tokens = bench.tokens(TOKENS + 1, 1);
    let mut batch = Batch::default();
    batch.push_group(&tokens[..1], &[&tokens[1..]], config.n_vocab)?;
    let picked: Vec<usize> = (0..TOKENS).collect();
    let mut engine = Engine::on(bench.model.device(), bench.pool.clone())?;
    // The heads of all taps; the layers themselves are little beside them.
    let taps = 5 * config.n_layer + 2;
    let flop = 2.0 * (taps * TOKENS) as f64 * (config.n_embd * config.n_vocab) as f64;
    let timing = timed(bench, flop, || {
        measure(&mut engine, model, None, &batch, &picked, Look::default()).map(drop)
    })?;
    model.engine().look_at_memory()?;
    Ok(Some(vec![row(
        format!("entropy/{name}"),
        &[
            ("tokens", TOKENS as f64),
            ("taps", taps as f64),
            ("seconds", timing.seconds),
            ("tokens_per_s", TOKENS as f64 / timing.seconds),
            ("useful_gflop_per_s", flop / timing.seconds / 1e9),
            ("sgemm_gflop_per_s", timing.sgemm_flop_per_s / 1e9),
            ("share_of_sgemm", timing.share()),
        ],
    )]))
}
