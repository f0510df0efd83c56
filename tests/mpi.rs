//! A run shared by several ranks gives the very bytes of a process alone, and ends cleanly whatever ends one of them.
//!
//! `cargo test --release --features mpi --test mpi`, with Open MPI's `mpirun` on the path, or another launcher in
//! `BUPO_MPIRUN`.
#![cfg(feature = "mpi")]

#[path = "common/logs.rs"]
mod logs;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use logs::timeless;
use serde_json::Value;

const BINARY: &str = env!("CARGO_BIN_EXE_bupo-gguf");

/// Micro batches are so small that each mini batch has several.
const ROWS: &str = "--steps 4 --prompts-per-step 4 --eval-problems 4 --eval-every 2 --rank 2 --threads 1 \
                    --checkpoint-every 1 --micro-batch-tokens 160";
/// The same where completions are sampled: alone, too, as several ranks do it.
const SAMPLED: &str = "--group 4 --kv-mib 16 --batch-invariant";

fn words(text: &str) -> Vec<String> {
    text.split_whitespace().map(String::from).collect()
}

/// A training of the demo model in `out`.
fn train(options: &str, out: &Path) -> Vec<String> {
    let mut args = words("train demo");
    args.extend(words(options));
    args.extend(["--out".into(), out.display().to_string()]);
    args
}

fn alone(args: &[String]) -> Output {
    Command::new(BINARY).args(args).output().unwrap()
}

/// The launcher: Open MPI's, or the one of `BUPO_MPIRUN`, with its options.
fn mpirun() -> Command {
    let launcher = std::env::var("BUPO_MPIRUN");
    let launcher = launcher.unwrap_or_else(|_| "mpirun --oversubscribe --bind-to none".into());
    let launcher = words(&launcher);
    let mut command = Command::new(&launcher[0]);
    command
        .args(&launcher[1..])
        .env("OMPI_ALLOW_RUN_AS_ROOT", "1")
        .env("OMPI_ALLOW_RUN_AS_ROOT_CONFIRM", "1");
    command
}

fn ranks(n: usize, args: &[String]) -> Output {
    mpirun().args(["-n", &n.to_string(), BINARY]).args(args).output().expect("a launcher")
}

fn start(n: usize, args: &[String]) -> Child {
    let mut command = mpirun();
    command.args(["-n", &n.to_string(), BINARY]).args(args);
    command.stdout(Stdio::null()).stderr(Stdio::piped()).spawn().expect("a launcher")
}

