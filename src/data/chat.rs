//! The chat template of a model: Jinja, as Hugging Face's `apply_chat_template` renders it (see
//! [`super::jinja`] for the environment and its departures).
//!
//! Templates see `messages`, `bos_token`, `eos_token`, `add_generation_prompt`, `tools` (none without an environment that
//! has some), `documents` (none), and `enable_thinking` where it was set.

use std::sync::Arc;
use std::sync::atomic::{AtomicI64, Ordering};

use minijinja::{Environment, Error as JinjaError, ErrorKind, Value};

use super::{Message, jinja, jsonl::shorten};
use crate::{Error, Result};

pub use super::jinja::unix_now_s;

/// Work one rendering may do: instructions, and one more for each 64 bytes that it makes.
const FUEL: u64 = 2_000_000;
/// Longest template, in bytes. The longest in use are some 20 kB.
const MAX_SOURCE_BYTES: usize = 1 << 20;
/// Longest rendered prompt, in bytes.
const MAX_OUTPUT_BYTES: usize = 32 << 20;
/// Stack of a rendering: lists within lists, as deep as the fuel lets a template make them, are dropped by
/// recursion (32 MiB were enough for the deepest).
const STACK_BYTES: usize = 64 << 20;
const NAME: &str = "template";

/// A compiled chat template.
#[derive(Debug, Clone)]
pub struct ChatTemplate {
    environment: Environment<'static>,
    bos_token: String,
    eos_token: String,
    enable_thinking: Option<bool>,
    source: Arc<str>,
    /// What `strftime_now` takes for now, in seconds of Unix time; negative is the clock's.
    now: Arc<AtomicI64>,
}

impl ChatTemplate {
    /// Compiles `source`; `bos_token` and `eos_token` are the texts it may write (empty where there is none).
    pub fn new(source: &str, bos_token: &str, eos_token: &str) -> Result<ChatTemplate> {
        if source.len() > MAX_SOURCE_BYTES {
            let expected = format!("at most {MAX_SOURCE_BYTES} bytes");
            let got = source.len().to_string();
            return Err(Error::invalid("chat template", expected, got, "give a shorter template"));
        }
        let now = Arc::new(AtomicI64::new(-1));
        let environment = jinja::environment(NAME, source, FUEL, now.clone());
        let environment = environment.map_err(|e| failed(&e))?;
        Ok(ChatTemplate {
            environment,
            bos_token: bos_token.into(),
            eos_token: eos_token.into(),
            enable_thinking: None,
            source: source.into(),
            now,
        })
    }

    /// Sets the variable `enable_thinking` (Qwen3); unset, the template's own default holds.
    pub fn with_thinking(mut self, enable_thinking: Option<bool>) -> ChatTemplate {
        self.enable_thinking = enable_thinking;
        self
    }

    /// Fixes what `strftime_now` says, so that the same messages give the same prompt on another day.
    pub fn set_now(&self, unix_s: i64) {
        self.now.store(unix_s, Ordering::Relaxed);
    }

    /// What it was compiled from.
    pub fn source(&self) -> &str {
        &self.source
    }

    /// Whether the template writes tools.
    pub fn knows_tools(&self) -> bool {
        self.source.contains("tools")
    }

    /// The text of a conversation; with `add_generation_prompt` it ends where the assistant begins.
    pub fn render(&self, messages: &[Message], add_generation_prompt: bool) -> Result<String> {
        let messages = messages.iter().map(|message| {
            Value::from_pairs([("role", &*message.role), ("content", &*message.content)])
        });
        self.render_values(messages.collect(), ().into(), add_generation_prompt)
    }

    /// [`ChatTemplate::render`] of messages as JSON has them, which may call `tools`.
    ///
    /// # Errors
    /// The template refuses them, a role among others.
    pub fn render_chat(
        &self,
        messages: &[serde_json::Value],
        tools: &[serde_json::Value],
        add_generation_prompt: bool,
    ) -> Result<String> {
        let tools = match tools {
            [] => ().into(),
            tools => tools.iter().map(jinja::from_json).collect::<Vec<_>>().into(),
        };
        let messages = messages.iter().map(jinja::from_json).collect();
        self.render_values(messages, tools, add_generation_prompt)
    }

    fn render_values(
        &self,
        messages: Vec<Value>,
        tools: Value,
        add_generation_prompt: bool,
    ) -> Result<String> {
        let mut variables = vec![
            ("messages", messages.into()),
            ("bos_token", Value::from(&*self.bos_token)),
            ("eos_token", Value::from(&*self.eos_token)),
            ("add_generation_prompt", add_generation_prompt.into()),
            ("tools", tools),
            ("documents", ().into()),
        ];
        variables.extend(self.enable_thinking.map(|on| ("enable_thinking", on.into())));
        let template = self.environment.get_template(NAME).map_err(|e| failed(&e))?;
        let variables = Value::from_pairs(variables);
        let text = with_room(|| template.render(variables))?.map_err(|e| failed(&e))?;
        if text.len() > MAX_OUTPUT_BYTES {
            let expected = format!("at most {MAX_OUTPUT_BYTES} bytes of prompt");
            let got = text.len().to_string();
            return Err(Error::invalid("chat template", expected, got, "shorten the messages"));
        }
        Ok(text)
    }
}

