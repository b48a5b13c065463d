//! The source's half of a handoff: gives the VM away at most once, and runs the guest again only
//! while it still owns it or after the destination has refused.
//!
//! The states' diagram and the driver's duties stand in the parent module.

use super::record::{Claim, Intent, NotAdmitted, Ownership, Standing, admit_source};
use super::{Action, Body, Message, Observed, stayed};
use crate::names::Name;
use crate::phase::Outcome;

/// What happens to a source. See the parent module's table for who gives which.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum SourceInput {
    /// The last `Persist` is on the disk.
    Persisted,
    /// The last `Persist` failed. The record may be on the disk all the same.
    PersistFailed,
    /// The guest stands still at the switchover, and QEMU waits to be told to send the rest ([`Action::FinishCopy`]).
    /// Needed where disks are copied only; without it the driver lets QEMU go on by itself.
    AtSwitchover,
    /// Every copied disk is settled: all of its bytes, and their flush, are at the destination, its job has ended and
    /// has left no error. The answer to [`Action::SettleDisks`]; what fails in it is a `Fail`.
    DisksSettled,
    /// Post-copy: QEMU stands still and has certainly sent the guest's state; memory is still to follow.
    StateSent,
    /// QEMU has sent everything and stands still. After `StateSent`: the rest has been sent, too.
    Completed,
    /// Post-copy: QEMU lives and will never send the rest (it says `failed` or `cancelled`). Only
    /// from the release on; before, it is a `Fail`.
    StreamLost,
    /// The destination says something.
    Receive(Message),
    /// Time to ask again.
    Tick,
    /// Somebody wants the migration to end here. Answered by `AcceptCancel` or `RefuseCancel`, and not before
    /// the one or the other is true for ever.
    Cancel,
    /// An operator's explicit word that the destination will never act on the GO that it may have got.
    /// It means something in doubt and while serving only ([`Source::can_reclaim`]).
    Reclaim,
    /// The copy failed or took too long; the sentence says why. Ignored from the release on.
    Fail(String),
    /// The source's QEMU has ended.
    QemuGone,
    /// The release, or its failed write, is [`super::UNRESOLVED_AFTER_MS`] ago; or the destination that
    /// still fetches has not been heard of for long.
    Overdue,
}

/// The source's machine. Clone and compare it freely: it is a value.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Source {
    claim: Claim,
    to: Name,
    intent: Intent,
    /// Whether the source's QEMU still holds the guest.
    alive: bool,
    rest: Rest,
    disks: Disks,
    /// Somebody wants the migration to end here and has not been answered: what becomes of the VM is not known
    /// yet, or that it stays is not durable yet.
    cancel_asked: bool,
    state: State,
}

/// The memory that the destination lacks after `StateSent`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Rest {
    /// There is none: nothing is sent in two parts, or both have been sent.
    None,
    /// Our QEMU has it, and sends it.
    Here,
    /// Our QEMU has ended, or has ended the stream: nobody will ever send it.
    Lost,
}

/// The disks that are copied with the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Disks {
    /// None is.
    None,
    /// They are being copied, and the guest writes to ours.
    Copying,
    /// The guest stands still, and the last bytes are on their way.
    Settling,
    /// What the destination has is what the guest last wrote, as long as the guest stands still.
    Settled,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
enum State {
    /// `Leaving` is being written; the guest runs.
    Recording,
    /// `Leaving` is durable, the guest runs and is being copied.
    Copying {
        /// The destination has said `Loaded` before our own QEMU said `completed`.
        loaded: bool,
    },
    /// The guest stands still; the destination is asked whether it has everything.
    Confirming,
    /// `Released` is being written. No way back by ourselves from here on.
    Releasing,
    /// `Released` is durable; GO is sent until it is answered.
    InDoubt {
        /// The operator has been told.
        raised: bool,
    },
    /// Writing `Released` failed, so it may be durable or not; GO was never sent.
    Retracting,
    /// The destination has refused; the next epoch is being written, then the guest resumes.
    Keeping,
    /// The guest has been resumed; its record is being written, and then the outcome reported.
    Staying { why: String },
    /// The destination owns the VM and fetches memory from our QEMU.
    Serving,
    /// By the operator's word the VM is taken back: our QEMU is being ended first, for its memory must never run again.
    Discarding,
    /// Our QEMU is gone; the next epoch is being written. The VM has crashed here.
    TakingBack,
    /// The destination owns the VM; our record is being written.
    Retiring,
    /// Finished: the VM stayed here.
    Stayed,
    /// Finished: the VM is the destination's.
    Moved,
}

