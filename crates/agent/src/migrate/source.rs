//! The source's side of a migration: the guest leaves this host, or stays.
//!
//! [`copy`] is what the guest goes through, top to bottom: memory travels while it runs, then it stops and the rest
//! follows. [`Departure::run`] is the driver of the handoff's rules ([`whimbrel_migration::handoff::Source`]): it feeds
//! them what happens and does what they say, in their order. Which of the two may run the guest is decided there, not here.
//!
//! **The point of no return** is the `Persist` of the `Released` record. Before it every error is a `Fail` that the rules
//! turn into "the guest resumes here". After it no error exists that could: [`Departure::act`] returns answers, never
//! errors, and what cannot be done is tried again at the next tick.
//!
//! The VM is taken by value from its task ([`RunningVm`]) and given back by [`Ended`]. Not here: HTTP, the destination's
//! side, what QEMU is told ([`whimbrel_qemu::migrate::outgoing`]). Called by [`super::Migrations`].

use std::collections::VecDeque;
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use futures::StreamExt;
use futures::stream::FuturesUnordered;
use tokio::sync::{mpsc, oneshot, watch};
use tokio::time::{Interval, MissedTickBehavior, interval, sleep, timeout};
use tracing::{debug, error, warn};
use whimbrel_api::agent::{Handoff, OutgoingEnd, OutgoingReport, OutgoingRequest, Resumed};
use whimbrel_api::client::AgentClient;
use whimbrel_api::error::chain;
use whimbrel_api::migration::{Progress, Stay};
use whimbrel_api::vm::VmState;
use whimbrel_api::{ApiError, Downtime, ErrorCode, MigrationId, Phase};
use whimbrel_migration::handoff::{
    Action, Body, Claim, Message, Ownership, RESEND_INTERVAL_MS, Source, SourceInput, Standing,
    UNRESOLVED_AFTER_MS,
};
use whimbrel_migration::phase::Outcome;
use whimbrel_pki::identity::qemu_dns_name;
use whimbrel_pki::qemu_credentials::{QemuSide, remove_qemu_credentials, write_qemu_credentials};
use whimbrel_qemu::event::{Event, EventError, EventKind, Events};
use whimbrel_qemu::machine::{Machine, RunState};
use whimbrel_qemu::migrate::Statistics;
use whimbrel_qemu::migrate::outgoing::{
    self, Completed, DEFAULT_MAX_DOWNTIME_MS, Outgoing, OutgoingError, OutgoingSettings,
    OutgoingTls,
};
use whimbrel_qemu::process::Process;

use super::destination::LEASE_SECONDS;
use super::{refused, remember_outgoing};
use crate::host::Host;
use crate::vm::RunningVm;

/// The least time that QEMU gets, in seconds, from the guest's stop until the rest has arrived; after it the guest resumes
/// here. A slow link gets more: see [`switchover_limit`].
const SWITCHOVER_SECONDS: u64 = 4;
/// How long the destination may take, in seconds, to say that it has loaded what QEMU has sent.
const CONFIRM_SECONDS: u64 = 4;
/// How long the connection to the destination may take, in seconds: in its handshake the guest may stand still.
const CONNECT_SECONDS: u64 = 6;
/// How long QEMU may take to give up a migration, in seconds.
const CANCEL_SECONDS: u64 = 10;
/// How long it may take to do so by itself, in milliseconds, before its connection is cut.
const CANCEL_ALONE_MS: u64 = 700;
/// How often the destination hears that the source still means it, in seconds: renews the destination's lease.
const HEARTBEAT_SECONDS: u64 = 10;
/// Questions to the destination under way at the same time; more are not asked. Of all messages, twice as many.
const ASKING_MAX: usize = 4;
/// How often an attempt to resume the guest is repeated, in milliseconds.
const RESUME_RETRY_MS: u64 = 200;

