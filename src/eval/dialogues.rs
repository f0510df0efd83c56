//! Evaluation by dialogues with an environment: K dialogues about every problem.

use std::cell::RefCell;
use std::sync::atomic::AtomicBool;
use std::time::{Duration, Instant};

use super::{EVAL_STREAM, EvalOptions, EvalSample, Keeper, Outcome, Store, begun};
use crate::Result;
use crate::data::Problem;
use crate::env::{Dialogue, EnvPool, Task, judge_ends, task_seed};
use crate::reward::JudgePool;
use crate::rollout::{Encoder, Progress, Rollouts};

/// Problems of each rank whose dialogues are begun together where they are kept: environments hold so many at a time.
const TOGETHER: usize = 32;
/// After judging, sampling goes on for so many times as long.
const JUDGE_SHARE: u32 = 4;

/// What an evaluation by dialogues works with.
pub struct DialogueEvaluator<'e, 'm> {
    /// Samples, with the adapter that is judged.
    pub rollouts: &'e mut Rollouts,
    /// Messages to tokens and back.
    pub encoder: &'e Encoder<'m>,
    /// Environments.
    pub pool: &'e mut EnvPool,
    /// Judges of last turns, where a reward was asked for.
    pub judges: Option<&'e mut JudgePool>,
    /// Ends it when it becomes true.
    pub stop: &'e AtomicBool,
}

impl DialogueEvaluator<'_, '_> {
    /// As [`super::Evaluator::run`].
    ///
    /// # Errors
    /// Those of it, and of the environment.
    pub fn run(
        &mut self,
        problems: &[Problem],
        options: &EvalOptions,
        mut store: Option<&mut Store>,
        progress: &mut dyn FnMut(Progress),
    ) -> Result<Vec<Outcome>> {
        let mut outcomes: Vec<Option<Outcome>> = vec![None; problems.len()];
        let team = self.rollouts.team().clone();
        let (done, keeps) = begun(&team, store.as_deref_mut())?;
        for (problem, samples) in done {
            outcomes[problem] = Some(Outcome::of_dialogues(&problems[problem], &samples));
        }
        let missing: Vec<usize> = (0..problems.len()).filter(|&p| outcomes[p].is_none()).collect();
        let total = missing.len() * options.samples;
        let mut before = 0;
        let at_once = if keeps { team.size() * TOGETHER } else { missing.len().max(1) };
        for some in missing.chunks(at_once) {
            let keeper = RefCell::new(Keeper::new(&team, store.as_deref_mut(), keeps));
            let mut look = |now: Progress| {
                keeper.borrow_mut().look();
                progress(Progress { done: before + now.done, total, ..now });
            };
            let outcome = self.talk((problems, some), options, &keeper, &mut look);
            let found = keeper.into_inner().finish(some.len(), outcome)?;
            before += some.len() * options.samples;
            for (&p, samples) in some.iter().zip(&found) {
                outcomes[p] = Some(Outcome::of_dialogues(&problems[p], samples));
            }
        }
        Ok(outcomes.into_iter().flatten().collect())
    }

    /// Dialogues about those of the problems at these places that this rank takes.
    fn talk(
        &mut self,
        (problems, places): (&[Problem], &[usize]),
        options: &EvalOptions,
        keeper: &RefCell<Keeper<'_>>,
        progress: &mut dyn FnMut(Progress),
    ) -> Result<()> {
        // By position in the data: a resumed evaluation samples what the first would have.
        let stream = |p: usize| EVAL_STREAM + p as u64;
        let task = |&p: &usize| {
            let seed = task_seed(options.seed, stream(p));
            (format!("eval-{p}"), Task { problem: problems[p].clone(), seed, held_out: true })
        };
        let tasks: Vec<(String, Task)> = places.iter().map(task).collect();
        let asked: Vec<Problem> = tasks.iter().map(|(_, task)| task.problem.clone()).collect();
        let ends = RefCell::new(Ends {
            places,
            asked,
            judges: self.judges.as_deref_mut(),
            waiting: Vec::new(),
            judged: Instant::now(),
            pause: Duration::ZERO,
        });
        let mut ended = |request: usize, group: Vec<Dialogue>| {
            ends.borrow_mut().waiting.push((request, group));
            ends.borrow_mut().judge(keeper, false)
        };
        let team = self.rollouts.team().clone();
        let mut session = self.pool.session_in(&team, self.encoder, tasks, options.samples)?;
        session.hand_on(&mut ended);
        let streams = places.iter().map(|&p| stream(p));
        let requests = session.requests(options.max_prompt, options.max_response, streams)?;
        self.rollouts.converse(
            &requests,
            &options.sampling,
            options.seed,
            self.stop,
            &mut session,
            &mut |now| {
                progress(now);
                ends.borrow_mut().judge(keeper, false)
            },
        )?;
        ends.borrow_mut().judge(keeper, true)
    }
}

/// Groups of dialogues that are over.
struct Ends<'e> {
    places: &'e [usize],
    asked: Vec<Problem>,
    judges: Option<&'e mut JudgePool>,
    /// Those that are not judged yet, by request.
    waiting: Vec<(usize, Vec<Dialogue>)>,
    judged: Instant,
    pause: Duration,
}

impl Ends<'_> {
    /// Judges what is over and keeps it. Sampling stands still meanwhile, so that a judge that takes long gets several
    /// groups at a time; `now`: all that are left.
    fn judge(&mut self, keeper: &RefCell<Keeper<'_>>, now: bool) -> Result<()> {
        if self.waiting.is_empty() || !now && self.judged.elapsed() < self.pause {
            return Ok(());
        }
        let start = Instant::now();
        let mut groups = std::mem::take(&mut self.waiting);
        if let Some(judges) = &mut self.judges {
            judge_ends(judges, &self.asked, &mut groups)?;
            (self.judged, self.pause) = (Instant::now(), JUDGE_SHARE * start.elapsed());
        }
        for (request, group) in groups {
            let (p, problem) = (self.places[request], &self.asked[request]);
            let all = group.into_iter().enumerate();
            let samples: Vec<EvalSample> = all.map(|(i, d)| sample(p, problem, i, d)).collect();
            keeper.borrow_mut().done(request, &samples)?;
        }
        Ok(())
    }
}

fn sample(p: usize, problem: &Problem, index: usize, d: Dialogue) -> EvalSample {
    EvalSample {
        problem: p,
        id: problem.id.clone(),
        sample: index,
        right: d.success,
        reward: d.returns(1.0)[0],
        reason: d.reason.clone(),
        answer: problem.answer.clone(),
        extracted: None,
        tokens: d.own_tokens(),
        truncated: d.truncated,
        completion: d.text(),
        talk: Some(d.counts()),
        messages: d.messages,
    }
}
