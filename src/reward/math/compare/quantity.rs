//! Numbers and formulas with their units, signs and bases.

use dashu::rational::RBig;

use super::{At, verdict};
use crate::reward::math::equal::{self, Finding};
use crate::reward::math::expr::Expr;
use crate::reward::math::units::Unit;

/// What stands behind a number: nothing, a degree sign, a percent sign.
#[derive(PartialEq, Clone, Copy)]
enum Sign {
    None,
    Degrees,
    Percent,
}

/// The number without the sign that ends it.
fn peel(value: &Expr) -> (Expr, Sign) {
    match value {
        Expr::Degrees(inner) => ((**inner).clone(), Sign::Degrees),
        Expr::Percent(inner) => ((**inner).clone(), Sign::Percent),
        Expr::Product(factors) => {
            let [before @ .., last] = factors.as_slice() else {
                return (value.clone(), Sign::None);
            };
            let (inner, sign) = peel(last);
            let mut factors = before.to_vec();
            factors.push(inner);
            (Expr::Product(factors), sign)
        }
        other => (other.clone(), Sign::None),
    }
}

pub(super) fn quantities(
    (gold, gold_unit): (&Expr, &Unit),
    (answer, unit): (&Expr, &Unit),
    at: At,
) -> Finding {
    if let Some(finding) = bases(gold, answer) {
        return finding;
    }
    if is_number(gold) && is_undone(answer) {
        return Err("arithmetic that is left to do".into());
    }
    if !gold_unit.is_label() && !unit.is_label() {
        if !gold_unit.measures_like(unit) {
            return Err("another unit".into());
        }
        if gold_unit.scale != unit.scale {
            let scaled = |value: &Expr, unit: &Unit| {
                Expr::Product(vec![value.clone(), Expr::Num(unit.scale.clone())])
            };
            return equal::expressions(&scaled(gold, gold_unit), &scaled(answer, unit), at.steps)
                .map(|why| format!("{why} in the same unit"));
        }
    }
    // `5 dozen` is 60, and 5 where the question asks for dozens.
    for (unit, counted, other) in [(gold_unit, gold, answer), (unit, answer, gold)] {
        let all = || Expr::Product(vec![counted.clone(), Expr::Num(unit.scale.clone())]);
        if unit.counts() && equal::expressions(&all(), other, at.steps).is_ok() {
            return Ok("the same number".into());
        }
    }
    let ((a, sign), (b, other)) = (peel(gold), peel(answer));
    if sign == other {
        return equal::expressions(&a, &b, at.steps);
    }
    // One has a sign that the other lacks: with it as part of the value, or as a unit left out.
    let found = equal::expressions(gold, answer, at.steps);
    if found.is_ok() || sign != Sign::None && other != Sign::None {
        return found;
    }
    let name = match (sign, other) {
        (Sign::Percent, _) | (_, Sign::Percent) => "percent",
        _ => "degree",
    };
    equal::expressions(&a, &b, at.steps).map(|why| format!("{why}, the {name} sign aside"))
}

/// A number as one writes it down: an integer, a decimal or a fraction, with its sign.
fn is_number(value: &Expr) -> bool {
    match value {
        Expr::Num(_) => true,
        Expr::Inverse(inner) | Expr::Percent(inner) | Expr::Degrees(inner) => is_number(inner),
        Expr::Product(factors) => {
            factors.iter().all(is_number)
                && factors.iter().filter(|factor| is_literal(factor)).count() <= 1
        }
        _ => false,
    }
}

/// Whether numbers stand in it that are still to be added or multiplied, as in `17 \times 23`: where the
/// answer is a number, that is the question again. Fractions, powers and scientific notation are numbers.
fn is_undone(value: &Expr) -> bool {
    match value {
        Expr::Sum(terms) => {
            !is_mixed(terms) && terms.iter().filter(|term| is_number(term)).count() > 1
                || terms.iter().any(is_undone)
        }
        Expr::Product(factors) => {
            factors.iter().filter(|factor| is_literal(factor)).count() > 1
                || factors.iter().any(is_undone)
        }
        Expr::Inverse(inner) | Expr::Percent(inner) | Expr::Degrees(inner) => is_undone(inner),
        _ => false,
    }
}

/// A whole number and a fraction: `3 1/2`.
fn is_mixed(terms: &[Expr]) -> bool {
    matches!(terms, [Expr::Num(whole), Expr::Num(part)] if whole.is_int() && !part.is_int())
}

/// A number that is more than the sign of a product.
fn is_literal(factor: &Expr) -> bool {
    matches!(factor, Expr::Num(n) if *n != RBig::NEG_ONE)
}

/// Digits with a base: the base may be left out in the answer, and may not be changed.
fn bases(gold: &Expr, answer: &Expr) -> Option<Finding> {
    match (gold, answer) {
        (Expr::Based { digits: a, base: b }, Expr::Based { digits: c, base: d }) => {
            let same = b == d && a.eq_ignore_ascii_case(c);
            Some(verdict(same, "the same digits and base", "other digits or another base"))
        }
        (Expr::Based { digits, .. }, Expr::Num(n)) => {
            let same = n.to_string() == *digits;
            Some(verdict(same, "the same digits, the base left out", "other digits"))
        }
        (Expr::Num(n), Expr::Based { digits, base }) => {
            let same = *base == 10 && n.to_string() == *digits;
            Some(verdict(same, "the same number", "a number of a base that is not asked for"))
        }
        _ => None,
    }
}
