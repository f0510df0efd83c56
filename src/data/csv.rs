//! CSV with a header: a row becomes an object of texts, empty values null.

use std::{
    io::{self, Read},
    path::{Path, PathBuf},
    sync::Arc,
    sync::atomic::{AtomicUsize, Ordering},
};

use ::csv::{ErrorKind, Reader, ReaderBuilder, StringRecord};
use serde_json::{Map, Value};

use super::compressed::{self, Plain};
use super::jsonl::{MAX_LINE_BYTES, NextRow, Row, UntilError, shorten};
use crate::{Error, Result};

/// Rows of a CSV file. Values are texts; an empty one is null. Quotes as in RFC 4180.
#[derive(Debug)]
pub struct CsvRows<R> {
    path: PathBuf,
    reader: Reader<Bounded<R>>,
    names: Vec<String>,
    used: Arc<AtomicUsize>,
    row: usize,
}

impl CsvRows<Plain> {
    /// Opens `path`, compressed or not, and reads its header.
    pub fn open(path: &Path, delimiter: u8) -> Result<UntilError<Self>> {
        CsvRows::new(compressed::open(path)?, path, delimiter)
    }
}

impl<R: Read> CsvRows<R> {
    /// Reads `source`, calling it `path` in messages.
    ///
    /// # Errors
    /// A header that cannot be read, has an empty or a repeated name.
    pub fn new(source: R, path: &Path, delimiter: u8) -> Result<UntilError<Self>> {
        let used = Arc::new(AtomicUsize::new(0));
        let bounded = Bounded { inner: source, used: used.clone() };
        let mut reader = ReaderBuilder::new().delimiter(delimiter).from_reader(bounded);
        let header = reader.headers().map_err(|e| refused(path, 0, e))?;
        let names: Vec<String> = header.iter().map(|name| name.trim().to_owned()).collect();
        for (i, name) in names.iter().enumerate() {
            // pandas writes its index under no name, before all others.
            let is_index = i == 0 && name.is_empty() && names.len() > 1;
            if (name.is_empty() && !is_index) || names[..i].contains(name) {
                let place = place(path, 0);
                let got = format!("{:?} in column {}", shorten(name, 40), i + 1);
                let advice = "name every column once in the first line";
                return Err(Error::invalid(place, "column names, each once", got, advice));
            }
        }
        let path = path.to_path_buf();
        Ok(UntilError::new(CsvRows { path, reader, names, used, row: 0 }))
    }
}

impl<R: Read> NextRow for CsvRows<R> {
    fn next_row(&mut self) -> Result<Option<Row>> {
        let mut record = StringRecord::new();
        // What was read ahead stays below the reader's buffer, which is small beside the bound.
        self.used.store(0, Ordering::Relaxed);
        self.row += 1;
        let read = self.reader.read_record(&mut record);
        if !read.map_err(|e| refused(&self.path, self.row, e))? {
            return Ok(None);
        }
        let values = self.names.iter().zip(record.iter()).filter(|(name, _)| !name.is_empty());
        let object: Map<String, Value> = values
            .map(|(name, text)| {
                (name.clone(), if text.is_empty() { Value::Null } else { text.into() })
            })
            .collect();
        Ok(Some(Row { place: place(&self.path, self.row), line: self.row, object, untyped: true }))
    }
}

/// An unclosed quote would take the rest of a file for one value: reading for one row is bounded.
#[derive(Debug)]
struct Bounded<R> {
    inner: R,
    used: Arc<AtomicUsize>,
}

impl<R: Read> Read for Bounded<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let read = self.inner.read(buffer)?;
        if self.used.fetch_add(read, Ordering::Relaxed) + read > MAX_LINE_BYTES {
            return Err(io::Error::new(io::ErrorKind::InvalidData, TooLong));
        }
        Ok(read)
    }
}

#[derive(Debug, thiserror::Error)]
#[error("a longer one, perhaps for a quote that is not closed")]
struct TooLong;

/// Rows are counted, for a quoted value may hold line breaks; row 0 is the header.
fn place(path: &Path, row: usize) -> String {
    match row {
        0 => format!("{}, header", path.display()),
        row => format!("{}, row {row}", path.display()),
    }
}

fn refused(path: &Path, row: usize, error: ::csv::Error) -> Error {
    let place = place(path, row);
    match error.into_kind() {
        ErrorKind::Io(e) if e.get_ref().is_some_and(|e| e.is::<TooLong>()) => {
            let expected = format!("a row of at most {MAX_LINE_BYTES} bytes");
            Error::invalid(place, expected, TooLong.to_string(), "close the quotes of this row")
        }
        ErrorKind::Io(e) => Error::io("read", path)(e),
        ErrorKind::Utf8 { err, .. } => {
            let got = format!("an invalid byte in column {}", err.field() + 1);
            Error::invalid(place, "UTF-8", got, "convert the file to UTF-8")
        }
        ErrorKind::UnequalLengths { expected_len, len, .. } => {
            let advice = "put values that hold a comma or a quote into double quotes";
            Error::invalid(
                place,
                format!("{expected_len} values, as in the first line"),
                len.to_string(),
                advice,
            )
        }
        other => Error::invalid(place, "CSV", format!("{other:?}"), "check its quotes"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(bytes: &[u8]) -> Result<Vec<Row>> {
        CsvRows::new(bytes, Path::new("d.csv"), b',')?.collect()
    }

    #[test]
    fn rows_are_objects_of_texts() {
        let rows =
            read(b"\xef\xbb\xbfquestion, answer\r\n\"1, \"\"2\"\"\nor 3?\",2\nx,\n").unwrap();
        let texts: Vec<String> =
            rows.iter().map(|row| serde_json::to_string(&row.object).unwrap()).collect();
        assert_eq!(
            texts,
            [r#"{"question":"1, \"2\"\nor 3?","answer":"2"}"#, r#"{"question":"x","answer":null}"#]
        );
        assert_eq!((rows[0].line, rows[1].place.as_str()), (1, "d.csv, row 2"));
        assert!(read(b"").unwrap().is_empty());
    }

    #[test]
    fn bad_files_are_named_with_their_line() {
        for (text, expected) in [
            (
                &b"a,a\n1,2"[..],
                "d.csv, header: expected column names, each once, got \"a\" in column 2",
            ),
            (b"a,\n1,2", "d.csv, header: expected column names, each once, got \"\" in column 2"),
            (b"a,b\n1,2\n3\n", "d.csv, row 2: expected 2 values, as in the first line, got 1"),
            (b"a,b\n1,\xff\n", "d.csv, row 1: expected UTF-8, got an invalid byte in column 2"),
        ] {
            let error = read(text).unwrap_err().to_string();
            assert!(error.starts_with(expected), "{error}");
        }
        let open = [b"a\n\"".to_vec(), vec![b'x'; MAX_LINE_BYTES + (1 << 16)]].concat();
        let error = read(&open).unwrap_err().to_string();
        assert!(error.contains("a row of at most") && error.contains("quote"), "{error}");
    }
}
