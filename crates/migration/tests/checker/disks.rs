//! Disks that are copied with the guest: what is on each host's copy, in the only respect that matters, and what can
//! happen to it.
//!
//! A copy is *current* if every write that a guest was told to be done is on it. Making a target, a guest that runs, a
//! mirror that is settled, an operator's word and a sweep are all that changes one.

use whimbrel_migration::handoff::{
    CopyFate, Ownership, SourceInput, fate_of_copies, fate_of_originals,
};
use whimbrel_migration::names::MigrationId;

use super::bugs::Bug;
use super::events::Handoff;
use super::invariants;
use super::world::{Switchover, Try, World, is_released, other};

/// What is in the files that a host has of the VM's disks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Content {
    /// There are none.
    Absent,
    /// Something in between: a mirror writes to them.
    Partial,
    /// All that was ever acknowledged to the guest.
    Current,
    /// A whole disk, as it was before a guest wrote more elsewhere.
    Old,
}

/// A host's files of the VM's disks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Files {
    pub(crate) content: Content,
    /// The migration for which they were made.
    pub(crate) made_by: Option<MigrationId>,
}

impl Files {
    pub(crate) const fn with(content: Content) -> Self {
        Self { content, made_by: None }
    }
}

impl World {
    /// A guest that runs on `host` writes to its disks there, and is told that this is done.
    pub(crate) fn write_disks(&mut self, host: usize) {
        let Some(files) = &mut self.files else { return };
        if files[host].content != Content::Current {
            self.broken.insert(invariants::ACKED_WRITES);
        }
        if files[other(host)].content == Content::Current {
            files[other(host)].content = Content::Old;
        }
    }

    /// Empty images are made for a migration.
    pub(crate) fn make_target(&mut self, host: usize, made_by: Option<MigrationId>) {
        self.lose_files(host, Files { content: Content::Partial, made_by });
    }

    /// What a host has is no more; others must have it.
    fn lose_files(&mut self, host: usize, instead: Files) {
        let Some(files) = &mut self.files else { return };
        let lost = std::mem::replace(&mut files[host], instead);
        if lost.content == Content::Current && files[other(host)].content != Content::Current {
            self.broken.insert(invariants::LAST_COPY);
        }
    }

    /// An operator's word: what is on `host` counts, whatever was written elsewhere.
    pub(crate) fn take_back_disks(&mut self, host: usize) {
        let Some(files) = &mut self.files else { return };
        if files[host].content == Content::Old {
            files[host].content = Content::Current;
        }
        if files[other(host)].content == Content::Current {
            files[other(host)].content = Content::Old;
        }
    }

    /// Whether nothing is left of a migration's files but those of the VM's owner, and what is put aside for an operator.
    pub(crate) fn disks_are_swept(&self, bystander: usize) -> bool {
        self.files.is_none_or(|files| {
            files[bystander].content == Content::Absent || self.tries.iter().any(|t| t.reclaimed)
        })
    }
}

impl Handoff {
    /// The guest stands still, and QEMU waits before it sends the rest.
    pub(crate) fn halt(&self, world: &mut World, host: usize) -> bool {
        let Some(sender) = &world.hosts[host].qemu else { return false };
        if !self.disks || sender.sending.is_none() || sender.switchover != Switchover::Far {
            return false;
        }
        let still = self.bug != Some(Bug::SettledWhileRunning);
        if let Some(sender) = &mut world.hosts[host].qemu {
            sender.switchover = Switchover::Waiting;
            sender.running &= !still;
        }
        true
    }

    /// The last bytes of the disks get there, and are flushed; the mirrors end without an error.
    pub(crate) fn settle(&self, world: &mut World, host: usize) -> bool {
        let [sender, target] = [host, other(host)].map(|host| world.hosts[host].qemu.as_ref());
        let (Some(sender), Some(target)) = (sender, target) else { return false };
        let open = target.exporting && !target.killed && target.incoming == sender.sending;
        if sender.switchover != Switchover::Settling || !open {
            return false;
        }
        let (sending, running) = (sender.sending, sender.running);
        let Some(files) = &mut world.files else { return false };
        files[other(host)].content = match files[host].content {
            Content::Current if !running => Content::Current,
            _ => Content::Old,
        };
        if let Some(one) = sending.and_then(|id| world.try_mut(id)) {
            one.settled = true;
        }
        if let Some(sender) = &mut world.hosts[host].qemu {
            sender.switchover = Switchover::Settled;
        }
        true
    }

    /// Whether the driver of a source would say `input` of its disks.
    pub(crate) fn holds_of_disks(&self, at: Switchover, input: &SourceInput) -> bool {
        let unread = self.bug == Some(Bug::MirrorErrorUnread) && at == Switchover::Settling;
        match input {
            SourceInput::AtSwitchover => at == Switchover::Waiting,
            SourceInput::DisksSettled => at == Switchover::Settled || unread,
            _ => false,
        }
    }

    /// Whether QEMU has been told to send the rest.
    pub(crate) fn may_send(&self, at: Switchover) -> bool {
        let told = !self.disks || self.unaware || at == Switchover::Told;
        told || matches!(self.bug, Some(Bug::ReleasedUnsettled | Bug::PostcopyUnsettled))
    }

    /// The agent on `host` looks at what a migration has left there.
    pub(crate) fn sweep(&self, world: &mut World, host: usize, number: usize) -> bool {
        let Try { claim, from, .. } = world.tries[number];
        let it = &world.hosts[host];
        let hasty = self.bug == Some(Bug::RetiredBeforeRecorded);
        let idle = it.ready().is_some_and(|agent| agent.machines.is_empty() || hasty);
        let Some(files) = world.files.filter(|_| idle) else { return false };
        let (record, in_use) = (it.row(claim.migration), it.qemu.is_some());
        let made_by = files[host].made_by;
        let fate = if from == host {
            let originals = made_by < Some(claim.migration);
            let fate = self.fate_of_originals(record, in_use);
            if originals { fate } else { CopyFate::Needed }
        } else if made_by == Some(claim.migration) {
            let by_qemu = self.bug == Some(Bug::DiscardedByQemu) && !in_use;
            if by_qemu { CopyFate::Discard } else { fate_of_copies(record, in_use) }
        } else {
            CopyFate::Needed
        };
        let left = match fate {
            CopyFate::Needed | CopyFate::PutAside => true,
            CopyFate::Discard => self.bug == Some(Bug::CopiesLeftBehind),
            CopyFate::Retire => self.bug == Some(Bug::OriginalsLeftBehind),
        };
        if left || files[host].content == Content::Absent {
            return false;
        }
        world.lose_files(host, Files { content: Content::Absent, made_by });
        if fate == CopyFate::Retire && !world.hosts[other(host)].took(claim) {
            world.broken.insert(invariants::LAST_COPY);
        }
        true
    }

    fn fate_of_originals(&self, record: Option<&Ownership>, in_use: bool) -> CopyFate {
        if self.bug == Some(Bug::RetiredBeforeRecorded) && record.is_some_and(is_released) {
            return CopyFate::Retire;
        }
        fate_of_originals(record, in_use)
    }
}
