//! One HTML page of charts, whole in itself: it opens from disk, with no network.

use std::fmt::Write;

use serde_json::Value;

use super::chart::{Body, Chart};
use super::interactive;

/// What stands on a page.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Page {
    /// Title of the document.
    pub title: String,
    /// A line below it.
    pub subtitle: String,
    /// Figures of note, name and value.
    pub facts: Vec<(String, String)>,
    /// Sections from top to bottom.
    pub sections: Vec<Section>,
}

/// A heading and what is below it.
#[derive(Clone, Debug, PartialEq)]
pub struct Section {
    /// Heading.
    pub title: String,
    /// Paragraph below it.
    pub text: String,
    /// The parts.
    pub parts: Vec<Part>,
}

/// What a section is made of.
#[derive(Clone, Debug, PartialEq)]
pub enum Part {
    /// A chart.
    Chart(Chart),
    /// A table: head and rows.
    Table(Vec<String>, Vec<Vec<String>>),
    /// Dialogues with a heading each: (who speaks, what is said).
    Chats(Vec<(String, Vec<(String, String)>)>),
    /// Texts with a heading each.
    Texts(Vec<(String, String)>),
    /// A slider that smooths the curves of its section.
    Smoothing,
    /// Completions as a table to sort and filter, objects of step, reward, tokens, reason, prompt, completion, right
    /// answer.
    Completions(Vec<Value>),
    /// Likeliest tokens by token and layer (`grid`).
    Grid(Value),
}

impl Page {
    /// All charts.
    pub fn charts(&self) -> impl Iterator<Item = &Chart> {
        self.sections.iter().flat_map(|s| &s.parts).filter_map(|part| match part {
            Part::Chart(chart) => Some(chart),
            _ => None,
        })
    }

    /// All tables: head and rows.
    pub fn tables(&self) -> impl Iterator<Item = (&Vec<String>, &Vec<Vec<String>>)> {
        self.sections.iter().flat_map(|s| &s.parts).filter_map(|part| match part {
            Part::Table(head, rows) => Some((head, rows)),
            _ => None,
        })
    }

    /// The tables as Markdown.
    pub fn markdown(&self) -> String {
        let line = |cells: &[String]| format!("| {} |\n", cells.join(" | "));
        let mut text = format!("# {}\n\n{}\n", self.title, self.subtitle);
        for (head, rows) in self.tables() {
            let rule = vec!["---".to_string(); head.len()];
            text += "\n";
            [head, &rule].into_iter().chain(rows).for_each(|cells| text += &line(cells));
        }
        text
    }

    /// The page's HTML.
    pub fn html(&self) -> String {
        self.document("<body>")
    }

    /// The same, which renews itself from a server; `state` says what it shows.
    pub fn live_html(&self, state: u64) -> String {
        self.document(&format!("<body data-live=\"{state}\">"))
    }

    fn document(&self, body: &str) -> String {
        format!(
            "<!doctype html>\n<html lang=\"en\"><head><meta charset=\"utf-8\">\n\
             <meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">\n\
             <meta name=\"color-scheme\" content=\"light dark\">\n<link rel=\"icon\" href=\"data:,\">\n\
             <title>{}</title>\n<style>\n{STYLE}</style>\n{}\n</head>\n{body}\n{}<script>\n{SCRIPT}</script>\n</body></html>\n",
            escape(&self.title),
            interactive::library(),
            self.parts(),
        )
    }

    /// What is in the page's body but for its script.
    pub fn parts(&self) -> String {
        let mut body = String::new();
        let _ = write!(
            body,
            "<header><h1>{}</h1><p>{}</p></header>\n<dl class=\"facts\">",
            escape(&self.title),
            escape(&self.subtitle)
        );
        for (name, value) in &self.facts {
            let _ = write!(body, "<div><dt>{}</dt><dd>{}</dd></div>", escape(name), escape(value));
        }
        body += "</dl>\n";
        for section in &self.sections {
            let _ = write!(body, "<section><h2>{}</h2>", escape(&section.title));
            if !section.text.is_empty() {
                let _ = write!(body, "<p>{}</p>", escape(&section.text));
            }
            body += "<div class=\"parts\">\n";
            for part in &section.parts {
                write_part(&mut body, part);
            }
            body += "</div></section>\n";
        }
        body
    }
}

