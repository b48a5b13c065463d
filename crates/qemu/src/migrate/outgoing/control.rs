//! Orders for a migration that is under way: what it aims at, how fast it may be, and the turn to
//! post-copy. They are given beside whoever waits for the migration, and change nothing there but
//! what QEMU does.

use std::sync::Arc;

use serde_json::{Map, Value, json};
use tokio::sync::Mutex;

use super::super::settings::{LiveChange, MAX_DOWNTIME_MS_MAX, bandwidth, set_parameters};
use crate::machine::Machine;
use crate::qmp::QmpError;

/// The pause that is aimed at first, in milliseconds; see [`Aim`].
const FIRST_AIM_MS: u64 = 1;

/// The pause that QEMU is told to aim at (`downtime-limit`).
///
/// QEMU stops the guest as soon as it guesses that what is left can be sent within its limit: with 300 ms and a fast link
/// that is 100 MB of memory which an idle guest would have left in peace until it was sent. So the aim is short at first,
/// and doubles as long as further passes over the memory do not get there, up to what was asked for: a guest that writes
/// much is stopped when it would have been anyway, some short passes later.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Aim {
    now_ms: u64,
    most_ms: u64,
    /// The passes that had begun when the aim was last looked at.
    passes: u64,
}

impl Aim {
    fn first(most_ms: u64) -> Self {
        let most_ms = most_ms.min(MAX_DOWNTIME_MS_MAX);
        // The first pass sends everything, and says nothing of the guest.
        Self { now_ms: most_ms.min(FIRST_AIM_MS), most_ms, passes: 1 }
    }

    /// The aim when so many passes have begun: longer if there was a further one.
    fn after(self, passes: u64) -> Self {
        let now_ms = if passes > self.passes { self.now_ms * 2 } else { self.now_ms };
        Self { now_ms: now_ms.min(self.most_ms), passes: passes.max(self.passes), ..self }
    }

    /// The aim under another limit. One that had come to the old limit goes to the new one at
    /// once: its guest has been seen to write faster than that. So does every one where the new
    /// limit is the longest there is: it is to end now.
    fn within(self, most_ms: u64) -> Self {
        let most_ms = most_ms.min(MAX_DOWNTIME_MS_MAX);
        let at_once = self.now_ms == self.most_ms || most_ms == MAX_DOWNTIME_MS_MAX;
        let now_ms = if at_once { most_ms } else { self.now_ms.min(most_ms) };
        Self { now_ms, most_ms, ..self }
    }
}

/// A handle for orders; clones speak of the same migration.
#[derive(Debug, Clone)]
pub struct Control {
    machine: Machine,
    /// `None` for a migration that was taken up: it keeps the aim that it has. Held while QEMU is
    /// told, so that what it was told last is what stands here.
    aim: Arc<Mutex<Option<Aim>>>,
}

impl Control {
    /// For a migration that was taken up, or one on which nobody waits.
    #[must_use]
    pub fn of(machine: &Machine) -> Self {
        Self { machine: machine.clone(), aim: Arc::default() }
    }

    /// For a migration that is to begin; puts the first aim into its parameters.
    pub(super) fn aiming(
        machine: &Machine,
        most_ms: u64,
        parameters: &mut Map<String, Value>,
    ) -> Self {
        let aim = Aim::first(most_ms);
        parameters.insert("downtime-limit".to_owned(), json!(aim.now_ms));
        Self { machine: machine.clone(), aim: Arc::new(Mutex::new(Some(aim))) }
    }

    /// The pause that QEMU is told to aim at now, in milliseconds; `None` for a migration that was taken up, and in the
    /// moment of a change.
    #[must_use]
    pub fn aim_ms(&self) -> Option<u64> {
        self.aim.try_lock().ok()?.map(|aim| aim.now_ms)
    }

