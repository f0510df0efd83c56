//! Importance matrices: the mean square of every input of a weight, by which quantisers weigh its columns.
//!
//! Read in both forms of `llama-imatrix`. GGUF: `general.type` is `imatrix`; for a weight W there are
//! `W.in_sum2: [n_in, n]`, sums of squares, and `W.counts: [1, n]`, how many were summed (n: experts, else
//! 1). The old binary form: entry count; per entry the name, the number of calls, the values times that
//! number; little endian, lengths in i32.

use std::collections::HashMap;
use std::path::Path;

use crate::gguf::GgufFile;
use crate::{Error, Result};

const FORM: &str = "an importance matrix of llama-imatrix (GGUF or .dat)";

/// Importance of the columns of each weight.
#[derive(Debug, Default)]
pub struct Imatrix {
    columns: HashMap<String, Vec<f32>>,
}

impl Imatrix {
    /// Reads a file in either form.
    ///
    /// # Errors
    /// When it is in neither, cut short, or holds a number that is negative or not finite.
    pub fn read(path: &Path) -> Result<Imatrix> {
        let mut magic = [0; 4];
        {
            use std::io::Read;
            let mut file = std::fs::File::open(path).map_err(Error::io("open", path))?;
            file.read_exact(&mut magic).map_err(Error::io("read", path))?;
        }
        let columns = if &magic == b"GGUF" {
            from_gguf(&GgufFile::open(path)?)?
        } else {
            let bytes = std::fs::read(path).map_err(Error::io("read", path))?;
            from_binary(&bytes).map_err(|got| {
                Error::invalid(path.display().to_string(), FORM, got, "make it again")
            })?
        };
        let bad = |x: &f32| !(x.is_finite() && *x >= 0.0);
        if let Some((name, x)) =
            columns.iter().find_map(|(name, c)| Some((name, c.iter().find(|x| bad(x))?)))
        {
            return Err(Error::invalid(
                format!("{}: {name}", path.display()),
                "mean squares of 0 or more",
                x.to_string(),
                "make it again",
            ));
        }
        Ok(Imatrix { columns })
    }

    /// Number of weights it knows.
    pub fn len(&self) -> usize {
        self.columns.len()
    }

    /// Whether it knows none.
    pub fn is_empty(&self) -> bool {
        self.columns.is_empty()
    }

    /// Importance of a weight's `n_in` columns; none when the matrix does not know the weight.
    ///
    /// # Errors
    /// When it knows a weight of this name and another size.
    pub(super) fn of(&self, weight: &str, n_in: usize) -> Result<Option<&[f32]>> {
        match self.columns.get(weight) {
            None => Ok(None),
            Some(columns) if columns.len() == n_in => Ok(Some(columns)),
            // llama.cpp passes over this one, which always has another size where it is there at all.
            Some(_) if weight == "token_embd.weight" => Ok(None),
            Some(columns) => Err(Error::invalid(
                format!("--imatrix: {weight}"),
                format!("{n_in} columns"),
                columns.len().to_string(),
                "use the importance matrix of this model",
            )),
        }
    }
}

fn from_gguf(file: &GgufFile) -> Result<HashMap<String, Vec<f32>>> {
    if file.find::<&str>("general.type")? != Some("imatrix") {
        let place = format!("{}: key 'general.type'", file.name());
        return Err(Error::invalid(place, "'imatrix'", "another GGUF file", "give an imatrix"));
    }
    let mut columns = HashMap::new();
    for sums in file.tensors() {
        let Some(weight) = sums.name.strip_suffix(".in_sum2") else { continue };
        let place = || format!("{}: tensor '{}'", file.name(), sums.name);
        let counts = file.tensor(&format!("{weight}.counts")).ok_or_else(|| {
            Error::invalid(place(), format!("{weight}.counts beside it"), "none", "make it again")
        })?;
        let n_in = sums.shape[0] as usize;
        let n = (sums.n_elements() / sums.shape[0]) as usize;
        let counts = file.dequantize(counts)?;
        if counts.len() != n {
            let got = format!("{} of {n}", counts.len());
            return Err(Error::invalid(place(), "one count per matrix", got, "make it again"));
        }
        let mut values = file.dequantize(sums)?;
        for (values, count) in values.chunks_mut(n_in).zip(counts) {
            // Experts that saw nothing weigh all columns alike.
            for x in values {
                *x = if count > 0.0 { *x / count } else { 1.0 };
            }
        }
        columns.insert(weight.to_owned(), values);
    }
    Ok(columns)
}

/// The old form; an error is what was found in place of it.
fn from_binary(bytes: &[u8]) -> Result<HashMap<String, Vec<f32>>, String> {
    let mut from = Binary { bytes, at: 0 };
    let mut columns = HashMap::new();
    for _ in 0..from.count()? {
        let length = from.count()?;
        let name = String::from_utf8_lossy(from.take(length)?).into_owned();
        let calls = from.count()?.max(1);
        let n = from.count()?;
        let values = from.take(n.saturating_mul(4))?.as_chunks::<4>().0;
        let mean = |bytes: &[u8; 4]| f32::from_le_bytes(*bytes) / calls as f32;
        columns.insert(name, values.iter().map(mean).collect());
    }
    if columns.is_empty() {
        return Err("no entries".into());
    }
    Ok(columns)
}

/// Bytes read one after another, never beyond the end.
struct Binary<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl<'a> Binary<'a> {
    fn take(&mut self, n: usize) -> Result<&'a [u8], String> {
        let rest = &self.bytes[self.at..];
        let part = rest.get(..n);
        self.at += n.min(rest.len());
        part.ok_or_else(|| format!("{n} bytes asked for where {} are left", rest.len()))
    }

    fn count(&mut self) -> Result<usize, String> {
        let n = i32::from_le_bytes(self.take(4)?.try_into().expect("4 bytes"));
        usize::try_from(n).map_err(|_| format!("a count of {n}"))
    }
}
