//! Tool calls in what a model said, by the format of its family.
//!
//! | format | a call |
//! |---|---|
//! | `hermes` (Hermes, Qwen2.5, Qwen3, SmolLM3, Granite) | `<tool_call>{"name": .., "arguments": {..}}</tool_call>` |
//! | `qwen-coder` (Qwen3-Coder, Qwen3.5) | `<tool_call><function=NAME><parameter=KEY>VALUE</parameter></function></tool_call>` |
//! | `llama3` | `<\|python_tag\|>` or nothing, then `{"name": .., "parameters": {..}}`, several with `;` between; `NAME.call(key=value)` |
//! | `mistral` | `[TOOL_CALLS][{"name": .., "arguments": {..}}]`, or `[TOOL_CALLS]NAME[ARGS]{..}` |
//! | `gemma` | a block of `tool_code` or `json`, bare JSON, or `call:NAME{key:VALUE}` within its tags |
//! | `gpt-oss` | `to=functions.NAME` in the header of a channel, the arguments as its message |
//!
//! What cannot be read is malformed and no error: the model is told so.

mod literal;

use clap::ValueEnum;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use crate::data::jsonl::shorten;

/// How a family of models writes tool calls.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum CallFormat {
    /// JSON within `<tool_call>`.
    Hermes,
    /// XML within `<tool_call>`.
    QwenCoder,
    /// JSON, after `<|python_tag|>` or bare.
    #[value(name = "llama3")]
    #[serde(rename = "llama3")]
    Llama3,
    /// `[TOOL_CALLS]`.
    Mistral,
    /// Fenced blocks, JSON, `call:NAME{..}`.
    Gemma,
    /// Channels.
    GptOss,
}

/// A call of a tool.
#[derive(Clone, Debug, PartialEq)]
pub struct ToolCall {
    /// Nine letters and digits, as Mistral's templates want them; of a dialogue each once.
    pub id: String,
    /// The tool's name.
    pub name: String,
    /// Its arguments.
    pub arguments: Map<String, Value>,
}

/// A turn of the model, read.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Turn {
    /// From 1.
    pub number: usize,
    /// All that was said, control tokens by name, without the token that ended it.
    pub text: String,
    /// What stands outside of thoughts and calls.
    pub content: String,
    /// Thoughts; none where there are none.
    pub thoughts: Option<String>,
    /// Calls of tools that there are, with arguments that their schemas allow.
    pub calls: Vec<ToolCall>,
    /// Why other calls cannot be made.
    pub malformed: Vec<String>,
    /// Whether a limit of tokens cut it.
    pub truncated: bool,
    /// Whether no further turn can follow.
    pub last: bool,
}

/// A call as it was written: its name and arguments, or what is wrong with it.
type Written = Result<(String, Map<String, Value>), String>;

impl CallFormat {
    /// All of them.
    pub const ALL: [CallFormat; 6] = [
        CallFormat::Hermes,
        CallFormat::QwenCoder,
        CallFormat::Llama3,
        CallFormat::Mistral,
        CallFormat::Gemma,
        CallFormat::GptOss,
    ];

    /// The format of the family whose chat template this is.
    pub fn of_template(source: &str) -> CallFormat {
        let has = |word: &str| source.contains(word);
        match () {
            () if has("<function=") && has("<tool_call>") => CallFormat::QwenCoder,
            () if has("<|channel|>") => CallFormat::GptOss,
            () if has("[TOOL_CALLS]") => CallFormat::Mistral,
            () if has("<tool_call>") => CallFormat::Hermes,
            () if has("<start_of_turn>") || has("<|tool_call>") || has("<start_function_call>") => {
                CallFormat::Gemma
            }
            () if has("<|python_tag|>") || has("ipython") || has("<|start_header_id|>") => {
                CallFormat::Llama3
            }
            () => CallFormat::Hermes,
        }
    }

