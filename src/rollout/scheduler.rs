//! Continuous batching: as many sequences at once as the KV budget allows, refilled as they end.
//!
//! A group's prompt is decoded once, into one slot; the KV cache of the others is a copy. A slot whose
//! completion ended goes on with the next completion of its own group (the prompt is still there), or
//! takes part in the next group. llama.cpp decodes sequences of neighbouring slots together, so at the
//! tail, when nothing is pending, the last slot's sequence moves into the hole.
//!
//! Some runs decode prompts in one more sequence, one at a time, and copy it to where it is needed. On a GPU tokens are
//! drawn in the decoding graph ([`Context::draw`]), so that `[sequences, V]` logits stay there; a prompt's own logits are
//! wanted on the host all the same, for every completion of its group begins with them, so nothing is drawn in that
//! sequence. And a recurrent layer's state cannot forget a completion's tokens: there a group's next completion begins with
//! a copy of the prompt's state, and no other group begins before the last completion of this one has.
//!
//! Nothing here depends on time: the same requests and seed give the same completions, for any number of threads. With
//! another number of sequences at once last bits of logits differ, for who is decoded together decides which kernel
//! computes a product ([`Products`]), and with them now and then a token. [`Rollouts::make_invariant`] ends that: kernels
//! are chosen by the weight's type alone, each prompt is decoded by itself, and a token that would be decoded alone gets
//! company, for ggml has another kernel for one column.
//!
//! In a [`Team`] a rank samples the requests that it takes, one after another as slots become free.

mod taking;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use rand::Rng;
use rand_chacha::ChaCha8Rng;
use rayon::prelude::*;

use super::request::{Completion, Finish, Request, rng};
use super::sampler::{Sampler, Sampling};
use super::sizes::{MAX_PARALLEL, PREFILL_TOKENS, RolloutOptions, RolloutSizes};
use super::watch::{Progress, ProgressOnly, Watcher};
use crate::ggml::ThreadPool;
use crate::llama::{self, Context, ContextOptions, LiveAdapter, Products, Token, TokenBatch};
use crate::team::{Queue, Team};
use crate::{Error, Result};

/// Logits at which sampling is worth several threads.
const PARALLEL_LOGITS: usize = 1 << 16;
/// Sequences from which on a decode on the CPU does not get faster by more of them: a rank that has so many takes no
/// further request.
const ENOUGH: usize = 32;

/// Samples completions with llama.cpp.
pub struct Rollouts {
    model: Arc<llama::Model>,
    pool: Arc<ThreadPool>,
    sizes: ContextOptions,
    // None after `release`, until it is needed again.
    context: Option<Context>,
    adapter: Option<Arc<LiveAdapter>>,
    n_ctx_seq: usize,
    // Draws tokens, on as many threads as decode.
    workers: rayon::ThreadPool,
    // Sequences that are sampled; where prompts have one of their own, it is the one after them.
    n_slots: usize,
    // Tokens are drawn on the device, where that is possible.
    draws: bool,
    // Sequences have states, which cannot forget a completion's tokens.
    has_states: bool,
    team: Team,
}

/// A request in work: the logits after its prompt start every completion.
struct Group {
    request: usize,
    next: usize,
    first_logits: Arc<[f32]>,
    // Of the prompt's tokens.
    experts: Arc<[i16]>,
}

/// A sequence in work.
struct Slot {
    group: usize,
    index: usize,
    rng: ChaCha8Rng,
    completion: Completion,
}

impl Rollouts {
    /// An engine with as many sequences as the memory for keys and values allows.
    ///
    /// # Errors
    /// [`Error::Invalid`] when not even one sequence fits.
    pub fn new(
        model: &Arc<llama::Model>,
        pool: &Arc<ThreadPool>,
        options: RolloutOptions,
    ) -> Result<Rollouts> {
        let RolloutSizes { n_seq, n_ctx_seq, n_batch, .. } = options.sizes(model)?;
        let (draws, has_states) = (!model.device().is_host(), model.state_bytes()? > 0);
        let apart = draws || has_states;
        let n_slots = if apart { n_seq.min(MAX_PARALLEL - 1) } else { n_seq };
        let sizes = ContextOptions {
            n_ctx_seq,
            n_seq: n_slots + apart as usize,
            n_batch,
            kv_f32: false,
            products: Products::default(),
            experts: false,
        };
        Ok(Rollouts {
            model: model.clone(),
            pool: pool.clone(),
            sizes,
            context: Some(Context::new(model, pool, sizes)?),
            adapter: None,
            n_ctx_seq: options.n_ctx_seq,
            workers: rayon::ThreadPoolBuilder::new()
                .num_threads(pool.n_threads())
                .build()
                .map_err(|e| Error::engine("starting threads", e.to_string(), "use fewer"))?,
            n_slots,
            draws,
            has_states,
            team: Team::alone(),
        })
    }

