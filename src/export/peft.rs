//! LoRA in the form of Hugging Face's PEFT: a folder with `adapter_model.safetensors` and
//! `adapter_config.json`.
//!
//! For a linear layer PEFT holds `lora_A.weight: [r, n_in]` and `lora_B.weight: [n_out, r]` (rows first, so
//! the same bytes as ggml's `[n_in, r]` and `[r, n_out]`), applied with `lora_alpha / r`.
//!
//! Rows and columns are moved where GGUF has them in another order (`peft_order.rs`).
//! Numbers are moved, never changed: what is written in F32 and read again is the same, bit by bit.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::path::Path;

use safetensors::tensor::{Dtype, SafeTensors, TensorView};
use serde_json::{Value as Json, json};

use super::peft_config::{Config, config_json, read_config};
use super::peft_joined;
use super::peft_order::{Order, ValueHeads};
use crate::error::json_fault;
use crate::ggml::MappedFile;
use crate::gguf::{AdapterFile, AdapterPair, GgufFile, GgufSet, Value, write_atomically};
use crate::model::Family;
use crate::{Error, Result};

/// Tensors of a PEFT folder.
const WEIGHTS: &str = "adapter_model.safetensors";
/// Tensors of a folder that an older PEFT wrote; not read, for a pickle is a program.
const PICKLE: &str = "adapter_model.bin";
/// Settings of a PEFT folder.
const CONFIG: &str = "adapter_config.json";
/// What this program knows besides, beside them; PEFT does not look at it.
const OWN: &str = "bupo.json";
const PREFIX: &str = "base_model.model.";
/// The unembedding, PEFT's `lm_head`.
const OUTPUT: &str = "output.weight";

/// What of the base a conversion depends on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PeftBase {
    /// Architecture.
    pub arch: &'static Family,
    /// Layers.
    pub n_layer: usize,
    /// Query heads, where rows are permuted within them.
    pub n_head: usize,
    /// Key/value heads, likewise.
    pub n_head_kv: usize,
    /// Heads of its delta nets, if it has any.
    pub value_heads: Option<ValueHeads>,
}

impl PeftBase {
    /// Reads a GGUF model's metadata.
    ///
    /// # Errors
    /// Another architecture than those that open, or head counts that are missing.
    pub fn from_gguf(file: &GgufFile) -> Result<PeftBase> {
        let arch = Family::of_name(file.architecture()?)?;
        let key = |name: &str| format!("{arch}.attention.{name}");
        // Asked for where it is needed: it may differ from layer to layer elsewhere.
        let (mut n_head, mut n_head_kv) = (0, 0);
        if arch.permuted {
            n_head = file.require(&key("head_count"))?;
            n_head_kv = file.find(&key("head_count_kv"))?.unwrap_or(n_head);
        }
        let n_layer = file.require(&format!("{arch}.block_count"))?;
        let value_heads = ValueHeads::from_gguf(file, arch)?;
        Ok(PeftBase { arch, n_layer, n_head, n_head_kv, value_heads })
    }

    /// Heads of its delta nets, if two of their maps are one module of Hugging Face's; their order is the same there.
    fn joined(&self) -> Option<ValueHeads> {
        self.value_heads.filter(|_| self.arch.grouped_values)
    }

    /// What GGUF has in another order in a weight, if it does.
    fn order(&self, weight: &str) -> Option<Order> {
        match self.arch.permuted {
            true if weight.ends_with(".attn_q.weight") => {
                Some(Order::Rotated { heads: self.n_head })
            }
            true if weight.ends_with(".attn_k.weight") => {
                Some(Order::Rotated { heads: self.n_head_kv })
            }
            _ if self.arch.grouped_values => None,
            _ => Order::of_values(self.value_heads?, weight),
        }
    }
}

/// `blk.3.attn_q.weight` -> `model.layers.3.self_attn.q_proj`.
fn module(family: &Family, weight: &str) -> Option<String> {
    if weight == OUTPUT {
        return Some("lm_head".into());
    }
    let (layer, name) = weight.strip_prefix("blk.")?.strip_suffix(".weight")?.split_once('.')?;
    let (_, module) = modules(family).find(|(gguf, _)| *gguf == name)?;
    Some(format!("model.layers.{}.{module}", layer.parse::<u32>().ok()?))
}

