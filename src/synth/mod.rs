//! Random weights in a published model's shape: for benchmarks, memory plans and tests of sizes that
//! nobody wants to fetch.
//!
//! A file is what `llama-quantize` would leave of a freshly initialised model: the shape's own
//! hyperparameters, a working vocabulary of its size, a chat template, and tensors in the types of the
//! wanted mixture. Weights have mean zero and the spread that keeps activations sane (`weights.rs` says how),
//! and gradients flow; what the model says is noise.

mod blocks;
mod hparams;
mod mixture;
mod published;
mod shape;
mod vocab;
mod weights;

use std::collections::BTreeMap;
use std::path::Path;

use rayon::prelude::*;

use blocks::Blocks;
pub use mixture::Mixture;
pub use shape::{DeltaNets, Experts, Gemma4, Multipliers, Rope, Shape, Softcaps, Window};
use weights::{Fill, Weights};

use crate::Result;
use crate::ggml::Type;
use crate::gguf::{GgufWriter, TensorSink, Value};

/// Bytes of random blocks made at a time, by one thread.
const CHUNK: usize = 1 << 20;
/// Chunks made side by side before they are written.
const CHUNKS: usize = 16;

/// ChatML, as the qwen models write it.
const TEMPLATE: &str = "{% for message in messages %}<|im_start|>{{ message['role'] }}\n\
    {{ message['content'] }}<|im_end|>\n{% endfor %}\
    {% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}";

/// What was written.
#[derive(Clone, Debug, serde::Serialize)]
pub struct Summary {
    /// The shape's name.
    pub shape: String,
    /// The mixture's name.
    pub r#type: String,
    /// Numbers in all tensors.
    pub parameters: u64,
    /// Tensors of each type.
    pub tensors: BTreeMap<&'static str, usize>,
    /// Bytes of all tensors.
    pub tensor_bytes: u64,
}

/// Writes a model of this shape with weights of this mixture; the same seed gives the same file.
///
/// # Errors
/// [`Error::Unsupported`] for a type that has no random blocks here, [`Error::Io`] when the file cannot
/// be written; nothing is left of it then.
pub fn write(shape: &Shape, mixture: &Mixture, seed: u64, path: &Path) -> Result<Summary> {
    fill(shape, mixture, Some(seed), path)
}

/// The same without random weights: they are zero and take no room on a disk that has files with holes. It opens, and its
/// memory can be planned.
///
/// # Errors
/// As of [`write`].
pub fn hollow(shape: &Shape, mixture: &Mixture, path: &Path) -> Result<Summary> {
    fill(shape, mixture, None, path)
}

fn fill(shape: &Shape, mixture: &Mixture, seed: Option<u64>, path: &Path) -> Result<Summary> {
    let mut summary = Summary {
        shape: shape.name.into(),
        r#type: mixture.name().into(),
        parameters: 0,
        tensors: BTreeMap::new(),
        tensor_bytes: 0,
    };
    let mut blocks: BTreeMap<Type, Blocks> = BTreeMap::new();
    let weights = Weights::new(shape, mixture);
    for w in &weights.0 {
        if let Fill::Random { .. } = w.fill
            && !blocks.contains_key(&w.ty)
        {
            blocks.insert(w.ty, Blocks::new(w.ty)?);
        }
    }
    let mut writer = GgufWriter::new();
    metadata(&mut writer, shape, mixture)?;
    for (i, w) in weights.0.iter().enumerate() {
        let n: u64 = w.shape.iter().product();
        *summary.tensors.entry(w.ty.name()).or_default() += 1;
        summary.parameters += n;
        summary.tensor_bytes +=
            w.ty.row_bytes(w.shape[0] as usize).expect("the mixture picks types that fit") as u64
                * (n / w.shape[0]);
        match &w.fill {
            Fill::Values(values) => writer.tensor_f32(&w.name, &w.shape, values)?,
            &Fill::Random { spread } => {
                let blocks = &blocks[&w.ty];
                let n_blocks = n as usize / w.ty.block_size();
                writer.tensor(&w.name, w.ty, &w.shape, move |sink| match seed {
                    Some(seed) => stream(sink, blocks, n_blocks, spread, [seed, i as u64]),
                    None => zeros(sink, n_blocks * blocks.bytes()),
                })?;
            }
        }
    }
    writer.write(path)?;
    Ok(summary)
}

