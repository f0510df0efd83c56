//! What the routers of a mixture of experts do: which experts are busy, and how sure the choice is.

use serde::Serialize;

/// One layer's router at one token.
#[derive(Clone, Debug, Default, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct Routed {
    /// The chosen experts, from 0, ascending.
    pub experts: Vec<i32>,
    /// Entropy of the softmax over all experts, nats.
    pub entropy: f32,
}

impl Routed {
    /// From router logits `[E]` and chosen experts.
    pub fn new(logits: &[f32], experts: &[f32]) -> Routed {
        let most = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max) as f64;
        let exps: Vec<f64> = logits.iter().map(|&z| (z as f64 - most).exp()).collect();
        let sum: f64 = exps.iter().sum();
        let of = |e: &f64| if *e > 0.0 { -(e / sum) * (e / sum).ln() } else { 0.0 };
        Routed {
            experts: experts.iter().map(|&e| e as i32).collect(),
            entropy: exps.iter().map(of).sum::<f64>() as f32,
        }
    }
}

/// Running sums over the tokens of one layer.
#[derive(Clone, Debug, Default)]
pub(super) struct RouterSums {
    tokens: u64,
    entropy: f64,
    chosen: Vec<u64>,
}

impl RouterSums {
    pub(super) fn new(n_expert: usize) -> RouterSums {
        RouterSums { chosen: vec![0; n_expert], ..RouterSums::default() }
    }

    pub(super) fn add(&mut self, routed: &Routed) {
        self.tokens += 1;
        self.entropy += routed.entropy as f64;
        for &expert in &routed.experts {
            if let Some(n) = self.chosen.get_mut(expert as usize) {
                *n += 1;
            }
        }
    }

    /// The layer's figures; none where no token was routed.
    pub(super) fn load(&self, layer: usize) -> Option<ExpertLoad> {
        let all = self.chosen.iter().sum::<u64>();
        (all > 0).then(|| {
            let load: Vec<f64> = self.chosen.iter().map(|&n| n as f64 / all as f64).collect();
            let entropy = load.iter().filter(|p| **p > 0.0).map(|p| -p * p.ln()).sum();
            ExpertLoad {
                layer,
                router_entropy: self.entropy / self.tokens as f64,
                load_entropy: entropy,
                unused: load.iter().filter(|p| **p == 0.0).count(),
                load,
            }
        })
    }
}

/// What a layer's router did with all tokens.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct ExpertLoad {
    /// From 1.
    pub layer: usize,
    /// Mean entropy of the softmax over all experts, nats.
    pub router_entropy: f64,
    /// Entropy of the load, nats: ln E where all experts are equally busy.
    pub load_entropy: f64,
    /// Experts that no token chose.
    pub unused: usize,
    /// Of each expert, its share of all choices.
    pub load: Vec<f64>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn loads_are_shares_of_choices() {
        let mut sums = RouterSums::new(4);
        assert_eq!(sums.load(2), None);
        sums.add(&Routed::new(&[0.0; 4], &[1.0, 2.0]));
        sums.add(&Routed::new(&[0.0, 100.0, 0.0, 0.0], &[1.0, 3.0]));
        let load = sums.load(2).unwrap();
        assert_eq!((load.layer, load.unused), (2, 1));
        assert_eq!(load.load, [0.0, 0.5, 0.25, 0.25]);
        assert!((load.router_entropy - 4f64.ln() / 2.0).abs() < 1e-6);
        assert!((load.load_entropy - 1.5 * 2f64.ln()).abs() < 1e-12);
    }
}
