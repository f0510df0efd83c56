//! From rewards to advantages, one per token.
//!
//! | baseline | formula | source |
//! |---|---|---|
//! | `group-std` | `(R_i - mean) / (std + 1e-6)` over the group, std unbiased (n - 1) | GRPO, PAPER section 2 |
//! | `group` | `R_i - mean` over the group | Dr. GRPO, arXiv 2503.20783 |
//! | `leave-one-out` | `R_i - mean(R without i)` | RLOO, arXiv 2402.14740 |
//! | `batch` | `(R_i - m) / sqrt(v + 1e-8)`, m and v over all tokens of the step | Reinforce++, arXiv 2501.03262 |
//! | `group-batch` | `R_i - mean` over the group, then as `batch` | Reinforce++ with baseline, same |
//! | `value` | GAE of a value head, then as `batch` | PPO, arXiv 1707.06347 and 1506.02438 |
//!
//! All but the last are the same for every token of a response; a group of equal rewards gets 0 from those that
//! compare within the group. Departure: Reinforce++ puts its KL penalty into the reward; ours stands in
//! the loss (`--kl-coef`), as for every other objective.

use serde::{Deserialize, Serialize};

use super::learner::ResponseGroup;

/// Added to the standard deviation of a group, as in the reference code.
const STD_EPS: f32 = 1e-6;
/// Added to the variance of a batch, as in verl's `masked_whiten`.
const VARIANCE_EPS: f64 = 1e-8;

/// What rewards are compared with.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Baseline {
    /// Mean of the group, divided by its standard deviation (GRPO).
    GroupStd,
    /// Mean of the group (Dr. GRPO).
    Group,
    /// Mean of the others (RLOO).
    LeaveOneOut,
    /// Mean and deviation of the step's tokens (Reinforce++).
    Batch,
    /// Mean of the group, then mean and deviation of the step's tokens.
    GroupBatch,
    /// A value head (PPO).
    Value,
}

/// Discount and decay of generalised advantage estimation.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Gae {
    /// Discount of later rewards.
    pub gamma: f32,
    /// Weight of longer estimates.
    pub lambda: f32,
}

/// One advantage per reward of a group, for baselines that look at the group alone; the others take the
/// rewards as they are.
pub fn advantages(rewards: &[f32], baseline: Baseline) -> Vec<f32> {
    if matches!(baseline, Baseline::Batch | Baseline::Value) {
        return rewards.to_vec();
    }
    let n = rewards.len() as f32;
    if rewards.len() < 2 || rewards.iter().all(|&r| r == rewards[0]) {
        return vec![0.0; rewards.len()];
    }
    let mean = rewards.iter().sum::<f32>() / n;
    match baseline {
        Baseline::GroupStd => {
            let variance = rewards.iter().map(|r| (r - mean).powi(2)).sum::<f32>() / (n - 1.0);
            rewards.iter().map(|r| (r - mean) / (variance.sqrt() + STD_EPS)).collect()
        }
        Baseline::LeaveOneOut => rewards.iter().map(|r| (r - mean) * (n / (n - 1.0))).collect(),
        _ => rewards.iter().map(|r| r - mean).collect(),
    }
}

/// Sets the advantages of all tokens of a step; with [`Baseline::Value`] from the responses' `values`,
/// and their `returns` with them.
pub fn assign(groups: &mut [ResponseGroup], baseline: Baseline, gae: Gae) {
    for group in groups.iter_mut() {
        let rewards: Vec<f32> = group.responses.iter().map(|r| r.reward).collect();
        for (response, a) in group.responses.iter_mut().zip(advantages(&rewards, baseline)) {
            if baseline == Baseline::Value {
                (response.advantages, response.returns) = estimate(a, &response.values, gae);
            } else {
                response.advantages = vec![a; response.tokens.len()];
            }
        }
    }
    if matches!(baseline, Baseline::Batch | Baseline::GroupBatch | Baseline::Value) {
        let responses = groups.iter_mut().flat_map(|g| &mut g.responses);
        whiten(responses.map(|r| r.advantages.as_mut_slice()).collect());
    }
}

