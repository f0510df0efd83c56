//! How a completion is judged: a number, and the reason for it in words.

mod boxed;
mod exact;
mod http;
mod judge;
pub mod math;
mod model;
mod number;
mod options;
mod parts;
mod pool;
pub(crate) mod process;
mod program;
mod rubric;
mod thoughts;

use crate::{Error, Result, data::Problem};
use math::{Mode, Rule};

pub use boxed::last_boxed;
pub use judge::{Attempt, Judge, JudgeOptions, Judgement};
pub use model::{JudgeMemory, ModelJudge};
pub use options::RewardOptions;
pub use pool::{Fresh, JudgePool, Judged, Sampler};
pub use program::Program;
use thoughts::spoken;

/// A rule that compares a completion's answer with the right one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Reward {
    /// The answer that these rules find in the completion, compared by meaning: [`math`].
    Math(Vec<Rule>),
    /// The last `\boxed{..}`, compared after the string normalisation of the MATH data set: the paper's.
    Hendrycks,
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
    pub const SUPPORTED: &str = "math, math:RULES, hendrycks, boxed, exact";

    /// Reads the value of `--reward`.
    pub fn parse(spec: &str) -> Result<Reward> {
        if let Some(rules) = spec.strip_prefix("math:") {
            return Ok(Reward::Math(Rule::parse_list(rules)?));
        }
        match spec {
            "math" => Ok(Reward::Math(Rule::ALL.to_vec())),
            "hendrycks" => Ok(Reward::Hendrycks),
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
            Reward::Math(_) => "math",
            Reward::Hendrycks => "hendrycks",
            Reward::Boxed => "boxed",
            Reward::Exact => "exact",
        }
    }

    /// The answer that this rule reads in a completion; none where there is none.
    pub fn answer(&self, completion: &str) -> Option<String> {
        let answer = match self {
            Reward::Math(rules) => Mode::Math.answer(completion, rules)?,
            Reward::Hendrycks => Mode::Hendrycks.answer(completion, Mode::Hendrycks.rules())?,
            Reward::Boxed => last_boxed(spoken(completion)?)?.into(),
            Reward::Exact => completion.trim().into(),
        };
        Some(answer.into_owned()).filter(|answer| !answer.is_empty())
    }

    /// Whether thoughts are no part of what this rule judges.
    fn leaves_thoughts_out(&self) -> bool {
        !matches!(self, Reward::Exact)
    }

    /// Whether two answers (of [`Reward::answer`]) are the same to this rule.
    pub fn same(&self, a: &str, b: &str) -> bool {
        match self {
            Reward::Math(_) => math::judge(a, b, Mode::Math).equal,
            Reward::Hendrycks => math::judge(a, b, Mode::Hendrycks).equal,
            Reward::Boxed => boxed::same(a, b),
            Reward::Exact => a == b,
        }
    }

    /// Judges the text of a completion, without the token that ended it.
    ///
    /// A wrong answer is a verdict; an error is a rule that could not judge.
    pub fn score(&self, problem: &Problem, completion: &str) -> Result<Verdict> {
        let gold = &problem.answer;
        Ok(match self {
            Reward::Math(rules) => math::score(gold, completion, Mode::Math, rules),
            Reward::Hendrycks => {
                math::score(gold, completion, Mode::Hendrycks, Mode::Hendrycks.rules())
            }
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
        for reward in
            [Reward::Math(Rule::ALL.to_vec()), Reward::Hendrycks, Reward::Boxed, Reward::Exact]
        {
            assert_eq!(Reward::parse(reward.name()).unwrap(), reward);
        }
        let error = Reward::parse("magic").unwrap_err().to_string();
        assert_eq!(
            error,
            "reward 'magic' is not supported; supported: math, math:RULES, hendrycks, boxed, exact"
        );
    }

    #[test]
    fn scores_carry_a_reason() {
        let problem = Problem {
            id: "1".into(),
            prompt: Prompt::Text("17+25=".into()),
            answer: "42".into(),
            source: "t:1".into(),
            difficulty: None,
            solution_bytes: 0,
        };
        for (reward, completion, value, reason) in [
            (Reward::Boxed, "so \\boxed{42.0}", 1.0, "\"42.0\" equals \"42\" as a number"),
            (Reward::Boxed, "\\boxed{24}", 0.0, "\"24\" is not \"42\""),
            (Reward::Boxed, "42", 0.0, "no \\boxed{..}"),
            (Reward::Math(vec![Rule::Boxed]), "42", 0.0, "no answer found"),
            (
                Reward::Math(Rule::ALL.to_vec()),
                "so \\boxed{84/2}",
                1.0,
                "\"84/2\" equals \"42\": the same number",
            ),
            (
                Reward::Hendrycks,
                "so \\boxed{42.0}",
                0.0,
                "\"42.0\" is not \"42\": another text after normalisation",
            ),
            (Reward::Exact, " 42\n", 1.0, "the same text"),
            (Reward::Exact, "42.0", 0.0, "\"42.0\" is not \"42\""),
        ] {
            let verdict = reward.score(&problem, completion).unwrap();
            assert_eq!((verdict.reward, verdict.reason.as_str()), (value, reason));
        }
    }
}
