//! Parts of a reward that look at how a completion is written, not at whether it is right.

use regex::Regex;

use super::{Verdict, last_boxed, thoughts::spoken};

/// 1 where the pattern is found.
pub(super) fn pattern(pattern: &Regex, text: &str) -> Verdict {
    match pattern.find(text) {
        Some(found) => Verdict::right(format!("the pattern is found at byte {}", found.start())),
        None => Verdict::wrong("the pattern is not found"),
    }
}

/// 1 where the last `\boxed{..}` is closed and not empty; one in thoughts does not count.
pub(super) fn boxed(text: &str) -> Verdict {
    match spoken(text).and_then(last_boxed) {
        Some(_) => Verdict::right("there is a \\boxed{..}"),
        None => Verdict::wrong("no \\boxed{..}"),
    }
}

/// 1 where the completion is one `<think>..</think>` and then something. A prompt that ends with `<think>` has begun
/// it: then `text` begins with that end.
pub(super) fn think(text: &str) -> Verdict {
    let tags = |tag| text.matches(tag).count();
    let (open, close) = (tags("<think>"), tags("</think>"));
    let answer = text.split_once("</think>").map_or("", |(_, answer)| answer.trim());
    if text.trim_start().starts_with("<think>") && open == 1 && close == 1 && !answer.is_empty() {
        return Verdict::right("thoughts, then an answer");
    }
    Verdict::wrong(format!("{open} <think> and {close} </think>, not one of each and an answer"))
}

/// DAPO's soft punishment of length (arXiv 2503.14476, equation 13), with `L_max` = `limit`:
///
/// ```text
/// 0                                 |y| <= L_max - cache
/// ((L_max - cache) - |y|) / cache   L_max - cache < |y| <= L_max
/// -1                                L_max < |y|
/// ```
pub(super) fn overlong(tokens: usize, cache: usize, limit: usize) -> Verdict {
    let free = limit - cache;
    let reward = match tokens {
        n if n <= free => 0.0,
        n if n <= limit => (free as f32 - n as f32) / cache as f32,
        _ => -1.0,
    };
    Verdict { reward, reason: format!("{tokens} tokens, {free} are free") }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dapos_penalty_falls_over_the_cache() {
        for (tokens, reward) in
            [(0, 0.0), (80, 0.0), (81, -0.05), (90, -0.5), (100, -1.0), (101, -1.0)]
        {
            assert_eq!(overlong(tokens, 20, 100).reward, reward, "{tokens}");
        }
        assert_eq!(overlong(50, 100, 100).reward, -0.5);
    }

    #[test]
    fn formats() {
        for (text, right) in [
            ("<think>a</think> b", true),
            ("\n<think>a</think>\n\nb", true),
            ("<think>a</think> ", false),
            ("b <think>a</think> b", false),
            ("<think>a</think><think>a</think> b", false),
            ("<think>a", false),
            ("", false),
        ] {
            assert_eq!(think(text).reward == 1.0, right, "{text}");
        }
        assert_eq!(boxed("\\boxed{x}").reward, 1.0);
        assert_eq!(boxed("<think>\\boxed{x}</think>").reward, 0.0);
        assert_eq!(boxed("<think>\\boxed{x}").reward, 0.0);
        assert_eq!(boxed("\\boxed{x").reward, 0.0);
    }
}
