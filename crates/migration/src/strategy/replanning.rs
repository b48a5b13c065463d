//! Stepping up when fact leaves forecast: the copy stalls, the rates have changed, or time runs out.
//!
//! [`replan`] is asked after each pass. It answers rarely: only what cannot end by itself is helped, and
//! by one rung at a time. What a step needs was made ready before the start ([`super::plan`]).
//! [`replan_measured`] is asked once, when it has become known during a first pass how the guest writes.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::ladder::is_mostly_sent_again;
use super::settings::{PostcopyBegin, PostcopySetting, Strategy, ThrottleSetting};
use super::{Allowed, Decision, Rejection, Rung};
use crate::forecast::facts::{EngineCosts, Measurements};
use crate::forecast::{Convergence, Forecast, forecast};

/// Passes over which the rest has to become less.
pub const STALL_PASSES: usize = 3;
/// How much less, at least, in percent.
pub const STALL_SHRINK_PERCENT: u64 = 10;
/// A rate that differs by more than this from the forecast has changed, in percent.
pub const RATE_CHANGE_PERCENT: f64 = 30.0;
/// From this share of what is sent on, what the guest writes keeps up with it.
const HOPELESS_SHARE: f64 = 0.9;
/// When so much of the longest time is over, in percent, the next rung is taken.
pub const TIME_USED_PERCENT: u64 = 80;
/// Most passes that are kept for the comparison.
pub const PASSES_KEPT: usize = 64;

/// What has been seen of a running migration.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Observed {
    /// Since the request, in milliseconds.
    pub elapsed_ms: u64,
    /// The passes since the start or since the last step up, the oldest first, the latest
    /// [`PASSES_KEPT`] at most.
    pub passes: Vec<PassSeen>,
    /// Bytes a second on the wire, now.
    pub wire_bytes_per_s: f64,
    /// Bytes that the guest dirties in a second, now, as QEMU counts them.
    pub dirty_bytes_per_s: f64,
    /// The pause that QEMU is told to aim at now, in milliseconds.
    pub aim_ms: u64,
    /// The throttle now, in percent.
    pub throttle_percent: u8,
    /// Post-copy has begun, or the guest has been stopped: nothing can be stepped up any more.
    pub past_choice: bool,
}

/// A pass that has begun.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct PassSeen {
    /// Its number (QEMU's `dirty-sync-count`).
    pub pass: u64,
    /// What it has to send, in bytes.
    pub rest_bytes: u64,
}

/// A step up the ladder, in a running migration.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(tag = "step", rename_all = "kebab-case")]
pub enum Step {
    /// A longer pause may be made.
    Downtime {
        /// How long, in milliseconds.
        max_downtime_ms: u64,
    },
    /// Post-copy begins.
    Postcopy,
    /// Post-copy begins when the first pass is made.
    PostcopyAfterPass,
    /// The guest is slowed down.
    Throttle {
        /// How.
        throttle: ThrottleSetting,
    },
    /// The guest is stopped, and the rest sent.
    Stop,
    /// Nothing more is allowed: it goes on as it is, and its user is told.
    Nothing,
}

/// A step up, and why.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct StepUp {
    /// The step.
    pub step: Step,
    /// The strategy from now on.
    pub strategy: Strategy,
    /// Why.
    pub decision: Decision,
}

/// Whether a running migration needs the next rung. `None`: let it go on.
///
/// After a step the caller begins a new list of passes, and after [`Step::Nothing`] it does not ask again
/// until something is set by hand.
#[must_use]
pub fn replan(
    seen: &Observed,
    expected: &Forecast,
    strategy: &Strategy,
    allowed: &Allowed,
) -> Option<StepUp> {
    if seen.past_choice || strategy.stop_first || is_growing(seen, strategy) {
        return None;
    }
    let late = is_late(seen, allowed);
    let stalled = is_stalled(&seen.passes);
    // With other rates than were reckoned with, or no pause that could reach, one pass is enough to see where it leads.
    let hopeless = seen.passes.len() > 1
        && (has_changed(seen, expected) || is_beyond_reach(seen, allowed.max_downtime_ms))
        && seen.dirty_bytes_per_s >= seen.wire_bytes_per_s * HOPELESS_SHARE
        && !shrinks(&seen.passes);
    if !(late || stalled || hopeless) {
        return None;
    }
    let mut rejected = Vec::new();
    let step = next_step(seen, strategy, allowed, &mut rejected);
    let strategy = after(strategy, step);
    let reason =
        if stalled || hopeless { stall_words(seen, expected) } else { late_words(seen, allowed) };
    let chosen = chosen_words(step);
    Some(StepUp { step, strategy, decision: Decision { measured: reason, chosen, rejected } })
}

