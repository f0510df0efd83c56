//! Forward and backward through the layers, one graph each.
//!
//! The forward keeps the residual that enters each layer, and the costly activations of as many layers as
//! the budget allows ([`Engine::keep_up_to`]); the backward builds a layer's graph again and computes what
//! was not kept. Memory: `(depth + 1) x tokens x D`, plus one layer, plus the budget. Nothing above the
//! policy's layer is built, computed or stored.

use std::sync::Arc;

use super::lora::Adapter;
use super::measure::kept_of_layer;
use super::memo::{Activations, Memo};
use super::shared::Shared;
use super::tape::{LAYER_NODES, Parts, Tape};
use super::{Batch, Config, Lora, Model, Policy};
use crate::Result;
use crate::ggml::{
    Arena, Device, Executor, Graph, Input, Shape, Tensor, TensorSet, ThreadPool, Type,
};
use crate::ops;

/// What has been computed so far; tests and benchmarks read it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Work {
    /// Layer graphs built for a forward.
    pub layer_forwards: usize,
    /// Layer graphs built for a backward.
    pub layer_backwards: usize,
    /// Layers that a backward did not have to compute again.
    pub layers_kept: usize,
    /// The highest layer (from 1) of any of them.
    pub highest_layer: usize,
    /// Tokens that went through forwards.
    pub forward_tokens: usize,
    /// Tokens that went through backwards.
    pub backward_tokens: usize,
}

/// Log-probs and entropies of a batch's scored tokens, in their order.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Scores {
    /// log p(target) at the temperature, nats.
    pub logprobs: Vec<f32>,
    /// Entropy of the distribution at the temperature, nats.
    pub entropies: Vec<f32>,
}

/// Computes a model's forward and backward on packed batches.
pub struct Engine {
    pub(super) executor: Executor,
    pub(super) kept: Option<Kept>,
    activations: Activations,
    // To be added to the embeddings of the next forward that trains: [D, T], or empty.
    noise: Vec<f32>,
    work: Work,
    // Choices of the last forward's layers that were said beforehand, and how many of these were others.
    rerouted: [usize; 2],
}

/// What a forward that a backward follows does beside.
#[derive(Default)]
struct Training {
    /// Floats that the kept activations of each layer take, from the first; of none, nothing is kept.
    floats: Vec<usize>,
    /// Added to the embeddings: `[D, T]`, or empty.
    noise: Vec<f32>,
}

/// Activations that outlive a graph.
pub(super) struct Kept {
    // H^0 .. H^depth, then two cotangents of the residual: [D, tokens] each.
    residuals: TensorSet,
    // d logprob (or another loss) / d hidden of the scored tokens: [D, scored].
    pub(super) head: TensorSet,
    shared: Option<Shared>,
    depth: usize,
    tokens: usize,
    scored: usize,
}

impl Kept {
    fn allocate(
        device: Device,
        config: &Config,
        depth: usize,
        tokens: usize,
        scored: usize,
    ) -> Result<Kept> {
        let named = |name: &str, i: usize, n: usize| -> (String, Shape) {
            (format!("{name}-{i}"), [config.n_embd, n, 1, 1])
        };
        let mut shapes: Vec<_> = (0..=depth).map(|l| named("residual", l, tokens)).collect();
        shapes.extend((0..2).map(|i| named("d_residual", i, tokens)));
        Ok(Kept {
            residuals: TensorSet::zeros(device, &shapes)?,
            head: TensorSet::zeros(device, &[named("head", 0, scored.max(1))])?,
            shared: Shared::new(device, config, depth, tokens)?,
            depth,
            tokens,
            scored,
        })
    }

    fn n_bytes(&self) -> usize {
        let shared = self.shared.as_ref().map_or(0, Shared::n_bytes);
        self.residuals.n_bytes() + self.head.n_bytes() + shared
    }

    pub(super) fn residual<'a>(
        &'a self,
        arena: &'a Arena,
        layer: usize,
        tokens: usize,
    ) -> Tensor<'a> {
        arena.row_range(self.residuals.get(layer), 0, tokens)
    }

    /// The cotangent of H^layer: two tensors in turn, so that a layer never overwrites what it reads.
    fn cotangent<'a>(&'a self, arena: &'a Arena, layer: usize, tokens: usize) -> Tensor<'a> {
        arena.row_range(self.residuals.get(self.depth + 1 + layer % 2), 0, tokens)
    }
}

