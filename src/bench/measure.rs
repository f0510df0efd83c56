//! Times, taken in turn with the machine's sgemm rate; on a GPU, held against its own rates.

use std::time::{Duration, Instant};

use super::Bench;
use crate::Result;
use crate::ggml::{Device, Executor, Rates};
use crate::ops::Yardstick;

/// Medians over the repetitions.
#[derive(Clone, Copy, Debug)]
pub(super) struct Timing {
    /// Time of a run.
    pub seconds: f64,
    /// The machine's sgemm rate, from products between the runs; on a GPU, its rate of products.
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
    if bench.model.device() != Device::Cpu {
        let rate = device_rates(bench)?.flop_per_s;
        let seconds = median_seconds(bench.options.reps, work)?;
        let times_sgemm = seconds * rate / flop;
        return Ok(Timing { seconds, sgemm_flop_per_s: rate, times_sgemm });
    }
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

/// What the model's device, which is not the CPU, can do.
pub(super) fn device_rates(bench: &Bench<'_>) -> Result<Rates> {
    let device = bench.model.device();
    // The kernels on the host are slow, and only tests run them.
    let (n, bytes) = if device.is_host() { (64, 1 << 20) } else { (4096, 1 << 28) };
    let rates = Executor::new(device, bench.pool.clone())?.rates(n, bytes, 5)?;
    Ok(rates.expect("no CPU"))
}

/// Median time of `work`, after one run to warm up.
pub(super) fn median_seconds(reps: usize, mut work: impl FnMut() -> Result<()>) -> Result<f64> {
    work()?;
    let mut times = Vec::with_capacity(reps);
    for _ in 0..reps {
        let (time, ran) = once(&mut work);
        ran?;
        times.push(time.as_secs_f64());
    }
    Ok(median(&mut times))
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
