//! Mutated files of every kind, opened: each is read or refused, in one line, with bounded memory and time.
//! Deterministic; `BUPO_MUTATIONS=N` tries N times as many.

mod targets;

use std::alloc::{GlobalAlloc, Layout, System};
use std::panic::catch_unwind;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use rand::{Rng, SeedableRng};
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

/// Numbers that counts, offsets and sizes go wrong with.
const ODD: [u64; 14] = [
    0,
    1,
    7,
    31,
    255,
    256,
    0x7fff,
    0xffff,
    0x7fff_ffff,
    0x8000_0000,
    0xffff_ffff,
    0x1_0000_0000,
    0x7fff_ffff_ffff_ffff,
    0xffff_ffff_ffff_ffff,
];

/// One to three changes within the first `reach` bytes.
fn mutate(seed: &[u8], reach: usize, rng: &mut ChaCha8Rng) -> Vec<u8> {
    let mut bytes = seed.to_vec();
    for _ in 0..rng.random_range(1..=3) {
        let reach = reach.min(bytes.len());
        if reach < 9 {
            break;
        }
        let at = rng.random_range(0..reach - 8);
        match rng.random_range(0..8) {
            0 => bytes[at] ^= 1 << rng.random_range(0..8),
            1 => bytes[at] = rng.random(),
            2 => bytes[at..at + 4]
                .copy_from_slice(&(ODD[rng.random_range(0..14)] as u32).to_le_bytes()),
            3 => bytes[at..at + 8].copy_from_slice(&ODD[rng.random_range(0..14)].to_le_bytes()),
            4 => bytes.truncate(rng.random_range(0..bytes.len())),
            5 => drop(bytes.drain(at..(at + rng.random_range(1..64)).min(reach))),
            6 => {
                let piece = bytes[at..(at + rng.random_range(1..64)).min(reach)].to_vec();
                let to = rng.random_range(0..reach);
                bytes.splice(to..to, piece);
            }
            _ => {
                let nan = [f32::NAN, f32::INFINITY, -1.0, 0.0][rng.random_range(0..4)];
                bytes[at..at + 4].copy_from_slice(&nan.to_le_bytes());
            }
        }
    }
    bytes
}

/// Tries `n` mutations of a seed; says how many were read and how many refused.
fn hammer(name: &str, seed: &[u8], reach: usize, n: usize, target: fn(&[u8]) -> bool) {
    let mut rng = ChaCha8Rng::seed_from_u64(seed.len() as u64);
    let mut read = 0;
    for i in 0..times(n) {
        let bytes = mutate(seed, reach, &mut rng);
        LARGEST.store(0, Ordering::Relaxed);
        let start = Instant::now();
        let outcome = catch_unwind(|| target(&bytes));
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
    hammer("problems", &corpus("problems", "rows.jsonl"), 4_000, 2000, targets::problems);
    hammer("csv", &corpus("csv", "rows.csv"), 4_000, 2000, targets::csv);
    hammer("template", &corpus("template", "chatml.jinja"), 4_000, 2000, targets::template);
    hammer("tokenizer", &corpus("tokenizer", "small.json"), 4_000, 1000, targets::tokenizer);
    hammer("answers", &corpus("answers", "boxed.txt"), 4_000, 2000, targets::answers);
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

/// Whole models, in a process of their own: an abort of llama.cpp is seen as one.
#[test]
#[cfg(unix)]
fn llama_cpp_never_aborts_on_what_passes_our_checks() {
    use std::os::unix::process::ExitStatusExt;
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("m.gguf");
    let (mut opened, mut refused) = (0, 0);
    for name in ["llama-q4_0.gguf", "qwen3-q8_0.gguf"] {
        let seed = std::fs::read(root("tests/fixtures/golden").join(name)).unwrap();
        // Keys, sizes, the start of the vocabulary: where llama.cpp believes what it reads.
        let mut rng = ChaCha8Rng::seed_from_u64(11);
        for i in 0..times(150) {
            // Values of keys matter most: most mutations change one in place.
            let reach = if i % 4 == 0 { 12_000 } else { 1_500 };
            let bytes = mutate(&seed, reach, &mut rng);
            std::fs::write(&path, &bytes).unwrap();
            let mut child = Command::new(env!("CARGO_BIN_EXE_bupo-gguf"))
                .args([
                    "generate",
                    path.to_str().unwrap(),
                    "-p",
                    "ab",
                    "--raw",
                    "--max-response",
                    "2",
                ])
                .args(["--threads", "1", "-n", "1"])
                .stdout(Stdio::null())
                .stderr(Stdio::piped())
                .spawn()
                .unwrap();
            let begun = Instant::now();
            let status = loop {
                if let Some(status) = child.try_wait().unwrap() {
                    break status;
                }
                assert!(begun.elapsed().as_secs() < 120, "{name}: mutation {i} hangs");
                std::thread::sleep(Duration::from_millis(2));
            };
            let mut said = String::new();
            let _ = std::io::Read::read_to_string(&mut child.stderr.take().unwrap(), &mut said);
            if status.signal().is_some() || said.contains("panicked") {
                let kept = std::env::temp_dir().join(format!("hostile-model-{name}-{i}"));
                std::fs::write(&kept, &bytes).unwrap();
                panic!("{name}: mutation {i}: {status}; it lies in {}\n{said}", kept.display());
            }
            match status.success() {
                true => opened += 1,
                false => {
                    refused += 1;
                    assert!(said.lines().any(|l| l.starts_with("error: ")), "{name} {i}: {said}");
                }
            }
        }
    }
    println!("models: {opened} opened, {refused} refused");
    assert!(opened > 0 && refused > 0, "{opened} opened, {refused} refused: both should occur");
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
