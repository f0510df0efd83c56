//! Mixtures of experts on the tape: a router, stacked maps of which a token takes some, a shared expert's gate.

use super::backward::Walk;
use super::{Step, Tape, Values, Var};
use crate::ggml::{Arena, Graph, Tensor};
use crate::model::lora::Pair;
use crate::ops::{self, Columns, LowRank, RouteSpec, Routes};

/// Where the tokens of a layer go.
#[derive(Clone, Copy)]
pub struct Routed<'a> {
    routes: Routes<'a>,
    // [used, T]
    weights: Var,
    // The same by sorted slot, [S].
    by_slot: Tensor<'a>,
}

/// What a layer's router did, for those who look at it.
#[derive(Clone, Copy)]
pub struct Routing<'a> {
    /// Router logits, `[E, T]`.
    pub logits: Tensor<'a>,
    /// The experts that it chose, or would have chosen, ascending, `[used, T]`: whole numbers.
    pub experts: Tensor<'a>,
}

/// A stacked map: its weight and its adapter's part.
pub(super) struct Stack<'a> {
    weight: Tensor<'a>,
    pair: Option<Pair<'a>>,
    // A x of each slot, [r, S].
    u: Option<Tensor<'a>>,
}

/// What is walked back of a mixture.
pub(super) enum ExpertStep<'a> {
    Route { logits: Var, weights: Var, experts: Tensor<'a>, spec: RouteSpec },
    Each { x: Var, y: Var, stack: Stack<'a>, routes: Routes<'a> },
    Sum { h: Var, y: Var, stack: Stack<'a>, bias: Option<Tensor<'a>>, to: Routed<'a> },
    Gate { x: Var, gate: Var, y: Var },
}

impl<'a> Tape<'a> {
    /// Sends the tokens of h `[D, T]` to experts by the router of this name, a linear map `[D, E]`; where the batch says
    /// which experts its tokens take in this layer, to those.
    pub fn route(&mut self, h: Var, name: &str, n_expert: usize, spec: RouteSpec) -> Routed<'a> {
        let logits = self.linear(h, name, n_expert);
        self.keep(logits);
        let (arena, z, tokens) = (self.arena, self.node(logits), self.tokens());
        let batch = self.parts.batch;
        let known = batch.experts.get(self.layer - 1).filter(|_| batch.replays);
        let given = known.map(|_| {
            let layer = self.layer;
            let shape = [spec.used, tokens];
            self.input("experts", &shape, |b| Values::F32(b.experts[layer - 1].clone()))
        });
        let (weights, experts) = ops::route(arena, z, spec, None, given);
        let order = ops::route_order(arena, experts, n_expert);
        let routes = Routes { order, n_expert, used: spec.used, tokens };
        let by_slot = ops::slot_weights(arena, weights, &routes);
        let weights = self.push(weights, false);
        self.steps.push(Step::Experts(ExpertStep::Route { logits, weights, experts, spec }));
        // Where others were given, what it would have chosen.
        let own = given.map(|_| ops::route(arena, z, spec, None, None).1);
        self.routing = Some(Routing { logits: z, experts: own.unwrap_or(experts) });
        Routed { routes, weights, by_slot }
    }

    /// The router's logits and choices, of a layer that has one.
    pub fn routing(&self) -> Option<Routing<'a>> {
        self.routing
    }

    /// What each token's experts make of x `[n_in, T]`, one column per token and expert, sorted by expert: `[n_out, S]`.
    pub fn each_expert(&mut self, x: Var, name: &str, n_out: usize, to: &Routed<'a>) -> Var {
        let n_in = self.node(x).shape()[0];
        let (stack, bias) = self.stack((x, Columns::Tokens), name, [n_in, n_out], &to.routes);
        let low = low_rank(&stack);
        let input = (self.node(x), Columns::Tokens);
        let node = ops::experts(self.arena, stack.weight, input, &to.routes, low, bias);
        let y = self.push(node, true);
        self.steps.push(Step::Experts(ExpertStep::Each { x, y, stack, routes: to.routes }));
        y
    }

    /// What each token's experts make of their own columns of h `[n_in, S]`, weighed and summed up: `[n_out, T]`.
    pub fn sum_experts(&mut self, h: Var, name: &str, n_out: usize, to: &Routed<'a>) -> Var {
        let n_in = self.node(h).shape()[0];
        let (stack, bias) = self.stack((h, Columns::Slots), name, [n_in, n_out], &to.routes);
        let (input, low) = (self.node(h), low_rank(&stack));
        let node =
            ops::experts_sum(self.arena, stack.weight, input, to.by_slot, &to.routes, low, bias);
        let y = self.push(node, true);
        self.steps.push(Step::Experts(ExpertStep::Sum { h, y, stack, bias, to: *to }));
        y
    }

    /// A stack of maps, its bias, and the first half of its adapter's term.
    fn stack(
        &mut self,
        (x, columns): (Var, Columns),
        name: &str,
        [n_in, n_out]: [usize; 2],
        routes: &Routes<'a>,
    ) -> (Stack<'a>, Option<Tensor<'a>>) {
        let weight = self.weight(&format!("{name}.weight"), &[n_in, n_out, routes.n_expert]);
        let bias = self.find_weight(&format!("{name}.bias"), &[n_out, routes.n_expert]);
        if let Some(dry) = &mut self.dry {
            dry.experts(self.layer, name, [n_in, n_out, routes.n_expert]);
        }
        let pair = self.parts.adapter.and_then(|a| a.pair(self.layer, name));
        let u = pair.map(|pair| {
            self.keep(x); // dA takes it
            let input = (self.node(x), columns);
            self.memo.node(ops::experts(self.arena, pair.a, input, routes, None, None)) // [r, S]
        });
        (Stack { weight, pair, u }, bias)
    }

    /// Each token's column of x `[n, T]` times the sigmoid of its number in gate `[1, T]`.
    pub fn gate_tokens(&mut self, x: Var, gate: Var) -> Var {
        self.keep(x);
        self.keep(gate);
        let node = ops::gate_rows(self.arena, self.node(x), self.node(gate));
        let y = self.push_cheap(node, &[]);
        self.steps.push(Step::Experts(ExpertStep::Gate { x, gate, y }));
        y
    }
}

