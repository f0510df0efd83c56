//! attention, attention_back.

use bupo_gguf::ops::{self, AttentionSpec, Segment};

use super::harness::{Random, Source, Tree, close, f64s, is_vjp, run, segments};
use super::reference;
use super::{CANCELLED, EXACT};

fn spec(n_head: usize, n_head_kv: usize, head_size: usize) -> AttentionSpec {
    let scale = 1.0 / (head_size as f32).sqrt();
    AttentionSpec { n_head, n_head_kv, head_size, scale, window: None, softcap: None }
}

/// Output and cotangents of q, k and v.
fn computed(
    inputs: [&[f32]; 4],
    sinks: Option<&[f32]>,
    segments: &[Segment],
    spec: AttentionSpec,
    threads: usize,
) -> [Vec<f32>; 4] {
    let [q_width, kv_width] = [spec.n_head, spec.n_head_kv].map(|n| n * spec.head_size);
    let t = inputs[0].len() / q_width;
    let widths = [q_width, kv_width, kv_width, q_width];
    let mut sources: Vec<Source> =
        inputs.iter().zip(widths).map(|(x, width)| Source::f32(x, &[width, t])).collect();
    sources.extend(sinks.map(|sinks| Source::f32(sinks, &[spec.n_head])));
    run(threads, &sources, |arena, s| {
        let sinks = s.get(4).copied();
        let (out, saved) = ops::attention(arena, s[0], s[1], s[2], sinks, segments, spec);
        let [dq, dk, dv] = ops::attention_back(arena, &saved, s[3]);
        vec![out, dq, dk, dv]
    })
    .try_into()
    .unwrap()
}

/// `gain` scales the queries and with them the scores.
fn check(trees: &[Tree], spec: AttentionSpec, threads: usize, gain: f32, tolerance: f64) {
    check_with(None, trees, spec, threads, gain, tolerance);
}

/// `sink` is what the heads' sinks are near.
fn check_with(
    sink: Option<f32>,
    trees: &[Tree],
    spec: AttentionSpec,
    threads: usize,
    gain: f32,
    tolerance: f64,
) {
    let segments = segments(trees);
    let t = segments.last().unwrap().end as usize;
    let AttentionSpec { n_head, n_head_kv, head_size, window, softcap, .. } = spec;
    let what = |of: &str| {
        let heads = format!("{n_head}:{n_head_kv}x{head_size}");
        let edges = format!("window={window:?} softcap={softcap:?}");
        format!("attention {of} T={t} {heads} {edges} x{gain} threads={threads}")
    };
    let [q_width, kv_width] = [n_head, n_head_kv].map(|n| n * head_size);
    let mut random = Random::new((t * q_width + kv_width) as u64);
    let q: Vec<f32> = random.normal(q_width * t).iter().map(|x| gain * x).collect();
    let (k, v) = (random.normal(kv_width * t), random.normal(kv_width * t));
    let d = random.normal(q_width * t);
    let sinks: Option<Vec<f32>> =
        sink.map(|sink| random.normal(n_head).iter().map(|z| z + sink).collect());
    let inputs = [&q, &k, &v, &d].map(|x| &x[..]);
    let [out, dq, dk, dv] = computed(inputs, sinks.as_deref(), &segments, spec, threads);
    let sinks = sinks.as_deref().map(f64s);
    let forward = |q: &[f64], k: &[f64], v: &[f64]| {
        reference::attention(q, k, v, sinks.as_deref(), &segments, spec)
    };
    let [q64, k64, v64] = [&q, &k, &v].map(|x| f64s(x));
    close(&what("forward"), &out, &forward(&q64, &k64, &v64), tolerance);
    is_vjp(&what("dq"), |q| forward(q, &k64, &v64), &q, &d, &dq, tolerance);
    is_vjp(&what("dk"), |k| forward(&q64, k, &v64), &k, &d, &dk, tolerance);
    is_vjp(&what("dv"), |v| forward(&q64, &k64, v), &v, &d, &dv, tolerance);
}

#[test]
fn attention_of_small_trees() {
    let forest: &[Tree] = &[(3, &[1, 2, 4]), (1, &[]), (2, &[3]), (1, &[1])];
    for threads in [1, 2, 5] {
        // A lone token attends to itself with weight 1, whatever q and k: their cotangents are
        // differences of equal products of size 1, of which the rounding remains.
        check(&[(1, &[])], spec(1, 1, 8), threads, 1.0, CANCELLED);
        check(&[(1, &[])], spec(8, 1, 64), threads, 1.0, CANCELLED);
        check(&[(1, &[1])], spec(2, 1, 8), threads, 1.0, EXACT);
        check(&[(7, &[])], spec(2, 2, 8), threads, 1.0, EXACT);
        check(forest, spec(4, 2, 8), threads, 1.0, EXACT);
        check(forest, spec(8, 1, 8), threads, 1.0, EXACT);
        check(forest, spec(3, 3, 6), threads, 1.0, EXACT);
    }
}

