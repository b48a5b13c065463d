//! What controller and agents, and agents among themselves, say to each other (`/v1` of an agent).
//!
//! The controller asks for everything but the handoff; the handoff's messages ([`Handoff`]) go from the source's agent to
//! the destination's, or through the controller as a relay that adds nothing and is never needed for safety.
//!
//! | call | asked by | what |
//! |---|---|---|
//! | `GET /v1/host` | controller | [`HostReport`] |
//! | `GET /v1/certificates` | controller | [`CertificateRequests`] |
//! | `PUT /v1/certificates` | controller | [`whimbrel_pki::authority::HostCertificates`]; in use at once |
//! | `PUT, DELETE /v1/networks/{name}` | controller | [`crate::pool::Network`] |
//! | `PUT, DELETE /v1/storages/{name}` | controller | [`crate::pool::Storage`] → [`StorageReport`] |
//! | `POST /v1/storages/{name}/token` | controller | writes a token → [`SharedToken`] |
//! | `POST /v1/storages/{name}/seen` | controller | [`SharedToken`] → [`TokenSeen`] |
//! | `GET /v1/vms`, `GET /v1/vms/{id}` | controller | [`VmReport`] |
//! | `GET /v1/vms/{id}/mobility` | controller | [`Mobility`] |
//! | `PUT /v1/vms/{id}` | controller | [`crate::vm::VmDefinition`] → [`VmReport`]; creates the disks |
//! | `POST /v1/vms/{id}/start`, `stop`, `pause`, `resume` | controller | → [`VmReport`] |
//! | `DELETE /v1/vms/{id}` | controller | with its disks |
//! | `POST /v1/vms/{id}/save`, `restore` | controller | [`crate::vm::StateFile`] → [`VmReport`] |
//! | `PUT /v1/vms/{id}/template` | controller | [`crate::lineage::SetTemplate`] → [`VmReport`] |
//! | `POST /v1/vms/{id}/snapshots` | controller | [`crate::lineage::TakeSnapshot`] → [`VmReport`] |
//! | `POST /v1/vms/{id}/snapshots/{name}/revert` | controller | → [`VmReport`] |
//! | `DELETE /v1/vms/{id}/snapshots/{name}` | controller | → [`VmReport`] |
//! | `GET /v1/vms/{id}/console` | controller | WebSocket, bytes both ways |
//! | `POST, GET /v1/vms/{id}/dirty-rate` | controller | [`DirtyRateRequest`](crate::measure::DirtyRateRequest) → [`DirtyRateReport`](crate::measure::DirtyRateReport) |
//! | `POST /v1/vms/{id}/dirty-curve` | controller | [`DirtyCurveRequest`](crate::measure::DirtyCurveRequest) → [`DirtyCurveReport`](crate::measure::DirtyCurveReport) |
//! | `POST /v1/vms/{id}/census` | controller | [`CensusRequest`](crate::measure::CensusRequest) → [`CensusReport`](crate::measure::CensusReport) |
//! | `GET /v1/cpu` | controller | [`CpuReport`](crate::measure::CpuReport) |
//! | `POST /v1/link` | controller | [`LinkRequest`](crate::measure::LinkRequest) → [`LinkReport`](crate::measure::LinkReport) |
//! | `POST /v1/link/listen` | source agent, controller | [`LinkListen`](crate::measure::LinkListen) → [`LinkAddress`](crate::measure::LinkAddress) |
//! | `POST /v1/knock/listen` | controller | [`KnockListen`] → [`KnockAddress`] |
//! | `POST /v1/knock/connect` | controller | [`KnockConnect`] → [`Reach`] |
//! | `PUT /v1/incoming/{migration}` | controller | [`IncomingRequest`] → [`IncomingOffer`] |
//! | `GET /v1/incoming/{migration}` | controller | [`IncomingReport`] |
//! | `GET /v1/incoming/{migration}/statistics` | controller | [`IncomingStatistics`] |
//! | `POST /v1/incoming/{migration}/recover` | source agent, controller | [`ListenAgain`] → [`NewAddress`]; of a paused post-copy |
//! | `DELETE /v1/incoming/{migration}` | controller | abandon before GO, or forget after the end → [`IncomingReport`] |
//! | `POST /v1/incoming/{migration}/handoff` | source agent, controller | [`Handoff`] → [`Handoff`] |
//! | `PUT /v1/outgoing/{migration}` | controller | [`OutgoingRequest`] → [`OutgoingReport`] |
//! | `GET /v1/outgoing/{migration}` | controller | [`OutgoingReport`] |
//! | `GET /v1/outgoing/{migration}/watch` | controller | [`OutgoingReport`] as server-sent events |
//! | `GET /v1/outgoing/{migration}/statistics` | controller | [`crate::migration::MigrationStatistics`] |
//! | `PUT /v1/outgoing/{migration}/settings` | controller | [`crate::migration::LiveSettings`] → [`OutgoingReport`] |
//! | `POST /v1/outgoing/{migration}/postcopy`, `pause`, `resume`, `force-complete` | controller | → [`OutgoingReport`], or `wrong-state` |
//! | `POST /v1/outgoing/{migration}/recover` | controller | [`RecoverOrder`] → [`OutgoingReport`], or `wrong-state` |
//! | `POST /v1/outgoing/{migration}/cancel` | controller | → [`OutgoingReport`], or `handed-over` |
//! | `POST /v1/outgoing/{migration}/handoff` | controller | a relayed answer, [`Handoff`] → [`OutgoingReport`] |
//! | `POST /v1/outgoing/{migration}/reclaim` | controller | [`crate::migration::ReclaimRequest`] → [`OutgoingReport`], `wrong-state`, or `busy` while the destination may be heard of |
//! | `POST /v1/incoming/{migration}/superseded` | controller | [`Superseded`] → [`SupersededReport`], or `busy` while the migration is open there |
//! | `DELETE /v1/outgoing/{migration}` | controller | retire: the record has moved, forget the VM |

