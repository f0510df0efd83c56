//! Whether two answers mean the same, form by form; `docs/VERIFIER.md` has the rules in words.

use dashu::rational::RBig;

use super::answer::Answer;
use super::equal::{self, Finding};
use super::eval::Steps;
use super::expr::Expr;
use super::region::Region;
use super::units::Unit;

/// Deepest nesting of answers in answers.
const MAX_DEPTH: usize = 16;

/// Whether the answer is the gold one.
pub(super) fn answers(gold: &Answer, answer: &Answer) -> Finding {
    compare(gold, answer, At { depth: 0, steps: &Steps::new() })
}

/// Where in the comparison one is, and what is left to it.
#[derive(Clone, Copy)]
struct At<'a> {
    depth: usize,
    steps: &'a Steps,
}

impl At<'_> {
    fn deeper(self) -> Self {
        At { depth: self.depth + 1, ..self }
    }
}

fn compare(gold: &Answer, answer: &Answer, at: At) -> Finding {
    use Answer::{Choice, Group, Letters, List, Matrix, Quantity, Ratio, Relation, Set, Words};
    if at.depth == MAX_DEPTH {
        return Err(format!("nested more than {MAX_DEPTH} deep"));
    }
    let again = |gold: &Answer, answer: &Answer| compare(gold, answer, at.deeper());
    if let Some(finding) = regions(gold, answer) {
        return finding;
    }
    match (gold, answer) {
        (Choice { letter: a, .. }, Choice { letter: b, .. }) => {
            verdict(a == b, "the same choice", "another choice")
        }
        (Choice { letter, rest }, other) | (other, Choice { letter, rest }) => {
            if matches!(other, Quantity { value: Expr::Sym(name), .. } if *name == letter.to_string())
            {
                return Ok("the same choice".into());
            }
            match rest {
                Some(rest) if matches!(gold, Choice { .. }) => again(rest, answer),
                Some(rest) => again(gold, rest),
                None => Err("a choice and no choice".into()),
            }
        }
        (Words(a), Words(b)) => verdict(synonym(a) == synonym(b), "the same words", "other words"),
        (Letters(a), Letters(b)) => verdict(a == b, "the same letters", "other letters"),
        (Letters(letters), Words(words)) | (Words(words), Letters(letters)) => {
            verdict(letters.to_lowercase() == *words, "the same letters", "other letters")
        }
        (Set(empty), Words(words)) | (Words(words), Set(empty)) if empty.is_empty() => {
            verdict(synonym(words) == "none", "no solution", "other than no solution")
        }
        // An equation of a name with a value means the value.
        (Relation { sides: a, by: b }, Relation { sides: c, by: d }) => {
            relations((a, b), (c, d), at)
        }
        (Relation { sides, by }, other) => again(assigned(sides, by, at)?, other),
        (other, Relation { sides, by }) => again(other, assigned(sides, by, at)?),
        (Group { open: a, close: b, items: c }, Group { open: d, close: e, items: f }) => {
            if c.len() != f.len() {
                return Err(format!("{} entries instead of {}", f.len(), c.len()));
            }
            if (a, b) != (d, e) {
                return Err("other brackets: open or closed".into());
            }
            in_order(c, f, at)
        }
        (Set(a) | List(a), Set(b) | List(b)) => {
            let sets = matches!(gold, Set(_)) || matches!(answer, Set(_));
            in_any_order(a, b, sets, at)
        }
        (Set(one) | List(one), other) if one.len() == 1 => again(&one[0], other),
        (other, Set(one) | List(one)) if one.len() == 1 => again(other, &one[0]),
        (Matrix(a), Matrix(b)) => matrices(a, b, at),
        (Matrix(cells), Group { open: '(', close: ')', items }) => {
            in_order(&vector(cells)?, items, at)
        }
        (Group { open: '(', close: ')', items }, Matrix(cells)) => {
            in_order(items, &vector(cells)?, at)
        }
        (Ratio(a), Ratio(b)) => ratios(a, b, at),
        (Ratio(a), Quantity { value, unit }) if a.len() == 2 && unit.is_label() => {
            equal::expressions(&a[0].clone().over(a[1].clone()), value, at.steps)
        }
        (Quantity { value, unit }, Ratio(b)) if b.len() == 2 && unit.is_label() => {
            equal::expressions(value, &b[0].clone().over(b[1].clone()), at.steps)
        }
        (Quantity { value: a, unit: u }, Quantity { value: b, unit: v }) => {
            quantities((a, u), (b, v), at)
        }
        (Answer::Joined { by: a, parts: c }, Answer::Joined { by: b, parts: d }) if a == b => {
            match *a {
                "setminus" => in_order(c, d, at),
                _ => in_any_order(c, d, true, at),
            }
        }
        _ => Err(format!("{} is not {}", form(answer), form(gold))),
    }
}

