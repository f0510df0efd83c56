//! rms_norm, glu, scale_rows; ggml's rows and rope with their vjps.

use bupo_gguf::ggml::{Rope, Type};
use bupo_gguf::ops::{self, Activation};

use super::harness::{Random, Source, close, f64s, is_vjp, run, weight_types};
use super::reference;
use super::{CANCELLED, EXACT};

const SHAPES: [[usize; 2]; 6] = [[1, 1], [33, 1], [33, 7], [97, 5], [1000, 3], [32, 513]];

#[test]
fn rms_norm() {
    for [n, t] in SHAPES {
        // The small one is of the size of eps, the large one far above.
        for size in [3e-3, 1.0, 1e3] {
            for (threads, add) in [(1, false), (2, true), (5, false)] {
                let what = |of: &str| format!("rms_norm {of} [{n}, {t}] x{size} threads={threads}");
                let mut random = Random::new(7);
                let x: Vec<f32> = random.normal(n * t).iter().map(|x| size * x).collect();
                let (w, mut dy) = (random.normal(n), random.normal(n * t));
                // Cotangents of a size that makes those of x of size 1.
                dy.iter_mut().for_each(|d| *d *= size);
                let added = random.normal(n * t);
                let eps = 1e-5;
                let sources = [
                    Source::f32(&x, &[n, t]),
                    Source::f32(&w, &[n]),
                    Source::f32(&dy, &[n, t]),
                    Source::f32(&added, &[n, t]),
                ];
                let results = run(threads, &sources, |arena, s| {
                    let add = add.then_some(s[3]);
                    vec![
                        ops::rms_norm(arena, s[0], s[1], eps),
                        ops::rms_norm_back(arena, s[0], s[1], s[2], add, eps),
                    ]
                });
                let w = f64s(&w);
                let forward = |x: &[f64]| reference::rms_norm(x, &w, eps as f64);
                close(&what("forward"), &results[0], &forward(&f64s(&x)), EXACT);
                let mut dx = results[1].clone();
                if add {
                    dx.iter_mut().zip(&added).for_each(|(d, a)| *d -= a);
                }
                // The norm of a single element is its sign: two equal terms cancel.
                let tolerance = if n == 1 { CANCELLED } else { EXACT };
                is_vjp(&what("dx"), forward, &x, &dy, &dx, tolerance);
            }
        }
    }
}

const ACTIVATIONS: [Activation; 3] = [Activation::Silu, Activation::Gelu, Activation::Sigmoid];
const GLUS: [Activation; 4] =
    [Activation::Silu, Activation::Gelu, Activation::ClampedSwiglu, Activation::Sigmoid];

#[test]
fn glu() {
    for activation in GLUS {
        for [n, t] in SHAPES {
            for (threads, gain) in [(1, 1.0), (2, 1.0), (5, 1.0), (2, 30.0)] {
                let what = |of: &str| {
                    format!("glu {activation:?} {of} [{n}, {t}] x{gain} threads={threads}")
                };
                let mut random = Random::new(8);
                let gate: Vec<f32> = random.normal(n * t).iter().map(|x| gain * x).collect();
                let (up, dy) = (random.normal(n * t), random.normal(n * t));
                let sources = [&gate, &up, &dy].map(|x| Source::f32(x, &[n, t]));
                let results = run(threads, &sources, |arena, s| {
                    let (dg, du) = ops::glu_back(arena, s[0], s[1], s[2], activation);
                    vec![ops::glu(arena, s[0], s[1], activation), dg, du]
                });
                let [g64, u64] = [&gate, &up].map(|x| f64s(x));
                let forward = |g: &[f64], u: &[f64]| reference::glu(g, u, activation);
                close(&what("forward"), &results[0], &forward(&g64, &u64), EXACT);
                is_vjp(&what("dg"), |g| forward(g, &u64), &gate, &dy, &results[1], EXACT);
                is_vjp(&what("du"), |u| forward(&g64, u), &up, &dy, &results[2], EXACT);
            }
        }
    }
}

