//! What the kernel says of this machine, from `/proc`. What cannot be read is 0 or `unknown`: a report goes on.

use whimbrel_api::agent::VmReport;

/// The machine's memory.
pub(super) struct Memory {
    pub(super) total_bytes: u64,
    pub(super) available_bytes: u64,
}

pub(super) fn memory() -> Memory {
    let text = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
    Memory {
        total_bytes: meminfo_bytes(&text, "MemTotal:"),
        available_bytes: meminfo_bytes(&text, "MemAvailable:"),
    }
}

/// A line of `/proc/meminfo`, which counts in units of 1024 bytes.
fn meminfo_bytes(text: &str, field: &str) -> u64 {
    let line = text.lines().find_map(|line| line.strip_prefix(field));
    let number = line.and_then(|rest| rest.split_ascii_whitespace().next());
    number.and_then(|number| number.parse::<u64>().ok()).unwrap_or(0).saturating_mul(1024)
}

pub(super) fn cpus() -> u32 {
    let found = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
    u32::try_from(found).unwrap_or(u32::MAX)
}

pub(super) fn cpu_model() -> String {
    let text = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let line = text.lines().find(|line| line.starts_with("model name"));
    let name = line.and_then(|line| line.split_once(':')).map(|(_, name)| name.trim().to_owned());
    name.unwrap_or_else(|| "unknown".to_owned())
}

/// What running guests may still touch of their memory: `MemAvailable` counts it as free.
pub(super) fn untouched_bytes(vms: &[VmReport]) -> u64 {
    let of_vm = |vm: &VmReport| {
        let pid = vm.engine.as_ref()?.pid;
        Some(vm.definition.memory_bytes.saturating_sub(resident_bytes(pid)?))
    };
    vms.iter().filter_map(of_vm).fold(0, u64::saturating_add)
}

fn resident_bytes(pid: u32) -> Option<u64> {
    let text = std::fs::read_to_string(format!("/proc/{pid}/statm")).ok()?;
    let pages: u64 = text.split_ascii_whitespace().nth(1)?.parse().ok()?;
    let page_bytes = u64::try_from(rustix::param::page_size()).ok()?;
    Some(pages.saturating_mul(page_bytes))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_machine_has_memory_and_processors() {
        let memory = memory();
        assert!(memory.total_bytes > memory.available_bytes && memory.available_bytes > 0);
        assert!(cpus() > 0);
        assert!(resident_bytes(std::process::id()).is_some_and(|bytes| bytes > 0));
    }

    #[test]
    fn meminfo_counts_in_kibibytes() {
        assert_eq!(meminfo_bytes("A:  1 kB\nMemTotal:       12 kB\n", "MemTotal:"), 12 * 1024);
        assert_eq!(meminfo_bytes("", "MemTotal:"), 0);
    }
}