fn said(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

fn succeeded(output: Output, what: &str) {
    assert!(output.status.success(), "{what}: {}", said(&output));
}

/// Lines of a log without what a clock or the number of ranks says.
fn lines(path: &Path) -> Vec<Value> {
    let mut lines = timeless(path);
    for line in &mut lines {
        let fields = line.as_object_mut().unwrap();
        fields.retain(|key, _| key != "ranks" && !key.starts_with("comm_"));
    }
    lines
}

/// What a run of so many steps learnt, and what it said of it.
#[derive(PartialEq)]
struct Learnt {
    adapter: Vec<u8>,
    state: Vec<u8>,
    metrics: Vec<Value>,
    completions: Vec<Value>,
}

impl Learnt {
    fn of(run: &Path, steps: u64) -> Learnt {
        let read = |name: &str| fs::read(run.join(name)).unwrap_or_else(|e| panic!("{name}: {e}"));
        let completions = run.join("completions.jsonl");
        Learnt {
            adapter: read("adapter.gguf"),
            state: read(&format!("checkpoints/step-{steps}/state.safetensors")),
            metrics: lines(&run.join("metrics.jsonl")),
            completions: if completions.exists() { lines(&completions) } else { Vec::new() },
        }
    }

    fn assert_is(&self, other: &Learnt, what: &str) {
        assert!(self.adapter == other.adapter, "{what}: another adapter");
        assert!(self.state == other.state, "{what}: another state");
        assert_eq!(self.metrics, other.metrics, "{what}");
        assert_eq!(self.completions, other.completions, "{what}");
    }
}

/// Rows for what learns from rows, and the options that name them.
fn rows(folder: &Path, kind: &str) -> String {
    let mut text = String::new();
    for i in 0..12 {
        let (a, b) = (3 + 7 * i % 40, 11 + 5 * i % 30);
        let (right, wrong) =
            (format!("\\\\boxed{{{}}}", a + b), format!("\\\\boxed{{{}}}", a + b + 1));
        let prompt = format!("\"prompt\": \"{a}+{b}=\"");
        text += &match kind {
            "dpo" => format!("{{{prompt}, \"chosen\": \"{right}\", \"rejected\": \"{wrong}\"}}\n"),
            "kto" => {
                let (said, label) = if i % 2 == 0 { (&right, true) } else { (&wrong, false) };
                format!("{{{prompt}, \"completion\": \"{said}\", \"label\": {label}}}\n")
            }
            "prompts" => format!("{{{prompt}}}\n"),
            _ => format!("{{{prompt}, \"completion\": \"{right}\"}}\n"),
        };
    }
    let path = folder.join(format!("{kind}.jsonl"));
    fs::write(&path, text).unwrap();
    path.display().to_string()
}

/// Runs the options alone and by each of these numbers of ranks.
fn same_bytes(name: &str, options: &str, numbers: &[usize]) {
    let folder = tempfile::tempdir().unwrap();
    let out = |n: usize| folder.path().join(format!("{n}"));
    succeeded(alone(&train(options, &out(1))), name);
    let expected = Learnt::of(&out(1), 4);
    let learns = |line: &Value| line["gradient_norm"].as_f64() > Some(0.0);
    assert!(expected.metrics.iter().any(learns), "{name}: nothing was learnt");
    for &n in numbers {
        let output = ranks(n, &train(options, &out(n)));
        succeeded(output, name);
        Learnt::of(&out(n), 4).assert_is(&expected, &format!("{name} by {n} ranks"));
        let text = fs::read_to_string(out(n).join("metrics.jsonl")).unwrap();
        let last: Value = serde_json::from_str(text.lines().last().unwrap()).unwrap();
        assert_eq!(last["ranks"], n as u64, "{name}");
        assert!(last["comm_bytes"].as_u64().unwrap() > 0 && last["comm_s"].is_number(), "{name}");
    }
    let text = fs::read_to_string(out(1).join("metrics.jsonl")).unwrap();
    assert!(!text.contains("comm_") && !text.contains("ranks"), "{name}: {text}");
}

#[test]
fn any_number_of_ranks_gives_the_bytes_of_one_process() {
    let folder = tempfile::tempdir().unwrap();
    let sft = format!("{ROWS} --algo sft --data {}", rows(folder.path(), "sft"));
    let cases = [
        ("bupo", format!("{ROWS} {SAMPLED} --internal-steps 2")),
        ("grpo", format!("{ROWS} {SAMPLED} --algo grpo --kl-coef 0.02")),
        ("ppo", format!("{ROWS} {SAMPLED} --algo ppo")),
        ("sft", sft),
    ];
    for (name, options) in cases {
        same_bytes(name, &options, &[2, 3]);
    }
}

#[test]
fn so_does_every_other_objective() {
    let folder = tempfile::tempdir().unwrap();
    let of = |kind: &str| rows(folder.path(), kind);
    // A student that is not its teacher.
    let student = folder.path().join("student");
    succeeded(alone(&train(&format!("{ROWS} --algo sft --data {}", of("sft")), &student)), "sft");
    let student = format!("--adapter {}", student.join("adapter.gguf").display());
    let cases = [
        ("dapo", format!("{ROWS} {SAMPLED} --algo dapo --resample 2 --entropy-every 2")),
        ("kto", format!("{ROWS} --algo kto --data {}", of("kto"))),
        (
            "dpo",
            format!("{ROWS} --algo dpo --data {0} --eval-data {0} --internal-steps 1", of("dpo")),
        ),
        (
            "distill",
            format!(
                "{ROWS} {SAMPLED} --algo distill --teacher demo {student} --data {}",
                of("prompts")
            ),
        ),
        ("auto", format!("{ROWS} {SAMPLED} --internal-steps 2 --internal-layer auto")),
    ];
    for (name, options) in cases {
        same_bytes(name, &options, &[2]);
    }
}

/// An environment program whose answers and rewards depend on what the model says. `sh -c` makes a blank of `${IFS}`.
fn partner(folder: &Path) -> String {
    let script = r#"while IFS= read -r line; do
case $line in *'"op":"step"'*) text=${line#*\"text\":} ;; esac
case $line in
*'"op":"reset"'*) echo '{"messages": [{"role": "user", "content": "go"}]}' ;;
*'"op":"step"'*) echo "{\"messages\": [{\"role\": \"user\", \"content\": \"more $((${#text} % 7))\"}], \"reward\": $((${#text} % 5))}" ;;
*) echo '{}' ;;
esac
done
"#;
    let path = folder.join("partner.sh");
    fs::write(&path, script).unwrap();
    format!("cmd:sh${{IFS}}{}", path.display())
}