mod disks;
mod moving;

pub use disks::{DiskExport, DiskOffer, ReceiveDisks, Sends};
pub use moving::{
    Handoff, IncomingOffer, IncomingReport, IncomingRequest, IncomingStatistics, ListenAgain,
    NewAddress, OutgoingEnd, OutgoingReport, OutgoingRequest, Receive, ReceivePostcopy,
    ReceiveSettings, RecoverOrder, Resumed, Superseded, SupersededReport,
};

use std::collections::BTreeSet;
use std::net::SocketAddr;

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;
use whimbrel_migration::names::{Epoch, Name};
use whimbrel_migration::preflight::EngineAbilities;

use crate::vm::{RunningEngine, VmDefinition, VmState};

/// What a host says of itself.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct HostReport {
    /// Its name.
    pub name: Name,
    /// Whimbrel's version.
    pub version: String,
    /// Logical processors.
    pub cpus: u32,
    /// The processor's name.
    pub cpu_model: String,
    /// Memory in bytes.
    pub memory_total_bytes: u64,
    /// MemAvailable less what running guests may still touch, in bytes.
    pub memory_available_bytes: u64,
    /// The QEMUs there, the first being the one for new VMs.
    pub engines: Vec<EngineReport>,
    /// Features that a guest can be given here, by QEMU's names: those of the `max` model under the first engine's
    /// accelerator.
    #[serde(default)]
    pub cpu_features: BTreeSet<String>,
    /// Networks whose bridge is there.
    pub networks: Vec<Name>,
    /// Storages that are there.
    pub storages: Vec<StorageReport>,
    /// The address that other hosts' QEMUs connect to; a host name or an IP address.
    pub migration_address: String,
    /// VMs that it owns.
    pub vms: u32,
    /// Days until its first certificate expires.
    pub certificate_days_left: i64,
    /// Whether it is time to renew its certificates.
    #[serde(default)]
    pub certificate_renewal_due: bool,
}

