//! Parquet: every row becomes the JSON object that JSON lines would hold, nested lists and structs included.
//!
//! Texts that are not marked as such are taken as text where they are UTF-8; other bytes count as absent.
//! Decimals, dates and times become texts.

use std::{
    fs::File,
    path::{Path, PathBuf},
};

use ::parquet::{
    basic::{ConvertedType, Repetition, Type as Physical},
    errors::ParquetError,
    file::{
        metadata::ParquetMetaData, reader::FileReader, serialized_reader::SerializedFileReader,
    },
    record::{Field, reader::RowIter},
    schema::types::Type,
};
use serde_json::{Map, Number, Value};

use super::jsonl::{NextRow, Row, UntilError, shorten};
use super::thrift::{check_footer, check_pages};
use crate::error::caught;
use crate::ggml::MappedFile;
use crate::{Error, Result};

/// Rows of a Parquet file, read row group by row group.
pub struct ParquetRows {
    path: PathBuf,
    rows: RowIter<'static>,
    row: usize,
}

impl ParquetRows {
    /// Opens `path` and checks its schema.
    ///
    /// # Errors
    /// A file that is cut or damaged, or whose schema cannot be read.
    pub fn open(path: &Path) -> Result<UntilError<ParquetRows>> {
        let file = File::open(path).map_err(Error::io("read", path))?;
        let place = || path.display().to_string();
        let damaged = |reason: String| {
            let advice = "fetch the file again";
            Error::invalid(place(), "a Parquet file with its footer", reason, advice)
        };
        let bytes = MappedFile::open(path)?;
        check_footer(&bytes).map_err(damaged)?;
        let reader = guarded(|| SerializedFileReader::new(file)).map_err(damaged)?;
        check_sizes(reader.metadata(), &bytes, &place())?;
        let schema = reader.metadata().file_metadata().schema_descr().root_schema();
        for column in schema.get_fields() {
            readable(column, 0).map_err(|reason| {
                let place = format!("{}: column `{}`", place(), column.name());
                Error::invalid(place, "a type of the Parquet format", reason, "write it anew")
            })?;
        }
        let rows = RowIter::from_file_into(Box::new(reader));
        Ok(UntilError::new(ParquetRows { path: path.to_path_buf(), rows, row: 0 }))
    }
}

impl NextRow for ParquetRows {
    fn next_row(&mut self) -> Result<Option<Row>> {
        self.row += 1;
        let place = format!("{}, row {}", self.path.display(), self.row);
        let rows = &mut self.rows;
        let object = guarded(|| match rows.next() {
            Some(row) => row.map(|row| Some(object(row.into_columns()))),
            None => Ok(None),
        });
        match object {
            Ok(object) => {
                Ok(object.map(|object| Row { place, line: self.row, object, untyped: false }))
            }
            Err(reason) if reason.contains("as String") => {
                let got = "a text with other bytes";
                Err(Error::invalid(place, "UTF-8", got, "write the column as UTF-8 texts"))
            }
            Err(reason) => {
                Err(Error::invalid(place, "a readable row", reason, "fetch the file again"))
            }
        }
    }
}

/// Refuses rows and pages that a file of these bytes cannot hold.
fn check_sizes(metadata: &ParquetMetaData, bytes: &[u8], place: &str) -> Result<()> {
    let refuse = |place: String, expected, got| {
        Err(Error::invalid(place, expected, got, "fetch the file again"))
    };
    let groups = metadata.row_groups();
    // Rows that differ take bytes.
    let rows = groups.iter().fold(0u64, |sum, group| sum.saturating_add(group.num_rows() as u64));
    if rows > bytes.len() as u64 {
        let got = format!("{rows} rows in {} bytes", bytes.len());
        return refuse(place.into(), "a Parquet file with its footer", got);
    }
    for column in groups.iter().flat_map(|group| group.columns()) {
        let range = guarded(|| Ok(column.byte_range()));
        if let Err(got) = range.and_then(|(start, len)| check_pages(bytes, start, len)) {
            let place = format!("{place}: column `{}`", column.column_path().string());
            return refuse(place, "pages within the file", got);
        }
    }
    Ok(())
}

