//! Mirrors: a disk copied while the guest writes to it, to another host or to another file here.
//!
//! Seen on 7.2.22 and 10.0.2:
//!
//! - What the guest writes meanwhile is remembered and copied again; it never waits for the target. From
//!   [`write_blocking`] on (10.0) each write goes to both before the guest has its answer, so that nothing is
//!   left to copy however much it writes; it waits for a target that hangs, then. There is no way back.
//! - A target that can not be written (lost, full) stops the mirror, which stays `paused`, or `standby` if it was
//!   ready; the guest notices nothing. A source that can not be read ends it with an error.
//! - A target of another size ends it with an error, at once.
//! - A mirror that is ready and has nothing to write does not see that its connection is gone: [`settle`] does,
//!   because the target is flushed before the end.
//! - To end a ready mirror (`block-job-cancel`) writes what is left, flushes the target, and concludes without an
//!   error. **The same command to one that is not ready gives it up**, which concludes with an error, as
//!   giving up a ready one by force does. One that stands still is refused.
//! - While QEMU drains requests a mirror is `paused` or `standby` for an instant, without any error.

use std::time::Duration;

use serde_json::json;
use tokio::time::{Instant, sleep};

use super::jobs::{self, Job, JobError, JobStatus, Progress};
use super::{nodes, target};
use crate::machine::Machine;
use crate::qmp::QmpError;

/// Pause between two orders to a mirror that QEMU holds for an instant.
const RETRY_MILLISECONDS: u64 = 5;

/// A mirror to be begun. Its job has the disk's name.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MirrorSettings {
    /// The disk's name.
    pub disk: String,
    /// What its drive uses now ([`nodes::Drive::node`]).
    pub source: String,
    /// The node to copy to, of the same size, used by nobody else: [`target::node_name`] or one added by
    /// [`nodes::add_image`].
    pub target: String,
    /// How much of it.
    pub extent: Extent,
    /// Whether the guest's writes wait for the target from the beginning.
    pub write_blocking: bool,
    /// The most that is copied, in bytes per second; 0 is no limit.
    pub max_bytes_per_second: u64,
}

/// How much of a disk is copied.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Extent {
    /// All of it.
    Whole,
    /// Its topmost layer: the target must stand on the same.
    TopLayer,
}

/// Where a mirror stands.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Standing {
    /// It copies.
    Copying(Progress),
    /// The target has all but what the guest has just written.
    Ready {
        /// How far; what is left is what has just been written.
        progress: Progress,
        /// Whether nothing is left, and nothing will be (10.0, after [`write_blocking`]).
        in_step: bool,
    },
    /// The target can not be written. What is missing there is known; see [`resume`].
    Held {
        /// How far it got.
        progress: Progress,
        /// Whether it had been ready.
        was_ready: bool,
        /// What holds it.
        obstacle: jobs::Obstacle,
    },
    /// It ended well: [`settle`] was called before (and interrupted).
    Settled,
    /// It ended, or was given up: the target is of no use.
    Failed {
        /// QEMU's text.
        reason: String,
    },
    /// There is none, so that nothing is known of the target.
    None,
}

/// Begins a mirror.
///
/// # Errors
///
/// [`JobError::Begin`]. A target of another size is seen only later ([`Standing::Failed`]).
pub async fn start(machine: &Machine, settings: &MirrorSettings) -> Result<(), JobError> {
    let sync = match settings.extent {
        Extent::Whole => "full",
        Extent::TopLayer => "top",
    };
    let copy_mode = if settings.write_blocking { "write-blocking" } else { "background" };
    let arguments = json!({
        "job-id": settings.disk, "device": settings.source, "target": settings.target,
        "sync": sync, "copy-mode": copy_mode, "speed": settings.max_bytes_per_second,
        "on-source-error": "report", "on-target-error": "stop",
        "auto-finalize": true, "auto-dismiss": false,
    });
    let begin = |source| JobError::Begin { id: settings.disk.clone(), source };
    machine.order("blockdev-mirror", arguments).await.map_err(begin)
}

/// Where the mirror of a disk stands.
///
/// # Errors
///
/// [`QmpError`].
pub async fn standing(machine: &Machine, disk: &str) -> Result<Standing, QmpError> {
    Ok(jobs::find(machine, disk).await?.map_or(Standing::None, |job| standing_of(&job)))
}

