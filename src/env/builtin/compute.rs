//! Exact arithmetic for the calculator: `+ - * / ^ ( )` on decimals.

use dashu::base::Sign;
use dashu::integer::{IBig, UBig};
use dashu::rational::RBig;

/// Longest expression, in bytes.
const MAX_BYTES: usize = 1000;
/// Deepest nesting of parentheses and signs.
const MAX_DEPTH: usize = 64;
/// Largest exponent.
const MAX_EXPONENT: u32 = 64;
/// Largest numerator or denominator, bits.
const MAX_BITS: usize = 4096;
/// Decimals of a result that is no whole number.
const DECIMALS: usize = 12;

/// The value of an expression: whole, or a decimal of at most twelve places; or why there is none.
///
/// # Errors
/// In a few words, for the model to read.
pub fn compute(expression: &str) -> Result<String, String> {
    if expression.len() > MAX_BYTES {
        return Err("the expression is too long".into());
    }
    let plain: String = expression
        .chars()
        .filter(|c| !c.is_whitespace() && *c != ',')
        .map(|c| match c {
            '\u{d7}' | '\u{b7}' => '*',
            '\u{f7}' => '/',
            '\u{2212}' => '-',
            other => other,
        })
        .collect();
    let plain = plain.replace("**", "^");
    let mut reader = Reader { text: plain.trim_end_matches('='), at: 0 };
    let value = reader.sum(0)?;
    match reader.peek() {
        None => Ok(written(&value)),
        Some(c) => Err(format!("unexpected {c:?}")),
    }
}

struct Reader<'t> {
    text: &'t str,
    at: usize,
}

impl Reader<'_> {
    fn peek(&self) -> Option<char> {
        self.text[self.at..].chars().next()
    }

    fn takes(&mut self, wanted: char) -> bool {
        let takes = self.peek() == Some(wanted);
        self.at += if takes { wanted.len_utf8() } else { 0 };
        takes
    }

    fn sum(&mut self, depth: usize) -> Result<RBig, String> {
        if depth > MAX_DEPTH {
            return Err("too deeply nested".into());
        }
        let mut value = self.product(depth)?;
        loop {
            value = if self.takes('+') {
                value + self.product(depth)?
            } else if self.takes('-') {
                value - self.product(depth)?
            } else {
                return Ok(value);
            };
            value = bounded(value)?;
        }
    }

    fn product(&mut self, depth: usize) -> Result<RBig, String> {
        let mut value = self.power(depth)?;
        loop {
            value = if self.takes('*') {
                value * self.power(depth)?
            } else if self.takes('/') {
                let divisor = self.power(depth)?;
                if divisor == RBig::ZERO {
                    return Err("division by zero".into());
                }
                value / divisor
            } else {
                return Ok(value);
            };
            value = bounded(value)?;
        }
    }

    fn power(&mut self, depth: usize) -> Result<RBig, String> {
        if depth > MAX_DEPTH {
            return Err("too deeply nested".into());
        }
        if self.takes('-') {
            return Ok(-self.power(depth + 1)?);
        }
        if self.takes('+') {
            return self.power(depth + 1);
        }
        let base = self.atom(depth)?;
        if !self.takes('^') {
            return Ok(base);
        }
        let exponent = self.power(depth + 1)?;
        let whole = exponent.is_int().then(|| exponent.numerator().clone());
        let n =
            whole.and_then(|n| i64::try_from(n).ok()).filter(|n| n.abs() <= MAX_EXPONENT as i64);
        let n = n.ok_or("the exponent is no whole number up to 64")?;
        if n < 0 && base == RBig::ZERO {
            return Err("division by zero".into());
        }
        let mut value = RBig::ONE;
        for _ in 0..n.unsigned_abs() {
            value = bounded(value * &base)?;
        }
        Ok(if n < 0 { RBig::ONE / value } else { value })
    }

    fn atom(&mut self, depth: usize) -> Result<RBig, String> {
        if self.takes('(') {
            let value = self.sum(depth + 1)?;
            return if self.takes(')') { Ok(value) } else { Err("a parenthesis is open".into()) };
        }
        let rest = &self.text[self.at..];
        let end = rest.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(rest.len());
        let number = &rest[..end];
        self.at += end;
        let (whole, fraction) = number.split_once('.').unwrap_or((number, ""));
        let digits = format!("{whole}{fraction}");
        if digits.is_empty() || fraction.contains('.') {
            return Err(match self.peek() {
                _ if !number.is_empty() => format!("{number:?} is no number"),
                Some(c) => format!("unexpected {c:?}"),
                None => "a number is missing".into(),
            });
        }
        let numerator: IBig = digits.parse().map_err(|_| format!("{number:?} is no number"))?;
        Ok(RBig::from_parts(numerator, UBig::from(10u8).pow(fraction.len())))
    }
}

/// Refuses what would grow without end.
fn bounded(value: RBig) -> Result<RBig, String> {
    use dashu::base::BitTest;
    match value.numerator().bit_len().max(value.denominator().bit_len()) > MAX_BITS {
        true => Err("the number is too large".into()),
        false => Ok(value),
    }
}

fn written(value: &RBig) -> String {
    if value.is_int() {
        return value.numerator().to_string();
    }
    let scale = UBig::from(10u8).pow(DECIMALS);
    let scaled = (value * RBig::from(scale)).round();
    let (sign, digits) = match scaled.sign() {
        Sign::Negative => ("-", (-scaled).to_string()),
        Sign::Positive => ("", scaled.to_string()),
    };
    let digits = format!("{digits:0>width$}", width = DECIMALS + 1);
    let (whole, fraction) = digits.split_at(digits.len() - DECIMALS);
    format!("{sign}{whole}.{fraction}").trim_end_matches('0').trim_end_matches('.').to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn arithmetic_is_exact() {
        for (expression, value) in [
            ("1+2*3", "7"),
            ("(1+2)*3", "9"),
            ("4821*9377", "45206517"),
            ("-2^2", "-4"),
            ("2^-2", "0.25"),
            ("2**10 =", "1024"),
            ("1/3", "0.333333333333"),
            ("-1/8", "-0.125"),
            ("0.1+0.2", "0.3"),
            ("1,000 \u{d7} 3", "3000"),
            ("7 - -7", "14"),
        ] {
            assert_eq!(compute(expression).as_deref(), Ok(value), "{expression}");
        }
    }

    #[test]
    fn what_has_no_value_says_why() {
        for (expression, why) in [
            ("", "a number is missing"),
            ("1/0", "division by zero"),
            ("0^-1", "division by zero"),
            ("(1", "a parenthesis is open"),
            ("1+x", "unexpected 'x'"),
            ("1.2.3", "no number"),
            ("2^0.5", "no whole number up to 64"),
            ("(((9^64)^64)^64)", "too large"),
            (&"(".repeat(900), "too deeply nested"),
            (&"-".repeat(900), "too deeply nested"),
            (&"1".repeat(2000), "too long"),
            ("\u{fc}+1", "unexpected"),
        ] {
            let said = compute(expression).unwrap_err();
            assert!(said.contains(why), "{expression}: {said}");
        }
    }
}
