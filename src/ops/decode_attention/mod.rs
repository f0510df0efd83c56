//! Attention inside llama.cpp's graphs: of many sequences that each decode one token, and of prompts.
//!
//! ```text
//! y[:, h, t, s] = sum_j p_j v[:, j, h/g, s],  p = softmax_j(cap(scale q[:, t, h, s] . k[:, j, h/g, s]) + mask[j, t, s])
//! ```
//!
//! `cap(x) = c tanh(x / c)` where there is a softcap c; a head may have a sink, a score that takes a share and has no value.
//! g heads of queries read one head of keys and values, whose F16 a tile of keys at a time turns into F32 once for all of
//! them; sums are F32, where ggml adds values up in F16. Sequences that began alike, as the completions of a prompt do, read
//! what they have in common once, too, and so do neighbouring tokens of a prompt. Where many queries read the same keys, these are
//! the lanes of vectors (`many.rs`); of few, each score is a sum over lanes (`few.rs`). Tiles come in order and masked keys add
//! nothing, so that a sequence's result does not depend on the number of threads, nor, where all are computed as few are, on
//! the other sequences.

mod few;
mod groups;
mod many;
#[cfg(test)]
mod tests;

use std::ffi::c_int;
use std::ops::Range;

use ggml_sys as sys;
use pulp::{Simd, WithSimd};

use super::exp::softcap;
use super::gemm::with_scratch;
use super::panel::{LANES, Panel, aligned};
use super::rows::{partition, prefetch};
use crate::ggml::Type;
use groups::{Group, Reader, Run, neighbours, sequences};

/// Keys of a tile.
const TILE: usize = 64;
/// Heads of queries that may share a head of keys.
pub(crate) const MOST_HEADS: usize = 32;
/// Sequences that read what they have in common together: few enough that threads get like shares of a large group.
const MOST_TOGETHER: usize = 8;
/// Queries of a prompt that read the same keys together: the columns that a product of panels takes at a time.
const QUERIES: usize = 4 * LANES;

/// # Safety
/// The contract of `bupo_decoding` in ggml-ext.h: `dst` is a FLASH_ATTN_EXT node `[D, H, T, S]` of live tensors in host
/// memory, `src[0]` = q `[D, T, H, S]` F32, `src[1]`, `src[2]` = k, v `[D, n, H_kv, S]` F16, `src[3]` = mask `[n, T.., 1, S]`
/// F16 or null, with whole rows, `src[4]` = sinks `[H]` F32 or null; no slopes. `lineages` is null or has S members, which say the truth, where T
/// is 1. With `invariant` nothing of a sequence depends on the others. Each of the `nth` threads calls this with its own `ith`.
pub(crate) unsafe extern "C" fn decode_attention(
    dst: *mut sys::ggml_tensor,
    lineages: *const sys::bupo_lineage,
    invariant: bool,
    ith: c_int,
    nth: c_int,
) {
    // SAFETY: by contract; threads write different heads of y.
    unsafe {
        let node = Node::new(dst);
        let lineages =
            (!lineages.is_null()).then(|| std::slice::from_raw_parts(lineages, node.streams));
        let groups = match node.tokens {
            1 => sequences(node.streams, lineages, |stream| node.seen(stream, 0)),
            _ => neighbours(&node),
        };
        let invariant = invariant && node.tokens == 1;
        let jobs = partition(groups.len() * node.shared, ith, nth);
        let arch = pulp::Arch::new();
        with_scratch(Scratch::floats(&node), |scratch| {
            for (i, group) in groups.iter().enumerate() {
                // Those of its heads that are this thread's.
                let first = i * node.shared;
                let from = jobs.start.max(first) - first;
                let heads = from..jobs.end.clamp(first, first + node.shared) - first;
                if !heads.is_empty() {
                    let scratch = Scratch::new(scratch, &node, group, heads.clone());
                    let next = groups.get(i + 1);
                    arch.dispatch(Job { node: &node, group, heads, next, invariant, scratch });
                }
            }
        });
    }
}

/// The sources.
struct Node {
    q: *const sys::ggml_tensor,
    k: *const sys::ggml_tensor,
    v: *const sys::ggml_tensor,
    mask: *const sys::ggml_tensor,
    sinks: *const sys::ggml_tensor,
    y: *mut f32,
    scale: f32,
    /// c; 0: there is none.
    softcap: f32,
    /// D.
    size: usize,
    /// n.
    keys: usize,
    /// H.
    heads: usize,
    /// H_kv.
    shared: usize,
    /// T.
    tokens: usize,
    /// S.
    streams: usize,
}

