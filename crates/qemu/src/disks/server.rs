//! The destination's side of a copied disk: QEMU's own NBD server.
//!
//! Seen on 7.2.22 and 10.0.2:
//!
//! - A QEMU that waits for a migration exports its disks for writing, although they are inactive.
//! - A client without TLS, with another host's certificate, or of another pool is refused.
//! - The server does not tell its port, so the range is tried here, port by port.
//! - Stopping the server ends every connection and every export, and waits for the requests under way.
//! - With an export open, `cont` is answered with success, and the guest's own writes to that disk fail.

use std::net::{IpAddr, SocketAddr};
use std::ops::RangeInclusive;
use std::time::Duration;

use serde_json::{Value, json};
use tokio::time::{Instant, sleep};

use crate::machine::Machine;
use crate::migrate::incoming::IncomingTls;
use crate::migrate::tls;
use crate::qmp::QmpError;

/// Connections that the server takes. One a disk is needed; a cut network leaves some behind that only
/// [`renew`] ends, and a stranger's are here until the handshake fails.
const CONNECTIONS_MAX: u64 = 64;

/// Pause between two questions.
const POLL_MILLISECONDS: u64 = 5;

/// Where the server listens, and for whom.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ServerSettings {
    /// The address: the storage network's, never a wildcard.
    pub address: IpAddr,
    /// The ports that may be used; the first free one is.
    pub ports: RangeInclusive<u16>,
    /// TLS; `None` only where the caller has another protection.
    pub tls: Option<IncomingTls>,
}

/// Why a disk is not served, or still is.
#[derive(Debug, thiserror::Error)]
pub enum ServerError {
    /// The credentials could not be made.
    #[error("can not give QEMU the credentials for copied disks")]
    Credentials(#[source] QmpError),
    /// No port of the range could be had.
    #[error("can not serve disks on {address}, ports {} to {}", ports.start(), ports.end())]
    Listen {
        /// The address.
        address: IpAddr,
        /// The range.
        ports: RangeInclusive<u16>,
        /// QEMU's last refusal; `None` where the range is empty.
        #[source]
        source: Option<QmpError>,
    },
    /// The disk could not be exported.
    #[error("can not export the disk {disk}")]
    Export {
        /// The disk.
        disk: String,
        /// The refusal.
        #[source]
        source: QmpError,
    },
    /// The server, or an export, could not be told to end.
    #[error("can not end the export of disks")]
    Stop(#[source] QmpError),
    /// An export is still there: something of it is under way.
    #[error("the export of {exports:?} has not ended after {} ms", after.as_millis())]
    StillThere {
        /// The exports' ids.
        exports: Vec<String>,
        /// How long was waited.
        after: Duration,
    },
}

/// Starts the server; tells where.
///
/// # Errors
///
/// [`ServerError::Credentials`] and `Listen` (also when a server runs already).
pub async fn start(
    machine: &Machine,
    settings: &ServerSettings,
) -> Result<SocketAddr, ServerError> {
    if let Some(settings) = &settings.tls {
        let made = tls::make_server_as(machine, tls::DISKS, settings).await;
        made.map_err(ServerError::Credentials)?;
    }
    let mut refusal = None;
    for port in settings.ports.clone() {
        let address = SocketAddr::new(settings.address, port);
        match machine.order("nbd-server-start", server(address, settings.tls.is_some())).await {
            Ok(()) => return Ok(address),
            Err(error) if error.is_refusal() => refusal = Some(error),
            Err(error) => {
                refusal = Some(error);
                break;
            }
        }
    }
    let ports = settings.ports.clone();
    Err(ServerError::Listen { address: settings.address, ports, source: refusal })
}

fn server(address: SocketAddr, with_tls: bool) -> Value {
    let host = address.ip().to_string();
    let port = address.port().to_string();
    let mut arguments = json!({
        "addr": { "type": "inet", "data": { "host": host, "port": port } },
        "max-connections": CONNECTIONS_MAX,
    });
    if with_tls {
        arguments["tls-creds"] = json!(tls::DISKS.credentials);
        arguments["tls-authz"] = json!(tls::DISKS.authorization);
    }
    arguments
}

/// Exports a node under the disk's name, for writing.
///
/// # Errors
///
/// [`ServerError::Export`].
pub async fn export(machine: &Machine, disk: &str, node: &str) -> Result<(), ServerError> {
    let arguments = json!({
        "type": "nbd", "id": disk, "node-name": node, "name": disk, "writable": true,
    });
    let error = |source| ServerError::Export { disk: disk.to_owned(), source };
    machine.order("block-export-add", arguments).await.map_err(error)
}

/// The ids of the exports, those on their way out included.
///
/// # Errors
///
/// [`QmpError`].
pub async fn exports(machine: &Machine) -> Result<Vec<String>, QmpError> {
    let answer = machine.qmp().execute("query-block-exports", Value::Null).await?;
    let id = |export: &Value| export.get("id").and_then(Value::as_str).map(str::to_owned);
    Ok(answer.as_array().map(|list| list.iter().filter_map(id).collect()).unwrap_or_default())
}

/// Ends every connection to an export and begins it anew: when this returns well, no write that came over
/// an earlier connection is still to be carried out. For what, see [`super::target::Remote::reach`].
///
/// # Errors
///
/// [`ServerError::Stop`], `StillThere` (call again), `Export`.
pub async fn renew(
    machine: &Machine,
    disk: &str,
    node: &str,
    within: Duration,
) -> Result<(), ServerError> {
    if exports(machine).await.map_err(ServerError::Stop)?.iter().any(|id| id == disk) {
        let arguments = json!({ "id": disk, "mode": "hard" });
        match machine.order("block-export-del", arguments).await {
            // It is on its way out, or was by itself.
            Err(error) if !error.is_refusal() => return Err(ServerError::Stop(error)),
            _ => {}
        }
    }
    gone(machine, |id| id == disk, within).await?;
    export(machine, disk, node).await
}

/// Stops the server and ends all exports; must come before the guest's `cont`. Without effect where none runs.
///
/// # Errors
///
/// [`ServerError::Stop`] and `StillThere`: the guest must not be let run.
pub async fn stop(machine: &Machine, within: Duration) -> Result<(), ServerError> {
    match machine.order("nbd-server-stop", Value::Null).await {
        // There is none.
        Err(error) if !error.is_refusal() => return Err(ServerError::Stop(error)),
        _ => {}
    }
    gone(machine, |_| true, within).await
}

/// Removes the credentials, when the server is stopped.
///
/// # Errors
///
/// [`QmpError`]; refused while they are used.
pub async fn forget_credentials(machine: &Machine) -> Result<(), QmpError> {
    tls::remove_as(machine, tls::DISKS).await
}

async fn gone(
    machine: &Machine,
    which: impl Fn(&str) -> bool,
    within: Duration,
) -> Result<(), ServerError> {
    let until = Instant::now() + within;
    loop {
        let mut left = exports(machine).await.map_err(ServerError::Stop)?;
        left.retain(|id| which(id));
        if left.is_empty() {
            return Ok(());
        }
        if Instant::now() >= until {
            return Err(ServerError::StillThere { exports: left, after: within });
        }
        sleep(Duration::from_millis(POLL_MILLISECONDS)).await;
    }
}
