//! Python's methods of texts. Places count characters; blanks are Python's.

use std::sync::LazyLock;

use minijinja::value::{Kwargs, ValueKind, from_args};
use minijinja::{Error, ErrorKind, State, Value};
use regex::Regex;

use super::{Outcome, bind, charge, format, integer, refused, text, texts};

/// A method of the text `s`.
pub(super) fn method(state: &State, s: &str, name: &str, args: &[Value]) -> Outcome {
    let (given, kwargs): (&[Value], Kwargs) = from_args(args)?;
    if name == "format" {
        return format::str_format(state, s, given, &kwargs);
    }
    let none = || -> Outcome<()> { bind(given, &kwargs, []).map(|[]| ()) };
    let one = |parameter: &str| -> Outcome<Value> {
        let [value] = bind(given, &kwargs, [parameter])?;
        value.ok_or_else(|| Error::new(ErrorKind::MissingArgument, parameter.to_owned()))
    };
    Ok(match name {
        "upper" | "lower" | "casefold" | "capitalize" | "title" | "swapcase" => {
            none()?;
            cased(s, name).into()
        }
        "isalnum" | "isalpha" | "isascii" | "isdecimal" | "isdigit" | "isidentifier"
        | "islower" | "isnumeric" | "isprintable" | "isspace" | "istitle" | "isupper" => {
            none()?;
            is(s, name).into()
        }
        "strip" | "lstrip" | "rstrip" => {
            let [set] = bind(given, &kwargs, ["chars"])?;
            let set = set.filter(|set| !set.is_none());
            let set: Option<Vec<char>> = match &set {
                Some(set) => Some(text(set)?.chars().collect()),
                None => None,
            };
            let goes = |c: char| set.as_ref().map_or(is_blank(c), |set| set.contains(&c));
            let s = if name == "rstrip" { s } else { s.trim_start_matches(goes) };
            if name == "lstrip" { s } else { s.trim_end_matches(goes) }.into()
        }
        "removeprefix" => {
            let part = one("prefix")?;
            s.strip_prefix(text(&part)?).unwrap_or(s).into()
        }
        "removesuffix" => {
            let part = one("suffix")?;
            s.strip_suffix(text(&part)?).unwrap_or(s).into()
        }
        "startswith" | "endswith" => {
            let [part, start, end] = bind(given, &kwargs, ["prefix", "start", "end"])?;
            let part = part.ok_or_else(|| Error::from(ErrorKind::MissingArgument))?;
            let within = window(s, start, end)?.map(|(_, within)| within);
            let fits = |part: &str| {
                within.is_some_and(|within| match name {
                    "startswith" => within.starts_with(part),
                    _ => within.ends_with(part),
                })
            };
            match part.kind() {
                ValueKind::Seq if part.is_tuple() => {
                    let mut any = false;
                    for part in part.try_iter()? {
                        any |= fits(text(&part)?);
                    }
                    any.into()
                }
                _ => fits(text(&part)?).into(),
            }
        }
        "count" | "find" | "rfind" | "index" | "rindex" => {
            let [part, start, end] = bind(given, &kwargs, ["sub", "start", "end"])?;
            let part = part.ok_or_else(|| Error::from(ErrorKind::MissingArgument))?;
            search(s, name, text(&part)?, window(s, start, end)?)?
        }
        "partition" | "rpartition" => {
            let part = one("sep")?;
            let part = separator(&part)?;
            let cut = match name {
                "partition" => s.split_once(part),
                _ => s.rsplit_once(part),
            };
            match (cut, name) {
                (Some((before, behind)), _) => texts([before, part, behind]),
                (None, "partition") => texts([s, "", ""]),
                (None, _) => texts(["", "", s]),
            }
        }
        "split" | "rsplit" => {
            let [sep, most] = bind(given, &kwargs, ["sep", "maxsplit"])?;
            let most = most.map(|n| integer(&n)).transpose()?.filter(|n| *n >= 0);
            let most = most.map_or(usize::MAX, |n| n as usize);
            let sep = sep.filter(|sep| !sep.is_none());
            let sep = sep.as_ref().map(separator).transpose()?;
            let parts = split(s, sep, most, name == "rsplit");
            state.consume_fuel(parts.len() as u64)?;
            Value::from_iter(parts)
        }
        "splitlines" => {
            let [keep] = bind(given, &kwargs, ["keepends"])?;
            let lines = lines(s, keep.is_some_and(|keep| keep.is_true()));
            state.consume_fuel(lines.len() as u64)?;
            Value::from_iter(lines)
        }
        "join" => {
            let items = one("iterable")?;
            let mut joined = String::new();
            for (i, item) in items.try_iter()?.enumerate() {
                let item = text(&item)?.to_owned();
                charge(state, s.len() + item.len())?;
                if i > 0 {
                    joined.push_str(s);
                }
                joined.push_str(&item);
            }
            joined.into()
        }
        "replace" => {
            let [old, new, count] = bind(given, &kwargs, ["old", "new", "count"])?;
            let (Some(old), Some(new)) = (old, new) else {
                return Err(Error::from(ErrorKind::MissingArgument));
            };
            let (old, new) = (text(&old)?, text(&new)?);
            let count = count.map(|n| integer(&n)).transpose()?.filter(|n| *n >= 0);
            let most = count.map_or(usize::MAX, |n| n as usize);
            let matches = (s.len() / old.len().max(1) + 1).min(most);
            charge(state, matches.saturating_mul(new.len()))?;
            s.replacen(old, new, most).into()
        }
        "center" | "ljust" | "rjust" | "zfill" => {
            let [width, fill] = bind(given, &kwargs, ["width", "fillchar"])?;
            let width = width.ok_or_else(|| Error::from(ErrorKind::MissingArgument))?;
            let width = integer(&width)?.max(0) as usize;
            let mut fill = match &fill {
                Some(fill) => text(fill)?.chars(),
                None => " ".chars(),
            };
            let (Some(fill), None) = (fill.next(), fill.next()) else {
                return Err(refused("the fill is one character"));
            };
            charge(state, width.saturating_mul(fill.len_utf8()))?;
            padded(s, name, width, fill).into()
        }
        "expandtabs" => {
            let [size] = bind(given, &kwargs, ["tabsize"])?;
            let size = size.map(|n| integer(&n)).transpose()?.unwrap_or(8).max(0) as usize;
            charge(state, s.matches('\t').count().saturating_mul(size))?;
            expanded(s, size).into()
        }
        "format_map" => {
            let map = one("mapping")?;
            format::format_map(state, s, &map)?
        }
        "maketrans" => {
            let [from, to, gone] = bind(given, &kwargs, ["x", "y", "z"])?;
            maketrans(from, to, gone)?
        }
        "translate" => {
            let table = one("table")?;
            let mut out = String::new();
            for c in s.chars() {
                let to = table.get_item(&Value::from(c as u32))?;
                charge(state, 64)?;
                match to.kind() {
                    ValueKind::Undefined => out.push(c),
                    ValueKind::None => {}
                    ValueKind::Number => out.extend(char::from_u32(integer(&to)? as u32)),
                    _ => out.push_str(text(&to)?),
                }
            }
            out.into()
        }
        _ => return Err(Error::from(ErrorKind::UnknownMethod)),
    })
}

