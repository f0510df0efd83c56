//! How much of a mixture of experts is dequantised; the only test of its process, for the count is one of all threads.

mod common;

use std::collections::BTreeSet;
use std::sync::Arc;

use bupo_gguf::analysis::{Look, measure};
use bupo_gguf::ggml::ThreadPool;
use bupo_gguf::model::{Batch, Engine, Policy};
use bupo_gguf::ops;
use common::Golden;

/// Each expert that a token chose once in a forward, the others not at all.
#[test]
fn chosen_experts_are_dequantised_once() {
    let golden = Golden::load("qwen3moe-q8_0");
    let model = &golden.model;
    // With more threads a plain map of a single tile is dequantised by each.
    let mut engine = Engine::new(Arc::new(ThreadPool::new(1).unwrap())).unwrap();
    let config = model.config();
    for tokens in [golden.ints("entropy_tokens"), golden.ints("entropy_tokens")[..3].to_vec()] {
        let mut batch = Batch::default();
        batch.push_group(&tokens[..1], &[&tokens[1..]], config.n_vocab).unwrap();
        let picked: Vec<usize> = (0..batch.scored.len()).collect();
        let layers = measure(&mut engine, model, None, &batch, &picked, Look::default()).unwrap();
        let mut expected = 0;
        for (i, layer) in layers.iter().enumerate() {
            let routed = layer.iter().flat_map(|m| m.routed.clone().unwrap().experts);
            let chosen: BTreeSet<i32> = routed.collect();
            assert!(chosen.len() < 8 || tokens.len() > 3, "three tokens choose six at most");
            // The router is F32, and read where it lies.
            let maps = model.maps().iter().filter(|map| map.layer == i + 1);
            expected += maps
                .filter(|map| map.name != "ffn_gate_inp")
                .map(|map| if map.n_expert > 1 { chosen.len() } else { 1 } * map.n_in * map.n_out)
                .sum::<usize>();
        }
        let before = ops::dequantised();
        engine.forward(model, None, &batch, Policy::full(config.n_layer).depth()).unwrap();
        assert_eq!(ops::dequantised() - before, expected as u64, "{} tokens", tokens.len());
    }
}
