//! What a move will take, before it starts: whether it converges, how long, how many bytes, what pause.
//!
//! [`forecast`] goes through a migration in thought, pass by pass, from measurements:
//!
//! - [`facts`]: what was measured, and what QEMU's own work costs;
//! - [`dirtying`]: how many different pages the guest has written after some time;
//! - `stream`: how fast a strategy's stream carries memory, and what holds it back;
//! - `passes`: the passes, as QEMU makes them.
//!
//! **What it does not know**: what the guest will do. It reckons that the guest goes on as measured, that
//! what it writes compresses like the rest, and that nobody else takes the link or the processors.
//! It chooses nothing; [`crate::strategy`] asks it for each candidate. No clock: times are results.

pub mod dirtying;
pub mod facts;
mod passes;
mod stream;

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use self::facts::{EngineCosts, Measurements, PAGE_BYTES};
use self::passes::{Copied, Course};
pub use self::stream::Bottleneck;
use self::stream::Stream;
use crate::strategy::{PostcopyBegin, Strategy};

/// A forecast within this distance of the limit is marginal, in percent of the dirty rate.
pub const MARGIN_PERCENT: f64 = 15.0;
/// Margins beyond this, in percent, are told as this.
pub const MARGIN_MAX_PERCENT: f64 = 900.0;
/// The same below 0: what does not converge at a hundredth of the guest's writing.
pub const MARGIN_MIN_PERCENT: f64 = (PACE_MIN - 1.0) * 100.0;
/// Halvings of the search for the limit: good to a thousandth of it.
const MARGIN_STEPS: u32 = 16;
/// Slowest pace that is looked at for the limit, as a share of what was measured.
const PACE_MIN: f64 = 0.01;

/// Whether the copying of memory gets to its end by itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Convergence {
    /// Yes, with room to spare.
    Yes,
    /// It depends: within [`MARGIN_PERCENT`] of the limit.
    Marginal,
    /// No.
    No,
}

/// What a move will take with one strategy.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Forecast {
    /// Whether it converges.
    pub convergence: Convergence,
    /// How far from the limit, in percent of the dirty rate: the guest could write so much faster and
    /// it would still converge; below 0, it must write so much less. None where convergence is not a
    /// question (post-copy, static). 900 and -99 are where it is not looked further: at least so far.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub margin_percent: Option<f64>,
    /// From the command to the end of the copy: the guest on the destination with all its memory, in
    /// milliseconds. None if it does not end.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub total_ms: Option<f64>,
    /// How long the guest stands still, in milliseconds. None if it does not end.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub downtime_ms: Option<f64>,
    /// Bytes on the wire. None if it does not end.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub wire_bytes: Option<u64>,
    /// Passes over the memory before the guest is stopped. None if it does not end.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub passes: Option<u32>,
    /// What the first pass takes, in milliseconds.
    pub first_pass_ms: f64,
    /// The stream's rate on the wire for what is not zero, in bytes a second.
    pub wire_bytes_per_s: f64,
    /// What holds it back.
    pub bottleneck: Bottleneck,
    /// How hard the guest is throttled in the end, in percent.
    pub throttle_percent: f64,
    /// Post-copy, where it is made.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub postcopy: Option<PostcopyForecast>,
}

/// What post-copy will be like.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct PostcopyForecast {
    /// From the command until the guest runs on the destination, in milliseconds.
    pub runs_after_ms: f64,
    /// What is missing there then, in bytes.
    pub missing_bytes: u64,
    /// How long it takes until nothing is missing, in milliseconds.
    pub lasts_ms: f64,
    /// How often the guest waits for a page.
    pub faults: u64,
    /// How long each time, in microseconds.
    pub stall_us: f64,
    /// How long in all, over all vCPUs, in milliseconds.
    pub stalls_ms: f64,
}

