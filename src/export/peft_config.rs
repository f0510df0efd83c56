//! `adapter_config.json` of PEFT: what of it a GGUF adapter can hold, and what it must refuse.

use std::collections::BTreeSet;
use std::path::Path;

use regex::Regex;
use serde_json::{Map, Value as Json, json};

use crate::error::json_fault;
use crate::{Error, Result};

/// Settings without a say in what the tensors mean: of training, of the file's keeping, of an initialisation
/// that leaves the base as it is. `fan_in_fan_out` is of layers that no model here has: PEFT takes it back.
const WITHOUT_EFFECT: [&str; 20] = [
    "auto_mapping",
    "base_model_name_or_path",
    "corda_config",
    "ensure_weight_tying",
    "eva_config",
    "fan_in_fan_out",
    "inference_mode",
    "loftq_config",
    "lora_dropout",
    "lora_ga_config",
    "megatron_core",
    "merge_weights",
    "peft_version",
    "qalora_group_size",
    "revision",
    "runtime_config",
    "task_type",
    "velora_config",
    // ms-swift's
    "lora_dtype",
    "lorap_lr_ratio",
];

/// Settings that [`read_config`] honours or refuses by their value.
const READ: [&str; 12] = [
    "alpha_pattern",
    "bias",
    "exclude_modules",
    "init_lora_weights",
    "layers_pattern",
    "layers_to_transform",
    "lora_alpha",
    "peft_type",
    "r",
    "rank_pattern",
    "target_modules",
    "use_rslora",
];

/// Settings that must be off, each with what it does to the tensors. So must every setting that stands in no
/// list, for nobody here knows what it does.
const OFF: [(&str, &str); 14] = [
    ("alora_invocation_tokens", "the adapter acts after certain tokens alone"),
    ("arrow_config", "a router chooses among adapters"),
    ("enable_lora", "parts of a weight are adapted"),
    ("kasa_config", "singular values of the base are changed"),
    ("layer_replication", "layers are there several times"),
    ("lora_bias", "B has a bias"),
    ("megatron_config", "the layers are Megatron's"),
    ("modules_to_save", "whole modules were trained beside the adapter"),
    ("monteclora_config", "the weights are sampled"),
    ("target_parameters", "parameters are adapted that are no linear layers"),
    ("trainable_token_indices", "rows of the embedding were trained"),
    ("use_bdlora", "the matrices are of blocks"),
    ("use_dora", "the weight's columns are scaled to magnitudes of their own"),
    ("use_qalora", "inputs are pooled before A"),
];

/// Kinds of `init_lora_weights` that begin with B A = 0, or with the base as it is.
const HARMLESS_INITS: [&str; 4] = ["gaussian", "eva", "orthogonal", "mica"];
/// Kinds that took their first B A out of the base's weights (LoftQ: rounded them), so that what was trained
/// belongs to another base. PEFT's `save_pretrained` makes an ordinary LoRA of all but the last.
const MUTATING_INITS: [&str; 5] = ["pissa", "olora", "corda", "lora_ga", "loftq"];

/// Settings of a PEFT adapter that its tensors are to be read with.
pub(super) struct Config {
    rank: usize,
    alpha: f64,
    /// Scale by the root of the rank.
    rslora: bool,
    ranks: Vec<(Regex, f64)>,
    alphas: Vec<(Regex, f64)>,
    targets: Option<Names>,
    excluded: Option<Names>,
    layers: Option<Layers>,
}

/// `target_modules`, `exclude_modules`: a pattern of whole names, or names that stand alone or after a dot.
enum Names {
    Pattern(Regex),
    Ends(Vec<String>),
}

/// `layers_to_transform`, and the pattern that finds a layer's number in a module's name.
struct Layers {
    chosen: Vec<u64>,
    numbers: Vec<Regex>,
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

    /// Whether PEFT would adapt the module; it passes over tensors of others.
    pub fn adapts(&self, module: &str) -> bool {
        if self.excluded.as_ref().is_some_and(|names| names.hold(module)) {
            return false;
        }
        match &self.targets {
            Some(Names::Ends(names)) if names.iter().any(|name| name == module) => true,
            Some(names) if !names.hold(module) => false,
            _ => self.layers.as_ref().is_none_or(|layers| layers.hold(module)),
        }
    }
}

