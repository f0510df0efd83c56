//! Names: variables, functions with a value and functions that are only a name.

use super::{MAX_POSTFIX, Parsed, Parser};
use crate::reward::math::expr::{Expr, Fun};
use crate::reward::math::token::{Tok, canonical};

impl Parser {
    /// A letter with its primes and subscript, applied to what follows where it names a function.
    pub(super) fn symbol(&mut self, mut name: String) -> Parsed {
        match name.as_str() {
            "pi" => return Ok(Expr::Pi),
            "e" if self.peek() != Some(&Tok::Op('_')) => return Ok(Expr::E),
            "i" | "imath" if self.peek() != Some(&Tok::Op('_')) => return Ok(Expr::I),
            "infty" => return Ok(Expr::Infinity),
            _ => {}
        }
        for _ in 0..MAX_POSTFIX {
            if self.op('\'') {
                name.push('\'');
            } else if self.op('_') {
                name.push('_');
                name.push_str(&self.subscript()?);
            } else {
                break;
            }
        }
        if self.peek() == Some(&Tok::Op('(')) && self.applies(&name) {
            self.at += 1;
            let arguments = self.arguments(&Tok::Op(')'))?;
            return Ok(Expr::Apply(name, arguments));
        }
        Ok(Expr::Sym(name))
    }

    /// Whether `name(..)` is a function's value, not a product: by the name, a prime, or a comma inside.
    fn applies(&self, name: &str) -> bool {
        let stem = name.split(['_', '\'']).next().unwrap_or_default();
        let function = matches!(
            stem,
            "f" | "g"
                | "h"
                | "F"
                | "G"
                | "H"
                | "J"
                | "K"
                | "W"
                | "O"
                | "o"
                | "P"
                | "Q"
                | "Gamma"
                | "Theta"
                | "zeta"
                | "phi"
                | "psi"
                | "Phi"
                | "Psi"
                | "chi"
                | "wp"
                | "delta"
                | "mu"
                | "sigma"
        );
        function || name.contains('\'') || self.comma_inside()
    }

    fn comma_inside(&self) -> bool {
        let mut depth = 0usize;
        for token in &self.tokens[self.at..] {
            match token.kind {
                Tok::Op('(' | '[' | '{') => depth += 1,
                Tok::Op(')' | ']' | '}') if depth <= 1 => return false,
                Tok::Op(')' | ']' | '}') => depth -= 1,
                Tok::Op(',') if depth == 1 => return true,
                _ => {}
            }
        }
        false
    }

    /// Expressions between commas up to `close`.
    fn arguments(&mut self, close: &Tok) -> Result<Vec<Expr>, String> {
        let parts = self.unbarred(|p| -> Result<Vec<Expr>, String> {
            let mut parts = vec![p.nested(Parser::sum)?];
            while p.op(',') {
                parts.push(p.nested(Parser::sum)?);
            }
            Ok(parts)
        })?;
        self.expect(close)?;
        Ok(parts)
    }

    /// A subscript as part of a name.
    fn subscript(&mut self) -> Result<String, String> {
        let start = self.at;
        if !self.op('{') {
            self.at += 1;
            let token = self.tokens.get(start..=start).ok_or("an empty subscript")?;
            return Ok(canonical(token));
        }
        let mut depth = 1usize;
        while depth > 0 {
            match self.peek() {
                Some(Tok::Op('{')) => depth += 1,
                Some(Tok::Op('}')) => depth -= 1,
                Some(_) => {}
                None => return Err(self.stopped()),
            }
            self.at += 1;
        }
        Ok(canonical(&self.tokens[start + 1..self.at - 1]))
    }

    /// A function's base, exponent and argument; its name is read.
    pub(super) fn function(&mut self, function: Fun) -> Parsed {
        let mut base = None;
        if self.op('_') {
            if function != Fun::Log {
                return Err(format!("{} with a subscript", function.name()));
            }
            base = Some(self.argument()?);
        }
        let exponent = if self.op('^') { Some(self.exponent()?) } else { None };
        let inverse = match function {
            Fun::Sin => Some(Fun::Arcsin),
            Fun::Cos => Some(Fun::Arccos),
            Fun::Tan => Some(Fun::Arctan),
            Fun::Cot => Some(Fun::Arccot),
            Fun::Sinh => Some(Fun::Arsinh),
            Fun::Cosh => Some(Fun::Arcosh),
            Fun::Tanh => Some(Fun::Artanh),
            _ => None,
        };
        let inverts = exponent == Some(Expr::int(-1)) && inverse.is_some();
        let function = if inverts { inverse.unwrap_or(function) } else { function };
        let mut arguments = self.function_arguments()?;
        arguments.extend(base);
        let many = matches!(function, Fun::Min | Fun::Max | Fun::Gcd | Fun::Lcm);
        let expected = match function {
            Fun::Binomial => 2..=2,
            Fun::Log => 1..=2,
            _ if many => 1..=64,
            _ => 1..=1,
        };
        if !expected.contains(&arguments.len()) {
            return Err(format!("{} of {} values", function.name(), arguments.len()));
        }
        let call = match function {
            Fun::Root => arguments.remove(0).root(Expr::int(3)),
            _ => Expr::Call(function, arguments),
        };
        Ok(match exponent {
            Some(exponent) if !inverts => Expr::Power(Box::new(call), Box::new(exponent)),
            _ => call,
        })
    }

    fn function_arguments(&mut self) -> Result<Vec<Expr>, String> {
        match self.peek() {
            Some(Tok::Op('(')) => {
                self.at += 1;
                self.arguments(&Tok::Op(')'))
            }
            Some(Tok::Cmd("{")) => {
                self.at += 1;
                self.arguments(&Tok::Cmd("}"))
            }
            Some(Tok::Op('{')) => {
                self.at += 1;
                self.arguments(&Tok::Op('}'))
            }
            _ => {
                let negative = self.op('-');
                let mut factors = vec![self.power()?];
                while self.atom_follows()
                    && !matches!(self.peek(), Some(Tok::Fun(_)))
                    && !self.beside_a_number()
                {
                    factors.push(self.power()?);
                }
                let product =
                    if factors.len() == 1 { factors.remove(0) } else { Expr::Product(factors) };
                Ok(vec![if negative { product.negative() } else { product }])
            }
        }
    }
}