    /// Shares the requests of every call among the ranks of a team, from now on: all of them make the same calls.
    pub fn share(&mut self, team: &Team) {
        self.team = team.clone();
    }

    /// Who samples.
    pub fn team(&self) -> &Team {
        &self.team
    }

    /// Samples completions that do not depend on who is decoded beside them, on the CPU, from now on.
    pub fn make_invariant(&mut self) {
        self.set_products(Products::Invariant);
    }

    /// Draws tokens in the decoding graph also where logits lie in host memory, where nothing is gained: for tests.
    pub fn draw_in_graph(&mut self) {
        self.draws = true;
        self.sizes.n_seq = self.n_slots + 1;
        self.context = None;
    }

    /// Keeps keys and values in F32, twice the memory: for tests, where rounding to F16 makes much of last bits.
    pub fn keep_f32(&mut self) {
        self.sizes.kv_f32 = true;
        self.context = None;
    }

    /// Decodes with these products from now on; at first with whichever are faster.
    pub fn set_products(&mut self, products: Products) {
        self.sizes.products = products;
        self.context = None;
    }

    /// Keeps the experts that tokens take, of a mixture, from now on.
    pub fn keep_experts(&mut self) {
        self.sizes.experts = true;
        self.context = None;
    }

    /// Decodes with this adapter from now on, or with the base alone.
    pub fn set_adapter(&mut self, adapter: Option<Arc<LiveAdapter>>) -> Result<()> {
        self.adapter = adapter.clone();
        self.context.as_mut().map_or(Ok(()), |context| context.set_adapter(adapter))
    }

    /// Sequences decoded at once.
    pub fn n_seq(&self) -> usize {
        self.n_slots
    }

    /// Gives the memory of keys, values and decoding back, for training to use; the next call takes it anew.
    pub fn release(&mut self) {
        self.context = None;
    }

    fn context(&mut self) -> Result<()> {
        if self.context.is_none() {
            let mut context = Context::new(&self.model, &self.pool, self.sizes)?;
            context.set_adapter(self.adapter.clone())?;
            self.context = Some(context);
        }
        Ok(())
    }

    /// Completions of all requests, in their order.
    ///
    /// # Errors
    /// [`Error::Invalid`] for a prompt that is empty or leaves no room, [`Error::Interrupted`] when
    /// `stop` becomes true, [`Error::Engine`] when llama.cpp fails.
    pub fn generate(
        &mut self,
        requests: &[Request],
        sampling: &Sampling,
        seed: u64,
        progress: &mut dyn FnMut(Progress),
        stop: &AtomicBool,
    ) -> Result<Vec<Vec<Completion>>> {
        self.generate_with(requests, sampling, seed, stop, &mut |event| {
            progress(event);
            Ok(())
        })
    }

    /// [`Rollouts::generate`] with a watcher that may end it with an error.
    pub fn generate_with(
        &mut self,
        requests: &[Request],
        sampling: &Sampling,
        seed: u64,
        stop: &AtomicBool,
        watch: &mut dyn FnMut(Progress) -> Result<()>,
    ) -> Result<Vec<Vec<Completion>>> {
        let own = self.generate_watched(requests, sampling, seed, stop, &mut ProgressOnly(watch));
        self.team.join(requests.len(), own)
    }

