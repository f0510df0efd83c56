//! A stock llama.cpp, through `llama-cpp-2`, loads every file that an export writes and computes what the
//! trainer's adapter computes.

mod common;
#[path = "common/stock.rs"]
mod stock;

use std::path::Path;

use bupo_gguf::export::{AdapterSpec, MergeOptions, Merger, TypeChoice};
use bupo_gguf::ggml::Type;
use bupo_gguf::gguf::AdapterFile;
use common::{ARCHS, folder_of, relative_error};
use llama_cpp_2::llama_backend::LlamaBackend;

fn merge(case: &str, ty: &str, out: &Path) {
    let spec = AdapterSpec { path: folder_of(case).join(format!("{case}.lora.gguf")), factor: 1.0 };
    let base = folder_of(case).join(format!("{case}.gguf"));
    let merger = Merger::new(&base, case, &[spec], None).unwrap();
    let ty: TypeChoice = ty.parse().unwrap();
    let options = MergeOptions {
        ty,
        only_adapted: false,
        plain_rounding: false,
        keep_delta: None,
        split_max_bytes: None,
    };
    merger.write(out, &options, &mut |_, _| ()).unwrap();
}

/// One test, for the backend can be started once in a process.
#[test]
fn stock_llama_cpp_runs_what_we_export() {
    let backend = LlamaBackend::init().unwrap();
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("out.gguf");
    let tokens: Vec<i32> = (0..24).map(|i| (i * 37 + 11) % 250).collect();
    let first = ["qwen3-f32", "llama-f32", "qwen2-f32"];
    let further = ARCHS.into_iter().filter(|case| case.ends_with("f32"));
    for case in first.into_iter().chain(further) {
        let base = folder_of(case).join(format!("{case}.gguf"));
        let adapter = folder_of(case).join(format!("{case}.lora.gguf"));
        let plain = stock::logits(&backend, &base, None, &tokens).concat();
        let with = stock::logits(&backend, &base, Some(&adapter), &tokens).concat();
        // The change that all the rest must not lose.
        let change = relative_error(&plain, &with);
        assert!(change > 0.02, "{case}: {change}");

        // Merged F32: base + adapter, to 1e-4 in every logit.
        merge(case, "f32", &out);
        let merged = stock::logits(&backend, &out, None, &tokens).concat();
        let scale = with.iter().fold(0f32, |m, x| m.max(x.abs()));
        let worst = merged.iter().zip(&with).fold(0f32, |m, (a, b)| m.max((a - b).abs()));
        // llama.cpp takes GELU from a table of half floats on the CPU, which is a staircase.
        let most = if case.starts_with("gemma") { 5e-3 } else { 1e-4 };
        println!("{case}: {worst:.1e} of {scale:.1}");
        assert!(worst < most * scale.max(1.0), "{case}: {worst} of {scale}");
        if !first.contains(&case) {
            continue;
        }

        // Adapters of every type load and do the same, as well as their type can.
        let file = AdapterFile::read(&adapter).unwrap();
        for (ty, most) in
            [(Type::F32, 1e-6), (Type::F16, 2e-3), (Type::BF16, 2e-2), (Type::Q8_0, 3e-2)]
        {
            let fallen = file.write_as(&out, ty).unwrap();
            let again = AdapterFile::read(&out).unwrap();
            assert_eq!((again.alpha, again.pairs.len()), (file.alpha, file.pairs.len()));
            let halves = if ty == Type::Q8_0 { file.pairs.len() } else { 0 };
            assert_eq!(fallen.len(), halves, "{case} {ty}: B of rank 4 is no whole block");
            let got = stock::logits(&backend, &base, Some(&out), &tokens).concat();
            let error = relative_error(&got, &with);
            assert!(error < most, "{case} {ty}: {error}");
        }
    }
    // Quantised results load and generate, and are nearer to base and adapter than the base alone is.
    for (case, ty, most) in [
        ("qwen3-f32", "f16", 3e-3),
        ("qwen3-f32", "bf16", 2e-2),
        ("qwen3-f32", "q8_0", 6e-2),
        ("qwen3-q4_k", "f16", 6e-2),
        ("qwen3-q4_k", "q8_0", 8e-2),
        ("qwen3-q4_k", "keep", f32::INFINITY),
        ("qwen3-q4_k", "q4_k_m", f32::INFINITY),
        ("qwen3-q4_k", "iq4_xs", f32::INFINITY),
        ("llama-q4_0", "keep", f32::INFINITY),
        ("qwen3-q8_0", "keep", 1e-1),
    ] {
        merge(case, ty, &out);
        let base = folder_of(case).join(format!("{case}.gguf"));
        let adapter = folder_of(case).join(format!("{case}.lora.gguf"));
        let with = stock::logits(&backend, &base, Some(&adapter), &tokens).concat();
        let plain = stock::logits(&backend, &base, None, &tokens).concat();
        let merged = stock::logits(&backend, &out, None, &tokens).concat();
        let (error, change) = (relative_error(&merged, &with), relative_error(&plain, &with));
        println!("{case} as {ty}: {error}, the base alone {change}");
        assert!(error < most && error < change, "{case} as {ty}: {error}, base {change}");
        assert_eq!(stock::generate(&backend, &out, &tokens, 3).len(), 3);
    }
}
