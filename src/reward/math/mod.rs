//! Whether two answers are mathematically the same.
//!
//! An answer in LaTeX or plain text becomes tokens ([`token`]), expressions ([`parse`]) in a form ([`answer`]: a
//! number with its unit, a list, an interval, a matrix, an equation, words), and forms are compared by their
//! own rules ([`compare`]). Expressions are equal when they have the same value ([`equal`]): exactly, where
//! both are rational, else by evaluation to 31 digits at pseudo-random points ([`eval`]).
//!
//! The verdict carries its reason. Nothing here panics, and everything is bounded: the length of an answer,
//! the depth of its nesting, the size of its numbers, and the steps of a comparison.

mod answer;
mod ball;
mod compare;
mod double;
mod equal;
mod eval;
mod expr;
mod extract;
mod hendrycks;
mod names;
mod parse;
mod region;
mod token;
mod units;
mod value;

pub(super) use extract::closed;
pub use extract::{Extracted, Rule, extract};

use std::borrow::Cow;

use super::Verdict;
use crate::{Error, Result};
use token::{Reading, Units};

/// Longest answer that is read as mathematics, in bytes; a longer one is compared as text.
pub const MAX_ANSWER_BYTES: usize = 4096;

/// How two answers are compared.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Mode {
    /// By meaning.
    #[default]
    Math,
    /// As text, after the normalisation that the MATH data set was published with.
    Hendrycks,
    /// As text, blanks at both ends aside.
    Exact,
}

/// Whether two answers are equal, and why.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Judgement {
    /// Whether they are.
    pub equal: bool,
    /// In a few words.
    pub reason: String,
}

impl Mode {
    /// All modes.
    pub const ALL: [Mode; 3] = [Mode::Math, Mode::Hendrycks, Mode::Exact];

    /// The name that [`Mode::parse`] reads.
    pub fn name(self) -> &'static str {
        match self {
            Mode::Math => "math",
            Mode::Hendrycks => "hendrycks",
            Mode::Exact => "exact",
        }
    }

    /// Reads the value of `--mode`.
    pub fn parse(name: &str) -> Result<Mode> {
        Mode::ALL.into_iter().find(|mode| mode.name() == name).ok_or_else(|| Error::Unsupported {
            what: "mode",
            got: name.into(),
            supported: Mode::ALL.map(Mode::name).join(", "),
        })
    }

    /// Where this mode looks for the answer in a completion: everywhere, in a box, or nowhere (all of it).
    pub fn rules(self) -> &'static [Rule] {
        match self {
            Mode::Math => &Rule::ALL,
            Mode::Hendrycks => &[Rule::Boxed, Rule::Fbox, Rule::Bare],
            Mode::Exact => &[],
        }
    }

    /// A completion's answer by these rules; without rules, all of it.
    pub fn answer<'a>(self, completion: &'a str, rules: &[Rule]) -> Option<Cow<'a, str>> {
        self.find(completion, rules).map(|found| found.text)
    }

    fn find<'a>(self, completion: &'a str, rules: &[Rule]) -> Option<Extracted<'a>> {
        match self {
            _ if rules.is_empty() => Some(Extracted { text: completion.into(), rule: Rule::Boxed }),
            Mode::Hendrycks => extract::extract_alone(completion, rules),
            _ => extract(completion, rules),
        }
    }
}

/// Compares an answer with the gold one.
///
/// A gold answer that holds `\boxed{..}` or ends in `#### ..` (GSM8K) means what stands there.
pub fn judge(gold: &str, answer: &str, mode: Mode) -> Judgement {
    let gold = &*gold_answer(gold);
    let found = match mode {
        Mode::Exact if gold.trim() == answer.trim() => Ok("the same text".into()),
        Mode::Exact => Err("another text".into()),
        Mode::Hendrycks => match hendrycks::equal(gold, answer) {
            true => Ok("the same text after normalisation".into()),
            false => Err("another text after normalisation".into()),
        },
        Mode::Math => by_meaning(gold, answer),
    };
    Judgement { equal: found.is_ok(), reason: found.unwrap_or_else(|why| why) }
}

