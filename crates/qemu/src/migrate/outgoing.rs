//! The source's side of a migration: the guest is copied, stopped, and sent to its end.
//!
//! What QEMU does here, seen on 7.2 and 10.0:
//!
//! - `pre-switchover` does not prove that anything arrived: a small guest fits into the buffers of
//!   the connection, and with TLS 1.3 a client that the destination refuses learns it late. Only
//!   `completed` does, because with `return-path` the source waits for the destination's word
//!   that it has loaded everything.
//! - **QEMU lets the guest run again by itself** when a migration fails or is cancelled at any
//!   moment before `completed`, also after `migrate-continue`, if the guest ran when the migration
//!   began. First the status becomes `failed` (or `cancelling`), then the guest runs, then
//!   `cancelled` is told. Nothing in QMP prevents it: `stop` at pre-switchover is answered with
//!   success and changes nothing, `cont` is refused ("Migration is not finalized yet"). So before
//!   `completed` no other host may be allowed to run this guest; after it QEMU leaves the guest
//!   alone.
//! - A moment after `completed` the run state is `postmigrate`, and `cont` makes the guest run again on
//!   both versions: nothing but the caller's own record holds it back. A disk that the
//!   destination's running guest has locked makes that `cont` fail; disks that are not shared do
//!   not.
//! - A guest that its user had paused stays stopped after a failure. 10.0 returns to `paused`; 7.2
//!   shows `postmigrate` then, and refuses any further `migrate` ("Can't migrate the vm that was
//!   paused due to previous migration") until the guest has run again. So the run state alone does
//!   not tell that a guest has left.
//! - A guest that arrived paused, and was never let run, has inactive disks (`cont` takes them).
//!   To send it on ends 7.2 with a failed assertion in the last stage, and the guest with it; 10.0
//!   can. [`Outgoing::start`] wakes both kinds for an instant first: nothing else helps 7.2.
//! - A destination that hangs leaves the source in `device` for ever, its guest stopped:
//!   [`Outgoing::continue_to_completed`] is bounded, and [`Outgoing::cancel`] ends this state too.

mod control;
mod postcopy;
mod take_back;

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use serde_json::{Map, Value, json};
use tokio::sync::watch;
use tokio::time::{Instant, timeout};

pub use self::control::Control;
pub use self::postcopy::{Switched, Unrecovered, pause_postcopy};
pub use self::take_back::{TakeBackError, take_back};
pub use super::settings::DEFAULT_MAX_DOWNTIME_MS;
use super::settings::{
    Stream, Throttle, bandwidth, default_parameters, next_change, set_capabilities, set_parameters,
};
use super::{MigrationStatus, Statistics, tls};
use crate::event::{EventKind, Events, Timestamp};
use crate::machine::{Machine, RunState};
use crate::qmp::QmpError;
use crate::schema::Features;

/// Pause between two questions while memory is copied; also how often progress is told.
const PROGRESS_MILLISECONDS: u64 = 200;

/// Pause between two questions while the guest is stopped, when no event comes.
const SWITCHOVER_POLL_MILLISECONDS: u64 = 20;

/// How long QEMU may take to decide on the guest's run state after a failure.
const SETTLE_SECONDS: u64 = 5;

/// How a source sends its guest.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct OutgoingSettings {
    /// Where the destination listens.
    pub to: SocketAddr,
    /// TLS; `None` only where the caller has another protection.
    pub tls: Option<OutgoingTls>,
    /// How long the guest may be stopped, as QEMU estimates it, in milliseconds.
    pub max_downtime_ms: u64,
    /// The most that may be sent, in bytes per second; 0 is no limit.
    pub max_bandwidth_bytes_per_second: u64,
    /// The same in post-copy, for what the destination has not asked for; 0 is no limit.
    pub max_postcopy_bandwidth_bytes_per_second: u64,
    /// What the link can carry in the switchover, in bytes per second, where that is known better
    /// than QEMU can measure it; `None` lets QEMU measure. Only where the schema has it.
    pub switchover_bandwidth_bytes_per_second: Option<u64>,
    /// How the memory travels. The same on both ends.
    pub stream: Stream,
    /// Whether, and how far, a guest that writes too fast is held back.
    pub throttle: Option<Throttle>,
    /// Sends memory without a copy inside the kernel. Needs multifd without compression and TLS,
    /// and a QEMU that may lock its memory ([`crate::process::Process::allow_locked_memory`]).
    pub zero_copy: bool,
}

