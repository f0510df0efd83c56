//! Models: configuration, weights by GGUF name, blocks with their gradients, adapters, taps.

mod batch;
mod blocks;
mod compare;
mod config;
mod engine;
mod inspect;
mod layer;
mod lora;
mod measure;
mod memo;
mod policy;
mod precheck;
mod taps;
mod weights;

use std::path::{Path, PathBuf};
use std::sync::Arc;

pub use batch::{Batch, Scored};
pub use compare::{Comparison, Contestant, compare};
pub use config::{Arch, Config};
pub(crate) use engine::kept_floats;
pub use engine::{Engine, Scores, Work};
pub use inspect::Description;
pub use lora::{Lora, Slot, Target, Targets};
pub use measure::{Activations, Largest, activations};
pub use policy::Policy;
pub(crate) use precheck::check as check_values;
pub use taps::{LayerTaps, Question, Walk};
pub use weights::{Layer, Linear, Weights};

use crate::ggml::Device;
use crate::gguf::GgufSet;
use crate::llama;
pub use crate::llama::Placement;
use crate::{Error, Result};

/// The small model inside the program, by this name on the command line.
pub const DEMO: &str = "demo";
static DEMO_BYTES: &[u8] = include_bytes!("../../assets/demo.gguf");

/// A loaded model: llama.cpp's weights, one copy, read by rollouts and training alike.
pub struct Model {
    engine: Arc<llama::Model>,
    config: Config,
    file: ModelFile,
    files: Vec<PathBuf>,
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
        let file = ModelFile::find(path)?;
        // Everything that llama.cpp would abort on is checked by our own reader first.
        let files = GgufSet::open(file.path())?;
        let arch = Arch::parse(files.head().architecture()?)?;
        precheck::check(files.head(), arch)?;
        let tensors = files.tensors().map(|(_, t)| (t.name.as_str(), t.ty));
        precheck::decodable(
            tensors,
            |ty| placement.device.decodes(ty),
            placement.device,
            file.name(),
        )?;
        let engine = Arc::new(llama::Model::load(file.path(), placement)?);
        let config = Config::new(arch, &engine.hparams()?, engine.vocab().n_tokens())?;
        let model = Model { engine, config, file, files: files.paths().to_vec() };
        Weights::collect(&model.engine, &model.config, model.name())?;
        Ok(model)
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

    /// The files it was read from: one, or the parts of a split set in their order.
    pub fn files(&self) -> &[PathBuf] {
        &self.files
    }

    /// All weights by name.
    pub fn weights(&self) -> Weights<'_> {
        Weights::collect(&self.engine, &self.config, self.name())
            .expect("checked when it was opened")
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
