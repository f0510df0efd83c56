//! The value of an expression at a point.
//!
//! Variables get fixed pseudo-random rationals by their name and the point's number, so that both sides of a
//! comparison see the same. A function known by name alone gets a fixed pseudo-random cubic polynomial: an
//! identity between two expressions must hold for it too.

use std::cell::Cell;

use dashu::base::{BitTest, Gcd, Signed, UnsignedAbs};
use dashu::integer::{IBig, UBig};
use dashu::rational::RBig;

use super::ball::Ball;
use super::double::{Double, ZERO};
use super::expr::{Expr, Fun};
use super::value::{Evaluated, Stop, Value, approx, bounded};

/// Steps of one judgement; a step is a node evaluated, or 512 bits of a number.
const MAX_STEPS: u32 = 30_000;
/// Largest n of n!.
const MAX_FACTORIAL: u32 = 2_500;
/// Largest k of a binomial.
const MAX_CHOICE: u32 = 1_000;

/// How many points there are.
pub(super) const POINTS: u32 = 16;

/// The steps that are left to a judgement.
pub(super) struct Steps(Cell<u32>);

impl Steps {
    pub fn new() -> Steps {
        Steps(Cell::new(MAX_STEPS))
    }
}

/// What evaluation needs beside the expression.
pub(super) struct Context<'a> {
    /// Which of the [`POINTS`].
    pub point: u32,
    /// Whether `\log` is of base 10 (else natural).
    pub decimal_log: bool,
    /// Whether letters for complex numbers (z, w) leave the real line.
    pub complex: bool,
    pub steps: &'a Steps,
}

/// A value, and whether a variable had a say in it: then roots and logarithms stay real.
struct Found {
    value: Value,
    free: bool,
}

