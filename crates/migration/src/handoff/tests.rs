//! The machines one input at a time; the checker explores all orders.

use super::*;
use crate::names::{Epoch, MigrationId, Name, VmId};
use proptest::prelude::*;

mod disks;
mod postcopy;
mod reclaim;

fn name(text: &str) -> Name {
    Name::new(text).unwrap()
}

struct Pair {
    source: Source,
    destination: Destination,
}

/// A VM that was created here, and the claim of its first migration.
fn claim() -> (Ownership, Claim) {
    let owned = Ownership::created(VmId::new(), Intent::Run);
    let claim = Claim { vm: owned.vm, migration: MigrationId::new(), epoch: owned.epoch.next() };
    (owned, claim)
}

fn source_message(source: &Source, body: Body) -> SourceInput {
    SourceInput::Receive(Message { claim: source.claim(), body })
}

fn destination_message(destination: &Destination, body: Body) -> DestinationInput {
    DestinationInput::Receive(Message { claim: destination.claim(), body })
}

/// A migration whose source has just become `InDoubt` and whose destination is ready.
fn released() -> Pair {
    let (owned, claim) = claim();
    let (mut source, actions) = Source::begin(&owned, false, claim, name("host-b")).unwrap();
    assert!(matches!(&actions[..], [Action::Persist(r)] if r.may_run()));
    assert_eq!(source.step(SourceInput::Persisted), [Action::BeginCopy]);
    let (mut destination, _) =
        Destination::offer(None, false, source.claim(), name("host-a")).unwrap();
    assert_eq!(destination.step(DestinationInput::Persisted), [Action::StartTarget]);
    destination.step(DestinationInput::Loaded);
    source.step(SourceInput::Completed);
    let actions = source.step(source_message(&source, Body::Loaded));
    assert!(matches!(&actions[..], [Action::Persist(r)] if !r.may_run()));
    let actions = source.step(SourceInput::Persisted);
    assert!(
        matches!(&actions[..], [Action::Send(m)] if m.body == Body::Go { intent: Intent::Run })
    );
    Pair { source, destination }
}

#[test]
fn the_normal_run() {
    let Pair { mut source, mut destination } = released();
    let go = destination_message(&destination, Body::Go { intent: Intent::Run });
    assert_eq!(destination.step(go), [Action::CloseListeners]);
    let actions = destination.step(DestinationInput::ListenersClosed);
    assert!(matches!(&actions[..], [Action::Persist(r)] if r.may_run() && r.epoch == Epoch(2)));
    assert_eq!(destination.step(DestinationInput::Persisted), [Action::ContinueGuest]);
    let actions = destination.step(DestinationInput::Continued);
    assert!(
        matches!(&actions[..], [Action::Announce, Action::Send(m), Action::Settle(Outcome::Moved)]
        if m.body == Body::Owned)
    );
    assert!(destination.is_finished());
    let actions = source.step(source_message(&source, Body::Owned));
    assert!(
        matches!(&actions[..], [Action::QuitSource, Action::Persist(r), Action::Settle(Outcome::Moved)]
        if !r.may_run())
    );
    source.step(SourceInput::Persisted);
    assert!(source.is_finished());
}

#[test]
fn a_cancel_is_accepted_once_the_stay_is_durable_and_refused_after_the_release() {
    let (owned, claim) = claim();
    let (mut source, _) = Source::begin(&owned, false, claim, name("host-b")).unwrap();
    source.step(SourceInput::Persisted);
    let actions = source.step(SourceInput::Cancel);
    assert_eq!(actions[..2], [Action::StopCopy, Action::ResumeGuest], "the guest does not wait");
    assert_eq!(source.step(SourceInput::Cancel), []);
    assert_eq!(source.step(SourceInput::PersistFailed), [], "it could be begun again");
    assert!(persisted(&source.step(SourceInput::Tick)).is_some());
    assert_eq!(source.step(SourceInput::Persisted), [Action::AcceptCancel, stayed("cancelled")]);
    assert_eq!(source.step(SourceInput::Cancel), [Action::AcceptCancel]);
    let mut source = released().source;
    assert_eq!(source.step(SourceInput::Cancel), [Action::RefuseCancel]);
}

