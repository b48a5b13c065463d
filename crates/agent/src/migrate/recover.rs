//! After a restart of the agent: every open migration goes on from what the ledger says.
//!
//! Nothing is guessed. The request says with whom, the ownership record what may be done, QEMU itself how it is; the rules
//! ([`whimbrel_migration::handoff::recover`]) make of that what is to be done first. A copy that was under way is given up,
//! and the guest goes on here; a VM that was released is asked for until its destination answers.
//!
//! Called once by [`crate::run`], after the VMs have been found again and before the door opens.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{mpsc, watch};
use tokio::time::sleep;
use tracing::{info, warn};
use whimbrel_api::agent::{
    IncomingReport, IncomingRequest, OutgoingEnd, OutgoingReport, OutgoingRequest,
};
use whimbrel_api::migration::Stay;
use whimbrel_api::vm::VmState;
use whimbrel_api::{ApiError, ErrorCode, Phase};
use whimbrel_migration::handoff::{self, Observed, Ownership, Recovered, Standing};
use whimbrel_qemu::machine::RunState;
use whimbrel_qemu::migrate::Statistics;

use super::source::samples::Samples;
use super::{
    Incoming, IncomingState, ORDERS_MAX, Outgoing, depart, destination, source, watch_over,
};
use crate::host::Host;
use crate::ledger::{MigrationRow, RunRecord, Side};
use crate::vm::found::{Found, find_again};
use crate::vm::spawn::sweep_run;
use crate::vm::{RunningVm, Spawned};

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
    let ended: Option<OutgoingReport> =
        serde_json::from_value(row.state).map_err(|error| unreadable(&error))?;
    let record = host.ledger.ownership(row.vm, Some(row.id)).await?;
    let mut report = ended.clone().unwrap_or_else(|| OutgoingReport::begun(row.id, row.vm));
    let (orders, inbox) = mpsc::channel(ORDERS_MAX);
    let open = record.as_ref().filter(|record| record.is_open());
    let Some(open) = open else {
        if ended.is_none() {
            report.end = end_of(record.as_ref());
        }
        let (report, samples) = (watch::Sender::new(report), Samples::default());
        let ended = Outgoing { vm: row.vm, orders, report, samples };
        host.migrations.open().outgoing.insert(row.id, ended);
        return Ok(());
    };
    if matches!(open.standing, Standing::Released { .. } | Standing::Serving { .. }) {
        report.phase = Phase::Handoff;
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
        let (qemu, observed) = look(&host, run.as_ref()).await;
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

/// How an outgoing migration ended whose report the agent did not live to write.
fn end_of(record: Option<&Ownership>) -> OutgoingEnd {
    match record.map(|record| &record.standing) {
        Some(Standing::Gone { .. }) => OutgoingEnd::Moved,
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
        let (target, observed) = look(&host, run.as_ref()).await;
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
