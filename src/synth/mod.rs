//! Random weights in a published model's shape: for benchmarks, memory plans and tests of sizes that
//! nobody wants to fetch.
//!
//! A file is what `llama-quantize` would leave of a freshly initialised model: the shape's own
//! hyperparameters, a working vocabulary of its size, a chat template, and tensors in the types of the
//! wanted mixture. Weights have mean zero and the spread that keeps activations of size 1 (see
//! [`Weights::new`]), and gradients flow; what the model says is noise.

mod blocks;
mod mixture;
mod shape;
mod vocab;

use std::collections::BTreeMap;
use std::path::Path;

use rayon::prelude::*;

use blocks::Blocks;
pub use mixture::Mixture;
pub use shape::Shape;

use crate::ggml::Type;
use crate::gguf::{GgufWriter, TensorSink, Value};
use crate::{Error, Result};

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
                let key = [seed, i as u64];
                let n_blocks = n as usize / w.ty.block_size();
                writer.tensor(&w.name, w.ty, &w.shape, move |sink| {
                    stream(sink, blocks, n_blocks, spread, key)
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

/// How a tensor gets its values.
enum Fill {
    /// F32.
    Values(Vec<f32>),
    /// Mean 0 and this standard deviation.
    Random { spread: f32 },
}

struct Weight {
    name: String,
    shape: Vec<u64>,
    ty: Type,
    fill: Fill,
}

/// The tensors of a model, in a file's order.
struct Weights(Vec<Weight>);

impl Weights {
    /// Linear maps of K inputs spread by `1/sqrt(K)`, those that write to the residual by another
    /// `1/sqrt(2 L)` (as GPT-2 was initialised); embeddings by `2/sqrt(D)`, so that logits spread by 2
    /// nats and the final policy is neither uniform nor certain.
    fn new(shape: &Shape, mixture: &Mixture) -> Weights {
        let mut all = Weights(Vec::new());
        let (d, v, f) = (shape.n_embd, shape.n_vocab, shape.n_ff);
        let (q, kv) = (shape.head_size * shape.n_head, shape.head_size * shape.n_head_kv);
        let embedding = 2.0 / (d as f32).sqrt();
        let residual = 1.0 / (2.0 * shape.n_layer as f32).sqrt();
        let of = |n: usize| 1.0 / (n as f32).sqrt();
        all.random("token_embd", mixture.embedding(d, shape.tied), [d, v], embedding);
        if !shape.tied {
            all.random("output", mixture.output(d), [d, v], embedding);
        }
        all.ones("output_norm", d);
        if let Some(factor) = shape.rope_factor {
            all.values("rope_freqs.weight", shape::rope_freqs(shape, factor));
        }
        for i in 0..shape.n_layer {
            let name = |what: &str| format!("blk.{i}.{what}");
            all.ones(&name("attn_norm"), d);
            all.ones(&name("ffn_norm"), d);
            if shape.arch == "qwen3" {
                all.ones(&name("attn_q_norm"), shape.head_size);
                all.ones(&name("attn_k_norm"), shape.head_size);
            }
            for (what, n_in, n_out, spread) in [
                ("attn_q", d, q, of(d)),
                ("attn_k", d, kv, of(d)),
                ("attn_v", d, kv, of(d)),
                ("attn_output", q, d, residual * of(q)),
                ("ffn_gate", d, f, of(d)),
                ("ffn_up", d, f, of(d)),
                ("ffn_down", f, d, residual * of(f)),
            ] {
                let ty = mixture.layer(what, i, shape, n_in);
                all.random(&name(what), ty, [n_in, n_out], spread);
                if shape.arch == "qwen2" && matches!(what, "attn_q" | "attn_k" | "attn_v") {
                    let bias = Fill::Random { spread: 0.1 };
                    all.push(format!("blk.{i}.{what}.bias"), vec![n_out], Type::F32, bias);
                }
            }
        }
        all
    }

    fn push(&mut self, name: String, shape: Vec<usize>, ty: Type, fill: Fill) {
        let shape = shape.into_iter().map(|n| n as u64).collect();
        self.0.push(Weight { name, shape, ty, fill });
    }

    fn random(&mut self, name: &str, ty: Type, shape: [usize; 2], spread: f32) {
        self.push(format!("{name}.weight"), shape.to_vec(), ty, Fill::Random { spread });
    }

    fn ones(&mut self, name: &str, n: usize) {
        self.values(&format!("{name}.weight"), vec![1.0; n]);
    }

    fn values(&mut self, name: &str, values: Vec<f32>) {
        self.push(name.into(), vec![values.len()], Type::F32, Fill::Values(values));
    }
}

fn metadata(writer: &mut GgufWriter<'_>, shape: &Shape, mixture: &Mixture) -> Result<()> {
    let arch = shape.arch;
    writer.metadata("general.architecture", arch)?;
    writer.metadata("general.type", "model")?;
    writer.metadata("general.name", format!("{} with random weights", shape.name))?;
    if let Some(file_type) = mixture.file_type() {
        writer.metadata("general.file_type", file_type)?;
    }
    writer.metadata("general.quantization_version", 2u32)?;
    let rope_dimensions = shape.head_size;
    for (key, n) in [
        ("vocab_size", shape.n_vocab),
        ("context_length", shape.n_ctx),
        ("embedding_length", shape.n_embd),
        ("block_count", shape.n_layer),
        ("feed_forward_length", shape.n_ff),
        ("rope.dimension_count", rope_dimensions),
        ("attention.head_count", shape.n_head),
        ("attention.head_count_kv", shape.n_head_kv),
        ("attention.key_length", shape.head_size),
        ("attention.value_length", shape.head_size),
    ] {
        let n = u32::try_from(n).map_err(|_| {
            Error::invalid(format!("{arch}.{key}"), "below 2^32", n.to_string(), "lower it")
        })?;
        writer.metadata(&format!("{arch}.{key}"), n)?;
    }
    writer.metadata(&format!("{arch}.rope.freq_base"), shape.rope_base)?;
    writer.metadata(&format!("{arch}.attention.layer_norm_rms_epsilon"), shape.rms_eps)?;
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
