//! Losses of preferences: pairs of completions to one prompt, and completions with a label.
//!
//! With `s` the sum of a completion's log-probs, `m` their mean over its n tokens, `s'`, `m'` the same under the
//! reference, c the chosen and r the rejected completion of a pair, and sigma the logistic function:
//!
//! | loss | h | L | source |
//! |---|---|---|---|
//! | DPO `sigmoid` | `(s_c - s'_c) - (s_r - s'_r)` | `-(1 - e) log sigma(b h) - e log sigma(-b h)` | arXiv 2305.18290, 2309.10254 (e) |
//! | DPO `robust` | the same | `(-(1 - e) log sigma(b h) + e log sigma(-b h)) / (1 - 2 e)` | arXiv 2403.00409 |
//! | DPO `hinge` | the same | `max(0, 1 - b h)` | SLiC, arXiv 2305.10425 |
//! | DPO `ipo` | `(m_c - m'_c) - (m_r - m'_r)` | `(h - 1 / (2 b))^2` | IPO, arXiv 2310.12036 |
//! | ORPO | `log odds(m_c) - log odds(m_r)` | `-m_c - b log sigma(h)`, `odds(m) = e^m / (1 - e^m)` | arXiv 2403.07691 |
//! | SimPO | `m_c - m_r` | `-log sigma(b h - g)` | arXiv 2405.14734 |
//! | KTO | `z = s - s'`, beside `z0` | wanted: `w (1 - sigma(b (z - z0)))`, unwanted: `w' (1 - sigma(b (z0 - z)))` | arXiv 2402.01306 |
//!
//! The loss of a mini batch is the mean over its pairs, of KTO over its completions. KTO's `z0` is a bound on
//! `KL(policy || reference)` that has no gradient: the mean of z over the mini batch's prompts, each with the completion
//! of the next row, and not below 0. Departures: IPO takes means over tokens, as its authors advise and libraries do,
//! not sums; ORPO's log-likelihood is the mean over the pair's own completion.

use super::row_options::DpoLoss;

/// Which loss of a pair.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum PairLoss {
    /// DPO, with the share of wrong labels.
    Dpo(DpoLoss, f64),
    /// Odds ratio beside the log-likelihood.
    Orpo,
    /// Means of log-probs without reference, with the margin g.
    Simpo(f64),
}

/// Loss of pairs and its beta.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct PairConfig {
    /// The loss.
    pub loss: PairLoss,
    /// b above.
    pub beta: f64,
}

/// Settings of KTO.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct KtoConfig {
    /// b above.
    pub beta: f64,
    /// Weight of completions that are wanted.
    pub desirable: f64,
    /// Weight of the others.
    pub undesirable: f64,
}

/// A completion's log-probs, nats.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Likelihood {
    /// Sum under the policy.
    pub policy: f64,
    /// Sum under the reference; 0 where there is none.
    pub reference: f64,
    /// Number of tokens.
    pub tokens: usize,
}

/// Loss of a pair.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct PairOutcome {
    /// The loss.
    pub loss: f64,
    /// Its derivatives by the policy's sums, of the chosen completion and of the rejected one.
    pub gradient: [f64; 2],
    /// Implicit rewards of both.
    pub rewards: [f64; 2],
}

/// log sigma(x)
fn log_sigmoid(x: f64) -> f64 {
    x.min(0.0) - (-x.abs()).exp().ln_1p()
}

fn sigmoid(x: f64) -> f64 {
    log_sigmoid(x).exp()
}

impl Likelihood {
    fn ratio(&self) -> f64 {
        self.policy - self.reference
    }

    fn mean(&self) -> f64 {
        self.policy / self.tokens as f64
    }
}

impl PairConfig {
    /// Whether the reference has a say.
    pub fn has_reference(&self) -> bool {
        matches!(self.loss, PairLoss::Dpo(..))
    }

