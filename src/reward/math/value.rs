//! Values: rationals as long as they last, then complex balls; and arithmetic on them, within limits.

use dashu::base::{BitTest, Inverse, Signed, UnsignedAbs};
use dashu::integer::{IBig, UBig};
use dashu::rational::RBig;

use super::ball::Ball;
use super::double::Double;

/// Largest integer, in bits: `(150!)^{149}` has 130,000.
const MAX_INTEGER_BITS: usize = 150_000;
/// Largest numerator or denominator of a fraction, in bits: reducing costs their square.
const MAX_FRACTION_BITS: usize = 16_000;

/// Why an expression has no value.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Stop {
    /// Nothing is defined here.
    Undefined(&'static str),
    /// A number too large to hold.
    TooLarge,
    /// The judgement used up its steps.
    Steps,
}

pub(super) type Evaluated<T = Value> = Result<T, Stop>;

/// A number.
#[derive(Debug, Clone)]
pub(super) enum Value {
    Exact(RBig),
    Approx(Ball),
    /// Beyond all reals; true for minus infinity.
    Infinite(bool),
}

const INFINITE: Stop = Stop::Undefined("infinity is no number to compute with");

impl Value {
    pub fn int(n: i64) -> Value {
        Value::Exact(RBig::from(IBig::from(n)))
    }

    /// As a ball; infinity has none.
    pub fn ball(&self) -> Evaluated<Ball> {
        match self {
            Value::Exact(n) => to_double(n).map(Ball::real).ok_or(Stop::TooLarge),
            Value::Approx(ball) => Ok(*ball),
            Value::Infinite(_) => Err(INFINITE),
        }
    }

    /// As an integer, where it is one exactly.
    pub fn integer(&self) -> Option<IBig> {
        match self {
            Value::Exact(n) if n.is_int() => Some(n.numerator().clone()),
            _ => None,
        }
    }

    pub fn exact(&self) -> Option<&RBig> {
        match self {
            Value::Exact(n) => Some(n),
            _ => None,
        }
    }

    /// -1, 0 or 1, where that is certain.
    pub fn sign(&self) -> Option<i32> {
        match self {
            Value::Exact(n) if n.is_zero() => Some(0),
            Value::Exact(n) => Some(if n.is_negative() { -1 } else { 1 }),
            Value::Infinite(negative) => Some(if *negative { -1 } else { 1 }),
            Value::Approx(b) if !b.is_real() || b.may_be_zero() => None,
            Value::Approx(b) => Some(if b.re.is_negative() { -1 } else { 1 }),
        }
    }

    /// Whether this is a real number, as far as one can tell.
    pub fn is_real(&self) -> bool {
        match self {
            Value::Exact(_) => true,
            Value::Approx(ball) => ball.is_real(),
            Value::Infinite(_) => false,
        }
    }

    pub fn neg(&self) -> Value {
        match self {
            Value::Exact(n) => Value::Exact(-n),
            Value::Approx(ball) => Value::Approx(ball.neg()),
            Value::Infinite(negative) => Value::Infinite(!negative),
        }
    }

    pub fn add(&self, other: &Value) -> Evaluated {
        match (self, other) {
            (Value::Exact(a), Value::Exact(b)) => bounded(a + b),
            (Value::Infinite(a), Value::Infinite(b)) if a != b => Err(INFINITE),
            (Value::Infinite(a), _) | (_, Value::Infinite(a)) => Ok(Value::Infinite(*a)),
            _ => approx(self.ball()?.add(other.ball()?)),
        }
    }

    pub fn sub(&self, other: &Value) -> Evaluated {
        self.add(&other.neg())
    }

    pub fn mul(&self, other: &Value) -> Evaluated {
        match (self, other) {
            (Value::Exact(a), Value::Exact(b)) => bounded(a * b),
            (Value::Exact(zero), Value::Approx(_)) | (Value::Approx(_), Value::Exact(zero))
                if zero.is_zero() =>
            {
                Ok(Value::int(0))
            }
            (Value::Infinite(_), _) | (_, Value::Infinite(_)) => {
                match self.sign().zip(other.sign()) {
                    Some((a, b)) if a * b != 0 => Ok(Value::Infinite(a * b < 0)),
                    _ => Err(INFINITE),
                }
            }
            _ => approx(self.ball()?.mul(other.ball()?)),
        }
    }

    pub fn inverse(&self) -> Evaluated {
        match self {
            Value::Exact(n) if n.is_zero() => Err(Stop::Undefined("division by zero")),
            Value::Exact(n) => Ok(Value::Exact(n.clone().inv())),
            Value::Infinite(_) => Ok(Value::int(0)),
            Value::Approx(ball) => {
                let one = Ball::real(Double::new(1.0));
                one.div(*ball).map(Value::Approx).ok_or(Stop::Undefined("division by zero"))
            }
        }
    }

    pub fn div(&self, other: &Value) -> Evaluated {
        self.mul(&other.inverse()?)
    }

