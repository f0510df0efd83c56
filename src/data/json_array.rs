//! A file that is one JSON array of objects, read one object at a time.

use std::io::{BufRead, Read};
use std::path::{Path, PathBuf};

use serde::Deserialize;
use serde_json::Value;

use super::jsonl::{MAX_LINE_BYTES, NextRow, Row, UntilError, kind};
use crate::error::json_fault;
use crate::{Error, Result};

/// The objects of an array.
pub struct JsonArray<R> {
    path: PathBuf,
    reader: R,
    row: usize,
}

impl<R: BufRead> JsonArray<R> {
    /// Reads `reader` from behind the array's `[`, calling it `path` in messages.
    pub fn new(reader: R, path: &Path) -> UntilError<JsonArray<R>> {
        UntilError::new(JsonArray { path: path.into(), reader, row: 0 })
    }

    /// The next byte that is no space, which stays where it is; none at the end.
    fn peek(&mut self) -> Result<Option<u8>> {
        next_byte(&mut self.reader).map_err(Error::io("read", &self.path))
    }
}

impl<R: BufRead> NextRow for JsonArray<R> {
    fn next_row(&mut self) -> Result<Option<Row>> {
        let place = format!("{}, element {}", self.path.display(), self.row + 1);
        let wrong = |expected: &str, got: String| {
            Error::invalid(&place, expected, got, "mend the file, or write one object per line")
        };
        let mut next = self.peek()?;
        if self.row > 0 && next == Some(b',') {
            self.reader.consume(1);
            next = self.peek()?;
        } else if self.row > 0 && next != Some(b']') {
            let got = next.map_or("the file's end".into(), |b| format!("{:?}", b as char));
            return Err(wrong("`,` or `]` behind an element", got));
        }
        match next {
            Some(b']') => return Ok(None),
            None => return Err(wrong("an element or `]`", "the file's end".into())),
            Some(_) => {}
        }
        let mut one = (&mut self.reader).take(MAX_LINE_BYTES as u64);
        // An object ends with its brace: nothing behind it is taken.
        let value = Value::deserialize(&mut serde_json::Deserializer::from_reader(&mut one));
        if one.limit() == 0 {
            let expected = format!("an element of at most {MAX_LINE_BYTES} bytes");
            return Err(wrong(&expected, "a longer one".into()));
        }
        self.row += 1;
        match value {
            Ok(Value::Object(object)) => {
                Ok(Some(Row { place, line: self.row, object, untyped: false }))
            }
            Ok(other) => Err(wrong("a JSON object", kind(&other))),
            Err(e) => Err(wrong("a JSON object", json_fault(&e))),
        }
    }
}

/// The next byte that is no space, left where it is.
pub(super) fn next_byte(reader: &mut impl BufRead) -> std::io::Result<Option<u8>> {
    loop {
        let buffer = reader.fill_buf()?;
        if buffer.is_empty() {
            return Ok(None);
        }
        let spaces = buffer.iter().take_while(|b| b.is_ascii_whitespace()).count();
        let found = buffer.get(spaces).copied();
        reader.consume(spaces);
        if found.is_some() {
            return Ok(found);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str) -> Result<Vec<String>> {
        JsonArray::new(text.as_bytes(), Path::new("d.json"))
            .map(|row| row.map(|row| Value::Object(row.object).to_string()))
            .collect()
    }

    #[test]
    fn elements_one_by_one() {
        assert!(read("  ]").unwrap().is_empty());
        let rows = read("\n {\"a\": [1, {\"b\": \"]},\"}]}\n,\n{\"a\":2} ]\n").unwrap();
        assert_eq!(rows, [r#"{"a":[1,{"b":"]},"}]}"#, r#"{"a":2}"#]);
    }

    #[test]
    fn what_is_wrong_is_named() {
        for (text, expected) in [
            ("{\"a\":1}", "element 2: expected `,` or `]` behind an element, got the file's end"),
            ("{\"a\":1} {", "element 2: expected `,` or `]` behind an element, got '{'"),
            ("1]", "element 1: expected a JSON object, got the number 1"),
            ("{\"a\": }]", "element 1: expected a JSON object, got text that is no JSON"),
            ("", "element 1: expected an element or `]`, got the file's end"),
        ] {
            let error = read(text).unwrap_err().to_string();
            assert!(error.contains(expected) && !error.contains('\n'), "{text}: {error}");
        }
    }
}
