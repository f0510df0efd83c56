//! A letter of a multiple choice, and what it stands for.

use super::{Answer, list};
use crate::reward::math::token::{Tok, Token};

/// Words before the letter that say no more than that it is one.
const NAMES: [&str; 4] = ["option", "choice", "answer", "letter"];

/// `(B)`, `\text{B}`, `B)`, `\textbf{(B)}\ 12`, `B. 12`, `Option B`.
pub(super) fn choice(text: &str, tokens: &[Token]) -> Option<Answer> {
    if let Some(letter) = named(tokens) {
        return Some(Answer::Choice { letter, rest: None });
    }
    let name = |token: &Token| matches!(&token.kind, Tok::Text(word) if is_name(word));
    let names = tokens.iter().take_while(|token| name(token)).count();
    let tokens = &tokens[names..];
    let worded = names > 0 || text.trim_start().starts_with("\\text");
    let (letter, length) = marked(tokens, worded, is_dotted(text))?;
    let rest = match &tokens[length..] {
        [] | [Token { kind: Tok::Op('.'), .. }] => None,
        rest if worded || rest[0].spaced => {
            if (0..rest.len()).any(|at| is_another(rest, at)) {
                return None;
            }
            // Content that has no form is a sentence about the choice.
            list(rest, 0).ok().map(Box::new)
        }
        _ => return None,
    };
    Some(Answer::Choice { letter: letter.to_ascii_uppercase(), rest })
}

fn is_name(word: &str) -> bool {
    NAMES.contains(&word.trim().to_ascii_lowercase().as_str())
}

/// `\text{Option B}`, all of it words.
fn named(tokens: &[Token]) -> Option<char> {
    let [Token { kind: Tok::Text(words), .. }] = tokens else { return None };
    let (name, letter) = words.trim().split_once(' ')?;
    let letter = letter.trim_matches(['(', ')', ' ', '.']);
    is_name(name).then(|| lone(letter)).flatten().filter(char::is_ascii_uppercase)
}

/// Whether the text begins with words that end in the mark of a choice, which is no token: `\text{C. } 15`.
fn is_dotted(text: &str) -> bool {
    let words = text.trim_start().strip_prefix("\\text").and_then(|rest| rest.split_once('{'));
    let inside = words.and_then(|(_, rest)| rest.split_once('}')).map_or("", |(inside, _)| inside);
    inside.trim_end().ends_with(['.', ':'])
}

/// The letter that marks a choice at the front, and the number of its tokens.
fn marked(tokens: &[Token], worded: bool, dotted: bool) -> Option<(char, usize)> {
    if let Some(letter) = bracketed(tokens, 0) {
        return (worded || letter.is_ascii_uppercase()).then_some((letter, 3));
    }
    let letter = letter_of(&tokens.first()?.kind).filter(char::is_ascii_uppercase)?;
    match tokens.get(1).map(|token| &token.kind) {
        None if worded => Some((letter, 1)),
        Some(_) if dotted => Some((letter, 1)),
        Some(Tok::Op(')' | '.' | ':')) => Some((letter, 2)),
        _ => None,
    }
}

/// Whether a second choice is named here: `(C)`, `C.`, or a letter behind "or".
fn is_another(tokens: &[Token], at: usize) -> bool {
    let Some(letter) = letter_of(&tokens[at].kind) else { return bracketed(tokens, at).is_some() };
    let next = tokens.get(at + 1).map(|token| &token.kind);
    let mark = matches!(next, Some(Tok::Op('.' | ')' | ':')));
    let behind = at == 0 || tokens[at - 1].kind == Tok::Op(',');
    letter.is_ascii_uppercase() && (mark || behind && matches!(next, None | Some(Tok::Op(','))))
}

fn bracketed(tokens: &[Token], at: usize) -> Option<char> {
    match (tokens.get(at), tokens.get(at + 1), tokens.get(at + 2)) {
        (Some(open), Some(letter), Some(close))
            if open.kind == Tok::Op('(') && close.kind == Tok::Op(')') =>
        {
            letter_of(&letter.kind)
        }
        _ => None,
    }
}

fn letter_of(kind: &Tok) -> Option<char> {
    match kind {
        Tok::Sym(name) => lone(name),
        _ => None,
    }
}

/// A name of one letter that choices have.
fn lone(name: &str) -> Option<char> {
    let letter = name.chars().next().filter(|_| name.len() == 1)?;
    matches!(letter.to_ascii_uppercase(), 'A'..='J').then_some(letter)
}
