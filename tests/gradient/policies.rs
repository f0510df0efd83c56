//! policies: entropies, divergences, ranks and top tokens beside the plain f64 reference.

use bupo_gguf::ggml::Tensor;
use bupo_gguf::ggml::Type;
use bupo_gguf::ops::{self, Answers, Compare, Head, LogitMap};

use super::EXACT;
use super::harness::{Low, Random, Source, close, f64s, run, weight_types};
use super::reference;

struct Case {
    what: String,
    h: Vec<f32>,
    unembedding: (Source, Vec<f64>),
    taken: Vec<i32>,
    d: usize,
    map: LogitMap,
    group: usize,
    top_k: usize,
    low: Option<Low>,
}

impl Case {
    /// Random hidden states whose logits are of size 2.
    fn random(ty: Type, [d, v]: [usize; 2], columns: usize, group: usize, top_k: usize) -> Case {
        let mut random = Random::new((d * v + columns) as u64);
        let unembedding = random.weight(ty, d, v);
        let size = 2.0 / (d as f32).sqrt();
        let h = random.normal(d * columns).iter().map(|x| size * x).collect();
        let mut taken = random.below(columns, v);
        taken[columns - 1] = v as i32 - 1;
        let what = format!("policies {ty} D={d} V={v} C={columns} group={group} top={top_k}");
        Case { what, h, unembedding, taken, d, map: LogitMap::default(), group, top_k, low: None }
    }

    fn head<'a>(&self, s: &[Tensor<'a>]) -> Head<'a> {
        let low = self.low.as_ref().and_then(|low| low.term(&s[3..]));
        Head { low, ..Head::new(s[0], s[1], self.map) }
    }

    fn answers(&self, threads: usize, with_taken: bool) -> Answers {
        let columns = self.taken.len();
        let mut sources = vec![
            Source::f32(&self.h, &[self.d, columns]),
            self.unembedding.0.clone(),
            Source::I32(self.taken.clone()),
        ];
        sources.extend(self.low.iter().flat_map(Low::sources));
        let results = run(threads, &sources, |arena, s| {
            let taken = with_taken.then_some(s[2]);
            let wanted = Compare { taken, group: self.group, top_k: self.top_k };
            vec![ops::policies(arena, self.head(s), wanted).values]
        });
        Answers::new(results.into_iter().next().unwrap(), self.top_k)
    }

    /// Bounds are relative to the size of each figure, with a floor of `floor` nats for divergences.
    fn check(&self, floor: f64) {
        let columns = self.taken.len();
        let ours = self.answers(2, true);
        assert_eq!(ours.len(), columns);
        for threads in [1, 5] {
            assert_eq!(self.answers(threads, true), ours, "{} threads={threads}", self.what);
        }
        let plain = self.answers(2, false);
        let e = &self.unembedding.1;
        let [h, e] = match &self.low {
            Some(low) => low.joined(&self.h, e, self.d),
            None => [f64s(&self.h), e.clone()],
        };
        let width = self.d + self.low.as_ref().map_or(0, |low| low.rank);
        let logits = reference::logits(&h, &e, width, self.map);
        let want: Vec<reference::Policy> = (0..columns)
            .map(|c| {
                let last = c / self.group * self.group + self.group - 1;
                reference::policy(&logits[c], &logits[last], self.taken[c])
            })
            .collect();
        let each = |f: &dyn Fn(usize) -> f32| (0..columns).map(f).collect::<Vec<f32>>();
        let truth = |f: &dyn Fn(&reference::Policy) -> f64| want.iter().map(f).collect::<Vec<_>>();
        let check = |of: &str, got: Vec<f32>, want: Vec<f64>| {
            close(&format!("{}: {of}", self.what), &got, &want, EXACT);
        };
        check("entropy", each(&|c| ours.entropy(c)), truth(&|w| w.entropy));
        check("lse", each(&|c| ours.lse(c)), truth(&|w| w.lse));
        check("taken", each(&|c| ours.taken_logprob(c)), truth(&|w| w.taken));
        for (c, w) in want.iter().enumerate() {
            let what = || format!("{} column {c}", self.what);
            for (got, want) in [(ours.kl_to(c), w.kl_to), (ours.kl_from(c), w.kl_from)] {
                let error = (got as f64 - want).abs() / (want.abs() + floor);
                assert!(error < EXACT, "{}: KL {got} of {want}", what());
            }
            // Where logits are nearly equal, f32 may order them otherwise.
            let near = w.sorted.iter().filter(|(_, p)| (p - w.taken).abs() < 1e-5).count() as u32;
            let rank = ours.taken_rank(c);
            assert!(rank.abs_diff(w.rank) < near, "{}: rank {rank} of {}", what(), w.rank);
            let best = ours.best(c);
            assert!(w.sorted[0].1 - logprob_of(w, best) < 1e-4, "{}: best {best}", what());
            let top: Vec<(i32, f32)> = ours.top(c).collect();
            assert_eq!(top.len(), self.top_k, "{}", what());
            for (i, &(token, logprob)) in top.iter().enumerate() {
                assert!((w.sorted[i].1 - logprob as f64).abs() < 1e-4, "{}: top {i}", what());
                assert!((logprob_of(w, token) - logprob as f64).abs() < 1e-4, "{}", what());
                assert!(top[..i].iter().all(|&(t, _)| t != token), "{}: {token} twice", what());
            }
            if self.top_k > 0 {
                assert_eq!(top[0].0, best, "{}", what());
            }
            assert_eq!(plain.entropy(c), ours.entropy(c), "{}: without taken", what());
            assert_eq!(plain.kl_to(c), ours.kl_to(c), "{}: without taken", what());
            assert_eq!(plain.taken_logprob(c) + plain.lse(c), plain.lse(c), "{}", what());
        }
    }
}

