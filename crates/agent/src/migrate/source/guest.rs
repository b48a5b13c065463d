//! The guest that stays or is gone: resumed where it stood, or its QEMU ended.
//!
//! Both are told by the rules alone, and neither can fail: what is not done yet is tried again. Not here: the copy
//! ([`super::copy`]), and the guest's start at the other end.

use std::time::Duration;

use tokio::time::sleep;
use tracing::warn;
use whimbrel_api::ApiError;
use whimbrel_api::error::chain;
use whimbrel_migration::handoff::SourceInput;
use whimbrel_pki::qemu_credentials::{QemuSide, remove_qemu_credentials, write_qemu_credentials};
use whimbrel_qemu::machine::RunState;

use super::Departure;
use crate::host::Host;
use crate::vm::RunningVm;
use crate::vm::found::hear_again;
use crate::vm::take_back;

/// How often an attempt to resume the guest is repeated, in milliseconds.
const RESUME_RETRY_MS: u64 = 200;

impl Departure {
    /// The guest runs, or does not for reasons of its own (see [`rests`]), or its QEMU is gone: nothing else ends this.
    pub(super) async fn resume_guest(&mut self) {
        let Some(guest) = &mut self.guest else { return };
        let (process, id) = (guest.qemu.process.clone(), self.id);
        let resumed = async {
            loop {
                hear_again(&self.host, &mut guest.qemu).await;
                let machine = &guest.qemu.machine;
                match machine.status().await {
                    Ok(status) if status.running || rests(&status.run_state) => return,
                    _ => {}
                }
                match machine.cont().await {
                    Ok(()) => return,
                    Err(error) => {
                        warn!(migration = %id, error = chain(&error), "the guest could not be resumed; trying again");
                        take_back::from_postcopy(&self.host, &guest.qemu).await;
                        sleep(Duration::from_millis(RESUME_RETRY_MS)).await;
                    }
                }
            }
        };
        tokio::select! {
            () = resumed => {}
            _ = process.wait_exit() => {}
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

/// Whether a guest stands still for its own reasons and not for the migration: it has powered itself off, sleeps, has
/// panicked, or met an error. Some of these QEMU (7.2, 10.0) refuses to resume, a sleeping one it lets sleep; what is to be
/// done about each is the VM's task's matter.
fn rests(run_state: &RunState) -> bool {
    matches!(
        run_state,
        RunState::Shutdown
            | RunState::Suspended
            | RunState::GuestPanicked
            | RunState::IoError
            | RunState::InternalError
            | RunState::Watchdog
    )
}
