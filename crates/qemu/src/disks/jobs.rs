//! Block jobs: how far they are, how they ended, and how they are told to go away. Which job is
//! wanted is the business of the rooms beside this one.
//!
//! Every job here is begun with `auto-dismiss` off: it stays `concluded` until [`dismiss`], so that its error
//! can be read. A job that is not there any more has therefore been dismissed by somebody, or never was.

use std::time::Duration;

use serde_json::{Value, json};
use tokio::time::{Instant, timeout_at};

use crate::event::{EventError, EventKind, Events};
use crate::machine::Machine;
use crate::qmp::QmpError;

/// Pause between two questions when no event comes.
const POLL_MILLISECONDS: u64 = 100;

/// The states of a job (7.2, 10.0).
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum JobStatus {
    /// Made, not begun.
    Created,
    /// At work.
    Running,
    /// Stopped before it was ready: by an error, or for an instant by QEMU itself.
    Paused,
    /// A mirror or commit that has caught up, and follows.
    Ready,
    /// Stopped after it was ready.
    Standby,
    /// Waits for others.
    Waiting,
    /// Done, waits to be finalized.
    Pending,
    /// Failed or cancelled, not yet at its end.
    Aborting,
    /// At its end: with an error or without.
    Concluded,
    /// Gone.
    Null,
    /// A state that we do not know.
    Unknown(String),
}

impl JobStatus {
    fn from_wire(word: &str) -> Self {
        match word {
            "created" => Self::Created,
            "running" => Self::Running,
            "paused" => Self::Paused,
            "ready" => Self::Ready,
            "standby" => Self::Standby,
            "waiting" => Self::Waiting,
            "pending" => Self::Pending,
            "aborting" => Self::Aborting,
            "concluded" => Self::Concluded,
            "null" => Self::Null,
            other => Self::Unknown(other.to_owned()),
        }
    }

    /// QEMU's word.
    #[must_use]
    pub fn as_wire(&self) -> &str {
        match self {
            Self::Created => "created",
            Self::Running => "running",
            Self::Paused => "paused",
            Self::Ready => "ready",
            Self::Standby => "standby",
            Self::Waiting => "waiting",
            Self::Pending => "pending",
            Self::Aborting => "aborting",
            Self::Concluded => "concluded",
            Self::Null => "null",
            Self::Unknown(word) => word,
        }
    }
}

impl std::fmt::Display for JobStatus {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.write_str(self.as_wire())
    }
}

/// What an I/O error has done to a job.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Obstacle {
    /// There is no room left for what it writes.
    NoSpace,
    /// Any other error: a lost connection, a broken disk.
    Failed,
}

impl std::fmt::Display for Obstacle {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.write_str(match self {
            Self::NoSpace => "there is no space left",
            Self::Failed => "an I/O error",
        })
    }
}

/// One job.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Job {
    /// Its id.
    pub id: String,
    /// Its type, e.g. `mirror`.
    pub kind: String,
    /// Where it stands.
    pub status: JobStatus,
    /// What is done and what there is to do; a mirror's grow as the guest writes.
    pub progress: Progress,
    /// Why it failed: one that concluded with none has succeeded.
    pub error: Option<String>,
    /// What holds it up.
    pub obstacle: Option<Obstacle>,
    /// Whether a mirror takes part in every write of the guest, and misses none (10.0).
    pub actively_synced: Option<bool>,
}

/// How far a job is. For mirrors, streams and commits the unit is a byte.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Progress {
    /// Done.
    pub done: u64,
    /// Done and to be done, as far as is known.
    pub total: u64,
}

impl Progress {
    /// What is left.
    #[must_use]
    pub fn remaining(&self) -> u64 {
        self.total.saturating_sub(self.done)
    }
}

