//! Where in a completion the answer stands.

mod boxes;
mod candidate;
mod formula;
mod prose;
mod sentence;

use std::borrow::Cow;

use crate::reward::thoughts::spoken;
use crate::{Error, Result};

pub(crate) use boxes::closed;
use sentence::statement;

/// A place to look for the answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Rule {
    /// What stands in the last `<answer>..</answer>`, where no box follows.
    Tags,
    /// The last `\boxed{..}`, its braces balanced, with those joined to it by commas or "and".
    Boxed,
    /// The last `\fbox{..}`, likewise.
    Fbox,
    /// The last `\boxed 5`, without braces.
    Bare,
    /// What follows the last `####`, as in GSM8K; no heading of a text.
    Hashes,
    /// What follows the last "final answer is" or "the answer is", up to the end of the sentence or its reason.
    Final,
    /// The last formula, relation or number of the text, whichever comes last; a number in a formula or word is
    /// none.
    Number,
}

/// An answer and the rule that found it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Extracted<'a> {
    /// The answer, without blanks around. Never empty.
    pub text: Cow<'a, str>,
    /// The rule.
    pub rule: Rule,
}

impl Extracted<'_> {
    /// What stands right of the last sign of equality outside of brackets, where the rule is the last value's and
    /// numbers are reckoned with on the left: `$10/day * 3 days = 30`. Letters there make it an equation.
    pub(super) fn right_side(&self) -> Option<&str> {
        let text = self.text.as_ref();
        let (mut depth, mut side) = (0usize, None);
        for (at, c) in text.char_indices() {
            match c {
                '{' | '(' | '[' => depth += 1,
                '}' | ')' | ']' => depth = depth.saturating_sub(1),
                ',' | ';' if depth == 0 && text[at + 1..].starts_with(' ') => return None,
                '=' if depth == 0 && !text[..at].ends_with(['<', '>', '!', ':']) => {
                    side = Some(at + 1)
                }
                _ => {}
            }
        }
        let (left, side) = text.split_at(side?);
        let reckoned = self.rule == Rule::Number && !holds_letter(left) && !text.contains(" and ");
        (reckoned && !side.trim().is_empty()).then_some(side.trim())
    }
}

/// Whether a letter stands alone in it, as a variable does; the `x` of `10x6` is a sign.
fn holds_letter(text: &str) -> bool {
    let bytes = text.as_bytes();
    let digit = |at: Option<usize>| at.and_then(|at| bytes.get(at)).is_some_and(u8::is_ascii_digit);
    let mut at = 0;
    while at < bytes.len() {
        let length = bytes[at..].iter().take_while(|b| b.is_ascii_alphabetic()).count();
        let before = at.checked_sub(1);
        let times = bytes[at] == b'x' && digit(before) && digit(Some(at + 1));
        if length == 1 && !times && before.is_none_or(|at| !matches!(bytes[at], b'\\' | b'/')) {
            return true;
        }
        at += length.max(1);
    }
    false
}

impl Rule {
    /// All rules, in the order of the default.
    pub const ALL: [Rule; 7] =
        [Rule::Tags, Rule::Boxed, Rule::Fbox, Rule::Bare, Rule::Hashes, Rule::Final, Rule::Number];

    /// The name that [`Rule::parse_list`] reads.
    pub fn name(self) -> &'static str {
        match self {
            Rule::Tags => "answer",
            Rule::Boxed => "boxed",
            Rule::Fbox => "fbox",
            Rule::Bare => "bare",
            Rule::Hashes => "hashes",
            Rule::Final => "final",
            Rule::Number => "number",
        }
    }

    /// Reads `boxed,final,number`: the rules in the order in which they are tried.
    pub fn parse_list(text: &str) -> Result<Vec<Rule>> {
        let rule = |name: &str| {
            let known = Rule::ALL.iter().find(|rule| rule.name() == name.trim()).copied();
            known.ok_or_else(|| Error::Unsupported {
                what: "extraction rule",
                got: name.trim().into(),
                supported: Rule::ALL.map(Rule::name).join(", "),
            })
        };
        text.split(',').map(rule).collect()
    }

    /// The answer that this rule finds; `alone` is a box's alone, whatever stands beside it.
    fn find(self, text: &str, alone: bool) -> Option<Cow<'_, str>> {
        let boxed = |command| match alone {
            true => boxes::last(text, command).map(Cow::from),
            false => boxes::joined(text, command),
        };
        let found = match self {
            Rule::Tags => tagged(text),
            Rule::Boxed => boxed("\\boxed"),
            Rule::Fbox => boxed("\\fbox"),
            Rule::Bare => boxes::bare(text).map(Cow::from),
            Rule::Hashes => hashes(text).map(Cow::from),
            Rule::Final => sentence::last_claim(end_of(text)),
            Rule::Number => sentence::last_of(end_of(text)),
        };
        let trimmed = found.map(|found| match found {
            Cow::Borrowed(found) => Cow::Borrowed(found.trim()),
            Cow::Owned(found) => Cow::Owned(found.trim().to_string()),
        });
        trimmed.filter(|found| !found.is_empty())
    }
}

/// The answer that the first rule with a find gives; thoughts are no place to look.
///
/// A box or `<answer>` that was opened last and never closed, or thoughts that still go on, belong to a completion
/// that was cut off: it has no answer, and no rule looks for another.
pub fn extract<'a>(completion: &'a str, rules: &[Rule]) -> Option<Extracted<'a>> {
    first(completion, rules, false)
}

