//! Evaluation: K completions of every problem, judged; accuracies with their intervals.
//!
//! `bupo-gguf eval` and the evaluations of a training run are this code.

mod config;
mod dialogues;
mod keeper;
pub mod metrics;
mod report;
mod store;

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::sync::atomic::AtomicBool;

use serde::{Deserialize, Serialize};

use crate::Result;
use crate::data::Problem;
use crate::env::Counts;
use crate::reward::{Fresh, Judge, JudgePool, Sampler};
use crate::rollout::{Encoder, Progress, Request, Rollouts, Sampling};
use crate::team::Team;

pub use config::EvalConfig;
pub use dialogues::DialogueEvaluator;
pub use report::{ByDifficulty, Intervals, Report};
pub use store::{Settings, Store};

use keeper::{Keeper, from_text, to_text};

/// How an evaluation samples.
#[derive(Debug, Clone, Copy)]
pub struct EvalOptions {
    /// Completions per problem.
    pub samples: usize,
    /// Prompts lose their beginning beyond this, tokens.
    pub max_prompt: usize,
    /// Completions end at this length, tokens.
    pub max_response: usize,
    /// Sampling.
    pub sampling: Sampling,
    /// Same seed, same completions.
    pub seed: u64,
}

/// Problems that are shared out at a time, for each rank.
const TOGETHER: usize = 64;
/// Keeps the random numbers of evaluations apart from those of training.
const EVAL_STREAM: u64 = 1 << 48;

/// One judged completion; a line of `completions.jsonl`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct EvalSample {
    /// Position of its problem in the data, from 0.
    pub problem: usize,
    /// The problem's id.
    pub id: String,
    /// Which completion of the problem, from 0.
    pub sample: usize,
    /// Whether it counts as right.
    pub right: bool,
    /// Reward.
    pub reward: f32,
    /// Why.
    pub reason: String,
    /// The right answer.
    pub answer: String,
    /// The answer that was read in the completion.
    pub extracted: Option<String>,
    /// Length, tokens.
    pub tokens: usize,
    /// Whether it hit the length limit.
    pub truncated: bool,
    /// Text, control tokens left out; of a dialogue all of it, a line for each message.
    pub completion: String,
    /// What a dialogue was like.
    #[serde(flatten, skip_serializing_if = "Option::is_none")]
    pub talk: Option<Counts>,
    /// All messages of a dialogue.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub messages: Vec<serde_json::Value>,
}

/// A problem's samples, as far as figures need them.
#[derive(Debug, Clone, PartialEq)]
pub struct Outcome {
    /// The problem's difficulty, where the data says so.
    pub difficulty: Option<String>,
    /// Samples.
    pub n: usize,
    /// Right ones.
    pub right: usize,
    /// Share of the majority's vote that is right, see [`metrics::majority`].
    pub majority: f64,
    /// Tokens of all samples.
    pub tokens: usize,
    /// Samples that hit the length limit.
    pub truncated: usize,
    /// What its dialogues were like.
    pub talks: Vec<Counts>,
}

impl Outcome {
    /// What a problem's samples come to.
    pub fn new(problem: &Problem, samples: &[EvalSample], judge: &Judge) -> Outcome {
        let votes: Vec<_> = samples.iter().map(|s| (s.extracted.as_deref(), s.right)).collect();
        Outcome::of(problem, samples, metrics::majority(&votes, |a, b| judge.same(a, b)))
    }

    /// What a problem's dialogues come to; the majority is that of success.
    pub fn of_dialogues(problem: &Problem, samples: &[EvalSample]) -> Outcome {
        let votes: Vec<_> =
            samples.iter().map(|s| (Some(if s.right { "yes" } else { "no" }), s.right)).collect();
        Outcome::of(problem, samples, metrics::majority(&votes, |a, b| a == b))
    }

    fn of(problem: &Problem, samples: &[EvalSample], majority: f64) -> Outcome {
        let count = |f: fn(&EvalSample) -> bool| samples.iter().filter(|s| f(s)).count();
        Outcome {
            difficulty: problem.difficulty.clone(),
            n: samples.len(),
            right: count(|s| s.right),
            majority,
            tokens: samples.iter().map(|s| s.tokens).sum(),
            truncated: count(|s| s.truncated),
            talks: samples.iter().filter_map(|s| s.talk).collect(),
        }
    }
}

/// What an evaluation works with.
pub struct Evaluator<'e, 'm> {
    /// Samples, with the adapter that is judged.
    pub rollouts: &'e mut Rollouts,
    /// Prompts to tokens and back.
    pub encoder: &'e Encoder<'m>,
    /// Judges.
    pub pool: &'e mut JudgePool,
    /// Ends it when it becomes true.
    pub stop: &'e AtomicBool,
}

