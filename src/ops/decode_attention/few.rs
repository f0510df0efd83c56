//! Few queries on the same keys: a score is a sum over the lanes of vectors.

use pulp::Simd;

use super::super::exp::exp;
use super::{Part, Scratch, TILE, add_values};

/// Adds a run of keys to what its readers have summed up, a tile of all heads at a time.
///
/// # Safety
/// The contract of [`super::decode_attention`].
#[inline(always)]
pub(super) unsafe fn add<S: Simd>(simd: S, part: &Part<'_>, scratch: &mut Scratch<'_>) {
    let node = part.node;
    let (size, group, padded) = (node.size, node.group(), node.padded());
    let Scratch { keys, values, weights, sums, largest, total, .. } = scratch;
    let (weights, _) = weights[..group * TILE].as_chunks_mut::<TILE>();
    for tile in part.tiles() {
        let ahead = part.after(tile.end);
        for (i, head) in part.heads.clone().enumerate() {
            // SAFETY: by contract; the scratch has room for so many queries.
            unsafe {
                let to = (&mut **keys, &mut **values);
                part.read((head, tile.clone()), to, (&ahead, i * tile.len()));
                for (reader, queries) in part.readers() {
                    let allowed = node.allowed(reader, tile.clone());
                    let Some(last) = allowed.iter().rposition(|&m| m > f32::NEG_INFINITY) else {
                        continue;
                    };
                    let seen = &keys[..(last + 1) * size];
                    for (i, weights) in weights.chunks_mut(2).enumerate() {
                        match weights {
                            [of_a, of_b] => {
                                let both = [0, 1].map(|g| node.q(head, reader, 2 * i + g));
                                score(simd, both, seen, [of_a, of_b]);
                            }
                            [of_a] => score(simd, [node.q(head, reader, 2 * i)], seen, [of_a]),
                            _ => unreachable!("one or two"),
                        }
                    }
                    let places = part.places(i, queries);
                    let sums = &mut sums[places.start * padded..places.end * padded];
                    let state = largest[places.clone()].iter_mut().zip(&mut total[places]);
                    let rows = weights.iter_mut().zip(sums.chunks_exact_mut(padded));
                    for ((weights, sums), (largest, total)) in rows.zip(state) {
                        let scale = node.cap(&mut weights[..last + 1]);
                        let shrink = softmax(weights, &allowed, scale, largest, total);
                        sums.iter_mut().for_each(|sum| *sum *= shrink);
                    }
                    let weights = (weights.as_ptr().cast(), [TILE, 1]);
                    add_values(simd, [group, last + 1], weights, values, sums, padded);
                }
            }
        }
    }
}

/// Scores of queries with keys, rows behind one another.
#[inline(always)]
fn score<S: Simd, const N: usize>(
    simd: S,
    queries: [&[f32]; N],
    keys: &[f32],
    mut scores: [&mut [f32; TILE]; N],
) {
    for (i, key) in keys.chunks_exact(queries[0].len()).enumerate() {
        let products = dots(simd, queries, key);
        for (scores, product) in scores.iter_mut().zip(products) {
            scores[i] = product;
        }
    }
}

/// Products of queries with a key.
#[inline(always)]
fn dots<S: Simd, const N: usize>(simd: S, queries: [&[f32]; N], key: &[f32]) -> [f32; N] {
    /// Sums of each, so that one need not wait for the other.
    const AT_ONCE: usize = 4;
    let (vectors, rest) = S::as_simd_f32s(key);
    let (n, whole) = (vectors.len(), key.len() - rest.len());
    assert!(queries.iter().all(|q| q.len() == key.len()));
    let key_at = vectors.as_ptr();
    let queries_at = queries.map(|q| q.as_ptr().cast::<S::f32s>());
    let mut sums = [[simd.splat_f32s(0.0); N]; AT_ONCE];
    // SAFETY: all have n vectors.
    unsafe {
        for i in (0..n / AT_ONCE * AT_ONCE).step_by(AT_ONCE) {
            for (i, sums) in (i..).zip(&mut sums) {
                let key = key_at.add(i).read_unaligned();
                for (sum, query) in sums.iter_mut().zip(queries_at) {
                    *sum = simd.mul_add_e_f32s(query.add(i).read_unaligned(), key, *sum);
                }
            }
        }
        for i in n / AT_ONCE * AT_ONCE..n {
            let key = key_at.add(i).read_unaligned();
            for (sum, query) in sums[0].iter_mut().zip(queries_at) {
                *sum = simd.mul_add_e_f32s(query.add(i).read_unaligned(), key, *sum);
            }
        }
    }
    let mut products = [0.0; N];
    let [a, b, c, d] = sums;
    for (q, product) in products.iter_mut().enumerate() {
        let all = simd.add_f32s(simd.add_f32s(a[q], b[q]), simd.add_f32s(c[q], d[q]));
        let last: f32 = queries[q][whole..].iter().zip(rest).map(|(q, k)| q * k).sum();
        *product = simd.reduce_sum_f32s(all) + last;
    }
    products
}

/// Scores before `scale` and mask become exponentials over the largest so far, which with their sum is brought up to date;
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
    let shrink = exp(*largest - new);
    *sum = *sum * shrink + sums.into_iter().sum::<f32>();
    *largest = new;
    shrink
}
