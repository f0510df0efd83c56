//! A GPU's memory budget (`--vram`): what a run takes there, and how large its micro batches and how many its
//! parallel sequences may be.
//!
//! ```text
//! peak = weights + adapter + libraries + max(rollouts, updates)
//! ```
//!
//! Rollouts (keys and values, llama.cpp's graph) and updates (residuals, one layer's graph, tiles) take turns: each
//! gives its memory back before the other begins.

use serde::Serialize;

use super::plan::{Workload, fitting};
use super::{Facts, Settings, TrainConfig};
use crate::ggml::{ByteSize, Device, DeviceChoice};
use crate::gguf::AdapterFile;
use crate::model::{Largest, LayerConfig, Lora, Model, activations, kept_bytes};
use crate::ops::{ScratchShape, scratch_bytes};
use crate::rollout::{RolloutOptions, RolloutSizes};
use crate::{Error, Result};

/// Tokens of a planned micro batch beyond which a GPU gains nothing: memory left is for kept activations.
const MOST_TOKENS: usize = 16384;
/// Planned micro batches are multiples of this.
const TOKEN_STEP: usize = 64;
/// Code of kernels, cuBLAS's workspace, llama.cpp's pool: an estimate, for no card has been measured.
const LIBRARIES: u64 = 384 << 20;
/// Planned and used memory may differ by this share before it is worth a word.
const WORTH_A_WORD: f64 = 0.15;

/// What a run takes of a GPU's memory, bytes, and what is chosen to fit the budget.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct GpuPlan {
    /// What the run may take.
    pub budget_bytes: u64,
    /// Weights that lie there.
    pub weights_bytes: u64,
    /// Masters, gradients of two, two moments.
    pub adapter_bytes: u64,
    /// An allowance for CUDA's libraries.
    pub library_bytes: u64,
    /// Keys and values, llama.cpp's graph.
    pub rollout_bytes: u64,
    /// Residuals, one layer's graph, tiles.
    pub update_bytes: u64,
    /// Activations that an update need not compute again: what is left.
    pub kept_bytes: u64,
    /// Sequences decoded at once.
    pub n_seq: usize,
    /// Their keys and values, MiB.
    pub kv_mib: usize,
    /// Tokens of a micro batch.
    pub micro_batch_tokens: usize,
}

impl GpuPlan {
    /// Plans a run on the model's GPU, or on a GPU to be thought of where `--vram` is set and the model lies in host
    /// memory; none without either.
    ///
    /// # Errors
    /// [`Error::Invalid`] where the budget is more than the GPU has free, or too little: what is needed for what, and
    /// which option would fit.
    pub fn new(model: &Model, config: &TrainConfig) -> Result<Option<GpuPlan>> {
        let facts = Facts::unread(config);
        let settings = config.clone().resolve(model, &facts)?;
        GpuPlan::of(model, &settings, &Workload::of(&settings, &facts, None))
    }

    pub(super) fn of(
        model: &Model,
        settings: &Settings,
        workload: &Workload<'_>,
    ) -> Result<Option<GpuPlan>> {
        let free = model.engine().free_before();
        let Some(budget) = settings.vram.map(|size| size.0).or(free) else { return Ok(None) };
        if let Some(free) = free.filter(|free| budget > *free) {
            let expected = format!("at most {} MiB, which nobody uses", mib(free));
            let got = format!("{} MiB", mib(budget));
            return Err(Error::invalid(
                "--vram",
                expected,
                got,
                "leave it out to take all of that",
            ));
        }
        let demand = Demand::new(model, settings, workload)?;
        match demand.fit(budget)? {
            Ok(plan) => Ok(Some(plan)),
            Err(least) => {
                let advice = demand.what_would_fit(budget)?;
                let got = format!("{} MiB", mib(budget));
                Err(Error::invalid("GPU memory (--vram)", least.words(), got, advice))
            }
        }
    }

    /// The most that is taken at once.
    pub fn peak_bytes(&self) -> u64 {
        let turns = self.rollout_bytes.max(self.update_bytes + self.kept_bytes);
        self.weights_bytes + self.adapter_bytes + self.library_bytes + turns
    }

    /// Puts into the settings what was chosen.
    pub(super) fn apply(&self, settings: &mut Settings) {
        settings.micro_batch_tokens = self.micro_batch_tokens;
        settings.kv_mib = self.kv_mib;
    }

