//! GGUF files: a bounded reader, an atomic writer, LoRA adapters.
//!
//! The format is ggml's own (`docs/gguf.md` there): a header, metadata, a table of tensors, padding,
//! the tensors' data. The reader takes versions 2 and 3, little endian, and trusts nothing: every length
//! is checked against the bytes that remain before memory is taken for it.

mod array;
mod atomic;
mod cursor;
mod getters;
mod hash;
mod holes;
mod lora;
mod read;
mod set;
mod space;
mod split;
mod tensor;
mod value;
mod write;

pub use array::Array;
pub use atomic::{refuse_filled, write_atomically, write_json_atomically};
pub use getters::FromValue;
pub use hash::sha256;
pub use lora::{AdapterFile, AdapterPair};
pub use read::GgufFile;
pub use set::GgufSet;
pub use space::check_space;
pub use split::split_paths;
pub use tensor::TensorInfo;
pub use value::{Value, ValueType};
pub use write::{GgufWriter, TensorSink};

/// The first four bytes.
const MAGIC: [u8; 4] = *b"GGUF";
/// The version the writer writes.
const VERSION: u32 = 3;
/// The metadata key that sets where tensors may begin.
const ALIGNMENT_KEY: &str = "general.alignment";
/// Bytes; holds where the metadata does not say otherwise.
const DEFAULT_ALIGNMENT: u64 = 32;
/// Bytes of a metadata key, by the format's definition.
const MAX_KEY_BYTES: usize = 65_535;
/// Arrays within arrays; the format sets no bound, llama.cpp reads one level only.
const MAX_ARRAY_DEPTH: usize = 4;
/// What to do about a file that contradicts itself.
const DAMAGED: &str = "the file is damaged: download the file again";

/// A name from a file as an error shows it: on one line, not endless.
fn shown(name: &str) -> String {
    const MOST: usize = 80;
    let mut line: String = name.chars().take(MOST).flat_map(char::escape_debug).collect();
    if name.chars().nth(MOST).is_some() {
        line.push_str("...");
    }
    line
}

/// The alignment in bytes that a `general.alignment` entry asks for; `None` when it is not a u32, a power
/// of two and a multiple of 8.
fn alignment(value: &Value) -> Option<u64> {
    match value {
        Value::U32(n) if n.is_power_of_two() && n.is_multiple_of(8) => Some(u64::from(*n)),
        _ => None,
    }
}
