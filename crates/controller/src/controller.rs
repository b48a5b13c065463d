//! The controller's parts in one place, and what several of its modules need: finding a VM, a host's agent, a grant, a record.
//!
//! The calls of the public API are in the modules named after what they are about; this one decides nothing.

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use tokio::sync::watch;
use tokio::time::timeout;
use whimbrel_api::agent::VmReport;
use whimbrel_api::client::AgentClient;
use whimbrel_api::event::Event;
use whimbrel_api::migration::Migration;
use whimbrel_api::vm::{Vm, VmState};
use whimbrel_api::{ApiError, Epoch, ErrorCode, MigrationId, Name, VmId};
use whimbrel_pki::authority::{Authority, AuthorityError};
use whimbrel_pki::grant::{Claims, SignedGrant};
use whimbrel_pki::tls::{self, TlsConfigError};

use crate::config::Config;
use crate::contact;
use crate::events::Events;
use crate::hosts::Hosts;
use crate::metrics::Metrics;
use crate::migrate::Running;
use crate::plan::{self, Shelf};
use crate::renewal::{self, Own, OwnError};
use crate::store::{PlacementMove, Store, StoreError, VmRow, is_active};

/// How long a VM's new host is asked how the VM is, in seconds, before the next round is left to find out.
const MOVED_ANSWER_SECONDS: u64 = 2;

/// A running controller.
#[derive(Debug)]
pub struct Controller {
    store: Store,
    hosts: Hosts,
    events: Events,
    authority: Authority,
    own: Own,
    addresses: Vec<String>,
    running: Running,
    metrics: Metrics,
    shelf: Shelf,
    closing: watch::Sender<bool>,
    /// Held while a network or storage is made known to the hosts, so that reconcile does not do half of it at the same time.
    pub(crate) layout: tokio::sync::Mutex<()>,
    /// Held from looking which clones stand on a VM to deleting it, and while a clone's row is written.
    pub(crate) images: tokio::sync::Mutex<()>,
}

