//! What QEMU reports by itself, as an open enum with QEMU's own time.
//!
//! An event that this list does not name is [`EventKind::Unknown`], never an error: a newer QEMU
//! sends events that we have not met. Nothing here decides what an event means for a VM; readers
//! that missed some ([`EventError::Lagged`]) query the state again instead of guessing.

use std::time::Duration;

use serde_json::Value;
use tokio::sync::broadcast;

use crate::migrate::MigrationStatus;

/// One event, with the time at which QEMU says that it happened.
#[derive(Debug, Clone, PartialEq)]
pub struct Event {
    /// When it happened, by the clock of QEMU's host.
    pub at: Timestamp,
    /// What happened.
    pub kind: EventKind,
}

/// A moment on the wall clock of the host that QEMU runs on, since the Unix epoch.
///
/// Downtime is the source's [`EventKind::Stop`] to the destination's [`EventKind::Resume`]; the
/// two are comparable only as far as the two hosts' clocks agree.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Timestamp {
    /// Whole seconds.
    pub seconds: i64,
    /// Microseconds within the second, 0..=999 999.
    pub microseconds: i64,
}

impl Timestamp {
    /// Microseconds since the Unix epoch.
    #[must_use]
    pub fn as_micros(&self) -> i64 {
        self.seconds.saturating_mul(1_000_000).saturating_add(self.microseconds)
    }

    /// How much later `self` is than `earlier`; `None` when it is not later (clocks differ).
    #[must_use]
    pub fn since(&self, earlier: Timestamp) -> Option<Duration> {
        let micros = self.as_micros().checked_sub(earlier.as_micros())?;
        u64::try_from(micros).ok().map(Duration::from_micros)
    }
}

/// What happened, as far as we know the word for it.
#[derive(Debug, Clone, PartialEq)]
pub enum EventKind {
    /// The vCPUs have stopped.
    Stop,
    /// The vCPUs run.
    Resume,
    /// The guest is off, or was asked to go; QEMU itself stays up (`-no-shutdown`).
    Shutdown {
        /// Whether the guest did it by itself.
        guest: bool,
        /// QEMU's word for the reason, e.g. `guest-shutdown`, `host-qmp-quit`.
        reason: String,
    },
    /// The guest was reset.
    Reset {
        /// Whether the guest did it by itself.
        guest: bool,
        /// QEMU's word for the reason, e.g. `guest-reset`.
        reason: String,
    },
    /// The power button was pressed (by us).
    Powerdown,
    /// The guest reported a panic.
    GuestPanicked {
        /// What QEMU did about it, e.g. `pause`, `poweroff`.
        action: String,
    },
    /// A migration changed its state (needs the `events` capability, which `migrate` sets).
    Migration {
        /// The new state.
        status: MigrationStatus,
    },
    /// A pass over the guest's memory began (needs the `events` capability).
    MigrationPass {
        /// Which pass, counted from 1.
        pass: u64,
    },
    /// A block job ended.
    BlockJobCompleted {
        /// The job's id.
        device: String,
        /// QEMU's error text; `None` means success.
        error: Option<String>,
    },
    /// A block job was cancelled.
    BlockJobCancelled {
        /// The job's id.
        device: String,
    },
    /// A job has changed its state.
    JobStatusChange {
        /// The job's id.
        id: String,
        /// QEMU's word for the state, e.g. `ready`.
        status: String,
    },
    /// A block job met an I/O error.
    BlockJobError {
        /// The job's id.
        device: String,
        /// `read` (of a mirror: its source) or `write` (its target).
        operation: String,
        /// What QEMU does next: `ignore`, `report` or `stop`.
        action: String,
    },
    /// A mirror has caught up.
    BlockJobReady {
        /// The job's id.
        device: String,
    },
    /// A guest disk request failed.
    BlockIoError {
        /// Node name, or the device where QEMU names no node.
        node: String,
        /// What QEMU does next: `ignore`, `report` or `stop`.
        action: String,
        /// QEMU's text, for people.
        reason: Option<String>,
    },
    /// Anything else.
    Unknown {
        /// QEMU's name for it.
        name: String,
        /// Its data, untouched.
        data: Value,
    },
}

/// Why no event came.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum EventError {
    /// This reader was too slow and missed events: query the state again.
    #[error("{missed} events of QEMU were missed by a slow reader")]
    Lagged {
        /// How many were missed.
        missed: u64,
    },
    /// The session with QEMU is over; no event will ever come.
    #[error("the session with QEMU is over")]
    Closed,
}

/// A reader of events, from the moment of its making on.
#[derive(Debug)]
pub struct Events {
    receiver: broadcast::Receiver<Event>,
}

impl Events {
    pub(crate) fn new(receiver: broadcast::Receiver<Event>) -> Self {
        Self { receiver }
    }

