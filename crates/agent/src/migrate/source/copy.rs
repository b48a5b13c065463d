//! The copy: memory travels while the guest runs, then it stops and the rest follows.
//!
//! [`copy`] is what the guest goes through, top to bottom. It runs beside the driver, which hears how it ends; every `?`
//! in it leads back to "the guest runs here". With post-copy it ends earlier: the guest's state has been sent, and the rest
//! is [`super::serving`]'s. What QEMU is told is in [`whimbrel_qemu::migrate::outgoing`]; when it is told to do otherwise, in
//! [`super::steering`].

use std::future::Future;
use std::pin::Pin;
use std::time::{Duration, Instant};

use tokio::sync::watch;
use tokio::time::{sleep, timeout};
use tracing::warn;
use whimbrel_api::agent::OutgoingReport;
use whimbrel_api::error::chain;
use whimbrel_api::{ErrorCode, Phase};
use whimbrel_migration::handoff::SourceInput;
use whimbrel_qemu::machine::{Machine, RunState};
use whimbrel_qemu::migrate::outgoing::{
    Completed, Control, Outgoing, OutgoingError, OutgoingSettings, Switched,
};
use whimbrel_qemu::migrate::{MigrationStatus, Statistics};
use whimbrel_qemu::qmp::QmpError;

use super::Departure;
use super::pause::now_us;
use super::samples::progress;
use crate::vm::found::hear_again;
use crate::vm::take_back;

/// The least time that QEMU gets, in seconds, from the guest's stop until the rest has arrived; after it the guest resumes
/// here. A slow link gets more: see [`switchover_limit`].
const SWITCHOVER_SECONDS: u64 = 4;
/// How long the destination may take, in seconds, to say that it has loaded what QEMU has sent.
pub(super) const CONFIRM_SECONDS: u64 = 4;
/// How long the connection to the destination may take, in seconds: in its handshake the guest may stand still.
const CONNECT_SECONDS: u64 = 6;
/// How long QEMU may take to give up a migration, in seconds.
const CANCEL_SECONDS: u64 = 10;
/// How long it may take to do so by itself, in milliseconds, before its connection is cut.
const CANCEL_ALONE_MS: u64 = 700;

/// How often it is looked, in milliseconds, whether the guest's state is really on its way.
const SENT_POLL_MS: u64 = 2;

/// What has been sent when a copy ends.
pub(super) enum Sent {
    /// The whole guest.
    Whole(Completed),
    /// Its state; memory is still here (post-copy).
    State(Completed),
}

/// How a copy ends: with what sent, or in which phase and why not.
type Copied = Result<Sent, (Phase, OutgoingError)>;

/// A copy under way.
pub(super) type Copying = Pin<Box<dyn Future<Output = Copied> + Send>>;

/// What a copy tells while it is under way.
struct Voices {
    statistics: watch::Sender<Statistics>,
    report: watch::Sender<OutgoingReport>,
    control: watch::Sender<Option<Control>>,
}

/// Copies the guest while it runs, then stops it and sends the rest.
///
/// On success the guest stands still and QEMU has said `completed`, or with post-copy that it sends memory after the state;
/// on failure it is as QEMU left it, which the caller does not guess: it cancels and resumes.
async fn copy(
    machine: Machine,
    settings: OutgoingSettings,
    stop_first: bool,
    voices: Voices,
) -> Copied {
    let precopy = |error| (Phase::Precopy, error);
    enter(&voices.report, Phase::Precopy);
    if stop_first {
        hold(&machine).await.map_err(|error| precopy(OutgoingError::Query(error)))?;
    }
    let mut outgoing = Outgoing::start(&machine, &settings).await.map_err(precopy)?;
    outgoing.wait_connected(Duration::from_secs(CONNECT_SECONDS)).await.map_err(precopy)?;
    voices.control.send_replace(Some(outgoing.control()));
    outgoing.wait_pre_switchover(&voices.statistics).await.map_err(precopy)?;

    // The guest stands still. Disks that travel too will be concluded here, before QEMU may go on.
    enter(&voices.report, Phase::Switchover);
    let limit = switchover_limit(&settings);
    let sent = timeout(limit, switch_over(&mut outgoing, &settings, limit)).await;
    // A QEMU that cannot write to its destination answers nothing, and looks at no limit.
    let late = OutgoingError::TookTooLong { what: "the last stage", after: limit };
    sent.unwrap_or(Err(late)).map_err(|error| (Phase::Switchover, error))
}

/// Sends what is left, or where post-copy was ordered the guest's state.
async fn switch_over(
    outgoing: &mut Outgoing,
    settings: &OutgoingSettings,
    limit: Duration,
) -> Result<Sent, OutgoingError> {
    if settings.stream.postcopy.is_none() {
        return outgoing.continue_to_completed(limit).await.map(Sent::Whole);
    }
    match outgoing.continue_to_postcopy(limit).await? {
        Switched::Completed(completed) => Ok(Sent::Whole(completed)),
        Switched::Postcopy(begun) => state_sent(outgoing, begun).await,
    }
}

