//! linear, linear_back, outer.

use bupo_gguf::ggml::Type;
use bupo_gguf::ops::{self, LowRank, ProductKernel};

use super::EXACT;
use super::harness::{Random, Source, close, f64s, is_vjp, run, weight_types};
use super::reference;

/// Forward and backward without options.
fn plain(ty: Type, [k, n, t]: [usize; 3], threads: usize) {
    let what = |of: &str| format!("{of} {ty} K={k} N={n} T={t} threads={threads}");
    let mut random = Random::new((k * n + t) as u64);
    let (w, exact) = random.weight(ty, k, n);
    let (x, dy) = (random.normal(k * t), random.normal(n * t));
    let sources = [w, Source::f32(&x, &[k, t]), Source::f32(&dy, &[n, t])];
    let results = run(threads, &sources, |arena, s| {
        vec![
            ops::linear(arena, s[0], s[1], None, None),
            ops::linear_back(arena, s[0], s[2], None, None),
        ]
    });
    let forward = |x: &[f64]| reference::linear(&exact, x, k);
    close(&what("linear"), &results[0], &forward(&f64s(&x)), EXACT);
    is_vjp(&what("linear_back"), forward, &x, &dy, &results[1], EXACT);
}

#[test]
fn linear_of_odd_sizes() {
    for ty in [Type::F32, Type::F16, Type::BF16] {
        for threads in [1, 2, 5] {
            for k in [1, 32, 96, 256, 1000] {
                plain(ty, [k, 33, 1], threads);
                plain(ty, [k, 33, 7], threads);
            }
            plain(ty, [96, 1, 3], threads);
            plain(ty, [96, 97, 70], threads);
        }
    }
}

#[test]
fn linear_of_every_type() {
    for ty in weight_types() {
        plain(ty, [256, 33, 7], 1);
        plain(ty, [512, 33, 1], 2);
        plain(ty, [768, 5, 3], 5);
    }
    plain(Type::Q8_0, [96, 33, 7], 5);
}

#[test]
fn linear_of_more_than_a_tile() {
    // A tile is 256 rows forward, 2^17 / (K / threads) rows backward.
    for ty in [Type::F32, Type::Q8_0] {
        plain(ty, [1024, 600, 9], 1);
        plain(ty, [1024, 600, 9], 2);
    }
    plain(Type::F16, [32, 5000, 3], 1);
}

#[test]
fn linear_with_every_option() {
    let [k, n, t, r] = [96, 33, 7, 5];
    let scale = 1.7;
    for (low, bias) in [(false, true), (true, false), (true, true)] {
        for threads in [1, 2, 5] {
            let what = format!("linear low={low} bias={bias} threads={threads}");
            let mut random = Random::new(1);
            let (w, exact) = random.weight(Type::Q8_0, k, n);
            let x = random.normal(k * t);
            let (b, u, bias_values) =
                (random.normal(r * n), random.normal(r * t), random.normal(n));
            let sources = [
                w,
                Source::f32(&x, &[k, t]),
                Source::f32(&b, &[r, n]),
                Source::f32(&u, &[r, t]),
                Source::f32(&bias_values, &[n]),
            ];
            let results = run(threads, &sources, |arena, s| {
                let low_rank = LowRank { factor: s[2], input: s[3], scale };
                vec![ops::linear(arena, s[0], s[1], low.then_some(low_rank), bias.then_some(s[4]))]
            });
            let mut want = reference::linear(&exact, &f64s(&x), k);
            let addend = reference::linear(&f64s(&b), &f64s(&u), r);
            for (i, y) in want.iter_mut().enumerate() {
                *y += if low { scale as f64 * addend[i] } else { 0.0 };
                *y += if bias { bias_values[i % n] as f64 } else { 0.0 };
            }
            close(&what, &results[0], &want, EXACT);
        }
    }
}

