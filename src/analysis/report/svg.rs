//! Charts as SVG files for papers, by plotters: black on white.

use plotters::coord::Shift;
use plotters::element::DashedPathElement;
use plotters::prelude::*;
use plotters::style::text_anchor::{HPos, Pos, VPos};

use super::chart::{Body, COLOURS, Chart, GREY, Heat, Mark, Series};
use crate::{Error, Result};

const SIZE: (u32, u32) = (760, 460);
const CELL: u32 = 18;

/// The text of an SVG file.
///
/// # Errors
/// [`Error::Engine`] with the words of the drawing library.
pub fn svg(chart: &Chart) -> Result<String> {
    let mut text = String::new();
    let drawn = match &chart.body {
        Body::Lines { series, marks, zero } => lines(&mut text, chart, series, marks, *zero),
        Body::Heat(heat) => cells(&mut text, chart, heat),
    };
    drawn.map_err(|e| {
        Error::engine(format!("drawing the figure {}", chart.id), e.to_string(), "report it")
    })?;
    Ok(text)
}

fn rgb((r, g, b): (u8, u8, u8)) -> RGBColor {
    RGBColor(r, g, b)
}

type Drawn = std::result::Result<(), Box<dyn std::error::Error>>;

fn lines(out: &mut String, chart: &Chart, series: &[Series], marks: &[Mark], zero: bool) -> Drawn {
    // Names stand beside the curves, where they hide none.
    let longest = series.iter().map(|s| s.name.chars().count()).max().unwrap_or(0) as u32;
    let names = if series.len() > 1 { 36 + 7 * longest } else { 0 };
    let root = SVGBackend::with_string(out, (SIZE.0 + names, SIZE.1)).into_drawing_area();
    root.fill(&WHITE)?;
    let (left, right) = root.split_horizontally(SIZE.0);
    let [x, y] = Body::bounds(series, zero);
    let mut plane = ChartBuilder::on(&left)
        .caption(&chart.title, ("sans-serif", 20))
        .margin(14)
        .x_label_area_size(44)
        .y_label_area_size(64)
        .build_cartesian_2d(x.0..x.1, y.0..y.1)?;
    plane
        .configure_mesh()
        .light_line_style(WHITE)
        .bold_line_style(RGBColor(225, 225, 225))
        .x_desc(&chart.x)
        .y_desc(&chart.y)
        .label_style(("sans-serif", 14))
        .axis_desc_style(("sans-serif", 15))
        .x_label_formatter(&|x| if x.fract() == 0.0 { format!("{x}") } else { format!("{x:.1}") })
        .draw()?;
    if zero {
        plane.draw_series(LineSeries::new([(x.0, 0.0), (x.1, 0.0)], rgb(GREY).stroke_width(2)))?;
    }
    for mark in marks {
        let line = [(mark.at, y.0), (mark.at, y.1)];
        plane.draw_series(DashedLineSeries::new(line, 6, 4, rgb(GREY).stroke_width(2)))?;
        let style = ("sans-serif", 13).into_font().color(&rgb(GREY));
        // The word stands on the side where there is room.
        let side = if mark.at > (x.0 + x.1) / 2.0 { HPos::Right } else { HPos::Left };
        let style = style.pos(Pos::new(side, VPos::Bottom));
        plane.plotting_area().draw(&Text::new(mark.label.clone(), (mark.at, y.1), style))?;
    }
    for s in series {
        let ink = rgb(COLOURS[s.colour % COLOURS.len()]);
        let style = ink.stroke_width(2);
        let points: Vec<(f64, f64)> =
            s.points.iter().filter_map(|(x, y)| y.map(|y| (*x, y))).collect();
        if let Some(errors) = &s.errors {
            let bars = s.points.iter().zip(errors).filter_map(|((x, y), e)| {
                let y = (*y)?;
                e.is_finite().then(|| PathElement::new([(*x, y - e), (*x, y + e)], ink))
            });
            plane.draw_series(bars.collect::<Vec<_>>())?;
        }
        if s.dashed {
            plane.draw_series(DashedLineSeries::new(points.clone(), 7, 4, style))?;
        } else {
            plane.draw_series(LineSeries::new(points.clone(), style))?;
        }
        if points.len() <= 60 {
            plane.draw_series(points.iter().map(|&p| Circle::new(p, 3, ink.filled())))?;
        }
    }
    if names > 0 {
        legend(&right, series)?;
    }
    root.present()?;
    Ok(())
}

