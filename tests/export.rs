//! What an export promises: untouched bytes, llama.cpp's own types and blocks, refusals that leave no trace.

mod common;
#[path = "common/program.rs"]
mod program;

use std::ffi::CString;
use std::path::{Path, PathBuf};
use std::process::Command;

use bupo_gguf::export::{AdapterSpec, MergeOptions, MergeReport, Merger, TypeChoice};
use bupo_gguf::ggml::Type;
use bupo_gguf::gguf::{AdapterFile, GgufFile, GgufSet, GgufWriter, Value};
use bupo_gguf::llama::FileType;
use common::golden_dir;
use program::{fail, run, succeed, text};

fn golden(name: &str) -> PathBuf {
    golden_dir().join(name)
}

fn keep() -> MergeOptions {
    MergeOptions {
        ty: TypeChoice::Keep,
        only_adapted: false,
        plain_rounding: false,
        keep_delta: None,
        split_max_bytes: None,
    }
}

fn merge(base: &Path, adapters: &[&str], out: &Path, options: &MergeOptions) -> MergeReport {
    let specs: Vec<AdapterSpec> = adapters.iter().map(|a| a.parse().unwrap()).collect();
    let merger = Merger::new(base, &base.display().to_string(), &specs, None).unwrap();
    merger.write(out, options, &mut |_, _| ()).unwrap()
}

/// An adapter with the pairs of another that `wanted` takes.
fn part_of(adapter: &Path, out: &Path, wanted: impl Fn(&str) -> bool) {
    let mut file = AdapterFile::read(adapter).unwrap();
    file.pairs.retain(|pair| wanted(&pair.weight));
    file.extra.push(("bupo.algorithm".into(), "bupo".into()));
    file.extra.push(("bupo.steps".into(), Value::U64(40)));
    file.write(out).unwrap();
}

#[test]
fn what_no_adapter_touches_is_copied_byte_for_byte() {
    let dir = tempfile::tempdir().unwrap();
    for case in ["qwen3-q8_0", "llama-q4_0", "qwen3-q4_k", "qwen2-f32"] {
        let base = golden(&format!("{case}.gguf"));
        let adapter = dir.path().join(format!("{case}.lora.gguf"));
        let touched = |name: &str| name.ends_with("attn_q.weight") || name == "blk.1.ffn_up.weight";
        part_of(&golden(&format!("{case}.lora.gguf")), &adapter, touched);
        let out = dir.path().join("merged.gguf");
        let report = merge(&base, &[text(&adapter)], &out, &keep());

        let (before, after) = (GgufFile::open(&base).unwrap(), GgufFile::open(&out).unwrap());
        assert_eq!(before.tensors().len(), after.tensors().len());
        let mut changed = 0;
        for (a, b) in before.tensors().iter().zip(after.tensors()) {
            assert_eq!((&a.name, a.ty, &a.shape), (&b.name, b.ty, &b.shape), "{case}");
            let same = before.bytes(a) == after.bytes(b);
            assert_eq!(same, !touched(&a.name), "{case} {}", a.name);
            changed += !same as usize;
        }
        assert_eq!(
            (report.converted.len(), report.copied),
            (changed, after.tensors().len() - changed)
        );
        for (key, value) in before.metadata() {
            assert_eq!(after.get(key), Some(value), "{case} {key}");
        }
        assert_eq!(after.str("bupo.export.base_sha256").unwrap(), report.base_sha256);
        assert_eq!(after.strings("bupo.export.adapters").unwrap(), [format!("{case}.lora.gguf")]);
        assert_eq!(after.str("bupo.algorithm").unwrap(), "bupo");
        assert_eq!(after.find::<u64>("bupo.steps").unwrap(), Some(40));
    }
}