fn logprob_of(w: &reference::Policy, token: i32) -> f64 {
    w.sorted.iter().find(|&&(t, _)| t == token).expect("a token of the vocabulary").1
}

#[test]
fn policies_of_odd_sizes() {
    // A tile is 512 vocabulary rows at D up to 256, 128 at D = 1000, and 512 columns; a pass 2048 columns.
    for ([d, v], columns, group, top_k) in [
        ([32, 97], 1, 1, 3),
        ([32, 1], 3, 3, 1),
        ([96, 3], 2, 2, 3),
        ([96, 1000], 8, 4, 5),
        ([32, 5000], 5, 5, 1),
        ([33, 700], 510, 30, 2),
        ([1000, 400], 6, 1, 0),
        ([8, 513], 2100, 7, 0),
        ([8, 512], 2049, 1, 2),
    ] {
        Case::random(Type::F32, [d, v], columns, group, top_k).check(0.1);
    }
}

#[test]
fn policies_of_every_type() {
    for ty in weight_types() {
        Case::random(ty, [256, 600], 6, 3, 2).check(0.1);
    }
}

#[test]
fn policies_with_scale_and_softcap() {
    for (scale, softcap) in [(0.25, None), (1.0, Some(30.0)), (3.0, Some(4.0)), (1.0, Some(0.5))] {
        let map = LogitMap { scale, softcap };
        for ([d, v], columns, group, top_k) in [
            ([32, 97], 3, 3, 3),
            ([96, 1000], 8, 4, 5),
            ([33, 700], 510, 30, 2),
            ([8, 513], 1, 1, 0),
        ] {
            let mut case = Case::random(Type::F32, [d, v], columns, group, top_k);
            case.what += &format!(" {map:?}");
            case.map = map;
            case.check(0.1);
        }
    }
}

#[test]
fn policies_with_a_low_rank_term() {
    for (ty, [d, v], columns, group, top_k, rank) in [
        (Type::F32, [32, 97], 3, 3, 3, 1),
        (Type::Q8_0, [96, 1000], 8, 4, 5, 5),
        (Type::F32, [33, 700], 510, 30, 2, 16),
    ] {
        for map in [LogitMap::default(), LogitMap { scale: 0.5, softcap: Some(4.0) }] {
            let mut case = Case::random(ty, [d, v], columns, group, top_k);
            case.low = Some(Low::random(&mut Random::new(6), [rank, v, columns], 0.3));
            case.what += &format!(" rank={rank} {map:?}");
            case.map = map;
            case.check(0.1);
        }
    }
}

/// Divergences of policies that differ by a hair: the sums must not lose them beside the entropies.
#[test]
fn close_policies_keep_their_divergence() {
    for distance in [1e-1f32, 1e-2, 1e-3] {
        let mut case = Case::random(Type::F32, [64, 3000], 6, 2, 0);
        let noise = Random::new(9).normal(case.h.len());
        for pair in 0..3 {
            for i in 0..64 {
                let at = pair * 128 + i;
                case.h[at + 64] = case.h[at] * (1.0 + distance * noise[at]);
            }
        }
        case.what += &format!(" distance={distance}");
        // KL goes with the square of the distance, and logits are good to 1e-7 of their size.
        case.check(0.3 * distance as f64);
    }
}

/// One logit above all others, in the first, a middle and the last tile, of either column.
#[test]
fn policies_of_a_dominating_logit() {
    let [d, v] = [8, 5000];
    for gap in [8f32, 40.0, 100.0] {
        for dominating in [0, 2600, v - 1] {
            let mut random = Random::new(5);
            let (mut e, mut h) = (random.normal(d * v), random.normal(d * 4));
            e.iter_mut().for_each(|x| *x *= 0.1);
            e.iter_mut().step_by(d).for_each(|x| *x = -1.0);
            e[dominating * d] = 1.0;
            h.iter_mut().step_by(2 * d).for_each(|x| *x = gap / 2.0);
            Case {
                what: format!("policies gap={gap} at {dominating}"),
                h,
                unembedding: (Source::f32(&e, &[d, v]), f64s(&e)),
                taken: vec![dominating as i32, 0, 17, v as i32 - 1],
                d,
                map: LogitMap::default(),
                group: 2,
                top_k: 2,
                low: None,
            }
            .check(1.0);
        }
    }
}

/// A hidden state that is not a number must not look like an answer.
#[test]
fn nan_surfaces() {
    let mut case = Case::random(Type::F32, [16, 900], 4, 2, 2);
    case.h[3] = f32::NAN;
    let ours = case.answers(2, true);
    assert!(ours.entropy(0).is_nan() && ours.kl_to(0).is_nan() && ours.kl_from(0).is_nan());
    assert!(ours.top(0).all(|(token, p)| token == -1 && p.is_nan()));
    assert!((1..4).all(|c| ours.entropy(c).is_finite()));
    case.h[16] = f32::INFINITY;
    case.h[17] = f32::NAN;
    assert!(case.answers(2, false).kl_to(0).is_nan());
}
