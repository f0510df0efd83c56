//! route, route_order, experts in all directions, experts_outer, weights_back, gate_rows.

use bupo_gguf::ggml::Type;
use bupo_gguf::ops::{self, Columns, Gating, LowRank, RouteSpec, Routes};

use super::EXACT;
use super::harness::{Random, Source, close, f64s, is_vjp, run, weight_types};
use super::reference;

/// Experts and tokens, and who chose whom.
struct Case {
    n_expert: usize,
    used: usize,
    tokens: usize,
    // [used, T], ascending in each token.
    chosen: Vec<f32>,
}

impl Case {
    /// By `pick(token)`: its experts.
    fn new(
        n_expert: usize,
        used: usize,
        tokens: usize,
        pick: impl Fn(usize) -> Vec<usize>,
    ) -> Case {
        let chosen = (0..tokens)
            .flat_map(|t| {
                let mut own = pick(t);
                own.sort();
                assert_eq!(own.len(), used);
                own.into_iter().map(|e| e as f32)
            })
            .collect();
        Case { n_expert, used, tokens, chosen }
    }

    /// Experts without a token; all tokens on one expert; all experts for all tokens; one token.
    fn all() -> Vec<Case> {
        vec![
            Case::new(8, 2, 23, |t| vec![t * 7 % 5, 5 + t % 2]),
            Case::new(4, 1, 9, |_| vec![2]),
            Case::new(3, 3, 7, |_| vec![0, 1, 2]),
            Case::new(5, 2, 1, |_| vec![4, 1]),
            Case::new(1, 1, 6, |_| vec![0]),
        ]
    }

    fn slots(&self) -> usize {
        self.used * self.tokens
    }

    fn source(&self) -> Source {
        Source::f32(&self.chosen, &[self.used, self.tokens])
    }

    fn routes<'a>(
        &self,
        arena: &'a bupo_gguf::ggml::Arena,
        chosen: bupo_gguf::ggml::Tensor<'a>,
    ) -> Routes<'a> {
        let order = ops::route_order(arena, chosen, self.n_expert);
        Routes { order, n_expert: self.n_expert, used: self.used, tokens: self.tokens }
    }

    /// The places in [used, T], sorted by expert, then by token.
    fn sorted(&self) -> Vec<usize> {
        let mut places: Vec<usize> = (0..self.slots()).collect();
        places.sort_by_key(|&place| (self.chosen[place] as usize, place));
        places
    }

    /// `[N, S]` sorted: the product of each slot's expert with its column of x.
    fn each(&self, w: &[f64], x: &[f64], [k, n]: [usize; 2], columns: Columns) -> Vec<f64> {
        let column = |p: usize, place: usize| match columns {
            Columns::Tokens => place / self.used,
            Columns::Slots => p,
        };
        let each = |(p, place): (usize, usize)| {
            let e = self.chosen[place] as usize;
            reference::linear(&w[e * k * n..][..k * n], &x[column(p, place) * k..][..k], k)
        };
        self.sorted().into_iter().enumerate().flat_map(each).collect()
    }

    /// `[N, T]` from `[N, S]`: the slots of a token, times their weights.
    fn sum(&self, y: &[f64], weights: &[f64], n: usize) -> Vec<f64> {
        let mut sums = vec![0.0; n * self.tokens];
        for (p, place) in self.sorted().into_iter().enumerate() {
            let to = &mut sums[place / self.used * n..][..n];
            to.iter_mut().zip(&y[p * n..]).for_each(|(to, y)| *to += weights[place] * y);
        }
        sums
    }
}

/// A random stack `[K, N, E]`, and what it dequantises to.
fn stack(random: &mut Random, ty: Type, [k, n, e]: [usize; 3]) -> (Source, Vec<f64>) {
    let (source, exact) = random.weight(ty, k, n * e);
    let Source::Blocks(ty, bytes, _) = source else { unreachable!("weights are blocks") };
    (Source::Blocks(ty, bytes, vec![k, n, e]), exact)
}

