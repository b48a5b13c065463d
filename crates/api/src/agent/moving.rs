//! The two sides of a migration at their agents: what each is asked, and how it is.
//!
//! The destination is asked first ([`IncomingRequest`]) and offers an address; the source is asked second
//! ([`OutgoingRequest`]) and reports ([`OutgoingReport`]). Between themselves they exchange [`Handoff`] messages.

use std::net::SocketAddr;

use serde::{Deserialize, Serialize};
use whimbrel_migration::downtime::Downtime;
use whimbrel_migration::forecast::Forecast;
use whimbrel_migration::forecast::facts::Measurements;
use whimbrel_migration::handoff::Message;
use whimbrel_migration::names::{Epoch, MigrationId, Name, VmId};
use whimbrel_migration::phase::Phase;
use whimbrel_migration::policy::Policy;
use whimbrel_migration::strategy::{CompressionSetting, Decision, Strategy};
use whimbrel_pki::grant::SignedGrant;

use super::disks::{DiskOffer, ReceiveDisks};
use crate::migration::{MigrateOptions, PostcopyReport, Progress, Stay};
use crate::vm::{VmDefinition, VmState};

/// The pause that was allowed where nobody said one, in milliseconds: QEMU's own default.
const SINGLE_STREAM_DOWNTIME_MS: u64 = 300;

/// Asks the destination to prepare.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct IncomingRequest {
    /// The VM, under the name that it is to have there.
    pub definition: VmDefinition,
    /// The source.
    pub source: Name,
    /// The epoch that the destination would take.
    pub epoch: Epoch,
    /// What comes, and how.
    #[serde(default)]
    pub receive: Receive,
    /// The controller's signed permission.
    pub grant: SignedGrant,
}

/// What comes to a destination.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", tag = "what")]
pub enum Receive {
    /// A guest with its memory: a stopped QEMU listens for it.
    Guest(ReceiveSettings),
    /// The definition of a stopped VM and its firmware's variables (`offline`): no QEMU is started, and the address that is
    /// offered is `0.0.0.0:0`.
    Definition,
}

impl Default for Receive {
    fn default() -> Self {
        Self::Guest(ReceiveSettings::default())
    }
}

/// How a guest's memory comes: what QEMU has to be told before the first byte, and the same as on the source. QEMU takes
/// neither parallel connections nor post-copy's second one after its incoming side has begun (7.2, 10.0).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct ReceiveSettings {
    /// Connections side by side (multifd); a single stream without it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub channels: Option<u8>,
    /// Compression.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub compression: Option<CompressionSetting>,
    /// Post-copy may come; never without it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub postcopy: Option<ReceivePostcopy>,
    /// The stream is encrypted, and the source shows its certificate.
    pub tls: bool,
    /// The address to listen at and to offer, an IP address or a host name of this host; that of its configuration without it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub listen: Option<String>,
    /// The disks that come with it.
    #[serde(skip_serializing_if = "is_default")]
    pub disks: ReceiveDisks,
}

impl Default for ReceiveSettings {
    fn default() -> Self {
        Self {
            channels: None,
            compression: None,
            postcopy: None,
            tls: true,
            listen: None,
            disks: ReceiveDisks::default(),
        }
    }
}

impl ReceiveSettings {
    /// What a destination has to be told for a strategy.
    #[must_use]
    pub fn of(strategy: &Strategy, listen: Option<String>) -> Self {
        Self {
            channels: strategy.channels,
            compression: strategy.compression,
            postcopy: strategy
                .postcopy
                .map(|postcopy| ReceivePostcopy { preempt: postcopy.preempt }),
            tls: strategy.tls,
            listen,
            disks: ReceiveDisks::default(),
        }
    }
}

fn is_default<T: Default + PartialEq>(value: &T) -> bool {
    *value == T::default()
}

/// How post-copy is received.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ReceivePostcopy {
    /// Pages that the guest waits for have a connection of their own.
    pub preempt: bool,
}

/// The destination is prepared: a QEMU listens, stopped.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct IncomingOffer {
    /// Where the destination's QEMU listens.
    pub address: SocketAddr,
    /// Where the destination's agent listens: for the handoff.
    pub agent: String,
    /// The one-time ticket that the source shows with every handoff message.
    pub ticket: String,
    /// Spawn to listening, in milliseconds.
    pub start_ms: u64,
    /// Where its disks are taken in, if some come.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub disks: Option<DiskOffer>,
}

/// How the destination's side is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", tag = "side")]
pub enum IncomingReport {
    /// Nothing is known of this migration here, and nothing will run.
    None,
    /// A QEMU listens or loads; no GO has come.
    Waiting,
    /// Refused durably; the QEMU is gone.
    Refused {
        /// Why.
        why: String,
    },
    /// This host owns the VM, and part of its memory is still at the source (post-copy).
    Fetching {
        /// The epoch.
        epoch: Epoch,
    },
    /// This host owns the VM.
    Owned {
        /// The epoch.
        epoch: Epoch,
        /// How the VM is.
        vm: VmState,
    },
}

