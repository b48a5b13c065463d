//! What copying disks takes, before it starts: time, bytes, whether it gets to its end; and when memory is to begin.
//!
//! All mirrors of a move share one way. They send what is allocated, and again what the guest writes meanwhile:
//! ```text
//!   to send  ^
//!            |\             link - writes
//!            | \  .........  memory begins: from here on they share the link,
//!            |  \___              and both come to their end together
//!            +-------\------> time
//! ```
//! **Reckoned**: that the guest goes on writing as measured, and that every write has to be sent again (one that hits what was not
//! sent yet has not: so it is rather less). **Not known**: what the storages at both ends carry; whoever has measured that
//! says the least of the three as [`Way::bytes_per_s`]. No clock: times are results.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::forecast::{Convergence, MARGIN_PERCENT};

/// What the mirrors keep of the way, however fast the guest writes, where its writes wait for the destination
/// (`write-blocking`): the rest is the guest's.
const BLOCKING_SHARE: f64 = 0.5;

/// A disk to copy.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct DiskMeasure {
    /// Bytes that have to be sent: what is allocated, without layers that the destination holds.
    pub bytes: u64,
    /// Bytes that the guest writes in a second.
    pub write_bytes_per_s: u64,
}

/// The way of the disks' data.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Way {
    /// Payload that it carries, in bytes a second.
    pub bytes_per_s: f64,
    /// It is memory's way as well.
    pub shared_with_memory: bool,
    /// Towards the end the guest's writes wait until they are on both sides (QEMU's `write-blocking`, switched to while
    /// it runs: from 8.2 on).
    pub blocking: bool,
}

/// What memory alone takes.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Memory {
    /// From its first byte to the switchover with the whole way, in milliseconds; none if it does not end.
    pub total_ms: Option<f64>,
}

/// What copying the disks of a VM takes.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct DiskForecast {
    /// Whether it gets to its end by itself.
    pub convergence: Convergence,
    /// How far from the limit, in percent of the rate at which the guest writes; below 0 it must write less. None where
    /// it does not write, or its writes are made to wait.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub margin_percent: Option<f64>,
    /// Bytes that have to be sent at least.
    pub bytes: u64,
    /// Bytes on the wire, those that are sent again included. None if it does not end.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub wire_bytes: Option<u64>,
    /// Until every mirror is ready, in milliseconds, memory on the same way included. None if it does not end.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ready_ms: Option<f64>,
    /// When memory begins, in milliseconds after the mirrors. None if one of the two does not end.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub memory_starts_ms: Option<f64>,
    /// How much the mirrors still have to send at that moment, in bytes: the agent begins with memory at this mark,
    /// whatever the clock says. None if memory does not end: then it waits for the mirrors.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub memory_starts_at_bytes: Option<u64>,
}

impl DiskForecast {
    /// Whether memory is to begin now, with so much of the disks still to be sent.
    #[must_use]
    pub fn memory_starts(&self, remaining_bytes: u64) -> bool {
        remaining_bytes <= self.memory_starts_at_bytes.unwrap_or(0)
    }
}