/// A destination that has loaded everything.
fn ready() -> Destination {
    released().destination
}

fn bodies(actions: &[Action]) -> Vec<Body> {
    let body = |action: &Action| match action {
        Action::Send(message) => Some(message.body),
        _ => None,
    };
    actions.iter().filter_map(body).collect()
}

fn persisted(actions: &[Action]) -> Option<&Ownership> {
    actions.iter().find_map(|action| match action {
        Action::Persist(record) => Some(record),
        _ => None,
    })
}

#[test]
fn loaded_may_come_before_completed() {
    let (owned, claim) = claim();
    let (mut source, _) = Source::begin(&owned, false, claim, name("host-b")).unwrap();
    source.step(SourceInput::Persisted);
    assert_eq!(source.step(source_message(&source, Body::Loaded)), []);
    let actions = source.step(SourceInput::Completed);
    assert!(matches!(persisted(&actions).unwrap().standing, Standing::Released { .. }));
}

#[test]
fn a_source_that_is_not_answered_asks_again_and_never_resumes() {
    let mut source = released().source;
    for _ in 0..3 {
        let actions = source.step(SourceInput::Tick);
        assert_eq!(bodies(&actions), [Body::Go { intent: Intent::Run }]);
        assert_eq!(actions.len(), 1);
    }
    assert_eq!(source.step(SourceInput::Overdue), [Action::RaiseUnresolved]);
    assert_eq!(source.step(SourceInput::Overdue), [], "the operator is told once");
    assert_eq!(source.step(SourceInput::Fail("too slow".into())), []);
    assert_eq!(source.step(SourceInput::QemuGone), []);
    assert!(!source.is_finished());
}

#[test]
fn a_destination_that_knows_nothing_is_no_refusal() {
    let mut source = released().source;
    let unknown = source_message(&source, Body::Unknown);
    assert_eq!(source.step(unknown), [Action::RaiseUnresolved]);
    assert!(!source.is_finished());
}

#[test]
fn a_refusal_burns_the_epoch_then_resumes() {
    let mut source = released().source;
    let actions = source.step(source_message(&source, Body::Refused));
    let record = persisted(&actions).unwrap();
    assert_eq!((record.epoch, &record.standing), (Epoch(3), &Standing::Owned));
    assert_eq!(actions.len(), 1, "nothing runs before the record is written");
    assert_eq!(source.step(SourceInput::Persisted)[0], Action::ResumeGuest);
    assert!(source.is_finished());
}

#[test]
fn a_refused_source_with_a_broken_disk_resumes_and_goes_on_writing() {
    let mut source = released().source;
    source.step(source_message(&source, Body::Refused));
    assert_eq!(source.step(SourceInput::PersistFailed)[0], Action::ResumeGuest);
    assert!(!source.is_finished());
    assert!(persisted(&source.step(SourceInput::Tick)).unwrap().may_run());
    source.step(SourceInput::Persisted);
    assert!(source.is_finished());
}

#[test]
fn a_failed_release_waits_for_a_newer_record_or_a_refusal() {
    let releasing = || {
        let (owned, claim) = claim();
        let (mut source, _) = Source::begin(&owned, false, claim, name("host-b")).unwrap();
        source.step(SourceInput::Persisted);
        source.step(SourceInput::Completed);
        source.step(source_message(&source, Body::Loaded));
        let actions = source.step(SourceInput::PersistFailed);
        assert!(!actions.contains(&Action::ResumeGuest));
        assert_eq!(bodies(&actions), [Body::Abandon]);
        source
    };
    let mut source = releasing();
    assert_eq!(source.step(SourceInput::Persisted)[0], Action::ResumeGuest);
    let mut source = releasing();
    assert_eq!(source.step(SourceInput::Cancel), [], "nobody knows whether it is written");
    assert_eq!(source.step(SourceInput::PersistFailed), []);
    assert_eq!(source.step(SourceInput::Overdue), [Action::RaiseUnresolved]);
    assert_eq!(source.step(source_message(&source, Body::Refused))[0], Action::ResumeGuest);
    assert_eq!(source.step(SourceInput::Overdue), []);
    assert_eq!(source.step(SourceInput::Persisted)[0], Action::AcceptCancel);
}

