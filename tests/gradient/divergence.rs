//! divergence: two models' distributions, each by its own map, beside the plain f64 reference.

use bupo_gguf::ggml::Type;
use bupo_gguf::ops::{self, Head, LogitMap};

use super::EXACT;
use super::harness::{Low, Random, Source, close, f64s, run};
use super::reference;

const PLAIN: LogitMap = LogitMap { scale: 1.0, softcap: None };

fn check(types: [Type; 2], d: [usize; 2], size: [usize; 2], maps: [LogitMap; 2], threads: usize) {
    check_with(types, d, size, maps, threads, None);
}

/// `rank`: of a low-rank term of q.
fn check_with(
    types: [Type; 2],
    d: [usize; 2],
    [v, t]: [usize; 2],
    maps: [LogitMap; 2],
    threads: usize,
    rank: Option<usize>,
) {
    let what = |of: &str| format!("divergence {of} D={d:?} V={v} T={t} {maps:?} threads={threads}");
    let mut random = Random::new((d[0] * v + t) as u64);
    let e = [0, 1].map(|i| random.weight(types[i], d[i], v));
    let h = d.map(|d| -> Vec<f32> {
        random.normal(d * t).iter().map(|x| 2.0 / (d as f32).sqrt() * x).collect()
    });
    let mut target = random.below(t, v);
    target[0] = v as i32 - 1;
    let low = rank.map(|rank| Low::random(&mut random, [rank, v, t], 0.3));
    let mut sources = vec![
        Source::f32(&h[0], &[d[0], t]),
        e[0].0.clone(),
        Source::f32(&h[1], &[d[1], t]),
        e[1].0.clone(),
        Source::I32(target.clone()),
    ];
    sources.extend(low.iter().flat_map(Low::sources));
    let results = run(threads, &sources, |arena, s| {
        let head = |i: usize| {
            let low = low.as_ref().filter(|_| i == 1).and_then(|low| low.term(&s[5..]));
            Head { low, ..Head::new(s[2 * i], s[2 * i + 1], maps[i]) }
        };
        let all = ops::divergence(arena, head(0), head(1), s[4]);
        let same = ops::divergence(arena, head(1), head(1), s[4]);
        vec![all.kl, all.logprob_p, all.logprob_q, all.agree, same.kl, same.agree]
    });
    let logits = [0, 1].map(|i| match low.as_ref().filter(|_| i == 1) {
        Some(low) => {
            let [h, e] = low.joined(&h[i], &e[i].1, d[i]);
            reference::logits(&h, &e, d[i] + low.rank, maps[i])
        }
        None => reference::logits(&f64s(&h[i]), &e[i].1, d[i], maps[i]),
    });
    let policies: Vec<[reference::Policy; 2]> = (0..t)
        .map(|c| {
            let policy =
                |a: usize, b: usize| reference::policy(&logits[a][c], &logits[b][c], target[c]);
            [policy(0, 1), policy(1, 0)]
        })
        .collect();
    let of =
        |f: &dyn Fn(&[reference::Policy; 2]) -> f64| policies.iter().map(f).collect::<Vec<_>>();
    close(&what("KL"), &results[0], &of(&|p| p[0].kl_to), EXACT);
    close(&what("log p"), &results[1], &of(&|p| p[0].taken), EXACT);
    close(&what("log q"), &results[2], &of(&|p| p[1].taken), EXACT);
    for (c, [p, q]) in policies.iter().enumerate() {
        // Where the two likeliest are nearly equal, f32 may order them otherwise.
        let clear =
            |p: &reference::Policy| p.sorted.len() < 2 || p.sorted[0].1 - p.sorted[1].1 > 1e-5;
        if clear(p) && clear(q) {
            let agree = (p.sorted[0].0 == q.sorted[0].0) as u8 as f32;
            assert_eq!(results[3][c], agree, "{} of token {c}", what("agreement"));
        }
    }
    assert!(results[4].iter().all(|&kl| kl == 0.0), "{}", what("from itself"));
    assert!(results[5].iter().all(|&agree| agree == 1.0), "{}", what("from itself"));
}

#[test]
fn divergence_of_odd_sizes() {
    // A tile is 256 tokens by 256 vocabulary rows.
    for (d, size) in
        [([32, 32], [97, 1]), ([96, 33], [1, 3]), ([8, 40], [1000, 7]), ([16, 8], [513, 300])]
    {
        for threads in [1, 2, 5] {
            check([Type::F32; 2], d, size, [PLAIN; 2], threads);
        }
    }
    check([Type::Q8_0, Type::F16], [64, 24], [700, 9], [PLAIN; 2], 2);
}

#[test]
fn divergence_with_a_low_rank_term() {
    let capped = LogitMap { scale: 0.5, softcap: Some(3.0) };
    for (d, size, rank) in [([32, 32], [97, 1], 1), ([8, 40], [1000, 7], 16)] {
        for maps in [[PLAIN; 2], [PLAIN, capped]] {
            check_with([Type::F32, Type::F16], d, size, maps, 2, Some(rank));
        }
    }
}

#[test]
fn divergence_with_scales_and_softcaps() {
    let capped = |scale, c| LogitMap { scale, softcap: Some(c) };
    for maps in [
        [PLAIN, capped(1.0, 30.0)],
        [capped(3.0, 4.0), PLAIN],
        [capped(1.0, 0.5), capped(0.5, 2.0)],
        [LogitMap { scale: 0.125, softcap: None }, LogitMap { scale: 2.0, softcap: None }],
    ] {
        for threads in [1, 3] {
            check([Type::F32; 2], [16, 40], [700, 9], maps, threads);
        }
    }
}
