//! Conversations in which tools are called: `messages` with `tool_calls`, beside a list of `tools`.
//!
//! ```json
//! {"messages": [{"role": "user", "content": ".."},
//!               {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": {"x": 1}}}]},
//!               {"role": "tool", "content": ".."}, {"role": "assistant", "content": ".."}],
//!  "tools": [{"type": "function", "function": {"name": "f", "description": "..", "parameters": {..}}}]}
//! ```
//!
//! As OpenAI's API and `transformers` have them: arguments may be an object or its text, a call and a tool may come without
//! the `function` around them, `tools` may be a text that holds the list. Fields that are null count as left out.

use serde_json::{Map, Value, json};

use super::Chat;
use super::jsonl::{Row, kind, shorten};
use super::rows::fields;
use crate::{Error, Result};

/// The conversation of a row, with an answer in it.
pub(super) fn chat(row: &Row, value: &Value) -> Result<Chat> {
    let tools = match row.get("tools") {
        Some(value) => tools(row, value)?,
        None => Vec::new(),
    };
    let one = |(j, value)| message(row, &format!("messages[{j}]"), value);
    let list = listed(row, "messages", value)?;
    let messages: Vec<Value> = list.iter().enumerate().map(one).collect::<Result<_>>()?;
    if !messages.iter().any(speaks) {
        let roles = messages.iter().map(|m| m["role"].as_str().unwrap_or_default());
        return Err(unanswered(row, "messages", roles));
    }
    let called = messages.iter().flat_map(|m| m["tool_calls"].as_array().into_iter().flatten());
    for call in called {
        let name = &call["function"]["name"];
        if !tools.iter().any(|tool| tool["function"]["name"] == *name) {
            let names: Vec<_> =
                tools.iter().filter_map(|t| t["function"]["name"].as_str()).collect();
            let expected = match names.is_empty() {
                true => "the tools that are called".to_string(),
                false => format!("calls of {}", names.join(", ")),
            };
            let advice = "list every tool in `tools`, with its JSON schema";
            return Err(row.invalid("tools", expected, format!("a call of {name}"), advice));
        }
    }
    Ok(Chat { messages, tools })
}

/// Whether the assistant says something here.
pub fn speaks(message: &Value) -> bool {
    message["role"] == "assistant"
        && (message["content"].as_str().is_some_and(|text| !text.is_empty())
            || message.get("tool_calls").is_some())
}

/// Refuses `tools` where only plain text is read, so that none is left out without a word.
pub(super) fn refuse_tools(row: &Row) -> Result<()> {
    match row.get("tools") {
        Some(Value::Array(list)) if list.is_empty() => Ok(()),
        Some(Value::String(text)) if matches!(text.trim(), "" | "[]") => Ok(()),
        Some(other) => {
            let advice = "tools are for conversations in `messages`, with --algo sft";
            Err(row.invalid("tools", "no tools beside plain text", kind(other), advice))
        }
        None => Ok(()),
    }
}

/// The messages of a list that is not empty.
pub(super) fn listed<'v>(row: &Row, name: &str, value: &'v Value) -> Result<&'v [Value]> {
    let list = value.as_array().filter(|list| !list.is_empty()).ok_or_else(|| {
        let advice = "write [{\"role\": \"user\", \"content\": \"..\"}, ..]";
        row.invalid(name, "messages, not empty", kind(value), advice)
    })?;
    Ok(list)
}

/// The error for a conversation in which the assistant says nothing.
pub(super) fn unanswered<'r>(row: &Row, name: &str, roles: impl Iterator<Item = &'r str>) -> Error {
    let advice = "give the answer to be learnt, or drop the row";
    row.invalid(name, "a turn of the assistant", roles.collect::<Vec<_>>().join(", "), advice)
}

fn message(row: &Row, name: &str, value: &Value) -> Result<Value> {
    let wrong = || {
        let expected = "an object with the texts `role` and `content`, or with `tool_calls`";
        row.invalid(name, expected, fields(value), "only text and calls of tools are read")
    };
    let object = value.as_object().ok_or_else(wrong)?;
    let mut read: Map<String, Value> =
        object.iter().filter(|(_, v)| !v.is_null()).map(|(k, v)| (k.clone(), v.clone())).collect();
    let calls = match read.remove("tool_calls") {
        Some(Value::Array(list)) => {
            let one = |(i, call)| tool_call(row, &format!("{name}.tool_calls[{i}]"), call);
            list.iter().enumerate().map(one).collect::<Result<Vec<_>>>()?
        }
        Some(other) => {
            let place = format!("{name}.tool_calls");
            return Err(row.invalid(&place, "a list", kind(&other), "write [{..}, ..]"));
        }
        None => Vec::new(),
    };
    if !read.get("role").is_some_and(Value::is_string) {
        return Err(wrong());
    }
    match read.get("content") {
        Some(Value::String(_)) => {}
        None if !calls.is_empty() => drop(read.insert("content".into(), "".into())),
        _ => return Err(wrong()),
    }
    if !calls.is_empty() {
        if read["role"] != "assistant" {
            let got = format!("of {}", read["role"]);
            let place = format!("{name}.tool_calls");
            return Err(row.invalid(&place, "calls of the assistant", got, "mend its `role`"));
        }
        read.insert("tool_calls".into(), calls.into());
    }
    Ok(Value::Object(read))
}

