//! What the things of a run take of memory, whichever memory that is: each size is reckoned here and nowhere else, from the
//! constants and graphs of the code that will take it; where llama.cpp takes it, from its graphs as they are known.

use crate::Result;
use crate::analysis::measure_bytes;
use crate::ggml::Device;
use crate::model::{
    Activations, AdapterShape, Largest, LayerConfig, Model, activations, kept_bytes,
};
use crate::ops::{ScratchShape, distill_tiles_bytes, logprob_tiles_bytes, scratch_bytes};
use crate::reward::JudgeMemory;
use crate::rollout::RolloutSizes;
use crate::train::layers::look_tokens;
use crate::train::memory::resident_besides;
use crate::train::start::new_critic;
use crate::train::teacher::TeacherModel;
use crate::train::together::KEPT_BYTES;
use crate::train::{Baseline, Facts, LayerChoice, Reference, Settings, TrainConfig};

/// The system's allocator keeps freed blocks of up to this size (glibc's largest mmap threshold), and gives larger ones back
/// at once: the forward's intermediate results, about half of the backward's, stay when these take their place.
const HEAP_KEEPS: usize = 32 << 20;
/// What crosses between ranks in one go, sent and received.
const EXCHANGED: usize = 3 * (64 << 20);

/// What a run computes with that no setting changes; looked at once.
pub(in crate::train) struct Workload<'w> {
    /// The adapter that is trained.
    pub adapter: AdapterShape,
    /// The teacher of a distillation.
    pub teacher: Option<&'w TeacherModel<'w>>,
    /// Values of its adapter.
    pub teacher_params: usize,
    /// Models that judge.
    pub judges: Vec<JudgeMemory>,
    /// What the process has taken already, but for weights, bytes.
    pub program: u64,
}

impl<'w> Workload<'w> {
    /// Of options, before anything is taken that a plan counts.
    ///
    /// # Errors
    /// A teacher's adapter or a judging model that cannot be read.
    pub fn new(
        model: &Model,
        config: &TrainConfig,
        adapter: AdapterShape,
        teacher: Option<&'w TeacherModel<'w>>,
    ) -> Result<Workload<'w>> {
        let teacher_params = match (teacher, &config.rows.teacher_adapter) {
            (Some(teacher), Some(path)) => AdapterShape::read(teacher, path)?.n_params,
            _ => 0,
        };
        let judges = match config.algo.is_rewarded() {
            true => {
                let limit = config.max_response.unwrap_or(usize::MAX);
                let judge = config.rewards.judge(&config.data, limit)?;
                judge.models().map(|model| model.memory()).collect::<Result<_>>()?
            }
            false => Vec::new(),
        };
        let own = teacher.map_or(&[][..], |teacher| teacher.own_files());
        let program = resident_besides(&[model.files(), own].concat());
        Ok(Workload { adapter, teacher, teacher_params, judges, program })
    }
}

/// The sizes of a run of these settings.
#[derive(Clone, Copy)]
pub(in crate::train) struct Sizes<'s> {
    pub model: &'s Model,
    pub settings: &'s Settings,
    pub facts: &'s Facts,
    pub work: &'s Workload<'s>,
}

impl<'s> Sizes<'s> {
    /// Tokens of the longest prompt with one completion, or of the longest row.
    pub fn longest(&self) -> usize {
        self.facts.longest_row.unwrap_or(self.settings.max_prompt + self.settings.max_response)
    }

    /// Tokens of the longest prompt with all of its completions, and of these alone.
    pub fn group(&self) -> [usize; 2] {
        let c = self.settings;
        let responses = c.group * c.max_response;
        self.facts.longest_row.map_or([c.max_prompt + responses, responses], |row| [row; 2])
    }

    /// Groups that are scored in one go, at most: a mini batch; of the rest what is scored before the first update, or
    /// all groups, where all are.
    pub fn groups(&self) -> usize {
        let c = self.settings;
        let all = c.kl_coef > 0.0 || c.baseline == Baseline::Value || !c.algo.is_rewarded();
        let measured = match all {
            true => c.prompts_per_step,
            false => c.prompts_per_step - c.mini_batch.min(c.prompts_per_step),
        };
        measured.max(c.mini_batch)
    }