impl OutgoingSettings {
    /// To there, in the plainest way: one stream, QEMU's own limit of the downtime, no limit of
    /// the bandwidth, no throttling.
    #[must_use]
    pub fn to(address: SocketAddr, tls: Option<OutgoingTls>) -> Self {
        Self {
            to: address,
            tls,
            max_downtime_ms: DEFAULT_MAX_DOWNTIME_MS,
            max_bandwidth_bytes_per_second: 0,
            max_postcopy_bandwidth_bytes_per_second: 0,
            switchover_bandwidth_bytes_per_second: None,
            stream: Stream::default(),
            throttle: None,
            zero_copy: false,
        }
    }

    /// The first thing asked for that a QEMU does not have, or that can not be had together.
    #[must_use]
    pub fn unsupported(&self, features: &Features) -> Option<&'static str> {
        let plain = self.tls.is_none()
            && self.stream.compression.is_none()
            && self.stream.multifd_channels.is_some();
        let lacking = [
            (self.throttle.is_some() && !features.auto_converge, "auto-converge"),
            (self.zero_copy && !features.zero_copy_send, "zero-copy sending"),
            (self.zero_copy && !plain, "zero-copy sending but over multifd as it is"),
            (
                self.switchover_bandwidth_bytes_per_second.is_some()
                    && !features.avail_switchover_bandwidth,
                "given bandwidth of the switchover",
            ),
        ];
        let own = lacking.into_iter().find_map(|(lacks, what)| lacks.then_some(what));
        self.stream.unsupported(features).or(own)
    }

    fn capabilities(&self, features: &Features) -> Vec<&'static str> {
        let mut on = vec!["events", "return-path", "pause-before-switchover"];
        on.extend(features.validate_uuid.then_some("validate-uuid"));
        on.extend(self.throttle.is_some().then_some("auto-converge"));
        on.extend(self.zero_copy.then_some("zero-copy-send"));
        on.extend(self.stream.capabilities());
        on
    }

    /// All parameters but those of TLS and the aim.
    fn parameters(&self, features: &Features) -> Map<String, Value> {
        let mut parameters = default_parameters(features);
        self.stream.parameters(&mut parameters);
        let mut set = |name: &str, value: Value| parameters.insert(name.to_owned(), value);
        set("max-bandwidth", bandwidth(self.max_bandwidth_bytes_per_second));
        set("max-postcopy-bandwidth", json!(self.max_postcopy_bandwidth_bytes_per_second));
        if let Some(limit) = self.switchover_bandwidth_bytes_per_second {
            set("avail-switchover-bandwidth", json!(limit));
        }
        if let Some(throttle) = self.throttle {
            throttle.parameters(&mut parameters);
        }
        parameters
    }
}

/// Whom to expect at the other end.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct OutgoingTls {
    /// Folder with `ca-cert.pem`, `client-cert.pem` and `client-key.pem`, readable for QEMU.
    pub credentials_dir: PathBuf,
    /// The name that the destination's certificate must have, e.g. `host-b.qemu.whimbrel`.
    pub hostname: String,
}

/// A migration that QEMU was told to begin. Dropping it does nothing to the migration.
#[derive(Debug)]
pub struct Outgoing {
    machine: Machine,
    events: Events,
    stopped_at: Option<Timestamp>,
    control: Control,
}

/// The source after the whole guest has left: stopped, `postmigrate` (a moment later).
#[derive(Debug, Clone, PartialEq)]
pub struct Completed {
    /// The last figures.
    pub statistics: Statistics,
    /// When the vCPUs stopped, from the STOP event; `None` when they were stopped before, or the
    /// event was missed (the agent was restarted in between).
    pub stopped_at: Option<Timestamp>,
}

