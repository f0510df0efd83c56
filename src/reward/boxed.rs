//! The last `\boxed{..}` of a completion against the answer: as numbers where both are, else as text.
//!
//! Everything is linear in the lengths of the texts, but for fractions, whose parts are short (see
//! [`Number`](super::number::Number)).

use super::{Verdict, math::closed, number::Number, quoted, thoughts::spoken};

/// 1 when the last box equals the answer; thoughts aside.
pub(super) fn score(answer: &str, completion: &str) -> Verdict {
    let Some(said) = spoken(completion) else {
        return Verdict::wrong("the thoughts are not closed");
    };
    let Some(boxed) = last_boxed(said) else {
        return Verdict::wrong("no \\boxed{..}");
    };
    // An answer that is itself boxed means what is in the box.
    let answer = last_boxed(answer).unwrap_or(answer);
    let (ours, theirs) = (inner(answer), inner(boxed));
    if let (Some(a), Some(b)) = (Number::parse(ours), Number::parse(theirs)) {
        if a.equals(&b) {
            let reason = format!("{} equals {} as a number", quoted(theirs), quoted(ours));
            return Verdict::right(reason);
        }
    } else if ours.split_whitespace().eq(theirs.split_whitespace()) {
        return Verdict::right(format!("{} as text", quoted(theirs)));
    }
    Verdict::wrong(format!("{} is not {}", quoted(theirs), quoted(ours)))
}

/// Whether two contents of boxes are equal, as [`score`] compares them.
pub(super) fn same(a: &str, b: &str) -> bool {
    let (a, b) = (inner(a), inner(b));
    match (Number::parse(a), Number::parse(b)) {
        (Some(a), Some(b)) => a.equals(&b),
        _ => a.split_whitespace().eq(b.split_whitespace()),
    }
}

/// The content of the last `\boxed{..}`, `\fbox{..}` or `\boxed 5`; `None` when there is none, or the last
/// one is not closed or empty.
///
/// Braces balance; `\{` and `\}` do not count. Without braces the content ends at a blank or a `$`, less the
/// punctuation that ends a sentence.
pub fn last_boxed(text: &str) -> Option<&str> {
    let after = text.rmatch_indices('\\').find_map(|(start, _)| {
        let command = &text[start..];
        let rest = command.strip_prefix("\\boxed").or_else(|| command.strip_prefix("\\fbox"))?;
        // `\boxedfoo` is another command.
        (!rest.starts_with(|c: char| c.is_ascii_alphabetic())).then_some(rest)
    })?;
    let content = match after.trim_start().strip_prefix('{') {
        Some(group) => closed(group)?,
        None => {
            let end = |c: char| c.is_whitespace() || c == '$';
            let word = after.trim_start().split(end).next().unwrap_or_default();
            word.trim_end_matches(['.', ',', ';', ':', '!', '?'])
        }
    };
    Some(content.trim()).filter(|content| !content.is_empty())
}

/// Without blanks and the dollars of TeX's mathematics around.
fn inner(text: &str) -> &str {
    text.trim_matches(|c: char| c.is_whitespace() || c == '$')
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn the_last_box_is_found() {
        for (text, expected) in [
            ("\\boxed{42}", Some("42")),
            ("first \\boxed{1}, then \\boxed{ 2 }.", Some("2")),
            ("\\boxed{\\frac{1}{2}} done", Some("\\frac{1}{2}")),
            ("\\boxed{\\{1, 2\\}}", Some("\\{1, 2\\}")),
            ("\\boxed{\\left\\{ x \\right.}", Some("\\left\\{ x \\right.")),
            ("\\boxed{a \\\\} b}", Some("a \\\\")),
            ("\\boxed{\\boxed{5}}", Some("5")),
            ("\\fbox{7}", Some("7")),
            ("\\boxed {8}", Some("8")),
            ("$\\boxed 5$", Some("5")),
            ("it is \\boxed 12.5. Yes", Some("12.5")),
            ("\\boxed-3", Some("-3")),
            ("\\boxedfoo{1}", None),
            ("\\boxed{1} \\boxedfoo{2}", Some("1")),
            ("\\boxed{1} and \\boxed{2", None),
            ("\\boxed{}", None),
            ("\\boxed", None),
            ("\\boxed{\\", None),
            ("boxed{1}", None),
            ("\\boxed{ü\u{1f600}}", Some("ü\u{1f600}")),
            ("", None),
        ] {
            assert_eq!(last_boxed(text), expected, "{text}");
        }
    }

    #[test]
    fn answers_compare_as_numbers_or_as_text() {
        for (answer, boxed, right) in [
            ("42", "42", true),
            ("42", "042", true),
            ("42", "+42", true),
            ("42", "42.", true),
            ("42", "$42$", true),
            ("$42$", "42", true),
            ("\\boxed{42}", "42", true),
            ("42", "43", false),
            ("42", "-42", false),
            ("42", "", false),
            ("1/2", "0.5", true),
            ("1/2", "\\frac{2}{4}", true),
            ("x + 1", "x  +\n1", true),
            ("x + 1", "x+1", false),
            ("Paris", "paris", false),
            ("1/0", "1/0", true),
            ("1/0", "2/0", false),
        ] {
            let verdict = score(answer, &format!("so \\boxed{{{boxed}}}."));
            assert_eq!(verdict.reward == 1.0, right, "{answer} {boxed}: {}", verdict.reason);
        }
    }

    #[test]
    fn hostile_texts_are_judged_in_time() {
        let n = 1 << 20;
        for text in [
            "\\boxed{".repeat(n / 7),
            "{".repeat(n),
            "\\".repeat(n),
            format!("\\boxed{{{}}}", "9".repeat(n)),
            format!("\\boxed{{{}/{}}}", "9".repeat(n), "7".repeat(n)),
            format!("\\boxed{{{}{}}}", "{".repeat(n), "}".repeat(n)),
        ] {
            let verdict = score("42", &text);
            assert_eq!(verdict.reward, 0.0);
            assert!(verdict.reason.len() < 300);
        }
    }

    proptest! {
        #[test]
        fn never_panics(answer in ".{0,20}", text in "(\\\\boxed|\\\\fbox|[{}\\\\$ 0-9,./-]|\\PC){0,60}") {
            let verdict = score(&answer, &text);
            prop_assert!(verdict.reward == 0.0 || verdict.reward == 1.0);
        }

        #[test]
        fn what_is_boxed_is_found(content in "[a-z0-9 +*/.-]{0,5}[a-z0-9]") {
            let text = format!("a {{ b \\boxed{{{content}}} }} c");
            prop_assert_eq!(last_boxed(&text), Some(content.trim()));
            prop_assert_eq!(score(&content, &text).reward, 1.0);
        }
    }
}
