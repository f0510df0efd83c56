//! Rows of files as groups of given completions, in a seeded order that a run resumes exactly.

use std::path::PathBuf;

use super::TrainConfig;
use super::response::{Response, ResponseGroup};
use crate::data::{
    CompletionContent, Example, ExampleKind, ExampleRow, Prompt, Task, examples, source,
    tasks::is_task,
};
use crate::rollout::{Encoder, Said};
use crate::{Error, Result};

/// Rows that are left out are named one by one up to this many.
const NAMED: usize = 20;

/// Groups of given completions, gone through epoch by epoch, each in an order of its own.
pub(super) struct Rows {
    groups: Vec<ResponseGroup>,
    seed: u64,
    /// The order last asked for, of this epoch.
    order: Option<(u64, Vec<usize>)>,
}

/// What rows are read with.
pub(super) struct Reader<'r, 'm> {
    pub config: &'r TrainConfig,
    pub encoder: &'r Encoder<'m>,
    pub n_vocab: usize,
    pub n_ctx_train: usize,
}

impl Rows {
    /// The group at a position of the run.
    pub fn at(&mut self, position: u64) -> ResponseGroup {
        let place = self.place(position);
        self.groups[place].clone()
    }

    /// Which of the groups is at a position of the run, in the order of the files.
    pub fn place(&mut self, position: u64) -> usize {
        let n = self.groups.len() as u64;
        let (epoch, place) = (position / n, (position % n) as usize);
        if self.order.as_ref().is_none_or(|(of, _)| *of != epoch) {
            self.order = Some((epoch, source::permutation(n as usize, self.seed, epoch)));
        }
        let order = &self.order.as_ref().expect("just made").1;
        order[place]
    }

    /// `n` groups without repetition, the same for the same seed; all in the order of the files where there are no more.
    pub fn sample(&self, n: usize) -> Vec<ResponseGroup> {
        let all = self.groups.len();
        if all <= n {
            return self.groups.clone();
        }
        let order = source::permutation(all, self.seed, 0);
        order[..n].iter().map(|&row| self.groups[row].clone()).collect()
    }

    /// Number of groups.
    pub fn len(&self) -> usize {
        self.groups.len()
    }

    /// Whether no row has a completion.
    pub fn are_prompts(&self) -> bool {
        self.groups.iter().all(|g| g.responses.is_empty())
    }

    /// Tokens of each prompt.
    pub fn prompt_lengths(&self) -> impl Iterator<Item = usize> {
        self.groups.iter().map(|group| group.prompt.len())
    }

    /// Tokens of the longest group.
    pub fn longest(&self) -> usize {
        self.groups.iter().map(ResponseGroup::n_tokens).max().unwrap_or(0)
    }
}

