//! Judges that are servers and models: what they are asked, what they say, what goes wrong.

#[path = "common/program.rs"]
mod program;

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use bupo_gguf::data::{Problem, Prompt};
use bupo_gguf::reward::{Attempt, JudgePool, Judgement, RewardOptions};
use program::{fail, json_lines, succeed, text};
use serde_json::{Value, json};

/// A server of one's own: (status, body) for the question with this number, its path and its JSON.
struct Server {
    port: u16,
    asked: Arc<AtomicUsize>,
}

fn serve(answer: impl Fn(usize, &Value) -> (u16, String) + Send + Sync + 'static) -> Server {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    let asked: Arc<AtomicUsize> = Arc::default();
    let (count, answer) = (asked.clone(), Arc::new(answer));
    std::thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            let (count, answer) = (count.clone(), answer.clone());
            std::thread::spawn(move || connection(stream, &count, answer.as_ref()));
        }
    });
    Server { port, asked }
}

fn connection(
    mut stream: TcpStream,
    count: &AtomicUsize,
    answer: &dyn Fn(usize, &Value) -> (u16, String),
) -> Option<()> {
    let mut reader = BufReader::new(stream.try_clone().ok()?);
    loop {
        let mut length = 0;
        loop {
            let mut line = String::new();
            if reader.read_line(&mut line).ok()? == 0 {
                return None;
            }
            if line.trim().is_empty() {
                break;
            }
            if let Some(n) = line.to_lowercase().strip_prefix("content-length:") {
                length = n.trim().parse().ok()?;
            }
        }
        let mut body = vec![0; length];
        reader.read_exact(&mut body).ok()?;
        let question = serde_json::from_slice(&body).ok()?;
        let (status, said) = answer(count.fetch_add(1, Ordering::SeqCst), &question);
        if status == 0 {
            return None; // hangs up
        }
        let head = format!("HTTP/1.1 {status} X\r\ncontent-length: {}\r\n\r\n", said.len());
        stream.write_all(head.as_bytes()).ok()?;
        stream.write_all(said.as_bytes()).ok()?;
    }
}

impl Server {
    fn url(&self, path: &str) -> String {
        format!("http://127.0.0.1:{}{path}", self.port)
    }
}

fn problem() -> Problem {
    Problem {
        id: "p".into(),
        prompt: Prompt::Text("17+25=".into()),
        answer: "42".into(),
        source: "t:1".into(),
        difficulty: None,
        solution_bytes: 0,
    }
}

fn options(reward: &str) -> RewardOptions {
    RewardOptions {
        reward: Some(reward.into()),
        reward_timeout: 2.0,
        judge_retries: 2,
        ..RewardOptions::default()
    }
}

fn judge(options: &RewardOptions, texts: &[&str]) -> bupo_gguf::Result<Vec<Judgement>> {
    let problem = problem();
    let attempt =
        |text| Attempt { problem: &problem, text, opening: "", tokens: 3, truncated: false };
    let attempts: Vec<Attempt<'_>> = texts.iter().map(|text| attempt(text)).collect();
    options.judge("task:add", 100)?.score_all(&attempts)
}

#[test]
fn a_chat_endpoint_scores_by_the_rubric() {
    let server = serve(|_, question| {
        assert_eq!(question["temperature"], 0);
        let asked = question["messages"][0]["content"].as_str().unwrap();
        let score = if asked.contains("|forty-two|") { 9 } else { 2 };
        assert!(asked.starts_with("17+25=|42|"), "{asked}");
        (
            200,
            json!({"choices": [{"message": {"content": format!("Well.\nScore: {score}")}}]})
                .to_string(),
        )
    });
    let mut options = options(&format!("{} + 0.5*exact", server.url("/v1/chat/completions")));
    options.judge_rubric = Some("{prompt}|{answer}|{completion}|".into());
    let judged = judge(&options, &["forty-two", "42"]).unwrap();
    let rewards: Vec<_> = judged.iter().map(|j| j.parts.clone()).collect();
    assert_eq!(rewards, [vec![0.9, 0.0], vec![0.2, 1.0]]);
    assert_eq!(judged[1].reward, 0.2 + 0.5);
    assert!(judged[0].reason.contains("9 of 10: Score: 9"), "{}", judged[0].reason);
}

#[test]
fn any_other_endpoint_gets_several_at_once_and_nothing_twice() {
    let server = serve(|_, question| {
        let attempts = question["attempts"].as_array().unwrap();
        assert_eq!(
            (attempts[0]["problem"].as_str(), attempts[0]["answer"].as_str()),
            (Some("p"), Some("42"))
        );
        let reward = |a: &Value| a["completion"].as_str().unwrap().len() as f64;
        let rewards: Vec<f64> = attempts.iter().map(reward).collect();
        let reasons: Vec<String> = rewards.iter().map(|r| format!("{r} bytes")).collect();
        (200, json!({"rewards": rewards, "reasons": reasons}).to_string())
    });
    let mut options = options(&server.url("/score"));
    options.judge_batch = 4;
    let judge = options.judge("task:add", 100).unwrap();
    let mut pool = JudgePool::new(judge, 1).unwrap();
    let texts: Vec<_> = (0..10).map(|i| (problem(), "x".repeat(i % 5), 1, false)).collect();
    let first = pool.judge_all(texts.clone()).unwrap();
    let rewards: Vec<f32> = first.iter().map(|j| j.reward).collect();
    assert_eq!(rewards, [0.0, 1.0, 2.0, 3.0, 4.0, 0.0, 1.0, 2.0, 3.0, 4.0]);
    assert_eq!(first[3].reason, "3 bytes");
    let asked = server.asked.load(Ordering::SeqCst);
    assert!((2..=6).contains(&asked), "five texts by fours, or as they came: {asked}");
    assert_eq!(pool.judge_all(texts).unwrap(), first);
    assert_eq!(server.asked.load(Ordering::SeqCst), asked, "remembered");
}

