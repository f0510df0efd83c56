//! A `tokenizer.json` of Hugging Face, through the crate `tokenizers`.

use std::{collections::HashSet, fs::File, io::Read, path::Path, sync::OnceLock};

use tokenizers::{DecoderWrapper, ModelWrapper, Tokenizer};

use super::{Tokenize, jsonl::shorten};
use crate::error::caught;
use crate::{Error, Result};

/// Largest file that is read, in bytes. That of a 256,000-token vocabulary has 35 MB.
const MAX_FILE_BYTES: u64 = 256 << 20;

/// A tokenizer read from a `tokenizer.json`.
#[derive(Debug)]
pub struct HfTokenizer {
    tokenizer: Tokenizer,
    /// The same, reading special tokens as characters; made when first asked for.
    plain: OnceLock<Box<Tokenizer>>,
    spelling: Spelling,
    /// Ids of added tokens, which are spelt as they are.
    added: HashSet<u32>,
    n_vocab: usize,
}

/// The 256 characters that stand for bytes in a byte-level vocabulary.
const BYTE_CHARACTERS: [std::ops::RangeInclusive<u32>; 4] =
    [0x21..=0x7e, 0xa1..=0xac, 0xae..=0xff, 0x100..=0x143];

/// How the vocabulary spells bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Spelling {
    /// GPT-2: one printable character per byte.
    ByteLevel,
    /// SentencePiece: `▁` is a blank and `<0x0A>` a byte.
    SentencePiece,
}

impl HfTokenizer {
    /// Reads `path`. Its truncation and padding are switched off.
    pub fn open(path: &Path) -> Result<HfTokenizer> {
        let place = path.display().to_string();
        let mut bytes = Vec::new();
        let file = File::open(path).map_err(Error::io("read", path))?;
        let read = file.take(MAX_FILE_BYTES + 1).read_to_end(&mut bytes);
        if read.map_err(Error::io("read", path))? as u64 > MAX_FILE_BYTES {
            let expected = format!("at most {MAX_FILE_BYTES} bytes");
            return Err(Error::invalid(place, expected, "more", "give a tokenizer.json"));
        }
        HfTokenizer::from_bytes(&bytes, &place)
    }

    /// Reads a `tokenizer.json` that is called `place` in messages.
    pub fn from_bytes(bytes: &[u8], place: &str) -> Result<HfTokenizer> {
        let refuse = |got: &str| {
            let advice = "give the tokenizer.json that belongs to the model";
            Error::invalid(place, "a Hugging Face tokenizer", one_line(got), advice)
        };
        // The crate panics on some damaged files (a decoder without its fields).
        let mut tokenizer = caught(|| Tokenizer::from_bytes(bytes))
            .ok_or_else(|| refuse("one that its reader stumbles over"))?
            .map_err(|e| refuse(&e.to_string()))?;
        tokenizer.with_padding(None);
        tokenizer.with_truncation(None).map_err(|e| {
            Error::invalid(place, "a tokenizer", one_line(&e.to_string()), "mend the file")
        })?;
        let spelling = spelling(tokenizer.get_decoder())?;
        if let Some(missing) = drops(&tokenizer, spelling) {
            let expected = "a vocabulary that can spell every text";
            let advice = "leave --tokenizer out; this one would silently drop characters";
            return Err(Error::invalid(place, expected, missing, advice));
        }
        let added = tokenizer.get_added_tokens_decoder().keys().copied().collect();
        let highest = tokenizer.get_vocab(true).into_values().max();
        // Ids index a table, so one that is far beyond the tokens there are is refused.
        let limit = 2 * tokenizer.get_vocab_size(true) + (1 << 20);
        let n_vocab = highest.map_or(0, |id| id as usize + 1);
        if n_vocab == 0 || n_vocab > limit {
            let expected = format!("token ids from 0 to below {limit}");
            let got = highest.map_or("no token".into(), |id| id.to_string());
            return Err(Error::invalid(place, expected, got, "mend the file's vocabulary"));
        }
        Ok(HfTokenizer { tokenizer, plain: OnceLock::new(), spelling, added, n_vocab })
    }

    /// The token as the vocabulary spells it.
    pub fn token(&self, id: i32) -> Option<String> {
        self.tokenizer.id_to_token(u32::try_from(id).ok()?)
    }

