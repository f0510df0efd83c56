//! What a run will take of memory, by part, before it begins: one plan, which is printed, kept to and held against what is
//! there. The host's memory is one part of it, a GPU's the other ([`device`]); sizes of both come from the same
//! functions ([`sizes`]). `tests/plan.rs` holds the sum against the measured peak.

mod device;
mod sizes;

use serde::Serialize;

pub use device::GpuPlan;
pub(super) use device::wants_a_gpu;
pub(super) use sizes::Workload;
use sizes::{Sizes, fitting, of_files, on_host};

use super::memory::available_bytes;
use super::start::take_adapter;
use super::teacher::TeacherModel;
use super::{Facts, Settings, TrainConfig};
use crate::ggml::Device;
use crate::model::Model;
use crate::rollout::Decoding;
use crate::{Error, Result};

/// Kept activations leave this part of the limit free: a plan can be off by up to 15 %, most are by less.
const MARGIN: u64 = 8;
/// Code and small buffers that a run touches after it was planned: 5 to 10 MiB were measured on models of a few MiB.
const TOUCHED_LATER: u64 = 7 << 20;
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

/// All uses of memory of a run; `parts` are those of the host's.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Plan {
    /// Parts, in the order in which they are taken.
    pub parts: Vec<Part>,
    /// Their sum: the peak, bytes.
    pub total_bytes: u64,
    /// What the process may take in all, bytes: `--memory`, else what it has and what is free; none where the
    /// system does not say.
    pub limit_bytes: Option<u64>,
    /// What it takes of a GPU, and what was chosen to fit there; none without one.
    #[serde(skip)]
    pub gpu: Option<GpuPlan>,
}

impl Plan {
    /// Reckons a run of these settings on an open model; rows, which are not read for it, are taken to be as long as
    /// they may be. `--vram` plans for a card with so much memory, which need not be there.
    ///
    /// # Errors
    /// Settings that do not fit the model or the card, or an adapter that cannot be read.
    pub fn new(model: &Model, config: &TrainConfig) -> Result<Plan> {
        let mut config = config.clone();
        let path = config.adapter.clone();
        let adapter = take_adapter(&mut config, model, path.as_deref())?;
        let teacher = TeacherModel::open(model, &config)?;
        let work = Workload::new(model, &config, adapter, teacher.as_ref())?;
        let facts = Facts::unread(&config);
        let mut settings = config.resolve(model, &facts)?;
        Plan::of(model, &mut settings, &facts, &work)
    }

    /// Plans a run, and puts into its settings what a device's memory decides about.
    ///
    /// # Errors
    /// [`Error::Invalid`] where the device's memory is too little.
    pub(super) fn of(
        model: &Model,
        settings: &mut Settings,
        facts: &Facts,
        work: &Workload<'_>,
    ) -> Result<Plan> {
        let gpu = GpuPlan::of(&Sizes { model, settings, facts, work })?;
        if let Some(gpu) = &gpu {
            (settings.micro_batch_tokens, settings.kv_mib) = (gpu.micro_batch_tokens, gpu.kv_mib);
        }
        let sizes = Sizes { model, settings, facts, work };
        let limit_bytes = match settings.memory {
            Some(size) => Some(size.0),
            None => available_bytes().map(|free| free + work.program),
        };
        let on_card = gpu.is_some() && !matches!(model.device(), Device::Emulated { .. });
        let mut parts = vec![part(
            "program",
            work.program + TOUCHED_LATER,
            "code, vocabulary, what is open now".into(),
            "",
        )];
        parts.extend(match on_card {
            true => beside_a_card(&sizes)?,
            false => on_the_host(&sizes)?,
        });
        parts.extend(in_either_case(&sizes, on_card)?);
        if !on_card {
            let kept = kept(&sizes, gpu.as_ref(), &mut parts, limit_bytes)?;
            parts.push(kept);
        }
        let total_bytes = parts.iter().map(|p| p.bytes).sum();
        Ok(Plan { parts, total_bytes, limit_bytes, gpu })
    }

    /// Bytes for activations that an update keeps for its backward.
    pub fn kept_bytes(&self) -> usize {
        if let Some(gpu) = &self.gpu {
            return gpu.kept_bytes as usize;
        }
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
        if let Some(gpu) = &self.gpu {
            text += &format!("\n{}", gpu.line());
        }
        text
    }

