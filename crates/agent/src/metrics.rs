//! What the agent counts, for Prometheus: its VMs, the migrations that leave and come, its ledger, what it could not sweep.
//!
//! How migrations ended and how long they took the controller tells; here is what the host itself sees, also where there is no
//! controller. The figures of a running migration are told by its source, one series for each VM on its way. Nothing is decided
//! by any of it. Called by [`crate::http`].

use std::collections::HashMap;
use std::time::Duration;

use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::Histogram;
use tokio::time::timeout;
use whimbrel_api::agent::{OutgoingEnd, OutgoingReport, VmReport};
use whimbrel_api::metrics::{Labels, Scrape, counted, word};
use whimbrel_api::migration::{PostcopyState, Progress};
use whimbrel_api::{Phase, VmId};

use crate::host::Host;

/// How long the ledger may take to answer a scrape, in milliseconds: where its disk hangs the rest is told all the same.
const LEDGER_MILLISECONDS: u64 = 1_000;
/// Upper bounds of the time that a write to the ledger takes, in seconds.
const WRITE_BOUNDS_SECONDS: [f64; 13] =
    [0.000_5, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.25, 0.5, 1.0, 4.0, 16.0];
/// A page of guest memory where QEMU does not say how large it is, in bytes.
const PAGE_BYTES: u64 = 4096;
/// The states of a VM as its host knows them.
const VM_STATES: [&str; 7] =
    ["stopped", "running", "paused", "crashed", "migrating", "unresolved", "unknown"];
/// The states of a post-copy.
const POSTCOPY_STATES: [&str; 4] = ["active", "paused", "recovering", "done"];

/// What is kept from one scrape to the next, besides what the ledger keeps of itself.
#[derive(Debug, Default)]
pub struct Metrics {
    /// What the last sweep could not take down.
    sweep_left: Gauge,
}

impl Metrics {
    /// Notes how much a sweep could not take down.
    pub(crate) fn swept(&self, left: usize) {
        self.sweep_left.set(i64::try_from(left).unwrap_or(i64::MAX));
    }
}

/// What the ledger keeps of the time that its writes take, from the asking to the disk.
pub(crate) fn write_seconds() -> Histogram {
    Histogram::new(WRITE_BOUNDS_SECONDS)
}

/// The host as it is at a scrape.
#[derive(Debug, Default)]
struct Now {
    vms: Vec<VmReport>,
    /// None where the ledger does not answer.
    engines: Option<usize>,
    incoming: usize,
    outgoing: Vec<OutgoingReport>,
    certificate_days_left: i64,
}

/// Everything that the agent tells.
pub async fn scrape(host: &Host) -> Scrape {
    let patience = Duration::from_millis(LEDGER_MILLISECONDS);
    let runs = timeout(patience, host.ledger.runs()).await;
    let now = Now {
        vms: host.vms.reports(),
        engines: runs.ok().and_then(Result::ok).map(|runs| runs.len()),
        incoming: host.migrations.incoming_open(),
        outgoing: host.migrations.outgoing_reports(),
        certificate_days_left: host.certificate_days_left(),
    };
    told(&now, &host.metrics, host.ledger.write_seconds())
}

fn told(now: &Now, kept: &Metrics, writes: &Histogram) -> Scrape {
    let mut scrape = Scrape::of("agent");
    of_host(&mut scrape, now);
    scrape.kept(
        "whimbrel_agent_ledger_write_seconds",
        "Time of a write to the ledger, from the asking to the disk",
        writes.clone(),
    );
    scrape.kept(
        "whimbrel_agent_sweep_left",
        "Things that the last sweep could not take down or left alone because it was not sure",
        kept.sweep_left.clone(),
    );
    of_outgoing(&mut scrape, now);
    of_postcopy(&mut scrape, now);
    scrape
}

fn of_host(scrape: &mut Scrape, now: &Now) {
    let states = counted(&VM_STATES, now.vms.iter().map(|vm| vm.state.word().to_owned()));
    scrape.gauges(
        "whimbrel_agent_vms",
        "VMs of this host, by state",
        states.into_iter().map(|(state, count)| ([("state", state)], count)),
    );
    scrape.gauge(
        "whimbrel_agent_ledger_answers",
        "Whether the ledger answers: 0 where its disk hangs or fails",
        f64::from(u8::from(now.engines.is_some())),
    );
    if let Some(engines) = now.engines {
        let help = "QEMU processes that the ledger knows";
        scrape.gauge("whimbrel_agent_qemu_processes", help, engines as f64);
    }
    scrape.gauge(
        "whimbrel_agent_certificate_days_left",
        "Days until the first of this host's certificates expires",
        now.certificate_days_left as f64,
    );
    scrape.gauge(
        "whimbrel_agent_migrations_incoming",
        "Migrations on their way to this host",
        now.incoming as f64,
    );
}

