//! A completion as words and formulas.

use super::formula::Finder;
use crate::reward::math::expr::Fun;
use crate::reward::math::{names, units};

/// Longest bracket that is read ahead, in bytes.
const MAX_BRACKET_BYTES: usize = 300;

/// Longest word that is looked at as mathematics, in bytes.
const MAX_WORD_BYTES: usize = 1 << 12;

/// A word or formula of a text.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Item {
    /// Its first byte, typography and punctuation aside.
    pub start: usize,
    /// Behind its last byte.
    pub end: usize,
    pub kind: Kind,
    /// The punctuation behind it.
    pub stop: Option<char>,
    /// Whether it begins a line.
    pub first: bool,
}

/// What an item is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    /// Between delimiters; the bytes that these take at the front and at the end.
    Formula(usize, usize),
    /// Mathematics in plain text: `3/7`, `=`, `2^{10}`, `(1, 2)`.
    Math,
    /// One letter.
    Letter,
    And,
    Or,
    /// The name of a unit, or what goes with one: `square`, `per`, `million`.
    Unit,
    /// Brackets around words.
    Aside,
    /// Typography alone, as a dash.
    Mark,
    /// Any other word.
    Plain,
}

impl Item {
    pub fn text<'a>(&self, text: &'a str) -> &'a str {
        &text[self.start..self.end]
    }

    /// Whether it is a value or part of one.
    pub fn is_math(&self) -> bool {
        matches!(self.kind, Kind::Formula(..) | Kind::Math)
    }

    /// Whether a sentence ends behind it; `next` is what follows.
    pub fn ends_sentence(&self, text: &str, next: Option<&Item>) -> bool {
        let short = ["a.m", "p.m", "i.e", "e.g", "approx", "resp", "no", "mr", "mrs", "dr", "st"];
        match self.stop {
            Some('!' | '?') => true,
            Some('.') if short.contains(&self.text(text).to_ascii_lowercase().as_str()) => {
                next.is_none_or(|next| next.text(text).starts_with(char::is_uppercase))
            }
            Some('.') => true,
            _ => false,
        }
    }
}

/// The items of a text. Linear in its length, brackets read ahead aside.
pub(super) fn items(text: &str) -> Vec<Item> {
    let mut finder = Finder::new(text);
    let mut items: Vec<Item> = Vec::new();
    let (mut at, mut first) = (0, true);
    while let Some(c) = text[at..].chars().next() {
        if c.is_whitespace() {
            first |= c == '\n';
            at += c.len_utf8();
            continue;
        }
        if let Some(found) = finder.at(at) {
            let (open, close) = (found.inner.start - at, found.whole.end - found.inner.end);
            let mut item = Item {
                start: at,
                end: found.whole.end,
                kind: Kind::Formula(open, close),
                stop: None,
                first,
            };
            at = found.whole.end;
            at += tail(&text[at..], &mut item);
            // `$n$-th`, `$3$rd`: part of a word.
            let rest = text[at..].strip_prefix('-').unwrap_or(&text[at..]);
            let word: String = rest.chars().take_while(char::is_ascii_alphabetic).collect();
            if item.stop.is_none() && !word.is_empty() && !units::is_unit(&word) {
                item.kind = Kind::Plain;
            }
            items.push(item);
            first = false;
            continue;
        }
        let end = match bracket(text, at) {
            Some((end, false)) => {
                let mut item = Item { start: at, end, kind: Kind::Aside, stop: None, first };
                at = end + tail(&text[end..], &mut item);
                items.push(item);
                first = false;
                continue;
            }
            _ => word_end(text, at, &mut finder),
        };
        let item = word(text, at, end, first);
        at = end;
        if item.start == item.end {
            // Typography alone.
            if let Some(last) = items.last_mut() {
                last.stop = last.stop.or(item.stop);
            }
            continue;
        }
        items.push(item);
        first = false;
    }
    items
}

/// Where the word that begins at `start` ends: at a blank outside of braces and of brackets with mathematics in them,
/// or where a formula begins.
fn word_end(text: &str, start: usize, finder: &mut Finder<'_>) -> usize {
    let (mut at, mut depth) = (start, 0usize);
    while let Some(c) = text[at..].chars().next() {
        match c {
            '{' => depth += 1,
            '}' => depth = depth.saturating_sub(1),
            '(' | '[' if depth == 0 => {
                if let Some((end, true)) = bracket(text, at) {
                    at = end;
                    continue;
                }
            }
            // `Sum:5`
            ':' if at > start + 1 && text[start..at].bytes().all(|b| b.is_ascii_alphabetic()) => {
                return at + 1;
            }
            c if c.is_whitespace() && (depth == 0 || at - start > MAX_BRACKET_BYTES) => return at,
            '$' | '\\' if at > start && depth == 0 && finder.at(at).is_some() => return at,
            _ => {}
        }
        at += c.len_utf8();
    }
    at
}

