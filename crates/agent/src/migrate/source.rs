//! The source's side of a migration: the guest leaves this host, or stays.
//!
//! [`mod@copy`] is what the guest goes through: memory travels while it runs, then it stops and the rest follows.
//! [`Departure::run`] drives the handoff's rules ([`whimbrel_migration::handoff::Source`]): it feeds them what happens and
//! does what they say, in their order. Which of the two may run the guest is decided there, not here.
//!
//! **The point of no return** is the `Persist` of the `Released` record. Before it every error is a `Fail` that the rules
//! turn into "the guest resumes here". After it no error exists that could: [`Departure::act`] returns answers, never
//! errors, and what cannot be done is tried again at the next tick.
//!
//! The VM is taken by value from its task ([`RunningVm`]) and given back by [`Ended`]. Each in its own file: [`mod@copy`],
//! a stopped VM's [`mod@definition`], how it is steered ([`steering`]), what is learnt of its
//! guest meanwhile ([`looking`]), what follows it in post-copy ([`serving`]), the
//! questions to the destination ([`asking`]), the guest that stays or is gone ([`guest`]), this host's [`word`], what is
//! told and noted ([`news`]), and the figures ([`pause`], [`samples`]). Not here: HTTP, the destination's side, what QEMU is told
//! ([`whimbrel_qemu::migrate::outgoing`]). Called by [`super::Migrations`].

mod asking;
mod copy;
mod definition;
mod guest;
mod looking;
mod news;
mod pause;
pub(super) mod samples;
mod serving;
mod steering;
mod taking_back;
mod word;

use std::future::Future;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use futures::StreamExt;
use futures::stream::FuturesUnordered;
use tokio::sync::{mpsc, oneshot, watch};
use tokio::time::{Interval, interval};
use tracing::error;
use whimbrel_api::agent::{OutgoingEnd, OutgoingReport, OutgoingRequest};
use whimbrel_api::client::AgentClient;
use whimbrel_api::migration::{LiveSettings, MigrationAction, Mode, Statement, Stay};
use whimbrel_api::{ApiError, ErrorCode, MigrationId, Phase};
use whimbrel_migration::handoff::{
    Action, Body, Claim, Message, Ownership, Source, SourceInput, UNRESOLVED_AFTER_MS,
};
use whimbrel_migration::phase::Outcome;
use whimbrel_qemu::event::{Event, EventError, Events};
use whimbrel_qemu::migrate::Statistics;
use whimbrel_qemu::migrate::outgoing::{self, OutgoingSettings};
use whimbrel_qemu::process::Process;

use self::asking::Asking;
use self::copy::{CONFIRM_SECONDS, Copying, enter};
use self::guest::{lay_out_credentials, let_lock_memory, remove_credentials};
use self::looking::Look;
use self::news::SERVING_SILENT_SECONDS;
use self::pause::Pause;
use self::samples::Samples;
use self::serving::{Rest, rest};
use self::steering::{Steering, Telling};
use super::destination::LEASE_SECONDS;
use super::driver::{Side, drive, ended, ticks};
use super::{refused, remember_outgoing, settings};
use crate::host::Host;
use crate::vm::{RunningVm, kept};

/// How often the destination hears that the source still means it, in seconds: renews the destination's lease.
const HEARTBEAT_SECONDS: u64 = 10;

/// What somebody else wants of a migration under way.
#[derive(Debug)]
pub(super) enum Order {
    /// End it here; answered whether that is still possible.
    Cancel(oneshot::Sender<bool>),
    /// What the destination said, brought by the controller.
    Answer(Message),
    /// Other limits; answered whether they are taken.
    Set(LiveSettings, oneshot::Sender<Result<(), ApiError>>),
    /// What can be ordered while it runs; answered whether it fits. The address is where a destination listens anew.
    Act(MigrationAction, Option<SocketAddr>, oneshot::Sender<Result<(), ApiError>>),
    /// Take the VM back from a destination that never returns; answered whether it can be.
    Reclaim { statement: Statement, waits: bool, answer: oneshot::Sender<Result<(), ApiError>> },
}

/// What a departure tells to others.
pub(super) struct Voices {
    pub(super) report: watch::Sender<OutgoingReport>,
    pub(super) samples: Samples,
}

/// How it ended, with the VM that was lent, if it still has a QEMU here.
#[derive(Debug)]
pub(super) struct Ended {
    pub(super) guest: Option<RunningVm>,
    pub(super) end: OutgoingEnd,
}

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
    samples: Samples,
    statistics: watch::Sender<Statistics>,
    steering: Steering,
    copying: Option<Copying>,
    /// Post-copy, from the moment that the guest's state has been sent.
    serving: Option<Rest>,
    /// What QEMU is being told.
    telling: FuturesUnordered<Telling>,
    asking: FuturesUnordered<Asking>,
    cancels: Vec<oneshot::Sender<bool>>,
    /// When the destination last answered anything, or took more of the guest.
    lively_at: Instant,
    /// How long a destination that fetches may be silent until that is told.
    patience: Duration,
    /// The destination has said last that it knows nothing of this migration.
    denied: bool,
    /// Something has changed that the agent's next life is to know.
    changed: bool,
    /// When the last byte of the guest was sent.
    moved_at: Instant,
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