    /// [`Rollouts::generate`] with a watcher that is also handed every completion as it ends, so that
    /// it is judged while others are sampled. Of a team it gives the requests that this rank took, and is no call that
    /// all ranks end together: a [`Team::join`] has to follow.
    pub fn generate_watched(
        &mut self,
        requests: &[Request],
        sampling: &Sampling,
        seed: u64,
        stop: &AtomicBool,
        watcher: &mut dyn Watcher,
    ) -> Result<Vec<(usize, Vec<Completion>)>> {
        let mut queue = self.team.queue(requests.len());
        for (i, r) in requests.iter().enumerate() {
            let room = self.n_ctx_seq.saturating_sub(r.prompt_tokens.len());
            if r.prompt_tokens.is_empty() || r.max_tokens == 0 || r.max_tokens > room {
                return Err(Error::invalid(
                    format!("prompt {}", i + 1),
                    format!("1 token or more, and {} in all with the completion", self.n_ctx_seq),
                    format!("{} and up to {} sampled", r.prompt_tokens.len(), r.max_tokens),
                    "lower --max-prompt or --max-response",
                ));
            }
        }
        let n_slots = self.n_slots;
        self.context()?;
        let (context, workers) = (self.context.as_mut().expect("just made"), &self.workers);
        context.clear();
        // A truncated or greedy choice is made from the logits.
        let draws = self.draws && sampling.temperature > 0.0 && !sampling.truncates();
        context.draw(if draws { n_slots } else { 0 })?;
        let invariant = self.sizes.products == Products::Invariant;
        let total = match queue.is_shared() {
            false => requests.iter().map(|r| r.n).sum(),
            true => 0,
        };
        let mut run = Run {
            context,
            workers,
            requests,
            sampling,
            seed,
            enough: if self.model.device().is_host() { ENOUGH } else { n_slots },
            queue: &mut queue,
            ahead: None,
            taken: Vec::new(),
            invariant,
            groups: Vec::new(),
            slots: Vec::new(),
            done: requests.iter().map(|r| vec![None; r.n]).collect(),
            samplers: Vec::new(),
            prompt_slot: (self.draws || self.has_states).then_some(n_slots),
            has_states: self.has_states,
            draws,
            finished: Vec::new(),
            progress: Progress { total, ..Progress::default() },
        };
        run.slots.resize_with(n_slots, || None);
        while run.is_open() {
            if stop.load(Ordering::Relaxed) {
                return Err(Error::Interrupted);
            }
            run.fill()?;
            if run.progress.tokens > 0 {
                watcher.progress(run.progress)?;
            }
            run.compact()?;
            run.decode()?;
            run.report(watcher)?;
        }
        watcher.progress(run.progress)?;
        let Run { mut done, taken, .. } = run;
        let mut take = |r: usize| std::mem::take(&mut done[r]).into_iter().flatten().collect();
        Ok(taken.into_iter().map(|r| (r, take(r))).collect())
    }
}

/// One call of [`Rollouts::generate`].
struct Run<'r> {
    context: &'r mut Context,
    workers: &'r rayon::ThreadPool,
    requests: &'r [Request],
    sampling: &'r Sampling,
    seed: u64,
    /// What is not begun.
    queue: &'r mut Queue,
    /// A request that was taken and waits for a slot.
    ahead: Option<usize>,
    /// All requests that were taken.
    taken: Vec<usize>,
    /// Sequences beyond which no request is taken from others.
    enough: usize,
    /// Nothing may depend on who is decoded together.
    invariant: bool,
    groups: Vec<Group>,
    slots: Vec<Option<Slot>>,
    done: Vec<Vec<Option<Completion>>>,
    samplers: Vec<Sampler>,
    /// The sequence in which prompts are decoded, if there is one for them.
    prompt_slot: Option<usize>,
    /// A slot whose completion ended needs a copy of the prompt's sequence for the next.
    has_states: bool,
    /// Tokens are drawn in the decoding graph.
    draws: bool,
    /// (request, index) of completions that the watcher has not seen.
    finished: Vec<(usize, usize)>,
    progress: Progress,
}

