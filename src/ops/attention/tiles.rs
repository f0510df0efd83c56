//! What both directions share: heads in memory, tiles of queries and keys, scores.

use std::ffi::c_void;
use std::ops::Range;

use ggml_sys as sys;
use pulp::Simd;

use super::Params;
use crate::ops::logits::softcap_of;
use crate::ops::panel::{LANES, Panel, Strided, transpose};
use crate::ops::queue::Queue;
use crate::ops::segments::Segment;

/// Keys of a run.
pub(super) const KEYS: usize = 128;
/// Keys that are looked at together where some queries see fewer than others.
const BLOCK: usize = 16;
/// Queries of a tile, all heads of a group together: as many tokens as make so many columns, within
/// these bounds.
const COLUMNS: usize = 64;
const TOKENS: Range<usize> = 16..64;
/// Floats between packed rows: the rows of heads lie a power of two apart, and so would fall on the same
/// few cache lines.
const PAD: usize = 16;

/// Floats from one packed row of a head to the next: whole vectors.
fn stride(size: usize) -> usize {
    size.next_multiple_of(LANES) + PAD
}

/// Heads of one tensor: head `h` of token `t` at `data + t * width + h * size`.
#[derive(Clone, Copy)]
pub(super) struct Heads<T> {
    pub data: T,
    pub width: usize,
    pub size: usize,
}

impl Heads<*const f32> {
    /// # Safety
    /// Token and head lie within the tensor, which lives for `'k`.
    pub(super) unsafe fn row<'k>(&self, token: usize, head: usize) -> &'k [f32] {
        // SAFETY: by contract.
        unsafe {
            let at = self.data.add(token * self.width + head * self.size);
            std::slice::from_raw_parts(at, self.size)
        }
    }

    /// Copies rows of `head` into `packed`, one every [`Job::stride`] floats.
    ///
    /// # Safety
    /// As [`Heads::row`], of all tokens.
    pub(super) unsafe fn pack(&self, tokens: Range<usize>, head: usize, packed: &mut [f32]) {
        for (to, token) in packed.chunks_mut(stride(self.size)).zip(tokens) {
            // SAFETY: by contract.
            to[..self.size].copy_from_slice(unsafe { self.row(token, head) });
        }
    }
}

impl Heads<*mut f32> {
    /// # Safety
    /// As for reading, and nobody else has this row.
    pub(super) unsafe fn row_mut<'k>(&self, token: usize, head: usize) -> &'k mut [f32] {
        // SAFETY: by contract.
        unsafe {
            let at = self.data.add(token * self.width + head * self.size);
            std::slice::from_raw_parts_mut(at, self.size)
        }
    }
}

/// Queries that are worked on together: tokens of one segment, or several short ones as a whole.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Tile {
    /// The tokens.
    pub queries: Range<usize>,
    /// Keys that all of them see in full.
    pub prefix: Range<usize>,
    /// First token of each query's own segment.
    pub begins: Vec<usize>,
    /// Keys that a query sees at most, its own and those before it.
    pub window: usize,
}

/// A run of keys; `own` when they belong to the tile's segments, so that not every query sees each.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Keys {
    pub tokens: Range<usize>,
    pub own: bool,
}

impl Tile {
    /// The keys that any of its queries sees, in runs of at most [`KEYS`].
    pub(super) fn keys(&self) -> impl Iterator<Item = Keys> {
        let runs = |all: Range<usize>, own: bool| {
            let end = all.end;
            all.step_by(KEYS).map(move |j| Keys { tokens: j..(j + KEYS).min(end), own })
        };
        // Its first query sees furthest back: those after it are later in its segment, or begin another.
        let prefix = self.first_seen(0, &self.prefix, false)..self.prefix.end;
        let own = self.begins[0]..self.queries.end;
        let own = self.first_seen(0, &own, true)..own.end;
        runs(prefix, false).chain(runs(own, true))
    }