#[test]
fn a_guest_that_died_on_the_source_is_not_resumed_but_may_still_arrive() {
    let mut source = released().source;
    source.step(SourceInput::QemuGone);
    let mut refused = source.clone();
    refused.step(source_message(&refused, Body::Refused));
    assert!(!refused.step(SourceInput::Persisted).contains(&Action::ResumeGuest));
    let actions = source.step(source_message(&source, Body::Owned));
    assert!(actions.contains(&Action::Settle(Outcome::Moved)));
}

#[test]
fn a_paused_guest_stays_paused_on_either_side() {
    let owned = Ownership::created(VmId::new(), Intent::Pause);
    let claim = Claim { vm: owned.vm, migration: MigrationId::new(), epoch: owned.epoch.next() };
    let (mut source, _) = Source::begin(&owned, false, claim, name("host-b")).unwrap();
    source.step(SourceInput::Persisted);
    assert!(!source.step(SourceInput::Cancel).contains(&Action::ResumeGuest));

    let mut destination = ready();
    destination.step(destination_message(&destination, Body::Go { intent: Intent::Pause }));
    destination.step(DestinationInput::ListenersClosed);
    let actions = destination.step(DestinationInput::Persisted);
    assert_eq!(bodies(&actions), [Body::Owned]);
    assert!(!actions.contains(&Action::ContinueGuest));
}

#[test]
fn a_lease_that_ends_before_go_refuses_and_after_go_does_nothing() {
    let mut destination = ready();
    let actions = destination.step(DestinationInput::Abandon("the lease ended".into()));
    assert_eq!(actions[0], Action::KillTarget);
    assert!(matches!(persisted(&actions).unwrap().standing, Standing::Refused { .. }));
    assert_eq!(bodies(&actions), [], "not said before it is true");
    assert_eq!(bodies(&destination.step(DestinationInput::QemuGone)), [Body::Refused]);
    let go = destination_message(&destination, Body::Go { intent: Intent::Run });
    assert_eq!(bodies(&destination.step(go)), [Body::Refused]);

    let mut destination = ready();
    destination.step(destination_message(&destination, Body::Go { intent: Intent::Run }));
    assert_eq!(destination.step(DestinationInput::Abandon("the lease ended".into())), []);
}

#[test]
fn a_refusal_after_a_write_of_owned_must_be_durable() {
    let mut destination = ready();
    destination.step(destination_message(&destination, Body::Go { intent: Intent::Run }));
    destination.step(DestinationInput::ListenersClosed);
    destination.step(DestinationInput::PersistFailed);
    let actions = destination.step(DestinationInput::QemuGone);
    assert_eq!(bodies(&actions), [], "the failed write may say that we own the VM");
    assert_eq!(destination.step(DestinationInput::PersistFailed), []);
    assert!(persisted(&destination.step(DestinationInput::Tick)).is_some());
    assert_eq!(bodies(&destination.step(DestinationInput::Persisted)), [Body::Refused]);
    assert!(destination.is_finished());
}

#[test]
fn a_guest_that_cannot_be_started_goes_back_and_one_that_died_does_not() {
    let starting = || {
        let mut destination = ready();
        destination.step(destination_message(&destination, Body::Go { intent: Intent::Run }));
        destination.step(DestinationInput::ListenersClosed);
        assert_eq!(destination.step(DestinationInput::Persisted), [Action::ContinueGuest]);
        destination
    };
    let mut destination = starting();
    let actions = destination.step(DestinationInput::ContinueFailed);
    assert!(matches!(&actions[..], [Action::Persist(record)] if !record.may_run()));
    let actions = destination.step(DestinationInput::Persisted);
    assert_eq!(bodies(&actions), [Body::Refused]);
    assert!(actions.contains(&Action::KillTarget), "killed only after the refusal is durable");

    let mut destination = starting();
    assert_eq!(bodies(&destination.step(DestinationInput::QemuGone)), [Body::Owned]);
}

