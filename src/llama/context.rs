//! Decoding: a KV cache with one stream per sequence.

use std::ptr::NonNull;
use std::sync::Arc;

use ggml_sys as sys;

use super::experts::{Recorder, callback};
use super::{LiveAdapter, Model, check, log};
use crate::ggml::ThreadPool;
use crate::{Error, Result};

/// Whose products with a model's weights decoding takes on the CPU. ggml's round activations to 8 bits where weights are
/// quantised; ours take them as they are, as training does, or in fixed point of 15 bits where the processor has
/// instructions for that (VNNI): nothing beside the rounding of keys and values.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Products {
    /// ggml's.
    Ggml,
    /// Ours where there are so many columns that they are faster ([`crate::ops::faster_from`]).
    #[default]
    Faster,
    /// Ours.
    Exact,
    /// Ours for types of which they are ever the faster ones, ggml's for the others, whatever the number of columns; with
    /// two columns or more a column's result does not depend on the others, nor on their number.
    Invariant,
}

impl Products {
    fn raw(self) -> sys::bupo_products {
        match self {
            Products::Ggml => sys::BUPO_PRODUCTS_GGML,
            Products::Faster => sys::BUPO_PRODUCTS_FASTER,
            Products::Exact => sys::BUPO_PRODUCTS_EXACT,
            Products::Invariant => sys::BUPO_PRODUCTS_INVARIANT,
        }
    }
}

/// Sizes of a context.
#[derive(Clone, Copy, Debug)]
pub struct ContextOptions {
    /// Tokens that one sequence may hold.
    pub n_ctx_seq: usize,
    /// Sequences.
    pub n_seq: usize,
    /// Tokens per call of [`Context::decode`].
    pub n_batch: usize,
    /// Keys and values in F32 instead of F16.
    pub kv_f32: bool,
    /// Products with weights on the CPU.
    pub products: Products,
    /// Whether the experts that tokens take are kept, of a mixture: see [`Context::experts`].
    pub experts: bool,
}

/// One token of a batch.
#[derive(Clone, Copy, Debug)]
pub struct Token {
    /// Id.
    pub id: i32,
    /// Position in its sequence.
    pub position: i32,
    /// Sequence.
    pub sequence: i32,
    /// Whether its logits are wanted.
    pub logits: bool,
}

/// Tokens to decode in one call.
#[derive(Clone, Debug, Default)]
pub struct TokenBatch(pub Vec<Token>);

/// A decoding context.
pub struct Context {
    raw: NonNull<sys::llama_context>,
    options: ContextOptions,
    // Which tokens of the last batch have logits.
    has_logits: Vec<bool>,
    // Which of them were drawn where the logits lie.
    drawn: Vec<bool>,
    // Of sequences 0, 1, ..; made when they are first wanted.
    draws: Vec<Draw>,
    draws_attached: bool,
    // Of each sequence.
    lineages: Lineages,
    n_vocab: usize,
    _adapter: Option<Arc<LiveAdapter>>,
    // What llama.cpp's callback writes to, which has its address.
    recorder: Option<NonNull<Recorder>>,
    pool: Arc<ThreadPool>,
    model: Arc<Model>,
}

// SAFETY: a context is used by one thread at a time (it is not Sync).
unsafe impl Send for Context {}

