//! AdamW over the adapter's tensors, with clipping by the global norm.
//!
//! `m = b1 m + (1 - b1) g`, `v = b2 v + (1 - b2) g^2`,
//! `p -= lr (m / (1 - b1^t) / (sqrt(v / (1 - b2^t)) + eps) + decay p)`.
//!
//! Layers above the policy's have no part in a step: their tensors, moments and step counts stay as they
//! are (PAPER section 2). So `t` counts per layer. The same holds for frozen layers, and layers above a
//! boundary may learn more slowly (the paper's controls).

use rayon::prelude::*;

use super::state::State;
use crate::Result;
use crate::ggml::TensorSet;
use crate::model::Lora;

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

    /// One step over the layers up to `depth`; `gradients` is left as it is.
    pub fn step(
        &mut self,
        lora: &mut Lora,
        gradients: &TensorSet,
        depth: usize,
        learning_rate: f32,
    ) -> Stepped {
        let layers = self.config.freeze_layers + 1..=depth;
        let active: Vec<usize> =
            (0..gradients.len()).filter(|&i| layers.contains(&lora.tensor_layer(i))).collect();
        let gradient_norm = norm(active.iter().map(|&i| gradients.values(i)));
        if !gradient_norm.is_finite() {
            return Stepped { gradient_norm, applied: false };
        }
        let AdamWConfig { beta1, beta2, eps, weight_decay, clip_norm, .. } = self.config;
        let clip = if clip_norm > 0.0 && gradient_norm > clip_norm {
            // 1e-6 as PyTorch's clip_grad_norm_ has it
            clip_norm / (gradient_norm + 1e-6)
        } else {
            1.0
        };
        layers.for_each(|layer| self.steps[layer - 1] += 1);
        for i in active {
            let layer = lora.tensor_layer(i);
            let slow = layer > self.config.slow_above;
            let learning_rate = learning_rate * if slow { self.config.slow_factor } else { 1.0 };
            let t = self.steps[layer - 1] as f64;
            let unbias1 = (1.0 / (1.0 - (beta1 as f64).powf(t))) as f32;
            let unbias2 = (1.0 / (1.0 - (beta2 as f64).powf(t))) as f32;
            let (p, g) = (lora.tensors_mut().values_mut(i), gradients.values(i));
            let (m, v) = (self.m.values_mut(i), self.v.values_mut(i));
            for (((p, g), m), v) in p.iter_mut().zip(g).zip(m).zip(v) {
                let g = g * clip;
                *m = beta1 * *m + (1.0 - beta1) * g;
                *v = beta2 * *v + (1.0 - beta2) * g * g;
                let update = *m * unbias1 / ((*v * unbias2).sqrt() + eps);
                *p -= learning_rate * (update + weight_decay * *p);
            }
        }
        Stepped { gradient_norm, applied: true }
    }

    /// Moments and step counts, all of the optimiser's state.
    pub fn state<'s>(&'s mut self, state: &mut State<'s>) {
        let AdamW { config: _, m, v, steps } = self;
        state.tensors("adamw.m", m);
        state.tensors("adamw.v", v);
        state.counters("adamw.steps", steps);
    }
}

/// Euclidean norm over several tensors, summed in f64.
pub fn norm<'a>(tensors: impl Iterator<Item = &'a [f32]>) -> f32 {
    let tensors: Vec<_> = tensors.collect();
    let squares: Vec<f64> =
        tensors.par_iter().map(|t| t.iter().map(|&x| (x as f64) * (x as f64)).sum()).collect();
    squares.iter().sum::<f64>().sqrt() as f32
}
