//! The form of an answer: a number with its unit, a list, an interval, a matrix, an equation, words.

use super::expr::Expr;
use super::parse;
use super::token::{Reading, Tok, Token, tokens};
use super::units::Unit;

/// Most items of a list, cells of a matrix, sides of a relation.
const MAX_ITEMS: usize = 64;
/// Deepest nesting of sets and tuples.
const MAX_DEPTH: usize = 12;

/// What an answer is.
#[derive(Debug, Clone)]
pub(super) enum Answer {
    Quantity {
        value: Expr,
        unit: Unit,
    },
    /// Brackets around two or more items: a point, a vector, an interval.
    Group {
        open: char,
        close: char,
        items: Vec<Answer>,
    },
    /// `\{..\}`.
    Set(Vec<Answer>),
    /// Items side by side; `a \pm b` is two.
    List(Vec<Answer>),
    Matrix(Vec<Vec<Expr>>),
    /// `3:5`.
    Ratio(Vec<Expr>),
    /// Parts joined by one of `cup`, `cap`, `setminus`.
    Joined {
        by: &'static str,
        parts: Vec<Answer>,
    },
    /// `a = b`, `a < b < c`: one more side than relations.
    Relation {
        sides: Vec<Answer>,
        by: Vec<&'static str>,
    },
    /// A letter of a multiple choice, and what stands behind it.
    Choice {
        letter: char,
        rest: Option<Box<Answer>>,
    },
    /// Lower-case words with one blank between.
    Words(String),
    /// Capital letters in a row: a segment, a sequence of coins.
    Letters(String),
}

pub(super) type Read<T = Answer> = Result<T, String>;

/// Reads the whole of `text`; the error says why it has no form known here.
pub(super) fn read(text: &str, reading: Reading) -> Read {
    let tokens = tokens(text, reading)?;
    if let Some(choice) = choice(text, &tokens) {
        return Ok(choice);
    }
    list(&tokens, 0)
}

/// `(B)`, `\text{B}`, `B)`, `\textbf{(B)}\ 12`.
fn choice(text: &str, tokens: &[Token]) -> Option<Answer> {
    let bracketed = |at: usize| match (tokens.get(at), tokens.get(at + 1), tokens.get(at + 2)) {
        (Some(open), Some(letter), Some(close))
            if open.kind == Tok::Op('(') && close.kind == Tok::Op(')') =>
        {
            letter_of(&letter.kind)
        }
        _ => None,
    };
    let worded = text.trim_start().starts_with("\\text");
    if let Some(letter) = bracketed(0) {
        if letter.is_ascii_lowercase() && !worded {
            return None;
        }
        let rest = match &tokens[3..] {
            [] | [Token { kind: Tok::Op('.'), .. }] => None,
            rest if worded || rest[0].spaced => {
                let another = (3..tokens.len()).any(|at| bracketed(at).is_some());
                if another {
                    return None;
                }
                Some(Box::new(list(rest, 0).ok()?))
            }
            _ => return None,
        };
        return Some(Answer::Choice { letter: letter.to_ascii_uppercase(), rest });
    }
    let letter = letter_of(&tokens.first()?.kind).filter(char::is_ascii_uppercase)?;
    let ends = match &tokens[1..] {
        [] => worded,
        [end] => matches!(end.kind, Tok::Op(')' | '.' | ':')),
        _ => false,
    };
    ends.then_some(Answer::Choice { letter, rest: None })
}

fn letter_of(kind: &Tok) -> Option<char> {
    match kind {
        Tok::Sym(name) if name.len() == 1 => {
            name.chars().next().filter(|c| matches!(c.to_ascii_uppercase(), 'A'..='J'))
        }
        _ => None,
    }
}