const LEDGER_FAILED: &str = "the source's ledger could not be written";
const AGENT_RESTARTED: &str = "the source's agent was restarted during the copy";
const SOURCE_DIED: &str = "the source's QEMU ended during the copy";
const REFUSED: &str = "the destination refused the VM";
const NEVER_PREPARED: &str = "the destination does not know this migration";
const CANCELLED: &str = "cancelled";
const UNSETTLED: &str = "the copy of the memory ended before that of the disks";
const TAKEN_BACK: &str = "taken back by an operator's word; the guest has crashed";

impl Source {
    /// Begins to move a VM away from this host. `current` is this host's current record of the VM,
    /// `spent` whether its ledger has any record of the claim's migration. The claim's epoch must be
    /// after `current`'s, and one that no other migration has had.
    ///
    /// # Errors
    /// Refuses if the VM is not this host's, or not free. Nothing was begun then.
    pub fn begin(
        current: &Ownership,
        spent: bool,
        claim: Claim,
        to: Name,
    ) -> Result<(Self, Vec<Action>), NotAdmitted> {
        admit_source(current, spent, claim)?;
        let leaving = Standing::Leaving { to: to.clone() };
        let actions = vec![Action::Persist(Ownership::of(claim, current.intent, leaving))];
        let (intent, rest, state) = (current.intent, Rest::None, State::Recording);
        let (alive, disks, cancel_asked) = (true, Disks::None, false);
        Ok((Self { claim, to, intent, alive, rest, disks, cancel_asked, state }, actions))
    }

    /// The same, with disks that are copied along. To be said once, right after `begin` and right after
    /// [`super::recover`]; the driver knows it by the request that it was given, which is in its ledger.
    #[must_use]
    pub const fn with_disks(mut self) -> Self {
        // A release was written only once they were settled.
        self.disks = if self.is_past_release() { Disks::Settled } else { Disks::Copying };
        self
    }

    /// Rebuilds the source of an open migration after a restart of its agent: one that had not
    /// released the VM is abandoned and the guest resumed, one that had asks for the outcome.
    pub(super) fn recover(record: &Ownership, observed: Observed) -> Option<(Self, Vec<Action>)> {
        let claim = record.claim()?;
        let alive = observed != Observed::Gone;
        let source = |to: &Name, rest, state| Self {
            claim,
            to: to.clone(),
            intent: record.intent,
            alive,
            rest,
            disks: Disks::None,
            cancel_asked: false,
            state,
        };
        let (mut source, aborts) = match &record.standing {
            Standing::Leaving { to } => {
                (source(to, Rest::None, State::Copying { loaded: false }), true)
            }
            Standing::Released { to } => {
                (source(to, Rest::None, State::InDoubt { raised: false }), false)
            }
            Standing::Serving { to } => {
                let rest = if alive { Rest::Here } else { Rest::Lost };
                (source(to, rest, State::InDoubt { raised: false }), false)
            }
            _ => return None,
        };
        let actions = if aborts { source.abort(AGENT_RESTARTED) } else { vec![source.go()] };
        Some((source, actions))
    }

    /// What the migration's messages are about.
    #[must_use]
    pub const fn claim(&self) -> Claim {
        self.claim
    }

    /// The destination.
    #[must_use]
    pub const fn peer(&self) -> &Name {
        &self.to
    }

    /// Whether nothing more is to be done; messages go to [`super::answer`] from now on.
    #[must_use]
    pub const fn is_finished(&self) -> bool {
        matches!(self.state, State::Stayed | State::Moved)
    }

    /// Whether the release may have been written: from here on no cancel ends the migration.
    #[must_use]
    pub const fn is_past_release(&self) -> bool {
        matches!(
            self.state,
            State::Releasing
                | State::InDoubt { .. }
                | State::Retracting
                | State::Keeping
                | State::Serving
                | State::Discarding
                | State::TakingBack
                | State::Retiring
                | State::Moved
        )
    }

    /// Whether an operator's word can take the VM back: it was given away, and only the destination could say what
    /// became of it.
    #[must_use]
    pub const fn can_reclaim(&self) -> bool {
        matches!(self.state, State::InDoubt { .. } | State::Serving)
    }

