//! Hidden states at the taps of every layer, and what they say through the unembedding (PAPER section 1).

use super::engine::Engine;
use super::lora::Adapter;
use super::memo::Memo;
use super::shared::Shared;
use super::tape::{LAYER_NODES, Parts, Tape};
use super::{Batch, Lora, Model};
use crate::Result;
use crate::ggml::{Arena, Graph, Input, TensorSet, Type};
use crate::ops::{self, Answers, Compare};

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
    /// What the layer's router did, in a mixture of experts.
    pub routing: Option<TokenRouting>,
}

/// Router logits and chosen experts of the picked tokens.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct TokenRouting {
    // [E, S] and [used, S]
    logits: Vec<f32>,
    experts: Vec<f32>,
    n_expert: usize,
    used: usize,
}

impl TokenRouting {
    /// Logits `[E]` of picked token `i`.
    pub fn logits(&self, i: usize) -> &[f32] {
        &self.logits[i * self.n_expert..][..self.n_expert]
    }

    /// Experts that picked token `i` takes, ascending whole numbers.
    pub fn experts(&self, i: usize) -> &[f32] {
        &self.experts[i * self.used..][..self.used]
    }
}

/// A forward pass that stops at every layer. It keeps the residual that the next layer reads and the one that it
/// writes, whatever the depth, where the model is computed.
pub struct Walk<'w> {
    model: &'w Model,
    lora: Option<&'w Lora>,
    batch: &'w Batch,
    picked: &'w [i32],
    // H^layer of all tokens, of even layers and of odd ones: [D, T] each.
    residuals: TensorSet,
    shared: Option<Shared>,
    hidden: Vec<f32>,
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
        let shape = [model.config().n_embd, batch.len(), 1, 1];
        let shapes = ["even", "odd"].map(|name| (name.to_string(), shape));
        let residuals = TensorSet::zeros(model.device(), &shapes)?;
        let (config, device) = (model.config(), model.device());
        let shared = Shared::new(device, config, config.n_layer, batch.len())?;
        let arena = Arena::new(16);
        let mut graph = Graph::new(&arena);
        let ids = arena.input("tokens", Type::I32, &[batch.len()]);
        let picks = arena.input("picked", Type::I32, &[picked.len()]);
        let embedded = model.embed(&arena, ids);
        graph.store(embedded, residuals.get(0));
        let hidden = arena.rows(embedded, picks); // [D, S]
        graph.output(hidden);
        let inputs = [(ids, Input::I32(&batch.tokens)), (picks, Input::I32(picked))];
        let hidden = engine.executor().run(&graph, &inputs)?.f32(hidden);
        Ok(Walk { model, lora, batch, picked, residuals, shared, hidden, layer: 0 })
    }

    /// H^l of the picked tokens, `[D, S]`, of the layer reached; `H^0` at the start.
    pub fn hidden(&self) -> Vec<f32> {
        self.hidden.clone()
    }

    /// Computes the next layer; none after the last.
    pub fn next(&mut self, engine: &mut Engine) -> Result<Option<LayerTaps>> {
        if self.layer == self.model.config().n_layer {
            return Ok(None);
        }
        self.layer += 1;
        let arena = Arena::new(LAYER_NODES);
        let mut graph = Graph::new(&arena);
        let ids = arena.input("picked", Type::I32, &[self.picked.len()]);
        let adapter = self.lora.map(|lora| Adapter { lora, gradients: None });
        let shared = self.shared.as_ref();
        let parts = Parts { shared, ..self.model.parts(adapter, self.batch) };
        let mut tape = Tape::new(&arena, parts, self.layer, Memo::Off);
        let x = tape.leaf(self.residuals.get((self.layer - 1) % 2));
        let taps = self.model.layer(&mut tape, x);
        let taps = tape.nodes(taps);
        let picked = [taps.attn_in, taps.attn_out, taps.ffn_in, taps.ffn_out, taps.layer_out]
            .map(|tap| arena.rows(tap, ids)); // [D, S]
        picked.iter().for_each(|&tap| graph.output(tap));
        let routing = tape.routing().map(|r| [r.logits, r.experts].map(|x| arena.rows(x, ids)));
        routing.iter().flatten().for_each(|&node| graph.output(node));
        graph.store(taps.layer_out, self.residuals.get(self.layer % 2));
        tape.store_shared(&mut graph);
        let mut inputs = tape.inputs();
        inputs.push((ids, Input::I32(self.picked)));
        let computed = engine.executor().run(&graph, &inputs)?;
        let [attn_in, attn_out, ffn_in, ffn_out, layer_out] = picked.map(|tap| computed.f32(tap));
        let routing = routing.map(|[logits, experts]| TokenRouting {
            logits: computed.f32(logits),
            experts: computed.f32(experts),
            n_expert: logits.shape()[0],
            used: experts.shape()[0],
        });
        self.hidden.clone_from(&layer_out);
        Ok(Some(LayerTaps { attn_in, attn_out, ffn_in, ffn_out, layer_out, routing }))
    }
}

