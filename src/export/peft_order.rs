//! Where GGUF files have rows and columns of a map in another order than Hugging Face's modules, and adapters with them.
//!
//! **Pairs that rotate.** Files of architecture llama rotate neighbouring pairs, Hugging Face's modules pairs
//! `(i, i + hd/2)`; so the converter permutes the rows of q and k within each head, and with them the rows of B: row
//! `2 j + s` of a head is row `s hd/2 + j` there (j < hd/2, s in {0, 1}). Qwen is not permuted.
//!
//! **Value heads of a delta net.** Hugging Face's modules have those of one key head together, files those of all key heads
//! by turns: head `j n_k + i` is head `i n_v/n_k + j` there (i < n_k, j < n_v/n_k). These are rows of B in the maps that
//! give values, their gates, alpha and beta, and columns of A in the map that reads what the heads give.

use std::borrow::Cow;

use crate::gguf::{AdapterPair, GgufFile};
use crate::model::Family;
use crate::{Error, Result};

/// Heads of a delta net.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ValueHeads {
    /// Key heads.
    pub n_k: usize,
    /// Value heads.
    pub n_v: usize,
    /// Size of a head.
    pub size: usize,
}

impl ValueHeads {
    /// Those of a model's metadata; none in models without delta nets.
    ///
    /// # Errors
    /// Counts that are missing, or that do not divide.
    pub fn from_gguf(file: &GgufFile, arch: &Family) -> Result<Option<ValueHeads>> {
        let key = |name: &str| format!("{arch}.ssm.{name}");
        let Some(size) = file.find(&key("state_size"))? else { return Ok(None) };
        let n_k = file.require(&key("group_count"))?;
        let n_v: usize = file.require(&key("time_step_rank"))?;
        if n_k == 0 || !n_v.is_multiple_of(n_k) {
            let place = format!("{}: key '{}'", file.name(), key("time_step_rank"));
            let expected = format!("a multiple of {n_k} key heads");
            return Err(Error::invalid(place, expected, n_v.to_string(), "fetch the model again"));
        }
        Ok(Some(ValueHeads { n_k, n_v, size }))
    }
}

/// What is in another order in a weight's adapter.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Order {
    /// Rows of B, in each of so many heads.
    Rotated { heads: usize },
    /// Runs of `run` rows of B from row `first` on, one for each value head.
    ValueRows { heads: ValueHeads, first: usize, run: usize },
    /// Columns of A.
    ValueColumns { heads: ValueHeads },
}

impl Order {
    /// That of a value head's runs in the weight of this name; none where the order is the same.
    pub(super) fn of_values(heads: ValueHeads, weight: &str) -> Option<Order> {
        let rows = |first, run| Some(Order::ValueRows { heads, first, run });
        match weight.strip_prefix("blk.")?.split_once('.')?.1 {
            "attn_qkv.weight" => rows(2 * heads.n_k * heads.size, heads.size),
            "attn_gate.weight" => rows(0, heads.size),
            "ssm_alpha.weight" | "ssm_beta.weight" => rows(0, 1),
            "ssm_out.weight" => Some(Order::ValueColumns { heads }),
            _ => None,
        }
    }

    /// A and B in the other order: GGUF's, or back; none where they are not of this model.
    pub(super) fn apply<'p>(
        self,
        pair: &'p AdapterPair,
        to_gguf: bool,
    ) -> Option<[Cow<'p, [f32]>; 2]> {
        let (a, b) = (Cow::Borrowed(&pair.a[..]), Cow::Borrowed(&pair.b[..]));
        match self {
            Order::Rotated { heads } => {
                let rows = rotated_rows(pair.n_out, heads)?;
                Some([a, moved(&pair.b, pair.rank, &rows, to_gguf).into()])
            }
            Order::ValueRows { heads, first, run } => {
                if pair.n_out != first + heads.n_v * run {
                    return None;
                }
                let rows: Vec<usize> =
                    (0..first).chain(value_runs(heads, run).map(|row| first + row)).collect();
                Some([a, moved(&pair.b, pair.rank, &rows, to_gguf).into()])
            }
            Order::ValueColumns { heads } => {
                if pair.n_in != heads.n_v * heads.size {
                    return None;
                }
                let columns: Vec<usize> = value_runs(heads, heads.size).collect();
                let rows = pair.a.chunks(pair.n_in);
                let a: Vec<f32> = rows.flat_map(|row| moved(row, 1, &columns, to_gguf)).collect();
                Some([a.into(), b])
            }
        }
    }

    /// What an adapter must have.
    pub(super) fn expected(self) -> String {
        match self {
            Order::Rotated { heads } => format!("outputs for {heads} heads of even size"),
            Order::ValueRows { heads, first, run } => {
                format!("{} outputs", first + heads.n_v * run)
            }
            Order::ValueColumns { heads } => format!("{} inputs", heads.n_v * heads.size),
        }
    }
}

