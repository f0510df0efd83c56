//! Matrices: environments of rows, with brackets around, a factor before and a transpose behind.

use super::{Answer, MAX_ITEMS, Read, split};
use crate::reward::math::expr::Expr;
use crate::reward::math::parse;
use crate::reward::math::token::{Tok, Token};

/// `\begin{pmatrix} a & b \\ c & d \end{pmatrix}`, `\frac{1}{2} \left[ \begin{array}{cc} .. \end{array} \right]^T`.
pub(super) fn matrix(tokens: &[Token]) -> Read {
    let place = |name| tokens.iter().position(|t| t.kind == Tok::Cmd(name));
    let (Some(begin), Some(end)) = (place("begin"), place("end")) else {
        return Err("a matrix that does not end".into());
    };
    if end < begin {
        return Err("a matrix that ends before it begins".into());
    }
    let (mut before, mut behind) = (&tokens[..begin], &tokens[end + 1..]);
    while let (
        [rest @ .., Token { kind: Tok::Op('(' | '[' | '{') | Tok::Cmd("{"), .. }],
        [Token { kind: Tok::Op(')' | ']' | '}') | Tok::Cmd("}"), .. }, tail @ ..],
    ) = (before, behind)
    {
        (before, behind) = (rest, tail);
    }
    let transposed = match behind {
        [] => false,
        [hat, rest @ ..] if hat.kind == Tok::Op('^') && is_transpose(rest) => true,
        _ => return Err("a matrix with something behind it".into()),
    };
    let factor = match before {
        [] => None,
        [Token { kind: Tok::Op('-'), .. }] => Some(Expr::int(-1)),
        before => Some(parse::expression(before)?),
    };
    let rows = rows(&tokens[begin + 1..end], factor.as_ref())?;
    let width = rows.first().map_or(0, Vec::len);
    if width == 0 || rows.iter().any(|row| row.len() != width) {
        return Err("a matrix whose rows differ in length".into());
    }
    if !transposed {
        return Ok(Answer::Matrix(rows));
    }
    let column = |at: usize| rows.iter().map(|row| row[at].clone()).collect();
    Ok(Answer::Matrix((0..width).map(column).collect()))
}

/// What stands before a transpose: `(1, 2)^T`.
pub(super) fn untransposed(tokens: &[Token]) -> Option<&[Token]> {
    let hat = tokens.iter().rposition(|token| token.kind == Tok::Op('^'))?;
    let closed = matches!(tokens.get(hat.checked_sub(1)?)?.kind, Tok::Op(')' | ']'));
    (closed && is_transpose(&tokens[hat + 1..])).then_some(&tokens[..hat])
}

fn is_transpose(tokens: &[Token]) -> bool {
    let name = match tokens {
        [name] => &name.kind,
        [open, name, close] if open.kind == Tok::Op('{') && close.kind == Tok::Op('}') => {
            &name.kind
        }
        _ => return false,
    };
    matches!(name, Tok::Sym(name) if name == "T" || name == "top")
}

/// The cells of each row, times a factor.
fn rows(inside: &[Token], factor: Option<&Expr>) -> Read<Vec<Vec<Expr>>> {
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
                Ok(match factor {
                    Some(factor) => Expr::Product(vec![factor.clone(), cell]),
                    None => cell,
                })
            })
            .collect();
        matrix.push(row?);
    }
    Ok(matrix)
}
