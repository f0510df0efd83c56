//! The pages of `entropy` and `report`, opened in a headless Chromium: no word on the console, every figure
//! drawn, tooltips that appear under the mouse, wide and narrow, light and dark.
//!
//! Without a browser the tests say that they did not look, and pass, unless BUPO_REQUIRE_BROWSER is set.
//! BUPO_SCREENSHOTS=DIR keeps what they saw.

mod common;
#[path = "common/program.rs"]
mod program;
#[path = "common/browser.rs"]
mod browser;

use std::path::{Path, PathBuf};

use browser::Browser;
use program::succeed;
use serde_json::{Value, json};

/// What the page says of itself once every chart is drawn.
const FIGURES: &str = "(async () => { await window.report; \
    return [...document.querySelectorAll('.chart')].map(c => ({ id: c.id, \
    drawn: c.querySelectorAll('.scatterlayer .trace, .heatmaplayer image').length, \
    width: c.getBoundingClientRect().width, heat: !!c.closest('.heat'), \
    plot: c.querySelector('.main-svg').getBoundingClientRect().width, ticks: c.querySelectorAll('.xtick text').length })); })()";

/// Opens the page in every shape and looks at it; `expected`: ids of charts in order.
fn look(browser: &mut Browser, page: &Path, name: &str, expected: &[String]) {
    for (shape, width, height) in [("wide", 1400, 1000), ("narrow", 400, 860)] {
        for scheme in ["light", "dark"] {
            let what = format!("{name} {shape} {scheme}");
            browser.shape(width, height, scheme);
            browser.open(page);
            let figures = browser.value(FIGURES);
            let figures = figures.as_array().unwrap();
            let ids: Vec<&str> = figures.iter().map(|f| f["id"].as_str().unwrap()).collect();
            assert_eq!(ids, expected, "{what}");
            for figure in figures {
                assert!(figure["drawn"].as_u64().unwrap() > 0, "{what}: {figure} is not drawn");
                let (plot, room) = (figure["plot"].as_f64(), figure["width"].as_f64());
                assert!(figure["heat"] == true || plot <= room, "{what}: {figure} is cut off");
                assert!(figure["ticks"].as_u64().unwrap() > 0, "{what}: {figure} has no ticks");
            }
            let overflow = "document.documentElement.scrollWidth - window.innerWidth";
            assert!(
                browser.value(overflow).as_f64().unwrap() <= 0.0,
                "{what}: wider than the window"
            );
            // Text stands out from what is behind it, in charts too.
            let contrast = browser.value(
                "(() => { const light = c => c.match(/\\d+/g).slice(0, 3).reduce((a, x) => a + +x, 0) / 3; \
                 const page = getComputedStyle(document.body), tick = document.querySelector('.xtick text'); \
                 const behind = light(page.backgroundColor); \
                 return Math.min(Math.abs(light(page.color) - behind), Math.abs(light(getComputedStyle(tick).fill) - behind)); })()",
            );
            assert!(contrast.as_f64().unwrap() > 120.0, "{what}: text is hard to read: {contrast}");
            for id in &ids {
                hover(browser, id, &what);
            }
            browser.screenshot(&format!("{name}-{shape}-{scheme}"));
            assert_eq!(browser.complaints(), Vec::<String>::new(), "{what}");
        }
    }
}

