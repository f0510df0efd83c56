//! The protocol of environment programs, version 1: a line of JSON in, a line of JSON out.
//!
//! ```json
//! {"id": 1, "op": "reset", "protocol": 1, "dialogue": "3.0", "seed": 17, "split": "train", "problem": {"id": "..", "prompt": "..", "answer": ".."}}
//! {"messages": [{"role": "user", "content": ".."}], "tools": [..]}
//! {"id": 2, "op": "step", "dialogue": "3.0", "turn": 1, "text": "..", "content": "..", "tool_calls": [{"id": "..", "name": "..", "arguments": {..}}], "truncated": false, "last": false}
//! {"messages": [{"role": "tool", "content": ".."}], "reward": 0.0, "done": false}
//! {"id": 3, "op": "close", "dialogue": "3.0"}
//! {}
//! ```
//!
//! `docs/ENVIRONMENTS.md` has every field. What a program says is read here, strictly: a field that the protocol does not
//! have is a mistake of the program's, and is named.

use serde_json::{Map, Value, json};

use super::{Opening, Step, Task, Turn};
use crate::data::jsonl::{kind, shorten};
use crate::data::{Message, Prompt};

/// Version of the protocol.
pub const VERSION: u64 = 1;
/// Messages in one answer, at most.
const MAX_MESSAGES: usize = 256;
/// Tools, at most.
const MAX_TOOLS: usize = 128;

/// (expected, got)
pub type Fault = (String, String);

/// The question that begins a dialogue.
pub fn reset(id: u64, dialogue: &str, task: &Task) -> Value {
    json!({
        "id": id,
        "op": "reset",
        "protocol": VERSION,
        "dialogue": dialogue,
        "seed": task.seed,
        "split": if task.held_out { "eval" } else { "train" },
        "problem": {
            "id": task.problem.id,
            "prompt": prompt(&task.problem.prompt),
            "answer": task.problem.answer,
        },
    })
}

/// The question what a turn leads to.
pub fn step(id: u64, dialogue: &str, turn: &Turn) -> Value {
    let call = |c: &super::ToolCall| json!({"id": c.id, "name": c.name, "arguments": c.arguments});
    json!({
        "id": id,
        "op": "step",
        "dialogue": dialogue,
        "turn": turn.number,
        "text": turn.text,
        "content": turn.content,
        "thoughts": turn.thoughts,
        "tool_calls": turn.calls.iter().map(call).collect::<Vec<_>>(),
        "truncated": turn.truncated,
        "last": turn.last,
    })
}

/// The word that a dialogue is over.
pub fn close(id: u64, dialogue: &str) -> Value {
    json!({"id": id, "op": "close", "dialogue": dialogue})
}

/// A prompt as programs get it: text, messages, or token ids.
fn prompt(prompt: &Prompt) -> Value {
    let message = |m: &Message| json!({"role": m.role, "content": m.content});
    match prompt {
        Prompt::Text(text) => json!(text),
        Prompt::Messages(messages) => messages.iter().map(message).collect(),
        Prompt::Tokens(tokens) => json!(tokens),
    }
}

/// The opening in an answer to `reset`.
///
/// # Errors
/// What was expected, and what the line says.
pub fn read_opening(line: &[u8], id: u64) -> Result<Opening, Fault> {
    let fields = object(line, "an answer to reset", "{\"messages\": [..], \"tools\": [..]}")?;
    if let Some(done) = fields.get("done").filter(|done| **done != Value::Bool(false)) {
        let got = format!("`done`: {done} before the first turn");
        return Err(("an answer to reset, which opens the dialogue".into(), got));
    }
    check(&fields, id, "an answer to reset", &["id", "protocol", "messages", "tools", "done"])?;
    if let Some(theirs) = fields.get("protocol").filter(|v| v.as_u64() != Some(VERSION)) {
        return Err((format!("`protocol` {VERSION}"), format!("{theirs}")));
    }
    let messages = messages(fields.get("messages"), true)?;
    if messages.is_empty() {
        return Err((
            "`messages` with at least one message in an answer to reset".into(),
            "none".into(),
        ));
    }
    Ok(Opening { messages, tools: tools(fields.get("tools"))? })
}