    /// The plan in one line.
    pub fn line(&self) -> String {
        format!(
            "GPU memory: {} of {} MiB planned (weights {}, adapter {}, libraries {}, then in turn rollouts of {} sequences \
             {}, updates of {} tokens {} and kept activations {})",
            mib(self.peak_bytes()),
            mib(self.budget_bytes),
            mib(self.weights_bytes),
            mib(self.adapter_bytes),
            mib(self.library_bytes),
            self.n_seq,
            mib(self.rollout_bytes),
            self.micro_batch_tokens,
            mib(self.update_bytes),
            mib(self.kept_bytes)
        )
    }

    /// What is to be said of the memory that was used in the end; nothing where it is as planned.
    pub fn verdict(&self, used_bytes: u64) -> Option<String> {
        let off = used_bytes as f64 / self.peak_bytes() as f64 - 1.0;
        let (used, planned) = (mib(used_bytes), mib(self.peak_bytes()));
        let word = if used_bytes > self.budget_bytes {
            format!("more than the budget of {} MiB; lower --vram", mib(self.budget_bytes))
        } else if off.abs() > WORTH_A_WORD {
            format!("{:+.0} %", 100.0 * off)
        } else {
            return None;
        };
        Some(format!("GPU memory: {used} MiB were used, {planned} MiB were planned: {word}"))
    }
}

fn mib(bytes: u64) -> u64 {
    bytes.div_ceil(1 << 20)
}

/// The least that a run can do with, bytes.
struct Least {
    fixed: [u64; 3],
    longest: usize,
    rollout: u64,
    update: u64,
}

impl Least {
    fn bytes(&self) -> u64 {
        self.fixed.iter().sum::<u64>() + self.rollout.max(self.update)
    }

    fn words(&self) -> String {
        format!(
            "{} MiB at least (weights {}, adapter {}, libraries {}, then in turn one sequence of {} tokens {} and an update \
             of as many {})",
            mib(self.bytes()),
            mib(self.fixed[0]),
            mib(self.fixed[1]),
            mib(self.fixed[2]),
            self.longest,
            mib(self.rollout),
            mib(self.update)
        )
    }
}

/// What a run of these settings wants of a GPU.
struct Demand<'m> {
    model: &'m Model,
    settings: Settings,
    rank: usize,
    samples: bool,
    /// Tokens of the longest given row.
    longest_row: Option<usize>,
}

