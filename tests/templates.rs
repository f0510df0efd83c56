//! Chat templates render as Hugging Face's do: `tests/fixtures/templates/*.json` hold what transformers wrote
//! (`tools/make_template_fixtures.py`).

use std::path::Path;

use bupo_gguf::data::{ChatTemplate, Message};
use serde_json::Value;

/// 2024-07-26 15:04:05, as in the fixtures.
const NOW: i64 = 1_722_006_245;

/// What is not as there, with the reason; `src/data/jinja/mod.rs` lists them.
const DEPARTURES: [&str; 13] = [
    "{{ 'abc'.encode() }}",
    "{{ messages[0]|attr('role') }}",
    "{{ 'aaa bbb ccc ddd'|wordwrap(7) }}",
    "{{ 'see http://a.b/c and x'|urlize }}",
    "{{ {'class': 'x', 'id': none}|xmlattr }}",
    "{{ range(3) is sequence }}",
    "{{ range(3) }}",
    "{{ lipsum is defined }}",
    "{{ '\\N{SNOWMAN}' }}",
    "{% macro f() %}{{ varargs }}{{ kwargs }}{% endmacro %}{{ f(1, x=2) }}",
    "{% macro f(a) %}{{ f.name }}{{ f.arguments }}{% endmacro %}{{ f(1) }}",
    "{{ loop is defined }}{{ self is defined }}",
    "{% set c = cycler('a', 'b') %}{% for m in messages %}{{ c.next() }}{{ c.current }}{% endfor %}{% set _ = c.reset() %}{{ c.current }}",
];

fn fixture(name: &str) -> Vec<Value> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/templates").join(name);
    serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap()
}

fn message(role: &str, content: &str) -> Message {
    Message { role: role.into(), content: content.into() }
}

fn render(source: &str, messages: &[Message], case: &Value) -> Result<String, String> {
    let template = ChatTemplate::new(source, "<bos>", "<eos>").map_err(|e| e.to_string())?;
    let template = template.with_thinking(case["enable_thinking"].as_bool());
    template.set_now(NOW);
    template.render(messages, case["generation"] != false).map_err(|e| e.to_string())
}

/// The cases whose text, or refusal, is another; and how many there are.
fn differing(cases: &[Value], render: impl Fn(&Value) -> Result<String, String>) -> Vec<String> {
    let differs = |case: &&Value| match case["text"].as_str() {
        Some(text) => render(case).as_deref() != Ok(text),
        None => render(case).is_ok(),
    };
    let shown = |case: &Value| format!("{case}\n  got {:?}", render(case));
    cases.iter().filter(differs).map(shown).collect()
}

#[test]
fn every_method_filter_test_and_operator() {
    let messages = [
        message("user", "a"),
        message("assistant", "<think>\nhm\n</think>\n\nb"),
        message("user", "c <b> & ü \"q\" it's"),
    ];
    let cases = fixture("expressions.json");
    assert!(cases.len() > 700, "{}", cases.len());
    let source = |case: &Value| case["template"].as_str().unwrap().to_owned();
    let (departures, cases): (Vec<_>, Vec<_>) =
        cases.into_iter().partition(|case| DEPARTURES.contains(&&*source(case)));
    let differ = |cases: &[Value]| differing(cases, |case| render(&source(case), &messages, case));
    let wrong = differ(&cases);
    assert!(wrong.is_empty(), "{} differ:\n{}", wrong.len(), wrong.join("\n"));
    assert_eq!(differ(&departures).len(), DEPARTURES.len(), "a departure is none any more");
}

#[test]
fn families_of_models() {
    let families = fixture("families.json");
    assert!(families.len() >= 20);
    for family in &families {
        let wrong = differing(family["cases"].as_array().unwrap(), |case| {
            let turns = case["turns"].as_array().unwrap();
            let turn = |turn: &Value| message(turn[0].as_str().unwrap(), turn[1].as_str().unwrap());
            let messages: Vec<_> = turns.iter().map(turn).collect();
            render(family["template"].as_str().unwrap(), &messages, case)
        });
        assert!(wrong.is_empty(), "{}:\n{}", family["family"], wrong.join("\n"));
    }
}

#[test]
fn dates_are_cs() {
    let template = ChatTemplate::new("{{ strftime_now(messages[0].content) }}", "", "").unwrap();
    for date in fixture("dates.json") {
        template.set_now(date["unix_s"].as_i64().unwrap());
        for (format, text) in date["texts"].as_object().unwrap() {
            let got = template.render(&[message("user", format)], false).unwrap();
            assert_eq!(got, text.as_str().unwrap(), "{format:?} at {}", date["unix_s"]);
        }
    }
}

#[test]
fn work_stays_bounded() {
    for source in [
        "{% set ns = namespace(x=[]) %}{% for i in range(64) %}{% set ns.x = [ns.x, ns.x] %}{% endfor %}{{ ns.x }}",
        "{% set ns = namespace(x=[]) %}{% for i in range(64) %}{% set ns.x = [ns.x, ns.x] %}{% endfor %}{{ ns.x|tojson }}",
        "{% set ns = namespace(x=[]) %}{% for i in range(100000) %}{% set ns.x = [ns.x] %}{% endfor %}{{ ns.x|tojson }}",
        "{% set ns = namespace(x=[]) %}{% for i in range(99999) %}{% for i in range(99999) %}{% set ns.x = [ns.x] %}{% endfor %}{% endfor %}",
        "{% set ns = namespace(x=[]) %}{% for i in range(99999) %}{% for i in range(99999) %}{% set ns.x = {'a': ns.x} %}{% endfor %}{% endfor %}",
        "{{ 'x'.center(1000000000) }}",
        "{{ 'x'.zfill(1000000000000) }}",
        "{{ '\\t'.expandtabs(1000000000) }}",
        "{{ '%1000000000d' % 1 }}",
        "{{ '{:1000000000}'.format(1) }}",
        "{{ 'x'|indent(1000000000, true) }}",
        "{{ [1]|tojson(indent=1000000000)|length }}{{ 'x'.replace('', 'y' * 100000).replace('y', 'z' * 100000) }}",
        "{{ ''.join(['x' * 10000] * 100000) }}",
        "{{ ('a' * 100000).join('b' * 100000) }}",
    ] {
        let error = render(source, &[message("user", "a")], &Value::Null).unwrap_err();
        assert!(error.len() < 500 && !error.contains('\n'), "{source}: {error}");
    }
}
