//! Counts over one update on a model whose matrices are larger than any tile: no weight matrix in F32
//! and no `[vocabulary x tokens]` buffer ever exists; every weight is dequantised once per pass, however many
//! the tokens; the log-prob head takes the memory that it says.
//!
//! The product library keeps a buffer for each thread that is as large as the processor's second-level cache,
//! whatever is multiplied: it is known by its size and alignment, and not counted.

mod common;

use std::alloc::{GlobalAlloc, Layout, System};
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use bupo_gguf::Model;
use bupo_gguf::ggml::{Arena, Executor, Graph, Input, ThreadPool, Type};
use bupo_gguf::gguf::{GgufFile, GgufWriter, Value};
use bupo_gguf::model::{Batch, Engine, Lora, Policy, Targets};
use bupo_gguf::ops::{self, LogitMap};

/// The system's allocator, remembering the largest single request and the most that was taken at once.
struct Counting;

static LARGEST: AtomicUsize = AtomicUsize::new(0);
static LIVE: AtomicUsize = AtomicUsize::new(0);
static MOST: AtomicUsize = AtomicUsize::new(0);
/// Size and alignment of the product library's buffer; 0 while they are not known.
static SLAB: [AtomicUsize; 2] = [const { AtomicUsize::new(0) }; 2];
/// Alignment of the largest request.
static ALIGNED: AtomicUsize = AtomicUsize::new(0);

unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        let slab = SLAB.each_ref().map(|part| part.load(Ordering::Relaxed));
        if [layout.size(), layout.align()] != slab
            && LARGEST.fetch_max(layout.size(), Ordering::Relaxed) < layout.size()
        {
            ALIGNED.store(layout.align(), Ordering::Relaxed);
        }
        let live = LIVE.fetch_add(layout.size(), Ordering::Relaxed) + layout.size();
        MOST.fetch_max(live, Ordering::Relaxed);
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        LIVE.fetch_sub(layout.size(), Ordering::Relaxed);
        unsafe { System.dealloc(pointer, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// The counters are the process's: one test at a time.
static ALONE: Mutex<()> = Mutex::new(());

/// Bytes of the product library's buffer, which the counter passes over from now on.
fn slab() -> usize {
    let product = || {
        let (a, mut c) = ([1f32; 1024], [0f32; 1024]);
        LARGEST.store(0, Ordering::Relaxed);
        // SAFETY: three matrices of 32 x 32, each with its strides.
        unsafe {
            let (a, c) = (a.as_ptr(), c.as_mut_ptr());
            let none = gemm::Parallelism::None;
            gemm::gemm(
                32, 32, 32, c, 1, 32, false, a, 1, 32, a, 1, 32, 0.0, 1.0, false, false, false,
                none,
            );
        }
        [LARGEST.load(Ordering::Relaxed), ALIGNED.load(Ordering::Relaxed)]
    };
    if SLAB[0].load(Ordering::Relaxed) == 0 {
        let found = std::thread::spawn(product).join().unwrap();
        SLAB.iter().zip(found).for_each(|(part, found)| part.store(found, Ordering::Relaxed));
    }
    SLAB[0].load(Ordering::Relaxed)
}

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

fn wide_model() -> Model {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("wide.gguf");
    write_model(&path);
    Model::open(&path).unwrap()
}

#[test]
fn no_dequantised_matrix_and_no_logits_buffer() {
    let _alone = ALONE.lock();
    let model = wide_model();
    let lora = Lora::new(&model, &Targets::default(), 4, 8.0, 1).unwrap();
    let mut gradients = lora.zeros_like().unwrap();
    let mut engine = Engine::new(Arc::new(ThreadPool::new(2).unwrap())).unwrap();
    let tokens: Vec<i32> = (0..TOKENS as i32).map(|i| 1 + i % 250).collect();
    let mut batch = Batch::default();
    batch.push_group(&tokens[..20], &[&tokens[20..]], V).unwrap();
    let policy = Policy::full(LAYERS);

    slab();
    LARGEST.store(0, Ordering::Relaxed);
    engine.forward(&model, Some(&lora), &batch, policy.depth()).unwrap();
    let scores = engine.score(&model, Some(&lora), &batch, policy, 1.0, true).unwrap();
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

#[test]
fn a_weight_is_dequantised_once_per_pass() {
    let _alone = ALONE.lock();
    let model = wide_model();
    let lora = Lora::new(&model, &Targets::default(), 4, 8.0, 1).unwrap();
    let size = |targets: &str| -> u64 {
        let targets: Targets = targets.parse().unwrap();
        let maps = targets.of(model.maps()).unwrap().into_iter().filter(|map| map.layer == 1);
        maps.map(|map| (map.n_in * map.n_out) as u64).sum()
    };
    let layer = size("all");
    // What the backward of a layer does not need again, and what the lowest layer need not pass on.
    let (last, first) = (size("down"), size("q,k,v"));
    for (threads, n) in [(1, 300), (2, 300), (2, 40)] {
        let mut engine = Engine::new(Arc::new(ThreadPool::new(threads).unwrap())).unwrap();
        let tokens: Vec<i32> = (0..n).map(|i| 1 + i % 250).collect();
        let mut batch = Batch::default();
        batch.push_group(&tokens[..20], &[&tokens[20..]], V).unwrap();
        let mut gradients = lora.zeros_like().unwrap();
        for policy in [Policy::full(LAYERS), Policy::internal(1, LAYERS, false).unwrap()] {
            for keep in [true, false] {
                engine.keep_up_to(if keep { 1 << 30 } else { 0 });
                let before = ops::dequantised();
                engine.forward_to_train(&model, &lora, &batch, policy.depth()).unwrap();
                let forward = ops::dequantised();
                let scores = engine.score(&model, Some(&lora), &batch, policy, 1.0, true).unwrap();
                let scored = ops::dequantised();
                let cotangents = vec![1.0; scores.logprobs.len()];
                engine
                    .backward(&model, &lora, &mut gradients, &batch, policy, &cotangents)
                    .unwrap();
                let depth = policy.depth() as u64;
                let case = format!("{threads} threads, {n} tokens, {depth} layers, keep {keep}");
                assert_eq!(forward - before, depth * layer, "forward: {case}");
                // The vocabulary once in both directions, and each target's row.
                let targets = scores.logprobs.len() * D;
                assert_eq!(scored - forward, (V * D + targets) as u64, "head: {case}");
                let again = if keep { 0 } else { depth * (layer - last) };
                let back = ops::dequantised() - scored;
                assert_eq!(back, depth * layer - first + again, "backward: {case}");
            }
        }
    }
}

/// Bytes that `linear_logprob` and its gradient take at most beside inputs and results, on new threads.
fn head_bytes(threads: usize, v: usize, t: usize) -> usize {
    std::thread::spawn(move || {
        let mut executor = Executor::cpu(Arc::new(ThreadPool::new(threads).unwrap())).unwrap();
        let arena = Arena::new(16);
        let mut graph = Graph::new(&arena);
        let h = arena.input("h", Type::F32, &[D, t]);
        let e_u = arena.input("e_u", Type::Q8_0, &[D, v]);
        let target = arena.input("target", Type::I32, &[t]);
        // What a softcap needs beside is in the bound.
        let map = LogitMap { softcap: Some(30.0), ..LogitMap::default() };
        let head = ops::Head::new(h, e_u, map);
        let head = ops::linear_logprob(&arena, head, Some(target), 1.0, true);
        graph.output(head.gradient.unwrap());
        let values: Vec<f32> = (0..D * t).map(|i| (i % 13) as f32 / 13.0).collect();
        let blocks = q8_0(D * v);
        let targets: Vec<i32> = (0..t).map(|i| (i * 7919 % v) as i32).collect();
        let inputs = [
            (h, Input::F32(&values)),
            (e_u, Input::Bytes(&blocks)),
            (target, Input::I32(&targets)),
        ];
        let before = LIVE.load(Ordering::Relaxed);
        MOST.store(before, Ordering::Relaxed);
        executor.run(&graph, &inputs).unwrap();
        MOST.load(Ordering::Relaxed) - before
    })
    .join()
    .unwrap()
}

#[test]
fn the_head_takes_the_memory_that_it_says() {
    let _alone = ALONE.lock();
    // The product library's buffer, and what it packs its operands into: tiles of at most 1 MiB each.
    let packed = slab() + (3 << 20);
    for threads in [1, 2] {
        for t in [64, 512, 700] {
            let said = ops::logprob_tiles_bytes(D, t, threads) + threads * packed;
            for v in [V / 4, V] {
                let took = head_bytes(threads, v, t);
                let case = format!("{threads} threads, {t} tokens, vocabulary of {v}");
                assert!(took <= said, "{case}: {took} bytes, said {said}");
            }
            let tiles = said - threads * slab();
            assert!(t < 512 || tiles < V * t * 4 / 2, "the bound means something");
        }
    }
    // The same reckoning at the size of a qwen3-0.6b, where the logits would have 311 MB.
    assert!(ops::logprob_tiles_bytes(1024, 512, 2) <= 48 << 20);
}