#[test]
fn glu_of_extreme_gates() {
    let gate = [
        -1e30f32, -1e4, -200.0, -89.0, -87.0, -11.0, -9.9, -1e-30, 0.0, 1e-30, 9.9, 11.0, 87.0,
        89.0, 200.0, 1e4, 1e30,
    ];
    let n = gate.len();
    let ones = vec![1f32; n];
    let sources = [&gate[..], &ones, &ones].map(|x| Source::f32(x, &[n, 1]));
    for activation in ACTIVATIONS {
        let results = run(1, &sources, |arena, s| {
            let (dg, du) = ops::glu_back(arena, s[0], s[1], s[2], activation);
            vec![ops::glu(arena, s[0], s[1], activation), dg, du]
        });
        for (i, &g) in gate.iter().enumerate() {
            // act(g) = g sigmoid(w), and what the slope adds to sigmoid(w); or sigmoid(w) itself.
            let g64 = g as f64;
            let (w, slope) = match activation {
                Activation::Silu | Activation::Sigmoid => (g64, 1.0),
                Activation::Gelu => {
                    let k = (8.0 / std::f64::consts::PI).sqrt();
                    (k * (g64 + 0.044715 * g64.powi(3)), k * (1.0 + 3.0 * 0.044715 * g64.powi(2)))
                }
                Activation::ClampedSwiglu => unreachable!("it bends both factors"),
            };
            let (s, rest) = (1.0 / (1.0 + (-w).exp()), 1.0 / (1.0 + w.exp()));
            // e^x stops at 88.7, so what should be below 1e-38 may be as much times g.
            let near = |a: f32, b: f64| {
                (a as f64 - b).abs() <= 2e-6 * b.abs() + 2e-38 * (g64 * g64).max(1e5)
            };
            let more = if rest > 0.0 { g64 * slope * s * rest } else { 0.0 };
            let (value, want) = match activation {
                Activation::Sigmoid => (s, s * rest),
                _ => (g64 * s, s + more),
            };
            assert!(near(results[0][i], value), "{activation:?}({g}) = {}", results[0][i]);
            assert!(near(results[1][i], want), "{activation:?}'({g}) = {}", results[1][i]);
            assert_eq!(results[2][i], results[0][i], "du of {g}");
        }
    }
}

#[test]
fn scale_rows() {
    for [n, t] in SHAPES {
        for threads in [1, 2, 5] {
            let mut random = Random::new(9);
            let (x, factors) = (random.normal(n * t), random.normal(t));
            let sources = [Source::f32(&x, &[n, t]), Source::f32(&factors, &[t])];
            let results =
                run(threads, &sources, |arena, s| vec![ops::scale_rows(arena, s[0], s[1])]);
            let want: Vec<f32> =
                x.chunks(n).zip(&factors).flat_map(|(x, f)| x.iter().map(move |x| f * x)).collect();
            assert_eq!(results[0], want, "scale_rows [{n}, {t}] threads={threads}");
        }
    }
}

#[test]
fn rows_of_every_type() {
    let [d, v] = [256, 19];
    for ty in weight_types() {
        for (threads, ids) in [(1, vec![18]), (2, vec![3, 0, 18, 3, 3]), (5, vec![7; 40])] {
            let (table, exact) = Random::new(10).weight(ty, d, v);
            let sources = [table, Source::I32(ids.clone())];
            let results = run(threads, &sources, |arena, s| vec![arena.rows(s[0], s[1])]);
            let want: Vec<f64> =
                ids.iter().flat_map(|&i| exact[i as usize * d..][..d].to_vec()).collect();
            close(&format!("rows {ty}"), &results[0], &want, 1e-7);
        }
    }
}

