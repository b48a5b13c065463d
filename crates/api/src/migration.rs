//! A migration in the public API: the request, the record, its progress, and what can be ordered while it runs.
//!
//! The record is the controller's; the facts in it come from the two agents. Phases and outcomes are
//! [`whimbrel_migration::phase`]'s words. What grows with time ([`MigrationStatistics`]) is not in the record, which is told at
//! every change, but asked for by itself.

use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;
use whimbrel_migration::downtime::Downtime;
pub use whimbrel_migration::forecast::Forecast;
use whimbrel_migration::names::{Epoch, MigrationId, Name, VmId};
pub use whimbrel_migration::options::{
    AutoConverge, Compression, CompressionMethod, DiskOptions, DiskTarget, MigrateOptions, Mode,
    OptionProblem, Originals, OtherDisks, Postcopy, ProblemCode, Timeout, TimeoutAction, limits,
};
use whimbrel_migration::phase::Phase;
use whimbrel_migration::preflight::Verdict;
pub use whimbrel_migration::strategy::{
    CompressionSetting, Decision, PostcopyBegin, PostcopySetting, Rejection, Rung, Strategy,
    ThrottleSetting,
};

use crate::disks::{DiskMove, DiskProgress};

/// Most decisions that are kept of one migration: the first ones and the latest.
pub const DECISIONS_MAX: usize = 32;
/// Most samples that are kept of one migration. When they are full, every other one is dropped.
pub const SAMPLES_MAX: usize = 600;

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
    /// It was given away to a host that never answered, and taken back by an operator's word: the guest has crashed.
    Reclaimed {
        /// What was stated of the destination.
        statement: Statement,
    },
}

/// What an operator states of a destination that does not answer. Whimbrel cannot know it; both lead to the same.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Statement {
    /// It is without power, or cut off from the VM's disks: no acknowledged write is lost.
    HostIsFenced,
    /// It is gone, and nobody can say what it did last.
    AcceptDataLoss,
}

impl Statement {
    /// The word, as in the API and on the command line.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::HostIsFenced => "host-is-fenced",
            Self::AcceptDataLoss => "accept-data-loss",
        }
    }
}

/// Takes a VM back from a destination that never returns.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct ReclaimRequest {
    /// What is stated of the destination.
    pub statement: Statement,
}

/// That a VM was taken back, or is to be, as it stands in the migration's record.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Reclaim {
    /// What was stated of the destination.
    pub statement: Statement,
    /// Who stated it: the name in his certificate.
    pub by: String,
    /// When.
    #[schema(value_type = String)]
    pub at: Timestamp,
    /// What the destination said when it could be told: whether it still had a QEMU of the VM, which it has ended.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub guest_was_there: Option<bool>,
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
    /// The operator's word by which the VM is taken back.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reclaim: Option<Reclaim>,
    /// What preflight said, warnings included.
    pub verdicts: Vec<Verdict>,
    /// The disks that are copied, and where to.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub disks: Vec<DiskMove>,
    /// The policy under which it goes; none in records that are older than policies.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub policy: Option<Name>,
    /// How it goes, or went: the settings as they were last.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub strategy: Option<Strategy>,
    /// What was foretold before it began.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub forecast: Option<Forecast>,
    /// What was decided, when and why, oldest first; at most 32, and none in lists.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub decisions: Vec<Decision>,
    /// Post-copy, since it began.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub postcopy: Option<PostcopyReport>,
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

/// QEMU's figures of a running or ended migration (source side), and ours. Those that are not there were not told: which ones
/// QEMU tells depends on its version and on what is switched on.
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
    /// QEMU's own downtime, in milliseconds; at the end only.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub engine_downtime_ms: Option<u64>,
    /// What starting the destination's QEMU took, in milliseconds (spawn to listening).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub destination_start_ms: Option<u64>,
    /// QEMU's own word for the migration's state, such as `active` or `postcopy-paused`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub engine_status: Option<String>,
    /// Bytes of the pages sent as they are.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub normal_bytes: Option<u64>,
    /// The guest's page size in bytes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub page_size_bytes: Option<u64>,
    /// Pages sent in a second.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pages_per_s: Option<u64>,
    /// Bytes sent while the guest ran on the source.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub precopy_bytes: Option<u64>,
    /// Bytes sent while it stood still.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub downtime_bytes: Option<u64>,
    /// Bytes sent in post-copy.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub postcopy_bytes: Option<u64>,
    /// Pages that the destination asked for in post-copy.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub postcopy_requests: Option<u64>,
    /// Bytes sent over parallel connections.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub multifd_bytes: Option<u64>,
    /// Passes in which zero-copy had to copy.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub missed_zero_copy_passes: Option<u64>,
    /// How hard the guest is slowed down, in percent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub throttle_percent: Option<u64>,
    /// The pause that QEMU is told to aim at now, in milliseconds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub aim_ms: Option<u64>,
    /// Longest time of a round that the dirty limit holds a vCPU back, in microseconds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub dirty_limit_round_us: Option<u64>,
    /// The time that the dirty limit takes to fill a dirty ring, in microseconds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub dirty_limit_ring_full_us: Option<u64>,
    /// The cache of xbzrle, where it is used.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub xbzrle: Option<XbzrleProgress>,
    /// The disks that are copied.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub disks: Vec<DiskProgress>,
}

/// The figures of xbzrle.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct XbzrleProgress {
    /// Bytes of the cache.
    pub cache_bytes: u64,
    /// Bytes sent as differences.
    pub bytes: u64,
    /// Pages sent as differences.
    pub pages: u64,
    /// Pages that were not in the cache.
    pub cache_misses: u64,
    /// Their share, 0 to 1.
    pub cache_miss_rate: f64,
    /// Bytes of pages for one byte sent.
    pub encoding_rate: f64,
    /// Pages that were cheaper to send whole.
    pub overflows: u64,
}

