//! Whether two expressions are the same: exactly where both are rational, else by evaluation.
//!
//! Constants are compared once, to 31 digits. Expressions with variables are compared at pseudo-random points:
//! they must agree wherever both are defined and real, at [`ENOUGH`] points (a polynomial identity that fails
//! agrees at no such point but with a probability of some 1e-2 each, so six leave 1e-12).

use super::ball::Ball;
use super::eval::{Context, POINTS, Steps};
use super::expr::{Expr, Fun};
use super::value::{Stop, Value};

/// Agreeing points after which two expressions are called equal.
const ENOUGH: u32 = 6;
/// Agreeing points that will do where no more are defined.
const LEAST: u32 = 3;

/// Why two answers are equal, or why not.
pub(super) type Finding = Result<String, String>;

/// What a point says about a difference.
enum Sight {
    Same {
        exact: bool,
    },
    Different,
    /// Lost in rounding.
    Unclear,
}

/// Compares two expressions, `\log` read either way.
pub(super) fn expressions(gold: &Expr, answer: &Expr, steps: &Steps) -> Finding {
    let context = Context::new(steps);
    let found = compare(gold, answer, context);
    let log = |e: &Expr| matches!(e, Expr::Call(Fun::Log, args) if args.len() == 1);
    if found.is_err() && (gold.any(&log) || answer.any(&log)) {
        let context = Context { decimal_log: true, ..Context::new(steps) };
        if let Ok(reason) = compare(gold, answer, context) {
            return Ok(format!("{reason}, log of base 10"));
        }
    }
    found
}

/// Whether one constant may be the other rounded: they differ by a hundredth at most.
pub(super) fn near(a: &Expr, b: &Expr, steps: &Steps) -> bool {
    let value = |e: &Expr| Context::new(steps).eval(e).ok()?.ball().ok();
    let variable = |e: &Expr| matches!(e, Expr::Sym(_) | Expr::Apply(..));
    if a.any(&variable) || b.any(&variable) {
        return false;
    }
    match (value(a), value(b)) {
        (Some(a), Some(b)) => {
            a.sub(b).is_some_and(|gap| gap.size() <= 0.01 * a.size().max(b.size()))
        }
        _ => false,
    }
}

/// Whether a symbol stands for a set, a matrix or the like, which numbers cannot represent.
fn abstract_symbol(expr: &Expr) -> bool {
    match expr {
        Expr::Sym(name) => name.starts_with("math") || name.starts_with("aleph"),
        Expr::Mark(mark, _) => matches!(mark.as_str(), "top" | "dagger" | "*" | "perp" | "+"),
        _ => false,
    }
}

fn compare(gold: &Expr, answer: &Expr, mut context: Context) -> Finding {
    if gold.any(&abstract_symbol) || answer.any(&abstract_symbol) {
        return match gold.shape(false) == answer.shape(false) {
            true => Ok("the same formula".into()),
            false => Err("not the same formula, and letters in it stand for no numbers".into()),
        };
    }
    if *gold == Expr::Infinity || *answer == Expr::Infinity || infinite(gold) || infinite(answer) {
        return infinities(gold, answer, &context);
    }
    let difference = gold.clone().minus(answer.clone());
    let variable = |e: &Expr| matches!(e, Expr::Sym(_));
    if !difference.any(&variable) {
        return match sight(gold, &difference, &context) {
            Ok(Sight::Same { exact: true }) => Ok("the same number".into()),
            Ok(Sight::Same { exact: false }) => Ok("the same number to 28 digits".into()),
            Ok(Sight::Different) => Err("another number".into()),
            Ok(Sight::Unclear) => shapes(gold, answer, "the difference is lost in rounding"),
            Err(stop) => shapes(gold, answer, words(stop)),
        };
    }
    let conjugates =
        |e: &Expr| matches!(e, Expr::Call(Fun::Conj | Fun::Re | Fun::Im | Fun::Abs | Fun::Arg, _));
    let complex = difference.any(&conjugates);
    let (mut agreed, mut last) = (0, "no point where both are defined");
    for point in 0..POINTS {
        context.point = point;
        context.complex = complex && point % 2 == 1;
        match sight(gold, &difference, &context) {
            Ok(Sight::Same { .. }) => agreed += 1,
            Ok(Sight::Different) => return Err(format!("they differ at point {}", point + 1)),
            Ok(Sight::Unclear) => last = "rounding hides the difference",
            Err(Stop::Steps) => return shapes(gold, answer, words(Stop::Steps)),
            Err(stop) => last = words(stop),
        }
        if agreed == ENOUGH {
            break;
        }
    }
    if agreed < LEAST {
        return shapes(gold, answer, last);
    }
    Ok(format!("the same values at {agreed} points"))
}