/// Each direction without options, and the gradient of the weights.
fn plain(case: &Case, ty: Type, [k, n]: [usize; 2], threads: usize) {
    let (e, s, t) = (case.n_expert, case.slots(), case.tokens);
    let what = |of: &str| format!("{of} {ty} K={k} N={n} E={e} used={} T={t}", case.used);
    let mut random = Random::new((k * n + t) as u64);
    let (w, exact) = stack(&mut random, ty, [k, n, e]);
    let (x, h) = (random.normal(k * t), random.normal(k * s));
    let (dy, dz, weights) = (random.normal(n * s), random.normal(n * t), random.normal(s));
    let sources = [
        w,
        case.source(),
        Source::f32(&x, &[k, t]),
        Source::f32(&h, &[k, s]),
        Source::f32(&dy, &[n, s]),
        Source::f32(&dz, &[n, t]),
        Source::f32(&weights, &[case.used, t]),
    ];
    let results = run(threads, &sources, |arena, source| {
        let &[w, chosen, x, h, dy, dz, weights] = source else { unreachable!("seven sources") };
        let routes = case.routes(arena, chosen);
        let by_slot = ops::slot_weights(arena, weights, &routes);
        let g = ops::experts_back(arena, w, (dz, Columns::Tokens), &routes, None);
        vec![
            ops::experts(arena, w, (x, Columns::Tokens), &routes, None, None),
            ops::experts_back_sum(arena, w, dy, &routes, None, None),
            ops::experts_sum(arena, w, h, by_slot, &routes, None, None),
            ops::scale_rows(arena, g, by_slot),
            ops::weights_back(arena, g, h, None, &routes),
            ops::experts(arena, w, (h, Columns::Slots), &routes, None, None),
        ]
    });
    let each = |x: &[f64]| case.each(&exact, x, [k, n], Columns::Tokens);
    close(&what("experts"), &results[0], &each(&f64s(&x)), EXACT);
    is_vjp(&what("experts_back_sum"), each, &x, &dy, &results[1], EXACT);
    let sum = |h: &[f64], weights: &[f64]| {
        case.sum(&case.each(&exact, h, [k, n], Columns::Slots), weights, n)
    };
    let (h64, weights64) = (f64s(&h), f64s(&weights));
    close(&what("experts_sum"), &results[2], &sum(&h64, &weights64), EXACT);
    is_vjp(&what("experts_back"), |h| sum(h, &weights64), &h, &dz, &results[3], EXACT);
    is_vjp(&what("weights_back"), |w| sum(&h64, w), &weights, &dz, &results[4], EXACT);
    let slots = case.each(&exact, &h64, [k, n], Columns::Slots);
    close(&what("experts of slots"), &results[5], &slots, EXACT);
}

#[test]
fn experts_of_odd_sizes() {
    for case in Case::all() {
        for threads in [1, 2, 5] {
            plain(&case, Type::F32, [40, 33], threads);
            plain(&case, Type::F16, [7, 70], threads);
        }
    }
}

#[test]
fn experts_of_every_type() {
    let case = &Case::all()[0];
    for ty in weight_types() {
        plain(case, ty, [256, 33], 2);
    }
    let mxfp4 = weight_types().into_iter().find(|ty| ty.name() == "mxfp4").unwrap();
    plain(case, mxfp4, [96, 32], 2);
}

#[test]
fn experts_of_more_than_a_tile() {
    // More inputs than one product sums over, more outputs than a tile, more slots than are packed at a time.
    plain(&Case::new(3, 2, 5, |t| vec![t % 2, 2]), Type::Q8_0, [1120, 700], 2);
    plain(&Case::new(2, 1, 300, |_| vec![1]), Type::F32, [96, 40], 2);
}

