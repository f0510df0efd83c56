//! LaTeX or plain text to tokens: what looks alike becomes alike (`\dfrac`, `\tfrac` and `\frac`; `\cdot`, `×` and
//! `*`; `\left(` and `(`), and typography goes.

mod command;
mod number;

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
        // `5 m`, `5 m/s^2`
        let tail = self.rest.trim_start();
        let rate = tail.strip_prefix('/').is_some_and(|below| {
            below
                .bytes()
                .all(|b| b.is_ascii_alphanumeric() || matches!(b, b'^' | b' ' | b'{' | b'}'))
        });
        let ends = tail.is_empty() || rate;
        match self.reading.units {
            _ if run.len() > 1 && !super::units::may_be_product(run) => true,
            Units::Sure => false,
            Units::Spaced => self.spaced && run.len() > 1,
            Units::Letter => self.spaced && (run.len() > 1 || ends),
            Units::Any => run.len() > 1 || ends,
        }
    }

    fn named(&mut self, run: &str) {
        // `6th`
        let ordinal = matches!(run, "st" | "nd" | "rd" | "th") && !self.spaced;
        if ordinal && matches!(self.out.last().map(|t| &t.kind), Some(Tok::Num(_))) {
            return self.push(Tok::Text(run.into()));
        }
        // `2 to 3`
        if run == "to" && self.after_value() {
            return self.push(Tok::Op(':'));
        }
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
}
