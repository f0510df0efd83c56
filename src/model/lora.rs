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

/// Linear maps by their names on the command line and in the file, in the order of a layer. A fused map, whose
/// outputs are used in parts, may have a name of its own.
const NAMES: [(&str, &str, Option<bool>); 22] = [
    ("q", "attn_q", None),
    ("k", "attn_k", None),
    ("v", "attn_v", None),
    ("qkv", "attn_qkv", None),
    ("z", "attn_gate", None),
    ("alpha", "ssm_alpha", None),
    ("beta", "ssm_beta", None),
    ("ba", "ssm_ba", None),
    ("o", "attn_output", None),
    ("out", "ssm_out", None),
    ("gate", "ffn_gate", None),
    ("up", "ffn_up", Some(false)),
    ("gate_up", "ffn_up", Some(true)),
    ("down", "ffn_down", None),
    (SHARED, "ffn_gate_shexp", None),
    (SHARED, "ffn_up_shexp", None),
    (SHARED, "ffn_down_shexp", None),
    (EXPERTS, "ffn_gate_exps", None),
    (EXPERTS, "ffn_gate_up_exps", None),
    (EXPERTS, "ffn_up_exps", None),
    (EXPERTS, "ffn_down_exps", None),
    (ROUTER, "ffn_gate_inp", None),
];
/// A mixture's shared expert, each of the others, and what chooses among them.
const SHARED: &str = "shared";
const EXPERTS: &str = "experts";
const ROUTER: &str = "router";
/// What stands for every map of attention and FFN; experts and router only if asked, for there are many of the ones, and
/// with the other other experts are chosen.
const ALL: &str = "all";
const ON_REQUEST: [&str; 2] = [EXPERTS, ROUTER];

/// The unembedding of models that do not tie it, as a map.
const UNEMBEDDING: &str = "output";

/// A linear map that can carry an adapter: of a layer, or the unembedding.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Map {
    /// Layer, from 1; the unembedding stands behind the last.
    pub layer: usize,
    /// The middle of its GGUF name: `blk.3.` here `.weight`; or `output`.
    pub name: String,
    /// The word on the command line; none for maps outside of attention and FFN, which are not trained.
    pub target: Option<&'static str>,
    /// Inputs, ne0.
    pub n_in: usize,
    /// Outputs, ne1.
    pub n_out: usize,
    /// Experts, ne2: 1 but for a stack of maps.
    pub n_expert: usize,
    // Place in a layer.
    order: usize,
}

/// The words of the command line, each once.
fn words() -> Vec<&'static str> {
    let mut words: Vec<_> = NAMES.iter().map(|name| name.0).collect();
    words.dedup();
    words
}

impl Map {
    pub(super) fn new(layer: usize, name: &str, fused: bool, n_in: usize, n_out: usize) -> Map {
        let order =
            NAMES.iter().position(|&(_, gguf, f)| gguf == name && f.is_none_or(|f| f == fused));
        Map {
            layer,
            name: name.into(),
            target: order.map(|i| NAMES[i].0),
            n_in,
            n_out,
            n_expert: 1,
            order: order.unwrap_or(NAMES.len()),
        }
    }

    /// The same of a stack of so many experts.
    pub(super) fn stacked(self, n_expert: usize) -> Map {
        Map { n_expert, ..self }
    }

    /// The unembedding `[D, V]` of a model of `n_layer` layers.
    pub(super) fn unembedding(n_layer: usize, [d, v]: [usize; 2]) -> Map {
        Map::new(n_layer + 1, UNEMBEDDING, false, d, v)
    }

    /// `blk.{layer - 1}.{name}.weight`, layers counting from 1, or `output.weight`.
    pub fn weight(&self) -> String {
        if self.name == UNEMBEDDING {
            return format!("{UNEMBEDDING}.weight");
        }
        format!("blk.{}.{}.weight", self.layer - 1, self.name)
    }

    /// By layer, then in the order of a layer.
    pub(super) fn place(&self) -> (usize, usize) {
        (self.layer, self.order)
    }
}