/// Where Hugging Face's classes have the layers: text models; text parts of others, new and old.
const LAYERS: [&str; 3] =
    ["model.layers.", "model.language_model.layers.", "language_model.model.layers."];

/// `model.layers.3.self_attn.q_proj` -> `blk.3.attn_q.weight`.
fn weight(family: &Family, module: &str) -> Option<String> {
    if module == "lm_head" {
        return Some(OUTPUT.into());
    }
    let rest = LAYERS.iter().find_map(|prefix| module.strip_prefix(prefix))?;
    let (layer, name) = rest.split_once('.')?;
    let (gguf, _) = modules(family).find(|(_, module)| *module == without_expert(name).0)?;
    Some(format!("blk.{}.{gguf}.weight", layer.parse::<u32>().ok()?))
}

/// `mlp.experts.7.gate_proj` -> `mlp.experts.*.gate_proj` and 7; other names as they are.
fn without_expert(module: &str) -> (String, Option<usize>) {
    let parts: Vec<&str> = module.split('.').collect();
    let [.., "experts", expert, map] = parts[..] else { return (module.into(), None) };
    let Ok(expert) = expert.parse() else { return (module.into(), None) };
    let before = &module[..module.len() - parts[parts.len() - 2].len() - map.len() - 1];
    (format!("{before}*.{map}"), Some(expert))
}

/// The pairs of each expert by itself; of a plain map the one that it is.
fn one_by_one(pair: &AdapterPair) -> Vec<AdapterPair> {
    let one = |expert| {
        let (a, b) = pair.expert(expert);
        let AdapterPair { weight, rank, n_in, n_out, .. } = pair.clone();
        AdapterPair { weight, rank, n_in, n_out, n_expert: 1, a: a.to_vec(), b: b.to_vec() }
    };
    (0..pair.n_expert).map(one).collect()
}

/// Pairs of one map's experts, in their order, as one; all of one rank and scale.
fn stack(place: &str, mut found: Vec<(usize, (AdapterPair, f64))>) -> Result<(AdapterPair, f64)> {
    found.sort_by_key(|(expert, _)| *expert);
    let (_, (first, scale)) = found[0].clone();
    let like_first = |(i, (expert, (pair, own))): (usize, &(usize, (AdapterPair, f64)))| {
        let shape = (pair.rank, pair.n_in, pair.n_out);
        i == *expert && *own == scale && shape == (first.rank, first.n_in, first.n_out)
    };
    if let Some(i) = found.iter().enumerate().position(|expert| !like_first(expert)) {
        return Err(Error::invalid(
            format!("{place}: expert {i} of {}", first.weight),
            "a pair of each expert from 0 on, all of one rank, shape and alpha",
            "none, or another",
            "adapt all experts alike",
        ));
    }
    let all = |half: fn(&AdapterPair) -> &[f32]| -> Vec<f32> {
        found.iter().flat_map(|(_, (pair, _))| half(pair)).copied().collect()
    };
    let (a, b) = (all(|pair| &pair.a), all(|pair| &pair.b));
    Ok((AdapterPair { n_expert: found.len(), a, b, ..first }, scale))
}

/// Linear maps by their names in GGUF and in Hugging Face's modules, in the order of a layer.
const MODULES: [(&str, &str); 7] = [
    ("attn_q", "self_attn.q_proj"),
    ("attn_k", "self_attn.k_proj"),
    ("attn_v", "self_attn.v_proj"),
    ("attn_output", "self_attn.o_proj"),
    ("ffn_gate", "mlp.gate_proj"),
    ("ffn_up", "mlp.up_proj"),
    ("ffn_down", "mlp.down_proj"),
];

/// The family's own names first.
fn modules(family: &Family) -> impl Iterator<Item = (&'static str, &'static str)> {
    family.modules.iter().copied().flatten().copied().chain(MODULES)
}

/// The pair's A and B in the other order where the architecture asks for it.
fn reordered<'p>(
    base: &PeftBase,
    pair: &'p AdapterPair,
    to_gguf: bool,
    place: &str,
) -> Result<[Cow<'p, [f32]>; 2]> {
    let Some(order) = base.order(&pair.weight) else {
        return Ok([Cow::Borrowed(&pair.a), Cow::Borrowed(&pair.b)]);
    };
    order.apply(pair, to_gguf).ok_or_else(|| {
        Error::invalid(
            format!("{place}: {}", pair.weight),
            order.expected(),
            format!("{} inputs and {} outputs", pair.n_in, pair.n_out),
            "use the model that the adapter was trained on",
        )
    })
}

