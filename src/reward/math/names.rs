//! What words, commands and characters mean.

use super::expr::Fun;
use super::token::Tok;

/// What a LaTeX command stands for.
pub(super) enum Meaning {
    Token(Tok),
    /// Typography.
    Blank,
}

fn sym(name: &str) -> Tok {
    Tok::Sym(name.into())
}

/// Names of Greek letters, and of other letters that have a command and no value.
const LETTERS: &[&str] = &[
    "alpha", "beta", "gamma", "delta", "epsilon", "zeta", "eta", "theta", "iota", "kappa",
    "lambda", "mu", "nu", "xi", "omicron", "pi", "rho", "sigma", "tau", "upsilon", "phi", "chi",
    "psi", "omega", "Gamma", "Delta", "Theta", "Lambda", "Xi", "Pi", "Sigma", "Upsilon", "Phi",
    "Psi", "Omega", "ell", "hbar", "aleph", "nabla", "partial", "wp", "infty", "triangle", "angle",
    "top", "dagger", "perp", "prime", "star", "imath", "jmath", "square",
];

/// A word of plain text (or in `\text{..}`) that is mathematics.
pub(super) fn word(run: &str) -> Option<Tok> {
    Some(match run {
        "and" | "or" | "And" | "Or" | "AND" | "OR" => Tok::Op(','),
        "inf" | "infinity" | "Infinity" | "oo" | "Inf" => sym("infty"),
        "union" => Tok::Cmd("cup"),
        "sqrt" => Tok::Cmd("sqrt"),
        "frac" => Tok::Cmd("frac"),
        "Pi" | "PI" => sym("pi"),
        "degrees" | "degree" | "deg" => Tok::Op('\u{b0}'),
        "percent" => Tok::Op('%'),
        "dollars" | "dollar" | "USD" => Tok::Text("dollar".into()),
        _ => match Fun::named(run) {
            Some(function) => Tok::Fun(function),
            // Of letters with short names only those that are no product of two others.
            None if LETTERS.contains(&run)
                && !matches!(run, "nu" | "mu" | "xi" | "Xi" | "top" | "star" | "square") =>
            {
                sym(run)
            }
            None => return None,
        },
    })
}

/// Words of less than four letters that are no product.
pub(super) fn is_short_word(run: &str) -> bool {
    matches!(
        run.to_ascii_lowercase().as_str(),
        "yes"
            | "no"
            | "odd"
            | "one"
            | "two"
            | "six"
            | "ten"
            | "the"
            | "if"
            | "is"
            | "all"
            | "any"
            | "not"
            | "for"
            | "red"
            | "dne"
            | "per"
            | "sq"
    )
}

/// The meaning of `\name`.
pub(super) fn command(name: &str) -> Option<Meaning> {
    let token = match name {
        "frac" | "dfrac" | "tfrac" | "cfrac" => Tok::Cmd("frac"),
        "binom" | "dbinom" | "tbinom" => Tok::Cmd("binom"),
        "choose" => Tok::Cmd("choose"),
        "sqrt" => Tok::Cmd("sqrt"),
        "cdot" | "times" | "ast" | "bullet" => Tok::Op('*'),
        "div" => Tok::Op('/'),
        "pm" => Tok::Cmd("pm"),
        "mp" => Tok::Cmd("mp"),
        "cup" | "bigcup" => Tok::Cmd("cup"),
        "cap" | "bigcap" => Tok::Cmd("cap"),
        "setminus" | "backslash" | "smallsetminus" => Tok::Cmd("setminus"),
        "emptyset" | "varnothing" => Tok::Cmd("emptyset"),
        "le" | "leq" | "leqslant" | "leqq" => Tok::Cmd("<="),
        "ge" | "geq" | "geqslant" | "geqq" => Tok::Cmd(">="),
        "lt" => Tok::Cmd("<"),
        "gt" => Tok::Cmd(">"),
        "ne" | "neq" => Tok::Cmd("!="),
        "in" => Tok::Cmd("in"),
        "mid" => Tok::Cmd("mid"),
        "approx" | "simeq" | "doteq" | "thickapprox" => Tok::Cmd("approx"),
        "cr" | "newline" | "tabularnewline" => Tok::Cmd("\\\\"),
        "lor" | "vee" => Tok::Op(','),
        "lfloor" => Tok::Cmd("lfloor"),
        "rfloor" => Tok::Cmd("rfloor"),
        "lceil" => Tok::Cmd("lceil"),
        "rceil" => Tok::Cmd("rceil"),
        "lvert" => Tok::Cmd("lvert"),
        "rvert" => Tok::Cmd("rvert"),
        "vert" => Tok::Op('|'),
        "Vert" | "lVert" | "rVert" => Tok::Cmd("norm"),
        "langle" => Tok::Cmd("langle"),
        "rangle" => Tok::Cmd("rangle"),
        "lbrace" => Tok::Cmd("{"),
        "rbrace" => Tok::Cmd("}"),
        "lbrack" => Tok::Op('['),
        "rbrack" => Tok::Op(']'),
        "circ" | "degree" => Tok::Op('\u{b0}'),
        "overline" | "bar" => Tok::Cmd("bar"),
        "hat" | "widehat" => Tok::Cmd("hat"),
        "tilde" | "widetilde" => Tok::Cmd("tilde"),
        "dot" => Tok::Cmd("dot"),
        "infin" => sym("infty"),
        "varepsilon" => sym("epsilon"),
        "varphi" => sym("phi"),
        "vartheta" => sym("theta"),
        "varrho" => sym("rho"),
        "mod" | "bmod" => Tok::Cmd("mod"),
        "displaystyle" | "textstyle" | "scriptstyle" | "limits" | "nolimits" | "quad" | "qquad"
        | "big" | "Big" | "bigl" | "bigr" | "Bigl" | "Bigr" | "bigg" | "Bigg" | "biggl"
        | "biggr" | "Biggl" | "Biggr" | "middle" | "mathbf" | "boldsymbol" | "bm" | "bf"
        | "vec" | "mathsf" | "mathop" | "thinspace" | "medspace" | "negthinspace" | "hspace"
        | "it" | "boxed" | "fbox" | "hline" | "mathord" | "overrightarrow" => {
            return Some(Meaning::Blank);
        }
        _ => match Fun::named(name) {
            Some(function) => Tok::Fun(function),
            None if LETTERS.contains(&name) => sym(name),
            None => return None,
        },
    };
    Some(Meaning::Token(token))
}