impl Context {
    /// A context of these sizes on these threads.
    ///
    /// # Errors
    /// [`Error::Invalid`] for sizes beyond llama.cpp's limits, [`Error::Engine`] without memory.
    pub fn new(
        model: &Arc<Model>,
        pool: &Arc<ThreadPool>,
        options: ContextOptions,
    ) -> Result<Context> {
        let most = max_sequences();
        if options.n_seq == 0 || options.n_seq > most {
            let (expected, got) = (format!("1 to {most}"), options.n_seq.to_string());
            let advice = "ask for fewer at once";
            return Err(Error::invalid("parallel sequences", expected, got, advice));
        }
        // llama.cpp rounds a stream's size up to this, and needs the product to fit 32 bits.
        let n_ctx_seq = options.n_ctx_seq.next_multiple_of(256);
        let n_ctx = u32::try_from(n_ctx_seq * options.n_seq).map_err(|_| {
            let got = format!("{} x {n_ctx_seq}", options.n_seq);
            Error::invalid("context", "less than 2^32 tokens in all", got, "lower --max-response")
        })?;
        let threads = pool.n_threads() as i32;
        let recorder = match options.experts {
            true => recorder(model, n_ctx_seq)?,
            false => None,
        };
        // SAFETY: default parameters with plain fields changed; a live model and pool.
        let raw = unsafe {
            let mut params = sys::llama_context_default_params();
            params.n_ctx = n_ctx;
            params.n_seq_max = options.n_seq as u32;
            params.n_batch = options.n_batch as u32;
            params.n_ubatch = options.n_batch as u32;
            params.n_threads = threads;
            params.n_threads_batch = threads;
            params.kv_unified = false;
            // Windowed layers keep all tokens, so that a sequence's tail can be forgotten.
            params.swa_full = true;
            params.no_perf = true;
            if let Some(recorder) = recorder {
                params.cb_eval = Some(callback);
                params.cb_eval_user_data = recorder.as_ptr().cast();
            }

            params.offload_kqv = !model.device().is_host();
            // Logits are kept for one token per sequence: [n_batch, V] would be gigabytes.
            params.n_outputs_max = options.n_seq as u32;
            if options.kv_f32 {
                // The CPU's flash attention rounds keys and values to F16 within.
                params.flash_attn_type = sys::LLAMA_FLASH_ATTN_TYPE_DISABLED;
                params.type_k = sys::GGML_TYPE_F32;
                params.type_v = sys::GGML_TYPE_F32;
            }
            sys::llama_init_from_model(model.raw(), params)
        };
        let raw = NonNull::new(raw).ok_or_else(|| {
            let call = format!("making a context of {} x {n_ctx_seq} tokens", options.n_seq);
            Error::engine(
                call,
                log::take_last_words(),
                "free memory, or ask for fewer or shorter completions",
            )
        })?;
        // SAFETY: a live context; the pool lives as long by the Arc.
        unsafe { sys::llama_attach_threadpool(raw.as_ptr(), pool.raw(), pool.raw()) };
        Ok(Context {
            raw,
            options: ContextOptions { n_ctx_seq, ..options },
            has_logits: Vec::new(),
            drawn: Vec::new(),
            draws: Vec::new(),
            draws_attached: false,
            lineages: Lineages::new(options.n_seq),
            n_vocab: model.vocab().n_tokens(),
            _adapter: None,
            recorder,
            pool: pool.clone(),
            model: model.clone(),
        })
    }

    /// Whether generation ends with this token.
    pub fn is_eog(&self, token: i32) -> bool {
        self.model.vocab().is_eog(token)
    }

    /// Sizes, the sequence's rounded up as llama.cpp does.
    pub fn options(&self) -> &ContextOptions {
        &self.options
    }

    /// Decodes with this adapter from now on, or with the base alone.
    pub fn set_adapter(&mut self, adapter: Option<Arc<LiveAdapter>>) -> Result<()> {
        let mut raw: Vec<_> = adapter.iter().map(|a| a.raw()).collect();
        let mut scales = vec![1.0f32; raw.len()];
        // SAFETY: a live context, live adapters of its model with one scale each; `self` keeps them.
        let status = unsafe {
            sys::llama_set_adapters_lora(
                self.raw.as_ptr(),
                raw.as_mut_ptr(),
                raw.len(),
                scales.as_mut_ptr(),
            )
        };
        if status != 0 {
            return Err(Error::engine("setting the adapter", log::take_last_words(), "report it"));
        }
        self._adapter = adapter;
        Ok(())
    }

