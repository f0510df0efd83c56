//! A GPU's memory budget (`--vram`): what a run takes there, and how large its micro batches and how many its
//! parallel sequences may be.
//!
//! ```text
//! peak = weights + adapter + teacher's weights + libraries + max(rollouts, updates)
//! ```
//!
//! Rollouts (keys and values, llama.cpp's graph) and updates (residuals, one layer's graph, tiles) take turns: each
//! gives its memory back before the other begins.

use serde::Serialize;

use super::sizes::{Sizes, fitting};
use crate::ggml::{ByteSize, Device, DeviceChoice};
use crate::rollout::Decoding;
use crate::train::Settings;
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
    /// Masters, gradients of two, two moments; the adapter that log-ratios are taken to.
    pub adapter_bytes: u64,
    /// Weights of a teacher, and its adapter; 0 without one of its own.
    pub teacher_bytes: u64,
    /// An allowance for CUDA's libraries.
    pub library_bytes: u64,
    /// Keys and values, llama.cpp's graph.
    pub rollout_bytes: u64,
    /// Residuals, one layer's graph, tiles; those of a teacher's forward beside them.
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
    pub(super) fn of(sizes: &Sizes<'_>) -> Result<Option<GpuPlan>> {
        let free = sizes.model.engine().free_before();
        let Some(budget) = sizes.settings.vram.map(|size| size.0).or(free) else { return Ok(None) };
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
        let demand = Demand(*sizes);
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
        self.weights_bytes + self.adapter_bytes + self.teacher_bytes + self.library_bytes + turns
    }

    /// The plan in one line.
    pub fn line(&self) -> String {
        format!(
            "GPU memory: {} of {} MiB planned ({}, then in turn rollouts of {} sequences {}, updates of {} tokens {} and \
             kept activations {})",
            mib(self.peak_bytes()),
            mib(self.budget_bytes),
            self.fixed().words(),
            self.n_seq,
            mib(self.rollout_bytes),
            self.micro_batch_tokens,
            mib(self.update_bytes),
            mib(self.kept_bytes)
        )
    }

    fn fixed(&self) -> Fixed {
        Fixed {
            weights: self.weights_bytes,
            adapter: self.adapter_bytes,
            teacher: self.teacher_bytes,
            libraries: self.library_bytes,
        }
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

/// What stays where it is as long as the run goes on, bytes.
struct Fixed {
    weights: u64,
    adapter: u64,
    teacher: u64,
    libraries: u64,
}

impl Fixed {
    fn bytes(&self) -> u64 {
        self.weights + self.adapter + self.teacher + self.libraries
    }

    fn words(&self) -> String {
        let teacher = match self.teacher {
            0 => String::new(),
            bytes => format!("teacher {}, ", mib(bytes)),
        };
        let [weights, adapter, libraries] = [self.weights, self.adapter, self.libraries].map(mib);
        format!("weights {weights}, adapter {adapter}, {teacher}libraries {libraries}")
    }
}

/// The least that a run can do with, bytes.
struct Least {
    fixed: Fixed,
    longest: usize,
    rollout: u64,
    update: u64,
}

impl Least {
    fn bytes(&self) -> u64 {
        self.fixed.bytes() + self.rollout.max(self.update)
    }

    fn words(&self) -> String {
        format!(
            "{} MiB at least ({}, then in turn one sequence of {} tokens {} and an update of as many {})",
            mib(self.bytes()),
            self.fixed.words(),
            self.longest,
            mib(self.rollout),
            mib(self.update)
        )
    }
}

/// What a run of these sizes wants of a GPU.
struct Demand<'s>(Sizes<'s>);

