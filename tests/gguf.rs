//! GGUF files: what is written is read again, what is broken is refused, and a file is whole or not there.

use std::{fs, path::Path, path::PathBuf};

use bupo_gguf::{
    Error, Result,
    ggml::Type,
    gguf::{
        AdapterFile, AdapterPair, Array, GgufFile, GgufWriter, Value, ValueType, split_paths,
        write_atomically,
    },
};
use proptest::{collection::vec, prelude::*};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

fn golden(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/golden").join(name)
}

/// `file`'s content, written again.
fn rewritten(file: &GgufFile) -> Vec<u8> {
    let mut out = GgufWriter::new();
    for (key, value) in file.metadata() {
        out.metadata(key, value.clone()).unwrap();
    }
    for tensor in file.tensors() {
        out.tensor(&tensor.name, tensor.ty, &tensor.shape, |to| to.write(file.bytes(tensor)))
            .unwrap();
    }
    out.to_bytes().unwrap()
}

fn one_line(error: &Error) -> String {
    let line = error.to_string();
    assert!(!line.contains('\n'), "{line:?} is more than one line");
    line
}

// --- golden files ---

#[test]
fn golden_models_hold_what_is_known_of_them() {
    for (name, arch, blocks, quantised) in [
        ("llama-f32", "llama", 5, Type::F32),
        ("llama-q4_0", "llama", 5, Type::from_raw(2).unwrap()),
        ("qwen2-f32", "qwen2", 5, Type::F32),
        ("qwen3-f32", "qwen3", 5, Type::F32),
        ("qwen3-q8_0", "qwen3", 5, Type::Q8_0),
        ("qwen3-q4_k", "qwen3", 4, Type::from_raw(12).unwrap()),
    ] {
        let file = GgufFile::open(&golden(&format!("{name}.gguf"))).unwrap();
        assert_eq!(file.architecture().unwrap(), arch, "{name}");
        assert_eq!(file.u32(&format!("{arch}.block_count")).unwrap(), blocks, "{name}");
        assert!(
            file.f32(&format!("{arch}.attention.layer_norm_rms_epsilon")).unwrap() > 0.0,
            "{name}"
        );
        let tokens = file.strings("tokenizer.ggml.tokens").unwrap();
        let embeddings = file.tensor("token_embd.weight").unwrap();
        assert_eq!(embeddings.shape[1], tokens.len() as u64, "{name}");
        let width = u64::from(file.u32(&format!("{arch}.embedding_length")).unwrap());
        assert_eq!(embeddings.shape[0], width, "{name}");
        let up = file.tensor("blk.0.ffn_up.weight").unwrap();
        assert_eq!((up.ty, up.shape[0]), (quantised, width), "{name}");
        for tensor in file.tensors() {
            let values = file.dequantize(tensor).unwrap();
            assert_eq!(values.len() as u64, tensor.n_elements(), "{name}: {}", tensor.name);
            assert!(values.iter().all(|x| x.is_finite()), "{name}: {}", tensor.name);
        }
        let norm = file.tensor("output_norm.weight").unwrap();
        let floats: Vec<f32> =
            file.bytes(norm).chunks(4).map(|x| f32::from_le_bytes(x.try_into().unwrap())).collect();
        assert_eq!(file.dequantize(norm).unwrap(), floats, "{name}");
    }
}

#[test]
fn golden_files_are_rewritten_byte_for_byte() {
    let mut seen = 0;
    for entry in fs::read_dir(golden("")).unwrap() {
        let path = entry.unwrap().path();
        if path.extension().is_some_and(|x| x == "gguf") {
            let file = GgufFile::open(&path).unwrap();
            assert!(rewritten(&file) == fs::read(&path).unwrap(), "{} changed", path.display());
            seen += 1;
        }
    }
    assert_eq!(seen, 12);
}

#[test]
fn getters_name_file_key_expected_and_got() {
    let file = GgufFile::open(&golden("qwen3-f32.gguf")).unwrap();
    for (result, parts) in [
        (file.u32("general.architecture").map(drop), ["an integer", "string 'qwen3'"]),
        (file.str("qwen3.block_count").map(drop), ["expected string", "u32 5"]),
        (file.bool("absent").map(drop), ["expected bool", "no such key"]),
        (file.f32("tokenizer.ggml.tokens").map(drop), ["expected f32", "array of"]),
        (file.strings("tokenizer.ggml.token_type").map(drop), ["array of string", "i32"]),
    ] {
        let line = one_line(&result.unwrap_err());
        for part in parts.into_iter().chain(["qwen3-f32.gguf: key '"]) {
            assert!(line.contains(part), "{line:?} lacks {part:?}");
        }
    }
    assert_eq!(file.find::<u32>("absent").unwrap(), None);
    assert_eq!(file.require::<u64>("qwen3.block_count").unwrap(), 5);
}

