//! What the system says of memory: how much this process has taken, how much it may take.

use std::collections::HashSet;
use std::fs;
use std::path::{Path, PathBuf};

/// Largest resident memory of this process so far, bytes (`VmHWM`); 0 where the system does not say.
pub fn peak_bytes() -> u64 {
    field(&read("/proc/self/status"), "VmHWM:").unwrap_or(0)
}

/// Resident memory of this process, bytes, without what it maps of these files; 0 where the system does not
/// say.
pub fn resident_besides(files: &[PathBuf]) -> u64 {
    // A file in memory has no path, but a link with the name that its mappings bear.
    let mapped_as = |f: &PathBuf| fs::canonicalize(f).or_else(|_| fs::read_link(f));
    let files: HashSet<PathBuf> =
        files.iter().map(|f| mapped_as(f).unwrap_or_else(|_| f.clone())).collect();
    let (mut bytes, mut counts) = (0, true);
    for line in read("/proc/self/smaps").lines() {
        let first = line.split(' ').next().unwrap_or_default();
        if first.contains('-') && !first.ends_with(':') {
            // A mapping: addresses, rights, offset, device, inode, path.
            let path = line.find('/').map(|at| Path::new(&line[at..]));
            counts = path.is_none_or(|path| !files.contains(path));
        } else if counts {
            bytes += field(line, "Rss:").unwrap_or(0);
        }
    }
    bytes
}

/// Bytes that this process could still take: what the machine has, or the tightest of its control groups;
/// none where the system does not say.
pub fn available_bytes() -> Option<u64> {
    let machine = field(&read("/proc/meminfo"), "MemAvailable:");
    machine.into_iter().chain(group_limits()).min()
}

/// What is left in each control group of this process.
fn group_limits() -> Vec<u64> {
    let mut left = Vec::new();
    for line in read("/proc/self/cgroup").lines() {
        let mut parts = line.splitn(3, ':').skip(1);
        let (Some(controllers), Some(path)) = (parts.next(), parts.next()) else { continue };
        let (root, limit, used) = match controllers {
            "" => ("/sys/fs/cgroup", "memory.max", "memory.current"),
            c if c.split(',').any(|c| c == "memory") => {
                ("/sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes")
            }
            _ => continue,
        };
        let path = Path::new(root).join(path.trim_start_matches('/'));
        for group in path.ancestors().take_while(|p| p.starts_with(root)) {
            let number = |name: &str| read(group.join(name)).trim().parse::<u64>().ok();
            let (Some(limit), Some(used)) = (number(limit), number(used)) else { continue };
            // Cached files give way.
            let stat = read(group.join("memory.stat"));
            let cached: u64 = ["file ", "total_cache "]
                .iter()
                .filter_map(|key| {
                    stat.lines().find_map(|l| l.strip_prefix(key)?.parse::<u64>().ok())
                })
                .sum();
            left.push((limit + cached).saturating_sub(used));
        }
    }
    left
}

fn read(path: impl AsRef<Path>) -> String {
    fs::read_to_string(path).unwrap_or_default()
}

/// `KEY   123 kB` in bytes.
fn field(text: &str, key: &str) -> Option<u64> {
    let value = text.lines().find_map(|line| line.strip_prefix(key))?;
    value.trim().strip_suffix("kB")?.trim().parse::<u64>().ok().map(|k| k << 10)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    #[cfg(target_os = "linux")]
    fn the_system_says_something_that_can_be() {
        let before = peak_bytes();
        // A black box, or the compiler leaves the memory out.
        let filled = std::hint::black_box(vec![1u8; 64 << 20]);
        assert!(peak_bytes() >= before.max(filled.len() as u64), "{before}");
        let besides = resident_besides(&[]);
        assert!(besides >= filled.len() as u64 && besides <= peak_bytes() + (8 << 20), "{besides}");
        assert!(available_bytes().is_some_and(|b| b > 1 << 20), "{:?}", available_bytes());
    }

    #[test]
    fn sizes_are_read_in_kilobytes() {
        assert_eq!(field("A: 1 kB\nVmHWM:\t  12 kB\n", "VmHWM:"), Some(12 << 10));
        assert_eq!(field("VmHWM: 12", "VmHWM:"), None);
    }
}
