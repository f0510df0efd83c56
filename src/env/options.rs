//! The settings of dialogues, as the command line and `config.toml` fill them.

use std::path::PathBuf;
use std::time::Duration;

use clap::Args;
use serde::{Deserialize, Serialize};

use super::builtin::{Builtin, SUPPORTED};
use super::{CallFormat, Environment, ProgramEnv};
use crate::{Error, Result};

/// With whom a model talks, and for how long.
#[derive(Clone, Debug, PartialEq, Args, Serialize, Deserialize)]
#[serde(default, rename_all = "kebab-case")]
pub struct EnvOptions {
    /// Dialogues with an environment instead of single answers, and its rewards: env:calculator (problems, with a tool
    /// that computes), env:guess (a number, higher or lower), cmd:PROG (a program, JSON lines in and out:
    /// docs/ENVIRONMENTS.md). Those built in bring problems of their own where --data is left out
    #[arg(long, value_name = "SPEC", help_heading = "Dialogues")]
    pub env: Option<String>,
    /// The folder that environment programs run in: where the run was begun. None is the current one.
    #[arg(skip)]
    pub env_folder: Option<PathBuf>,
    /// Environments at work at once, each with its own program; a dialogue stays with one
    #[arg(long, default_value_t = 8, value_name = "N", help_heading = "Dialogues")]
    pub env_workers: usize,
    /// Longest time a program may take for one answer
    #[arg(long, default_value_t = 30.0, value_name = "SECONDS", help_heading = "Dialogues")]
    pub env_timeout: f32,
    /// Rounds of tokens that other dialogues decode before an answer is waited for: raise it where the environment takes
    /// longer than a round [default: of a program 1, else 0]
    #[arg(long, value_name = "N", help_heading = "Dialogues")]
    pub env_lag: Option<u64>,
    /// Turns of the model in a dialogue, at most
    #[arg(long, default_value_t = 8, value_name = "N", help_heading = "Dialogues")]
    pub max_turns: usize,
    /// Tokens of one turn, at most [default: what --max-response leaves, which limits the dialogue after its first prompt]
    #[arg(long, value_name = "TOKENS", help_heading = "Dialogues")]
    pub max_turn_tokens: Option<usize>,
    /// A turn that ends after so long is its dialogue's last (0 = no limit): for safety, since it depends on the clock
    #[arg(long, default_value_t = 0.0, value_name = "SECONDS", help_heading = "Dialogues")]
    pub max_dialogue_seconds: f32,
    /// How tool calls are written [default: as the chat template's family does]
    #[arg(long, value_enum, value_name = "FORMAT", help_heading = "Dialogues")]
    pub tool_format: Option<CallFormat>,
}

impl Default for EnvOptions {
    fn default() -> EnvOptions {
        crate::options::defaults()
    }
}

/// What an environment is.
#[derive(Clone, Debug, PartialEq)]
enum Kind {
    Builtin(Builtin),
    Program(String),
}

impl EnvOptions {
    /// Whether there are dialogues.
    pub fn is_some(&self) -> bool {
        self.env.is_some()
    }

    /// Whether a program answers, which may say something else when it is asked again.
    pub fn has_program(&self) -> bool {
        matches!(self.kind(), Ok(Some(Kind::Program(_))))
    }

    fn kind(&self) -> Result<Option<Kind>> {
        let Some(spec) = self.env.as_deref() else { return Ok(None) };
        let program = spec.strip_prefix("cmd:").map(str::trim).filter(|p| !p.is_empty());
        let builtin = spec.strip_prefix("env:").and_then(Builtin::parse).map(Kind::Builtin);
        match builtin.or_else(|| program.map(|p| Kind::Program(p.into()))) {
            Some(kind) => Ok(Some(kind)),
            None => Err(Error::Unsupported {
                what: "environment",
                got: spec.into(),
                supported: SUPPORTED.into(),
            }),
        }
    }

    /// What `data` stands for: where it is the default, the problems of an environment that has its own.
    pub fn data(&self, data: &str, default: &str) -> String {
        match self.kind() {
            Ok(Some(Kind::Builtin(builtin))) if data == default => builtin.data().into(),
            _ => data.into(),
        }
    }

    /// Rounds of tokens before an answer is waited for.
    pub fn lag(&self) -> u64 {
        self.env_lag.unwrap_or(self.has_program() as u64)
    }

    /// An environment for one thread.
    ///
    /// # Errors
    /// There is none of this name.
    pub fn environment(&self) -> Result<Box<dyn Environment>> {
        let timeout = Duration::from_secs_f32(self.env_timeout);
        match self.kind()? {
            Some(Kind::Builtin(builtin)) => Ok(builtin.environment()),
            Some(Kind::Program(command)) => {
                Ok(Box::new(ProgramEnv::new(&command, self.env_folder.as_deref(), timeout)))
            }
            None => Err(Error::invalid("--env", SUPPORTED, "none", "name an environment")),
        }
    }

    /// Refuses settings that cannot work.
    ///
    /// # Errors
    /// [`Error::Invalid`] naming the option.
    pub fn check(&self) -> Result<()> {
        self.kind()?;
        let (timeout, most) = (self.env_timeout, self.max_dialogue_seconds);
        let time = |seconds: f32| Duration::try_from_secs_f32(seconds).is_ok();
        for (option, ok, expected, got) in [
            (
                "--env-workers",
                (1..=1024).contains(&self.env_workers),
                "1 to 1024",
                self.env_workers.to_string(),
            ),
            ("--env-timeout", timeout > 0.0 && time(timeout), "above 0", timeout.to_string()),
            ("--max-turns", self.max_turns > 0, "at least 1", "0".into()),
            ("--max-turn-tokens", self.max_turn_tokens != Some(0), "at least 1", "0".into()),
            ("--max-dialogue-seconds", time(most), "0 or more", most.to_string()),
        ] {
            if !ok {
                return Err(Error::invalid(option, expected, got, "leave it out for the default"));
            }
        }
        Ok(())
    }
}
