//! Answers verified per second on the golds of MATH-500: `cargo bench --bench verify`.
//!
//! Reads `math500.parquet` under `BUPO_SHARED` (default `../shared`); throughput counts judgements. `itself` is a
//! gold against its own text with blanks added (read and compared as mathematics), `another` against the next;
//! `completion` looks for the answer in a text first.

use std::fs::File;
use std::hint::black_box;
use std::path::{Path, PathBuf};

use bupo_gguf::reward::math::{Mode, judge, score};
use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use parquet::file::reader::{FileReader, SerializedFileReader};
use parquet::record::Field;

fn golds() -> Vec<String> {
    let shared = std::env::var_os("BUPO_SHARED")
        .map_or_else(|| Path::new(env!("CARGO_MANIFEST_DIR")).join("../shared"), PathBuf::from);
    let path = shared.join("data/math500.parquet");
    let file =
        File::open(&path).unwrap_or_else(|e| panic!("{}: {e}; set BUPO_SHARED", path.display()));
    let reader = SerializedFileReader::new(file).expect("a Parquet file");
    let mut golds = Vec::new();
    for row in reader.get_row_iter(None).expect("rows") {
        let row = row.expect("a row");
        for (name, field) in row.get_column_iter() {
            if let ("reward_model", Field::Group(group)) = (name.as_str(), field)
                && let Some((_, Field::Str(gold))) =
                    group.get_column_iter().find(|(name, _)| *name == "ground_truth")
            {
                golds.push(gold.clone());
            }
        }
    }
    golds
}

fn verify(c: &mut Criterion) {
    let golds = golds();
    // A blank of LaTeX behind the text keeps the quick way for equal texts from answering.
    let itself: Vec<_> = golds.iter().map(|gold| (gold.clone(), format!("{gold}\\ "))).collect();
    let next = golds.iter().cycle().skip(1);
    let another: Vec<_> = golds.iter().cloned().zip(next.cloned()).collect();
    let mut group = c.benchmark_group("verify");
    group.throughput(Throughput::Elements(golds.len() as u64));
    for (name, pairs) in [("itself", &itself), ("another", &another)] {
        for mode in [Mode::Math, Mode::Hendrycks] {
            group.bench_function(format!("{}/{name}", mode.name()), |b| {
                b.iter(|| {
                    let equal =
                        |(gold, answer): &&(String, String)| judge(gold, answer, mode).equal;
                    black_box(pairs.iter().filter(equal).count())
                })
            });
        }
    }
    // Whole completions: the answer is looked for first.
    for (name, template) in [
        (
            "completion, boxed",
            "Adding both sides, we get 2x = 14.\n\nSo the answer is $\\boxed{@}$.",
        ),
        (
            "completion, sentence",
            "Adding both sides, we get 2x = 14.\n\nThe answer is therefore $@$, since x > 0.",
        ),
        (
            "completion, last formula",
            "Adding both sides, we get 2x = 14.\n\nAltogether this gives $@$ (see above).",
        ),
    ] {
        let completions: Vec<_> =
            another.iter().map(|(gold, answer)| (gold, template.replace('@', answer))).collect();
        group.bench_function(name, |b| {
            let paid = |(gold, completion): &&(&String, String)| {
                score(gold, completion, Mode::Math, Mode::Math.rules()).reward == 1.0
            };
            b.iter(|| black_box(completions.iter().filter(paid).count()))
        });
    }
    group.finish();
}

criterion_group!(benches, verify);
criterion_main!(benches);
