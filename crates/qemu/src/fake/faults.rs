//! What goes wrong where, read again at every point.

use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::process::{Signal, getpid, kill_process};

/// Pause between two looks at the faults while something stalls.
const STALL_POLL_MILLISECONDS: u64 = 5;

/// Where the faults are written.
#[derive(Debug)]
pub(super) struct Faults {
    constant: String,
    files: Vec<PathBuf>,
}

/// A point at which the faults say no.
#[derive(Debug)]
pub(super) struct Refused {
    point: String,
}

impl std::fmt::Display for Refused {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(formatter, "refused at '{}' by order", self.point)
    }
}

impl Faults {
    /// Those of a fake with this socket.
    pub(super) fn of(socket: Option<&Path>) -> Self {
        let mut files = Vec::new();
        if let Some(socket) = socket {
            let mut path = socket.as_os_str().to_owned();
            path.push(".faults");
            files.push(path.into());
        }
        files.extend(std::env::var_os("FAKE_QEMU_FAULTS_FILE").map(PathBuf::from));
        Self { constant: std::env::var("FAKE_QEMU_FAULTS").unwrap_or_default(), files }
    }

    fn words(&self) -> Vec<String> {
        let mut text = self.constant.clone();
        for file in &self.files {
            text.push(' ');
            // A file that is not there holds no faults.
            text.push_str(&std::fs::read_to_string(file).unwrap_or_default());
        }
        let separator = |c: char| c == ',' || c.is_whitespace();
        text.split(separator).filter(|word| !word.is_empty()).map(str::to_owned).collect()
    }

    fn has(&self, kind: &str, point: &str) -> bool {
        let wanted = format!("{kind}:{point}");
        self.words().contains(&wanted)
    }

    /// Passes a point: dies, stalls or refuses there if that is ordered.
    pub(super) async fn at(&self, point: &str) -> Result<(), Refused> {
        if self.has("die", point) {
            self.die();
        }
        while self.has("stall", point) {
            tokio::time::sleep(Duration::from_millis(STALL_POLL_MILLISECONDS)).await;
        }
        if self.has("refuse", point) {
            return Err(Refused { point: point.to_owned() });
        }
        Ok(())
    }

    /// Ends at once. Nothing is tidied up, as when a real one is killed or fails an assertion.
    pub(super) fn die(&self) {
        let _ = kill_process(getpid(), Signal::KILL);
    }

    /// Whether success is to be told without being true.
    pub(super) fn lies_at(&self, point: &str) -> bool {
        self.has("lie", point)
    }

    /// Whether there is no room left for what is written there.
    pub(super) fn is_full(&self, point: &str) -> bool {
        self.has("full", point)
    }

    /// Whether it is there no more, as far as anybody is told.
    pub(super) fn vanishes(&self, point: &str) -> bool {
        self.has("vanish", point)
    }

    /// Whether a guest that runs is asleep.
    pub(super) fn sleeping(&self) -> bool {
        self.has("sleep", "guest")
    }

    /// Whether the host does not let it receive in post-copy.
    pub(super) fn refuses_postcopy(&self) -> bool {
        self.has("refuse", "userfaultfd")
    }

    /// Whether the monitor says nothing.
    pub(super) fn silent(&self) -> bool {
        self.has("silent", "qmp")
    }

    /// Whether the monitor hears nothing but what comes out of band.
    pub(super) fn blocked(&self) -> bool {
        self.has("silent", "in-band")
    }

    /// Whether the guest does something by itself at a point.
    pub(super) fn guest_does(&self, deed: &str, point: &str) -> bool {
        self.has(deed, point)
    }

    /// A number among the faults, or its default.
    pub(super) fn setting(&self, name: &str, default: u64) -> u64 {
        let prefix = format!("{name}=");
        let words = self.words();
        let value = words.iter().rev().find_map(|word| word.strip_prefix(&prefix));
        value.and_then(|value| value.parse().ok()).unwrap_or(default)
    }
}
