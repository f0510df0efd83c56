//! One optimiser step over a mini batch: forward, log-probs, loss, vjp, AdamW.

use super::critic::Critic;
use super::loss::{Aggregation, LossConfig, TokenContext, response_loss};
use super::micro_batch::{Group, MicroBatch, pack};
use super::optimizer::AdamW;
use crate::Result;
use crate::ggml::TensorSet;
use crate::model::{Engine, Lora, Model, Policy};

/// A completion as training sees it.
#[derive(Clone, Debug, Default)]
pub struct Response {
    /// Its tokens, not empty.
    pub tokens: Vec<i32>,
    /// Log-probs that the rollout engine sampled them with.
    pub rollout: Vec<f32>,
    /// Reward.
    pub reward: f32,
    /// Advantage of each token.
    pub advantages: Vec<f32>,
    /// Log-probs under the policy before the step's first update; none until they are needed.
    pub old: Option<Vec<f32>>,
    /// Log-probs under the base model, with a KL penalty.
    pub base: Option<Vec<f32>>,
    /// Values at each token before the step's first update, with a critic.
    pub values: Vec<f32>,
    /// What the values should have been.
    pub returns: Vec<f32>,
}

impl Response {
    /// Whether any token has an advantage.
    pub fn has_signal(&self) -> bool {
        self.advantages.iter().any(|&a| a != 0.0)
    }
}

/// A prompt and the responses to it.
#[derive(Clone, Debug, Default)]
pub struct ResponseGroup {
    /// Prompt tokens.
    pub prompt: Vec<i32>,
    /// Responses.
    pub responses: Vec<Response>,
}

/// What does not change during a step.
#[derive(Clone, Copy, Debug)]
pub struct UpdateConfig {
    /// The optimised policy.
    pub policy: Policy,
    /// Temperature of log-probs.
    pub temperature: f32,
    /// Token loss.
    pub loss: LossConfig,
    /// From token losses to one number.
    pub aggregation: Aggregation,
    /// Limit of response length, for the constant aggregation.
    pub max_response: usize,
    /// Cap of truncated importance sampling; 0 is off.
    pub tis_cap: f32,
    /// Tokens per micro batch.
    pub micro_batch_tokens: usize,
}

/// Sums over the tokens of mini batches.
#[derive(Clone, Copy, Debug, Default)]
pub struct Tally {
    /// Tokens that were computed.
    pub tokens: usize,
    /// Loss of each mini batch, added up.
    pub loss: f64,
    /// Entropies, nats.
    pub entropy: f64,
    /// Clipped tokens.
    pub clipped: usize,
    /// KL estimates, nats.
    pub kl: f64,
    /// |log-prob of rollout - log-prob before the update|, nats.
    pub drift: f64,
    /// Mini batches.
    pub updates: usize,
    /// Gradient norms, added up.
    pub gradient_norm: f64,
    /// Updates skipped for a gradient that was not finite.
    pub skipped: usize,
    /// Loss of the critic in each mini batch, added up.
    pub value_loss: f64,
}

/// What an update works on.
pub struct Learner<'t> {
    /// Model.
    pub model: &'t Model,
    /// Adapter.
    pub lora: &'t mut Lora,
    /// Computes.
    pub engine: &'t mut Engine,
    /// Accumulated gradients.
    pub gradients: &'t mut TensorSet,
    /// Optimiser.
    pub optimizer: &'t mut AdamW,
    /// Value heads, for PPO.
    pub critic: Option<&'t mut Critic>,
}

/// What a forward says of a response before an update.
#[derive(Clone, Default)]
struct Measured {
    logprobs: Vec<f32>,
    values: Vec<f32>,
}

