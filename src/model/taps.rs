//! Hidden states at the taps of every layer, and what they say through the unembedding (PAPER section 1).

use super::engine::Engine;
use super::layer::{Adapter, LayerBlocks};
use super::memo::Memo;
use super::{Batch, Lora, Model};
use crate::Result;
use crate::ggml::{Arena, Graph, Input, Type};
use crate::ops::{self, Answers, Compare, LogitMap};

/// What one layer computes at the picked tokens, `[D, S]` each. Its input is the layer below's output.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct LayerTaps {
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

/// A forward pass that stops at every layer. It keeps one residual, whatever the depth.
pub struct Walk<'w> {
    model: &'w Model,
    lora: Option<&'w Lora>,
    batch: &'w Batch,
    picked: &'w [i32],
    // H^layer of all tokens: [D, T]
    residual: Vec<f32>,
    layer: usize,
}

impl<'w> Walk<'w> {
    /// Starts at the embeddings of `batch`. `picked`: the tokens whose taps are wanted, in range.
    pub fn new(
        engine: &mut Engine,
        model: &'w Model,
        lora: Option<&'w Lora>,
        batch: &'w Batch,
        picked: &'w [i32],
    ) -> Result<Walk<'w>> {
        let arena = Arena::new(8);
        let mut graph = Graph::new(&arena);
        let ids = arena.input("tokens", Type::I32, &[batch.len()]);
        let rows = arena.rows(model.weights().embedding, ids);
        graph.output(rows);
        let computed = engine.executor().run(&graph, &[(ids, Input::I32(&batch.tokens))])?;
        let residual = computed.f32(rows);
        Ok(Walk { model, lora, batch, picked, residual, layer: 0 })
    }

    /// H^l of the picked tokens, `[D, S]`, of the layer reached; `H^0` at the start.
    pub fn hidden(&self) -> Vec<f32> {
        let d = self.model.config().n_embd;
        let row = |&t: &i32| &self.residual[t as usize * d..][..d];
        self.picked.iter().flat_map(row).copied().collect()
    }

    /// Computes the next layer; none after the last.
    pub fn next(&mut self, engine: &mut Engine) -> Result<Option<LayerTaps>> {
        let (config, n) = (self.model.config(), self.batch.len());
        if self.layer == config.n_layer {
            return Ok(None);
        }
        self.layer += 1;
        let weights = self.model.weights();
        let arena = Arena::new(256);
        let mut graph = Graph::new(&arena);
        let positions = arena.input("positions", Type::I32, &[n]);
        let ids = arena.input("picked", Type::I32, &[self.picked.len()]);
        let x = arena.input("residual", Type::F32, &[config.n_embd, n]);
        let adapter = self.lora.map(|lora| Adapter { lora, gradients: None });
        let segments = &self.batch.segments;
        let blocks = LayerBlocks::new(config, &weights, adapter, self.layer, positions, segments);
        let (taps, _) = blocks.forward(&arena, x, &Memo::Off);
        let picked = [taps.attn_in, taps.attn_out, taps.ffn_in, taps.ffn_out]
            .map(|tap| arena.rows(tap, ids)); // [D, S]
        picked.iter().for_each(|&tap| graph.output(tap));
        graph.output(taps.layer_out);
        let inputs = [
            (positions, Input::I32(&self.batch.positions)),
            (ids, Input::I32(self.picked)),
            (x, Input::F32(&self.residual)),
        ];
        let computed = engine.executor().run(&graph, &inputs)?;
        let [attn_in, attn_out, ffn_in, ffn_out] = picked.map(|tap| computed.f32(tap));
        self.residual = computed.f32(taps.layer_out);
        let layer_out = self.hidden();
        Ok(Some(LayerTaps { attn_in, attn_out, ffn_in, ffn_out, layer_out }))
    }
}

/// What is asked of hidden states: see [`ops::Compare`].
#[derive(Clone, Copy, Debug)]
pub struct Question<'q> {
    /// The token taken at each column.
    pub taken: Option<&'q [i32]>,
    /// Columns come in groups of this many; each is compared with the last of its group.
    pub group: usize,
    /// Likeliest tokens.
    pub top_k: usize,
}

impl Engine {
    /// The policies of hidden states `[D, C]` at temperature 1: `softmax(h E_u^T)`, as they stand.
    pub fn policies(
        &mut self,
        model: &Model,
        hidden: &[f32],
        question: &Question<'_>,
    ) -> Result<Answers> {
        let (d, weights) = (model.config().n_embd, model.weights());
        let columns = hidden.len() / d;
        let arena = Arena::new(16);
        let mut graph = Graph::new(&arena);
        let h = arena.input("hidden", Type::F32, &[d, columns]);
        let mut inputs = vec![(h, Input::F32(hidden))];
        let taken = question.taken.map(|tokens| {
            let node = arena.input("taken", Type::I32, &[columns]);
            inputs.push((node, Input::I32(tokens)));
            node
        });
        let wanted = Compare { taken, group: question.group, top_k: question.top_k };
        let node =
            ops::policies(&arena, h, weights.unembedding, wanted, LogitMap::default()).values;
        graph.output(node);
        let computed = self.executor().run(&graph, &inputs)?;
        Ok(Answers::new(computed.f32(node), question.top_k))
    }

    /// Hidden states `[D, C]` after the norm that stands before the unembedding.
    pub fn final_norm(&mut self, model: &Model, hidden: &[f32]) -> Result<Vec<f32>> {
        let (d, eps) = (model.config().n_embd, model.config().rms_eps);
        let arena = Arena::new(8);
        let mut graph = Graph::new(&arena);
        let x = arena.input("hidden", Type::F32, &[d, hidden.len() / d]);
        let normed = ops::rms_norm(&arena, x, model.weights().output_norm, eps);
        graph.output(normed);
        let computed = self.executor().run(&graph, &[(x, Input::F32(hidden))])?;
        Ok(computed.f32(normed))
    }
}
