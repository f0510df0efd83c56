//! Rows of a data file, whatever its format, or of a folder of them: JSON lines or an array, Parquet, Arrow, CSV give
//! the same JSON objects.

use std::{
    fs::File,
    io::{BufRead, BufReader, Read},
    path::{Path, PathBuf},
};

use super::{
    arrow::{ArrowRows, FILE_MAGIC, STREAM_MAGIC},
    compressed,
    csv::CsvRows,
    json_array::{JsonArray, next_byte},
    jsonl::{JsonLines, Row},
    parquet::ParquetRows,
    usual,
};
use crate::{Error, Result};

/// The rows of a file, one at a time; after an error the iteration ends.
pub type Rows = Box<dyn Iterator<Item = Result<Row>> + Send>;

/// What a file is made of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Format {
    /// One JSON object per line, or an array of objects.
    Json,
    /// Arrow's IPC format: Feather, and what `datasets` keeps.
    Arrow,
    /// Apache Parquet.
    Parquet,
    /// Values between commas, named by the first line.
    Csv,
    /// Values between tabs, named by the first line.
    Tsv,
}

/// Parquet files begin (and end) with these bytes.
const PARQUET_MAGIC: &[u8] = b"PAR1";

/// The format of a file: Parquet and Arrow by their first bytes, CSV and TSV by the name's extension, else JSON.
///
/// # Errors
/// [`Error::Io`], and [`Error::Invalid`] for a file that is called `.parquet` and is none.
pub fn format(path: &Path) -> Result<Format> {
    let mut start = Vec::with_capacity(FILE_MAGIC.len());
    let file = File::open(path).map_err(Error::io("read", path))?;
    let read = file.take(FILE_MAGIC.len() as u64).read_to_end(&mut start);
    read.map_err(Error::io("read", path))?;
    if start.starts_with(PARQUET_MAGIC) {
        return Ok(Format::Parquet);
    }
    if start == FILE_MAGIC || start.starts_with(STREAM_MAGIC) {
        return Ok(Format::Arrow);
    }
    // `train.csv.gz` is CSV: what is compressed is told by the name within.
    let name =
        path.file_name().map(|n| n.to_string_lossy().to_ascii_lowercase()).unwrap_or_default();
    let name =
        [".gz", ".zst", ".zstd"].iter().find_map(|end| name.strip_suffix(end)).unwrap_or(&name);
    match name.rsplit_once('.').map(|(_, extension)| extension) {
        Some("parquet") => {
            let place = path.display().to_string();
            let first = &start[..start.len().min(PARQUET_MAGIC.len())];
            let got = format!("{:?}", String::from_utf8_lossy(first));
            let advice = "fetch the file again, or give it its right extension";
            Err(Error::invalid(place, "a Parquet file, which begins with PAR1", got, advice))
        }
        Some("csv") => Ok(Format::Csv),
        Some("tsv") => Ok(Format::Tsv),
        _ => Ok(Format::Json),
    }
}

/// Opens a data file of any [`Format`], or all files of a folder one after another, under the usual names of columns.
///
/// # Errors
/// The file cannot be read, or is not what it looks like; a folder without data.
pub fn open(path: &Path) -> Result<Rows> {
    let files = files(path)?;
    if let [file] = files.as_slice() {
        return open_file(file);
    }
    let rows = files.into_iter().flat_map(|file| match open_file(&file) {
        Ok(rows) => rows,
        Err(error) => Box::new(std::iter::once(Err(error))),
    });
    Ok(Box::new(rows))
}

fn open_file(path: &Path) -> Result<Rows> {
    let rows: Rows = match format(path)? {
        Format::Json => open_json(path)?,
        Format::Parquet => Box::new(ParquetRows::open(path)?),
        Format::Arrow => Box::new(ArrowRows::open(path)?),
        Format::Csv => Box::new(CsvRows::open(path, b',')?),
        Format::Tsv => Box::new(CsvRows::open(path, b'\t')?),
    };
    Ok(Box::new(rows.map(|row| row.map(usual::renamed))))
}

/// An array where the first character is its bracket, else lines.
fn open_json(path: &Path) -> Result<Rows> {
    let mut reader = BufReader::new(compressed::open(path)?);
    if reader.fill_buf().map_err(Error::io("read", path))?.starts_with(b"[") {
        reader.consume(1);
        // `[` and a number are a line of JSON lines that is no object, and told as such.
        if matches!(next_byte(&mut reader).map_err(Error::io("read", path))?, Some(b'{' | b']')) {
            return Ok(Box::new(JsonArray::new(reader, path)));
        }
        return Ok(Box::new(JsonLines::open(path)?));
    }
    Ok(Box::new(JsonLines::new(reader, path)))
}

