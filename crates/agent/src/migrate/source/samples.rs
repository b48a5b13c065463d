//! What was seen of a migration: the figures in the contract's words, and points for a plot.
//!
//! Figures only; nothing is decided by them ([`super::steering`] decides by QEMU's own). They are kept until the controller
//! has taken note of the migration's end.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use whimbrel_api::Phase;
use whimbrel_api::agent::OutgoingRequest;
use whimbrel_api::migration::{MigrationStatistics, Progress, SAMPLES_MAX, Sample, XbzrleProgress};
use whimbrel_qemu::migrate::{Statistics, XbzrleStatistics};

/// The least distance of two points, in milliseconds.
const DISTANCE_MS: u64 = 100;

/// The points of one migration, shared by its task and whoever asks.
#[derive(Debug, Clone, Default)]
pub(in crate::migrate) struct Samples(Arc<Mutex<Kept>>);

#[derive(Debug)]
struct Kept {
    began: Instant,
    distance_ms: u64,
    seen: MigrationStatistics,
}

impl Default for Kept {
    fn default() -> Self {
        let seen = MigrationStatistics::default();
        Self { began: Instant::now(), distance_ms: DISTANCE_MS, seen }
    }
}

impl Samples {
    /// Everything that is kept.
    pub(in crate::migrate) fn seen(&self) -> MigrationStatistics {
        self.lock().seen.clone()
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Kept> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Keeps QEMU's last answer as it is.
    pub(super) fn keep_raw(&self, statistics: &Statistics) {
        self.lock().seen.raw = Some(statistics.raw.clone());
    }

    /// Adds a point, unless the last one is too near. A full list loses every other point, and takes them at twice the
    /// distance from then on.
    pub(super) fn add(&self, statistics: &Statistics, phase: Phase) {
        let mut kept = self.lock();
        let at_ms = u64::try_from(kept.began.elapsed().as_millis()).unwrap_or(u64::MAX);
        let last = kept.seen.samples.last();
        if last.is_some_and(|last| last.phase == phase && at_ms < last.at_ms + kept.distance_ms) {
            return;
        }
        if kept.seen.samples.len() >= SAMPLES_MAX {
            let mut number = 0_usize;
            kept.seen.samples.retain(|_| {
                number += 1;
                number % 2 == 1
            });
            kept.distance_ms *= 2;
        }
        let sample = sample(statistics, phase, at_ms);
        kept.seen.samples.push(sample);
    }
}

fn sample(statistics: &Statistics, phase: Phase, at_ms: u64) -> Sample {
    let ram = &statistics.ram;
    Sample {
        at_ms,
        phase,
        pass: ram.dirty_sync_count.unwrap_or(0),
        transferred_bytes: ram.transferred_bytes.unwrap_or(0),
        remaining_bytes: ram.remaining_bytes.unwrap_or(0),
        bits_per_s: bits_per_s(statistics),
        dirty_bytes_per_s: dirty_bytes_per_s(statistics),
        throttle_percent: statistics.cpu_throttle_percentage.unwrap_or(0),
    }
}

fn bits_per_s(statistics: &Statistics) -> u64 {
    statistics.ram.mbps.map_or(0, |mbps| (mbps * 1e6) as u64)
}

/// What the guest dirties in a second, as QEMU counts it.
pub(super) fn dirty_bytes_per_s(statistics: &Statistics) -> u64 {
    let ram = &statistics.ram;
    ram.dirty_pages_rate.unwrap_or(0).saturating_mul(ram.page_size_bytes.unwrap_or(4096))
}

/// QEMU's figures in the contract's words. `aim_ms`: the pause that QEMU is told to aim at now.
pub(super) fn progress(
    statistics: &Statistics,
    request: &OutgoingRequest,
    aim_ms: Option<u64>,
) -> Progress {
    let ram = &statistics.ram;
    Progress {
        ram_total_bytes: ram.total_bytes.unwrap_or(0),
        ram_remaining_bytes: ram.remaining_bytes.unwrap_or(0),
        transferred_bytes: ram.transferred_bytes.unwrap_or(0),
        zero_pages: ram.duplicate_pages.unwrap_or(0),
        normal_pages: ram.normal_pages.unwrap_or(0),
        passes: ram.dirty_sync_count.unwrap_or(0),
        dirty_pages_per_s: ram.dirty_pages_rate.unwrap_or(0),
        bits_per_s: bits_per_s(statistics),
        expected_downtime_ms: statistics.expected_downtime_ms,
        engine_total_ms: statistics.total_time_ms.unwrap_or(0),
        engine_setup_ms: statistics.setup_time_ms,
        destination_start_ms: Some(request.offer.start_ms),
        engine_downtime_ms: statistics.downtime_ms,
        engine_status: statistics
            .raw
            .get("status")
            .and_then(|word| word.as_str())
            .map(str::to_owned),
        normal_bytes: ram.normal_bytes,
        page_size_bytes: ram.page_size_bytes,
        pages_per_s: ram.pages_per_second,
        precopy_bytes: ram.precopy_bytes,
        downtime_bytes: ram.downtime_bytes,
        postcopy_bytes: ram.postcopy_bytes,
        postcopy_requests: ram.postcopy_requests,
        multifd_bytes: ram.multifd_bytes,
        missed_zero_copy_passes: ram.dirty_sync_missed_zero_copy,
        throttle_percent: statistics.cpu_throttle_percentage,
        aim_ms,
        dirty_limit_round_us: statistics.dirty_limit_throttle_time_per_round_us,
        dirty_limit_ring_full_us: statistics.dirty_limit_ring_full_time_us,
        xbzrle: statistics.xbzrle.as_ref().map(xbzrle),
        disks: Vec::new(),
    }
}

fn xbzrle(statistics: &XbzrleStatistics) -> XbzrleProgress {
    XbzrleProgress {
        cache_bytes: statistics.cache_bytes.unwrap_or(0),
        bytes: statistics.bytes.unwrap_or(0),
        pages: statistics.pages.unwrap_or(0),
        cache_misses: statistics.cache_misses.unwrap_or(0),
        cache_miss_rate: statistics.cache_miss_rate.unwrap_or(0.0),
        encoding_rate: statistics.encoding_rate.unwrap_or(0.0),
        overflows: statistics.overflows.unwrap_or(0),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_full_list_is_thinned_and_never_longer_than_said() {
        let samples = Samples::default();
        for number in 0..3 * SAMPLES_MAX {
            // Another phase each time: the distance is not waited for.
            let phase = if number % 2 == 0 { Phase::Precopy } else { Phase::Switchover };
            samples.add(&Statistics::default(), phase);
            assert!(samples.seen().samples.len() <= SAMPLES_MAX);
        }
        assert!(samples.seen().samples.len() > SAMPLES_MAX / 2);
        assert!(samples.lock().distance_ms > DISTANCE_MS);
    }

    #[test]
    fn a_point_too_near_is_left_out() {
        let samples = Samples::default();
        samples.add(&Statistics::default(), Phase::Precopy);
        samples.add(&Statistics::default(), Phase::Precopy);
        assert_eq!(samples.seen().samples.len(), 1);
    }
}
