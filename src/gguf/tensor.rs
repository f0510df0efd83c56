//! A tensor's entry in the table, and what makes one valid.

use super::shown;
use crate::ggml::Type;

/// ggml's `GGML_MAX_NAME`: a name with its closing zero, in bytes.
const MAX_NAME_BYTES: usize = 64;
/// ggml's `GGML_MAX_DIMS`.
pub(super) const MAX_DIMS: usize = 4;

/// A tensor's name, type, shape and place.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TensorInfo {
    /// E.g. `blk.0.attn_q.weight`.
    pub name: String,
    /// Element type.
    pub ty: Type,
    /// Elements in each of 1 to 4 dimensions, ggml order: `[ne0, ne1, ..]`, rows of ne0 first.
    pub shape: Vec<u64>,
    /// Bytes from the start of the data section.
    pub offset: u64,
    n_bytes: u64,
}

impl TensorInfo {
    /// Checks name, shape and type; `offset` is taken as it is. An error is what was expected and what
    /// was got, for the caller knows where.
    pub(super) fn new(
        name: &str,
        ty: Type,
        shape: &[u64],
        offset: u64,
    ) -> Result<TensorInfo, (String, String)> {
        if name.is_empty() || name.len() >= MAX_NAME_BYTES || name.contains('\0') {
            return Err((
                format!("a name of 1 to {} bytes, no zeros", MAX_NAME_BYTES - 1),
                format!("'{}' of {} bytes", shown(name), name.len()),
            ));
        }
        if shape.is_empty() || shape.len() > MAX_DIMS || shape.contains(&0) {
            return Err((
                format!("1 to {MAX_DIMS} dimensions of at least 1"),
                format!("{shape:?}"),
            ));
        }
        if !shape[0].is_multiple_of(ty.block_size() as u64) {
            return Err((
                format!("rows in whole {ty} blocks of {} elements", ty.block_size()),
                format!("{} elements per row", shape[0]),
            ));
        }
        match n_bytes(ty, shape) {
            Some(n_bytes) => {
                Ok(TensorInfo { name: name.to_owned(), ty, shape: shape.to_vec(), offset, n_bytes })
            }
            None => Err(("fewer than 2^63 elements and bytes".to_owned(), format!("{shape:?}"))),
        }
    }

    /// Elements.
    pub fn n_elements(&self) -> u64 {
        self.shape.iter().product()
    }

    /// Bytes of data.
    pub fn n_bytes(&self) -> u64 {
        self.n_bytes
    }
}

/// Bytes of a tensor; `None` when they or the elements do not fit into an i64, ggml's counter.
fn n_bytes(ty: Type, shape: &[u64]) -> Option<u64> {
    let elements = shape.iter().try_fold(1u64, |n, ne| n.checked_mul(*ne))?;
    let bytes = (elements / ty.block_size() as u64).checked_mul(ty.block_bytes() as u64)?;
    (elements.max(bytes) <= i64::MAX as u64).then_some(bytes)
}
