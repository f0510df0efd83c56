//! Dialogues: tokens that are never made twice, environments that fail, the same run whatever the clock says.

#[path = "common/program.rs"]
mod program;
#[path = "common/logs.rs"]
mod logs;

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::{Duration, Instant};

use bupo_gguf::data::{Problem, Prompt, Template};
use bupo_gguf::env::{Dialogue, EnvOptions, EnvPool, Task, task_seed};
use bupo_gguf::ggml::ThreadPool;
use bupo_gguf::llama::Products;
use bupo_gguf::model::{Lora, Model, Targets};
use bupo_gguf::rollout::{Answer, Encoder, RolloutOptions, Rollouts, Sampling};
use logs::timeless;
use program::{fail, json_lines, run, succeed, text};
use serde_json::{Value, json};

fn demo() -> Model {
    Model::open("demo".as_ref()).unwrap()
}

fn problem(i: usize) -> Problem {
    Problem {
        id: format!("p{i}"),
        prompt: Prompt::Text(format!("{}+{}=", 11 + i, 25 * i)),
        answer: format!("{}", 7 * i % 100),
        source: format!("t:{i}"),
        difficulty: None,
        solution_bytes: 0,
    }
}

fn tasks(n: usize) -> Vec<Task> {
    let task = |i| Task { problem: problem(i), seed: task_seed(1, i as u64), held_out: false };
    (0..n).map(task).collect()
}

fn options(env: &str) -> EnvOptions {
    EnvOptions {
        env: Some(env.into()),
        env_workers: 2,
        env_timeout: 20.0,
        max_turns: 3,
        // The demo model's answers have up to 12.
        max_turn_tokens: Some(14),
        ..EnvOptions::default()
    }
}

/// How a call is sampled.
struct How {
    sequences: usize,
    in_graph: bool,
    template: &'static str,
}

const PLAIN: How = How { sequences: 4, in_graph: false, template: "chat" };

/// Dialogues about `n` problems, `group` about each.
fn talk(
    env: &EnvOptions,
    n: usize,
    group: usize,
    how: &How,
) -> bupo_gguf::Result<Vec<Vec<Dialogue>>> {
    let model = demo();
    let pool = Arc::new(ThreadPool::new(1).unwrap());
    let encoder = Encoder::new(&model, None, None).unwrap();
    let encoder = encoder.with_template(&Template::parse(how.template)?)?;
    let mut environments = EnvPool::new(env)?;
    let mut session = environments.session(&encoder, tasks(n), group, "test")?;
    let requests = session.requests(200, 250, 0..)?;
    let options = RolloutOptions { n_ctx_seq: 450, kv_bytes: usize::MAX };
    let options = options.at_most(how.sequences, model.engine())?;
    let mut rollouts = Rollouts::new(model.engine(), &pool, options)?;
    // Last bits do not depend on who is decoded together.
    rollouts.keep_f32();
    rollouts.set_products(Products::Exact);
    if how.in_graph {
        rollouts.draw_in_graph();
    }
    // Away from what it learnt, so that dialogues differ.
    let mut lora = Lora::new(&model, &Targets::default(), 2, 4.0, 3)?;
    lora.tensors_mut().values_mut(1).iter_mut().for_each(|b| *b = 0.01);
    rollouts.set_adapter(Some(lora.live(&model)?))?;
    let stop = AtomicBool::new(false);
    let sampling = Sampling::default();
    let watch = &mut |_| Ok(());
    let segments = rollouts.converse(&requests, &sampling, 7, &stop, &mut session, watch)?;
    Ok(session.dialogues(segments).into_iter().map(|(_, group)| group).collect())
}

fn tokens(all: &[Vec<Dialogue>]) -> Vec<Vec<i32>> {
    let segments = all.iter().flatten().flat_map(|d| &d.segments);
    segments.map(|s| s.completion.tokens.clone()).collect()
}