impl Engine {
    /// An engine on the CPU, on these threads.
    pub fn new(pool: Arc<ThreadPool>) -> Result<Engine> {
        Engine::on(Device::Cpu, pool)
    }

    /// An engine on a device: the model's ([`Model::device`]).
    ///
    /// # Errors
    /// See [`Executor::new`].
    pub fn on(device: Device, pool: Arc<ThreadPool>) -> Result<Engine> {
        Ok(Engine {
            executor: Executor::new(device, pool)?,
            kept: None,
            activations: Activations::default(),
            noise: Vec::new(),
            work: Work::default(),
            rerouted: [0; 2],
        })
    }

    /// Bytes that [`Engine::forward_to_train`] may take for activations which the backward would compute
    /// again otherwise; 0 at first. Results are the same bits with any budget.
    pub fn keep_up_to(&mut self, bytes: usize) {
        self.activations.set_budget(bytes);
    }

    /// Adds this to the embeddings, `[D, T]`, in the next [`Engine::forward_to_train`] alone.
    pub fn disturb(&mut self, noise: Vec<f32>) {
        self.noise = noise;
    }

    /// What has been computed since the last call.
    pub fn take_work(&mut self) -> Work {
        std::mem::take(&mut self.work)
    }

    /// Bytes of kept activations and of the largest graph's intermediate results.
    pub fn bytes(&self) -> usize {
        let kept = self.kept.as_ref().map_or(0, Kept::n_bytes);
        kept + self.activations.n_bytes() + self.executor.scratch_bytes()
    }

    /// Gives back all of [`Engine::bytes`], for rollouts to use; the next forward takes it anew.
    pub fn release(&mut self) {
        self.kept = None;
        self.activations.release();
        self.executor.release();
    }

    /// Bytes taken by activations kept for the backward.
    pub fn kept_bytes(&self) -> usize {
        self.activations.n_bytes()
    }

    fn reserve(&mut self, config: &Config, depth: usize, batch: &Batch) -> Result<()> {
        let (tokens, scored) = (batch.len(), batch.scored.len());
        let fits = |k: &Kept| k.depth >= depth && k.tokens >= tokens && k.scored >= scored;
        if !self.kept.as_ref().is_some_and(fits) {
            let before = self.kept.take().map_or((0, 0, 0), |k| (k.depth, k.tokens, k.scored));
            self.kept = Some(Kept::allocate(
                self.executor.device(),
                config,
                depth.max(before.0),
                tokens.max(before.1),
                scored.max(before.2),
            )?);
        }
        Ok(())
    }

    /// Computes H^0 .. H^depth of the batch and keeps them. `lora`: none is the base model.
    pub fn forward(
        &mut self,
        model: &Model,
        lora: Option<&Lora>,
        batch: &Batch,
        depth: usize,
    ) -> Result<()> {
        self.activations.forget();
        let adapter = lora.map(|lora| Adapter { lora, gradients: None });
        self.layers(model, adapter, batch, depth, Training::default())
    }

    /// [`Engine::forward`] that also keeps activations for [`Engine::backward`], within the budget. Until
    /// that has run, the adapter must stay as it is.
    pub fn forward_to_train(
        &mut self,
        model: &Model,
        lora: &Lora,
        batch: &Batch,
        depth: usize,
    ) -> Result<()> {
        self.activations.forget();
        let adapter = Some(Adapter { lora, gradients: None });
        let mut floats = Vec::new();
        if self.activations.is_on() {
            floats = (1..=depth).map(|layer| kept_of_layer(model, adapter, batch, layer)).collect();
            self.activations.reserve(self.executor.device(), &floats)?;
        }
        let noise = std::mem::take(&mut self.noise);
        self.layers(model, adapter, batch, depth, Training { floats, noise })
    }

