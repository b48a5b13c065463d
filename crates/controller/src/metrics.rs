//! What the controller counts, for Prometheus: how migrations end and what they take, the pool's hosts and VMs.
//!
//! Counters and histograms begin with the process, as Prometheus expects it; the records of single migrations are in the store.
//! The figures of a migration that runs are told by its source's agent. Nothing is decided by any of it. Called by
//! [`crate::http`], and by [`crate::migrate`] when something begins or ends.

use std::time::SystemTime;

use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::histogram::Histogram;
use whimbrel_api::metrics::{Labels, Scrape, counted, word};
use whimbrel_api::migration::{Migration, MigrationState, Stay};
use whimbrel_api::pool::{Contact, Host};
use whimbrel_api::vm::Vm;
use whimbrel_api::{ApiError, Downtime, Phase, Verdict};
use whimbrel_migration::preflight::{Code, Severity};
use whimbrel_migration::strategy::Rung;

use crate::{Controller, policies};

/// Upper bounds of how long a migration takes, in seconds.
const TOTAL_BOUNDS_SECONDS: [f64; 13] =
    [0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 300.0, 900.0, 3600.0];
/// Upper bounds of a pause, in seconds.
const DOWNTIME_BOUNDS_SECONDS: [f64; 12] =
    [0.005, 0.01, 0.02, 0.03, 0.05, 0.1, 0.2, 0.3, 0.5, 1.0, 5.0, 30.0];
/// Upper bounds of what is added to QEMU's own time, in seconds.
const ADDED_BOUNDS_SECONDS: [f64; 9] = [0.05, 0.1, 0.2, 0.3, 0.5, 1.0, 2.0, 5.0, 15.0];
/// Upper bounds of what is sent, in bytes: 16 MiB to 1 TiB, in steps of four.
const SENT_BOUNDS_BYTES: [f64; 9] = [
    16_777_216.0,
    67_108_864.0,
    268_435_456.0,
    1_073_741_824.0,
    4_294_967_296.0,
    17_179_869_184.0,
    68_719_476_736.0,
    274_877_906_944.0,
    1_099_511_627_776.0,
];
/// How a migration can end.
const OUTCOMES: [&str; 2] = ["moved", "stayed"];
/// Why a VM can have stayed.
const CAUSES: [&str; 5] =
    ["cancelled", "failed", "destination-refused", "guest-powered-off", "reclaimed"];
/// How the contact with a host can be.
const CONTACTS: [&str; 3] = ["joining", "ready", "unreachable"];
/// The states of a VM as the pool knows them.
const VM_STATES: [&str; 7] =
    ["stopped", "running", "paused", "crashed", "migrating", "unresolved", "unknown"];
/// What stands for a rung or policy where a record has none: a move without memory, or one that is older than policies.
const NONE: &str = "none";

type Histograms = Family<Labels<1>, Histogram, fn() -> Histogram>;

/// What is kept from one scrape to the next.
#[derive(Debug)]
pub(crate) struct Metrics {
    begun: Counter,
    refused: Family<Labels<1>, Counter>,
    ended: Family<Labels<2>, Counter>,
    by_policy: Family<Labels<2>, Counter>,
    stayed: Family<Labels<2>, Counter>,
    seconds: Histograms,
    downtime_seconds: Histograms,
    downtime_part_seconds: Family<Labels<1>, Counter<f64, std::sync::atomic::AtomicU64>>,
    added_seconds: Histograms,
    sent_bytes: Histograms,
    recoveries: Counter,
    blocked_seconds: Counter<f64, std::sync::atomic::AtomicU64>,
}

impl Default for Metrics {
    fn default() -> Self {
        let metrics = Self::without_series();
        metrics.prepare();
        metrics
    }
}

