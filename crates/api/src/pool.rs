//! A pool's hosts, networks and storages, as the public API shows them.

use std::collections::BTreeMap;

use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;
use whimbrel_migration::names::Name;

use crate::agent::{EngineReport, StorageReport};

/// A host of the pool.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Host {
    /// Its name, which is also in its certificates.
    pub name: Name,
    /// Where its agent listens, `address:port`.
    pub address: String,
    /// Whether it takes new VMs and migrations.
    pub enabled: bool,
    /// Whether it answers.
    #[serde(flatten)]
    pub contact: Contact,
    /// What it last said of itself.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub facts: Option<HostSummary>,
}

/// Whether a host answers.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case", tag = "state")]
pub enum Contact {
    /// Joined, not heard of yet.
    Joining,
    /// It answers.
    Ready {
        /// When it was last heard.
        #[schema(value_type = String)]
        seen: Timestamp,
    },
    /// It does not answer: what runs there is unknown.
    Unreachable {
        /// Since when.
        #[schema(value_type = String)]
        since: Timestamp,
        /// What happened.
        why: String,
    },
}

/// The part of a host's report that people look at.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct HostSummary {
    /// Whimbrel's version there.
    pub version: String,
    /// Logical processors.
    pub cpus: u32,
    /// The processor's name.
    pub cpu_model: String,
    /// Memory in bytes.
    pub memory_total_bytes: u64,
    /// Memory that a new VM could have, in bytes.
    pub memory_available_bytes: u64,
    /// The QEMUs there, the first being the one for new VMs.
    pub engines: Vec<EngineReport>,
    /// Networks that it has a bridge for.
    pub networks: Vec<Name>,
    /// Storages that it reaches.
    pub storages: Vec<StorageReport>,
    /// VMs that it owns.
    pub vms: u32,
    /// Days until its first certificate expires.
    pub certificate_days_left: i64,
}

/// Whether a host takes VMs.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct HostPatch {
    /// `false`: it takes no new VM and is no destination.
    pub enabled: bool,
}

/// A named layer-2 network.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct Network {
    /// Its name.
    pub name: Name,
    /// The bridge for it on each host; made where there is none. At most 15 bytes (Linux' IFNAMSIZ less one).
    pub bridge: String,
    /// The interface that joins each host's bridge to the others, if Whimbrel is to attach it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub uplink: Option<String>,
}

/// A named place for disks.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct Storage {
    /// Its name.
    pub name: Name,
    /// Its folder on each host, absolute.
    pub path: String,
    /// Whether all hosts see the same files there. Proven before it is believed: a token written by one host must be
    /// read by the other.
    #[serde(default)]
    pub shared: bool,
}

/// A storage as the pool sees it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct StorageStatus {
    /// What it is.
    #[serde(flatten)]
    pub storage: Storage,
    /// Whether it is the pool's default storage.
    #[serde(default)]
    pub default: bool,
    /// Who reaches it, and what each sees there.
    pub hosts: Vec<StorageOnHost>,
}

/// A storage on one host.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct StorageOnHost {
    /// The host.
    pub host: Name,
    /// Whether this host was proven to see the same files there as the others; never for a storage that is not shared.
    #[serde(default)]
    pub proven: bool,
    /// Its place among the host's default storages, 1 being the first; none where it is not among them.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub default_place: Option<u32>,
    /// What it says.
    #[serde(flatten)]
    pub report: StorageReport,
}

/// Which storages are used where none is named.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct StorageDefaults {
    /// The pool's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pool: Option<Name>,
    /// Those of single hosts, the first one being the first choice; they go before the pool's.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    #[schema(value_type = BTreeMap<String, Vec<Name>>)]
    pub hosts: BTreeMap<Name, Vec<Name>>,
}

impl StorageDefaults {
    /// The first choice for a disk on a host.
    #[must_use]
    pub fn of(&self, host: &Name) -> Option<&Name> {
        self.hosts.get(host).and_then(|own| own.first()).or(self.pool.as_ref())
    }
}

/// Says which storages are used where none is named.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct SetStorageDefaults {
    /// The host whose default storages these are; without it they are the pool's, which has at most one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub host: Option<Name>,
    /// The storages, the first choice first; none at all: there is no default.
    pub storages: Vec<Name>,
}

/// A new join token.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct JoinToken {
    /// What `whimbrel agent --join` takes. A secret.
    pub token: String,
    /// When it ends.
    #[schema(value_type = String)]
    pub expires: Timestamp,
}

/// Asks for a join token.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct NewJoinToken {
    /// How long it may be used, in seconds; 60 to 86,400.
    #[serde(default = "default_ttl")]
    pub ttl_seconds: u32,
}

fn default_ttl() -> u32 {
    900
}

/// What a host sends with its token to become a member. The certificates' names are the controller's to choose; of the
/// signing requests only the public keys count.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct JoinRequest {
    /// The secret part of the token.
    pub secret: String,
    /// The name that the host wants.
    pub name: Name,
    /// Where its agent will listen, `address:port`.
    pub address: String,
    /// Signing request (PEM) with the agent's key.
    pub agent_csr: String,
    /// Signing request (PEM) with the key for QEMU.
    pub qemu_csr: String,
}

/// What the host gets.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct JoinAnswer {
    /// The pool's CA certificate (PEM).
    pub ca: String,
    /// The agent as a server.
    pub agent_server: String,
    /// The agent as a client.
    pub agent_client: String,
    /// QEMU as a server (the destination of a stream).
    pub qemu_server: String,
    /// QEMU as a client (the source of a stream).
    pub qemu_client: String,
}