fn tool_call(row: &Row, name: &str, call: &Value) -> Result<Value> {
    let wrong = |field: &str, expected: &str, got: Option<&Value>| {
        let advice = "write {\"function\": {\"name\": \"..\", \"arguments\": {..}}}";
        let got = got.map_or("nothing".into(), |v| shorten(&v.to_string(), 80));
        row.invalid(&format!("{name}.{field}"), expected, got, advice)
    };
    let function = call.get("function").unwrap_or(call);
    let Some(called) = function.get("name").and_then(Value::as_str) else {
        return Err(wrong("name", "the tool's name", function.get("name")));
    };
    let arguments = match function.get("arguments").or(function.get("parameters")) {
        Some(Value::Object(arguments)) => arguments.clone(),
        Some(Value::String(text)) => serde_json::from_str(text)
            .map_err(|_| wrong("arguments", "an object", function.get("arguments")))?,
        None | Some(Value::Null) => Map::new(),
        other => return Err(wrong("arguments", "an object", other)),
    };
    let mut read =
        json!({"type": "function", "function": {"name": called, "arguments": arguments}});
    if let Some(id) = call.get("id").filter(|id| !id.is_null()) {
        read["id"] = id.clone();
    }
    Ok(read)
}

fn tools(row: &Row, value: &Value) -> Result<Vec<Value>> {
    let advice =
        "write [{\"type\": \"function\", \"function\": {\"name\": \"..\", \"parameters\": {..}}}]";
    let wrong = |got: String| row.invalid("tools", "a list of tools with names", got, advice);
    let parsed: Value;
    let list = match value {
        Value::Array(list) => list,
        Value::String(text) if text.trim().is_empty() => return Ok(Vec::new()),
        Value::String(text) => {
            parsed = serde_json::from_str(text).map_err(|_| wrong(shorten(text, 80)))?;
            parsed.as_array().ok_or_else(|| wrong(kind(&parsed)))?
        }
        other => return Err(wrong(kind(other))),
    };
    let one = |tool: &Value| {
        let function = tool.get("function").unwrap_or(tool);
        match function.get("name") {
            Some(Value::String(_)) => Ok(json!({"type": "function", "function": function})),
            _ => Err(wrong(shorten(&tool.to_string(), 80))),
        }
    };
    list.iter().map(one).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(object: Value) -> Row {
        let Value::Object(object) = object else { panic!("an object") };
        Row { place: "d:1".into(), line: 1, object, untyped: false }
    }

    fn read(object: Value) -> Result<Chat> {
        let row = row(object);
        chat(&row, &row.object["messages"])
    }

    #[test]
    fn calls_and_tools_are_read_as_others_write_them() {
        let tool = json!({"type": "function", "function": {"name": "f", "parameters": {}}});
        for (call, tools) in [
            (json!({"id": "a", "function": {"name": "f", "arguments": {"x": 1}}}), json!([tool])),
            (json!({"id": "a", "name": "f", "arguments": "{\"x\": 1}"}), json!([tool["function"]])),
            (
                json!({"id": "a", "type": "function", "function": {"name": "f", "arguments": {"x": 1}}}),
                json!(json!([tool]).to_string()),
            ),
        ] {
            let chat = read(json!({"tools": tools, "messages": [
                {"role": "user", "content": "q", "tool_calls": null},
                {"role": "assistant", "content": null, "tool_calls": [call]},
                {"role": "tool", "content": "1", "tool_call_id": "a"},
            ]}))
            .unwrap();
            assert_eq!(chat.tools, std::slice::from_ref(&tool));
            assert_eq!(chat.messages[0], json!({"role": "user", "content": "q"}));
            assert_eq!(
                chat.messages[1],
                json!({"role": "assistant", "content": "", "tool_calls": [
                    {"id": "a", "type": "function", "function": {"name": "f", "arguments": {"x": 1}}}]})
            );
            assert_eq!(chat.messages[2]["tool_call_id"], "a");
            assert!(speaks(&chat.messages[1]) && !speaks(&chat.messages[0]));
        }
    }

    #[test]
    fn what_cannot_be_meant_is_named() {
        let call = |call: Value, tools: Value| json!({"tools": tools, "messages": [{"role": "assistant", "tool_calls": [call]}]});
        for (object, expected) in [
            (
                call(json!({"arguments": {}}), json!([])),
                "`messages[0].tool_calls[0].name`: expected",
            ),
            (
                call(json!({"name": "f", "arguments": "x"}), json!([{"name": "f"}])),
                "`messages[0].tool_calls[0].arguments`: expected an object, got \"x\"",
            ),
            (
                call(json!({"name": "g"}), json!([{"name": "f"}])),
                "`tools`: expected calls of f, got a call of \"g\"",
            ),
            (call(json!({"name": "g"}), json!("[")), "`tools`: expected a list of tools"),
            (
                json!({"messages": [{"role": "user", "content": "q", "tool_calls": [{"name": "f"}]}]}),
                "`messages[0].tool_calls`: expected calls of the assistant",
            ),
            (
                json!({"messages": [{"role": "assistant"}]}),
                "`messages[0]`: expected an object with the texts",
            ),
            (
                json!({"messages": [{"role": "user", "content": "q"}]}),
                "`messages`: expected a turn of the assistant, got user",
            ),
        ] {
            let error = read(object.clone()).unwrap_err().to_string();
            assert!(error.contains(expected), "{object}: {error}");
        }
        assert!(refuse_tools(&row(json!({"tools": []}))).is_ok());
        assert!(refuse_tools(&row(json!({"tools": [{"name": "f"}]}))).is_err());
    }
}