    /// Decodes the batch; positions continue each sequence.
    ///
    /// # Errors
    /// [`Error::Invalid`] for tokens outside the vocabulary or sizes beyond the context's;
    /// [`Error::Engine`] with llama.cpp's words.
    pub fn decode(&mut self, batch: &TokenBatch) -> Result<()> {
        let tokens = &batch.0;
        let refuse = |expected: String, got: String| {
            Err(Error::invalid("batch", expected, got, "use tokens of this model"))
        };
        if tokens.is_empty() || tokens.len() > self.options.n_batch {
            return refuse(
                format!("1 to {} tokens", self.options.n_batch),
                tokens.len().to_string(),
            );
        }
        for t in tokens {
            if !self.model.vocab().holds(t.id) {
                return refuse(format!("token ids below {}", self.n_vocab), t.id.to_string());
            }
            if t.sequence < 0 || t.sequence as usize >= self.options.n_seq {
                return refuse(
                    format!("sequences below {}", self.options.n_seq),
                    t.sequence.to_string(),
                );
            }
            if t.position < 0 || t.position as usize >= self.options.n_ctx_seq {
                let expected = format!("positions below {}", self.options.n_ctx_seq);
                return refuse(expected, t.position.to_string());
            }
        }
        let mut ids: Vec<i32> = tokens.iter().map(|t| t.id).collect();
        let mut positions: Vec<i32> = tokens.iter().map(|t| t.position).collect();
        let mut one: Vec<i32> = vec![1; tokens.len()];
        let mut sequences: Vec<i32> = tokens.iter().map(|t| t.sequence).collect();
        let mut sequence_ptrs: Vec<*mut i32> =
            sequences.iter_mut().map(|s| s as *mut i32).collect();
        let mut logits: Vec<i8> = tokens.iter().map(|t| t.logits as i8).collect();
        let raw = sys::llama_batch {
            n_tokens: tokens.len() as i32,
            token: ids.as_mut_ptr(),
            embd: std::ptr::null_mut(),
            pos: positions.as_mut_ptr(),
            n_seq_id: one.as_mut_ptr(),
            seq_id: sequence_ptrs.as_mut_ptr(),
            logits: logits.as_mut_ptr(),
        };
        let mut result = 0;
        if let Some(recorder) = self.recorder {
            // SAFETY: made in `new`, freed in `drop`; nothing is computed now.
            unsafe { (*recorder.as_ptr()).begin() };
        }
        let any_threads = self.any_threads(tokens);
        let pool = &self.pool;
        // SAFETY: arrays of n_tokens entries each that live for the call; ids, sequences and positions
        // were checked above. As many threads as the pool has, at most.
        let mut decode = |threads: usize| unsafe {
            sys::llama_set_n_threads(self.raw.as_ptr(), threads as i32, threads as i32);
            let products = self.options.products.raw();
            let lineages = self.lineages.of_all.as_ptr();
            sys::bupo_decode(self.raw.as_ptr(), raw, pool.raw(), products, lineages, &mut result)
        };
        let status = if any_threads { pool.with_spare(decode) } else { decode(pool.n_threads()) };
        self.lineages.decoded(tokens, status == sys::BUPO_OK && result == 0);
        self.has_logits.clear();
        self.drawn.clear();
        check("decoding", status, "report it with the model's name")?;
        if result != 0 {
            let reason = format!("llama_decode gave {result}: {}", log::take_last_words());
            let advice = "free memory, or ask for fewer or shorter completions";
            return Err(Error::engine("decoding", reason, advice));
        }
        let draws = if self.draws_attached { self.draws.len() } else { 0 };
        let drawn = |t: &Token| t.logits && (t.sequence as usize) < draws;
        self.has_logits.extend(tokens.iter().map(|t| t.logits && !drawn(t)));
        self.drawn.extend(tokens.iter().map(drawn));
        Ok(())
    }

    /// Whether a batch's results are the same to the bit for any number of threads. ggml's attention of a token that is alone
    /// cuts so many keys into as many parts as there are threads; ours, which is taken for so many neighbours, does not, nor
    /// does that of several tokens, ours or ggml's.
    fn any_threads(&self, tokens: &[Token]) -> bool {
        const CUT_FROM: usize = 512;
        let neighbours = |pair: &[Token]| pair[0].sequence + 1 == pair[1].sequence;
        let same = |pair: &[Token]| pair[0].sequence == pair[1].sequence;
        let ours = tokens.len() >= sys::BUPO_ATTENTION_SEQUENCES as usize;
        self.options.n_ctx_seq < CUT_FROM
            || ours && tokens.windows(2).all(neighbours)
            || tokens.len() > 1 && tokens.windows(2).all(same)
    }

    /// Threads that have a core at the moment, of those that it decodes on.
    pub fn spare_threads(&self) -> usize {
        self.pool.spare_threads()
    }