/// Dialogues of a few turns.
const TALKS: &str = "--max-turns 3 --max-turn-tokens 14 --env-workers 2";

#[test]
fn so_do_dialogues() {
    let folder = tempfile::tempdir().unwrap();
    let partner = partner(folder.path());
    // Openings have room in a micro batch.
    let rows = ROWS.replace("tokens 160", "tokens 512");
    let of = |more: &str| format!("{rows} {SAMPLED} {TALKS} {more}");
    // The calculator's opening is most of the demo model's context; what is rewarded is brevity.
    let few = |options: String| {
        options
            .replace("prompts-per-step 4", "prompts-per-step 2")
            .replace("problems 4", "problems 1")
    };
    let tools = "--max-prompt 454 --max-response 58 --reward overlong:50";
    let cases = [
        ("bupo", of(&format!("--internal-steps 2 --env {partner}")), vec![2, 3]),
        (
            "grpo",
            few(of(&format!("--algo grpo --kl-coef 0.02 --env env:calculator {tools}"))),
            vec![2],
        ),
        ("ppo", of(&format!("--algo ppo --turn-credit to-go --env {partner}")), vec![2]),
        ("dapo", of("--algo dapo --resample 1 --reward exact --env env:guess"), vec![2]),
    ];
    for (name, options, numbers) in cases {
        same_bytes(&format!("{name} of dialogues"), &options, &numbers);
    }
}