#[test]
fn attention_of_every_head_size() {
    for (n_head, n_head_kv, head_size) in [(8, 1, 64), (2, 2, 128), (2, 1, 256), (4, 4, 8)] {
        for threads in [1, 2, 5] {
            let trees: &[Tree] = &[(9, &[5, 1, 8]), (4, &[2, 2])];
            check(trees, spec(n_head, n_head_kv, head_size), threads, 1.0, EXACT);
        }
    }
}

#[test]
fn attention_of_more_than_a_tile() {
    // Tiles are 64 queries by 128 keys: one less, equal, one more, several; as prompt and completion.
    for n in [63, 64, 65, 127, 128, 129] {
        check(&[(n, &[])], spec(2, 1, 8), 2, 1.0, EXACT);
        check(&[(n, &[n, 3])], spec(2, 1, 8), 1, 1.0, EXACT);
    }
    for threads in [1, 2, 5] {
        check(&[(300, &[])], spec(4, 2, 64), threads, 1.0, EXACT);
        check(&[(140, &[1, 150, 70]), (65, &[130])], spec(4, 2, 32), threads, 1.0, EXACT);
    }
}

#[test]
fn attention_of_large_scores() {
    // Scores up to +-80 and more: rounding of the score, 2^-24 times its size, is what remains.
    for threads in [1, 2] {
        let spec = spec(4, 2, 16);
        check(&[(40, &[30, 5])], spec, threads, 20.0, 10.0 * EXACT);
        check(&[(140, &[70])], spec, threads, 20.0, 10.0 * EXACT);
        check(&[(40, &[30, 5])], spec, threads, 0.0, EXACT);
    }
}

#[test]
fn attention_with_sinks() {
    let forest: &[Tree] = &[(3, &[1, 2, 4]), (1, &[]), (2, &[3]), (140, &[70])];
    for sink in [-100.0, 0.0, 3.0, 12.0] {
        for threads in [1, 2, 5] {
            let windowed = AttentionSpec { window: Some(5), ..spec(4, 2, 8) };
            check_with(Some(sink), forest, spec(4, 2, 8), threads, 1.0, EXACT);
            check_with(Some(sink), forest, windowed, threads, 1.0, EXACT);
        }
    }
}

#[test]
fn attention_with_a_window() {
    let forest: &[Tree] = &[(9, &[1, 2, 14]), (1, &[]), (2, &[3]), (40, &[])];
    for window in [2, 3, 9, 10, 23, 40, 1000] {
        for threads in [1, 2, 5] {
            let spec = AttentionSpec { window: Some(window), ..spec(4, 2, 8) };
            check(forest, spec, threads, 1.0, EXACT);
        }
    }
    // Tiles are 64 queries by 128 keys; the longest sequence has 290 tokens.
    for window in [2, 63, 64, 65, 127, 128, 129, 140, 141, 151, 289, 290, 291] {
        let spec = AttentionSpec { window: Some(window), ..spec(2, 1, 8) };
        check(&[(140, &[1, 150, 20, 30, 70]), (65, &[130])], spec, 2, 1.0, EXACT);
        check(&[(290, &[])], spec, 1, 1.0, EXACT);
    }
}

/// Each token alone: its own value, whatever queries and keys.
#[test]
fn attention_with_a_window_of_one() {
    let spec = AttentionSpec { window: Some(1), ..spec(4, 2, 8) };
    for trees in [&[(140, &[3, 70][..])][..], &[(2, &[1]), (1, &[])]] {
        // Cotangents of q and k are differences of equal products of size 1.
        check(trees, spec, 2, 1.0, CANCELLED);
    }
}

#[test]
fn a_window_beyond_all_tokens_changes_no_bit() {
    let segments = segments(&[(140, &[1, 150, 70]), (65, &[130])]);
    let t = segments.last().unwrap().end as usize;
    let mut random = Random::new(7);
    let [q, d] = [(); 2].map(|()| random.normal(32 * t));
    let [k, v] = [(); 2].map(|()| random.normal(16 * t));
    let with = |window| {
        let spec = AttentionSpec { window, ..spec(4, 2, 8) };
        computed([&q, &k, &v, &d], None, &segments, spec, 2)
    };
    let plain = with(None);
    assert_eq!(plain, with(Some(290)));
    assert_eq!(plain, with(Some(usize::MAX)));
    assert_ne!(plain, with(Some(289)));
}

#[test]
fn attention_with_a_softcap() {
    let trees: &[Tree] = &[(140, &[1, 70]), (9, &[5, 1, 8])];
    for threads in [1, 5] {
        // Scores from far below the cap to far beyond.
        for (softcap, gain) in [(50.0, 1.0), (2.0, 1.0), (1.0, 3.0), (0.1, 1.0), (30.0, 20.0)] {
            let spec = AttentionSpec { softcap: Some(softcap), ..spec(4, 2, 16) };
            check(trees, spec, threads, gain, EXACT * (gain as f64 / 2.0).max(1.0));
            let spec = AttentionSpec { window: Some(33), ..spec };
            check(trees, spec, threads, gain, EXACT * (gain as f64 / 2.0).max(1.0));
        }
    }
}

