//! How many threads are worth starting here.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

/// Cores that this process may use, hyper-threads of one core counted once: they share the units that matrix
/// products keep busy. Linux says which belong together; elsewhere every processor counts as a core.
pub fn usable_cores() -> usize {
    let processors = std::thread::available_parallelism().map_or(1, |n| n.get());
    physical_cores(Path::new("/sys/devices/system/cpu"))
        .map_or(processors, |cores| cores.clamp(1, processors))
}

/// Cores in a folder like `/sys/devices/system/cpu`: its processors, by the set that each shares a core with.
fn physical_cores(folder: &Path) -> Option<usize> {
    let mut cores = BTreeSet::new();
    for entry in fs::read_dir(folder).ok()? {
        let path = entry.ok()?.path();
        let name = path.file_name()?.to_string_lossy().into_owned();
        let number = name.strip_prefix("cpu").and_then(|n| n.parse::<usize>().ok());
        // A processor that is switched off has no topology.
        if number.is_some()
            && let Ok(siblings) = fs::read_to_string(path.join("topology/thread_siblings_list"))
        {
            cores.insert(siblings.trim().to_string());
        }
    }
    (!cores.is_empty()).then_some(cores.len())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn siblings_are_one_core() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(physical_cores(dir.path()), None);
        for (cpu, siblings) in [("cpu0", "0,4\n"), ("cpu4", "0,4\n"), ("cpu1", "1\n")] {
            let topology = dir.path().join(cpu).join("topology");
            fs::create_dir_all(&topology).unwrap();
            fs::write(topology.join("thread_siblings_list"), siblings).unwrap();
        }
        fs::create_dir_all(dir.path().join("cpu5")).unwrap(); // switched off
        fs::create_dir_all(dir.path().join("cpufreq")).unwrap();
        assert_eq!(physical_cores(dir.path()), Some(2));
        assert!(usable_cores() >= 1);
    }
}
