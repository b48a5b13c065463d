//! The pool's hosts as they are now: how to reach each agent, and what each said last.
//!
//! ```text
//! Joining ──answer──▶ Ready ◀──answer── Unreachable
//!    └─no answer for 5 s───┴──no answer──▶┘
//! ```
//!
//! Nothing here is durable and nothing here asks: [`crate::contact`] asks and notes the answers, the calls of the API note what
//! they were answered in between. **What a host says of a VM counts only if the VM is placed there, and only in the known epoch
//! or a later one**; a host that does not answer, or answers without naming the VM, leaves its state unknown. Silence is never
//! read as "stopped": that reading is how other systems came to run a VM twice.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};

use jiff::Timestamp;
use tokio::sync::Notify;
use whimbrel_api::agent::{HostReport, VmReport};
use whimbrel_api::client::AgentClient;
use whimbrel_api::pool::{Contact, Host, HostSummary};
use whimbrel_api::vm::{Vm, VmState};
use whimbrel_api::{ApiError, Name, VmId};
use whimbrel_pki::tls::ClientConfig;

use crate::store::{HostRow, VmRow};

/// All hosts of the pool.
#[derive(Debug)]
pub struct Hosts {
    by_name: RwLock<BTreeMap<Name, Arc<Member>>>,
    tls: RwLock<Arc<ClientConfig>>,
}

/// One host of the pool.
#[derive(Debug)]
pub struct Member {
    /// Its name.
    pub name: Name,
    seen: Mutex<Seen>,
    nudge: Notify,
}

/// What is known of a host, and since when.
#[derive(Debug)]
struct Seen {
    address: String,
    agent: AgentClient,
    enabled: bool,
    contact: Contact,
    report: Option<HostReport>,
    vms: BTreeMap<VmId, Noted>,
    /// Counts what was noted, so that an answer that was asked for earlier does not cover a later one.
    clock: u64,
}

#[derive(Debug, Clone)]
struct Noted {
    at: u64,
    report: VmReport,
}

/// The moment at which a host was asked for everything; see [`Member::note_answer`].
#[derive(Debug, Clone, Copy)]
pub(crate) struct Asked(u64);

/// What a host's answer changed.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Changed {
    /// The host itself: it came back, or its report differs in more than the free memory.
    pub(crate) host: bool,
    /// VMs whose report is new, differs or is gone.
    pub(crate) vms: Vec<VmId>,
}

impl Hosts {
    pub(crate) fn new(tls: Arc<ClientConfig>) -> Self {
        Self { by_name: RwLock::default(), tls: RwLock::new(tls) }
    }

    /// Makes a host known, or known under its new address; `true` if it is new.
    pub(crate) fn insert(&self, row: &HostRow) -> Result<(Arc<Member>, bool), ApiError> {
        let agent = AgentClient::new(&row.name, &row.address, self.tls())?;
        let mut by_name = self.by_name.write().unwrap_or_else(PoisonError::into_inner);
        if let Some(member) = by_name.get(&row.name) {
            let mut seen = member.seen();
            seen.address.clone_from(&row.address);
            seen.agent = agent;
            drop(seen);
            return Ok((member.clone(), false));
        }
        let seen = Seen {
            address: row.address.clone(),
            agent,
            enabled: row.enabled,
            contact: Contact::Joining,
            report: None,
            vms: BTreeMap::new(),
            clock: 0,
        };
        let member = Arc::new(Member {
            name: row.name.clone(),
            seen: Mutex::new(seen),
            nudge: Notify::new(),
        });
        by_name.insert(row.name.clone(), member.clone());
        Ok((member, true))
    }

