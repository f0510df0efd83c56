//! Two maps of a delta net in files that are one module in Hugging Face's Qwen3-Next, and adapters with them.
//!
//! `in_proj_qkvz` has for each key head its query, its key, its value heads and their gates z; files have queries, keys and
//! values in `attn_qkv` and z in `attn_gate`, each for all key heads in the same order. A pair on each is there one pair of
//! both ranks, whose B has zeros where a row is not of a pair's; one pair there is two here, of its rank each.

use std::collections::BTreeMap;

use super::peft_order::ValueHeads;
use crate::gguf::{AdapterFile, AdapterPair};

/// llama.cpp's name of the one map, in files of an older layout: `blk.N.ssm_in`.
const JOINED: &str = ".ssm_in.weight";
const PARTS: [&str; 2] = [".attn_qkv.weight", ".attn_gate.weight"];

/// Rows of the one map: for each the part that it is in, and its row there.
fn rows(heads: ValueHeads) -> impl Iterator<Item = (usize, usize)> {
    let ValueHeads { n_k, n_v, size } = heads;
    let values = n_v / n_k * size;
    (0..n_k).flat_map(move |head| {
        let run =
            move |part, first: usize, n: usize| (first..first + n).map(move |row| (part, row));
        run(0, head * size, size)
            .chain(run(0, (n_k + head) * size, size))
            .chain(run(0, 2 * n_k * size + head * values, values))
            .chain(run(1, head * values, values))
    })
}

/// Rows of each part.
fn lengths(heads: ValueHeads) -> [usize; 2] {
    let ValueHeads { n_k, n_v, size } = heads;
    [(2 * n_k + n_v) * size, n_v * size]
}

/// The adapter's pairs as Hugging Face's modules have them; none where one is not of this model.
pub(super) fn join(adapter: &AdapterFile, heads: ValueHeads) -> Option<Vec<AdapterPair>> {
    let mut found: BTreeMap<&str, [Option<&AdapterPair>; 2]> = BTreeMap::new();
    let mut pairs = Vec::with_capacity(adapter.pairs.len());
    for pair in &adapter.pairs {
        let part = PARTS.iter().position(|part| pair.weight.ends_with(part));
        match part.map(|part| (part, pair.weight.strip_suffix(PARTS[part]))) {
            Some((part, Some(layer))) => found.entry(layer).or_default()[part] = Some(pair),
            _ => pairs.push(pair.clone()),
        }
    }
    for (layer, parts) in found {
        let known = parts.iter().flatten();
        let rank: usize = known.clone().map(|pair| pair.rank).sum();
        let n_in = known.clone().next()?.n_in;
        let fits = |(pair, n): (&Option<&AdapterPair>, usize)| {
            pair.is_none_or(|pair| (pair.n_in, pair.n_out) == (n_in, n))
        };
        if !parts.iter().zip(lengths(heads)).all(fits) {
            return None;
        }
        let a = known.clone().flat_map(|pair| &pair.a).copied().collect();
        let first = [0, parts[0].map_or(0, |pair| pair.rank)];
        let rows: Vec<(usize, usize)> = rows(heads).collect();
        let mut b = vec![0f32; rows.len() * rank];
        for (out, (part, row)) in b.chunks_exact_mut(rank).zip(&rows) {
            let Some(pair) = parts[*part] else { continue };
            // The one pair's scale has the sum of ranks below alpha.
            let factor = if adapter.alpha == 0.0 { 1.0 } else { rank as f32 / pair.rank as f32 };
            let own = pair.b[row * pair.rank..][..pair.rank].iter();
            out[first[*part]..].iter_mut().zip(own).for_each(|(out, b)| *out = factor * b);
        }
        let (weight, n_out) = (format!("{layer}{JOINED}"), rows.len());
        pairs.push(AdapterPair { weight, rank, n_in, n_out, n_expert: 1, a, b });
    }
    Some(pairs)
}

/// Whether a pair is on the one map.
pub(super) fn is_joined(pair: &AdapterPair) -> bool {
    pair.weight.ends_with(JOINED)
}

