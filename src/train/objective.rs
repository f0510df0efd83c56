//! Objectives: from the scores of a micro batch to a loss and the cotangents of its log-probs.
//!
//! | objective | loss | cotangent of a token's log-prob |
//! |---|---|---|
//! | policy gradient | `loss.rs` | `weight dL/dlogp` |
//! | imitation (SFT) | `-sum_t w_t logp_t / sum_t w_t` | `-w_t / sum w` |
//! | pairs | mean over pairs of `preference.rs` | the pair's `dL/ds_c` or `dL/ds_r` |
//! | labelled (KTO) | mean over completions of `preference.rs` | the completion's `dL/ds` |
//! | distillation | `sum_t w_t D_t / sum_t w_t` | `w_t / sum w`, of the divergence D_t |
//!
//! Sums go over the learnt tokens of a whole mini batch, whatever micro batches it is cut into.

use super::Settings;
use super::advantage::{Baseline, Gae};
use super::algorithm::Algorithm;
use super::loss::{Aggregation, LossConfig, TokenContext, response_loss};
use super::preference::{KtoConfig, Likelihood, PairConfig, PairLoss};
use super::record::Phase;
use super::response::{Response, ResponseGroup};
use super::tally::Tally;
use crate::ops::DistillSpec;

/// What a run optimises, all settings given.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Objective {
    /// Sampled completions with advantages.
    PolicyGradient(PolicyGradient),
    /// Given completions.
    Imitation,
    /// Pairs of completions, the chosen one first.
    Pairs(PairConfig),
    /// Completions that are wanted or not.
    Labelled(KtoConfig),
    /// A teacher's distributions.
    Distill(DistillSpec),
}

/// Settings of the policy gradient.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct PolicyGradient {
    /// Token loss.
    pub loss: LossConfig,
    /// From token losses to one number.
    pub aggregation: Aggregation,
    /// Limit of response length, for the constant aggregation.
    pub max_response: usize,
    /// Cap of truncated importance sampling; 0 is off.
    pub tis_cap: f32,
    /// What rewards are compared with.
    pub baseline: Baseline,
    /// Of a value head.
    pub gae: Gae,
}

/// What a mini batch is in all.
#[derive(Clone, Copy, Debug, Default)]
pub struct Totals {
    /// Tokens, each by its weight.
    pub tokens: f64,
    /// Completions.
    pub responses: usize,
    /// Prompts.
    pub groups: usize,
    /// KTO's z0, nats.
    pub z0: f64,
}

/// A response of a micro batch with one score for each of its learnt tokens: log-probs, or divergences from a teacher.
#[derive(Clone, Copy, Debug)]
pub struct Scored<'s> {
    /// The response.
    pub response: &'s Response,
    /// Its scores.
    pub scores: &'s [f32],
}

impl Objective {
    /// The objective of a phase.
    pub fn new(c: &Settings, phase: Phase) -> Objective {
        let rows = &c.rows;
        let beta = rows.beta(c.algo) as f64;
        let pairs = |loss| Objective::Pairs(PairConfig { loss, beta });
        match c.algo {
            Algorithm::Sft => Objective::Imitation,
            Algorithm::Dpo => pairs(PairLoss::Dpo(rows.dpo_loss, rows.label_smoothing as f64)),
            Algorithm::Orpo => pairs(PairLoss::Orpo),
            Algorithm::Simpo => pairs(PairLoss::Simpo(rows.simpo_gamma as f64)),
            Algorithm::Kto => Objective::Labelled(KtoConfig {
                beta,
                desirable: rows.desirable_weight as f64,
                undesirable: rows.undesirable_weight as f64,
            }),
            Algorithm::Distill => Objective::Distill(DistillSpec {
                kind: rows.divergence,
                beta: rows.jsd_beta,
                inv_temperature: 1.0 / c.sampling.temperature,
            }),
            _ => Objective::PolicyGradient(PolicyGradient {
                loss: c.loss,
                aggregation: c.aggregation,
                max_response: c.max_response,
                // Rollouts are the final policy's: their log-probs say nothing of an internal one.
                tis_cap: if phase == Phase::Final { c.tis_cap } else { 0.0 },
                baseline: c.baseline,
                gae: c.gae(),
            }),
        }
    }

    /// Whether log-probs under a reference are needed.
    pub fn has_reference(&self) -> bool {
        match self {
            Objective::PolicyGradient(p) => p.loss.kl_coef > 0.0,
            Objective::Pairs(pairs) => pairs.has_reference(),
            Objective::Labelled(_) => true,
            Objective::Imitation | Objective::Distill(_) => false,
        }
    }

    /// What a mini batch is in all, but for z0.
    pub fn totals(&self, groups: &[ResponseGroup]) -> Totals {
        let responses = || groups.iter().flat_map(|g| &g.responses);
        Totals {
            tokens: responses().map(Response::weight).sum(),
            responses: responses().count(),
            groups: groups.len(),
            z0: 0.0,
        }
    }

