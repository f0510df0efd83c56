//! Room on the disk, asked for before long work.

use std::path::Path;

use super::atomic::folder_of;
use crate::{Error, Result};

/// Refuses to begin a file of `bytes` where there is no room for it. A file that stands under the name
/// counts for nothing: it stays until the new one is complete.
///
/// # Errors
/// [`Error::Invalid`] with both figures. A file system that does not say what it has passes.
pub fn check_space(path: &Path, bytes: u64) -> Result<()> {
    let folder = folder_of(path);
    match free_bytes(folder) {
        Some(free) if free < bytes => Err(Error::invalid(
            format!("disk of {}", folder.display()),
            format!("{} MiB free for {}", bytes.div_ceil(1 << 20), path.display()),
            format!("{} MiB", free >> 20),
            "free some, or write to another disk",
        )),
        _ => Ok(()),
    }
}

#[cfg(unix)]
fn free_bytes(folder: &Path) -> Option<u64> {
    let stat = rustix::fs::statvfs(folder).ok()?;
    stat.f_bavail.checked_mul(stat.f_frsize)
}

#[cfg(not(unix))]
fn free_bytes(_: &Path) -> Option<u64> {
    None
}
