//! What a row means: a problem, or a prompt with its completions.
//!
//! Problems: `{"prompt": "..." | [{"role": .., "content": ..}], "answer": ..}`, an `id` is kept; other names
//! of columns, verl's among them, see [`Columns`]. Rollouts, text or token ids, see [`rollouts`]:
//!
//! ```json
//! {"prompt": "..." | [{"role": .., "content": ..}], "completion": "..."}
//! {"prompt_tokens": [..], "completions": [{"tokens": [..], "reward": 1.0, "old_logprobs": [..]}, ..]}
//! ```

use std::path::Path;

use serde_json::{Map, Value};

use super::{
    Columns, CompletionContent, Message, Problem, Prompt, RolloutCompletion, RolloutRow, columns,
    jsonl::{Row, kind, number_text},
    table,
};
use crate::{Error, Result};

/// All problems of a data file (JSON lines, Parquet, CSV), at least one.
pub fn read_problems(path: &Path, columns: &Columns) -> Result<Vec<Problem>> {
    let rows = table::open(path)?.map(|row| problem(&row?, columns)).collect::<Result<_>>()?;
    not_empty(path, rows)
}

/// All rollout rows of a data file, at least one.
pub fn read_rollouts(path: &Path) -> Result<Vec<RolloutRow>> {
    not_empty(path, rollouts(path)?.collect::<Result<_>>()?)
}

/// The rollout rows of a data file (JSON lines, Parquet, CSV), one at a time.
///
/// A row has one of `prompt`, `question`, `problem` and `prompt_tokens`, and either `completion` (text;
/// `reward` beside it), or `completions`, objects with `tokens` or `completion` (text), `reward` and
/// `old_logprobs`, or neither. Other fields are ignored.
pub fn rollouts(path: &Path) -> Result<impl Iterator<Item = Result<RolloutRow>> + use<>> {
    Ok(table::open(path)?.map(|row| rollout(&row?)))
}

fn not_empty<T>(path: &Path, rows: Vec<T>) -> Result<Vec<T>> {
    if rows.is_empty() {
        let place = path.display().to_string();
        return Err(Error::invalid(place, "at least one row", "none", "give a file that has rows"));
    }
    Ok(rows)
}

fn problem(row: &Row, columns: &Columns) -> Result<Problem> {
    let prompt = prompt(row, columns)?;
    let (name, answer) = columns.answer(row)?;
    let whole = scalar(row, name, answer)?;
    let answer = columns::after_hashes(&whole);
    if answer.trim().is_empty() {
        return Err(row.invalid(name, "an answer", "empty text", "fill it in or drop the row"));
    }
    let id = row.get("id").map(|id| scalar(row, "id", id)).transpose()?;
    let source = row.place.clone();
    let beside = row.get("solution").and_then(Value::as_str).map_or(0, str::len);
    let before = if answer.len() < whole.trim().len() { whole.len() } else { 0 };
    Ok(Problem {
        solution_bytes: beside.max(before),
        id: id.unwrap_or_else(|| source.clone()),
        prompt,
        answer: answer.into(),
        source,
        difficulty: columns.difficulty(row)?,
    })
}

fn rollout(row: &Row) -> Result<RolloutRow> {
    let completions = match (row.get("completion"), row.get("completions")) {
        (Some(_), Some(_)) => {
            let advice = "keep the one that holds the data";
            return Err(row.invalid("completion", "it or `completions`", "both", advice));
        }
        (Some(_), None) => vec![completion(row, &row.object, "")?],
        (None, Some(list)) => {
            let list = list.as_array().ok_or_else(|| {
                row.invalid("completions", "a list of objects", kind(list), "write [{..}, ..]")
            })?;
            let one = |(j, item): (usize, &Value)| {
                let object = item.as_object().ok_or_else(|| {
                    let name = format!("completions[{j}]");
                    row.invalid(&name, "an object", kind(item), "write {\"tokens\": [..]}")
                })?;
                completion(row, object, &format!("completions[{j}]."))
            };
            list.iter().enumerate().map(one).collect::<Result<_>>()?
        }
        (None, None) => vec![],
    };
    let usual = columns::PROMPTS;
    if !usual.iter().any(|name| row.object.contains_key(*name)) {
        // The commands that read such rows have no option for it.
        let expected = format!("one of {}", usual.map(|n| format!("`{n}`")).join(", "));
        return Err(row.invalid("prompt", expected, row.keys(), "rename the prompt's column"));
    }
    Ok(RolloutRow { prompt: prompt(row, &Columns::default())?, completions, line: row.line })
}

