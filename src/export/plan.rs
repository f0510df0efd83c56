//! Which type each tensor gets.
//!
//! `keep`: its own. A named type: llama.cpp's own rules, asked of its own code (`llama_quant_compute_types`)
//! on the model's outline, so that they cannot differ from `llama-quantize` of the same version. That
//! function leaves out what changes with an importance matrix; [`with_importance`] puts it back.

use std::fmt;
use std::path::Path;
use std::str::FromStr;

use super::imatrix::Imatrix;
use crate::ggml::Type;
use crate::gguf::{GgufSet, TensorInfo};
use crate::llama::{self, FileType, TensorEntry};
use crate::model::check_values;
use crate::{Error, Result};

/// The value of `--type`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum TypeChoice {
    /// Every tensor in the type it has.
    Keep,
    /// A file type of llama.cpp.
    File(FileType),
}

impl FromStr for TypeChoice {
    type Err = Error;

    fn from_str(text: &str) -> Result<TypeChoice> {
        if text.eq_ignore_ascii_case("keep") {
            return Ok(TypeChoice::Keep);
        }
        text.parse().map(TypeChoice::File).map_err(|_| Error::Unsupported {
            what: "type",
            got: text.into(),
            supported: format!("keep, {}", FileType::names()),
        })
    }
}

impl fmt::Display for TypeChoice {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        match self {
            TypeChoice::Keep => f.write_str("keep"),
            TypeChoice::File(ty) => ty.fmt(f),
        }
    }
}

/// The new type of every tensor of the base, in file order.
///
/// `path`: the base's first file, for llama.cpp to read.
pub(super) fn types(
    base: &GgufSet,
    path: &Path,
    choice: TypeChoice,
    imatrix: Option<&Imatrix>,
) -> Result<Vec<Type>> {
    let tensors: Vec<&TensorInfo> = base.tensors().map(|(_, info)| info).collect();
    let TypeChoice::File(ty) = choice else {
        return Ok(tensors.iter().map(|info| info.ty).collect());
    };
    // The quantiser's order: its rules count tensors.
    let mut order: Vec<usize> = (0..tensors.len()).collect();
    order.sort_by_key(|&i| (layer(&tensors[i].name), tensors[i].name.as_str()));
    let entries: Vec<TensorEntry> = order
        .iter()
        .map(|&i| {
            let mut shape = [1; 4];
            shape[..tensors[i].shape.len()].copy_from_slice(&tensors[i].shape);
            TensorEntry { name: &tensors[i].name, ty: tensors[i].ty, shape }
        })
        .collect();
    // What llama.cpp would abort on is checked before.
    check_values(base.head())?;
    let outline = llama::Model::load_outline(path)?;
    let mut chosen = outline.quantised_types(ty, &entries)?;
    if imatrix.is_some() {
        let (n_layer, h) = (outline.hparams()?.n_layer as usize, outline.layer_hparams(1)?);
        let wide_groups = h.n_head >= 4 * h.n_head_kv.max(1);
        with_importance(ty, &entries, &mut chosen, n_layer, wide_groups);
    }
    let mut types = vec![Type::F32; tensors.len()];
    for (i, ty) in order.into_iter().zip(chosen) {
        types[i] = ty;
    }
    Ok(types)
}

/// `blk.N.` -> N; other names come first.
fn layer(name: &str) -> i64 {
    let number = name.strip_prefix("blk.").and_then(|rest| rest.split_once('.'));
    number.and_then(|(digits, _)| digits.parse().ok()).unwrap_or(-1)
}

