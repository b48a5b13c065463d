//! The source's side of a migration.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use tokio::sync::watch;

use super::Statistics;
use crate::event::Timestamp;
use crate::machine::{Machine, RunState};
use crate::qmp::QmpError;

/// How a source sends its guest.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct OutgoingSettings {
    /// Where the destination listens.
    pub to: SocketAddr,
    /// TLS; `None` only where the caller has another protection.
    pub tls: Option<OutgoingTls>,
    /// How long the guest may be stopped, as QEMU estimates it, in milliseconds.
    pub max_downtime_ms: u64,
    /// The most that may be sent, in bytes per second; 0 is no limit.
    pub max_bandwidth_bytes_per_second: u64,
    /// Connections of a multifd migration; `None` for a single stream. The same on both ends.
    pub multifd_channels: Option<u8>,
}

/// QEMU's own default for the downtime, in milliseconds.
pub const DEFAULT_MAX_DOWNTIME_MS: u64 = 300;

/// Whom to expect at the other end.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct OutgoingTls {
    /// Folder with `ca-cert.pem`, `client-cert.pem` and `client-key.pem`, readable for QEMU.
    pub credentials_dir: PathBuf,
    /// The name that the destination's certificate must have, e.g. `host-b.qemu.whimbrel`.
    pub hostname: String,
}

/// A migration that QEMU was told to begin.
#[derive(Debug)]
pub struct Outgoing {
    machine: Machine,
}

/// The source after the whole guest has left: stopped, `postmigrate`.
#[derive(Debug, Clone, PartialEq)]
pub struct Completed {
    /// The last figures.
    pub statistics: Statistics,
    /// When the vCPUs stopped, from the STOP event; `None` when the event was missed (the agent
    /// was restarted in between).
    pub stopped_at: Option<Timestamp>,
}

/// Why a source did not come further. What the guest does is told by each variant.
#[derive(Debug, thiserror::Error)]
pub enum OutgoingError {
    /// This QEMU can not do what the settings ask for. Nothing was done.
    #[error("the source's QEMU has no {feature}")]
    Unsupported {
        /// What is missing.
        feature: &'static str,
    },
    /// A step of the preparation failed. The guest goes on as it was.
    #[error("can not begin to migrate: {step}")]
    Prepare {
        /// Which.
        step: &'static str,
        /// The reason.
        #[source]
        source: QmpError,
    },
    /// QEMU can not be asked, or told. What it does is unknown.
    #[error("can not ask the source how far it is")]
    Query(#[source] QmpError),
    /// QEMU says that the migration failed; `run_state` is what it has made of the guest.
    #[error("the migration failed: {}", reason.as_deref().unwrap_or("no reason given"))]
    Failed {
        /// QEMU's text.
        reason: Option<String>,
        /// QEMU's run state after the failure.
        run_state: RunState,
    },
    /// It was cancelled.
    #[error("the migration was cancelled")]
    Cancelled {
        /// QEMU's run state after it.
        run_state: RunState,
    },
    /// It took longer than allowed. What QEMU does is unknown; cancel, or ask again.
    #[error("the migration did not get past {waiting_for} within {} ms", after.as_millis())]
    TookTooLong {
        /// What was waited for.
        waiting_for: &'static str,
        /// How long.
        after: Duration,
    },
}

/// How a cancel ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Cancelled {
    /// The migration is over without success; `run_state` is what the guest does now.
    Stopped {
        /// QEMU's run state.
        run_state: RunState,
    },
    /// It came too late: the migration is complete, and the guest is stopped.
    AlreadyCompleted,
}

impl Outgoing {
    /// Sets everything up and tells QEMU to begin.
    ///
    /// # Errors
    ///
    /// [`OutgoingError::Unsupported`], [`OutgoingError::Prepare`]: the guest runs on.
    pub async fn start(
        machine: &Machine,
        settings: &OutgoingSettings,
    ) -> Result<Self, OutgoingError> {
        let _ = settings;
        Ok(Self { machine: machine.clone() })
    }

    /// Takes up a migration that was begun before the agent was restarted.
    #[must_use]
    pub fn reattach(machine: &Machine) -> Self {
        Self { machine: machine.clone() }
    }

    /// The figures of this moment.
    ///
    /// # Errors
    ///
    /// [`OutgoingError::Query`].
    pub async fn statistics(&self) -> Result<Statistics, OutgoingError> {
        Statistics::query(self.machine.qmp()).await.map_err(OutgoingError::Query)
    }

    /// Waits until the guest is stopped at pre-switchover, telling the progress on the way. Takes
    /// as long as the copying does: the caller bounds it. Cancellation safe.
    ///
    /// # Errors
    ///
    /// [`OutgoingError`].
    pub async fn wait_pre_switchover(
        &mut self,
        progress: &watch::Sender<Statistics>,
    ) -> Result<Statistics, OutgoingError> {
        let _ = progress;
        unimplemented!()
    }

    /// Lets QEMU send the rest, and waits until it says that all has arrived.
    ///
    /// # Errors
    ///
    /// [`OutgoingError`].
    pub async fn continue_to_completed(
        &mut self,
        within: Duration,
    ) -> Result<Completed, OutgoingError> {
        let _ = within;
        unimplemented!()
    }

    /// Cancels, and waits until it is over.
    ///
    /// # Errors
    ///
    /// [`OutgoingError::Query`], [`OutgoingError::TookTooLong`].
    pub async fn cancel(&self, within: Duration) -> Result<Cancelled, OutgoingError> {
        let _ = within;
        unimplemented!()
    }
}

/// Takes back what [`Outgoing::start`] set, after a migration that is over.
///
/// # Errors
///
/// [`OutgoingError::Prepare`].
pub async fn reset(machine: &Machine) -> Result<(), OutgoingError> {
    let _ = machine;
    unimplemented!()
}
