//! Our CPU ops beside the machine's sgemm rate: `cargo bench --bench ops`.
//!
//! Throughput counts floating-point operations of the products only (2 per multiply-add), so
//! `Gelem/s` reads as GFLOP/s, and an op's share of the sgemm rate is the quotient of two rows.
//! `BUPO_THREADS` sets the threads (default 2).

use std::hint::black_box;
use std::sync::Arc;
use std::time::Duration;

use bupo_gguf::bench::{packed, pairs};
use bupo_gguf::ggml::{Arena, Executor, Graph, Input, Tensor, ThreadPool, Type};
use bupo_gguf::ops::{self, Activation, AttentionSpec, Head, LogitMap, LowRank};
use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use rand::{Rng, RngCore, SeedableRng};

fn threads() -> usize {
    std::env::var("BUPO_THREADS").ok().and_then(|n| n.parse().ok()).unwrap_or(2)
}

fn random(n: usize) -> Vec<f32> {
    let mut rng = rand_chacha::ChaCha8Rng::seed_from_u64(n as u64);
    (0..n).map(|_| rng.random_range(-1.0..1.0)).collect()
}

/// Blocks of a weight `[k, n]` with values of about 1/sqrt(k).
fn weight(ty: Type, [k, n]: [usize; 2]) -> Vec<u8> {
    let size = 1.0 / (k as f32).sqrt();
    if ty == Type::F32 {
        return random(k * n).iter().flat_map(|x| (x * size).to_le_bytes()).collect();
    }
    assert_eq!(ty.name(), "q4_K", "blocks made by hand");
    let mut bytes = vec![0; ty.row_bytes(k).expect("whole blocks") * n];
    rand_chacha::ChaCha8Rng::seed_from_u64(7).fill_bytes(&mut bytes);
    // A block begins with its scale and minimum; the rest, 6-bit scales and 4-bit values, is free.
    for block in bytes.chunks_exact_mut(ty.block_bytes()) {
        block[..2].copy_from_slice(&half::f16::from_f32(size / 256.0).to_le_bytes());
        block[2..4].copy_from_slice(&half::f16::from_f32(size / 32.0).to_le_bytes());
    }
    bytes
}

fn q4_k() -> Type {
    Type::all().find(|ty| ty.name() == "q4_K").expect("ggml has Q4_K")
}

/// Times the graph that `build` makes; its inputs are written once.
fn bench(
    c: &mut Criterion,
    name: &str,
    flop: usize,
    build: impl for<'a> Fn(&'a Arena, &mut Graph<'a>, &mut Inputs<'a>),
) {
    let pool = Arc::new(ThreadPool::new(threads()).expect("threads"));
    let mut executor = Executor::cpu(pool).expect("a CPU");
    let arena = Arena::new(64);
    let mut graph = Graph::new(&arena);
    let mut inputs = Inputs::default();
    build(&arena, &mut graph, &mut inputs);
    let values: Vec<_> = inputs.0.iter().map(|(t, bytes)| (*t, Input::Bytes(bytes))).collect();
    executor.run(&graph, &values).expect("a first run");
    let mut group = c.benchmark_group("ops");
    group.throughput(Throughput::Elements(flop as u64));
    group.bench_function(name, |b| {
        b.iter(|| {
            executor.run(&graph, &[]).expect("a run");
        })
    });
}

/// Input tensors and their bytes.
#[derive(Default)]
struct Inputs<'a>(Vec<(Tensor<'a>, Vec<u8>)>);

