//! A run goes on to the very bytes that the undisturbed one gives, whatever ended it.
#![cfg(unix)]

#[path = "common/logs.rs"]
mod logs;
#[path = "common/sums.rs"]
mod sums;

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::OnceLock;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use bupo_gguf::rollout::{Progress, PromptOptions};
use bupo_gguf::train::{Algorithm, Observer, Resume, StepRecord, Summary};
use bupo_gguf::{Model, Result, TrainConfig, Trainer};
use clap::ValueEnum;
use logs::timeless;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use serde_json::Value;
use sums::right_the_sums;

const STEPS: u64 = 4;

/// Two internal steps of four, so that both phases are cut. One thread, for two wait for each other on a
/// busy machine.
fn small() -> TrainConfig {
    TrainConfig {
        steps: STEPS,
        internal_steps: Some(2),
        prompts_per_step: 2,
        group: 4,
        eval_problems: 2,
        rank: 2,
        kv_mib: Some(16),
        threads: Some(1),
        checkpoint_every: 1,
        ..TrainConfig::default()
    }
}

fn demo() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("assets/demo.gguf")
}

/// The arguments of a new run as [`small`] has it.
fn fresh(out: &Path) -> Vec<String> {
    let flags = "--steps 4 --internal-steps 2 --prompts-per-step 2 --group 4 --eval-problems 2 --rank 2 \
                 --kv-mib 16 --threads 1 --checkpoint-every 1";
    let mut args = vec!["train".to_string(), demo().to_str().unwrap().into()];
    args.extend(flags.split_whitespace().map(String::from));
    args.extend(["--out".into(), out.to_str().unwrap().into()]);
    args
}

fn resume(out: &Path, more: &[&str]) -> Vec<String> {
    let args = ["train", "--resume", out.to_str().unwrap()];
    args.iter().chain(more).map(|s| s.to_string()).collect()
}

fn run(args: &[String]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_bupo-gguf")).args(args).output().unwrap()
}

fn start(args: &[String]) -> Child {
    Command::new(env!("CARGO_BIN_EXE_bupo-gguf"))
        .args(args)
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap()
}

fn stderr(out: &Output) -> String {
    String::from_utf8_lossy(&out.stderr).into_owned()
}

/// What a run leaves, apart from what a clock says.
#[derive(PartialEq)]
struct Left {
    adapter: Vec<u8>,
    tensors: Vec<u8>,
    completions: String,
    metrics: Vec<Value>,
}

impl Left {
    fn by(out: &Path, step: u64) -> Left {
        let read = |name: &str| fs::read_to_string(out.join(name)).unwrap();
        let bytes = |name: &str| fs::read(out.join(name)).unwrap();
        Left {
            metrics: timeless(&out.join("metrics.jsonl")),
            adapter: bytes("adapter.gguf"),
            tensors: bytes(&format!("checkpoints/step-{step}/state.safetensors")),
            completions: read("completions.jsonl"),
        }
    }

    fn is(&self, other: &Left, what: &str) {
        assert_eq!(self.metrics, other.metrics, "{what}: metrics");
        assert!(self.completions == other.completions, "{what}: completions differ");
        assert!(self.tensors == other.tensors, "{what}: state tensors differ");
        assert!(self.adapter == other.adapter, "{what}: adapters differ");
    }
}

/// The undisturbed run, and how long one of its steps took with all that is around it.
fn undisturbed_and_step() -> &'static (Left, Duration) {
    static LEFT: OnceLock<(Left, Duration)> = OnceLock::new();
    LEFT.get_or_init(|| {
        let dir = tempfile::tempdir().unwrap();
        let out = dir.path().join("run");
        let begun = Instant::now();
        let output = run(&fresh(&out));
        let step = begun.elapsed() / STEPS as u32;
        assert!(output.status.success(), "{}", stderr(&output));
        (Left::by(&out, STEPS), step)
    })
}

