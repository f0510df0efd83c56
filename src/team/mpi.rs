//! Ranks over MPI.
//!
//! MPI's own waits spin. Here every wait asks, and sleeps between two questions, so that a rank that waits leaves its core
//! to others. A thread of each rank hands out work (the first rank's), tells that it lives, and hears whether the others
//! do: a rank that says nothing for [`SILENT`] ends the run everywhere.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use mpi::Threading;
use mpi::datatype::{Partition, PartitionMut};
use mpi::environment::Universe;
use mpi::point_to_point::MatchedReceiveVec;
use mpi::request::{Request, Scope, scope};
use mpi::topology::SimpleCommunicator;
use mpi::traits::*;

use super::{Cost, Link};
use crate::{Error, Result};

/// A rank that was not heard of for so long is taken for dead.
const SILENT: Duration = Duration::from_secs(30);
/// Time between two signs of life.
const BEAT: Duration = Duration::from_secs(2);
/// Bytes or numbers of one collective call, all ranks together: MPI counts in 32 bits.
const MOST: usize = 1 << 28;

/// An item is wanted: the queue's number, to the first rank.
const TAKE: i32 = 1;
/// The item.
const GIVEN: i32 = 2;
/// A rank lives; not 0: the run is to stop.
const ALIVE: i32 = 3;
/// A part of a letter to the first rank, behind a byte that says which.
const POST: i32 = 4;

/// Bytes of letters that the first rank takes in before they are read.
const POST_BYTES: usize = 64 << 20;
const MORE_FOLLOWS: u8 = 0;
const WHOLE: u8 = 1;
const NO_MORE: u8 = 2;

static STARTED: OnceLock<Option<Arc<World>>> = OnceLock::new();

/// The ranks of this process's launch; none where it was not launched, or alone.
pub(super) fn start() -> Result<Option<Arc<dyn Link>>> {
    if let Some(started) = STARTED.get() {
        return Ok(started.clone().map(|world| world as Arc<dyn Link>));
    }
    let launched = ["OMPI_COMM_WORLD_SIZE", "PMIX_RANK", "PMI_RANK", "PMI_SIZE", "MPI_LOCALNRANKS"];
    let world = match launched.iter().any(|name| std::env::var_os(name).is_some()) {
        true => World::start()?,
        false => None,
    };
    Ok(STARTED.get_or_init(|| world).clone().map(|world| world as Arc<dyn Link>))
}

struct World {
    shared: Arc<Shared>,
    rank: usize,
    hosts: Vec<String>,
    queues: AtomicU64,
    agreed: AtomicBool,
    cost: Mutex<Cost>,
    // The thread that speaks with the others' and what ends MPI; taken by `leave`.
    running: Mutex<Option<(JoinHandle<()>, Universe)>>,
}

/// What the main thread and the one that speaks with other ranks both see.
struct Shared {
    names: Vec<String>,
    /// Next item of each queue, on the first rank.
    next: Mutex<BTreeMap<u64, u64>>,
    stop: Mutex<Option<Arc<AtomicBool>>>,
    posted: Mutex<Posted>,
    done: AtomicBool,
}

/// Letters on the first rank.
#[derive(Default)]
struct Posted {
    letters: Vec<Option<Vec<u8>>>,
    /// Bytes of them.
    bytes: usize,
    /// Of each rank what has come of its next one.
    begun: BTreeMap<i32, Vec<u8>>,
}

impl World {
    fn start() -> Result<Option<Arc<World>>> {
        let wanted = Threading::Multiple;
        let (universe, threading) = mpi::initialize_with_threading(wanted)
            .ok_or_else(|| Error::engine("starting MPI", "it runs already", "report it"))?;
        let world = universe.world();
        if world.size() == 1 {
            return Ok(None);
        }
        if threading < wanted {
            let advice = "use Open MPI or MPICH as distributions have them";
            return Err(Error::engine("starting MPI", "it does not allow several threads", advice));
        }
        let own = mpi::environment::processor_name().unwrap_or_else(|_| "unknown".into());
        let cost = &Mutex::default();
        let hosts: Vec<String> = gather(&world, own.as_bytes(), cost)?
            .into_iter()
            .map(|name| String::from_utf8_lossy(&name).into_owned())
            .collect();
        let names =
            hosts.iter().enumerate().map(|(rank, host)| format!("rank {rank} on {host}")).collect();
        let shared = Arc::new(Shared {
            names,
            next: Mutex::default(),
            stop: Mutex::default(),
            posted: Mutex::default(),
            done: AtomicBool::new(false),
        });
        let speaker = {
            let shared = shared.clone();
            let speak = move || Speaker::new(&shared).run();
            std::thread::Builder::new().name("mpi".into()).spawn(speak)
        };
        let speaker = speaker.map_err(Error::io("start", "a thread"))?;
        Ok(Some(Arc::new(World {
            shared,
            rank: world.rank() as usize,
            hosts,
            queues: AtomicU64::new(0),
            agreed: AtomicBool::new(false),
            cost: Mutex::default(),
            running: Mutex::new(Some((speaker, universe))),
        })))
    }
}

