//! The settings of judging, as the command line and `config.toml` fill them.

use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::Args;
use serde::{Deserialize, Serialize};

use super::{Judge, JudgeOptions, JudgePool};
use crate::data::jsonl::shorten;
use crate::data::tasks::is_task;
use crate::{Error, Result};

/// How completions are judged.
#[derive(Clone, Debug, PartialEq, Args, Serialize, Deserialize)]
#[serde(default, rename_all = "kebab-case")]
pub struct RewardOptions {
    /// Parts with weights, as in "math + 0.2*format + overlong:256". math: the answer compared by its meaning
    /// (math:boxed: only what is boxed); hendrycks: the last \boxed{} after MATH's string normalisation, the
    /// paper's reward; boxed: the last \boxed{} compared as number or text; exact: the whole completion as
    /// text; regex:PATTERN; format:boxed, format:think (with the end of a prompt that begins the thoughts);
    /// thoughts are no answer to any of these; overlong:N: DAPO's penalty over the last N tokens;
    /// cmd:PROG: a program, JSON lines in and out; http://URL: a server, a chat endpoint where the URL ends with
    /// /chat/completions; judge:MODEL.gguf: another local model, by --judge-rubric. An evaluation takes the first part for what is right
    /// [default: math; boxed where tasks alone are asked]
    #[arg(long, value_name = "SPEC", help_heading = "Data and reward")]
    pub reward: Option<String>,
    /// The folder that reward programs run in: where the run was begun. None is the current one.
    #[arg(skip)]
    pub reward_folder: Option<PathBuf>,
    /// Threads that judge while others sample; each has its own reward program
    #[arg(long, default_value_t = 2, value_name = "N", help_heading = "Data and reward")]
    pub reward_workers: usize,
    /// Longest time a reward program may take for one completion, a server for one answer
    #[arg(long, default_value_t = 30.0, value_name = "SECONDS", help_heading = "Data and reward")]
    pub reward_timeout: f32,
    /// What a judging model is asked, text or a file, with {prompt}, {answer} and {completion} in it; its answer ends with
    /// "Score: N", 0 to 10 [default: a general question]
    #[arg(long, value_name = "TEXT|FILE", help_heading = "Data and reward")]
    pub judge_rubric: Option<String>,
    /// Times that a judging server is asked again when it fails, with pauses that double
    #[arg(long, default_value_t = 3, value_name = "N", help_heading = "Data and reward")]
    pub judge_retries: usize,
    /// Completions that a judging server or model gets at once, at most
    #[arg(long, default_value_t = 16, value_name = "N", help_heading = "Data and reward")]
    pub judge_batch: usize,
}

impl Default for RewardOptions {
    fn default() -> RewardOptions {
        crate::options::defaults()
    }
}

impl RewardOptions {
    /// The specification; where nobody gave one: comparison by meaning for data, `boxed` for generated tasks
    /// alone, whose questions want a box and whose answers are whole numbers.
    pub fn spec(&self, data: &str) -> String {
        let tasks = || data.split(',').all(|item| is_task(item.trim()));
        let default = || if tasks() { "boxed" } else { "math" }.into();
        self.reward.clone().unwrap_or_else(default)
    }

    /// What judges completions of problems from `data` with at most `max_response` tokens.
    ///
    /// # Errors
    /// The specification has a part that does not exist or cannot be made.
    pub fn judge(&self, data: &str, max_response: usize) -> Result<Judge> {
        let options = JudgeOptions {
            max_response,
            timeout: Duration::from_secs_f32(self.reward_timeout),
            rubric: self.rubric()?,
            retries: self.judge_retries,
            batch: self.judge_batch,
        };
        let mut judge = Judge::parse(&self.spec(data), &options)?;
        if let Some(folder) = &self.reward_folder {
            judge.run_in(folder);
        }
        Ok(judge)
    }

    /// The rubric's text.
    fn rubric(&self) -> Result<Option<String>> {
        let Some(given) = &self.judge_rubric else { return Ok(None) };
        let path = Path::new(given);
        let text = match path.is_file() {
            true => std::fs::read_to_string(path).map_err(Error::io("read", path))?,
            false => given.clone(),
        };
        match text.contains("{completion}") {
            true => Ok(Some(text)),
            false => {
                let got = format!("{:?}", shorten(text.trim(), 60));
                let advice = "it says where the completion stands; {prompt} and {answer} may, too";
                Err(Error::invalid("--judge-rubric", "a text with {completion} in it", got, advice))
            }
        }
    }

    /// The judges for completions of problems from `data` with at most `max_response` tokens.
    ///
    /// # Errors
    /// As [`RewardOptions::judge`]; a program cannot be started.
    pub fn judges(&self, data: &str, max_response: usize) -> Result<JudgePool> {
        JudgePool::new(self.judge(data, max_response)?, self.reward_workers)
    }

    /// Refuses settings that cannot work.
    ///
    /// # Errors
    /// [`Error::Invalid`] naming the option.
    pub fn check(&self) -> Result<()> {
        let (workers, seconds) = (self.reward_workers, self.reward_timeout);
        for (option, ok, expected, got) in [
            (
                "--judge-retries",
                self.judge_retries <= 20,
                "0 to 20",
                self.judge_retries.to_string(),
            ),
            (
                "--judge-batch",
                (1..=256).contains(&self.judge_batch),
                "1 to 256",
                self.judge_batch.to_string(),
            ),
            ("--reward-workers", (1..=256).contains(&workers), "1 to 256", workers.to_string()),
            (
                "--reward-timeout",
                seconds > 0.0 && Duration::try_from_secs_f32(seconds).is_ok(),
                "above 0",
                seconds.to_string(),
            ),
        ] {
            if !ok {
                return Err(Error::invalid(option, expected, got, "leave it out for the default"));
            }
        }
        Ok(())
    }
}
