//! Equations and inequalities: what they give a value to, and whether two say the same.

use dashu::rational::RBig;

use super::{At, compare, in_order, verdict};
use crate::reward::math::answer::Answer;
use crate::reward::math::equal::{self, Finding};
use crate::reward::math::expr::Expr;

/// Whether a relation says that its sides are equal, or nearly.
fn equates(by: &[&str]) -> bool {
    by.iter().all(|by| matches!(*by, "=" | "approx"))
}

/// The value that `x = ..` (or `x \in ..`) gives to a name: the last side, with which those before it agree, or round
/// to it.
pub(super) fn assigned<'a>(sides: &'a [Answer], by: &[&str], at: At) -> Result<&'a Answer, String> {
    let none = || Err("a relation is not a value".to_string());
    if !equates(by) && by != ["in"] {
        return none();
    }
    let [name, values @ ..] = sides else { return none() };
    let [steps @ .., last] = values else { return none() };
    if !is_name(name) || values.iter().any(|value| mentions(value, name)) {
        return none();
    }
    agree(steps, last, at)?;
    Ok(last)
}

/// Compares a gold value with the one that an answer states in a relation: the last side of a chain of equalities,
/// or the exact one before the last `\approx`.
pub(super) fn stated(gold: &Answer, sides: &[Answer], by: &[&str], at: At) -> Finding {
    let value = match assigned(sides, by, at) {
        Ok(value) => value,
        Err(why) if !equates(by) => return Err(why),
        Err(why) => match sides {
            [value, asked] if is_constant(value) && asks(asked) => value,
            [first, .., last] if is_constant(last) && (is_constant(first) || asks(first)) => {
                let steps = &sides[1..sides.len() - 1];
                let constants = steps.iter().filter(|step| is_constant(step));
                agree(constants, last, at)?;
                last
            }
            _ => return Err(why),
        },
    };
    let found = compare(gold, value, at.deeper());
    let rounded = by.iter().rposition(|by| *by == "approx").map(|at| &sides[at]);
    match rounded {
        // `\frac{100}{3} \approx 33.3` gives the exact value, too.
        Some(exact) if found.is_err() && near(exact, value, at) => {
            compare(gold, exact, at.deeper()).or(found)
        }
        _ => found,
    }
}

/// Whether the sides between the first and the last have the value of the last, or one that rounds to it.
fn agree<'a>(
    steps: impl IntoIterator<Item = &'a Answer>,
    last: &Answer,
    at: At,
) -> Result<(), String> {
    let agrees = |step: &Answer| compare(step, last, at.deeper()).is_ok() || near(step, last, at);
    match steps.into_iter().all(agrees) {
        true => Ok(()),
        false => Err("the sides of the equation differ".into()),
    }
}

fn near(a: &Answer, b: &Answer, at: At) -> bool {
    match (a, b) {
        (Answer::Quantity { value: a, .. }, Answer::Quantity { value: b, .. }) => {
            equal::near(a, b, at.steps)
        }
        _ => false,
    }
}

/// A number, with a unit or without.
fn is_constant(side: &Answer) -> bool {
    match side {
        Answer::Quantity { value, .. } => {
            !value.any(&|e| matches!(e, Expr::Sym(_) | Expr::Apply(..)))
        }
        _ => false,
    }
}

/// Whether a side may be what the question asks for, as `m+n`, `\angle ABC`, `f(3)`: letters and no number.
/// `10x = 50` is an equation to be solved, `x^2 + y^2 = 4` a circle.
fn asks(side: &Answer) -> bool {
    let Answer::Quantity { value, unit } = side else { return is_name(side) };
    unit.is_label() && !is_constant(side) && !holds_number(value)
}

/// Whether a number stands in it outside of the arguments of unknown functions.
fn holds_number(value: &Expr) -> bool {
    match value {
        Expr::Apply(..) => false,
        Expr::Num(n) => *n != RBig::NEG_ONE,
        Expr::Power(base, exponent) => holds_number(base) || holds_number(exponent),
        other => other.children().iter().any(holds_number),
    }
}

/// The values that equations give to different names: `x = 1, y = 2`, in the order of the names where these are
/// letters of one kind, else as they are written.
pub(super) fn components(items: &[Answer]) -> Option<Vec<&Answer>> {
    let mut found = Vec::new();
    for item in items {
        let Answer::Relation { sides, by } = item else { return None };
        let (Answer::Quantity { value: Expr::Sym(name), unit }, true) =
            (sides.first()?, equates(by))
        else {
            return None;
        };
        let value = sides.last()?;
        if !unit.is_label() || found.iter().any(|(other, _)| *other == name) {
            return None;
        }
        found.push((name, value));
    }
    let small = |name: &str| name.starts_with(|c: char| c.is_ascii_lowercase());
    let one = |name: &str| name.split('_').next().is_some_and(|stem| stem.len() == 1);
    if found.iter().all(|(name, _)| small(name) && one(name)) {
        found.sort_by_key(|(name, _)| name.as_str());
    }
    Some(found.into_iter().map(|(_, value)| value).collect())
}

