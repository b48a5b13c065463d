//! Hosts that live in memory: agents that speak the whole agent API through the real door, without QEMU, bridges or files.
//!
//! ```text
//! FakeWorld ── one mutex ──▶ every host's networks, storages, VMs, incoming and outgoing sides
//!     └── FakeAgent "host-a" (TLS on 127.0.0.1) ◀── the controller under test
//! ```
//!
//! A fake host keeps the promises that the real one keeps (idempotent by id, refuses by state) as long as it is not told to do
//! otherwise: it can be made to refuse the next call, to see another file system, to fall silent, and to lie about its VMs. A
//! migration goes through its phases by itself, at the world's [`Pace`]. For tests of this crate and, with the feature `fake`,
//! of others; never part of a binary.

mod calls;
mod lineage;
mod measuring;
mod moves;
mod reclaim;
mod steering;

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::net::TcpListener;
use tokio::sync::{Notify, oneshot, watch};
use whimbrel_api::agent::{
    EngineReport, HostReport, IncomingReport, IncomingRequest, OutgoingReport, OutgoingRequest,
    VmReport,
};
use whimbrel_api::migration::{Decision, LiveSettings, PostcopyState, Stay};
use whimbrel_api::pool::{Network, Storage};
use whimbrel_api::vm::{RunningEngine, VmDefinition, VmState};
use whimbrel_api::{ApiError, Epoch, MigrationId, Name, VmId};
use whimbrel_pki::door::{Door, Listener};
use whimbrel_pki::files::HostIdentity;
use whimbrel_pki::tls::{self, ServerConfig};

/// Memory of a fake host that is free at first, in bytes.
pub const MEMORY_BYTES: u64 = 8 << 30;

/// How a migration goes.
#[derive(Debug, Clone)]
pub enum Pace {
    /// Each phase takes so long, and the VM moves.
    Moves(Duration),
    /// The copying fails after so long.
    Fails(Duration, Stay),
    /// The copying goes on until it is cancelled.
    Hangs,
    /// The same with the guest standing still, about to be handed over.
    HangsInSwitchover,
}

/// All fake hosts, and what they share.
#[derive(Debug, Clone)]
pub struct FakeWorld(Arc<Mutex<World>>);

#[derive(Debug)]
struct World {
    hosts: BTreeMap<Name, State>,
    pace: Pace,
}

/// What one host is.
#[derive(Debug)]
struct State {
    report: HostReport,
    identity: HostIdentity,
    /// What its door shows.
    door: watch::Sender<Arc<ServerConfig>>,
    networks: BTreeMap<Name, Network>,
    storages: BTreeMap<Name, Storage>,
    /// The tokens that are in the file systems that this host sees; hosts with the same number see the same.
    file_systems: u32,
    tokens: BTreeSet<String>,
    vms: BTreeMap<VmId, VmReport>,
    incoming: BTreeMap<MigrationId, Incoming>,
    outgoing: BTreeMap<MigrationId, Outgoing>,
    measures: Measures,
    refusals: Vec<(String, ApiError)>,
    /// Calls that are never answered.
    swallowed: Vec<String>,
    calls: Vec<String>,
}

#[derive(Debug)]
struct Incoming {
    request: IncomingRequest,
    report: IncomingReport,
}

#[derive(Debug)]
struct Outgoing {
    report: watch::Sender<OutgoingReport>,
    /// What it was ordered.
    request: OutgoingRequest,
    settings: Vec<LiveSettings>,
    cancelled: bool,
    cancel: Arc<Notify>,
    postcopy: Arc<Notify>,
    complete: Arc<Notify>,
}

/// What a fake host would measure.
#[derive(Debug, Clone, Copy)]
pub struct Measures {
    /// How fast each of its guests writes.
    pub dirty_bytes_per_s: u64,
    /// How fast the way to every other host is.
    pub link_bytes_per_s: u64,
    /// What zstd makes of a guest's pages.
    pub zstd_ratio: f64,
}

impl Default for Measures {
    /// Idle guests whose pages do not compress, and links of 10 Gbit/s.
    fn default() -> Self {
        Self { dirty_bytes_per_s: 0, link_bytes_per_s: 1_250_000_000, zstd_ratio: 1.0 }
    }
}

/// One fake host, as long as it lives.
#[derive(Debug)]
pub struct FakeAgent {
    /// Its name.
    pub name: Name,
    /// Where it listens; the same after [`FakeAgent::restart`].
    pub address: SocketAddr,
    world: FakeWorld,
    stop: Option<oneshot::Sender<()>>,
    served: Option<tokio::task::JoinHandle<()>>,
}

impl Default for FakeWorld {
    fn default() -> Self {
        let pace = Pace::Moves(Duration::from_millis(10));
        Self(Arc::new(Mutex::new(World { hosts: BTreeMap::new(), pace })))
    }
}

