//! Exact comparison of written numbers, without floats: `0.5` is `1/2`, and an integer of a million digits is
//! itself and no other.
//!
//! Grammar, blanks allowed around the parts, signs `+`, `-` and U+2212:
//!
//! ```text
//! number   = [sign] (decimal ["/" [sign] decimal] | ("\frac" | "\dfrac" | "\tfrac") "{" signed "}" "{" signed "}")
//! signed   = [sign] decimal
//! decimal  = integer ["." digits?] | "." digits
//! integer  = digits | 1-3 digits, then groups of three, each after "," or "{,}"
//! ```

/// Longest significant part of a fraction's term that is multiplied out, in digits. Above it two fractions
/// are equal only when written with the same terms.
const MAX_FACTOR_DIGITS: usize = 256;

/// A rational number, `numerator / denominator`, not reduced.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Number {
    negative: bool,
    numerator: Decimal,
    denominator: Decimal,
}

/// `digits * 10^exponent` with neither leading nor trailing zeros: equal values are equal structures.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Decimal {
    /// Values 0..=9, the highest first; empty for zero, whose exponent is 0.
    digits: Vec<u8>,
    exponent: i64,
}

impl Number {
    /// Reads the whole of `text`; `None` when it is no number, or a division by zero.
    pub fn parse(text: &str) -> Option<Number> {
        let (negative, rest) = sign(text);
        let fraction = ["\\frac", "\\dfrac", "\\tfrac"].iter().find_map(|f| rest.strip_prefix(f));
        let (above, below) = match fraction {
            Some(groups) => {
                let groups = groups.trim().strip_prefix('{')?.strip_suffix('}')?;
                let (above, below) = groups.split_once('}')?;
                (sign(above), sign(below.trim_start().strip_prefix('{')?))
            }
            None => match rest.split_once('/') {
                Some((above, below)) => ((false, above), sign(below)),
                None => ((false, rest), (false, "1")),
            },
        };
        let (numerator, denominator) = (Decimal::parse(above.1)?, Decimal::parse(below.1)?);
        if denominator.digits.is_empty() {
            return None;
        }
        let negative = (negative ^ above.0 ^ below.0) && !numerator.digits.is_empty();
        Some(Number { negative, numerator, denominator })
    }

    /// Whether both have the same value: `a/b = c/d` when `a d = c b`.
    pub fn equals(&self, other: &Number) -> bool {
        if self.negative != other.negative || self == other {
            return self == other;
        }
        let one = |n: &Number| n.denominator.digits == [1];
        if one(self) && one(other) {
            // Powers of ten in the denominators move into the exponents.
            let shifted = |n: &Number| n.numerator.exponent - n.denominator.exponent;
            let zero = self.numerator.digits.is_empty();
            return self.numerator.digits == other.numerator.digits
                && (zero || shifted(self) == shifted(other));
        }
        let products =
            (self.numerator.times(&other.denominator), other.numerator.times(&self.denominator));
        matches!(products, (Some(left), Some(right)) if left == right)
    }
}

/// A sign at the front, and what follows it, without blanks around.
fn sign(text: &str) -> (bool, &str) {
    let text = text.trim();
    match text.strip_prefix(['-', '\u{2212}']) {
        Some(rest) => (true, rest.trim_start()),
        None => (false, text.strip_prefix('+').unwrap_or(text).trim_start()),
    }
}

impl Decimal {
    fn parse(text: &str) -> Option<Decimal> {
        let (whole, part) = text.trim().split_once('.').unwrap_or((text.trim(), ""));
        let mut digits = grouped(whole)?;
        digits.extend(values(part)?);
        if whole.is_empty() && part.is_empty() {
            return None;
        }
        Some(Decimal::canonical(digits, -(part.len() as i64)))
    }

    fn canonical(mut digits: Vec<u8>, mut exponent: i64) -> Decimal {
        let length = digits.len();
        digits.truncate(digits.iter().rposition(|d| *d != 0).map_or(0, |last| last + 1));
        exponent += (length - digits.len()) as i64;
        let leading = digits.iter().position(|d| *d != 0).unwrap_or(0);
        digits.drain(..leading);
        if digits.is_empty() {
            exponent = 0;
        }
        Decimal { digits, exponent }
    }

    /// The product, where both factors are short.
    fn times(&self, other: &Decimal) -> Option<Decimal> {
        let (a, b) = (&self.digits, &other.digits);
        if a.len().max(b.len()) > MAX_FACTOR_DIGITS {
            return None;
        }
        // Column sums: at most 256 * 81, then carried from the lowest column up.
        let mut columns = vec![0u32; a.len() + b.len()];
        for (i, x) in a.iter().enumerate() {
            for (j, y) in b.iter().enumerate() {
                columns[i + j + 1] += u32::from(x * y);
            }
        }
        let mut carry = 0;
        for column in columns.iter_mut().rev() {
            carry += *column;
            *column = carry % 10;
            carry /= 10;
        }
        let digits = columns.into_iter().map(|d| d as u8).collect();
        Some(Decimal::canonical(digits, self.exponent + other.exponent))
    }
}

