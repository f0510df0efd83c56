//! Which columns of a data file hold the prompt, the right answer and the difficulty.

use super::jsonl::{Row, number_text};
use crate::{Error, Result};
use clap::Args;
use serde::{Deserialize, Serialize};
use serde_json::Value;

/// Names of columns; none of a kind means the usual ones, in the order of the constants below. A dot leads
/// into a struct: `reward_model.ground_truth`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Args, Serialize, Deserialize)]
#[serde(default)]
pub struct Columns {
    /// Column of the prompt, text or messages [default: prompt, question, problem, messages, conversations, instruction
    /// with input]; a dot leads into a struct
    #[arg(
        id = "prompt_column",
        long = "prompt-column",
        value_name = "NAME",
        help_heading = "Data and reward"
    )]
    #[serde(rename = "prompt-column", skip_serializing_if = "Option::is_none")]
    pub prompt: Option<String>,
    /// Column of the right answer, text or a number; after #### where the text has it
    /// [default: reward_model.ground_truth, final_answer, answer, solution or output]
    #[arg(
        id = "answer_column",
        long = "answer-column",
        value_name = "NAME",
        help_heading = "Data and reward"
    )]
    #[serde(rename = "answer-column", skip_serializing_if = "Option::is_none")]
    pub answer: Option<String>,
    /// Column of the difficulty, a number or a text [default: difficulty or level]
    #[arg(
        id = "difficulty_column",
        long = "difficulty-column",
        value_name = "NAME",
        help_heading = "Data and reward"
    )]
    #[serde(rename = "difficulty-column", skip_serializing_if = "Option::is_none")]
    pub difficulty: Option<String>,
}

/// Where prompts stand by default.
pub(super) const PROMPTS: [&str; 5] =
    ["prompt", "question", "problem", "messages", "prompt_tokens"];
/// Where answers stand by default: verl's layout, DeepMath, then the plain name.
const ANSWERS: [&str; 6] =
    ["reward_model.ground_truth", "final_answer", "answer", "ground_truth", "solution", "output"];
/// Where difficulties stand by default.
const DIFFICULTIES: [&str; 4] =
    ["difficulty", "level", "extra_info.difficulty", "extra_info.level"];
/// What to do about a row whose value is missing.
const FILL: &str = "fill it in or drop the row";

impl Columns {
    /// Name and value of the row's right answer.
    pub(super) fn answer<'r>(&'r self, row: &'r Row) -> Result<(&'r str, &'r Value)> {
        let advice = match &self.answer {
            Some(_) => "check --answer-column",
            None => "name the column with --answer-column, and give every row its right answer",
        };
        named(row, self.answer.as_deref(), &ANSWERS).ok_or_else(|| {
            if let Some(name) = null(row, self.answer.as_deref(), &ANSWERS) {
                return row.invalid(name, "an answer", "null", FILL);
            }
            let name = self.answer.as_deref().unwrap_or("answer");
            let expected = match &self.answer {
                Some(name) => format!("`{name}`"),
                None => format!("one of {}", ANSWERS.map(|n| format!("`{n}`")).join(", ")),
            };
            row.invalid(name, expected, row.keys(), advice)
        })
    }

    /// The row's difficulty, where it has one.
    ///
    /// # Errors
    /// A column that was named is not there, or holds neither a number nor a text.
    pub(super) fn difficulty(&self, row: &Row) -> Result<Option<String>> {
        match named(row, self.difficulty.as_deref(), &DIFFICULTIES) {
            Some((_, Value::String(text))) => Ok(Some(text.trim().to_owned())),
            Some((_, Value::Number(n))) => Ok(Some(number_text(n))),
            found => match &self.difficulty {
                None => Ok(None),
                Some(name) => {
                    let got = found.map_or_else(|| row.keys(), |(_, v)| super::jsonl::kind(v));
                    Err(row.invalid(name, "a number or a text", got, "check --difficulty-column"))
                }
            },
        }
    }

    /// Name and value of the row's prompt; where the usual columns are looked through, two that
    /// contradict each other are an error.
    pub(super) fn prompt<'r>(&'r self, row: &'r Row) -> Result<(&'r str, &'r Value)> {
        if let Some(name) = self.prompt.as_deref() {
            return row.at(name).map(|value| (name, value)).ok_or_else(|| {
                if row.is_null(name) {
                    return row.invalid(name, "text or messages", "null", FILL);
                }
                row.invalid(name, format!("`{name}`"), row.keys(), "check --prompt-column")
            });
        }
        let found = |name| row.at(name).map(|value| (name, value));
        let mut found = PROMPTS.into_iter().filter_map(found);
        let Some((name, value)) = found.next() else {
            if let Some(name) = null(row, None, &PROMPTS) {
                return Err(row.invalid(name, "text or messages", "null", FILL));
            }
            let expected = "`prompt` (or `question`, `problem`, `messages`, `prompt_tokens`)";
            let advice = "name the column with --prompt-column";
            return Err(row.invalid("prompt", expected, row.keys(), advice));
        };
        // A row of a data set often keeps its bare question beside the finished prompt.
        if let Some((other, _)) = found.find(|(other, _)| *other == "prompt_tokens") {
            let got = format!("both `{name}` and `{other}`");
            return Err(row.invalid(other, "one prompt", got, "keep the one that is meant"));
        }
        Ok((name, value))
    }
}

