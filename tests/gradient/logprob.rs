//! linear_logprob, and scale_rows as its vjp.

use bupo_gguf::ggml::Type;
use bupo_gguf::ops::{self, Head, LogitMap};

use super::EXACT;
use super::harness::{Low, Random, Source, close, f64s, is_vjp, join, run, weight_types};
use super::reference;

struct Case {
    what: String,
    h: Vec<f32>,
    unembedding: (Source, Vec<f64>),
    targets: Vec<i32>,
    d: usize,
    map: LogitMap,
    inverse: f32,
    threads: usize,
    low: Option<Low>,
    /// Of log-probs, log-sum-exps, entropies and the vjp.
    tolerance: f64,
}

impl Case {
    /// Random hidden states whose logits are of size 1; the last token's target is the last row.
    fn random(ty: Type, [d, v, t]: [usize; 3], threads: usize) -> Case {
        let mut random = Random::new((d * v + t) as u64);
        let unembedding = random.weight(ty, d, v);
        let size = 1.0 / (d as f32).sqrt();
        let h = random.normal(d * t).iter().map(|x| size * x).collect();
        let mut targets = random.below(t, v);
        targets[t - 1] = v as i32 - 1;
        let what = format!("logprob {ty} D={d} V={v} T={t} threads={threads}");
        let map = LogitMap::default();
        let (inverse, tolerance) = (1.0, EXACT);
        Case { what, h, unembedding, targets, d, map, inverse, threads, low: None, tolerance }
    }

    fn check(&self) {
        let (d, t) = (self.d, self.targets.len());
        let what = |of: &str| format!("{}: {of}", self.what);
        let dy = Random::new(4).normal(t);
        let mut sources = vec![
            Source::f32(&self.h, &[d, t]),
            self.unembedding.0.clone(),
            Source::I32(self.targets.clone()),
            Source::f32(&dy, &[t]),
        ];
        sources.extend(self.low.iter().flat_map(Low::sources));
        let inverse = self.inverse;
        let results = run(self.threads, &sources, |arena, s| {
            let low = self.low.as_ref().and_then(|low| low.term(&s[4..]));
            let head = Head { low, ..Head::new(s[0], s[1], self.map) };
            let full = ops::linear_logprob(arena, head, Some(s[2]), inverse, true);
            let dh = ops::scale_rows(arena, full.gradient.unwrap(), s[3]);
            // Without gradient, and without targets: the same values, and zero.
            let less = ops::linear_logprob(arena, head, Some(s[2]), inverse, false);
            let none = ops::linear_logprob(arena, head, None, inverse, false);
            assert!(less.gradient.is_none() && less.gradient_low.is_none());
            assert_eq!(full.gradient_low.is_some(), low.is_some());
            let du = full.gradient_low.map(|g| ops::scale_rows(arena, g, s[3]));
            let mut all = vec![
                full.logprob,
                full.lse,
                full.entropy,
                dh,
                less.logprob,
                less.lse,
                less.entropy,
                none.logprob,
                none.lse,
                none.entropy,
            ];
            all.extend(du);
            all
        });
        // With the term's input behind the hidden states: their cotangents side by side.
        let (rank, e) = (self.low.as_ref().map_or(0, |low| low.rank), &self.unembedding.1);
        let [h, e] = match &self.low {
            Some(low) => low.joined(&self.h, e, d),
            None => [f64s(&self.h), e.clone()],
        };
        let forward = |h: &[f64]| {
            let logits = reference::logits(h, &e, d + rank, self.map);
            reference::logprob(&logits, &self.targets, inverse as f64)
        };
        let [logprob, lse, entropy] = forward(&h);
        close(&what("log-prob"), &results[0], &logprob, self.tolerance);
        close(&what("log-sum-exp"), &results[1], &lse, self.tolerance);
        close(&what("entropy"), &results[2], &entropy, self.tolerance);
        let dh = results.get(10).map_or(results[3].clone(), |du| join(&results[3], d, du, rank));
        let h: Vec<f32> = h.iter().map(|&h| h as f32).collect();
        is_vjp(&what("dh"), |h| forward(h)[0].clone(), &h, &dy, &dh, self.tolerance);
        assert_eq!(results[..3], results[4..7], "{}", what("without gradient"));
        assert!(results[7].iter().all(|&x| x == 0.0), "{}", what("without targets"));
        assert_eq!(results[1..3], results[8..10], "{}", what("without targets"));
    }
}

