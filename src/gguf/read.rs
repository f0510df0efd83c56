//! Opening a GGUF file.

use std::{
    borrow::Cow,
    collections::{HashMap, hash_map::Entry},
    ops::Range,
    path::Path,
};

use super::{
    ALIGNMENT_KEY, DAMAGED, DEFAULT_ALIGNMENT, MAGIC, MAX_KEY_BYTES, TensorInfo, Value, ValueType,
    alignment,
    cursor::{Cursor, Place},
    shown,
    tensor::MAX_DIMS,
};
use crate::{
    Error, Result,
    ggml::{MappedFile, Type},
};

/// The fewest bytes of a metadata entry: a key's length, one letter, a type, one byte of value.
const LEAST_ENTRY_BYTES: u64 = 8 + 1 + 4 + 1;
/// The fewest bytes of an entry in the tensor table: the name's length, one letter, the number of
/// dimensions, one of them, type, offset.
const LEAST_TENSOR_BYTES: u64 = 8 + 1 + 4 + 8 + 4 + 8;
/// Bytes: the strictest alignment of a ggml block.
const BLOCK_ALIGNMENT: usize = 8;

/// An open GGUF file: metadata and tensor table in memory, the tensors' data mapped. One file; for a model
/// in several see [`super::split_paths`].
#[derive(Debug)]
pub struct GgufFile {
    name: String,
    source: Source,
    metadata: Vec<(String, Value)>,
    keys: HashMap<String, usize>,
    tensors: Vec<TensorInfo>,
    names: HashMap<String, usize>,
    data_start: usize,
}

#[derive(Debug)]
enum Source {
    Mapped(MappedFile),
    Static(&'static [u8]),
    /// The file begins at `start`, which is [`BLOCK_ALIGNMENT`] aligned.
    Owned {
        bytes: Vec<u8>,
        start: usize,
    },
}

impl Source {
    fn bytes(&self) -> &[u8] {
        match self {
            Source::Mapped(map) => map,
            Source::Static(bytes) => bytes,
            Source::Owned { bytes, start } => &bytes[*start..],
        }
    }

    fn new(bytes: Cow<'static, [u8]>) -> Source {
        match bytes {
            Cow::Borrowed(bytes) if is_aligned(bytes) => Source::Static(bytes),
            Cow::Owned(bytes) if is_aligned(&bytes) => Source::Owned { bytes, start: 0 },
            askew => {
                let mut bytes: Vec<u8> = Vec::with_capacity(askew.len() + BLOCK_ALIGNMENT);
                let start = bytes.as_ptr().align_offset(BLOCK_ALIGNMENT);
                bytes.resize(start, 0);
                bytes.extend_from_slice(&askew);
                Source::Owned { bytes, start }
            }
        }
    }
}

fn is_aligned(bytes: &[u8]) -> bool {
    bytes.as_ptr().align_offset(BLOCK_ALIGNMENT) == 0
}

impl GgufFile {
    /// Maps `path` and reads everything but the tensors' data, which is only checked to be there.
    ///
    /// # Errors
    /// When the file cannot be read or is not a sound GGUF file of version 2 or 3, little endian.
    pub fn open(path: &Path) -> Result<GgufFile> {
        GgufFile::parse(Source::Mapped(MappedFile::open(path)?), path.display().to_string())
    }

    /// Reads a file that is in memory; errors call it `name`.
    pub fn from_bytes(bytes: impl Into<Cow<'static, [u8]>>, name: &str) -> Result<GgufFile> {
        GgufFile::parse(Source::new(bytes.into()), name.to_owned())
    }

    fn parse(source: Source, name: String) -> Result<GgufFile> {
        let bytes = source.bytes();
        let mut from = Cursor::new(bytes, &name);
        let (n_tensors, n_entries) = header(&mut from)?;
        let (metadata, keys) = entries(n_entries, &mut from)?;
        let alignment = match keys.get(ALIGNMENT_KEY).map(|i| &metadata[*i].1) {
            None => DEFAULT_ALIGNMENT,
            Some(value) => alignment(value).ok_or_else(|| {
                from.place = Place::Value(ALIGNMENT_KEY);
                from.invalid("a u32, a power of two and a multiple of 8", value.describe())
            })?,
        };
        let (tensors, names) = table(n_tensors, &mut from)?;
        let data_start = from.position().next_multiple_of(alignment as usize);
        check_data(&name, &tensors, bytes.len() as u64, data_start as u64, alignment)?;
        Ok(GgufFile { name, metadata, keys, tensors, names, data_start, source })
    }

