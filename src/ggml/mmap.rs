//! Read-only mapped files.

use std::{fs::File, path::Path};

use crate::{Error, Result};

/// A file mapped read-only into memory; derefs to its bytes.
#[derive(Debug)]
pub struct MappedFile(memmap2::Mmap);

impl MappedFile {
    /// Maps `path`. An empty file is an error of the reader above, not of the map.
    pub fn open(path: &Path) -> Result<MappedFile> {
        let file = File::open(path).map_err(Error::io("open", path))?;
        // SAFETY: the map is read-only. Another process could still shorten the file under us, which
        // every program that maps files (llama.cpp too) accepts; we never write to a model file.
        let map = unsafe { memmap2::Mmap::map(&file) }.map_err(Error::io("map", path))?;
        Ok(MappedFile(map))
    }
}

impl std::ops::Deref for MappedFile {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.0
    }
}
