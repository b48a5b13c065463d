//! A mirror's target on another host: a node that speaks to that host's QEMU.
//!
//! Seen on 7.2.22 and 10.0.2:
//!
//! - Only with `discard` at `unmap` do stretches of zeros arrive as such: without it 10.0 writes a sparse
//!   raw target full. With `detect-zeroes` at `unmap` zeros that the guest wrote become holes, too.
//! - The connection is made by `blockdev-add`, which holds QEMU up meanwhile: a refused connection, a
//!   wrong name, a missing export are refused at once; an address that swallows all takes as long as the kernel
//!   tries. So the caller makes sure that somebody listens before.
//! - A lost connection is made again by QEMU itself when the next request comes, tried at growing
//!   distances, up to 16 s.

use std::net::SocketAddr;

use serde_json::{Value, json};

use super::nodes;
use crate::machine::Machine;
use crate::migrate::outgoing::OutgoingTls;
use crate::migrate::tls;
use crate::qmp::QmpError;

/// The destination's server, as the source reaches it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Remote {
    /// Where it listens.
    pub server: SocketAddr,
    /// TLS; `None` only where the caller has another protection.
    pub tls: Option<OutgoingTls>,
}

/// The name of the node that stands for a disk's copy on another host.
#[must_use]
pub fn node_name(disk: &str) -> String {
    format!("{disk}-copy")
}

impl Remote {
    /// Makes the credentials; once, before the first [`Remote::add`].
    ///
    /// # Errors
    ///
    /// [`QmpError`]; refused while a node uses those of an earlier try.
    pub async fn prepare(&self, machine: &Machine) -> Result<(), QmpError> {
        match &self.tls {
            Some(settings) => tls::make_client_as(machine, tls::DISKS, settings).await,
            None => Ok(()),
        }
    }

    /// Connects to the export of a disk; the node is [`node_name`].
    ///
    /// # Errors
    ///
    /// [`QmpError`]; nothing is left of a refused one.
    pub async fn add(&self, machine: &Machine, disk: &str) -> Result<(), QmpError> {
        machine.order("blockdev-add", self.node(disk)).await
    }

    /// Whether the copy can be reached (again): everything sent so far is there, and durable.
    ///
    /// This is how a mirror that stands still is taken up. Between the loss of a connection and this the
    /// destination must have called [`super::server::renew`]. Otherwise a write that was under way
    /// over the old connection, or waits in a buffer for a network to come back, may be carried out *after* a
    /// newer one to the same place over the new connection, and nobody would ever know: neither end of NBD
    /// holds the order across connections. `renew` ends with every old write done or refused; success
    /// here then says that the connection is a newer one; [`super::mirror::resume`] is next.
    ///
    /// QEMU has no command that does just this. Opening a node again with what it is open with (7.2, 10.0)
    /// flushes it, and changes nothing.
    ///
    /// # Errors
    ///
    /// [`QmpError`]; refused as long as it can not be reached: ask again.
    pub async fn reach(&self, machine: &Machine, disk: &str) -> Result<(), QmpError> {
        machine.order("blockdev-reopen", json!({ "options": [self.node(disk)] })).await
    }

    fn node(&self, disk: &str) -> Value {
        let mut node = json!({
            "driver": "nbd", "node-name": node_name(disk), "export": disk,
            "server": {
                "type": "inet", "host": self.server.ip().to_string(),
                "port": self.server.port().to_string(),
            },
            "reconnect-delay": 0, "discard": "unmap", "detect-zeroes": "unmap",
        });
        if let Some(tls) = &self.tls {
            node["tls-creds"] = json!(tls::DISKS.credentials);
            node["tls-hostname"] = json!(tls.hostname);
        }
        node
    }
}

/// Breaks the connection of a disk's copy for good, even while QEMU does nothing but wait for it.
/// Everything that waits fails, and every later request.
///
/// # Errors
///
/// [`QmpError`]; refused where there is no such node.
pub async fn yank(machine: &Machine, disk: &str) -> Result<(), QmpError> {
    let instance = json!({ "type": "block-node", "node-name": node_name(disk) });
    machine.qmp().execute_oob("yank", json!({ "instances": [instance] })).await.map(drop)
}

/// Lets go of a disk's copy, if there is one: after [`super::mirror::settle`], or when it is given up. The
/// connection is broken first, lest QEMU waits for a server that is gone.
///
/// # Errors
///
/// [`QmpError`]; refused while a mirror uses it.
pub async fn remove(machine: &Machine, disk: &str) -> Result<(), QmpError> {
    match yank(machine, disk).await {
        Err(error) if !error.is_refusal() => return Err(error),
        _ => {}
    }
    nodes::remove(machine, &node_name(disk)).await
}

/// Removes the credentials, when no copy is left.
///
/// # Errors
///
/// [`QmpError`]; refused while they are used.
pub async fn forget_credentials(machine: &Machine) -> Result<(), QmpError> {
    tls::remove_as(machine, tls::DISKS).await
}
