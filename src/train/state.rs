//! What a run carries from one step to the next, by name.
//!
//! Whoever has such state lists it once, as places that can be read and written ([`State`]); a checkpoint
//! reads the places, a resume writes them. Saving and restoring cannot disagree, since it is one list, and
//! nothing is forgotten, since the owners take their own fields apart without `..` (`tests/house.rs`
//! insists): a new field does not compile until somebody has said whether it is state.

use crate::ggml::TensorSet;

/// Named places of a run's state. Names are unique and stay as they are: checkpoints hold them.
#[derive(Default)]
pub struct State<'s> {
    pub(super) tensors: Vec<(String, &'s mut TensorSet)>,
    pub(super) counters: Vec<(String, &'s mut u64)>,
    pub(super) numbers: Vec<(String, &'s mut f64)>,
}

impl<'s> State<'s> {
    /// A set of tensors. Each is stored as `group/name of the tensor`, or by its index where it has no name.
    pub fn tensors(&mut self, group: &str, tensors: &'s mut TensorSet) {
        self.tensors.push((group.into(), tensors));
    }

    /// A count.
    pub fn counter(&mut self, name: impl Into<String>, value: &'s mut u64) {
        self.counters.push((name.into(), value));
    }

    /// Counts of one kind, one per layer for instance; their number must be the same at a resume.
    pub fn counters(&mut self, name: &str, values: &'s mut [u64]) {
        for (i, value) in values.iter_mut().enumerate() {
            self.counter(format!("{name}.{i}"), value);
        }
    }

    /// All names, those of tensors as a checkpoint holds them.
    pub fn names(&self) -> Vec<String> {
        let tensors = self.tensors.iter().flat_map(|(group, set)| {
            (0..set.len()).map(|index| tensor_key(group, set, index)).collect::<Vec<_>>()
        });
        let counters = self.counters.iter().map(|(name, _)| name.clone());
        let numbers = self.numbers.iter().map(|(name, _)| name.clone());
        tensors.chain(counters).chain(numbers).collect()
    }

    /// A number, kept to the bit; NaN may stand for none.
    pub fn number(&mut self, name: impl Into<String>, value: &'s mut f64) {
        self.numbers.push((name.into(), value));
    }
}

/// Name of tensor `index` of a set as a checkpoint holds it.
pub(super) fn tensor_key(group: &str, set: &TensorSet, index: usize) -> String {
    match set.get(index).name() {
        "" => format!("{group}/{index}"),
        name => format!("{group}/{name}"),
    }
}
