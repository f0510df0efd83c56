//! A reward as a weighted sum of parts: `math + 0.2*format + overlong:256`.
//!
//! | part | value |
//! |---|---|
//! | `math`, `hendrycks`, `boxed`, `exact` | 1 where the answer is right by that rule, else 0 ([`Reward`]) |
//! | `regex:PATTERN` | 1 where the pattern is found in the completion, else 0 |
//! | `format`, `format:boxed`, `format:think` | 1 where the completion is written as asked, else 0; thoughts that the prompt began are judged with it |
//! | `overlong:N` | DAPO's penalty: 0, then falling to -1 over the last N tokens of the limit |
//! | `cmd:PROG` | what the program says ([`super::Program`]) |
//! | `http://URL` | what the server says ([`super::http`]) |
//! | `judge:MODEL.gguf` | a tenth of the score from 0 to 10 that another local model gives by a rubric ([`super::model`]) |
//!
//! Parts are joined by `+`; a pattern, a command line, a URL or a path goes on until a ` + ` with blanks around, or to the
//! end. The first part decides whether an answer counts as right, for accuracies.

use std::borrow::Cow;
use std::path::Path;
use std::time::Duration;

use regex::{Regex, RegexBuilder};

use super::http::HttpJudge;
use super::model::ModelJudge;
use super::{Program, Reward, Verdict, parts, rubric};
use crate::data::Problem;
use crate::{Error, Result};

/// A completion to be judged.
#[derive(Debug, Clone, Copy)]
pub struct Attempt<'a> {
    /// What was asked.
    pub problem: &'a Problem,
    /// The completion's text, without the token that ended it.
    pub text: &'a str,
    /// The end of the prompt where that begins the completion's thoughts (`<think>`), else empty.
    pub opening: &'a str,
    /// Its length, tokens.
    pub tokens: usize,
    /// Whether it was cut at the length limit.
    pub truncated: bool,
}

/// What a judge says about one completion.
#[derive(Debug, Clone, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct Judgement {
    /// The weighted sum, finite.
    pub reward: f32,
    /// Whether the first part's value is 1 or more.
    pub right: bool,
    /// The first part's reason, in one line.
    pub reason: String,
    /// Value of each part before its weight, in the order of [`Judge::names`].
    pub parts: Vec<f32>,
}

/// What a judge must know beside its specification.
#[derive(Debug, Clone)]
pub struct JudgeOptions {
    /// Length limit of completions, tokens.
    pub max_response: usize,
    /// How long a reward program may take for one completion, and a server for one answer.
    pub timeout: Duration,
    /// What judges that are models are asked; none is our own question.
    pub rubric: Option<String>,
    /// Times that a server is asked again.
    pub retries: usize,
    /// Completions that a judge may take at once.
    pub batch: usize,
}

/// The parts of a reward. A clone has a program of its own.
#[derive(Debug, Clone)]
pub struct Judge {
    parts: Vec<Part>,
}

#[derive(Debug, Clone)]
struct Part {
    name: String,
    weight: f32,
    rule: Rule,
}

#[derive(Debug, Clone)]
enum Rule {
    Answer(Reward),
    Regex(Regex),
    Boxed,
    Think,
    Overlong { cache: usize, limit: usize },
    Program(Program),
    Http(HttpJudge),
    Model(ModelJudge),
}

/// Largest compiled pattern, in bytes.
const MAX_REGEX_BYTES: usize = 1 << 22;

impl Judge {
    /// What [`Judge::parse`] knows, for messages.
    pub fn supported() -> String {
        let others = "regex:PATTERN, format, format:boxed, format:think, overlong:TOKENS, cmd:PROGRAM, http://URL, judge:MODEL";
        format!("{}, {others}; joined as in math + 0.2*format", Reward::SUPPORTED)
    }

    /// Reads the value of `--reward`.
    ///
    /// # Errors
    /// An unknown part, a weight that is no number, a pattern that does not compile.
    pub fn parse(spec: &str, options: &JudgeOptions) -> Result<Judge> {
        let mut judge = Judge { parts: Vec::new() };
        for text in split(spec) {
            let mut part = Part::parse(text, options)?;
            let again = judge.parts.iter().filter(|p| p.rule.name() == part.name).count();
            if again > 0 {
                part.name = format!("{}-{}", part.name, again + 1);
            }
            judge.parts.push(part);
        }
        Ok(judge)
    }

