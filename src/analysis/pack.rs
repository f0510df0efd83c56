//! Samples packed into batches, and which of their tokens are looked at.

use super::rows::Sample;
use crate::Result;
use crate::model::Batch;

/// Which tokens of a completion are looked at.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Pick {
    /// The first of every so many.
    pub every: usize,
    /// Completions are cut to this length (0 = not).
    pub max_tokens: usize,
}

impl Pick {
    /// The part of a completion that is computed.
    pub fn cut<'t>(&self, tokens: &'t [i32]) -> &'t [i32] {
        &tokens[..self.most(tokens.len())]
    }

    /// What of `n` tokens is computed.
    pub fn most(&self, n: usize) -> usize {
        if self.max_tokens > 0 { self.max_tokens.min(n) } else { n }
    }
}

/// A batch of whole samples.
#[derive(Default)]
pub struct Packed {
    /// The tokens.
    pub batch: Batch,
    /// The tokens looked at: indices into `batch.scored`.
    pub picked: Vec<usize>,
    /// For each sample how many of `picked` are its own.
    pub samples: Vec<(Sample, usize)>,
}

/// Packs samples in their order into batches of at most `budget` tokens (a longer one has a batch to itself).
/// Neighbours of one row share their prompt.
///
/// # Errors
/// What [`Batch::push_group`] refuses.
pub fn pack(
    samples: Vec<Sample>,
    pick: Pick,
    budget: usize,
    n_vocab: usize,
) -> Result<Vec<Packed>> {
    split(samples, pick, budget).into_iter().map(|runs| close(runs, pick, n_vocab)).collect()
}

/// The same samples, not packed yet: of each batch its rows, of each row its samples.
pub(super) fn split(samples: Vec<Sample>, pick: Pick, budget: usize) -> Vec<Vec<Vec<Sample>>> {
    let mut batches = Vec::new();
    let mut runs: Vec<Vec<Sample>> = Vec::new(); // of one row each, for the batch in the making
    let mut tokens = 0;
    for sample in samples {
        let own = pick.cut(&sample.tokens).len().saturating_sub(1);
        let same_row = runs.last().is_some_and(|run| run[0].row == sample.row);
        let needs = own + if same_row { 0 } else { sample.prompt.len() };
        if !runs.is_empty() && tokens + needs > budget {
            batches.push(std::mem::take(&mut runs));
            tokens = sample.prompt.len() + own;
            runs.push(vec![sample]);
            continue;
        }
        tokens += needs;
        match runs.last_mut() {
            Some(run) if same_row => run.push(sample),
            _ => runs.push(vec![sample]),
        }
    }
    if !runs.is_empty() {
        batches.push(runs);
    }
    batches
}

/// The batch of these rows.
pub(super) fn close(runs: Vec<Vec<Sample>>, pick: Pick, n_vocab: usize) -> Result<Packed> {
    let mut packed = Packed::default();
    for run in runs {
        let first = packed.batch.scored.len();
        let completions: Vec<&[i32]> = run.iter().map(|s| pick.cut(&s.tokens)).collect();
        packed.batch.push_group(&run[0].prompt, &completions, n_vocab)?;
        let mut at = first;
        let lengths: Vec<usize> = completions.iter().map(|c| c.len()).collect();
        for (sample, n) in run.into_iter().zip(lengths) {
            packed.picked.extend((at..at + n).step_by(pick.every));
            packed.samples.push((sample, n.div_ceil(pick.every)));
            at += n;
        }
    }
    Ok(packed)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn whole_samples_within_the_budget_and_shared_prompts() {
        let sample = |row: usize, completion: usize, n: usize| Sample {
            row,
            completion,
            prompt: vec![1; 5].into(),
            tokens: vec![2; n],
        };
        let all: Vec<Sample> = [(0, 0, 4), (0, 1, 7), (1, 0, 3), (2, 0, 40), (3, 0, 1)]
            .map(|(r, c, n)| sample(r, c, n))
            .into();
        for (every, max_tokens) in [(1, 0), (3, 0), (2, 6)] {
            let pick = Pick { every, max_tokens };
            for budget in [1, 16, 30, 1000] {
                let packed = pack(all.clone(), pick, budget, 10).unwrap();
                let order: Vec<_> =
                    packed.iter().flat_map(|p| &p.samples).map(|(s, _)| s).collect();
                assert!(order.iter().copied().eq(&all), "{budget}");
                for p in &packed {
                    let picked: usize = p.samples.iter().map(|(_, n)| n).sum();
                    assert_eq!(picked, p.picked.len());
                    assert!(p.batch.len() <= budget || p.samples.len() == 1, "{budget}");
                    for (sample, n) in &p.samples {
                        assert_eq!(*n, pick.cut(&sample.tokens).len().div_ceil(every));
                    }
                }
            }
            let one = pack(all.clone(), pick, 1000, 10).unwrap();
            assert_eq!(one.len(), 1);
            // Rows 0 to 3: one prompt each, completions without their last tokens.
            let inputs: usize = all.iter().map(|s| pick.cut(&s.tokens).len() - 1).sum();
            assert_eq!(one[0].batch.len(), 4 * 5 + inputs);
        }
    }
}
