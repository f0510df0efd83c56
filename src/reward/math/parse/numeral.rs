//! Numbers: decimals, repeating decimals, mixed numbers, digits with a base.

use dashu::integer::IBig;
use dashu::rational::RBig;

use super::{Parsed, Parser};
use crate::reward::math::expr::Expr;
use crate::reward::math::token::Tok;

/// Largest exponent of a decimal in scientific notation.
const MAX_EXPONENT: i64 = 4000;

impl Parser {
    pub(super) fn decimal(&self, digits: &str) -> Parsed {
        decimal(digits).map(Expr::Num).ok_or_else(|| format!("no number: {digits:?}"))
    }

    /// A number, with its base, its fraction or its repeating digits.
    pub(super) fn number(&mut self, digits: &str) -> Parsed {
        if self.peek() == Some(&Tok::Op('_')) && !digits.contains('.') {
            self.at += 1;
            return self.based(digits);
        }
        if digits.contains('.')
            && self.peek() == Some(&Tok::Cmd("bar"))
            && let Some(period) = self.period()
        {
            return repeating(digits, &period).map(Expr::Num).ok_or_else(|| self.stopped());
        }
        let whole = self.decimal(digits)?;
        if digits.bytes().all(|b| b.is_ascii_digit())
            && let Some(fraction) = self.mixed()
        {
            return Ok(Expr::Sum(vec![whole, Expr::Num(fraction)]));
        }
        Ok(whole)
    }

    /// The base behind `_`.
    fn based(&mut self, digits: &str) -> Parsed {
        let base = match (self.ahead(0), self.ahead(1), self.ahead(2)) {
            (Some(Tok::Num(base)), ..) => (base.clone(), 1),
            (Some(Tok::Op('{')), Some(Tok::Num(base)), Some(Tok::Op('}'))) => (base.clone(), 3),
            _ => return Err(self.stopped()),
        };
        let number = base.0.parse().ok().filter(|b| (2..=36).contains(b));
        let number: u32 = number.ok_or_else(|| format!("no base: {}", base.0))?;
        if !digits.chars().all(|d| d.is_digit(number)) {
            return Err(format!("{digits} has a digit that base {number} lacks"));
        }
        self.at += base.1;
        let digits = digits.trim_start_matches('0');
        let digits = if digits.is_empty() { "0" } else { digits };
        Ok(Expr::Based { digits: digits.into(), base: number })
    }

    /// `\overline{3}` behind a decimal.
    fn period(&mut self) -> Option<String> {
        let (digits, length) = match (self.ahead(1)?, self.ahead(2), self.ahead(3)) {
            (Tok::Op('{'), Some(Tok::Num(digits)), Some(Tok::Op('}'))) => (digits.clone(), 4),
            (Tok::Num(digits), ..) => (digits.clone(), 2),
            _ => return None,
        };
        let plain = digits.bytes().all(|b| b.is_ascii_digit()) && digits.len() <= 64;
        plain.then(|| self.at += length)?;
        Some(digits)
    }

    /// The proper fraction of a mixed number, `\frac{1}{2}`, `\frac12` or ` 1/2`.
    fn mixed(&mut self) -> Option<RBig> {
        use Tok::{Cmd, Num, Op};
        let ahead: [Option<&Tok>; 7] = std::array::from_fn(|n| self.ahead(n));
        let (above, below, length) = match ahead {
            [Some(Num(a)), Some(Op('/')), Some(Num(b)), ..] if self.tokens[self.at].spaced => {
                (a.as_str(), b.as_str(), 3)
            }
            [Some(Cmd("frac")), rest @ ..] => match rest {
                [
                    Some(Op('{')),
                    Some(Num(a)),
                    Some(Op('}')),
                    Some(Op('{')),
                    Some(Num(b)),
                    Some(Op('}')),
                ] => (a.as_str(), b.as_str(), 7),
                [Some(Op('{')), Some(Num(a)), Some(Op('}')), Some(Num(b)), ..] if b.len() == 1 => {
                    (a.as_str(), b.as_str(), 5)
                }
                [Some(Num(a)), Some(Op('{')), Some(Num(b)), Some(Op('}')), ..] if a.len() == 1 => {
                    (a.as_str(), b.as_str(), 5)
                }
                [Some(Num(ab)), ..] if ab.len() == 2 && !ab.contains('.') => {
                    (&ab[..1], &ab[1..], 2)
                }
                _ => return None,
            },
            _ => return None,
        };
        let (above, below) = (decimal(above)?, decimal(below)?);
        let proper = above.is_int() && below.is_int() && above > RBig::ZERO && above < below;
        proper.then(|| {
            self.at += length;
            above / below
        })
    }
}

/// The value of `12`, `1.5`, `1.5e-3`.
fn decimal(text: &str) -> Option<RBig> {
    let (mantissa, exponent) = text.split_once('e').unwrap_or((text, "0"));
    let exponent: i64 = exponent.parse().ok().filter(|e: &i64| e.abs() <= MAX_EXPONENT)?;
    let (whole, part) = mantissa.split_once('.').unwrap_or((mantissa, ""));
    let digits = IBig::from_str_radix(&format!("{whole}{part}"), 10).ok()?;
    let shift = exponent - part.len() as i64;
    let power = RBig::from(IBig::from(10).pow(shift.unsigned_abs() as usize));
    let digits = RBig::from(digits);
    Some(if shift < 0 { digits / power } else { digits * power })
}

/// `0.1` followed by `6` for ever.
fn repeating(digits: &str, period: &str) -> Option<RBig> {
    let start = decimal(digits.trim_end_matches('.'))?;
    let places = digits.split_once('.').map_or(0, |(_, part)| part.len());
    let ten = IBig::from(10);
    let nines = ten.pow(period.len()) - IBig::from(1);
    let tail =
        RBig::from(IBig::from_str_radix(period, 10).ok()?) / RBig::from(nines * ten.pow(places));
    Some(start + tail)
}
