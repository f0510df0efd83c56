//! Counts over one update on a model whose matrices are larger than any tile: no weight matrix in F32
//! and no `[vocabulary x tokens]` buffer ever exists.

mod common;

use std::alloc::{GlobalAlloc, Layout, System};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use bupo_gguf::Model;
use bupo_gguf::ggml::{ThreadPool, Type};
use bupo_gguf::gguf::{GgufFile, GgufWriter, Value};
use bupo_gguf::model::{Batch, Engine, Lora, Policy, Targets};

/// The system's allocator, remembering the largest single request.
struct Largest;

static LARGEST: AtomicUsize = AtomicUsize::new(0);

unsafe impl GlobalAlloc for Largest {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        LARGEST.fetch_max(layout.size(), Ordering::Relaxed);
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        unsafe { System.dealloc(pointer, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Largest = Largest;

const D: usize = 512;
const FF: usize = 2048;
const V: usize = 32768;
const LAYERS: usize = 2;
const TOKENS: usize = 300;

/// Q8_0 blocks of small values: a scale of 2^-9 and a pattern of quants.
fn q8_0(n: usize) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(n / 32 * 34);
    for block in 0..n / 32 {
        bytes.extend(0x1800u16.to_le_bytes());
        bytes.extend((0..32).map(|i| ((block * 31 + i * 17) % 61) as u8 as i8 as u8));
    }
    bytes
}

fn write_model(path: &Path) {
    let golden = GgufFile::open(&common::golden_dir().join("qwen3-q8_0.gguf")).unwrap();
    let ones = vec![1f32; FF];
    let mut writer = GgufWriter::new();
    for (key, value) in golden.metadata() {
        let changed = match key {
            "qwen3.embedding_length" => Value::U32(D as u32),
            "qwen3.block_count" => Value::U32(LAYERS as u32),
            "qwen3.feed_forward_length" => Value::U32(FF as u32),
            "qwen3.attention.head_count" => Value::U32(8),
            "qwen3.attention.head_count_kv" => Value::U32(4),
            "qwen3.attention.key_length" | "qwen3.attention.value_length" => Value::U32(64),
            "tokenizer.ggml.tokens" => {
                let Value::Array(old) = value else { panic!("{value:?}") };
                let old = old.as_strs().unwrap();
                let names =
                    (0..V).map(|i| old.get(i).map_or(format!("<|t{i}|>"), |t| t.to_string()));
                Value::Array(bupo_gguf::gguf::Array::strings(names))
            }
            "tokenizer.ggml.token_type" => {
                Value::Array(bupo_gguf::gguf::Array::from(&vec![1i32; V][..]))
            }
            _ => value.clone(),
        };
        writer.metadata(key, changed).unwrap();
    }
    let mut matrix = |name: &str, n_in: usize, n_out: usize| {
        let shape = [n_in as u64, n_out as u64];
        writer.tensor(name, Type::Q8_0, &shape, move |out| out.write(&q8_0(n_in * n_out))).unwrap();
    };
    matrix("token_embd.weight", D, V);
    for i in 0..LAYERS {
        for (name, n_in, n_out) in [
            ("attn_q", D, 512),
            ("attn_k", D, 256),
            ("attn_v", D, 256),
            ("attn_output", 512, D),
            ("ffn_gate", D, FF),
            ("ffn_up", D, FF),
            ("ffn_down", FF, D),
        ] {
            matrix(&format!("blk.{i}.{name}.weight"), n_in, n_out);
        }
    }
    for i in 0..LAYERS {
        for (name, n) in
            [("attn_norm", D), ("ffn_norm", D), ("attn_q_norm", 64), ("attn_k_norm", 64)]
        {
            writer.tensor_f32(&format!("blk.{i}.{name}.weight"), &[n as u64], &ones[..n]).unwrap();
        }
    }
    writer.tensor_f32("output_norm.weight", &[D as u64], &ones[..D]).unwrap();
    writer.write(path).unwrap();
}

#[test]
fn no_dequantised_matrix_and_no_logits_buffer() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("wide.gguf");
    write_model(&path);
    let model = Model::open(&path).unwrap();
    let lora = Lora::new(&model, &Targets::default(), 4, 8.0, 1).unwrap();
    let mut gradients = lora.zeros_like().unwrap();
    let mut engine = Engine::new(Arc::new(ThreadPool::new(2).unwrap())).unwrap();
    let tokens: Vec<i32> = (0..TOKENS as i32).map(|i| 1 + i % 250).collect();
    let mut batch = Batch::default();
    batch.push_group(&tokens[..20], &[&tokens[20..]], V).unwrap();
    let policy = Policy::full(LAYERS);

    LARGEST.store(0, Ordering::Relaxed);
    engine.forward(&model, Some(&lora), &batch, policy.depth()).unwrap();
    let scores = engine.score(&model, &batch, policy, 1.0, true).unwrap();
    let cotangents = vec![1.0; scores.logprobs.len()];
    engine.backward(&model, &lora, &mut gradients, &batch, policy, &cotangents).unwrap();

    let largest = LARGEST.load(Ordering::Relaxed);
    let (matrix, logits) = (D * FF * 4, V * TOKENS * 4);
    assert!(largest < matrix / 2, "an allocation of {largest} bytes; a matrix in F32 has {matrix}");
    assert!(largest < logits / 2, "an allocation of {largest} bytes; the logits have {logits}");
    // ggml's own buffers: residuals, and a layer's intermediate results, D and FF wide only. A node of
    // V x T or the unembedding in F32 would not fit.
    let residuals = (LAYERS + 4) * D * TOKENS * 4;
    let layer = (10 * D + 7 * FF) * TOKENS * 4;
    assert!(engine.bytes() < residuals + layer, "{} bytes", engine.bytes());
    assert!(residuals + layer < logits && logits < V * D * 4, "the bound means something");
}