/// The communicator of all ranks; a handle that is bound to no thread, so each makes its own.
fn world() -> SimpleCommunicator {
    SimpleCommunicator::world()
}

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
}

/// Sleeps as long as it is worth after having waited since `start`: short at first, for what comes soon.
fn nap(start: Instant) {
    let nap = (start.elapsed() / 32).clamp(Duration::from_micros(20), Duration::from_micros(500));
    std::thread::sleep(nap);
}

fn wait<'a, D: ?Sized, S: Scope<'a>>(mut request: Request<'a, D, S>) {
    let start = Instant::now();
    while let Err(unfinished) = request.test() {
        request = unfinished;
        nap(start);
    }
}

/// Counts what a call costs that sends and receives so many bytes.
fn counted<T>(cost: &Mutex<Cost>, bytes: usize, call: impl FnOnce() -> T) -> T {
    let start = Instant::now();
    let outcome = call();
    let mut cost = locked(cost);
    cost.seconds += start.elapsed().as_secs_f64();
    cost.bytes += bytes as u64;
    outcome
}

/// Counts what a call costs that is short but for waiting.
fn waited<T>(cost: &Mutex<Cost>, bytes: usize, call: impl FnOnce() -> T) -> T {
    let start = Instant::now();
    let outcome = call();
    let mut cost = locked(cost);
    cost.waited += start.elapsed().as_secs_f64();
    cost.bytes += bytes as u64;
    outcome
}

/// Where each of these parts begins.
fn starts(counts: &[i32]) -> Vec<i32> {
    counts.iter().scan(0, |at, n| Some(std::mem::replace(at, *at + n))).collect()
}

fn counts(of: &[usize]) -> Result<Vec<i32>> {
    let too_many = |_| {
        let advice = "lower --micro-batch-tokens or --prompts-per-step";
        Error::engine("sharing work", "a message of 2^31 numbers or more", advice)
    };
    of.iter().map(|&n| i32::try_from(n).map_err(too_many)).collect()
}

fn gather(world: &SimpleCommunicator, own: &[u8], cost: &Mutex<Cost>) -> Result<Vec<Vec<u8>>> {
    let (size, rank) = (world.size() as usize, world.rank() as usize);
    let mut lengths = vec![0u64; size];
    waited(cost, 8 * 2 * (size - 1), || {
        let length = [own.len() as u64];
        scope(|s| wait(world.immediate_all_gather_into(s, &length[..], &mut lengths[..])));
    });
    let mut all: Vec<Vec<u8>> = lengths.iter().map(|&n| Vec::with_capacity(n as usize)).collect();
    let most = lengths.iter().max().map_or(0, |&n| n as usize);
    let step = (MOST / size).max(1);
    for from in (0..most).step_by(step) {
        let part = |n: usize| n.saturating_sub(from).min(step);
        let got = counts(&lengths.iter().map(|&n| part(n as usize)).collect::<Vec<_>>())?;
        let displacements = starts(&got);
        let mut bytes = vec![0u8; got.iter().map(|&n| n as usize).sum()];
        let send = &own[from.min(own.len())..][..part(own.len())];
        counted(cost, (size - 1) * send.len() + bytes.len() - got[rank] as usize, || {
            let mut into = PartitionMut::new(&mut bytes[..], &got[..], &displacements[..]);
            scope(|s| wait(world.immediate_all_gather_varcount_into(s, send, &mut into)));
        });
        for (all, (&n, &at)) in all.iter_mut().zip(got.iter().zip(&displacements)) {
            all.extend_from_slice(&bytes[at as usize..][..n as usize]);
        }
    }
    Ok(all)
}

impl Link for World {
    fn rank(&self) -> usize {
        self.rank
    }

    fn size(&self) -> usize {
        self.hosts.len()
    }

    fn local_rank(&self) -> usize {
        self.hosts[..self.rank].iter().filter(|host| **host == self.hosts[self.rank]).count()
    }

