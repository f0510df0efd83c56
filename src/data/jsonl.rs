//! JSON lines, read one bounded line at a time. Every error names the file and the line.

use std::{
    io::{BufRead, BufReader, Read},
    path::{Path, PathBuf},
};

use serde_json::{Map, Number, Value};

use super::compressed::{self, Plain};
use crate::error::json_fault;
use crate::{Error, Result};

/// Longest line that is read, in bytes. A row of 16 MiB is some two million tokens.
pub const MAX_LINE_BYTES: usize = 16 << 20;

/// A JSON object and where it stands.
#[derive(Debug)]
pub struct Row {
    /// `train.jsonl:12`, `train.parquet, row 12`.
    pub place: String,
    /// Line in the file (of Parquet and CSV the row), from 1.
    pub line: usize,
    /// The object.
    pub object: Map<String, Value>,
    /// Whether the format has texts alone, as CSV does, so that a number is one too.
    pub untyped: bool,
}

impl Row {
    /// An [`Error::Invalid`] about the field `name` of this row.
    pub fn invalid(
        &self,
        name: &str,
        expected: impl Into<String>,
        got: impl Into<String>,
        advice: impl Into<String>,
    ) -> Error {
        Error::invalid(format!("{}: `{name}`", self.place), expected, got, advice)
    }

    /// The field's value; JSON's null counts as absent.
    pub fn get(&self, name: &str) -> Option<&Value> {
        self.object.get(name).filter(|value| !value.is_null())
    }

    /// The value of a field, or of one within structs: `reward_model.ground_truth`; null counts as absent.
    pub fn at(&self, path: &str) -> Option<&Value> {
        if let Some(value) = self.get(path) {
            return Some(value);
        }
        let (first, rest) = path.split_once('.')?;
        let mut value = self.get(first)?;
        for name in rest.split('.') {
            value = value.get(name)?;
        }
        Some(value).filter(|value| !value.is_null())
    }

    /// Whether the field that `path` leads to is there and null.
    pub fn is_null(&self, path: &str) -> bool {
        let mut value = self.object.get(path);
        if value.is_none()
            && let Some((first, rest)) = path.split_once('.')
        {
            let first = self.object.get(first);
            value = rest.split('.').fold(first, |value, name| value?.get(name));
        }
        value.is_some_and(Value::is_null)
    }

    /// The names of the fields, those of structs with a dot, for messages.
    pub fn keys(&self) -> String {
        let names = self.object.iter().flat_map(|(name, value)| match value {
            Value::Object(fields) => fields.keys().map(|k| format!("{name}.{k}")).collect(),
            _ => vec![name.clone()],
        });
        let one_line = |name: String| shorten(&name.replace(char::is_control, " "), 60);
        let names: Vec<_> = names.take(30).map(one_line).collect();
        if names.is_empty() { "no field".into() } else { names.join(", ") }
    }
}

/// Reads rows one after another.
pub(super) trait NextRow {
    /// None at the end.
    fn next_row(&mut self) -> Result<Option<Row>>;
}

/// The rows of a reader, which ends with its first error.
pub(super) struct UntilError<R>(Option<R>);

impl<R: NextRow> UntilError<R> {
    pub(super) fn new(reader: R) -> UntilError<R> {
        UntilError(Some(reader))
    }
}

impl<R: NextRow> Iterator for UntilError<R> {
    type Item = Result<Row>;

    fn next(&mut self) -> Option<Result<Row>> {
        let row = self.0.as_mut()?.next_row().transpose();
        if !matches!(row, Some(Ok(_))) {
            self.0 = None;
        }
        row
    }
}

/// The rows of a JSON-lines source. Blank lines are skipped; after a line that is no
/// JSON object the next one follows, after any other error the iteration ends.
#[derive(Debug)]
pub struct JsonLines<R> {
    path: PathBuf,
    reader: R,
    line: usize,
    done: bool,
}

impl JsonLines<BufReader<Plain>> {
    /// Opens `path`, compressed or not.
    pub fn open(path: &Path) -> Result<Self> {
        Ok(JsonLines::new(BufReader::new(compressed::open(path)?), path))
    }
}

impl<R: BufRead> JsonLines<R> {
    /// Reads `reader`, calling it `path` in messages.
    pub fn new(reader: R, path: &Path) -> Self {
        JsonLines { path: path.to_path_buf(), reader, line: 0, done: false }
    }

    fn next_row(&mut self) -> Result<Option<Row>> {
        loop {
            let mut bytes = Vec::new();
            let limit = MAX_LINE_BYTES as u64 + 1;
            let read = self.reader.by_ref().take(limit).read_until(b'\n', &mut bytes);
            self.done = true; // until it is known that the next line can be found
            if read.map_err(Error::io("read", &self.path))? == 0 {
                return Ok(None);
            }
            self.line += 1;
            let place = format!("{}:{}", self.path.display(), self.line);
            if bytes.len() > MAX_LINE_BYTES {
                let expected = format!("a line of at most {MAX_LINE_BYTES} bytes");
                let advice = "write one JSON object per line and split long rows";
                return Err(Error::invalid(place, expected, "a longer one", advice));
            }
            self.done = false;
            let bytes = if self.line == 1 { strip_bom(&bytes) } else { &bytes };
            let text = std::str::from_utf8(bytes).map_err(|e| {
                let got = format!("an invalid byte at column {}", e.valid_up_to() + 1);
                Error::invalid(&place, "UTF-8", got, "convert the file to UTF-8")
            })?;
            if text.trim().is_empty() {
                continue;
            }
            return match serde_json::from_str(text) {
                Ok(Value::Object(object)) => {
                    Ok(Some(Row { place, line: self.line, object, untyped: false }))
                }
                Ok(other) => {
                    Err(Error::invalid(place, "a JSON object", kind(&other), "write {..} per line"))
                }
                Err(e) => {
                    if let Some(word) = python_word(text, e.column()) {
                        let got = format!("{word} at column {}", e.column());
                        let advice = "JSON has no such value: write null, or drop the row";
                        return Err(Error::invalid(place, "a JSON object", got, advice));
                    }
                    let got = json_fault(&e).replace(" at line 1 column ", " at column ");
                    let advice = "write one complete object per line";
                    Err(Error::invalid(place, "a JSON object", got, advice))
                }
            };
        }
    }
}

