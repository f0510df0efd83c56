//! What a forward and backward will take of memory, reckoned from the very graphs, without computing.

use std::cell::Cell;

use super::layer::{Adapter, LayerBlocks};
use super::memo::Memo;
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
/// dear activations are kept for its backward, which else computes all again.
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
    let lora = Lora::of_layer(model, targets, rank, 1)?;
    let gradients = lora.zeros_like()?;
    let (measuring, _) = forward_bytes(model, &lora, tokens, false)?;
    let (keeping, kept) = forward_bytes(model, &lora, trained, keeps)?;
    let backward = backward_bytes(model, &lora, &gradients, trained, kept)?;
    // Hidden states, normed, with their results and gradients: see `Engine::score`.
    let head = 4 * scored * (3 * d + 3);
    Ok(Activations {
        kept: 4 * d * (tokens * (depth + 3) + scored),
        scratch: [measuring, keeping, backward, head].into_iter().max().unwrap_or(0),
    })
}

/// Intermediate results of a layer's forward. What it `keeps` stays until all of it is copied; its shapes come too.
fn forward_bytes(
    model: &Model,
    lora: &Lora,
    tokens: usize,
    keeps: bool,
) -> Result<(usize, Vec<Shape>)> {
    let (batch, weights) = (batch_of(model, tokens)?, model.weights());
    let arena = Arena::new(NODES);
    let mut graph = Graph::new(&arena);
    let mut given = Given { arena: &arena, bytes: 0 };
    let positions = given.tensor(&mut graph, Type::I32, [tokens, 1, 1, 1]);
    let matrix = [model.config().n_embd, tokens, 1, 1];
    let [x, out] = [(); 2].map(|()| given.tensor(&mut graph, Type::F32, matrix));
    let adapter = Some(Adapter { lora, gradients: None });
    let blocks = LayerBlocks::new(model.config(), &weights, adapter, 1, positions, &batch.segments);
    let memo = if keeps { Memo::record() } else { Memo::Off };
    let (taps, _) = blocks.forward(&arena, x, &memo);
    graph.store(taps.layer_out, out);
    let noted = if let Memo::Record(nodes) = memo { nodes.into_inner() } else { Vec::new() };
    noted.iter().for_each(|node| graph.output(*node));
    let shapes = noted.iter().map(|node| node.shape()).collect();
    Ok((graph.planned_bytes().saturating_sub(given.bytes), shapes))
}

/// Intermediate results of a layer's backward, of which these activations were kept, or none.
fn backward_bytes(
    model: &Model,
    lora: &Lora,
    gradients: &TensorSet,
    tokens: usize,
    kept: Vec<Shape>,
) -> Result<usize> {
    let (batch, weights) = (batch_of(model, tokens)?, model.weights());
    let arena = Arena::new(NODES);
    let mut graph = Graph::new(&arena);
    let mut given = Given { arena: &arena, bytes: 0 };
    let positions = given.tensor(&mut graph, Type::I32, [tokens, 1, 1, 1]);
    let matrix = [model.config().n_embd, tokens, 1, 1];
    let [x, d_out, d_in] = [(); 3].map(|()| given.tensor(&mut graph, Type::F32, matrix));
    let kept: Vec<_> = kept.into_iter().map(|s| given.tensor(&mut graph, Type::F32, s)).collect();
    let adapter = Some(Adapter { lora, gradients: Some(gradients) });
    let blocks = LayerBlocks::new(model.config(), &weights, adapter, 1, positions, &batch.segments);
    let memo = if kept.is_empty() { Memo::Off } else { Memo::Replay(kept, Cell::new(0)) };
    let (_, saved) = blocks.forward(&arena, x, &memo);
    if let Some(node) = blocks.vjp(&arena, &mut graph, &saved, d_out, true) {
        graph.store(node, d_in);
    }
    Ok(graph.planned_bytes().saturating_sub(given.bytes))
}

/// One sequence of so many tokens.
fn batch_of(model: &Model, tokens: usize) -> Result<Batch> {
    let mut batch = Batch::default();
    batch.push_group(&[0], &[&vec![0; tokens]], model.config().n_vocab)?;
    Ok(batch)
}

/// Room for the nodes of a layer's graph.
const NODES: usize = 512;

/// Tensors that the engine keeps outside of its graphs: counted, and marked so that the reckoning does not give
/// their room to others.
struct Given<'a> {
    arena: &'a Arena,
    bytes: usize,
}

impl<'a> Given<'a> {
    fn tensor(&mut self, graph: &mut Graph<'a>, ty: Type, shape: Shape) -> Tensor<'a> {
        let tensor = self.arena.input("given", ty, &shape);
        graph.output(tensor);
        self.bytes += 4 * shape.iter().product::<usize>();
        tensor
    }
}