/// Why a job did not do what it was begun for.
#[derive(Debug, thiserror::Error)]
pub enum JobError {
    /// QEMU did not begin it.
    #[error("QEMU did not begin the job {id}")]
    Begin {
        /// The job.
        id: String,
        /// The refusal.
        #[source]
        source: QmpError,
    },
    /// QEMU can not be asked.
    #[error("can not ask for the job {id}")]
    Query {
        /// The job.
        id: String,
        /// The reason.
        #[source]
        source: QmpError,
    },
    /// It ended with an error.
    #[error("the job {id} failed: {reason}")]
    Failed {
        /// The job.
        id: String,
        /// QEMU's text.
        reason: String,
    },
    /// An I/O error holds it up. It is still there.
    #[error("the job {id} stands still: {obstacle}")]
    Held {
        /// The job.
        id: String,
        /// What it is.
        obstacle: Obstacle,
    },
    /// It is not there, so that its end can not be known.
    #[error("there is no job {id}")]
    Vanished {
        /// The job.
        id: String,
    },
    /// It is still there, and in this state.
    #[error("the job {id} is {status} after {} ms", after.as_millis())]
    TookTooLong {
        /// The job.
        id: String,
        /// Its state.
        status: JobStatus,
        /// How long was waited.
        after: Duration,
    },
}

/// All jobs, concluded ones included until they are dismissed.
///
/// # Errors
///
/// [`QmpError`].
pub async fn query(machine: &Machine) -> Result<Vec<Job>, QmpError> {
    let jobs = machine.qmp().execute("query-jobs", Value::Null).await?;
    let details = machine.qmp().execute("query-block-jobs", Value::Null).await?;
    let details = details.as_array().map(Vec::as_slice).unwrap_or_default();
    let one = |entry: &Value| {
        let id = entry.get("id").and_then(Value::as_str).unwrap_or_default();
        let is_it = |detail: &&Value| detail.get("device").and_then(Value::as_str) == Some(id);
        job(id, entry, details.iter().find(is_it).unwrap_or(&Value::Null))
    };
    Ok(jobs.as_array().map(|list| list.iter().map(one).collect()).unwrap_or_default())
}

/// One job, if it is there.
///
/// # Errors
///
/// [`QmpError`].
pub async fn find(machine: &Machine, id: &str) -> Result<Option<Job>, QmpError> {
    Ok(query(machine).await?.into_iter().find(|job| job.id == id))
}

/// Takes a concluded job away. One that is not there is no error.
///
/// # Errors
///
/// [`QmpError`]; refused for a job that has not concluded.
pub async fn dismiss(machine: &Machine, id: &str) -> Result<(), QmpError> {
    match machine.order("job-dismiss", json!({ "id": id })).await {
        Err(error) if error.is_refusal() && find(machine, id).await?.is_none() => Ok(()),
        other => other,
    }
}

/// Waits until a job has concluded well, and takes it away. Bounded by `within`.
///
/// # Errors
///
/// [`JobError`]. A job that failed has been taken away; one that is held up, or takes too long, goes on.
pub async fn finish(machine: &Machine, id: &str, within: Duration) -> Result<(), JobError> {
    let concluded = |job: &Job| job.status == JobStatus::Concluded;
    let job = reach(machine, id, concluded, within).await?;
    let query = |source| JobError::Query { id: id.to_owned(), source };
    dismiss(machine, id).await.map_err(query)?;
    match job.error {
        None => Ok(()),
        Some(reason) => Err(JobError::Failed { id: id.to_owned(), reason }),
    }
}

