//! The ranks of a run: processes, on one machine or on many, that share its work over MPI; or one process alone.
//!
//! Work is a list of items, prompts or micro batches, which ranks take one after another as they become free
//! ([`Queue`]). What was made of them every rank gets, in the order of the items ([`Team::join`]), and sums of gradients
//! are added up in that order ([`Team::sum`]). So nothing depends on who did what, on when, or on how many ranks there are.
//!
//! All calls but [`Queue::take`] and those of a [`Post`] are collective: every rank makes the same ones in the same order, and whatever decides
//! about them is the same everywhere. An error of one rank inside of [`Team::join`] becomes one of every rank.

mod alike;
#[cfg(feature = "mpi")]
mod mpi;
mod post;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::{Error, Result};

pub use alike::Fact;
pub use post::Post;

/// The ranks of a run. A clone is the same team.
#[derive(Clone, Default)]
pub struct Team(Option<Arc<dyn Link>>);

/// What communication took of a rank.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Cost {
    /// Seconds in which something went from rank to rank.
    pub seconds: f64,
    /// Seconds of waiting for others to be as far.
    pub waited: f64,
    /// Bytes sent and received.
    pub bytes: u64,
}

/// Between the ranks; all of it waits without taking a core.
pub(crate) trait Link: Send + Sync {
    fn rank(&self) -> usize;
    fn size(&self) -> usize;
    /// Number of this rank among those of its machine.
    fn local_rank(&self) -> usize;
    /// Machine of each rank.
    fn hosts(&self) -> &[String];
    /// The number of the next queue, the same on every rank.
    fn new_queue(&self) -> u64;
    /// The next item of a queue.
    fn take(&self, queue: u64) -> Result<usize>;
    /// The bytes of every rank.
    fn gather(&self, own: &[u8]) -> Result<Vec<Vec<u8>>>;
    /// Sends `counts[r]` of `values` to each rank r, one after another, and receives `expected[r]` of each.
    fn exchange(&self, values: &[f32], counts: &[usize], expected: &[usize]) -> Result<Vec<f32>>;
    /// Sends a letter to the first rank; none is the last one.
    fn post(&self, letter: Option<&[u8]>) -> Result<()>;
    /// The letters that have come since, on the first rank.
    fn posted(&self) -> Vec<Option<Vec<u8>>>;
    /// A moment in which one may come.
    fn wait_for_post(&self);
    /// Sets the flag when it is set on any rank.
    fn share_stop(&self, flag: Arc<AtomicBool>);
    fn take_cost(&self) -> Cost;
    /// Notes that every rank knows of the error that ends this run.
    fn agree(&self);
    fn has_agreed(&self) -> bool;
    /// Leaves together with the others.
    fn leave(&self);
    /// Ends all ranks at once.
    fn abort(&self) -> !;
}

/// What a rank brings to a join.
#[derive(serde::Serialize, serde::Deserialize)]
enum Brought<T> {
    Items(Vec<(usize, T)>),
    Interrupted,
    Failed(String),
}

impl Team {
    /// A process alone.
    pub fn alone() -> Team {
        Team(None)
    }

    /// The ranks that this process was started with, by `mpirun`, `mpiexec` or `srun`; alone where it was started
    /// without them. The first call of the process counts.
    ///
    /// # Errors
    /// MPI cannot be had: the program was built without it, or its library does not allow several threads.
    pub fn started() -> Result<Team> {
        #[cfg(feature = "mpi")]
        return mpi::start().map(Team);
        #[cfg(not(feature = "mpi"))]
        match launched() {
            Some(n) if n > 1 => Err(Error::invalid(
                format!("started as one of {n} ranks"),
                "a program that was built for MPI",
                "one without it",
                "build it with `cargo build --release --features mpi` (docs/SCALE.md)",
            )),
            _ => Ok(Team::alone()),
        }
    }

    /// This process, from 0.
    pub fn rank(&self) -> usize {
        self.0.as_ref().map_or(0, |link| link.rank())
    }

    /// Processes.
    pub fn size(&self) -> usize {
        self.0.as_ref().map_or(1, |link| link.size())
    }

    /// Number of this rank among those of its machine, from 0; none of a process alone.
    pub fn local_rank(&self) -> Option<usize> {
        self.0.as_ref().map(|link| link.local_rank())
    }

    /// Whether there is one process.
    pub fn is_alone(&self) -> bool {
        self.0.is_none()
    }

    /// Whether this is the rank that writes files and speaks to people.
    pub fn is_first(&self) -> bool {
        self.rank() == 0
    }

    /// A rank in words: `rank 1 on node7`.
    pub fn name(&self, rank: usize) -> String {
        match &self.0 {
            Some(link) => format!("rank {rank} on {}", link.hosts()[rank]),
            None => "this process".into(),
        }
    }

