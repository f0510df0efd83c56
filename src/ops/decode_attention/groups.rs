//! Which tokens are computed together, and what they read.

use std::ops::Range;

use ggml_sys as sys;

use super::{MOST_TOGETHER, Node, TILE};

/// A token that is decoded, and keys of its stream up to the last that it sees.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Reader {
    pub stream: usize,
    pub token: usize,
    pub seen: usize,
}

/// Tokens that are computed together.
#[derive(Debug, PartialEq)]
pub(super) struct Group {
    pub members: Vec<Reader>,
    /// Keys that are read once for all: of sequences those that they have in common, whole tiles; of tokens of a sequence those
    /// that any of them sees.
    pub common: Range<usize>,
}

/// Sequences of one origin, as many together as allowed; whoever has little in common is alone.
pub(super) fn sequences(
    streams: usize,
    lineages: Option<&[sys::bupo_lineage]>,
    seen: impl Fn(usize) -> usize,
) -> Vec<Group> {
    let rows = |stream: usize| lineages.map_or(0, |l| l[stream].rows as usize) / TILE * TILE;
    let origin = |stream: usize| match rows(stream) {
        0 => None,
        _ => lineages.map(|l| l[stream].origin),
    };
    let mut order: Vec<usize> = (0..streams).collect();
    order.sort_by_key(|&stream| (origin(stream), stream));
    let mut groups: Vec<Group> = Vec::new();
    let mut of = None;
    for stream in order {
        let member = Reader { stream, token: 0, seen: seen(stream) };
        let common = rows(stream).min(member.seen / TILE * TILE);
        match groups.last_mut() {
            Some(group)
                if origin(stream).is_some()
                    && of == origin(stream)
                    && group.members.len() < MOST_TOGETHER =>
            {
                group.members.push(member);
                group.common.end = group.common.end.min(common);
            }
            _ => groups.push(Group { members: vec![member], common: 0..common }),
        }
        of = origin(stream);
    }
    groups
}

/// Neighbouring tokens of each stream. Groups with much to read and those with little come in turn, for threads take runs of them.
///
/// # Safety
/// The contract of [`super::decode_attention`].
pub(super) unsafe fn neighbours(node: &Node) -> Vec<Group> {
    let group = |(stream, first): (usize, usize)| {
        let tokens = first..(first + node.together()).min(node.tokens);
        // SAFETY: by contract.
        let reader = |token| Reader { stream, token, seen: unsafe { node.seen(stream, token) } };
        let members: Vec<Reader> = tokens.map(reader).collect();
        let seen = members.iter().map(|m| m.seen).max().unwrap_or(0);
        // SAFETY: by contract.
        let unseen = members.iter().map(|&m| unsafe { node.unseen(m) }).min().unwrap_or(0);
        Group { members, common: unseen / TILE * TILE..seen }
    };
    let firsts = (0..node.tokens).step_by(node.together());
    let all = (0..node.streams).flat_map(|stream| firsts.clone().map(move |first| (stream, first)));
    let mut groups: Vec<Group> = all.map(group).collect();
    groups.sort_by_key(|group| group.common.len());
    let few = groups.len() / 2;
    let much = groups.split_off(few).into_iter().rev();
    let mut few = groups.into_iter();
    much.flat_map(|group| [Some(group), few.next()]).flatten().collect()
}

/// A run of keys of a stream, and the members of the group that see it.
pub(super) struct Run {
    pub stream: usize,
    pub keys: Range<usize>,
    pub members: Range<usize>,
}

impl Group {
    /// Queries of a head of keys, those of a member behind one another.
    pub(super) fn queries(&self, node: &Node) -> usize {
        self.members.len() * node.group()
    }

    /// What it reads, in order: what its members have in common, then what each has of its own.
    pub(super) fn runs(&self) -> impl Iterator<Item = Run> {
        let Group { members, common } = self;
        let all = 0..members.len();
        let first = Run { stream: members[0].stream, keys: common.clone(), members: all };
        let own = members.iter().enumerate().map(|(i, member)| Run {
            stream: member.stream,
            keys: common.end..member.seen,
            members: i..i + 1,
        });
        std::iter::once(first).chain(own).filter(|run| !run.keys.is_empty())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sequences_of_one_origin_are_computed_together() {
        let lineage = |origin, rows| sys::bupo_lineage { origin, rows };
        // Ten of one prompt, one of which forgot most of it; two of another that is shorter than a tile; one of none.
        let mut lineages = vec![lineage(7, 150); 10];
        lineages[3].rows = 70;
        lineages.extend([lineage(2, 50), lineage(2, 50), lineage(0, 0)]);
        let seen = |stream: usize| if stream == 9 { 140 } else { 200 + stream };
        let groups = sequences(13, Some(&lineages), seen);
        let members = |streams: Range<usize>| {
            streams.map(|stream| Reader { stream, token: 0, seen: seen(stream) }).collect()
        };
        assert_eq!(groups.len(), 5);
        for (i, stream) in [10, 11, 12].into_iter().enumerate() {
            assert_eq!(groups[i], Group { members: members(stream..stream + 1), common: 0..0 });
        }
        assert_eq!(groups[3], Group { members: members(0..8), common: 0..64 });
        assert_eq!(groups[4], Group { members: members(8..10), common: 0..128 });
        let alone = sequences(2, None, seen);
        assert!(alone.iter().all(|group| group.members.len() == 1 && group.common.is_empty()));
    }
}
