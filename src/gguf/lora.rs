//! LoRA adapter files, as llama.cpp reads them (its `src/llama-adapter.cpp`).
//!
//! For a weight `W: [n_in, n_out]` the file holds `W.lora_a: [n_in, rank]` and `W.lora_b: [rank, n_out]`
//! (ggml order), and `y = W x + scale * B (A x)` with `scale = alpha / rank`, or 1 when alpha is 0. Of a stack of experts
//! `[n_in, n_out, E]` both are stacked, too: `[n_in, rank, E]` and `[rank, n_out, E]`.
//!
//! Departures from llama.cpp: pairs on token embeddings (A and B swapped there) and activated LoRA are
//! refused; so are numbers that are not finite. As in llama.cpp, tensors of norms are passed over.

use std::{collections::HashSet, path::Path};

use super::{GgufFile, GgufWriter, TensorInfo, Value, shown};
use crate::{Error, Result, ggml::Type};

const ARCHITECTURE: &str = "general.architecture";
const TYPE: &str = "general.type";
const NAME: &str = "general.name";
const ADAPTER_TYPE: &str = "adapter.type";
const ALPHA: &str = "adapter.lora.alpha";
/// Present in an activated LoRA, which applies only after certain tokens.
const INVOCATION: &str = "adapter.alora.invocation_tokens";
/// Keys about the encoding of the file that was read, untrue of the one that is written.
const OF_THE_ENCODING: [&str; 3] =
    ["general.alignment", "general.file_type", "general.quantization_version"];
const RETRAIN: &str = "export the adapter again";

/// A LoRA adapter, in F32.
#[derive(Debug, Clone, PartialEq)]
pub struct AdapterFile {
    /// `general.architecture` of the model it belongs to, e.g. `qwen3`.
    pub arch: String,
    /// `general.name`.
    pub name: Option<String>,
    /// As in the file; see [`AdapterFile::scale`].
    pub alpha: f32,
    /// In file order.
    pub pairs: Vec<AdapterPair>,
    /// All other metadata, in file order.
    pub extra: Vec<(String, Value)>,
}

/// A and B of one weight.
#[derive(Debug, Clone, PartialEq)]
pub struct AdapterPair {
    /// The weight they add to, e.g. `blk.0.attn_q.weight`.
    pub weight: String,
    /// Inner dimension.
    pub rank: usize,
    /// ne0 of the weight.
    pub n_in: usize,
    /// ne1 of the weight.
    pub n_out: usize,
    /// ne2 of the weight, E: 1 but for a stack of experts.
    pub n_expert: usize,
    /// `[n_in, rank, E]`
    pub a: Vec<f32>,
    /// `[rank, n_out, E]`
    pub b: Vec<f32>,
}

impl AdapterPair {
    /// A `[n_in, rank]` and B `[rank, n_out]` of an expert; of a plain map there is expert 0 alone.
    pub fn expert(&self, expert: usize) -> (&[f32], &[f32]) {
        let (a, b) = (self.n_in * self.rank, self.rank * self.n_out);
        (&self.a[expert * a..][..a], &self.b[expert * b..][..b])
    }

    /// The shape of the weight: two extents, three of a stack.
    pub fn shape(&self) -> Vec<u64> {
        self.stacked([self.n_in, self.n_out])
    }

    fn stacked(&self, [n, m]: [usize; 2]) -> Vec<u64> {
        let all = [n as u64, m as u64, self.n_expert as u64];
        if self.n_expert == 1 { all[..2].to_vec() } else { all.to_vec() }
    }

    /// Filled up with zeros to a higher rank.
    fn widen(&mut self, rank: usize, factor: f32) {
        let mut a = Vec::with_capacity(self.n_in * rank * self.n_expert);
        for own in self.a.chunks(self.n_in * self.rank) {
            a.extend_from_slice(own);
            a.resize(a.len() + self.n_in * (rank - self.rank), 0.0);
        }
        let mut b = vec![0.0; rank * self.n_out * self.n_expert];
        for (wide, narrow) in b.chunks_mut(rank).zip(self.b.chunks(self.rank)) {
            wide.iter_mut().zip(narrow).for_each(|(wide, narrow)| *wide = factor * narrow);
        }
        (self.rank, self.a, self.b) = (rank, a, b);
    }
}

impl AdapterFile {
    /// The factor before `B A x`, as llama.cpp has it.
    pub fn scale(&self, pair: &AdapterPair) -> f32 {
        if self.alpha == 0.0 { 1.0 } else { self.alpha / pair.rank as f32 }
    }