/// Waits until a path is there.
fn wait_for(path: &Path, child: &mut Child) {
    let start = Instant::now();
    while !path.exists() {
        assert!(start.elapsed() < Duration::from_secs(120), "{} is not there", path.display());
        assert!(child.try_wait().unwrap().is_none(), "it ended before {}", path.display());
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// The processes of the program that `mpirun`, or a process of its own, started, by number.
fn processes(mpirun: &Child) -> Vec<(u64, i32)> {
    let own = fs::canonicalize(BINARY).unwrap();
    let mut found = Vec::new();
    for entry in fs::read_dir("/proc").unwrap().flatten() {
        let Ok(pid) = entry.file_name().to_string_lossy().parse::<u32>() else { continue };
        let is_its = |parent: Option<u32>| parent == Some(mpirun.id());
        let is_program = fs::read_link(entry.path().join("exe")).is_ok_and(|exe| exe == own);
        if !is_program || !is_its(parent(pid)) && !is_its(parent(pid).and_then(parent)) {
            continue;
        }
        let environ = fs::read(entry.path().join("environ")).unwrap_or_default();
        let rank = environ.split(|&b| b == 0).find_map(|variable| {
            let (name, value) = std::str::from_utf8(variable).ok()?.split_once('=')?;
            ["OMPI_COMM_WORLD_RANK", "PMI_RANK"].contains(&name).then(|| value.parse().ok())?
        });
        found.extend(rank.map(|rank| (rank, pid as i32)));
    }
    found.sort_unstable();
    found
}

fn parent(pid: u32) -> Option<u32> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    stat.rsplit(')').next()?.split_whitespace().nth(1)?.parse().ok()
}

fn signal(pid: i32, name: &str) {
    let status = Command::new("kill").args([name, &pid.to_string()]).status().unwrap();
    assert!(status.success(), "kill {name} {pid}");
}

/// Waits for the end, within a minute.
fn end_within_a_minute(mut child: Child) -> (Output, Duration) {
    let start = Instant::now();
    while child.try_wait().unwrap().is_none() {
        assert!(start.elapsed() < Duration::from_secs(60), "it goes on");
        std::thread::sleep(Duration::from_millis(20));
    }
    (child.wait_with_output().unwrap(), start.elapsed())
}

const LONG: &str = "--steps 8 --internal-steps 4 --prompts-per-step 4 --group 4 --eval-problems 4 --rank 2 --kv-mib 16 \
                    --threads 1 --checkpoint-every 1 --keep-checkpoints 0 --micro-batch-tokens 160 --batch-invariant";

fn resume(out: &Path) -> Vec<String> {
    let mut args = words("train --resume");
    args.push(out.display().to_string());
    args
}

#[test]
fn a_run_whose_rank_was_killed_goes_on_with_another_number_of_ranks() {
    let folder = tempfile::tempdir().unwrap();
    let whole = folder.path().join("whole");
    succeeded(alone(&train(LONG, &whole)), "alone");
    let expected = Learnt::of(&whole, 8);
    killed_and_resumed(LONG, &expected, &[(3, 2, 2), (2, 0, 1), (2, 1, 3)], folder.path());
}

#[test]
fn so_does_one_of_dialogues() {
    let folder = tempfile::tempdir().unwrap();
    let options = format!("{LONG} {TALKS} --env {}", partner(folder.path()));
    let whole = folder.path().join("whole");
    succeeded(alone(&train(&options, &whole)), "alone");
    let expected = Learnt::of(&whole, 8);
    killed_and_resumed(&options, &expected, &[(2, 1, 3), (3, 0, 2)], folder.path());
}

/// Kills a rank of runs and goes on with another number of ranks: (ranks before, victim, ranks after).
fn killed_and_resumed(
    options: &str,
    expected: &Learnt,
    cases: &[(usize, usize, usize)],
    folder: &Path,
) {
    for &(ranks_before, victim, ranks_after) in cases {
        let out = folder.join(format!("{ranks_before}-{victim}-{ranks_after}"));
        let mut child = start(ranks_before, &train(options, &out));
        wait_for(&out.join("checkpoints/step-3"), &mut child);
        let running = processes(&child);
        assert_eq!(running.len(), ranks_before, "{running:?}");
        signal(running[victim].1, "-KILL");
        let (output, _) = end_within_a_minute(child);
        assert!(!output.status.success());
        running.iter().for_each(|&(_, pid)| ends_soon(pid));
        let output = match ranks_after {
            1 => alone(&resume(&out)),
            n => ranks(n, &resume(&out)),
        };
        succeeded(output, "resume");
        Learnt::of(&out, 8).assert_is(expected, &format!("{ranks_before} to {ranks_after} ranks"));
    }
}

/// `mpirun` may end a moment before the last of its ranks does.
fn ends_soon(pid: i32) {
    let start = Instant::now();
    while is_running(pid) {
        assert!(start.elapsed() < Duration::from_secs(30), "process {pid} goes on");
        std::thread::sleep(Duration::from_millis(20));
    }
}

fn is_running(pid: i32) -> bool {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    let state = stat.rsplit(')').next().and_then(|after| after.split_whitespace().next());
    state.is_some_and(|state| state != "Z")
}

#[test]
fn a_rank_that_hangs_ends_the_run_by_name() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("run");
    let options = LONG.replace("--steps 8", "--steps 100000");
    let mut child = start(2, &train(&options, &out));
    wait_for(&out.join("checkpoints/step-2"), &mut child);
    let hanging = processes(&child)[1].1;
    signal(hanging, "-STOP");
    let (output, after) = end_within_a_minute(child);
    assert!(!output.status.success());
    assert!(after > Duration::from_secs(10), "a rank that is slow is not dead: {after:?}");
    assert!(said(&output).contains("rank 1 on "), "{}", said(&output));
    ends_soon(hanging);
    let resumed = Learnt::of(&out, newest_step(&out));
    assert!(!resumed.adapter.is_empty());
}