impl Reader<'_, '_> {
    /// The rows of a list of files, for the algorithm, or a task's problems with their solutions: training problems, or
    /// held-out ones. A row that cannot be used is named in the notes and left out, or an error with `--strict`.
    ///
    /// # Errors
    /// A file that cannot be read, or no row that can be used; labels all of one kind.
    pub fn read(&self, spec: &str, held_out: bool, notes: &mut Vec<String>) -> Result<Rows> {
        type Examples<'e> = Box<dyn Iterator<Item = Result<ExampleRow>> + 'e>;
        let kind = self.config.algo.rows().expect("an algorithm that learns from rows");
        let mut groups = Vec::new();
        let mut left_out = Vec::new();
        let solved = matches!(kind, ExampleKind::Imitation | ExampleKind::Contexts);
        let task =
            Some(spec).filter(|spec| solved && is_task(spec)).map(Task::parse).transpose()?;
        let files = if task.is_some() { Vec::new() } else { source::row_files(spec)? };
        let solutions = task.map(|task| task.examples(self.config.seed, held_out)).transpose()?;
        let solutions = solutions.map(|rows| Ok(Box::new(rows.map(Ok)) as Examples<'_>));
        let of_files = files
            .iter()
            .map(|file| Ok(Box::new(examples(file, kind, &self.config.columns)?) as Examples<'_>));
        for rows in solutions.into_iter().chain(of_files) {
            for row in rows? {
                match row.and_then(|row| self.groups(&row, kind)) {
                    Ok(mut of_row) => groups.append(&mut of_row),
                    Err(error @ Error::Io { .. }) => return Err(error),
                    Err(error) if self.config.rows.strict => return Err(error),
                    Err(error) => left_out.push(error.to_string()),
                }
            }
        }
        if groups.is_empty() {
            let (got, advice) = match left_out.first() {
                Some(first) => {
                    (format!("none ({first})"), "mend the rows; train --help has their forms")
                }
                None => ("none".into(), "give a file that has rows"),
            };
            return Err(Error::invalid(spec, "a row that can be used", got, advice));
        }
        notes.extend(left_out.iter().take(NAMED).map(|why| format!("left out: {why}")));
        if left_out.len() > NAMED {
            notes.push(format!("left out: {} rows in all", left_out.len()));
        }
        self.check_whole(&groups, kind, &files)?;
        Ok(Rows { groups, seed: self.config.seed, order: None })
    }

    /// What no row alone shows.
    fn check_whole(
        &self,
        groups: &[ResponseGroup],
        kind: ExampleKind,
        files: &[PathBuf],
    ) -> Result<()> {
        let mut labels = groups.iter().flat_map(|g| &g.responses).map(|r| r.label);
        let first = labels.next();
        if kind == ExampleKind::Labelled && labels.all(|label| Some(label) == first) {
            let got = format!("{} in every row", first.unwrap_or_default());
            let advice =
                "add rows of the other kind, or use --algo sft for wanted completions alone";
            let place = format!("{}: `label`", place(files));
            return Err(Error::invalid(
                place,
                "true in some rows and false in others",
                got,
                advice,
            ));
        }
        let with = groups.iter().filter(|g| !g.responses.is_empty()).count();
        if kind == ExampleKind::Contexts && with != 0 && with != groups.len() {
            let got = format!("{with} of {} rows with one", groups.len());
            let place = format!("{}: `completion`", place(files));
            let advice = "give completions for all, to learn on them, or for none, to sample them";
            return Err(Error::invalid(place, "a completion in all rows or in none", got, advice));
        }
        Ok(())
    }

    /// The groups of a row: one, unless a conversation falls into several.
    fn groups(&self, row: &ExampleRow, kind: ExampleKind) -> Result<Vec<ResponseGroup>> {
        let named = |name: &'static str| move |error: Error| within(&row.place, name, error);
        let groups = match &row.example {
            Example::Text(text) => {
                let said = self.encoder.plain(text).map_err(named("text"))?;
                vec![said_group(said, row.weight)]
            }
            Example::Conversation(chat) => {
                let turns = self.config.rows.turns;
                let runs = self.encoder.conversation(chat, turns).map_err(named("messages"))?;
                runs.into_iter().map(|said| said_group(said, row.weight)).collect()
            }
            Example::Completions(prompt, completions) => {
                // Prompts that completions are sampled for lose their beginning later, as in all rollouts.
                let sampled = kind == ExampleKind::Contexts && completions.is_empty();
                let name = match prompt {
                    Prompt::Tokens(_) => "prompt_tokens",
                    _ => "prompt",
                };
                let tokens = self.encoder.prompt(prompt, usize::MAX).map_err(named(name))?;
                let name = |i: usize, content: &CompletionContent| match (kind, i, content) {
                    (ExampleKind::Pairs, 0, CompletionContent::Text(_)) => "chosen",
                    (ExampleKind::Pairs, 0, CompletionContent::Tokens(_)) => "chosen_tokens",
                    (ExampleKind::Pairs, _, CompletionContent::Text(_)) => "rejected",
                    (ExampleKind::Pairs, _, CompletionContent::Tokens(_)) => "rejected_tokens",
                    _ => "completion",
                };
                let one = |(i, content): (usize, &CompletionContent)| -> Result<Response> {
                    let tokens =
                        self.completion(prompt, content).map_err(named(name(i, content)))?;
                    let weights = match row.weight == 1.0 {
                        true => Vec::new(),
                        false => vec![row.weight; tokens.len()],
                    };
                    let label = row.label.unwrap_or_default();
                    Ok(Response { tokens, weights, label, ..Response::default() })
                };
                let responses = completions.iter().enumerate().map(one).collect::<Result<_>>()?;
                let group = ResponseGroup { prompt: tokens, responses };
                if sampled {
                    return Ok(vec![group]);
                }
                vec![group]
            }
        };
        groups.iter().try_for_each(|group| self.check_length(row, group))?;
        if kind == ExampleKind::Pairs
            && groups[0].responses[0].tokens == groups[0].responses[1].tokens
        {
            let place = format!("{}: `rejected`", row.place);
            let advice = "drop the row: equal completions teach no preference";
            return Err(Error::invalid(
                place,
                "other tokens than `chosen` has",
                "the same",
                advice,
            ));
        }
        Ok(groups)
    }

    fn completion(&self, prompt: &Prompt, content: &CompletionContent) -> Result<Vec<i32>> {
        let tokens = match content {
            CompletionContent::Tokens(tokens) => tokens.clone(),
            CompletionContent::Text(text) => self.encoder.answer(prompt, text)?,
        };
        match tokens.iter().find(|&&t| t < 0 || t as usize >= self.n_vocab) {
            None => Ok(tokens),
            Some(bad) => Err(Error::invalid(
                "tokens",
                format!("token ids below {}", self.n_vocab),
                bad.to_string(),
                "the tokens belong to another model",
            )),
        }
    }

    /// Tokens of a prompt with its longest completion, at most.
    pub fn most_tokens(&self) -> usize {
        let c = self.config;
        let both = c.max_prompt.zip(c.max_response).map(|(prompt, response)| prompt + response);
        let wanted = c.rows.max_length.or(both).unwrap_or(usize::MAX);
        wanted.min(self.n_ctx_train)
    }

    fn check_length(&self, row: &ExampleRow, group: &ResponseGroup) -> Result<()> {
        let most = self.most_tokens();
        let longest = group.responses.iter().map(|r| r.tokens.len()).max().unwrap_or(0);
        let n = group.prompt.len() + longest;
        if n <= most {
            return Ok(());
        }
        let advice = match most < self.n_ctx_train {
            true => "raise --max-length, or shorten the row",
            false => "the model's context ends there: shorten the row",
        };
        let expected = format!("at most {most} tokens, its completion included");
        Err(Error::invalid(format!("{}: `prompt`", row.place), expected, n.to_string(), advice))
    }
}

/// An error about a row's column.
fn within(place: &str, name: &str, error: Error) -> Error {
    match error {
        Error::Invalid { expected, got, advice, .. } => {
            Error::invalid(format!("{place}: `{name}`"), expected, got, advice)
        }
        other => Error::engine(format!("{place}: `{name}`"), other.to_string(), "mend the row"),
    }
}

fn place(files: &[PathBuf]) -> String {
    files.iter().map(|f| f.display().to_string()).collect::<Vec<_>>().join(", ")
}

fn said_group(said: Said, weight: f32) -> ResponseGroup {
    let Said { prompt, tokens, learnt } = said;
    let weights = match weight == 1.0 && learnt.iter().all(|&l| l) {
        true => Vec::new(),
        false => learnt.iter().map(|&l| if l { weight } else { 0.0 }).collect(),
    };
    ResponseGroup { prompt, responses: vec![Response { tokens, weights, ..Response::default() }] }
}
