//! A file is whole or it is not there.

use std::{
    fs::{self, File},
    io::{self, BufWriter, Write},
    path::{Path, PathBuf},
};

use tempfile::TempPath;

use crate::{Error, Result};

/// Writes `path` so that its name only ever stands for a complete file: `fill` writes to a temporary file in
/// the same folder, which is synced to disk and renamed. Permissions are 0644 less the umask. A symbolic link
/// is followed.
///
/// # Errors
/// Those of `fill` and of the system. What stood under `path` before is then untouched, and the temporary
/// file is gone.
pub fn write_atomically(
    path: &Path,
    fill: impl FnOnce(&mut BufWriter<File>) -> Result<()>,
) -> Result<()> {
    Finished::write(path, fill)?.commit()
}

/// Refuses a folder, given by `option`, that has something in it: nothing is written over.
///
/// # Errors
/// [`Error::Invalid`] with the advice; [`Error::Io`] where it cannot be looked into.
pub fn refuse_filled(option: &str, folder: &Path, advice: &str) -> Result<()> {
    match fs::read_dir(folder).map(|mut entries| entries.next().is_some()) {
        Ok(true) => Err(Error::invalid(
            format!("{option} {}", folder.display()),
            "an empty or new folder",
            "one with files",
            advice,
        )),
        Err(e) if e.kind() != io::ErrorKind::NotFound => Err(Error::io("read folder", folder)(e)),
        _ => Ok(()),
    }
}

/// Writes a value as indented JSON by [`write_atomically`].
///
/// # Errors
/// Those of the system.
pub fn write_json_atomically(path: &Path, value: &impl serde::Serialize) -> Result<()> {
    write_atomically(path, |out| {
        serde_json::to_writer_pretty(&mut *out, value)
            .map_err(std::io::Error::from)
            .and_then(|()| out.write_all(b"\n"))
            .map_err(Error::io("write", path))
    })
}

/// A complete file, synced to disk, that has not got its name yet; dropped without it, it is gone.
pub(super) struct Finished {
    temporary: TempPath,
    target: PathBuf,
    path: PathBuf,
}

impl Finished {
    /// Writes a temporary file beside `path`.
    pub(super) fn write(
        path: &Path,
        fill: impl FnOnce(&mut BufWriter<File>) -> Result<()>,
    ) -> Result<Finished> {
        let target = fs::canonicalize(path).unwrap_or_else(|_| path.to_path_buf());
        if target.exists() && !target.is_file() || target.file_name().is_none() {
            return Err(Error::invalid(
                path.display().to_string(),
                "the name of an ordinary file",
                "a folder or a device",
                "give a file name",
            ));
        }
        let folder = folder_of(&target);
        let (file, temporary) =
            new_file(folder).map_err(Error::io("create a temporary file in", folder))?.into_parts();
        let mut out = BufWriter::with_capacity(1 << 18, file);
        fill(&mut out)?;
        out.flush().map_err(Error::io("write", path))?;
        out.get_ref().sync_all().map_err(Error::io("sync", path))?;
        Ok(Finished { temporary, target, path: path.to_path_buf() })
    }

    /// Gives it its name.
    pub(super) fn commit(self) -> Result<()> {
        let renamed = self.temporary.persist(&self.target);
        renamed.map_err(|e| Error::io("rename to", &self.path)(e.error))?;
        sync_folder(folder_of(&self.target))
    }
}

/// The folder that a file stands in.
pub(super) fn folder_of(path: &Path) -> &Path {
    match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    }
}

fn new_file(folder: &Path) -> std::io::Result<tempfile::NamedTempFile> {
    let mut builder = tempfile::Builder::new();
    builder.prefix(".partial-");
    #[cfg(unix)]
    builder.permissions(std::os::unix::fs::PermissionsExt::from_mode(0o644));
    builder.tempfile_in(folder)
}

/// Makes a rename in `folder` last; only Unix can.
fn sync_folder(folder: &Path) -> Result<()> {
    if cfg!(unix) {
        let handle = File::open(folder).map_err(Error::io("open", folder))?;
        handle.sync_all().map_err(Error::io("sync", folder))?;
    }
    Ok(())
}
