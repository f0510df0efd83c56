//! Runs graphs, makes data, measures errors.

use std::sync::{Arc, Mutex};

use bupo_gguf::ggml::{Arena, Device, Executor, Graph, Input, Tensor, ThreadPool, Type};
use bupo_gguf::ops::{LowRank, Segment};
use half::{bf16, f16};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use rand_distr::StandardNormal;

/// An input tensor with its values.
#[derive(Clone)]
pub enum Source {
    F32(Vec<f32>, Vec<usize>),
    I32(Vec<i32>),
    Blocks(Type, Vec<u8>, Vec<usize>),
}

impl Source {
    pub fn f32(values: &[f32], shape: &[usize]) -> Source {
        Source::F32(values.to_vec(), shape.to_vec())
    }

    fn tensor<'a>(&self, arena: &'a Arena) -> Tensor<'a> {
        match self {
            Source::F32(_, shape) => arena.input("f32", Type::F32, shape),
            Source::I32(values) => arena.input("i32", Type::I32, &[values.len()]),
            Source::Blocks(ty, _, shape) => arena.input("blocks", *ty, shape),
        }
    }

    fn input(&self) -> Input<'_> {
        match self {
            Source::F32(values, _) => Input::F32(values),
            Source::I32(values) => Input::I32(values),
            Source::Blocks(_, bytes, _) => Input::Bytes(bytes),
        }
    }
}

/// One graph at a time: the threads of ggml spin while they wait for each other.
static TURN: Mutex<()> = Mutex::new(());

