//! The expression tree.

use dashu::integer::IBig;
use dashu::rational::RBig;

/// Mathematics with a value. Sums and products are flat; a difference holds products with -1, a quotient
/// [`Expr::Inverse`].
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Expr {
    Num(RBig),
    /// A digit string with its base: `204_5`.
    Based {
        digits: String,
        base: u32,
    },
    Pi,
    E,
    I,
    Infinity,
    /// A variable or an unknown constant.
    Sym(String),
    /// 1 or -1, the same throughout an answer: `a \pm b` is `a + PlusMinus b`; `\mp` is its negative.
    PlusMinus,
    Sum(Vec<Expr>),
    Product(Vec<Expr>),
    Inverse(Box<Expr>),
    Power(Box<Expr>, Box<Expr>),
    Call(Fun, Vec<Expr>),
    /// A function that is only a name.
    Apply(String, Vec<Expr>),
    /// An operation on what need not be a number: `A^T`, `x^*`, `\hat y`.
    Mark(String, Box<Expr>),
    Degrees(Box<Expr>),
    Percent(Box<Expr>),
}

macro_rules! functions {
    ($($variant:ident $($name:literal)+,)+) => {
        /// The functions with a value, by the names that LaTeX, calculators and programs give them.
        #[derive(Debug, Clone, Copy, PartialEq, Eq)]
        pub(super) enum Fun { $(#[allow(missing_docs)] $variant,)+ }

        impl Fun {
            /// The function of that name.
            pub fn named(name: &str) -> Option<Fun> {
                match name {
                    $($($name)|+ => Some(Fun::$variant),)+
                    _ => None,
                }
            }

            /// Its first name.
            pub fn name(self) -> &'static str {
                match self { $(Fun::$variant => [$($name),+][0],)+ }
            }
        }
    };
}

functions! {
    Sin "sin",
    Cos "cos",
    Tan "tan" "tg",
    Cot "cot" "ctg",
    Sec "sec",
    Csc "csc" "cosec",
    Arcsin "arcsin" "asin",
    Arccos "arccos" "acos",
    Arctan "arctan" "atan",
    Arccot "arccot" "acot",
    Sinh "sinh",
    Cosh "cosh",
    Tanh "tanh",
    Coth "coth",
    Arsinh "arsinh" "arcsinh" "asinh",
    Arcosh "arcosh" "arccosh" "acosh",
    Artanh "artanh" "arctanh" "atanh",
    Ln "ln",
    // `log(x)` of a base that the text does not name, or `log(x, base)`.
    Log "log",
    Log10 "lg",
    Exp "exp",
    Root "cbrt",
    Abs "abs",
    Norm "norm",
    Floor "floor",
    Ceil "ceil",
    Min "min",
    Max "max",
    Gcd "gcd",
    Lcm "lcm",
    Re "Re",
    Im "Im",
    Arg "arg" "Arg",
    Conj "conj",
    Sign "sgn" "sign",
    Factorial "factorial",
    DoubleFactorial "doublefactorial",
    Binomial "binomial",
}

impl Expr {
    pub fn int(n: i64) -> Expr {
        Expr::Num(RBig::from(IBig::from(n)))
    }

    pub fn negative(self) -> Expr {
        match self {
            Expr::Num(n) => Expr::Num(-n),
            Expr::Product(mut factors) => {
                factors.insert(0, Expr::int(-1));
                Expr::Product(factors)
            }
            other => Expr::Product(vec![Expr::int(-1), other]),
        }
    }

    /// `self` times a whole number.
    pub fn scaled(self, times: u64) -> Expr {
        let times = RBig::from(IBig::from(times));
        match self {
            Expr::Num(n) => Expr::Num(n * times),
            other => Expr::Product(vec![Expr::Num(times), other]),
        }
    }

    pub fn minus(self, other: Expr) -> Expr {
        let mut terms = self.terms();
        terms.extend(other.terms().into_iter().map(Expr::negative));
        Expr::Sum(terms)
    }

    /// The terms of a sum, or the one that this is.
    fn terms(self) -> Vec<Expr> {
        match self {
            Expr::Sum(terms) => terms,
            other => vec![other],
        }
    }

    pub fn over(self, other: Expr) -> Expr {
        Expr::Product(vec![self, Expr::Inverse(Box::new(other))])
    }

    /// `self^(1/n)`.
    pub fn root(self, n: Expr) -> Expr {
        Expr::Power(Box::new(self), Box::new(Expr::Inverse(Box::new(n))))
    }

    /// The parts right below; a power has none.
    pub fn children(&self) -> &[Expr] {
        match self {
            Expr::Sum(parts) | Expr::Product(parts) => parts,
            Expr::Call(_, parts) | Expr::Apply(_, parts) => parts,
            Expr::Inverse(part) | Expr::Mark(_, part) => std::slice::from_ref(part),
            Expr::Degrees(part) | Expr::Percent(part) => std::slice::from_ref(part),
            _ => &[],
        }
    }

    /// Whether the predicate holds here or anywhere below.
    pub fn any(&self, holds: &impl Fn(&Expr) -> bool) -> bool {
        holds(self)
            || self.children().iter().any(|part| part.any(holds))
            || matches!(self, Expr::Power(a, b) if a.any(holds) || b.any(holds))
    }

    /// The same with a sign for [`Expr::PlusMinus`].
    pub fn with_sign(&self, sign: i64) -> Expr {
        let list = |parts: &[Expr]| parts.iter().map(|p| p.with_sign(sign)).collect();
        let one = |part: &Expr| Box::new(part.with_sign(sign));
        match self {
            Expr::PlusMinus => Expr::int(sign),
            Expr::Sum(parts) => Expr::Sum(list(parts)),
            Expr::Product(parts) if parts.contains(&Expr::PlusMinus) => {
                let (signs, rest): (Vec<_>, Vec<_>) =
                    parts.iter().partition(|part| **part == Expr::PlusMinus);
                let mut rest: Vec<_> = rest.into_iter().map(|p| p.with_sign(sign)).collect();
                let value = if rest.len() == 1 { rest.remove(0) } else { Expr::Product(rest) };
                if sign < 0 && signs.len() % 2 == 1 { value.negative() } else { value }
            }
            Expr::Product(parts) => Expr::Product(list(parts)),
            Expr::Inverse(part) => Expr::Inverse(one(part)),
            Expr::Power(base, exponent) => Expr::Power(one(base), one(exponent)),
            Expr::Call(function, parts) => Expr::Call(*function, list(parts)),
            Expr::Apply(name, parts) => Expr::Apply(name.clone(), list(parts)),
            Expr::Mark(mark, part) => Expr::Mark(mark.clone(), one(part)),
            Expr::Degrees(part) => Expr::Degrees(one(part)),
            Expr::Percent(part) => Expr::Percent(one(part)),
            other => other.clone(),
        }
    }

    /// A text that is the same for trees that differ only in the order of terms and of factors that commute;
    /// for comparing what cannot be evaluated.
    pub fn shape(&self, commute: bool) -> String {
        let list = |parts: &[Expr], sorted: bool, by: &str| {
            let mut parts: Vec<_> = parts.iter().map(|p| p.shape(commute)).collect();
            if sorted {
                parts.sort_unstable();
            }
            format!("({})", parts.join(by))
        };
        match self {
            Expr::Num(n) => n.to_string(),
            Expr::Based { digits, base } => format!("{digits}_{base}"),
            Expr::Pi => "pi".into(),
            Expr::E => "e".into(),
            Expr::I => "i".into(),
            Expr::Infinity => "infinity".into(),
            Expr::Sym(name) => name.clone(),
            Expr::PlusMinus => "+-".into(),
            Expr::Sum(parts) => list(parts, true, "+"),
            Expr::Product(parts) => list(parts, commute, "*"),
            Expr::Inverse(part) => format!("1/{}", part.shape(commute)),
            Expr::Power(base, exponent) => {
                format!("({}^{})", base.shape(commute), exponent.shape(commute))
            }
            Expr::Call(function, parts) => {
                format!("{}{}", function.name(), list(parts, false, ","))
            }
            Expr::Apply(name, parts) => format!("{name}{}", list(parts, false, ",")),
            Expr::Mark(mark, part) => format!("{mark}[{}]", part.shape(commute)),
            Expr::Degrees(part) => format!("{}deg", part.shape(commute)),
            Expr::Percent(part) => format!("{}%", part.shape(commute)),
        }
    }
}
