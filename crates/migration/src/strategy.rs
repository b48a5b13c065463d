//! The way that a move takes, chosen from measurements, with each choice explained.
//!
//! A ladder, from the cheapest rung to the dearest ([`Rung`]): a single stream, more connections,
//! compression where the network holds it back, a longer pause within the limit, post-copy, throttling,
//! stopping the guest. [`plan`] takes the cheapest that the forecast says will do, with two qualifications:
//!
//! - What the guest does not feel (the first three) is also taken when it makes the move at least
//!   [`GAIN_MIN_PERCENT`] shorter.
//! - What the user has said is not chosen but kept, and what the policy does not allow is not tried.
//!
//! QEMU takes capabilities only before a migration begins. What [`replan`] may need later is therefore
//! made ready beforehand, where it costs nothing: throttling always ([`ThrottleSetting::RESERVE`]),
//! post-copy where the forecast is close, or nothing was measured that it could rest on (its destination gives up huge pages).
//!
//! - [`settings`]: the settings that are chosen;
//! - `ladder`: how;
//! - `replanning`: stepping up when fact leaves forecast.
//!
//! Nothing is done here: agents do it. Nor is it asked whether the options fit
//! ([`crate::preflight::combinations`] has refused what does not).

mod ladder;
mod replanning;
pub mod settings;

use std::fmt;

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

pub use self::ladder::plan;
pub use self::replanning::{
    Observed, PASSES_KEPT, PassSeen, RATE_CHANGE_PERCENT, STALL_PASSES, STALL_SHRINK_PERCENT, Step,
    StepUp, TIME_USED_PERCENT, replan, replan_measured,
};
pub use self::settings::{
    CompressionSetting, PostcopyBegin, PostcopySetting, Rung, Strategy, ThrottleSetting,
};
use crate::forecast::Forecast;
use crate::forecast::facts::{EngineCosts, Measurements};
use crate::options::{MigrateOptions, Mode};
use crate::policy::Policy;
use crate::preflight::EngineAbilities;

/// How much shorter a move must become for a dearer rung that the guest does not feel, in percent.
pub const GAIN_MIN_PERCENT: f64 = 10.0;
/// The pause that is aimed at where nobody says one, in milliseconds: QEMU's default. The policy's
/// limit may be below it, and is stepped up to where it is above.
pub const NORMAL_DOWNTIME_MS: u64 = 300;
/// Where the guest could write less than so much faster, in percent, post-copy is made ready.
pub const RESERVE_MARGIN_PERCENT: f64 = 100.0;
/// Most connections that are chosen unasked.
pub const CHOSEN_CHANNELS_MAX: u64 = 8;

/// All that a strategy is chosen from.
#[derive(Debug, Clone, Copy)]
pub struct Situation<'a> {
    /// What was measured.
    pub facts: &'a Measurements,
    /// What QEMU's own work costs here.
    pub costs: &'a EngineCosts,
    /// What the source's engine can do.
    pub source: &'a EngineAbilities,
    /// What the destination's engine can do.
    pub destination: &'a EngineAbilities,
    /// What the user has said.
    pub options: &'a MigrateOptions,
    /// The policy that applies.
    pub policy: &'a Policy,
}

/// A strategy, what it will take, and why it is this one.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Plan {
    /// The settings.
    pub strategy: Strategy,
    /// What the move will take with them.
    pub forecast: Forecast,
    /// What plain pre-copy would take: whether the move converges without any help.
    pub plain: Forecast,
    /// Whether the forecast says that it will do. If not, it is the best of what is allowed.
    pub will_do: bool,
    /// Why, one line each.
    pub decisions: Vec<Decision>,
}

/// One decision: what was measured, what was chosen, what was rejected and why.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Decision {
    /// What was measured.
    pub measured: String,
    /// What was chosen.
    pub chosen: String,
    /// What was not, and why.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub rejected: Vec<Rejection>,
}

/// What was rejected, and why.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Rejection {
    /// What.
    pub what: String,
    /// Why.
    pub why: String,
}

impl fmt::Display for Decision {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "measured: {}; chosen: {}", self.measured, self.chosen)?;
        for (index, Rejection { what, why }) in self.rejected.iter().enumerate() {
            write!(f, "{}{what} ({why})", if index == 0 { "; rejected: " } else { ", " })?;
        }
        Ok(())
    }
}

/// What policy and options together allow.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Allowed {
    /// Post-copy.
    pub postcopy: bool,
    /// Throttling.
    pub throttle: bool,
    /// Stopping the guest.
    pub stopping: bool,
    /// The longest pause of a live move, in milliseconds.
    pub max_downtime_ms: u64,
    /// The longest time in all, in milliseconds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_total_ms: Option<u64>,
}

impl Allowed {
    /// What a user may have under a policy. A pause that the user names goes before the policy's, and who
    /// gives a timeout has said what to do when the copy does not end: nothing is done unasked then.
    #[must_use]
    pub fn of(policy: &Policy, options: &MigrateOptions) -> Self {
        let asks_to_stop = matches!(options.mode, Mode::Static | Mode::Quick);
        let asks_to_throttle = options.auto_converge.is_some();
        let unasked = options.timeout.is_none();
        Self {
            postcopy: policy.allow_postcopy.allows(options.postcopy.is_some()),
            throttle: (asks_to_throttle || unasked)
                && policy.allow_throttle.allows(asks_to_throttle),
            stopping: options.mode != Mode::Live
                && (asks_to_stop || unasked)
                && policy.allow_static.allows(asks_to_stop),
            max_downtime_ms: options.max_downtime_ms.unwrap_or(policy.max_downtime_ms),
            max_total_ms: policy.max_total_s.map(|seconds| seconds.saturating_mul(1_000)),
        }
    }
}

#[cfg(test)]
mod tests;
