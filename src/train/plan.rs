//! What a run will take of memory, by part, before it begins.
//!
//! Sizes come from the constants and graphs of the code that will take the memory; where llama.cpp takes
//! it, from its graphs as they are known (`decoding`). `tests/plan.rs` holds the sum against the
//! measured peak.

use serde::Serialize;

use super::memory::{available_bytes, resident_besides};
use super::start::new_critic;
use super::teacher::TeacherModel;
use super::together::KEPT_BYTES;
use super::{Baseline, Facts, Reference, Settings, TrainConfig};
use crate::ggml::Device;
use crate::gguf::AdapterFile;
use crate::model::{Activations, Largest, LayerConfig, Lora, Model, activations, kept_bytes};
use crate::ops::{distill_tiles_bytes, logprob_tiles_bytes};
use crate::rollout::RolloutOptions;
use crate::{Error, Result};

/// The system's allocator keeps freed blocks of up to this size (glibc's largest mmap threshold): the
/// forward's intermediate results, about half of the backward's, stay when these take their place.
const HEAP_KEEPS: usize = 32 << 20;

/// Kept activations leave this part of the limit free: a plan can be off by up to 15 %, most are by less.
const MARGIN: u64 = 8;
/// Code and small buffers that a run touches after it was planned: 5 to 10 MiB were measured on models of a few MiB.
const TOUCHED_LATER: u64 = 5 << 20;
/// What crosses between ranks in one go, sent and received.
const EXCHANGED: usize = 3 * (64 << 20);
/// Name of the part of residuals and graphs.
const ACTIVATIONS: &str = "activations";
/// Name of the part that grows into what the others leave.
const KEPT: &str = "kept for vjp";

/// One use of memory.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Part {
    /// Short name.
    pub name: &'static str,
    /// Bytes.
    pub bytes: u64,
    /// What it is made of.
    pub what: String,
    /// What makes it smaller.
    #[serde(skip)]
    pub advice: &'static str,
}

/// All uses of memory of a run.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Plan {
    /// Parts, in the order in which they are taken.
    pub parts: Vec<Part>,
    /// Their sum: the peak on the CPU, bytes.
    pub total_bytes: u64,
    /// What the process may take in all, bytes: `--memory`, else what it has and what is free; none where the
    /// system does not say.
    pub limit_bytes: Option<u64>,
}

/// What a run computes with, beside its settings.
pub(super) struct Workload<'w> {
    /// Whether completions are sampled.
    pub samples: bool,
    /// Tokens of the longest prompt with all of its completions, and of these alone.
    pub group_tokens: usize,
    pub group_scored: usize,
    /// Prompts that are scored at once before the first update.
    pub measured: usize,
    /// Ranks that share it.
    pub ranks: usize,
    /// The teacher of a distillation.
    pub teacher: Option<&'w TeacherModel<'w>>,
}

impl<'w> Workload<'w> {
    /// Of settings and of what is known of the data.
    pub fn of(c: &Settings, facts: &Facts, teacher: Option<&'w TeacherModel<'w>>) -> Workload<'w> {
        let sampled = (c.max_prompt + c.group * c.max_response, c.group * c.max_response);
        let (group_tokens, group_scored) = facts.longest_row.map_or(sampled, |n| (n, n));
        // Of a mini batch; of the rest that is scored before the updates, or of all groups, where all are.
        let all = c.kl_coef > 0.0 || c.baseline == Baseline::Value || !c.algo.is_rewarded();
        let measured = match all {
            true => c.prompts_per_step,
            false => c.mini_batch.max(c.prompts_per_step - c.mini_batch),
        };
        let (samples, ranks) = (facts.samples, facts.ranks);
        Workload { samples, group_tokens, group_scored, measured, ranks, teacher }
    }
}

impl Plan {
    /// Reckons a run of these settings on an open model; rows, which are not read for it, are taken to be as long as
    /// they may be.
    ///
    /// # Errors
    /// Settings that do not fit the model, or an adapter that cannot be read.
    pub fn new(model: &Model, config: &TrainConfig) -> Result<Plan> {
        let teacher = TeacherModel::open(model, config)?;
        let facts = Facts::unread(config);
        let settings = config.clone().resolve(model, &facts)?;
        Plan::of(model, &settings, &Workload::of(&settings, &facts, teacher.as_ref()))
    }

