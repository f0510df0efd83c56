//! What a training run looks at again and again: a few fixed completions under the current adapter.

use serde::Serialize;
use serde::de::DeserializeOwned;

use super::measure::{Look, Measured, cosine, measure};
use super::pack::{Packed, Pick, pack};
use super::record::Figure;
use super::rows::Sample;
use super::summary::{Change, Sums};
use crate::Result;
use crate::model::{Engine, Lora, Model, Question, Walk};
use crate::team::Team;

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

/// Running sums over all tokens of `samples`, of which `budget` go through the model at once; the ranks of a team measure
/// one batch after another.
pub fn sums(
    engine: &mut Engine,
    model: &Model,
    lora: Option<&Lora>,
    samples: &[Sample],
    final_norm: bool,
    budget: usize,
    team: &Team,
) -> Result<Sums> {
    let mut sums = Sums::new(model.config().n_layer);
    let look = Look { top_k: 0, final_norm };
    let packs = packs(model, samples, budget)?;
    let measured = shared(team, &packs, |packed| {
        let layers = measure(engine, model, lora, &packed.batch, &packed.picked, look)?;
        let of_layer = |layer: Vec<Measured>| layer.into_iter().map(|m| m.figures).collect();
        Ok(layers.into_iter().map(of_layer).collect::<Vec<Vec<[f32; Figure::N]>>>())
    })?;
    for layers in measured {
        for (l, layer) in layers.iter().enumerate() {
            layer.iter().for_each(|figures| sums.add(l + 1, figures));
        }
    }
    Ok(sums)
}

/// What all ranks make of all batches, in their order.
fn shared<T: Serialize + DeserializeOwned>(
    team: &Team,
    packs: &[Packed],
    mut make: impl FnMut(&Packed) -> Result<T>,
) -> Result<Vec<T>> {
    let mut queue = team.queue(packs.len());
    let mut own = Vec::new();
    let made: Result<()> = (|| {
        while let Some(i) = queue.take()? {
            own.push((i, make(&packs[i])?));
        }
        Ok(())
    })();
    team.join(packs.len(), made.map(|()| own))
}

fn packs(model: &Model, samples: &[Sample], budget: usize) -> Result<Vec<Packed>> {
    pack(samples.to_vec(), Pick { every: 1, max_tokens: 0 }, budget, model.config().n_vocab)
}

/// Looks at `samples` (at least one token), with an eye on `layer`.
#[expect(clippy::too_many_arguments, reason = "those of `sums`, and a layer")]
pub fn probe(
    engine: &mut Engine,
    model: &Model,
    lora: Option<&Lora>,
    samples: &[Sample],
    layer: usize,
    final_norm: bool,
    budget: usize,
    team: &Team,
) -> Result<Probe> {
    let sums = sums(engine, model, lora, samples, final_norm, budget, team)?;
    let means = sums.means();
    let figure = |figure| means.iter().map(|l| l.get(figure).mean).collect::<Vec<f64>>();
    let change = |change| means.iter().map(|l| l.change(change).mean).collect::<Vec<f64>>();
    let n_later = model.config().n_layer - layer;
    let (mut cos_later, mut kl_later) = (vec![0.0; n_later], vec![0.0; n_later + 1]);
    let packs = packs(model, samples, budget)?;
    let parts =
        shared(team, &packs, |packed| later(engine, model, lora, packed, layer, final_norm))?;
    for (cos, kl) in parts {
        cos_later.iter_mut().zip(cos).for_each(|(sum, part)| *sum += part);
        kl_later.iter_mut().zip(kl).for_each(|(sum, part)| *sum += part);
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

/// Sums over a batch of the cosines, and of the divergences, of `layer` and those above it, and of the final policy.
fn later(
    engine: &mut Engine,
    model: &Model,
    lora: Option<&Lora>,
    packed: &Packed,
    layer: usize,
    final_norm: bool,
) -> Result<(Vec<f64>, Vec<f64>)> {
    let d = model.config().n_embd;
    let n_later = model.config().n_layer - layer;
    let (mut cos_later, mut kl_later) = (vec![0.0; n_later], vec![0.0; n_later + 1]);
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
    let columns: Vec<&[f32]> = columns.iter().map(Vec::as_slice).collect();
    let answers = engine.policies(model, lora, &columns, Question::default())?;
    for i in 0..rows.len() {
        for (m, sum) in kl_later.iter_mut().enumerate() {
            *sum += answers.kl_from(i * columns.len() + m) as f64;
        }
    }
    Ok((cos_later, kl_later))
}
