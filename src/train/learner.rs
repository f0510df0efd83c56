//! The learner: scores mini batches, walks back, steps. What the losses are is the objective's affair.

use super::advantage::assign;
use super::critic::Critic;
use super::micro_batch::{Group, MicroBatch, Mixture, pack};
use super::noise::Noise;
use super::objective::{Objective, Scored, Totals};
use super::optimizer::AdamW;
use super::response::{Response, ResponseGroup};
use super::tally::Tally;
use super::teacher::Teacher;
use super::together::GradientSum;
use crate::Result;
use crate::ggml::TensorSet;
use crate::model::{Engine, Lora, Model, Policy};
use crate::team::{Queue, Team};

/// What does not change during a step.
#[derive(Clone, Copy, Debug)]
pub struct UpdateConfig {
    /// The optimised policy.
    pub policy: Policy,
    /// What is optimised.
    pub objective: Objective,
    /// Temperature of log-probs.
    pub temperature: f32,
    /// Prompts of a mini batch.
    pub mini_batch: usize,
    /// Tokens per micro batch.
    pub micro_batch_tokens: usize,
    /// Tokens take the experts that they took in the rollout.
    pub replay_routes: bool,
    /// Log-probs that sampling gave stand for those before the update, where they are close to them.
    pub old_from_rollout: bool,
    /// What is added to the embeddings of what is learnt.
    pub noise: Option<Noise>,
}

/// Whose log-probs are measured.
#[derive(Clone, Copy, PartialEq)]
enum Whose {
    Policy,
    Reference,
}

/// How far log-probs that sampling gave may be from recomputed ones to stand for them, nats: a twentieth of
/// what a ratio may move before it is clipped.
const ROLLOUTS_CLOSE: f64 = 0.01;

/// Takes the log-probs that sampling gave for those before the update.
fn take_rollouts(groups: &mut [ResponseGroup]) {
    for response in groups.iter_mut().flat_map(|g| &mut g.responses) {
        response.old.get_or_insert_with(|| response.rollout.clone());
        response.old_is_rollout = true;
    }
}

/// What is done with a mini batch.
#[derive(Clone, Copy, PartialEq)]
enum Pass {
    /// Its gradient is added.
    Train,
    /// It is scored and no more.
    Score,
}

/// What an update works on; built once.
pub struct Learner<'m> {
    /// Model.
    pub model: &'m Model,
    /// Adapter.
    pub lora: Lora,
    /// Computes.
    pub engine: Engine,
    /// Accumulated gradients.
    pub gradients: TensorSet,
    /// Those of a further micro batch, before they are added.
    pub part: TensorSet,
    /// Optimiser.
    pub optimizer: AdamW,
    /// Value heads, for PPO.
    pub critic: Option<Critic>,
    /// The reference's adapter; none is the base model.
    pub reference: Option<Lora>,
    /// Of a distillation.
    pub teacher: Option<Teacher<'m>>,
    /// Who shares micro batches.
    pub team: Team,
}

/// What a forward says of a response before an update.
#[derive(Clone, Default, serde::Serialize, serde::Deserialize)]
struct Measured {
    logprobs: Vec<f32>,
    values: Vec<f32>,
}

/// By the responses' numbers.
type OfResponses = Vec<(usize, Measured)>;

/// What a micro batch adds to its mini batch, beside the adapter's gradient.
#[derive(Clone, Debug, Default, serde::Serialize, serde::Deserialize)]
struct Share {
    loss: f64,
    tally: Tally,
    /// Gradient of the critic's head.
    critic: Vec<f64>,
}

