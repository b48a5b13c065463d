//! What each host writes down, durably, about who owns a VM; and who may begin what.
//!
//! The only writer of a host's records is the VM's task in that host's agent, and while a
//! migration's machine lives, that machine. Pure data and the two admission rules; the ledger
//! itself is the agent's.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::names::{Epoch, MigrationId, Name, VmId};

/// What every message and every record of a handoff is about: the ownership of `vm` in `epoch`,
/// which `migration` may pass from its source to its destination.
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize, ToSchema,
)]
#[serde(deny_unknown_fields)]
pub struct Claim {
    /// The VM.
    pub vm: VmId,
    /// The migration.
    pub migration: MigrationId,
    /// The epoch in which the destination would own the VM.
    pub epoch: Epoch,
}

/// Whether the VM's user wants the guest to run. A migration does not change it: a guest paused by
/// its user arrives paused. Only a user who wants the guest to arrive paused changes it on the way:
/// the source's driver says `Pause` in every GO of that migration, and the destination writes it down
/// with `Owned`. The source's own records keep what holds if the guest stays.
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize, ToSchema,
)]
#[serde(rename_all = "lowercase")]
pub enum Intent {
    /// The guest shall run.
    Run,
    /// The guest shall stand still.
    Pause,
}

/// One durable record of one host about one VM; the key is (vm, migration).
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize, ToSchema)]
pub struct Ownership {
    /// The VM.
    pub vm: VmId,
    /// The epoch that the record is about. For `Leaving` this is the epoch that may be given away;
    /// the host owns an earlier one.
    pub epoch: Epoch,
    /// The migration that led to the record; none for a VM created on this host.
    pub migration: Option<MigrationId>,
    /// Whether the guest shall run.
    pub intent: Intent,
    /// What this host is to the VM.
    #[serde(flatten)]
    pub standing: Standing,
}

/// What a host is to a VM in the epoch of a record.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize, ToSchema)]
#[serde(tag = "standing", rename_all = "lowercase")]
pub enum Standing {
    /// This host owns the VM.
    Owned,
    /// This host owns the VM, and a migration is under way.
    Leaving {
        /// The destination.
        to: Name,
    },
    /// This host has given the VM away and does not know yet whether it arrived.
    Released {
        /// The destination, which decides.
        to: Name,
    },
    /// Like `Released`, and this host's QEMU still holds memory that the destination lacks
    /// (post-copy): it is needed until the destination says that it needs nothing more.
    Serving {
        /// The destination, which decides.
        to: Name,
    },
    /// This host has given the VM away, and the destination has confirmed.
    Gone {
        /// The owner after this host.
        to: Name,
    },
    /// This host owns the VM, and part of its memory is still with the former owner (post-copy).
    Fetching {
        /// The former owner, whose QEMU must live until everything is here.
        from: Name,
    },
    /// This host may be given the VM.
    Expected {
        /// The owner.
        from: Name,
    },
    /// This host will never own the VM in this epoch.
    Refused {
        /// Who offered it.
        from: Name,
    },
}

impl Ownership {
    /// The record of a VM that is created on this host.
    #[must_use]
    pub const fn created(vm: VmId, intent: Intent) -> Self {
        Self { vm, epoch: Epoch::FIRST, migration: None, intent, standing: Standing::Owned }
    }

    /// Whether this record, being the host's current one, lets this host run the guest.
    #[must_use]
    pub const fn may_run(&self) -> bool {
        matches!(
            self.standing,
            Standing::Owned | Standing::Leaving { .. } | Standing::Fetching { .. }
        )
    }

    /// Whether the record says that a migration is open here, which a restarted agent takes up.
    #[must_use]
    pub const fn is_open(&self) -> bool {
        match self.standing {
            Standing::Leaving { .. }
            | Standing::Released { .. }
            | Standing::Serving { .. }
            | Standing::Fetching { .. }
            | Standing::Expected { .. } => true,
            Standing::Owned | Standing::Gone { .. } | Standing::Refused { .. } => false,
        }
    }

    /// The claim that the record is about, if it stems from a migration.
    #[must_use]
    pub fn claim(&self) -> Option<Claim> {
        let migration = self.migration?;
        Some(Claim { vm: self.vm, migration, epoch: self.epoch })
    }

