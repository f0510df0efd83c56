//! Rows of a data file as samples: a prompt and one completion, in tokens. Rows that cannot be used are
//! refused with their place; rows without a completion are answered by the model.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use crate::data::{CompletionContent, RolloutRow, Task, rollouts, tasks::is_task};
use crate::ggml::ThreadPool;
use crate::model::{Lora, Model};
use crate::rollout::{Encoder, Progress, Request, RolloutOptions, Rollouts, Sampling};
use crate::team::Team;
use crate::{Error, Result};

/// A completion and what it answers.
#[derive(Clone, Debug, PartialEq)]
pub struct Sample {
    /// Row of the data, from 0.
    pub row: usize,
    /// Completion of the row, from 0.
    pub completion: usize,
    /// Tokens of the prompt, not empty.
    pub prompt: Arc<[i32]>,
    /// Tokens of the completion, not empty.
    pub tokens: Vec<i32>,
}

/// How rows without a completion are answered.
#[derive(Clone, Debug, PartialEq)]
pub struct Answering {
    /// An answer ends at this length.
    pub max_response: usize,
    /// Temperature and its like.
    pub sampling: Sampling,
    /// Same seed, same answers.
    pub seed: u64,
}

/// Reads rows one at a time.
pub struct Rows<'m> {
    rows: Box<dyn Iterator<Item = Result<RolloutRow>>>,
    file: String,
    encoder: Encoder<'m>,
    n_ctx: usize,
    n_vocab: usize,
    next: usize,
}

/// A row that can be used.
pub struct Usable {
    /// Row of the data, from 0.
    pub row: usize,
    /// Tokens of the prompt.
    pub prompt: Arc<[i32]>,
    /// Tokens of each completion; none: to be answered.
    pub completions: Vec<Vec<i32>>,
}

impl<'m> Rows<'m> {
    /// Opens the data: a file, or a task, whose held-out problems are rows to be answered.
    pub fn open(model: &'m Model, path: &Path, system: Option<String>) -> Result<Rows<'m>> {
        let task = path.to_str().filter(|name| is_task(name)).map(Task::parse).transpose()?;
        Ok(Rows {
            rows: match task {
                Some(task) => Box::new(task.rows().map(Ok)),
                None => Box::new(rollouts(path)?),
            },
            file: path.display().to_string(),
            encoder: Encoder::new(model, None, system)?,
            n_ctx: model.config().n_ctx_train,
            n_vocab: model.config().n_vocab,
            next: 0,
        })
    }

    /// Rows read so far, refused ones among them.
    pub fn read(&self) -> usize {
        self.next
    }

    /// The next row; the inner error says why it cannot be used. None at the end.
    ///
    /// # Errors
    /// The file cannot be read on.
    pub fn next(&mut self, max_response: usize) -> Result<Option<Result<Usable>>> {
        let Some(read) = self.rows.next() else { return Ok(None) };
        let row = self.next;
        self.next += 1;
        match read {
            Ok(read) => Ok(Some(self.usable(row, &read, max_response))),
            Err(Error::Io { action, path, source }) => Err(Error::Io { action, path, source }),
            Err(unusable) => Ok(Some(Err(unusable))),
        }
    }

    fn usable(&self, row: usize, read: &RolloutRow, max_response: usize) -> Result<Usable> {
        let refuse = |e: Error| {
            let place = format!("{}, line {}", self.file, read.line);
            Error::invalid(place, "a row that the model can take", e.to_string(), "mend or drop it")
        };
        let prompt = self.encoder.prompt(&read.prompt, usize::MAX).map_err(refuse)?;
        let mut completions = Vec::with_capacity(read.completions.len());
        for completion in &read.completions {
            let tokens = match &completion.content {
                CompletionContent::Tokens(tokens) => tokens.clone(),
                CompletionContent::Text(text) => self.encoder.completion(text).map_err(refuse)?,
            };
            let outside = |&&t: &&i32| t < 0 || t as usize >= self.n_vocab;
            if let Some(bad) = tokens.iter().find(outside) {
                let expected = format!("token ids below {}", self.n_vocab);
                let advice = "the tokens belong to another model";
                return Err(refuse(Error::invalid(
                    "completion",
                    expected,
                    bad.to_string(),
                    advice,
                )));
            }
            if tokens.is_empty() {
                let advice = "give it tokens, or leave it out to have the prompt answered";
                return Err(refuse(Error::invalid("completion", "a token", "none", advice)));
            }
            completions.push(tokens);
        }
        let longest = completions.iter().map(Vec::len).max().unwrap_or(max_response);
        if prompt.len() + longest > self.n_ctx {
            return Err(refuse(Error::invalid(
                "prompt and completion",
                format!("at most the model's context of {} tokens", self.n_ctx),
                format!("{} and {longest}", prompt.len()),
                "shorten them, or lower --max-response",
            )));
        }
        Ok(Usable { row, prompt: prompt.into(), completions })
    }
}

/// Answers prompts with the model.
pub struct Answerer<'m> {
    model: &'m Model,
    pool: Arc<ThreadPool>,
    answering: Answering,
    team: Team,
    invariant: bool,
    // With the longest sequence and the number of prompts that it was made for.
    rollouts: Option<(usize, usize, Rollouts)>,
}

impl<'m> Answerer<'m> {
    /// An answerer on these threads, of the ranks of a team; `invariant`: an answer does not depend on who is decoded
    /// beside it.
    pub fn new(
        model: &'m Model,
        pool: Arc<ThreadPool>,
        answering: Answering,
        team: &Team,
        invariant: bool,
    ) -> Answerer<'m> {
        Answerer { model, pool, answering, team: team.clone(), invariant, rollouts: None }
    }

    /// One answer for each prompt; `(row, prompt)`: the row is the key of its random numbers.
    pub fn answer(
        &mut self,
        lora: Option<&mut Lora>,
        prompts: &[(usize, Arc<[i32]>)],
        progress: &mut dyn FnMut(Progress),
        stop: &AtomicBool,
    ) -> Result<Vec<Vec<i32>>> {
        let longest = prompts.iter().map(|(_, p)| p.len()).max().unwrap_or(0);
        let n_ctx_seq = longest + self.answering.max_response;
        if self.rollouts.as_ref().is_none_or(|&(room, n, _)| room < n_ctx_seq || n < prompts.len())
        {
            self.rollouts = None; // give its memory back first
            let options = RolloutOptions::new(n_ctx_seq, prompts.len(), self.model.engine())?;
            let mut rollouts = Rollouts::new(self.model.engine(), &self.pool, options)?;
            if let Some(lora) = lora {
                rollouts.set_adapter(Some(lora.live(self.model)?))?;
            }
            rollouts.share(&self.team);
            if self.invariant {
                rollouts.make_invariant();
            }
            self.rollouts = Some((n_ctx_seq, prompts.len(), rollouts));
        }
        let (.., rollouts) = self.rollouts.as_mut().expect("just made");
        let requests: Vec<Request> = prompts
            .iter()
            .map(|(row, prompt)| Request {
                prompt_tokens: prompt.to_vec(),
                n: 1,
                seed_stream: *row as u64,
                max_tokens: self.answering.max_response,
            })
            .collect();
        let c = &self.answering;
        let answers = rollouts.generate(&requests, &c.sampling, c.seed, progress, stop)?;
        Ok(answers.into_iter().map(|mut one| one.remove(0).tokens).collect())
    }
}
