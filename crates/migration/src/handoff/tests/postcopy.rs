//! Post-copy, one input at a time: the memory follows when the guest is already the destination's.

use super::*;

const GO: Body = Body::Go { intent: Intent::Run };

/// A migration whose state has arrived, released, with memory still to be sent.
fn released_in_part() -> Pair {
    let (owned, claim) = claim();
    let (mut source, _) = Source::begin(&owned, false, claim, name("host-b")).unwrap();
    source.step(SourceInput::Persisted);
    assert_eq!(bodies(&source.step(SourceInput::StateSent)), [Body::AskLoaded]);
    let (mut destination, _) = Destination::offer(None, false, claim, name("host-a")).unwrap();
    destination.step(DestinationInput::Persisted);
    assert_eq!(bodies(&destination.step(DestinationInput::StateLoaded)), [Body::Loaded]);
    let actions = source.step(source_message(&source, Body::Loaded));
    let record = persisted(&actions).unwrap();
    assert!(matches!(record.standing, Standing::Serving { .. }) && !record.may_run());
    assert_eq!(bodies(&source.step(SourceInput::Persisted)), [GO]);
    Pair { source, destination }
}

/// The guest runs at the destination, which lacks memory.
pub(super) fn moved_in_part() -> Pair {
    let Pair { mut source, mut destination } = released_in_part();
    destination.step(destination_message(&destination, GO));
    let actions = destination.step(DestinationInput::ListenersClosed);
    let record = persisted(&actions).unwrap();
    assert!(matches!(record.standing, Standing::Fetching { .. }) && record.may_run());
    assert_eq!(destination.step(DestinationInput::Persisted), [Action::ContinueGuest]);
    let actions = destination.step(DestinationInput::Continued);
    assert_eq!(actions[0], Action::Announce);
    assert_eq!((actions.len(), bodies(&actions)), (2, vec![Body::Owned]));
    let actions = source.step(source_message(&source, Body::Owned));
    assert_eq!((actions.len(), bodies(&actions)), (1, vec![Body::AskFetched]));
    assert!(source.is_serving());
    Pair { source, destination }
}

fn retires(actions: &[Action]) -> bool {
    let gone = persisted(actions).is_some_and(|r| matches!(r.standing, Standing::Gone { .. }));
    gone && actions.contains(&Action::QuitSource)
        && actions.contains(&Action::Settle(Outcome::Moved))
}

#[test]
fn both_sides_end_when_all_memory_is_there() {
    let Pair { mut source, mut destination } = moved_in_part();
    assert!(!destination.is_finished());
    let ask = destination_message(&destination, Body::AskFetched);
    assert_eq!(destination.step(ask), [], "answered when there is an answer");
    let actions = destination.step(DestinationInput::Loaded);
    assert_eq!(persisted(&actions).unwrap().standing, Standing::Owned);
    let actions = destination.step(DestinationInput::Persisted);
    assert_eq!(bodies(&actions), [Body::Fetched]);
    assert!(actions.contains(&Action::Settle(Outcome::Moved)) && destination.is_finished());

    let mut by_word = source.clone();
    assert!(retires(&by_word.step(source_message(&by_word, Body::Fetched))));
    assert!(retires(&source.step(SourceInput::Completed)));
    source.step(SourceInput::Persisted);
    assert!(source.is_finished());
}

#[test]
fn nothing_but_memory_ends_the_serving() {
    let Pair { mut source, mut destination } = moved_in_part();
    assert_eq!(source.step(SourceInput::Cancel), [Action::RefuseCancel]);
    assert_eq!(source.step(SourceInput::Fail("too slow".into())), []);
    assert_eq!(source.step(source_message(&source, Body::Refused)), []);
    assert_eq!(source.step(source_message(&source, Body::Owned)), []);
    assert_eq!(source.step(SourceInput::Overdue), [Action::RaiseUnresolved]);
    assert_eq!(
        source.step(SourceInput::Overdue),
        [Action::RaiseUnresolved],
        "every silence is told"
    );
    assert_eq!(bodies(&source.step(SourceInput::Tick)), [Body::AskFetched]);

    assert_eq!(destination.step(DestinationInput::Abandon("the lease ended".into())), []);
    assert_eq!(destination.step(destination_message(&destination, Body::Abandon)), []);
    assert_eq!(destination.step(DestinationInput::Tick), []);
    assert_eq!(destination.step(DestinationInput::Starved), [], "a cut is no loss");
    let go = destination_message(&destination, GO);
    assert_eq!(bodies(&destination.step(go)), [Body::Owned]);
}