// --- round trip ---

fn scalar() -> impl Strategy<Value = Value> {
    prop_oneof![
        any::<u8>().prop_map(Value::from),
        any::<i8>().prop_map(Value::from),
        any::<u16>().prop_map(Value::from),
        any::<i16>().prop_map(Value::from),
        any::<u32>().prop_map(Value::from),
        any::<i32>().prop_map(Value::from),
        any::<f32>().prop_map(Value::from),
        any::<bool>().prop_map(Value::from),
        ".{0,12}".prop_map(Value::from),
        any::<u64>().prop_map(Value::from),
        any::<i64>().prop_map(Value::from),
        any::<f64>().prop_map(Value::from),
    ]
}

fn array() -> impl Strategy<Value = Value> {
    let flat = prop_oneof![
        vec(any::<u32>(), 0..9).prop_map(|x| Array::from(&x[..])),
        vec(any::<i8>(), 0..9).prop_map(|x| Array::from(&x[..])),
        vec(any::<f32>(), 0..9).prop_map(|x| Array::from(&x[..])),
        vec(".{0,12}", 0..9).prop_map(Array::strings),
        vec(any::<bool>(), 0..9).prop_map(|x| {
            let values: Vec<Value> = x.into_iter().map(Value::from).collect();
            Array::new(ValueType::Bool, &values).unwrap()
        }),
    ];
    flat.prop_recursive(3, 30, 4, |inner| {
        vec(inner.prop_map(Value::from), 0..4)
            .prop_map(|values| Array::new(ValueType::Array, &values).unwrap())
    })
    .prop_map(Value::from)
}

/// Name, type, shape and data of a tensor.
fn tensor() -> impl Strategy<Value = (String, Type, Vec<u64>, Vec<u8>)> {
    let ty = prop::sample::select(vec![Type::F32, Type::F16, Type::BF16, Type::Q8_0, Type::I32]);
    (ty, 1..4u64, vec(1..4u64, 0..4), "[a-z0-9_.]{1,63}").prop_flat_map(
        |(ty, blocks, rest, name)| {
            let shape: Vec<u64> =
                [blocks * ty.block_size() as u64].into_iter().chain(rest).collect();
            let rows: u64 = shape[1..].iter().product();
            let bytes = (blocks * rows) as usize * ty.block_bytes();
            (Just(name), Just(ty), Just(shape), vec(any::<u8>(), bytes))
        },
    )
}

proptest! {
    #[test]
    fn what_is_written_is_read(
        metadata in prop::collection::hash_map(".{1,20}", prop_oneof![scalar(), array()], 0..12),
        tensors in prop::collection::vec(tensor(), 0..6),
        alignment in prop::option::of(prop::sample::select(vec![8u32, 16, 32, 64, 4096])),
    ) {
        let mut expected: Vec<(String, Value)> = metadata.into_iter().collect();
        expected.extend(alignment.map(|n| ("general.alignment".to_owned(), Value::U32(n))));
        let mut names = std::collections::HashSet::new();
        let tensors: Vec<_> = tensors.into_iter().filter(|t| names.insert(t.0.clone())).collect();
        let mut out = GgufWriter::new();
        for (key, value) in &expected {
            out.metadata(key, value.clone()).unwrap();
        }
        for (name, ty, shape, data) in &tensors {
            out.tensor(name, *ty, shape, |to| data.chunks(7).try_for_each(|x| to.write(x))).unwrap();
        }
        let bytes = out.to_bytes().unwrap();
        let file = GgufFile::from_bytes(bytes.clone(), "memory").unwrap();

        let read: Vec<_> = file.metadata().map(|(k, v)| (k.to_owned(), v.clone())).collect();
        prop_assert_eq!(&read, &expected);
        prop_assert_eq!(file.tensors().len(), tensors.len());
        for (info, (name, ty, shape, data)) in file.tensors().iter().zip(&tensors) {
            prop_assert_eq!((&info.name, info.ty, &info.shape), (name, *ty, shape));
            prop_assert_eq!(file.bytes(info), &data[..]);
            prop_assert_eq!(file.range(info).start % alignment.unwrap_or(32) as usize, 0);
        }
        prop_assert_eq!(rewritten(&file), bytes);
    }

    #[test]
    fn any_bytes_are_read_or_refused(bytes in vec(any::<u8>(), 0..200)) {
        let mut file = b"GGUF\x03\0\0\0".to_vec();
        file.extend(&bytes);
        let _ = GgufFile::from_bytes(file, "fuzz");
        let _ = GgufFile::from_bytes(bytes, "fuzz");
    }
}

