//! Learning rate over the steps of a run: linear warm-up, then constant, linear or cosine to zero.

use serde::{Deserialize, Serialize};

/// Shape after the warm-up.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Schedule {
    /// Stays.
    Constant,
    /// Falls to zero in a line.
    Linear,
    /// Falls to zero in half a cosine.
    Cosine,
}

impl Schedule {
    /// Factor of the learning rate at `step` (from 1) of `steps`, with `warmup` steps of rise.
    pub fn factor(self, step: u64, steps: u64, warmup: u64) -> f32 {
        if step <= warmup {
            return step as f32 / warmup as f32;
        }
        let done = (step - warmup - 1) as f32 / (steps.saturating_sub(warmup)).max(1) as f32;
        match self {
            Schedule::Constant => 1.0,
            Schedule::Linear => 1.0 - done,
            Schedule::Cosine => 0.5 * (1.0 + (std::f32::consts::PI * done).cos()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rises_then_follows_its_shape() {
        assert_eq!(Schedule::Constant.factor(1, 10, 4), 0.25);
        assert_eq!(Schedule::Constant.factor(9, 10, 4), 1.0);
        assert_eq!(Schedule::Linear.factor(1, 10, 0), 1.0);
        assert!((Schedule::Linear.factor(10, 10, 0) - 0.1).abs() < 1e-6);
        assert!((Schedule::Cosine.factor(6, 10, 0) - 0.5).abs() < 1e-6);
    }
}