#[test]
fn logprob_of_odd_sizes() {
    // A vocabulary tile is 512 rows at D up to 256, 131 at D = 1000; a token tile 512.
    for [d, v, t] in [
        [32, 97, 1],
        [32, 1, 3],
        [96, 3, 2],
        [96, 1000, 7],
        [32, 5000, 5],
        [1000, 400, 3],
        [32, 97, 513],
        [33, 1000, 1030],
        [8, 512, 512],
    ] {
        for threads in [1, 2, 5] {
            Case::random(Type::F32, [d, v, t], threads).check();
        }
    }
    Case::random(Type::F16, [1000, 97, 5], 2).check();
    Case::random(Type::Q8_0, [96, 1000, 520], 5).check();
}

#[test]
fn logprob_of_every_type() {
    for ty in weight_types() {
        Case::random(ty, [256, 97, 5], 2).check();
        Case::random(ty, [512, 600, 3], 1).check();
    }
}

#[test]
fn logprob_with_temperature() {
    for inverse in [0.1, 0.5, 1.0 / 0.7, 3.0] {
        let mut case = Case::random(Type::Q8_0, [64, 1000, 5], 2);
        case.what += &format!(" 1/T={inverse}");
        case.inverse = inverse;
        case.check();
    }
}

/// An adapter's term, with temperature, scale and softcap around it.
#[test]
fn logprob_with_a_low_rank_term() {
    for (ty, [d, v, t], rank, threads) in [
        (Type::F32, [32, 97, 3], 1, 1),
        (Type::Q8_0, [96, 1000, 7], 5, 2),
        (Type::F32, [1000, 400, 3], 16, 5),
        (Type::F16, [32, 97, 513], 3, 2),
    ] {
        for (map, inverse) in [
            (LogitMap::default(), 1.0),
            (LogitMap { scale: 0.5, softcap: None }, 1.0 / 0.7),
            (LogitMap { scale: 1.0, softcap: Some(3.0) }, 1.3),
        ] {
            let mut case = Case::random(ty, [d, v, t], threads);
            case.low = Some(Low::random(&mut Random::new(6), [rank, v, t], 0.4));
            case.what += &format!(" rank={rank} {map:?} 1/T={inverse}");
            (case.map, case.inverse) = (map, inverse);
            case.check();
        }
    }
}

/// The size of the products beside the cap, from far below it to far beyond.
#[test]
fn logprob_with_scale_and_softcap() {
    for (scale, softcap, inverse) in [
        (0.125, None, 1.0),
        (1.0, Some(30.0), 1.0),
        (1.0, Some(1.0), 1.0),
        (8.0, Some(5.0), 1.0 / 0.7),
        (0.5, Some(0.1), 3.0),
        (100.0, Some(30.0), 0.5),
    ] {
        for ([d, v, t], threads) in [([32, 97, 4], 1), ([64, 1000, 4], 2), ([1000, 400, 3], 5)] {
            let mut case = Case::random(Type::F32, [d, v, t], threads);
            case.what += &format!(" x{scale} softcap={softcap:?} 1/T={inverse}");
            (case.map, case.inverse) = (LogitMap { scale, softcap }, inverse);
            // Products of size 100 are off by as many times 2^-24, which the cap leaves to those below it.
            case.tolerance = EXACT * (scale as f64 / 20.0).max(1.0);
            case.check();
        }
    }
}

