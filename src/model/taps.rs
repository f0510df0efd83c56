//! Entropies of every tap of every layer: what the layers think, in nats (PAPER section 1).

use super::engine::Engine;
use super::layer::{Adapter, LayerBlocks};
use super::{Batch, Lora, Model, Policy};
use crate::Result;
use crate::ggml::{Arena, Graph, Input, Type};
use crate::ops;

/// One layer's entropies per token of the batch: `softmax(tap E_u^T)` at temperature 1, no final norm.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct LayerEntropies {
    /// H^(l-1); the same tensor as the layer before's output.
    pub layer_in: Vec<f32>,
    /// norm(H^(l-1))
    pub attn_in: Vec<f32>,
    /// A^l
    pub attn_out: Vec<f32>,
    /// norm(H^(l-1) + A^l)
    pub ffn_in: Vec<f32>,
    /// F^l
    pub ffn_out: Vec<f32>,
    /// H^l
    pub layer_out: Vec<f32>,
}

/// Entropies of all taps, layer by layer, and of the final policy, for every token of the batch.
pub fn tap_entropies(
    engine: &mut Engine,
    model: &Model,
    lora: Option<&Lora>,
    batch: &Batch,
) -> Result<(Vec<LayerEntropies>, Vec<f32>)> {
    let (config, weights, n) = (model.config(), model.weights(), batch.len());
    let mut hidden = engine.embed(model, batch)?;
    let mut layers: Vec<LayerEntropies> = Vec::with_capacity(config.n_layer);
    for layer in 1..=config.n_layer {
        let arena = Arena::new(256);
        let mut graph = Graph::new(&arena);
        let positions = arena.input("positions", Type::I32, &[n]);
        let x = arena.input("residual", Type::F32, &[config.n_embd, n]);
        let adapter = lora.map(|lora| Adapter { lora, gradients: None });
        let blocks = LayerBlocks::new(config, &weights, adapter, layer, positions, &batch.segments);
        let (taps, _) = blocks.forward(&arena, x);
        let mut entropy = |tap| {
            let head = ops::linear_logprob(&arena, tap, weights.unembedding, None, 1.0, false);
            graph.output(head.entropy);
            head.entropy
        };
        let first = layers.is_empty().then(|| entropy(x));
        let nodes =
            [taps.attn_in, taps.attn_out, taps.ffn_in, taps.ffn_out, taps.layer_out].map(entropy);
        graph.output(taps.layer_out);
        let inputs = [(positions, Input::I32(&batch.positions)), (x, Input::F32(&hidden))];
        let computed = engine.executor().run(&graph, &inputs)?;
        let [attn_in, attn_out, ffn_in, ffn_out, layer_out] = nodes.map(|node| computed.f32(node));
        let layer_in = match first {
            Some(node) => computed.f32(node),
            None => layers[layer - 2].layer_out.clone(),
        };
        hidden = computed.f32(taps.layer_out);
        layers.push(LayerEntropies { layer_in, attn_in, attn_out, ffn_in, ffn_out, layer_out });
    }
    let last = engine.entropies_of(model, &hidden, Policy::full(config.n_layer))?;
    Ok((layers, last))
}

impl Engine {
    /// H^0 of a batch: `[D, T]`.
    fn embed(&mut self, model: &Model, batch: &Batch) -> Result<Vec<f32>> {
        let arena = Arena::new(8);
        let mut graph = Graph::new(&arena);
        let ids = arena.input("tokens", Type::I32, &[batch.len()]);
        let rows = arena.rows(model.weights().embedding, ids);
        graph.output(rows);
        let computed = self.executor().run(&graph, &[(ids, Input::I32(&batch.tokens))])?;
        Ok(computed.f32(rows))
    }

    /// Entropies of hidden states `[D, T]` under a policy's head at temperature 1.
    fn entropies_of(&mut self, model: &Model, hidden: &[f32], policy: Policy) -> Result<Vec<f32>> {
        let (d, weights) = (model.config().n_embd, model.weights());
        let arena = Arena::new(32);
        let mut graph = Graph::new(&arena);
        let x = arena.input("hidden", Type::F32, &[d, hidden.len() / d]);
        let mut h = x;
        if policy.has_norm() {
            h = ops::rms_norm(&arena, x, weights.output_norm, model.config().rms_eps);
        }
        let head = ops::linear_logprob(&arena, h, weights.unembedding, None, 1.0, false);
        graph.output(head.entropy);
        let computed = self.executor().run(&graph, &[(x, Input::F32(hidden))])?;
        Ok(computed.f32(head.entropy))
    }
}