    /// `n` items to be taken.
    pub fn queue(&self, n: usize) -> Queue {
        let shared = self.0.as_ref().map(|link| (link.clone(), link.new_queue()));
        Queue { n, next: 0, share: n.div_ceil(self.size()), shared }
    }

    /// What all ranks made of `n` items, in their order, from what this rank made of those it took.
    ///
    /// # Errors
    /// This rank's own, or the one of another rank, by its name. [`Error::Interrupted`] where any was interrupted.
    pub fn join<T>(&self, n: usize, own: Result<Vec<(usize, T)>>) -> Result<Vec<T>>
    where
        T: Serialize + DeserializeOwned,
    {
        Ok(self.join_by(n, own)?.into_iter().map(|(_, item)| item).collect())
    }

    /// [`Team::join`] with the rank that each item is from.
    pub fn join_by<T>(&self, n: usize, own: Result<Vec<(usize, T)>>) -> Result<Vec<(usize, T)>>
    where
        T: Serialize + DeserializeOwned,
    {
        let mut found: Vec<Option<(usize, T)>> = (0..n).map(|_| None).collect();
        let mut put = |rank: usize, items: Vec<(usize, T)>| {
            items.into_iter().for_each(|(i, item)| found[i] = Some((rank, item)));
        };
        match &self.0 {
            None => put(0, own?),
            Some(link) => {
                let (brought, error) = match own {
                    Ok(items) => (Brought::Items(items), None),
                    Err(Error::Interrupted) => (Brought::Interrupted, Some(Error::Interrupted)),
                    Err(error) => (Brought::Failed(error.to_string()), Some(error)),
                };
                let all = link.gather(&encode(&brought)?)?;
                let (mut failed, mut interrupted) = (None, false);
                for (rank, bytes) in all.iter().enumerate() {
                    match decode::<Brought<T>>(bytes)? {
                        Brought::Items(items) => put(rank, items),
                        Brought::Interrupted => interrupted = true,
                        Brought::Failed(why) => failed = failed.or(Some((rank, why))),
                    }
                }
                if interrupted || failed.is_some() {
                    link.agree();
                }
                if let Some((rank, why)) = failed {
                    let of_other = || {
                        let advice = "the other ranks are ended with it";
                        Error::engine(self.name(rank), why, advice)
                    };
                    return Err(error
                        .filter(|e| !matches!(e, Error::Interrupted))
                        .unwrap_or_else(of_other));
                }
                if interrupted {
                    return Err(Error::Interrupted);
                }
            }
        }
        let whole: Option<Vec<_>> = found.into_iter().collect();
        whole.ok_or_else(|| Error::engine("sharing work", "an item was left out", "report it"))
    }

    /// What each rank says, by rank.
    pub fn each<T: Serialize + DeserializeOwned>(&self, own: T) -> Result<Vec<T>> {
        self.join(self.size(), Ok(vec![(self.rank(), own)]))
    }

    /// What the first rank says.
    ///
    /// # Errors
    /// The first rank's, on every rank.
    pub fn from_first<T>(&self, value: impl FnOnce() -> Result<T>) -> Result<T>
    where
        T: Serialize + DeserializeOwned,
    {
        let own = match self.is_first() {
            true => value().map(|value| vec![(0, value)]),
            false => Ok(Vec::new()),
        };
        Ok(self.join(1, own)?.remove(0))
    }

    /// Whether any rank says so.
    pub fn any(&self, says: bool) -> Result<bool> {
        Ok(self.each(says)?.contains(&true))
    }

    /// Whether the work is to stop, of a flag that is seen at other times by other ranks.
    pub fn stops(&self, flag: &AtomicBool) -> Result<bool> {
        let stops = self.any(flag.load(Ordering::Relaxed))?;
        if stops && let Some(link) = &self.0 {
            link.agree();
        }
        Ok(stops)
    }

    /// An error that every rank has.
    pub fn shared_by_all(&self, error: Error) -> Error {
        if let Some(link) = &self.0 {
            link.agree();
        }
        error
    }