    /// Whether the VM is being taken back by an operator's word.
    #[must_use]
    pub const fn is_reclaiming(&self) -> bool {
        matches!(self.state, State::Discarding | State::TakingBack)
    }

    /// Whether the VM is the destination's and our QEMU is still needed there: from here until
    /// `Retiring` it must not be ended by anybody.
    #[must_use]
    pub const fn is_serving(&self) -> bool {
        matches!(self.state, State::Serving)
    }

    /// Takes one input and says what to do about it. An input that means nothing in the present
    /// state (repeated, late, of another migration) changes nothing.
    pub fn step(&mut self, input: SourceInput) -> Vec<Action> {
        match input {
            SourceInput::Persisted => self.persisted(),
            SourceInput::PersistFailed => self.persist_failed(),
            SourceInput::AtSwitchover => self.at_switchover(),
            SourceInput::DisksSettled => self.disks_settled(),
            SourceInput::StateSent => self.state_sent(),
            SourceInput::Completed => self.completed(),
            SourceInput::StreamLost if self.is_past_release() => self.lose_rest(),
            SourceInput::StreamLost => Vec::new(),
            SourceInput::Receive(message) if message.claim == self.claim => {
                self.receive(message.body)
            }
            SourceInput::Receive(_) => Vec::new(),
            SourceInput::Tick => self.tick(),
            SourceInput::Cancel => self.cancel(),
            SourceInput::Reclaim if self.can_reclaim() => self.reclaim(),
            SourceInput::Reclaim => Vec::new(),
            SourceInput::Fail(why) if self.may_abort() => self.abort(&why),
            SourceInput::Fail(_) => Vec::new(),
            SourceInput::QemuGone => self.qemu_gone(),
            SourceInput::Overdue => self.overdue(),
        }
    }

    fn persisted(&mut self) -> Vec<Action> {
        match self.state {
            State::Recording => {
                self.state = State::Copying { loaded: false };
                vec![Action::BeginCopy]
            }
            State::Releasing => {
                // The point of no return is behind us.
                self.state = State::InDoubt { raised: false };
                let mut actions = vec![self.go()];
                if std::mem::take(&mut self.cancel_asked) {
                    actions.push(Action::RefuseCancel);
                }
                actions
            }
            State::Retracting => self.resume_and_settle(LEDGER_FAILED),
            State::Keeping => self.resume_and_settle(REFUSED),
            State::TakingBack => self.settle_stayed(TAKEN_BACK),
            State::Staying { ref why } => {
                let why = why.clone();
                self.settle_stayed(&why)
            }
            State::Retiring => {
                self.state = State::Moved;
                Vec::new()
            }
            _ => Vec::new(),
        }
    }

    fn persist_failed(&mut self) -> Vec<Action> {
        match self.state {
            State::Recording => self.abort(LEDGER_FAILED),
            State::Releasing => {
                // A failed fsync may have written all the same: after a crash we would read
                // `Released` and send GO. So the guest must not run before either a newer record
                // is durable or the destination has refused.
                self.state = State::Retracting;
                self.retract()
            }
            // The destination's refusal is what matters; the record is tried again at every tick.
            State::Keeping => self.resume(REFUSED),
            _ => Vec::new(),
        }
    }

    /// Before QEMU sends the rest: it gives the disks up with it, and a mirror that still writes would fail then.
    fn at_switchover(&mut self) -> Vec<Action> {
        match (&self.state, self.disks) {
            (State::Copying { .. }, Disks::Copying) => {
                self.disks = Disks::Settling;
                vec![Action::SettleDisks]
            }
            (State::Copying { .. }, Disks::None | Disks::Settled) => vec![Action::FinishCopy],
            _ => Vec::new(),
        }
    }

    fn disks_settled(&mut self) -> Vec<Action> {
        match (&self.state, self.disks) {
            (State::Copying { .. }, Disks::Settling) => {
                self.disks = Disks::Settled;
                vec![self.ask_loaded(), Action::FinishCopy]
            }
            _ => Vec::new(),
        }
    }

    fn state_sent(&mut self) -> Vec<Action> {
        if !matches!(self.state, State::Copying { .. }) {
            return Vec::new();
        }
        self.rest = Rest::Here;
        self.sent()
    }