#[test]
fn rows_back() {
    for ([d, v], ids) in [
        ([33, 19], vec![18]),
        ([7, 19], vec![3, 0, 18, 3, 3]),
        ([1, 2], vec![1; 40]),
        ([5, 100], (0..100).rev().collect()),
    ] {
        for threads in [1, 2, 5] {
            let mut random = Random::new(11);
            let (table, dy) = (random.normal(d * v), random.normal(d * ids.len()));
            let sources = [Source::f32(&dy, &[d, ids.len()]), Source::I32(ids.clone())];
            let results = run(threads, &sources, |arena, s| vec![arena.rows_back(s[0], s[1], v)]);
            let forward = |table: &[f64]| -> Vec<f64> {
                ids.iter().flat_map(|&i| table[i as usize * d..][..d].to_vec()).collect()
            };
            let what = format!("rows_back [{d}, {v}] of {} threads={threads}", ids.len());
            is_vjp(&what, forward, &table, &dy, &results[0], EXACT);
        }
    }
}

#[test]
fn rope() {
    let plain = Rope {
        n_rot: 16,
        neox: true,
        n_ctx_orig: 4096,
        freq_base: 1e4,
        freq_scale: 1.0,
        ext_factor: 0.0,
        attn_factor: 1.0,
        beta_fast: 32.0,
        beta_slow: 1.0,
    };
    let yarn = Rope { freq_scale: 0.25, ext_factor: 1.0, n_ctx_orig: 64, ..plain };
    for (rope, with_factors) in [
        (plain, false),
        (Rope { neox: false, ..plain }, false),
        (Rope { neox: false, n_rot: 8, ..plain }, true),
        (Rope { n_rot: 8, freq_base: 1e6, freq_scale: 0.5, attn_factor: 1.2, ..plain }, true),
        (yarn, false),
        (Rope { neox: false, ..yarn }, false),
    ] {
        for (t, threads, far) in [(1, 1, 1), (5, 2, 7), (70, 5, 1), (5, 2, 5000)] {
            let [size, heads] = [16, 3];
            let what = |of: &str| format!("rope {of} T={t} far={far} {rope:?}");
            let mut random = Random::new(12);
            let n = size * heads * t;
            let (x, dy) = (random.normal(n), random.normal(n));
            let factors: Vec<f32> = (0..8).map(|i| 1.0 + 0.5 * i as f32).collect();
            let positions: Vec<i32> = (0..t as i32).map(|i| i * far).collect();
            let shape = [size, heads, t];
            let sources = [
                Source::f32(&x, &shape),
                Source::f32(&dy, &shape),
                Source::I32(positions.clone()),
                Source::f32(&factors, &[8]),
            ];
            let results = run(threads, &sources, |arena, s| {
                let factors = with_factors.then_some(s[3]);
                vec![
                    arena.rope(s[0], s[2], factors, &rope),
                    arena.rope_back(s[1], s[2], factors, &rope),
                ]
            });
            let factors = with_factors.then_some(&factors[..]);
            let forward = |x: &[f64]| reference::rope(x, [size, heads], &positions, factors, &rope);
            // ggml multiplies angles up in f32: each is off by some 2^-24 of itself for each pair
            // before it, and a rotation by as much of its norm.
            let angle = *positions.last().unwrap() as f64;
            let tolerance = EXACT.max(8.0 * angle * f32::EPSILON as f64);
            close(&what("forward"), &results[0], &forward(&f64s(&x)), tolerance);
            is_vjp(&what("dx"), forward, &x, &dy, &results[1], tolerance);
            // Backward is the transpose of forward whatever the angles' errors.
            let dot = |a: &[f32], b: &[f32]| -> f64 {
                a.iter().zip(b).map(|(&a, &b)| a as f64 * b as f64).sum()
            };
            let (there, back) = (dot(&results[0], &dy), dot(&x, &results[1]));
            let error = (there - back).abs() / (n as f64).sqrt();
            assert!(error < 1e-6, "{}: {there} {back}", what("transpose"));
        }
    }
}

#[test]
fn types_are_those_of_files() {
    // What the tests of "every type" go through has the usual ones.
    let names: Vec<&str> = weight_types().into_iter().map(Type::name).collect();
    for name in ["f32", "f16", "bf16", "q4_0", "q8_0", "q4_K", "q6_K", "iq2_xxs", "iq4_xs", "mxfp4"]
    {
        assert!(names.contains(&name), "{name} in {names:?}");
    }
}
