//! Group-relative advantages.
//!
//! GRPO (PAPER section 2): `A_i = (R_i - mean(R)) / (std(R) + 1e-6)`, std unbiased (n - 1), the same
//! for every token of a response; a group of equal rewards gets 0.
//!
//! RLOO: `A_i = R_i - mean(R without i)`.
//!
//! Dr. GRPO leaves the division by std out.

use serde::{Deserialize, Serialize};

/// Added to the standard deviation, as in the reference code.
const STD_EPS: f32 = 1e-6;

/// How rewards of a group become advantages.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Baseline {
    /// Mean of the group, divided by its standard deviation.
    GroupStd,
    /// Mean of the group.
    Group,
    /// Mean of the others (RLOO).
    LeaveOneOut,
}

/// One advantage per reward.
pub fn advantages(rewards: &[f32], baseline: Baseline) -> Vec<f32> {
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
        Baseline::Group => rewards.iter().map(|r| r - mean).collect(),
        Baseline::LeaveOneOut => rewards.iter().map(|r| (r - mean) * (n / (n - 1.0))).collect(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn group_std_is_unbiased() {
        // mean 0.375, sum of squares 0.6875, variance 0.6875 / 3
        let a = advantages(&[1.0, 0.0, 0.5, 0.0], Baseline::GroupStd);
        let std = (0.6875f32 / 3.0).sqrt();
        assert!((a[0] - 0.625 / (std + 1e-6)).abs() < 1e-6);
        assert!(a.iter().sum::<f32>().abs() < 1e-6);
    }

    #[test]
    fn equal_rewards_teach_nothing() {
        for baseline in [Baseline::GroupStd, Baseline::Group, Baseline::LeaveOneOut] {
            assert_eq!(advantages(&[0.3; 5], baseline), [0.0; 5]);
        }
        assert_eq!(advantages(&[1.0], Baseline::GroupStd), [0.0]);
    }

    #[test]
    fn leave_one_out_compares_with_the_others() {
        let ours = advantages(&[1.0, 0.0, 0.0], Baseline::LeaveOneOut);
        for (a, exact) in ours.iter().zip([1.0, -0.5, -0.5]) {
            assert!((a - exact).abs() < 1e-6, "{a} {exact}");
        }
    }
}
