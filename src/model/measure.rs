//! What a forward and backward will take of memory, reckoned from the very graphs, without computing.

use super::lora::Adapter;
use super::memo::{Memo, kept_floats};
use super::tape::{LAYER_NODES, Tape};
use super::{Batch, Lora, Model, Targets};
use crate::Result;
use crate::ggml::{Arena, Graph, Shape, Tensor, TensorSet, Type};

/// Bytes of activations of a micro batch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Activations {
    /// The residuals between layers, two cotangents, the head's gradient: as `Engine` keeps them.
    pub kept: usize,
    /// Intermediate results of the largest graph.
    pub scratch: usize,
}

/// The largest micro batches of a run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Largest {
    /// Tokens of a forward.
    pub tokens: usize,
    /// Tokens of a forward that a backward follows.
    pub trained: usize,
    /// Scored tokens.
    pub scored: usize,
}

/// Activations of micro batches up to these sizes through `depth` layers under an adapter. `keeps`: every layer's
/// costly activations are kept for its backward, which else computes all again.
///
/// # Errors
/// Without memory for the adapter of one layer.
pub fn activations(
    model: &Model,
    targets: &Targets,
    rank: usize,
    depth: usize,
    largest: Largest,
    keeps: bool,
) -> Result<Activations> {
    let d = model.config().n_embd;
    let Largest { tokens, trained, scored } = largest;
    // Hidden states, normed, with their results and gradients: see `Engine::score`.
    let head = 4 * scored * (3 * d + 3);
    let mut scratch = head;
    for layer in model.config().kinds(depth) {
        let lora = Lora::of_layer(model, targets, rank, layer)?;
        let gradients = lora.zeros_like()?;
        let measured = Layer { model, lora: &lora, layer };
        let (measuring, _) = measured.forward_bytes(tokens, false)?;
        let (keeping, kept) = measured.forward_bytes(trained, keeps)?;
        let backward = measured.backward_bytes(&gradients, trained, kept)?;
        scratch = scratch.max(measuring).max(keeping).max(backward);
    }
    Ok(Activations { kept: 4 * d * (tokens * (depth + 3) + scored), scratch })
}

/// Bytes that the kept activations of layers 1 to `depth` take, each for a batch of `tokens`.
///
/// # Errors
/// Without memory for the adapter of one layer.
pub fn kept_bytes(
    model: &Model,
    targets: &Targets,
    rank: usize,
    depth: usize,
    tokens: usize,
) -> Result<Vec<usize>> {
    let (config, batch) = (model.config(), batch_of(model, tokens)?);
    let mut of_kind = Vec::new();
    for layer in config.kinds(depth) {
        let lora = Lora::of_layer(model, targets, rank, layer)?;
        let adapter = Some(Adapter { lora: &lora, gradients: None });
        of_kind.push((config.layer(layer), 4 * kept_of_layer(model, adapter, &batch, layer)));
    }
    let bytes = |layer| {
        let kind = of_kind.iter().find(|(kind, _)| *kind == config.layer(layer));
        kind.expect("each layer is of a kind").1
    };
    Ok((1..=depth).map(bytes).collect())
}

/// Floats that the kept activations of a layer take for a batch: its forward is built and not computed.
pub(super) fn kept_of_layer(
    model: &Model,
    adapter: Option<Adapter<'_>>,
    batch: &Batch,
    layer: usize,
) -> usize {
    let arena = Arena::new(LAYER_NODES);
    let mut tape = Tape::new(&arena, model.parts(adapter, batch), layer, Memo::record());
    let x = tape.leaf(arena.tensor(Type::F32, &[model.config().n_embd, batch.len()]));
    model.layer(&mut tape, x);
    kept_floats(tape.take_memo().into_noted().iter().map(Tensor::shape))
}

/// A layer whose graphs are reckoned.
struct Layer<'m> {
    model: &'m Model,
    lora: &'m Lora,
    layer: usize,
}

impl Layer<'_> {
    /// Intermediate results of a forward. What it `keeps` stays until all of it is copied; its shapes come too.
    fn forward_bytes(&self, tokens: usize, keeps: bool) -> Result<(usize, Vec<Shape>)> {
        let batch = batch_of(self.model, tokens)?;
        let arena = Arena::new(LAYER_NODES);
        let mut graph = Graph::new(&arena);
        let mut given = Given { arena: &arena, bytes: 0 };
        let matrix = [self.model.config().n_embd, tokens, 1, 1];
        let [x, out] = [(); 2].map(|()| given.tensor(&mut graph, matrix));
        let parts = self.model.parts(Some(Adapter { lora: self.lora, gradients: None }), &batch);
        let memo = if keeps { Memo::record() } else { Memo::Off };
        let mut tape = Tape::new(&arena, parts, self.layer, memo);
        let x = tape.leaf(x);
        let taps = self.model.layer(&mut tape, x);
        graph.store(tape.node(taps.layer_out), out);
        let noted = tape.take_memo().into_noted();
        noted.iter().for_each(|node| graph.output(*node));
        let shapes = noted.iter().map(|node| node.shape()).collect();
        Ok((graph.planned_bytes().saturating_sub(given.bytes), shapes))
    }

    /// Intermediate results of a backward, of which these activations were kept, or none.
    fn backward_bytes(
        &self,
        gradients: &TensorSet,
        tokens: usize,
        kept: Vec<Shape>,
    ) -> Result<usize> {
        let batch = batch_of(self.model, tokens)?;
        let arena = Arena::new(LAYER_NODES);
        let mut graph = Graph::new(&arena);
        let mut given = Given { arena: &arena, bytes: 0 };
        let matrix = [self.model.config().n_embd, tokens, 1, 1];
        let [x, d_out, d_in] = [(); 3].map(|()| given.tensor(&mut graph, matrix));
        let kept: Vec<_> = kept.into_iter().map(|s| given.tensor(&mut graph, s)).collect();
        let adapter = Adapter { lora: self.lora, gradients: Some(gradients) };
        let memo = if kept.is_empty() { Memo::Off } else { Memo::replay(kept) };
        let parts = self.model.parts(Some(adapter), &batch);
        let mut tape = Tape::new(&arena, parts, self.layer, memo);
        let x = tape.leaf(x);
        let taps = self.model.layer(&mut tape, x);
        let d = tape.backward(&mut graph, &[(taps.layer_out, d_out)], &[x]);
        if let Some(d) = d[0] {
            graph.store(d, d_in);
        }
        Ok(graph.planned_bytes().saturating_sub(given.bytes))
    }
}

/// One sequence of so many tokens.
fn batch_of(model: &Model, tokens: usize) -> Result<Batch> {
    let mut batch = Batch::default();
    batch.push_group(&[0], &[&vec![0; tokens]], model.config().n_vocab)?;
    Ok(batch)
}

/// Tensors that the engine keeps outside of its graphs: counted, and marked so that the reckoning does not give
/// their room to others.
struct Given<'a> {
    arena: &'a Arena,
    bytes: usize,
}

impl<'a> Given<'a> {
    fn tensor(&mut self, graph: &mut Graph<'a>, shape: Shape) -> Tensor<'a> {
        let tensor = self.arena.input("given", Type::F32, &shape);
        graph.output(tensor);
        self.bytes += 4 * shape.iter().product::<usize>();
        tensor
    }
}
