//! Single operations on the model's own weights, each beside the machine's sgemm rate; on a GPU beside the roofline
//! of its measured rates, and beside the CPU's results in F32.

use super::measure::{device_rates, median, median_seconds, timed};
use super::{Bench, Row, mixers, row};
use crate::Result;
use crate::ggml::{Arena, Device, Executor, Graph, Input, Repacked, Tensor, Type};
use crate::model::{Map, Model};
use crate::ops::{
    self, Activation, AdamWStep, AttentionSpec, Head, LogitMap, LowRank, ProductKernel, Segment,
};

/// Names of the cases.
pub(super) const CASES: [&str; 8] =
    ["linear", "ggml", "columns", "head", "attention", "delta", "policies", "rows"];

/// Tokens.
const T: usize = 512;

pub(super) fn run(bench: &Bench<'_>, name: &str) -> Result<Option<Vec<Row>>> {
    let rows = match name {
        "linear" => linear(bench)?,
        "ggml" => ggml(bench)?,
        "columns" => columns(bench)?,
        "head" => head(bench)?,
        "attention" => attention(bench)?,
        "delta" => mixers::delta(bench)?,
        "policies" => policies(bench)?,
        "rows" => rowwise(bench)?,
        _ => return Ok(None),
    };
    Ok(Some(rows))
}

/// A graph's inputs, with values of size 1.
pub(super) struct Inputs<'a> {
    /// A weight of the model.
    w: Tensor<'a>,
    floats: Vec<(Tensor<'a>, Vec<f32>)>,
    ids: Vec<(Tensor<'a>, Vec<i32>)>,
}

impl<'a> Inputs<'a> {
    pub(super) fn f32(&mut self, arena: &'a Arena, shape: [usize; 2]) -> Tensor<'a> {
        let n = shape[0] * shape[1];
        let values = (0..n).map(|i| (i * 2_654_435_761 % 1009) as f32 / 504.5 - 1.0).collect();
        let tensor = arena.input("x", Type::F32, &shape);
        self.floats.push((tensor, values));
        tensor
    }

    fn ids(&mut self, arena: &'a Arena, n: usize, below: usize) -> Tensor<'a> {
        let tensor = arena.input("ids", Type::I32, &[n]);
        self.ids.push((tensor, (0..n).map(|i| (i * 7919 % below) as i32).collect()));
        tensor
    }
}

/// Times the graph that `build` makes, `flop` operations of matrix products; `w` is at hand there.
pub(super) fn time(
    bench: &Bench<'_>,
    name: String,
    flop: f64,
    w: Tensor<'_>,
    build: impl for<'a> Fn(&'a Arena, &mut Graph<'a>, &mut Inputs<'a>),
) -> Result<Row> {
    let device = bench.model.device();
    let mut executor = Executor::new(device, bench.pool.clone())?;
    let mut first = Vec::new();
    let seconds_and_more = with_graph(w, &build, |graph, values| {
        first = executor.run(graph, values)?.outputs();
        let mut again = || executor.run(graph, &[]).map(drop);
        if device == Device::Cpu {
            let timing = timed(bench, flop, again)?;
            let mut figures = vec![("seconds", timing.seconds)];
            if flop > 0.0 {
                figures.extend([
                    ("gflop_per_s", flop / timing.seconds / 1e9),
                    ("sgemm_gflop_per_s", timing.sgemm_flop_per_s / 1e9),
                    ("share_of_sgemm", timing.share()),
                    ("time_over_sgemm", timing.times_sgemm),
                ]);
            }
            return Ok(figures);
        }
        let rates = device_rates(bench)?;
        let seconds = median_seconds(bench.options.reps, &mut again)?;
        let bytes = graph.traffic_bytes() as f64;
        let roofline = (flop / rates.flop_per_s).max(bytes / rates.bytes_per_s);
        Ok(vec![
            ("seconds", seconds),
            ("gflop_per_s", flop / seconds / 1e9),
            ("gbyte_per_s", bytes / seconds / 1e9),
            ("gemm_gflop_per_s", rates.flop_per_s / 1e9),
            ("copy_gbyte_per_s", rates.bytes_per_s / 1e9),
            ("share_of_roofline", roofline / seconds),
        ])
    });
    let mut figures = seconds_and_more?;
    if let Some(truth) = &bench.truth {
        let mut cpu = Executor::cpu(bench.pool.clone())?;
        let mut twins = truth.engine().tensors();
        let twin = twins.find(|t| t.name() == w.name() && t.shape() == w.shape()).unwrap_or(w);
        let want = with_graph(twin, &build, |graph, values| Ok(cpu.run(graph, values)?.outputs()))?;
        let errors = first.iter().zip(&want).map(|(got, want)| relative_error(got, want));
        figures.push(("error", errors.fold(0.0, f64::max)));
    }
    figures.push(("scratch_bytes", executor.scratch_bytes() as f64));
    Ok(row(format!("ops/{name}"), &figures))
}

/// Builds a graph and hands it on with its inputs.
fn with_graph<R>(
    w: Tensor<'_>,
    build: &impl for<'a> Fn(&'a Arena, &mut Graph<'a>, &mut Inputs<'a>),
    work: impl FnOnce(&Graph<'_>, &[(Tensor<'_>, Input<'_>)]) -> Result<R>,
) -> Result<R> {
    let arena = Arena::new(64);
    let mut graph = Graph::new(&arena);
    let mut inputs = Inputs { w, floats: Vec::new(), ids: Vec::new() };
    build(&arena, &mut graph, &mut inputs);
    let mut values: Vec<_> =
        inputs.floats.iter().map(|(t, values)| (*t, Input::F32(values))).collect();
    values.extend(inputs.ids.iter().map(|(t, values)| (*t, Input::I32(values))));
    work(&graph, &values)
}

/// |got - want| / |want|
fn relative_error(got: &[f32], want: &[f32]) -> f64 {
    let square = |x: f64| x * x;
    let off: f64 = got.iter().zip(want).map(|(&a, &b)| square(a as f64 - b as f64)).sum();
    let size: f64 = want.iter().map(|&b| square(b as f64)).sum();
    (off / size.max(1e-60)).sqrt()
}

fn weight<'m>(bench: &Bench<'m>, map: &Map) -> Tensor<'m> {
    bench.model.weights().find(&map.weight()).expect("a map of the model")
}

