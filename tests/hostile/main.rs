//! Mutated files of every kind, opened: each is read or refused, in one line, with bounded memory and time.
//! Deterministic; `BUPO_MUTATIONS=N` tries N times as many.

#[path = "../common/mod.rs"]
mod common;
mod models;
mod mutate;
mod targets;

use std::alloc::{GlobalAlloc, Layout, System};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use common::parquet as columns;
use mutate::{mutate, mutate_text};
use parquet::basic::{Compression, ZstdLevel};
use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;

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

    unsafe fn realloc(&self, pointer: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        LARGEST.fetch_max(size, Ordering::Relaxed);
        unsafe { System.realloc(pointer, layout, size) }
    }
}

#[global_allocator]
static ALLOCATOR: Largest = Largest;

/// No reader may ask for more at once than this beyond a multiple of what it was given.
const ALLOCATION: usize = 128 << 20;
const SECONDS: u64 = 20;

fn root(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(path)
}

fn times(n: usize) -> usize {
    let factor = std::env::var("BUPO_MUTATIONS").ok().and_then(|f| f.parse().ok());
    n * factor.unwrap_or(1)
}

/// Tries `n` mutations of a seed; says how many were read and how many refused.
fn hammer(name: &str, seed: &[u8], reach: usize, n: usize, target: impl Fn(&[u8]) -> bool) {
    assert!(target(seed), "{name}: the seed itself is refused");
    let mut rng = ChaCha8Rng::seed_from_u64(11);
    let mut read = 0;
    for i in 0..times(n) {
        let bytes = match std::str::from_utf8(seed) {
            Ok(text) if i % 2 == 0 => mutate_text(text, &mut rng),
            _ => mutate(seed, reach, &mut rng),
        };
        LARGEST.store(0, Ordering::Relaxed);
        let start = Instant::now();
        let outcome = catch_unwind(AssertUnwindSafe(|| target(&bytes)));
        let (took, largest) = (start.elapsed(), LARGEST.load(Ordering::Relaxed));
        let Ok(ok) = outcome else {
            let kept = std::env::temp_dir().join(format!("hostile-{name}-{i}"));
            std::fs::write(&kept, &bytes).unwrap();
            panic!("{name}: mutation {i} panicked; it lies in {}", kept.display());
        };
        read += ok as usize;
        assert!(took < Duration::from_secs(SECONDS), "{name}: mutation {i} took {took:?}");
        assert!(
            largest < ALLOCATION + 16 * bytes.len(),
            "{name}: mutation {i}: {largest} bytes at once"
        );
    }
    println!("{name}: {} mutations, {read} read, {} refused", times(n), times(n) - read);
    assert!(read > 0 && read < times(n), "{name}: {read} of {} read: both should occur", times(n));
}

#[test]
fn our_readers_take_or_refuse_every_mutation() {
    let golden = |name: &str| std::fs::read(root("tests/fixtures/golden").join(name)).unwrap();
    let corpus =
        |kind: &str, name: &str| std::fs::read(root("fuzz/corpus").join(kind).join(name)).unwrap();
    let model = golden("llama-q4_0.gguf");
    hammer("gguf", &model, 12_000, 1000, targets::gguf);
    let lora = golden("llama-f32.lora.gguf");
    hammer("adapter", &lora, 4_000, 2000, targets::adapter);
    for name in ["rows.jsonl", "rollouts.jsonl"] {
        hammer(name, &corpus("problems", name), 4_000, 1000, targets::problems);
    }
    hammer("csv", &corpus("csv", "rows.csv"), 4_000, 2000, targets::csv);
    hammer("template", &corpus("template", "chatml.jinja"), 4_000, 2000, targets::template);
    for name in ["byte-level.json", "sentencepiece.json"] {
        hammer(name, &corpus("tokenizer", name), 20_000, 500, targets::tokenizer);
    }
    // Found by fuzzing: one whose encoder panics within its crate.
    targets::tokenizer(&corpus("tokenizer", "panics-on-encode.json"));
    // And an answer whose bracket within bars does not close.
    targets::verifier(&corpus("verifier", "open-bracket-in-bars.txt"));
    for name in ["opening.json", "step.json", "calls.txt", "expression.txt"] {
        hammer(name, &corpus("environment", name), 4_000, 1000, targets::environment);
    }
    hammer("answers", &corpus("answers", "boxed.txt"), 4_000, 2000, targets::answers);
    for name in ["fraction.txt", "interval.txt", "words.txt"] {
        hammer(name, &corpus("verifier", name), 4_000, 1000, targets::verifier);
    }
}

#[test]
fn parquet_files_are_taken_or_refused() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("rows");
    let compressions =
        [Compression::UNCOMPRESSED, Compression::SNAPPY, Compression::ZSTD(ZstdLevel::default())];
    for compression in compressions {
        columns::verl(&path, compression);
        let seed = std::fs::read(&path).unwrap();
        hammer(&format!("parquet, {compression}"), &seed, seed.len(), 700, targets::parquet);
    }
    // Found by fuzzing: a page header with a list of two thousand million numbers that are not there.
    let endless = root("fuzz/corpus/parquet/header-of-endless-doubles.parquet");
    assert!(!targets::parquet(&std::fs::read(endless).unwrap()));
}