/// An environment that answers each turn with "more" and a digit of the text's length; `pause` is a shell command before it.
fn echoing(folder: &Path, pause: &str) -> String {
    let script = format!(
        r#"while IFS= read -r line; do
line=${{line#*\"op\"}}; line="\"op\"$line" # the number of the question depends on who else asked
{pause}
case $line in
*'"op":"reset"'*) echo '{{"messages": [{{"role": "user", "content": "go"}}]}}' ;;
*'"op":"step"'*'"last":true'*) echo '{{"reward": 1, "done": true}}' ;;
*'"op":"step"'*) echo "{{\"messages\": [{{\"role\": \"user\", \"content\": \"more $((${{#line}} % 7))\"}}]}}" ;;
*) echo '{{}}' ;;
esac
done
"#
    );
    let path = folder.join(format!("echo-{}.sh", pause.len()));
    std::fs::write(&path, script).unwrap();
    format!("cmd:sh {}", path.display())
}

#[test]
fn decoded_text_is_what_the_template_writes_and_what_was_sampled_is_marked() {
    let dialogues = talk(&options("env:guess"), 3, 3, &PLAIN).unwrap();
    let model = demo();
    let vocab = model.engine().vocab();
    let mut turns = 0;
    for d in dialogues.iter().flatten() {
        // ChatML rewrites nothing.
        assert_eq!(d.segments.len(), 1);
        let s = &d.segments[0];
        assert_eq!(s.own.len(), s.completion.tokens.len());
        let mut all = s.prompt.clone();
        all.extend(&s.completion.tokens);
        let said = vocab.text(&all, true);
        let mut parts = said.split("<|im_start|>").skip(1);
        for m in &d.messages {
            let Some(part) = parts.next() else {
                // The last answer of the environment is not read any more.
                assert_eq!((m["role"].as_str(), d.messages.last()), (Some("user"), Some(m)));
                break;
            };
            let (role, content) = part.split_once('\n').unwrap();
            assert_eq!(role, m["role"].as_str().unwrap());
            let content = content.split("<|im_end|>").next().unwrap().trim();
            assert_eq!(content, m["content"].as_str().unwrap().trim(), "{said}");
        }
        assert_eq!(parts.next(), None, "{said}");
        // The tokens that count as sampled are the assistant's turns, ends included, and no others.
        let mut own = String::new();
        for (t, &is_own) in s.completion.tokens.iter().zip(&s.own) {
            if is_own {
                own += &vocab.text(&[*t], true);
            }
        }
        let wanted: Vec<&str> = said.split("<|im_start|>assistant\n").skip(1).collect();
        let wanted: String = wanted
            .iter()
            .map(|w| match w.split_once("<|im_end|>") {
                Some((turn, _)) => format!("{turn}<|im_end|>"),
                None => w.to_string(),
            })
            .collect();
        assert_eq!(own, wanted);
        assert!(s.completion.logprobs.iter().zip(&s.own).all(|(l, own)| *own == (*l != 0.0)));
        turns += d.turns.len();
    }
    assert!(turns > 9, "several turns in some of them: {turns}");
}

#[test]
fn one_sequence_or_many_waiting_or_not_the_same_dialogues() {
    let dir = tempfile::tempdir().unwrap();
    let env = echoing(dir.path(), ":");
    let with = |sequences, env_lag, in_graph| {
        let options = EnvOptions { env_lag: Some(env_lag), ..options(&env) };
        talk(&options, 4, 3, &How { sequences, in_graph, ..PLAIN }).unwrap()
    };
    let one = with(1, 0, false);
    assert!(one.iter().flatten().any(|d| d.turns.len() == 3));
    let lengths: std::collections::BTreeSet<_> =
        one.iter().flatten().map(|d| d.own_tokens()).collect();
    assert!(lengths.len() > 2, "dialogues of several lengths: {lengths:?}");
    for (sequences, lag, in_graph) in [(5, 0, false), (12, 3, false), (4, 7, false), (5, 2, true)] {
        let many = with(sequences, lag, in_graph);
        assert_eq!(tokens(&one), tokens(&many), "{sequences} sequences, lag {lag}");
        let messages = |all: &[Vec<Dialogue>]| -> Vec<Vec<Value>> {
            all.iter().flatten().map(|d| d.messages.clone()).collect()
        };
        assert_eq!(messages(&one), messages(&many));
    }
}

