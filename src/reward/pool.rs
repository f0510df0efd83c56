//! Worker threads that judge completions while others are still sampled.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::thread::JoinHandle;
use std::time::Duration;

use crossbeam_channel::{Receiver, RecvTimeoutError, Sender, unbounded};

use super::thoughts::opening;
use super::{Attempt, Judge, Judgement};
use crate::data::Problem;
use crate::rollout::{Completion, Encoder, Finish, Progress, Request, Rollouts, Sampling, Watcher};
use crate::{Error, Result};

/// Threads with a judge (and its program) each.
pub struct JudgePool {
    judge: Judge,
    jobs: Option<Sender<Job>>,
    results: Receiver<(Job, Result<Judgement>)>,
    threads: Vec<JoinHandle<()>>,
    calls: u64,
}

/// A completion with its judgement.
#[derive(Debug, Clone, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct Judged {
    /// Tokens and log-probs.
    pub completion: Completion,
    /// Its text, control tokens left out.
    pub text: String,
    /// What the judge says.
    pub judgement: Judgement,
}

impl Judged {
    /// Whether it was cut at the length limit.
    pub fn truncated(&self) -> bool {
        self.completion.finish == Finish::Length
    }
}

/// What is to be sampled and judged.
pub struct Sampler<'s, 'm> {
    /// Samples.
    pub rollouts: &'s mut Rollouts,
    /// Turns tokens into text.
    pub encoder: &'s Encoder<'m>,
    /// How.
    pub sampling: Sampling,
    /// Key of the random numbers, with a request's stream.
    pub seed: u64,
    /// Ends the work when it becomes true.
    pub stop: &'s AtomicBool,
}

/// A completion that was just judged, while others are still sampled.
#[derive(Debug, Clone, Copy)]
pub struct Fresh<'a> {
    /// Which request.
    pub request: usize,
    /// Which of its completions.
    pub index: usize,
    /// Text, control tokens left out.
    pub text: &'a str,
    /// The end of the prompt where that begins the thoughts, else empty.
    pub opening: &'a str,
    /// Length, tokens.
    pub tokens: usize,
    /// Whether it was cut at the length limit.
    pub truncated: bool,
    /// What the judge says.
    pub judgement: &'a Judgement,
}

struct Job {
    call: u64,
    request: usize,
    index: usize,
    problem: Arc<Problem>,
    text: String,
    opening: Arc<str>,
    tokens: usize,
    truncated: bool,
}

impl JudgePool {
    /// `workers` threads, at least one. Programs are started now.
    ///
    /// # Errors
    /// A program cannot be started.
    pub fn new(judge: Judge, workers: usize) -> Result<JudgePool> {
        let (jobs, todo) = unbounded::<Job>();
        let (done, results) = unbounded();
        let mut threads = Vec::with_capacity(workers);
        for _ in 0..workers.max(1) {
            let (mut judge, todo, done) = (judge.clone(), todo.clone(), done.clone());
            judge.start()?;
            threads.push(std::thread::spawn(move || {
                while let Ok(job) = todo.recv() {
                    let more = todo.try_iter().take(judge.batch() - 1);
                    let jobs: Vec<Job> = std::iter::once(job).chain(more).collect();
                    let outcomes = judge_all(&mut judge, &jobs);
                    for done_job in jobs.into_iter().zip(outcomes) {
                        if done.send(done_job).is_err() {
                            return;
                        }
                    }
                }
            }));
        }
        Ok(JudgePool { judge, jobs: Some(jobs), results, threads, calls: 0 })
    }

    /// What the threads judge by.
    pub fn judge(&self) -> &Judge {
        &self.judge
    }

    /// Judges texts: of each the problem, the text, its tokens, and whether it was cut.
    ///
    /// # Errors
    /// A reward that cannot judge.
    pub fn judge_all(
        &mut self,
        texts: Vec<(Problem, String, usize, bool)>,
    ) -> Result<Vec<Judgement>> {
        self.calls += 1;
        let n = texts.len();
        let jobs = self.jobs.as_ref().expect("open until it is dropped");
        for (request, (problem, text, tokens, truncated)) in texts.into_iter().enumerate() {
            let (call, problem, opening) = (self.calls, Arc::new(problem), "".into());
            let job = Job { call, request, index: 0, problem, text, opening, tokens, truncated };
            jobs.send(job).map_err(|_| lost())?;
        }
        let mut judged = vec![None; n];
        while judged.iter().any(Option::is_none) {
            let (job, outcome) = self.results.recv().map_err(|_| lost())?;
            if job.call == self.calls {
                judged[job.request] = Some(outcome?);
            }
        }
        Ok(judged.into_iter().flatten().collect())
    }

    /// Samples all requests and judges each completion as it ends, on the workers; a team shares them.
    ///
    /// # Errors
    /// Those of sampling, and of a reward that cannot judge.
    pub fn sample(
        &mut self,
        sampler: &mut Sampler<'_, '_>,
        problems: &[Problem],
        requests: &[Request],
        progress: &mut dyn FnMut(Progress),
    ) -> Result<Vec<Vec<Judged>>> {
        let own = self.sample_own(sampler, problems, requests, progress, &mut |_| Ok(()));
        sampler.rollouts.team().join(requests.len(), own)
    }