/// The named column, or the first of the usual ones that the row has.
fn named<'r>(
    row: &'r Row,
    name: Option<&'r str>,
    usual: &[&'static str],
) -> Option<(&'r str, &'r Value)> {
    match name {
        Some(name) => row.at(name).map(|value| (name, value)),
        None => usual.iter().find_map(|&name| row.at(name).map(|value| (name, value))),
    }
}

/// The column that [`named`] would take if it were not null.
fn null<'r>(row: &Row, name: Option<&'r str>, usual: &[&'static str]) -> Option<&'r str> {
    match name {
        Some(name) => Some(name).filter(|name| row.is_null(name)),
        None => usual.iter().copied().find(|name| row.is_null(name)),
    }
}

/// The answer in GSM8K's way of writing: what follows the last `####` that begins a line; else all of it.
pub(super) fn after_hashes(text: &str) -> &str {
    match text.rfind("####") {
        Some(at) if text[..at].is_empty() || text[..at].ends_with('\n') => text[at + 4..].trim(),
        _ => text,
    }
}

/// A difficulty as a number: `3`, `6.5`, or the first number in a text such as `Level 3`.
///
/// # Errors
/// [`Error::Invalid`] where there is no number.
pub fn difficulty_number(difficulty: Option<&str>, place: &str) -> Result<f64> {
    let text = difficulty.unwrap_or_default();
    let start = text.find(|c: char| c.is_ascii_digit()).unwrap_or(text.len());
    let digits = &text[start..];
    let end = digits.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(digits.len());
    let negative = text[..start].ends_with('-');
    let number = digits[..end].trim_end_matches('.').parse::<f64>();
    number.map(|n| if negative { -n } else { n }).map_err(|_| {
        let got = if text.is_empty() { "none".into() } else { format!("{text:?}") };
        let advice = "name the column with --difficulty-column, or leave --curriculum out";
        Error::invalid(format!("{place}: difficulty"), "a number in it", got, advice)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn gsm8k_answers_stand_after_the_hashes() {
        for (text, answer) in [
            ("2+2=4\nso 4\n#### 4", "4"),
            ("#### 1,000 ", "1,000"),
            ("a #### b", "a #### b"),
            ("plain", "plain"),
        ] {
            assert_eq!(after_hashes(text), answer);
        }
    }

    #[test]
    fn difficulties_are_numbers_in_texts() {
        for (text, number) in [("3", 3.0), ("6.5", 6.5), ("Level 4", 4.0), ("-1.0", -1.0)] {
            assert_eq!(difficulty_number(Some(text), "d").unwrap(), number);
        }
        for text in [None, Some(""), Some("hard")] {
            let error = difficulty_number(text, "d.jsonl:3").unwrap_err().to_string();
            assert!(error.starts_with("d.jsonl:3: difficulty: expected a number in it"), "{error}");
        }
    }
}
