//! What a forward and backward will take of memory, reckoned from the very graphs, without computing.

use super::layer::{Adapter, LayerBlocks};
use super::memo::Memo;
use super::{Batch, Lora, Model, Targets};
use crate::Result;
use crate::ggml::{Arena, Graph, Type};

/// Bytes of activations of a micro batch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Activations {
    /// The residuals between layers, two cotangents, the head's gradient: as `Engine` keeps them.
    pub kept: usize,
    /// Intermediate results of the largest graph.
    pub scratch: usize,
}

/// Activations of `tokens` tokens, `scored` of them scored, through `depth` layers under an adapter.
///
/// # Errors
/// Without memory for the adapter of one layer.
pub fn activations(
    model: &Model,
    targets: &Targets,
    rank: usize,
    depth: usize,
    tokens: usize,
    scored: usize,
) -> Result<Activations> {
    let (config, weights) = (model.config(), model.weights());
    let d = config.n_embd;
    let kept = 4 * d * (tokens * (depth + 3) + scored);

    let lora = Lora::of_layer(model, targets, rank, 1)?;
    let gradients = lora.zeros_like()?;
    let mut batch = Batch::default();
    let completion = vec![0; tokens];
    batch.push_group(&[0], &[&completion], config.n_vocab)?;
    let arena = Arena::new(512);
    let mut graph = Graph::new(&arena);
    let matrix = |name| arena.input(name, Type::F32, &[d, tokens]);
    let (x, d_out, d_in) = (matrix("x"), matrix("d_out"), matrix("d_in"));
    let positions = arena.input("positions", Type::I32, &[tokens]);
    let adapter = Some(Adapter { lora: &lora, gradients: Some(&gradients) });
    let blocks = LayerBlocks::new(config, &weights, adapter, 1, positions, &batch.segments);
    let (_, saved) = blocks.forward(&arena, x, &Memo::Off);
    if let Some(node) = blocks.vjp(&arena, &mut graph, &saved, d_out, true) {
        graph.store(node, d_in);
    }
    // The three matrices are the engine's kept ones, not the graph's.
    let layer = graph.planned_bytes().saturating_sub(3 * 4 * d * tokens);
    // Hidden states, normed, with their results and gradients: see `Engine::score`.
    let head = 4 * scored * (3 * d + 3);
    Ok(Activations { kept, scratch: layer.max(head) })
}
