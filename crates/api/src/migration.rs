//! A migration in the public API: the request, the record, and its progress.
//!
//! The record is the controller's; the facts in it come from the two agents. Phases and outcomes are
//! [`whimbrel_migration::phase`]'s words.

use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;
use whimbrel_migration::downtime::Downtime;
use whimbrel_migration::names::{Epoch, MigrationId, Name, VmId};
pub use whimbrel_migration::options::{
    AutoConverge, Compression, CompressionMethod, MigrateOptions, Mode, OptionProblem, Postcopy,
    ProblemCode, Timeout, TimeoutAction, limits,
};
use whimbrel_migration::phase::Phase;
use whimbrel_migration::preflight::Verdict;

/// Asks for a migration. The id is the client's, so that a retry is the same request.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct MigrateRequest {
    /// The migration's id.
    pub id: MigrationId,
    /// The VM, by name or id.
    pub vm: String,
    /// The destination.
    pub destination: Name,
    /// How.
    #[serde(default)]
    pub options: MigrateOptions,
}

/// How far a migration is, or how it ended.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case", tag = "outcome")]
pub enum MigrationState {
    /// Not ended.
    Running,
    /// The VM runs on the destination.
    Moved,
    /// The VM is where it was.
    Stayed {
        /// Why.
        why: Stay,
    },
    /// Nothing was begun; the verdicts say why.
    Refused,
    /// Given away, and the destination has not confirmed: paused, not lost.
    Unresolved {
        /// The host to ask.
        ask: Name,
    },
}

/// Why a VM stayed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case", tag = "cause")]
pub enum Stay {
    /// Somebody asked for it.
    Cancelled,
    /// Something failed before the handoff.
    Failed {
        /// The phase in which.
        phase: Phase,
        /// A stable code: an [`crate::ErrorCode`]'s word.
        code: String,
        /// What happened.
        message: String,
    },
    /// The destination refused the handoff, durably.
    DestinationRefused {
        /// What it said.
        message: String,
    },
    /// The guest powered itself off in the middle.
    GuestPoweredOff,
}

/// The record of a migration.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Migration {
    /// Its id.
    pub id: MigrationId,
    /// The VM.
    pub vm: VmId,
    /// Its name at the time.
    pub vm_name: Name,
    /// From.
    pub source: Name,
    /// To.
    pub destination: Name,
    /// The epoch that the destination takes.
    pub epoch: Epoch,
    /// The guest's memory in bytes.
    pub memory_bytes: u64,
    /// How.
    pub options: MigrateOptions,
    /// The phase that it is in, or ended in.
    pub phase: Phase,
    /// How it ended.
    #[serde(flatten)]
    pub state: MigrationState,
    /// How the hosts have settled it, while both are still being swept: a restarted controller does not ask again what is
    /// settled.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub settled: Option<MigrationState>,
    /// Whether a cancel was accepted.
    pub cancel_requested: bool,
    /// What preflight said, warnings included.
    pub verdicts: Vec<Verdict>,
    /// When each phase began.
    pub phases: Vec<PhaseStart>,
    /// The latest figures.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub progress: Option<Progress>,
    /// The pause of the guest, by its parts.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub downtime: Option<Downtime>,
    /// When it was asked for.
    #[schema(value_type = String)]
    pub started: Timestamp,
    /// When the destination's confirmation came, or the end otherwise.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<String>)]
    pub ended: Option<Timestamp>,
    /// Request to "runs on the destination", in milliseconds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub total_ms: Option<u64>,
    /// What is still to be swept, and where; empty when all is clean.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub leftovers: Vec<String>,
}

/// When a phase began.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct PhaseStart {
    /// The phase.
    pub phase: Phase,
    /// When.
    #[schema(value_type = String)]
    pub at: Timestamp,
}

/// QEMU's figures of a running or ended migration (source side), and ours.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Progress {
    /// Bytes of guest memory in all.
    pub ram_total_bytes: u64,
    /// Bytes still to send in this pass.
    pub ram_remaining_bytes: u64,
    /// Bytes sent over the wire.
    pub transferred_bytes: u64,
    /// Pages that were all zero, sent as a mark.
    pub zero_pages: u64,
    /// Pages sent as they are.
    pub normal_pages: u64,
    /// Passes over the memory.
    pub passes: u64,
    /// Pages that the guest dirties in a second.
    pub dirty_pages_per_s: u64,
    /// The stream's rate in bits a second.
    pub bits_per_s: u64,
    /// QEMU's guess of the pause if it ended now, in milliseconds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub expected_downtime_ms: Option<u64>,
    /// QEMU's own total time, in milliseconds.
    pub engine_total_ms: u64,
    /// QEMU's setup time, in milliseconds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub engine_setup_ms: Option<u64>,
    /// What starting the destination's QEMU took, in milliseconds (spawn to listening).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub destination_start_ms: Option<u64>,
}

/// A line of `migration watch`: the record, each time something changed.
pub type MigrationEvent = Migration;
