//! The destination's half of a handoff: runs the guest only after GO and after writing down that
//! it owns it, and once it has refused an epoch never runs in it.
//!
//! The states' diagram and the driver's duties stand in the parent module.

use super::record::{Claim, Intent, NotAdmitted, Ownership, Standing, admit_destination};
use super::{Action, Body, Message, Observed, stayed};
use crate::names::Name;
use crate::phase::Outcome;

/// What happens to a destination. See the parent module's table for who gives which.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum DestinationInput {
    /// The last `Persist` is on the disk.
    Persisted,
    /// The last `Persist` failed. The record may be on the disk all the same.
    PersistFailed,
    /// Post-copy: QEMU holds the guest's state, stopped; part of the memory is still to come.
    StateLoaded,
    /// QEMU holds the whole guest: stopped, or after `StateLoaded`, when the rest has come, too.
    Loaded,
    /// The answer to `LookForRest`: QEMU lacks memory, and its stream has ended.
    Starved,
    /// The source says something.
    Receive(Message),
    /// Time to try again what failed.
    Tick,
    /// The lease ran out, the controller gave up, or preparing failed; the sentence says why.
    /// Ignored once GO has been taken.
    Abandon(String),
    /// The VM was taken back from here: its owner's record is durable, and no QEMU there has what we lack.
    Superseded,
    /// Nothing listens for this VM any more.
    ListenersClosed,
    /// A listener could not be closed.
    CloseFailed,
    /// The guest runs.
    Continued,
    /// QEMU answered `cont` with an error, and the guest certainly does not run.
    ContinueFailed,
    /// The destination's QEMU has ended, or there is none.
    QemuGone,
}

/// The destination's machine. Clone and compare it freely: it is a value.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Destination {
    claim: Claim,
    from: Name,
    /// Unknown until GO says it.
    intent: Intent,
    /// The destination's QEMU has ended.
    gone: bool,
    /// `Expected` is on our disk: this migration can not be offered here a second time.
    expected: bool,
    /// `Owned` may be on our disk: a refusal must then be durable to be true.
    maybe_owned: bool,
    /// Part of the memory is still with the source's QEMU.
    lacks: bool,
    /// Disks are copied along, and the source has not said yet that they are settled.
    unsettled: bool,
    state: State,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
enum State {
    /// `Expected` is being written; there is no QEMU yet.
    Recording,
    /// QEMU waits for the state, or is receiving it.
    Preparing,
    /// QEMU holds the guest's state, stopped.
    Ready,
    /// GO is here; listeners are being closed.
    Sealing,
    /// `Owned` is being written, or `Fetching` where memory is still to come.
    Taking {
        /// It is `Fetching`.
        fetching: bool,
    },
    /// That is durable; the guest is being started.
    Starting {
        /// It is `Fetching`.
        fetching: bool,
    },
    /// The VM is ours, and our record says that memory is still to come. Once it lacks nothing more, `Owned`
    /// is being written.
    Fetching {
        /// The source has said that it can send nothing more.
        lost: bool,
    },
    /// Finished: the VM is ours.
    Owner,
    /// QEMU is being killed and `Refused` written; either makes the refusal true.
    Refusing {
        /// `Refused` is durable.
        durable: bool,
        /// The refusal has been reported.
        told: bool,
        why: String,
    },
    /// Something that the rules exclude has been seen; hands off, the operator is told.
    Foul,
}

const LEDGER_FAILED: &str = "the destination's ledger could not be written";
const QEMU_DIED: &str = "the destination's QEMU ended before the guest ran there";
const CONTINUE_FAILED: &str = "the destination's QEMU could not start the guest";
const TAKEN_BACK: &str = "an operator has taken the VM back";
const ABANDONED: &str = "the source gave up";

impl Destination {
    /// Gets ready to be given a VM by `from`. `current` is this host's current record of the VM,
    /// `spent` whether its ledger has any record of the offer's migration.
    ///
    /// # Errors
    /// Refuses if this host has an open story with the VM already. Nothing was begun then.
    pub fn offer(
        current: Option<&Ownership>,
        spent: bool,
        claim: Claim,
        from: Name,
    ) -> Result<(Self, Vec<Action>), NotAdmitted> {
        admit_destination(current, spent, claim)?;
        let destination = Self::new(claim, from, State::Recording);
        let actions = vec![destination.persist_expected()];
        Ok((destination, actions))
    }

