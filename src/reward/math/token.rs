//! LaTeX or plain text to tokens: what looks alike becomes alike (`\dfrac`, `\tfrac` and `\frac`; `\cdot`, `×` and
//! `*`; `\left(` and `(`), and typography goes.

use super::expr::Fun;
use super::names;

/// Most tokens that an answer may have.
const MAX_TOKENS: usize = 4096;
/// Deepest `\text{\text{..}}`.
const MAX_LEVEL: usize = 4;

/// A token and whether a blank stands before it.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Token {
    pub kind: Tok,
    pub spaced: bool,
}

/// The kinds of tokens.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Tok {
    /// A decimal as [`dashu`] reads it, with an exponent behind `e`: `12`, `0.5`, `1.5e-3`.
    Num(String),
    /// One letter, or the name of one: `x`, `alpha`, `pi`, `infty`.
    Sym(String),
    /// A function with a value: `\sin`, `sqrt`.
    Fun(Fun),
    /// A structural command, without its backslash: `frac`, `cup`, `<=`, `begin matrix`.
    Cmd(&'static str),
    /// Words: `\text{cm}`, or a run of letters that is no product.
    Text(String),
    /// A command or character that has no value here.
    Other(String),
    /// A character that stands for itself: operators, brackets, `{`, `}`, `,`.
    Op(char),
}

/// How text with two possible meanings is read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Reading {
    /// `1,234` is a number (else a list).
    pub thousands: bool,
    /// `2e3` is 2000 (else 2 times e times 3).
    pub scientific: bool,
    /// Which letters behind a number are a unit (else a product).
    pub units: Units,
}

/// Letters behind a number that are read as a unit, from the fewest to the most. `5 \text{ mg}` and `5 cm` always are.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd)]
pub(super) enum Units {
    /// No letters that may be a product: `2 mg` is 2 m g.
    Sure,
    /// `2 mg`, for the blank before it.
    Spaced,
    /// And one letter at the end: `2 m`.
    Letter,
    /// All that can be: `2mg`, `2m`.
    Any,
}

/// Tokens of `text`; the error says what stopped it.
pub(super) fn tokens(text: &str, reading: Reading) -> Result<Vec<Token>, String> {
    nested(text, reading, 0)
}

fn nested(text: &str, reading: Reading, level: usize) -> Result<Vec<Token>, String> {
    if level > MAX_LEVEL {
        return Err(format!("words nested more than {MAX_LEVEL} deep"));
    }
    let mut lexer = Lexer { rest: text, level, reading, out: Vec::new(), spaced: false, depth: 0 };
    while !lexer.rest.is_empty() {
        lexer.step()?;
        if lexer.out.len() > MAX_TOKENS {
            return Err(format!("more than {MAX_TOKENS} symbols"));
        }
    }
    Ok(lexer.out)
}

/// The tokens as text, for comparing what has no value: one blank between any two, no braces around one.
pub(super) fn canonical(tokens: &[Token]) -> String {
    let brace = |at: usize, c: char| tokens.get(at).is_some_and(|t| t.kind == Tok::Op(c));
    let mut out = String::new();
    for (at, token) in tokens.iter().enumerate() {
        let lone = brace(at, '{') && brace(at + 2, '}') && !brace(at + 1, '{')
            || brace(at, '}') && at >= 2 && brace(at - 2, '{') && !brace(at - 1, '}');
        if lone {
            continue;
        }
        match &token.kind {
            Tok::Num(text) | Tok::Sym(text) | Tok::Other(text) => out.push_str(text),
            Tok::Fun(function) => out.push_str(function.name()),
            Tok::Cmd(command) => out.push_str(command),
            Tok::Text(text) => out.push_str(&text.split_whitespace().collect::<Vec<_>>().join(" ")),
            Tok::Op(c) => out.push(*c),
        }
        out.push(' ');
    }
    out.pop();
    out
}

struct Lexer<'a> {
    rest: &'a str,
    /// How many `\text{` this is inside of.
    level: usize,
    reading: Reading,
    out: Vec<Token>,
    spaced: bool,
    /// Open brackets of any kind: within them a comma separates items.
    depth: usize,
}

impl<'a> Lexer<'a> {
    fn push(&mut self, kind: Tok) {
        match kind {
            Tok::Op('(' | '[' | '{') | Tok::Cmd("{") => self.depth += 1,
            Tok::Op(')' | ']' | '}') | Tok::Cmd("}") => self.depth = self.depth.saturating_sub(1),
            _ => {}
        }
        self.out.push(Token { kind, spaced: std::mem::take(&mut self.spaced) });
    }