impl Node {
    /// # Safety
    /// The contract of [`decode_attention`], as of the other methods, with heads, streams and tokens in range.
    unsafe fn new(dst: *mut sys::ggml_tensor) -> Node {
        // SAFETY: by contract.
        unsafe {
            let [q, k, v, mask, sinks, ..] = (*dst).src;
            let param = |i: usize| f32::from_bits((*dst).op_params[i] as u32);
            Node {
                q,
                k,
                v,
                mask,
                sinks,
                y: (*dst).data.cast(),
                scale: param(0),
                softcap: param(2),
                size: (*q).ne[0] as usize,
                keys: (*k).ne[1] as usize,
                heads: (*q).ne[2] as usize,
                shared: (*k).ne[2] as usize,
                tokens: (*q).ne[1] as usize,
                streams: (*q).ne[3] as usize,
            }
        }
    }

    /// Heads of queries to one of keys.
    fn group(&self) -> usize {
        self.heads / self.shared
    }

    /// D in whole vectors.
    fn padded(&self) -> usize {
        self.size.next_multiple_of(LANES)
    }

    /// Members of a group, at most.
    fn together(&self) -> usize {
        match self.tokens {
            1 => MOST_TOGETHER,
            _ => (QUERIES / self.group()).max(1),
        }
    }

    /// The `g`th of a reader's queries of a head of keys: D.
    unsafe fn q(&self, head: usize, Reader { stream, token, .. }: Reader, g: usize) -> &[f32] {
        // SAFETY: by contract.
        unsafe {
            let row = at(self.q, head * self.group() + g, stream).add(token * (*self.q).nb[1]);
            std::slice::from_raw_parts(row.cast::<f32>(), self.size)
        }
    }

    /// A reader's results of a head of keys, which lie behind one another, as those of tokens and sequences do.
    #[allow(clippy::mut_from_ref)]
    unsafe fn y(&self, head: usize, Reader { stream, token, .. }: Reader) -> &mut [f32] {
        let row = stream * self.tokens + token;
        let first = (row * self.heads + head * self.group()) * self.size;
        // SAFETY: by contract; only one thread has this head.
        unsafe { std::slice::from_raw_parts_mut(self.y.add(first), self.group() * self.size) }
    }

    /// The sinks of a head of keys' queries.
    unsafe fn sinks(&self, head: usize) -> Option<&[f32]> {
        // SAFETY: by contract.
        (!self.sinks.is_null()).then(|| unsafe {
            let first = (*self.sinks).data.cast::<f32>().add(head * self.group());
            std::slice::from_raw_parts(first, self.group())
        })
    }

    /// Puts products of queries and keys under the softcap, where there is one; what they are to be multiplied with yet.
    #[inline(always)]
    fn cap(&self, products: &mut [f32]) -> f32 {
        if self.softcap == 0.0 {
            return self.scale;
        }
        products.iter_mut().for_each(|x| *x = softcap(self.scale * *x, self.softcap).0);
        1.0
    }

    /// Reads a row of keys and one of values.
    #[inline(always)]
    unsafe fn read(
        &self,
        head: usize,
        [stream, row]: [usize; 2],
        key: &mut [f32],
        value: &mut [f32],
    ) {
        // SAFETY: by contract.
        unsafe {
            for (t, to) in [(self.k, key), (self.v, value)] {
                Type::F16.dequantize_raw(at(t, head, stream).add(row * (*t).nb[1]), to);
            }
        }
    }

    /// Has a row of keys and one of values brought into the cache.
    #[inline(always)]
    unsafe fn prefetch(&self, head: usize, [stream, row]: [usize; 2]) {
        for t in [self.k, self.v] {
            // SAFETY: by contract.
            let from = unsafe { at(t, head, stream).add(row * (*t).nb[1]) };
            for byte in (0..2 * self.size).step_by(64) {
                prefetch(from.wrapping_add(byte));
            }
        }
    }

    /// What the mask adds to a reader's scores of these keys, at most a tile of them.
    unsafe fn allowed(&self, of: Reader, keys: Range<usize>) -> [f32; TILE] {
        let mut allowed = [f32::NEG_INFINITY; TILE];
        let part = &mut allowed[..keys.len()];
        if self.mask.is_null() {
            part.fill(0.0);
        } else {
            // SAFETY: by contract.
            unsafe {
                let row = self.mask_row(of.stream, of.token);
                Type::F16.dequantize_raw(row.add(keys.start).cast(), part);
            }
        }
        allowed
    }

    /// A token's row of the mask, which is there: halves.
    unsafe fn mask_row(&self, stream: usize, token: usize) -> *const u16 {
        // SAFETY: by contract.
        unsafe { at(self.mask, 0, stream).add(token * (*self.mask).nb[1]).cast() }
    }

