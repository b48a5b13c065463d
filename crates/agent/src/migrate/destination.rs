//! The destination's side of a migration: a stopped QEMU that waits for a guest, and becomes its owner or nothing.
//!
//! [`start_target`] is what is prepared, top to bottom; [`Arrival::run`] is the driver of the handoff's rules
//! ([`whimbrel_migration::handoff::Destination`]). The guest is never started but by the rules' `ContinueGuest`, which comes
//! after GO and after the `Owned` record is on the disk.
//!
//! One try, one QEMU: it is dead after a cancel or a failed load (7.2 exits, 10.0 may linger), and never used again. Whoever
//! asks while the rules have no answer yet is kept waiting for [`ANSWER_SECONDS`], so that "loaded" and "owned" are told the
//! moment they are true.
//!
//! A source that is not heard of for [`LEASE_SECONDS`] before its GO is given up: nothing waits here for ever.
//!
//! What comes after the guest in post-copy is [`fetching`]. Not here: HTTP, the source's side, who may ask (all in [`super`]).

mod definition;
pub(super) mod fetching;

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant, UNIX_EPOCH};

use tokio::sync::{mpsc, oneshot, watch};
use tokio::task::yield_now;
use tokio::time::{Interval, sleep};
use tracing::{debug, error, info, warn};
use whimbrel_api::agent::{
    Handoff, IncomingOffer, IncomingReport, IncomingRequest, NewAddress, Receive, ReceiveSettings,
    Resumed,
};
use whimbrel_api::error::chain;
use whimbrel_api::vm::VmState;
use whimbrel_api::{ApiError, ErrorCode, MigrationId};
use whimbrel_migration::handoff::{
    Action, Body, Destination, DestinationInput, Message, Ownership, RESEND_INTERVAL_MS, Standing,
};
use whimbrel_migration::phase::Outcome;
use whimbrel_pki::identity::qemu_subject;
use whimbrel_pki::qemu_credentials::{QemuSide, remove_qemu_credentials, write_qemu_credentials};
use whimbrel_qemu::event::{EventKind, Events};
use whimbrel_qemu::machine::{RunState, Status};
use whimbrel_qemu::migrate::Statistics;
use whimbrel_qemu::migrate::incoming::{self, IncomingError, IncomingSettings, IncomingTls};
use whimbrel_qemu::process::Process;
use whimbrel_qemu::qmp::QmpError;

use self::fetching::{Came, Loading, Lost, wait_loaded};
use super::driver::{Side, drive, ended, ticks, written};
use super::{migration_ip, remember_incoming, settings};
use crate::host::Host;
use crate::vm::found::{has_ended, hear_again};
use crate::vm::running::describe_end;
use crate::vm::spawn::{Purpose, destroy, spawn};
use crate::vm::{RunningVm, Spawned};

/// How long a source may be silent before GO, in seconds, until its destination is taken down.
pub(super) const LEASE_SECONDS: u64 = 60;
/// How long a question is kept waiting for its answer, in seconds; less than the asker waits.
const ANSWER_SECONDS: u64 = 3;
/// How long a killed QEMU may take to be gone, in seconds, before it is looked at again.
const KILL_SECONDS: u64 = 5;

/// What somebody wants of an arrival.
#[derive(Debug)]
pub(super) enum Order {
    /// The source (or the controller for it) says something and wants the answer.
    Message(Message, oneshot::Sender<Handoff>),
    /// Take it down, if GO has not come.
    Abandon(String),
    /// The VM was taken back from here by an operator's word.
    Superseded,
    /// Listen anew: the connection of a post-copy is lost.
    ListenAgain(oneshot::Sender<Result<NewAddress, ApiError>>),
}

