//! What ranks hand to the first one while all are at work.

use super::Team;
use crate::Result;

/// A letter box of the first rank, into which the others put bytes. It is made and ended by all ranks together; whoever
/// fails in between ends it, too, for nobody goes on before all have.
pub struct Post {
    team: Team,
    /// Ranks from which more may come.
    open: usize,
}

impl Team {
    /// An empty letter box.
    pub fn post(&self) -> Post {
        Post { team: self.clone(), open: self.size() - 1 }
    }
}

impl Post {
    /// Sends bytes to the first rank; waits where much lies there already. The first rank has nobody to send to.
    pub fn send(&self, bytes: &[u8]) -> Result<()> {
        match &self.team.0 {
            Some(link) if !self.team.is_first() => link.post(Some(bytes)),
            _ => Ok(()),
        }
    }

    /// What has arrived at the first rank since, in the order of each sender.
    pub fn take(&mut self) -> Vec<Vec<u8>> {
        let mut taken = Vec::new();
        if let Some(link) = self.team.0.as_ref().filter(|_| self.team.is_first()) {
            for letter in link.posted() {
                match letter {
                    Some(bytes) => taken.push(bytes),
                    None => self.open -= 1,
                }
            }
        }
        taken
    }

    /// Says that no more comes from here; the first rank takes what comes until all others have said so.
    pub fn end(mut self, take: &mut dyn FnMut(Vec<u8>)) -> Result<()> {
        let Some(link) = self.team.0.clone() else { return Ok(()) };
        if !self.team.is_first() {
            return link.post(None);
        }
        loop {
            self.take().into_iter().for_each(&mut *take);
            if self.open == 0 {
                return Ok(());
            }
            link.wait_for_post();
        }
    }
}
