//! Prompts to tokens and completions to text: chat template and vocabulary.

mod answers;
mod dialogue;
mod tools;

use std::path::{Path, PathBuf};

use clap::Args;
use serde::{Deserialize, Serialize};

use crate::data::{ChatTemplate, HfTokenizer, Message, Prompt, Template, Tokenize, agree};
use crate::model::Model;
use crate::{Error, Result};

pub use answers::{Said, Turns};
pub use dialogue::Conversation;

/// How prompts become tokens.
#[derive(Clone, Debug, PartialEq, Args, Serialize, Deserialize)]
#[serde(default, rename_all = "kebab-case")]
pub struct PromptOptions {
    /// chat (the GGUF's own), qwen3, qwen3-no-think, octothinker, plain, or a Jinja file
    #[arg(
        long,
        default_value = "chat",
        value_name = "NAME|FILE",
        help_heading = "Data and reward"
    )]
    pub template: String,
    /// System message, in place of the one that a prompt brings along
    #[arg(long, value_name = "TEXT", help_heading = "Data and reward")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub system: Option<String>,
    /// tokenizer.json to encode with instead of the GGUF's vocabulary; refused where ids differ
    #[arg(long, value_name = "FILE", help_heading = "Data and reward")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tokenizer: Option<PathBuf>,
}

impl Default for PromptOptions {
    fn default() -> PromptOptions {
        crate::options::defaults()
    }
}

impl PromptOptions {
    /// What encodes prompts for the model.
    ///
    /// # Errors
    /// The template or the tokenizer cannot be read, or ids disagree.
    pub fn encoder<'m>(&self, model: &'m Model) -> Result<Encoder<'m>> {
        Encoder::new(model, self.tokenizer.as_deref(), self.system.clone())?
            .with_template(&Template::parse(&self.template)?)
    }
}

/// Turns prompts into tokens as the model expects them.
pub struct Encoder<'m> {
    model: &'m Model,
    template: Option<ChatTemplate>,
    tokenizer: Option<HfTokenizer>,
    system: Option<String>,
    /// Spellings of the tokens that end a turn, once they were wanted.
    ends: std::sync::OnceLock<Vec<String>>,
}