/// One VM on its way in.
pub(super) struct Arrival {
    host: Arc<Host>,
    id: MigrationId,
    request: IncomingRequest,
    ticket: String,
    rules: Destination,
    /// The QEMU, once it has been started.
    target: Option<Spawned>,
    loading: Option<Loading>,
    /// QEMU's figures, from post-copy on.
    statistics: watch::Sender<Statistics>,
    /// What whoever asked for the preparation gets.
    offer: watch::Sender<Option<Result<IncomingOffer, ApiError>>>,
    /// How this side is, for whoever looks.
    report: watch::Sender<IncomingReport>,
    /// Who waits for an answer, and since when.
    waiting: Vec<(Instant, oneshot::Sender<Handoff>)>,
    /// When the source was last heard.
    heard: Instant,
    /// When the guest ran again: by this process's clock, and QEMU's own stamp (0 if there was none).
    resumed: Option<(Instant, u64)>,
    /// The record by which this host owns the VM, once it is on the disk.
    owned: Option<Ownership>,
    /// The VM has a task here, which has lent it: its memory still comes.
    adopted: bool,
    /// Memory that its source will never send.
    lost: Lost,
    /// Why its guest had to be ended.
    starved: Option<String>,
    moved: bool,
}

/// What an arrival tells to others.
pub(super) struct Voices {
    pub(super) offer: watch::Sender<Option<Result<IncomingOffer, ApiError>>>,
    pub(super) report: watch::Sender<IncomingReport>,
    pub(super) statistics: watch::Sender<Statistics>,
}

/// A stopped QEMU that listens for exactly one source. On failure nothing is left of it.
async fn start_target(
    host: &Arc<Host>,
    id: MigrationId,
    request: &IncomingRequest,
) -> Result<(Spawned, SocketAddr), ApiError> {
    let target = spawn(host, &request.definition, Purpose::Receive(id)).await?;
    match listen(host, &target, request).await {
        Ok(address) => Ok((target, address)),
        Err(error) => {
            if let Err(left) = destroy(host, &target).await {
                warn!(migration = %id, error = %left, "what was prepared is left to the next sweep");
            }
            Err(error)
        }
    }
}

/// Lets the QEMU listen, with certificates of its own and for one client's name.
async fn listen(
    host: &Arc<Host>,
    target: &Spawned,
    request: &IncomingRequest,
) -> Result<SocketAddr, ApiError> {
    let receive = guest_settings(request)?;
    let user = host.qemu_user();
    let credentials_dir = target.dir.tls_folder();
    write_qemu_credentials(&host.identity, &credentials_dir, QemuSide::Server, user.uid, user.gid)
        .map_err(|error| ApiError::internal("QEMU's certificates cannot be laid out", &error))?;
    let authorized_dn = qemu_subject(request.source.as_str());
    let settings = IncomingSettings {
        address: migration_ip(host, receive.listen.as_deref()).await?,
        ports: host.config.migration_port_range(),
        stream: settings::received(receive),
        tls: receive.tls.then_some(IncomingTls { credentials_dir, authorized_dn }),
    };
    let listening = incoming::prepare(&target.machine, &settings).await;
    let listening = listening.map_err(|error| ApiError::new(ErrorCode::Engine, chain(&error)))?;
    Ok(listening.address)
}

fn guest_settings(request: &IncomingRequest) -> Result<&ReceiveSettings, ApiError> {
    match &request.receive {
        Receive::Guest(settings) => Ok(settings),
        Receive::Definition => {
            Err(ApiError::new(ErrorCode::BadRequest, "a definition needs no QEMU to receive it"))
        }
    }
}

/// Everything that an arrival listens to besides its own work.
pub(super) struct Ears {
    orders: mpsc::Receiver<Order>,
    tick: Interval,
    /// The end of the QEMU has been told to the rules.
    deaf_to_qemu: bool,
}

