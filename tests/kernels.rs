//! The GPU's kernels (`ggml-ext/ops/*.cu`) beside the CPU's ops, at odd sizes, through the same graph nodes.
//!
//! Without a GPU they run on the host (`ggml-ext/ops/emulate.h`), with tiles small enough that every loop over
//! tiles has several, whole and partial. `BUPO_TEST_DEVICE=cuda` runs all of this on a GPU instead, as
//! `tools/gpu-check` does. Each op runs twice: precise, with products in F32, and with factors in F16.

#[path = "common/mod.rs"]
mod common;
#[allow(dead_code)]
#[path = "gradient/harness.rs"]
mod harness;

use bupo_gguf::ggml::{Arena, Device, Tensor, Type};
use bupo_gguf::ops::{
    self, Activation, AdamWStep, AttentionSpec, Columns, DeltaInputs, DeltaSpec, Gating, Head,
    LogitMap, LowRank, RouteSpec, Routes,
};
use common::{device, relative_error};
use harness::{Random, Source, run_on, segments, weight_types};

/// Relative error of sums in another order.
const PRECISE: f32 = 1e-5;
/// Relative error of products whose factors are rounded to 11 bits of mantissa.
const ROUNDED: f32 = 2e-3;

const PLAIN: LogitMap = LogitMap { scale: 1.0, softcap: None };

fn capped(scale: f32, softcap: f32) -> LogitMap {
    LogitMap { scale, softcap: Some(softcap) }
}

