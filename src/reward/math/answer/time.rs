//! Times of day and spans of time with colons: `12:30`, `3 p.m.`, `1:05:30`.

use crate::reward::math::expr::Expr;
use crate::reward::math::token::{Tok, Token};

/// A time as it is written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(in crate::reward::math) struct Time {
    /// Hours, minutes, seconds; what is not written is 0.
    parts: [u32; 3],
    /// How many of them stand there.
    written: usize,
    /// Whether it is after noon, where that is said.
    afternoon: Option<bool>,
}

impl Time {
    /// Two digits below 60 behind a colon make a time of what could be a ratio; a.m. or p.m. does without them.
    pub fn read(tokens: &[Token]) -> Option<Time> {
        let mut parts = [digits(tokens.first()?, 1)?, 0, 0];
        let mut written = 1;
        let mut rest = &tokens[1..];
        while let [Token { kind: Tok::Op(':'), .. }, part, tail @ ..] = rest {
            *parts.get_mut(written)? = digits(part, 2).filter(|part| *part < 60)?;
            written += 1;
            rest = tail;
        }
        let mut suffix = String::new();
        for token in rest {
            match &token.kind {
                Tok::Text(words) => suffix.push_str(words),
                Tok::Sym(letter) => suffix.push_str(letter),
                Tok::Op('.' | '\'') => suffix.push('.'),
                _ => return None,
            }
        }
        // `3am` is a product of letters.
        let product = rest.first().is_some_and(|token| !token.spaced)
            && rest.iter().all(|token| matches!(token.kind, Tok::Sym(_)))
            && suffix.bytes().all(|b| b.is_ascii_lowercase());
        let suffix: String =
            suffix.chars().filter(|c| c.is_alphabetic()).collect::<String>().to_lowercase();
        let afternoon = match suffix.as_str() {
            "" | "oclock" => None,
            "am" | "midnight" => Some(false),
            "pm" | "noon" => Some(true),
            _ => return None,
        };
        if written == 1 && (suffix.is_empty() || product) {
            return None;
        }
        let hours = if afternoon.is_some() { 12 } else { 24 };
        (parts[0] <= hours).then_some(Time { parts, written, afternoon })
    }

    /// Whether both are the same time; where one side leaves a.m. or p.m. out, as it is written or on a clock of 24
    /// hours.
    pub fn equals(&self, other: &Time) -> bool {
        match (self.afternoon, other.afternoon) {
            (None, None) => self.parts == other.parts,
            (Some(_), Some(_)) => self.of_day() == other.of_day(),
            (Some(_), None) => self.parts == other.parts || self.of_day() == other.parts,
            (None, Some(_)) => other.equals(self),
        }
    }

    /// Whether the word names it.
    pub fn is_called(&self, word: &str) -> bool {
        let noon = Time { parts: [12, 0, 0], written: 2, afternoon: Some(true) };
        match word {
            "noon" => self.equals(&noon),
            "midnight" => self.equals(&Time { afternoon: Some(false), ..noon }),
            _ => false,
        }
    }

    /// Hours, minutes and seconds since midnight.
    fn of_day(&self) -> [u32; 3] {
        let [hours, minutes, seconds] = self.parts;
        [hours % 12 + if self.afternoon == Some(true) { 12 } else { 0 }, minutes, seconds]
    }

    /// Whether it may have been meant as a ratio, which has no zero before a digit.
    fn is_ratio(&self) -> bool {
        self.afternoon.is_none()
            && self.written > 1
            && self.parts[1..self.written].iter().all(|n| *n > 9)
    }

    /// Whether it may have been meant as a ratio in lowest terms, as gold answers are.
    pub fn is_reduced(&self) -> bool {
        let common = |mut a: u32, mut b: u32| {
            while b > 0 {
                (a, b) = (b, a % b);
            }
            a
        };
        self.parts[..self.written].iter().fold(0, |all, part| common(all, *part)) == 1
    }

    /// Its parts as those of a ratio, which it may be where no a.m. or p.m. stands behind it.
    pub fn ratio(&self) -> Option<Vec<Expr>> {
        self.is_ratio()
            .then(|| self.parts[..self.written].iter().map(|n| Expr::int((*n).into())).collect())
    }
}

/// The value of one or two digits, of two where `least` is 2.
fn digits(token: &Token, least: usize) -> Option<u32> {
    match &token.kind {
        Tok::Num(digits) if (least..=2).contains(&digits.len()) => digits.parse().ok(),
        _ => None,
    }
}
