//! Disks that are copied along: one input at a time.

use super::*;

/// A source that copies, and a destination that receives, disks included.
fn copying() -> Pair {
    let (owned, claim) = claim();
    let (source, _) = Source::begin(&owned, false, claim, name("host-b")).unwrap();
    let (destination, _) = Destination::offer(None, false, claim, name("host-a")).unwrap();
    let (mut source, mut destination) = (source.with_disks(), destination.with_disks());
    assert_eq!(source.step(SourceInput::Persisted), [Action::BeginCopy]);
    assert_eq!(destination.step(DestinationInput::Persisted), [Action::StartTarget]);
    Pair { source, destination }
}

/// The same once the disks are settled and everything has been sent and loaded.
fn settled() -> Pair {
    let Pair { mut source, mut destination } = copying();
    source.step(SourceInput::AtSwitchover);
    source.step(SourceInput::DisksSettled);
    destination.step(destination_message(&destination, Body::DisksSettled));
    source.step(SourceInput::Completed);
    destination.step(DestinationInput::Loaded);
    Pair { source, destination }
}

#[test]
fn the_disks_are_settled_before_the_rest_is_sent_and_the_whole_state_is_both() {
    let Pair { mut source, mut destination } = copying();
    assert_eq!(source.step(SourceInput::AtSwitchover), [Action::SettleDisks]);
    assert_eq!(source.step(SourceInput::AtSwitchover), [], "once is enough");
    let actions = source.step(SourceInput::DisksSettled);
    assert_eq!(bodies(&actions), [Body::DisksSettled]);
    assert_eq!(actions.last(), Some(&Action::FinishCopy));
    assert_eq!(source.step(SourceInput::DisksSettled), []);
    assert_eq!(source.step(SourceInput::AtSwitchover), [Action::FinishCopy], "it was not heard");

    assert_eq!(destination.step(DestinationInput::Loaded), [], "the disks are not here");
    assert_eq!(destination.step(destination_message(&destination, Body::AskLoaded)), []);
    let go = destination_message(&destination, Body::Go { intent: Intent::Run });
    assert_eq!(destination.step(go.clone()), []);
    let said = destination_message(&destination, Body::DisksSettled);
    let actions = destination.step(said.clone());
    assert_eq!(actions[0], Action::CloseExports);
    assert_eq!(bodies(&actions), [Body::Loaded]);
    assert_eq!(bodies(&destination.step(said)), [Body::Loaded], "and no export is closed twice");

    assert_eq!(bodies(&source.step(SourceInput::Completed)), [Body::DisksSettled]);
    assert_eq!(bodies(&source.step(SourceInput::Tick)), [Body::DisksSettled]);
    let actions = source.step(source_message(&source, Body::Loaded));
    assert!(matches!(persisted(&actions).unwrap().standing, Standing::Released { .. }));
    assert_eq!(destination.step(go), [Action::CloseListeners]);
}

#[test]
fn what_is_settled_first_is_said_to_be_whole_when_it_is_loaded() {
    let mut destination = copying().destination;
    let said = destination_message(&destination, Body::DisksSettled);
    assert_eq!(destination.step(said), [Action::CloseExports]);
    assert_eq!(bodies(&destination.step(DestinationInput::Loaded)), [Body::Loaded]);
    let said = destination_message(&destination, Body::DisksSettled);
    let mut without =
        Destination::offer(None, false, destination.claim(), name("host-a")).unwrap().0;
    without.step(DestinationInput::Persisted);
    assert_eq!(without.step(said), [], "no disk is expected, and none is closed");
}

#[test]
fn a_copy_that_ends_without_its_disks_is_given_up() {
    for end in [SourceInput::Completed, SourceInput::StateSent] {
        for settling in [false, true] {
            let mut source = copying().source;
            if settling {
                source.step(SourceInput::AtSwitchover);
            }
            let actions = source.step(end.clone());
            assert_eq!(actions[..2], [Action::StopCopy, Action::ResumeGuest]);
            assert_eq!(bodies(&actions), [Body::Abandon]);
        }
    }
}

