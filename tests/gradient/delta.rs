//! delta, delta_back.

use bupo_gguf::ops::{self, DeltaInputs, DeltaSpec, Segment};

use super::EXACT;
use super::harness::{Random, Source, Tree, close, f64s, is_vjp, run, segments};
use super::reference;

fn spec(n_k: usize, n_v: usize, size: usize) -> DeltaSpec {
    DeltaSpec { n_k, n_v, size, eps: 1e-6, grouped: false }
}

/// qkv, a, b, decay, bias, and the cotangent of the result.
type Values = [Vec<f32>; 6];

/// Values of size 1; `decay` is A of every head.
fn values(spec: DeltaSpec, t: usize, decay: f32) -> Values {
    let mut random = Random::new((t * spec.width()) as u64);
    let mut normal = |n: usize| random.normal(n);
    let n_v = spec.n_v;
    let qkv = normal(spec.width() * t);
    let (a, b) = (normal(n_v * t), normal(n_v * t));
    [qkv, a, b, vec![decay; n_v], normal(n_v), normal(spec.out_width() * t)]
}

/// The result, and the cotangents of qkv, a and b.
fn computed(
    values: &Values,
    segments: &[Segment],
    spec: DeltaSpec,
    threads: usize,
) -> [Vec<f32>; 4] {
    let t = segments.last().unwrap().end as usize;
    let n_v = spec.n_v;
    let shapes = [[spec.width(), t], [n_v, t], [n_v, t], [n_v, 1], [n_v, 1], [spec.out_width(), t]];
    let sources: Vec<Source> =
        values.iter().zip(shapes).map(|(x, shape)| Source::f32(x, &shape)).collect();
    run(threads, &sources, |arena, s| {
        let inputs = DeltaInputs { qkv: s[0], alpha: s[1], beta: s[2], decay: s[3], bias: s[4] };
        let (out, saved) = ops::delta(arena, inputs, segments, spec);
        let [d_qkv, d_alpha, d_beta] = ops::delta_back(arena, &saved, s[5]);
        vec![out, d_qkv, d_alpha, d_beta]
    })
    .try_into()
    .unwrap()
}

fn check_values(
    name: &str,
    values: &Values,
    segments: &[Segment],
    spec: DeltaSpec,
    threads: usize,
    tolerance: f64,
) {
    let what = |of: &str| {
        let t = segments.last().unwrap().end;
        let heads = format!("{}:{}x{}", spec.n_k, spec.n_v, spec.size);
        format!("delta {of} {name} T={t} {heads} threads={threads}")
    };
    let [out, d_qkv, d_alpha, d_beta] = computed(values, segments, spec, threads);
    let [qkv, a, b, decay, bias, d] = values;
    let [qkv64, a64, b64, decay, bias] = [qkv, a, b, decay, bias].map(|x| f64s(x));
    let forward = |qkv: &[f64], a: &[f64], b: &[f64]| {
        reference::delta([qkv, a, b, &decay, &bias], segments, spec)
    };
    close(&what("forward"), &out, &forward(&qkv64, &a64, &b64), tolerance);
    is_vjp(&what("d qkv"), |x| forward(x, &a64, &b64), qkv, d, &d_qkv, tolerance);
    is_vjp(&what("d alpha"), |x| forward(&qkv64, x, &b64), a, d, &d_alpha, tolerance);
    is_vjp(&what("d beta"), |x| forward(&qkv64, &a64, x), b, d, &d_beta, tolerance);
}

fn check(trees: &[Tree], spec: DeltaSpec, threads: usize, decay: f32) {
    let segments = segments(trees);
    let values = values(spec, segments.last().unwrap().end as usize, decay);
    let name = format!("decay={decay}");
    check_values(&name, &values, &segments, spec, threads, EXACT);
}

#[test]
fn delta_of_small_trees() {
    let forest: &[Tree] = &[(3, &[1, 2, 4]), (1, &[]), (2, &[3]), (1, &[1])];
    for threads in [1, 2, 5] {
        check(&[(1, &[])], spec(1, 1, 4), threads, -0.5);
        check(&[(1, &[1])], spec(1, 1, 8), threads, -0.5);
        check(forest, spec(1, 1, 4), threads, -0.5);
        check(forest, spec(2, 4, 4), threads, -0.5);
        check(forest, spec(1, 3, 5), threads, -0.5);
        check(forest, spec(3, 3, 8), threads, -0.5);
        check(forest, DeltaSpec { grouped: true, ..spec(2, 6, 4) }, threads, -0.5);
    }
}

#[test]
fn delta_of_every_head_size() {
    for size in [2, 16, 64, 128, 256] {
        check(&[(9, &[5, 1, 8]), (4, &[2, 2])], spec(1, 2, size), 2, -0.5);
    }
    // Of a single number the length is the number itself: without much of eps nothing would be left of its slope.
    let spec = DeltaSpec { eps: 0.5, ..spec(1, 2, 1) };
    check(&[(9, &[5, 1, 8]), (4, &[2, 2])], spec, 2, -0.5);
}