/// An adapter of a delta net with other heads than the base's.
fn not_of(base: &PeftBase, place: &str) -> Error {
    let expected = match base.joined() {
        Some(ValueHeads { n_k, n_v, size }) => {
            format!("{n_k} key heads and {n_v} value heads of {size}")
        }
        None => "no delta nets".into(),
    };
    let advice = "use the model that the adapter was trained on";
    Error::invalid(place, expected, "another number of outputs", advice)
}

/// Writes a PEFT folder; `base_name` is what PEFT will look for as the base model.
///
/// # Errors
/// A pair on a weight that PEFT's modules do not have; what the system refuses.
pub fn write_peft(
    adapter: &AdapterFile,
    base: &PeftBase,
    base_name: &str,
    folder: &Path,
) -> Result<()> {
    let place = folder.display().to_string();
    let mut tensors: BTreeMap<String, (Vec<usize>, Vec<u8>)> = BTreeMap::new();
    let mut modules = Vec::new();
    let bytes = |x: &[f32]| x.iter().flat_map(|x| x.to_le_bytes()).collect::<Vec<u8>>();
    let joined = base
        .joined()
        .map(|heads| peft_joined::join(adapter, heads).ok_or_else(|| not_of(base, &place)));
    let joined = joined.transpose()?;
    for pair in joined.as_ref().unwrap_or(&adapter.pairs) {
        let module = module(base.arch, &pair.weight).ok_or_else(|| Error::Unsupported {
            what: "PEFT module for weight",
            got: pair.weight.clone(),
            supported:
                "maps that are modules of their own in Hugging Face's model, and output.weight"
                    .into(),
        })?;
        for (expert, pair) in one_by_one(pair).into_iter().enumerate() {
            let module = module.replace('*', &expert.to_string());
            let [a, b] = reordered(base, &pair, false, &place)?;
            let name = |half| format!("{PREFIX}{module}.lora_{half}.weight");
            tensors.insert(name('A'), (vec![pair.rank, pair.n_in], bytes(&a)));
            tensors.insert(name('B'), (vec![pair.n_out, pair.rank], bytes(&b)));
            modules.push((module, pair.rank));
        }
    }
    let refused = |e: safetensors::SafeTensorError| {
        Error::engine(format!("writing {place}"), e.to_string(), "report it")
    };
    let views = tensors
        .iter()
        .map(|(name, (shape, bytes))| {
            Ok((name.as_str(), TensorView::new(Dtype::F32, shape.clone(), bytes)?))
        })
        .collect::<Result<Vec<_>, _>>()
        .map_err(refused)?;
    let format = [("format".to_string(), "pt".to_string())].into();
    let weights = safetensors::serialize(views, Some(format)).map_err(refused)?;
    let config = config_json(&modules, adapter.alpha, base_name, base.n_layer);
    let own: serde_json::Map<String, Json> =
        adapter.extra.iter().filter_map(|(k, v)| Some((k.clone(), to_json(v)?))).collect();
    let pretty = |value: &Json| serde_json::to_vec_pretty(value).expect("plain JSON");
    std::fs::create_dir_all(folder).map_err(Error::io("create", folder))?;
    for (name, bytes) in
        [(WEIGHTS, weights), (OWN, pretty(&Json::Object(own))), (CONFIG, pretty(&config))]
    {
        let path = folder.join(name);
        write_atomically(&path, |out| {
            std::io::Write::write_all(out, &bytes).map_err(Error::io("write", &path))
        })?;
    }
    Ok(())
}