    /// Keys up to the last that the mask allows.
    unsafe fn seen(&self, stream: usize, token: usize) -> usize {
        if self.mask.is_null() {
            return self.keys;
        }
        // SAFETY: by contract.
        let sees = unsafe { allows(self.mask_row(stream, token)) };
        (0..self.keys).rfind(sees).map_or(0, |last| last + 1)
    }

    /// Keys before the first that the mask allows.
    unsafe fn unseen(&self, of: Reader) -> usize {
        if self.mask.is_null() {
            return 0;
        }
        // SAFETY: by contract.
        let sees = unsafe { allows(self.mask_row(of.stream, of.token)) };
        (0..of.seen).find(sees).unwrap_or(of.seen)
    }
}

/// Whether a row of a mask allows a key.
///
/// # Safety
/// The row has as many halves as are asked for.
unsafe fn allows(row: *const u16) -> impl Fn(&usize) -> bool {
    const MINUS_INFINITY: u16 = 0xfc00;
    // SAFETY: by contract.
    move |&key| unsafe { row.add(key).read_unaligned() } != MINUS_INFINITY
}

/// # Safety
/// A live tensor with so many heads and streams.
unsafe fn at(t: *const sys::ggml_tensor, head: usize, stream: usize) -> *const u8 {
    // SAFETY: by contract.
    unsafe { (*t).data.cast_const().cast::<u8>().add(head * (*t).nb[2] + stream * (*t).nb[3]) }
}

/// Less than any score that is allowed; of what is not, the exponential over it is 0.
const LOWEST: f32 = -1e30;
/// Queries of a head of keys in a group, at most.
const MOST: usize = MOST_TOGETHER * MOST_HEADS;
const _: () = assert!(QUERIES <= MOST);

/// Memory of a thread.
struct Scratch<'s> {
    /// A tile of keys, rows of D, and one of values, rows of whole vectors.
    keys: &'s mut [f32],
    values: &'s mut [f32],
    /// Scores of a tile.
    weights: &'s mut [f32],
    /// Queries as columns, of each head of keys.
    columns: &'s mut [f32],
    /// By head of keys and query ([`Part::places`]) what is added up, rows of whole vectors, the largest score so far, and the
    /// sum of exponentials over it.
    sums: &'s mut [f32],
    largest: &'s mut [f32],
    total: &'s mut [f32],
}

impl<'s> Scratch<'s> {
    fn sizes(node: &Node, queries: usize, heads: usize) -> [usize; 7] {
        let (padded, all) = (node.padded(), queries * heads);
        let width = queries.next_multiple_of(LANES);
        let columns = node.size * width * heads;
        [TILE * node.size, TILE * padded, TILE * width, columns, all * padded, all, all]
    }

    /// Floats that it takes at most.
    fn floats(node: &Node) -> usize {
        let sizes = Scratch::sizes(node, node.together() * node.group(), node.shared);
        LANES + sizes.into_iter().sum::<usize>()
    }

    fn new(scratch: &'s mut [f32], node: &Node, group: &Group, heads: Range<usize>) -> Scratch<'s> {
        let queries = group.queries(node);
        let mut rest = aligned(scratch);
        let [keys, values, weights, columns, sums, largest, total] =
            Scratch::sizes(node, queries, heads.len())
                .map(|n| rest.split_off_mut(..n).expect("as many floats"));
        if node.padded() > node.size {
            // What fills up the last vector of a row stays 0.
            values.fill(0.0);
        }
        sums.fill(0.0);
        largest.fill(LOWEST);
        total.fill(0.0);
        for (i, head) in heads.enumerate() {
            // SAFETY: one of the node's.
            let Some(sinks) = (unsafe { node.sinks(head) }) else { break };
            let places = i * queries..(i + 1) * queries;
            for (largest, sink) in largest[places.clone()].iter_mut().zip(sinks.iter().cycle()) {
                *largest = *sink;
            }
            total[places].fill(1.0);
        }
        Scratch { keys, values, weights, columns, sums, largest, total }
    }
}

/// Heads of keys and values, and the sequences of a group.
struct Job<'j> {
    node: &'j Node,
    group: &'j Group,
    heads: Range<usize>,
    /// What comes after it.
    next: Option<&'j Group>,
    invariant: bool,
    scratch: Scratch<'j>,
}

/// A run, and who reads it.
struct Part<'p> {
    node: &'p Node,
    group: &'p Group,
    heads: Range<usize>,
    run: &'p Run,
    /// What is read after it.
    following: Option<&'p Run>,
}

/// What is read after a tile.
struct Ahead<'p> {
    node: &'p Node,
    heads: Range<usize>,
    stream: usize,
    rows: Range<usize>,
}