    /// Name of each part: `math`, `format`, and `regex-2` for a second one of a kind.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.parts.iter().map(|part| part.name.as_str())
    }

    /// Whether a part is a program's or a model's, whose command line or path counts from a folder.
    pub fn lies_somewhere(&self) -> bool {
        let lies = |rule: &Rule| matches!(rule, Rule::Program(_) | Rule::Model(_));
        self.parts.iter().any(|part| lies(&part.rule))
    }

    /// Whether a part may say something else when it is asked again: a program, a server or a model.
    pub fn asks_others(&self) -> bool {
        let asks = |rule: &Rule| matches!(rule, Rule::Program(_) | Rule::Http(_) | Rule::Model(_));
        self.parts.iter().any(|part| asks(&part.rule))
    }

    /// Models that judge.
    pub fn models(&self) -> impl Iterator<Item = &ModelJudge> {
        self.parts.iter().filter_map(|part| match &part.rule {
            Rule::Model(model) => Some(model),
            _ => None,
        })
    }

    /// Completions that are best judged together.
    pub fn batch(&self) -> usize {
        let of = |part: &Part| match &part.rule {
            Rule::Http(http) => http.batch(),
            Rule::Model(model) => model.batch(),
            _ => 1,
        };
        self.parts.iter().map(of).max().unwrap_or(1)
    }

    /// Runs programs in this folder, and finds models from there; without it in the current one.
    pub fn run_in(&mut self, folder: &Path) {
        for part in &mut self.parts {
            match &mut part.rule {
                Rule::Program(program) => program.run_in(folder),
                Rule::Model(model) => model.found_from(folder),
                _ => {}
            }
        }
    }

    /// Starts programs, so that the first completion need not wait for them.
    ///
    /// # Errors
    /// A program cannot be started.
    pub fn start(&mut self) -> Result<()> {
        for part in &mut self.parts {
            match &mut part.rule {
                Rule::Program(program) => program.start()?,
                Rule::Model(model) => model.start()?,
                _ => {}
            }
        }
        Ok(())
    }

    /// Judges a completion. A wrong answer is a judgement; an error is a part that could not judge.
    pub fn score(&mut self, attempt: &Attempt<'_>) -> Result<Judgement> {
        Ok(self.score_all(std::slice::from_ref(attempt))?.remove(0))
    }

    /// Judges completions together.
    pub fn score_all(&mut self, attempts: &[Attempt<'_>]) -> Result<Vec<Judgement>> {
        let none =
            Judgement { reward: 0.0, right: false, reason: String::new(), parts: Vec::new() };
        let mut judgements = vec![none; attempts.len()];
        for (i, part) in self.parts.iter_mut().enumerate() {
            for (judgement, verdict) in judgements.iter_mut().zip(part.rule.score(attempts)?) {
                judgement.reward += part.weight * verdict.reward;
                judgement.parts.push(verdict.reward);
                if i == 0 {
                    judgement.right = verdict.reward >= 1.0;
                    judgement.reason = verdict.reason;
                }
            }
        }
        Ok(judgements)
    }

    /// The answer that the first part reads in a completion, for majority votes; none where there is none.
    /// `opening` is the end of the prompt where that begins the thoughts.
    pub fn answer(&self, opening: &str, text: &str) -> Option<String> {
        let reward = match &self.parts[0].rule {
            Rule::Answer(reward) => reward,
            _ => &Reward::Boxed,
        };
        reward.answer(&begun(reward, opening, text))
    }

    /// Whether two answers are the same to the first part.
    pub fn same(&self, a: &str, b: &str) -> bool {
        match &self.parts[0].rule {
            Rule::Answer(reward) => reward.same(a, b),
            _ => a == b,
        }
    }
}

impl JudgeOptions {
    /// Of completions up to this length, judged within this time; the rest by default.
    pub fn new(max_response: usize, timeout: Duration) -> JudgeOptions {
        JudgeOptions { max_response, timeout, rubric: None, retries: 3, batch: 16 }
    }

    fn rubric(&self) -> &str {
        self.rubric.as_deref().unwrap_or(rubric::DEFAULT)
    }
}

impl Part {
    fn parse(text: &str, options: &JudgeOptions) -> Result<Part> {
        let (weight, text) = match text.split_once('*') {
            Some((number, rest)) if !number.contains(':') => {
                let weight = number.trim().parse::<f32>().ok().filter(|w| w.is_finite());
                let weight = weight.ok_or_else(|| {
                    let got = format!("{:?}", number.trim());
                    Error::invalid("--reward", "a number before *", got, "write 0.2*format")
                })?;
                (weight, rest.trim())
            }
            _ => (1.0, text),
        };
        let rule = Rule::parse(text, options)?;
        Ok(Part { name: rule.name().into(), weight, rule })
    }
}