impl FakeWorld {
    fn lock(&self) -> MutexGuard<'_, World> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn with<T>(&self, host: &Name, work: impl FnOnce(&mut State) -> T) -> T {
        let mut world = self.lock();
        work(world.hosts.get_mut(host).expect("a fake host is in its world"))
    }

    /// Sets how migrations that begin from now on go.
    pub fn set_pace(&self, pace: Pace) {
        self.lock().pace = pace;
    }

    /// Starts a host that has an identity and a listener already, with a QEMU that offers `machines`.
    ///
    /// # Panics
    /// If this machine cannot: it is for tests.
    pub fn start_as(
        &self,
        identity: HostIdentity,
        listener: TcpListener,
        machines: &[&str],
    ) -> FakeAgent {
        let name: Name = identity.host().parse().expect("a certificate's name is a name");
        let state = State {
            report: report(&name, machines),
            door: watch::Sender::new(
                tls::server_config(&identity.server()).expect("the certificates are good"),
            ),
            identity,
            networks: BTreeMap::new(),
            storages: BTreeMap::new(),
            file_systems: 0,
            tokens: BTreeSet::new(),
            vms: BTreeMap::new(),
            incoming: BTreeMap::new(),
            outgoing: BTreeMap::new(),
            measures: Measures::default(),
            refusals: Vec::new(),
            swallowed: Vec::new(),
            calls: Vec::new(),
        };
        self.lock().hosts.insert(name.clone(), state);
        let mut agent = FakeAgent {
            name,
            address: listener.local_addr().expect("a bound socket has an address"),
            world: self.clone(),
            stop: None,
            served: None,
        };
        agent.serve(listener);
        agent
    }
}

fn report(name: &Name, machines: &[&str]) -> HostReport {
    let engine = EngineReport {
        version: "7.2.0".to_owned(),
        accelerator: "tcg".to_owned(),
        machines: machines.iter().map(|&machine| machine.to_owned()).collect(),
        cpu_models: vec!["qemu64".to_owned(), "max".to_owned()],
        abilities: Some(measuring::abilities()),
    };
    HostReport {
        name: name.clone(),
        version: "fake".to_owned(),
        cpus: 2,
        cpu_model: "fake".to_owned(),
        memory_total_bytes: 2 * MEMORY_BYTES,
        memory_available_bytes: MEMORY_BYTES,
        engines: vec![engine],
        cpu_features: BTreeSet::new(),
        networks: Vec::new(),
        storages: Vec::new(),
        migration_address: "127.0.0.1".to_owned(),
        vms: 0,
        certificate_days_left: 365,
        certificate_renewal_due: false,
    }
}

impl FakeAgent {
    /// Serves again after [`FakeAgent::stop`], at the same address, with everything that it had.
    ///
    /// # Panics
    /// If the address cannot be had.
    pub async fn restart(&mut self) {
        let listener = TcpListener::bind(self.address).await.expect("its own address is free");
        self.serve(listener);
    }

    fn serve(&mut self, listener: TcpListener) {
        let tls = self.world.with(&self.name, |state| state.door.subscribe());
        let door = Door::renewable(calls::router(self.world.clone(), self.name.clone()), tls);
        let (stop, stopped) = oneshot::channel::<()>();
        self.stop = Some(stop);
        self.served = Some(tokio::spawn(async move {
            let stopped = async {
                // Dropped or told: both mean stop.
                let _ = stopped.await;
            };
            door.with_limits(impatient()).serve(vec![Listener::Tcp(listener)], stopped).await;
        }));
    }

    /// Falls silent: from now on nobody answers at its address.
    pub async fn stop(&mut self) {
        drop(self.stop.take());
        if let Some(served) = self.served.take() {
            // A panic of the door would show in the test's own calls.
            let _ = served.await;
        }
    }

    /// Answers the next call whose "METHOD /path" begins with `call` with `error`.
    pub fn refuse_next(&self, call: &str, error: ApiError) {
        self.world.with(&self.name, |state| state.refusals.push((call.to_owned(), error)));
    }

    /// Never answers the next call whose "METHOD /path" begins with `call`, as if the way back were cut.
    pub fn swallow_next(&self, call: &str) {
        self.world.with(&self.name, |state| state.swallowed.push(call.to_owned()));
    }

    /// Shows another identity from now on, to everybody: open connections end.
    ///
    /// # Panics
    /// If its certificates cannot be used for TLS, or its address cannot be had again.
    pub async fn become_known_as(&mut self, identity: HostIdentity) {
        self.stop().await;
        let tls = tls::server_config(&identity.server()).expect("the certificates are good");
        self.world.with(&self.name, |state| {
            state.identity = identity;
            state.door.send_replace(tls);
        });
        self.restart().await;
    }

    /// Sets what it measures.
    pub fn set_measures(&self, measures: Measures) {
        self.world.with(&self.name, |state| state.measures = measures);
    }

    /// Lets its QEMU not have a capability.
    pub fn forget_capability(&self, capability: &str) {
        self.world.with(&self.name, |state| {
            let abilities = state.report.engines.iter_mut().filter_map(|e| e.abilities.as_mut());
            abilities.for_each(|abilities| {
                abilities.capabilities.remove(capability);
            });
        });
    }