fn standing_of(job: &Job) -> Standing {
    let progress = job.progress;
    let in_step = job.actively_synced == Some(true) && progress.remaining() == 0;
    match (&job.status, &job.error, job.obstacle) {
        (_, Some(reason), _) => Standing::Failed { reason: reason.clone() },
        (JobStatus::Concluded, None, _) => Standing::Settled,
        (JobStatus::Paused, None, Some(obstacle)) => {
            Standing::Held { progress, was_ready: false, obstacle }
        }
        (JobStatus::Standby, None, Some(obstacle)) => {
            Standing::Held { progress, was_ready: true, obstacle }
        }
        // On its way to the end: what the end is, the next look tells.
        (
            JobStatus::Ready | JobStatus::Standby | JobStatus::Waiting | JobStatus::Pending,
            None,
            _,
        ) => Standing::Ready { progress, in_step },
        _ => Standing::Copying(progress),
    }
}

/// Waits until the mirror of a disk is ready (or settled). Cancellation safe; may be called again.
///
/// # Errors
///
/// [`JobError`]; after `Held` (see [`resume`]) and `TookTooLong` it is still there.
pub async fn wait_ready(machine: &Machine, disk: &str, within: Duration) -> Result<(), JobError> {
    let ready = |job: &Job| matches!(standing_of(job), Standing::Ready { .. } | Standing::Settled);
    jobs::reach(machine, disk, ready, within).await.map(drop)
}

/// Lets a mirror go on that was held. For a target on another host [`target::Remote::reach`] must have
/// succeeded before.
///
/// # Errors
///
/// [`QmpError`]; refused where it is not held.
pub async fn resume(machine: &Machine, disk: &str) -> Result<(), QmpError> {
    machine.order("block-job-resume", json!({ "device": disk })).await
}

/// From now on the guest's writes go to the target, too, before it has its answer. Only where
/// [`mirror_mode_changes`](crate::schema::Features::mirror_mode_changes).
///
/// # Errors
///
/// [`QmpError`].
pub async fn write_blocking(machine: &Machine, disk: &str) -> Result<(), QmpError> {
    let arguments = json!({ "id": disk, "type": "mirror", "copy-mode": "write-blocking" });
    machine.order("block-job-change", arguments).await
}

/// Limits a mirror, in bytes per second; 0 is no limit.
///
/// # Errors
///
/// [`QmpError`].
pub async fn set_speed(machine: &Machine, disk: &str, limit: u64) -> Result<(), QmpError> {
    machine.order("block-job-set-speed", json!({ "device": disk, "speed": limit })).await
}

/// Ends mirrors that are ready, the guest being stopped: afterwards every target equals its source, and is durable.
/// Bounded by `within`, all together.
///
/// # Errors
///
/// [`JobError`] of the first that did not; the targets are of no use then, and [`abandon`] clears away what is
/// left. A session that was interrupted can be taken up by calling this again.
pub async fn settle(machine: &Machine, disks: &[String], within: Duration) -> Result<(), JobError> {
    let until = Instant::now() + within;
    for disk in disks {
        end_when_ready(machine, disk, until, within).await?;
    }
    for disk in disks {
        let concluded = |job: &Job| job.status == JobStatus::Concluded;
        let left = until.saturating_duration_since(Instant::now());
        jobs::reach(machine, disk, concluded, left).await.and_then(without_error)?;
    }
    // Only now: until here each can be asked again.
    for disk in disks {
        let query = |source| JobError::Query { id: disk.clone(), source };
        jobs::dismiss(machine, disk).await.map_err(query)?;
    }
    Ok(())
}

fn without_error(job: Job) -> Result<(), JobError> {
    match job.error {
        None => Ok(()),
        Some(reason) => Err(JobError::Failed { id: job.id, reason }),
    }
}

/// Orders the end of one mirror, but only of one that is ready: any other would be given up by it.
async fn end_when_ready(
    machine: &Machine,
    disk: &str,
    until: Instant,
    within: Duration,
) -> Result<(), JobError> {
    loop {
        let id = || disk.to_owned();
        let found = jobs::find(machine, disk).await;
        let job = found.map_err(|source| JobError::Query { id: id(), source })?;
        let job = job.ok_or_else(|| JobError::Vanished { id: id() })?;
        match standing_of(&job) {
            Standing::Settled => return Ok(()),
            Standing::Failed { reason } => return Err(JobError::Failed { id: id(), reason }),
            Standing::Held { obstacle, .. } => return Err(JobError::Held { id: id(), obstacle }),
            _ if matches!(job.status, JobStatus::Waiting | JobStatus::Pending) => return Ok(()),
            _ if job.status == JobStatus::Ready => {
                match machine.order("block-job-cancel", json!({ "device": disk })).await {
                    Ok(()) => return Ok(()),
                    // Held between the question and the order.
                    Err(error) if error.is_refusal() => {}
                    Err(source) => return Err(JobError::Query { id: id(), source }),
                }
            }
            _ => {}
        }
        if Instant::now() >= until {
            return Err(JobError::TookTooLong { id: id(), status: job.status, after: within });
        }
        sleep(Duration::from_millis(RETRY_MILLISECONDS)).await;
    }
}

