//! What an evaluation keeps: `settings.json` and one line of `completions.jsonl` per completion.
//!
//! A problem's lines are written together when all its completions are judged, so that an evaluation that
//! was ended goes on with the problems that are missing.

use std::collections::BTreeMap;
use std::fs::{self, File, OpenOptions};
use std::io::{BufRead, BufReader, BufWriter, Write};
use std::path::{Path, PathBuf};

use serde_json::{Map, Value};

use super::EvalSample;
use crate::error::json_fault;
use crate::gguf::{refuse_filled, write_atomically, write_json_atomically};
use crate::{Error, Result};

/// Everything that completions depend on, by name.
pub type Settings = Map<String, Value>;

/// The folder of an evaluation.
pub struct Store {
    completions: PathBuf,
    out: BufWriter<File>,
    done: BTreeMap<usize, Vec<EvalSample>>,
}

impl Store {
    /// A new folder, or an empty one.
    ///
    /// # Errors
    /// There is something in it: nothing is written over.
    pub fn create(folder: &Path, settings: &Settings) -> Result<Store> {
        refuse_filled("--out", folder, "go on with it by --resume, or choose another")?;
        fs::create_dir_all(folder).map_err(Error::io("create", folder))?;
        write_json_atomically(&folder.join("settings.json"), settings)?;
        Store::open(folder, BTreeMap::new())
    }

    /// The folder of an evaluation that was ended, with the problems (of `problems`, with `samples`
    /// completions each) that it finished.
    ///
    /// # Errors
    /// No such folder, another setting than now, or a line that is not this program's. A last line that
    /// was cut short is dropped.
    pub fn resume(
        folder: &Path,
        settings: &Settings,
        problems: usize,
        samples: usize,
    ) -> Result<Store> {
        let path = folder.join("settings.json");
        let text = fs::read(&path).map_err(Error::io("read", &path))?;
        let before: Settings = serde_json::from_slice(&text).map_err(|e| {
            let advice = "choose the folder of an evaluation";
            Error::invalid(path.display().to_string(), "settings", json_fault(&e), advice)
        })?;
        let names = before.keys().chain(settings.keys().filter(|k| !before.contains_key(*k)));
        for name in names {
            let (then, now) = (before.get(name), settings.get(name));
            if then != now {
                let show = |v: Option<&Value>| v.map_or("none".to_string(), Value::to_string);
                return Err(Error::invalid(
                    format!("{}: `{name}`", path.display()),
                    show(then),
                    show(now),
                    "resume with the same settings, or choose another --out",
                ));
            }
        }
        let path = folder.join("completions.jsonl");
        let done = read(&path, problems, samples)?;
        write_atomically(&path, |w| {
            done.values().flatten().try_for_each(|sample| line(w, &path, sample))
        })?;
        Store::open(folder, done)
    }

    fn open(folder: &Path, done: BTreeMap<usize, Vec<EvalSample>>) -> Result<Store> {
        let completions = folder.join("completions.jsonl");
        let file = OpenOptions::new().create(true).append(true).open(&completions);
        let out = BufWriter::new(file.map_err(Error::io("create", &completions))?);
        Ok(Store { completions, out, done })
    }

    /// The problems that were finished before, handed out once.
    pub fn take_done(&mut self) -> BTreeMap<usize, Vec<EvalSample>> {
        std::mem::take(&mut self.done)
    }

    /// Adds a problem's completions.
    pub fn append(&mut self, samples: &[EvalSample]) -> Result<()> {
        samples.iter().try_for_each(|sample| line(&mut self.out, &self.completions, sample))?;
        self.out.flush().map_err(Error::io("write", &self.completions))
    }
}

fn line(out: &mut impl Write, path: &Path, sample: &EvalSample) -> Result<()> {
    serde_json::to_writer(&mut *out, sample)
        .map_err(std::io::Error::from)
        .and_then(|()| out.write_all(b"\n"))
        .map_err(Error::io("write", path))
}

