//! The machines one input at a time; the checker explores all orders.

use super::*;
use crate::names::{Epoch, MigrationId, Name, VmId};

fn name(text: &str) -> Name {
    Name::new(text).unwrap()
}

struct Pair {
    source: Source,
    destination: Destination,
}

fn claim() -> (Ownership, MigrationId) {
    (Ownership::created(VmId::new(), Intent::Run), MigrationId::new())
}

fn source_message(source: &Source, body: Body) -> SourceInput {
    SourceInput::Receive(Message { claim: source.claim(), body })
}

fn destination_message(destination: &Destination, body: Body) -> DestinationInput {
    DestinationInput::Receive(Message { claim: destination.claim(), body })
}

/// A migration whose source has just become `InDoubt` and whose destination is ready.
fn released() -> Pair {
    let (owned, migration) = claim();
    let (mut source, actions) = Source::begin(&owned, false, migration, name("host-b")).unwrap();
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
fn cancel_is_accepted_before_the_release_and_refused_after() {
    let (owned, migration) = claim();
    let (mut source, _) = Source::begin(&owned, false, migration, name("host-b")).unwrap();
    source.step(SourceInput::Persisted);
    let actions = source.step(SourceInput::Cancel);
    assert_eq!(actions[..3], [Action::AcceptCancel, Action::StopCopy, Action::ResumeGuest]);
    assert_eq!(source.step(SourceInput::Cancel), [Action::AcceptCancel]);
    let mut source = released().source;
    assert_eq!(source.step(SourceInput::Cancel), [Action::RefuseCancel]);
}
