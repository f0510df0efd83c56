//! `bupo-gguf completions`

use clap::{Args, CommandFactory};
use clap_complete::Shell;

use super::Cli;
use crate::{Error, Result};

/// Print a script that completes commands and options in a shell.
#[derive(Args)]
#[command(after_help = "Examples:
  bupo-gguf completions bash \\
      > ~/.local/share/bash-completion/completions/bupo-gguf
  bupo-gguf completions zsh > ~/.zfunc/_bupo-gguf
  bupo-gguf completions fish > ~/.config/fish/completions/bupo-gguf.fish")]
pub struct CompletionsArgs {
    /// Whose script
    #[arg(value_enum, value_name = "SHELL")]
    shell: Shell,
}

pub fn run(args: CompletionsArgs) -> Result<()> {
    let mut script = Vec::new();
    clap_complete::generate(args.shell, &mut Cli::command(), "bupo-gguf", &mut script);
    std::io::Write::write_all(&mut std::io::stdout(), &script)
        .map_err(Error::io("write to", "stdout"))
}
