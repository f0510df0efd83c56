//! From logits to a token and its log-prob.
//!
//! The log-prob that is kept is the full policy's at the sampling temperature, `log softmax(logits / T)`,
//! whatever truncation chose among: it is what training compares with. Truncation, in this order: the
//! `top_k` likeliest, the smallest set with probability `top_p`, those with at least `min_p` times the
//! likeliest one's probability.

use clap::Args;
use serde::{Deserialize, Serialize};

use crate::ops::exp_fast;
use crate::{Error, Result};

/// How tokens are drawn.
#[derive(Clone, Copy, Debug, PartialEq, Args, Serialize, Deserialize)]
#[serde(default, rename_all = "kebab-case")]
pub struct Sampling {
    /// Temperature, which divides the logits; log-probs are taken at it too. 0 takes the likeliest token, with
    /// log-probs at temperature 1
    #[arg(long, default_value_t = 1.0, value_name = "X", help_heading = "Sampling")]
    pub temperature: f32,
    /// Keep the smallest set of tokens with this probability (1 = all)
    #[arg(long, default_value_t = 1.0, value_name = "X", help_heading = "Sampling")]
    pub top_p: f32,
    /// Keep the N likeliest tokens (0 = all)
    #[arg(long, default_value_t = 0, value_name = "N", help_heading = "Sampling")]
    pub top_k: usize,
    /// Keep tokens with at least X times the likeliest one's probability (0 = all)
    #[arg(long, default_value_t = 0.0, value_name = "X", help_heading = "Sampling")]
    pub min_p: f32,
}

impl Default for Sampling {
    fn default() -> Sampling {
        crate::options::defaults()
    }
}

impl Sampling {
    /// Refuses settings that cannot work.
    ///
    /// # Errors
    /// [`Error::Invalid`] naming the option.
    pub fn check(&self) -> Result<()> {
        let Sampling { temperature, top_p, min_p, .. } = *self;
        for (option, value, ok, expected) in [
            (
                "--temperature",
                temperature,
                (0.0..f32::INFINITY).contains(&temperature),
                "0 or more",
            ),
            ("--top-p", top_p, top_p > 0.0 && top_p <= 1.0, "above 0, at most 1"),
            ("--min-p", min_p, (0.0..1.0).contains(&min_p), "0 to below 1"),
        ] {
            if !ok {
                let got = value.to_string();
                return Err(Error::invalid(option, expected, got, "leave it out for the default"));
            }
        }
        Ok(())
    }

    pub(super) fn truncates(&self) -> bool {
        self.top_k > 0 || self.top_p < 1.0 || self.min_p > 0.0
    }
}

/// Draws tokens; keeps memory for probabilities between calls.
#[derive(Default)]
pub struct Sampler {
    probs: Vec<f32>,
    order: Vec<u32>,
}

impl Sampler {
    /// The token that `uniform` in [0, 1) picks from `logits: [V]`, and its log-prob in nats.
    pub fn sample(&mut self, logits: &[f32], sampling: &Sampling, uniform: f32) -> (i32, f32) {
        let greedy = sampling.temperature == 0.0;
        let scale = if greedy { 1.0 } else { 1.0 / sampling.temperature };
        let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        self.probs.resize(logits.len(), 0.0);
        for (p, &l) in self.probs.iter_mut().zip(logits) {
            *p = exp_fast((l - max) * scale);
        }
        let sum = sum_f64(&self.probs);
        let token = if greedy {
            logits.iter().position(|&l| l == max).unwrap_or(0)
        } else if sampling.truncates() {
            self.pick_truncated(sampling, uniform, sum)
        } else {
            pick(self.probs.iter().copied(), uniform as f64 * sum)
        };
        let logprob = ((logits[token] - max) * scale) as f64 - sum.ln();
        (token as i32, logprob as f32)
    }

