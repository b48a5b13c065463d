//! A guest that is this host's, and shall run, is let run: tried until it does.
//!
//! The rules say when (`ResumeGuest`): on a source that keeps its guest, and on a destination that was restarted while its
//! guest fetched memory. There is no giving up, and no error: what lasts is told. Not here: who may run the guest.

use std::time::{Duration, Instant};

use tokio::time::sleep;
use tracing::warn;
use whimbrel_api::error::chain;
use whimbrel_api::vm::VmState;
use whimbrel_api::{MigrationId, VmId};
use whimbrel_migration::handoff::UNRESOLVED_AFTER_MS;
use whimbrel_qemu::machine::RunState;
use whimbrel_qemu::migrate::outgoing::{Outgoing, OutgoingError};
use whimbrel_qemu::migrate::{MigrationStatus, Statistics};

use crate::host::Host;
use crate::vm::found::hear_again;
use crate::vm::{Spawned, take_back};

/// How often an attempt is repeated, in milliseconds.
const RETRY_MS: u64 = 200;
/// How long QEMU may take to give up a migration, in seconds, before it is asked again.
const CANCEL_SECONDS: u64 = 10;

/// What the QEMU was doing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Was {
    /// Sending its guest: a migration that is not over would stop the guest again, or keep it from running.
    Sending,
    /// Receiving the rest of its guest's memory, which goes on.
    Fetching,
}

/// Ends when the guest runs, or does not for reasons of its own (see [`rests`]), or its QEMU is gone.
pub(super) async fn resume(host: &Host, qemu: &mut Spawned, id: MigrationId, was: Was) {
    let process = qemu.process.clone();
    tokio::select! {
        () = until_it_runs(host, qemu, id, was) => {}
        _ = process.wait_exit() => {}
    }
}

async fn until_it_runs(host: &Host, qemu: &mut Spawned, id: MigrationId, was: Was) {
    let began = Instant::now();
    let mut told = false;
    loop {
        hear_again(host, qemu).await;
        let over = was == Was::Fetching || is_over(host, qemu).await;
        match qemu.machine.status().await {
            Ok(status) if over && (status.running || rests(&status.run_state)) => return,
            _ => {}
        }
        match qemu.machine.cont().await {
            Ok(()) if over => return,
            Ok(()) => {}
            Err(error) => {
                warn!(migration = %id, error = chain(&error), "the guest could not be resumed; trying again");
            }
        }
        if !told && began.elapsed() >= Duration::from_millis(UNRESOLVED_AFTER_MS) {
            told = true;
            tell(host, qemu.definition.id, id).await;
        }
        sleep(Duration::from_millis(RETRY_MS)).await;
    }
}

/// Sees to it that no migration is under way, by which QEMU would stop the guest later; whether that is so.
async fn is_over(host: &Host, qemu: &Spawned) -> bool {
    let Ok(seen) = Statistics::query(qemu.machine.qmp()).await else { return false };
    if matches!(
        seen.status,
        MigrationStatus::None
            | MigrationStatus::Completed
            | MigrationStatus::Failed
            | MigrationStatus::Cancelled
    ) {
        return true;
    }
    let within = Duration::from_secs(CANCEL_SECONDS);
    match Outgoing::reattach(&qemu.machine).cancel(within).await {
        Ok(_) => true,
        Err(OutgoingError::Postcopy) => {
            take_back::from_postcopy(host, qemu).await;
            false
        }
        Err(_) => false,
    }
}

async fn tell(host: &Host, vm: VmId, id: MigrationId) {
    let why = format!(
        "it is to run here after its migration {id}, and QEMU does not let it; it is tried on"
    );
    host.vms.loan_news(vm, VmState::Unknown { why }).await;
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
