//! Rows to learn from without sampling: completions to imitate, pairs of which one is preferred, labelled completions.
//!
//! ```json
//! {"prompt": .., "completion": ..}  {"messages": [.., {"role": "assistant", ..}], "tools": [..]}  {"text": ..}
//! {"prompt_tokens": [..], "completions": [{"tokens": [..]}, ..]}
//! {"prompt": .., "chosen": .., "rejected": ..}
//! {"prompt_tokens": [..], "chosen_tokens": [..], "rejected_tokens": [..]}
//! {"prompt": .., "completion": .., "label": true}
//! ```
//!
//! A prompt is text, messages or token ids, as everywhere. A completion is text, or messages of which the last is the
//! assistant's; `chosen` and `rejected` may be whole conversations, then what they have in common is the prompt.
//! A `weight` beside any of them scales what the row counts. Every error names the row and the column.

use std::path::Path;

use serde_json::Value;

use super::{
    Chat, Columns, CompletionContent, Message, Prompt, calling,
    jsonl::{Row, kind},
    rows::{completion, finite, message, prompt, tokens},
    table,
};
use crate::Result;

/// What rows are read for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ExampleKind {
    /// Completions, conversations or texts to imitate.
    Imitation,
    /// Pairs, the preferred one first.
    Pairs,
    /// Completions with a label.
    Labelled,
    /// Prompts, with completions or without.
    Contexts,
}

/// What a row holds.
#[derive(Clone, Debug, PartialEq)]
pub enum Example {
    /// Text, all of which is to be imitated.
    Text(String),
    /// A conversation, of which the assistant's turns are.
    Conversation(Chat),
    /// A prompt and what may follow it; of a pair the preferred completion and the other one.
    Completions(Prompt, Vec<CompletionContent>),
}

/// A row and what is known of it.
#[derive(Clone, Debug, PartialEq)]
pub struct ExampleRow {
    /// `train.jsonl:12`, for messages.
    pub place: String,
    /// What it holds.
    pub example: Example,
    /// What it counts beside others, above 0; 1 where none is written.
    pub weight: f32,
    /// Whether its completion is wanted, of labelled rows.
    pub label: Option<bool>,
}

/// The rows of a data file (JSON lines, Parquet, CSV), one at a time; after a row that is wrong the next one follows.
///
/// # Errors
/// The file cannot be read.
pub fn examples<'c>(
    path: &Path,
    kind: ExampleKind,
    columns: &'c Columns,
) -> Result<impl Iterator<Item = Result<ExampleRow>> + use<'c>> {
    Ok(table::open(path)?.map(move |row| read(&row?, kind, columns)))
}

fn read(row: &Row, kind: ExampleKind, columns: &Columns) -> Result<ExampleRow> {
    let mut label = None;
    if kind != ExampleKind::Imitation {
        calling::refuse_tools(row)?;
    }
    let example = match kind {
        ExampleKind::Imitation => imitation(row, columns)?,
        ExampleKind::Contexts => contexts(row, columns)?,
        ExampleKind::Pairs => pair(row, columns)?,
        ExampleKind::Labelled => {
            label = Some(read_label(row)?);
            contexts(row, columns)?
        }
    };
    if let (ExampleKind::Labelled, Example::Completions(_, none)) = (kind, &example)
        && none.is_empty()
    {
        return Err(missing(row, "completion", "`completion`"));
    }
    let weight = row.get("weight").map(|w| finite(row, "weight", w)).transpose()?.unwrap_or(1.0);
    if weight <= 0.0 {
        let advice = "drop the row, or leave the weight out";
        return Err(row.invalid("weight", "a weight above 0", weight.to_string(), advice));
    }
    Ok(ExampleRow { place: row.place.clone(), example, weight, label })
}

fn missing(row: &Row, name: &str, expected: &str) -> crate::Error {
    row.invalid(name, expected, row.keys(), "see train --help for the rows of each --algo")
}