/// What somebody else wants of a migration under way.
#[derive(Debug)]
pub(super) enum Order {
    /// End it here; answered whether that is still possible.
    Cancel(oneshot::Sender<bool>),
    /// What the destination said, brought by the controller.
    Answer(Message),
}

/// How it ended, with the VM that was lent, if it still has a QEMU here.
#[derive(Debug)]
pub(super) struct Ended {
    pub(super) guest: Option<RunningVm>,
    pub(super) end: OutgoingEnd,
}

type Copying = Pin<Box<dyn Future<Output = Result<Completed, (Phase, OutgoingError)>> + Send>>;
type Asking = Pin<Box<dyn Future<Output = Result<Handoff, ApiError>> + Send>>;

/// One VM on its way out.
pub(super) struct Departure {
    host: Arc<Host>,
    pub(super) id: MigrationId,
    pub(super) request: OutgoingRequest,
    rules: Source,
    /// The VM on loan; `None` if an agent that was restarted has found no QEMU of it.
    guest: Option<RunningVm>,
    peer: AgentClient,
    settings: OutgoingSettings,
    pub(super) report: watch::Sender<OutgoingReport>,
    statistics: watch::Sender<Statistics>,
    copying: Option<Copying>,
    asking: FuturesUnordered<Asking>,
    cancels: Vec<oneshot::Sender<bool>>,
    /// When the destination last answered anything, or took more of the guest.
    lively_at: Instant,
    /// A question is open whose answer will tell that the destination holds the guest.
    answer_due: bool,
    /// Until when the destination may confirm that it holds the guest.
    confirm_by: Option<Instant>,
    /// When the release was written, or its writing failed, until the operator has been told that it is unanswered.
    released_at: Option<Instant>,
    pause: Pause,
    /// What the driver knows of the cause, if the VM stays.
    why: Option<Stay>,
    end: OutgoingEnd,
}

/// The moments of the guest's pause, in microseconds since 1970 by this host's clock: one clock for all, as QEMU stamps its
/// STOP event with it. Figures only; nothing is decided by them.
#[derive(Debug, Default)]
struct Pause {
    stopped: Option<u64>,
    completed: Option<u64>,
    confirmed: Option<u64>,
    released: Option<u64>,
}

fn now_us() -> u64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(now.as_micros()).unwrap_or(u64::MAX)
}

/// Copies the guest while it runs, then stops it and sends the rest.
///
/// On success the guest stands still and QEMU has said `completed`; on failure it is as QEMU left it, which the caller
/// does not guess: it cancels and resumes.
async fn copy(
    machine: Machine,
    settings: OutgoingSettings,
    statistics: watch::Sender<Statistics>,
    report: watch::Sender<OutgoingReport>,
) -> Result<Completed, (Phase, OutgoingError)> {
    let precopy = |error| (Phase::Precopy, error);
    enter(&report, Phase::Precopy);
    let mut outgoing = Outgoing::start(&machine, &settings).await.map_err(precopy)?;
    outgoing.wait_connected(Duration::from_secs(CONNECT_SECONDS)).await.map_err(precopy)?;
    outgoing.wait_pre_switchover(&statistics).await.map_err(precopy)?;

    // The guest stands still. Disks that travel too will be concluded here, before QEMU may go on.
    enter(&report, Phase::Switchover);
    let limit = switchover_limit(&settings);
    let completed = timeout(limit, outgoing.continue_to_completed(limit)).await;
    // A QEMU that cannot write to its destination answers nothing, and looks at no limit.
    let late = OutgoingError::TookTooLong { what: "the last stage", after: limit };
    completed.unwrap_or(Err(late)).map_err(|error| (Phase::Switchover, error))
}

/// What the last pass may take: the pause that was asked for, several times over, and never less than
/// [`SWITCHOVER_SECONDS`]. A guest that is held longer than this is better off running here.
fn switchover_limit(settings: &OutgoingSettings) -> Duration {
    Duration::from_secs(SWITCHOVER_SECONDS)
        + Duration::from_millis(settings.max_downtime_ms.saturating_mul(4))
}