fn undisturbed() -> &'static Left {
    &undisturbed_and_step().0
}

fn lines(out: &Path) -> usize {
    let bytes = fs::read(out.join("metrics.jsonl")).unwrap_or_default();
    bytes.iter().filter(|&&b| b == b'\n').count()
}

#[test]
fn killed_at_random_moments_it_gives_the_same_bytes() {
    let (undisturbed, step) = undisturbed_and_step();
    let mut rng = ChaCha8Rng::seed_from_u64(7);
    let mut kills = 0;
    for runs in 1.. {
        assert!(runs <= 20, "only {kills} kills met a running process");
        let dir = tempfile::tempdir().unwrap();
        let out = dir.path().join("run");
        kills += kill_and_resume(&out, *step, &mut rng);
        Left::by(&out, STEPS).is(undisturbed, "killed");
        let names: Vec<_> = fs::read_dir(out.join("checkpoints"))
            .unwrap()
            .map(|e| e.unwrap().file_name().into_string().unwrap())
            .collect();
        assert_eq!(names.len(), 2, "the last two are kept, nothing else is left: {names:?}");
        assert!(!out.join(".partial-config").exists(), "leftovers are removed");
        if kills >= 6 {
            break;
        }
    }
}

/// Kills a run before anything is there and then within about a step's time after each of its steps, and lets it
/// end. How many kills met a running process: on a fast machine the run may have ended before.
fn kill_and_resume(out: &Path, step: Duration, rng: &mut ChaCha8Rng) -> u32 {
    // What a kill in the middle of the very first write leaves.
    fs::create_dir_all(out).unwrap();
    fs::write(out.join(".partial-config"), "half").unwrap();
    let mut args = fresh(out);
    let mut kills = 0;
    for wanted in [0, 0, 1, 2, 2, 3, 4] {
        let mut child = start(&args);
        let begun = Instant::now();
        while lines(out) < wanted && child.try_wait().unwrap().is_none() {
            assert!(begun.elapsed().as_secs() < 300, "no step {wanted} within five minutes");
            std::thread::sleep(Duration::from_millis(1));
        }
        std::thread::sleep(step.mul_f64(rng.random()));
        kills += child.try_wait().unwrap().is_none() as u32;
        child.kill().unwrap();
        child.wait().unwrap();
        if out.join("config.toml").exists() {
            args = resume(out, &[]);
        }
    }
    let output = run(&args);
    assert!(output.status.success(), "{}", stderr(&output));
    kills
}

/// Does something at chosen moments; remembers notes.
#[derive(Default)]
struct At<'a> {
    rollout: Option<Box<dyn FnMut(u64) + 'a>>,
    update: Option<Box<dyn FnMut(u64) + 'a>>,
    step: Option<Box<dyn FnMut(u64) + 'a>>,
    done: u64,
    notes: Vec<String>,
}

impl Observer for At<'_> {
    fn rollout(&mut self, what: &str, progress: Progress) {
        if what == "rollout" && progress.done * 2 > progress.total {
            self.rollout.iter_mut().for_each(|f| f(self.done + 1));
        }
    }

    fn update(&mut self, _done: usize, _total: usize) {
        self.update.iter_mut().for_each(|f| f(self.done + 1));
    }

    fn step(&mut self, record: &StepRecord) {
        self.done = record.step;
        self.step.iter_mut().for_each(|f| f(record.step));
    }

    fn note(&mut self, text: &str) {
        self.notes.push(text.into());
    }
}

fn go_on(out: &Path, watch: &mut At<'_>) -> Result<Summary> {
    let resume = Resume::open(out)?;
    let model = Model::open(&resume.config().model)?;
    let mut trainer = resume.trainer(&model)?;
    trainer.run_on(resume, watch)
}

