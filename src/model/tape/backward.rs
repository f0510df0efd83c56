//! The way back: a tape's steps in reverse.

use super::mixers::joined;
use super::{Pair, Rows, Step, Tape, Var, runs};
use crate::ggml::{Arena, Graph, Tensor};
use crate::ops;

impl<'a> Tape<'a> {
    /// [`Tape::backward`] of a layer from its output's cotangent to its input's, with the cotangents of keys and
    /// values that layers share: a layer that reads another's adds to them, the one that gives them goes on from there.
    pub fn backward_shared(
        &self,
        graph: &mut Graph<'a>,
        out: (Var, Tensor<'a>),
        wanted: Option<Var>,
    ) -> Option<Tensor<'a>> {
        let (arena, tokens) = (self.arena, self.parts.batch.len());
        let of = |donor| self.parts.shared.and_then(|s| s.cotangents(arena, donor, tokens));
        let mut given = vec![out];
        if let (Some(kv), Some(d)) = (self.gives, of(self.layer)) {
            given.extend(kv.into_iter().zip(d));
        }
        let mut all: Vec<Var> = wanted.into_iter().collect();
        let taken = self.takes.and_then(|(donor, kv)| Some((kv, of(donor)?)));
        all.extend(taken.iter().flat_map(|(kv, _)| *kv));
        let mut found = self.backward(graph, &given, &all).into_iter();
        let d_in = wanted.and_then(|_| found.next().flatten());
        let sums = taken.into_iter().flat_map(|(_, so_far)| so_far);
        for (d, so_far) in found.zip(sums) {
            if let Some(d) = d {
                graph.store(arena.add(so_far, d), so_far);
            }
        }
        d_in
    }

    /// Cotangents of the values `wanted`, from those of some others; gradients of the adapter on the way.
    ///
    /// A value's cotangent is computed where it depends on a value that is wanted, or on an adapter with a gradient;
    /// one on which nothing depends has none.
    pub fn backward(
        &self,
        graph: &mut Graph<'a>,
        given: &[(Var, Tensor<'a>)],
        wanted: &[Var],
    ) -> Vec<Option<Tensor<'a>>> {
        let mut walk = Walk {
            arena: self.arena,
            eps: self.parts.config.rms_eps,
            needs: self.needs(wanted),
            cotangents: vec![None; self.values.len()],
        };
        for &(v, d) in given {
            walk.add(v, d);
        }
        for step in self.steps.iter().rev() {
            walk.step(self, graph, step);
        }
        wanted.iter().map(|v| walk.cotangents[v.0]).collect()
    }

    /// Which values' cotangents are needed.
    fn needs(&self, wanted: &[Var]) -> Vec<bool> {
        let mut needs = vec![false; self.values.len()];
        wanted.iter().for_each(|v| needs[v.0] = true);
        for step in &self.steps {
            match step {
                Step::Linear { x, rows, pair, .. } => {
                    let trained = pair.is_some_and(|pair| pair.gradient.is_some());
                    rows.iter().for_each(|r| needs[r.y.0] |= trained || needs[x.0]);
                }
                Step::Attention { q, k, v, y, .. } => {
                    needs[y.0] |= needs[q.0] || needs[k.0] || needs[v.0];
                }
                Step::Delta { qkv, alpha, beta, y, .. } => {
                    needs[y.0] |= needs[qkv.0] || needs[alpha.0] || needs[beta.0];
                }
                Step::Halves { x, ys, .. } => ys.iter().for_each(|y| needs[y.0] |= needs[x.0]),
                Step::Glu { gate: a, up: b, y, .. } | Step::Add { a, b, y } => {
                    needs[y.0] |= needs[a.0] || needs[b.0];
                }
                Step::Norm { x, y, .. }
                | Step::Conv { x, y, .. }
                | Step::Rope { x, y, .. }
                | Step::Scale { x, y, .. }
                | Step::ScaleTokens { x, y, .. } => needs[y.0] |= needs[x.0],
                Step::Experts(step) => step.need(&mut needs),
            }
        }
        needs
    }
}

/// The way back.
pub(super) struct Walk<'a> {
    pub(super) arena: &'a Arena,
    eps: f32,
    needs: Vec<bool>,
    // d_name is the cotangent of name; of each value, as far as it has been summed up.
    cotangents: Vec<Option<Tensor<'a>>>,
}

impl<'a> Walk<'a> {
    /// Whether a value's cotangent is needed.
    pub(super) fn needs(&self, v: Var) -> bool {
        self.needs[v.0]
    }