/// Why a controller cannot be started from its folder.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// The authority's files cannot be used.
    #[error("the pool's authority cannot be used")]
    Authority(#[from] AuthorityError),
    /// The controller's certificates cannot be used.
    #[error("the controller cannot show who it is")]
    Own(#[from] OwnError),
    /// The certificates do not make a TLS client.
    #[error("the controller's certificates cannot be used for TLS")]
    Tls(#[from] TlsConfigError),
    /// The database cannot be used.
    #[error("the controller's database cannot be used")]
    Store(#[from] StoreError),
    /// A host in the database cannot be spoken to.
    #[error("a host of the pool cannot be spoken to")]
    Host(#[source] ApiError),
}

/// A VM that has moved: what the destination confirmed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MovedPlacement {
    /// The VM.
    pub vm: VmId,
    /// Its host now.
    pub host: Name,
    /// The epoch in which that host owns it.
    pub epoch: Epoch,
    /// The definition's generation there.
    pub generation: u64,
    /// How the VM is there, if the host said so.
    pub state: Option<VmState>,
}

impl Controller {
    /// Opens a pool's folder. No host is asked anything yet: see [`Controller::start`].
    pub async fn open(config: &Config) -> Result<Arc<Self>, OpenError> {
        let authority = Authority::load(&config.dir)?;
        let own = Own::open(&config.dir, &authority)?;
        let hosts = Hosts::new(Arc::new(tls::client_config(&own.client())?));
        let store = Store::open(&config.database())?;
        for row in store.hosts().await? {
            hosts.insert(&row).map_err(OpenError::Host)?;
        }
        Ok(Arc::new(Self {
            store,
            hosts,
            events: Events::default(),
            authority,
            own,
            addresses: config.addresses.clone(),
            running: Running::default(),
            metrics: Metrics::default(),
            shelf: Shelf::default(),
            closing: watch::Sender::new(false),
            layout: tokio::sync::Mutex::default(),
            images: tokio::sync::Mutex::default(),
        }))
    }

    /// Starts the contact loop of every host, and looks after the controller's own certificates and what plans need.
    pub fn start(self: &Arc<Self>) {
        for member in self.hosts.all() {
            contact::spawn(self, member);
        }
        let controller = self.clone();
        tokio::spawn(async move {
            tokio::select! {
                () = renewal::keep_own(&controller) => {}
                () = plan::keep_cpus(&controller) => {}
                () = controller.closing() => {}
            }
        });
    }

    /// Asks every loop and stream to end.
    pub(crate) fn close(&self) {
        self.closing.send_replace(true);
    }

    /// Ends when [`Controller::close`] was called.
    pub async fn closing(&self) {
        let mut closing = self.closing.subscribe();
        // The sender is ours, so this ends only with the news.
        let _ = closing.wait_for(|closing| *closing).await;
    }

    /// The records.
    #[must_use]
    pub fn store(&self) -> &Store {
        &self.store
    }

    /// The hosts as they are now.
    #[must_use]
    pub fn hosts(&self) -> &Hosts {
        &self.hosts
    }

    /// The bulletin.
    #[must_use]
    pub fn events(&self) -> &Events {
        &self.events
    }

    /// The open migrations.
    pub(crate) fn running(&self) -> &Running {
        &self.running
    }

    /// What is counted.
    pub(crate) fn metrics(&self) -> &Metrics {
        &self.metrics
    }

    /// What was measured a moment ago.
    pub(crate) fn shelf(&self) -> &Shelf {
        &self.shelf
    }

    pub(crate) fn authority(&self) -> &Authority {
        &self.authority
    }

    pub(crate) fn own(&self) -> &Own {
        &self.own
    }

    pub(crate) fn addresses(&self) -> &[String] {
        &self.addresses
    }

    /// The client of a host's agent.
    pub fn agent(&self, host: &Name) -> Result<AgentClient, ApiError> {
        self.hosts.agent(host)
    }

    /// The signed permission for one migration: what both agents are shown. `source_epoch` is the epoch in which the
    /// source owns the VM now.
    pub fn grant(&self, record: &Migration, source_epoch: Epoch) -> Result<SignedGrant, ApiError> {
        let (not_before, expires) = Claims::window(SystemTime::now());
        let claims = Claims {
            vm: record.vm.to_string(),
            migration: record.id.to_string(),
            source: record.source.to_string(),
            destination: record.destination.to_string(),
            epoch: source_epoch.0,
            not_before,
            expires,
        };
        SignedGrant::sign(&claims, &self.own.client())
            .map_err(|error| ApiError::internal("cannot sign a grant", &error))
    }

    /// A VM by its name or id. A text that reads as an id is one; the names of VMs that look like ids are not found by name.
    pub async fn find_vm(&self, vm: &str) -> Result<VmRow, ApiError> {
        let found = match vm.parse::<VmId>() {
            Ok(id) => self.store.vm(id).await?,
            Err(_) => {
                let name = vm.parse::<Name>().map_err(|error| {
                    ApiError::new(
                        ErrorCode::BadName,
                        format!("not the name or id of a VM: {error}"),
                    )
                })?;
                self.store.vm_by_name(&name).await?
            }
        };
        found.ok_or_else(|| {
            ApiError::not_found("VM", vm.escape_debug()).hint("`whimbrel vm list` shows all")
        })
    }

    /// What the API says of a VM.
    #[must_use]
    pub fn view(&self, row: &VmRow) -> Vm {
        self.hosts.view(row)
    }

    /// One migration, with its latest figures.
    pub async fn migration(&self, id: MigrationId) -> Result<Migration, ApiError> {
        if let Some(latest) = self.events.latest(id) {
            return Ok(latest);
        }
        self.store.migration(id).await?.ok_or_else(|| ApiError::not_found("migration", id))
    }

    /// Writes a migration's record down, and then tells everybody.
    pub async fn save_migration(&self, record: &Migration) -> Result<(), ApiError> {
        self.store.save_migration(record).await?;
        if !is_active(&record.state) {
            // Both know something new of the VM.
            let ends = [self.hosts.get(&record.source), self.hosts.get(&record.destination)];
            ends.into_iter().flatten().for_each(|member| member.nudge());
        }
        self.events.publish(Event::Migration { migration: record.clone() });
        Ok(())
    }

    /// Moves a VM's placement: durably first, then in what the API says, then in the bulletin. Harmless when repeated.
    pub async fn move_placement(&self, moved: &MovedPlacement) -> Result<PlacementMove, ApiError> {
        let MovedPlacement { vm, host, epoch, generation, state } = moved;
        let result = self.store.move_placement(*vm, host, *epoch, *generation).await?;
        if result != PlacementMove::Moved {
            return Ok(result);
        }
        let Some(row) = self.store.vm(*vm).await? else { return Ok(PlacementMove::NoVm) };
        let member = self.hosts.get(host)?;
        // Else the VM would be told as unknown until the next round.
        let asked = member.agent();
        let answer = timeout(Duration::from_secs(MOVED_ANSWER_SECONDS), asked.vm(*vm)).await;
        match (answer, state) {
            (Ok(Ok(report)), _) => member.note_vm(report),
            (_, Some(state)) => member.note_vm(VmReport {
                definition: row.definition.clone(),
                state: state.clone(),
                epoch: *epoch,
                engine: None,
            }),
            (_, None) => {}
        }
        // The destination may have spoken of the VM before it was placed there; then its definition was not taken over.
        if let Some(report) = member.vm_report(*vm) {
            self.store.confirm_vm(host, report.epoch, &report.definition).await?;
        }
        member.nudge();
        self.publish_vm(&row);
        Ok(result)
    }

    /// Takes over what a host answered about a VM, and tells everybody. What does not count (another host, an earlier epoch) is
    /// noted as that host's word and changes nothing.
    pub(crate) async fn accept_report(
        &self,
        host: &Name,
        report: VmReport,
    ) -> Result<Option<VmRow>, ApiError> {
        let id = report.definition.id;
        self.hosts.get(host)?.note_vm(report.clone());
        self.store.confirm_vm(host, report.epoch, &report.definition).await?;
        let row = self.store.vm(id).await?;
        if let Some(row) = &row {
            self.publish_vm(row);
        }
        Ok(row)
    }

    pub(crate) fn publish_vm(&self, row: &VmRow) {
        self.events.publish(Event::Vm { vm: self.view(row) });
    }
}
