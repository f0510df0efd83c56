//! A stock llama.cpp, through `llama-cpp-2`, loads what we write and computes what we compute.

mod common;

use std::path::Path;

use bupo_gguf::model::{Batch, Lora, Policy, Targets};
use bupo_gguf::train::{AdamW, AdamWConfig};
use common::{Golden, relative_error};
use llama_cpp_2::context::params::{KvCacheType, LlamaContextParams};
use llama_cpp_2::llama_backend::LlamaBackend;
use llama_cpp_2::llama_batch::LlamaBatch;
use llama_cpp_2::model::LlamaModel;
use llama_cpp_2::model::params::LlamaModelParams;
use llama_cpp_2::token::LlamaToken;

/// `enum llama_flash_attn_type`
const FLASH_ATTN_DISABLED: i32 = 0;

/// Log-probs of `tokens[from..]` by stock llama.cpp with an adapter file.
fn stock_logprobs(model: &Path, adapter: &Path, tokens: &[i32], from: usize) -> Vec<f32> {
    let backend = LlamaBackend::init().unwrap();
    let mut model =
        LlamaModel::load_from_file(&backend, model, &LlamaModelParams::default()).unwrap();
    let mut adapter = model.lora_adapter_init(adapter).expect("stock llama.cpp loads the adapter");
    // Keys and values in F32 and plain attention, so that the comparison is of the adapter alone:
    // flash attention on the CPU rounds to F16 within.
    let params = LlamaContextParams::default()
        .with_type_k(KvCacheType::F32)
        .with_type_v(KvCacheType::F32)
        .with_flash_attention_policy(FLASH_ATTN_DISABLED);
    let mut context = model.new_context(&backend, params).unwrap();
    context.lora_adapter_set(&mut adapter, 1.0).unwrap();
    let mut batch = LlamaBatch::new(tokens.len(), 1);
    for (i, &t) in tokens.iter().enumerate() {
        batch.add(LlamaToken(t), i as i32, &[0], true).unwrap();
    }
    context.decode(&mut batch).unwrap();
    (from..tokens.len())
        .map(|i| {
            let logits = context.get_logits_ith(i as i32 - 1);
            let max = logits.iter().copied().fold(f32::MIN, f32::max) as f64;
            let sum: f64 = logits.iter().map(|&l| (l as f64 - max).exp()).sum();
            (logits[tokens[i] as usize] as f64 - max - sum.ln()) as f32
        })
        .collect()
}

/// One test, for the backend can be started once in a process.
#[test]
fn stock_llama_cpp_gives_the_trainers_logprobs() {
    for case in ["qwen3-f32", "llama-f32", "qwen2-f32"] {
        let golden = Golden::load(case);
        let (mut engine, mut lora) = (golden.engine(), golden.lora());
        let row = &golden.rollouts()[0];
        let completion = row.completions[2].as_slice();
        let mut batch = Batch::default();
        batch.push_group(&row.prompt, &[completion], golden.model.config().n_vocab).unwrap();
        let policy = Policy::full(golden.model.config().n_layer);

        // A real optimiser step, so that what is written is not what was read.
        let mut gradients = lora.zeros_like().unwrap();
        engine.forward(&golden.model, Some(&lora), &batch, policy.depth()).unwrap();
        engine.score(&golden.model, &batch, policy, 1.0, true).unwrap();
        let cotangents = vec![-1.0; completion.len()];
        engine.backward(&golden.model, &lora, &mut gradients, &batch, policy, &cotangents).unwrap();
        let config = AdamWConfig::default();
        let mut optimizer = AdamW::new(&lora, policy.depth(), config).unwrap();
        assert!(optimizer.step(&mut lora, &gradients, policy.depth(), 1e-2).applied);

        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("adapter.gguf");
        lora.save(&golden.model, &path, Vec::new()).unwrap();
        engine.forward(&golden.model, Some(&lora), &batch, policy.depth()).unwrap();
        let ours = engine.score(&golden.model, &batch, policy, 1.0, false).unwrap().logprobs;

        let tokens = [row.prompt.as_slice(), completion].concat();
        let model = common::golden_dir().join(format!("{case}.gguf"));
        let stock = stock_logprobs(&model, &path, &tokens, row.prompt.len());
        let error = relative_error(&ours, &stock);
        assert!(error < 1e-4, "{case}: {error}");

        // What was written is what is read: the same adapter, bit by bit.
        let again = Lora::load(&golden.model, &path).unwrap();
        for i in 0..lora.tensors().len() {
            assert_eq!(lora.tensors().values(i), again.tensors().values(i), "{case} tensor {i}");
        }
        assert_eq!((again.rank(), again.alpha()), (lora.rank(), lora.alpha()));
        assert_eq!(again.targets(), Targets::default());
    }
}
