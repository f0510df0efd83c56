//! What several tests need: the golden fixtures, tolerances.
#![allow(dead_code)]

pub mod parquet;

use std::path::{Path, PathBuf};
use std::sync::Arc;

use bupo_gguf::ggml::{Device, DeviceChoice, ThreadPool};
use bupo_gguf::gguf::{AdapterFile, AdapterPair};
use bupo_gguf::model::{Engine, Lora, Model, Placement};
use serde_json::Value;

/// `tests/fixtures/golden`, or what `BUPO_GOLDEN` names where the tests run elsewhere than they were built.
pub fn golden_dir() -> PathBuf {
    let here = || Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/golden");
    std::env::var_os("BUPO_GOLDEN").map_or_else(here, PathBuf::from)
}

/// Where a golden model lies: beside the first ones, or in `archs`.
pub fn folder_of(name: &str) -> PathBuf {
    let first = golden_dir();
    if first.join(format!("{name}.gguf")).exists() { first } else { first.join("archs") }
}

/// Golden models of further architectures.
pub const ARCHS: [&str; 30] = [
    "gemma2-f32",
    "gemma2-q4_0",
    "gemma3-f32",
    "gemma3-q8_0",
    "gemma4-f32",
    "gemma4-q8_0",
    "gpt-oss-f32",
    "gpt-oss-mxfp4",
    "granite-f32",
    "granite-q5_0",
    "granitemoe-f32",
    "granitemoe-q8_0",
    "mistral3-f32",
    "mistral3-q8_0",
    "olmo2-f32",
    "olmo2-q8_0",
    "olmoe-f32",
    "olmoe-q8_0",
    "phi3-f32",
    "phi3-q8_0",
    "qwen3moe-f32",
    "qwen3moe-q8_0",
    "qwen3next-f32",
    "qwen3next-q8_0",
    "qwen35-f32",
    "qwen35-q8_0",
    "qwen35moe-f32",
    "qwen35moe-q8_0",
    "smollm3-f32",
    "smollm3-q4_0",
];

/// Folder of other people's models and data, read where they lie: `BUPO_SHARED`, else `../shared`.
/// None when it is not there, unless `BUPO_REQUIRE_SHARED` insists.
pub fn shared() -> Option<PathBuf> {
    let path = std::env::var_os("BUPO_SHARED")
        .map_or_else(|| Path::new(env!("CARGO_MANIFEST_DIR")).join("../shared"), PathBuf::from);
    let there = path.join("models").is_dir();
    assert!(
        there || std::env::var_os("BUPO_REQUIRE_SHARED").is_none(),
        "{} has no models, and BUPO_REQUIRE_SHARED is set",
        path.display()
    );
    there.then_some(path)
}

/// The device that tests of the GPU's kernels run on: the emulated one, or what `BUPO_TEST_DEVICE` says
/// (`cuda`, `cuda:1`).
pub fn device(precise: bool) -> Device {
    let Ok(name) = std::env::var("BUPO_TEST_DEVICE") else { return Device::Emulated { precise } };
    let choice: DeviceChoice = name.parse().unwrap();
    choice.resolve(precise).unwrap()
}

/// `||a - b|| / ||b||`.
pub fn relative_error(a: &[f32], b: &[f32]) -> f32 {
    assert_eq!(a.len(), b.len(), "lengths");
    let square = |x: f64| x * x;
    let d: f64 = a.iter().zip(b).map(|(&a, &b)| square(a as f64 - b as f64)).sum();
    let n: f64 = b.iter().map(|&b| square(b as f64)).sum();
    (d.sqrt() / n.sqrt().max(1e-30)) as f32
}

/// A JSON list of numbers.
pub fn floats(value: &Value) -> Vec<f32> {
    let list = value.as_array().unwrap_or_else(|| panic!("a list, got {value}"));
    list.iter().map(|x| x.as_f64().expect("a number") as f32).collect()
}