fn newest_step(out: &Path) -> u64 {
    let names = fs::read_dir(out.join("checkpoints")).unwrap().flatten();
    let step =
        |entry: fs::DirEntry| entry.file_name().to_str()?.strip_prefix("step-")?.parse().ok();
    names.filter_map(step).max().unwrap()
}

#[test]
fn a_signal_that_mpirun_hands_on_stops_all_ranks_between_steps() {
    let folder = tempfile::tempdir().unwrap();
    let whole = folder.path().join("whole");
    succeeded(alone(&train(LONG, &whole)), "alone");
    let out = folder.path().join("stopped");
    let mut child = start(2, &train(LONG, &out));
    wait_for(&out.join("checkpoints/step-2"), &mut child);
    signal(child.id() as i32, "-USR1");
    let (output, _) = end_within_a_minute(child);
    assert!(said(&output).contains("--resume"), "{}", said(&output));
    let stopped = newest_step(&out);
    assert!((2..8).contains(&stopped), "stopped after step {stopped}");
    succeeded(ranks(2, &resume(&out)), "resume");
    Learnt::of(&out, 8).assert_is(&Learnt::of(&whole, 8), "stopped and resumed");
}

#[test]
fn ranks_that_differ_are_named_before_the_first_step() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("run");
    let options = train(&format!("{ROWS} {SAMPLED}"), &out);
    // Another program, of which one byte more does nothing.
    let other = folder.path().join("other");
    let mut bytes = fs::read(BINARY).unwrap();
    bytes.push(0);
    fs::write(&other, bytes).unwrap();
    Command::new("chmod").arg("+x").arg(&other).status().unwrap();
    let other = other.to_str().unwrap();
    for (program, more, expected) in [
        (BINARY, "--lr 0.5", "--lr"),
        (BINARY, "--threads 2", "threads: expected 1 as rank 0 on"),
        (other, "", "the program's SHA-256"),
    ] {
        let mut second: Vec<String> = options.clone();
        let threads = second.iter().position(|word| word == "--threads").unwrap();
        if more.starts_with("--threads") {
            second[threads + 1] = "2".into();
        } else {
            second.extend(words(more));
        }
        let mut command = mpirun();
        command.args(["-n", "1", BINARY]).args(&options);
        command.args([":", "-n", "1", program]).args(&second);
        let output = command.output().unwrap();
        assert!(!output.status.success(), "{more}");
        let text = said(&output);
        assert!(text.contains("rank 1 on ") && text.contains(expected), "{expected}: {text}");
        assert_eq!(text.matches("error:").count(), 1, "{text}");
        assert!(!out.exists(), "{more}: something was written");
    }
}

#[test]
fn an_error_of_one_rank_is_told_once_and_ends_all() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("run");
    let options = format!("{ROWS} {SAMPLED} --reward-timeout 5").replace("--eval-every 2", "");
    let mut options = train(&options, &out);
    // A judge that fails where it is the second rank's.
    let judge = folder.path().join("judge.sh");
    fs::write(
        &judge,
        "#!/bin/sh\nwhile read -r line; do\n  [ \"${OMPI_COMM_WORLD_RANK:-$PMI_RANK}\" = 1 ] && exit 3\n  echo '{\"reward\": 1}'\ndone\n",
    )
    .unwrap();
    options.extend(["--reward".into(), format!("cmd:sh {}", judge.display())]);
    let (output, _) = end_within_a_minute(start(2, &options));
    assert!(!output.status.success());
    let text = said(&output);
    assert!(text.contains("rank 1 on ") && text.contains("judge.sh"), "{text}");
    assert_eq!(text.matches("error:").count(), 1, "{text}");
    // What does not share its work is not started several times.
    let output = ranks(2, &words("inspect demo"));
    assert!(
        !output.status.success() && said(&output).contains("expected one process, got 2 ranks")
    );
}

