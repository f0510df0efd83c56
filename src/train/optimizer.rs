//! AdamW over the adapter's tensors, with clipping by the global norm.
//!
//! `m = b1 m + (1 - b1) g`, `v = b2 v + (1 - b2) g^2`,
//! `p -= lr (m / (1 - b1^t) / (sqrt(v / (1 - b2^t)) + eps) + decay p)`.
//!
//! Layers above the policy's have no part in a step: their tensors, moments and step counts stay as they
//! are (PAPER section 2). So `t` counts per layer. The same holds for frozen layers, and layers above a
//! boundary may learn more slowly (the paper's controls).

use super::state::State;
use crate::Result;
use crate::ggml::{Arena, Executor, Graph, TensorSet};
use crate::model::Lora;
use crate::ops::{self, AdamWStep};

/// Settings of AdamW.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AdamWConfig {
    /// Decay of the mean of gradients.
    pub beta1: f32,
    /// Decay of the mean of their squares.
    pub beta2: f32,
    /// Added to the root of the second moment.
    pub eps: f32,
    /// Decoupled weight decay.
    pub weight_decay: f32,
    /// Gradients are scaled down to this global norm; 0 is off.
    pub clip_norm: f32,
    /// Layers 1 to this have no part in any step.
    pub freeze_layers: usize,
    /// Layers above this one..
    pub slow_above: usize,
    /// ..learn with the learning rate times this.
    pub slow_factor: f32,
    /// Factor of the learning rate of B (LoRA+, arXiv 2402.12354).
    pub b_factor: f32,
}

impl Default for AdamWConfig {
    /// PyTorch's, clipped at a norm of 1, all layers alike.
    fn default() -> AdamWConfig {
        AdamWConfig {
            beta1: 0.9,
            beta2: 0.999,
            eps: 1e-8,
            weight_decay: 0.01,
            clip_norm: 1.0,
            freeze_layers: 0,
            slow_above: usize::MAX,
            slow_factor: 1.0,
            b_factor: 1.0,
        }
    }
}

/// The optimiser's state: moments in the layout of the adapter's tensors, steps per layer.
pub struct AdamW {
    config: AdamWConfig,
    m: TensorSet,
    v: TensorSet,
    steps: Vec<u64>,
}

/// What a step did.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Stepped {
    /// Global norm of the gradient before clipping.
    pub gradient_norm: f32,
    /// False when the norm was not finite: nothing was changed.
    pub applied: bool,
}

impl AdamW {
    /// Zero moments for this adapter.
    pub fn new(lora: &Lora, n_layer: usize, config: AdamWConfig) -> Result<AdamW> {
        Ok(AdamW { config, m: lora.zeros_like()?, v: lora.zeros_like()?, steps: vec![0; n_layer] })
    }

    /// One step over the layers up to `depth`, on the device that has the tensors; `gradients` is left as
    /// it is.
    ///
    /// # Errors
    /// See [`Executor::run`].
    pub fn step(
        &mut self,
        executor: &mut Executor,
        lora: &mut Lora,
        gradients: &TensorSet,
        depth: usize,
        learning_rate: f32,
    ) -> Result<Stepped> {
        let layers = self.config.freeze_layers + 1..=depth;
        let active: Vec<usize> =
            (0..gradients.len()).filter(|&i| layers.contains(&lora.tensor_layer(i))).collect();
        let gradient_norm = global_norm(executor, gradients, &active)?;
        if !gradient_norm.is_finite() {
            return Ok(Stepped { gradient_norm, applied: false });
        }
        let AdamWConfig { beta1, beta2, eps, weight_decay, clip_norm, .. } = self.config;
        let clip = if clip_norm > 0.0 && gradient_norm > clip_norm {
            // 1e-6 as PyTorch's clip_grad_norm_ has it
            clip_norm / (gradient_norm + 1e-6)
        } else {
            1.0
        };
        layers.for_each(|layer| self.steps[layer - 1] += 1);
        // A graph has room for as many leaves as its arena has headers: p, g, m and v of each tensor.
        let arena = Arena::new(4 * active.len() + 1);
        let mut graph = Graph::new(&arena);
        let lora = &*lora;
        for i in active {
            let layer = lora.tensor_layer(i);
            let slow = layer > self.config.slow_above;
            let learning_rate = learning_rate * if slow { self.config.slow_factor } else { 1.0 };
            // A and B of each weight in turn.
            let learning_rate = learning_rate * if i % 2 == 1 { self.config.b_factor } else { 1.0 };
            let t = self.steps[layer - 1];
            let step = AdamWStep { learning_rate, beta1, beta2, eps, weight_decay, clip, t };
            let (p, g) = (lora.tensors().get(i), gradients.get(i));
            graph.add(ops::adamw(&arena, p, g, self.m.get(i), self.v.get(i), &step));
        }
        executor.run(&graph, &[])?;
        Ok(Stepped { gradient_norm, applied: true })
    }

    /// Moments and step counts, all of the optimiser's state.
    pub fn state<'s>(&'s mut self, state: &mut State<'s>) {
        let AdamW { config: _, m, v, steps } = self;
        state.tensors("adamw.m", m);
        state.tensors("adamw.v", v);
        state.counters("adamw.steps", steps);
    }
}

/// Euclidean norm over the tensors `indices` of a set, summed in f64.
pub fn global_norm(executor: &mut Executor, set: &TensorSet, indices: &[usize]) -> Result<f32> {
    let arena = Arena::new(indices.len() + 1);
    let mut graph = Graph::new(&arena);
    let sums: Vec<_> = indices.iter().map(|&i| ops::sum_squares(&arena, set.get(i))).collect();
    sums.iter().for_each(|&sum| graph.output(sum));
    let computed = executor.run(&graph, &[])?;
    let squares = sums.iter().flat_map(|&sum| computed.f32(sum));
    Ok(squares.map(|x| x as f64).sum::<f64>().sqrt() as f32)
}
