//! The phases of a migration and how a migration can end.
//!
//! One enum, the same word in code, API, logs, metrics and console. Nothing here decides
//! anything; the controller and the agents report themselves with these words.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::names::Name;

/// Where a migration is, in the order in which it gets there.
///
/// A pre-copy migration of a VM whose disks are shared skips `Mirroring` and `Postcopy`.
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize, ToSchema,
)]
#[serde(rename_all = "lowercase")]
pub enum Phase {
    /// Is the request sound, and is the VM free to move?
    Admission,
    /// Can the destination run this VM? Nothing has been changed yet.
    Preflight,
    /// Memory, ports and storage are set aside on the destination.
    Reservation,
    /// The destination starts a QEMU that waits for the state.
    Preparation,
    /// Disks are being copied while the guest runs.
    Mirroring,
    /// Memory is being copied while the guest runs.
    Precopy,
    /// The guest stands still on the source while the rest is sent.
    Switchover,
    /// The ownership passes: the point of no return.
    Handoff,
    /// The guest runs on the destination and fetches missing memory.
    Postcopy,
    /// What is left of the VM on the source is taken down.
    Retirement,
}

impl Phase {
    /// All phases in order.
    pub const ALL: [Self; 10] = [
        Self::Admission,
        Self::Preflight,
        Self::Reservation,
        Self::Preparation,
        Self::Mirroring,
        Self::Precopy,
        Self::Switchover,
        Self::Handoff,
        Self::Postcopy,
        Self::Retirement,
    ];

    /// The place of this phase among all, counted from 1.
    #[must_use]
    pub const fn number(self) -> u8 {
        self as u8 + 1
    }

    /// Whether every failure in this phase still leads back to the source.
    #[must_use]
    pub fn is_before_handoff(self) -> bool {
        self < Self::Handoff
    }

    /// The phase's word, lower case, as in JSON.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Admission => "admission",
            Self::Preflight => "preflight",
            Self::Reservation => "reservation",
            Self::Preparation => "preparation",
            Self::Mirroring => "mirroring",
            Self::Precopy => "precopy",
            Self::Switchover => "switchover",
            Self::Handoff => "handoff",
            Self::Postcopy => "postcopy",
            Self::Retirement => "retirement",
        }
    }
}

impl fmt::Display for Phase {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.as_str())
    }
}

/// A text that names no phase.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "no such phase; the phases are admission, preflight, reservation, preparation, mirroring, \
         precopy, switchover, handoff, postcopy and retirement"
)]
pub struct UnknownPhase;

impl FromStr for Phase {
    type Err = UnknownPhase;

    fn from_str(text: &str) -> Result<Self, UnknownPhase> {
        Self::ALL.into_iter().find(|phase| phase.as_str() == text).ok_or(UnknownPhase)
    }
}

/// How a migration ended. (A refusal is none of these: nothing was begun.)
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize, ToSchema)]
#[serde(tag = "outcome", rename_all = "lowercase")]
pub enum Outcome {
    /// The destination owns the VM.
    Moved,
    /// The source owns the VM as before.
    Stayed {
        /// A sentence saying why.
        why: String,
    },
    /// Not known yet: the VM stands still until the host to ask has answered.
    Unresolved {
        /// The host whose answer decides.
        ask: Name,
    },
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_word_everywhere() {
        for (index, phase) in Phase::ALL.into_iter().enumerate() {
            assert_eq!(usize::from(phase.number()), index + 1);
            assert_eq!(phase.to_string().parse::<Phase>().unwrap(), phase);
            assert_eq!(serde_json::to_string(&phase).unwrap(), format!("\"{phase}\""));
        }
        assert!(Phase::ALL.is_sorted());
        assert!("Handoff".parse::<Phase>().is_err());
    }

    #[test]
    fn handoff_is_the_point_of_no_return() {
        assert!(Phase::Switchover.is_before_handoff());
        assert!(!Phase::Handoff.is_before_handoff());
        assert!(!Phase::Retirement.is_before_handoff());
    }

    #[test]
    fn outcomes_are_tagged() {
        let json = serde_json::to_value(Outcome::Stayed { why: "cancelled".into() }).unwrap();
        assert_eq!(json, serde_json::json!({"outcome": "stayed", "why": "cancelled"}));
    }
}
