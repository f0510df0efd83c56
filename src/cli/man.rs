//! `bupo-gguf man`

use std::path::PathBuf;

use clap::{Args, CommandFactory};

use super::{Cli, print_line};
use crate::{Error, Result};

/// Write manual pages of the program and of every command.
#[derive(Args)]
#[command(after_help = "Example:
  bupo-gguf man ~/.local/share/man/man1 && man bupo-gguf-train")]
pub struct ManArgs {
    /// Folder to write bupo-gguf.1, bupo-gguf-train.1, .. to
    #[arg(value_name = "DIR")]
    folder: PathBuf,
}

pub fn run(args: ManArgs) -> Result<()> {
    std::fs::create_dir_all(&args.folder).map_err(Error::io("create", &args.folder))?;
    clap_mangen::generate_to(Cli::command(), &args.folder)
        .map_err(Error::io("write manual pages to", &args.folder))?;
    print_line(&args.folder.display().to_string())
}