    /// The plan in a line, and one more of a GPU.
    pub fn lines(&self) -> String {
        let mib = |bytes: u64| bytes.div_ceil(1 << 20);
        let gpu = self.gpu.iter().map(|gpu| format!("\n{}", gpu.line()));
        let gpu: String = gpu.collect();
        let parts: Vec<_> =
            self.parts.iter().map(|p| format!("{} {}", p.name, mib(p.bytes))).collect();
        format!("memory: {} MiB planned ({}){gpu}", mib(self.total_bytes), parts.join(", "))
    }
}

fn part(name: &'static str, bytes: u64, what: String, advice: &'static str) -> Part {
    Part { name, bytes, what, advice }
}

/// What a run on the host takes there.
fn on_the_host(sizes: &Sizes<'_>) -> Result<Vec<Part>> {
    let Sizes { model, settings: c, facts, work } = *sizes;
    let m = model.config();
    let largest = sizes.largest(c.micro_batch_tokens);
    let (tokens, depth) = (largest.tokens, sizes.depth());
    let mut parts = vec![part(
        "weights",
        of_files(model.files()),
        format!("{} layers, one copy, mapped", m.n_layer),
        "use a smaller quantisation",
    )];
    if facts.samples {
        let rollouts =
            c.rollouts().at_most(c.sequences(), model.engine())?.sizes(model.engine())?;
        let running = rollouts.n_seq.min(c.prompts_per_step * c.group);
        let prompts = c.prompts_per_step * c.max_prompt;
        // Logits of all running sequences stand in the graph, in the context, and once more as a prompt's first ones.
        let decoding = Decoding {
            tokens: rollouts.n_batch.min(prompts).max(running),
            keys: c.max_prompt.next_multiple_of(256),
            logits: 2 * running + c.prompts_per_step,
        };
        parts.push(part(
            "kv cache",
            rollouts.bytes() as u64,
            format!("{} sequences of {} tokens, F16", rollouts.n_seq, rollouts.n_ctx_seq),
            "lower --kv-mib or --max-response",
        ));
        parts.push(part(
            "decoding",
            decoding.host_bytes(m, c.threads) as u64,
            format!("llama.cpp's graph, logits of {running} sequences, sampling"),
            "lower --kv-mib or --max-prompt",
        ));
    }
    if let Some(teacher) = work.teacher {
        let forward = on_host(sizes.teacher_forward(teacher, largest)?);
        parts.push(part(
            "teacher",
            of_files(teacher.own_files())
                + (forward + sizes.teacher_hidden(teacher, tokens)) as u64,
            format!("weights and a forward of {} layers", teacher.config().n_layer),
            "use a smaller teacher",
        ));
    }
    parts.extend([
        part(
            ACTIVATIONS,
            on_host(sizes.activations(largest, false)?) as u64,
            format!("{tokens} tokens: residuals of {depth} layers and one layer's graph"),
            "lower --micro-batch-tokens",
        ),
        part(
            "logprob tiles",
            sizes.tiles(largest.scored) as u64,
            format!("{} threads, never the vocabulary whole", c.threads),
            "lower --threads",
        ),
        part(
            "adapter",
            sizes.adapter() as u64,
            format!("rank {}: masters, gradients of two, two moments, F32", work.adapter.rank),
            "lower --rank",
        ),
    ]);
    if sizes.reference() > 0 {
        let what = "the adapter it began from".into();
        parts.push(part("reference", sizes.reference() as u64, what, "lower --rank"));
    }
    Ok(parts)
}