    /// Reads an adapter; tensors of any type that ggml can convert become F32.
    ///
    /// # Errors
    /// When the file is no sound GGUF file or no LoRA adapter, a pair is incomplete or its shapes disagree,
    /// or a number is not finite.
    pub fn read(path: &Path) -> Result<AdapterFile> {
        if path.join("adapter_config.json").is_file() {
            let place = path.display().to_string();
            let advice = "make it one with import-peft DIR --base MODEL --out FILE";
            let expected = "a LoRA adapter in GGUF form";
            return Err(Error::invalid(place, expected, "a folder of PEFT's", advice));
        }
        AdapterFile::from_gguf(&GgufFile::open(path)?)
    }

    /// Reads an adapter from an open file: see [`AdapterFile::read`].
    pub fn from_gguf(file: &GgufFile) -> Result<AdapterFile> {
        for (key, expected) in [(TYPE, "adapter"), (ADAPTER_TYPE, "lora")] {
            let got = file.find::<&str>(key)?;
            if got != Some(expected) {
                return Err(Error::invalid(
                    format!("{}: key '{key}'", file.name()),
                    format!("'{expected}'"),
                    got.map_or("no such key".to_owned(), |got| format!("'{}'", shown(got))),
                    "give a LoRA adapter in GGUF form",
                ));
            }
        }
        if file.get(INVOCATION).is_some() {
            return Err(Error::Unsupported {
                what: "adapter type",
                got: "activated LoRA".to_owned(),
                supported: "lora".to_owned(),
            });
        }
        let adapter = AdapterFile {
            arch: file.architecture()?.to_owned(),
            name: file.find::<&str>(NAME)?.map(str::to_owned),
            alpha: file.find(ALPHA)?.unwrap_or(0.0),
            pairs: pairs(file)?,
            extra: file
                .metadata()
                .filter(|(key, _)| !is_own(key) && !OF_THE_ENCODING.contains(key))
                .map(|(key, value)| (key.to_owned(), value.clone()))
                .collect(),
        };
        adapter.check(file.name())?;
        Ok(adapter)
    }

    /// The same adapter with one rank for all pairs, the largest: the others are filled up with zeros, and
    /// their B scaled so that `alpha / rank` stays true.
    pub fn with_equal_ranks(mut self) -> AdapterFile {
        let rank = self.pairs.iter().map(|pair| pair.rank).max().unwrap_or(0);
        for pair in self.pairs.iter_mut().filter(|pair| pair.rank < rank) {
            let factor = if self.alpha == 0.0 { 1.0 } else { rank as f32 / pair.rank as f32 };
            pair.widen(rank, factor);
        }
        self
    }

    /// Writes the adapter in F32, whole or not at all: see [`super::write_atomically`].
    ///
    /// # Errors
    /// When shapes and data disagree, a number is not finite, a name is not one that ggml takes, or the
    /// system refuses.
    pub fn write(&self, path: &Path) -> Result<()> {
        self.write_as(path, Type::F32).map(drop)
    }

    /// [`AdapterFile::write`] in another type. A tensor whose rows are no whole blocks of it becomes F16;
    /// gives the names of those.
    ///
    /// # Errors
    /// Also when a number is beyond the range of the type.
    pub fn write_as(&self, path: &Path, ty: Type) -> Result<Vec<String>> {
        self.check(&path.display().to_string())?;
        let mut out = GgufWriter::new();
        out.metadata(ARCHITECTURE, self.arch.as_str())?;
        out.metadata(TYPE, "adapter")?;
        out.metadata(ADAPTER_TYPE, "lora")?;
        out.metadata(ALPHA, self.alpha)?;
        if let Some(name) = &self.name {
            out.metadata(NAME, name.as_str())?;
        }
        for (key, value) in &self.extra {
            out.metadata(key, value.clone())?;
        }
        let mut in_f16 = Vec::new();
        for pair in &self.pairs {
            for (half, shape, data) in [
                ("lora_a", [pair.n_in, pair.rank], &pair.a),
                ("lora_b", [pair.rank, pair.n_out], &pair.b),
            ] {
                let name = format!("{}.{half}", pair.weight);
                let fits = shape[0].is_multiple_of(ty.block_size());
                let own = if fits { ty } else { Type::F16 };
                if !fits {
                    in_f16.push(name.clone());
                }
                let place = format!("tensor '{}' in {own}", shown(&name));
                let stacked = pair.stacked(shape);
                out.tensor(&name, own, &stacked, move |sink| {
                    let mut bytes = vec![0; own.row_bytes(data.len()).unwrap_or(0)];
                    own.quantize(data, shape[0], None, &mut bytes).map_err(|got| {
                        Error::invalid(place, "numbers that it can hold", got, "use f32 or bf16")
                    })?;
                    sink.write(&bytes)
                })?;
            }
        }
        out.write(path)?;
        Ok(in_f16)
    }