    fn plain(&self) -> &Tokenizer {
        self.plain.get_or_init(|| {
            let mut plain = self.tokenizer.clone();
            plain.set_encode_special_tokens(true);
            Box::new(plain)
        })
    }
}

impl Tokenize for HfTokenizer {
    fn encode(&self, text: &str, add_bos: bool, parse_special: bool) -> Result<Vec<i32>> {
        let tokenizer = if parse_special { &self.tokenizer } else { self.plain() };
        let refuse = |reason: &str| {
            let place = format!("tokenizer.json on {:?}", shorten(text, 40));
            let advice = "take characters its vocabulary has, or leave --tokenizer out";
            Error::invalid(place, "text that it can tokenise", one_line(reason), advice)
        };
        let encode = |add_special: bool| -> Result<Vec<i32>> {
            let encoding = caught(|| tokenizer.encode_fast(text, add_special))
                .ok_or_else(|| refuse("one that its tokenizer stumbles over"))?
                .map_err(|e| refuse(&e.to_string()))?;
            // Ids are below 2^31: `from_bytes` bounds them.
            Ok(encoding.get_ids().iter().map(|&id| id as i32).collect())
        };
        let bare = encode(false)?;
        if !add_bos {
            return Ok(bare);
        }
        // The post-processor adds on both sides at once: what is behind the text goes.
        let mut full = encode(true)?;
        let before = (0..=full.len()).find(|&n| full[n..].starts_with(&bare));
        let before = before.ok_or_else(|| refuse("one that its post-processor changes"))?;
        full.truncate(before + bare.len());
        Ok(full)
    }

    fn piece(&self, token: i32) -> Vec<u8> {
        let Some(text) = self.token(token) else { return Vec::new() };
        if self.added.contains(&(token as u32)) {
            return text.into_bytes();
        }
        match self.spelling {
            Spelling::ByteLevel => bytes_of_byte_level(&text),
            Spelling::SentencePiece => bytes_of_sentence_piece(&text),
        }
    }

    fn n_vocab(&self) -> usize {
        self.n_vocab
    }
}

fn spelling(decoder: Option<&DecoderWrapper>) -> Result<Spelling> {
    match decoder {
        Some(DecoderWrapper::ByteLevel(_)) => Ok(Spelling::ByteLevel),
        Some(DecoderWrapper::Metaspace(_) | DecoderWrapper::ByteFallback(_)) => {
            Ok(Spelling::SentencePiece)
        }
        Some(DecoderWrapper::Sequence(list)) => {
            let known = list.get_decoders().iter().find_map(|d| spelling(Some(d)).ok());
            known.ok_or_else(|| unsupported("Sequence"))
        }
        Some(DecoderWrapper::BPE(_)) => Err(unsupported("BPEDecoder")),
        Some(DecoderWrapper::WordPiece(_)) => Err(unsupported("WordPiece")),
        Some(DecoderWrapper::CTC(_)) => Err(unsupported("CTC")),
        Some(_) => Err(unsupported("text only")),
        None => Err(unsupported("none")),
    }
}

/// What a BPE lacks to spell every text: `tokenizers` passes over characters that are in no token.
fn drops(tokenizer: &Tokenizer, spelling: Spelling) -> Option<String> {
    let ModelWrapper::BPE(bpe) = tokenizer.get_model() else { return None };
    if bpe.unk_token.is_some() || bpe.byte_fallback {
        return None;
    }
    match spelling {
        Spelling::SentencePiece => Some("no unk_token and no byte_fallback".into()),
        Spelling::ByteLevel => BYTE_CHARACTERS
            .into_iter()
            .flatten()
            .find(|code| {
                let token = char::from_u32(*code).map(String::from);
                token.is_none_or(|token| tokenizer.token_to_id(&token).is_none())
            })
            .map(|code| format!("no token for the character U+{code:04X}")),
    }
}

fn unsupported(decoder: &str) -> Error {
    Error::Unsupported {
        what: "tokenizer.json decoder",
        got: decoder.into(),
        supported: "ByteLevel, Metaspace, ByteFallback".into(),
    }
}

/// GPT-2's `bytes_to_unicode`, read backwards: printable Latin-1 characters are their own byte, the other
/// 68 bytes follow one another from U+0100. Characters beyond are kept as UTF-8.
fn bytes_of_byte_level(text: &str) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(text.len());
    for character in text.chars() {
        match u32::from(character) {
            code @ (0x21..=0x7e | 0xa1..=0xac | 0xae..=0xff) => bytes.push(code as u8),
            code @ 0x100..=0x120 => bytes.push((code - 0x100) as u8),
            code @ 0x121..=0x142 => bytes.push((code - 0x121 + 0x7f) as u8),
            0x143 => bytes.push(0xad),
            _ => bytes.extend(character.encode_utf8(&mut [0; 4]).bytes()),
        }
    }
    bytes
}