/// The target and its rivals at the cap: what is left of the gradient is relative to its own size.
#[test]
fn logprob_of_logits_at_the_cap() {
    let [d, v, t] = [8, 700, 3];
    let mut random = Random::new(15);
    let mut e = random.normal(d * v);
    e.iter_mut().for_each(|x| *x *= 0.01);
    e.iter_mut().step_by(d).for_each(|x| *x = 1.0);
    for size in [100f32, 200.0] {
        let mut h = random.normal(d * t);
        h.iter_mut().step_by(d).for_each(|x| *x = size);
        let sources = [Source::f32(&h, &[d, t]), Source::f32(&e, &[d, v]), Source::I32(vec![5; t])];
        let map = LogitMap { scale: 1.0, softcap: Some(30.0) };
        let results = run(2, &sources, |arena, s| {
            let head = Head::new(s[0], s[1], map);
            let head = ops::linear_logprob(arena, head, Some(s[2]), 1.0, true);
            vec![head.gradient.unwrap()]
        });
        let e64 = f64s(&e);
        for (h, got) in h.chunks(d).zip(results[0].chunks(d)) {
            let z: Vec<f64> =
                e64.chunks(d).map(|e| e.iter().zip(h).map(|(e, &h)| e * h as f64).sum()).collect();
            let p: Vec<f64> = z.iter().map(|z| (30.0 * (z / 30.0).tanh()).exp()).collect();
            let w: Vec<f64> = z.iter().map(|z| (z / 30.0).cosh().powi(-2)).collect();
            let sum: f64 = p.iter().sum();
            let want: Vec<f64> = (0..d)
                .map(|i| {
                    let mean = (0..v).map(|v| p[v] * w[v] * e64[v * d + i]).sum::<f64>() / sum;
                    w[5] * e64[5 * d + i] - mean
                })
                .collect();
            let size = want.iter().map(|x| x * x).sum::<f64>().sqrt();
            let off: f64 = want.iter().zip(got).map(|(w, &g)| (w - g as f64).powi(2)).sum();
            println!("{:.1e} of a gradient of size {size:.1e}", off.sqrt() / size);
            assert!(size < 1e-2 && off.sqrt() < 1e-4 * size, "{got:?} of {want:?}");
        }
    }
}

#[test]
fn logprob_of_equal_logits() {
    for threads in [1, 5] {
        let mut case = Case::random(Type::F32, [16, 1000, 4], threads);
        case.what += " h=0";
        case.h.fill(0.0);
        case.check();
    }
}

/// One logit above all others, in the first, a middle and the last tile of the vocabulary.
#[test]
fn logprob_of_a_dominating_logit() {
    let [d, v, t] = [8, 5000, 6];
    for (gap, dominating) in
        [8f32, 20.0, 40.0, 160.0].into_iter().flat_map(|g| [0, 2600, v - 1].map(|i| (g, i)))
    {
        for threads in [1, 2, 5] {
            let mut random = Random::new(5);
            let (mut e, mut h) = (random.normal(d * v), random.normal(d * t));
            e.iter_mut().for_each(|x| *x *= 0.1);
            e.iter_mut().step_by(d).for_each(|x| *x = -1.0);
            e[dominating * d] = 1.0;
            h.iter_mut().step_by(d).for_each(|x| *x = gap / 2.0);
            let last = v as i32 - 1;
            let targets = vec![dominating as i32, 0, last, 17, 1024, dominating as i32];
            Case {
                what: format!("logprob gap={gap} at {dominating} threads={threads}"),
                h,
                unembedding: (Source::f32(&e, &[d, v]), f64s(&e)),
                targets,
                d,
                map: LogitMap::default(),
                inverse: 1.0,
                threads,
                low: None,
                // Logits of +-gap/2 are off by gap 2^-25 each, and so is what e^l is taken of,
                // relatively; the entropy is such differences times the gap again.
                tolerance: EXACT * (gap as f64 / 20.0).max(1.0),
            }
            .check();
        }
    }
}

/// Entropies far below 1, beside their own size: the bound for them is not softened by a floor.
#[test]
fn entropy_of_peaked_distributions() {
    let [d, v] = [2, 5000];
    for gap in [10f32, 20.0, 30.0, 60.0] {
        for threads in [1, 2, 5] {
            let mut e = vec![0f32; d * v];
            e.iter_mut().step_by(d).for_each(|x| *x = -1.0);
            e[3 * d] = 1.0;
            let sources = [Source::f32(&[gap / 2.0, 0.0], &[d, 1]), Source::f32(&e, &[d, v])];
            let results = run(threads, &sources, |arena, s| {
                let head = Head::new(s[0], s[1], LogitMap::default());
                vec![ops::linear_logprob(arena, head, None, 1.0, false).entropy]
            });
            // With q = e^-gap: log(1 + (V-1) q) + (V-1) q gap / (1 + (V-1) q).
            let rest = (v - 1) as f64 * (-gap as f64).exp();
            let want = rest.ln_1p() + rest * gap as f64 / (1.0 + rest);
            let error = (results[0][0] as f64 - want).abs() / want;
            println!("{error:.1e} entropy gap={gap} threads={threads}");
            // `e^x` is good to 3e-7; the sum keeps 1e-16 beside 1, which is 1e-16 / rest of the rest.
            assert!(error < 1e-6 + 1e-14 / rest, "gap={gap}: {} of {want}", results[0][0]);
        }
    }
}
