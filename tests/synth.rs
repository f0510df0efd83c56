//! `synth`: every shape has the hyperparameters it claims, and what is written loads, spells text,
//! computes and learns.

mod common;
#[path = "common/stock.rs"]
mod stock;

use std::path::{Path, PathBuf};
use std::sync::Arc;

use bupo_gguf::Model;
use bupo_gguf::ggml::ThreadPool;
use bupo_gguf::gguf::{GgufFile, GgufWriter, Value};
use bupo_gguf::model::{Batch, DeltaConfig, Engine, Lora, Policy, Targets};
use bupo_gguf::synth::{self, Experts, Mixture, Rope, Shape};
use llama_cpp_2::llama_backend::LlamaBackend;

fn write(shape: &Shape, mixture: &str) -> (tempfile::TempDir, PathBuf) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("model.gguf");
    synth::write(shape, &Mixture::parse(mixture).unwrap(), 1, &path).unwrap();
    (dir, path)
}

fn open(shape: &Shape, mixture: &str) -> (tempfile::TempDir, Model) {
    let (dir, path) = write(shape, mixture);
    let model = Model::open(&path).unwrap_or_else(|e| panic!("{} {mixture}: {e}", shape.name));
    (dir, model)
}

#[test]
fn every_type_loads_and_gives_finite_gradients() {
    for name in Mixture::names() {
        let (_dir, model) = open(&Shape::find("tiny").unwrap(), &name);
        let config = model.config();
        let lora = Lora::new(&model, &Targets::default(), 4, 8.0, 1).unwrap();
        let mut engine = Engine::new(Arc::new(ThreadPool::new(1).unwrap())).unwrap();
        let mut batch = Batch::default();
        let tokens: Vec<i32> = (0..24).map(|i| 7 * i + 3).collect();
        batch.push_group(&tokens[..8], &[&tokens[8..]], config.n_vocab).unwrap();
        for policy in
            [Policy::full(config.n_layer), Policy::internal(2, config.n_layer, false).unwrap()]
        {
            engine.forward(&model, Some(&lora), &batch, policy.depth()).unwrap();
            let scores = engine.score(&model, Some(&lora), &batch, policy, 1.0, true).unwrap();
            // Neither uniform (ln 2048 = 7.6 nats) nor certain.
            let mean = scores.entropies.iter().sum::<f32>() / scores.entropies.len() as f32;
            assert!((0.5..7.55).contains(&mean), "{name}: entropy {mean}");
            let mut gradients = lora.zeros_like().unwrap();
            let cotangents = vec![1.0; scores.logprobs.len()];
            engine.backward(&model, &lora, &mut gradients, &batch, policy, &cotangents).unwrap();
            for i in 0..gradients.len() {
                // B is zero, so A has no gradient yet.
                let sum: f32 = gradients.values(i).iter().map(|g| g.abs()).sum();
                let wanted = i % 2 == 1 && lora.tensor_layer(i) <= policy.depth();
                assert!(sum.is_finite(), "{name}: {}", lora.tensor_name(i));
                assert_eq!(sum > 0.0, wanted, "{name}: {} {sum}", lora.tensor_name(i));
            }
        }
    }
}

#[test]
fn shapes_keep_their_settings_and_spell_text() {
    for shape in Shape::ALL {
        // As the file says it, but for the size.
        let (n_layer, n_embd) = shape.delta.map_or((1, shape.n_embd), |d| (d.period, 256));
        let small = shape.with_layers(n_layer).unwrap().with_vocab(1024).unwrap();
        let small = Shape { n_ff: 256, n_embd, experts: few(shape), ..small };
        let (_dir, model) = open(&small, "q4_k_m");
        let (c, name) = (model.config(), shape.name);
        assert_eq!((c.family.name, c.n_ctx_train), (shape.arch, shape.n_ctx), "{name}");
        if let Some(d) = shape.delta {
            let DeltaConfig { n_k, n_v, size, kernel, .. } = c.layer(1).delta.unwrap();
            assert_eq!([n_k, n_v, size, kernel], [d.n_k, d.n_v, d.size, d.kernel], "{name}");
        }
        let layer = c.layer(n_layer);
        assert_eq!((layer.n_head, layer.n_head_kv), (shape.n_head, shape.n_head_kv), "{name}");
        assert_eq!((layer.head_size, c.rms_eps), (shape.head_size, shape.rms_eps), "{name}");
        if layer.window.is_none() {
            assert_eq!(layer.rope.unwrap().freq_base, shape.rope_base, "{name}");
        }
        let divisors = matches!(shape.rope, Rope::Llama3(_));
        let weights = model.weights();
        assert_eq!(weights.find("rope_freqs.weight").is_some(), divisors, "{name}");
        let tied = weights.unembedding().address() == weights.embedding().address();
        assert_eq!(tied, shape.tied, "{name}");
        let vocab = model.engine().vocab();
        let text = "<|im_start|>user\nWhat is 17 * 23? \u{fc}ber \u{1f600}<|im_end|>\n";
        let tokens = vocab.tokenize(text, true, true).unwrap();
        assert_eq!(vocab.text(&tokens, true), text, "{name}");
        assert!(tokens.len() < text.len(), "{name}: merges shorten text");
        assert!(vocab.is_eog(vocab.eos().unwrap()) && !vocab.adds_bos(), "{name}");
    }
}