/// One completion's object, whose fields are called `prefix` + name in messages.
pub(super) fn completion(
    row: &Row,
    object: &Map<String, Value>,
    prefix: &str,
) -> Result<RolloutCompletion> {
    let field = |name: &str| object.get(name).filter(|value| !value.is_null());
    let name_of = |name: &str| format!("{prefix}{name}");
    let content = match (field("tokens"), field("completion")) {
        (Some(list), None) => CompletionContent::Tokens(tokens(row, &name_of("tokens"), list)?),
        (None, Some(Value::String(text))) if !text.is_empty() => {
            CompletionContent::Text(text.clone())
        }
        (None, Some(other)) => {
            let (name, advice) = (name_of("completion"), "give it as text, or as `tokens`");
            return Err(row.invalid(&name, "text, not empty", kind(other), advice));
        }
        (found, _) => {
            let got = if found.is_some() { "both" } else { "neither" };
            let name = name_of("tokens");
            return Err(row.invalid(&name, "it or `completion`", got, "give one of them"));
        }
    };
    let reward = field("reward").map(|v| finite(row, &name_of("reward"), v)).transpose()?;
    let old_logprobs = field("old_logprobs")
        .map(|list| logprobs(row, &name_of("old_logprobs"), list, &content))
        .transpose()?;
    Ok(RolloutCompletion { content, reward, old_logprobs })
}

pub(super) fn prompt(row: &Row, columns: &Columns) -> Result<Prompt> {
    let (name, value) = columns.prompt(row)?;
    match value {
        _ if name == "prompt_tokens" => Ok(Prompt::Tokens(tokens(row, name, value)?)),
        Value::String(text) => Ok(Prompt::Text(text.clone())),
        Value::Array(list) if !list.is_empty() => {
            let one = |(j, value)| message(row, &format!("{name}[{j}]"), value);
            let mut messages: Vec<Message> =
                list.iter().enumerate().map(one).collect::<Result<_>>()?;
            // A whole conversation: what is asked ends before the answer.
            while name == "messages" && messages.last().is_some_and(|m| m.role == "assistant") {
                messages.pop();
            }
            if messages.is_empty() {
                let advice = "begin it with what the user says";
                return Err(row.invalid(name, "a message before the answer", "none", advice));
            }
            Ok(Prompt::Messages(messages))
        }
        other => {
            let advice = "write a prompt as \"..\" or [{\"role\": \"user\", \"content\": \"..\"}]";
            Err(row.invalid(name, "text or messages", kind(other), advice))
        }
    }
}

pub(super) fn message(row: &Row, name: &str, value: &Value) -> Result<Message> {
    let text = |field| value.get(field).and_then(Value::as_str).map(str::to_owned);
    let calls = value.get("tool_calls").and_then(Value::as_array);
    if calls.is_some_and(|calls| !calls.is_empty()) {
        let advice = "calls of tools are read in `messages` with --algo sft, or made with --env";
        return Err(row.invalid(name, "plain text", "`tool_calls`", advice));
    }
    match (text("role"), text("content")) {
        (Some(role), Some(content)) => Ok(Message { role, content }),
        _ => {
            let expected = "an object with the texts `role` and `content`";
            Err(row.invalid(name, expected, fields(value), "only plain text messages are read"))
        }
    }
}

/// The fields of an object with their kinds, or what else it is, for messages.
pub(super) fn fields(value: &Value) -> String {
    match value.as_object() {
        Some(o) => {
            let fields = o.iter().take(8).map(|(k, v)| format!("`{k}`: {}", kind(v)));
            format!("{{{}}}", fields.collect::<Vec<_>>().join(", "))
        }
        None => kind(value),
    }
}

