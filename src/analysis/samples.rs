//! A few completions kept for looking at: each token under each layer's policy.

use super::record::{Figure, Record, Tap};

/// Completions kept.
const SAMPLES: usize = 6;
/// Positions kept of each.
const POSITIONS: usize = 96;

/// One policy at one position.
#[derive(Clone, Debug, PartialEq)]
pub struct Glance {
    /// Entropy, nats.
    pub entropy: f32,
    /// Likeliest tokens as text, and their probabilities.
    pub top: Vec<(String, f32)>,
    /// Probability of the token that was taken.
    pub taken_prob: f32,
    /// Its rank.
    pub taken_rank: u32,
}

/// One completion, as far as it is kept.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct View {
    /// Row of the data, from 0.
    pub row: usize,
    /// Completion of the row, from 0.
    pub completion: usize,
    /// Positions and the texts of the tokens taken there.
    pub tokens: Vec<(usize, String)>,
    /// Glances by layer and token.
    pub layers: Vec<Vec<Glance>>,
    /// Of the final policy, by token.
    pub last: Vec<Glance>,
}

/// The first completions of a dump.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Gallery {
    /// In the order of the data.
    pub views: Vec<View>,
}

impl Gallery {
    /// Takes a record, while there is room; records come sample by sample, layer by layer, in order.
    pub fn take(&mut self, record: &Record, text: &impl Fn(i32) -> String) {
        let same = |view: &View| (view.row, view.completion) == (record.row, record.completion);
        if !self.views.last().is_some_and(same) {
            if self.views.len() == SAMPLES || record.layer != 1 {
                return;
            }
            let (row, completion) = (record.row, record.completion);
            self.views.push(View { row, completion, ..View::default() });
        }
        let view = self.views.last_mut().expect("just made");
        if record.layer == 1 && view.tokens.len() < POSITIONS {
            view.tokens.push((record.position, record.text.clone()));
        }
        view.layers.resize_with(view.layers.len().max(record.layer), Vec::new);
        let layer = &mut view.layers[record.layer - 1];
        if layer.len() < view.tokens.len() {
            layer.push(glance(record, Figure::LayerOut, Tap::LayerOut, text));
            if record.layer == 1 {
                view.last.push(glance(record, Figure::FinalEntropy, Tap::Final, text));
            }
        }
    }
}

fn glance(record: &Record, entropy: Figure, tap: Tap, text: &impl Fn(i32) -> String) -> Glance {
    let top = record.tops[tap as usize].clone().unwrap_or_default();
    Glance {
        entropy: record.get(entropy),
        top: top.tokens.iter().map(|&t| text(t)).zip(top.probs).collect(),
        taken_prob: top.taken_prob,
        taken_rank: top.taken_rank,
    }
}

#[cfg(test)]
mod tests {
    use super::super::record::example;
    use super::*;

    #[test]
    fn the_first_tokens_of_the_first_samples_are_kept() {
        let mut gallery = Gallery::default();
        for row in 0..SAMPLES + 2 {
            for layer in 1..=3 {
                for position in 0..POSITIONS + 5 {
                    let record = Record { row, ..example(layer, position, false) };
                    gallery.take(&record, &|t| format!("<{t}>"));
                }
            }
        }
        assert_eq!(gallery.views.len(), SAMPLES);
        for view in &gallery.views {
            assert_eq!(
                (view.tokens.len(), view.last.len(), view.layers.len()),
                (POSITIONS, POSITIONS, 3)
            );
            assert!(view.layers.iter().all(|l| l.len() == POSITIONS));
            assert_eq!(view.layers[2][4].top[0].0, "<5>");
            assert_eq!(view.layers[2][4].entropy, example(3, 4, false).get(Figure::LayerOut));
        }
    }
}
