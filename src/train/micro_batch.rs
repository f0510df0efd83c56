//! Cuts the groups of a mini batch into packed micro batches of a token budget.

use crate::Result;
use crate::model::Batch;

/// A prompt with the completions that share it; `responses` are indices into the mini batch's list.
#[derive(Clone, Debug)]
pub struct Group<'t> {
    /// Prompt tokens.
    pub prompt: &'t [i32],
    /// (index of the response, its tokens), none empty.
    pub completions: Vec<(usize, &'t [i32])>,
    /// Of each completion, the experts that the prompt and it took in the rollout; empty where they are not known.
    pub experts: Vec<&'t [i16]>,
}

/// Layers of a mixture, and experts that a token takes in each.
#[derive(Clone, Copy, Debug)]
pub struct Mixture {
    /// Layers.
    pub n_layer: usize,
    /// Experts of a token.
    pub used: usize,
}

impl Mixture {
    /// Says of the tokens that were pushed last which experts they took: of a prompt, then of completions.
    fn push(self, batch: &mut Batch, prompt: usize, completions: &[(&[i32], &[i16])]) {
        let one = self.n_layer * self.used;
        let unknown = vec![-1; one];
        let mut token = |experts: &[i16], at: usize| {
            let own = experts.get(at * one..(at + 1) * one).unwrap_or(&unknown);
            batch.push_experts(self.n_layer, own);
        };
        (0..prompt).for_each(|at| token(completions[0].1, at));
        for (tokens, experts) in completions {
            (prompt..prompt + tokens.len() - 1).for_each(|at| token(experts, at));
        }
    }
}

/// A packed batch and whose tokens it scores.
#[derive(Clone, Debug, Default)]
pub struct MicroBatch {
    /// Which of a mini batch it is, from 0.
    pub number: usize,
    /// The tokens.
    pub batch: Batch,
    /// (index of the response, number of its scored tokens), in the order of `batch.scored`.
    pub responses: Vec<(usize, usize)>,
}

impl MicroBatch {
    /// Scores only those tokens of a response, by its index and the token's, that are wanted.
    pub fn keep(&mut self, wanted: impl Fn(usize, usize) -> bool) {
        let mut scored = std::mem::take(&mut self.batch.scored).into_iter();
        for (index, n) in &mut self.responses {
            let own = scored.by_ref().take(*n).enumerate();
            let before = self.batch.scored.len();
            self.batch.scored.extend(own.filter(|(t, _)| wanted(*index, *t)).map(|(_, s)| s));
            *n = self.batch.scored.len() - before;
        }
    }
}

/// Packs groups in their order. A group that does not fit the rest of a micro batch begins the next; one
/// beyond the whole budget is cut between completions, each part with its own copy of the prompt. A single
/// completion beyond the budget gets a micro batch of its own.
///
/// # Errors
/// What [`Batch::push_group`] refuses.
pub fn pack(
    groups: &[Group<'_>],
    budget: usize,
    n_vocab: usize,
    mixture: Option<Mixture>,
) -> Result<Vec<MicroBatch>> {
    let mut packed: Vec<MicroBatch> = Vec::new();
    let mut current = MicroBatch::default();
    for group in groups {
        let whole =
            Batch::group_len(group.prompt.len(), group.completions.iter().map(|c| c.1.len()));
        if whole <= budget && current.batch.len() + whole > budget {
            packed.push(std::mem::take(&mut current));
        }
        let mut rest = group.completions.as_slice();
        while !rest.is_empty() {
            let mut room = budget.saturating_sub(current.batch.len() + group.prompt.len());
            let mut n = 0;
            for (_, tokens) in rest {
                let needs = tokens.len() - 1;
                if needs > room {
                    break;
                }
                room -= needs;
                n += 1;
            }
            if current.batch.len() + group.prompt.len() > budget {
                n = 0;
            }
            if n == 0 && !current.batch.is_empty() {
                packed.push(std::mem::take(&mut current));
                continue;
            }
            let (now, later) = rest.split_at(n.max(1));
            let tokens: Vec<&[i32]> = now.iter().map(|c| c.1).collect();
            current.batch.push_group(group.prompt, &tokens, n_vocab)?;
            if let Some(mixture) = mixture {
                let first = group.completions.len() - rest.len();
                let experts = (first..).map(|i| group.experts.get(i).copied().unwrap_or_default());
                let taken: Vec<_> = tokens.iter().copied().zip(experts).collect();
                mixture.push(&mut current.batch, group.prompt.len(), &taken);
            }
            current.responses.extend(now.iter().map(|(i, tokens)| (*i, tokens.len())));
            rest = later;
        }
    }
    if !current.batch.is_empty() {
        packed.push(current);
    }
    packed.iter_mut().enumerate().for_each(|(number, micro)| micro.number = number);
    Ok(packed)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Cotangents belong to scored tokens, one each: a token that is not scored has none.
    #[test]
    fn what_is_not_learnt_is_not_scored() {
        let tokens = [5, 6, 7, 8, 9];
        let own = [true, false, false, true, true];
        let group = Group { prompt: &[1, 2], completions: vec![(0, &tokens)], experts: vec![&[]] };
        let mut packed = pack(&[group], 100, 100, None).unwrap();
        packed[0].keep(|_, t| own[t]);
        let scored: Vec<_> = packed[0].batch.scored.iter().map(|s| (s.row, s.target)).collect();
        // Each is predicted by the token before it: 5 by the prompt's last, 8 by 7, 9 by 8.
        assert_eq!(scored, [(1, 5), (4, 8), (5, 9)]);
        assert_eq!(packed[0].responses, [(0, 3)]);
    }

    #[test]
    fn every_token_is_scored_once_and_the_budget_holds() {
        let tokens: Vec<i32> = (0..40).collect();
        let groups: Vec<Group<'_>> = (0..5)
            .map(|g| Group {
                prompt: &tokens[..3 + g],
                completions: (0..4).map(|c| (4 * g + c, &tokens[..1 + 3 * c])).collect(),
                experts: Vec::new(),
            })
            .collect();
        for budget in [12, 17, 30, 64, 1000] {
            let packed = pack(&groups, budget, 100, None).unwrap();
            let mut seen: Vec<usize> = Vec::new();
            for micro in &packed {
                assert!(micro.batch.len() <= budget.max(7 + 9), "{budget}: {}", micro.batch.len());
                let scored: usize = micro.responses.iter().map(|r| r.1).sum();
                assert_eq!(scored, micro.batch.scored.len());
                seen.extend(micro.responses.iter().map(|r| r.0));
            }
            assert_eq!(seen, (0..20).collect::<Vec<_>>(), "budget {budget}");
        }
        assert_eq!(pack(&groups, 1000, 100, None).unwrap().len(), 1);
    }
}
