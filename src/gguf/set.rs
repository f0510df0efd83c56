//! A model as one, in however many files it lies.

use std::{
    collections::HashMap,
    path::{Path, PathBuf},
};

use super::{GgufFile, TensorInfo, Value, shown, split_paths};
use crate::{Error, Result};

/// Keys that only files of a split model have.
pub(super) const SPLIT_NO: &str = "split.no";
pub(super) const SPLIT_COUNT: &str = "split.count";
pub(super) const SPLIT_TENSORS: &str = "split.tensors.count";

/// All files of a model, open.
#[derive(Debug)]
pub struct GgufSet {
    paths: Vec<PathBuf>,
    parts: Vec<GgufFile>,
    /// (part, index in it) of each tensor by name.
    names: HashMap<String, (usize, usize)>,
}

impl GgufSet {
    /// Opens `first`, and the other parts when it is the first of several (see [`split_paths`]).
    ///
    /// # Errors
    /// A part is missing, unsound, no model, or of another set; a tensor is there twice.
    pub fn open(first: &Path) -> Result<GgufSet> {
        let paths = split_paths(first)?;
        let parts = paths.iter().map(|path| GgufFile::open(path)).collect::<Result<Vec<_>>>()?;
        let mut names = HashMap::new();
        for (i, part) in parts.iter().enumerate() {
            check_part(part, i, parts.len())?;
            part.require_model()?;
            for (j, tensor) in part.tensors().iter().enumerate() {
                if names.insert(tensor.name.clone(), (i, j)).is_some() {
                    return Err(Error::invalid(
                        format!("{}: tensor '{}'", part.name(), shown(&tensor.name)),
                        "each name once in all parts",
                        "it a second time",
                        "the parts are of different models: download them again",
                    ));
                }
            }
        }
        let (expected, got) = (parts[0].find::<u64>(SPLIT_TENSORS)?, names.len() as u64);
        if let Some(expected) = expected.filter(|_| parts.len() > 1)
            && expected != got
        {
            return Err(Error::invalid(
                first.display().to_string(),
                format!("{expected} tensors in all parts"),
                got.to_string(),
                "the parts are of different models: download them again",
            ));
        }
        Ok(GgufSet { paths, parts, names })
    }

    /// The files, in order.
    pub fn paths(&self) -> &[PathBuf] {
        &self.paths
    }

    /// The first file, which holds the metadata.
    pub fn head(&self) -> &GgufFile {
        &self.parts[0]
    }

    /// The files, open, in order.
    pub fn parts(&self) -> &[GgufFile] {
        &self.parts
    }

    /// The model's metadata in file order, without the keys about the split.
    pub fn metadata(&self) -> impl Iterator<Item = (&str, &Value)> {
        let split = [SPLIT_NO, SPLIT_COUNT, SPLIT_TENSORS];
        self.head().metadata().filter(move |(key, _)| !split.contains(key))
    }

    /// Every tensor with the file that holds it, in file order.
    pub fn tensors(&self) -> impl Iterator<Item = (&GgufFile, &TensorInfo)> {
        self.parts.iter().flat_map(|part| part.tensors().iter().map(move |t| (part, t)))
    }

    /// The tensor of this name and its file.
    pub fn tensor(&self, name: &str) -> Option<(&GgufFile, &TensorInfo)> {
        self.names.get(name).map(|&(i, j)| (&self.parts[i], &self.parts[i].tensors()[j]))
    }

    /// Bytes of all files.
    pub fn n_bytes(&self) -> u64 {
        self.parts.iter().map(GgufFile::n_bytes).sum()
    }
}

/// What a part says of its place among the others is true.
fn check_part(part: &GgufFile, index: usize, count: usize) -> Result<()> {
    for (key, is) in [(SPLIT_COUNT, count), (SPLIT_NO, index)] {
        let said = part.find::<usize>(key)?;
        // A file may say that it is one of one, or nothing at all when it is alone.
        if said.unwrap_or(is) != is || said.is_none() && count > 1 {
            return Err(Error::invalid(
                format!("{}: key '{key}'", part.name()),
                is.to_string(),
                said.map_or("no such key".to_owned(), |n| n.to_string()),
                "give the first of the files as they were split, with the names they had",
            ));
        }
    }
    Ok(())
}