#[test]
fn memory_that_came_before_the_guest_ran_leaves_nothing_to_serve() {
    let Pair { mut source, mut destination } = released_in_part();
    assert_eq!(source.step(SourceInput::Completed), []);
    assert!(retires(&source.step(source_message(&source, Body::Owned))));
    assert_eq!(destination.step(DestinationInput::Loaded), []);
    destination.step(destination_message(&destination, GO));
    let actions = destination.step(DestinationInput::ListenersClosed);
    assert_eq!(persisted(&actions).unwrap().standing, Standing::Owned);

    // A moment later: the record says that memory is to come, and is corrected at once.
    let Pair { mut destination, .. } = released_in_part();
    destination.step(destination_message(&destination, GO));
    destination.step(DestinationInput::ListenersClosed);
    destination.step(DestinationInput::Persisted);
    destination.step(DestinationInput::Loaded);
    let actions = destination.step(DestinationInput::Continued);
    assert_eq!(bodies(&actions), [Body::Owned]);
    assert_eq!(persisted(&actions).unwrap().standing, Standing::Owned);
    assert_eq!(destination.step(DestinationInput::PersistFailed), []);
    assert!(persisted(&destination.step(DestinationInput::Tick)).is_some(), "tried again");
    assert_eq!(bodies(&destination.step(DestinationInput::Persisted)), [Body::Fetched]);
}

#[test]
fn before_the_release_every_failure_leads_back_to_the_source() {
    let sent = || {
        let (owned, claim) = claim();
        let (mut source, _) = Source::begin(&owned, false, claim, name("host-b")).unwrap();
        source.step(SourceInput::Persisted);
        source.step(SourceInput::StateSent);
        source
    };
    for input in [SourceInput::Cancel, SourceInput::Fail("the stream was cut".into())] {
        let actions = sent().step(input);
        let at = |wanted| actions.iter().position(|action| *action == wanted).unwrap();
        assert!(at(Action::StopCopy) < at(Action::ResumeGuest));
        assert_eq!(bodies(&actions), [Body::Abandon]);
    }
    let actions = sent().step(SourceInput::QemuGone);
    assert_eq!(bodies(&actions), [Body::Abandon], "nobody has all of the guest");
    assert!(!actions.contains(&Action::ResumeGuest));
}

#[test]
fn a_refusal_ends_the_post_copy_before_the_guest_resumes() {
    let Pair { mut source, .. } = released_in_part();
    let actions = source.step(source_message(&source, Body::Refused));
    assert_eq!(actions.len(), 1, "nothing before the record is written");
    let actions = source.step(SourceInput::Persisted);
    assert_eq!(actions[..2], [Action::StopCopy, Action::ResumeGuest]);
}

#[test]
fn a_source_that_can_send_nothing_more_says_so_until_it_is_heard() {
    for input in [SourceInput::QemuGone, SourceInput::StreamLost] {
        let Pair { mut source, mut destination } = moved_in_part();
        assert_eq!(bodies(&source.step(input.clone())), [Body::Lost]);
        assert_eq!(source.step(input), []);
        assert_eq!(bodies(&source.step(SourceInput::Tick)), [Body::Lost]);

        let lost = destination_message(&destination, Body::Lost);
        assert_eq!(destination.step(lost), [Action::LookForRest]);
        assert_eq!(destination.step(DestinationInput::Tick), [Action::LookForRest]);
        let mut whole = destination.clone();
        assert_eq!(
            persisted(&whole.step(DestinationInput::Loaded)).unwrap().standing,
            Standing::Owned
        );
        assert_eq!(destination.step(DestinationInput::Starved), [Action::KillTarget]);
        let actions = destination.step(DestinationInput::QemuGone);
        assert_eq!(persisted(&actions).unwrap().standing, Standing::Owned, "it has crashed here");
        assert_eq!(bodies(&destination.step(DestinationInput::Persisted)), [Body::Fetched]);

        assert!(retires(&source.step(source_message(&source, Body::Fetched))));
    }
}

#[test]
fn a_guest_that_dies_while_it_fetches_has_crashed_there() {
    let Pair { mut source, mut destination } = moved_in_part();
    let actions = destination.step(DestinationInput::QemuGone);
    assert_eq!(persisted(&actions).unwrap().standing, Standing::Owned);
    let actions = destination.step(DestinationInput::Persisted);
    assert_eq!(bodies(&actions), [Body::Fetched]);
    assert!(retires(&source.step(source_message(&source, Body::Fetched))));
}