#[test]
fn arrays_give_their_elements() {
    let nested = Array::new(
        ValueType::Array,
        &[Array::strings(["a", "bc"]).into(), Array::from(&[1i32, -1][..]).into()],
    )
    .unwrap();
    assert_eq!(nested.len(), 2);
    let inner: Vec<Value> = nested.iter().collect();
    assert_eq!(inner[0], Value::from(Array::strings(["a", "bc"])));
    let Value::Array(numbers) = &inner[1] else { panic!("{:?}", inner[1]) };
    assert_eq!(numbers.iter().collect::<Vec<_>>(), [Value::I32(1), Value::I32(-1)]);
    assert_eq!(numbers.as_strs(), None);

    let mixed = Array::new(ValueType::U8, &[Value::U8(1), Value::U16(1)]).unwrap_err();
    assert!(one_line(&mixed).contains("expected u8, got u16 1"));
    let deep = (0..4)
        .try_fold(Array::strings(["x"]), |inner, _| Array::new(ValueType::Array, &[inner.into()]));
    assert!(one_line(&deep.unwrap_err()).contains("at most 4 deep"));
}

// --- hostile headers ---

/// The bytes of a header, piece by piece.
#[derive(Clone, Default)]
struct Raw(Vec<u8>);

impl Raw {
    fn new(version: u32, n_tensors: u64, n_entries: u64) -> Raw {
        Raw(b"GGUF".to_vec()).u32(version).u64(n_tensors).u64(n_entries)
    }

    fn u32(mut self, x: u32) -> Raw {
        self.0.extend(x.to_le_bytes());
        self
    }

    fn u64(mut self, x: u64) -> Raw {
        self.0.extend(x.to_le_bytes());
        self
    }

    fn bytes(mut self, x: &[u8]) -> Raw {
        self.0.extend(x);
        self
    }

    fn string(self, x: impl AsRef<[u8]>) -> Raw {
        self.u64(x.as_ref().len() as u64).bytes(x.as_ref())
    }

    /// A u8 entry.
    fn entry(self, key: &str) -> Raw {
        self.string(key).u32(0).bytes(&[7])
    }

    fn tensor(self, name: &str, shape: &[u64], ty: u32, offset: u64) -> Raw {
        let start = self.string(name).u32(shape.len() as u32);
        shape.iter().fold(start, |raw, ne| raw.u64(*ne)).u32(ty).u64(offset)
    }

    fn zeros(self, n: usize) -> Raw {
        self.bytes(&vec![0; n])
    }

    /// Padding to 32 and `n` bytes of data.
    fn data(mut self, n: usize) -> Raw {
        self.0.resize(self.0.len().next_multiple_of(32) + n, 0);
        self
    }
}

/// One tensor of F32 `shape` with 64 bytes of data.
fn one_tensor(name: &str, shape: &[u64], ty: u32, offset: u64) -> Raw {
    Raw::new(3, 1, 0).tensor(name, shape, ty, offset).data(64)
}

fn one_value(ty: u32) -> Raw {
    Raw::new(3, 0, 1).string("key").u32(ty)
}

fn alignment(n: u32) -> Raw {
    Raw::new(3, 0, 1).string("general.alignment").u32(4).u32(n)
}

#[test]
fn small_sound_headers_are_read() {
    for raw in [
        Raw::new(3, 0, 0),
        Raw::new(2, 0, 1).entry("key"),
        one_tensor("t", &[16], 0, 0),
        one_tensor("t", &[2, 2, 2, 2], 0, 0),
        one_tensor(&"n".repeat(63), &[32], 8, 0),
        alignment(8),
        Raw::new(3, 2, 0).tensor("b", &[8], 0, 32).tensor("a", &[8], 0, 0).data(64),
    ] {
        GgufFile::from_bytes(raw.0, "sound").unwrap();
    }
}