impl Evaluator<'_, '_> {
    /// Samples and judges every problem. With a store, problems that it holds already are taken from it,
    /// and each one that is done goes there at once, also from another rank.
    ///
    /// # Errors
    /// A prompt that the model cannot take, a reward that cannot judge, a file that cannot be written;
    /// [`crate::Error::Interrupted`].
    pub fn run(
        &mut self,
        problems: &[Problem],
        options: &EvalOptions,
        mut store: Option<&mut Store>,
        progress: &mut dyn FnMut(Progress),
    ) -> Result<Vec<Outcome>> {
        let judge = self.pool.judge().clone();
        let mut outcomes: Vec<Option<Outcome>> = vec![None; problems.len()];
        let team = self.rollouts.team().clone();
        let (done, keeps) = begun(&team, store.as_deref_mut())?;
        for (problem, samples) in done {
            outcomes[problem] = Some(Outcome::new(&problems[problem], &samples, &judge));
        }
        let missing: Vec<usize> = (0..problems.len()).filter(|&p| outcomes[p].is_none()).collect();
        // Every rank has the completions that were sampled together, until they are counted.
        let at_once = if team.is_alone() { missing.len() } else { team.size() * TOGETHER };
        for some in missing.chunks(at_once.max(1)) {
            let keeper = RefCell::new(Keeper::new(&team, store.as_deref_mut(), keeps));
            let mut look = |now: Progress| {
                keeper.borrow_mut().look();
                progress(now);
            };
            let outcome = self.some((problems, some), options, &judge, &keeper, &mut look);
            let found = keeper.into_inner().finish(some.len(), outcome)?;
            for (&p, samples) in some.iter().zip(&found) {
                outcomes[p] = Some(Outcome::new(&problems[p], samples, &judge));
            }
        }
        Ok(outcomes.into_iter().flatten().collect())
    }

    /// Those of the problems at these places that this rank takes.
    fn some(
        &mut self,
        (problems, some): (&[Problem], &[usize]),
        options: &EvalOptions,
        judge: &Judge,
        keeper: &RefCell<Keeper<'_>>,
        progress: &mut dyn FnMut(Progress),
    ) -> Result<()> {
        let mut asked = Vec::with_capacity(some.len());
        let mut requests = Vec::with_capacity(some.len());
        for &p in some {
            requests.push(Request {
                prompt_tokens: self.encoder.prompt(&problems[p].prompt, options.max_prompt)?,
                n: options.samples,
                // By position in the data: a resumed evaluation samples what the first would have.
                seed_stream: EVAL_STREAM + p as u64,
                max_tokens: options.max_response,
            });
            asked.push(problems[p].clone());
        }
        let mut sampler = Sampler {
            rollouts: self.rollouts,
            encoder: self.encoder,
            sampling: options.sampling,
            seed: options.seed,
            stop: self.stop,
        };
        let mut open: Vec<Vec<Option<EvalSample>>> =
            some.iter().map(|_| vec![None; options.samples]).collect();
        let mut each = |fresh: &Fresh<'_>| -> Result<()> {
            let p = some[fresh.request];
            let samples = &mut open[fresh.request];
            samples[fresh.index] = Some(EvalSample {
                problem: p,
                id: problems[p].id.clone(),
                sample: fresh.index,
                right: fresh.judgement.right,
                reward: fresh.judgement.reward,
                reason: fresh.judgement.reason.clone(),
                answer: problems[p].answer.clone(),
                extracted: judge.answer(fresh.opening, fresh.text),
                tokens: fresh.tokens,
                truncated: fresh.truncated,
                completion: fresh.text.into(),
                talk: None,
                messages: Vec::new(),
            });
            match samples.iter().all(Option::is_some) {
                true => {
                    let samples: Vec<_> = std::mem::take(samples).into_iter().flatten().collect();
                    keeper.borrow_mut().done(fresh.request, &samples)
                }
                false => Ok(()),
            }
        };
        self.pool.sample_own(&mut sampler, &asked, &requests, progress, &mut each).map(drop)
    }
}

/// The problems that were done before, and whether the first rank keeps what is done.
fn begun(
    team: &Team,
    store: Option<&mut Store>,
) -> Result<(BTreeMap<usize, Vec<EvalSample>>, bool)> {
    let keeps = store.is_some();
    let done = store.map(Store::take_done).unwrap_or_default();
    if team.is_alone() {
        return Ok((done, keeps));
    }
    let (text, keeps) = team.from_first(|| Ok((to_text(&done)?, keeps)))?;
    Ok((from_text(text.as_bytes())?, keeps))
}
