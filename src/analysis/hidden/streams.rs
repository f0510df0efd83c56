//! The streams of a file of hidden states in the making.

use std::fs::{self, OpenOptions};
use std::io::{Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use half::{bf16, f16};

use super::assemble::{self, Array};
use super::choice::Form;
use super::{Element, Hidden, Place, Positions};
use crate::analysis::Tap;
use crate::gguf::check_space;
use crate::team::Post;
use crate::{Error, Result};

/// What says of each position which it is, in the order of the arrays.
const INDEX: [&str; 4] = ["row", "completion", "position", "token"];
/// Bytes of these for one position.
pub(super) const INDEX_BYTES: u64 = 8 * INDEX.len() as u64;
const LAYERS: &str = "layer";

/// A file of hidden states in the making.
pub struct HiddenFiles {
    hidden: Hidden,
    layers: Vec<usize>,
    n_layer: usize,
    n_embd: usize,
    partial: PathBuf,
    written: u64,
    /// Whether the streams are the first rank's, and this is another.
    elsewhere: bool,
    /// The way there.
    pub(in crate::analysis) post: Option<Post>,
}

/// Writes into streams.
pub struct Writer {
    partial: PathBuf,
}

impl HiddenFiles {
    /// Refuses a file that is there, and one in the making unless it is to be gone on with.
    ///
    /// # Errors
    /// [`Error::Invalid`] with the advice.
    pub fn check_free(hidden: &Hidden, resume: bool) -> Result<()> {
        let out = Path::new(&hidden.file);
        let (place, partial) = (format!("--hidden {}", out.display()), partial(&hidden.file));
        let (got, advice) = if fs::symlink_metadata(out).is_ok() {
            ("one that is there".into(), "nothing is written over: choose another, or remove it")
        } else if !resume && partial.exists() {
            let advice = "go on with the same command and --resume, or remove that folder";
            (format!("one that was begun in {}", partial.display()), advice)
        } else {
            return Ok(());
        };
        Err(Error::invalid(place, "a name that is free", got, advice))
    }

    /// Begins the file, or, with `resume`, goes on with it behind the first `whole` positions. `bytes`: what it will
    /// take at most.
    ///
    /// # Errors
    /// No room; streams that are shorter than they should be.
    pub fn open(
        hidden: &Hidden,
        (n_layer, n_embd): (usize, usize),
        bytes: u64,
        resume: bool,
        whole: u64,
    ) -> Result<HiddenFiles> {
        let files = HiddenFiles {
            elsewhere: false,
            ..HiddenFiles::elsewhere(hidden, (n_layer, n_embd), whole)
        };
        if resume && !files.begun() {
            let place = format!("--hidden {}", hidden.file);
            let got = format!("no {}", files.partial.display());
            let advice = "its states are gone; start anew";
            return Err(Error::invalid(place, "what was begun", got, advice));
        }
        let new = !files.partial.exists();
        fs::create_dir_all(&files.partial).map_err(Error::io("create", &files.partial))?;
        let rest = bytes.saturating_sub(whole * (hidden.bytes_of(n_layer, n_embd) + INDEX_BYTES));
        if let Err(full) = check_space(Path::new(&hidden.file), rest + assemble::spare(bytes)) {
            if new {
                files.discard()?;
            }
            return Err(full);
        }
        if !files.begun() {
            let layers: Vec<i64> = files.layers.iter().map(|&l| l as i64).collect();
            files.put(LAYERS, 0, &bytes_of(&layers))?;
        }
        files.cut(whole)?;
        Ok(files)
    }

    /// Those of another rank than the first, which has the streams.
    pub fn elsewhere(
        hidden: &Hidden,
        (n_layer, n_embd): (usize, usize),
        written: u64,
    ) -> HiddenFiles {
        HiddenFiles {
            hidden: hidden.clone(),
            layers: hidden.layers_of(n_layer),
            n_layer,
            n_embd,
            partial: partial(&hidden.file),
            written,
            elsewhere: true,
            post: None,
        }
    }

    /// Writes what other ranks send; none where the streams are elsewhere.
    pub fn writer(&self) -> Option<Writer> {
        (!self.elsewhere).then(|| Writer { partial: self.partial.clone() })
    }

    /// Positions whose states are in the streams.
    pub fn written(&self) -> u64 {
        self.written
    }

    /// Says that the states of so many further positions are there.
    pub(in crate::analysis) fn advance(&mut self, positions: u64) {
        self.written += positions;
    }

    pub(super) fn wants(&self, tap: Tap) -> bool {
        self.hidden.taps.contains(&tap)
    }

    /// Refuses further states once the file is being put together.
    pub(in crate::analysis) fn check_open(&self) -> Result<()> {
        if self.elsewhere || !assemble::begun(&self.partial) {
            return Ok(());
        }
        let place = format!("--hidden {}", self.hidden.file);
        let (expected, got) =
            ("no further rows", "more than before: the file is being put together");
        Err(Error::invalid(place, expected, got, "give the same data and --samples as before"))
    }

    pub(super) fn wants_layer(&self, layer: usize) -> bool {
        self.layers.contains(&layer)
    }

    pub(super) fn positions(&self) -> &Positions {
        &self.hidden.positions
    }

    /// The last layer that must be computed.
    pub(super) fn deepest(&self) -> usize {
        match self.wants(Tap::Final) {
            true => self.n_layer,
            false => self.layers.last().copied().unwrap_or(0),
        }
    }

    /// Writes `[D, S]` of a tap, from position `at` on.
    pub(super) fn write(
        &self,
        at: u64,
        tap: Tap,
        layer: Option<usize>,
        values: &[f32],
    ) -> Result<()> {
        let name = stream(tap, layer);
        let element = self.hidden.element;
        let fits = |x: &f32| match element {
            Element::F16 => f16::from_f32(*x).is_finite(),
            _ => x.is_finite(),
        };
        if let Some(bad) = values.iter().find(|x| !fits(x)) {
            let place = format!("--hidden-type f16: {name}");
            return Err(match bad.is_finite() {
                true => Error::invalid(
                    place,
                    "numbers up to 65504",
                    bad.to_string(),
                    "start anew with --hidden-type f32 or bf16",
                ),
                false => Error::engine(
                    format!("computing {name}"),
                    format!("a number is {bad}"),
                    "the model's weights or the adapter hold values that are not finite; fetch the file again",
                ),
            });
        }
        let bytes: Vec<u8> = match element {
            Element::F32 => values.iter().flat_map(|x| x.to_le_bytes()).collect(),
            Element::F16 => values.iter().flat_map(|&x| f16::from_f32(x).to_le_bytes()).collect(),
            Element::Bf16 => values.iter().flat_map(|&x| bf16::from_f32(x).to_le_bytes()).collect(),
        };
        self.put(&name, at * self.width(), &bytes)
    }

    /// Bytes of a position in a stream of states.
    fn width(&self) -> u64 {
        (self.n_embd * self.hidden.element.bytes()) as u64
    }

    /// Says which positions the states of the batch are that begins at `at`.
    pub(super) fn index(&self, at: u64, places: &[Place]) -> Result<()> {
        let column = |of: fn(&Place) -> i64| places.iter().map(of).collect::<Vec<i64>>();
        let columns = [
            column(|p| p.row as i64),
            column(|p| p.completion as i64),
            column(|p| p.position as i64),
            column(|p| p.token as i64),
        ];
        for (name, column) in INDEX.iter().zip(columns) {
            self.put(name, 8 * at, &bytes_of(&column))?;
        }
        Ok(())
    }

    /// Bytes to their place in a stream, here or on the first rank.
    fn put(&self, name: &str, at: u64, bytes: &[u8]) -> Result<()> {
        match (&self.post, self.writer()) {
            (Some(post), _) => post.send(&letter(name, at, bytes)),
            (None, Some(writer)) => writer.write(name, at, bytes),
            (None, None) => Err(Error::engine("sharing hidden states", "no way", "report it")),
        }
    }

    /// Names of the streams of a tap, layer after layer.
    fn streams(&self, tap: Tap) -> Vec<String> {
        match tap {
            Tap::Final => vec![stream(tap, None)],
            tap => self.layers.iter().map(|&layer| stream(tap, Some(layer))).collect(),
        }
    }

    /// Cuts the streams to `n` positions.
    fn cut(&self, n: u64) -> Result<()> {
        if assemble::begun(&self.partial) {
            return Ok(()); // all was computed; what is missing of the streams is in the file already
        }
        let width = self.width();
        let states = self.hidden.taps.iter().flat_map(|&tap| self.streams(tap));
        let all = states.map(|name| (name, n * width));
        for (name, bytes) in all.chain(INDEX.map(|name| (name.to_string(), 8 * n))) {
            let path = self.partial.join(name);
            let file = OpenOptions::new().create(true).write(true).truncate(false).open(&path);
            let file = file.map_err(Error::io("open", &path))?;
            let there = file.metadata().map_err(Error::io("read", &path))?.len();
            if there < bytes {
                let (expected, got) = (format!("{bytes} bytes"), there.to_string());
                let advice = "it was changed since; remove the folder and start anew";
                return Err(Error::invalid(path.display().to_string(), expected, got, advice));
            }
            file.set_len(bytes).map_err(Error::io("cut", &path))?;
        }
        Ok(())
    }

    /// Whether there are streams already.
    fn begun(&self) -> bool {
        self.partial.join(LAYERS).exists() || assemble::begun(&self.partial)
    }

    /// Puts the file together and gives it its name; its size in bytes. `about`: what the file says of itself.
    ///
    /// # Errors
    /// Those of the system. The streams that are not in the file yet stay.
    pub fn finish(self, about: &[(&str, String)]) -> Result<u64> {
        let size = self.assemble(about)?;
        fs::remove_dir_all(&self.partial).map_err(Error::io("remove", &self.partial))?;
        Ok(size)
    }

    fn assemble(&self, about: &[(&str, String)]) -> Result<u64> {
        let n = self.written;
        let states = |tap: Tap| Array {
            name: tap.name().into(),
            element: Some(self.hidden.element),
            shape: match tap {
                Tap::Final => vec![n, self.n_embd as u64],
                _ => vec![self.layers.len() as u64, n, self.n_embd as u64],
            },
            streams: self.streams(tap),
        };
        let whole = |name: &str, shape: Vec<u64>, streams: &[&str]| Array {
            name: name.into(),
            element: None,
            shape,
            streams: streams.iter().map(|s| s.to_string()).collect(),
        };
        let layer = whole(LAYERS, vec![self.layers.len() as u64], &[LAYERS]);
        let states = self.hidden.taps.iter().map(|&tap| states(tap));
        let index = INDEX.iter().map(|&name| whole(name, vec![n], &[name]));
        let out = Path::new(&self.hidden.file);
        match Form::of(&self.hidden.file)? {
            Form::Safetensors => {
                let arrays: Vec<Array> = index.chain([layer]).chain(states).collect();
                assemble::safetensors(&self.partial, &arrays, about, out)
            }
            Form::Folder => {
                let arrays: Vec<Array> = states.chain(index).chain([layer]).collect();
                assemble::folder(&self.partial, &arrays, out)
            }
            Form::Npy => {
                let index = whole("rows", vec![INDEX.len() as u64, n], &INDEX);
                let arrays: Vec<Array> = states.chain([index]).collect();
                assemble::npy(&self.partial, &arrays, out)
            }
        }
    }

    /// Takes the streams away again: nothing was written.
    pub fn discard(self) -> Result<()> {
        fs::remove_dir_all(&self.partial).map_err(Error::io("remove", &self.partial))
    }
}

impl Writer {
    fn write(&self, name: &str, at: u64, bytes: &[u8]) -> Result<()> {
        let path = self.partial.join(name);
        let file = OpenOptions::new().create(true).write(true).truncate(false).open(&path);
        let written = file.and_then(|mut file| {
            file.seek(SeekFrom::Start(at))?;
            file.write_all(bytes)
        });
        written.map_err(Error::io("write", &path))
    }

    /// Writes what another rank sent.
    pub fn write_letter(&self, letter: &[u8]) -> Result<()> {
        let parts = letter.split_first().and_then(|(&n, rest)| {
            let (name, rest) = rest.split_at_checked(n as usize)?;
            let (at, bytes) = rest.split_first_chunk()?;
            Some((std::str::from_utf8(name).ok()?, u64::from_le_bytes(*at), bytes))
        });
        match parts {
            Some((name, at, bytes)) => self.write(name, at, bytes),
            None => Err(Error::engine("sharing hidden states", "a letter was cut", "report it")),
        }
    }
}

/// Bytes for a place in a stream, on their way.
fn letter(name: &str, at: u64, bytes: &[u8]) -> Vec<u8> {
    [&[name.len() as u8], name.as_bytes(), &at.to_le_bytes(), bytes].concat()
}

/// Where the streams of a file are while it is in the making.
pub fn partial(file: &str) -> PathBuf {
    PathBuf::from(format!("{}.partial", file.trim_end_matches('/')))
}

fn stream(tap: Tap, layer: Option<usize>) -> String {
    match layer {
        Some(layer) => format!("{}.{layer}", tap.name()),
        None => tap.name().into(),
    }
}

fn bytes_of(numbers: &[i64]) -> Vec<u8> {
    numbers.iter().flat_map(|n| n.to_le_bytes()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_number_that_the_type_cannot_hold_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let open = |name: &str, element| {
            let file = folder.path().join(name).to_str().unwrap().to_string();
            let taps = vec![Tap::LayerOut];
            let positions = Positions::Completion;
            let hidden = Hidden { file, taps, layers: None, positions, element };
            HiddenFiles::open(&hidden, (2, 2), 0, false, 0).unwrap()
        };
        let half = open("a.safetensors", Element::F16);
        half.write(0, Tap::LayerOut, Some(1), &[1.0, 65504.0]).unwrap();
        let error = half.write(0, Tap::LayerOut, Some(2), &[1.0, 7e4]).unwrap_err().to_string();
        assert!(error.contains("layer_out.2") && error.contains("70000"), "{error}");
        let brain = open("b.safetensors", Element::Bf16);
        brain.write(0, Tap::LayerOut, Some(1), &[1.0, 7e4]).unwrap();
        let error = brain.write(0, Tap::LayerOut, Some(2), &[f32::NAN, 0.0]).unwrap_err();
        assert!(error.to_string().contains("NaN"), "{error}");
    }
}