/// A text, or a number that JSON did not round.
fn scalar(row: &Row, name: &str, value: &Value) -> Result<String> {
    const EXACT: f64 = (1u64 << 53) as f64;
    match value {
        // The same number as pandas writes it to CSV.
        Value::String(text) if row.untyped && is_whole_double(text) => {
            Ok(text[..text.len() - 2].to_owned())
        }
        Value::String(text) => Ok(text.clone()),
        Value::Number(n) if !n.is_f64() || n.as_f64().is_some_and(|x| x.abs() < EXACT) => {
            Ok(number_text(n))
        }
        other => {
            let advice = "write it as text, in quotes";
            Err(row.invalid(name, "text or a number below 2^53", kind(other), advice))
        }
    }
}

/// `18.0`, `-3.0`: a double without a fraction, as Python writes it.
fn is_whole_double(text: &str) -> bool {
    let digits = text.strip_prefix('-').unwrap_or(text).strip_suffix(".0");
    digits.is_some_and(|d| !d.is_empty() && d.bytes().all(|b| b.is_ascii_digit()))
}

fn list<'a>(row: &Row, name: &str, value: &'a Value) -> Result<&'a [Value]> {
    match value.as_array() {
        Some(list) if !list.is_empty() => Ok(list),
        _ => Err(row.invalid(name, "a list, not empty", kind(value), "write [1, 2, ..]")),
    }
}

pub(super) fn tokens(row: &Row, name: &str, value: &Value) -> Result<Vec<i32>> {
    let id = |(t, value): (usize, &Value)| {
        let id = value.as_i64().and_then(|id| i32::try_from(id).ok()).filter(|id| *id >= 0);
        id.ok_or_else(|| {
            let (name, advice) = (format!("{name}[{t}]"), "use ids of the model's vocabulary");
            row.invalid(&name, "a token id", kind(value), advice)
        })
    };
    list(row, name, value)?.iter().enumerate().map(id).collect()
}

pub(super) fn finite(row: &Row, name: &str, value: &Value) -> Result<f32> {
    let number = value.as_f64().map(|x| x as f32).filter(|x| x.is_finite());
    number.ok_or_else(|| {
        row.invalid(name, "a finite number", kind(value), "drop the row or mend the figure")
    })
}

