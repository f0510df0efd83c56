//! Amounts of memory as an option or `config.toml` names them.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::{Error, Result};

/// Units from the largest, and what each holds. A bare letter means the binary unit.
const UNITS: [(&str, u64); 12] = [
    ("TiB", 1 << 40),
    ("GiB", 1 << 30),
    ("MiB", 1 << 20),
    ("KiB", 1 << 10),
    ("TB", 1_000_000_000_000),
    ("GB", 1_000_000_000),
    ("MB", 1_000_000),
    ("KB", 1_000),
    ("T", 1 << 40),
    ("G", 1 << 30),
    ("M", 1 << 20),
    ("K", 1 << 10),
];

/// An amount of memory: `12GiB`, `800MiB`, `1.5G`, `12GB` (decimal), `4096B`, `0`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct ByteSize(pub u64);

impl ByteSize {
    /// Bytes, as sizes in memory are counted.
    pub fn bytes(self) -> usize {
        usize::try_from(self.0).unwrap_or(usize::MAX)
    }
}

impl FromStr for ByteSize {
    type Err = Error;

    fn from_str(text: &str) -> Result<ByteSize> {
        let wrong = |got: &str| {
            let advice = "write the unit out; a G is a GiB";
            Error::invalid("a memory size", "a number and KiB, MiB, GiB or TiB", got, advice)
        };
        let text = text.trim();
        let digits = text.find(|c: char| !(c.is_ascii_digit() || c == '.')).unwrap_or(text.len());
        let (number, unit) = (&text[..digits], text[digits..].trim_start());
        let value: f64 = number.parse().map_err(|_| wrong(text))?;
        let bytes = match UNITS.iter().find(|(name, _)| name.eq_ignore_ascii_case(unit)) {
            Some((_, size)) => value * *size as f64,
            None if unit.eq_ignore_ascii_case("b") => value,
            // Of nothing there is no unit to mistake.
            None if unit.is_empty() && value == 0.0 => 0.0,
            None => return Err(wrong(text)),
        };
        // Beyond it an f64 skips numbers; no machine has so much.
        if bytes >= (1u64 << 53) as f64 {
            return Err(wrong(text));
        }
        Ok(ByteSize(bytes.round() as u64))
    }
}

impl TryFrom<String> for ByteSize {
    type Error = Error;

    fn try_from(text: String) -> Result<ByteSize> {
        text.parse()
    }
}

impl From<ByteSize> for String {
    fn from(size: ByteSize) -> String {
        size.to_string()
    }
}

impl fmt::Display for ByteSize {
    /// In the largest unit that gives a whole number.
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        let whole = UNITS[..4].iter().find(|(_, size)| self.0 > 0 && self.0.is_multiple_of(*size));
        match whole {
            Some((unit, size)) => write!(f, "{}{unit}", self.0 / size),
            None => write!(f, "{}B", self.0),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_read() {
        for (text, bytes) in [
            ("12GiB", 12 << 30),
            ("800MiB", 800 << 20),
            ("800 mib", 800 << 20),
            ("1.5G", 3 << 29),
            ("2T", 2 << 40),
            ("12GB", 12_000_000_000),
            ("4096B", 4096),
            ("1k", 1024),
            ("0", 0),
            ("0MiB", 0),
        ] {
            assert_eq!(text.parse::<ByteSize>().unwrap(), ByteSize(bytes), "{text}");
        }
    }

    #[test]
    fn what_is_no_size_is_refused() {
        for text in ["", "12", "GiB", "-1GiB", "1e3MiB", "1.2.3GiB", "12 Gib it", "9000000TiB"] {
            let error = text.parse::<ByteSize>().expect_err(text).to_string();
            assert!(error.contains("GiB"), "{text}: {error}");
        }
    }

    #[test]
    fn a_size_is_written_as_it_is_read() {
        for (bytes, text) in
            [(12 << 30, "12GiB"), (800 << 20, "800MiB"), (1, "1B"), (1025, "1025B"), (0, "0B")]
        {
            assert_eq!(ByteSize(bytes).to_string(), text);
            assert_eq!(text.parse::<ByteSize>().unwrap(), ByteSize(bytes));
        }
    }
}
