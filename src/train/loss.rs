//! The policy-gradient loss of a response's tokens, and its derivative.
//!
//! `r = exp(clamp(d, -20, 20))`, where d is `logp_new - logp_old` of the token ([`Ratio::Token`]), or the
//! mean of it over the response ([`Ratio::Sequence`], GSPO, arXiv 2507.18071: `s = (pi_new(y) / pi_old(y))^(1/|y|)`,
//! the same for every token, so that each token's gradient is the response's mean).
//!
//! - [`Surrogate::Clip`] (PPO, PAPER section 2): `L = max(-A r, -A clip(r, 1 - low, 1 + high))`, and for A < 0
//!   `L = min(L, -A c)` (dual clip).
//! - [`Surrogate::Cispo`] (arXiv 2506.13585): `L = -sg(clip(r, 1 - low, 1 + high)) A logp_new`: the weight is
//!   clipped and held constant, and no token loses its gradient.
//!
//! Ours beside it, off by default: a KL penalty against the base policy with the estimator
//! `k3 = exp(d) - d - 1`, `d = logp_base - logp_new` (never negative, unbiased), and the weight of
//! truncated importance sampling, `min(exp(logp_old - logp_rollout), cap)`, which scales the surrogate.

use serde::{Deserialize, Serialize};

/// Bound on the log of the ratio, as in the reference code.
const LOG_RATIO_MAX: f32 = 20.0;

/// Settings of the loss.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct LossConfig {
    /// Whose ratio.
    pub ratio: Ratio,
    /// What is done with it.
    pub surrogate: Surrogate,
    /// Ratio may fall to `1 - clip_low`.
    pub clip_low: f32,
    /// Ratio may rise to `1 + clip_high`.
    pub clip_high: f32,
    /// Dual clip: with a negative advantage a token costs at most `-A * clip_c`.
    pub clip_c: f32,
    /// Weight of the KL penalty against the base.
    pub kl_coef: f32,
}

impl Default for LossConfig {
    /// GRPO's.
    fn default() -> LossConfig {
        LossConfig {
            ratio: Ratio::Token,
            surrogate: Surrogate::Clip,
            clip_low: 0.2,
            clip_high: 0.2,
            clip_c: 10.0,
            kl_coef: 0.0,
        }
    }
}

/// Whose probability ratio a token is weighted by.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Ratio {
    /// Its own.
    Token,
    /// The response's, length-normalised (GSPO).
    Sequence,
}

/// What a ratio does to the loss.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Surrogate {
    /// Clipped where it has gone far enough (PPO).
    Clip,
    /// A constant, clipped weight of the log-prob (CISPO).
    Cispo,
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

/// Losses of a response's tokens with new log-probs `new`; each `gradient` is the derivative of the *sum* of
/// the losses by that token's log-prob.
pub fn response_loss(config: &LossConfig, tokens: &[TokenContext], new: &[f32]) -> Vec<TokenLoss> {
    let log_ratios = tokens.iter().zip(new).map(|(token, new)| new - token.old);
    let mut log_ratios: Vec<f32> = log_ratios.collect();
    if config.ratio == Ratio::Sequence {
        let mean = log_ratios.iter().sum::<f32>() / log_ratios.len() as f32;
        log_ratios.fill(mean);
    }
    let rows = tokens.iter().zip(new).zip(&log_ratios);
    let mut losses: Vec<TokenLoss> =
        rows.map(|((token, &new), &d)| surrogate(config, token, new, d)).collect();
    // The surrogates of all tokens depend on the response's ratio, each token's log-prob by 1 / n. (CISPO's
    // depend on their own log-prob alone, for its ratio is held constant.)
    if config.ratio == Ratio::Sequence && config.surrogate == Surrogate::Clip {
        let mean = losses.iter().map(|l| l.gradient).sum::<f32>() / losses.len() as f32;
        losses.iter_mut().for_each(|l| l.gradient = mean);
    }
    for ((loss, token), &new) in losses.iter_mut().zip(tokens).zip(new) {
        penalise(config, token, new, loss);
    }
    losses
}

