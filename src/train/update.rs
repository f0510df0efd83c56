//! One optimiser step over a mini batch: forward, log-probs, loss, vjp, AdamW.

use super::loss::{Aggregation, LossConfig, TokenContext, token_loss};
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
    /// Advantage, the same for every token.
    pub advantage: f32,
    /// Log-probs under the policy before the step's first update; none until they are needed.
    pub old: Option<Vec<f32>>,
    /// Log-probs under the base model, with a KL penalty.
    pub base: Option<Vec<f32>>,
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
}

impl Learner<'_> {
    /// Log-probs under the policy, with or without the adapter, of the responses that will be computed
    /// (see [`Learner::accumulate`]), in their order; the others' stay empty.
    fn logprobs(
        &mut self,
        groups: &[ResponseGroup],
        config: &UpdateConfig,
        adapted: bool,
    ) -> Result<Vec<Vec<f32>>> {
        let policy = config.policy;
        let packed = self.pack(groups, config)?;
        let mut out = vec![Vec::new(); groups.iter().map(|g| g.responses.len()).sum()];
        for micro in packed {
            let lora = adapted.then_some(&*self.lora);
            self.engine.forward(self.model, lora, &micro.batch, policy.depth())?;
            let scores =
                self.engine.score(self.model, &micro.batch, policy, config.temperature, false)?;
            let mut rest = scores.logprobs.as_slice();
            for (response, n) in micro.responses {
                let (own, later) = rest.split_at(n);
                out[response] = own.to_vec();
                rest = later;
            }
        }
        Ok(out)
    }

    /// Sets `old` of all responses from the current adapter.
    pub fn fill_old(&mut self, groups: &mut [ResponseGroup], config: &UpdateConfig) -> Result<()> {
        let logprobs = self.logprobs(groups, config, true)?;
        let responses = groups.iter_mut().flat_map(|g| &mut g.responses);
        responses.zip(logprobs).for_each(|(response, old)| response.old = Some(old));
        Ok(())
    }

    /// Sets `base` of all responses from the base model.
    pub fn fill_base(&mut self, groups: &mut [ResponseGroup], config: &UpdateConfig) -> Result<()> {
        let logprobs = self.logprobs(groups, config, false)?;
        let responses = groups.iter_mut().flat_map(|g| &mut g.responses);
        responses.zip(logprobs).for_each(|(response, base)| response.base = Some(base));
        Ok(())
    }

    fn pack(&self, groups: &[ResponseGroup], config: &UpdateConfig) -> Result<Vec<MicroBatch>> {
        let wanted = |r: &Response| config.loss.kl_coef > 0.0 || r.advantage != 0.0;
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
    /// A response without advantage adds nothing to the gradient (unless there is a KL penalty) and is
    /// not computed, though its tokens count in the mean. Responses whose `old` is none are taken at
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
                &micro.batch,
                config.policy,
                config.temperature,
                true,
            )?;
            let mut cotangents = Vec::with_capacity(scores.logprobs.len());
            let mut rest = scores.logprobs.as_slice();
            for &(index, n) in &micro.responses {
                let (new, later) = rest.split_at(n);
                rest = later;
                let response = responses[index];
                let weight =
                    config.aggregation.weight(n, all_tokens, responses.len(), config.max_response);
                for (t, &new) in new.iter().enumerate() {
                    let old = response.old.as_ref().map_or(new, |old| old[t]);
                    let apart = response.rollout.get(t).map_or(0.0, |rollout| old - rollout);
                    let importance =
                        if config.tis_cap > 0.0 { apart.exp().min(config.tis_cap) } else { 1.0 };
                    let base = response.base.as_ref().map(|base| base[t]);
                    let context =
                        TokenContext { advantage: response.advantage, old, base, importance };
                    let token = token_loss(&config.loss, &context, new);
                    loss += weight as f64 * token.loss as f64;
                    cotangents.push(weight * token.gradient);
                    tally.clipped += token.clipped as usize;
                    tally.kl += token.kl as f64;
                    tally.drift += apart.abs() as f64;
                }
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
            let stepped = self.optimizer.step(self.lora, self.gradients, depth, learning_rate);
            if stepped.applied {
                tally.gradient_norm += stepped.gradient_norm as f64;
            }
            stepped.applied
        };
        tally.updates += applied as usize;
        tally.skipped += !applied as usize;
        Ok(applied)
    }
}
