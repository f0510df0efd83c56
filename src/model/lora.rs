//! Low-rank adapters: `y = W x + (alpha / rank) B A x`.
//!
//! The tensors here are at once the optimiser's masters and the tensors of the adapter that rollouts
//! decode with ([`Lora::live`]): a step of the optimiser changes the next decode, with no copy between.

use std::fmt;
use std::path::Path;
use std::str::FromStr;
use std::sync::Arc;

use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;
use rand_distr::{Distribution, StandardNormal};

use super::Model;
use crate::ggml::{Device, Shape, Tensor, TensorSet};
use crate::gguf::{AdapterFile, AdapterPair, Value};
use crate::llama::LiveAdapter;
use crate::{Error, Result};

/// A linear map of a layer that can carry an adapter.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[repr(usize)]
pub enum Target {
    /// `attn_q`
    Q,
    /// `attn_k`
    K,
    /// `attn_v`
    V,
    /// `attn_output`
    O,
    /// `ffn_gate`
    Gate,
    /// `ffn_up`
    Up,
    /// `ffn_down`
    Down,
}

impl Target {
    /// All of them, in the order of a layer.
    pub const ALL: [Target; 7] =
        [Target::Q, Target::K, Target::V, Target::O, Target::Gate, Target::Up, Target::Down];

    /// The word on the command line.
    pub fn name(self) -> &'static str {
        ["q", "k", "v", "o", "gate", "up", "down"][self as usize]
    }

    /// The middle of its GGUF name: `blk.3.` here `.weight`.
    pub fn gguf_name(self) -> &'static str {
        ["attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"]
            [self as usize]
    }

    /// `blk.{layer - 1}.{name}.weight`; layers count from 1.
    pub fn weight(self, layer: usize) -> String {
        format!("blk.{}.{}.weight", layer - 1, self.gguf_name())
    }
}

/// A set of [`Target`]s; on the command line `q,k,v,o,gate,up,down`.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(into = "String", try_from = "String")]
pub struct Targets(Vec<Target>);

impl Targets {
    /// These targets, each once, in the order of a layer.
    pub fn new(targets: impl IntoIterator<Item = Target>) -> Targets {
        let mut targets: Vec<_> = targets.into_iter().collect();
        targets.sort();
        targets.dedup();
        Targets(targets)
    }

    /// In the order of a layer.
    pub fn iter(&self) -> impl Iterator<Item = Target> {
        self.0.iter().copied()
    }
}

impl Default for Targets {
    fn default() -> Targets {
        Targets::new(Target::ALL)
    }
}

impl FromStr for Targets {
    type Err = Error;

    fn from_str(text: &str) -> Result<Targets> {
        let one = |word: &str| {
            Target::ALL.into_iter().find(|t| t.name() == word).ok_or_else(|| Error::Unsupported {
                what: "LoRA target",
                got: word.into(),
                supported: Targets::default().to_string(),
            })
        };
        let targets: Vec<_> = text.split(',').map(|w| one(w.trim())).collect::<Result<_>>()?;
        Ok(Targets::new(targets))
    }
}

impl fmt::Display for Targets {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str(&self.0.iter().map(|t| t.name()).collect::<Vec<_>>().join(","))
    }
}

impl From<Targets> for String {
    fn from(targets: Targets) -> String {
        targets.to_string()
    }
}

impl TryFrom<String> for Targets {
    type Error = Error;

    fn try_from(text: String) -> Result<Targets> {
        text.parse()
    }
}

/// One adapted weight.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Slot {
    /// Layer, from 1.
    pub layer: usize,
    /// Which of its linear maps.
    pub target: Target,
    /// Inputs of the base weight, ne0.
    pub n_in: usize,
    /// Outputs of the base weight, ne1.
    pub n_out: usize,
}

/// An adapter with F32 masters.
pub struct Lora {
    // Dropped before the tensors it borrows.
    live: Option<Arc<LiveAdapter>>,
    device: Device,
    rank: usize,
    alpha: f32,
    slots: Vec<Slot>,
    // A of slot i at 2 i: [n_in, rank]; B at 2 i + 1: [rank, n_out].
    tensors: TensorSet,
}

