//! Attention of many sequences that each decode one token, inside llama.cpp's graphs.
//!
//! ```text
//! y[:, h, s] = sum_j p_j v[:, j, h/g, s],  p = softmax_j(scale q[:, h, s] . k[:, j, h/g, s] + mask[j, s])
//! ```
//!
//! g heads of queries read one head of keys and values, whose F16 a tile of keys at a time turns into F32 once for all of
//! them; sums are F32, where ggml adds values up in F16. Sequences that began alike, as the completions of a prompt do, read
//! what they have in common once, too. Tiles come in order and masked keys add nothing, so that a
//! sequence's result does not depend on the others, nor on the number of threads.

use std::ffi::c_int;
use std::ops::Range;

use ggml_sys as sys;
use pulp::{Simd, WithSimd};

use super::exp::exp;
use super::gemm::with_scratch;
use super::rows::partition;
use crate::ggml::Type;

/// Keys whose rows are asked for before they are read: what the processor does not foresee itself across rows of other heads.
const AHEAD: usize = 24;
/// Keys of a tile.
const TILE: usize = 64;
/// Heads of queries that may share a head of keys.
pub(crate) const MOST_HEADS: usize = 32;
/// Sequences that read what they have in common together: few enough that threads get like shares of a large group.
const MOST_TOGETHER: usize = 8;

