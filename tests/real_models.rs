//! Trained models, which `tools/fetch-models` fetches: opened, looked into, trained, merged, and compared with
//! a stock llama.cpp.
//!
//! Where they are not there, the tests say so and pass, unless BUPO_REQUIRE_MODELS is set.

#[path = "common/program.rs"]
mod program;
#[path = "common/stock.rs"]
mod stock;

use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::{Arc, LazyLock};

use bupo_gguf::Model;
use bupo_gguf::ggml::ThreadPool;
use bupo_gguf::gguf::GgufFile;
use bupo_gguf::model::{Batch, Engine, Lora, Policy};
use bupo_gguf::synth::{self, Mixture, Shape};
use llama_cpp_2::llama_backend::LlamaBackend;
use program::{json, json_lines, succeed, text};

/// A model of the table below.
struct Real {
    file: &'static str,
    /// What `synth` calls its shape and its types.
    shape: &'static str,
    types: &'static str,
    /// A text and how the model goes on.
    knows: (&'static str, &'static str),
    /// How far a log-prob may be from llama.cpp's on the same values in F32, nats.
    exact: f32,
    /// How far on average on the file itself, where llama.cpp rounds activations to 8 bits.
    rounded: f32,
}

const MODELS: [Real; 2] = [
    Real {
        file: "smollm2-135m-instruct-q4_1.gguf",
        shape: "smollm2-135m",
        types: "q4_1",
        knows: ("The opposite of hot is", " cold"),
        exact: 1e-4,
        rounded: 0.2,
    },
    // llama.cpp's CPU backend takes GELU from a table of half floats.
    Real {
        file: "gemma-3-270m-q4_k_m.gguf",
        shape: "gemma-3-270m",
        types: "q4_k_m",
        knows: ("The opposite of hot is", " cold"),
        exact: 2e-2,
        rounded: 0.2,
    },
];

static BACKEND: LazyLock<LlamaBackend> = LazyLock::new(|| LlamaBackend::init().unwrap());

const PROSE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures/prose.jsonl");

impl Real {
    /// Its path; None, and a word on stderr, where it is not there.
    fn path(&self) -> Option<PathBuf> {
        let set = |name: &str| std::env::var_os(name).filter(|v| !v.is_empty()).map(PathBuf::from);
        let cache = set("XDG_CACHE_HOME").or_else(|| Some(set("HOME")?.join(".cache")));
        let folder = set("BUPO_MODELS").or_else(|| Some(cache?.join("bupo-gguf/models")));
        let path = folder.expect("HOME is set").join(self.file);
        if path.is_file() {
            return Some(path);
        }
        assert!(
            std::env::var_os("BUPO_REQUIRE_MODELS").is_none(),
            "{} is not there, and BUPO_REQUIRE_MODELS is set; tools/fetch-models fetches it",
            path.display()
        );
        // Past the test harness, which keeps what a passing test prints; in one piece.
        let words = "is not there; tools/fetch-models fetches it";
        let line = format!("NOT RUN: {} {words}\n", path.display());
        std::io::stderr().write_all(line.as_bytes()).unwrap();
        None
    }
}

/// Those that are fetched.
fn opened() -> impl Iterator<Item = (&'static Real, PathBuf)> {
    MODELS.iter().filter_map(|real| Some((real, real.path()?)))
}

/// Our log-probs of what follows the first `n` tokens.
fn ours(model: &Path, adapter: Option<&Path>, tokens: &[i32], n: usize) -> Vec<f32> {
    let model = Model::open(model).unwrap();
    let lora = adapter.map(|path| Lora::load(&model, path).unwrap());
    let mut engine = Engine::new(Arc::new(ThreadPool::new(1).unwrap())).unwrap();
    let mut batch = Batch::default();
    batch.push_group(&tokens[..n], &[&tokens[n..]], model.config().n_vocab).unwrap();
    let policy = Policy::full(model.config().n_layer);
    engine.forward(&model, lora.as_ref(), &batch, policy.depth()).unwrap();
    engine.score(&model, lora.as_ref(), &batch, policy, 1.0, false).unwrap().logprobs
}

