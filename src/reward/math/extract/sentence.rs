//! Answers in a sentence: "the answer is therefore 12, because ..".

use std::borrow::Cow;
use std::sync::LazyLock;

use regex::Regex;

use super::candidate::{formula, last_value, spelled};
use super::prose::{Item, Kind, items};

/// What says that an answer follows.
static PHRASE: LazyLock<Regex> = LazyLock::new(|| {
    let adverbs =
        "therefore|thus|hence|then|so|now|simply|just|clearly|indeed|finally|also|again|here";
    let verbs = "is|are|was|would be|should be|must be|will be|equals|becomes|comes to|comes out to be|turns out to be";
    let subject =
        r"(?:final\s+|correct\s+)?answers?|(?:correct|right|best)\s+(?:option|choice|letter)";
    Regex::new(&format!(
        r"(?i)\b(?:{subject})\b[*_]*(?:\s+\([^()\n]{{0,40}}\))?(?:\s+(?:to|of|for|in|on)\b[^.:=$\n]{{0,80}}?)?(?:,?\s+(?:{adverbs})\b,?)*(?:\s+(?:{verbs})\b|[*_\s]*[:=])"
    ))
    .expect("a pattern")
});

/// What takes an answer back.
static RETRACTED: LazyLock<Regex> = LazyLock::new(|| {
    Regex::new(
        r"(?i)\b(?:wait|actually|correction|oops|mistake|mistaken|wrong|incorrect|instead|hmm)\b",
    )
    .expect("a pattern")
});

/// Words before a value that say nothing about it.
const FILLERS: &[&str] = &[
    "therefore",
    "thus",
    "hence",
    "then",
    "so",
    "simply",
    "just",
    "clearly",
    "indeed",
    "exactly",
    "now",
    "finally",
    "obviously",
    "again",
    "also",
    "precisely",
    "approximately",
    "about",
    "roughly",
    "around",
    "equal",
    "equals",
    "to",
    "given",
    "by",
    "be",
    "is",
    "are",
    "it",
    "it's",
    "option",
    "choice",
    "letter",
    "answer",
    "following",
    "as",
    "follows",
    "of",
    "course",
    "namely",
    "indeed",
    "in",
    "fact",
    "that",
    "there",
    ":",
];

/// Words that begin a reason.
const REASONS: &[&str] = &[
    "because",
    "since",
    "due",
    "which",
    "hence",
    "thus",
    "therefore",
    "after",
    "so",
    "i.e",
    "obtained",
];

/// Words that begin what may be a reason, a place or a condition.
const PLACES: &[&str] = &["as", "for", "when", "with", "at", "by", "where", "on", "using"];

/// Words that offer another answer or make it depend on something.
const HEDGES: &[&str] = &[
    "or",
    "maybe",
    "perhaps",
    "possibly",
    "alternatively",
    "otherwise",
    "else",
    "but",
    "unless",
    "if",
    "depending",
];

/// What follows the last "the answer is", where nothing behind takes it back.
pub(super) fn last_claim(text: &str) -> Option<Cow<'_, str>> {
    let phrase = PHRASE.find_iter(text).last()?;
    let rest = text[phrase.end()..].trim_start_matches(['}', '*', '_', ':', '=', ' ']);
    let items = items(rest);
    let (claim, end) = claim(rest, &items)?;
    (!RETRACTED.is_match(&rest[end..])).then_some(claim)
}

/// The last value of a text, where it is behind all words that take an earlier one back.
pub(super) fn last_of(text: &str) -> Option<Cow<'_, str>> {
    let start = RETRACTED.find_iter(text).last().map_or(0, |found| found.end());
    let text = &text[start..];
    last_value(text, &items(text))
}

/// The answer that a text of its own gives: a sentence's, a value, or all of it.
pub(super) fn statement(text: &str) -> Option<Cow<'_, str>> {
    if let Some(claim) = last_claim(text) {
        return Some(claim);
    }
    let items = items(text);
    // `C. 15` is a choice with its content.
    let choice = items.first().is_some_and(|item| {
        item.kind == Kind::Letter && item.stop == Some('.') && items[1..].iter().all(|i| !i.first)
    });
    if choice {
        return Some(text.into());
    }
    let sentences = items.iter().enumerate().any(|(at, item)| {
        at + 1 < items.len() && (item.ends_sentence(text, items.get(at + 1)) || items[at + 1].first)
    });
    let found = if sentences {
        last_value(text, &items)
    } else {
        claim(text, &items).map(|(claim, _)| claim)
    };
    Some(found.unwrap_or(text.into()))
}

