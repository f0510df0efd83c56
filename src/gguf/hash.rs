//! SHA-256 in hexadecimal, as `sha256sum` writes it.

use std::fs::File;
use std::io::Read;
use std::path::Path;

use sha2::{Digest, Sha256};

use super::GgufSet;
use crate::{Error, Result};

/// Bytes hashed before a mapped file gives back their memory.
const PIECE: usize = 8 << 20;

/// SHA-256 of a file's bytes.
///
/// # Errors
/// [`Error::Io`] when it cannot be read.
pub fn sha256(path: &Path) -> Result<String> {
    let mut file = File::open(path).map_err(Error::io("open", path))?;
    let mut sha = Sha256::new();
    let mut buffer = vec![0; 1 << 18];
    loop {
        match file.read(&mut buffer).map_err(Error::io("read", path))? {
            0 => return Ok(hex(sha)),
            n => sha.update(&buffer[..n]),
        }
    }
}

impl GgufSet {
    /// SHA-256 of the model's bytes: of the file, or of all parts joined.
    pub fn sha256(&self) -> String {
        let mut sha = Sha256::new();
        for part in self.parts() {
            for piece in part.raw().chunks(PIECE) {
                sha.update(piece);
                part.release(piece);
            }
        }
        hex(sha)
    }
}

fn hex(sha: Sha256) -> String {
    sha.finalize().iter().map(|byte| format!("{byte:02x}")).collect()
}
