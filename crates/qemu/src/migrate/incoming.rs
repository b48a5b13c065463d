//! The destination's side of a migration: a QEMU that listens, loads, and stays stopped.
//!
//! What QEMU does here, seen on 7.2 and 10.0:
//!
//! - Loaded is `completed` with run state `paused` (the source's guest ran, or was paused),
//!   `prelaunch` (it had never run) or the state in which the source's guest was stopped
//!   (`shutdown`, `io-error`, …). With `-S` it never becomes `running` by itself.
//! - **Loaded proves nothing alone.** After a cancel in the source's last stage the source lets its
//!   guest run again *and* the destination still becomes `completed`. Only the source's
//!   `completed` together with this one's does.
//! - QEMU announces the guest's addresses once it is loaded. The frames of a guest that does not run wait until
//!   it does: the network is not turned to one that may never run. One round is asked for here
//!   (`ANNOUNCE_ROUNDS_WHEN_LOADED`), and whoever sends `cont` calls [`Machine::announce_self`] after it.
//! - With `late-block-activate` the disks are opened and locked by `cont`. Without it 7.2 takes
//!   them when loaded, and the source could not go back to them; 10.0 waits in either case.
//! - A failed load ends QEMU with status 1 and a line in its log. Where QEMU can be told to stay
//!   (`exit-on-error`, 10.0), it does, with the reason in `query-migrate`.
//! - A client refused by `tls-authz`, or one that speaks no TLS, leaves it listening. One that
//!   breaks off after the TLS handshake ends it ("Not a migration stream"), except with multifd.
//! - multifd on the destination alone leaves it waiting for ever, in `setup`.

use std::net::{IpAddr, SocketAddr};
use std::ops::RangeInclusive;
use std::path::PathBuf;
use std::time::Duration;

use serde_json::{Value, json};
use tokio::sync::watch;

use super::outgoing::pause_postcopy;
use super::settings::{
    ANNOUNCE_ROUNDS_WHEN_LOADED, Stream, default_parameters, next_change, set_capabilities,
    set_parameters,
};
use super::{MigrationStatus, Statistics, tls};
use crate::machine::{Machine, RunState};
use crate::process::Process;
use crate::qmp::QmpError;
use crate::schema::Features;

/// Pause between two questions when no event comes.
const POLL_MILLISECONDS: u64 = 100;

/// How long a destination may take, in seconds, to say how it is before it is asked out of band.
const REST_ANSWER_SECONDS: u64 = 2;

/// How often a destination is told to listen again that does not see yet that it must.
const RECOVER_TRIES_MAX: u32 = 20;

/// How a destination waits for its guest.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct IncomingSettings {
    /// The address to listen on: the migration network's, never a wildcard.
    pub address: IpAddr,
    /// The ports that may be used; the first free one is.
    pub ports: RangeInclusive<u16>,
    /// How the memory travels. The same on both ends.
    pub stream: Stream,
    /// TLS; `None` only where the caller has another protection.
    pub tls: Option<IncomingTls>,
}

impl IncomingSettings {
    fn capabilities(&self, features: &Features) -> Vec<&'static str> {
        let mut on = vec!["events", "return-path", "late-block-activate"];
        on.extend(features.validate_uuid.then_some("validate-uuid"));
        let counts = self.stream.postcopy.is_some() && features.postcopy_blocktime;
        on.extend(counts.then_some("postcopy-blocktime"));
        on.extend(self.stream.capabilities());
        on
    }
}

/// Who may send a guest here.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct IncomingTls {
    /// Folder with `ca-cert.pem`, `server-cert.pem` and `server-key.pem`, readable for QEMU. A
    /// `dh-params.pem` is added to it where it is missing (it saves up to seconds).
    pub credentials_dir: PathBuf,
    /// The one client that is let in, by its certificate's distinguished name, e.g. `CN=host-a`.
    pub authorized_dn: String,
}

/// A destination that listens.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Listening {
    /// Where.
    pub address: SocketAddr,
}

