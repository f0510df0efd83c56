//! The value head of PPO: how much reward a response will earn, seen from each of its tokens.
//!
//! `V_t = w . h_t / |h_t| + b`, where `h_t` is the residual after the policy's layer at the position that
//! predicts token t. Loss: `sum_t weight_t (V_t - R_t)^2 / 2`, R the returns of `advantage::estimate`;
//! `dL/dw = sum_t weight_t (V_t - R_t) h_t / |h_t|`, `dL/db = sum_t weight_t (V_t - R_t)`, exactly. AdamW without
//! decay, at its own learning rate. The direction of `h` alone keeps a step's effect on V the same for
//! whatever scale a layer's residual has.
//!
//! Departures from a full critic (a second model): one linear layer, and no gradient flows from it into
//! the adapter. Each policy (of the internal layer, of the model) has a head of its own.

use super::response::ResponseGroup;
use super::state::State;
use crate::Result;
use crate::ggml::{Device, TensorSet};
use crate::model::Scored;

/// Settings of the head's optimiser.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct CriticConfig {
    /// Learning rate.
    pub lr: f32,
    /// Decay of the mean of gradients.
    pub beta1: f32,
    /// Decay of the mean of their squares.
    pub beta2: f32,
    /// Added to the root of the second moment.
    pub eps: f32,
}

/// A value head for each policy.
pub struct Critic {
    config: CriticConfig,
    heads: Vec<Head>,
}

/// Head of the policy of layer `depth`.
struct Head {
    depth: usize,
    // w and b, their first moments, their second moments: [D + 1] each, b last.
    tensors: TensorSet,
    gradient: Vec<f64>,
    steps: u64,
}

impl Critic {
    /// Heads for policies of these depths over residuals of `d` values: 0 everywhere at first.
    ///
    /// # Errors
    /// Memory is short.
    pub fn new(depths: &[usize], d: usize, config: CriticConfig) -> Result<Critic> {
        let mut heads: Vec<Head> = Vec::new();
        for &depth in depths {
            if heads.iter().any(|h| h.depth == depth) {
                continue;
            }
            let shapes = ["w", "m", "v"].map(|name| (name.to_string(), [d + 1, 1, 1, 1]));
            let tensors = TensorSet::zeros(Device::Cpu, &shapes)?;
            heads.push(Head { depth, tensors, gradient: vec![0.0; d + 1], steps: 0 });
        }
        Ok(Critic { config, heads })
    }

    /// Bytes of all heads.
    pub fn n_bytes(&self) -> usize {
        self.heads.iter().map(|h| h.tensors.n_bytes() + 8 * h.gradient.len()).sum()
    }

    fn head(&mut self, depth: usize) -> &mut Head {
        let head = self.heads.iter_mut().find(|h| h.depth == depth);
        head.expect("a head for each policy of the run")
    }

    /// Values at the scored positions of a batch, from its residual after layer `depth` (`[D, tokens]`).
    pub fn values(&mut self, depth: usize, residual: &[f32], scored: &[Scored]) -> Vec<f32> {
        let head = self.head(depth);
        let weights = head.tensors.values(0);
        let (w, b) = split(&weights);
        scored.iter().map(|s| value(w, b, &direction(row(residual, w.len(), s)))).collect()
    }

    /// Loss and gradient at the scored positions. `targets` are (weight, return).
    pub fn gradient(
        &mut self,
        depth: usize,
        residual: &[f32],
        scored: &[Scored],
        targets: &[(f32, f32)],
    ) -> (f64, Vec<f64>) {
        let Head { tensors, gradient, .. } = self.head(depth);
        let mut gradient = vec![0.0; gradient.len()];
        let weights = tensors.values(0);
        let (w, b) = split(&weights);
        let mut loss = 0.0;
        for (s, &(weight, target)) in scored.iter().zip(targets) {
            let x = direction(row(residual, w.len(), s));
            let error = (value(w, b, &x) - target) as f64;
            let slope = weight as f64 * error;
            loss += 0.5 * slope * error;
            for (g, x) in gradient.iter_mut().zip(x.iter().chain(&[1.0])) {
                *g += slope * *x as f64;
            }
        }
        (loss, gradient)
    }

    /// Adds a gradient to what the next step takes.
    pub fn add(&mut self, depth: usize, gradient: &[f64]) {
        let sum = &mut self.head(depth).gradient;
        sum.iter_mut().zip(gradient).for_each(|(sum, g)| *sum += g);
    }

    /// One step with the gradient accumulated so far, which is cleared. One that is not finite changes nothing.
    pub fn step(&mut self, depth: usize) {
        let CriticConfig { lr, beta1, beta2, eps } = self.config;
        let Head { tensors, gradient, steps, .. } = self.head(depth);
        let gradient: Vec<f64> = gradient.iter_mut().map(std::mem::take).collect();
        if gradient.iter().any(|g| !g.is_finite()) {
            return;
        }
        *steps += 1;
        let unbias = |beta: f32| 1.0 / (1.0 - (beta as f64).powf(*steps as f64));
        let (unbias1, unbias2) = (unbias(beta1), unbias(beta2));
        for (i, g) in gradient.into_iter().enumerate() {
            let mut decay = |tensor: usize, beta: f32, x: f64| {
                let moment = &mut tensors.values_mut(tensor)[i];
                *moment = (beta as f64 * *moment as f64 + (1.0 - beta as f64) * x) as f32;
                *moment as f64
            };
            let m = decay(1, beta1, g) * unbias1;
            let v = decay(2, beta2, g * g) * unbias2;
            tensors.values_mut(0)[i] -= (lr as f64 * m / (v.sqrt() + eps as f64)) as f32;
        }
    }
}