fn imitation(row: &Row, columns: &Columns) -> Result<Example> {
    if let Some(wrong) =
        ["chosen", "chosen_tokens", "rejected"].into_iter().find(|n| row.get(n).is_some())
    {
        let advice = "these are rows of --algo dpo";
        return Err(row.invalid(wrong, "`completion`, `messages` or `text`", row.keys(), advice));
    }
    if let Some(value) = row.get("messages") {
        return Ok(Example::Conversation(calling::chat(row, value)?));
    }
    calling::refuse_tools(row)?;
    if let (Some(value), None) = (row.get("text"), row.get("completion")) {
        return match value {
            Value::String(text) if !text.is_empty() => Ok(Example::Text(text.clone())),
            other => Err(row.invalid("text", "text, not empty", got(other), "drop the row")),
        };
    }
    match contexts(row, columns)? {
        Example::Completions(_, none) if none.is_empty() => {
            Err(missing(row, "completion", "`completion`, `completions`, `messages` or `text`"))
        }
        example => Ok(example),
    }
}

/// A conversation in plain text with an answer in it.
fn conversation(row: &Row, name: &str, value: &Value) -> Result<Vec<Message>> {
    let one = |(j, value)| message(row, &format!("{name}[{j}]"), value);
    let messages: Vec<Message> =
        calling::listed(row, name, value)?.iter().enumerate().map(one).collect::<Result<_>>()?;
    if !messages.iter().any(|m| m.role == "assistant" && !m.content.is_empty()) {
        return Err(calling::unanswered(row, name, messages.iter().map(|m| m.role.as_str())));
    }
    Ok(messages)
}

/// A prompt with the completions that the row has, or none.
fn contexts(row: &Row, columns: &Columns) -> Result<Example> {
    let given = match (row.get("completion"), row.get("completions")) {
        (Some(_), Some(_)) => {
            let advice = "keep the one that holds the data";
            return Err(row.invalid("completion", "it or `completions`", "both", advice));
        }
        (Some(value), None) => vec![content(row, "completion", value)?],
        (None, Some(Value::Array(list))) => {
            let one = |(j, item): (usize, &Value)| match item.as_object() {
                Some(object) => Ok(completion(row, object, &format!("completions[{j}]."))?.content),
                None => content(row, &format!("completions[{j}]"), item),
            };
            list.iter().enumerate().map(one).collect::<Result<_>>()?
        }
        (None, Some(other)) => {
            return Err(row.invalid("completions", "a list", kind(other), "write [{..}, ..]"));
        }
        (None, None) => Vec::new(),
    };
    Ok(Example::Completions(prompt(row, columns)?, given))
}

/// Text, or messages of which the last is the assistant's.
fn content(row: &Row, name: &str, value: &Value) -> Result<CompletionContent> {
    match value {
        Value::String(text) if !text.is_empty() => Ok(CompletionContent::Text(text.clone())),
        Value::Array(list) if !list.is_empty() => {
            let messages = conversation(row, name, value)?;
            let last = messages.into_iter().last().expect("not empty");
            if last.role != "assistant" || last.content.is_empty() {
                let advice = "end it with what the assistant says";
                return Err(row.invalid(name, "an answer of the assistant", last.role, advice));
            }
            Ok(CompletionContent::Text(last.content))
        }
        other => {
            Err(row.invalid(name, "text, not empty", got(other), "fill it in or drop the row"))
        }
    }
}

fn got(value: &Value) -> String {
    match value {
        Value::String(text) if text.is_empty() => "empty text".into(),
        other => kind(other),
    }
}