/// Lets the drive use the target instead of the source, without a pause: for a target on this host. Afterwards
/// the source's node is left, used by nobody ([`nodes::remove`]).
///
/// # Errors
///
/// [`JobError`]. After `Failed` the drive uses what it used; after `TookTooLong` and `Query`,
/// [`nodes::drives`] tells which it is.
pub async fn pivot(machine: &Machine, disk: &str, within: Duration) -> Result<(), JobError> {
    wait_ready(machine, disk, within).await?;
    let query = |source| JobError::Query { id: disk.to_owned(), source };
    let begin = |source| JobError::Begin { id: disk.to_owned(), source };
    // It may have been told by a call that was interrupted.
    if matches!(standing(machine, disk).await.map_err(query)?, Standing::Ready { .. }) {
        machine.order("job-complete", json!({ "id": disk })).await.map_err(begin)?;
    }
    jobs::finish(machine, disk, within).await
}

/// Gives up mirrors, whatever they do, and lets go of their targets on other hosts. The guest is not touched, and
/// goes on with the source. One that is not there, or has ended, is no error. Bounded by `within`, each.
///
/// A target's node on this host stays ([`nodes::remove`]).
///
/// # Errors
///
/// [`JobError`] of the first that could not be ended; the others have been tried.
pub async fn abandon(
    machine: &Machine,
    disks: &[String],
    within: Duration,
) -> Result<(), JobError> {
    let mut first = Ok(());
    for disk in disks {
        let ended = abandon_one(machine, disk, within).await;
        if first.is_ok() {
            first = ended;
        }
    }
    first
}

async fn abandon_one(machine: &Machine, disk: &str, within: Duration) -> Result<(), JobError> {
    let query = |source| JobError::Query { id: disk.to_owned(), source };
    // First of all what QEMU may be waiting for: with it the requests of a lost target fail at once.
    match target::yank(machine, disk).await {
        Err(error) if !error.is_refusal() => return Err(query(error)),
        _ => {}
    }
    let arguments = json!({ "device": disk, "force": true });
    match machine.order("block-job-cancel", arguments).await {
        // There is none, or it is at its end.
        Err(error) if !error.is_refusal() => return Err(query(error)),
        _ => {}
    }
    let until = Instant::now() + within;
    let mut events = machine.events();
    loop {
        match jobs::find(machine, disk).await.map_err(query)? {
            None => break,
            Some(job) if job.status == JobStatus::Concluded => {
                jobs::dismiss(machine, disk).await.map_err(query)?;
                break;
            }
            Some(job) if Instant::now() >= until => {
                let id = disk.to_owned();
                return Err(JobError::TookTooLong { id, status: job.status, after: within });
            }
            Some(_) => jobs::next_change(&mut events, until).await,
        }
    }
    nodes::remove(machine, &target::node_name(disk)).await.map_err(query)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::disks::jobs::Obstacle;

    fn job(status: JobStatus, error: Option<&str>, obstacle: Option<Obstacle>) -> Job {
        Job {
            id: "vda".to_owned(),
            kind: "mirror".to_owned(),
            status,
            progress: Progress { done: 1, total: 1 },
            error: error.map(str::to_owned),
            obstacle,
            actively_synced: Some(true),
        }
    }

    #[test]
    fn a_mirror_held_by_an_error_is_told_from_one_that_is_drained() {
        let drained = job(JobStatus::Standby, None, None);
        assert!(matches!(standing_of(&drained), Standing::Ready { in_step: true, .. }));
        let held = job(JobStatus::Standby, None, Some(Obstacle::Failed));
        assert!(matches!(standing_of(&held), Standing::Held { was_ready: true, .. }));
        let drained = job(JobStatus::Paused, None, None);
        assert!(matches!(standing_of(&drained), Standing::Copying(_)));
        let held = job(JobStatus::Paused, None, Some(Obstacle::NoSpace));
        assert!(matches!(standing_of(&held), Standing::Held { was_ready: false, .. }));
    }

    #[test]
    fn only_a_conclusion_without_an_error_is_good() {
        let bad = job(JobStatus::Concluded, Some("Operation canceled"), None);
        assert!(matches!(standing_of(&bad), Standing::Failed { .. }));
        assert_eq!(standing_of(&job(JobStatus::Concluded, None, None)), Standing::Settled);
        let unknown = job(JobStatus::Unknown("dreaming".to_owned()), None, None);
        assert!(matches!(standing_of(&unknown), Standing::Copying(_)));
        assert!(without_error(bad).is_err());
    }
}