impl<'m> Demand<'m> {
    fn new(model: &'m Model, settings: &Settings, workload: &Workload<'_>) -> Result<Demand<'m>> {
        let rank = match &settings.adapter {
            Some(path) => AdapterFile::read(path)?.pairs.first().map_or(settings.rank, |p| p.rank),
            None => settings.rank,
        };
        let samples = workload.samples;
        let longest_row = (!samples).then_some(workload.group_tokens);
        Ok(Demand { model, settings: settings.clone(), rank, samples, longest_row })
    }

    fn longest(&self) -> usize {
        self.longest_row.unwrap_or(self.settings.max_prompt + self.settings.max_response)
    }

    /// Layers whose weights lie on the GPU; llama.cpp counts the output as one more, the first to go there.
    fn gpu_layers(&self) -> usize {
        let n_layer = self.model.config().n_layer;
        self.settings.gpu_layers.map_or(n_layer, |n| n.saturating_sub(1).min(n_layer))
    }

    /// Weights, adapter, libraries.
    fn fixed(&self) -> Result<[u64; 3]> {
        let first = self.model.config().n_layer - self.gpu_layers();
        let has_output = self.settings.gpu_layers != Some(0);
        let mut weights = 0;
        let mut tied = true;
        let mut names = std::collections::HashSet::new();
        for tensor in self.model.engine().tensors().filter(|t| names.insert(t.name())) {
            let layer = tensor.name().strip_prefix("blk.").and_then(|rest| rest.split('.').next());
            tied &= tensor.name() != "output.weight";
            weights += match layer.and_then(|layer| layer.parse::<usize>().ok()) {
                Some(layer) if layer >= first => tensor.n_bytes(),
                None if tensor.name() != "token_embd.weight" && has_output => tensor.n_bytes(),
                _ => 0,
            };
        }
        if tied && has_output {
            // Its second copy, for the unembedding.
            weights += self.model.weights().embedding().n_bytes();
        }
        let params = Lora::count_params(self.model, &self.settings.targets, self.rank)?;
        Ok([weights as u64, 20 * params as u64, LIBRARIES])
    }

    fn sizes(&self, kv_bytes: usize) -> Result<RolloutSizes> {
        let options = RolloutOptions { n_ctx_seq: self.longest(), kv_bytes };
        options.sizes(self.model.engine())
    }

    /// Keys and values of `n_seq` sequences, and llama.cpp's graph: the FFN is its widest place, logits of all
    /// sequences stand in it, and once more for drawing.
    fn rollout(&self, n_seq: usize) -> Result<u64> {
        if !self.samples {
            return Ok(0);
        }
        let m = self.model.config();
        let sizes = self.sizes(usize::MAX)?;
        let n_batch = sizes.n_batch.max(n_seq);
        let graph = 4 * n_batch * (3 * m.most(LayerConfig::ffn_width) + 4 * m.n_embd);
        let mask = 6 * n_batch * sizes.n_ctx_seq;
        // One more sequence for prompts.
        let kv = (n_seq + 1) * sizes.sequence_bytes * self.gpu_layers() / m.n_layer;
        Ok((kv + graph + mask + 8 * m.n_vocab * n_seq) as u64)
    }

    fn depth(&self) -> usize {
        let (c, n_layer) = (&self.settings, self.model.config().n_layer);
        let internal_only = c.steps <= c.internal_steps;
        if internal_only { c.internal_layer } else { n_layer }
    }

    /// Residuals, one layer's graph and the kernels' scratch memory of a micro batch.
    fn update(&self, tokens: usize) -> Result<u64> {
        let (c, m) = (&self.settings, self.model.config());
        let largest = Largest { tokens, trained: tokens, scored: tokens };
        let acts = activations(self.model, &c.targets, self.rank, self.depth(), largest, false)?;
        let scratch = scratch_bytes(&ScratchShape {
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
            tokens,
            scored: tokens,
            precise: c.precise,
            emulated: matches!(self.model.device(), Device::Emulated { .. }),
        });
        // While an op asks for more than those before, what they had is still there.
        Ok((acts.kept + acts.scratch + 2 * scratch) as u64)
    }

    fn least(&self) -> Result<Least> {
        let (c, longest) = (&self.settings, self.longest());
        let n_seq = match c.options.kv_mib {
            Some(mib) => self.sizes(mib << 20)?.n_seq,
            None => 1,
        };
        Ok(Least {
            fixed: self.fixed()?,
            longest,
            rollout: self.rollout(n_seq)?,
            update: self.update(c.options.micro_batch_tokens.unwrap_or(longest))?,
        })
    }

    /// The largest sizes within the budget; what is needed where not even the least fits.
    fn fit(&self, budget: u64) -> Result<Result<GpuPlan, Least>> {
        let c = &self.settings;
        let least = self.least()?;
        if least.bytes() > budget {
            return Ok(Err(least));
        }
        let room = budget - least.fixed.iter().sum::<u64>();
        let most = self.sizes(usize::MAX)?.n_seq.min(c.prompts_per_step * c.group);
        let n_seq = match c.options.kv_mib {
            Some(mib) => self.sizes(mib << 20)?.n_seq,
            None => largest(1, most, 1, |n| Ok(self.rollout(n)? <= room))?,
        };
        let groups = c.mini_batch.max(c.prompts_per_step - c.mini_batch);
        let sampled = c.max_prompt + c.group * c.max_response;
        let all = groups * self.longest_row.unwrap_or(sampled);
        let longest = self.longest();
        let micro_batch_tokens = match c.options.micro_batch_tokens {
            Some(tokens) => tokens,
            None => {
                let most = all.min(MOST_TOKENS).max(longest);
                largest(longest, most, TOKEN_STEP, |n| Ok(self.update(n)? <= room))?
            }
        };
        let (rollout_bytes, update_bytes) =
            (self.rollout(n_seq)?, self.update(micro_batch_tokens)?);
        let left = if c.recompute { 0 } else { room.saturating_sub(update_bytes) };
        let layers =
            kept_bytes(self.model, &c.targets, self.rank, self.depth(), micro_batch_tokens)?;
        let kept: usize = fitting(&layers, left).iter().sum();
        let sizes = self.sizes(usize::MAX)?;
        let kv_bytes = (n_seq + sizes.n_kept) * sizes.sequence_bytes;
        Ok(Ok(GpuPlan {
            budget_bytes: budget,
            weights_bytes: least.fixed[0],
            adapter_bytes: least.fixed[1],
            library_bytes: least.fixed[2],
            rollout_bytes,
            update_bytes,
            kept_bytes: kept as u64,
            n_seq,
            kv_mib: c.options.kv_mib.unwrap_or(kv_bytes.div_ceil(1 << 20)),
            micro_batch_tokens,
        }))
    }

    /// Options, each of which alone would make the run fit.
    fn what_would_fit(&self, budget: u64) -> Result<String> {
        let fits = |change: &dyn Fn(&mut Settings)| -> Result<bool> {
            let mut other = Demand { settings: self.settings.clone(), ..*self };
            change(&mut other.settings);
            let adapter = other.settings.adapter.is_some();
            other.rank = if adapter { self.rank } else { other.settings.rank };
            Ok(other.least()?.bytes() <= budget)
        };
        let mut options = Vec::new();
        let given = &self.settings.options;
        if given.micro_batch_tokens.is_some() || given.kv_mib.is_some() {
            let planned = |c: &mut Settings| {
                (c.options.micro_batch_tokens, c.options.kv_mib) = (None, None);
            };
            if fits(&planned)? {
                options.push("leave out --micro-batch-tokens and --kv-mib".to_string());
            }
        }
        let shorter = std::iter::successors(Some(self.settings.max_response / 2), |n| Some(n / 2));
        for n in shorter.take_while(|n| *n >= 16) {
            let cut = |c: &mut Settings| {
                c.max_response = n;
                (c.options.micro_batch_tokens, c.options.kv_mib) = (None, None);
            };
            if fits(&cut)? {
                options.push(format!("--max-response {n} would fit"));
                break;
            }
        }
        for n in (0..=self.gpu_layers()).rev() {
            if fits(&|c| c.options.gpu_layers = Some(n))? {
                options.push(format!("--gpu-layers {n} would fit"));
                break;
            }
        }
        if options.is_empty() {
            options
                .push("no single option makes it fit: use a smaller model or quantisation".into());
        }
        Ok(options.join("; "))
    }
}

