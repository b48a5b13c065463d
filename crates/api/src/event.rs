//! What changed in a pool: the lines of `GET /v1/events`.
//!
//! Each event carries the whole thing as it is now, so that a reader who missed some has missed nothing that lasts. A stream
//! begins with one event for every thing there is; whoever reads too slowly gets that beginning again instead of a backlog.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;
use whimbrel_migration::names::{Name, VmId};

use crate::migration::Migration;
use crate::policy::{AppliedPolicy, PolicyStatus};
use crate::pool::{Host, Network, Storage};
use crate::vm::Vm;

/// Something as it is now.
// A migration's record is much larger than the rest; events are not kept, so a box would save nothing.
#[allow(clippy::large_enum_variant)]
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case", tag = "event")]
pub enum Event {
    /// A host joined, changed or went silent.
    Host {
        /// The host.
        host: Host,
    },
    /// A network was made.
    Network {
        /// The network.
        network: Network,
    },
    /// A storage was made known.
    Storage {
        /// The storage.
        storage: Storage,
    },
    /// A VM was created or changed.
    Vm {
        /// The VM.
        vm: Vm,
    },
    /// A VM was deleted.
    VmDeleted {
        /// Its id.
        id: VmId,
        /// Its name.
        name: Name,
    },
    /// A policy was made or changed.
    Policy {
        /// The policy.
        policy: PolicyStatus,
    },
    /// A policy was deleted.
    PolicyDeleted {
        /// Its name.
        name: Name,
    },
    /// Another policy applies where a request says none. A stream begins with that of the pool and those that VMs have of their own.
    PolicyApplied {
        /// To which VM; to the pool, and to every VM that has none of its own, without it.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        vm: Option<VmId>,
        /// The policy, and where it comes from.
        applied: AppliedPolicy,
    },
    /// A migration began, went on or ended.
    Migration {
        /// The record.
        migration: Migration,
    },
}
