//! The lab's processes: whatever is in one of its network namespaces is the lab's, and nothing else is.
//!
//! That rule needs no list of what was started: agents, QEMUs, shells of `lab exec` are all found, also those that nobody
//! had time to write down. A process is signalled through a pidfd that is held while its namespace is checked, so that a
//! process which merely got the same id is never hit.

use std::collections::HashMap;
use std::fs;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use nix::sys::wait::{WaitPidFlag, waitpid};
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use serde::{Deserialize, Serialize};

use crate::error::LabError;
use crate::namespace::NamespaceId;

/// How long killed processes may take to be gone: a QEMU with a large guest frees much memory.
const END_MAX: Duration = Duration::from_secs(20);
const END_POLL: Duration = Duration::from_millis(5);

/// A process in a namespace of the lab.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Process {
    /// Its id.
    pub pid: i32,
    /// When it started, in clock ticks since boot: with the id, it names this process and no later one.
    pub start_ticks: u64,
    /// Its command line, words joined by blanks.
    pub command: String,
}

impl Process {
    /// Whether this very process still runs; a zombie does not.
    #[must_use]
    pub fn is_alive(&self) -> bool {
        Stat::read(self.pid)
            .is_some_and(|stat| stat.start_ticks == self.start_ticks && !stat.is_zombie)
    }

    /// The process with this id, if there is one that is no zombie.
    pub(crate) fn with_id(pid: i32) -> Option<Self> {
        let stat = Stat::read(pid).filter(|stat| !stat.is_zombie)?;
        let words = fs::read(format!("/proc/{pid}/cmdline")).ok()?;
        let words = String::from_utf8_lossy(&words).trim_end_matches('\0').replace('\0', " ");
        Some(Self { pid, start_ticks: stat.start_ticks, command: words })
    }

    /// Sends a signal to this very process; nothing happens if it has ended.
    pub(crate) fn signal(&self, signal: Signal) {
        let Some(pid) = Pid::from_raw(self.pid) else { return };
        let Ok(pidfd) = pidfd_open(pid, PidfdFlags::empty()) else { return };
        // Looked at while the pidfd pins the id: from here on it cannot become another process.
        if self.is_alive() {
            let _ended_meanwhile = pidfd_send_signal(pidfd, signal);
        }
    }
}

/// The processes in each of some namespaces, but never this one.
pub(crate) fn in_namespaces(ids: &[NamespaceId]) -> HashMap<NamespaceId, Vec<Process>> {
    let mut found: HashMap<NamespaceId, Vec<Process>> = HashMap::new();
    let own = i32::try_from(std::process::id()).unwrap_or_default();
    let Ok(entries) = fs::read_dir("/proc") else { return found };
    let pids =
        entries.flatten().filter_map(|entry| entry.file_name().to_str()?.parse::<i32>().ok());
    for pid in pids.filter(|pid| *pid != own) {
        let Ok(id) = NamespaceId::of(Path::new(&format!("/proc/{pid}/ns/net"))) else { continue };
        if ids.contains(&id) {
            found.entry(id).or_default().extend(Process::with_id(pid));
        }
    }
    found
}

/// Kills everything in some namespaces, and returns when all of it is gone; a child of a killed process is found in the
/// next round.
pub(crate) fn kill_all(ids: &[NamespaceId]) -> Result<(), LabError> {
    let began = Instant::now();
    loop {
        let left: Vec<Process> = in_namespaces(ids).into_values().flatten().collect();
        if left.is_empty() {
            return Ok(());
        }
        if began.elapsed() > END_MAX {
            return Err(LabError::Undying {
                pids: left.iter().map(|process| process.pid).collect(),
            });
        }
        for process in &left {
            process.signal(Signal::KILL);
        }
        for process in &left {
            wait_for_end(process, began + END_MAX);
        }
    }
}

/// Returns when the process has ended, or at the deadline. If it is a child of this process, it leaves no zombie.
pub(crate) fn wait_for_end(process: &Process, deadline: Instant) {
    while process.is_alive() && Instant::now() < deadline {
        thread::sleep(END_POLL);
    }
    // An error says that it is no child of this process: then its parent or init takes care of it.
    let _not_ours = waitpid(nix::unistd::Pid::from_raw(process.pid), Some(WaitPidFlag::WNOHANG));
}

/// The part of `/proc/PID/stat` that matters here.
struct Stat {
    start_ticks: u64,
    is_zombie: bool,
}

impl Stat {
    fn read(pid: i32) -> Option<Self> {
        Self::parse(&fs::read_to_string(format!("/proc/{pid}/stat")).ok()?)
    }

    /// Fields after the name, which is in parentheses and may hold anything: the state is the 3rd field, the start the 22nd.
    fn parse(stat: &str) -> Option<Self> {
        let mut fields = stat[stat.rfind(')')? + 1..].split_whitespace();
        let state = fields.next()?;
        let start_ticks = fields.nth(18)?.parse().ok()?;
        Some(Self { start_ticks, is_zombie: matches!(state, "Z" | "X") })
    }
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::*;

    #[test]
    fn stat_is_read_whatever_the_name_is() {
        let fields = "S 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 4711 20";
        let stat = Stat::parse(&format!("7 (a) Z (b) {fields}")).unwrap();
        assert!(stat.start_ticks == 4711 && !stat.is_zombie);
        assert!(Stat::parse(&format!("7 (x) {}", fields.replace('S', "Z"))).unwrap().is_zombie);
        assert!(Stat::parse("7 (x").is_none());
    }

    #[test]
    fn a_process_is_itself_until_it_ends() {
        let mut child = Command::new("sleep").arg("60").spawn().unwrap();
        let process = Process::with_id(i32::try_from(child.id()).unwrap()).unwrap();
        assert!(process.is_alive());
        let impostor = Process { start_ticks: process.start_ticks + 1, ..process.clone() };
        impostor.signal(Signal::KILL);
        // A signal that was sent would have this long to arrive.
        thread::sleep(Duration::from_millis(100));
        assert!(process.is_alive() && !impostor.is_alive());
        process.signal(Signal::KILL);
        wait_for_end(&process, Instant::now() + END_MAX);
        assert!(!process.is_alive());
        // It was reaped already.
        assert!(child.wait().is_err());
    }
}