fn logprobs(row: &Row, name: &str, value: &Value, content: &CompletionContent) -> Result<Vec<f32>> {
    let CompletionContent::Tokens(tokens) = content else {
        let advice = "give the completion as `tokens`, so that both are counted alike";
        return Err(row.invalid(name, "it beside `tokens`", "it beside text", advice));
    };
    let values = list(row, name, value)?;
    if values.len() != tokens.len() {
        let expected = format!("{} log-probabilities, one per token", tokens.len());
        let advice = "cut both to the same tokens";
        return Err(row.invalid(name, expected, values.len().to_string(), advice));
    }
    // Not bounded by 0: checks against other trainers perturb them to move the ratio.
    let one = |(t, value): (usize, &Value)| finite(row, &format!("{name}[{t}]"), value);
    values.iter().enumerate().map(one).collect()
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    fn file(text: &str) -> tempfile::NamedTempFile {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        file.write_all(text.as_bytes()).unwrap();
        file
    }

    fn problems(text: &str) -> Result<Vec<Problem>> {
        read_problems(file(text).path(), &Columns::default())
    }

    fn rows(text: &str) -> Result<Vec<RolloutRow>> {
        read_rollouts(file(text).path())
    }

    #[test]
    fn problems_from_text_messages_and_questions() {
        let got = problems(concat!(
            r#"{"prompt": "1+1=", "question": "?", "answer": "2", "id": 7}"#,
            "\n\n",
            r#"{"prompt": [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}], "answer": 18}"#,
            "\n",
            r#"{"question": "a half?", "answer": 0.5, "other": [1]}"#,
        ))
        .unwrap();
        assert_eq!((got[0].id.as_str(), got[0].answer.as_str()), ("7", "2"));
        assert_eq!(got[0].prompt, Prompt::Text("1+1=".into()));
        let Prompt::Messages(messages) = &got[1].prompt else { panic!("{:?}", got[1]) };
        assert_eq!((messages.len(), messages[1].content.as_str()), (2, "u"));
        assert_eq!(got[1].answer, "18");
        assert_eq!((got[2].answer.as_str(), &got[2].id), ("0.5", &got[2].source));
        assert!(got[2].source.ends_with(":4"), "{}", got[2].source);
    }

    #[test]
    fn a_whole_number_that_became_a_double_is_whole() {
        for (json, text) in [
            ("18.0", "18"),
            ("-3.0", "-3"),
            ("-0.0", "0"),
            ("12.50", "12.5"),
            ("123456789012.0", "123456789012"),
            ("1e3", "1000"),
            ("\"18.0\"", "18.0"),
        ] {
            let got = problems(&format!(r#"{{"prompt": "a", "answer": {json}, "level": 3.0}}"#));
            let got = got.unwrap().remove(0);
            assert_eq!((&*got.answer, got.difficulty.as_deref()), (text, Some("3")), "{json}");
        }
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("pandas.csv");
        std::fs::write(&path, "question,answer\na,18.0\nb,1.5\nc,v2.0\nd,.0\n").unwrap();
        let got = read_problems(&path, &Columns::default()).unwrap();
        let answers: Vec<_> = got.iter().map(|p| &*p.answer).collect();
        assert_eq!(answers, ["18", "1.5", "v2.0", ".0"]);
        std::fs::write(&path, "question,answer\na,1\n,2\n").unwrap();
        let error = read_problems(&path, &Columns::default()).unwrap_err().to_string();
        assert!(
            error.contains("row 2: `question`: expected text or messages, got null"),
            "{error}"
        );
        // A completion is what was said.
        std::fs::write(&path, "prompt,completion\na,18.0\n").unwrap();
        let got = read_rollouts(&path).unwrap();
        assert_eq!(got[0].completions[0].content, CompletionContent::Text("18.0".into()));
    }

    #[test]
    fn compressed_rows_are_read() {
        let dir = tempfile::tempdir().unwrap();
        let gzip = |text: &str| {
            let mut out = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
            out.write_all(text.as_bytes()).unwrap();
            out.finish().unwrap()
        };
        let jsonl = "{\"prompt\": \"a\", \"answer\": 2}\n";
        let csv = "prompt,answer\na,2\n";
        let zstd = |text: &str| zstd::encode_all(text.as_bytes(), 0).unwrap();
        for (name, bytes) in [
            ("a.jsonl.gz", gzip(jsonl)),
            ("a.gz", gzip(jsonl)),
            ("a.jsonl", gzip(jsonl)),
            ("a.jsonl.zst", zstd(jsonl)),
            ("a.csv.gz", gzip(csv)),
            ("A.CSV.ZST", zstd(csv)),
            ("a.tsv.gz", gzip(&csv.replace(',', "\t"))),
        ] {
            let path = dir.path().join(name);
            std::fs::write(&path, bytes).unwrap();
            let got = read_problems(&path, &Columns::default()).unwrap();
            assert_eq!((got.len(), &*got[0].answer), (1, "2"), "{name}");
        }
        let path = dir.path().join("cut.jsonl.gz");
        std::fs::write(&path, &gzip(&jsonl.repeat(1000))[..40]).unwrap();
        let error = read_problems(&path, &Columns::default()).unwrap_err().to_string();
        assert!(error.contains("cut.jsonl.gz") && !error.contains('\n'), "{error}");
    }

    #[test]
    fn bad_problems_are_named() {
        for (text, expected) in [
            ("", "expected at least one row, got none"),
            ("\n \n", "expected at least one row, got none"),
            (r#"{"answer": 1}"#, ":1: `prompt`: expected `prompt` (or"),
            (
                "\n{\"prompt\": \"a\"}",
                ":2: `answer`: expected one of `reward_model.ground_truth`, ",
            ),
            ("{\"prompt\": \"a\", \"extra\": {\"x\": 1}}", "got prompt, extra.x; name the column"),
            (r#"{"prompt": "a", "answer": " "}"#, "`answer`: expected an answer, got empty text"),
            (r#"{"prompt": "a", "answer": true}"#, "`answer`: expected text or a number below"),
            (r#"{"prompt": "a", "answer": 1e30}"#, "write it as text"),
            (r#"{"prompt": [], "answer": 1}"#, "expected text or messages, got a list of 0"),
            (r#"{"prompt": [{"role": "user"}], "answer": 1}"#, "`prompt[0]`: expected an object"),
            (r#"{"prompt": [3], "answer": 1}"#, "`prompt[0]`: expected an object with the texts"),
            (r#"{"prompt": null, "answer": 1}"#, "`prompt`: expected text or messages, got null;"),
            (
                r#"{"problem": null, "answer": 1}"#,
                "`problem`: expected text or messages, got null;",
            ),
            (r#"{"prompt": "a", "answer": null}"#, "`answer`: expected an answer, got null; fill"),
            (
                r#"{"prompt": "a", "reward_model": {"ground_truth": null}}"#,
                "`reward_model.ground_truth`: expected an answer, got null",
            ),
            (r#"{"prompt": "a", "answer": NaN}"#, "got NaN at column 27; JSON has no such value"),
            (r#"{"prompt": "a", "answer": [-Infinity]}"#, "got -Infinity at column"),
        ] {
            let error = problems(text).unwrap_err().to_string();
            assert!(error.contains(expected) && !error.contains('\n'), "{text}: {error}");
        }
    }

    #[test]
    fn rollouts_from_text_and_tokens() {
        let got = rows(concat!(
            r#"{"prompt": "a", "completion": "b", "reward": 1}"#,
            "\n",
            r#"{"prompt_tokens": [1, 2], "completions": [{"tokens": [3, 4], "reward": -0.5, "old_logprobs": [-0.25, 0]}, {"tokens": [5]}]}"#,
            "\n",
            r#"{"question": "only looked at", "answer": 3}"#,
            "\n",
            r#"{"prompt": "a", "completions": [{"completion": "b", "old_logprobs": null}]}"#,
        ))
        .unwrap();
        assert_eq!(got[0].completions[0].content, CompletionContent::Text("b".into()));
        assert_eq!(got[0].completions[0].reward, Some(1.0));
        assert_eq!(got[1].prompt, Prompt::Tokens(vec![1, 2]));
        assert_eq!(got[1].completions[0].content, CompletionContent::Tokens(vec![3, 4]));
        assert_eq!(got[1].completions[0].reward, Some(-0.5));
        assert_eq!(got[1].completions[0].old_logprobs, Some(vec![-0.25, 0.0]));
        assert_eq!(got[1].completions[1].old_logprobs, None);
        assert!(got[2].completions.is_empty());
        assert_eq!(got[3].line, 4);
    }

    #[test]
    fn bad_rollouts_are_named() {
        for (text, expected) in [
            (r#"{"prompt": "a", "completion": ""}"#, "`completion`: expected text, not empty"),
            (r#"{"prompt": "a", "completion": "b", "completions": []}"#, "got both"),
            (r#"{"prompt": "a", "completions": [3]}"#, "`completions[0]`: expected an object"),
            (r#"{"prompt": "a", "completions": [{}]}"#, "got neither"),
            (
                r#"{"prompt": "a", "completions": [{"tokens": []}]}"#,
                "a list, not empty, got a list of 0",
            ),
            (
                r#"{"prompt": "a", "completions": [{"tokens": [1, -1]}]}"#,
                "`completions[0].tokens[1]`",
            ),
            (r#"{"prompt_tokens": [3000000000], "completions": []}"#, "`prompt_tokens[0]`"),
            (r#"{"prompt_tokens": [], "completions": []}"#, "a list, not empty"),
            (r#"{"prompt_tokens": [1], "prompt": "a"}"#, "got both `prompt` and `prompt_tokens`"),
            (
                r#"{"prompt": "a", "completions": [{"tokens": [1], "old_logprobs": [0, 0]}]}"#,
                "expected 1 log-probabilities, one per token, got 2",
            ),
            (
                r#"{"prompt": "a", "completions": [{"tokens": [1], "old_logprobs": ["a"]}]}"#,
                "`completions[0].old_logprobs[0]`: expected a finite number",
            ),
            (
                r#"{"prompt": "a", "completions": [{"tokens": [1], "old_logprobs": [-1e39]}]}"#,
                "expected a finite number",
            ),
            (r#"{"prompt": "a", "completion": "b", "reward": 1e39}"#, "expected a finite number"),
            (r#"{"prompt": "a", "completion": "b", "reward": "1"}"#, "`reward`: expected a finite"),
            (r#"{"prompt": "a", "completion": "b", "old_logprobs": [0]}"#, "got it beside text"),
        ] {
            let error = rows(text).unwrap_err().to_string();
            assert!(error.contains(expected) && !error.contains('\n'), "{text}: {error}");
        }
    }
}
