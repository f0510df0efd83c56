//! Which tokens are worked on together, and which states stand between them.

use std::ops::Range;

use super::DeltaSpec;
use crate::ops::segments::{Segment, trees};

/// Tokens of a chunk at most.
pub(super) const CHUNK: usize = 64;

/// Tokens of one segment that are worked on together.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Chunk {
    pub tokens: Range<usize>,
    /// The state that they find; none is zero.
    pub before: Option<usize>,
    /// The state that they leave, where others find it.
    pub after: Option<usize>,
    /// Of its segment.
    pub is_first: bool,
}

/// The chunks of each tree, in token order, and how many states they leave.
///
/// A segment's first chunk finds what its prefix left; the last one of a segment leaves a state only where completions
/// follow.
pub(super) fn chunks(segments: &[Segment]) -> (Vec<Vec<Chunk>>, usize) {
    let mut states = 0;
    let of_tree = |tree: &[Segment]| {
        let mut all = Vec::new();
        let mut prefix = None;
        for s in tree {
            let is_prompt = s.prefix_begin == s.prefix_end;
            let (mut before, end) = (if is_prompt { None } else { prefix }, s.end as usize);
            for first in (s.begin as usize..end).step_by(CHUNK) {
                let tokens = first..(first + CHUNK).min(end);
                let left = tokens.end < end || (is_prompt && tree.len() > 1);
                let after = left.then_some(states);
                states += left as usize;
                all.push(Chunk { tokens, before, after, is_first: first == s.begin as usize });
                before = after;
            }
            if is_prompt {
                prefix = before;
            }
        }
        all
    };
    (trees(segments).map(of_tree).collect(), states)
}

/// Operations of the matrix products, those of [`super::delta`] and of [`super::delta_back`]; triangular systems count as the
/// triangles that they are, other triangles as the squares that are computed.
pub fn delta_flop(segments: &[Segment], spec: DeltaSpec) -> [f64; 2] {
    let mut flop = [0.0; 2];
    let (d, group) = (spec.size as f64, (spec.n_v / spec.n_k) as f64);
    for chunk in chunks(segments).0.iter().flatten() {
        let n = chunk.tokens.len() as f64;
        let (square, state) = (2.0 * n * n * d, 2.0 * n * d * d);
        let (before, after) =
            (chunk.before.is_some() as u32 as f64, chunk.after.is_some() as u32 as f64);
        // A and M, then of each value head: the system, M U, and the products with the states.
        let forward = 2.0 * square / group + 1.5 * square + (2.0 * before + after) * state;
        // A and M, both systems, M^T dO, dA, dM, what they give Q and K; products with the states.
        let back = 2.0 * square / group + 8.0 * square + (5.0 * before + 2.0 * after) * state;
        flop[0] += spec.n_v as f64 * forward;
        flop[1] += spec.n_v as f64 * back;
    }
    flop
}

#[cfg(test)]
mod tests {
    use super::*;

    fn segment(begin: i32, end: i32, prefix: (i32, i32)) -> Segment {
        Segment { begin, end, prefix_begin: prefix.0, prefix_end: prefix.1 }
    }

    #[test]
    fn completions_find_the_state_that_their_prompt_left() {
        let own = |begin, end| segment(begin, end, (begin, begin));
        let segments =
            [own(0, 70), segment(70, 75, (0, 70)), segment(75, 150, (0, 70)), own(150, 151)];
        let (trees, states) = chunks(&segments);
        let chunk = |tokens, before, after, is_first| Chunk { tokens, before, after, is_first };
        let first = vec![
            chunk(0..64, None, Some(0), true),
            chunk(64..70, Some(0), Some(1), false),
            chunk(70..75, Some(1), None, true),
            chunk(75..139, Some(1), Some(2), true),
            chunk(139..150, Some(2), None, false),
        ];
        assert_eq!(trees, [first, vec![chunk(150..151, None, None, true)]]);
        assert_eq!(states, 3);
    }

    #[test]
    fn a_sequence_of_one_chunk_leaves_no_state() {
        assert_eq!(chunks(&[segment(0, 64, (0, 0))]).1, 0);
        assert_eq!(chunks(&[segment(0, 65, (0, 0))]).1, 1);
    }
}