/// Largest and mean distance.
fn distances(a: &[f32], b: &[f32]) -> (f32, f32) {
    assert!(!a.is_empty() && a.len() == b.len());
    let distances: Vec<f32> = a.iter().zip(b).map(|(a, b)| (a - b).abs()).collect();
    let most = distances.iter().copied().fold(0.0, f32::max);
    (most, distances.iter().sum::<f32>() / a.len() as f32)
}

/// A row of prose as tokens, and where its completion starts.
fn prose(model: &Path, row: usize) -> (Vec<i32>, usize) {
    let model = Model::open(model).unwrap();
    let vocab = model.engine().vocab();
    let row = &json_lines(Path::new(PROSE))[row];
    let word = |key: &str| row[key].as_str().unwrap();
    let prompt = vocab.tokenize(word("prompt"), true, false).unwrap();
    let completion = vocab.tokenize(word("completion"), false, false).unwrap();
    (prompt.iter().chain(&completion).copied().collect(), prompt.len())
}

#[test]
fn synth_gives_the_published_types_and_sizes() {
    for real in &MODELS {
        let Some(path) = real.path() else { continue };
        let theirs = GgufFile::open(&path).unwrap();
        let dir = tempfile::tempdir().unwrap();
        let out = dir.path().join("synth.gguf");
        let shape = Shape::find(real.shape).unwrap();
        synth::write(&shape, &Mixture::parse(real.types).unwrap(), 1, &out).unwrap();
        let ours = GgufFile::open(&out).unwrap();
        assert_eq!(ours.tensors().len(), theirs.tensors().len(), "{}", real.file);
        for theirs in theirs.tensors() {
            let ours = ours.tensor(&theirs.name).unwrap_or_else(|| panic!("{}", theirs.name));
            assert_eq!(ours.shape, theirs.shape, "{}: {}", real.file, theirs.name);
            assert_eq!(ours.ty, theirs.ty, "{}: {}", real.file, theirs.name);
        }
        // Every number of the architecture that the published file gives.
        let arch = format!("{}.", shape.arch);
        for (key, value) in theirs.metadata().filter(|(key, _)| key.starts_with(&arch)) {
            assert_eq!(ours.get(key), Some(value), "{}: {key}", real.file);
        }
    }
}

#[test]
fn log_probs_are_stock_llama_cpps() {
    let dir = tempfile::tempdir().unwrap();
    for (real, path) in opened() {
        // The same values in F32, which llama.cpp computes with as they are.
        let f32 = dir.path().join("f32.gguf");
        succeed(&["export", text(&path), "--type", "f32", "--out", text(&f32)]);
        for row in 0..2 {
            let (tokens, n) = prose(&path, row);
            let own = ours(&path, None, &tokens, n);
            let theirs = |model: &Path| {
                let logits = stock::logits(&BACKEND, model, None, &tokens);
                stock::logprobs(&logits, &tokens, n)
            };
            let (most, _) = distances(&own, &theirs(&f32));
            let (_, mean) = distances(&own, &theirs(&path));
            println!("{} row {row}: {most} exact, {mean} rounded", real.file);
            assert!(most < real.exact, "{} row {row}: {most}", real.file);
            assert!(mean < real.rounded, "{} row {row}: {mean}", real.file);
            // A trained model expects what is said.
            let nats = -own.iter().sum::<f32>() / own.len() as f32;
            assert!((0.5..3.5).contains(&nats), "{} row {row}: {nats} nats", real.file);
        }
    }
}

#[test]
fn entropy_sees_every_layer() {
    let dir = tempfile::tempdir().unwrap();
    for (real, path) in opened() {
        let out = dir.path().join(real.shape);
        let limits = ["--samples", "2", "--max-tokens", "16", "--threads", "1"];
        let args = ["entropy", text(&path), "--data", PROSE, "--out", text(&out), "--json"];
        let summary = json(&succeed(&[&args[..], &limits].concat()));
        let records = json_lines(&out.join("entropy.jsonl"));
        let n_layer = Shape::find(real.shape).unwrap().n_layer;
        assert_eq!(records.len(), n_layer * 2 * 16, "{}", real.file);
        let vocabulary = (Shape::find(real.shape).unwrap().n_vocab as f64).ln();
        for record in &records {
            for tap in ["layer_in", "attn_in", "attn_out", "ffn_in", "ffn_out", "layer_out"] {
                let entropy = record[tap].as_f64().unwrap();
                let whole = -1e-3..vocabulary + 1e-3;
                assert!(whole.contains(&entropy), "{}: {tap} {entropy}", real.file);
            }
        }
        let perplexity = summary["perplexity"].as_f64().unwrap();
        assert!((2.0..60.0).contains(&perplexity), "{}: {perplexity}", real.file);
    }
}