/// `s B u`, if the stack is adapted.
fn low_rank<'a>(stack: &Stack<'a>) -> Option<LowRank<'a>> {
    let (pair, input) = stack.pair.zip(stack.u)?;
    Some(LowRank { factor: pair.b, input, scale: pair.scale })
}

impl ExpertStep<'_> {
    /// Marks the results whose cotangents are needed.
    pub(super) fn need(&self, needs: &mut [bool]) {
        let trained = |stack: &Stack<'_>| stack.pair.is_some_and(|pair| pair.gradient.is_some());
        match self {
            ExpertStep::Route { logits, weights, .. } => needs[weights.0] |= needs[logits.0],
            ExpertStep::Each { x, y, stack, .. } => needs[y.0] |= trained(stack) || needs[x.0],
            ExpertStep::Sum { h, y, stack, to, .. } => {
                needs[y.0] |= trained(stack) || needs[h.0] || needs[to.weights.0];
            }
            ExpertStep::Gate { x, gate, y } => needs[y.0] |= needs[x.0] || needs[gate.0],
        }
    }
}

impl<'a> Walk<'a> {
    pub(super) fn expert_step(
        &mut self,
        tape: &Tape<'a>,
        graph: &mut Graph<'a>,
        step: &ExpertStep<'a>,
    ) {
        let arena = self.arena;
        match step {
            ExpertStep::Route { logits, weights, experts, spec } => {
                let (Some(dw), true) = (self.of(*weights), self.needs(*logits)) else { return };
                let z = tape.node(*logits);
                self.add(*logits, ops::route_back(arena, z, *experts, dw, *spec));
            }
            ExpertStep::Each { x, y, stack, routes } => {
                let Some(dy) = self.of(*y) else { return };
                self.each(graph, (*x, tape.node(*x)), dy, stack, routes);
            }
            ExpertStep::Sum { h, y, stack, bias, to } => {
                let Some(dy) = self.of(*y) else { return };
                self.sum(graph, (*h, tape.node(*h)), dy, stack, *bias, to);
            }
            ExpertStep::Gate { x, gate, y } => {
                let Some(dy) = self.of(*y) else { return };
                let (dx, dg) = ops::gate_rows_back(arena, tape.node(*x), tape.node(*gate), dy);
                self.add(*x, dx);
                self.add(*gate, dg);
            }
        }
    }

