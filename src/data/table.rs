//! Rows of a data file, whatever its format: JSON lines, Parquet or CSV give the same JSON objects.

use std::{fs::File, io::Read, path::Path};

use super::{
    csv::CsvRows,
    jsonl::{JsonLines, Row},
    parquet::ParquetRows,
};
use crate::{Error, Result};

/// The rows of a file, one at a time; after an error the iteration ends.
pub type Rows = Box<dyn Iterator<Item = Result<Row>> + Send>;

/// What a file is made of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Format {
    /// One JSON object per line.
    JsonLines,
    /// Apache Parquet.
    Parquet,
    /// Values between commas, named by the first line.
    Csv,
    /// Values between tabs, named by the first line.
    Tsv,
}

/// Parquet files begin (and end) with these bytes.
const PARQUET_MAGIC: &[u8] = b"PAR1";

/// The format of a file: Parquet by its first bytes, CSV and TSV by the name's extension, else JSON lines.
///
/// # Errors
/// [`Error::Io`], and [`Error::Invalid`] for a file that is called `.parquet` and is none.
pub fn format(path: &Path) -> Result<Format> {
    let mut start = Vec::with_capacity(PARQUET_MAGIC.len());
    let file = File::open(path).map_err(Error::io("read", path))?;
    let read = file.take(PARQUET_MAGIC.len() as u64).read_to_end(&mut start);
    read.map_err(Error::io("read", path))?;
    if start == PARQUET_MAGIC {
        return Ok(Format::Parquet);
    }
    // `train.csv.gz` is CSV: what is compressed is told by the name within.
    let name =
        path.file_name().map(|n| n.to_string_lossy().to_ascii_lowercase()).unwrap_or_default();
    let name =
        [".gz", ".zst", ".zstd"].iter().find_map(|end| name.strip_suffix(end)).unwrap_or(&name);
    match name.rsplit_once('.').map(|(_, extension)| extension) {
        Some("parquet") => {
            let place = path.display().to_string();
            let got = format!("{:?}", String::from_utf8_lossy(&start));
            let advice = "fetch the file again, or give it its right extension";
            Err(Error::invalid(place, "a Parquet file, which begins with PAR1", got, advice))
        }
        Some("csv") => Ok(Format::Csv),
        Some("tsv") => Ok(Format::Tsv),
        _ => Ok(Format::JsonLines),
    }
}

/// Opens a data file of any [`Format`].
///
/// # Errors
/// The file cannot be read, or is not what it looks like.
pub fn open(path: &Path) -> Result<Rows> {
    Ok(match format(path)? {
        Format::JsonLines => Box::new(JsonLines::open(path)?),
        Format::Parquet => Box::new(ParquetRows::open(path)?),
        Format::Csv => Box::new(CsvRows::open(path, b',')?),
        Format::Tsv => Box::new(CsvRows::open(path, b'\t')?),
    })
}