/// Why a source did not come further. What the guest does is told by each variant.
#[derive(Debug, thiserror::Error)]
pub enum OutgoingError {
    /// This QEMU can not do what the settings ask for. Nothing was done.
    #[error("the source's QEMU has no {feature}")]
    Unsupported {
        /// What is missing.
        feature: &'static str,
    },
    /// A step of the preparation failed. The guest goes on as it was; only where the step was the
    /// beginning itself, and QEMU did not answer, the migration may have begun: cancel it.
    #[error("can not begin to migrate: {step}")]
    Prepare {
        /// Which.
        step: &'static str,
        /// The reason.
        #[source]
        source: QmpError,
    },
    /// QEMU can not be asked, or told. What it does is unknown.
    #[error("can not ask the source how far it is")]
    Query(#[source] QmpError),
    /// QEMU says that the migration failed; `run_state` is what it has made of the guest.
    #[error("the migration failed: {}", reason.as_deref().unwrap_or("no reason given"))]
    Failed {
        /// QEMU's text; 7.2 often has none.
        reason: Option<String>,
        /// QEMU's run state after the failure.
        run_state: RunState,
    },
    /// It was cancelled.
    #[error("the migration was cancelled")]
    Cancelled {
        /// QEMU's run state after it.
        run_state: RunState,
    },
    /// Post-copy has begun: the guest may run elsewhere, and nothing that ends this migration, nor
    /// this QEMU, may be asked for.
    #[error("the guest is in post-copy")]
    Postcopy,
    /// It took longer than allowed. What QEMU does is unknown: cancel, which tells.
    #[error("the source's QEMU took more than {} ms for {what}", after.as_millis())]
    TookTooLong {
        /// What was waited for.
        what: &'static str,
        /// How long.
        after: Duration,
    },
}

/// How a cancel ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Cancelled {
    /// The migration is over without success; `run_state` is what the guest does now.
    Stopped {
        /// QEMU's run state.
        run_state: RunState,
    },
    /// It came too late: the whole guest has been sent, and is stopped here.
    AlreadyCompleted,
}

/// Where a migration stands, as far as the steps here are concerned.
enum Standing {
    Copying,
    PreSwitchover,
    Finishing,
    /// The guest is, or may be, elsewhere, and part of its memory still here.
    Postcopy,
    Completed,
}

impl Outgoing {
    /// Sets everything up and tells QEMU to begin. What an earlier try left is taken away first.
    /// Only for who owns the guest: a paused one may have to run for an instant ([`wake`]).
    ///
    /// # Errors
    ///
    /// [`OutgoingError::Unsupported`], [`OutgoingError::Prepare`].
    pub async fn start(
        machine: &Machine,
        settings: &OutgoingSettings,
    ) -> Result<Self, OutgoingError> {
        let step = |step| move |source| OutgoingError::Prepare { step, source };
        let features = machine.features();
        if let Some(feature) = settings.unsupported(features) {
            return Err(OutgoingError::Unsupported { feature });
        }
        wake(machine)
            .await
            .map_err(step("a paused guest that arrived, or was to leave, before"))?;
        clear(machine).await.map_err(step("settings of an earlier migration"))?;
        let on = settings.capabilities(features);
        set_capabilities(machine, &on).await.map_err(step("capabilities"))?;

        let mut parameters = settings.parameters(features);
        if let Some(settings) = &settings.tls {
            let made = tls::make_client(machine, settings).await;
            parameters.extend(made.map_err(step("TLS credentials"))?);
        }
        let control = Control::aiming(machine, settings.max_downtime_ms, &mut parameters);
        set_parameters(machine, parameters).await.map_err(step("parameters"))?;

        let outgoing = Self { control, ..Self::reattach(machine) };
        machine.note_postcopy(false);
        let uri = json!({ "uri": format!("tcp:{}", settings.to) });
        machine.order("migrate", uri).await.map_err(step("the beginning itself"))?;
        Ok(outgoing)
    }

    /// Takes up a migration that was begun before the agent was restarted.
    #[must_use]
    pub fn reattach(machine: &Machine) -> Self {
        Self {
            machine: machine.clone(),
            events: machine.events(),
            stopped_at: None,
            control: Control::of(machine),
        }
    }

    /// Orders for it from elsewhere, while it is waited for here.
    #[must_use]
    pub fn control(&self) -> Control {
        self.control.clone()
    }