/// Generalised advantage estimation of a response that is rewarded at its end, and its returns:
///
/// ```text
/// delta_t = r_t + gamma V_(t+1) - V_t,   V after the last token = 0
/// A_t     = delta_t + gamma lambda A_(t+1)
/// R_t     = A_t + V_t
/// ```
pub fn estimate(reward: f32, values: &[f32], gae: Gae) -> (Vec<f32>, Vec<f32>) {
    let mut advantages = vec![0.0; values.len()];
    let (mut next_value, mut next_advantage, mut reward) = (0.0, 0.0, reward);
    for (t, &value) in values.iter().enumerate().rev() {
        let delta = reward + gae.gamma * next_value - value;
        next_advantage = delta + gae.gamma * gae.lambda * next_advantage;
        advantages[t] = next_advantage;
        (next_value, reward) = (value, 0.0);
    }
    let returns = advantages.iter().zip(values).map(|(a, v)| a + v).collect();
    (advantages, returns)
}

/// Mean 0 and variance 1 (unbiased) over all tokens; equal ones become 0.
fn whiten(mut all: Vec<&mut [f32]>) {
    let n: usize = all.iter().map(|a| a.len()).sum();
    let sum = |f: &dyn Fn(f64) -> f64, all: &[&mut [f32]]| -> f64 {
        all.iter().flat_map(|a| a.iter()).map(|&x| f(x as f64)).sum()
    };
    let mut flat = all.iter().flat_map(|a| a.iter());
    let first = flat.next().copied().unwrap_or_default();
    let equal = flat.all(|&x| x == first);
    let mean = sum(&|x| x, &all) / n as f64;
    let variance = sum(&|x| (x - mean).powi(2), &all) / (n as f64 - 1.0).max(1.0);
    let scale = if equal { 0.0 } else { 1.0 / (variance + VARIANCE_EPS).sqrt() };
    for x in all.iter_mut().flat_map(|a| a.iter_mut()) {
        *x = ((*x as f64 - mean) * scale) as f32;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn equal_rewards_teach_nothing() {
        for baseline in
            [Baseline::GroupStd, Baseline::Group, Baseline::LeaveOneOut, Baseline::GroupBatch]
        {
            assert_eq!(advantages(&[0.3; 5], baseline), [0.0; 5]);
        }
        assert_eq!(advantages(&[1.0], Baseline::GroupStd), [0.0]);
    }

    #[test]
    fn with_gamma_and_lambda_1_the_return_is_the_reward() {
        let (advantages, returns) =
            estimate(1.0, &[0.25, 0.5, -1.0], Gae { gamma: 1.0, lambda: 1.0 });
        assert_eq!((advantages, returns), (vec![0.75, 0.5, 2.0], vec![1.0; 3]));
        // lambda 0: one step ahead.
        let (advantages, _) = estimate(1.0, &[0.25, 0.5, -1.0], Gae { gamma: 0.5, lambda: 0.0 });
        assert_eq!(advantages, [0.0, -1.0, 2.0]);
        assert_eq!(estimate(1.0, &[], Gae { gamma: 1.0, lambda: 1.0 }), (vec![], vec![]));
    }

    #[test]
    fn whitening_counts_tokens() {
        let (mut a, mut b) = (vec![1.0; 3], vec![0.0; 1]);
        whiten(vec![&mut a, &mut b]);
        // mean 0.75, variance (3 * 0.0625 + 0.5625) / 3 = 0.25
        assert!((a[0] - 0.5).abs() < 1e-6 && (b[0] + 1.5).abs() < 1e-6, "{a:?} {b:?}");
        let mut equal = vec![0.3; 4];
        whiten(vec![&mut equal]);
        assert_eq!(equal, [0.0; 4]);
    }
}