/// All scores at the cap: every key is as good as another, and hardly moves.
#[test]
fn attention_of_scores_at_the_cap() {
    let [size, t] = [8, 70];
    let spec = AttentionSpec { softcap: Some(2.0), scale: 1.0, ..spec(1, 1, size) };
    let mut random = Random::new(16);
    let q = vec![4.0f32; size * t];
    let k: Vec<f32> = random.normal(size * t).iter().map(|x| 1.0 + 0.01 * x).collect();
    let (v, d) = (random.normal(size * t), random.normal(size * t));
    let [out, dq, dk, _] = computed([&q, &k, &v, &d], None, &segments(&[(t, &[])]), spec, 1);
    let mean = |i: usize, c: usize| -> f64 {
        (0..=i).map(|j| v[j * size + c] as f64).sum::<f64>() / (i + 1) as f64
    };
    let want: Vec<f64> = (0..size * t).map(|at| mean(at / size, at % size)).collect();
    close("attention of scores at the cap", &out, &want, EXACT);
    assert!(dq.iter().chain(&dk).all(|x| x.abs() < 1e-9), "{dq:?} {dk:?}");
    assert!(dq.iter().any(|&x| x != 0.0));
}

/// Completions on one shared prompt, and each on a copy of its own: equal outputs, and the shared
/// prompt's cotangents are the sum over the copies.
#[test]
fn a_shared_prefix_is_the_sum_of_its_copies() {
    let [q_width, kv_width] = [64, 32];
    for (prompt, completions, window) in [
        (5, vec![3, 1, 4], None),
        (130, vec![70, 2, 129], None),
        (5, vec![3, 1, 4], Some(4)),
        (130, vec![70, 2, 129], Some(72)),
    ] {
        let spec = AttentionSpec { window, ..spec(4, 2, 16) };
        for threads in [1, 2, 5] {
            let shared = segments(&[(prompt, &completions)]);
            let t = shared.last().unwrap().end as usize;
            let mut random = Random::new(6);
            let (q, d) = (random.normal(q_width * t), random.normal(q_width * t));
            let (k, v) = (random.normal(kv_width * t), random.normal(kv_width * t));
            let [out, dq, dk, dv] = computed([&q, &k, &v, &d], None, &shared, spec, threads);

            // Token of the shared layout for each token of the unshared one.
            let alone: Vec<Vec<usize>> = shared[1..]
                .iter()
                .map(|s| (0..prompt).chain(s.begin as usize..s.end as usize).collect())
                .collect();
            let tokens: Vec<usize> = alone.concat();
            let lengths: Vec<Tree> = alone.iter().map(|tokens| (tokens.len(), &[][..])).collect();
            let gather = |x: &[f32], width: usize| -> Vec<f32> {
                tokens.iter().flat_map(|&i| x[i * width..][..width].to_vec()).collect()
            };
            let mut d_alone = gather(&d, q_width);
            // The prompt's own output counts once: in the first copy.
            for (i, &token) in tokens.iter().enumerate().skip(alone[0].len()) {
                if token < prompt {
                    d_alone[i * q_width..][..q_width].fill(0.0);
                }
            }
            let [q_alone, k_alone, v_alone] =
                [gather(&q, q_width), gather(&k, kv_width), gather(&v, kv_width)];
            let inputs = [&q_alone[..], &k_alone, &v_alone, &d_alone];
            let results = computed(inputs, None, &segments(&lengths), spec, threads);

            let what = |of: &str| {
                format!("shared {of} prompt={prompt} window={window:?} threads={threads}")
            };
            close(&what("out"), &results[0], &f64s(&gather(&out, q_width)), EXACT);
            let names = [("dq", &dq, q_width), ("dk", &dk, kv_width), ("dv", &dv, kv_width)];
            for ((name, got, width), copies) in names.into_iter().zip(&results[1..]) {
                let mut sum = vec![0.0; got.len()];
                for (copy, &token) in copies.chunks(width).zip(&tokens) {
                    for (sum, x) in sum[token * width..].iter_mut().zip(copy) {
                        *sum += *x as f64;
                    }
                }
                close(&what(name), got, &sum, EXACT);
            }
        }
    }
}

#[test]
#[should_panic(expected = "a token sees itself at least")]
fn a_window_of_none_is_refused() {
    let x = vec![0.0; 8];
    let spec = AttentionSpec { window: Some(0), ..spec(1, 1, 8) };
    computed([&x, &x, &x, &x], None, &segments(&[(1, &[])]), spec, 1);
}

#[test]
#[should_panic(expected = "prefix of segment 2")]
fn a_prefix_of_another_tree_is_refused() {
    // Threads share out trees, so that a completion must stand in the tree of its prompt.
    let two = [(0, 2, 0, 0), (2, 4, 2, 2), (4, 6, 0, 2)];
    let two = two.map(|(begin, end, prefix_begin, prefix_end)| Segment {
        begin,
        end,
        prefix_begin,
        prefix_end,
    });
    let x = vec![0.0; 8 * 6];
    computed([&x, &x, &x, &x], None, &two, spec(1, 1, 8), 1);
}
