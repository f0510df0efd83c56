//! The layers' policies through both lenses, with the final norm before the unembedding and without, on the same tokens:
//! without it the sizes of hidden states decide how sure a policy is.

use serde::{Deserialize, Serialize};

use super::measure::{Look, Measured, measure};
use super::record::Figure;
use crate::Result;
use crate::model::{Batch, Engine, Lora, Model};

/// Tokens that are looked at, the first of the data: the second lens takes as long as the first.
const TOKENS: usize = 256;
/// What is summed up.
const FIGURES: [Figure; 3] = [Figure::LayerOut, Figure::KlToFinal, Figure::Top1Agrees];

/// Sums over the first tokens.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Lenses {
    /// Tokens taken.
    pub tokens: usize,
    /// By layer, without the final norm.
    raw: Vec<[f64; FIGURES.len()]>,
    /// By layer, with it.
    normed: Vec<[f64; FIGURES.len()]>,
}

/// The means of a layer under one lens.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Seen {
    /// Entropy of the layer's policy, nats.
    pub entropy: f64,
    /// KL(layer policy || final policy), nats.
    pub kl_to_final: f64,
    /// Share of tokens whose likeliest token is the final policy's.
    pub top1_agrees: f64,
}

impl Lenses {
    /// Takes the picked tokens of a batch, as far as more are wanted; `measured`: by layer and token, through `look`.
    /// What was measured of them through the other lens, by layer and token.
    ///
    /// # Errors
    /// Those of the engine.
    pub fn take(
        &mut self,
        engine: &mut Engine,
        (model, lora): (&Model, Option<&Lora>),
        (batch, picked): (&Batch, &[usize]),
        measured: &[Vec<Measured>],
        look: Look,
    ) -> Result<Vec<Vec<Measured>>> {
        let wanted = picked.len().min(TOKENS.saturating_sub(self.tokens));
        if wanted == 0 {
            return Ok(Vec::new());
        }
        let other = Look { final_norm: !look.final_norm, ..look };
        let through = measure(engine, model, lora, batch, &picked[..wanted], other)?;
        let (raw, normed) = match look.final_norm {
            false => (measured, through.as_slice()),
            true => (through.as_slice(), measured),
        };
        add(&mut self.raw, raw, wanted);
        add(&mut self.normed, normed, wanted);
        self.tokens += wanted;
        Ok(through)
    }

    /// Means by layer: without the final norm, and with it.
    pub fn means(&self) -> [Vec<Seen>; 2] {
        let n = self.tokens.max(1) as f64;
        let seen = |sums: &[f64; FIGURES.len()]| Seen {
            entropy: sums[0] / n,
            kl_to_final: sums[1] / n,
            top1_agrees: sums[2] / n,
        };
        [&self.raw, &self.normed].map(|layers| layers.iter().map(seen).collect())
    }
}

fn add(sums: &mut Vec<[f64; FIGURES.len()]>, layers: &[Vec<Measured>], tokens: usize) {
    sums.resize(layers.len(), [0.0; FIGURES.len()]);
    for (sums, layer) in sums.iter_mut().zip(layers) {
        for m in &layer[..tokens] {
            for (sum, figure) in sums.iter_mut().zip(FIGURES) {
                *sum += m.figures[figure as usize] as f64;
            }
        }
    }
}