/// Runs `render` on a stack of its own.
fn with_room<T: Send>(render: impl FnOnce() -> T + Send) -> Result<T> {
    std::thread::scope(|scope| {
        let thread = std::thread::Builder::new().stack_size(STACK_BYTES);
        let thread = thread.spawn_scoped(scope, render).map_err(|e| {
            let advice = "free some memory, or allow more threads";
            Error::engine("starting a thread for the chat template", e.to_string(), advice)
        })?;
        Ok(thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)))
    })
}

/// One line, whatever the template raised.
fn failed(error: &JinjaError) -> Error {
    let place = match error.line() {
        Some(line) => format!("chat template, line {line}"),
        None => "chat template".into(),
    };
    let reason = match (error.kind(), error.detail()) {
        (ErrorKind::OutOfFuel, _) => format!("more than {FUEL} steps"),
        (kind, Some(detail)) => format!("{kind}: {detail}"),
        (kind, None) => kind.to_string(),
    };
    let reason = shorten(&reason.split_whitespace().collect::<Vec<_>>().join(" "), 300);
    let advice = "check the roles and their order, or give another template";
    Error::invalid(place, "a template that renders these messages", reason, advice)
}

#[cfg(test)]
mod tests {
    use super::*;

    const CHATML: &str = "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}";

