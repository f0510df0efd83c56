//! What a base is called on Hugging Face, where a GGUF file does not say.

use std::fmt;
use std::str::FromStr;

use crate::gguf::Value;
use crate::{Error, Result};

const SITE: &str = "https://huggingface.co/";
const REPO_URL: &str = "general.base_model.0.repo_url";
const KEYS: &str = "general.base_model.";

/// `ORG/NAME`, the repository of a model.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BaseId {
    organization: String,
    name: String,
}

impl FromStr for BaseId {
    type Err = Error;

    fn from_str(text: &str) -> Result<BaseId> {
        let word = |part: &str| {
            let letter = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
            !part.is_empty() && part.chars().all(letter) && !part.starts_with('.')
        };
        match text.split_once('/') {
            Some((organization, name)) if word(organization) && word(name) => {
                Ok(BaseId { organization: organization.into(), name: name.into() })
            }
            _ => {
                let advice = "give the repository of the unquantised model";
                Err(Error::invalid("--base-id", "ORG/NAME, as Qwen/Qwen3-4B", text, advice))
            }
        }
    }
}

impl fmt::Display for BaseId {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        write!(f, "{}/{}", self.organization, self.name)
    }
}

impl BaseId {
    /// What an adapter's metadata says of its base, under the keys of llama.cpp's converters.
    pub fn of_adapter(extra: &[(String, Value)]) -> Option<BaseId> {
        let (_, url) = extra.iter().find(|(key, _)| key == REPO_URL)?;
        let Value::String(url) = url else { return None };
        url.strip_prefix(SITE)?.trim_end_matches('/').parse().ok()
    }

    /// Puts it into an adapter's metadata, in place of what was there.
    pub fn write_to(&self, extra: &mut Vec<(String, Value)>) {
        extra.retain(|(key, _)| !key.starts_with(KEYS));
        extra.extend([
            (format!("{KEYS}count"), Value::U32(1)),
            (format!("{KEYS}0.name"), self.name.as_str().into()),
            (format!("{KEYS}0.organization"), self.organization.as_str().into()),
            (REPO_URL.into(), format!("{SITE}{self}").into()),
        ]);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_read_and_found_again_in_metadata() {
        let id: BaseId = "Qwen/Qwen3-4B".parse().unwrap();
        let mut extra = vec![("bupo.steps".to_string(), Value::U64(40))];
        id.write_to(&mut extra);
        id.write_to(&mut extra);
        assert_eq!(extra.len(), 5, "once");
        assert_eq!(BaseId::of_adapter(&extra), Some(id));
        for wrong in ["Qwen3-4B", "a/b/c", "/b", "a/", "a b/c", "./model", "https://x/y"] {
            assert!(wrong.parse::<BaseId>().is_err(), "{wrong}");
        }
    }
}