/// Each merged weight of the fixture, by PyTorch in F32 from the dequantised base.
#[test]
fn merged_weights_are_pytorchs() {
    let dir = tempfile::tempdir().unwrap();
    let bytes = std::fs::read(golden("merged.safetensors")).unwrap();
    let fixture = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    let mut checked = 0;
    for case in ["qwen3-f32", "qwen2-f32", "llama-f32", "qwen3-q8_0", "llama-q4_0", "qwen3-q4_k"] {
        let out = dir.path().join("merged.gguf");
        let options = MergeOptions { ty: TypeChoice::File("f32".parse().unwrap()), ..keep() };
        let adapter = golden(&format!("{case}.lora.gguf"));
        let half = format!("{}:0.5", adapter.display());
        merge(&golden(&format!("{case}.gguf")), &[text(&adapter), &half], &out, &options);
        let merged = GgufFile::open(&out).unwrap();
        for (name, view) in fixture.tensors() {
            let Some(name) = name.strip_prefix(&format!("{case}.")) else { continue };
            let expected: Vec<f32> =
                view.data().as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b)).collect();
            let got = merged.dequantize(merged.tensor(name).unwrap()).unwrap();
            let error = common::relative_error(&got, &expected);
            assert!(error < 1e-6, "{case} {name}: {error}");
            checked += 1;
        }
    }
    assert_eq!(checked, 18, "three weights of six models");
}

/// What an adapter sees of its input, A x, comes out nearer to right with error feedback than by rounding
/// to nearest; and a raised type keeps the rest, at a cost that is told.
#[test]
fn small_changes_outlive_few_bits() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("out.gguf");
    let adapter = golden("llama-q4_0.lora.gguf");
    let file = AdapterFile::read(&adapter).unwrap();
    let base = GgufFile::open(&golden("llama-q4_0.gguf")).unwrap();
    let inside = |factor: f32, options: &MergeOptions| {
        let spec = format!("{}:{factor}", adapter.display());
        let report = merge(&golden("llama-q4_0.gguf"), &[&spec], &out, options);
        let merged = GgufFile::open(&out).unwrap();
        let (mut left, mut all) = (0f64, 0f64);
        for pair in &file.pairs {
            let read =
                |file: &GgufFile| file.dequantize(file.tensor(&pair.weight).unwrap()).unwrap();
            let (w, q) = (read(&base), read(&merged));
            let scale = factor * file.scale(pair);
            for row in 0..pair.n_out {
                // (Q - W - s B A) A^T and s B A A^T of one row.
                let mut delta = vec![0f64; pair.n_in];
                for r in 0..pair.rank {
                    let b = scale * pair.b[row * pair.rank + r];
                    for (d, a) in delta.iter_mut().zip(&pair.a[r * pair.n_in..]) {
                        *d += (b * a) as f64;
                    }
                }
                for a in pair.a.chunks(pair.n_in) {
                    let (mut e, mut d) = (0f64, 0f64);
                    for k in 0..pair.n_in {
                        let i = row * pair.n_in + k;
                        e += (q[i] as f64 - w[i] as f64 - delta[k]) * a[k] as f64;
                        d += delta[k] * a[k] as f64;
                    }
                    left += e * e;
                    all += d * d;
                }
            }
        }
        ((left / all).sqrt(), report)
    };
    // From a tenth of the golden adapter, far below the grid of Q4_0, to the whole.
    for (factor, most) in [(0.1, 0.9), (0.3, 0.75), (1.0, 1.0)] {
        let (plain, report) = inside(factor, &MergeOptions { plain_rounding: true, ..keep() });
        let (fed_back, _) = inside(factor, &keep());
        println!("{factor}: wrong by {plain} plainly, by {fed_back} with feedback");
        assert!(fed_back < most * plain, "{factor}: {plain} {fed_back}");
        assert_eq!(report.raised_bytes, 0);
    }
    let (raised, report) = inside(0.1, &MergeOptions { keep_delta: Some(0.5), ..keep() });
    assert!(raised < 0.5, "{raised}");
    assert!(report.error_to_delta.unwrap() <= 0.5 && report.delta_kept.unwrap() > 0.9);
    let grown =
        report.bytes as i64 - std::fs::metadata(golden("llama-q4_0.gguf")).unwrap().len() as i64;
    assert!(
        report.raised_bytes > 0 && (grown - report.raised_bytes as i64).abs() < 2048,
        "{grown}"
    );
}