#[test]
fn hostile_headers_are_refused_with_the_reason() {
    const HUGE: u64 = u64::MAX;
    let nested = |n: usize| (0..n).fold(one_value(9), |raw, _| raw.u32(9).u64(1)).u32(0).u64(0);
    let long_name = "n".repeat(64);
    let cases: Vec<(Raw, &str)> = vec![
        (Raw::default(), "4 more bytes"),
        (Raw(b"GG".to_vec()), "cut short"),
        (Raw(b"<!DOCTYPE html>".to_vec()), "begins with 'GGUF'"),
        (Raw(b"GGUF".to_vec()).u32(1).zeros(16), "GGUF version '1'"),
        (Raw(b"GGUF".to_vec()).u32(4).zeros(16), "GGUF version '4'"),
        (Raw(b"GGUF".to_vec()).u32(3 << 24).zeros(16), "big endian"),
        (Raw(b"GGUF".to_vec()).u32(3).u32(0), "cut short"),
        (Raw::new(3, HUGE, 0), "at most 0 tensors"),
        (Raw::new(3, 1 << 40, 0).zeros(100), "tensors in the"),
        (Raw::new(3, 0, HUGE), "at most 0 metadata entries"),
        (Raw::new(3, 0, 2).entry("key").entry("key"), "key 'key': expected each key once"),
        (Raw::new(3, 0, 1).string("").u32(0).bytes(&[7, 7]), "key of 1 to 65535 bytes"),
        (Raw::new(3, 0, 1).string("k".repeat(65_536)).u32(0).zeros(1), "key of 1 to 65535 bytes"),
        (Raw::new(3, 0, 1).string([b'k', 0xff]).u32(0).zeros(1), "expected UTF-8"),
        (Raw::new(3, 0, 1).u64(HUGE).zeros(16), "18446744073709551615 more bytes"),
        (one_value(13).zeros(8), "value type in 0..=12"),
        (one_value(u32::MAX).zeros(8), "value type in 0..=12"),
        (one_value(10).u32(0), "key 'key' at byte"),
        (one_value(7).bytes(&[2]), "a bool, 0 or 1"),
        (one_value(8).u64(HUGE), "more bytes"),
        (one_value(8).u64(1 << 62).zeros(9), "more bytes"),
        (one_value(8).string([0xc3, 0x28]), "expected UTF-8"),
        (one_value(9).u32(4).u64(HUGE), "array elements"),
        (one_value(9).u32(4).u64(1 << 62).zeros(64), "at most 16 array elements"),
        (one_value(9).u32(8).u64(HUGE / 8).zeros(64), "array elements"),
        (one_value(9).u32(8).u64(2).string("a").u64(5), "5 more bytes"),
        (one_value(9).u32(8).u64(1).string([0xff]), "expected UTF-8"),
        (one_value(9).u32(7).u64(1).bytes(&[9]), "a bool, 0 or 1"),
        (one_value(9).u32(13).u64(0), "value type in 0..=12"),
        (nested(4), "arrays at most 4 deep"),
        (nested(5000), "arrays at most 4 deep"),
        (alignment(0), "multiple of 8"),
        (alignment(4), "multiple of 8"),
        (alignment(24), "a power of two"),
        (Raw::new(3, 0, 1).string("general.alignment").u32(10).u64(32), "got u64 32"),
        (
            Raw::new(3, 1, 1)
                .string("general.alignment")
                .u32(4)
                .u32(1 << 31)
                .tensor("t", &[16], 0, 0)
                .data(64),
            "cut short",
        ),
        (one_tensor("", &[16], 0, 0), "a name of 1 to 63 bytes"),
        (one_tensor(&long_name, &[16], 0, 0), "a name of 1 to 63 bytes"),
        (one_tensor("a\0b", &[16], 0, 0), "no zeros"),
        (Raw::new(3, 1, 0).string([0xff; 8]).u32(1).zeros(20), "name of tensor number 0"),
        (
            Raw::new(3, 2, 0).tensor("t", &[8], 0, 0).tensor("t", &[8], 0, 32).data(64),
            "tensor 't': expected each name once",
        ),
        (one_tensor("t", &[], 0, 0), "1 to 4 dimensions"),
        (one_tensor("t", &[1; 5], 0, 0), "1 to 4 dimensions"),
        (Raw::new(3, 1, 0).string("t").u32(u32::MAX).zeros(99), "1 to 4 dimensions"),
        (one_tensor("t", &[0], 0, 0), "dimensions of at least 1"),
        (one_tensor("t", &[4, 0, 4], 0, 0), "dimensions of at least 1"),
        (one_tensor("t", &[1 << 32, 1 << 32], 0, 0), "fewer than 2^63"),
        (one_tensor("t", &[1 << 62], 0, 0), "fewer than 2^63"),
        (one_tensor("t", &[HUGE], 0, 0), "fewer than 2^63"),
        (one_tensor("t", &[1 << 60], 0, 0), "a file of at least"),
        (one_tensor("t", &[16], 4, 0), "type number 4"),
        (one_tensor("t", &[16], 9999, 0), "type number 9999"),
        (one_tensor("t", &[16], u32::MAX, 0), "type number 4294967295"),
        (one_tensor("t", &[33], 8, 0), "whole q8_0 blocks of 32"),
        (one_tensor("t", &[1], 0, 8), "multiple of 32"),
        (one_tensor("t", &[1], 0, HUGE - 31), "a file of at least"),
        (one_tensor("t", &[17], 0, 0), "a file of at least"),
        (one_tensor("t", &[16], 0, 32), "the file is cut short: download the file again"),
        (
            Raw::new(3, 2, 0).tensor("a", &[9], 0, 0).tensor("b", &[8], 0, 32).data(64),
            "tensor 'b': expected data at or after byte 36",
        ),
        (Raw::new(3, 0, 2).entry("a\nb").entry("a\nb"), "key 'a\\nb'"),
    ];
    for (i, (raw, reason)) in cases.into_iter().enumerate() {
        match GgufFile::from_bytes(raw.0, "hostile.gguf") {
            Ok(_) => panic!("case {i} ({reason}) was read"),
            Err(error) => {
                let line = one_line(&error);
                assert!(line.contains(reason), "case {i}: {line:?} lacks {reason:?}");
            }
        }
    }
}

