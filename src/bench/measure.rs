//! Times, taken in turn with the machine's sgemm rate.

use std::time::{Duration, Instant};

use super::Bench;
use crate::Result;
use crate::ops::Yardstick;

/// Medians over the repetitions.
#[derive(Clone, Copy, Debug)]
pub(super) struct Timing {
    /// Time of a run.
    pub seconds: f64,
    /// The machine's sgemm rate, from products between the runs.
    pub sgemm_flop_per_s: f64,
    /// Time of a run over the time its `flop` would take at the sgemm rate measured beside it.
    pub times_sgemm: f64,
}

impl Timing {
    /// Share of the sgemm rate.
    pub(super) fn share(&self) -> f64 {
        1.0 / self.times_sgemm
    }
}

/// Runs `work` of `flop` operations as often as the options say, after one run to warm up.
pub(super) fn timed(
    bench: &Bench<'_>,
    flop: f64,
    mut work: impl FnMut() -> Result<()>,
) -> Result<Timing> {
    let mut yardstick = Yardstick::new(bench.options.sgemm, bench.pool.n_threads());
    yardstick.run();
    work()?;
    let (mut times, mut rates, mut ratios) = (Vec::new(), Vec::new(), Vec::new());
    let mut before = yardstick.run();
    for _ in 0..bench.options.reps {
        let (time, ran) = once(&mut work);
        ran?;
        let after = yardstick.run();
        let rate = 2.0 * yardstick.flop() / (before + after).as_secs_f64();
        before = after;
        times.push(time.as_secs_f64());
        rates.push(rate);
        ratios.push(time.as_secs_f64() * rate / flop);
    }
    Ok(Timing {
        seconds: median(&mut times),
        sgemm_flop_per_s: median(&mut rates),
        times_sgemm: median(&mut ratios),
    })
}

/// The time of one call.
pub(super) fn once<T>(work: impl FnOnce() -> T) -> (Duration, T) {
    let start = Instant::now();
    let result = work();
    (start.elapsed(), result)
}

/// The middle value, or the mean of the middle two.
pub(super) fn median(values: &mut [f64]) -> f64 {
    values.sort_by(f64::total_cmp);
    let n = values.len();
    (values[(n - 1) / 2] + values[n / 2]) / 2.0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn medians() {
        assert_eq!(median(&mut [3.0, 1.0, 2.0]), 2.0);
        assert_eq!(median(&mut [4.0, 1.0, 2.0, 3.0]), 2.5);
    }
}
