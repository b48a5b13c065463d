//! The guest that stays or is gone: resumed where it stood, or its QEMU ended; and what it does by itself meanwhile.
//!
//! Both are told by the rules alone, and neither can fail: what is not done yet is tried again. A guest that powers itself
//! off, or panics, has nowhere to go: the migration ends here. One that reboots goes on, and so does the copy. What a guest
//! has done last is told before it can be released ([`Departure::listen`](crate::migrate::driver::Side::listen) hears events first);
//! at the other end it is its new host's matter. Not here: the copy ([`super::copy`]), and the guest's start at the other end.

use tracing::warn;
use whimbrel_api::agent::OutgoingRequest;
use whimbrel_api::error::chain;
use whimbrel_api::migration::Stay;
use whimbrel_api::{ApiError, ErrorCode};
use whimbrel_migration::handoff::SourceInput;
use whimbrel_migration::strategy::Decision;
use whimbrel_pki::qemu_credentials::{QemuSide, remove_qemu_credentials, write_qemu_credentials};
use whimbrel_qemu::event::{Event, EventKind};
use whimbrel_qemu::machine::RunState;
use whimbrel_qemu::migrate::outgoing::OutgoingError;

use super::Departure;
use crate::host::Host;
use crate::migrate::resuming::{Was, resume};
use crate::vm::RunningVm;
use crate::vm::found::has_ended;

impl Departure {
    /// What an event of the source's QEMU means for the migration.
    pub(super) fn qemu_said(&mut self, event: &Event) -> Option<SourceInput> {
        match &event.kind {
            EventKind::GuestPanicked { .. } if !self.rules.is_past_release() => {
                Some(self.guest_is_off(&RunState::GuestPanicked))
            }
            EventKind::Shutdown { guest: true, .. } if !self.rules.is_past_release() => {
                Some(self.guest_is_off(&RunState::Shutdown))
            }
            // The guest stands still: the destination can be asked while QEMU sends the rest. A question that is open already
            // is answered as well, and a second one at this moment would have to make a connection of its own first.
            EventKind::Stop => {
                if self.asking.is_empty() {
                    self.ask_loaded();
                }
                None
            }
            _ => None,
        }
    }

    /// What the guest did before anybody listened.
    pub(super) async fn off_already(&mut self) -> Option<SourceInput> {
        let run_state = self.guest.as_ref()?.qemu.machine.status().await.ok()?.run_state;
        let off = matches!(run_state, RunState::Shutdown | RunState::GuestPanicked);
        off.then(|| self.guest_is_off(&run_state))
    }

    /// QEMU keeps the settings of a migration that is over. The next one takes them back first, and does not begin where it
    /// cannot: so this is told, and nothing is wrong yet. A QEMU that has ended keeps nothing.
    pub(super) fn tell_kept(&self, error: &OutgoingError) {
        let Some(guest) =
            self.guest.as_ref().filter(|guest| !has_ended(guest.qemu.process.identity()))
        else {
            return;
        };
        let why = chain(error);
        warn!(migration = %self.id, vm = %guest.id(), error = why, "QEMU keeps the settings of a migration that is over");
        self.decided(Decision {
            measured: format!(
                "the migration is over, and QEMU does not take its settings back: {why}"
            ),
            chosen: "they are taken back by the next migration, which does not begin without"
                .to_owned(),
            rejected: Vec::new(),
        });
    }

    /// The guest runs no more, and does not wait to: there is nothing to move.
    pub(super) fn guest_is_off(&mut self, run_state: &RunState) -> SourceInput {
        if *run_state == RunState::GuestPanicked {
            let phase = self.report.borrow().phase;
            return self.failed(phase, ErrorCode::Engine, "the guest panicked".to_owned());
        }
        self.why.get_or_insert(Stay::GuestPoweredOff);
        SourceInput::Fail("the guest powered itself off".to_owned())
    }

    pub(super) fn qemu_ended(&mut self) -> SourceInput {
        let words = self
            .guest
            .as_ref()
            .map(|guest| guest.qemu.process.last_words().join("; "))
            .unwrap_or_default();
        let message = format!("the source's QEMU ended: {words}");
        let (phase, code) = (self.report.borrow().phase, ErrorCode::Engine.as_str().to_owned());
        self.why.get_or_insert(Stay::Failed { phase, code, message });
        SourceInput::QemuGone
    }

    /// The guest runs on, unless it has reasons of its own not to.
    pub(super) async fn resume_guest(&mut self) {
        // Off, it has nothing to run on for, and what is left of it is ended.
        let off = self.why == Some(Stay::GuestPoweredOff);
        if let Some(guest) = self.guest.as_mut().filter(|_| !off) {
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

/// What a QEMU may lock for zero-copy, in bytes: no bound, as its guest's memory is all that it locks.
const ZERO_COPY_LOCKED_BYTES: u64 = u64::MAX;

/// Lets QEMU lock the memory that it sends without a copy, if that is asked for: without it QEMU refuses, with everything begun.
pub(super) fn let_lock_memory(
    request: &OutgoingRequest,
    guest: &RunningVm,
) -> Result<(), ApiError> {
    if !request.strategy.zerocopy {
        return Ok(());
    }
    guest.qemu.process.allow_locked_memory(ZERO_COPY_LOCKED_BYTES).map_err(|error| {
        let message = format!("QEMU may not be let lock its guest's memory: {error}");
        ApiError::new(ErrorCode::NoResources, message)
            .hint("leave `--zerocopy` out, or let the agent raise limits (CAP_SYS_RESOURCE)")
    })
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
