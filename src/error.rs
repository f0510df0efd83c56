//! One error type for the library. Its `Display` is the one line a user reads:
//! what, where, expected, got, what to do.

use std::cell::Cell;
use std::panic::{self, AssertUnwindSafe};
use std::sync::Once;
use std::{io, path::Path, path::PathBuf};

/// `Result` with this library's [`Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Everything that can go wrong, in the words a user reads.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The operating system refused: `cannot read m.gguf: No such file or directory`.
    #[error("cannot {action} {}: {source}", path.display())]
    Io {
        /// A verb: "read", "create", "rename to".
        action: &'static str,
        /// The file or folder.
        path: PathBuf,
        /// The system's own words.
        source: io::Error,
    },
    /// Input or an option that does not hold what it should.
    #[error("{place}: expected {expected}, got {got}; {advice}")]
    Invalid {
        /// Where: a file and line, a tensor, an option.
        place: String,
        /// What should stand there.
        expected: String,
        /// What stands there.
        got: String,
        /// What the user can do.
        advice: String,
    },
    /// Something well-formed that this program does not do.
    #[error("{what} '{got}' is not supported; supported: {supported}")]
    Unsupported {
        /// The kind of thing: "architecture", "tensor type".
        what: &'static str,
        /// Its name.
        got: String,
        /// The list of those that work.
        supported: String,
    },
    /// llama.cpp or ggml refused.
    #[error("{call} failed: {reason}; {advice}")]
    Engine {
        /// The operation in plain words.
        call: String,
        /// The engine's own words or code.
        reason: String,
        /// What the user can do.
        advice: String,
    },
    /// The user asked to stop.
    #[error("interrupted")]
    Interrupted,
}

impl Error {
    /// An [`Error::Io`], for `map_err`: `.map_err(Error::io("read", path))`.
    pub fn io(action: &'static str, path: impl AsRef<Path>) -> impl FnOnce(io::Error) -> Error {
        let path = path.as_ref().to_path_buf();
        move |source| Error::Io { action, path, source }
    }

    /// An [`Error::Invalid`].
    pub fn invalid(
        place: impl Into<String>,
        expected: impl Into<String>,
        got: impl Into<String>,
        advice: impl Into<String>,
    ) -> Error {
        Error::Invalid {
            place: place.into(),
            expected: expected.into(),
            got: got.into(),
            advice: advice.into(),
        }
    }

    /// An [`Error::Engine`].
    pub fn engine(
        call: impl Into<String>,
        reason: impl Into<String>,
        advice: impl Into<String>,
    ) -> Error {
        Error::Engine { call: call.into(), reason: reason.into(), advice: advice.into() }
    }
}

/// What was got instead of some JSON, in words that fit behind "got": serde's own begin with what it expected.
pub(crate) fn json_fault(e: &serde_json::Error) -> String {
    let what = match e.classify() {
        serde_json::error::Category::Eof => "JSON that ends early",
        serde_json::error::Category::Data => "other JSON",
        _ => "text that is no JSON",
    };
    format!("{what} ({e})")
}

thread_local! {
    /// Whether a panic of this thread is somebody else's crate giving up on bytes, which becomes an error.
    static QUIET: Cell<bool> = const { Cell::new(false) };
}

/// Runs code of another crate that panics on some damaged bytes; none where it did. What the panic would print
/// is not printed, for the error that follows is the program's own: the hook in place passes over it.
pub(crate) fn caught<T>(run: impl FnOnce() -> T) -> Option<T> {
    static HOOK: Once = Once::new();
    HOOK.call_once(|| {
        let before = panic::take_hook();
        panic::set_hook(Box::new(move |info| {
            if !QUIET.get() {
                before(info);
            }
        }));
    });
    let nested = QUIET.replace(true);
    let outcome = panic::catch_unwind(AssertUnwindSafe(run));
    QUIET.set(nested);
    outcome.ok()
}