/// What a move will take with a strategy.
#[must_use]
pub fn forecast(facts: &Measurements, costs: &EngineCosts, strategy: &Strategy) -> Forecast {
    let stream = Stream::of(facts, costs, strategy);
    let memory_bytes = facts.memory_bytes as f64;
    let curve = facts.dirty_curve();
    let course = Course {
        memory_bytes,
        stream,
        curve: &curve,
        vcpu_busy_share: facts.dirty.vcpu_busy_share,
        costs,
        pace: 1.0,
    };
    let trip = Trip::of(facts, costs);
    let begin = strategy.postcopy.map(|postcopy| postcopy.begin);
    let told = if strategy.stop_first {
        stopped(&course, &trip)
    } else if begin == Some(PostcopyBegin::AtOnce) {
        let before_ms = costs.look_ms.min(course.first_pass().0);
        postcopy(&course, &trip, strategy, Before::part(&course, before_ms))
    } else if begin == Some(PostcopyBegin::AfterFirstPass) {
        postcopy(&course, &trip, strategy, Before::whole_pass(&course))
    } else {
        precopy(&course, &trip, strategy)
    };
    told.rounded()
}

impl Forecast {
    /// To a thousandth: what is behind it means nothing, and does not come back from JSON unchanged.
    fn rounded(self) -> Self {
        let round = |value: f64| (value * 1_000.0).round() / 1_000.0;
        Self {
            margin_percent: self.margin_percent.map(round),
            total_ms: self.total_ms.map(round),
            downtime_ms: self.downtime_ms.map(round),
            first_pass_ms: round(self.first_pass_ms),
            wire_bytes_per_s: self.wire_bytes_per_s.round(),
            throttle_percent: round(self.throttle_percent),
            postcopy: self.postcopy.map(|postcopy| PostcopyForecast {
                runs_after_ms: round(postcopy.runs_after_ms),
                lasts_ms: round(postcopy.lasts_ms),
                stall_us: round(postcopy.stall_us),
                stalls_ms: round(postcopy.stalls_ms),
                ..postcopy
            }),
            ..self
        }
    }
}

/// What is not copying.
struct Trip {
    /// Until the first page is sent.
    before_ms: f64,
    /// The pause without its last pass.
    pause_ms: f64,
    rtt_ms: f64,
}

impl Trip {
    fn of(facts: &Measurements, costs: &EngineCosts) -> Self {
        let rtt_ms = facts.link.rtt_us as f64 / 1_000.0;
        let before = costs.control_ms + costs.engine_start_ms + costs.setup_ms;
        Self {
            before_ms: before + costs.setup_round_trips * rtt_ms,
            pause_ms: costs.switchover_ms + costs.switchover_round_trips * rtt_ms,
            rtt_ms,
        }
    }
}

fn precopy(course: &Course<'_>, trip: &Trip, strategy: &Strategy) -> Forecast {
    let copied = course.run(strategy);
    let margin = margin_percent(course, strategy, copied.converged);
    let convergence = match copied.converged {
        _ if margin.abs() <= MARGIN_PERCENT => Convergence::Marginal,
        true => Convergence::Yes,
        false => Convergence::No,
    };
    let Copied { converged, ms, rest_bytes, wire_bytes, passes, .. } = copied;
    let last_ms = rest_bytes * course.stream.again_ns_per_byte / 1e6;
    let downtime_ms = trip.pause_ms + last_ms;
    let all_wire_bytes = wire_bytes + rest_bytes * course.stream.again_wire_share;
    Forecast {
        convergence,
        margin_percent: Some(margin),
        total_ms: converged.then_some(trip.before_ms + ms + downtime_ms),
        downtime_ms: converged.then_some(downtime_ms),
        wire_bytes: converged.then_some(all_wire_bytes as u64),
        passes: converged.then_some(passes),
        first_pass_ms: copied.first_pass_ms,
        throttle_percent: copied.throttle_percent,
        ..unmoved(course)
    }
}

/// The guest is stopped first: one pass, all of it pause.
fn stopped(course: &Course<'_>, trip: &Trip) -> Forecast {
    let (first_pass_ms, _) = course.first_pass();
    let downtime_ms = first_pass_ms + trip.pause_ms;
    Forecast {
        total_ms: Some(trip.before_ms + downtime_ms),
        downtime_ms: Some(downtime_ms),
        wire_bytes: Some((course.memory_bytes * course.stream.first_wire_share) as u64),
        passes: Some(1),
        first_pass_ms,
        ..unmoved(course)
    }
}

/// What goes before post-copy begins.
struct Before {
    ms: f64,
    /// What is missing then and has never been sent, in bytes.
    unsent_bytes: f64,
    /// What has been sent and was dirtied meanwhile, in bytes.
    again_bytes: f64,
}

