//! Data files as they lie on the hub: plain, gzip (`.gz`) or Zstandard (`.zst`), told by their first bytes.

use std::{
    fs::File,
    io::{self, BufReader, Read, Seek},
    path::Path,
};

use flate2::read::MultiGzDecoder;

use crate::{Error, Result};

/// What a file holds, decompressed as it is read; nothing of it is kept.
pub type Plain = Box<dyn Read + Send>;

/// Formats that are known by their first bytes and not read.
const OTHERS: [(&[u8], &str); 4] = [
    (b"BZh", "bzip2"),
    (b"\xfd7zXZ\0", "xz"),
    (b"PK\x03\x04", "a zip archive"),
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive"),
];

/// Opens a file for reading from its start.
///
/// # Errors
/// The file cannot be read, or is compressed in another way.
pub fn open(path: &Path) -> Result<Plain> {
    let mut file = File::open(path).map_err(Error::io("read", path))?;
    let mut start = Vec::new();
    file.by_ref().take(8).read_to_end(&mut start).map_err(Error::io("read", path))?;
    // A pipe cannot go back: what was read is put before the rest.
    let file: Plain = match file.rewind() {
        Ok(()) => Box::new(file),
        Err(_) => Box::new(io::Cursor::new(start.clone()).chain(file)),
    };
    if start.starts_with(b"\x1f\x8b") {
        return Ok(Box::new(MultiGzDecoder::new(BufReader::new(file))));
    }
    if start.starts_with(b"\x28\xb5\x2f\xfd") {
        let decoder = zstd::Decoder::new(file).map_err(Error::io("read", path))?;
        return Ok(Box::new(decoder));
    }
    if let Some((_, name)) = OTHERS.into_iter().find(|(magic, _)| start.starts_with(magic)) {
        let expected = "text, plain or compressed with gzip or Zstandard";
        let advice = "decompress the file first";
        return Err(Error::invalid(path.display().to_string(), expected, name, advice));
    }
    Ok(file)
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    fn read(bytes: &[u8]) -> std::result::Result<String, String> {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        file.write_all(bytes).unwrap();
        let mut text = String::new();
        let mut plain = open(file.path()).map_err(|e| e.to_string())?;
        plain.read_to_string(&mut text).map_err(|e| e.to_string())?;
        Ok(text)
    }

    fn gzip(text: &str) -> Vec<u8> {
        let mut out = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        out.write_all(text.as_bytes()).unwrap();
        out.finish().unwrap()
    }

    #[test]
    fn plain_gzip_and_zstd_read_the_same() {
        let text = "{\"a\": 1}\n".repeat(5000);
        assert_eq!(read(text.as_bytes()).unwrap(), text);
        assert_eq!(read(&gzip(&text)).unwrap(), text);
        assert_eq!(read(&[gzip(&text), gzip("b")].concat()).unwrap(), text.clone() + "b");
        assert_eq!(read(&zstd::encode_all(text.as_bytes(), 3).unwrap()).unwrap(), text);
        assert_eq!(read(b"").unwrap(), "");
        let cut = gzip(&text);
        assert!(read(&cut[..cut.len() / 2]).is_err());
    }

    #[test]
    fn other_compressions_are_named() {
        for (start, name) in OTHERS {
            let error = read(&[start, b"rest"].concat()).unwrap_err();
            assert!(error.contains(&format!("got {name}; decompress")), "{error}");
        }
    }
}
