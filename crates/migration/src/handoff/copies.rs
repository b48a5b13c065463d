//! What becomes of the files of disks that a migration has copied: of the originals on the source, and of the copies
//! on the destination.
//!
//! Both are in their host's journal, under the migration, from before they exist. Whoever sweeps asks here, with the
//! host's record of *that* migration (not the VM's current one), and only when no machine of the migration lives on the
//! host. Nothing else decides over them: not the end of a driver, not a message, not a silence. Pure; the checker
//! sweeps by the same functions.

use super::record::{Ownership, Standing};

/// What is to be done with files of disks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum CopyFate {
    /// They are a VM's disks, or may yet be: hands off.
    Needed,
    /// The VM runs elsewhere, from other files, and that is recorded: what the user wants done with these.
    Retire,
    /// A guest has written to them, and the VM was taken back to older ones: nobody else has those writes. They are put
    /// aside and never deleted without an operator.
    PutAside,
    /// No guest has ever run from them, and none will: they are deleted.
    Discard,
}

/// What becomes of the files that a source had a VM's disks in, of those disks that the migration has copied away.
/// `record` is the source's record of the migration, `in_use` whether a QEMU of the VM still lives there.
///
/// They are the last good copy until the destination has said `Owned` *and* that is written down here. Before that it
/// can refuse; and a word that is only remembered is forgotten with the agent.
#[must_use]
pub const fn fate_of_originals(record: Option<&Ownership>, in_use: bool) -> CopyFate {
    match record {
        Some(Ownership { standing: Standing::Gone { .. }, .. }) if !in_use => CopyFate::Retire,
        _ => CopyFate::Needed,
    }
}

/// What becomes of the files that were made at a destination. `record` is the destination's record of the migration,
/// `in_use` whether a QEMU of the VM still lives there.
#[must_use]
pub const fn fate_of_copies(record: Option<&Ownership>, in_use: bool) -> CopyFate {
    if in_use {
        return CopyFate::Needed;
    }
    match record {
        // Without a record no GO was ever taken.
        None => CopyFate::Discard,
        Some(record) => match record.standing {
            Standing::Refused { .. } => CopyFate::Discard,
            // A destination's own record of a migration says so only after an operator has taken the VM back.
            Standing::Gone { .. } => CopyFate::PutAside,
            // A QEMU that is gone proves nothing: the VM may have crashed here, and be started again.
            Standing::Owned
            | Standing::Fetching { .. }
            | Standing::Expected { .. }
            | Standing::Leaving { .. }
            | Standing::Released { .. }
            | Standing::Serving { .. } => CopyFate::Needed,
        },
    }
}