    fn tls(&self) -> Arc<ClientConfig> {
        self.tls.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Calls every agent with this from now on.
    pub(crate) fn call_with(&self, tls: Arc<ClientConfig>) {
        *self.tls.write().unwrap_or_else(PoisonError::into_inner) = tls.clone();
        for member in self.all() {
            let mut seen = member.seen();
            match AgentClient::new(&member.name, &seen.address, tls.clone()) {
                Ok(agent) => seen.agent = agent,
                Err(error) => {
                    tracing::error!(host = %member.name, %error, "called with the old certificates");
                }
            }
        }
    }

    /// One host.
    pub fn get(&self, name: &Name) -> Result<Arc<Member>, ApiError> {
        let by_name = self.by_name.read().unwrap_or_else(PoisonError::into_inner);
        by_name.get(name).cloned().ok_or_else(|| ApiError::not_found("host", name))
    }

    /// All hosts, by name.
    #[must_use]
    pub fn all(&self) -> Vec<Arc<Member>> {
        let by_name = self.by_name.read().unwrap_or_else(PoisonError::into_inner);
        by_name.values().cloned().collect()
    }

    /// The client of a host's agent.
    pub fn agent(&self, name: &Name) -> Result<AgentClient, ApiError> {
        Ok(self.get(name)?.agent())
    }

    /// What the API says of a VM: its record, and what its host said last if that counts.
    pub(crate) fn view(&self, row: &VmRow) -> Vm {
        let seen = match self.get(&row.host) {
            Ok(member) => member.sight(row),
            Err(error) => Sight::Unknown(error.message),
        };
        let (state, epoch, engine, definition) = match seen {
            Sight::Report(report) => (report.state, report.epoch, report.engine, report.definition),
            Sight::Unknown(why) => {
                (VmState::Unknown { why }, row.epoch, None, row.definition.clone())
            }
        };
        Vm {
            id: row.id(),
            name: row.name().clone(),
            host: row.host.clone(),
            state,
            epoch,
            engine,
            definition,
        }
    }
}

/// What can be said of a VM at its host.
enum Sight {
    Report(Box<VmReport>),
    Unknown(String),
}

impl From<VmReport> for Sight {
    fn from(report: VmReport) -> Self {
        Sight::Report(Box::new(report))
    }
}

impl Member {
    fn seen(&self) -> MutexGuard<'_, Seen> {
        self.seen.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The client of its agent.
    #[must_use]
    pub fn agent(&self) -> AgentClient {
        self.seen().agent.clone()
    }

    /// Whether it takes new VMs and is a destination.
    #[must_use]
    pub fn is_enabled(&self) -> bool {
        self.seen().enabled
    }

    /// What it said of itself last, if it answers now.
    #[must_use]
    pub fn ready_report(&self) -> Option<HostReport> {
        let seen = self.seen();
        match seen.contact {
            Contact::Ready { .. } => seen.report.clone(),
            Contact::Joining | Contact::Unreachable { .. } => None,
        }
    }

    /// What the API says of it.
    #[must_use]
    pub fn view(&self) -> Host {
        let seen = self.seen();
        Host {
            name: self.name.clone(),
            address: seen.address.clone(),
            enabled: seen.enabled,
            contact: seen.contact.clone(),
            facts: seen.report.as_ref().map(summary),
        }
    }

    pub(crate) fn set_enabled(&self, enabled: bool) {
        self.seen().enabled = enabled;
    }

    /// Asks the contact loop to ask now.
    pub fn nudge(&self) {
        self.nudge.notify_one();
    }

    pub(crate) async fn nudged(&self) {
        self.nudge.notified().await;
    }

    /// Call it before asking for everything.
    pub(crate) fn asking(&self) -> Asked {
        Asked(self.seen().clock)
    }