impl Critic {
    /// Weights, moments and step count of each head.
    pub fn state<'s>(&'s mut self, state: &mut State<'s>) {
        let Critic { config: _, heads } = self;
        for Head { depth, tensors, gradient: _, steps } in heads {
            state.tensors(&format!("critic.{depth}"), tensors);
            state.counter(format!("critic.{depth}.steps"), steps);
        }
    }
}

fn split(weights: &[f32]) -> (&[f32], f32) {
    let (b, w) = weights.split_last().expect("D + 1 values");
    (w, *b)
}

fn row<'r>(residual: &'r [f32], d: usize, scored: &Scored) -> &'r [f32] {
    &residual[scored.row as usize * d..][..d]
}

fn direction(h: &[f32]) -> Vec<f32> {
    let norm = h.iter().map(|&x| (x as f64).powi(2)).sum::<f64>().sqrt().max(1e-12);
    h.iter().map(|&x| (x as f64 / norm) as f32).collect()
}

fn value(w: &[f32], b: f32, x: &[f32]) -> f32 {
    let dot: f64 = w.iter().zip(x).map(|(w, x)| (w * x) as f64).sum();
    (dot + b as f64) as f32
}

/// Share of the returns' variance over a step's tokens that values explain, `1 - Var(R - V) / Var(R)`; none
/// without a critic, and where the returns are all equal.
pub fn explained_variance(groups: &[ResponseGroup]) -> Option<f32> {
    let responses = || groups.iter().flat_map(|g| &g.responses);
    let pairs = || responses().flat_map(|r| r.returns.iter().zip(&r.values));
    let total = variance(pairs().map(|(r, _)| *r as f64).collect());
    let rest = variance(pairs().map(|(r, v)| *r as f64 - *v as f64).collect());
    (total > 0.0).then(|| (1.0 - rest / total) as f32)
}

fn variance(values: Vec<f64>) -> f64 {
    let mean = values.iter().sum::<f64>() / values.len() as f64;
    values.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / values.len() as f64
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::train::Response;

    const CONFIG: CriticConfig = CriticConfig { lr: 0.05, beta1: 0.9, beta2: 0.999, eps: 1e-8 };

    fn accumulate(
        critic: &mut Critic,
        depth: usize,
        residual: &[f32],
        scored: &[Scored],
        targets: &[(f32, f32)],
    ) -> f64 {
        let (loss, gradient) = critic.gradient(depth, residual, scored, targets);
        critic.add(depth, &gradient);
        loss
    }

    fn scored(rows: &[i32]) -> Vec<Scored> {
        rows.iter().map(|&row| Scored { row, target: 0 }).collect()
    }

    #[test]
    fn gradient_is_the_derivative() {
        let residual: Vec<f32> = (0..20).map(|i| (i as f32 * 0.7).sin() * 3.0).collect();
        let (at, targets) = (scored(&[0, 2, 4]), [(0.5, 1.0), (0.25, -0.5), (0.25, 0.3)]);
        let mut critic = Critic::new(&[3], 4, CONFIG).unwrap();
        let weights = [0.3, -0.2, 0.7, 0.1, 0.05];
        let loss = |critic: &mut Critic, weights: &[f32]| {
            critic.heads[0].tensors.values_mut(0).copy_from_slice(weights);
            critic.heads[0].gradient.fill(0.0);
            accumulate(critic, 3, &residual, &at, &targets)
        };
        for i in 0..5 {
            let (mut up, mut down) = (weights, weights);
            (up[i], down[i]) = (up[i] + 1e-2, down[i] - 1e-2);
            let numeric = (loss(&mut critic, &up) - loss(&mut critic, &down)) / 2e-2;
            loss(&mut critic, &weights);
            let exact = critic.heads[0].gradient[i];
            assert!((numeric - exact).abs() < 1e-5, "{i}: {numeric} {exact}");
        }
    }

    #[test]
    fn a_head_learns_what_its_layer_shows_and_others_stay() {
        // Two directions with different returns.
        let residual = [1.0, 0.0, 0.0, 5.0];
        let mut critic = Critic::new(&[2, 4, 2], 2, CONFIG).unwrap();
        assert_eq!(critic.heads.len(), 2);
        for _ in 0..400 {
            accumulate(&mut critic, 2, &residual, &scored(&[0, 1]), &[(0.5, 1.0), (0.5, -1.0)]);
            critic.step(2);
        }
        let values = critic.values(2, &residual, &scored(&[0, 1]));
        assert!((values[0] - 1.0).abs() < 0.05 && (values[1] + 1.0).abs() < 0.05, "{values:?}");
        assert_eq!(critic.values(4, &residual, &scored(&[0, 1])), [0.0, 0.0]);
        let before = critic.values(2, &residual, &scored(&[0]));
        accumulate(&mut critic, 2, &residual, &scored(&[0]), &[(f32::NAN, 1.0)]);
        critic.step(2);
        assert_eq!(critic.values(2, &residual, &scored(&[0])), before);
    }

    #[test]
    fn explained_variance_is_1_for_the_truth_and_0_for_a_constant() {
        let with = |returns: &[f32], values: &[f32]| {
            let response = Response {
                returns: returns.to_vec(),
                values: values.to_vec(),
                ..Response::default()
            };
            explained_variance(&[ResponseGroup { responses: vec![response], ..Default::default() }])
        };
        let returns = [1.0, 0.0, 1.0, 0.5];
        assert_eq!(with(&returns, &returns), Some(1.0));
        assert_eq!(with(&returns, &[0.25; 4]), Some(0.0));
        assert_eq!(with(&[1.0; 3], &[0.5; 3]), None);
        assert_eq!(with(&[], &[]), None);
    }
}