    /// The experts that the last batch's token at this position of a sequence took, in a context that keeps them: of each
    /// layer as many as a token takes, ascending; -1 in a layer that did not compute it.
    pub fn experts(&self, sequence: usize, position: usize) -> Option<&[i16]> {
        // SAFETY: made in `new`, freed in `drop`; written only within `decode`, which needs `&mut self`.
        let recorder = unsafe { self.recorder?.as_ref() };
        recorder.of(sequence as i32, position as i32).map(Vec::as_slice)
    }

    /// Logits `[V]` after token `index` of the last batch, for which they were wanted.
    pub fn logits(&self, index: usize) -> &[f32] {
        assert!(self.has_logits.get(index) == Some(&true), "token {index} has no logits");
        // SAFETY: the last decode kept logits for this token: V floats until the next decode, which
        // needs `&mut self`.
        unsafe {
            let row = sys::llama_get_logits_ith(self.raw.as_ptr(), index as i32);
            assert!(!row.is_null(), "token {index} has no logits");
            std::slice::from_raw_parts(row, self.n_vocab)
        }
    }

    /// Draws the tokens of sequences 0 to `n` - 1 in the decoding graph from now on, so that their logits do not leave the
    /// device: see [`Context::set_draw`]; 0 gives logits again. Other sequences have logits in any case.
    ///
    /// # Errors
    /// [`Error::Engine`] where llama.cpp cannot.
    pub fn draw(&mut self, n: usize) -> Result<()> {
        assert!(n <= self.options.n_seq, "{n} sequences");
        let wanted = if n > 0 { n } else { self.draws.len() };
        while self.draws.len() < wanted {
            self.draws.push(Draw::new()?);
        }
        if (n > 0) == self.draws_attached {
            return Ok(());
        }
        for (sequence, draw) in self.draws.iter().enumerate().take(wanted) {
            let sampler = if n > 0 { draw.0.as_ptr() } else { std::ptr::null_mut() };
            // SAFETY: a live context, and a sampler that outlives it (see `drop`).
            let status =
                unsafe { sys::bupo_draw_attach(self.raw.as_ptr(), sequence as i32, sampler) };
            check("drawing on the device", status, "report it")?;
        }
        self.draws_attached = n > 0;
        Ok(())
    }

    /// What the next token of a sequence is drawn with: `uniform` in [0, 1), and the temperature, above 0.
    pub fn set_draw(&mut self, sequence: usize, uniform: f32, temperature: f32) {
        // The sum of all probabilities times this is below the sum.
        let uniform = uniform.min(1.0 - f32::EPSILON);
        // SAFETY: a live sampler of ours.
        unsafe { sys::bupo_draw_set(self.draws[sequence].0.as_ptr(), uniform, 1.0 / temperature) }
    }

    /// The token drawn after token `index` of the last batch, and its log-prob under the whole distribution at the
    /// temperature, nats.
    pub fn drawn(&self, index: usize) -> (i32, f32) {
        assert!(self.drawn.get(index) == Some(&true), "token {index} was not drawn after");
        // SAFETY: the last decode drew after this token; one float stands there until the next decode.
        unsafe {
            let token = sys::llama_get_sampled_token_ith(self.raw.as_ptr(), index as i32);
            let logprob = sys::llama_get_sampled_probs_ith(self.raw.as_ptr(), index as i32);
            assert!(self.model.vocab().holds(token) && !logprob.is_null(), "no token was drawn");
            (token, *logprob)
        }
    }

    /// Forgets positions from `from` on of a sequence.
    ///
    /// # Errors
    /// [`Error::Engine`] where the model's memory cannot forget a part of a sequence.
    pub fn forget(&mut self, sequence: usize, from: usize) -> Result<()> {
        assert!(sequence < self.options.n_seq, "sequence {sequence}");
        // SAFETY: a live context and a sequence in range.
        let done = unsafe {
            let memory = sys::llama_get_memory(self.raw.as_ptr());
            sys::llama_memory_seq_rm(memory, sequence as i32, from as i32, -1)
        };
        if done {
            self.lineages.forget(sequence, from);
            return Ok(());
        }
        let call = format!("forgetting sequence {sequence} from position {from} on");
        let reason = "this model's memory holds states, which cannot forget a part of a sequence";
        Err(Error::engine(call, reason, "report it with the model's name"))
    }