/// Reads a PEFT folder as an adapter for `base`; BF16 and F16 become F32.
///
/// # Errors
/// No such files, another kind of adapter, modules or settings that GGUF adapters do not have, shapes that
/// disagree.
pub fn read_peft(folder: &Path, base: &PeftBase) -> Result<AdapterFile> {
    let config = read_config(&folder.join(CONFIG))?;
    let path = folder.join(WEIGHTS);
    if !path.exists() && folder.join(PICKLE).exists() {
        let advice = "save it again with save_pretrained(.., safe_serialization=True)";
        return Err(Error::invalid(folder.display().to_string(), WEIGHTS, PICKLE, advice));
    }
    let bytes = MappedFile::open(&path)?;
    let place = path.display().to_string();
    let file = tensors(&bytes, &place)?;
    let mut halves: BTreeMap<String, [Option<TensorView>; 2]> = BTreeMap::new();
    for (name, view) in file.tensors() {
        if is_head_copy(&name) {
            continue;
        }
        let (module, half) = split_name(base.arch, &name).ok_or_else(|| Error::Unsupported {
            what: "PEFT tensor",
            got: format!("{name} in {place}"),
            supported: "lora_A and lora_B of linear layers".into(),
        })?;
        halves.entry(module.to_owned()).or_default()[half] = Some(view);
    }
    let mut pairs = Vec::with_capacity(halves.len());
    let mut experts: BTreeMap<String, Vec<_>> = BTreeMap::new();
    for (module, halves) in &halves {
        let [Some(a), Some(b)] = halves else {
            let got = if halves[0].is_some() { "no lora_B" } else { "no lora_A" };
            let place = format!("{place}: {module}");
            return Err(Error::invalid(place, "lora_A and lora_B", got, "write it again"));
        };
        if !config.adapts(module) {
            let expected =
                "modules that target_modules, exclude_modules and layers_to_transform leave";
            let place = format!("{place}: {module}");
            let got = "one that PEFT would pass over";
            return Err(Error::invalid(place, expected, got, "mend adapter_config.json"));
        }
        let weight = weight(base.arch, module).expect("names were checked");
        let expert = without_expert(module).1;
        let pair = read_pair(&place, module, weight.clone(), [a, b], &config)?;
        match expert {
            None if peft_joined::is_joined(&pair.0) => {
                let parts = base.joined().and_then(|heads| peft_joined::split(&pair.0, heads));
                let parts = parts.ok_or_else(|| not_of(base, &format!("{place}: {module}")))?;
                pairs.extend(parts.map(|part| (part, pair.1)));
            }
            None => pairs.push(pair),
            Some(expert) => experts.entry(weight).or_default().push((expert, pair)),
        }
    }
    for found in experts.into_values() {
        pairs.push(stack(&place, found)?);
    }
    if pairs.is_empty() {
        return Err(Error::invalid(place, "lora_A and lora_B tensors", "none", "write it again"));
    }
    // The order of a model: by layer, then as in a layer.
    pairs.sort_by_key(|(pair, _)| order(&pair.weight));
    // One alpha for all, as GGUF has it; a pair that PEFT scales otherwise has the rest in its B. An alpha
    // of 0 would mean a scale of 1 there: where PEFT has it, B is 0.
    let alphas = pairs.iter().map(|(pair, scale)| scale * pair.rank as f64);
    let alpha = alphas.into_iter().find(|alpha| (*alpha as f32).is_normal());
    let alpha = alpha.unwrap_or(pairs[0].0.rank as f64);
    let mut adapter = AdapterFile {
        arch: base.arch.name.into(),
        name: None,
        alpha: alpha as f32,
        pairs: Vec::with_capacity(pairs.len()),
        extra: read_own(&folder.join(OWN))?,
    };
    for (mut pair, scale) in pairs {
        let rest = scale * pair.rank as f64 / alpha;
        if (rest - 1.0).abs() > 1e-9 {
            pair.b.iter_mut().for_each(|x| *x = (rest * *x as f64) as f32);
        }
        let [a, b] = reordered(base, &pair, true, &place)?.map(Cow::into_owned);
        adapter.pairs.push(AdapterPair { a, b, ..pair });
    }
    Ok(adapter)
}

fn tensors<'b>(bytes: &'b [u8], place: &str) -> Result<SafeTensors<'b>> {
    SafeTensors::deserialize(bytes).map_err(|e| {
        let advice = "write the adapter again with save_pretrained";
        Error::invalid(place, "a safetensors file", e.to_string(), advice)
    })
}

/// Whether a tensor is the copy of the base's unembedding that PEFT saves beside an adapter of it.
fn is_head_copy(name: &str) -> bool {
    name.strip_prefix(PREFIX).unwrap_or(name) == "lm_head.base_layer.weight"
}