impl Rule {
    fn parse(text: &str, options: &JudgeOptions) -> Result<Rule> {
        let place = || format!("--reward {text}");
        let (name, argument) = match text.split_once(':') {
            Some((name, argument)) => (name.trim(), Some(argument.trim())),
            None => (text, None),
        };
        Ok(match (name, argument) {
            ("regex", Some(pattern)) if !pattern.is_empty() => {
                let compiled = RegexBuilder::new(pattern).size_limit(MAX_REGEX_BYTES).build();
                Rule::Regex(compiled.map_err(|e| {
                    let why = e.to_string().split_whitespace().collect::<Vec<_>>().join(" ");
                    Error::invalid(place(), "a regular expression", why, "mend the pattern")
                })?)
            }
            ("format", None | Some("boxed")) => Rule::Boxed,
            ("format", Some("think")) => Rule::Think,
            ("overlong", Some(cache)) => {
                let limit = options.max_response;
                let tokens = cache.parse().ok().filter(|n| (1..=limit).contains(n));
                let cache = tokens.ok_or_else(|| {
                    let expected = format!("tokens from 1 to --max-response ({limit})");
                    let advice = "DAPO takes a fifth of the limit";
                    Error::invalid(place(), expected, format!("{cache:?}"), advice)
                })?;
                Rule::Overlong { cache, limit }
            }
            ("http" | "https", Some(_)) => {
                let JudgeOptions { timeout, retries, batch, .. } = *options;
                Rule::Http(HttpJudge::new(text, options.rubric(), timeout, retries, batch)?)
            }
            ("judge", Some(model)) if !model.is_empty() => {
                Rule::Model(ModelJudge::new(model, options.rubric(), options.batch))
            }
            ("cmd", Some(program)) if !program.is_empty() => {
                Rule::Program(Program::new(program, options.timeout))
            }
            _ => match Reward::parse(text) {
                Ok(reward) => Rule::Answer(reward),
                // A known rule's own argument: its words say what is wrong with it.
                Err(error) if !matches!(error, Error::Unsupported { what: "reward", .. }) => {
                    return Err(error);
                }
                Err(_) => {
                    let supported = Judge::supported();
                    return Err(Error::Unsupported { what: "reward", got: text.into(), supported });
                }
            },
        })
    }

    fn name(&self) -> &'static str {
        match self {
            Rule::Answer(reward) => reward.name(),
            Rule::Regex(_) => "regex",
            Rule::Boxed | Rule::Think => "format",
            Rule::Overlong { .. } => "overlong",
            Rule::Program(_) => "cmd",
            Rule::Http(_) => "http",
            Rule::Model(_) => "judge",
        }
    }

    /// A verdict for each attempt.
    fn score(&mut self, attempts: &[Attempt<'_>]) -> Result<Vec<Verdict>> {
        match self {
            Rule::Http(http) => http.score(attempts),
            Rule::Model(model) => model.score(attempts),
            _ => attempts.iter().map(|attempt| self.score_one(attempt)).collect(),
        }
    }

    fn score_one(&mut self, attempt: &Attempt<'_>) -> Result<Verdict> {
        let Attempt { opening, text, .. } = *attempt;
        Ok(match self {
            Rule::Http(_) | Rule::Model(_) => self.score(&[*attempt])?.remove(0),
            Rule::Answer(reward) => reward.score(attempt.problem, &begun(reward, opening, text))?,
            Rule::Regex(pattern) => parts::pattern(pattern, attempt.text),
            Rule::Boxed => parts::boxed(&joined(opening, text)),
            Rule::Think => parts::think(&joined(opening, text)),
            Rule::Overlong { cache, limit } => parts::overlong(attempt.tokens, *cache, *limit),
            Rule::Program(program) => program.score(attempt)?,
        })
    }
}

/// The end of a prompt and the completion as one text.
fn joined<'a>(opening: &str, text: &'a str) -> Cow<'a, str> {
    if opening.is_empty() { text.into() } else { format!("{opening}{text}").into() }
}

/// What a rule about answers looks at: with the thoughts that the prompt began, where it leaves thoughts out.
fn begun<'a>(reward: &Reward, opening: &str, text: &'a str) -> Cow<'a, str> {
    if reward.leaves_thoughts_out() { joined(opening, text) } else { text.into() }
}