    pub(super) fn of(model: &Model, c: &Settings, workload: &Workload<'_>) -> Result<Plan> {
        let m = model.config();
        let file = c.adapter.as_deref().map(AdapterFile::read).transpose()?;
        let rank = file.iter().flat_map(|f| &f.pairs).map(|p| p.rank).max().unwrap_or(c.rank);
        let threads = c.threads;

        let longest = c.max_prompt + c.max_response;
        let options = RolloutOptions { n_ctx_seq: longest, kv_bytes: c.kv_mib << 20 }
            .at_most(c.sequences(), model.engine())?;
        let sizes = options.sizes(model.engine())?;
        let running = sizes.n_seq.min(c.prompts_per_step * c.group);

        // The largest micro batch.
        let &Workload { group_tokens, group_scored, measured, .. } = workload;
        let groups = measured.max(c.mini_batch);
        let tokens = c.micro_batch_tokens.min(groups * group_tokens);
        let trained = c.micro_batch_tokens.min(c.mini_batch * group_tokens);
        let scored = tokens.min(groups * group_scored);
        let largest = Largest { tokens, trained, scored };
        let internal_only = c.steps <= c.internal_steps;
        let depth = if internal_only { c.internal_layer } else { m.n_layer };
        let acts = |keeps| activations(model, &c.targets, rank, depth, largest, keeps);
        let again = acts(false)?;
        let adapter = 4 * match &file {
            Some(file) => file.pairs.iter().map(|p| rank * (p.n_in + p.n_out) * p.n_expert).sum(),
            None => Lora::count_params(model, &c.targets, rank)?,
        };

        let files = model.files().iter().filter_map(|f| std::fs::metadata(f).ok());
        let weights: u64 = files.map(|f| f.len()).sum();
        let part =
            |name, bytes: usize, what, advice| Part { name, bytes: bytes as u64, what, advice };
        let teacher_files = workload.teacher.map_or(&[][..], |teacher| teacher.own_files());
        let program = resident_besides(&[model.files(), teacher_files].concat());
        let limit_bytes = match c.memory {
            Some(size) => Some(size.0),
            None => available_bytes().map(|free| free + program),
        };
        let mut parts = vec![
            part(
                "program",
                (program + TOUCHED_LATER) as usize,
                "code, vocabulary, what is open now".into(),
                "",
            ),
            part(
                "weights",
                weights as usize,
                format!("{} layers, one copy, mapped", m.n_layer),
                "use a smaller quantisation",
            ),
        ];
        if workload.samples {
            parts.push(part(
                "kv cache",
                sizes.bytes(),
                format!("{} sequences of {} tokens, F16", sizes.n_seq, sizes.n_ctx_seq),
                "lower --kv-mib or --max-response",
            ));
            parts.push(part(
                "decoding",
                decoding_bytes(model, c, running, sizes.n_batch, threads),
                format!("llama.cpp's graph, logits of {running} sequences, sampling"),
                "lower --kv-mib or --max-prompt",
            ));
        }
        let mut tiles = logprob_tiles_bytes(m.n_embd, scored, threads);
        if let Some(teacher) = workload.teacher {
            tiles = tiles.max(distill_tiles_bytes(m.n_embd, scored, threads));
            let files = teacher_files.iter().filter_map(|f| std::fs::metadata(f).ok());
            let weights: u64 = files.map(|f| f.len()).sum();
            let width = teacher.config().n_embd;
            let deep = teacher.config().n_layer;
            let forward = Largest { tokens, trained: 1, scored };
            let acts = activations(teacher, &c.targets, 1, deep, forward, false)?;
            // Its last hidden states lie in host memory, too.
            parts.push(part(
                "teacher",
                weights as usize + activation_bytes(acts) + 8 * width * tokens,
                format!("weights and a forward of {deep} layers"),
                "use a smaller teacher",
            ));
        }
        parts.extend([
            part(
                ACTIVATIONS,
                activation_bytes(again),
                format!("{tokens} tokens: residuals of {depth} layers and one layer's graph"),
                "lower --micro-batch-tokens",
            ),
            part(
                "logprob tiles",
                tiles,
                format!("{threads} threads, never the vocabulary whole"),
                "lower --threads",
            ),
            part(
                "adapter",
                5 * adapter,
                format!("rank {rank}: masters, gradients of two, two moments, F32"),
                "lower --rank",
            ),
        ]);
        if workload.ranks > 1 {
            let micro_batches = (c.mini_batch * group_tokens).div_ceil(c.micro_batch_tokens);
            let own = (adapter * micro_batches.div_ceil(workload.ranks)).min(2 * KEPT_BYTES);
            parts.push(part(
                "ranks",
                own.max(adapter) + adapter + EXCHANGED,
                format!("gradients of micro batches until {} ranks add them up", workload.ranks),
                "lower --rank",
            ));
        }
        if c.rows.reference == Reference::Start {
            parts.push(part(
                "reference",
                adapter,
                "the adapter it began from".into(),
                "lower --rank",
            ));
        }
        if let Some(critic) = new_critic(c, model)? {
            parts.push(part(
                "critic",
                critic.n_bytes() + 4 * m.n_embd * tokens,
                "value heads, a residual as they read it".into(),
                "lower --micro-batch-tokens",
            ));
        }
        if c.algo.is_rewarded() {
            let judge = c.rewards.judge(&c.data, c.max_response)?;
            for (path, kv_bytes) in judge.models() {
                let weights = std::fs::metadata(path).map_or(0, |file| file.len() as usize);
                parts.push(part(
                    "judge",
                    weights + kv_bytes,
                    format!("{}: weights, keys and values", path.display()),
                    "use a smaller judge",
                ));
            }
        }
        // The limit is the CPU's memory: what a card has left is not known here.
        let keeps = !c.recompute && model.device() == Device::Cpu;
        let taken: u64 = parts.iter().map(|p| p.bytes).sum();
        let left = limit_bytes.map_or(0, |limit| (limit - limit / MARGIN).saturating_sub(taken));
        let kept = match keeps {
            true => fitting(&kept_bytes(model, &c.targets, rank, depth, trained)?, left),
            false => Vec::new(),
        };
        let layers_kept = kept.len();
        if layers_kept == depth {
            // No layer is computed again: its graph holds less.
            let part = parts.iter_mut().find(|p| p.name == ACTIVATIONS).expect("pushed above");
            part.bytes = activation_bytes(acts(true)?) as u64;
        }
        parts.push(part(
            KEPT,
            kept.iter().sum(),
            format!("activations of {layers_kept} layers that are not computed again"),
            "",
        ));
        let total_bytes = parts.iter().map(|p| p.bytes).sum();
        Ok(Plan { parts, total_bytes, limit_bytes })
    }