impl Learner<'_> {
    /// Log-probs under the policy or the reference, and values of the responses that will be computed (see
    /// [`Learner::update`]), in their order; the others' stay empty.
    fn measure(
        &mut self,
        groups: &[ResponseGroup],
        config: &UpdateConfig,
        whose: Whose,
    ) -> Result<Vec<Measured>> {
        let packed = self.pack(groups, config)?;
        let mut queue = self.team.queue(packed.len());
        let own = self.measure_own(&packed, &mut queue, config, whose);
        let mut out = vec![Measured::default(); groups.iter().map(|g| g.responses.len()).sum()];
        for micro in self.team.join(packed.len(), own)? {
            micro.into_iter().for_each(|(response, measured)| out[response] = measured);
        }
        Ok(out)
    }

    /// The responses of the micro batches that are taken from the queue.
    fn measure_own(
        &mut self,
        packed: &[MicroBatch],
        queue: &mut Queue,
        config: &UpdateConfig,
        whose: Whose,
    ) -> Result<Vec<(usize, OfResponses)>> {
        let (policy, depth) = (config.policy, config.policy.depth());
        let mut own = Vec::new();
        while let Some(number) = queue.take()? {
            let micro = &packed[number];
            let lora = match whose {
                Whose::Policy => Some(&self.lora),
                Whose::Reference => self.reference.as_ref(),
            };
            self.engine.forward(self.model, lora, &micro.batch, depth)?;
            let (batch, t) = (&micro.batch, config.temperature);
            let scores = self.engine.score(self.model, lora, batch, policy, t, false)?;
            let values = match &mut self.critic {
                Some(critic) => {
                    let residual = self.engine.residual(depth, micro.batch.len());
                    critic.values(depth, &residual, &micro.batch.scored)
                }
                None => Vec::new(),
            };
            let mut at = 0;
            let measured = micro.responses.iter().map(|&(response, n)| {
                let scored = at..at + n;
                at += n;
                let logprobs = scores.logprobs[scored.clone()].to_vec();
                let values = values.get(scored).unwrap_or_default().to_vec();
                (response, Measured { logprobs, values })
            });
            own.push((number, measured.collect()));
        }
        Ok(own)
    }

    /// What an objective wants to know of a step's groups before the first update: old log-probs, values and
    /// advantages of a policy gradient, log-probs under the reference. Returns how far log-probs that sampling gave are
    /// from recomputed ones of a sample, nats, where they were to be taken.
    pub fn prepare(
        &mut self,
        groups: &mut [ResponseGroup],
        config: &UpdateConfig,
    ) -> Result<Option<f64>> {
        let mut drift = None;
        if let Objective::PolicyGradient(settings) = config.objective {
            if self.critic.is_some() {
                self.fill_old(groups, config)?;
                assign(groups, settings.baseline, settings.gae);
            } else {
                assign(groups, settings.baseline, settings.gae);
                // Before the first update the policy is the one that `old` means, so the first mini batch
                // needs no pass of its own for it.
                let first = config.mini_batch.min(groups.len());
                let later = &mut groups[first..];
                if config.old_from_rollout {
                    drift = self.check_rollouts(later, config)?;
                }
                match drift.is_some_and(|nats| nats <= ROLLOUTS_CLOSE) {
                    true => take_rollouts(later),
                    false => self.fill_old(later, config)?,
                }
            }
        }
        if config.objective.has_reference() {
            self.fill_reference(groups, config)?;
        }
        Ok(drift)
    }

    /// Mean distance of the log-probs that sampling gave from recomputed ones, nats, over the first group that teaches
    /// something; none where there is none, or where a completion's are not known.
    fn check_rollouts(
        &mut self,
        groups: &[ResponseGroup],
        config: &UpdateConfig,
    ) -> Result<Option<f64>> {
        let known = |r: &Response| r.rollout.len() == r.n_learnt();
        if !groups.iter().flat_map(|g| &g.responses).all(known) {
            return Ok(None);
        }
        let sample = groups.iter().find(|g| g.responses.iter().any(Response::has_signal));
        let Some(sample) = sample.map(std::slice::from_ref) else { return Ok(None) };
        let measured = self.measure(sample, config, Whose::Policy)?;
        let both = sample[0].responses.iter().zip(&measured).flat_map(|(response, now)| {
            // Responses without signal were not measured.
            response.rollout.iter().zip(&now.logprobs)
        });
        let drift: Vec<f64> = both.map(|(a, b)| (a - b).abs() as f64).collect();
        Ok(Some(drift.iter().sum::<f64>() / drift.len() as f64))
    }

    /// Sets `old`, where there is none yet, and `values` of all responses from the current adapter.
    fn fill_old(&mut self, groups: &mut [ResponseGroup], config: &UpdateConfig) -> Result<()> {
        let measured = self.measure(groups, config, Whose::Policy)?;
        let responses = groups.iter_mut().flat_map(|g| &mut g.responses);
        for (response, now) in responses.zip(measured) {
            response.old.get_or_insert(now.logprobs);
            response.values = now.values;
        }
        Ok(())
    }

    /// Sets `base` of all responses.
    fn fill_reference(
        &mut self,
        groups: &mut [ResponseGroup],
        config: &UpdateConfig,
    ) -> Result<()> {
        let measured = self.measure(groups, config, Whose::Reference)?;
        let responses = groups.iter_mut().flat_map(|g| &mut g.responses);
        responses.zip(measured).for_each(|(response, base)| response.base = Some(base.logprobs));
        Ok(())
    }

    fn pack(&self, groups: &[ResponseGroup], config: &UpdateConfig) -> Result<Vec<MicroBatch>> {
        let all = self.takes_all(config);
        let wanted = |r: &Response| all || r.has_signal();
        let mut index = 0;
        let mut packable = Vec::with_capacity(groups.len());
        for group in groups {
            let first = index;
            index += group.responses.len();
            let own = group.responses.iter().enumerate().filter(|(_, r)| wanted(r));
            // Later segments of a dialogue have a prompt each, all others the group's.
            let (shared, later): (Vec<_>, Vec<_>) = own.partition(|(_, r)| r.prompt.is_none());
            let completions = shared.iter().map(|(i, r)| (first + i, r.tokens.as_slice()));
            packable.push(Group {
                prompt: &group.prompt,
                completions: completions.collect(),
                experts: shared.iter().map(|(_, r)| r.experts.as_slice()).collect(),
            });
            packable.extend(later.iter().map(|(i, r)| Group {
                prompt: r.prompt.as_deref().unwrap_or_default(),
                completions: vec![(first + i, r.tokens.as_slice())],
                experts: vec![r.experts.as_slice()],
            }));
        }
        let known = groups.iter().flat_map(|g| &g.responses).any(|r| !r.experts.is_empty());
        let (n_layer, n_vocab) = (self.model.config().n_layer, self.model.config().n_vocab);
        let used = self.model.config().layers.iter().find_map(|l| l.experts).map(|e| e.used);
        let mixture = used.filter(|_| known).map(|used| Mixture { n_layer, used });
        let mut packed = pack(&packable, config.micro_batch_tokens, n_vocab, mixture)?;
        packed.iter_mut().for_each(|micro| micro.batch.replays = config.replay_routes);
        let responses: Vec<&Response> = groups.iter().flat_map(|g| &g.responses).collect();
        packed.iter_mut().for_each(|micro| micro.keep(|index, t| responses[index].learns(t)));
        Ok(packed)
    }

    /// Scores a mini batch by the objective, and adds its gradient where it is a [`Pass::Train`]. Returns its loss.
    ///
    /// Of a policy gradient a response without advantage adds nothing to the gradient (unless there is a KL penalty
    /// or a critic) and is not computed, though its tokens count in the mean. Responses whose `old` is none are
    /// taken at ratio 1: the policy has not changed since they were sampled.
    fn run(
        &mut self,
        groups: &[ResponseGroup],
        config: &UpdateConfig,
        pass: Pass,
        tally: &mut Tally,
        progress: &mut dyn FnMut(usize),
    ) -> Result<f32> {
        let responses: Vec<&Response> = groups.iter().flat_map(|g| &g.responses).collect();
        let mut totals = config.objective.totals(groups);
        if let Objective::Labelled(_) = config.objective {
            totals.z0 = self.mismatched_kl(groups, config)?;
            tally.note("kl", totals.z0);
        }
        let packed = self.pack(groups, config)?;
        let mut loss = 0.0;
        let mut sum = GradientSum::new(self, config.policy.depth());
        for (first, wave) in sum.waves(&packed) {
            let mut queue = self.team.queue(wave.len());
            let mut own = Vec::new();
            let done: Result<()> = (|| {
                while let Some(number) =
                    sum.room(own.len()).then(|| queue.take()).transpose()?.flatten()
                {
                    let share =
                        self.micro_batch(&wave[number], &responses, config, pass, &totals)?;
                    if pass == Pass::Train {
                        sum.keep(self, first + number)?;
                        progress(wave[number].batch.len());
                    }
                    own.push((number, share));
                }
                Ok(())
            })();
            let shares = self.team.join_by(wave.len(), done.map(|()| own))?;
            let by: Vec<usize> = shares.iter().map(|(rank, _)| *rank).collect();
            for (micro, (rank, share)) in wave.iter().zip(shares) {
                loss += share.loss;
                tally.add(share.tally);
                if let Some(critic) = &mut self.critic {
                    critic.add(config.policy.depth(), &share.critic);
                }
                if pass == Pass::Train && rank != self.team.rank() {
                    progress(micro.batch.len());
                }
            }
            if pass == Pass::Train {
                sum.add(self, &by)?;
            }
        }
        if pass == Pass::Train {
            sum.finish(self);
        }
        tally.loss += loss;
        Ok(loss as f32)
    }

    /// Scores a micro batch and, where it is a [`Pass::Train`], leaves its gradient in `part`.
    fn micro_batch(
        &mut self,
        micro: &MicroBatch,
        responses: &[&Response],
        config: &UpdateConfig,
        pass: Pass,
        totals: &Totals,
    ) -> Result<Share> {
        let (policy, depth) = (config.policy, config.policy.depth());
        let (model, batch) = (self.model, &micro.batch);
        let mut share = Share::default();
        if let (Pass::Train, Some(noise)) = (pass, config.noise) {
            self.engine.disturb(noise.of(micro, model.config().n_embd));
        }
        match pass {
            Pass::Train => self.engine.forward_to_train(model, &self.lora, batch, depth)?,
            Pass::Score => self.engine.forward(model, Some(&self.lora), batch, depth)?,
        }
        if let Some(differ) = self.engine.rerouted() {
            share.tally.note("experts_differ", differ);
        }
        let (scores, entropies) = match (config.objective, &mut self.teacher) {
            (Objective::Distill(spec), Some(teacher)) => {
                let hidden = teacher.hidden(batch)?;
                let d = self.engine.diverge(model, batch, policy, &hidden, spec)?;
                (d.nats, d.entropies)
            }
            _ => {
                let (t, keep) = (config.temperature, pass == Pass::Train);
                let scores = self.engine.score(model, Some(&self.lora), batch, policy, t, keep)?;
                (scores.logprobs, scores.entropies)
            }
        };
        let mut scored = Vec::with_capacity(micro.responses.len());
        let mut rest = scores.as_slice();
        for &(index, n) in &micro.responses {
            let (scores, later) = rest.split_at(n);
            rest = later;
            scored.push(Scored { response: responses[index], scores });
        }
        let (loss, cotangents) = config.objective.loss(totals, &scored, &mut share.tally);
        share.loss = loss;
        share.tally.tokens += scores.len();
        share.tally.entropy += entropies.iter().map(|&h| h as f64).sum::<f64>();
        if pass == Pass::Score {
            return Ok(share);
        }
        if let (Some(critic), Objective::PolicyGradient(settings)) =
            (&mut self.critic, config.objective)
        {
            let targets: Vec<(f32, f32)> = scored
                .iter()
                .flat_map(|s| {
                    let weight = settings.weight(s.scores.len(), totals);
                    s.response.returns.iter().map(move |&r| (weight, r))
                })
                .collect();
            let residual = self.engine.residual(depth, batch.len());
            (share.tally.value_loss, share.critic) =
                critic.gradient(depth, &residual, &batch.scored, &targets);
        }
        self.part.clear();
        let part = &mut self.part;
        self.engine.backward(model, &self.lora, part, batch, policy, &cotangents)?;
        Ok(share)
    }

    /// The loss of groups under the current adapter, which stays as it is: the mean over mini batches of what an
    /// update would say, weighted by their tokens.
    pub fn score(
        &mut self,
        groups: &mut [ResponseGroup],
        config: &UpdateConfig,
        tally: &mut Tally,
    ) -> Result<f64> {
        let (mut sum, mut tokens) = (0.0, 0.0);
        for mini in groups.chunks_mut(config.mini_batch) {
            self.prepare(mini, config)?;
            let weight = match config.objective {
                Objective::Pairs(_) | Objective::Labelled(_) => mini.len() as f64,
                _ => config.objective.totals(mini).tokens,
            };
            sum += weight * self.run(mini, config, Pass::Score, tally, &mut |_| ())? as f64;
            tokens += weight;
        }
        Ok(sum / tokens)
    }

    /// KTO's z0: each prompt with the completion of the next row, which says how far the policy has gone from the
    /// reference where it was not taught; 0 where there is one prompt alone.
    fn mismatched_kl(&mut self, groups: &[ResponseGroup], config: &UpdateConfig) -> Result<f64> {
        if groups.len() < 2 {
            return Ok(0.0);
        }
        let next = groups.iter().cycle().skip(1);
        let crossed = groups.iter().zip(next).map(|(group, next)| {
            let other =
                Response { tokens: next.responses[0].tokens.clone(), ..Response::default() };
            ResponseGroup { prompt: group.prompt.clone(), responses: vec![other] }
        });
        let crossed: Vec<ResponseGroup> = crossed.collect();
        let mut sum = |whose| -> Result<f64> {
            let measured = self.measure(&crossed, config, whose)?;
            Ok(measured.iter().flat_map(|m| &m.logprobs).map(|&l| l as f64).sum())
        };
        let kl = sum(Whose::Policy)? - sum(Whose::Reference)?;
        Ok((kl / crossed.len() as f64).max(0.0))
    }

    /// Tokens that updates on these groups put through forward and backward.
    pub fn trained_tokens(&self, groups: &[ResponseGroup], config: &UpdateConfig) -> usize {
        let wanted = |r: &&Response| self.takes_all(config) || r.has_signal();
        // The last token of a completion is not computed.
        let of_group = |g: &ResponseGroup| -> usize {
            let all = || g.responses.iter().filter(wanted);
            let tokens: usize = all().map(|r| r.tokens.len().max(1) - 1).sum();
            let later: usize = all().filter_map(|r| Some(r.prompt.as_ref()?.len())).sum();
            let shared = all().any(|r| r.prompt.is_none()) as usize * g.prompt.len();
            shared + later + tokens
        };
        groups.iter().map(of_group).sum()
    }

    /// Whether responses without signal are computed, too.
    fn takes_all(&self, config: &UpdateConfig) -> bool {
        match config.objective {
            Objective::PolicyGradient(_) => {
                config.objective.has_reference() || self.critic.is_some()
            }
            _ => true,
        }
    }

    /// One optimiser step over a mini batch, which tells of the tokens of each micro batch that is through. A loss or gradient that is not finite changes nothing.
    pub fn update(
        &mut self,
        groups: &[ResponseGroup],
        config: &UpdateConfig,
        learning_rate: f32,
        tally: &mut Tally,
        progress: &mut dyn FnMut(usize),
    ) -> Result<bool> {
        self.gradients.clear();
        let loss = self.run(groups, config, Pass::Train, tally, progress)?;
        let depth = config.policy.depth();
        let applied = loss.is_finite() && {
            let (executor, lora) = (self.engine.executor(), &mut self.lora);
            let stepped =
                self.optimizer.step(executor, lora, &self.gradients, depth, learning_rate)?;
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
