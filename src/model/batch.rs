//! Packed batches: several sequences in one run of tokens, without padding, prompts shared.

use crate::ops::Segment;
use crate::{Error, Result};

/// A token whose log-prob is wanted: the hidden state at `row` predicts `target`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Scored {
    /// Index of the predicting token in the batch.
    pub row: i32,
    /// The token it should predict.
    pub target: i32,
}

/// A micro batch: T tokens in a row, cut into segments.
///
/// A group's prompt is one segment; each of its completions is a segment that sees the prompt and
/// itself. The prompt is computed once, and its gradient is the sum over the completions.
#[derive(Clone, Debug, Default)]
pub struct Batch {
    /// Token ids, `[T]`.
    pub tokens: Vec<i32>,
    /// Position of each token in its own sequence, `[T]`.
    pub positions: Vec<i32>,
    /// Who sees whom.
    pub segments: Vec<Segment>,
    /// The wanted log-probs, `[S]`, in the order in which completions were pushed.
    pub scored: Vec<Scored>,
    /// Of each layer from the first, the experts that the tokens take, `[used, T]`, ascending whole numbers; a token
    /// whose first is negative chooses by itself. Of no layer: all choose.
    pub experts: Vec<Vec<f32>>,
    /// Whether tokens take those experts; else they choose, and it is counted where they choose others.
    pub replays: bool,
}

impl Batch {
    /// Adds a prompt and its completions; every completion token is scored.
    ///
    /// The last token of a completion predicts nothing that is scored, so it is not computed.
    /// `n_vocab` bounds the ids: ggml aborts on others.
    ///
    /// # Errors
    /// An empty prompt, an empty completion, or a token outside the vocabulary.
    pub fn push_group(
        &mut self,
        prompt: &[i32],
        completions: &[&[i32]],
        n_vocab: usize,
    ) -> Result<()> {
        check_tokens("prompt", prompt, n_vocab)?;
        for completion in completions {
            check_tokens("completion", completion, n_vocab)?;
        }
        let begin = self.tokens.len() as i32;
        let prompt_end = self.push_run(prompt, 0, (begin, begin));
        for completion in completions {
            let own = self.tokens.len() as i32;
            let (_, inputs) = completion.split_last().expect("checked: not empty");
            if !inputs.is_empty() {
                self.push_run(inputs, prompt.len(), (begin, prompt_end));
            }
            self.scored.extend(completion.iter().enumerate().map(|(i, &target)| {
                let row = if i == 0 { prompt_end - 1 } else { own + i as i32 - 1 };
                Scored { row, target }
            }));
        }
        Ok(())
    }

    fn push_run(&mut self, tokens: &[i32], first_position: usize, prefix: (i32, i32)) -> i32 {
        let begin = self.tokens.len() as i32;
        let end = begin + tokens.len() as i32;
        self.tokens.extend_from_slice(tokens);
        self.positions.extend((0..tokens.len()).map(|i| (first_position + i) as i32));
        self.segments.push(Segment { begin, end, prefix_begin: prefix.0, prefix_end: prefix.1 });
        end
    }

    /// Says which experts the next tokens take that have none yet: of each, layer after layer, `[n_layer * used]`; -1 for
    /// those that choose by themselves.
    pub fn push_experts(&mut self, n_layer: usize, tokens: &[i16]) {
        self.experts.resize_with(n_layer, Vec::new);
        let used = tokens.len() / n_layer.max(1);
        for (own, chosen) in self.experts.iter_mut().zip(tokens.chunks_exact(used.max(1))) {
            own.extend(chosen.iter().map(|&expert| expert as f32));
        }
    }

    /// Number of tokens, T.
    pub fn len(&self) -> usize {
        self.tokens.len()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.tokens.is_empty()
    }

    /// Tokens that a group takes: the prompt once, each completion without its last token.
    pub fn group_len(prompt: usize, completions: impl Iterator<Item = usize>) -> usize {
        prompt + completions.map(|n| n.saturating_sub(1)).sum::<usize>()
    }
}

fn check_tokens(what: &str, tokens: &[i32], n_vocab: usize) -> Result<()> {
    if tokens.is_empty() {
        return Err(Error::invalid(what, "at least one token", "none", "drop the row"));
    }
    match tokens.iter().find(|&&t| t < 0 || t as usize >= n_vocab) {
        None => Ok(()),
        Some(bad) => Err(Error::invalid(
            what,
            format!("token ids below {n_vocab}"),
            bad.to_string(),
            "the tokens belong to another model",
        )),
    }
}
