//! Text equality, blanks at both ends aside.

use super::{Verdict, quoted};

/// 1 when the trimmed completion is the trimmed answer.
pub(super) fn score(answer: &str, completion: &str) -> Verdict {
    let (answer, completion) = (answer.trim(), completion.trim());
    if completion == answer {
        Verdict::right("the same text")
    } else {
        Verdict::wrong(format!("{} is not {}", quoted(completion), quoted(answer)))
    }
}