    /// Bytes for activations that an update keeps for its backward.
    pub fn kept_bytes(&self) -> usize {
        self.parts.iter().filter(|p| p.name == KEPT).map(|p| p.bytes as usize).sum()
    }

    /// Refuses a plan that does not fit into the limit.
    ///
    /// # Errors
    /// [`Error::Invalid`] with the largest parts and what makes them smaller.
    pub fn check(&self) -> Result<()> {
        let needed = self.total_bytes;
        let Some(limit) = self.limit_bytes.filter(|limit| needed > *limit) else { return Ok(()) };
        let mut largest: Vec<&Part> = self.parts.iter().filter(|p| !p.advice.is_empty()).collect();
        largest.sort_by_key(|p| std::cmp::Reverse(p.bytes));
        let mib = |bytes: u64| bytes.div_ceil(1 << 20);
        let advice: Vec<_> = largest
            .iter()
            .take(3)
            .map(|p| format!("{} ({} takes {} MiB)", p.advice, p.name, mib(p.bytes)))
            .collect();
        Err(Error::invalid(
            "memory",
            format!("{} MiB for this run", mib(needed)),
            format!("{} MiB available", mib(limit)),
            format!("{}; --memory SIZE sets another limit", advice.join(", ")),
        ))
    }

    /// The plan as a table, with the limit beside it.
    pub fn table(&self) -> String {
        let mib = |bytes: u64| bytes as f64 / (1 << 20) as f64;
        let mut text = String::from("memory of a run        MiB\n");
        for p in &self.parts {
            text += &format!("  {:<14}  {:>9.1}  {}\n", p.name, mib(p.bytes), p.what);
        }
        text += &format!("  {:<14}  {:>9.1}", "peak", mib(self.total_bytes));
        if let Some(limit) = self.limit_bytes {
            text += &format!("  ({:.0} MiB available)", mib(limit));
        }
        text
    }

    /// The plan in one line.
    pub fn line(&self) -> String {
        let mib = |bytes: u64| bytes.div_ceil(1 << 20);
        let parts: Vec<_> =
            self.parts.iter().map(|p| format!("{} {}", p.name, mib(p.bytes))).collect();
        format!("memory: {} MiB planned ({})", mib(self.total_bytes), parts.join(", "))
    }
}

/// The first of these that fit into `left` bytes together.
pub(super) fn fitting(bytes: &[usize], left: u64) -> Vec<usize> {
    let mut sum = 0;
    let fits = |n: &&usize| {
        sum += **n as u64;
        sum <= left
    };
    bytes.iter().take_while(fits).copied().collect()
}

fn activation_bytes(a: Activations) -> usize {
    a.kept + a.scratch + (a.scratch / 2).min(HEAP_KEEPS)
}

/// What llama.cpp and sampling take while they decode: the FFN is the widest place of its graph, and logits
/// of all running sequences stand in the graph, in the context, and once more as a prompt's first ones.
fn decoding_bytes(
    model: &Model,
    c: &Settings,
    running: usize,
    n_batch: usize,
    threads: usize,
) -> usize {
    let m = model.config();
    let tokens = n_batch.min(c.prompts_per_step * c.max_prompt).max(running);
    let n_ff = m.most(LayerConfig::ffn_width);
    let graph = 4 * tokens * (3 * n_ff + 4 * m.n_embd);
    let quantised_rows = 2 * tokens * n_ff.max(m.n_embd);
    let mask = 6 * tokens * c.max_prompt.next_multiple_of(256);
    let logits = 4 * m.n_vocab * (2 * running + c.prompts_per_step);
    graph + quantised_rows + mask + logits + threads * 8 * m.n_vocab
}