/// The problems of `completions.jsonl` that have all their samples.
fn read(path: &Path, problems: usize, samples: usize) -> Result<BTreeMap<usize, Vec<EvalSample>>> {
    let mut found: BTreeMap<usize, Vec<EvalSample>> = BTreeMap::new();
    let file = match File::open(path) {
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(found),
        file => file.map_err(Error::io("read", path))?,
    };
    let mut reader = BufReader::new(file);
    let (mut text, mut at) = (Vec::new(), 0);
    loop {
        text.clear();
        at += 1;
        if reader.read_until(b'\n', &mut text).map_err(Error::io("read", path))? == 0 {
            break;
        }
        if text.last() != Some(&b'\n') {
            break; // cut short when the evaluation ended
        }
        let place = || format!("{}:{at}", path.display());
        let sample: EvalSample = serde_json::from_slice(&text).map_err(|e| {
            Error::invalid(place(), "a completion of this program", json_fault(&e), "drop the line")
        })?;
        if sample.problem >= problems || sample.sample >= samples {
            let expected = format!("problems below {problems}, samples below {samples}");
            let got = format!("problem {}, sample {}", sample.problem, sample.sample);
            return Err(Error::invalid(place(), expected, got, "choose another --out"));
        }
        found.entry(sample.problem).or_default().push(sample);
    }
    found.retain(|_, group| {
        group.sort_by_key(|s| s.sample);
        group.len() == samples && group.iter().enumerate().all(|(i, s)| s.sample == i)
    });
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample(problem: usize, sample: usize) -> EvalSample {
        EvalSample {
            problem,
            id: "p".into(),
            sample,
            right: true,
            reward: 1.0,
            reason: "r".into(),
            answer: "1".into(),
            extracted: None,
            tokens: 3,
            truncated: false,
            completion: "ü\n".into(),
            talk: None,
            messages: Vec::new(),
        }
    }

    #[test]
    fn whole_problems_survive_an_interruption() {
        let dir = tempfile::tempdir().unwrap();
        let folder = dir.path().join("e");
        let settings: Settings = serde_json::from_str(r#"{"seed": 1, "data": "d"}"#).unwrap();
        let mut store = Store::create(&folder, &settings).unwrap();
        store.append(&[sample(1, 0), sample(1, 1)]).unwrap();
        store.append(&[sample(0, 1), sample(0, 0)]).unwrap();
        store.append(&[sample(2, 0)]).unwrap(); // of two
        drop(store);
        let path = folder.join("completions.jsonl");
        let mut file = OpenOptions::new().append(true).open(&path).unwrap();
        file.write_all(b"{\"problem\": 2, \"sam").unwrap();
        drop(file);
        let mut store = Store::resume(&folder, &settings, 3, 2).unwrap();
        let done = store.take_done();
        assert_eq!(done.keys().copied().collect::<Vec<_>>(), [0, 1]);
        assert_eq!(done[&0], [sample(0, 0), sample(0, 1)]);
        store.append(&[sample(2, 0), sample(2, 1)]).unwrap();
        drop(store);
        assert_eq!(fs::read_to_string(&path).unwrap().lines().count(), 6);

        let error = Store::create(&folder, &settings).err().unwrap().to_string();
        assert!(error.contains("an empty or new folder"), "{error}");
        let other: Settings = serde_json::from_str(r#"{"seed": 2, "data": "d"}"#).unwrap();
        let error = Store::resume(&folder, &other, 3, 2).err().unwrap().to_string();
        assert!(error.contains("`seed`: expected 1, got 2"), "{error}");
        let more: Settings = serde_json::from_str(r#"{"seed": 1, "data": "d", "x": 0}"#).unwrap();
        assert!(Store::resume(&folder, &more, 3, 2).is_err());
        let error = Store::resume(&folder, &settings, 2, 2).err().unwrap().to_string();
        assert!(error.contains("problems below 2"), "{error}");
        fs::write(&path, "rubbish\n").unwrap();
        let error = Store::resume(&folder, &settings, 3, 2).err().unwrap().to_string();
        assert!(error.contains("completions.jsonl:1: expected a completion"), "{error}");
    }
}