    /// Makes sequence `to` a copy of `from`.
    pub fn copy(&mut self, from: usize, to: usize) {
        assert!(from < self.options.n_seq && to < self.options.n_seq, "sequences {from}, {to}");
        // SAFETY: a live context and sequences in range; whole sequences may be copied between streams.
        unsafe {
            let memory = sys::llama_get_memory(self.raw.as_ptr());
            sys::llama_memory_seq_cp(memory, from as i32, to as i32, -1, -1);
        }
        self.lineages.copy(from, to);
    }

    /// Forgets everything.
    pub fn clear(&mut self) {
        self.lineages = Lineages::new(self.options.n_seq);
        // SAFETY: a live context.
        unsafe { sys::llama_memory_clear(sys::llama_get_memory(self.raw.as_ptr()), false) }
    }
}

/// What sequences have in common, so that attention reads it once for all of them.
struct Lineages {
    of_all: Vec<sys::bupo_lineage>,
    /// Tokens of each sequence.
    tokens: Vec<u32>,
    newest: u32,
}

impl Lineages {
    fn new(n_seq: usize) -> Lineages {
        let of_all = vec![sys::bupo_lineage { origin: 0, rows: 0 }; n_seq];
        Lineages { of_all, tokens: vec![0; n_seq], newest: 0 }
    }

    /// After a decode; nothing is known of its sequences where it failed.
    fn decoded(&mut self, batch: &[Token], well: bool) {
        for token in batch {
            let (sequence, position) = (token.sequence as usize, token.position as u32);
            let lineage = &mut self.of_all[sequence];
            lineage.rows = if well { lineage.rows.min(position) } else { 0 };
            self.tokens[sequence] = position + 1;
        }
    }

    fn forget(&mut self, sequence: usize, from: usize) {
        let from = u32::try_from(from).unwrap_or(u32::MAX);
        self.tokens[sequence] = self.tokens[sequence].min(from);
        let lineage = &mut self.of_all[sequence];
        lineage.rows = lineage.rows.min(from);
    }

    fn copy(&mut self, from: usize, to: usize) {
        if self.of_all[from].rows == 0 {
            self.newest += 1;
            let rows = self.tokens[from];
            self.of_all[from] = sys::bupo_lineage { origin: self.newest, rows };
        }
        self.of_all[to] = self.of_all[from];
        self.tokens[to] = self.tokens[from];
    }
}

/// Sequences that one context can hold at most.
pub fn max_sequences() -> usize {
    // SAFETY: no preconditions.
    unsafe { sys::llama_max_parallel_sequences() }
}

/// Draws a sequence's tokens in the decoding graph.
struct Draw(NonNull<sys::llama_sampler>);

impl Draw {
    fn new() -> Result<Draw> {
        let mut raw = std::ptr::null_mut();
        // SAFETY: a place for the result, which is not null on BUPO_OK.
        check("making a sampler", unsafe { sys::bupo_draw_new(&mut raw) }, "report it")?;
        Ok(Draw(NonNull::new(raw).expect("made")))
    }
}

impl Drop for Draw {
    fn drop(&mut self) {
        // SAFETY: made once, freed once, after the context, whose fields are dropped after its own `drop`.
        unsafe { sys::llama_sampler_free(self.0.as_ptr()) }
    }
}

impl Drop for Context {
    fn drop(&mut self) {
        // SAFETY: made once, freed once, before its model, adapter and pool.
        unsafe {
            sys::llama_free(self.raw.as_ptr());
            if let Some(recorder) = self.recorder {
                drop(Box::from_raw(recorder.as_ptr()));
            }
        }
    }
}

/// A recorder for a mixture of experts; none for other models.
fn recorder(model: &Model, n_cells: usize) -> Result<Option<NonNull<Recorder>>> {
    let h = model.hparams()?;
    if h.n_expert == 0 {
        return Ok(None);
    }
    let used = model.layer_hparams(h.n_layer as usize)?.n_expert_used as usize;
    let made = Box::new(Recorder::new(h.n_layer as usize, used, n_cells));
    Ok(Some(NonNull::from(Box::leak(made))))
}
