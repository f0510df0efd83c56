//! The last value of a text: a formula, a relation, a number that is no part of either or of a word.

use std::borrow::Cow;

use super::formula::last_row;
use super::prose::{Item, Kind};

/// Nouns whose number is a name: `step 3`.
const NUMBERED: &[&str] = &[
    "step", "case", "part", "equation", "eq", "question", "problem", "exercise", "example",
    "figure", "fig", "table", "line", "chapter", "section", "theorem", "lemma", "method", "page",
    "note", "rule", "attempt", "try", "see", "mod", "modulo",
];

/// Words behind which a letter between dollars is no value: `in terms of $x$`.
const ABOUT: &[&str] = &[
    "of", "for", "in", "where", "when", "with", "variable", "let", "any", "all", "each", "every",
    "by",
];

/// Words that make another value of the one behind them, or none.
const TURNED: &[&str] = &[
    "not", "isn't", "never", "half", "twice", "thrice", "double", "triple", "times", "minus",
    "least", "most", "than", "almost", "under", "over", "below", "above",
];

/// Words that deny what follows in their sentence.
const DENIALS: &[&str] = &["not", "isn't", "aren't", "cannot", "can't", "never", "neither", "nor"];

/// What is made of a value behind "of".
const MADE_OF: &[&str] = &[
    "half",
    "third",
    "thirds",
    "quarter",
    "quarters",
    "fifth",
    "tenth",
    "percent",
    "square",
    "cube",
    "root",
    "multiple",
    "factor",
    "reciprocal",
    "inverse",
    "logarithm",
    "double",
    "out",
];

/// Items from `first` to `last` that are one value.
#[derive(Clone, Copy)]
struct Run {
    first: usize,
    last: usize,
}

/// The last value of these items of `text`, with those that "and" or "or" join to it, and with its unit.
pub(super) fn last_value<'a>(text: &'a str, items: &[Item]) -> Option<Cow<'a, str>> {
    let runs = runs(text, items);
    let at = (0..runs.len()).rev().find(|at| is_value(text, items, runs[*at]))?;
    let (mut first, last) = (at, runs[at].last);
    while first > 0 && is_joined(text, items, runs[first - 1], runs[first]) {
        first -= 1;
    }
    let start = runs[first].first;
    let end = with_unit(items, last);
    let before = words_before(text, items, start);
    let word = |n: usize| before.get(n).map_or("", String::as_str);
    if matches!(word(0), "negative" | "minus") && first == at {
        return Some(format!("-{}", spelled(text, &items[start..=end])).into());
    }
    let links =
        |word: &&String| matches!(word.as_str(), "be" | "is" | "equal" | "to" | "exactly" | "just");
    let denial = before.iter().find(|word| !links(word)).map_or("", String::as_str);
    let denied = DENIALS.contains(&denial) || denial.ends_with("n't");
    let number = |word: &str| word.starts_with(|c: char| c.is_ascii_digit());
    let made = word(0) == "of" && (MADE_OF.contains(&word(1)) || number(word(1)));
    if denied || made || TURNED.contains(&word(0)) {
        return None;
    }
    Some(slice(text, items, start, end))
}

/// The words before an item in its sentence and line, the nearest first, without articles; a few of them.
fn words_before(text: &str, items: &[Item], start: usize) -> Vec<String> {
    let near = (0..start).rev().take(4);
    near.take_while(|at| items[*at].stop.is_none() && !items[at + 1].first)
        .map(|at| items[at].text(text).to_ascii_lowercase())
        .filter(|word| word != "the")
        .collect()
}

/// Whether "and", "or", a ratio's "to" or a comma alone stands between two values.
fn is_joined(text: &str, items: &[Item], a: Run, b: Run) -> bool {
    let between = &items[a.last + 1..b.first];
    let words = between
        .iter()
        .all(|item| matches!(item.kind, Kind::And | Kind::Or) || item.text(text) == "to");
    match items[a.last].stop {
        None => words && !between.is_empty(),
        Some(',' | ';') => words && !items[b.first].first,
        _ => false,
    }
}

