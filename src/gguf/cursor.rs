//! A cursor over bytes of unknown origin.

use std::fmt;

use super::{DAMAGED, shown};
use crate::{Error, Result};

/// What is being read, for errors.
#[derive(Clone, Copy)]
pub(super) enum Place<'a> {
    /// Magic, version, counts.
    Header,
    /// The n-th metadata key, from 0.
    Key(u64),
    /// The value of this key.
    Value(&'a str),
    /// The name of the n-th tensor, from 0.
    TensorName(u64),
    /// This tensor's entry in the table.
    Tensor(&'a str),
}

impl fmt::Display for Place<'_> {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        match self {
            Place::Header => f.write_str("header"),
            Place::Key(i) => write!(f, "metadata key number {i}"),
            Place::Value(key) => write!(f, "key '{}'", shown(key)),
            Place::TensorName(i) => write!(f, "name of tensor number {i}"),
            Place::Tensor(name) => write!(f, "tensor '{}'", shown(name)),
        }
    }
}

/// Reads little-endian values one after another and never beyond the end.
pub(super) struct Cursor<'a> {
    bytes: &'a [u8],
    at: usize,
    file: &'a str,
    /// What is being read now.
    pub place: Place<'a>,
}

impl<'a> Cursor<'a> {
    /// A cursor at the first of `bytes`, which come from `file`.
    pub fn new(bytes: &'a [u8], file: &'a str) -> Cursor<'a> {
        Cursor { bytes, at: 0, file, place: Place::Header }
    }

    /// The name of the file, for errors.
    pub fn file(&self) -> &'a str {
        self.file
    }

    /// Bytes read so far.
    pub fn position(&self) -> usize {
        self.at
    }

    /// Bytes not read yet.
    pub fn left(&self) -> u64 {
        (self.bytes.len() - self.at) as u64
    }

    /// The bytes read since `start`, a former [`Cursor::position`].
    pub fn since(&self, start: usize) -> &'a [u8] {
        &self.bytes[start..self.at]
    }

    /// An error about the present place.
    pub fn invalid(&self, expected: impl Into<String>, got: impl Into<String>) -> Error {
        Error::invalid(format!("{}: {}", self.file, self.place), expected, got, DAMAGED)
    }

    /// The next `n` bytes.
    pub fn take(&mut self, n: u64) -> Result<&'a [u8]> {
        if n > self.left() {
            return Err(Error::invalid(
                format!("{}: {} at byte {}", self.file, self.place, self.at),
                format!("{n} more bytes"),
                format!("{} before the end", self.left()),
                "the file is cut short or damaged: download the file again",
            ));
        }
        let start = self.at;
        self.at += n as usize;
        Ok(self.since(start))
    }

    /// The next `N` bytes, for `from_le_bytes`.
    pub fn fixed<const N: usize>(&mut self) -> Result<[u8; N]> {
        let mut out = [0; N];
        out.copy_from_slice(self.take(N as u64)?);
        Ok(out)
    }

    /// A u32.
    pub fn u32(&mut self) -> Result<u32> {
        self.fixed().map(u32::from_le_bytes)
    }

    /// A u64.
    pub fn u64(&mut self) -> Result<u64> {
        self.fixed().map(u64::from_le_bytes)
    }

    /// One byte that is 0 or 1.
    pub fn bool(&mut self) -> Result<bool> {
        match self.fixed()? {
            [0] => Ok(false),
            [1] => Ok(true),
            [other] => Err(self.invalid("a bool, 0 or 1", format!("byte {other}"))),
        }
    }

    /// A length and as many bytes of UTF-8.
    pub fn string(&mut self) -> Result<&'a str> {
        let length = self.u64()?;
        let bytes = self.take(length)?;
        std::str::from_utf8(bytes).map_err(|e| self.invalid("UTF-8", format!("a string where {e}")))
    }

    /// A count of things of at least `least_bytes` each, which must fit into what remains.
    pub fn count(&mut self, of: &str, least_bytes: u64) -> Result<u64> {
        let n = self.u64()?;
        let most = self.left() / least_bytes;
        if n > most {
            return Err(self.invalid(
                format!("at most {most} {of} in the {} bytes that remain", self.left()),
                n.to_string(),
            ));
        }
        Ok(n)
    }
}
