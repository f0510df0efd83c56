//! The house stays in order: modules import upwards only, `unsafe` stays where it is argued.

use std::fs;
use std::path::{Path, PathBuf};

/// Modules from the bottom up; one may import those before it.
const ORDER: [&str; 19] = [
    "error", "options", "ggml", "ops", "llama", "gguf", "team", "synth", "model", "data",
    "rollout", "reward", "env", "eval", "analysis", "train", "export", "bench", "cli",
];

fn sources(folder: &Path, found: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            sources(&path, found);
        } else if path.extension().is_some_and(|e| e == "rs") {
            found.push(path);
        }
    }
}

/// (module, path, text) of every source file in a module.
fn files() -> Vec<(String, PathBuf, String)> {
    let src = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let mut found = Vec::new();
    sources(&src, &mut found);
    found
        .into_iter()
        .map(|path| {
            let first = path.strip_prefix(&src).unwrap().components().next().unwrap();
            let module = Path::new(first.as_os_str()).file_stem().unwrap();
            (module.to_string_lossy().into_owned(), path.clone(), fs::read_to_string(path).unwrap())
        })
        .filter(|(module, ..)| module != "lib" && module != "main")
        .collect()
}

#[test]
fn modules_import_upwards_only() {
    let rank = |module: &str| ORDER.iter().position(|m| *m == module);
    let mut checked = 0;
    for (module, path, text) in files() {
        let own = rank(&module).unwrap_or_else(|| panic!("{module} is not in the order"));
        for (i, _) in text.match_indices("crate::") {
            let name: String = text[i + "crate::".len()..]
                .chars()
                .take_while(|c| c.is_ascii_alphanumeric() || *c == '_')
                .collect();
            if let Some(other) = rank(&name) {
                assert!(
                    other <= own,
                    "{}: {module} imports {name}, which is above it",
                    path.display()
                );
                checked += 1;
            }
        }
    }
    assert!(checked > 50, "only {checked} imports were seen");
}

#[test]
fn every_module_is_listed_in_order() {
    let lib = fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("src/lib.rs")).unwrap();
    let listed: Vec<&str> =
        lib.lines().filter_map(|line| line.strip_prefix("pub mod ")?.strip_suffix(';')).collect();
    assert_eq!(listed, ORDER);
}

#[test]
fn unsafe_stays_in_ggml_ops_and_llama_and_is_argued() {
    let mut blocks = 0;
    for (module, path, text) in files() {
        let lines: Vec<&str> = text.lines().collect();
        for (i, line) in lines.iter().enumerate() {
            let code = line.split("//").next().unwrap();
            let opens = code.contains("unsafe {") || code.contains("unsafe impl");
            if !(opens || code.contains("unsafe fn") || code.contains("unsafe extern")) {
                continue;
            }
            let inside = ["ggml", "ops", "llama"].contains(&module.as_str());
            assert!(inside, "{}:{}: unsafe in {module}", path.display(), i + 1);
            if opens {
                blocks += 1;
                let argued = lines[i.saturating_sub(8)..=i].iter().any(|l| l.contains("SAFETY:"));
                assert!(argued, "{}:{}: no SAFETY comment above", path.display(), i + 1);
            }
        }
    }
    assert!(blocks > 20, "only {blocks} unsafe blocks were seen");
}

#[test]
fn whoever_lists_state_names_every_field() {
    let mut lists = 0;
    for (_, path, text) in files() {
        for part in text.split("fn state").skip(1).filter(|part| part.contains("State<")) {
            let body = part.split("\n    }\n").next().unwrap();
            let fields = body.split("} = self").next().unwrap();
            assert!(
                body.contains("} = self"),
                "{}: state without taking self apart",
                path.display()
            );
            assert!(!fields.contains(".."), "{}: a field may be forgotten", path.display());
            lists += 1;
        }
    }
    assert!(lists >= 2, "only {lists} lists of state were seen");
}

#[test]
fn files_can_be_read_in_one_sitting() {
    for (_, path, text) in files() {
        let lines = text.lines().count();
        assert!(lines <= 600, "{} has {lines} lines", path.display());
    }
}

#[test]
fn every_family_has_a_golden_model() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let golden = root.join("tests/fixtures/golden");
    let folders = [golden.clone(), golden.join("archs")];
    let names: Vec<String> = folders
        .iter()
        .flat_map(|folder| fs::read_dir(folder).unwrap())
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    let mut families = 0;
    for entry in fs::read_dir(root.join("src/model/arch")).unwrap() {
        let file = entry.unwrap().file_name().into_string().unwrap();
        let family = file.strip_suffix(".rs").expect("a source file").replace('_', "-");
        if family == "mod" {
            continue;
        }
        families += 1;
        let has = |end: &str| {
            let fits =
                |name: &&String| name.starts_with(&format!("{family}-")) && name.ends_with(end);
            names.iter().any(|name| fits(&name))
        };
        for end in [".gguf", ".lora.gguf", ".json", ".grads.safetensors"] {
            assert!(
                has(end),
                "{family}: no golden model (a {family}-*{end} in {})",
                golden.display()
            );
        }
    }
    assert!(families >= 15, "only {families} families were seen");
}