/// Waits for the proof that the guest's state has gone: QEMU is in post-copy before it sends it, and may yet fail in that.
/// Only memory that went after it, or the end, proves it.
async fn state_sent(outgoing: &Outgoing, begun: Completed) -> Result<Sent, OutgoingError> {
    loop {
        let statistics = outgoing.statistics().await?;
        match &statistics.status {
            MigrationStatus::Completed => {
                return Ok(Sent::Whole(Completed { statistics, ..begun }));
            }
            MigrationStatus::Failed | MigrationStatus::Cancelled => {
                let (reason, run_state) = (statistics.error_desc, RunState::PostMigrate);
                return Err(OutgoingError::Failed { reason, run_state });
            }
            _ if statistics.ram.postcopy_bytes.unwrap_or(0) > 0 => {
                return Ok(Sent::State(Completed { statistics, ..begun }));
            }
            _ => sleep(Duration::from_millis(SENT_POLL_MS)).await,
        }
    }
}

/// Lets the guest stand still, if it runs. It is the driver's to let it run again: QEMU does that by itself only for guests
/// that it has stopped itself.
pub(super) async fn hold(machine: &Machine) -> Result<(), QmpError> {
    if machine.status().await?.running { machine.stop().await } else { Ok(()) }
}

/// What the last pass may take: the pause that was asked for, several times over, and never less than
/// [`SWITCHOVER_SECONDS`]. A guest that is held longer than this is better off running here.
fn switchover_limit(settings: &OutgoingSettings) -> Duration {
    Duration::from_secs(SWITCHOVER_SECONDS)
        + Duration::from_millis(settings.max_downtime_ms.saturating_mul(4))
}

/// Tells the phase.
pub(super) fn enter(report: &watch::Sender<OutgoingReport>, phase: Phase) {
    report.send_if_modified(|report| {
        let new = report.phase != phase;
        report.phase = phase;
        new
    });
}

impl Departure {
    pub(super) fn begin_copy(&mut self) {
        let Some(guest) = &self.guest else { return };
        let (machine, settings) = (guest.qemu.machine.clone(), self.settings.clone());
        let voices = Voices {
            statistics: self.statistics.clone(),
            report: self.report.clone(),
            control: self.steering.control(),
        };
        let stop_first = self.request.strategy.stop_first;
        if stop_first {
            self.pause.stopped = Some(now_us());
        }
        self.moved_at = Instant::now();
        self.copying = Some(Box::pin(copy(machine, settings, stop_first, voices)));
    }

    /// The copy has ended, one way or the other.
    pub(super) fn copied(&mut self, copied: Copied) -> SourceInput {
        self.copying = None;
        match copied {
            Ok(Sent::Whole(completed)) => {
                self.stands_still(&completed);
                SourceInput::Completed
            }
            Ok(Sent::State(begun)) => {
                self.stands_still(&begun);
                self.serve();
                SourceInput::StateSent
            }
            Err((phase, error)) => self.failed(phase, ErrorCode::Engine, chain(&error)),
        }
    }

    /// What the destination needs to run the guest has been sent; it is to say so.
    fn stands_still(&mut self, sent: &Completed) {
        if let Some(at) = sent.stopped_at.and_then(|at| u64::try_from(at.as_micros()).ok()) {
            self.pause.stopped = Some(at);
        }
        self.pause.completed = Some(now_us());
        self.confirm_by = Some(Instant::now() + Duration::from_secs(CONFIRM_SECONDS));
        self.answer_due = !self.asking.is_empty();
        let last = progress(&sent.statistics, &self.request, None);
        self.report.send_modify(|report| report.progress = Some(last));
        self.samples.keep_raw(&sent.statistics);
    }

    /// Gives the copy up, whatever QEMU is doing.
    pub(super) async fn stop_copy(&mut self) {
        self.copying = None;
        // What QEMU has not been told yet it is not told any more; what it has been told comes before what is told now.
        self.telling.clear();
        // Nobody else may be opening a session with QEMU: it has one at a time.
        self.serving = None;
        let Some(guest) = &mut self.guest else { return };
        let within = Duration::from_secs(CANCEL_SECONDS);
        // A QEMU that lives and cannot be heard is waited for when the guest is to be resumed.
        let _heard = timeout(within, hear_again(&self.host, &mut guest.qemu)).await;
        let (machine, process) = (&guest.qemu.machine, &guest.qemu.process);
        let alone = Duration::from_millis(CANCEL_ALONE_MS);
        let mut cancelled = timeout(alone, Outgoing::reattach(machine).cancel(within)).await;
        if cancelled.is_err() {
            // It waits for a destination that does not answer, perhaps so that it hears nobody.
            match process.cut(self.settings.to.port()) {
                Ok(cut) => warn!(migration = %self.id, cut, "QEMU's connection was cut"),
                Err(error) => {
                    warn!(migration = %self.id, %error, "QEMU's connection cannot be cut");
                }
            }
            cancelled = Ok(Outgoing::reattach(machine).cancel(within).await);
        }
        match cancelled {
            // Its state has been sent, and was not released.
            Ok(Err(OutgoingError::Postcopy)) => {
                take_back::from_postcopy(&self.host, &guest.qemu).await
            }
            Ok(Err(error)) => {
                warn!(migration = %self.id, error = chain(&error), "QEMU did not confirm the cancel");
            }
            _ => {}
        }
    }
}