impl Metrics {
    fn without_series() -> Self {
        let histograms = |of: fn() -> Histogram| Family::new_with_constructor(of);
        Self {
            begun: Counter::default(),
            refused: Family::default(),
            ended: Family::default(),
            by_policy: Family::default(),
            stayed: Family::default(),
            seconds: histograms(|| Histogram::new(TOTAL_BOUNDS_SECONDS)),
            downtime_seconds: histograms(|| Histogram::new(DOWNTIME_BOUNDS_SECONDS)),
            downtime_part_seconds: Family::default(),
            added_seconds: histograms(|| Histogram::new(ADDED_BOUNDS_SECONDS)),
            sent_bytes: histograms(|| Histogram::new(SENT_BOUNDS_BYTES)),
            recoveries: Counter::default(),
            blocked_seconds: Counter::default(),
        }
    }

    /// Makes the series that there can be: of one that begins with 1 no increase is seen.
    fn prepare(&self) {
        for rung in Rung::ALL.iter().map(|rung| word(rung, "")).chain([NONE.to_owned()]) {
            for outcome in OUTCOMES {
                let labels = [("outcome", outcome.to_owned()), ("rung", rung.clone())];
                drop(self.ended.get_or_create(&labels));
            }
            let rung = [("rung", rung)];
            for family in
                [&self.seconds, &self.downtime_seconds, &self.added_seconds, &self.sent_bytes]
            {
                drop(family.get_or_create(&rung));
            }
        }
        for (cause, phase) in CAUSES.iter().flat_map(|cause| Phase::ALL.map(|phase| (cause, phase)))
        {
            let labels = [("cause", (*cause).to_owned()), ("phase", phase.to_string())];
            drop(self.stayed.get_or_create(&labels));
        }
        for code in Code::ALL {
            drop(self.refused.get_or_create(&[("verdict", code.as_str().to_owned())]));
        }
        for (part, _) in parts(&Downtime::default()) {
            drop(self.downtime_part_seconds.get_or_create(&[("part", part.to_owned())]));
        }
    }

    /// The same for the policies that there are.
    fn prepare_policies(&self, policies: impl IntoIterator<Item = String>) {
        for policy in policies {
            for outcome in OUTCOMES {
                let labels = [("outcome", outcome.to_owned()), ("policy", policy.clone())];
                drop(self.by_policy.get_or_create(&labels));
            }
        }
    }

    /// Counts a migration that was admitted.
    pub(crate) fn begun(&self) {
        self.begun.inc();
    }

    /// Counts each verdict that has refused a migration.
    pub(crate) fn refused(&self, verdicts: &[Verdict]) {
        for verdict in verdicts.iter().filter(|verdict| verdict.severity == Severity::Refuse) {
            let code = [("verdict", verdict.code.as_str().to_owned())];
            self.refused.get_or_create(&code).inc();
        }
    }

    /// Counts a migration that has ended, by its record.
    pub(crate) fn ended(&self, record: &Migration) {
        let strategy = record.strategy.as_ref();
        let rung = strategy.map_or_else(|| NONE.to_owned(), |strategy| word(&strategy.rung, ""));
        let policy = record.policy.as_ref().map_or(NONE, |policy| policy.as_str()).to_owned();
        let outcome = word(&record.state, "outcome");
        let labels = [("outcome", outcome.clone()), ("rung", rung.clone())];
        self.ended.get_or_create(&labels).inc();
        self.by_policy.get_or_create(&[("outcome", outcome), ("policy", policy)]).inc();
        match &record.state {
            MigrationState::Moved => self.moved(record, &[("rung", rung)]),
            MigrationState::Stayed { why } => {
                let phase = match why {
                    Stay::Failed { phase, .. } => *phase,
                    _ => record.phase,
                };
                let labels = [("cause", word(why, "cause")), ("phase", phase.to_string())];
                self.stayed.get_or_create(&labels).inc();
            }
            MigrationState::Running
            | MigrationState::Refused
            | MigrationState::Unresolved { .. } => {}
        }
        if let Some(postcopy) = &record.postcopy {
            self.recoveries.inc_by(postcopy.recoveries);
            self.blocked_seconds.inc_by(seconds_of_ms(postcopy.blocktime_ms.unwrap_or(0)));
        }
    }