/// What a host asks the pool's authority to certify again: its keys stay. Of the signing requests only the public keys count.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CertificateRequests {
    /// Signing request (PEM) with the agent's key.
    pub agent_csr: String,
    /// Signing request (PEM) with the key for QEMU.
    pub qemu_csr: String,
}

/// A QEMU that is installed on a host.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct EngineReport {
    /// QEMU's version, such as `7.2.22`.
    pub version: String,
    /// `kvm` or `tcg`: what a VM started there will use.
    pub accelerator: String,
    /// Versioned machine types on offer.
    pub machines: Vec<String>,
    /// CPU models that run here under that accelerator.
    pub cpu_models: Vec<String>,
    /// What it can do for a migration; none where the agent does not say.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub abilities: Option<EngineAbilities>,
}

/// A storage on one host.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct StorageReport {
    /// Its name.
    pub name: Name,
    /// Whether it can be used, and if not, why.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub trouble: Option<String>,
    /// Bytes in all.
    pub total_bytes: u64,
    /// Bytes free to use, those that are reserved included.
    pub available_bytes: u64,
    /// Bytes of them that this host has reserved for disks in the making.
    #[serde(default)]
    pub reserved_bytes: u64,
}

/// A token in a shared storage: written by one host, looked for by another.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SharedToken {
    /// The token: the file's name and content; 32 hexadecimal digits.
    pub token: String,
}

/// Whether a token is seen.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TokenSeen {
    /// It is.
    pub seen: bool,
}

/// A VM on its host.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct VmReport {
    /// Its definition.
    pub definition: VmDefinition,
    /// How it is.
    #[serde(flatten)]
    pub state: VmState,
    /// The epoch in which this host owns it.
    pub epoch: Epoch,
    /// What runs it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub engine: Option<RunningEngine>,
}

/// What of a VM matters to whoever wants to move it: asked for in preflight, from the running QEMU.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Mobility {
    /// The VM.
    #[serde(flatten)]
    pub vm: VmReport,
    /// The features that its guest sees, by QEMU's names; empty while it has no QEMU.
    #[serde(default)]
    pub cpu_features: BTreeSet<String>,
    /// QEMU's own reasons why it cannot be migrated as it is (`query-migrate`, `blocked-reasons`), device names included.
    #[serde(default)]
    pub blockers: Vec<String>,
    /// What the QEMU that runs it can do for a migration; none while it has no QEMU.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub abilities: Option<EngineAbilities>,
}

/// Asks the destination to listen on a migration port for a moment, so that the source can try the way before anything
/// is prepared.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct KnockListen {
    /// Who will knock.
    pub from: Name,
    /// At which address, an IP address or a host name of this host; at that of its configuration without it. A name without
    /// an address is answered with `not-found`, another machine's address with `no-resources`, and with `busy` that all ports
    /// are taken.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub listen: Option<String>,
}

/// Where to knock.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct KnockAddress {
    /// Host name or IP address, without port.
    pub host: String,
    /// A port of the migration range.
    pub port: u16,
}

/// Asks the source to knock.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct KnockConnect {
    /// The destination.
    pub to: Name,
    /// Where.
    pub address: KnockAddress,
}

/// How far a knock came.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", tag = "reach")]
pub enum Reach {
    /// The way is open, and the right host is at its end.
    Open {
        /// The address that the name resolved to.
        address: SocketAddr,
    },
    /// The name has no address.
    Unresolvable {
        /// What the resolver said.
        why: String,
    },
    /// Nobody answers on that port.
    Closed {
        /// What the system said.
        why: String,
    },
    /// The right host answers, and its list of those who may send guests has neither the source nor its address.
    NotAllowed {
        /// Why not.
        why: String,
    },
    /// Somebody answers, but the certificates do not fit.
    Untrusted {
        /// What is wrong with which.
        why: String,
    },
}