    /// The first token of `tokens`, of its segment or of its prefix, in the window of query `i`; their end
    /// if it sees none.
    fn first_seen(&self, i: usize, tokens: &Range<usize>, own: bool) -> usize {
        let query = self.queries.start + i;
        // Where the query would end if what it sees lay in one piece.
        let behind = if own { query + 1 } else { self.prefix.end + (query + 1 - self.begins[i]) };
        behind.saturating_sub(self.window).clamp(tokens.start, tokens.end)
    }

    /// Which of the keys query `i` (from 0) sees, counted from the run's first.
    pub(super) fn seen(&self, keys: &Keys, i: usize) -> Range<usize> {
        let (first, last) = (keys.tokens.start, keys.tokens.end);
        let from = self.first_seen(i, &keys.tokens, keys.own);
        if !keys.own {
            return from - first..last - first;
        }
        let end = (self.queries.start + i + 1).clamp(first, last);
        self.begins[i].max(from).min(end) - first..end - first
    }
}

/// Cuts a tree into tiles of at most `most` tokens. Segments longer than that are tiled alone.
pub(super) fn query_tiles(tree: &[Segment], most: usize, window: usize) -> Vec<Tile> {
    let mut tiles: Vec<Tile> = Vec::new();
    for s in tree {
        let (begin, end) = (s.begin as usize, s.end as usize);
        let prefix = s.prefix_begin as usize..s.prefix_end as usize;
        if let Some(last) = tiles.last_mut()
            && !prefix.is_empty()
            && last.prefix == prefix
            && last.begins.len() == last.queries.len()
            && last.begins[0] == last.queries.start
            && last.queries.len() + (end - begin) <= most
        {
            last.queries.end = end;
            last.begins.resize(last.queries.len(), begin);
            continue;
        }
        for first in (begin..end).step_by(most) {
            let queries = first..(first + most).min(end);
            let begins = vec![begin; queries.len()];
            tiles.push(Tile { queries, prefix: prefix.clone(), begins, window });
        }
    }
    tiles
}

/// What both kernels read.
pub(super) struct Job<'k> {
    pub segments: &'k [Segment],
    pub units: &'k Queue,
    pub scale: f32,
    pub softcap: Option<f32>,
    /// Keys that a query sees at most.
    pub window: usize,
    pub n_head: usize,
    pub n_head_kv: usize,
    pub size: usize,
    pub t: usize,
    pub q: Heads<*const f32>,
    pub k: Heads<*const f32>,
    pub v: Heads<*const f32>,
    /// Of each head, where they have any.
    pub sinks: Option<&'k [f32]>,
}

