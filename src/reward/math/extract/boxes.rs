//! `\boxed{..}`, `\fbox{..}` and `\boxed 5`; several boxes side by side are one answer.

use std::borrow::Cow;
use std::sync::LazyLock;

use regex::Regex;

/// Most boxes that are joined.
const MAX_BOXES: usize = 64;

/// What may stand between boxes of one answer: commas, "and", "or", the ends of mathematics, a name with `=`.
static BETWEEN: LazyLock<Regex> = LazyLock::new(|| {
    let blank = r"\s|\$|\*|\\[()\[\],;:! ]|\\q?quad\b";
    let joint =
        r"[,;&]|and\b|or\b|maybe\b|perhaps\b|possibly\b|both\b|\\text\{\s*(?:and|or),?\s*\}";
    Regex::new(&format!(r"^(?:{blank})*(?:{joint})(?:{blank}|{joint})*({NAME})?(?:{blank})*$"))
        .expect("a pattern")
});

/// A name that a box gives a value to.
const NAME: &str = r"[A-Za-z](?:_\{?\w+\}?)?\s*=";

/// That name before the first box.
static BEFORE: LazyLock<Regex> =
    LazyLock::new(|| Regex::new(&format!(r"(?:^|[\s$(])({NAME})\s*$")).expect("a pattern"));

/// A closed box: where its command begins, where it ends, and what it holds.
struct Boxed<'a> {
    start: usize,
    end: usize,
    content: &'a str,
}

/// The closed boxes of a command, the last first.
fn boxes<'a>(text: &'a str, command: &'a str) -> impl Iterator<Item = Boxed<'a>> {
    text.rmatch_indices(command).filter_map(move |(start, _)| {
        let group = text[start + command.len()..].trim_start().strip_prefix('{')?;
        let content = closed(group)?;
        Some(Boxed { start, end: text.len() - group.len() + content.len() + 1, content })
    })
}

/// The content of the last `command{..}`.
pub(super) fn last<'a>(text: &'a str, command: &str) -> Option<&'a str> {
    let mut braced = text
        .rmatch_indices(command)
        .filter_map(|(at, _)| text[at + command.len()..].trim_start().strip_prefix('{'));
    closed(braced.next()?)
}

/// The content of the last `command{..}`, joined by commas with those that stand right before it as parts of one
/// answer: `\boxed{1} and \boxed{2}`, `x = \boxed{1}, y = \boxed{2}`.
pub(super) fn joined<'a>(text: &'a str, command: &str) -> Option<Cow<'a, str>> {
    let content = last(text, command)?;
    let mut found = boxes(text, command).take(MAX_BOXES);
    let first = found.next()?;
    let mut parts = vec![first.content.trim()];
    let mut names = Vec::new();
    let mut start = first.start;
    for earlier in found {
        let between = text.get(earlier.end..start).unwrap_or("none");
        let Some(joint) = BETWEEN.captures(between) else { break };
        names.push(joint.get(1).map(|name| name.as_str()));
        parts.push(earlier.content.trim());
        start = earlier.start;
    }
    // The same box again is no second item.
    if parts.iter().all(|part| *part == parts[0]) {
        return Some(content.into());
    }
    let before = BEFORE.captures(&text[text[..start].rfind('\n').map_or(0, |at| at + 1)..start]);
    names.push(before.and_then(|name| name.get(1)).map(|name| name.as_str()));
    let named = names.iter().all(Option::is_some);
    let items: Vec<String> = parts
        .iter()
        .zip(&names)
        .rev()
        .map(|(part, name)| match name {
            Some(name) if named => format!("{name} {part}"),
            _ => (*part).to_string(),
        })
        .collect();
    Some(items.join(", ").into())
}

/// The content of the last `\boxed 5`: up to a blank or `$`, less the punctuation that ends a sentence.
pub(super) fn bare(text: &str) -> Option<&str> {
    let (_, rest) = commands(text, "\\boxed")?;
    let rest = rest.trim_start();
    if rest.starts_with('{') {
        return None;
    }
    let word = rest.split(|c: char| c.is_whitespace() || c == '$').next()?;
    Some(word.trim_end_matches(['.', ',', ';', ':', '!', '?']))
}

/// Whether the last box is open at the end of the text.
pub(super) fn is_open(text: &str) -> bool {
    let last = commands(text, "\\boxed").into_iter().chain(commands(text, "\\fbox"));
    last.max_by_key(|(at, _)| *at).is_some_and(|(_, rest)| {
        rest.trim_start().strip_prefix('{').is_some_and(|group| closed(group).is_none())
    })
}

/// The last occurrence of a command: where, and what follows it.
fn commands<'a>(text: &'a str, command: &str) -> Option<(usize, &'a str)> {
    text.rmatch_indices(command).find_map(|(at, _)| {
        let rest = &text[at + command.len()..];
        // `\boxedfoo` is another command.
        (!rest.starts_with(|c: char| c.is_ascii_alphabetic())).then_some((at, rest))
    })
}

/// What stands before the brace that closes a group whose opening brace was read; `\{` and `\}` do not count.
pub(crate) fn closed(group: &str) -> Option<&str> {
    let mut depth = 0usize;
    let mut bytes = group.bytes().enumerate();
    while let Some((at, byte)) = bytes.next() {
        match byte {
            b'\\' => drop(bytes.next()),
            b'{' => depth += 1,
            b'}' if depth == 0 => return Some(&group[..at]),
            b'}' => depth -= 1,
            _ => {}
        }
    }
    None
}