/// +1 for what opens a bracket, -1 for what closes one.
fn nesting(kind: &Tok) -> i32 {
    match kind {
        Tok::Op('(' | '[' | '{') => 1,
        Tok::Cmd("{" | "lvert" | "lfloor" | "lceil" | "langle" | "begin") => 1,
        Tok::Op(')' | ']' | '}') => -1,
        Tok::Cmd("}" | "rvert" | "rfloor" | "rceil" | "rangle" | "end") => -1,
        _ => 0,
    }
}

/// The parts between separators outside of brackets, and the separators.
fn split(tokens: &[Token], separates: impl Fn(&Tok) -> bool) -> Read<(Vec<&[Token]>, Vec<&Tok>)> {
    let (mut parts, mut by) = (Vec::new(), Vec::new());
    let (mut depth, mut start) = (0, 0);
    for (at, token) in tokens.iter().enumerate() {
        depth += nesting(&token.kind);
        if depth == 0 && separates(&token.kind) {
            parts.push(&tokens[start..at]);
            by.push(&token.kind);
            start = at + 1;
        }
    }
    parts.push(&tokens[start..]);
    if parts.len() > MAX_ITEMS {
        return Err(format!("more than {MAX_ITEMS} items"));
    }
    Ok((parts, by))
}

/// Items between commas, `;`, "and", "or"; one item is itself.
fn list(tokens: &[Token], depth: usize) -> Read {
    let mut items = items(tokens, depth)?;
    Ok(if items.len() == 1 { items.remove(0) } else { Answer::List(items) })
}

/// The items, `\pm` spread into two.
fn items(tokens: &[Token], depth: usize) -> Read<Vec<Answer>> {
    let (parts, _) = split(tokens, |kind| matches!(kind, Tok::Op(',' | ';')))?;
    let mut items = Vec::new();
    for part in parts.into_iter().filter(|part| !part.is_empty()) {
        match single(part, depth)? {
            Answer::List(signs) => items.extend(signs),
            item => items.push(item),
        }
    }
    if items.is_empty() { Err("nothing between the commas".into()) } else { Ok(items) }
}

fn single(tokens: &[Token], depth: usize) -> Read {
    if depth == MAX_DEPTH {
        return Err(format!("sets nested more than {MAX_DEPTH} deep"));
    }
    let tokens = match tokens {
        [rest @ .., Token { kind: Tok::Op('.'), .. }] => rest,
        all => all,
    };
    if let Some(words) = words(tokens) {
        return Ok(words);
    }
    let relation =
        |kind: &Tok| matches!(kind, Tok::Op('=') | Tok::Cmd("<" | ">" | "<=" | ">=" | "!=" | "in"));
    let (sides, by) = split(tokens, relation)?;
    if sides.len() > 1 {
        let side = |side: &[Token]| defined(side).map_or_else(|| single(side, depth + 1), Ok);
        let sides: Read<Vec<_>> = sides.into_iter().map(side).collect();
        let name = |kind: &Tok| match kind {
            Tok::Cmd(name) => *name,
            _ => "=",
        };
        return Ok(Answer::Relation { sides: sides?, by: by.into_iter().map(name).collect() });
    }
    for by in ["cup", "setminus", "cap"] {
        let (parts, joints) = split(tokens, |kind| *kind == Tok::Cmd(by))?;
        if !joints.is_empty() {
            let parts: Read<Vec<_>> = parts.into_iter().map(|p| single(p, depth + 1)).collect();
            return Ok(Answer::Joined { by, parts: parts? });
        }
    }
    if tokens.iter().any(|t| t.kind == Tok::Cmd("begin")) {
        return matrix(tokens);
    }
    if let Some(group) = group(tokens, depth) {
        return group;
    }
    let (parts, colons) = split(tokens, |kind| *kind == Tok::Op(':'))?;
    if !colons.is_empty() {
        let parts: Read<Vec<_>> = parts.into_iter().map(parse::expression).collect();
        return Ok(Answer::Ratio(parts?));
    }
    quantity(tokens)
}

