//! `tojson`: Python's `json.dumps(x, ensure_ascii=False, indent=None, separators=None, sort_keys=False)`.

use minijinja::value::{Kwargs, Rest, ValueKind};
use minijinja::{State, Value};

use super::python::number;
use super::{Outcome, bind, charge, integer, refused, text};

/// Deepest nesting that is written; Python gives up at a thousand.
const MAX_DEPTH: usize = 200;

/// How to write.
struct Style {
    ensure_ascii: bool,
    indent: Option<String>,
    comma: String,
    colon: String,
    sort_keys: bool,
}

/// A value of JSON as templates see it.
pub fn from_json(json: &serde_json::Value) -> Value {
    use serde_json::Value as Json;
    match json {
        Json::Null => Value::from(()),
        Json::Bool(b) => Value::from(*b),
        Json::Number(n) => match (n.as_i64(), n.as_u64()) {
            (Some(n), _) => Value::from(n),
            (None, Some(n)) => Value::from(n),
            (None, None) => Value::from(n.as_f64().unwrap_or(f64::NAN)),
        },
        Json::String(s) => Value::from(s.as_str()),
        Json::Array(list) => list.iter().map(from_json).collect::<Vec<_>>().into(),
        Json::Object(fields) => {
            Value::from_pairs(fields.iter().map(|(k, v)| (k.clone(), from_json(v))))
        }
    }
}

/// The filter.
pub(super) fn tojson(state: &State, value: &Value, args: Rest<Value>, kwargs: Kwargs) -> Outcome {
    let names = ["ensure_ascii", "indent", "separators", "sort_keys"];
    let given = bind(&args, &kwargs, names)?;
    let [ensure_ascii, indent, separators, sort_keys] = given.map(|v| v.filter(|v| !v.is_none()));
    let is_true = |value: Option<Value>| value.is_some_and(|value| value.is_true());
    let indent = match indent {
        None => None,
        Some(blank) if blank.as_str().is_some() => Some(text(&blank)?.to_owned()),
        Some(width) => Some(" ".repeat(integer(&width)?.clamp(0, 64) as usize)),
    };
    let (comma, colon) = match separators {
        None => (if indent.is_some() { "," } else { ", " }.to_owned(), ": ".to_owned()),
        Some(pair) => {
            let part = |i| text(&pair.get_item_by_index(i)?).map(str::to_owned);
            (part(0)?, part(1)?)
        }
    };
    let (ensure_ascii, sort_keys) = (is_true(ensure_ascii), is_true(sort_keys));
    let style = Style { ensure_ascii, indent, comma, colon, sort_keys };
    let mut out = String::new();
    style.write(state, value, 0, &mut out)?;
    Ok(out.into())
}

impl Style {
    fn write(&self, state: &State, value: &Value, depth: usize, out: &mut String) -> Outcome<()> {
        if depth > MAX_DEPTH {
            return Err(refused("JSON nested too deeply"));
        }
        state.consume_fuel(1)?;
        match value.kind() {
            ValueKind::None => out.push_str("null"),
            ValueKind::Bool => out.push_str(if value.is_true() { "true" } else { "false" }),
            ValueKind::Number => out.push_str(&self.number(value)),
            ValueKind::String => {
                charge(state, text(value)?.len())?;
                self.quote(text(value)?, out);
            }
            ValueKind::Seq => {
                let items = value.try_iter()?.checked();
                self.list(state, '[', ']', depth, out, items, |item, out| {
                    self.write(state, &item?, depth + 1, out)
                })?;
            }
            ValueKind::Map => {
                let mut pairs = Vec::new();
                for key in value.try_iter()? {
                    let value = value.get_item(&key)?;
                    // Keys that are one in JSON: the last of Python's counts.
                    let key = self.key(&key)?;
                    match pairs.iter_mut().find(|(k, _)| *k == key) {
                        Some((_, old)) => *old = value,
                        None => pairs.push((key, value)),
                    }
                }
                if self.sort_keys {
                    pairs.sort_by(|a, b| a.0.cmp(&b.0));
                }
                self.list(state, '{', '}', depth, out, pairs.into_iter(), |(key, value), out| {
                    self.quote(&key, out);
                    out.push_str(&self.colon);
                    self.write(state, &value, depth + 1, out)
                })?;
            }
            other => return Err(refused(format!("{other} is not JSON serializable"))),
        }
        Ok(())
    }

    /// Brackets around items, each on a line of its own where there is an indent.
    #[allow(clippy::too_many_arguments)]
    fn list<T>(
        &self,
        state: &State,
        open: char,
        close: char,
        depth: usize,
        out: &mut String,
        items: impl Iterator<Item = T>,
        mut write: impl FnMut(T, &mut String) -> Outcome<()>,
    ) -> Outcome<()> {
        let line = |depth: usize, out: &mut String| -> Outcome<()> {
            if let Some(indent) = &self.indent {
                charge(state, indent.len() * depth)?;
                out.push('\n');
                (0..depth).for_each(|_| out.push_str(indent));
            }
            Ok(())
        };
        out.push(open);
        let mut any = false;
        for item in items {
            if any {
                out.push_str(&self.comma);
            }
            line(depth + 1, out)?;
            write(item, out)?;
            any = true;
        }
        if any {
            line(depth, out)?;
        }
        out.push(close);
        Ok(())
    }

    fn number(&self, value: &Value) -> String {
        match &*number(value) {
            "nan" => "NaN".into(),
            "inf" => "Infinity".into(),
            "-inf" => "-Infinity".into(),
            finite => finite.into(),
        }
    }

    fn key(&self, key: &Value) -> Outcome<String> {
        Ok(match key.kind() {
            ValueKind::String => text(key)?.to_owned(),
            ValueKind::None => "null".into(),
            ValueKind::Bool => if key.is_true() { "true" } else { "false" }.into(),
            ValueKind::Number => self.number(key),
            other => return Err(refused(format!("{other} is no key of a JSON object"))),
        })
    }

    fn quote(&self, text: &str, out: &mut String) {
        out.push('"');
        for c in text.chars() {
            match c {
                '"' => out.push_str("\\\""),
                '\\' => out.push_str("\\\\"),
                '\n' => out.push_str("\\n"),
                '\r' => out.push_str("\\r"),
                '\t' => out.push_str("\\t"),
                '\u{8}' => out.push_str("\\b"),
                '\u{c}' => out.push_str("\\f"),
                c if (c as u32) < 0x20 || self.ensure_ascii && (c as u32) > 0x7e => {
                    for unit in c.encode_utf16(&mut [0; 2]) {
                        out.push_str(&format!("\\u{unit:04x}"));
                    }
                }
                c => out.push(c),
            }
        }
        out.push('"');
    }
}