impl Names {
    fn hold(&self, module: &str) -> bool {
        match self {
            Names::Pattern(regex) => regex.is_match(module),
            Names::Ends(names) => names.iter().any(|name| {
                module.strip_suffix(name.as_str()).is_some_and(|r| r.is_empty() || r.ends_with('.'))
            }),
        }
    }
}

impl Layers {
    fn hold(&self, module: &str) -> bool {
        let number = self.numbers.iter().find_map(|regex| regex.captures(module)?.get(1));
        number.and_then(|n| n.as_str().parse().ok()).is_some_and(|n| self.chosen.contains(&n))
    }
}

fn pattern(patterns: &[(Regex, f64)], module: &str) -> Option<f64> {
    patterns.iter().find(|(regex, _)| regex.is_match(module)).map(|(_, value)| *value)
}

/// Reads the config: settings of PEFT 0.21 and before.
///
/// # Errors
/// Another kind of adapter than LoRA; a setting that changes what the tensors mean, or that is not known.
pub(super) fn read_config(path: &Path) -> Result<Config> {
    let text = std::fs::read(path).map_err(Error::io("read", path))?;
    let place = path.display().to_string();
    let config: Map<String, Json> = serde_json::from_slice(&text).map_err(|e| {
        Error::invalid(&place, "a JSON object", json_fault(&e), "write the adapter again")
    })?;
    let settings = Settings { config: &config, place: &place };
    if settings.get("peft_type") != Some(&json!("LORA")) {
        return Err(settings.refuse("peft_type", "LORA"));
    }
    settings.check_init()?;
    if settings.get("bias").is_some_and(|bias| *bias != json!("none")) {
        return Err(settings.refuse("bias", "none"));
    }
    for (key, value) in &config {
        let known = WITHOUT_EFFECT.contains(&key.as_str()) || READ.contains(&key.as_str());
        if known || is_off(value) {
            continue;
        }
        let why = OFF.iter().find(|(name, _)| name == key).map(|(_, why)| *why);
        let why = why.unwrap_or("what it does to the tensors is not known");
        return Err(settings.refuse(key, &format!("null, false or empty; {why}")));
    }
    Ok(Config {
        rank: settings.rank()?,
        alpha: settings.number("lora_alpha")?,
        rslora: match settings.get("use_rslora") {
            None => false,
            Some(Json::Bool(on)) => *on,
            Some(_) => return Err(settings.wrong("use_rslora", "true or false")),
        },
        ranks: settings.patterns("rank_pattern", |n| n >= 1.0 && n.fract() == 0.0)?,
        alphas: settings.patterns("alpha_pattern", |_| true)?,
        targets: settings.names("target_modules")?,
        excluded: settings.names("exclude_modules")?,
        layers: settings.layers()?,
    })
}

/// Whether a value says that a setting is not used.
fn is_off(value: &Json) -> bool {
    match value {
        Json::Null | Json::Bool(false) => true,
        Json::Array(list) => list.is_empty(),
        Json::Object(object) => object.is_empty(),
        _ => false,
    }
}

/// The object of a config file, with where it stands.
struct Settings<'a> {
    config: &'a Map<String, Json>,
    place: &'a str,
}

