//! Scratch memory that the kernels of a GPU take beside a graph's tensors (`ggml-ext/ops/*.cu`).

use ggml_sys as sys;

/// Sizes of a model and of a batch that scratch memory depends on.
#[derive(Clone, Copy, Debug)]
pub struct ScratchShape {
    /// Width of the residual.
    pub n_embd: usize,
    /// Width of the FFN; of a mixture, of all experts that a token takes together.
    pub n_ff: usize,
    /// Whether FFNs are mixtures of experts.
    pub mixture: bool,
    /// Width of queries, all heads.
    pub n_q: usize,
    /// Width of keys, all heads.
    pub n_kv: usize,
    /// Channels of the widest convolution; 0 without one.
    pub n_conv: usize,
    /// Value heads and their size of the largest delta net; 0 without one.
    pub delta: [usize; 2],
    /// Tokens of the vocabulary.
    pub n_vocab: usize,
    /// Tokens of a batch.
    pub tokens: usize,
    /// Tokens whose log-probs are taken.
    pub scored: usize,
    /// Width of the residual of a teacher whose distributions are compared; 0 without one.
    pub n_teacher: usize,
    /// Factors are F32 instead of F16.
    pub precise: bool,
    /// Of the kernels on the host, whose tiles are small.
    pub emulated: bool,
}

/// Bytes that the hungriest op lends: activations as factors, and a tile of weights, scores or logits.
pub fn scratch_bytes(s: &ScratchShape) -> usize {
    let (tile, token_tile) = if s.emulated {
        (sys::BUPO_EMULATED_TILE_BYTES as usize, sys::BUPO_EMULATED_TOKEN_TILE as usize)
    } else {
        (sys::BUPO_GPU_TILE_BYTES as usize, sys::BUPO_GPU_TOKEN_TILE as usize)
    };
    // What an activation takes as a factor: nothing where it lies as F32 already.
    let factor = if s.precise { 0 } else { 2 };
    let element = if s.precise { 4 } else { 2 };
    let widest = s.n_ff.max(s.n_embd).max(s.n_q);
    // A tile has 32 rows at least, and no more than the matrix; on the host it is widened to F32 first.
    let widened = if s.emulated { 3 } else { 1 };
    let tile_of = |width: usize, rows: usize| {
        (tile / (width * element)).max(32).min(rows) * width * element * widened
    };
    let linear = factor * s.tokens * widest + tile_of(widest, s.n_ff.max(s.n_embd).max(s.n_q));
    // An expert's tokens side by side, and what it gives before it is summed up; all may choose the same one.
    let slots = if s.mixture { s.tokens * s.n_embd * (element + 4) } else { 0 };
    let scores = (s.tokens * s.tokens * s.n_kv / 8 * 4).min(tile);
    let attention =
        factor * s.tokens * 2 * (s.n_q + s.n_kv) + scores * if s.precise { 2 } else { 3 };
    let n = token_tile.min(s.scored);
    let width = (tile / (s.n_embd * element).max(4 * n)).max(32).min(s.n_vocab);
    let logits = width * n * if s.precise { 4 } else { 6 };
    let rows = width * s.n_embd * element * widened;
    let logprob = n * (s.n_embd * (4 + factor) + 32) + rows + logits;
    // Both models' rows and logits, F32, and two sums of rows (ggml-ext/ops/distill.cu).
    let widest = s.n_embd.max(s.n_teacher);
    let width = (tile / (4 * widest.max(n)).max(1)).max(32).min(s.n_vocab);
    let distill = match s.n_teacher {
        0 => 0,
        d => n * (8 * s.n_embd + 16) + 4 * width * (s.n_embd + d + 2 * n),
    };
    let conv = 4 * s.tokens * s.n_conv;
    // Of each value head some twelve rows of 64 tokens, five triangles and three states (ggml-ext/ops/delta.cu).
    let [n_v, size] = s.delta;
    let delta = 4 * n_v * (14 * 64 * size + 7 * 64 * 64 + 3 * size * size);
    // Each lending ends at a multiple of 256 and leaves room for a super-block.
    (linear + slots).max(attention).max(logprob).max(distill).max(conv).max(delta) + 32 * 1280
}