/// Maps that are no stacks of experts.
fn plain(model: &Model) -> impl DoubleEndedIterator<Item = &Map> {
    model.maps().iter().filter(|map| map.n_expert == 1)
}

/// The last map of layer 1 whose inputs are the residual's width: `ffn_up`, fused or not.
fn ffn_up<'m>(bench: &Bench<'m>) -> Tensor<'m> {
    let d = bench.model.config().n_embd;
    let mut maps = plain(bench.model).filter(|map| map.layer == 1 && map.n_in == d);
    weight(bench, maps.next_back().expect("a layer has maps"))
}

/// The model's linear maps of different sizes or types, forward and backward.
fn linear(bench: &Bench<'_>) -> Result<Vec<Row>> {
    let mut seen = Vec::new();
    let mut rows = Vec::new();
    for map in plain(bench.model) {
        {
            let w = weight(bench, map);
            let [k, n, ..] = w.shape();
            if seen.contains(&(w.ty(), k, n)) {
                continue;
            }
            seen.push((w.ty(), k, n));
            let flop = 2.0 * (k * n * T) as f64;
            let name = format!("{} {k} x {n}", w.ty());
            rows.push(time(bench, format!("linear {name}"), flop, w, |arena, graph, inputs| {
                let x = inputs.f32(arena, [k, T]);
                graph.output(ops::linear(arena, inputs.w, x, None, None));
            })?);
            rows.push(time(
                bench,
                format!("linear_back {name}"),
                flop,
                w,
                |arena, graph, inputs| {
                    let dy = inputs.f32(arena, [n, T]);
                    graph.output(ops::linear_back(arena, inputs.w, dy, None, None));
                },
            )?);
        }
    }
    let (w, r) = (ffn_up(bench), bench.options.rank);
    let [k, n, ..] = w.shape();
    let name = format!("linear {} {k} x {n}, rank {r}", w.ty());
    let flop = 2.0 * (T * (k * n + n * r)) as f64;
    rows.push(time(bench, name, flop, w, |arena, graph, inputs| {
        let x = inputs.f32(arena, [k, T]);
        let (factor, input) = (inputs.f32(arena, [r, n]), inputs.f32(arena, [r, T]));
        let low = LowRank { factor, input, scale: 0.5 };
        graph.output(ops::linear(arena, inputs.w, x, Some(low), None));
    })?);
    for [k, n] in [[r, n], [k, r]] {
        let flop = 2.0 * (k * n * T) as f64;
        rows.push(time(bench, format!("outer {k} x {n}"), flop, w, |arena, graph, inputs| {
            let g = inputs.f32(arena, [k, n]);
            let (x, dy) = (inputs.f32(arena, [k, T]), inputs.f32(arena, [n, T]));
            graph.output(ops::outer(arena, g, x, dy, 1e-6));
        })?);
    }
    Ok(rows)
}