/// The values of the tensors that `build` makes of `sources`.
///
/// Computes twice, the second time with NaN wherever nothing was written, and wants the same bits.
pub fn run(
    threads: usize,
    sources: &[Source],
    build: impl for<'a> Fn(&'a Arena, &[Tensor<'a>]) -> Vec<Tensor<'a>>,
) -> Vec<Vec<f32>> {
    let _turn = TURN.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
    let mut executor = Executor::cpu(Arc::new(ThreadPool::new(threads).unwrap())).unwrap();
    let mut once = || {
        let arena = Arena::new(256);
        let inputs: Vec<Tensor> = sources.iter().map(|s| s.tensor(&arena)).collect();
        let outputs = build(&arena, &inputs);
        let mut graph = Graph::new(&arena);
        outputs.iter().for_each(|&node| graph.output(node));
        // An input that no node reads gets no memory.
        inputs.iter().for_each(|&input| graph.add(input));
        let inputs: Vec<_> = inputs.into_iter().zip(sources.iter().map(Source::input)).collect();
        let results = executor.run(&graph, &inputs).unwrap();
        let values: Vec<Vec<f32>> = outputs.iter().map(|&node| results.f32(node)).collect();
        poison(&mut executor);
        values
    };
    let (first, second) = (once(), once());
    for (i, (a, b)) in first.iter().zip(&second).enumerate() {
        let same = a.iter().zip(b).all(|(a, b)| a.to_bits() == b.to_bits());
        assert!(same, "output {i} differs when computed again in memory that holds NaN");
    }
    first
}

/// The values of the tensors that `build` makes of `sources`, computed once on `device`.
#[allow(dead_code)] // for tests/kernels.rs
pub fn run_on(
    device: Device,
    sources: &[Source],
    build: impl for<'a> Fn(&'a Arena, &[Tensor<'a>]) -> Vec<Tensor<'a>>,
) -> Vec<Vec<f32>> {
    let mut executor = Executor::new(device, Arc::new(ThreadPool::new(1).unwrap())).unwrap();
    let arena = Arena::new(256);
    let inputs: Vec<Tensor> = sources.iter().map(|s| s.tensor(&arena)).collect();
    let outputs = build(&arena, &inputs);
    let mut graph = Graph::new(&arena);
    outputs.iter().for_each(|&node| graph.output(node));
    inputs.iter().for_each(|&input| graph.add(input));
    let inputs: Vec<_> = inputs.into_iter().zip(sources.iter().map(Source::input)).collect();
    let results = executor.run(&graph, &inputs).unwrap();
    outputs.iter().map(|&node| results.f32(node)).collect()
}

/// Fills the executor's memory with NaN.
fn poison(executor: &mut Executor) {
    let bytes = executor.scratch_bytes();
    let values = vec![f32::NAN; bytes / 4];
    let arena = Arena::new(4);
    let x = arena.input("poison", Type::F32, &[values.len()]);
    let mut graph = Graph::new(&arena);
    graph.output(arena.reshape(x, x.shape()));
    executor.run(&graph, &[(x, Input::F32(&values))]).unwrap();
    assert_eq!(executor.scratch_bytes(), bytes, "the memory was reused, not made anew");
}

/// Random values with the same seed in every run.
pub struct Random(ChaCha8Rng);

impl Random {
    pub fn new(seed: u64) -> Random {
        Random(ChaCha8Rng::seed_from_u64(seed))
    }

    /// Standard normal.
    pub fn normal(&mut self, n: usize) -> Vec<f32> {
        (0..n).map(|_| self.0.sample(StandardNormal)).collect()
    }

    /// Integers in `0..bound`.
    pub fn below(&mut self, n: usize, bound: usize) -> Vec<i32> {
        (0..n).map(|_| self.0.random_range(0..bound as i32)).collect()
    }

    /// A random weight `[k, n]` of a type, and what it dequantises to.
    pub fn weight(&mut self, ty: Type, k: usize, n: usize) -> (Source, Vec<f64>) {
        let bytes: Vec<u8> = match ty {
            Type::F32 => self.normal(k * n).iter().flat_map(|x| x.to_le_bytes()).collect(),
            Type::F16 => {
                self.normal(k * n).iter().flat_map(|&x| f16::from_f32(x).to_le_bytes()).collect()
            }
            Type::BF16 => {
                self.normal(k * n).iter().flat_map(|&x| bf16::from_f32(x).to_le_bytes()).collect()
            }
            _ => (0..k * n / ty.block_size()).flat_map(|_| self.block(ty)).collect(),
        };
        let mut exact = vec![0f32; n * k];
        ty.dequantize(&bytes, &mut exact);
        (Source::Blocks(ty, bytes, vec![k, n]), f64s(&exact))
    }

    /// Random bits that mean values of size 1 or so. Most do not: their scale is NaN, huge or tiny.
    ///
    /// Quantised data would have but some of the bit patterns, and ggml takes 20 s to get ready for it.
    fn block(&mut self, ty: Type) -> Vec<u8> {
        let mut values = vec![0f32; ty.block_size()];
        loop {
            let bytes: Vec<u8> = (0..ty.block_bytes()).map(|_| self.0.random()).collect();
            ty.dequantize(&bytes, &mut values);
            let size = norm(values.iter().map(|&x| x as f64)) / (values.len() as f64).sqrt();
            if (0.3..3.0).contains(&size) {
                return bytes;
            }
        }
    }
}

/// An adapter's term of a head: B `[r, V]`, u `[r, T]`.
#[derive(Clone, Default)]
pub struct Low {
    pub rank: usize,
    pub factor: Vec<f32>,
    pub input: Vec<f32>,
    pub scale: f32,
}

impl Low {
    pub fn random(random: &mut Random, [rank, v, t]: [usize; 3], scale: f32) -> Low {
        Low { rank, factor: random.normal(rank * v), input: random.normal(rank * t), scale }
    }

    /// B and u, in this order.
    pub fn sources(&self) -> [Source; 2] {
        [&self.factor, &self.input].map(|x| Source::f32(x, &[self.rank, x.len() / self.rank]))
    }

    /// The term made of tensors of [`Low::sources`].
    pub fn term<'a>(&self, sources: &[Tensor<'a>]) -> Option<LowRank<'a>> {
        Some(LowRank { factor: sources[0], input: sources[1], scale: self.scale })
    }

    /// h `[D, T]` and E_u `[D, V]` with u and scale B behind each column: the same logits without a term.
    pub fn joined(&self, h: &[f32], e: &[f64], d: usize) -> [Vec<f64>; 2] {
        let b: Vec<f64> = self.factor.iter().map(|&b| self.scale as f64 * b as f64).collect();
        [join(&f64s(h), d, &f64s(&self.input), self.rank), join(e, d, &b, self.rank)]
    }
}

/// Columns of `a: [n, _]` with those of `b: [m, _]` behind them.
pub fn join<T: Copy>(a: &[T], n: usize, b: &[T], m: usize) -> Vec<T> {
    let columns = a.chunks(n).enumerate();
    columns
        .flat_map(|(i, a)| a.iter().chain(&b[i * m..][..m]).copied().collect::<Vec<_>>())
        .collect()
}

