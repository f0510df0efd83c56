//! Models in several files: `NAME-00001-of-00003.gguf`, ...

use std::path::{Path, PathBuf};

use crate::{Error, Result};

/// All parts of the model whose first file is `first`, in order; `first` alone when its name is not that of
/// a part.
///
/// # Errors
/// When `first` is not part 1, or a part is missing.
pub fn split_paths(first: &Path) -> Result<Vec<PathBuf>> {
    let name = first.file_name().and_then(|name| name.to_str()).unwrap_or_default();
    let Some((stem, part, parts)) = parse(name) else { return Ok(vec![first.to_path_buf()]) };
    let path_of = |i: u32| first.with_file_name(format!("{stem}-{i:05}-of-{parts:05}.gguf"));
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
