//! With invariant rollouts a completion does not depend on who is decoded beside it.

mod common;

use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use bupo_gguf::ggml::ThreadPool;
use bupo_gguf::rollout::{Completion, Request, RolloutOptions, Rollouts, Sampling};
use common::Golden;

/// Prompts of several lengths, with so many completions each.
fn requests(n_vocab: usize, completions: usize) -> Vec<Request> {
    (0..4usize)
        .map(|i| Request {
            prompt_tokens: (0..2 + 7 * i)
                .map(|t| ((5 + 11 * t + 3 * i) % n_vocab) as i32)
                .collect(),
            n: completions,
            seed_stream: i as u64,
            max_tokens: 5 + 4 * (i % 3),
        })
        .collect()
}

fn sample(rollouts: &mut Rollouts, requests: &[Request]) -> Vec<Vec<Completion>> {
    let stop = AtomicBool::new(false);
    rollouts.generate(requests, &Sampling::default(), 1, &mut |_| (), &stop).unwrap()
}

#[test]
fn completions_do_not_depend_on_who_is_decoded_beside_them() {
    let first = ["qwen3-q8_0", "llama-q4_0", "qwen3-q4_k", "llama-f32", "qwen2-f32"];
    let names = first.into_iter().chain(common::ARCHS);
    let mut failed = Vec::new();
    for name in names {
        let golden = Golden::load(name);
        let mut lora = golden.lora();
        let pool = Arc::new(ThreadPool::new(1).unwrap());
        let mut with = |n_seq: usize| {
            let options = RolloutOptions { n_ctx_seq: 64, kv_bytes: 1 << 30 };
            let options = options.at_most(n_seq, golden.model.engine()).unwrap();
            let mut rollouts = Rollouts::new(golden.model.engine(), &pool, options).unwrap();
            rollouts.set_adapter(Some(lora.live(&golden.model).unwrap())).unwrap();
            rollouts.make_invariant();
            rollouts
        };
        let requests = requests(golden.model.config().n_vocab, 5);
        let together = sample(&mut with(64), &requests);
        let few = sample(&mut with(2), &requests);
        let mut alone = with(64);
        let alone: Vec<_> = requests
            .iter()
            .map(|request| sample(&mut alone, std::slice::from_ref(request)).remove(0))
            .collect();
        if together != few {
            failed.push(format!("{name}: 2 sequences at once"));
        }
        if together != alone {
            failed.push(format!("{name}: one prompt at a time"));
        }
    }
    assert!(failed.is_empty(), "{failed:#?}");
}
