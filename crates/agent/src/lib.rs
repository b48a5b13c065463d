//! The agent: one per host. It owns the host's QEMUs, taps, bridges and storages, and the host's word on who owns a VM.
//!
//! ```text
//!   http ──▶ vm (one task per VM) ──▶ vm::spawn ──▶ network, storage, whimbrel_qemu
//!     │            ▲ lends by value        │
//!     └──▶ migrate ┘                       ▼
//!                 └──────────────────▶  ledger  (ownership, runs, journal)  ◀── sweep
//! ```
//!
//! QEMUs outlive the agent: it finds them again when it starts ([`vm::find_all`]), sweeps what nobody owns ([`sweep`]),
//! and takes up its migrations ([`migrate::recover`]) before it opens its door. What it is not sure about it neither
//! starts nor ends.

pub mod config;
pub mod failpoint;
pub mod host;
pub mod http;
pub mod in_hand;
pub mod join;
pub mod ledger;
pub mod measure;
pub mod metrics;
pub mod migrate;
pub mod network;
pub mod sources;
pub mod storage;
pub mod sweep;
mod validate;
pub mod vm;

use std::fs::DirBuilder;
use std::future::Future;
use std::io;
use std::net::SocketAddr;
use std::os::unix::fs::{DirBuilderExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use tokio::net::TcpListener;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::watch;
use whimbrel_api::ApiError;
use whimbrel_pki::door::{Door, Listener};
use whimbrel_pki::tls::{self, TlsConfigError};
use whimbrel_qemu::engine::{self, Accelerator, EngineFacts, ProbeError};

use whimbrel_qemu::process::UnprivilegedUser;

use config::{AcceleratorChoice, AgentConfig, ConfigError};
use failpoint::Failpoints;
use host::Host;
use join::JoinError;
use ledger::{Ledger, LedgerError};
use network::{NetworkError, Networks};
use storage::Storages;

/// Mode of the agent's folder: QEMU's user passes through it to the sockets, and reads nothing in it.
const FOLDER_MODE: u32 = 0o711;
/// How long the start waits for QEMUs of an earlier life, in seconds; afterwards it goes on without them.
const FIND_SECONDS: u64 = 5;
/// How often the consoles' logs are bounded, in seconds.
const HOUSEKEEPING_SECONDS: u64 = 60;
/// How often a start waits for an address that is not there yet, and how long in between, in milliseconds.
const BIND_TRIES_MAX: u32 = 20;
const BIND_PAUSE_MILLISECONDS: u64 = 250;

/// Why an agent does not run.
#[derive(Debug, thiserror::Error)]
pub enum AgentError {
    /// The configuration is wrong.
    #[error("the agent's configuration cannot be used")]
    Config(#[from] ConfigError),
    /// The folder cannot be made.
    #[error("cannot make the folder {}", path.display())]
    Folder {
        /// The folder.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// Another agent has the folder.
    #[error("another agent runs with the folder {}", path.display())]
    Taken {
        /// The folder.
        path: PathBuf,
    },
    /// The host has no identity.
    #[error(
        "this host is not a member of a pool, or its identity is damaged; `whimbrel pool join-token` makes a token to join with"
    )]
    Identity(#[source] JoinError),
    /// No TLS configuration.
    #[error("the host's certificates cannot be used")]
    Tls(#[from] TlsConfigError),
    /// The ledger cannot be used: nothing is known of any VM.
    #[error("the agent's ledger cannot be used")]
    Ledger(#[from] LedgerError),
    /// A QEMU cannot be used.
    #[error("QEMU cannot be used")]
    Engine(#[from] ProbeError),
    /// Networks cannot be handled.
    #[error("the host's networks cannot be handled")]
    Network(#[from] NetworkError),
    /// What was there before could not be taken up.
    #[error("what an earlier life of the agent has left could not be taken up")]
    TakeUp(#[source] ApiError),
    /// The address cannot be listened on.
    #[error("cannot listen on {address}")]
    Listen {
        /// The address.
        address: SocketAddr,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// Signals cannot be heard.
    #[error("cannot hear signals")]
    Signals(#[source] io::Error),
}

/// Runs the agent until SIGTERM or SIGINT. Its QEMUs go on.
///
/// # Errors
/// [`AgentError`]: it has not begun to serve.
pub async fn run(config: AgentConfig) -> Result<(), AgentError> {
    let mut terminated = signal(SignalKind::terminate()).map_err(AgentError::Signals)?;
    let mut interrupted = signal(SignalKind::interrupt()).map_err(AgentError::Signals)?;
    run_until(config, async move {
        tokio::select! {
            _ = terminated.recv() => {}
            _ = interrupted.recv() => {}
        }
    })
    .await
}

/// Runs the agent until `shutdown` ends. Its QEMUs go on.
///
/// # Errors
/// As [`run`].
pub async fn run_until(
    config: AgentConfig,
    shutdown: impl Future<Output = ()>,
) -> Result<(), AgentError> {
    let agent = Agent::prepare(config).await?;
    agent.serve(shutdown).await
}

/// An agent that has taken up what was there, and not opened its door yet.
#[derive(Debug)]
pub struct Agent {
    /// The host.
    pub host: Arc<Host>,
    /// Held as long as the agent lives: two agents on one folder would each believe its ledger.
    _lock: std::fs::File,
}

impl Agent {
    /// Opens the ledger, probes the QEMUs, finds VMs again, sweeps, and takes up migrations.
    ///
    /// # Errors
    /// [`AgentError`].
    pub async fn prepare(config: AgentConfig) -> Result<Self, AgentError> {
        config.check()?;
        let folder_error = |path: &Path| {
            let path = path.to_owned();
            move |source| AgentError::Folder { path, source }
        };
        make_folder(&config.dir).map_err(folder_error(&config.dir))?;
        make_folder(&config.run_dir()).map_err(folder_error(&config.run_dir()))?;
        let lock = take_lock(&config.dir)?;
        let identity = join::load(&config).map_err(AgentError::Identity)?;
        let failpoints = Failpoints::new(&config.dir);
        let ledger = Ledger::open(&config.ledger_file(), failpoints.clone())?;
        let door_tls = watch::Sender::new(tls::server_config(&identity.server())?);
        let engines = probe(&config).await?;
        let host = Arc::new(Host {
            identity,
            door_tls,
            ledger,
            failpoints,
            in_hand: in_hand::InHand::default(),
            engines,
            networks: Networks::new()?,
            storages: Storages::default(),
            vms: vm::Vms::default(),
            migrations: migrate::Migrations::default(),
            links: measure::Links::default(),
            metrics: metrics::Metrics::default(),
            config,
        });
        take_up(&host).await.map_err(AgentError::TakeUp)?;
        Ok(Self { host, _lock: lock })
    }

    /// Opens the door and serves until `shutdown` ends.
    ///
    /// # Errors
    /// [`AgentError::Listen`].
    pub async fn serve(self, shutdown: impl Future<Output = ()>) -> Result<(), AgentError> {
        let host = Arc::clone(&self.host);
        let tls = host.door_tls.subscribe();
        let listener = bind(host.config.listen).await?;
        let housekeeping = tokio::spawn(keep_house(Arc::clone(&host)));
        let sweeping = tokio::spawn(sweep::again_and_again(Arc::clone(&host)));
        tracing::info!(
            host = %host.name(),
            listen = %host.config.listen,
            vms = host.vms.reports().len(),
            "ready"
        );
        Door::renewable(http::router(Arc::clone(&host)), tls)
            .serve(vec![Listener::Tcp(listener)], shutdown)
            .await;
        housekeeping.abort();
        sweeping.abort();
        host.vms.close().await;
        tracing::info!(host = %host.name(), "ended; QEMUs go on");
        Ok(())
    }
}

/// Networks and storages first: VMs need them. Then VMs, then the sweep, which leaves alone whatever a VM or an open
/// migration has; then migrations.
async fn take_up(host: &Arc<Host>) -> Result<(), ApiError> {
    for network in host.ledger.networks().await? {
        if let Err(error) = host.networks.ensure(&network).await {
            let error = whimbrel_api::error::chain(&error);
            tracing::error!(network = %network.name, error, "a network is not there");
            host.networks.remember(network);
        }
    }
    for storage in host.ledger.storages().await? {
        host.storages.put(storage);
    }
    sweep::at_start(host).await?;
    vm::find_all(host).await?;
    host.vms.wait_found(Duration::from_secs(FIND_SECONDS)).await;
    migrate::recover(host).await
}

async fn keep_house(host: Arc<Host>) {
    loop {
        tokio::time::sleep(Duration::from_secs(HOUSEKEEPING_SECONDS)).await;
        host.vms.bound_console_logs();
        let days = host.certificate_days_left();
        if days < 30 {
            tracing::warn!(
                days,
                "a certificate of this host expires soon, and the controller has not renewed it"
            );
        }
    }
}

async fn probe(config: &AgentConfig) -> Result<Vec<EngineFacts>, AgentError> {
    let forced = match config.accelerator {
        AcceleratorChoice::Auto => None,
        AcceleratorChoice::Kvm => Some(Accelerator::Kvm),
        AcceleratorChoice::Tcg => Some(Accelerator::Tcg),
    };
    let (uid, gid) = config.qemu_user;
    let user = UnprivilegedUser { uid, gid };
    let mut engines = Vec::new();
    for binary in &config.engines {
        let facts = engine::probe(binary, Some(user), forced).await?;
        let (major, minor, micro) = facts.version;
        tracing::info!(
            binary = %binary.display(),
            version = format!("{major}.{minor}.{micro}"),
            accelerator = facts.accelerator.as_wire(),
            why = facts.accelerator_reason,
            "found QEMU"
        );
        engines.push(facts);
    }
    Ok(engines)
}

/// Binds the agent's address. Right after the boot of a host, or of a lab, the address may not be there yet.
async fn bind(address: SocketAddr) -> Result<TcpListener, AgentError> {
    let mut tries = 0;
    loop {
        match TcpListener::bind(address).await {
            Ok(listener) => return Ok(listener),
            Err(error)
                if error.kind() == io::ErrorKind::AddrNotAvailable && tries < BIND_TRIES_MAX =>
            {
                tries += 1;
                tokio::time::sleep(Duration::from_millis(BIND_PAUSE_MILLISECONDS)).await;
            }
            Err(source) => return Err(AgentError::Listen { address, source }),
        }
    }
}

fn take_lock(dir: &Path) -> Result<std::fs::File, AgentError> {
    let path = dir.join("agent.lock");
    let open = std::fs::File::options().create(true).truncate(false).write(true).open(&path);
    let file = open.map_err(|source| AgentError::Folder { path: path.clone(), source })?;
    match file.try_lock() {
        Ok(()) => Ok(file),
        Err(std::fs::TryLockError::WouldBlock) => Err(AgentError::Taken { path: dir.to_owned() }),
        Err(std::fs::TryLockError::Error(source)) => Err(AgentError::Folder { path, source }),
    }
}

/// Makes a folder that QEMU's user can pass through, if it is not there.
pub(crate) fn make_folder(path: &Path) -> io::Result<()> {
    DirBuilder::new().recursive(true).mode(FOLDER_MODE).create(path)?;
    let mode = path.metadata()?.permissions().mode();
    if mode & 0o111 != 0o111 {
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode | 0o111))?;
    }
    Ok(())
}