#[test]
fn how_long_an_environment_takes_changes_no_bit() {
    let dir = tempfile::tempdir().unwrap();
    let (fast, slow) =
        (echoing(dir.path(), ":"), echoing(dir.path(), "sleep 0.0$((${#line} % 5))"));
    let at = |env: &str, workers| {
        let options = EnvOptions { env_workers: workers, env_lag: Some(2), ..options(env) };
        talk(&options, 3, 3, &How { sequences: 6, ..PLAIN }).unwrap()
    };
    assert_eq!(at(&fast, 1), at(&slow, 5));
}

#[test]
fn a_template_that_rewrites_history_begins_a_new_segment() {
    let model = demo();
    let vocab = model.engine().vocab();
    let with = |source: &str| {
        let template = Template::Source { source: source.into(), enable_thinking: None };
        Encoder::new(&model, None, None).unwrap().with_template(&template).unwrap()
    };
    let chatml = |content: &str, role: &str| {
        format!(
            "{{%- for m in messages %}}{{% set c = m.content %}}{content}\
             {{{{ '<|im_start|>' + {role} + '\\n' + c + '<|im_end|>\\n' }}}}{{%- endfor %}}\
             {{%- if add_generation_prompt %}}{{{{ '<|im_start|>assistant\\n' }}}}{{%- endif %}}"
        )
    };
    let forgets = chatml(
        "{% if '</think>' in c %}{% set c = c.split('</think>')[-1] %}{% endif %}",
        "m.role",
    );
    let user = json!({"role": "user", "content": "go"});
    for (source, said, anew) in [
        (chatml("", "m.role"), "<think>a</think>b", false),
        (forgets.clone(), "<think>a</think>b", true),
        (forgets, "b", false),
        // Other blanks are no other words.
        (chatml("{% set c = c | trim %}", "m.role"), " b\n", false),
    ] {
        let encoder = with(&source);
        let (mut conversation, mut all) = encoder.open(std::slice::from_ref(&user), &[]).unwrap();
        for turn in 0..2 {
            let mut tokens = vocab.tokenize(said, false, true).unwrap();
            tokens.push(vocab.eos().unwrap());
            let read = json!({"role": "assistant", "content": said});
            let answer =
                encoder.go_on(&mut conversation, &tokens, read, vec![user.clone()]).unwrap();
            match answer {
                Answer::Append(more) => {
                    assert!(!anew, "{source} {said}");
                    all.extend(&tokens);
                    all.extend(&more);
                    let text = vocab.text(&more, true);
                    assert_eq!(text, "\n<|im_start|>user\ngo<|im_end|>\n<|im_start|>assistant\n");
                }
                Answer::Anew(prompt) => {
                    assert!(anew, "{source} {said}");
                    let said = vocab.text(&prompt, true);
                    assert!(!said.contains("think"), "{said}");
                    assert_eq!(
                        said.matches("<|im_start|>assistant\nb<|im_end|>").count(),
                        turn + 1
                    );
                    all = prompt;
                }
                Answer::Over => panic!("nobody said so"),
            }
        }
        assert_eq!(vocab.text(&all, true).matches("<|im_start|>").count(), 6);
    }
    // A role that the template passes over.
    let deaf = chatml("", "m.role")
        .replace(
            "{{ '<|im_start|>' + m.role",
            "{% if m.role != 'tool' %}{{ '<|im_start|>' + m.role",
        )
        .replace("<|im_end|>\\n' }}{%- endfor %}", "<|im_end|>\\n' }}{% endif %}{%- endfor %}");
    let encoder = with(&deaf);
    let (mut conversation, _) = encoder.open(&[user], &[]).unwrap();
    let tokens = vocab.tokenize("b", false, true).unwrap();
    let tool = json!({"role": "tool", "content": "x"});
    let error = encoder.go_on(
        &mut conversation,
        &tokens,
        json!({"role": "assistant", "content": "b"}),
        vec![tool],
    );
    let error = error.unwrap_err().to_string();
    assert!(error.contains("a role that the chat template writes, got \"tool\""), "{error}");
}