/// Everything that a departure listens to besides its own work.
pub(super) struct Ears {
    orders: mpsc::Receiver<Order>,
    statistics: watch::Receiver<Statistics>,
    tick: Interval,
    heartbeat: Interval,
    /// What QEMU tells by itself.
    events: Option<Events>,
    /// The source's QEMU, until its end has been noticed.
    process: Option<Process>,
    /// How the guest writes, until it is known.
    look: Option<Look>,
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
        voices: Voices,
    ) -> Result<(Self, Vec<Action>), ApiError> {
        if request.options.mode == Mode::Offline {
            return Self::begin_stopped(host, id, request, peer, voices).await;
        }
        let guest = host.vms.lend(request.vm, id).await?;
        let ready = async {
            let_lock_memory(request, &guest)?;
            lay_out_credentials(host, &guest)?;
            Self::ready(host, id, request, &guest.ownership).await
        };
        match ready.await {
            Ok((rules, first)) => {
                let departure =
                    Self::new(host, id, request.clone(), (rules, Some(guest)), peer, voices);
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
        lent: &Ownership,
    ) -> Result<(Source, Vec<Action>), ApiError> {
        let spent = host.ledger.ownership(request.vm, Some(id)).await?.is_some();
        // The ledger's word, not the task's memory of it.
        let current = host.ledger.current(request.vm).await?;
        let current = current.as_ref().unwrap_or(lent);
        let claim = Claim { vm: request.vm, migration: id, epoch: request.epoch };
        if request.options.keeps_definition() {
            let left = host.vms.report(request.vm)?.definition;
            kept::keep(host, &left).await?;
        }
        let begun = Source::begin(current, spent, claim, request.destination.clone());
        let (rules, first) = begun.map_err(|why| refused(&why))?;
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
        Voices { report, samples }: Voices,
    ) -> Self {
        let credentials_dir =
            guest.as_ref().map(|guest| guest.qemu.dir.tls_folder()).unwrap_or_default();
        let settings = settings::outgoing(&request, credentials_dir);
        let steering = Steering::of(&request);
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
            samples,
            statistics: watch::Sender::new(Statistics::default()),
            steering,
            copying: None,
            serving: None,
            telling: FuturesUnordered::new(),
            asking: FuturesUnordered::new(),
            answer_due: false,
            cancels: Vec::new(),
            lively_at: Instant::now(),
            patience: Duration::from_secs(SERVING_SILENT_SECONDS),
            denied: false,
            changed: false,
            moved_at: Instant::now(),
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
        self.choose_patience().await;
        if self.rules.is_past_release() {
            // It is taken up again, and may be sending memory still: what was said meanwhile is not said again.
            self.serve_again().await;
        }
        let ears = Ears {
            orders,
            statistics: self.statistics.subscribe(),
            tick: ticks(),
            heartbeat: interval(Duration::from_secs(HEARTBEAT_SECONDS)),
            events: self.guest.as_ref().map(|guest| guest.qemu.machine.events()),
            process: self.guest.as_ref().map(|guest| guest.qemu.process.clone()),
            look: self.look(),
        };
        drive(&mut self, first, ears).await;
        self.finish().await
    }

    async fn ordered(&mut self, order: Order) -> Option<SourceInput> {
        match order {
            Order::Answer(message) => {
                if message.body == Body::Refused {
                    self.refused_there();
                }
                self.denied = message.body == Body::Unknown;
                self.lively_at = Instant::now();
                Some(SourceInput::Receive(message))
            }
            Order::Set(settings, answer) => {
                // Whoever ordered may have gone.
                let _gone = answer.send(self.set(&settings));
                None
            }
            Order::Act(action, to, answer) => {
                let taken = self.act_by_order(action, to);
                if taken.is_ok() && self.rules.is_past_release() {
                    self.note(None).await;
                }
                let _gone = answer.send(taken);
                None
            }
            Order::Reclaim { statement, waits, answer } => {
                let taken = self.reclaim(statement, waits);
                if matches!(taken, Ok(Some(_))) {
                    // Before anything follows from it: whoever asks after a restart is told so.
                    self.note(self.why.clone()).await;
                }
                let input = taken.as_ref().ok().cloned().flatten();
                let _gone = answer.send(taken.map(drop));
                input
            }
            Order::Cancel(answer) => {
                self.cancels.push(answer);
                if !self.rules.is_past_release() {
                    self.why.get_or_insert(Stay::Cancelled);
                }
                Some(SourceInput::Cancel)
            }
        }
    }

    fn act_by_order(
        &mut self,
        action: MigrationAction,
        to: Option<SocketAddr>,
    ) -> Result<(), ApiError> {
        match action {
            MigrationAction::Postcopy => self.order_postcopy(),
            MigrationAction::ForceComplete => self.order_completion(),
            MigrationAction::Pause => self.order_pause(),
            MigrationAction::Resume => self.order_resume(),
            MigrationAction::Recover => self.order_recovery(to),
        }
    }

    fn failed(&mut self, phase: Phase, code: ErrorCode, message: String) -> SourceInput {
        let code = code.as_str().to_owned();
        self.why.get_or_insert(Stay::Failed { phase, code, message: message.clone() });
        SourceInput::Fail(message)
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
        // The agents may reach one another where the guest's memory does not get through.
        if let Some(seconds) = self.stands_still_for() {
            let message =
                format!("nothing of the guest got through to the destination for {seconds} s");
            let phase = self.report.borrow().phase;
            return Some(self.failed(phase, ErrorCode::Unreachable, message));
        }
        if self.rules.is_serving() {
            return self.is_newly_silent().then_some(SourceInput::Overdue);
        }
        let waited = self.released_at.map(|at| at.elapsed());
        if waited.is_some_and(|waited| waited >= Duration::from_millis(UNRESOLVED_AFTER_MS)) {
            self.released_at = None;
            return Some(SourceInput::Overdue);
        }
        None
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

    async fn finish(mut self) -> Ended {
        // The destination is still to be told that it is over; nobody waits for what it says to that.
        let mut asking = std::mem::take(&mut self.asking);
        tokio::spawn(async move { while asking.next().await.is_some() {} });
        if let Some(guest) = &self.guest {
            if self.end != OutgoingEnd::Moved {
                // QEMU is as it was before: the next try begins anew.
                if let Err(error) = outgoing::reset(&guest.qemu.machine).await {
                    self.tell_kept(&error);
                }
            }
            remove_credentials(guest);
        }
        Ended { guest: self.guest, end: self.end }
    }
}

impl Side for Departure {
    type Input = SourceInput;
    type Ears = Ears;

    fn step(&mut self, input: SourceInput) -> Vec<Action> {
        let actions = self.rules.step(input);
        if self.rules.is_serving() {
            enter(&self.report, Phase::Postcopy);
        }
        actions
    }

    fn is_finished(&self) -> bool {
        self.rules.is_finished()
    }

    async fn act(&mut self, action: Action) -> Option<SourceInput> {
        match action {
            Action::Persist(record) => return Some(self.persist(&record).await),
            Action::Send(message) => {
                self.look_after_resolution().await;
                self.send(message);
            }
            Action::BeginCopy if self.is_definition() => return Some(self.send_definition()),
            Action::BeginCopy => match self.off_already().await {
                Some(input) => return Some(input),
                None => self.begin_copy(),
            },
            Action::StopCopy => self.stop_copy().await,
            Action::ResumeGuest => self.resume_guest().await,
            Action::QuitSource => {
                self.hear_last_word().await;
                return self.quit();
            }
            Action::AcceptCancel => self.answer_cancels(true),
            Action::RefuseCancel => self.answer_cancels(false),
            Action::RaiseUnresolved => self.raise_unresolved().await,
            Action::Settle(outcome) => self.settle(outcome),
            Action::SettleDisks | Action::FinishCopy => {
                let message = "this agent copies no disks along".to_owned();
                return Some(self.failed(Phase::Switchover, ErrorCode::Internal, message));
            }
            Action::StartTarget
            | Action::CloseExports
            | Action::CloseListeners
            | Action::ContinueGuest
            | Action::KillTarget
            | Action::LookForRest
            | Action::Announce => {
                error!(migration = %self.id, "the rules asked the source for a destination's action");
            }
        }
        None
    }

    async fn listen(&mut self, ears: &mut Ears) -> Option<SourceInput> {
        self.note_changes().await;
        tokio::select! {
            // What the guest did comes before what would give it away.
            biased;
            event = next_event(&mut ears.events) => self.qemu_said(&event),
            Some(order) = ears.orders.recv() => self.ordered(order).await,
            Some(answer) = self.asking.next(), if !self.asking.is_empty() => self.answered(answer),
            Some(told) = self.telling.next(), if !self.telling.is_empty() => self.was_told(told),
            copied = or_never(self.copying.as_mut()) => Some(self.copied(copied)),
            told = rest(self.serving.as_mut()) => self.told_of_rest(told, ears),
            Ok(()) = ears.statistics.changed() => {
                let statistics = ears.statistics.borrow_and_update().clone();
                self.copied_more(&statistics);
                None
            }
            found = or_never(ears.look.as_mut()), if self.copying.is_some() => {
                ears.look = None;
                self.looked(found);
                None
            }
            () = ended(ears.process.as_ref()) => {
                ears.process = None;
                Some(self.qemu_ended())
            }
            _ = ears.heartbeat.tick() => {
                self.ask_loaded();
                None
            }
            _ = ears.tick.tick() => {
                self.look_at_the_clock();
                Some(self.deadline().unwrap_or(SourceInput::Tick))
            }
        }
    }
}

/// Resolves with the future's value, and never if there is none.
async fn or_never<F: Future + Unpin>(future: Option<F>) -> F::Output {
    match future {
        Some(future) => future.await,
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