/// What ggml itself does with the FFN's weight: its product (activations rounded to 8 bits where the
/// weight is quantised) on plain blocks and repacked where it can, and its vjp.
fn ggml(bench: &Bench<'_>) -> Result<Vec<Row>> {
    let w = ffn_up(bench);
    let [k, n, ..] = w.shape();
    let flop = 2.0 * (k * n * T) as f64;
    let name = format!("{} {k} x {n}", w.ty());
    let product = |what: &str, w| {
        time(bench, format!("ggml {what} {name}"), flop, w, |arena, graph, inputs| {
            let x = inputs.f32(arena, [k, T]);
            graph.output(arena.mul_mat(inputs.w, x));
        })
    };
    let mut rows = vec![
        product("MUL_MAT", w)?,
        time(bench, format!("ggml OUT_PROD {name}"), flop, w, |arena, graph, inputs| {
            let dy = inputs.f32(arena, [n, T]);
            graph.output(arena.out_prod(inputs.w, dy));
        })?,
    ];
    if bench.model.device() == Device::Cpu
        && let Some(repacked) = Repacked::new(w)?
    {
        rows.push(product("MUL_MAT, repacked,", repacked.tensor())?);
    }
    Ok(rows)
}

/// Outputs at most: a whole unembedding would take minutes.
const COLUMNS_ROWS: usize = 4096;