fn pair(row: &Row, columns: &Columns) -> Result<Example> {
    let side = |name: &str| -> Result<CompletionContent> {
        let ids = format!("{name}_tokens");
        match (row.get(name), row.get(&ids)) {
            (Some(value), None) => content(row, name, value),
            (None, Some(list)) => Ok(CompletionContent::Tokens(tokens(row, &ids, list)?)),
            (Some(_), Some(_)) => {
                let expected = format!("it or `{ids}`");
                Err(row.invalid(name, expected, "both", "keep the one that holds the data"))
            }
            (None, None) => Err(missing(row, name, &format!("`{name}` or `{ids}`"))),
        }
    };
    let (chosen, rejected) = (side("chosen")?, side("rejected")?);
    if chosen == rejected {
        let advice = "drop the row: equal completions teach no preference";
        return Err(row.invalid(
            "rejected",
            "another completion than `chosen`",
            "the same",
            advice,
        ));
    }
    let has_prompt =
        ["prompt_tokens", "prompt", "question", "problem"].iter().any(|n| row.get(n).is_some())
            || columns.prompt.is_some();
    let prompt = match has_prompt {
        true => prompt(row, columns)?,
        false => common_prompt(row)?,
    };
    Ok(Example::Completions(prompt, vec![chosen, rejected]))
}

/// The messages before the last one, which two conversations have in common.
fn common_prompt(row: &Row) -> Result<Prompt> {
    let whole = |name: &str| match row.get(name) {
        Some(value @ Value::Array(list)) if list.len() > 1 => conversation(row, name, value),
        _ => Err(missing(
            row,
            "prompt",
            "`prompt`, or whole conversations in `chosen` and `rejected`",
        )),
    };
    let (mut chosen, mut rejected) = (whole("chosen")?, whole("rejected")?);
    chosen.pop();
    rejected.pop();
    if chosen != rejected {
        let advice = "a pair has one prompt: give it as `prompt`";
        return Err(row.invalid("rejected", "the prompt of `chosen`", "another one", advice));
    }
    Ok(Prompt::Messages(chosen))
}

