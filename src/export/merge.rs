//! Base and adapters to one model file.

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use serde::Serialize;

use super::adapters::{AdapterSpec, Adapters};
use super::feedback::Feedback;
use super::imatrix::Imatrix;
use super::plan::{self, TypeChoice};
use super::provenance;
use super::rows::{Conversion, Sums};
use crate::ggml::Type;
use crate::gguf::{GgufSet, GgufWriter, Value};
use crate::{Error, Result};

const FILE_TYPE: &str = "general.file_type";
const QUANTISATION_VERSION: &str = "general.quantization_version";
/// `GGML_QNT_VERSION`: the version of the block formats.
const QUANTISATION: u32 = 2;

/// How to merge.
#[derive(Clone, Debug)]
pub struct MergeOptions {
    /// Types of the result.
    pub ty: TypeChoice,
    /// Leave every tensor that no adapter has as it is, whatever `ty` says.
    pub only_adapted: bool,
    /// Round to nearest only, without the error feedback that keeps small changes in types of few bits.
    pub plain_rounding: bool,
    /// Raise the type of a tensor until `||rounding|| <= X ||delta||`.
    pub keep_delta: Option<f32>,
    /// Files of at most so many bytes.
    pub split_max_bytes: Option<u64>,
}

/// What became of one tensor that was not copied.
#[derive(Clone, Debug, Serialize)]
pub struct TensorReport {
    /// Name.
    pub name: String,
    /// Type in the base.
    pub from: String,
    /// Type in the result.
    pub to: String,
    /// `||Q - W'|| / ||W' - W||` (W base, W' merged, Q as written): below 1 the change stands out of the
    /// rounding. None where no adapter touches the tensor.
    pub error_to_delta: Option<f64>,
    /// `<Q - W, W' - W> / ||W' - W||^2`: the share of the change that is there after rounding, 1 for all.
    pub delta_kept: Option<f64>,
    /// Bytes more than without `keep_delta`.
    pub raised_bytes: u64,
}

/// What a merge wrote.
#[derive(Clone, Debug, Serialize)]
pub struct MergeReport {
    /// Files, in order.
    pub out: Vec<PathBuf>,
    /// Bytes of all.
    pub bytes: u64,
    /// Hash of the base's bytes.
    pub base_sha256: String,
    /// As asked for.
    #[serde(rename = "type")]
    pub ty: String,
    /// How many tensors there are of each type: rows that are no whole blocks of the asked one show here.
    pub types: BTreeMap<String, usize>,
    /// Tensors copied byte for byte.
    pub copied: usize,
    /// The others, in file order.
    pub converted: Vec<TensorReport>,
    /// `sqrt(sum ||Q - W'||^2 / sum ||W' - W||^2)` over all tensors with adapters.
    pub error_to_delta: Option<f64>,
    /// As for a tensor, over all with adapters.
    pub delta_kept: Option<f64>,
    /// Bytes that `keep_delta` cost.
    pub raised_bytes: u64,
}

/// Share of the change below which a merge is not the model that was trained: at 0.82 answers were as right as the
/// adapter's, at 0.22 they were other answers.
const LITTLE: f64 = 0.75;

impl MergeReport {
    /// What to tell the user where rounding took much of the change, with the remedy.
    pub fn warning(&self) -> Option<String> {
        let kept = self.delta_kept.filter(|kept| *kept < LITTLE)?;
        let adapted = self.converted.iter().filter(|t| t.delta_kept.is_some());
        let types: BTreeSet<&str> = adapted.map(|t| t.to.as_str()).collect();
        let types: Vec<&str> = types.into_iter().collect();
        let remedy = match self.raised_bytes {
            0 => {
                "merge again with --keep-delta, which raises the types of the tensors concerned, or with a wider --type such as q8_0"
            }
            _ => "merge again with a smaller --keep-delta X, or with a wider --type such as q8_0",
        };
        Some(format!(
            "WARNING: only {:.1} % of the change outlived rounding to {}: this model will not answer as base and \
             adapter do. Remedy: {remedy}; or keep the adapter beside the base. --check DATA measures the difference",
            100.0 * kept,
            types.join(", "),
        ))
    }
}

/// A base and adapters that fit it.
pub struct Merger {
    base: GgufSet,
    path: PathBuf,
    name: String,
    adapters: Adapters,
    imatrix: Option<Imatrix>,
}

impl Merger {
    /// Opens the base at `path`, which messages and metadata call `name`.
    ///
    /// # Errors
    /// Unsound files; an adapter that is not this model's.
    pub fn new(
        path: &Path,
        name: &str,
        adapters: &[AdapterSpec],
        imatrix: Option<Imatrix>,
    ) -> Result<Merger> {
        let base = GgufSet::open(path)?;
        let adapters = Adapters::read(adapters)?;
        adapters.check(&base, name)?;
        Ok(Merger { base, path: path.into(), name: name.into(), adapters, imatrix })
    }