/// Refuses a folder whose copy of the unembedding is not the base's: PEFT computes with the copy.
///
/// # Errors
/// Another shape; numbers that are further from the base's than rounding to any type takes them.
pub(super) fn check_head_copy(folder: &Path, base: &GgufSet) -> Result<()> {
    let path = folder.join(WEIGHTS);
    let bytes = MappedFile::open(&path)?;
    let place = path.display().to_string();
    let file = tensors(&bytes, &place)?;
    let copy = file.iter().find(|(name, _)| is_head_copy(name));
    let (Some((name, copy)), Some((part, head))) = (copy, base.tensor(OUTPUT)) else {
        return Ok(());
    };
    let place = format!("{place}: {name}");
    let refuse = |expected: String, got: String| {
        Err(Error::invalid(place.clone(), expected, got, "use the model that it was trained on"))
    };
    let shape: Vec<u64> = copy.shape().iter().rev().map(|n| *n as u64).collect();
    if shape != head.shape {
        return refuse(format!("the base's {OUTPUT}, {:?}", head.shape), format!("{shape:?}"));
    }
    // Row by row, for the matrix is large: |copy - base|^2 beside |base|^2. Rounding to 2 bits leaves a
    // tenth or two; matrices that have nothing to do with each other are 2 apart.
    const FAR: f64 = 0.5;
    let n_in = head.shape[0] as usize;
    let (from, to) = (part.bytes(head), copy.data());
    let [base_row, copy_row] = [from.len(), to.len()].map(|n| n / head.shape[1].max(1) as usize);
    let mut row = vec![0.0; n_in];
    let (mut off, mut size) = (0.0, 0.0);
    for (from, to) in from.chunks_exact(base_row.max(1)).zip(to.chunks_exact(copy_row.max(1))) {
        head.ty.dequantize(from, &mut row);
        let copy = TensorView::new(copy.dtype(), vec![n_in], to);
        let copy =
            floats(&copy.map_err(|e| Error::engine(&place, e.to_string(), "report it"))?, &place)?;
        for (base, copy) in row.iter().zip(copy) {
            off += f64::from(base - copy).powi(2);
            size += f64::from(*base).powi(2);
        }
    }
    if off <= FAR * size {
        return Ok(());
    }
    refuse(
        format!("the base's {OUTPUT}"),
        format!("other numbers, {:.2} of its size away", (off / size).sqrt()),
    )
}

/// `base_model.model.<module>.lora_A.weight` -> (module, 0); `.lora_A.<name>.weight` too.
fn split_name<'n>(family: &Family, name: &'n str) -> Option<(&'n str, usize)> {
    let name = name.strip_prefix(PREFIX).unwrap_or(name).strip_suffix(".weight")?;
    let (module, half) = [("lora_A", 0), ("lora_B", 1)].into_iter().find_map(|(word, half)| {
        let (module, rest) = name.split_once(&format!(".{word}"))?;
        (rest.is_empty() || rest.starts_with('.')).then_some((module, half))
    })?;
    weight(family, module).map(|_| (module, half))
}

/// A pair with B's rows as PEFT has them, and the scale that PEFT applies.
fn read_pair(
    place: &str,
    module: &str,
    weight: String,
    [a, b]: [&TensorView; 2],
    config: &Config,
) -> Result<(AdapterPair, f64)> {
    let place = format!("{place}: {module}");
    let (&[rank, n_in], &[n_out, b_rank]) = (a.shape(), b.shape()) else {
        let got = format!("{:?} and {:?}", a.shape(), b.shape());
        return Err(Error::invalid(place, "matrices", got, "only linear layers are read"));
    };
    let said = config.rank(module);
    if rank != b_rank || rank != said || rank == 0 {
        let got = format!("A {:?}, B {:?}", a.shape(), b.shape());
        let expected = format!("A [r, n_in] and B [n_out, r] with r = {said}, as the config says");
        return Err(Error::invalid(place, expected, got, "write the adapter again"));
    }
    let (a, b) = (floats(a, &place)?, floats(b, &place)?);
    Ok((AdapterPair { weight, rank, n_in, n_out, n_expert: 1, a, b }, config.scale(module)))
}