#[test]
fn peft_folders_are_taken_or_refused() {
    let folder = root("tests/fixtures/peft/llama-f32");
    let read = |name: &str| std::fs::read(folder.join(name)).unwrap();
    let (config, weights) = (read("adapter_config.json"), read("adapter_model.safetensors"));
    let folder = [config.as_slice(), &[0], &weights].concat();
    // The settings, then the header of the tensors too.
    hammer("peft, settings", &folder, config.len(), 1000, targets::peft);
    hammer("peft, all", &folder, config.len() + 6_000, 1000, targets::peft);
}

/// Its sums are made right again, so that what stands behind them is read.
#[test]
fn checkpoints_are_taken_or_refused() {
    for (i, (name, whole)) in targets::CHECKPOINT.iter().zip(targets::run_folder()).enumerate() {
        // The settings in a checkpoint are for people, and never read.
        if name.ends_with("step-1/config.toml") {
            continue;
        }
        let read = |bytes: &[u8]| targets::checkpoint(&[&[i as u8], bytes].concat());
        hammer(name, whole, 6_000, 150, read);
    }
}

#[test]
fn templates_that_grow_without_end_are_stopped() {
    for bomb in [
        "{{ 'a' * 10000000000 }}",
        "{% set ns = namespace(x='aaaaaaaa') %}{% for i in range(64) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}{{ ns.x|length }}",
        "{% for i in range(100000) %}{% for j in range(100000) %}{% endfor %}{% endfor %}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "{{ 'a'.ljust(10000000000) }}",
        "{{ 'a'.center(10000000000) }}",
        "{{ [1] * 10000000000 }}",
        "{{ ('a' * 1000000).replace('a', 'a' * 1000000) }}",
        "{{ '%0999999999d' | format(1) }}",
    ] {
        LARGEST.store(0, Ordering::Relaxed);
        let start = Instant::now();
        let rendered = targets::template(bomb.as_bytes());
        let largest = LARGEST.load(Ordering::Relaxed);
        println!("{bomb}: rendered {rendered}, {largest} bytes at once, {:?}", start.elapsed());
        assert!(start.elapsed() < Duration::from_secs(SECONDS), "{bomb}");
        assert!(largest < 512 << 20, "{bomb}: {largest} bytes at once");
    }
    assert!(!targets::template("(".repeat(100_000).as_bytes()) || cfg!(unix));
    let deep = format!("{{{{ {}1{} }}}}", "(".repeat(50_000), ")".repeat(50_000));
    assert!(!targets::template(deep.as_bytes()), "deep nesting is refused, not followed");
}

#[test]
fn values_that_llama_cpp_would_abort_on_are_named() {
    use bupo_gguf::gguf::{Array, GgufFile, GgufWriter, Value};
    let seed = root("tests/fixtures/golden/qwen3-q8_0.gguf");
    let file = GgufFile::open(&seed).unwrap();
    let dir = tempfile::tempdir().unwrap();
    let twice = Array::strings((0..256).map(|_| "same"));
    for (key, value) in [
        ("qwen3.block_count", Value::U32(0)),
        ("qwen3.block_count", Value::U32(513)),
        ("qwen3.attention.head_count", Value::U32(0)),
        ("qwen3.attention.head_count_kv", Value::U32(0)),
        ("qwen3.attention.key_length", Value::U32(1 << 30)),
        ("qwen3.embedding_length", Value::U32(0)),
        ("qwen3.context_length", Value::U32(0)),
        ("qwen3.expert_used_count", Value::U32(2)),
        ("qwen3.attention.causal", Value::Bool(false)),
        ("qwen3.rope.freq_base", Value::F32(f32::NAN)),
        ("qwen3.rope.scaling.type", Value::String("spiral".into())),
        ("qwen3.rope.scaling.factor", Value::F32(f32::NEG_INFINITY)),
        ("qwen3.attention.layer_norm_rms_epsilon", Value::F32(-1.0)),
        ("tokenizer.ggml.tokens", Value::Array(twice)),
        ("tokenizer.ggml.model", Value::String("none".into())),
    ] {
        let mut writer = GgufWriter::new();
        for (name, old) in file.metadata().filter(|(name, _)| *name != key) {
            writer.metadata(name, old.clone()).unwrap();
        }
        writer.metadata(key, value.clone()).unwrap();
        for tensor in file.tensors() {
            let bytes = file.bytes(tensor).to_vec();
            writer
                .tensor(&tensor.name, tensor.ty, &tensor.shape, move |out| out.write(&bytes))
                .unwrap();
        }
        let path = dir.path().join("bad.gguf");
        writer.write(&path).unwrap();
        let error = match bupo_gguf::Model::open(&path) {
            Ok(_) => panic!("{key} = {value:?} was taken"),
            Err(error) => error.to_string(),
        };
        let named = ["tokenizer model", "rope scaling type", key].iter().any(|w| error.contains(w));
        assert!(named && !error.contains('\n'), "{key}: {error}");
    }
}
