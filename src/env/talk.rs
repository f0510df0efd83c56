//! A dialogue that has ended: its tokens, its messages, its rewards.

use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::rollout::{Finish, Segment};

/// The end of a turn of the model.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct TurnEnd {
    /// Its reward.
    pub reward: f32,
}

/// A dialogue as it was sampled.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Dialogue {
    /// Tokens; a new segment where the chat template rewrote what was said before.
    pub segments: Vec<Segment>,
    /// All messages, the model's as they were read.
    #[serde(with = "as_text")]
    pub messages: Vec<Value>,
    /// The model's turns, in their order.
    pub turns: Vec<TurnEnd>,
    /// Tools called.
    pub calls: usize,
    /// Calls that were malformed, or whose result begins with "error".
    pub failed: usize,
    /// Whether it succeeded.
    pub success: bool,
    /// What the environment said of its end.
    pub reason: String,
    /// Whether a limit of turns, tokens or time ended it.
    pub truncated: bool,
}

/// JSON within what is no JSON, for a form that does not say of a value what it is.
pub(super) mod as_text {
    use serde::de::Error as _;
    use serde::ser::Error as _;
    use serde::{Deserialize, Deserializer, Serialize, Serializer};
    use serde_json::Value;

    pub fn serialize<S: Serializer>(messages: &[Value], to: S) -> Result<S::Ok, S::Error> {
        serde_json::to_string(messages).map_err(S::Error::custom)?.serialize(to)
    }

    pub fn deserialize<'d, D: Deserializer<'d>>(from: D) -> Result<Vec<Value>, D::Error> {
        let text = String::deserialize(from)?;
        serde_json::from_str(&text).map_err(D::Error::custom)
    }
}

/// What a dialogue's environment said, while it is under way.
#[derive(Clone, Copy, Debug)]
pub struct Heard<'h> {
    /// Messages that the model reads next, or at the end does not.
    pub messages: &'h [Value],
    /// Whether the dialogue is over.
    pub over: bool,
}

impl Dialogue {
    /// Rewards from each turn on, later ones discounted: `G_k = sum_(j >= k) discount^(j - k) r_j`.
    pub fn returns(&self, discount: f32) -> Vec<f32> {
        let mut later = 0.0;
        let mut returns: Vec<f32> = self
            .turns
            .iter()
            .rev()
            .map(|turn| {
                later = turn.reward + discount * later;
                later
            })
            .collect();
        returns.reverse();
        returns
    }

    /// What it was like.
    pub fn counts(&self) -> Counts {
        Counts {
            turns: self.turns.len(),
            tool_calls: self.calls,
            tool_calls_failed: self.failed,
            success: self.success,
            segments: self.segments.len(),
        }
    }

    /// Tokens that were sampled.
    pub fn own_tokens(&self) -> usize {
        self.segments.iter().flat_map(|s| &s.own).filter(|&&own| own).count()
    }

    /// Whether it hit a limit of tokens.
    pub fn is_cut(&self) -> bool {
        self.segments.last().is_some_and(|s| s.completion.finish == Finish::Length)
    }

    /// What the model said last.
    pub fn last_words(&self) -> String {
        let own = self.messages.iter().rev().find(|message| message["role"] == "assistant");
        own.and_then(|message| message["content"].as_str()).unwrap_or_default().into()
    }

    /// All of it as one text.
    pub fn text(&self) -> String {
        let line = |message: &Value| {
            let word = |name: &str| message[name].as_str().unwrap_or_default();
            let mut text = format!("[{}] {}", word("role"), word("content"));
            for call in message["tool_calls"].as_array().into_iter().flatten() {
                let function = &call["function"];
                let name = function["name"].as_str().unwrap_or_default();
                text += &format!(" -> {name}({})", function["arguments"]);
            }
            text
        };
        self.messages.iter().map(line).collect::<Vec<_>>().join("\n")
    }
}

/// What one dialogue was like.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Counts {
    /// Turns of the model.
    pub turns: usize,
    /// Tools called.
    pub tool_calls: usize,
    /// Calls that failed.
    pub tool_calls_failed: usize,
    /// Whether it succeeded.
    pub success: bool,
    /// Segments.
    pub segments: usize,
}

/// What dialogues were like, on average.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct Talk {
    /// Turns of the model in a dialogue.
    pub turns: f32,
    /// Tools called in a dialogue.
    pub tool_calls: f32,
    /// Share of calls that failed.
    pub tool_calls_failed: f32,
    /// Share of dialogues that succeeded.
    pub success: f32,
    /// Segments of a dialogue: 1 unless the chat template rewrites what was said.
    pub segments: f32,
}

impl Talk {
    /// Of these dialogues.
    pub fn of(dialogues: impl Iterator<Item = Counts>) -> Talk {
        let (mut n, mut sum, mut failed) = (0, Talk::default(), 0);
        for d in dialogues {
            n += 1;
            sum.turns += d.turns as f32;
            sum.tool_calls += d.tool_calls as f32;
            sum.success += d.success as u8 as f32;
            sum.segments += d.segments as f32;
            failed += d.tool_calls_failed;
        }
        let mean = |x: f32| x / n.max(1) as f32;
        Talk {
            turns: mean(sum.turns),
            tool_calls: mean(sum.tool_calls),
            tool_calls_failed: failed as f32 / sum.tool_calls.max(1.0),
            success: mean(sum.success),
            segments: mean(sum.segments),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn returns_are_discounted_sums_of_later_rewards() {
        let turns = [0.0, 1.0, 0.5].map(|reward| TurnEnd { reward }).to_vec();
        let dialogue = Dialogue {
            segments: vec![],
            messages: vec![],
            turns,
            calls: 0,
            failed: 0,
            success: true,
            reason: String::new(),
            truncated: false,
        };
        assert_eq!(dialogue.returns(1.0), [1.5, 1.5, 0.5]);
        assert_eq!(dialogue.returns(0.5), [0.625, 1.25, 0.5]);
        assert_eq!(dialogue.returns(0.0), [0.0, 1.0, 0.5]);
    }
}
