//! Whether two answers mean the same, form by form; `docs/VERIFIER.md` has the rules in words.

mod quantity;
mod relation;

use std::borrow::Borrow;

use super::answer::Answer;
use super::equal::{self, Finding};
use super::eval::Steps;
use super::expr::Expr;
use super::region::Region;
use super::units::Unit;
use quantity::quantities;
use relation::{assigned, components, relations, stated};

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
    use Answer::{
        Choice, Group, Letters, List, Matrix, Quantity, Ratio, Relation, Set, Time, Words,
    };
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
        (other, Relation { sides, by }) => stated(other, sides, by, at),
        (Time(a), Time(b)) => verdict(a.equals(b), "the same time", "another time"),
        (Time(time), Words(word)) | (Words(word), Time(time)) => {
            verdict(time.is_called(word), "the same time", "another time")
        }
        (Time(a), Ratio(_)) if !a.is_reduced() => Err("a ratio is no time".into()),
        (Time(a), Ratio(b)) => ratios(&a.ratio().ok_or("a ratio is no time")?, b, at),
        (Ratio(a), Time(b)) => ratios(a, &b.ratio().ok_or("a time is no ratio")?, at),
        (Group { open: a, close: b, items: c }, Group { open: d, close: e, items: f }) => {
            if c.len() != f.len() {
                return Err(format!("{} entries instead of {}", f.len(), c.len()));
            }
            if (a, b) != (d, e) {
                return Err("other brackets: open or closed".into());
            }
            in_order(c, f, at)
        }
        // `x = 1, y = 2` for the point (1, 2).
        (Group { open: '(', close: ')', items }, List(named)) if components(named).is_some() => {
            in_order(items, &components(named).unwrap_or_default(), at)
        }
        (List(named), Group { open: '(', close: ')', items }) if components(named).is_some() => {
            in_order(&components(named).unwrap_or_default(), items, at)
        }
        // Round brackets around what the gold answer gives in no order.
        (Set(a) | List(a), Group { open: '(', close: ')', items }) if a.len() > 1 => {
            in_any_order(a, items, matches!(gold, Set(_)), at)
        }
        (Set(a) | List(a), Set(b) | List(b)) => {
            let sets = matches!(gold, Set(_)) || matches!(answer, Set(_));
            in_any_order(a, b, sets, at)
        }
        (Set(one) | List(one), other) if one.len() == 1 => again(&one[0], other),
        (other, Set(one) | List(one)) if one.len() == 1 => again(other, &one[0]),
        // One value in several spellings: `1/2, or 50%`.
        (Quantity { .. }, List(spellings)) if spellings.iter().all(|b| again(gold, b).is_ok()) => {
            Ok("the same value each time".into())
        }
        (Matrix(a), Matrix(b)) => matrices(a, b, at),
        // A row or column as a list; a list of rows.
        (Matrix(cells), Group { items, .. }) => match grid(items) {
            Some(rows) => in_rows(&entries(cells)?, &rows, at),
            None => in_order(&vector(cells)?, items, at),
        },
        (Group { items, .. }, Matrix(cells)) => match grid(items) {
            Some(rows) => in_rows(&rows, &entries(cells)?, at),
            None => in_order(items, &vector(cells)?, at),
        },
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
        Answer::Time(_) => "a time",
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

fn in_order(gold: &[impl Borrow<Answer>], answer: &[impl Borrow<Answer>], at: At) -> Finding {
    if gold.len() != answer.len() {
        return Err(format!("{} entries instead of {}", answer.len(), gold.len()));
    }
    for (i, (a, b)) in gold.iter().zip(answer).enumerate() {
        compare(a.borrow(), b.borrow(), at.deeper())
            .map_err(|why| format!("entry {}: {why}", i + 1))?;
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

/// The rows of a matrix that is written as a list of lists.
fn grid(items: &[Answer]) -> Option<Vec<Vec<Answer>>> {
    let row = |item: &Answer| match item {
        Answer::Group { items, .. } => Some(items.clone()),
        _ => None,
    };
    items.iter().map(row).collect()
}

fn in_rows(gold: &[Vec<Answer>], answer: &[Vec<Answer>], at: At) -> Finding {
    if gold.len() != answer.len() {
        return Err("a matrix of another size".into());
    }
    for (a, b) in gold.iter().zip(answer) {
        in_order(a, b, at)?;
    }
    Ok("equal in all cells".into())
}

/// The cells of a matrix as answers.
fn entries(cells: &[Vec<Expr>]) -> Result<Vec<Vec<Answer>>, String> {
    let unit = Unit::parse(&[])?;
    let entry = |value: &Expr| Answer::Quantity { value: value.clone(), unit: unit.clone() };
    Ok(cells.iter().map(|row| row.iter().map(entry).collect()).collect())
}

/// A matrix of one row or column as entries.
fn vector(cells: &[Vec<Expr>]) -> Result<Vec<Answer>, String> {
    if cells.len() > 1 && cells[0].len() > 1 {
        return Err("a matrix is no vector".into());
    }
    Ok(entries(cells)?.into_iter().flatten().collect())
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