    /// Loss of the pair of a chosen and a rejected completion.
    pub fn loss(&self, chosen: &Likelihood, rejected: &Likelihood) -> PairOutcome {
        let b = self.beta;
        let per = [1.0 / chosen.tokens as f64, 1.0 / rejected.tokens as f64];
        match self.loss {
            PairLoss::Dpo(kind, wrong) => {
                let rewards = [b * chosen.ratio(), b * rejected.ratio()];
                let h = chosen.ratio() - rejected.ratio();
                let (right, left) = (log_sigmoid(b * h), log_sigmoid(-b * h));
                let (up, down) = ((1.0 - wrong) * left.exp(), wrong * right.exp());
                // The loss, and its derivatives by h and by the terms of h.
                let (loss, slope, scale) = match kind {
                    DpoLoss::Sigmoid => {
                        (-(1.0 - wrong) * right - wrong * left, -b * (up - down), [1.0; 2])
                    }
                    DpoLoss::Robust => {
                        let rest = 1.0 - 2.0 * wrong;
                        let loss = (-(1.0 - wrong) * right + wrong * left) / rest;
                        (loss, -b * (up + down) / rest, [1.0; 2])
                    }
                    DpoLoss::Hinge => {
                        let lack = 1.0 - b * h;
                        (lack.max(0.0), if lack > 0.0 { -b } else { 0.0 }, [1.0; 2])
                    }
                    DpoLoss::Ipo => {
                        let over = per[0] * chosen.ratio() - per[1] * rejected.ratio() - 0.5 / b;
                        (over * over, 2.0 * over, per)
                    }
                };
                PairOutcome { loss, gradient: [slope * scale[0], -slope * scale[1]], rewards }
            }
            PairLoss::Orpo => {
                let means = [chosen.mean(), rejected.mean()];
                // A mean of 0 is a certainty, whose odds have no end.
                let log_rest = means.map(|m| (-m.min(-1e-12).exp_m1()).ln());
                let h = (means[0] - log_rest[0]) - (means[1] - log_rest[1]);
                // d log odds / dm = 1 / (1 - e^m)
                let slope = log_rest.map(|l| (-l).exp());
                let pull = -b * sigmoid(-h);
                let gradient = [per[0] * (pull * slope[0] - 1.0), -per[1] * pull * slope[1]];
                let loss = -means[0] - b * log_sigmoid(h);
                PairOutcome { loss, gradient, rewards: means.map(|m| b * m) }
            }
            PairLoss::Simpo(margin) => {
                let means = [chosen.mean(), rejected.mean()];
                let x = b * (means[0] - means[1]) - margin;
                let slope = -b * sigmoid(-x);
                let gradient = [per[0] * slope, -per[1] * slope];
                PairOutcome { loss: -log_sigmoid(x), gradient, rewards: means.map(|m| b * m) }
            }
        }
    }
}

