//! Rollouts of a step: problems, groups of completions, rewards; groups without signal replaced.

use serde_json::Value;

use super::Observer;
use super::advantage::returns;
use super::dialogues::{Dialogues, TalkRecord, Talked};
use super::response::{Response, ResponseGroup};
use super::source::{Batch, With};
use crate::Result;
use crate::data::{Problem, ProblemSource};
use crate::reward::{JudgePool, Judged as Answer, Sampler};
use crate::rollout::{Request, Rollouts};

/// One line of `completions.jsonl`.
#[derive(Clone, Debug, serde::Serialize)]
pub struct Sample {
    /// Step.
    pub step: u64,
    /// Which problem.
    pub problem: String,
    /// What was asked: the last message.
    pub prompt: String,
    /// What was said of it; none where a teacher alone looks at it.
    #[serde(flatten)]
    pub verdict: Option<Verdict>,
    /// Length.
    pub tokens: usize,
    /// Whether it hit the length limit.
    pub truncated: bool,
    /// Text, control tokens left out; of a dialogue all of it, a line for each message.
    pub completion: String,
    /// What is to be said of a dialogue.
    #[serde(flatten, skip_serializing_if = "Option::is_none")]
    pub dialogue: Option<Talked>,
}

/// What a reward said of a completion.
#[derive(Clone, Debug, serde::Serialize)]
pub struct Verdict {
    /// The right answer.
    pub answer: String,
    /// Reward.
    pub reward: f32,
    /// Why.
    pub reason: String,
    /// Value of each part of the reward before its weight, where there are several.
    #[serde(skip_serializing_if = "serde_json::Map::is_empty")]
    pub parts: serde_json::Map<String, Value>,
    /// Whether its group was replaced, for all its rewards were equal.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub dropped: bool,
}

/// Seeds of groups sampled in place of others lie this far apart.
const ROUND_STREAM: u64 = 1 << 40;

/// Groups with what is to be logged of them.
pub(super) type Groups = Vec<(ResponseGroup, Vec<Sample>)>;

/// Who rewards.
pub(super) enum By {
    /// Judges of single answers.
    Judges(JudgePool),
    /// The environment that the dialogues are with.
    Environment(Box<Dialogues>),
}

/// Completions, or dialogues, that the policy samples for problems, and their rewards.
pub(super) struct Judged {
    pub rollouts: Rollouts,
    pub problems: ProblemSource,
    pub held_out: Vec<Problem>,
    pub by: By,
}

impl Judged {
    /// The groups of a step and all samples, those of dropped groups among them.
    ///
    /// With `--resample N` (DAPO, arXiv 2503.14476, section 3.2) groups whose rewards are all equal are
    /// dropped and as many other problems asked, up to N times; what is still missing then is filled with the
    /// groups that were dropped last. Problems and random numbers of round r depend on the seed, the step and
    /// r alone, so a run resumes exactly. Departure: DAPO goes on with the data where a refill left off.
    pub fn collect(
        &mut self,
        with: With<'_, '_>,
        step: u64,
        observer: &mut dyn Observer,
    ) -> Result<Batch> {
        let (wanted, rounds) = (with.settings.prompts_per_step, with.settings.resample);
        let (mut groups, mut samples) = (Vec::with_capacity(wanted), Vec::new());
        let mut talk = None;
        for round in 0..=rounds {
            let missing = wanted - groups.len();
            let first = (step - 1) * wanted as u64;
            let positions = first..first + missing as u64;
            // Round 0 is the step's own batch, later ones replace groups.
            let problems: Vec<Problem> =
                positions.map(|i| self.problems.problem_of_round(round, i)).collect();
            let (sampled, of_round) = self.sample(with, step, round, &problems, observer)?;
            talk = of_round;
            let last = round == rounds;
            let mut equal = Vec::new();
            for (group, mut rows) in sampled {
                let drop = rounds > 0 && all_equal(&group);
                let verdicts = rows.iter_mut().filter_map(|s| s.verdict.as_mut());
                verdicts.for_each(|verdict| verdict.dropped = drop && !last);
                samples.append(&mut rows);
                if drop { equal.push(group) } else { groups.push(group) }
            }
            if last {
                groups.append(&mut equal);
            }
            if groups.len() == wanted {
                break;
            }
            observer.note(&format!(
                "step {step}: {} groups without signal are replaced",
                wanted - groups.len()
            ));
        }
        let sampled_tokens = samples.iter().map(|s| s.tokens).sum();
        Ok(Batch { groups, samples, sampled_tokens, talk })
    }