    /// What holds for every adapter, read or to be written.
    fn check(&self, file: &str) -> Result<()> {
        if !self.alpha.is_finite() {
            let place = format!("{file}: key '{ALPHA}'");
            return Err(Error::invalid(place, "a finite number", self.alpha.to_string(), RETRAIN));
        }
        if self.pairs.is_empty() {
            return Err(Error::invalid(file, "at least one LoRA pair", "none", RETRAIN));
        }
        for pair in &self.pairs {
            for (suffix, data, expected) in [
                ("lora_a", &pair.a, pair.n_in.checked_mul(pair.rank)),
                ("lora_b", &pair.b, pair.rank.checked_mul(pair.n_out)),
            ] {
                let expected = expected.and_then(|n| n.checked_mul(pair.n_expert));
                let wrong = |expected: String, got: String| {
                    let place = format!("{file}: tensor '{}.{suffix}'", shown(&pair.weight));
                    Err(Error::invalid(place, expected, got, RETRAIN))
                };
                if expected != Some(data.len()) {
                    let (n_in, rank, n_out) = (pair.n_in, pair.rank, pair.n_out);
                    return wrong(
                        format!("data for rank {rank}, {n_in} inputs, {n_out} outputs"),
                        format!("{} numbers", data.len()),
                    );
                }
                if let Some(i) = data.iter().position(|x| !x.is_finite()) {
                    return wrong("finite numbers".to_owned(), format!("{} at index {i}", data[i]));
                }
            }
        }
        Ok(())
    }
}

fn is_own(key: &str) -> bool {
    [ARCHITECTURE, TYPE, NAME, ADAPTER_TYPE, ALPHA].contains(&key)
}

/// The file's pairs in the order of their A.
fn pairs(file: &GgufFile) -> Result<Vec<AdapterPair>> {
    let mut pairs = Vec::new();
    let mut matched = HashSet::new();
    for a in file.tensors() {
        let Some(weight) = a.name.strip_suffix(".lora_a") else { continue };
        let b = half(file, weight, ".lora_b")?;
        matched.insert(b.name.as_str());
        pairs.push(pair(file, weight, a, b)?);
    }
    for tensor in file.tensors() {
        let name = tensor.name.as_str();
        if let Some(weight) = name.strip_suffix(".lora_b") {
            if !matched.contains(name) {
                half(file, weight, ".lora_a")?;
            }
        } else if !name.ends_with(".lora_a") && !name.ends_with("_norm.weight") {
            return Err(Error::invalid(
                format!("{}: tensor '{}'", file.name(), shown(name)),
                "a name that ends in .lora_a or .lora_b",
                "neither",
                "give a LoRA adapter in GGUF form",
            ));
        }
    }
    Ok(pairs)
}

/// One half of a weight's pair.
fn half<'a>(file: &'a GgufFile, weight: &str, suffix: &str) -> Result<&'a TensorInfo> {
    file.tensor(&format!("{weight}{suffix}")).ok_or_else(|| {
        Error::invalid(
            format!("{}: LoRA of '{}'", file.name(), shown(weight)),
            "both .lora_a and .lora_b",
            format!("no {suffix}"),
            RETRAIN,
        )
    })
}

fn pair(file: &GgufFile, weight: &str, a: &TensorInfo, b: &TensorInfo) -> Result<AdapterPair> {
    if weight.ends_with("token_embd.weight") {
        return Err(Error::Unsupported {
            what: "LoRA on weight",
            got: weight.to_owned(),
            supported: "linear layers".to_owned(),
        });
    }
    match (stack(a), stack(b)) {
        (Some([n_in, rank, n_expert]), Some([b_rank, n_out, b_expert]))
            if rank == b_rank && n_expert == b_expert =>
        {
            Ok(AdapterPair {
                weight: weight.to_owned(),
                rank,
                n_in,
                n_out,
                n_expert,
                a: file.dequantize(a)?,
                b: file.dequantize(b)?,
            })
        }
        _ => Err(Error::invalid(
            format!("{}: LoRA of '{}'", file.name(), shown(weight)),
            "A [n_in, rank] and B [rank, n_out], or both for as many experts",
            format!("A {:?} and B {:?}", a.shape, b.shape),
            RETRAIN,
        )),
    }
}

/// The shape of a matrix, a vector or a stack; `None` when there are more dimensions than three.
fn stack(tensor: &TensorInfo) -> Option<[usize; 3]> {
    let ne = |i: usize| tensor.shape.get(i).map_or(1, |ne| *ne as usize);
    (ne(3) == 1).then(|| [ne(0), ne(1), ne(2)])
}
