//! Dialogues as tokens: the prompt that opens one, and what follows a turn, so that no token is made twice.
//!
//! The tokens of a turn stay as they were sampled. What the chat template writes behind them up to the next turn is found by
//! rendering the conversation again: it begins with what is there already, or says the same with other blanks, and the rest
//! is appended; or the template writes what was said otherwise (without its thoughts, say), and a new segment begins.

use serde_json::{Value, json};

use super::{Encoder, tools};
use crate::data::ChatTemplate;
use crate::data::jsonl::shorten;
use crate::rollout::Answer;
use crate::{Error, Result};

/// A conversation with tools, and the text that its newest segment's tokens stand for.
#[derive(Debug, Clone)]
pub struct Conversation {
    entries: Vec<Entry>,
    tools: Vec<Value>,
    text: String,
    /// Roles that the template is known to write.
    roles: Vec<String>,
}

#[derive(Debug, Clone)]
enum Entry {
    /// What the environment says.
    Given(Value),
    /// A turn of the model, as it was said, and as it was read.
    Said { raw: Value, read: Value },
}

/// How the model's turns are given to the template.
#[derive(Debug, Clone, Copy)]
enum Style {
    /// The text as it was said, calls and thoughts in it.
    Raw,
    /// Content, calls and thoughts apart.
    Read,
}

impl Conversation {
    /// All messages so far, those of the model as they were read.
    pub fn messages(&self) -> impl Iterator<Item = &Value> {
        self.entries.iter().map(|entry| match entry {
            Entry::Given(message) | Entry::Said { read: message, .. } => message,
        })
    }

    /// A turn of the model that nothing follows.
    pub fn end(&mut self, raw: &str, read: Value) {
        self.entries.push(Entry::Said { raw: said(raw), read });
    }

    /// What the environment says last, that the model does not see.
    pub fn tell(&mut self, messages: Vec<Value>) {
        self.entries.extend(messages.into_iter().map(Entry::Given));
    }
}