#[test]
fn experts_with_every_option() {
    let (k, n, r, scale) = (96, 33, 5, 1.7);
    for (case, threads) in Case::all().iter().zip([1, 2, 5].into_iter().cycle()) {
        let (e, s, t) = (case.n_expert, case.slots(), case.tokens);
        let mut random = Random::new(3);
        let (w, exact) = stack(&mut random, Type::Q8_0, [k, n, e]);
        let [a, b, bias] = [k * r * e, r * n * e, n * e].map(|len| random.normal(len));
        let [x, h, dz, weights] = [k * t, k * s, n * t, s].map(|len| random.normal(len));
        let (u, du, dy) = (random.normal(r * s), random.normal(r * s), random.normal(n * s));
        let sources = [
            w,
            case.source(),
            Source::f32(&x, &[k, t]),
            Source::f32(&h, &[k, s]),
            Source::f32(&weights, &[case.used, t]),
            Source::f32(&a, &[k, r, e]),
            Source::f32(&b, &[r, n, e]),
            Source::f32(&bias, &[n, e]),
            Source::f32(&u, &[r, s]),
            Source::f32(&du, &[r, s]),
            Source::f32(&dz, &[n, t]),
            Source::f32(&dy, &[n, s]),
        ];
        let results = run(threads, &sources, |arena, source| {
            let &[w, chosen, x, h, weights, a, b, bias, u, du, dz, dy] = source else {
                unreachable!("twelve sources")
            };
            let routes = case.routes(arena, chosen);
            let by_slot = ops::slot_weights(arena, weights, &routes);
            let up = Some(LowRank { factor: b, input: u, scale });
            let down = Some(LowRank { factor: a, input: du, scale });
            let g = ops::experts_back(arena, w, (dz, Columns::Tokens), &routes, down);
            vec![
                ops::experts(arena, w, (x, Columns::Tokens), &routes, up, Some(bias)),
                ops::experts_sum(arena, w, h, by_slot, &routes, up, Some(bias)),
                g,
                ops::experts_back_sum(arena, w, dy, &routes, down, Some(x)),
                ops::weights_back(arena, g, h, Some((bias, dz)), &routes),
            ]
        });
        let slots = Columns::Slots;
        let term = |factor: &[f32], input: &[f32], n_out: usize, turned: bool| -> Vec<f64> {
            let factor = f64s(factor);
            let factor = if turned { turn(&factor, [n_out, r]) } else { factor };
            let low = case.each(&factor, &f64s(input), [r, n_out], slots);
            low.iter().map(|y| scale as f64 * y).collect()
        };
        let add =
            |a: Vec<f64>, b: &[f64]| -> Vec<f64> { a.iter().zip(b).map(|(a, b)| a + b).collect() };
        let biases: Vec<f64> = case
            .sorted()
            .iter()
            .flat_map(|&place| f64s(&bias[case.chosen[place] as usize * n..][..n]))
            .collect();
        let low = add(term(&b, &u, n, false), &biases);
        let each = add(case.each(&exact, &f64s(&x), [k, n], Columns::Tokens), &low);
        close("experts, all options", &results[0], &each, EXACT);
        let each = add(case.each(&exact, &f64s(&h), [k, n], slots), &low);
        let sum = case.sum(&each, &f64s(&weights), n);
        close("experts_sum, all options", &results[1], &sum, EXACT);
        let turned = turn(&exact, [k, n]);
        let low = term(&a, &du, k, true);
        let g = add(case.each(&turned, &f64s(&dz), [n, k], Columns::Tokens), &low);
        close("experts_back, all options", &results[2], &g, EXACT);
        let each = add(case.each(&turned, &f64s(&dy), [n, k], slots), &low);
        let sum = add(case.sum(&each, &vec![1.0; s], k), &f64s(&x));
        close("experts_back_sum, all options", &results[3], &sum, EXACT);
        let dot = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f64>();
        let mut want = vec![0.0; s];
        for (p, place) in case.sorted().into_iter().enumerate() {
            let dz = f64s(&dz[place / case.used * n..][..n]);
            want[place] =
                dot(&g[p * k..][..k], &f64s(&h[p * k..][..k])) + dot(&biases[p * n..][..n], &dz);
        }
        close("weights_back, all options", &results[4], &want, EXACT);
    }
}

/// Stacked matrices `[k, n, E]` turned around: `[n, k, E]`.
fn turn(w: &[f64], [k, n]: [usize; 2]) -> Vec<f64> {
    w.chunks(k * n)
        .flat_map(|w| (0..k * n).map(|i| w[i % n * k + i / n]).collect::<Vec<_>>())
        .collect()
}

