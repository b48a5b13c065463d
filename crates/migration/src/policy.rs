//! What a move may cost: named objects that can be attached to a VM or to the pool, or asked for.
//!
//! A policy says what may be done to the guest, never how: that is [`crate::strategy`]'s. Four are built
//! in ([`Policy::built_in`]); others are the pool's own. Which of them applies (asked for, the VM's, the
//! pool's, [`DEFAULT_POLICY`]) is looked up by the controller.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::names::Name;
use crate::options::{OptionProblem, ProblemCode, limits as option_limits};

/// The policy that applies where no other does.
pub const DEFAULT_POLICY: &str = "balanced";

/// Bounds of policies.
pub mod limits {
    /// Shortest time that can be asked for, in seconds.
    pub const MAX_TOTAL_MIN_S: u64 = 1;
    /// Longest time that can be asked for, in seconds: a week.
    pub const MAX_TOTAL_MAX_S: u64 = 7 * 24 * 3600;
    /// Most bytes of a description.
    pub const DESCRIPTION_MAX_BYTES: usize = 500;
}

/// What a move may cost.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct Policy {
    /// Its name.
    pub name: Name,
    /// What it is for, for people; at most 500 bytes.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub description: String,
    /// Post-copy: the guest is lost if either QEMU or the network is lost for good meanwhile.
    #[serde(default)]
    pub allow_postcopy: Consent,
    /// Slowing the guest down until its memory can be sent.
    #[serde(default)]
    pub allow_throttle: Consent,
    /// Stopping the guest for as long as its memory takes.
    #[serde(default)]
    pub allow_static: Consent,
    /// Longest pause that a live move may make, in milliseconds.
    pub max_downtime_ms: u64,
    /// Longest time from the request to the guest running on the destination, in seconds; none without it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_total_s: Option<u64>,
    /// Whether the stream must be encrypted.
    #[serde(default)]
    pub require_tls: bool,
}

/// Whether something may be done.
#[derive(
    Debug,
    Clone,
    Copy,
    Default,
    PartialEq,
    Eq,
    Hash,
    PartialOrd,
    Ord,
    Serialize,
    Deserialize,
    ToSchema,
)]
#[serde(rename_all = "kebab-case")]
pub enum Consent {
    /// Not even if the user asks for it.
    Never,
    /// Only if the user asks for it.
    #[default]
    IfAsked,
    /// Whenever the measurements speak for it.
    Yes,
}

impl Consent {
    /// Whether it may be done, asked for or not.
    #[must_use]
    pub fn allows(self, asked: bool) -> bool {
        match self {
            Self::Never => false,
            Self::IfAsked => asked,
            Self::Yes => true,
        }
    }
}

impl Policy {
    /// The built-in policies.
    #[must_use]
    pub fn built_in() -> Vec<Self> {
        BUILT_IN.iter().map(BuiltIn::policy).collect()
    }

    /// The built-in policy of a name.
    #[must_use]
    pub fn named(name: &str) -> Option<Self> {
        BUILT_IN.iter().find(|policy| policy.name == name).map(BuiltIn::policy)
    }

    /// Everything that is wrong with the policy; empty if it is sound.
    #[must_use]
    pub fn validate(&self) -> Vec<OptionProblem> {
        let mut problems = Vec::new();
        let mut range = |field: &str, value: u64, least: u64, most: u64| {
            if !(least..=most).contains(&value) {
                problems.push(OptionProblem {
                    field: field.to_owned(),
                    code: ProblemCode::OutOfRange,
                    sentence: format!("{field} is {value}; it can be {least} to {most}"),
                });
            }
        };
        let (least, most) =
            (option_limits::MAX_DOWNTIME_MIN_MS, option_limits::MAX_DOWNTIME_MAX_MS);
        range("max_downtime_ms", self.max_downtime_ms, least, most);
        if let Some(seconds) = self.max_total_s {
            range("max_total_s", seconds, limits::MAX_TOTAL_MIN_S, limits::MAX_TOTAL_MAX_S);
        }
        let length = self.description.len().try_into().unwrap_or(u64::MAX);
        range("description", length, 0, limits::DESCRIPTION_MAX_BYTES as u64);
        problems
    }
}