    fn moved(&self, record: &Migration, rung: &Labels<1>) {
        if let Some(total_ms) = record.total_ms {
            self.seconds.get_or_create(rung).observe(seconds_of_ms(total_ms));
            if let Some(progress) = &record.progress {
                let added_ms = total_ms.saturating_sub(progress.engine_total_ms);
                self.added_seconds.get_or_create(rung).observe(seconds_of_ms(added_ms));
            }
        }
        if let Some(progress) = &record.progress {
            self.sent_bytes.get_or_create(rung).observe(progress.transferred_bytes as f64);
        }
        if let Some(downtime) = &record.downtime {
            let seconds = seconds_of_us(downtime.total_us);
            self.downtime_seconds.get_or_create(rung).observe(seconds);
            for (part, us) in parts(downtime) {
                let part = [("part", part.to_owned())];
                self.downtime_part_seconds.get_or_create(&part).inc_by(seconds_of_us(us));
            }
        }
    }
}

/// The named parts of a pause, in microseconds, and what no part accounts for.
fn parts(downtime: &Downtime) -> [(&'static str, u64); 5] {
    [
        ("stop_to_completed", downtime.stop_to_completed_us),
        ("loaded_confirm", downtime.loaded_confirm_us),
        ("release", downtime.release_us),
        ("go", downtime.go_us),
        ("unnamed", downtime.unnamed_us()),
    ]
}

fn seconds_of_ms(ms: u64) -> f64 {
    ms as f64 / 1e3
}

fn seconds_of_us(us: u64) -> f64 {
    us as f64 / 1e6
}

/// The pool as it is at a scrape.
#[derive(Debug, Default)]
struct Now {
    hosts: Vec<Host>,
    vms: Vec<Vm>,
    /// Those that hold their VM.
    active: Vec<Migration>,
    /// Those that have ended and left something.
    unswept: usize,
    certificate_days_left: i64,
    authority_days_left: i64,
}

/// Everything that the controller tells.
///
/// # Errors
/// Where the records cannot be read.
pub(crate) async fn scrape(controller: &Controller) -> Result<Scrape, ApiError> {
    let store = controller.store();
    let (vms, active) = (store.vms().await?, store.active_migrations().await?);
    // What a host sees of a migration on the way is in its latest word, not yet in the store.
    let latest = |record: Migration| controller.events().latest(record.id).unwrap_or(record);
    let clock = SystemTime::now();
    let now = Now {
        hosts: controller.hosts().all().iter().map(|member| member.view()).collect(),
        vms: vms.iter().map(|row| controller.view(row)).collect(),
        active: active.into_iter().map(latest).collect(),
        unswept: store.unswept_migrations().await?.len(),
        certificate_days_left: controller.own().client().certificate.days_left(clock),
        authority_days_left: controller.authority().certificate().days_left(clock),
    };
    let policies = policies::list(controller).await?;
    let names = policies.iter().map(|status| status.policy.name.to_string());
    controller.metrics().prepare_policies(names);
    Ok(told(&now, controller.metrics()))
}

fn told(now: &Now, kept: &Metrics) -> Scrape {
    let mut scrape = Scrape::of("controller");
    of_pool(&mut scrape, now);
    of_active(&mut scrape, now);
    of_ended(&mut scrape, kept);
    of_moved(&mut scrape, kept);
    scrape
}

fn of_pool(scrape: &mut Scrape, now: &Now) {
    let contacts = counted(&CONTACTS, now.hosts.iter().map(|host| word(&host.contact, "state")));
    scrape.gauges(
        "whimbrel_controller_hosts",
        "Hosts of the pool, by how the contact with them is",
        contacts.into_iter().map(|(contact, count)| ([("contact", contact)], count)),
    );
    let answers = |host: &Host| f64::from(u8::from(matches!(host.contact, Contact::Ready { .. })));
    scrape.gauges(
        "whimbrel_controller_host_reachable",
        "Whether a host answers; where not, what runs there is unknown",
        now.hosts.iter().map(|host| ([("host", host.name.to_string())], answers(host))),
    );
    let states = counted(&VM_STATES, now.vms.iter().map(|vm| vm.state.word().to_owned()));
    scrape.gauges(
        "whimbrel_controller_vms",
        "VMs of the pool, by state",
        states.into_iter().map(|(state, count)| ([("state", state)], count)),
    );
    scrape.gauge(
        "whimbrel_controller_certificate_days_left",
        "Days until the controller's certificate expires",
        now.certificate_days_left as f64,
    );
    scrape.gauge(
        "whimbrel_controller_authority_days_left",
        "Days until the pool's authority expires",
        now.authority_days_left as f64,
    );
}

fn of_active(scrape: &mut Scrape, now: &Now) {
    let running = now.active.iter().filter(|one| one.state == MigrationState::Running);
    let known = Phase::ALL.map(Phase::as_str);
    let phases = counted(&known, running.map(|record| record.phase.to_string()));
    scrape.gauges(
        "whimbrel_controller_migrations_running",
        "Migrations that run, by phase",
        phases.into_iter().map(|(phase, count)| ([("phase", phase)], count)),
    );
    let unresolved =
        now.active.iter().filter(|one| matches!(one.state, MigrationState::Unresolved { .. }));
    scrape.gauge(
        "whimbrel_controller_migrations_unresolved",
        "Migrations of which nobody knows how they ended: the VM stands still until a host is asked",
        unresolved.count() as f64,
    );
    scrape.gauge(
        "whimbrel_controller_migrations_unswept",
        "Migrations that have ended and left something that is not swept yet",
        now.unswept as f64,
    );
}

fn of_ended(scrape: &mut Scrape, kept: &Metrics) {
    scrape.kept("whimbrel_controller_migrations_begun", "Migrations admitted", kept.begun.clone());
    scrape.kept(
        "whimbrel_controller_migrations_refused",
        "Verdicts that have refused a migration: nothing was begun",
        kept.refused.clone(),
    );
    scrape.kept(
        "whimbrel_controller_migrations_ended",
        "Migrations that have ended, by outcome and rung of the ladder",
        kept.ended.clone(),
    );
    scrape.kept(
        "whimbrel_controller_migrations_by_policy",
        "Migrations that have ended, by outcome and policy",
        kept.by_policy.clone(),
    );
    scrape.kept(
        "whimbrel_controller_migrations_stayed",
        "Migrations whose VM stayed, by cause and phase",
        kept.stayed.clone(),
    );
    scrape.kept(
        "whimbrel_controller_postcopy_recoveries",
        "Lost connections of post-copies that were made again, of ended migrations",
        kept.recoveries.clone(),
    );
    scrape.kept(
        "whimbrel_controller_postcopy_blocked_seconds",
        "Time that all vCPUs at once waited for pages in post-copy, where QEMU counts it",
        kept.blocked_seconds.clone(),
    );
}

fn of_moved(scrape: &mut Scrape, kept: &Metrics) {
    scrape.kept(
        "whimbrel_controller_migration_seconds",
        "Request to running on the destination, of moved VMs",
        kept.seconds.clone(),
    );
    scrape.kept(
        "whimbrel_controller_migration_added_seconds",
        "What of that is not QEMU's own time",
        kept.added_seconds.clone(),
    );
    scrape.kept(
        "whimbrel_controller_migration_downtime_seconds",
        "Pause of moved guests",
        kept.downtime_seconds.clone(),
    );
    scrape.kept(
        "whimbrel_controller_migration_downtime_part_seconds",
        "Pause of moved guests, by its parts",
        kept.downtime_part_seconds.clone(),
    );
    scrape.kept(
        "whimbrel_controller_migration_sent_bytes",
        "Bytes sent of moved VMs",
        kept.sent_bytes.clone(),
    );
}

#[cfg(test)]
mod tests;