impl<'k> Job<'k> {
    /// # Safety
    /// `dst` is a node of `attention` or `attention_back`, `userdata` its parameters.
    pub(super) unsafe fn new(dst: *mut sys::ggml_tensor, userdata: *mut c_void) -> Job<'k> {
        // SAFETY: by contract: q, k, v are sources 0 to 2 and sinks, if any, 3; F32 contiguous of the checked shapes.
        unsafe {
            let params = &*userdata.cast::<Params>();
            let src = &(*dst).src;
            let size = params.c.head_size as usize;
            let heads = |i: usize| Heads {
                data: (*src[i]).data as *const f32,
                width: (*src[i]).ne[0] as usize,
                size,
            };
            Job {
                segments: &params.segments,
                units: &params.units,
                scale: params.c.scale,
                softcap: softcap_of(params.c.softcap),
                window: if params.c.window > 0 { params.c.window as usize } else { usize::MAX },
                n_head: params.c.n_head as usize,
                n_head_kv: params.c.n_head_kv as usize,
                size,
                t: (*src[0]).ne[1] as usize,
                q: heads(0),
                k: heads(1),
                v: heads(2),
                sinks: (params.c.sinks != 0).then(|| {
                    let n = (*src[3]).ne[0] as usize;
                    std::slice::from_raw_parts((*src[3]).data as *const f32, n)
                }),
            }
        }
    }

    /// Query heads of a key/value head.
    pub(super) fn group(&self) -> usize {
        self.n_head / self.n_head_kv
    }

    /// Tokens of a query tile at most.
    pub(super) fn tile_tokens(&self) -> usize {
        (COLUMNS / self.group()).clamp(TOKENS.start, TOKENS.end)
    }

    /// Floats from one packed row to the next.
    pub(super) fn stride(&self) -> usize {
        stride(self.size)
    }

    /// A tile's queries, query after query: column `i * group + g` is query `i` of the group's head `g`. Packed as `rows`, and as `columns`,
    /// `[size, width of Scores]`, those beyond the queries 0.
    ///
    /// # Safety
    /// The tile lies within the tensor, which has query heads.
    #[inline(always)]
    pub(super) unsafe fn pack_queries(
        &self,
        from: &Heads<*const f32>,
        tile: &Tile,
        kv: usize,
        rows: &mut [f32],
        columns: &mut [f32],
    ) {
        let n = tile.queries.len() * self.group();
        let width = n.next_multiple_of(LANES);
        assert!(rows.len() >= n * self.stride() && columns.len() >= self.size * width);
        for (c, row) in rows.chunks_mut(self.stride()).enumerate().take(n) {
            let (token, head) = self.place(tile, kv, c);
            // SAFETY: by contract.
            row[..self.size].copy_from_slice(unsafe { from.row(token, head) });
        }
        let to = Strided(columns.as_mut_ptr(), width);
        // SAFETY: both hold them, as just asserted.
        unsafe { transpose(Strided(rows.as_ptr(), self.stride()), to, n, self.size) };
        columns.chunks_exact_mut(width).for_each(|row| row[n..].fill(0.0));
    }

    /// Token and head of a column.
    pub(super) fn place(&self, tile: &Tile, kv: usize, column: usize) -> (usize, usize) {
        let group = self.group();
        (tile.queries.start + column / group, kv * group + column % group)
    }
}

/// Keys of a run, and whole vectors of columns outside of which nobody sees any of them.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Block {
    /// Counted from the run's first key.
    pub keys: Range<usize>,
    pub columns: Range<usize>,
}

/// Scores of a run of keys, a row for each key, and who sees what. Rows of packed heads are [`stride`] apart, those of scores and of
/// columns `width`; what nobody sees of them is neither computed nor read.
pub(super) struct Scores {
    /// Of each query: the keys that it sees.
    seen: Vec<Range<usize>>,
    group: usize,
    size: usize,
    width: usize,
    /// What is to be computed.
    pub blocks: Vec<Block>,
}

impl Scores {
    /// Of heads of `size`, `group` of them to a key.
    pub(super) fn new(tile: &Tile, keys: &Keys, [size, group]: [usize; 2]) -> Scores {
        let (n, all) = (tile.queries.len(), keys.tokens.len());
        let seen: Vec<Range<usize>> = (0..n).map(|i| tile.seen(keys, i)).collect();
        let width = (n * group).next_multiple_of(LANES);
        if seen.iter().all(|seen| *seen == (0..all)) {
            let blocks = vec![Block { keys: 0..all, columns: 0..width }];
            return Scores { seen, group, size, width, blocks };
        }
        let mut blocks: Vec<Block> = Vec::new();
        for first in (0..all).step_by(BLOCK) {
            let keys = first..(first + BLOCK).min(all);
            // With a window the first queries of a segment see further back than the last ones of the segment before.
            let sees = |seen: &Range<usize>| seen.start < keys.end && seen.end > keys.start;
            let from = seen.iter().position(sees).unwrap_or(0);
            let to = seen.iter().rposition(sees).map_or(from, |last| last + 1);
            let columns = from * group / LANES * LANES..(to * group).next_multiple_of(LANES);
            match blocks.last_mut() {
                Some(last) if last.columns == columns => last.keys.end = keys.end,
                _ => blocks.push(Block { keys, columns }),
            }
        }
        Scores { seen, group, size, width, blocks }
    }

