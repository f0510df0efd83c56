//! `adapter_config.json` of PEFT: what of it a GGUF adapter can hold, and what it must refuse.

use std::collections::BTreeSet;
use std::path::Path;

use regex::Regex;
use serde_json::{Map, Value as Json, json};

use crate::{Error, Result};

/// Settings that must be absent or empty: each makes the tensors mean something else.
const UNKNOWN: [&str; 10] = [
    "modules_to_save",
    "trainable_token_indices",
    "target_parameters",
    "layer_replication",
    "alora_invocation_tokens",
    "arrow_config",
    "kasa_config",
    "monteclora_config",
    "megatron_config",
    "use_bdlora",
];

/// Settings of a PEFT adapter that its tensors are to be read with.
pub(super) struct Config {
    rank: usize,
    alpha: f64,
    /// Scale by the root of the rank.
    rslora: bool,
    ranks: Vec<(Regex, f64)>,
    alphas: Vec<(Regex, f64)>,
}

impl Config {
    /// The rank of a module.
    pub fn rank(&self, module: &str) -> usize {
        pattern(&self.ranks, module).map_or(self.rank, |rank| rank as usize)
    }

    /// The factor before `B A` of a module.
    pub fn scale(&self, module: &str) -> f64 {
        let rank = self.rank(module) as f64;
        let alpha = pattern(&self.alphas, module).unwrap_or(self.alpha);
        alpha / if self.rslora { rank.sqrt() } else { rank }
    }
}

fn pattern(patterns: &[(Regex, f64)], module: &str) -> Option<f64> {
    patterns.iter().find(|(regex, _)| regex.is_match(module)).map(|(_, value)| *value)
}

/// Reads the config.
///
/// # Errors
/// Another kind of adapter than LoRA, or a setting that changes what the tensors mean.
pub(super) fn read_config(path: &Path) -> Result<Config> {
    let text = std::fs::read(path).map_err(Error::io("read", path))?;
    let place = path.display().to_string();
    let config: Map<String, Json> = serde_json::from_slice(&text).map_err(|e| {
        Error::invalid(&place, "a JSON object", e.to_string(), "write the adapter again")
    })?;
    let get = |key: &str| config.get(key).filter(|value| !value.is_null());
    let refuse = |key: &str, got: &Json, supported: &str| {
        let got = format!("{key} = {got} in {place}");
        Err(Error::Unsupported { what: "PEFT setting", got, supported: supported.into() })
    };
    match get("peft_type") {
        Some(kind) if kind == "LORA" => {}
        other => return refuse("peft_type", other.unwrap_or(&Json::Null), "LORA"),
    }
    for key in ["use_dora", "fan_in_fan_out", "lora_bias", "use_qalora"] {
        if let Some(value) = get(key).filter(|value| **value != json!(false)) {
            return refuse(key, value, "false");
        }
    }
    if let Some(bias) = get("bias").filter(|bias| **bias != json!("none")) {
        return refuse("bias", bias, "none");
    }
    for key in UNKNOWN {
        let empty = |v: &&Json| {
            v.as_array().is_some_and(Vec::is_empty) || v.as_object().is_some_and(Map::is_empty)
        };
        if let Some(value) = get(key).filter(|value| !empty(value)) {
            return refuse(key, value, "null");
        }
    }
    let number = |key: &str| {
        get(key).and_then(Json::as_f64).filter(|x| x.is_finite()).ok_or_else(|| {
            let got = get(key).map_or("nothing".into(), Json::to_string);
            Error::invalid(format!("{place}: {key}"), "a number", got, "write it again")
        })
    };
    let patterns = |key: &str| {
        let Some(table) = get(key).and_then(Json::as_object) else { return Ok(Vec::new()) };
        table
            .iter()
            .map(|(name, value)| {
                let wrong = |got: String| {
                    let expected = "a pattern of names with a number";
                    Error::invalid(format!("{place}: {key}"), expected, got, "write it again")
                };
                // As PEFT matches: the whole name, or its end after a dot.
                let regex = Regex::new(&format!(r"^(.*\.)?({name})$"));
                let regex = regex.map_err(|_| wrong(name.clone()))?;
                Ok((regex, value.as_f64().ok_or_else(|| wrong(value.to_string()))?))
            })
            .collect::<Result<_>>()
    };
    Ok(Config {
        rank: number("r")? as usize,
        alpha: number("lora_alpha")?,
        rslora: get("use_rslora") == Some(&json!(true)),
        ranks: patterns("rank_pattern")?,
        alphas: patterns("alpha_pattern")?,
    })
}

/// A config for these modules and their ranks; `alpha` as GGUF has it (0: a scale of 1).
pub(super) fn config_json(
    modules: &[(String, usize)],
    alpha: f32,
    base_name: &str,
    n_layer: usize,
) -> Json {
    let rank = modules.iter().map(|(_, rank)| *rank).max().unwrap_or(1);
    let whole = |x: f32| {
        if x.fract() == 0.0 && x.abs() < 1e9 { json!(x as i64) } else { json!(x) }
    };
    let mut ranks = Map::new();
    let mut alphas = Map::new();
    for (module, own) in modules.iter().filter(|(_, own)| *own != rank) {
        ranks.insert(module.clone(), json!(own));
        if alpha == 0.0 {
            alphas.insert(module.clone(), json!(own));
        }
    }
    json!({
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_name,
        "r": rank,
        "lora_alpha": if alpha == 0.0 { json!(rank) } else { whole(alpha) },
        "target_modules": target_modules(modules, n_layer),
        "rank_pattern": ranks,
        "alpha_pattern": alphas,
        "lora_dropout": 0.0,
        "bias": "none",
        "use_rslora": false,
        "use_dora": false,
        "fan_in_fan_out": false,
        "init_lora_weights": true,
        "inference_mode": true,
        "modules_to_save": null,
        "layers_to_transform": null,
        "layers_pattern": null,
    })
}

/// `q_proj`, .. when every layer has every one of them; else full names, for PEFT adapts whatever ends in a
/// name.
fn target_modules(modules: &[(String, usize)], n_layer: usize) -> Vec<String> {
    let split = |module: &str| {
        let (rest, last) = module.rsplit_once('.').unwrap_or(("", module));
        let layer = rest.split('.').nth(2).and_then(|n| n.parse::<usize>().ok());
        (layer, last.to_owned())
    };
    let parts: BTreeSet<_> = modules.iter().map(|(module, _)| split(module)).collect();
    let names: BTreeSet<_> = parts.iter().map(|(_, name)| name.clone()).collect();
    let in_layers = parts.iter().all(|(layer, _)| layer.is_some_and(|l| l < n_layer));
    if in_layers && parts.len() == n_layer * names.len() {
        return names.into_iter().collect();
    }
    modules.iter().map(|(module, _)| module.clone()).collect()
}
