//! A VM that is taken back by an operator's word.

use super::*;

/// A source in doubt, and one that serves.
fn given_away() -> [Source; 2] {
    let doubtful = released().source;
    let serving = postcopy::moved_in_part().source;
    [doubtful, serving]
}

#[test]
fn its_qemu_ends_before_the_vm_is_its_own_again() {
    for mut source in given_away() {
        assert!(source.can_reclaim());
        assert_eq!(source.step(SourceInput::Reclaim), [Action::QuitSource]);
        assert_eq!(source.step(SourceInput::Reclaim), [], "once is enough");
        assert_eq!(source.step(SourceInput::Tick), [Action::QuitSource], "and no GO");
        assert_eq!(source.step(SourceInput::Cancel), [Action::RefuseCancel]);
        let actions = source.step(SourceInput::QemuGone);
        let record = persisted(&actions).unwrap();
        assert!(record.may_run() && record.epoch == source.claim().epoch.next());
        assert_eq!(source.step(SourceInput::PersistFailed), []);
        assert!(persisted(&source.step(SourceInput::Tick)).is_some());
        let late = source_message(&source, Body::Owned);
        assert_eq!(source.step(late), [], "the record may be durable already");
        let actions = source.step(SourceInput::Persisted);
        assert!(matches!(actions[..], [Action::Settle(Outcome::Stayed { .. })]));
        assert!(source.is_finished());
    }
}

#[test]
fn without_a_qemu_the_record_comes_at_once() {
    let mut source = released().source;
    source.step(SourceInput::QemuGone);
    assert!(persisted(&source.step(SourceInput::Reclaim)).unwrap().may_run());
}

#[test]
fn a_destination_that_lives_counts_for_more() {
    for body in [Body::Owned, Body::Fetched] {
        let [mut source, _] = given_away();
        source.step(SourceInput::Reclaim);
        let actions = source.step(source_message(&source, body));
        assert!(actions.contains(&Action::Settle(Outcome::Moved)));
    }
    let [_, mut source] = given_away();
    source.step(SourceInput::Reclaim);
    let actions = source.step(source_message(&source, Body::Owned));
    assert_eq!(bodies(&actions), [Body::Lost], "what it lacks has been ended");
}

#[test]
fn elsewhere_it_means_nothing() {
    let (owned, claim) = claim();
    let (mut source, _) = Source::begin(&owned, false, claim, name("host-b")).unwrap();
    source.step(SourceInput::Persisted);
    for input in [SourceInput::Completed, source_message(&source, Body::Loaded)] {
        assert!(!source.can_reclaim());
        assert_eq!(source.step(SourceInput::Reclaim), []);
        source.step(input);
    }
    source.step(SourceInput::PersistFailed);
    assert_eq!(source.step(SourceInput::Reclaim), [], "no GO was sent");
}

#[test]
fn a_former_owner_gives_up_only_an_older_word() {
    let (_, claim) = claim();
    let since = Claim { epoch: claim.epoch.next(), ..claim };
    let (owner, from) = (name("host-a"), name("host-a"));
    let word = |standing, observed| {
        let record = Ownership::of(claim, Intent::Pause, standing);
        supersede(Some(&record), since, &owner, observed)
    };
    let gone = Ownership::of(since, Intent::Pause, Standing::Gone { to: owner.clone() });
    for standing in [
        Standing::Owned,
        Standing::Fetching { from: from.clone() },
        Standing::Expected { from: from.clone() },
    ] {
        assert_eq!(word(standing.clone(), Observed::Gone), Superseding::Write(gone.clone()));
        for observed in [Observed::Running, Observed::Stopped, Observed::Part, Observed::Incoming] {
            assert_eq!(word(standing.clone(), observed), Superseding::EndGuest);
        }
    }
    let refused = Standing::Refused { from };
    assert_eq!(word(refused, Observed::Gone), Superseding::Nothing);
    assert_eq!(supersede(None, since, &owner, Observed::Gone), Superseding::Nothing);
    assert_eq!(
        supersede(Some(&gone), since, &owner, Observed::Gone),
        Superseding::Nothing,
        "heard"
    );
    let again = Ownership::of(Claim { epoch: Epoch(9), ..claim }, Intent::Run, Standing::Owned);
    let late = supersede(Some(&again), since, &owner, Observed::Running);
    assert_eq!(late, Superseding::Nothing, "it is the owner again");
}

#[test]
fn a_destination_with_an_open_migration_is_ended_by_it() {
    let mut it = ready();
    it.step(DestinationInput::Superseded);
    assert!(persisted(&it.step(DestinationInput::Tick)).is_some_and(|record| !record.may_run()));
    let mut it = postcopy::moved_in_part().destination;
    assert_eq!(it.step(DestinationInput::Superseded), [Action::LookForRest]);
    assert_eq!(it.step(DestinationInput::Starved), [Action::KillTarget]);
}