fn enter(report: &watch::Sender<OutgoingReport>, phase: Phase) {
    report.send_if_modified(|report| {
        let new = report.phase != phase;
        report.phase = phase;
        new
    });
}

/// Everything that a departure listens to.
struct Ears {
    orders: mpsc::Receiver<Order>,
    statistics: watch::Receiver<Statistics>,
    tick: Interval,
    heartbeat: Interval,
    /// What QEMU tells by itself.
    events: Option<Events>,
    /// The source's QEMU, until its end has been noticed.
    process: Option<Process>,
}

impl Departure {
    /// Takes the VM from its task and gets everything ready, the handoff's first record not included.
    ///
    /// On failure the VM is its task's again, as it was.
    pub(super) async fn begin(
        host: &Arc<Host>,
        id: MigrationId,
        request: &OutgoingRequest,
        peer: AgentClient,
        report: watch::Sender<OutgoingReport>,
    ) -> Result<(Self, Vec<Action>), ApiError> {
        let guest = host.vms.lend(request.vm, id).await?;
        match Self::ready(host, id, request, &guest).await {
            Ok((rules, first)) => {
                let departure =
                    Self::new(host, id, request.clone(), (rules, Some(guest)), peer, report);
                Ok((departure, first))
            }
            Err(error) => {
                remove_credentials(&guest);
                host.vms.give_back(guest).await;
                Err(error)
            }
        }
    }

    async fn ready(
        host: &Arc<Host>,
        id: MigrationId,
        request: &OutgoingRequest,
        guest: &RunningVm,
    ) -> Result<(Source, Vec<Action>), ApiError> {
        let spent = host.ledger.ownership(request.vm, Some(id)).await?.is_some();
        // The ledger's word, not the task's memory of it.
        let current = host.ledger.current(request.vm).await?;
        let current = current.as_ref().unwrap_or(&guest.ownership);
        let claim = Claim { vm: request.vm, migration: id, epoch: request.epoch };
        let begun = Source::begin(current, spent, claim, request.destination.clone());
        let (rules, first) = begun.map_err(|why| refused(&why))?;
        let user = host.qemu_user();
        write_qemu_credentials(
            &host.identity,
            &guest.qemu.dir.tls_folder(),
            QemuSide::Client,
            user.uid,
            user.gid,
        )
        .map_err(|error| ApiError::internal("QEMU's certificates cannot be laid out", &error))?;
        remember_outgoing(host, id, request, None).await?;
        Ok((rules, first))
    }

    /// The driver of `rules`, for a migration that begins or one that is taken up again.
    pub(super) fn new(
        host: &Arc<Host>,
        id: MigrationId,
        request: OutgoingRequest,
        (rules, guest): (Source, Option<RunningVm>),
        peer: AgentClient,
        report: watch::Sender<OutgoingReport>,
    ) -> Self {
        let credentials_dir =
            guest.as_ref().map(|guest| guest.qemu.dir.tls_folder()).unwrap_or_default();
        let settings = OutgoingSettings {
            to: request.offer.address,
            tls: Some(OutgoingTls {
                credentials_dir,
                hostname: qemu_dns_name(request.destination.as_str()),
            }),
            max_downtime_ms: request.options.max_downtime_ms.unwrap_or(DEFAULT_MAX_DOWNTIME_MS),
            max_bandwidth_bytes_per_second: request.options.bandwidth_bytes_per_s.unwrap_or(0),
            ..OutgoingSettings::to(request.offer.address, None)
        };
        let released_at = rules.is_past_release().then(Instant::now);
        Self {
            host: host.clone(),
            id,
            request,
            rules,
            guest,
            peer,
            settings,
            report,
            statistics: watch::Sender::new(Statistics::default()),
            copying: None,
            asking: FuturesUnordered::new(),
            answer_due: false,
            cancels: Vec::new(),
            lively_at: Instant::now(),
            confirm_by: None,
            released_at,
            pause: Pause::default(),
            why: None,
            end: OutgoingEnd::Open,
        }
    }