/// `y = W x + scale B (A x)` as a LoRA layer computes it, with cotangents of x, A and B.
#[test]
fn lora_layer() {
    let scale = 0.6;
    for ([k, n, t, r], ty) in [
        ([96, 33, 7, 5], Type::Q8_0),
        ([32, 97, 1, 1], Type::F16),
        ([256, 17, 70, 16], Type::F32),
        ([256, 300, 3, 8], Type::all().find(|t| t.name() == "q4_K").unwrap()),
    ] {
        for (threads, add) in [(1, false), (2, true), (5, true)] {
            let what = |of: &str| format!("lora {of} {ty} K={k} N={n} T={t} threads={threads}");
            let mut random = Random::new(2);
            let (w, exact) = random.weight(ty, k, n);
            let (x, dy) = (random.normal(k * t), random.normal(n * t));
            let (a, b) = (random.normal(k * r), random.normal(r * n));
            let (added, ga, gb) =
                (random.normal(k * t), random.normal(k * r), random.normal(r * n));
            let sources = [
                w,
                Source::f32(&x, &[k, t]),
                Source::f32(&dy, &[n, t]),
                Source::f32(&a, &[k, r]),
                Source::f32(&b, &[r, n]),
                Source::f32(&added, &[k, t]),
                Source::f32(&ga, &[k, r]),
                Source::f32(&gb, &[r, n]),
            ];
            let results = run(threads, &sources, |arena, s| {
                let [w, x, dy, a, b, added, ga, gb] = s.try_into().unwrap();
                let u = ops::linear(arena, a, x, None, None);
                let low = LowRank { factor: b, input: u, scale };
                let y = ops::linear(arena, w, x, Some(low), None);
                let du = ops::linear_back(arena, b, dy, None, None);
                let low = LowRank { factor: a, input: du, scale };
                let dx = ops::linear_back(arena, w, dy, Some(low), add.then_some(added));
                let ga = ops::outer(arena, ga, x, du, scale);
                let gb = ops::outer(arena, gb, u, dy, scale);
                vec![y, dx, ga, gb]
            });
            let forward = |x: &[f64], a: &[f64], b: &[f64]| {
                let low = reference::linear(b, &reference::linear(a, x, k), r);
                let y = reference::linear(&exact, x, k);
                y.iter().zip(low).map(|(y, l)| y + scale as f64 * l).collect::<Vec<f64>>()
            };
            let less = |sum: &[f32], by: &[f32]| -> Vec<f32> {
                sum.iter().zip(by).map(|(s, b)| s - b).collect()
            };
            let [x64, a64, b64] = [&x, &a, &b].map(|x| f64s(x));
            close(&what("forward"), &results[0], &forward(&x64, &a64, &b64), EXACT);
            let dx = if add { less(&results[1], &added) } else { results[1].clone() };
            is_vjp(&what("dx"), |x| forward(x, &a64, &b64), &x, &dy, &dx, EXACT);
            let (ga, gb) = (less(&results[2], &ga), less(&results[3], &gb));
            is_vjp(&what("dA"), |a| forward(&x64, a, &b64), &a, &dy, &ga, EXACT);
            is_vjp(&what("dB"), |b| forward(&x64, &a64, b), &b, &dy, &gb, EXACT);
        }
    }
}

/// More tokens than anything is tiled by, and either side longer.
#[test]
fn outer_products() {
    for [k, n, t] in [[1, 1, 1], [33, 5, 1], [5, 33, 513], [200, 200, 70], [1000, 8, 600]] {
        for threads in [1, 2, 5] {
            let what = format!("outer K={k} N={n} T={t} threads={threads}");
            let mut random = Random::new(3);
            let (g, x, dy) = (random.normal(k * n), random.normal(k * t), random.normal(n * t));
            let sources =
                [Source::f32(&g, &[k, n]), Source::f32(&x, &[k, t]), Source::f32(&dy, &[n, t])];
            let results =
                run(threads, &sources, |arena, s| vec![ops::outer(arena, s[0], s[1], s[2], -0.3)]);
            let mut want = f64s(&g);
            for (x, dy) in x.chunks(k).zip(dy.chunks(n)) {
                for (g, dy) in want.chunks_mut(k).zip(dy) {
                    for (g, x) in g.iter_mut().zip(x) {
                        *g += -0.3f32 as f64 * *x as f64 * *dy as f64;
                    }
                }
            }
            close(&what, &results[0], &want, EXACT);
        }
    }
}

fn by(kernel: ProductKernel, threads: usize, sources: &[Source]) -> Vec<f32> {
    run(threads, sources, |arena, s| vec![ops::product(arena, s[0], s[1], kernel)]).remove(0)
}

