//! How many of a pool's threads have a core to themselves at the moment.
//!
//! Threads of a graph meet after each node. Where another process holds one of their cores, all of them wait for the one
//! that shares it, and two threads are slower than one. So they are as many as there are free cores. Where others
//! want every core, fewer threads would only mean a smaller share, and they stay as many as they are.

use std::time::{Duration, Instant};

/// Linux's count of running threads, of the whole machine.
const COUNT: &str = "/proc/loadavg";
/// This process's threads.
const OWN: &str = "/proc/self/task";
/// How often it is asked, at most.
const EVERY: Duration = Duration::from_millis(20);
/// How long after a computation the other threads of a pool are asleep, where they have a core.
const ASLEEP: Duration = Duration::from_micros(50);
/// Over how long it is averaged: a process that runs for a moment is none to make way for.
const MEMORY: Duration = Duration::from_millis(100);

/// What is known of other processes.
pub(super) struct Neighbours {
    /// Whether anybody says.
    told: bool,
    cores: f64,
    asked: Option<Instant>,
    /// Their running threads, on average.
    running: f64,
}

impl Neighbours {
    pub(super) fn new() -> Neighbours {
        let cores = std::thread::available_parallelism().map_or(1, |n| n.get()) as f64;
        Neighbours { told: true, cores, asked: None, running: 0.0 }
    }

    /// So many, whoever looks, beside as many cores.
    pub(super) fn assumed(running: usize, cores: usize) -> Neighbours {
        let (cores, running) = (cores as f64, running as f64);
        Neighbours { told: false, cores, asked: None, running }
    }

    /// Counts them just after a computation, when soon nothing of this process runs but the caller.
    pub(super) fn look(&mut self) {
        let now = Instant::now();
        let since = self.asked.map(|asked| now - asked);
        if !self.told || since.is_some_and(|since| since < EVERY) {
            return;
        }
        self.asked = Some(now);
        while now.elapsed() < ASLEEP {
            std::hint::spin_loop();
        }
        let all = std::fs::read_to_string(COUNT).ok().as_deref().and_then(running);
        self.told = all.is_some();
        let others = match all {
            None | Some(0 | 1) => 0.0,
            Some(all) => all.saturating_sub(own_running()) as f64,
        };
        let weight = since.map_or(0.0, |since| (-since.div_duration_f64(MEMORY)).exp());
        self.running = weight * self.running + (1.0 - weight) * others;
    }

    /// Threads of `n` that have a core.
    pub(super) fn spare(&self, n: usize) -> usize {
        threads(n, self.cores, self.running)
    }
}

/// This process's own running threads, the caller among them. One that shares a core with the caller, or with somebody else,
/// is not asleep until it has had its turn.
fn own_running() -> usize {
    let Ok(tasks) = std::fs::read_dir(OWN) else { return 1 };
    let states = tasks.flatten().filter_map(|task| {
        let stat = std::fs::read_to_string(task.path().join("stat")).ok()?;
        state(&stat)
    });
    states.filter(|&state| state == 'R').count().max(1)
}

/// The state of `11206 (name) S 1 ...`; a name may hold anything.
fn state(stat: &str) -> Option<char> {
    stat.rsplit_once(") ")?.1.chars().next()
}

/// The running threads of `0.20 0.18 0.12 RUNNING/ALL 11206`, the reader among them.
fn running(text: &str) -> Option<usize> {
    text.split(' ').nth(3)?.split('/').next()?.parse().ok()
}

fn threads(n: usize, cores: f64, others: f64) -> usize {
    let free = cores - others;
    if others < 0.5 || free < 0.1 { n } else { n.min((free.round() as usize).max(1)) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn as_many_threads_as_cores_are_free() {
        // Cores, others' running threads, threads of eight.
        let cases = [
            (8.0, 0.0, 8),
            (8.0, 0.4, 8),
            (8.0, 1.0, 7),
            (8.0, 6.2, 2),
            (8.0, 7.8, 1),
            (8.0, 8.0, 8), // a fair share
            (16.0, 1.0, 8),
            (16.0, 9.0, 7),
        ];
        for (cores, others, want) in cases {
            assert_eq!(threads(8, cores, others), want, "{cores} cores, {others} others");
        }
    }

    #[test]
    fn the_count_is_read() {
        assert_eq!(running("0.20 0.18 0.12 3/80 11206\n"), Some(3));
        assert_eq!(running("no numbers"), None);
        assert_eq!(state("7 (a name) S 8) R 1 7 7 0"), Some('R'));
        assert_eq!(state("7"), None);
        #[cfg(target_os = "linux")]
        assert!(own_running() >= 1);
    }
}