    /// Mean of each part of the reward, where there are several.
    pub fn mean_parts(&self, samples: &[Sample]) -> serde_json::Map<String, Value> {
        let mean = |name: &str| {
            let values =
                samples.iter().filter_map(|s| s.verdict.as_ref()?.parts.get(name)?.as_f64());
            values.sum::<f64>() / samples.len() as f64
        };
        let By::Judges(judges) = &self.by else { return serde_json::Map::new() };
        let names: Vec<&str> = judges.judge().names().collect();
        let several = if names.len() > 1 { names } else { Vec::new() };
        several.into_iter().map(|name| (name.to_owned(), mean(name).into())).collect()
    }

    /// Samples a group for each problem from the final policy, and rewards it while others are sampled; of dialogues also
    /// what they were like.
    fn sample(
        &mut self,
        with: With<'_, '_>,
        step: u64,
        round: u64,
        problems: &[Problem],
        observer: &mut dyn Observer,
    ) -> Result<(Groups, Option<TalkRecord>)> {
        let c = with.settings;
        let stream = (step - 1) * c.prompts_per_step as u64 + round * ROUND_STREAM;
        let judges = match &mut self.by {
            By::Judges(judges) => judges,
            By::Environment(dialogues) => {
                let at = (step, stream);
                let talks = dialogues.sample(&mut self.rollouts, with, at, problems, observer)?;
                return Ok((talks.groups, Some(talks.record)));
            }
        };
        let mut requests = Vec::with_capacity(problems.len());
        for (seed_stream, problem) in (stream..).zip(problems) {
            requests.push(Request {
                prompt_tokens: with.encoder.prompt(&problem.prompt, c.max_prompt)?,
                n: c.group,
                seed_stream,
                max_tokens: c.max_response,
            });
        }
        let mut sampler = Sampler {
            rollouts: &mut self.rollouts,
            encoder: with.encoder,
            sampling: c.sampling,
            seed: c.seed,
            stop: with.stop,
        };
        let mut progress = |progress| observer.rollout("rollout", progress);
        let judged = judges.sample(&mut sampler, problems, &requests, &mut progress)?;
        let names: Vec<&str> = judges.judge().names().collect();
        let groups = problems.iter().zip(requests).zip(judged);
        let groups = groups
            .map(|((problem, request), judged)| {
                let asked = with.encoder.asked(&problem.prompt);
                let samples =
                    judged.iter().map(|j| sample(step, problem, &asked, j, &names)).collect();
                let responses = judged.into_iter().map(response).collect();
                (ResponseGroup { prompt: request.prompt_tokens, responses }, samples)
            })
            .collect();
        Ok((groups, None))
    }
}

fn all_equal(group: &ResponseGroup) -> bool {
    let all: Vec<f32> = group.responses.iter().flat_map(returns).collect();
    all.windows(2).all(|pair| pair[0] == pair[1])
}

fn sample(step: u64, problem: &Problem, asked: &str, judged: &Answer, names: &[&str]) -> Sample {
    let several = if names.len() > 1 { names } else { &[] };
    let parts = several.iter().zip(&judged.judgement.parts);
    Sample {
        step,
        problem: problem.id.clone(),
        prompt: asked.into(),
        verdict: Some(Verdict {
            answer: problem.answer.clone(),
            reward: judged.judgement.reward,
            reason: judged.judgement.reason.clone(),
            parts: parts.map(|(name, &value)| (name.to_string(), value.into())).collect(),
            dropped: false,
        }),
        tokens: judged.completion.tokens.len(),
        truncated: judged.truncated(),
        completion: judged.text.clone(),
        dialogue: None,
    }
}

fn response(judged: Answer) -> Response {
    Response {
        tokens: judged.completion.tokens,
        rollout: judged.completion.logprobs,
        experts: judged.completion.experts,
        reward: judged.judgement.reward,
        ..Response::default()
    }
}
