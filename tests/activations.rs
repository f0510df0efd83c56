//! Counts of what an update computes: activations that are kept are not computed again, gradients are the
//! same bits with any budget, and nothing above the internal layer is built.

mod common;

use bupo_gguf::model::{Batch, Engine, Lora, Policy, Work};
use common::Golden;

fn gradients(
    golden: &Golden,
    engine: &mut Engine,
    lora: &Lora,
    batch: &Batch,
    policy: Policy,
) -> (Vec<f32>, Work) {
    engine.take_work();
    engine.forward_to_train(&golden.model, lora, batch, policy.depth()).unwrap();
    let scores = engine.score(&golden.model, Some(lora), batch, policy, 1.0, true).unwrap();
    let cotangents: Vec<f32> = (0..scores.logprobs.len()).map(|i| (i % 7) as f32 - 3.0).collect();
    let mut sums = lora.zeros_like().unwrap();
    engine.backward(&golden.model, lora, &mut sums, batch, policy, &cotangents).unwrap();
    let all = (0..sums.len()).flat_map(|i| sums.values(i).to_vec()).collect();
    (all, engine.take_work())
}

#[test]
fn kept_activations_give_the_same_bits_and_are_not_computed_again() {
    for case in ["qwen3-q4_k", "qwen2-f32", "llama-q4_0"] {
        let golden = Golden::load(case);
        let (mut engine, lora) = (golden.engine(), golden.lora());
        let n_layer = golden.model.config().n_layer;
        let batches: Vec<Batch> = [2, 1]
            .map(|n| {
                let mut batch = Batch::default();
                for row in golden.rollouts().iter().take(n) {
                    let completions: Vec<&[i32]> =
                        row.completions.iter().map(Vec::as_slice).collect();
                    let v = golden.model.config().n_vocab;
                    batch.push_group(&row.prompt, &completions, v).unwrap();
                }
                batch
            })
            .into();
        for policy in [Policy::full(n_layer), Policy::internal(2, n_layer, false).unwrap()] {
            for batch in &batches {
                engine.keep_up_to(0);
                let (want, work) = gradients(&golden, &mut engine, &lora, batch, policy);
                assert_eq!(work.layers_kept, 0, "{case}");
                assert_eq!(work.layer_forwards, policy.depth(), "{case}");
                assert_eq!(work.layer_backwards, policy.depth(), "{case}");
                assert_eq!(work.highest_layer, policy.depth(), "{case}");
                engine.keep_up_to(1 << 30);
                let (got, work) = gradients(&golden, &mut engine, &lora, batch, policy);
                assert_eq!(work.layers_kept, policy.depth(), "{case}");
                assert!(want.iter().zip(&got).all(|(a, b)| a.to_bits() == b.to_bits()), "{case}");
                // A budget for some layers only.
                let some = engine.kept_bytes() / n_layer * 3 / 2;
                engine.keep_up_to(some);
                let (got, work) = gradients(&golden, &mut engine, &lora, batch, policy);
                let full = policy.depth() == n_layer;
                assert!(!full || (1..n_layer).contains(&work.layers_kept), "{case}: {work:?}");
                assert!(want.iter().zip(&got).all(|(a, b)| a.to_bits() == b.to_bits()), "{case}");
            }
        }
    }
}
