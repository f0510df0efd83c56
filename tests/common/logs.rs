//! Records of a run, to be compared with those of another.

use std::path::Path;

use serde_json::Value;

/// Lines of JSON, less the figures that a clock gives.
pub fn timeless(path: &Path) -> Vec<Value> {
    let text = std::fs::read_to_string(path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    let record = |line: &str| {
        let mut record: Value = serde_json::from_str(line).unwrap();
        let fields = record.as_object_mut().unwrap();
        fields.retain(|key, _| !key.ends_with("seconds") && !key.ends_with("_per_s"));
        record
    };
    text.lines().map(record).collect()
}
