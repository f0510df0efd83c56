//! Sets of real numbers as unions of intervals: `x > 3` and `(3, \infty)`, `\mathbb R \setminus \{0\}` and
//! `(-\infty, 0) \cup (0, \infty)`.

use std::cmp::Ordering;

use super::answer::Answer;
use super::eval::{Context, Steps};
use super::expr::Expr;
use super::value::Value;

/// An interval; an end is a number and whether it belongs to the set.
#[derive(Debug, Clone)]
struct Interval {
    low: (Value, bool),
    high: (Value, bool),
}

/// Disjoint intervals with gaps between, from the left.
#[derive(Debug)]
pub(super) struct Region(Vec<Interval>);

/// -1, 0, 1; `None` where it is unclear.
fn order(a: &Value, b: &Value) -> Option<Ordering> {
    match (a, b) {
        (Value::Infinite(a), Value::Infinite(b)) => Some(b.cmp(a)),
        (Value::Infinite(negative), _) => {
            Some(if *negative { Ordering::Less } else { Ordering::Greater })
        }
        (_, Value::Infinite(_)) => order(b, a).map(Ordering::reverse),
        _ => {
            let difference = a.sub(b).ok()?;
            match difference.sign() {
                Some(sign) => Some(sign.cmp(&0)),
                None if difference.is_real() => Some(Ordering::Equal),
                None => None,
            }
        }
    }
}

fn number(answer: &Answer) -> Option<Value> {
    match answer {
        Answer::Quantity { value, unit } if unit.is_label() => {
            let constant = !value.any(&|e| matches!(e, Expr::Sym(_) | Expr::Apply(..)));
            constant.then(|| Context::new(&Steps::new()).eval(value).ok()).flatten()
        }
        _ => None,
    }
}

fn variable(answer: &Answer) -> Option<&str> {
    match answer {
        Answer::Quantity { value: Expr::Sym(name), .. } if !name.starts_with("math") => Some(name),
        _ => None,
    }
}

const LOWEST: (Value, bool) = (Value::Infinite(true), false);
const HIGHEST: (Value, bool) = (Value::Infinite(false), false);

impl Region {
    /// Whether the answer names a set of reals and nothing else: a bracketed pair alone may be a point.
    pub fn is_certain(answer: &Answer) -> bool {
        match answer {
            Answer::Joined { .. } => true,
            Answer::Relation { by, .. } => by.iter().all(|by| *by != "="),
            Answer::Quantity { value: Expr::Sym(name), .. } => name == "mathbb R",
            Answer::List(parts) => parts.iter().all(Region::is_certain),
            _ => false,
        }
    }

    /// The answer as a set of reals, and the variable that it names.
    pub fn read(answer: &Answer) -> Option<(Region, Option<&str>)> {
        let plain = |region| Some((region, None));
        match answer {
            Answer::Quantity { value: Expr::Sym(name), .. } if name == "mathbb R" => {
                plain(Region(vec![Interval { low: LOWEST, high: HIGHEST }]))
            }
            Answer::Group { open, close, items } => {
                let [low, high] = items.as_slice() else { return None };
                let (low, high) = (number(low)?, number(high)?);
                let interval = Interval { low: (low, *open == '['), high: (high, *close == ']') };
                Region(vec![interval]).merged().and_then(plain)
            }
            Answer::Set(items) => {
                let points = items.iter().map(|item| {
                    let point = (number(item)?, true);
                    Some(Interval { low: point.clone(), high: point })
                });
                Region(points.collect::<Option<_>>()?).merged().and_then(plain)
            }
            Answer::Joined { by, parts } => {
                let mut parts =
                    parts.iter().map(|part| Region::read(part).map(|(region, _)| region));
                let mut all = parts.next()??;
                for part in parts {
                    let part = part?;
                    all = match *by {
                        "cup" => all.union(part)?,
                        "cap" => all.intersection(&part)?,
                        _ => all.intersection(&part.complement()?)?,
                    };
                }
                plain(all)
            }
            Answer::Relation { sides, by } => relation(sides, by),
            Answer::List(parts) => {
                // `x < 1, x > 2` are alternatives where they are apart, else both hold.
                let mut parts = parts.iter().map(Region::read);
                let (mut all, variable) = parts.next()??;
                variable?;
                for part in parts {
                    let (part, other) = part?;
                    if other != variable {
                        return None;
                    }
                    let both = all.intersection(&part)?;
                    all = if both.0.is_empty() { all.union(part)? } else { both };
                }
                Some((all, variable))
            }
            _ => None,
        }
    }

