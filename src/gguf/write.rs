//! Writing a GGUF file: everything is checked before the first byte is written.

use std::{
    collections::HashSet,
    fs::File,
    io::{self, BufWriter, Read, Write},
    path::Path,
};

use super::{
    ALIGNMENT_KEY, DEFAULT_ALIGNMENT, MAGIC, MAX_KEY_BYTES, TensorInfo, VERSION, Value, alignment,
    atomic::Finished, holes::Holes, shown, space::check_space, value::encode_str,
};
use crate::{Error, Result, ggml::Type};

/// Elements converted at a time by [`TensorSink::write_f32`].
const F32_CHUNK: usize = 16 * 1024;

/// Gives a tensor's data when it is due.
pub(super) type Data<'a> = Box<dyn FnOnce(&mut TensorSink) -> Result<()> + 'a>;

/// A GGUF file in the making: metadata and tensors are written in the order they were added, the same input
/// gives the same bytes, version 3.
pub struct GgufWriter<'a> {
    pub(super) metadata: Vec<(String, Value)>,
    keys: HashSet<String>,
    pub(super) tensors: Vec<(TensorInfo, Data<'a>)>,
    names: HashSet<String>,
    pub(super) alignment: u64,
}

impl Default for GgufWriter<'_> {
    fn default() -> Self {
        GgufWriter::new()
    }
}

impl<'a> GgufWriter<'a> {
    /// An empty file.
    pub fn new() -> GgufWriter<'a> {
        GgufWriter {
            metadata: Vec::new(),
            keys: HashSet::new(),
            tensors: Vec::new(),
            names: HashSet::new(),
            alignment: DEFAULT_ALIGNMENT,
        }
    }

    /// Adds a metadata entry. `general.alignment` (u32) sets the tensors' alignment in bytes; without it
    /// that is 32.
    ///
    /// # Errors
    /// When the key is empty, too long or there already, or the alignment is no power of two and multiple
    /// of 8.
    pub fn metadata(&mut self, key: &str, value: impl Into<Value>) -> Result<()> {
        let value = value.into();
        let wrong = |expected: String, got: String| {
            let place = format!("new metadata entry '{}'", shown(key));
            Err(Error::invalid(place, expected, got, "choose another"))
        };
        if key.is_empty() || key.len() > MAX_KEY_BYTES {
            return wrong(
                format!("a key of 1 to {MAX_KEY_BYTES} bytes"),
                format!("{} bytes", key.len()),
            );
        }
        if self.keys.contains(key) {
            return wrong("each key once".to_owned(), "it a second time".to_owned());
        }
        if key == ALIGNMENT_KEY {
            match alignment(&value) {
                Some(bytes) => self.alignment = bytes,
                None => {
                    let expected = "a u32, a power of two and a multiple of 8";
                    return wrong(expected.to_owned(), value.describe());
                }
            }
        }
        self.keys.insert(key.to_owned());
        self.metadata.push((key.to_owned(), value));
        Ok(())
    }

    /// Adds a tensor: `shape` in ggml order `[ne0, ne1, ..]`; `data` is called once while the file is
    /// written and must give exactly the tensor's bytes.
    ///
    /// # Errors
    /// When the name is there already or ggml would not take name or shape.
    pub fn tensor(
        &mut self,
        name: &str,
        ty: Type,
        shape: &[u64],
        data: impl FnOnce(&mut TensorSink) -> Result<()> + 'a,
    ) -> Result<()> {
        let wrong = |expected: String, got: String| {
            let place = format!("new tensor '{}'", shown(name));
            Error::invalid(place, expected, got, "choose another name, shape or type")
        };
        let info =
            TensorInfo::new(name, ty, shape, 0).map_err(|(expected, got)| wrong(expected, got))?;
        if !self.names.insert(name.to_owned()) {
            return Err(wrong("each name once".to_owned(), "it a second time".to_owned()));
        }
        self.tensors.push((info, Box::new(data)));
        Ok(())
    }

    /// Adds an F32 tensor.
    ///
    /// # Errors
    /// Those of [`GgufWriter::tensor`].
    pub fn tensor_f32(&mut self, name: &str, shape: &[u64], data: &'a [f32]) -> Result<()> {
        self.tensor(name, Type::F32, shape, move |sink| sink.write_f32(data))
    }

    /// Writes the file, whole or not at all: see [`super::write_atomically`]. Long runs of zeros become holes.
    ///
    /// # Errors
    /// Those of the data providers and of the system, and when a provider gave too many or too few bytes,
    /// or the disk has no room for the file.
    pub fn write(mut self, path: &Path) -> Result<()> {
        check_space(path, self.n_bytes(path)?)?;
        self.write_unnamed(path)?.commit()
    }

    /// Writes the file under a temporary name.
    pub(super) fn write_unnamed(self, path: &Path) -> Result<Finished> {
        Finished::write(path, |file: &mut BufWriter<File>| {
            let mut out = Holes::new(file);
            self.write_to(&mut out, path)?;
            out.finish().map_err(Error::io("write", path))
        })
    }

    /// Bytes of the file as it stands.
    pub(super) fn n_bytes(&mut self, path: &Path) -> Result<u64> {
        let data = self.place_tensors(path)?;
        Ok((self.head().len() as u64).next_multiple_of(self.alignment).saturating_add(data))
    }

    /// The file's bytes.
    ///
    /// # Errors
    /// Those of the data providers, and when a provider gave too many or too few bytes.
    pub fn to_bytes(self) -> Result<Vec<u8>> {
        let mut bytes = Vec::new();
        self.write_to(&mut bytes, Path::new("memory"))?;
        Ok(bytes)
    }

    fn write_to(mut self, out: &mut dyn Write, path: &Path) -> Result<()> {
        self.place_tensors(path)?;
        let head = self.head();
        let padding = padding(head.len() as u64, self.alignment);
        out.write_all(&head).map_err(Error::io("write", path))?;
        pad(out, padding).map_err(Error::io("write", path))?;
        for (info, data) in self.tensors {
            let mut sink = TensorSink { out, path, name: &info.name, left: info.n_bytes() };
            data(&mut sink)?;
            sink.finish(info.n_bytes())?;
            pad(out, self::padding(info.n_bytes(), self.alignment))
                .map_err(Error::io("write", path))?;
        }
        Ok(())
    }

    /// Gives each tensor its offset, one after another; gives the bytes of all.
    fn place_tensors(&mut self, path: &Path) -> Result<u64> {
        let mut end = 0u64;
        for (info, _) in &mut self.tensors {
            info.offset = end;
            end = info
                .n_bytes()
                .checked_next_multiple_of(self.alignment)
                .and_then(|bytes| end.checked_add(bytes))
                .ok_or_else(|| {
                    let place = path.display().to_string();
                    Error::invalid(place, "fewer than 2^64 bytes", "more", "write fewer tensors")
                })?;
        }
        Ok(end)
    }

    /// Header, metadata and tensor table.
    fn head(&self) -> Vec<u8> {
        let mut head = Vec::new();
        head.extend(MAGIC);
        head.extend(VERSION.to_le_bytes());
        head.extend((self.tensors.len() as u64).to_le_bytes());
        head.extend((self.metadata.len() as u64).to_le_bytes());
        for (key, value) in &self.metadata {
            encode_str(key, &mut head);
            head.extend(value.ty().raw().to_le_bytes());
            value.encode(&mut head);
        }
        for (info, _) in &self.tensors {
            encode_str(&info.name, &mut head);
            head.extend((info.shape.len() as u32).to_le_bytes());
            head.extend(info.shape.iter().flat_map(|ne| ne.to_le_bytes()));
            head.extend(info.ty.raw().to_le_bytes());
            head.extend(info.offset.to_le_bytes());
        }
        head
    }
}

