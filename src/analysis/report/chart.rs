//! What a chart shows, said once: `interactive` makes of it the figure of the page, `svg` the file beside it.

/// Colours that people with any kind of colour vision tell apart (Okabe and Ito), on white and on black.
pub const COLOURS: [(u8, u8, u8); 7] = [
    (0, 114, 178),
    (213, 94, 0),
    (0, 158, 115),
    (204, 121, 167),
    (230, 159, 0),
    (86, 180, 233),
    (128, 128, 128),
];

/// Grey that is seen on white and on black.
pub const GREY: (u8, u8, u8) = (128, 128, 128);

/// One figure.
#[derive(Clone, Debug, PartialEq)]
pub struct Chart {
    /// Name of the SVG file and of the element in the page.
    pub id: String,
    /// Heading.
    pub title: String,
    /// What one sees, in a sentence or two.
    pub caption: String,
    /// What runs along the bottom.
    pub x: String,
    /// What runs up, with its unit.
    pub y: String,
    /// The data.
    pub body: Body,
}

/// The kinds of charts.
#[derive(Clone, Debug, PartialEq)]
pub enum Body {
    /// Curves over layers or steps.
    Lines {
        /// The curves.
        series: Vec<Series>,
        /// Marked places along the bottom.
        marks: Vec<Mark>,
        /// Whether zero is a place of interest.
        zero: bool,
    },
    /// Coloured cells.
    Heat(Heat),
}

/// One curve.
#[derive(Clone, Debug, PartialEq)]
pub struct Series {
    /// In the legend.
    pub name: String,
    /// Points, left to right; a gap where y is none.
    pub points: Vec<(f64, Option<f64>)>,
    /// Half the length of a bar around each point.
    pub errors: Option<Vec<f64>>,
    /// Index into [`COLOURS`].
    pub colour: usize,
    /// Drawn in dashes.
    pub dashed: bool,
}

impl Series {
    /// A solid curve.
    pub fn new(name: &str, colour: usize, points: Vec<(f64, Option<f64>)>) -> Series {
        Series { name: name.into(), points, errors: None, colour, dashed: false }
    }

    /// The same in dashes.
    pub fn dashed(self) -> Series {
        Series { dashed: true, ..self }
    }
}

/// A vertical line with a word to it.
#[derive(Clone, Debug, PartialEq)]
pub struct Mark {
    /// Where.
    pub at: f64,
    /// What.
    pub label: String,
}

/// Cells in rows from the bottom up.
#[derive(Clone, Debug, PartialEq)]
pub struct Heat {
    /// Names of columns.
    pub columns: Vec<String>,
    /// Names of rows.
    pub rows: Vec<String>,
    /// Values by row and column.
    pub values: Vec<Vec<f32>>,
    /// What is told of a cell, lines of plain text; by row and column.
    pub notes: Vec<Vec<Vec<String>>>,
    /// Name of the values with their unit.
    pub unit: String,
}

impl Heat {
    /// Lowest and highest value.
    pub fn range(&self) -> (f32, f32) {
        let all = || self.values.iter().flatten().copied().filter(|v| v.is_finite());
        (all().fold(f32::INFINITY, f32::min), all().fold(f32::NEG_INFINITY, f32::max))
    }
}

impl Body {
    /// Lowest and highest x and y of curves, error bars included, with some air; zero where it is of interest.
    pub fn bounds(series: &[Series], zero: bool) -> [(f64, f64); 2] {
        let (mut x, mut y) = ((f64::MAX, f64::MIN), (f64::MAX, f64::MIN));
        let widen = |range: &mut (f64, f64), value: f64| {
            *range = (range.0.min(value), range.1.max(value));
        };
        for s in series {
            for (i, (px, py)) in s.points.iter().enumerate() {
                let Some(py) = py else { continue };
                let error = s.errors.as_ref().and_then(|e| e.get(i)).copied().unwrap_or(0.0);
                let error = if error.is_finite() { error } else { 0.0 };
                widen(&mut x, *px);
                widen(&mut y, py - error);
                widen(&mut y, py + error);
            }
        }
        if zero {
            widen(&mut y, 0.0);
        }
        let air = |(low, high): (f64, f64), share: f64| {
            if low > high || (low, high) == (0.0, 0.0) {
                return (-share, 1.0); // no point at all, or nothing but zeros
            }
            let width = if high > low { high - low } else { high.abs().max(1.0) };
            (low - share * width, high + share * width)
        };
        [air(x, 0.02), air(y, 0.06)]
    }
}
