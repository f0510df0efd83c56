//! Algorithms by name: each is a choice of orthogonal settings, and every one of those can be set apart.
//!
//! | name | baseline | ratio | surrogate | clip | aggregation | sampling | source |
//! |---|---|---|---|---|---|---|---|
//! | `grpo` | group-std | token | clip | 0.2, 0.2 | token-mean | | PAPER section 2 |
//! | `rloo` | leave-one-out | token | clip | 0.2, 0.2 | token-mean | | arXiv 2402.14740 |
//! | `reinforce++` | batch | token | clip | 0.2, 0.2 | token-mean | | arXiv 2501.03262 |
//! | `reinforce++-baseline` | group-batch | token | clip | 0.2, 0.2 | token-mean | | arXiv 2501.03262 |
//! | `dr-grpo` | group | token | clip | 0.2, 0.2 | constant | | arXiv 2503.20783 |
//! | `dapo` | group-std | token | clip | 0.2, 0.28 | token-mean | equal groups replaced | arXiv 2503.14476 |
//! | `gspo` | group-std | sequence | clip | 3e-4, 4e-4 | sequence-mean | | arXiv 2507.18071 |
//! | `cispo` | group-std | token | cispo | none, 0.2 | token-mean | | arXiv 2506.13585 |
//! | `ppo` | value | token | clip | 0.2, 0.2 | token-mean | | arXiv 1707.06347 |
//! | `bupo` | those of `--objective`, first for the internal policy of a layer, then for the model's | | | | | | PAPER section 2 |
//!
//!
//! The others learn without rewards, from rows or from a teacher, and each can have an internal phase of its own
//! (`--internal-steps`):
//!
//! | name | rows | loss |
//! |---|---|---|
//! | `sft` | completions, conversations, texts | cross-entropy, mean over the learnt tokens |
//! | `dpo`, `orpo`, `simpo` | a chosen and a rejected completion | `preference.rs` |
//! | `kto` | completions with a label | `preference.rs` |
//! | `distill` | prompts, with completions or without | divergence from a teacher over the whole vocabulary, mean over tokens |
//!
//! Departures: RLOO keeps PPO's clip, as the paper's reference code does, for there are several updates per
//! rollout batch; the upper clip of CISPO is not given in its paper; DAPO's soft punishment of length is a part
//! of the reward (`--reward "math + overlong:2048"`); dual clip (`--clip-c`) holds for all that clip.

use clap::ValueEnum;
use serde::{Deserialize, Serialize};

use super::advantage::Baseline;
use super::loss::{Aggregation, Ratio, Surrogate};
use crate::data::ExampleKind;

/// The algorithm of a run.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Algorithm {
    /// Internal layer policy first, then the final policy.
    Bupo,
    /// Group-relative policy optimisation.
    Grpo,
    /// Leave-one-out baseline.
    Rloo,
    /// Rewards normalised over the batch.
    #[value(name = "reinforce++")]
    #[serde(rename = "reinforce++")]
    ReinforcePlusPlus,
    /// The same after the group's mean.
    #[value(name = "reinforce++-baseline")]
    #[serde(rename = "reinforce++-baseline")]
    ReinforcePlusPlusBaseline,
    /// GRPO without its two biases.
    DrGrpo,
    /// Higher upper clip, groups without signal replaced.
    Dapo,
    /// Ratio of whole responses.
    Gspo,
    /// Clipped weight, every token keeps its gradient.
    Cispo,
    /// Value head and GAE.
    Ppo,
    /// Supervised fine-tuning on given completions.
    Sft,
    /// Direct preference optimisation on pairs.
    Dpo,
    /// Labelled completions.
    Kto,
    /// Pairs by their odds ratio, without reference.
    Orpo,
    /// Pairs by their mean log-probs, without reference.
    Simpo,
    /// A teacher's distributions.
    Distill,
}

/// What an algorithm's name stands for.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Defaults {
    /// What rewards are compared with.
    pub baseline: Baseline,
    /// Whose ratio.
    pub ratio: Ratio,
    /// What is done with it.
    pub surrogate: Surrogate,
    /// From token losses to one number.
    pub aggregation: Aggregation,
    /// The ratio may fall to 1 - this.
    pub clip_low: f32,
    /// The ratio may rise to 1 + this.
    pub clip_high: f32,
    /// Times that groups without signal are replaced.
    pub resample: u64,
}

impl Algorithm {
    /// The word on the command line and in `config.toml`.
    pub fn name(self) -> String {
        let value = self.to_possible_value().expect("none is skipped");
        value.get_name().to_owned()
    }

    /// Whether completions are sampled and rewarded.
    pub fn is_rewarded(self) -> bool {
        self.rows().is_none()
    }

    /// What rows it learns from; none where completions are sampled and rewarded.
    pub fn rows(self) -> Option<ExampleKind> {
        match self {
            Algorithm::Sft => Some(ExampleKind::Imitation),
            Algorithm::Dpo | Algorithm::Orpo | Algorithm::Simpo => Some(ExampleKind::Pairs),
            Algorithm::Kto => Some(ExampleKind::Labelled),
            Algorithm::Distill => Some(ExampleKind::Contexts),
            _ => None,
        }
    }

    /// Whether steps up to `internal_steps` optimise the policy of an inner layer.
    pub fn has_internal_phase(self) -> bool {
        self == Algorithm::Bupo || !self.is_rewarded()
    }

    /// The settings of this row of the table; those of GRPO for BuPO, and where none mean anything.
    pub fn defaults(self) -> Defaults {
        let grpo = Defaults {
            baseline: Baseline::GroupStd,
            ratio: Ratio::Token,
            surrogate: Surrogate::Clip,
            aggregation: Aggregation::TokenMean,
            clip_low: 0.2,
            clip_high: 0.2,
            resample: 0,
        };
        match self {
            Algorithm::Rloo => Defaults { baseline: Baseline::LeaveOneOut, ..grpo },
            Algorithm::ReinforcePlusPlus => Defaults { baseline: Baseline::Batch, ..grpo },
            Algorithm::ReinforcePlusPlusBaseline => {
                Defaults { baseline: Baseline::GroupBatch, ..grpo }
            }
            Algorithm::DrGrpo => {
                Defaults { baseline: Baseline::Group, aggregation: Aggregation::Constant, ..grpo }
            }
            Algorithm::Dapo => Defaults { clip_high: 0.28, resample: 10, ..grpo },
            Algorithm::Gspo => Defaults {
                ratio: Ratio::Sequence,
                aggregation: Aggregation::SequenceMean,
                clip_low: 3e-4,
                clip_high: 4e-4,
                ..grpo
            },
            Algorithm::Cispo => Defaults { surrogate: Surrogate::Cispo, clip_low: 1.0, ..grpo },
            Algorithm::Ppo => Defaults { baseline: Baseline::Value, ..grpo },
            _ => grpo,
        }
    }
}