/// A llama of 8 layers in F16, GQA of `n_head / 2`. With 4 heads the rows of attn_output are too short for
/// blocks of 256.
fn eight_layers(path: &Path, n_head: u64) {
    let like = GgufFile::open(&golden("llama-f32.gguf")).unwrap();
    let mut out = GgufWriter::new();
    let (d, n_layer, size) = (256u64, 8u64, 32u64);
    for (key, value) in like.metadata() {
        let value = match key.strip_prefix("llama.") {
            Some("block_count") => Value::U32(n_layer as u32),
            Some("embedding_length" | "feed_forward_length") => Value::U32(d as u32),
            Some("attention.head_count") => Value::U32(n_head as u32),
            Some("attention.head_count_kv") => Value::U32(2),
            Some("attention.key_length" | "attention.value_length" | "rope.dimension_count") => {
                Value::U32(size as u32)
            }
            _ => value.clone(),
        };
        out.metadata(key, value).unwrap();
    }
    let n_vocab = like.tensor("token_embd.weight").unwrap().shape[1];
    let mut seed = 1u64;
    let mut add = |name: String, shape: &[u64]| {
        let ty = if shape.len() == 1 { Type::F32 } else { Type::F16 };
        let width = shape[0] as usize;
        let values: Vec<f32> = (0..shape.iter().product::<u64>())
            .map(|_| {
                seed = seed.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
                ((seed >> 40) as f32 / (1u64 << 23) as f32 - 1.0) * 0.1
            })
            .collect();
        out.tensor(&name, ty, shape, move |sink| {
            let mut bytes = vec![0; ty.row_bytes(values.len()).unwrap()];
            ty.quantize(&values, width, None, &mut bytes).unwrap();
            sink.write(&bytes)
        })
        .unwrap();
    };
    add("token_embd.weight".into(), &[d, n_vocab]);
    add("output_norm.weight".into(), &[d]);
    add("output.weight".into(), &[d, n_vocab]);
    for i in 0..n_layer {
        add(format!("blk.{i}.attn_norm.weight"), &[d]);
        add(format!("blk.{i}.ffn_norm.weight"), &[d]);
        for (name, shape) in [
            ("attn_q", [d, size * n_head]),
            ("attn_k", [d, 2 * size]),
            ("attn_v", [d, 2 * size]),
            ("attn_output", [size * n_head, d]),
            ("ffn_gate", [d, d]),
            ("ffn_up", [d, d]),
            ("ffn_down", [d, d]),
        ] {
            add(format!("blk.{i}.{name}.weight"), &shape);
        }
    }
    out.write(path).unwrap();
}

/// What llama.cpp's own quantiser makes of a file.
fn llama_quantize(from: &Path, to: &Path, ty: FileType, imatrix: &[(CString, Vec<f32>)]) {
    use ggml_sys as sys;
    let c = |path: &Path| CString::new(text(path)).unwrap();
    let mut list: Vec<_> = imatrix
        .iter()
        .map(|(name, data)| sys::llama_model_imatrix_data {
            name: name.as_ptr(),
            data: data.as_ptr(),
            size: data.len(),
        })
        .collect();
    list.push(sys::llama_model_imatrix_data {
        name: std::ptr::null(),
        data: std::ptr::null(),
        size: 0,
    });
    // SAFETY: NUL-terminated paths; parameters as llama.h asks for; the list ends in a null name.
    let status = unsafe {
        let mut params = sys::llama_model_quantize_default_params();
        params.ftype = ty.raw() as _;
        params.nthread = 2;
        params.allow_requantize = true;
        if !imatrix.is_empty() {
            params.imatrix = list.as_ptr();
        }
        sys::llama_model_quantize(c(from).as_ptr(), c(to).as_ptr(), &params)
    };
    assert_eq!(status, 0, "llama_model_quantize to {ty}");
}

