//! Tokens to an expression tree, by recursive descent.
//!
//! ```text
//! sum      = [sign] product {("+" | "-" | "\pm" | "\mp") product}
//! product  = power {["*" | "/"] power}                  blank, `*` and `/` bind alike, from the left
//! power    = atom {"^" exponent | "!" | "%" | degree}
//! function = name ["_" base] ["^" exponent] (group | power {power})
//! ```
//!
//! So `1/2x` is half of x, `\sin 2x + 1` is sin(2x) + 1, and `\sin x \cos x` is a product.

mod function;
mod numeral;

use super::expr::{Expr, Fun};
use super::token::{Tok, Token, canonical};

/// Deepest nesting of an expression.
const MAX_DEPTH: usize = 48;
/// Most `!`, `%` and the like behind one atom.
const MAX_POSTFIX: usize = 8;

/// The whole of `tokens` as an expression; the error says what stopped the parser.
pub(super) fn expression(tokens: &[Token]) -> Result<Expr, String> {
    let mut parser = Parser { tokens: tokens.to_vec(), at: 0, depth: 0, bars: 0 };
    let expr = parser.sum()?;
    match parser.peek() {
        None => Ok(expr),
        Some(_) => Err(parser.stopped()),
    }
}

struct Parser {
    /// Owned, for `\frac12` splits a number.
    tokens: Vec<Token>,
    at: usize,
    depth: usize,
    /// Open `|`.
    bars: usize,
}

type Parsed = Result<Expr, String>;

impl Parser {
    fn peek(&self) -> Option<&Tok> {
        self.ahead(0)
    }

    fn ahead(&self, n: usize) -> Option<&Tok> {
        self.tokens.get(self.at + n).map(|t| &t.kind)
    }

    fn eat(&mut self, kind: &Tok) -> bool {
        let found = self.peek() == Some(kind);
        self.at += usize::from(found);
        found
    }

    fn op(&mut self, c: char) -> bool {
        self.eat(&Tok::Op(c))
    }

    fn expect(&mut self, kind: &Tok) -> Result<(), String> {
        if self.eat(kind) { Ok(()) } else { Err(self.stopped()) }
    }

    fn stopped(&self) -> String {
        match self.tokens.get(self.at..self.at + 1) {
            Some(token) if !token.is_empty() => {
                format!("no expression: it breaks off at {:?}", canonical(token))
            }
            _ => "no expression: it breaks off at its end".into(),
        }
    }

    /// Runs `parse` one level deeper.
    fn nested(&mut self, parse: impl FnOnce(&mut Parser) -> Parsed) -> Parsed {
        if self.depth == MAX_DEPTH {
            return Err(format!("nested more than {MAX_DEPTH} deep"));
        }
        self.depth += 1;
        let parsed = parse(self);
        self.depth -= 1;
        parsed
    }

    fn sum(&mut self) -> Parsed {
        let mut terms = Vec::new();
        loop {
            // Any number of signs, one needed between terms.
            let (mut factors, start) = (Vec::new(), self.at);
            let mut negative = false;
            loop {
                match self.peek() {
                    Some(Tok::Op('+')) => {}
                    Some(Tok::Op('-')) => negative = !negative,
                    Some(Tok::Cmd("pm")) => factors.push(Expr::PlusMinus),
                    Some(Tok::Cmd("mp")) => {
                        factors.push(Expr::PlusMinus);
                        negative = !negative;
                    }
                    _ => break,
                }
                self.at += 1;
            }
            if !terms.is_empty() && self.at == start {
                break;
            }
            let mut term = self.product()?;
            if !factors.is_empty() {
                factors.push(term);
                term = Expr::Product(factors);
            }
            terms.push(if negative { term.negative() } else { term });
        }
        Ok(if terms.len() == 1 { terms.remove(0) } else { Expr::Sum(terms) })
    }

    fn product(&mut self) -> Parsed {
        let mut factors = vec![self.power()?];
        loop {
            let divide = if self.op('*') {
                false
            } else if self.op('/') {
                true
            } else if self.atom_follows() {
                if self.beside_a_number() {
                    return Err("two numbers side by side".into());
                }
                factors.push(self.power()?);
                continue;
            } else {
                break;
            };
            let mut negative = false;
            while let Some(Tok::Op(sign @ ('+' | '-'))) = self.peek() {
                negative ^= *sign == '-';
                self.at += 1;
            }
            let factor = self.power()?;
            let factor = if negative { factor.negative() } else { factor };
            factors.push(if divide { Expr::Inverse(Box::new(factor)) } else { factor });
        }
        Ok(if factors.len() == 1 { factors.remove(0) } else { Expr::Product(factors) })
    }

