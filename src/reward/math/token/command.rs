//! LaTeX commands: what they stand for, and the groups behind them.

use super::{Lexer, Tok, names, nested};
use crate::reward::math::extract::closed;
use crate::reward::math::units::is_unit;

impl<'a> Lexer<'a> {
    pub(super) fn command(&mut self) -> Result<(), String> {
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
                if environment == "cases" && name == "begin" && self.system()? {
                    return Ok(());
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

    /// Reads the rows of `\begin{cases} x = 1 \\ y = 2 \end{cases}` as a list; false where they are cases of something.
    fn system(&mut self) -> Result<bool, String> {
        let Some((inside, tail)) = self.rest.split_once("\\end{cases}") else { return Ok(false) };
        let rows = inside.replace("&=", "=").replace("\\\\", ",");
        if rows.contains('&') {
            return Ok(false);
        }
        self.rest = tail;
        for token in nested(rows.trim().trim_end_matches(','), self.reading, self.level + 1)? {
            self.spaced |= token.spaced;
            self.push(token.kind);
        }
        Ok(true)
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
        if bare == "to" && self.after_value() {
            self.push(Tok::Op(':'));
        } else if bare.len() == 1 && self.after_value() && is_unit(bare) {
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
        let content = closed(rest)?;
        self.rest = &rest[content.len() + 1..];
        Some(content)
    }
}
