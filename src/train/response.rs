//! Completions and their prompts as training sees them, wherever they come from.

use crate::model::Batch;

/// A completion as training sees it.
#[derive(Clone, Debug, Default)]
pub struct Response {
    /// What it goes on from, of a later segment of a dialogue; none is the group's prompt.
    pub prompt: Option<Vec<i32>>,
    /// Its tokens, not empty.
    pub tokens: Vec<i32>,
    /// What each token counts, 0 for one that is not learnt; empty where all count 1.
    pub weights: Vec<f32>,
    /// Whether it is wanted, of labelled rows.
    pub label: bool,
    /// Log-probs that the rollout engine sampled them with.
    pub rollout: Vec<f32>,
    /// The experts that the prompt's tokens and its own took as they were sampled; empty where they are not known.
    pub experts: Vec<i16>,
    /// Reward.
    pub reward: f32,
    /// Of a dialogue whose turns are told apart, each turn of the segment.
    pub turns: Vec<TurnReturn>,
    /// Advantage of each token.
    pub advantages: Vec<f32>,
    /// Log-probs under the policy before the step's first update; none until they are needed.
    pub old: Option<Vec<f32>>,
    /// Whether they are those that it was sampled with.
    pub old_is_rollout: bool,
    /// Log-probs under the reference: the base model, unless it is said otherwise.
    pub base: Option<Vec<f32>>,
    /// Values at each token before the step's first update, with a critic.
    pub values: Vec<f32>,
    /// What the values should have been.
    pub returns: Vec<f32>,
}

/// A turn of a dialogue, as advantages see it.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct TurnReturn {
    /// Learnt tokens of the segment up to its end.
    pub end: usize,
    /// Its own reward; of a segment's last turn with the discounted rewards of later segments.
    pub reward: f32,
    /// Rewards from it on, discounted.
    pub to_go: f32,
}

impl Response {
    /// Tokens that are learnt.
    pub fn n_learnt(&self) -> usize {
        self.learnt_weights().count()
    }

    /// Whether any token has an advantage.
    pub fn has_signal(&self) -> bool {
        self.advantages.iter().any(|&a| a != 0.0)
    }

    /// Whether token t is learnt.
    pub fn learns(&self, t: usize) -> bool {
        self.weights.get(t).is_none_or(|&w| w != 0.0)
    }

    /// Weights of the learnt tokens.
    pub fn learnt_weights(&self) -> impl Iterator<Item = f32> + '_ {
        let all = (0..self.tokens.len()).map(|t| self.weights.get(t).copied().unwrap_or(1.0));
        all.filter(|&w| w != 0.0)
    }

    /// Sum of its tokens' weights.
    pub fn weight(&self) -> f64 {
        self.learnt_weights().map(f64::from).sum()
    }

    /// What the response counts as a whole.
    pub fn row_weight(&self) -> f64 {
        self.weights.first().map_or(1.0, |&w| w as f64)
    }

    /// The log-prob before the update less the rollout engine's, nats.
    pub(super) fn log_ratio(&self, t: usize, old: f32) -> f32 {
        self.rollout.get(t).map_or(0.0, |rollout| old - rollout)
    }
}

/// A prompt and the responses to it.
#[derive(Clone, Debug, Default)]
pub struct ResponseGroup {
    /// Prompt tokens.
    pub prompt: Vec<i32>,
    /// Responses; of a pair the chosen one and the rejected one.
    pub responses: Vec<Response>,
}

impl ResponseGroup {
    /// Tokens that a batch takes for it.
    pub fn n_tokens(&self) -> usize {
        let lengths = |r: &Response| r.tokens.len();
        let shared = self.responses.iter().filter(|r| r.prompt.is_none()).map(lengths);
        let own = self.responses.iter().filter_map(|r| Some((r.prompt.as_ref()?, r.tokens.len())));
        let own = own.map(|(p, n)| Batch::group_len(p.len(), std::iter::once(n)));
        Batch::group_len(self.prompt.len(), shared) + own.sum::<usize>()
    }
}