    /// The path, or the name given to [`GgufFile::from_bytes`].
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Refuses a GGUF file that says it is something else than a model: an adapter, an importance matrix, ..
    ///
    /// # Errors
    /// [`Error::Invalid`] that says what it is and how it is used.
    pub fn require_model(&self) -> Result<()> {
        let kind = self.find::<&str>("general.type")?.unwrap_or("model");
        let advice = match kind {
            "model" => return Ok(()),
            "adapter" => "give the base model as MODEL, and this file with --adapter",
            "imatrix" => "give the base model as MODEL, and this file with --imatrix",
            _ => "give the language model's file",
        };
        let expected = "a model";
        let article = if kind.starts_with(['a', 'e', 'i', 'o', 'u']) { "an" } else { "a" };
        let got = format!("{article} {} (general.type)", shown(kind));
        Err(Error::invalid(self.name.as_str(), expected, got, advice))
    }

    /// Keys and values in file order.
    pub fn metadata(&self) -> impl ExactSizeIterator<Item = (&str, &Value)> {
        self.metadata.iter().map(|(key, value)| (key.as_str(), value))
    }

    /// The value of `key`.
    pub fn get(&self, key: &str) -> Option<&Value> {
        self.keys.get(key).map(|i| &self.metadata[*i].1)
    }

    /// All tensors in file order.
    pub fn tensors(&self) -> &[TensorInfo] {
        &self.tensors
    }

    /// The tensor of this name.
    pub fn tensor(&self, name: &str) -> Option<&TensorInfo> {
        self.names.get(name).map(|i| &self.tensors[*i])
    }

    /// A tensor's data as the file holds it.
    ///
    /// # Panics
    /// When `tensor` is another file's and lies outside this one.
    pub fn bytes(&self, tensor: &TensorInfo) -> &[u8] {
        &self.source.bytes()[self.range(tensor)]
    }

    /// Where in the file a tensor's data lies, in bytes.
    pub fn range(&self, tensor: &TensorInfo) -> Range<usize> {
        let start = self.data_start + tensor.offset as usize;
        start..start + tensor.n_bytes() as usize
    }

    /// The whole file.
    pub fn raw(&self) -> &[u8] {
        self.source.bytes()
    }

    /// Says that `part`, a slice of this file, will not be read again soon: a mapped file gives back the
    /// memory. Whoever reads it again gets the same bytes, from the disk.
    pub fn release(&self, part: &[u8]) {
        if let Source::Mapped(map) = &self.source {
            map.release(part);
        }
    }

    /// Bytes of the whole file.
    pub fn n_bytes(&self) -> u64 {
        self.source.bytes().len() as u64
    }

    /// A tensor's elements as F32, rows of ne0 first; meant for small tensors.
    ///
    /// # Errors
    /// When ggml has no conversion to F32 for the type.
    pub fn dequantize(&self, tensor: &TensorInfo) -> Result<Vec<f32>> {
        if !tensor.ty.can_dequantize() {
            let supported: Vec<_> =
                Type::all().filter(|ty| ty.can_dequantize()).map(Type::name).collect();
            return Err(Error::Unsupported {
                what: "conversion to f32 from tensor type",
                got: tensor.ty.name().to_owned(),
                supported: supported.join(", "),
            });
        }
        let mut out = vec![0.0; tensor.n_elements() as usize];
        tensor.ty.dequantize(self.bytes(tensor), &mut out);
        Ok(out)
    }
}

/// What a file that is no GGUF begins with, where it is told by that.
fn known_start(magic: [u8; 4]) -> &'static str {
    match &magic {
        b"vers" => " (a Git LFS pointer: fetch the file itself, with git lfs pull)",
        b"<!DO" | b"<htm" | b"<HTM" => " (a web page that was saved in its place)",
        b"PK\x03\x04" => " (a zip archive or PyTorch checkpoint)",
        b"tjgg" | b"fmgg" | b"lmgg" => " (a file of llama.cpp's older formats)",
        // safetensors: the length of its JSON header in 8 bytes.
        [_, _, _, 0] => " (as safetensors files do)",
        _ => "",
    }
}