/// Which maps are adapted; on the command line `all`, or words such as `q,k,v,o,gate,up,down`.
#[derive(Clone, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(into = "String", try_from = "String")]
pub struct Targets(Option<Vec<&'static str>>);

impl Targets {
    /// Every linear map of attention and FFN but experts and routers.
    pub const ALL: Targets = Targets(None);

    /// The model's maps of this choice, in the order of the layers.
    ///
    /// # Errors
    /// [`Error::Unsupported`] for a word that this model has no map for.
    pub fn of<'m>(&self, maps: &'m [Map]) -> Result<Vec<&'m Map>> {
        let known = maps.iter().filter(|map| map.target.is_some());
        let Some(words) = &self.0 else {
            let asked = |map: &&Map| !map.target.is_some_and(|word| ON_REQUEST.contains(&word));
            return Ok(known.filter(asked).collect());
        };
        if let Some(word) = words.iter().find(|w| maps.iter().all(|map| map.target != Some(**w))) {
            let mut supported: Vec<_> = known.filter_map(|map| map.target).collect();
            supported.sort_by_key(|word| NAMES.iter().position(|n| n.0 == *word));
            supported.dedup();
            return Err(Error::Unsupported {
                what: "LoRA target of this model",
                got: word.to_string(),
                supported: format!("{ALL}, or some of {}", supported.join(", ")),
            });
        }
        Ok(known.filter(|map| words.contains(&map.target.expect("filtered"))).collect())
    }
}

impl Targets {
    /// Those that any of these maps has.
    fn that_adapt(maps: &[Map]) -> Targets {
        let used = |word| maps.iter().any(|map| map.target == Some(word));
        Targets(Some(words().into_iter().filter(|word| used(word)).collect()))
    }
}

impl FromStr for Targets {
    type Err = Error;

    fn from_str(text: &str) -> Result<Targets> {
        if text.trim() == ALL {
            return Ok(Targets::ALL);
        }
        let one = |word: &str| {
            let found = NAMES.iter().find(|name| name.0 == word);
            found.map(|name| name.0).ok_or_else(|| Error::Unsupported {
                what: "LoRA target",
                got: word.into(),
                supported: format!("{ALL}, {}", words().join(", ")),
            })
        };
        let mut words: Vec<_> = text.split(',').map(|w| one(w.trim())).collect::<Result<_>>()?;
        words.sort_by_key(|word| NAMES.iter().position(|name| name.0 == *word));
        words.dedup();
        Ok(Targets(Some(words)))
    }
}

impl fmt::Display for Targets {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str(&self.0.as_ref().map_or(ALL.into(), |words| words.join(",")))
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

/// An adapter's pair on one linear map.
#[derive(Clone, Copy)]
pub struct Pair<'a> {
    /// `[n_in, r]`, of a stack `[n_in, r, E]`
    pub a: Tensor<'a>,
    /// `[r, n_out]`, of a stack `[r, n_out, E]`
    pub b: Tensor<'a>,
    /// alpha / rank
    pub scale: f32,
    /// Where gradients of A and B are accumulated; none in a forward without training.
    pub gradient: Option<(Tensor<'a>, Tensor<'a>)>,
}

/// An adapter as a layer sees it: its tensors and, in training, where their gradients go.
#[derive(Clone, Copy)]
pub struct Adapter<'a> {
    /// The pairs.
    pub lora: &'a Lora,
    /// Same layout as the adapter's tensors.
    pub gradients: Option<&'a TensorSet>,
}

impl<'a> Adapter<'a> {
    /// The pair on a layer's map, if it is adapted.
    pub fn pair(&self, layer: usize, name: &str) -> Option<Pair<'a>> {
        let slot = self.lora.find(layer, name)?;
        let (a, b) = self.lora.pair(slot);
        let gradient = self.gradients.map(|g| (g.get(2 * slot), g.get(2 * slot + 1)));
        Some(Pair { a, b, scale: self.lora.scale(), gradient })
    }
}