    fn hosts(&self) -> &[String] {
        &self.hosts
    }

    fn new_queue(&self) -> u64 {
        self.queues.fetch_add(1, Ordering::Relaxed)
    }

    fn take(&self, queue: u64) -> Result<usize> {
        let world = world();
        if self.rank == 0 {
            return Ok(self.shared.take(queue) as usize);
        }
        Ok(waited(&self.cost, 16, || {
            let first = world.process_at_rank(0);
            first.send_with_tag(&queue, TAKE);
            let start = Instant::now();
            loop {
                if let Some((message, _)) = first.immediate_matched_probe_with_tag(GIVEN) {
                    return message.matched_receive::<u64>().0 as usize;
                }
                nap(start);
            }
        }))
    }

    fn gather(&self, own: &[u8]) -> Result<Vec<Vec<u8>>> {
        gather(&world(), own, &self.cost)
    }

    fn exchange(&self, values: &[f32], sent: &[usize], expected: &[usize]) -> Result<Vec<f32>> {
        let (world, rank) = (world(), self.rank);
        let (send, receive) = (counts(sent)?, counts(expected)?);
        let (send_at, receive_at) = (starts(&send), starts(&receive));
        let mut got = vec![0f32; expected.iter().sum()];
        counts(&[values.len(), got.len()])?;
        let crossing = values.len() - sent[rank] + got.len() - expected[rank];
        counted(&self.cost, 4 * crossing, || {
            let from = Partition::new(values, &send[..], &send_at[..]);
            let mut into = PartitionMut::new(&mut got[..], &receive[..], &receive_at[..]);
            scope(|s| wait(world.immediate_all_to_all_varcount_into(s, &from, &mut into)));
        });
        Ok(got)
    }

    fn post(&self, letter: Option<&[u8]>) -> Result<()> {
        let (world, most) = (world(), MOST - 1);
        let first = world.process_at_rank(0);
        let send = |kind: u8, part: &[u8]| {
            let bytes = [&[kind], part].concat();
            counted(&self.cost, bytes.len(), || {
                scope(|s| wait(first.immediate_send_with_tag(s, &bytes[..], POST)));
            });
        };
        match letter {
            None => send(NO_MORE, &[]),
            Some(bytes) => {
                let last = bytes.len().saturating_sub(1) / most * most;
                (0..last).step_by(most).for_each(|at| send(MORE_FOLLOWS, &bytes[at..][..most]));
                send(WHOLE, &bytes[last..]);
            }
        }
        Ok(())
    }

    fn posted(&self) -> Vec<Option<Vec<u8>>> {
        let mut posted = locked(&self.shared.posted);
        let letters = std::mem::take(&mut posted.letters);
        locked(&self.cost).bytes += std::mem::take(&mut posted.bytes) as u64;
        letters
    }

    fn wait_for_post(&self) {
        waited(&self.cost, 0, || std::thread::sleep(Duration::from_millis(2)));
    }

    fn share_stop(&self, flag: Arc<AtomicBool>) {
        // mpirun hands this one on to all ranks, and Slurm sends it when it is asked to (--signal=USR1@60).
        #[cfg(unix)]
        let _ = signal_hook::flag::register(signal_hook::consts::SIGUSR1, flag.clone());
        *locked(&self.shared.stop) = Some(flag);
    }

    fn take_cost(&self) -> Cost {
        std::mem::take(&mut locked(&self.cost))
    }

    fn agree(&self) {
        self.agreed.store(true, Ordering::Relaxed);
    }

    fn has_agreed(&self) -> bool {
        self.agreed.load(Ordering::Relaxed)
    }

    fn leave(&self) {
        let Some((speaker, universe)) = locked(&self.running).take() else { return };
        wait(world().immediate_barrier());
        self.shared.done.store(true, Ordering::Relaxed);
        let _ = speaker.join();
        drop(universe);
    }

    fn abort(&self) -> ! {
        end_all()
    }
}

/// Ends all ranks; what was printed before has a moment to arrive.
fn end_all() -> ! {
    std::thread::spawn(|| {
        std::thread::sleep(Duration::from_secs(10));
        std::process::exit(1)
    });
    std::thread::sleep(Duration::from_millis(300));
    world().abort(1)
}

impl Shared {
    fn take(&self, queue: u64) -> u64 {
        let mut next = locked(&self.next);
        // Every rank has left those that are so old.
        next.retain(|old, _| old + 1024 > queue);
        let next = next.entry(queue).or_default();
        std::mem::replace(next, *next + 1)
    }

