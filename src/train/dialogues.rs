//! Rollouts of a step that are dialogues with an environment, which rewards them.

use serde::Serialize;
use serde_json::Value;

use super::Observer;
use super::advantage::Baseline;
use super::collect::{Groups, Sample, Verdict};
use super::config::TurnCredit;
use super::response::{Response, ResponseGroup, TurnReturn};
use super::source::With;
use crate::Result;
use crate::data::Problem;
use crate::env::{Counts, Dialogue, EnvPool, Talk, Task, task_seed};
use crate::reward::JudgePool;
use crate::rollout::Rollouts;

/// What dialogues need beside a rollout engine.
pub(super) struct Dialogues {
    pub pool: EnvPool,
    /// Judges of the last turn's text, where `--reward` names some; theirs is added to the last turn's reward.
    pub judges: Option<JudgePool>,
    /// Whether it was said that the chat template rewrites what was said before.
    pub told: bool,
}

/// What dialogues of a step were like; a part of its line in `metrics.jsonl`.
#[derive(Clone, Copy, Debug, Default, Serialize)]
pub struct TalkRecord {
    /// Means.
    #[serde(flatten)]
    pub talk: Talk,
    /// Seconds that environments worked, added up over their threads and ranks.
    pub env_seconds: f32,
    /// Seconds that sampling stood still, for nothing could be decoded before an answer came; of the rank that waited most.
    pub env_wait_seconds: f32,
}

/// What a line of `completions.jsonl` says of a dialogue.
#[derive(Clone, Debug, Serialize)]
pub struct Talked {
    /// What it was like.
    #[serde(flatten)]
    pub counts: Counts,
    /// Reward of each turn.
    pub rewards: Vec<f32>,
    /// All messages.
    pub messages: Vec<Value>,
}

/// Groups of a step's problems.
pub(super) struct Talks {
    pub groups: Groups,
    pub record: TalkRecord,
}

impl Dialogues {
    /// Tokens of the opening of a dialogue about a problem.
    pub fn opening(
        &mut self,
        with: With<'_, '_>,
        problem: Problem,
        position: u64,
    ) -> Result<Vec<i32>> {
        let c = with.settings;
        let task = Task { problem, seed: task_seed(c.seed, position), held_out: false };
        let session = self.pool.session(with.encoder, vec![task], 1, "look")?;
        let streams = std::iter::once(0);
        let mut requests = session.requests(c.max_prompt, c.max_response, streams)?;
        Ok(requests.remove(0).prompt_tokens)
    }

    /// Samples a group of dialogues about each problem from the final policy; their random numbers begin at `stream`.
    pub fn sample(
        &mut self,
        rollouts: &mut Rollouts,
        with: With<'_, '_>,
        (step, stream): (u64, u64),
        problems: &[Problem],
        observer: &mut dyn Observer,
    ) -> Result<Talks> {
        let c = with.settings;
        let tasks = (stream..).zip(problems).map(|(stream, problem)| Task {
            problem: problem.clone(),
            seed: task_seed(c.seed, stream),
            held_out: false,
        });
        let named = tasks.enumerate().map(|(i, task)| (format!("train-{stream}.{i}"), task));
        let team = with.team;
        let mut session = self.pool.session_in(team, with.encoder, named.collect(), c.group)?;
        let requests = session.requests(c.max_prompt, c.max_response, stream..);
        let requests = requests.map_err(|e| team.shared_by_all(e))?;
        let asked: Vec<String> =
            (0..problems.len()).map(|i| last_words(session.opening(i))).collect();
        let own = rollouts.converse(
            &requests,
            &c.sampling,
            c.seed,
            with.stop,
            &mut session,
            &mut |progress| {
                observer.rollout("rollout", progress);
                Ok(())
            },
        );
        let ((waited, worked), rewritten) = (session.seconds(), session.rewritten());
        let judges = &mut self.judges;
        let own = own.and_then(|segments| {
            let mut groups = session.dialogues(segments);
            if let Some(judges) = judges {
                crate::env::judge_ends(judges, problems, &mut groups)?;
            }
            Ok(groups)
        });
        let dialogues = team.join(problems.len(), own)?;
        let by_rank = team.each((waited, worked, rewritten as u64))?;
        let waited = by_rank.iter().map(|rank| rank.0).fold(0.0, f64::max);
        let worked: f64 = by_rank.iter().map(|rank| rank.1).sum();
        let rewritten: u64 = by_rank.iter().map(|rank| rank.2).sum();
        if rewritten > 0 && !std::mem::replace(&mut self.told, true) {
            observer.note(&format!(
                "the chat template writes what was said before otherwise (thoughts left out, say): {rewritten} times in \
                 this step a new segment began, which reads its dialogue again"
            ));
        }
        let record = TalkRecord {
            talk: Talk::of(dialogues.iter().flatten().map(Dialogue::counts)),
            env_seconds: worked as f32,
            env_wait_seconds: waited as f32,
        };
        let all = problems.iter().zip(requests).zip(dialogues).zip(asked);
        let groups = all.map(|(((problem, request), group), asked)| {
            let samples = group.iter().map(|d| sample(step, problem, &asked, d, c.turn_discount));
            let samples = samples.collect();
            let told_apart = c.turn_credit == TurnCredit::ToGo || c.baseline == Baseline::Value;
            let responses =
                group.into_iter().flat_map(|d| responses(d, c.turn_discount, told_apart));
            (
                ResponseGroup { prompt: request.prompt_tokens, responses: responses.collect() },
                samples,
            )
        });
        Ok(Talks { groups: groups.collect(), record })
    }
}