/// What an answer to `step` says.
///
/// # Errors
/// What was expected, and what the line says.
pub fn read_step(line: &[u8], id: u64) -> Result<Step, Fault> {
    let example = "{\"messages\": [..], \"reward\": 0.0, \"done\": false}";
    let fields = object(line, "an answer to step", example)?;
    let known = ["id", "messages", "reward", "done", "success", "reason"];
    check(&fields, id, "an answer to step", &known)?;
    let flag = |name: &str| match fields.get(name) {
        None | Some(Value::Null) => Ok(None),
        Some(Value::Bool(flag)) => Ok(Some(*flag)),
        Some(other) => Err((format!("`{name}`: true or false"), kind(other))),
    };
    let (done, success) = (flag("done")?.unwrap_or(false), flag("success")?);
    let reward = match fields.get("reward") {
        None | Some(Value::Null) => 0.0,
        Some(value) => {
            let number = value.as_f64().map(|x| x as f32).filter(|x| x.is_finite());
            number.ok_or_else(|| ("`reward`: a finite number".to_string(), kind(value)))?
        }
    };
    let reason = match fields.get("reason") {
        None | Some(Value::Null) => String::new(),
        Some(Value::String(text)) => {
            shorten(&text.split_whitespace().collect::<Vec<_>>().join(" "), 300)
        }
        Some(other) => return Err(("`reason`: a text".into(), kind(other))),
    };
    let messages = messages(fields.get("messages"), false)?;
    if messages.is_empty() && !done {
        let expected = "`messages` for the next turn, or `done`: true";
        return Err((expected.into(), "neither".into()));
    }
    Ok(Step { messages, reward, done, success, reason })
}

/// Looks at an answer to `close`.
///
/// # Errors
/// What was expected, and what the line says.
pub fn read_closed(line: &[u8], id: u64) -> Result<(), Fault> {
    let fields = object(line, "an answer to close", "{}")?;
    check(&fields, id, "an answer to close", &["id"])
}

fn object(line: &[u8], what: &str, example: &str) -> Result<Map<String, Value>, Fault> {
    let words = || {
        let text = String::from_utf8_lossy(&line[..line.len().min(400)]).into_owned();
        format!("{:?}", shorten(text.trim(), 80))
    };
    match serde_json::from_slice(line) {
        Ok(Value::Object(fields)) => Ok(fields),
        _ => Err((format!("{what}, a line of JSON such as {example}"), words())),
    }
}

/// Refuses another question's id and fields that the protocol does not have.
fn check(fields: &Map<String, Value>, id: u64, what: &str, known: &[&str]) -> Result<(), Fault> {
    if let Some(theirs) = fields.get("id").filter(|theirs| theirs.as_u64() != Some(id)) {
        return Err((format!("the answer to question {id}"), format!("`id` {theirs}")));
    }
    match fields.keys().find(|name| !known.contains(&name.as_str())) {
        Some(name) => {
            let got = format!("the field {:?}", shorten(name, 40));
            Err((format!("{what} with no other fields than {}", known.join(", ")), got))
        }
        None => Ok(()),
    }
}

fn messages(value: Option<&Value>, opening: bool) -> Result<Vec<Value>, Fault> {
    let list = match value {
        None | Some(Value::Null) => return Ok(Vec::new()),
        Some(Value::Array(list)) if list.len() <= MAX_MESSAGES => list,
        Some(other) => {
            return Err((format!("`messages`: a list of at most {MAX_MESSAGES}"), kind(other)));
        }
    };
    list.iter().enumerate().map(|(i, m)| message(i, m, opening)).collect()
}

fn message(i: usize, value: &Value, opening: bool) -> Result<Value, Fault> {
    let place = |name: &str| format!("`messages[{i}]{name}`");
    let Value::Object(fields) = value else {
        return Err((format!("{}: an object with role and content", place("")), kind(value)));
    };
    let known = ["role", "content", "name", "tool_call_id"];
    if let Some(name) = fields.keys().find(|name| !known.contains(&name.as_str())) {
        let expected = format!("{}: no other fields than {}", place(""), known.join(", "));
        return Err((expected, format!("the field {:?}", shorten(name, 40))));
    }
    for name in known {
        match fields.get(name) {
            Some(Value::String(text)) if name != "role" || !text.is_empty() => {}
            None if name == "name" || name == "tool_call_id" => {}
            other => {
                let got = other.map_or("none".into(), kind);
                return Err((format!("{}: a text", place(&format!(".{name}"))), got));
            }
        }
    }
    if !opening && fields["role"] == "assistant" {
        let expected = format!("{}: another role than assistant after the opening", place(".role"));
        return Err((expected, "assistant".into()));
    }
    Ok(value.clone())
}