    /// Waits for the next event. Cancellation safe.
    ///
    /// # Errors
    ///
    /// [`EventError::Lagged`] when events were missed (reading goes on with the oldest that is
    /// kept), [`EventError::Closed`] when the session has ended.
    pub async fn next(&mut self) -> Result<Event, EventError> {
        self.receiver.recv().await.map_err(|error| match error {
            broadcast::error::RecvError::Lagged(missed) => EventError::Lagged { missed },
            broadcast::error::RecvError::Closed => EventError::Closed,
        })
    }

    /// The next event if one is already there.
    ///
    /// # Errors
    ///
    /// As [`Events::next`].
    pub fn try_next(&mut self) -> Result<Option<Event>, EventError> {
        match self.receiver.try_recv() {
            Ok(event) => Ok(Some(event)),
            Err(broadcast::error::TryRecvError::Empty) => Ok(None),
            Err(broadcast::error::TryRecvError::Lagged(missed)) => {
                Err(EventError::Lagged { missed })
            }
            Err(broadcast::error::TryRecvError::Closed) => Err(EventError::Closed),
        }
    }
}

impl Event {
    /// Reads an event off the wire; every field of it may be missing.
    pub(crate) fn from_wire(name: &str, data: Value, at: Timestamp) -> Self {
        let text = |key: &str| data.get(key).and_then(Value::as_str).unwrap_or("").to_owned();
        let guest = data.get("guest").and_then(Value::as_bool).unwrap_or(false);
        let kind = match name {
            "STOP" => EventKind::Stop,
            "RESUME" => EventKind::Resume,
            "SHUTDOWN" => EventKind::Shutdown { guest, reason: text("reason") },
            "RESET" => EventKind::Reset { guest, reason: text("reason") },
            "POWERDOWN" => EventKind::Powerdown,
            "GUEST_PANICKED" => EventKind::GuestPanicked { action: text("action") },
            "MIGRATION" => {
                EventKind::Migration { status: MigrationStatus::from_wire(&text("status")) }
            }
            "MIGRATION_PASS" => EventKind::MigrationPass {
                pass: data.get("pass").and_then(Value::as_u64).unwrap_or(0),
            },
            "BLOCK_JOB_COMPLETED" => EventKind::BlockJobCompleted {
                device: text("device"),
                error: data.get("error").and_then(Value::as_str).map(str::to_owned),
            },
            "BLOCK_JOB_CANCELLED" => EventKind::BlockJobCancelled { device: text("device") },
            "BLOCK_JOB_ERROR" => {
                let (device, operation) = (text("device"), text("operation"));
                EventKind::BlockJobError { device, operation, action: text("action") }
            }
            "JOB_STATUS_CHANGE" => {
                EventKind::JobStatusChange { id: text("id"), status: text("status") }
            }
            "BLOCK_JOB_READY" => EventKind::BlockJobReady { device: text("device") },
            "BLOCK_IO_ERROR" => EventKind::BlockIoError {
                node: data
                    .get("node-name")
                    .and_then(Value::as_str)
                    .map_or_else(|| text("device"), str::to_owned),
                action: text("action"),
                reason: data.get("reason").and_then(Value::as_str).map(str::to_owned),
            },
            _ => EventKind::Unknown { name: name.to_owned(), data },
        };
        Self { at, kind }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    const AT: Timestamp = Timestamp { seconds: 7, microseconds: 999_999 };

    #[test]
    fn known_events_are_typed() {
        let event = Event::from_wire("SHUTDOWN", json!({"guest": true, "reason": "r"}), AT);
        assert_eq!(event.kind, EventKind::Shutdown { guest: true, reason: "r".to_owned() });
        let event = Event::from_wire("MIGRATION", json!({"status": "pre-switchover"}), AT);
        assert_eq!(event.kind, EventKind::Migration { status: MigrationStatus::PreSwitchover });
        assert_eq!(event.at, AT);
    }

    #[test]
    fn unknown_and_empty_events_are_kept() {
        let event = Event::from_wire("SOMETHING_NEW", json!({"a": 1}), AT);
        assert_eq!(
            event.kind,
            EventKind::Unknown { name: "SOMETHING_NEW".to_owned(), data: json!({"a": 1}) }
        );
        let event = Event::from_wire("SHUTDOWN", Value::Null, AT);
        assert_eq!(event.kind, EventKind::Shutdown { guest: false, reason: String::new() });
    }

    #[test]
    fn time_between_events_keeps_microseconds() {
        let later = Timestamp { seconds: 8, microseconds: 1 };
        assert_eq!(later.since(AT), Some(Duration::from_micros(2)));
        assert_eq!(AT.since(later), None);
    }
}
