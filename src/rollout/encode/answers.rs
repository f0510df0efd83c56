//! What an assistant says, as tokens to learn: the chat template around it, and the token that ends its turn.

use clap::ValueEnum;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::{Encoder, tools};
use crate::data::{Chat, ChatTemplate, Prompt, speaks};
use crate::{Error, Result};

/// Which turns of a conversation are learnt.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Turns {
    /// All of the assistant's.
    All,
    /// The assistant's last one.
    Last,
}

/// A run of tokens after a prompt, some of which are to be learnt.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Said {
    /// Tokens before the first one to be learnt, not empty.
    pub prompt: Vec<i32>,
    /// The tokens after them, the last of which is to be learnt.
    pub tokens: Vec<i32>,
    /// Which of them are the assistant's.
    pub learnt: Vec<bool>,
}

impl Said {
    fn whole(prompt: Vec<i32>, tokens: Vec<i32>) -> Said {
        let learnt = vec![true; tokens.len()];
        Said { prompt, tokens, learnt }
    }
}

/// A turn of the assistant: the text before it, what it says up to the end of its turn, its tokens.
struct Turn {
    opened: String,
    said: String,
    tokens: Vec<i32>,
}

impl Encoder<'_> {
    /// Tokens of an answer's text to a prompt, up to and including the token that ends the assistant's turn: what
    /// [`Encoder::prompt`] is to be followed by.
    ///
    /// # Errors
    /// Those of [`Encoder::prompt`].
    pub fn answer(&self, prompt: &Prompt, text: &str) -> Result<Vec<i32>> {
        let said = |role: &str, content: &str| json!({"role": role, "content": content});
        let messages: Vec<Value> = match prompt {
            Prompt::Messages(messages) => {
                messages.iter().map(|m| said(&m.role, &m.content)).collect()
            }
            Prompt::Text(text) => vec![said("user", text)],
            Prompt::Tokens(_) => Vec::new(),
        };
        match &self.template {
            Some(template) if !messages.is_empty() => {
                let mut messages = self.under_system(&messages);
                messages.push(said("assistant", text));
                Ok(self.turn(template, &messages, &[])?.tokens)
            }
            _ => self.ended(self.tokenize(text, false)?),
        }
    }

    /// The assistant's turns of a conversation: one run of tokens where each turn's prompt begins with what was said
    /// before, else (a template that takes earlier thoughts out, say) one for each turn.
    ///
    /// # Errors
    /// A model without chat template, and those of [`Encoder::prompt`].
    pub fn conversation(&self, chat: &Chat, turns: Turns) -> Result<Vec<Said>> {
        let Some(template) = &self.template else {
            return Err(Error::invalid(
                "messages",
                "rows of `prompt` and `completion` or `text`, for this model has no chat template",
                "messages",
                "give the rows as text, or choose a --template",
            ));
        };
        let messages = self.under_system(&chat.messages);
        let mut answers: Vec<usize> =
            (1..messages.len()).filter(|&i| speaks(&messages[i])).collect();
        if turns == Turns::Last {
            answers.drain(..answers.len().saturating_sub(1));
        }
        let turns = answers.iter().map(|&i| self.turn(template, &messages[..=i], &chat.tools));
        let turns: Vec<Turn> = turns.collect::<Result<_>>()?;
        let mut runs: Vec<Said> = Vec::new();
        let mut before: Option<&Turn> = None;
        for turn in &turns {
            let between = before.and_then(|b| {
                turn.opened.strip_prefix(b.opened.as_str())?.strip_prefix(b.said.as_str())
            });
            match (between, runs.last_mut()) {
                (Some(between), Some(run)) => {
                    let between = self.tokenize(between, false)?;
                    run.learnt.extend(between.iter().map(|_| false));
                    run.learnt.extend(turn.tokens.iter().map(|_| true));
                    run.tokens.extend(between.iter().chain(&turn.tokens));
                }
                _ => {
                    let prompt = self.rendered(&turn.opened)?;
                    runs.push(Said::whole(prompt, turn.tokens.clone()));
                }
            }
            before = Some(turn);
        }
        match runs.is_empty() {
            true => Err(Error::invalid("messages", "an answer", "none", "drop the row")),
            false => Ok(runs),
        }
    }

    /// Text, all of which is learnt but its first token; the end of it, too.
    ///
    /// # Errors
    /// Characters outside the vocabulary, or less than one token.
    pub fn plain(&self, text: &str) -> Result<Said> {
        let mut prompt = self.ended(self.tokenize(text, true)?)?;
        if prompt.len() < 2 {
            let got = prompt.len().to_string();
            return Err(Error::invalid("text", "two tokens at least", got, "drop the row"));
        }
        let tokens = prompt.split_off(1);
        Ok(Said::whole(prompt, tokens))
    }

    /// The turn that is the last of these messages.
    fn turn(&self, template: &ChatTemplate, messages: &[Value], given: &[Value]) -> Result<Turn> {
        let (answer, before) = messages.split_last().expect("a turn");
        let opened = tools::render(template, before, given, true)?;
        let whole = tools::render(template, messages, given, false)?;
        // A template need not write an answer as it opens one; then the text alone is what is said.
        let mut said = match whole.strip_prefix(&opened) {
            Some(said) => said.to_string(),
            None if answer.get("tool_calls").is_some() && template.knows_tools() => {
                return Err(Error::invalid(
                    "messages",
                    "a template that writes a turn with calls as it opens one",
                    "another beginning",
                    "choose another --template",
                ));
            }
            None => tools::spoken(answer),
        };
        let vocab = self.model.engine().vocab();
        let mut tokens = self.tokenize(&said, false)?;
        // What the template writes after the end of the turn is nobody's.
        if let Some(end) = tokens.iter().rposition(|&t| vocab.is_eog(t)) {
            let spelling = vocab.spelling(tokens[end]);
            if let Some(at) = said.rfind(&spelling).filter(|_| !spelling.is_empty()) {
                said.truncate(at + spelling.len());
            }
            tokens.truncate(end + 1);
        }
        Ok(Turn { opened, said, tokens: self.ended(tokens)? })
    }

    /// Tokens with the end of a turn behind them.
    fn ended(&self, mut tokens: Vec<i32>) -> Result<Vec<i32>> {
        let vocab = self.model.engine().vocab();
        if !tokens.last().is_some_and(|&t| vocab.is_eog(t)) {
            tokens.extend(vocab.eos());
        }
        Ok(tokens)
    }

    /// Tokens of a text that a template made.
    pub(super) fn rendered(&self, text: &str) -> Result<Vec<i32>> {
        let vocab = self.model.engine().vocab();
        let has_bos = vocab.bos().is_some_and(|bos| {
            let bos = vocab.spelling(bos);
            !bos.is_empty() && text.starts_with(&bos)
        });
        self.tokenize(text, !has_bos)
    }

    /// Messages under the encoder's own system message, where it has one.
    pub(super) fn under_system(&self, messages: &[Value]) -> Vec<Value> {
        match &self.system {
            Some(system) => {
                let first = json!({"role": "system", "content": system});
                let others = messages.iter().filter(|m| m["role"] != "system").cloned();
                std::iter::once(first).chain(others).collect()
            }
            None => messages.to_vec(),
        }
    }
}
