//! What the graphs of training rely on: results that stay, and the same bits every time.

use bupo_gguf::ggml::Type;
use bupo_gguf::ops::{self, Activation, AttentionSpec, LogitMap, Segment};

use super::harness::{Random, Source, run};

/// A result that is part of a node and is read by later nodes keeps its values.
#[test]
fn a_part_that_is_an_output_stays() {
    let [n, t] = [64, 8];
    let mut random = Random::new(13);
    let sources = [(); 3].map(|()| Source::f32(&random.normal(n * t), &[n, t]));
    let alone = run(1, &sources, |arena, s| {
        let (dg, du) = ops::glu_back(arena, s[0], s[1], s[2], Activation::Silu);
        vec![dg, du]
    });
    let within = run(1, &sources, |arena, s| {
        let (dg, du) = ops::glu_back(arena, s[0], s[1], s[2], Activation::Silu);
        // Enough later nodes of the same size to take any memory that became free.
        let mut last = arena.add(dg, du);
        let mut all = vec![dg, du];
        for _ in 0..8 {
            let (a, b) = ops::glu_back(arena, last, s[1], s[2], Activation::Silu);
            last = arena.add(a, b);
        }
        all.push(last);
        all
    });
    assert_eq!(alone[..2], within[..2]);
}

/// Many times with five threads: the order in which they finish does not show.
#[test]
fn results_repeat_to_the_bit() {
    let [d, v, t] = [64, 700, 530];
    let mut random = Random::new(14);
    let (e, _) = random.weight(Type::Q8_0, d, v);
    let segments = [(0, 100, 0, 0), (100, 250, 0, 100), (250, 530, 0, 100)];
    let segments = segments.map(|(begin, end, prefix_begin, prefix_end)| Segment {
        begin,
        end,
        prefix_begin,
        prefix_end,
    });
    let spec = AttentionSpec {
        n_head: 4,
        n_head_kv: 4,
        head_size: 16,
        scale: 0.25,
        window: Some(120),
        softcap: Some(2.0),
    };
    let map = LogitMap { scale: 0.5, softcap: Some(5.0) };
    let targets = random.below(t, v);
    let sources = [Source::f32(&random.normal(d * t), &[d, t]), e, Source::I32(targets)];
    let once = |threads| {
        run(threads, &sources, |arena, s| {
            let (h, e) = (s[0], s[1]);
            let (out, saved) = ops::attention(arena, h, h, h, None, &segments, spec);
            let [dq, dk, dv] = ops::attention_back(arena, &saved, h);
            let y = ops::linear(arena, e, out, None, None);
            let dx = ops::linear_back(arena, e, y, None, None);
            let head = ops::Head::new(out, e, map);
            let logprob = ops::linear_logprob(arena, head, Some(s[2]), 1.3, true);
            let gradient = logprob.gradient.unwrap();
            vec![out, dq, dk, dv, dx, logprob.logprob, logprob.entropy, gradient]
        })
    };
    for threads in [2, 5] {
        let first = once(threads);
        for _ in 0..5 {
            assert!(once(threads) == first, "threads={threads}");
        }
    }
}
