//! The imitated VM: its run state, its migration, and what is told of them.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{File, OpenOptions};
use std::io::Write;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{SystemTime, UNIX_EPOCH};

use rustix::fs::{FlockOperation, flock};
use serde_json::{Value, json};
use tokio::net::TcpListener;
use tokio::sync::{Notify, broadcast};
use tokio::time::Instant;

use super::Version;
use super::disks::Disks;
use super::faults::Faults;
use super::options::Options;
use crate::machine::RunState;

/// Events kept for a client that reads slowly.
const EVENTS_KEPT_MAX: usize = 1024;

pub(super) struct Vm {
    pub(super) options: Options,
    pub(super) version: Version,
    pub(super) faults: Faults,
    /// Lines of events for whoever is connected.
    pub(super) events: broadcast::Sender<String>,
    /// Something about the migration has been ordered.
    pub(super) ordered: Notify,
    /// `migrate-pause` has come.
    pub(super) pause_ordered: Notify,
    /// The program is to end.
    pub(super) quit: Notify,
    state: Mutex<State>,
}

pub(super) struct State {
    pub(super) run_state: RunState,
    /// Whether an incoming guest runs as soon as it is loaded (`cont` came before).
    pub(super) autostart: bool,
    pub(super) capabilities: BTreeSet<String>,
    pub(super) parameters: BTreeMap<String, Value>,
    pub(super) objects: BTreeMap<String, Value>,
    pub(super) migration: Migration,
    pub(super) disks: Disks,
    /// What the guest has done by order.
    pub(super) deeds: BTreeSet<&'static str>,
    /// Descriptors handed over, by the name or the number of their set.
    pub(super) descriptors: BTreeMap<String, OwnedFd>,
    /// What `calc-dirty-rate` was told, and when.
    pub(super) measuring: Option<(Value, Instant)>,
    running: Option<File>,
    /// The locks of the disks, while this end has them.
    locks: Option<Vec<File>>,
}

/// The one migration, in or out.
#[derive(Debug, Default)]
pub(super) struct Migration {
    pub(super) status: &'static str,
    pub(super) error: Option<String>,
    pub(super) total_bytes: u64,
    pub(super) transferred_bytes: u64,
    pub(super) total_time_ms: u64,
    pub(super) downtime_ms: Option<u64>,
    pub(super) listens_on: Option<std::net::SocketAddr>,
    /// `migrate-continue` has come.
    pub(super) continued: bool,
    /// `migrate_cancel` has come.
    pub(super) cancelled: bool,
    /// `migrate-start-postcopy` has come.
    pub(super) postcopy_ordered: bool,
    pub(super) postcopy_bytes: u64,
    /// `migrate` with `resume` has come.
    pub(super) resume_to: Option<String>,
    /// Where it listens: where post-copy may come to the end of it.
    pub(super) listener: Option<TcpListener>,
    /// `migrate-recover` has come.
    pub(super) recover_on: Option<TcpListener>,
}

impl Vm {
    pub(super) fn new(options: Options, version: Version, faults: Faults) -> Self {
        let run_state = if options.incoming { RunState::InMigrate } else { RunState::Prelaunch };
        Self {
            options,
            version,
            faults,
            events: broadcast::channel(EVENTS_KEPT_MAX).0,
            ordered: Notify::new(),
            pause_ordered: Notify::new(),
            quit: Notify::new(),
            state: Mutex::new(State {
                run_state,
                autostart: false,
                capabilities: BTreeSet::new(),
                parameters: BTreeMap::new(),
                objects: BTreeMap::new(),
                migration: Migration::default(),
                disks: Disks::default(),
                deeds: BTreeSet::new(),
                descriptors: BTreeMap::new(),
                measuring: None,
                running: None,
                locks: None,
            }),
        }
    }

    pub(super) fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn emit(&self, name: &str, data: Value) {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let timestamp = json!({ "seconds": now.as_secs(), "microseconds": now.subsec_micros() });
        let mut event = json!({ "event": name, "timestamp": timestamp });
        if !data.is_null() {
            event["data"] = data;
        }
        // Nobody connected is no error.
        let _ = self.events.send(event.to_string());
    }

