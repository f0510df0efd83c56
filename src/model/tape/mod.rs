//! A layer's forward as a list of steps, and its vector-Jacobian product as that list walked backwards.
//!
//! A forward function (`arch/`) calls [`Tape::linear`], [`Tape::norm`], .. on values ([`Var`]); each appends nodes to
//! the graph and pushes a step. [`Tape::backward`] goes through the steps in reverse. Every value has at most one
//! cotangent so far, and a step hands what its input has already to the op that adds to it
//! (`linear_back(.., add)`): sums cost nothing where the op can take them up.
//!
//! One builder makes every graph: training, taps, memory plans and the dry run at opening ([`Tape::dry`]), which
//! finds out which tensors a layer reads and which of them are linear maps.

mod backward;
mod experts;
mod mixers;

use super::batch::Batch;
use super::config::{Config, LayerConfig};
use super::dry::Dry;
use super::lora::{Adapter, Pair};
use super::memo::Memo;
use super::shared::Shared;
use super::weights::Weights;
use crate::ggml::{Arena, Graph, Input, Rope, Tensor, Type};
use crate::ops::{self, Activation, AttentionSaved, AttentionSpec, DeltaSaved};
use experts::ExpertStep;
pub use experts::Routing;

/// Room for the nodes of a layer's forward and backward.
pub const LAYER_NODES: usize = 768;

/// A value on the tape.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Var(usize);

/// What a layer computes on the way, each `[D, T]`. A and F are what is added to the residual: after a post-norm,
/// after a residual multiplier (PAPER section 1).
#[derive(Clone, Copy)]
pub struct Taps<V = Var> {
    /// What enters attention.
    pub attn_in: V,
    /// A^l
    pub attn_out: V,
    /// What enters the FFN.
    pub ffn_in: V,
    /// F^l
    pub ffn_out: V,
    /// H^l
    pub layer_out: V,
}

/// What all layers' graphs are made of.
#[derive(Clone, Copy)]
pub struct Parts<'a> {
    /// Sizes.
    pub config: &'a Config,
    /// Weights.
    pub weights: Weights<'a>,
    /// Adapter; none is the base model.
    pub adapter: Option<Adapter<'a>>,
    /// Tokens, positions, who sees whom.
    pub batch: &'a Batch,
    /// Keys and values that layers have from earlier ones; none where no layer up to the depth has.
    pub shared: Option<&'a Shared>,
    /// Whether the second of two sets of rope factors applies: contexts longer than the model was first made for.
    pub long_context: bool,
}

/// A value's node, and whether it would cost much to compute again.
struct Value<'a> {
    node: Tensor<'a>,
    costly: bool,
}

/// A part of a linear map's outputs: rows of W, and of B.
struct Rows<'a> {
    y: Var,
    weight: Tensor<'a>,
    b: Option<Tensor<'a>>,
    d_b: Option<Tensor<'a>>,
}

