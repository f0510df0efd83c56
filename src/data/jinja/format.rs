//! `str.format`, and `%` on texts. Fields of numbers are minijinja's; what it lacks of Python's is here.

use minijinja::formatting::{FormatStyle, format};
use minijinja::value::{Kwargs, Tuple, ValueKind};
use minijinja::{State, Value};

use super::{Outcome, charge, python, refused};

/// Widest field that is written.
const MAX_WIDTH: usize = 1 << 16;

/// Where a field's value comes from.
enum Source<'a> {
    Arguments(&'a [Value], &'a Kwargs),
    Map(&'a Value),
}

impl Source<'_> {
    fn get(&self, name: &str, next: &mut usize) -> Outcome {
        let missing = || refused(format!("no value for {{{name}}}"));
        match self {
            Source::Arguments(args, _) if name.is_empty() => {
                *next += 1;
                args.get(*next - 1).cloned().ok_or_else(missing)
            }
            Source::Arguments(args, kwargs) => match name.parse::<usize>() {
                Ok(i) => args.get(i).cloned().ok_or_else(missing),
                Err(_) => kwargs.get::<Option<Value>>(name)?.ok_or_else(missing),
            },
            Source::Map(map) => {
                Ok(map.get_item(&Value::from(name))?).and_then(|value| match value.is_undefined() {
                    true => Err(missing()),
                    false => Ok(value),
                })
            }
        }
    }
}

/// `'..'.format(..)`
pub(super) fn str_format(state: &State, s: &str, args: &[Value], kwargs: &Kwargs) -> Outcome {
    fields(state, s, &Source::Arguments(args, kwargs), &mut 0, 0).map(Value::from)
}

/// `'..'.format_map(..)`
pub(super) fn format_map(state: &State, s: &str, map: &Value) -> Outcome {
    fields(state, s, &Source::Map(map), &mut 0, 0).map(Value::from)
}

fn fields(
    state: &State,
    s: &str,
    source: &Source,
    next: &mut usize,
    depth: usize,
) -> Outcome<String> {
    let mut out = String::new();
    let mut rest = s;
    while let Some(at) = rest.find(['{', '}']) {
        out.push_str(&rest[..at]);
        let mark = &rest[at..at + 1];
        if rest[at + 1..].starts_with(mark) {
            out.push_str(mark);
            rest = &rest[at + 2..];
            continue;
        }
        let end = field_end(&rest[at..]).filter(|_| mark == "{" && depth < 2);
        let end = end.ok_or_else(|| refused("a single brace in a format"))?;
        out.push_str(&field(state, &rest[at + 1..at + end], source, next, depth)?);
        charge(state, 64)?;
        rest = &rest[at + end + 1..];
    }
    Ok(out + rest)
}

/// Where the brace that `text` begins with is closed.
fn field_end(text: &str) -> Option<usize> {
    let mut depth = 0;
    for (at, c) in text.char_indices() {
        match c {
            '{' => depth += 1,
            '}' if depth == 1 => return Some(at),
            '}' => depth -= 1,
            _ => {}
        }
    }
    None
}

/// `name.attribute[item]!conversion:specification`
fn field(
    state: &State,
    field: &str,
    source: &Source,
    next: &mut usize,
    depth: usize,
) -> Outcome<String> {
    let head = field.find(['!', ':']).unwrap_or(field.len());
    let (path, rest) = field.split_at(head);
    let name = path.find(['.', '[']).unwrap_or(path.len());
    let mut value = source.get(&path[..name], next)?;
    let mut steps = &path[name..];
    while !steps.is_empty() {
        let cut = |s: &str| s.find(['.', '[']).unwrap_or(s.len());
        value = if let Some(item) = steps.strip_prefix('[') {
            let (key, behind) = item.split_once(']').ok_or_else(|| refused("an open bracket"))?;
            steps = behind;
            match key.parse::<usize>() {
                Ok(i) => value.get_item_by_index(i)?,
                Err(_) => value.get_item(&Value::from(key))?,
            }
        } else {
            let (key, behind) = steps[1..].split_at(cut(&steps[1..]));
            steps = behind;
            value.get_attr(key)?
        };
    }
    let (conversion, spec) = match rest.strip_prefix('!') {
        Some(rest) => rest.split_once(':').unwrap_or((rest, "")),
        None => ("", rest.strip_prefix(':').unwrap_or("")),
    };
    let value = match conversion {
        "" => value,
        "r" => Value::from(python::repr(state, &value)?),
        "s" => Value::from(python::string(state, &value)?),
        other => return Err(refused(format!("unknown conversion !{other}"))),
    };
    let spec = fields(state, spec, source, next, depth + 1)?;
    check_width(state, &spec)?;
    if spec.is_empty() {
        return python::string(state, &value);
    }
    if let Some(spec) = spec.strip_suffix('%') {
        // A share of a hundred, in as many digits as `f` has.
        let share = Value::from(f64::try_from(value)? * 100.0);
        let (spec, width) = narrowed(spec);
        let digits = format(FormatStyle::StrFormat, &format!("{{:{spec}f}}"), &[share])?;
        return Ok(format!("{:>width$}", digits + "%"));
    }
    format(FormatStyle::StrFormat, &format!("{{:{spec}}}"), &[value])
}