    /// The adapters.
    pub fn adapters(&self) -> &Adapters {
        &self.adapters
    }

    /// Writes the merged model to `out`, whole or not at all. `progress(done, total)` counts tensors.
    ///
    /// # Errors
    /// `out` is one of the inputs; a type that cannot be written or that needs an importance matrix; numbers
    /// that overflow; no room on the disk. Nothing is left under `out` then but what was there.
    pub fn write(
        &self,
        out: &Path,
        options: &MergeOptions,
        progress: &mut dyn FnMut(usize, usize),
    ) -> Result<MergeReport> {
        self.refuse_inputs(out)?;
        let mut types = plan::types(&self.base, &self.path, options.ty, self.imatrix.as_ref())?;
        let mut raised = vec![0u64; types.len()];
        for (i, (_, info)) in self.base.tensors().enumerate() {
            let adapted = !self.adapters.deltas(&info.name).is_empty();
            if options.only_adapted && !adapted {
                types[i] = info.ty;
            }
            if let (Some(most), true) = (options.keep_delta, adapted) {
                let before = types[i];
                types[i] = self.raise(i, before, options, most)?;
                let size = |ty: Type| ty.row_bytes(info.n_elements() as usize).unwrap_or(0) as u64;
                raised[i] = size(types[i]).saturating_sub(size(before));
            }
        }
        let mut counts = BTreeMap::new();
        for ty in &types {
            *counts.entry(ty.name().to_owned()).or_insert(0) += 1;
        }
        let metadata = provenance::metadata((&self.base, &self.name), &self.adapters, options.ty)?;
        let base_sha256 = match &metadata[1].1 {
            Value::String(hash) => hash.clone(),
            other => other.to_string(),
        };
        let reports = RefCell::new(Vec::new());
        let done = RefCell::new((0usize, progress));
        let total = types.len();
        let mut writer = GgufWriter::new();
        self.write_metadata(&mut writer, metadata, options.ty, &types)?;
        let mut copied = 0;
        for (i, (file, info)) in self.base.tensors().enumerate() {
            let (to, raised_bytes) = (types[i], raised[i]);
            let conversion = self.conversion(i, to, options)?;
            copied += conversion.is_none() as usize;
            let (reports, done) = (&reports, &done);
            writer.tensor(&info.name, to, &info.shape, move |sink| {
                match conversion {
                    None => {
                        for piece in file.bytes(info).chunks(8 << 20) {
                            sink.write(piece)?;
                            file.release(piece);
                        }
                    }
                    Some(conversion) => {
                        let sums = conversion.run(&mut |bytes| sink.write(bytes))?;
                        reports.borrow_mut().push((conversion.report(sums, raised_bytes), sums));
                    }
                }
                let (done, progress) = &mut *done.borrow_mut();
                *done += 1;
                progress(*done, total);
                Ok(())
            })?;
        }
        let paths = match options.split_max_bytes {
            Some(most) => writer.write_split(out, most, |part| self.refuse_inputs(part))?,
            None => {
                writer.write(out)?;
                vec![out.to_path_buf()]
            }
        };
        let bytes = paths.iter().map(|path| size_of_file(path)).sum::<Result<u64>>()?;
        let (converted, sums): (Vec<TensorReport>, Vec<Sums>) =
            reports.into_inner().into_iter().unzip();
        let (error_to_delta, delta_kept) =
            ratios(sums.into_iter().fold(Sums::default(), Sums::add));
        Ok(MergeReport {
            out: paths,
            bytes,
            base_sha256,
            ty: options.ty.to_string(),
            types: counts,
            copied,
            converted,
            error_to_delta,
            delta_kept,
            raised_bytes: raised.iter().sum(),
        })
    }