/// Moves the mouse over a chart's plane and wants a tooltip with a number in it.
fn hover(browser: &mut Browser, id: &str, what: &str) {
    let place = browser.value(&format!(
        "(() => {{ const c = document.getElementById('{id}'); c.scrollIntoView({{block: 'center'}}); \
         const p = c.querySelector('.nsewdrag').getBoundingClientRect(); \
         const l = c.closest('.scroll').getBoundingClientRect(); \
         return [Math.max(p.left, l.left) + Math.min(p.width, l.right - p.left) * 0.51, p.top + p.height * 0.45]; }})()"
    ));
    let (x, y) = (place[0].as_f64().unwrap(), place[1].as_f64().unwrap());
    let text = format!(
        "[...document.querySelectorAll('#{id} .hoverlayer text')].map(t => t.textContent).join('|')"
    );
    for attempt in 0..40 {
        browser.mouse(x + (attempt % 5) as f64, y + (attempt % 3) as f64);
        let shown = browser.value(&text);
        let shown = shown.as_str().unwrap();
        if shown.chars().any(|c| c.is_ascii_digit()) {
            return;
        }
        std::thread::sleep(std::time::Duration::from_millis(50));
    }
    panic!("{what}: no tooltip over {id}");
}

fn svgs(folder: &Path) -> Vec<String> {
    let files = std::fs::read_dir(folder.join("figures")).unwrap();
    let mut ids = Vec::new();
    for file in files {
        let path = file.unwrap().path();
        let text = std::fs::read_to_string(&path).unwrap();
        assert!(text.starts_with("<svg") && text.trim_end().ends_with("</svg>"), "{path:?}");
        let shapes = ["<polyline", "<rect", "<circle", "<line"];
        assert!(shapes.iter().map(|s| text.matches(s).count()).sum::<usize>() > 5, "{path:?}");
        assert!(text.matches("<text").count() > 3, "{path:?} has no words");
        ids.push(path.file_stem().unwrap().to_str().unwrap().to_string());
    }
    ids.sort();
    ids
}

/// The ids of the charts in a page's HTML, without a browser.
fn charts(page: &Path) -> Vec<String> {
    let html = std::fs::read_to_string(page).unwrap();
    let after = html.split("class=\"chart\" id=\"").skip(1);
    after.map(|rest| rest.split('"').next().unwrap().to_string()).collect()
}

fn check(folder: &Path, name: &str, wanted: &[&str]) {
    let page = folder.join("report.html");
    let bytes = std::fs::metadata(&page).unwrap().len();
    assert!(bytes < 1_500_000, "a page of {bytes} bytes");
    let ids = charts(&page);
    for id in wanted {
        assert!(ids.iter().any(|i| i == id), "{id} is not in {ids:?}");
    }
    let mut sorted = ids.clone();
    sorted.sort();
    assert_eq!(svgs(folder), sorted, "an SVG for every figure");
    if let Some(mut browser) = Browser::start() {
        look(&mut browser, &page, name, &ids);
    }
}

#[test]
fn the_page_of_a_dump() {
    let dir = tempfile::tempdir().unwrap();
    // A real model where others' models are there, else the small one inside the program.
    let model: PathBuf = match common::shared() {
        Some(shared) => shared.join("models/stories260K-f32.gguf"),
        None => "demo".into(),
    };
    let rows = [
        json!({"prompt": "1+2=", "completion": "3 and then </script><b>& they \"went\" home\n"}),
        json!({"prompt": "Once upon a time", "completion": ", there was a little girl named Lily. She loved to play outside in the park."}),
    ];
    let data = dir.path().join("rows.jsonl");
    std::fs::write(&data, rows.map(|r| r.to_string()).join("\n")).unwrap();
    let text = |p: &Path| p.to_str().unwrap().to_string();
    let (model, data) = (text(&model), text(&data));
    let one = dir.path().join("one");
    succeed(&["entropy", &model, "--data", &data, "--out", &text(&one)]);
    let wanted =
        ["entropy-flow", "entropy-change", "cosines", "divergence", "agreement", "lens-divergence"];
    check(&one, "dump", &wanted);
    look_at_grid(&one.join("report.html"), &["layer_out"], 1);
    let two = dir.path().join("two");
    succeed(&["entropy", &model, "--data", &data, "--out", &text(&two), "--compare", &model]);
    look_at_grid(&two.join("report.html"), &["layer_out"], 3);
    let ids = charts(&two.join("report.html"));
    assert!(ids.iter().any(|id| id == "difference-entropy"), "{ids:?}");
    assert_eq!(svgs(&two).len(), ids.len());
}

