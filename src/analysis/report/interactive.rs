//! Charts for the page, by plotly.

use base64::prelude::{BASE64_STANDARD, Engine};
use plotly::common::{
    Anchor, ColorBar, ColorScale, ColorScalePalette, DashType, ErrorData, ErrorType, Font,
    HoverInfo, Label, Line, Marker, Mode, Orientation, Title,
};
use plotly::configuration::DisplayModeBar;
use plotly::layout::{
    Annotation, Axis, HoverMode, Legend, Margin, Shape, ShapeLayer, ShapeLine, ShapeType,
};
use plotly::{Configuration, HeatMap, Layout, Plot, Scatter};

use super::chart::{Body, COLOURS, Chart, GREY, Heat, Mark, Series};

/// Pixels of a heat map's cell.
const CELL: usize = 22;

/// plotly.js as its authors build it for charts with axes, packed (`tools/update-plotly`); the licence is its head.
const PLOTLY: &[u8] = include_bytes!("../../../assets/plotly-cartesian.min.js.gz");

/// plotly.js, packed, as an element that [`super::page`]'s script unpacks: a third of its size.
pub fn library() -> String {
    format!("<script type=\"text/plain\" id=\"plotly\">{}</script>", BASE64_STANDARD.encode(PLOTLY))
}

/// `{"data": .., "layout": .., "config": ..}` for `Plotly.newPlot`. Colours of text and grid are the page's.
pub fn json(chart: &Chart) -> String {
    let mut plot = Plot::new();
    plot.set_configuration(
        Configuration::new().display_mode_bar(DisplayModeBar::False).display_logo(false),
    );
    match &chart.body {
        Body::Lines { series, marks, zero } => lines(&mut plot, chart, series, marks, *zero),
        Body::Heat(heat) => cells(&mut plot, chart, heat),
    }
    // A token's text may hold what would end the script element.
    plot.to_json().replace('<', "\\u003c")
}

fn colour((r, g, b): (u8, u8, u8)) -> String {
    format!("rgb({r},{g},{b})")
}

fn layout() -> Layout {
    let clear = "rgba(0,0,0,0)";
    Layout::new()
        .paper_background_color(clear)
        .plot_background_color(clear)
        .font(Font::new().family("system-ui, sans-serif").size(13))
}

fn lines(plot: &mut Plot, chart: &Chart, series: &[Series], marks: &[Mark], zero: bool) {
    for s in series {
        let (x, y): (Vec<f64>, Vec<Option<f64>>) = s.points.iter().copied().unzip();
        let many = x.len() > 60;
        let mode = if many { Mode::Lines } else { Mode::LinesMarkers };
        let dash = if s.dashed { DashType::Dash } else { DashType::Solid };
        let ink = colour(COLOURS[s.colour % COLOURS.len()]);
        let mut trace = Scatter::new(x, y)
            .name(&s.name)
            .mode(mode)
            .line(Line::new().color(ink.clone()).width(2.0).dash(dash))
            .marker(Marker::new().color(ink.clone()).size(5))
            .hover_template("%{y:.4f}");
        if let Some(errors) = &s.errors {
            let bars = ErrorData::new(ErrorType::Data).array(errors.clone()).thickness(1.0);
            trace = trace.error_y(bars.color(ink).width(2));
        }
        plot.add_trace(trace);
    }
    let line = |x0: f64, x1: f64, y0: f64, y1: f64| {
        Shape::new()
            .shape_type(ShapeType::Line)
            .layer(ShapeLayer::Below)
            .x0(x0)
            .x1(x1)
            .y0(y0)
            .y1(y1)
            .line(ShapeLine::new().color(colour(GREY)).width(1.5))
    };
    let mut shapes = Vec::new();
    if zero {
        shapes.push(line(0.0, 1.0, 0.0, 0.0).x_ref("paper").y_ref("y"));
    }
    let mut notes = Vec::new();
    let [x, y] = Body::bounds(series, zero);
    for mark in marks {
        // The word stands on the side where there is room.
        let right = mark.at > (x.0 + x.1) / 2.0;
        shapes.push(line(mark.at, mark.at, 0.0, 1.0).x_ref("x").y_ref("paper"));
        notes.push(
            Annotation::new()
                .x(mark.at)
                .y(1.0)
                .x_ref("x")
                .y_ref("paper")
                .x_anchor(if right { Anchor::Right } else { Anchor::Left })
                .y_anchor(Anchor::Bottom)
                .show_arrow(false)
                .text(escape(&mark.label)),
        );
    }
    plot.set_layout(
        layout()
            .height(360 + 10 * series.len()) // two names of the legend stand in a row, if not one
            .hover_mode(HoverMode::XUnified)
            .hover_distance(-1) // the nearest point, however far
            .margin(Margin::new().left(64).right(16).top(28).bottom(48))
            .legend(Legend::new().orientation(Orientation::Horizontal).y(-0.24))
            .show_legend(series.len() > 1)
            .x_axis(
                Axis::new()
                    .title(Title::with_text(&chart.x))
                    .range(vec![x.0, x.1])
                    .zero_line(false),
            )
            .y_axis(
                Axis::new()
                    .title(Title::with_text(&chart.y))
                    .auto_margin(true)
                    .range(vec![y.0, y.1])
                    .zero_line(false),
            )
            .shapes(shapes)
            .annotations(notes),
    );
}

fn cells(plot: &mut Plot, chart: &Chart, heat: &Heat) {
    let (columns, rows) = (heat.columns.len(), heat.rows.len());
    let places = |n: usize| (0..n).map(|i| i as f64).collect::<Vec<f64>>();
    let text = |lines: &Vec<String>| {
        lines.iter().map(|line| escape(line)).collect::<Vec<_>>().join("<br>")
    };
    let notes = heat.notes.iter().map(|row| row.iter().map(text).collect()).collect();
    let trace = HeatMap::new(places(columns), places(rows), heat.values.clone())
        .hover_text_matrix(notes)
        .hover_info(HoverInfo::Text)
        .color_scale(ColorScale::Palette(ColorScalePalette::Viridis))
        .x_gap(1)
        .y_gap(1)
        .color_bar(ColorBar::new().title(Title::with_text(&heat.unit)).thickness(12))
        .hover_label(Label::new().font(Font::new().family("ui-monospace, monospace").size(13)));
    plot.add_trace(trace);
    let names = |names: &[String]| names.iter().map(|name| escape(name)).collect::<Vec<_>>();
    let longest = heat.columns.iter().map(|c| c.chars().count()).max().unwrap_or(0);
    let bottom = 56 + 8 * longest.min(24);
    let fixed = |title: &str, names: Vec<String>| {
        Axis::new()
            .title(Title::with_text(title))
            .tick_values(places(names.len()))
            .tick_text(names)
            .show_grid(false)
            .zero_line(false)
            .fixed_range(true)
    };
    let mono = Font::new().family("ui-monospace, monospace").size(12);
    plot.set_layout(
        layout()
            .width(190 + CELL * columns.max(12))
            .height(24 + bottom + CELL * rows.max(6))
            .margin(Margin::new().left(70).right(100).top(16).bottom(bottom))
            .x_axis(fixed(&chart.x, names(&heat.columns)).tick_angle(-90.0).tick_font(mono))
            .y_axis(fixed(&chart.y, names(&heat.rows))),
    );
}

/// Plotly reads some HTML in its texts.
fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;")
}
