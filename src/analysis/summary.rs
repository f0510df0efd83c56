//! Means per layer by running sums, and the boundary layer that follows from them.

use serde::ser::{Serialize, SerializeMap, Serializer};

use super::record::Figure;
use super::routers::{ExpertLoad, Routed, RouterSums};
use crate::model::{Config, Policy};

/// Entropy changes of a layer and its two modules (PAPER section 1), derived from the figures.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Change {
    /// H(H^l) - H(H^(l-1))
    Layer,
    /// H(A^l) - H(norm(H^(l-1)))
    Attn,
    /// H(F^l) - H(norm(H^(l-1) + A^l))
    Ffn,
}

impl Change {
    /// All three with their names.
    pub const ALL: [(Change, &'static str); 3] =
        [(Change::Layer, "dH_layer"), (Change::Attn, "dH_attn"), (Change::Ffn, "dH_ffn")];

    fn of(self, figures: &[f32; Figure::N]) -> f64 {
        let (after, before) = match self {
            Change::Layer => (Figure::LayerOut, Figure::LayerIn),
            Change::Attn => (Figure::AttnOut, Figure::AttnIn),
            Change::Ffn => (Figure::FfnOut, Figure::FfnIn),
        };
        figures[after as usize] as f64 - figures[before as usize] as f64
    }
}

const VALUES: usize = Figure::N + 3;

/// A mean over tokens.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Mean {
    /// The mean.
    pub mean: f64,
    /// Its standard error, tokens taken as independent; NaN (in JSON null) of fewer than two tokens.
    pub se: f64,
}

impl Mean {
    /// How far the mean may be off: one standard error, 0 where it is not known.
    pub fn margin(&self) -> f64 {
        if self.se.is_nan() { 0.0 } else { self.se }
    }
}

/// The means of one layer.
#[derive(Clone, Debug, PartialEq)]
pub struct LayerMeans {
    /// From 1.
    pub layer: usize,
    values: [Mean; VALUES],
}

impl LayerMeans {
    /// Mean of a figure.
    pub fn get(&self, figure: Figure) -> Mean {
        self.values[figure as usize]
    }

    /// Mean of an entropy change.
    pub fn change(&self, change: Change) -> Mean {
        self.values[Figure::N + change as usize]
    }
}

/// `{"layer": 1, "layer_in": mean, "layer_in_se": standard error, ..}`; the final policy's figures, which are
/// the same for all layers, stand beside the layers.
impl Serialize for LayerMeans {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut map = serializer.serialize_map(None)?;
        map.serialize_entry("layer", &self.layer)?;
        let own = |figure| !matches!(figure, Figure::FinalEntropy | Figure::FinalLogprob);
        let figures = Figure::ALL.into_iter().filter(|&(figure, _)| own(figure));
        let figures = figures.map(|(figure, name)| (name, self.get(figure)));
        let changes = Change::ALL.into_iter().map(|(change, name)| (name, self.change(change)));
        for (name, mean) in changes.chain(figures) {
            map.serialize_entry(name, &mean.mean)?;
            map.serialize_entry(&format!("{name}_se"), &mean.se)?;
        }
        map.end()
    }
}

/// Running sums over the tokens of one layer.
#[derive(Clone, Copy, Debug)]
struct LayerSums {
    n: u64,
    sum: [f64; VALUES],
    squares: [f64; VALUES],
}

/// Running sums over tokens, by layer.
#[derive(Clone, Debug)]
pub struct Sums {
    layers: Vec<LayerSums>,
    routers: Vec<RouterSums>,
}

impl Sums {
    /// Nothing yet.
    pub fn new(n_layer: usize) -> Sums {
        Sums {
            layers: vec![LayerSums { n: 0, sum: [0.0; VALUES], squares: [0.0; VALUES] }; n_layer],
            routers: vec![RouterSums::default(); n_layer],
        }
    }