/// Every choice of the grid gives coloured cells with texts; a cell that is pointed at says what it holds.
fn look_at_grid(page: &Path, taps: &[&str], models: usize) {
    let Some(mut browser) = Browser::start() else { return };
    browser.shape(400, 860, "dark");
    browser.open(page);
    let choose = |name: &str, value: &str| {
        format!(
            "(() => {{ const s = document.querySelector('.grid [name={name}]'); s.value = '{value}'; \
             s.dispatchEvent(new Event('input')); }})()"
        )
    };
    let painted = "[...document.querySelectorAll('.grid td')].filter(c => c.style.background && c.textContent).length";
    for completion in ["0", "1"] {
        browser.value(&choose("completion", completion));
        for tap in taps {
            browser.value(&choose("tap", tap));
            for figure in ["0", "1", "2", "3"] {
                browser.value(&choose("figure", figure));
                for model in &["0", "1", "difference"][..models] {
                    browser.value(&choose("model", model));
                    let n = browser.value(painted).as_u64().unwrap();
                    assert!(n > 10, "{n} cells of {completion} {tap} {figure} {model}");
                }
                for lens in ["other", "difference", "own"] {
                    browser.value(&choose("lens", lens));
                    let n = browser.value(painted).as_u64().unwrap();
                    assert!(n > 10, "{n} cells of {completion} {tap} {figure}, lens {lens}");
                }
            }
        }
    }
    let said = "(() => { document.querySelector('.grid td').click(); return document.querySelector('.grid .cell').textContent; })()";
    let said = browser.value(said);
    let said = said.as_str().unwrap();
    assert!(
        said.contains("final policy") && said.contains("entropy") && said.contains("taken: rank"),
        "{said}"
    );
    let overflow = "document.documentElement.scrollWidth - window.innerWidth";
    assert!(browser.value(overflow).as_f64().unwrap() <= 0.0, "wider than a phone");
    browser.screenshot("grid");
    assert_eq!(browser.complaints(), Vec::<String>::new());
}

