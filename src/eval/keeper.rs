//! Where the samples of an evaluation go as problems end: to the store, or, from other ranks, to the first one's.

use super::{EvalSample, Store};
use crate::team::{Post, Team};
use crate::{Error, Result};

/// Keeps the samples of the problems that are worked on together.
pub(super) struct Keeper<'k> {
    team: Team,
    /// Of the first rank.
    store: Option<&'k mut Store>,
    /// Where the first rank has a store.
    post: Option<Post>,
    /// What this rank made, by place among the problems.
    own: Vec<(usize, String)>,
    /// An error of what arrived.
    failed: Result<()>,
}

impl<'k> Keeper<'k> {
    /// Of ranks that all make one; `keeps`: whether the first rank has a store.
    pub fn new(team: &Team, store: Option<&'k mut Store>, keeps: bool) -> Keeper<'k> {
        let post = keeps.then(|| team.post());
        Keeper { team: team.clone(), store, post, own: Vec::new(), failed: Ok(()) }
    }

    /// A problem is done.
    ///
    /// # Errors
    /// The store cannot be written.
    pub fn done(&mut self, place: usize, samples: &[EvalSample]) -> Result<()> {
        let text = to_text(samples)?;
        match (&mut self.store, &self.post) {
            (Some(store), _) => store.append(samples)?,
            (None, Some(post)) => post.send(text.as_bytes())?,
            (None, None) => {}
        }
        self.own.push((place, text));
        Ok(())
    }

    /// Stores what arrived from other ranks; to be called again and again.
    pub fn look(&mut self) {
        for letter in self.post.as_mut().map(Post::take).unwrap_or_default() {
            self.stored(&letter);
        }
    }

    fn stored(&mut self, letter: &[u8]) {
        if let (Ok(()), Some(store)) = (&self.failed, &mut self.store) {
            self.failed = from_text(letter).and_then(|all: Vec<EvalSample>| store.append(&all));
        }
    }

    /// The samples of all `n` problems, by their place, after this rank's outcome.
    ///
    /// # Errors
    /// Those of any rank.
    pub fn finish(mut self, n: usize, outcome: Result<()>) -> Result<Vec<Vec<EvalSample>>> {
        let ended = match self.post.take() {
            Some(post) => post.end(&mut |letter| self.stored(&letter)),
            None => Ok(()),
        };
        let own = outcome.and(ended).and(self.failed).map(|()| self.own);
        let all = self.team.join(n, own)?;
        all.iter().map(|text| from_text(text.as_bytes())).collect()
    }
}

// As JSON, like the store: a sample leaves fields out, and has some of any kind.
pub(super) fn to_text<T: serde::Serialize + ?Sized>(value: &T) -> Result<String> {
    serde_json::to_string(value).map_err(fault)
}

pub(super) fn from_text<T: serde::de::DeserializeOwned>(text: &[u8]) -> Result<T> {
    serde_json::from_slice(text).map_err(fault)
}

fn fault(e: serde_json::Error) -> Error {
    Error::engine("sharing what was evaluated", e.to_string(), "report it")
}