    fn new(claim: Claim, from: Name, state: State) -> Self {
        let intent = Intent::Pause;
        let (gone, expected, maybe_owned, lacks) = (false, false, false, false);
        let unsettled = false;
        Self { claim, from, intent, gone, expected, maybe_owned, lacks, unsettled, state }
    }

    /// The same, with disks that are copied along. To be said once, right after `offer` and right after
    /// [`super::recover`]; the driver knows it by the request that it was given, which is in its ledger.
    #[must_use]
    pub const fn with_disks(mut self) -> Self {
        // Whoever has taken the VM has heard of it.
        self.unsettled = self.may_abandon();
        self
    }

    /// Rebuilds the destination of an open migration after a restart of its agent.
    pub(super) fn recover(record: &Ownership, observed: Observed) -> Option<(Self, Vec<Action>)> {
        let claim = record.claim()?;
        match &record.standing {
            Standing::Expected { from } => {
                Some(Self::new(claim, from.clone(), State::Preparing).go_on_expected(observed))
            }
            Standing::Fetching { from } => {
                let mut machine = Self::new(claim, from.clone(), State::Fetching { lost: false });
                machine.intent = record.intent;
                machine.maybe_owned = true;
                Some(machine.go_on_fetching(observed))
            }
            _ => None,
        }
    }

    fn go_on_expected(mut self, observed: Observed) -> (Self, Vec<Action>) {
        self.expected = true;
        let actions = match observed {
            // One try, one QEMU: it is never started a second time.
            Observed::Gone => {
                self.gone = true;
                self.refuse(QEMU_DIED)
            }
            Observed::Incoming => Vec::new(),
            Observed::Stopped | Observed::Part => {
                self.lacks = observed == Observed::Part;
                self.state = State::Ready;
                Vec::new()
            }
            // `Owned` is durable before `cont`, so this was not us.
            Observed::Running => self.foul(),
        };
        (self, actions)
    }

    /// The VM is ours. Whether all of its memory has come by now its QEMU will say.
    fn go_on_fetching(mut self, observed: Observed) -> (Self, Vec<Action>) {
        self.lacks = observed != Observed::Gone;
        let actions = match observed {
            Observed::Gone => {
                self.gone = true;
                vec![self.persist(Standing::Owned)]
            }
            Observed::Stopped | Observed::Part if self.intent == Intent::Run => {
                vec![Action::ResumeGuest, Action::Announce]
            }
            Observed::Stopped | Observed::Part | Observed::Running => Vec::new(),
            // It held the guest's state before we wrote the record.
            Observed::Incoming => self.foul(),
        };
        (self, actions)
    }

    fn foul(&mut self) -> Vec<Action> {
        self.state = State::Foul;
        vec![Action::RaiseUnresolved]
    }

    /// What the migration's messages are about.
    #[must_use]
    pub const fn claim(&self) -> Claim {
        self.claim
    }

    /// The source.
    #[must_use]
    pub const fn peer(&self) -> &Name {
        &self.from
    }

    /// Whether nothing more is to be done; messages go to [`super::answer`] from now on.
    #[must_use]
    pub const fn is_finished(&self) -> bool {
        match self.state {
            State::Owner => true,
            State::Refusing { durable, .. } => durable && self.gone,
            _ => false,
        }
    }

    /// Whether the guest's state is here, and part of its memory still with the source's QEMU.
    #[must_use]
    pub const fn lacks_memory(&self) -> bool {
        self.lacks && !self.gone && !self.is_finished()
    }