    /// Changes limits. Before the first pass over the memory is done, a longer downtime is only
    /// what will be aimed at in the end; but the longest there is ([`MAX_DOWNTIME_MS_MAX`], to
    /// which longer ones are cut) stops the guest at the next look.
    ///
    /// # Errors
    ///
    /// [`QmpError`]: refused for a number that QEMU does not take; nothing was changed then.
    pub async fn set_live(&self, change: &LiveChange) -> Result<(), QmpError> {
        let mut parameters = Map::new();
        let mut set = |name: &str, value: Value| parameters.insert(name.to_owned(), value);
        if let Some(limit) = change.max_bandwidth_bytes_per_second {
            set("max-bandwidth", bandwidth(limit));
        }
        if let Some(limit) = change.max_postcopy_bandwidth_bytes_per_second {
            set("max-postcopy-bandwidth", json!(limit));
        }
        if let Some(throttle) = change.throttle {
            throttle.parameters(&mut parameters);
        }
        let mut aim = self.aim.lock().await;
        let mut set = |name: &str, value: Value| parameters.insert(name.to_owned(), value);
        let next = change.max_downtime_ms.map(|most_ms| {
            let next = aim.map(|aim| aim.within(most_ms));
            let now_ms = next.map_or(most_ms.min(MAX_DOWNTIME_MS_MAX), |aim| aim.now_ms);
            set("downtime-limit", json!(now_ms));
            next
        });
        if parameters.is_empty() {
            return Ok(());
        }
        set_parameters(&self.machine, parameters).await?;
        if let Some(next) = next {
            *aim = next;
        }
        Ok(())
    }

    /// Turns to post-copy: at the next look QEMU stops the guest, whatever is left, and waits at
    /// pre-switchover. Refused unless the migration was begun with post-copy; without effect once
    /// pre-switchover has been reached without it.
    ///
    /// # Errors
    ///
    /// [`QmpError`].
    pub async fn start_postcopy(&self) -> Result<(), QmpError> {
        // Before it is asked: without an answer it may have been heard.
        self.machine.note_postcopy(true);
        let ordered = self.machine.order("migrate-start-postcopy", Value::Null).await;
        if ordered.as_ref().is_err_and(QmpError::is_refusal) {
            self.machine.note_postcopy(false);
        }
        ordered
    }

    /// Tells QEMU a longer pause if a further pass over the memory has begun. Where it does not
    /// hear that, it is told at the next look; why, the next question tells.
    pub(super) async fn adjust(&self, passes: u64) {
        let mut held = self.aim.lock().await;
        let Some(aim) = *held else { return };
        let next = aim.after(passes);
        let mut parameters = Map::new();
        parameters.insert("downtime-limit".to_owned(), json!(next.now_ms));
        if next.now_ms != aim.now_ms
            && let Err(error) = set_parameters(&self.machine, parameters).await
        {
            tracing::debug!(%error, "QEMU did not take a longer pause");
            return;
        }
        *held = Some(next);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_aim_grows_with_the_passes_and_not_beyond_what_was_asked_for() {
        let aims = |most_ms, passes: &[u64]| {
            let mut aim = Aim::first(most_ms);
            let mut aims = vec![aim.now_ms];
            aims.extend(passes.iter().map(|passes| {
                aim = aim.after(*passes);
                aim.now_ms
            }));
            aims
        };
        let passes = [0, 1, 1, 2, 2, 5, 6, 7, 8, 9, 10];
        assert_eq!(aims(300, &passes), [1, 1, 1, 1, 2, 2, 4, 8, 16, 32, 64, 128]);
        assert_eq!(aims(3, &[2, 3, 4]), [1, 2, 3, 3]);
        assert_eq!(aims(1, &[2, 3]), [1, 1, 1]);
        assert_eq!(aims(0, &[2]), [0, 0]);
    }

    #[test]
    fn another_limit_is_taken_at_once_by_an_aim_that_had_come_to_the_old_one() {
        let reached = Aim { now_ms: 300, most_ms: 300, passes: 12 };
        assert_eq!(reached.within(2000), Aim { now_ms: 2000, most_ms: 2000, passes: 12 });
        assert_eq!(reached.within(10), Aim { now_ms: 10, most_ms: 10, passes: 12 });
        let under_way = Aim { now_ms: 4, most_ms: 300, passes: 4 };
        assert_eq!(under_way.within(2000), Aim { now_ms: 4, most_ms: 2000, passes: 4 });
        let most_ms = MAX_DOWNTIME_MS_MAX;
        assert_eq!(under_way.within(u64::MAX), Aim { now_ms: most_ms, most_ms, passes: 4 });
        assert_eq!(under_way.within(2), Aim { now_ms: 2, most_ms: 2, passes: 4 });
    }
}