#[test]
fn the_page_of_a_run() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("run");
    let out_text = out.to_str().unwrap();
    succeed(&[
        "train",
        "demo",
        "--out",
        out_text,
        "--steps",
        "4",
        "--prompts-per-step",
        "4",
        "--group",
        "4",
        "--eval-problems",
        "8",
        "--rank",
        "4",
        "--internal-steps",
        "2",
        "--internal-layer",
        "auto",
        "--entropy-every",
        "1",
        "--eval-every",
        "2",
    ]);
    let metrics = std::fs::read_to_string(out.join("metrics.jsonl")).unwrap();
    for line in metrics.lines() {
        let step: Value = serde_json::from_str(line).unwrap();
        let probe = &step["probe"];
        let layer = probe["layer"].as_u64().unwrap() as usize;
        assert_eq!(probe["layer_out"].as_array().unwrap().len(), 8);
        assert_eq!(probe["cos_later"].as_array().unwrap().len(), 8 - layer);
        let kl = common::floats(&probe["kl_later"]);
        assert_eq!(kl.len(), 9 - layer);
        // The last of them is the divergence from the final policy, measured in another pass.
        let expected = probe["kl_to_final"][layer - 1].as_f64().unwrap() as f32;
        let last = kl[kl.len() - 1];
        assert!((last - expected).abs() < 1e-4 * expected.abs().max(1e-3), "{last} {expected}");
    }
    let config: toml::Table =
        std::fs::read_to_string(out.join("config.toml")).unwrap().parse().unwrap();
    let chosen = config["train"]["internal-layer"].as_integer().unwrap();
    assert!((1..8).contains(&chosen));
    let why = config["train"]["internal-layer-why"].as_str().unwrap();
    assert!(why.starts_with("auto: ") && why.contains(&format!("layer {chosen}")), "{why}");
    succeed(&["report", out_text]);
    let wanted =
        ["reward", "length", "entropy", "clip", "drift", "gradient", "probe-layers", "probe-kl"];
    check(&out, "run", &wanted);
    let summary = std::fs::read_to_string(out.join("summary.json")).unwrap();
    let summary: Value = serde_json::from_str(&summary).unwrap();
    let [before, after] =
        ["accuracy_before", "accuracy_after"].map(|key| summary[key].as_f64().unwrap());
    let html = std::fs::read_to_string(out.join("report.html")).unwrap();
    let tile = format!("{before:.3} \u{2192} {after:.3}");
    assert!(
        html.contains("held-out accuracy") && html.contains(&tile),
        "{tile} is not in the page"
    );
    let rows = completions(&html);
    let last = rows.iter().filter(|row| row["step"] == 4).count();
    assert!((4..=8).contains(&last), "of four problems one or two each, not {last}");
    assert!(
        rows[0]["step"] == 4 && rows[0]["prompt"].as_str().unwrap().contains('+'),
        "{}",
        rows[0]
    );
    // The entropy of an inner layer's policy and of the model's are not one figure.
    for phase in [format!("entropy, nats (layer {chosen})"), "entropy, nats (final policy)".into()]
    {
        assert!(html.contains(&phase), "{phase} is not in the page");
    }
    if let Some(mut browser) = Browser::start() {
        browser.shape(1400, 1000, "light");
        browser.open(&out.join("report.html"));
        let traces = "(async () => { await window.report; return document.querySelectorAll('#reward .scatterlayer .trace').length; })()";
        let raw = browser.value(traces).as_u64().unwrap();
        browser.value("(() => { const s = document.getElementById('smoothing'); s.value = 0.9; s.dispatchEvent(new Event('input')); })()");
        std::thread::sleep(std::time::Duration::from_millis(500));
        assert_eq!(
            browser.value(traces).as_u64().unwrap(),
            2 * raw,
            "smoothed curves over the raw ones"
        );
        let listed = "[...document.querySelectorAll('.completions tbody tr')].map(r => [...r.cells].map(c => c.textContent))";
        assert_eq!(browser.value(listed).as_array().unwrap().len(), rows.len());
        browser.value("(() => { const s = document.querySelector('.completions [name=step]'); s.value = '4'; s.dispatchEvent(new Event('input')); document.querySelector('th[data-key=reward]').click(); })()");
        let shown = browser.value(listed);
        let rewards: Vec<f64> = shown
            .as_array()
            .unwrap()
            .iter()
            .map(|r| r[1].as_str().unwrap().parse().unwrap())
            .collect();
        assert_eq!(rewards.len(), last);
        assert!(rewards.windows(2).all(|pair| pair[0] >= pair[1]), "{rewards:?}");
        assert_eq!(browser.complaints(), Vec::<String>::new());
    }
}

/// The completions in a page.
fn completions(html: &str) -> Vec<Value> {
    let table = html.split("class=\"wide completions\"").nth(1).expect("a table of completions");
    let json = table.split("<script type=\"application/json\">").nth(1).unwrap();
    serde_json::from_str(json.split("</script>").next().unwrap()).unwrap()
}

const QUICK: &str = "--prompts-per-step 2 --group 4 --eval-problems 4 --rank 2 --threads 1";

fn train(out: &Path, more: &str) -> Vec<String> {
    let words = format!("train demo {QUICK} {more}");
    let mut words: Vec<String> = words.split_whitespace().map(String::from).collect();
    words.extend(["--out".into(), out.to_str().unwrap().into()]);
    words
}