/// A JSON list of lists of numbers, joined.
pub fn nested_floats(value: &Value) -> Vec<f32> {
    value.as_array().expect("a list").iter().flat_map(floats).collect()
}

/// A prompt and its completions in the golden data.
pub struct Row {
    pub prompt: Vec<i32>,
    pub completions: Vec<Vec<i32>>,
    pub rewards: Vec<f32>,
}

/// One golden model with PyTorch's figures.
pub struct Golden {
    pub name: String,
    pub model: Model,
    pub json: Value,
    gradients: Vec<u8>,
}

impl Golden {
    pub fn load(name: &str) -> Golden {
        Golden::load_on(name, Device::Cpu)
    }

    pub fn load_on(name: &str, device: Device) -> Golden {
        let placement = Placement { device, gpu_layers: None };
        let dir = folder_of(name);
        let read =
            |file: String| std::fs::read(dir.join(&file)).unwrap_or_else(|e| panic!("{file}: {e}"));
        Golden {
            name: name.into(),
            model: Model::open_on(&dir.join(format!("{name}.gguf")), placement).unwrap(),
            json: serde_json::from_slice(&read(format!("{name}.json"))).unwrap(),
            gradients: read(format!("{name}.grads.safetensors")),
        }
    }

    pub fn engine(&self) -> Engine {
        Engine::on(self.model.device(), Arc::new(ThreadPool::new(2).unwrap())).unwrap()
    }

    pub fn lora_path(&self) -> PathBuf {
        folder_of(&self.name).join(format!("{}.lora.gguf", self.name))
    }

    pub fn lora(&self) -> Lora {
        Lora::load(&self.model, &self.lora_path()).unwrap()
    }

    /// The adapter and, where the model has an unembedding of its own, a pair on that too.
    pub fn adapter_with_head(&self) -> AdapterFile {
        let mut file = AdapterFile::read(&self.lora_path()).unwrap();
        if self.model.weights().find("output.weight").is_some() {
            let (rank, config) = (file.pairs[0].rank, self.model.config());
            let (n_in, n_out) = (config.n_embd, config.n_vocab);
            let value = |i: usize| ((i * 37 % 101) as f32 - 50.0) / 200.0;
            let a = (0..n_in * rank).map(value).collect();
            let b = (0..rank * n_out).map(|i| value(i + 13)).collect();
            let weight = "output.weight".into();
            file.pairs.push(AdapterPair { weight, rank, n_in, n_out, n_expert: 1, a, b });
        }
        file
    }

    /// What `make_figures.py` adds: cosines, divergences, ranks.
    pub fn figures(&self) -> Value {
        let path = golden_dir().join(format!("{}.figures.json", self.name));
        serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap()
    }

    pub fn ints(&self, key: &str) -> Vec<i32> {
        ints(&self.json[key])
    }

    pub fn rollouts(&self) -> Vec<Row> {
        let rows = self.json["rollouts"].as_array().expect("rollouts");
        rows.iter()
            .map(|row| {
                let completions = row["completions"].as_array().expect("completions");
                Row {
                    prompt: ints(&row["prompt_tokens"]),
                    completions: completions.iter().map(|c| ints(&c["tokens"])).collect(),
                    rewards: completions
                        .iter()
                        .map(|c| c["reward"].as_f64().expect("a reward") as f32)
                        .collect(),
                }
            })
            .collect()
    }

    pub fn gradient(&self, name: &str) -> Vec<f32> {
        let file = safetensors::SafeTensors::deserialize(&self.gradients).unwrap();
        let tensor = file.tensor(name).unwrap_or_else(|e| panic!("{name}: {e}"));
        tensor.data().as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b)).collect()
    }
}

fn ints(value: &Value) -> Vec<i32> {
    let list = value.as_array().expect("a list");
    list.iter().map(|x| x.as_i64().expect("an integer") as i32).collect()
}