impl<'m> Encoder<'m> {
    /// Uses the GGUF's chat template and vocabulary; `tokenizer` (a tokenizer.json) replaces the
    /// vocabulary's encoder where both agree on ids. `system` goes before text prompts, and takes the place
    /// of a system message that a prompt brings along.
    ///
    /// # Errors
    /// The template or the tokenizer cannot be read, or ids disagree.
    pub fn new(
        model: &'m Model,
        tokenizer: Option<&Path>,
        system: Option<String>,
    ) -> Result<Encoder<'m>> {
        let vocab = model.engine().vocab();
        let template = match model.engine().chat_template() {
            Some(source) => Some(compile(model, &source)?),
            None => None,
        };
        let tokenizer = match tokenizer {
            Some(path) => {
                let tokenizer = HfTokenizer::open(path)?;
                let ids = (0..vocab.n_tokens() as i32).map(|t| (t, vocab.spelling(t)));
                agree(ids, &tokenizer)?;
                Some(tokenizer)
            }
            None => None,
        };
        Ok(Encoder { model, template, tokenizer, system, ends: std::sync::OnceLock::new() })
    }

    /// Renders prompts with another template than the GGUF's.
    ///
    /// # Errors
    /// It does not compile.
    pub fn with_template(mut self, template: &Template) -> Result<Encoder<'m>> {
        if let Template::Source { source, enable_thinking } = template {
            self.template = Some(compile(self.model, source)?.with_thinking(*enable_thinking));
        }
        Ok(self)
    }

    /// The model whose tokens these are.
    pub fn model(&self) -> &'m Model {
        self.model
    }

    /// Source of the chat template; empty where there is none.
    pub fn template_source(&self) -> &str {
        self.template.as_ref().map_or("", ChatTemplate::source)
    }

    /// Fixes the date that the chat template may write, in seconds of Unix time.
    pub fn set_now(&self, unix_s: i64) {
        self.template.iter().for_each(|template| template.set_now(unix_s));
    }

    /// Tokens of a prompt, cut from the left to `max_tokens` (PAPER section 2).
    ///
    /// Text becomes one user message where the model has a chat template, else it is taken as it is.
    ///
    /// # Errors
    /// Messages without a chat template, tokens or characters outside the vocabulary, an empty prompt.
    pub fn prompt(&self, prompt: &Prompt, max_tokens: usize) -> Result<Vec<i32>> {
        let mut tokens = match (prompt, &self.template) {
            (Prompt::Tokens(tokens), _) => {
                let vocab = self.model.engine().vocab();
                if let Some(bad) = tokens.iter().find(|&&t| !vocab.holds(t)) {
                    let expected = format!("token ids below {}", vocab.n_tokens());
                    let advice = "the tokens belong to another model";
                    return Err(Error::invalid("prompt", expected, bad.to_string(), advice));
                }
                tokens.clone()
            }
            (Prompt::Messages(messages), Some(template)) => match &self.system {
                Some(system) => {
                    let others = messages.iter().filter(|m| m.role != "system").cloned();
                    let first = Message { role: "system".into(), content: system.clone() };
                    self.chat(template, &std::iter::once(first).chain(others).collect::<Vec<_>>())?
                }
                None => self.chat(template, messages)?,
            },
            (Prompt::Messages(_), None) => {
                return Err(Error::invalid(
                    "prompt",
                    "text, for this model has no chat template",
                    "messages",
                    "give the prompt as one text, or choose a --template such as plain",
                ));
            }
            (Prompt::Text(text), Some(template)) => {
                let message = |role: &str, content: &str| Message {
                    role: role.into(),
                    content: content.into(),
                };
                let mut messages: Vec<_> =
                    self.system.iter().map(|system| message("system", system)).collect();
                messages.push(message("user", text));
                self.chat(template, &messages)?
            }
            (Prompt::Text(text), None) => {
                let text = match &self.system {
                    Some(system) => format!("{system}\n{text}"),
                    None => text.clone(),
                };
                self.tokenize(&text, true)?
            }
        };
        if tokens.is_empty() {
            return Err(Error::invalid("prompt", "at least one token", "none", "drop the row"));
        }
        tokens.drain(..tokens.len().saturating_sub(max_tokens));
        Ok(tokens)
    }

    /// Whether a prompt stays whole within `max_tokens`.
    ///
    /// # Errors
    /// Those of [`Encoder::prompt`].
    pub fn fits(&self, prompt: &Prompt, max_tokens: usize) -> Result<bool> {
        Ok(self.prompt(prompt, max_tokens.saturating_add(1))?.len() <= max_tokens)
    }

    fn chat(&self, template: &ChatTemplate, messages: &[Message]) -> Result<Vec<i32>> {
        let text = template.render(messages, true)?;
        let vocab = self.model.engine().vocab();
        // A template that writes BOS itself must not get a second one.
        let has_bos = vocab.bos().is_some_and(|bos| {
            let bos = vocab.spelling(bos);
            !bos.is_empty() && text.starts_with(&bos)
        });
        self.tokenize(&text, !has_bos)
    }

    /// Tokens of a text that the assistant goes on with: with BOS in front where the model wants it, and
    /// nothing behind, whatever the vocabulary would add there.
    fn tokenize(&self, text: &str, add_bos: bool) -> Result<Vec<i32>> {
        match &self.tokenizer {
            Some(tokenizer) => tokenizer.encode(text, add_bos, true),
            None => self.model.engine().vocab().tokenize(text, add_bos, true),
        }
    }

    /// Tokens of a completion's text: no BOS, control tokens read by name.
    pub fn completion(&self, text: &str) -> Result<Vec<i32>> {
        self.tokenize(text, false)
    }

    /// What a prompt asks, for people: its text, or its last message's.
    pub fn asked(&self, prompt: &Prompt) -> String {
        match prompt {
            Prompt::Text(text) => text.clone(),
            Prompt::Messages(messages) => {
                messages.last().map_or(String::new(), |message| message.content.clone())
            }
            Prompt::Tokens(tokens) => self.text(tokens),
        }
    }

    /// Text of tokens, control tokens left out.
    pub fn text(&self, tokens: &[i32]) -> String {
        self.model.engine().vocab().text(tokens, false)
    }
}

/// A chat template with the model's own special tokens.
fn compile(model: &Model, source: &str) -> Result<ChatTemplate> {
    let vocab = model.engine().vocab();
    let spelling = |token: Option<i32>| token.map_or(String::new(), |t| vocab.spelling(t));
    ChatTemplate::new(source, &spelling(vocab.bos()), &spelling(vocab.eos()))
}