/// Post-copy: the guest runs on the destination, and the rest of its memory follows.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct PostcopyReport {
    /// How it goes.
    #[serde(flatten)]
    pub state: PostcopyState,
    /// Since when it is in this state.
    #[schema(value_type = String)]
    pub since: Timestamp,
    /// When it began.
    #[schema(value_type = String)]
    pub begun: Timestamp,
    /// How often a lost connection was made again.
    #[serde(default)]
    pub recoveries: u64,
    /// How long all vCPUs at once waited for pages, in milliseconds; at the end, where QEMU counts it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub blocktime_ms: Option<u64>,
    /// How long each vCPU did.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub vcpu_blocktime_ms: Vec<u64>,
}

/// How post-copy goes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case", tag = "state")]
pub enum PostcopyState {
    /// Memory flows.
    Active,
    /// The connection is lost, or was paused by hand: a guest that touches missing memory waits. Nothing is lost as long as
    /// both QEMUs live.
    Paused {
        /// Why.
        why: String,
        /// Whether somebody paused it: then only `resume` goes on with it.
        by_hand: bool,
    },
    /// The connection is being made again.
    Recovering,
    /// All memory is there.
    Done,
}

/// Changes a running migration; what is not said stays.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct LiveSettings {
    /// How long the guest may pause for the last pass, in milliseconds, 1 to 2000000.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_downtime_ms: Option<u64>,
    /// Most bytes a second for the stream, 65536 to 2^50.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bandwidth_bytes_per_s: Option<u64>,
    /// Most bytes a second for pages of post-copy that nobody waits for, 65536 to 2^50.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub postcopy_bandwidth_bytes_per_s: Option<u64>,
}

impl LiveSettings {
    /// Everything that is wrong with them; empty if they are sound.
    #[must_use]
    pub fn validate(&self) -> Vec<OptionProblem> {
        let bandwidth = (limits::BANDWIDTH_MIN_BYTES_PER_S, limits::BANDWIDTH_MAX_BYTES_PER_S);
        let downtime = (limits::MAX_DOWNTIME_MIN_MS, limits::MAX_DOWNTIME_MAX_MS);
        let fields = [
            ("max_downtime_ms", self.max_downtime_ms, downtime),
            ("bandwidth_bytes_per_s", self.bandwidth_bytes_per_s, bandwidth),
            ("postcopy_bandwidth_bytes_per_s", self.postcopy_bandwidth_bytes_per_s, bandwidth),
        ];
        let mut problems = Vec::new();
        for (field, value, (least, most)) in fields {
            if let Some(value) = value.filter(|value| !(least..=most).contains(value)) {
                problems.push(OptionProblem {
                    field: field.to_owned(),
                    code: ProblemCode::OutOfRange,
                    sentence: format!("{field} is {value}; it can be {least} to {most}"),
                });
            }
        }
        if *self == Self::default() {
            problems.push(OptionProblem {
                field: "max_downtime_ms".to_owned(),
                code: ProblemCode::Contradiction,
                sentence: "nothing is to be set: say max_downtime_ms, bandwidth_bytes_per_s or \
                           postcopy_bandwidth_bytes_per_s"
                    .to_owned(),
            });
        }
        problems
    }
}

/// What can be ordered while a migration runs, besides cancelling it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum MigrationAction {
    /// Post-copy begins now; it has to be allowed.
    Postcopy,
    /// Post-copy is held: the guest goes on as far as its memory is there.
    Pause,
    /// A post-copy that was paused by hand goes on.
    Resume,
    /// A post-copy whose connection is lost is taken up now, instead of when the way is back.
    Recover,
    /// The guest stands still until the rest is sent.
    ForceComplete,
}

impl MigrationAction {
    /// All of them.
    pub const ALL: [Self; 5] =
        [Self::Postcopy, Self::Pause, Self::Resume, Self::Recover, Self::ForceComplete];

    /// The last part of the call's path.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Postcopy => "postcopy",
            Self::Pause => "pause",
            Self::Resume => "resume",
            Self::Recover => "recover",
            Self::ForceComplete => "force-complete",
        }
    }
}

/// What was seen of a migration over time, and what QEMU said of it last.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize, ToSchema)]
#[serde(default)]
pub struct MigrationStatistics {
    /// From the start on, oldest first; at most 600, at even distances.
    pub samples: Vec<Sample>,
    /// The source's last answer to `query-migrate`, untouched.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<Object>)]
    pub raw: Option<serde_json::Value>,
    /// The destination's, where it was asked: after post-copy.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<Object>)]
    pub destination_raw: Option<serde_json::Value>,
}

/// One point of a plot.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Sample {
    /// Since the source began to send, in milliseconds.
    pub at_ms: u64,
    /// The phase.
    pub phase: Phase,
    /// The pass over the memory.
    pub pass: u64,
    /// Bytes sent so far.
    pub transferred_bytes: u64,
    /// Bytes still to send in this pass.
    pub remaining_bytes: u64,
    /// The stream's rate in bits a second.
    pub bits_per_s: u64,
    /// Bytes that the guest dirties in a second.
    pub dirty_bytes_per_s: u64,
    /// How hard the guest is slowed down, in percent.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub throttle_percent: u64,
}

// By reference, as serde asks for it.
#[allow(clippy::trivially_copy_pass_by_ref)]
fn is_zero(number: &u64) -> bool {
    *number == 0
}

/// A line of `migration watch`: the record, each time something changed.
pub type MigrationEvent = Migration;
