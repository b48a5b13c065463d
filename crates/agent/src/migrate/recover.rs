//! After a restart of the agent: every open migration goes on from what the ledger says.
//!
//! Nothing is guessed. The request says with whom, the ownership record what may be done, QEMU itself how it is; the rules
//! ([`whimbrel_migration::handoff::recover`]) make of that what is to be done first. A copy that was under way is given up,
//! and the guest goes on here; a VM that was released is asked for until its destination answers. A QEMU that lives and is
//! silent is waited for, and that is told; one that only waits for a guest is ended.
//!
//! Called once by [`crate::run`], after the VMs have been found again and before the door opens.

use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{mpsc, watch};
use tokio::time::{sleep, timeout};
use tracing::{error, info, warn};
use whimbrel_api::agent::{
    IncomingReport, IncomingRequest, OutgoingEnd, OutgoingReport, OutgoingRequest,
};
use whimbrel_api::migration::Stay;
use whimbrel_api::vm::VmState;
use whimbrel_api::{ApiError, ErrorCode, Phase, VmId};
use whimbrel_migration::handoff::{
    self, Observed, Ownership, Recovered, Standing, UNRESOLVED_AFTER_MS,
};
use whimbrel_qemu::machine::RunState;
use whimbrel_qemu::migrate::Statistics;
use whimbrel_qemu::process::Process;

use super::destination::LEASE_SECONDS;
use super::destination::fetching::adopt;
use super::source::samples::Samples;
use super::{
    Incoming, IncomingState, ORDERS_MAX, Outgoing, depart, destination, source, watch_over,
};
use crate::host::Host;
use crate::ledger::{MigrationRow, RunRecord, Side};
use crate::vm::found::{Found, find_again};
use crate::vm::spawn::sweep_run;
use crate::vm::{RunDir, RunningVm, Spawned};

/// Takes up again what was open when the agent ended.
///
/// # Errors
/// `internal` where the ledger cannot be read. A single migration that cannot be taken up is logged and left as it is: its row
/// stays, by which whoever asks for it hears so.
pub async fn recover(host: &Arc<Host>) -> Result<(), ApiError> {
    let runs = host.ledger.runs().await?;
    for row in host.ledger.migrations(Side::Outgoing).await? {
        let (id, vm) = (row.id, row.vm);
        if let Err(error) = outgoing(host, row, &runs).await {
            warn!(migration = %id, %error, "an outgoing migration could not be taken up again");
            let why = format!("its migration {id} could not be taken up again: {error}");
            host.vms.loan_news(vm, VmState::Unknown { why }).await;
        }
    }
    for row in host.ledger.migrations(Side::Incoming).await? {
        let id = row.id;
        if let Err(error) = incoming(host, row, &runs).await {
            warn!(migration = %id, %error, "an incoming migration could not be taken up again");
        }
    }
    Ok(())
}

fn unreadable(error: &serde_json::Error) -> ApiError {
    ApiError::internal("a migration's row in the ledger cannot be read", error)
}

async fn outgoing(host: &Arc<Host>, row: MigrationRow, runs: &[RunRecord]) -> Result<(), ApiError> {
    let request: OutgoingRequest =
        serde_json::from_value(row.request).map_err(|error| unreadable(&error))?;
    let noted: Option<OutgoingReport> =
        serde_json::from_value(row.state).map_err(|error| unreadable(&error))?;
    let record = host.ledger.ownership(row.vm, Some(row.id)).await?;
    let mut report = noted.unwrap_or_else(|| OutgoingReport::begun(row.id, row.vm));
    let (orders, inbox) = mpsc::channel(ORDERS_MAX);
    let open = record.as_ref().filter(|record| record.is_open());
    let Some(open) = open else {
        report.end = end_of(record.as_ref(), report.end);
        let (report, samples) = (watch::Sender::new(report), Samples::default());
        let ended = Outgoing { vm: row.vm, orders, report, samples };
        host.migrations.open().outgoing.insert(row.id, ended);
        return Ok(());
    };
    // Noted with a word of an operator that has not come true yet; the controller says it again.
    report.end = OutgoingEnd::Open;
    if matches!(open.standing, Standing::Released { .. } | Standing::Serving { .. }) {
        report.phase = report.phase.max(Phase::Handoff);
    }
    let run = host
        .ledger
        .vms()
        .await?
        .into_iter()
        .find(|vm| vm.definition.id == row.vm)
        .and_then(|vm| vm.run);
    let run = runs.iter().find(|record| Some(&record.name) == run.as_ref()).cloned();
    let peer = host.agent_client(&request.destination, &request.offer.agent)?;
    let (report, samples) = (watch::Sender::new(report), Samples::default());
    let voices = source::Voices { report: report.clone(), samples: samples.clone() };
    let known = Outgoing { vm: row.vm, orders, report, samples };
    host.migrations.open().outgoing.insert(row.id, known);
    let (host, open) = (host.clone(), open.clone());
    watch_over(&host.clone(), row.vm, async move {
        let told = voices.report.clone();
        let (qemu, observed) = look_aloud(&host, row.vm, run.as_ref(), Some(&told)).await;
        info!(migration = %row.id, vm = %row.vm, ?observed, "an outgoing migration is taken up again");
        if let (Recovered::Source(rules), first) = handoff::recover(&open, observed) {
            let guest = qemu.map(|qemu| RunningVm { qemu, ownership: open });
            let departure =
                source::Departure::new(&host, row.id, request, (rules, guest), peer, voices);
            Box::pin(depart(&host, departure, first, inbox)).await;
        }
    });
    Ok(())
}