/// What to do about a guest of which it was learnt during the first pass how it writes. `None`: to go on, because the
/// copy converges, perhaps with a longer pause, or because nothing else is allowed and ready; [`replan`] watches on.
///
/// Only what is certain is acted upon: a copy that is on the edge is left to show what it does.
#[must_use]
pub fn replan_measured(
    facts: &Measurements,
    costs: &EngineCosts,
    strategy: &Strategy,
    allowed: &Allowed,
) -> Option<StepUp> {
    if strategy.stop_first {
        return None;
    }
    let max_downtime_ms = allowed.max_downtime_ms.max(strategy.max_downtime_ms);
    let precopy = Strategy { max_downtime_ms, postcopy: None, ..strategy.clone() };
    let foretold = forecast(facts, costs, &precopy);
    if foretold.convergence != Convergence::No {
        return None;
    }
    let again = facts.dirty_curve().unique_bytes(foretold.first_pass_ms);
    let measured = format!(
        "the guest writes {:.0} MB/s, and while memory is sent once {:.0} MB of it; {:.0} MB/s are sent",
        mb(facts.dirty_curve().bytes_per_s()),
        mb(again),
        mb(foretold.wire_bytes_per_s)
    );
    let mut rejected = Vec::new();
    reject(&mut rejected, Rung::Downtime, "what is left would not fit into the longest one");
    let step = match ready_postcopy(strategy, allowed, &mut rejected) {
        Some(_) if !is_mostly_sent_again(facts, &foretold) => Step::PostcopyAfterPass,
        Some(step) => step,
        None => ready_throttle(strategy, allowed, &mut rejected)?,
    };
    let (chosen, strategy) = (chosen_words(step), after(strategy, step));
    Some(StepUp { step, strategy, decision: Decision { measured, chosen, rejected } })
}

/// The aim or the throttle has not reached its end yet: what was decided is still at work. An aim that can not reach far
/// enough is not waited for.
fn is_growing(seen: &Observed, strategy: &Strategy) -> bool {
    let throttling = strategy.throttle.is_some_and(|throttle| {
        !throttle.is_reserve() && seen.throttle_percent < throttle.max_percent
    });
    let aiming =
        seen.aim_ms < strategy.max_downtime_ms && !is_beyond_reach(seen, strategy.max_downtime_ms);
    aiming || throttling
}

/// Whether what a pass begins with, at the least, takes longer than a pause may.
fn is_beyond_reach(seen: &Observed, max_downtime_ms: u64) -> bool {
    let least = seen.passes.iter().map(|pass| pass.rest_bytes).min();
    let in_pause = seen.wire_bytes_per_s * max_downtime_ms as f64 / 1_000.0;
    in_pause > 0.0 && least.is_some_and(|least| least as f64 > in_pause)
}

fn is_late(seen: &Observed, allowed: &Allowed) -> bool {
    allowed.max_total_ms.is_some_and(|most| {
        u128::from(seen.elapsed_ms) * 100 > u128::from(most) * u128::from(TIME_USED_PERCENT)
    })
}

fn is_stalled(passes: &[PassSeen]) -> bool {
    let Some(earlier) = passes.len().checked_sub(STALL_PASSES).filter(|count| *count > 0) else {
        return false;
    };
    let least = |passes: &[PassSeen]| passes.iter().map(|pass| pass.rest_bytes).min();
    let (before, now) = (least(&passes[..earlier]), least(&passes[earlier..]));
    before.zip(now).is_some_and(|(before, now)| {
        u128::from(now) * 100 > u128::from(before) * u128::from(100 - STALL_SHRINK_PERCENT)
    })
}

fn shrinks(passes: &[PassSeen]) -> bool {
    let [.., before, last] = passes else { return true };
    let (before, last) = (u128::from(before.rest_bytes), u128::from(last.rest_bytes));
    last * 100 <= before * u128::from(100 - STALL_SHRINK_PERCENT)
}

fn has_changed(seen: &Observed, expected: &Forecast) -> bool {
    let (now, then) = (seen.wire_bytes_per_s, expected.wire_bytes_per_s);
    let slower = now < then * (1.0 - RATE_CHANGE_PERCENT / 100.0);
    slower || seen.dirty_bytes_per_s > then * (1.0 + RATE_CHANGE_PERCENT / 100.0)
}

fn reject(rejected: &mut Vec<Rejection>, rung: Rung, why: &str) {
    rejected.push(Rejection { what: rung.as_words().to_owned(), why: why.to_owned() });
}

