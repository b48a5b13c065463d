//! The state of a stopped guest in a file: saved, and restored into a fresh QEMU.
//!
//! QEMU may open no file by itself (it runs as an unprivileged user): the open file is handed over
//! by its descriptor. Where QEMU has a transport for files (10.0) that is used, by way of a set of
//! descriptors; else (7.2) the descriptor is written to as if it were a connection. Both write the
//! same stream, and each can restore what the other has saved, as far as the machine type allows.
//!
//! Mapped memory (10.0) is another layout: each page has a place of its own, so that the file is
//! never longer than the memory, and several threads can write and read it.

use std::fs::{File, OpenOptions};
use std::os::fd::{AsRawFd, OwnedFd};
use std::time::Duration;

use serde_json::{Value, json};
use tokio::sync::watch;

use super::incoming::IncomingError;
use super::settings::{
    ANNOUNCE_ROUNDS_WHEN_LOADED, Stream, bandwidth, default_parameters, next_change,
    set_capabilities, set_parameters,
};
use super::{MigrationStatus, Statistics, outgoing};
use crate::machine::{Machine, RunState};
use crate::qmp::QmpError;

/// Pause between two questions when no event comes.
const POLL_MILLISECONDS: u64 = 100;

/// The name under which QEMU knows the descriptor, where it takes one by name.
const DESCRIPTOR_NAME: &str = "state-file";

/// How a file is laid out: to be remembered with it, since QEMU does not find out by itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Layout {
    /// One stream (7.2, 10.0).
    #[default]
    Stream,
    /// Each page in its place (10.0).
    Mapped {
        /// Threads that write or read it, 1 to 255; `None` for one without multifd. May differ
        /// between saving and restoring.
        channels: Option<u8>,
    },
}

/// Why a state was not saved. The guest is stopped, as it was.
#[derive(Debug, thiserror::Error)]
pub enum SaveError {
    /// This QEMU can not write that layout. Nothing was done.
    #[error("QEMU has no {feature}")]
    Unsupported {
        /// What is missing.
        feature: &'static str,
    },
    /// The guest runs: what would be saved would be old at once.
    #[error("the guest is not stopped, but {run_state}")]
    NotStopped {
        /// Its state.
        run_state: RunState,
    },
    /// A step before the writing failed.
    #[error("can not begin to save: {step}")]
    Prepare {
        /// Which.
        step: &'static str,
        /// The reason.
        #[source]
        source: QmpError,
    },
    /// The file can not be opened in the way that QEMU needs.
    #[error("can not open the file for QEMU")]
    Open(#[source] std::io::Error),
    /// QEMU can not be asked how far it is.
    #[error("can not ask how far the saving is")]
    Query(#[source] QmpError),
    /// QEMU says that it failed, most often because the disk is full.
    #[error("saving failed: {}", reason.as_deref().unwrap_or("no reason given"))]
    Failed {
        /// QEMU's text.
        reason: Option<String>,
    },
    /// It was cancelled.
    #[error("saving was cancelled")]
    Cancelled,
}

/// Writes a stopped guest's whole state into an empty file, telling the progress on the way.
///
/// On success the guest is as one that has left by a migration: stopped, its disks given up; the
/// caller makes the file durable, and ends this QEMU, or lets the guest run again. On failure it is
/// stopped, as it was. Cancelled by [`outgoing::Outgoing::cancel`] of a reattached migration.
///
/// # Errors
///
/// [`SaveError`]; what is in the file then is of no use.
pub async fn save(
    machine: &Machine,
    file: &File,
    layout: Layout,
    progress: &watch::Sender<Statistics>,
) -> Result<Statistics, SaveError> {
    let step = |step| move |source| SaveError::Prepare { step, source };
    if let Some(feature) = layout.unsupported(machine) {
        return Err(SaveError::Unsupported { feature });
    }
    let status = machine.status().await.map_err(SaveError::Query)?;
    if status.running {
        return Err(SaveError::NotStopped { run_state: status.run_state });
    }
    outgoing::wake(machine).await.map_err(step("a guest that arrived, or was to leave, before"))?;
    outgoing::clear(machine).await.map_err(step("settings of an earlier migration"))?;
    let mut on = vec!["events"];
    on.extend(machine.features().validate_uuid.then_some("validate-uuid"));
    on.extend(layout.capabilities());
    set_capabilities(machine, &on).await.map_err(step("capabilities"))?;
    let mut parameters = default_parameters(machine.features());
    layout.stream().parameters(&mut parameters);
    parameters.insert("max-bandwidth".to_owned(), bandwidth(0));
    set_parameters(machine, parameters).await.map_err(step("parameters"))?;

    let file = reopened(file, OpenOptions::new().write(true)).map_err(SaveError::Open)?;
    let handed = hand_over(machine, file).await.map_err(step("handing the file over"))?;
    let begun = machine.order("migrate", json!({ "uri": handed.uri })).await;
    let saved = match begun {
        Ok(()) => wait_saved(machine, progress).await,
        Err(source) => Err(step("the beginning itself")(source)),
    };
    // What is left over is only a descriptor, and settings that every migration sets anew.
    if let Err(error) = handed.take_back(machine).await {
        tracing::debug!(%error, "QEMU keeps the descriptor of a state file");
    }
    if let Err(error) = outgoing::reset(machine).await {
        tracing::debug!(%error, "what was set for saving is left");
    }
    saved
}

/// Makes a QEMU that was started with `incoming` read a saved state. It is there, stopped, when
/// [`incoming::wait_loaded`](super::incoming::wait_loaded) says so; on failure this QEMU must be ended.
///
/// # Errors
///
/// [`IncomingError::Unsupported`], `Prepare`.
pub async fn restore(machine: &Machine, file: &File, layout: Layout) -> Result<(), IncomingError> {
    let step = |step| move |source| IncomingError::Prepare { step, source };
    if let Some(feature) = layout.unsupported(machine) {
        return Err(IncomingError::Unsupported { feature });
    }
    let mut on = vec!["events", "late-block-activate"];
    on.extend(machine.features().validate_uuid.then_some("validate-uuid"));
    on.extend(layout.capabilities());
    set_capabilities(machine, &on).await.map_err(step("capabilities"))?;
    let mut parameters = default_parameters(machine.features());
    layout.stream().parameters(&mut parameters);
    parameters.insert("announce-rounds".to_owned(), json!(ANNOUNCE_ROUNDS_WHEN_LOADED));
    set_parameters(machine, parameters).await.map_err(step("parameters"))?;

    let file = reopened(file, OpenOptions::new().read(true)).map_err(IncomingError::Open)?;
    let handed = hand_over(machine, file).await.map_err(step("handing the file over"))?;
    let mut arguments = json!({ "uri": handed.uri });
    if machine.features().exit_on_error {
        arguments["exit-on-error"] = json!(false);
    }
    machine.order("migrate-incoming", arguments).await.map_err(step("the beginning itself"))
}

impl Layout {
    fn unsupported(self, machine: &Machine) -> Option<&'static str> {
        let features = machine.features();
        let can_map = features.mapped_ram && features.file_transport;
        let mapped = matches!(self, Self::Mapped { .. });
        (mapped && !can_map).then_some("mapped memory in a file")
    }

    fn capabilities(self) -> Vec<&'static str> {
        let mapped = matches!(self, Self::Mapped { .. });
        let mut on = self.stream().capabilities();
        on.extend(mapped.then_some("mapped-ram"));
        on
    }