fn separator(value: &Value) -> Outcome<&str> {
    let sep = text(value)?;
    if sep.is_empty() { Err(refused("empty separator")) } else { Ok(sep) }
}

/// Python's blanks: Unicode's, and the four separators of ASCII.
fn is_blank(c: char) -> bool {
    c.is_whitespace() || ('\x1c'..='\x1f').contains(&c)
}

/// Whether Python prints a character as it is.
pub(super) fn is_printable(c: char) -> bool {
    static OTHER: LazyLock<Regex> = LazyLock::new(|| class(r"\p{C}\p{Z}"));
    c == ' ' || !in_class(&OTHER, c)
}

fn class(classes: &str) -> Regex {
    Regex::new(&format!("^[{classes}]$")).expect("a class of characters")
}

fn in_class(class: &Regex, c: char) -> bool {
    class.is_match(c.encode_utf8(&mut [0; 4]))
}

fn is(s: &str, name: &str) -> bool {
    static LETTER: LazyLock<Regex> = LazyLock::new(|| class(r"\p{L}"));
    static DECIMAL: LazyLock<Regex> = LazyLock::new(|| class(r"\p{Nd}"));
    // Digits that are no decimal ones: powers, indices, in circles, in brackets, with a full stop.
    static DIGIT: LazyLock<Regex> = LazyLock::new(|| {
        class(
            r"\p{Nd}\x{b2}\x{b3}\x{b9}\x{2070}\x{2074}-\x{2079}\x{2080}-\x{2089}\x{2460}-\x{2468}\x{2474}-\x{247c}\x{2488}-\x{2490}\x{24ea}\x{24f5}-\x{24fd}\x{24ff}\x{2776}-\x{277e}\x{2780}-\x{2788}\x{278a}-\x{2792}",
        )
    });
    let all = |holds: fn(char) -> bool| !s.is_empty() && s.chars().all(holds);
    match name {
        "isascii" => s.is_ascii(),
        "isspace" => all(is_blank),
        "isprintable" => s.chars().all(is_printable),
        "isalpha" => all(|c| in_class(&LETTER, c)),
        "isdecimal" => all(|c| in_class(&DECIMAL, c)),
        "isdigit" => all(|c| in_class(&DIGIT, c)),
        "isnumeric" => all(|c| c.is_numeric()),
        "isalnum" => all(|c| in_class(&LETTER, c) || c.is_numeric()),
        "isidentifier" => {
            let first = s.chars().next().is_some_and(|c| c == '_' || c.is_alphabetic());
            first && s.chars().all(|c| c == '_' || c.is_alphanumeric())
        }
        "islower" => s.chars().any(char::is_lowercase) && !s.chars().any(char::is_uppercase),
        "isupper" => s.chars().any(char::is_uppercase) && !s.chars().any(char::is_lowercase),
        // "istitle": capitals begin words, small letters go on with them.
        _ => {
            let (mut within, mut any) = (false, false);
            for c in s.chars() {
                let (upper, lower) = (c.is_uppercase(), c.is_lowercase());
                if upper && within || lower && !within {
                    return false;
                }
                within = upper || lower;
                any |= within;
            }
            any
        }
    }
}