/// The text of these items as one answer.
fn slice<'a>(text: &'a str, items: &[Item], first: usize, last: usize) -> Cow<'a, str> {
    if let (true, Kind::Formula(open, close)) = (first == last, items[first].kind) {
        return formula(&text[items[first].start + open..items[first].end - close]);
    }
    match spelled(text, &items[first..=last]) {
        Cow::Borrowed(whole) => whole.trim_start_matches(['=', '≈', ':', ' ']).into(),
        Cow::Owned(whole) => whole.trim_start_matches(['=', '≈', ':', ' ']).to_string().into(),
    }
}

/// The text of neighbours, without the stars and ticks of typography between them.
pub(super) fn spelled<'a>(text: &'a str, items: &[Item]) -> Cow<'a, str> {
    let (Some(first), Some(last)) = (items.first(), items.last()) else { return "".into() };
    let gap = |pair: &[Item]| text[pair[0].end..pair[1].start].contains(['*', '`']);
    if !items.windows(2).any(gap) {
        return text[first.start..last.end].into();
    }
    let part = |item: &Item| match item.stop {
        Some(',' | ';') if item.end < last.end => format!("{},", item.text(text)),
        _ => item.text(text).to_string(),
    };
    items.iter().map(part).collect::<Vec<_>>().join(" ").into()
}

/// A formula's text as an answer.
pub(super) fn formula(inner: &str) -> Cow<'_, str> {
    let row = last_row(inner);
    if row == inner { inner.into() } else { row.into() }
}

/// The last item of the unit behind the item at `at`, or that item.
fn with_unit(items: &[Item], at: usize) -> usize {
    let unit = |i: &usize| {
        items[i - 1].stop.is_none() && items.get(*i).is_some_and(|item| item.kind == Kind::Unit)
    };
    (at + 1..items.len()).take_while(unit).last().unwrap_or(at)
}

/// Stretches of mathematics.
fn runs(text: &str, items: &[Item]) -> Vec<Run> {
    let part = |item: &Item| item.is_math() || item.kind == Kind::Letter;
    let mut runs: Vec<Run> = Vec::new();
    for (at, item) in items.iter().enumerate().filter(|(_, item)| part(item)) {
        match runs.last_mut() {
            Some(run) if run.last + 1 == at && goes_on(text, &items[run.last], item) => {
                run.last = at
            }
            _ => runs.push(Run { first: at, last: at }),
        }
    }
    runs.retain(|run| {
        let operators = |item: &Item| item.text(text).chars().all(is_operator);
        items[run.first..=run.last].iter().any(|item| item.is_math() && !operators(item))
    });
    runs
}

fn is_operator(c: char) -> bool {
    "=+-*/^<>≤≥≈≠×·÷±−:".contains(c)
}

/// Whether the second continues what the first began.
fn goes_on(text: &str, a: &Item, b: &Item) -> bool {
    if a.stop.is_some() || b.first {
        return false;
    }
    let seam = a.text(text).ends_with(is_operator) || b.text(text).starts_with(is_operator);
    seam || a.kind == Kind::Math && b.kind == Kind::Math
}

/// Whether a run is a value of its own, and not a name, a reference or a list's number.
fn is_value(text: &str, items: &[Item], run: Run) -> bool {
    let before = run.first.checked_sub(1).map(|at| &items[at]);
    let word = before.map(|item| item.text(text).to_ascii_lowercase()).unwrap_or_default();
    let item = &items[run.first];
    if run.first != run.last {
        return true;
    }
    let content = match item.kind {
        Kind::Formula(open, close) => text[item.start + open..item.end - close].trim(),
        _ => item.text(text),
    };
    let name = content.trim_start_matches('\\').bytes().all(|b| b.is_ascii_alphabetic());
    if name && ABOUT.contains(&word.as_str()) {
        return false;
    }
    let bare = content.trim_matches(['(', ')']);
    let whole = bare.bytes().all(|b| b.is_ascii_digit());
    if whole && NUMBERED.contains(&word.trim_end_matches('.')) {
        return false;
    }
    // `see (2)`, and `2. So ..` at the front of a line.
    let reference = whole && bare != content && before.is_some_and(|item| item.kind == Kind::Plain);
    let marker = whole
        && item.first
        && item.stop == Some('.')
        && items.get(run.first + 1).is_some_and(|next| !next.first);
    !(reference || marker)
}