    /// Checks that rows of the keys and of the scores are there.
    fn check(&self, keys: &[f32], scores: &[f32]) {
        let n = self.blocks.last().map_or(0, |block| block.keys.end);
        assert!(keys.len() >= n * stride(self.size) && scores.len() >= n * self.width);
    }

    /// `scores[key, column] = keys[key] . columns[column]`.
    #[inline(always)]
    pub(super) fn fill<S: Simd>(&self, simd: S, keys: &[f32], columns: &[f32], scores: &mut [f32]) {
        self.check(keys, scores);
        assert!(columns.len() >= self.size * self.width);
        for block in &self.blocks {
            let from = block.keys.start;
            // SAFETY: within the slices, as just asserted.
            unsafe {
                Panel {
                    sizes: [block.keys.len(), self.size],
                    width: block.columns.len(),
                    a: keys.as_ptr().add(from * stride(self.size)),
                    strides: [stride(self.size), 1],
                    b: columns.as_ptr().add(block.columns.start),
                    b_row: self.width,
                    c: scores.as_mut_ptr().add(from * self.width + block.columns.start),
                    c_row: self.width,
                    keep: false,
                }
                .run(simd);
            }
        }
    }

    /// `queries[column] += sum over keys of scores[key, column] keys[key]`.
    #[inline(always)]
    pub(super) fn add_to_queries<S: Simd>(
        &self,
        simd: S,
        scores: &[f32],
        keys: &[f32],
        queries: &mut [f32],
    ) {
        self.check(keys, scores);
        assert!(queries.len() >= self.seen.len() * self.group * stride(self.size));
        for block in &self.blocks {
            let (from, real) = (block.keys.start, self.real(block));
            // SAFETY: within the slices, as just checked.
            unsafe {
                Panel {
                    sizes: [real.len(), block.keys.len()],
                    width: self.size.next_multiple_of(LANES),
                    a: scores.as_ptr().add(from * self.width + real.start),
                    strides: [1, self.width],
                    b: keys.as_ptr().add(from * stride(self.size)),
                    b_row: stride(self.size),
                    c: queries.as_mut_ptr().add(real.start * stride(self.size)),
                    c_row: stride(self.size),
                    keep: true,
                }
                .run(simd);
            }
        }
    }

    /// `keys[key] += sum over columns of scores[key, column] queries[column]`.
    #[inline(always)]
    pub(super) fn add_to_keys<S: Simd>(
        &self,
        simd: S,
        scores: &[f32],
        queries: &[f32],
        keys: &mut [f32],
    ) {
        self.check(keys, scores);
        assert!(queries.len() >= self.seen.len() * self.group * stride(self.size));
        for block in &self.blocks {
            let (from, real) = (block.keys.start, self.real(block));
            // SAFETY: within the slices, as just checked.
            unsafe {
                Panel {
                    sizes: [block.keys.len(), real.len()],
                    width: self.size.next_multiple_of(LANES),
                    a: scores.as_ptr().add(from * self.width + real.start),
                    strides: [self.width, 1],
                    b: queries.as_ptr().add(real.start * stride(self.size)),
                    b_row: stride(self.size),
                    c: keys.as_mut_ptr().add(from * stride(self.size)),
                    c_row: stride(self.size),
                    keep: true,
                }
                .run(simd);
            }
        }
    }

    /// A block's columns less those that fill up the last vector.
    fn real(&self, block: &Block) -> Range<usize> {
        block.columns.start..block.columns.end.min(self.seen.len() * self.group)
    }

    /// What is computed of each key's row, as ranges of all scores.
    pub(super) fn rows(&self) -> impl Iterator<Item = (Range<usize>, &Block)> {
        self.blocks.iter().flat_map(|block| {
            let range = |key| {
                let row = key * self.width;
                row + block.columns.start..row + block.columns.end
            };
            block.keys.clone().map(move |key| (range(key), block))
        })
    }