/// What llama.cpp's rules change when there is an importance matrix (its `llama-quant.cpp`, wherever it asks
/// `has_imatrix`): `ffn_down` of the first eighth of the layers, and for iq3_xxs all of them and `attn_v`.
fn with_importance(
    ty: FileType,
    entries: &[TensorEntry],
    chosen: &mut [Type],
    n_layer: usize,
    wide_groups: bool,
) {
    let named = |name| Type::all().find(|t| t.name() == name).expect("a type of ggml");
    // ffn_down tensors are counted, not numbered, as there.
    let mut n_down = 0;
    for (entry, chosen) in entries.iter().zip(chosen) {
        let quantised = entry.name.ends_with("weight") && entry.shape[1] > 1;
        let down = quantised && entry.name.contains("ffn_down");
        let early = n_down < n_layer / 8;
        n_down += down as usize;
        let value = quantised && entry.name.contains("attn_v.weight");
        let new = match ty.name() {
            "q4_0" if down && early => named("q4_1"),
            "q5_0" if down && early => named("q5_1"),
            "iq4_nl" | "iq4_xs" if down && early => ty.main(),
            "iq3_xxs" if down || value && !wide_groups => ty.main(),
            _ => continue,
        };
        // Rows that are no whole blocks fall back there as for every tensor.
        *chosen = if entry.shape[0].is_multiple_of(new.block_size() as u64) {
            new
        } else if new.block_size() > 32 && entry.shape[0].is_multiple_of(32) {
            named("iq4_nl")
        } else {
            Type::F16
        };
    }
}

/// Whether a tensor may only be written as `ty` with an importance matrix: where ggml insists, and where
/// llama.cpp's quantiser calls the result garbage without.
pub(super) fn needs_importance(name: &str, ty: Type, choice: TypeChoice) -> bool {
    const LOW: [&str; 6] = ["iq1_s", "iq1_m", "iq2_xxs", "iq2_xs", "iq2_s", "iq3_xxs"];
    let head = ["token_embd.weight", "output.weight"].contains(&name);
    let small = matches!(choice, TypeChoice::File(file) if file.name() == "q2_k_s");
    ty.needs_importance() || !head && (LOW.contains(&ty.name()) || small && ty.name() == "q2_K")
}

/// The next type up when rounding would drown a change: about one bit a weight more.
pub(super) fn raised(ty: Type, width: usize) -> Option<Type> {
    const STEPS: [(&str, &[&str]); 23] = [
        ("iq1_s", &["iq2_xxs", "q4_0"]),
        ("iq1_m", &["iq2_xxs", "q4_0"]),
        ("tq1_0", &["q3_K", "q4_0"]),
        ("tq2_0", &["q3_K", "q4_0"]),
        ("q1_0", &["q4_0"]),
        ("q2_0", &["q4_0"]),
        ("iq2_xxs", &["iq3_s", "q4_0"]),
        ("iq2_xs", &["iq3_s", "q4_0"]),
        ("iq2_s", &["iq3_s", "q4_0"]),
        ("q2_K", &["q3_K", "q4_0"]),
        ("iq3_xxs", &["iq4_xs", "q4_0"]),
        ("iq3_s", &["q4_K", "q4_0"]),
        ("q3_K", &["q4_K", "q4_0"]),
        ("q4_K", &["q5_K", "q5_0"]),
        ("iq4_xs", &["q5_K", "q5_0"]),
        ("q5_K", &["q6_K", "q8_0"]),
        ("q6_K", &["q8_0"]),
        ("iq4_nl", &["q5_0"]),
        ("q4_0", &["q5_0"]),
        ("q4_1", &["q5_1"]),
        ("mxfp4", &["q5_0"]),
        ("q5_0", &["q8_0"]),
        ("q5_1", &["q8_0"]),
    ];
    let fits = |ty: &Type| width.is_multiple_of(ty.block_size());
    if let Some((_, next)) = STEPS.iter().find(|(name, _)| *name == ty.name()) {
        let next = next.iter().filter_map(|name| Type::all().find(|t| t.name() == *name));
        return next.into_iter().find(fits).or(Some(Type::F16));
    }
    match ty {
        Type::Q8_0 => Some(Type::F16),
        Type::F16 | Type::BF16 => Some(Type::F32),
        _ => None,
    }
}