fn floats(view: &TensorView, place: &str) -> Result<Vec<f32>> {
    let data = view.data();
    Ok(match view.dtype() {
        Dtype::F32 => data.as_chunks().0.iter().map(|b| f32::from_le_bytes(*b)).collect(),
        Dtype::F16 => {
            data.as_chunks().0.iter().map(|b| half::f16::from_le_bytes(*b).to_f32()).collect()
        }
        Dtype::BF16 => {
            data.as_chunks().0.iter().map(|b| half::bf16::from_le_bytes(*b).to_f32()).collect()
        }
        other => {
            return Err(Error::Unsupported {
                what: "safetensors type",
                got: format!("{other:?} of {place}"),
                supported: "F32, F16, BF16".into(),
            });
        }
    })
}

/// (layer, place in it); output.weight comes last.
fn order(weight: &str) -> (usize, usize) {
    let parts = weight.strip_prefix("blk.").and_then(|rest| rest.split_once('.'));
    let Some((layer, name)) = parts else { return (usize::MAX, 0) };
    // A fused map stands where the first of its parts would, a delta net's where those of attention would.
    let name = match name.strip_suffix(".weight") {
        Some("attn_qkv" | "attn_gate" | "ssm_alpha" | "ssm_beta" | "ssm_ba") => "attn_q",
        Some("ssm_out") => "attn_output",
        _ => name,
    };
    let target = MODULES.iter().position(|(gguf, _)| name.starts_with(gguf));
    (layer.parse().unwrap_or(usize::MAX), target.unwrap_or(usize::MAX))
}

fn to_json(value: &Value) -> Option<Json> {
    match value {
        Value::String(text) => Some(json!(text)),
        Value::Bool(x) => Some(json!(x)),
        Value::F32(x) => Some(json!(x)),
        other => other.integer().and_then(|n| u64::try_from(n).ok()).map(|n| json!(n)),
    }
}

/// Metadata that [`write_peft`] put beside the tensors; none without the file.
fn read_own(path: &Path) -> Result<Vec<(String, Value)>> {
    let Ok(text) = std::fs::read(path) else { return Ok(Vec::new()) };
    let own: serde_json::Map<String, Json> = serde_json::from_slice(&text).map_err(|e| {
        let place = path.display().to_string();
        Error::invalid(place, "a JSON object", json_fault(&e), "remove the file")
    })?;
    let value = |json: Json| match json {
        Json::String(text) => Some(Value::String(text)),
        Json::Bool(x) => Some(Value::Bool(x)),
        Json::Number(n) => n.as_u64().map(Value::U64).or(n.as_f64().map(|x| Value::F32(x as f32))),
        _ => None,
    };
    let entries = own.into_iter().filter(|(key, _)| key.starts_with("bupo."));
    Ok(entries.filter_map(|(key, json)| Some((key, value(json)?))).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_go_both_ways() {
        for family in crate::model::FAMILIES {
            for (gguf, _) in modules(family) {
                let name = format!("blk.11.{gguf}.weight");
                assert_eq!(weight(family, &module(family, &name).unwrap()).unwrap(), name);
            }
        }
        let named = |name| Family::named(name).unwrap();
        let llama = named("llama");
        let q = module(llama, "blk.3.attn_q.weight").unwrap();
        assert_eq!(q, "model.layers.3.self_attn.q_proj");
        assert_eq!(module(llama, "token_embd.weight"), None);
        assert_eq!(weight(llama, "model.layers.0.self_attn.rotary"), None);
        // What Hugging Face fuses is one module, elsewhere unknown.
        let fused = "model.layers.2.mlp.gate_up_proj";
        assert_eq!(weight(named("phi3"), fused).unwrap(), "blk.2.ffn_up.weight");
        assert_eq!(weight(llama, fused), None);
        let text_part = "model.language_model.layers.2.mlp.up_proj";
        assert_eq!(weight(named("gemma3"), text_part).unwrap(), "blk.2.ffn_up.weight");
        let name = "base_model.model.model.layers.1.mlp.up_proj.lora_B.default.weight";
        assert_eq!(split_name(llama, name), Some(("model.layers.1.mlp.up_proj", 1)));
        let embedding = "base_model.model.model.embed_tokens.lora_embedding_A";
        assert_eq!(split_name(llama, embedding), None);
    }
}