/// The claim at the front of the items, and where it ends; none where it is denied.
fn claim<'a>(text: &'a str, items: &[Item]) -> Option<(Cow<'a, str>, usize)> {
    let word = |at: usize| items[at].text(text).to_ascii_lowercase();
    let filler = |at: &usize| {
        items[*at].kind == Kind::Mark
            || matches!(items[*at].text(text), "=" | "≈" | "\\approx")
            || items[*at].stop != Some('.') && FILLERS.contains(&word(*at).as_str())
    };
    let first = (0..items.len()).find(|at| !filler(at))?;
    let after = |at: usize| items.get(at + 1);
    let last = (first..items.len()).find(|&at| {
        items[at].ends_sentence(text, after(at)) || after(at).is_some_and(|next| next.first)
    });
    let last = last.unwrap_or(items.len() - 1);
    let end = items[last].end;
    if word(first) == "not" {
        return None;
    }
    let value = (first..=last).find(|at| items[*at].is_math());
    // "that she has 5 left": the value in it.
    let word_first = items[first].text(text).chars().all(|c| c.is_alphabetic() || c == '\'');
    if items[first].kind == Kind::Plain
        && word_first
        && let Some(value) = value
        && !items[first..value].iter().any(|item| item.kind == Kind::Letter)
    {
        return last_value(text, &items[first..=last]).map(|found| (found, end));
    }
    if matches!(word(first).as_str(), "minus" | "negative") && value == Some(first + 1) {
        return last_value(text, &items[first..=last]).map(|found| (found, end));
    }
    let kept = reason(text, &items[..=last], first, value);
    if let (true, Kind::Formula(open, close)) = (kept == first, items[first].kind) {
        return Some((formula(&text[items[first].start + open..items[first].end - close]), end));
    }
    let parts = items[first..=kept].iter().filter(|item| !is_aside(text, item));
    if parts.clone().count() == kept + 1 - first {
        return Some((spelled(text, &items[first..=kept]), end));
    }
    let parts: Vec<&str> = parts
        .map(|item| match item.stop {
            Some(',' | ';') => &text[item.start..item.end + 1],
            _ => item.text(text),
        })
        .collect();
    Some((parts.join(" ").trim_end_matches([',', ';']).to_string().into(), end))
}

/// Whether an item is words in brackets that say nothing else.
fn is_aside(text: &str, item: &Item) -> bool {
    let inside = item.text(text).trim_start_matches(['(', '[']).to_ascii_lowercase();
    let first = inside.split(|c: char| !c.is_alphanumeric()).next().unwrap_or_default();
    item.kind == Kind::Aside && !HEDGES.contains(&first)
}

/// The last item of a claim without the reason behind it.
fn reason(text: &str, items: &[Item], first: usize, value: Option<usize>) -> usize {
    let last = items.len() - 1;
    // Where the last of each stands.
    let hedge = items.iter().rposition(|item| {
        HEDGES.contains(&item.text(text).to_ascii_lowercase().as_str())
            || item.kind == Kind::Aside && !is_aside(text, item)
    });
    let and = items.iter().rposition(|item| item.kind == Kind::And);
    let math = items.iter().rposition(Item::is_math);
    let hedged = |from: usize| hedge.is_some_and(|at| at >= from);
    let plain = |at: usize| items.get(at).is_some_and(|item| item.kind == Kind::Plain);
    for at in first + 1..=last {
        let word = items[at].text(text).to_ascii_lowercase();
        let behind_value =
            value.is_some_and(|value| value < at) || items[first].kind == Kind::Letter;
        let pause = matches!(items[at - 1].stop, Some(',' | ';' | ':'));
        let dash = (items[at].kind == Kind::Mark || word == "-") && plain(at + 1);
        let symbol = matches!(word.as_str(), "⇒" | "∵" | "∴");
        let cut = match items[at].kind {
            _ if REASONS.contains(&word.as_str()) || symbol => true,
            Kind::And => behind_value && plain(at + 1) && math.is_none_or(|last| last < at),
            _ if dash => behind_value && !hedged(at),
            _ if PLACES.contains(&word.as_str()) => !hedged(at) && and.is_none_or(|last| last < at),
            _ => behind_value && plain(at) && pause && !hedged(at),
        };
        if cut {
            return at - 1;
        }
    }
    last
}
