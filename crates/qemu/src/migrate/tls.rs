//! QEMU's TLS objects for one migration, its memory's and its disks', and the names they have in QEMU.
//!
//! Seen on 7.2 and 10.0: keys and certificates of ECDSA P-256 in PKCS#8 PEM are taken (a critical
//! key usage must have key encipherment beside digital signature); a peer
//! certificate must come from the CA of the folder; the client's name for the server (`hostname`)
//! and the server's for the client (`authorized_dn`) are both enforced. Neither version looks at
//! the extended key usage of the *peer's* certificate: the distinguished name must therefore be
//! one that only hosts' QEMU certificates have.

use std::fs::OpenOptions;
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use serde_json::{Map, Value, json};

use super::incoming::IncomingTls;
use super::outgoing::OutgoingTls;
use crate::machine::Machine;
use crate::qmp::QmpError;

/// The ids of the objects of one connection.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Objects {
    /// The credentials.
    pub(crate) credentials: &'static str,
    /// What holds whom to let in.
    pub(crate) authorization: &'static str,
}

/// For the guest's memory.
const MEMORY: Objects = Objects { credentials: "migration-tls", authorization: "migration-authz" };

/// For its disks.
pub(crate) const DISKS: Objects =
    Objects { credentials: "disks-tls", authorization: "disks-authz" };

/// The parameters of Diffie-Hellman key exchanges (group ffdhe2048 of RFC 7919; nothing secret).
///
/// A server's credentials without them make QEMU (7.2, 10.0) look for a prime of its own: seen to
/// take 0.1 to 4 s, in which it does nothing else. With them it takes some 2 ms.
const KEY_EXCHANGE: &str = include_str!("ffdhe2048.pem");

/// Where QEMU looks for them in the folder of the credentials.
const KEY_EXCHANGE_FILE: &str = "dh-params.pem";

/// Makes the objects of a destination; returns the parameters that refer to them.
pub(super) async fn make_server(
    machine: &Machine,
    tls: &IncomingTls,
) -> Result<Map<String, Value>, QmpError> {
    make_server_as(machine, MEMORY, tls).await?;
    let pairs = [("tls-creds", MEMORY.credentials), ("tls-authz", MEMORY.authorization)];
    Ok(parameters(&pairs))
}

/// Makes the objects of a destination.
pub(crate) async fn make_server_as(
    machine: &Machine,
    objects: Objects,
    tls: &IncomingTls,
) -> Result<(), QmpError> {
    remove_as(machine, objects).await?;
    if let Err(error) = add_key_exchange(&tls.credentials_dir) {
        tracing::warn!(%error, "QEMU will look for a prime, which takes a while");
    }
    let dir = tls.credentials_dir.to_string_lossy();
    let credentials = json!({ "dir": dir, "endpoint": "server", "verify-peer": true });
    machine.object_add("tls-creds-x509", objects.credentials, credentials).await?;
    let identity = json!({ "identity": tls.authorized_dn });
    machine.object_add("authz-simple", objects.authorization, identity).await
}

/// Puts the parameters of the key exchange into the folder, unless there are some.
///
/// The folder may belong to QEMU's user, who could have put a link there: a new file is made, or
/// none.
fn add_key_exchange(dir: &Path) -> io::Result<()> {
    let mut options = OpenOptions::new();
    options.write(true).create_new(true).mode(0o644);
    match options.open(dir.join(KEY_EXCHANGE_FILE)) {
        Ok(mut file) => file.write_all(KEY_EXCHANGE.as_bytes()),
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(()),
        Err(error) => Err(error),
    }
}

/// Makes the object of a source; returns the parameters that refer to it.
pub(super) async fn make_client(
    machine: &Machine,
    tls: &OutgoingTls,
) -> Result<Map<String, Value>, QmpError> {
    make_client_as(machine, MEMORY, tls).await?;
    Ok(parameters(&[("tls-creds", MEMORY.credentials), ("tls-hostname", &tls.hostname)]))
}

/// Makes the object of a source.
pub(crate) async fn make_client_as(
    machine: &Machine,
    objects: Objects,
    tls: &OutgoingTls,
) -> Result<(), QmpError> {
    remove_as(machine, objects).await?;
    let dir = tls.credentials_dir.to_string_lossy();
    let credentials = json!({ "dir": dir, "endpoint": "client", "verify-peer": true });
    machine.object_add("tls-creds-x509", objects.credentials, credentials).await
}

/// Removes the objects of an earlier try, if there are any.
pub(super) async fn remove(machine: &Machine) -> Result<(), QmpError> {
    remove_as(machine, MEMORY).await
}

/// As [`remove`], for these objects.
pub(crate) async fn remove_as(machine: &Machine, objects: Objects) -> Result<(), QmpError> {
    machine.object_del(objects.credentials).await?;
    machine.object_del(objects.authorization).await
}

fn parameters(pairs: &[(&str, &str)]) -> Map<String, Value> {
    pairs.iter().map(|(name, value)| ((*name).to_owned(), json!(value))).collect()
}
