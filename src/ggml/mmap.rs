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
        if file.metadata().map_err(Error::io("open", path))?.is_dir() {
            let place = path.display().to_string();
            return Err(Error::invalid(place, "a file", "a folder", "name a file in it"));
        }
        // SAFETY: the map is read-only. Another process could still shorten the file under us, which
        // every program that maps files (llama.cpp too) accepts; we never write to a model file.
        let map = unsafe { memmap2::Mmap::map(&file) }.map_err(Error::io("map", path))?;
        Ok(MappedFile(map))
    }

    /// Gives back the memory that holds `part`, a slice of this file; reading it again takes it from the
    /// disk again. A hint: nothing is promised.
    pub fn release(&self, part: &[u8]) {
        let all = self.0.as_ptr_range();
        let inside = part.as_ptr_range();
        if part.is_empty() || inside.start < all.start || inside.end > all.end {
            return;
        }
        #[cfg(unix)]
        {
            let start = inside.start as usize - all.start as usize;
            // SAFETY: a range within the map, which is shared and read-only: dropped pages come back with
            // the file's bytes, so that no reference into the map sees a change.
            let _ = unsafe {
                self.0.unchecked_advise_range(memmap2::UncheckedAdvice::DontNeed, start, part.len())
            };
        }
    }
}

impl std::ops::Deref for MappedFile {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.0
    }
}