/// Activations in fixed point: off by 1/32766 of the largest of 32, or 64, and what becomes of a column depends on that column
/// alone.
#[test]
fn product_in_fixed_point() {
    let mut served = 0;
    for (i, ty) in weight_types().into_iter().enumerate() {
        for (j, t) in [1, 3, 16, 21, 33, 50, 70, 150].into_iter().enumerate() {
            let [k, n] = [[256, 33], [512, 97], [768, 5], [2560, 12]][(i + j) % 4];
            let what = format!("product {ty} K={k} N={n} T={t} in fixed point");
            let mut random = Random::new((k * n + t) as u64);
            let (w, exact) = random.weight(ty, k, n);
            // Single large ones, as real models have, and a column of zeros.
            let mut x = random.normal(k * t);
            x.iter_mut().skip(7).step_by(101).for_each(|x| *x *= 80.0);
            x[..k].fill(0.0);
            let sources = [w, Source::f32(&x, &[k, t])];
            if !ProductKernel::Fixed.serves(ty) {
                continue;
            }
            served += 1;
            let product = |threads, sources: &[Source]| by(ProductKernel::Fixed, threads, sources);
            let results = [1, 2, 5].map(|threads| product(threads, &sources));
            let want = reference::linear(&exact, &f64s(&x), k);
            let rows = exact.chunks(k);
            for (column, (y, want)) in results[0].chunks(n).zip(want.chunks(n)).enumerate() {
                let x = &x[column * k..][..k];
                for (row, (w, (y, want))) in rows.clone().zip(y.iter().zip(want)).enumerate() {
                    // Each activation is off by half a step, at most.
                    let share = if matches!(ty.name(), "q4_K" | "q5_K") { 64 } else { 32 };
                    let blocks = w.chunks(share).zip(x.chunks(share));
                    let bound: f64 = blocks
                        .map(|(w, x)| {
                            let most = x.iter().fold(0f32, |m, x| m.max(x.abs())) as f64;
                            w.iter().map(|w| w.abs()).sum::<f64>() * most / 32766.0
                        })
                        .sum();
                    let sizes = w.iter().zip(x).map(|(w, x)| (w * *x as f64).abs()).sum::<f64>();
                    let off = (*y as f64 - want).abs();
                    let allowed = 1.01 * bound + 1e-5 * sizes;
                    assert!(
                        off <= allowed,
                        "{what}: row {row}, column {column}: {off} of {allowed}"
                    );
                }
            }
            assert!(results.iter().all(|y| *y == results[0]), "{what}: by threads");
            let [w, _] = sources;
            let last = Source::f32(&x[k * (t - 1)..], &[k, 1]);
            let alone = product(1, &[w, last]);
            assert_eq!(alone, results[0][n * (t - 1)..], "{what}: the last column alone");
        }
    }
    eprintln!("{served} products in fixed point");
}

/// What is no number stays none, and nothing else is touched by it.
#[test]
fn product_of_no_number() {
    let kernels = [ProductKernel::Exact, ProductKernel::Fixed, ProductKernel::Tiles];
    let mut random = Random::new(4);
    let types = weight_types().into_iter().filter(|ty| ty.block_size() > 1);
    for (ty, what) in types.flat_map(|ty| [(ty, f32::NAN), (ty, f32::INFINITY)]) {
        let k = 256;
        let mut x = random.normal(k * 3);
        x[k + 9] = what;
        let (w, _) = Random::new(5).weight(ty, k, 7);
        let sources = [w, Source::f32(&x, &[k, 3])];
        for kernel in kernels.into_iter().filter(|kernel| kernel.serves(ty)) {
            for (column, y) in by(kernel, 1, &sources).chunks(7).enumerate() {
                let right = y.iter().all(|y| y.is_finite() == (column != 1));
                assert!(right, "{ty} {what}, {kernel:?}, {column}: {y:?}");
            }
        }
    }
}

/// The products that decoding takes, and that what becomes of a column depends on that column alone.
#[test]
fn product_of_few_columns() {
    // Of 16 bits of significand: three times 2^-16 of each product at most, and that of sums.
    for (kernel, tolerance) in [(ProductKernel::Exact, EXACT), (ProductKernel::Tiles, 2e-5)] {
        for (i, ty) in weight_types().into_iter().enumerate().filter(|(_, ty)| kernel.serves(*ty)) {
            for (j, t) in [1, 3, 16, 21, 33, 70, 150].into_iter().enumerate() {
                let [k, n] = [[256, 33], [512, 97], [768, 5]][(i + j) % 3];
                let what = format!("{kernel:?} product {ty} K={k} N={n} T={t}");
                let mut random = Random::new((k * n + t) as u64);
                let (w, exact) = random.weight(ty, k, n);
                let x = random.normal(k * t);
                let sources = [w, Source::f32(&x, &[k, t])];
                let results = [1, 2, 5].map(|threads| by(kernel, threads, &sources));
                let want = reference::linear(&exact, &f64s(&x), k);
                close(&what, &results[0], &want, tolerance);
                assert!(results.iter().all(|y| *y == results[0]), "{what}: by threads");
                let [w, _] = sources;
                let last = Source::f32(&x[k * (t - 1)..], &[k, 1]);
                let alone = by(kernel, 1, &[w, last]);
                assert_eq!(alone, results[0][n * (t - 1)..], "{what}: the last column alone");
            }
        }
    }
}
