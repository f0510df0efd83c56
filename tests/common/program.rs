//! The program as a user runs it.
#![allow(dead_code)]

use std::path::Path;
use std::process::{Command, Output};

use serde_json::Value;

/// Runs it to its end.
pub fn run(args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_bupo-gguf")).args(args).output().unwrap()
}

/// Runs it, expects success, and gives what it printed.
pub fn succeed(args: &[&str]) -> String {
    let out = run(args);
    let stderr = String::from_utf8_lossy(&out.stderr);
    assert!(out.status.success(), "{args:?}: {stderr}");
    String::from_utf8(out.stdout).unwrap()
}

/// Runs it, expects an exit with one line that holds all of `words`.
pub fn fail(args: &[&str], words: &[&str]) {
    let out = run(args);
    let stderr = String::from_utf8_lossy(&out.stderr).into_owned();
    assert!(!out.status.success(), "{args:?} succeeded");
    assert!(out.status.code().is_some(), "{args:?} was killed: {stderr}");
    let line = stderr.lines().find(|l| l.starts_with("error: "));
    let line = line.unwrap_or_else(|| panic!("{args:?}: no error line in {stderr:?}"));
    for word in words {
        assert!(line.contains(word), "{args:?}: '{word}' is not in: {line}");
    }
}

pub fn json(text: &str) -> Value {
    serde_json::from_str(text).unwrap()
}

pub fn json_lines(path: &Path) -> Vec<Value> {
    std::fs::read_to_string(path).unwrap().lines().map(json).collect()
}

pub fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}
