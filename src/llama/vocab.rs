//! Text to tokens and back, by the GGUF's own vocabulary.

use std::ffi::{CStr, CString};
use std::marker::PhantomData;

use ggml_sys as sys;

use super::check;
use crate::{Error, Result};

/// A model's vocabulary.
#[derive(Clone, Copy)]
pub struct Vocab<'m> {
    raw: *const sys::llama_vocab,
    _model: PhantomData<&'m ()>,
}

// SAFETY: a vocabulary is only read.
unsafe impl Send for Vocab<'_> {}
// SAFETY: as above.
unsafe impl Sync for Vocab<'_> {}

impl<'m> Vocab<'m> {
    /// # Safety
    /// `raw` is a vocabulary that lives for `'m`.
    pub(super) unsafe fn new(raw: *const sys::llama_vocab) -> Vocab<'m> {
        Vocab { raw, _model: PhantomData }
    }

    /// Number of tokens.
    pub fn n_tokens(self) -> usize {
        // SAFETY: a live vocabulary.
        unsafe { sys::llama_vocab_n_tokens(self.raw) as usize }
    }

    /// Encodes text that something is to follow. `add_bos` puts BOS before it where the model wants one; what
    /// a model may want behind a text (`add_eos_token`, `add_sep_token`) would end it, and is never added.
    /// `parse_special` reads `<|im_start|>` and its like as the control tokens they name.
    ///
    /// # Errors
    /// [`Error::Invalid`] naming the character that the vocabulary cannot spell.
    pub fn tokenize(self, text: &str, add_bos: bool, parse_special: bool) -> Result<Vec<i32>> {
        let tokens = self.try_tokenize(text, parse_special).map_err(|error| {
            let lacks = text
                .chars()
                .find(|c| self.try_tokenize(c.encode_utf8(&mut [0; 4]), false).is_err());
            match lacks {
                Some(c) => Error::invalid(
                    "text",
                    "characters that the model's vocabulary can spell",
                    format!("'{}' (U+{:04X})", c.escape_debug(), c as u32),
                    "take it out, or use a model with byte tokens",
                ),
                None => error,
            }
        })?;
        let bos = self.bos().filter(|_| add_bos && self.adds_bos());
        Ok(bos.into_iter().chain(tokens).collect())
    }

    fn try_tokenize(self, text: &str, parse_special: bool) -> Result<Vec<i32>> {
        let mut tokens = vec![0i32; text.len() + 8];
        loop {
            let mut n = 0;
            // SAFETY: the text and the room for tokens with their lengths; a live vocabulary.
            let status = unsafe {
                sys::bupo_tokenize(
                    self.raw,
                    text.as_ptr().cast(),
                    text.len(),
                    false,
                    parse_special,
                    tokens.as_mut_ptr(),
                    tokens.len(),
                    &mut n,
                )
            };
            check("tokenising", status, "the text does not fit the model's vocabulary")?;
            let fits = n <= tokens.len();
            tokens.resize(n, 0);
            if fits {
                return Ok(tokens);
            }
        }
    }

    /// The bytes a token stands for; control tokens by name if `special`, else as nothing.
    pub fn piece(self, token: i32, special: bool) -> Vec<u8> {
        let mut bytes = vec![0u8; 32];
        loop {
            let mut n = 0;
            // SAFETY: room for the piece with its length; a live vocabulary.
            let status = unsafe {
                sys::bupo_token_to_piece(
                    self.raw,
                    token,
                    special,
                    bytes.as_mut_ptr().cast(),
                    bytes.len(),
                    &mut n,
                )
            };
            if status != sys::BUPO_OK {
                return Vec::new();
            }
            let fits = n <= bytes.len();
            bytes.resize(n, 0);
            if fits {
                return bytes;
            }
        }
    }

    /// Text of tokens, invalid UTF-8 replaced.
    pub fn text(self, tokens: &[i32], special: bool) -> String {
        let bytes: Vec<u8> = tokens.iter().flat_map(|&t| self.piece(t, special)).collect();
        String::from_utf8_lossy(&bytes).into_owned()
    }

    /// Whether generation ends with this token.
    pub fn is_eog(self, token: i32) -> bool {
        // SAFETY: a live vocabulary and a token in range.
        self.holds(token) && unsafe { sys::llama_vocab_is_eog(self.raw, token) }
    }

    /// Whether the id is one of the vocabulary's.
    pub fn holds(self, token: i32) -> bool {
        token >= 0 && (token as usize) < self.n_tokens()
    }

    /// Beginning-of-sequence token, if there is one.
    pub fn bos(self) -> Option<i32> {
        // SAFETY: a live vocabulary.
        Some(unsafe { sys::llama_vocab_bos(self.raw) }).filter(|&t| self.holds(t))
    }

    /// End-of-sequence token, if there is one.
    pub fn eos(self) -> Option<i32> {
        // SAFETY: a live vocabulary.
        Some(unsafe { sys::llama_vocab_eos(self.raw) }).filter(|&t| self.holds(t))
    }

    /// Whether the model wants BOS put before a text.
    pub fn adds_bos(self) -> bool {
        // SAFETY: a live vocabulary.
        unsafe { sys::llama_vocab_get_add_bos(self.raw) }
    }

    /// The token as the vocabulary spells it.
    pub fn spelling(self, token: i32) -> String {
        if !self.holds(token) {
            return String::new();
        }
        // SAFETY: a live vocabulary, a token in range, a NUL-terminated string of the vocabulary.
        unsafe { CStr::from_ptr(sys::llama_vocab_get_text(self.raw, token)) }
            .to_string_lossy()
            .into_owned()
    }
}

/// llama.cpp's own rendering of the templates it knows, to hold ours against. `messages`: (role, content).
///
/// # Errors
/// [`Error::Engine`] when llama.cpp does not know the template.
pub fn chat_apply_template(
    template: &str,
    messages: &[(String, String)],
    add_assistant: bool,
) -> Result<String> {
    let c = |text: &str| {
        CString::new(text)
            .map_err(|_| Error::invalid("chat message", "text without NUL", "a NUL", "remove it"))
    };
    let template = c(template)?;
    let owned: Vec<(CString, CString)> = messages
        .iter()
        .map(|(role, content)| Ok((c(role)?, c(content)?)))
        .collect::<Result<_>>()?;
    let raw: Vec<_> = owned
        .iter()
        .map(|(role, content)| sys::llama_chat_message {
            role: role.as_ptr(),
            content: content.as_ptr(),
        })
        .collect();
    let mut bytes = vec![0u8; 4096];
    loop {
        let mut n = 0;
        // SAFETY: NUL-terminated strings that live for the call, and room with its length.
        let status = unsafe {
            sys::bupo_chat_apply_template(
                template.as_ptr(),
                raw.as_ptr(),
                raw.len(),
                add_assistant,
                bytes.as_mut_ptr().cast(),
                bytes.len(),
                &mut n,
            )
        };
        check("applying llama.cpp's chat template", status, "use a template that it knows")?;
        let fits = n <= bytes.len();
        bytes.resize(n, 0);
        if fits {
            return Ok(String::from_utf8_lossy(&bytes).into_owned());
        }
    }
}
