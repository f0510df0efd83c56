//! Complex numbers with an account of their error: the true value lies within `error` of `re + i im`.
//!
//! The account is first order with a margin, which is what a comparison needs; it is not a proof.

use super::double::{self, Double, ONE, PI, ZERO};

/// Relative error that an operation on [`Double`]s adds, with a margin: 2^-98.
const UNIT: f64 = 3.2e-30;

/// A complex number and how far the true one may be.
#[derive(Debug, Clone, Copy)]
pub(super) struct Ball {
    pub re: Double,
    pub im: Double,
    pub error: f64,
}

impl Ball {
    /// A value right to its last digits.
    pub fn real(re: Double) -> Ball {
        Ball { re, im: ZERO, error: UNIT * re.hi.abs() }
    }

    pub const I: Ball = Ball { re: ZERO, im: ONE, error: 0.0 };

    pub fn pi() -> Ball {
        Ball::real(PI)
    }

    pub fn e() -> Ball {
        Ball::real(double::E)
    }

    /// `re + i im` with what rounding adds to an inherited error; `None` where it left the range of f64.
    fn rounded(re: Double, im: Double, inherited: f64, scale: f64) -> Option<Ball> {
        let error = inherited + UNIT * scale;
        (re.is_finite() && im.is_finite() && error.is_finite()).then_some(Ball { re, im, error })
    }

    /// The size `|z|`, to f64's digits.
    pub fn size(self) -> f64 {
        self.re.hi.hypot(self.im.hi)
    }

    /// Whether the value may be 0.
    pub fn may_be_zero(self) -> bool {
        self.size() <= self.error
    }

    /// Whether nothing says that it leaves the real line.
    pub fn is_real(self) -> bool {
        self.im.hi.abs() <= self.error
    }

    pub fn neg(self) -> Ball {
        Ball { re: -self.re, im: -self.im, ..self }
    }

    pub fn conj(self) -> Ball {
        Ball { im: -self.im, ..self }
    }

    pub fn add(self, other: Ball) -> Option<Ball> {
        let scale = self.size() + other.size();
        Ball::rounded(self.re + other.re, self.im + other.im, self.error + other.error, scale)
    }

    pub fn sub(self, other: Ball) -> Option<Ball> {
        self.add(other.neg())
    }

    pub fn mul(self, other: Ball) -> Option<Ball> {
        let (a, b) = (self, other);
        let inherited = a.error * b.size() + b.error * a.size() + a.error * b.error;
        if a.im.is_zero() && b.im.is_zero() {
            return Ball::rounded(a.re * b.re, ZERO, inherited, a.size() * b.size());
        }
        let re = a.re * b.re - a.im * b.im;
        let im = a.re * b.im + a.im * b.re;
        Ball::rounded(re, im, inherited, 4.0 * a.size() * b.size())
    }

    /// `None` where the divisor may be 0.
    pub fn div(self, other: Ball) -> Option<Ball> {
        let size = other.size();
        if other.error * 4.0 >= size {
            return None;
        }
        let inverse_size = 1.0 / size;
        let inherited =
            (self.error + self.size() * inverse_size * other.error) * inverse_size * 1.5;
        let scale = 8.0 * self.size() * inverse_size;
        if self.im.is_zero() && other.im.is_zero() {
            return Ball::rounded(self.re / other.re, ZERO, inherited, scale);
        }
        let norm = other.re * other.re + other.im * other.im;
        let re = (self.re * other.re + self.im * other.im) / norm;
        let im = (self.im * other.re - self.re * other.im) / norm;
        Ball::rounded(re, im, inherited, scale)
    }

    /// e^z.
    pub fn exp(self) -> Option<Ball> {
        let length = self.re.exp();
        // Rounding in the reduced argument counts with the argument's size.
        let error = self.error + UNIT * self.size();
        let scale = 8.0 * length.hi;
        if self.im.is_zero() {
            return Ball::rounded(length, ZERO, 2.0 * length.hi * error, scale);
        }
        let (sin, cos) = self.im.sin_cos();
        Ball::rounded(length * cos, length * sin, 2.0 * length.hi * error, scale)
    }

    /// The principal logarithm; `None` at what may be 0.
    pub fn ln(self) -> Option<Ball> {
        let size = self.size();
        if self.error * 4.0 >= size {
            return None;
        }
        let inherited = 1.5 * self.error / size;
        if self.im.is_zero() && !self.re.is_negative() {
            let re = self.re.ln();
            return Ball::rounded(re, ZERO, inherited, 4.0 * (1.0 + re.hi.abs()));
        }
        let norm = self.re * self.re + self.im * self.im;
        let re = norm.ln() * Double::new(0.5);
        Ball::rounded(re, self.im.atan2(self.re), inherited, 8.0 * (1.0 + re.hi.abs()))
    }

    /// The principal root.
    pub fn sqrt(self) -> Option<Ball> {
        if self.may_be_zero() {
            return Some(Ball { re: ZERO, im: ZERO, error: self.error.sqrt() });
        }
        let size = self.size();
        let inherited = self.error / size.sqrt();
        let scale = 4.0 * size.sqrt();
        if self.im.is_zero() {
            let root = self.re.abs().sqrt();
            let (re, im) = if self.re.is_negative() { (ZERO, root) } else { (root, ZERO) };
            return Ball::rounded(re, im, inherited, scale);
        }
        // sqrt z = u + i v with u = sqrt((|z| + |x|) / 2), the other part y / 2u; swapped for x < 0.
        let norm = (self.re * self.re + self.im * self.im).sqrt();
        let half = Double::new(0.5);
        let u = ((norm + self.re.abs()) * half).sqrt();
        let v = self.im * half / u;
        let (re, im) = match (self.re.is_negative(), self.im.is_negative()) {
            (false, _) => (u, v),
            (true, false) => (v, u),
            (true, true) => (-v, -u),
        };
        Ball::rounded(re, im, inherited, 2.0 * scale)
    }

    /// (sin z, cos z).
    pub fn sin_cos(self) -> Option<(Ball, Ball)> {
        let error = self.error + UNIT * self.size();
        if self.im.is_zero() {
            let (sin, cos) = self.re.sin_cos();
            let ball = |x| Ball::rounded(x, ZERO, error, 4.0);
            return Some((ball(sin)?, ball(cos)?));
        }
        // cos z = (e^iz + e^-iz) / 2, sin z = (e^iz - e^-iz) / 2i.
        let turned = Ball::I.mul(self)?;
        let (plus, minus) = (turned.exp()?, turned.neg().exp()?);
        let half = Ball::real(Double::new(0.5));
        let cos = plus.add(minus)?.mul(half)?;
        let sin = plus.sub(minus)?.mul(half)?.mul(Ball::I.neg())?;
        Some((sin, cos))
    }

    /// The angle, in (-pi, pi].
    pub fn arg(self) -> Option<Ball> {
        let ln = self.ln()?;
        Ball::rounded(ln.im, ZERO, ln.error, 1.0)
    }

    /// |z|.
    pub fn abs(self) -> Option<Ball> {
        if self.im.is_zero() {
            return Some(Ball { re: self.re.abs(), ..self });
        }
        let norm = (self.re * self.re + self.im * self.im).sqrt();
        Ball::rounded(norm, ZERO, self.error, 4.0 * norm.hi)
    }
}