#[test]
fn delta_across_chunks() {
    // Chunks are 64 tokens, their triangular systems have blocks of 16.
    for n in [15, 16, 17, 33, 63, 64, 65, 128, 129] {
        check(&[(n, &[])], spec(1, 2, 8), 2, -0.2);
        check(&[(n, &[n, 3, 70])], spec(1, 1, 8), 1, -0.2);
    }
    for threads in [1, 2, 5] {
        check(&[(140, &[1, 150, 70]), (65, &[130])], spec(2, 4, 16), threads, -0.05);
    }
    check(&[(300, &[])], spec(1, 2, 32), 2, -0.02);
}

/// From states that forget at once to states that never do.
#[test]
fn delta_of_every_decay() {
    for decay in [-1e4, -100.0, -20.0, -5.0, -1.0, -0.1, -0.01, -1e-4, -1e-8] {
        check(&[(70, &[5, 66]), (3, &[1])], spec(1, 2, 8), 2, decay);
    }
}

/// Gates far out on either side: tokens that write nothing, or all; that forget nothing, or all, beside each other.
#[test]
fn delta_of_extreme_gates() {
    let spec = spec(1, 2, 8);
    let segments = segments(&[(70, &[5, 66]), (3, &[1])]);
    let mut values = values(spec, segments.last().unwrap().end as usize, -1.0);
    for gain in [5.0, 30.0] {
        for x in [1, 2] {
            values[x].iter_mut().for_each(|x| *x *= gain);
        }
        check_values(&format!("gates x{gain}"), &values, &segments, spec, 2, EXACT);
    }
    // Far beyond what e^x holds: finite, and what is left of the gates' cotangents is next to nothing.
    for x in [1, 2] {
        values[x].iter_mut().for_each(|x| *x *= 1e6);
    }
    let results = computed(&values, &segments, spec, 2);
    assert!(results.iter().flatten().all(|x| x.is_finite()));
}

/// Keys that are all alike make the triangle's entries as large as they get.
#[test]
fn delta_of_equal_keys() {
    let spec = spec(1, 1, 8);
    let segments = segments(&[(70, &[20])]);
    let t = segments.last().unwrap().end as usize;
    let mut values = values(spec, t, -0.01);
    let mut random = Random::new(5);
    for token in values[0].chunks_mut(spec.width()) {
        let (q, rest) = token.split_at_mut(spec.size);
        for (i, (q, k)) in q.iter_mut().zip(rest).enumerate() {
            *q = 1.0 + i as f32;
            *k = 1.0 + i as f32 + 0.01 * random.normal(1)[0];
        }
    }
    check_values("equal keys", &values, &segments, spec, 1, EXACT);
}

/// Rows of zeros, as of a channel that the convolution has silenced.
#[test]
fn delta_of_zero_rows() {
    let spec = spec(1, 2, 8);
    let segments = segments(&[(9, &[4])]);
    let mut values = values(spec, 13, -0.5);
    let width = spec.width();
    values[0][2 * width..][..16].fill(0.0);
    let results = computed(&values, &segments, spec, 1);
    assert!(results.iter().flatten().all(|x| x.is_finite()));
    // Neither read nor written: the values of that token are as good as any others.
    assert!(results[1][2 * width + 16..][..16].iter().all(|&x| x == 0.0));
}

/// Completions on one shared prompt, and each on a copy of its own: equal outputs, and the shared prompt's cotangents
/// are the sum over the copies.
#[test]
fn a_shared_prompt_is_the_sum_of_its_copies() {
    let spec = spec(2, 4, 16);
    for (prompt, completions) in [(5, vec![3, 1, 4]), (130, vec![70, 2, 129]), (64, vec![64, 65])] {
        for threads in [1, 2, 5] {
            let shared = segments(&[(prompt, &completions)]);
            let t = shared.last().unwrap().end as usize;
            let all = values(spec, t, -0.1);
            let results = computed(&all, &shared, spec, threads);
            let alone: Vec<Vec<usize>> = shared[1..]
                .iter()
                .map(|s| (0..prompt).chain(s.begin as usize..s.end as usize).collect())
                .collect();
            let tokens: Vec<usize> = alone.concat();
            let lengths: Vec<Tree> = alone.iter().map(|tokens| (tokens.len(), &[][..])).collect();
            let gather = |x: &[f32]| -> Vec<f32> {
                let width = x.len() / t;
                tokens.iter().flat_map(|&i| x[i * width..][..width].to_vec()).collect()
            };
            let mut d = gather(&all[5]);
            // The prompt's own output counts once: in the first copy.
            for (i, &token) in tokens.iter().enumerate().skip(alone[0].len()) {
                if token < prompt {
                    d[i * spec.out_width()..][..spec.out_width()].fill(0.0);
                }
            }
            let [qkv, a, b, decay, bias, _] = &all;
            let copies = [gather(qkv), gather(a), gather(b), decay.clone(), bias.clone(), d];
            let copies = computed(&copies, &segments(&lengths), spec, threads);
            let what = |of: &str| format!("shared {of} prompt={prompt} threads={threads}");
            close(&what("out"), &copies[0], &f64s(&gather(&results[0])), EXACT);
            for (name, i) in [("d qkv", 1), ("d alpha", 2), ("d beta", 3)] {
                let width = results[i].len() / t;
                let mut sum = vec![0.0; results[i].len()];
                for (copy, &token) in copies[i].chunks(width).zip(&tokens) {
                    for (sum, x) in sum[token * width..].iter_mut().zip(copy) {
                        *sum += *x as f64;
                    }
                }
                close(&what(name), &results[i], &sum, EXACT);
            }
        }
    }
}