impl<R: BufRead> Iterator for JsonLines<R> {
    type Item = Result<Row>;

    fn next(&mut self) -> Option<Result<Row>> {
        if self.done {
            return None;
        }
        self.next_row().transpose()
    }
}

/// Python's json module writes these, which are no JSON: the one that stands around `column` (from 1).
fn python_word(text: &str, column: usize) -> Option<&'static str> {
    let near = column.saturating_sub(1).min(text.len());
    ["NaN", "-Infinity", "Infinity", "None"].into_iter().find(|word| {
        (near.saturating_sub(word.len())..=near)
            .any(|at| text.as_bytes()[at..].starts_with(word.as_bytes()))
    })
}

fn strip_bom(bytes: &[u8]) -> &[u8] {
    bytes.strip_prefix(b"\xef\xbb\xbf").unwrap_or(bytes)
}

/// A number as text. One without a fraction is written as the whole number that it is: pandas makes 18 a
/// double, 18.0, in a column where a value is missing.
pub fn number_text(number: &Number) -> String {
    match number.as_f64().filter(|x| number.is_f64() && x.fract() == 0.0) {
        // Beside 2^53 a double is not one number any more.
        Some(x) if x.abs() < (1u64 << 53) as f64 => (x as i64).to_string(),
        _ => number.to_string(),
    }
}

/// A value in the words of a message: `the text "abc"`, `a list of 3`.
pub fn kind(value: &Value) -> String {
    match value {
        Value::Null => "null".into(),
        Value::Bool(b) => b.to_string(),
        Value::Number(n) => format!("the number {n}"),
        Value::String(s) => format!("the text {:?}", shorten(s, 40)),
        Value::Array(a) => format!("a list of {}", a.len()),
        Value::Object(_) => "an object".into(),
    }
}

/// The first `limit` characters, and `…` where there are more.
pub fn shorten(text: &str, limit: usize) -> String {
    match text.char_indices().nth(limit) {
        Some((end, _)) => format!("{}…", &text[..end]),
        None => text.into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(bytes: &[u8]) -> Result<Vec<usize>> {
        JsonLines::new(bytes, Path::new("d.jsonl")).map(|row| row.map(|row| row.line)).collect()
    }

    #[test]
    fn blank_lines_bom_crlf_and_a_missing_last_newline_are_fine() {
        assert_eq!(read(b"\xef\xbb\xbf{}\r\n\n  \r\n{\"a\":1}").unwrap(), [1, 4]);
        assert!(read(b"").unwrap().is_empty());
    }

    #[test]
    fn errors_name_file_and_line_in_one_line() {
        let long = [vec![b'\n'], vec![b' '; MAX_LINE_BYTES + 1]].concat();
        for (bytes, expected) in [
            (&b"\n[1]\n"[..], "d.jsonl:2: expected a JSON object, got a list of 1"),
            (
                b"{}\n{\"a\": }",
                "d.jsonl:2: expected a JSON object, got text that is no JSON (expected value at column 7)",
            ),
            (b"{}\n{\"a\":\"\xff\"}", "d.jsonl:2: expected UTF-8, got an invalid byte at column 7"),
            (
                b"{\"a\":1e999}",
                "d.jsonl:1: expected a JSON object, got text that is no JSON (number out of range",
            ),
            (&long, "d.jsonl:2: expected a line of at most 16777216 bytes"),
        ] {
            let error = read(bytes).unwrap_err().to_string();
            assert!(error.starts_with(expected), "{error}");
            assert!(!error.contains('\n'), "{error}");
        }
    }

    #[test]
    fn a_bad_line_does_not_hide_those_after_it() {
        let text = b"{\"a\":1}\n{oops\n[]\n\xff\n{\"b\":2}\n";
        let rows: Vec<bool> =
            JsonLines::new(&text[..], Path::new("d")).map(|row| row.is_ok()).collect();
        assert_eq!(rows, [true, false, false, false, true]);
        let long = [vec![b' '; MAX_LINE_BYTES + 1], b"\n{}\n".to_vec()].concat();
        let rows: Vec<bool> =
            JsonLines::new(&long[..], Path::new("d")).map(|row| row.is_ok()).collect();
        assert_eq!(rows, [false], "where the next line begins is not known");
    }

    #[test]
    fn deep_nesting_is_an_error_and_no_overflow() {
        assert!(read("[".repeat(100_000).as_bytes()).is_err());
    }
}
