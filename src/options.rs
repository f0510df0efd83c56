//! Settings that the command line, `config.toml` and the library fill alike: their defaults stand once, at clap's
//! attributes.

/// Settings with what `--help` gives as defaults.
pub fn defaults<T: clap::Args>() -> T {
    let command = T::augment_args(clap::Command::new("defaults").no_binary_name(true));
    T::from_arg_matches(&command.get_matches_from([""; 0])).expect("no option is required")
}

/// A count of one or more, for clap's `value_parser`.
///
/// # Errors
/// What the user reads after the value: what is expected.
pub fn at_least_one(text: &str) -> Result<usize, String> {
    let count = text.parse::<usize>().map_err(|e| format!("expected a whole number ({e})"))?;
    if count == 0 {
        return Err("expected at least 1; leave the option out for its default".into());
    }
    Ok(count)
}
