//! Keys and values that layers read from an earlier layer (Gemma 4), and their cotangents, which several layers add to.

use super::config::Config;
use crate::Result;
use crate::ggml::{Arena, Device, Shape, Tensor, TensorSet};

/// Keys and values of the layers that give them: `[hd * n_head_kv, T]` each.
pub struct Shared {
    // Of each donor: k, v, and their cotangents.
    set: TensorSet,
    donors: Vec<usize>,
}

impl Shared {
    /// Room for a batch of `tokens`; none where no layer up to `depth` reads another's.
    pub fn new(
        device: Device,
        config: &Config,
        depth: usize,
        tokens: usize,
    ) -> Result<Option<Shared>> {
        let mut donors: Vec<_> = (1..=depth).filter_map(|layer| config.donor(layer)).collect();
        donors.sort();
        donors.dedup();
        if donors.is_empty() {
            return Ok(None);
        }
        let shapes: Vec<(String, Shape)> = donors
            .iter()
            .flat_map(|&donor| {
                let shape = [config.layer(donor).kv_width(), tokens, 1, 1];
                ["k", "v", "d_k", "d_v"].map(|name| (format!("{name}-{donor}"), shape))
            })
            .collect();
        Ok(Some(Shared { set: TensorSet::zeros(device, &shapes)?, donors }))
    }

    fn pair<'a>(
        &'a self,
        arena: &'a Arena,
        donor: usize,
        tokens: usize,
        skip: usize,
    ) -> Option<[Tensor<'a>; 2]> {
        let at = 4 * self.donors.iter().position(|&d| d == donor)?;
        Some([0, 1].map(|i| arena.row_range(self.set.get(at + skip + i), 0, tokens)))
    }

    /// Keys and values of a layer that gives them.
    pub fn values<'a>(
        &'a self,
        arena: &'a Arena,
        donor: usize,
        tokens: usize,
    ) -> Option<[Tensor<'a>; 2]> {
        self.pair(arena, donor, tokens, 0)
    }

    /// Their cotangents so far.
    pub fn cotangents<'a>(
        &'a self,
        arena: &'a Arena,
        donor: usize,
        tokens: usize,
    ) -> Option<[Tensor<'a>; 2]> {
        self.pair(arena, donor, tokens, 2)
    }

    /// Sets the cotangents to zero.
    pub fn clear_cotangents(&mut self) {
        for donor in 0..self.donors.len() {
            for i in [2, 3] {
                self.set.values_mut(4 * donor + i).fill(0.0);
            }
        }
    }

    /// Bytes taken.
    pub fn n_bytes(&self) -> usize {
        self.set.n_bytes()
    }
}
