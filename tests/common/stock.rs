//! A stock llama.cpp, through `llama-cpp-2`.
#![allow(dead_code)]

use std::path::Path;

use llama_cpp_2::context::params::{KvCacheType, LlamaContextParams};
use llama_cpp_2::llama_backend::LlamaBackend;
use llama_cpp_2::llama_batch::LlamaBatch;
use llama_cpp_2::model::LlamaModel;
use llama_cpp_2::model::params::LlamaModelParams;
use llama_cpp_2::token::LlamaToken;

/// `enum llama_flash_attn_type`
const FLASH_ATTN_DISABLED: i32 = 0;

/// Logits after each of `tokens`, with an adapter file or without.
pub fn logits(
    backend: &LlamaBackend,
    model: &Path,
    adapter: Option<&Path>,
    tokens: &[i32],
) -> Vec<Vec<f32>> {
    let mut model = LlamaModel::load_from_file(backend, model, &LlamaModelParams::default())
        .expect("stock llama.cpp loads the model");
    let mut adapter = adapter
        .map(|path| model.lora_adapter_init(path).expect("stock llama.cpp loads the adapter"));
    // Keys and values in F32 and plain attention, so that the comparison is of the weights alone:
    // flash attention on the CPU rounds to F16 within.
    let params = LlamaContextParams::default()
        .with_type_k(KvCacheType::F32)
        .with_type_v(KvCacheType::F32)
        .with_n_threads(1)
        .with_n_threads_batch(1)
        .with_flash_attention_policy(FLASH_ATTN_DISABLED);
    let mut context = model.new_context(backend, params).unwrap();
    if let Some(adapter) = &mut adapter {
        context.lora_adapter_set(adapter, 1.0).unwrap();
    }
    let mut batch = LlamaBatch::new(tokens.len(), 1);
    for (i, &t) in tokens.iter().enumerate() {
        batch.add(LlamaToken(t), i as i32, &[0], true).unwrap();
    }
    context.decode(&mut batch).unwrap();
    (0..tokens.len()).map(|i| context.get_logits_ith(i as i32).to_vec()).collect()
}

/// Greedily decoded tokens after `tokens`.
pub fn generate(backend: &LlamaBackend, model: &Path, tokens: &[i32], n: usize) -> Vec<i32> {
    let mut all = tokens.to_vec();
    for _ in 0..n {
        let last = logits(backend, model, None, &all).pop().unwrap();
        assert!(last.iter().all(|l| l.is_finite()));
        let best = (0..last.len()).max_by(|&a, &b| last[a].total_cmp(&last[b])).unwrap();
        all.push(best as i32);
    }
    all.split_off(tokens.len())
}

/// log p(`tokens[i]`) for i in `from..`, nats.
pub fn logprobs(logits: &[Vec<f32>], tokens: &[i32], from: usize) -> Vec<f32> {
    (from..tokens.len())
        .map(|i| {
            let logits = &logits[i - 1];
            let max = logits.iter().copied().fold(f32::MIN, f32::max) as f64;
            let sum: f64 = logits.iter().map(|&l| (l as f64 - max).exp()).sum();
            (logits[tokens[i] as usize] as f64 - max - sum.ln()) as f32
        })
        .collect()
}
