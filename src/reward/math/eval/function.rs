//! The values of functions.

use dashu::base::{BitTest, Gcd, Signed, UnsignedAbs};
use dashu::integer::{IBig, UBig};
use dashu::rational::RBig;

use super::Context;
use crate::reward::math::ball::Ball;
use crate::reward::math::double::{Double, ZERO};
use crate::reward::math::expr::Fun;
use crate::reward::math::value::{Evaluated, Stop, Value, approx, bounded};

/// Largest n of n!.
const MAX_FACTORIAL: u32 = 2_500;
/// Largest k of a binomial.
const MAX_CHOICE: u32 = 1_000;

impl Context<'_> {
    /// A function's value at values; `free` where a variable had a say in these.
    pub(super) fn call(&self, function: Fun, values: &[Value], free: bool) -> Evaluated {
        let x = values.first().ok_or(Stop::Undefined("a function of nothing"))?;
        let two = Value::int(2);
        let one = Value::int(1);
        // A call of another function on a value.
        let again = |function, value: Value| self.call(function, &[value], free);
        match function {
            Fun::Sin | Fun::Cos | Fun::Tan | Fun::Cot | Fun::Sec | Fun::Csc => {
                if x.sign() == Some(0) && matches!(function, Fun::Sin | Fun::Tan) {
                    return Ok(Value::int(0));
                }
                let ball = x.ball()?;
                if ball.size() > 1e12 {
                    return Err(Stop::TooLarge);
                }
                let (sin, cos) = ball.sin_cos().ok_or(Stop::TooLarge)?;
                let (sin, cos) = (Value::Approx(sin), Value::Approx(cos));
                match function {
                    Fun::Sin => Ok(sin),
                    Fun::Cos => Ok(cos),
                    Fun::Tan => sin.div(&cos),
                    Fun::Cot => cos.div(&sin),
                    Fun::Sec => cos.inverse(),
                    _ => sin.inverse(),
                }
            }
            Fun::Arcsin | Fun::Arccos => {
                let other = one.sub(&x.mul(x)?)?;
                if !x.is_real() || other.sign() == Some(-1) {
                    return Err(Stop::Undefined("an arcsine or arccosine beyond 1"));
                }
                let (x, y) = (x.ball()?.re, other.ball()?.sqrt().ok_or(Stop::TooLarge)?);
                let point = if function == Fun::Arcsin {
                    Ball { re: y.re, im: x, error: y.error }
                } else {
                    Ball { re: x, im: y.re, error: y.error }
                };
                approx(point.arg())
            }
            Fun::Arctan | Fun::Arccot => {
                let ball = x.ball()?;
                if !ball.is_real() {
                    return Err(Stop::Undefined("an arctangent off the real line"));
                }
                let one = Double::new(1.0);
                let (re, im) =
                    if function == Fun::Arctan { (one, ball.re) } else { (ball.re, one) };
                approx(Ball { re, im, error: ball.error }.arg())
            }
            Fun::Sinh | Fun::Cosh | Fun::Tanh | Fun::Coth => {
                if x.sign() == Some(0) && matches!(function, Fun::Sinh | Fun::Tanh) {
                    return Ok(Value::int(0));
                }
                let up = again(Fun::Exp, x.clone())?;
                let down = up.inverse()?;
                let (sinh, cosh) = (up.sub(&down)?, up.add(&down)?);
                match function {
                    Fun::Sinh => sinh.div(&two),
                    Fun::Cosh => cosh.div(&two),
                    Fun::Tanh => sinh.div(&cosh),
                    _ => cosh.div(&sinh),
                }
            }
            Fun::Arsinh | Fun::Arcosh => {
                let shift = if function == Fun::Arsinh { one } else { one.neg() };
                let half = Value::Exact(RBig::from_parts(IBig::from(1), UBig::from(2u8)));
                let root = x.mul(x)?.add(&shift)?.pow(&half, true)?;
                again(Fun::Ln, x.add(&root)?)
            }
            Fun::Artanh => {
                let quotient = one.add(x)?.div(&one.sub(x)?)?;
                again(Fun::Ln, quotient)?.div(&two)
            }
            Fun::Exp => approx(x.ball()?.exp()),
            Fun::Ln => logarithm(x, free),
            Fun::Log => match values.get(1) {
                Some(base) => of_base(x, base, free),
                None if self.decimal_log => of_base(x, &Value::int(10), free),
                None => logarithm(x, free),
            },
            Fun::Log10 => of_base(x, &Value::int(10), free),
            Fun::Root => x.pow(&Value::int(3).inverse()?, free),
            Fun::Abs | Fun::Norm => match x {
                Value::Exact(n) if n.is_negative() => Ok(x.neg()),
                Value::Exact(_) => Ok(x.clone()),
                Value::Infinite(_) => Ok(Value::Infinite(false)),
                Value::Approx(ball) => approx(ball.abs()),
            },
            Fun::Floor | Fun::Ceil => {
                let up = function == Fun::Ceil;
                let x = if up { x.neg() } else { x.clone() };
                let floor = floor(&x)?;
                Ok(if up { floor.neg() } else { floor })
            }
            Fun::Min | Fun::Max => {
                let mut best = x.clone();
                for value in &values[1..] {
                    let larger = value.sub(&best)?.sign().ok_or(Stop::Undefined("a tie"))? > 0;
                    if larger == (function == Fun::Max) {
                        best = value.clone();
                    }
                }
                Ok(best)
            }
            Fun::Gcd | Fun::Lcm => {
                let undefined = Stop::Undefined("a divisor of what is no integer");
                let mut result = x.integer().ok_or(undefined)?.unsigned_abs();
                for value in &values[1..] {
                    let value = value.integer().ok_or(undefined)?.unsigned_abs();
                    if result.is_zero() || value.is_zero() {
                        return Err(Stop::Undefined("a divisor of 0"));
                    }
                    let gcd = (&result).gcd(&value);
                    result = if function == Fun::Gcd { gcd } else { result / gcd * value };
                    self.spend(1 + result.bit_len() as u32 / 64)?;
                }
                bounded(RBig::from(result))
            }
            Fun::Re | Fun::Im | Fun::Conj => {
                let ball = match x {
                    Value::Approx(ball) => *ball,
                    Value::Infinite(_) => return Err(Stop::Undefined("a part of infinity")),
                    Value::Exact(_) if function == Fun::Im => return Ok(Value::int(0)),
                    Value::Exact(_) => return Ok(x.clone()),
                };
                Ok(Value::Approx(match function {
                    Fun::Re => Ball { im: ZERO, ..ball },
                    Fun::Im => Ball { re: ball.im, im: ZERO, ..ball },
                    _ => ball.conj(),
                }))
            }
            Fun::Arg => approx(x.ball()?.arg()),
            Fun::Sign => x.sign().map(|s| Value::int(s.into())).ok_or(Stop::Undefined("no sign")),
            Fun::Factorial => factorial(x, 1, self),
            Fun::DoubleFactorial => factorial(x, 2, self),
            Fun::Binomial => match values {
                [n, k] => binomial(n, k, self),
                _ => Err(Stop::Undefined("a binomial of one number")),
            },
        }
    }
}