/// Our products beside ggml's, in turn, from one column to as many as a prompt has: what decides which of them rollouts take.
/// They are the CPU's alone.
fn columns(bench: &Bench<'_>) -> Result<Vec<Row>> {
    if bench.model.device() != Device::Cpu {
        return Ok(Vec::new());
    }
    let mut seen = Vec::new();
    let mut rows = Vec::new();
    let unembedding = bench.model.weights().unembedding();
    let maps = plain(bench.model).map(|map| weight(bench, map));
    for w in maps.chain([unembedding]) {
        let arena = Arena::new(2);
        let rows_of = w.shape()[1].min(COLUMNS_ROWS);
        let w = arena.row_range(w, 0, rows_of);
        let [k, n, ..] = w.shape();
        if seen.contains(&(w.ty(), k, n)) {
            continue;
        }
        seen.push((w.ty(), k, n));
        for t in [1, 2, 4, 8, 16, 32, 64, 128] {
            let ours = |kernel: ProductKernel| {
                seconds(bench, w, |arena, graph, inputs| {
                    let x = inputs.f32(arena, [k, t]);
                    graph.output(ops::product(arena, inputs.w, x, kernel));
                })
            };
            let other = || {
                seconds(bench, w, |arena, graph, inputs| {
                    let x = inputs.f32(arena, [k, t]);
                    graph.output(arena.mul_mat(inputs.w, x));
                })
            };
            let kernels = [
                (ProductKernel::Exact, "exact_seconds"),
                (ProductKernel::Fixed, "fixed_seconds"),
                (ProductKernel::Tiles, "tiles_seconds"),
            ];
            let kernels: Vec<_> =
                kernels.into_iter().filter(|(kernel, _)| kernel.serves(w.ty())).collect();
            let mut owns = vec![Vec::new(); kernels.len()];
            let mut ggml = Vec::new();
            for _ in 0..bench.options.reps.max(3) {
                for (seconds, (kernel, _)) in owns.iter_mut().zip(&kernels) {
                    seconds.push(ours(*kernel)?);
                }
                ggml.push(other()?);
            }
            // Rates and ratios are those of the quickest of ours, side by side.
            let mut quickest = f64::INFINITY;
            let mut ratio = Vec::new();
            let mut figures = Vec::new();
            for ((_, name), seconds) in kernels.iter().zip(&mut owns) {
                let beside: Vec<f64> = ggml.iter().zip(&*seconds).map(|(g, own)| g / own).collect();
                let own = median(seconds);
                figures.push((*name, own));
                if own < quickest {
                    (quickest, ratio) = (own, beside);
                }
            }
            figures.extend([
                ("ggml_seconds", median(&mut ggml)),
                ("gflop_per_s", 2e-9 * (k * n * t) as f64 / quickest),
                ("ggml_over_ours", median(&mut ratio)),
            ]);
            rows.push(row(format!("ops/columns {} {k} x {n}, {t}", w.ty()), &figures));
        }
    }
    Ok(rows)
}

/// Median seconds of a few runs of the graph that `build` makes.
fn seconds(
    bench: &Bench<'_>,
    w: Tensor<'_>,
    build: impl for<'a> Fn(&'a Arena, &mut Graph<'a>, &mut Inputs<'a>),
) -> Result<f64> {
    let mut executor = Executor::new(bench.model.device(), bench.pool.clone())?;
    with_graph(w, &build, |graph, values| {
        executor.run(graph, values)?;
        median_seconds(3, || executor.run(graph, &[]).map(drop))
    })
}

/// The log-prob head over the whole vocabulary and parts of it: its cost is linear in V.
fn head(bench: &Bench<'_>) -> Result<Vec<Row>> {
    let w = bench.model.weights().unembedding();
    let [d, v, ..] = w.shape();
    let mut rows = Vec::new();
    for (v, gradient) in [(v, false), (v / 4, true), (v / 2, true), (v, true)] {
        let products = 1 + gradient as usize;
        let flop = 2.0 * (products * d * v * T) as f64;
        let what = if gradient { " forward+backward" } else { "" };
        let name = format!("linear_logprob{what} {} D {d} V {v}", w.ty());
        let mut row = time(bench, name, flop, w, |arena, graph, inputs| {
            let h = inputs.f32(arena, [d, T]);
            let target = inputs.ids(arena, T, v);
            let e_u = arena.row_range(inputs.w, 0, v);
            let head = Head::new(h, e_u, LogitMap::default());
            let head = ops::linear_logprob(arena, head, Some(target), 1.0, gradient);
            graph.output(head.logprob);
            if let Some(gradient) = head.gradient {
                graph.output(gradient);
            }
        })?;
        if bench.model.device() == Device::Cpu {
            let tiles = ops::logprob_tiles_bytes(d, T, bench.pool.n_threads());
            row.insert("tiles_bytes".into(), tiles.into());
        }
        rows.push(row);
    }
    Ok(rows)
}