#[test]
fn asked_to_stop_it_stops_between_steps_and_goes_on_exactly() {
    for moment in ["rollout", "update", "step"] {
        for at in [1, 3] {
            let dir = tempfile::tempdir().unwrap();
            let out = dir.path().join("run");
            let model = Model::open(&demo()).unwrap();
            let config = TrainConfig { checkpoint_every: 100, ..small() };
            let mut trainer = Trainer::new(&model, config).unwrap();
            let flag = trainer.stop_flag();
            let stop = |step: u64| flag.store(step == at, Ordering::Relaxed);
            let mut watch = At::default();
            match moment {
                "rollout" => watch.rollout = Some(Box::new(stop)),
                "update" => watch.update = Some(Box::new(stop)),
                _ => watch.step = Some(Box::new(stop)),
            }
            let summary = trainer.run(&out, &mut watch).unwrap();
            assert!(summary.interrupted, "{moment} {at}");
            assert_eq!(summary.steps, if moment == "rollout" { at - 1 } else { at });
            drop((watch, trainer));
            let summary = go_on(&out, &mut At::default()).unwrap();
            assert_eq!((summary.steps, summary.interrupted), (STEPS, false));
            Left::by(&out, STEPS).is(undisturbed(), &format!("stopped at {moment} {at}"));
        }
    }
}

#[test]
fn every_algorithm_goes_on_exactly() {
    for algo in Algorithm::value_variants().iter().filter(|a| a.is_rewarded()) {
        // Two threads once: their number is part of what makes a run the same.
        let threads = Some(if *algo == Algorithm::Bupo { 2 } else { 1 });
        let config = || TrainConfig {
            algo: *algo,
            kl_coef: 0.01,
            steps: 3,
            internal_steps: algo.has_internal_phase().then_some(1),
            threads,
            ..small()
        };
        let dir = tempfile::tempdir().unwrap();
        let (whole, cut) = (dir.path().join("whole"), dir.path().join("cut"));
        let model = Model::open(&demo()).unwrap();
        Trainer::new(&model, config()).unwrap().run(&whole, &mut At::default()).unwrap();
        let mut trainer = Trainer::new(&model, config()).unwrap();
        let flag = trainer.stop_flag();
        let stop = |step: u64| flag.store(step == 2, Ordering::Relaxed);
        let mut watch = At { step: Some(Box::new(stop)), ..At::default() };
        trainer.run(&cut, &mut watch).unwrap();
        drop((watch, trainer));
        go_on(&cut, &mut At::default()).unwrap();
        Left::by(&cut, 3).is(&Left::by(&whole, 3), &format!("{algo:?}"));
    }
}

/// A folder with checkpoints of steps 2 and 3 of the run.
fn three_steps() -> (tempfile::TempDir, PathBuf) {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("run");
    let mut args = fresh(&out);
    args[3] = "3".into();
    let output = run(&args);
    assert!(output.status.success(), "{}", stderr(&output));
    (dir, out)
}

fn copy(from: &Path, to: &Path) {
    fs::create_dir_all(to).unwrap();
    for entry in fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        match entry.file_type().unwrap().is_dir() {
            true => copy(&entry.path(), &to.join(entry.file_name())),
            false => drop(fs::copy(entry.path(), to.join(entry.file_name())).unwrap()),
        }
    }
}

