//! A VM was taken back from this host by an operator's word, while nobody could ask it: what this host does when it
//! hears of that.
//!
//! It is the one way, besides a migration, by which a host stops being the owner; and never into a lower epoch. It is for
//! a host without an open migration of the VM: a machine that lives is told ([`super::DestinationInput::Superseded`]), and
//! the word is given again when it has finished. Called by the destination's agent, again and again until it has answered.

use super::Observed;
use super::record::{Claim, Ownership, Standing};
use crate::names::Name;

/// What a host does that hears of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Superseding {
    /// Nothing: what it knows of the VM is as new, or does not let it run the guest.
    Nothing,
    /// It has a QEMU of this VM, which the operator's word denied. It ends it, and asks again when that is gone.
    EndGuest,
    /// It writes this, and has answered once it is durable.
    Write(Ownership),
}

/// What a host does with `current` for its word on the VM, that sees its QEMU as `observed`, and hears that since
/// `claim.epoch` the VM is `owner`'s.
#[must_use]
pub fn supersede(
    current: Option<&Ownership>,
    claim: Claim,
    owner: &Name,
    observed: Observed,
) -> Superseding {
    let Some(current) = current else { return Superseding::Nothing };
    if current.vm != claim.vm || current.epoch >= claim.epoch {
        return Superseding::Nothing;
    }
    match current.standing {
        Standing::Owned | Standing::Fetching { .. } | Standing::Expected { .. } => {}
        // Neither may run the guest, and either can be offered the VM again.
        Standing::Gone { .. } | Standing::Refused { .. } => return Superseding::Nothing,
        // It gives the VM away itself, in an epoch that its own migration settles.
        Standing::Leaving { .. } | Standing::Released { .. } | Standing::Serving { .. } => {
            return Superseding::Nothing;
        }
    }
    if observed != Observed::Gone {
        return Superseding::EndGuest;
    }
    let gone = Standing::Gone { to: owner.clone() };
    Superseding::Write(Ownership::of(claim, current.intent, gone))
}
