//! One HTML page of charts, whole in itself: it opens from disk, with no network.

use std::fmt::Write;

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
    /// Texts with a heading each.
    Texts(Vec<(String, String)>),
}

impl Page {
    /// All charts.
    pub fn charts(&self) -> impl Iterator<Item = &Chart> {
        self.sections.iter().flat_map(|s| &s.parts).filter_map(|part| match part {
            Part::Chart(chart) => Some(chart),
            _ => None,
        })
    }

    /// The page's HTML.
    pub fn html(&self) -> String {
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
        format!(
            "<!doctype html>\n<html lang=\"en\"><head><meta charset=\"utf-8\">\n\
             <meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">\n\
             <meta name=\"color-scheme\" content=\"light dark\">\n<link rel=\"icon\" href=\"data:,\">\n\
             <title>{}</title>\n<style>{STYLE}</style>\n{}\n</head>\n<body>\n{body}<script>{SCRIPT}</script>\n</body></html>\n",
            escape(&self.title),
            interactive::library(),
        )
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

fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}

const STYLE: &str = "
:root { --ink: #1c2126; --soft: #5b6670; --back: #fbfbfa; --card: #ffffff; --edge: #e3e5e7; --grid: #e6e8ea; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e9ec; --soft: #9aa5af; --back: #14171a; --card: #1c2024; --edge: #2d3338; --grid: #32393f; }
}
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 2rem clamp(.8rem, 3vw, 2.5rem) 4rem; max-width: 1360px; background: var(--back);
  color: var(--ink); font: 16px/1.5 system-ui, -apple-system, 'Segoe UI', sans-serif; }
h1 { font-size: 1.6rem; line-height: 1.2; margin: 0 0 .3rem; overflow-wrap: anywhere; }
h2 { font-size: 1.2rem; margin: 2.6rem 0 .3rem; }
h3 { font-size: 1rem; margin: 0 0 .2rem; font-weight: 600; }
p { margin: .2rem 0; max-width: 78ch; }
header p, section > p, figcaption { color: var(--soft); overflow-wrap: anywhere; }
.facts { display: grid; grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); gap: .7rem; margin: 1.4rem 0 0; }
.facts div { background: var(--card); border: 1px solid var(--edge); border-radius: 8px; padding: .6rem .8rem; }
dt { color: var(--soft); font-size: .8rem; }
dd { margin: 0; font-size: 1.15rem; font-variant-numeric: tabular-nums; }
.parts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 520px), 1fr)); gap: 1rem; margin-top: .8rem; }
figure { margin: 0; padding: .9rem 1rem; background: var(--card); border: 1px solid var(--edge); border-radius: 8px; min-width: 0; }
figure.heat, .wide { grid-column: 1 / -1; min-width: 0; }
figcaption { font-size: .86rem; max-width: 78ch; }
.scroll { overflow-x: auto; }
.lines .chart { min-height: 380px; }
table { border-collapse: collapse; font-size: .86rem; font-variant-numeric: tabular-nums; white-space: nowrap; }
th, td { padding: .25rem .7rem; text-align: right; border-bottom: 1px solid var(--edge); }
th { color: var(--soft); font-weight: 600; }
details { background: var(--card); border: 1px solid var(--edge); border-radius: 8px; padding: .4rem .8rem; margin-bottom: .4rem; }
summary { cursor: pointer; overflow-wrap: anywhere; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; font: .86rem/1.45 ui-monospace, monospace; margin: .5rem 0; }
";

/// Unpacks the library, and draws every chart in the colours of the page, and again when these change.
const SCRIPT: &str = r#"
async function library() {
  const packed = Uint8Array.from(atob(document.getElementById('plotly').textContent), c => c.charCodeAt(0));
  const script = document.createElement('script');
  script.textContent = await new Response(
    new Blob([packed]).stream().pipeThrough(new DecompressionStream('gzip'))).text();
  document.head.append(script);
}
const scheme = window.matchMedia('(prefers-color-scheme: dark)');
function colours() {
  const style = getComputedStyle(document.documentElement);
  const of = name => style.getPropertyValue(name).trim();
  return { 'font.color': of('--ink'), 'xaxis.gridcolor': of('--grid'), 'yaxis.gridcolor': of('--grid'),
    'xaxis.linecolor': of('--grid'), 'yaxis.linecolor': of('--grid'),
    'hoverlabel.bgcolor': of('--card'), 'hoverlabel.bordercolor': of('--soft'), 'hoverlabel.font.color': of('--ink') };
}
const charts = [...document.querySelectorAll('.chart')];
const draw = async chart => {
  const figure = JSON.parse(document.getElementById(chart.id + '-data').textContent);
  if (!figure.layout.width) figure.layout.width = chart.clientWidth;
  await Plotly.newPlot(chart, figure.data, figure.layout, figure.config);
  await Plotly.relayout(chart, colours());
};
window.report = library().then(() => Promise.all(charts.map(draw)))
  .then(() => { document.documentElement.dataset.drawn = charts.length; });
window.report.catch(error => charts.forEach(chart => {
  chart.textContent = `Not drawn (${error}): the charts need a browser of 2023 or newer; figures/ has them as SVG.`;
}));
// Charts of fixed cells keep their width and scroll; curves take what there is.
const fit = () => document.querySelectorAll('.lines .chart').forEach(chart =>
  chart.clientWidth && window.Plotly && Plotly.relayout(chart, { width: chart.clientWidth }));
window.addEventListener('resize', () => { clearTimeout(window.fitting); window.fitting = setTimeout(fit, 100); });
scheme.addEventListener('change', () => window.Plotly && charts.forEach(chart => Plotly.relayout(chart, colours())));
"#;