#[test]
fn dialogues_of_several_segments_are_sampled_from_their_own_prompts() {
    let dir = tempfile::tempdir().unwrap();
    // The model's turns are left out of later prompts: every turn begins a segment.
    let template = dir.path().join("forgets.jinja");
    let source = "{%- for m in messages %}{% if m.role != 'assistant' %}{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{% endif %}{%- endfor %}{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{%- endif %}";
    std::fs::write(&template, source).unwrap();
    let template: &'static str = text(&template).to_string().leak();
    let env = options(&echoing(dir.path(), ":"));
    let with = |sequences| talk(&env, 3, 4, &How { sequences, in_graph: false, template }).unwrap();
    let (one, many) = (with(1), with(5));
    assert_eq!(tokens(&one), tokens(&many));
    let model = demo();
    let mut several = 0;
    for d in one.iter().flatten() {
        assert_eq!(d.segments.len(), d.turns.len());
        several += (d.segments.len() == 3) as usize;
        for (i, s) in d.segments.iter().enumerate() {
            assert!(s.own.iter().all(|&own| own));
            let said = model.engine().vocab().text(&s.prompt, true);
            assert_eq!(said.matches("<|im_start|>user").count(), i + 1, "{said}");
        }
    }
    assert!(several > 0);
}

/// A program that runs `body` for each line, after `setup`.
fn program(folder: &Path, name: &str, body: &str) -> String {
    let script = format!(
        "while IFS= read -r line; do\nreset=; step=; close=\ncase $line in *'\"op\":\"reset\"'*) reset=1;; \
         *'\"op\":\"step\"'*) step=1;; *) close=1;; esac\n{body}\ndone\n"
    );
    let path = folder.join(name);
    std::fs::write(&path, script).unwrap();
    format!("cmd:sh {}", path.display())
}

const GOES: &str = r#"opening='{"messages": [{"role": "user", "content": "go"}]}'
if [ "$reset" ]; then echo "$opening"; elif [ "$close" ]; then echo '{}'; else
case $line in *'"last":true'*) echo '{"done": true, "reward": 1}';; *) echo "$opening";; esac; fi"#;

#[test]
fn a_program_that_dies_hangs_or_is_killed_is_started_anew_and_the_dialogue_goes_on() {
    let dir = tempfile::tempdir().unwrap();
    let sound = talk(&options(&program(dir.path(), "sound", GOES)), 2, 2, &PLAIN).unwrap();
    for (name, fault) in [
        ("dies", "exit 3"),
        ("is-killed", "kill -KILL $$"),
        ("hangs", "sleep 600"),
        ("closes", "exec >&-"),
    ] {
        // Once, at a step in the middle of the dialogues.
        let flag = dir.path().join(format!("{name}-once"));
        let body = format!(
            "case $line in *'\"turn\":2'*) if [ ! -e {f} ]; then touch {f}; {fault}; fi;; esac\n{GOES}",
            f = flag.display()
        );
        let env = EnvOptions {
            env_timeout: 1.5,
            env_workers: 1,
            ..options(&program(dir.path(), name, &body))
        };
        let all = talk(&env, 2, 2, &PLAIN).unwrap_or_else(|e| panic!("{name}: {e}"));
        assert!(flag.exists(), "{name} did not happen");
        assert_eq!(all, sound, "{name}");
    }
}

