//! The form of an answer: a number with its unit, a list, an interval, a matrix, an equation, words.

mod choice;
mod matrix;
mod time;
mod words;

use super::expr::Expr;
use super::parse;
use super::token::{Reading, Tok, Token, Units, canonical, tokens};
use super::units::{self, Unit};
use choice::choice;
use matrix::{matrix, untransposed};
pub(super) use time::Time;
use words::words;

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
    /// `12:30`, `3 p.m.`
    Time(Time),
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

impl Answer {
    /// Which letters behind a number may be a unit in an answer to this gold one: all where it has a unit itself, few
    /// where it has letters of its own.
    pub fn answered_in(&self) -> Units {
        match self {
            Answer::Quantity { unit, .. } if !unit.is_label() => Units::Any,
            Answer::Quantity { value, .. } if value.any(&|e| matches!(e, Expr::Sym(_))) => {
                Units::Sure
            }
            Answer::Quantity { .. } => Units::Letter,
            Answer::Relation { sides, .. } => {
                sides.last().map_or(Units::Spaced, Answer::answered_in)
            }
            _ => Units::Spaced,
        }
    }
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
    if let Some(time) = Time::read(tokens) {
        return Ok(Answer::Time(time));
    }
    if let Some(words) = words(tokens) {
        return Ok(words);
    }
    let relation = |kind: &Tok| {
        matches!(kind, Tok::Op('='))
            || matches!(kind, Tok::Cmd("<" | ">" | "<=" | ">=" | "!=" | "in" | "approx"))
    };
    let (mut sides, mut by) = split(tokens, relation)?;
    // A relation at the front says nothing of its own: "= 5".
    if sides.len() > 1 && sides[0].is_empty() && matches!(by[0], Tok::Op('=') | Tok::Cmd("approx"))
    {
        sides.remove(0);
        by.remove(0);
        if sides.len() == 1 {
            return single(sides[0], depth + 1);
        }
    }
    if sides.len() > 1 {
        let named = matches!(by[0], Tok::Op('=') | Tok::Cmd("approx"));
        let side = |(at, side): (usize, &[Token])| match single(side, depth + 1) {
            _ if defined(side).is_some() => defined(side).ok_or_else(String::new),
            // What the left side calls the value need not be mathematics: `P(X = 2) = ..`.
            Err(_) if at == 0 && named && !side.is_empty() => Ok(Answer::Words(canonical(side))),
            read => read,
        };
        let sides: Read<Vec<_>> = sides.into_iter().enumerate().map(side).collect();
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
    // A column written as a row.
    if let Some(row) = untransposed(tokens)
        && let Some(Ok(row @ Answer::Group { .. })) = group(row, depth)
    {
        return Ok(row);
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

/// The condition of `\{x \mid x > 3\}` or `\{x \in \mathbb{R} : x > 3\}`, which is the set.
fn builder(inside: &[Token]) -> Option<&[Token]> {
    let bar = |t: &Token| matches!(t.kind, Tok::Cmd("mid") | Tok::Op(':' | '|'));
    let at = inside.iter().position(bar)?;
    let real =
        |set: &[Token]| matches!(set, [Token { kind: Tok::Sym(name), .. }] if name == "mathbb R");
    let named = match &inside[..at] {
        [Token { kind: Tok::Sym(_), .. }] => true,
        [Token { kind: Tok::Sym(_), .. }, is, set @ ..] => is.kind == Tok::Cmd("in") && real(set),
        _ => false,
    };
    let relation = |t: &Token| matches!(t.kind, Tok::Cmd("<" | ">" | "<=" | ">=" | "!="));
    let condition = &inside[at + 1..];
    let mentioned = condition.iter().any(|token| token.kind == inside[0].kind);
    (named && condition.iter().any(relation) && mentioned).then_some(condition)
}

/// Whether a comma stands in the outer braces: `{1, 2}`, a set without backslashes.
fn listed(tokens: &[Token]) -> bool {
    let inside = &tokens[1..tokens.len() - 1];
    split(inside, |kind| *kind == Tok::Op(',')).is_ok_and(|(parts, _)| parts.len() > 1)
}

/// Brackets around the whole.
fn group(tokens: &[Token], depth: usize) -> Option<Read> {
    let (first, last) = (&tokens.first()?.kind, &tokens.last()?.kind);
    let open = match (first, last) {
        (Tok::Cmd("emptyset"), _) if tokens.len() == 1 => return Some(Ok(Answer::Set(Vec::new()))),
        (Tok::Cmd("{"), Tok::Cmd("}")) => '{',
        (Tok::Op('{'), Tok::Op('}')) if listed(tokens) => '{',
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
        '{' if builder(inside).is_some() => list(builder(inside).unwrap_or_default(), depth + 1),
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
    // `2/hour`
    let words = words.map(|at| at - usize::from(at > 1 && rest[at - 1].kind == Tok::Op('/')));
    let (value, mut unit) = rest.split_at(words.unwrap_or(rest.len()));
    let mut value = parse::expression(value)?;
    // "5 million"
    let mut tail = unit.to_vec();
    if let Some(Token { kind: Tok::Text(words), .. }) = tail.first_mut() {
        let (first, others) = words.split_once([' ', '~']).unwrap_or((words.as_str(), ""));
        if let Some(times) = units::multiplier(first.trim()) {
            value = value.scaled(times);
            *words = others.to_string();
            unit = &tail;
        }
    }
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
