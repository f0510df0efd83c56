//! Long runs of zeros become holes of a file: they take no room on the disk and no time to write.

use std::{
    fs::File,
    io::{self, BufWriter, Seek, SeekFrom, Write},
};

/// Bytes looked at together; a run of zeros is skipped in whole pieces of this.
const PIECE: usize = 64 * 1024;

/// Writes to a new file and skips zeros.
pub(super) struct Holes<'a> {
    out: &'a mut BufWriter<File>,
    /// Zeros that were skipped since the last byte written.
    pending: u64,
}

impl<'a> Holes<'a> {
    /// A writer to `out`, a file with nothing behind its present position.
    pub(super) fn new(out: &'a mut BufWriter<File>) -> Holes<'a> {
        Holes { out, pending: 0 }
    }

    fn skip(&mut self) -> io::Result<()> {
        if self.pending > 0 {
            self.out.seek(SeekFrom::Current(self.pending as i64))?;
            self.pending = 0;
        }
        Ok(())
    }

    /// Gives the file its full length.
    pub(super) fn finish(mut self) -> io::Result<()> {
        if self.pending > 0 {
            self.skip()?;
            let end = self.out.stream_position()?;
            self.out.get_ref().set_len(end)?;
        }
        Ok(())
    }
}

impl Write for Holes<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let piece = &bytes[..bytes.len().min(PIECE)];
        if piece.len() == PIECE && piece.iter().all(|b| *b == 0) {
            self.pending += PIECE as u64;
            return Ok(PIECE);
        }
        self.skip()?;
        self.out.write(piece)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.out.flush()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn zeros_are_skipped_and_read_back() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("f");
        let mut bytes = vec![7u8; 1000];
        bytes.resize(PIECE * 5, 0);
        bytes.extend([9; 77]);
        bytes.resize(bytes.len() + 3 * PIECE + 5, 0);
        let mut file = BufWriter::new(File::create(&path).unwrap());
        let mut out = Holes::new(&mut file);
        out.write_all(&bytes).unwrap();
        out.finish().unwrap();
        file.flush().unwrap();
        drop(file);
        assert_eq!(std::fs::read(&path).unwrap(), bytes);
    }

    #[test]
    fn a_file_that_ends_in_a_hole_has_its_length() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("f");
        let mut file = BufWriter::new(File::create(&path).unwrap());
        let mut out = Holes::new(&mut file);
        out.write_all(&vec![0; 10 * PIECE]).unwrap();
        out.finish().unwrap();
        drop(file);
        assert_eq!(std::fs::metadata(&path).unwrap().len(), 10 * PIECE as u64);
    }
}