impl Context<'_> {
    pub fn new(steps: &Steps) -> Context<'_> {
        Context { point: 0, decimal_log: false, complex: false, steps }
    }

    /// The value here.
    pub fn eval(&self, expr: &Expr) -> Evaluated {
        self.find(expr).map(|found| found.value)
    }

    fn spend(&self, steps: u32) -> Evaluated<()> {
        let left = self.steps.0.get().checked_sub(steps).ok_or(Stop::Steps)?;
        self.steps.0.set(left);
        Ok(())
    }

    fn find(&self, expr: &Expr) -> Evaluated<Found> {
        let found = self.find_free(expr)?;
        let bits = match &found.value {
            Value::Exact(n) => n.numerator().bit_len() + n.denominator().bit_len(),
            _ => 0,
        };
        self.spend(1 + bits as u32 / 512)?;
        Ok(found)
    }

    fn find_free(&self, expr: &Expr) -> Evaluated<Found> {
        let constant = |value| Ok(Found { value, free: false });
        match expr {
            Expr::Num(n) => constant(bounded(n.clone())?),
            Expr::Based { digits, base } => {
                let n = IBig::from_str_radix(digits, *base).map_err(|_| Stop::TooLarge)?;
                constant(bounded(RBig::from(n))?)
            }
            Expr::Pi => constant(Value::Approx(Ball::pi())),
            Expr::E => constant(Value::Approx(Ball::e())),
            Expr::I => constant(Value::Approx(Ball::I)),
            Expr::Infinity => constant(Value::Infinite(false)),
            Expr::PlusMinus => Err(Stop::Undefined("a sign that is not chosen")),
            Expr::Sym(name) => Ok(Found { value: self.variable(name), free: true }),
            Expr::Sum(terms) => self.sum(terms),
            Expr::Product(factors) => {
                let mut product = Found { value: Value::int(1), free: false };
                for factor in factors {
                    let factor = self.find(factor)?;
                    product.value = product.value.mul(&factor.value)?;
                    product.free |= factor.free;
                }
                Ok(product)
            }
            Expr::Inverse(inner) => {
                let inner = self.find(inner)?;
                Ok(Found { value: inner.value.inverse()?, ..inner })
            }
            Expr::Power(base, exponent) => self.power(base, exponent),
            Expr::Degrees(inner) => {
                let inner = self.find(inner)?;
                let turn = Value::Approx(Ball::pi()).div(&Value::int(180))?;
                Ok(Found { value: inner.value.mul(&turn)?, ..inner })
            }
            Expr::Percent(inner) => {
                let inner = self.find(inner)?;
                Ok(Found { value: inner.value.div(&Value::int(100))?, ..inner })
            }
            Expr::Call(function, arguments) => {
                let found: Vec<_> =
                    arguments.iter().map(|a| self.find(a)).collect::<Evaluated<_>>()?;
                let free = found.iter().any(|f| f.free);
                let values: Vec<_> = found.into_iter().map(|f| f.value).collect();
                Ok(Found { value: self.call(*function, &values, free)?, free })
            }
            Expr::Apply(name, arguments) => self.apply(name, arguments),
            Expr::Mark(mark, inner) => {
                self.apply(&format!("mark {mark}"), std::slice::from_ref(inner))
            }
        }
    }

    /// Exact terms are added exactly before anything is rounded: `2^{300} + \sqrt 2 - 2^{300}` keeps its root.
    fn sum(&self, terms: &[Expr]) -> Evaluated<Found> {
        let mut exact = Value::int(0);
        let mut rest: Option<Value> = None;
        let mut free = false;
        for term in terms {
            let found = self.find(term)?;
            free |= found.free;
            match (&found.value, &rest) {
                (Value::Exact(_), _) => exact = exact.add(&found.value)?,
                (_, Some(sum)) => rest = Some(sum.add(&found.value)?),
                (_, None) => rest = Some(found.value),
            }
        }
        let value = match rest {
            Some(rest) => exact.add(&rest)?,
            None => exact,
        };
        Ok(Found { value, free })
    }

    fn power(&self, base: &Expr, exponent: &Expr) -> Evaluated<Found> {
        let exponent = self.find(exponent)?;
        if *base == Expr::E && exponent.value.integer().is_none() {
            let value = approx(exponent.value.ball()?.exp())?;
            return Ok(Found { value, ..exponent });
        }
        let base = self.find(base)?;
        let free = base.free || exponent.free;
        Ok(Found { value: base.value.pow(&exponent.value, free)?, free })
    }

    /// The number that stands for a variable here.
    fn variable(&self, name: &str) -> Value {
        let hash = hash(name, self.point);
        let pick = |n: u64| (hash >> 8) % n;
        if self.complex && name.starts_with(['z', 'w', 'c']) {
            let part = |n: u64| Double::new((n % 61) as f64 / 16.0 - 1.9375);
            let ball = Ball { re: part(hash >> 8), im: part(hash >> 24), error: 0.0 };
            return Value::Approx(ball);
        }
        // Which of two parities a variable has at points of integers, so that (-1)^n shows.
        let parity = (u64::from(self.point) / 2 + hash_name(name) % 2) % 2;
        let ratio = |n: u64| Value::Exact(RBig::from_parts(IBig::from(n), UBig::from(64u8)));
        match self.point {
            // Whole numbers.
            0 | 5 | 7 | 10 | 14 => Value::int((2 + 2 * pick(6) + parity) as i64),
            // Between 0 and 1.
            1 | 8 | 12 | 15 => ratio(3 + pick(58)),
            // Between 1 and 4.
            2 | 9 => ratio(67 + pick(180)),
            // Negative.
            3 => ratio(9 + pick(180)).neg(),
            // Of either sign.
            4 | 11 => {
                let size = ratio(5 + pick(130));
                if hash >> 40 & 1 == 1 { size.neg() } else { size }
            }
            // Larger.
            6 => ratio(330 + pick(1500)),
            // Negative whole numbers.
            _ => Value::int(-(1 + pick(9) as i64)),
        }
    }

    /// A function known by name: `\Gamma` and `\zeta` where they have a closed form, else a polynomial.
    fn apply(&self, name: &str, arguments: &[Expr]) -> Evaluated<Found> {
        let mut value = Value::int(i64::from(hash(name, 100) as u8));
        let mut free = false;
        for (i, argument) in arguments.iter().enumerate() {
            let found = self.find(argument)?;
            free |= found.free;
            if arguments.len() == 1
                && let Some(closed) = closed_form(name, &found, self)?
            {
                return Ok(Found { value: closed, free });
            }
            let mut term = Value::int(0);
            for power in 0..3 {
                let hash = hash(name, 101 + 3 * i as u32 + power);
                let (above, below) = (hash >> 8 & 0xffff, (hash >> 24 & 0xff) + 1);
                let ratio = RBig::from_parts(IBig::from(above + 1), UBig::from(below));
                term = term.add(&Value::Exact(ratio))?.mul(&found.value)?;
            }
            value = value.add(&term)?;
        }
        Ok(Found { value, free })
    }

    fn call(&self, function: Fun, values: &[Value], free: bool) -> Evaluated {
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
fn factorial(n: &Value, step: usize, context: &Context) -> Evaluated {
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

/// `\Gamma(n)`, `\Gamma(n + 1/2)`, `\zeta(2)`, `\zeta(4)`; `\Gamma` of a variable only at integers.
fn closed_form(name: &str, argument: &Found, context: &Context) -> Evaluated<Option<Value>> {
    let Some(x) = argument.value.exact() else { return Ok(None) };
    let half = RBig::from_parts(IBig::from(1), UBig::from(2u8));
    match name {
        "Gamma" if x.is_int() => {
            factorial(&argument.value.sub(&Value::int(1))?, 1, context).map(Some)
        }
        "Gamma" if argument.free => Err(Stop::Undefined("Gamma between the integers")),
        "Gamma" if (x - &half).is_int() && !x.is_negative() => {
            // Gamma(n + 1/2) = (2n-1)!! sqrt(pi) / 2^n
            let n = (x - half).numerator().clone();
            let above =
                factorial(&Value::Exact(RBig::from(&n * 2 - 1).max(RBig::ONE)), 2, context)?;
            let below = Value::int(2).pow(&Value::Exact(RBig::from(n)), true)?;
            let root = approx(Ball::pi().sqrt())?;
            above.div(&below)?.mul(&root).map(Some)
        }
        "zeta" => {
            let (power, below) = match x {
                x if *x == RBig::from(2) => (2, 6),
                x if *x == RBig::from(4) => (4, 90),
                _ => return Ok(None),
            };
            let power = Value::Approx(Ball::pi()).pow(&Value::int(power), true)?;
            power.div(&Value::int(below)).map(Some)
        }
        _ => Ok(None),
    }
}

/// FNV-1a of the name.
fn hash_name(name: &str) -> u64 {
    name.bytes().fold(0xcbf2_9ce4_8422_2325, |hash, byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
    })
}

/// Mixed (SplitMix64's finaliser) with a number.
fn hash(name: &str, number: u32) -> u64 {
    let mut z = hash_name(name).wrapping_add(u64::from(number).wrapping_mul(0x9e37_79b9_7f4a_7c15));
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}