impl Run<'_> {
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
                self.begin(slot, self.groups.len() - 1);
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
        self.context.decode(&batch)?;
        let mut followers = free[claimed.len()..].iter();
        for ((&(request, n), &slot), &index) in claimed.iter().zip(free).zip(&last) {
            let first_logits = self.context.logits(index).into();
            let from = self.prompt_slot.unwrap_or(slot);
            let prompt = 0..self.requests[request].prompt_tokens.len();
            let experts = prompt.filter_map(|i| self.context.experts(from, i)).flatten().copied();
            let experts = experts.collect();
            self.groups.push(Group { request, next: 0, first_logits, experts });
            let group = self.groups.len() - 1;
            if from != slot {
                self.context.forget(slot, 0)?;
                self.context.copy(from, slot);
            }
            self.begin(slot, group);
            for _ in 1..n {
                let &to = followers.next().expect("as many free slots as were claimed");
                self.context.forget(to, 0)?;
                self.context.copy(from, to);
                self.begin(to, group);
            }
        }
        Ok(())
    }

    /// Starts the next completion of a group in a slot that holds its prompt; goes on to the one after
    /// while completions end with their first token.
    fn begin(&mut self, slot: usize, group: usize) {
        loop {
            let g = &mut self.groups[group];
            let request = &self.requests[g.request];
            if g.next == request.n {
                self.slots[slot] = None;
                return;
            }
            let index = g.next;
            g.next += 1;
            let mut started = Slot {
                group,
                index,
                rng: rng(self.seed, request.seed_stream, index),
                completion: Completion {
                    tokens: vec![],
                    logprobs: vec![],
                    finish: Finish::Length,
                    experts: g.experts.to_vec(),
                },
            };
            let logits = g.first_logits.clone();
            let uniform = started.rng.random();
            if self.samplers.is_empty() {
                self.samplers.push(Sampler::default());
            }
            let sampled = self.samplers[0].sample(&logits, self.sampling, uniform);
            if !self.push(&mut started, sampled) {
                self.slots[slot] = Some(started);
                return;
            }
            self.finish(started);
        }
    }

    /// Adds a token; whether the completion has ended.
    fn push(&mut self, slot: &mut Slot, (token, logprob): (i32, f32)) -> bool {
        slot.completion.tokens.push(token);
        slot.completion.logprobs.push(logprob);
        self.progress.tokens += 1;
        self.progress.newest = Some(token);
        let request = &self.requests[self.groups[slot.group].request];
        if self.context.is_eog(token) {
            slot.completion.finish = Finish::Eog;
            return true;
        }
        slot.completion.tokens.len() == request.max_tokens
    }

    fn finish(&mut self, slot: Slot) {
        let request = self.groups[slot.group].request;
        self.done[request][slot.index] = Some(slot.completion);
        self.finished.push((request, slot.index));
        self.progress.done += 1;
    }

    /// Hands what has ended to the watcher.
    fn report(&mut self, watcher: &mut dyn Watcher) -> Result<()> {
        for (request, index) in self.finished.drain(..) {
            if let Some(completion) = &self.done[request][index] {
                watcher.finished(request, index, completion)?;
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

    /// One token of every running sequence.
    fn decode(&mut self) -> Result<()> {
        let running: Vec<usize> =
            (0..self.slots.len()).filter(|&s| self.slots[s].is_some()).collect();
        if running.is_empty() {
            return Ok(());
        }
        let mut batch = TokenBatch::default();
        for &s in &running {
            let slot = self.slots[s].as_ref().expect("running");
            let request = &self.requests[self.groups[slot.group].request];
            let n = slot.completion.tokens.len();
            batch.0.push(Token {
                id: slot.completion.tokens[n - 1],
                position: (request.prompt_tokens.len() + n - 1) as i32,
                sequence: s as i32,
                logits: true,
            });
        }
        let company = self.invariant && self.slots.len() > 1;
        if let (true, &[only]) = (company, running.as_slice()) {
            // ggml has another kernel for one column.
            let sequence = if only == 0 { 1 } else { 0 };
            self.context.forget(sequence, 0)?;
            let id = batch.0[0].id;
            batch.0.push(Token { id, position: 0, sequence: sequence as i32, logits: true });
        }
        let mut slots: Vec<Slot> =
            running.iter().map(|&s| self.slots[s].take().expect("running")).collect();
        let sampled = if self.draws {
            for (&s, slot) in running.iter().zip(&mut slots) {
                self.context.set_draw(s, slot.rng.random(), self.sampling.temperature);
            }
            self.context.decode(&batch)?;
            (0..slots.len()).map(|i| self.context.drawn(i)).collect()
        } else {
            self.context.decode(&batch)?;
            self.sample(&mut slots)
        };
        for ((&s, slot), token) in running.iter().zip(&mut slots).zip(&batch.0) {
            let experts = self.context.experts(s, token.position as usize);
            slot.completion.experts.extend_from_slice(experts.unwrap_or_default());
        }
        for ((&s, mut slot), sampled) in running.iter().zip(slots).zip(sampled) {
            if self.push(&mut slot, sampled) {
                let group = slot.group;
                let prompt = self.requests[self.groups[group].request].prompt_tokens.len();
                self.finish(slot);
                if self.has_states {
                    continue;
                }
                // The prompt is still there: the group's next completion starts from it.
                self.context.forget(s, prompt)?;
                self.begin(s, group);
            } else {
                self.slots[s] = Some(slot);
            }
        }
        Ok(())
    }

    /// A token for each slot from the logits of the last batch, in its order.
    fn sample(&mut self, slots: &mut [Slot]) -> Vec<(i32, f32)> {
        let logits: Vec<&[f32]> = (0..slots.len()).map(|i| self.context.logits(i)).collect();
        let sampling = self.sampling;
        if slots.len() * logits[0].len() < PARALLEL_LOGITS {
            let sampler = &mut self.samplers[0];
            let jobs = slots.iter_mut().zip(&logits);
            return jobs.map(|(s, l)| sampler.sample(l, sampling, s.rng.random())).collect();
        }
        let parts = self.workers.current_num_threads();
        self.samplers.resize_with(parts.max(1), Sampler::default);
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
