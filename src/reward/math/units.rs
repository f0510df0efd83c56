//! Units of measure and currencies behind a number.

use dashu::integer::{IBig, UBig};
use dashu::rational::RBig;

use super::token::{Tok, Token};

/// A product of powers of base units with a factor; labels (`apples`) are not kept.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Unit {
    /// Base unit and power, sorted, no power 0.
    dimensions: Vec<(&'static str, i32)>,
    /// How many base units one of it is.
    pub scale: RBig,
}

/// Names, base unit, factor above and below, and the power of the base unit.
type Row = (&'static [&'static str], &'static str, u64, u64, i32);

/// The unit of what is counted.
const COUNT: &str = "one";

const TABLE: &[Row] = &[
    (&["m", "meter", "metre"], "meter", 1, 1, 1),
    (&["cm", "centimeter", "centimetre"], "meter", 1, 100, 1),
    (&["mm", "millimeter", "millimetre"], "meter", 1, 1000, 1),
    (&["km", "kilometer", "kilometre"], "meter", 1000, 1, 1),
    (&["in", "inch", "inches"], "meter", 127, 5000, 1),
    (&["ft", "foot", "feet"], "meter", 381, 1250, 1),
    (&["yd", "yard"], "meter", 1143, 1250, 1),
    (&["mi", "mile"], "meter", 201_168, 125, 1),
    (&["s", "sec", "second"], "second", 1, 1, 1),
    (&["ms", "millisecond"], "second", 1, 1000, 1),
    (&["min", "minute"], "second", 60, 1, 1),
    (&["h", "hr", "hour"], "second", 3600, 1, 1),
    (&["day"], "second", 86_400, 1, 1),
    (&["week"], "second", 604_800, 1, 1),
    (&["mph"], "mph", 1, 1, 1),
    (&["month"], "month", 1, 1, 1),
    (&["yr", "year"], "month", 12, 1, 1),
    (&["g", "gram"], "gram", 1, 1, 1),
    (&["kg", "kilogram"], "gram", 1000, 1, 1),
    (&["mg", "milligram"], "gram", 1, 1000, 1),
    (&["lb", "pound"], "pound", 1, 1, 1),
    (&["oz", "ounce"], "pound", 1, 16, 1),
    (&["L", "liter", "litre"], "meter", 1, 1000, 3),
    (&["mL", "ml", "milliliter", "millilitre"], "meter", 1, 1_000_000, 3),
    (&["gal", "gallon"], "gallon", 1, 1, 1),
    (&["N", "newton"], "newton", 1, 1, 1),
    (&["J", "joule"], "joule", 1, 1, 1),
    (&["W", "watt"], "watt", 1, 1, 1),
    (&["V", "volt"], "volt", 1, 1, 1),
    (&["Hz", "hertz"], "hertz", 1, 1, 1),
    (&["rad", "radian"], "radian", 1, 1, 1),
    (&["dozen"], COUNT, 12, 1, 1),
    (&["dollar"], "dollar", 1, 1, 1),
    (&["cent", "¢"], "dollar", 1, 100, 1),
    (&["€", "euro"], "euro", 1, 1, 1),
    (&["£"], "sterling", 1, 1, 1),
];

fn find(word: &str) -> Option<&'static Row> {
    let named = |name: &str| TABLE.iter().find(|row| row.0.contains(&name));
    let word = if word.len() > 3 { word.to_ascii_lowercase() } else { word.to_string() };
    named(&word).or_else(|| {
        let singular = word.strip_suffix('s').filter(|w| w.len() > 1)?;
        named(singular)
    })
}

/// What a word behind a number multiplies it by: `million`.
pub(super) fn multiplier(word: &str) -> Option<u64> {
    let singular = word.strip_suffix('s').unwrap_or(word);
    Some(match singular.to_ascii_lowercase().as_str() {
        "hundred" => 100,
        "thousand" => 1000,
        "million" => 1_000_000,
        "billion" => 1_000_000_000,
        "trillion" => 1_000_000_000_000,
        _ => return None,
    })
}