/// A pair on the one map as two; none where it is not of this model.
pub(super) fn split(pair: &AdapterPair, heads: ValueHeads) -> Option<[AdapterPair; 2]> {
    let layer = pair.weight.strip_suffix(JOINED)?;
    let lengths = lengths(heads);
    if pair.n_out != lengths.iter().sum::<usize>() {
        return None;
    }
    let mut parts = [0, 1].map(|part| AdapterPair {
        weight: format!("{layer}{}", PARTS[part]),
        n_out: lengths[part],
        b: vec![0.0; lengths[part] * pair.rank],
        ..pair.clone()
    });
    for (from, (part, row)) in pair.b.chunks_exact(pair.rank).zip(rows(heads)) {
        parts[part].b[row * pair.rank..][..pair.rank].copy_from_slice(from);
    }
    Some(parts)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pair(weight: &str, rank: usize, n_in: usize, n_out: usize, first: usize) -> AdapterPair {
        let count = |n: usize| (first..first + n).map(|i| i as f32).collect::<Vec<f32>>();
        let (a, b) = (count(n_in * rank), count(rank * n_out));
        AdapterPair { weight: weight.into(), rank, n_in, n_out, n_expert: 1, a, b }
    }

    /// `scale B A`, row by row.
    fn change(pair: &AdapterPair, alpha: f32) -> Vec<f32> {
        let of_row = |b: &[f32]| -> Vec<f32> {
            let sum = |k: usize| -> f32 {
                (0..pair.rank).map(|r| b[r] * pair.a[r * pair.n_in + k]).sum::<f32>()
            };
            (0..pair.n_in).map(|k| alpha / pair.rank as f32 * sum(k)).collect()
        };
        pair.b.chunks(pair.rank).flat_map(of_row).collect()
    }

    #[test]
    fn one_pair_changes_what_two_do() {
        let heads = ValueHeads { n_k: 2, n_v: 4, size: 1 };
        let qkv = pair("blk.3.attn_qkv.weight", 2, 3, 8, 1);
        let z = pair("blk.3.attn_gate.weight", 1, 3, 4, 50);
        let other = pair("blk.3.ffn_up.weight", 1, 3, 5, 7);
        let file = |pairs| AdapterFile {
            arch: "qwen3next".into(),
            name: None,
            alpha: 6.0,
            pairs,
            extra: Vec::new(),
        };
        let joined = join(&file(vec![qkv.clone(), other.clone(), z.clone()]), heads).unwrap();
        assert_eq!(joined[0], other);
        let one = &joined[1];
        assert_eq!((one.weight.as_str(), one.rank, one.n_out), ("blk.3.ssm_in.weight", 3, 12));
        // By key head: query, key, two values, two z.
        let [first, second] = [change(&qkv, 6.0), change(&z, 6.0)];
        let row = |x: &[f32], row: usize| x[row * 3..][..3].to_vec();
        let order = [(0, 0), (0, 2), (0, 4), (0, 5), (1, 0), (1, 1)];
        let order = order.into_iter().chain([(0, 1), (0, 3), (0, 6), (0, 7), (1, 2), (1, 3)]);
        let want = order.flat_map(|(part, at)| row([&first, &second][part], at));
        let off = change(one, 6.0).into_iter().zip(want).map(|(a, b)| (a - b).abs() / b.abs());
        assert!(off.fold(0.0, f32::max) < 1e-6);
        let parts = split(one, heads).unwrap();
        for (part, want) in parts.iter().zip([&qkv, &z]) {
            assert_eq!((&part.weight, part.n_out, part.rank), (&want.weight, want.n_out, 3));
            let off = change(part, 6.0).into_iter().zip(change(want, 6.0));
            assert!(off.map(|(a, b)| (a - b).abs() / b.abs()).fold(0.0, f32::max) < 1e-6);
        }
        // One of them alone; one of another model.
        let alone = join(&file(vec![z.clone()]), heads).unwrap();
        assert_eq!((alone[0].rank, alone[0].b[..4].to_vec()), (1, vec![0.0; 4]));
        let wide = ValueHeads { size: 2, ..heads };
        assert!(join(&file(vec![z]), wide).is_none() && split(one, wide).is_none());
    }
}
