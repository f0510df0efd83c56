//! The chat template of a model: Jinja, as Hugging Face's `apply_chat_template` renders it.
//!
//! The environment is that of `transformers/utils/chat_template_utils.py`: `trim_blocks` and `lstrip_blocks`
//! on, loop controls, Python's string and dictionary methods, `raise_exception`, `strftime_now`, and a
//! `tojson` that leaves `<`, `>`, `&` and `'` as they are. Templates see `messages`, `bos_token`, `eos_token`,
//! `add_generation_prompt`, `tools` and `documents` (none), and `enable_thinking` where it was set.
//!
//! Departures: dates are UTC; the `{% generation %}` tag is not known.

use std::sync::Arc;
use std::sync::atomic::{AtomicI64, Ordering};
use std::time::{SystemTime, UNIX_EPOCH};

use minijinja::{
    Environment, Error as JinjaError, ErrorKind, Value,
    syntax::SyntaxConfig,
    value::{Kwargs, ValueKind},
};

use super::{Message, jsonl::shorten};
use crate::{Error, Result};

/// Work one rendering may do: instructions, and one more for each 64 bytes that it makes.
const FUEL: u64 = 2_000_000;
/// Longest template, in bytes. The longest in use are some 20 kB.
const MAX_SOURCE_BYTES: usize = 1 << 20;
/// Longest rendered prompt, in bytes.
const MAX_OUTPUT_BYTES: usize = 32 << 20;
const NAME: &str = "template";