    /// Takes one input and says what to do about it. An input that means nothing in the present
    /// state (repeated, late, of another migration) changes nothing.
    pub fn step(&mut self, input: DestinationInput) -> Vec<Action> {
        match input {
            DestinationInput::Persisted => self.persisted(),
            DestinationInput::PersistFailed => self.persist_failed(),
            DestinationInput::StateLoaded if self.state == State::Preparing => {
                self.lacks = true;
                self.ready()
            }
            DestinationInput::Loaded if self.state == State::Preparing => self.ready(),
            DestinationInput::Loaded => self.lack_nothing(),
            DestinationInput::Starved if self.state == (State::Fetching { lost: true }) => {
                // Nobody has what it lacks: it will never run on.
                if self.gone { Vec::new() } else { vec![Action::KillTarget] }
            }
            DestinationInput::Receive(message) if message.claim == self.claim => {
                self.receive(message.body)
            }
            DestinationInput::Tick => self.tick(),
            DestinationInput::Abandon(why) => self.abandon(&why),
            DestinationInput::Superseded if self.may_abandon() => self.refuse(TAKEN_BACK),
            DestinationInput::Superseded => self.receive(Body::Lost),
            DestinationInput::ListenersClosed if self.state == State::Sealing => {
                let fetching = self.lacks;
                self.state = State::Taking { fetching };
                vec![self.persist(if fetching { self.fetching() } else { Standing::Owned })]
            }
            DestinationInput::CloseFailed if self.state == State::Sealing => {
                // The source sends GO again, and we try again.
                self.state = State::Ready;
                Vec::new()
            }
            DestinationInput::Continued => match self.state {
                State::Starting { fetching } => self.own(fetching, true),
                _ => Vec::new(),
            },
            DestinationInput::ContinueFailed if matches!(self.state, State::Starting { .. }) => {
                self.refuse(CONTINUE_FAILED)
            }
            DestinationInput::QemuGone => self.qemu_gone(),
            _ => Vec::new(),
        }
    }

    fn ready(&mut self) -> Vec<Action> {
        self.state = State::Ready;
        // The state without its disks is not the whole state.
        if self.unsettled { Vec::new() } else { vec![self.send(Body::Loaded)] }
    }

    /// Nothing more comes to our exports: they can be closed while the rest of the state arrives.
    fn settled(&mut self) -> Vec<Action> {
        let mut actions = Vec::new();
        if std::mem::take(&mut self.unsettled) {
            actions.push(Action::CloseExports);
        }
        if self.state == State::Ready {
            actions.push(self.send(Body::Loaded));
        }
        actions
    }

    fn persisted(&mut self) -> Vec<Action> {
        match &mut self.state {
            State::Recording => {
                self.expected = true;
                self.state = State::Preparing;
                vec![Action::StartTarget]
            }
            &mut State::Taking { fetching } => {
                self.maybe_owned = true;
                self.start(fetching)
            }
            State::Fetching { .. } if !self.lacks => {
                self.state = State::Owner;
                vec![self.send(Body::Fetched), Action::Settle(Outcome::Moved)]
            }
            State::Refusing { durable, .. } => {
                *durable = true;
                let mut actions = self.tell_refusal();
                if self.maybe_owned && !self.gone {
                    actions.push(Action::KillTarget);
                }
                actions
            }
            _ => Vec::new(),
        }
    }

    fn persist_failed(&mut self) -> Vec<Action> {
        match self.state {
            State::Recording => {
                // Nothing has been started. A word of that would be no refusal: without a record
                // this migration could be offered here again.
                self.gone = true;
                self.refuse(LEDGER_FAILED)
            }
            State::Taking { .. } => {
                // It may be on the disk. The guest does not run without its record; the source
                // sends GO again, and we write again.
                self.maybe_owned = true;
                if self.gone {
                    return self.refuse(QEMU_DIED);
                }
                self.state = State::Ready;
                Vec::new()
            }
            _ => Vec::new(),
        }
    }

    fn receive(&mut self, body: Body) -> Vec<Action> {
        match (&self.state, body) {
            (State::Preparing | State::Ready, Body::DisksSettled) => self.settled(),
            (State::Ready, Body::AskLoaded) if !self.unsettled => vec![self.send(Body::Loaded)],
            (State::Ready, Body::Go { intent }) if !self.unsettled => {
                self.intent = intent;
                self.state = State::Sealing;
                vec![Action::CloseListeners]
            }
            (State::Owner | State::Fetching { .. }, Body::Go { .. } | Body::DisksSettled) => {
                vec![self.send(Body::Owned)]
            }
            (State::Owner, Body::AskFetched | Body::Lost) => vec![self.send(Body::Fetched)],
            (State::Fetching { lost: false }, Body::Lost) => {
                self.state = State::Fetching { lost: true };
                if self.lacks { vec![Action::LookForRest] } else { Vec::new() }
            }
            (_, Body::Abandon) if self.may_abandon() => self.refuse(ABANDONED),
            (
                State::Refusing { told: true, .. },
                Body::AskLoaded | Body::DisksSettled | Body::Go { .. } | Body::Abandon,
            ) => {
                vec![self.send(Body::Refused)]
            }
            _ => Vec::new(),
        }
    }