/// How an outgoing migration ended: as it was noted, or by the record, if the agent did not live to note that.
fn end_of(record: Option<&Ownership>, noted: OutgoingEnd) -> OutgoingEnd {
    match (record.map(|record| &record.standing), noted) {
        (Some(Standing::Gone { .. }), _) => OutgoingEnd::Moved,
        (_, ended @ (OutgoingEnd::Moved | OutgoingEnd::Stayed { .. })) => ended,
        _ => OutgoingEnd::Stayed {
            why: Stay::Failed {
                phase: Phase::Precopy,
                code: ErrorCode::Internal.as_str().to_owned(),
                message: "the source's agent was restarted during the copy".to_owned(),
            },
        },
    }
}

async fn incoming(host: &Arc<Host>, row: MigrationRow, runs: &[RunRecord]) -> Result<(), ApiError> {
    let request: IncomingRequest =
        serde_json::from_value(row.request).map_err(|error| unreadable(&error))?;
    let state: IncomingState =
        serde_json::from_value(row.state).map_err(|error| unreadable(&error))?;
    let Some(record) = host.ledger.ownership(row.vm, Some(row.id)).await? else {
        // It ended before anything was begun.
        host.ledger.remove_migration(row.id, Side::Incoming).await?;
        return Ok(());
    };
    let (orders, inbox) = mpsc::channel(ORDERS_MAX);
    let (offer, offered) = watch::channel(state.offer.map(Ok));
    let first_report = match &record.standing {
        Standing::Fetching { .. } => IncomingReport::Fetching { epoch: record.epoch },
        Standing::Owned => {
            let vm = host.vms.report(row.vm).map_or(VmState::Stopped, |report| report.state);
            IncomingReport::Owned { epoch: record.epoch, vm }
        }
        Standing::Expected { .. } => IncomingReport::Waiting,
        _ => IncomingReport::Refused { why: "the destination's agent was restarted".to_owned() },
    };
    let (report, reported) = watch::channel(first_report);
    let (statistics, figures) = watch::channel(Statistics::default());
    let source = request.source.clone();
    let ticket = state.ticket.clone();
    let known = Incoming {
        vm: row.vm,
        source,
        ticket,
        orders,
        offer: offered,
        report: reported,
        statistics: figures,
    };
    host.migrations.open().incoming.insert(row.id, known);
    if !record.is_open() {
        return Ok(());
    }
    let run = runs.iter().find(|run| run.migration == Some(row.id)).cloned();
    let host = host.clone();
    watch_over(&host.clone(), row.vm, async move {
        if matches!(record.standing, Standing::Fetching { .. }) {
            adopt(&host, row.id, &request, record.clone(), run.clone()).await;
        }
        let (target, observed) = match record.standing {
            Standing::Expected { .. } => look_or_end(&host, row.vm, run.as_ref()).await,
            _ => look_aloud(&host, row.vm, run.as_ref(), None).await,
        };
        info!(migration = %row.id, vm = %row.vm, ?observed, "an incoming migration is taken up again");
        // A QEMU that ended while nobody looked leaves its run to us: the arrival takes down only what it was given.
        if let (None, Some(run)) = (&target, &run) {
            sweep_run(&host, &run.name, &run.taps).await;
        }
        if let (Recovered::Destination(rules), first) = handoff::recover(&record, observed) {
            let voices = destination::Voices { offer, report, statistics };
            let request = (request, state.ticket);
            destination::Arrival::new(host, row.id, request, rules, target, voices)
                .with_record(record)
                .run(first, inbox)
                .await;
        }
    });
    Ok(())
}