enum Step<'a> {
    Linear { x: Var, rows: Vec<Rows<'a>>, pair: Option<Pair<'a>>, u: Option<Tensor<'a>> },
    Norm { x: Var, y: Var, weight: Option<Tensor<'a>>, width: usize },
    Rope { x: Var, y: Var, rope: Rope, factors: Option<Tensor<'a>> },
    Attention { q: Var, k: Var, v: Var, y: Var, saved: AttentionSaved<'a> },
    Conv { x: Var, y: Var, weight: Tensor<'a> },
    Delta { qkv: Var, alpha: Var, beta: Var, y: Var, saved: DeltaSaved<'a> },
    Halves { x: Var, ys: [Var; 2], size: usize },
    Glu { gate: Var, up: Var, y: Var, act: Activation },
    Add { a: Var, b: Var, y: Var },
    Scale { x: Var, y: Var, by: f32 },
    ScaleTokens { x: Var, y: Var, by: Tensor<'a> },
    Experts(ExpertStep<'a>),
}

/// Values of an input that the batch has not as they are needed.
enum Values {
    Positions,
    Tokens,
    F32(Vec<f32>),
}

/// One layer's graph in the making.
pub struct Tape<'a> {
    arena: &'a Arena,
    parts: Parts<'a>,
    layer: usize,
    memo: Memo<'a>,
    dry: Option<Dry>,
    values: Vec<Value<'a>>,
    steps: Vec<Step<'a>>,
    inputs: Vec<(&'static str, Tensor<'a>, Values)>,
    gives: Option<[Var; 2]>,
    takes: Option<(usize, [Var; 2])>,
    routing: Option<Routing<'a>>,
}

impl<'a> Tape<'a> {
    /// An empty tape for layer `layer`, from 1.
    pub fn new(arena: &'a Arena, parts: Parts<'a>, layer: usize, memo: Memo<'a>) -> Tape<'a> {
        Tape {
            arena,
            parts,
            layer,
            memo,
            dry: None,
            values: Vec::new(),
            steps: Vec::new(),
            inputs: Vec::new(),
            gives: None,
            takes: None,
            routing: None,
        }
    }

    /// A tape that notes what is read, and checks it, instead of relying on that.
    pub(super) fn dry(arena: &'a Arena, parts: Parts<'a>, layer: usize) -> Tape<'a> {
        Tape { dry: Some(Dry::default()), ..Tape::new(arena, parts, layer, Memo::Off) }
    }

    /// What a dry tape has noted.
    pub(super) fn into_dry(self) -> Dry {
        self.dry.expect("a dry tape")
    }

    /// The layer, from 1.
    pub fn index(&self) -> usize {
        self.layer
    }

    /// The model's sizes.
    pub fn config(&self) -> &'a Config {
        self.parts.config
    }

    /// The layer's sizes.
    pub fn layer(&self) -> &'a LayerConfig {
        self.parts.config.layer(self.layer)
    }

    /// The node of a value: `[width, T]`.
    pub fn node(&self, v: Var) -> Tensor<'a> {
        self.values[v.0].node
    }

    /// A value that is there already, such as the layer's input.
    pub fn leaf(&mut self, node: Tensor<'a>) -> Var {
        self.push(node, false)
    }

    fn push(&mut self, node: Tensor<'a>, costly: bool) -> Var {
        self.values.push(Value { node, costly });
        Var(self.values.len() - 1)
    }

    /// A value whose node costs little beside its inputs: it is costly where one of them is.
    fn push_cheap(&mut self, node: Tensor<'a>, inputs: &[Var]) -> Var {
        let costly = inputs.iter().any(|x| self.values[x.0].costly);
        self.push(node, costly)
    }

    /// The vjp of a step to come needs this value again: one that is costly is kept, or was.
    fn keep(&mut self, v: Var) {
        let value = &mut self.values[v.0];
        if std::mem::take(&mut value.costly) {
            value.node = self.memo.node(value.node);
        }
    }

    fn full_name(&self, name: &str) -> String {
        format!("blk.{}.{name}", self.layer - 1)
    }

    /// The layer's tensor of this name and shape, if it is there; `[n]` is F32, a matrix of any type.
    pub fn find_weight(&mut self, name: &str, shape: &[usize]) -> Option<Tensor<'a>> {
        let full = self.full_name(name);
        self.find_global(&full, shape)
    }

    /// Whether the layer has a tensor of this name.
    pub fn has(&self, name: &str) -> bool {
        self.parts.weights.find(&self.full_name(name)).is_some()
    }

    /// A tensor of no layer, if it is there.
    pub fn find_global(&mut self, name: &str, shape: &[usize]) -> Option<Tensor<'a>> {
        let found = self.parts.weights.find(name)?;
        match &mut self.dry {
            Some(dry) => dry.accepts(found, name, shape).then_some(found),
            None => Some(found),
        }
    }

    /// The layer's tensor of this name and shape.
    pub fn weight(&mut self, name: &str, shape: &[usize]) -> Tensor<'a> {
        let full = self.full_name(name);
        self.global(&full, shape)
    }

    /// A tensor of no layer.
    pub fn global(&mut self, name: &str, shape: &[usize]) -> Tensor<'a> {
        let found = self.find_global(name, shape);
        match (found, &mut self.dry) {
            (Some(found), _) => found,
            (None, Some(dry)) => {
                dry.misses(name);
                self.arena.tensor(Type::F32, shape) // so that the dry run goes on
            }
            (None, None) => panic!("{name} was there when the model was opened"),
        }
    }

    /// Something that a dry run finds wrong with a tensor.
    pub fn refuse(&mut self, name: &str, expected: String, got: &str) {
        if let Some(dry) = &mut self.dry {
            dry.refuse(name, expected, got.into());
        }
    }

    /// Tokens of the batch, T.
    pub fn tokens(&self) -> usize {
        self.parts.batch.len()
    }

    fn input(
        &mut self,
        name: &'static str,
        shape: &[usize],
        make: impl FnOnce(&Batch) -> Values,
    ) -> Tensor<'a> {
        if let Some((_, tensor, _)) = self.inputs.iter().find(|(known, ..)| *known == name) {
            return *tensor;
        }
        let values = make(self.parts.batch);
        let ty = if matches!(values, Values::F32(_)) { Type::F32 } else { Type::I32 };
        let tensor = self.arena.input(name, ty, shape);
        self.inputs.push((name, tensor, values));
        tensor
    }

    /// The inputs that the graph reads, with their values.
    pub fn inputs(&self) -> Vec<(Tensor<'a>, Input<'_>)> {
        let batch = self.parts.batch;
        let value = |values| match values {
            &Values::Positions => Input::I32(&batch.positions),
            &Values::Tokens => Input::I32(&batch.tokens),
            Values::F32(values) => Input::F32(values),
        };
        self.inputs.iter().map(|(_, tensor, values)| (*tensor, value(values))).collect()
    }

    /// `W x + bias + s B A x` with the map of this name: `[n_in, T]` to `[n_out, T]`.
    pub fn linear(&mut self, x: Var, name: &str, n_out: usize) -> Var {
        self.linear_rows(x, name, [n_out])[0]
    }

    /// A map whose outputs are used in parts of these sizes, one after another; its adapter has one pair for all.
    pub fn linear_rows<const N: usize>(
        &mut self,
        x: Var,
        name: &str,
        sizes: [usize; N],
    ) -> [Var; N] {
        let n_in = self.node(x).shape()[0];
        let n_out = sizes.iter().sum();
        let weight = self.weight(&format!("{name}.weight"), &[n_in, n_out]);
        let bias = self.find_weight(&format!("{name}.bias"), &[n_out]);
        if let Some(dry) = &mut self.dry {
            dry.map(self.layer, name, N > 1, [n_in, n_out]);
        }
        let pair = self.parts.adapter.and_then(|a| a.pair(self.layer, name));
        let u = pair.map(|pair| {
            self.keep(x); // dA takes it
            self.memo.node(ops::linear(self.arena, pair.a, self.node(x), None, None)) // [r, T]
        });
        let (arena, input) = (self.arena, self.node(x));
        let mut first = 0;
        let rows = sizes.map(|n| {
            let part = |t: Tensor<'a>| if N == 1 { t } else { arena.row_range(t, first, n) };
            let weight = part(weight);
            let bias = bias.map(|b| if N == 1 { b } else { arena.part(b, first, [n, 1]) });
            let b = pair.map(|pair| part(pair.b));
            let d_b = pair.and_then(|pair| pair.gradient).map(|(_, d_b)| part(d_b));
            first += n;
            let low = pair.zip(b).zip(u).map(|((pair, factor), input)| ops::LowRank {
                factor,
                input,
                scale: pair.scale,
            });
            let y = ops::linear(arena, weight, input, low, bias); // [n, T]
            Rows { y: self.push(y, true), weight, b, d_b }
        });
        let ys = rows.each_ref().map(|rows| rows.y);
        self.steps.push(Step::Linear { x, rows: rows.into(), pair, u });
        ys
    }

    /// RMS norm over all of x, with the weight of this name.
    pub fn norm(&mut self, x: Var, name: &str) -> Var {
        let width = self.node(x).shape()[0];
        self.norm_over(x, name, width)
    }

    /// RMS norm over each run of `width` values (a head) of x, with one weight `[width]` for all.
    pub fn norm_over(&mut self, x: Var, name: &str, width: usize) -> Var {
        let weight = self.weight(&format!("{name}.weight"), &[width]);
        self.normed(x, Some(weight), width)
    }

    /// RMS norm over each run of `width` values, without weight.
    pub fn norm_plain(&mut self, x: Var, width: usize) -> Var {
        self.normed(x, None, width)
    }

    fn normed(&mut self, x: Var, weight: Option<Tensor<'a>>, width: usize) -> Var {
        self.keep(x);
        let (arena, eps) = (self.arena, self.parts.config.rms_eps);
        let node = self.in_runs(self.node(x), width, |x| match weight {
            Some(weight) => ops::rms_norm(arena, x, weight, eps),
            None => arena.rms_norm(x, eps),
        });
        let y = self.push_cheap(node, &[x]);
        self.steps.push(Step::Norm { x, y, weight, width });
        y
    }

    /// `f` of x cut into runs: `[width, n, T]`; back in x's shape.
    fn in_runs(
        &self,
        x: Tensor<'a>,
        width: usize,
        f: impl FnOnce(Tensor<'a>) -> Tensor<'a>,
    ) -> Tensor<'a> {
        let y = f(runs(self.arena, x, width));
        if width == x.shape()[0] { y } else { self.arena.reshape(y, x.shape()) }
    }

    /// Heads rotated by their tokens' positions, in layers that know them: with llama3's factors, or one of
    /// longrope's two sets.
    pub fn rotate(&mut self, x: Var) -> Var {
        let Some(rope) = self.layer().rope else { return x };
        let mut factors = None;
        if self.layer().rope_factors {
            let shape = [rope.n_rot / 2];
            let short = self.find_global("rope_factors_short.weight", &shape);
            let long = self.find_global("rope_factors_long.weight", &shape);
            let either = if self.parts.long_context { long } else { short };
            factors = self.find_global("rope_freqs.weight", &shape).or(either);
        }
        self.rope(x, rope, factors)
    }

    fn rope(&mut self, x: Var, rope: Rope, factors: Option<Tensor<'a>>) -> Var {
        let positions = self.positions();
        let size = self.layer().head_size;
        let node =
            self.in_heads(self.node(x), size, |x| self.arena.rope(x, positions, factors, &rope));
        let y = self.push_cheap(node, &[x]);
        self.steps.push(Step::Rope { x, y, rope, factors });
        y
    }

    /// [`Tape::in_runs`] that keeps the third extent also where there is one head.
    fn in_heads(
        &self,
        x: Tensor<'a>,
        size: usize,
        f: impl FnOnce(Tensor<'a>) -> Tensor<'a>,
    ) -> Tensor<'a> {
        let flat = x.shape();
        self.arena.reshape(f(self.arena.reshape(x, [size, flat[0] / size, flat[1], 1])), flat)
    }

    fn positions(&mut self) -> Tensor<'a> {
        self.input("positions", &[self.tokens()], |_| Values::Positions)
    }

    /// Causal attention of queries `[hd * n_head, T]` to keys and values `[hd * n_head_kv, T]`, within the layer's
    /// window; with the layer's sinks, where it has them.
    pub fn attend(&mut self, q: Var, k: Var, v: Var, scale: f32) -> Var {
        for x in [q, k, v] {
            self.keep(x);
        }
        let sinks = self.find_weight("attn_sinks.weight", &[self.layer().n_head]);
        let layer = self.layer();
        let spec = AttentionSpec {
            n_head: layer.n_head,
            n_head_kv: layer.n_head_kv,
            head_size: layer.head_size,
            scale,
            window: layer.window,
            softcap: self.parts.config.attention_softcap,
        };
        let [nq, nk, nv] = [q, k, v].map(|x| self.node(x));
        let (arena, segments) = (self.arena, &self.parts.batch.segments);
        let computed = ops::attention(arena, nq, nk, nv, sinks, segments, spec);
        let whole = self.memo.node(computed.1.whole());
        let (mixed, saved) = ops::attention_kept(arena, whole, nq, nk, nv, segments, spec);
        let y = self.push(mixed, false);
        self.steps.push(Step::Attention { q, k, v, y, saved });
        y
    }

    /// `act(gate) * up`.
    pub fn glu(&mut self, gate: Var, up: Var, act: Activation) -> Var {
        self.keep(gate);
        self.keep(up);
        let node = ops::glu(self.arena, self.node(gate), self.node(up), act);
        let y = self.push_cheap(node, &[]);
        self.steps.push(Step::Glu { gate, up, y, act });
        y
    }

    /// `a + b`.
    pub fn add(&mut self, a: Var, b: Var) -> Var {
        let node = self.arena.add(self.node(a), self.node(b));
        let y = self.push_cheap(node, &[a, b]);
        self.steps.push(Step::Add { a, b, y });
        y
    }

    /// `by x`.
    pub fn scale(&mut self, x: Var, by: f32) -> Var {
        if by == 1.0 {
            return x;
        }
        let node = self.arena.scale(self.node(x), by);
        let y = self.push_cheap(node, &[x]);
        self.steps.push(Step::Scale { x, y, by });
        y
    }

    /// Each token's column of x times a factor that depends on its position.
    pub fn scale_by_position(&mut self, x: Var, factor: impl Fn(i32) -> f32) -> Var {
        let by = self.input("scales", &[self.tokens()], |batch| {
            Values::F32(batch.positions.iter().map(|&p| factor(p)).collect())
        });
        let node = ops::scale_rows(self.arena, self.node(x), by);
        let y = self.push_cheap(node, &[x]);
        self.steps.push(Step::ScaleTokens { x, y, by });
        y
    }

    /// The rows of a table `[n, V]` at the tokens: `[n, T]`. No gradient reaches the table.
    pub fn token_rows(&mut self, table: Tensor<'a>) -> Tensor<'a> {
        let ids = self.input("tokens", &[self.tokens()], |_| Values::Tokens);
        self.arena.rows(table, ids)
    }

    /// H^0: `[D, T]`.
    pub fn embedded(&mut self) -> Tensor<'a> {
        let rows = self.token_rows(self.parts.weights.embedding());
        self.arena.scale(rows, self.parts.config.embedding_scale)
    }

    /// The layer's tensor of one number, if it is there.
    pub fn find_scalar(&mut self, name: &str) -> Option<f32> {
        let tensor = self.find_weight(name, &[1])?;
        // A model without its weights has no numbers.
        Some(if tensor.address().is_null() { 1.0 } else { tensor.read_f32()[0] })
    }

    /// Gives this layer's keys and values to the layers that have none of their own.
    pub fn share(&mut self, kv: [Var; 2]) {
        self.gives = Some(kv);
    }

    /// Keys and values of the layer `donor`.
    pub fn shared(&mut self, donor: usize) -> [Var; 2] {
        let (arena, tokens) = (self.arena, self.parts.batch.len());
        let given = self.parts.shared.and_then(|shared| shared.values(arena, donor, tokens));
        let width = self.parts.config.layer(donor).kv_width();
        let kv = given.unwrap_or_else(|| [0, 1].map(|_| arena.tensor(Type::F32, &[width, tokens])));
        let kv = kv.map(|node| self.leaf(node));
        self.takes = Some((donor, kv));
        kv
    }

    /// Where nodes are made that no gradient passes through.
    pub fn arena(&self) -> &'a Arena {
        self.arena
    }

    /// The nodes of the taps.
    pub fn nodes(&self, taps: Taps) -> Taps<Tensor<'a>> {
        let node = |v| self.node(v);
        Taps {
            attn_in: node(taps.attn_in),
            attn_out: node(taps.attn_out),
            ffn_in: node(taps.ffn_in),
            ffn_out: node(taps.ffn_out),
            layer_out: node(taps.layer_out),
        }
    }

    /// What is to be kept; nothing is after that.
    pub fn take_memo(&mut self) -> Memo<'a> {
        std::mem::replace(&mut self.memo, Memo::Off)
    }

    /// Keeps what [`Tape::share`] was given for the layers that read it.
    pub fn store_shared(&self, graph: &mut Graph<'a>) {
        let (tokens, shared) = (self.parts.batch.len(), self.parts.shared);
        let kept = shared.and_then(|shared| shared.values(self.arena, self.layer, tokens));
        let (Some(kv), Some(kept)) = (self.gives, kept) else { return };
        kv.into_iter().zip(kept).for_each(|(v, kept)| graph.store(self.node(v), kept));
    }
}

/// x: `[n * width, T]` as runs `[width, n, T]`, or as it stands where it is one.
fn runs<'a>(arena: &'a Arena, x: Tensor<'a>, width: usize) -> Tensor<'a> {
    let [all, tokens, ..] = x.shape();
    if width == all { x } else { arena.reshape(x, [width, all / width, tokens, 1]) }
}