/// `P(x)`, `u(x, t)` as the side of an equation: the function, though elsewhere it would be a product.
fn defined(tokens: &[Token]) -> Option<Answer> {
    let [Token { kind: Tok::Sym(name), .. }, open, inside @ .., close] = tokens else {
        return None;
    };
    if open.kind != Tok::Op('(') || close.kind != Tok::Op(')') {
        return None;
    }
    let arguments: Option<Vec<_>> = inside
        .chunks(2)
        .map(|pair| match pair {
            [Token { kind: Tok::Sym(name), .. }] => Some(Expr::Sym(name.clone())),
            [Token { kind: Tok::Sym(name), .. }, comma] if comma.kind == Tok::Op(',') => {
                Some(Expr::Sym(name.clone()))
            }
            _ => None,
        })
        .collect();
    let value = Expr::Apply(name.clone(), arguments.filter(|a| !a.is_empty())?);
    Some(Answer::Quantity { value, unit: Unit::parse(&[]).ok()? })
}

/// Brackets around the whole.
fn group(tokens: &[Token], depth: usize) -> Option<Read> {
    let (first, last) = (&tokens.first()?.kind, &tokens.last()?.kind);
    let open = match (first, last) {
        (Tok::Cmd("emptyset"), _) if tokens.len() == 1 => return Some(Ok(Answer::Set(Vec::new()))),
        (Tok::Cmd("{"), Tok::Cmd("}")) => '{',
        (Tok::Cmd("langle"), Tok::Cmd("rangle")) => '<',
        (Tok::Op(open @ ('(' | '[')), Tok::Op(')' | ']')) => *open,
        _ => return None,
    };
    let mut nested = 0;
    let whole = tokens.iter().rposition(|t| {
        nested += nesting(&t.kind);
        nested == 0
    });
    if whole != Some(0) {
        return None;
    }
    let inside = &tokens[1..tokens.len() - 1];
    let close = match last {
        Tok::Op(close) => *close,
        _ => ')',
    };
    Some(match open {
        '{' if inside.is_empty() => Ok(Answer::Set(Vec::new())),
        '{' => items(inside, depth + 1).map(Answer::Set),
        _ => {
            let parts = split(inside, |kind| matches!(kind, Tok::Op(',' | ';')));
            match parts {
                Err(problem) => Err(problem),
                Ok((parts, _)) if parts.len() == 1 && open == '(' && close == ')' => {
                    single(inside, depth + 1)
                }
                Ok((parts, _)) if parts.len() == 1 && open != '<' => return None,
                Ok((parts, _)) => {
                    let items: Read<Vec<_>> =
                        parts.into_iter().map(|part| single(part, depth + 1)).collect();
                    let open = if open == '<' { '(' } else { open };
                    items.map(|items| Answer::Group { open, close, items })
                }
            }
        }
    })
}

/// `\begin{pmatrix} a & b \\ c & d \end{pmatrix}`, a factor before it.
fn matrix(tokens: &[Token]) -> Read {
    let begin = tokens.iter().position(|t| t.kind == Tok::Cmd("begin")).unwrap_or(0);
    let [inside @ .., Token { kind: Tok::Cmd("end"), .. }] = &tokens[begin + 1..] else {
        return Err("a matrix with something behind it".into());
    };
    let factor = match &tokens[..begin] {
        [] | [Token { kind: Tok::Op('(' | '['), .. }] => None,
        before => Some(parse::expression(before)?),
    };
    let (rows, _) = split(inside, |kind| *kind == Tok::Cmd("\\\\"))?;
    let mut cells = 0;
    let mut matrix: Vec<Vec<Expr>> = Vec::new();
    for row in rows.into_iter().filter(|row| !row.is_empty()) {
        let (row, _) = split(row, |kind| *kind == Tok::Op('&'))?;
        cells += row.len();
        if cells > MAX_ITEMS {
            return Err(format!("more than {MAX_ITEMS} cells"));
        }
        let row: Read<Vec<_>> = row
            .into_iter()
            .map(|cell| {
                let cell = parse::expression(cell)?;
                Ok(match &factor {
                    Some(factor) => Expr::Product(vec![factor.clone(), cell]),
                    None => cell,
                })
            })
            .collect();
        matrix.push(row?);
    }
    let width = matrix.first().map_or(0, Vec::len);
    if width == 0 || matrix.iter().any(|row| row.len() != width) {
        return Err("a matrix whose rows differ in length".into());
    }
    Ok(Answer::Matrix(matrix))
}