/// Magic, version and counts -> (tensors, metadata entries).
fn header(from: &mut Cursor) -> Result<(u64, u64)> {
    let magic: [u8; 4] = from.fixed()?;
    if magic != MAGIC {
        return Err(Error::invalid(
            from.file(),
            "a GGUF file, which begins with 'GGUF'",
            format!("'{}'{}", magic.escape_ascii(), known_start(magic)),
            "give a .gguf model file",
        ));
    }
    match from.u32()? {
        2 | 3 => {}
        swapped if matches!(swapped.swap_bytes(), 1..=3) => {
            return Err(Error::Unsupported {
                what: "byte order of a GGUF file",
                got: "big endian".to_owned(),
                supported: "little endian".to_owned(),
            });
        }
        other => {
            return Err(Error::Unsupported {
                what: "GGUF version",
                got: other.to_string(),
                supported: "2, 3".to_owned(),
            });
        }
    }
    let n_tensors = from.count("tensors", LEAST_TENSOR_BYTES)?;
    let n_entries = from.count("metadata entries", LEAST_ENTRY_BYTES)?;
    Ok((n_tensors, n_entries))
}

/// The metadata, and the index of each key in it.
type Metadata = (Vec<(String, Value)>, HashMap<String, usize>);

fn entries(n: u64, from: &mut Cursor) -> Result<Metadata> {
    let mut metadata = Vec::new();
    let mut keys = HashMap::new();
    for i in 0..n {
        from.place = Place::Key(i);
        let key = from.string()?;
        if key.is_empty() || key.len() > MAX_KEY_BYTES {
            return Err(from.invalid(
                format!("a key of 1 to {MAX_KEY_BYTES} bytes"),
                format!("{} bytes", key.len()),
            ));
        }
        from.place = Place::Value(key);
        match keys.entry(key.to_owned()) {
            Entry::Occupied(_) => return Err(from.invalid("each key once", "it a second time")),
            Entry::Vacant(slot) => slot.insert(metadata.len()),
        };
        let ty = ValueType::decode(from)?;
        metadata.push((key.to_owned(), Value::decode(ty, from)?));
    }
    Ok((metadata, keys))
}

/// The tensors, and the index of each name among them.
type Table = (Vec<TensorInfo>, HashMap<String, usize>);

fn table(n: u64, from: &mut Cursor) -> Result<Table> {
    let mut tensors = Vec::new();
    let mut names = HashMap::new();
    for i in 0..n {
        from.place = Place::TensorName(i);
        let name = from.string()?;
        from.place = Place::Tensor(name);
        match names.entry(name.to_owned()) {
            Entry::Occupied(_) => return Err(from.invalid("each name once", "it a second time")),
            Entry::Vacant(slot) => slot.insert(tensors.len()),
        };
        let n_dims = from.u32()? as usize;
        if !(1..=MAX_DIMS).contains(&n_dims) {
            return Err(from.invalid(format!("1 to {MAX_DIMS} dimensions"), n_dims.to_string()));
        }
        let shape = (0..n_dims).map(|_| from.u64()).collect::<Result<Vec<_>>>()?;
        let raw = from.u32()?;
        let ty = Type::from_raw(raw).ok_or_else(|| {
            from.invalid("a tensor type ggml knows", format!("type number {raw}"))
        })?;
        let offset = from.u64()?;
        tensors.push(
            TensorInfo::new(name, ty, &shape, offset)
                .map_err(|(expected, got)| from.invalid(expected, got))?,
        );
    }
    Ok((tensors, names))
}

/// Every tensor is aligned, within the file's `file_bytes`, and overlaps no other.
fn check_data(
    file: &str,
    tensors: &[TensorInfo],
    file_bytes: u64,
    data_start: u64,
    alignment: u64,
) -> Result<()> {
    let place = |tensor: &TensorInfo| format!("{file}: tensor '{}'", shown(&tensor.name));
    let mut in_order: Vec<&TensorInfo> = tensors.iter().collect();
    in_order.sort_by_key(|tensor| tensor.offset);
    let mut free_from = 0;
    for tensor in in_order {
        if !tensor.offset.is_multiple_of(alignment) {
            return Err(Error::invalid(
                place(tensor),
                format!("an offset that is a multiple of {alignment}"),
                tensor.offset.to_string(),
                DAMAGED,
            ));
        }
        if tensor.offset < free_from {
            return Err(Error::invalid(
                place(tensor),
                format!(
                    "data at or after byte {free_from} of the data section, free of the others'"
                ),
                format!("an overlap at {}", tensor.offset),
                DAMAGED,
            ));
        }
        let end = u128::from(data_start) + u128::from(tensor.offset) + u128::from(tensor.n_bytes());
        if end > u128::from(file_bytes) {
            return Err(Error::invalid(
                place(tensor),
                format!("a file of at least {end} bytes"),
                format!("{file_bytes}"),
                "the file is cut short: download the file again",
            ));
        }
        free_from = tensor.offset + tensor.n_bytes();
    }
    Ok(())
}