impl KtoConfig {
    /// Loss of a labelled completion, its derivative by the policy's sum, and its implicit reward.
    pub fn loss(&self, completion: &Likelihood, wanted: bool, z0: f64) -> (f64, f64, f64) {
        let b = self.beta;
        let (weight, sign) = if wanted { (self.desirable, 1.0) } else { (self.undesirable, -1.0) };
        let x = sign * b * (completion.ratio() - z0);
        let (yes, no) = (sigmoid(x), sigmoid(-x));
        (weight * no, -weight * sign * b * yes * no, b * completion.ratio())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rand::{Rng, SeedableRng};
    use rand_chacha::ChaCha8Rng;

    fn random(rng: &mut ChaCha8Rng) -> Likelihood {
        let tokens = rng.random_range(1..30);
        let mut sum = || -(tokens as f64) * rng.random_range(0.01..3.0);
        Likelihood { policy: sum(), reference: sum(), tokens }
    }

    fn losses() -> Vec<PairConfig> {
        let mut all = Vec::new();
        for beta in [0.05, 0.1, 2.0] {
            for wrong in [0.0, 0.2] {
                for kind in [DpoLoss::Sigmoid, DpoLoss::Robust, DpoLoss::Ipo, DpoLoss::Hinge] {
                    all.push(PairConfig { loss: PairLoss::Dpo(kind, wrong), beta });
                }
            }
            all.push(PairConfig { loss: PairLoss::Orpo, beta });
            all.push(PairConfig { loss: PairLoss::Simpo(0.7), beta });
        }
        all
    }

    #[test]
    fn gradients_are_the_derivatives() {
        let mut rng = ChaCha8Rng::seed_from_u64(1);
        for config in losses() {
            for _ in 0..50 {
                let pair = [random(&mut rng), random(&mut rng)];
                let loss = |pair: [Likelihood; 2]| config.loss(&pair[0], &pair[1]).loss;
                let exact = config.loss(&pair[0], &pair[1]).gradient;
                for side in 0..2 {
                    let (mut up, mut down) = (pair, pair);
                    (up[side].policy, down[side].policy) =
                        (pair[side].policy + 1e-5, pair[side].policy - 1e-5);
                    let numeric = (loss(up) - loss(down)) / 2e-5;
                    let bound = 1e-5 * (1.0 + exact[side].abs());
                    // The hinge has a corner, which is rarely met.
                    assert!(
                        (numeric - exact[side]).abs() < bound,
                        "{config:?}: {numeric} {exact:?}"
                    );
                }
            }
        }
    }

    #[test]
    fn losses_are_the_formulas() {
        let chosen = Likelihood { policy: -4.0, reference: -6.0, tokens: 4 };
        let rejected = Likelihood { policy: -9.0, reference: -8.0, tokens: 2 };
        let loss = |loss: PairLoss, beta: f64| PairConfig { loss, beta }.loss(&chosen, &rejected);
        let near = |a: f64, b: f64| assert!((a - b).abs() < 1e-12, "{a} {b}");
        // h = 2 + 1 = 3
        let sigma = |x: f64| 1.0 / (1.0 + (-x).exp());
        let plain = loss(PairLoss::Dpo(DpoLoss::Sigmoid, 0.0), 0.5);
        near(plain.loss, -sigma(1.5).ln());
        assert_eq!(plain.rewards, [1.0, -0.5]);
        let smoothed = loss(PairLoss::Dpo(DpoLoss::Sigmoid, 0.1), 0.5).loss;
        near(smoothed, -0.9 * sigma(1.5).ln() - 0.1 * sigma(-1.5).ln());
        let robust = loss(PairLoss::Dpo(DpoLoss::Robust, 0.1), 0.5).loss;
        near(robust, (-0.9 * sigma(1.5).ln() + 0.1 * sigma(-1.5).ln()) / 0.8);
        near(loss(PairLoss::Dpo(DpoLoss::Hinge, 0.0), 0.1).loss, 0.7);
        near(loss(PairLoss::Dpo(DpoLoss::Hinge, 0.0), 0.5).loss, 0.0);
        // h = 2 / 4 + 1 / 2 = 1, target 1 / (2 * 0.5)
        near(loss(PairLoss::Dpo(DpoLoss::Ipo, 0.0), 0.5).loss, 0.0);
        near(loss(PairLoss::Dpo(DpoLoss::Ipo, 0.0), 0.1).loss, 16.0);
        // m_c = -1, m_r = -4.5
        let odds = |m: f64| m.exp() / (1.0 - m.exp());
        let z = odds(-1.0).ln() - odds(-4.5).ln();
        near(loss(PairLoss::Orpo, 0.1).loss, 1.0 - 0.1 * sigma(z).ln());
        near(loss(PairLoss::Simpo(1.0), 2.0).loss, -sigma(2.0 * 3.5 - 1.0).ln());
    }

    #[test]
    fn kto_is_its_formula_and_its_gradient_the_derivative() {
        let config = KtoConfig { beta: 0.3, desirable: 1.5, undesirable: 0.5 };
        let sigma = |x: f64| 1.0 / (1.0 + (-x).exp());
        let mut rng = ChaCha8Rng::seed_from_u64(2);
        for wanted in [true, false] {
            for _ in 0..50 {
                let (at, z0) = (random(&mut rng), rng.random_range(0.0..2.0));
                let (loss, gradient, reward) = config.loss(&at, wanted, z0);
                let z = at.policy - at.reference;
                let formula = match wanted {
                    true => 1.5 * (1.0 - sigma(0.3 * (z - z0))),
                    false => 0.5 * (1.0 - sigma(0.3 * (z0 - z))),
                };
                assert!((loss - formula).abs() < 1e-12 && (reward - 0.3 * z).abs() < 1e-12);
                let moved = |by: f64| {
                    let moved = Likelihood { policy: at.policy + by, ..at };
                    config.loss(&moved, wanted, z0).0
                };
                let numeric = (moved(1e-5) - moved(-1e-5)) / 2e-5;
                assert!((numeric - gradient).abs() < 1e-8, "{numeric} {gradient}");
            }
        }
    }

    #[test]
    fn far_margins_stay_finite() {
        for config in losses() {
            for policy in [-1e4, -1e-13] {
                let far = Likelihood { policy, reference: -5.0, tokens: 3 };
                let near = Likelihood { policy: -5.0, reference: -5.0, tokens: 3 };
                for outcome in [config.loss(&far, &near), config.loss(&near, &far)] {
                    let finite = outcome.gradient.iter().all(|g| g.is_finite());
                    assert!(outcome.loss.is_finite() && finite, "{config:?}: {outcome:?}");
                }
            }
        }
    }
}
