//! Prompt templates by name, for models whose file has none, or another than the experiment wants.
//!
//! | name | prompt |
//! |---|---|
//! | `chat` | the GGUF's own chat template |
//! | `qwen3` | Qwen3's ChatML, the model thinks first |
//! | `qwen3-no-think` | the same with an empty `<think></think>` block: thinking is off (PAPER section 4) |
//! | `octothinker` | `User: .. Assistant:` in plain text, asking for `\boxed{}` (PAPER section 4) |
//! | `plain` | the messages' texts, a line break between |
//!
//! Anything else is a file with a Jinja template.

use std::{fs::File, io::Read, path::Path};

use crate::{Error, Result};

/// The names, for messages.
pub const NAMES: &str = "chat, qwen3, qwen3-no-think, octothinker, plain, or a Jinja file";

/// Longest template file, in bytes.
const MAX_BYTES: u64 = 1 << 20;

const PLAIN: &str = "{%- for m in messages -%}{{ m.content }}{% if not loop.last %}{{ '\\n' }}{% endif %}{%- endfor -%}";

/// ChatML as Qwen3 writes it: no system message of its own, thoughts cut from earlier answers.
const QWEN3: &str = r"{%- for m in messages %}
    {%- set text = m.content %}
    {%- if m.role == 'assistant' and '</think>' in text %}
        {%- set text = text.split('</think>')[-1].lstrip('\n') %}
    {%- endif %}
    {{- '<|im_start|>' + m.role + '\n' + text + '<|im_end|>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' }}
    {%- if not (enable_thinking | default(true)) %}
        {{- '<think>\n\n</think>\n\n' }}
    {%- endif %}
{%- endif %}";

const OCTOTHINKER: &str = r"{%- set ns = namespace(system='', asked=false) %}
{%- for m in messages %}
    {%- if m.role == 'system' %}
        {%- set ns.system = m.content %}
    {%- endif %}
    {%- if '\\boxed' in m.content %}
        {%- set ns.asked = true %}
    {%- endif %}
{%- endfor %}
{%- if ns.system %}
    {{- ns.system + '\n\n' }}
{%- endif %}
{%- for m in messages %}
    {%- if m.role == 'user' %}
        {{- 'User: ' + m.content }}
        {%- if loop.last and not ns.asked %}
            {{- '\nPlease reason step by step, and put your final answer within \\boxed{}.' }}
        {%- endif %}
        {{- '\n' }}
    {%- elif m.role == 'assistant' %}
        {{- 'Assistant: ' + m.content + '\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- 'Assistant:' }}
{%- endif %}";

/// Where a prompt's text comes from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Template {
    /// The GGUF's own.
    Model,
    /// This Jinja source, with `enable_thinking` where it is set.
    Source {
        /// Jinja.
        source: String,
        /// Qwen3's switch.
        enable_thinking: Option<bool>,
    },
}

impl Template {
    /// A name of the table above, or a file.
    ///
    /// # Errors
    /// The file cannot be read, is longer than 1 MiB or not UTF-8.
    pub fn parse(name: &str) -> Result<Template> {
        let built_in = |source: &str, enable_thinking| Template::Source {
            source: source.into(),
            enable_thinking,
        };
        Ok(match name {
            "chat" => Template::Model,
            "qwen3" => built_in(QWEN3, None),
            "qwen3-no-think" => built_in(QWEN3, Some(false)),
            "octothinker" => built_in(OCTOTHINKER, None),
            "plain" => built_in(PLAIN, None),
            file => built_in(&read(file)?, None),
        })
    }
}

fn read(name: &str) -> Result<String> {
    let path = Path::new(name);
    if !path.exists() {
        return Err(Error::Unsupported {
            what: "template",
            got: name.into(),
            supported: NAMES.into(),
        });
    }
    let file = File::open(path).map_err(Error::io("read", path))?;
    let mut bytes = Vec::new();
    file.take(MAX_BYTES + 1).read_to_end(&mut bytes).map_err(Error::io("read", path))?;
    if bytes.len() as u64 > MAX_BYTES {
        let expected = format!("a template of at most {MAX_BYTES} bytes");
        return Err(Error::invalid(name, expected, "a longer file", "give another file"));
    }
    String::from_utf8(bytes).map_err(|e| {
        let got = format!("an invalid byte at {}", e.utf8_error().valid_up_to());
        Error::invalid(name, "UTF-8", got, "convert the file to UTF-8")
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::{ChatTemplate, Message};

    fn render(name: &str, turns: &[(&str, &str)]) -> String {
        let Template::Source { source, enable_thinking } = Template::parse(name).unwrap() else {
            panic!("{name} is the model's")
        };
        let messages: Vec<_> = turns
            .iter()
            .map(|(role, content)| Message { role: (*role).into(), content: (*content).into() })
            .collect();
        let template = ChatTemplate::new(&source, "", "").unwrap().with_thinking(enable_thinking);
        template.render(&messages, true).unwrap()
    }

    #[test]
    fn names_render_what_the_models_were_trained_with() {
        let turns = [("system", "S"), ("user", "Q")];
        let chatml = "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nQ<|im_end|>\n<|im_start|>assistant\n";
        assert_eq!(render("qwen3", &turns), chatml);
        assert_eq!(render("qwen3-no-think", &turns), format!("{chatml}<think>\n\n</think>\n\n"));
        assert_eq!(render("plain", &turns), "S\nQ");
        assert_eq!(
            render("octothinker", &turns[1..]),
            "User: Q\nPlease reason step by step, and put your final answer within \\boxed{}.\nAssistant:"
        );
        let asked = [("system", "Use \\boxed{}."), ("user", "Q")];
        assert_eq!(render("octothinker", &asked), "Use \\boxed{}.\n\nUser: Q\nAssistant:");
        let history = [("user", "a"), ("assistant", "<think>\nx\n</think>\n\nb"), ("user", "c")];
        assert!(render("qwen3", &history).contains("<|im_start|>assistant\nb<|im_end|>"));
    }

    #[test]
    fn files_are_read_and_others_named() {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        std::io::Write::write_all(&mut file, b"[{{ messages[0].content }}]").unwrap();
        assert_eq!(render(file.path().to_str().unwrap(), &[("user", "Q")]), "[Q]");
        std::io::Write::write_all(&mut file, b"\xff").unwrap();
        let error = Template::parse(file.path().to_str().unwrap()).unwrap_err().to_string();
        assert!(error.contains("expected UTF-8, got an invalid byte at 27"), "{error}");
        let error = Template::parse("fancy").unwrap_err().to_string();
        assert!(
            error.contains("template 'fancy' is not supported; supported: chat, qwen3"),
            "{error}"
        );
    }
}