    /// What it was ordered to prepare, if it still knows.
    #[must_use]
    pub fn incoming_request(&self, id: MigrationId) -> Option<IncomingRequest> {
        self.world.with(&self.name, |state| state.incoming.get(&id).map(|it| it.request.clone()))
    }

    /// What it was ordered to send, and what it was told meanwhile, if it still knows.
    #[must_use]
    pub fn outgoing_request(
        &self,
        id: MigrationId,
    ) -> Option<(OutgoingRequest, Vec<LiveSettings>)> {
        self.world.with(&self.name, |state| {
            state.outgoing.get(&id).map(|it| (it.request.clone(), it.settings.clone()))
        })
    }

    /// Decides something on the way of a migration.
    pub fn decide(&self, id: MigrationId, decision: Decision) {
        self.world.with(&self.name, |state| {
            if let Some(outgoing) = state.outgoing.get(&id) {
                outgoing.report.send_modify(|report| report.decisions.push(decision));
            }
        });
    }

    /// Lets the connection of a post-copy break.
    pub fn lose_postcopy(&self, id: MigrationId) {
        self.world.with(&self.name, |state| {
            if let Some(outgoing) = state.outgoing.get(&id) {
                let why = "the connection is lost".to_owned();
                steering::tell(outgoing, PostcopyState::Paused { why, by_hand: false });
            }
        });
    }

    /// Lets it run a VM that comes, whose memory is not all there.
    pub fn fetches(&self, id: MigrationId, epoch: Epoch) {
        self.world.with(&self.name, |state| {
            if let Some(incoming) = state.incoming.get_mut(&id) {
                incoming.report = IncomingReport::Fetching { epoch };
            }
        });
    }

    /// Lets it not know any more that it sends a VM.
    pub fn forget_outgoing(&self, id: MigrationId) {
        self.world.with(&self.name, |state| state.outgoing.remove(&id));
    }

    /// Lets all memory of a post-copy be there.
    pub fn end_postcopy(&self, id: MigrationId) {
        self.world.with(&self.name, |state| {
            if let Some(outgoing) = state.outgoing.get(&id) {
                outgoing.complete.notify_one();
            }
        });
    }

    /// Lets the host see other file systems than the hosts with another `number`.
    pub fn mount(&self, number: u32) {
        self.world.with(&self.name, |state| state.file_systems = number);
    }

    /// Sets the free memory that it reports.
    pub fn set_free_memory(&self, bytes: u64) {
        self.world.with(&self.name, |state| state.report.memory_available_bytes = bytes);
    }

    /// Lets it report a VM, truly or not.
    pub fn set_vm(&self, report: VmReport) {
        self.world.with(&self.name, |state| state.vms.insert(report.definition.id, report));
    }

    /// Lets it not speak of a VM any more.
    pub fn forget_vm(&self, id: VmId) {
        self.world.with(&self.name, |state| state.vms.remove(&id));
    }

    /// Changes a VM behind everybody's back.
    pub fn change_vm(&self, id: VmId, change: impl FnOnce(&mut VmReport)) {
        self.world.with(&self.name, |state| state.vms.get_mut(&id).map(change));
    }

    /// The definition of a VM, if it has it.
    #[must_use]
    pub fn vm(&self, id: VmId) -> Option<VmReport> {
        self.world.with(&self.name, |state| state.vms.get(&id).cloned())
    }

    /// Whether it has a network and a storage of these names.
    #[must_use]
    pub fn has(&self, network: &str, storage: &str) -> (bool, bool) {
        self.world.with(&self.name, |state| {
            let network = state.networks.keys().any(|name| name.as_str() == network);
            (network, state.storages.keys().any(|name| name.as_str() == storage))
        })
    }

    /// Lets a migration go on that hangs.
    pub fn complete(&self, id: MigrationId) {
        self.world.with(&self.name, |state| {
            if let Some(outgoing) = state.outgoing.get(&id) {
                outgoing.complete.notify_one();
            }
        });
    }

    /// How often a call whose "METHOD /path" begins with `call` came.
    #[must_use]
    pub fn called(&self, call: &str) -> usize {
        self.world.with(&self.name, |state| {
            state.calls.iter().filter(|made| made.starts_with(call)).count()
        })
    }

    /// Whether nothing of any migration is left.
    #[must_use]
    pub fn is_swept(&self) -> bool {
        self.world.with(&self.name, |state| state.incoming.is_empty() && state.outgoing.is_empty())
    }
}

/// The door's bounds, but it does not wait for open connections when it is stopped: a dead host does not either.
fn impatient() -> whimbrel_pki::door::Limits {
    whimbrel_pki::door::Limits { drain: Duration::ZERO, ..Default::default() }
}

/// A VM that is reported in some state and epoch.
#[must_use]
pub fn vm_report(definition: &VmDefinition, state: VmState, epoch: Epoch) -> VmReport {
    let runs = matches!(state, VmState::Running | VmState::Paused | VmState::Migrating { .. });
    let engine = runs.then(|| RunningEngine {
        version: "7.2.0".to_owned(),
        accelerator: "tcg".to_owned(),
        pid: 4242,
    });
    VmReport { definition: definition.clone(), state, epoch, engine }
}