/// Endings of data files, within those of compressed ones.
const ENDINGS: [&str; 9] =
    ["jsonl", "json", "ndjson", "parquet", "csv", "tsv", "arrow", "feather", "ipc"];
/// Files of JSON that Hugging Face keeps beside data.
const BESIDE: [&str; 4] =
    ["dataset_info.json", "dataset_dict.json", "dataset_infos.json", "state.json"];
/// Folders within one that hold its data, in the layouts of hub and `datasets`.
const WITHIN: [&str; 2] = ["train", "data"];

/// The data files of a path: itself, or what a folder holds, by name. Of splits side by side those called train; a folder
/// without files may have them in `train/` or `data/`, as Hugging Face's do.
///
/// # Errors
/// A folder without data files, or one that cannot be read.
pub fn files(path: &Path) -> Result<Vec<PathBuf>> {
    if !path.is_dir() {
        return Ok(vec![path.into()]);
    }
    let mut found = Vec::new();
    for entry in std::fs::read_dir(path).map_err(Error::io("read folder", path))? {
        let file = entry.map_err(Error::io("read folder", path))?.path();
        if file.is_file() && is_data(&file) {
            found.push(file);
        }
    }
    found.sort();
    let of_train = |file: &PathBuf| name(file).starts_with("train");
    if found.iter().any(of_train) {
        found.retain(of_train);
    }
    if !found.is_empty() {
        return Ok(found);
    }
    if let Some(within) = WITHIN.iter().map(|name| path.join(name)).find(|path| path.is_dir()) {
        return files(&within);
    }
    let expected = format!("files that end in .{}", ENDINGS.join(", ."));
    let advice = "give a folder of shards, or the files with commas between";
    Err(Error::invalid(path.display().to_string(), expected, "none", advice))
}

fn name(file: &Path) -> String {
    file.file_name().map(|n| n.to_string_lossy().to_ascii_lowercase()).unwrap_or_default()
}

fn is_data(file: &Path) -> bool {
    let name = name(file);
    let plain = [".gz", ".zst", ".zstd"].iter().find_map(|end| name.strip_suffix(end));
    let ending = plain.unwrap_or(&name).rsplit_once('.').map(|(_, ending)| ending);
    ending.is_some_and(|ending| ENDINGS.contains(&ending)) && !BESIDE.contains(&name.as_str())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn folders_hold_the_files_of_their_training_split() {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        assert!(files(dir.path()).unwrap_err().to_string().contains(".parquet"));
        std::fs::create_dir(at("data")).unwrap();
        for name in ["data/b.jsonl", "data/a.jsonl.gz", "data/README.md", "data/state.json"] {
            std::fs::write(at(name), "").unwrap();
        }
        assert_eq!(files(dir.path()).unwrap(), [at("data/a.jsonl.gz"), at("data/b.jsonl")]);
        for name in ["data/train-1.csv", "data/test-1.csv", "data/train-0.csv"] {
            std::fs::write(at(name), "a\n1\n").unwrap();
        }
        assert_eq!(files(dir.path()).unwrap(), [at("data/train-0.csv"), at("data/train-1.csv")]);
        assert_eq!(open(dir.path()).unwrap().map(Result::unwrap).count(), 2);
        assert_eq!(files(&at("data/b.jsonl")).unwrap(), [at("data/b.jsonl")]);
    }

    #[test]
    fn an_array_and_lines_give_the_same_rows() {
        let dir = tempfile::tempdir().unwrap();
        for (name, text) in
            [("a.json", "[{\"a\": 1},\n {\"a\": 2}]"), ("b.json", "{\"a\": 1}\n{\"a\": 2}\n")]
        {
            let path = dir.path().join(name);
            std::fs::write(&path, text).unwrap();
            let rows: Vec<Row> = open(&path).unwrap().map(Result::unwrap).collect();
            assert_eq!((rows.len(), &rows[1].object["a"]), (2, &2.into()), "{name}");
        }
        let list = dir.path().join("c.jsonl");
        std::fs::write(&list, "[1]\n").unwrap();
        let error = open(&list).unwrap().next().unwrap().unwrap_err().to_string();
        assert!(error.contains("expected a JSON object, got a list of 1"), "{error}");
    }
}