#[test]
fn a_damaged_checkpoint_is_reported_and_the_one_before_it_used() {
    let (dir, out) = three_steps();
    let newest = "checkpoints/step-3";
    for (i, file) in
        ["state.safetensors", "adapter.gguf", "state.json", "config.toml", "SHA256SUMS"]
            .iter()
            .enumerate()
    {
        let again = dir.path().join(format!("damaged-{i}"));
        copy(&out, &again);
        let path = again.join(newest).join(file);
        let mut bytes = fs::read(&path).unwrap();
        match i % 3 {
            0 => bytes[20] ^= 1,
            1 => bytes.truncate(bytes.len() / 2),
            _ => bytes.clear(),
        }
        fs::write(&path, bytes).unwrap();
        if i == 0 {
            // The whole way once; the others need only be noticed.
            let output = run(&resume(&again, &["--steps", "4"]));
            assert!(output.status.success(), "{}", stderr(&output));
            let said = stderr(&output);
            assert!(said.contains("step-3 is not used") && said.contains("sha256"), "{said}");
            assert!(said.contains("going on after step 2"), "{said}");
            Left::by(&again, STEPS).is(undisturbed(), file);
            assert!(again.join("checkpoints/step-3.damaged").is_dir(), "put aside");
        } else {
            let resumed = Resume::open(&again).unwrap();
            let used = resumed.checkpoint().unwrap().path().to_path_buf();
            assert!(used.ends_with("step-2"), "{file}: {used:?}");
        }
    }
    for step in [2, 3] {
        fs::remove_file(out.join(format!("checkpoints/step-{step}/state.json"))).unwrap();
    }
    let output = run(&resume(&out, &[]));
    assert!(!output.status.success());
    assert!(stderr(&output).contains("error: "), "{}", stderr(&output));
    assert!(stderr(&output).contains("a sound checkpoint"), "{}", stderr(&output));
}

#[test]
fn changed_settings_are_listed_and_refused_where_they_break_exactness() {
    let (dir, out) = three_steps();
    let refused = |more: &[&str], words: &[&str]| {
        let output = run(&resume(&out, more));
        assert!(!output.status.success(), "{more:?}");
        let line = stderr(&output);
        words.iter().for_each(|w| assert!(line.contains(w), "{more:?}: no '{w}' in {line}"));
    };
    refused(
        &["--lr", "0.5", "--group", "6"],
        &["--lr 0.5 instead of", "--group 6", "--allow-change"],
    );
    refused(&["--rank", "8", "--allow-change"], &["--rank 8 instead of 2", "--adapter"]);
    refused(&["--out", "elsewhere"], &["--resume", "--out"]);
    let other = dir.path().join("other.gguf");
    let mut bytes = fs::read(demo()).unwrap();
    *bytes.last_mut().unwrap() ^= 1;
    fs::write(&other, bytes).unwrap();
    let output = run(&[resume(&out, &[]), vec![other.to_str().unwrap().into()]].concat());
    assert!(stderr(&output).contains("another model"), "{}", stderr(&output));

    // More steps at a constant learning rate, and evaluations, leave the steps as they are.
    let longer = dir.path().join("longer");
    copy(&out, &longer);
    let output = run(&resume(&longer, &["--steps", "4", "--eval-every", "4"]));
    assert!(output.status.success(), "{}", stderr(&output));
    let said = stderr(&output);
    assert!(said.contains("changed: --eval-every 4 instead of 0"), "{said}");
    let left = Left::by(&longer, STEPS);
    assert!(left.adapter == undisturbed().adapter && left.tensors == undisturbed().tensors);
    // A second resume knows the changed settings.
    let config = fs::read_to_string(longer.join("config.toml")).unwrap();
    assert!(config.contains("eval-every = 4") && config.contains("steps = 4"), "{config}");

    let output = run(&resume(&out, &["--steps", "4", "--lr", "0.0005", "--allow-change"]));
    assert!(output.status.success(), "{}", stderr(&output));
    assert!(stderr(&output).contains("not the adapter of an uninterrupted run"));
}

#[test]
fn settings_of_an_older_version_are_refused_by_name() {
    let (_dir, out) = three_steps();
    let path = out.join("config.toml");
    let config = fs::read_to_string(&path).unwrap();
    for (old, key) in [("memory-mib = 4000", "memory-mib"), ("memory = 512", "memory")] {
        fs::write(&path, config.replace("[train]\n", &format!("[train]\n{old}\n"))).unwrap();
        let output = run(&resume(&out, &[]));
        let said = stderr(&output);
        let error = said.lines().find(|l| l.starts_with("error: ")).expect("an error line");
        assert!(error.contains(&format!("{key}, as an older version wrote it")), "{error}");
        assert!(error.contains("memory = \"12GiB\""), "{error}");
    }
    fs::write(&path, config.replace("[train]\n", "[train]\nmemory = \"4GiB\"\n")).unwrap();
    Resume::open(&out).unwrap();
}