fn verdict(equal: bool, yes: &str, no: &str) -> Finding {
    if equal { Ok(yes.into()) } else { Err(no.into()) }
}

fn form(answer: &Answer) -> &'static str {
    match answer {
        Answer::Quantity { .. } => "a number or formula",
        Answer::Group { .. } => "a tuple or interval",
        Answer::Set(_) => "a set",
        Answer::List(_) => "a list",
        Answer::Matrix(_) => "a matrix",
        Answer::Ratio(_) => "a ratio",
        Answer::Joined { .. } => "a union, intersection or difference",
        Answer::Relation { .. } => "a relation",
        Answer::Choice { .. } => "a choice",
        Answer::Words(_) => "words",
        Answer::Letters(_) => "letters",
    }
}

/// Words that answer the same question alike.
fn synonym(words: &str) -> &str {
    match words {
        "true" | "correct" => "yes",
        "false" | "incorrect" => "no",
        "no solution" | "no solutions" | "no real solution" | "no real solutions" | "empty set" => {
            "none"
        }
        other => other,
    }
}

/// Both as sets of reals, where at least one can be nothing else.
fn regions(gold: &Answer, answer: &Answer) -> Option<Finding> {
    if !Region::is_certain(gold) && !Region::is_certain(answer) {
        return None;
    }
    let (a, x) = Region::read(gold)?;
    let (b, y) = Region::read(answer)?;
    if let (Some(x), Some(y)) = (x, y)
        && x != y
    {
        return Some(Err(format!("{y} is not {x}")));
    }
    Some(verdict(a.equals(&b)?, "the same set of reals", "another set of reals"))
}

fn in_order(gold: &[Answer], answer: &[Answer], at: At) -> Finding {
    if gold.len() != answer.len() {
        return Err(format!("{} entries instead of {}", answer.len(), gold.len()));
    }
    for (i, (a, b)) in gold.iter().zip(answer).enumerate() {
        compare(a, b, at.deeper()).map_err(|why| format!("entry {}: {why}", i + 1))?;
    }
    Ok(format!("equal in all {} entries", gold.len()))
}

/// As sets, or as lists whose repeated items count.
fn in_any_order(gold: &[Answer], answer: &[Answer], sets: bool, at: At) -> Finding {
    let same = |a: &Answer, b: &Answer| compare(a, b, at.deeper()).is_ok();
    if sets {
        let missing = gold.iter().position(|a| !answer.iter().any(|b| same(a, b)));
        if let Some(i) = missing {
            return Err(format!("item {} is missing", i + 1));
        }
        let extra = answer.iter().position(|b| !gold.iter().any(|a| same(a, b)));
        return match extra {
            Some(i) => Err(format!("item {} is too many", i + 1)),
            None => Ok("the same items".into()),
        };
    }
    if gold.len() != answer.len() {
        return Err(format!("{} items instead of {}", answer.len(), gold.len()));
    }
    let mut left: Vec<&Answer> = answer.iter().collect();
    for (i, a) in gold.iter().enumerate() {
        match left.iter().position(|b| same(a, b)) {
            Some(at) => drop(left.swap_remove(at)),
            None => return Err(format!("item {} is missing", i + 1)),
        }
    }
    Ok("the same items".into())
}