/// The outcome of `read`, with a panic of the Parquet crate on damaged bytes as an error.
fn guarded<T>(
    read: impl FnOnce() -> std::result::Result<T, ParquetError>,
) -> std::result::Result<T, String> {
    match caught(read) {
        Some(Ok(value)) => Ok(value),
        Some(Err(e)) => Err(shorten(&e.to_string(), 200)),
        None => Err("bytes that the Parquet reader gave up on".into()),
    }
}

/// Deepest nesting of a column's type.
const MAX_DEPTH: usize = 32;

/// Refuses what the crate's record reader would panic on.
fn readable(ty: &Type, depth: usize) -> std::result::Result<(), String> {
    if depth > MAX_DEPTH {
        return Err(format!("more than {MAX_DEPTH} levels"));
    }
    let converted = ty.get_basic_info().converted_type();
    if ty.is_primitive() {
        use ConvertedType as C;
        let known = match ty.get_physical_type() {
            Physical::INT32 => matches!(
                converted,
                C::NONE
                    | C::INT_8
                    | C::INT_16
                    | C::INT_32
                    | C::UINT_8
                    | C::UINT_16
                    | C::UINT_32
                    | C::DATE
                    | C::TIME_MILLIS
                    | C::DECIMAL
            ),
            Physical::INT64 => matches!(
                converted,
                C::NONE
                    | C::INT_64
                    | C::UINT_64
                    | C::TIME_MICROS
                    | C::TIMESTAMP_MILLIS
                    | C::TIMESTAMP_MICROS
                    | C::DECIMAL
            ),
            Physical::BYTE_ARRAY => {
                matches!(converted, C::NONE | C::UTF8 | C::ENUM | C::JSON | C::BSON | C::DECIMAL)
            }
            Physical::FIXED_LEN_BYTE_ARRAY => matches!(converted, C::NONE | C::DECIMAL),
            _ => true,
        };
        return if known { Ok(()) } else { Err(format!("{converted}")) };
    }
    let fields = ty.get_fields();
    let repeated = |field: &Type| field.get_basic_info().repetition() == Repetition::REPEATED;
    let shape = match converted {
        _ if fields.is_empty() => false,
        ConvertedType::LIST => {
            fields.len() == 1
                && repeated(&fields[0])
                && (fields[0].is_primitive() || !fields[0].get_fields().is_empty())
        }
        ConvertedType::MAP | ConvertedType::MAP_KEY_VALUE => {
            fields.len() == 1
                && repeated(&fields[0])
                && !fields[0].is_primitive()
                && (1..=2).contains(&fields[0].get_fields().len())
        }
        _ => true,
    };
    if !shape {
        return Err(format!("a {converted} group of another shape"));
    }
    fields.iter().try_for_each(|field| readable(field, depth + 1))
}

fn object(columns: Vec<(String, Field)>) -> Map<String, Value> {
    columns.into_iter().map(|(name, field)| (name, value(field))).collect()
}

fn value(field: Field) -> Value {
    let float = |x: f64| Number::from_f64(x).map_or(Value::Null, Value::Number);
    match field {
        Field::Null => Value::Null,
        Field::Bool(b) => b.into(),
        Field::Byte(n) => n.into(),
        Field::Short(n) => n.into(),
        Field::Int(n) => n.into(),
        Field::Long(n) => n.into(),
        Field::UByte(n) => n.into(),
        Field::UShort(n) => n.into(),
        Field::UInt(n) => n.into(),
        Field::ULong(n) => n.into(),
        Field::Float16(x) => float(x.into()),
        // The shortest decimal that reads back as this float: 0.1, not 0.10000000149011612.
        Field::Float(x) => x.to_string().parse().map_or(Value::Null, float),
        Field::Double(x) => float(x),
        Field::Str(text) => text.into(),
        Field::Bytes(bytes) => match std::str::from_utf8(bytes.data()) {
            Ok(text) => text.into(),
            Err(_) => Value::Null,
        },
        Field::Group(row) => Value::Object(object(row.into_columns())),
        Field::ListInternal(list) => list.elements().iter().cloned().map(value).collect(),
        Field::MapInternal(map) => {
            let key = |field: &Field| match value(field.clone()) {
                Value::String(text) => text,
                other => other.to_string(),
            };
            let entries = map.entries().iter().map(|(k, v)| (key(k), value(v.clone())));
            Value::Object(entries.collect())
        }
        // Decimals, dates and times in the crate's spelling.
        other => other.to_string().into(),
    }
}