/// Random blocks, a few chunks at a time, on all threads. What a chunk holds depends on its number alone.
fn stream(
    sink: &mut TensorSink<'_>,
    blocks: &Blocks,
    n_blocks: usize,
    spread: f32,
    [seed, tensor]: [u64; 2],
) -> Result<()> {
    let per_chunk = (CHUNK / blocks.bytes()).max(1) * blocks.bytes();
    let mut left = n_blocks * blocks.bytes();
    let mut buffer = vec![0u8; left.min(CHUNKS * per_chunk)];
    let mut first = 0;
    while left > 0 {
        let part = &mut buffer[..left.min(CHUNKS * per_chunk)];
        part.par_chunks_mut(per_chunk).enumerate().for_each(|(i, chunk)| {
            blocks.fill(chunk, spread, [seed, tensor, first + i as u64]);
        });
        sink.write(part)?;
        left -= part.len();
        first += CHUNKS as u64;
    }
    Ok(())
}

fn zeros(sink: &mut TensorSink<'_>, mut bytes: usize) -> Result<()> {
    let piece = vec![0; bytes.min(CHUNK)];
    while bytes > 0 {
        let n = bytes.min(piece.len());
        sink.write(&piece[..n])?;
        bytes -= n;
    }
    Ok(())
}

fn metadata(writer: &mut GgufWriter<'_>, shape: &Shape, mixture: &Mixture) -> Result<()> {
    writer.metadata("general.architecture", shape.arch)?;
    writer.metadata("general.type", "model")?;
    writer.metadata("general.name", format!("{} with random weights", shape.name))?;
    if let Some(file_type) = mixture.file_type() {
        writer.metadata("general.file_type", file_type)?;
    }
    writer.metadata("general.quantization_version", 2u32)?;
    hparams::metadata(writer, shape)?;
    vocab::metadata(writer, shape)?;
    writer.metadata("tokenizer.chat_template", Value::String(TEMPLATE.into()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::gguf::GgufFile;

    fn tiny(mixture: &str, seed: u64) -> Vec<u8> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("tiny.gguf");
        write(&Shape::find("tiny").unwrap(), &Mixture::parse(mixture).unwrap(), seed, &path)
            .unwrap();
        std::fs::read(path).unwrap()
    }

    #[test]
    fn a_seed_is_a_file() {
        assert!(tiny("q4_k_m", 1) == tiny("q4_k_m", 1));
        assert!(tiny("q4_k_m", 1) != tiny("q4_k_m", 2));
    }

    #[test]
    #[cfg(unix)]
    fn a_hollow_file_has_the_same_tensors_and_no_weights() {
        use std::os::unix::fs::MetadataExt;
        let dir = tempfile::tempdir().unwrap();
        let (full, empty) = (dir.path().join("full.gguf"), dir.path().join("empty.gguf"));
        let shape = Shape::find("smollm2-135m").unwrap().with_layers(2).unwrap();
        let mixture = Mixture::parse("q4_k_m").unwrap();
        write(&shape, &mixture, 1, &full).unwrap();
        hollow(&shape, &mixture, &empty).unwrap();
        let [full, empty] = [full, empty].map(|path| GgufFile::open(&path).unwrap());
        assert_eq!(format!("{:?}", full.tensors()), format!("{:?}", empty.tensors()));
        let metadata = std::fs::metadata(dir.path().join("empty.gguf")).unwrap();
        assert!(metadata.blocks() * 512 < metadata.len() / 2, "holes: {metadata:?}");
    }

    #[test]
    fn chunks_and_tensors_differ() {
        let blocks = Blocks::new(Type::Q8_0).unwrap();
        let (mut a, mut b, mut c) = ([0; 340], [0; 340], [0; 340]);
        blocks.fill(&mut a, 1.0, [1, 0, 0]);
        blocks.fill(&mut b, 1.0, [1, 1, 0]);
        blocks.fill(&mut c, 1.0, [1, 0, 1]);
        assert!(a != b && b != c && a != c);
    }

    #[test]
    fn the_summary_is_what_the_file_holds() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("tiny.gguf");
        let shape = Shape::find("tiny").unwrap();
        let summary = write(&shape, &Mixture::parse("q4_k_m").unwrap(), 1, &path).unwrap();
        let file = GgufFile::open(&path).unwrap();
        let bytes: u64 = file.tensors().iter().map(|t| t.n_bytes()).sum();
        let numbers: u64 = file.tensors().iter().map(|t| t.shape.iter().product::<u64>()).sum();
        assert_eq!((summary.tensor_bytes, summary.parameters), (bytes, numbers));
        assert_eq!(summary.tensors.values().sum::<usize>(), file.tensors().len());
    }
}