    /// Nothing yet of a model, its routers included.
    pub fn of(config: &Config) -> Sums {
        let experts = config.layers.iter().map(|l| l.experts.map_or(0, |e| e.count));
        Sums { routers: experts.map(RouterSums::new).collect(), ..Sums::new(config.n_layer) }
    }

    /// Takes what the router of `layer` (from 1) did with one token.
    pub fn add_routed(&mut self, layer: usize, routed: &Routed) {
        self.routers[layer - 1].add(routed);
    }

    /// What the routers did, of the layers that have one.
    pub fn experts(&self) -> Vec<ExpertLoad> {
        let layers = self.routers.iter().enumerate();
        layers.filter_map(|(i, router)| router.load(i + 1)).collect()
    }

    fn add_values(&mut self, layer: usize, value: impl Fn(usize) -> f64) {
        let sums = &mut self.layers[layer - 1];
        sums.n += 1;
        for i in 0..VALUES {
            let x = value(i);
            sums.sum[i] += x;
            sums.squares[i] += x * x;
        }
    }

    /// Takes one token of `layer` (from 1).
    pub fn add(&mut self, layer: usize, figures: &[f32; Figure::N]) {
        self.add_values(layer, |i| value(figures, i));
    }

    /// Takes the difference `b - a` of one token of `layer` under two models.
    pub fn add_difference(&mut self, layer: usize, a: &[f32; Figure::N], b: &[f32; Figure::N]) {
        self.add_values(layer, |i| value(b, i) - value(a, i));
    }

    /// Tokens taken.
    pub fn tokens(&self) -> u64 {
        self.layers.first().map_or(0, |l| l.n)
    }

    /// The means so far.
    pub fn means(&self) -> Vec<LayerMeans> {
        let of = |(i, sums): (usize, &LayerSums)| {
            let n = sums.n as f64;
            let values = std::array::from_fn(|i| {
                let mean = sums.sum[i] / n;
                let variance = (sums.squares[i] - n * mean * mean).max(0.0) / (n - 1.0);
                let se = if sums.n < 2 { f64::NAN } else { (variance / n).sqrt() };
                Mean { mean, se }
            });
            LayerMeans { layer: i + 1, values }
        };
        self.layers.iter().enumerate().map(of).collect()
    }
}

/// Figure `i`, or the entropy change after the figures.
fn value(figures: &[f32; Figure::N], i: usize) -> f64 {
    match i.checked_sub(Figure::N) {
        None => figures[i] as f64,
        Some(change) => Change::ALL[change].0.of(figures),
    }
}

/// Where exploration ends: the last layer whose FFN raises the entropy (PAPER section 2).
#[derive(Clone, Debug, PartialEq, serde::Serialize)]
pub struct Boundary {
    /// The last layer with mean dH_ffn > 0; none where no FFN raises it.
    pub layer: Option<usize>,
    /// The last layer with mean dH_ffn more than a standard error above 0.
    pub surely_from: Option<usize>,
    /// The last layer with mean dH_ffn no more than a standard error below 0.
    pub surely_to: Option<usize>,
    /// Whether these differ: within a standard error the boundary could be another layer.
    pub tie: bool,
    /// What `train --internal-layer` should get: the boundary, or where its policy means nothing the lowest layer above
    /// it whose policy means something.
    pub recommended: usize,
    /// Share of tokens whose likeliest token is the same in the recommended layer's policy and in the final one.
    pub agreement: f64,
    /// KL(the recommended layer's policy || the final policy), nats.
    pub kl_to_final: f64,
    /// Whether that policy means something: see [`means_something`].
    pub means_something: bool,
    /// In words.
    pub why: String,
}

/// Share of tokens below which a layer's likeliest token is the final policy's by chance.
const LEAST_AGREEMENT: f64 = 0.15;
/// Distance from the final policy, nats, beyond which what a layer holds likely is ruled out in the end.
const MOST_KL: f64 = 10.0;

