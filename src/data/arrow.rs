//! Arrow's IPC files, as Feather and Hugging Face's `datasets` write them: batches of columns become rows of JSON.

use std::{
    fs::File,
    io::{BufReader, Read, Seek},
    path::{Path, PathBuf},
};

use arrow_array::RecordBatch;
use arrow_ipc::reader::{FileReader, StreamReader};
use arrow_json::LineDelimitedWriter;
use serde_json::Value;

use super::jsonl::{NextRow, Row, UntilError};
use crate::error::json_fault;
use crate::{Error, Result};

/// A Feather file (version 2) begins with this; a stream, as `datasets` writes it, with [`STREAM_MAGIC`].
pub const FILE_MAGIC: &[u8] = b"ARROW1";
/// The mark before a stream's schema.
pub const STREAM_MAGIC: &[u8] = b"\xff\xff\xff\xff";

type Batches =
    Box<dyn Iterator<Item = std::result::Result<RecordBatch, arrow_schema::ArrowError>> + Send>;

/// Rows of an Arrow file, a batch in memory at a time.
pub struct ArrowRows {
    path: PathBuf,
    batches: Batches,
    rows: std::vec::IntoIter<Value>,
    row: usize,
}

impl ArrowRows {
    /// Opens `path`: a file or a stream.
    ///
    /// # Errors
    /// It cannot be read, or is no Arrow file.
    pub fn open(path: &Path) -> Result<UntilError<ArrowRows>> {
        let mut file = File::open(path).map_err(Error::io("read", path))?;
        let mut start = [0; FILE_MAGIC.len()];
        let read = file.read(&mut start).map_err(Error::io("read", path))?;
        file.rewind().map_err(Error::io("read", path))?;
        let file = BufReader::new(file);
        let batches: Batches = match start[..read] == *FILE_MAGIC {
            true => Box::new(FileReader::try_new(file, None).map_err(|e| refused(path, &e))?),
            false => Box::new(StreamReader::try_new(file, None).map_err(|e| refused(path, &e))?),
        };
        let rows = Vec::new().into_iter();
        Ok(UntilError::new(ArrowRows { path: path.into(), batches, rows, row: 0 }))
    }
}

impl NextRow for ArrowRows {
    fn next_row(&mut self) -> Result<Option<Row>> {
        loop {
            if let Some(value) = self.rows.next() {
                self.row += 1;
                let place = format!("{}, row {}", self.path.display(), self.row);
                let Value::Object(object) = value else {
                    return Err(Error::invalid(place, "a row of columns", "none", "report it"));
                };
                return Ok(Some(Row { place, line: self.row, object, untyped: false }));
            }
            let Some(batch) = self.batches.next() else { return Ok(None) };
            let batch = batch.map_err(|e| refused(&self.path, &e))?;
            self.rows = rows(&batch).map_err(|e| refused(&self.path, &e))?.into_iter();
        }
    }
}

/// The rows of a batch as JSON objects.
fn rows(batch: &RecordBatch) -> std::result::Result<Vec<Value>, arrow_schema::ArrowError> {
    let mut text = Vec::new();
    let mut writer = LineDelimitedWriter::new(&mut text);
    writer.write(batch)?;
    writer.finish()?;
    drop(writer);
    let values = serde_json::Deserializer::from_slice(&text).into_iter::<Value>();
    values
        .map(|value| value.map_err(|e| arrow_schema::ArrowError::JsonError(json_fault(&e))))
        .collect()
}

fn refused(path: &Path, error: &arrow_schema::ArrowError) -> Error {
    let got = error.to_string().replace('\n', " ");
    let advice = "write it again with pyarrow or datasets, or convert it to Parquet";
    Error::invalid(path.display().to_string(), "an Arrow (Feather) file", got, advice)
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use arrow_array::{ArrayRef, Int64Array, StringArray};
    use arrow_ipc::writer::{FileWriter, StreamWriter};

    use super::*;

    fn batch() -> RecordBatch {
        let prompts: ArrayRef = Arc::new(StringArray::from(vec![Some("a"), None, Some("c")]));
        let answers: ArrayRef = Arc::new(Int64Array::from(vec![1, 2, 3]));
        RecordBatch::try_from_iter([("prompt", prompts), ("answer", answers)]).unwrap()
    }

    #[test]
    fn files_and_streams_give_their_rows() {
        let (batch, dir) = (batch(), tempfile::tempdir().unwrap());
        let paths = [dir.path().join("a.feather"), dir.path().join("a.arrow")];
        let mut writer =
            FileWriter::try_new(File::create(&paths[0]).unwrap(), &batch.schema()).unwrap();
        writer.write(&batch).unwrap();
        writer.finish().unwrap();
        let mut writer =
            StreamWriter::try_new(File::create(&paths[1]).unwrap(), &batch.schema()).unwrap();
        writer.write(&batch).unwrap();
        writer.write(&batch).unwrap();
        writer.finish().unwrap();
        for (path, n) in paths.iter().zip([3, 6]) {
            let rows: Vec<Row> = ArrowRows::open(path).unwrap().map(Result::unwrap).collect();
            assert_eq!(rows.len(), n);
            assert_eq!(rows[0].object["prompt"], "a");
            assert!(rows[1].get("prompt").is_none() && rows[1].object["answer"] == 2);
            assert!(rows[2].place.ends_with(", row 3"), "{}", rows[2].place);
        }
    }

    #[test]
    fn what_is_damaged_is_an_error() {
        let file = tempfile::NamedTempFile::new().unwrap();
        for bytes in [&b"ARROW1\0\0oops"[..], b"\xff\xff\xff\xff\x10\0\0\0nothing", b""] {
            std::fs::write(file.path(), bytes).unwrap();
            let error = match ArrowRows::open(file.path()) {
                Ok(rows) => rows.collect::<Result<Vec<_>>>().map(|rows| rows.len()),
                Err(error) => Err(error),
            };
            let error = error.unwrap_err().to_string();
            assert!(error.contains("expected an Arrow (Feather) file"), "{error}");
        }
    }
}