/// A destination that has loaded the guest, stopped.
#[derive(Debug, Clone, PartialEq)]
pub struct Loaded {
    /// Whether all of it is here. If not it is in post-copy: its state is here, and what is
    /// missing of its memory comes when it is asked for.
    pub whole: bool,
    /// QEMU's run state.
    pub run_state: RunState,
    /// The destination's figures.
    pub statistics: Statistics,
}

/// Why a destination does not hold the guest. The QEMU is of no further use: end it.
#[derive(Debug, thiserror::Error)]
pub enum IncomingError {
    /// This QEMU can not do what the settings ask for.
    #[error("the destination's QEMU has no {feature}")]
    Unsupported {
        /// What is missing.
        feature: &'static str,
    },
    /// A step of the preparation failed.
    #[error("can not prepare the destination: {step}")]
    Prepare {
        /// Which.
        step: &'static str,
        /// The reason.
        #[source]
        source: QmpError,
    },
    /// It does not listen, most often because no port of the range is free.
    #[error("can not listen on {address}, ports {} to {}", ports.start(), ports.end())]
    Listen {
        /// The address.
        address: IpAddr,
        /// The range.
        ports: RangeInclusive<u16>,
        /// QEMU's refusal.
        #[source]
        source: QmpError,
    },
    /// The file of a saved state can not be opened in the way that QEMU needs.
    #[error("can not open the file for QEMU")]
    Open(#[source] std::io::Error),
    /// QEMU listens, but does not say where.
    #[error("the destination's QEMU does not tell its port")]
    NoAddress,
    /// QEMU says that loading failed.
    #[error("loading failed on the destination: {}", reason.as_deref().unwrap_or("no reason given"))]
    Failed {
        /// QEMU's text (10.0); the details are in its log.
        reason: Option<String>,
    },
    /// QEMU ended (7.2 does on every failure to load); its last words are in its log.
    #[error("the destination's QEMU ended while it waited for the guest")]
    Ended(#[source] QmpError),
    /// QEMU can not be asked.
    #[error("can not ask the destination how far it is")]
    Query(#[source] QmpError),
    /// Loading is done, but the guest is not stopped: it must be treated as running.
    #[error("the destination's guest runs without having been told to")]
    NotStopped,
}

impl IncomingError {
    fn query(error: QmpError) -> Self {
        if error.is_disconnected() { Self::Ended(error) } else { Self::Query(error) }
    }
}

/// Makes a QEMU that was started with `incoming` listen.
///
/// On success it listens on the returned address, and its guest is stopped. On failure it must be
/// ended: what was set is not taken back, and 10.0 refuses a second `migrate-incoming` after one
/// that found its port taken. That is why QEMU gets the whole range and looks for a free port
/// itself.
///
/// # Errors
///
/// [`IncomingError`], except `Failed` and `NotStopped`.
pub async fn prepare(
    machine: &Machine,
    settings: &IncomingSettings,
) -> Result<Listening, IncomingError> {
    let step = |step| move |source| IncomingError::Prepare { step, source };
    let features = machine.features();
    if let Some(feature) = settings.stream.unsupported(features) {
        return Err(IncomingError::Unsupported { feature });
    }
    let on = settings.capabilities(features);
    set_capabilities(machine, &on).await.map_err(step("capabilities"))?;

    let mut parameters = default_parameters(features);
    settings.stream.parameters(&mut parameters);
    if let Some(settings) = &settings.tls {
        let made = tls::make_server(machine, settings).await;
        parameters.extend(made.map_err(step("TLS credentials"))?);
    }
    parameters.insert("announce-rounds".to_owned(), json!(ANNOUNCE_ROUNDS_WHEN_LOADED));
    set_parameters(machine, parameters).await.map_err(step("parameters"))?;
    listen(machine, settings).await
}

async fn listen(
    machine: &Machine,
    settings: &IncomingSettings,
) -> Result<Listening, IncomingError> {
    let first = SocketAddr::new(settings.address, *settings.ports.start());
    let mut arguments = json!({ "uri": format!("tcp:{first},to={}", settings.ports.end()) });
    if machine.features().exit_on_error {
        arguments["exit-on-error"] = json!(false);
    }
    machine.order("migrate-incoming", arguments).await.map_err(|source| IncomingError::Listen {
        address: settings.address,
        ports: settings.ports.clone(),
        source,
    })?;
    let answer = machine.qmp().execute("query-migrate", Value::Null).await;
    let answer = answer.map_err(IncomingError::query)?;
    let port = answer.pointer("/socket-address/0/port").and_then(Value::as_str);
    let port = port.and_then(|port| port.parse().ok()).ok_or(IncomingError::NoAddress)?;
    Ok(Listening { address: SocketAddr::new(settings.address, port) })
}

/// Waits until the guest is here, stopped: the whole of it, or where the source has turned to
/// post-copy, its state. As long as nothing fails this waits for ever: the caller bounds it.
/// Cancellation safe; may be called again, also after a restart of the agent.
///
/// # Errors
///
/// [`IncomingError::Failed`], `Ended`, `Query`, `NotStopped`. A question that QEMU is too busy to
/// answer is asked again.
pub async fn wait_loaded(machine: &Machine) -> Result<Loaded, IncomingError> {
    let mut events = machine.events();
    loop {
        match loaded(machine).await {
            Ok(Some(loaded)) => return Ok(loaded),
            Ok(None) | Err(IncomingError::Query(QmpError::TimedOut { .. })) => {}
            Err(error) => return Err(error),
        }
        next_change(&mut events, Duration::from_millis(POLL_MILLISECONDS)).await;
    }
}

/// Whether the guest is here, asked once.
///
/// # Errors
///
/// As [`wait_loaded`].
pub async fn loaded(machine: &Machine) -> Result<Option<Loaded>, IncomingError> {
    let statistics = Statistics::query(machine.qmp()).await.map_err(IncomingError::query)?;
    let whole = match standing(&statistics)? {
        Standing::Precopy => return Ok(None),
        Standing::Postcopy => false,
        Standing::Whole => true,
    };
    let status = machine.status().await.map_err(IncomingError::query)?;
    match status.run_state {
        // QEMU sets the run state before it tells `completed`; an order of ours in between, such
        // as a second `completed` of a newer version, is waited out. In post-copy it comes later
        // than the status, with the end of the state.
        RunState::InMigrate => Ok(None),
        _ if status.running => Err(IncomingError::NotStopped),
        run_state => Ok(Some(Loaded { whole, run_state, statistics })),
    }
}

/// Waits until all memory of a guest in post-copy is here, telling the progress on the way, in
/// whose status it stands that the connection is lost. The guest may run meanwhile. Cancellation
/// safe; may be called again, also after a restart of the agent.
///
/// # Errors
///
/// [`IncomingError::Failed`], `Ended`: the guest's memory is lost. `Query`.
pub async fn wait_whole(
    machine: &Machine,
    progress: &watch::Sender<Statistics>,
) -> Result<Statistics, IncomingError> {
    let mut events = machine.events();
    loop {
        match Statistics::query(machine.qmp()).await.map_err(IncomingError::query) {
            Ok(statistics) => {
                progress.send_replace(statistics.clone());
                if let Standing::Whole = standing(&statistics)? {
                    return Ok(statistics);
                }
            }
            // While a device waits for a page that does not come QEMU answers nothing.
            Err(IncomingError::Query(QmpError::TimedOut { .. })) => {}
            Err(error) => return Err(error),
        }
        next_change(&mut events, Duration::from_millis(POLL_MILLISECONDS)).await;
    }
}

/// How much of the guest is here.
enum Standing {
    Precopy,
    Postcopy,
    Whole,
}

fn standing(statistics: &Statistics) -> Result<Standing, IncomingError> {
    match statistics.status {
        MigrationStatus::Completed => Ok(Standing::Whole),
        MigrationStatus::Failed | MigrationStatus::Cancelled => {
            Err(IncomingError::Failed { reason: statistics.error_desc.clone() })
        }
        ref status if status.is_postcopy() => Ok(Standing::Postcopy),
        _ => Ok(Standing::Precopy),
    }
}

/// What is known of the rest of a guest's memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Rest {
    /// All of it is here.
    Whole,
    /// Some is missing, and there is no connection by which it could come.
    Cut,
    /// It may come yet: QEMU believes in a connection, or is making one.
    Open,
}

/// Whether all memory of a guest in post-copy is here, or can not come as things are. For a source that is known to send
/// nothing more; **with any other this may take a way from it that it is about to use**.
///
/// A QEMU of which a device waits for a page answers no question (7.2, 10.0). Yet out of band it takes
/// `migrate-recover`, and takes it only in `postcopy-paused`: that it listens anew at `address` is the answer then.
///
/// # Errors
///
/// [`IncomingError::Query`], `Ended`: nothing is known. Ask again.
pub async fn rest(
    machine: &Machine,
    address: IpAddr,
    ports: RangeInclusive<u16>,
) -> Result<Rest, IncomingError> {
    let patience = Duration::from_secs(REST_ANSWER_SECONDS);
    let asked = tokio::time::timeout(patience, Statistics::query(machine.qmp())).await;
    match asked {
        Ok(Ok(statistics)) => {
            return Ok(match statistics.status {
                MigrationStatus::Completed => Rest::Whole,
                MigrationStatus::PostcopyPaused
                | MigrationStatus::PostcopyRecoverSetup
                | MigrationStatus::Failed => Rest::Cut,
                _ => Rest::Open,
            });
        }
        Ok(Err(QmpError::TimedOut { .. })) | Err(_) => {}
        Ok(Err(error)) => return Err(IncomingError::query(error)),
    }
    let first = SocketAddr::new(address, *ports.start());
    let uri = json!({ "uri": format!("tcp:{first},to={}", ports.end()) });
    let told = machine.qmp().execute_oob("migrate-recover", uri);
    match tokio::time::timeout(patience, told).await {
        Ok(Ok(_)) => Ok(Rest::Cut),
        Ok(Err(error)) if error.is_refusal() => Ok(Rest::Open),
        Ok(Err(error)) => Err(IncomingError::query(error)),
        Err(_) => {
            let command = "migrate-recover".to_owned();
            Err(IncomingError::Query(QmpError::TimedOut { command, after: patience }))
        }
    }
}

/// Makes a destination listen again, whose connection was lost in post-copy (`postcopy-paused`);
/// with the TLS of the first time. May be called again, which ends an earlier listening. Carried
/// out even while QEMU answers nothing else (out of band), since its guest, or a device, may be
/// waiting for a page; so the port is looked for at the process.
///
/// A connection that this end still believes in is given up for it: the source knows better.
///
/// # Errors
///
/// [`IncomingError::Listen`]: refused, most often because there is no post-copy here that is
/// paused, or could be. `NoAddress`.
pub async fn recover(
    machine: &Machine,
    process: &Process,
    address: IpAddr,
    ports: RangeInclusive<u16>,
) -> Result<Listening, IncomingError> {
    let first = SocketAddr::new(address, *ports.start());
    let uri = json!({ "uri": format!("tcp:{first},to={}", ports.end()) });
    let mut tries = 1;
    while let Err(source) = machine.qmp().execute_oob("migrate-recover", uri.clone()).await {
        if !source.is_refusal() || tries >= RECOVER_TRIES_MAX {
            return Err(IncomingError::Listen { address, ports, source });
        }
        tries += 1;
        if let Err(error) = pause_postcopy(machine).await {
            tracing::debug!(%error, "there is no connection to give up");
        }
        tokio::time::sleep(Duration::from_millis(POLL_MILLISECONDS)).await;
    }
    match process.listening_port() {
        Ok(Some(port)) => Ok(Listening { address: SocketAddr::new(address, port) }),
        Ok(None) => Err(IncomingError::NoAddress),
        Err(error) => {
            tracing::warn!(%error, "the kernel does not tell where the destination listens");
            Err(IncomingError::NoAddress)
        }
    }
}