/// Wants every output on the device under test as on the CPU.
#[track_caller]
fn agree(
    what: &str,
    sources: &[Source],
    build: impl for<'a> Fn(&'a Arena, &[Tensor<'a>]) -> Vec<Tensor<'a>>,
) {
    agree_within(what, sources, build, [PRECISE, ROUNDED]);
}

#[track_caller]
fn agree_within(
    what: &str,
    sources: &[Source],
    build: impl for<'a> Fn(&'a Arena, &[Tensor<'a>]) -> Vec<Tensor<'a>>,
    tolerances: [f32; 2],
) {
    let want = run_on(Device::Cpu, sources, &build);
    for (precise, tolerance) in [true, false].into_iter().zip(tolerances) {
        let got = run_on(device(precise), sources, &build);
        for (i, (got, want)) in got.iter().zip(&want).enumerate() {
            let error = relative_error(got, want);
            println!("{error:.1e} of {tolerance:.0e}  {what}, output {i}, precise {precise}");
            assert!(error <= tolerance, "{what}, output {i}, precise {precise}: {error:e}");
        }
    }
}

#[test]
fn linear_of_every_type() {
    let mut random = Random::new(1);
    let (k, n, t) = (256, 75, 13);
    let lacking: Vec<Type> =
        ["tq1_0", "tq2_0"].iter().map(|n| Type::all().find(|t| t.name() == *n).unwrap()).collect();
    for ty in weight_types() {
        if !device(true).is_host() && lacking.contains(&ty) {
            continue; // ggml-cuda cannot decode with these either
        }
        let (w, _) = random.weight(ty, k, n);
        let (x, dy) = (random.normal(k * t), random.normal(n * t));
        let sources = [w, Source::f32(&x, &[k, t]), Source::f32(&dy, &[n, t])];
        agree(&format!("linear {ty}"), &sources, |arena, s| {
            vec![
                ops::linear(arena, s[0], s[1], None, None),
                ops::linear_back(arena, s[0], s[2], None, None),
            ]
        });
    }
}

#[test]
fn linear_with_low_rank_bias_and_addend() {
    let mut random = Random::new(2);
    for (ty, k, n, t, r) in [
        (Type::Q8_0, 64, 33, 1, 1),
        (Type::Q8_0, 96, 201, 7, 5),
        (Type::F16, 40, 70, 65, 16),
        (Type::BF16, 24, 100, 9, 3),
        (Type::F32, 7, 3, 5, 2),
    ] {
        let (w, _) = random.weight(ty, k, n);
        let mut f32 = |a: usize, b: usize| Source::f32(&random.normal(a * b), &[a, b]);
        let sources = [
            w,
            f32(k, t), // x
            f32(n, t), // dy
            f32(r, n), // B
            f32(k, r), // A
            f32(r, t), // u, du
            f32(n, 1), // bias
        ];
        agree(&format!("linear {ty} {k}x{n}x{t} rank {r}"), &sources, |arena, s| {
            let low = |factor| Some(LowRank { factor, input: s[5], scale: 0.7 });
            vec![
                ops::linear(arena, s[0], s[1], low(s[3]), Some(s[6])),
                ops::linear_back(arena, s[0], s[2], low(s[4]), Some(s[1])),
                // In place: the copy keeps the source as it is.
                ops::outer(arena, arena.add(s[4], s[4]), s[1], s[5], 0.3),
                ops::outer(arena, arena.add(s[3], s[3]), s[5], s[2], -1.5),
            ]
        });
    }
}

#[test]
fn logprob() {
    let mut random = Random::new(3);
    for (ty, d, v, t, gain, map, temperature) in [
        (Type::F32, 40, 301, 61, 0.2, PLAIN, 1.0),
        (Type::Q8_0, 64, 130, 24, 0.2, PLAIN, 0.7),
        (Type::Q8_0, 96, 1000, 25, 1.0, PLAIN, 1.3), // peaked
        (Type::F16, 24, 33, 1, 0.5, PLAIN, 1.0),
        (Type::Q8_0, 64, 300, 50, 1.0, LogitMap { scale: 0.125, softcap: None }, 0.7),
        (Type::F32, 40, 301, 61, 0.5, capped(1.0, 3.0), 0.7),
        (Type::Q8_0, 64, 300, 50, 0.5, capped(2.0, 5.0), 1.3),
        (Type::Q8_0, 96, 1000, 25, 1.0, capped(1.0, 30.0), 1.0),
    ] {
        let (e_u, _) = random.weight(ty, d, v);
        let h: Vec<f32> = random.normal(d * t).iter().map(|x| gain * x).collect();
        let mut target = random.below(t, v);
        target[0] = v as i32 - 1;
        let mut beside = Random::new(18);
        let (b, u) = (beside.normal(5 * v), beside.normal(5 * t));
        let sources = [
            Source::f32(&h, &[d, t]),
            e_u,
            Source::I32(target),
            Source::f32(&b, &[5, v]),
            Source::f32(&u, &[5, t]),
        ];
        let what = format!("logprob {ty} D={d} V={v} T={t} {map:?}");
        let inverse = 1.0 / temperature;
        agree_within(
            &what,
            &sources,
            |arena, s| {
                let head = Head::new(s[0], s[1], map);
                let all = ops::linear_logprob(arena, head, Some(s[2]), inverse, true);
                let plain = ops::linear_logprob(arena, head, None, inverse, false);
                let low = Some(LowRank { factor: s[3], input: s[4], scale: 0.3 });
                let head = Head { low, ..head };
                let with = ops::linear_logprob(arena, head, Some(s[2]), inverse, true);
                let less = ops::linear_logprob(arena, head, None, inverse, false);
                let mut outputs =
                    vec![all.logprob, all.lse, all.entropy, all.gradient.unwrap(), plain.entropy];
                outputs.extend([with.logprob, with.lse, with.entropy, less.entropy]);
                outputs.extend([with.gradient.unwrap(), with.gradient_low.unwrap()]);
                outputs
            },
            // An entropy near 0 is a small difference of large sums.
            [PRECISE, 2.0 * ROUNDED],
        );
    }
}

#[test]
fn policies() {
    let mut random = Random::new(8);
    for (ty, d, v, groups, group, top_k, gain, map) in [
        (Type::F32, 40, 301, 9, 7, 3, 0.2, PLAIN),
        (Type::Q8_0, 64, 130, 50, 1, 0, 0.2, PLAIN),
        (Type::Q8_0, 96, 1000, 2, 30, 5, 1.0, PLAIN), // peaked; a group larger than a tile of columns
        (Type::F16, 24, 33, 1, 2, 33, 0.5, PLAIN),
        (Type::Q8_0, 64, 130, 20, 3, 2, 0.2, LogitMap { scale: 0.25, softcap: None }),
        (Type::F32, 40, 301, 9, 7, 3, 0.2, capped(1.5, 4.0)),
    ] {
        let (e_u, _) = random.weight(ty, d, v);
        let n = groups * group;
        let h: Vec<f32> = random.normal(d * n).iter().map(|x| gain * x).collect();
        let mut taken = random.below(n, v);
        taken[0] = v as i32 - 1;
        let mut beside = Random::new(18);
        let (b, u) = (beside.normal(3 * v), beside.normal(3 * n));
        let sources = [
            Source::f32(&h, &[d, n]),
            e_u,
            Source::I32(taken),
            Source::f32(&b, &[3, v]),
            Source::f32(&u, &[3, n]),
        ];
        let what =
            format!("policies {ty} D={d} V={v} {groups} groups of {group}, top {top_k}, {map:?}");
        for (with_taken, with_low) in [(true, false), (false, false), (true, true), (false, true)] {
            let run = |device| {
                run_on(device, &sources, |arena, s| {
                    let taken = with_taken.then_some(s[2]);
                    let wanted = ops::Compare { taken, group, top_k };
                    let low = with_low.then_some(LowRank { factor: s[3], input: s[4], scale: 0.3 });
                    let head = Head { low, ..Head::new(s[0], s[1], map) };
                    vec![ops::policies(arena, head, wanted).values]
                })
            };
            let want = run(Device::Cpu);
            // Products are F32 in either case.
            for precise in [true, false] {
                let got = run(device(precise));
                let width = 7 + 2 * top_k;
                for field in 0..width {
                    let of = |all: &[f32]| {
                        all.iter().skip(field).step_by(width).copied().collect::<Vec<_>>()
                    };
                    let (got, want) = (of(&got[0]), of(&want[0]));
                    // The likeliest token, the taken one's rank, the ids of the likeliest.
                    if [2, 4].contains(&field) || (7..7 + top_k).contains(&field) {
                        assert_eq!(got, want, "{what}, field {field}");
                        continue;
                    }
                    let error = relative_error(&got, &want);
                    println!(
                        "{error:.1e} of {PRECISE:.0e}  {what}, field {field}, precise {precise}"
                    );
                    assert!(
                        error <= PRECISE,
                        "{what}, field {field}, precise {precise}: {error:e}"
                    );
                }
            }
        }
    }
}

#[test]
fn policies_that_are_equal_have_no_divergence() {
    let mut random = Random::new(9);
    let (d, v) = (64, 130);
    let (e_u, _) = random.weight(Type::Q8_0, d, v);
    let h = random.normal(d).repeat(4);
    let compare = ops::Compare { taken: None, group: 4, top_k: 2 };
    let sources = [Source::f32(&h, &[d, 4]), e_u];
    let got = run_on(device(false), &sources, |arena, s| {
        vec![ops::policies(arena, Head::new(s[0], s[1], PLAIN), compare).values]
    });
    let answers = ops::Answers::new(got[0].clone(), 2);
    for c in 0..4 {
        assert_eq!((answers.kl_to(c), answers.kl_from(c)), (0.0, 0.0));
        assert_eq!(answers.top(c).next().unwrap().0, answers.best(c));
    }
}

#[test]
fn divergence() {
    let mut random = Random::new(10);
    for (p_ty, q_ty, d_p, d_q, v, t, gain, p_map, q_map) in [
        (Type::F32, Type::Q8_0, 40, 64, 301, 61, 0.2, PLAIN, PLAIN),
        (Type::Q8_0, Type::F16, 96, 24, 1000, 25, 1.0, PLAIN, PLAIN),
        (Type::F16, Type::F16, 24, 24, 33, 1, 0.5, PLAIN, PLAIN),
        (Type::F32, Type::Q8_0, 40, 64, 301, 61, 0.2, capped(1.0, 5.0), PLAIN),
        (Type::F32, Type::Q8_0, 40, 64, 301, 30, 0.2, capped(0.5, 30.0), capped(2.0, 3.0)),
    ] {
        let (e_p, _) = random.weight(p_ty, d_p, v);
        let (e_q, _) = random.weight(q_ty, d_q, v);
        let mut hidden = |d: usize| {
            let h: Vec<f32> = random.normal(d * t).iter().map(|x| gain * x).collect();
            Source::f32(&h, &[d, t])
        };
        let (h_p, h_q) = (hidden(d_p), hidden(d_q));
        let mut target = random.below(t, v);
        target[0] = v as i32 - 1;
        let mut beside = Random::new(18);
        let (b, u) = (beside.normal(4 * v), beside.normal(4 * t));
        let (b, u) = (Source::f32(&b, &[4, v]), Source::f32(&u, &[4, t]));
        let sources = [h_p, e_p, h_q, e_q, Source::I32(target), b, u];
        let what = format!("divergence {p_ty} {q_ty} V={v} T={t} {p_map:?} {q_map:?}");
        agree_within(
            &what,
            &sources,
            |arena, s| {
                let p = Head::new(s[0], s[1], p_map);
                let q = Head::new(s[2], s[3], q_map);
                let d = ops::divergence(arena, p, q, s[4]);
                let same = ops::divergence(arena, p, p, s[4]);
                let low = Some(LowRank { factor: s[5], input: s[6], scale: 0.3 });
                let q = Head { low, ..q };
                let with = ops::divergence(arena, p, q, s[4]);
                let turned = ops::divergence(arena, q, p, s[4]);
                let mut outputs = vec![d.kl, d.logprob_p, d.logprob_q, d.agree, same.kl];
                outputs.extend([with.kl, with.logprob_p, with.logprob_q, with.agree]);
                outputs.extend([turned.kl, turned.logprob_p, turned.agree]);
                outputs
            },
            [PRECISE; 2],
        );
    }
}

#[test]
fn distill() {
    let mut random = Random::new(12);
    let kinds = [
        (ops::DivergenceKind::Reverse, 0.5),
        (ops::DivergenceKind::Forward, 0.5),
        (ops::DivergenceKind::Jsd, 0.3),
    ];
    for (p_ty, q_ty, d_p, d_q, v, t, gain, p_map, q_map) in [
        (Type::F32, Type::Q8_0, 40, 64, 301, 61, 0.2, PLAIN, PLAIN),
        // (Of larger logits the gradient is what is left of terms that cancel.)
        (Type::Q8_0, Type::F16, 96, 24, 1000, 25, 0.2, PLAIN, PLAIN),
        (Type::F16, Type::F16, 24, 24, 33, 1, 0.5, PLAIN, PLAIN),
        (Type::F32, Type::Q8_0, 40, 64, 301, 30, 0.2, capped(0.5, 30.0), capped(2.0, 3.0)),
    ] {
        let (e_p, _) = random.weight(p_ty, d_p, v);
        let (e_q, _) = random.weight(q_ty, d_q, v);
        let mut hidden = |d: usize| {
            let h: Vec<f32> = random.normal(d * t).iter().map(|x| gain * x).collect();
            Source::f32(&h, &[d, t])
        };
        let mut sources = vec![hidden(d_p), e_p, hidden(d_q), e_q];
        // The same log-sum-exps on both devices: where factors are rounded, so are they.
        let lse = run_on(Device::Cpu, &sources, |arena, s| {
            let of = |i: usize, map| {
                ops::linear_logprob(arena, Head::new(s[2 * i], s[2 * i + 1], map), None, 0.8, false)
                    .lse
            };
            vec![of(0, p_map), of(1, q_map)]
        });
        sources.extend(lse.iter().map(|lse| Source::f32(lse, &[t])));
        for (kind, beta) in kinds {
            let what = format!("distill {kind:?} {p_ty} {q_ty} V={v} T={t} {p_map:?} {q_map:?}");
            agree_within(
                &what,
                &sources,
                |arena, s| {
                    let p = Head::new(s[0], s[1], p_map);
                    let q = Head::new(s[2], s[3], q_map);
                    let spec = ops::DistillSpec { kind, beta, inv_temperature: 0.8 };
                    let d = ops::distill(arena, p, q, [s[4], s[5]], spec);
                    vec![d.divergence, d.gradient]
                },
                [PRECISE; 2],
            );
        }
    }
}

#[test]
fn attention() {
    let mut random = Random::new(4);
    for (trees, n_head, n_head_kv, head_size) in [
        (&[(5, &[3, 1][..]), (1, &[][..]), (9, &[40][..])][..], 4, 2, 8),
        (&[(70, &[33, 65][..])][..], 6, 2, 16), // several tiles of queries
        (&[(11, &[1, 1, 7][..])][..], 3, 3, 40),
        (&[(2, &[2][..])][..], 2, 1, 256),
    ] {
        let segments = segments(trees);
        let t = segments.last().unwrap().end as usize;
        let widths = [n_head, n_head_kv, n_head_kv, n_head].map(|n| n * head_size);
        let mut sources =
            widths.map(|width| Source::f32(&random.normal(width * t), &[width, t])).to_vec();
        sources.push(Source::f32(&random.normal(n_head), &[n_head]));
        for (window, softcap, sinks) in [
            (None, None, false),
            (Some(2), None, false),
            (Some(7), None, true),
            (Some(39), Some(2.0), false),
            (Some(1000), None, false),
            (None, Some(0.5), true),
            (None, Some(50.0), false),
        ] {
            let scale = 1.0 / (head_size as f32).sqrt();
            let spec = AttentionSpec { n_head, n_head_kv, head_size, scale, window, softcap };
            agree(&format!("attention T={t} {spec:?} sinks {sinks}"), &sources, |arena, s| {
                let sinks = sinks.then_some(s[4]);
                let (out, saved) = ops::attention(arena, s[0], s[1], s[2], sinks, &segments, spec);
                let [dq, dk, dv] = ops::attention_back(arena, &saved, s[3]);
                vec![out, dq, dk, dv]
            });
        }
    }
}

#[test]
fn conv() {
    let mut random = Random::new(13);
    for (trees, channels, k) in [
        (&[(5, &[3, 1][..]), (1, &[][..]), (1, &[40, 2][..])][..], 3, 4),
        (&[(70, &[33, 65][..])][..], 70, 4),
        (&[(2, &[9, 1][..])][..], 65, 8),
        (&[(9, &[][..])][..], 8, 1),
    ] {
        let segments = segments(trees);
        let t = segments.last().unwrap().end as usize;
        let mut f32 = |a: usize, b: usize| Source::f32(&random.normal(a * b), &[a, b]);
        let sources = [f32(channels, t), f32(k, channels), f32(channels, t)];
        let exact = [PRECISE; 2];
        agree_within(
            &format!("conv T={t} C={channels} K={k}"),
            &sources,
            |arena, s| {
                vec![
                    ops::conv_silu(arena, s[0], s[1], &segments),
                    ops::conv_silu_back(arena, s[0], s[1], s[2], &segments),
                ]
            },
            exact,
        );
    }
}

#[test]
fn delta() {
    let mut random = Random::new(14);
    for (trees, n_k, n_v, size, grouped) in [
        (&[(5, &[3, 1][..]), (1, &[][..]), (9, &[40][..])][..], 2, 4, 8, false),
        (&[(70, &[33, 65][..]), (64, &[1][..])][..], 1, 3, 16, false), // several chunks
        (&[(70, &[33, 65][..]), (64, &[1][..])][..], 2, 6, 16, true),
        (&[(130, &[1, 70][..])][..], 2, 2, 40, false),
        (&[(2, &[2][..])][..], 1, 2, 128, true),
    ] {
        let segments = segments(trees);
        let t = segments.last().unwrap().end as usize;
        let spec = DeltaSpec { n_k, n_v, size, eps: 1e-6, grouped };
        let mut f32 = |a: usize, b: usize| Source::f32(&random.normal(a * b), &[a, b]);
        let mut sources = vec![f32(spec.width(), t), f32(n_v, t), f32(n_v, t)];
        sources.extend([f32(n_v, 1), f32(spec.out_width(), t)]);
        for decay in [-1e-3, -0.3, -30.0] {
            let mut sources = sources.clone();
            sources.push(Source::f32(&vec![decay; n_v], &[n_v, 1]));
            // Products are F32 in either case.
            let exact = [PRECISE; 2];
            agree_within(
                &format!("delta T={t} {spec:?} decay={decay}"),
                &sources,
                |arena, s| {
                    let [qkv, alpha, beta, bias] = [s[0], s[1], s[2], s[3]];
                    let inputs = DeltaInputs { qkv, alpha, beta, decay: s[5], bias };
                    let (out, saved) = ops::delta(arena, inputs, &segments, spec);
                    let [d_qkv, d_alpha, d_beta] = ops::delta_back(arena, &saved, s[4]);
                    vec![out, d_qkv, d_alpha, d_beta]
                },
                exact,
            );
        }
    }
}

#[test]
fn rowwise() {
    let mut random = Random::new(5);
    for (n, t) in [(1, 1), (8, 3), (33, 70), (257, 5), (1000, 2)] {
        let mut f32 = |a: usize, b: usize| Source::f32(&random.normal(a * b), &[a, b]);
        let sources = [f32(n, t), f32(n, t), f32(n, t), f32(n, 1), f32(t, 1)];
        let exact = [PRECISE; 2];
        // The norm of a row of one is its sign: but for eps nothing is left of its gradient, and that is all rounding.
        let eps = if n == 1 { 0.1 } else { 1e-6 };
        agree_within(
            &format!("rows {n}x{t}"),
            &sources,
            |arena, s| {
                let mut all = vec![
                    ops::rms_norm(arena, s[0], s[3], eps),
                    ops::rms_norm_back(arena, s[0], s[3], s[1], None, eps),
                    ops::rms_norm_back(arena, s[0], s[3], s[1], Some(s[2]), eps),
                    ops::scale_rows(arena, s[0], s[4]),
                ];
                for activation in [
                    Activation::Silu,
                    Activation::Gelu,
                    Activation::ClampedSwiglu,
                    Activation::Sigmoid,
                ] {
                    let (d_gate, d_up) = ops::glu_back(arena, s[0], s[1], s[2], activation);
                    all.extend([ops::glu(arena, s[0], s[1], activation), d_gate, d_up]);
                }
                all
            },
            exact,
        );
    }
}

#[test]
fn routes() {
    let mut random = Random::new(21);
    for gating in [Gating::Softmax, Gating::Sigmoid, Gating::Chosen] {
        for (n, used, t, normalise) in [(8, 2, 70, true), (33, 8, 5, false), (4, 4, 3, true)] {
            let spec = RouteSpec { used, gating, normalise, scale: 1.5 };
            let mut given: Vec<f32> = (0..used * t).map(|i| (i % used) as f32).collect();
            given[..used].fill(-1.0);
            let sources = [
                Source::f32(&random.normal(n * t), &[n, t]),
                Source::f32(&random.normal(n), &[n]),
                Source::f32(&given, &[used, t]),
                Source::f32(&random.normal(used * t), &[used, t]),
            ];
            let exact = [PRECISE; 2];
            agree_within(
                &format!("route {n} {spec:?}"),
                &sources,
                |arena, s| {
                    let (weights, experts) = ops::route(arena, s[0], spec, None, None);
                    let (biased, others) = ops::route(arena, s[0], spec, Some(s[1]), Some(s[2]));
                    let order = ops::route_order(arena, experts, n);
                    let routes = Routes { order, n_expert: n, used, tokens: t };
                    let back = ops::route_back(arena, s[0], experts, s[3], spec);
                    let by_slot = ops::slot_weights(arena, weights, &routes);
                    vec![weights, experts, biased, others, order, back, by_slot]
                },
                exact,
            );
        }
    }
}

#[test]
fn experts() {
    let mut random = Random::new(22);
    for (ty, k, n, e, used, t, r) in [
        (Type::Q8_0, 64, 133, 5, 2, 40, 3),
        (Type::F16, 40, 70, 8, 3, 9, 16),
        (Type::F32, 7, 3, 2, 1, 5, 2),
        (Type::Q8_0, 320, 96, 3, 3, 7, 1),
    ] {
        let s = used * t;
        // The last expert has no token where there are enough others.
        let most = (e - 1).max(used);
        let chosen: Vec<f32> = (0..t)
            .flat_map(|t| {
                let mut own: Vec<usize> = (0..used).map(|i| (t + i) % most).collect();
                own.sort();
                own.into_iter().map(|e| e as f32)
            })
            .collect();
        let (w, _) = random.weight(ty, k, n * e);
        let Source::Blocks(_, bytes, _) = w else { unreachable!("weights are blocks") };
        let mut f32 = |shape: &[usize]| Source::f32(&random.normal(shape.iter().product()), shape);
        let sources = [
            Source::Blocks(ty, bytes, vec![k, n, e]),
            Source::f32(&chosen, &[used, t]),
            f32(&[k, t]),    // x by token
            f32(&[k, s]),    // x by slot
            f32(&[n, t]),    // dy by token
            f32(&[n, s]),    // dy by slot
            f32(&[k, r, e]), // A
            f32(&[r, n, e]), // B
            f32(&[r, s]),    // u, du
            f32(&[n, e]),    // bias
            f32(&[used, t]), // weights
        ];
        let what = format!("experts {ty} {k}x{n} E={e} used={used} T={t}");
        agree(&what, &sources, |arena, source| {
            let &[w, chosen, x, h, dz, dy, a, b, u, bias, weights] = source else {
                unreachable!("eleven sources")
            };
            let order = ops::route_order(arena, chosen, e);
            let routes = Routes { order, n_expert: e, used, tokens: t };
            let by_slot = ops::slot_weights(arena, weights, &routes);
            let (tokens, slots) = (Columns::Tokens, Columns::Slots);
            let low = |factor| Some(LowRank { factor, input: u, scale: 0.7 });
            let g = ops::experts_back(arena, w, (dz, tokens), &routes, low(a));
            vec![
                ops::experts(arena, w, (x, tokens), &routes, low(b), Some(bias)),
                ops::experts(arena, w, (h, slots), &routes, None, None),
                ops::experts_sum(arena, w, h, by_slot, &routes, low(b), Some(bias)),
                g,
                ops::experts_back(arena, w, (dy, slots), &routes, None),
                ops::experts_back_sum(arena, w, dy, &routes, low(a), Some(x)),
                ops::weights_back(arena, g, h, Some((bias, dz)), &routes),
                // In place: the copy keeps the source as it is.
                ops::experts_outer(arena, arena.add(a, a), (x, tokens), (u, slots), &routes, 0.3),
                ops::experts_outer(arena, arena.add(b, b), (u, slots), (dz, tokens), &routes, 1.5),
            ]
        });
    }
}

#[test]
fn gates_of_shared_experts() {
    let mut random = Random::new(23);
    for (n, t) in [(70, 9), (300, 2), (1, 5)] {
        let mut f32 = |a: usize, b: usize| Source::f32(&random.normal(a * b), &[a, b]);
        let sources = [f32(n, t), f32(1, t), f32(n, t)];
        let exact = [PRECISE; 2];
        agree_within(
            &format!("gate_rows {n}x{t}"),
            &sources,
            |arena, s| {
                let (dx, dg) = ops::gate_rows_back(arena, s[0], s[1], s[2]);
                vec![ops::gate_rows(arena, s[0], s[1]), dx, dg]
            },
            exact,
        );
    }
}

#[test]
fn rows_back_adds_up_equal_ids() {
    let mut random = Random::new(6);
    let (d, n, rows) = (70, 90, 31);
    let mut ids = random.below(n, rows - 1);
    ids[3] = ids[88];
    let sources = [Source::f32(&random.normal(d * n), &[d, n]), Source::I32(ids)];
    let exact = [PRECISE; 2];
    agree_within("rows_back", &sources, |arena, s| vec![arena.rows_back(s[0], s[1], rows)], exact);
}

#[test]
fn optimiser() {
    let mut random = Random::new(7);
    for n in [1, 4096, 10_000] {
        let mut f32 = || Source::f32(&random.normal(n), &[n]);
        let (p, g, m) = (f32(), f32(), f32());
        let v = Source::f32(&random.normal(n).iter().map(|x| x * x).collect::<Vec<_>>(), &[n]);
        let step = AdamWStep {
            learning_rate: 0.01,
            beta1: 0.9,
            beta2: 0.999,
            eps: 1e-8,
            weight_decay: 0.1,
            clip: 0.5,
            t: 3,
        };
        let exact = [PRECISE; 2];
        agree_within(
            &format!("adamw {n}"),
            &[p, g, m, v],
            |arena, s| {
                // In place: the copies keep the sources as they are, and can be read afterwards.
                let [p, m, v] = [s[0], s[2], s[3]].map(|x| arena.add(x, x));
                let stepped = ops::adamw(arena, p, s[1], m, v, &step);
                vec![ops::sum_squares(arena, s[1]), stepped, m, v]
            },
            exact,
        );
    }
}