    /// Whether both are the same set; `None` where an order is unclear.
    pub fn equals(&self, other: &Region) -> Option<bool> {
        if self.0.len() != other.0.len() {
            return Some(false);
        }
        for (a, b) in self.0.iter().zip(&other.0) {
            for (a, b) in [(&a.low, &b.low), (&a.high, &b.high)] {
                if a.1 != b.1 || order(&a.0, &b.0)? != Ordering::Equal {
                    return Some(false);
                }
            }
        }
        Some(true)
    }

    /// Sorted, without empty intervals, and with those that touch made one.
    fn merged(self) -> Option<Region> {
        let mut sorted: Vec<Interval> = Vec::new();
        for mut interval in self.0 {
            // Infinity belongs to no set of reals.
            interval.low.1 &= !matches!(interval.low.0, Value::Infinite(_));
            interval.high.1 &= !matches!(interval.high.0, Value::Infinite(_));
            match order(&interval.low.0, &interval.high.0)? {
                Ordering::Greater => return None,
                Ordering::Equal if !(interval.low.1 && interval.high.1) => continue,
                _ => {}
            }
            let mut at = 0;
            while at < sorted.len() && before(&sorted[at].low, &interval.low)? {
                at += 1;
            }
            sorted.insert(at, interval);
        }
        let mut merged: Vec<Interval> = Vec::new();
        for interval in sorted {
            if let Some(last) = merged.last_mut() {
                let touch = match order(&interval.low.0, &last.high.0)? {
                    Ordering::Less => true,
                    Ordering::Equal => interval.low.1 || last.high.1,
                    Ordering::Greater => false,
                };
                if touch {
                    match order(&interval.high.0, &last.high.0)? {
                        Ordering::Greater => last.high = interval.high,
                        Ordering::Equal => last.high.1 |= interval.high.1,
                        Ordering::Less => {}
                    }
                    continue;
                }
            }
            merged.push(interval);
        }
        Some(Region(merged))
    }

    fn union(mut self, other: Region) -> Option<Region> {
        self.0.extend(other.0);
        self.merged()
    }

    fn complement(&self) -> Option<Region> {
        let mut gaps = Vec::new();
        let mut low = LOWEST;
        for interval in &self.0 {
            let high = (interval.low.0.clone(), !interval.low.1);
            if !matches!(high.0, Value::Infinite(_)) {
                gaps.push(Interval { low, high });
            }
            low = (interval.high.0.clone(), !interval.high.1);
        }
        if !matches!(low.0, Value::Infinite(false)) {
            gaps.push(Interval { low, high: HIGHEST });
        }
        Region(gaps).merged()
    }

    fn intersection(&self, other: &Region) -> Option<Region> {
        self.complement()?.union(other.complement()?)?.complement()
    }
}

/// Whether an interval that begins at `a` comes before one that begins at `b`.
fn before(a: &(Value, bool), b: &(Value, bool)) -> Option<bool> {
    Some(match order(&a.0, &b.0)? {
        Ordering::Less => true,
        Ordering::Equal => a.1 && !b.1,
        Ordering::Greater => false,
    })
}

/// `x > 3`, `1 < x \le 2`, `x \ne 0`, `x \in [0, 1]`.
fn relation<'a>(sides: &'a [Answer], by: &[&str]) -> Option<(Region, Option<&'a str>)> {
    if let ([name, set], ["in"]) = (sides, by) {
        return Some((Region::read(set)?.0, Some(variable(name)?)));
    }
    if let ([left, right], ["!="]) = (sides, by) {
        let (name, point) = match (variable(left), variable(right)) {
            (Some(name), None) => (name, number(right)?),
            (None, Some(name)) => (name, number(left)?),
            _ => return None,
        };
        let point = (point, true);
        let hole = Region(vec![Interval { low: point.clone(), high: point }]);
        return Some((hole.complement()?, Some(name)));
    }
    let at = sides.iter().position(|side| variable(side).is_some())?;
    let name = variable(&sides[at])?;
    let mut interval = Interval { low: LOWEST, high: HIGHEST };
    if sides.len() > 3 || sides.len() != by.len() + 1 {
        return None;
    }
    for (i, by) in by.iter().enumerate() {
        let (strict, less) = match *by {
            "<" => (true, true),
            "<=" => (false, true),
            ">" => (true, false),
            ">=" => (false, false),
            _ => return None,
        };
        // The number stands left of the relation, or right of it.
        let left = match at {
            at if at == i + 1 => true,
            at if at == i => false,
            _ => return None,
        };
        let end = (number(&sides[if left { i } else { i + 1 }])?, !strict);
        if left == less {
            interval.low = end;
        } else {
            interval.high = end;
        }
    }
    Some((Region(vec![interval]).merged()?, Some(name)))
}
