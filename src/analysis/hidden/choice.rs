//! What is written of hidden states: taps, layers, positions, the type of a number, the file.

use std::fmt;
use std::path::Path;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::analysis::Tap;
use crate::{Error, Result};

/// Which hidden states are written, and where to; a resumed run must be told the same.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Hidden {
    /// `.safetensors` or `.npy` file, or a folder of `.npy` files.
    pub file: String,
    /// Places in a layer, each once.
    pub taps: Vec<Tap>,
    /// Layers from 1; none: all.
    pub layers: Option<Ranges>,
    /// Places in a sequence.
    pub positions: Positions,
    /// Type of the numbers.
    pub element: Element,
}

impl Hidden {
    /// Refuses what cannot be written.
    ///
    /// # Errors
    /// [`Error::Invalid`] naming the option.
    pub fn check(&self, n_layer: usize) -> Result<()> {
        let invalid = |option: &str, expected: String, got: String, advice: &str| {
            Err(Error::invalid(option, expected, got, advice))
        };
        let form = Form::of(&self.file)?;
        if let Some(twice) = (1..self.taps.len()).find(|&i| self.taps[..i].contains(&self.taps[i]))
        {
            let name = self.taps[twice].name().to_string();
            return invalid("--hidden-taps", "each tap once".into(), name, "leave one out");
        }
        if let Some(layers) = &self.layers
            && (layers.least() == 0 || layers.most() > n_layer)
        {
            let expected = format!("layers from 1 to {n_layer}");
            return invalid("--hidden-layers", expected, layers.to_string(), "layers count from 1");
        }
        if form == Form::Npy && self.taps.len() > 1 {
            let expected = "one of --hidden-taps for a single .npy file".into();
            let advice =
                "give a .safetensors file, or a name without an ending for a folder of .npy files";
            return invalid("--hidden", expected, self.taps.len().to_string(), advice);
        }
        if form != Form::Safetensors && self.element == Element::Bf16 {
            let advice = "NumPy has no such type: write a .safetensors file";
            return invalid("--hidden-type", "f32 or f16 for .npy".into(), "bf16".into(), advice);
        }
        Ok(())
    }

    /// The layers that are written, of so many.
    pub fn layers_of(&self, n_layer: usize) -> Vec<usize> {
        (1..=n_layer).filter(|&l| self.layers.as_ref().is_none_or(|r| r.holds(l))).collect()
    }

    /// Bytes of one position's states.
    pub fn bytes_of(&self, n_layer: usize, n_embd: usize) -> u64 {
        let inner = self.taps.iter().filter(|tap| **tap != Tap::Final).count();
        let vectors = inner * self.layers_of(n_layer).len() + (self.taps.len() - inner);
        (vectors * n_embd) as u64 * self.element.bytes() as u64
    }
}

/// Kind of the file that is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Form {
    Safetensors,
    Npy,
    /// A folder of `.npy` files.
    Folder,
}

impl Form {
    pub(super) fn of(file: &str) -> Result<Form> {
        match Path::new(file).extension().and_then(|e| e.to_str()) {
            Some("safetensors") => Ok(Form::Safetensors),
            Some("npy") => Ok(Form::Npy),
            None if !file.is_empty() => Ok(Form::Folder),
            _ => Err(Error::invalid(
                format!("--hidden {file}"),
                "a name that ends in .safetensors or .npy, or has no ending (a folder of .npy files)",
                "another ending",
                "choose one of these",
            )),
        }
    }
}

/// The type of a number in a file.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Element {
    /// 4 bytes, as computed.
    #[default]
    F32,
    /// 2 bytes; numbers beyond 65504 are refused.
    F16,
    /// 2 bytes, the range of F32 with 8 bits of precision; safetensors only.
    Bf16,
}

impl Element {
    /// Size of a number.
    pub fn bytes(self) -> usize {
        if self == Element::F32 { 4 } else { 2 }
    }
}

/// Places in a sequence (prompt and completion, from 0) whose hidden states are written.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(into = "String", try_from = "String")]
pub enum Positions {
    /// Those that predict a token of the completion, as in the records; of a prompt alone its last.
    #[default]
    Completion,
    /// Those of the prompt.
    Prompt,
    /// All.
    All,
    /// The last one.
    Last,
    /// These, as far as a sequence has them.
    At(Ranges),
}