/// What is asked of the policies of hidden states: see [`ops::Compare`].
#[derive(Clone, Copy, Debug, Default)]
pub struct Question<'q> {
    /// The token taken at each place.
    pub taken: Option<&'q [i32]>,
    /// Likeliest tokens.
    pub top_k: usize,
}

impl Engine {
    /// The policies at S places through the unembedding (with the adapter's term, where it has one) at temperature 1:
    /// `softmax(h E_u^T)` of the hidden states as they stand, `[D, S]` in each of `hidden`, all compared with the last of
    /// them. Column `i * hidden.len() + m` of the answers is `hidden[m]` at place `i`.
    ///
    /// Memory: the columns of one pass over the vocabulary at a time ([`ops::pass_columns`]).
    pub fn policies(
        &mut self,
        model: &Model,
        lora: Option<&Lora>,
        hidden: &[&[f32]],
        question: Question<'_>,
    ) -> Result<Answers> {
        let (d, group) = (model.config().n_embd, hidden.len());
        let places = hidden[0].len() / d;
        let mut answers = Answers::new(Vec::new(), question.top_k);
        let step = ops::pass_columns(group) / group;
        for first in (0..places).step_by(step) {
            let n = step.min(places - first);
            let columns: Vec<f32> = (first..first + n)
                .flat_map(|i| hidden.iter().flat_map(move |h| &h[i * d..(i + 1) * d]))
                .copied()
                .collect(); // [D, group * n]
            let taken: Option<Vec<i32>> = question.taken.map(|tokens| {
                let repeated = |&token| std::iter::repeat_n(token, group);
                tokens[first..first + n].iter().flat_map(repeated).collect()
            });
            let arena = Arena::new(16);
            let mut graph = Graph::new(&arena);
            let h = arena.input("hidden", Type::F32, &[d, group * n]);
            let mut inputs = vec![(h, Input::F32(&columns))];
            let taken = taken.as_ref().map(|tokens| {
                let node = arena.input("taken", Type::I32, &[group * n]);
                inputs.push((node, Input::I32(tokens)));
                node
            });
            let wanted = Compare { taken, group, top_k: question.top_k };
            let node = ops::policies(&arena, model.head(&arena, h, lora), wanted).values;
            graph.output(node);
            let computed = self.executor().run(&graph, &inputs)?;
            answers.append(computed.f32(node));
        }
        Ok(answers)
    }

    /// Hidden states `[D, C]` after the norm that stands before the unembedding.
    pub fn final_norm(&mut self, model: &Model, hidden: &[f32]) -> Result<Vec<f32>> {
        let d = model.config().n_embd;
        let arena = Arena::new(8);
        let mut graph = Graph::new(&arena);
        let x = arena.input("hidden", Type::F32, &[d, hidden.len() / d]);
        let normed = model.final_norm(&arena, x);
        graph.output(normed);
        let computed = self.executor().run(&graph, &[(x, Input::F32(hidden))])?;
        Ok(computed.f32(normed))
    }
}
