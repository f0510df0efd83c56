//! What llama.cpp asserts, divides by or trusts while it loads a model, checked before it does: an
//! assertion of its ends the process, and no caller can catch that.
//!
//! `GgufFile` has vouched for the file's structure; here it is the values. The list follows llama.cpp's
//! `llama_model_base::load_hparams`, `llama_vocab::impl::load` and the graphs of the architectures in
//! [`Family`]. What it throws on (shapes, missing tensors) it also catches and reports itself.

mod recurrent;

use std::collections::HashSet;

pub use recurrent::check_recurrent;

use super::Family;
use super::config::MAX_HEAD;
use crate::ggml::{Device, Type};
use crate::gguf::{FromValue, GgufFile, Value};
use crate::{Error, Result};

/// llama.cpp's `LLAMA_MAX_LAYERS`.
const MAX_LAYERS: usize = 512;
/// More than any model has; products of two such sizes fit into 64 bits with room.
const MAX_WIDTH: usize = 1 << 24;
/// llama.cpp counts positions in 32 bits.
const MAX_CONTEXT: usize = i32::MAX as usize;
/// Rope scalings that llama.cpp knows and we compute; others make it abort.
const ROPE_SCALINGS: [&str; 4] = ["none", "linear", "yarn", "longrope"];
/// Tokenizers of the architectures here: SentencePiece and kinds of byte-pair encoding.
const TOKENIZERS: [&str; 3] = ["llama", "gpt2", "gemma4"];
const ADVICE: &str = "the file is damaged or no model of this kind; fetch it again";

/// Refuses weights that the device cannot decode: llama.cpp would leave them to the CPU without a word.
///
/// # Errors
/// [`Error::Invalid`] naming the first such tensor and its type.
pub fn decodable<'t>(
    tensors: impl Iterator<Item = (&'t str, Type)>,
    decodes: impl Fn(Type) -> bool,
    device: Device,
    file: &str,
) -> Result<()> {
    // Token embeddings stay in host memory and are looked up there.
    let mut weights = tensors.filter(|(name, _)| *name != "token_embd.weight");
    let Some((name, ty)) = weights.find(|(_, ty)| !decodes(*ty)) else { return Ok(()) };
    Err(Error::invalid(
        format!("{file}: tensor {name}"),
        format!("a type that {device} can decode"),
        ty.name(),
        "quantise the model to another type, or use --device cpu",
    ))
}

/// Checks the values of a model's (first) file, of an architecture that is computed here.
///
/// # Errors
/// [`Error::Invalid`] or [`Error::Unsupported`] naming the key.
pub fn check(file: &GgufFile, family: &Family) -> Result<()> {
    let keys = Keys { file, arch: family.name };
    let (n_layer, d) = check_sizes(&keys)?;
    let heads = keys.per_layer("attention.head_count", n_layer, MAX_WIDTH)?;
    let kv = "attention.head_count_kv";
    let heads_kv = if keys.get(kv).is_some() {
        keys.per_layer(kv, n_layer, MAX_WIDTH)?
    } else {
        heads.clone()
    };
    let pairs = heads.iter().cycle().zip(heads_kv.iter().cycle()).take(n_layer);
    if let Some((q, k)) = pairs.into_iter().find(|(q, k)| k > q) {
        return Err(keys.wrong(kv, format!("1 to {q}"), k.to_string()));
    }
    let derived = d / heads[0];
    let sizes = ["attention.key_length", "attention.value_length", "rope.dimension_count"];
    for key in sizes {
        let size = if keys.get(key).is_some() { keys.size(key, MAX_HEAD)? } else { derived };
        if size == 0 || size > MAX_HEAD {
            return Err(keys.wrong(key, format!("1 to {MAX_HEAD}"), size.to_string()));
        }
    }
    for key in sizes.map(|key| format!("{key}_swa")) {
        if keys.get(&key).is_some() {
            keys.size(&key, MAX_HEAD)?;
        }
    }
    check_experts(&keys, family)?;
    if keys.find::<bool>("attention.causal")? == Some(false) {
        return Err(keys.wrong("attention.causal", "true".into(), "false".into()));
    }
    let shared = "attention.shared_kv_layers";
    if let Some(value) = keys.get(shared) {
        let most = n_layer.saturating_sub(2);
        if !value.integer().is_some_and(|n| (0..=most as i128).contains(&n)) {
            return Err(keys.wrong(shared, format!("0 to {most}"), value.describe()));
        }
    }
    let epsilon = "attention.layer_norm_rms_epsilon";
    if keys.get(epsilon).is_none() {
        return Err(keys.wrong(epsilon, "a number".into(), "no such key".into()));
    }
    match keys.find::<&str>("rope.scaling.type")? {
        Some(got) if !ROPE_SCALINGS.contains(&got) => Err(Error::Unsupported {
            what: "rope scaling type",
            got: got.into(),
            supported: format!("{}, and llama3 by rope_freqs", ROPE_SCALINGS.join(", ")),
        }),
        _ => Ok(()),
    }?;
    let tokenizer = file.str("tokenizer.ggml.model")?;
    if !TOKENIZERS.contains(&tokenizer) {
        let (got, supported) = (tokenizer.into(), TOKENIZERS.join(", "));
        return Err(Error::Unsupported { what: "tokenizer model", got, supported });
    }
    check_numbers(&keys)?;
    check_tokenizer(file)
}