#[test]
fn named_types_and_blocks_are_those_of_llama_quantize() {
    let dir = tempfile::tempdir().unwrap();
    let (ours, theirs) = (dir.path().join("ours.gguf"), dir.path().join("theirs.gguf"));
    let path = dir.path().join("imatrix.dat");
    for n_head in [4, 8] {
        let base = dir.path().join(format!("{n_head}.gguf"));
        eight_layers(&base, n_head);
        let weights: Vec<String> = GgufFile::open(&base)
            .unwrap()
            .tensors()
            .iter()
            .filter(|t| t.shape.len() == 2 && t.name != "token_embd.weight")
            .map(|t| t.name.clone())
            .collect();
        let file = GgufFile::open(&base).unwrap();
        let width_of = |name: &str| file.tensor(name).unwrap().shape[0] as usize;
        let imatrix: Vec<(CString, Vec<f32>)> = weights
            .iter()
            .enumerate()
            .map(|(i, name)| {
                let columns =
                    (0..width_of(name)).map(|c| 0.5 + ((c * 7 + i) % 13) as f32).collect();
                (CString::new(name.as_str()).unwrap(), columns)
            })
            .collect();
        write_old_imatrix(&path, &imatrix);
        for name in [
            "f16", "bf16", "q8_0", "q6_k", "q5_k_m", "q4_k_m", "q4_k_s", "q4_0", "q5_0", "q3_k_l",
            "q3_k_m", "q2_k", "iq4_nl", "iq4_xs", "iq3_xxs", "tq2_0",
        ] {
            let ty: FileType = name.parse().unwrap();
            // Types whose rules ask for the size of groups, and those that ask for an importance matrix.
            let grouped = ["q2_k", "q4_k_m", "iq3_xxs", "iq4_nl", "iq4_xs"].contains(&name);
            let weighed = ["q4_0", "q5_0", "iq3_xxs", "iq4_nl", "iq4_xs"].contains(&name);
            for with in [false, true] {
                let skip =
                    name == "iq3_xxs" && !with || with && !weighed || n_head == 4 && !grouped;
                if skip {
                    continue;
                }
                let mut args = vec!["export", text(&base), "--out", text(&ours), "--type", name];
                if with {
                    args.extend(["--imatrix", text(&path)]);
                }
                let out = run(&args);
                assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
                llama_quantize(&base, &theirs, ty, if with { &imatrix } else { &[] });
                compare(&ours, &theirs, &format!("{ty}, {n_head} heads, imatrix {with}"));
            }
        }
        // What llama-quantize refuses without an importance matrix, we do.
        for ty in ["iq2_xs", "iq3_xxs", "q2_k_s"] {
            let args = ["export", text(&base), "--out", text(&ours), "--type", ty];
            fail(&args, &["an importance matrix", "--imatrix"]);
        }
    }
}

/// Equal types and equal blocks, and the file type.
fn compare(ours: &Path, theirs: &Path, case: &str) {
    let (ours, theirs) = (GgufFile::open(ours).unwrap(), GgufFile::open(theirs).unwrap());
    assert_eq!(ours.tensors().len(), theirs.tensors().len(), "{case}");
    for own in ours.tensors() {
        let other = theirs.tensor(&own.name).unwrap();
        assert_eq!(own.ty, other.ty, "{case}: {}", own.name);
        assert!(ours.bytes(own) == theirs.bytes(other), "{case}: blocks of {}", own.name);
    }
    assert_eq!(
        ours.u32("general.file_type").unwrap(),
        theirs.u32("general.file_type").unwrap(),
        "{case}"
    );
}

/// llama-imatrix's old form: values times the number of calls.
fn write_old_imatrix(path: &Path, entries: &[(CString, Vec<f32>)]) {
    let mut bytes = (entries.len() as i32).to_le_bytes().to_vec();
    for (name, values) in entries {
        let name = name.to_bytes();
        bytes.extend((name.len() as i32).to_le_bytes());
        bytes.extend(name);
        bytes.extend(4i32.to_le_bytes());
        bytes.extend((values.len() as i32).to_le_bytes());
        bytes.extend(values.iter().flat_map(|x| (4.0 * x).to_le_bytes()));
    }
    std::fs::write(path, bytes).unwrap();
}