/// Those that have not ended here.
fn open(now: &Now) -> impl Iterator<Item = &OutgoingReport> {
    now.outgoing
        .iter()
        .filter(|report| matches!(report.end, OutgoingEnd::Open | OutgoingEnd::Unresolved { .. }))
}

fn of_outgoing(scrape: &mut Scrape, now: &Now) {
    let known = Phase::ALL.map(Phase::as_str);
    let phases = counted(&known, open(now).map(|report| report.phase.to_string()));
    scrape.gauges(
        "whimbrel_agent_migrations_outgoing",
        "Migrations on their way from this host, by phase",
        phases.into_iter().map(|(phase, count)| ([("phase", phase)], count)),
    );
    let unresolved = open(now).filter(|one| matches!(one.end, OutgoingEnd::Unresolved { .. }));
    scrape.gauge(
        "whimbrel_agent_migrations_unresolved",
        "Migrations that this host has handed over without having heard that the VM runs: it stands still",
        unresolved.count() as f64,
    );
    for (name, help, figure) in FIGURES {
        let figures = of_each(now)
            .filter_map(|(labels, report)| Some((labels, figure(report.progress.as_ref()?)?)));
        scrape.gauges(name, help, figures);
    }
}

type Figure = fn(&Progress) -> Option<f64>;

/// The figures of a VM on its way.
const FIGURES: [(&str, &str, Figure); 8] = [
    ("whimbrel_agent_migration_memory_bytes", "Memory of a VM on its way", |progress| {
        Some(progress.ram_total_bytes as f64)
    }),
    ("whimbrel_agent_migration_transferred_bytes", "Bytes sent of a VM on its way", |progress| {
        Some(progress.transferred_bytes as f64)
    }),
    ("whimbrel_agent_migration_remaining_bytes", "Bytes still to send in this pass", |progress| {
        Some(progress.ram_remaining_bytes as f64)
    }),
    ("whimbrel_agent_migration_passes", "Passes over the memory of a VM on its way", |progress| {
        Some(progress.passes as f64)
    }),
    (
        "whimbrel_agent_migration_dirty_bytes_per_second",
        "What the guest writes anew, as QEMU counts it",
        |progress| {
            let page = progress.page_size_bytes.unwrap_or(PAGE_BYTES);
            Some(progress.dirty_pages_per_s as f64 * page as f64)
        },
    ),
    ("whimbrel_agent_migration_link_bytes_per_second", "The rate of a VM's stream", |progress| {
        Some(progress.bits_per_s as f64 / 8.0)
    }),
    (
        "whimbrel_agent_migration_throttle_ratio",
        "How hard the guest is slowed down, 0 to 1",
        |progress| Some(progress.throttle_percent.unwrap_or(0) as f64 / 100.0),
    ),
    (
        "whimbrel_agent_migration_expected_downtime_seconds",
        "QEMU's guess of the pause if the copy ended now",
        |progress| progress.expected_downtime_ms.map(|ms| ms as f64 / 1000.0),
    ),
];

/// The open migrations with their VMs' names.
fn of_each(now: &Now) -> impl Iterator<Item = (Labels<1>, &OutgoingReport)> {
    let of_vm = |vm: &VmReport| (vm.definition.id, vm.definition.name.to_string());
    let names: HashMap<VmId, String> = now.vms.iter().map(of_vm).collect();
    open(now).map(move |report| {
        let name = names.get(&report.vm).cloned().unwrap_or_else(|| report.vm.to_string());
        ([("vm", name)], report)
    })
}

fn of_postcopy(scrape: &mut Scrape, now: &Now) {
    let running = || of_each(now).filter_map(|(vm, report)| Some((vm, report.postcopy.as_ref()?)));
    let states = running().flat_map(|([vm], postcopy)| {
        let state = word(&postcopy.state, "state");
        let is = move |known: &str| f64::from(u8::from(known == state));
        POSTCOPY_STATES.map(|known| ([vm.clone(), ("state", known.to_owned())], is(known)))
    });
    scrape.gauges(
        "whimbrel_agent_postcopy_state",
        "1 for the state in which the post-copy of a VM is, else 0",
        states,
    );
    let lost =
        |state: &PostcopyState| matches!(state, PostcopyState::Paused { by_hand: false, .. });
    scrape.gauges(
        "whimbrel_agent_postcopy_lost",
        "1 where a post-copy waits because its connection is lost; 0 where it goes on or was paused by hand",
        running().map(|(vm, postcopy)| (vm, f64::from(u8::from(lost(&postcopy.state))))),
    );
    scrape.gauges(
        "whimbrel_agent_postcopy_recoveries",
        "How often the lost connection of a post-copy was made again",
        running().map(|(vm, postcopy)| (vm, postcopy.recoveries as f64)),
    );
}

#[cfg(test)]
mod tests;