/// Whether a layer's policy has to do with what the model says in the end, so that to optimise it is to optimise that:
/// it has the final policy's likeliest token for at least 15 % of the tokens, and is at most 10 nats from it. The bounds tell
/// apart the layers of docs/EXPERIMENTS.md's entropy flow by family that say something and those whose size decides.
pub fn means_something(layer: &LayerMeans) -> bool {
    layer.get(Figure::Top1Agrees).mean >= LEAST_AGREEMENT
        && layer.get(Figure::KlToFinal).mean <= MOST_KL
}

/// The boundary layer of these means.
pub fn boundary(layers: &[LayerMeans]) -> Boundary {
    let last = |above: &dyn Fn(Mean) -> bool| {
        layers.iter().rev().find(|l| above(l.change(Change::Ffn))).map(|l| l.layer)
    };
    let layer = last(&|m| m.mean > 0.0);
    let surely_from = last(&|m| m.mean - m.margin() > 0.0);
    let surely_to = last(&|m| m.mean + m.margin() > 0.0);
    let tie = surely_from != surely_to;
    let n_layer = layers.len();
    // The policy of layer L is the final policy: an internal phase there would be none.
    let below_final = |layer: usize| layer.min(n_layer.saturating_sub(1)).max(1);
    let (recommended, mut why) = match layer {
        None => {
            let fallback = Policy::usual_layer(n_layer);
            (
                fallback,
                format!(
                    "no layer's FFN raises the entropy; layer {fallback} is three quarters of {n_layer}"
                ),
            )
        }
        Some(boundary) => {
            let m = layers[boundary - 1].change(Change::Ffn);
            let mut why = format!(
                "layer {boundary} is the last whose FFN raises the entropy: mean dH_ffn {:+.4} nats, standard error {:.4}",
                m.mean,
                m.margin()
            );
            if below_final(boundary) != boundary {
                why += &format!(
                    "; its policy is the final policy, so layer {}, the one below, is taken",
                    below_final(boundary)
                );
            }
            (below_final(boundary), why)
        }
    };
    if tie {
        let name = |layer: Option<usize>| layer.map_or("none".into(), |l| format!("layer {l}"));
        why += &format!(
            "; a tie: within a standard error it could be {} to {}",
            name(surely_from),
            name(surely_to)
        );
    }
    let said = |l: &LayerMeans| {
        format!(
            "it has the final policy's likeliest token for {:.0} % of the tokens and is {:.1} nats from it",
            100.0 * l.get(Figure::Top1Agrees).mean,
            l.get(Figure::KlToFinal).mean
        )
    };
    let mut recommended = recommended;
    if !means_something(&layers[recommended - 1]) {
        let words = said(&layers[recommended - 1]);
        let above = layers.iter().take(n_layer - 1).skip(recommended).find(|l| means_something(l));
        why += &match above {
            Some(better) => format!(
                "; but layer {recommended}'s policy means nothing ({words}), so layer {} is taken, the lowest above it \
                 whose policy means something ({})",
                better.layer,
                said(better)
            ),
            None => format!(
                "; but layer {recommended}'s policy means nothing ({words}), and none above it does: look through \
                 --final-norm, or train without an internal phase (--algo grpo)"
            ),
        };
        recommended = above.map_or(recommended, |better| better.layer);
    }
    let chosen = &layers[recommended - 1];
    Boundary {
        layer,
        surely_from,
        surely_to,
        tie,
        recommended,
        agreement: chosen.get(Figure::Top1Agrees).mean,
        kl_to_final: chosen.get(Figure::KlToFinal).mean,
        means_something: means_something(chosen),
        why,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Means of layers whose dH_ffn takes these two values on two tokens.
    fn means(dh_ffn: &[[f32; 2]]) -> Vec<LayerMeans> {
        let mut sums = Sums::new(dh_ffn.len());
        for (l, values) in dh_ffn.iter().enumerate() {
            for &x in values {
                let mut figures = [0.0; Figure::N];
                figures[Figure::FfnIn as usize] = 5.0;
                figures[Figure::FfnOut as usize] = 5.0 + x;
                sums.add(l + 1, &figures);
            }
        }
        sums.means()
    }

    #[test]
    fn means_and_standard_errors() {
        let m = means(&[[1.0, 3.0]])[0].change(Change::Ffn);
        assert_eq!((m.mean, m.se), (2.0, 1.0)); // variance 2, over 2 tokens
        let mut one = Sums::new(1);
        one.add(1, &[1.0; Figure::N]);
        assert!(one.means()[0].get(Figure::LayerIn).se.is_nan());
        let mut difference = Sums::new(1);
        let (a, mut b) = ([1.0; Figure::N], [1.0; Figure::N]);
        b[Figure::LayerOut as usize] = 1.5;
        difference.add_difference(1, &a, &b);
        assert_eq!(difference.means()[0].change(Change::Layer).mean, 0.5);
        assert_eq!(difference.means()[0].get(Figure::LayerIn).mean, 0.0);
    }

    #[test]
    fn the_boundary_is_the_last_layer_above_zero() {
        let clear = boundary(&means(&[[0.5, 0.6], [-1.0, -1.1], [0.2, 0.3], [-0.4, -0.5]]));
        assert_eq!((clear.layer, clear.tie, clear.recommended), (Some(3), false, 3));
    }

    #[test]
    fn a_tie_is_seen_as_one() {
        // Layer 3 is below zero by less than its standard error.
        let tied = boundary(&means(&[[0.5, 0.6], [0.2, 0.3], [0.5, -0.6], [-0.4, -0.5]]));
        assert_eq!((tied.layer, tied.surely_from, tied.surely_to), (Some(2), Some(2), Some(3)));
        assert!(tied.tie && tied.why.contains("layer 2 to layer 3"), "{}", tied.why);
        // Layer 2 is above zero by less than that.
        let tied = boundary(&means(&[[0.5, 0.6], [-0.5, 0.6], [-0.4, -0.5]]));
        assert_eq!((tied.layer, tied.surely_from, tied.surely_to), (Some(2), Some(1), Some(2)));
        assert!(tied.tie);
    }

    #[test]
    fn a_layer_whose_policy_means_nothing_gives_way_to_one_above() {
        // Layer 2 is the boundary; agreement with the final policy and distance from it by layer.
        let with = |seen: [(f32, f32); 4]| {
            let mut sums = Sums::new(4);
            for (l, ((agrees, kl), change)) in
                seen.into_iter().zip([1.0, 1.0, -1.0, -1.0]).enumerate()
            {
                let mut figures = [0.0; Figure::N];
                figures[Figure::FfnOut as usize] = change;
                figures[Figure::Top1Agrees as usize] = agrees;
                figures[Figure::KlToFinal as usize] = kl;
                sums.add(l + 1, &figures);
            }
            boundary(&sums.means())
        };
        let fine = with([(0.0, 20.0), (0.3, 8.0), (0.5, 4.0), (1.0, 0.0)]);
        assert_eq!((fine.recommended, fine.means_something), (2, true), "{}", fine.why);
        let higher = with([(0.0, 20.0), (0.05, 8.0), (0.5, 4.0), (1.0, 0.0)]);
        assert_eq!((higher.layer, higher.recommended), (Some(2), 3), "{}", higher.why);
        assert!(
            higher.why.contains("layer 3 is taken") && higher.means_something,
            "{}",
            higher.why
        );
        let none = with([(0.0, 20.0), (0.3, 22.0), (0.5, 14.0), (1.0, 0.0)]);
        assert_eq!((none.recommended, none.means_something), (2, false));
        assert!(none.why.contains("--final-norm"), "{}", none.why);
    }

    #[test]
    fn the_last_layer_and_no_layer() {
        let last = boundary(&means(&[[-0.5, -0.6], [0.2, 0.3]]));
        assert_eq!((last.layer, last.recommended), (Some(2), 1));
        let none = boundary(&means(&[[-0.5, -0.6]; 8]));
        assert_eq!((none.layer, none.tie, none.recommended), (None, false, 6));
    }
}