    /// The forward, keeping activations of as many of the layers that take `floats` as there is room for.
    fn layers(
        &mut self,
        model: &Model,
        adapter: Option<Adapter<'_>>,
        batch: &Batch,
        depth: usize,
        training: Training,
    ) -> Result<()> {
        let n = batch.len();
        self.rerouted = [0; 2];
        self.reserve(model.config(), depth, batch)?;
        let kept = self.kept.as_ref().expect("just reserved");

        let arena = Arena::new(8);
        let mut graph = Graph::new(&arena);
        let ids = arena.input("tokens", Type::I32, &[n]);
        let mut inputs = vec![(ids, Input::I32(&batch.tokens))];
        let mut x = model.embed(&arena, ids); // [D, T]
        let Training { floats, noise } = training;
        if !noise.is_empty() {
            let added = arena.input("noise", Type::F32, &[model.config().n_embd, n]);
            inputs.push((added, Input::F32(&noise)));
            x = arena.add(x, added);
        }
        graph.store(x, kept.residual(&arena, 0, n));
        self.executor.run(&graph, &inputs)?;

        for layer in 1..=depth {
            let arena = Arena::new(LAYER_NODES);
            let mut graph = Graph::new(&arena);
            let room = floats.get(layer - 1);
            let keeps = room.is_some_and(|floats| self.activations.takes(layer, *floats));
            let memo = if keeps { Memo::record() } else { Memo::Off };
            let parts = Parts { shared: kept.shared.as_ref(), ..model.parts(adapter, batch) };
            let mut tape = Tape::new(&arena, parts, layer, memo);
            let x = tape.leaf(kept.residual(&arena, layer - 1, n));
            let taps = model.layer(&mut tape, x);
            graph.store(tape.node(taps.layer_out), kept.residual(&arena, layer, n));
            tape.store_shared(&mut graph);
            self.activations.store(&arena, &mut graph, tape.take_memo());
            let chosen = tape.routing().filter(|_| !batch.experts.is_empty()).map(|r| r.experts);
            if let Some(chosen) = chosen {
                graph.output(chosen);
            }
            let computed = self.executor.run(&graph, &tape.inputs())?;
            if let Some(chosen) = chosen {
                let shape = chosen.shape();
                let [n, others] =
                    compare_experts(&batch.experts[layer - 1], &computed.f32(chosen), shape[0]);
                self.rerouted = [self.rerouted[0] + n, self.rerouted[1] + others];
            }
            self.work.layer_forwards += 1;
            self.work.highest_layer = self.work.highest_layer.max(layer);
        }
        self.work.forward_tokens += n;
        Ok(())
    }

    /// Log-probs and entropies of the scored tokens under `policy`, from the last [`Engine::forward`]
    /// (of this batch with this adapter, at least as deep). With `keep`, what the backward needs is kept.
    pub fn score(
        &mut self,
        model: &Model,
        lora: Option<&Lora>,
        batch: &Batch,
        policy: Policy,
        temperature: f32,
        keep: bool,
    ) -> Result<Scores> {
        if batch.scored.is_empty() {
            return Ok(Scores::default());
        }
        let (n, s) = (batch.len(), batch.scored.len());
        let kept = self.kept.as_ref().expect("score follows forward");
        let (rows, targets): (Vec<i32>, Vec<i32>) =
            batch.scored.iter().map(|s| (s.row, s.target)).unzip();

        let arena = Arena::new(32);
        let mut graph = Graph::new(&arena);
        let row_ids = arena.input("rows", Type::I32, &[s]);
        let target = arena.input("targets", Type::I32, &[s]);
        let mut hidden = arena.rows(kept.residual(&arena, policy.depth(), n), row_ids); // [D, S]
        if policy.has_norm() {
            hidden = model.final_norm(&arena, hidden);
        }
        let head = model.head(&arena, hidden, lora);
        let head = ops::linear_logprob(&arena, head, Some(target), 1.0 / temperature, keep);
        graph.output(head.logprob);
        graph.output(head.entropy);
        if let Some(gradient) = model.head_back(&arena, lora, &head) {
            graph.store(gradient, arena.row_range(kept.head.get(0), 0, s));
        }
        let inputs = [(row_ids, Input::I32(&rows)), (target, Input::I32(&targets))];
        let computed = self.executor.run(&graph, &inputs)?;
        Ok(Scores { logprobs: computed.f32(head.logprob), entropies: computed.f32(head.entropy) })
    }