impl Before {
    /// One pass over the memory, seen at the next look.
    fn whole_pass(course: &Course<'_>) -> Self {
        let (pass_ms, again_bytes) = course.first_pass();
        Self { ms: pass_ms + course.costs.look_ms / 2.0, unsent_bytes: 0.0, again_bytes }
    }

    /// A part of one.
    fn part(course: &Course<'_>, ms: f64) -> Self {
        let sent = (ms * 1e6 / course.stream.first_ns_per_byte).min(course.memory_bytes);
        Self { ms, unsent_bytes: course.memory_bytes - sent, again_bytes: 0.0 }
    }
}

/// Some of the memory, then the guest runs on the destination and what is missing there follows.
fn postcopy(course: &Course<'_>, trip: &Trip, strategy: &Strategy, before: Before) -> Forecast {
    let (first_pass_ms, _) = course.first_pass();
    let missing_bytes = before.unsent_bytes + before.again_bytes;
    let stream = &course.stream;
    let downtime_ms = trip.pause_ms + course.costs.postcopy_switchover_extra_ms;
    let runs_after_ms = trip.before_ms + before.ms + downtime_ms;
    let limit = strategy.postcopy.and_then(|postcopy| postcopy.bandwidth_bytes_per_s);
    let limit_ns = limit.map_or(0.0, |limit| stream.again_wire_share * 1e9 / limit.max(1) as f64);
    let lasts_ms = (before.unsent_bytes * stream.first_ns_per_byte.max(limit_ns)
        + before.again_bytes * stream.again_ns_per_byte.max(limit_ns))
        / 1e6;
    let stall_us = course.costs.postcopy_fault_us + trip.rtt_ms * 1_000.0;
    let missing_pages = missing_bytes / PAGE_BYTES as f64;
    // The guest goes on writing where it wrote before, and finds ever more of it there.
    let touched_pages = course.curve.unique_bytes(lasts_ms) / PAGE_BYTES as f64;
    let most = lasts_ms * 1_000.0 / stall_us.max(1.0);
    let faults = (touched_pages / 2.0).min(missing_pages).min(most);
    let wire = course.memory_bytes * stream.first_wire_share
        + before.again_bytes * stream.again_wire_share;
    Forecast {
        total_ms: Some(runs_after_ms + lasts_ms),
        downtime_ms: Some(downtime_ms),
        wire_bytes: Some(wire as u64),
        passes: Some(1),
        first_pass_ms,
        postcopy: Some(PostcopyForecast {
            runs_after_ms,
            missing_bytes: missing_bytes as u64,
            lasts_ms,
            faults: faults as u64,
            stall_us,
            stalls_ms: faults * stall_us / 1_000.0,
        }),
        ..unmoved(course)
    }
}

/// What is known of a strategy before it is gone through.
fn unmoved(course: &Course<'_>) -> Forecast {
    Forecast {
        convergence: Convergence::Yes,
        margin_percent: None,
        total_ms: None,
        downtime_ms: None,
        wire_bytes: None,
        passes: None,
        first_pass_ms: 0.0,
        wire_bytes_per_s: course.stream.wire_bytes_per_s(),
        bottleneck: course.stream.bottleneck,
        throttle_percent: 0.0,
        postcopy: None,
    }
}

/// How much faster the guest could write over the same set (or must write slower), in percent.
fn margin_percent(course: &Course<'_>, strategy: &Strategy, converged: bool) -> f64 {
    let converges = |pace: f64| Course { pace, ..*course }.run(strategy).converged;
    let (mut good, mut bad) = if converged {
        let most = 1.0 + MARGIN_MAX_PERCENT / 100.0;
        if converges(most) {
            return MARGIN_MAX_PERCENT;
        }
        (1.0, most)
    } else {
        if !converges(PACE_MIN) {
            return MARGIN_MIN_PERCENT;
        }
        (PACE_MIN, 1.0)
    };
    for _ in 0..MARGIN_STEPS {
        let middle = f64::sqrt(good * bad);
        if converges(middle) {
            good = middle;
        } else {
            bad = middle;
        }
    }
    (good - 1.0) * 100.0
}

#[cfg(test)]
mod tests;
