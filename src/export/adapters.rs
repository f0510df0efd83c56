//! The adapters of an export: `PATH` or `PATH:FACTOR`, one or several.

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

use crate::gguf::{AdapterFile, AdapterPair, GgufSet};
use crate::{Error, Result};

/// An adapter file and the factor it is applied with.
#[derive(Clone, Debug, PartialEq)]
pub struct AdapterSpec {
    /// GGUF file.
    pub path: PathBuf,
    /// Multiplies `alpha / rank`.
    pub factor: f32,
}

impl FromStr for AdapterSpec {
    type Err = Error;

    /// `PATH:FACTOR` when what follows the last colon is a number and no file has the whole name.
    fn from_str(text: &str) -> Result<AdapterSpec> {
        let whole = AdapterSpec { path: text.into(), factor: 1.0 };
        let Some((path, factor)) = text.rsplit_once(':') else { return Ok(whole) };
        match factor.parse::<f32>() {
            _ if whole.path.exists() || path.is_empty() => Ok(whole),
            Ok(factor) if factor.is_finite() => Ok(AdapterSpec { path: path.into(), factor }),
            Ok(_) => {
                Err(Error::invalid("--adapter", "PATH or PATH:FACTOR", text, "use a finite factor"))
            }
            Err(_) => Ok(whole),
        }
    }
}

impl fmt::Display for AdapterSpec {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        match self.factor {
            1.0 => write!(f, "{}", self.path.display()),
            factor => write!(f, "{}:{factor}", self.path.display()),
        }
    }
}

/// Adapters of one architecture, read.
pub struct Adapters {
    list: Vec<(AdapterSpec, AdapterFile)>,
}

/// One low-rank term of a weight: `scale * B A`.
#[derive(Clone, Copy)]
pub(super) struct Delta<'a> {
    pub pair: &'a AdapterPair,
    pub scale: f32,
}

impl Adapters {
    /// Reads all of them.
    ///
    /// # Errors
    /// What [`AdapterFile::read`] says; adapters of different architectures.
    pub fn read(specs: &[AdapterSpec]) -> Result<Adapters> {
        let list: Vec<_> = specs
            .iter()
            .map(|spec| Ok((spec.clone(), AdapterFile::read(&spec.path)?)))
            .collect::<Result<_>>()?;
        Adapters::of(list)
    }

    /// Adapters that were read already.
    pub(super) fn of(list: Vec<(AdapterSpec, AdapterFile)>) -> Result<Adapters> {
        if let [(_, first), others @ ..] = list.as_slice()
            && let Some((spec, other)) = others.iter().find(|(_, other)| other.arch != first.arch)
        {
            let (expected, got) = (format!("an adapter for {}", first.arch), other.arch.clone());
            let advice = "apply adapters of one model together";
            return Err(Error::invalid(spec.path.display().to_string(), expected, got, advice));
        }
        let adapters = Adapters { list };
        for (spec, file) in &adapters.list {
            for pair in &file.pairs {
                let first = adapters.deltas(&pair.weight)[0].pair;
                if pair.shape() != first.shape() {
                    return Err(Error::invalid(
                        format!("{}: {}", spec.path.display(), pair.weight),
                        format!("a pair for shape {:?}", first.shape()),
                        format!("one for {:?}", pair.shape()),
                        "apply adapters of one model together",
                    ));
                }
            }
        }
        Ok(adapters)
    }

    /// Each file with where it came from.
    pub fn iter(&self) -> impl ExactSizeIterator<Item = (&AdapterSpec, &AdapterFile)> {
        self.list.iter().map(|(spec, file)| (spec, file))
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.list.is_empty()
    }

    /// The terms of a weight.
    pub(super) fn deltas(&self, weight: &str) -> Vec<Delta<'_>> {
        let mut deltas = Vec::new();
        for (spec, file) in &self.list {
            for pair in file.pairs.iter().filter(|pair| pair.weight == weight) {
                deltas.push(Delta { pair, scale: spec.factor * file.scale(pair) });
            }
        }
        deltas
    }

    /// Refuses an adapter that does not fit the model, which messages call `name`.
    ///
    /// # Errors
    /// [`Error::Invalid`] naming the adapter, the tensor, and both shapes.
    pub fn check(&self, base: &GgufSet, name: &str) -> Result<()> {
        let advice = "use the model that the adapter was trained on";
        let arch = base.head().architecture()?;
        for (spec, file) in &self.list {
            let place = spec.path.display().to_string();
            if file.arch != arch {
                let expected = format!("an adapter for {arch}, as {name} is");
                return Err(Error::invalid(place, expected, file.arch.clone(), advice));
            }
            for pair in &file.pairs {
                let place = format!("{place}: {}", pair.weight);
                let Some((_, tensor)) = base.tensor(&pair.weight) else {
                    // A model without one multiplies by its token embedding.
                    if pair.weight == "output.weight" {
                        let expected = format!("an unembedding of its own in {name}");
                        let got = "one that is tied to the token embedding";
                        let advice =
                            "an adapter of lm_head would change both: train it without lm_head";
                        return Err(Error::invalid(place, expected, got, advice));
                    }
                    let expected = format!("a tensor of {name}");
                    return Err(Error::invalid(place, expected, "one it lacks", advice));
                };
                if tensor.shape != pair.shape() {
                    return Err(Error::invalid(
                        place,
                        format!("a pair for shape {:?}", tensor.shape),
                        format!("one for {:?}", pair.shape()),
                        advice,
                    ));
                }
            }
        }
        Ok(())
    }

    /// All of them as one: the same sum of low-rank terms. A single one without a factor stays as it is;
    /// else ranks add up, and factors and scales go into B.
    ///
    /// # Errors
    /// [`Error::Invalid`] without any.
    pub fn combined(&self) -> Result<AdapterFile> {
        let (spec, first) = self.list.first().ok_or_else(|| {
            Error::invalid("--adapter", "at least one", "none", "give --adapter FILE")
        })?;
        if self.list.len() == 1 && spec.factor == 1.0 {
            return Ok(first.clone());
        }
        let mut weights: Vec<&str> = Vec::new();
        for pair in self.list.iter().flat_map(|(_, file)| &file.pairs) {
            if !weights.contains(&pair.weight.as_str()) {
                weights.push(&pair.weight);
            }
        }
        let pairs = weights.into_iter().map(|weight| sum(&self.deltas(weight))).collect();
        let (name, extra) = (first.name.clone(), first.extra.clone());
        // An alpha of 0 means a scale of 1 for every rank.
        Ok(AdapterFile { arch: first.arch.clone(), name, alpha: 0.0, pairs, extra })
    }
}

/// `sum_i s_i B_i A_i` as one pair: the A's one under another, the scaled B's side by side.
fn sum(deltas: &[Delta]) -> AdapterPair {
    let first = deltas[0].pair;
    let rank = deltas.iter().map(|d| d.pair.rank).sum();
    let (n_in, n_out, n_expert) = (first.n_in, first.n_out, first.n_expert);
    let of_expert = |e| deltas.iter().flat_map(move |d| d.pair.expert(e).0);
    let a = (0..n_expert).flat_map(of_expert).copied().collect();
    let mut b = Vec::with_capacity(rank * n_out * n_expert);
    for row in 0..n_out * n_expert {
        for Delta { pair, scale } in deltas {
            b.extend(pair.b[row * pair.rank..][..pair.rank].iter().map(|x| scale * x));
        }
    }
    AdapterPair { weight: first.weight.clone(), rank, n_in, n_out, n_expert, a, b }
}
