//! A process that answers each line of its input with one line, kept open between questions.

use std::io::{BufRead, BufReader, Read, Write};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, RecvTimeoutError, Sender, bounded};

use crate::data::jsonl::shorten;
use crate::{Error, Result};

/// Longest line that a program may answer, in bytes.
pub(crate) const MAX_ANSWER_BYTES: usize = 1 << 20;
/// How long a program may take to end once its input is closed.
const GRACE: Duration = Duration::from_secs(2);

/// A running program; dropped, it ends with all that it started.
#[derive(Debug)]
pub(crate) struct Process {
    child: Child,
    questions: Option<Sender<Vec<u8>>>,
    answers: Receiver<Vec<u8>>,
}

/// Why a program did not answer.
pub(crate) enum Silent {
    /// It ended, with this status.
    Ended(String),
    /// It took too long.
    Hung,
    /// It spoke before it was asked: what it says next may belong to another question.
    Early(Vec<u8>),
}

impl Silent {
    /// In words, for a list of reasons.
    pub fn words(&self, timeout: Duration) -> String {
        match self {
            Silent::Ended(status) => format!("it ended ({status})"),
            Silent::Hung => format!("no answer within {} s", timeout.as_secs_f32()),
            Silent::Early(line) => Silent::too_early(line).1,
        }
    }

    /// (expected, got) of a line that nobody asked for.
    pub fn too_early(line: &[u8]) -> (String, String) {
        let line = String::from_utf8_lossy(line);
        let got = format!("{:?} before it was asked", shorten(line.trim(), 80));
        ("one line per question".into(), got)
    }
}

impl Process {
    /// Starts a command line for `sh -c` in a folder, or in the current one; `option` names it in errors.
    ///
    /// # Errors
    /// There is no shell, the folder is gone, or the system refuses a process.
    pub fn start(
        command: &str,
        folder: Option<&Path>,
        option: impl Fn() -> String,
    ) -> Result<Process> {
        if let Some(folder) = folder.filter(|folder| !folder.is_dir()) {
            let expected = format!("the folder that the run began in ({})", folder.display());
            let advice = "make it again, or give the option anew and --allow-change";
            return Err(Error::invalid(option(), expected, "no such folder", advice));
        }
        Process::spawn(command, folder).map_err(Error::io("start", command))
    }

    fn spawn(command: &str, folder: Option<&Path>) -> std::io::Result<Process> {
        let mut shell = Command::new("sh");
        if let Some(folder) = folder {
            shell.current_dir(folder);
        }
        shell.arg("-c").arg(command).stdin(Stdio::piped()).stdout(Stdio::piped());
        // Of its own group: Ctrl-C is ours to handle, and what the shell starts ends with it.
        #[cfg(unix)]
        std::os::unix::process::CommandExt::process_group(&mut shell, 0);
        let mut child = shell.spawn()?;
        let mut input = child.stdin.take().expect("piped");
        let output = child.stdout.take().expect("piped");
        let (questions, asked) = bounded::<Vec<u8>>(1);
        // A write blocks while the program does not read, and a read while it does not write: both have
        // threads, which end with the process or with this struct.
        thread::spawn(move || {
            for line in asked {
                if input.write_all(&line).and_then(|()| input.flush()).is_err() {
                    return;
                }
            }
        });
        let (answered, answers) = bounded(1);
        thread::spawn(move || {
            let mut output = BufReader::new(output);
            loop {
                let mut line = Vec::new();
                let limit = MAX_ANSWER_BYTES as u64 + 1;
                match output.by_ref().take(limit).read_until(b'\n', &mut line) {
                    Ok(n) if n > 0 && answered.send(line).is_ok() => {}
                    _ => return,
                }
            }
        });
        Ok(Process { child, questions: Some(questions), answers })
    }

    /// A line for a line.
    pub fn ask(
        &mut self,
        question: Vec<u8>,
        timeout: Duration,
    ) -> std::result::Result<Vec<u8>, Silent> {
        if let Ok(line) = self.answers.try_recv() {
            return Err(Silent::Early(line));
        }
        let deadline = Instant::now() + timeout;
        let questions = self.questions.as_ref().expect("open while running");
        if questions.send_deadline(question, deadline).is_err() && Instant::now() >= deadline {
            return Err(Silent::Hung);
        }
        match self.answers.recv_deadline(deadline) {
            Ok(line) => Ok(line),
            Err(RecvTimeoutError::Timeout) => Err(Silent::Hung),
            Err(RecvTimeoutError::Disconnected) => {
                let status = self.wait(GRACE);
                Err(Silent::Ended(status.unwrap_or("it closed its output".into())))
            }
        }
    }

    /// The exit status in words, once it has ended.
    fn wait(&mut self, at_most: Duration) -> Option<String> {
        let start = Instant::now();
        loop {
            match self.child.try_wait() {
                Ok(Some(status)) => return Some(status.to_string()),
                Ok(None) if start.elapsed() < at_most => thread::sleep(Duration::from_millis(5)),
                _ => return None,
            }
        }
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.questions = None;
        // The end of its input is the sign to end; a hung program gets no grace, for it had its timeout.
        if self.wait(Duration::from_millis(200)).is_none() {
            let group = format!("kill -KILL -{}", self.child.id());
            let _ = Command::new("sh").args(["-c", &group]).stderr(Stdio::null()).status();
            let _ = self.child.kill();
            let _ = self.child.wait();
        }
    }
}