fn read_label(row: &Row) -> Result<bool> {
    match row.get("label") {
        Some(Value::Bool(label)) => Ok(*label),
        Some(Value::Number(n)) if n.as_f64() == Some(1.0) => Ok(true),
        Some(Value::Number(n)) if n.as_f64() == Some(0.0) => Ok(false),
        // CSV has texts.
        Some(Value::String(text)) if text.eq_ignore_ascii_case("true") => Ok(true),
        Some(Value::String(text)) if text.eq_ignore_ascii_case("false") => Ok(false),
        Some(other) => {
            let advice = "true where the completion is wanted, false where it is not";
            Err(row.invalid("label", "true or false", got(other), advice))
        }
        None => Err(missing(row, "label", "`label`, true or false")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    fn one(text: &str, kind: ExampleKind) -> Result<ExampleRow> {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        file.write_all(text.as_bytes()).unwrap();
        let columns = Columns::default();
        examples(file.path(), kind, &columns)?.next().expect("a row")
    }

    fn text(text: &str) -> CompletionContent {
        CompletionContent::Text(text.into())
    }

    #[test]
    fn every_form_of_each_kind_is_read() {
        use ExampleKind::*;
        let read = |line: &str, kind| one(line, kind).unwrap();
        let row = read(r#"{"prompt": "a", "completion": "b", "weight": 0.5}"#, Imitation);
        assert_eq!(row.example, Example::Completions(Prompt::Text("a".into()), vec![text("b")]));
        assert_eq!((row.weight, row.label), (0.5, None));
        let row = read(r#"{"text": "all of it"}"#, Imitation);
        assert_eq!(row.example, Example::Text("all of it".into()));
        let talk = r#"[{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]"#;
        let row = read(&format!(r#"{{"messages": {talk}}}"#), Imitation);
        assert!(matches!(row.example, Example::Conversation(c) if c.messages.len() == 2));
        let row = read(
            r#"{"prompt_tokens": [1], "completions": [{"tokens": [2, 3]}, {"tokens": [4]}]}"#,
            Imitation,
        );
        let Example::Completions(prompt, all) = row.example else { panic!("{row:?}") };
        assert_eq!((prompt, all.len()), (Prompt::Tokens(vec![1]), 2));
        let row =
            read(r#"{"prompt_tokens": [1], "chosen_tokens": [2], "rejected_tokens": [3]}"#, Pairs);
        let sides = [[2], [3]].map(|t| CompletionContent::Tokens(t.to_vec())).to_vec();
        assert_eq!(row.example, Example::Completions(Prompt::Tokens(vec![1]), sides));
        // Whole conversations share what is before their last turn.
        let other = talk.replace(r#""b""#, r#""c""#);
        let row = read(&format!(r#"{{"chosen": {talk}, "rejected": {other}}}"#), Pairs);
        let asked = Prompt::Messages(vec![Message::user("a")]);
        assert_eq!(row.example, Example::Completions(asked, vec![text("b"), text("c")]));
        let row = read(r#"{"prompt": "a", "completion": "b", "label": false}"#, Labelled);
        assert_eq!(row.label, Some(false));
        let row = read(r#"{"prompt": "only asked"}"#, Contexts);
        assert!(matches!(row.example, Example::Completions(_, none) if none.is_empty()));
    }

    #[test]
    fn wrong_rows_are_named_by_row_and_column() {
        use ExampleKind::*;
        for (line, kind, expected) in [
            (
                r#"{"prompt": "a", "chosen": "b", "rejected": "c"}"#,
                Imitation,
                "`chosen`: expected `completion`",
            ),
            (r#"{"prompt": "a"}"#, Imitation, "`completion`: expected `completion`, `completions`"),
            (r#"{"text": ""}"#, Imitation, "`text`: expected text, not empty, got empty text"),
            (
                r#"{"prompt": "a", "completion": ""}"#,
                Imitation,
                "`completion`: expected text, not empty",
            ),
            (
                r#"{"messages": [{"role": "user", "content": "a"}]}"#,
                Imitation,
                "`messages`: expected a turn of the assistant",
            ),
            (r#"{"messages": [{"role": "user"}]}"#, Imitation, "`messages[0]`: expected an object"),
            (
                r#"{"prompt": "a", "completion": "b", "weight": 0}"#,
                Imitation,
                "`weight`: expected a weight above 0",
            ),
            (
                r#"{"prompt": "a", "completion": "b"}"#,
                Pairs,
                "`chosen`: expected `chosen` or `chosen_tokens`",
            ),
            (
                r#"{"prompt": "a", "chosen": "", "rejected": "c"}"#,
                Pairs,
                "`chosen`: expected text, not empty",
            ),
            (
                r#"{"prompt": "a", "chosen": "b", "rejected": ""}"#,
                Pairs,
                "`rejected`: expected text, not empty",
            ),
            (
                r#"{"prompt": "a", "chosen": "b", "rejected": "b"}"#,
                Pairs,
                "`rejected`: expected another completion",
            ),
            (r#"{"chosen": "b", "rejected": "c"}"#, Pairs, "`prompt`: expected `prompt`, or whole"),
            (
                r#"{"prompt_tokens": [1], "chosen_tokens": [], "rejected_tokens": [2]}"#,
                Pairs,
                "`chosen_tokens`: expected a list, not empty",
            ),
            (r#"{"prompt": "a", "completion": "b"}"#, Labelled, "`label`: expected `label`"),
            (
                r#"{"prompt": "a", "completion": "b", "label": 3}"#,
                Labelled,
                "`label`: expected true or false",
            ),
            (r#"{"prompt": "a", "label": true}"#, Labelled, "`completion`: expected `completion`"),
        ] {
            let error = one(line, kind).unwrap_err().to_string();
            assert!(error.contains(":1: ") && error.contains(expected), "{line}: {error}");
            assert!(!error.contains('\n'), "{error}");
        }
    }
}
