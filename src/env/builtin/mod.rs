//! Environments that need no program.
//!
//! | name | the model | data of its own | reward |
//! |---|---|---|---|
//! | `env:calculator` | answers a problem, with a tool that computes | `task:mul?digits=4` | 1 for a right answer |
//! | `env:guess` | guesses a number; hears higher or lower | `task:guess` | 1 for the number, by the last turn; -0.1 for what was ruled out |

mod calculator;
mod compute;
mod guess;

use serde_json::{Value, json};

use super::{Environment, Task};
use crate::data::Prompt;
use crate::{Error, Result};

pub use compute::compute;

/// What [`Builtin::parse`] knows, for messages.
pub const SUPPORTED: &str = "env:calculator, env:guess, cmd:PROGRAM";

/// An environment of ours.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Builtin {
    /// Problems with a calculator at hand.
    Calculator,
    /// A number to be guessed.
    Guess,
}

impl Builtin {
    /// Reads a name without `env:`; none where there is no such environment.
    pub fn parse(name: &str) -> Option<Builtin> {
        match name {
            "calculator" => Some(Builtin::Calculator),
            "guess" => Some(Builtin::Guess),
            _ => None,
        }
    }

    /// What it asks where nobody says what: seeded, with a held-out split.
    pub fn data(self) -> &'static str {
        match self {
            Builtin::Calculator => "task:mul?digits=4",
            Builtin::Guess => "task:guess",
        }
    }

    /// One for a thread.
    pub fn environment(self) -> Box<dyn Environment> {
        match self {
            Builtin::Calculator => Box::new(calculator::Calculator::default()),
            Builtin::Guess => Box::new(guess::Guess::default()),
        }
    }
}

/// What a problem asks, as messages.
fn asked(task: &Task) -> Result<Vec<Value>> {
    Ok(match &task.problem.prompt {
        Prompt::Text(text) => vec![json!({"role": "user", "content": text})],
        Prompt::Messages(messages) => {
            messages.iter().map(|m| json!({"role": m.role, "content": m.content})).collect()
        }
        Prompt::Tokens(_) => {
            let advice = "give the prompt as text or messages";
            let place = task.problem.source.clone();
            return Err(Error::invalid(place, "a prompt to talk about", "token ids", advice));
        }
    })
}

/// An error for a dialogue that was not begun.
fn unknown(dialogue: &str) -> Error {
    Error::engine(format!("dialogue {dialogue}"), "it was not begun", "report it")
}