/// Whether the word names a unit.
pub(super) fn is_unit(word: &str) -> bool {
    find(word).is_some()
}

/// Whether the letters of a unit's name are as likely a product: the force `mg`, `ms`, `hr`.
pub(super) fn may_be_product(word: &str) -> bool {
    matches!(word, "mg" | "ms" | "mi" | "ml" | "hr" | "yd")
}

/// Words that deny what stands before them.
const DENIALS: &[&str] = &["not", "wrong", "incorrect", "false", "isn't", "never"];

impl Unit {
    fn one() -> Unit {
        Unit { dimensions: Vec::new(), scale: RBig::ONE }
    }

    /// The unit of a currency sign.
    pub fn currency(sign: &str) -> Unit {
        let mut unit = Unit::one();
        unit.times(if sign == "$" { "dollar" } else { sign }, 1);
        unit
    }

    /// Whether it says nothing: no unit, or labels alone.
    pub fn is_label(&self) -> bool {
        self.dimensions.is_empty()
    }

    /// Whether it counts: `5 dozen` is 60 of what is meant.
    pub fn counts(&self) -> bool {
        self.dimensions == [(COUNT, 1)]
    }

    /// Whether both measure the same.
    pub fn measures_like(&self, other: &Unit) -> bool {
        self.dimensions == other.dimensions
    }

    fn times(&mut self, word: &str, power: i32) {
        let Some((_, base, above, below, dimension)) = find(word) else { return };
        let factor = RBig::from_parts(IBig::from(*above), UBig::from(*below));
        self.scale *= factor.pow(power as isize);
        let power = power * dimension;
        match self.dimensions.iter_mut().find(|d| d.0 == *base) {
            Some(found) => found.1 += power,
            None => self.dimensions.push((base, power)),
        }
        self.dimensions.retain(|d| d.1 != 0);
        self.dimensions.sort_unstable();
    }

    /// Reads `cm^2`, `square feet`, `m/s`, `miles per hour`; the error says what is no unit.
    pub fn parse(tokens: &[Token]) -> Result<Unit, String> {
        let mut text = String::new();
        for token in tokens {
            match &token.kind {
                Tok::Text(words) => {
                    text.push(' ');
                    text.push_str(words);
                }
                Tok::Op('^') => text.push('^'),
                Tok::Op('-') if text.ends_with('^') => text.push('-'),
                Tok::Num(digits) if text.ends_with(['^', '-']) => text.push_str(digits),
                Tok::Op('{' | '}' | '.' | '(' | ')') => {}
                Tok::Op('/') => text.push_str(" / "),
                Tok::Op('*') => text.push(' '),
                Tok::Sym(letter) => {
                    text.push(' ');
                    text.push_str(letter);
                }
                // `60 mi/h` and the like read `min` and `deg` as functions.
                Tok::Fun(function) => {
                    text.push(' ');
                    text.push_str(function.name());
                }
                other => return Err(format!("no unit: {other:?}")),
            }
        }
        let text = text.replace('/', " / ").replace(" ^", "^").replace("^ ", "^");
        let mut unit = Unit::one();
        let (mut sign, mut next) = (1, 1);
        for word in text.split([' ', '.', '~', '-']).filter(|w| !w.is_empty()).take(16) {
            match word {
                "/" | "per" => sign = -1,
                denial if DENIALS.contains(&denial) => return Err(format!("no unit: {denial:?}")),
                "square" | "sq" | "squared" => next = 2,
                "cubic" | "cu" | "cubed" => next = 3,
                _ => {
                    let (name, power) = word.split_once('^').unwrap_or((word, "1"));
                    let power = power.parse().ok().filter(|p: &i32| (1..=4).contains(p));
                    let power = power.ok_or_else(|| format!("no unit: {word:?}"))?;
                    unit.times(name, sign * power * next);
                    next = 1;
                }
            }
        }
        Ok(unit)
    }
}