/// Judges a completion: extracts its answer by the rules (without rules, all of it) and compares.
pub fn score(gold: &str, completion: &str, mode: Mode, rules: &[Rule]) -> Verdict {
    let Some(mut answer) = mode.find(completion, rules) else {
        return Verdict::wrong(extract::cut_off(completion).unwrap_or("no answer found"));
    };
    let mut judgement = judge(gold, &answer.text, mode);
    // Of a relation in a text that names no answer the right side counts, whatever stands left of it.
    if let (false, Some(side)) = (judgement.equal, answer.right_side()) {
        let of_side = judge(gold, side, mode);
        if of_side.equal {
            (judgement, answer.text) = (of_side, side.to_string().into());
        }
    }
    let answer = answer.text;
    let (answer, gold) = (super::quoted(&answer), super::quoted(&gold_answer(gold)));
    match judgement.equal {
        true => Verdict::right(format!("{answer} equals {gold}: {}", judgement.reason)),
        false => Verdict::wrong(format!("{answer} is not {gold}: {}", judgement.reason)),
    }
}

/// What a gold text gives as its answer.
fn gold_answer(gold: &str) -> Cow<'_, str> {
    let rules = [Rule::Boxed, Rule::Fbox, Rule::Hashes];
    extract(gold, &rules).map_or(gold.trim().into(), |found| found.text)
}

/// How ambiguous text is read: the usual way first, then the others.
const READINGS: [Reading; 3] = [
    Reading { thousands: true, scientific: true, units: Units::Spaced },
    Reading { thousands: true, scientific: false, units: Units::Spaced },
    Reading { thousands: false, scientific: true, units: Units::Spaced },
];

fn by_meaning(gold: &str, answer: &str) -> equal::Finding {
    let (gold, answer) = (trimmed(gold), trimmed(answer));
    if answer.is_empty() {
        return Err("an empty answer".into());
    }
    if gold == answer {
        return Ok("the same text".into());
    }
    if gold.len().max(answer.len()) > MAX_ANSWER_BYTES {
        let same = gold.split_whitespace().eq(answer.split_whitespace());
        let limit = format!("compared as text, being longer than {MAX_ANSWER_BYTES} bytes");
        return if same { Ok(limit) } else { Err(format!("another text, {limit}")) };
    }
    let first = in_readings(gold, answer);
    if first.is_err()
        && let Some(stated) = extract::stated(answer)
        && let Ok(reason) = in_readings(gold, trimmed(&stated))
    {
        return Ok(reason);
    }
    first
}

/// Compares in each reading that the texts allow, the usual one first.
fn in_readings(gold: &str, answer: &str) -> equal::Finding {
    // A product of letters and a quantity look alike: `2mg`. The gold answer says which the answer is.
    let units = answer::read(gold, READINGS[0]).map_or(Units::Spaced, |gold| gold.answered_in());
    let of_answer = |reading: Reading| Reading { units, ..reading };
    let first = compared(gold, answer, READINGS[0], of_answer(READINGS[0]));
    if first.is_ok() {
        return first;
    }
    for reading in &READINGS[1..] {
        // Another reading of the answer counts only where it is one, and never turns a gold number into a list.
        if differs(gold, *reading) || differs(answer, *reading) {
            let of_gold = Reading { thousands: true, ..*reading };
            if let Ok(reason) = compared(gold, answer, of_gold, of_answer(*reading)) {
                return Ok(reason);
            }
        }
    }
    first
}

/// Whether the text has tokens of its own in this reading.
fn differs(text: &str, reading: Reading) -> bool {
    token::tokens(text, reading) != token::tokens(text, READINGS[0])
}

/// Without blanks and dollar signs around, and the full stop that ends a sentence.
fn trimmed(text: &str) -> &str {
    let outer = |c: char| c.is_whitespace() || c == '$';
    let text = text.trim_matches(outer);
    let text = text.strip_suffix('.').unwrap_or(text).trim_matches(outer);
    // `5\$` lost its dollar sign.
    text.strip_suffix('\\').unwrap_or(text)
}

fn compared(gold: &str, answer: &str, of_gold: Reading, of_answer: Reading) -> equal::Finding {
    let (a, b) = (answer::read(gold, of_gold), answer::read(answer, of_answer));
    let problem = match (&a, &b) {
        (Ok(a), Ok(b)) => return compare::answers(a, b),
        (Err(why), _) => format!("the gold answer: {why}"),
        (_, Err(why)) => format!("the answer: {why}"),
    };
    // No form for one of them: the same symbols in the same order are equal.
    let symbols = |text, reading| token::tokens(text, reading).map(|t| token::canonical(&t));
    match (symbols(gold, of_gold), symbols(answer, of_answer)) {
        (Ok(a), Ok(b)) if a == b => Ok(format!("the same symbols ({problem})")),
        (Err(_), Err(_)) if gold.split_whitespace().eq(answer.split_whitespace()) => {
            Ok(format!("the same text ({problem})"))
        }
        _ => Err(format!("not the same symbols ({problem})")),
    }
}
