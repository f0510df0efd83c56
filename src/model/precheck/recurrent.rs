//! Keys of models with recurrent layers, which llama.cpp divides by, and whether the tensors are of the layers that the
//! keys declare.

use super::{ADVICE, Keys, MAX_LAYERS, MAX_WIDTH};
use crate::gguf::{GgufSet, Value};
use crate::model::Family;
use crate::model::config::MAX_HEAD;
use crate::ops::MAX_CONV;
use crate::{Error, Result};

/// Full attention in every layer whose number this divides, where the file does not say.
const INTERVAL: usize = 4;

/// Checks a model's files; one without recurrent layers has no such keys.
///
/// # Errors
/// [`Error::Invalid`] naming the key, or the tensor that contradicts it.
pub fn check_recurrent(files: &GgufSet, family: &Family) -> Result<()> {
    let keys = Keys { file: files.head(), arch: family.name };
    if keys.get("ssm.state_size").is_none() {
        return Ok(());
    }
    let kernel = keys.size("ssm.conv_kernel", MAX_CONV)?;
    if kernel == 1 {
        return Err(keys.wrong("ssm.conv_kernel", format!("2 to {MAX_CONV}"), kernel.to_string()));
    }
    let size = keys.size("ssm.state_size", MAX_HEAD)?;
    let n_k = keys.size("ssm.group_count", MAX_WIDTH)?;
    let n_v = keys.size("ssm.time_step_rank", MAX_WIDTH)?;
    if !n_v.is_multiple_of(n_k) {
        let expected = format!("a multiple of ssm.group_count, {n_k}");
        return Err(keys.wrong("ssm.time_step_rank", expected, n_v.to_string()));
    }
    let inner = keys.size("ssm.inner_size", MAX_WIDTH)?;
    if inner != n_v * size {
        let expected = format!("{}, {n_v} heads of {size}", n_v * size);
        return Err(keys.wrong("ssm.inner_size", expected, inner.to_string()));
    }
    check_sections(&keys)?;
    // Older converters left queries, keys, values and their gates in one map.
    if let Some((_, tensor)) = files.tensors().find(|(_, t)| t.name.ends_with(".ssm_in.weight")) {
        return Err(Error::invalid(
            format!("{}: tensor {}", files.head().name(), tensor.name),
            "attn_qkv and attn_gate in its place",
            "one map of both",
            "convert the model again with a newer llama.cpp, or fetch a newer file",
        ));
    }
    check_pattern(&keys, files)
}

/// Sections of a rope with several axes of positions, of which text has one: every pair must belong to one of the three
/// that agree there.
fn check_sections(keys: &Keys<'_>) -> Result<()> {
    let key = "rope.dimension_sections";
    let Some(value) = keys.get(key) else { return Ok(()) };
    let sections: Vec<u32> = keys.file.require(&keys.full(key))?;
    let pairs = match keys.find::<usize>("rope.dimension_count")? {
        Some(n) => n / 2,
        None => keys.size("attention.key_length", MAX_HEAD)? / 2,
    };
    let all: u64 = sections.iter().map(|&n| n as u64).sum();
    let sound = sections.len() == 4
        && all > 0
        && all <= MAX_HEAD as u64
        && (0..pairs.min(all as usize)).all(|i| (i as u64) < 3 * sections[i % 3] as u64);
    if sound {
        return Ok(());
    }
    let expected = format!("4 sizes, of which the first three take turns over {pairs} pairs");
    Err(keys.wrong(key, expected, value.to_string()))
}

/// Which layers are recurrent, by the keys and by the tensors.
fn check_pattern(keys: &Keys<'_>, files: &GgufSet) -> Result<()> {
    let all = keys.size("block_count", MAX_LAYERS)?;
    let n_layer = all - keys.find::<usize>("nextn_predict_layers")?.unwrap_or(0).min(all);
    let (key, declared) = declared(keys, all)?;
    let names = || files.tensors().map(|(_, tensor)| tensor.name.as_str());
    for (layer, declared) in declared.into_iter().enumerate().take(n_layer) {
        // What either kind has and the other has not.
        let [wanted, other] = match declared {
            true => ["ssm_out.weight", "attn_output.weight"],
            false => ["attn_output.weight", "ssm_out.weight"],
        };
        let full = |name: &str| format!("blk.{layer}.{name}");
        let kind = |recurrent| if recurrent { "recurrent" } else { "attention" };
        let has = |name: &str| names().any(|tensor| tensor == full(name));
        if has(other) && !has(wanted) {
            return Err(Error::invalid(
                format!("{}: tensor {}", keys.file.name(), full(other)),
                format!("layer {} to be {} by key '{key}'", layer + 1, kind(declared)),
                format!("a tensor of a layer that is {}", kind(!declared)),
                ADVICE,
            ));
        }
    }
    Ok(())
}

/// The key that says which layers are recurrent, and which are.
fn declared(keys: &Keys<'_>, all: usize) -> Result<(String, Vec<bool>)> {
    let pattern = "attention.recurrent_layers";
    if let Some(value) = keys.get(pattern) {
        let layers: Option<Vec<bool>> = match value {
            Value::Array(array) => array
                .iter()
                .map(|layer| match layer {
                    Value::Bool(recurrent) => Some(recurrent),
                    other => other.integer().map(|n| n != 0),
                })
                .collect(),
            _ => None,
        };
        return match layers.filter(|layers| layers.len() == all) {
            Some(layers) => Ok((keys.full(pattern), layers)),
            None => {
                Err(keys.wrong(pattern, format!("{all} times true or false"), value.describe()))
            }
        };
    }
    let key = "full_attention_interval";
    let interval = if keys.get(key).is_some() { keys.size(key, MAX_LAYERS)? } else { INTERVAL };
    let layers = (1..=all).map(|layer| !layer.is_multiple_of(interval)).collect();
    Ok((keys.full(key), layers))
}