impl Positions {
    /// The positions of a sequence with a prompt of `prompt` tokens (not 0) and a completion of `n`, of which `every` K-th is
    /// looked at.
    pub fn of(&self, prompt: usize, n: usize, every: usize) -> Vec<usize> {
        match self {
            Positions::Completion if n == 0 => vec![prompt - 1],
            Positions::Completion => (prompt - 1..prompt + n - 1).step_by(every).collect(),
            Positions::Prompt => (0..prompt).collect(),
            Positions::All => (0..prompt + n).collect(),
            Positions::Last => vec![prompt + n - 1],
            Positions::At(ranges) => (0..prompt + n).filter(|&p| ranges.holds(p)).collect(),
        }
    }
}

impl FromStr for Positions {
    type Err = String;

    fn from_str(text: &str) -> Result<Positions, String> {
        Ok(match text {
            "completion" => Positions::Completion,
            "prompt" => Positions::Prompt,
            "all" => Positions::All,
            "last" => Positions::Last,
            _ => Positions::At(text.parse().map_err(|e| {
                format!("expected completion, prompt, all, last, or positions such as 0,4-7 ({e})")
            })?),
        })
    }
}

impl fmt::Display for Positions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Positions::Completion => f.write_str("completion"),
            Positions::Prompt => f.write_str("prompt"),
            Positions::All => f.write_str("all"),
            Positions::Last => f.write_str("last"),
            Positions::At(ranges) => ranges.fmt(f),
        }
    }
}

impl From<Positions> for String {
    fn from(positions: Positions) -> String {
        positions.to_string()
    }
}

impl TryFrom<String> for Positions {
    type Error = String;

    fn try_from(text: String) -> Result<Positions, String> {
        text.parse()
    }
}

/// Whole numbers and ranges of them: `3,5-8`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(into = "String", try_from = "String")]
pub struct Ranges(Vec<(usize, usize)>);

impl Ranges {
    fn holds(&self, n: usize) -> bool {
        self.0.iter().any(|&(from, to)| from <= n && n <= to)
    }

    fn least(&self) -> usize {
        self.0.iter().map(|r| r.0).min().unwrap_or(0)
    }

    fn most(&self) -> usize {
        self.0.iter().map(|r| r.1).max().unwrap_or(0)
    }
}

impl FromStr for Ranges {
    type Err = String;

    fn from_str(text: &str) -> Result<Ranges, String> {
        let number = |part: &str| {
            part.trim().parse::<usize>().map_err(|e| format!("'{part}' is no whole number: {e}"))
        };
        let range = |part: &str| match part.split_once('-') {
            None => number(part).map(|n| (n, n)),
            Some((from, to)) => {
                let (from, to) = (number(from)?, number(to)?);
                if from > to {
                    return Err(format!("'{part}' goes down; write {to}-{from}"));
                }
                Ok((from, to))
            }
        };
        text.split(',').map(range).collect::<Result<_, _>>().map(Ranges)
    }
}

impl fmt::Display for Ranges {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (i, (from, to)) in self.0.iter().enumerate() {
            let comma = if i == 0 { "" } else { "," };
            match from == to {
                true => write!(f, "{comma}{from}")?,
                false => write!(f, "{comma}{from}-{to}")?,
            }
        }
        Ok(())
    }
}

impl From<Ranges> for String {
    fn from(ranges: Ranges) -> String {
        ranges.to_string()
    }
}

impl TryFrom<String> for Ranges {
    type Error = String;

    fn try_from(text: String) -> Result<Ranges, String> {
        text.parse()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_are_read_and_written() {
        let ranges: Ranges = "3,5-8, 1".parse().unwrap();
        assert_eq!(ranges.to_string(), "3,5-8,1");
        assert_eq!((ranges.least(), ranges.most()), (1, 8));
        let held: Vec<usize> = (0..10).filter(|&n| ranges.holds(n)).collect();
        assert_eq!(held, [1, 3, 5, 6, 7, 8]);
        for wrong in ["", "3,", "8-5", "a", "-3", "1-2-3"] {
            assert!(wrong.parse::<Ranges>().is_err(), "{wrong}");
        }
    }

    #[test]
    fn positions_of_a_sequence() {
        let of = |text: &str, n, every| text.parse::<Positions>().unwrap().of(4, n, every);
        assert_eq!(of("completion", 3, 1), [3, 4, 5]); // they predict 4, 5, 6
        assert_eq!(of("completion", 3, 2), [3, 5]);
        assert_eq!(of("completion", 0, 1), [3]);
        assert_eq!(of("prompt", 3, 1), [0, 1, 2, 3]);
        assert_eq!(of("all", 2, 1), [0, 1, 2, 3, 4, 5]);
        assert_eq!(of("last", 3, 1), [6]);
        assert_eq!(of("0,5-90", 3, 1), [0, 5, 6]);
    }
}
