//! Figures over problems with n samples each, of which c are right.
//!
//! - Avg@K: mean of `c / n` over the problems.
//! - Pass@k, the unbiased estimator (Chen et al., arXiv 2107.03374): `1 - C(n-c, k) / C(n, k)`, the chance
//!   that k of the n samples, drawn without repetition, hold a right one.
//! - Maj@K (Wang et al., arXiv 2203.11171): whether the answer that most samples give is right; answers
//!   that tie share the vote.
//! - Intervals: percentile bootstrap over problems (Efron 1979), 95 %.

use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

/// Resamples of the bootstrap.
pub const RESAMPLES: usize = 1000;

/// `1 - C(n-c, k) / C(n, k)` as a product: `1 - prod_{i<k} (n-c-i) / (n-i)`. `k` is at most `n`.
pub fn pass_at_k(n: usize, c: usize, k: usize) -> f64 {
    if n - c < k {
        return 1.0;
    }
    1.0 - (0..k).map(|i| (n - c - i) as f64 / (n - i) as f64).product::<f64>()
}

/// The share of the vote that goes to right answers: 1 or 0, or between where answers tie.
///
/// `votes` are (answer, right) of the samples; those without an answer do not vote. `same` tells
/// whether two answers are one.
pub fn majority(votes: &[(Option<&str>, bool)], same: impl Fn(&str, &str) -> bool) -> f64 {
    // (the answer that stands for its class, right, votes)
    let mut classes: Vec<(&str, bool, usize)> = Vec::new();
    for (answer, right) in votes.iter().filter_map(|(answer, right)| Some(((*answer)?, *right))) {
        let known = classes.iter().position(|c| c.0 == answer);
        match known.or_else(|| classes.iter().position(|c| same(c.0, answer))) {
            Some(class) => classes[class].2 += 1,
            None => classes.push((answer, right, 1)),
        }
    }
    let most = classes.iter().map(|c| c.2).max().unwrap_or(0);
    let winners: Vec<_> = classes.iter().filter(|c| c.2 == most).collect();
    let right = winners.iter().filter(|c| c.1).count();
    if winners.is_empty() { 0.0 } else { right as f64 / winners.len() as f64 }
}

/// Mean, NaN for none.
pub fn mean(values: &[f64]) -> f64 {
    values.iter().sum::<f64>() / values.len() as f64
}

/// 95 % intervals of the means of several figures that were taken on the same problems: `figures[f][p]`.
/// All figures see the same resamples, and the same seed gives the same ones.
pub fn bootstrap(figures: &[&[f64]], seed: u64) -> Vec<[f64; 2]> {
    let n = figures.first().map_or(0, |f| f.len());
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let mut means = vec![Vec::with_capacity(RESAMPLES); figures.len()];
    let mut counts = vec![0f64; n];
    for _ in 0..RESAMPLES {
        counts.fill(0.0);
        (0..n).for_each(|_| counts[rng.random_range(0..n)] += 1.0);
        for (figure, means) in figures.iter().zip(&mut means) {
            let sum: f64 = figure.iter().zip(&counts).map(|(x, count)| x * count).sum();
            means.push(sum / n as f64);
        }
    }
    let interval = |mut means: Vec<f64>| {
        means.sort_by(f64::total_cmp);
        let low = (0.025 * RESAMPLES as f64) as usize;
        [means[low], means[RESAMPLES - 1 - low]]
    };
    means.into_iter().map(interval).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pass_at_k_is_the_share_of_draws_that_hold_a_right_one() {
        // By enumeration: all subsets of size k of n samples, the first c of which are right.
        for n in 1..=9usize {
            for c in 0..=n {
                for k in 1..=n {
                    let draws = (0u32..1 << n).filter(|s| s.count_ones() as usize == k);
                    let (mut all, mut with) = (0, 0);
                    for draw in draws {
                        all += 1;
                        with += (draw & ((1 << c) - 1) != 0) as usize;
                    }
                    let exact = with as f64 / all as f64;
                    assert!((pass_at_k(n, c, k) - exact).abs() < 1e-12, "{n} {c} {k}");
                }
            }
        }
        assert!(pass_at_k(300, 1, 256) > 0.85 && pass_at_k(300, 0, 256) == 0.0);
    }

    #[test]
    fn the_most_frequent_answer_wins_and_ties_share() {
        let same = |a: &str, b: &str| a.trim_start_matches('0') == b.trim_start_matches('0');
        let vote = |votes: &[(&str, bool)]| {
            let votes: Vec<_> =
                votes.iter().map(|&(a, r)| (Some(a).filter(|a| !a.is_empty()), r)).collect();
            majority(&votes, same)
        };
        assert_eq!(vote(&[("5", true), ("05", true), ("7", false)]), 1.0);
        assert_eq!(vote(&[("5", true), ("7", false), ("7", false)]), 0.0);
        assert_eq!(vote(&[("5", true), ("7", false)]), 0.5);
        assert_eq!(vote(&[("5", true), ("", false), ("", false)]), 1.0);
        assert_eq!(vote(&[("", false)]), 0.0);
        assert_eq!(vote(&[]), 0.0);
    }

    #[test]
    fn intervals_hold_the_mean_and_repeat() {
        let coin: Vec<f64> = (0..100).map(|i| (i % 2) as f64).collect();
        let sure = vec![1.0; 100];
        let [a, b] = bootstrap(&[&coin, &sure], 7).try_into().unwrap();
        // The standard error of a fair coin over 100 problems is 0.05.
        assert!((a[0] - 0.4).abs() < 0.03 && (a[1] - 0.6).abs() < 0.03, "{a:?}");
        assert_eq!(b, [1.0, 1.0]);
        assert_eq!(bootstrap(&[&coin], 7)[0], a);
        assert_ne!(bootstrap(&[&coin], 8)[0], a);
    }
}
