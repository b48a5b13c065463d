//! The source in post-copy: the guest is handed over first, and the rest of its memory follows.
//!
//! ```text
//!   Control::start_postcopy
//!   wait_pre_switchover        guest stopped here
//!   continue_to_postcopy       its state is on its way; the destination loads it, stopped
//!   (the agents hand over; `cont` is theirs)
//!   wait_postcopy_done ◀─────┐ paused: the connection is lost, both ends wait
//!         └── paused ──▶ recover
//! ```
//!
//! Seen on 7.2.22 and 10.0.2, with and without preemption and TLS:
//!
//! - With `pause-before-switchover` the source stops its guest and waits at `pre-switchover`, as
//!   before a pre-copy switchover. After `migrate-continue` 7.2 goes to `postcopy-active` at once,
//!   10.0 by way of `device`. A destination started with `-S` is `postcopy-active` as soon as the
//!   state comes, still `inmigrate`, then `paused`; `cont` lets its guest run.
//! - Memory flows while the destination stands still, too: all of it may have come before `cont`.
//! - Pages that the guest waits for know no limit of the bandwidth.
//! - A cancel at pre-switchover ends the migration; 10.0 lets the guest run again, 7.2 leaves it
//!   stopped (`postmigrate`). Later 10.0 refuses, and 7.2 hangs in `cancelling` for good once the
//!   connection is lost: [`Outgoing::cancel`] does not ask, and [`take_back`](super::take_back()) is
//!   the way.
//! - In `postcopy-paused` neither `cont` nor another `migrate` is taken. It can be taken up again
//!   any number of times, with the TLS objects of the first; a try that does not reach anybody
//!   changes nothing. 7.2 stays in `postcopy-recover` for good if the destination closes the
//!   connection before it has answered.
//! - A destination must be allowed to use userfaultfd (`EngineFacts::postcopy_obstacle`): QEMU's
//!   sandbox lets it. 10.0 opens `/dev/userfaultfd`, which its group may be given (0660); 7.2 knows
//!   only the system call, which an unprivileged user has with `vm.unprivileged_userfaultfd=1`.

use std::net::SocketAddr;
use std::time::Duration;

use serde_json::{Value, json};
use tokio::sync::watch;
use tokio::time::Instant;

use super::{
    Completed, Outgoing, OutgoingError, PROGRESS_MILLISECONDS, SWITCHOVER_POLL_MILLISECONDS,
    Standing,
};
use crate::machine::Machine;
use crate::migrate::{MigrationStatus, Statistics};
use crate::qmp::QmpError;

/// What came of pre-switchover where post-copy was ordered.
#[derive(Debug, Clone, PartialEq)]
pub enum Switched {
    /// All memory had been sent when the guest stopped, so there is no post-copy.
    Completed(Completed),
    /// The state is on its way, memory is still here; the guest is stopped. The destination's
    /// [`wait_loaded`](crate::migrate::incoming::wait_loaded) tells when it has the state.
    Postcopy(Completed),
}

/// Why a connection for post-copy could not be made again. Both ends wait on; ask again.
#[derive(Debug, thiserror::Error)]
pub enum Unrecovered {
    /// QEMU refused, or can not be asked.
    #[error("the source's QEMU did not take up post-copy again")]
    Query(#[source] QmpError),
    /// The new connection failed.
    #[error("post-copy is paused still: {}", reason.as_deref().unwrap_or("no reason given"))]
    StillPaused {
        /// QEMU's text, often none.
        reason: Option<String>,
    },
    /// The migration is in no state from which it could be taken up.
    #[error("there is no paused post-copy, but {status:?}")]
    NotPaused {
        /// The state.
        status: MigrationStatus,
    },
}

impl Outgoing {
    /// As [`Outgoing::continue_to_completed`], where post-copy was ordered: returns as soon as the
    /// guest's state is on its way and memory is sent on demand.
    ///
    /// # Errors
    ///
    /// As [`Outgoing::continue_to_completed`].
    pub async fn continue_to_postcopy(
        &mut self,
        within: Duration,
    ) -> Result<Switched, OutgoingError> {
        match self.continue_until(within).await? {
            (Standing::Postcopy, begun) => Ok(Switched::Postcopy(begun)),
            (_, completed) => Ok(Switched::Completed(completed)),
        }
    }

    /// Waits until the destination has all memory, telling the progress on the way, in whose
    /// status it stands that the connection is lost. Takes as long as that does, recoveries
    /// included. Cancellation safe; may be called again, also after a restart of the agent.
    ///
    /// # Errors
    ///
    /// [`OutgoingError::Failed`] and `Cancelled` when QEMU says so: the guest's memory is in two
    /// halves then, and lost unless the guest has never run. `Query` when it can not be asked.
    pub async fn wait_postcopy_done(
        &mut self,
        progress: &watch::Sender<Statistics>,
    ) -> Result<Completed, OutgoingError> {
        let pause = Duration::from_millis(PROGRESS_MILLISECONDS);
        loop {
            let statistics = self.statistics().await?;
            progress.send_replace(statistics.clone());
            if let Standing::Completed = self.standing(&statistics).await? {
                self.note_events();
                return Ok(Completed { statistics, stopped_at: self.stopped_at });
            }
            self.wait_status_change(pause).await;
        }
    }

    /// Makes a new connection for a post-copy that is paused, to where the destination listens
    /// anew ([`incoming::recover`](crate::migrate::incoming::recover)), with the TLS of the first.
    /// Waits until memory flows again.
    ///
    /// # Errors
    ///
    /// [`Unrecovered`]; nothing is lost.
    pub async fn recover(&mut self, to: SocketAddr, within: Duration) -> Result<(), Unrecovered> {
        let until = Instant::now() + within;
        let again = json!({ "uri": format!("tcp:{to}"), "resume": true });
        self.machine.order("migrate", again).await.map_err(Unrecovered::Query)?;
        let mut began = false;
        loop {
            let statistics = Statistics::query(self.machine.qmp()).await;
            let statistics = statistics.map_err(Unrecovered::Query)?;
            match statistics.status {
                MigrationStatus::PostcopyActive | MigrationStatus::Completed => return Ok(()),
                MigrationStatus::PostcopyRecover | MigrationStatus::PostcopyRecoverSetup
                    if Instant::now() < until =>
                {
                    began = true;
                }
                MigrationStatus::PostcopyPaused if !began && Instant::now() < until => {}
                MigrationStatus::PostcopyPaused
                | MigrationStatus::PostcopyRecover
                | MigrationStatus::PostcopyRecoverSetup => {
                    return Err(Unrecovered::StillPaused { reason: statistics.error_desc });
                }
                status => return Err(Unrecovered::NotPaused { status }),
            }
            let news =
                self.wait_status_change(Duration::from_millis(SWITCHOVER_POLL_MILLISECONDS)).await;
            began |= matches!(
                news,
                Some(MigrationStatus::PostcopyRecover | MigrationStatus::PostcopyRecoverSetup)
            );
        }
    }
}

/// Gives up the connection of a post-copy, on either end: it becomes paused, and can be taken up
/// again. For a connection that hangs: one that breaks is noticed by QEMU itself. Carried out even
/// while QEMU answers nothing else (out of band).
///
/// # Errors
///
/// [`QmpError`]; refused where there is no post-copy under way.
pub async fn pause_postcopy(machine: &Machine) -> Result<(), QmpError> {
    machine.qmp().execute_oob("migrate-pause", Value::Null).await.map(drop)
}