    /// The largest micro batches of this budget.
    pub fn largest(&self, budget: usize) -> Largest {
        let ([group, responses], groups) = (self.group(), self.groups());
        let tokens = budget.min(groups * group);
        let trained = budget.min(self.settings.mini_batch * group);
        Largest { tokens, trained, scored: tokens.min(groups * responses) }
    }

    /// Layers that the run computes, at most: all of them where the internal one is looked for.
    pub fn depth(&self) -> usize {
        let (c, n_layer) = (self.settings, self.model.config().n_layer);
        let internal = c.steps <= c.internal_steps && !self.finds_layer();
        if internal { c.internal_layer } else { n_layer }
    }

    /// Whether the internal layer is looked for when the run begins.
    fn finds_layer(&self) -> bool {
        let c = self.settings;
        c.options.internal_layer == Some(LayerChoice::Auto) && c.internal_steps > 0
    }

    /// Residuals and one layer's graph.
    pub fn activations(&self, largest: Largest, keeps: bool) -> Result<Activations> {
        let AdapterShape { rank, targets, .. } = &self.work.adapter;
        activations(self.model, targets, *rank, self.depth(), largest, keeps)
    }

    /// Activations that need not be computed again, layer by layer.
    pub fn kept(&self, budget: usize) -> Result<Vec<usize>> {
        let AdapterShape { rank, targets, .. } = &self.work.adapter;
        let trained = self.largest(budget).trained;
        kept_bytes(self.model, targets, *rank, self.depth(), trained)
    }

    /// Tiles of the vocabulary, on the CPU.
    pub fn tiles(&self, scored: usize) -> usize {
        let (width, threads) = (self.model.config().n_embd, self.settings.threads);
        let distilled = match self.work.teacher {
            Some(_) => distill_tiles_bytes(width, scored, threads),
            None => 0,
        };
        logprob_tiles_bytes(width, scored, threads).max(distilled)
    }

    /// Masters, gradients of two, two moments.
    pub fn adapter(&self) -> usize {
        5 * 4 * self.work.adapter.n_params
    }

    /// The adapter that log-ratios are taken to.
    pub fn reference(&self) -> usize {
        match self.settings.rows.reference {
            Reference::Start => 4 * self.work.adapter.n_params,
            Reference::Base => 0,
        }
    }

    /// Gradients of micro batches that this rank keeps until they are added up, and what it exchanges.
    pub fn ranks(&self) -> usize {
        let (c, adapter) = (self.settings, 4 * self.work.adapter.n_params);
        let micro_batches = (c.mini_batch * self.group()[0]).div_ceil(c.micro_batch_tokens);
        let own = (adapter * micro_batches.div_ceil(self.facts.ranks)).min(2 * KEPT_BYTES);
        own.max(adapter) + adapter + EXCHANGED
    }

    /// Value heads, and a residual as they read it; none without a critic.
    pub fn critic(&self, tokens: usize) -> Result<Option<usize>> {
        let critic = new_critic(self.settings, self.model)?;
        Ok(critic.map(|critic| critic.n_bytes() + 4 * self.model.config().n_embd * tokens))
    }

    /// What looking at the layers takes beyond what an update takes of the host's memory, whose results are given back before; none
    /// where a run does not look. The layer is looked for before residuals are there.
    pub fn look(&self, on_card: bool) -> Result<usize> {
        let c = self.settings;
        let again = c.entropy_every > 0;
        if !again && !self.finds_layer() {
            return Ok(0);
        }
        let there = match on_card {
            true => 0,
            false => {
                let update = self.activations(self.largest(c.micro_batch_tokens), false)?;
                on_host(update) - if again { update.kept } else { 0 }
            }
        };
        let longest = self.longest();
        let answer = if self.facts.longest_row.is_some() { longest } else { c.max_response };
        let [tokens, picked] = look_tokens(c, [longest, answer]);
        let layer = self.activations(Largest { tokens, trained: 1, scored: 1 }, false)?.scratch;
        let bytes = measure_bytes(self.model.config(), tokens, picked) + layer;
        Ok(bytes.saturating_sub(there))
    }