/// What only the destination's QEMU knows of a migration.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct IncomingStatistics {
    /// How long all vCPUs at once waited for pages of post-copy, in milliseconds.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub postcopy_blocktime_ms: Option<u64>,
    /// How long each vCPU did.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub postcopy_vcpu_blocktime_ms: Vec<u64>,
    /// QEMU's last answer to `query-migrate`, untouched.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub raw: Option<serde_json::Value>,
}

/// Asks a destination whose post-copy is paused to listen anew.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ListenAgain {
    /// The migration's ticket, where the source's agent asks; the controller needs none.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub ticket: String,
}

/// Where a destination listens anew.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct NewAddress {
    /// The address.
    pub address: SocketAddr,
}

/// A message of the handoff, with the ticket.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Handoff {
    /// The ticket of this migration; empty in answers.
    #[serde(default)]
    pub ticket: String,
    /// The message.
    pub message: Message,
    /// When the destination's guest ran again, if this answers a GO.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub resumed: Option<Resumed>,
}

/// When the guest ran again.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Resumed {
    /// From the guest's resumption to the sending of this answer, in microseconds: what of the GO's round trip was no
    /// longer a pause of the guest.
    pub since_resume_us: u64,
    /// QEMU's time stamp of RESUME, microseconds since 1970, by the destination's clock.
    pub resume_at_us: u64,
}

/// Asks the source to send.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct OutgoingRequest {
    /// The VM.
    pub vm: VmId,
    /// The destination.
    pub destination: Name,
    /// The epoch that the destination would take.
    pub epoch: Epoch,
    /// What the user asked for.
    pub options: MigrateOptions,
    /// How it begins. A request without one was written down before there was a choice.
    #[serde(default = "single_stream")]
    pub strategy: Strategy,
    /// What may be done if fact leaves forecast: the agent plans anew within it.
    #[serde(default)]
    pub policy: Policy,
    /// What was foretold of the strategy; none if nothing was.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub forecast: Option<Forecast>,
    /// What it was foretold from; none if nothing was measured.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub measurements: Option<Measurements>,
    /// What the destination offered.
    pub offer: IncomingOffer,
    /// The controller's signed permission.
    pub grant: SignedGrant,
}

fn single_stream() -> Strategy {
    Strategy::plain(SINGLE_STREAM_DOWNTIME_MS)
}

/// Takes up a paused post-copy.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RecoverOrder {
    /// Where the destination listens anew, if the controller has asked it; without it the source asks.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub address: Option<SocketAddr>,
}

/// How the source's side is. It is told at every change; what grows with time ([`crate::migration::MigrationStatistics`])
/// is asked for by itself.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct OutgoingReport {
    /// The migration.
    pub migration: MigrationId,
    /// The VM.
    pub vm: VmId,
    /// The phase.
    pub phase: Phase,
    /// The latest figures.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub progress: Option<Progress>,
    /// The pause by its parts, once it is over.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub downtime: Option<Downtime>,
    /// How it goes now, if it was planned anew since it began.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub strategy: Option<Strategy>,
    /// What the source's agent has decided on the way, oldest first; at most [`crate::migration::DECISIONS_MAX`].
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub decisions: Vec<Decision>,
    /// Post-copy, since it began.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub postcopy: Option<PostcopyReport>,
    /// The message that waits for its answer, while the source is in doubt: for the controller to relay.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub relay: Option<Handoff>,
    /// The end, from the source's point of view.
    #[serde(flatten)]
    pub end: OutgoingEnd,
}

impl OutgoingReport {
    /// The report of a migration that has just begun.
    #[must_use]
    pub fn begun(migration: MigrationId, vm: VmId) -> Self {
        Self {
            migration,
            vm,
            phase: Phase::Precopy,
            progress: None,
            downtime: None,
            strategy: None,
            decisions: Vec::new(),
            postcopy: None,
            relay: None,
            end: OutgoingEnd::Open,
        }
    }
}

/// How the source's side ended.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", tag = "end")]
pub enum OutgoingEnd {
    /// It has not.
    Open,
    /// The destination confirmed: it owns and runs the VM.
    Moved,
    /// The guest is this host's, as before.
    Stayed {
        /// Why.
        why: Stay,
    },
    /// Released, and the destination has not answered yet; asking goes on.
    Unresolved {
        /// The host to ask.
        ask: Name,
    },
}

/// Tells a destination that could not be asked that its VM was taken back from it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Superseded {
    /// The VM.
    pub vm: VmId,
    /// Since which epoch it is another host's.
    pub epoch: Epoch,
    /// That host.
    pub owner: Name,
}

/// What a former owner answers, once it is durable that it is none any more.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct SupersededReport {
    /// It still had a QEMU of the VM, against the operator's word, and has ended it.
    pub guest_was_there: bool,
}