impl Ahead<'_> {
    /// Has piece `i` brought closer. A piece is a head of a row; they come in the order of memory, which is faster than jumps from
    /// row to row.
    ///
    /// # Safety
    /// The contract of [`decode_attention`].
    #[inline(always)]
    unsafe fn prefetch(&self, i: usize) {
        let row = self.rows.start + i / self.heads.len();
        if row < self.rows.end {
            let head = self.heads.start + i % self.heads.len();
            // SAFETY: by contract.
            unsafe { self.node.prefetch(head, [self.stream, row]) };
        }
    }
}

impl Part<'_> {
    /// The queries that read it, of each head.
    fn queries(&self) -> Range<usize> {
        let members = &self.run.members;
        members.start * self.node.group()..members.end * self.node.group()
    }

    /// Where such queries of the `i`th of its heads have their sums.
    fn places(&self, i: usize, queries: Range<usize>) -> Range<usize> {
        let first = i * self.group.queries(self.node);
        first + queries.start..first + queries.end
    }

    /// Who reads it, and their queries.
    fn readers(&self) -> impl Iterator<Item = (Reader, Range<usize>)> {
        let group = self.node.group();
        let reader = move |m: usize| (self.group.members[m], m * group..(m + 1) * group);
        self.run.members.clone().map(reader)
    }

    /// Its keys, a tile at a time.
    fn tiles(&self) -> impl Iterator<Item = Range<usize>> {
        let Range { start, end } = self.run.keys;
        (start..end).step_by(TILE).map(move |from| from..(from + TILE).min(end))
    }

    /// What is read after the tile that ends so.
    fn after(&self, end: usize) -> Ahead<'_> {
        let (stream, rows) = match self.following {
            _ if end < self.run.keys.end => (self.run.stream, end..self.run.keys.end),
            Some(run) => (run.stream, run.keys.clone()),
            None => (0, 0..0),
        };
        Ahead { node: self.node, heads: self.heads.clone(), stream, rows }
    }

    /// Reads a head's tile, and asks for as many pieces of what comes after it, from this one on.
    ///
    /// # Safety
    /// The contract of [`decode_attention`].
    #[inline(always)]
    unsafe fn read(
        &self,
        (head, tile): (usize, Range<usize>),
        (keys, values): (&mut [f32], &mut [f32]),
        (ahead, piece): (&Ahead<'_>, usize),
    ) {
        let (node, stream) = (self.node, self.run.stream);
        let rows = keys.chunks_exact_mut(node.size).zip(values.chunks_exact_mut(node.padded()));
        for (i, (row, (key, value))) in tile.zip(rows).enumerate() {
            // SAFETY: by contract.
            unsafe {
                node.read(head, [stream, row], key, &mut value[..node.size]);
                ahead.prefetch(piece + i);
            }
        }
    }
}

/// `sums[query] += sum over keys of weights[query, key] values[key]`: numbers of queries and of keys, and their distances in the
/// weights; rows of `padded` floats.
///
/// # Safety
/// All are valid for these sizes.
#[inline(always)]
unsafe fn add_values<S: Simd>(
    simd: S,
    sizes: [usize; 2],
    (weights, strides): (*const f32, [usize; 2]),
    values: &[f32],
    sums: &mut [f32],
    padded: usize,
) {
    let (b, c) = (values.as_ptr(), sums.as_mut_ptr());
    let rows = Panel {
        sizes,
        width: padded,
        a: weights,
        strides,
        b,
        b_row: padded,
        c,
        c_row: padded,
        keep: true,
    };
    // SAFETY: by contract.
    unsafe { rows.run(simd) };
}

impl WithSimd for Job<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let Job { node, group, heads, next, invariant, mut scratch } = self;
        // SAFETY: by the contract of `decode_attention`, the only one that makes it; a thread has its heads for itself.
        unsafe {
            let mut runs = group.runs().peekable();
            let after = next.and_then(|group| group.runs().next());
            while let Some(run) = runs.next() {
                let following = runs.peek().or(after.as_ref());
                let part = Part { node, group, heads: heads.clone(), run: &run, following };
                match !invariant && part.queries().len() >= many::LEAST {
                    true => many::add(simd, &part, &mut scratch),
                    false => few::add(simd, &part, &mut scratch),
                }
            }
            for (i, head) in heads.enumerate() {
                let summed = scratch.sums.chunks_exact(node.padded()).zip(&*scratch.total);
                let mut summed = summed.skip(i * group.queries(node));
                for &member in &group.members {
                    let rows = node.y(head, member).chunks_exact_mut(node.size);
                    for (y, (sums, total)) in rows.zip(&mut summed) {
                        let share = 1.0 / total;
                        y.iter_mut().zip(sums).for_each(|(y, sum)| *y = sum * share);
                    }
                }
            }
        }
    }
}
