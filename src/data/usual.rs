//! Layouts of rows that the field writes, under the names that everything here reads.
//!
//! | written as | read as |
//! |---|---|
//! | `conversations` of `{"from": "human", "value": ..}` (ShareGPT; `function_call`, `observation`) | `messages` |
//! | `instruction`, `input` (Alpaca), `context` (Dolly) | `prompt` |
//! | `output` (Alpaca), `response` | `completion`, beside `instruction` |

use serde_json::{Map, Value, json};

use super::jsonl::Row;

/// Roles of ShareGPT's layout and ours.
const ROLES: [(&str, &str); 9] = [
    ("human", "user"),
    ("user", "user"),
    ("gpt", "assistant"),
    ("assistant", "assistant"),
    ("chatgpt", "assistant"),
    ("bing", "assistant"),
    ("bard", "assistant"),
    ("system", "system"),
    ("observation", "tool"),
];
/// A row that has one of these says itself what its prompt is.
const OWN: [&str; 6] = ["prompt", "question", "problem", "prompt_tokens", "messages", "text"];

/// The row under the usual names; one that has them already stays as it is.
pub(super) fn renamed(mut row: Row) -> Row {
    if OWN.iter().any(|name| row.object.get(*name).is_some_and(|value| !value.is_null())) {
        return row;
    }
    if let Some(messages) = row.get("conversations").and_then(conversation) {
        row.object.insert("messages".into(), messages);
    } else if let Some(Value::String(instruction)) = row.get("instruction") {
        let beside = ["input", "context"].into_iter().find_map(|name| filled(&row.object, name));
        let prompt = match beside {
            Some(input) => format!("{instruction}\n\n{input}"),
            None => instruction.clone(),
        };
        let output = ["output", "response"].into_iter().find_map(|name| filled(&row.object, name));
        let output = output.map(str::to_owned);
        row.object.insert("prompt".into(), prompt.into());
        if let Some(output) = output {
            row.object.entry("completion").or_insert(output.into());
        }
    }
    row
}

/// A text that is not empty.
fn filled<'o>(object: &'o Map<String, Value>, name: &str) -> Option<&'o str> {
    object.get(name)?.as_str().filter(|text| !text.trim().is_empty())
}

/// ShareGPT's turns as messages; none where they are something else.
fn conversation(value: &Value) -> Option<Value> {
    let turn = |turn: &Value| {
        let from = turn.get("from").or(turn.get("role"))?.as_str()?;
        let text = turn.get("value").or(turn.get("content"))?.as_str()?;
        if from == "function_call" {
            let calls = match serde_json::from_str(text).ok()? {
                Value::Array(calls) => calls,
                call => vec![call],
            };
            return Some(json!({"role": "assistant", "tool_calls": calls}));
        }
        let role = ROLES.iter().find(|(name, _)| *name == from).map_or(from, |(_, role)| role);
        Some(json!({"role": role, "content": text}))
    };
    let turns: Option<Vec<Value>> = value.as_array()?.iter().map(turn).collect();
    turns.filter(|turns| !turns.is_empty()).map(Value::Array)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(object: Value) -> Value {
        let Value::Object(object) = object else { panic!("an object") };
        let row = Row { place: "d:1".into(), line: 1, object, untyped: false };
        Value::Object(renamed(row).object)
    }

    #[test]
    fn layouts_of_others_get_the_usual_names() {
        let chat = read(json!({"conversations": [
            {"from": "system", "value": "s"}, {"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}));
        let roles: Vec<_> =
            chat["messages"].as_array().unwrap().iter().map(|m| m["role"].clone()).collect();
        assert_eq!(roles, ["system", "user", "assistant"]);
        let calls = read(json!({"conversations": [
            {"from": "function_call", "value": "{\"name\": \"f\", \"arguments\": {\"x\": 1}}"},
            {"from": "observation", "value": "2"}]}));
        assert_eq!(
            calls["messages"],
            json!([
                {"role": "assistant", "tool_calls": [{"name": "f", "arguments": {"x": 1}}]},
                {"role": "tool", "content": "2"}
            ])
        );
        let alpaca = read(json!({"instruction": "add", "input": "1, 2", "output": "3"}));
        assert_eq!(
            (&alpaca["prompt"], &alpaca["completion"]),
            (&"add\n\n1, 2".into(), &"3".into())
        );
        let bare = read(json!({"instruction": "add", "input": "", "answer": 3}));
        assert_eq!((&bare["prompt"], bare.get("completion")), (&"add".into(), None));
    }

    #[test]
    fn rows_with_names_of_their_own_stay() {
        for object in [
            json!({"prompt": "p", "instruction": "i", "output": "o"}),
            json!({"conversations": [{"speaker": "x"}]}),
            json!({"a": 1}),
        ] {
            assert_eq!(read(object.clone()), object);
        }
    }
}
