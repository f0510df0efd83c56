//! Jinja's filters and tests where minijinja's differ or are not there.

use minijinja::value::{Kwargs, Rest, ValueKind};
use minijinja::{Environment, State, Value, filters as known};
use minijinja_contrib::filters as contrib;

use super::{Outcome, bind, charge, format, integer, json, python, refused, strings, text};

pub(super) fn add(environment: &mut Environment) {
    environment.add_filter("tojson", json::tojson);
    environment.add_filter("percent", |state: &State, s: &str, value: &Value| {
        format::percent(state, s, value)
    });
    environment.add_filter(
        "format",
        |state: &State, s: &str, args: Rest<Value>, kwargs: Kwargs| {
            format::filter(state, s, args.0, &kwargs)
        },
    );
    environment.add_filter("string", |state: &State, value: &Value| match value.is_undefined() {
        true => Ok(String::new()),
        false => python::string(state, value),
    });
    environment.add_filter("pprint", |state: &State, value: &Value| python::repr(state, value));
    environment.add_filter("default", default);
    environment.add_filter("d", default);
    environment.add_filter("int", int);
    environment.add_filter("float", float);
    environment.add_filter(
        "sort",
        |state: &State, value: Value, args: Rest<Value>, kwargs: Kwargs| {
            let kwargs = by_name(args, kwargs, ["reverse", "case_sensitive", "attribute"])?;
            known::sort(state, value, kwargs)
        },
    );
    environment.add_filter("dictsort", |value: &Value, args: Rest<Value>, kwargs: Kwargs| {
        known::dictsort(value, by_name(args, kwargs, ["case_sensitive", "by", "reverse"])?)
    });
    environment.add_filter(
        "unique",
        |state: &State, value: Value, args: Rest<Value>, kwargs: Kwargs| {
            known::unique(state, value, by_name(args, kwargs, ["case_sensitive", "attribute"])?)
        },
    );
    environment.add_filter(
        "min",
        |state: &State, value: Value, args: Rest<Value>, kwargs: Kwargs| {
            known::min(state, value, by_name(args, kwargs, ["case_sensitive", "attribute"])?)
        },
    );
    environment.add_filter(
        "max",
        |state: &State, value: Value, args: Rest<Value>, kwargs: Kwargs| {
            known::max(state, value, by_name(args, kwargs, ["case_sensitive", "attribute"])?)
        },
    );
    environment.add_filter("indent", indent);
    environment.add_filter("center", |state: &State, value: &Value, width: Option<Value>| {
        let width = width.unwrap_or_else(|| 80.into());
        strings::method(state, &python::string(state, value)?, "center", &[width])
    });
    for name in ["e", "escape", "forceescape"] {
        environment.add_filter(name, |state: &State, value: &Value| -> Outcome {
            Ok(Value::from_safe_string(escape(&python::string(state, value)?)))
        });
    }
    environment.add_filter("urlencode", urlencode);
    environment.add_filter("wordcount", |s: &str| {
        s.split(|c: char| !c.is_alphanumeric() && c != '_').filter(|word| !word.is_empty()).count()
    });
    environment.add_filter("striptags", contrib::striptags);
    environment.add_filter("filesizeformat", contrib::filesizeformat);
    environment.add_filter("truncate", truncate);
    environment.add_test("callable", |value: &Value| value.kind() == ValueKind::Plain);
    environment.add_test("iterable", |value: &Value| {
        use ValueKind::{Bytes, Iterable, Map, Seq, String, Undefined};
        matches!(value.kind(), Bytes | Iterable | Map | Seq | String | Undefined)
    });
    environment.add_test("sequence", |value: &Value| {
        use ValueKind::{Bytes, Map, Seq, String, Undefined};
        matches!(value.kind(), Bytes | Map | Seq | String | Undefined)
    });
}

