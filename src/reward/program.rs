//! A reward program: one process kept open, a line of JSON in and a line of JSON out for each completion.
//!
//! ```json
//! {"id": 3, "problem": "..", "prompt": "..", "answer": "..", "completion": "..", "tokens": 17, "truncated": false}
//! {"reward": 1.0, "reason": "why, if you like"}
//! ```
//!
//! The prompt is text, a list of messages, or a list of token ids. A bare number is an answer too; an `id`
//! in it must be the question's. A program that ends or takes longer than the timeout is started anew and
//! asked once more. What it cannot judge is an error of the run and never a reward of 0. Its own messages
//! belong on stderr, which is passed on.

use std::path::{Path, PathBuf};
use std::time::Duration;

use serde_json::{Value, json};

use super::process::{MAX_ANSWER_BYTES, Process, Silent};
use super::{Attempt, Verdict};
use crate::data::jsonl::{kind, shorten};
use crate::data::{Message, Prompt};
use crate::{Error, Result};

/// Times that a question is asked.
const ATTEMPTS: usize = 2;

/// A program and, once it was asked, its process. A clone starts a process of its own.
#[derive(Debug)]
pub struct Program {
    command: String,
    timeout: Duration,
    folder: Option<PathBuf>,
    running: Option<Process>,
    asked: u64,
}

impl Clone for Program {
    fn clone(&self) -> Program {
        Program { folder: self.folder.clone(), ..Program::new(&self.command, self.timeout) }
    }
}

impl Program {
    /// A command line for `sh -c`. Nothing is started yet.
    pub fn new(command: &str, timeout: Duration) -> Program {
        Program { command: command.into(), timeout, folder: None, running: None, asked: 0 }
    }

    /// Runs it in this folder, from which its command line's relative paths count.
    pub fn run_in(&mut self, folder: &Path) {
        self.folder = Some(folder.into());
    }

    /// Starts the process, where none is running.
    ///
    /// # Errors
    /// There is no shell, its folder is gone, or the system refuses a process.
    pub fn start(&mut self) -> Result<()> {
        if self.running.is_none() {
            let option = || format!("--reward cmd:{}", shorten(&self.command, 80));
            self.running = Some(Process::start(&self.command, self.folder.as_deref(), option)?);
        }
        Ok(())
    }

    /// Asks about one completion.
    ///
    /// # Errors
    /// The program ends or hangs twice, or answers with something else than a finite number.
    pub fn score(&mut self, attempt: &Attempt<'_>) -> Result<Verdict> {
        self.asked += 1;
        let mut question = serde_json::to_vec(&json!({
            "id": self.asked,
            "problem": attempt.problem.id,
            "prompt": prompt(&attempt.problem.prompt),
            "answer": attempt.problem.answer,
            "completion": attempt.text,
            "tokens": attempt.tokens,
            "truncated": attempt.truncated,
        }))
        .map_err(|e| Error::engine("writing JSON", e.to_string(), "report it"))?;
        question.push(b'\n');
        let mut reasons = Vec::new();
        for _ in 0..ATTEMPTS {
            self.start()?;
            let running = self.running.as_mut().expect("just started");
            match running.ask(question.clone(), self.timeout) {
                Ok(line) => return read(&line, self.asked).map_err(|e| self.rubbish(e)),
                Err(Silent::Early(line)) => return Err(self.rubbish(Silent::too_early(&line))),
                Err(silent) => reasons.push(silent.words(self.timeout)),
            }
            self.running = None;
        }
        Err(Error::engine(
            format!("the reward program '{}'", shorten(&self.command, 80)),
            format!("{} (asked {ATTEMPTS} times)", reasons.join(", then ")),
            "run it by hand on one line of its input, or raise --reward-timeout",
        ))
    }
}

impl Program {
    /// The error for an answer that is none; the process ends.
    fn rubbish(&mut self, (expected, got): (String, String)) -> Error {
        self.running = None;
        let place = format!("--reward cmd:{}", shorten(&self.command, 80));
        let advice = "answer each line with one line {\"reward\": 1.0}, and log to stderr";
        Error::invalid(place, expected, got, advice)
    }
}

/// The verdict in a line of answer, or (expected, got).
fn read(line: &[u8], id: u64) -> std::result::Result<Verdict, (String, String)> {
    let expected = || "a line of JSON with a finite `reward`".to_string();
    let text = String::from_utf8_lossy(line);
    let rubbish = || (expected(), format!("{:?}", shorten(text.trim(), 80)));
    if line.len() > MAX_ANSWER_BYTES {
        return Err((expected(), format!("a line of more than {MAX_ANSWER_BYTES} bytes")));
    }
    let value: Value = serde_json::from_slice(line).map_err(|_| rubbish())?;
    if let Some(theirs) = value.get("id").filter(|theirs| theirs.as_u64() != Some(id)) {
        return Err((format!("the answer to question {id}"), format!("`id` {theirs}")));
    }
    let reward = value.get("reward").unwrap_or(&value);
    let number = reward.as_f64().map(|x| x as f32).filter(|x| x.is_finite());
    let reward = number.ok_or_else(|| match reward {
        Value::Number(_) => (expected(), kind(reward)),
        _ => rubbish(),
    })?;
    let reason = value.get("reason").and_then(Value::as_str).unwrap_or("by the program");
    let reason = reason.split_whitespace().collect::<Vec<_>>().join(" ");
    Ok(Verdict { reward, reason: shorten(&reason, 300) })
}

