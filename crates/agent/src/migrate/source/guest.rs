//! The guest that stays or is gone: resumed where it stood, or its QEMU ended.
//!
//! Both are told by the rules alone, and neither can fail: what is not done yet is tried again. Not here: the copy
//! ([`super::copy`]), and the guest's start at the other end.

use tracing::warn;
use whimbrel_api::ApiError;
use whimbrel_api::error::chain;
use whimbrel_migration::handoff::SourceInput;
use whimbrel_pki::qemu_credentials::{QemuSide, remove_qemu_credentials, write_qemu_credentials};

use super::Departure;
use crate::host::Host;
use crate::migrate::resuming::{Was, resume};
use crate::vm::RunningVm;

impl Departure {
    /// The guest runs on, unless it has reasons of its own not to.
    pub(super) async fn resume_guest(&mut self) {
        if let Some(guest) = &mut self.guest {
            resume(&self.host, &mut guest.qemu, self.id, Was::Sending).await;
        }
    }

    /// The destination owns the guest and its disks are inactive here, or it was given up: nothing is left to save. Its end
    /// is heard, unless there is nothing that could end.
    pub(super) fn quit(&self) -> Option<SourceInput> {
        let Some(guest) = &self.guest else { return Some(SourceInput::QemuGone) };
        if let Err(error) = guest.qemu.process.kill() {
            warn!(migration = %self.id, error = chain(&error), "the source's QEMU could not be ended; the sweep goes on");
        }
        None
    }
}

/// Gives QEMU the certificates for a migration.
pub(super) fn lay_out_credentials(host: &Host, guest: &RunningVm) -> Result<(), ApiError> {
    let (user, folder) = (host.qemu_user(), guest.qemu.dir.tls_folder());
    write_qemu_credentials(&host.identity, &folder, QemuSide::Client, user.uid, user.gid)
        .map_err(|error| ApiError::internal("QEMU's certificates cannot be laid out", &error))
}

/// Takes the migration's certificates away from QEMU.
pub(super) fn remove_credentials(guest: &RunningVm) {
    if let Err(error) = remove_qemu_credentials(&guest.qemu.dir.tls_folder()) {
        warn!(vm = %guest.id(), error = chain(&error), "QEMU's certificates are left over until its run is swept");
    }
}
