//! What of Hugging Face's Jinja minijinja does not read, put into words that it does.
//!
//! - Line breaks become `\n`, as Jinja's lexer makes them.
//! - `{% generation %} .. {% endgeneration %}` becomes `{% with %} .. {% endwith %}`: the text as it is, in a
//!   scope of its own, blanks trimmed where the tag says so.
//! - `'..' % x` becomes `'..'|percent(x)`: minijinja's `%` is of numbers.
//! - A line break behind `{% raw %}` stays.

/// The template for minijinja, line by line where it was.
pub(super) fn rewrite(source: &str) -> String {
    let source = source.replace("\r\n", "\n").replace('\r', "\n");
    let mut out = String::with_capacity(source.len() + 64);
    let mut rest = source.as_str();
    while let Some(at) = rest.find('{') {
        out.push_str(&rest[..at]);
        rest = &rest[at..];
        let used = match rest.as_bytes().get(1) {
            Some(b'#') => {
                let used = rest.find("#}").map_or(rest.len(), |end| end + 2);
                out.push_str(&rest[..used]);
                used
            }
            Some(b'{') => inside(rest, "}}", &mut out),
            Some(b'%') => match raw(rest) {
                Some((begin, end)) => {
                    out.push_str(&rest[..begin]);
                    if rest[begin..].starts_with('\n') {
                        out.push('\n');
                    }
                    out.push_str(&rest[begin..end]);
                    end
                }
                None => statement(rest, &mut out),
            },
            _ => {
                out.push('{');
                1
            }
        };
        rest = &rest[used..];
    }
    out + rest
}

/// A tag without arguments: its name, its mark on the left, and where its right mark begins and it ends.
fn bare_tag(text: &str) -> Option<(&str, usize, usize)> {
    let inner = text.strip_prefix("{%")?;
    let inner = inner.strip_prefix(['-', '+']).unwrap_or(inner).trim_start();
    let length = inner.find(|c: char| !c.is_alphanumeric() && c != '_').unwrap_or(inner.len());
    let (name, rest) = inner.split_at(length);
    let mark = rest.trim_start();
    let close = mark.strip_prefix(['-', '+']).unwrap_or(mark).strip_prefix("%}")?;
    Some((name, text.len() - mark.len(), text.len() - close.len()))
}

/// Where the content of a raw block begins and its end tag ends.
fn raw(text: &str) -> Option<(usize, usize)> {
    let (_, _, begin) = bare_tag(text).filter(|(name, _, _)| *name == "raw")?;
    let mut at = begin;
    while let Some(next) = text[at..].find("{%") {
        at += next;
        if let Some((_, _, end)) = bare_tag(&text[at..]).filter(|(name, _, _)| *name == "endraw") {
            return Some((begin, at + end));
        }
        at += 2;
    }
    Some((begin, text.len()))
}

/// A statement: the tags that have another name, else what is inside.
fn statement(text: &str, out: &mut String) -> usize {
    let Some((name, mark, end)) = bare_tag(text) else { return inside(text, "%}", out) };
    let other = match name {
        "generation" => "with",
        "endgeneration" => "endwith",
        _ => return inside(text, "%}", out),
    };
    let start = text.find(name).expect("the tag has its name");
    let gap = &text[start + name.len()..mark];
    out.push_str(&format!("{}{other}{gap}{}", &text[..start], &text[mark..end]));
    end
}

/// Copies `{{ .. }}` or `{% .. %}` with its expressions rewritten; gives the bytes it takes.
fn inside(text: &str, close: &str, out: &mut String) -> usize {
    let end = 2 + closing(&text[2..], close);
    out.push_str(&text[..2]);
    expression(&text[2..end], out);
    end
}

/// Where an expression ends: at `close`, outside of texts and brackets.
fn closing(text: &str, close: &str) -> usize {
    let bytes = text.as_bytes();
    let (mut at, mut depth) = (0, 0usize);
    while at < bytes.len() {
        match bytes[at] {
            b'\'' | b'"' => {
                at = string_end(text, at);
                continue;
            }
            _ if depth == 0 && text[at..].starts_with(close) => return at,
            b'(' | b'[' | b'{' => depth += 1,
            b')' | b']' | b'}' => depth = depth.saturating_sub(1),
            _ => {}
        }
        at += text[at..].chars().next().map_or(1, char::len_utf8);
    }
    bytes.len()
}