impl Lora {
    /// A fresh adapter: A Gaussian with variance `1 / n_in`, B zero, so that it changes nothing yet.
    ///
    /// # Errors
    /// [`Error::Invalid`] for a rank of 0 or beyond the smallest weight; [`Error::Engine`] without memory.
    pub fn new(
        model: &Model,
        targets: &Targets,
        rank: usize,
        alpha: f32,
        seed: u64,
    ) -> Result<Lora> {
        let slots = slots(model, targets);
        let most = slots.iter().map(|s| s.n_in.min(s.n_out)).min().unwrap_or(0);
        if rank == 0 || rank > most {
            return Err(Error::invalid(
                "--rank",
                format!("1 to {most}"),
                rank.to_string(),
                "choose another",
            ));
        }
        let mut lora = Lora::zeros(model.device(), slots, rank, alpha)?;
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        for slot in 0..lora.slots.len() {
            let scale = 1.0 / (lora.slots[slot].n_in as f32).sqrt();
            for value in lora.tensors.values_mut(2 * slot).iter_mut() {
                let normal: f32 = StandardNormal.sample(&mut rng);
                *value = scale * normal;
            }
        }
        Ok(lora)
    }

    /// Reads an adapter in llama.cpp's GGUF form; any type becomes F32.
    ///
    /// # Errors
    /// What [`AdapterFile::read`] and [`Lora::from_file`] say.
    pub fn load(model: &Model, path: &Path) -> Result<Lora> {
        Lora::from_file(model, AdapterFile::read(path)?, &path.display().to_string())
    }

    /// The adapter of a file that was read already; errors call it `place`. Pairs of lower rank than the
    /// others are filled up with zeros.
    ///
    /// # Errors
    /// [`Error::Invalid`] when a tensor does not fit this model.
    pub fn from_file(model: &Model, file: AdapterFile, place: &str) -> Result<Lora> {
        let file = file.with_equal_ranks();
        let arch = model.config().arch.name();
        if file.arch != arch {
            let advice = "use the model that the adapter was trained on";
            return Err(Error::invalid(place, format!("an adapter for {arch}"), file.arch, advice));
        }
        let all = slots(model, &Targets::default());
        let mut found: Vec<(Slot, AdapterPair)> = Vec::new();
        for pair in file.pairs {
            let place = format!("{place}: {}", pair.weight);
            let Some(slot) = all.iter().find(|s| s.target.weight(s.layer) == pair.weight) else {
                let expected = "a linear weight of a layer of this model";
                let advice = "use the model that the adapter was trained on";
                return Err(Error::invalid(place, expected, "an unknown tensor", advice));
            };
            if (slot.n_in, slot.n_out) != (pair.n_in, pair.n_out) {
                return Err(Error::invalid(
                    place,
                    format!("{} inputs and {} outputs", slot.n_in, slot.n_out),
                    format!("{} and {}", pair.n_in, pair.n_out),
                    "use the model that the adapter was trained on",
                ));
            }
            found.push((slot.clone(), pair));
        }
        found.sort_by_key(|(slot, _)| (slot.layer, slot.target));
        let rank = found.first().map_or(0, |(_, pair)| pair.rank);
        let slots = found.iter().map(|(slot, _)| slot.clone()).collect();
        let mut lora = Lora::zeros(model.device(), slots, rank, file.alpha)?;
        for (i, (_, pair)) in found.iter().enumerate() {
            lora.tensors.values_mut(2 * i).copy_from_slice(&pair.a);
            lora.tensors.values_mut(2 * i + 1).copy_from_slice(&pair.b);
        }
        Ok(lora)
    }

    /// Writes the adapter in llama.cpp's GGUF form, atomically; `extra` is added to its metadata.
    pub fn save(&self, model: &Model, path: &Path, extra: Vec<(String, Value)>) -> Result<()> {
        let pairs = (0..self.slots.len())
            .map(|i| AdapterPair {
                weight: self.slots[i].target.weight(self.slots[i].layer),
                rank: self.rank,
                n_in: self.slots[i].n_in,
                n_out: self.slots[i].n_out,
                a: self.tensors.values(2 * i).to_vec(),
                b: self.tensors.values(2 * i + 1).to_vec(),
            })
            .collect();
        let arch = model.config().arch.name().to_string();
        AdapterFile { arch, name: None, alpha: self.alpha, pairs, extra }.write(path)
    }

