//! The folder that QEMU's `tls-creds-x509` object reads (`dir=…`), made for one QEMU process.
//!
//! QEMU 7.2 to 10.0 look there for `ca-cert.pem` and, by `endpoint`, `server-cert.pem` and
//! `server-key.pem` or `client-cert.pem` and `client-key.pem`. QEMU runs unprivileged, so the
//! folder (0700) and its files (0600) belong to its user. Called by the agent, as root, before it
//! starts a QEMU or adds the object; the folder above must be writable to root alone.

use std::fs::{self, DirBuilder, File, Permissions};
use std::io;
use std::os::unix::fs::{DirBuilderExt as _, PermissionsExt as _, chown};
use std::path::{Path, PathBuf};

use crate::files::{HostIdentity, write_new};

const FILE_MODE: u32 = 0o600;
const FOLDER_MODE: u32 = 0o700;

/// Which end of the connection a QEMU stands at (`endpoint` of the object).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum QemuSide {
    /// It listens: the destination of a migration.
    Server,
    /// It connects: the source of a migration.
    Client,
}

impl QemuSide {
    /// The value of `endpoint` in the object's definition.
    pub fn endpoint(self) -> &'static str {
        match self {
            Self::Server => "server",
            Self::Client => "client",
        }
    }
}

/// Why the credentials could not be laid out or removed; nothing of the new folder is left.
#[derive(Debug, thiserror::Error)]
pub enum QemuCredentialsError {
    /// The folder exists already: another QEMU's, or one that was not swept.
    #[error("{} exists already", folder.display())]
    Exists {
        /// The folder.
        folder: PathBuf,
    },
    /// Making, filling, handing over or renaming the folder failed.
    #[error("cannot lay out QEMU's credentials in {}", folder.display())]
    Write {
        /// The folder.
        folder: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The folder could not be removed.
    #[error("cannot remove QEMU's credentials in {}", folder.display())]
    Remove {
        /// The folder.
        folder: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
}

/// Makes `folder` with the credentials of `side`, owned by `uid` and `gid`.
///
/// The folder appears complete or not at all: it is built beside its place, out of reach of the
/// QEMU user, and renamed. Not synced to disk: it lives as long as its QEMU.
pub fn write_qemu_credentials(
    identity: &HostIdentity,
    folder: &Path,
    side: QemuSide,
    uid: u32,
    gid: u32,
) -> Result<(), QemuCredentialsError> {
    let failed = |source| QemuCredentialsError::Write { folder: folder.to_owned(), source };
    // To chown(2) this value means "leave the owner": the key would silently stay root's.
    if uid == u32::MAX || gid == u32::MAX {
        return Err(failed(io::Error::new(io::ErrorKind::InvalidInput, "no such user or group")));
    }
    if folder.symlink_metadata().is_ok() {
        return Err(QemuCredentialsError::Exists { folder: folder.to_owned() });
    }
    let name = folder.file_name().ok_or_else(|| failed(io::ErrorKind::InvalidInput.into()))?;
    let beside = folder.with_file_name(format!(".{}.new", name.to_string_lossy()));
    remove_tree(&beside).map_err(failed)?;
    let built = fill(identity, &beside, side, uid, gid).and_then(|()| fs::rename(&beside, folder));
    built.map_err(|source| {
        // The cause is reported; a second failure while cleaning up would only hide it.
        let _ = remove_tree(&beside);
        failed(source)
    })
}

/// Removes what [`write_qemu_credentials`] made. A folder that is not there is no error.
pub fn remove_qemu_credentials(folder: &Path) -> Result<(), QemuCredentialsError> {
    remove_tree(folder)
        .map_err(|source| QemuCredentialsError::Remove { folder: folder.to_owned(), source })
}

fn fill(
    identity: &HostIdentity,
    folder: &Path,
    side: QemuSide,
    uid: u32,
    gid: u32,
) -> io::Result<()> {
    let credentials = match side {
        QemuSide::Server => identity.qemu_server(),
        QemuSide::Client => identity.qemu_client(),
    };
    let end = side.endpoint();
    let files = [
        ("ca-cert.pem".to_owned(), credentials.ca.to_pem()),
        (format!("{end}-cert.pem"), credentials.certificate.to_pem()),
        (format!("{end}-key.pem"), credentials.key.to_pem()),
    ];
    DirBuilder::new().mode(FOLDER_MODE).create(folder)?;
    File::open(folder)?.set_permissions(Permissions::from_mode(FOLDER_MODE))?;
    for (name, text) in files {
        let path = folder.join(name);
        write_new(&path, text.as_bytes(), FILE_MODE)?;
        chown(&path, Some(uid), Some(gid))?;
    }
    // Last: until here the folder is ours alone, and nobody can put a link in a file's place.
    chown(folder, Some(uid), Some(gid))
}

fn remove_tree(path: &Path) -> io::Result<()> {
    match fs::remove_dir_all(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        other => other,
    }
}