    fn completed(&mut self) -> Vec<Action> {
        match self.state {
            State::Copying { .. } => self.sent(),
            State::Serving => self.retire(),
            _ => {
                self.rest = Rest::None;
                Vec::new()
            }
        }
    }

    /// The destination can hold what it needs to run the guest.
    fn sent(&mut self) -> Vec<Action> {
        if matches!(self.disks, Disks::Copying | Disks::Settling) {
            return self.abort(UNSETTLED);
        }
        if self.state == (State::Copying { loaded: true }) {
            return self.release();
        }
        self.state = State::Confirming;
        vec![self.ask_loaded()]
    }

    fn receive(&mut self, body: Body) -> Vec<Action> {
        match (&self.state, body) {
            (State::Copying { .. }, Body::Loaded) => {
                self.state = State::Copying { loaded: true };
                Vec::new()
            }
            (State::Confirming, Body::Loaded) => self.release(),
            (State::Copying { .. } | State::Confirming, Body::Refused) => self.abort(REFUSED),
            (State::Confirming, Body::Unknown) => self.abort(NEVER_PREPARED),
            (State::Retracting, Body::Refused) => {
                let mut actions = self.resume(LEDGER_FAILED);
                actions.push(self.persist_owned());
                actions
            }
            (State::InDoubt { .. }, Body::Refused) => {
                self.state = State::Keeping;
                vec![self.persist_owned()]
            }
            // While our QEMU is being ended nothing is durable yet: a destination that lives counts for more than
            // the operator's word.
            (State::InDoubt { .. } | State::Discarding, Body::Owned) if self.rest == Rest::None => {
                self.retire()
            }
            (State::InDoubt { .. } | State::Discarding, Body::Owned) => {
                self.state = State::Serving;
                vec![self.ask_fetched()]
            }
            (State::InDoubt { .. } | State::Serving | State::Discarding, Body::Fetched) => {
                self.retire()
            }
            (State::InDoubt { .. } | State::Serving, Body::Unknown) => self.overdue(),
            _ => Vec::new(),
        }
    }

    fn tick(&mut self) -> Vec<Action> {
        match self.state {
            State::Confirming => vec![self.ask_loaded()],
            // A destination that was restarted has forgotten that the disks are settled.
            State::InDoubt { .. } if self.disks == Disks::Settled => {
                vec![self.ask_loaded(), self.go()]
            }
            State::InDoubt { .. } => vec![self.go()],
            State::Serving => vec![self.ask_fetched()],
            State::Retracting => self.retract(),
            State::Staying { .. } | State::TakingBack => vec![self.persist_owned()],
            State::Discarding => vec![Action::QuitSource],
            State::Retiring => vec![self.persist_gone()],
            _ => Vec::new(),
        }
    }

    /// Refused once the release is durable, accepted once the stay is. In between nobody knows: a failed write of the
    /// release may have landed, and where nothing of the migration is on the disk it could be begun a second time.
    fn cancel(&mut self) -> Vec<Action> {
        match self.state {
            State::InDoubt { .. }
            | State::Serving
            | State::Discarding
            | State::TakingBack
            | State::Retiring
            | State::Moved => vec![Action::RefuseCancel],
            State::Stayed => vec![Action::AcceptCancel],
            State::Releasing | State::Retracting | State::Keeping | State::Staying { .. } => {
                self.cancel_asked = true;
                Vec::new()
            }
            State::Recording | State::Copying { .. } | State::Confirming => {
                self.cancel_asked = true;
                self.abort(CANCELLED)
            }
        }
    }

    fn qemu_gone(&mut self) -> Vec<Action> {
        self.alive = false;
        match self.state {
            // The destination cannot have everything.
            State::Recording | State::Copying { .. } => self.abort(SOURCE_DIED),
            State::Confirming if self.rest == Rest::Here => self.abort(SOURCE_DIED),
            State::Discarding => self.take_back(),
            // It may have everything: then the guest lives on there.
            _ => self.lose_rest(),
        }
    }

    /// Nobody will ever send what the destination lacks, if it lacks anything: it is told, and
    /// says when nothing of this migration is left there.
    fn lose_rest(&mut self) -> Vec<Action> {
        if self.rest != Rest::Here {
            return Vec::new();
        }
        self.rest = Rest::Lost;
        if self.is_serving() { vec![self.ask_fetched()] } else { Vec::new() }
    }

