//! Real numbers of some 31 digits: the unevaluated sum of two `f64`, `hi + lo` with `|lo| <= ulp(hi) / 2`.
//!
//! The error-free sums and products are Dekker's and Knuth's; T. J. Dekker, "A floating-point technique for
//! extending the available precision", 1971. Every operation here is right to about 2^-100 of its result;
//! [`Ball`](super::ball::Ball) keeps the account.

use std::ops::{Add, Div, Mul, Neg, Sub};

/// `hi + lo`.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Double {
    pub hi: f64,
    pub lo: f64,
}

pub(super) const ZERO: Double = Double::new(0.0);
pub(super) const ONE: Double = Double::new(1.0);
pub(super) const PI: Double = Double { hi: std::f64::consts::PI, lo: 1.224_646_799_147_353_2e-16 };
pub(super) const E: Double = Double { hi: std::f64::consts::E, lo: 1.445_646_891_729_250_2e-16 };
const LN_2: Double = Double { hi: std::f64::consts::LN_2, lo: 2.319_046_813_846_299_6e-17 };
const HALF_PI: Double = Double { hi: std::f64::consts::FRAC_PI_2, lo: 6.123_233_995_736_766e-17 };

/// `a + b` exactly, where `|a| >= |b|`.
fn quick_sum(a: f64, b: f64) -> Double {
    let hi = a + b;
    Double { hi, lo: b - (hi - a) }
}

/// `a + b` exactly.
fn exact_sum(a: f64, b: f64) -> Double {
    let hi = a + b;
    let part = hi - a;
    Double { hi, lo: (a - (hi - part)) + (b - part) }
}

/// `a * b` exactly.
fn exact_product(a: f64, b: f64) -> Double {
    let hi = a * b;
    Double { hi, lo: a.mul_add(b, -hi) }
}

impl Double {
    pub const fn new(x: f64) -> Double {
        Double { hi: x, lo: 0.0 }
    }

    pub fn is_finite(self) -> bool {
        self.hi.is_finite() && self.lo.is_finite()
    }

    pub fn is_zero(self) -> bool {
        self.hi == 0.0
    }

    pub fn is_negative(self) -> bool {
        self.hi < 0.0
    }

    pub fn abs(self) -> Double {
        if self.is_negative() { -self } else { self }
    }

    pub fn floor(self) -> Double {
        let hi = self.hi.floor();
        let lo = if hi == self.hi { self.lo.floor() } else { 0.0 };
        quick_sum(hi, lo)
    }

    /// `self * 2^n`; the steps keep the factor itself finite.
    fn scaled(self, n: i32) -> Double {
        let (half, rest) = (n / 2, n - n / 2);
        let times = |x: f64| x * 2f64.powi(half) * 2f64.powi(rest);
        Double { hi: times(self.hi), lo: times(self.lo) }
    }

    /// For `self >= 0`.
    pub fn sqrt(self) -> Double {
        if self.hi <= 0.0 {
            return ZERO;
        }
        // One Newton step from the root in f64 doubles its digits.
        let root = self.hi.sqrt();
        let rest = self - exact_product(root, root);
        quick_sum(root, rest.hi / (2.0 * root))
    }

    /// e^self, by (e^r)^256 2^k with `self = 256 r + k ln 2`.
    pub fn exp(self) -> Double {
        if self.hi > 709.0 {
            return Double::new(f64::INFINITY);
        }
        if self.hi < -700.0 {
            return ZERO;
        }
        let k = (self.hi / LN_2.hi).round();
        let r = (self - LN_2 * Double::new(k)).scaled(-8);
        // e^r - 1: |r| < 0.0014, so that term 11 is below 1e-40. Squared as (1 + s)^2 - 1 = 2 s + s^2.
        let (mut s, mut term) = (ZERO, ONE);
        for n in 1..=11 {
            term = term * r / Double::new(f64::from(n));
            s = s + term;
        }
        for _ in 0..8 {
            s = s.scaled(1) + s * s;
        }
        (ONE + s).scaled(k as i32)
    }

    /// For `self > 0`: two Newton steps on e^y = self.
    pub fn ln(self) -> Double {
        let mut y = Double::new(self.hi.ln());
        for _ in 0..2 {
            y = y + self * (-y).exp() - ONE;
        }
        y
    }