#[test]
fn two_steps_of_training_are_merged_and_run() {
    let dir = tempfile::tempdir().unwrap();
    let data = dir.path().join("problems.jsonl");
    let problems = ["Tell me about the sea.", "Tell me about bread.", "What is a tree?"];
    let rows = problems.map(|p| serde_json::json!({"prompt": p, "answer": "-"}).to_string());
    std::fs::write(&data, rows.join("\n")).unwrap();
    for (real, path) in opened() {
        let run = dir.path().join(real.shape);
        // About half of the completions have such a word, so groups differ.
        let settings = "--reward regex:\\b(the|is)\\b --steps 2 --internal-steps 1 --internal-layer 4 \
            --prompts-per-step 2 --mini-batch 2 --group 6 --max-prompt 64 --max-response 8 --rank 4 \
            --targets q,v --eval-problems 1 --kv-mib 128 --checkpoint-every 0 --threads 1";
        let settings: Vec<&str> = settings.split_whitespace().collect();
        let args = ["train", text(&path), "--data", text(&data), "--eval-data", text(&data)];
        succeed(&[&args[..], &["--out", text(&run)], &settings].concat());
        let metrics = json_lines(&run.join("metrics.jsonl"));
        assert_eq!(metrics.len(), 2);
        for (step, phase) in metrics.iter().zip(["internal", "final"]) {
            assert_eq!(step["phase"], phase, "{}", real.file);
            let norm = step["gradient_norm"].as_f64().unwrap();
            assert!(norm > 0.0 && norm.is_finite(), "{}: {step}", real.file);
        }
        // Sampler and trainer are one policy, but for llama.cpp's rounding.
        let drift = metrics[1]["drift_nats"].as_f64().unwrap();
        assert!(drift < 0.2, "{}: drift {drift}", real.file);

        // Merged without rounding, the adapter is all there.
        let adapter = run.join("adapter.gguf");
        let merged = dir.path().join("merged.gguf");
        let export = |ty: &str| {
            let merge = ["--adapter", text(&adapter), "--type", ty, "--out", text(&merged)];
            succeed(&[&["export", text(&path)], &merge[..]].concat());
        };
        export("f32");
        let (tokens, n) = prose(&path, 0);
        let base = ours(&path, None, &tokens, n);
        let with = ours(&path, Some(&adapter), &tokens, n);
        let (_, change) = distances(&base, &with);
        let (most, _) = distances(&ours(&merged, None, &tokens, n), &with);
        println!("{}: the adapter changes {change}, the merge {most}", real.file);
        // Two steps change little, and how much depends on the completions that this processor's rounding gave.
        assert!(change > 1e-4, "{}: the adapter changes {change}", real.file);
        assert!(most < 1e-3 && most < change / 10.0, "{}: {most} of {change}", real.file);

        // In the file's own types it still knows what it knew, here and in a stock llama.cpp.
        export("keep");
        let (prompt, answer) = real.knows;
        let asked =
            ["-p", prompt, "--raw", "--temperature", "0", "--max-response", "2", "--threads", "1"];
        let said = json(&succeed(&[&["generate", text(&merged), "--json"], &asked[..]].concat()));
        let said = said["completions"][0]["text"].as_str().unwrap();
        assert!(said.starts_with(answer), "{}: {prompt}{said}", real.file);
        let model = Model::open(&merged).unwrap();
        let vocab = model.engine().vocab();
        let tokens = vocab.tokenize(prompt, true, false).unwrap();
        let theirs = vocab.text(&stock::generate(&BACKEND, &merged, &tokens, 2), false);
        assert!(theirs.starts_with(answer), "{}: {prompt}{theirs}", real.file);
    }
}
