//! Streams put together behind a header.
//!
//! A stream is removed once it is in the file and synced, so that the disk holds few of them twice; who is killed in the
//! middle goes on with the first stream that is still there.

use std::fs::{self, File, OpenOptions};
use std::io::{Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use serde_json::{Map, Value, json};

use super::Element;
use crate::{Error, Result};

/// The file in the making, within the folder of streams.
const WHOLE: &str = "whole";
/// Bytes that are copied before the file is synced and their streams removed.
const SYNC: u64 = 256 << 20;

/// An array of a file, its streams one behind the other.
pub(super) struct Array {
    pub(super) name: String,
    /// None: I64.
    pub(super) element: Option<Element>,
    /// Rows first.
    pub(super) shape: Vec<u64>,
    pub(super) streams: Vec<String>,
}

impl Array {
    fn bytes(&self) -> u64 {
        self.shape.iter().product::<u64>() * self.element.map_or(8, |e| e.bytes() as u64)
    }
}

/// What the disk must hold beside files of so many bytes while they are put together.
pub(super) fn spare(bytes: u64) -> u64 {
    bytes.min(SYNC)
}

/// Whether streams in this folder are being put together.
pub(super) fn begun(partial: &Path) -> bool {
    partial.join(WHOLE).exists()
}

/// One safetensors file; its size.
pub(super) fn safetensors(
    partial: &Path,
    arrays: &[Array],
    about: &[(&str, String)],
    out: &Path,
) -> Result<u64> {
    let mut header = Map::new();
    let about: Map<String, Value> =
        about.iter().map(|(name, text)| (name.to_string(), json!(text))).collect();
    header.insert("__metadata__".into(), about.into());
    let mut at = 0;
    for array in arrays {
        let dtype = match array.element {
            None => "I64",
            Some(Element::F32) => "F32",
            Some(Element::F16) => "F16",
            Some(Element::Bf16) => "BF16",
        };
        let end = at + array.bytes();
        let entry = json!({"dtype": dtype, "shape": array.shape, "data_offsets": [at, end]});
        header.insert(array.name.clone(), entry);
        at = end;
    }
    let mut text = Value::Object(header).to_string();
    while !text.len().is_multiple_of(8) {
        text.push(' ');
    }
    let header = [&(text.len() as u64).to_le_bytes(), text.as_bytes()].concat();
    let whole = partial.join(WHOLE);
    let arrays: Vec<&Array> = arrays.iter().collect();
    let size = join(partial, &whole, &header, &arrays)?;
    name(&whole, out)?;
    Ok(size)
}

/// One `.npy` file of the first array and, beside it, `NAME.rows.npy` of the second; the size of both.
pub(super) fn npy(partial: &Path, arrays: &[Array], out: &Path) -> Result<u64> {
    let whole = partial.join(WHOLE);
    fs::create_dir_all(&whole).map_err(Error::io("create", &whole))?;
    let mut size = 0;
    let beside = out.with_extension("rows.npy");
    // The array last: where it stands, its rows do.
    for (array, name_of) in arrays.iter().zip([out, &beside]).rev() {
        let file = whole.join(format!("{}.npy", array.name));
        if !array.streams.iter().any(|s| partial.join(s).exists()) && !file.exists() {
            continue; // it has its name already
        }
        size += join(partial, &file, &npy_header(array), &[array])?;
        name(&file, name_of)?;
    }
    Ok(size)
}

/// A folder with an `.npy` file for each array; the size of all.
pub(super) fn folder(partial: &Path, arrays: &[Array], out: &Path) -> Result<u64> {
    let whole = partial.join(WHOLE);
    fs::create_dir_all(&whole).map_err(Error::io("create", &whole))?;
    let mut size = 0;
    for array in arrays {
        let file = whole.join(format!("{}.npy", array.name));
        size += join(partial, &file, &npy_header(array), &[array])?;
    }
    name(&whole, out)?;
    Ok(size)
}

/// The header of NumPy's format, version 1.0.
fn npy_header(array: &Array) -> Vec<u8> {
    let descr = match array.element {
        None => "<i8",
        Some(Element::F32) => "<f4",
        Some(_) => "<f2",
    };
    let extents: Vec<String> = array.shape.iter().map(|n| format!("{n},")).collect();
    let shape = extents.join(" ");
    let mut text = format!("{{'descr': '{descr}', 'fortran_order': False, 'shape': ({shape}), }}");
    while !(10 + text.len() + 1).is_multiple_of(64) {
        text.push(' ');
    }
    text.push('\n');
    let length = (text.len() as u16).to_le_bytes();
    [b"\x93NUMPY\x01\x00", length.as_slice(), text.as_bytes()].concat()
}

/// Puts header and streams into `file`; its size.
fn join(partial: &Path, file: &Path, header: &[u8], arrays: &[&Array]) -> Result<u64> {
    let out = OpenOptions::new().create(true).write(true).truncate(false).open(file);
    let mut out = out.map_err(Error::io("write", file))?;
    let failed = |e| Error::io("write", file)(e);
    out.write_all(header).map_err(failed)?;
    let mut at = header.len() as u64;
    let (mut copied, mut since) = (Vec::new(), 0);
    for array in arrays {
        let bytes = array.bytes() / array.streams.len().max(1) as u64;
        for path in array.streams.iter().map(|stream| partial.join(stream)) {
            let end = at + bytes;
            match File::open(&path) {
                Ok(mut stream) => {
                    out.seek(SeekFrom::Start(at)).map_err(failed)?;
                    let n = std::io::copy(&mut stream, &mut out).map_err(failed)?;
                    check_length(&path, n, bytes)?;
                    copied.push(path);
                    since += n;
                }
                // It was copied before the program was killed, or no batch gave it anything.
                Err(e) if e.kind() == std::io::ErrorKind::NotFound => {
                    let there = out.metadata().map_err(failed)?.len();
                    if bytes > 0 && there < end {
                        check_length(&path, 0, bytes)?;
                    }
                }
                Err(e) => return Err(Error::io("read", &path)(e)),
            }
            at = end;
            if since >= SYNC {
                sync(&out, file, &mut copied)?;
                since = 0;
            }
        }
    }
    out.set_len(at).map_err(failed)?;
    sync(&out, file, &mut copied)?;
    Ok(at)
}

fn check_length(path: &Path, got: u64, want: u64) -> Result<()> {
    if got == want {
        return Ok(());
    }
    let advice = "it was changed since; remove the folder and start anew";
    let (expected, got) = (format!("{want} bytes"), got.to_string());
    Err(Error::invalid(path.display().to_string(), expected, got, advice))
}

fn sync(out: &File, file: &Path, copied: &mut Vec<PathBuf>) -> Result<()> {
    out.sync_all().map_err(Error::io("sync", file))?;
    for path in copied.drain(..) {
        fs::remove_file(&path).map_err(Error::io("remove", &path))?;
    }
    Ok(())
}

/// Gives a file or folder its name.
fn name(whole: &Path, out: &Path) -> Result<()> {
    fs::rename(whole, out).map_err(Error::io("rename to", out))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn array(name: &str, n: u64, streams: &[&str]) -> Array {
        let streams = streams.iter().map(|s| s.to_string()).collect();
        Array { name: name.into(), element: Some(Element::F16), shape: vec![n], streams }
    }

    #[test]
    fn who_is_killed_in_the_middle_goes_on() {
        let folder = tempfile::tempdir().unwrap();
        let (partial, whole) = (folder.path(), folder.path().join(WHOLE));
        let write = |name: &str, bytes: &[u8]| fs::write(partial.join(name), bytes).unwrap();
        let arrays = [array("x", 4, &["x.1", "x.2"]), array("y", 1, &["y"])];
        let arrays: Vec<&Array> = arrays.iter().collect();
        // The first stream is in the file and gone, the second half copied.
        write(WHOLE, b"headAAAAB");
        write("x.2", b"BBBB");
        write("y", b"CC");
        assert!(begun(partial));
        assert_eq!(join(partial, &whole, b"head", &arrays).unwrap(), 14);
        assert_eq!(fs::read(&whole).unwrap(), b"headAAAABBBBCC");
        assert!(!partial.join("x.2").exists() && !partial.join("y").exists());
        // Once more, nothing being left of the streams.
        assert_eq!(join(partial, &whole, b"head", &arrays).unwrap(), 14);
        assert_eq!(fs::read(&whole).unwrap(), b"headAAAABBBBCC");
    }

    #[test]
    fn streams_of_another_length_are_refused() {
        let folder = tempfile::tempdir().unwrap();
        let (partial, whole) = (folder.path(), folder.path().join(WHOLE));
        let arrays = [array("x", 4, &["x.1", "x.2"])];
        let arrays: Vec<&Array> = arrays.iter().collect();
        fs::write(partial.join("x.1"), b"AAAA").unwrap();
        let error = join(partial, &whole, b"head", &arrays).unwrap_err().to_string();
        assert!(error.contains("x.2: expected 4 bytes, got 0"), "{error}");
        fs::write(partial.join("x.2"), b"BBBBB").unwrap();
        let error = join(partial, &whole, b"head", &arrays).unwrap_err().to_string();
        assert!(error.contains("x.2: expected 4 bytes, got 5"), "{error}");
    }

    #[test]
    fn numpys_header_ends_at_64_bytes() {
        for n in [0, 7, 1 << 40] {
            let header = npy_header(&array("x", n, &[]));
            assert_eq!(header.len() % 64, 0);
            assert_eq!(u16::from_le_bytes([header[8], header[9]]) as usize, header.len() - 10);
            let text = std::str::from_utf8(&header[10..]).unwrap();
            let want = format!("{{'descr': '<f2', 'fortran_order': False, 'shape': ({n},), }}");
            assert!(text.starts_with(&want) && text.ends_with('\n'), "{text}");
        }
    }
}