    /// Brings the migration to its end. `first` is what the rules want done first.
    ///
    /// Postcondition: the rules are finished. `Stayed`: this host owns the VM, and the guest runs if it shall and can. `Moved`: the
    /// destination has said that it owns the VM, and what was its QEMU here is ending.
    pub(super) async fn run(mut self, first: Vec<Action>, orders: mpsc::Receiver<Order>) -> Ended {
        let mut tick = interval(Duration::from_millis(RESEND_INTERVAL_MS));
        tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut ears = Ears {
            orders,
            statistics: self.statistics.subscribe(),
            tick,
            heartbeat: interval(Duration::from_secs(HEARTBEAT_SECONDS)),
            events: self.guest.as_ref().map(|guest| guest.qemu.machine.events()),
            process: self.guest.as_ref().map(|guest| guest.qemu.process.clone()),
        };
        let mut actions = first;
        loop {
            self.perform(actions).await;
            if self.rules.is_finished() {
                return self.finish().await;
            }
            let input = self.listen(&mut ears).await;
            actions = input.map(|input| self.rules.step(input)).unwrap_or_default();
        }
    }

    /// Waits for the next thing that happens; `None` if it means nothing to the rules.
    async fn listen(&mut self, ears: &mut Ears) -> Option<SourceInput> {
        tokio::select! {
            Some(order) = ears.orders.recv() => Some(self.ordered(order)),
            Some(answer) = self.asking.next(), if !self.asking.is_empty() => self.answered(answer),
            copied = or_never(self.copying.as_mut()) => Some(self.copied(copied)),
            Ok(()) = ears.statistics.changed() => {
                let statistics = ears.statistics.borrow_and_update().clone();
                self.copied_more(&statistics);
                None
            }
            event = next_event(&mut ears.events) => self.qemu_said(&event),
            () = ended(&ears.process) => {
                ears.process = None;
                Some(self.qemu_ended())
            }
            _ = ears.heartbeat.tick() => {
                self.ask_loaded();
                None
            }
            _ = ears.tick.tick() => Some(self.deadline().unwrap_or(SourceInput::Tick)),
        }
    }

    fn copied_more(&mut self, statistics: &Statistics) {
        let progress = progress(statistics, &self.request);
        self.report.send_modify(|report| {
            let before = report.progress.replace(progress);
            let sent = |progress: &Option<Progress>| progress.as_ref().map(|p| p.transferred_bytes);
            if sent(&report.progress) != sent(&before) {
                self.lively_at = Instant::now();
            }
        });
    }

    fn ordered(&mut self, order: Order) -> SourceInput {
        match order {
            Order::Answer(message) => {
                if message.body == Body::Refused {
                    self.refused_there();
                }
                SourceInput::Receive(message)
            }
            Order::Cancel(answer) => {
                self.cancels.push(answer);
                if !self.rules.is_past_release() {
                    self.why.get_or_insert(Stay::Cancelled);
                }
                SourceInput::Cancel
            }
        }
    }

    fn copied(&mut self, copied: Result<Completed, (Phase, OutgoingError)>) -> SourceInput {
        self.copying = None;
        match copied {
            Ok(completed) => {
                self.pause.stopped =
                    completed.stopped_at.and_then(|at| u64::try_from(at.as_micros()).ok());
                self.pause.completed = Some(now_us());
                self.confirm_by = Some(Instant::now() + Duration::from_secs(CONFIRM_SECONDS));
                self.answer_due = !self.asking.is_empty();
                let last = progress(&completed.statistics, &self.request);
                self.report.send_modify(|report| report.progress = Some(last));
                SourceInput::Completed
            }
            Err((phase, error)) => self.failed(phase, ErrorCode::Engine, chain(&error)),
        }
    }

