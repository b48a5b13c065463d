//! The copy: memory travels while the guest runs, then it stops and the rest follows.
//!
//! [`copy`] is what the guest goes through, top to bottom. It runs beside the driver, which hears how it ends; every `?`
//! in it leads back to "the guest runs here". What QEMU is told is in [`whimbrel_qemu::migrate::outgoing`].

use std::future::Future;
use std::pin::Pin;
use std::time::{Duration, Instant};

use tokio::sync::watch;
use tokio::time::timeout;
use tracing::warn;
use whimbrel_api::agent::{OutgoingReport, OutgoingRequest};
use whimbrel_api::error::chain;
use whimbrel_api::migration::Progress;
use whimbrel_api::{ErrorCode, Phase};
use whimbrel_migration::handoff::SourceInput;
use whimbrel_qemu::machine::Machine;
use whimbrel_qemu::migrate::Statistics;
use whimbrel_qemu::migrate::outgoing::{Completed, Outgoing, OutgoingError, OutgoingSettings};

use super::Departure;
use super::pause::now_us;
use crate::vm::found::hear_again;

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

/// How a copy ends: with everything sent, or in which phase and why not.
type Copied = Result<Completed, (Phase, OutgoingError)>;

/// A copy under way.
pub(super) type Copying = Pin<Box<dyn Future<Output = Copied> + Send>>;

/// Copies the guest while it runs, then stops it and sends the rest.
///
/// On success the guest stands still and QEMU has said `completed`; on failure it is as QEMU left it, which the caller
/// does not guess: it cancels and resumes.
async fn copy(
    machine: Machine,
    settings: OutgoingSettings,
    statistics: watch::Sender<Statistics>,
    report: watch::Sender<OutgoingReport>,
) -> Copied {
    let precopy = |error| (Phase::Precopy, error);
    enter(&report, Phase::Precopy);
    let mut outgoing = Outgoing::start(&machine, &settings).await.map_err(precopy)?;
    outgoing.wait_connected(Duration::from_secs(CONNECT_SECONDS)).await.map_err(precopy)?;
    outgoing.wait_pre_switchover(&statistics).await.map_err(precopy)?;

    // The guest stands still. Disks that travel too will be concluded here, before QEMU may go on.
    enter(&report, Phase::Switchover);
    let limit = switchover_limit(&settings);
    let completed = timeout(limit, outgoing.continue_to_completed(limit)).await;
    // A QEMU that cannot write to its destination answers nothing, and looks at no limit.
    let late = OutgoingError::TookTooLong { what: "the last stage", after: limit };
    completed.unwrap_or(Err(late)).map_err(|error| (Phase::Switchover, error))
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
        let (statistics, report) = (self.statistics.clone(), self.report.clone());
        self.copying = Some(Box::pin(copy(machine, settings, statistics, report)));
    }

    /// QEMU has figures of its progress.
    pub(super) fn copied_more(&mut self, statistics: &Statistics) {
        let progress = progress(statistics, &self.request);
        self.report.send_modify(|report| {
            let before = report.progress.replace(progress);
            let sent = |progress: &Option<Progress>| progress.as_ref().map(|p| p.transferred_bytes);
            if sent(&report.progress) != sent(&before) {
                self.lively_at = Instant::now();
            }
        });
    }

    /// The copy has ended, one way or the other.
    pub(super) fn copied(&mut self, copied: Copied) -> SourceInput {
        self.copying = None;
        match copied {
            Ok(completed) => {
                self.pause.stopped =
                    completed.stopped_at.and_then(|at| u64::try_from(at.as_micros()).ok());
                self.pause.completed = Some(now_us());
                self.confirm_by = Some(Instant::now() + Duration::from_secs(CONFIRM_SECONDS));
                self.answer_due = !self.asking.is_empty();
                let last = progress(&completed.statistics, &self.request);
                self.report.send_modify(|report| report.progress = Some(last));
                SourceInput::Completed
            }
            Err((phase, error)) => self.failed(phase, ErrorCode::Engine, chain(&error)),
        }
    }

    /// Gives the copy up, whatever QEMU is doing.
    pub(super) async fn stop_copy(&mut self) {
        self.copying = None;
        let Some(guest) = &mut self.guest else { return };
        let within = Duration::from_secs(CANCEL_SECONDS);
        // A QEMU that lives and cannot be heard is waited for when the guest is to be resumed.
        let _heard = timeout(within, hear_again(&self.host, &mut guest.qemu)).await;
        let (machine, process) = (&guest.qemu.machine, &guest.qemu.process);
        let alone = Duration::from_millis(CANCEL_ALONE_MS);
        if let Ok(Ok(_)) = timeout(alone, Outgoing::reattach(machine).cancel(within)).await {
            return;
        }
        // It waits for a destination that does not answer, perhaps so that it hears nobody.
        match process.cut(self.settings.to.port()) {
            Ok(cut) => warn!(migration = %self.id, cut, "QEMU's connection was cut"),
            Err(error) => warn!(migration = %self.id, %error, "QEMU's connection cannot be cut"),
        }
        if let Err(error) = Outgoing::reattach(machine).cancel(within).await {
            warn!(migration = %self.id, error = chain(&error), "QEMU did not confirm the cancel");
        }
    }
}

/// QEMU's figures in the contract's words.
fn progress(statistics: &Statistics, request: &OutgoingRequest) -> Progress {
    let ram = &statistics.ram;
    Progress {
        ram_total_bytes: ram.total_bytes.unwrap_or(0),
        ram_remaining_bytes: ram.remaining_bytes.unwrap_or(0),
        transferred_bytes: ram.transferred_bytes.unwrap_or(0),
        zero_pages: ram.duplicate_pages.unwrap_or(0),
        normal_pages: ram.normal_pages.unwrap_or(0),
        passes: ram.dirty_sync_count.unwrap_or(0),
        dirty_pages_per_s: ram.dirty_pages_rate.unwrap_or(0),
        bits_per_s: ram.mbps.map_or(0, |mbps| (mbps * 1e6) as u64),
        expected_downtime_ms: statistics.expected_downtime_ms,
        engine_total_ms: statistics.total_time_ms.unwrap_or(0),
        engine_setup_ms: statistics.setup_time_ms,
        destination_start_ms: Some(request.offer.start_ms),
        ..Progress::default()
    }
}