#[test]
fn every_cut_of_a_file_is_refused() {
    let whole = fs::read(golden("qwen3-q8_0.lora.gguf")).unwrap();
    for length in (0..6000).chain([whole.len() / 2, whole.len() - 1]) {
        let cut = GgufFile::from_bytes(whole[..length].to_vec(), "cut.gguf");
        assert!(cut.is_err(), "{length} bytes were read");
    }
}

#[test]
fn a_mutated_file_is_read_or_refused_never_worse() {
    let mut rng = ChaCha8Rng::seed_from_u64(1);
    for name in ["qwen3-q8_0.lora.gguf", "llama-q4_0.gguf"] {
        let whole = fs::read(golden(name)).unwrap();
        let file = GgufFile::open(&golden(name)).unwrap();
        let header = file.tensors().iter().map(|t| file.range(t).start).min().unwrap();
        let mut refused = 0;
        for _ in 0..2500 {
            let mut bytes = whole.clone();
            for _ in 0..rng.random_range(1..4) {
                let at = rng.random_range(0..header);
                match rng.random_range(0..6) {
                    0 => bytes.truncate(rng.random_range(0..whole.len())),
                    1 => bytes.insert(at.min(bytes.len()), rng.random()),
                    2 => drop(bytes.splice(at.min(bytes.len()).., [0xff; 16])),
                    3 if at + 8 <= bytes.len() => bytes[at..at + 8].fill(rng.random()),
                    _ if at < bytes.len() => bytes[at] ^= 1 << rng.random_range(0..8),
                    _ => {}
                }
            }
            match GgufFile::from_bytes(bytes, "mutated") {
                Ok(file) => {
                    for tensor in file.tensors() {
                        assert_eq!(file.bytes(tensor).len() as u64, tensor.n_bytes());
                    }
                    let _ = AdapterFile::from_gguf(&file);
                }
                Err(error) => {
                    one_line(&error);
                    refused += 1;
                }
            }
        }
        assert!(refused > 500, "{name}: only {refused} refused");
    }
}

// --- writer ---