fn cased(s: &str, name: &str) -> String {
    match name {
        "upper" => s.to_uppercase(),
        "lower" => s.to_lowercase(),
        // Full case folding differs from small letters in little more than these two.
        "casefold" => s.to_lowercase().replace('ß', "ss").replace('ς', "σ"),
        "capitalize" => {
            let mut chars = s.chars();
            let first = chars.next().map(|c| c.to_uppercase().to_string());
            first.unwrap_or_default() + &chars.as_str().to_lowercase()
        }
        "swapcase" => {
            let swap = |c: char| match c {
                c if c.is_uppercase() => c.to_lowercase().to_string(),
                c => c.to_uppercase().to_string(),
            };
            s.chars().map(swap).collect()
        }
        _ => {
            let mut within = false;
            let mut title = String::with_capacity(s.len());
            for c in s.chars() {
                if within {
                    title.extend(c.to_lowercase());
                } else {
                    title.extend(c.to_uppercase());
                }
                within = c.is_uppercase() || c.is_lowercase();
            }
            title
        }
    }
}

/// The part of a text from `start` to `end`, counted as in a slice, and where it begins; none where `start`
/// is behind `end` or the text.
fn window(s: &str, start: Option<Value>, end: Option<Value>) -> Outcome<Option<(usize, &str)>> {
    let given = |value: Option<Value>| value.filter(|v| !v.is_none());
    if start.is_none() && end.is_none() {
        return Ok(Some((0, s)));
    }
    let n = s.chars().count() as i64;
    let place = |value: Option<Value>, default: i64| -> Outcome<i64> {
        let at = given(value).map(|value| integer(&value)).transpose()?.unwrap_or(default);
        Ok(if at < 0 { (at + n).max(0) } else { at })
    };
    let (start, end) = (place(start, 0)?, place(end, n)?.min(n));
    if start > end {
        return Ok(None);
    }
    let byte = |at: i64| s.char_indices().nth(at as usize).map_or(s.len(), |(i, _)| i);
    Ok(Some((start as usize, &s[byte(start)..byte(end)])))
}

fn search(s: &str, name: &str, part: &str, window: Option<(usize, &str)>) -> Outcome {
    let Some((start, within)) = window else {
        return match name {
            "count" => Ok(0.into()),
            "find" | "rfind" => Ok((-1).into()),
            _ => Err(refused("substring not found")),
        };
    };
    if name == "count" {
        return Ok(match part {
            "" => within.chars().count() + 1,
            part => within.matches(part).count(),
        }
        .into());
    }
    debug_assert!(s.contains(within));
    let at = if name.starts_with('r') { within.rfind(part) } else { within.find(part) };
    match at {
        Some(at) => Ok((start + within[..at].chars().count()).into()),
        None if name.ends_with("find") => Ok((-1).into()),
        None => Err(refused("substring not found")),
    }
}