    fn pick_truncated(&mut self, sampling: &Sampling, uniform: f32, sum: f64) -> usize {
        let probs = &self.probs;
        self.order.clear();
        self.order.extend(0..probs.len() as u32);
        // Likeliest first; ties by id, so that the order is one.
        let by_prob =
            |a: &u32, b: &u32| probs[*b as usize].total_cmp(&probs[*a as usize]).then(a.cmp(b));
        if sampling.top_k > 0 && sampling.top_k < self.order.len() {
            self.order.select_nth_unstable_by(sampling.top_k - 1, by_prob);
            self.order.truncate(sampling.top_k);
        }
        self.order.sort_unstable_by(by_prob);
        let kept: f64 = match sampling.top_k {
            0 => sum,
            _ => self.order.iter().map(|&i| probs[i as usize] as f64).sum(),
        };
        if sampling.top_p < 1.0 {
            let mut mass = 0.0;
            let wanted = sampling.top_p as f64 * kept;
            let n = self.order.iter().position(|&i| {
                mass += probs[i as usize] as f64;
                mass >= wanted
            });
            self.order.truncate(n.map_or(self.order.len(), |n| n + 1));
        }
        let floor = sampling.min_p * probs[self.order[0] as usize];
        self.order.retain(|&i| probs[i as usize] >= floor);
        let mass: f64 = self.order.iter().map(|&i| probs[i as usize] as f64).sum();
        let chosen = pick(self.order.iter().map(|&i| probs[i as usize]), uniform as f64 * mass);
        self.order[chosen] as usize
    }
}

/// Index of the first entry where the running sum passes `point`; the last one with any probability
/// when rounding leaves none.
fn pick(probs: impl Iterator<Item = f32>, point: f64) -> usize {
    let (mut mass, mut last) = (0.0, 0);
    for (i, p) in probs.enumerate() {
        mass += p as f64;
        if p > 0.0 {
            last = i;
            if mass > point {
                return i;
            }
        }
    }
    last
}

fn sum_f64(values: &[f32]) -> f64 {
    let mut lanes = [0f64; 16];
    let (chunks, rest) = values.as_chunks::<16>();
    for chunk in chunks {
        for i in 0..16 {
            lanes[i] += chunk[i] as f64;
        }
    }
    lanes.iter().sum::<f64>() + rest.iter().map(|&x| x as f64).sum::<f64>()
}

#[cfg(test)]
mod tests {
    use super::*;

    const LOGITS: [f32; 5] = [1.0, -0.5, 2.0, 0.0, -3.0];

    fn softmax(t: f64) -> Vec<f64> {
        let e: Vec<f64> = LOGITS.iter().map(|&l| (l as f64 / t).exp()).collect();
        e.iter().map(|x| x / e.iter().sum::<f64>()).collect()
    }

    fn frequencies(sampling: &Sampling) -> Vec<f64> {
        let (mut sampler, n) = (Sampler::default(), 20_000);
        let mut counts = vec![0.0; LOGITS.len()];
        for i in 0..n {
            let (token, _) = sampler.sample(&LOGITS, sampling, (i as f32 + 0.5) / n as f32);
            counts[token as usize] += 1.0 / n as f64;
        }
        counts
    }

    #[test]
    fn frequencies_and_logprobs_are_the_softmax() {
        for t in [0.5, 1.0, 2.0] {
            let sampling = Sampling { temperature: t, ..Sampling::default() };
            let exact = softmax(t as f64);
            for (f, p) in frequencies(&sampling).iter().zip(&exact) {
                assert!((f - p).abs() < 2e-4, "{f} {p}");
            }
            let (token, logprob) = Sampler::default().sample(&LOGITS, &sampling, 0.5);
            assert!((logprob as f64 - exact[token as usize].ln()).abs() < 1e-6);
        }
    }

    #[test]
    fn truncation_keeps_the_right_tokens() {
        let alive = |sampling: Sampling| -> Vec<usize> {
            let f = frequencies(&sampling);
            (0..f.len()).filter(|&i| f[i] > 0.0).collect()
        };
        // probabilities: 0.22, 0.05, 0.60, 0.08, 0.004 (about; the rest is rounding)
        assert_eq!(alive(Sampling { top_k: 2, ..Sampling::default() }), [0, 2]);
        assert_eq!(alive(Sampling { top_p: 0.7, ..Sampling::default() }), [0, 2]);
        assert_eq!(alive(Sampling { top_p: 0.3, ..Sampling::default() }), [2]);
        assert_eq!(alive(Sampling { min_p: 0.1, ..Sampling::default() }), [0, 2, 3]);
        assert_eq!(alive(Sampling { temperature: 0.0, ..Sampling::default() }), [2]);
    }

    #[test]
    fn the_ends_of_the_interval_are_tokens() {
        let mut sampler = Sampler::default();
        assert_eq!(sampler.sample(&LOGITS, &Sampling::default(), 0.0).0, 0);
        assert_eq!(sampler.sample(&LOGITS, &Sampling::default(), 0.999_999_94).0, 4);
        let inf = [f32::NEG_INFINITY, 0.0, f32::NEG_INFINITY];
        assert_eq!(sampler.sample(&inf, &Sampling::default(), 0.999_999_94).0, 1);
    }
}