/// The last message of an opening.
fn last_words(messages: &[Value]) -> String {
    let last = messages.last().and_then(|message| message["content"].as_str());
    last.unwrap_or_default().to_string()
}

fn sample(step: u64, problem: &Problem, asked: &str, d: &Dialogue, discount: f32) -> Sample {
    Sample {
        step,
        problem: problem.id.clone(),
        prompt: asked.into(),
        verdict: Some(Verdict {
            answer: problem.answer.clone(),
            reward: d.returns(discount)[0],
            reason: d.reason.clone(),
            parts: serde_json::Map::new(),
            dropped: false,
        }),
        tokens: d.own_tokens(),
        truncated: d.truncated,
        completion: d.text(),
        dialogue: Some(Talked {
            counts: d.counts(),
            rewards: d.turns.iter().map(|turn| turn.reward).collect(),
            messages: d.messages.clone(),
        }),
    }
}

/// A dialogue as training sees it, a response for each segment: what the environment said has weight 0.
pub(super) fn responses(d: Dialogue, discount: f32, told_apart: bool) -> Vec<Response> {
    let returns = d.returns(discount);
    let mut turn = 0;
    let mut responses = Vec::with_capacity(d.segments.len());
    for (i, segment) in d.segments.into_iter().enumerate() {
        let own = &segment.own;
        // Between two turns stands what the environment said.
        let is_end = |t: &usize| own[*t] && !own.get(t + 1).copied().unwrap_or(false);
        let mut turns = Vec::new();
        for end in (0..own.len()).filter(is_end) {
            let learnt = own[..=end].iter().filter(|&&own| own).count();
            let (reward, to_go) = (d.turns[turn].reward, returns[turn]);
            turns.push(TurnReturn { end: learnt, reward, to_go });
            turn += 1;
        }
        // Later segments are further steps of the same dialogue.
        if let (Some(last), Some(later)) = (turns.last_mut(), returns.get(turn)) {
            last.reward += discount * later;
        }
        let kept = segment.completion.logprobs.iter().zip(own).filter(|(_, own)| **own);
        let whole = own.iter().all(|&own| own);
        responses.push(Response {
            prompt: (i > 0).then_some(segment.prompt),
            rollout: kept.map(|(logprob, _)| *logprob).collect(),
            weights: match whole {
                true => Vec::new(),
                false => own.iter().map(|&own| own as u8 as f32).collect(),
            },
            tokens: segment.completion.tokens,
            experts: segment.completion.experts,
            reward: returns[0],
            turns: if told_apart { turns } else { Vec::new() },
            ..Response::default()
        });
    }
    responses
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::env::TurnEnd;
    use crate::rollout::{Completion, Finish, Segment};

    fn segment(own: &[bool]) -> Segment {
        let completion = Completion {
            tokens: (0..own.len() as i32).collect(),
            logprobs: own.iter().map(|&own| if own { -1.0 } else { 0.0 }).collect(),
            finish: Finish::Eog,
            experts: vec![],
        };
        Segment { prompt: vec![9], completion, own: own.to_vec() }
    }

    #[test]
    fn segments_become_responses_with_masks_and_returns() {
        let dialogue = Dialogue {
            segments: vec![
                segment(&[true, true, false, true]),
                segment(&[true, false, false, true]),
            ],
            messages: vec![],
            turns: [1.0, 0.0, 0.0, 4.0].map(|reward| TurnEnd { reward }).to_vec(),
            calls: 0,
            failed: 0,
            success: true,
            reason: String::new(),
            truncated: false,
        };
        let all = responses(dialogue.clone(), 0.5, true);
        assert_eq!((all[0].prompt.clone(), all[1].prompt.clone()), (None, Some(vec![9])));
        assert_eq!(all[0].weights, [1.0, 1.0, 0.0, 1.0]);
        assert_eq!((all[0].rollout.len(), all[0].n_learnt()), (3, 3));
        assert_eq!(all[0].reward, 1.5);
        let turn = |end, reward, to_go| TurnReturn { end, reward, to_go };
        // The second turn's reward takes in what the later segment brings.
        assert_eq!(all[0].turns, [turn(2, 1.0, 1.5), turn(3, 1.0, 1.0)]);
        assert_eq!(all[1].turns, [turn(1, 0.0, 2.0), turn(2, 4.0, 4.0)]);
        assert!(responses(dialogue, 0.5, false).iter().all(|r| r.turns.is_empty()));
    }
}
