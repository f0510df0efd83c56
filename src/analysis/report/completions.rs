//! The completions of a run as a table that a reader sorts and filters: judged ones, or such as a teacher looked at.

use serde_json::{Value, json};

/// Bytes of completions that a page may hold.
const MOST_BYTES: usize = 500_000;
/// Characters of a prompt and of a completion that are shown.
const MOST_CHARS: (usize, usize) = (600, 1600);
/// Dialogues of a step that are shown as such, and messages of each.
const CHATS: usize = 4;
const MESSAGES: usize = 40;

/// The rows of the table: of each problem's completions, which stand together, the best and, where it is another, the
/// worst; where all of them are too many, of steps spread over the run, the last among them.
pub(super) fn shown(completions: &[Value]) -> Vec<Value> {
    let step = |c: &Value| number(c, "step") as u64;
    let steps: Vec<Vec<Value>> = completions
        .chunk_by(|a, b| step(a) == step(b))
        .map(|of_step| ends(of_step).into_iter().map(row).collect())
        .collect();
    let bytes: usize = steps.iter().flatten().map(|row| row.to_string().len()).sum();
    let every = bytes.div_ceil(MOST_BYTES).max(1);
    let n = steps.len();
    let kept = steps.into_iter().enumerate().filter(|(i, _)| (n - 1 - i).is_multiple_of(every));
    let mut left = MOST_BYTES;
    let mut rows: Vec<Value> = Vec::new();
    for (_, of_step) in kept.collect::<Vec<_>>().into_iter().rev() {
        for row in of_step {
            let size = row.to_string().len();
            if size <= left {
                left -= size;
                rows.push(row);
            }
        }
    }
    rows
}

/// A few dialogues, of the first step and of the last, each with a heading; none of single answers.
pub(super) fn chats(completions: &[Value]) -> Vec<(String, Vec<(String, String)>)> {
    let step = |c: &Value| number(c, "step") as u64;
    let steps: Vec<&[Value]> = completions.chunk_by(|a, b| step(a) == step(b)).collect();
    let looked_at = [steps.first(), steps.last().filter(|_| steps.len() > 1)];
    let mut chats = Vec::new();
    for of_step in looked_at.into_iter().flatten() {
        for c in ends(of_step).into_iter().take(CHATS) {
            let Some(messages) = c.get("messages").and_then(Value::as_array) else { continue };
            let title = format!(
                "step {}, {}: reward {}",
                step(c),
                text(c, "problem", MOST_CHARS.0),
                number(c, "reward")
            );
            let said = messages.iter().take(MESSAGES).map(|m| {
                let mut said = text(m, "content", MOST_CHARS.1);
                for call in m.get("tool_calls").and_then(Value::as_array).into_iter().flatten() {
                    let function = &call["function"];
                    let name = function["name"].as_str().unwrap_or_default();
                    said += &format!(
                        "\n\u{2192} {name}({})",
                        text(function, "arguments", MOST_CHARS.0)
                    );
                }
                (text(m, "role", 40), said.trim().to_string())
            });
            chats.push((title, said.collect()));
        }
    }
    chats
}

/// What stands at a key, as text of so many characters.
fn text(c: &Value, key: &str, most: usize) -> String {
    let text = match c.get(key) {
        Some(Value::String(text)) => text.clone(),
        Some(other) => other.to_string(),
        None => String::new(),
    };
    match text.char_indices().nth(most) {
        Some((end, _)) => format!("{} \u{2026}", &text[..end]),
        None => text,
    }
}

fn number(c: &Value, key: &str) -> f64 {
    c.get(key).and_then(Value::as_f64).unwrap_or(f64::NAN)
}

/// Of each problem the first completion of the highest reward, and the first of the lowest; all where nobody rewarded them.
pub(super) fn ends(of_step: &[Value]) -> Vec<&Value> {
    let reward = |c: &Value| number(c, "reward");
    let mut shown = Vec::new();
    for group in of_step.chunk_by(|a, b| a.get("problem") == b.get("problem")) {
        if group.iter().all(|c| c.get("reward").is_none()) {
            shown.extend(group);
            continue;
        }
        let best = group.iter().rev().max_by(|a, b| reward(a).total_cmp(&reward(b)));
        let worst = group.iter().min_by(|a, b| reward(a).total_cmp(&reward(b)));
        shown.extend(best);
        shown.extend(worst.filter(|worst| best.is_some_and(|best| reward(worst) < reward(best))));
    }
    shown
}

/// What the page has of a completion.
fn row(c: &Value) -> Value {
    let text = |key: &str, most: usize| text(c, key, most);
    json!({
        "step": c.get("step"),
        "problem": text("problem", MOST_CHARS.0),
        "reward": c.get("reward"),
        "tokens": c.get("tokens"),
        "reason": text("reason", MOST_CHARS.0),
        "cut off": c.get("truncated").and_then(Value::as_bool).unwrap_or(false),
        "prompt": text("prompt", MOST_CHARS.0),
        "completion": text("completion", MOST_CHARS.1),
        "right answer": text("answer", MOST_CHARS.0),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn completion(step: u64, problem: &str, reward: f64, text: &str) -> Value {
        json!({"step": step, "problem": problem, "reward": reward, "completion": text, "answer": "1"})
    }

    #[test]
    fn best_and_worst_of_each_problem_newest_step_first() {
        let all = [
            completion(1, "a", 0.0, "x"),
            completion(1, "a", 1.0, "y"),
            completion(1, "b", 0.5, "z"),
            completion(2, "a", 0.0, "u"),
            completion(2, "a", 0.0, "v"),
        ];
        let texts: Vec<_> = shown(&all).iter().map(|r| r["completion"].clone()).collect();
        assert_eq!(texts, ["u", "y", "x", "z"]);
    }

    #[test]
    fn completions_that_nobody_rewarded_are_all_shown() {
        let all =
            [0, 1, 2].map(|i| json!({"step": 1, "problem": "a", "completion": i.to_string()}));
        let rows = shown(&all);
        assert_eq!(rows.len(), 3);
        assert!(rows.iter().all(|row| row["reward"].is_null() && row["right answer"] == ""));
    }

    #[test]
    fn dialogues_are_shown_as_chat_and_single_answers_are_not() {
        let mut dialogue = completion(3, "a", 1.0, "x");
        dialogue["messages"] = json!([
            {"role": "user", "content": "<hi>"},
            {"role": "assistant", "content": "", "tool_calls": [
                {"function": {"name": "f", "arguments": {"x": 1}}}]},
        ]);
        let chats = chats(&[completion(1, "a", 0.0, "y"), dialogue]);
        assert_eq!(chats.len(), 1);
        assert_eq!(chats[0].0, "step 3, a: reward 1");
        assert_eq!(chats[0].1[0], ("user".into(), "<hi>".into()));
        assert_eq!(chats[0].1[1].1, "\u{2192} f({\"x\":1})");
    }

    #[test]
    fn a_long_run_is_thinned_and_keeps_its_last_step() {
        let long = "w".repeat(1500);
        let all: Vec<_> = (1..=1000).map(|s| completion(s, &s.to_string(), 0.0, &long)).collect();
        let rows = shown(&all);
        assert_eq!(rows[0]["step"], 1000);
        let bytes: usize = rows.iter().map(|r| r.to_string().len()).sum();
        assert!(bytes <= MOST_BYTES && rows.len() > 200, "{bytes} bytes, {} rows", rows.len());
        assert!(rows.last().unwrap()["step"].as_u64().unwrap() < 10, "spread over the run");
    }
}