    /// Accumulates the adapter's gradients from `d_logprobs`, the cotangents of the scored tokens'
    /// log-probs, after [`Engine::forward`] and [`Engine::score`] with `keep` on the same batch.
    ///
    /// `gradients` has the layout of the adapter's tensors and is added to. Only layers up to the
    /// policy's get any.
    pub fn backward(
        &mut self,
        model: &Model,
        lora: &Lora,
        gradients: &mut TensorSet,
        batch: &Batch,
        policy: Policy,
        d_logprobs: &[f32],
    ) -> Result<()> {
        if batch.scored.is_empty() {
            return Ok(());
        }
        let n = batch.len();
        self.backward_head(model, batch, policy, d_logprobs)?;
        let kept = self.kept.as_mut().expect("backward follows forward");
        if let Some(shared) = &mut kept.shared {
            shared.clear_cotangents();
        }
        let kept = self.kept.as_ref().expect("backward follows forward");
        let lowest = lora.slots().first().map_or(usize::MAX, |slot| slot.layer);
        let adapter = Some(Adapter { lora, gradients: Some(&*gradients) });

        for layer in (lowest..=policy.depth()).rev() {
            let arena = Arena::new(LAYER_NODES);
            let mut graph = Graph::new(&arena);
            let memo = self.activations.replay(&arena, layer);
            let parts = Parts { shared: kept.shared.as_ref(), ..model.parts(adapter, batch) };
            let mut tape = Tape::new(&arena, parts, layer, memo);
            let x = tape.leaf(kept.residual(&arena, layer - 1, n));
            let taps = model.layer(&mut tape, x);
            let given = (taps.layer_out, kept.cotangent(&arena, layer, n));
            let wanted = (layer > lowest).then_some(x);
            if let Some(d_in) = tape.backward_shared(&mut graph, given, wanted) {
                graph.store(d_in, kept.cotangent(&arena, layer - 1, n));
            }
            self.executor.run(&graph, &tape.inputs())?;
            self.work.layer_backwards += 1;
            self.work.layers_kept += (layer <= self.activations.layers()) as usize;
            self.work.highest_layer = self.work.highest_layer.max(layer);
        }
        self.work.backward_tokens += n;
        Ok(())
    }

    /// The cotangent of H^depth from those of the log-probs.
    fn backward_head(
        &mut self,
        model: &Model,
        batch: &Batch,
        policy: Policy,
        d_logprobs: &[f32],
    ) -> Result<()> {
        let (n, s, depth) = (batch.len(), batch.scored.len(), policy.depth());
        let kept = self.kept.as_ref().expect("backward follows forward");
        let rows: Vec<i32> = batch.scored.iter().map(|s| s.row).collect();

        let arena = Arena::new(32);
        let mut graph = Graph::new(&arena);
        let row_ids = arena.input("rows", Type::I32, &[s]);
        let cotangents = arena.input("d_logprobs", Type::F32, &[s]);
        let head = arena.row_range(kept.head.get(0), 0, s); // d logprob / d hidden: [D, S]
        let mut d = ops::scale_rows(&arena, head, cotangents);
        if policy.has_norm() {
            let residual = arena.rows(kept.residual(&arena, depth, n), row_ids);
            let weight = model.weights().output_norm();
            d = ops::rms_norm_back(&arena, residual, weight, d, None, model.config().rms_eps);
        }
        graph.store(arena.rows_back(d, row_ids, n), kept.cotangent(&arena, depth, n));
        let inputs = [(row_ids, Input::I32(&rows)), (cotangents, Input::F32(d_logprobs))];
        self.executor.run(&graph, &inputs)?;
        Ok(())
    }

    /// What runs its graphs: the optimiser's run there too.
    pub fn executor(&mut self) -> &mut Executor {
        &mut self.executor
    }

    /// Share of the last forward's tokens and layers whose experts are others than the batch said; none where it said
    /// nothing.
    pub fn rerouted(&self) -> Option<f64> {
        let [n, others] = self.rerouted;
        (n > 0).then(|| others as f64 / n as f64)
    }

    /// Residual H^layer of the last forward, `[D, tokens]`.
    pub fn residual(&self, layer: usize, tokens: usize) -> Vec<f32> {
        let kept = self.kept.as_ref().expect("residual follows forward");
        let d = kept.residuals.get(layer).shape()[0];
        kept.residuals.values(layer)[..d * tokens].to_vec()
    }
}

/// Tokens whose experts were said, `used` each, and how many of these have others.
fn compare_experts(said: &[f32], chosen: &[f32], used: usize) -> [usize; 2] {
    let pairs = said.chunks_exact(used).zip(chosen.chunks_exact(used));
    let known = pairs.filter(|(said, _)| said[0] >= 0.0);
    known.fold([0, 0], |[n, others], (said, own)| [n + 1, others + (said != own) as usize])
}