#[test]
fn a_program_that_cannot_answer_ends_the_run_in_one_line() {
    let dir = tempfile::tempdir().unwrap();
    let message = r#"{"role": "user", "content": "go"}"#;
    for (name, body, words) in [
        ("ends", "exit 3".to_string(), "it ended (exit status: 3), then it ended (exit status: 3)"),
        ("hangs", "sleep 600".into(), "no answer within 1.5 s, then no answer"),
        ("garbage", "echo hello".into(), "expected an answer to reset, a line of JSON such as"),
        ("words", "echo '{\"messages\": 3}'".into(), "`messages`: a list"),
        ("done-early", "echo '{\"done\": true}'".into(), "`done`: true before the first turn"),
        (
            "schema",
            format!("echo '{{\"messages\": [{message}], \"tools\": [{{\"name\": \"f\"}}]}}'"),
            "the tool \"f\" without a schema",
        ),
        (
            "unknown",
            format!("echo '{{\"messages\": [{message}], \"hint\": 1}}'"),
            "got the field \"hint\"",
        ),
        (
            "huge",
            "head -c 3000000 /dev/zero | tr '\\0' x; echo".into(),
            "a line of more than 1048576 bytes",
        ),
        ("twice", format!("{GOES}\n{GOES}"), "before it was asked"),
        (
            "restless",
            format!(
                "if [ \"$reset\" ]; then echo '{{\"messages\": [{{\"role\": \"user\", \"content\": \"'$$-$RANDOM$(date +%N)'\"}}]}}'; else\n{GOES}\nfi"
            ),
            "the same opening for every dialogue about a problem",
        ),
        (
            "silent-step",
            format!("if [ \"$step\" ]; then echo '{{}}'; else\n{GOES}\nfi"),
            "`messages` for the next turn, or `done`",
        ),
        (
            "bad-close",
            format!("if [ \"$close\" ]; then echo bye; else\n{GOES}\nfi"),
            "an answer to close",
        ),
    ] {
        let env = EnvOptions { env_timeout: 1.5, ..options(&program(dir.path(), name, &body)) };
        let start = Instant::now();
        let outcome = talk(&env, 3, 4, &How { sequences: 2, ..PLAIN });
        let error = outcome.err().unwrap_or_else(|| panic!("{name} went well")).to_string();
        assert!(error.contains(words) && !error.contains('\n'), "{name}: {error}");
        assert!(start.elapsed() < Duration::from_secs(60), "{name}");
    }
    // One that plays another game after a restart.
    let flag = dir.path().join("changed");
    let body = format!(
        "if [ -e {f} ]; then word=other; else word=go; fi\n\
         if [ \"$step\" ] && [ ! -e {f} ]; then touch {f}; exit 1; fi\n\
         if [ \"$reset\" ]; then echo '{{\"messages\": [{{\"role\": \"user\", \"content\": \"'$word'\"}}]}}'; else echo '{{\"done\": true}}'; fi",
        f = flag.display()
    );
    let env = EnvOptions { env_workers: 1, ..options(&program(dir.path(), "changes", &body)) };
    let error = talk(&env, 1, 1, &PLAIN).unwrap_err().to_string();
    assert!(error.contains("the answer that it gave before it was started anew"), "{error}");
}

#[test]
fn malformed_calls_are_told_to_the_model_and_not_to_the_environment() {
    // The demo model never calls: what it says here is put into its mouth by reading alone.
    let dir = tempfile::tempdir().unwrap();
    let log = dir.path().join("log");
    let body = format!("printf '%s\\n' \"$line\" >> {}\n{GOES}", log.display());
    talk(&options(&program(dir.path(), "logs", &body)), 1, 1, &PLAIN).unwrap();
    let lines = json_lines(&log);
    assert_eq!((lines[0]["op"].as_str(), lines[0]["protocol"].as_u64()), (Some("reset"), Some(1)));
    assert_eq!(lines[0]["problem"], json!({"id": "p0", "prompt": "11+0=", "answer": "0"}));
    let steps: Vec<&Value> = lines.iter().filter(|l| l["op"] == "step").collect();
    let numbers: Vec<_> = steps.iter().map(|s| s["turn"].as_u64().unwrap()).collect();
    assert_eq!(numbers, (1..=steps.len() as u64).collect::<Vec<_>>());
    assert_eq!(lines.last().unwrap()["op"], "close");
    assert!(lines.iter().enumerate().all(|(i, l)| l["id"].as_u64() == Some(i as u64 + 1)));
}

/// The arguments of a run with dialogues.
fn train(out: &Path, env: &str, more: &[&str]) -> Vec<String> {
    let flags = "train demo --steps 4 --internal-steps 2 --prompts-per-step 2 --group 3 --eval-problems 2 --rank 2 \
                 --kv-mib 16 --threads 1 --checkpoint-every 1 --max-turns 3 --max-turn-tokens 14 --env-workers 2";
    let mut args: Vec<String> = flags.split_whitespace().map(String::from).collect();
    for given in more.iter().filter(|word| word.starts_with("--")) {
        if let Some(at) = args.iter().position(|arg| arg == given) {
            args.drain(at..at + 2);
        }
    }
    args.extend(["--env", env, "--out", text(out)].map(String::from));
    args.extend(more.iter().map(|s| s.to_string()));
    args
}

