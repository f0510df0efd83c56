//! Settings that the command line, `config.toml` and the library fill alike: their defaults stand once, at clap's
//! attributes.

/// Settings with what `--help` gives as defaults.
pub fn defaults<T: clap::Args>() -> T {
    let command = T::augment_args(clap::Command::new("defaults").no_binary_name(true));
    T::from_arg_matches(&command.get_matches_from([""; 0])).expect("no option is required")
}