    // In the manner of Qwen2.5: a default system message, tools, `loop`, dash-trimmed tags.
    const QWEN2: &str = r#"{%- if tools %}
    {{- '<|im_start|>system\n# Tools\n' }}
    {%- for tool in tools %}
        {{- tool | tojson }}
    {%- endfor %}
{%- else %}
    {%- if messages[0]['role'] == 'system' %}
        {{- '<|im_start|>system\n' + messages[0]['content'] + '<|im_end|>\n' }}
    {%- else %}
        {{- '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}
    {%- endif %}
{%- endif %}
{%- for message in messages %}
    {%- if (message.role == "user") or (message.role == "system" and not loop.first) or (message.role == "assistant" and not message.tool_calls) %}
        {{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>' + '\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' }}
{%- endif %}
"#;

    // In the manner of Qwen3: namespace, reversed messages, string methods, thinking cut from history.
    const QWEN3: &str = r#"{%- set ns = namespace(last=messages|length - 1, looking=true) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if ns.looking and message.role == "user" and message.content is string and not(message.content.startswith('<tool_response>') and message.content.endswith('</tool_response>')) %}
        {%- set ns.looking = false %}
        {%- set ns.last = index %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- set content = message.content if message.content is string else '' %}
    {%- if message.role == "assistant" %}
        {%- set thoughts = '' %}
        {%- if message.reasoning_content is string %}
            {%- set thoughts = message.reasoning_content %}
        {%- elif '</think>' in content %}
            {%- set thoughts = content.split('</think>')[0].rstrip('\n').split('<think>')[-1].lstrip('\n') %}
            {%- set content = content.split('</think>')[-1].lstrip('\n') %}
        {%- endif %}
        {%- if loop.index0 > ns.last and (loop.last or thoughts) %}
            {{- '<|im_start|>assistant\n<think>\n' + thoughts.strip('\n') + '\n</think>\n\n' + content.lstrip('\n') }}
        {%- else %}
            {{- '<|im_start|>assistant\n' + content }}
        {%- endif %}
        {{- '<|im_end|>\n' }}
    {%- else %}
        {{- '<|im_start|>' + message.role + '\n' + content + '<|im_end|>\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\n\n</think>\n\n' }}
    {%- endif %}
{%- endif %}"#;

    // In the manner of Llama 3.1: bos once, a date, `trim`, `not .. is defined`, an exception.
    const LLAMA3: &str = r#"{{- bos_token }}
{%- if not date_string is defined %}
    {%- set date_string = "26 Jul 2024" %}
{%- endif %}
{%- if not tools_in_user_message is defined %}
    {%- set tools_in_user_message = true %}
{%- endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content']|trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\n\n" }}
{%- if builtin_tools is defined or tools is not none %}
    {{- "Environment: ipython\n" }}
{%- endif %}
{{- "Today Date: " + date_string + "\n\n" }}
{{- system_message }}
{{- "<|eot_id|>" }}
{%- for message in messages %}
    {%- if not (message.role == 'ipython' or message.role == 'tool' or 'tool_calls' in message) %}
        {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'+ message['content'] | trim + '<|eot_id|>' }}
    {%- else %}
        {{- raise_exception("This template has no tools!") }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}
{%- endif %}
"#;

    fn messages(turns: &[(&str, &str)]) -> Vec<Message> {
        let one = |&(role, content): &(&str, &str)| Message {
            role: role.into(),
            content: content.into(),
        };
        turns.iter().map(one).collect()
    }

    fn render(source: &str, turns: &[(&str, &str)], generation: bool) -> Result<String> {
        ChatTemplate::new(source, "<bos>", "<eos>")?.render(&messages(turns), generation)
    }

    #[test]
    fn chatml() {
        assert_eq!(
            render(CHATML, &[("user", "17+25=")], true).unwrap(),
            "<|im_start|>user\n17+25=<|im_end|>\n<|im_start|>assistant\n"
        );
        assert_eq!(
            render(CHATML, &[("user", " <a>&'\" "), ("assistant", "ü\n")], false).unwrap(),
            "<|im_start|>user\n <a>&'\" <|im_end|>\n<|im_start|>assistant\nü\n<|im_end|>\n"
        );
    }

    #[test]
    fn qwen2_like() {
        assert_eq!(
            render(QWEN2, &[("user", "Hi")], true).unwrap(),
            "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
        );
        assert_eq!(
            render(QWEN2, &[("system", "S"), ("user", "Hi"), ("assistant", "Ho")], false).unwrap(),
            "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHo<|im_end|>\n"
        );
    }

    #[test]
    fn qwen3_like() {
        let turns = [("user", "a"), ("assistant", "<think>\nhm\n</think>\n\nb"), ("user", "c")];
        let history = "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\nb<|im_end|>\n<|im_start|>user\nc<|im_end|>\n";
        let template = ChatTemplate::new(QWEN3, "", "").unwrap();
        for (thinking, end) in [
            (None, "<|im_start|>assistant\n"),
            (Some(true), "<|im_start|>assistant\n"),
            (Some(false), "<|im_start|>assistant\n<think>\n\n</think>\n\n"),
        ] {
            let text = template.clone().with_thinking(thinking).render(&messages(&turns), true);
            assert_eq!(text.unwrap(), format!("{history}{end}"), "{thinking:?}");
        }
        assert_eq!(
            template.render(&messages(&turns[..2]), false).unwrap(),
            "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n<think>\nhm\n</think>\n\nb<|im_end|>\n"
        );
    }

    #[test]
    fn llama3_like() {
        assert_eq!(
            render(LLAMA3, &[("system", " S "), ("user", " Hi \n")], true).unwrap(),
            "<bos><|start_header_id|>system<|end_header_id|>\n\nToday Date: 26 Jul 2024\n\nS<|eot_id|><|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"
        );
        let error = render(LLAMA3, &[("user", "a"), ("tool", "b")], true).unwrap_err().to_string();
        assert!(error.contains("This template has no tools!"), "{error}");
    }

    #[test]
    fn what_hugging_faces_environment_has() {
        for (source, expected) in [
            // Blocks: the newline after a tag and the blanks before it go.
            ("  {% if true %}\na\n  {% endif %}\nb\n", "a\nb"),
            ("{% for m in messages %}{% if loop.index > 1 %}{% break %}{% endif %}{{ m.role }}{% endfor %}", "user"),
            ("{{ messages[0] | tojson }}", r#"{"role": "user", "content": "<a> 'b' & \\u003c \"ü\n"}"#.replace('\n', "\\n").as_str()),
            ("{{ {'a': [1, true, none]} | tojson(indent=1) }}", "{\n \"a\": [\n  1,\n  true,\n  null\n ]\n}"),
            ("{{ tools is none }}{{ enable_thinking is defined }}{{ eos_token }}", "TrueFalse<eos>"),
            ("{{ messages[0].get('name', 'x') }}{{ messages[0].items() | length }}", "x2"),
            ("{% macro f(x) %}[{{ x }}]{% endmacro %}{{ f(messages[-1]['role'].upper()) }}", "[USER]"),
        ] {
            let text = render(source, &[("user", "<a> 'b' & \\u003c \"ü\n")], true);
            assert_eq!(text.unwrap(), expected, "{source}");
        }
        let year: i32 = render("{{ strftime_now('%Y') }}", &[], false).unwrap().parse().unwrap();
        assert!(year > 2000);
    }

    #[test]
    fn errors_are_one_line_and_work_is_bounded() {
        for (source, expected) in [
            ("\n{% if %}", "chat template, line 2: expected a template"),
            ("{{ raise_exception('a\nb') }}", "invalid operation: a b;"),
            ("{{ messages.x.y }}", "undefined value"),
            (
                "{% for a in range(9999) %}{% for b in range(9999) %}{% endfor %}{% endfor %}",
                "steps",
            ),
            ("{{ 'x' * 1000000000 }}", "steps"),
            ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "recursion"),
            (&"(".repeat(100_000), ""),
            (&format!("{{{{ {}", "(".repeat(100_000)), "recursion"),
        ] {
            match render(source, &[], true) {
                Ok(text) => assert_eq!(text, source),
                Err(error) => {
                    let error = error.to_string();
                    assert!(error.contains(expected) && !error.contains('\n'), "{error}");
                }
            }
        }
        let error = ChatTemplate::new(&"x".repeat(MAX_SOURCE_BYTES + 1), "", "").unwrap_err();
        assert!(error.to_string().contains("at most 1048576 bytes"), "{error}");
    }
}