    /// `self^exponent`. Odd roots of negative reals are real; a root or power that leaves the reals is the
    /// principal one, and refused where `real` says that the reals are meant.
    pub fn pow(&self, exponent: &Value, real: bool) -> Evaluated {
        if let Value::Exact(power) = exponent {
            if let Value::Exact(base) = self
                && let Some(value) = exact_power(base, power)?
            {
                return Ok(value);
            }
            let denominator = power.denominator();
            let negative = self.is_real() && self.sign() == Some(-1);
            if !power.is_int() && negative && denominator.bit(0) {
                // (-a)^(p/q) = (-1)^p a^(p/q) for odd q.
                let value = self.neg().pow(exponent, real)?;
                let odd = power.numerator().bit(0);
                return Ok(if odd { value.neg() } else { value });
            }
            if *denominator == UBig::from(2u8) && !(real && negative) {
                let root = match self {
                    Value::Exact(n) if n.is_negative() => {
                        let root = to_double(&-n).map(Ball::real).and_then(Ball::sqrt);
                        root.and_then(|root| root.mul(Ball::I))
                    }
                    _ => self.ball()?.sqrt(),
                };
                let times = Value::Exact(RBig::from(power.numerator().clone()));
                return approx(root)?.pow(&times, real);
            }
            if let Some(n) = small(power) {
                return repeated(&self.ball()?, n);
            }
        }
        let base = self.ball()?;
        let leaves = !base.is_real() || base.re.is_negative() && base.size() > base.error;
        if real && leaves {
            return Err(Stop::Undefined("a power that leaves the reals"));
        }
        if base.may_be_zero() {
            return Err(Stop::Undefined("a power of zero"));
        }
        let logarithm = base.ln().ok_or(Stop::Undefined("a power of zero"))?;
        approx(logarithm.mul(exponent.ball()?).and_then(Ball::exp))
    }
}

/// A rational within the limits.
pub(super) fn bounded(n: RBig) -> Evaluated {
    let bits = n.numerator().bit_len().max(n.denominator().bit_len());
    let limit = if n.is_int() { MAX_INTEGER_BITS } else { MAX_FRACTION_BITS };
    if bits > limit { Err(Stop::TooLarge) } else { Ok(Value::Exact(n)) }
}

/// A ball; none means that it left the range of f64.
pub(super) fn approx(ball: Option<Ball>) -> Evaluated {
    ball.map(Value::Approx).ok_or(Stop::TooLarge)
}

/// To 31 digits; `None` beyond the range of f64.
pub(super) fn to_double(n: &RBig) -> Option<Double> {
    let (above, below) = (n.numerator(), n.denominator());
    if above.bit_len() <= 53 && below.bit_len() <= 53 {
        let (a, b) = (above.to_f64().value(), below.to_f64().value());
        return Some(if b == 1.0 { Double::new(a) } else { Double::new(a) / Double::new(b) });
    }
    let hi = n.to_f64().value();
    let rest = n - RBig::try_from(hi).ok()?;
    Some(Double { hi, lo: rest.to_f64().value() })
}

fn small(power: &RBig) -> Option<i32> {
    let n = i32::try_from(power.numerator()).ok()?;
    (power.is_int() && n.abs() <= 1 << 20).then_some(n)
}

/// `ball^n` by squaring.
fn repeated(ball: &Ball, n: i32) -> Evaluated {
    let mut square = *ball;
    let mut product = Ball::real(Double::new(1.0));
    let mut left = n.unsigned_abs();
    while left > 0 {
        if left & 1 == 1 {
            product = product.mul(square).ok_or(Stop::TooLarge)?;
        }
        left >>= 1;
        if left > 0 {
            square = square.mul(square).ok_or(Stop::TooLarge)?;
        }
    }
    let value = Value::Approx(product);
    if n < 0 { value.inverse() } else { Ok(value) }
}

/// `base^power` where that is rational; `None` where it is not.
fn exact_power(base: &RBig, power: &RBig) -> Evaluated<Option<Value>> {
    if base.is_zero() {
        return match power.numerator().sign() {
            _ if power.is_zero() => Err(Stop::Undefined("0^0")),
            dashu::base::Sign::Positive => Ok(Some(Value::int(0))),
            dashu::base::Sign::Negative => Err(Stop::Undefined("division by zero")),
        };
    }
    let Ok(degree) = usize::try_from(power.denominator()) else { return Ok(None) };
    let (above, below) = (base.numerator(), base.denominator());
    let (above, below) = if degree == 1 {
        (above.clone(), below.clone())
    } else {
        if degree > 64 || base.is_negative() && degree % 2 == 0 {
            return Ok(None);
        }
        let (Some(a), Some(b)) =
            (perfect_root(&above.unsigned_abs(), degree), perfect_root(below, degree))
        else {
            return Ok(None);
        };
        let a = IBig::from(a);
        (if base.is_negative() { -a } else { a }, b)
    };
    let root = RBig::from_parts(above, below);
    let one = root.numerator().bit_len().max(root.denominator().bit_len()) == 1;
    let times = match isize::try_from(power.numerator()) {
        Ok(times) => times,
        // Powers of 1 and -1 need no multiplication.
        Err(_) if one => isize::from(power.numerator().bit(0)) + 2,
        Err(_) => return Err(Stop::TooLarge),
    };
    let bits = root.numerator().bit_len().max(root.denominator().bit_len());
    let limit = if root.is_int() { MAX_INTEGER_BITS } else { MAX_FRACTION_BITS };
    if !one && bits.saturating_mul(times.unsigned_abs()) > limit + bits {
        return Err(Stop::TooLarge);
    }
    let times = if one { times % 2 } else { times };
    bounded(root.pow(times)).map(Some)
}

/// The root of degree `n`, where it is an integer.
fn perfect_root(number: &UBig, n: usize) -> Option<UBig> {
    if number.is_one() || number.is_zero() {
        return Some(number.clone());
    }
    if number.bit_len() > MAX_FRACTION_BITS {
        return None;
    }
    let root = number.nth_root(n);
    (root.pow(n) == *number).then_some(root)
}