    /// [`JudgePool::sample`] of the requests that this rank took; no call that all ranks end together: a
    /// [`crate::team::Team::join`] has to follow. `each` sees completions in the order in which they were judged.
    ///
    /// # Errors
    /// Those of it, and of `each`.
    pub fn sample_own(
        &mut self,
        sampler: &mut Sampler<'_, '_>,
        problems: &[Problem],
        requests: &[Request],
        progress: &mut dyn FnMut(Progress),
        each: &mut dyn FnMut(&Fresh<'_>) -> Result<()>,
    ) -> Result<Vec<(usize, Vec<Judged>)>> {
        self.calls += 1;
        let mut judging = Judging {
            pool: self,
            encoder: sampler.encoder,
            problems: problems.iter().cloned().map(Arc::new).collect(),
            openings: requests.iter().map(|r| opened(sampler.encoder, r)).collect(),
            verdicts: requests.iter().map(|r| vec![None; r.n]).collect(),
            open: 0,
            sampled: Progress::default(),
            progress,
            each,
        };
        judging.own(sampler, requests)
    }
}

impl Drop for JudgePool {
    fn drop(&mut self) {
        self.jobs = None;
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
    }
}

/// An outcome for each job; where one of them cannot be judged, the error stands in the first's place.
fn judge_all(judge: &mut Judge, jobs: &[Job]) -> Vec<Result<Judgement>> {
    let attempts = jobs.iter().map(|job| Attempt {
        problem: &job.problem,
        text: &job.text,
        opening: &job.opening,
        tokens: job.tokens,
        truncated: job.truncated,
    });
    let attempts: Vec<Attempt<'_>> = attempts.collect();
    // A rule that panics must not leave the run waiting for its verdict.
    let judged = catch_unwind(AssertUnwindSafe(|| judge.score_all(&attempts)));
    let judged = judged.unwrap_or_else(|_| {
        let reason = format!("it panicked on a completion of {}", jobs[0].problem.id);
        Err(Error::engine("the reward", reason, "report it"))
    });
    match judged {
        Ok(all) => all.into_iter().map(Ok).collect(),
        Err(error) => vec![Err(error)],
    }
}

/// Time between two looks at the progress, while judges are waited for.
const LOOK: Duration = Duration::from_millis(100);
/// Tokens at the end of a prompt that are looked at for thoughts begun there.
const OPENING_TOKENS: usize = 64;

/// The end of a request's prompt where that begins the completion's thoughts.
fn opened(encoder: &Encoder<'_>, request: &Request) -> Arc<str> {
    let prompt = &request.prompt_tokens;
    let end = &prompt[prompt.len().saturating_sub(OPENING_TOKENS)..];
    opening(&encoder.text(end)).into()
}

fn lost() -> Error {
    Error::engine("judging completions", "a worker has ended early", "report it")
}

/// Sends what ends to the workers and collects what they say.
struct Judging<'j, 'm> {
    pool: &'j JudgePool,
    encoder: &'j Encoder<'m>,
    problems: Vec<Arc<Problem>>,
    openings: Vec<Arc<str>>,
    verdicts: Vec<Vec<Option<(String, Judgement)>>>,
    open: usize,
    /// How far sampling is.
    sampled: Progress,
    progress: &'j mut dyn FnMut(Progress),
    each: &'j mut dyn FnMut(&Fresh<'_>) -> Result<()>,
}

impl Judging<'_, '_> {
    /// Those of this rank, judged.
    fn own(
        &mut self,
        sampler: &mut Sampler<'_, '_>,
        requests: &[Request],
    ) -> Result<Vec<(usize, Vec<Judged>)>> {
        let (sampling, seed, stop) = (sampler.sampling, sampler.seed, sampler.stop);
        let completions =
            sampler.rollouts.generate_watched(requests, &sampling, seed, stop, self)?;
        while self.open > 0 {
            match self.pool.results.recv_timeout(LOOK) {
                Ok(done) => self.take(done)?,
                Err(RecvTimeoutError::Timeout) => (self.progress)(self.sampled),
                Err(RecvTimeoutError::Disconnected) => return Err(lost()),
            }
        }
        let judged = |(completion, verdict): (Completion, Option<(String, Judgement)>)| {
            let (text, judgement) = verdict.ok_or_else(lost)?;
            Ok(Judged { completion, text, judgement })
        };
        completions
            .into_iter()
            .map(|(request, group)| {
                let verdicts = std::mem::take(&mut self.verdicts[request]);
                let group = group.into_iter().zip(verdicts).map(judged).collect::<Result<_>>()?;
                Ok((request, group))
            })
            .collect()
    }

    fn take(&mut self, (job, outcome): (Job, Result<Judgement>)) -> Result<()> {
        // Left over from a call that ended with an error.
        if job.call != self.pool.calls {
            return Ok(());
        }
        self.open -= 1;
        let judgement = outcome?;
        (self.each)(&Fresh {
            request: job.request,
            index: job.index,
            text: &job.text,
            opening: &job.opening,
            tokens: job.tokens,
            truncated: job.truncated,
            judgement: &judgement,
        })?;
        self.verdicts[job.request][job.index] = Some((job.text, judgement));
        Ok(())
    }
}

impl Watcher for Judging<'_, '_> {
    fn progress(&mut self, progress: Progress) -> Result<()> {
        self.sampled = progress;
        (self.progress)(progress);
        while let Ok(done) = self.pool.results.try_recv() {
            self.take(done)?;
        }
        Ok(())
    }

    fn finished(&mut self, request: usize, index: usize, completion: &Completion) -> Result<()> {
        let job = Job {
            call: self.pool.calls,
            request,
            index,
            problem: self.problems[request].clone(),
            text: self.encoder.text(&completion.tokens),
            opening: self.openings[request].clone(),
            tokens: completion.tokens.len(),
            truncated: completion.finish == Finish::Length,
        };
        self.open += 1;
        let jobs = self.pool.jobs.as_ref().expect("open until it is dropped");
        jobs.send(job).map_err(|_| lost())
    }
}