impl Lora {
    /// The pair on the unembedding of a model of `n_layer` layers, if it is adapted. Training leaves it as it is.
    pub(super) fn head_pair(&self, n_layer: usize) -> Option<Pair<'_>> {
        Adapter { lora: self, gradients: None }.pair(n_layer + 1, UNEMBEDDING)
    }
}

/// What is known of an adapter before there is memory for it.
#[derive(Clone, Debug, PartialEq)]
pub struct AdapterShape {
    /// Rank r.
    pub rank: usize,
    /// Alpha, where a file says so.
    pub alpha: Option<f32>,
    /// What any layer adapts.
    pub targets: Targets,
    /// Values of all pairs.
    pub n_params: usize,
}

impl AdapterShape {
    /// Of an adapter to be made.
    ///
    /// # Errors
    /// See [`Targets::of`].
    pub fn new(model: &Model, targets: &Targets, rank: usize) -> Result<AdapterShape> {
        let n_params = n_params(&slots(model, targets)?, rank);
        Ok(AdapterShape { rank, alpha: None, targets: targets.clone(), n_params })
    }

    /// Of an adapter's file.
    ///
    /// # Errors
    /// Those of [`Lora::load`].
    pub fn read(model: &Model, path: &Path) -> Result<AdapterShape> {
        let file = AdapterFile::read(path)?;
        let alpha = Some(file.alpha);
        let found = matched(model, file, &path.display().to_string())?;
        let rank = found.first().map_or(0, |(_, pair)| pair.rank);
        let maps: Vec<Map> = found.into_iter().map(|(map, _)| map).collect();
        let (targets, n_params) = (Targets::that_adapt(&maps), n_params(&maps, rank));
        Ok(AdapterShape { rank, alpha, targets, n_params })
    }
}

fn n_params(maps: &[Map], rank: usize) -> usize {
    maps.iter().map(|map| rank * (map.n_in + map.n_out) * map.n_expert).sum()
}

/// An adapter with F32 masters.
pub struct Lora {
    // Dropped before the tensors it borrows.
    live: Option<Arc<LiveAdapter>>,
    device: Device,
    rank: usize,
    alpha: f32,
    slots: Vec<Map>,
    // A of slot i at 2 i: [n_in, rank, E]; B at 2 i + 1: [rank, n_out, E].
    tensors: TensorSet,
}