/// Resident kB and open descriptors of a process that is there.
#[cfg(target_os = "linux")]
fn held(pid: u32) -> Option<(u64, usize)> {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    let resident =
        status.lines().find_map(|l| l.strip_prefix("VmRSS:")?.trim().strip_suffix(" kB"))?;
    Some((resident.parse().ok()?, fs::read_dir(format!("/proc/{pid}/fd")).ok()?.count()))
}

/// `tools/soak.sh` in short.
#[test]
#[cfg(target_os = "linux")]
fn memory_and_descriptors_stay_flat_and_a_killed_run_leaves_no_file() {
    let dir = tempfile::tempdir().unwrap();
    let (out, tmp) = (dir.path().join("run"), dir.path().join("tmp"));
    fs::create_dir(&tmp).unwrap();
    let mut args = fresh(&out);
    (args[1], args[3]) = ("demo".into(), "100000".into());
    let mut child = Command::new(env!("CARGO_BIN_EXE_bupo-gguf"))
        .args(&args)
        .env("TMPDIR", &tmp)
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let begun = Instant::now();
    // The most of every 40 steps, after those in which nearly everything is done for the first time.
    const WINDOW: usize = 40;
    let mut windows = BTreeMap::<usize, (u64, usize)>::new();
    loop {
        let step = lines(&out);
        assert!(begun.elapsed().as_secs() < 900, "only {step} steps within a quarter of an hour");
        if step > 10 * WINDOW {
            break;
        }
        let (resident, descriptors) = held(child.id()).expect("the run goes on");
        let most = windows.entry(step / WINDOW).or_default();
        *most = (most.0.max(resident), most.1.max(descriptors));
        std::thread::sleep(Duration::from_millis(2));
    }
    child.kill().unwrap();
    child.wait().unwrap();
    windows.remove(&0);
    println!("kB and descriptors by {WINDOW} steps: {windows:?}");
    let seen: Vec<_> = windows.values().collect();
    assert!(seen.len() >= 6, "too few windows: {windows:?}");
    // A batch of a shape that was not seen before takes up to a MB more, once; a leak grows in every window. The
    // allocator asks for 132 kB at a time, so one of 4 kB a step grows in each.
    let mut grown: Vec<_> = seen.windows(2).map(|w| w[1].0 as i64 - w[0].0 as i64).collect();
    grown.sort();
    assert!(grown[grown.len() / 2] < 64, "resident kB: {windows:?}");
    let (first, last) = (seen[0].1, seen[seen.len() - 1].1);
    assert!(last <= first + 1, "descriptors: {windows:?}");
    let left: Vec<_> = fs::read_dir(&tmp).unwrap().map(|e| e.unwrap().file_name()).collect();
    assert!(left.is_empty(), "left in the temporary folder: {left:?}");
}

#[test]
fn one_run_per_folder() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("run");
    let mut args = fresh(&out);
    args[3] = "100000".into();
    let mut child = start(&args);
    let begun = Instant::now();
    while lines(&out) == 0 {
        assert!(begun.elapsed().as_secs() < 300, "no step within five minutes");
        std::thread::sleep(Duration::from_millis(10));
    }
    let holder = format!("held by process {}", child.id());
    let output = run(&resume(&out, &[]));
    assert!(!output.status.success());
    assert!(stderr(&output).contains(&holder), "{}", stderr(&output));
    child.kill().unwrap();
    child.wait().unwrap();
    // The dead hold nothing.
    Resume::open(&out).unwrap();
}