    /// When the vCPUs stopped, if they have and the event was seen.
    #[must_use]
    pub fn stopped_at(&self) -> Option<Timestamp> {
        self.stopped_at
    }

    /// The figures of this moment.
    ///
    /// # Errors
    ///
    /// [`OutgoingError::Query`].
    pub async fn statistics(&self) -> Result<Statistics, OutgoingError> {
        Statistics::query(self.machine.qmp()).await.map_err(OutgoingError::Query)
    }

    /// Waits until the connection stands, its TLS handshake included. A destination that hangs
    /// there stops QEMU, and its guest with it, for as long as it likes: after a failure the caller
    /// ends that by [`crate::process::Process::cut`].
    ///
    /// # Errors
    ///
    /// [`OutgoingError::TookTooLong`], `Query`.
    pub async fn wait_connected(&mut self, within: Duration) -> Result<(), OutgoingError> {
        let connected = async {
            while self.statistics().await?.status == MigrationStatus::Setup {
                self.wait_status_change(Duration::from_millis(SWITCHOVER_POLL_MILLISECONDS)).await;
            }
            Ok(())
        };
        let late = OutgoingError::TookTooLong { what: "the connection", after: within };
        timeout(within, connected).await.unwrap_or(Err(late))
    }

    /// Waits until the guest is stopped at pre-switchover (or is further already, which a restarted
    /// agent may find), telling the progress on the way. Takes as long as the copying does: the
    /// caller bounds it. Cancellation safe.
    ///
    /// # Errors
    ///
    /// [`OutgoingError::Failed`] and `Cancelled` when QEMU says so, `Query` when it can not be
    /// asked.
    pub async fn wait_pre_switchover(
        &mut self,
        progress: &watch::Sender<Statistics>,
    ) -> Result<(), OutgoingError> {
        let pause = Duration::from_millis(PROGRESS_MILLISECONDS);
        loop {
            let statistics = self.statistics().await?;
            progress.send_replace(statistics.clone());
            if !matches!(self.standing(&statistics).await?, Standing::Copying) {
                self.note_events();
                return Ok(());
            }
            self.control.adjust(statistics.ram.dirty_sync_count.unwrap_or(0)).await;
            // The guest stands still: nothing is asked that the event has told.
            if self.wait_status_change(pause).await == Some(MigrationStatus::PreSwitchover) {
                return Ok(());
            }
        }
    }

    /// Lets QEMU send the rest, and waits until it says that all has arrived. From pre-switchover,
    /// or from any later state that a restarted agent finds.
    ///
    /// On success the guest is stopped here and QEMU will not let it run by itself any more. On
    /// `Failed` and `Cancelled` QEMU has decided, and `run_state` tells: a guest that ran when the
    /// migration began runs again. After `TookTooLong` and `Query` either can still come.
    ///
    /// # Errors
    ///
    /// [`OutgoingError`], except `Unsupported` and `Prepare`.
    pub async fn continue_to_completed(
        &mut self,
        within: Duration,
    ) -> Result<Completed, OutgoingError> {
        match self.continue_until(within).await? {
            (Standing::Postcopy, _) => Err(OutgoingError::Postcopy),
            (_, completed) => Ok(completed),
        }
    }

    /// Lets QEMU go on from pre-switchover, to `completed` or to post-copy; tells which.
    async fn continue_until(
        &mut self,
        within: Duration,
    ) -> Result<(Standing, Completed), OutgoingError> {
        let until = Instant::now() + within;
        let pause = Duration::from_millis(SWITCHOVER_POLL_MILLISECONDS);
        // Told without being asked where it stands: every question lengthens the guest's pause.
        let mut told = self.tell_to_continue().await?;
        loop {
            let news = self.wait_status_change(pause).await;
            if Instant::now() >= until {
                return Err(OutgoingError::TookTooLong { what: "the last stage", after: within });
            }
            // A question now would wait for the same lock as the thread that sends the rest.
            if told && news == Some(MigrationStatus::Device) {
                continue;
            }
            let statistics = self.statistics().await?;
            match self.standing(&statistics).await? {
                standing @ (Standing::Completed | Standing::Postcopy) => {
                    self.note_events();
                    let statistics = self.final_figures(statistics).await;
                    let stopped_at = self.stopped_at;
                    return Ok((standing, Completed { statistics, stopped_at }));
                }
                Standing::PreSwitchover if !told => told = self.tell_to_continue().await?,
                Standing::Copying | Standing::PreSwitchover | Standing::Finishing => {}
            }
        }
    }