    /// Notes the answer to a question for everything. Of a VM that was noted after the question was asked, the later word stays.
    pub(crate) fn note_answer(
        &self,
        asked: Asked,
        now: Timestamp,
        report: HostReport,
        vms: Vec<VmReport>,
    ) -> Changed {
        let mut seen = self.seen();
        let mut changed = Changed {
            host: !matches!(seen.contact, Contact::Ready { .. })
                || !seen.report.as_ref().is_some_and(|before| same_but_memory(before, &report)),
            vms: Vec::new(),
        };
        seen.contact = Contact::Ready { seen: now };
        seen.report = Some(report);
        let mut next: BTreeMap<VmId, Noted> = BTreeMap::new();
        for report in vms {
            next.insert(report.definition.id, Noted { at: asked.0, report });
        }
        for (id, noted) in &seen.vms {
            if noted.at > asked.0 {
                next.insert(*id, noted.clone());
            }
        }
        let ids = seen.vms.keys().chain(next.keys());
        let differs = |id: &&VmId| {
            seen.vms.get(*id).map(|noted| &noted.report) != next.get(*id).map(|noted| &noted.report)
        };
        changed.vms = ids.filter(differs).copied().collect();
        changed.vms.sort_unstable();
        changed.vms.dedup();
        seen.vms = next;
        changed
    }

    /// Notes that the host did not answer; `true` if it did before.
    pub(crate) fn note_silence(&self, now: Timestamp, why: &str) -> bool {
        let mut seen = self.seen();
        let since = match &seen.contact {
            Contact::Unreachable { since, .. } => *since,
            Contact::Joining | Contact::Ready { .. } => now,
        };
        let news = !matches!(&seen.contact, Contact::Unreachable { .. });
        seen.contact = Contact::Unreachable { since, why: why.to_owned() };
        news
    }

    /// Notes what the host answered about one VM.
    pub(crate) fn note_vm(&self, report: VmReport) {
        let mut seen = self.seen();
        seen.clock += 1;
        let noted = Noted { at: seen.clock, report };
        seen.vms.insert(noted.report.definition.id, noted);
    }

    /// Forgets what the host said of a VM that is gone from it.
    pub(crate) fn forget_vm(&self, id: VmId) {
        self.seen().vms.remove(&id);
    }

    /// What the host said last of a VM.
    pub(crate) fn vm_report(&self, id: VmId) -> Option<VmReport> {
        self.seen().vms.get(&id).map(|noted| noted.report.clone())
    }

    fn sight(&self, row: &VmRow) -> Sight {
        let seen = self.seen();
        let host = &self.name;
        match &seen.contact {
            Contact::Joining => {
                return Sight::Unknown(format!("{host} has not been heard of yet"));
            }
            Contact::Unreachable { since, why } => {
                return Sight::Unknown(format!("{host} does not answer since {since:.0}: {why}"));
            }
            Contact::Ready { .. } => {}
        }
        match seen.vms.get(&row.id()) {
            Some(noted) if noted.report.epoch >= row.epoch => noted.report.clone().into(),
            Some(_) => Sight::Unknown(format!("{host} speaks of an earlier time of this VM")),
            None if row.confirmed => Sight::Unknown(format!("{host} does not speak of this VM")),
            None => Sight::Unknown(format!("{host} was asked to create it and has not confirmed")),
        }
    }
}

/// The part of a host's report that people look at.
fn summary(report: &HostReport) -> HostSummary {
    HostSummary {
        version: report.version.clone(),
        cpus: report.cpus,
        cpu_model: report.cpu_model.clone(),
        memory_total_bytes: report.memory_total_bytes,
        memory_available_bytes: report.memory_available_bytes,
        engines: report.engines.clone(),
        networks: report.networks.clone(),
        storages: report.storages.clone(),
        vms: report.vms,
        certificate_days_left: report.certificate_days_left,
    }
}

/// Whether two reports differ in nothing but what changes from moment to moment.
fn same_but_memory(before: &HostReport, after: &HostReport) -> bool {
    let steady = |report: &HostReport| {
        let mut steady = report.clone();
        steady.memory_available_bytes = 0;
        for storage in &mut steady.storages {
            storage.available_bytes = 0;
        }
        steady
    };
    steady(before) == steady(after)
}