#[test]
fn a_destination_without_a_record_refuses_nothing_before_it_has_one() {
    let (_, claim) = claim();
    let (mut it, _) = Destination::offer(None, false, claim, name("host-a")).unwrap();
    let actions = it.step(DestinationInput::PersistFailed);
    assert_eq!(bodies(&actions), [], "the same migration could be offered here again");
    assert_eq!(it.step(DestinationInput::PersistFailed), []);
    assert!(persisted(&it.step(DestinationInput::Tick)).is_some());
    assert_eq!(bodies(&it.step(DestinationInput::Persisted)), [Body::Refused]);
}

#[test]
fn listeners_that_stay_open_keep_the_guest_stopped() {
    let mut destination = ready();
    let go = destination_message(&destination, Body::Go { intent: Intent::Run });
    destination.step(go.clone());
    assert_eq!(destination.step(DestinationInput::CloseFailed), []);
    assert_eq!(destination.step(go), [Action::CloseListeners], "the next GO tries again");
}

#[test]
fn a_source_asks_again_whether_everything_has_arrived() {
    let (owned, claim) = claim();
    let (mut source, _) = Source::begin(&owned, false, claim, name("host-b")).unwrap();
    source.step(SourceInput::Persisted);
    assert_eq!(source.step(SourceInput::Tick), [], "not before it has sent everything");
    assert_eq!(bodies(&source.step(SourceInput::Completed)), [Body::AskLoaded]);
    assert_eq!(bodies(&source.step(SourceInput::Tick)), [Body::AskLoaded]);
}

#[test]
fn a_source_that_dies_while_it_copies_ends_the_migration() {
    let (owned, claim) = claim();
    let (mut source, _) = Source::begin(&owned, false, claim, name("host-b")).unwrap();
    source.step(SourceInput::Persisted);
    let actions = source.step(SourceInput::QemuGone);
    assert_eq!(bodies(&actions), [Body::Abandon]);
    assert!(!actions.contains(&Action::ResumeGuest));
    let leaving = Standing::Leaving { to: name("host-b") };
    let record = Ownership::of(source.claim(), Intent::Run, leaving);
    let (_, actions) = recover(&record, Observed::Gone);
    assert!(persisted(&actions).unwrap().may_run());
    assert!(!actions.contains(&Action::ResumeGuest));
}

#[test]
fn a_destination_takes_go_only_when_it_holds_everything_and_only_once() {
    let (_, claim) = claim();
    let go = DestinationInput::Receive(Message { claim, body: Body::Go { intent: Intent::Run } });
    let (mut it, _) = Destination::offer(None, false, claim, name("host-a")).unwrap();
    it.step(DestinationInput::Persisted);
    assert_eq!(it.step(go.clone()), []);
    it.step(DestinationInput::Loaded);
    assert_eq!(it.step(go.clone()), [Action::CloseListeners]);
    assert_eq!(it.step(go.clone()), []);
    it.step(DestinationInput::ListenersClosed);
    assert_eq!(it.step(go.clone()), []);
    it.step(DestinationInput::Persisted);
    assert_eq!(it.step(go.clone()), []);
    it.step(DestinationInput::Continued);
    assert_eq!(bodies(&it.step(go)), [Body::Owned]);
    assert_eq!(it.step(DestinationInput::Abandon("the lease ended".into())), []);
    let abandon = destination_message(&it, Body::Abandon);
    assert_eq!(it.step(abandon), []);
}

#[test]
fn a_qemu_that_died_before_continue_never_ran() {
    let mut it = ready();
    it.step(destination_message(&it, Body::Go { intent: Intent::Run }));
    it.step(DestinationInput::ListenersClosed);
    assert_eq!(it.step(DestinationInput::QemuGone), [], "the write is still under way");
    let actions = it.step(DestinationInput::Persisted);
    assert!(matches!(persisted(&actions).unwrap().standing, Standing::Refused { .. }));
    assert!(!actions.contains(&Action::ContinueGuest));
    assert_eq!(bodies(&it.step(DestinationInput::Persisted)), [Body::Refused]);
}