/// The next rung that is allowed and ready.
fn next_step(
    seen: &Observed,
    strategy: &Strategy,
    allowed: &Allowed,
    rejected: &mut Vec<Rejection>,
) -> Step {
    if strategy.max_downtime_ms >= allowed.max_downtime_ms {
        reject(rejected, Rung::Downtime, "it is at its limit");
    } else if is_beyond_reach(seen, allowed.max_downtime_ms) {
        reject(rejected, Rung::Downtime, "what is left would not fit into the longest one");
    } else {
        let longer = strategy.max_downtime_ms.saturating_mul(2).min(allowed.max_downtime_ms);
        return Step::Downtime { max_downtime_ms: longer };
    }
    if let Some(step) = ready_postcopy(strategy, allowed, rejected) {
        return step;
    }
    if let Some(step) = ready_throttle(strategy, allowed, rejected) {
        return step;
    }
    if allowed.stopping {
        return Step::Stop;
    }
    reject(rejected, Rung::Static, "it is not allowed");
    Step::Nothing
}

/// Post-copy, where it may be begun.
fn ready_postcopy(
    strategy: &Strategy,
    allowed: &Allowed,
    rejected: &mut Vec<Rejection>,
) -> Option<Step> {
    let why = match strategy.postcopy.map(|postcopy| postcopy.begin) {
        None => "it was not made ready",
        Some(_) if !allowed.postcopy => "it is not allowed",
        Some(PostcopyBegin::WhenOrdered) => "it waits for an order",
        Some(_) => return Some(Step::Postcopy),
    };
    reject(rejected, Rung::Postcopy, why);
    None
}

/// Throttling, where it may be begun.
fn ready_throttle(
    strategy: &Strategy,
    allowed: &Allowed,
    rejected: &mut Vec<Rejection>,
) -> Option<Step> {
    let why = match strategy.throttle {
        None => "it was not made ready",
        Some(throttle) if !throttle.is_reserve() => "it is at its limit",
        Some(_) if !allowed.throttle => "it is not allowed",
        Some(_) => return Some(Step::Throttle { throttle: ThrottleSetting::STANDARD }),
    };
    reject(rejected, Rung::Throttle, why);
    None
}

/// The strategy once a step has been taken.
fn after(strategy: &Strategy, step: Step) -> Strategy {
    let before = strategy.clone();
    match step {
        Step::Downtime { max_downtime_ms } => {
            Strategy { rung: before.rung.max(Rung::Downtime), max_downtime_ms, ..before }
        }
        Step::Postcopy => Strategy { rung: Rung::Postcopy, ..before },
        Step::PostcopyAfterPass => {
            let begin = PostcopyBegin::AfterFirstPass;
            let postcopy = before.postcopy.map(|setting| PostcopySetting { begin, ..setting });
            Strategy { rung: Rung::Postcopy, postcopy, ..before }
        }
        Step::Throttle { throttle } => {
            Strategy { rung: Rung::Throttle, throttle: Some(throttle), ..before }
        }
        Step::Stop => Strategy { rung: Rung::Static, stop_first: true, ..before },
        Step::Nothing => before,
    }
}

fn mb(bytes: f64) -> f64 {
    bytes / 1e6
}

fn stall_words(seen: &Observed, expected: &Forecast) -> String {
    let rest = seen.passes.last().map_or(0, |pass| pass.rest_bytes);
    let pass = seen.passes.last().map_or(0, |pass| pass.pass);
    format!(
        "pass {pass} begins with {:.0} MB, no less than those before; the guest writes {:.0} MB/s, {:.0} MB/s \
         are sent, {:.0} MB/s were expected",
        mb(rest as f64),
        mb(seen.dirty_bytes_per_s),
        mb(seen.wire_bytes_per_s),
        mb(expected.wire_bytes_per_s)
    )
}

fn late_words(seen: &Observed, allowed: &Allowed) -> String {
    let most = allowed.max_total_ms.unwrap_or(seen.elapsed_ms);
    format!(
        "{} s of the {} s that the policy allows are over",
        seen.elapsed_ms / 1_000,
        most / 1_000
    )
}

fn chosen_words(step: Step) -> String {
    match step {
        Step::Downtime { max_downtime_ms } => format!("a pause of up to {max_downtime_ms} ms"),
        Step::Postcopy => "post-copy, now".to_owned(),
        Step::PostcopyAfterPass => "post-copy, when the first pass is made".to_owned(),
        Step::Throttle { throttle } => format!(
            "the guest is slowed by {} %, and by {} % more at a time",
            throttle.initial_percent, throttle.increment_percent
        ),
        Step::Stop => "the guest is stopped until the rest is sent".to_owned(),
        Step::Nothing => "going on: nothing that is left is allowed".to_owned(),
    }
}
