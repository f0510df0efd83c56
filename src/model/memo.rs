//! Activations kept from the forward for the backward, as far as memory is given for them.
//!
//! A layer's forward asks a [`Memo`] for every node that is dear to compute: in a training forward they are
//! recorded and copied into kept memory, in the backward they are read from there instead of being built
//! again. What is cheap beside the copy (norms, rotations, SwiGLU) is always computed again. The values are
//! the same bits either way.

use std::cell::{Cell, RefCell};

use crate::Result;
use crate::ggml::{Arena, Device, Graph, Shape, Tensor, TensorSet};

/// Kept parts begin at multiples of this many floats: a cache line.
const ALIGN: usize = 16;

/// Where a forward's dear nodes go, or come from.
pub enum Memo<'a> {
    /// Built, and nothing more.
    Off,
    /// Built and noted.
    Record(RefCell<Vec<Tensor<'a>>>),
    /// Read, in the order in which they were noted.
    Replay(Vec<Tensor<'a>>, Cell<usize>),
}

impl<'a> Memo<'a> {
    /// Notes the nodes.
    pub fn record() -> Memo<'a> {
        Memo::Record(RefCell::default())
    }

    /// The node that `build` makes, or what was kept of it.
    pub fn node(&self, build: impl FnOnce() -> Tensor<'a>) -> Tensor<'a> {
        match self {
            Memo::Off => build(),
            Memo::Record(nodes) => {
                let node = build();
                nodes.borrow_mut().push(node);
                node
            }
            Memo::Replay(nodes, next) => nodes[next.replace(next.get() + 1)],
        }
    }
}

/// Memory for the kept activations of some layers, reused by batch after batch.
#[derive(Default)]
pub(super) struct Activations {
    /// Bytes that may be taken; none keeps nothing.
    budget: usize,
    // One tensor per layer, 1 to n, and the shapes of what it holds of the last forward.
    memory: Option<TensorSet>,
    shapes: Vec<Vec<Shape>>,
}

impl Activations {
    pub(super) fn set_budget(&mut self, bytes: usize) {
        self.budget = bytes;
    }

    /// Forgets what was kept, not the memory.
    pub(super) fn forget(&mut self) {
        self.shapes.clear();
    }

    /// Gives the memory back.
    pub(super) fn release(&mut self) {
        self.forget();
        self.memory = None;
    }

    /// Bytes taken.
    pub(super) fn n_bytes(&self) -> usize {
        self.memory.as_ref().map_or(0, TensorSet::n_bytes)
    }

    /// Layers, from the lowest, of which something is kept.
    pub(super) fn layers(&self) -> usize {
        self.shapes.len()
    }

    /// Room for as many of `depth` layers as the budget allows, each with `floats` at most.
    pub(super) fn reserve(&mut self, device: Device, depth: usize, floats: usize) -> Result<()> {
        self.forget();
        let n = depth.min(self.budget / (4 * floats.max(1)));
        // What was made for a larger batch may stay, unless it leaves much of the budget unused.
        let fits = |m: &TensorSet| {
            m.get(0).len() >= floats && (m.len() >= n || m.n_bytes() >= self.budget / 2)
        };
        if n == 0 || self.memory.as_ref().is_some_and(fits) {
            return Ok(());
        }
        // Given back first, so that never both exist.
        self.memory = None;
        let shapes: Vec<_> = (0..n).map(|i| (format!("kept-{i}"), [floats, 1, 1, 1])).collect();
        self.memory = Some(TensorSet::zeros(device, &shapes)?);
        Ok(())
    }

    /// Whether there is room for this layer (from 1) of a batch that takes `floats`.
    pub(super) fn takes(&self, layer: usize, floats: usize) -> bool {
        let room = self.memory.as_ref().map_or(0, |m| m.len().min(self.budget / (4 * floats)));
        layer == self.shapes.len() + 1 && layer <= room
    }

    /// Adds copies of the next layer's noted nodes to the graph.
    pub(super) fn store<'a>(&'a mut self, arena: &'a Arena, graph: &mut Graph<'a>, memo: Memo<'a>) {
        let (Memo::Record(nodes), Some(memory)) = (memo, &self.memory) else { return };
        let layer = memory.get(self.shapes.len());
        let nodes = nodes.into_inner();
        self.shapes.push(nodes.iter().map(|node| node.shape()).collect());
        for (node, kept) in nodes.iter().zip(parts(arena, layer, nodes.iter().map(|n| n.shape()))) {
            graph.store(*node, kept);
        }
    }

    /// What was kept of a layer (from 1), if it was.
    pub(super) fn replay<'a>(&'a self, arena: &'a Arena, layer: usize) -> Memo<'a> {
        match (self.shapes.get(layer - 1), &self.memory) {
            (Some(shapes), Some(memory)) => {
                let layer = memory.get(layer - 1);
                Memo::Replay(parts(arena, layer, shapes.iter().copied()).collect(), Cell::new(0))
            }
            _ => Memo::Off,
        }
    }
}

/// Views of these shapes, one after another, of a layer's memory.
fn parts<'a>(
    arena: &'a Arena,
    memory: Tensor<'a>,
    shapes: impl Iterator<Item = Shape>,
) -> impl Iterator<Item = Tensor<'a>> {
    let mut at = 0;
    shapes.map(move |[width, rows, ..]| {
        let part = arena.part(memory, at, [width, rows]);
        at += (width * rows).next_multiple_of(ALIGN);
        part
    })
}
