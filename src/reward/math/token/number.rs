//! Decimals, with separators of thousands and exponents.

use super::{Lexer, Tok};

impl Lexer<'_> {
    /// Digits, grouped by thousands outside of brackets, with a decimal part, an exponent, a repeating part.
    pub(super) fn number(&mut self) {
        let digits = |s: &str| s.bytes().take_while(u8::is_ascii_digit).count();
        let mut at = digits(self.rest);
        let mut text = self.rest[..at].to_string();
        if let Some((length, grouped)) = self.thousands(at) {
            (at, text) = (length, grouped);
        }
        if self.rest[at..].starts_with('.') {
            let part = digits(&self.rest[at + 1..]);
            if part > 0 {
                text.push_str(&self.rest[at..at + 1 + part]);
                at += 1 + part;
            } else if text.is_empty() || !self.rest[at + 1..].starts_with("\\overline") {
                // A full stop behind a number.
                at += 1;
            } else {
                text.push('.');
                at += 1;
            }
        }
        if self.reading.scientific
            && let Some(exponent) = exponent(&self.rest[at..])
        {
            text.push_str(&self.rest[at..at + exponent].to_ascii_lowercase().replace('+', ""));
            at += exponent;
        }
        if text.starts_with('.') {
            text.insert(0, '0');
        }
        self.rest = &self.rest[at..];
        self.push(Tok::Num(text));
    }

    /// The length and digits of `1,234,567`, whose first group is `first` long; `None` when it is something else.
    fn thousands(&self, first: usize) -> Option<(usize, String)> {
        let digits = |s: &str| s.bytes().take_while(u8::is_ascii_digit).count();
        let mut text = self.rest[..first].to_string();
        let mut at = first;
        // `{,}` and `,\!` only ever separate thousands; a bare comma does so outside of brackets, where no
        // other comma stands beside it.
        let listed = self.out.last().is_some_and(|t| t.kind == Tok::Op(','));
        let bare = self.reading.thousands && self.depth == 0 && !listed;
        if !(1..=3).contains(&first) {
            return None;
        }
        while let Some((gap, certain)) = separator(&self.rest[at..]) {
            let group = digits(&self.rest[at + gap..]);
            if group != 3 || !(certain || bare) {
                let list = !certain && group > 0;
                return (at > first && !list).then_some((at, text));
            }
            text.push_str(&self.rest[at + gap..at + gap + 3]);
            at += gap + 3;
        }
        (at > first).then_some((at, text))
    }
}

/// The length of a thousands separator, and whether it can be nothing else.
fn separator(rest: &str) -> Option<(usize, bool)> {
    if rest.starts_with("{,}") {
        return Some((3, true));
    }
    let after = rest.strip_prefix(',')?;
    match after.strip_prefix("\\!") {
        Some(tail) => Some((3 + (tail.len() - tail.trim_start_matches(' ').len()), true)),
        None => Some((1, false)),
    }
}

/// The length of `e-5`, where no letter follows.
fn exponent(rest: &str) -> Option<usize> {
    let after = rest.strip_prefix(['e', 'E'])?;
    let digits = after.strip_prefix(['+', '-']).unwrap_or(after);
    let length = digits.bytes().take_while(u8::is_ascii_digit).count();
    let end = rest.len() - digits.len() + length;
    let ends = !rest[end..].starts_with(|c: char| c.is_ascii_alphabetic() || c == '.' || c == '^');
    (length > 0 && ends).then_some(end)
}
