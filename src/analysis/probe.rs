//! What a training run looks at again and again: a few fixed completions under the current adapter.

use serde::Serialize;

use super::measure::{Look, cosine, measure};
use super::pack::{Packed, Pick, pack};
use super::record::Figure;
use super::rows::Sample;
use super::summary::{Change, Sums};
use crate::Result;
use crate::model::{Engine, Lora, Model, Question, Walk};

/// Means over the probe's tokens; entropies and divergences in nats. Lists are by layer, from layer 1 up.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Probe {
    /// Tokens looked at.
    pub tokens: u64,
    /// Entropy of the final policy.
    pub final_entropy: f64,
    /// exp(-mean log-prob of the probe's tokens) under the final policy.
    pub perplexity: f64,
    /// Entropy of the internal layer policies.
    pub layer_out: Vec<f64>,
    /// Entropy of the internal attention policies.
    pub attn_out: Vec<f64>,
    /// Entropy of the internal FFN policies.
    pub ffn_out: Vec<f64>,
    /// Entropy change by layers.
    #[serde(rename = "dH_layer")]
    pub dh_layer: Vec<f64>,
    /// Entropy change by attention.
    #[serde(rename = "dH_attn")]
    pub dh_attn: Vec<f64>,
    /// Entropy change by FFNs.
    #[serde(rename = "dH_ffn")]
    pub dh_ffn: Vec<f64>,
    /// KL(internal layer policy || final policy).
    pub kl_to_final: Vec<f64>,
    /// The layer that the next two lists start from: the internal phase's.
    pub layer: usize,
    /// cos(H^layer, H^m) for m = layer + 1 .. L.
    pub cos_later: Vec<f64>,
    /// KL(policy of layer || policy of m) for the same, and last the final policy.
    pub kl_later: Vec<f64>,
}

/// Running sums over all tokens of `samples`, of which `budget` go through the model at once.
pub fn sums(
    engine: &mut Engine,
    model: &Model,
    lora: Option<&Lora>,
    samples: &[Sample],
    final_norm: bool,
    budget: usize,
) -> Result<Sums> {
    let mut sums = Sums::new(model.config().n_layer);
    let look = Look { top_k: 0, final_norm };
    for packed in packs(model, samples, budget)? {
        let layers = measure(engine, model, lora, &packed.batch, &packed.picked, look)?;
        for (l, layer) in layers.iter().enumerate() {
            layer.iter().for_each(|m| sums.add(l + 1, &m.figures));
        }
    }
    Ok(sums)
}

fn packs(model: &Model, samples: &[Sample], budget: usize) -> Result<Vec<Packed>> {
    pack(samples.to_vec(), Pick { every: 1, max_tokens: 0 }, budget, model.config().n_vocab)
}

/// Looks at `samples` (at least one token), with an eye on `layer`.
pub fn probe(
    engine: &mut Engine,
    model: &Model,
    lora: Option<&Lora>,
    samples: &[Sample],
    layer: usize,
    final_norm: bool,
    budget: usize,
) -> Result<Probe> {
    let sums = sums(engine, model, lora, samples, final_norm, budget)?;
    let means = sums.means();
    let figure = |figure| means.iter().map(|l| l.get(figure).mean).collect::<Vec<f64>>();
    let change = |change| means.iter().map(|l| l.change(change).mean).collect::<Vec<f64>>();
    let n_later = model.config().n_layer - layer;
    let (mut cos_later, mut kl_later) = (vec![0.0; n_later], vec![0.0; n_later + 1]);
    for packed in packs(model, samples, budget)? {
        later(engine, model, lora, &packed, layer, final_norm, &mut cos_later, &mut kl_later)?;
    }
    let tokens = sums.tokens();
    cos_later.iter_mut().chain(&mut kl_later).for_each(|sum| *sum /= tokens as f64);
    Ok(Probe {
        tokens,
        final_entropy: means[0].get(Figure::FinalEntropy).mean,
        perplexity: (-means[0].get(Figure::FinalLogprob).mean).exp(),
        layer_out: figure(Figure::LayerOut),
        attn_out: figure(Figure::AttnOut),
        ffn_out: figure(Figure::FfnOut),
        dh_layer: change(Change::Layer),
        dh_attn: change(Change::Attn),
        dh_ffn: change(Change::Ffn),
        kl_to_final: figure(Figure::KlToFinal),
        layer,
        cos_later,
        kl_later,
    })
}

/// Adds a batch's cosines and divergences of `layer` and those above it, and of the final policy.
#[expect(clippy::too_many_arguments, reason = "two sums of one walk")]
fn later(
    engine: &mut Engine,
    model: &Model,
    lora: Option<&Lora>,
    packed: &Packed,
    layer: usize,
    final_norm: bool,
    cos_later: &mut [f64],
    kl_later: &mut [f64],
) -> Result<()> {
    let d = model.config().n_embd;
    let rows: Vec<i32> = packed.picked.iter().map(|&i| packed.batch.scored[i].row).collect();
    let mut walk = Walk::new(engine, model, lora, &packed.batch, &rows)?;
    let mut own: Vec<f32> = Vec::new(); // H^layer: [D, S]
    let mut columns: Vec<Vec<f32>> = Vec::new(); // what goes through the unembedding, [D, S] each
    let (mut at, mut last) = (0, Vec::new());
    while let Some(taps) = walk.next(engine)? {
        at += 1;
        last = taps.layer_out;
        if at < layer {
            continue;
        }
        if at == layer {
            own.clone_from(&last);
        } else {
            let pairs = own.chunks_exact(d).zip(last.chunks_exact(d));
            cos_later[at - layer - 1] += pairs.map(|(a, b)| cosine(a, b) as f64).sum::<f64>();
        }
        let seen = if final_norm { engine.final_norm(model, &last)? } else { last.clone() };
        columns.push(seen);
    }
    columns.push(engine.final_norm(model, &last)?);
    columns.rotate_left(1); // the layer itself stands last: the others are compared with it
    let group = columns.len();
    let mut hidden = Vec::with_capacity(d * group * rows.len());
    for i in 0..rows.len() {
        columns.iter().for_each(|column| hidden.extend_from_slice(&column[i * d..][..d]));
    }
    let answers =
        engine.policies(model, lora, &hidden, &Question { taken: None, group, top_k: 0 })?;
    for i in 0..rows.len() {
        for (m, sum) in kl_later.iter_mut().enumerate() {
            *sum += answers.kl_from(i * group + m) as f64;
        }
    }
    Ok(())
}