    /// The figures with the total time, which 7.2 sums up a moment after it has said `completed`.
    async fn final_figures(&self, at_completed: Statistics) -> Statistics {
        let summed_up = at_completed.total_time_ms.unwrap_or(0) > 0;
        if summed_up || at_completed.status != MigrationStatus::Completed {
            return at_completed;
        }
        self.statistics().await.unwrap_or(at_completed)
    }

    /// Whether QEMU goes on from pre-switchover; it refuses at any other state.
    async fn tell_to_continue(&self) -> Result<bool, OutgoingError> {
        let state = json!({ "state": "pre-switchover" });
        match self.machine.order("migrate-continue", state).await {
            Ok(()) => Ok(true),
            // The next question tells which state it is.
            Err(error) if error.is_refusal() => {
                tracing::debug!(%error, "migrate-continue came at another state");
                Ok(false)
            }
            Err(error) => Err(OutgoingError::Query(error)),
        }
    }

    /// Cancels, and waits until it is over. May be called at any time and again, also when there
    /// is no migration.
    ///
    /// A QEMU that does not say how far it is (its main loop may wait for the destination) is told to cancel all the same,
    /// and does so as soon as it listens again: unless post-copy was ordered, where a cancel that comes late ends in a hang.
    ///
    /// Where post-copy was ordered, 7.2 does not let the guest run again (its run state is
    /// `postmigrate` then), as 10.0 does.
    ///
    /// # Errors
    ///
    /// [`OutgoingError::Postcopy`] once its state has been sent: [`take_back()`] is the way then, if
    /// there is any. [`OutgoingError::Query`], [`OutgoingError::TookTooLong`] after `within`: ask again.
    pub async fn cancel(&mut self, within: Duration) -> Result<Cancelled, OutgoingError> {
        let late = OutgoingError::TookTooLong { what: "a cancel", after: within };
        let all = async {
            // Half of the time: what follows has to fit, too.
            match timeout(within / 2, self.statistics()).await {
                Ok(Ok(statistics)) if statistics.status.is_postcopy() => {
                    return Err(OutgoingError::Postcopy);
                }
                Ok(Err(OutgoingError::Query(QmpError::TimedOut { .. }))) | Err(_)
                    if !self.machine.postcopy_ordered() =>
                {
                    tracing::warn!("QEMU does not say how far it is; it is told to cancel");
                }
                Ok(Ok(_)) => {}
                Ok(Err(error)) => return Err(error),
                Err(_) => {
                    let what = "the question how far it is";
                    return Err(OutgoingError::TookTooLong { what, after: within / 2 });
                }
            }
            self.tell_to_cancel().await?;
            self.wait_cancelled().await
        };
        timeout(within, all).await.unwrap_or(Err(late))
    }

    async fn tell_to_cancel(&self) -> Result<(), OutgoingError> {
        match self.machine.order("migrate_cancel", Value::Null).await {
            // Without an answer it may have been heard: the status tells.
            Ok(()) | Err(QmpError::TimedOut { .. }) => Ok(()),
            // 10.0, once post-copy has begun.
            Err(error) if error.is_refusal() => Err(OutgoingError::Postcopy),
            Err(error) => Err(OutgoingError::Query(error)),
        }
    }

    /// Until the migration is over; the caller bounds it.
    async fn wait_cancelled(&mut self) -> Result<Cancelled, OutgoingError> {
        loop {
            match self.statistics().await {
                Ok(Statistics { status: MigrationStatus::Completed, .. }) => {
                    return Ok(Cancelled::AlreadyCompleted);
                }
                Ok(Statistics {
                    status:
                        MigrationStatus::Cancelled | MigrationStatus::Failed | MigrationStatus::None,
                    ..
                }) => {
                    let run_state = self.settled_run_state().await?;
                    return Ok(Cancelled::Stopped { run_state });
                }
                Ok(_) | Err(OutgoingError::Query(QmpError::TimedOut { .. })) => {}
                Err(error) => return Err(error),
            }
            self.wait_status_change(Duration::from_millis(SWITCHOVER_POLL_MILLISECONDS)).await;
        }
    }