/// The types a weight may have; all of them have rows of whole blocks at K = 256.
pub fn weight_types() -> Vec<Type> {
    let types: Vec<Type> = Type::all().filter(|ty| ty.can_dequantize()).collect();
    assert!(types.len() >= 25, "{types:?}");
    types
}

pub fn f64s(values: &[f32]) -> Vec<f64> {
    values.iter().map(|&x| x as f64).collect()
}

fn norm(x: impl Iterator<Item = f64>) -> f64 {
    x.map(|x| x * x).sum::<f64>().sqrt()
}

/// Wants `||got - want|| <= tolerance max(||want||, 0.01 sqrt(n))`: where all of `want` is nearly zero
/// (the inputs are of size 1), its rounding errors are not.
#[track_caller]
pub fn close(what: &str, got: &[f32], want: &[f64], tolerance: f64) {
    compare(what, &f64s(got), want, tolerance, 0.01);
}

#[track_caller]
fn compare(what: &str, got: &[f64], want: &[f64], tolerance: f64, floor: f64) {
    assert_eq!(got.len(), want.len(), "{what}");
    let scale = norm(want.iter().copied()).max(floor * (want.len() as f64).sqrt());
    let error = norm(got.iter().zip(want).map(|(g, w)| g - w)) / scale;
    println!("{error:.1e} of {tolerance:.0e}  {what}");
    assert!(error <= tolerance, "{what}: relative error {error:e}, at most {tolerance:e}");
}

/// Inputs up to this size are differenced in every element.
const SMALL: usize = 640;
const DIRECTIONS: usize = 8;

/// Wants `got` to be the cotangent of `x` under `f` for the cotangents `d` of its result.
///
/// Steps are 1e-4 of the input's size: in f64 the differences are then good to 1e-8 or better.
#[track_caller]
pub fn is_vjp(
    what: &str,
    f: impl Fn(&[f64]) -> Vec<f64>,
    x: &[f32],
    d: &[f32],
    got: &[f32],
    tolerance: f64,
) {
    assert_eq!(x.len(), got.len(), "{what}");
    let mut x = f64s(x);
    let size = norm(x.iter().copied()) / (x.len() as f64).sqrt();
    let h = 1e-4 * if size > 0.0 { size } else { 1.0 };
    let dot = |y: Vec<f64>| -> f64 {
        assert_eq!(y.len(), d.len(), "{what}");
        y.iter().zip(d).map(|(y, &d)| y * d as f64).sum()
    };
    if x.len() <= SMALL {
        let mut want = Vec::with_capacity(x.len());
        for i in 0..x.len() {
            let here = x[i];
            x[i] = here + h;
            let above = dot(f(&x));
            x[i] = here - h;
            want.push((above - dot(f(&x))) / (2.0 * h));
            x[i] = here;
        }
        return close(what, got, &want, tolerance);
    }
    let mut random = Random::new(x.len() as u64);
    let (mut along, mut want) = (Vec::new(), Vec::new());
    for _ in 0..DIRECTIONS {
        let v = f64s(&random.normal(x.len()));
        // The step as a whole has ten times the size of a single element's.
        let h = 10.0 * h / norm(v.iter().copied());
        let at = |h: f64| dot(f(&x.iter().zip(&v).map(|(x, v)| x + h * v).collect::<Vec<_>>()));
        want.push((at(h) - at(-h)) / (2.0 * h));
        along.push(got.iter().zip(&v).map(|(&g, v)| g as f64 * v).sum());
    }
    let floor = 0.01 * (x.len() as f64).sqrt();
    compare(what, &along, &want, tolerance, floor);
}

/// A prompt and its completions, by length.
pub type Tree<'t> = (usize, &'t [usize]);

pub fn segments(trees: &[Tree]) -> Vec<Segment> {
    let (mut all, mut next) = (Vec::new(), 0);
    for &(prompt, completions) in trees {
        let (begin, end) = (next, next + prompt as i32);
        all.push(Segment { begin, end, prefix_begin: begin, prefix_end: begin });
        next = end;
        for &n in completions {
            let own = next;
            next += n as i32;
            all.push(Segment { begin: own, end: next, prefix_begin: begin, prefix_end: end });
        }
    }
    all
}
