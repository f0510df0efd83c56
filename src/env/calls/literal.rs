//! Calls in the manner of Python, `name(key="value", n=3)`, and of Gemma, `call:name{key:VALUE}`.

use serde_json::{Map, Number, Value};

use super::Written;
use crate::data::jsonl::shorten;

/// Deepest nesting of lists and dictionaries.
const MAX_DEPTH: usize = 32;
/// What texts stand between; Gemma has tokens for it.
const QUOTES: [&str; 5] = ["<escape>", "<|\"|>", "\"\"\"", "\"", "'"];

/// `name(key=value, ..)`
pub(super) fn call(text: &str) -> Written {
    let wrong = || format!("{:?} is no call such as name(key=\"value\")", shorten(text.trim(), 60));
    let (name, rest) = text.trim().split_once('(').ok_or_else(wrong)?;
    arguments(name.trim(), rest, '=', ')').ok_or_else(wrong)
}

/// `call:name{key:VALUE, ..}`
pub(super) fn braced_call(text: &str) -> Written {
    let wrong =
        || format!("{:?} is no call such as call:name{{key:VALUE}}", shorten(text.trim(), 60));
    let body = text.trim().strip_prefix("call:").ok_or_else(wrong)?;
    let (name, rest) = body.split_once('{').ok_or_else(wrong)?;
    arguments(name.trim(), rest, ':', '}').ok_or_else(wrong)
}

fn arguments(
    name: &str,
    rest: &str,
    between: char,
    end: char,
) -> Option<(String, Map<String, Value>)> {
    let is_name = |name: &str| {
        let plain = |c: char| c.is_alphanumeric() || "_.-".contains(c);
        !name.is_empty() && name.chars().all(plain)
    };
    let mut reader = Reader { rest };
    let fields = reader.fields(between, end, 0)?;
    (is_name(name) && reader.rest.trim().is_empty()).then(|| (name.to_string(), fields))
}

struct Reader<'t> {
    rest: &'t str,
}

impl Reader<'_> {
    fn skip(&mut self) {
        self.rest = self.rest.trim_start();
    }

    fn takes(&mut self, word: &str) -> bool {
        self.skip();
        match self.rest.strip_prefix(word) {
            Some(rest) => {
                self.rest = rest;
                true
            }
            None => false,
        }
    }

    /// `key:value, ..` up to and with `end`.
    fn fields(&mut self, between: char, end: char, depth: usize) -> Option<Map<String, Value>> {
        let (mut fields, end) = (Map::new(), end.to_string());
        while !self.takes(&end) {
            if !fields.is_empty() && !self.takes(",") {
                return None;
            }
            if self.takes(&end) {
                break;
            }
            let key = match self.quoted() {
                Some(key) => key,
                None => self.word()?,
            };
            if !self.takes(&between.to_string()) {
                return None;
            }
            let value = self.value(depth + 1)?;
            fields.insert(key, value);
        }
        Some(fields)
    }

    fn value(&mut self, depth: usize) -> Option<Value> {
        if depth > MAX_DEPTH {
            return None;
        }
        self.skip();
        if let Some(text) = self.quoted() {
            return Some(Value::String(text));
        }
        if self.takes("{") {
            return self.fields(':', '}', depth).map(Value::Object);
        }
        if self.takes("[") {
            let mut list = Vec::new();
            while !self.takes("]") {
                if !list.is_empty() && !self.takes(",") {
                    return None;
                }
                if self.takes("]") {
                    break;
                }
                list.push(self.value(depth + 1)?);
            }
            return Some(Value::Array(list));
        }
        let word = self.word()?;
        Some(match word.as_str() {
            "true" | "True" => Value::Bool(true),
            "false" | "False" => Value::Bool(false),
            "null" | "None" => Value::Null,
            number => match number.parse::<i64>() {
                Ok(n) => n.into(),
                Err(_) => Value::Number(Number::from_f64(number.parse().ok()?)?),
            },
        })
    }

    fn word(&mut self) -> Option<String> {
        self.skip();
        let part = |c: char| c.is_alphanumeric() || "_.+-".contains(c);
        let end = self.rest.find(|c| !part(c)).unwrap_or(self.rest.len());
        let (word, rest) = self.rest.split_at(end);
        self.rest = rest;
        (!word.is_empty()).then(|| word.to_string())
    }

    fn quoted(&mut self) -> Option<String> {
        self.skip();
        let quote = QUOTES.into_iter().find(|quote| self.rest.starts_with(quote))?;
        let body = &self.rest[quote.len()..];
        // A backslash means nothing between Gemma's own marks.
        let escapes = !quote.starts_with('<');
        let (mut text, mut at) = (String::new(), 0);
        while at < body.len() {
            if body[at..].starts_with(quote) {
                self.rest = &body[at + quote.len()..];
                return Some(text);
            }
            let mut chars = body[at..].chars();
            let c = chars.next()?;
            at += c.len_utf8();
            if c == '\\' && escapes {
                let next = chars.next()?;
                at += next.len_utf8();
                text.push(match next {
                    'n' => '\n',
                    't' => '\t',
                    'r' => '\r',
                    other => other,
                });
                continue;
            }
            text.push(c);
        }
        None
    }
}
