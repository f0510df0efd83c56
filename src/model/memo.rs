//! Activations kept from the forward for the backward, as far as memory is given for them.
//!
//! A layer's tape hands every node that is costly to compute, and that its vjp needs again, to a [`Memo`]: in a
//! training forward they are noted and copied into kept memory, in the backward they are read from there, so that
//! what made them is never reached. What is cheap beside the copy (norms, rotations, gates) is always computed
//! again. The values are the same bits either way.

use std::cell::{Cell, RefCell};

use crate::Result;
use crate::ggml::{Arena, Device, Graph, Shape, Tensor, TensorSet};

/// Kept parts begin at multiples of this many floats: a cache line.
const ALIGN: usize = 16;

/// Where a forward's costly nodes go, or come from.
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

    /// Reads these.
    pub fn replay(kept: Vec<Tensor<'a>>) -> Memo<'a> {
        Memo::Replay(kept, Cell::new(0))
    }

    /// This node, or what was kept of it.
    pub fn node(&self, built: Tensor<'a>) -> Tensor<'a> {
        match self {
            Memo::Off => built,
            Memo::Record(nodes) => {
                nodes.borrow_mut().push(built);
                built
            }
            Memo::Replay(nodes, next) => nodes[next.replace(next.get() + 1)],
        }
    }

    /// The noted nodes.
    pub fn into_noted(self) -> Vec<Tensor<'a>> {
        if let Memo::Record(nodes) = self { nodes.into_inner() } else { Vec::new() }
    }
}

/// Floats that activations of these shapes take.
pub fn kept_floats(shapes: impl IntoIterator<Item = Shape>) -> usize {
    shapes.into_iter().map(floats).sum()
}

fn floats([width, rows, ..]: Shape) -> usize {
    (width * rows).next_multiple_of(ALIGN)
}

/// Memory for the kept activations of the lowest layers, reused by batch after batch.
#[derive(Default)]
pub(super) struct Activations {
    /// Bytes that may be taken; none keeps nothing.
    budget: usize,
    // All layers' activations, one after another.
    memory: Option<TensorSet>,
    // Of each layer, from the lowest: where its part begins, and the shapes of what it holds.
    layers: Vec<(usize, Vec<Shape>)>,
}

impl Activations {
    pub(super) fn set_budget(&mut self, bytes: usize) {
        self.budget = bytes;
    }

    /// Whether anything may be kept.
    pub(super) fn is_on(&self) -> bool {
        self.budget > 0
    }

    /// Forgets what was kept, not the memory.
    pub(super) fn forget(&mut self) {
        self.layers.clear();
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
        self.layers.len()
    }

    fn used(&self) -> usize {
        let (begin, shapes) = self.layers.last().map_or((0, &[][..]), |(b, s)| (*b, &s[..]));
        begin + kept_floats(shapes.iter().copied())
    }

    /// Room for as many layers as the budget allows, which take `floats` each, from the lowest.
    pub(super) fn reserve(&mut self, device: Device, floats: &[usize]) -> Result<()> {
        self.forget();
        let most = self.budget / 4;
        let sums = floats.iter().scan(0, |sum, n| {
            *sum += n;
            Some(*sum)
        });
        let wanted = sums.take_while(|sum| *sum <= most).last().unwrap_or(0);
        if wanted == 0 || self.memory.as_ref().is_some_and(|m| m.get(0).len() >= wanted) {
            return Ok(());
        }
        // Given back first, so that never both exist.
        self.memory = None;
        self.memory = Some(TensorSet::zeros(device, &[("kept".into(), [wanted, 1, 1, 1])])?);
        Ok(())
    }

    /// Whether there is room for this layer (from 1), which takes `floats`.
    pub(super) fn takes(&self, layer: usize, floats: usize) -> bool {
        let room = self.memory.as_ref().map_or(0, |m| m.get(0).len().min(self.budget / 4));
        layer == self.layers.len() + 1 && self.used() + floats <= room
    }

    /// Adds copies of the next layer's noted nodes to the graph.
    pub(super) fn store<'a>(&'a mut self, arena: &'a Arena, graph: &mut Graph<'a>, memo: Memo<'a>) {
        let begin = self.used();
        let (nodes, Some(memory)) = (memo.into_noted(), &self.memory) else { return };
        if nodes.is_empty() {
            return;
        }
        let shapes: Vec<_> = nodes.iter().map(|node| node.shape()).collect();
        for (node, kept) in nodes.iter().zip(parts(arena, memory.get(0), begin, &shapes)) {
            graph.store(*node, kept);
        }
        self.layers.push((begin, shapes));
    }

    /// What was kept of a layer (from 1), if it was.
    pub(super) fn replay<'a>(&'a self, arena: &'a Arena, layer: usize) -> Memo<'a> {
        match (self.layers.get(layer - 1), &self.memory) {
            (Some((begin, shapes)), Some(memory)) => {
                Memo::replay(parts(arena, memory.get(0), *begin, shapes).collect())
            }
            _ => Memo::Off,
        }
    }
}

/// Views of these shapes, one after another, of the memory from `at` on.
fn parts<'a>(
    arena: &'a Arena,
    memory: Tensor<'a>,
    mut at: usize,
    shapes: &[Shape],
) -> impl Iterator<Item = Tensor<'a>> {
    shapes.iter().map(move |&shape| {
        let part = arena.part(memory, at, [shape[0], shape[1]]);
        at += floats(shape);
        part
    })
}
