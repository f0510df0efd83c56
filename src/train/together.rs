//! What ranks do together at the ends of things: the gradient of a mini batch, a look at each other before the first
//! step and after each one.
//!
//! The gradient is the sum of its micro batches' gradients, each computed by itself and added in their order, so that it has the same bits whoever computed which.

use super::learner::Learner;
use super::micro_batch::MicroBatch;
use super::record::Communication;
use super::{Observer, Trainer};
use crate::ggml::{Arena, Graph};
use crate::team::Fact;
use crate::{Error, Result};

/// Bytes of gradients that a rank keeps, about, before they are added up.
pub(super) const KEPT_BYTES: usize = 512 << 20;

/// A sum in the making.
pub(super) struct GradientSum {
    size: usize,
    /// Tensors of the layers that the policy reaches, and their values in all.
    tensors: Vec<usize>,
    n_values: usize,
    /// Gradients that a rank keeps, about.
    kept_most: usize,
    /// In a team: those of this rank that are not added yet, and the sum so far.
    kept: Vec<Vec<f32>>,
    sum: Vec<f32>,
}

impl GradientSum {
    /// An empty sum, of a policy of this depth.
    pub fn new(learner: &Learner<'_>, depth: usize) -> GradientSum {
        let all = 0..learner.gradients.len();
        let tensors: Vec<usize> = all.filter(|&i| learner.lora.tensor_layer(i) <= depth).collect();
        let n_values: usize = tensors.iter().map(|&i| learner.gradients.get(i).len()).sum();
        let kept_most = (KEPT_BYTES / (4 * n_values.max(1))).max(1);
        // -0 + x is x, whatever x is.
        let sum = if learner.team.is_alone() { Vec::new() } else { vec![-0.0; n_values] };
        let size = learner.team.size();
        GradientSum { size, tensors, n_values, kept_most, kept: Vec::new(), sum }
    }

    /// The micro batches whose gradients are added up together, each run with the number of its first.
    pub fn waves<'p>(&self, packed: &'p [MicroBatch]) -> Vec<(usize, &'p [MicroBatch])> {
        let n = match self.size {
            1 => packed.len(),
            size => size * self.kept_most,
        };
        packed.chunks(n.max(1)).enumerate().map(|(i, wave)| (i * n, wave)).collect()
    }

    /// Whether a rank that took so many of a wave may take another.
    pub fn room(&self, taken: usize) -> bool {
        self.size == 1 || taken < 2 * self.kept_most
    }

    /// Takes the gradient in the learner's `part`, of micro batch `number`.
    pub fn keep(&mut self, learner: &mut Learner<'_>, number: usize) -> Result<()> {
        if self.size > 1 {
            let mut values = Vec::with_capacity(self.n_values);
            self.tensors.iter().for_each(|&i| values.extend_from_slice(&learner.part.values(i)));
            self.kept.push(values);
            return Ok(());
        }
        if number == 0 {
            std::mem::swap(&mut learner.gradients, &mut learner.part);
            return Ok(());
        }
        let arena = Arena::new(4 * self.tensors.len() + 1);
        let mut graph = Graph::new(&arena);
        for &i in &self.tensors {
            let (sum, part) = (learner.gradients.get(i), learner.part.get(i));
            graph.store(arena.add(sum, part), sum);
        }
        learner.engine.executor().run(&graph, &[]).map(|_| ())
    }

    /// Adds what the ranks keep of a wave; `by`: the rank that has each micro batch.
    pub fn add(&mut self, learner: &Learner<'_>, by: &[usize]) -> Result<()> {
        if self.size > 1 {
            learner.team.sum(by, &self.kept, &mut self.sum)?;
            self.kept.clear();
        }
        Ok(())
    }

    /// Leaves the sum in the learner's gradients.
    pub fn finish(self, learner: &mut Learner<'_>) {
        if self.size == 1 {
            return;
        }
        let mut rest = self.sum.as_slice();
        for &i in &self.tensors {
            let mut values = learner.gradients.values_mut(i);
            let (own, later) = rest.split_at(values.len());
            values.copy_from_slice(own);
            rest = later;
        }
    }
}

/// What all ranks know at the end of a step.
pub(super) struct Ended {
    /// Tokens that went through backwards, of all ranks.
    pub backward_tokens: usize,
    pub communication: Option<Communication>,
}

impl Trainer<'_> {
    /// Looks at the end of a step whether all ranks have the same adapter.
    ///
    /// # Errors
    /// One that has another.
    pub(super) fn end_together(&mut self, step: u64) -> Result<Ended> {
        let backward_tokens = self.learner.engine.take_work().backward_tokens;
        if self.team.is_alone() {
            return Ok(Ended { backward_tokens, communication: None });
        }
        let all = self.team.each((backward_tokens as u64, self.adapter_sum()))?;
        if let Some(other) = all.iter().position(|(_, sum)| *sum != all[0].1) {
            return Err(Error::engine(
                format!("step {step}"),
                format!(
                    "{} has another adapter than {} after it",
                    self.team.name(other),
                    self.team.name(0)
                ),
                "their machines compute differently: use machines of one kind",
            ));
        }
        let cost = self.team.take_cost();
        let communication = Communication {
            ranks: self.team.size(),
            comm_s: cost.seconds as f32,
            comm_wait_s: cost.waited as f32,
            comm_bytes: cost.bytes,
        };
        let backward_tokens = all.iter().map(|(tokens, _)| *tokens as usize).sum();
        Ok(Ended { backward_tokens, communication: Some(communication) })
    }

    /// CRC-32C of the adapter's values.
    fn adapter_sum(&self) -> u32 {
        let tensors = self.learner.lora.tensors();
        (0..tensors.len()).fold(0, |sum, i| {
            let bytes: Vec<u8> = tensors.values(i).iter().flat_map(|x| x.to_le_bytes()).collect();
            crc32c::crc32c_append(sum, &bytes)
        })
    }

    /// Looks before the first step whether all ranks are the same in whatever the run's bytes depend on.
    ///
    /// # Errors
    /// The first rank that is not, by name.
    pub(super) fn begin_together(&mut self, observer: &mut dyn Observer) -> Result<()> {
        if self.team.is_alone() {
            return Ok(());
        }
        let mut train = self.settings.written();
        // Only the first rank writes.
        train.out = None;
        let threads = self.settings.threads.to_string();
        let mut facts = vec![
            Fact::program()?,
            Fact::new("threads", threads, "say how many with --threads, the same for every rank"),
        ];
        let copy = |name: &str| format!("copy the first rank's {name} there");
        let inputs = self.inputs.iter();
        facts.extend(inputs.map(|(name, sum)| {
            Fact::new(format!("SHA-256 of the {name}"), sum.clone(), copy(name))
        }));
        let advice = "start all ranks with the same options";
        for (name, value) in train.table()? {
            facts.push(Fact::new(format!("--{name}"), value.to_string(), advice));
        }
        facts.push(Fact::new("adapter", self.adapter_sum().to_string(), copy("adapter")));
        self.team.alike(&facts)?;
        match self.team.difference(&[Fact::processor()])? {
            Some(mixed) if self.allow_mixed => observer.note(&format!("warning: {mixed}")),
            _ => self.team.alike(&[Fact::processor()])?,
        }
        self.team.share_stop(&self.stop);
        self.team.take_cost();
        observer.note(&format!(
            "{} ranks: {}",
            self.team.size(),
            (0..self.team.size()).map(|r| self.team.name(r)).collect::<Vec<_>>().join(", ")
        ));
        Ok(())
    }
}