    fn failed(&mut self, phase: Phase, code: ErrorCode, message: String) -> SourceInput {
        let code = code.as_str().to_owned();
        self.why.get_or_insert(Stay::Failed { phase, code, message: message.clone() });
        SourceInput::Fail(message)
    }

    /// What an event of the source's QEMU means for the migration: a guest that powers itself off has nowhere to go.
    fn qemu_said(&mut self, event: &Event) -> Option<SourceInput> {
        match event.kind {
            EventKind::Shutdown { guest: true, .. } if !self.rules.is_past_release() => {
                self.why.get_or_insert(Stay::GuestPoweredOff);
                Some(SourceInput::Fail("the guest powered itself off".to_owned()))
            }
            // The guest stands still: the destination can be asked while QEMU sends the rest. A question that is open already
            // is answered as well, and a second one at this moment would have to make a connection of its own first.
            EventKind::Stop => {
                if self.asking.is_empty() {
                    self.ask_loaded();
                }
                None
            }
            _ => None,
        }
    }

    fn qemu_ended(&mut self) -> SourceInput {
        let words = self
            .guest
            .as_ref()
            .map(|guest| guest.qemu.process.last_words().join("; "))
            .unwrap_or_default();
        let message = format!("the source's QEMU ended: {words}");
        let (phase, code) = (self.report.borrow().phase, ErrorCode::Engine.as_str().to_owned());
        self.why.get_or_insert(Stay::Failed { phase, code, message });
        SourceInput::QemuGone
    }

    /// An answer, or none: `busy` and the like are no answer to the rules, and yet a sign of life.
    fn answered(&mut self, answer: Result<Handoff, ApiError>) -> Option<SourceInput> {
        match answer {
            Ok(answer) => {
                self.lively_at = Instant::now();
                Some(self.heard(answer))
            }
            Err(error) => {
                debug!(migration = %self.id, %error, "no answer to a handoff message yet");
                if !error.is_unknown() {
                    self.lively_at = Instant::now();
                }
                None
            }
        }
    }

    /// What an answer means, with the moments that it marks.
    fn heard(&mut self, answer: Handoff) -> SourceInput {
        match answer.message.body {
            Body::Loaded => {
                self.pause.confirmed.get_or_insert_with(now_us);
            }
            Body::Owned => self.pause_over(answer.resumed),
            Body::Refused => self.refused_there(),
            _ => {}
        }
        SourceInput::Receive(answer.message)
    }

    fn refused_there(&mut self) {
        let message = "the destination refused the VM; its own event says why".to_owned();
        self.why.get_or_insert(Stay::DestinationRefused { message });
    }

    fn deadline(&mut self) -> Option<SourceInput> {
        if self.confirm_by.is_some_and(|by| by <= Instant::now()) && !self.rules.is_past_release() {
            self.confirm_by = None;
            let message = format!(
                "the destination did not say within {CONFIRM_SECONDS} s that it holds the whole guest"
            );
            return Some(self.failed(Phase::Switchover, ErrorCode::Unreachable, message));
        }
        // TCP would keep the copy waiting for a quarter of an hour, and the destination has given it up long before.
        if self.copying.is_some() && self.lively_at.elapsed() >= Duration::from_secs(LEASE_SECONDS)
        {
            let message = format!(
                "the destination was silent for {LEASE_SECONDS} s, and the copy stood still"
            );
            let phase = self.report.borrow().phase;
            return Some(self.failed(phase, ErrorCode::Unreachable, message));
        }
        let waited = self.released_at.map(|at| at.elapsed());
        if waited.is_some_and(|waited| waited >= Duration::from_millis(UNRESOLVED_AFTER_MS)) {
            self.released_at = None;
            return Some(SourceInput::Overdue);
        }
        None
    }