/// Where the text in quotes that begins at `at` ends, behind its quote.
fn string_end(text: &str, at: usize) -> usize {
    let bytes = text.as_bytes();
    let mut end = at + 1;
    while end < bytes.len() {
        match bytes[end] {
            b'\\' => end += 1,
            quote if quote == bytes[at] => return end + 1,
            _ => {}
        }
        end += 1;
    }
    bytes.len()
}

/// Copies an expression; `'..' % operand` becomes a filter.
fn expression(text: &str, out: &mut String) {
    let mut at = 0;
    while at < text.len() {
        let c = text[at..].chars().next().expect("within the text");
        if c != '\'' && c != '"' {
            out.push(c);
            at += c.len_utf8();
            continue;
        }
        let end = string_end(text, at);
        out.push_str(&text[at..end]);
        at = end;
        let behind = text[at..].trim_start();
        let Some(operand) = behind.strip_prefix('%').map(str::trim_start) else { continue };
        let length = operand_length(operand);
        out.push_str("|percent(");
        expression(&operand[..length], out);
        out.push(')');
        at = text.len() - operand.len() + length;
    }
}

/// How long the operand of `%` is that `text` begins with: a value, with what is asked of it.
fn operand_length(text: &str) -> usize {
    let bytes = text.as_bytes();
    let mut at = text.len() - text.trim_start_matches(['-', '+', ' ']).len();
    let word = |at: usize| {
        let rest = &text[at..];
        at + rest.find(|c: char| !c.is_alphanumeric() && c != '_').unwrap_or(rest.len())
    };
    let blank = |at: usize| text.len() - text[at..].trim_start().len();
    // The value.
    match bytes.get(at) {
        Some(b'\'' | b'"') => loop {
            at = string_end(text, at);
            let next = blank(at);
            if !matches!(bytes.get(next), Some(b'\'' | b'"')) {
                break;
            }
            at = next;
        },
        Some(b'(' | b'[' | b'{') => at = matching(text, at),
        _ => at = word(at),
    }
    // Attributes, items, calls and filters.
    loop {
        let next = blank(at);
        match bytes.get(next) {
            Some(b'(' | b'[') => at = matching(text, next),
            Some(b'.' | b'|') => at = word(blank(next + 1)),
            _ => return at,
        }
    }
}

/// Behind the bracket that closes the one at `at`.
fn matching(text: &str, at: usize) -> usize {
    let close = match text.as_bytes()[at] {
        b'(' => ")",
        b'[' => "]",
        _ => "}",
    };
    (at + 1 + closing(&text[at + 1..], close) + 1).min(text.len())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tags_texts_and_operands() {
        for (source, expected) in [
            ("{%- generation +%}a{%endgeneration-%}", "{%- with +%}a{%endwith-%}"),
            (
                "{# {% generation %} #}{{ '{% generation %}' }}",
                "{# {% generation %} #}{{ '{% generation %}' }}",
            ),
            ("{% raw %}{% generation %}{% endraw %}", "{% raw %}{% generation %}{% endraw %}"),
            ("{% raw %}\nx{% endraw %}", "{% raw %}\n\nx{% endraw %}"),
            ("a\r\nb\rc", "a\nb\nc"),
            ("{{ '%s' % x.y[0](1)|upper ~ 'z' }}", "{{ '%s'|percent(x.y[0](1)|upper) ~ 'z' }}"),
            ("{{ '%s' % ('%d' % 3, \")\") }}", "{{ '%s'|percent(('%d'|percent(3), \")\")) }}"),
            ("{{ 'a' 'b%s' % -x }}%}", "{{ 'a' 'b%s'|percent(-x) }}%}"),
            ("{{ i % 2 }}{% set x = 'a' %}", "{{ i % 2 }}{% set x = 'a' %}"),
            ("{{ {'a': {}} }}{{ '}}' }}", "{{ {'a': {}} }}{{ '}}' }}"),
            ("{{ 'unclosed", "{{ 'unclosed"),
            ("{% generation", "{% generation"),
            ("{", "{"),
            ("{{ '%s' %", "{{ '%s'|percent()"),
            ("{% set generation = 1 %}", "{% set generation = 1 %}"),
        ] {
            assert_eq!(rewrite(source), expected, "{source}");
        }
    }
}