    /// Reads a turn; `tools` are those that may be called.
    pub fn read(self, text: &str, tools: &[Value]) -> Turn {
        let mut turn = Turn { text: text.into(), ..Turn::default() };
        let said = match self {
            CallFormat::GptOss => text,
            _ => {
                let (thoughts, said) = thoughts(text);
                turn.thoughts = thoughts;
                said
            }
        };
        if tools.is_empty() && self != CallFormat::GptOss {
            turn.content = said.trim().into();
            return turn;
        }
        let (content, written) = match self {
            CallFormat::Hermes => {
                tagged(said, "<tool_call>", "</tool_call>", |body| vec![json_call(body)])
            }
            CallFormat::QwenCoder => {
                tagged(said, "<tool_call>", "</tool_call>", |body| vec![xml_call(body, tools)])
            }
            CallFormat::Llama3 => llama3(said),
            CallFormat::Mistral => mistral(said),
            CallFormat::Gemma => gemma(said),
            CallFormat::GptOss => {
                let (thoughts, content, written) = channels(said);
                turn.thoughts = thoughts;
                (content, written)
            }
        };
        turn.content = content.trim().into();
        for call in written {
            match call.and_then(|(name, arguments)| known(tools, name, arguments)) {
                Ok((name, arguments)) => {
                    turn.calls.push(ToolCall { id: String::new(), name, arguments });
                }
                Err(why) => turn.malformed.push(why),
            }
        }
        turn
    }
}

impl Turn {
    /// Gives the calls their ids, the first one after `before` others of the dialogue.
    pub fn number_calls(&mut self, before: usize) {
        for (i, call) in self.calls.iter_mut().enumerate() {
            call.id = format!("call{:05}", before + i);
        }
    }

    /// The turn as a message for chat templates.
    pub fn message(&self) -> Value {
        let mut message = json!({"role": "assistant", "content": self.content});
        if let Some(thoughts) = &self.thoughts {
            // The one name is Qwen's and DeepSeek's, the other gpt-oss's.
            message["reasoning_content"] = json!(thoughts);
            message["thinking"] = json!(thoughts);
        }
        if !self.calls.is_empty() {
            let call = |c: &ToolCall| {
                json!({"id": c.id, "type": "function",
                    "function": {"name": c.name, "arguments": c.arguments}})
            };
            message["tool_calls"] = self.calls.iter().map(call).collect();
        }
        message
    }
}

/// Thoughts, and what stands behind them. A prompt may have begun them.
fn thoughts(text: &str) -> (Option<String>, &str) {
    match (text.rsplit_once("</think>"), text.split_once("<think>")) {
        (Some((thoughts, said)), _) => {
            let thoughts = thoughts.trim_start().strip_prefix("<think>").unwrap_or(thoughts);
            (Some(thoughts.trim().into()), said)
        }
        (None, Some((before, thoughts))) => (Some(thoughts.trim().into()), before),
        (None, None) => (None, text),
    }
}

/// Calls between tags, and the text outside; the last tag need not be closed.
fn tagged(
    text: &str,
    open: &str,
    close: &str,
    read: impl Fn(&str) -> Vec<Written>,
) -> (String, Vec<Written>) {
    let (mut content, mut calls, mut rest) = (String::new(), Vec::new(), text);
    while let Some((before, behind)) = rest.split_once(open) {
        content += before;
        let (body, later) = behind.split_once(close).unwrap_or((behind, ""));
        calls.extend(read(body));
        rest = later;
    }
    (content + rest, calls)
}

/// `{"name": .., "arguments": {..}}`
fn json_call(body: &str) -> Written {
    let value = serde_json::from_str(body.trim());
    call_of(&value.map_err(|e| format!("{:?} is no JSON ({e})", shorten(body.trim(), 60)))?)
}

fn call_of(value: &Value) -> Written {
    let function = value.get("function").filter(|f| f.is_object()).unwrap_or(value);
    let Some(name) = function.get("name").and_then(Value::as_str) else {
        return Err(format!("{:?} has no `name`", shorten(&value.to_string(), 60)));
    };
    let given = function.get("arguments").or_else(|| function.get("parameters"));
    let arguments = match given {
        None | Some(Value::Null) => Map::new(),
        Some(Value::Object(arguments)) => arguments.clone(),
        // As OpenAI's API has them.
        Some(Value::String(text)) => match serde_json::from_str(text) {
            Ok(Value::Object(arguments)) => arguments,
            _ => return Err(format!("the arguments of {name} are no JSON object")),
        },
        Some(_) => return Err(format!("the arguments of {name} are no JSON object")),
    };
    Ok((name.into(), arguments))
}