#[test]
fn gradients_of_experts() {
    let scale = 0.7;
    for (case, [k, n]) in Case::all().iter().zip([[40, 3], [3, 70], [33, 33], [8, 90], [1, 5]]) {
        for columns in [Columns::Tokens, Columns::Slots] {
            let (e, s, t) = (case.n_expert, case.slots(), case.tokens);
            let across = if columns == Columns::Tokens { t } else { s };
            let mut random = Random::new(5);
            let [x, dy, before] = [k * across, n * s, k * n * e].map(|len| random.normal(len));
            let [h, dz] = [k * s, n * across].map(|len| random.normal(len));
            let sources = [
                case.source(),
                Source::f32(&x, &[k, across]),
                Source::f32(&dy, &[n, s]),
                Source::f32(&before, &[k, n, e]),
                Source::f32(&h, &[k, s]),
                Source::f32(&dz, &[n, across]),
            ];
            // What is written in place is an input, which the second of two runs would find changed.
            let results = run(2, &sources, |arena, source| {
                let &[chosen, x, dy, before, h, dz] = source else { unreachable!("six sources") };
                let routes = case.routes(arena, chosen);
                let slots = Columns::Slots;
                let zero = || arena.scale(before, 0.0);
                vec![
                    ops::experts_outer(arena, zero(), (x, columns), (dy, slots), &routes, scale),
                    ops::experts_outer(arena, zero(), (h, slots), (dz, columns), &routes, scale),
                ]
            });
            let forward = |x: &[f32], x_of: Columns, d: &[f32], d_of: Columns| {
                let mut want = vec![0.0; k * n * e];
                for (p, place) in case.sorted().into_iter().enumerate() {
                    let at = |of| if of == Columns::Slots { p } else { place / case.used };
                    let (x, d) = (&x[at(x_of) * k..][..k], &d[at(d_of) * n..][..n]);
                    let own = &mut want[case.chosen[place] as usize * k * n..][..k * n];
                    for (i, own) in own.iter_mut().enumerate() {
                        *own += scale as f64 * x[i % k] as f64 * d[i / k] as f64;
                    }
                }
                want
            };
            let want = forward(&x, columns, &dy, Columns::Slots);
            close("experts_outer of x", &results[0], &want, EXACT);
            let want = forward(&h, Columns::Slots, &dz, columns);
            close("experts_outer of h", &results[1], &want, EXACT);
        }
    }
}

fn softmax(z: &[f64]) -> Vec<f64> {
    let max = z.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let e: Vec<f64> = z.iter().map(|z| (z - max).exp()).collect();
    let sum: f64 = e.iter().sum();
    e.iter().map(|e| e / sum).collect()
}

/// Weights and chosen experts of one token.
fn route_token(z: &[f64], spec: &RouteSpec, bias: &[f64]) -> (Vec<f64>, Vec<usize>) {
    let p = match spec.gating {
        Gating::Softmax => softmax(z),
        Gating::Sigmoid => z.iter().map(|z| 1.0 / (1.0 + (-z).exp())).collect(),
        Gating::Chosen => z.to_vec(),
    };
    let mut ranked: Vec<usize> = (0..z.len()).collect();
    ranked.sort_by(|&a, &b| (p[b] + bias[b]).total_cmp(&(p[a] + bias[a])));
    let mut chosen = ranked[..spec.used].to_vec();
    chosen.sort();
    let mut w: Vec<f64> = chosen.iter().map(|&e| p[e]).collect();
    if spec.gating == Gating::Chosen {
        w = softmax(&w);
    }
    if spec.normalise {
        let sum = w.iter().sum::<f64>().max(6.103_515_625e-5);
        w.iter_mut().for_each(|w| *w /= sum);
    }
    (w.iter().map(|w| w * spec.scale as f64).collect(), chosen)
}