/// Rows of `width` values: GGUF's row `i` is the other's row `others[i]`.
fn moved(x: &[f32], width: usize, others: &[usize], to_gguf: bool) -> Vec<f32> {
    let mut out = vec![0.0; x.len()];
    for (row, &other) in others.iter().enumerate() {
        let (from, to) = if to_gguf { (other, row) } else { (row, other) };
        out[to * width..][..width].copy_from_slice(&x[from * width..][..width]);
    }
    out
}

/// For each of GGUF's rows of `heads` heads with pairs that are neighbours, the row there.
fn rotated_rows(n_out: usize, heads: usize) -> Option<Vec<usize>> {
    if heads == 0 || !n_out.is_multiple_of(2 * heads) {
        return None;
    }
    let (size, half) = (n_out / heads, n_out / heads / 2);
    let row = |row: usize| row / size * size + row % size % 2 * half + row % size / 2;
    Some((0..n_out).map(row).collect())
}

/// For each of GGUF's values in runs, one for each value head, the one there.
fn value_runs(heads: ValueHeads, run: usize) -> impl Iterator<Item = usize> {
    let group = heads.n_v / heads.n_k;
    (0..heads.n_v * run).map(move |at| {
        let (head, in_run) = (at / run, at % run);
        (head % heads.n_k * group + head / heads.n_k) * run + in_run
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pair(rank: usize, a: Vec<f32>, b: Vec<f32>) -> AdapterPair {
        let (n_in, n_out) = (a.len() / rank, b.len() / rank);
        AdapterPair { weight: "blk.0.w.weight".into(), rank, n_in, n_out, n_expert: 1, a, b }
    }

    fn count(n: usize) -> Vec<f32> {
        (0..n).map(|i| i as f32).collect()
    }

    /// A and B in GGUF's order, which must become themselves again on the way back.
    fn there(order: Order, pair: &AdapterPair) -> Option<[Vec<f32>; 2]> {
        let [a, b] = order.apply(pair, true)?.map(Cow::into_owned);
        let moved = AdapterPair { a: a.clone(), b: b.clone(), ..pair.clone() };
        let back = order.apply(&moved, false).unwrap();
        assert_eq!(back.map(Cow::into_owned), [pair.a.clone(), pair.b.clone()]);
        Some([a, b])
    }

    #[test]
    fn the_permutation_is_the_converters_and_its_own_inverse_undone() {
        // numpy: arange(8).reshape(1, 2, 4).swapaxes(1, 2).reshape(8) = [0 4 1 5 2 6 3 7]
        let one = Order::Rotated { heads: 1 };
        let [_, b] = there(one, &pair(1, vec![0.0], count(8))).unwrap();
        assert_eq!(b, [0.0, 4.0, 1.0, 5.0, 2.0, 6.0, 3.0, 7.0]);
        // Two heads, rank 2.
        let two = pair(2, vec![0.0; 2], count(16));
        let [_, b] = there(Order::Rotated { heads: 2 }, &two).unwrap();
        assert_eq!(b[..8], [0.0, 1.0, 4.0, 5.0, 2.0, 3.0, 6.0, 7.0]);
        assert_eq!(there(Order::Rotated { heads: 3 }, &two), None);
    }

    #[test]
    fn value_heads_take_turns_in_files() {
        // Two key heads, four value heads of size 1: there 0 and 1 belong to key head 0.
        let heads = ValueHeads { n_k: 2, n_v: 4, size: 1 };
        let of = |name: &str| Order::of_values(heads, &format!("blk.7.{name}.weight")).unwrap();
        let [_, b] = there(of("ssm_beta"), &pair(1, vec![0.0], count(4))).unwrap();
        assert_eq!(b, [0.0, 2.0, 1.0, 3.0]);
        // Rows of q and k stay.
        let [_, b] = there(of("attn_qkv"), &pair(1, vec![0.0], count(8))).unwrap();
        assert_eq!(b, [0.0, 1.0, 2.0, 3.0, 4.0, 6.0, 5.0, 7.0]);
        assert_eq!(there(of("attn_qkv"), &pair(1, vec![0.0], count(7))), None);
        // Columns of A, rank 2.
        let wide = ValueHeads { n_k: 1, n_v: 2, size: 2 };
        let order = Order::of_values(wide, "blk.0.ssm_out.weight").unwrap();
        let [a, b] = there(order, &pair(2, count(8), count(2))).unwrap();
        assert_eq!((a, b), (count(8), count(2))); // one key head: nothing to turn
        let [a, _] = there(of("ssm_out"), &pair(2, count(8), count(2))).unwrap();
        assert_eq!(a, [0.0, 2.0, 1.0, 3.0, 4.0, 6.0, 5.0, 7.0]);
        assert_eq!(Order::of_values(heads, "blk.0.attn_q.weight"), None);
    }

    #[test]
    fn three_value_heads_to_a_key_head() {
        let heads = ValueHeads { n_k: 2, n_v: 6, size: 2 };
        // File head j n_k + i is head 3 i + j there.
        let runs: Vec<usize> = value_runs(heads, 2).step_by(2).map(|at| at / 2).collect();
        assert_eq!(runs, [0, 3, 1, 4, 2, 5]);
    }
}
