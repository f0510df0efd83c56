//! What a tokenizer does for us, and the check that another one may stand in for the GGUF's own.

use super::{HfTokenizer, jsonl::shorten};
use crate::{Error, Result};

/// Text to token ids and back.
pub trait Tokenize: Send + Sync {
    /// The tokens of `text`, which something is to follow. `add_bos` adds what the tokenizer puts before a
    /// text (what it would put behind one never is); `parse_special` reads special tokens such as
    /// `<|im_end|>` in the text as tokens, not as characters.
    fn encode(&self, text: &str, add_bos: bool, parse_special: bool) -> Result<Vec<i32>>;

    /// The bytes of one token, special ones in full; empty for an id without a token. A token may end
    /// within a UTF-8 character.
    fn piece(&self, token: i32) -> Vec<u8>;

    /// One more than the highest id.
    fn n_vocab(&self) -> usize;
}

/// Refuses a `tokenizer.json` whose ids are not those of the GGUF.
///
/// `gguf_tokens` are all entries of the GGUF's `tokenizer.ggml.tokens`. Every id of the tokenizer must stand
/// there with the same text; ids that only the GGUF has must be padding, such as `[PAD151669]` or `<unused3>`.
pub fn agree(gguf_tokens: impl Iterator<Item = (i32, String)>, hf: &HfTokenizer) -> Result<()> {
    let mut seen = vec![false; hf.n_vocab()];
    for (id, ours) in gguf_tokens {
        match hf.token(id) {
            Some(theirs) => {
                seen[id as usize] = true;
                if !same(&ours, &theirs) {
                    return Err(differ(id, &quoted(&ours), &quoted(&theirs)));
                }
            }
            None if is_padding(&ours) => {}
            None => return Err(differ(id, &quoted(&ours), "no token")),
        }
    }
    for id in (0..).zip(&seen).filter_map(|(id, seen)| (!seen).then_some(id)) {
        if let Some(theirs) = hf.token(id) {
            return Err(differ(id, "no token", &quoted(&theirs)));
        }
    }
    Ok(())
}

/// llama.cpp's converter writes the blanks of added tokens as blanks where the vocabulary has U+2581.
fn same(ours: &str, theirs: &str) -> bool {
    let blank = |c| if c == '\u{2581}' { ' ' } else { c };
    ours.chars().map(blank).eq(theirs.chars().map(blank))
}

/// Names that converters and vocabularies give to ids that stand for nothing.
fn is_padding(token: &str) -> bool {
    let lower = token.to_ascii_lowercase();
    let bracketed = (lower.starts_with('<') && lower.ends_with('>'))
        || (lower.starts_with('[') && lower.ends_with(']'));
    let names = ["pad", "unused", "reserved", "dummy"];
    token.is_empty() || bracketed && names.iter().any(|name| lower.contains(name))
}

fn quoted(token: &str) -> String {
    format!("{:?}", shorten(token, 60))
}

fn differ(id: i32, ours: &str, theirs: &str) -> Error {
    let place = format!("--tokenizer, token id {id}");
    let advice = "give the tokenizer.json of this very model, or leave the option out";
    Error::invalid(place, format!("{ours} as in the GGUF"), theirs, advice)
}
