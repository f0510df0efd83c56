//! A stock llama.cpp, through `llama-cpp-2`, loads what we write and computes what we compute.

mod common;
#[path = "common/stock.rs"]
mod stock;

use bupo_gguf::model::{Batch, Lora, Policy};
use bupo_gguf::train::{AdamW, AdamWConfig};
use common::{ARCHS, Golden, relative_error};
use llama_cpp_2::llama_backend::LlamaBackend;

/// Largest difference of a log-prob, nats. llama.cpp takes GELU from a table of half floats on the CPU.
fn tolerance(case: &str) -> f32 {
    if case.starts_with("gemma") { 2e-2 } else { 1e-3 }
}

/// One test, for the backend can be started once in a process.
#[test]
fn stock_llama_cpp_gives_the_trainers_logprobs() {
    let backend = LlamaBackend::init().unwrap();
    let further = ARCHS.into_iter().filter(|case| case.ends_with("f32"));
    for case in ["qwen3-f32", "llama-f32", "qwen2-f32"].into_iter().chain(further) {
        let golden = Golden::load(case);
        // With a pair on the unembedding, where it is not the embedding.
        let mut lora = Lora::from_file(&golden.model, golden.adapter_with_head(), case).unwrap();
        let heads = golden.model.weights().find("output.weight").iter().count();
        assert_eq!(lora.frozen(), ["output.weight"][..heads], "{case}");
        let mut engine = golden.engine();
        let row = &golden.rollouts()[0];
        let completion = row.completions.last().unwrap().as_slice();
        let mut batch = Batch::default();
        batch.push_group(&row.prompt, &[completion], golden.model.config().n_vocab).unwrap();
        let policy = Policy::full(golden.model.config().n_layer);

        // A real optimiser step, so that what is written is not what was read.
        let mut gradients = lora.zeros_like().unwrap();
        engine.forward(&golden.model, Some(&lora), &batch, policy.depth()).unwrap();
        engine.score(&golden.model, Some(&lora), &batch, policy, 1.0, true).unwrap();
        let cotangents = vec![-1.0; completion.len()];
        engine.backward(&golden.model, &lora, &mut gradients, &batch, policy, &cotangents).unwrap();
        let config = AdamWConfig::default();
        let mut optimizer = AdamW::new(&lora, policy.depth(), config).unwrap();
        let step = optimizer.step(engine.executor(), &mut lora, &gradients, policy.depth(), 1e-2);
        assert!(step.unwrap().applied);
        for i in (0..lora.tensors().len()).rev().take(2 * heads) {
            assert!(
                gradients.values(i).iter().all(|g| *g == 0.0),
                "{case}: the head is not trained"
            );
        }

        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("adapter.gguf");
        lora.save(&golden.model, &path, Vec::new()).unwrap();
        engine.forward(&golden.model, Some(&lora), &batch, policy.depth()).unwrap();
        let ours =
            engine.score(&golden.model, Some(&lora), &batch, policy, 1.0, false).unwrap().logprobs;

        let tokens = [row.prompt.as_slice(), completion].concat();
        let model = common::folder_of(case).join(format!("{case}.gguf"));
        engine.forward(&golden.model, None, &batch, policy.depth()).unwrap();
        let base = engine.score(&golden.model, None, &batch, policy, 1.0, false).unwrap().logprobs;
        for (what, ours, adapter) in [("base", base, None), ("adapter", ours, Some(&*path))] {
            let logits = stock::logits(&backend, &model, adapter, &tokens);
            let stock = stock::logprobs(&logits, &tokens, row.prompt.len());
            let off = ours.iter().zip(&stock).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
            println!("{off:.1e} of {:.0e}  {case} {what}", tolerance(case));
            assert!(off < tolerance(case), "{case} {what}: {off} nats");
            if !ARCHS.contains(&case) {
                assert!(relative_error(&ours, &stock) < 1e-4, "{case} {what}");
            }
        }

        // What was written is what is read: the same adapter, bit by bit.
        let again = Lora::load(&golden.model, &path).unwrap();
        for i in 0..lora.tensors().len() {
            assert_eq!(lora.tensors().values(i), again.tensors().values(i), "{case} tensor {i}");
        }
        assert_eq!((again.rank(), again.alpha()), (lora.rank(), lora.alpha()));
        assert_eq!(again.targets(), lora.targets());
    }
}
