//! The string normalisation that the MATH data set was published with (Hendrycks et al., "Measuring
//! Mathematical Problem Solving With the MATH Dataset", 2021), which the paper's reward uses: two answers are
//! equal when they are the same text after it. Written anew from its rules; it knows no number, so that `0.25`
//! is not `\frac{1}{4}` to it.
//!
//! The rules, in their order: line ends and `\!` go; `\\` becomes `\`; `tfrac`, `dfrac` become `frac`; `\left`,
//! `\right`, degree signs and `\$` go; what follows the one `\text{ ` goes; `\%` goes; a decimal point at the
//! front or after a blank or brace gets its 0; `k = ` of at most two letters goes; `\sqrt3` becomes
//! `\sqrt{3}`; blanks go; `\frac12` becomes `\frac{1}{2}`; `0.5` becomes `\frac{1}{2}`; `2/3` becomes
//! `\frac{2}{3}`.

/// Whether both are the same text after normalisation.
pub(super) fn equal(gold: &str, answer: &str) -> bool {
    match (normalise(gold), normalise(answer)) {
        (Some(gold), Some(answer)) => gold == answer,
        // The published code falls back to the texts where its own steps fail.
        _ => gold == answer,
    }
}

/// The normal form; `None` where the published code raises an error.
pub(super) fn normalise(text: &str) -> Option<String> {
    let text = text.replace('\n', "").replace("\\!", "").replace("\\\\", "\\");
    let text = text.replace("tfrac", "frac").replace("dfrac", "frac");
    let text = text.replace("\\left", "").replace("\\right", "");
    let text = text.replace("^{\\circ}", "").replace("^\\circ", "").replace("\\$", "");
    let text = without_unit(&text)?;
    // `\%` first: the published code removes both spellings of it, never a bare `%`.
    let text = text.replace("\\%", "").replace(" .", " 0.").replace("{.", "{0.");
    if text.is_empty() {
        return Some(text);
    }
    let text = if text.starts_with('.') { format!("0{text}") } else { text };
    let text = match text.split('=').collect::<Vec<_>>()[..] {
        [name, value] if name.chars().count() <= 2 => value.to_string(),
        _ => text,
    };
    let text = braced_roots(&text)?.replace(' ', "");
    let text = braced_fractions(&text);
    let text = if text == "0.5" { "\\frac{1}{2}".into() } else { text };
    Some(slash_fraction(text))
}

/// What stands before `\text{ `; it may stand there once.
fn without_unit(text: &str) -> Option<String> {
    let parts: Vec<_> = text.split("\\text{ ").collect();
    match parts[..] {
        [whole] => Some(whole.into()),
        [value, _] => Some(value.into()),
        _ => None,
    }
}

/// `\sqrt3` as `\sqrt{3}`.
fn braced_roots(text: &str) -> Option<String> {
    let mut parts = text.split("\\sqrt");
    let mut out = parts.next().unwrap_or_default().to_string();
    for part in parts {
        out.push_str("\\sqrt");
        let first = part.chars().next()?;
        if first == '{' {
            out.push_str(part);
        } else {
            out.push_str(&format!("{{{first}}}{}", &part[first.len_utf8()..]));
        }
    }
    Some(out)
}

/// `\frac12`, `\frac1{72}` with their braces; the text as it is where a fraction has less than two characters.
fn braced_fractions(text: &str) -> String {
    let mut parts = text.split("\\frac");
    let mut out = parts.next().unwrap_or_default().to_string();
    for part in parts {
        out.push_str("\\frac");
        let mut characters = part.chars();
        match (characters.next(), characters.next()) {
            (Some('{'), _) => out.push_str(part),
            (Some(a), Some(b)) => {
                let rest = characters.as_str();
                let below = if b == '{' { b.to_string() } else { format!("{{{b}}}") };
                out.push_str(&format!("{{{a}}}{below}{rest}"));
            }
            _ => return text.into(),
        }
    }
    out
}

/// `2/3` of two integers, written as Python writes them, as `\frac{2}{3}`.
fn slash_fraction(text: String) -> String {
    let parts: Vec<_> = text.split('/').collect();
    let integer = |part: &str| {
        let digits = part.strip_prefix('-').unwrap_or(part);
        let canonical = digits == "0" && !part.starts_with('-')
            || !digits.is_empty() && !digits.starts_with('0');
        canonical && digits.bytes().all(|b| b.is_ascii_digit())
    };
    match parts[..] {
        [a, b] if integer(a) && integer(b) => format!("\\frac{{{a}}}{{{b}}}"),
        _ => text,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_published_rules() {
        for (text, normal) in [
            ("  \\frac12 ", "\\frac{1}{2}"),
            ("\\dfrac{1}{2}", "\\frac{1}{2}"),
            ("\\tfrac1{72}", "\\frac{1}{72}"),
            ("\\frac1b2", "\\frac{1}{b}2"),
            ("1/2", "\\frac{1}{2}"),
            ("-3/4", "\\frac{-3}{4}"),
            ("a/b", "a/b"),
            ("01/2", "01/2"),
            ("0.5", "\\frac{1}{2}"),
            (".5", "\\frac{1}{2}"),
            ("0.50", "0.50"),
            ("\\sqrt3+\\sqrt{5}", "\\sqrt{3}+\\sqrt{5}"),
            ("x = 5", "5"),
            ("abc=5", "abc=5"),
            ("5 \\text{ cm}", "5"),
            ("5\\text{cm}", "5\\text{cm}"),
            ("50\\%", "50"),
            ("\\$3.25", "3.25"),
            ("90^\\circ", "90"),
            ("90^{\\circ}", "90"),
            ("\\left( 1, 2 \\right)", "(1,2)"),
            ("10,\\!080", "10,080"),
            ("( .5, 1)", "(0.5,1)"),
            ("", ""),
            ("\\frac", "\\frac"),
        ] {
            assert_eq!(normalise(text).as_deref(), Some(normal), "{text}");
        }
        assert_eq!(normalise("\\sqrt"), None);
        assert_eq!(normalise("1\\text{ a}\\text{ b}"), None);
        assert!(equal("\\sqrt", "\\sqrt"));
        assert!(!equal("0.25", "\\frac{1}{4}"));
    }
}
