//! Where the time of rollouts goes.

use serde::Serialize;

/// Seconds of rollouts by part, as this process saw them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct Timing {
    /// Reading prompts and the answers of a dialogue's partner.
    pub prompt_seconds: f64,
    /// Decoding what was sampled; where tokens are drawn in the decoding graph, drawing them, too.
    pub decode_seconds: f64,
    /// Drawing tokens.
    pub sampling_seconds: f64,
    /// The tail: of all this, what passed with fewer than half as many sequences in work as at most.
    pub tail_seconds: f64,
}

impl Timing {
    /// Adds those of another call.
    pub(super) fn add(&mut self, other: Timing) {
        self.prompt_seconds += other.prompt_seconds;
        self.decode_seconds += other.decode_seconds;
        self.sampling_seconds += other.sampling_seconds;
        self.tail_seconds += other.tail_seconds;
    }
}

/// Takes the time of a call.
#[derive(Default)]
pub(super) struct Clock {
    /// By part; the tail is not added up yet.
    pub parts: Timing,
    /// Seconds by the number of sequences in work.
    by_width: Vec<f64>,
}

impl Clock {
    /// Adds a round with so many sequences in work.
    pub fn round(&mut self, sequences: usize, seconds: f64) {
        if self.by_width.len() <= sequences {
            self.by_width.resize(sequences + 1, 0.0);
        }
        self.by_width[sequences] += seconds;
    }

    /// What has passed.
    pub fn timing(&self) -> Timing {
        // Fewer than half as many as at most.
        let narrow = (self.by_width.len().max(1) - 1).div_ceil(2);
        Timing { tail_seconds: self.by_width.iter().take(narrow).sum(), ..self.parts }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_tail_has_fewer_than_half_as_many_sequences() {
        let tail = |rounds: &[(usize, f64)]| {
            let mut clock = Clock::default();
            rounds.iter().for_each(|&(sequences, seconds)| clock.round(sequences, seconds));
            clock.timing().tail_seconds
        };
        assert_eq!(tail(&[]), 0.0);
        assert_eq!(tail(&[(1, 4.0)]), 0.0);
        assert_eq!(tail(&[(8, 4.0), (4, 2.0), (3, 1.0), (1, 0.5)]), 1.5);
        assert_eq!(tail(&[(5, 4.0), (3, 2.0), (2, 1.0)]), 1.0);
    }
}