    /// What becomes of tensor `index` as `to`; none when it is copied.
    fn conversion(
        &self,
        index: usize,
        to: Type,
        options: &MergeOptions,
    ) -> Result<Option<Conversion<'_>>> {
        let (file, info) = self.base.tensors().nth(index).expect("an index of this base");
        let deltas = self.adapters.deltas(&info.name);
        if deltas.is_empty() && to == info.ty {
            return Ok(None);
        }
        let place = || format!("{}: tensor '{}'", self.name, info.name);
        if !info.ty.can_dequantize() {
            let expected = "a type that can be dequantised";
            return Err(Error::invalid(place(), expected, info.ty.name(), "choose another base"));
        }
        if !to.can_quantize() {
            let advice = "choose a --type such as q8_0";
            return Err(Error::invalid(place(), "a type that can be written", to.name(), advice));
        }
        let importance = match &self.imatrix {
            Some(imatrix) => imatrix.of(&info.name, info.shape[0] as usize)?,
            None => None,
        };
        if importance.is_none() && plan::needs_importance(&info.name, to, options.ty) {
            return Err(Error::invalid(
                format!("{}, to be written as {to}", place()),
                "an importance matrix that has it",
                "none",
                "give --imatrix FILE, or choose another --type",
            ));
        }
        // From eight bits on, rounding to nearest keeps what there is to keep.
        let few_bits = to.block_bytes() < to.block_size();
        let feedback = if few_bits && !options.plain_rounding {
            Feedback::of_experts(&deltas)
        } else {
            Vec::new()
        };
        Ok(Some(Conversion { file, info, to, deltas, importance, feedback }))
    }

    /// The first type from `ty` upwards in which rounding stays below `most` times the change.
    fn raise(&self, index: usize, mut ty: Type, options: &MergeOptions, most: f32) -> Result<Type> {
        loop {
            let Some(conversion) = self.conversion(index, ty, options)? else { return Ok(ty) };
            let sums = conversion.run(&mut |_| Ok(()))?;
            if sums.error.sqrt() <= most as f64 * sums.delta.sqrt() {
                return Ok(ty);
            }
            match plan::raised(ty, conversion.info.shape[0] as usize) {
                Some(next) => ty = next,
                None => return Ok(ty),
            }
        }
    }

    fn write_metadata(
        &self,
        writer: &mut GgufWriter,
        own: Vec<(String, Value)>,
        choice: TypeChoice,
        types: &[Type],
    ) -> Result<()> {
        let is_own = |key: &str| own.iter().any(|(own, _)| own == key);
        let file_type = match choice {
            TypeChoice::File(ty) => Some(Value::U32(ty.raw())),
            TypeChoice::Keep => None,
        };
        let quantised = types.iter().any(|ty| ty.block_size() > 1);
        let version = quantised.then_some(Value::U32(QUANTISATION));
        for (key, value) in self.base.metadata().filter(|(key, _)| !is_own(key)) {
            let value = match key {
                FILE_TYPE => file_type.as_ref().unwrap_or(value),
                QUANTISATION_VERSION => version.as_ref().unwrap_or(value),
                _ => value,
            };
            writer.metadata(key, value.clone())?;
        }
        for (key, value) in [(FILE_TYPE, file_type), (QUANTISATION_VERSION, version)] {
            if let Some(value) = value.filter(|_| self.base.head().get(key).is_none()) {
                writer.metadata(key, value)?;
            }
        }
        for (key, value) in own {
            writer.metadata(&key, value)?;
        }
        Ok(())
    }

    /// Nothing that is read is written over.
    fn refuse_inputs(&self, out: &Path) -> Result<()> {
        let adapters = self.adapters.iter().map(|(spec, _)| spec.path.as_path());
        refuse_inputs(self.base.paths().iter().map(PathBuf::as_path).chain(adapters), out)
    }
}

/// Refuses an `out` that is one of the files that are read, under whatever name.
pub(super) fn refuse_inputs<'p>(inputs: impl Iterator<Item = &'p Path>, out: &Path) -> Result<()> {
    for input in inputs {
        if same_file(input, out) {
            return Err(Error::invalid(
                format!("--out {}", out.display()),
                "a file of its own",
                format!("{}, which is read", input.display()),
                "choose another name",
            ));
        }
    }
    Ok(())
}

impl Conversion<'_> {
    fn report(&self, sums: Sums, raised_bytes: u64) -> TensorReport {
        let (error_to_delta, delta_kept) = ratios(sums);
        TensorReport {
            name: self.info.name.clone(),
            from: self.info.ty.name().into(),
            to: self.to.name().into(),
            error_to_delta,
            delta_kept,
            raised_bytes,
        }
    }
}

/// (error_to_delta, delta_kept); none without a change.
fn ratios(sums: Sums) -> (Option<f64>, Option<f64>) {
    let there = sums.delta > 0.0;
    (there.then(|| (sums.error / sums.delta).sqrt()), there.then(|| sums.kept / sums.delta))
}

/// Whether both names stand for one file: by path, symbolic or hard link.
fn same_file(a: &Path, b: &Path) -> bool {
    #[cfg(unix)]
    if let (Ok(a), Ok(b)) = (std::fs::metadata(a), std::fs::metadata(b)) {
        use std::os::unix::fs::MetadataExt;
        return (a.dev(), a.ino()) == (b.dev(), b.ino());
    }
    match (std::fs::canonicalize(a), std::fs::canonicalize(b)) {
        (Ok(a), Ok(b)) => a == b,
        _ => a == b,
    }
}

fn size_of_file(path: &Path) -> Result<u64> {
    Ok(std::fs::metadata(path).map_err(Error::io("read", path))?.len())
}
