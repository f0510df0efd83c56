//! Conversations in which tools are called, for templates that know tools and for those that do not.

use serde_json::{Value, json};

use crate::Result;
use crate::data::ChatTemplate;

/// What stands before the tools where a template has no place for them, and how they are to be called.
const INTRODUCED: &str = "You may call one or more functions to assist with the user query. Their signatures:\n<tools>\n";
const EXPLAINED: &str = "\n</tools>\nFor each call return a JSON object within tags:\n<tool_call>\n\
     {\"name\": <function-name>, \"arguments\": <args-json-object>}\n</tool_call>";

/// The conversation as the template writes it; with `prompt` it ends where the assistant begins.
pub(super) fn render(
    template: &ChatTemplate,
    messages: &[Value],
    tools: &[Value],
    prompt: bool,
) -> Result<String> {
    match tools.is_empty() || template.knows_tools() {
        true => template.render_chat(messages, tools, prompt),
        false => template.render_chat(&in_plain_text(messages, tools), &[], prompt),
    }
}

/// What the assistant says where the template knows no tools: its text, then its calls in Hermes' words.
pub(super) fn spoken(message: &Value) -> String {
    let content = message["content"].as_str().unwrap_or_default();
    let calls = message["tool_calls"].as_array().into_iter().flatten().map(|call| {
        let (name, arguments) = (&call["function"]["name"], &call["function"]["arguments"]);
        // Name first, as the explanation has it.
        format!("<tool_call>\n{{\"name\": {name}, \"arguments\": {arguments}}}\n</tool_call>")
    });
    let content = Some(content.to_string()).filter(|content| !content.is_empty());
    content.into_iter().chain(calls).collect::<Vec<_>>().join("\n")
}

/// Tools in the system message, results in the user's.
fn in_plain_text(messages: &[Value], tools: &[Value]) -> Vec<Value> {
    let list: Vec<String> = tools.iter().map(Value::to_string).collect();
    let how = format!("{INTRODUCED}{}{EXPLAINED}", list.join("\n"));
    let content = |message: &Value| message["content"].as_str().unwrap_or_default().to_string();
    let mut all = Vec::with_capacity(messages.len() + 1);
    let mut rest = messages;
    let system = match messages.first().filter(|first| first["role"] == "system") {
        Some(first) => {
            rest = &messages[1..];
            format!("{}\n\n{how}", content(first))
        }
        None => how,
    };
    all.push(json!({"role": "system", "content": system}));
    let mut results: Vec<String> = Vec::new();
    let flush = |results: &mut Vec<String>, all: &mut Vec<Value>| {
        if !results.is_empty() {
            all.push(json!({"role": "user", "content": results.join("\n")}));
            results.clear();
        }
    };
    for message in rest {
        if message["role"] == "tool" {
            results.push(format!("<tool_response>\n{}\n</tool_response>", content(message)));
            continue;
        }
        flush(&mut results, &mut all);
        match message.get("tool_calls") {
            Some(_) => all.push(json!({"role": "assistant", "content": spoken(message)})),
            None => all.push(message.clone()),
        }
    }
    flush(&mut results, &mut all);
    all
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_template_without_tools_gets_them_as_text() {
        let template = ChatTemplate::new(
            "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}",
            "",
            "",
        )
        .unwrap();
        let tool = json!({"type": "function", "function": {"name": "f"}});
        let call = |x: i32| json!({"function": {"name": "f", "arguments": {"x": x}}});
        let messages = [
            json!({"role": "system", "content": "S"}),
            json!({"role": "user", "content": "q"}),
            json!({"role": "assistant", "content": "let me see", "tool_calls": [call(1), call(2)]}),
            json!({"role": "tool", "content": "a"}),
            json!({"role": "tool", "content": "b"}),
        ];
        let text = render(&template, &messages, std::slice::from_ref(&tool), true).unwrap();
        let rest = text.strip_prefix("[system]S\n\n").expect("the system message first");
        assert!(rest.starts_with(INTRODUCED), "{text}");
        let behind = rest.split_once(EXPLAINED).expect("the explanation").1;
        assert_eq!(
            behind,
            "[user]q[assistant]let me see\n\
             <tool_call>\n{\"name\": \"f\", \"arguments\": {\"x\":1}}\n</tool_call>\n\
             <tool_call>\n{\"name\": \"f\", \"arguments\": {\"x\":2}}\n</tool_call>\
             [user]<tool_response>\na\n</tool_response>\n<tool_response>\nb\n</tool_response>[assistant]"
        );
        assert_eq!(render(&template, &messages[1..2], &[], true).unwrap(), "[user]q[assistant]");
    }
}