/// # Safety
/// The contract of `bupo_decoding` in ggml-ext.h: `dst` is a FLASH_ATTN_EXT node `[D, H, 1, S]` of live tensors in host
/// memory, `src[0]` = q `[D, 1, H, S]` F32, `src[1]`, `src[2]` = k, v `[D, n, H_kv, S]` F16, `src[3]` = mask `[n, .., 1, S]`
/// F16 or null, with whole rows; no sinks, slopes or softcap. `lineages` is null or has S members, which say the truth. Each
/// of the `nth` threads calls this with its own `ith`.
pub(crate) unsafe extern "C" fn decode_attention(
    dst: *mut sys::ggml_tensor,
    lineages: *const sys::bupo_lineage,
    ith: c_int,
    nth: c_int,
) {
    // SAFETY: by contract; threads write different heads of y.
    unsafe {
        let node = Node::new(dst);
        let lineages =
            (!lineages.is_null()).then(|| std::slice::from_raw_parts(lineages, node.streams));
        let groups = groups(node.streams, lineages, |stream| node.seen(stream));
        let jobs = partition(groups.len() * node.shared, ith, nth);
        let job = |job: usize| (&groups[job / node.shared], job % node.shared);
        let arch = pulp::Arch::new();
        let scratch = 2 * TILE * node.size + MOST_HEADS * TILE;
        with_scratch(scratch, |scratch| {
            for i in jobs.clone() {
                let (group, head) = job(i);
                let next = (i + 1 < jobs.end).then(|| job(i + 1));
                let scratch = &mut *scratch;
                arch.dispatch(Job { node: &node, group, head, next, scratch });
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
    y: *mut f32,
    scale: f32,
    /// D.
    size: usize,
    /// n.
    keys: usize,
    /// H.
    heads: usize,
    /// H_kv.
    shared: usize,
    /// S.
    streams: usize,
}

impl Node {
    /// # Safety
    /// The contract of [`decode_attention`], as of the other methods, with heads and streams in range.
    unsafe fn new(dst: *mut sys::ggml_tensor) -> Node {
        // SAFETY: by contract.
        unsafe {
            let [q, k, v, mask, ..] = (*dst).src;
            Node {
                q,
                k,
                v,
                mask,
                y: (*dst).data.cast(),
                scale: f32::from_bits((*dst).op_params[0] as u32),
                size: (*q).ne[0] as usize,
                keys: (*k).ne[1] as usize,
                heads: (*q).ne[2] as usize,
                shared: (*k).ne[2] as usize,
                streams: (*q).ne[3] as usize,
            }
        }
    }

    /// Heads of queries to one of keys.
    fn group(&self) -> usize {
        self.heads / self.shared
    }

    /// Queries of a head of keys: g rows of D.
    unsafe fn q(&self, head: usize, stream: usize) -> impl Iterator<Item = &[f32]> {
        (0..self.group()).map(move |g| {
            // SAFETY: by contract.
            unsafe {
                let row = at(self.q, head * self.group() + g, stream).cast::<f32>();
                std::slice::from_raw_parts(row, self.size)
            }
        })
    }

    /// Results of a head of keys, which lie behind one another, as those of sequences do.
    #[allow(clippy::mut_from_ref)]
    unsafe fn y(&self, head: usize, stream: usize) -> &mut [f32] {
        let first = (stream * self.heads + head * self.group()) * self.size;
        // SAFETY: by contract; only one thread has this head.
        unsafe { std::slice::from_raw_parts_mut(self.y.add(first), self.group() * self.size) }
    }

    unsafe fn rows(&self, head: usize, stream: usize) -> Rows {
        // SAFETY: by contract.
        unsafe {
            Rows {
                k: at(self.k, head, stream),
                v: at(self.v, head, stream),
                strides: [(*self.k).nb[1], (*self.v).nb[1]],
            }
        }
    }

    /// What the mask adds to scores of these keys, at most a tile of them.
    unsafe fn allowed(&self, stream: usize, keys: Range<usize>) -> [f32; TILE] {
        let mut allowed = [f32::NEG_INFINITY; TILE];
        let part = &mut allowed[..keys.len()];
        if self.mask.is_null() {
            part.fill(0.0);
        } else {
            // SAFETY: by contract.
            unsafe { Type::F16.dequantize_raw(at(self.mask, 0, stream).add(2 * keys.start), part) };
        }
        allowed
    }

    /// Keys up to the last that the mask allows.
    unsafe fn seen(&self, stream: usize) -> usize {
        const MINUS_INFINITY: u16 = 0xfc00;
        if self.mask.is_null() {
            return self.keys;
        }
        // SAFETY: by contract.
        let half =
            |i: usize| unsafe { at(self.mask, 0, stream).cast::<u16>().add(i).read_unaligned() };
        (0..self.keys).rfind(|&i| half(i) != MINUS_INFINITY).map_or(0, |last| last + 1)
    }
}

/// # Safety
/// A live tensor with so many heads and streams.
unsafe fn at(t: *const sys::ggml_tensor, head: usize, stream: usize) -> *const u8 {
    // SAFETY: by contract.
    unsafe { (*t).data.cast_const().cast::<u8>().add(head * (*t).nb[2] + stream * (*t).nb[3]) }
}

/// Sequences that are computed together.
#[derive(Debug, PartialEq)]
struct Group {
    /// Stream, and keys of it up to the last that is seen.
    members: Vec<(usize, usize)>,
    /// Keys that all have in common, whole tiles.
    common: usize,
}

/// Members of an origin, as many together as allowed; whoever has little in common is alone.
fn groups(
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
        let member = (stream, seen(stream));
        let common = rows(stream).min(member.1 / TILE * TILE);
        match groups.last_mut() {
            Some(group)
                if origin(stream).is_some()
                    && of == origin(stream)
                    && group.members.len() < MOST_TOGETHER =>
            {
                group.members.push(member);
                group.common = group.common.min(common);
            }
            _ => groups.push(Group { members: vec![member], common }),
        }
        of = origin(stream);
    }
    groups
}

/// Keys and values of a head, F16, rows some bytes apart.
#[derive(Clone, Copy)]
struct Rows {
    k: *const u8,
    v: *const u8,
    strides: [usize; 2],
}

impl Rows {
    /// # Safety
    /// Row `i` is there.
    unsafe fn read(&self, i: usize, key: &mut [f32], value: &mut [f32]) {
        // SAFETY: by contract.
        unsafe {
            Type::F16.dequantize_raw(self.k.add(i * self.strides[0]), key);
            Type::F16.dequantize_raw(self.v.add(i * self.strides[1]), value);
        }
    }

    /// Has row `i` of numbers of this size brought into the cache.
    #[inline(always)]
    fn prefetch(&self, i: usize, size: usize) {
        for (from, stride) in [self.k, self.v].into_iter().zip(self.strides) {
            for byte in (0..2 * size).step_by(64) {
                prefetch(from.wrapping_add(i * stride + byte));
            }
        }
    }
}

/// Has the cache line of an address brought closer, wherever it points to.
#[inline(always)]
fn prefetch(at: *const u8) {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: a prefetch never faults.
    unsafe {
        std::arch::x86_64::_mm_prefetch::<{ std::arch::x86_64::_MM_HINT_T0 }>(at.cast())
    };
    #[cfg(not(target_arch = "x86_64"))]
    let _ = at;
}

/// The heads of queries that share a head of keys and values, of the sequences of a group.
struct Job<'j> {
    node: &'j Node,
    group: &'j Group,
    head: usize,
    /// What this thread does after it.
    next: Option<(&'j Group, usize)>,
    scratch: &'j mut [f32],
}

/// A run of keys, and the members of the group that see it.
struct Run {
    rows: Rows,
    keys: Range<usize>,
    members: Range<usize>,
}

impl Run {
    /// What a group reads, in order: what its members have in common, then what each has of its own.
    ///
    /// # Safety
    /// The contract of [`decode_attention`]; a group and a head of the node.
    unsafe fn all(node: &Node, group: &Group, head: usize) -> impl Iterator<Item = Run> {
        let Group { members, common } = group;
        // SAFETY: by contract.
        let rows = move |stream: usize| unsafe { node.rows(head, stream) };
        let first = Run { rows: rows(members[0].0), keys: 0..*common, members: 0..members.len() };
        let own = members.iter().enumerate().map(move |(i, &(stream, seen))| Run {
            rows: rows(stream),
            keys: *common..seen,
            members: i..i + 1,
        });
        std::iter::once(first).chain(own).filter(|run| !run.keys.is_empty())
    }

    /// Row `i`, or beyond the run one of the next.
    #[inline(always)]
    fn prefetch(&self, i: usize, next: Option<&Run>, size: usize) {
        match next {
            _ if i < self.keys.end => self.rows.prefetch(i, size),
            Some(next) => next.rows.prefetch(next.keys.start + i - self.keys.end, size),
            None => (),
        }
    }
}

impl WithSimd for Job<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let Job { node, group, head, next, scratch } = self;
        let size = node.size;
        let (keys, rest) = scratch.split_at_mut(TILE * size);
        let (values, weights) = rest.split_at_mut(TILE * size);
        // Largest score and sum of exponentials so far, of each head of each member.
        let mut running = [[(f32::NEG_INFINITY, 0f32); MOST_HEADS]; MOST_TOGETHER];
        // SAFETY: by the contract of `decode_attention`, the only one that makes it; a thread has a head for itself.
        unsafe {
            for &(stream, _) in &group.members {
                node.y(head, stream).fill(0.0);
            }
            let mut runs = Run::all(node, group, head).peekable();
            let mut after = next.map(|(group, head)| Run::all(node, group, head).next());
            while let Some(run) = runs.next() {
                let following = match runs.peek() {
                    Some(run) => Some(run),
                    None => after.as_mut().and_then(|run| run.as_ref()),
                };
                for from in run.keys.clone().step_by(TILE) {
                    let tile = from..(from + TILE).min(run.keys.end);
                    let rows = keys.chunks_exact_mut(size).zip(values.chunks_exact_mut(size));
                    for (i, (key, value)) in tile.clone().zip(rows) {
                        run.rows.read(i, key, value);
                        run.prefetch(i + AHEAD, following, size);
                    }
                    for member in run.members.clone() {
                        let (stream, _) = group.members[member];
                        let allowed = node.allowed(stream, tile.clone());
                        let Some(last) = allowed.iter().rposition(|&m| m > f32::NEG_INFINITY)
                        else {
                            continue;
                        };
                        let heads = node
                            .q(head, stream)
                            .zip(weights.as_chunks_mut::<TILE>().0)
                            .zip(node.y(head, stream).chunks_exact_mut(size))
                            .zip(&mut running[member]);
                        for (((q, weights), y), (largest, sum)) in heads {
                            let seen = keys[..(last + 1) * size].chunks_exact(size);
                            for (w, key) in weights.iter_mut().zip(seen) {
                                *w = dot(simd, q, key);
                            }
                            let shrink = softmax(weights, &allowed, node.scale, largest, sum);
                            add_rows(simd, y, shrink, &weights[..last + 1], values);
                        }
                    }
                }
            }
            for (&(stream, _), running) in group.members.iter().zip(running) {
                for (y, (_, sum)) in node.y(head, stream).chunks_exact_mut(size).zip(running) {
                    let share = 1.0 / sum;
                    y.iter_mut().for_each(|y| *y *= share);
                }
            }
        }
    }
}

/// Scores before scale and mask become exponentials over the largest so far, which with their sum is brought up to date;
/// what was summed before is to be multiplied with the result.
#[inline(always)]
fn softmax(
    scores: &mut [f32; TILE],
    allowed: &[f32; TILE],
    scale: f32,
    largest: &mut f32,
    sum: &mut f32,
) -> f32 {
    const LANES: usize = 16;
    let mut most = [*largest; LANES];
    for (scores, allowed) in
        scores.as_chunks_mut::<LANES>().0.iter_mut().zip(allowed.as_chunks::<LANES>().0)
    {
        for i in 0..LANES {
            // What a score that is not allowed was before does not matter.
            scores[i] = if allowed[i] > f32::NEG_INFINITY {
                scale * scores[i] + allowed[i]
            } else {
                allowed[i]
            };
            most[i] = most[i].max(scores[i]);
        }
    }
    let new = most.into_iter().fold(f32::NEG_INFINITY, f32::max);
    let mut sums = [0f32; LANES];
    for scores in scores.as_chunks_mut::<LANES>().0 {
        for i in 0..LANES {
            let e = exp(scores[i] - new);
            scores[i] = if scores[i] > f32::NEG_INFINITY { e } else { 0.0 };
            sums[i] += scores[i];
        }
    }
    let shrink = if *largest > f32::NEG_INFINITY { exp(*largest - new) } else { 0.0 };
    *sum = *sum * shrink + sums.into_iter().sum::<f32>();
    *largest = new;
    shrink
}

#[inline(always)]
fn dot<S: Simd>(simd: S, a: &[f32], b: &[f32]) -> f32 {
    let ((a, a_rest), (b, b_rest)) = (S::as_simd_f32s(a), S::as_simd_f32s(b));
    let mut sum = simd.splat_f32s(0.0);
    for (a, b) in a.iter().zip(b) {
        sum = simd.mul_add_e_f32s(*a, *b, sum);
    }
    let rest: f32 = a_rest.iter().zip(b_rest).map(|(a, b)| a * b).sum();
    simd.reduce_sum_f32s(sum) + rest
}

/// `y = shrink y + sum_j weights[j] rows[j]`
#[inline(always)]
fn add_rows<S: Simd>(simd: S, y: &mut [f32], shrink: f32, weights: &[f32], rows: &[f32]) {
    const AT_ONCE: usize = 4;
    let size = y.len();
    let (y, y_rest) = S::as_mut_simd_f32s(y);
    let whole = y.len() * S::F32_LANES;
    let factor = simd.splat_f32s(shrink);
    for (i, y) in y.chunks_mut(AT_ONCE).enumerate() {
        let mut sums = [simd.splat_f32s(0.0); AT_ONCE];
        for (sum, y) in sums.iter_mut().zip(y.iter()) {
            *sum = simd.mul_f32s(*y, factor);
        }
        // Two sums of each, so that one need not wait for the other.
        let mut odd = [simd.splat_f32s(0.0); AT_ONCE];
        for (weights, rows) in weights.chunks(2).zip(rows.chunks(2 * size)) {
            for (w, (row, sums)) in
                weights.iter().zip(rows.chunks_exact(size).zip([&mut sums, &mut odd]))
            {
                let w = simd.splat_f32s(*w);
                let row = &S::as_simd_f32s(row).0[i * AT_ONCE..][..y.len()];
                for (sum, row) in sums.iter_mut().zip(row) {
                    *sum = simd.mul_add_e_f32s(w, *row, *sum);
                }
            }
        }
        for (y, (even, odd)) in y.iter_mut().zip(sums.into_iter().zip(odd)) {
            *y = simd.add_f32s(even, odd);
        }
    }
    for (i, y) in y_rest.iter_mut().enumerate() {
        let column = rows.iter().skip(whole + i).step_by(size);
        *y = *y * shrink + weights.iter().zip(column).map(|(w, v)| w * v).sum::<f32>();
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
        let groups = groups(13, Some(&lineages), seen);
        let members = |streams: Range<usize>| streams.map(|s| (s, seen(s))).collect();
        assert_eq!(groups.len(), 5);
        for (i, stream) in [10, 11, 12].into_iter().enumerate() {
            assert_eq!(groups[i], Group { members: members(stream..stream + 1), common: 0 });
        }
        assert_eq!(groups[3], Group { members: members(0..8), common: 64 });
        assert_eq!(groups[4], Group { members: members(8..10), common: 128 });
        let alone = super::groups(2, None, seen);
        assert!(alone.iter().all(|group| group.members.len() == 1 && group.common == 0));
    }
}
