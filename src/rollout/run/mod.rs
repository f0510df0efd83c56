//! One call that samples: slots filled, decoded, refilled; turns that end and go on.

mod taking;
mod turns;

use std::sync::Arc;
use std::time::Instant;

use rand::Rng;
use rand_chacha::ChaCha8Rng;
use rayon::prelude::*;

use super::dialogue::{Partner, Segment, Which};
use super::request::{Completion, Finish, Request, rng};
use super::sampler::{Sampler, Sampling};
use super::sizes::PREFILL_TOKENS;
use super::timing::{Clock, Timing};
use super::watch::{Progress, Watcher};
use crate::Result;
use crate::llama::{Context, Token, TokenBatch};
use crate::team::Queue;

/// Logits at which sampling is worth several threads.
const PARALLEL_LOGITS: usize = 1 << 16;
/// A request in work: the logits after its prompt start every completion.
struct Group {
    request: usize,
    next: usize,
    prompt: Arc<[i32]>,
    first_logits: Arc<[f32]>,
    // Of the prompt's tokens.
    experts: Arc<[i16]>,
}

/// A sequence in work.
struct Slot {
    group: usize,
    index: usize,
    rng: ChaCha8Rng,
    /// Of the segment under way.
    prompt: Arc<[i32]>,
    completion: Completion,
    own: Vec<bool>,
    /// Tokens of the turn under way.
    turn: usize,
    /// Segments that have ended.
    segments: Vec<Segment>,
    /// Tokens of the group's prompt that the sequence still begins with.
    kept: usize,
    /// The round in which its partner's answer is due, where it waits for one.
    due: Option<u64>,
    /// Tokens before the newest one that are to be decoded first, one a round: of an answer that is read along with what the
    /// other sequences sample.
    unread: usize,
}

impl Slot {
    /// The first token that was not decoded yet, and its position.
    fn next(&self) -> (i32, usize) {
        let own = self.completion.tokens.iter().rev().nth(self.unread);
        let id = own.or(self.prompt.last());
        (*id.expect("not empty"), self.len() - 1 - self.unread)
    }

    /// Tokens of the segment, its prompt's among them.
    fn len(&self) -> usize {
        self.prompt.len() + self.completion.tokens.len()
    }

    fn push(&mut self, token: i32, logprob: f32, own: bool) {
        self.completion.tokens.push(token);
        self.completion.logprobs.push(logprob);
        self.own.push(own);
    }

    /// Ends the segment.
    fn end_segment(&mut self) {
        let completion = std::mem::replace(&mut self.completion, nothing(Vec::new()));
        let (prompt, own) = (self.prompt.to_vec(), std::mem::take(&mut self.own));
        self.segments.push(Segment { prompt, completion, own });
    }
}

/// A completion that has not begun.
fn nothing(experts: Vec<i16>) -> Completion {
    Completion { tokens: vec![], logprobs: vec![], finish: Finish::Length, experts }
}

/// One call of [`super::Rollouts::generate`] or [`super::Rollouts::converse`].
pub(super) struct Run<'r, 'p> {
    context: &'r mut Context,
    workers: &'r rayon::ThreadPool,
    requests: &'r [Request],
    sampling: &'r Sampling,
    seed: u64,
    partner: Option<&'r mut (dyn Partner + 'p)>,
    /// What is not begun.
    queue: &'r mut Queue,
    /// A request that was taken and waits for a slot.
    ahead: Option<usize>,
    /// All requests that were taken.
    taken: Vec<usize>,
    /// Sequences beyond which no request is taken from others.
    pub enough: usize,
    /// Nothing may depend on who is decoded together.
    pub invariant: bool,
    groups: Vec<Group>,
    slots: Vec<Option<Slot>>,
    /// Of every completion its segments; none before it has ended.
    done: Vec<Vec<Vec<Segment>>>,
    samplers: Vec<Sampler>,
    /// The sequence in which prompts are decoded, if there is one for them.
    prompt_slot: Option<usize>,
    /// A slot whose completion ended needs a copy of the prompt's sequence for the next.
    has_states: bool,
    /// Tokens are drawn in the decoding graph.
    draws: bool,
    /// Rounds of tokens so far; where all wait for their partner, time passes without any.
    round: u64,
    /// (request, index) of completions that the watcher has not seen.
    finished: Vec<(usize, usize)>,
    progress: Progress,
    clock: Clock,
}

