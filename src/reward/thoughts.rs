//! Thoughts in tags, which are not part of the answer: `<think>..</think>` and its kin.

/// Names of the tags that models are taught to think in.
const TAGS: [&str; 4] = ["think", "thinking", "thought", "reasoning"];

/// What a completion says when it has done thinking: all that follows the last closing tag, or everything where
/// there is no tag. `None` where thoughts are still open at the end: then nothing was said.
pub(super) fn spoken(text: &str) -> Option<&str> {
    let last = |tag: String| text.rfind(&tag).map(|at| at + tag.len());
    let closed = TAGS.iter().filter_map(|name| last(format!("</{name}>"))).max();
    let opened = TAGS.iter().filter_map(|name| last(format!("<{name}>"))).max();
    if opened > closed {
        return None;
    }
    Some(&text[closed.unwrap_or(0)..])
}

/// The end of a prompt that begins the completion's thoughts for it, as the templates of reasoning models do:
/// `<think>` with the blanks behind, or `<think>`, blanks, `</think>`, blanks. Empty for any other prompt.
pub(super) fn opening(prompt: &str) -> &str {
    for name in TAGS {
        let end = prompt.trim_end();
        let end = end.strip_suffix(&format!("</{name}>")).map_or(end, str::trim_end);
        if let Some(before) = end.strip_suffix(&format!("<{name}>")) {
            return &prompt[before.len()..];
        }
    }
    ""
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_follows_thoughts_is_said() {
        for (text, said) in [
            ("5", Some("5")),
            ("<think>7</think> 5", Some(" 5")),
            ("7</think>5", Some("5")),
            ("<think>7</think>5<think>6</think>8", Some("8")),
            ("<reasoning>7</reasoning>\n5", Some("\n5")),
            ("<think>7", None),
            ("<think>7</think>5<think>6", None),
            ("", Some("")),
        ] {
            assert_eq!(spoken(text), said, "{text}");
        }
    }

    #[test]
    fn a_prompt_may_open_the_thoughts() {
        for (prompt, begun) in [
            ("user: 1+1?\nassistant: <think>\n", "<think>\n"),
            ("<think>\n\n</think>\n\n", "<think>\n\n</think>\n\n"),
            ("Write <think> first. assistant:", ""),
            ("<think>a</think>", ""),
            ("", ""),
        ] {
            assert_eq!(opening(prompt), begun, "{prompt}");
        }
    }
}