/// The parts of a specification.
fn split(spec: &str) -> Vec<&str> {
    let mut found = Vec::new();
    let mut rest = spec;
    loop {
        let weighted = rest.split_once('*').filter(|(w, _)| w.trim().parse::<f32>().is_ok());
        let name = weighted.map_or(rest, |(_, name)| name).trim_start();
        let goes_on = ["regex:", "cmd:", "http:", "https:", "judge:"];
        let separator = if goes_on.iter().any(|word| name.starts_with(word)) { " + " } else { "+" };
        match rest.split_once(separator) {
            Some((part, later)) => {
                found.push(part.trim());
                rest = later;
            }
            None => {
                found.push(rest.trim());
                return found;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::Prompt;

    fn options() -> JudgeOptions {
        let timeout = Duration::from_secs(5);
        JudgeOptions { max_response: 100, timeout, rubric: None, retries: 1, batch: 4 }
    }

    #[test]
    fn parts_are_summed_with_their_weights() {
        let problem = Problem {
            id: "1".into(),
            prompt: Prompt::Text("?".into()),
            answer: "42".into(),
            source: "t:1".into(),
            difficulty: None,
            solution_bytes: 0,
        };
        let spec = "boxed+0.5*format + 0.25*regex:a+b + overlong:50+2*regex:^x";
        // The last `+` belongs to no pattern, for `overlong` ends at any.
        let mut judge = Judge::parse(spec, &options()).unwrap();
        let names: Vec<_> = judge.names().collect();
        assert_eq!(names, ["boxed", "format", "regex", "overlong", "regex-2"]);
        let text = "xaab \\boxed{42}";
        let attempt =
            Attempt { problem: &problem, text, opening: "", tokens: 75, truncated: false };
        let judgement = judge.score(&attempt).unwrap();
        assert_eq!(judgement.parts, [1.0, 1.0, 1.0, -0.5, 1.0]);
        assert_eq!(judgement.reward, 1.0 + 0.5 + 0.25 - 0.5 + 2.0);
        assert!(judgement.right && judgement.reason.contains("42"));
        let wrong = Attempt { text: "aab", tokens: 100, ..attempt };
        let judgement = judge.score(&wrong).unwrap();
        assert_eq!((judgement.reward, judgement.right), (0.25 - 1.0, false));
        assert_eq!(judge.answer("", text).as_deref(), Some("42"));
        assert_eq!(judge.answer("", "none"), None);
    }

    #[test]
    fn thoughts_that_the_prompt_began_are_judged_with_the_completion() {
        let problem = Problem {
            id: "1".into(),
            prompt: Prompt::Text("?".into()),
            answer: "8".into(),
            source: "t:1".into(),
            difficulty: None,
            solution_bytes: 0,
        };
        let mut judge = Judge::parse("math + format:think + boxed + format", &options()).unwrap();
        for (opening, text, parts) in [
            ("<think>\n", "\\boxed{7}</think>\\boxed{8}", [1.0, 1.0, 1.0, 1.0]),
            ("<think>\n", "\\boxed{8}", [0.0, 0.0, 0.0, 0.0]),
            ("<think>\n", "<think>a</think>\\boxed{8}", [1.0, 0.0, 1.0, 1.0]),
            ("<think>\n\n</think>\n\n", "\\boxed{8}", [1.0, 1.0, 1.0, 1.0]),
            ("", "\\boxed{7}</think>\\boxed{8}", [1.0, 0.0, 1.0, 1.0]),
            ("", "\\boxed{8}", [1.0, 0.0, 1.0, 1.0]),
        ] {
            let attempt = Attempt { problem: &problem, text, opening, tokens: 9, truncated: false };
            assert_eq!(judge.score(&attempt).unwrap().parts, parts, "{opening:?} {text}");
        }
        assert_eq!(judge.answer("<think>", "\\boxed{8}"), None);
        assert_eq!(judge.answer("<think>", "</think>8").as_deref(), Some("8"));
    }

    #[test]
    fn bad_specifications_are_refused() {
        for (spec, expected) in [
            ("magic", "reward 'magic' is not supported; supported: "),
            ("boxed+", "reward '' is not supported"),
            ("x*boxed", "a number before *, got \"x\""),
            ("inf*boxed", "a number before *"),
            ("regex:(", "a regular expression"),
            ("regex:", "reward 'regex:' is not supported"),
            ("regex:(a{1000}){1000}", "a regular expression"),
            ("overlong:0", "tokens from 1 to --max-response (100), got \"0\""),
            ("overlong:101", "tokens from 1 to --max-response (100)"),
            ("format:shiny", "reward 'format:shiny' is not supported"),
            ("cmd: ", "reward 'cmd:' is not supported"),
            ("judge:", "reward 'judge:' is not supported"),
            ("http:", "a URL that begins with http://, got http:"),
            ("https://a/b + format", "a URL that begins with http://, got https://a/b"),
        ] {
            let error = Judge::parse(spec, &options()).unwrap_err().to_string();
            assert!(error.contains(expected) && !error.contains('\n'), "{spec}: {error}");
        }
    }
}