/// Loss and derivative of one token alone with new log-prob `new`.
pub fn token_loss(config: &LossConfig, token: &TokenContext, new: f32) -> TokenLoss {
    let mut loss = surrogate(config, token, new, new - token.old);
    penalise(config, token, new, &mut loss);
    loss
}

/// The surrogate at a log ratio, with its derivative by the log ratio (CISPO: by the log-prob).
fn surrogate(config: &LossConfig, token: &TokenContext, new: f32, log_ratio: f32) -> TokenLoss {
    let a = token.advantage;
    let bounded = log_ratio.clamp(-LOG_RATIO_MAX, LOG_RATIO_MAX);
    let ratio = bounded.exp();
    let held = ratio.clamp(1.0 - config.clip_low, 1.0 + config.clip_high);
    let (mut loss, mut gradient, mut clipped);
    match config.surrogate {
        Surrogate::Clip => {
            let (free, fixed) = (-a * ratio, -a * held);
            loss = free.max(fixed);
            // d ratio / d new = ratio, where neither the bound nor a clip holds.
            clipped = fixed > free;
            if a < 0.0 && loss > -a * config.clip_c {
                loss = -a * config.clip_c;
                clipped = true;
            }
            gradient = if clipped || bounded != log_ratio { 0.0 } else { free };
        }
        Surrogate::Cispo => {
            loss = -held * a * new;
            gradient = -held * a;
            clipped = held != ratio;
        }
    }
    loss *= token.importance;
    gradient *= token.importance;
    TokenLoss { loss, gradient, clipped, ratio, kl: 0.0 }
}

/// Adds the KL penalty.
fn penalise(config: &LossConfig, token: &TokenContext, new: f32, out: &mut TokenLoss) {
    if let Some(base) = token.base {
        let d = (base - new).clamp(-LOG_RATIO_MAX, LOG_RATIO_MAX);
        out.kl = d.exp() - d - 1.0;
        out.loss += config.kl_coef * out.kl;
        out.gradient += config.kl_coef * (1.0 - d.exp());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const CONFIG: LossConfig = LossConfig {
        ratio: Ratio::Token,
        surrogate: Surrogate::Clip,
        clip_low: 0.2,
        clip_high: 0.2,
        clip_c: 10.0,
        kl_coef: 0.0,
    };

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
    fn a_responses_gradient_is_the_derivative_of_its_sum() {
        let new = [-0.9, -1.4, -0.5, -1.02];
        let tokens: Vec<TokenContext> = [(0.7, -1.0), (0.7, -1.2), (-0.3, -0.6), (0.7, -1.0)]
            .iter()
            .zip([1.0, 0.5, 1.0, 0.9])
            .map(|(&(advantage, old), importance)| TokenContext {
                advantage,
                old,
                base: Some(-1.1),
                importance,
            })
            .collect();
        for ratio in [Ratio::Token, Ratio::Sequence] {
            let config = LossConfig { ratio, kl_coef: 0.2, ..CONFIG };
            let sum = |new: &[f32]| -> f64 {
                response_loss(&config, &tokens, new).iter().map(|l| l.loss as f64).sum()
            };
            let losses = response_loss(&config, &tokens, &new);
            for (t, loss) in losses.iter().enumerate() {
                let (mut up, mut down) = (new, new);
                (up[t], down[t]) = (up[t] + 1e-3, down[t] - 1e-3);
                let numeric = (sum(&up) - sum(&down)) / 2e-3;
                let gap = (numeric - loss.gradient as f64).abs();
                assert!(gap < 2e-3, "{ratio:?} {t}: {numeric} {}", loss.gradient);
            }
        }
    }

    #[test]
    fn cispo_keeps_the_gradient_of_clipped_tokens() {
        let config = LossConfig { surrogate: Surrogate::Cispo, clip_low: 1.0, ..CONFIG };
        // ratio 1.65: the weight stays at 1.2 and the gradient with it.
        let far = token_loss(&config, &token(1.0, None), -0.5);
        assert_eq!((far.gradient, far.loss, far.clipped), (-1.2, 0.6, true));
        // Downwards nothing is clipped.
        let low = token_loss(&config, &token(1.0, None), -3.0);
        assert!((low.gradient + (-2.0f32).exp()).abs() < 1e-6 && !low.clipped);
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
