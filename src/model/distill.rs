//! A policy of a student beside its teacher's final policy on the same tokens, and what the backward needs of it.

use super::{Batch, ComparedModel, Engine, Model, Policy};
use crate::Result;
use crate::ggml::{Arena, Graph, Input, Type};
use crate::ops::{self, DistillSpec, Head};

/// What a teacher says of a batch's scored tokens: H^L there, `[D', S]`.
pub struct TeacherHidden<'t> {
    model: &'t Model,
    hidden: Vec<f32>,
}

impl<'t> TeacherHidden<'t> {
    /// The teacher's forward over a batch.
    ///
    /// # Errors
    /// Those of [`Engine::forward`].
    pub fn new(
        engine: &mut Engine,
        model: &'t Model,
        lora: Option<&super::Lora>,
        batch: &Batch,
    ) -> Result<TeacherHidden<'t>> {
        let hidden = match batch.scored.is_empty() {
            true => Vec::new(),
            false => ComparedModel { engine, model, lora }.hidden(batch)?,
        };
        Ok(TeacherHidden { model, hidden })
    }
}

/// One value for each scored token of a batch, in its order.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Divergences {
    /// The student's divergence from the teacher, nats.
    pub nats: Vec<f32>,
    /// Entropy of the student's policy at the temperature, nats.
    pub entropies: Vec<f32>,
}

impl Engine {
    /// As [`Engine::score`] of the last forward, with the divergence from a teacher in place of the log-probs: its
    /// gradient is kept, so that [`Engine::backward`] takes the cotangents of the divergences.
    ///
    /// # Errors
    /// See [`crate::ggml::Executor::run`].
    pub fn diverge(
        &mut self,
        model: &Model,
        batch: &Batch,
        policy: Policy,
        teacher: &TeacherHidden<'_>,
        spec: DistillSpec,
    ) -> Result<Divergences> {
        if batch.scored.is_empty() {
            return Ok(Divergences::default());
        }
        let (n, s) = (batch.len(), batch.scored.len());
        let kept = self.kept.as_ref().expect("diverge follows forward");
        let rows: Vec<i32> = batch.scored.iter().map(|s| s.row).collect();

        let arena = Arena::new(48);
        let mut graph = Graph::new(&arena);
        let row_ids = arena.input("rows", Type::I32, &[s]);
        let mut hidden = arena.rows(kept.residual(&arena, policy.depth(), n), row_ids); // [D, S]
        if policy.has_norm() {
            hidden = model.final_norm(&arena, hidden);
        }
        let given = arena.input("teacher", Type::F32, &[teacher.model.config().n_embd, s]);
        let heads = [(model, hidden), (teacher.model, teacher.model.final_norm(&arena, given))]
            .map(|(model, hidden)| {
                Head::new(hidden, model.weights().unembedding(), model.config().logits)
            });
        let known =
            heads.map(|head| ops::linear_logprob(&arena, head, None, spec.inv_temperature, false));
        let [student, teacher_head] = heads;
        let lse = known.map(|of| of.lse);
        let distilled = ops::distill(&arena, student, teacher_head, lse, spec);
        graph.output(distilled.divergence);
        graph.output(known[0].entropy);
        graph.store(distilled.gradient, arena.row_range(kept.head.get(0), 0, s));
        let inputs = [(row_ids, Input::I32(&rows)), (given, Input::F32(&teacher.hidden))];
        let computed = self.executor.run(&graph, &inputs)?;
        let [nats, entropies] =
            [distilled.divergence, known[0].entropy].map(|node| computed.f32(node));
        Ok(Divergences { nats, entropies })
    }
}
