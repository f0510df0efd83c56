//! Models: configuration, weights by GGUF name, architectures as forward functions on a tape that walks back by
//! itself, adapters, taps.

pub(crate) mod arch;
mod batch;
mod compare;
mod config;
mod distill;
mod dry;
mod engine;
mod inspect;
mod lora;
mod measure;
mod memo;
mod policy;
mod precheck;
mod shared;
mod tape;
mod taps;
mod weights;

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

pub use arch::{FAMILIES, Family};
pub use batch::{Batch, Scored};
pub use compare::{ComparedModel, Comparison, compare};
pub use config::{Config, DeltaConfig, Experts, LayerConfig};
pub use distill::{Divergences, TeacherHidden};
pub use engine::{Engine, Scores, Work};
pub use inspect::{Description, runs};
pub use lora::{AdapterShape, Lora, Map, Targets};
pub use measure::{Activations, Largest, activations, kept_bytes};
pub use policy::Policy;
pub(crate) use precheck::check_any as check_values;
pub use taps::{LayerTaps, Question, Walk};
pub use weights::Weights;

use lora::{Adapter, Pair};
use tape::{LAYER_NODES, Parts, Tape, Taps, Var};

use crate::ggml::{Arena, Device, Tensor, Type};
use crate::gguf::{GgufSet, Value};
use crate::llama;
pub use crate::llama::Placement;
use crate::ops::{self, Head, Logprob, LowRank};
use crate::{Error, Result};

/// The small model inside the program, by this name on the command line.
pub const DEMO: &str = "demo";
/// `general.name` of that model.
const DEMO_TITLE: &str = "bupo-gguf demo";
static DEMO_BYTES: &[u8] = include_bytes!("../../assets/demo.gguf");

/// A loaded model: llama.cpp's weights, one copy, read by rollouts and training alike.
pub struct Model {
    engine: Arc<llama::Model>,
    config: Config,
    index: weights::Index,
    maps: Vec<Map>,
    // Tokens of the contexts that it decodes in; 0 where none was said.
    context: AtomicUsize,
    file: ModelFile,
    files: Vec<PathBuf>,
    // Texts of the metadata whose keys begin with `general.`.
    about: Vec<(String, String)>,
}

/// Where a model lies on the disk: what a path on the command line means.
pub struct ModelFile {
    path: PathBuf,
    name: String,
    // The demo model's file; gone when this is dropped.
    _demo: Option<DemoFile>,
}

impl ModelFile {
    /// The file of this path; for `demo` a temporary one with the embedded model.
    ///
    /// # Errors
    /// When the embedded model cannot be written.
    pub fn find(path: &Path) -> Result<ModelFile> {
        if path.as_os_str() == DEMO {
            let demo = write_demo()?;
            return Ok(ModelFile { path: demo.path(), name: DEMO.into(), _demo: Some(demo) });
        }
        Ok(ModelFile { path: path.into(), name: path.display().to_string(), _demo: None })
    }

    /// The (first) file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// As given on the command line.
    pub fn name(&self) -> &str {
        &self.name
    }
}

impl Model {
    /// Opens a GGUF file (the first of a split set stands for all), or the embedded model for `demo`.
    ///
    /// # Errors
    /// Missing, truncated or non-GGUF files, unsupported architectures, tensors or types; llama.cpp's
    /// own words when it refuses.
    pub fn open(path: &Path) -> Result<Model> {
        Model::open_on(path, Placement::default())
    }

    /// [`Model::open`] with weights where `placement` says; what is made for the model, adapters say, lies
    /// there too.
    ///
    /// # Errors
    /// Those of [`Model::open`], and too little memory on the GPU.
    pub fn open_on(path: &Path, placement: Placement) -> Result<Model> {
        Model::find(path, placement.device, |file| llama::Model::load(file, placement))
    }

    /// The model without its weights: what it is made of, and whether it opens. It cannot be computed with.
    ///
    /// # Errors
    /// Those of [`Model::open`].
    pub fn outline(path: &Path) -> Result<Model> {
        Model::find(path, Device::Cpu, llama::Model::load_outline)
    }

    fn find(
        path: &Path,
        device: Device,
        load: impl FnOnce(&Path) -> Result<llama::Model>,
    ) -> Result<Model> {
        let file = ModelFile::find(path)?;
        // Everything that llama.cpp would abort on is checked by our own reader first.
        let files = GgufSet::open(file.path())?;
        let family = Family::of(&files)?;
        precheck::check(files.head(), family)?;
        precheck::check_recurrent(&files, family)?;
        let tensors = files.tensors().map(|(_, t)| (t.name.as_str(), t.ty));
        precheck::decodable(tensors, |ty| device.decodes(ty), device, file.name())?;
        let engine = Arc::new(load(file.path())?);
        let config = Config::new(family, &engine)?;
        let index = Weights::index(&engine);
        let text = |(key, value): (&str, &Value)| match value {
            Value::String(text) if key.starts_with("general.") => Some((key.into(), text.clone())),
            _ => None,
        };
        let about = files.metadata().filter_map(text).collect();
        let files = files.paths().to_vec();
        let (maps, context) = (Vec::new(), AtomicUsize::new(0));
        let mut model = Model { engine, config, index, maps, context, file, files, about };
        model.maps = model.dry_run()?;
        Ok(model)
    }