/// A variable, `f(x)`, `(x, y)`, a segment: what an equation may give a value to.
fn is_name(side: &Answer) -> bool {
    match side {
        Answer::Quantity { value, unit } if unit.is_label() => match value {
            Expr::Sym(_) | Expr::Apply(..) => true,
            Expr::Mark(_, inner) => matches!(**inner, Expr::Sym(_)),
            _ => is_derivative(value),
        },
        Answer::Group { open: '(', close: ')', items } => items.iter().all(is_name),
        Answer::Words(_) | Answer::Letters(_) => true,
        _ => false,
    }
}

/// `\frac{dy}{dx}`
fn is_derivative(value: &Expr) -> bool {
    let d = |e: &Expr| match e {
        Expr::Product(factors) => factors.first() == Some(&Expr::Sym("d".into())),
        other => *other == Expr::Sym("d".into()),
    };
    match value {
        Expr::Product(factors) => match factors.as_slice() {
            [above, Expr::Inverse(below), ..] => d(above) && d(below),
            _ => false,
        },
        _ => false,
    }
}

/// Whether a value holds the name that it is given to: `x = 2x + 1` gives none.
fn mentions(value: &Answer, name: &Answer) -> bool {
    match (value, name) {
        (Answer::Quantity { value, .. }, Answer::Quantity { value: name, .. }) => match name {
            Expr::Sym(_) | Expr::Mark(..) | Expr::Apply(..) => value.any(&|e| e == name),
            _ => false,
        },
        _ => false,
    }
}

pub(super) fn relations(
    (gold, by): (&[Answer], &[&str]),
    (answer, other): (&[Answer], &[&str]),
    at: At,
) -> Finding {
    if equates(by) && equates(other) {
        // The same name on the left: its values; else, where that fails too, the equations as such.
        let same_name = shape(&gold[0]).is_some() && shape(&gold[0]) == shape(&answer[0]);
        if let (true, Ok(a), Ok(b)) =
            (same_name, assigned(gold, by, at), assigned(answer, other, at))
        {
            return compare(a, b, at.deeper());
        }
    }
    if gold.len() != answer.len() {
        return Err(format!("a chain of {} sides instead of {}", answer.len(), gold.len()));
    }
    if gold.len() > 2 || !both_values(gold) || !both_values(answer) {
        return chain(gold, by, answer, other, at);
    }
    let flat = |sides: &[Answer]| match sides {
        [Answer::Quantity { value: a, .. }, Answer::Quantity { value: b, .. }] => {
            a.clone().minus(b.clone())
        }
        _ => Expr::int(0),
    };
    let sign = equal::zero_sets(&flat(gold), &flat(answer), at.steps)?;
    let turned = if sign < 0 { turn(other[0]) } else { other[0] };
    let (yes, no) = ("the same relation up to a factor", "another relation between the sides");
    verdict(by[0] == turned, yes, no)
}

fn both_values(sides: &[Answer]) -> bool {
    sides.iter().all(|side| matches!(side, Answer::Quantity { .. }))
}

/// Side by side, in either direction.
fn chain(gold: &[Answer], by: &[&str], answer: &[Answer], other: &[&str], at: At) -> Finding {
    let turned: Vec<_> = other.iter().rev().map(|by| turn(by)).collect();
    if by == other
        && let Ok(reason) = in_order(gold, answer, at)
    {
        return Ok(reason);
    }
    if by == turned && !by.contains(&"in") {
        let mut answer = answer.to_vec();
        answer.reverse();
        return in_order(gold, &answer, at);
    }
    Err("another relation".into())
}

fn turn(by: &str) -> &str {
    match by {
        "<" => ">",
        ">" => "<",
        "<=" => ">=",
        ">=" => "<=",
        other => other,
    }
}

/// A name's text.
fn shape(side: &Answer) -> Option<String> {
    match side {
        _ if !is_name(side) => None,
        Answer::Quantity { value, .. } => Some(value.shape(true)),
        Answer::Group { items, .. } => {
            let items: Option<Vec<_>> = items.iter().map(shape).collect();
            Some(items?.join(","))
        }
        Answer::Words(text) | Answer::Letters(text) => Some(text.clone()),
        _ => None,
    }
}
