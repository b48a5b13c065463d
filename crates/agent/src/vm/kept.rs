//! The definition that a VM leaves behind (`--copy`): a document in the agent's folder, `kept/<VM's id>.json`.
//!
//! A VM has one owner, and its disks have one VM. A second definition of them that could be started would be the very thing that the
//! handoff is there to prevent; so what is kept is no VM: nobody starts it, no call lists it, and it is nothing to the ledger. It is
//! there for people and their scripts, as the file of a shut-off domain is elsewhere.
//!
//! Written before a migration begins and taken back where the VM stays, so that one that has moved has certainly left it. It goes
//! when the VM comes back.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use whimbrel_api::vm::VmDefinition;
use whimbrel_api::{ApiError, VmId};

use crate::host::Host;

/// The folder.
const FOLDER: &str = "kept";
/// Mode of a document: as the ledger, it names disks and addresses.
const FILE_MODE: u32 = 0o600;
/// Mode of the folder.
const FOLDER_MODE: u32 = 0o700;

/// Where a VM's definition is kept.
fn place(host: &Host, vm: VmId) -> PathBuf {
    host.config.dir.join(FOLDER).join(format!("{vm}.json"))
}

/// Keeps a definition; durable on return.
///
/// # Errors
/// `internal` where it cannot be written.
pub(crate) async fn keep(host: &Arc<Host>, definition: &VmDefinition) -> Result<(), ApiError> {
    let place = place(host, definition.id);
    let text = serde_json::to_vec_pretty(definition)
        .map_err(|error| ApiError::internal("the definition cannot be written", &error))?;
    let writing = tokio::task::spawn_blocking(move || write(&place, &text));
    let written =
        writing.await.map_err(|error| ApiError::internal("the writing broke off", &error))?;
    written
        .map_err(|error| ApiError::internal("the definition cannot be kept on this host", &error))
}

fn write(place: &Path, text: &[u8]) -> std::io::Result<()> {
    use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
    let Some(folder) = place.parent() else { return Ok(()) };
    std::fs::DirBuilder::new().recursive(true).mode(FOLDER_MODE).create(folder)?;
    let new = place.with_extension("new");
    let mut options = std::fs::OpenOptions::new();
    let mut file = options.write(true).create(true).truncate(true).mode(FILE_MODE).open(&new)?;
    file.write_all(text)?;
    file.sync_all()?;
    std::fs::rename(&new, place)?;
    std::fs::File::open(folder)?.sync_all()
}

/// Takes a kept definition away; one that is not there is no error. What fails is told: it is a document too many, and no more.
pub(crate) async fn let_go(host: &Arc<Host>, vm: VmId) {
    match tokio::fs::remove_file(place(host, vm)).await {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            tracing::warn!(%vm, %error, "the definition that a VM had left here is still there");
        }
        _ => {}
    }
}
