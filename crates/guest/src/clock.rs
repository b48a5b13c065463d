//! The clocks, watched by a thread that looks every millisecond.
//!
//! The monotonic clock must never go back, and the wall clock must move with it. The time between two looks shows the
//! stalls that a guest can notice; a machine's pause is none of them, for its clocks stop with it.

use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::Duration;

use rustix::time::{ClockId, Timespec, clock_gettime, clock_settime};

use crate::report::ClockReport;

/// How often the clocks are looked at.
const PERIOD: Duration = Duration::from_millis(1);
/// Steps of the wall clock up to this are noise.
const STEP_MIN_NS: u64 = 2_000_000;
/// A reading of both clocks that took longer than this says nothing about steps.
const READING_NS_MAX: i64 = 500_000;
/// How far [`Clock::damage`] sets the wall clock ahead.
const DAMAGE_S: i64 = 5;

/// What the watching thread saw.
#[derive(Default)]
pub(crate) struct Clock {
    monotonic_back: AtomicU64,
    realtime_steps: AtomicU64,
    largest_step_ns: AtomicU64,
    largest_gap_ns: AtomicU64,
}

/// One look at both clocks.
#[derive(Clone, Copy)]
struct Look {
    monotonic_ns: i64,
    /// Wall clock less monotonic clock, if both were read at about the same time.
    offset_ns: Option<i64>,
}

impl Clock {
    /// Watches the clocks; never returns.
    pub(crate) fn keep_watching(&self) -> ! {
        let mut last = look();
        let mut last_offset = last.offset_ns;
        loop {
            thread::sleep(PERIOD);
            let now = look();
            self.compare(last, now, last_offset);
            last = now;
            last_offset = now.offset_ns.or(last_offset);
        }
    }

    /// Forgets the largest gap.
    pub(crate) fn reset_peaks(&self) {
        self.largest_gap_ns.store(0, Ordering::Relaxed);
    }

    /// Sets the wall clock ahead, as a machine would that was moved carelessly. True if the kernel let it.
    pub(crate) fn damage(&self) -> bool {
        let mut time = clock_gettime(ClockId::Realtime);
        time.tv_sec += DAMAGE_S;
        clock_settime(ClockId::Realtime, time).is_ok()
    }

    pub(crate) fn report(&self) -> ClockReport {
        ClockReport {
            monotonic_back: self.monotonic_back.load(Ordering::Relaxed),
            realtime_steps: self.realtime_steps.load(Ordering::Relaxed),
            largest_step_us: self.largest_step_ns.load(Ordering::Relaxed) / 1000,
            largest_gap_us: self.largest_gap_ns.load(Ordering::Relaxed) / 1000,
            realtime_ms: (nanoseconds(clock_gettime(ClockId::Realtime)) / 1_000_000) as u64,
        }
    }

    fn compare(&self, last: Look, now: Look, last_offset: Option<i64>) {
        let gap_ns = now.monotonic_ns - last.monotonic_ns;
        match u64::try_from(gap_ns) {
            Ok(gap_ns) => self.largest_gap_ns.fetch_max(gap_ns, Ordering::Relaxed),
            Err(_) => self.monotonic_back.fetch_add(1, Ordering::Relaxed),
        };
        if let (Some(before), Some(after)) = (last_offset, now.offset_ns) {
            let step_ns = before.abs_diff(after);
            if step_ns > STEP_MIN_NS {
                self.realtime_steps.fetch_add(1, Ordering::Relaxed);
                self.largest_step_ns.fetch_max(step_ns, Ordering::Relaxed);
            }
        }
    }
}

/// Time since the kernel started.
pub(crate) fn uptime_ms() -> u64 {
    (nanoseconds(clock_gettime(ClockId::Monotonic)) / 1_000_000) as u64
}

fn look() -> Look {
    let before_ns = nanoseconds(clock_gettime(ClockId::Monotonic));
    let realtime_ns = nanoseconds(clock_gettime(ClockId::Realtime));
    let monotonic_ns = nanoseconds(clock_gettime(ClockId::Monotonic));
    let together = (0..=READING_NS_MAX).contains(&(monotonic_ns - before_ns));
    Look { monotonic_ns, offset_ns: together.then_some(realtime_ns - monotonic_ns) }
}

fn nanoseconds(time: Timespec) -> i64 {
    time.tv_sec * 1_000_000_000 + time.tv_nsec
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: i64 = 1_000_000;

    fn at(monotonic_ns: i64, offset_ns: i64) -> Look {
        Look { monotonic_ns, offset_ns: Some(offset_ns) }
    }

    fn seen(last: Look, now: Look) -> ClockReport {
        let clock = Clock::default();
        clock.compare(last, now, last.offset_ns);
        ClockReport { realtime_ms: 0, ..clock.report() }
    }

    #[test]
    fn tells_gaps_steps_and_time_going_back_apart() {
        let nothing = ClockReport { largest_gap_us: 1000, ..ClockReport::default() };
        assert_eq!(seen(at(0, 7), at(MS, 7)), nothing);
        assert_eq!(seen(at(0, 7), at(MS, 2 * MS + 7)), nothing, "noise");
        assert_eq!(seen(at(0, 7), at(40 * MS, 7)).largest_gap_us, 40_000);
        assert_eq!(seen(at(MS, 7), at(0, 7)).monotonic_back, 1);
        for step in [-3 * MS, 3 * MS] {
            let report = seen(at(0, 7), at(MS, 7 + step));
            assert_eq!((report.realtime_steps, report.largest_step_us), (1, 3000));
        }
    }

    #[test]
    fn a_slow_reading_hides_no_step() {
        let clock = Clock::default();
        let slow = Look { monotonic_ns: MS, offset_ns: None };
        clock.compare(at(0, 0), slow, Some(0));
        clock.compare(slow, at(2 * MS, 9 * MS), Some(0));
        assert_eq!(clock.report().realtime_steps, 1);
    }
}