/// Segments of a packed batch: a prompt of `prompt` tokens with `n` completions of `len`, `times` in a row.
pub fn packed(times: usize, prompt: usize, n: usize, len: usize) -> Vec<Segment> {
    let mut segments = Vec::new();
    let mut at = 0;
    for _ in 0..times {
        let prompt = [at, at + prompt as i32];
        segments.push(Segment { begin: at, end: prompt[1], prefix_begin: at, prefix_end: at });
        at = prompt[1];
        for _ in 0..n {
            let end = at + len as i32;
            let [prefix_begin, prefix_end] = prompt;
            segments.push(Segment { begin: at, end, prefix_begin, prefix_end });
            at = end;
        }
    }
    segments
}

/// Pairs of tokens of which one sees the other.
pub fn pairs(segments: &[Segment], window: Option<usize>) -> usize {
    let seen = |s: &Segment| -> usize {
        let first = (s.prefix_end - s.prefix_begin) as usize + 1;
        let positions = first..first + (s.end - s.begin) as usize;
        positions.map(|n| n.min(window.unwrap_or(n))).sum()
    };
    segments.iter().map(seen).sum()
}

fn attention(bench: &Bench<'_>) -> Result<Vec<Row>> {
    let mut layers = bench.model.config().layers.iter();
    let Some(c) = layers.find(|layer| layer.delta.is_none()) else { return Ok(Vec::new()) };
    let (n_head, n_head_kv, head_size) = (c.n_head, c.n_head_kv, c.head_size);
    let plain = AttentionSpec {
        n_head,
        n_head_kv,
        head_size,
        scale: 1.0 / (head_size as f32).sqrt(),
        window: None,
        softcap: None,
    };
    // Not used: attention has no weights.
    let w = bench.model.weights().output_norm();
    let mut rows = Vec::new();
    for (name, segments, spec) in [
        ("2 x 256", packed(2, 256, 0, 0), plain),
        ("1 x 2048", packed(1, 2048, 0, 0), plain),
        (
            "1 x 2048, window 256",
            packed(1, 2048, 0, 0),
            AttentionSpec { window: Some(256), ..plain },
        ),
        (
            "1 x 2048, softcap",
            packed(1, 2048, 0, 0),
            AttentionSpec { softcap: Some(50.0), ..plain },
        ),
        ("256 + 8 x 128", packed(1, 256, 8, 128), plain),
    ] {
        let t = segments.last().expect("segments").end as usize;
        // Two products forward, five backward, over the pairs of tokens that see each other.
        let flop = 2.0 * (pairs(&segments, spec.window) * head_size * n_head) as f64;
        let (q, kv) = ([head_size * n_head, t], [head_size * n_head_kv, t]);
        rows.push(time(
            bench,
            format!("attention {name}"),
            2.0 * flop,
            w,
            |arena, graph, inputs| {
                let [q, k, v] = [q, kv, kv].map(|shape| inputs.f32(arena, shape));
                graph.output(ops::attention(arena, q, k, v, None, &segments, spec).0);
            },
        )?);
        let name = format!("attention, attention_back {name}");
        rows.push(time(bench, name, 7.0 * flop, w, |arena, graph, inputs| {
            let [q_in, k, v] = [q, kv, kv].map(|shape| inputs.f32(arena, shape));
            let (_, saved) = ops::attention(arena, q_in, k, v, None, &segments, spec);
            let d_out = inputs.f32(arena, q);
            for d in ops::attention_back(arena, &saved, d_out) {
                graph.output(d);
            }
        })?);
    }
    Ok(rows)
}