/// The digits of an integer, with or without thousands separators.
fn grouped(text: &str) -> Option<Vec<u8>> {
    if !text.contains(',') {
        return values(text);
    }
    let plain = text.replace("{,}", ",");
    let mut groups = plain.split(',');
    let first = groups.next().filter(|group| (1..=3).contains(&group.len()))?;
    let mut digits = values(first)?;
    for group in groups {
        digits.extend(values(group).filter(|group| group.len() == 3)?);
    }
    Some(digits)
}

fn values(text: &str) -> Option<Vec<u8>> {
    text.bytes().map(|b| b.is_ascii_digit().then(|| b - b'0')).collect()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn equal(a: &str, b: &str) -> bool {
        let read = |text| Number::parse(text).unwrap_or_else(|| panic!("{text} is a number"));
        let (a, b) = (read(a), read(b));
        assert_eq!(a.equals(&b), b.equals(&a));
        a.equals(&b)
    }

    #[test]
    fn equal_numbers() {
        let long = "123456789".repeat(10_000);
        let padded = format!("000{long}.000");
        for (a, b) in [
            ("7", "007"),
            ("7", "+7"),
            ("7", "7."),
            ("7", " 7.00 "),
            ("-7", "\u{2212}7"),
            ("- 7", "-7"),
            ("0", "-0.00"),
            ("0", "0/5"),
            ("0/3", "-0/5"),
            (".5", "0.50"),
            ("1,234,567", "1234567"),
            ("1{,}234.5", "1234.50"),
            ("1/2", "0.5"),
            ("-1/2", "1/-2"),
            ("2/4", "3/6"),
            ("6/3", "2"),
            ("1/100", "0.01"),
            ("100/1000", "1/10"),
            ("0.5/0.25", "2"),
            ("\\frac{1}{3}", "2/6"),
            ("-\\dfrac{ 1 }{ -3 }", "\\tfrac{1}{3}"),
            ("99999999999999999999/3", "33333333333333333333"),
            (long.as_str(), padded.as_str()),
        ] {
            assert!(equal(a, b), "{a:.40} {b:.40}");
        }
    }

    #[test]
    fn different_numbers() {
        let long = "9".repeat(1000);
        for (a, b) in [
            ("7", "-7"),
            ("7", "70"),
            ("7", "0.7"),
            ("1", "0"),
            ("1/3", "0.333333333333333333"),
            ("1/2", "-0.5"),
            ("9007199254740993", "9007199254740992"),
            ("0.1", "0.1000000000000000000001"),
            ("1/10", "1/100"),
            (format!("{long}/7").as_str(), format!("{long}/8").as_str()),
        ] {
            assert!(!equal(a, b), "{a:.40} {b:.40}");
        }
    }

    #[test]
    fn what_is_no_number() {
        for text in [
            "",
            " ",
            "-",
            ".",
            "+-1",
            "1 2",
            "1e5",
            "x",
            "1/",
            "/2",
            "1/2/3",
            "1/0",
            "1/0.0",
            "1,23",
            "1234,567",
            ",123",
            "1,,234",
            "1.2.3",
            "1.234,5",
            "\\frac12",
            "\\frac{1}",
            "\\frac{1}{0}",
            "\\frac{1}{2}{3}",
            "\\frac{{1}}{2}",
            "50%",
            "$5",
            "0x10",
            "\u{0}",
            "१",
            "∞",
            "NaN",
        ] {
            assert_eq!(Number::parse(text), None, "{text}");
        }
    }

    proptest! {
        #[test]
        fn never_panics(a in "\\PC{0,30}", b in "[-+0-9.,/{}\\\\frac ]{0,30}") {
            if let (Some(a), Some(b)) = (Number::parse(&a), Number::parse(&b)) {
                prop_assert_eq!(a.equals(&b), b.equals(&a));
            }
        }

        #[test]
        fn agrees_with_rational_arithmetic(
            a in -200i64..200, b in 1i64..40, c in -200i64..200, d in 1i64..40, k in 1i64..2000,
        ) {
            let (left, right) = (format!("{a}/{b}"), format!("{c}/{d}"));
            prop_assert_eq!(equal(&left, &right), a * d == c * b);
            let scaled = format!("{}/{}", a * k, b * k);
            prop_assert!(equal(&left, &scaled));
            let cents = format!("{}{}.{:02}", if a < 0 { "-" } else { "" }, a.abs() / 100, a.abs() % 100);
            let hundredths = format!("{a}/100");
            prop_assert!(equal(&cents, &hundredths));
        }
    }
}
