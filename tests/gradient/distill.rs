//! distill: a student beside its teacher, every divergence, beside the plain f64 formulas and their differences.

use bupo_gguf::ggml::Type;
use bupo_gguf::ops::{self, DistillSpec, DivergenceKind, Head, LogitMap};

use super::EXACT;
use super::harness::{Random, Source, close, f64s, is_vjp, run};
use super::reference;

const PLAIN: LogitMap = LogitMap { scale: 1.0, softcap: None };
const KINDS: [(DivergenceKind, f32); 5] = [
    (DivergenceKind::Reverse, 0.5),
    (DivergenceKind::Forward, 0.5),
    (DivergenceKind::Jsd, 0.5),
    (DivergenceKind::Jsd, 0.1),
    (DivergenceKind::Jsd, 0.9),
];

/// The divergence of one token's tempered logits from the teacher's.
fn plain(student: &[f64], teacher: &[f64], spec: DistillSpec) -> f64 {
    let log_softmax = |l: &[f64]| -> Vec<f64> {
        let l: Vec<f64> = l.iter().map(|l| l * spec.inv_temperature as f64).collect();
        let max = l.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let lse = max + l.iter().map(|l| (l - max).exp()).sum::<f64>().ln();
        l.iter().map(|l| l - lse).collect()
    };
    let kl =
        |a: &[f64], b: &[f64]| -> f64 { a.iter().zip(b).map(|(a, b)| a.exp() * (a - b)).sum() };
    let (p, q) = (log_softmax(student), log_softmax(teacher));
    match spec.kind {
        DivergenceKind::Reverse => kl(&p, &q),
        DivergenceKind::Forward => kl(&q, &p),
        DivergenceKind::Jsd => {
            let beta = spec.beta as f64;
            let mixed = |(p, q): (&f64, &f64)| (beta * q.exp() + (1.0 - beta) * p.exp()).ln();
            let m: Vec<f64> = p.iter().zip(&q).map(mixed).collect();
            beta * kl(&q, &m) + (1.0 - beta) * kl(&p, &m)
        }
    }
}

fn check(
    spec: DistillSpec,
    types: [Type; 2],
    d: [usize; 2],
    [v, t]: [usize; 2],
    maps: [LogitMap; 2],
    threads: usize,
) {
    let what = |of: &str| format!("distill {of} {spec:?} D={d:?} V={v} T={t} {maps:?} x{threads}");
    let mut random = Random::new((d[0] * v + t) as u64);
    let e = [0, 1].map(|i| random.weight(types[i], d[i], v));
    let h = d.map(|d| -> Vec<f32> {
        random.normal(d * t).iter().map(|x| 2.0 / (d as f32).sqrt() * x).collect()
    });
    let cotangents = random.normal(t);
    let sources = [
        Source::f32(&h[0], &[d[0], t]),
        e[0].0.clone(),
        Source::f32(&h[1], &[d[1], t]),
        e[1].0.clone(),
        Source::f32(&cotangents, &[t]),
    ];
    let results = run(threads, &sources, |arena, s| {
        let head = |i: usize| Head::new(s[2 * i], s[2 * i + 1], maps[i]);
        let lse = [0, 1]
            .map(|i| ops::linear_logprob(arena, head(i), None, spec.inv_temperature, false).lse);
        let far = ops::distill(arena, head(0), head(1), lse, spec);
        let same = ops::distill(arena, head(0), head(0), [lse[0]; 2], spec);
        let back = ops::scale_rows(arena, far.gradient, s[4]);
        vec![far.divergence, back, same.divergence, same.gradient]
    });
    let logits = |i: usize, h: &[f64]| reference::logits(h, &e[i].1, d[i], maps[i]);
    let teacher = logits(1, &f64s(&h[1]));
    let of = |h: &[f64]| -> Vec<f64> {
        logits(0, h).iter().zip(&teacher).map(|(s, t)| plain(s, t, spec)).collect()
    };
    close(&what("D"), &results[0], &of(&f64s(&h[0])), EXACT);
    is_vjp(&what("vjp"), of, &h[0], &cotangents, &results[1], 10.0 * EXACT);
    let zero = |x: &[f32], bound: f32| x.iter().all(|x| x.abs() <= bound);
    // m of equal distributions is rounded.
    let bound = if spec.kind == DivergenceKind::Jsd { 1e-6 } else { 0.0 };
    assert!(zero(&results[2], bound) && zero(&results[3], bound), "{}", what("from itself"));
}

fn spec((kind, beta): (DivergenceKind, f32), inv_temperature: f32) -> DistillSpec {
    DistillSpec { kind, beta, inv_temperature }
}

#[test]
fn distill_of_odd_sizes() {
    // A tile is 256 tokens by 256 vocabulary rows.
    for kind in KINDS {
        for (d, size) in [([32, 32], [97, 1]), ([96, 33], [1, 3]), ([8, 40], [1000, 7])] {
            for threads in [1, 2, 5] {
                check(spec(kind, 1.0), [Type::F32; 2], d, size, [PLAIN; 2], threads);
            }
        }
        check(spec(kind, 1.0), [Type::F32; 2], [16, 8], [513, 300], [PLAIN; 2], 2);
    }
}

#[test]
fn distill_of_quantised_heads_at_other_temperatures() {
    for kind in KINDS {
        check(spec(kind, 0.5), [Type::Q8_0, Type::F16], [64, 24], [700, 9], [PLAIN; 2], 2);
        check(spec(kind, 1.5), [Type::F16, Type::Q8_0], [24, 32], [300, 5], [PLAIN; 2], 1);
    }
}

#[test]
fn distill_with_scales_and_softcaps() {
    let capped = |scale, c| LogitMap { scale, softcap: Some(c) };
    for kind in KINDS {
        for maps in [
            [PLAIN, capped(1.0, 30.0)],
            [capped(3.0, 4.0), PLAIN],
            [LogitMap { scale: 0.125, softcap: None }, LogitMap { scale: 2.0, softcap: None }],
        ] {
            check(spec(kind, 0.8), [Type::F32; 2], [16, 40], [700, 9], maps, 3);
        }
    }
}