#[test]
fn a_restarted_source_goes_on_serving() {
    let (_, claim) = claim();
    let serving = Standing::Serving { to: name("host-b") };
    let record = Ownership::of(claim, Intent::Run, serving);
    let machine = |observed| match recover(&record, observed) {
        (Recovered::Source(source), actions) => (source, actions),
        other => panic!("{other:?}"),
    };
    let (mut source, actions) = machine(Observed::Stopped);
    assert_eq!((actions.len(), bodies(&actions)), (1, vec![GO]));
    let actions = source.step(source_message(&source, Body::Owned));
    assert_eq!((actions.len(), bodies(&actions)), (1, vec![Body::AskFetched]));
    let (mut source, _) = machine(Observed::Gone);
    assert_eq!(bodies(&source.step(source_message(&source, Body::Owned))), [Body::Lost]);
    // Its QEMU had sent everything before the agent came back.
    let (mut source, _) = machine(Observed::Stopped);
    source.step(SourceInput::Completed);
    assert!(retires(&source.step(source_message(&source, Body::Owned))));
}

#[test]
fn a_restarted_destination_goes_on_fetching() {
    let (_, claim) = claim();
    let machine = |intent, standing, observed| match recover(
        &Ownership::of(claim, intent, standing),
        observed,
    ) {
        (Recovered::Destination(it), actions) => (it, actions),
        other => panic!("{other:?}"),
    };
    let fetching = || Standing::Fetching { from: name("host-a") };
    let runs = [Action::ResumeGuest, Action::Announce];
    for observed in [Observed::Part, Observed::Stopped] {
        assert_eq!(machine(Intent::Run, fetching(), observed).1, runs);
        assert_eq!(machine(Intent::Pause, fetching(), observed).1, []);
    }
    let (mut it, actions) = machine(Intent::Run, fetching(), Observed::Running);
    assert_eq!(actions, []);
    assert_eq!(bodies(&it.step(destination_message(&it, GO))), [Body::Owned]);
    assert_eq!(it.step(DestinationInput::Abandon("the lease ended".into())), []);
    assert_eq!(persisted(&it.step(DestinationInput::Loaded)).unwrap().standing, Standing::Owned);
    let (mut it, actions) = machine(Intent::Run, fetching(), Observed::Gone);
    assert_eq!(persisted(&actions).unwrap().standing, Standing::Owned);
    assert_eq!(bodies(&it.step(DestinationInput::Persisted)), [Body::Fetched]);

    // Before GO: whether memory is still to come is seen, not remembered.
    let expected = Standing::Expected { from: name("host-a") };
    let (mut it, _) = machine(Intent::Pause, expected, Observed::Part);
    it.step(destination_message(&it, GO));
    let actions = it.step(DestinationInput::ListenersClosed);
    assert_eq!(persisted(&actions).unwrap().standing, fetching());
}

#[test]
fn no_other_migration_begins_before_the_memory_is_there() {
    let (_, claim) = claim();
    let next = Claim { migration: MigrationId::new(), epoch: claim.epoch.next(), ..claim };
    let busy = NotAdmitted::Migrating(claim.migration);
    let serving = Standing::Serving { to: name("host-b") };
    let fetching = Standing::Fetching { from: name("host-a") };
    for standing in [serving, fetching] {
        let record = Ownership::of(claim, Intent::Run, standing);
        assert_eq!(Source::begin(&record, false, next, name("host-c")).unwrap_err(), busy);
        let offer = Destination::offer(Some(&record), false, next, name("host-c"));
        assert_eq!(offer.unwrap_err(), busy);
        assert!(record.is_open());
    }
}

#[test]
fn late_questions_for_memory_are_answered_from_the_ledger() {
    let (_, claim) = claim();
    let told = |standing, body| {
        let record = Ownership::of(claim, Intent::Run, standing);
        answer(Some(&record), &Message { claim, body }).map(|message| message.body)
    };
    let fetching = Standing::Fetching { from: name("host-a") };
    for body in [Body::AskFetched, Body::Lost] {
        assert_eq!(told(Standing::Owned, body), Some(Body::Fetched));
        assert_eq!(told(fetching.clone(), body), None);
        assert_eq!(answer(None, &Message { claim, body }).unwrap().body, Body::Unknown);
    }
    assert_eq!(told(fetching, GO), Some(Body::Owned));
}

#[test]
fn the_new_records_keep_their_form() {
    let (_, claim) = claim();
    let fetching = Standing::Fetching { from: name("host-a") };
    let record = Ownership::of(claim, Intent::Run, fetching);
    let json = serde_json::to_value(&record).unwrap();
    assert_eq!((&json["standing"], &json["from"]), (&"fetching".into(), &"host-a".into()));
    assert_eq!(serde_json::from_value::<Ownership>(json).unwrap(), record);
    let ask = serde_json::to_value(Message { claim, body: Body::AskFetched }).unwrap();
    assert_eq!(ask["body"], serde_json::json!({"kind": "ask-fetched"}));
}