#[test]
fn a_full_disk_costs_no_checkpoint() {
    let (_dir, out) = three_steps();
    let before = fs::read(out.join("checkpoints/step-3/state.safetensors")).unwrap();
    let program = env!("CARGO_BIN_EXE_bupo-gguf");
    // No file may grow beyond half of the state: what a full disk does, without being root.
    let blocks = before.len() / 1024 / 2;
    let script = format!(
        "trap '' XFSZ; ulimit -f {blocks}; exec {program} train --resume {} --steps 4",
        out.display()
    );
    let output = Command::new("bash").args(["-c", &script]).output().unwrap();
    let said = stderr(&output);
    assert!(!output.status.success(), "{said}");
    assert!(
        said.contains("no checkpoint of step 4") && said.contains("newest checkpoint: step 3"),
        "{said}"
    );
    let error = said.lines().find(|l| l.starts_with("error: ")).expect("an error line");
    assert!(error.contains("state.safetensors") && error.contains("--resume"), "{error}");
    let names: Vec<_> =
        fs::read_dir(out.join("checkpoints")).unwrap().map(|e| e.unwrap().file_name()).collect();
    assert_eq!(names.len(), 2, "the old ones and nothing half-written: {names:?}");
    assert!(fs::read(out.join("checkpoints/step-3/state.safetensors")).unwrap() == before);
    let output = run(&resume(&out, &["--steps", "4"]));
    assert!(output.status.success(), "{}", stderr(&output));
    Left::by(&out, STEPS).is(undisturbed(), "after the full disk");
}

/// Makes a run believe that it began this many seconds later.
fn begin_later(out: &Path, step: u64, seconds: f64) {
    let checkpoint = out.join(format!("checkpoints/step-{step}"));
    let path = checkpoint.join("state.json");
    let mut state: Value = serde_json::from_str(&fs::read_to_string(&path).unwrap()).unwrap();
    let began = &mut state["numbers"]["began_unix_s"];
    let bits = u64::from_str_radix(began.as_str().unwrap(), 16).unwrap();
    *began = format!("{:016x}", (f64::from_bits(bits) + seconds).to_bits()).into();
    fs::write(&path, state.to_string()).unwrap();
    right_the_sums(&checkpoint);
}

#[test]
fn a_clock_that_was_set_back_changes_nothing() {
    let (_dir, out) = three_steps();
    // As the run sees it, the clock now stands ten years before its beginning.
    begin_later(&out, 3, 10.0 * 365.0 * 86_400.0);
    let output = run(&resume(&out, &["--steps", "4"]));
    assert!(output.status.success(), "{}", stderr(&output));
    Left::by(&out, STEPS).is(undisturbed(), "with the clock set back");
    let metrics = fs::read_to_string(out.join("metrics.jsonl")).unwrap();
    for line in metrics.lines() {
        let record: Value = serde_json::from_str(line).unwrap();
        let seconds = record["seconds"].as_f64().unwrap();
        assert!((0.0..300.0).contains(&seconds), "{line}");
    }
}

#[test]
fn the_date_in_a_template_is_that_of_the_runs_beginning() {
    let dir = tempfile::tempdir().unwrap();
    let template = dir.path().join("dated.jinja");
    fs::write(&template, "{{ strftime_now('%d %H:%M:%S ') }}{{ messages[-1]['content'] }}")
        .unwrap();
    let template = template.to_str().unwrap().into();
    let prompts = PromptOptions { template, ..PromptOptions::default() };
    let whole = dir.path().join("whole");
    let model = Model::open(&demo()).unwrap();
    let config = TrainConfig { prompts, keep_checkpoints: 0, ..small() };
    Trainer::new(&model, config).unwrap().run(&whole, &mut At::default()).unwrap();
    let whole_left = Left::by(&whole, STEPS);
    // Back to step 2, on another second.
    let back = |name: &str| {
        let cut = dir.path().join(name);
        copy(&whole, &cut);
        for step in [3, 4] {
            fs::remove_dir_all(cut.join(format!("checkpoints/step-{step}"))).unwrap();
        }
        cut
    };
    std::thread::sleep(Duration::from_millis(1100));
    let cut = back("cut");
    go_on(&cut, &mut At::default()).unwrap();
    Left::by(&cut, STEPS).is(&whole_left, "on another second");
    // The template does write the date: with another one the run is another.
    let other = back("other");
    begin_later(&other, 2, 86_400.0);
    go_on(&other, &mut At::default()).unwrap();
    assert!(Left::by(&other, STEPS).completions != whole_left.completions, "no date in the prompt");
}