    fn step(&mut self) -> Result<(), String> {
        let c = self.rest.chars().next().expect("not empty");
        match c {
            '\\' => return self.command(),
            c if c.is_ascii_digit() => self.number(),
            '.' if self.rest[1..].starts_with(|c: char| c.is_ascii_digit()) => self.number(),
            c if c.is_ascii_alphabetic() => self.word(),
            c if c.is_whitespace() || c == '~' || c == '$' => {
                self.rest = &self.rest[c.len_utf8()..];
                self.spaced = true;
            }
            _ => {
                self.rest = &self.rest[c.len_utf8()..];
                return self.character(c);
            }
        }
        Ok(())
    }

    fn character(&mut self, c: char) -> Result<(), String> {
        if let Some(plain) = names::unicode(c) {
            // A letter, sign or command that has a LaTeX spelling.
            for token in nested(plain, self.reading, self.level + 1)? {
                self.push(token.kind);
            }
            return Ok(());
        }
        match c {
            '*' if self.rest.starts_with('*') => {
                self.rest = &self.rest[1..];
                self.push(Tok::Op('^'));
            }
            '<' | '>' | '!' if self.rest.starts_with('=') => {
                let after = &self.rest[1..];
                // `n!=6` is a factorial: then what follows is no `==`; a blank decides for "not equal".
                if c == '!' && !self.spaced && !self.out.is_empty() {
                    self.push(Tok::Op('!'));
                    return Ok(());
                }
                self.rest = after;
                self.push(Tok::Cmd(match c {
                    '<' => "<=",
                    '>' => ">=",
                    _ => "!=",
                }));
            }
            // `=<` and `=>` as some programs have them.
            '=' if self.rest.starts_with(['<', '>']) => {
                let less = self.rest.starts_with('<');
                self.rest = &self.rest[1..];
                self.push(Tok::Cmd(if less { "<=" } else { ">=" }));
            }
            '<' => self.push(Tok::Cmd("<")),
            '>' => self.push(Tok::Cmd(">")),
            '€' => self.push(Tok::Cmd("€")),
            '£' => self.push(Tok::Cmd("£")),
            '.' => self.push(Tok::Op('.')),
            '"' | '`' | '\u{201c}' | '\u{201d}' => {}
            '+' | '-' | '*' | '/' | '^' | '_' | '=' | '(' | ')' | '[' | ']' | '{' | '}' | '|'
            | ',' | ';' | ':' | '!' | '%' | '\'' | '&' | '?' => self.push(Tok::Op(c)),
            c if c.is_alphabetic() => self.push(Tok::Sym(c.to_string())),
            c => self.push(Tok::Other(c.to_string())),
        }
        Ok(())
    }

