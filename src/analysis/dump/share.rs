//! Batches that ranks share.

use super::{Dump, Figures};
use crate::analysis::hidden::Writer;
use crate::analysis::rows::Sample;
use crate::team::Queue;
use crate::{Error, Result};

/// A batch: runs of samples of one row.
type Runs = Vec<Vec<Sample>>;

impl Dump<'_, '_> {
    /// The figures of all batches, of which the ranks measure one after another. Hidden states go to the first rank's
    /// streams, each to its place, on a thread beside its own work.
    pub(super) fn shared_figures(&mut self, batches: &[Runs]) -> Result<Vec<Figures>> {
        if self.team.stops(self.stop)? {
            return Err(Error::Interrupted);
        }
        let team = self.team;
        let queue = team.queue(batches.len());
        let own = match &self.hidden {
            None => self.own_figures(queue, batches, &[]),
            Some(hidden) => {
                let (pick, mut next) = (self.settings.pick, hidden.written());
                let of_batch = |runs: &Runs| {
                    let start = next;
                    next += hidden.count(runs, pick);
                    start
                };
                let starts: Vec<u64> = batches.iter().map(of_batch).collect();
                let (writer, open) = (hidden.writer(), hidden.check_open());
                self.with_hidden(queue, batches, &starts, writer, open)
            }
        };
        team.join(batches.len(), own)
    }

    /// [`Dump::own_figures`] with hidden states: the first rank's streams have a `writer`, unless they are not `open`.
    fn with_hidden(
        &mut self,
        queue: Queue,
        batches: &[Runs],
        starts: &[u64],
        writer: Option<Writer>,
        open: Result<()>,
    ) -> Result<Vec<(usize, Figures)>> {
        let mut post = self.team.post();
        let Some(writer) = writer else {
            let hidden = self.hidden.as_mut().expect("they are written");
            hidden.post = Some(post);
            let own = self.own_figures(queue, batches, starts);
            post = self.hidden.as_mut().and_then(|hidden| hidden.post.take()).expect("just put");
            return post.end(&mut |_| ()).and(own);
        };
        let mut written = open;
        let takes = written.is_ok();
        let (written, own) = std::thread::scope(|scope| {
            let writing = scope.spawn(move || {
                let ended = post.end(&mut |letter| {
                    if written.is_ok() {
                        written = writer.write_letter(&letter);
                    }
                });
                written.and(ended)
            });
            let own = match takes {
                true => self.own_figures(queue, batches, starts),
                false => Ok(Vec::new()),
            };
            (writing.join(), own)
        });
        written.unwrap_or_else(|panic| std::panic::resume_unwind(panic)).and(own)
    }

    /// Those of the batches that this rank takes; hidden states begin at `starts`, where they are written.
    fn own_figures(
        &mut self,
        mut queue: Queue,
        batches: &[Runs],
        starts: &[u64],
    ) -> Result<Vec<(usize, Figures)>> {
        let mut own = Vec::new();
        while let Some(i) = queue.take()? {
            if let Some(hidden) = &self.hidden {
                let (side, pick) = (&self.sides[0], self.settings.pick);
                let under = (side.model, side.lora.as_ref());
                hidden.take(starts[i], &mut self.engine, under, &batches[i], pick)?;
            }
            let figures = match self.options.figures {
                true => self.figures(&self.packed(batches[i].clone())?)?,
                false => Figures::new(),
            };
            own.push((i, figures));
        }
        Ok(own)
    }
}