/// Arguments by place put to their names.
fn by_name<const N: usize>(
    Rest(args): Rest<Value>,
    kwargs: Kwargs,
    names: [&'static str; N],
) -> Outcome<Kwargs> {
    let bound = bind(&args, &kwargs, names)?;
    let given = names.into_iter().zip(bound).filter_map(|(name, value)| Some((name, value?)));
    Ok(Kwargs::from_iter(given.filter(|(_, value)| !value.is_none())))
}

fn default(value: Value, args: Rest<Value>, kwargs: Kwargs) -> Outcome {
    let [other, boolean] = bind(&args, &kwargs, ["default_value", "boolean"])?;
    let falsy = boolean.is_some_and(|boolean| boolean.is_true()) && !value.is_true();
    Ok(if value.is_undefined() || falsy { other.unwrap_or_else(|| "".into()) } else { value })
}

/// `int(x, default, base)`: the default, 0, where there is no number.
fn int(state: &State, value: &Value, args: Rest<Value>, kwargs: Kwargs) -> Outcome {
    let [default, base] = bind(&args, &kwargs, ["default", "base"])?;
    let default = default.unwrap_or_else(|| 0.into());
    let base = base.map(|base| integer(&base)).transpose()?.map(|base| base as u32);
    let trimmed = value.as_str().map(|s| Value::from(s.trim().replace('_', "")));
    let value = trimmed.as_ref().unwrap_or(value);
    known::int(state, value, Some(default), base, Kwargs::from_iter::<[(&str, Value); 0]>([]))
}

fn float(state: &State, value: &Value, args: Rest<Value>, kwargs: Kwargs) -> Outcome {
    let [default] = bind(&args, &kwargs, ["default"])?;
    let default = default.unwrap_or_else(|| 0.0.into());
    let trimmed = value.as_str().map(|s| Value::from(s.trim().replace('_', "")));
    let value = trimmed.as_ref().unwrap_or(value);
    known::float(state, value, Some(default), Kwargs::from_iter::<[(&str, Value); 0]>([]))
}

/// `indent(s, width=4, first=False, blank=False)`; the width may be the text to put before lines.
fn indent(state: &State, value: &Value, args: Rest<Value>, kwargs: Kwargs) -> Outcome<String> {
    let [width, first, blank] = bind(&args, &kwargs, ["width", "first", "blank"])?;
    let is = |value: Option<Value>| value.is_some_and(|value| value.is_true());
    let (first, blank) = (is(first), is(blank));
    let before = match &width {
        Some(width) if width.as_str().is_some() => text(width)?.to_owned(),
        Some(width) => {
            let width = integer(width)?.max(0) as usize;
            charge(state, width)?;
            " ".repeat(width)
        }
        None => " ".repeat(4),
    };
    let s = python::string(state, value)?;
    charge(state, s.matches('\n').count().saturating_add(1).saturating_mul(before.len()))?;
    let mut out = String::new();
    for (i, line) in s.split('\n').enumerate() {
        if i > 0 {
            out.push('\n');
        }
        if if i == 0 { first } else { blank || !line.is_empty() } {
            out.push_str(&before);
        }
        out.push_str(line);
    }
    Ok(out)
}

/// As MarkupSafe writes them.
fn escape(s: &str) -> String {
    let mut out = String::with_capacity(s.len());
    for c in s.chars() {
        match c {
            '&' => out.push_str("&amp;"),
            '<' => out.push_str("&lt;"),
            '>' => out.push_str("&gt;"),
            '\'' => out.push_str("&#39;"),
            '"' => out.push_str("&#34;"),
            c => out.push(c),
        }
    }
    out
}

/// `quote` of a text, `quote_plus` of pairs.
fn urlencode(state: &State, value: &Value) -> Outcome<String> {
    let quoted = |value: &Value, in_pair: bool| -> Outcome<String> {
        let mut out = String::new();
        for byte in python::string(state, value)?.bytes() {
            match byte {
                b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'_' | b'.' | b'-' | b'~' => {
                    out.push(byte as char);
                }
                b'/' if !in_pair => out.push('/'),
                b' ' if in_pair => out.push('+'),
                byte => out.push_str(&format!("%{byte:02X}")),
            }
        }
        Ok(out)
    };
    let pairs: Vec<(Value, Value)> = match value.kind() {
        ValueKind::Map => value
            .try_iter()?
            .map(|key| Ok((key.clone(), value.get_item(&key)?)))
            .collect::<Outcome<_>>()?,
        ValueKind::Seq | ValueKind::Iterable => value
            .try_iter()?
            .map(|pair| Ok((pair.get_item_by_index(0)?, pair.get_item_by_index(1)?)))
            .collect::<Outcome<_>>()?,
        _ => return quoted(value, false),
    };
    let pair = |(key, value): &(Value, Value)| Ok(quoted(key, true)? + "=" + &quoted(value, true)?);
    Ok(pairs.iter().map(pair).collect::<Outcome<Vec<_>>>()?.join("&"))
}

/// `truncate(s, length=255, killwords=False, end='...', leeway=5)`
fn truncate(state: &State, value: &Value, args: Rest<Value>, kwargs: Kwargs) -> Outcome<String> {
    let names = ["length", "killwords", "end", "leeway"];
    let [length, kill, end, leeway] = bind(&args, &kwargs, names)?;
    let size = |value: Option<Value>, default: i64| -> Outcome<usize> {
        Ok(value.map(|n| integer(&n)).transpose()?.unwrap_or(default).max(0) as usize)
    };
    let (length, leeway) = (size(length, 255)?, size(leeway, 5)?);
    let end = end.unwrap_or_else(|| "...".into());
    let (s, end) = (python::string(state, value)?, text(&end)?);
    let n_end = end.chars().count();
    if s.chars().count() <= length.saturating_add(leeway) {
        return Ok(s);
    }
    let kept = length.checked_sub(n_end).ok_or_else(|| refused("a length below the end's"))?;
    let cut: String = s.chars().take(kept).collect();
    let cut = match kill.is_some_and(|kill| kill.is_true()) {
        true => &*cut,
        false => cut.rsplit_once(' ').map_or(&*cut, |(whole, _)| whole),
    };
    Ok(cut.to_owned() + end)
}