impl Settings<'_> {
    fn get(&self, key: &str) -> Option<&Json> {
        self.config.get(key).filter(|value| !value.is_null())
    }

    fn refuse(&self, key: &str, supported: &str) -> Error {
        let got =
            format!("{key} = {} in {}", self.config.get(key).unwrap_or(&Json::Null), self.place);
        Error::Unsupported { what: "PEFT setting", got, supported: supported.into() }
    }

    fn wrong(&self, key: &str, expected: &str) -> Error {
        let got = self.config.get(key).map_or("nothing".into(), Json::to_string);
        Error::invalid(format!("{}: {key}", self.place), expected, got, "write it again")
    }

    fn check_init(&self) -> Result<()> {
        const KEY: &str = "init_lora_weights";
        let kind = match self.get(KEY) {
            None | Some(Json::Bool(_)) => return Ok(()),
            Some(Json::String(kind)) => kind.to_ascii_lowercase(),
            Some(_) => return Err(self.wrong(KEY, "true, false or a name")),
        };
        if HARMLESS_INITS.contains(&kind.as_str()) {
            return Ok(());
        }
        let names = HARMLESS_INITS.join(", ");
        let advice = if MUTATING_INITS.iter().any(|name| kind.starts_with(name)) {
            "; this one changed the base before training: save the adapter again with PEFT's \
             save_pretrained(.., path_initial_model_for_weight_conversion=..), which makes an ordinary LoRA of it"
        } else {
            ""
        };
        Err(self.refuse(KEY, &format!("true, false, {names}{advice}")))
    }

    fn number(&self, key: &str) -> Result<f64> {
        let number = self.get(key).and_then(Json::as_f64).filter(|x| x.is_finite());
        number.ok_or_else(|| self.wrong(key, "a number"))
    }

    fn rank(&self) -> Result<usize> {
        let rank = self.get("r").and_then(Json::as_u64).filter(|r| *r > 0);
        rank.map(|r| r as usize).ok_or_else(|| self.wrong("r", "a whole number above 0"))
    }

    /// A table from patterns of names to numbers.
    fn patterns(&self, key: &str, allowed: impl Fn(f64) -> bool) -> Result<Vec<(Regex, f64)>> {
        let wrong = || self.wrong(key, "patterns of names, each with its number");
        let Some(table) = self.get(key) else { return Ok(Vec::new()) };
        let table = table.as_object().ok_or_else(wrong)?;
        let entry = |(name, value): (&String, &Json)| {
            // As PEFT matches: the whole name, or its end after a dot.
            let regex = Regex::new(&format!(r"^(.*\.)?({name})$")).map_err(|_| wrong())?;
            let number = value.as_f64().filter(|x| x.is_finite() && allowed(*x));
            Ok((regex, number.ok_or_else(wrong)?))
        };
        table.iter().map(entry).collect()
    }

    /// A name, or a list of names; none where the setting is not used.
    fn names(&self, key: &str) -> Result<Option<Names>> {
        let wrong = || self.wrong(key, "a pattern, or a list of names");
        match self.get(key) {
            None => Ok(None),
            // A pattern in Python's own syntax that is not read here is taken at its word: PEFT wrote no
            // tensor that does not match it.
            Some(Json::String(text)) => {
                Ok(Regex::new(&format!("^(?:{text})$")).ok().map(Names::Pattern))
            }
            Some(Json::Array(list)) if list.is_empty() => Ok(None),
            Some(Json::Array(list)) => {
                let name = |name: &Json| name.as_str().map(str::to_owned).ok_or_else(wrong);
                Ok(Some(Names::Ends(list.iter().map(name).collect::<Result<_>>()?)))
            }
            Some(_) => Err(wrong()),
        }
    }

    fn layers(&self) -> Result<Option<Layers>> {
        let wrong =
            || self.wrong("layers_to_transform", "the number of a layer, or a list of them");
        let chosen: Vec<u64> = match self.get("layers_to_transform") {
            None => return Ok(None),
            Some(Json::Array(list)) if list.is_empty() => return Ok(None),
            Some(Json::Array(list)) => {
                list.iter().map(|n| n.as_u64().ok_or_else(wrong)).collect::<Result<_>>()?
            }
            Some(n) => vec![n.as_u64().ok_or_else(wrong)?],
        };
        let names = match self.get("layers_pattern") {
            None => vec![],
            Some(Json::String(name)) => vec![name.as_str()],
            Some(list) => {
                let names = list.as_array().map(|l| l.iter().map(Json::as_str).collect());
                let names: Option<Option<Vec<_>>> = names;
                names.flatten().ok_or_else(|| self.wrong("layers_pattern", "a name, or a list"))?
            }
        };
        let regex = |text: String| {
            Regex::new(&text).map_err(|_| self.wrong("layers_pattern", "a pattern of names"))
        };
        // The first number in the name is the layer's, as PEFT takes it.
        let numbers = if names.is_empty() {
            vec![regex(r"^.*?\.[^.]*\.(\d+)\.".into())?]
        } else {
            let of = |name: &&str| regex(format!(r"^(?:.*?\.)?(?:{name})\.(\d+)\."));
            names.iter().map(of).collect::<Result<_>>()?
        };
        Ok(Some(Layers { chosen, numbers }))
    }
}

/// What the folder's config calls the base: a repository or a path; none where it says nothing.
pub(super) fn base_name(folder: &Path) -> Option<String> {
    let text = std::fs::read(folder.join("adapter_config.json")).ok()?;
    let config: Json = serde_json::from_slice(&text).ok()?;
    config.get("base_model_name_or_path")?.as_str().map(str::to_owned)
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
