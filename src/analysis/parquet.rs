//! `entropy.parquet` from `entropy.jsonl`: the same columns, row group by row group.

use std::fs::File;
use std::io::{BufRead, BufReader};
use std::path::Path;
use std::sync::Arc;

use parquet::basic::{Compression, LogicalType, Repetition, Type as Physical};
use parquet::data_type::{BoolType, ByteArray, ByteArrayType, FloatType, Int64Type};
use parquet::errors::ParquetError;
use parquet::file::properties::WriterProperties;
use parquet::file::writer::SerializedFileWriter;
use parquet::schema::types::{Type, TypePtr};
use serde_json::{Map, Value};

use super::record::Kind;
use crate::{Error, Result};

/// Records of a row group: what is held in memory.
const GROUP: usize = 1 << 14;

/// Writes `to` from the lines of `from`.
///
/// # Errors
/// [`Error::Io`], or [`Error::Engine`] with Parquet's own words.
pub fn from_json_lines(from: &Path, columns: &[(String, Kind)], to: &Path) -> Result<()> {
    let refused = |e: ParquetError| {
        Error::engine(format!("writing {}", to.display()), e.to_string(), "free disk space")
    };
    let schema = schema(columns).map_err(refused)?;
    let properties =
        WriterProperties::builder().set_compression(Compression::ZSTD(Default::default())).build();
    let mut lines = BufReader::new(File::open(from).map_err(Error::io("read", from))?).lines();
    crate::gguf::write_atomically(to, |out| {
        let mut writer =
            SerializedFileWriter::new(out, schema, Arc::new(properties)).map_err(refused)?;
        loop {
            let mut rows: Vec<Map<String, Value>> = Vec::with_capacity(GROUP);
            for line in lines.by_ref().take(GROUP) {
                let line = line.map_err(Error::io("read", from))?;
                rows.push(serde_json::from_str(&line).map_err(|e| {
                    Error::engine(format!("reading {}", from.display()), e.to_string(), "report it")
                })?);
            }
            if rows.is_empty() {
                break;
            }
            row_group(&mut writer, columns, &rows).map_err(refused)?;
        }
        writer.close().map_err(refused)?;
        Ok(())
    })
}

/// Every column is required; a list is the three-level group that the format's rules ask for.
fn schema(columns: &[(String, Kind)]) -> parquet::errors::Result<TypePtr> {
    let primitive = |name: &str, kind: Kind| {
        let physical = match kind {
            Kind::Int | Kind::Ints => Physical::INT64,
            Kind::Float | Kind::Floats => Physical::FLOAT,
            Kind::Bool => Physical::BOOLEAN,
            Kind::Text | Kind::Texts => Physical::BYTE_ARRAY,
        };
        Type::primitive_type_builder(name, physical)
            .with_repetition(Repetition::REQUIRED)
            .with_logical_type(
                matches!(kind, Kind::Text | Kind::Texts).then_some(LogicalType::String),
            )
            .build()
            .map(Arc::new)
    };
    let mut fields = Vec::with_capacity(columns.len());
    for (name, kind) in columns {
        if !matches!(kind, Kind::Ints | Kind::Floats | Kind::Texts) {
            fields.push(primitive(name, *kind)?);
            continue;
        }
        let list = Type::group_type_builder("list")
            .with_repetition(Repetition::REPEATED)
            .with_fields(vec![primitive("element", *kind)?])
            .build()?;
        let outer = Type::group_type_builder(name)
            .with_repetition(Repetition::REQUIRED)
            .with_logical_type(Some(LogicalType::List))
            .with_fields(vec![Arc::new(list)])
            .build()?;
        fields.push(Arc::new(outer));
    }
    Type::group_type_builder("entropy").with_fields(fields).build().map(Arc::new)
}

