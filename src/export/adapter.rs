//! Adapters as files of their own: GGUF in other types, to PEFT and from it.

use std::fmt;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use serde::Serialize;

use super::adapters::{AdapterSpec, Adapters};
use super::merge::refuse_inputs;
use super::peft::{PeftBase, check_head_copy, read_peft, write_peft};
use super::peft_config::base_name;
use super::{BaseId, Card};
use crate::ggml::Type;
use crate::gguf::{AdapterFile, GgufSet, refuse_filled};
use crate::model::{Lora, Model, ModelFile};
use crate::{Error, Result};

/// Metadata of an adapter: file name of the base, and the hash of its bytes.
const BASE: &str = "bupo.base";
const BASE_SHA256: &str = "bupo.base_sha256";

/// Types that adapters are written in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AdapterType(Type);

impl AdapterType {
    const ALL: [Type; 4] = [Type::F32, Type::F16, Type::BF16, Type::Q8_0];
}

impl FromStr for AdapterType {
    type Err = Error;

    fn from_str(text: &str) -> Result<AdapterType> {
        let found = AdapterType::ALL.into_iter().find(|ty| ty.name().eq_ignore_ascii_case(text));
        found.map(AdapterType).ok_or_else(|| Error::Unsupported {
            what: "adapter type",
            got: text.into(),
            supported: AdapterType::ALL.map(Type::name).join(", "),
        })
    }
}

/// What was written.
#[derive(Clone, Debug, Serialize)]
pub struct AdapterReport {
    /// File or folder.
    pub out: PathBuf,
    /// Type of the numbers.
    #[serde(rename = "type")]
    pub ty: String,
    /// Adapted weights.
    pub pairs: usize,
    /// The largest rank.
    pub rank: usize,
    /// As in the file; 0: a scale of 1.
    pub alpha: f32,
    /// Tensors in F16 because their rows are no whole blocks of the type.
    pub in_f16: Vec<String>,
}

impl AdapterReport {
    fn new(file: &AdapterFile, out: &Path, ty: Type, in_f16: Vec<String>) -> AdapterReport {
        AdapterReport {
            out: out.into(),
            ty: ty.name().into(),
            pairs: file.pairs.len(),
            rank: file.pairs.iter().map(|pair| pair.rank).max().unwrap_or(0),
            alpha: file.alpha,
            in_f16,
        }
    }
}

impl fmt::Display for AdapterReport {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        writeln!(f, "adapter    {}", self.out.display())?;
        write!(f, "weights    {} of rank {}, alpha {}", self.pairs, self.rank, self.alpha)?;
        if let Some(first) = self.in_f16.first() {
            let n = self.in_f16.len();
            write!(f, "\nin f16     {n} tensors whose rows are no whole {} blocks: ", self.ty)?;
            write!(f, "{first}{}", if n > 1 { ", .." } else { "" })?;
        }
        Ok(())
    }
}

/// Writes the adapters, as one, in GGUF; `base_id` goes into its metadata.
///
/// # Errors
/// Adapters that cannot be read or do not belong together; `out` is one of them; what the type cannot hold.
pub fn export_adapter(
    specs: &[AdapterSpec],
    out: &Path,
    AdapterType(ty): AdapterType,
    base_id: Option<&BaseId>,
) -> Result<AdapterReport> {
    refuse_inputs(specs.iter().map(|spec| spec.path.as_path()), out)?;
    let mut file = Adapters::read(specs)?.combined()?;
    if let Some(id) = base_id {
        id.write_to(&mut file.extra);
    }
    let in_f16 = file.write_as(out, ty)?;
    Ok(AdapterReport::new(&file, out, ty, in_f16))
}

/// Writes the adapters, as one, as a PEFT folder with a model card. PEFT looks for the base under `base_id`; without
/// it, under what the adapter's metadata says, else under the file's name.
///
/// # Errors
/// A folder with files in it; an adapter that is not the base's; weights that PEFT has no module for.
pub fn export_peft(
    base: &ModelFile,
    specs: &[AdapterSpec],
    folder: &Path,
    base_id: Option<&BaseId>,
) -> Result<AdapterReport> {
    refuse_filled("--peft", folder, "choose another")?;
    let set = GgufSet::open(base.path())?;
    let adapters = Adapters::read(specs)?;
    adapters.check(&set, base.name())?;
    let file = adapters.combined()?;
    let id = base_id.cloned().or_else(|| BaseId::of_adapter(&file.extra));
    let name = id.as_ref().map_or(base.name().to_string(), BaseId::to_string);
    write_peft(&file, &PeftBase::from_gguf(set.head())?, &name, folder)?;
    let mut card = Card::new(&format!("LoRA adapter for {name}"), "peft", id.as_ref());
    card.text(
        "Numbers are those of the GGUF adapter, in F32. It was trained on the quantised weights of the base below: on \
         another quantisation, or none, it computes a little else.",
    );
    card.origin(base.name(), &set.sha256(), &adapters);
    if id.is_some() {
        card.text(
            "    from peft import AutoPeftModelForCausalLM\n    \
             model = AutoPeftModelForCausalLM.from_pretrained(\"this folder or repository\")",
        );
    }
    card.write(&folder.join("README.md"))?;
    Ok(AdapterReport::new(&file, folder, Type::F32, Vec::new()))
}

/// Reads a PEFT folder and writes it in GGUF.
///
/// # Errors
/// What [`read_peft`] says; an adapter that is not the base's.
pub fn import_peft(
    folder: &Path,
    base: &ModelFile,
    out: &Path,
    AdapterType(ty): AdapterType,
) -> Result<AdapterReport> {
    let set = GgufSet::open(base.path())?;
    refuse_inputs(set.paths().iter().map(PathBuf::as_path), out)?;
    let mut file = read_peft(folder, &PeftBase::from_gguf(set.head())?)?;
    if let Some(id) = base_name(folder).and_then(|name| name.parse::<BaseId>().ok()) {
        id.write_to(&mut file.extra);
    }
    let base_name = Path::new(base.name()).file_name().unwrap_or_default().to_string_lossy();
    file.extra.retain(|(key, _)| key != BASE && key != BASE_SHA256);
    file.extra.push((BASE.into(), base_name.as_ref().into()));
    file.extra.push((BASE_SHA256.into(), set.sha256().into()));
    let spec = AdapterSpec { path: folder.into(), factor: 1.0 };
    let adapters = Adapters::of(vec![(spec, file)])?;
    adapters.check(&set, base.name())?;
    check_head_copy(folder, &set)?;
    let file = adapters.combined()?;
    let in_f16 = file.write_as(out, ty)?;
    Ok(AdapterReport::new(&file, out, ty, in_f16))
}

/// The adapters, as one, on a loaded model; none without any.
///
/// # Errors
/// Adapters that cannot be read or are not this model's.
pub fn lora_of(model: &Model, specs: &[AdapterSpec]) -> Result<Option<Lora>> {
    if specs.is_empty() {
        return Ok(None);
    }
    let file = Adapters::read(specs)?.combined()?;
    let names = specs.iter().map(AdapterSpec::to_string).collect::<Vec<_>>().join(" + ");
    Lora::from_file(model, file, &names).map(Some)
}
