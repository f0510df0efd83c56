//! The value of an expression at a point.
//!
//! Variables get fixed pseudo-random rationals by their name and the point's number, so that both sides of a
//! comparison see the same. A function known by name alone gets a fixed pseudo-random cubic polynomial: an
//! identity between two expressions must hold for it too.

mod function;

use std::cell::Cell;

use dashu::base::{BitTest, Signed};
use dashu::integer::{IBig, UBig};
use dashu::rational::RBig;

use super::ball::Ball;
use super::double::Double;
use super::expr::Expr;
use super::value::{Evaluated, Stop, Value, approx, bounded};
use function::factorial;

/// Steps of one judgement; a step is a node evaluated, or 512 bits of a number.
const MAX_STEPS: u32 = 30_000;

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