    /// Puts `value` for the keys that a query does not see, where they were computed.
    pub(super) fn hide(&self, scores: &mut [f32], value: f32) {
        for block in &self.blocks {
            let queries = block.columns.start / self.group
                ..block.columns.end.div_ceil(self.group).min(self.seen.len());
            for i in queries {
                let seen = &self.seen[i];
                let before = block.keys.start..seen.start.clamp(block.keys.start, block.keys.end);
                let after = seen.end.clamp(block.keys.start, block.keys.end)..block.keys.end;
                for key in before.chain(after) {
                    let row = &mut scores[key * self.width..];
                    row[i * self.group..(i + 1) * self.group].fill(value);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::segments::trees;

    fn segment(begin: i32, end: i32, prefix: (i32, i32)) -> Segment {
        Segment { begin, end, prefix_begin: prefix.0, prefix_end: prefix.1 }
    }

    #[test]
    fn tiles_cover_every_pair_once() {
        let mut segments = vec![segment(0, 70, (0, 0))];
        let mut at = 70;
        for len in [3, 5, 150, 1, 1, 30, 64, 2] {
            segments.push(segment(at, at + len, (0, 70)));
            at += len;
        }
        segments.push(segment(at, at + 9, (at, at)));
        segments.push(segment(at + 9, at + 12, (at, at + 9)));
        for (most, window) in
            [16, 64].into_iter().flat_map(|m| [1, 2, 40, 70, 130, 1000].map(|w| (m, w)))
        {
            let tiles: Vec<Tile> =
                trees(&segments).flat_map(|t| query_tiles(t, most, window)).collect();
            let mut next = 0;
            for tile in &tiles {
                assert_eq!(tile.queries.start, next);
                assert!(tile.queries.len() <= most && tile.begins.len() == tile.queries.len());
                next = tile.queries.end;
                for (i, query) in tile.queries.clone().enumerate() {
                    let s = segments.iter().find(|s| (s.begin..s.end).contains(&(query as i32)));
                    let s = s.unwrap();
                    // In the order of positions: the window is the last of them.
                    let all: Vec<usize> = (s.prefix_begin..s.prefix_end)
                        .chain(s.begin..=query as i32)
                        .map(|j| j as usize)
                        .collect();
                    let mut want = all[all.len().saturating_sub(window)..].to_vec();
                    let mut got: Vec<usize> = Vec::new();
                    for keys in tile.keys() {
                        got.extend(tile.seen(&keys, i).map(|j| keys.tokens.start + j));
                    }
                    want.sort();
                    got.sort();
                    assert_eq!(got, want, "query {query}, window {window}");
                }
                for (keys, group) in
                    tile.keys().flat_map(|keys| [1, 3, 4].map(|g| (keys.clone(), g)))
                {
                    let run = Scores::new(tile, &keys, [8, group]);
                    for i in 0..tile.queries.len() {
                        let of = i * group..(i + 1) * group;
                        let has = |key: usize| {
                            run.blocks.iter().any(|block| {
                                block.keys.contains(&key)
                                    && block.columns.start <= of.start
                                    && of.end <= block.columns.end
                            })
                        };
                        assert!(tile.seen(&keys, i).all(has), "query {i} of {keys:?}, {group}");
                    }
                }
                let looked_at: usize = tile.keys().map(|keys| keys.tokens.len()).sum();
                assert!(looked_at <= most + window, "{looked_at} keys, window {window}");
            }
            assert_eq!(next as i32, segments.last().unwrap().end);
        }
    }

    #[test]
    fn short_completions_share_a_tile() {
        let mut segments = vec![segment(0, 20, (0, 0))];
        segments.extend((0..8).map(|i| segment(20 + 10 * i, 30 + 10 * i, (0, 20))));
        assert_eq!(query_tiles(&segments, 64, usize::MAX).len(), 3);
    }
}