fn padding(bytes: u64, alignment: u64) -> u64 {
    bytes.wrapping_neg() % alignment
}

fn pad(out: &mut dyn Write, bytes: u64) -> io::Result<()> {
    io::copy(&mut io::repeat(0).take(bytes), out).map(drop)
}

/// Takes one tensor's data, in pieces of any size, up to the tensor's size.
pub struct TensorSink<'a> {
    out: &'a mut dyn Write,
    path: &'a Path,
    name: &'a str,
    /// Bytes that the tensor still lacks.
    left: u64,
}

impl TensorSink<'_> {
    /// Writes the next bytes.
    ///
    /// # Errors
    /// Those of the system, and when the tensor would become too long.
    pub fn write(&mut self, bytes: &[u8]) -> Result<()> {
        match self.left.checked_sub(bytes.len() as u64) {
            Some(left) => self.left = left,
            None => return Err(self.wrong_size("no more", format!("{} more bytes", bytes.len()))),
        }
        self.out.write_all(bytes).map_err(Error::io("write", self.path))
    }

    /// Writes the next elements of an F32 tensor.
    ///
    /// # Errors
    /// Those of [`TensorSink::write`].
    pub fn write_f32(&mut self, values: &[f32]) -> Result<()> {
        let mut bytes = Vec::with_capacity(4 * F32_CHUNK.min(values.len()));
        for chunk in values.chunks(F32_CHUNK) {
            bytes.clear();
            bytes.extend(chunk.iter().flat_map(|x| x.to_le_bytes()));
            self.write(&bytes)?;
        }
        Ok(())
    }

    fn finish(&self, n_bytes: u64) -> Result<()> {
        if self.left > 0 {
            let got = format!("{} bytes", n_bytes - self.left);
            return Err(self.wrong_size(&format!("{n_bytes} bytes of data"), got));
        }
        Ok(())
    }

    fn wrong_size(&self, expected: &str, got: String) -> Error {
        Error::invalid(
            format!("{}: tensor '{}'", self.path.display(), self.name),
            expected,
            got,
            "shape and data must agree",
        )
    }
}
