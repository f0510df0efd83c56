//! One function per kind of input: it may refuse the bytes, it may not panic, hang or take memory beyond
//! reason. The fuzzers (`fuzz/`) and the deterministic mutation test share them.
#![allow(dead_code)]

use std::io::Write;
use std::path::Path;

use bupo_gguf::data::{ChatTemplate, Columns, HfTokenizer, Message, read_problems, read_rollouts};
use bupo_gguf::gguf::{AdapterFile, GgufFile, split_paths};
use bupo_gguf::model::Description;
use bupo_gguf::reward::last_boxed;
use bupo_gguf::train::Resume;

/// A file of these bytes, for readers that want a path.
fn file(bytes: &[u8], suffix: &str) -> tempfile::NamedTempFile {
    let mut file = tempfile::Builder::new().suffix(suffix).tempfile().unwrap();
    file.write_all(bytes).unwrap();
    file
}

/// GGUF: header, metadata, tensor table, and every tensor's bytes.
pub fn gguf(bytes: &[u8]) -> bool {
    let file_on_disk = file(bytes, ".gguf");
    let described = Description::read(file_on_disk.path());
    let Ok(read) = GgufFile::from_bytes(bytes.to_vec(), "fuzz") else { return false };
    for tensor in read.tensors() {
        assert_eq!(read.bytes(tensor).len() as u64, tensor.n_bytes());
    }
    for (_, value) in read.metadata() {
        let _ = value.describe();
    }
    described.is_ok()
}

/// A LoRA adapter in GGUF form.
pub fn adapter(bytes: &[u8]) -> bool {
    let Ok(read) = GgufFile::from_bytes(bytes.to_vec(), "fuzz") else { return false };
    AdapterFile::from_gguf(&read).is_ok()
}

/// Problems and rollout rows as JSON lines.
pub fn problems(bytes: &[u8]) -> bool {
    let file = file(bytes, ".jsonl");
    read_rollouts(file.path()).is_ok() | read_problems(file.path(), &Columns::default()).is_ok()
}

/// Problems as CSV.
pub fn csv(bytes: &[u8]) -> bool {
    read_problems(file(bytes, ".csv").path(), &Columns::default()).is_ok()
}

/// Problems as Parquet.
pub fn parquet(bytes: &[u8]) -> bool {
    read_problems(file(bytes, ".parquet").path(), &Columns::default()).is_ok()
}

/// A chat template, compiled and rendered.
pub fn template(bytes: &[u8]) -> bool {
    let Ok(source) = std::str::from_utf8(bytes) else { return false };
    let Ok(template) = ChatTemplate::new(source, "<s>", "</s>") else { return false };
    let user = Message { role: "user".into(), content: "1+1".into() };
    template.render(&[user], true).is_ok()
}

/// A tokenizer.json.
pub fn tokenizer(bytes: &[u8]) -> bool {
    HfTokenizer::from_bytes(bytes, "fuzz").is_ok()
}

/// A completion whose answer is looked for.
pub fn answers(bytes: &[u8]) -> bool {
    let text = String::from_utf8_lossy(bytes);
    let found = last_boxed(&text);
    if let Some(found) = found {
        assert!(text.contains(found));
    }
    found.is_some()
}

/// The files of a run folder: `config.toml`, or with a checkpoint's name that file of it.
pub fn run_folder(folder: &Path) -> bool {
    Resume::open(folder).is_ok()
}

/// A split set's name.
pub fn split(bytes: &[u8]) -> bool {
    split_paths(Path::new(&*String::from_utf8_lossy(bytes))).is_ok()
}