#[test]
fn alignment_is_kept_and_parts_make_the_same_model() {
    let dir = tempfile::tempdir().unwrap();
    let plain = GgufFile::open(&golden("qwen3-q8_0.gguf")).unwrap();
    let base = dir.path().join("base.gguf");
    let mut out = GgufWriter::new();
    for (key, value) in plain.metadata() {
        out.metadata(key, value.clone()).unwrap();
    }
    out.metadata("general.alignment", 256u32).unwrap();
    for tensor in plain.tensors() {
        let bytes = plain.bytes(tensor);
        out.tensor(&tensor.name, tensor.ty, &tensor.shape, move |sink| sink.write(bytes)).unwrap();
    }
    out.write(&base).unwrap();

    let adapter = golden("qwen3-q8_0.lora.gguf");
    let whole = dir.path().join("whole.gguf");
    merge(&base, &[text(&adapter)], &whole, &keep());
    let whole_file = GgufFile::open(&whole).unwrap();
    assert!(whole_file.tensors().iter().all(|t| t.offset.is_multiple_of(256)));
    assert!(whole_file.tensors().iter().all(|t| whole_file.range(t).start.is_multiple_of(256)));

    let options = MergeOptions { split_max_bytes: Some(80_000), ..keep() };
    let split = merge(&base, &[text(&adapter)], &dir.path().join("split.gguf"), &options);
    assert!(split.out.len() > 3, "{:?}", split.out);
    assert!(text(&split.out[0]).ends_with(&format!("split-00001-of-{:05}.gguf", split.out.len())));
    for part in &split.out {
        assert!(std::fs::metadata(part).unwrap().len() <= 80_000, "{}", part.display());
        let part = GgufFile::open(part).unwrap();
        assert!(part.tensors().iter().all(|t| part.range(t).start.is_multiple_of(256)));
    }
    // Parts in, one file out: the same tensors and metadata again.
    let joined = dir.path().join("joined.gguf");
    merge(&split.out[0], &[], &joined, &keep());
    let (set, joined) = (GgufSet::open(&split.out[0]).unwrap(), GgufFile::open(&joined).unwrap());
    assert_eq!(set.tensors().count(), whole_file.tensors().len());
    for ((file, a), (b, c)) in set.tensors().zip(whole_file.tensors().iter().zip(joined.tensors()))
    {
        assert_eq!((&a.name, a.ty), (&b.name, b.ty));
        assert!(
            file.bytes(a) == whole_file.bytes(b) && file.bytes(a) == joined.bytes(c),
            "{}",
            a.name
        );
    }
    assert!(joined.get("split.count").is_none());
    // A part that is missing, or not the first, is named.
    std::fs::rename(&split.out[1], dir.path().join("away")).unwrap();
    let other = dir.path().join("other.gguf");
    fail(&["export", text(&split.out[0]), "--out", text(&other)], &["-00002-of-", "missing part"]);
    fail(
        &["export", text(&split.out[2]), "--out", text(&other)],
        &["the first part", "-00001-of-"],
    );
}