/// Looks ahead. Without disks there is nothing to foretell.
#[must_use]
pub fn forecast(disks: &[DiskMeasure], way: Way, memory: Memory) -> Option<DiskForecast> {
    if disks.is_empty() {
        return None;
    }
    let sum = |of: fn(&DiskMeasure) -> u64| disks.iter().map(of).fold(0, u64::saturating_add);
    let (bytes, writes) = (sum(|disk| disk.bytes), sum(|disk| disk.write_bytes_per_s) as f64);
    let alone = Rate::of(way.bytes_per_s, writes, way.blocking);
    let (convergence, margin_percent) = convergence(way, writes);
    // While both are sent each gets half, and memory alone knows how long it takes with all.
    let share = if way.shared_with_memory { 0.5 } else { 1.0 };
    let beside = Rate::of(way.bytes_per_s * share, writes, way.blocking);
    let memory_s = memory.total_ms.map(|ms| ms / share / 1e3);
    let mark = memory_s.map(|seconds| (beside.gain * seconds).clamp(0.0, bytes as f64));
    let first_s = mark.and_then(|mark| alone.seconds(bytes as f64 - mark));
    // Without memory's end both are ready when the disks are, and memory begins then.
    let ready_s = match (mark, first_s) {
        (Some(mark), Some(first)) => beside.seconds(mark).map(|second| first + second),
        _ => alone.seconds(bytes as f64),
    };
    let wire_bytes = ready_s.map(|seconds| {
        let again = if way.blocking { 0.0 } else { writes * seconds };
        (bytes as f64 + again).round() as u64
    });
    Some(DiskForecast {
        convergence,
        margin_percent,
        bytes,
        wire_bytes,
        ready_ms: ready_s.map(|seconds| seconds * 1e3),
        memory_starts_ms: first_s.map(|seconds| seconds * 1e3),
        memory_starts_at_bytes: mark.filter(|_| ready_s.is_some()).map(|bytes| bytes as u64),
    })
}

/// How fast what is left becomes less.
struct Rate {
    /// In bytes a second; 0 if it does not.
    gain: f64,
}

impl Rate {
    fn of(bytes_per_s: f64, writes: f64, blocking: bool) -> Self {
        let least = if blocking { bytes_per_s * BLOCKING_SHARE } else { 0.0 };
        let gain = (bytes_per_s - writes).max(least).max(0.0);
        Self { gain: if gain.is_finite() { gain } else { 0.0 } }
    }

    fn seconds(&self, bytes: f64) -> Option<f64> {
        if bytes <= 0.0 {
            return Some(0.0);
        }
        (self.gain > 0.0).then(|| bytes / self.gain)
    }
}

