//! QEMU's TLS objects for one migration, and the names they have in QEMU.
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

/// Id of the credentials object.
const CREDENTIALS_ID: &str = "migration-tls";

/// Id of the object that holds whom to let in.
const AUTHORIZATION_ID: &str = "migration-authz";

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
    remove(machine).await?;
    if let Err(error) = add_key_exchange(&tls.credentials_dir) {
        tracing::warn!(%error, "QEMU will look for a prime, which takes a while");
    }
    let dir = tls.credentials_dir.to_string_lossy();
    let credentials = json!({ "dir": dir, "endpoint": "server", "verify-peer": true });
    machine.object_add("tls-creds-x509", CREDENTIALS_ID, credentials).await?;
    let identity = json!({ "identity": tls.authorized_dn });
    machine.object_add("authz-simple", AUTHORIZATION_ID, identity).await?;
    Ok(parameters(&[("tls-creds", CREDENTIALS_ID), ("tls-authz", AUTHORIZATION_ID)]))
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
    remove(machine).await?;
    let dir = tls.credentials_dir.to_string_lossy();
    let credentials = json!({ "dir": dir, "endpoint": "client", "verify-peer": true });
    machine.object_add("tls-creds-x509", CREDENTIALS_ID, credentials).await?;
    Ok(parameters(&[("tls-creds", CREDENTIALS_ID), ("tls-hostname", &tls.hostname)]))
}

/// Removes the objects of an earlier try, if there are any.
pub(super) async fn remove(machine: &Machine) -> Result<(), QmpError> {
    machine.object_del(CREDENTIALS_ID).await?;
    machine.object_del(AUTHORIZATION_ID).await
}

fn parameters(pairs: &[(&str, &str)]) -> Map<String, Value> {
    pairs.iter().map(|(name, value)| ((*name).to_owned(), json!(value))).collect()
}
