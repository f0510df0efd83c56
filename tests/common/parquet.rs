//! Parquet files, as small as they can be.

use std::path::Path;
use std::sync::Arc;

use parquet::basic::Compression;
use parquet::column::writer::ColumnWriter;
use parquet::data_type::ByteArray;
use parquet::file::properties::WriterProperties;
use parquet::file::writer::SerializedFileWriter;
use parquet::schema::parser::parse_message_type;

const VERL: &str = "message schema {
    optional group prompt (LIST) { repeated group list { optional group element {
        optional binary content (UTF8); optional binary role (UTF8); } } }
    optional group reward_model { optional binary ground_truth (UTF8); optional binary style (UTF8); }
    optional double difficulty;
    optional int64 index;
}";

/// Values with their definition and repetition levels.
type Column = (Vec<ByteArray>, &'static [i16], Option<&'static [i16]>);

/// Two rows in verl's layout: two messages and an answer; one message and none.
pub fn verl(path: &Path, compression: Compression) {
    let schema = Arc::new(parse_message_type(VERL).unwrap());
    let properties = Arc::new(WriterProperties::builder().set_compression(compression).build());
    let file = std::fs::File::create(path).unwrap();
    let mut writer = SerializedFileWriter::new(file, schema, properties).unwrap();
    let mut group = writer.next_row_group().unwrap();
    let text = |s: &str| ByteArray::from(s.as_bytes().to_vec());
    let strings: [Column; 4] = [
        (vec![text("S"), text("1+1=?"), text("2+2=?")], &[4, 4, 4], Some(&[0, 1, 0])),
        (vec![text("system"), text("user"), text("user")], &[4, 4, 4], Some(&[0, 1, 0])),
        (vec![text("2")], &[2, 0], None),
        (vec![text("rule")], &[2, 0], None),
    ];
    let mut column = 0;
    while let Some(mut next) = group.next_column().unwrap() {
        match next.untyped() {
            ColumnWriter::ByteArrayColumnWriter(w) => {
                let (values, definition, repetition) = &strings[column];
                w.write_batch(values, Some(definition), *repetition).unwrap();
            }
            ColumnWriter::DoubleColumnWriter(w) => {
                w.write_batch(&[6.5, 7.0], Some(&[1, 1]), None).unwrap();
            }
            ColumnWriter::Int64ColumnWriter(w) => {
                w.write_batch(&[3], Some(&[1, 0]), None).unwrap();
            }
            _ => panic!("another column"),
        }
        next.close().unwrap();
        column += 1;
    }
    group.close().unwrap();
    writer.close().unwrap();
}