    /// A value's cotangent so far.
    pub(super) fn of(&self, v: Var) -> Option<Tensor<'a>> {
        self.cotangents[v.0]
    }

    /// A value's cotangent, what it was so far included.
    pub(super) fn set(&mut self, v: Var, d: Tensor<'a>) {
        self.cotangents[v.0] = Some(d);
    }

    pub(super) fn add(&mut self, v: Var, d: Tensor<'a>) {
        if self.needs[v.0] {
            let sum = self.cotangents[v.0].map_or(d, |so_far| self.arena.add(so_far, d));
            self.cotangents[v.0] = Some(sum);
        }
    }

    fn step(&mut self, tape: &Tape<'a>, graph: &mut Graph<'a>, step: &Step<'a>) {
        let arena = self.arena;
        let of = |walk: &Walk<'a>, y: Var| walk.cotangents[y.0];
        match step {
            Step::Linear { x, rows, pair, u } => {
                let input = tape.node(*x);
                self.linear(graph, (*x, input), rows, pair.zip(*u));
            }
            Step::Norm { x, y, weight, width } => {
                let (Some(dy), true) = (of(self, *y), self.needs[x.0]) else { return };
                let (so_far, eps) = (of(self, *x), self.eps);
                let runs = |t| runs(arena, t, *width);
                let input = runs(tape.node(*x));
                match weight {
                    None => {
                        let d = tape.in_runs(dy, *width, |dy| arena.rms_norm_back(dy, input, eps));
                        self.add(*x, d);
                    }
                    Some(weight) => {
                        let add = so_far.map(runs);
                        self.cotangents[x.0] = Some(tape.in_runs(dy, *width, |dy| {
                            ops::rms_norm_back(arena, input, *weight, dy, add, eps)
                        }));
                    }
                }
            }
            Step::Rope { x, y, rope, factors } => {
                let (Some(dy), true) = (of(self, *y), self.needs[x.0]) else { return };
                let (_, positions, _) =
                    tape.inputs.iter().find(|i| i.0 == "positions").expect("made by the step");
                let size = tape.layer().head_size;
                let d =
                    tape.in_heads(dy, size, |dy| arena.rope_back(dy, *positions, *factors, rope));
                self.add(*x, d);
            }
            Step::Attention { q, k, v, y, saved } => {
                let Some(dy) = of(self, *y) else { return };
                let d = ops::attention_back(arena, saved, dy);
                [*q, *k, *v].into_iter().zip(d).for_each(|(x, d)| self.add(x, d));
            }
            Step::Conv { x, y, weight } => {
                let (Some(dy), true) = (of(self, *y), self.needs[x.0]) else { return };
                let (input, segments) = (tape.node(*x), &tape.parts.batch.segments);
                self.add(*x, ops::conv_silu_back(arena, input, *weight, dy, segments));
            }
            Step::Delta { qkv, alpha, beta, y, saved } => {
                let Some(dy) = of(self, *y) else { return };
                let d = ops::delta_back(arena, saved, dy);
                [*qkv, *alpha, *beta].into_iter().zip(d).for_each(|(x, d)| self.add(x, d));
            }
            Step::Halves { x, ys, size } => {
                if !self.needs[x.0] {
                    return;
                }
                let d = ys.map(|y| of(self, y).expect("both halves reach what is given"));
                self.add(*x, joined(arena, d, *size));
            }
            Step::Glu { gate, up, y, act } => {
                let Some(dy) = of(self, *y) else { return };
                let (gate_in, up_in) = (tape.node(*gate), tape.node(*up));
                let (d_gate, d_up) = ops::glu_back(arena, gate_in, up_in, dy, *act);
                self.add(*gate, d_gate);
                self.add(*up, d_up);
            }
            Step::Add { a, b, y } => {
                let Some(dy) = of(self, *y) else { return };
                self.add(*a, dy);
                self.add(*b, dy);
            }
            Step::Scale { x, y, by } => {
                let Some(dy) = of(self, *y) else { return };
                self.add(*x, arena.scale(dy, *by));
            }
            Step::ScaleTokens { x, y, by } => {
                let Some(dy) = of(self, *y) else { return };
                self.add(*x, ops::scale_rows(arena, dy, *by));
            }
            Step::Experts(step) => self.expert_step(tape, graph, step),
        }
    }

    /// `dx = W^T dy + s A^T B^T dy`, `dB = s dy (A x)^T`, `dA = s (B^T dy) x^T`, over all parts of the map.
    fn linear(
        &mut self,
        graph: &mut Graph<'a>,
        (x, input): (Var, Tensor<'a>),
        rows: &[Rows<'a>],
        adapted: Option<(Pair<'a>, Tensor<'a>)>,
    ) {
        let arena = self.arena;
        let parts: Vec<_> =
            rows.iter().filter_map(|r| Some((r, self.cotangents[r.y.0]?))).collect();
        if parts.is_empty() {
            return;
        }
        let mut low = None;
        if let Some((pair, u)) = adapted {
            let mut du = None;
            for (rows, dy) in &parts {
                let b = rows.b.expect("an adapted map has B");
                du = Some(ops::linear_back(arena, b, *dy, None, du)); // B^T dy: [r, T]
                if let Some(d_b) = rows.d_b {
                    graph.add(ops::outer(arena, d_b, u, *dy, pair.scale)); // [r, n_out]
                }
            }
            let du = du.expect("at least one part");
            if let Some((d_a, _)) = pair.gradient {
                graph.add(ops::outer(arena, d_a, input, du, pair.scale)); // [n_in, r]
            }
            low = Some(ops::LowRank { factor: pair.a, input: du, scale: pair.scale });
        }
        if self.needs[x.0] {
            for (rows, dy) in &parts {
                let so_far = self.cotangents[x.0];
                let d = ops::linear_back(arena, rows.weight, *dy, low.take(), so_far);
                self.cotangents[x.0] = Some(d);
            }
        }
    }
}