    /// Runs every layer's forward without computing: all tensors that it reads must be there and fit, and none
    /// may be left over that llama.cpp would compute with. Gives the linear maps, by layer and in the order of one, and
    /// at last the unembedding where it is not the embedding.
    ///
    /// # Errors
    /// [`Error::Invalid`] naming a tensor that is missing or does not fit, [`Error::Unsupported`] one too many.
    fn dry_run(&self) -> Result<Vec<Map>> {
        let mut batch = Batch::default();
        batch.push_group(&[0], &[&[0, 0]], self.config.n_vocab)?;
        let mut maps = Vec::new();
        let mut touched = std::collections::BTreeSet::new();
        for layer in 0..=self.config.n_layer {
            let arena = Arena::new(LAYER_NODES);
            let mut tape = Tape::dry(&arena, self.parts(None, &batch), layer);
            if layer == 0 {
                // What is before the layers and after them.
                let (d, v) = (self.config.n_embd, self.config.n_vocab);
                tape.global("token_embd.weight", &[d, v]);
                if tape.find_global("output.weight", &[d, v]).is_some() {
                    maps.push(Map::unembedding(self.config.n_layer, [d, v]));
                }
                tape.global("output_norm.weight", &[d]);
            } else {
                let x = tape.leaf(arena.tensor(Type::F32, &[self.config.n_embd, batch.len()]));
                self.layer(&mut tape, x);
            }
            let dry = tape.into_dry();
            dry.check(self.name())?;
            touched.extend(dry.touched);
            maps.extend(dry.maps);
        }
        let left_over =
            self.weights().names().filter(|&n| !touched.contains(n) && !self.is_beside(n));
        if let Some(name) = left_over.min() {
            return Err(Error::Unsupported {
                what: "tensor",
                got: name.into(),
                supported: format!("those of a plain {} model", self.config.family),
            });
        }
        maps.sort_by_key(Map::place);
        Ok(maps)
    }

    /// Whether a tensor of the file is one that nothing here reads.
    fn leaves_alone(&self, tensor: &str) -> bool {
        self.is_beside(tensor) || self.weights().find(tensor).is_none()
    }

    /// Whether a tensor belongs to a block behind the last layer, which predicts further tokens (MTP).
    fn is_beside(&self, tensor: &str) -> bool {
        let number = tensor.strip_prefix("blk.").and_then(|rest| rest.split('.').next());
        number.and_then(|n| n.parse::<usize>().ok()).is_some_and(|n| n >= self.config.n_layer)
    }

    /// Sizes and settings.
    pub fn config(&self) -> &Config {
        &self.config
    }

    /// Where it is computed.
    pub fn device(&self) -> Device {
        self.engine.device()
    }

    /// llama.cpp's model.
    pub fn engine(&self) -> &Arc<llama::Model> {
        &self.engine
    }

    /// Path as given, or `demo`.
    pub fn name(&self) -> &str {
        self.file.name()
    }

    /// Whether it is the small model inside the program, or was made from it.
    pub fn is_demo(&self) -> bool {
        self.about("general.name") == Some(DEMO_TITLE)
    }

    /// A text of the file's metadata, of those whose keys begin with `general.`.
    pub fn about(&self, key: &str) -> Option<&str> {
        self.about.iter().find(|(name, _)| name == key).map(|(_, text)| text.as_str())
    }

    /// Number of its weights.
    pub fn n_params(&self) -> u64 {
        self.engine.tensors().map(|t| t.len() as u64).sum()
    }

    /// The files it was read from: one, or the parts of a split set in their order.
    pub fn files(&self) -> &[PathBuf] {
        &self.files
    }