    fn zeros(device: Device, slots: Vec<Slot>, rank: usize, alpha: f32) -> Result<Lora> {
        let tensors = TensorSet::zeros(device, &shapes(&slots, rank))?;
        Ok(Lora { live: None, device, rank, alpha, slots, tensors })
    }

    /// Tensors of the same names and shapes, zeroed: gradients or moments.
    pub fn zeros_like(&self) -> Result<TensorSet> {
        TensorSet::zeros(self.device, &shapes(&self.slots, self.rank))
    }

    /// The adapter that llama.cpp decodes with; it reads this adapter's own tensors.
    pub fn live(&mut self, model: &Model) -> Result<Arc<LiveAdapter>> {
        if let Some(live) = &self.live {
            return Ok(live.clone());
        }
        let pairs: Vec<_> = (0..self.slots.len())
            .map(|i| {
                let name = self.slots[i].target.weight(self.slots[i].layer);
                (name, self.tensors.get(2 * i), self.tensors.get(2 * i + 1))
            })
            .collect();
        let memory = self.tensors.keep_alive();
        let live = Arc::new(LiveAdapter::new(model.engine(), self.alpha, &pairs, memory)?);
        self.live = Some(live.clone());
        Ok(live)
    }

    /// Rank r.
    pub fn rank(&self) -> usize {
        self.rank
    }

    /// Alpha; the low-rank term is scaled by `alpha / rank`.
    pub fn alpha(&self) -> f32 {
        self.alpha
    }

    /// `alpha / rank`, or 1 for an alpha of 0, as llama.cpp reads it.
    pub fn scale(&self) -> f32 {
        if self.alpha == 0.0 { 1.0 } else { self.alpha / self.rank as f32 }
    }

    /// The targets that any layer adapts.
    pub fn targets(&self) -> Targets {
        Targets::new(self.slots.iter().map(|s| s.target))
    }

    /// The adapted weights, by layer and in the order of a layer.
    pub fn slots(&self) -> &[Slot] {
        &self.slots
    }

    /// Index of a slot, if that weight is adapted.
    pub fn find(&self, layer: usize, target: Target) -> Option<usize> {
        self.slots.iter().position(|s| s.layer == layer && s.target == target)
    }

    /// A `[n_in, rank]` and B `[rank, n_out]` of a slot.
    pub fn pair(&self, slot: usize) -> (Tensor<'_>, Tensor<'_>) {
        (self.tensors.get(2 * slot), self.tensors.get(2 * slot + 1))
    }

    /// All tensors: A of slot i at `2 i`, B at `2 i + 1`.
    pub fn tensors(&self) -> &TensorSet {
        &self.tensors
    }

    /// All tensors, to change. What is written here, the next decode uses.
    pub fn tensors_mut(&mut self) -> &mut TensorSet {
        &mut self.tensors
    }

    /// Name of tensor `index` as in the adapter file: `blk.0.attn_q.weight.lora_a`.
    pub fn tensor_name(&self, index: usize) -> String {
        tensor_name(&self.slots[index / 2], index % 2 == 1)
    }

    /// Layer (from 1) of tensor `index`.
    pub fn tensor_layer(&self, index: usize) -> usize {
        self.slots[index / 2].layer
    }

    /// Number of trained values.
    pub fn n_params(&self) -> usize {
        (0..self.tensors.len()).map(|i| self.tensors.get(i).len()).sum()
    }
}

fn tensor_name(slot: &Slot, is_b: bool) -> String {
    format!("{}.lora_{}", slot.target.weight(slot.layer), if is_b { 'b' } else { 'a' })
}

fn shapes(slots: &[Slot], rank: usize) -> Vec<(String, Shape)> {
    slots
        .iter()
        .flat_map(|s| {
            [
                (tensor_name(s, false), [s.n_in, rank, 1, 1]),
                (tensor_name(s, true), [rank, s.n_out, 1, 1]),
            ]
        })
        .collect()
}

fn slots(model: &Model, targets: &Targets) -> Vec<Slot> {
    let mut slots = Vec::new();
    for (i, layer) in model.weights().layers.iter().enumerate() {
        for target in targets.iter() {
            let [n_in, n_out, ..] = layer.linear(target).weight.shape();
            slots.push(Slot { layer: i + 1, target, n_in, n_out });
        }
    }
    slots
}