    async fn standing(&self, statistics: &Statistics) -> Result<Standing, OutgoingError> {
        match &statistics.status {
            MigrationStatus::PreSwitchover => Ok(Standing::PreSwitchover),
            MigrationStatus::Device => Ok(Standing::Finishing),
            MigrationStatus::Completed => Ok(Standing::Completed),
            status if status.is_postcopy() => Ok(Standing::Postcopy),
            MigrationStatus::Failed => Err(OutgoingError::Failed {
                reason: statistics.error_desc.clone(),
                run_state: self.settled_run_state().await?,
            }),
            MigrationStatus::Cancelled => {
                Err(OutgoingError::Cancelled { run_state: self.settled_run_state().await? })
            }
            MigrationStatus::None => Err(OutgoingError::Failed {
                reason: Some("no migration is under way".to_owned()),
                run_state: self.settled_run_state().await?,
            }),
            _ => Ok(Standing::Copying),
        }
    }

    /// The run state once QEMU has decided on it: the status `failed` comes before the guest is
    /// let run again. After a bounded wait, whatever it is then.
    async fn settled_run_state(&self) -> Result<RunState, OutgoingError> {
        let until = Instant::now() + Duration::from_secs(SETTLE_SECONDS);
        loop {
            let run_state = self.machine.status().await.map_err(OutgoingError::Query)?.run_state;
            if run_state != RunState::FinishMigrate || Instant::now() >= until {
                return Ok(run_state);
            }
            tokio::time::sleep(Duration::from_millis(SWITCHOVER_POLL_MILLISECONDS)).await;
        }
    }

    /// Waits for a change of the status, and says to which; `None` when it is time to ask anyway.
    async fn wait_status_change(&mut self, at_most: Duration) -> Option<MigrationStatus> {
        let until = Instant::now() + at_most;
        loop {
            let left = until.saturating_duration_since(Instant::now());
            let event = next_change(&mut self.events, left).await?;
            self.note(&event.kind, event.at);
            if let EventKind::Migration { status } = event.kind {
                return Some(status);
            }
        }
    }

    /// Takes note of the events that are there already.
    fn note_events(&mut self) {
        while let Ok(Some(event)) = self.events.try_next() {
            self.note(&event.kind, event.at);
        }
    }

    fn note(&mut self, kind: &EventKind, at: Timestamp) {
        match kind {
            EventKind::Stop => self.stopped_at = Some(at),
            EventKind::Resume => self.stopped_at = None,
            _ => {}
        }
    }
}

/// Lets a paused guest run for an instant, if QEMU would not survive, or not begin, its migration
/// otherwise. The head of this module says when.
pub(super) async fn wake(machine: &Machine) -> Result<(), QmpError> {
    let needs = match machine.status().await?.run_state {
        RunState::PostMigrate => true,
        RunState::Paused | RunState::Prelaunch if !machine.features().sends_inactive_disks => {
            Statistics::query(machine.qmp()).await?.status == MigrationStatus::Completed
        }
        _ => false,
    };
    if needs {
        machine.cont().await?;
        machine.stop().await?;
    }
    Ok(())
}

/// Takes capabilities and parameters back. Before others are set, too: QEMU (7.2, 10.0) judges a new capability by the
/// parameters of the last migration, also one by which the guest came, and refuses zero-copy or a mapped file for its TLS.
pub(super) async fn clear(machine: &Machine) -> Result<(), QmpError> {
    set_capabilities(machine, &[]).await?;
    set_parameters(machine, default_parameters(machine.features())).await
}

/// Takes back what [`Outgoing::start`] set, after a migration that is over, so that nothing of it
/// is left. Refused by QEMU while one is under way.
///
/// # Errors
///
/// [`OutgoingError::Prepare`].
pub async fn reset(machine: &Machine) -> Result<(), OutgoingError> {
    let step = |step| move |source| OutgoingError::Prepare { step, source };
    clear(machine).await.map_err(step("settings of the last try"))?;
    tls::remove(machine).await.map_err(step("TLS credentials of the last try"))
}