fn words(args: &[String]) -> Vec<&str> {
    args.iter().map(String::as_str).collect()
}

/// What a run leaves, apart from what a clock says.
fn left(out: &Path) -> (Vec<u8>, Vec<u8>, String, Vec<Value>) {
    (
        std::fs::read(out.join("adapter.gguf")).unwrap(),
        std::fs::read(out.join("checkpoints/step-4/state.safetensors")).unwrap(),
        std::fs::read_to_string(out.join("completions.jsonl")).unwrap(),
        timeless(&out.join("metrics.jsonl")),
    )
}

#[test]
fn killed_and_resumed_a_run_of_dialogues_gives_the_same_bytes() {
    let dir = tempfile::tempdir().unwrap();
    let slow = echoing(dir.path(), "sleep 0.0$((${#line} % 3))");
    for (name, env) in [("guess", "env:guess".to_string()), ("slow", slow)] {
        let whole = dir.path().join(format!("{name}-whole"));
        succeed(&words(&train(&whole, &env, &[])));
        let cut: PathBuf = dir.path().join(format!("{name}-cut"));
        let mut child = std::process::Command::new(env!("CARGO_BIN_EXE_bupo-gguf"))
            .args(train(&cut, &env, &[]))
            .stdout(std::process::Stdio::null())
            .stderr(std::process::Stdio::null())
            .spawn()
            .unwrap();
        let start = Instant::now();
        while !cut.join("checkpoints/step-1").exists() && start.elapsed() < Duration::from_secs(300)
        {
            std::thread::sleep(Duration::from_millis(5));
        }
        child.kill().unwrap();
        child.wait().unwrap();
        succeed(&["train", "--resume", text(&cut)]);
        let (a, b) = (left(&whole), left(&cut));
        assert_eq!(a.3, b.3, "{name}: metrics");
        assert!(a.2 == b.2, "{name}: completions");
        assert!(a.1 == b.1 && a.0 == b.0, "{name}: tensors");
        let talk = &a.3[0];
        assert!(
            talk["turns"].as_f64().unwrap() > 1.0 && talk["segments"].as_f64() == Some(1.0),
            "{talk}"
        );
        let line: Value = serde_json::from_str(a.2.lines().next().unwrap()).unwrap();
        assert!(
            line["messages"].as_array().unwrap().len() > 1 && line["rewards"].is_array(),
            "{line}"
        );
    }
}

#[test]
#[cfg(unix)]
fn the_shell_example_plays_the_game_that_is_built_in() {
    let dir = tempfile::tempdir().unwrap();
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("examples/environments/guess.sh");
    let program = format!("cmd:sh {}", script.display());
    let [own, other] = ["env:guess", &program].map(|env| {
        let out = dir.path().join(if env == program { "program" } else { "own" });
        let same = ["--data", "task:guess", "--env-lag", "1", "--turn-credit", "to-go"];
        succeed(&words(&train(&out, env, &same)));
        let rewards: Vec<Value> = json_lines(&out.join("completions.jsonl"))
            .into_iter()
            .map(|line| line["rewards"].clone())
            .collect();
        (left(&out), rewards)
    });
    assert_eq!(own.1, other.1, "rewards");
    assert_eq!(own.0.3, other.0.3, "metrics");
    assert!(own.0.0 == other.0.0, "tensors");
}

#[test]
fn every_algorithm_learns_from_dialogues_and_turns_can_be_told_apart() {
    let dir = tempfile::tempdir().unwrap();
    for (i, more) in [
        "--algo ppo --steps 2",
        "--algo gspo --turn-credit to-go --turn-discount 0.9 --steps 2",
        "--algo dapo --resample 1 --steps 2",
        "--algo reinforce++ --turn-credit to-go --steps 2",
        "--algo grpo --kl-coef 0.01 --reward exact --steps 2",
    ]
    .iter()
    .enumerate()
    {
        let out = dir.path().join(i.to_string());
        let more: Vec<&str> = more.split_whitespace().collect();
        let mut args = train(&out, &echoing(dir.path(), ":"), &more);
        let at = args.iter().position(|arg| arg == "--internal-steps").unwrap();
        args.drain(at..at + 2);
        succeed(&words(&args));
        assert_eq!(json_lines(&out.join("metrics.jsonl")).len(), 2, "{more:?}");
    }
}