/// Checks the values of a model's (first) file, of any architecture: what llama.cpp asserts whenever it loads one.
///
/// # Errors
/// [`Error::Invalid`] naming the key.
pub fn check_any(file: &GgufFile) -> Result<()> {
    let keys = Keys { file, arch: file.architecture()? };
    check_sizes(&keys)?;
    check_numbers(&keys)?;
    if file.get("tokenizer.ggml.tokens").is_some() { check_tokenizer(file) } else { Ok(()) }
}

/// Layers and width.
fn check_sizes(keys: &Keys<'_>) -> Result<(usize, usize)> {
    let n_layer = keys.size("block_count", MAX_LAYERS)?;
    let d = keys.size("embedding_length", MAX_WIDTH)?;
    keys.size("context_length", MAX_CONTEXT)?;
    let beside = "nextn_predict_layers";
    if let Some(value) = keys.get(beside) {
        let most = n_layer as i128 - 1;
        if !value.integer().is_some_and(|n| (0..=most).contains(&n)) {
            return Err(keys.wrong(beside, format!("0 to {most}"), value.describe()));
        }
    }
    if keys.get("feed_forward_length").is_some() {
        keys.per_layer("feed_forward_length", n_layer, MAX_WIDTH)?;
    }
    let window = "attention.sliding_window";
    if keys.get(window).is_some_and(|value| value.integer() != Some(0)) {
        keys.size(window, MAX_CONTEXT)?;
    }
    Ok((n_layer, d))
}

/// llama.cpp's `LLAMA_MAX_EXPERTS`.
const MAX_EXPERTS: usize = 1024;

/// Counts of a mixture of experts; 0 where the family has none.
fn check_experts(keys: &Keys<'_>, family: &Family) -> Result<()> {
    let none = |key: &str, expected: &str| match keys.get(key).filter(|v| v.integer() != Some(0)) {
        Some(value) => Err(keys.wrong(key, expected.into(), value.describe())),
        None => Ok(()),
    };
    none("expert_group_count", "0 or no such key: groups of experts are not computed here")?;
    if !family.mixture {
        none("expert_count", "0 or no such key")?;
        return none("expert_used_count", "0 or no such key");
    }
    let count = keys.size("expert_count", MAX_EXPERTS)?;
    keys.size("expert_used_count", count)?;
    for key in ["expert_feed_forward_length", "expert_shared_feed_forward_length"] {
        if keys.get(key).is_some() {
            keys.size(key, MAX_WIDTH)?;
        }
    }
    keys.number("expert_weights_scale", |_| true, "a finite number")
}

/// Numbers that a computation divides by or takes the logarithm of.
fn check_numbers(keys: &Keys<'_>) -> Result<()> {
    let epsilon = "attention.layer_norm_rms_epsilon";
    keys.number(epsilon, |x| (0.0..1.0).contains(&x), "0 to below 1")?;
    keys.number("rope.freq_base", |x| x > 0.0, "above 0")?;
    keys.number("rope.freq_base_swa", |x| x > 0.0, "above 0")?;
    keys.number("rope.scaling.factor", |x| x >= 0.0, "at least 0")?;
    keys.number("rope.scale_linear", |x| x >= 0.0, "at least 0")?;
    keys.number("rope.scaling.attn_factor", |x| x > 0.0, "above 0")?;
    keys.number("attention.scale", |x| x >= 0.0, "at least 0")?;
    keys.number("attn_logit_softcapping", |x| x > 0.0, "above 0")?;
    keys.number("final_logit_softcapping", |x| x >= 0.0, "at least 0")?;
    keys.number("logit_scale", |x| x > 0.0, "above 0")?;
    for name in ["embedding_scale", "residual_scale", "attention.temperature_scale"] {
        keys.number(name, |_| true, "a finite number")?;
    }
    for name in ["ext_factor", "attn_factor", "beta_fast", "beta_slow", "log_multiplier"] {
        keys.number(&format!("rope.scaling.yarn_{name}"), |_| true, "a finite number")?;
    }
    if keys.get("rope.scaling.original_context_length").is_some() {
        keys.size("rope.scaling.original_context_length", MAX_CONTEXT)?;
    }
    Ok(())
}