#[test]
fn a_reward_program_that_dies_ends_the_run_and_it_goes_on_exactly_from_any_folder() {
    let dir = tempfile::tempdir().unwrap();
    // Dies for good once the run has done two steps, until it is mended.
    let script = r#"while read -r line; do
    if [ ! -e mended ] && [ "$(cat run/metrics.jsonl | wc -l)" -ge 2 ]; then exit 3; fi
    case "$line" in *boxed{[1-4]*) echo 1;; *) echo 0;; esac
done
"#;
    fs::write(dir.path().join("judge.sh"), script).unwrap();
    let train = |folder: &Path, args: Vec<String>| {
        Command::new(env!("CARGO_BIN_EXE_bupo-gguf"))
            .args(args)
            .current_dir(folder)
            .output()
            .unwrap()
    };
    let judged = |out: &str| {
        let reward = ["--reward".to_string(), "cmd:sh ./judge.sh".into()];
        [fresh(Path::new(out)), reward.to_vec()].concat()
    };
    let output = train(dir.path(), judged("run"));
    let said = stderr(&output);
    assert!(!output.status.success(), "{said}");
    let error = said.lines().find(|l| l.starts_with("error: ")).expect("an error line");
    assert!(error.contains("the reward program") && error.contains("exit status: 3"), "{error}");
    assert!(error.contains("step 2 is sound") && error.contains("--resume"), "{error}");

    fs::write(dir.path().join("mended"), "").unwrap();
    let output = train(Path::new("/"), resume(&dir.path().join("run"), &[]));
    assert!(output.status.success(), "{}", stderr(&output));
    let output = train(dir.path(), judged("whole"));
    assert!(output.status.success(), "{}", stderr(&output));
    let left = |name: &str| Left::by(&dir.path().join(name), STEPS);
    left("run").is(&left("whole"), "after the program was mended");
    let rewards: Vec<_> = left("whole").metrics.iter().map(|m| m["reward"].clone()).collect();
    assert!(rewards.iter().any(|r| r.as_f64() != Some(0.0)), "the program decides: {rewards:?}");
}

/// What failed before a step was complete cannot be gone on with: the folder's name is free again.
#[test]
fn a_run_that_fails_in_its_first_step_leaves_nothing() {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("dies.sh"), "read -r line; exit 3\n").unwrap();
    let train = |args: &[&str]| {
        let mut train = Command::new(env!("CARGO_BIN_EXE_bupo-gguf"));
        train.args(["train", "demo", "--steps", "1", "--eval-problems", "1"]).args(args);
        train.current_dir(dir.path()).output().unwrap()
    };
    let names = |folder: &str| {
        let read = fs::read_dir(dir.path().join(folder)).unwrap();
        let mut names: Vec<_> = read.map(|e| e.unwrap().file_name()).collect();
        names.sort();
        names
    };
    let failing = ["--reward", "cmd:sh ./dies.sh"];
    let output = train(&failing);
    assert!(!output.status.success());
    assert!(stderr(&output).contains("the reward program"), "{}", stderr(&output));
    assert_eq!(names("."), ["dies.sh"], "neither the folder nor the one around it");
    // A folder that was there, and what somebody puts into it meanwhile, stay.
    fs::create_dir(dir.path().join("mine")).unwrap();
    let script = "touch mine/note; read -r line; exit 3\n";
    fs::write(dir.path().join("dies.sh"), script).unwrap();
    let output = train(&[&failing[..], &["--out", "mine"]].concat());
    assert!(!output.status.success());
    assert_eq!(names("mine"), ["note"]);
    // Runs that succeed are numbered.
    for _ in 0..2 {
        let output = train(&["--prompts-per-step", "2", "--group", "2"]);
        assert!(output.status.success(), "{}", stderr(&output));
    }
    assert_eq!(names("runs"), ["demo-bupo-1", "demo-bupo-1-2"]);
}

