//! A byte-level BPE vocabulary of any size that spells every text.
//!
//! The first 256 tokens are the bytes (in GPT-2's printable spelling); the merges append one letter at a
//! time to a letter or a space, frequent letters first, short words before long ones. So every merge's
//! parts are tokens, no two tokens are spelled alike, and text and tokens map onto each other.

use super::Shape;
use crate::Result;
use crate::gguf::{Array, GgufWriter};

/// Letters from the most to the least frequent in English.
const LETTERS: &str = "etaoinshrdlucmfwypvbgkjqxz";
/// Control tokens after the text tokens.
const CONTROL: [&str; 3] = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"];
/// `enum llama_token_type`.
const NORMAL: i32 = 1;
const CONTROL_TYPE: i32 = 3;
const UNUSED: i32 = 5;

/// GPT-2's spelling of the bytes: printable ones stand for themselves, the others for letters from
/// U+0100 on.
fn spelling() -> [char; 256] {
    let mut next = 0x100u32;
    std::array::from_fn(|byte| {
        let byte = byte as u32;
        let printable = matches!(byte, 0x21..=0x7e | 0xa1..=0xac | 0xae..=0xff);
        let code = if printable { byte } else { next };
        next += !printable as u32;
        char::from_u32(code).expect("below the surrogates")
    })
}

/// `n_text` tokens, and the merges that make those beyond the bytes.
fn tokens(n_text: usize) -> (Vec<String>, Vec<String>) {
    let spelling = spelling();
    let mut tokens: Vec<String> = spelling.iter().map(char::to_string).collect();
    tokens.truncate(n_text);
    let mut merges = Vec::with_capacity(n_text.saturating_sub(256));
    let mut stems: Vec<String> = vec![spelling[b' ' as usize].to_string()];
    stems.extend(LETTERS.chars().map(|c| c.to_string()));
    while tokens.len() < n_text {
        let mut longer = Vec::new();
        'all: for stem in &stems {
            for letter in LETTERS.chars() {
                if tokens.len() == n_text {
                    break 'all;
                }
                let word = format!("{stem}{letter}");
                merges.push(format!("{stem} {letter}"));
                tokens.push(word.clone());
                longer.push(word);
            }
        }
        stems = longer;
    }
    (tokens, merges)
}

/// Adds the tokenizer's metadata.
pub(super) fn metadata(writer: &mut GgufWriter<'_>, shape: &Shape) -> Result<()> {
    let (mut all, merges) = tokens(shape.n_text);
    let mut types = vec![NORMAL; all.len()];
    all.extend(CONTROL.map(String::from));
    types.resize(all.len(), CONTROL_TYPE);
    all.extend((all.len()..shape.n_vocab).map(|i| format!("[UNUSED{i}]")));
    types.resize(all.len(), UNUSED);
    let [end_of_text, _, im_end] = [0, 1, 2].map(|i| (shape.n_text + i) as u32);
    // How text is cut before merging.
    let pre = if shape.arch == "llama" { "llama-bpe" } else { "qwen2" };
    writer.metadata("tokenizer.ggml.model", "gpt2")?;
    writer.metadata("tokenizer.ggml.pre", pre)?;
    writer.metadata("tokenizer.ggml.tokens", Array::strings(all))?;
    writer.metadata("tokenizer.ggml.token_type", Array::from(&types[..]))?;
    writer.metadata("tokenizer.ggml.merges", Array::strings(merges))?;
    writer.metadata("tokenizer.ggml.bos_token_id", end_of_text)?;
    writer.metadata("tokenizer.ggml.eos_token_id", im_end)?;
    writer.metadata("tokenizer.ggml.padding_token_id", end_of_text)?;
    writer.metadata("tokenizer.ggml.add_bos_token", false)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashSet;

    #[test]
    fn tokens_are_spelled_once_and_merges_have_their_parts() {
        for n in [504, 2040, 151_643] {
            let (tokens, merges) = tokens(n);
            assert_eq!((tokens.len(), merges.len()), (n, n - 256));
            let known: HashSet<&str> = tokens.iter().map(String::as_str).collect();
            assert_eq!(known.len(), n);
            for (merge, token) in merges.iter().zip(&tokens[256..]) {
                let (a, b) = merge.split_once(' ').unwrap();
                assert!(known.contains(a) && known.contains(b) && format!("{a}{b}") == *token);
            }
        }
    }
}
