//! Policies in the public API: named objects that say what a move may cost, and what they are attached to.
//!
//! Which one applies: that of the request, else the VM's, else the pool's, else `balanced`. The built-in ones are always
//! there and cannot be changed.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;
use whimbrel_migration::names::Name;
pub use whimbrel_migration::policy::{Consent, DEFAULT_POLICY, Policy, limits};

/// A policy of the pool.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct PolicyStatus {
    /// What it says.
    #[serde(flatten)]
    pub policy: Policy,
    /// Whether it came with Whimbrel: it can be neither changed nor deleted.
    #[serde(default)]
    pub built_in: bool,
}

/// Attaches a policy, or takes it away.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct AttachPolicy {
    /// The policy; without it nothing is attached any more.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub policy: Option<Name>,
}

/// The policy that applies where a request says none.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct AppliedPolicy {
    /// Its name.
    pub policy: Name,
    /// Where it comes from.
    pub origin: PolicyOrigin,
}

/// Where a policy comes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum PolicyOrigin {
    /// The request names it.
    Request,
    /// It is attached to the VM.
    Vm,
    /// It is attached to the pool.
    Pool,
    /// Nothing else was said.
    Default,
}