/// `<function=NAME><parameter=KEY>VALUE</parameter></function>`; values are JSON where the schema wants no text.
fn xml_call(body: &str, tools: &[Value]) -> Written {
    let wrong = || format!("{:?} has no <function=NAME>", shorten(body.trim(), 60));
    let (name, mut rest) =
        body.split_once("<function=").and_then(|(_, r)| r.split_once('>')).ok_or_else(wrong)?;
    let (name, mut arguments) = (name.trim().trim_matches('"').to_string(), Map::new());
    let schema = schema_of(tools, &name);
    rest = rest.split_once("</function>").map_or(rest, |(inner, _)| inner);
    while let Some((key, behind)) =
        rest.split_once("<parameter=").and_then(|(_, r)| r.split_once('>'))
    {
        let (value, later) = behind.split_once("</parameter>").unwrap_or((behind, ""));
        let value = value.strip_prefix('\n').unwrap_or(value);
        let value = value.strip_suffix('\n').unwrap_or(value);
        let key = key.trim().trim_matches('"');
        let kind = schema.and_then(|s| s["properties"][key]["type"].as_str());
        let json =
            serde_json::from_str(value.trim()).ok().filter(|_| kind.is_some_and(|k| k != "string"));
        arguments.insert(key.into(), json.unwrap_or_else(|| value.into()));
        rest = later;
    }
    Ok((name, arguments))
}

fn llama3(text: &str) -> (String, Vec<Written>) {
    const TAG: &str = "<|python_tag|>";
    let (content, body) = match text.split_once(TAG) {
        Some((content, body)) => (content, body.trim()),
        None if text.trim_start().starts_with('{') => ("", text.trim()),
        None => return (text.into(), Vec::new()),
    };
    if body.starts_with('{') {
        let (mut calls, mut rest) = (Vec::new(), body);
        while !rest.is_empty() {
            let mut values = serde_json::Deserializer::from_str(rest).into_iter::<Value>();
            match values.next() {
                Some(Ok(value)) => calls.push(call_of(&value)),
                Some(Err(e)) => {
                    calls.push(Err(format!("{:?} is no JSON ({e})", shorten(rest, 60))));
                    break;
                }
                None => break,
            }
            rest = rest[values.byte_offset()..].trim_start_matches([';', ',', ' ', '\n']);
        }
        // Bare JSON that is no call is an answer.
        let is_call = text.contains(TAG) || body.contains("\"name\"");
        return if is_call { (content.into(), calls) } else { (text.into(), Vec::new()) };
    }
    match body.is_empty() {
        true => (content.into(), Vec::new()),
        // brave_search.call(query="..")
        false => (
            content.into(),
            vec![literal::call(body).map(|(name, arguments)| {
                (name.strip_suffix(".call").unwrap_or(&name).to_string(), arguments)
            })],
        ),
    }
}

fn mistral(text: &str) -> (String, Vec<Written>) {
    let Some((content, body)) = text.split_once("[TOOL_CALLS]") else {
        return (text.into(), Vec::new());
    };
    let mut calls = Vec::new();
    for part in body.split("[TOOL_CALLS]").map(str::trim) {
        if part.starts_with('[') || part.starts_with('{') {
            // What stands behind the list is no call.
            let value = serde_json::Deserializer::from_str(part).into_iter::<Value>().next();
            match value {
                Some(Ok(Value::Array(list))) => calls.extend(list.iter().map(call_of)),
                Some(Ok(value)) => calls.push(call_of(&value)),
                Some(Err(e)) => {
                    calls.push(Err(format!("{:?} is no JSON ({e})", shorten(part, 60))));
                }
                None => {}
            }
            continue;
        }
        let (name, arguments) = match part.split_once("[ARGS]") {
            Some(both) => both,
            None => part.find('{').map_or((part, ""), |at| part.split_at(at)),
        };
        let name = name.split("[CALL_ID]").next().unwrap_or(name).trim();
        calls.push(match serde_json::from_str(arguments.trim()) {
            Ok(Value::Object(arguments)) if !name.is_empty() => Ok((name.into(), arguments)),
            _ => Err(format!("{:?} is no name with a JSON object", shorten(part, 60))),
        });
    }
    (content.into(), calls)
}