    /// The destination may have run the guest, and then wrote to its disks: the guest must not go on from our memory,
    /// whatever the operator says. So our QEMU ends before our record says that the VM is ours.
    fn reclaim(&mut self) -> Vec<Action> {
        if self.rest == Rest::Here {
            self.rest = Rest::Lost;
        }
        if !self.alive {
            return self.take_back();
        }
        self.state = State::Discarding;
        vec![Action::QuitSource]
    }

    fn take_back(&mut self) -> Vec<Action> {
        self.state = State::TakingBack;
        vec![self.persist_owned()]
    }

    fn overdue(&mut self) -> Vec<Action> {
        match self.state {
            State::InDoubt { raised: false } => self.state = State::InDoubt { raised: true },
            // It may be heard again and fall silent again: each time is told.
            State::Serving => {}
            // Neither our ledger nor the destination says whether the VM was given away.
            State::Retracting => {}
            _ => return Vec::new(),
        }
        vec![Action::RaiseUnresolved]
    }

    const fn may_abort(&self) -> bool {
        matches!(self.state, State::Recording | State::Copying { .. } | State::Confirming)
    }

    /// Ends a migration that was not released: we own the VM, so the guest resumes at once and the
    /// records follow.
    fn abort(&mut self, why: &str) -> Vec<Action> {
        self.rest = Rest::None;
        let mut actions = vec![Action::StopCopy];
        actions.extend(self.resume(why));
        actions.push(self.send(Body::Abandon));
        actions.push(self.persist_owned());
        actions
    }

    /// The only place from which the guest runs on the source again. The outcome is reported once
    /// it is durable: until then a restarted agent may find that nothing was ever begun.
    fn resume(&mut self, why: &str) -> Vec<Action> {
        self.state = State::Staying { why: why.to_owned() };
        let mut actions = Vec::new();
        if std::mem::replace(&mut self.rest, Rest::None) != Rest::None {
            // QEMU is in the middle of a post-copy that nobody wants any more.
            actions.push(Action::StopCopy);
        }
        if self.alive && self.intent == Intent::Run {
            actions.push(Action::ResumeGuest);
        }
        actions
    }

    /// Resumes the guest after its record has been written.
    fn resume_and_settle(&mut self, why: &str) -> Vec<Action> {
        let mut actions = self.resume(why);
        actions.extend(self.settle_stayed(why));
        actions
    }

    /// That the VM stays is durable.
    fn settle_stayed(&mut self, why: &str) -> Vec<Action> {
        self.state = State::Stayed;
        let mut actions = Vec::new();
        if std::mem::take(&mut self.cancel_asked) {
            actions.push(Action::AcceptCancel);
        }
        actions.push(stayed(why));
        actions
    }

    fn release(&mut self) -> Vec<Action> {
        self.state = State::Releasing;
        let to = self.to.clone();
        vec![self.persist(match self.rest {
            Rest::None => Standing::Released { to },
            Rest::Here | Rest::Lost => Standing::Serving { to },
        })]
    }

    /// The destination owns the VM and needs nothing more from here.
    fn retire(&mut self) -> Vec<Action> {
        self.state = State::Retiring;
        vec![Action::QuitSource, self.persist_gone(), Action::Settle(Outcome::Moved)]
    }

    fn retract(&self) -> Vec<Action> {
        vec![self.send(Body::Abandon), self.persist_owned()]
    }

    fn ask_fetched(&self) -> Action {
        self.send(if self.rest == Rest::Lost { Body::Lost } else { Body::AskFetched })
    }

    /// Asks whether the destination holds the whole state, and says that of the disks too once that is true.
    fn ask_loaded(&self) -> Action {
        self.send(if self.disks == Disks::Settled { Body::DisksSettled } else { Body::AskLoaded })
    }

    fn go(&self) -> Action {
        self.send(Body::Go { intent: self.intent })
    }

    const fn send(&self, body: Body) -> Action {
        Action::Send(Message { claim: self.claim, body })
    }

    fn persist(&self, standing: Standing) -> Action {
        Action::Persist(Ownership::of(self.claim, self.intent, standing))
    }

    fn persist_gone(&self) -> Action {
        self.persist(Standing::Gone { to: self.to.clone() })
    }

    const fn persist_owned(&self) -> Action {
        Action::Persist(Ownership::after_staying(self.claim, self.intent))
    }
}