/// The largest of `low`, or of the multiples of `step` up to `high`, that fits; `low` is known to.
fn largest(
    low: usize,
    high: usize,
    step: usize,
    mut fits: impl FnMut(usize) -> Result<bool>,
) -> Result<usize> {
    if high <= low || fits(high)? {
        return Ok(high.max(low));
    }
    // In steps: `good` fits, `bad` does not.
    let (mut good, mut bad) = (low / step, high.div_ceil(step));
    while bad - good > 1 {
        let middle = usize::midpoint(good, bad);
        if fits(middle * step)? {
            good = middle;
        } else {
            bad = middle;
        }
    }
    Ok((good * step).max(low))
}

/// Refuses `--vram` where no GPU computes.
pub(super) fn wants_a_gpu(vram: Option<ByteSize>, device: Device) -> Result<()> {
    match (vram, device) {
        (Some(_), Device::Cpu) => {
            let got = DeviceChoice::Cpu.to_string();
            Err(Error::invalid(
                "--vram",
                "a GPU (--device cuda)",
                got,
                "leave it out, or see --memory",
            ))
        }
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_largest_that_fits_is_found() {
        for limit in [0, 1, 63, 64, 65, 1000, 4095, 4096, 9999] {
            for (low, high, step) in [(1, 256, 1), (100, 5000, 64), (64, 64, 64), (700, 800, 64)] {
                let found = largest(low, high, step, |n| Ok(n <= limit)).unwrap();
                // By trying all.
                let all = (0..=high).filter(|n| n % step == 0 || *n == high);
                let best = all.filter(|n| *n <= limit && *n >= low).max().unwrap_or(low);
                assert_eq!(found, best, "{low}..{high} by {step}, limit {limit}");
            }
        }
    }

    fn plan(vram: &str, words: &str) -> Result<GpuPlan> {
        let model = Model::open(std::path::Path::new(crate::model::DEMO)).unwrap();
        let words = format!("train --vram {vram} {words}");
        let words: Vec<String> = words.split_whitespace().map(str::to_string).collect();
        let config = TrainConfig::from_words(&words).unwrap();
        GpuPlan::new(&model, &config).map(|plan| plan.expect("with --vram"))
    }

    #[test]
    fn more_memory_gives_larger_turns_within_the_budget() {
        let mut before = (0, 0, 0);
        for vram in ["1GiB", "2GiB", "4GiB", "8GiB", "24GiB"] {
            let p = plan(vram, "--max-response 1024 --max-prompt 256").unwrap();
            assert!(p.peak_bytes() <= p.budget_bytes, "{vram}: {}", p.line());
            let now = (p.n_seq, p.micro_batch_tokens, p.kept_bytes);
            assert!(now.0 >= before.0 && now.1 >= before.1, "{vram}: {}", p.line());
            before = now;
        }
        // 32 prompts of 8 completions, 16 of them a mini batch.
        assert_eq!((before.0, before.1), (256, MOST_TOKENS));
        assert!(before.2 > 0, "what is left keeps activations");
    }

    #[test]
    fn what_is_given_stays() {
        let p = plan("4GiB", "--micro-batch-tokens 999 --kv-mib 40").unwrap();
        assert_eq!((p.micro_batch_tokens, p.kv_mib), (999, 40));
    }

    #[test]
    fn too_little_says_what_for_and_what_would_fit() {
        let error = plan("430MiB", "--max-response 4000").unwrap_err().to_string();
        assert!(error.contains("weights") && error.contains("got 430 MiB"), "{error}");
        let fitting = error.split("--max-response ").nth(1).expect(&error);
        let n = fitting.split(' ').next().unwrap();
        plan("430MiB", &format!("--max-response {n}")).expect("it was said to fit");
        let error = plan("10MiB", "").unwrap_err().to_string();
        assert!(error.contains("smaller model"), "{error}");
    }

    #[test]
    fn an_update_takes_what_was_planned_and_gives_it_back() {
        use crate::llama::Placement;
        use crate::model::{Batch, Engine, Policy};
        for precise in [false, true] {
            // A GPU's kernels and memory, on the host.
            let device = Device::Emulated { precise };
            let file =
                concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures/golden/qwen3-q4_k.gguf");
            let placement = Placement { device, gpu_layers: None };
            let model = Model::open_on(std::path::Path::new(file), placement).unwrap();
            let config = TrainConfig { precise, ..TrainConfig::default() };
            let facts = Facts::unread(&config);
            let settings = config.clone().resolve(&model, &facts).unwrap();
            let workload = Workload::of(&settings, &facts, None);
            let demand = Demand::new(&model, &settings, &workload).unwrap();
            let lora = Lora::new(&model, &config.targets, config.rank, 32.0, 1).unwrap();
            let mut gradients = lora.zeros_like().unwrap();
            let pool = std::sync::Arc::new(crate::ggml::ThreadPool::new(1).unwrap());
            let mut engine = Engine::on(device, pool).unwrap();
            let mut batch = Batch::default();
            batch.push_group(&[1], &[&[2; 79]], model.config().n_vocab).unwrap();
            let policy = Policy::full(model.config().n_layer);
            for _ in 0..2 {
                engine.forward_to_train(&model, &lora, &batch, policy.depth()).unwrap();
                engine.score(&model, Some(&lora), &batch, policy, 1.0, true).unwrap();
                let d = vec![0.1; batch.scored.len()];
                engine.backward(&model, &lora, &mut gradients, &batch, policy, &d).unwrap();
                let (planned, used) = (demand.update(batch.len()).unwrap(), engine.bytes() as u64);
                println!("{used} bytes used, {planned} planned, precise {precise}");
                assert!(used <= planned && planned < used + used / 4, "{used} of {planned}");
                engine.release();
                assert!(engine.bytes() < used as usize / 100, "{}", engine.bytes());
            }
        }
    }

    #[test]
    fn a_word_is_said_where_the_plan_was_off() {
        let p = plan("1GiB", "").unwrap();
        let near = p.peak_bytes() + p.peak_bytes() / 10;
        assert_eq!(p.verdict(near.min(p.budget_bytes)), None);
        assert!(p.verdict(p.peak_bytes() / 2).unwrap().contains("-50 %"));
        assert!(p.verdict(p.budget_bytes + 1).unwrap().contains("--vram"));
    }
}