    fn stream(self) -> Stream {
        let multifd_channels = match self {
            Self::Stream => None,
            Self::Mapped { channels } => channels,
        };
        Stream { multifd_channels, ..Stream::default() }
    }
}

/// The same file opened anew: QEMU takes a descriptor only if it is opened for what it wants to do
/// and no more.
fn reopened(file: &File, options: &OpenOptions) -> std::io::Result<OwnedFd> {
    options.open(format!("/proc/self/fd/{}", file.as_raw_fd())).map(OwnedFd::from)
}

/// A descriptor that QEMU has.
struct Handed {
    uri: String,
    set: Option<u64>,
}

async fn hand_over(machine: &Machine, file: OwnedFd) -> Result<Handed, QmpError> {
    const COMMAND: &str = "add-fd";
    if !machine.features().file_transport {
        let name = json!({ "fdname": DESCRIPTOR_NAME });
        machine.qmp().execute_with_descriptor("getfd", name, file).await?;
        return Ok(Handed { uri: format!("fd:{DESCRIPTOR_NAME}"), set: None });
    }
    let answer = machine.qmp().execute_with_descriptor(COMMAND, Value::Null, file).await?;
    let set = answer.get("fdset-id").and_then(Value::as_u64);
    let set = set.ok_or_else(|| QmpError::malformed(COMMAND, "no fdset-id"))?;
    Ok(Handed { uri: format!("file:/dev/fdset/{set}"), set: Some(set) })
}

impl Handed {
    /// One that was taken by its name is gone with its use.
    async fn take_back(self, machine: &Machine) -> Result<(), QmpError> {
        match self.set {
            Some(set) => machine.order("remove-fd", json!({ "fdset-id": set })).await,
            None => Ok(()),
        }
    }
}

async fn wait_saved(
    machine: &Machine,
    progress: &watch::Sender<Statistics>,
) -> Result<Statistics, SaveError> {
    let mut events = machine.events();
    loop {
        let statistics = Statistics::query(machine.qmp()).await.map_err(SaveError::Query)?;
        progress.send_replace(statistics.clone());
        match statistics.status {
            MigrationStatus::Completed => return Ok(statistics),
            MigrationStatus::Failed => {
                return Err(SaveError::Failed { reason: statistics.error_desc });
            }
            MigrationStatus::Cancelled => return Err(SaveError::Cancelled),
            _ => {}
        }
        next_change(&mut events, Duration::from_millis(POLL_MILLISECONDS)).await;
    }
}
