//! How a completion is judged: a number, and the reason for it in words.

mod boxed;
mod exact;
mod judge;
mod number;
mod parts;
mod pool;
mod program;

use crate::{Error, Result, data::Problem};

pub use boxed::last_boxed;
pub use judge::{Attempt, Judge, JudgeOptions, Judgement};
pub use pool::{Fresh, JudgePool, Judged, Sampler};
pub use program::Program;

/// A rule that compares a completion's answer with the right one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Reward {
    /// The last `\boxed{..}` of the completion, compared with the answer as a number or as text.
    Boxed,
    /// The whole completion, compared with the answer as text.
    Exact,
}

/// What a reward says about one completion.
#[derive(Debug, Clone, PartialEq)]
pub struct Verdict {
    /// 1 for right, 0 for wrong. Always finite.
    pub reward: f32,
    /// Why, in one line.
    pub reason: String,
}

impl Reward {
    /// What [`Reward::parse`] knows.
    pub const SUPPORTED: &str = "boxed, exact";

    /// Reads the value of `--reward`.
    pub fn parse(spec: &str) -> Result<Reward> {
        match spec {
            "boxed" => Ok(Reward::Boxed),
            "exact" => Ok(Reward::Exact),
            _ => Err(Error::Unsupported {
                what: "reward",
                got: spec.into(),
                supported: Reward::SUPPORTED.into(),
            }),
        }
    }

    /// The name that [`Reward::parse`] reads.
    pub fn name(&self) -> &'static str {
        match self {
            Reward::Boxed => "boxed",
            Reward::Exact => "exact",
        }
    }

    /// The answer that this rule reads in a completion; none where there is none.
    pub fn answer(&self, completion: &str) -> Option<String> {
        let answer = match self {
            Reward::Boxed => last_boxed(completion)?,
            Reward::Exact => completion.trim(),
        };
        Some(answer.to_owned()).filter(|answer| !answer.is_empty())
    }

    /// Whether two answers (of [`Reward::answer`]) are the same to this rule.
    pub fn same(&self, a: &str, b: &str) -> bool {
        match self {
            Reward::Boxed => boxed::same(a, b),
            Reward::Exact => a == b,
        }
    }

    /// Judges the text of a completion, without the token that ended it.
    ///
    /// A wrong answer is a verdict; an error is a rule that could not judge.
    pub fn score(&self, problem: &Problem, completion: &str) -> Result<Verdict> {
        Ok(match self {
            Reward::Boxed => boxed::score(&problem.answer, completion),
            Reward::Exact => exact::score(&problem.answer, completion),
        })
    }
}

impl Verdict {
    fn right(reason: impl Into<String>) -> Verdict {
        Verdict { reward: 1.0, reason: reason.into() }
    }

    fn wrong(reason: impl Into<String>) -> Verdict {
        Verdict { reward: 0.0, reason: reason.into() }
    }
}

/// An answer as a reason quotes it: one line, not long.
fn quoted(text: &str) -> String {
    format!("{:?}", crate::data::jsonl::shorten(text, 60))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::Prompt;

    #[test]
    fn names_are_read_back_and_unknown_ones_list_the_known() {
        for reward in [Reward::Boxed, Reward::Exact] {
            assert_eq!(Reward::parse(reward.name()).unwrap(), reward);
        }
        let error = Reward::parse("magic").unwrap_err().to_string();
        assert_eq!(error, "reward 'magic' is not supported; supported: boxed, exact");
    }

    #[test]
    fn scores_carry_a_reason() {
        let problem = Problem {
            id: "1".into(),
            prompt: Prompt::Text("17+25=".into()),
            answer: "42".into(),
            source: "t:1".into(),
            difficulty: None,
        };
        for (reward, completion, value, reason) in [
            (Reward::Boxed, "so \\boxed{42.0}", 1.0, "\"42.0\" equals \"42\" as a number"),
            (Reward::Boxed, "\\boxed{24}", 0.0, "\"24\" is not \"42\""),
            (Reward::Boxed, "42", 0.0, "no \\boxed{..}"),
            (Reward::Exact, " 42\n", 1.0, "the same text"),
            (Reward::Exact, "42.0", 0.0, "\"42.0\" is not \"42\""),
        ] {
            let verdict = reward.score(&problem, completion).unwrap();
            assert_eq!((verdict.reward, verdict.reason.as_str()), (value, reason));
        }
    }
}