/// A compiled chat template.
#[derive(Debug, Clone)]
pub struct ChatTemplate {
    environment: Environment<'static>,
    bos_token: String,
    eos_token: String,
    enable_thinking: Option<bool>,
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
        let mut environment = Environment::new();
        let syntax = SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build();
        let syntax = syntax.map_err(|e| failed(&e))?;
        environment.set_syntax(syntax);
        environment.set_fuel(Some(FUEL));
        environment
            .set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
        environment.add_function("raise_exception", raise_exception);
        let now = Arc::new(AtomicI64::new(-1));
        let fixed = now.clone();
        environment.add_function("strftime_now", move |format: &str| {
            let now = fixed.load(Ordering::Relaxed);
            strftime(format, if now < 0 { unix_now_s() } else { now })
        });
        environment.add_filter("tojson", tojson);
        environment.add_template_owned(NAME, source.to_owned()).map_err(|e| failed(&e))?;
        Ok(ChatTemplate {
            environment,
            bos_token: bos_token.into(),
            eos_token: eos_token.into(),
            enable_thinking: None,
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

    /// The text of a conversation; with `add_generation_prompt` it ends where the assistant begins.
    pub fn render(&self, messages: &[Message], add_generation_prompt: bool) -> Result<String> {
        let messages = messages.iter().map(|message| {
            Value::from_pairs([("role", &*message.role), ("content", &*message.content)])
        });
        let mut variables = vec![
            ("messages", messages.collect::<Vec<_>>().into()),
            ("bos_token", Value::from(&*self.bos_token)),
            ("eos_token", Value::from(&*self.eos_token)),
            ("add_generation_prompt", add_generation_prompt.into()),
            ("tools", ().into()),
            ("documents", ().into()),
        ];
        variables.extend(self.enable_thinking.map(|on| ("enable_thinking", on.into())));
        let template = self.environment.get_template(NAME).map_err(|e| failed(&e))?;
        let text = template.render(Value::from_pairs(variables)).map_err(|e| failed(&e))?;
        if text.len() > MAX_OUTPUT_BYTES {
            let expected = format!("at most {MAX_OUTPUT_BYTES} bytes of prompt");
            let got = text.len().to_string();
            return Err(Error::invalid("chat template", expected, got, "shorten the messages"));
        }
        Ok(text)
    }
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

fn raise_exception(message: &str) -> std::result::Result<Value, JinjaError> {
    Err(JinjaError::new(ErrorKind::InvalidOperation, message.to_owned()))
}

/// minijinja's `tojson` escapes for HTML; Hugging Face's is plain `json.dumps(ensure_ascii=False)`.
fn tojson(
    value: &Value,
    indent: Option<Value>,
    arguments: Kwargs,
) -> std::result::Result<Value, JinjaError> {
    if value.kind() == ValueKind::Undefined {
        return Err(JinjaError::new(ErrorKind::UndefinedError, "tojson of an undefined value"));
    }
    let escaped = minijinja::filters::tojson(value, indent, arguments)?.to_string();
    let mut plain = String::with_capacity(escaped.len());
    let mut rest = escaped.as_str();
    while let Some(start) = rest.find('\\') {
        plain.push_str(&rest[..start]);
        rest = &rest[start..];
        let (text, used) = match rest.as_bytes() {
            [b'\\', b'u', b'0', b'0', b'3', b'c', ..] => ("<", 6),
            [b'\\', b'u', b'0', b'0', b'3', b'e', ..] => (">", 6),
            [b'\\', b'u', b'0', b'0', b'2', b'6', ..] => ("&", 6),
            [b'\\', b'u', b'0', b'0', b'2', b'7', ..] => ("'", 6),
            _ => (&rest[..rest.len().min(2)], rest.len().min(2)),
        };
        plain.push_str(text);
        rest = &rest[used..];
    }
    plain.push_str(rest);
    Ok(plain.into())
}

/// Seconds of Unix time; 0 with a clock before 1970.
pub fn unix_now_s() -> i64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |now| now.as_secs() as i64)
}

/// C's `strftime` in UTC, for the fields that templates use; others stay as written.
fn strftime(format: &str, unix_s: i64) -> String {
    const DAYS: [&str; 7] =
        ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"];
    const MONTHS: [&str; 12] = [
        "January",
        "February",
        "March",
        "April",
        "May",
        "June",
        "July",
        "August",
        "September",
        "October",
        "November",
        "December",
    ];
    let (days, seconds) = (unix_s.div_euclid(86_400), unix_s.rem_euclid(86_400));
    let (year, month, day) = civil(days);
    let weekday = DAYS[(days + 3).rem_euclid(7) as usize];
    let month_name = MONTHS[month as usize - 1];
    let mut text = String::new();
    let mut characters = format.chars();
    while let Some(character) = characters.next() {
        if character != '%' {
            text.push(character);
            continue;
        }
        match characters.next() {
            Some('Y') => text += &year.to_string(),
            Some('y') => text += &format!("{:02}", year.rem_euclid(100)),
            Some('m') => text += &format!("{month:02}"),
            Some('d') => text += &format!("{day:02}"),
            Some('B') => text += month_name,
            Some('b') => text += &month_name[..3],
            Some('A') => text += weekday,
            Some('a') => text += &weekday[..3],
            Some('H') => text += &format!("{:02}", seconds / 3600),
            Some('M') => text += &format!("{:02}", seconds / 60 % 60),
            Some('S') => text += &format!("{:02}", seconds % 60),
            Some('%') | None => text.push('%'),
            Some(other) => text.extend(['%', other]),
        }
    }
    text
}

/// Year, month and day of a day counted from 1970-01-01, in the Gregorian calendar.
///
/// Howard Hinnant, "chrono-Compatible Low-Level Date Algorithms", `civil_from_days`.
fn civil(days: i64) -> (i64, i64, i64) {
    let z = days + 719_468;
    let era = z.div_euclid(146_097);
    let day_of_era = z.rem_euclid(146_097);
    let year_of_era =
        (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let shifted = (5 * day_of_year + 2) / 153; // 0 is March
    let month = if shifted < 10 { shifted + 3 } else { shifted - 9 };
    let year = year_of_era + era * 400 + i64::from(month <= 2);
    (year, month, day_of_year - (153 * shifted + 2) / 5 + 1)
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
    fn dates() {
        for (unix_s, expected) in [
            (0, "Thu 01 Jan 1970 00:00:00 70 % %q"),
            (951_782_400, "Tue 29 Feb 2000 00:00:00 00 % %q"),
            (1_721_995_199, "Fri 26 Jul 2024 11:59:59 24 % %q"),
            (-1, "Wed 31 Dec 1969 23:59:59 69 % %q"),
        ] {
            assert_eq!(strftime("%a %d %b %Y %H:%M:%S %y %% %q", unix_s), expected);
        }
        assert_eq!(strftime("%A, %B %m%", 1_721_995_199), "Friday, July 07%");
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
