//! What judges that are models are asked, and the score in what they say.

use super::{Attempt, Verdict};
use crate::data::Prompt;
use crate::data::jsonl::shorten;

/// Scores go from 0 to this.
const MOST: f32 = 10.0;
/// The question where nobody gives another.
pub(super) const DEFAULT: &str = "You judge an answer to a task.\n\nTask:\n{prompt}\n\nReference answer:\n{answer}\n\n\
    Answer to judge:\n{completion}\n\nHow good is it? Compare it with the reference. End with one line, from 0 (useless) to \
    10 (perfect):\nScore: N";

/// The question about an attempt.
pub(super) fn question(rubric: &str, attempt: &Attempt<'_>) -> String {
    let asked = match &attempt.problem.prompt {
        Prompt::Text(text) => text.clone(),
        Prompt::Messages(messages) => {
            let lines = messages.iter().map(|m| format!("{}: {}", m.role, m.content));
            lines.collect::<Vec<_>>().join("\n")
        }
        Prompt::Tokens(_) => attempt.problem.source.clone(),
    };
    // In one pass: what stands in an answer is no placeholder.
    let (mut out, mut rest) = (String::new(), rubric);
    while let Some(at) = rest.find('{') {
        out += &rest[..at];
        rest = &rest[at..];
        let known = [
            ("{prompt}", asked.as_str()),
            ("{answer}", attempt.problem.answer.as_str()),
            ("{completion}", attempt.text),
        ];
        match known.iter().find(|(name, _)| rest.starts_with(name)) {
            Some((name, text)) => {
                out += text;
                rest = &rest[name.len()..];
            }
            None => {
                out.push('{');
                rest = &rest[1..];
            }
        }
    }
    out + rest
}

/// The verdict in what a judge says: the number behind the last "score", else its last number; none where there is no
/// number from 0 to 10.
pub(super) fn verdict(said: &str) -> Option<Verdict> {
    let lower = said.to_lowercase();
    let scored = lower.rfind("score").and_then(|at| numbers(&lower[at..]).next());
    let score = scored.or_else(|| numbers(&lower).last())?;
    let last = said.trim().lines().next_back().unwrap_or_default().trim();
    (0.0..=MOST).contains(&score).then(|| Verdict {
        reward: score / MOST,
        reason: format!("{score} of {MOST}: {}", shorten(last, 200)),
    })
}

/// The numbers in a text; of "8/10" the 8 alone.
fn numbers(text: &str) -> impl Iterator<Item = f32> {
    let plain = text.replace("/10", " ");
    let words = plain.split(|c: char| !c.is_ascii_digit() && c != '.').map(str::to_owned);
    let found = words.filter_map(|word| word.trim_matches('.').parse::<f32>().ok());
    found.collect::<Vec<_>>().into_iter()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::Problem;

    #[test]
    fn scores_are_found() {
        for (said, reward) in [
            ("Score: 7", Some(0.7)),
            ("score: 10/10.", Some(1.0)),
            ("It has 3 faults.\n**Score:** 4.5", Some(0.45)),
            ("8/10", Some(0.8)),
            ("0", Some(0.0)),
            ("Score: 11", None),
            ("good", None),
            ("", None),
        ] {
            assert_eq!(verdict(said).map(|v| v.reward), reward, "{said}");
        }
    }

    #[test]
    fn what_stands_in_an_answer_is_no_placeholder() {
        let problem = Problem {
            id: "1".into(),
            prompt: Prompt::Text("{answer}?".into()),
            answer: "42".into(),
            source: "t:1".into(),
            difficulty: None,
            solution_bytes: 0,
        };
        let text = "{prompt} {x}";
        let attempt = Attempt { problem: &problem, text, opening: "", tokens: 1, truncated: false };
        let asked = question("{prompt} | {answer} | {completion} | {y}", &attempt);
        assert_eq!(asked, "{answer}? | 42 | {prompt} {x} | {y}");
    }
}