impl Lora {
    /// A fresh adapter: A Gaussian with variance `1 / n_in`, B zero, so that it changes nothing yet.
    ///
    /// # Errors
    /// [`Error::Invalid`] for a rank of 0 or beyond the full rank of every weight; [`Error::Engine`] without memory.
    pub fn new(
        model: &Model,
        targets: &Targets,
        rank: usize,
        alpha: f32,
        seed: u64,
    ) -> Result<Lora> {
        let slots = slots(model, targets)?;
        // Narrow weights (the gates of a delta net have an output a head) do not hold up the others.
        let most = slots.iter().map(|s| s.n_in.min(s.n_out)).max().unwrap_or(0);
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

    /// The pairs of one layer alone, zero: what a graph of that layer looks at.
    pub(super) fn of_layer(
        model: &Model,
        targets: &Targets,
        rank: usize,
        layer: usize,
    ) -> Result<Lora> {
        let mut slots = slots(model, targets)?;
        slots.retain(|slot| slot.layer == layer);
        Lora::zeros(model.device(), slots, rank, 1.0)
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
        let alpha = file.alpha;
        let found = matched(model, file, place)?;
        let rank = found.first().map_or(0, |(_, pair)| pair.rank);
        let slots = found.iter().map(|(slot, _)| slot.clone()).collect();
        let mut lora = Lora::zeros(model.device(), slots, rank, alpha)?;
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
                weight: self.slots[i].weight(),
                rank: self.rank,
                n_in: self.slots[i].n_in,
                n_out: self.slots[i].n_out,
                n_expert: self.slots[i].n_expert,
                a: self.tensors.values(2 * i).to_vec(),
                b: self.tensors.values(2 * i + 1).to_vec(),
            })
            .collect();
        let arch = model.config().family.name.to_string();
        AdapterFile { arch, name: None, alpha: self.alpha, pairs, extra }.write(path)
    }

    fn zeros(device: Device, slots: Vec<Map>, rank: usize, alpha: f32) -> Result<Lora> {
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
                let name = self.slots[i].weight();
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

    /// The pairs that training leaves as they are, by the names of their weights: that on the unembedding.
    pub fn frozen(&self) -> Vec<String> {
        self.slots.iter().filter(|slot| slot.name == UNEMBEDDING).map(Map::weight).collect()
    }

    /// The targets that any layer adapts.
    pub fn targets(&self) -> Targets {
        Targets::that_adapt(&self.slots)
    }

    /// The adapted weights, by layer and in the order of a layer.
    pub fn slots(&self) -> &[Map] {
        &self.slots
    }

    /// Index of a slot, if that weight is adapted.
    pub fn find(&self, layer: usize, name: &str) -> Option<usize> {
        let first = self.slots.partition_point(|s| s.layer < layer);
        let mut own = self.slots[first..].iter().take_while(|s| s.layer == layer);
        own.position(|s| s.name == name).map(|i| first + i)
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

/// The pairs of a file with the maps that they adapt, in the order of a model's layers, all of one rank.
///
/// # Errors
/// [`Error::Invalid`] when one does not fit this model.
fn matched(model: &Model, file: AdapterFile, place: &str) -> Result<Vec<(Map, AdapterPair)>> {
    let file = file.with_equal_ranks();
    let arch = model.config().family.name;
    if file.arch != arch {
        let advice = "use the model that the adapter was trained on";
        return Err(Error::invalid(place, format!("an adapter for {arch}"), file.arch, advice));
    }
    let mut found: Vec<(Map, AdapterPair)> = Vec::new();
    for pair in file.pairs {
        let place = format!("{place}: {}", pair.weight);
        let Some(slot) = model.maps().iter().find(|map| map.weight() == pair.weight) else {
            if pair.weight == "output.weight" {
                let expected = format!("an unembedding of its own in {}", model.name());
                let got = "one that is tied to the token embedding";
                let advice = "an adapter of lm_head would change both: train it without lm_head";
                return Err(Error::invalid(place, expected, got, advice));
            }
            let expected = "a linear weight of this model";
            let advice = "use the model that the adapter was trained on";
            return Err(Error::invalid(place, expected, "an unknown tensor", advice));
        };
        let of = |n_in: usize, n_out: usize, n_expert: usize| match n_expert {
            1 => format!("{n_in} inputs and {n_out} outputs"),
            n => format!("{n_in} inputs and {n_out} outputs of {n} experts"),
        };
        let expected = of(slot.n_in, slot.n_out, slot.n_expert);
        let got = of(pair.n_in, pair.n_out, pair.n_expert);
        if expected != got {
            let advice = "use the model that the adapter was trained on";
            return Err(Error::invalid(place, expected, got, advice));
        }
        found.push((slot.clone(), pair));
    }
    found.sort_by_key(|(slot, _)| slot.place());
    Ok(found)
}

fn tensor_name(slot: &Map, is_b: bool) -> String {
    format!("{}.lora_{}", slot.weight(), if is_b { 'b' } else { 'a' })
}

fn shapes(slots: &[Map], rank: usize) -> Vec<(String, Shape)> {
    slots
        .iter()
        .flat_map(|s| {
            [
                (tensor_name(s, false), [s.n_in, rank, s.n_expert, 1]),
                (tensor_name(s, true), [rank, s.n_out, s.n_expert, 1]),
            ]
        })
        .collect()
}

fn slots(model: &Model, targets: &Targets) -> Result<Vec<Map>> {
    Ok(targets.of(model.maps())?.into_iter().cloned().collect())
}