fn gemma(text: &str) -> (String, Vec<Written>) {
    for (open, close) in
        [("<start_function_call>", "<end_function_call>"), ("<|tool_call>", "<tool_call|>")]
    {
        if text.contains(open) {
            return tagged(text, open, close, |body| vec![literal::braced_call(body.trim())]);
        }
    }
    let block = |body: &str| -> Vec<Written> {
        let body = body.trim();
        match serde_json::from_str(body) {
            Ok(Value::Array(list)) => list.iter().map(call_of).collect(),
            Ok(value) => vec![call_of(&value)],
            Err(e) if body.starts_with(['{', '[']) => {
                vec![Err(format!("{:?} is no JSON ({e})", shorten(body, 60)))]
            }
            Err(_) => body
                .lines()
                .map(str::trim)
                .filter(|line| !line.is_empty())
                .map(|line| {
                    let inner = line.strip_prefix("print(").and_then(|l| l.strip_suffix(')'));
                    literal::call(inner.unwrap_or(line))
                })
                .collect(),
        }
    };
    for open in ["```tool_code", "```tool_call", "```json"] {
        if text.contains(open) {
            return tagged(text, open, "```", block);
        }
    }
    let bare = text.trim();
    match bare.starts_with(['{', '[']) && bare.contains("\"name\"") {
        true => (String::new(), block(bare)),
        false => (text.into(), Vec::new()),
    }
}

/// Thoughts, content and calls of gpt-oss's channels.
fn channels(text: &str) -> (Option<String>, String, Vec<Written>) {
    let (mut thoughts, mut content, mut calls) = (None::<String>, String::new(), Vec::new());
    if !text.contains("<|message|>") {
        return (None, text.into(), calls);
    }
    let mut rest = text;
    while let Some((header, behind)) = rest.split_once("<|message|>") {
        let ends = ["<|end|>", "<|call|>", "<|return|>", "<|start|>"];
        let end = ends.iter().filter_map(|e| behind.find(e).map(|at| (at, e.len()))).min();
        let (at, len) = end.unwrap_or((behind.len(), 0));
        let body = &behind[..at];
        rest = &behind[at + len..];
        let to = header.split_once("to=").map(|(_, to)| {
            to.split(|c: char| c.is_whitespace() || c == '<').next().unwrap_or_default()
        });
        if let Some(name) = to {
            let name = name.strip_prefix("functions.").unwrap_or(name).to_string();
            calls.push(match serde_json::from_str(body.trim()) {
                Ok(Value::Object(arguments)) => Ok((name, arguments)),
                _ => Err(format!("the arguments of {name} are no JSON object")),
            });
        } else if header.contains("analysis") {
            thoughts.get_or_insert_default().push_str(body);
        } else {
            content += body;
        }
    }
    (thoughts, content, calls)
}

/// The schema of a tool's arguments.
fn schema_of<'t>(tools: &'t [Value], name: &str) -> Option<&'t Value> {
    let tool = tools.iter().find(|tool| tool["function"]["name"] == name)?;
    Some(&tool["function"]["parameters"])
}

/// Refuses a call of a tool that is not there, or with arguments that its schema does not allow.
fn known(tools: &[Value], name: String, arguments: Map<String, Value>) -> Written {
    let Some(schema) = schema_of(tools, &name) else {
        let names: Vec<&str> =
            tools.iter().filter_map(|tool| tool["function"]["name"].as_str()).collect();
        return Err(format!(
            "there is no tool {:?}; there are {}",
            shorten(&name, 40),
            names.join(", ")
        ));
    };
    for required in schema["required"].as_array().into_iter().flatten().filter_map(Value::as_str) {
        if !arguments.contains_key(required) {
            return Err(format!("{name} lacks the argument {required:?}"));
        }
    }
    for (key, value) in &arguments {
        let fits = match schema["properties"][key.as_str()]["type"].as_str() {
            Some("string") => value.is_string(),
            Some("integer") => value.is_i64() || value.is_u64(),
            Some("number") => value.is_number(),
            Some("boolean") => value.is_boolean(),
            Some("array") => value.is_array(),
            Some("object") => value.is_object(),
            _ => true,
        };
        if !fits {
            let expected = &schema["properties"][key.as_str()]["type"];
            let got = shorten(&value.to_string(), 40);
            return Err(format!("the argument {key:?} of {name} is {got}, not of type {expected}"));
        }
    }
    Ok((name, arguments))
}

#[cfg(test)]
mod tests;