    /// Whether what follows is a number right behind another: `3 5`.
    fn beside_a_number(&self) -> bool {
        let number = |at: usize| matches!(self.tokens.get(at).map(|t| &t.kind), Some(Tok::Num(_)));
        self.at > 0 && number(self.at) && number(self.at - 1)
    }

    /// Whether an atom begins here, which the atom before is then multiplied with.
    fn atom_follows(&self) -> bool {
        match self.peek() {
            Some(Tok::Num(_) | Tok::Sym(_) | Tok::Fun(_) | Tok::Op('(' | '[' | '{')) => true,
            Some(Tok::Op('|')) => self.bars == 0,
            Some(Tok::Cmd(name)) => matches!(
                *name,
                "frac"
                    | "binom"
                    | "sqrt"
                    | "lvert"
                    | "lfloor"
                    | "lceil"
                    | "bar"
                    | "hat"
                    | "tilde"
                    | "dot"
            ),
            _ => false,
        }
    }

    fn power(&mut self) -> Parsed {
        self.nested(|p| {
            let atom = p.atom()?;
            p.postfix(atom)
        })
    }

    fn postfix(&mut self, mut base: Expr) -> Parsed {
        for _ in 0..MAX_POSTFIX {
            base = match self.peek() {
                Some(Tok::Op('^')) => {
                    self.at += 1;
                    if let Some(mark) = self.mark(&base) {
                        match mark.as_str() {
                            "deg" => Expr::Degrees(Box::new(base)),
                            _ => Expr::Mark(mark, Box::new(base)),
                        }
                    } else {
                        let exponent = self.exponent()?;
                        Expr::Power(Box::new(base), Box::new(exponent))
                    }
                }
                Some(Tok::Op('!')) => {
                    self.at += 1;
                    let double = self.op('!');
                    let f = if double { Fun::DoubleFactorial } else { Fun::Factorial };
                    Expr::Call(f, vec![base])
                }
                Some(Tok::Op('%')) => {
                    self.at += 1;
                    Expr::Percent(Box::new(base))
                }
                Some(Tok::Op('\u{b0}')) => {
                    self.at += 1;
                    Expr::Degrees(Box::new(base))
                }
                _ => return Ok(base),
            };
        }
        Err(format!("more than {MAX_POSTFIX} operators behind one term"))
    }

    /// A superscript that is no exponent: `*`, `\top`, a degree sign, `T` over a capital letter.
    fn mark(&mut self, base: &Expr) -> Option<String> {
        let braced = self.peek() == Some(&Tok::Op('{'));
        if braced && self.ahead(2) != Some(&Tok::Op('}')) {
            return None;
        }
        let capital = |name: &String| name.starts_with(|c: char| c.is_ascii_uppercase());
        let mark = match self.ahead(usize::from(braced))? {
            Tok::Op('\u{b0}') => "deg".to_string(),
            Tok::Op(c @ ('*' | '+' | '-' | '\'')) if braced || !self.value_at(1) => c.to_string(),
            Tok::Sym(name)
                if matches!(name.as_str(), "top" | "dagger" | "perp" | "prime" | "star") =>
            {
                name.clone()
            }
            Tok::Sym(name) if name == "T" => match base {
                Expr::Sym(base) if capital(base) => "top".into(),
                _ => return None,
            },
            _ => return None,
        };
        self.at += if braced { 3 } else { 1 };
        Some(mark)
    }

    /// Whether a value begins `n` tokens ahead (behind a sign).
    fn value_at(&self, n: usize) -> bool {
        matches!(self.ahead(n), Some(Tok::Num(_) | Tok::Sym(_) | Tok::Op('{' | '(') | Tok::Fun(_)))
            || matches!(self.ahead(n), Some(Tok::Cmd("frac" | "sqrt")))
    }

