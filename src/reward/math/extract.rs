//! Where in a completion the answer stands.

use crate::{Error, Result};

/// A place to look for the answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Rule {
    /// The last `\boxed{..}`, its braces balanced.
    Boxed,
    /// The last `\fbox{..}`.
    Fbox,
    /// The last `\boxed 5`, without braces.
    Bare,
    /// What follows the last `####`, as in GSM8K.
    Hashes,
    /// What follows the last "final answer is" or "the answer is", up to the end of the sentence.
    Final,
    /// The last number of the text.
    Number,
}

/// An answer and the rule that found it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Extracted<'a> {
    /// The answer, without blanks around. Never empty.
    pub text: &'a str,
    /// The rule.
    pub rule: Rule,
}

impl Rule {
    /// All rules, in the order of the default.
    pub const ALL: [Rule; 6] =
        [Rule::Boxed, Rule::Fbox, Rule::Bare, Rule::Hashes, Rule::Final, Rule::Number];

    /// The name that [`Rule::parse_list`] reads.
    pub fn name(self) -> &'static str {
        match self {
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

    fn find(self, text: &str) -> Option<&str> {
        let found = match self {
            Rule::Boxed => group(text, "\\boxed"),
            Rule::Fbox => group(text, "\\fbox"),
            Rule::Bare => bare(text),
            Rule::Hashes => {
                let after = &text[text.rfind("####")? + 4..];
                after.trim_start().lines().next()
            }
            Rule::Final => sentence(text),
            Rule::Number => number(text),
        };
        found.map(str::trim).filter(|found| !found.is_empty())
    }
}

/// The answer that the first rule with a find gives. Linear in the text.
///
/// A box that was opened last and never closed belongs to a completion that was cut off: it has no answer, and
/// no rule looks for another.
pub fn extract<'a>(completion: &'a str, rules: &[Rule]) -> Option<Extracted<'a>> {
    if is_cut_off(completion) {
        return None;
    }
    rules.iter().find_map(|rule| rule.find(completion).map(|text| Extracted { text, rule: *rule }))
}

/// Whether the last box is open at the end of the text.
pub(super) fn is_cut_off(text: &str) -> bool {
    let last = commands(text, "\\boxed").chain(commands(text, "\\fbox")).max_by_key(|(at, _)| *at);
    last.is_some_and(|(_, rest)| {
        rest.trim_start().strip_prefix('{').is_some_and(|group| closed(group).is_none())
    })
}

/// The last occurrence of a command: where, and what follows it.
fn commands<'a>(text: &'a str, command: &'a str) -> impl Iterator<Item = (usize, &'a str)> {
    text.rmatch_indices(command)
        .find_map(|(at, _)| {
            let rest = &text[at + command.len()..];
            // `\boxedfoo` is another command.
            (!rest.starts_with(|c: char| c.is_ascii_alphabetic())).then_some((at, rest))
        })
        .into_iter()
}

/// The content of the last `command{..}`.
fn group<'a>(text: &'a str, command: &str) -> Option<&'a str> {
    let mut braced = text.rmatch_indices(command).filter_map(|(at, _)| {
        let rest = &text[at + command.len()..];
        rest.trim_start().strip_prefix('{')
    });
    closed(braced.next()?)
}

/// The content of the last `\boxed 5`: up to a blank or `$`, less the punctuation that ends a sentence.
fn bare(text: &str) -> Option<&str> {
    let (_, rest) = commands(text, "\\boxed").next()?;
    let rest = rest.trim_start();
    if rest.starts_with('{') {
        return None;
    }
    let word = rest.split(|c: char| c.is_whitespace() || c == '$').next()?;
    Some(word.trim_end_matches(['.', ',', ';', ':', '!', '?']))
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

/// What follows the last "answer is": up to the line's end, or to a full stop that ends a sentence.
fn sentence(text: &str) -> Option<&str> {
    let lower = text.to_ascii_lowercase();
    let phrases = ["answer is", "answer:", "answer is:", "answer:**"];
    let start = phrases.iter().filter_map(|p| lower.rfind(p).map(|at| at + p.len())).max()?;
    let line = text[start..].trim_start_matches([':', '*', ' ', '\n', '\t']);
    let line = line.lines().next()?;
    let stop = line.match_indices('.').find(|(at, _)| {
        line[at + 1..].starts_with(|c: char| c.is_whitespace()) || at + 1 == line.len()
    });
    let line = stop.map_or(line, |(at, _)| &line[..at]);
    Some(line.trim_end_matches(['.', '*', '!', ' ']))
}

/// The last number: digits with separators, a decimal part and a sign that does not subtract.
fn number(text: &str) -> Option<&str> {
    let bytes = text.as_bytes();
    let end = bytes.iter().rposition(u8::is_ascii_digit)? + 1;
    let part = |at: &usize| {
        let between = |b: u8| {
            matches!(b, b',' | b'.' | b'/') && bytes.get(at + 1).is_some_and(u8::is_ascii_digit)
        };
        bytes[*at].is_ascii_digit() || between(bytes[*at])
    };
    let mut start = end - (0..end).rev().take_while(part).count();
    while !bytes[start].is_ascii_digit() && bytes[start] != b'.' {
        start += 1;
    }
    let signed = start > 0 && bytes[start - 1] == b'-';
    let binary = start > 1
        && bytes[..start - 1]
            .iter()
            .rev()
            .find(|b| !b.is_ascii_whitespace())
            .is_some_and(|b| b.is_ascii_alphanumeric() || matches!(b, b')' | b'}' | b']'))
        && (bytes[start - 2] != b' ' || bytes.get(start) == Some(&b' '));
    if signed && !binary {
        start -= 1;
    }
    Some(&text[start..end])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rules_find_their_answer_in_order() {
        use Rule::{Bare, Boxed, Fbox, Final, Hashes, Number};
        for (text, expected) in [
            ("so \\boxed{1} and \\boxed{ \\frac{1}{2} }.", Some(("\\frac{1}{2}", Boxed))),
            ("\\boxed {8}", Some(("8", Boxed))),
            ("\\fbox{7}", Some(("7", Fbox))),
            ("$\\boxed 5$", Some(("5", Bare))),
            ("\\boxed{a \\} b}", Some(("a \\} b", Boxed))),
            ("12 * 2 = 24\n#### 1,024\n", Some(("1,024", Hashes))),
            ("The final answer is $\\frac{3}{4}$. I hope.", Some(("$\\frac{3}{4}$", Final))),
            ("**Answer:** 3.5", Some(("3.5", Final))),
            ("It costs 3 or rather -4.5", Some(("-4.5", Number))),
            ("x = 7-3", Some(("3", Number))),
            ("total: 1,234.", Some(("1,234", Number))),
            ("no number", None),
            ("\\boxed{1} then \\boxed{2", None),
            ("\\boxed{1", None),
            ("", None),
        ] {
            let found = extract(text, &Rule::ALL).map(|found| (found.text, found.rule));
            assert_eq!(found, expected, "{text}");
        }
        assert_eq!(extract("the answer is 5", &[Boxed, Fbox]), None);
    }

    #[test]
    fn lists_of_rules_are_read() {
        assert_eq!(Rule::parse_list("boxed, number").unwrap(), [Rule::Boxed, Rule::Number]);
        let error = Rule::parse_list("boxed,last").unwrap_err().to_string();
        assert!(error.contains("'last'") && error.contains("boxed, fbox, bare"), "{error}");
    }
}
