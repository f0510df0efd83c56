//! Two models' final policies on the same tokens, exact forwards of both.

use super::{Batch, Engine, Lora, Model};
use crate::Result;
use crate::ggml::{Arena, Graph, Input, Type};
use crate::ops;

/// One of two models that are compared: with its own engine, so that both keep their activations.
pub struct ComparedModel<'c> {
    /// Forwards.
    pub engine: &'c mut Engine,
    /// Model.
    pub model: &'c Model,
    /// Adapter.
    pub lora: Option<&'c Lora>,
}

/// One value for each scored token of a batch, in its order.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Comparison {
    /// KL(p || q), nats; 0 exactly where both compute the same logits.
    pub kl_nats: Vec<f32>,
    /// log p(target), nats.
    pub logprob_p: Vec<f32>,
    /// log q(target), nats.
    pub logprob_q: Vec<f32>,
    /// 1 where both have the same likeliest token.
    pub agree: Vec<f32>,
}

/// Compares the final policies of p and q, whose vocabularies are the same, at temperature 1.
pub fn compare(p: &mut ComparedModel, q: &mut ComparedModel, batch: &Batch) -> Result<Comparison> {
    if batch.scored.is_empty() {
        return Ok(Comparison::default());
    }
    let hidden = [p.hidden(batch)?, q.hidden(batch)?]; // [D, S]
    let targets: Vec<i32> = batch.scored.iter().map(|s| s.target).collect();
    let s = targets.len();
    let arena = Arena::new(32);
    let mut graph = Graph::new(&arena);
    let target = arena.input("targets", Type::I32, &[s]);
    let inputs = [(p.model, p.lora), (q.model, q.lora)].map(|(model, lora)| {
        let x = arena.input("hidden", Type::F32, &[model.config().n_embd, s]);
        (x, model.head(&arena, model.final_norm(&arena, x), lora))
    });
    let d = ops::divergence(&arena, inputs[0].1, inputs[1].1, target);
    let nodes = [d.kl, d.logprob_p, d.logprob_q, d.agree];
    nodes.into_iter().for_each(|node| graph.output(node));
    let values = [
        (inputs[0].0, Input::F32(&hidden[0])),
        (inputs[1].0, Input::F32(&hidden[1])),
        (target, Input::I32(&targets)),
    ];
    let computed = p.engine.executor().run(&graph, &values)?;
    let [kl_nats, logprob_p, logprob_q, agree] = nodes.map(|node| computed.f32(node));
    Ok(Comparison { kl_nats, logprob_p, logprob_q, agree })
}

impl ComparedModel<'_> {
    /// H^L of the scored tokens: `[D, S]`.
    pub(super) fn hidden(&mut self, batch: &Batch) -> Result<Vec<f32>> {
        let config = self.model.config();
        self.engine.forward(self.model, self.lora, batch, config.n_layer)?;
        let (d, all) = (config.n_embd, self.engine.residual(config.n_layer, batch.len()));
        let rows = batch.scored.iter().flat_map(|s| &all[s.row as usize * d..][..d]);
        Ok(rows.copied().collect())
    }
}