    /// What stands behind `^`: a group, or a signed atom; `2^3^2` is `2^9`.
    fn exponent(&mut self) -> Parsed {
        if self.peek() == Some(&Tok::Op('{')) {
            return self.nested(Parser::atom);
        }
        let negative = self.op('-');
        let exponent = self.nested(|p| {
            let atom = p.atom()?;
            if !p.op('^') {
                return Ok(atom);
            }
            let tower = p.exponent()?;
            Ok(Expr::Power(Box::new(atom), Box::new(tower)))
        })?;
        Ok(if negative { exponent.negative() } else { exponent })
    }

    fn atom(&mut self) -> Parsed {
        let Some(token) = self.peek().cloned() else { return Err(self.stopped()) };
        self.at += 1;
        match token {
            Tok::Num(digits) => self.number(&digits),
            Tok::Sym(name) => self.symbol(name),
            Tok::Fun(function) => self.nested(|p| p.function(function)),
            Tok::Op('(') => self.closed(')'),
            Tok::Op('[') => self.closed(']'),
            Tok::Op('{') => self.closed('}'),
            Tok::Op('|') => {
                let bars = self.bars;
                self.bars += 1;
                let inner = self.nested(Parser::sum);
                self.bars = bars;
                let inner = inner?;
                self.expect(&Tok::Op('|'))?;
                Ok(Expr::Call(Fun::Abs, vec![inner]))
            }
            Tok::Cmd(name) => self.command(name),
            Tok::Text(_) | Tok::Other(_) | Tok::Op(_) => {
                self.at -= 1;
                Err(self.stopped())
            }
        }
    }

    /// A sum up to the closing bracket; bars outside do not count inside.
    fn closed(&mut self, close: char) -> Parsed {
        let inner = self.unbarred(|p| -> Parsed {
            let inner = p.nested(Parser::sum)?;
            if !p.eat(&Tok::Cmd("choose")) {
                return Ok(inner);
            }
            Ok(Expr::Call(Fun::Binomial, vec![inner, p.nested(Parser::sum)?]))
        })?;
        self.expect(&Tok::Op(close))?;
        Ok(inner)
    }

    /// What stands in brackets of its own, where bars outside do not count.
    fn unbarred<T>(&mut self, read: impl FnOnce(&mut Self) -> T) -> T {
        let bars = std::mem::take(&mut self.bars);
        let inner = read(self);
        self.bars = bars;
        inner
    }

    fn until(&mut self, close: &'static str, function: Fun) -> Parsed {
        let inner = self.unbarred(|p| p.nested(Parser::sum))?;
        self.expect(&Tok::Cmd(close))?;
        Ok(Expr::Call(function, vec![inner]))
    }

    fn command(&mut self, name: &'static str) -> Parsed {
        match name {
            "frac" => {
                let above = self.argument()?;
                let below = self.argument()?;
                Ok(above.over(below))
            }
            "binom" => {
                let above = self.argument()?;
                let below = self.argument()?;
                Ok(Expr::Call(Fun::Binomial, vec![above, below]))
            }
            "sqrt" => {
                let degree = if self.op('[') { self.closed(']')? } else { Expr::int(2) };
                let inner = self.nested(Parser::atom)?;
                Ok(inner.root(degree))
            }
            "lvert" => self.until("rvert", Fun::Abs),
            "lfloor" => self.until("rfloor", Fun::Floor),
            "lceil" => self.until("rceil", Fun::Ceil),
            "norm" => self.until("norm", Fun::Norm),
            "bar" | "hat" | "tilde" | "dot" => {
                let inner = self.argument()?;
                // The bar of a complex number is its conjugate; else it is part of a name.
                let complex = matches!(&inner, Expr::Sym(s) if s.starts_with(['z', 'w']));
                if name == "bar" && (complex || inner.any(&|e| *e == Expr::I)) {
                    return Ok(Expr::Call(Fun::Conj, vec![inner]));
                }
                Ok(Expr::Mark(name.into(), Box::new(inner)))
            }
            _ => {
                self.at -= 1;
                Err(self.stopped())
            }
        }
    }

    /// An argument as TeX reads it: a group, else one digit, letter or command.
    fn argument(&mut self) -> Parsed {
        if let Some(Tok::Num(digits)) = self.peek()
            && digits.len() > 1
            && digits.bytes().all(|b| b.is_ascii_digit())
        {
            let (first, rest) = digits.split_at(1);
            let (first, rest) = (first.to_string(), rest.to_string());
            self.tokens[self.at] = Token { kind: Tok::Num(rest), spaced: false };
            return self.decimal(&first);
        }
        self.nested(Parser::atom)
    }
}
