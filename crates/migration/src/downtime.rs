//! The downtime of a migration by its named parts: which part to improve is then no guess.
//!
//! Only the type; the source agent fills it in, from QEMU's STOP and RESUME events and its own
//! monotonic clock. The parts follow one another without gaps on the source's clock, except that
//! `go` ends with the destination's RESUME, which is known to the source from the round trip.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// How long the guest stood still, in microseconds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize, ToSchema)]
pub struct Downtime {
    /// The source's STOP until the source's QEMU says `completed`: the last pass over memory and
    /// the state of the devices.
    pub stop_to_completed_us: u64,
    /// `completed` until the destination has confirmed that it holds the whole state.
    pub loaded_confirm_us: u64,
    /// Writing the release to the source's disk (fsync).
    pub release_us: u64,
    /// GO sent until the guest runs on the destination, whose own fsync is in it.
    pub go_us: u64,
    /// The source's STOP until the destination's RESUME.
    pub total_us: u64,
    /// QEMU's own stamp of the source's STOP: microseconds since 1970 by the source's wall clock.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub stopped_at_us: Option<u64>,
    /// QEMU's own stamp of the destination's RESUME, by the destination's wall clock. Comparable with
    /// the other only as far as the two clocks agree; none if the event was missed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub resumed_at_us: Option<u64>,
}

impl Downtime {
    /// What of the total no named part accounts for, in microseconds.
    #[must_use]
    pub const fn unnamed_us(&self) -> u64 {
        self.total_us
            .saturating_sub(self.stop_to_completed_us)
            .saturating_sub(self.loaded_confirm_us)
            .saturating_sub(self.release_us)
            .saturating_sub(self.go_us)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_and_rest() {
        let mut downtime = Downtime {
            stop_to_completed_us: 5_000,
            loaded_confirm_us: 500,
            release_us: 1_000,
            go_us: 2_500,
            total_us: 9_100,
            ..Downtime::default()
        };
        assert_eq!(downtime.unnamed_us(), 100);
        downtime.total_us = 10;
        assert_eq!(downtime.unnamed_us(), 0);
    }
}