impl Default for Policy {
    /// [`DEFAULT_POLICY`].
    fn default() -> Self {
        BUILT_IN[0].policy()
    }
}

struct BuiltIn {
    name: &'static str,
    description: &'static str,
    allow_postcopy: Consent,
    allow_throttle: Consent,
    allow_static: Consent,
    max_downtime_ms: u64,
}

const BUILT_IN: [BuiltIn; 4] = [
    BuiltIn {
        name: DEFAULT_POLICY,
        description: "Live, with a pause below a second; the guest is slowed down if nothing else helps.",
        allow_postcopy: Consent::IfAsked,
        allow_throttle: Consent::Yes,
        allow_static: Consent::IfAsked,
        max_downtime_ms: 1_000,
    },
    BuiltIn {
        name: "minimal-downtime",
        description: "The shortest pause; post-copy where the memory changes too fast.",
        allow_postcopy: Consent::Yes,
        allow_throttle: Consent::Yes,
        allow_static: Consent::Never,
        max_downtime_ms: 100,
    },
    BuiltIn {
        name: "no-postcopy",
        description: "Never a moment at which the guest depends on both hosts.",
        allow_postcopy: Consent::Never,
        allow_throttle: Consent::Yes,
        allow_static: Consent::IfAsked,
        max_downtime_ms: 1_000,
    },
    BuiltIn {
        name: "must-finish",
        description: "It arrives, by whatever means: for emptying a host.",
        allow_postcopy: Consent::Yes,
        allow_throttle: Consent::Yes,
        allow_static: Consent::Yes,
        max_downtime_ms: 5_000,
    },
];

impl BuiltIn {
    fn policy(&self) -> Policy {
        Policy {
            name: Name::new(self.name).expect("a name by its spelling, see the tests"),
            description: self.description.to_owned(),
            allow_postcopy: self.allow_postcopy,
            allow_throttle: self.allow_throttle,
            allow_static: self.allow_static,
            max_downtime_ms: self.max_downtime_ms,
            max_total_s: None,
            require_tls: false,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_built_in_policies_are_sound_and_found_by_their_names() {
        let names: Vec<String> =
            Policy::built_in().into_iter().map(|policy| policy.name.to_string()).collect();
        assert_eq!(names, ["balanced", "minimal-downtime", "no-postcopy", "must-finish"]);
        for policy in Policy::built_in() {
            assert_eq!(policy.validate(), []);
            assert_eq!(Policy::named(policy.name.as_str()), Some(policy.clone()));
            let json = serde_json::to_string(&policy).unwrap();
            assert_eq!(serde_json::from_str::<Policy>(&json).unwrap(), policy);
        }
        assert_eq!(Policy::default().name.as_str(), DEFAULT_POLICY);
        assert_eq!(Policy::named("fastest"), None);
    }

    #[test]
    fn what_is_not_said_has_to_be_asked_for() {
        let policy: Policy =
            serde_json::from_str(r#"{"name": "mine", "max_downtime_ms": 50}"#).unwrap();
        for consent in [policy.allow_postcopy, policy.allow_throttle, policy.allow_static] {
            assert!(consent.allows(true) && !consent.allows(false));
        }
        assert!(!Consent::Never.allows(true) && Consent::Yes.allows(false));
        for bad in [
            r#"{"name": "mine"}"#,
            r#"{"name": "My policy", "max_downtime_ms": 50}"#,
            r#"{"name": "mine", "max_downtime_ms": -1}"#,
            r#"{"name": "mine", "max_downtime_ms": 50, "allow_everything": "yes"}"#,
        ] {
            assert!(serde_json::from_str::<Policy>(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn bounds_are_told_all_at_once() {
        let policy = Policy {
            max_downtime_ms: 0,
            max_total_s: Some(1 << 63),
            description: "x".repeat(501),
            ..Policy::default()
        };
        let fields: Vec<String> = policy.validate().into_iter().map(|p| p.field).collect();
        assert_eq!(fields, ["max_downtime_ms", "max_total_s", "description"]);
    }
}