    /// Carries actions out, one after the other; what follows from an answer comes before what is left.
    async fn perform(&mut self, actions: Vec<Action>) {
        let mut todo = VecDeque::from(actions);
        while let Some(action) = todo.pop_front() {
            if let Some(answer) = self.act(action).await {
                for next in self.rules.step(answer).into_iter().rev() {
                    todo.push_front(next);
                }
            }
        }
    }

    async fn act(&mut self, action: Action) -> Option<SourceInput> {
        match action {
            Action::Persist(record) => return Some(self.persist(&record).await),
            Action::Send(message) => self.send(message),
            Action::BeginCopy => self.begin_copy(),
            Action::StopCopy => self.stop_copy().await,
            Action::ResumeGuest => self.resume_guest().await,
            Action::QuitSource => self.quit(),
            Action::AcceptCancel => self.answer_cancels(true),
            Action::RefuseCancel => self.answer_cancels(false),
            Action::RaiseUnresolved => {
                let ask = self.rules.peer().clone();
                error!(migration = %self.id, vm = %self.request.vm, %ask, "unresolved: the VM was given away and is paused here until that host answers");
                let (migration, vm) = (self.id, self.request.vm);
                self.host
                    .vms
                    .loan_news(vm, VmState::Unresolved { migration, ask: ask.clone() })
                    .await;
                self.report.send_modify(|report| report.end = OutgoingEnd::Unresolved { ask });
            }
            Action::Settle(outcome) => self.settle(outcome),
            Action::StartTarget
            | Action::CloseListeners
            | Action::ContinueGuest
            | Action::LookForRest
            | Action::KillTarget
            | Action::Announce => {
                error!(migration = %self.id, "the rules asked the source for a destination's action");
            }
        }
        None
    }

    async fn persist(&mut self, record: &Ownership) -> SourceInput {
        let releasing =
            matches!(record.standing, Standing::Released { .. } | Standing::Serving { .. });
        let answer = self.write(record, releasing).await;
        if releasing {
            // Whether it was written or not: the guest stands still until somebody says whose it is.
            self.released_at = Some(Instant::now());
        }
        answer
    }

    async fn write(&mut self, record: &Ownership, releasing: bool) -> SourceInput {
        if releasing {
            // A test that wants the agent to die or hang here says so; a failure counts as the ledger's.
            if self.host.failpoints.hit("source.before-release").await.is_err() {
                return SourceInput::PersistFailed;
            }
            enter(&self.report, Phase::Handoff);
            self.pause.confirmed.get_or_insert_with(now_us);
        }
        match self.host.ledger.persist(record).await {
            Ok(()) => {
                if releasing {
                    self.pause.released = Some(now_us());
                }
                SourceInput::Persisted
            }
            Err(error) => {
                warn!(migration = %self.id, error = chain(&error), "the ledger could not be written");
                SourceInput::PersistFailed
            }
        }
    }

    /// Asks the destination, and lets [`Self::listen`] hear the answer. An answer that does not come is not missed: the
    /// rules ask again at the next tick.
    fn send(&mut self, message: Message) {
        if message.body == Body::AskLoaded && std::mem::take(&mut self.answer_due) {
            // One more question would only hold the connection at the moment when GO needs it.
            return;
        }
        let handoff = Handoff { ticket: self.request.offer.ticket.clone(), message, resumed: None };
        if matches!(message.body, Body::Go { .. }) {
            let relay = Some(handoff.clone());
            self.report.send_if_modified(|report| {
                let new = report.relay.is_none();
                report.relay = relay;
                new
            });
        }
        // Unanswered questions must not keep the source from telling what it has decided.
        let most = if message.body == Body::AskLoaded { ASKING_MAX } else { 2 * ASKING_MAX };
        if self.asking.len() >= most {
            return;
        }
        let (peer, id) = (self.peer.clone(), self.id);
        self.asking.push(Box::pin(async move { peer.handoff(id, &handoff).await }));
    }

