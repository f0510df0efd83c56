//! `env:guess`: a number to be guessed within the turns of the dialogue.

use std::collections::HashMap;

use serde_json::json;

use super::{asked, unknown};
use crate::env::{Environment, Opening, Step, Task, Turn};
use crate::{Error, Result};

/// Its dialogues and their numbers.
#[derive(Default)]
pub(super) struct Guess {
    numbers: HashMap<String, i64>,
}

impl Environment for Guess {
    fn reset(&mut self, dialogue: &str, task: &Task) -> Result<Opening> {
        let messages = asked(task)?;
        let number = task.problem.answer.trim().parse().map_err(|_| {
            let got = format!("{:?}", crate::data::jsonl::shorten(&task.problem.answer, 40));
            let advice = "use task:guess, or data whose answers are numbers";
            Error::invalid(task.problem.source.clone(), "a whole number to guess", got, advice)
        })?;
        self.numbers.insert(dialogue.into(), number);
        Ok(Opening { messages, tools: Vec::new() })
    }

    fn step(&mut self, dialogue: &str, turn: &Turn) -> Result<Step> {
        let &number = self.numbers.get(dialogue).ok_or_else(|| unknown(dialogue))?;
        let guess = last_number(&turn.content);
        let right = guess == Some(number) && !turn.truncated;
        let word = match guess {
            Some(guess) if guess < number => "higher",
            Some(guess) if guess > number => "lower",
            Some(_) => "right",
            None => "I see no number",
        };
        Ok(Step {
            messages: vec![json!({"role": "user", "content": word})],
            reward: right as u8 as f32,
            done: right || turn.last,
            success: Some(right),
            reason: format!("{number}: {word} after turn {}", turn.number),
        })
    }

    fn close(&mut self, dialogue: &str) -> Result<()> {
        self.numbers.remove(dialogue);
        Ok(())
    }
}

/// The last whole number in a text.
fn last_number(text: &str) -> Option<i64> {
    let words = text.split(|c: char| !c.is_ascii_digit() && c != '-');
    words.filter_map(|word| word.trim_end_matches('-').parse().ok()).next_back()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_found_in_words() {
        for (text, number) in [
            ("42", Some(42)),
            ("is it 7, or -3?", Some(-3)),
            ("none", None),
            ("5-", Some(5)),
            ("", None),
        ] {
            assert_eq!(last_number(text), number, "{text}");
        }
    }
}
