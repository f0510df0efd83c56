//! One tensor: dequantised, added to and quantised again, a few rows at a time on all cores.

use rayon::prelude::*;

use super::adapters::Delta;
use super::feedback::Feedback;
use crate::ggml::Type;
use crate::gguf::{GgufFile, TensorInfo};
use crate::ops::add_low_rank;
use crate::{Error, Result};

/// Floats that one thread works on at a time: 1 MiB.
const PIECE: usize = 256 * 1024;

/// Rounds of error feedback.
const FEEDBACK_STEPS: usize = 16;
/// The squared error of rounding may grow to so many times itself.
const FEEDBACK_NOISE: f64 = 4.0;

/// What becomes of a tensor whose data change.
pub(super) struct Conversion<'a> {
    /// File that holds it.
    pub file: &'a GgufFile,
    /// The tensor.
    pub info: &'a TensorInfo,
    /// Its new type.
    pub to: Type,
    /// Low-rank terms to be added.
    pub deltas: Vec<Delta<'a>>,
    /// Importance of its columns, `[ne0]`.
    pub importance: Option<&'a [f32]>,
    /// Error feedback within the rows of A, of each expert; empty: none.
    pub feedback: Vec<Option<Feedback>>,
}

/// Sums over a tensor, from which the loss by rounding is told. W: base, W': with the low-rank terms, Q:
/// what is written, dequantised.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(super) struct Sums {
    /// `||W' - W||^2`
    pub delta: f64,
    /// `||Q - W'||^2`
    pub error: f64,
    /// `<Q - W, W' - W>`
    pub kept: f64,
}

impl Sums {
    /// The sums over both parts.
    pub fn add(self, other: Sums) -> Sums {
        Sums {
            delta: self.delta + other.delta,
            error: self.error + other.error,
            kept: self.kept + other.kept,
        }
    }
}

impl Conversion<'_> {
    /// Hands the new data to `emit`, in order, in pieces.
    pub(super) fn run(&self, emit: &mut dyn FnMut(&[u8]) -> Result<()>) -> Result<Sums> {
        let width = self.info.shape[0] as usize;
        let n_rows = (self.info.n_elements() / width as u64) as usize;
        let row_bytes = self.row_bytes(self.info.ty, width)?;
        let bytes = self.file.bytes(self.info);
        let step = (PIECE / width).max(1);
        // No piece goes from one expert into the next: each has its own low-rank terms.
        let own = n_rows / self.n_expert();
        let cut: Vec<std::ops::Range<usize>> = (0..self.n_expert())
            .flat_map(|e| (e * own..(e + 1) * own).step_by(step).map(move |at| (at, (e + 1) * own)))
            .map(|(at, end)| at..(at + step).min(end))
            .collect();
        let mut sums = Sums::default();
        for batch in cut.chunks(rayon::current_num_threads().max(1) * 2) {
            let (first, last) = (batch[0].start, batch[batch.len() - 1].end);
            let pieces: Vec<(Vec<u8>, Sums)> = batch
                .par_iter()
                .map(|rows| {
                    let bytes = &bytes[rows.start * row_bytes..rows.end * row_bytes];
                    self.piece(
                        bytes,
                        rows.start / own,
                        rows.start % own..rows.end - rows.start / own * own,
                        width,
                    )
                })
                .collect::<Result<_>>()?;
            for (bytes, part) in &pieces {
                emit(bytes)?;
                sums = sums.add(*part);
            }
            self.file.release(&bytes[first * row_bytes..last * row_bytes]);
        }
        Ok(sums)
    }

    /// Experts of a stack; 1 of a matrix.
    fn n_expert(&self) -> usize {
        self.info.shape.get(2).map_or(1, |&n| n as usize).max(1)
    }

    /// The new data of some rows of an expert.
    fn piece(
        &self,
        from: &[u8],
        expert: usize,
        rows: std::ops::Range<usize>,
        width: usize,
    ) -> Result<(Vec<u8>, Sums)> {
        let mut values = vec![0f32; rows.len() * width];
        self.info.ty.dequantize(from, &mut values);
        let base = (!self.deltas.is_empty()).then(|| values.clone());
        for Delta { pair, scale } in &self.deltas {
            add_low_rank(&mut values, rows.clone(), pair.expert(expert), pair.rank, *scale);
        }
        let row_bytes = self.row_bytes(self.to, width)?;
        let mut out = vec![0u8; rows.len() * row_bytes];
        self.quantise(&values, width, &mut out)?;
        let Some(base) = base else { return Ok((out, Sums::default())) };
        let mut back = vec![0f32; values.len()];
        self.to.dequantize(&out, &mut back);
        if let Some(feedback) = self.feedback.get(expert).and_then(Option::as_ref) {
            self.feed_back(feedback, &values, width, &mut out, &mut back)?;
        }
        let mut sums = Sums::default();
        for ((w, new), q) in base.iter().zip(&values).zip(&back) {
            let (w, new, q) = (*w as f64, *new as f64, *q as f64);
            sums.delta += (new - w) * (new - w);
            sums.error += (q - new) * (q - new);
            sums.kept += (q - w) * (new - w);
        }
        Ok((out, sums))
    }

    /// Improves `out` (`back`: the same, dequantised) by error feedback, see [`Feedback`].
    fn feed_back(
        &self,
        feedback: &Feedback,
        values: &[f32],
        width: usize,
        out: &mut Vec<u8>,
        back: &mut Vec<f32>,
    ) -> Result<()> {
        let rows = values.len() / width;
        let (mut target, mut trial) = (values.to_vec(), back.clone());
        let mut bytes = out.clone();
        let mut best = f64::INFINITY;
        let mut plain = None;
        for _ in 0..=FEEDBACK_STEPS {
            let error: Vec<f32> = values.iter().zip(&trial).map(|(t, q)| t - q).collect();
            let whole: f64 = error.iter().map(|e| *e as f64 * *e as f64).sum();
            let (u, inside) = feedback.project(&error);
            let allowed = FEEDBACK_NOISE * *plain.get_or_insert(whole);
            if inside < best && whole <= allowed {
                best = inside;
                out.clone_from(&bytes);
                back.clone_from(&trial);
            }
            add_low_rank(&mut target, 0..rows, (feedback.a(), &u), feedback.rank(), 1.0);
            self.quantise(&target, width, &mut bytes)?;
            self.to.dequantize(&bytes, &mut trial);
        }
        Ok(())
    }

    fn quantise(&self, values: &[f32], width: usize, out: &mut [u8]) -> Result<()> {
        self.to.quantize(values, width, self.importance, out).map_err(|got| {
            Error::invalid(
                format!("{}: tensor '{}' as {}", self.file.name(), self.info.name, self.to),
                "finite numbers that the type can hold",
                got,
                "choose another --type, or check model and adapter",
            )
        })
    }

    fn row_bytes(&self, ty: Type, width: usize) -> Result<usize> {
        ty.row_bytes(width).ok_or_else(|| {
            Error::invalid(
                format!("{}: tensor '{}'", self.file.name(), self.info.name),
                format!("rows in whole {ty} blocks of {}", ty.block_size()),
                format!("{width} elements per row"),
                "choose another --type",
            )
        })
    }
}