    /// (sin, cos), by Taylor's series of the angle left after multiples of pi/2, an eighth of it.
    pub fn sin_cos(self) -> (Double, Double) {
        let k = (self.hi / HALF_PI.hi).round();
        let r = (self - HALF_PI * Double::new(k)).scaled(-3);
        let square = r * r;
        // |r| < 0.1: term 19 is below 1e-36.
        let (mut sin, mut versed, mut term) = (r, ZERO, r);
        let mut even = ONE;
        for n in 1..=9 {
            let n = f64::from(n);
            even = -even * square / Double::new((2.0 * n - 1.0) * 2.0 * n);
            term = -term * square / Double::new(2.0 * n * (2.0 * n + 1.0));
            versed = versed - even;
            sin = sin + term;
        }
        // Doubling with 1 - cos, which keeps its digits near 0.
        for _ in 0..3 {
            let cos = ONE - versed;
            versed = (sin * sin).scaled(1);
            sin = (sin * cos).scaled(1);
        }
        let cos = ONE - versed;
        match (k.rem_euclid(4.0)) as u8 {
            0 => (sin, cos),
            1 => (cos, -sin),
            2 => (-sin, -cos),
            _ => (-cos, sin),
        }
    }

    /// The angle of the point `(x, self)`, in (-pi, pi]: one Newton step on the unit circle from f64's.
    pub fn atan2(self, x: Double) -> Double {
        if self.is_zero() {
            return if x.is_negative() { PI } else { ZERO };
        }
        let r = (x * x + self * self).sqrt();
        let start = Double::new(self.hi.atan2(x.hi));
        let (sin, cos) = start.sin_cos();
        // sin(angle - start) = sin(angle) cos(start) - cos(angle) sin(start), tiny.
        start + (self * cos - x * sin) / r
    }
}

impl Neg for Double {
    type Output = Double;
    fn neg(self) -> Double {
        Double { hi: -self.hi, lo: -self.lo }
    }
}

impl Add for Double {
    type Output = Double;
    fn add(self, other: Double) -> Double {
        let high = exact_sum(self.hi, other.hi);
        let low = exact_sum(self.lo, other.lo);
        let first = quick_sum(high.hi, high.lo + low.hi);
        quick_sum(first.hi, first.lo + low.lo)
    }
}

impl Sub for Double {
    type Output = Double;
    fn sub(self, other: Double) -> Double {
        self + -other
    }
}

impl Mul for Double {
    type Output = Double;
    fn mul(self, other: Double) -> Double {
        let product = exact_product(self.hi, other.hi);
        quick_sum(product.hi, product.lo + (self.hi * other.lo + self.lo * other.hi))
    }
}

impl Div for Double {
    type Output = Double;
    fn div(self, other: Double) -> Double {
        let first = self.hi / other.hi;
        let rest = self - other * Double::new(first);
        let second = rest.hi / other.hi;
        let rest = rest - other * Double::new(second);
        quick_sum(first, second) + Double::new(rest.hi / other.hi)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Within `digits` digits, relative to 1 or the value.
    fn close(a: Double, b: Double) {
        let scale = 1.0f64.max(b.hi.abs());
        assert!((a - b).hi.abs() < 1e-29 * scale, "{a:?} {b:?}");
    }

    #[test]
    fn functions_invert_each_other() {
        for x in [1e-9, 0.1, 0.7, 1.0, 2.5, 3.75, 17.0, 40.5] {
            let x = Double::new(x) / Double::new(3.0);
            close(x.exp().ln(), x);
            close(x.ln().exp(), x);
            close(x.sqrt() * x.sqrt(), x);
            close(x / Double::new(7.0) * Double::new(7.0), x);
            let (sin, cos) = x.sin_cos();
            close(sin * sin + cos * cos, ONE);
            let (sin2, cos2) = x.scaled(1).sin_cos();
            close(sin2, (sin * cos).scaled(1));
            close(cos2, ONE - (sin * sin).scaled(1));
            close((-x).exp() * x.exp(), ONE);
        }
    }

    #[test]
    fn known_values() {
        close(ONE.exp(), E);
        close(Double::new(2.0).ln(), LN_2);
        close(ONE.atan2(ONE).scaled(2), PI);
        close(ONE.atan2(ZERO).scaled(1), PI);
        close((-ONE).atan2(-ONE), -PI.scaled(-2) * Double::new(3.0));
        close(ZERO.atan2(-ONE), PI);
        let (sin, cos) = PI.sin_cos();
        close(sin, ZERO);
        close(cos, -ONE);
        // sqrt 2 = 1.41421356237309504880168872420969807..
        let root = Double::new(2.0).sqrt();
        assert_eq!(root.hi, std::f64::consts::SQRT_2);
        assert!((root.lo + 9.667_293_313_452_913e-17).abs() < 1e-30, "{}", root.lo);
    }

    #[test]
    fn floors() {
        for (x, floor) in [(2.5, 2.0), (-2.5, -3.0), (4.0, 4.0), (-4.0, -4.0)] {
            assert_eq!(Double::new(x).floor(), Double::new(floor));
        }
        let below = Double::new(4.0) - Double::new(1e-25);
        assert_eq!(below.floor(), Double::new(3.0));
    }
}