/// `n!` (step 1), `n!!` (step 2).
pub(super) fn factorial(n: &Value, step: usize, context: &Context) -> Evaluated {
    let integer = n.integer().ok_or(Stop::Undefined("a factorial of what is no integer"))?;
    if integer.is_negative() {
        return Err(Stop::Undefined("a factorial of a negative number"));
    }
    let n = u32::try_from(&integer).ok().filter(|n| *n <= MAX_FACTORIAL).ok_or(Stop::TooLarge)?;
    context.spend(n / 4)?;
    let mut product = UBig::ONE;
    let mut part = 1u64;
    for factor in (1..=u64::from(n)).rev().step_by(step) {
        // Factors are below 2^12: five of them fit a word.
        part *= factor;
        if part >= 1 << 51 {
            product *= part;
            part = 1;
        }
    }
    bounded(RBig::from(product * part))
}

/// `n (n-1) .. (n-k+1) / k!` for any rational n.
fn binomial(n: &Value, k: &Value, context: &Context) -> Evaluated {
    let undefined = Stop::Undefined("a binomial that is not of rational n and whole k");
    let (n, mut k) = (n.exact().ok_or(undefined)?, k.integer().ok_or(undefined)?);
    if k.is_negative() {
        return Err(undefined);
    }
    if n.is_int() && !n.is_negative() {
        let other = n.numerator() - &k;
        if other.is_negative() {
            return Ok(Value::int(0));
        }
        k = k.min(other);
    }
    let k = u32::try_from(&k).ok().filter(|k| *k <= MAX_CHOICE).ok_or(Stop::TooLarge)?;
    let bits = n.numerator().bit_len().max(n.denominator().bit_len());
    context.spend(k * (1 + bits as u32 / 64))?;
    if bits * k as usize > 64_000 {
        return Err(Stop::TooLarge);
    }
    let mut above = IBig::ONE;
    let mut below = UBig::ONE;
    let (numerator, denominator) = (n.numerator(), n.denominator());
    for i in 0..k {
        above *= numerator - IBig::from(i) * denominator;
        below *= UBig::from(i + 1) * denominator;
    }
    bounded(RBig::from_parts(above, below))
}

fn logarithm(x: &Value, free: bool) -> Evaluated {
    match x.sign() {
        Some(-1) if free => return Err(Stop::Undefined("a logarithm that leaves the reals")),
        Some(0) => return Err(Stop::Undefined("the logarithm of zero")),
        _ => {}
    }
    if x.exact().is_some_and(RBig::is_one) {
        return Ok(Value::int(0));
    }
    let ball = x.ball()?;
    if free && !ball.is_real() {
        return Err(Stop::Undefined("a logarithm that leaves the reals"));
    }
    approx(Some(ball.ln().ok_or(Stop::Undefined("the logarithm of zero"))?))
}

/// The logarithm of base `base`: exact where it is a small integer.
fn of_base(x: &Value, base: &Value, free: bool) -> Evaluated {
    let quotient = logarithm(x, free)?.div(&logarithm(base, free)?)?;
    if let (Some(x), Some(base), Ok(ball)) = (x.exact(), base.exact(), quotient.ball()) {
        let near = ball.re.hi.round();
        if near.abs() < 4096.0
            && let Ok(Value::Exact(power)) =
                Value::Exact(base.clone()).pow(&Value::int(near as i64), true)
            && power == *x
        {
            return Ok(Value::int(near as i64));
        }
    }
    Ok(quotient)
}

/// The largest integer that is not above; undefined where rounding hides which.
fn floor(x: &Value) -> Evaluated {
    if let Value::Exact(n) = x {
        return bounded(RBig::from(n.floor()));
    }
    let ball = x.ball()?;
    let margin = Double::new(2.0 * ball.error);
    let (low, high) = ((ball.re - margin).floor(), (ball.re + margin).floor());
    if !ball.is_real() || low != high {
        return Err(Stop::Undefined("a floor at a jump"));
    }
    let whole = |x: f64| RBig::try_from(x).map_err(|_| Stop::TooLarge);
    bounded(whole(low.hi)? + whole(low.lo)?)
}