fn tools(value: Option<&Value>) -> Result<Vec<Value>, Fault> {
    let list = match value {
        None | Some(Value::Null) => return Ok(Vec::new()),
        Some(Value::Array(list)) if list.len() <= MAX_TOOLS => list,
        Some(other) => {
            return Err((format!("`tools`: a list of at most {MAX_TOOLS}"), kind(other)));
        }
    };
    list.iter().enumerate().map(|(i, tool)| self::tool(i, tool)).collect()
}

/// A tool as templates write it; a bare function is put into one.
fn tool(i: usize, value: &Value) -> Result<Value, Fault> {
    let form = "{\"type\": \"function\", \"function\": {\"name\": .., \"parameters\": SCHEMA}}";
    let function = value.get("function").unwrap_or(value);
    let name = function.get("name").and_then(Value::as_str).filter(|name| !name.is_empty());
    let Some(name) = name else {
        return Err((format!("`tools[{i}]`: {form}"), "one without a name".into()));
    };
    if !function.get("parameters").is_some_and(Value::is_object) {
        let expected =
            format!("`tools[{i}].function.parameters`: the JSON schema of its arguments");
        return Err((expected, format!("the tool {:?} without a schema", shorten(name, 40))));
    }
    Ok(json!({"type": "function", "function": function}))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answers_are_read() {
        let opening = read_opening(
            br#"{"messages": [{"role": "user", "content": "hi"}], "tools": [{"name": "f", "parameters": {}}]}"#,
            1,
        );
        let opening = opening.unwrap();
        assert_eq!(opening.messages[0]["content"], "hi");
        assert_eq!(opening.tools[0]["function"]["name"], "f");
        let step = read_step(br#"{"id": 2, "reward": 1, "done": true, "reason": "a\nb"}"#, 2);
        let step = step.unwrap();
        assert_eq!((step.reward, step.done, step.reason.as_str()), (1.0, true, "a b"));
        read_closed(b"{}", 3).unwrap();
    }

    #[test]
    fn faults_show_the_programs_words_and_what_was_expected() {
        let user = r#"{"role": "user", "content": "x"}"#;
        for (line, words) in [
            ("hello", vec!["a line of JSON such as", "\"hello\""]),
            ("[1]", vec!["a line of JSON", "\"[1]\""]),
            ("{}", vec!["at least one message", "none"]),
            (r#"{"done": true}"#, vec!["opens the dialogue", "`done`: true before the first turn"]),
            (r#"{"messages": [], "extra": 1}"#, vec!["no other fields than id,", "\"extra\""]),
            (r#"{"protocol": 2, "messages": []}"#, vec!["`protocol` 1", "2"]),
            (r#"{"id": 9, "messages": []}"#, vec!["the answer to question 1", "`id` 9"]),
            (r#"{"messages": [{"role": "user"}]}"#, vec!["`messages[0].content`: a text", "none"]),
            (r#"{"messages": [{"role": "", "content": ""}]}"#, vec!["`messages[0].role`"]),
            (r#"{"messages": [{"role": "u", "content": "", "x": 1}]}"#, vec!["\"x\""]),
        ] {
            let (expected, got) = read_opening(line.as_bytes(), 1).unwrap_err();
            for word in words {
                assert!(
                    format!("{expected}, got {got}").contains(word),
                    "{line}: {expected}, {got}"
                );
            }
        }
        let tool = format!(r#"{{"messages": [{user}], "tools": [{{"name": "f"}}]}}"#);
        let (expected, got) = read_opening(tool.as_bytes(), 1).unwrap_err();
        assert!(
            expected.contains("JSON schema") && got.contains("\"f\" without a schema"),
            "{got}"
        );
        for (line, words) in [
            ("{}", "`messages` for the next turn, or `done`"),
            (r#"{"done": 1}"#, "`done`: true or false"),
            (r#"{"done": true, "reward": "1"}"#, "`reward`: a finite number"),
            (r#"{"done": true, "reward": 1e39}"#, "`reward`: a finite number"),
            (r#"{"done": true, "rewards": 1}"#, "no other fields than"),
            (
                r#"{"messages": [{"role": "assistant", "content": ""}]}"#,
                "another role than assistant",
            ),
        ] {
            let (expected, got) = read_step(line.as_bytes(), 1).unwrap_err();
            assert!(expected.contains(words), "{line}: {expected}, {got}");
        }
    }
}
