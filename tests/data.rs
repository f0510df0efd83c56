//! Data files as their authors publish them: the usual columns, Parquet, and what is wrong with them.

mod common;

use std::path::{Path, PathBuf};

use bupo_gguf::data::{Columns, Problem, Prompt, read_problems, rollouts, table};
use parquet::basic::{Compression, ZstdLevel};

use common::parquet::verl;

fn problems(path: &Path) -> bupo_gguf::Result<Vec<Problem>> {
    read_problems(path, &Columns::default())
}

#[test]
fn parquet_rows_are_the_objects_of_json_lines() {
    let dir = tempfile::tempdir().unwrap();
    for (name, compression) in [
        ("plain", Compression::UNCOMPRESSED),
        ("snappy", Compression::SNAPPY),
        ("zstd", Compression::ZSTD(ZstdLevel::default())),
    ] {
        // Known by its bytes, whatever its name.
        let path = dir.path().join(name);
        verl(&path, compression);
        let rows: Vec<String> = table::open(&path)
            .unwrap()
            .map(|row| serde_json::to_string(&row.unwrap().object).unwrap())
            .collect();
        let first = concat!(
            r#"{"prompt":[{"content":"S","role":"system"},{"content":"1+1=?","role":"user"}],"#,
            r#""reward_model":{"ground_truth":"2","style":"rule"},"difficulty":6.5,"index":3}"#
        );
        let second = concat!(
            r#"{"prompt":[{"content":"2+2=?","role":"user"}],"#,
            r#""reward_model":null,"difficulty":7.0,"index":null}"#
        );
        assert_eq!(rows, [first, second]);
        // The row without an answer is named, with the columns that there are.
        let error = problems(&path).unwrap_err().to_string();
        for word in [
            "row 2: `answer`",
            "`reward_model.ground_truth`",
            "got prompt, reward_model, difficulty, index",
            "--answer-column",
        ] {
            assert!(error.contains(word), "{word}: {error}");
        }
        assert_eq!(rollouts(&path).unwrap().count(), 2);
    }
}

#[test]
fn damaged_parquet_files_are_named() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("d.parquet");
    verl(&path, Compression::SNAPPY);
    let whole = std::fs::read(&path).unwrap();
    let write = |bytes: &[u8]| {
        std::fs::write(&path, bytes).unwrap();
        problems(&path).unwrap_err().to_string()
    };
    assert!(
        write(&whole[..whole.len() / 2])
            .contains("d.parquet: expected a Parquet file with its footer")
    );
    assert!(write(b"PAR1").contains("d.parquet: expected a Parquet file with its footer"));
    assert!(write(b"hello").contains("which begins with PAR1, got \"hell\""));
    assert!(write(b"").contains("which begins with PAR1"));
    // Whatever byte is damaged: an error that names the file, or rows; never a panic that ends the program.
    let mut unnamed = Vec::new();
    for at in 4..whole.len() {
        let mut bytes = whole.clone();
        bytes[at] ^= 0x55;
        std::fs::write(&path, bytes).unwrap();
        let outcome = std::panic::catch_unwind(|| problems(&path));
        match outcome {
            Ok(Ok(_)) => {}
            Ok(Err(e)) if e.to_string().contains("d.parquet") && !e.to_string().contains('\n') => {}
            Ok(Err(e)) => unnamed.push((at, e.to_string())),
            Err(_) => unnamed.push((at, "a panic".into())),
        }
    }
    assert!(unnamed.is_empty(), "{unnamed:?}");
}

#[test]
fn columns_can_be_named() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("d.csv");
    std::fs::write(&path, "q,a,hard\n\"1,000 + 1?\",\"#### 1,001\",Level 2\n").unwrap();
    let error = problems(&path).unwrap_err().to_string();
    assert!(
        error.contains("d.csv, row 1: `prompt`") && error.contains("got q, a, hard"),
        "{error}"
    );
    let columns = |p: &str, a: &str, d: &str| Columns {
        prompt: Some(p.into()),
        answer: Some(a.into()),
        difficulty: Some(d.into()),
    };
    let read = read_problems(&path, &columns("q", "a", "hard")).unwrap();
    assert_eq!(read[0].prompt, Prompt::Text("1,000 + 1?".into()));
    assert_eq!(
        (read[0].answer.as_str(), read[0].difficulty.as_deref()),
        ("1,001", Some("Level 2"))
    );
    for (p, a, d, word) in [
        ("x", "a", "hard", "--prompt-column"),
        ("q", "x", "hard", "--answer-column"),
        ("q", "a", "x", "--difficulty-column"),
    ] {
        let error = read_problems(&path, &columns(p, a, d)).unwrap_err().to_string();
        assert!(error.contains(word) && error.contains("got q, a, hard"), "{error}");
    }
}

fn shared_data() -> Option<PathBuf> {
    let shared = common::shared();
    if shared.is_none() {
        eprintln!("no shared data here; .ci/run insists on it with BUPO_REQUIRE_SHARED");
    }
    shared.map(|shared| shared.join("data"))
}

#[test]
fn published_files_are_read_with_no_option() {
    let Some(data) = shared_data() else { return };
    for (name, rows, answer, difficulty) in [
        ("math500.parquet", 500, None, false),
        ("aime_2024.parquet", 30, None, false),
        ("aime_2025.parquet", 30, None, false),
        ("amc2023.parquet", 40, None, false),
        ("deepmath-5k.parquet", 5000, None, true),
        ("gsm8k_test.jsonl", 1319, Some("18"), false),
    ] {
        let read = problems(&data.join(name)).unwrap();
        assert_eq!(read.len(), rows, "{name}");
        if let Some(answer) = answer {
            assert_eq!(read[0].answer, answer, "{name}");
        }
        assert!(read.iter().all(|p| !p.answer.is_empty() && !p.answer.contains("####")), "{name}");
        assert!(read.iter().all(|p| p.difficulty.is_some() == difficulty), "{name}");
    }
}