/// Waits until a job is where it is wanted, or has concluded otherwise. Bounded by `within`.
/// A question that QEMU is too busy to answer is asked again.
///
/// # Errors
///
/// [`JobError::Query`], `Failed` (not taken away), `Held`, `Vanished`, `TookTooLong`.
pub(super) async fn reach(
    machine: &Machine,
    id: &str,
    wanted: impl Fn(&Job) -> bool,
    within: Duration,
) -> Result<Job, JobError> {
    let until = Instant::now() + within;
    let mut events = machine.events();
    loop {
        let id = || id.to_owned();
        let job = match find(machine, &id()).await {
            Err(QmpError::TimedOut { .. }) if Instant::now() < until => continue,
            Err(source) => return Err(JobError::Query { id: id(), source }),
            Ok(None) => return Err(JobError::Vanished { id: id() }),
            Ok(Some(job)) if wanted(&job) => return Ok(job),
            Ok(Some(job)) => job,
        };
        if let (JobStatus::Concluded, Some(reason)) = (&job.status, &job.error) {
            return Err(JobError::Failed { id: id(), reason: reason.clone() });
        }
        if let (JobStatus::Paused | JobStatus::Standby, Some(obstacle)) =
            (&job.status, job.obstacle)
        {
            return Err(JobError::Held { id: id(), obstacle });
        }
        if Instant::now() >= until {
            return Err(JobError::TookTooLong { id: id(), status: job.status, after: within });
        }
        next_change(&mut events, until).await;
    }
}

/// Waits for an event about a job, for a moment at most. What it says does not matter: the state
/// is asked for, so that a missed event can not mislead.
pub(super) async fn next_change(events: &mut Events, until: Instant) {
    let moment = Instant::now() + Duration::from_millis(POLL_MILLISECONDS);
    let about_a_job = async {
        loop {
            match events.next().await.map(|event| event.kind) {
                Ok(
                    EventKind::JobStatusChange { .. }
                    | EventKind::BlockJobReady { .. }
                    | EventKind::BlockJobCompleted { .. }
                    | EventKind::BlockJobCancelled { .. }
                    | EventKind::BlockJobError { .. },
                )
                | Err(EventError::Lagged { .. }) => return,
                Ok(_) => {}
                // The next question tells that the session is over.
                Err(EventError::Closed) => return,
            }
        }
    };
    let _ = timeout_at(moment.min(until), about_a_job).await;
}

fn job(id: &str, entry: &Value, details: &Value) -> Job {
    let text = |key: &str| entry.get(key).and_then(Value::as_str);
    let number = |key: &str| entry.get(key).and_then(Value::as_u64).unwrap_or(0);
    let obstacle = match details.get("io-status").and_then(Value::as_str) {
        Some("nospace") => Some(Obstacle::NoSpace),
        Some("failed") => Some(Obstacle::Failed),
        _ => None,
    };
    Job {
        id: id.to_owned(),
        kind: text("type").unwrap_or_default().to_owned(),
        status: JobStatus::from_wire(text("status").unwrap_or_default()),
        progress: Progress { done: number("current-progress"), total: number("total-progress") },
        error: text("error").map(str::to_owned),
        obstacle,
        actively_synced: details.get("actively-synced").and_then(Value::as_bool),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_status_keeps_its_word() {
        let words = [
            "created",
            "running",
            "paused",
            "ready",
            "standby",
            "waiting",
            "pending",
            "aborting",
            "concluded",
            "null",
            "dreaming",
        ];
        for word in words {
            let status = JobStatus::from_wire(word);
            assert_eq!(status.as_wire(), word);
            assert_eq!(matches!(status, JobStatus::Unknown(_)), word == "dreaming", "{word}");
        }
    }

    #[test]
    fn a_job_is_read_from_both_answers_and_from_nothing() {
        let entry = json!({ "type": "mirror", "status": "paused",
            "current-progress": 5, "total-progress": 7 });
        let held = job("vda", &entry, &json!({ "io-status": "nospace", "actively-synced": true }));
        assert_eq!(held.obstacle, Some(Obstacle::NoSpace));
        assert_eq!((held.progress.remaining(), held.actively_synced), (2, Some(true)));
        let bare = job("", &Value::Null, &Value::Null);
        assert_eq!((bare.obstacle, bare.error, bare.progress.remaining()), (None, None, 0));
    }
}