#[test]
fn the_writer_refuses_before_it_writes() {
    let mut out = GgufWriter::new();
    out.metadata("key", 1u32).unwrap();
    out.tensor_f32("t", &[1], &[0.0]).unwrap();
    let refusals = [
        out.metadata("key", 2u32),
        out.metadata("", 2u32),
        out.metadata("general.alignment", 12u32),
        out.metadata("general.alignment", 32u64),
        out.tensor_f32("t", &[1], &[0.0]),
        out.tensor_f32("", &[1], &[0.0]),
        out.tensor_f32(&"n".repeat(64), &[1], &[0.0]),
        out.tensor_f32("u", &[], &[0.0]),
        out.tensor_f32("u", &[1, 1, 1, 1, 1], &[0.0]),
        out.tensor_f32("u", &[0], &[]),
        out.tensor_f32("u", &[1 << 40, 1 << 40], &[]),
        out.tensor("u", Type::Q8_0, &[31], |_| Ok(())),
    ];
    for (i, refusal) in refusals.into_iter().enumerate() {
        one_line(&refusal.expect_err(&format!("refusal {i}")));
    }
    let file = GgufFile::from_bytes(out.to_bytes().unwrap(), "memory").unwrap();
    assert_eq!((file.metadata().len(), file.tensors().len()), (1, 1));
}

#[test]
fn a_tensor_of_the_wrong_size_is_refused() {
    for (n, reason) in [(1, "expected 8 bytes of data, got 4 bytes"), (3, "expected no more")] {
        let data = vec![0.0; n];
        let mut out = GgufWriter::new();
        out.tensor_f32("t", &[2], &data).unwrap();
        let line = one_line(&out.to_bytes().unwrap_err());
        assert!(line.contains(reason), "{line}");
    }
}

#[test]
fn bytes_at_odd_addresses_are_read() {
    let path = golden("qwen3-q8_0.gguf");
    let shifted: &'static [u8] = [vec![0], fs::read(&path).unwrap()].concat().leak();
    let odd = GgufFile::from_bytes(&shifted[1..], "embedded").unwrap();
    let mapped = GgufFile::open(&path).unwrap();
    for tensor in odd.tensors() {
        assert_eq!(odd.bytes(tensor).as_ptr().align_offset(8), 0);
        assert!(odd.bytes(tensor) == mapped.bytes(tensor));
    }
}

// --- atomicity ---

