//! An environment that is a program: one process kept open, for any number of dialogues at a time.
//!
//! A program that ends, hangs or is killed is started anew; the dialogues that it held are played to it again, question by
//! question, and must get the answers that they got before: chance belongs to the seed. What it cannot answer is an error
//! of the run and never a reward of 0.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde_json::Value;

use super::{Environment, Opening, Step, Task, Turn, protocol};
use crate::data::jsonl::shorten;
use crate::reward::process::{MAX_ANSWER_BYTES, Process, Silent};
use crate::{Error, Result};

/// Times that a question is asked.
const ATTEMPTS: usize = 2;

/// A program's command line and, once it was asked, its process.
pub struct ProgramEnv {
    command: String,
    folder: Option<PathBuf>,
    timeout: Duration,
    running: Option<Process>,
    /// Processes started.
    life: u64,
    asked: u64,
    dialogues: BTreeMap<String, Held>,
}

/// A dialogue as it can be played again.
struct Held {
    /// The process that knows it.
    life: u64,
    /// Questions without their ids, and the answers to them.
    played: Vec<(Value, Vec<u8>)>,
}

impl ProgramEnv {
    /// A command line for `sh -c`, in a folder or the current one. Nothing is started yet.
    pub fn new(command: &str, folder: Option<&Path>, timeout: Duration) -> ProgramEnv {
        ProgramEnv {
            command: command.into(),
            folder: folder.map(Path::to_path_buf),
            timeout,
            running: None,
            life: 0,
            asked: 0,
            dialogues: BTreeMap::new(),
        }
    }

    fn place(&self) -> String {
        format!("--env cmd:{}", shorten(&self.command, 80))
    }

    /// The error for an answer that is none; the process ends.
    fn rubbish(&mut self, (expected, got): protocol::Fault) -> Error {
        self.running = None;
        let advice =
            "answer each line with one line as docs/ENVIRONMENTS.md says, and log to stderr";
        Error::invalid(self.place(), expected, got, advice)
    }

    /// Asks once: the line of the answer, with the number of its question.
    fn ask(&mut self, question: &Value) -> Result<(Vec<u8>, u64), Silent> {
        self.asked += 1;
        let mut question = question.clone();
        question["id"] = self.asked.into();
        let line = question.to_string() + "\n";
        let running = self.running.as_mut().expect("started");
        running.ask(line.into_bytes(), self.timeout).map(|line| (line, self.asked))
    }

    /// Plays a dialogue to a process that does not know it.
    fn play(&mut self, dialogue: &str) -> Result<Result<(), Silent>> {
        let Some(held) = self.dialogues.get(dialogue).filter(|held| held.life != self.life) else {
            return Ok(Ok(()));
        };
        for (question, before) in held.played.clone() {
            let (line, id) = match self.ask(&question) {
                Ok(answer) => answer,
                Err(silent) => return Ok(Err(silent)),
            };
            let same = |a: &[u8], b: &[u8]| without_id(a).is_some_and(|a| Some(a) == without_id(b));
            if !same(&line, &before) {
                let words = |line: &[u8]| shorten(String::from_utf8_lossy(line).trim(), 80);
                let expected = format!(
                    "the answer that it gave before it was started anew, {:?}",
                    words(&before)
                );
                let fault = (expected, format!("{:?} to question {id}", words(&line)));
                return Err(self.rubbish(fault));
            }
        }
        let life = self.life;
        self.dialogues.get_mut(dialogue).expect("held").life = life;
        Ok(Ok(()))
    }

    /// The answer to a question about a dialogue, read.
    fn answer<T>(
        &mut self,
        dialogue: &str,
        question: &Value,
        read: impl Fn(&[u8], u64) -> Result<T, protocol::Fault>,
    ) -> Result<(T, Vec<u8>)> {
        let mut reasons = Vec::new();
        for _ in 0..ATTEMPTS {
            self.start()?;
            let asked = match self.play(dialogue)? {
                Ok(()) => self.ask(question),
                Err(silent) => Err(silent),
            };
            match asked {
                Ok((line, id)) if line.len() > MAX_ANSWER_BYTES => {
                    let expected = format!("the answer to question {id}, a line of JSON");
                    let got = format!("a line of more than {MAX_ANSWER_BYTES} bytes");
                    return Err(self.rubbish((expected, got)));
                }
                Ok((line, id)) => {
                    return match read(&line, id) {
                        Ok(value) => Ok((value, line)),
                        Err(fault) => Err(self.rubbish(fault)),
                    };
                }
                Err(Silent::Early(line)) => return Err(self.rubbish(Silent::too_early(&line))),
                Err(silent) => reasons.push(silent.words(self.timeout)),
            }
            self.running = None;
        }
        Err(Error::engine(
            format!("the environment program '{}'", shorten(&self.command, 80)),
            format!("{} (asked {ATTEMPTS} times)", reasons.join(", then ")),
            "run it by hand on the lines of docs/ENVIRONMENTS.md, or raise --env-timeout",
        ))
    }
}

/// What an answer says, but for the number of its question.
fn without_id(line: &[u8]) -> Option<Value> {
    let mut value: Value = serde_json::from_slice(line).ok()?;
    value.as_object_mut()?.shift_remove("id");
    Some(value)
}

impl Environment for ProgramEnv {
    fn start(&mut self) -> Result<()> {
        if self.running.is_none() {
            let process = Process::start(&self.command, self.folder.as_deref(), || self.place())?;
            self.running = Some(process);
            self.life += 1;
        }
        Ok(())
    }

    fn reset(&mut self, dialogue: &str, task: &Task) -> Result<Opening> {
        self.dialogues.remove(dialogue);
        let question = protocol::reset(0, dialogue, task);
        let (opening, line) = self.answer(dialogue, &question, protocol::read_opening)?;
        let held = Held { life: self.life, played: vec![(question, line)] };
        self.dialogues.insert(dialogue.into(), held);
        Ok(opening)
    }

    fn step(&mut self, dialogue: &str, turn: &Turn) -> Result<Step> {
        let question = protocol::step(0, dialogue, turn);
        let (step, line) = self.answer(dialogue, &question, protocol::read_step)?;
        if let Some(held) = self.dialogues.get_mut(dialogue) {
            held.played.push((question, line));
        }
        Ok(step)
    }

    fn close(&mut self, dialogue: &str) -> Result<()> {
        let held = self.dialogues.remove(dialogue);
        // A process that was started since does not know it.
        if self.running.is_none() || held.is_none_or(|held| held.life != self.life) {
            return Ok(());
        }
        let question = protocol::close(0, dialogue);
        match self.ask(&question) {
            Ok((line, id)) => protocol::read_closed(&line, id).map_err(|fault| self.rubbish(fault)),
            // The dialogue is over in any case.
            Err(_) => {
                self.running = None;
                Ok(())
            }
        }
    }
}