/// A mixture of few and narrow experts, where there is one.
fn few(shape: Shape) -> Option<Experts> {
    shape.experts.map(|e| Experts {
        count: 6,
        used: 2,
        n_ff: 256,
        n_ff_shared: e.n_ff_shared.min(256),
    })
}

/// Two periods of every pattern of layers, few heads, a narrow FFN.
fn small(shape: Shape) -> Shape {
    let n_head = shape.n_head / shape.n_head_kv;
    // llama.cpp wants the heads of these to be as wide as the residual together.
    let n_embd = match shape.arch {
        "qwen2" | "phi3" | "olmo2" | "olmoe" => n_head * shape.head_size,
        _ => 512,
    };
    let small = shape.with_layers(12).unwrap().with_vocab(1024).unwrap();
    Shape { n_head, n_head_kv: 1, n_embd, n_ff: 256, experts: few(shape), ..small }
}

/// One test, for the backend can be started once in a process.
#[test]
fn stock_llama_cpp_runs_every_shape() {
    let backend = LlamaBackend::init().unwrap();
    let tokens: Vec<i32> = (0..40).map(|i| (i * 37 + 11) % 1000).collect();
    for shape in Shape::ALL.map(small) {
        let (_dir, path) = write(&shape, "q4_k_m");
        let logits = stock::logits(&backend, &path, None, &tokens);
        let mut entropy = 0.0;
        for logits in &logits {
            assert!(logits.iter().all(|l| l.is_finite()), "{}", shape.name);
            let logprobs = |v: &[f32]| -> Vec<f64> {
                let most = v.iter().copied().fold(f32::MIN, f32::max) as f64;
                let sum: f64 = v.iter().map(|&l| (l as f64 - most).exp()).sum();
                v.iter().map(|&l| l as f64 - most - sum.ln()).collect()
            };
            let here: f64 = logprobs(logits).iter().map(|&l| -l * l.exp()).sum();
            entropy += here / tokens.len() as f64;
        }
        println!("{}: {entropy}", shape.name);
        // Neither uniform (ln 1024 = 6.93 nats) nor certain.
        assert!((3.0..6.6).contains(&entropy), "{}: entropy {entropy}", shape.name);
    }
    for name in ["qwen3.5-35b-a3b", "qwen3-next-80b-a3b"] {
        let (dir, path) = write(&small(Shape::find(name).unwrap()), "f32");
        let fused = dir.path().join("fused.gguf");
        fuse_experts(&path, &fused);
        let ours = [&path, &fused].map(|path| our_logprobs(path, &tokens));
        assert!(ours[0] == ours[1], "{name}: gate and up of experts in one map");
        for path in [&path, &fused] {
            let theirs = stock::logits(&backend, path, None, &tokens);
            for (i, (own, logits)) in ours[0].iter().zip(&theirs).enumerate() {
                let most = logits.iter().copied().fold(f32::MIN, f32::max) as f64;
                let sum: f64 = logits.iter().map(|&l| (l as f64 - most).exp()).sum();
                let theirs = logits[tokens[i + 1] as usize] as f64 - most - sum.ln();
                let off = (*own as f64 - theirs).abs();
                assert!(off < 1e-3, "{name}, token {i}: {own} and {theirs}");
            }
        }
    }
}

/// Log-probs of every token but the first.
fn our_logprobs(path: &Path, tokens: &[i32]) -> Vec<f32> {
    let model = Model::open(path).unwrap();
    let mut batch = Batch::default();
    batch.push_group(&tokens[..1], &[&tokens[1..]], model.config().n_vocab).unwrap();
    let policy = Policy::full(model.config().n_layer);
    let mut engine = Engine::new(Arc::new(ThreadPool::new(2).unwrap())).unwrap();
    engine.forward(&model, None, &batch, policy.depth()).unwrap();
    engine.score(&model, None, &batch, policy, 1.0, false).unwrap().logprobs
}