impl Arrival {
    pub(super) fn new(
        host: Arc<Host>,
        id: MigrationId,
        (request, ticket): (IncomingRequest, String),
        rules: Destination,
        target: Option<Spawned>,
        Voices { offer, report, statistics }: Voices,
    ) -> Self {
        let loading = target.as_ref().map(wait_loaded);
        Self {
            host,
            id,
            request,
            ticket,
            rules,
            target,
            loading,
            statistics,
            offer,
            report,
            waiting: Vec::new(),
            heard: Instant::now(),
            resumed: None,
            owned: None,
            adopted: false,
            lost: Lost::default(),
            starved: None,
            moved: false,
        }
    }

    /// One that is taken up again, with what an earlier life of the agent had written. Where its memory still came, the VM
    /// has its task by now.
    pub(super) fn with_record(mut self, record: Ownership) -> Self {
        self.adopted = matches!(record.standing, Standing::Fetching { .. });
        self.owned = Some(record).filter(is_owner);
        self
    }

    /// Brings this side to its end. `first` is what the rules want done first.
    ///
    /// Postcondition: the rules are finished. Either this host owns the VM and its task has it, or the QEMU is gone with
    /// all that was made for it, and this host will never run the guest in this epoch.
    pub(super) async fn run(mut self, first: Vec<Action>, orders: mpsc::Receiver<Order>) {
        // Where it is taken up again the guest may be here already, and the rest of its memory still come.
        if self.rules.lacks_memory() {
            self.fetch();
        }
        let ears = Ears { orders, tick: ticks(), deaf_to_qemu: false };
        drive(&mut self, first, ears).await;
        self.finish().await;
    }

    fn ordered(&mut self, order: Order) -> Option<DestinationInput> {
        match order {
            Order::Message(message, answer) => {
                self.heard = Instant::now();
                self.waiting.push((Instant::now(), answer));
                Some(DestinationInput::Receive(message))
            }
            Order::Abandon(why) => Some(DestinationInput::Abandon(why)),
            Order::Superseded => Some(DestinationInput::Superseded),
            Order::ListenAgain(answer) => {
                self.listen_again(answer);
                None
            }
        }
    }

    /// The address that the migration wants listened at, if it names one.
    fn listen_at(&self) -> Option<&str> {
        guest_settings(&self.request).ok()?.listen.as_deref()
    }

    /// Lets nobody wait longer than [`ANSWER_SECONDS`], and looks after the lease.
    fn ticked(&mut self) -> DestinationInput {
        self.waiting.retain(|(since, _)| since.elapsed() < Duration::from_secs(ANSWER_SECONDS));
        if self.heard.elapsed() >= Duration::from_secs(LEASE_SECONDS) {
            self.heard = Instant::now();
            return DestinationInput::Abandon(format!(
                "the source was silent for {LEASE_SECONDS} s"
            ));
        }
        DestinationInput::Tick
    }

    async fn persist(&mut self, record: &Ownership) -> DestinationInput {
        let tell = async {
            error!(migration = %self.id, vm = %record.vm, standing = ?record.standing,
                "the disk of this host's ledger does not answer; it is waited for");
        };
        let written = match self.brings_definition(record) {
            Some(definition) => {
                written(self.host.ledger.take_stopped(definition, record), tell).await
            }
            None => written(self.host.ledger.persist(record), tell).await,
        };
        match written {
            Ok(()) => {
                self.owned = is_owner(record).then(|| record.clone());
                DestinationInput::Persisted
            }
            Err(error) => {
                warn!(migration = %self.id, error = chain(&error), "the ledger could not be written");
                DestinationInput::PersistFailed
            }
        }
    }

    async fn start_target(&mut self) -> Option<DestinationInput> {
        if self.is_definition() {
            return Some(self.expect_definition().await);
        }
        let began = Instant::now();
        match start_target(&self.host, self.id, &self.request).await {
            Ok((target, address)) => {
                self.loading = Some(wait_loaded(&target));
                self.target = Some(target);
                let start_ms = u64::try_from(began.elapsed().as_millis()).unwrap_or(u64::MAX);
                let agent = self.host.config.advertised();
                let (ticket, disks) = (self.ticket.clone(), None);
                let offer = IncomingOffer { address, agent, ticket, start_ms, disks };
                self.tell_offer(offer).await;
                None
            }
            Err(error) => {
                let why = error.message.clone();
                self.offer.send_replace(Some(Err(error)));
                Some(DestinationInput::Abandon(why))
            }
        }
    }

