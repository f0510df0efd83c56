//! The clipped policy-gradient loss of one token, and its derivative.
//!
//! PAPER section 2: `r = exp(clamp(logp_new - logp_old, -20, 20))`,
//! `L = max(-A r, -A clip(r, 1 - low, 1 + high))`, and for A < 0 `L = min(L, -A c)` (dual clip).
//!
//! Ours beside it, off by default: a KL penalty against the base policy with the estimator
//! `k3 = exp(d) - d - 1`, `d = logp_base - logp_new` (never negative, unbiased), and the weight of
//! truncated importance sampling, `min(exp(logp_old - logp_rollout), cap)`, which scales the clipped term.

use serde::{Deserialize, Serialize};

/// Bound on the log of the ratio, as in the reference code.
const LOG_RATIO_MAX: f32 = 20.0;

/// Settings of the token loss.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct LossConfig {
    /// Ratio may fall to `1 - clip_low`.
    pub clip_low: f32,
    /// Ratio may rise to `1 + clip_high`.
    pub clip_high: f32,
    /// Dual clip: with a negative advantage a token costs at most `-A * clip_c`.
    pub clip_c: f32,
    /// Weight of the KL penalty against the base.
    pub kl_coef: f32,
}

/// How token losses of a mini batch become one number.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Aggregation {
    /// Mean over all tokens of the mini batch (the reference code's).
    TokenMean,
    /// Mean over responses of the mean over their tokens (the paper's formula).
    SequenceMean,
    /// Sum over tokens divided by responses times the length limit: a constant (Dr. GRPO).
    Constant,
}

impl Aggregation {
    /// Weight of each token of a response of `length`, in a mini batch of `tokens` tokens and
    /// `responses` responses, whose length is limited to `max_response`.
    pub fn weight(
        self,
        length: usize,
        tokens: usize,
        responses: usize,
        max_response: usize,
    ) -> f32 {
        let weight = match self {
            Aggregation::TokenMean => 1.0 / tokens as f64,
            Aggregation::SequenceMean => 1.0 / (responses as f64 * length as f64),
            Aggregation::Constant => 1.0 / (responses as f64 * max_response as f64),
        };
        weight as f32
    }
}

/// What is known of a token before the update.
#[derive(Clone, Copy, Debug)]
pub struct TokenContext {
    /// Advantage of its response.
    pub advantage: f32,
    /// Log-prob under the policy before the step's first update.
    pub old: f32,
    /// Log-prob under the base model, with a KL penalty.
    pub base: Option<f32>,
    /// Weight of truncated importance sampling, else 1.
    pub importance: f32,
}

/// Loss of one token.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct TokenLoss {
    /// The loss.
    pub loss: f32,
    /// Its derivative by the new log-prob.
    pub gradient: f32,
    /// Whether a clip holds, so that the ratio has no say.
    pub clipped: bool,
    /// exp(new - old), bounded.
    pub ratio: f32,
    /// The KL estimate, nats.
    pub kl: f32,
}

/// Loss and derivative of one token with new log-prob `new`.
pub fn token_loss(config: &LossConfig, token: &TokenContext, new: f32) -> TokenLoss {
    let a = token.advantage;
    let log_ratio = new - token.old;
    let bounded = log_ratio.clamp(-LOG_RATIO_MAX, LOG_RATIO_MAX);
    let ratio = bounded.exp();
    let free = -a * ratio;
    let fixed = -a * ratio.clamp(1.0 - config.clip_low, 1.0 + config.clip_high);
    let mut loss = free.max(fixed);
    // d ratio / d new = ratio, where neither the bound nor a clip holds.
    let mut clipped = fixed > free;
    if a < 0.0 && loss > -a * config.clip_c {
        loss = -a * config.clip_c;
        clipped = true;
    }
    let mut gradient = if clipped || bounded != log_ratio { 0.0 } else { free };
    loss *= token.importance;
    gradient *= token.importance;
    let mut kl = 0.0;
    if let Some(base) = token.base {
        let d = (base - new).clamp(-LOG_RATIO_MAX, LOG_RATIO_MAX);
        kl = d.exp() - d - 1.0;
        loss += config.kl_coef * kl;
        gradient += config.kl_coef * (1.0 - d.exp());
    }
    TokenLoss { loss, gradient, clipped, ratio, kl }
}

#[cfg(test)]
mod tests {
    use super::*;

    const CONFIG: LossConfig =
        LossConfig { clip_low: 0.2, clip_high: 0.2, clip_c: 10.0, kl_coef: 0.0 };

    fn token(advantage: f32, base: Option<f32>) -> TokenContext {
        TokenContext { advantage, old: -1.0, base, importance: 1.0 }
    }

    #[test]
    fn clips_stop_the_gradient_on_their_side_only() {
        let up = (-1.0f32) + 0.5; // ratio 1.65
        assert_eq!(token_loss(&CONFIG, &token(1.0, None), up).gradient, 0.0);
        assert!(token_loss(&CONFIG, &token(-1.0, None), up).gradient > 0.0);
        let down = -1.0 - 0.5; // ratio 0.61
        assert!(token_loss(&CONFIG, &token(1.0, None), down).gradient < 0.0);
        assert_eq!(token_loss(&CONFIG, &token(-1.0, None), down).gradient, 0.0);
    }

    #[test]
    fn dual_clip_bounds_the_cost_of_a_bad_token() {
        let far = token_loss(&CONFIG, &token(-1.0, None), 3.0); // ratio e^4
        assert_eq!((far.loss, far.gradient, far.clipped), (10.0, 0.0, true));
    }

    #[test]
    fn gradient_is_the_derivative() {
        let config = LossConfig { kl_coef: 0.3, ..CONFIG };
        for advantage in [-1.5, 0.7] {
            for new in [-1.9, -1.1, -0.95, -0.4] {
                let t = TokenContext { importance: 0.6, ..token(advantage, Some(-1.2)) };
                let h = 1e-3;
                let numeric = (token_loss(&config, &t, new + h).loss
                    - token_loss(&config, &t, new - h).loss)
                    / (2.0 * h);
                let exact = token_loss(&config, &t, new).gradient;
                assert!((numeric - exact).abs() < 2e-3, "{advantage} {new}: {numeric} {exact}");
            }
        }
    }

    #[test]
    fn weights_sum_to_one_response_each() {
        let lengths = [3usize, 5];
        let total = |agg: Aggregation| -> f32 {
            lengths.iter().map(|&n| n as f32 * agg.weight(n, 8, 2, 10)).sum()
        };
        assert!((total(Aggregation::TokenMean) - 1.0).abs() < 1e-6);
        assert!((total(Aggregation::SequenceMean) - 1.0).abs() < 1e-6);
        assert!((total(Aggregation::Constant) - 0.4).abs() < 1e-6);
    }
}