#[test]
fn a_restarted_destination_goes_on_from_what_its_qemu_is() {
    let (_, claim) = claim();
    let expected = Standing::Expected { from: name("host-a") };
    let record = Ownership::of(claim, Intent::Pause, expected);
    let machine = |observed| match recover(&record, observed) {
        (Recovered::Destination(machine), actions) => (machine, actions),
        other => panic!("{other:?}"),
    };
    let go = DestinationInput::Receive(Message { claim, body: Body::Go { intent: Intent::Run } });

    let (mut it, actions) = machine(Observed::Stopped);
    assert_eq!(actions, []);
    assert_eq!(it.step(go.clone()), [Action::CloseListeners]);
    let (mut it, _) = machine(Observed::Incoming);
    assert_eq!(it.step(go.clone()), []);
    assert_eq!(bodies(&it.step(DestinationInput::Loaded)), [Body::Loaded]);
    let (_, actions) = machine(Observed::Gone);
    assert_eq!(bodies(&actions), [Body::Refused], "its only QEMU is dead, and it never owned");
    let (mut it, _) = machine(Observed::Running);
    assert_eq!(it.step(go), []);
}

#[test]
fn who_may_begin() {
    let (owned, first) = claim();
    let migration = first.migration;
    let begin = |record: &Ownership| Source::begin(record, false, first, name("host-b"));
    let claim = Claim { epoch: Epoch(5), ..first };
    let record = |standing| Ownership::of(claim, Intent::Run, standing);
    let (to, from) = (name("host-b"), name("host-c"));
    let leaving = record(Standing::Leaving { to: to.clone() });
    let released = record(Standing::Released { to: to.clone() });
    let gone = record(Standing::Gone { to: to.clone() });
    let expected = record(Standing::Expected { from: from.clone() });
    let refused = record(Standing::Refused { from });
    let doubt = NotAdmitted::InDoubt { ask: to.clone() };

    assert_eq!(begin(&leaving).unwrap_err(), NotAdmitted::Migrating(migration));
    assert_eq!(begin(&released).unwrap_err(), doubt);
    for record in [&gone, &expected, &refused] {
        assert_eq!(begin(record).unwrap_err(), NotAdmitted::NotOwner);
    }
    let spent = Source::begin(&owned, true, first, to.clone());
    assert_eq!(spent.unwrap_err(), NotAdmitted::Spent(migration));
    let again = Claim { epoch: owned.epoch, ..first };
    let stale = NotAdmitted::StaleEpoch { offered: owned.epoch, known: owned.epoch };
    assert_eq!(Source::begin(&owned, false, again, to.clone()).unwrap_err(), stale);
    let foreign = Claim { vm: VmId::new(), ..first };
    assert_eq!(
        Source::begin(&owned, false, foreign, to.clone()).unwrap_err(),
        NotAdmitted::NotOwner
    );
    // Epochs between were burnt by tries that this host never heard of.
    let (source, _) = Source::begin(&owned, false, claim, to.clone()).unwrap();
    assert_eq!(source.claim(), claim);

    let offer = |current: &Ownership, epoch| {
        let claim = Claim { epoch: Epoch(epoch), migration: MigrationId::new(), ..claim };
        Destination::offer(Some(current), false, claim, name("host-a")).map(|_| ())
    };
    assert_eq!(offer(&owned, 6).unwrap_err(), NotAdmitted::OwnedHere);
    assert_eq!(offer(&leaving, 6).unwrap_err(), NotAdmitted::Migrating(migration));
    assert_eq!(offer(&expected, 6).unwrap_err(), NotAdmitted::Migrating(migration));
    assert_eq!(offer(&released, 6).unwrap_err(), doubt);
    let spent = Destination::offer(Some(&gone), true, Claim { epoch: Epoch(6), ..claim }, to);
    assert_eq!(spent.unwrap_err(), NotAdmitted::Spent(migration));
    for record in [&gone, &refused] {
        let stale = NotAdmitted::StaleEpoch { offered: Epoch(5), known: Epoch(5) };
        assert_eq!(offer(record, 5).unwrap_err(), stale);
        assert_eq!(offer(record, 6), Ok(()));
    }
}