/// A specification without its width, and the width: what `%` adds counts, too.
fn narrowed(spec: &str) -> (String, usize) {
    let start = spec.find(|c: char| c.is_ascii_digit()).filter(|at| !spec[..*at].contains('.'));
    let Some(start) = start else { return (spec.to_owned(), 0) };
    let digits = spec[start..].find(|c: char| !c.is_ascii_digit()).unwrap_or(spec.len() - start);
    let width = spec[start..start + digits].parse().unwrap_or(0);
    (spec[..start].to_owned() + &spec[start + digits..], width)
}

/// Pays for the widths that a specification asks for, and refuses those beyond reason.
fn check_width(state: &State, spec: &str) -> Outcome<()> {
    for number in spec.split(|c: char| !c.is_ascii_digit()).filter(|n| !n.is_empty()) {
        let width = number.parse().ok().filter(|n| *n <= MAX_WIDTH);
        charge(state, width.ok_or_else(|| refused("a field too wide"))?)?;
    }
    Ok(())
}

/// `'..' % value`: a tuple's items, a map's values by their names, or one value.
pub(super) fn percent(state: &State, s: &str, value: &Value) -> Outcome<String> {
    let map = value.kind() == ValueKind::Map;
    let items: Vec<Value> = match value.kind() {
        ValueKind::Seq if value.is_tuple() => value.try_iter()?.collect(),
        _ => vec![value.clone()],
    };
    let (mut out, mut rest, mut used) = (String::new(), s, 0);
    while let Some(at) = rest.find('%') {
        out.push_str(&rest[..at]);
        let spec = &rest[at + 1..];
        if let Some(behind) = spec.strip_prefix('%') {
            out.push('%');
            rest = behind;
            continue;
        }
        let (name, spec) = match spec.strip_prefix('(').and_then(|spec| spec.split_once(')')) {
            Some((name, spec)) => (Some(name), spec),
            None => (None, spec),
        };
        let mut next = || -> Outcome {
            used += 1;
            items.get(used - 1).cloned().ok_or_else(|| refused("not enough values for a format"))
        };
        let of_kind = |c: char| c.is_ascii_alphabetic() && !matches!(c, 'h' | 'l' | 'L');
        let end = spec.find(of_kind).ok_or_else(|| refused("a format that breaks off"))?;
        let mut flags = spec[..end].replace(['h', 'l', 'L'], "");
        while let Some(star) = flags.find('*') {
            let width = super::integer(&next()?)?;
            flags.replace_range(star..=star, &width.to_string());
        }
        check_width(state, &flags)?;
        let item = match name {
            Some(name) if map => value.get_item(&Value::from(name))?,
            Some(_) => return Err(refused("a format with names needs a dictionary")),
            None => next()?,
        };
        let (kind, item) = match &spec[end..=end] {
            "r" => ("s", Value::from(python::repr(state, &item)?)),
            "s" => ("s", Value::from(python::string(state, &item)?)),
            "i" | "u" => ("d", item),
            kind => (kind, item),
        };
        charge(state, 64)?;
        out.push_str(&format(FormatStyle::Printf, &format!("%{flags}{kind}"), &[item])?);
        rest = &spec[end + 1..];
    }
    if used < items.len()
        && !map
        && !(used == 0 && !value.is_tuple() && value.kind() == ValueKind::Seq)
    {
        return Err(refused("more values than a format takes"));
    }
    Ok(out + rest)
}

/// The filter `format`: its arguments as a tuple, or by their names.
pub(super) fn filter(state: &State, s: &str, args: Vec<Value>, kwargs: &Kwargs) -> Outcome {
    let named: Vec<(Value, Value)> = kwargs
        .args()
        .map(|name| Ok((Value::from(name), kwargs.get(name)?)))
        .collect::<Outcome<_>>()?;
    let value = match (args.is_empty(), named.is_empty()) {
        (_, true) => Value::from(Tuple::new(args)),
        (true, false) => Value::from_pairs(named),
        _ => return Err(refused("values by place and by name")),
    };
    percent(state, s, &value).map(Value::from)
}
