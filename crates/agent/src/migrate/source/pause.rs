//! The moments of the guest's pause, and what they add up to. Figures only; nothing is decided by them.

use std::time::{SystemTime, UNIX_EPOCH};

use whimbrel_api::Downtime;
use whimbrel_api::agent::Resumed;

/// The moments, in microseconds since 1970 by this host's clock: one clock for all, as QEMU stamps its STOP event with it.
#[derive(Debug, Default)]
pub(super) struct Pause {
    /// The guest stood still.
    pub(super) stopped: Option<u64>,
    /// QEMU had sent everything.
    pub(super) completed: Option<u64>,
    /// The destination had said that it holds everything.
    pub(super) confirmed: Option<u64>,
    /// The release was on the disk.
    pub(super) released: Option<u64>,
}

impl Pause {
    /// The pause by its parts, now that the destination has said that the guest runs there; `None` if the agent was
    /// restarted in between, so that not all moments are known.
    pub(super) fn over(&self, resumed: Option<Resumed>) -> Option<Downtime> {
        let now = now_us().saturating_sub(resumed.map_or(0, |resumed| resumed.since_resume_us));
        let (stopped, completed, released) = (self.stopped?, self.completed?, self.released?);
        let confirmed = self.confirmed.unwrap_or(completed).max(completed);
        Some(Downtime {
            stop_to_completed_us: completed.saturating_sub(stopped),
            loaded_confirm_us: confirmed.saturating_sub(completed),
            release_us: released.saturating_sub(confirmed),
            go_us: now.saturating_sub(released),
            total_us: now.saturating_sub(stopped),
            stopped_at_us: Some(stopped),
            resumed_at_us: resumed.map(|resumed| resumed.resume_at_us).filter(|at| *at > 0),
        })
    }
}

/// This moment, in microseconds since 1970.
pub(super) fn now_us() -> u64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(now.as_micros()).unwrap_or(u64::MAX)
}