/// A base of more than 4 GiB: holes stay holes, offsets beyond 2^32 are right.
#[test]
fn more_than_four_gigabytes_go_round() {
    let dir = tempfile::tempdir().unwrap();
    let plain = GgufFile::open(&golden("qwen3-q8_0.gguf")).unwrap();
    let base = dir.path().join("base.gguf");
    let zeros = vec![0u8; 1 << 24];
    let mut out = GgufWriter::new();
    for (key, value) in plain.metadata() {
        out.metadata(key, value.clone()).unwrap();
    }
    let gap = (1u64 << 32) / 34 * 34 + 34 * 1024;
    out.tensor("gap.weight", Type::Q8_0, &[32, gap / 34], |sink| {
        let mut left = gap as usize;
        while left > 0 {
            sink.write(&zeros[..left.min(zeros.len())])?;
            left -= left.min(zeros.len());
        }
        Ok(())
    })
    .unwrap();
    for tensor in plain.tensors() {
        let bytes = plain.bytes(tensor);
        out.tensor(&tensor.name, tensor.ty, &tensor.shape, move |sink| sink.write(bytes)).unwrap();
    }
    out.write(&base).unwrap();
    let disk = |path: &Path| {
        use std::os::unix::fs::MetadataExt;
        let data = std::fs::metadata(path).unwrap();
        (data.len(), data.blocks() * 512)
    };
    let beyond = GgufFile::open(&base).unwrap().tensors().iter().any(|t| t.offset > 1 << 32);
    assert!(beyond && disk(&base).0 > 1 << 32 && disk(&base).1 < 16 << 20, "{:?}", disk(&base));

    let adapter = golden("qwen3-q8_0.lora.gguf");
    let (large, small) = (dir.path().join("large.gguf"), dir.path().join("small.gguf"));
    let options = MergeOptions { split_max_bytes: Some(1 << 31), ..keep() };
    let report = merge(&base, &[text(&adapter)], &large, &options);
    merge(&golden("qwen3-q8_0.gguf"), &[text(&adapter)], &small, &keep());
    let (set, small) = (GgufSet::open(&report.out[0]).unwrap(), GgufFile::open(&small).unwrap());
    assert!(report.out.len() >= 2 && report.out.iter().all(|part| disk(part).1 < 16 << 20));
    for tensor in small.tensors() {
        let (file, other) = set.tensor(&tensor.name).unwrap();
        assert!(file.bytes(other) == small.bytes(tensor), "{}", tensor.name);
    }
    let (file, gap_again) = set.tensor("gap.weight").unwrap();
    assert_eq!(gap_again.n_bytes(), gap);
    assert!(file.bytes(gap_again)[..1 << 20].iter().all(|b| *b == 0));
}

/// An adapter whose change is much smaller than a step of Q4_0.
fn faint(dir: &Path) -> PathBuf {
    let mut file = AdapterFile::read(&golden("llama-q4_0.lora.gguf")).unwrap();
    file.pairs.iter_mut().flat_map(|pair| &mut pair.b).for_each(|x| *x *= 1e-3);
    file.extra.push(("bupo.algorithm".into(), "grpo".into()));
    let path = dir.join("faint.gguf");
    file.write(&path).unwrap();
    path
}

#[test]
fn a_merge_that_keeps_little_says_so_with_the_remedy() {
    let dir = tempfile::tempdir().unwrap();
    let (base, adapter) = (golden("llama-q4_0.gguf"), faint(dir.path()));
    let export = |name: &str, more: &[&str]| {
        let out = dir.path().join(name);
        let command = ["export", text(&base), "--adapter", text(&adapter), "--out", text(&out)];
        let done = run(&[&command[..], more].concat());
        let stderr = String::from_utf8_lossy(&done.stderr).into_owned();
        assert!(done.status.success(), "{stderr}");
        (String::from_utf8(done.stdout).unwrap(), stderr)
    };
    let (_, said) = export("lost.gguf", &["--plain-rounding"]);
    for word in ["WARNING: only", "of the change", "q4_0", "--keep-delta", "wider --type"] {
        assert!(said.contains(word), "{word} is not in {said}");
    }
    let (report, _) = export("json.gguf", &["--plain-rounding", "--json"]);
    let report: serde_json::Value = serde_json::from_str(&report).unwrap();
    assert!(report["export"]["delta_kept"].as_f64().unwrap() < 0.5, "{report}");
    assert!(report["warning"].as_str().unwrap().starts_with("WARNING"), "{report}");
    let (_, said) = export("kept.gguf", &["--keep-delta"]);
    assert!(!said.contains("WARNING"), "the remedy is one: {said}");
}