impl<'r, 'p> Run<'r, 'p> {
    /// Of these requests, in no slots yet.
    pub fn new(
        context: &'r mut Context,
        workers: &'r rayon::ThreadPool,
        queue: &'r mut Queue,
        requests: &'r [Request],
        sampling: &'r Sampling,
        seed: u64,
        partner: Option<&'r mut (dyn Partner + 'p)>,
    ) -> Run<'r, 'p> {
        let total = match queue.is_shared() {
            false => requests.iter().map(|r| r.n).sum(),
            true => 0,
        };
        Run {
            context,
            workers,
            requests,
            sampling,
            seed,
            partner,
            queue,
            ahead: None,
            taken: Vec::new(),
            enough: usize::MAX,
            invariant: false,
            groups: Vec::new(),
            slots: Vec::new(),
            done: requests.iter().map(|r| vec![Vec::new(); r.n]).collect(),
            samplers: vec![Sampler::default()],
            prompt_slot: None,
            has_states: false,
            draws: false,
            round: 0,
            finished: Vec::new(),
            progress: Progress { total, ..Progress::default() },
            clock: Clock::default(),
        }
    }

    /// In which sequences it samples, and how.
    pub fn lies_in(
        &mut self,
        n_slots: usize,
        prompt_slot: Option<usize>,
        has_states: bool,
        draws: bool,
    ) {
        self.slots.resize_with(n_slots, || None);
        (self.prompt_slot, self.has_states, self.draws) = (prompt_slot, has_states, draws);
    }

    /// How far it is.
    pub fn progress(&self) -> Progress {
        self.progress
    }

    /// Where its time went so far.
    pub fn timing(&self) -> Timing {
        self.clock.timing()
    }

    /// The requests that were taken, and the segments of every completion of them.
    pub fn into_segments(self) -> Vec<(usize, Vec<Vec<Segment>>)> {
        let Run { mut done, taken, .. } = self;
        taken.into_iter().map(|r| (r, std::mem::take(&mut done[r]))).collect()
    }

    /// One token of every sequence that does not wait.
    pub fn round(&mut self, watcher: &mut dyn Watcher) -> Result<()> {
        let start = Instant::now();
        self.fill()?;
        let in_work = self.slots.iter().flatten().count();
        if self.progress.tokens > 0 {
            watcher.progress(self.progress)?;
        }
        self.hear()?;
        self.compact()?;
        self.decode()?;
        self.clock.round(in_work, start.elapsed().as_secs_f64());
        self.round += 1;
        self.report(watcher)
    }

    /// Gives free slots to pending requests: prompts decoded together, copied to the other slots of
    /// their groups, first tokens sampled.
    fn fill(&mut self) -> Result<()> {
        loop {
            self.continue_group()?;
            let free: Vec<usize> =
                (0..self.slots.len()).filter(|&s| self.slots[s].is_none()).collect();
            let mut claimed: Vec<(usize, usize)> = Vec::new(); // (request, slots)
            let (mut left, mut tokens) = (free.len(), 0);
            while left > 0 {
                let Some(request) = self.peek(free.len() - left)? else { break };
                let r = &self.requests[request];
                let n = r.n.min(left);
                tokens += r.prompt_tokens.len();
                let alone = self.prompt_slot.is_some() || self.invariant || tokens > PREFILL_TOKENS;
                if !claimed.is_empty() && alone {
                    break;
                }
                left -= n;
                claimed.push((request, n));
                self.ahead = None;
            }
            if claimed.is_empty() {
                return Ok(());
            }
            self.start(&claimed, &free)?;
        }
    }

    /// Where slots have states: gives free ones to completions of the last group, whose prompt is kept.
    fn continue_group(&mut self) -> Result<()> {
        let (true, Some(prompt)) = (self.has_states, self.prompt_slot) else { return Ok(()) };
        for slot in 0..self.slots.len() {
            let Some(group) = self.groups.last() else { return Ok(()) };
            if group.next == self.requests[group.request].n {
                return Ok(());
            }
            if self.slots[slot].is_none() {
                self.context.forget(slot, 0)?;
                self.context.copy(prompt, slot);
                self.begin(slot, self.groups.len() - 1)?;
            }
        }
        Ok(())
    }

    /// Decodes the prompts of claimed requests into the first free slots, and starts their completions.
    fn start(&mut self, claimed: &[(usize, usize)], free: &[usize]) -> Result<()> {
        let mut batch = TokenBatch::default();
        let mut last = Vec::with_capacity(claimed.len());
        for (&(request, _), &slot) in claimed.iter().zip(free) {
            let slot = self.prompt_slot.unwrap_or(slot);
            self.context.forget(slot, 0)?;
            let prompt = &self.requests[request].prompt_tokens;
            for (i, &id) in prompt.iter().enumerate() {
                let logits = i + 1 == prompt.len();
                batch.0.push(Token { id, position: i as i32, sequence: slot as i32, logits });
            }
            last.push(batch.0.len() - 1);
        }
        let start = Instant::now();
        self.context.decode(&batch)?;
        self.clock.parts.prompt_seconds += start.elapsed().as_secs_f64();
        let mut followers = free[claimed.len()..].iter();
        for ((&(request, n), &slot), &index) in claimed.iter().zip(free).zip(&last) {
            let first_logits = self.context.logits(index).into();
            let from = self.prompt_slot.unwrap_or(slot);
            let prompt = 0..self.requests[request].prompt_tokens.len();
            let experts = prompt.filter_map(|i| self.context.experts(from, i)).flatten().copied();
            let experts = experts.collect();
            let prompt = self.requests[request].prompt_tokens.as_slice().into();
            self.groups.push(Group { request, next: 0, prompt, first_logits, experts });
            let group = self.groups.len() - 1;
            if from != slot {
                self.context.forget(slot, 0)?;
                self.context.copy(from, slot);
            }
            self.begin(slot, group)?;
            for _ in 1..n {
                let &to = followers.next().expect("as many free slots as were claimed");
                self.context.forget(to, 0)?;
                self.context.copy(from, to);
                self.begin(to, group)?;
            }
        }
        Ok(())
    }

    /// Starts the next completion of a group in a slot that holds its prompt; goes on to the one after
    /// while completions end with their first token.
    fn begin(&mut self, slot: usize, group: usize) -> Result<()> {
        loop {
            let g = &mut self.groups[group];
            let request = &self.requests[g.request];
            if g.next == request.n {
                self.slots[slot] = None;
                return Ok(());
            }
            let index = g.next;
            g.next += 1;
            let mut started = Slot {
                group,
                index,
                rng: rng(self.seed, request.seed_stream, index),
                prompt: g.prompt.clone(),
                completion: nothing(g.experts.to_vec()),
                own: Vec::new(),
                turn: 0,
                segments: Vec::new(),
                kept: g.prompt.len(),
                due: None,
                unread: 0,
            };
            let logits = g.first_logits.clone();
            if let Some(partner) = &mut self.partner {
                partner.began(Which { request: g.request, index });
            }
            let uniform = started.rng.random();
            let sampled = self.samplers[0].sample(&logits, self.sampling, uniform);
            self.slots[slot] = match self.push(&mut started, sampled) {
                true => self.ended(started)?,
                false => Some(started),
            };
            if self.slots[slot].is_some() {
                return Ok(());
            }
        }
    }

    /// Adds a token; whether the turn has ended.
    fn push(&mut self, slot: &mut Slot, (token, logprob): (i32, f32)) -> bool {
        slot.push(token, logprob, true);
        slot.turn += 1;
        self.progress.tokens += 1;
        self.progress.newest = Some(token);
        if self.context.is_eog(token) {
            slot.completion.finish = Finish::Eog;
            return true;
        }
        let which = self.which(slot);
        let most = self.partner.as_ref().map_or(usize::MAX, |partner| partner.max_turn(which));
        slot.turn == most || slot.len() == self.most_tokens(slot)
    }

    /// Tokens that a sequence may hold.
    fn most_tokens(&self, slot: &Slot) -> usize {
        let request = &self.requests[self.groups[slot.group].request];
        request.prompt_tokens.len() + request.max_tokens
    }

    fn which(&self, slot: &Slot) -> Which {
        Which { request: self.groups[slot.group].request, index: slot.index }
    }

    fn finish(&mut self, mut slot: Slot) {
        slot.end_segment();
        let Which { request, index } = self.which(&slot);
        self.done[request][index] = slot.segments;
        self.finished.push((request, index));
        self.progress.done += 1;
    }

    /// Hands what has ended to the watcher and the partner.
    fn report(&mut self, watcher: &mut dyn Watcher) -> Result<()> {
        for (request, index) in self.finished.drain(..) {
            let segments = &self.done[request][index];
            if let Some(segment) = segments.last() {
                watcher.finished(request, index, &segment.completion)?;
            }
            if let Some(partner) = &mut self.partner {
                partner.finished(Which { request, index }, segments)?;
            }
        }
        Ok(())
    }

    /// Closes holes between running slots, so that llama.cpp takes them in one go.
    fn compact(&mut self) -> Result<()> {
        loop {
            let Some(hole) = self.slots.iter().position(Option::is_none) else { return Ok(()) };
            let Some(last) = self.slots.iter().rposition(Option::is_some) else { return Ok(()) };
            if last < hole {
                return Ok(());
            }
            self.context.forget(hole, 0)?;
            self.context.copy(last, hole);
            self.context.forget(last, 0)?;
            self.slots.swap(hole, last);
        }
    }

    /// One token of every running sequence: the next one of an answer that it reads, else one that is sampled.
    fn decode(&mut self) -> Result<()> {
        let runs = |slot: &Option<Slot>| slot.as_ref().is_some_and(|slot| slot.due.is_none());
        let running: Vec<usize> = (0..self.slots.len()).filter(|&s| runs(&self.slots[s])).collect();
        if running.is_empty() {
            return Ok(());
        }
        let idle = self.bridges(&running);
        let mut both = [running.as_slice(), &idle].concat();
        both.sort_unstable();
        if self.wants_company() {
            both.extend(self.company(&both));
            both.sort_unstable();
            both.dedup();
        }
        let mut batch = TokenBatch::default();
        for &s in &both {
            let (id, position) = match &self.slots[s] {
                Some(slot) => slot.next(),
                None => {
                    self.context.forget(s, 0)?;
                    (self.slots[running[0]].as_ref().expect("running").next().0, 0)
                }
            };
            let samples =
                self.slots[s].as_ref().is_some_and(|slot| slot.due.is_none() && slot.unread == 0);
            // A row of logits alone is one column, too.
            let logits = samples || self.wants_company();
            batch.0.push(Token { id, position: position as i32, sequence: s as i32, logits });
        }
        let (mut sampling, mut slots, mut places) = (vec![], vec![], vec![]);
        for &s in &running {
            if self.slots[s].as_ref().expect("running").unread == 0 {
                sampling.push(s);
                slots.push(self.slots[s].take().expect("running"));
                places.push(both.binary_search(&s).expect("decoded"));
            }
        }
        if self.draws {
            for (&s, slot) in sampling.iter().zip(&mut slots) {
                self.context.set_draw(s, slot.rng.random(), self.sampling.temperature);
            }
        }
        let start = Instant::now();
        self.context.decode(&batch)?;
        self.clock.parts.decode_seconds += start.elapsed().as_secs_f64();
        let start = Instant::now();
        let sampled = match self.draws {
            true => places.iter().map(|&i| self.context.drawn(i)).collect(),
            false => self.sample(&mut slots, &places),
        };
        self.clock.parts.sampling_seconds += start.elapsed().as_secs_f64();
        for (&s, token) in both.iter().zip(&batch.0) {
            let experts = self.context.experts(s, token.position as usize).unwrap_or_default();
            let Some(slot) = &mut self.slots[s] else { continue };
            if slot.due.is_some() {
                self.context.forget(s, slot.next().1)?;
            } else {
                slot.completion.experts.extend_from_slice(experts);
                slot.unread -= 1;
            }
        }
        for ((&s, slot), &place) in sampling.iter().zip(&mut slots).zip(&places) {
            let experts = self.context.experts(s, batch.0[place].position as usize);
            slot.completion.experts.extend_from_slice(experts.unwrap_or_default());
        }
        for ((&s, mut slot), sampled) in sampling.iter().zip(slots).zip(sampled) {
            if !self.push(&mut slot, sampled) {
                self.slots[s] = Some(slot);
                continue;
            }
            let group = slot.group;
            let kept = slot.kept;
            match self.ended(slot)? {
                Some(waiting) => self.slots[s] = Some(waiting),
                // The prompt is still there: the group's next completion starts from it.
                None => self.again(s, group, kept)?,
            }
        }
        Ok(())
    }

    /// A token for each slot from the logits at its place in the last batch.
    fn sample(&mut self, slots: &mut [Slot], places: &[usize]) -> Vec<(i32, f32)> {
        if slots.is_empty() {
            return Vec::new();
        }
        let logits: Vec<&[f32]> = places.iter().map(|&i| self.context.logits(i)).collect();
        let sampling = self.sampling;
        let parts = self.context.spare_threads();
        if parts == 1 || slots.len() * logits[0].len() < PARALLEL_LOGITS {
            let sampler = &mut self.samplers[0];
            let jobs = slots.iter_mut().zip(&logits);
            return jobs.map(|(s, l)| sampler.sample(l, sampling, s.rng.random())).collect();
        }
        self.samplers.resize_with(parts, Sampler::default);
        let per_part = slots.len().div_ceil(parts);
        let samplers = &mut self.samplers;
        self.workers.install(|| {
            slots
                .par_chunks_mut(per_part)
                .zip(logits.par_chunks(per_part))
                .zip(samplers)
                .flat_map_iter(|((slots, logits), sampler)| {
                    let jobs = slots.iter_mut().zip(logits);
                    let sample =
                        |(s, l): (&mut Slot, &&[f32])| sampler.sample(l, sampling, s.rng.random());
                    jobs.map(sample).collect::<Vec<_>>()
                })
                .collect()
        })
    }
}