    /// Adds items of as many values as `sum` to it in the order of their numbers, and gives every rank the sum. `by`: the
    /// rank that has each item, ascending by number from the first of them; `own`: those of this rank, in that order.
    ///
    /// Each rank adds up a part of the values, of which it gets every item's, so that what a rank sends does not grow
    /// with their number: `items of its own + 1` times the values at most.
    pub fn sum(&self, by: &[usize], own: &[Vec<f32>], sum: &mut [f32]) -> Result<()> {
        let Some(link) = &self.0 else {
            own.iter().for_each(|item| add(sum, item));
            return Ok(());
        };
        let (rank, size) = (link.rank(), link.size());
        let items_of: Vec<usize> =
            (0..size).map(|r| by.iter().filter(|b| **b == r).count()).collect();
        let mut start = 0;
        while start < sum.len() {
            let window = &mut sum[start..];
            let n = window.len().min(SUM_VALUES.max(size));
            let window = &mut window[..n];
            let cut = |r: usize| n * r / size;
            let part = cut(rank)..cut(rank + 1);
            let mut sent = Vec::with_capacity(own.len() * n);
            for to in 0..size {
                own.iter()
                    .for_each(|item| sent.extend_from_slice(&item[start..][cut(to)..cut(to + 1)]));
            }
            let counts: Vec<usize> =
                (0..size).map(|to| own.len() * (cut(to + 1) - cut(to))).collect();
            let expected: Vec<usize> = items_of.iter().map(|items| items * part.len()).collect();
            let got = link.exchange(&sent, &counts, &expected)?;
            let mut at: Vec<usize> = expected
                .iter()
                .scan(0, |before, n| Some(std::mem::replace(before, *before + n)))
                .collect();
            let mut done = window[part.clone()].to_vec();
            for &from in by {
                add(&mut done, &got[at[from]..][..part.len()]);
                at[from] += part.len();
            }
            let counts = vec![done.len(); size];
            let expected: Vec<usize> = (0..size).map(|r| cut(r + 1) - cut(r)).collect();
            let repeated: Vec<f32> = done.repeat(size);
            window.copy_from_slice(&link.exchange(&repeated, &counts, &expected)?);
            start += n;
        }
        Ok(())
    }

    /// Sets the flag here soon after it is set on any rank.
    pub fn share_stop(&self, flag: &Arc<AtomicBool>) {
        if let Some(link) = &self.0 {
            link.share_stop(flag.clone());
        }
    }

    /// What communication took since the last call.
    pub fn take_cost(&self) -> Cost {
        self.0.as_ref().map_or(Cost::default(), |link| link.take_cost())
    }

    /// Ends a process with its outcome. An error that the other ranks do not know of ends them, too; one that they
    /// share the first rank tells.
    ///
    /// `tell` says what is wrong.
    pub fn end<T>(&self, outcome: Result<T>, tell: impl FnOnce(&Error, &str)) -> Result<T> {
        let Some(link) = &self.0 else { return outcome };
        match &outcome {
            Err(error) if !link.has_agreed() => {
                tell(error, &self.name(link.rank()));
                link.abort()
            }
            _ => link.leave(),
        }
        outcome
    }
}

/// Values that are added up in one go: 64 MiB.
const SUM_VALUES: usize = 16 << 20;

fn add(sum: &mut [f32], values: &[f32]) {
    sum.iter_mut().zip(values).for_each(|(sum, value)| *sum += value);
}

/// Items that ranks take one after another.
pub struct Queue {
    n: usize,
    // Of a process alone.
    next: usize,
    share: usize,
    shared: Option<(Arc<dyn Link>, u64)>,
}

impl Queue {
    /// `n` items for this process alone.
    pub fn alone(n: usize) -> Queue {
        Team::alone().queue(n)
    }

    /// The next item that no rank has taken; none when all are taken.
    ///
    /// # Errors
    /// The rank that hands them out cannot be reached.
    pub fn take(&mut self) -> Result<Option<usize>> {
        if self.is_empty() {
            return Ok(None);
        }
        let item = match &self.shared {
            Some((link, queue)) => link.take(*queue)?,
            None => self.next,
        };
        self.next = item + 1;
        Ok((item < self.n).then_some(item))
    }

    /// Whether all are known to be taken.
    pub fn is_empty(&self) -> bool {
        self.next >= self.n
    }

    /// Whether other ranks take from it, too.
    pub fn is_shared(&self) -> bool {
        self.shared.is_some()
    }

    /// Items that a rank works on at a time at most, so that each rank gets some.
    pub fn share(&self) -> usize {
        self.share
    }
}

/// Ranks that a launcher says there are; none where nobody launched them.
#[cfg(not(feature = "mpi"))]
fn launched() -> Option<usize> {
    let sizes = ["OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MPI_LOCALNRANKS"];
    sizes.iter().find_map(|name| std::env::var(name).ok()?.parse().ok())
}

#[cfg(feature = "mpi")]
fn encode<T: Serialize>(value: &T) -> Result<Vec<u8>> {
    postcard::to_stdvec(value).map_err(|e| codec(&e.to_string()))
}

#[cfg(feature = "mpi")]
fn decode<T: DeserializeOwned>(bytes: &[u8]) -> Result<T> {
    postcard::from_bytes(bytes).map_err(|e| codec(&e.to_string()))
}

// Without the feature there is no link, and nothing that crosses it.
#[cfg(not(feature = "mpi"))]
fn encode<T: Serialize>(_: &T) -> Result<Vec<u8>> {
    Err(codec("there are no other ranks"))
}

#[cfg(not(feature = "mpi"))]
fn decode<T: DeserializeOwned>(_: &[u8]) -> Result<T> {
    Err(codec("there are no other ranks"))
}

fn codec(why: &str) -> Error {
    Error::engine("a message between ranks", why, "report it")
}