#[test]
fn the_command_line_says_what_is_wrong() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("run");
    let with =
        |env: &str, more: &[&str], said: &[&str]| fail(&words(&train(&out, env, more)), said);
    with(
        "env:chess",
        &[],
        &["environment 'env:chess' is not supported", "env:calculator, env:guess"],
    );
    with("env:guess", &["--algo", "sft"], &["--env"]);
    with("env:guess", &["--turn-discount", "1.5"], &["--turn-discount", "0 to 1"]);
    with("env:guess", &["--drop-long-prompts"], &["--drop-long-prompts"]);
    with("env:guess", &["--env-workers", "0"], &["--env-workers", "1 to 1024"]);
    with(
        "env:guess",
        &["--max-prompt", "8"],
        &["the opening of task:guess", "--max-prompt (8 tokens)"],
    );
    with("cmd:exit 3", &[], &["the environment program 'exit 3'", "exit status: 3"]);
    fail(
        &["train", "demo", "--max-turns", "3", "--out", text(&out)],
        &["--max-turns", "--env beside it"],
    );
    fail(&["eval", "demo", "--env", "cmd:cat"], &["--data", "problems for the program"]);
    let rows = dir.path().join("rows.jsonl");
    std::fs::write(&rows, "{\"prompt\": \"Guess.\", \"answer\": \"x\"}\n").unwrap();
    let guess = ["generate", "demo", "--env", "env:guess", "--data", text(&rows)];
    fail(&guess, &["rows.jsonl:1", "a whole number to guess, got \"x\""]);
    fail(&[&guess[..], &["--problem", "2"]].concat(), &["--problem: expected 1 to 1", "got 2"]);
    let out = run(&["generate", "demo"]);
    assert!(!out.status.success() && String::from_utf8_lossy(&out.stderr).contains("--prompt"));
    assert!(!dir.path().join("run").exists(), "nothing is written");
}

#[test]
fn eval_and_generate_talk_to_environments() {
    let dir = tempfile::tempdir().unwrap();
    let small = ["--threads", "1", "--max-turns", "2", "--max-turn-tokens", "14"];
    let out = dir.path().join("eval");
    let args = [
        "eval",
        "demo",
        "--env",
        "env:guess",
        "--problems",
        "3",
        "--samples",
        "2",
        "--json",
        "--out",
        text(&out),
    ];
    let report = program::json(&succeed(&[&args[..], &small].concat()));
    assert_eq!((report["problems"].as_u64(), report["samples"].as_u64()), (Some(3), Some(2)));
    assert!(report["turns"].as_f64().unwrap() >= 1.0, "{report}");
    let again = program::json(&succeed(&[&args[..], &small, &["--resume"]].concat()));
    assert_eq!(report, again);
    assert_eq!(json_lines(&out.join("completions.jsonl")).len(), 6);
    let args = [
        "generate",
        "demo",
        "--env",
        "env:calculator",
        "--data",
        "task:add",
        "--json",
        "--max-response",
        "60",
    ];
    let said = program::json(&succeed(&[&args[..], &small].concat()));
    let dialogue = &said["dialogues"][0];
    assert_eq!(dialogue["messages"][0]["role"], "user");
    assert!(dialogue["segments"][0]["sampled"].as_array().unwrap().len() >= 2, "{dialogue}");
    let args = ["generate", "demo", "--env", "env:guess"];
    let shown = succeed(&[&args[..], &small].concat());
    assert!(
        shown.starts_with("[user] Guess my number") && shown.contains("[assistant] "),
        "{shown}"
    );
    // Turns without a number cost a tenth each, and other guesses no more.
    let (turns, end) = shown.split_once("=== reward ").expect("the last line");
    let (reward, _) = end.split_once(", no success after").expect("not won");
    let reward: f32 = reward.parse().unwrap();
    let [all, wasted] =
        ["[assistant] ", "[user] I see no number"].map(|s| turns.matches(s).count());
    assert!(-0.1 * all as f32 - 1e-6 <= reward && reward <= 1e-6 - 0.1 * wasted as f32, "{shown}");
}