#[test]
fn routes_and_their_vjp() {
    for gating in [Gating::Softmax, Gating::Sigmoid, Gating::Chosen] {
        for (n_expert, used, t, normalise, scale, biased) in [
            (8, 2, 13, true, 1.0, false),
            (8, 2, 13, false, 2.5, true),
            (33, 8, 5, true, 0.5, true),
            (4, 4, 3, false, 1.0, false),
            (4, 4, 3, true, 1.0, false),
            (5, 1, 6, false, 1.0, false),
            (1, 1, 2, true, 1.0, false),
        ] {
            let spec = RouteSpec { used, gating, normalise, scale };
            let what = |of: &str| format!("{of} of {n_expert} experts, {spec:?}");
            let mut random = Random::new(used as u64);
            let [z, dw] = [n_expert * t, used * t].map(|len| random.normal(len));
            let bias = random.normal(n_expert);
            let bias = if biased { bias } else { vec![0.0; n_expert] };
            let sources = [
                Source::f32(&z, &[n_expert, t]),
                Source::f32(&bias, &[n_expert]),
                Source::f32(&dw, &[used, t]),
            ];
            let results = run(3, &sources, |arena, s| {
                let (weights, experts) =
                    ops::route(arena, s[0], spec, biased.then_some(s[1]), None);
                vec![weights, experts, ops::route_back(arena, s[0], experts, s[2], spec)]
            });
            let forward = |z: &[f64]| -> Vec<f64> {
                z.chunks(n_expert).flat_map(|z| route_token(z, &spec, &f64s(&bias)).0).collect()
            };
            let chosen: Vec<f64> = f64s(&z)
                .chunks(n_expert)
                .flat_map(|z| route_token(z, &spec, &f64s(&bias)).1)
                .map(|e| e as f64)
                .collect();
            assert_eq!(f64s(&results[1]), chosen, "{}", what("experts"));
            close(&what("weights"), &results[0], &forward(&f64s(&z)), EXACT);
            is_vjp(&what("route_back"), forward, &z, &dw, &results[2], EXACT);
        }
    }
}

/// Where the probabilities of the chosen ones are next to nothing, their sum is a constant.
#[test]
fn a_floor_has_no_gradient() {
    let spec = RouteSpec { used: 1, gating: Gating::Sigmoid, normalise: true, scale: 1.0 };
    let sources = [Source::f32(&[-12.0, -14.0], &[2, 1]), Source::f32(&[1.0], &[1, 1])];
    let results = run(1, &sources, |arena, s| {
        let (weights, experts) = ops::route(arena, s[0], spec, None, None);
        vec![weights, ops::route_back(arena, s[0], experts, s[1], spec)]
    });
    let p = 1.0 / (1.0 + 12f64.exp());
    close("weight", &results[0], &[p / 6.103_515_625e-5], EXACT);
    close("d logits", &results[1], &[p * (1.0 - p) / 6.103_515_625e-5, 0.0], EXACT);
}

#[test]
fn given_experts_are_taken_and_the_lower_of_equals() {
    let spec = RouteSpec { used: 2, gating: Gating::Softmax, normalise: true, scale: 1.0 };
    let z = [0.0, 0.0, 0.0, 0.0, 1.0, 2.0, 3.0, 4.0, 4.0, 3.0, 2.0, 1.0];
    let given = [1.0, 3.0, -1.0, -1.0, 0.0, 2.0];
    let sources = [Source::f32(&z, &[4, 3]), Source::f32(&given, &[2, 3])];
    let results = run(2, &sources, |arena, s| {
        let (weights, experts) = ops::route(arena, s[0], spec, None, Some(s[1]));
        let own = ops::route(arena, s[0], spec, None, None).1;
        vec![weights, experts, own]
    });
    assert_eq!(results[1], [1.0, 3.0, 2.0, 3.0, 0.0, 2.0]);
    assert_eq!(results[2], [0.0, 1.0, 2.0, 3.0, 0.0, 1.0]);
    let share = |a: f64, b: f64| a.exp() / (a.exp() + b.exp());
    let want = [0.5, 0.5, share(3.0, 4.0), share(4.0, 3.0), share(4.0, 2.0), share(2.0, 4.0)];
    close("weights of given experts", &results[0], &want, EXACT);
}

