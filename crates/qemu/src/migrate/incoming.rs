//! The destination's side of a migration.

use std::net::{IpAddr, SocketAddr};
use std::ops::RangeInclusive;
use std::path::PathBuf;

use super::Statistics;
use crate::machine::{Machine, RunState};
use crate::qmp::QmpError;

/// How a destination waits for its guest.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct IncomingSettings {
    /// The address to listen on: the migration network's, never a wildcard.
    pub address: IpAddr,
    /// The ports that may be used; the first free one is.
    pub ports: RangeInclusive<u16>,
    /// Connections of a multifd migration; `None` for a single stream. The same on both ends.
    pub multifd_channels: Option<u8>,
    /// TLS; `None` only where the caller has another protection.
    pub tls: Option<IncomingTls>,
}

/// Who may send a guest here.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct IncomingTls {
    /// Folder with `ca-cert.pem`, `server-cert.pem` and `server-key.pem`, readable for QEMU.
    pub credentials_dir: PathBuf,
    /// The one client that is let in, by its certificate's distinguished name, e.g. `CN=host-a`.
    pub authorized_dn: String,
}

/// A destination that listens.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Listening {
    /// Where.
    pub address: SocketAddr,
}

/// A destination that holds the whole guest, stopped.
#[derive(Debug, Clone, PartialEq)]
pub struct Loaded {
    /// QEMU's run state.
    pub run_state: RunState,
    /// The destination's figures.
    pub statistics: Statistics,
}

/// Why a destination does not hold the guest. The QEMU is of no further use: end it.
#[derive(Debug, thiserror::Error)]
pub enum IncomingError {
    /// This QEMU can not do what the settings ask for.
    #[error("the destination's QEMU has no {feature}")]
    Unsupported {
        /// What is missing.
        feature: &'static str,
    },
    /// A step of the preparation failed.
    #[error("can not prepare the destination: {step}")]
    Prepare {
        /// Which.
        step: &'static str,
        /// The reason.
        #[source]
        source: QmpError,
    },
    /// No port of the range is free.
    #[error("no free port on {address} in {}-{}", ports.start(), ports.end())]
    NoFreePort {
        /// The address.
        address: IpAddr,
        /// The range.
        ports: RangeInclusive<u16>,
        /// QEMU's last refusal.
        #[source]
        source: QmpError,
    },
    /// QEMU says that loading failed.
    #[error("loading failed on the destination: {}", reason.as_deref().unwrap_or("no reason given"))]
    Failed {
        /// QEMU's text (10.0; 7.2 writes it to its log only).
        reason: Option<String>,
    },
    /// QEMU ended; its last words are in its log.
    #[error("the destination's QEMU ended while it waited for the guest")]
    Ended(#[source] QmpError),
    /// QEMU can not be asked.
    #[error("can not ask the destination how far it is")]
    Query(#[source] QmpError),
    /// Loading is done, but the guest is not stopped: it must be treated as running.
    #[error("the destination is in state {run_state} instead of stopped")]
    NotStopped {
        /// QEMU's run state.
        run_state: RunState,
    },
}

/// Makes a QEMU that was started with `incoming` listen.
///
/// On success it listens on the returned address, and its guest is stopped. On failure it must be
/// ended: what was set is not taken back.
///
/// # Errors
///
/// [`IncomingError`].
pub async fn prepare(
    machine: &Machine,
    settings: &IncomingSettings,
) -> Result<Listening, IncomingError> {
    let _ = (machine, settings);
    unimplemented!()
}

/// Waits until the whole guest is here, stopped. Cancellation safe; may be called again.
///
/// # Errors
///
/// [`IncomingError`].
pub async fn wait_loaded(machine: &Machine) -> Result<Loaded, IncomingError> {
    let _ = machine;
    unimplemented!()
}