    /// Asks without being told to by the rules. Early, it renews the destination's lease; once the guest stands still, the
    /// answer is on its way while QEMU still sends. An answer means what it always means.
    fn ask_loaded(&mut self) {
        self.send(Message { claim: self.rules.claim(), body: Body::AskLoaded });
    }

    fn begin_copy(&mut self) {
        let Some(guest) = &self.guest else { return };
        let (machine, settings) = (guest.qemu.machine.clone(), self.settings.clone());
        let (statistics, report) = (self.statistics.clone(), self.report.clone());
        self.copying = Some(Box::pin(copy(machine, settings, statistics, report)));
    }

    async fn stop_copy(&mut self) {
        self.copying = None;
        let Some(guest) = &self.guest else { return };
        let (machine, process) = (&guest.qemu.machine, &guest.qemu.process);
        let within = Duration::from_secs(CANCEL_SECONDS);
        let alone = Duration::from_millis(CANCEL_ALONE_MS);
        if let Ok(Ok(_)) = timeout(alone, Outgoing::reattach(machine).cancel(within)).await {
            return;
        }
        // It waits for a destination that does not answer, perhaps so that it hears nobody.
        match process.cut(self.settings.to.port()) {
            Ok(cut) => warn!(migration = %self.id, cut, "QEMU's connection was cut"),
            Err(error) => warn!(migration = %self.id, %error, "QEMU's connection cannot be cut"),
        }
        if let Err(error) = Outgoing::reattach(machine).cancel(within).await {
            warn!(migration = %self.id, error = chain(&error), "QEMU did not confirm the cancel");
        }
    }

    /// The guest runs, or does not for reasons of its own (see [`rests`]), or its QEMU is gone: nothing else ends this.
    async fn resume_guest(&mut self) {
        let Some(guest) = &self.guest else { return };
        let (machine, id) = (&guest.qemu.machine, self.id);
        let resumed = async {
            loop {
                match machine.status().await {
                    Ok(status) if status.running || rests(&status.run_state) => return,
                    _ => {}
                }
                match machine.cont().await {
                    Ok(()) => return,
                    Err(error) => {
                        warn!(migration = %id, error = chain(&error), "the guest could not be resumed; trying again");
                        sleep(Duration::from_millis(RESUME_RETRY_MS)).await;
                    }
                }
            }
        };
        tokio::select! {
            () = resumed => {}
            _ = guest.qemu.process.wait_exit() => {}
        }
    }

    /// The destination owns the guest and its disks are inactive here: nothing is left to save.
    fn quit(&self) {
        let Some(guest) = &self.guest else { return };
        if let Err(error) = guest.qemu.process.kill() {
            warn!(migration = %self.id, error = chain(&error), "the source's QEMU could not be ended; the sweep goes on");
        }
    }

    fn answer_cancels(&mut self, accepted: bool) {
        for answer in self.cancels.drain(..) {
            // Whoever asked may have gone.
            let _gone = answer.send(accepted);
        }
    }

    fn settle(&mut self, outcome: Outcome) {
        self.end = match outcome {
            Outcome::Moved => OutgoingEnd::Moved,
            Outcome::Unresolved { ask } => OutgoingEnd::Unresolved { ask },
            Outcome::Stayed { why } => OutgoingEnd::Stayed {
                why: self.why.take().unwrap_or_else(|| Stay::Failed {
                    phase: self.report.borrow().phase,
                    code: ErrorCode::Internal.as_str().to_owned(),
                    message: why,
                }),
            },
        };
    }