fn matrices(gold: &[Vec<Expr>], answer: &[Vec<Expr>], at: At) -> Finding {
    let size = |m: &[Vec<Expr>]| (m.len(), m.first().map_or(0, Vec::len));
    if size(gold) != size(answer) {
        return Err("a matrix of another size".into());
    }
    for (i, (a, b)) in gold.iter().flatten().zip(answer.iter().flatten()).enumerate() {
        equal::expressions(a, b, at.steps).map_err(|why| format!("cell {}: {why}", i + 1))?;
    }
    Ok("equal in all cells".into())
}

/// A matrix of one row or column as entries.
fn vector(cells: &[Vec<Expr>]) -> Result<Vec<Answer>, String> {
    if cells.len() > 1 && cells[0].len() > 1 {
        return Err("a matrix is no vector".into());
    }
    let unit = Unit::parse(&[])?;
    let entry = |value: &Expr| Answer::Quantity { value: value.clone(), unit: unit.clone() };
    Ok(cells.iter().flatten().map(entry).collect())
}

/// `a:b:c` up to a common factor.
fn ratios(gold: &[Expr], answer: &[Expr], at: At) -> Finding {
    if gold.len() != answer.len() {
        return Err(format!("a ratio of {} instead of {}", answer.len(), gold.len()));
    }
    for i in 0..gold.len() {
        for j in 0..i {
            // a_i b_j = a_j b_i
            let product = |x: &Expr, y: &Expr| Expr::Product(vec![x.clone(), y.clone()]);
            let (left, right) = (product(&gold[i], &answer[j]), product(&gold[j], &answer[i]));
            equal::expressions(&left, &right, at.steps).map_err(|_| "another ratio".to_string())?;
        }
    }
    let zero = |parts: &[Expr]| {
        parts.iter().all(|e| equal::expressions(e, &Expr::int(0), at.steps).is_ok())
    };
    if zero(gold) != zero(answer) {
        return Err("another ratio".into());
    }
    Ok("the same ratio".into())
}

/// The value that `x = ..` (or `x \in ..`) gives to a name: the last side, with which those before it agree.
fn assigned<'a>(sides: &'a [Answer], by: &[&str], at: At) -> Result<&'a Answer, String> {
    let none = || Err("a relation is not a value".to_string());
    if !by.iter().all(|by| *by == "=") && by != ["in"] {
        return none();
    }
    let [name, values @ ..] = sides else { return none() };
    let [steps @ .., last] = values else { return none() };
    if !is_name(name) || values.iter().any(|value| mentions(value, name)) {
        return none();
    }
    for step in steps {
        compare(step, last, at.deeper())
            .map_err(|_| "the sides of the equation differ".to_string())?;
    }
    Ok(last)
}

/// A variable, `f(x)`, `(x, y)`, a segment: what an equation may give a value to.
fn is_name(side: &Answer) -> bool {
    match side {
        Answer::Quantity { value, unit } if unit.is_label() => match value {
            Expr::Sym(_) => true,
            Expr::Apply(_, arguments) => arguments.iter().all(|a| matches!(a, Expr::Sym(_))),
            Expr::Mark(_, inner) => matches!(**inner, Expr::Sym(_)),
            _ => false,
        },
        Answer::Group { open: '(', close: ')', items } => items.iter().all(is_name),
        Answer::Words(_) | Answer::Letters(_) => true,
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

fn relations(
    (gold, by): (&[Answer], &[&str]),
    (answer, other): (&[Answer], &[&str]),
    at: At,
) -> Finding {
    let equations = |by: &[&str]| by.iter().all(|by| *by == "=");
    if equations(by) && equations(other) {
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

fn quantities(
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