fn convergence(way: Way, writes: f64) -> (Convergence, Option<f64>) {
    if way.bytes_per_s <= 0.0 || !way.bytes_per_s.is_finite() {
        return (Convergence::No, None);
    }
    if writes <= 0.0 || way.blocking {
        return (Convergence::Yes, None);
    }
    let margin = (way.bytes_per_s / writes - 1.0) * 100.0;
    let found = if margin >= MARGIN_PERCENT {
        Convergence::Yes
    } else if margin >= 0.0 {
        Convergence::Marginal
    } else {
        Convergence::No
    };
    (found, Some(margin.min(crate::forecast::MARGIN_MAX_PERCENT)))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const MIB: u64 = 1 << 20;
    const GIB: u64 = 1 << 30;
    const GBIT: f64 = 117e6;

    fn disk(bytes: u64, write_bytes_per_s: u64) -> DiskMeasure {
        DiskMeasure { bytes, write_bytes_per_s }
    }

    fn way(bytes_per_s: f64) -> Way {
        Way { bytes_per_s, shared_with_memory: true, blocking: false }
    }

    fn near(found: Option<f64>, expected: f64) {
        let found = found.unwrap();
        assert!((found - expected).abs() <= expected.abs() * 0.01 + 1.0, "{found} {expected}");
    }

    #[test]
    fn without_writes_and_memory_it_takes_bytes_by_rate() {
        let memory = Memory { total_ms: Some(0.0) };
        let told = forecast(&[disk(GIB, 0), disk(GIB, 0)], way(GBIT), memory).unwrap();
        near(told.ready_ms, 2.0 * GIB as f64 / GBIT * 1e3);
        assert_eq!((told.bytes, told.wire_bytes), (2 * GIB, Some(2 * GIB)));
        assert_eq!((told.convergence, told.margin_percent), (Convergence::Yes, None));
        assert_eq!(told.memory_starts_ms, told.ready_ms);
        assert!(told.memory_starts(0) && !told.memory_starts(1));
        assert_eq!(forecast(&[], way(GBIT), memory), None);
    }

    #[test]
    fn memory_begins_so_that_both_end_together() {
        let memory = Memory { total_ms: Some(5_000.0) };
        let told = forecast(&[disk(4 * GIB, 30 * MIB)], way(GBIT), memory).unwrap();
        let (start, ready) = (told.memory_starts_ms.unwrap(), told.ready_ms.unwrap());
        // On half of the way it takes ten seconds.
        near(Some(ready - start), 10_000.0);
        let mark = told.memory_starts_at_bytes.unwrap();
        near(Some(mark as f64), (GBIT / 2.0 - 30.0 * MIB as f64) * 10.0);
        assert!(told.memory_starts(mark) && !told.memory_starts(mark + 1));
        // On ways of their own neither slows the other down.
        let apart = Way { shared_with_memory: false, ..way(GBIT) };
        let told = forecast(&[disk(4 * GIB, 30 * MIB)], apart, memory).unwrap();
        near(told.ready_ms.zip(told.memory_starts_ms).map(|(end, start)| end - start), 5_000.0);
    }

    #[test]
    fn small_disks_let_memory_begin_at_once() {
        let memory = Memory { total_ms: Some(20_000.0) };
        let told = forecast(&[disk(64 * MIB, 0)], way(GBIT), memory).unwrap();
        assert_eq!(told.memory_starts_ms, Some(0.0));
        assert!(told.memory_starts(64 * MIB));
    }

    #[test]
    fn a_guest_that_writes_faster_than_the_way_carries_needs_blocking() {
        let memory = Memory { total_ms: Some(1_000.0) };
        let told = forecast(&[disk(GIB, 200 * MIB)], way(GBIT), memory).unwrap();
        assert_eq!(told.convergence, Convergence::No);
        assert!(told.margin_percent.unwrap() < 0.0);
        assert_eq!(
            (told.ready_ms, told.wire_bytes, told.memory_starts_at_bytes),
            (None, None, None)
        );
        let blocking = Way { blocking: true, ..way(GBIT) };
        let told = forecast(&[disk(GIB, 200 * MIB)], blocking, memory).unwrap();
        assert_eq!(told.convergence, Convergence::Yes);
        assert!(told.ready_ms.is_some() && told.memory_starts_ms.is_some());
        let close = forecast(&[disk(GIB, 110_000_000)], way(GBIT), memory).unwrap();
        assert_eq!(close.convergence, Convergence::Marginal);
        let dead = forecast(&[disk(GIB, 0)], way(0.0), memory).unwrap();
        assert_eq!((dead.convergence, dead.ready_ms), (Convergence::No, None));
    }

    #[test]
    fn memory_that_does_not_end_waits_for_the_disks() {
        let told = forecast(&[disk(GIB, 0)], way(GBIT), Memory { total_ms: None }).unwrap();
        near(told.ready_ms, GIB as f64 / GBIT * 1e3);
        assert_eq!((told.memory_starts_ms, told.memory_starts_at_bytes), (None, None));
        assert!(told.memory_starts(0) && !told.memory_starts(1));
    }

    proptest! {
        #[test]
        fn more_to_send_never_takes_less(
            bytes in 0_u64..1 << 44, more in 0_u64..1 << 40, writes in 0_u64..1 << 30,
            rate in 1e5..1e10_f64, memory_ms in 0.0..1e7_f64, shared: bool, blocking: bool,
        ) {
            let way = Way { bytes_per_s: rate, shared_with_memory: shared, blocking };
            let memory = Memory { total_ms: Some(memory_ms) };
            let less = forecast(&[disk(bytes, writes)], way, memory).unwrap();
            let more = forecast(&[disk(bytes + more, writes)], way, memory).unwrap();
            prop_assert_eq!(less.ready_ms.is_some(), more.ready_ms.is_some() || bytes == 0 && less.ready_ms.is_some());
            if let (Some(less), Some(more)) = (less.ready_ms, more.ready_ms) {
                prop_assert!(less <= more * (1.0 + 1e-9) + 1e-6);
            }
            if let (Some(start), Some(ready)) = (more.memory_starts_ms, more.ready_ms) {
                prop_assert!(start >= 0.0 && start <= ready && more.wire_bytes >= Some(more.bytes));
            }
            prop_assert!(more.memory_starts(0));
        }
    }
}