    /// All weights by name.
    pub fn weights(&self) -> Weights<'_> {
        Weights::new(&self.engine, &self.index)
    }

    /// The linear maps that can carry an adapter, by layer and in the order of one; at last the unembedding where it is
    /// not the embedding.
    pub fn maps(&self) -> &[Map] {
        &self.maps
    }

    /// What the graphs of its layers are made of.
    fn parts<'a>(&'a self, adapter: Option<Adapter<'a>>, batch: &'a Batch) -> Parts<'a> {
        let long_context = self.context_of(batch) > self.config.n_ctx_orig;
        let (config, weights) = (&self.config, self.weights());
        Parts { config, weights, adapter, batch, shared: None, long_context }
    }

    /// A layer's forward, from H^(l-1): `[D, T]`.
    fn layer(&self, tape: &mut Tape<'_>, x: Var) -> Taps {
        (self.config.family.layer)(tape, x)
    }

    /// H^0 of tokens `[T]`: `[D, T]`.
    fn embed<'a>(&'a self, arena: &'a Arena, tokens: Tensor<'a>) -> Tensor<'a> {
        let rows = arena.rows(self.weights().embedding(), tokens);
        arena.scale(rows, self.config.embedding_scale)
    }

    /// The norm before the unembedding, of hidden states `[D, T]`.
    fn final_norm<'a>(&'a self, arena: &'a Arena, hidden: Tensor<'a>) -> Tensor<'a> {
        ops::rms_norm(arena, hidden, self.weights().output_norm(), self.config.rms_eps)
    }

    /// What makes logits of hidden states `[D, T]`, the adapter's term included.
    fn head<'a>(
        &'a self,
        arena: &'a Arena,
        hidden: Tensor<'a>,
        lora: Option<&'a Lora>,
    ) -> Head<'a> {
        let pair = lora.and_then(|lora| lora.head_pair(self.config.n_layer));
        let low = pair.map(|Pair { a, b, scale, .. }| LowRank {
            factor: b,
            input: ops::linear(arena, a, hidden, None, None), // [r, T]
            scale,
        });
        Head { low, ..Head::new(hidden, self.weights().unembedding(), self.config.logits) }
    }

    /// d logprob / d hidden, `[D, T]`, of what [`Model::head`] made.
    fn head_back<'a>(
        &'a self,
        arena: &'a Arena,
        lora: Option<&'a Lora>,
        scored: &Logprob<'a>,
    ) -> Option<Tensor<'a>> {
        let own = scored.gradient?;
        let pair = lora.and_then(|lora| lora.head_pair(self.config.n_layer));
        let (Some(du), Some(Pair { a, .. })) = (scored.gradient_low, pair) else {
            return Some(own);
        };
        Some(ops::linear_back(arena, a, du, None, Some(own)))
    }

    /// Says how long the contexts are that the model decodes in, so that training computes as rollouts do: some
    /// models rotate by other factors in long ones, however short the text. Before, a batch's longest sequence counts.
    pub fn set_context(&self, tokens: usize) {
        self.context.store(tokens, Ordering::Relaxed);
    }

    fn context_of(&self, batch: &Batch) -> usize {
        match self.context.load(Ordering::Relaxed) {
            0 => batch.positions.iter().max().map_or(0, |&last| last as usize + 1),
            said => said,
        }
    }
}

/// A file in memory, which ends with the process, however that ends.
#[cfg(target_os = "linux")]
struct DemoFile(std::fs::File);

#[cfg(target_os = "linux")]
impl DemoFile {
    fn path(&self) -> PathBuf {
        use std::os::fd::AsRawFd;
        format!("/proc/self/fd/{}", self.0.as_raw_fd()).into()
    }
}

/// llama.cpp opens files, so the embedded model is put into one for as long as it is in use.
#[cfg(target_os = "linux")]
fn write_demo() -> Result<DemoFile> {
    use rustix::fs::{MemfdFlags, memfd_create};
    let place = Path::new("memfd:bupo-demo");
    let memory = memfd_create("bupo-demo", MemfdFlags::CLOEXEC)
        .map_err(|e| Error::io("create", place)(e.into()))?;
    let mut file = std::fs::File::from(memory);
    std::io::Write::write_all(&mut file, DEMO_BYTES).map_err(Error::io("write", place))?;
    Ok(DemoFile(file))
}

/// A temporary file; a process that is killed leaves it behind.
#[cfg(not(target_os = "linux"))]
struct DemoFile(tempfile::TempPath);

#[cfg(not(target_os = "linux"))]
impl DemoFile {
    fn path(&self) -> PathBuf {
        self.0.to_path_buf()
    }
}

/// llama.cpp opens files, so the embedded model is put into one for as long as it is in use.
#[cfg(not(target_os = "linux"))]
fn write_demo() -> Result<DemoFile> {
    let folder = std::env::temp_dir();
    let mut file = tempfile::Builder::new()
        .prefix("bupo-demo-")
        .suffix(".gguf")
        .tempfile_in(&folder)
        .map_err(Error::io("create a file in", &folder))?;
    std::io::Write::write_all(&mut file, DEMO_BYTES).map_err(Error::io("write", file.path()))?;
    Ok(DemoFile(file.into_temp_path()))
}
