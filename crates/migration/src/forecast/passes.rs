//! The passes of a pre-copy migration, one after the other, as QEMU makes them (7.2 and 10.0).
//!
//! QEMU sends what it knows to be dirty, in stretches of [`STRETCH_MS`]. After each it looks whether what
//! is left could be sent within the pause that it may make, at the rate that it sees; only then does it
//! fetch the bitmap of what was dirtied meanwhile. If the sum still fits, the guest is stopped; if not,
//! the next pass has begun. Who drives it lets it aim at a short pause first, and doubles that whenever a
//! further pass has begun. With auto-converge the guest is slowed down at every second bitmap, not more
//! often than every [`THROTTLE_PERIOD_MS`], that has more than half of what was sent since the last one;
//! from 9.2 on bitmaps are fetched for that in the middle of a pass too, once the first one is over.

use super::dirtying::DirtyCurve;
use super::facts::EngineCosts;
use super::stream::Stream;
use crate::strategy::{Strategy, ThrottleSetting};

/// For how long QEMU sends before it looks again, in milliseconds.
const STRETCH_MS: f64 = 50.0;
/// How far apart the bitmaps are that count for the throttle, in milliseconds.
const THROTTLE_PERIOD_MS: f64 = 1_000.0;
/// Which share of what was sent has to be dirty again for it (`throttle-trigger-threshold`).
const THROTTLE_TRIGGER_SHARE: f64 = 0.5;
/// How many such bitmaps a step of the throttle takes.
const THROTTLE_HIGH_PERIODS: u32 = 2;
/// Passes without progress, nothing else being left to change, after which there will be none.
const STALLED_PASSES: u32 = 8;
/// What counts as progress: the rest is smaller than this share of the smallest so far.
const PROGRESS_SHARE: f64 = 0.999_99;
/// Most passes that are gone through: a copy that needs more does not end for anybody who waits for it.
const PASSES_MAX: u32 = 5_000;
const NS_PER_MS: f64 = 1e6;

/// What there is to be copied, and how.
pub(super) struct Course<'a> {
    pub(super) memory_bytes: f64,
    pub(super) stream: Stream,
    pub(super) curve: &'a DirtyCurve,
    pub(super) vcpu_busy_share: f64,
    pub(super) costs: &'a EngineCosts,
    /// How much faster than measured the guest writes.
    pub(super) pace: f64,
}

/// How the passes ended.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Copied {
    /// The rest fits into the pause. Else what follows is where it stood when it stopped getting less.
    pub(super) converged: bool,
    /// Since the first page was sent.
    pub(super) ms: f64,
    pub(super) first_pass_ms: f64,
    pub(super) passes: u32,
    /// What is sent in the pause.
    pub(super) rest_bytes: f64,
    pub(super) wire_bytes: f64,
    pub(super) throttle_percent: f64,
}

impl Course<'_> {
    /// Goes through the passes until the guest would be stopped, or would never be.
    pub(super) fn run(&self, strategy: &Strategy) -> Copied {
        let mut state = State::new(self, strategy);
        loop {
            state.lengthen_aim(self);
            state.send(self, strategy);
            let fits = state.look(self, strategy);
            if fits || state.is_stalled(strategy) || state.passes >= PASSES_MAX {
                return state.end(fits);
            }
        }
    }

    /// What a first pass takes, and what has been dirtied when it is over.
    pub(super) fn first_pass(&self) -> (f64, f64) {
        let ms = self.memory_bytes * self.stream.first_ns_per_byte / NS_PER_MS + self.sync_ms();
        (ms, self.curve.unique_bytes(ms * self.pace))
    }

    fn sync_ms(&self) -> f64 {
        self.memory_bytes / super::facts::PAGE_BYTES as f64 * self.costs.sync_ns_per_page
            / NS_PER_MS
    }

    /// How fast the guest writes under a throttle, as a share of how fast it was measured to. One
    /// that is idle half of the time loses nothing until half of its time is taken away.
    fn speed(&self, throttle_percent: f64) -> f64 {
        let busy = self.vcpu_busy_share.clamp(0.01, 1.0);
        ((1.0 - throttle_percent / 100.0) / busy).min(1.0) * self.pace
    }
}

struct State {
    ms: f64,
    first_pass_ms: Option<f64>,
    /// Known to be dirty and not sent.
    rest_bytes: f64,
    /// Passes that have begun.
    passes: u32,
    wire_bytes: f64,
    synced_at_ms: f64,
    aim_ms: f64,
    passes_at_look: u32,
    next_look_ms: f64,
    throttle: Throttling,
    least_rest_bytes: f64,
    passes_without_progress: u32,
}

#[derive(Default)]
struct Throttling {
    percent: f64,
    since_ms: f64,
    dirtied_bytes: f64,
    wire_bytes_before: f64,
    high_periods: u32,
}

impl State {
    fn new(course: &Course<'_>, strategy: &Strategy) -> Self {
        let first_aim_ms = course.costs.first_aim_ms.max(0.1);
        Self {
            ms: 0.0,
            first_pass_ms: None,
            rest_bytes: course.memory_bytes,
            passes: 1,
            wire_bytes: 0.0,
            synced_at_ms: 0.0,
            aim_ms: first_aim_ms.min(strategy.max_downtime_ms as f64),
            passes_at_look: 1,
            next_look_ms: course.costs.look_ms,
            throttle: Throttling::default(),
            least_rest_bytes: f64::INFINITY,
            passes_without_progress: 0,
        }
    }

