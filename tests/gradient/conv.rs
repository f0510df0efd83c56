//! conv_silu, conv_silu_back.

use bupo_gguf::ops;

use super::EXACT;
use super::harness::{Random, Source, Tree, close, f64s, is_vjp, run, segments};
use super::reference;

fn check(trees: &[Tree], channels: usize, k: usize, threads: usize) {
    let segments = segments(trees);
    let t = segments.last().unwrap().end as usize;
    let what = |of: &str| format!("conv {of} T={t} C={channels} K={k} threads={threads}");
    let mut random = Random::new((channels * t + k) as u64);
    let (x, w, dy) =
        (random.normal(channels * t), random.normal(channels * k), random.normal(channels * t));
    let sources = [
        Source::f32(&x, &[channels, t]),
        Source::f32(&w, &[k, channels]),
        Source::f32(&dy, &[channels, t]),
    ];
    let results = run(threads, &sources, |arena, s| {
        vec![
            ops::conv_silu(arena, s[0], s[1], &segments),
            ops::conv_silu_back(arena, s[0], s[1], s[2], &segments),
        ]
    });
    let w = f64s(&w);
    let forward = |x: &[f64]| reference::conv_silu(x, &w, k, &segments);
    close(&what("forward"), &results[0], &forward(&f64s(&x)), EXACT);
    is_vjp(&what("dx"), forward, &x, &dy, &results[1], EXACT);
}

#[test]
fn conv_of_small_trees() {
    // Prompts and completions shorter than the convolution, so that it reaches over both.
    let forest: &[Tree] = &[(3, &[1, 2, 4]), (1, &[1, 7]), (1, &[]), (2, &[3]), (9, &[1])];
    for threads in [1, 2, 5] {
        for k in 1..=ops::MAX_CONV {
            check(forest, 3, k, threads);
        }
        check(&[(1, &[])], 1, 4, threads);
    }
}

#[test]
fn conv_of_more_than_a_block() {
    for channels in [63, 64, 65, 200] {
        check(&[(70, &[33, 1]), (5, &[])], channels, 4, 2);
    }
}

/// What a segment holds changes nothing in another that has it not for its prefix.
#[test]
fn nothing_leaks_from_one_sequence_to_the_next() {
    let segments = segments(&[(5, &[4, 3]), (6, &[])]);
    let (channels, t, k) = (7, 18, 4);
    let mut random = Random::new(3);
    let (x, w) = (random.normal(channels * t), random.normal(channels * k));
    let with = |x: &[f32]| {
        let sources = [Source::f32(x, &[channels, t]), Source::f32(&w, &[k, channels])];
        run(2, &sources, |arena, s| vec![ops::conv_silu(arena, s[0], s[1], &segments)]).remove(0)
    };
    let plain = with(&x);
    let mut other = x.clone();
    other[5 * channels..9 * channels].fill(100.0); // the first completion
    let other = with(&other);
    assert_eq!(plain[..5 * channels], other[..5 * channels]);
    assert_eq!(plain[9 * channels..], other[9 * channels..]);
    assert_ne!(plain[5 * channels..9 * channels], other[5 * channels..9 * channels]);
}