impl<'a> Inputs<'a> {
    fn f32(&mut self, arena: &'a Arena, shape: [usize; 2]) -> Tensor<'a> {
        let bytes = random(shape[0] * shape[1]).iter().flat_map(|x| x.to_le_bytes()).collect();
        self.put(arena.input("x", Type::F32, &shape), bytes)
    }

    fn weight(&mut self, arena: &'a Arena, ty: Type, shape: [usize; 2]) -> Tensor<'a> {
        self.put(arena.input("w", ty, &shape), weight(ty, shape))
    }

    fn ids(&mut self, arena: &'a Arena, n: usize, below: usize) -> Tensor<'a> {
        let bytes = (0..n).flat_map(|i| ((i * 7919 % below) as i32).to_le_bytes()).collect();
        self.put(arena.input("ids", Type::I32, &[n]), bytes)
    }

    fn put(&mut self, tensor: Tensor<'a>, bytes: Vec<u8>) -> Tensor<'a> {
        self.0.push((tensor, bytes));
        tensor
    }
}

/// The yardstick: 2048^3 by the same crate, columns shared out over the threads.
fn sgemm(c: &mut Criterion) {
    const N: usize = 2048;
    let (a, b, mut out) = (random(N * N), random(N * N), vec![0f32; N * N]);
    let mut group = c.benchmark_group("ops");
    group.throughput(Throughput::Elements(2 * (N * N * N) as u64));
    group.bench_function("sgemm 2048^3", |bencher| {
        bencher.iter(|| {
            std::thread::scope(|scope| {
                let columns = N.div_ceil(threads());
                for (out, b) in out.chunks_mut(columns * N).zip(b.chunks(columns * N)) {
                    let a = &a;
                    scope.spawn(move || {
                        let n = out.len() / N;
                        let step = N as isize;
                        // SAFETY: column-major matrices [N, N], [N, n] and [N, n] that lie in these slices.
                        unsafe {
                            gemm::gemm(
                                N,
                                n,
                                N,
                                out.as_mut_ptr(),
                                step,
                                1,
                                false,
                                a.as_ptr(),
                                step,
                                1,
                                b.as_ptr(),
                                step,
                                1,
                                0.0,
                                1.0,
                                false,
                                false,
                                false,
                                gemm::Parallelism::None,
                            );
                        }
                    });
                }
            });
            black_box(&mut out);
        })
    });
}

fn linear(c: &mut Criterion) {
    for (ty, [k, n], t) in [
        (q4_k(), [1024, 3072], 512),
        (q4_k(), [3072, 1024], 512),
        (q4_k(), [1024, 1024], 64),
        (Type::F32, [1024, 3072], 512),
        (Type::F32, [128, 384], 3000),
        (Type::F32, [1024, 16], 512),
        (Type::F32, [16, 3072], 512),
        (q4_k(), [1024, 3072], 1),
    ] {
        let flop = 2 * k * n * t;
        bench(c, &format!("linear {ty} {k}x{n} T {t}"), flop, |arena, graph, inputs| {
            let w = inputs.weight(arena, ty, [k, n]);
            let x = inputs.f32(arena, [k, t]);
            graph.output(ops::linear(arena, w, x, None, None));
        });
        bench(c, &format!("linear_back {ty} {k}x{n} T {t}"), flop, |arena, graph, inputs| {
            let w = inputs.weight(arena, ty, [k, n]);
            let dy = inputs.f32(arena, [n, t]);
            graph.output(ops::linear_back(arena, w, dy, None, None));
        });
    }
    let ([k, n], t, r) = ([1024, 3072], 512, 16);
    bench(c, "linear + low rank 16", 2 * t * (k * n + n * r), |arena, graph, inputs| {
        let w = inputs.weight(arena, q4_k(), [k, n]);
        let x = inputs.f32(arena, [k, t]);
        let (factor, input) = (inputs.f32(arena, [r, n]), inputs.f32(arena, [r, t]));
        graph.output(ops::linear(arena, w, x, Some(LowRank { factor, input, scale: 0.5 }), None));
    });
    bench(c, "linear_back + low rank 16", 2 * t * (k * n + k * r), |arena, graph, inputs| {
        let w = inputs.weight(arena, q4_k(), [k, n]);
        let dy = inputs.f32(arena, [n, t]);
        let (factor, input) = (inputs.f32(arena, [k, r]), inputs.f32(arena, [r, t]));
        let low = LowRank { factor, input, scale: 0.5 };
        graph.output(ops::linear_back(arena, w, dy, Some(low), None));
    });
    for [k, n] in [[16, 3072], [1024, 16]] {
        bench(c, &format!("outer {k}x{n} T {t}"), 2 * k * n * t, |arena, graph, inputs| {
            let g = inputs.f32(arena, [k, n]);
            let (x, dy) = (inputs.f32(arena, [k, t]), inputs.f32(arena, [n, t]));
            graph.output(ops::outer(arena, g, x, dy, 1e-6));
        });
    }
}

fn logprob(c: &mut Criterion) {
    for (ty, d, v, t) in [
        (q4_k(), 1024, 32768, 512),
        (Type::F32, 128, 2048, 3000),
        (q4_k(), 1024, 32768, 16),
        (q4_k(), 4096, 8192, 512),
    ] {
        for gradient in [false, true] {
            let products = 1 + gradient as usize;
            let name = format!("logprob {ty} D {d} V {v} T {t} gradient {gradient}");
            bench(c, &name, products * 2 * d * v * t, |arena, graph, inputs| {
                let h = inputs.f32(arena, [d, t]);
                let e_u = inputs.weight(arena, ty, [d, v]);
                let target = inputs.ids(arena, t, v);
                let head = Head::new(h, e_u, LogitMap::default());
                let head = ops::linear_logprob(arena, head, Some(target), 1.0, gradient);
                graph.output(head.logprob);
            });
        }
    }
}

fn attention(c: &mut Criterion) {
    let heads = |n_head, n_head_kv, head_size| AttentionSpec {
        n_head,
        n_head_kv,
        head_size,
        scale: 1.0 / (head_size as f32).sqrt(),
        window: None,
        softcap: None,
    };
    let wide = heads(16, 8, 128);
    let windowed = AttentionSpec { window: Some(256), ..wide };
    let capped = AttentionSpec { softcap: Some(50.0), ..wide };
    for (name, segments, spec) in [
        ("2 x 256, 16/8 heads of 128", packed(2, 256, 0, 0), wide),
        ("2048, 16/8 heads of 128", packed(1, 2048, 0, 0), wide),
        ("2048, 16/8 heads of 128, window 256", packed(1, 2048, 0, 0), windowed),
        ("2048, 16/8 heads of 128, softcap", packed(1, 2048, 0, 0), capped),
        ("256 + 8 x 128, 16/8 heads of 128", packed(1, 256, 8, 128), wide),
        ("16 x (20 + 8 x 10), 4/2 heads of 32", packed(16, 20, 8, 10), heads(4, 2, 32)),
    ] {
        let AttentionSpec { n_head, n_head_kv, head_size, .. } = spec;
        let t = segments.last().expect("segments").end as usize;
        // Two products forward, five backward, over the pairs that see each other.
        let flop = 2 * pairs(&segments, spec.window) * head_size * n_head;
        for backward in [false, true] {
            let name = format!("attention{} {name}", if backward { "+back" } else { "" });
            let products = if backward { 7 } else { 2 };
            bench(c, &name, products * flop, |arena, graph, inputs| {
                let q = inputs.f32(arena, [head_size * n_head, t]);
                let k = inputs.f32(arena, [head_size * n_head_kv, t]);
                let v = inputs.f32(arena, [head_size * n_head_kv, t]);
                let (out, saved) = ops::attention(arena, q, k, v, None, &segments, spec);
                graph.output(out);
                if backward {
                    let d_out = inputs.f32(arena, [head_size * n_head, t]);
                    for d in ops::attention_back(arena, &saved, d_out) {
                        graph.output(d);
                    }
                }
            });
        }
    }
}

fn rows(c: &mut Criterion) {
    let ([d, f], t) = ([1024, 3072], 512);
    for (name, activation) in [("silu", Activation::Silu), ("gelu", Activation::Gelu)] {
        bench(c, &format!("glu {name} 3072 T 512"), f * t, |arena, graph, inputs| {
            let (gate, up) = (inputs.f32(arena, [f, t]), inputs.f32(arena, [f, t]));
            graph.output(ops::glu(arena, gate, up, activation));
        });
        bench(c, &format!("glu_back {name} 3072 T 512"), f * t, |arena, graph, inputs| {
            let (gate, up) = (inputs.f32(arena, [f, t]), inputs.f32(arena, [f, t]));
            let dy = inputs.f32(arena, [f, t]);
            graph.output(ops::glu_back(arena, gate, up, dy, activation).0);
        });
    }
    bench(c, "rms_norm 1024 T 512", d * t, |arena, graph, inputs| {
        let (x, weight) = (inputs.f32(arena, [d, t]), inputs.f32(arena, [d, 1]));
        graph.output(ops::rms_norm(arena, x, weight, 1e-6));
    });
}

criterion_group! {
    name = benches;
    config = Criterion::default()
        .sample_size(10)
        .warm_up_time(Duration::from_millis(300))
        .measurement_time(Duration::from_secs(2));
    targets = sgemm, linear, logprob, attention, rows
}
criterion_main!(benches);