/// An expression with a currency sign before it or a unit behind it; two where it holds `\pm`.
fn quantity(tokens: &[Token]) -> Read {
    let mut currency = None;
    let mut rest: Vec<Token> = tokens.to_vec();
    let sign = rest.iter().position(|t| matches!(t.kind, Tok::Cmd("$" | "€" | "£")));
    if let Some(at) = sign {
        let signs_before = rest[..at].iter().all(|t| t.kind == Tok::Op('-'));
        if let Tok::Cmd(name) = rest[at].kind
            && (signs_before || at + 1 == rest.len())
        {
            currency = Some(Unit::currency(name));
            rest.remove(at);
        }
    }
    let words = rest.iter().position(|t| matches!(t.kind, Tok::Text(_))).filter(|at| *at > 0);
    let (value, unit) = rest.split_at(words.unwrap_or(rest.len()));
    let value = parse::expression(value)?;
    let unit = Unit::parse(unit)?;
    let unit = match currency {
        Some(currency) if unit.is_label() => currency,
        _ => unit,
    };
    let item = |value| Answer::Quantity { value, unit: unit.clone() };
    if !value.any(&|e| *e == Expr::PlusMinus) {
        return Ok(item(value));
    }
    Ok(Answer::List(vec![item(value.with_sign(1)), item(value.with_sign(-1))]))
}

/// Words alone, or capital letters or a Roman numeral in a row.
fn words(tokens: &[Token]) -> Option<Answer> {
    let mut text = String::new();
    let mut worded = false;
    for token in tokens {
        if token.spaced && !text.is_empty() {
            text.push(' ');
        }
        match &token.kind {
            Tok::Text(words) => {
                if worded && !text.ends_with(' ') {
                    text.push(' ');
                }
                worded = true;
                text.push_str(words);
            }
            Tok::Sym(letter) if letter.len() == 1 => text.push_str(letter),
            Tok::Op('-' | '\'') if !text.is_empty() => text.push('-'),
            _ => return None,
        }
    }
    let text = text.trim_end_matches('-');
    if worded {
        let lower = text.to_lowercase();
        let words: Vec<_> = lower
            .split(|c: char| c.is_whitespace() || c == '~' || c == '-')
            .filter(|word| !matches!(*word, "" | "the" | "a" | "an" | "is"))
            .collect();
        let words = words.join(" ");
        return Some(match number_word(&words) {
            Some(n) => Answer::Quantity { value: Expr::int(n), unit: Unit::parse(&[]).ok()? },
            None => Answer::Words(words),
        });
    }
    let capitals = text.bytes().all(|b| b.is_ascii_uppercase());
    let roman =
        text.bytes().all(|b| matches!(b, b'i' | b'v' | b'x')) && text.starts_with(['i', 'v']);
    let roman = roman && matches!(text, "ii" | "iii" | "iv" | "vi" | "vii" | "viii" | "ix");
    (text.len() > 1 && (capitals || roman)).then(|| Answer::Letters(text.into()))
}

fn number_word(word: &str) -> Option<i64> {
    const WORDS: [&str; 21] = [
        "zero",
        "one",
        "two",
        "three",
        "four",
        "five",
        "six",
        "seven",
        "eight",
        "nine",
        "ten",
        "eleven",
        "twelve",
        "thirteen",
        "fourteen",
        "fifteen",
        "sixteen",
        "seventeen",
        "eighteen",
        "nineteen",
        "twenty",
    ];
    WORDS.iter().position(|w| *w == word).map(|n| n as i64)
}
