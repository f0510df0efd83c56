//! NEFTune: noise on the embeddings of what is learnt by heart, so that words matter less than what they say.
//!
//! ```text
//! x_t := embedding(token t) + alpha / sqrt(L D) * u,   u uniform in (-1, 1), each value anew
//! ```
//!
//! where L is the length of the token's sequence and D the width (Jain et al., arXiv 2310.05914). In the forward that a backward
//! follows alone: what is scored, sampled or evaluated has none. Departures: a prompt that several completions share has one
//! noise for all of them, that of the longest; L counts the tokens that are computed, not the last one, which predicts
//! nothing; what is added to is what enters the first layer, after a family's factor on its embeddings.

use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

use super::micro_batch::MicroBatch;

/// Micro batches of an update whose random numbers are kept apart.
const MICRO_BATCHES: u64 = 1 << 24;

/// The noise of one update, which depends on the seed and on how many updates were before it: a run that goes on has the
/// same.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Noise {
    /// How much.
    pub alpha: f32,
    /// The run's seed.
    pub seed: u64,
    /// Updates before this one.
    pub update: u64,
}

impl Noise {
    /// What is added to the embeddings of a micro batch: `[width, tokens]`.
    pub fn of(&self, micro: &MicroBatch, width: usize) -> Vec<f32> {
        let mut rng = ChaCha8Rng::seed_from_u64(self.seed);
        rng.set_stream(1 + self.update * MICRO_BATCHES + micro.number as u64);
        let mut noise = Vec::with_capacity(width * micro.batch.len());
        let segments = &micro.batch.segments;
        for segment in segments {
            // Of a prompt, which has nothing before it, with its longest completion.
            let own = (segment.begin, segment.end);
            let with = segments.iter().filter(|s| (s.prefix_begin, s.prefix_end) == own);
            let after = with.map(|s| s.end - s.begin).max().unwrap_or(0);
            let before = segment.prefix_end - segment.prefix_begin;
            let length = (before + (segment.end - segment.begin) + after) as f32;
            let most = self.alpha / (length * width as f32).sqrt();
            let values = width * (segment.end - segment.begin) as usize;
            noise.extend((0..values).map(|_| rng.random_range(-most..most)));
        }
        noise
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::train::micro_batch::{Group, pack};

    #[test]
    fn its_size_goes_by_the_sequence_and_its_numbers_by_the_update() {
        let tokens: Vec<i32> = (0..64).collect();
        let group = |prompt, completions: &[usize]| Group {
            prompt: &tokens[..prompt],
            completions: completions.iter().enumerate().map(|(i, n)| (i, &tokens[..*n])).collect(),
            experts: Vec::new(),
        };
        // Computed are 4 + 11 + 1 tokens, and 9 + 55.
        let groups = [group(4, &[12, 2]), group(9, &[56])];
        let packed = pack(&groups, 1000, 100, None).unwrap();
        let (width, micro) = (32, &packed[0]);
        let noise = Noise { alpha: 5.0, seed: 3, update: 2 };
        let values = noise.of(micro, width);
        assert_eq!(values.len(), width * micro.batch.len());
        let mut at = 0;
        // The shared prompt and the first completion, the second completion, the other row.
        for (tokens, length) in [(15, 15.0), (1, 5.0), (64, 64.0)] {
            let most = 5.0 / f32::sqrt(length * width as f32);
            let of_run = &values[width * at..width * (at + tokens)];
            at += tokens;
            assert!(of_run.iter().all(|x| x.abs() <= most), "{length}");
            let largest = of_run.iter().fold(0f32, |m, x| m.max(x.abs()));
            assert!(largest > 0.8 * most, "{length}: {largest} of {most}");
            let mean = of_run.iter().sum::<f32>() / of_run.len() as f32;
            assert!(mean.abs() < 0.3 * most, "{length}: {mean}");
        }
        assert_eq!(noise.of(micro, width), values);
        for other in [Noise { update: 3, ..noise }, Noise { seed: 4, ..noise }] {
            assert_ne!(other.of(micro, width), values);
        }
        let packed = pack(&groups, 20, 100, None).unwrap();
        let numbers: Vec<_> = packed.iter().map(|micro| micro.number).collect();
        assert_eq!(numbers, [0, 1]);
        assert_ne!(noise.of(&packed[1], width)[..width], values[width * 16..width * 17]);
    }
}
