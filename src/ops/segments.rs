//! Packed sequences: runs of tokens, completions behind the prompt that they share.

pub use ggml_sys::bupo_segment as Segment;

/// Runs of segments: one without prefix and those after it that build on it.
pub(super) fn trees(segments: &[Segment]) -> impl Iterator<Item = &[Segment]> {
    segments.chunk_by(|_, next| next.prefix_begin != next.prefix_end)
}

/// Wants segments that cover `[0, t)` in order without gaps, and prefixes that are the last segment before which
/// has none.
pub(super) fn check_segments(segments: &[Segment], t: usize) {
    let (mut next, mut root) = (0, None);
    for (i, s) in segments.iter().enumerate() {
        assert!(s.begin == next && s.end > s.begin, "segment {i}: {s:?}");
        next = s.end;
        if s.prefix_begin == s.prefix_end {
            root = Some((s.begin, s.end));
        } else {
            assert_eq!(Some((s.prefix_begin, s.prefix_end)), root, "prefix of segment {i}: {s:?}");
        }
    }
    assert_eq!(next as usize, t, "segments cover all tokens");
}
