//! Which distribution over the vocabulary is meant: the model's own, or an inner layer's.

use crate::{Error, Result};

/// A policy that a model contains (PAPER section 1).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Policy {
    depth: usize,
    norm: bool,
}

impl Policy {
    /// The final policy of a model of `n_layer` layers: `softmax(norm(H^L) E_u^T)`.
    pub fn full(n_layer: usize) -> Policy {
        Policy { depth: n_layer, norm: true }
    }

    /// The layer whose policy an internal phase takes where nobody has looked for one: three quarters of `n_layer`.
    pub fn usual_layer(n_layer: usize) -> usize {
        (3 * n_layer).div_ceil(4)
    }

    /// The internal policy of `layer` (from 1): `softmax(H^l E_u^T)`, without the final norm unless
    /// `final_norm` asks for that ablation. Layer L means the final policy, with its norm.
    ///
    /// # Errors
    /// [`Error::Invalid`] for a layer out of 1..L.
    pub fn internal(layer: usize, n_layer: usize, final_norm: bool) -> Result<Policy> {
        if layer == 0 || layer > n_layer {
            let expected = format!("a layer from 1 to {n_layer}");
            return Err(Error::invalid(
                "layer",
                expected,
                layer.to_string(),
                "layers count from 1",
            ));
        }
        Ok(Policy { depth: layer, norm: final_norm || layer == n_layer })
    }

    /// Layers that must be computed.
    pub fn depth(self) -> usize {
        self.depth
    }

    /// Whether the final norm stands before the unembedding.
    pub fn has_norm(self) -> bool {
        self.norm
    }
}