pub(super) fn prompt(prompt: &Prompt) -> Value {
    let message = |m: &Message| json!({"role": m.role, "content": m.content});
    match prompt {
        Prompt::Text(text) => json!(text),
        Prompt::Messages(messages) => messages.iter().map(message).collect(),
        Prompt::Tokens(tokens) => json!(tokens),
    }
}

#[cfg(all(test, unix))]
mod tests {
    use std::time::Instant;

    use super::*;
    use crate::data::Problem;

    fn score(command: &str, seconds: f32) -> (Result<Verdict>, Duration) {
        let mut program = Program::new(command, Duration::from_secs_f32(seconds));
        let start = Instant::now();
        let outcome = ask(&mut program, "text");
        drop(program);
        (outcome, start.elapsed())
    }

    fn ask(program: &mut Program, text: &str) -> Result<Verdict> {
        let problem = Problem {
            id: "p".into(),
            prompt: Prompt::Messages(vec![Message::user("17+25=")]),
            answer: "42".into(),
            source: "t:1".into(),
            difficulty: None,
            solution_bytes: 0,
        };
        program.score(&Attempt {
            problem: &problem,
            text,
            opening: "",
            tokens: 3,
            truncated: false,
        })
    }

    #[test]
    fn one_process_answers_many_questions() {
        // Counts its questions: a new process would begin at 1 again.
        let command = r#"n=0; while read -r line; do n=$((n+1)); echo "{\"reward\": $n, \"reason\": \"a  b\"}"; done"#;
        let mut program = Program::new(command, Duration::from_secs(20));
        for n in 1..=3 {
            let verdict = ask(&mut program, "text").unwrap();
            assert_eq!((verdict.reward, verdict.reason.as_str()), (n as f32, "a b"));
        }
        assert_eq!(ask(&mut program.clone(), "text").unwrap().reward, 1.0);
    }

    #[test]
    fn a_large_question_that_is_not_read_to_its_end_does_not_lock_up() {
        let command = "head -c 10 > /dev/null; echo 0.5; sleep 600";
        let mut program = Program::new(command, Duration::from_secs(20));
        let text = "x".repeat(4 << 20);
        assert_eq!(ask(&mut program, &text).unwrap().reward, 0.5);
    }

    #[test]
    fn a_program_that_dies_is_started_anew_and_asked_once_more() {
        let dir = tempfile::tempdir().unwrap();
        let flag = dir.path().join("died");
        // Dies at the first question of its life, answers in its second.
        let command = format!(
            "read -r l; if [ -e {f} ]; then echo 1; else touch {f}; exit 3; fi; read -r l",
            f = flag.display()
        );
        assert_eq!(score(&command, 20.0).0.unwrap().reward, 1.0);
        let (outcome, _) = score("exit 3", 20.0);
        let error = outcome.unwrap_err().to_string();
        assert!(
            error.contains("it ended (exit status: 3), then it ended (exit status: 3)"),
            "{error}"
        );
        let error = score("no-such-program-here", 20.0).0.unwrap_err().to_string();
        assert!(error.contains("exit status: 127"), "{error}");
    }

    #[test]
    fn a_program_that_hangs_is_ended_within_its_timeout() {
        for command in ["sleep 600", "sleep 600 & sleep 601", "trap '' TERM; cat > /dev/null"] {
            let (outcome, took) = score(command, 0.3);
            let error = outcome.unwrap_err().to_string();
            assert!(error.contains("no answer within 0.3 s, then no answer"), "{error}");
            assert!(took < Duration::from_secs(10), "{command}: {took:?}");
        }
    }

    #[test]
    fn rubbish_is_an_error_and_not_a_zero() {
        for (answer, expected) in [
            ("hello", "a line of JSON with a finite `reward`, got \"hello\""),
            ("NaN", "got \"NaN\""),
            (r#"{"reward": NaN}"#, "got \"{\\\"reward\\\": NaN}\""),
            (r#"{"reward": null}"#, "finite `reward`"),
            (r#"{"reward": "1"}"#, "finite `reward`"),
            (r#"{"reward": 1e39}"#, "got the number 1e+39"),
            (r#"{"score": 1}"#, "finite `reward`"),
            (r#"{"id": 7, "reward": 1}"#, "expected the answer to question 1, got `id` 7"),
            ("", "got \"\""),
        ] {
            let (outcome, _) = score(&format!("read -r l; echo '{answer}'; read -r l"), 20.0);
            let error = outcome.unwrap_err().to_string();
            assert!(error.contains(expected) && !error.contains('\n'), "{answer}: {error}");
        }
        let (outcome, _) = score("head -c 3000000 /dev/zero", 20.0);
        let error = outcome.unwrap_err().to_string();
        assert!(error.contains("a line of more than 1048576 bytes"), "{error}");
    }
}