    /// Digits, grouped by thousands outside of brackets, with a decimal part, an exponent, a repeating part.
    fn number(&mut self) {
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

    /// A run of letters: a function, a name, words, or a product of letters.
    fn word(&mut self) {
        let length = self.rest.bytes().take_while(u8::is_ascii_alphabetic).count();
        let run = &self.rest[..length];
        self.rest = &self.rest[length..];
        self.named(run);
    }

    /// Whether a unit may stand here: behind a number or a closed bracket.
    fn after_value(&self) -> bool {
        let last = self.out.last().map(|t| &t.kind);
        matches!(last, Some(Tok::Num(_) | Tok::Text(_) | Tok::Op(')' | '}' | '%' | '\u{b0}')))
    }

    /// Whether the letters behind a value are a unit in this reading.
    fn may_be_unit(&self, run: &str) -> bool {
        let ends = self.rest.trim_start().is_empty();
        match self.reading.units {
            _ if run.len() > 1 && !super::units::may_be_product(run) => true,
            Units::Sure => false,
            Units::Spaced => self.spaced && run.len() > 1,
            Units::Letter => self.spaced && (run.len() > 1 || ends),
            Units::Any => run.len() > 1 || ends,
        }
    }

    fn named(&mut self, run: &str) {
        // `60 min` measures time.
        if run == "min" && self.after_value() {
            return self.push(Tok::Text(run.into()));
        }
        if let Some(kind) = names::word(run) {
            return self.push(kind);
        }
        // `sinx`, `lnx`
        let split = run.len() - 1;
        if run.len() > 2
            && let Some(kind @ Tok::Fun(_)) = names::word(&run[..split])
        {
            self.push(kind);
            return self.push(Tok::Sym(run[split..].to_string()));
        }
        let unit = self.after_value() && super::units::is_unit(run) && self.may_be_unit(run);
        if run.len() > 3 || unit || names::is_short_word(run) {
            self.push(Tok::Text(run.to_string()));
        } else {
            for c in run.chars() {
                self.push(Tok::Sym(c.to_string()));
            }
        }
    }

    fn command(&mut self) -> Result<(), String> {
        let after = &self.rest[1..];
        let length = after.bytes().take_while(u8::is_ascii_alphabetic).count();
        if length == 0 {
            let Some(c) = after.chars().next() else {
                return Err("a backslash at the end".into());
            };
            self.rest = &after[c.len_utf8()..];
            match c {
                '{' => self.push(Tok::Cmd("{")),
                '}' => self.push(Tok::Cmd("}")),
                '\\' => {
                    self.push(Tok::Cmd("\\\\"));
                    self.row_gap();
                }
                '%' => self.push(Tok::Op('%')),
                '$' => self.push(Tok::Cmd("$")),
                '|' => self.push(Tok::Cmd("norm")),
                '&' | '#' | '_' => self.push(Tok::Other(c.to_string())),
                // Blanks of every width, and the ends of mathematics.
                _ => self.spaced = true,
            }
            return Ok(());
        }
        let name = &after[..length];
        self.rest = &after[length..];
        match name {
            "left" | "right" => {
                let next = self.rest.trim_start();
                if let Some(rest) = next.strip_prefix('.') {
                    self.rest = rest;
                } else if let Some(rest) = next.strip_prefix('|') {
                    self.rest = rest;
                    self.push(Tok::Cmd(if name == "left" { "lvert" } else { "rvert" }));
                }
            }
            "begin" | "end" => {
                let environment = self.group().ok_or("an environment without a name")?;
                let matrix = names::is_matrix(environment);
                if environment == "array" && name == "begin" {
                    self.group();
                }
                self.push(match name {
                    _ if !matrix => Tok::Other(format!("{name} {environment}")),
                    "begin" => Tok::Cmd("begin"),
                    _ => Tok::Cmd("end"),
                });
            }
            "text" | "textbf" | "textit" | "textrm" | "textnormal" | "mathrm" | "mbox" | "rm"
            | "hbox" | "operatorname" | "textsf" | "texttt" | "mathit" => match self.group() {
                Some(content) => self.text(content)?,
                None => self.spaced = true,
            },
            "mathbb" | "mathcal" | "mathfrak" | "mathscr" => {
                let letters = self.group_or_letter();
                self.push(Tok::Sym(format!("{name} {letters}")));
            }
            "not" => {
                let next = self.rest.trim_start();
                let equals = next.strip_prefix('=');
                match equals {
                    Some(rest) => {
                        self.rest = rest;
                        self.push(Tok::Cmd("!="));
                    }
                    None => self.push(Tok::Other(name.to_string())),
                }
            }
            _ => match names::command(name) {
                Some(names::Meaning::Token(kind)) => self.push(kind),
                Some(names::Meaning::Blank) => self.spaced = true,
                None => self.push(Tok::Other(name.to_string())),
            },
        }
        Ok(())
    }

    /// Skips the space that a row asks for below it: `\\[4pt]`.
    fn row_gap(&mut self) {
        let gap = self.rest.strip_prefix('[').and_then(|rest| rest.split_once(']'));
        if let Some((gap, tail)) = gap {
            let size = gap.trim_end_matches(|c: char| c.is_ascii_alphabetic());
            let unit = matches!(&gap[size.len()..], "pt" | "em" | "ex" | "mm" | "cm" | "in" | "mu");
            if unit && size.trim().parse::<f32>().is_ok() {
                self.rest = tail;
            }
        }
    }

    /// `\text{..}`: mathematics where it holds no word, else words.
    fn text(&mut self, content: &str) -> Result<(), String> {
        let content = content.trim_matches(|c: char| c.is_whitespace() || c == '~');
        let bare = content.trim_end_matches([',', '.', ';']);
        let letters = bare.bytes().filter(u8::is_ascii_alphabetic).count();
        let mathematics =
            letters <= 1 || bare.contains('\\') || bare.starts_with(|c: char| c.is_ascii_digit());
        if bare.len() == 1 && self.after_value() && super::units::is_unit(bare) {
            self.push(Tok::Text(bare.into()));
        } else if mathematics {
            for token in nested(bare, self.reading, self.level + 1)? {
                self.spaced |= token.spaced;
                self.push(token.kind);
            }
        } else if let Some(kind) = names::word(bare) {
            self.push(kind);
        } else {
            self.push(Tok::Text(bare.to_string()));
        }
        Ok(())
    }

    /// The content of `{..}` that follows, or else the next character.
    fn group_or_letter(&mut self) -> &'a str {
        self.group().unwrap_or_else(|| {
            let rest = self.rest.trim_start();
            let (letter, tail) = rest.split_at(rest.chars().next().map_or(0, char::len_utf8));
            self.rest = tail;
            letter
        })
    }

    /// The content of `{..}` that follows.
    fn group(&mut self) -> Option<&'a str> {
        let rest = self.rest.trim_start().strip_prefix('{')?;
        let content = super::extract::closed(rest)?;
        self.rest = &rest[content.len() + 1..];
        Some(content)
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
