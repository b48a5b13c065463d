//! What a move would take, before anything starts: the answer of `whimbrel plan`.

use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;
pub use whimbrel_migration::forecast::facts::Measurements;
use whimbrel_migration::names::{Name, VmId};
use whimbrel_migration::preflight::Verdict;
pub use whimbrel_migration::strategy::Plan;

use crate::migration::{Forecast, MigrateOptions, Strategy};
use crate::policy::AppliedPolicy;

/// Most destinations of one plan.
pub const DESTINATIONS_MAX: usize = 32;

/// Asks what moving a VM would take.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct PlanRequest {
    /// The VM, by name or id.
    pub vm: String,
    /// The destinations, at most 32; every other host of the pool without any.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub destinations: Vec<Name>,
    /// How.
    #[serde(default)]
    pub options: MigrateOptions,
    /// Measures anew, also where a fresh result is at hand.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub fresh: bool,
    /// Most bytes a second that probing a link may send; as fast as it goes without it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub probe_bytes_per_s: Option<u64>,
}

/// What moving a VM would take, for each destination.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct VmPlan {
    /// The VM.
    pub vm: VmId,
    /// Its name.
    pub vm_name: Name,
    /// Where it is.
    pub source: Name,
    /// The policy that applies.
    pub policy: AppliedPolicy,
    /// One for each destination, in the order in which they were asked for, or by name.
    pub destinations: Vec<DestinationPlan>,
}

/// What moving a VM to one host would take.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct DestinationPlan {
    /// The host.
    pub destination: Name,
    /// Everything that stands in the way, or is worth knowing.
    pub verdicts: Vec<Verdict>,
    /// Whether a migration there would be refused.
    pub refused: bool,
    /// Why nothing can be said of it, if so: a host that does not answer.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub trouble: Option<String>,
    /// The way that would be chosen, what it and plain pre-copy would take, and why; none where no memory would be moved or
    /// an engine does not say what it can do.
    #[serde(flatten)]
    pub plan: Option<Plan>,
    /// Every way that both engines can go, in its plain form, with what it would take; from the cheapest on.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub candidates: Vec<Candidate>,
    /// What it was reckoned from.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub measurements: Option<Measurements>,
    /// When each of these was measured, and what could not be.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub measured: Vec<MeasuredAt>,
}

/// A way that a VM could go, whether it is chosen or not.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Candidate {
    /// The way.
    pub strategy: Strategy,
    /// What it would take.
    pub forecast: Forecast,
    /// Whether policy and options allow it.
    pub allowed: bool,
}

/// One measurement's age.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct MeasuredAt {
    /// What was measured.
    pub what: Measured,
    /// When; never without it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<String>)]
    pub at: Option<Timestamp>,
    /// How old it is, in milliseconds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub age_ms: Option<u64>,
    /// Why it could not be measured, if so; then something was assumed in its place.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub trouble: Option<String>,
}

/// What is measured for a forecast.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize, ToSchema,
)]
#[serde(rename_all = "kebab-case")]
pub enum Measured {
    /// What is in the guest's memory.
    Census,
    /// How fast the guest writes.
    DirtyRate,
    /// The way between the hosts.
    Link,
    /// What the source's processors have to spare.
    SourceCpu,
    /// What the destination's processors have to spare.
    DestinationCpu,
}

impl Measured {
    /// What it is, in words.
    #[must_use]
    pub const fn as_words(self) -> &'static str {
        match self {
            Self::Census => "what is in the guest's memory",
            Self::DirtyRate => "how fast the guest writes",
            Self::Link => "the link",
            Self::SourceCpu => "the source's processors",
            Self::DestinationCpu => "the destination's processors",
        }
    }
}
