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
//! are chosen by the weight's type alone, each prompt and each answer of a dialogue's partner is decoded by itself, and a
//! token that would be decoded alone gets company, for ggml has another kernel for one column.
//!
//! In a [`Team`] a rank samples the requests that it takes, one after another as slots become free.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use super::dialogue::{Partner, Segment};
use super::request::{Completion, Request};
use super::run::Run;
use super::sampler::Sampling;
use super::sizes::{MAX_PARALLEL, RolloutOptions, RolloutSizes};
use super::timing::Timing;
use super::watch::{Progress, ProgressOnly, Watcher};
use crate::ggml::ThreadPool;
use crate::llama::{self, Context, ContextOptions, LiveAdapter, Products};
use crate::team::Team;
use crate::{Error, Result};

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
    // Nothing may depend on who is decoded together.
    invariant: bool,
    team: Team,
    // Of the calls since it was last taken.
    timing: Timing,
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
        let spare = draws || has_states;
        let n_slots = if spare { n_seq.min(MAX_PARALLEL - 1) } else { n_seq };
        let sizes = ContextOptions {
            n_ctx_seq,
            n_seq: n_slots + spare as usize,
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
            invariant: false,
            team: Team::alone(),
            timing: Timing::default(),
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
        self.invariant = true;
        if self.sizes.products != Products::Exact {
            self.set_products(Products::Invariant);
        }
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

    /// Where the time of all calls went since this was last asked.
    pub fn take_timing(&mut self) -> Timing {
        std::mem::take(&mut self.timing)
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
        let done = self.run(requests, sampling, seed, stop, None, watcher)?;
        let completion = |mut segments: Vec<Segment>| segments.pop().map(|s| s.completion);
        let group = |g: Vec<Vec<Segment>>| g.into_iter().filter_map(completion).collect();
        Ok(done.into_iter().map(|(request, g)| (request, group(g))).collect())
    }

    /// Dialogues from requests with a partner: of each its segments. A request's `max_tokens` are those that may follow
    /// its prompt in all, the partner's among them. Of a team it gives the requests that this rank took, and is no call
    /// that all ranks end together: a [`Team::join`] has to follow.
    ///
    /// # Errors
    /// Those of [`Rollouts::generate`] and of the partner.
    pub fn converse(
        &mut self,
        requests: &[Request],
        sampling: &Sampling,
        seed: u64,
        stop: &AtomicBool,
        partner: &mut dyn Partner,
        watch: &mut dyn FnMut(Progress) -> Result<()>,
    ) -> Result<Vec<(usize, Vec<Vec<Segment>>)>> {
        let watcher = &mut ProgressOnly(watch);
        self.run(requests, sampling, seed, stop, Some(partner), watcher)
    }

    /// The requests that this process took, and of every completion of them its segments.
    fn run(
        &mut self,
        requests: &[Request],
        sampling: &Sampling,
        seed: u64,
        stop: &AtomicBool,
        partner: Option<&mut dyn Partner>,
        watcher: &mut dyn Watcher,
    ) -> Result<Vec<(usize, Vec<Vec<Segment>>)>> {
        let mut queue = self.team.queue(requests.len());
        self.check(requests)?;
        let n_slots = self.n_slots;
        self.context()?;
        let (context, workers) = (self.context.as_mut().expect("just made"), &self.workers);
        context.clear();
        // A truncated or greedy choice is made from the logits.
        let draws = self.draws && sampling.temperature > 0.0 && !sampling.truncates();
        context.draw(if draws { n_slots } else { 0 })?;
        let prompt_slot = (self.draws || self.has_states).then_some(n_slots);
        let mut run = Run::new(context, workers, &mut queue, requests, sampling, seed, partner);
        run.lies_in(n_slots, prompt_slot, self.has_states, draws);
        run.enough = if self.model.device().is_host() { ENOUGH } else { n_slots };
        run.invariant = self.invariant;
        while run.is_open() {
            if stop.load(Ordering::Relaxed) {
                return Err(Error::Interrupted);
            }
            run.round(watcher)?;
        }
        watcher.progress(run.progress())?;
        self.timing.add(run.timing());
        Ok(run.into_segments())
    }

    /// Refuses prompts that leave no room.
    fn check(&self, requests: &[Request]) -> Result<()> {
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
        Ok(())
    }
}