impl Demand<'_> {
    fn fixed(&self) -> Fixed {
        let Demand(sizes) = self;
        let own = |teacher: &&super::TeacherModel<'_>| !teacher.own_files().is_empty();
        let teacher = sizes.work.teacher.filter(own).map_or(0, |t| sizes.weights(t)[1]);
        Fixed {
            weights: sizes.weights(sizes.model)[1] as u64,
            adapter: (sizes.adapter() + sizes.reference()) as u64,
            teacher: teacher as u64,
            libraries: LIBRARIES,
        }
    }

    /// Keys and values of `n_seq` sequences, and llama.cpp's graph; logits of all sequences stand in it, and once more for
    /// drawing.
    fn rollout(&self, n_seq: usize) -> Result<u64> {
        let Demand(sizes) = self;
        if !sizes.facts.samples {
            return Ok(0);
        }
        let m = sizes.model.config();
        let most = sizes.sequences(usize::MAX)?;
        let tokens = most.n_batch.max(n_seq);
        let decoding = Decoding { tokens, keys: most.n_ctx_seq, logits: 2 * n_seq };
        // One more sequence for prompts.
        let kv = (n_seq + 1) * most.sequence_bytes * sizes.layers_on_card(sizes.model) / m.n_layer;
        Ok((kv + decoding.bytes(m)) as u64)
    }

    /// Residuals, one layer's graph and the kernels' scratch memory of a micro batch; of a teacher the same for its forward,
    /// and its hidden states before and after the norm.
    fn update(&self, tokens: usize) -> Result<u64> {
        let Demand(sizes) = self;
        let largest = sizes.largest(tokens);
        let acts = sizes.activations(largest, false)?;
        let n_teacher = sizes.work.teacher.map_or(0, |teacher| teacher.config().n_embd);
        let mut bytes =
            acts.kept + acts.scratch + sizes.device_scratch(sizes.model, largest, n_teacher);
        if let Some(teacher) = sizes.work.teacher {
            let acts = sizes.teacher_forward(teacher, largest)?;
            let hidden = 8 * n_teacher * largest.scored;
            bytes += acts.kept + acts.scratch + sizes.device_scratch(teacher, largest, 0) + hidden;
        }
        Ok(bytes as u64)
    }

    fn least(&self) -> Result<Least> {
        let (sizes, c, longest) = (&self.0, self.0.settings, self.0.longest());
        let n_seq = match c.options.kv_mib {
            Some(mib) if sizes.facts.samples => sizes.sequences(mib << 20)?.n_seq,
            _ => 1,
        };
        Ok(Least {
            fixed: self.fixed(),
            longest,
            rollout: self.rollout(n_seq)?,
            update: self.update(c.options.micro_batch_tokens.unwrap_or(longest))?,
        })
    }

    /// The largest sizes within the budget; what is needed where not even the least fits.
    fn fit(&self, budget: u64) -> Result<Result<GpuPlan, Least>> {
        let (sizes, c) = (&self.0, self.0.settings);
        let least = self.least()?;
        if least.bytes() > budget {
            return Ok(Err(least));
        }
        let room = budget - least.fixed.bytes();
        let all = sizes.sequences(usize::MAX)?;
        let most = all.n_seq.min(c.prompts_per_step * c.group);
        let n_seq = match c.options.kv_mib {
            Some(mib) if sizes.facts.samples => sizes.sequences(mib << 20)?.n_seq,
            _ => largest(1, most, 1, |n| Ok(self.rollout(n)? <= room))?,
        };
        let longest = sizes.longest();
        let micro_batch_tokens = match c.options.micro_batch_tokens {
            Some(tokens) => tokens,
            None => {
                let all = sizes.groups() * sizes.group()[0];
                let most = all.min(MOST_TOKENS).max(longest);
                largest(longest, most, TOKEN_STEP, |n| Ok(self.update(n)? <= room))?
            }
        };
        let (rollout_bytes, update_bytes) =
            (self.rollout(n_seq)?, self.update(micro_batch_tokens)?);
        let left = if c.recompute { 0 } else { room.saturating_sub(update_bytes) };
        let kept: usize = fitting(&sizes.kept(micro_batch_tokens)?, left).iter().sum();
        let kv_bytes = (n_seq + all.n_kept) * all.sequence_bytes;
        Ok(Ok(GpuPlan {
            budget_bytes: budget,
            weights_bytes: least.fixed.weights,
            adapter_bytes: least.fixed.adapter,
            teacher_bytes: least.fixed.teacher,
            library_bytes: least.fixed.libraries,
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
            let mut settings = self.0.settings.clone();
            change(&mut settings);
            let other = Demand(Sizes { settings: &settings, ..self.0 });
            Ok(other.least()?.bytes() <= budget)
        };
        let mut options = Vec::new();
        let (sizes, given) = (&self.0, &self.0.settings.options);
        if given.micro_batch_tokens.is_some() || given.kv_mib.is_some() {
            let planned = |c: &mut Settings| {
                (c.options.micro_batch_tokens, c.options.kv_mib) = (None, None);
            };
            if fits(&planned)? {
                options.push("leave out --micro-batch-tokens and --kv-mib".to_string());
            }
        }
        let shorter = std::iter::successors(Some(sizes.settings.max_response / 2), |n| Some(n / 2));
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
        for n in (0..=sizes.layers_on_card(sizes.model)).rev() {
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
pub(in crate::train) fn wants_a_gpu(vram: Option<ByteSize>, device: Device) -> Result<()> {
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
    use super::super::{Plan, Workload};
    use super::*;
    use crate::model::{AdapterShape, Lora, Model};
    use crate::train::{Facts, TrainConfig};

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
        Plan::new(&model, &config).map(|plan| plan.gpu.expect("with --vram"))
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
            let shape = AdapterShape::new(&model, &config.targets, config.rank).unwrap();
            let work = Workload::new(&model, &config, shape, None).unwrap();
            let (settings, facts) = (&settings, &facts);
            let demand = Demand(Sizes { model: &model, settings, facts, work: &work });
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