/// A copy of an F32 model in which each expert's gate and up are one map, as newer converters may write them.
fn fuse_experts(from: &Path, to: &Path) {
    let file = GgufFile::open(from).unwrap();
    let mut writer = GgufWriter::new();
    for (key, value) in file.metadata() {
        writer.metadata(key, value.clone()).unwrap();
    }
    for tensor in file.tensors() {
        let bytes = file.bytes(tensor);
        if tensor.name.contains("ffn_up_exps") {
            continue;
        }
        if !tensor.name.contains("ffn_gate_exps") {
            writer
                .tensor(&tensor.name, tensor.ty, &tensor.shape, move |out| out.write(bytes))
                .unwrap();
            continue;
        }
        let name = |what: &str| tensor.name.replace("ffn_gate_exps", what);
        let up = file.bytes(file.tensor(&name("ffn_up_exps")).unwrap());
        let expert = bytes.len() / tensor.shape[2] as usize;
        let both: Vec<u8> = bytes
            .chunks(expert)
            .zip(up.chunks(expert))
            .flat_map(|(gate, up)| [gate, up].concat())
            .collect();
        let shape = [tensor.shape[0], 2 * tensor.shape[1], tensor.shape[2]];
        writer
            .tensor(&name("ffn_gate_up_exps"), tensor.ty, &shape, move |out| out.write(&both))
            .unwrap();
    }
    writer.write(to).unwrap();
}

/// The keys by which llama.cpp knows what an architecture has beside sizes.
#[test]
fn files_hold_what_differs_by_family() {
    let number = |file: &GgufFile, key: &str| match file.get(key) {
        Some(Value::F32(x)) => *x as f64,
        Some(Value::U32(n)) => *n as f64,
        other => panic!("{key}: {other:?}"),
    };
    for (name, wanted) in [
        (
            "gemma-2-2b",
            &[
                ("attention.sliding_window", 4096.0),
                ("attn_logit_softcapping", 50.0),
                ("final_logit_softcapping", 30.0),
            ][..],
        ),
        ("gemma-3-270m", &[("attention.sliding_window", 512.0), ("rope.freq_base", 1e6)]),
        ("gemma-3-4b", &[("attention.sliding_window", 1024.0), ("rope.scaling.factor", 8.0)]),
        (
            "gemma-4-e2b",
            &[
                ("attention.shared_kv_layers", 7.0),
                ("attention.key_length", 512.0),
                ("attention.key_length_swa", 256.0),
                ("embedding_length_per_layer_input", 256.0),
            ],
        ),
        (
            "phi-4-mini",
            &[
                ("rope.dimension_count", 96.0),
                ("rope.scaling.original_context_length", 4096.0),
                // sqrt(1 + ln 32 / ln 4096)
                ("rope.scaling.attn_factor", 1.190238071),
            ],
        ),
        (
            "granite-3.3-2b",
            &[
                ("embedding_scale", 12.0),
                ("residual_scale", 0.22),
                ("attention.scale", 0.015625),
                ("logit_scale", 8.0),
            ],
        ),
        (
            "ministral-3-3b",
            &[
                ("rope.scaling.factor", 16.0),
                ("rope.scaling.original_context_length", 16384.0),
                ("attention.temperature_scale", 0.1),
            ],
        ),
    ] {
        let shape = small(Shape::find(name).unwrap());
        let (_dir, path) = write(&shape, "q4_k_m");
        let file = GgufFile::open(&path).unwrap();
        for (key, value) in wanted {
            let got = number(&file, &format!("{}.{key}", shape.arch));
            assert!((got - value).abs() < 1e-6 * value, "{name}: {key} is {got}");
        }
    }
    // Of gemma4's layers, the last have no keys and values of their own and a wider FFN.
    let shape = small(Shape::find("gemma-4-e2b").unwrap());
    let (_dir, path) = write(&shape, "q4_k_m");
    let file = GgufFile::open(&path).unwrap();
    let width = |i: usize| file.tensor(&format!("blk.{i}.ffn_up.weight")).unwrap().shape[1];
    let keys = |i: usize| file.tensor(&format!("blk.{i}.attn_k.weight")).map(|t| t.shape[1]);
    assert_eq!((width(4), width(5)), (256, 512));
    assert_eq!((keys(3), keys(4), keys(5)), (Some(256), Some(512), None));
}