#[test]
fn late_questions_are_answered_from_the_ledger() {
    let (_, claim) = claim();
    let go = Message { claim, body: Body::Go { intent: Intent::Run } };
    let told = |standing| {
        let record = Ownership::of(claim, Intent::Run, standing);
        answer(Some(&record), &go).map(|message| message.body)
    };
    assert_eq!(told(Standing::Owned), Some(Body::Owned));
    assert_eq!(told(Standing::Refused { from: name("host-a") }), Some(Body::Refused));
    assert_eq!(told(Standing::Expected { from: name("host-a") }), None);
    assert_eq!(answer(None, &go).unwrap().body, Body::Unknown);
    assert_eq!(answer(None, &Message { claim, body: Body::Abandon }), None);
    let stayed = Ownership::after_staying(claim, Intent::Run);
    assert_eq!(answer(Some(&stayed), &go), None, "another epoch proves nothing");
}

#[test]
fn recovery_runs_the_guest_only_where_the_ledger_says() {
    let (_, claim) = claim();
    let peer = || name("host-b");
    let first = |standing, observed| {
        recover(&Ownership::of(claim, Intent::Run, standing), observed).1.first().cloned()
    };
    for observed in [Observed::Gone, Observed::Incoming, Observed::Stopped, Observed::Running] {
        let released = recover(
            &Ownership::of(claim, Intent::Run, Standing::Released { to: peer() }),
            observed,
        );
        assert!(matches!(released.0, Recovered::Source(_)));
        assert_eq!(bodies(&released.1), [Body::Go { intent: Intent::Run }]);
        assert_eq!(released.1.len(), 1);
    }
    assert_eq!(first(Standing::Leaving { to: peer() }, Observed::Stopped), Some(Action::StopCopy));
    let owned = recover(&Ownership::of(claim, Intent::Run, Standing::Owned), Observed::Stopped);
    assert_eq!(owned.1, [Action::StopCopy, Action::ResumeGuest, Action::Announce]);
    let created = Ownership::created(claim.vm, Intent::Run);
    assert_eq!(recover(&created, Observed::Stopped).1[0], Action::ResumeGuest);
    assert_eq!(first(Standing::Owned, Observed::Running), None);
    assert_eq!(first(Standing::Gone { to: peer() }, Observed::Stopped), Some(Action::QuitSource));
    assert_eq!(
        first(Standing::Refused { from: peer() }, Observed::Stopped),
        Some(Action::KillTarget)
    );
    assert_eq!(
        first(Standing::Expected { from: peer() }, Observed::Running),
        Some(Action::RaiseUnresolved),
        "hands off what the rules exclude"
    );
    assert_eq!(first(Standing::Expected { from: peer() }, Observed::Stopped), None);
}

#[test]
fn records_keep_their_form() {
    let (_, claim) = claim();
    let record = Ownership::of(claim, Intent::Run, Standing::Released { to: name("host-b") });
    let json = serde_json::to_value(&record).unwrap();
    assert_eq!(json["standing"], "released");
    assert_eq!(json["to"], "host-b");
    assert_eq!(serde_json::from_value::<Ownership>(json).unwrap(), record);
    let go = Message { claim, body: Body::Go { intent: Intent::Pause } };
    let json = serde_json::to_value(go).unwrap();
    assert_eq!(json["body"], serde_json::json!({"kind": "go", "intent": "pause"}));
    assert_eq!(serde_json::from_value::<Message>(json).unwrap(), go);
}

const BODIES: [Body; 10] = [
    Body::AskLoaded,
    Body::Loaded,
    Body::Go { intent: Intent::Run },
    Body::Owned,
    Body::Refused,
    Body::Abandon,
    Body::Unknown,
    Body::AskFetched,
    Body::Lost,
    Body::Fetched,
];

fn any_source_input(claim: Claim) -> impl Strategy<Value = SourceInput> {
    prop_oneof![
        3 => Just(SourceInput::Persisted),
        1 => Just(SourceInput::PersistFailed),
        2 => Just(SourceInput::Completed),
        2 => Just(SourceInput::StateSent),
        1 => Just(SourceInput::StreamLost),
        6 => (0..BODIES.len()).prop_map(move |at| {
            SourceInput::Receive(Message { claim, body: BODIES[at] })
        }),
        1 => Just(SourceInput::Tick),
        1 => Just(SourceInput::Cancel),
        1 => Just(SourceInput::Reclaim),
        1 => Just(SourceInput::Fail("failed".into())),
        1 => Just(SourceInput::QemuGone),
        1 => Just(SourceInput::Overdue),
    ]
}