    fn stops(&self) -> bool {
        locked(&self.stop).as_ref().is_some_and(|flag| flag.load(Ordering::Relaxed))
    }

    fn set_stop(&self) {
        if let Some(flag) = locked(&self.stop).as_ref() {
            flag.store(true, Ordering::Relaxed);
        }
    }
}

/// Speaks with the other ranks, beside the work.
struct Speaker<'s> {
    shared: &'s Shared,
    /// When each rank was heard of.
    heard: Vec<Instant>,
    /// When this one last spoke, and what of stopping it said.
    spoke: Option<(Instant, bool)>,
}

impl<'s> Speaker<'s> {
    fn new(shared: &'s Shared) -> Speaker<'s> {
        Speaker { shared, heard: vec![Instant::now(); shared.names.len()], spoke: None }
    }

    fn run(mut self) {
        let world = world();
        let first = world.rank() == 0;
        let mut active = Instant::now();
        let mut before = Instant::now();
        while !self.shared.done.load(Ordering::Relaxed) {
            if first && (self.hand_out(&world) | self.take_post(&world)) {
                active = Instant::now();
            }
            self.hear(&world);
            if before.elapsed() > SILENT / 4 {
                // This process was stopped itself, and could hear nobody.
                self.heard.fill(Instant::now());
            }
            before = Instant::now();
            self.speak(&world);
            self.look();
            match first {
                true => std::thread::sleep(nap_after(active)),
                false => std::thread::sleep(Duration::from_millis(20)),
            }
        }
    }

    /// Whether anybody asked for an item.
    fn hand_out(&self, world: &SimpleCommunicator) -> bool {
        let mut any = false;
        while let Some(message) = world.any_process().immediate_matched_probe_with_tag(TAKE) {
            let from = message.1.source_rank();
            let (queue, _) = message.matched_receive_vec::<u64>();
            world.process_at_rank(from).send_with_tag(&self.shared.take(queue[0]), GIVEN);
            any = true;
        }
        any
    }

    /// Whether a letter came.
    fn take_post(&self, world: &SimpleCommunicator) -> bool {
        let mut any = false;
        // Who sends more than is read waits.
        loop {
            if locked(&self.shared.posted).bytes >= POST_BYTES {
                return any;
            }
            let probe = world.any_process().immediate_matched_probe_with_tag(POST);
            let Some(message) = probe else { return any };
            let from = message.1.source_rank();
            let (part, _) = message.matched_receive_vec::<u8>();
            let mut posted = locked(&self.shared.posted);
            posted.bytes += part.len();
            match part[0] {
                NO_MORE => posted.letters.push(None),
                kind => {
                    posted.begun.entry(from).or_default().extend_from_slice(&part[1..]);
                    if kind == WHOLE {
                        let letter = posted.begun.remove(&from);
                        posted.letters.push(letter);
                    }
                }
            }
            any = true;
        }
    }

    fn hear(&mut self, world: &SimpleCommunicator) {
        while let Some(message) = world.any_process().immediate_matched_probe_with_tag(ALIVE) {
            let from = message.1.source_rank() as usize;
            let (stops, _) = message.matched_receive_vec::<u8>();
            self.heard[from] = Instant::now();
            if stops[0] != 0 {
                self.shared.set_stop();
            }
        }
    }

    /// The first rank speaks to all, the others to the first.
    fn speak(&mut self, world: &SimpleCommunicator) {
        let stops = self.shared.stops();
        let due = |&(at, said): &(Instant, bool)| at.elapsed() > BEAT || said != stops;
        if self.spoke.as_ref().is_some_and(|spoke| !due(spoke)) {
            return;
        }
        let to = if world.rank() == 0 { 1..world.size() } else { 0..1 };
        to.for_each(|rank| world.process_at_rank(rank).send_with_tag(&(stops as u8), ALIVE));
        self.spoke = Some((Instant::now(), stops));
    }

    fn look(&self) {
        let own = world().rank() as usize;
        let watched = if own == 0 { 1..self.heard.len() } else { 0..1 };
        for rank in watched {
            if self.heard[rank].elapsed() > SILENT {
                eprintln!(
                    "error: {}: nothing was heard of it for {} s; all ranks are ended, and the newest checkpoint is as it was",
                    self.shared.names[rank],
                    SILENT.as_secs()
                );
                end_all()
            }
        }
    }
}

/// Short naps while items are asked for.
fn nap_after(active: Instant) -> Duration {
    (active.elapsed() / 16).clamp(Duration::from_micros(50), Duration::from_millis(1))
}