/// As [`extract`], but the last box is an answer alone, as the MATH data set's own code has it.
pub(super) fn extract_alone<'a>(completion: &'a str, rules: &[Rule]) -> Option<Extracted<'a>> {
    first(completion, rules, true)
}

fn first<'a>(completion: &'a str, rules: &[Rule], alone: bool) -> Option<Extracted<'a>> {
    if cut_off(completion).is_some() {
        return None;
    }
    let said = spoken(completion)?;
    rules.iter().find_map(|rule| rule.find(said, alone).map(|text| Extracted { text, rule: *rule }))
}

/// What is open at the end of a completion, in words.
pub(super) fn cut_off(completion: &str) -> Option<&'static str> {
    let Some(said) = spoken(completion) else { return Some("the thoughts are not closed") };
    if boxes::is_open(said) {
        return Some("the last box is not closed");
    }
    let open = said.rfind("<answer>").is_some_and(|at| !said[at..].contains("</answer>"));
    open.then_some("the last <answer> is not closed")
}

/// Longest end of a text that is read as prose, in bytes.
const MAX_PROSE_BYTES: usize = 1 << 16;

/// The end of a text that its last sentence stands in.
fn end_of(text: &str) -> &str {
    let start = text.len().saturating_sub(MAX_PROSE_BYTES);
    let boundary = (start..=text.len()).find(|at| text.is_char_boundary(*at));
    &text[boundary.unwrap_or(0)..]
}

/// The answer in the last `<answer>..</answer>`: its box, or what it states.
fn tagged(text: &str) -> Option<Cow<'_, str>> {
    let (before, behind) = text.rsplit_once("</answer>")?;
    let (_, inside) = before.rsplit_once("<answer>")?;
    if behind.contains("\\boxed") || behind.contains("\\fbox") {
        return None;
    }
    let boxed = [Rule::Boxed, Rule::Fbox, Rule::Bare, Rule::Hashes];
    let stated = || statement(end_of(inside).trim());
    boxed.iter().find_map(|rule| rule.find(inside, false)).or_else(stated)
}

/// The answer that words around it state, where an answer is more than mathematics.
pub(super) fn stated(answer: &str) -> Option<Cow<'_, str>> {
    statement(answer).filter(|stated| stated != answer && !stated.is_empty())
}

/// The line behind the last `####`, unless it is the heading of text that follows.
fn hashes(text: &str) -> Option<&str> {
    let after = text[text.rfind("####")? + 4..].trim_start_matches('#');
    let line = after.trim_start().lines().next()?;
    let below = after.trim_start()[line.len()..].trim();
    let words = line.bytes().take_while(u8::is_ascii_alphabetic).count() > 1;
    (!words || below.is_empty()).then_some(line)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rules_find_their_answer_in_order() {
        use Rule::{Bare, Boxed, Fbox, Final, Hashes, Number, Tags};
        for (text, expected) in [
            ("so \\boxed{1} then \\boxed{ \\frac{1}{2} }.", Some(("\\frac{1}{2}", Boxed))),
            ("\\boxed {8}", Some(("8", Boxed))),
            ("\\fbox{7}", Some(("7", Fbox))),
            ("$\\boxed 5$", Some(("5", Bare))),
            ("\\boxed{a \\} b}", Some(("a \\} b", Boxed))),
            ("$\\boxed{1}$, $\\boxed{2}$, and $\\boxed{3}$", Some(("1, 2, 3", Boxed))),
            ("x = \\boxed{1}, y = \\boxed{2}", Some(("x = 1, y = 2", Boxed))),
            ("\\boxed{4} and \\boxed{4}", Some(("4", Boxed))),
            ("<answer> 5 </answer>", Some(("5", Tags))),
            ("<answer>so \\boxed{5}</answer>", Some(("5", Tags))),
            ("<answer>The answer is 5.</answer>", Some(("5", Tags))),
            ("<answer>5</answer> \\boxed{6}", Some(("6", Boxed))),
            ("<answer>5", None),
            ("<think>\\boxed{7}</think> The answer is 8.", Some(("8", Final))),
            ("<think>\\boxed{7}", None),
            ("12 * 2 = 24\n#### 1,024\n", Some(("1,024", Hashes))),
            ("#### Result\nIt is 5.", Some(("5", Number))),
            ("The final answer is $\\frac{3}{4}$. I hope.", Some(("\\frac{3}{4}", Final))),
            ("**Answer:** 3.5", Some(("3.5", Final))),
            ("It costs 3 or rather -4.5", Some(("-4.5", Number))),
            ("x = 7-3", Some(("x = 7-3", Number))),
            ("total: 1,234.", Some(("1,234", Number))),
            ("no number", None),
            ("\\boxed{1} then \\boxed{2", None),
            ("\\boxed{1", None),
            ("", None),
        ] {
            let found = extract(text, &Rule::ALL);
            let found = found.as_ref().map(|found| (found.text.as_ref(), found.rule));
            assert_eq!(found, expected, "{text}");
        }
        assert_eq!(extract("the answer is 5", &[Boxed, Fbox]), None);
        let alone = extract_alone("\\boxed{1}, \\boxed{2}", &[Boxed]);
        assert_eq!(alone.unwrap().text, "2");
    }

    #[test]
    fn lists_of_rules_are_read() {
        assert_eq!(Rule::parse_list("boxed, number").unwrap(), [Rule::Boxed, Rule::Number]);
        let error = Rule::parse_list("boxed,last").unwrap_err().to_string();
        assert!(error.contains("'last'") && error.contains("boxed, fbox, bare"), "{error}");
    }
}