fn names_in(folder: &Path) -> Vec<String> {
    let entries = fs::read_dir(folder).unwrap();
    let mut names: Vec<_> =
        entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

#[test]
fn a_failed_write_leaves_everything_as_it_was() {
    let folder = tempfile::tempdir().unwrap();
    let target = folder.path().join("a.gguf");
    fs::write(&target, "before").unwrap();
    let mut out = GgufWriter::new();
    out.tensor("t", Type::F32, &[1 << 20], |to| {
        to.write_f32(&vec![1.0; 1 << 19])?;
        Err(Error::Interrupted)
    })
    .unwrap();
    assert!(matches!(out.write(&target), Err(Error::Interrupted)));
    assert_eq!(fs::read(&target).unwrap(), b"before");
    let fresh = write_atomically(&folder.path().join("b"), |_| Err(Error::Interrupted));
    assert!(matches!(fresh, Err(Error::Interrupted)));
    assert_eq!(names_in(folder.path()), ["a.gguf"]);
}

#[test]
fn a_write_replaces_the_file_with_ordinary_permissions() {
    use std::io::Write;
    let folder = tempfile::tempdir().unwrap();
    let target = folder.path().join("a");
    for text in ["first", "second"] {
        write_atomically(&target, |out| {
            out.write_all(text.as_bytes()).map_err(Error::io("write", &target))
        })
        .unwrap();
        assert_eq!(fs::read_to_string(&target).unwrap(), text);
    }
    assert_eq!(names_in(folder.path()), ["a"]);
    #[cfg(unix)]
    {
        use std::os::unix::fs::PermissionsExt;
        let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode();
        let plain = folder.path().join("plain");
        fs::write(&plain, "").unwrap();
        assert_eq!(mode(&target) & 0o777, mode(&plain) & 0o644);

        let link = folder.path().join("link");
        std::os::unix::fs::symlink(&target, &link).unwrap();
        write_atomically(&link, |_| Ok(())).unwrap();
        assert!(fs::symlink_metadata(&link).unwrap().is_symlink());
        assert_eq!(fs::read(&target).unwrap(), b"");

        let socket = folder.path().join("socket");
        let _listener = std::os::unix::net::UnixListener::bind(&socket).unwrap();
        assert!(write_atomically(&socket, |_| Ok(())).is_err());
    }
    assert!(write_atomically(folder.path(), |_| Ok(())).is_err());
    assert!(write_atomically(&folder.path().join("no/such"), |_| Ok(())).is_err());
}

// --- split sets ---

#[test]
fn split_models_are_found_whole_or_the_missing_part_is_named() {
    let folder = tempfile::tempdir().unwrap();
    let part = |i: u32| folder.path().join(format!("m-{i:05}-of-00003.gguf"));
    fs::write(part(1), "").unwrap();
    fs::write(part(2), "").unwrap();
    let line = one_line(&split_paths(&part(1)).unwrap_err());
    assert!(line.contains("m-00003-of-00003.gguf"), "{line}");
    fs::write(part(3), "").unwrap();
    assert_eq!(split_paths(&part(1)).unwrap(), [part(1), part(2), part(3)]);
    let line = one_line(&split_paths(&part(2)).unwrap_err());
    assert!(line.contains("part 2 of 3") && line.contains("m-00001-of-00003.gguf"), "{line}");
    for single in ["m.gguf", "m-1-of-3.gguf", "m-00001-of-00000.gguf", "m-00001-of-00003.bin"] {
        assert_eq!(split_paths(Path::new(single)).unwrap(), [Path::new(single)]);
    }
}

// --- adapters ---

fn small_adapter() -> AdapterFile {
    let ramp = |n: usize| (0..n).map(|i| i as f32 * 0.5 - 1.0).collect::<Vec<_>>();
    let pair = |weight: &str, rank, n_in, n_out| AdapterPair {
        weight: weight.to_owned(),
        rank,
        n_in,
        n_out,
        n_expert: 1,
        a: ramp(n_in * rank),
        b: ramp(rank * n_out),
    };
    AdapterFile {
        arch: "qwen3".to_owned(),
        name: Some("small".to_owned()),
        alpha: 8.0,
        pairs: vec![pair("blk.0.attn_q.weight", 2, 5, 3), pair("blk.1.ffn_up.weight", 1, 4, 6)],
        extra: vec![("bupo.step".to_owned(), Value::U32(7))],
    }
}

#[test]
fn adapters_come_back_as_they_were_written() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.gguf");
    let adapter = small_adapter();
    adapter.write(&path).unwrap();
    assert_eq!(AdapterFile::read(&path).unwrap(), adapter);
    assert_eq!(adapter.scale(&adapter.pairs[0]), 4.0);
    let file = GgufFile::open(&path).unwrap();
    assert_eq!(file.str("general.type").unwrap(), "adapter");
    assert_eq!(file.str("adapter.type").unwrap(), "lora");
    assert_eq!(file.tensor("blk.0.attn_q.weight.lora_a").unwrap().shape, [5, 2]);
    assert_eq!(file.tensor("blk.0.attn_q.weight.lora_b").unwrap().shape, [2, 3]);
}

#[test]
fn golden_adapters_are_read_and_written_byte_for_byte() {
    for (name, layers) in [("llama-q4_0", 5), ("qwen2-f32", 5), ("qwen3-q4_k", 4)] {
        let path = golden(&format!("{name}.lora.gguf"));
        let adapter = AdapterFile::read(&path).unwrap();
        assert_eq!(adapter.arch, name.split('-').next().unwrap());
        assert_eq!(adapter.alpha, 8.0);
        assert_eq!(adapter.pairs.len(), 7 * layers);
        let model = GgufFile::open(&golden(&format!("{name}.gguf"))).unwrap();
        for pair in &adapter.pairs {
            assert_eq!(pair.rank, 4);
            let weight = model.tensor(&pair.weight).unwrap();
            assert_eq!(weight.shape, [pair.n_in as u64, pair.n_out as u64], "{}", pair.weight);
        }
        let folder = tempfile::tempdir().unwrap();
        let copy = folder.path().join("copy.gguf");
        adapter.write(&copy).unwrap();
        assert!(fs::read(&copy).unwrap() == fs::read(&path).unwrap(), "{name} changed");
    }
}

