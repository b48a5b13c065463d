//! Planted bugs: each removes one rule of the machines or of their driver, from outside, by
//! changing what goes in or comes out. The checker must catch every one, by the invariant named.

use whimbrel_migration::handoff::{
    Action, Body, DestinationInput, Intent, Message, Ownership, SourceInput, Standing, Superseding,
};
use whimbrel_migration::names::MigrationId;

use super::events::{Copies, Handoff, Operator};
use super::invariants as i;
use super::world::{Host, Input, Machine, World, is_released, is_taken, other};

macro_rules! bugs {
    ($($(#[doc = $what:literal])+
       $bug:ident => ($invariant:expr, $tries:literal, $faults:literal
            $(, $copies:ident $(, $operator:ident $(, $disks:ident)?)?)?),)*) => {
        /// The rules that can be removed.
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        pub(crate) enum Bug {
            $($(#[doc = $what])+ $bug,)*
        }

        /// All of them.
        pub(crate) const ALL_BUGS: &[Bug] = &[$(Bug::$bug,)*];

        impl Bug {
            /// The invariant that must catch it.
            pub(crate) const fn caught_by(self) -> &'static str {
                match self {
                    $(Self::$bug => $invariant,)*
                }
            }

            /// The code without the rule, in the bounds in which that shows.
            pub(crate) fn model(self) -> Handoff {
                match self {
                    $(Self::$bug => {
                        let [.., copies] = [Copies::Precopy $(, Copies::$copies)?];
                        let [.., operator] = [Operator::Absent $($(, Operator::$operator)?)?];
                        let [.., disks] = ["shared" $($($(, stringify!($disks))?)?)?];
                        let (disks, unaware) = (disks != "shared", disks == "unaware");
                        let model = Handoff::new($tries, $faults, Some(self));
                        Handoff { copies, operator, disks, unaware, ..model }
                    })*
                }
            }

            /// What is wrong, for people.
            pub(crate) fn what(self) -> String {
                match self {
                    $(Self::$bug => [$($what),+].concat().trim().to_owned(),)*
                }
            }
        }
    };
}

bugs! {
    /// GO is sent before the release is fsynced.
    GoBeforeFsync => (i::AT_MOST_ONE, 1, 1),
    /// The release is believed written without an fsync.
    ReleaseNotSynced => (i::AT_MOST_ONE, 1, 1),
    /// The source resumes when the destination does not answer.
    ResumeWithoutRefused => (i::AT_MOST_ONE, 1, 0),
    /// A restarted source resumes a guest that it had released.
    RecoveryResumesReleased => (i::AT_MOST_ONE, 1, 1),
    /// The source resumes at once when writing the release failed.
    FailedReleaseResumes => (i::NO_RESUME, 1, 1),
    /// The source releases without knowing that the destination has loaded.
    ReleaseBeforeLoaded => (i::GO_GATE, 1, 0),
    /// The source takes any migration's message for its own.
    SourceTakesAnyMigration => (i::AT_MOST_ONE, 2, 0),
    /// The destination takes any migration's message for its own: a stale GO starts it.
    DestinationTakesAnyMigration => (i::AT_MOST_ONE, 2, 0),
    /// The source's QEMU is ended once GO is sent, not once the VM has arrived.
    RetiredBeforeOwned => (i::LAST_COPY, 1, 0),
    /// "Moved" is reported once GO is sent.
    MovedReportedOnGo => (i::TRUTHFUL, 1, 0),
    /// A cancel is accepted after the release.
    CancelAfterRelease => (i::CANCEL, 1, 0),
    /// A cancel is refused where a failed write of the release may not have landed.
    CancelRefusedUnknown => (i::CANCEL, 1, 2),
    /// A cancel is accepted where a failed write of the release may have landed.
    CancelAcceptedUnknown => (i::CANCEL, 1, 3),
    /// A cancel is accepted before anything on the disk keeps the migration from being begun again.
    CancelBeforeDurable => (i::CANCEL, 1, 3),
    /// A second migration is admitted while one is under way.
    SecondMigrationAdmitted => (i::ONE_MIGRATION, 2, 0),
    /// A restarted source abandons the copy but forgets to resume its guest.
    RecoveryForgetsGuest => (i::ENDS_WELL, 1, 1),
    /// The destination starts the guest once it is loaded, without GO.
    StartsWithoutGo => (i::AT_MOST_ONE, 1, 0),
    /// The destination starts the guest before its ownership is durable.
    ContinueBeforeOwned => (i::OWNER_RUNS, 1, 0),
    /// The ownership is believed written without an fsync.
    OwnedNotSynced => (i::OWNER_RUNS, 1, 0),
    /// A failed write of the ownership is taken for a good one.
    FailedOwnedContinues => (i::OWNER_RUNS, 1, 1),
    /// The destination refuses by killing its QEMU although a failed write may say that it owns.
    RefusesAfterFailedOwned => (i::REFUSED_FINAL, 1, 1),
    /// The destination says that it refuses before that is durable or its QEMU killed.
    RefusedTooSoon => (i::REFUSED_FINAL, 1, 1),
    /// A late Abandon makes the destination give up what it already owns.
    AbandonAfterOwned => (i::REFUSED_FINAL, 1, 2),
    /// A repeated GO starts the guest again.
    GoTwiceRestarts => (i::AT_MOST_ONE, 2, 0),
    /// A `cont` without an answer is taken for one that failed.
    NoAnswerTakenForContinueFailed => (i::NO_STALE, 1, 1),
    /// A QEMU that died on the destination during `cont` is taken for a refusal.
    DeathTakenForRefusal => (i::NO_STALE, 1, 1),
    /// Listeners stay open when the guest starts.
    ListenersLeftOpen => (i::SEALED, 1, 0),
    /// A guest paused by its user is told to run.
    IntentLost => (i::PAUSE_KEPT, 1, 0),
    /// The destination's QEMU is started before the ledger knows of it.
    ExpectedNotWritten => (i::JOURNAL_FIRST, 1, 0),
    /// The destination refuses and leaves its QEMU behind.
    TargetLeftBehind => (i::ENDS_WELL, 1, 0),
    /// The ledger keeps one row for each VM: what became of older migrations is forgotten.
    LedgerKeepsOneRow => (i::TRUTHFUL, 2, 0),

    /// Post-copy: the source releases without knowing that the destination holds the state.
    PostcopyBeforeLoaded => (i::GO_GATE, 1, 0, Postcopy),
    /// Post-copy: the source's QEMU is ended once the VM has arrived, not once its memory has.
    QuitAtOwned => (i::POSTCOPY_BOTH, 1, 0, Postcopy),
    /// Post-copy: the source's record does not say that its QEMU is still needed.
    ServingNotWritten => (i::POSTCOPY_BOTH, 1, 1, Postcopy),
    /// Post-copy: a restarted source ends a QEMU that is still needed.
    RecoveryQuitsServing => (i::POSTCOPY_BOTH, 1, 1, Postcopy),
    /// Post-copy: a source that serves resumes its guest when the destination is silent.
    ResumesWhileServing => (i::AT_MOST_ONE, 1, 0, Postcopy),
    /// Post-copy: a source that serves accepts a cancel.
    CancelWhileServing => (i::CANCEL, 1, 0, Postcopy),
    /// Post-copy: the destination's record does not say that memory is still to come.
    FetchingNotWritten => (i::POSTCOPY_BOTH, 1, 1, Postcopy),
    /// Post-copy: the destination needs nothing more as soon as its guest runs.
    FetchedTooSoon => (i::POSTCOPY_BOTH, 1, 0, Postcopy),
    /// Post-copy: a lease that ends makes the destination give up a guest that it runs.
    LeaseEndsFetching => (i::POSTCOPY_BOTH, 1, 0, Postcopy),
    /// Post-copy: a guest is sent on while its memory is still to come.
    MovedOnWhileFetching => (i::ONE_MIGRATION, 2, 0, Postcopy),
    /// Post-copy: a stream that was cut is taken for memory that is lost.
    CutTakenForLoss => (i::POSTCOPY_BOTH, 1, 1, Postcopy),
    /// Post-copy: that nobody can send the rest is not told to the destination.
    LossNotTold => (i::ENDS_WELL, 1, 1, Postcopy),
    /// Post-copy: a guest whose memory is lost is left waiting for it.
    StarvedLeftWaiting => (i::ENDS_WELL, 1, 1, Postcopy),
    /// Post-copy: a refused source resumes without telling QEMU that the post-copy is over.
    RefusedKeepsSending => (i::ENDS_WELL, 1, 0, Postcopy),

    /// Taking back: the source does so by itself when the destination is silent.
    TakesBackUnasked => (i::LAST_COPY, 1, 0, Precopy, Truthful),
    /// Taking back: the source's record says that it owns the VM while its QEMU still holds the old memory.
    TakenBackBeforeGone => (i::NO_STALE, 1, 2, Precopy, Truthful),
    /// Taking back: the guest goes on from the source's memory.
    TakenBackResumes => (i::NO_STALE, 1, 1, Precopy, Truthful),
    /// Taking back: the source's QEMU is not ended.
    TakenBackKeepsGuest => (i::TAKEN_BACK, 1, 1, Precopy, Truthful),
    /// Taking back: it is done for a migration after which the VM has been sent on.
    TakenBackLater => (i::OWNER_RUNS, 2, 1, Precopy, Truthful),
    /// Taking back: the VM is started on the former owner before that has heard of it.
    StaleOwnerStarts => (i::OWNER_RUNS, 1, 1, Precopy, Truthful),
    /// Taking back: the former owner keeps its word that it owns the VM.
    StaleOwnerKept => (i::ENDS_WELL, 1, 1, Precopy, Truthful),
    /// Taking back: the former owner takes an old word of it for a new one, when it owns the VM again.
    SupersededTwice => (i::EPOCHS, 2, 1, Precopy, Truthful),
    /// Taking back: a guest that runs on the former owner, against the operator's word, is left there.
    LiesNotEnded => (i::ENDS_WELL, 1, 0, Precopy, Lying),

    /// Disks: a mirror that has ended is taken for one that has ended well.
    MirrorErrorUnread => (i::ACKED_WRITES, 1, 0, Precopy, Absent, copied),
    /// Disks: the mirrors are ended before the guest stands still.
    SettledWhileRunning => (i::ACKED_WRITES, 1, 0, Precopy, Absent, copied),
    /// Disks: the source releases without knowing that they are settled.
    ReleasedUnsettled => (i::GO_GATE, 1, 0, Precopy, Absent, copied),
    /// Disks, by post-copy: the same.
    PostcopyUnsettled => (i::GO_GATE, 1, 0, Postcopy, Absent, copied),
    /// Disks: the destination says that it holds everything without having heard of its disks, to a source that
    /// copies none.
    TargetUnaware => (i::ACKED_WRITES, 1, 0, Precopy, Absent, unaware),
    /// Disks: exports stay open when the guest starts.
    ExportsLeftOpen => (i::SEALED, 1, 0, Precopy, Absent, copied),
    /// Disks: the originals go once the VM is given away, not once it has arrived.
    RetiredBeforeRecorded => (i::LAST_COPY, 1, 0, Precopy, Absent, copied),
    /// Disks: the copies go with their QEMU, whatever the record says.
    DiscardedByQemu => (i::LAST_COPY, 1, 1, Precopy, Absent, copied),
    /// Disks: the copies of a refused migration are left behind.
    CopiesLeftBehind => (i::ENDS_WELL, 1, 0, Precopy, Absent, copied),
    /// Disks: the originals of a VM that has moved are left behind.
    OriginalsLeftBehind => (i::ENDS_WELL, 1, 0, Precopy, Absent, copied),
}

fn position(actions: &[Action], wanted: impl Fn(&Action) -> bool) -> Option<usize> {
    actions.iter().position(wanted)
}

fn sends(actions: &[Action], wanted: impl Fn(Body) -> bool) -> Option<usize> {
    position(actions, |action| matches!(action, Action::Send(message) if wanted(message.body)))
}

fn persists(actions: &[Action], wanted: impl Fn(&Ownership) -> bool) -> Option<usize> {
    position(actions, |action| matches!(action, Action::Persist(record) if wanted(record)))
}

/// Where the bug sits. Without a bug every one of these does nothing.
impl Handoff {
    pub(crate) fn tamper_input(&self, machine: &Machine, input: Input) -> Input {
        match (self.bug, input) {
            (
                Some(Bug::SourceTakesAnyMigration),
                Input::Source(SourceInput::Receive(Message { body, .. })),
            ) => {
                let claim = machine.claim();
                Input::Source(SourceInput::Receive(Message { claim, body }))
            }
            (
                Some(Bug::DestinationTakesAnyMigration),
                Input::Destination(DestinationInput::Receive(Message { body, .. })),
            ) => {
                let claim = machine.claim();
                Input::Destination(DestinationInput::Receive(Message { claim, body }))
            }
            (Some(Bug::DeathTakenForRefusal), Input::Destination(DestinationInput::QemuGone)) => {
                let mut after = machine.clone();
                after.step(Input::Destination(DestinationInput::QemuGone));
                let died_starting = after.is_finished();
                Input::Destination(if died_starting {
                    DestinationInput::ContinueFailed
                } else {
                    DestinationInput::QemuGone
                })
            }
            (_, input) => input,
        }
    }

    pub(crate) fn tamper_actions(
        &self,
        machine: &Machine,
        input: &Input,
        actions: &mut Vec<Action>,
    ) {
        let Some(bug) = self.bug else { return };
        match (machine, input) {
            (Machine::Source(_), Input::Source(input)) => {
                tamper_source(bug, machine, input, actions);
            }
            (Machine::Destination(_), Input::Destination(input)) => {
                tamper_destination(bug, machine, input, actions);
            }
            _ => {}
        }
    }

    pub(crate) fn tamper_recovery(&self, record: &Ownership, actions: &mut Vec<Action>) {
        match self.bug {
            Some(Bug::RecoveryResumesReleased) if is_released(record) => {
                actions.push(Action::ResumeGuest);
            }
            Some(Bug::RecoveryQuitsServing) if is_released(record) => {
                actions.push(Action::QuitSource);
            }
            Some(Bug::RecoveryForgetsGuest) => actions.retain(|a| *a != Action::ResumeGuest),
            _ => {}
        }
    }

    pub(crate) fn tamper_message(&self, mut message: Message) -> Message {
        if let (Some(Bug::IntentLost), Body::Go { intent }) = (self.bug, &mut message.body) {
            *intent = Intent::Run;
        }
        message
    }

    /// The migration whose machine a message is for.
    pub(crate) fn route(&self, host: &Host, message: Message) -> MigrationId {
        let live =
            host.agent.iter().flat_map(|agent| &agent.machines).find(|machine| match machine {
                Machine::Source(_) => self.bug == Some(Bug::SourceTakesAnyMigration),
                Machine::Destination(_) => self.bug == Some(Bug::DestinationTakesAnyMigration),
            });
        live.map_or(message.claim.migration, |machine| machine.claim().migration)
    }

    pub(crate) fn tamper_answer(&self, world: &mut World, host: usize, message: &Message) {
        if !world.hosts[host].took(message.claim) {
            return;
        }
        let refused = Message { claim: message.claim, body: Body::Refused };
        let Some(agent) = &mut world.hosts[host].agent else { return };
        match (self.bug, message.body) {
            (Some(Bug::GoTwiceRestarts), Body::Go { .. }) => {
                agent.queue.push_back((None, Action::ContinueGuest));
            }
            (Some(Bug::AbandonAfterOwned), Body::Abandon) => {
                agent.queue.push_back((None, Action::KillTarget));
                world.net.insert((other(host), refused));
            }
            _ => {}
        }
    }

    pub(crate) fn tamper_superseded(&self, current: &mut Option<Ownership>) {
        if let (Some(Bug::SupersededTwice), Some(record)) = (self.bug, current) {
            record.epoch = whimbrel_migration::names::Epoch::FIRST;
        }
    }

    pub(crate) fn tamper_superseding(&self, does: Superseding) -> Superseding {
        match (self.bug, &does) {
            (Some(Bug::StaleOwnerKept), Superseding::Write(_))
            | (Some(Bug::LiesNotEnded), Superseding::EndGuest) => Superseding::Nothing,
            _ => does,
        }
    }

    /// True if something else happens instead of the tick.
    pub(crate) fn tamper_tick(&self, world: &mut World, host: usize) -> bool {
        let host = &mut world.hosts[host];
        let cut = host.qemu.as_ref().is_some_and(|qemu| qemu.cut);
        let Some(agent) = host.agent.as_mut().filter(|agent| agent.queue.is_empty()) else {
            return false;
        };
        let kills = self.bug == Some(Bug::CutTakenForLoss) && cut;
        if kills {
            agent.queue.push_back((None, Action::KillTarget));
        }
        kills
    }

    /// Whether a record that the driver writes gets to the disk.
    pub(crate) fn writes(&self, record: &Ownership) -> bool {
        match self.bug {
            Some(Bug::ReleaseNotSynced) => !is_released(record),
            Some(Bug::ExpectedNotWritten) => !matches!(record.standing, Standing::Expected { .. }),
            Some(Bug::OwnedNotSynced) => !is_taken(record),
            _ => true,
        }
    }

    pub(crate) fn takes_failed_write_for_done(&self, record: &Ownership) -> bool {
        self.bug == Some(Bug::FailedOwnedContinues) && record.standing == Standing::Owned
    }

    pub(crate) fn tamper_failed_write(&self, world: &mut World, host: usize, record: &Ownership) {
        let Some(claim) = record.claim().filter(|_| record.standing == Standing::Owned) else {
            return;
        };
        let takes = world.try_of(claim.migration).is_some_and(|one| other(one.from) == host);
        if self.bug == Some(Bug::RefusesAfterFailedOwned) && takes {
            world.hosts[host].qemu = None;
            world.net.insert((other(host), Message { claim, body: Body::Refused }));
        }
    }
}

fn tamper_source(bug: Bug, machine: &Machine, input: &SourceInput, actions: &mut Vec<Action>) {
    let Machine::Source(source) = machine else { return };
    let claim = source.claim();
    let go = sends(actions, |body| matches!(body, Body::Go { .. }));
    let asks_rest = sends(actions, |body| body == Body::AskFetched);
    match bug {
        Bug::GoBeforeFsync => {
            if let Some(at) = persists(actions, is_released) {
                let body = Body::Go { intent: Intent::Run };
                actions.insert(at, Action::Send(Message { claim, body }));
            }
        }
        Bug::ResumeWithoutRefused if go.is_some() && *input == SourceInput::Tick => {
            actions.push(Action::ResumeGuest);
        }
        Bug::RetiredBeforeOwned if go.is_some() => actions.push(Action::QuitSource),
        Bug::MovedReportedOnGo if go.is_some() => {
            actions.push(Action::Settle(whimbrel_migration::phase::Outcome::Moved));
        }
        Bug::FailedReleaseResumes
            if *input == SourceInput::PersistFailed && source.is_past_release() =>
        {
            actions.insert(0, Action::ResumeGuest);
        }
        Bug::ReleaseBeforeLoaded if *input == SourceInput::Completed => {
            let mut source = source.clone();
            source.step(SourceInput::Completed);
            let loaded = Message { claim, body: Body::Loaded };
            actions.extend(source.step(SourceInput::Receive(loaded)));
        }
        Bug::ReleasedUnsettled | Bug::PostcopyUnsettled
            if matches!(input, SourceInput::Completed | SourceInput::StateSent) =>
        {
            let mut source = source.clone();
            source.step(SourceInput::AtSwitchover);
            source.step(SourceInput::DisksSettled);
            source.step(input.clone());
            let loaded = Message { claim, body: Body::Loaded };
            actions.extend(source.step(SourceInput::Receive(loaded)));
        }
        Bug::PostcopyBeforeLoaded if *input == SourceInput::StateSent => {
            let mut source = source.clone();
            source.step(SourceInput::StateSent);
            let loaded = Message { claim, body: Body::Loaded };
            actions.extend(source.step(SourceInput::Receive(loaded)));
        }
        Bug::QuitAtOwned if asks_rest.is_some() => actions.push(Action::QuitSource),
        Bug::ServingNotWritten => {
            for action in actions {
                if let Action::Persist(record) = action
                    && let Standing::Serving { to } = &record.standing
                {
                    record.standing = Standing::Released { to: to.clone() };
                }
            }
        }
        Bug::ResumesWhileServing if asks_rest.is_some() && *input == SourceInput::Tick => {
            actions.extend([Action::StopCopy, Action::ResumeGuest]);
        }
        Bug::RefusedKeepsSending if *input == SourceInput::Persisted => {
            actions.retain(|action| *action != Action::StopCopy);
        }
        Bug::LossNotTold => {
            actions.retain(
                |action| !matches!(action, Action::Send(message) if message.body == Body::Lost),
            );
        }
        Bug::CancelAfterRelease if *actions == [Action::RefuseCancel] => {
            *actions = vec![Action::AcceptCancel];
        }
        Bug::CancelRefusedUnknown | Bug::CancelAcceptedUnknown
            if *input == SourceInput::Cancel && source.is_past_release() && actions.is_empty() =>
        {
            actions.push(match bug {
                Bug::CancelRefusedUnknown => Action::RefuseCancel,
                _ => Action::AcceptCancel,
            });
        }
        Bug::CancelBeforeDurable if *input == SourceInput::Cancel && !source.is_past_release() => {
            actions.insert(0, Action::AcceptCancel);
        }
        Bug::TakesBackUnasked if go.is_some() && *input == SourceInput::Tick => {
            let mut source = source.clone();
            actions.extend(source.step(SourceInput::Reclaim));
        }
        Bug::TakenBackBeforeGone if *input == SourceInput::Reclaim => {
            let mut source = source.clone();
            source.step(SourceInput::Reclaim);
            let mut first = source.step(SourceInput::QemuGone);
            first.append(actions);
            *actions = first;
        }
        Bug::TakenBackResumes if *input == SourceInput::Reclaim => {
            actions.insert(0, Action::ResumeGuest);
        }
        Bug::TakenBackKeepsGuest if source.is_reclaiming() || *input == SourceInput::Reclaim => {
            actions.retain(|action| *action != Action::QuitSource);
        }
        Bug::CancelWhileServing if *input == SourceInput::Cancel && source.is_serving() => {
            *actions = vec![Action::AcceptCancel];
        }
        _ => {}
    }
}

fn tamper_destination(
    bug: Bug,
    machine: &Machine,
    input: &DestinationInput,
    actions: &mut Vec<Action>,
) {
    let claim = machine.claim();
    match bug {
        Bug::StartsWithoutGo if *input == DestinationInput::Loaded && !actions.is_empty() => {
            actions.push(Action::ContinueGuest);
        }
        Bug::ContinueBeforeOwned => {
            if let Some(at) = persists(actions, is_taken) {
                actions.insert(at, Action::ContinueGuest);
            }
        }
        Bug::RefusedTooSoon => {
            if let Some(at) = position(actions, |action| *action == Action::KillTarget) {
                actions.insert(at, Action::Send(Message { claim, body: Body::Refused }));
            }
        }
        Bug::TargetLeftBehind => actions.retain(|action| *action != Action::KillTarget),
        Bug::FetchingNotWritten => {
            for action in actions {
                if let Action::Persist(record) = action
                    && matches!(record.standing, Standing::Fetching { .. })
                {
                    record.standing = Standing::Owned;
                }
            }
        }
        Bug::FetchedTooSoon if sends(actions, |body| body == Body::Owned).is_some() => {
            actions.push(Action::Send(Message { claim, body: Body::Fetched }));
        }
        Bug::LeaseEndsFetching if matches!(input, DestinationInput::Abandon(_)) => {
            actions.push(Action::KillTarget);
        }
        Bug::StarvedLeftWaiting if *input == DestinationInput::Starved => actions.clear(),
        _ => {}
    }
}