/// The parts between separators (none: between blanks), cut `most` times at most, from the right if
/// `from_right`.
fn split<'s>(s: &'s str, sep: Option<&str>, most: usize, from_right: bool) -> Vec<&'s str> {
    let mut parts = Vec::new();
    let mut rest = s;
    match sep {
        Some(sep) => {
            while parts.len() < most {
                let cut = if from_right { rest.rsplit_once(sep) } else { rest.split_once(sep) };
                let Some((left, right)) = cut else { break };
                parts.push(if from_right { right } else { left });
                rest = if from_right { left } else { right };
            }
            parts.push(rest);
        }
        None => {
            let trim = |s: &'s str| match from_right {
                true => s.trim_end_matches(is_blank),
                false => s.trim_start_matches(is_blank),
            };
            rest = trim(rest);
            while parts.len() < most && !rest.is_empty() {
                let cut = if from_right { rest.rfind(is_blank) } else { rest.find(is_blank) };
                let Some(cut) = cut else { break };
                let width = rest[cut..].chars().next().map_or(0, char::len_utf8);
                if from_right {
                    parts.push(&rest[cut + width..]);
                    rest = trim(&rest[..cut]);
                } else {
                    parts.push(&rest[..cut]);
                    rest = trim(&rest[cut..]);
                }
            }
            if !rest.is_empty() {
                parts.push(rest);
            }
        }
    }
    if from_right {
        parts.reverse();
    }
    parts
}

/// The lines of a text, by all of Python's line breaks.
fn lines(s: &str, keep: bool) -> Vec<&str> {
    let is_break = |c: char| {
        matches!(
            c,
            '\n' | '\r' | '\x0b' | '\x0c' | '\x1c'..='\x1e' | '\u{85}' | '\u{2028}' | '\u{2029}'
        )
    };
    let mut lines = Vec::new();
    let mut rest = s;
    while let Some(at) = rest.find(is_break) {
        let width = match rest[at..].starts_with("\r\n") {
            true => 2,
            false => rest[at..].chars().next().map_or(1, char::len_utf8),
        };
        lines.push(&rest[..if keep { at + width } else { at }]);
        rest = &rest[at + width..];
    }
    if !rest.is_empty() {
        lines.push(rest);
    }
    lines
}

fn padded(s: &str, name: &str, width: usize, fill: char) -> String {
    let missing = width.saturating_sub(s.chars().count());
    let fills = |n: usize| fill.to_string().repeat(n);
    match name {
        "ljust" => s.to_owned() + &fills(missing),
        "rjust" => fills(missing) + s,
        "center" => {
            // Python's: the odd one goes left where the width is odd.
            let left = missing / 2 + (missing & width & 1);
            fills(left) + s + &fills(missing - left)
        }
        _ => {
            let (sign, digits) = s.split_at(usize::from(s.starts_with(['+', '-'])));
            format!("{sign}{}{digits}", "0".repeat(missing))
        }
    }
}

fn expanded(s: &str, size: usize) -> String {
    let (mut out, mut column) = (String::new(), 0);
    for c in s.chars() {
        match c {
            '\t' if size == 0 => {}
            '\t' => {
                let width = size - column % size;
                out.push_str(&" ".repeat(width));
                column += width;
            }
            c => {
                out.push(c);
                column = if matches!(c, '\n' | '\r') { 0 } else { column + 1 };
            }
        }
    }
    out
}

/// A table for `translate`: code points to texts, or to none.
fn maketrans(from: Option<Value>, to: Option<Value>, gone: Option<Value>) -> Outcome {
    let code = |c: char| Value::from(c as u32);
    let mut pairs: Vec<(Value, Value)> = Vec::new();
    let from = from.ok_or_else(|| Error::from(ErrorKind::MissingArgument))?;
    match &to {
        None => {
            for key in from.try_iter()? {
                let value = from.get_item(&key)?;
                let key = match key.as_str() {
                    Some(one) => {
                        one.chars().next().map(code).ok_or_else(|| refused("an empty key"))?
                    }
                    None => key,
                };
                pairs.push((key, value));
            }
        }
        Some(to) => {
            let (from, to) = (text(&from)?, text(to)?);
            if from.chars().count() != to.chars().count() {
                return Err(refused("two texts of one length are needed"));
            }
            pairs.extend(from.chars().zip(to.chars()).map(|(a, b)| (code(a), code(b))));
        }
    }
    if let Some(gone) = &gone {
        pairs.extend(text(gone)?.chars().map(|c| (code(c), ().into())));
    }
    Ok(Value::from_pairs(pairs))
}
