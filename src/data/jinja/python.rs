//! How Python prints values, and the methods of lists, tuples, dictionaries and numbers.

use minijinja::value::{Kwargs, ValueKind, from_args};
use minijinja::{Error, ErrorKind, Output, State, Value};

use super::{Outcome, bind, charge, refused, strings, text};

/// Deepest nesting that is printed; Python gives up at a thousand.
const MAX_DEPTH: usize = 200;

/// A method that minijinja does not know itself.
pub(super) fn method(state: &mut State, value: &Value, name: &str, args: &[Value]) -> Outcome {
    if let Some(text) = value.as_str() {
        return strings::method(state, text, name, args);
    }
    let (given, kwargs): (&[Value], Kwargs) = from_args(args)?;
    match (value.kind(), name) {
        (ValueKind::Seq | ValueKind::Map, "copy") => {
            let [] = bind(given, &kwargs, [])?;
            Ok(value.clone())
        }
        (ValueKind::Seq, "index") => {
            let [item] = bind(given, &kwargs, ["value"])?;
            let item = item.ok_or_else(|| Error::from(ErrorKind::MissingArgument))?;
            let at = value.try_iter()?.position(|other| other == item);
            at.map(Value::from).ok_or_else(|| refused("it is not in the list"))
        }
        (ValueKind::Number, "is_integer") => {
            let [] = bind(given, &kwargs, [])?;
            Ok(f64::try_from(value.clone())?.fract().eq(&0.0).into())
        }
        (ValueKind::Number, "bit_length") if value.is_integer() => {
            let [] = bind(given, &kwargs, [])?;
            let n = i128::try_from(value.clone())?.unsigned_abs();
            Ok((128 - n.leading_zeros()).into())
        }
        _ => minijinja_contrib::pycompat::unknown_method_callback(state, value, name, args),
    }
}

/// Writes a value as `{{ }}` does.
pub(super) fn write(out: &mut Output, state: &mut State, value: &Value) -> Outcome<()> {
    match value.kind() {
        ValueKind::Number | ValueKind::Seq | ValueKind::Map => {
            let text = string(state, value)?;
            out.write_str(&text).map_err(|e| Error::from(ErrorKind::WriteFailure).with_source(e))
        }
        _ => minijinja::escape_formatter(out, state, value),
    }
}

/// Python's `str(value)`.
pub(super) fn string(state: &State, value: &Value) -> Outcome<String> {
    match value.as_str() {
        Some(text) => Ok(text.to_owned()),
        None => repr(state, value),
    }
}

/// Python's `repr(value)`.
pub(super) fn repr(state: &State, value: &Value) -> Outcome<String> {
    let mut out = String::new();
    write_repr(state, value, 0, &mut out)?;
    Ok(out)
}

fn write_repr(state: &State, value: &Value, depth: usize, out: &mut String) -> Outcome<()> {
    if depth > MAX_DEPTH {
        return Err(refused("a value nested too deeply"));
    }
    state.consume_fuel(1)?;
    match value.kind() {
        ValueKind::String => {
            charge(state, text(value)?.len())?;
            quote(text(value)?, out);
        }
        ValueKind::Number => out.push_str(&number(value)),
        ValueKind::Map => {
            out.push('{');
            for (i, key) in value.try_iter()?.enumerate() {
                if i > 0 {
                    out.push_str(", ");
                }
                write_repr(state, &key, depth + 1, out)?;
                out.push_str(": ");
                write_repr(state, &value.get_item(&key)?, depth + 1, out)?;
            }
            out.push('}');
        }
        ValueKind::Seq => {
            let tuple = value.is_tuple();
            out.push(if tuple { '(' } else { '[' });
            let mut n = 0;
            for item in value.try_iter()? {
                if n > 0 {
                    out.push_str(", ");
                }
                write_repr(state, &item, depth + 1, out)?;
                n += 1;
            }
            if tuple && n == 1 {
                out.push(',');
            }
            out.push(if tuple { ')' } else { ']' });
        }
        _ => {
            let text = value.to_string();
            charge(state, text.len())?;
            out.push_str(&text);
        }
    }
    Ok(())
}

/// A text in quotes: single ones, unless it has those alone.
fn quote(text: &str, out: &mut String) {
    let mark = if text.contains('\'') && !text.contains('"') { '"' } else { '\'' };
    out.push(mark);
    for c in text.chars() {
        match c {
            '\\' => out.push_str("\\\\"),
            '\n' => out.push_str("\\n"),
            '\r' => out.push_str("\\r"),
            '\t' => out.push_str("\\t"),
            c if c == mark => out.extend(['\\', c]),
            c if strings::is_printable(c) => out.push(c),
            c => {
                let code = c as u32;
                out.push_str(&match code {
                    0..=0xff => format!("\\x{code:02x}"),
                    0x100..=0xffff => format!("\\u{code:04x}"),
                    _ => format!("\\U{code:08x}"),
                });
            }
        }
    }
    out.push(mark);
}

/// A number as Python prints it: the shortest digits that read back as the same double, with an exponent
/// below 1e-4 and from 1e16 on.
pub(super) fn number(value: &Value) -> String {
    if value.is_integer() {
        return value.to_string();
    }
    let Ok(x) = f64::try_from(value.clone()) else { return value.to_string() };
    if x.is_nan() || x.is_infinite() {
        let sign = if x == f64::NEG_INFINITY { "-" } else { "" };
        return format!("{sign}{}", if x.is_nan() { "nan" } else { "inf" });
    }
    if x != 0.0 && !(1e-4..1e16).contains(&x.abs()) {
        let text = format!("{x:e}");
        let (digits, exponent) = text.split_once('e').expect("an exponent");
        let exponent: i32 = exponent.parse().expect("a number");
        let sign = if exponent < 0 { '-' } else { '+' };
        return format!("{digits}e{sign}{:02}", exponent.abs());
    }
    let text = x.to_string();
    if text.contains('.') { text } else { text + ".0" }
}