    /// Changes the state of the migration and tells it, as the capability asks.
    pub(super) fn migration_becomes(&self, status: &'static str) {
        let mut state = self.state();
        state.migration.status = status;
        if state.capabilities.contains("events") {
            self.emit("MIGRATION", json!({ "status": status }));
        }
    }

    /// Takes the disks, all or none, unless they are taken already.
    pub(super) fn take_disks(&self) -> Result<(), String> {
        let mut locks = Vec::new();
        if self.state().locks.is_some() {
            return Ok(());
        }
        for disk in self.options.writable_disks() {
            let file = File::open(disk).map_err(|error| error.to_string())?;
            flock(&file, FlockOperation::NonBlockingLockExclusive)
                .map_err(|_| "Failed to get \"write\" lock".to_owned())?;
            locks.push(file);
        }
        self.state().locks = Some(locks);
        Ok(())
    }

    /// Whether its disks have been inactive since it was loaded.
    pub(super) fn arrived_and_never_ran(&self) -> bool {
        let has_disks = !self.options.block_nodes.is_empty();
        self.options.incoming && has_disks && self.state().locks.is_none()
    }

    /// Lets go of the disks, as a source does that has sent its guest.
    pub(super) fn leave_disks(&self) {
        self.state().locks = None;
    }

    /// Lets the guest run.
    pub(super) fn resume(&self) {
        let mut state = self.state();
        if state.run_state == RunState::Running {
            return;
        }
        state.run_state = RunState::Running;
        state.running = self.claim();
        drop(state);
        self.say_on_console("the guest runs\n");
        self.emit("RESUME", Value::Null);
    }

    /// Stops the guest into a state; tells it only if it ran.
    pub(super) fn stop_into(&self, run_state: RunState) {
        let mut state = self.state();
        let ran = state.run_state == RunState::Running;
        state.run_state = run_state;
        state.running = None;
        drop(state);
        if ran {
            self.emit("STOP", Value::Null);
        }
    }

    /// Lets the guest do at a point of its migration what is ordered, once. What it does as it is being stopped is told,
    /// and changes nothing any more.
    pub(super) fn guest_passes(&self, point: &str) {
        for deed in ["power-off", "panic", "reset"] {
            if !self.faults.guest_does(deed, point) || !self.state().deeds.insert(deed) {
                continue;
            }
            let runs = self.state().run_state == RunState::Running;
            let becomes = match deed {
                "power-off" => {
                    self.emit("SHUTDOWN", json!({ "guest": true, "reason": "guest-shutdown" }));
                    RunState::Shutdown
                }
                "panic" => {
                    self.emit("GUEST_PANICKED", json!({ "action": "pause" }));
                    RunState::GuestPanicked
                }
                _ => {
                    self.emit("RESET", json!({ "guest": true, "reason": "guest-reset" }));
                    continue;
                }
            };
            if runs {
                self.stop_into(becomes);
            }
        }
    }

    /// Takes the lock that says that this guest runs; writes down if somebody has it already.
    fn claim(&self) -> Option<File> {
        let dir = PathBuf::from(std::env::var_os("FAKE_QEMU_WATCH_DIR")?);
        let lock = append_to(&dir.join(self.options.uuid.to_string()))?;
        if flock(&lock, FlockOperation::NonBlockingLockExclusive).is_err() {
            self.violates("runs twice");
        }
        Some(lock)
    }

    /// Writes down what must never be.
    pub(super) fn violates(&self, what: &str) {
        let dir = std::env::var_os("FAKE_QEMU_WATCH_DIR").map(PathBuf::from);
        let file = dir.and_then(|dir| append_to(&dir.join("violations")));
        if let Some(mut file) = file {
            let line = format!("{} {what}\n", self.options.uuid);
            // A test that can not be told sees its own folder gone.
            let _ = file.write_all(line.as_bytes());
        }
    }

    fn say_on_console(&self, text: &str) {
        let log = self.options.console_log.as_deref().and_then(append_to);
        if let Some(mut log) = log {
            // A console that can not be written is not what is tested.
            let _ = log.write_all(text.as_bytes());
        }
    }
}

fn append_to(path: &Path) -> Option<File> {
    OpenOptions::new().create(true).append(true).open(path).ok()
}