#[test]
fn a_mirror_that_fails_and_a_cancel_end_it_at_the_source_while_the_disks_are_settled() {
    for end in
        [SourceInput::Fail("vda: no space".into()), SourceInput::Cancel, SourceInput::QemuGone]
    {
        for settled in [false, true] {
            let mut source = copying().source;
            source.step(SourceInput::AtSwitchover);
            if settled {
                source.step(SourceInput::DisksSettled);
            }
            let actions = source.step(end.clone());
            assert_eq!(actions[0], Action::StopCopy);
            assert_eq!(bodies(&actions), [Body::Abandon]);
            assert_eq!(source.step(SourceInput::DisksSettled), [], "too late");
            assert_eq!(source.step(SourceInput::AtSwitchover), []);
        }
    }
}

#[test]
fn without_copied_disks_the_switchover_asks_for_nothing() {
    let (owned, claim) = claim();
    let (mut source, _) = Source::begin(&owned, false, claim, name("host-b")).unwrap();
    source.step(SourceInput::Persisted);
    assert_eq!(source.step(SourceInput::DisksSettled), []);
    assert_eq!(source.step(SourceInput::AtSwitchover), [Action::FinishCopy]);
    assert_eq!(bodies(&source.step(SourceInput::Completed)), [Body::AskLoaded]);
}

#[test]
fn a_restart_of_either_agent_is_told_again() {
    let Pair { mut source, .. } = settled();
    let actions = source.step(source_message(&source, Body::Loaded));
    let released = persisted(&actions).unwrap().clone();
    let (Recovered::Source(source), actions) = recover(&released, Observed::Stopped) else {
        panic!("it is open");
    };
    assert_eq!(bodies(&actions), [Body::Go { intent: Intent::Run }]);
    let asks = bodies(&source.with_disks().step(SourceInput::Tick));
    assert_eq!(asks, [Body::DisksSettled, Body::Go { intent: Intent::Run }]);

    let standing = Standing::Expected { from: name("host-a") };
    let expected = Ownership { standing, ..released };
    let (Recovered::Destination(destination), _) = recover(&expected, Observed::Stopped) else {
        panic!("it is open");
    };
    let mut destination = destination.with_disks();
    let go = destination_message(&destination, Body::Go { intent: Intent::Run });
    assert_eq!(destination.step(go.clone()), [], "it has forgotten what it had heard");
    destination.step(destination_message(&destination, Body::DisksSettled));
    assert_eq!(destination.step(go), [Action::CloseListeners]);
}

#[test]
fn an_owner_and_a_refuser_answer_the_question_as_they_answer_go() {
    let (_, claim) = claim();
    let message = Message { claim, body: Body::DisksSettled };
    let from = name("host-a");
    let said = |standing| {
        let record = Ownership::of(claim, Intent::Run, standing);
        answer(Some(&record), &message).map(|answer| answer.body)
    };
    assert_eq!(said(Standing::Owned), Some(Body::Owned));
    assert_eq!(said(Standing::Fetching { from: from.clone() }), Some(Body::Owned));
    assert_eq!(said(Standing::Refused { from }), Some(Body::Refused));
    assert_eq!(answer(None, &message).unwrap().body, Body::Unknown);
}

#[test]
fn files_go_only_by_a_record_and_never_while_they_are_in_use() {
    use CopyFate::{Discard, Needed, PutAside, Retire};
    let (_, claim) = claim();
    let peer = || name("host-b");
    let cases = [
        (None, Needed, Discard),
        (Some(Standing::Owned), Needed, Needed),
        (Some(Standing::Leaving { to: peer() }), Needed, Needed),
        (Some(Standing::Released { to: peer() }), Needed, Needed),
        (Some(Standing::Serving { to: peer() }), Needed, Needed),
        (Some(Standing::Gone { to: peer() }), Retire, PutAside),
        (Some(Standing::Fetching { from: peer() }), Needed, Needed),
        (Some(Standing::Expected { from: peer() }), Needed, Needed),
        (Some(Standing::Refused { from: peer() }), Needed, Discard),
    ];
    for (standing, originals, copies) in cases {
        let record = standing.map(|standing| Ownership::of(claim, Intent::Run, standing));
        assert_eq!(fate_of_originals(record.as_ref(), false), originals, "{record:?}");
        assert_eq!(fate_of_copies(record.as_ref(), false), copies, "{record:?}");
        assert_eq!(fate_of_originals(record.as_ref(), true), Needed);
        assert_eq!(fate_of_copies(record.as_ref(), true), Needed);
    }
}