#[test]
fn evaluation_and_entropy_are_those_of_one_process() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name).display().to_string();
    let eval = |out: &str| {
        let mut args = words(
            "eval demo --data task:add --problems 9 --samples 2 --max-response 24 --threads 1 --json --batch-invariant",
        );
        args.extend(["--out".into(), path(out)]);
        args
    };
    let (one, two) = (alone(&eval("e1")), ranks(2, &eval("e2")));
    assert!(one.status.success() && two.status.success(), "{} {}", said(&one), said(&two));
    assert_eq!(String::from_utf8_lossy(&one.stdout), String::from_utf8_lossy(&two.stdout));
    let sorted = |out: &str| {
        let text = fs::read_to_string(folder.path().join(out).join("completions.jsonl")).unwrap();
        let mut lines: Vec<String> = text.lines().map(String::from).collect();
        lines.sort();
        lines
    };
    assert_eq!(sorted("e1"), sorted("e2"));
    // What was kept is not sampled again.
    let kept = PathBuf::from(path("e2")).join("completions.jsonl");
    let text = fs::read_to_string(&kept).unwrap();
    fs::write(&kept, text.lines().take(7).map(|line| format!("{line}\n")).collect::<String>())
        .unwrap();
    let mut again = eval("e2");
    again.push("--resume".into());
    let three = ranks(3, &again);
    assert!(three.status.success(), "{}", said(&three));
    assert_eq!(String::from_utf8_lossy(&one.stdout), String::from_utf8_lossy(&three.stdout));
    assert_eq!(sorted("e1"), sorted("e2"));

    let talks = |out: &str| {
        let mut args =
            words("eval demo --problems 9 --samples 2 --threads 1 --json --batch-invariant");
        args.extend(words(&format!("{TALKS} --env {} --data task:add", partner(folder.path()))));
        args.extend(["--out".into(), path(out)]);
        args
    };
    let (one, two) = (alone(&talks("t1")), ranks(2, &talks("t2")));
    assert!(one.status.success() && two.status.success(), "{} {}", said(&one), said(&two));
    assert_eq!(String::from_utf8_lossy(&one.stdout), String::from_utf8_lossy(&two.stdout));
    assert_eq!(sorted("t1"), sorted("t2"));
    assert_eq!(sorted("t1").len(), 18);

    let data = rows(folder.path(), "prompts");
    let entropy = |out: &str| {
        let mut args = words(
            "entropy demo --max-response 16 --threads 1 --batch-tokens 64 --top-k 2 --json --batch-invariant --data",
        );
        args.extend([data.clone(), "--out".into(), path(out)]);
        args
    };
    let (one, three) = (alone(&entropy("h1")), ranks(3, &entropy("h3")));
    assert!(one.status.success() && three.status.success(), "{} {}", said(&one), said(&three));
    assert_eq!(String::from_utf8_lossy(&one.stdout), String::from_utf8_lossy(&three.stdout));
    for file in ["entropy.jsonl", "summary.json"] {
        let read = |out: &str| fs::read(folder.path().join(out).join(file)).unwrap();
        assert!(read("h1") == read("h3"), "{file}");
    }
}

#[test]
fn hidden_states_are_those_of_one_process() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name).display().to_string();
    // Rows for several windows, of which a batch holds a few.
    let all: String =
        (0..8).map(|_| fs::read_to_string(rows(folder.path(), "sft")).unwrap()).collect();
    fs::write(folder.path().join("rows.jsonl"), all).unwrap();
    let of = |data: &str, file: &str, more: &str| {
        let mut args = words("entropy demo --threads 1 --batch-tokens 64 --batch-invariant --data");
        args.extend([path(data), "--hidden".into(), path(file)]);
        args.extend(words(more));
        args
    };
    let read = |file: &str| fs::read(folder.path().join(file)).unwrap();
    let more = "--hidden-taps layer_out,attn_out,final --hidden-type f16 --hidden-positions all";
    let out = |n: usize| format!("--top-k 2 --out {}", path(&format!("figures-{n}")));
    succeeded(alone(&of("rows.jsonl", "one.safetensors", more)), "alone");
    succeeded(ranks(3, &of("rows.jsonl", "three.safetensors", more)), "3 ranks");
    assert!(read("one.safetensors") == read("three.safetensors"));
    assert!(!folder.path().join("three.safetensors.partial").exists());
    rows(folder.path(), "prompts");
    for n in [1, 2] {
        let args =
            of("prompts.jsonl", &format!("{n}.npy"), &format!("--hidden-taps ffn_out {}", out(n)));
        succeeded(if n == 1 { alone(&args) } else { ranks(n, &args) }, "with figures");
    }
    for file in [".npy", ".rows.npy"] {
        assert!(read(&format!("1{file}")) == read(&format!("2{file}")), "{file}");
    }
    let figures = |n: usize| read(&format!("figures-{n}/entropy.jsonl"));
    assert!(figures(1) == figures(2));
    // A name that is taken is refused once, by the first rank.
    let output = ranks(2, &of("rows.jsonl", "one.safetensors", more));
    assert!(!output.status.success());
    let text = said(&output);
    assert!(text.contains("a name that is free") && text.matches("error:").count() == 1, "{text}");
}

