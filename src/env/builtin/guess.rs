//! `env:guess`: a number to be guessed within the turns of the dialogue.

use std::cmp::Ordering;
use std::collections::HashMap;

use serde_json::json;

use super::{asked, unknown};
use crate::env::{Environment, Opening, Step, Task, Turn};
use crate::{Error, Result};

/// What a guess costs that an earlier answer had ruled out, and a turn without a number.
const WASTED: f32 = 0.1;

/// Its dialogues.
#[derive(Default)]
pub(super) struct Guess {
    games: HashMap<String, Game>,
}

/// A number, and what has been said of it.
struct Game {
    number: i64,
    above: i64,
    below: i64,
}

impl Game {
    fn new(number: i64) -> Game {
        Game { number, above: i64::MIN, below: i64::MAX }
    }

    /// The answer to a guess, and its reward.
    fn hear(&mut self, guess: Option<i64>) -> (&'static str, f32) {
        let Some(guess) = guess else { return ("I see no number", -WASTED) };
        let possible = self.above < guess && guess < self.below;
        let word = match guess.cmp(&self.number) {
            Ordering::Less => {
                self.above = self.above.max(guess);
                "higher"
            }
            Ordering::Greater => {
                self.below = self.below.min(guess);
                "lower"
            }
            Ordering::Equal => return ("right", 1.0),
        };
        (word, if possible { 0.0 } else { -WASTED })
    }
}

impl Environment for Guess {
    fn reset(&mut self, dialogue: &str, task: &Task) -> Result<Opening> {
        let messages = asked(task)?;
        let number = task.problem.answer.trim().parse().map_err(|_| {
            let got = format!("{:?}", crate::data::jsonl::shorten(&task.problem.answer, 40));
            let advice = "use task:guess, or data whose answers are numbers";
            Error::invalid(task.problem.source.clone(), "a whole number to guess", got, advice)
        })?;
        self.games.insert(dialogue.into(), Game::new(number));
        Ok(Opening { messages, tools: Vec::new() })
    }

    fn step(&mut self, dialogue: &str, turn: &Turn) -> Result<Step> {
        let game = self.games.get_mut(dialogue).ok_or_else(|| unknown(dialogue))?;
        // What was cut off may be the beginning of a number.
        let guess = last_number(&turn.content).filter(|_| !turn.truncated);
        let (word, reward) = game.hear(guess);
        let right = guess == Some(game.number);
        Ok(Step {
            messages: vec![json!({"role": "user", "content": word})],
            reward,
            done: right || turn.last,
            success: Some(right),
            reason: format!("{}: {word} after turn {}", game.number, turn.number),
        })
    }

    fn close(&mut self, dialogue: &str) -> Result<()> {
        self.games.remove(dialogue);
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
    fn guesses_that_were_ruled_out_cost() {
        let mut game = Game::new(50);
        let guesses = [
            (Some(-7), ("higher", 0.0)),
            (Some(-7), ("higher", -WASTED)),
            (Some(75), ("lower", 0.0)),
            (Some(99), ("lower", -WASTED)),
            (None, ("I see no number", -WASTED)),
            (Some(74), ("lower", 0.0)),
            (Some(50), ("right", 1.0)),
        ];
        for (guess, want) in guesses {
            assert_eq!(game.hear(guess), want, "{guess:?}");
        }
    }

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