fn write_part(body: &mut String, part: &Part) {
    match part {
        Part::Chart(chart) => {
            let class = if matches!(chart.body, Body::Heat(_)) { "heat" } else { "lines" };
            let _ = writeln!(
                body,
                "<figure class=\"{class}\"><h3>{}</h3><div class=\"scroll\"><div class=\"chart\" id=\"{id}\"></div></div>\
                 <figcaption>{}</figcaption><script type=\"application/json\" id=\"{id}-data\">{}</script></figure>",
                escape(&chart.title),
                escape(&chart.caption),
                interactive::json(chart),
                id = escape(&chart.id),
            );
        }
        Part::Table(head, rows) => {
            *body += "<div class=\"wide scroll\"><table><thead><tr>";
            for cell in head {
                let _ = write!(body, "<th>{}</th>", escape(cell));
            }
            *body += "</tr></thead><tbody>\n";
            for row in rows {
                *body += "<tr>";
                for cell in row {
                    let _ = write!(body, "<td>{}</td>", escape(cell));
                }
                *body += "</tr>\n";
            }
            *body += "</tbody></table></div>\n";
        }
        Part::Smoothing => {
            *body += "<div class=\"wide controls\"><label>smoothing <input type=\"range\" id=\"smoothing\" min=\"0\" \
                      max=\"0.95\" step=\"0.05\" value=\"0\"> <output id=\"smoothing-value\">0.00</output></label></div>\n";
        }
        Part::Completions(rows) => {
            // A completion's text may hold what would end the script element.
            let rows = Value::from(rows.clone()).to_string().replace('<', "\\u003c");
            let _ = writeln!(
                body,
                "<div class=\"wide completions\">{COMPLETIONS}<script type=\"application/json\">{rows}</script></div>"
            );
        }
        Part::Grid(grid) => {
            let grid = grid.to_string().replace('<', "\\u003c");
            let _ = writeln!(
                body,
                "<div class=\"wide grid\">{GRID}<script type=\"application/json\">{grid}</script></div>"
            );
        }
        Part::Chats(chats) => {
            *body += "<div class=\"wide\">";
            for (title, messages) in chats {
                let _ = write!(body, "<details open><summary>{}</summary>", escape(title));
                *body += "<div class=\"chat\">";
                for (role, text) in messages {
                    let class = if role == "assistant" { " class=\"own\"" } else { "" };
                    let _ = write!(
                        body,
                        "<div{class}><b>{}</b><pre>{}</pre></div>",
                        escape(role),
                        escape(text)
                    );
                }
                *body += "</div></details>\n";
            }
            *body += "</div>";
        }
        Part::Texts(texts) => {
            *body += "<div class=\"wide\">";
            for (title, text) in texts {
                let _ = writeln!(
                    body,
                    "<details><summary>{}</summary><pre>{}</pre></details>",
                    escape(title),
                    escape(text)
                );
            }
            *body += "</div>";
        }
    }
}

/// What stands around the rows of completions.
const COMPLETIONS: &str = r#"<div class="controls"><label>step <select name="step"></select></label>
<label>show <select name="kind"><option value="">all</option><option value="best">highest reward</option>
<option value="worst">lowest reward</option><option value="cut">cut off</option></select></label>
<label>with <input name="words" type="search" placeholder="words"></label><output></output></div>
<div class="scroll"><table><thead><tr><th data-key="step">step</th><th data-key="reward">reward</th>
<th data-key="tokens">tokens</th><th data-key="reason" class="text">reason</th><th data-key="prompt" class="text">prompt</th>
<th data-key="completion" class="text">completion</th><th data-key="right answer" class="text">right answer</th>
</tr></thead><tbody></tbody></table></div><button type="button">more</button>"#;

/// What stands around the cells of a grid.
const GRID: &str = r#"<div class="controls"><label>completion <select name="completion"></select></label>
<label>colour <select name="figure"><option value="0">entropy, nats</option><option value="1">KL to the final policy, nats</option>
<option value="2">probability of the token taken</option><option value="3">rank of the token taken</option></select></label>
<label>of <select name="tap"></select></label><label>model <select name="model"></select></label>
<label>lens <select name="lens"></select></label>
<span class="scale"><output name="low"></output><i></i><output name="high"></output></span></div>
<p class="prompt"></p><div class="scroll"><table></table></div><pre class="cell"></pre>"#;

fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}

const STYLE: &str = include_str!("../../../assets/page.css");

/// Unpacks the library, draws every chart in the colours of the page, and again when these change; smooths curves, lists
/// completions, and renews a live page.
const SCRIPT: &str = include_str!("../../../assets/page.js");