/// Entropies, divergences and likeliest tokens; two models' divergence, here of one model beside itself.
fn policies(bench: &Bench<'_>) -> Result<Vec<Row>> {
    let w = bench.model.weights().unembedding();
    let [d, v, ..] = w.shape();
    let flop = 2.0 * (d * v * T) as f64;
    let what = format!("{} D {d} V {v}", w.ty());
    Ok(vec![
        time(bench, format!("policies, groups of 8, {what}"), flop, w, |arena, graph, inputs| {
            let h = inputs.f32(arena, [d, T]);
            let taken = inputs.ids(arena, T, v);
            let wanted = ops::Compare { taken: Some(taken), group: 8, top_k: 3 };
            let head = Head::new(h, inputs.w, LogitMap::default());
            graph.output(ops::policies(arena, head, wanted).values);
        })?,
        time(bench, format!("divergence {what}"), 2.0 * flop, w, |arena, graph, inputs| {
            let (p, q) = (inputs.f32(arena, [d, T]), inputs.f32(arena, [d, T]));
            let target = inputs.ids(arena, T, v);
            let q = arena.add(q, p);
            let [p, q] = [p, q].map(|hidden| Head::new(hidden, inputs.w, LogitMap::default()));
            let d = ops::divergence(arena, p, q, target);
            for node in [d.kl, d.logprob_p, d.logprob_q, d.agree] {
                graph.output(node);
            }
        })?,
    ])
}

/// What moves bytes and multiplies nothing.
fn rowwise(bench: &Bench<'_>) -> Result<Vec<Row>> {
    let c = bench.model.config();
    let (d, ff) = (c.n_embd, c.layer(1).n_ff);
    let w = bench.model.weights().output_norm();
    let mut rows = Vec::new();
    let mut add =
        |name: String, build: &dyn for<'a> Fn(&'a Arena, &mut Inputs<'a>) -> Vec<Tensor<'a>>| {
            rows.push(time(bench, name, 0.0, w, |arena, graph, inputs| {
                build(arena, inputs).into_iter().for_each(|node| graph.output(node));
            })?);
            Result::Ok(())
        };
    add(format!("rms_norm {d}"), &|arena, inputs| {
        let x = inputs.f32(arena, [d, T]);
        vec![ops::rms_norm(arena, x, inputs.w, 1e-6)]
    })?;
    add(format!("rms_norm_back {d}"), &|arena, inputs| {
        let (x, dy) = (inputs.f32(arena, [d, T]), inputs.f32(arena, [d, T]));
        vec![ops::rms_norm_back(arena, x, inputs.w, dy, None, 1e-6)]
    })?;
    for (name, activation) in [("silu", Activation::Silu), ("gelu", Activation::Gelu)] {
        add(format!("glu {name} {ff}"), &|arena, inputs| {
            let (gate, up) = (inputs.f32(arena, [ff, T]), inputs.f32(arena, [ff, T]));
            vec![ops::glu(arena, gate, up, activation)]
        })?;
        add(format!("glu_back {name} {ff}"), &|arena, inputs| {
            let [gate, up, d] = [(); 3].map(|()| inputs.f32(arena, [ff, T]));
            let (d_gate, d_up) = ops::glu_back(arena, gate, up, d, activation);
            vec![d_gate, d_up]
        })?;
    }
    add(format!("scale_rows {d}"), &|arena, inputs| {
        let (x, factors) = (inputs.f32(arena, [d, T]), inputs.f32(arena, [T, 1]));
        vec![ops::scale_rows(arena, x, factors)]
    })?;
    add(format!("sum_squares {d}"), &|arena, inputs| {
        let x = inputs.f32(arena, [d, T]);
        vec![ops::sum_squares(arena, x)]
    })?;
    add(format!("rows_back {d}"), &|arena, inputs| {
        let (x, ids) = (inputs.f32(arena, [d, T]), inputs.ids(arena, T, T));
        vec![arena.rows_back(x, ids, T)]
    })?;
    add(format!("adamw {d}"), &|arena, inputs| {
        let [p, g, m, v] = [(); 4].map(|()| inputs.f32(arena, [d, T]));
        let step = AdamWStep {
            learning_rate: 1e-3,
            beta1: 0.9,
            beta2: 0.999,
            eps: 1e-8,
            weight_decay: 0.01,
            clip: 1.0,
            t: 1,
        };
        // In place; the second moment is a square.
        let v = arena.mul(v, v);
        vec![ops::adamw(arena, p, g, m, v, &step)]
    })?;
    Ok(rows)
}