    /// Says where it is ready, and remembers that.
    async fn tell_offer(&mut self, offer: IncomingOffer) {
        let (host, request) = (&self.host, &self.request);
        let noted = remember_incoming(host, self.id, request, &self.ticket, Some(&offer)).await;
        if let Err(error) = noted {
            // After a restart of the agent the offer could not be told again; the source then ends the try.
            warn!(migration = %self.id, error = chain(&error), "the offer is only in memory");
        }
        self.offer.send_replace(Some(Ok(offer)));
    }

    /// Answers everybody who waits.
    fn send(&mut self, message: Message) {
        let resumed = self.resumed.map(|(at, resume_at_us)| Resumed {
            since_resume_us: u64::try_from(at.elapsed().as_micros()).unwrap_or(u64::MAX),
            resume_at_us,
        });
        for (_, answer) in self.waiting.drain(..) {
            // Whoever asked may have gone; it asks again.
            let _gone = answer.send(Handoff { ticket: String::new(), message, resumed });
        }
    }

    /// QEMU closes its listener itself once the stream is complete; a port that is still open would let a second stream in.
    /// Not asked of the port: the next QEMU that waits for a guest may have it by now.
    ///
    /// In post-copy it listens to the end (7.2, 10.0) and drops whoever comes besides its source; what is still to come could
    /// not be waited for.
    ///
    /// A QEMU that has died, of which nobody has heard yet, is no owner's: after the next step it would take the VM with it,
    /// while a refusal still lets the source resume.
    fn close_listeners(&self) -> DestinationInput {
        if self.is_definition() {
            return DestinationInput::ListenersClosed;
        }
        let Some(target) = &self.target else { return DestinationInput::CloseFailed };
        if has_ended(target.process.identity()) {
            return DestinationInput::CloseFailed;
        }
        if self.rules.lacks_memory() {
            return DestinationInput::ListenersClosed;
        }
        match target.process.listens() {
            Ok(false) => DestinationInput::ListenersClosed,
            Ok(true) => {
                warn!(migration = %self.id, "QEMU still listens although the guest is here");
                DestinationInput::CloseFailed
            }
            Err(error) => {
                warn!(migration = %self.id, %error, "cannot see whether QEMU still listens");
                DestinationInput::CloseFailed
            }
        }
    }

    /// Lets the guest run. No answer at all means nothing: it is asked again how it is.
    ///
    /// A `cont` that was not answered may have been heard all the same, and the guest may have run and stopped by itself
    /// (powered off, say): a later refusal is one only where the guest is still as it was loaded.
    async fn continue_guest(&mut self) -> DestinationInput {
        if self.is_definition() {
            // A stopped VM goes on standing still.
            return DestinationInput::Continued;
        }
        let Some(target) = &mut self.target else { return DestinationInput::QemuGone };
        let deaf = target.machine.qmp().ended().is_some();
        // Who waits for the rest would open a session, too, and QEMU has one at a time.
        let fetches = self.loading.take_if(|_| deaf).is_some();
        let process = target.process.clone();
        let answer = self.let_run(&process).await;
        if fetches {
            self.fetch();
        }
        answer
    }