/// Neither the number of threads nor where a token stands changes a bit.
#[test]
fn bits_depend_neither_on_threads_nor_on_order() {
    let (k, n, t) = (96, 200, 60);
    let case = Case::new(6, 2, t, |t| vec![t % 3, 3 + t % 2]);
    let turned = Case::new(6, 2, t, |i| {
        let t = t - 1 - i;
        vec![t % 3, 3 + t % 2]
    });
    let mut random = Random::new(8);
    let (w, _) = stack(&mut random, Type::Q8_0, [k, n, 6]);
    let [x, weights] = [k * t, 2 * t].map(|len| random.normal(len));
    let [d, down] = [n * t, k * n * 6].map(|len| random.normal(len));
    let reverse = |x: &[f32], width: usize| -> Vec<f32> {
        x.chunks(width).rev().flatten().copied().collect()
    };
    let compute = |case: &Case, threads: usize, [x, weights, d]: [&[f32]; 3]| {
        let sources = [
            w.clone(),
            case.source(),
            Source::f32(x, &[k, t]),
            Source::f32(weights, &[2, t]),
            Source::f32(&down, &[n, k, 6]),
            Source::f32(d, &[n, t]),
        ];
        run(threads, &sources, |arena, s| {
            let routes = case.routes(arena, s[1]);
            let h = ops::experts(arena, s[0], (s[2], Columns::Tokens), &routes, None, None);
            let by_slot = ops::slot_weights(arena, s[3], &routes);
            let g = ops::experts_back(arena, s[0], (s[5], Columns::Tokens), &routes, None);
            let back = ops::experts(arena, s[0], (g, Columns::Slots), &routes, None, None);
            vec![
                ops::experts_sum(arena, s[4], h, by_slot, &routes, None, None),
                ops::experts_back_sum(arena, s[0], back, &routes, None, None),
            ]
        })
    };
    let one = compute(&case, 1, [&x, &weights, &d]);
    for threads in [2, 5] {
        assert_eq!(compute(&case, threads, [&x, &weights, &d]), one, "{threads} threads");
    }
    let other = compute(&turned, 2, [&reverse(&x, k), &reverse(&weights, 2), &reverse(&d, n)]);
    for (one, other) in one.iter().zip(&other) {
        assert_eq!(*one, reverse(other, k), "tokens in reverse");
    }
}

/// What lies in an expert that nobody chose is never looked at.
#[test]
fn experts_without_tokens_are_not_read() {
    let (k, n, t) = (40, 70, 9);
    let case = Case::new(4, 2, t, |t| vec![1, 2 + t % 2]);
    let w = Random::new(9).normal(k * n * 4);
    let mut broken = w.clone();
    broken[..k * n].fill(f32::NAN);
    let [x, dy] = [k * t, n * 2 * t].map(|len| Random::new(1).normal(len));
    let compute = |w: &[f32]| {
        let sources = [
            Source::f32(w, &[k, n, 4]),
            case.source(),
            Source::f32(&x, &[k, t]),
            Source::f32(&dy, &[n, 2 * t]),
        ];
        run(2, &sources, |arena, s| {
            let routes = case.routes(arena, s[1]);
            vec![
                ops::experts(arena, s[0], (s[2], Columns::Tokens), &routes, None, None),
                ops::experts_back_sum(arena, s[0], s[3], &routes, None, None),
            ]
        })
    };
    let (sound, got) = (compute(&w), compute(&broken));
    assert!(got.iter().flatten().all(|x| x.is_finite()));
    assert_eq!(sound, got);
}

#[test]
fn gate_rows() {
    for (n, t) in [(33, 7), (1, 5), (256, 3)] {
        let mut random = Random::new(4);
        let (x, gate, dy) = (random.normal(n * t), random.normal(t), random.normal(n * t));
        let sources =
            [Source::f32(&x, &[n, t]), Source::f32(&gate, &[1, t]), Source::f32(&dy, &[n, t])];
        let results = run(2, &sources, |arena, s| {
            let (dx, dg) = ops::gate_rows_back(arena, s[0], s[1], s[2]);
            vec![ops::gate_rows(arena, s[0], s[1]), dx, dg]
        });
        let forward = |x: &[f64], g: &[f64]| -> Vec<f64> {
            x.chunks(n)
                .zip(g)
                .flat_map(|(x, g)| x.iter().map(move |x| x / (1.0 + (-g).exp())))
                .collect()
        };
        let (x64, g64) = (f64s(&x), f64s(&gate));
        close("gate_rows", &results[0], &forward(&x64, &g64), EXACT);
        is_vjp("gate_rows dx", |x| forward(x, &g64), &x, &dy, &results[1], EXACT);
        is_vjp("gate_rows dg", |g| forward(&x64, g), &gate, &dy, &results[2], EXACT);
    }
}
