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

use super::response::{Response, ResponseGroup};

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

/// Sets the advantages of all learnt tokens of a step; with [`Baseline::Value`] from the responses' `values`,
/// and their `returns` with them.
///
/// Of dialogues whose turns are told apart a turn's tokens get the advantage of the rewards from it on, which is compared
/// with those of all turns of the group; of others the whole counts once, however many segments it has.
pub fn assign(groups: &mut [ResponseGroup], baseline: Baseline, gae: Gae) {
    for group in groups.iter_mut() {
        if baseline == Baseline::Value {
            for response in &mut group.responses {
                let rewards = token_rewards(response);
                (response.advantages, response.returns) =
                    estimate_turns(&rewards, &response.values, gae);
            }
            continue;
        }
        let compared = group.responses.iter().flat_map(returns).collect::<Vec<f32>>();
        let mut found = advantages(&compared, baseline).into_iter();
        let mut last = 0.0;
        for response in &mut group.responses {
            let mut next = || found.next().expect("one for each return");
            let mut all = Vec::new();
            if response.turns.is_empty() {
                last = if response.prompt.is_none() { next() } else { last };
                all.resize(response.n_learnt(), last);
            }
            for turn in &response.turns {
                all.resize(turn.end, next());
            }
            response.advantages = all;
        }
    }
    if matches!(baseline, Baseline::Batch | Baseline::GroupBatch | Baseline::Value) {
        let responses = groups.iter_mut().flat_map(|g| &mut g.responses);
        whiten(responses.map(|r| r.advantages.as_mut_slice()).collect());
    }
}

/// What a response is compared by within its group: a return for each turn that is told apart, else its reward, once for
/// all segments of a dialogue.
pub(super) fn returns(response: &Response) -> Vec<f32> {
    match (response.turns.is_empty(), &response.prompt) {
        (false, _) => response.turns.iter().map(|turn| turn.to_go).collect(),
        (true, None) => vec![response.reward],
        (true, Some(_)) => Vec::new(),
    }
}

/// The reward of each learnt token: at the ends of turns, where they are told apart, else at the end.
fn token_rewards(response: &Response) -> Vec<f32> {
    let mut rewards = vec![0.0; response.values.len()];
    for turn in &response.turns {
        rewards[turn.end - 1] = turn.reward;
    }
    if let (true, Some(last)) = (response.turns.is_empty(), rewards.last_mut()) {
        *last = response.reward;
    }
    rewards
}

/// [`estimate_turns`] of a response that is rewarded at its end.
pub fn estimate(reward: f32, values: &[f32], gae: Gae) -> (Vec<f32>, Vec<f32>) {
    let mut rewards = vec![0.0; values.len()];
    rewards.last_mut().into_iter().for_each(|last| *last = reward);
    estimate_turns(&rewards, values, gae)
}

/// Generalised advantage estimation of a response whose tokens have these rewards, and its returns:
///
/// ```text
/// delta_t = r_t + gamma V_(t+1) - V_t,   V after the last token = 0
/// A_t     = delta_t + gamma lambda A_(t+1)
/// R_t     = A_t + V_t
/// ```
pub fn estimate_turns(rewards: &[f32], values: &[f32], gae: Gae) -> (Vec<f32>, Vec<f32>) {
    let mut advantages = vec![0.0; values.len()];
    let (mut next_value, mut next_advantage) = (0.0, 0.0);
    for (t, &value) in values.iter().enumerate().rev() {
        let delta = rewards[t] + gae.gamma * next_value - value;
        next_advantage = delta + gae.gamma * gae.lambda * next_advantage;
        advantages[t] = next_advantage;
        next_value = value;
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
    fn a_dialogue_counts_once_and_its_turns_where_they_are_told_apart() {
        use super::super::response::TurnReturn;
        let gae = Gae { gamma: 1.0, lambda: 1.0 };
        let whole = |reward: f32, prompt: Option<Vec<i32>>, own: &[f32]| Response {
            prompt,
            tokens: vec![1; own.len()],
            weights: own.to_vec(),
            reward,
            ..Response::default()
        };
        let segments = vec![
            whole(1.0, None, &[1.0, 0.0, 1.0]),
            whole(1.0, Some(vec![2]), &[1.0]),
            whole(1.0, Some(vec![2]), &[1.0]),
            whole(0.0, None, &[1.0, 1.0]),
        ];
        let mut groups = vec![ResponseGroup { prompt: vec![0], responses: segments }];
        assign(&mut groups, Baseline::Group, gae);
        let all: Vec<_> = groups[0].responses.iter().map(|r| r.advantages.clone()).collect();
        // The mean is that of two dialogues, not of four segments; masked tokens have no advantage.
        assert_eq!(all, [vec![0.5, 0.5], vec![0.5], vec![0.5], vec![-0.5, -0.5]]);

        let turn = |end, reward, to_go| TurnReturn { end, reward, to_go };
        let mut groups = vec![ResponseGroup {
            prompt: vec![0],
            responses: vec![
                Response {
                    turns: vec![turn(1, 0.0, 1.0), turn(3, 1.0, 1.0)],
                    ..whole(1.0, None, &[1.0, 0.0, 1.0, 1.0])
                },
                Response { turns: vec![turn(1, -2.0, -2.0)], ..whole(-2.0, None, &[1.0]) },
            ],
        }];
        assign(&mut groups, Baseline::Group, gae);
        let all: Vec<_> = groups[0].responses.iter().map(|r| r.advantages.clone()).collect();
        assert_eq!(all, [vec![1.0, 1.0, 1.0], vec![-2.0]]);
        groups[0].responses.iter_mut().for_each(|r| r.values = vec![0.0; r.n_learnt()]);
        assign(&mut groups, Baseline::Value, gae);
        assert_eq!(groups[0].responses[0].returns, [1.0, 1.0, 1.0]);
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