    pub(super) const fn of(claim: Claim, intent: Intent, standing: Standing) -> Self {
        let Claim { vm, migration, epoch } = claim;
        Self { vm, epoch, migration: Some(migration), intent, standing }
    }

    /// The record with which the source goes on after a migration that did not move the VM: the
    /// claim's epoch is burnt.
    pub(super) const fn after_staying(claim: Claim, intent: Intent) -> Self {
        let next = Claim { epoch: claim.epoch.next(), ..claim };
        Self::of(next, intent, Standing::Owned)
    }
}

/// A host's word on a VM: of all its records of that VM, the one with the highest epoch.
#[must_use]
pub fn current<'a>(records: impl IntoIterator<Item = &'a Ownership>) -> Option<&'a Ownership> {
    records.into_iter().max_by_key(|record| record.epoch)
}

/// Why a host does not take part in a migration. Nothing was begun.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NotAdmitted {
    /// The source does not own the VM.
    #[error("this host does not own the VM")]
    NotOwner,
    /// The destination owns the VM already.
    #[error("the VM is already on this host")]
    OwnedHere,
    /// Another migration of the VM is open on this host.
    #[error("the VM is already migrating (migration {0})")]
    Migrating(MigrationId),
    /// An earlier migration's outcome is still unknown here.
    #[error("the outcome of an earlier migration of the VM is not known yet; ask host {ask}")]
    InDoubt {
        /// Whose answer decides.
        ask: Name,
    },
    /// The offered epoch is not after what this host already knows.
    #[error("epoch {offered} was offered, but this host already knows epoch {known}")]
    StaleEpoch {
        /// The epoch of the offer.
        offered: Epoch,
        /// The epoch of this host's current record.
        known: Epoch,
    },
    /// The migration's id has been used on this host before.
    #[error("migration {0} has been here before; every try needs its own id")]
    Spent(MigrationId),
}

/// May this host, with this current record of the VM, begin to move it away under this claim?
/// `spent` is whether its ledger has any record of the migration. The claim's epoch need not be the
/// next one: a try that ended before the source was asked has burnt that at its destination alone.
pub(super) fn admit_source(
    current: &Ownership,
    spent: bool,
    claim: Claim,
) -> Result<(), NotAdmitted> {
    if spent {
        return Err(NotAdmitted::Spent(claim.migration));
    }
    match &current.standing {
        Standing::Owned if claim.vm != current.vm => Err(NotAdmitted::NotOwner),
        Standing::Owned if claim.epoch <= current.epoch => {
            Err(NotAdmitted::StaleEpoch { offered: claim.epoch, known: current.epoch })
        }
        Standing::Owned => Ok(()),
        // A guest whose memory is still on its way is no whole guest to send on.
        Standing::Leaving { .. } | Standing::Serving { .. } | Standing::Fetching { .. } => {
            Err(migrating(current))
        }
        Standing::Released { to } => Err(NotAdmitted::InDoubt { ask: to.clone() }),
        Standing::Gone { .. } | Standing::Expected { .. } | Standing::Refused { .. } => {
            Err(NotAdmitted::NotOwner)
        }
    }
}

/// May this host be given the VM? `current` is its word on the VM so far, `spent` whether its
/// ledger has any record of the offer's migration.
pub(super) fn admit_destination(
    current: Option<&Ownership>,
    spent: bool,
    offer: Claim,
) -> Result<(), NotAdmitted> {
    if spent {
        return Err(NotAdmitted::Spent(offer.migration));
    }
    let Some(current) = current else { return Ok(()) };
    match &current.standing {
        Standing::Owned => Err(NotAdmitted::OwnedHere),
        Standing::Leaving { .. }
        | Standing::Serving { .. }
        | Standing::Fetching { .. }
        | Standing::Expected { .. } => Err(migrating(current)),
        Standing::Released { to } => Err(NotAdmitted::InDoubt { ask: to.clone() }),
        Standing::Gone { .. } | Standing::Refused { .. } if offer.epoch <= current.epoch => {
            Err(NotAdmitted::StaleEpoch { offered: offer.epoch, known: current.epoch })
        }
        Standing::Gone { .. } | Standing::Refused { .. } => Ok(()),
    }
}

fn migrating(record: &Ownership) -> NotAdmitted {
    // All of these stem from a migration; a record without one is broken, and not the owner's word.
    record.migration.map_or(NotAdmitted::NotOwner, NotAdmitted::Migrating)
}
