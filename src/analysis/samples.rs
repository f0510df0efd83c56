//! A few completions kept for looking at: each token under each layer's policy.

use serde::{Deserialize, Serialize};

use super::record::{Figure, Record, Tap};

/// Completions kept.
pub(super) const SAMPLES: usize = 6;
/// Positions kept of each.
const POSITIONS: usize = 96;

/// One policy at one position.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Glance {
    /// Entropy, nats.
    pub entropy: f32,
    /// KL(this policy || final policy), nats, of a layer's policy.
    pub kl_to_final: Option<f32>,
    /// Likeliest tokens as text, and their probabilities.
    pub top: Vec<(String, f32)>,
    /// Probability of the token that was taken.
    pub taken_prob: f32,
    /// Its rank.
    pub taken_rank: u32,
}

/// One completion, as far as it is kept.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct View {
    /// Row of the data, from 0.
    pub row: usize,
    /// Completion of the row, from 0.
    pub completion: usize,
    /// Positions and the texts of the tokens taken there.
    pub tokens: Vec<(usize, String)>,
    /// Glances by tap, layer and token: of the layer's policy, and of attention and FFN where the dump has their tokens.
    pub taps: Vec<(Tap, Vec<Vec<Glance>>)>,
    /// Of the final policy, by token.
    pub last: Vec<Glance>,
}

/// The taps that are looked at.
const TAPS: [(Tap, Figure); 3] = [
    (Tap::LayerOut, Figure::LayerOut),
    (Tap::AttnOut, Figure::AttnOut),
    (Tap::FfnOut, Figure::FfnOut),
];

/// The first completions of a dump.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Gallery {
    /// In the order of the data.
    pub views: Vec<View>,
}

impl Gallery {
    /// Takes a record, while there is room; records come sample by sample, layer by layer, in order.
    pub fn take(&mut self, record: &Record) {
        let same = |view: &View| (view.row, view.completion) == (record.row, record.completion);
        if !self.views.last().is_some_and(same) {
            if self.views.len() == SAMPLES || record.layer != 1 {
                return;
            }
            let (row, completion) = (record.row, record.completion);
            let known = TAPS.iter().filter(|(tap, _)| record.tops[*tap as usize].is_some());
            let taps = known.map(|&(tap, _)| (tap, Vec::new())).collect();
            self.views.push(View { row, completion, taps, ..View::default() });
        }
        let view = self.views.last_mut().expect("just made");
        if record.layer == 1 && view.tokens.len() < POSITIONS {
            view.tokens.push((record.position, record.text.clone()));
            view.last.push(glance(record, Figure::FinalEntropy, Tap::Final));
        }
        for (tap, layers) in &mut view.taps {
            layers.resize_with(layers.len().max(record.layer), Vec::new);
            let layer = &mut layers[record.layer - 1];
            if layer.len() < view.tokens.len() {
                let (_, figure) = TAPS.iter().find(|(t, _)| t == tap).expect("one of them");
                layer.push(glance(record, *figure, *tap));
            }
        }
    }
}

fn glance(record: &Record, entropy: Figure, tap: Tap) -> Glance {
    let top = record.tops[tap as usize].clone().unwrap_or_default();
    Glance {
        entropy: record.get(entropy),
        kl_to_final: (tap == Tap::LayerOut).then(|| record.get(Figure::KlToFinal)),
        top: top.texts.into_iter().zip(top.probs).collect(),
        taken_prob: top.taken_prob,
        taken_rank: top.taken_rank,
    }
}