fn row_group<W: std::io::Write + Send>(
    writer: &mut SerializedFileWriter<W>,
    columns: &[(String, Kind)],
    rows: &[Map<String, Value>],
) -> parquet::errors::Result<()> {
    let mut group = writer.next_row_group()?;
    for (name, kind) in columns {
        let values = || rows.iter().map(|row| row.get(name).unwrap_or(&Value::Null));
        let items = || values().filter_map(Value::as_array).flatten();
        let int = |v: &Value| v.as_i64().unwrap_or(0);
        let float = |v: &Value| v.as_f64().unwrap_or(f64::NAN) as f32;
        let mut column = group.next_column()?.expect("a column of the schema");
        match kind {
            Kind::Int => {
                let data: Vec<i64> = values().map(int).collect();
                column.typed::<Int64Type>().write_batch(&data, None, None)?;
            }
            Kind::Float => {
                let data: Vec<f32> = values().map(float).collect();
                column.typed::<FloatType>().write_batch(&data, None, None)?;
            }
            Kind::Bool => {
                let data: Vec<bool> = values().map(|v| v.as_bool().unwrap_or(false)).collect();
                column.typed::<BoolType>().write_batch(&data, None, None)?;
            }
            Kind::Text => {
                let data: Vec<ByteArray> =
                    values().map(|v| ByteArray::from(v.as_str().unwrap_or(""))).collect();
                column.typed::<ByteArrayType>().write_batch(&data, None, None)?;
            }
            Kind::Ints => {
                let (defined, repeated) = levels(values());
                let data: Vec<i64> = items().map(int).collect();
                let typed = column.typed::<Int64Type>();
                typed.write_batch(&data, Some(&defined), Some(&repeated))?;
            }
            Kind::Floats => {
                let (defined, repeated) = levels(values());
                let data: Vec<f32> = items().map(float).collect();
                let typed = column.typed::<FloatType>();
                typed.write_batch(&data, Some(&defined), Some(&repeated))?;
            }
            Kind::Texts => {
                let (defined, repeated) = levels(values());
                let data: Vec<ByteArray> =
                    items().map(|v| ByteArray::from(v.as_str().unwrap_or(""))).collect();
                let typed = column.typed::<ByteArrayType>();
                typed.write_batch(&data, Some(&defined), Some(&repeated))?;
            }
        }
        column.close()?;
    }
    group.close()?;
    Ok(())
}

/// Definition and repetition levels of lists: 1 for an element, 0 for an empty list; 0 where a row begins.
fn levels<'v>(lists: impl Iterator<Item = &'v Value>) -> (Vec<i16>, Vec<i16>) {
    let (mut defined, mut repeated) = (Vec::new(), Vec::new());
    for list in lists {
        let n = list.as_array().map_or(0, Vec::len);
        defined.extend(std::iter::repeat_n((n > 0) as i16, n.max(1)));
        repeated.extend((0..n.max(1)).map(|i| (i > 0) as i16));
    }
    (defined, repeated)
}

#[cfg(test)]
mod tests {
    use parquet::file::reader::{FileReader, SerializedFileReader};
    use parquet::record::Field;

    use super::super::record::{columns, example};
    use super::*;

    #[test]
    fn parquet_holds_what_the_json_lines_hold() {
        let dir = tempfile::tempdir().unwrap();
        let (from, to) = (dir.path().join("e.jsonl"), dir.path().join("e.parquet"));
        for all_taps in [false, true] {
            let columns = columns(all_taps, all_taps);
            let mut text = Vec::new();
            let n = GROUP + 3;
            for i in 0..n {
                let mut record = example(1 + i % 5, i, all_taps);
                if i == 1 {
                    let top = record.tops[6].as_mut().unwrap();
                    (top.tokens, top.texts, top.probs) = (vec![], vec![], vec![]);
                }
                record.write(&columns, &mut text).unwrap();
            }
            std::fs::write(&from, &text).unwrap();
            from_json_lines(&from, &columns, &to).unwrap();
            let reader = SerializedFileReader::new(File::open(&to).unwrap()).unwrap();
            assert_eq!(reader.num_row_groups(), 2);
            let text = String::from_utf8(text).unwrap();
            let mut seen = 0;
            for (row, line) in reader.get_row_iter(None).unwrap().zip(text.lines()) {
                let (row, line): (_, Map<String, Value>) =
                    (row.unwrap(), serde_json::from_str(line).unwrap());
                let fields: Vec<_> = row.get_column_iter().collect();
                assert_eq!(fields.len(), line.len());
                for ((name, field), (key, value)) in fields.into_iter().zip(&line) {
                    assert_eq!(name, key);
                    let as_f32 = |v: &Value| v.as_f64().unwrap() as f32;
                    let same = match (field, value) {
                        (Field::Long(a), b) => Some(*a) == b.as_i64(),
                        (Field::Float(a), b) => *a == as_f32(b),
                        (Field::Bool(a), b) => Some(*a) == b.as_bool(),
                        (Field::Str(a), b) => Some(a.as_str()) == b.as_str(),
                        (Field::ListInternal(a), Value::Array(b)) => {
                            a.elements().len() == b.len()
                                && a.elements().iter().zip(b).all(|(a, b)| match a {
                                    Field::Long(a) => Some(*a) == b.as_i64(),
                                    Field::Float(a) => *a == as_f32(b),
                                    Field::Str(a) => Some(a.as_str()) == b.as_str(),
                                    _ => false,
                                })
                        }
                        _ => false,
                    };
                    assert!(same, "{name}: {field:?} and {value}");
                }
                seen += 1;
            }
            assert_eq!(seen, n);
        }
    }
}