/// Environments that hold a matrix.
pub(super) fn is_matrix(environment: &str) -> bool {
    matches!(environment, "matrix" | "pmatrix" | "bmatrix" | "Bmatrix" | "smallmatrix" | "array")
}

/// The LaTeX (or ASCII) spelling of a character.
pub(super) fn unicode(c: char) -> Option<&'static str> {
    Some(match c {
        '\u{2212}' | '\u{2013}' | '\u{2014}' | '\u{2010}' | '\u{2011}' | '\u{ff0d}' => "-",
        '\u{ff0b}' => "+",
        '×' | '⋅' | '·' | '∙' | '•' | '∗' => "*",
        '÷' | '∕' | '⁄' => "/",
        '°' | 'º' => "\\degree ",
        'π' | '𝜋' => "\\pi ",
        '∞' => "\\infty ",
        '√' => "\\sqrt ",
        '≤' | '⩽' | '≦' => "\\le ",
        '≥' | '⩾' | '≧' => "\\ge ",
        '≈' | '≃' | '≅' => "\\approx ",
        '≠' => "\\ne ",
        '±' => "\\pm ",
        '∓' => "\\mp ",
        '∪' => "\\cup ",
        '∩' => "\\cap ",
        '∈' => "\\in ",
        '∖' => "\\setminus ",
        '∅' | 'Ø' | '⌀' => "\\emptyset ",
        'ℝ' => "\\mathbb{R}",
        'ℤ' => "\\mathbb{Z}",
        'ℚ' => "\\mathbb{Q}",
        'ℕ' => "\\mathbb{N}",
        'ℂ' => "\\mathbb{C}",
        '⁰' => "^0",
        '¹' => "^1",
        '²' => "^2",
        '³' => "^3",
        '⁴' => "^4",
        '⁵' => "^5",
        '⁶' => "^6",
        '⁷' => "^7",
        '⁸' => "^8",
        '⁹' => "^9",
        '₀' => "_0",
        '₁' => "_1",
        '₂' => "_2",
        '₃' => "_3",
        '₄' => "_4",
        '₅' => "_5",
        '₆' => "_6",
        '₇' => "_7",
        '₈' => "_8",
        '₉' => "_9",
        '½' => "\\frac{1}{2}",
        '⅓' => "\\frac{1}{3}",
        '⅔' => "\\frac{2}{3}",
        '¼' => "\\frac{1}{4}",
        '¾' => "\\frac{3}{4}",
        '′' | '\u{2019}' | '\u{2018}' => "'",
        '⟨' | '〈' => "\\langle ",
        '⟩' | '〉' => "\\rangle ",
        '⌊' => "\\lfloor ",
        '⌋' => "\\rfloor ",
        '⌈' => "\\lceil ",
        '⌉' => "\\rceil ",
        '（' => "(",
        '）' => ")",
        '，' | '、' => ",",
        '％' => "%",
        '＝' => "=",
        '＜' => "<",
        '＞' => ">",
        'α' => "\\alpha ",
        'β' => "\\beta ",
        'γ' => "\\gamma ",
        'δ' => "\\delta ",
        'ε' => "\\epsilon ",
        'θ' => "\\theta ",
        'λ' => "\\lambda ",
        'μ' => "\\mu ",
        'ξ' => "\\xi ",
        'ρ' => "\\rho ",
        'σ' => "\\sigma ",
        'τ' => "\\tau ",
        'φ' | 'ϕ' => "\\phi ",
        'χ' => "\\chi ",
        'ψ' => "\\psi ",
        'ω' => "\\omega ",
        'Γ' => "\\Gamma ",
        'Δ' => "\\Delta ",
        'Σ' => "\\Sigma ",
        'Ω' => "\\Omega ",
        _ => return None,
    })
}