#[test]
fn a_page_that_compares_runs() {
    let dir = tempfile::tempdir().unwrap();
    for (name, words) in [
        ("a", "--steps 3 --algo bupo --internal-steps 1"),
        ("b", "--steps 2 --algo grpo --lr 5e-4"),
    ] {
        let words = train(&dir.path().join(name), words);
        succeed(&words.iter().map(String::as_str).collect::<Vec<_>>());
    }
    let text = |name: &str| dir.path().join(name).to_str().unwrap().to_string();
    succeed(&["report", &text("a"), &text("b"), "--out", &text("both")]);
    check(
        &dir.path().join("both"),
        "compared",
        &["reward-reward", "reward-accuracy", "entropy", "lr"],
    );
    let html = std::fs::read_to_string(dir.path().join("both/report.html")).unwrap();
    for cell in
        ["<td>algo</td><td>bupo</td><td>grpo</td>", "<td>lr</td><td>0.001</td><td>0.0005</td>"]
    {
        assert!(html.contains(cell), "{cell} is not in the page");
    }
    assert!(!html.contains("<td>rank</td>"), "what is the same is left out");
    program::fail(&["report", &text("a"), &text("b")], &["--out DIR beside several runs"]);
}

/// A run that is served while it goes on; it ends with this.
struct Served(std::process::Child);

impl Drop for Served {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// The answer to a request for `path` by the name `host`; empty where nobody listens yet, what came of it where the
/// connection broke.
fn get(port: u16, host: &str, path: &str) -> String {
    use std::io::{Read, Write};
    let Ok(mut stream) = std::net::TcpStream::connect(("127.0.0.1", port)) else {
        return String::new();
    };
    let request = format!("GET {path} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n");
    let mut answer = Vec::new();
    let asked = stream.write_all(request.as_bytes());
    let _ = asked.and_then(|()| stream.read_to_end(&mut answer));
    String::from_utf8_lossy(&answer).into()
}

#[test]
fn the_live_page_of_a_run() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("run");
    let port = std::net::TcpListener::bind(("127.0.0.1", 0)).unwrap().local_addr().unwrap().port();
    let words = train(
        &out,
        &format!("--algo grpo --steps 100000 --quiet --checkpoint-every 0 --serve {port}"),
    );
    let child = std::process::Command::new(env!("CARGO_BIN_EXE_bupo-gguf"))
        .args(&words)
        .stdout(std::process::Stdio::null())
        .stderr(std::process::Stdio::null())
        .spawn()
        .unwrap();
    let _served = Served(child);
    let (local, mut parts) = (format!("127.0.0.1:{port}"), String::new());
    for _ in 0..600 {
        parts = get(port, &local, "/parts");
        if parts.contains("id=\"reward\"") {
            break;
        }
        std::thread::sleep(std::time::Duration::from_millis(100));
    }
    assert!(parts.starts_with("HTTP/1.1 200") && parts.contains("id=\"reward\""), "{parts:.300}");
    assert!(get(port, &local, "/events").contains("data: "));
    assert!(get(port, &local, "/config.toml").starts_with("HTTP/1.1 404"));
    assert!(get(port, "evil.example", "/").starts_with("HTTP/1.1 403"));
    let Some(mut browser) = Browser::start() else { return };
    browser.shape(1200, 900, "light");
    browser.open_url(&format!("http://{local}/"));
    let points = "(async () => { await window.report; return document.getElementById('reward').data[0].x.length; })()";
    let first = browser.value(points).as_u64().unwrap();
    let mut renewed = 0;
    for _ in 0..300 {
        renewed =
            browser.value("+(document.documentElement.dataset.renewed || 0)").as_u64().unwrap();
        if renewed >= 2 {
            break;
        }
        std::thread::sleep(std::time::Duration::from_millis(100));
    }
    assert!(renewed >= 2, "renewed {renewed} times");
    assert!(browser.value(points).as_u64().unwrap() > first, "no new step");
    browser.screenshot("live");
    assert_eq!(browser.complaints(), Vec::<String>::new());
}