    fn lengthen_aim(&mut self, course: &Course<'_>) {
        let look_ms = course.costs.look_ms.max(1.0);
        if self.ms >= self.next_look_ms {
            // However many looks have gone by: only one of them found a further pass.
            self.next_look_ms +=
                ((self.ms - self.next_look_ms) / look_ms).floor() * look_ms + look_ms;
            if self.passes > self.passes_at_look {
                self.aim_ms *= 2.0;
                self.passes_at_look = self.passes;
            }
        }
    }

    /// What QEMU reckons that a pause can take, in bytes of memory.
    fn fits_bytes(&self, course: &Course<'_>, strategy: &Strategy) -> f64 {
        let seen = course.stream.counted_bytes_per_s();
        let told = strategy.switchover_bandwidth_bytes_per_s.map_or(seen, |told| told as f64);
        told * self.aim_ms.min(strategy.max_downtime_ms as f64) / 1_000.0
    }

    /// Sends stretches until what is left could fit into the pause, or until nothing is left.
    fn send(&mut self, course: &Course<'_>, strategy: &Strategy) {
        let stream = &course.stream;
        let (ns_per_byte, wire_share) = match self.first_pass_ms {
            None => (stream.first_ns_per_byte, stream.first_wire_share),
            Some(_) => (stream.again_ns_per_byte, stream.again_wire_share),
        };
        let stretch_bytes = STRETCH_MS * NS_PER_MS / ns_per_byte;
        let above_bytes = self.rest_bytes - self.fits_bytes(course, strategy);
        let mut stretches = (above_bytes / stretch_bytes).ceil();
        let sync_ms = course.costs.throttle_sync_ms;
        if self.first_pass_ms.is_some() && strategy.throttle.is_some() && sync_ms > 0.0 {
            stretches = stretches.min((sync_ms / STRETCH_MS).ceil());
        }
        let stretches = stretches.max(1.0);
        let sent_bytes = (stretches * stretch_bytes).min(self.rest_bytes);
        self.rest_bytes -= sent_bytes;
        self.ms += sent_bytes * ns_per_byte / NS_PER_MS;
        self.wire_bytes += sent_bytes * wire_share;
    }

    /// Fetches the bitmap: a further pass begins, or the rest fits into the pause.
    fn look(&mut self, course: &Course<'_>, strategy: &Strategy) -> bool {
        self.ms += course.sync_ms();
        let since_ms = self.ms - self.synced_at_ms;
        let speed = course.speed(self.throttle.percent);
        let dirtied_bytes = course.curve.unique_bytes(since_ms * speed);
        // What is left of the set that the guest writes to may have been dirtied again: it is one set.
        let most_bytes = self.rest_bytes.max(course.curve.set_bytes());
        self.rest_bytes = (self.rest_bytes + dirtied_bytes).min(most_bytes);
        self.synced_at_ms = self.ms;
        self.first_pass_ms.get_or_insert(self.ms);
        self.passes += 1;
        if self.rest_bytes <= self.fits_bytes(course, strategy) {
            return true;
        }
        if let Some(setting) = strategy.throttle {
            self.throttle.note(self.ms, dirtied_bytes, self.wire_bytes, setting);
        }
        if self.rest_bytes < self.least_rest_bytes * PROGRESS_SHARE {
            self.least_rest_bytes = self.rest_bytes;
            self.passes_without_progress = 0;
        } else {
            self.passes_without_progress += 1;
        }
        false
    }

    /// Whether nothing changes any more: neither the rest, nor the aim, nor the throttle.
    fn is_stalled(&mut self, strategy: &Strategy) -> bool {
        let grown = self.aim_ms >= strategy.max_downtime_ms as f64;
        let throttled = strategy
            .throttle
            .is_none_or(|setting| self.throttle.percent >= f64::from(setting.max_percent));
        if !(grown && throttled) {
            self.passes_without_progress = 0;
        }
        self.passes_without_progress >= STALLED_PASSES
    }

    fn end(self, converged: bool) -> Copied {
        Copied {
            converged,
            ms: self.ms,
            first_pass_ms: self.first_pass_ms.unwrap_or(self.ms),
            passes: self.passes - 1,
            rest_bytes: self.rest_bytes,
            wire_bytes: self.wire_bytes,
            throttle_percent: self.throttle.percent,
        }
    }
}

impl Throttling {
    fn note(&mut self, ms: f64, dirtied_bytes: f64, wire_bytes: f64, setting: ThrottleSetting) {
        self.dirtied_bytes += dirtied_bytes;
        if ms - self.since_ms < THROTTLE_PERIOD_MS {
            return;
        }
        let sent_bytes = wire_bytes - self.wire_bytes_before;
        if self.dirtied_bytes > sent_bytes * THROTTLE_TRIGGER_SHARE {
            self.high_periods += 1;
        }
        if self.high_periods >= THROTTLE_HIGH_PERIODS {
            self.high_periods = 0;
            let step = if self.percent == 0.0 {
                f64::from(setting.initial_percent)
            } else {
                self.percent + f64::from(setting.increment_percent)
            };
            self.percent = step.min(f64::from(setting.max_percent));
        }
        self.since_ms = ms;
        self.dirtied_bytes = 0.0;
        self.wire_bytes_before = wire_bytes;
    }
}