fn any_destination_input(claim: Claim) -> impl Strategy<Value = DestinationInput> {
    prop_oneof![
        3 => Just(DestinationInput::Persisted),
        1 => Just(DestinationInput::PersistFailed),
        2 => Just(DestinationInput::Loaded),
        2 => Just(DestinationInput::StateLoaded),
        1 => Just(DestinationInput::Starved),
        6 => (0..BODIES.len()).prop_map(move |at| {
            DestinationInput::Receive(Message { claim, body: BODIES[at] })
        }),
        1 => Just(DestinationInput::Tick),
        1 => Just(DestinationInput::Abandon("lease".into())),
        1 => Just(DestinationInput::Superseded),
        2 => Just(DestinationInput::ListenersClosed),
        1 => Just(DestinationInput::CloseFailed),
        2 => Just(DestinationInput::Continued),
        1 => Just(DestinationInput::ContinueFailed),
        1 => Just(DestinationInput::QemuGone),
    ]
}

fn fixed_claim() -> Claim {
    let uuid = uuid::Uuid::from_u128(7);
    Claim { vm: uuid.into(), migration: uuid.into(), epoch: Epoch(2) }
}

/// What a repeated message may cause: another answer, nothing else.
fn only_answers(actions: &[Action]) -> bool {
    actions.iter().all(|action| matches!(action, Action::Send(_)))
}

proptest! {
    /// I11: a message that comes twice leaves the state as if it had come once.
    #[test]
    fn a_source_takes_each_message_once(
        inputs in proptest::collection::vec(any_source_input(fixed_claim()), 0..40),
        recovered in any::<bool>(),
    ) {
        let claim = fixed_claim();
        let owned = Ownership::created(claim.vm, Intent::Run);
        let (mut source, _) =
            Source::begin(&owned, false, claim, name("host-b")).unwrap();
        if recovered {
            let released = Standing::Released { to: name("host-b") };
            let record = Ownership::of(claim, Intent::Run, released);
            source = Source::recover(&record, Observed::Stopped).unwrap().0;
        }
        let mut cancel_asked = false;
        for input in inputs {
            let actions = source.step(input.clone());
            let accepted = actions.contains(&Action::AcceptCancel);
            let answered = accepted || actions.contains(&Action::RefuseCancel);
            cancel_asked |= input == SourceInput::Cancel;
            prop_assert!(cancel_asked || !answered, "nobody had asked, or it was answered before");
            prop_assert!(!accepted || source.is_finished(), "accepted before the stay is durable");
            cancel_asked &= !answered;
            prop_assert!(!(cancel_asked && source.is_finished()), "a cancel was not answered");
            if matches!(input, SourceInput::Receive(_)) {
                let once = source.clone();
                let again = source.step(input);
                prop_assert!(only_answers(&again), "{again:?}");
                prop_assert_eq!(&once, &source);
            }
            let mut foreign = claim;
            foreign.epoch = claim.epoch.next();
            let once = source.clone();
            for body in BODIES {
                let message = Message { claim: foreign, body };
                prop_assert_eq!(source.step(SourceInput::Receive(message)), []);
            }
            prop_assert_eq!(&once, &source);
        }
    }

    #[test]
    fn a_destination_takes_each_message_once(
        inputs in proptest::collection::vec(any_destination_input(fixed_claim()), 0..40),
    ) {
        let claim = fixed_claim();
        let (mut it, _) = Destination::offer(None, false, claim, name("host-a")).unwrap();
        for input in inputs {
            it.step(input.clone());
            if matches!(input, DestinationInput::Receive(_)) {
                let once = it.clone();
                let again = it.step(input);
                prop_assert!(only_answers(&again), "{again:?}");
                prop_assert_eq!(&once, &it);
            }
            let foreign = Claim { migration: uuid::Uuid::from_u128(8).into(), ..claim };
            let once = it.clone();
            for body in BODIES {
                let message = Message { claim: foreign, body };
                prop_assert_eq!(it.step(DestinationInput::Receive(message)), []);
            }
            prop_assert_eq!(&once, &it);
        }
    }
}