    async fn let_run(&mut self, process: &Process) -> DestinationInput {
        let Some(target) = &mut self.target else { return DestinationInput::QemuGone };
        let mut events = target.machine.events();
        let mut unanswered = false;
        loop {
            tokio::select! {
                () = hear_again(&self.host, target) => {}
                _ = process.wait_exit() => {}
            }
            if process.exited().is_some() {
                return DestinationInput::QemuGone;
            }
            let told = target.machine.cont().await;
            let now = Instant::now();
            let refused = matches!(told, Err(QmpError::Refused { .. }));
            match (told, target.machine.status().await) {
                (Err(_), Ok(Status { running: false, run_state })) if refused => {
                    let as_loaded = matches!(run_state, RunState::Paused | RunState::Prelaunch);
                    if !unanswered || as_loaded {
                        return DestinationInput::ContinueFailed;
                    }
                    return DestinationInput::Continued;
                }
                (Ok(()), _) | (_, Ok(Status { running: true, .. })) => {
                    self.resumed = Some(resumption(&mut events).unwrap_or((now, 0)));
                    return DestinationInput::Continued;
                }
                _ => {
                    unanswered |= !refused;
                    sleep(Duration::from_millis(RESEND_INTERVAL_MS)).await;
                }
            }
        }
    }

    async fn kill_target(&mut self) -> Option<DestinationInput> {
        let Some(target) = &self.target else { return Some(DestinationInput::QemuGone) };
        self.loading = None;
        match target.process.kill_and_wait(Duration::from_secs(KILL_SECONDS)).await {
            Ok(_) => Some(DestinationInput::QemuGone),
            Err(error) => {
                warn!(migration = %self.id, error = chain(&error), "the destination's QEMU is not gone yet");
                None
            }
        }
    }

    /// Tells the switches where the guest is now. Not awaited: the source's answer comes first.
    fn announce(&self) {
        let Some(target) = &self.target else { return };
        let machine = target.machine.clone();
        tokio::spawn(async move {
            if let Err(error) = machine.announce_self().await {
                debug!(
                    error = chain(&error),
                    "QEMU did not announce the guest; the guest does so itself"
                );
            }
        });
    }

    fn settle(&mut self, outcome: &Outcome) {
        match outcome {
            Outcome::Moved => {
                info!(migration = %self.id, "the guest is this host's");
                self.moved = true;
            }
            Outcome::Stayed { why } => {
                warn!(migration = %self.id, why, "the guest does not come");
                self.offer.send_if_modified(|offer| {
                    let open = offer.is_none();
                    if open {
                        *offer = Some(Err(ApiError::new(ErrorCode::Engine, why.clone())));
                    }
                    open
                });
                self.report.send_replace(IncomingReport::Refused { why: why.clone() });
            }
            Outcome::Unresolved { .. } => {}
        }
    }

    /// The VM's task gets the VM, or the rest of the try is swept.
    async fn finish(mut self) {
        let id = self.id;
        if self.is_definition() {
            return definition::settle(&self.host, &self.request, self.owned.take(), &self.report)
                .await;
        }
        match (self.target.take(), self.owned.take()) {
            (target, Some(ownership)) if self.moved => self.hand_over(target, ownership).await,
            (Some(target), _) => {
                if let Err(error) = destroy(&self.host, &target).await {
                    warn!(migration = %id, %error, "what was prepared is left to the next sweep");
                }
            }
            (None, _) => {}
        }
    }

    /// The guest is here, or has ended here.
    async fn hand_over(self, target: Option<Spawned>, ownership: Ownership) {
        let Self { id, host, report, adopted, starved, .. } = self;
        let vms = &host.vms;
        let (vm, epoch) = (ownership.vm, ownership.epoch);
        if let Some(qemu) = &target
            && let Err(error) = remove_qemu_credentials(&qemu.dir.tls_folder())
        {
            warn!(migration = %id, error = chain(&error), "QEMU's certificates are left over until its run is swept");
        }
        match target {
            Some(qemu) if !adopted => {
                let running = RunningVm { qemu, ownership };
                if let Err(error) = vms.adopt_incoming(&host, running).await {
                    error!(migration = %id, %error, "the VM runs here, but its row could not be written");
                }
            }
            Some(qemu) if !has_ended(qemu.process.identity()) => {
                vms.give_back(RunningVm { qemu, ownership }).await;
            }
            target => {
                let ended = target.map(|qemu| how_it_ended(&qemu.process));
                let why = starved.or(ended);
                let why = why.unwrap_or_else(|| "QEMU ended during a migration".to_owned());
                vms.give_back_ended(vm, Some(why)).await;
            }
        }
        let state = vms.report(vm).map_or(VmState::Running, |report| report.state);
        report.send_replace(IncomingReport::Owned { epoch, vm: state });
    }
}