#[test]
fn a_removed_folder_is_noticed_and_what_was_learnt_is_kept() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("run");
    let model = Model::open(&demo()).unwrap();
    let mut trainer = Trainer::new(&model, small()).unwrap();
    let remove = |step: u64| {
        if step == 3 {
            let _ = fs::remove_dir_all(&out);
        }
    };
    let mut watch = At { update: Some(Box::new(remove)), ..At::default() };
    let error = trainer.run(&out, &mut watch).unwrap_err().to_string();
    assert!(error.contains("folder to stay") && error.contains("--resume"), "{error}");
    drop((watch, trainer));
    let mut watch = At::default();
    let summary = go_on(&out, &mut watch).unwrap();
    assert_eq!(summary.steps, STEPS);
    assert!(watch.notes.iter().any(|n| n.contains("after step 3")), "{:?}", watch.notes);
    assert!(fs::read(out.join("adapter.gguf")).unwrap() == undisturbed().adapter);
    assert_eq!(lines(&out), 1, "the line of step 4; the others went with the folder");
}

#[test]
fn a_panic_in_a_step_is_an_error_and_the_run_goes_on_later() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("run");
    let model = Model::open(&demo()).unwrap();
    for update in [false, true] {
        let mut trainer = Trainer::new(&model, small()).unwrap();
        let die = |step: u64| assert!(step != 3, "a worker died");
        let mut watch = At::default();
        match update {
            true => watch.update = Some(Box::new(die)),
            false => watch.rollout = Some(Box::new(die)),
        }
        let error = trainer.run(&out, &mut watch).unwrap_err().to_string();
        assert!(error.contains("a worker died") && error.contains("step 2 is sound"), "{error}");
        drop((watch, trainer));
        go_on(&out, &mut At::default()).unwrap();
        Left::by(&out, STEPS).is(undisturbed(), "after a panic");
        fs::remove_dir_all(&out).unwrap();
    }
}

#[test]
fn weights_that_blow_up_never_reach_a_checkpoint() {
    let (_dir, out) = three_steps();
    let output = run(&resume(&out, &["--lr", "3e38", "--steps", "40", "--allow-change"]));
    let said = stderr(&output);
    assert!(!output.status.success(), "{said}");
    assert!(said.contains("not finite"), "{said}");
    let checkpoint = Resume::open(&out).unwrap();
    let adapter = checkpoint.checkpoint().unwrap().adapter();
    bupo_gguf::gguf::AdapterFile::read(&adapter).expect("finite numbers only");
}

#[test]
fn the_state_has_unique_names_and_all_tensors() {
    let model = Model::open(&demo()).unwrap();
    let mut trainer = Trainer::new(&model, small()).unwrap();
    let adapter = trainer.lora().tensors().len();
    let listed = trainer.state().names();
    let unique: BTreeMap<_, _> = listed.iter().map(|n| (n, ())).collect();
    assert_eq!(unique.len(), listed.len(), "names are unique");
    let count = |group: &str| listed.iter().filter(|n| n.starts_with(group)).count();
    assert_eq!([count("adapter/"), count("adamw.m/"), count("adamw.v/")], [adapter; 3]);
    assert_eq!(count("adamw.steps."), model.config().n_layer);
}