    /// As a linear map's way back, over the slots of each expert; dx is summed up by token.
    fn each(
        &mut self,
        graph: &mut Graph<'a>,
        (x, input): (Var, Tensor<'a>),
        dy: Tensor<'a>,
        stack: &Stack<'a>,
        routes: &Routes<'a>,
    ) {
        let arena = self.arena;
        let low = stack.pair.zip(stack.u).map(|(pair, u)| {
            let du = factor_back(arena, &pair, (dy, Columns::Slots), routes); // [r, S]
            if let Some((d_a, d_b)) = pair.gradient {
                let (slots, tokens) = (Columns::Slots, Columns::Tokens);
                let d_b =
                    ops::experts_outer(arena, d_b, (u, slots), (dy, slots), routes, pair.scale);
                graph.add(d_b);
                let d_a = ops::experts_outer(
                    arena,
                    d_a,
                    (input, tokens),
                    (du, slots),
                    routes,
                    pair.scale,
                );
                graph.add(d_a);
            }
            LowRank { factor: pair.a, input: du, scale: pair.scale }
        });
        if self.needs(x) {
            let so_far = self.of(x);
            let d = ops::experts_back_sum(arena, stack.weight, dy, routes, low, so_far);
            self.set(x, d);
        }
    }

    /// With `g = W^T dy` of each slot: dh is g times the slot's weight, and the weight's cotangent the product of g and h.
    fn sum(
        &mut self,
        graph: &mut Graph<'a>,
        (h, input): (Var, Tensor<'a>),
        dy: Tensor<'a>,
        stack: &Stack<'a>,
        bias: Option<Tensor<'a>>,
        to: &Routed<'a>,
    ) {
        let (arena, routes) = (self.arena, &to.routes);
        let (slots, tokens) = (Columns::Slots, Columns::Tokens);
        let low = stack.pair.zip(stack.u).map(|(pair, u)| {
            let du = factor_back(arena, &pair, (dy, tokens), routes); // [r, S]
            if let Some((d_a, d_b)) = pair.gradient {
                let weighed = |t| ops::scale_rows(arena, t, to.by_slot);
                let u = (weighed(u), slots);
                graph.add(ops::experts_outer(arena, d_b, u, (dy, tokens), routes, pair.scale));
                let du = (weighed(du), slots);
                graph.add(ops::experts_outer(arena, d_a, (input, slots), du, routes, pair.scale));
            }
            LowRank { factor: pair.a, input: du, scale: pair.scale }
        });
        if self.needs(h) || self.needs(to.weights) {
            let g = ops::experts_back(arena, stack.weight, (dy, tokens), routes, low); // [n_in, S]
            if self.needs(to.weights) {
                let bias = bias.map(|bias| (bias, dy));
                self.add(to.weights, ops::weights_back(arena, g, input, bias, routes));
            }
            self.add(h, ops::scale_rows(arena, g, to.by_slot));
        }
    }
}

/// `B^T dy` of each slot.
fn factor_back<'a>(
    arena: &'a Arena,
    pair: &Pair<'a>,
    dy: (Tensor<'a>, Columns),
    routes: &Routes<'a>,
) -> Tensor<'a> {
    ops::experts_back(arena, pair.b, dy, routes, None)
}