/// Whether a record makes its host the owner of the VM, for good.
fn is_owner(record: &Ownership) -> bool {
    matches!(record.standing, Standing::Owned | Standing::Fetching { .. })
}

fn how_it_ended(process: &Process) -> String {
    process.exited().map_or_else(
        || "QEMU ended during a migration".to_owned(),
        |exit| describe_end(process, exit),
    )
}

impl Side for Arrival {
    type Input = DestinationInput;
    type Ears = Ears;

    fn step(&mut self, input: DestinationInput) -> Vec<Action> {
        self.rules.step(input)
    }

    fn is_finished(&self) -> bool {
        self.rules.is_finished()
    }

    async fn act(&mut self, action: Action) -> Option<DestinationInput> {
        match action {
            Action::Persist(record) => Some(self.persist(&record).await),
            Action::StartTarget => self.start_target().await,
            Action::Send(message) => {
                self.send(message);
                // Whoever carries the answer to the network goes first: what follows here touches files.
                yield_now().await;
                if message.body == Body::Owned {
                    self.adopt().await;
                }
                None
            }
            Action::CloseListeners => Some(self.close_listeners()),
            Action::ContinueGuest => Some(self.continue_guest().await),
            Action::KillTarget => self.kill_target().await,
            Action::Announce => {
                self.announce();
                None
            }
            Action::Settle(outcome) => {
                self.settle(&outcome);
                None
            }
            Action::RaiseUnresolved => {
                error!(migration = %self.id, vm = %self.request.definition.id,
                    "a guest runs here that this host does not own; it is left alone: an operator must look");
                None
            }
            Action::LookForRest => self.look_for_rest().await,
            Action::ResumeGuest => {
                self.resume_guest().await;
                None
            }
            Action::CloseExports => None,
            Action::BeginCopy
            | Action::SettleDisks
            | Action::FinishCopy
            | Action::StopCopy
            | Action::QuitSource
            | Action::AcceptCancel
            | Action::RefuseCancel => {
                error!(migration = %self.id, "the rules asked the destination for a source's action");
                None
            }
        }
    }

    async fn listen(&mut self, ears: &mut Ears) -> Option<DestinationInput> {
        let process = self.target.as_ref().map(|target| &target.process);
        tokio::select! {
            Some(order) = ears.orders.recv() => self.ordered(order),
            came = until_loaded(&mut self.loading), if self.loading.is_some() => self.came(came),
            () = ended(process), if !ears.deaf_to_qemu && process.is_some() => {
                ears.deaf_to_qemu = true;
                Some(DestinationInput::QemuGone)
            }
            _ = ears.tick.tick() => Some(self.ticked()),
        }
    }
}

/// Resolves when the loading has ended; only asked while there is one.
async fn until_loaded(loading: &mut Option<Loading>) -> Result<Came, IncomingError> {
    match loading {
        Some(loading) => loading.await,
        None => std::future::pending().await,
    }
}

/// When the guest ran again, by QEMU's event, which is stamped with this host's wall clock: what came after it, up to the
/// answer to `cont`, was no pause of the guest. `None` if the event was missed.
fn resumption(events: &mut Events) -> Option<(Instant, u64)> {
    while let Ok(Some(event)) = events.try_next() {
        if event.kind == EventKind::Resume {
            let stamp = u64::try_from(event.at.as_micros()).ok()?;
            let since = UNIX_EPOCH.checked_add(Duration::from_micros(stamp))?.elapsed().ok()?;
            return Some((Instant::now().checked_sub(since)?, stamp));
        }
    }
    None
}