#[test]
fn a_killed_evaluation_has_kept_what_any_rank_had_done() {
    let folder = tempfile::tempdir().unwrap();
    let log = folder.path().join("log");
    let judge = folder.path().join("judge.sh");
    // Answers that are asked for after the fiftieth wait until the gate opens, however long a busy machine lets the
    // kill wait.
    let (gate, most) = (folder.path().join("gate"), 50);
    let script = format!(
        "while read -r line; do\n  echo x >> {log}\n  while [ $(wc -l < {log}) -gt {most} ] && ! [ -e {gate} ]; do sleep \
         0.1; done\n  echo '{{\"reward\": 1}}'\ndone\n",
        log = log.display(),
        gate = gate.display()
    );
    fs::write(&judge, script).unwrap();
    let out = folder.path().join("out");
    let mut args =
        words("eval demo --data task:add --problems 80 --threads 1 --reward-workers 2 --out");
    args.extend([out.display().to_string(), "--reward".into()]);
    args.push(format!("cmd:sh {}", judge.display()));
    let mut child = start(2, &args);
    let n_lines = |path: &Path| fs::read_to_string(path).unwrap_or_default().lines().count();
    let kept = out.join("completions.jsonl");
    let start = Instant::now();
    while n_lines(&kept) < 30 {
        assert!(start.elapsed() < Duration::from_secs(120), "nothing is kept");
        assert!(child.try_wait().unwrap().is_none(), "it ended early");
        std::thread::sleep(Duration::from_millis(2));
    }
    signal(processes(&child)[1].1, "-KILL");
    let (output, _) = end_within_a_minute(child);
    assert!(!output.status.success());
    let (judged, lines) = (n_lines(&log), n_lines(&kept));
    fs::write(gate, "").unwrap();
    // Under judgement: 2 of each rank; besides, what was on its way.
    assert!(lines >= 30 && judged <= lines + 12, "{lines} of {judged} were kept");
    assert!(judged <= most + 4, "{judged} were judged");
    args.push("--resume".into());
    succeeded(ranks(3, &args), "resume");
    assert_eq!(n_lines(&kept), 80);
    assert!(n_lines(&log) <= 80 + 12, "{} were judged", n_lines(&log));
}

#[test]
fn a_damaged_checkpoint_is_left_alone_by_all_ranks() {
    let folder = tempfile::tempdir().unwrap();
    let (whole, out) = (folder.path().join("whole"), folder.path().join("run"));
    succeeded(alone(&train(LONG, &whole)), "alone");
    succeeded(ranks(2, &train(&LONG.replace("--steps 8", "--steps 5"), &out)), "five steps");
    let newest = out.join("checkpoints/step-5");
    let adapter = newest.join("adapter.gguf");
    let mut bytes = fs::read(&adapter).unwrap();
    *bytes.last_mut().unwrap() ^= 1;
    fs::write(&adapter, bytes).unwrap();
    let mut args = resume(&out);
    args.extend(words("--steps 8"));
    succeeded(ranks(3, &args), "resume");
    Learnt::of(&out, 8).assert_is(&Learnt::of(&whole, 8), "from step 4");
}