#[test]
fn what_fails_is_asked_again_and_what_is_wrong_is_said() {
    let good = json!({"rewards": [1.0]}).to_string();
    for fault in [500, 503, 429, 0] {
        let good = good.clone();
        let server =
            serve(move |n, _| if n < 2 { (fault, "busy".into()) } else { (200, good.clone()) });
        let judged = judge(&options(&server.url("/score")), &["a"])
            .unwrap_or_else(|e| panic!("{fault}: {e}"));
        assert_eq!((judged[0].reward, server.asked.load(Ordering::SeqCst)), (1.0, 3), "{fault}");
    }
    for (status, said, words) in [
        (503, "busy", "status 503 Service Unavailable, \"busy\" (asked 3 times)"),
        (404, "what?", "an answer with status 200, got 404 Not Found, \"what?\""),
        (200, "hello", "expected JSON, got \"hello\""),
        (200, "{}", "`rewards`, a list of 1"),
        (200, r#"{"rewards": [1, 2]}"#, "`rewards`, a list of 1"),
        (200, r#"{"rewards": ["1"]}"#, "`rewards[0]`: a finite number"),
        (200, r#"{"rewards": [1e39]}"#, "`rewards[0]`: a finite number"),
    ] {
        let server = serve(move |_, _| (status, said.into()));
        let error = judge(&options(&server.url("/score")), &["a"]).unwrap_err().to_string();
        assert!(error.contains(words) && !error.contains('\n'), "{status} {said}: {error}");
    }
    let server =
        serve(|_, _| (200, json!({"choices": [{"message": {"content": "fine"}}]}).to_string()));
    let error = judge(&options(&server.url("/chat/completions")), &["a"]).unwrap_err().to_string();
    assert!(error.contains("a score from 0 to 10") && error.contains("\"fine\""), "{error}");
    // One that never answers, and one that is not there.
    let server = serve(|_, _| {
        std::thread::sleep(Duration::from_secs(60));
        (200, String::new())
    });
    let start = Instant::now();
    let hung =
        RewardOptions { reward_timeout: 0.3, judge_retries: 1, ..options(&server.url("/score")) };
    let error = judge(&hung, &["a"]).unwrap_err().to_string();
    assert!(
        error.contains("(asked 2 times)") && start.elapsed() < Duration::from_secs(20),
        "{error}"
    );
    let free = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let gone =
        RewardOptions { judge_retries: 0, ..options(&format!("http://127.0.0.1:{free}/score")) };
    let error = judge(&gone, &["a"]).unwrap_err().to_string();
    assert!(error.contains("see whether the server runs"), "{error}");
    let error =
        judge(&RewardOptions { judge_rubric: Some("good?".into()), ..gone }, &["a"]).unwrap_err();
    assert!(
        error.to_string().contains("--judge-rubric: expected a text with {completion}"),
        "{error}"
    );
}

#[test]
fn a_run_is_judged_by_a_server_and_by_a_model() {
    let server = serve(|_, question| {
        let attempts = question["attempts"].as_array().unwrap();
        let reward = |a: &Value| a["completion"].as_str().unwrap().contains('1') as u8 as f64;
        (200, json!({"rewards": attempts.iter().map(reward).collect::<Vec<_>>()}).to_string())
    });
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("run");
    let small = "--steps 2 --internal-steps 1 --prompts-per-step 2 --group 4 --eval-problems 2 --rank 2 --kv-mib 16 --threads 1";
    let url = server.url("/score");
    let mut args = vec!["train", "demo", "--reward", &url, "--out", text(&out)];
    args.extend(small.split_whitespace());
    succeed(&args);
    for sample in json_lines(&out.join("completions.jsonl")) {
        let has = sample["completion"].as_str().unwrap().contains('1');
        assert_eq!(sample["reward"].as_f64(), Some(has as u8 as f64), "{sample}");
    }
    assert!(server.asked.load(Ordering::SeqCst) > 0);
    // The demo model as a judge answers with a sum in a box: asked for one below ten, that is a score.
    let out = dir.path().join("judged");
    let rubric = "1+{answer}=";
    let mut args = vec![
        "train",
        "demo",
        "--reward",
        "judge:demo",
        "--judge-rubric",
        rubric,
        "--out",
        text(&out),
    ];
    args.extend(small.split_whitespace());
    fail(&args, &["--judge-rubric: expected a text with {completion}"]);
    fail(&["train", "demo", "--reward", "judge:none.gguf", "--out", text(&out)], &["none.gguf"]);
    let options = RewardOptions {
        judge_rubric: Some("1+{answer}={completion}".into()),
        ..options("judge:demo")
    };
    let answer = Problem { answer: "2".into(), ..problem() };
    let attempt = Attempt { problem: &answer, text: "", opening: "", tokens: 1, truncated: false };
    let judged = options.judge("task:add", 100).unwrap().score_all(&[attempt; 3]).unwrap();
    assert!(
        judged.iter().all(|j| j == &judged[0] && (0.0..=1.0).contains(&j.reward)),
        "{judged:?}"
    );
    assert!(judged[0].reason.contains("of 10"), "{}", judged[0].reason);
}
