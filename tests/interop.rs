//! A stock llama.cpp, through `llama-cpp-2`, loads what we write and computes what we compute.

mod common;
#[path = "common/stock.rs"]
mod stock;

use bupo_gguf::model::{Batch, Lora, Policy, Targets};
use bupo_gguf::train::{AdamW, AdamWConfig};
use common::{Golden, relative_error};
use llama_cpp_2::llama_backend::LlamaBackend;

/// One test, for the backend can be started once in a process.
#[test]
fn stock_llama_cpp_gives_the_trainers_logprobs() {
    let backend = LlamaBackend::init().unwrap();
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
        let step = optimizer.step(engine.executor(), &mut lora, &gradients, policy.depth(), 1e-2);
        assert!(step.unwrap().applied);

        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("adapter.gguf");
        lora.save(&golden.model, &path, Vec::new()).unwrap();
        engine.forward(&golden.model, Some(&lora), &batch, policy.depth()).unwrap();
        let ours = engine.score(&golden.model, &batch, policy, 1.0, false).unwrap().logprobs;

        let tokens = [row.prompt.as_slice(), completion].concat();
        let model = common::golden_dir().join(format!("{case}.gguf"));
        let logits = stock::logits(&backend, &model, Some(&path), &tokens);
        let stock = stock::logprobs(&logits, &tokens, row.prompt.len());
        let error = relative_error(&ours, &stock);
        assert!(error < 1e-4, "{case}: {error}");

        // What was written is what is read: the same adapter, bit by bit.
        let again = Lora::load(&golden.model, &path).unwrap();
        for i in 0..lora.tensors().len() {
            assert_eq!(lora.tensors().values(i), again.tensors().values(i), "{case} tensor {i}");
        }
        assert_eq!((again.rank(), again.alpha()), (lora.rank(), lora.alpha()));
        assert_eq!(again.targets(), "q,k,v,o,gate,up,down".parse().unwrap());
    }
}
