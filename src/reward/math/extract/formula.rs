//! Formulas between the delimiters of TeX: `$..$`, `$$..$$`, `\(..\)`, `\[..\]`, `\begin{..}..\end{..}`.

use std::ops::Range;

use crate::reward::math::names;

/// Longest formula between single dollars, in bytes.
const MAX_INLINE_BYTES: usize = 2000;

/// A formula: all of it, and what stands between its delimiters.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Formula {
    pub whole: Range<usize>,
    pub inner: Range<usize>,
}

/// Finds formulas from left to right, each in time of its length: a delimiter that nothing closes is looked for once.
pub(super) struct Finder<'a> {
    text: &'a str,
    /// Delimiters that do not come again.
    lost: Vec<String>,
}

impl<'a> Finder<'a> {
    pub fn new(text: &'a str) -> Finder<'a> {
        Finder { text, lost: Vec::new() }
    }

    /// The formula that begins at this byte.
    pub fn at(&mut self, start: usize) -> Option<Formula> {
        let rest = &self.text[start..];
        if rest.starts_with("$$") {
            return self.between(start, "$$", "$$");
        }
        if rest.starts_with('$') {
            return self.inline(start);
        }
        if rest.starts_with("\\(") {
            return self.between(start, "\\(", "\\)");
        }
        if rest.starts_with("\\[") {
            return self.between(start, "\\[", "\\]");
        }
        let (name, _) = rest.strip_prefix("\\begin{")?.split_once('}')?;
        if name.len() > 20 || !name.bytes().all(|b| b.is_ascii_alphabetic() || b == b'*') {
            return None;
        }
        let (open, close) = (format!("\\begin{{{name}}}"), format!("\\end{{{name}}}"));
        let found = self.between(start, &open, &close)?;
        // What matters of a matrix is its environment.
        let inner = if names::is_matrix(name) { found.whole.clone() } else { found.inner };
        Some(Formula { inner, ..found })
    }

    fn between(&mut self, start: usize, open: &str, close: &str) -> Option<Formula> {
        if self.lost.iter().any(|lost| lost == close) {
            return None;
        }
        let from = start + open.len();
        let Some(length) = self.text[from..].find(close) else {
            self.lost.push(close.to_string());
            return None;
        };
        let end = from + length + close.len();
        let formula = Formula { whole: start..end, inner: from..from + length };
        (!self.text[formula.inner.clone()].trim().is_empty()).then_some(formula)
    }

    /// `$..$`, unless the first dollar is a currency's.
    fn inline(&self, start: usize) -> Option<Formula> {
        let from = start + 1;
        let mut bytes = self.text[from..].bytes().enumerate().take(MAX_INLINE_BYTES);
        let length = loop {
            match bytes.next()? {
                (_, b'\\') => drop(bytes.next()),
                (at, b'$') => break at,
                (at, b'\n') if self.text[from + at + 1..].starts_with('\n') => return None,
                _ => {}
            }
        };
        let content = &self.text[from..from + length];
        let after = self.text[from + length + 1..].chars().next();
        let number = |c: Option<char>| c.is_some_and(|c| c.is_ascii_digit());
        // `$5 and $7`, `$5-$7`: the second dollar begins another sum.
        let sums = number(content.chars().next()) && number(after);
        let formula = Formula { whole: start..from + length + 1, inner: from..from + length };
        (!content.trim().is_empty() && !sums && !is_prose(content)).then_some(formula)
    }
}

/// Whether two or more plain words stand in it, outside of braces.
fn is_prose(content: &str) -> bool {
    let mut words = 0;
    let (mut depth, mut at) = (0usize, 0);
    let bytes = content.as_bytes();
    while at < bytes.len() {
        let length = bytes[at..].iter().take_while(|b| b.is_ascii_alphabetic()).count();
        match bytes[at] {
            b'\\' => {
                let name = bytes[at + 1..].iter().take_while(|b| b.is_ascii_alphabetic()).count();
                at += 1 + name.max(1);
                continue;
            }
            b'{' => depth += 1,
            b'}' => depth = depth.saturating_sub(1),
            _ if length > 0 => {
                let word = &content[at..at + length];
                let plain = length > 2 && !word.bytes().all(|b| b.is_ascii_uppercase());
                words += usize::from(depth == 0 && plain && names::word(word).is_none());
                at += length;
                continue;
            }
            _ => {}
        }
        at += 1;
    }
    words > 1
}

/// What a formula says in the end: the last row of an environment of several, without the marks of alignment and the
/// punctuation of the sentence around.
pub(super) fn last_row(inner: &str) -> String {
    let mut inner = inner.trim();
    for name in ["aligned", "align", "align*", "gathered", "gather", "gather*", "split", "equation"]
    {
        if let Some(rest) = inner.strip_prefix(&format!("\\begin{{{name}}}")) {
            inner = rest.split(&format!("\\end{{{name}}}")).next().unwrap_or(rest).trim();
        }
    }
    let rows = !inner.contains("\\begin{") && inner.contains("\\\\");
    let row = if rows {
        let mut rows = inner.rsplit("\\\\").map(str::trim).filter(|row| !row.is_empty());
        rows.next().unwrap_or(inner)
    } else {
        inner
    };
    let row = if inner.contains("\\begin{") { row.to_string() } else { row.replace('&', " ") };
    let mut row = row.trim();
    loop {
        let before = row;
        for end in [".", ",", ";", ":", "\\,", "\\;", "\\!", "\\ ", "\\quad"] {
            row = row.strip_suffix(end).unwrap_or(row).trim_end();
        }
        for start in
            ["=", "\\approx", "\\implies", "\\Rightarrow", "\\therefore", "\\Longrightarrow"]
        {
            row = row.strip_prefix(start).unwrap_or(row).trim_start();
        }
        if row == before {
            return row.to_string();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dollars_are_delimiters_or_money() {
        for (text, inner) in [
            ("$x$", Some("x")),
            ("$ \\frac{3}{7} $", Some(" \\frac{3}{7} ")),
            ("$$x$$", Some("x")),
            ("\\(x\\)", Some("x")),
            ("\\[\nx\n\\]", Some("\nx\n")),
            ("\\begin{pmatrix}1\\end{pmatrix}.", Some("\\begin{pmatrix}1\\end{pmatrix}")),
            ("\\begin{align}x\\end{align}", Some("x")),
            ("$5 and $7 more", None),
            ("$5-$7", None),
            ("$5 for the first and then $", None),
            ("$5 per day", None),
            ("$12 \\text{ for all of them}$", Some("12 \\text{ for all of them}")),
            ("$a\n\nb$", None),
            ("$$", None),
            ("\\(x", None),
        ] {
            let found = Finder::new(text).at(0).map(|found| &text[found.inner]);
            assert_eq!(found, inner, "{text}");
        }
    }

    #[test]
    fn the_last_row_counts() {
        for (inner, row) in [
            ("x &= 3 + 4 \\\\ &= 7", "7"),
            ("\\begin{aligned} a &= 1 \\\\ b &= 2 \\\\ \\end{aligned}", "b  = 2"),
            ("x = 7.", "x = 7"),
            ("x = 7\\,,", "x = 7"),
            ("\\begin{pmatrix}1\\\\2\\end{pmatrix}", "\\begin{pmatrix}1\\\\2\\end{pmatrix}"),
        ] {
            assert_eq!(last_row(inner), row, "{inner}");
        }
    }
}