impl Encoder<'_> {
    /// The conversation that these messages open, and its prompt.
    ///
    /// # Errors
    /// A model without chat template, messages that it refuses, a role that it does not write.
    pub fn open(&self, messages: &[Value], tools: &[Value]) -> Result<(Conversation, Vec<i32>)> {
        let mut conversation = Conversation {
            entries: self.under_system(messages).into_iter().map(Entry::Given).collect(),
            tools: tools.to_vec(),
            text: String::new(),
            roles: vec!["assistant".into()],
        };
        let n = conversation.entries.len();
        conversation.text = self.written(&conversation, Style::Raw, n, true)?;
        self.check_roles(&mut conversation, Style::Raw, 0)?;
        let tokens = self.rendered(&conversation.text)?;
        if tokens.is_empty() {
            let advice = "let the environment say something";
            return Err(Error::invalid("the opening", "at least one token", "none", advice));
        }
        Ok((conversation, tokens))
    }

    /// What the model said, control tokens by name, without the token that ended it.
    pub fn said(&self, tokens: &[i32]) -> String {
        let vocab = self.model.engine().vocab();
        let end = tokens.last().is_some_and(|&t| vocab.is_eog(t)) as usize;
        vocab.text(&tokens[..tokens.len() - end], true)
    }

    /// What follows a turn of these `tokens`, which was read as the message `read`, when the environment answers with
    /// `messages`.
    ///
    /// # Errors
    /// Messages that the chat template refuses, a role that it does not write.
    pub fn go_on(
        &self,
        conversation: &mut Conversation,
        tokens: &[i32],
        read: Value,
        messages: Vec<Value>,
    ) -> Result<Answer> {
        let raw = self.said(tokens);
        let whole = conversation.text.clone() + &self.model.engine().vocab().text(tokens, true);
        conversation.entries.push(Entry::Said { raw: said(&raw), read });
        let told = conversation.entries.len();
        conversation.entries.extend(messages.into_iter().map(Entry::Given));
        let all = conversation.entries.len();
        let (mut anew, mut refused) = (None, None);
        for style in [Style::Raw, Style::Read] {
            let next = match self.written(conversation, style, all, true) {
                Ok(next) => next,
                Err(error) => {
                    refused.get_or_insert(error);
                    continue;
                }
            };
            self.check_roles(conversation, style, told)?;
            let more = match next.strip_prefix(&whole) {
                Some(more) => Some(more.to_string()),
                None => self.behind(
                    conversation,
                    style,
                    told,
                    &next,
                    &(conversation.text.clone() + &raw),
                ),
            };
            match more.filter(|more| !more.is_empty()) {
                Some(more) => {
                    let tokens = self.tokenize(&more, false)?;
                    conversation.text = whole + &more;
                    return Ok(Answer::Append(tokens));
                }
                None => drop(anew.get_or_insert(next)),
            }
        }
        match (anew, refused) {
            (Some(text), _) => {
                let tokens = self.rendered(&text)?;
                conversation.text = text;
                Ok(Answer::Anew(tokens))
            }
            (None, Some(error)) => Err(error),
            (None, None) => unreachable!("each style is written or refused"),
        }
    }

    /// What stands in `next` behind the turn that ends with entry `told`, if all up to there says what `has` does but for
    /// blanks.
    fn behind(
        &self,
        conversation: &Conversation,
        style: Style,
        told: usize,
        next: &str,
        has: &str,
    ) -> Option<String> {
        let before = self.written(conversation, style, told, false).ok()?;
        let end = |spelling: &String| {
            let at = before.rfind(spelling.as_str())?;
            let behind = at + spelling.len();
            before[behind..].trim().is_empty().then_some((at, behind))
        };
        let (said, end) = self.ends().iter().find_map(end).unwrap_or((before.len(), before.len()));
        let blank = |c: &char| !c.is_whitespace();
        let same = before[..said].chars().filter(blank).eq(has.chars().filter(blank));
        next.strip_prefix(&before[..end]).filter(|_| same).map(str::to_string)
    }

    /// Spellings of the tokens that end a turn.
    fn ends(&self) -> &[String] {
        self.ends.get_or_init(|| {
            let vocab = self.model.engine().vocab();
            let ends = (0..vocab.n_tokens() as i32).filter(|&t| vocab.is_eog(t));
            ends.map(|t| vocab.spelling(t)).filter(|s| !s.is_empty()).collect()
        })
    }

    fn chat_template(&self) -> Result<&ChatTemplate> {
        self.template.as_ref().ok_or_else(|| {
            let advice = "choose a --template such as qwen3 or plain, or a Jinja file";
            Error::invalid("--env", "a model with a chat template", "none", advice)
        })
    }

    /// The first `n` entries as the template writes them.
    fn written(&self, c: &Conversation, style: Style, n: usize, prompt: bool) -> Result<String> {
        let entries = c.entries[..n].iter().collect::<Vec<_>>();
        self.write(c, style, &entries, prompt)
    }

    fn write(
        &self,
        c: &Conversation,
        style: Style,
        entries: &[&Entry],
        prompt: bool,
    ) -> Result<String> {
        let template = self.chat_template()?;
        let message = |entry: &&Entry| match (entry, style) {
            (Entry::Given(message), _) => message.clone(),
            (Entry::Said { raw, .. }, Style::Raw) => raw.clone(),
            (Entry::Said { read, .. }, Style::Read) => read.clone(),
        };
        let messages: Vec<Value> = entries.iter().map(message).collect();
        tools::render(template, &messages, &c.tools, prompt)
    }

    /// Refuses roles, of entries from `from` on, that the template passes over without a word.
    fn check_roles(&self, c: &mut Conversation, style: Style, from: usize) -> Result<()> {
        let role = |entry: &Entry| match entry {
            Entry::Given(message) => message["role"].as_str().unwrap_or_default().to_string(),
            Entry::Said { .. } => "assistant".into(),
        };
        for i in from..c.entries.len() {
            let new = role(&c.entries[i]);
            if c.roles.contains(&new) {
                continue;
            }
            let all: Vec<&Entry> = c.entries.iter().collect();
            let others: Vec<&Entry> = c.entries.iter().filter(|e| role(e) != new).collect();
            let with = self.write(c, style, &all, true)?;
            // A template that cannot do without it writes it.
            if self.write(c, style, &others, true).is_ok_and(|without| without == with) {
                return Err(Error::invalid(
                    "a message of the environment",
                    "a role that the chat template writes",
                    format!("{:?}, of which it writes nothing", shorten(&new, 40)),
                    "use system, user or tool, or choose another --template",
                ));
            }
            c.roles.push(new);
        }
        Ok(())
    }
}

/// A turn as it was said.
fn said(raw: &str) -> Value {
    json!({"role": "assistant", "content": raw})
}