    /// What is added to the embeddings of a micro batch.
    pub fn noise(&self) -> usize {
        match self.settings.rows.neftune > 0.0 {
            true => {
                4 * self.model.config().n_embd
                    * self.largest(self.settings.micro_batch_tokens).trained
            }
            false => 0,
        }
    }

    /// Weights of a model that lie in host memory, and on a card with so many of its layers.
    pub fn weights(&self, model: &Model) -> [usize; 2] {
        let first = model.config().n_layer - self.layers_on_card(model);
        let has_output = self.settings.gpu_layers != Some(0);
        let [mut host, mut card] = [0; 2];
        let mut tied = true;
        let mut names = std::collections::HashSet::new();
        for tensor in model.engine().tensors().filter(|t| names.insert(t.name())) {
            let layer = tensor.name().strip_prefix("blk.").and_then(|rest| rest.split('.').next());
            tied &= tensor.name() != "output.weight";
            let there = match layer.and_then(|layer| layer.parse::<usize>().ok()) {
                Some(layer) => layer >= first,
                None => tensor.name() != "token_embd.weight" && has_output,
            };
            *(if there { &mut card } else { &mut host }) += tensor.n_bytes();
        }
        if tied && has_output {
            // Its second copy, for the unembedding.
            card += model.weights().embedding().n_bytes();
        }
        [host, card]
    }

    /// Layers of a model whose weights lie on a card; llama.cpp counts the output as one more, the first to go there.
    pub fn layers_on_card(&self, model: &Model) -> usize {
        let n_layer = model.config().n_layer;
        self.settings.gpu_layers.map_or(n_layer, |n| n.saturating_sub(1).min(n_layer))
    }

    /// As many sequences as so much memory for keys and values holds.
    pub fn sequences(&self, kv_bytes: usize) -> Result<RolloutSizes> {
        let options = self.settings.rollouts();
        crate::rollout::RolloutOptions { kv_bytes, ..options }.sizes(self.model.engine())
    }

    /// A teacher's forward, and its adapter.
    pub fn teacher_forward(&self, teacher: &Model, largest: Largest) -> Result<Activations> {
        let forward = Largest { trained: 1, ..largest };
        let mut acts =
            activations(teacher, &Default::default(), 1, teacher.config().n_layer, forward, false)?;
        acts.kept += 4 * self.work.teacher_params;
        Ok(acts)
    }

    /// A teacher's last hidden states as the host has them.
    pub fn teacher_hidden(&self, teacher: &Model, tokens: usize) -> usize {
        8 * teacher.config().n_embd * tokens
    }

    /// What kernels of a device lend beside a graph's tensors, for a forward and backward of a model. While an op asks for
    /// more than those before, what they had is still there.
    pub fn device_scratch(&self, model: &Model, largest: Largest, n_teacher: usize) -> usize {
        let m = model.config();
        2 * scratch_bytes(&ScratchShape {
            n_embd: m.n_embd,
            n_ff: m.most(LayerConfig::ffn_width),
            mixture: m.is_mixture(),
            n_q: m.most(LayerConfig::q_width),
            n_kv: m.most(LayerConfig::kv_width),
            n_conv: m.most(|l| l.delta.map_or(0, |d| d.spec(m.rms_eps).width())),
            delta: [
                m.most(|l| l.delta.map_or(0, |d| d.n_v)),
                m.most(|l| l.delta.map_or(0, |d| d.size)),
            ],
            n_vocab: m.n_vocab,
            tokens: largest.tokens,
            scored: largest.scored,
            n_teacher,
            precise: self.settings.precise,
            emulated: matches!(self.model.device(), Device::Emulated { .. }),
        })
    }
}

/// What activations take of the host's memory.
pub(super) fn on_host(a: Activations) -> usize {
    let freed = a.scratch / 2;
    a.kept + a.scratch + if freed <= HEAP_KEEPS { freed } else { 0 }
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

/// Bytes of files; what is no file has none.
pub(super) fn of_files(files: &[std::path::PathBuf]) -> u64 {
    files.iter().filter_map(|f| std::fs::metadata(f).ok()).map(|f| f.len()).sum()
}
