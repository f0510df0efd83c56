//! Models in several files: `NAME-00001-of-00003.gguf`, ...

use std::path::{Path, PathBuf};

use super::{
    ALIGNMENT_KEY, GgufWriter,
    set::{SPLIT_COUNT, SPLIT_NO, SPLIT_TENSORS},
    space::check_space,
};
use crate::{Error, Result};

/// All parts of the model whose first file is `first`, in order; `first` alone when its name is not that of
/// a part.
///
/// # Errors
/// When `first` is not part 1, or a part is missing.
pub fn split_paths(first: &Path) -> Result<Vec<PathBuf>> {
    let name = first.file_name().and_then(|name| name.to_str()).unwrap_or_default();
    let Some((stem, part, parts)) = parse(name) else { return Ok(vec![first.to_path_buf()]) };
    let path_of = |i: u32| part_path(first, stem, i as usize, parts as usize);
    if part != 1 {
        return Err(Error::invalid(
            first.display().to_string(),
            "the first part of a split model",
            format!("part {part} of {parts}"),
            format!("give {}", path_of(1).display()),
        ));
    }
    let mut paths = Vec::new();
    for i in 1..=parts {
        let path = path_of(i);
        if !path.is_file() {
            return Err(Error::invalid(
                first.display().to_string(),
                format!("all {parts} parts side by side"),
                format!("no file {}", path.display()),
                "download the missing part",
            ));
        }
        paths.push(path);
    }
    Ok(paths)
}

/// The name of a part (from 1) beside `path`.
fn part_path(path: &Path, stem: &str, part: usize, parts: usize) -> PathBuf {
    path.with_file_name(format!("{stem}-{part:05}-of-{parts:05}.gguf"))
}

impl GgufWriter<'_> {
    /// Writes the model in files of at most `max_bytes` (a tensor that is larger has a file of its own):
    /// `NAME.gguf` becomes `NAME-00001-of-0000N.gguf`, .., or stays `NAME.gguf` when one file is enough.
    /// The first file has the metadata. Gives the paths, in order; `check` may refuse one before anything is
    /// written.
    ///
    /// All are complete on the disk before the first gets its name, and the one that is opened gets it last.
    ///
    /// # Errors
    /// Those of [`GgufWriter::write`]; more than 65,535 parts.
    pub fn write_split(
        mut self,
        path: &Path,
        max_bytes: u64,
        check: impl Fn(&Path) -> Result<()>,
    ) -> Result<Vec<PathBuf>> {
        let total = self.n_bytes(path)?;
        if total <= max_bytes {
            self.write(path)?;
            return Ok(vec![path.to_path_buf()]);
        }
        check_space(path, total)?;
        let n_tensors = self.tensors.len() as i32;
        let mut parts = self.cut(path, max_bytes)?;
        let count = u16::try_from(parts.len()).map_err(|_| {
            let got = parts.len().to_string();
            Error::invalid("split", "at most 65535 files", got, "allow larger ones")
        })?;
        let name = path.file_name().and_then(|name| name.to_str()).unwrap_or("model");
        let stem = name.strip_suffix(".gguf").unwrap_or(name);
        let paths: Vec<_> =
            (1..=parts.len()).map(|i| part_path(path, stem, i, parts.len())).collect();
        paths.iter().try_for_each(|path| check(path))?;
        for (i, part) in parts.iter_mut().enumerate() {
            part.metadata(SPLIT_NO, i as u16)?;
            part.metadata(SPLIT_COUNT, count)?;
            part.metadata(SPLIT_TENSORS, n_tensors)?;
        }
        let mut finished = Vec::with_capacity(parts.len());
        for (part, path) in parts.into_iter().zip(&paths) {
            finished.push(part.write_unnamed(path)?);
        }
        for (i, file) in finished.into_iter().enumerate().rev() {
            if let Err(error) = file.commit() {
                for named in &paths[i + 1..] {
                    let _ = std::fs::remove_file(named);
                }
                return Err(error);
            }
        }
        Ok(paths)
    }

    /// The tensors in runs of at most `max_bytes`, each in a file of its own.
    fn cut(mut self, path: &Path, max_bytes: u64) -> Result<Vec<Self>> {
        /// Bytes of the keys about the split.
        const KEYS: u64 = 128;
        let alignment = self.alignment;
        let tensors = std::mem::take(&mut self.tensors);
        let empty = |like: &Self| {
            let mut part = GgufWriter::new();
            for (key, value) in like.metadata.iter().filter(|(key, _)| key == ALIGNMENT_KEY) {
                part.metadata(key, value.clone())?;
            }
            Ok::<_, Error>(part)
        };
        let mut parts = vec![self];
        let mut bytes = parts[0].n_bytes(path)? + KEYS;
        for (info, data) in tensors {
            // Name, shape, type and place in the table; padded data.
            let entry = 8 + info.name.len() + 4 + 8 * info.shape.len() + 4 + 8;
            let size = (info.n_bytes() + entry as u64).next_multiple_of(alignment) + alignment;
            let last = parts.last().expect("there is one");
            if bytes + size > max_bytes && !last.tensors.is_empty() {
                let part = empty(&parts[0])?;
                parts.push(part);
                bytes = KEYS + alignment;
            }
            bytes += size;
            parts.last_mut().expect("there is one").tensors.push((info, data));
        }
        Ok(parts)
    }
}

/// `NAME-00002-of-00003.gguf` -> (`NAME`, 2, 3).
fn parse(name: &str) -> Option<(&str, u32, u32)> {
    let (rest, parts) = name.strip_suffix(".gguf")?.rsplit_once("-of-")?;
    let (stem, part) = rest.rsplit_once('-')?;
    let number = |digits: &str| {
        (digits.len() == 5 && digits.bytes().all(|b| b.is_ascii_digit()))
            .then(|| digits.parse().ok())
            .flatten()
    };
    Some((stem, number(part)?, number(parts)?)).filter(|(_, _, parts)| *parts > 0)
}