#[test]
fn adapters_in_other_types_become_f32() {
    let values: Vec<f32> = (0..64).map(|i| i as f32 / 8.0 - 4.0).collect();
    let halves: Vec<u8> =
        values.iter().flat_map(|x| half::f16::from_f32(*x).to_le_bytes()).collect();
    let brains: Vec<u8> =
        values.iter().flat_map(|x| half::bf16::from_f32(*x).to_le_bytes()).collect();
    let mut out = adapter_head("adapter", "lora");
    out.tensor("w.lora_b", Type::BF16, &[1, 64], |to| to.write(&brains)).unwrap();
    out.tensor("w.lora_a", Type::F16, &[64], |to| to.write(&halves)).unwrap();
    out.tensor_f32("blk.0.attn_norm.weight", &[1], &[1.0]).unwrap();
    let file = GgufFile::from_bytes(out.to_bytes().unwrap(), "memory").unwrap();
    let adapter = AdapterFile::from_gguf(&file).unwrap();
    assert_eq!(adapter.pairs.len(), 1);
    let pair = &adapter.pairs[0];
    assert_eq!((pair.n_in, pair.rank, pair.n_out), (64, 1, 64));
    assert_eq!(pair.a, values);
    assert_eq!(pair.b, values);
    assert_eq!(adapter.scale(pair), 1.0, "no alpha means scale 1");
}

fn adapter_head<'a>(ty: &str, adapter_type: &str) -> GgufWriter<'a> {
    let mut out = GgufWriter::new();
    out.metadata("general.architecture", "qwen3").unwrap();
    out.metadata("general.type", ty).unwrap();
    out.metadata("adapter.type", adapter_type).unwrap();
    out
}

#[test]
fn broken_adapters_are_refused() {
    let read = |out: GgufWriter| -> Result<AdapterFile> {
        AdapterFile::from_gguf(&GgufFile::from_bytes(out.to_bytes()?, "broken.gguf")?)
    };
    let with = |tensors: &[(&str, &[u64])]| {
        let mut out = adapter_head("adapter", "lora");
        for (name, shape) in tensors {
            out.tensor(name, Type::F32, shape, |to| {
                to.write_f32(&vec![1.0; shape.iter().product::<u64>() as usize])
            })
            .unwrap();
        }
        read(out)
    };
    let mut alora = adapter_head("adapter", "lora");
    alora.metadata("adapter.alora.invocation_tokens", Array::from(&[1u32][..])).unwrap();
    let cases = [
        (
            read(adapter_head("model", "lora")),
            "key 'general.type': expected 'adapter', got 'model'",
        ),
        (read(adapter_head("adapter", "control_vector")), "expected 'lora'"),
        (read(alora), "activated LoRA"),
        (with(&[]), "at least one LoRA pair"),
        (with(&[("w.lora_a", &[4, 2])]), "no .lora_b"),
        (with(&[("w.lora_b", &[2, 4])]), "no .lora_a"),
        (with(&[("w.lora_a", &[4, 2]), ("w.lora_b", &[3, 4])]), "A [n_in, rank]"),
        (with(&[("w.lora_a", &[4, 2, 2]), ("w.lora_b", &[2, 4, 3])]), "A [n_in, rank]"),
        (with(&[("w.lora_a", &[4, 2, 2]), ("w.lora_b", &[2, 4])]), "A [n_in, rank]"),
        (with(&[("blk.0.attn_q.weight", &[4])]), "ends in .lora_a or .lora_b"),
        (
            with(&[("token_embd.weight.lora_a", &[2, 9]), ("token_embd.weight.lora_b", &[2, 4])]),
            "linear",
        ),
        (AdapterFile::read(&golden("qwen3-f32.gguf")), "expected 'adapter', got no such key"),
    ];
    for (i, (result, reason)) in cases.into_iter().enumerate() {
        let line = one_line(&result.expect_err(&format!("case {i}")));
        assert!(line.contains(reason), "case {i}: {line:?} lacks {reason:?}");
    }
}

#[test]
fn adapters_that_are_not_finite_are_neither_read_nor_written() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.gguf");
    let mut diverged = small_adapter();
    diverged.pairs[1].b[3] = f32::NAN;
    let line = one_line(&diverged.write(&path).unwrap_err());
    assert!(
        line.contains("blk.1.ffn_up.weight.lora_b") && line.contains("NaN at index 3"),
        "{line}"
    );
    let mut short = small_adapter();
    short.pairs[0].a.pop();
    assert!(short.write(&path).is_err());
    assert_eq!(names_in(folder.path()), [""; 0]);

    let mut out = adapter_head("adapter", "lora");
    out.tensor_f32("w.lora_a", &[1, 1], &[f32::INFINITY]).unwrap();
    out.tensor_f32("w.lora_b", &[1, 1], &[1.0]).unwrap();
    let file = GgufFile::from_bytes(out.to_bytes().unwrap(), "memory").unwrap();
    assert!(one_line(&AdapterFile::from_gguf(&file).unwrap_err()).contains("inf at index 0"));
}