#[test]
fn exports_name_their_base_and_carry_a_card() {
    let dir = tempfile::tempdir().unwrap();
    let (base, adapter) = (golden("llama-q4_0.gguf"), faint(dir.path()));
    let (base, adapter) = (text(&base), text(&adapter));
    let at = |name: &str| dir.path().join(name);
    let read = |path: &Path| std::fs::read_to_string(path).unwrap();
    let config = |folder: &Path| -> serde_json::Value {
        serde_json::from_str(&read(&folder.join("adapter_config.json"))).unwrap()
    };

    let peft = at("peft");
    let id = ["--base-id", "some-org/Base-1B"];
    let export = ["export", base, "--adapter", adapter, "--peft", text(&peft)];
    succeed(&[&export[..], &id].concat());
    assert_eq!(config(&peft)["base_model_name_or_path"], "some-org/Base-1B");
    let card = read(&peft.join("README.md"));
    let hash = GgufSet::open(Path::new(base)).unwrap().sha256();
    for word in [
        "base_model: some-org/Base-1B",
        "library_name: peft",
        "llama-q4_0.gguf",
        &hash,
        "| algorithm | grpo |",
    ] {
        assert!(card.contains(word), "{word} is not in {card}");
    }
    fail(&[&export[..], &id].concat(), &["--peft", "an empty or new folder", "one with files"]);
    fail(&[&export[..], &["--base-id", "Base-1B"]].concat(), &["--base-id", "ORG/NAME", "Base-1B"]);

    // The name goes with the adapter, in GGUF and back to PEFT.
    let back = at("back.gguf");
    succeed(&["import-peft", text(&peft), "--base", base, "--out", text(&back)]);
    let named = at("named.gguf");
    succeed(&[&["export", "--adapter", adapter, "--out", text(&named)][..], &id].concat());
    for path in [&back, &named] {
        let file = GgufFile::open(path).unwrap();
        let get = |key: &str| file.find::<&str>(key).unwrap().unwrap_or("nothing").to_owned();
        assert_eq!(get("general.base_model.0.name"), "Base-1B");
        assert_eq!(get("general.base_model.0.repo_url"), "https://huggingface.co/some-org/Base-1B");
    }
    let file = GgufFile::open(&back).unwrap();
    assert_eq!(file.find::<&str>("bupo.base_sha256").unwrap(), Some(hash.as_str()));
    let again = at("again");
    succeed(&["export", base, "--adapter", text(&named), "--peft", text(&again)]);
    assert_eq!(config(&again)["base_model_name_or_path"], "some-org/Base-1B");

    let (merged, card) = (at("merged.gguf"), at("MERGED.md"));
    let rows = at("rows.jsonl");
    let row = r#"{"prompt_tokens": [1, 5], "completions": [{"tokens": [7, 8, 9]}]}"#;
    std::fs::write(&rows, row).unwrap();
    succeed(&[
        "export",
        base,
        "--adapter",
        adapter,
        "--out",
        text(&merged),
        "--check",
        text(&rows),
        "--card",
        text(&card),
    ]);
    let card = read(&card);
    for word in
        ["# merged.gguf", &hash, "change kept after rounding", "mean KL", "| rows, tokens | 1, 3 |"]
    {
        assert!(card.contains(word), "{word} is not in {card}");
    }
}

#[test]
fn ollama_gets_the_models_own_template() {
    let dir = tempfile::tempdir().unwrap();
    let folder = dir.path().join("served");
    let base = dir.path().join("base.gguf");
    let chatml = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}\
                  {% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}";
    let original = GgufFile::open(&golden("qwen3-q8_0.gguf")).unwrap();
    let mut writer = GgufWriter::new();
    for (key, value) in original.metadata().filter(|(key, _)| *key != "tokenizer.chat_template") {
        writer.metadata(key, value.clone()).unwrap();
    }
    writer.metadata("tokenizer.chat_template", chatml).unwrap();
    for tensor in original.tensors() {
        let bytes = original.bytes(tensor);
        writer.tensor(&tensor.name, tensor.ty, &tensor.shape, |sink| sink.write(bytes)).unwrap();
    }
    writer.write(&base).unwrap();
    let adapter = golden("qwen3-q8_0.lora.gguf");
    let export = ["export", text(&base), "--adapter", text(&adapter), "--ollama", text(&folder)];
    assert!(succeed(&export).contains("ollama create"));
    let modelfile = std::fs::read_to_string(folder.join("Modelfile")).unwrap();
    assert!(modelfile.starts_with("FROM ./model.gguf\nTEMPLATE \"\"\""), "{modelfile}");
    assert!(modelfile.contains("<|im_start|>user\n{{ .Content }}<|im_end|>\n"), "{modelfile}");
    assert!(modelfile.contains("PARAMETER stop \""), "{modelfile}");
    assert!(
        GgufFile::open(&folder.join("model.gguf")).is_ok() && folder.join("README.md").is_file()
    );
    fail(&export, &["--ollama", "an empty or new folder"]);
    let both = [&export[..], &["--out", text(&base)]].concat();
    fail(&both, &["--out", "cannot be used with", "--ollama"]);
}

