//! Where the groups of a step come from: completions that the policy samples and a reward judges, completions that it
//! samples for a teacher, or rows of files.

use std::sync::atomic::AtomicBool;

use super::collect::{By, Judged, Sample};
use super::dialogues::TalkRecord;
use super::response::{Response, ResponseGroup};
use super::rows::Rows;
use super::{Observer, Settings};
use crate::Result;
use crate::data::ProblemSource;
use crate::rollout::{Encoder, Finish, Request, Rollouts};
use crate::team::Team;

/// Where groups come from.
pub(super) enum Source {
    /// Completions that rewards judge.
    Judged(Judged),
    /// Completions that a teacher will look at.
    Sampled(Sampled),
    /// Given completions.
    Given(Rows),
}

/// Completions of the policy, for prompts of a task or of rows.
pub(super) struct Sampled {
    pub rollouts: Rollouts,
    pub prompts: Prompts,
}

/// Prompts without a right answer.
pub(super) enum Prompts {
    Task(ProblemSource),
    Rows(Rows),
}

/// The groups of a step, and what is to be logged of them.
#[derive(Default)]
pub(super) struct Batch {
    pub groups: Vec<ResponseGroup>,
    /// Completions that were sampled, those of dropped groups among them.
    pub samples: Vec<Sample>,
    /// Tokens that were sampled.
    pub sampled_tokens: usize,
    /// What dialogues were like.
    pub talk: Option<TalkRecord>,
}

/// What a source works with.
#[derive(Clone, Copy)]
pub(super) struct With<'w, 'm> {
    pub settings: &'w Settings,
    pub encoder: &'w Encoder<'m>,
    pub stop: &'w AtomicBool,
    pub team: &'w Team,
}

impl Source {
    /// The groups of a step.
    pub fn collect(
        &mut self,
        with: With<'_, '_>,
        step: u64,
        observer: &mut dyn Observer,
    ) -> Result<Batch> {
        match self {
            Source::Judged(judged) => judged.collect(with, step, observer),
            Source::Sampled(sampled) => sampled.collect(with, step, observer),
            Source::Given(rows) => {
                let positions = positions(with.settings, step, Some(rows.len()));
                let groups = positions.map(|i| rows.at(i)).collect();
                Ok(Batch { groups, ..Batch::default() })
            }
        }
    }

    /// What samples, where anything does.
    pub fn rollouts(&mut self) -> Option<&mut Rollouts> {
        match self {
            Source::Judged(judged) => Some(&mut judged.rollouts),
            Source::Sampled(sampled) => Some(&mut sampled.rollouts),
            Source::Given(_) => None,
        }
    }

    /// Tokens of the prompt at a position, or of the row there.
    pub fn prompt(&mut self, with: With<'_, '_>, position: u64) -> Result<Vec<i32>> {
        let most = with.settings.max_prompt;
        match self {
            Source::Judged(judged) => {
                let problem = judged.problems.problem(position);
                match &mut judged.by {
                    By::Judges(_) => with.encoder.prompt(&problem.prompt, most),
                    By::Environment(dialogues) => dialogues.opening(with, problem, position),
                }
            }
            Source::Sampled(sampled) => sampled.prompt(with, position),
            Source::Given(rows) => {
                let ResponseGroup { mut prompt, responses } = rows.at(position);
                prompt.extend(responses.first().iter().flat_map(|r| &r.tokens));
                Ok(prompt)
            }
        }
    }

    /// Rows or prompts of an epoch; none where there is no end to them.
    pub fn epoch_len(&self) -> Option<usize> {
        match self {
            Source::Judged(judged) => judged.problems.epoch_len(),
            Source::Sampled(Sampled { prompts: Prompts::Task(task), .. }) => task.epoch_len(),
            Source::Sampled(Sampled { prompts: Prompts::Rows(rows), .. }) => Some(rows.len()),
            Source::Given(rows) => Some(rows.len()),
        }
    }
}

/// Positions of a step; `--epochs` ends them with its last row.
fn positions(c: &Settings, step: u64, rows: Option<usize>) -> std::ops::Range<u64> {
    let first = (step - 1) * c.prompts_per_step as u64;
    let end = first + c.prompts_per_step as u64;
    let last = c.rows.epochs.zip(rows).map_or(end, |(epochs, rows)| epochs * rows as u64);
    first..end.min(last.max(first))
}

impl Sampled {
    fn prompt(&mut self, with: With<'_, '_>, position: u64) -> Result<Vec<i32>> {
        match &mut self.prompts {
            Prompts::Task(task) => {
                with.encoder.prompt(&task.problem(position).prompt, with.settings.max_prompt)
            }
            Prompts::Rows(rows) => {
                let mut tokens = rows.at(position).prompt;
                tokens.drain(..tokens.len().saturating_sub(with.settings.max_prompt));
                Ok(tokens)
            }
        }
    }

    /// The name of the prompt at a position, and what it asks, for people.
    fn asked(&mut self, with: With<'_, '_>, position: u64) -> [String; 2] {
        match &mut self.prompts {
            Prompts::Task(task) => {
                let problem = task.problem(position);
                [problem.id.clone(), with.encoder.asked(&problem.prompt)]
            }
            Prompts::Rows(rows) => {
                let prompt = with.encoder.text(&rows.at(position).prompt);
                [format!("prompt {}", rows.place(position) + 1), prompt]
            }
        }
    }

    fn collect(
        &mut self,
        with: With<'_, '_>,
        step: u64,
        observer: &mut dyn Observer,
    ) -> Result<Batch> {
        let c = with.settings;
        let rows = match &self.prompts {
            Prompts::Rows(rows) => Some(rows.len()),
            Prompts::Task(_) => None,
        };
        let (mut requests, mut asked) = (Vec::new(), Vec::new());
        for position in positions(c, step, rows) {
            asked.push(self.asked(with, position));
            requests.push(Request {
                prompt_tokens: self.prompt(with, position)?,
                n: c.group,
                seed_stream: position,
                max_tokens: c.max_response,
            });
        }
        let progress = &mut |progress| observer.rollout("rollout", progress);
        let sampled =
            self.rollouts.generate(&requests, &c.sampling, c.seed, progress, with.stop)?;
        let mut batch = Batch::default();
        for ((request, completions), asked) in requests.into_iter().zip(sampled).zip(asked) {
            let [problem, prompt] = asked;
            batch.samples.extend(completions.iter().map(|completion| Sample {
                step,
                problem: problem.clone(),
                prompt: prompt.clone(),
                verdict: None,
                tokens: completion.tokens.len(),
                truncated: completion.finish == Finish::Length,
                completion: with.encoder.text(&completion.tokens),
                dialogue: None,
            }));
            let responses: Vec<Response> = completions
                .into_iter()
                .map(|c| Response { tokens: c.tokens, rollout: c.logprobs, ..Response::default() })
                .collect();
            batch.sampled_tokens += responses.iter().map(|r| r.tokens.len()).sum::<usize>();
            batch.groups.push(ResponseGroup { prompt: request.prompt_tokens, responses });
        }
        Ok(batch)
    }
}