    fn pause_over(&mut self, resumed: Option<Resumed>) {
        let now = now_us().saturating_sub(resumed.map_or(0, |resumed| resumed.since_resume_us));
        let Pause {
            stopped: Some(stopped),
            completed: Some(completed),
            confirmed,
            released: Some(released),
        } = self.pause
        else {
            return; // The agent was restarted in between: the moments are not known.
        };
        let confirmed = confirmed.unwrap_or(completed).max(completed);
        let downtime = Downtime {
            stop_to_completed_us: completed.saturating_sub(stopped),
            loaded_confirm_us: confirmed.saturating_sub(completed),
            release_us: released.saturating_sub(confirmed),
            go_us: now.saturating_sub(released),
            total_us: now.saturating_sub(stopped),
            stopped_at_us: Some(stopped),
            resumed_at_us: resumed.map(|resumed| resumed.resume_at_us).filter(|at| *at > 0),
        };
        self.report.send_modify(|report| report.downtime = Some(downtime));
    }

    async fn finish(mut self) -> Ended {
        // The destination is still to be told that it is over; nobody waits for what it says to that.
        let mut asking = std::mem::take(&mut self.asking);
        tokio::spawn(async move { while asking.next().await.is_some() {} });
        if let Some(guest) = &self.guest {
            if self.end != OutgoingEnd::Moved {
                // QEMU is as it was before: the next try begins anew.
                if let Err(error) = outgoing::reset(&guest.qemu.machine).await {
                    debug!(migration = %self.id, error = chain(&error), "QEMU's migration settings could not be taken back");
                }
            }
            remove_credentials(guest);
        }
        Ended { guest: self.guest, end: self.end }
    }
}

fn remove_credentials(guest: &RunningVm) {
    if let Err(error) = remove_qemu_credentials(&guest.qemu.dir.tls_folder()) {
        warn!(vm = %guest.id(), error = chain(&error), "QEMU's certificates are left over until its run is swept");
    }
}

/// Whether a guest stands still for its own reasons and not for the migration: it has powered itself off, sleeps, has
/// panicked, or met an error. Some of these QEMU (7.2, 10.0) refuses to resume, a sleeping one it lets sleep; what is to be
/// done about each is the VM's task's matter.
fn rests(run_state: &RunState) -> bool {
    matches!(
        run_state,
        RunState::Shutdown
            | RunState::Suspended
            | RunState::GuestPanicked
            | RunState::IoError
            | RunState::InternalError
            | RunState::Watchdog
    )
}

/// Resolves with the future's value, and never if there is none.
async fn or_never<F: Future + Unpin>(future: Option<F>) -> F::Output {
    match future {
        Some(future) => future.await,
        None => std::future::pending().await,
    }
}

async fn ended(process: &Option<Process>) {
    match process {
        Some(process) => {
            process.wait_exit().await;
        }
        None => std::future::pending().await,
    }
}

/// The next event; events that were missed or ended are none (the statistics and the process are watched besides).
async fn next_event(events: &mut Option<Events>) -> Event {
    loop {
        let Some(open) = events else { return std::future::pending().await };
        match open.next().await {
            Ok(event) => return event,
            Err(EventError::Lagged { .. }) => {}
            Err(_) => *events = None,
        }
    }
}

/// QEMU's figures in the contract's words.
fn progress(statistics: &Statistics, request: &OutgoingRequest) -> Progress {
    let ram = &statistics.ram;
    Progress {
        ram_total_bytes: ram.total_bytes.unwrap_or(0),
        ram_remaining_bytes: ram.remaining_bytes.unwrap_or(0),
        transferred_bytes: ram.transferred_bytes.unwrap_or(0),
        zero_pages: ram.duplicate_pages.unwrap_or(0),
        normal_pages: ram.normal_pages.unwrap_or(0),
        passes: ram.dirty_sync_count.unwrap_or(0),
        dirty_pages_per_s: ram.dirty_pages_rate.unwrap_or(0),
        bits_per_s: ram.mbps.map_or(0, |mbps| (mbps * 1e6) as u64),
        expected_downtime_ms: statistics.expected_downtime_ms,
        engine_total_ms: statistics.total_time_ms.unwrap_or(0),
        engine_setup_ms: statistics.setup_time_ms,
        destination_start_ms: Some(request.offer.start_ms),
    }
}