/// The verdict of the shapes where evaluation has none.
fn shapes(gold: &Expr, answer: &Expr, problem: &str) -> Finding {
    match gold.shape(true) == answer.shape(true) {
        true => Ok(format!("the same formula ({problem})")),
        false => Err(format!("not the same formula ({problem})")),
    }
}

fn words(stop: Stop) -> &'static str {
    match stop {
        Stop::Undefined(what) => what,
        Stop::TooLarge => "a number too large to hold",
        Stop::Steps => "too many steps",
    }
}

fn infinite(expr: &Expr) -> bool {
    expr.any(&|e| *e == Expr::Infinity)
}

fn infinities(gold: &Expr, answer: &Expr, context: &Context) -> Finding {
    match (context.eval(gold), context.eval(answer)) {
        (Ok(Value::Infinite(a)), Ok(Value::Infinite(b))) if a == b => Ok("both infinite".into()),
        (Ok(Value::Infinite(_)), Ok(Value::Infinite(_))) => Err("infinities of other sign".into()),
        (Ok(_), Ok(_)) => Err("one is infinite".into()),
        (Err(stop), _) | (_, Err(stop)) => shapes(gold, answer, words(stop)),
    }
}

/// Whether the difference vanishes at the context's point.
fn sight(gold: &Expr, difference: &Expr, context: &Context) -> Result<Sight, Stop> {
    let ball = match context.eval(difference)? {
        Value::Exact(n) if n.is_zero() => return Ok(Sight::Same { exact: true }),
        Value::Exact(_) => return Ok(Sight::Different),
        Value::Infinite(_) => return Err(Stop::Undefined("infinity is no number")),
        Value::Approx(ball) => ball,
    };
    if ball.size() > 4.0 * ball.error {
        return Ok(Sight::Different);
    }
    let size = context.eval(gold)?.ball()?.size();
    Ok(if precise(&ball, size) { Sight::Same { exact: false } } else { Sight::Unclear })
}

/// Whether an error is small enough, beside numbers of this size, to trust a difference of 0.
fn precise(difference: &Ball, size: f64) -> bool {
    difference.error <= 1e-20 * size.max(1e-6)
}

/// Compares `gold = 0` with `answer = 0`: equal up to a constant factor, not 0; the reason tells its sign.
pub(super) fn zero_sets(gold: &Expr, answer: &Expr, steps: &Steps) -> Result<i32, String> {
    if [gold, answer].iter().any(|e| e.any(&abstract_symbol) || infinite(e)) {
        return match gold.shape(false) == answer.shape(false) {
            true => Ok(1),
            false => Err("not the same formula, and letters in it stand for no numbers".into()),
        };
    }
    let mut context = Context::new(steps);
    let mut first: Option<Value> = None;
    let mut agreed = 0;
    for point in 0..POINTS {
        context.point = point;
        let (a, b) = match (context.eval(gold), context.eval(answer)) {
            (Ok(a), Ok(b)) => (a, b),
            (Err(Stop::Steps), _) | (_, Err(Stop::Steps)) => return Err("too many steps".into()),
            _ => continue,
        };
        let zero = |v: &Value| match v {
            Value::Exact(n) => n.is_zero(),
            Value::Approx(ball) => ball.size() <= 4.0 * ball.error,
            Value::Infinite(_) => false,
        };
        match (zero(&a), zero(&b)) {
            (true, true) => continue,
            (false, false) => {}
            _ => return Err(format!("only one holds at point {}", point + 1)),
        }
        let Ok(ratio) = a.div(&b) else { continue };
        if let Some(first) = &first {
            let Ok(difference) = ratio.sub(first) else { continue };
            if !zero(&difference) {
                return Err("no constant factor leads from one to the other".into());
            }
        } else {
            first = Some(ratio);
        }
        agreed += 1;
        if agreed == ENOUGH {
            break;
        }
    }
    let sign = first.as_ref().and_then(Value::sign);
    match sign {
        Some(sign) if agreed >= LEAST => Ok(sign),
        _ if gold.shape(true) == answer.shape(true) => Ok(1),
        _ => Err("they cannot be evaluated".into()),
    }
}