/// As [`look`]. A QEMU that lives and is silent is told after [`UNRESOLVED_AFTER_MS`], and that is taken back when it
/// answers: nothing can be decided before, and nobody but this host knows how the VM is.
///
/// There may be no way out but an operator's: a QEMU of which a device waits for memory opens no new session (7.2, 10.0), and
/// without one it cannot be told where its memory could come from.
async fn look_aloud(
    host: &Arc<Host>,
    vm: VmId,
    run: Option<&RunRecord>,
    report: Option<&watch::Sender<OutgoingReport>>,
) -> (Option<Spawned>, Observed) {
    let mut looking = pin!(look(host, run));
    let patience = Duration::from_millis(UNRESOLVED_AFTER_MS);
    if let Ok(seen) = timeout(patience, &mut looking).await {
        return seen;
    }
    let before = host.vms.report(vm).ok().map(|report| report.state);
    let pid = run.map_or(0, |run| run.process.pid);
    let why = format!(
        "its QEMU (process {pid}) has not answered since the agent was started, and its migration waits for it; \
         if it waits for memory that cannot come, end it"
    );
    error!(%vm, pid, "QEMU lives and does not answer; its migration waits for it");
    host.vms.loan_news(vm, VmState::Unknown { why }).await;
    if let Some(report) = report {
        let ask = host.name().clone();
        report.send_modify(|report| report.end = OutgoingEnd::Unresolved { ask });
    }
    let seen = looking.await;
    warn!(%vm, pid, "QEMU has answered, or ended");
    if let Some(report) = report {
        report.send_modify(|report| report.end = OutgoingEnd::Open);
    }
    if let Some(news) = before {
        host.vms.loan_news(vm, news).await;
    }
    seen
}

/// As [`look`], where nothing has come to this host yet: a QEMU that is silent for a source's patience is ended.
async fn look_or_end(
    host: &Arc<Host>,
    vm: VmId,
    run: Option<&RunRecord>,
) -> (Option<Spawned>, Observed) {
    let mut looking = pin!(look(host, run));
    // A test that does not want to wait says so.
    let soon = host.failpoints.hit("destination.silent-soon").await.is_err();
    let patience = Duration::from_secs(if soon { 1 } else { LEASE_SECONDS });
    if let Ok(seen) = timeout(patience, &mut looking).await {
        return seen;
    }
    if let Some(run) = run {
        warn!(%vm, pid = run.process.pid, "a QEMU that waits for a guest does not answer; it is ended");
        let log = RunDir::new(&host.config.run_dir(), &run.name).qemu_log();
        let ended = Process::adopt(&run.process, &log).map(|process| process.kill());
        if !matches!(ended, Ok(Ok(()))) {
            warn!(%vm, ?ended, "it could not be ended");
        }
    }
    looking.await
}

/// Finds a QEMU again and looks at what its guest does. Waits for one that lives and is silent: what it does is not known,
/// and nothing may be decided before it is.
async fn look(host: &Arc<Host>, run: Option<&RunRecord>) -> (Option<Spawned>, Observed) {
    let Some(run) = run else { return (None, Observed::Gone) };
    let Found::Alive(qemu) = find_again(host, run).await else { return (None, Observed::Gone) };
    loop {
        match qemu.machine.status().await {
            Ok(status) if status.running => return (Some(*qemu), Observed::Running),
            Ok(status) if status.run_state == RunState::InMigrate => {
                return (Some(*qemu), Observed::Incoming);
            }
            Ok(_) => match Statistics::query(qemu.machine.qmp()).await {
                Ok(seen) if seen.status.is_postcopy() => {
                    return (Some(*qemu), Observed::Part);
                }
                Ok(_) => return (Some(*qemu), Observed::Stopped),
                Err(_) => sleep(Duration::from_millis(handoff::RESEND_INTERVAL_MS)).await,
            },
            Err(_) if qemu.process.exited().is_some() => return (None, Observed::Gone),
            Err(_) => {
                sleep(Duration::from_millis(handoff::RESEND_INTERVAL_MS)).await;
            }
        }
    }
}