/// Where the bracket that opens here is closed, and whether mathematics alone stands in it.
fn bracket(text: &str, start: usize) -> Option<(usize, bool)> {
    let mut depth = 0usize;
    for (at, byte) in text.as_bytes()[start..].iter().enumerate().take(MAX_BRACKET_BYTES) {
        match byte {
            b'(' | b'[' => depth += 1,
            b')' | b']' if depth <= 1 => {
                let inside = text.get(start + 1..start + at)?;
                return (depth == 1).then_some((start + at + 1, is_mathematics(inside, true)));
            }
            b')' | b']' => depth -= 1,
            b'\n' if text[start + at + 1..].starts_with('\n') => return None,
            _ if depth == 0 => return None,
            _ => {}
        }
    }
    None
}

/// Reads the typography and punctuation behind an item; its length.
fn tail(rest: &str, item: &mut Item) -> usize {
    let mut length = 0;
    for c in rest.chars() {
        match c {
            '.' | ',' | ';' | ':' | '!' | '?' => item.stop = item.stop.or(Some(c)),
            '*' | '_' | '`' | '"' | '\u{201d}' | '\'' | ')' | '}' => {}
            _ => break,
        }
        length += c.len_utf8();
    }
    length
}

/// Whether a colon that stands alone between numbers is a ratio's.
fn is_ratio(text: &str, start: usize, end: usize) -> bool {
    let digit = |c: Option<char>| c.is_some_and(|c| c.is_ascii_digit());
    &text[start..end] == ":"
        && digit(text[..start].trim_end().chars().last())
        && digit(text[end..].trim_start().chars().next())
}

/// The word in these bytes, its typography and punctuation taken off.
fn word(text: &str, start: usize, end: usize, first: bool) -> Item {
    let operator = !first && matches!(&text[start..end], "*" | "/");
    if operator || is_ratio(text, start, end) {
        return Item { start, end, kind: Kind::Math, stop: None, first };
    }
    let raw = &text[start..end];
    let opening = |c: char| matches!(c, '*' | '`' | '"' | '\u{201c}' | '\u{2018}' | '#' | '_');
    let braced = raw.contains('{');
    let closing = |c: char| match c {
        '*' | '`' | '"' | '\u{201d}' | '_' | '$' => true,
        '}' => !braced,
        _ => false,
    };
    let mut core = raw.trim_start_matches(opening);
    let mut stop = None;
    // `5!` is a factorial.
    while let Some(c) = core.chars().last() {
        let value = |c: char| c.is_ascii_digit() || matches!(c, ')' | '!' | '}');
        let factorial = c == '!' && core.chars().nth_back(1).is_some_and(value);
        match c {
            '.' | ',' | ';' | ':' | '!' | '?' if !factorial => stop = Some(c),
            c if closing(c) => {}
            _ => break,
        }
        core = &core[..core.len() - c.len_utf8()];
    }
    let at = start + (core.as_ptr() as usize - raw.as_ptr() as usize);
    Item { start: at, end: at + core.len(), kind: kind(core, first), stop, first }
}

fn kind(core: &str, first: bool) -> Kind {
    let lower = core.to_ascii_lowercase();
    match lower.as_str() {
        "\u{2014}" | "\u{2013}" | "--" | "|" | "•" | "→" | "=>" | "->" => return Kind::Mark,
        "-" | "+" | "*" if first => return Kind::Mark,
        "and" => return Kind::And,
        "or" => return Kind::Or,
        _ => {}
    }
    let mut letters = core.chars();
    if letters.next().is_some_and(char::is_alphabetic)
        && (letters.as_str().is_empty() || letters.as_str().starts_with('_'))
        && core.is_ascii()
    {
        return Kind::Letter;
    }
    // `[3]`: a reference.
    let reference = core.strip_prefix('[').and_then(|core| core.strip_suffix(']'));
    if reference.is_some_and(|n| !n.is_empty() && n.bytes().all(|b| b.is_ascii_digit())) {
        return Kind::Mark;
    }
    // `(C)`, `C)`: a choice.
    let choice = core.strip_suffix(')').map(|core| core.trim_start_matches('('));
    if choice.is_some_and(|c| c.len() == 1 && c.starts_with(|c: char| c.is_ascii_uppercase())) {
        return Kind::Letter;
    }
    let modifier =
        ["square", "cubic", "per", "percent", "degrees", "degree", "o'clock", "pm", "am"];
    let modifier = modifier.contains(&lower.as_str()) || matches!(lower.as_str(), "a.m" | "p.m");
    let alphabetic = lower.bytes().all(|b| b.is_ascii_alphabetic());
    if modifier
        || units::multiplier(&lower).is_some()
        || alphabetic && lower.len() > 1 && lower != "in" && units::is_unit(core)
    {
        return Kind::Unit;
    }
    let short = core.len() <= MAX_WORD_BYTES;
    if short && is_mathematics(core, false) { Kind::Math } else { Kind::Plain }
}

