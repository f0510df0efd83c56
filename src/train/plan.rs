//! What a run will take of memory, known before it begins.

/// Largest resident memory of this process so far, bytes (`VmHWM`); 0 where the system does not say.
pub fn peak_bytes() -> u64 {
    size("/proc/self/status", "VmHWM:")
}

/// Memory that the system could still give, bytes; 0 where it does not say.
pub fn available_bytes() -> u64 {
    size("/proc/meminfo", "MemAvailable:")
}

/// A size that a system file lists under `key`, bytes; 0 where there is none.
fn size(file: &str, key: &str) -> u64 {
    let text = std::fs::read_to_string(file).unwrap_or_default();
    let line = text.lines().find_map(|line| line.strip_prefix(key));
    line.and_then(|l| l.trim().strip_suffix("kB")?.trim().parse::<u64>().ok())
        .map_or(0, |k| k << 10)
}