    /// The part of the mini batch's loss that these responses have, and the cotangents of their scores, one after
    /// another. Pairs are whole.
    pub fn loss(
        &self,
        totals: &Totals,
        scored: &[Scored<'_>],
        tally: &mut Tally,
    ) -> (f64, Vec<f32>) {
        let mut cotangents = Vec::new();
        let mut loss = 0.0;
        match self {
            Objective::PolicyGradient(settings) => {
                for one in scored {
                    loss += settings.loss(totals, one, tally, &mut cotangents);
                }
            }
            Objective::Imitation | Objective::Distill(_) => {
                // Log-probs are to rise, divergences to fall.
                let sign = if *self == Objective::Imitation { -1.0 } else { 1.0 };
                for Scored { response, scores } in scored {
                    let weights =
                        response.learnt_weights().map(|w| sign * w as f64 / totals.tokens);
                    for (weight, &score) in weights.zip(*scores) {
                        loss += weight * score as f64;
                        cotangents.push(weight as f32);
                    }
                }
            }
            Objective::Pairs(pairs) => {
                for pair in scored.chunks(2) {
                    let [chosen, rejected] = [0, 1].map(|i| pair[i].likelihood());
                    let weight = pair[0].response.row_weight() / totals.groups as f64;
                    let outcome = pairs.loss(&chosen, &rejected);
                    loss += weight * outcome.loss;
                    for (one, gradient) in pair.iter().zip(outcome.gradient) {
                        let each = (weight * gradient) as f32;
                        cotangents.extend(std::iter::repeat_n(each, one.scores.len()));
                    }
                    let [up, down] = outcome.rewards;
                    tally.note("rewards/chosen", up);
                    tally.note("rewards/rejected", down);
                    tally.note("rewards/margins", up - down);
                    tally.note("rewards/accuracies", (up > down) as u8 as f64);
                    tally.note("logps/chosen", chosen.policy);
                    tally.note("logps/rejected", rejected.policy);
                }
            }
            Objective::Labelled(kto) => {
                for one in scored {
                    let (likelihood, wanted) = (one.likelihood(), one.response.label);
                    let weight = one.response.row_weight() / totals.responses as f64;
                    let (value, gradient, reward) = kto.loss(&likelihood, wanted, totals.z0);
                    loss += weight * value;
                    let each = (weight * gradient) as f32;
                    cotangents.extend(std::iter::repeat_n(each, one.scores.len()));
                    let [rewards, logps] = match wanted {
                        true => ["rewards/chosen", "logps/chosen"],
                        false => ["rewards/rejected", "logps/rejected"],
                    };
                    tally.note(rewards, reward);
                    tally.note(logps, likelihood.policy);
                }
            }
        }
        (loss, cotangents)
    }
}

impl PolicyGradient {
    fn loss(
        &self,
        totals: &Totals,
        Scored { response, scores: new }: &Scored<'_>,
        tally: &mut Tally,
        cotangents: &mut Vec<f32>,
    ) -> f64 {
        let n = new.len();
        let weight = self.weight(n, totals);
        let contexts: Vec<TokenContext> =
            (0..n).map(|t| context(response, t, new[t], self.tis_cap)).collect();
        let mut loss = 0.0;
        for (t, token) in response_loss(&self.loss, &contexts, new).iter().enumerate() {
            loss += weight as f64 * token.loss as f64;
            cotangents.push(weight * token.gradient);
            tally.clipped += token.clipped as usize;
            tally.kl += token.kl as f64;
            if !response.old_is_rollout {
                tally.drift += response.log_ratio(t, contexts[t].old).abs() as f64;
                tally.drift_tokens += 1;
            }
        }
        loss
    }

    /// Weight of each token of a response of `length`.
    pub fn weight(&self, length: usize, totals: &Totals) -> f32 {
        let (tokens, responses) = (totals.tokens as usize, totals.responses);
        self.aggregation.weight(length, tokens, responses, self.max_response)
    }
}

impl Scored<'_> {
    fn likelihood(&self) -> Likelihood {
        let sum = |values: &[f32]| values.iter().map(|&x| x as f64).sum();
        Likelihood {
            policy: sum(self.scores),
            reference: self.response.base.as_deref().map_or(0.0, sum),
            tokens: self.scores.len(),
        }
    }
}

/// What is known of a response's token t; `new` stands for an `old` that was not taken.
fn context(response: &Response, t: usize, new: f32, tis_cap: f32) -> TokenContext {
    let old = response.old.as_ref().map_or(new, |old| old[t]);
    let log_ratio = response.log_ratio(t, old);
    TokenContext {
        advantage: response.advantages[t],
        old,
        base: response.base.as_ref().map(|base| base[t]),
        importance: if tis_cap > 0.0 { log_ratio.exp().min(tis_cap) } else { 1.0 },
    }
}