impl Learner<'_> {
    /// Log-probs under the policy, with or without the adapter, and values of the responses that will be
    /// computed (see [`Learner::accumulate`]), in their order; the others' stay empty.
    fn measure(
        &mut self,
        groups: &[ResponseGroup],
        config: &UpdateConfig,
        adapted: bool,
    ) -> Result<Vec<Measured>> {
        let (policy, depth) = (config.policy, config.policy.depth());
        let packed = self.pack(groups, config)?;
        let mut out = vec![Measured::default(); groups.iter().map(|g| g.responses.len()).sum()];
        for micro in packed {
            let lora = adapted.then_some(&*self.lora);
            self.engine.forward(self.model, lora, &micro.batch, depth)?;
            let scores = self.engine.score(
                self.model,
                lora,
                &micro.batch,
                policy,
                config.temperature,
                false,
            )?;
            let values = match &mut self.critic {
                Some(critic) => {
                    let residual = self.engine.residual(depth, micro.batch.len());
                    critic.values(depth, &residual, &micro.batch.scored)
                }
                None => Vec::new(),
            };
            let mut at = 0;
            for (response, n) in micro.responses {
                out[response].logprobs = scores.logprobs[at..at + n].to_vec();
                out[response].values = values.get(at..at + n).unwrap_or_default().to_vec();
                at += n;
            }
        }
        Ok(out)
    }

    /// Sets `old`, where there is none yet, and `values` of all responses from the current adapter.
    pub fn fill_old(&mut self, groups: &mut [ResponseGroup], config: &UpdateConfig) -> Result<()> {
        let measured = self.measure(groups, config, true)?;
        let responses = groups.iter_mut().flat_map(|g| &mut g.responses);
        for (response, now) in responses.zip(measured) {
            response.old.get_or_insert(now.logprobs);
            response.values = now.values;
        }
        Ok(())
    }

    /// Sets `base` of all responses from the base model.
    pub fn fill_base(&mut self, groups: &mut [ResponseGroup], config: &UpdateConfig) -> Result<()> {
        let measured = self.measure(groups, config, false)?;
        let responses = groups.iter_mut().flat_map(|g| &mut g.responses);
        responses.zip(measured).for_each(|(response, base)| response.base = Some(base.logprobs));
        Ok(())
    }

    fn pack(&self, groups: &[ResponseGroup], config: &UpdateConfig) -> Result<Vec<MicroBatch>> {
        let all = config.loss.kl_coef > 0.0 || self.critic.is_some();
        let wanted = |r: &Response| all || r.has_signal();
        let mut index = 0;
        let mut packable = Vec::with_capacity(groups.len());
        for group in groups {
            let first = index;
            index += group.responses.len();
            let completions: Vec<_> = group
                .responses
                .iter()
                .enumerate()
                .filter(|(_, r)| wanted(r))
                .map(|(i, r)| (first + i, r.tokens.as_slice()))
                .collect();
            packable.push(Group { prompt: &group.prompt, completions });
        }
        pack(&packable, config.micro_batch_tokens, self.model.config().n_vocab)
    }

    /// Accumulates the mini batch's gradient and returns its loss.
    ///
    /// A response without advantage adds nothing to the gradient (unless there is a KL penalty or a critic)
    /// and is not computed, though its tokens count in the mean. Responses whose `old` is none are taken at
    /// ratio 1: the policy has not changed since they were sampled.
    pub fn accumulate(
        &mut self,
        groups: &[ResponseGroup],
        config: &UpdateConfig,
        tally: &mut Tally,
    ) -> Result<f32> {
        let responses: Vec<&Response> = groups.iter().flat_map(|g| &g.responses).collect();
        let all_tokens = responses.iter().map(|r| r.tokens.len()).sum();
        let mut loss = 0.0;
        for micro in self.pack(groups, config)? {
            let depth = config.policy.depth();
            self.engine.forward_to_train(self.model, self.lora, &micro.batch, depth)?;
            let scores = self.engine.score(
                self.model,
                Some(&*self.lora),
                &micro.batch,
                config.policy,
                config.temperature,
                true,
            )?;
            let mut cotangents = Vec::with_capacity(scores.logprobs.len());
            let mut targets = Vec::new();
            let mut rest = scores.logprobs.as_slice();
            for &(index, n) in &micro.responses {
                let (new, later) = rest.split_at(n);
                rest = later;
                let response = responses[index];
                let weight =
                    config.aggregation.weight(n, all_tokens, responses.len(), config.max_response);
                let contexts: Vec<TokenContext> =
                    (0..n).map(|t| context(response, t, new[t], config.tis_cap)).collect();
                for (t, token) in response_loss(&config.loss, &contexts, new).iter().enumerate() {
                    loss += weight as f64 * token.loss as f64;
                    cotangents.push(weight * token.gradient);
                    tally.clipped += token.clipped as usize;
                    tally.kl += token.kl as f64;
                    tally.drift += response.apart(t, contexts[t].old).abs() as f64;
                }
                targets.extend(response.returns.iter().map(|&r| (weight, r)));
            }
            if let Some(critic) = &mut self.critic {
                let depth = config.policy.depth();
                let residual = self.engine.residual(depth, micro.batch.len());
                tally.value_loss +=
                    critic.accumulate(depth, &residual, &micro.batch.scored, &targets);
            }
            tally.tokens += scores.logprobs.len();
            tally.entropy += scores.entropies.iter().map(|&h| h as f64).sum::<f64>();
            self.engine.backward(
                self.model,
                self.lora,
                self.gradients,
                &micro.batch,
                config.policy,
                &cotangents,
            )?;
        }
        tally.loss += loss;
        Ok(loss as f32)
    }

    /// One optimiser step over a mini batch. A loss or gradient that is not finite changes nothing.
    pub fn update(
        &mut self,
        groups: &[ResponseGroup],
        config: &UpdateConfig,
        learning_rate: f32,
        tally: &mut Tally,
    ) -> Result<bool> {
        self.gradients.clear();
        let loss = self.accumulate(groups, config, tally)?;
        let depth = config.policy.depth();
        let applied = loss.is_finite() && {
            let executor = self.engine.executor();
            let stepped =
                self.optimizer.step(executor, self.lora, self.gradients, depth, learning_rate)?;
            if stepped.applied {
                tally.gradient_norm += stepped.gradient_norm as f64;
            }
            stepped.applied
        };
        if let Some(critic) = &mut self.critic {
            critic.step(depth);
        }
        tally.updates += applied as usize;
        tally.skipped += !applied as usize;
        Ok(applied)
    }
}

impl Response {
    /// How far a log-prob before the update is from the rollout engine's, nats.
    fn apart(&self, t: usize, old: f32) -> f32 {
        self.rollout.get(t).map_or(0.0, |rollout| old - rollout)
    }
}

/// What is known of a response's token t; `new` stands for an `old` that was not taken.
fn context(response: &Response, t: usize, new: f32, tis_cap: f32) -> TokenContext {
    let old = response.old.as_ref().map_or(new, |old| old[t]);
    let apart = response.apart(t, old);
    TokenContext {
        advantage: response.advantages[t],
        old,
        base: response.base.as_ref().map(|base| base[t]),
        importance: if tis_cap > 0.0 { apart.exp().min(tis_cap) } else { 1.0 },
    }
}