fn bytes_of_sentence_piece(text: &str) -> Vec<u8> {
    let byte = text.strip_prefix("<0x").and_then(|t| t.strip_suffix('>')).filter(|t| t.len() == 2);
    let byte = byte.filter(|hex| hex.bytes().all(|b| b.is_ascii_hexdigit()));
    match byte.and_then(|hex| u8::from_str_radix(hex, 16).ok()) {
        Some(byte) => vec![byte],
        None => text.replace('\u{2581}', " ").into_bytes(),
    }
}

fn one_line(text: &str) -> String {
    shorten(&text.split_whitespace().collect::<Vec<_>>().join(" "), 200)
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;
    use crate::data::agree;

    /// The character that GPT-2 gives a byte, as its published code computes it.
    fn gpt2_character(byte: u8) -> char {
        let printable = |b: u8| matches!(b, 0x21..=0x7e | 0xa1..=0xac | 0xae..=0xff);
        if printable(byte) {
            return byte.into();
        }
        let before = (0..byte).filter(|b| !printable(*b)).count();
        char::from_u32(256 + before as u32).unwrap()
    }

    /// A byte-level BPE as of Qwen: 256 bytes, the merge "th", ChatML's specials, `<think>` not special.
    fn byte_level() -> Value {
        let mut vocabulary: serde_json::Map<String, Value> =
            (0..=255u8).map(|b| (gpt2_character(b).to_string(), b.into())).collect();
        vocabulary.insert("th".into(), 256.into());
        let added = |id: u32, content: &str, special: bool| {
            json!({"id": id, "content": content, "special": special, "single_word": false,
                   "lstrip": false, "rstrip": false, "normalized": false})
        };
        let byte_level = json!({"type": "ByteLevel", "add_prefix_space": false,
                                "trim_offsets": false, "use_regex": true});
        json!({
            "version": "1.0",
            "truncation": {"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0},
            "padding": {"strategy": {"Fixed": 64}, "direction": "Right", "pad_to_multiple_of": null,
                        "pad_id": 0, "pad_type_id": 0, "pad_token": "!"},
            "added_tokens": [added(257, "<|im_start|>", true), added(258, "<|im_end|>", true),
                             added(259, "<think>", false)],
            "normalizer": null, "pre_tokenizer": byte_level,
            "post_processor": {"type": "TemplateProcessing",
                "single": [{"SpecialToken": {"id": "<|im_start|>", "type_id": 0}},
                           {"Sequence": {"id": "A", "type_id": 0}}],
                "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
                "special_tokens": {"<|im_start|>": {"id": "<|im_start|>", "ids": [257],
                                                    "tokens": ["<|im_start|>"]}}},
            "decoder": byte_level,
            "model": {"type": "BPE", "dropout": null, "unk_token": null,
                      "continuing_subword_prefix": null, "end_of_word_suffix": null,
                      "fuse_unk": false, "byte_fallback": false,
                      "vocab": vocabulary, "merges": [["t", "h"]]},
        })
    }

    fn read(json: &Value) -> Result<HfTokenizer> {
        HfTokenizer::from_bytes(json.to_string().as_bytes(), "t.json")
    }

    #[test]
    fn encodes_with_and_without_special_tokens() {
        let hf = read(&byte_level()).unwrap();
        assert_eq!(hf.n_vocab(), 260);
        let encode = |text, add, parse| hf.encode(text, add, parse).unwrap();
        assert_eq!(encode("12+3=", false, true), b"12+3=".map(i32::from));
        assert_eq!(encode("the<|im_end|>\n", false, true), [256, 101, 258, 10]);
        assert_eq!(encode("a", true, true), [257, 97]);
        assert_eq!(encode("<|im_end|>", false, false), b"<|im_end|>".map(i32::from));
        assert_eq!(encode("a<think>", false, false), [97, 259]);
        assert!(encode("", false, true).is_empty());
    }

    #[test]
    fn what_a_post_processor_adds_behind_a_text_is_left_out() {
        let mut json = byte_level();
        let end = json!({"SpecialToken": {"id": "<|im_end|>", "type_id": 0}});
        let processor = &mut json["post_processor"];
        processor["single"].as_array_mut().unwrap().push(end);
        processor["special_tokens"]["<|im_end|>"] =
            json!({"id": "<|im_end|>", "ids": [258], "tokens": ["<|im_end|>"]});
        let hf = read(&json).unwrap();
        assert_eq!(hf.encode("a", true, true).unwrap(), [257, 97]);
        assert_eq!(hf.encode("a<|im_end|>", true, true).unwrap(), [257, 97, 258]);
        assert_eq!(hf.encode("<|im_start|>a", true, true).unwrap(), [257, 257, 97]);
        assert_eq!(hf.encode("a", false, true).unwrap(), [97]);
    }

    #[test]
    fn pieces_are_the_bytes_of_the_text() {
        let hf = read(&byte_level()).unwrap();
        for byte in 0..=255u8 {
            assert_eq!(hf.piece(byte.into()), [byte]);
        }
        for text in ["the 7ü\u{1f600}\n\u{0}<|im_end|>", "<think>\u{a0}\u{ad}\u{7f}"] {
            let tokens = hf.encode(text, false, true).unwrap();
            let bytes: Vec<u8> = tokens.iter().flat_map(|&t| hf.piece(t)).collect();
            assert_eq!(bytes, text.as_bytes());
        }
        assert_eq!((hf.piece(-1), hf.piece(260)), (vec![], vec![]));
        assert_eq!(bytes_of_sentence_piece("\u{2581}a"), b" a");
        assert_eq!(bytes_of_sentence_piece("<0x0A>"), b"\n");
        assert_eq!(bytes_of_sentence_piece("<0x+A>"), b"<0x+A>");
    }

    #[test]
    fn agreement_with_the_gguf() {
        let hf = read(&byte_level()).unwrap();
        let vocabulary = || (0..260).map(|id| (id, hf.token(id).unwrap()));
        let padding = |text: &str| [(260, text.to_owned())].into_iter();
        agree(vocabulary(), &hf).unwrap();
        agree(vocabulary().chain(padding("[PAD260]")), &hf).unwrap();
        agree(vocabulary().chain(padding("<|reserved_special_token_3|>")), &hf).unwrap();
        for (error, expected) in [
            (
                agree(vocabulary().chain(padding("<|eot|>")), &hf),
                "--tokenizer, token id 260: expected \"<|eot|>\" as in the GGUF, got no token;",
            ),
            (
                agree(vocabulary().take(259), &hf),
                "--tokenizer, token id 259: expected no token as in the GGUF, got \"<think>\";",
            ),
            (
                agree(vocabulary().map(|(id, t)| (id, if id > 96 { "x".into() } else { t })), &hf),
                "--tokenizer, token id 97: expected \"x\" as in the GGUF, got \"a\";",
            ),
        ] {
            let error = error.unwrap_err().to_string();
            assert!(error.starts_with(expected), "{error}");
        }
    }

    #[test]
    fn bad_files_are_named() {
        let mut word_piece = byte_level();
        word_piece["decoder"] = json!({"type": "WordPiece", "prefix": "##", "cleanup": true});
        let mut no_decoder = byte_level();
        no_decoder["decoder"] = Value::Null;
        let mut no_seven = byte_level();
        no_seven["model"]["vocab"].as_object_mut().unwrap().remove("7");
        let mut far = byte_level();
        far["model"]["vocab"]["th"] = 4_000_000_000u32.into();
        for (json, expected) in [
            (
                word_piece,
                "tokenizer.json decoder 'WordPiece' is not supported; supported: ByteLevel,",
            ),
            (no_decoder, "tokenizer.json decoder 'none' is not supported"),
            (
                no_seven,
                "t.json: expected a vocabulary that can spell every text, got no token for the",
            ),
            (far, "t.json: expected token ids from 0 to below"),
            (json!({"a": 1}), "t.json: expected a Hugging Face tokenizer, got"),
            (json!([]), "t.json: expected a Hugging Face tokenizer, got"),
        ] {
            let error = read(&json).unwrap_err().to_string();
            assert!(error.starts_with(expected) && !error.contains('\n'), "{error}");
        }
        let error = HfTokenizer::open(Path::new("/nonexistent/t.json")).unwrap_err().to_string();
        assert!(error.starts_with("cannot read /nonexistent/t.json"), "{error}");
    }
}