/// llama.cpp asserts that no token occurs twice, and indexes scores and types by token.
fn check_tokenizer(file: &GgufFile) -> Result<()> {
    let place = |key: &str| format!("{}: key 'tokenizer.ggml.{key}'", file.name());
    let refuse = |key: &str, expected: String, got: String| {
        Err(Error::invalid(place(key), expected, got, ADVICE))
    };
    let tokens = file.strings("tokenizer.ggml.tokens")?;
    if tokens.is_empty() || tokens.len() > MAX_WIDTH {
        return refuse("tokens", format!("1 to {MAX_WIDTH} tokens"), tokens.len().to_string());
    }
    let mut seen = HashSet::with_capacity(tokens.len());
    for (i, token) in tokens.iter().enumerate() {
        // llama.cpp gives an empty token this name.
        let name = if token.is_empty() { format!("[EMPTY_{i}]") } else { token.to_string() };
        if token.contains('\0') {
            return refuse("tokens", "tokens without NUL".into(), format!("one at {i}"));
        }
        if let Some(name) = seen.replace(name) {
            let shown: String = name.chars().take(40).collect();
            return refuse("tokens", "each token once".into(), format!("'{shown}' again at {i}"));
        }
    }
    if let Some(types) = file.find::<Vec<i32>>("tokenizer.ggml.token_type")?
        && types.len() < tokens.len()
    {
        return refuse("token_type", format!("{} types", tokens.len()), types.len().to_string());
    }
    if let Some(Value::Array(scores)) = file.get("tokenizer.ggml.scores") {
        let sound = scores.iter().all(|score| match score {
            Value::F32(x) => x.is_finite(),
            other => other.integer().is_some(),
        });
        if !sound || scores.len() < tokens.len() {
            let got = format!("{} scores, or one that is not finite", scores.len());
            return refuse("scores", format!("{} finite scores", tokens.len()), got);
        }
    }
    Ok(())
}

/// An architecture's keys.
struct Keys<'f> {
    file: &'f GgufFile,
    arch: &'f str,
}

impl<'f> Keys<'f> {
    fn full(&self, key: &str) -> String {
        format!("{}.{key}", self.arch)
    }

    fn get(&self, key: &str) -> Option<&'f Value> {
        self.file.get(&self.full(key))
    }

    fn find<T: FromValue<'f>>(&self, key: &str) -> Result<Option<T>> {
        self.file.find(&self.full(key))
    }

    fn wrong(&self, key: &str, expected: String, got: String) -> Error {
        let place = format!("{}: key '{}'", self.file.name(), self.full(key));
        Error::invalid(place, expected, got, ADVICE)
    }

    /// An integer of 1 to `most`, of the type that llama.cpp reads.
    fn size(&self, key: &str, most: usize) -> Result<usize> {
        let n: usize = self.file.require(&self.full(key))?;
        if (1..=most).contains(&n) {
            return Ok(n);
        }
        Err(self.wrong(key, format!("1 to {most}"), n.to_string()))
    }

    /// A size that may be given as an array of one for each layer.
    fn per_layer(&self, key: &str, n_layer: usize, most: usize) -> Result<Vec<usize>> {
        let Some(Value::Array(_)) = self.get(key) else { return Ok(vec![self.size(key, most)?]) };
        let sizes: Vec<u32> = self.file.require(&self.full(key))?;
        if sizes.len() != n_layer {
            let got = format!("{} values", sizes.len());
            return Err(self.wrong(key, format!("{n_layer} sizes"), got));
        }
        match sizes.iter().find(|&&n| n == 0 || n as usize > most) {
            Some(n) => Err(self.wrong(key, format!("1 to {most}"), n.to_string())),
            None => Ok(sizes.into_iter().map(|n| n as usize).collect()),
        }
    }

    /// A finite number that `holds`, where the key is there.
    fn number(&self, key: &str, holds: impl Fn(f32) -> bool, expected: &str) -> Result<()> {
        match self.find::<f32>(key)? {
            Some(x) if !(x.is_finite() && holds(x)) => {
                Err(self.wrong(key, expected.into(), x.to_string()))
            }
            _ => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_type_that_the_device_lacks_is_refused_by_name() {
        let ternary = Type::all().find(|t| t.name() == "tq2_0").expect("ggml has it");
        let gpu = Device::Gpu { index: 0, precise: false };
        let check = |tensors: &[(&'static str, Type)]| {
            decodable(tensors.iter().copied(), |ty| ty != ternary, gpu, "m.gguf")
        };
        let error = check(&[("output.weight", Type::Q8_0), ("blk.3.ffn_up.weight", ternary)]);
        let said = error.unwrap_err().to_string();
        assert!(said.contains("blk.3.ffn_up.weight") && said.contains("tq2_0"), "{said}");
        assert!(said.contains("cuda:0") && said.contains("--device cpu"), "{said}");
        check(&[("token_embd.weight", ternary), ("output.weight", Type::F16)]).unwrap();
    }
}