/// Names of curves, each behind a stroke of its own.
fn legend(area: &DrawingArea<SVGBackend<'_>, Shift>, series: &[Series]) -> Drawn {
    for (s, y) in series.iter().zip((56..).step_by(20)) {
        let style = rgb(COLOURS[s.colour % COLOURS.len()]).stroke_width(2);
        let stroke = [(0, y), (22, y)];
        if s.dashed {
            area.draw(&DashedPathElement::new(stroke, 7, 4, style))?;
        } else {
            area.draw(&PathElement::new(stroke, style))?;
        }
        let font = ("sans-serif", 13).into_font().color(&BLACK);
        let font = font.pos(Pos::new(HPos::Left, VPos::Center));
        area.draw(&Text::new(s.name.clone(), (28, y), font))?;
    }
    Ok(())
}

fn cells(out: &mut String, chart: &Chart, heat: &Heat) -> Drawn {
    let (columns, rows) = (heat.columns.len() as u32, heat.rows.len() as u32);
    let longest = heat.columns.iter().map(|c| c.chars().count()).max().unwrap_or(0) as u32;
    let (left, top, below, bar) = (80u32, 40u32, 24 + 8 * longest.min(24), 110u32);
    let size = (left + CELL * columns.max(16) + bar, top + CELL * rows + below + 20);
    let root = SVGBackend::with_string(out, size).into_drawing_area();
    root.fill(&WHITE)?;
    let font = |size: u32| ("sans-serif", size).into_font();
    let centre = |h, v| Pos::new(h, v);
    let title = font(18).color(&BLACK);
    root.draw(&Text::new(chart.title.clone(), (left as i32, 10), title))?;
    let (low, high) = heat.range();
    let shade = |value: f32| {
        let part = if high > low { (value - low) / (high - low) } else { 0.5 };
        ViridisRGB::get_color(part.clamp(0.0, 1.0))
    };
    let y_of = |row: u32| (top + CELL * (rows - 1 - row)) as i32;
    for (r, row) in heat.values.iter().enumerate() {
        for (c, &value) in row.iter().enumerate() {
            let (x, y) = ((left + CELL * c as u32) as i32, y_of(r as u32));
            let corner = (x + CELL as i32 - 1, y + CELL as i32 - 1);
            root.draw(&Rectangle::new([(x, y), corner], shade(value).filled()))?;
        }
    }
    let every = rows.div_ceil(40) as usize;
    for (r, name) in
        heat.rows.iter().enumerate().filter(|(r, _)| r % every == 0 || *r + 1 == rows as usize)
    {
        let style = font(12).color(&BLACK).pos(centre(HPos::Right, VPos::Center));
        let at = (left as i32 - 6, y_of(r as u32) + CELL as i32 / 2);
        root.draw(&Text::new(name.clone(), at, style))?;
    }
    let style = font(13).color(&BLACK).pos(centre(HPos::Center, VPos::Top));
    let side = style.transform(FontTransform::Rotate270);
    root.draw(&Text::new(chart.y.clone(), (8, (top + CELL * rows / 2) as i32), side))?;
    for (c, name) in heat.columns.iter().enumerate() {
        let style = ("monospace", 12).into_font().color(&BLACK);
        let style = style.transform(FontTransform::Rotate90).pos(centre(HPos::Left, VPos::Center));
        let at = ((left + CELL * c as u32 + CELL / 2) as i32, (top + CELL * rows + 5) as i32);
        root.draw(&Text::new(name.chars().take(24).collect::<String>(), at, style))?;
    }
    // The scale of colours.
    let x = (left + CELL * columns.max(16) + 24) as i32;
    let height = (CELL * rows).max(60) as i32;
    for i in 0..height {
        let value = low + (high - low) * (1.0 - i as f32 / (height - 1) as f32);
        let y = top as i32 + i;
        root.draw(&Rectangle::new([(x, y), (x + 12, y + 1)], shade(value).filled()))?;
    }
    for (value, y) in [(high, top as i32 + 6), (low, top as i32 + height - 6)] {
        let style = font(12).color(&BLACK).pos(centre(HPos::Left, VPos::Center));
        root.draw(&Text::new(format!("{value:.2}"), (x + 16, y), style))?;
    }
    let style = font(12).color(&BLACK);
    root.draw(&Text::new(heat.unit.clone(), (x - 10, top as i32 - 16), style))?;
    root.present()?;
    Ok(())
}