/// Whether the text holds mathematics and no word. In brackets single letters and "and" may stand alone.
fn is_mathematics(text: &str, inside: bool) -> bool {
    let bytes = text.as_bytes();
    let operators = text.contains(['=', '^', '+']);
    let equation = text.contains('=');
    let mut value = inside && !text.trim().is_empty();
    let mut at = 0;
    let mut letters = 0;
    let mut last = '\0';
    while let Some(c) = text[at..].chars().next() {
        let length = bytes[at..].iter().take_while(|b| b.is_ascii_alphabetic()).count();
        if c == '\\' {
            let name = bytes[at + 1..].iter().take_while(|b| b.is_ascii_alphabetic()).count();
            value |= name > 0;
            at += 1 + name;
            // What stands in `\text{..}` is its own.
            let group = text[at..].strip_prefix('{').filter(|_| is_text(&text[..at]));
            at += group.and_then(super::boxes::closed).map_or(0, |inside| inside.len() + 2);
            last = '\\';
            continue;
        }
        if length > 0 {
            let run = &text[at..at + length];
            at += length;
            let behind = last.is_ascii_digit() || matches!(last, '/' | '^' | '°');
            let joint = matches!(run, "and" | "or") && !inside;
            let known = !joint && (Fun::named(run).is_some() || names::word(run).is_some());
            let unit = behind && (units::is_unit(run) || units::multiplier(run).is_some());
            let time = behind && matches!(run.to_ascii_lowercase().as_str(), "am" | "pm");
            let capitals = equation && run.bytes().all(|b| b.is_ascii_uppercase());
            let formula = operators || last == '}';
            let product =
                run.len() < 4 && formula || inside && run.len() < 3 || last == '/' && value;
            if run.len() > 1 && !(known || unit || time || capitals || product) {
                return false;
            }
            // `x2`, `H2O`: names, unless an operator says otherwise.
            let digit = text[at..].starts_with(|c: char| c.is_ascii_digit());
            // `2e5`, `10x6`
            let exponent = last.is_ascii_digit() && matches!(run, "e" | "E" | "x");
            if digit && !exponent && !known {
                return false;
            }
            letters += 1;
            last = 'a';
            continue;
        }
        value |= c.is_ascii_digit() || "=+^<>×÷·±≤≥≈≠−πθ∞√½⅓⅔¼¾²³∪∩∅ℝ%".contains(c);
        value |= letters > 0 && matches!(c, '/' | '*' | '(');
        value |= c == '-' && text.len() == 1;
        if c.is_alphabetic() && !c.is_ascii() && names::unicode(c).is_none() {
            return false;
        }
        last = c;
        at += c.len_utf8();
    }
    // `3-`, `1)`: what is left of a word or of a list's number.
    value && (!text.ends_with(')') || text.contains(['(', '[']))
}

/// Whether a command that holds words ends here.
fn is_text(before: &str) -> bool {
    ["\\text", "\\mathrm", "\\mbox", "\\textbf"].iter().any(|name| before.ends_with(name))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// One letter for each item.
    fn kinds(text: &str) -> String {
        let letter = |item: &Item| match item.kind {
            Kind::Formula(..) => 'F',
            Kind::Math => 'M',
            Kind::Letter => 'l',
            Kind::And => '&',
            Kind::Or => '|',
            Kind::Unit => 'u',
            Kind::Aside => 'a',
            Kind::Mark => '-',
            Kind::Plain => 'p',
        };
        items(text).iter().map(letter).collect()
    }

    #[test]
    fn words_and_formulas_are_told_apart() {
        for (text, expected) in [
            ("So 3 apples and 4 pears make 7.", "pMp&Mpp M"),
            ("The probability is $\\frac{3}{7}$.", "pppF"),
            ("it costs $29.00 (with the tip)", "ppMa"),
            ("x = 5, y = -3/2", "lMM lMM"),
            ("the 2nd of H2O and 3-digit x2", "pppp&pp"),
            ("5cm or 12 square meters, 20% - 3 p.m.", "M|Muu MMMu"),
            ("the point (1, 2) and [3, 5)", "ppM&M"),
            ("the $n$-th of $3$ cm", "pppp Fu"),
            ("2^{10} = 1024", "MMM"),
            ("sqrt(2) f(x) a/b and/or", "MMMp"),
            ("- 5 apples \u{2014} no", "-Mp-p"),
        ] {
            let expected: String = expected.replace(' ', "");
            let found = kinds(text);
            // `pppp F`: a formula that is part of a word is two plain items.
            assert_eq!(found, expected, "{text}");
        }
    }

    #[test]
    fn punctuation_is_kept_apart() {
        let text = "**12**, `$13$`. 5! At 3:00 p.m. we left.";
        let items = items(text);
        let parts: Vec<_> = items.iter().map(|item| (item.text(text), item.stop)).collect();
        assert_eq!(parts[..3], [("12", Some(',')), ("$13$", Some('.')), ("5!", None)]);
        assert_eq!(parts[5], ("p.m", Some('.')));
        assert!(!items[5].ends_sentence(text, items.get(6)));
        assert!(items[1].ends_sentence(text, items.get(2)));
    }
}
