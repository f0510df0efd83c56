//! Words, and numbers in words.

use super::Answer;
use crate::reward::math::expr::Expr;
use crate::reward::math::token::{Tok, Token};
use crate::reward::math::units::Unit;

/// Words alone, or capital letters or a Roman numeral in a row.
pub(super) fn words(tokens: &[Token]) -> Option<Answer> {
    let mut text = String::new();
    let mut worded = false;
    for token in tokens {
        if token.spaced && !text.is_empty() {
            text.push(' ');
        }
        match &token.kind {
            Tok::Text(words) => {
                if worded && !text.ends_with(' ') {
                    text.push(' ');
                }
                worded = true;
                text.push_str(words);
            }
            Tok::Sym(letter) if letter.len() == 1 => text.push_str(letter),
            Tok::Op('-' | '\'') if !text.is_empty() => text.push('-'),
            _ => return None,
        }
    }
    let text = text.trim_end_matches('-');
    if worded {
        let lower = text.to_lowercase();
        let words: Vec<_> = lower
            .split(|c: char| c.is_whitespace() || c == '~' || c == '-')
            .filter(|word| !matches!(*word, "" | "the" | "a" | "an" | "is"))
            .collect();
        let words = words.join(" ");
        return Some(match number_word(&words) {
            Some(n) => Answer::Quantity { value: Expr::int(n), unit: Unit::parse(&[]).ok()? },
            None => Answer::Words(words),
        });
    }
    let capitals = text.bytes().all(|b| b.is_ascii_uppercase());
    let roman =
        text.bytes().all(|b| matches!(b, b'i' | b'v' | b'x')) && text.starts_with(['i', 'v']);
    let roman = roman && matches!(text, "ii" | "iii" | "iv" | "vi" | "vii" | "viii" | "ix");
    (text.len() > 1 && (capitals || roman)).then(|| Answer::Letters(text.into()))
}

/// The value of `forty two`, `three hundred five`.
fn number_word(words: &str) -> Option<i64> {
    const ONES: [&str; 20] = [
        "zero",
        "one",
        "two",
        "three",
        "four",
        "five",
        "six",
        "seven",
        "eight",
        "nine",
        "ten",
        "eleven",
        "twelve",
        "thirteen",
        "fourteen",
        "fifteen",
        "sixteen",
        "seventeen",
        "eighteen",
        "nineteen",
    ];
    const TENS: [&str; 8] =
        ["twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"];
    let (mut total, mut part) = (0i64, None::<i64>);
    for word in words.split(' ') {
        let place = |names: &[&str]| names.iter().position(|name| *name == word).map(|n| n as i64);
        let below = part.unwrap_or(0);
        part = Some(match (place(&ONES), place(&TENS), word) {
            (Some(0), ..) if part.is_none() && total == 0 => 0,
            (Some(n @ 1..=9), ..) if below % 10 == 0 && below % 100 != 10 => below + n,
            (Some(n @ 10..), ..) if below % 100 == 0 => below + n,
            (_, Some(n), _) if below % 100 == 0 => below + 10 * (n + 2),
            (.., "hundred") if below < 10 => 100 * part.unwrap_or(1),
            (.., "thousand") if total == 0 => {
                total = 1000 * part.unwrap_or(1);
                0
            }
            _ => return None,
        });
    }
    part.map(|part| total + part)
}