#[test]
fn what_does_not_fit_is_refused_and_leaves_no_trace() {
    let dir = tempfile::tempdir().unwrap();
    let base = dir.path().join("base.gguf");
    std::fs::copy(golden("qwen3-q8_0.gguf"), &base).unwrap();
    let before = std::fs::read(&base).unwrap();
    let own = golden("qwen3-q8_0.lora.gguf");
    let out = dir.path().join("out.gguf");
    let export = |adapter: &Path, out: &Path, words: &[&str]| {
        fail(&["export", text(&base), "--adapter", text(adapter), "--out", text(out)], words)
    };
    export(&golden("llama-f32.lora.gguf"), &out, &["an adapter for qwen3", "got llama"]);
    export(
        &golden("qwen3-q4_k.lora.gguf"),
        &out,
        &["blk.0.attn_q.weight", "a pair for shape [64, 128]", "[256, 256]"],
    );
    let mut strange = AdapterFile::read(&own).unwrap();
    strange.pairs[0].weight = "blk.77.attn_q.weight".into();
    let path = dir.path().join("strange.gguf");
    strange.write(&path).unwrap();
    export(&path, &out, &["blk.77.attn_q.weight", "a tensor of", "one it lacks"]);
    // The base under its own name, a symbolic and a hard link; the adapter.
    export(&own, &base, &["--out", "a file of its own"]);
    std::os::unix::fs::symlink(&base, dir.path().join("symbolic.gguf")).unwrap();
    export(&own, &dir.path().join("symbolic.gguf"), &["--out", "which is read"]);
    std::fs::hard_link(&base, dir.path().join("hard.gguf")).unwrap();
    export(&own, &dir.path().join("hard.gguf"), &["--out", "which is read"]);
    let adapter = dir.path().join("adapter.gguf");
    std::fs::copy(&own, &adapter).unwrap();
    export(&adapter, &adapter, &["--out", "which is read"]);
    // No folder; a folder for a file; unknown types; what needs an importance matrix.
    export(&own, &dir.path().join("none/out.gguf"), &["none"]);
    export(&own, dir.path(), &["an ordinary file"]);
    let args = |more: &[&'static str]| {
        let all = ["export", text(&base), "--adapter", text(&own), "--out", text(&out)];
        [&all[..], more].concat().into_iter().map(str::to_owned).collect::<Vec<_>>()
    };
    let fail_with = |more: &[&'static str], words: &[&str]| {
        let all = args(more);
        fail(&all.iter().map(String::as_str).collect::<Vec<_>>(), words)
    };
    fail_with(&["--imatrix", "/dev/null"], &["/dev/null"]);
    fail_with(&["--keep-delta", "-1"], &["--keep-delta", "above 0"]);
    // A disk that is full half-way: the system refuses to let the file grow.
    let limited = Command::new("sh")
        .args(["-c", "trap '' XFSZ; ulimit -f 100; exec \"$@\"", "sh"])
        .arg(env!("CARGO_BIN_EXE_bupo-gguf"))
        .args(args(&[]))
        .output()
        .unwrap();
    let stderr = String::from_utf8_lossy(&limited.stderr);
    assert!(!limited.status.success() && stderr.contains("error: cannot write"), "{stderr}");
    assert!(std::fs::read(&base).unwrap() == before, "the base is as it was");
    let mut left: Vec<_> = std::fs::read_dir(dir.path())
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    left.sort();
    assert_eq!(
        left,
        ["adapter.gguf", "base.gguf", "hard.gguf", "strange.gguf", "symbolic.gguf"],
        "nothing half-written"
    );
}