/// What a run on a card takes of the host's memory: what does not lie there.
fn beside_a_card(sizes: &Sizes<'_>) -> Result<Vec<Part>> {
    let Sizes { model, settings: c, facts, work } = *sizes;
    let m = model.config();
    let below = m.n_layer - sizes.layers_on_card(model);
    let mut parts = vec![part(
        "weights",
        sizes.weights(model)[0] as u64,
        format!("token embedding and {below} layers, mapped"),
        "raise --gpu-layers",
    )];
    if facts.samples {
        let rollouts =
            c.rollouts().at_most(c.sequences(), model.engine())?.sizes(model.engine())?;
        let running = rollouts.n_seq.min(c.prompts_per_step * c.group);
        // llama.cpp reserves three values of each sequence and entry of the vocabulary for what samplers give back; a
        // prompt's first logits come to the host.
        let logits = 3 * running + c.prompts_per_step;
        let decoding = Decoding { tokens: 0, keys: 0, logits };
        parts.push(part(
            "kv cache",
            (rollouts.bytes() * below / m.n_layer) as u64,
            format!("{} sequences of {} tokens, F16", rollouts.n_seq, rollouts.n_ctx_seq),
            "lower --kv-mib or --max-response",
        ));
        parts.push(part(
            "decoding",
            decoding.host_bytes(m, c.threads) as u64,
            format!("logits of {running} sequences, sampling"),
            "lower --kv-mib",
        ));
    }
    if let Some(teacher) = work.teacher {
        let weights = match teacher.own_files().is_empty() {
            true => 0,
            false => sizes.weights(teacher)[0],
        };
        let tokens = sizes.largest(c.micro_batch_tokens).tokens;
        parts.push(part(
            "teacher",
            (weights + sizes.teacher_hidden(teacher, tokens)) as u64,
            "its token embedding, its last hidden states".into(),
            "lower --micro-batch-tokens",
        ));
    }
    Ok(parts)
}

/// What lies in the host's memory wherever the model computes.
fn in_either_case(sizes: &Sizes<'_>, on_card: bool) -> Result<Vec<Part>> {
    let Sizes { settings: c, facts, work, .. } = *sizes;
    let mut parts = Vec::new();
    let looks = sizes.look(on_card)?;
    if looks > 0 {
        let what = "hidden states of all layers, while they are looked at".into();
        parts.push(part("looks", looks as u64, what, "lower --max-response"));
    }
    if facts.ranks > 1 {
        let what = format!("gradients of micro batches until {} ranks add them up", facts.ranks);
        parts.push(part("ranks", sizes.ranks() as u64, what, "lower --rank"));
    }
    if let Some(bytes) = sizes.critic(sizes.largest(c.micro_batch_tokens).tokens)? {
        let what = "value heads, a residual as they read it".into();
        parts.push(part("critic", bytes as u64, what, "lower --micro-batch-tokens"));
    }
    if sizes.noise() > 0 {
        let what = "what is added to embeddings (--neftune)".into();
        parts.push(part("noise", sizes.noise() as u64, what, "lower --micro-batch-tokens"));
    }
    for judge in &work.judges {
        parts.push(part(
            "judge",
            judge.bytes(c.max_prompt + c.max_response),
            format!("{}: weights, keys and values, decoding", judge.path.display()),
            "use a smaller judge",
        ));
    }
    Ok(parts)
}

/// Activations that an update on the host keeps for its backward, in what the other parts leave of the limit.
fn kept(
    sizes: &Sizes<'_>,
    gpu: Option<&GpuPlan>,
    parts: &mut [Part],
    limit: Option<u64>,
) -> Result<Part> {
    let Sizes { model, settings: c, .. } = *sizes;
    if let Some(gpu) = gpu {
        return Ok(part(KEPT, gpu.kept_bytes, "what --vram leaves".into(), ""));
    }
    let taken: u64 = parts.iter().map(|p| p.bytes).sum();
    let left = limit.map_or(0, |limit| (limit - limit / MARGIN).saturating_sub(taken));
    let layers = match !c.recompute && model.device() == Device::Cpu {
        true => fitting(&sizes.kept(c.micro_batch_tokens)?, left),
        false => Vec::new(),
    };
    if layers.len() == sizes.depth() {
        // No layer is computed again: its graph holds less.
        let acts = sizes.activations(sizes.largest(c.micro_batch_tokens), true)?;
        let part = parts.iter_mut().find(|p| p.name == ACTIVATIONS);
        part.expect("a part of the host's").bytes = on_host(acts) as u64;
    }
    let what = format!("activations of {} layers that are not computed again", layers.len());
    Ok(part(KEPT, layers.iter().sum::<usize>() as u64, what, ""))
}