    fn tick(&mut self) -> Vec<Action> {
        let durable = match self.state {
            State::Refusing { durable, .. } => durable,
            State::Fetching { .. } if !self.lacks => return vec![self.persist(Standing::Owned)],
            State::Fetching { lost: true } => return vec![Action::LookForRest],
            _ => return Vec::new(),
        };
        let mut actions = Vec::new();
        if !self.gone && (durable || !self.maybe_owned) {
            actions.push(Action::KillTarget);
        }
        if !durable {
            actions.push(self.persist_refused());
        }
        actions
    }

    fn abandon(&mut self, why: &str) -> Vec<Action> {
        if self.may_abandon() { self.refuse(why) } else { Vec::new() }
    }

    fn qemu_gone(&mut self) -> Vec<Action> {
        if self.gone {
            return Vec::new();
        }
        self.gone = true;
        match self.state {
            State::Preparing | State::Ready | State::Sealing => self.refuse(QEMU_DIED),
            State::Refusing { .. } => self.tell_refusal(),
            // It may have run for an instant, so the VM is ours, and has crashed here.
            State::Starting { fetching } => {
                self.lacks = false;
                self.own(fetching, false)
            }
            State::Fetching { .. } => self.lack_nothing(),
            _ => Vec::new(),
        }
    }

    /// All memory is here, or the guest has ended here: either way nothing more is needed of the
    /// source's QEMU.
    fn lack_nothing(&mut self) -> Vec<Action> {
        let lacked = std::mem::replace(&mut self.lacks, false);
        match self.state {
            State::Fetching { .. } if lacked => vec![self.persist(Standing::Owned)],
            _ => Vec::new(),
        }
    }

    const fn may_abandon(&self) -> bool {
        matches!(self.state, State::Recording | State::Preparing | State::Ready)
    }

    /// `Owned` (or `Fetching`) is durable: start the guest, if it shall run and can.
    fn start(&mut self, fetching: bool) -> Vec<Action> {
        if self.gone {
            // It ended before `cont`, so it never ran.
            return self.refuse(QEMU_DIED);
        }
        match self.intent {
            Intent::Run => {
                self.state = State::Starting { fetching };
                vec![Action::ContinueGuest]
            }
            Intent::Pause => self.own(fetching, false),
        }
    }

    fn own(&mut self, fetching: bool, runs: bool) -> Vec<Action> {
        let mut actions = Vec::new();
        if runs {
            actions.push(Action::Announce);
        }
        actions.push(self.send(Body::Owned));
        if !fetching {
            self.state = State::Owner;
            actions.push(Action::Settle(Outcome::Moved));
            return actions;
        }
        self.state = State::Fetching { lost: false };
        if !self.lacks {
            // The rest has come since the record was written.
            actions.push(self.persist(Standing::Owned));
        }
        actions
    }

    /// Ends the story here: the guest does not run on this host in this epoch.
    ///
    /// While our disk may say `Owned`, our QEMU is not killed before it says `Refused`: an agent
    /// that came back in between would own a guest that it had killed.
    fn refuse(&mut self, why: &str) -> Vec<Action> {
        self.state = State::Refusing { durable: false, told: false, why: why.to_owned() };
        let mut actions = Vec::new();
        if !self.gone && !self.maybe_owned {
            actions.push(Action::KillTarget);
        }
        actions.push(self.persist_refused());
        actions.extend(self.tell_refusal());
        actions
    }

    /// Tells the source, once the refusal is true for ever: it is durable, or the only QEMU that
    /// could ever have run the guest is dead and no record says `Owned`.
    fn tell_refusal(&mut self) -> Vec<Action> {
        let killed = self.gone && self.expected && !self.maybe_owned;
        let State::Refusing { durable, told, why } = &mut self.state else { return Vec::new() };
        if *told || !(*durable || killed) {
            return Vec::new();
        }
        *told = true;
        let report = stayed(why);
        vec![self.send(Body::Refused), report]
    }

    const fn send(&self, body: Body) -> Action {
        Action::Send(Message { claim: self.claim, body })
    }

    const fn persist(&self, standing: Standing) -> Action {
        Action::Persist(Ownership::of(self.claim, self.intent, standing))
    }

    fn fetching(&self) -> Standing {
        Standing::Fetching { from: self.from.clone() }
    }

    fn persist_expected(&self) -> Action {
        self.persist(Standing::Expected { from: self.from.clone() })
    }

    fn persist_refused(&self) -> Action {
        self.persist(Standing::Refused { from: self.from.clone() })
    }
}
