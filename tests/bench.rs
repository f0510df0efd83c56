//! `bench`: every case runs on the demo model and gives figures that are numbers.

use std::process::Command;

#[test]
fn every_case_of_the_demo_model_gives_figures() {
    let out = Command::new(env!("CARGO_BIN_EXE_bupo-gguf"))
        .args(["bench", "all", "demo", "--reps", "1", "--tokens", "16", "--rank", "4"])
        .args(["--sequences", "2", "--prompt", "20", "--new", "6"])
        .args(["--threads", "1", "--sgemm", "128", "--json"])
        .output()
        .unwrap();
    assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
    let result: serde_json::Value = serde_json::from_slice(&out.stdout).unwrap();
    let rows = result["rows"].as_array().unwrap();
    for part in ["ops", "train", "rollout", "dialogues", "entropy"] {
        let of = |row: &&serde_json::Value| {
            row["case"].as_str().is_some_and(|case| case.starts_with(&format!("{part}/")))
        };
        assert!(rows.iter().filter(of).count() > 0, "no rows of {part}");
    }
    for row in rows {
        for (key, value) in row.as_object().unwrap() {
            let number = value.as_f64();
            assert!(key == "case" || number.is_some_and(|x| x > 0.0), "{key} of {row}");
        }
        assert!(row["peak_bytes"].as_u64().unwrap() > 1 << 20, "{row}");
        if row["case"].as_str().is_some_and(|case| case.starts_with("rollout/")) {
            assert_eq!(
                (row["prompt_tokens"].as_f64(), row["new_tokens"].as_f64()),
                (Some(20.0), Some(6.0))
            );
        }
    }
}

#[test]
fn an_unknown_case_is_an_error() {
    let out = Command::new(env!("CARGO_BIN_EXE_bupo-gguf"))
        .args(["bench", "train", "demo", "--case", "train/all of it"])
        .output()
        .unwrap();
    assert!(!out.status.success());
    let words = String::from_utf8_lossy(&out.stderr);
    assert!(words.contains("train/all of it") && words.contains("train/full phase"), "{words}");
}

#[test]
fn ggmls_own_products_are_measured_repacked_too() {
    let dir = tempfile::tempdir().unwrap();
    let model = dir.path().join("tiny.gguf");
    let run = |args: &[&str]| {
        let bupo = env!("CARGO_BIN_EXE_bupo-gguf");
        let out = Command::new(bupo).args(args).output().unwrap();
        assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
        String::from_utf8(out.stdout).unwrap()
    };
    let model = model.to_str().unwrap();
    run(&["synth", "tiny", "--type", "q4_k", "--out", model]);
    let rows = run(&["bench", "ops", model, "--case", "ops/ggml", "--reps", "1", "--sgemm", "128"]);
    assert!(rows.contains("ggml MUL_MAT q4_K") && rows.contains("ggml OUT_PROD q4_K"), "{rows}");
    // ggml has such kernels for this type where the processor has AVX2.
    let repacked = rows.contains("ggml MUL_MAT, repacked, q4_K");
    assert_eq!(repacked, cfg!(target_feature = "avx2"), "{rows}");
}
