//! Evaluation by dialogues with an environment: K dialogues about every problem.

use std::sync::atomic::AtomicBool;

use super::{EVAL_STREAM, EvalOptions, EvalSample, Outcome, Store};
use crate::Result;
use crate::data::Problem;
use crate::env::{Dialogue, EnvPool, Task, judge_ends, task_seed};
use crate::reward::JudgePool;
use crate::rollout::{Encoder, Progress, Rollouts};

/// Problems whose dialogues are kept together, where they are kept: what an evaluation that is ended may lose.
const KEPT_TOGETHER: usize = 32;

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
        if let Some(store) = store.as_deref_mut() {
            for (problem, samples) in store.take_done() {
                outcomes[problem] = Some(Outcome::of_dialogues(&problems[problem], &samples));
            }
        }
        let missing: Vec<usize> = (0..problems.len()).filter(|&p| outcomes[p].is_none()).collect();
        let together = if store.is_some() { KEPT_TOGETHER } else { missing.len().max(1) };
        let total = missing.len() * options.samples;
        let mut before = Progress { total, ..Progress::default() };
        for part in missing.chunks(together) {
            let of_part = &mut |now: Progress| {
                progress(Progress { done: before.done + now.done, total, ..now });
            };
            let groups = self.talk(problems, part, options, of_part)?;
            before.done += part.len() * options.samples;
            for (&p, group) in part.iter().zip(groups) {
                let samples: Vec<EvalSample> = group
                    .into_iter()
                    .enumerate()
                    .map(|(i, d)| sample(p, &problems[p], i, d))
                    .collect();
                outcomes[p] = Some(Outcome::of_dialogues(&problems[p], &samples));
                if let Some(store) = store.as_deref_mut() {
                    store.append(&samples)?;
                }
            }
        }
        Ok(outcomes.into_iter().flatten().collect())
    }

    /// Dialogues about the problems of these places in the data.
    fn talk(
        &mut self,
        problems: &[Problem],
        places: &[usize],
        options: &EvalOptions,
        progress: &mut dyn FnMut(Progress),
    ) -> Result<Vec<Vec<Dialogue>>> {
        // By position in the data: a resumed evaluation samples what the first would have.
        let stream = |p: usize| EVAL_STREAM + p as u64;
        let task = |&p: &usize| Task {
            problem: problems[p].clone(),
            seed: task_seed(options.seed, stream(p)),
            held_out: true,
        };
        let tasks: Vec<Task> = places.iter().map(task).collect();
        let asked: Vec<Problem> = tasks.iter().map(|task| task.problem.clone()).collect();
        let name = format!("eval-{}", places.first().copied().unwrap_or_default());
        let mut session = self.pool.session(self.encoder, tasks, options.samples, &name)?;
        let streams = places.iter().map(|&p| stream(p));
        let requests = session.requests(options.max_prompt, options.max_response, streams)?;
        let segments = self.rollouts.converse(
            &requests,
            &options.sampling,
            options.seed,
            self.stop,
            &mut session,
            &mut |now| {
                progress(now);
                Ok(())
            },
        )?;
        let mut dialogues = session.dialogues(segments);
        if let Some(judges) = &mut self.judges {
            judge_ends(judges, &asked, &mut dialogues)?;
        }
        Ok(dialogues)
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
