//! The handoff explored: no invariant fails, and with any one rule removed the named one does.
//!
//! Small bounds here, so that the test stays short; `cargo run -p whimbrel-migration --release
//! --example explore` goes further.

mod checker;

use checker::{ALL_BUGS, Copies, Handoff, Operator};
use stateright::{Checker, HasDiscoveries, Model};

const THREADS: usize = 2;

#[test]
fn no_invariant_fails_there_and_back() {
    let checker = Handoff::new(2, 1, None).checker().threads(THREADS).spawn_bfs().join();
    checker.assert_properties();
    assert!(checker.unique_state_count() > 100_000, "the model has shrunk to nothing");
}

#[test]
fn no_invariant_fails_when_answers_come_last() {
    let model = Handoff { answers_first: false, ..Handoff::new(2, 0, None) };
    model.checker().threads(THREADS).spawn_bfs().join().assert_properties();
}

#[test]
fn no_invariant_fails_in_post_copy() {
    for (tries, faults, answers_first) in [(2, 0, true), (1, 1, true), (1, 1, false)] {
        let model = Handoff { answers_first, ..Handoff::postcopy(tries, faults, None) };
        let checker = model.checker().threads(THREADS).spawn_bfs().join();
        checker.assert_properties();
        assert!(checker.unique_state_count() > 30_000, "the model has shrunk to nothing");
    }
}

#[test]
fn no_invariant_fails_with_disks_that_are_copied() {
    let (precopy, postcopy) = (Copies::Precopy, Copies::Postcopy);
    for (copies, operator, tries, faults) in [
        (precopy, Operator::Absent, 2, 0),
        (precopy, Operator::Absent, 1, 2),
        (postcopy, Operator::Absent, 1, 1),
        (postcopy, Operator::Truthful, 1, 1),
        (precopy, Operator::Lying, 1, 1),
    ] {
        let model = Handoff { copies, operator, ..Handoff::disks(tries, faults, None) };
        let checker = model.checker().threads(THREADS).spawn_bfs().join();
        checker.assert_properties();
        assert!(checker.unique_state_count() > 5_000, "the model has shrunk to nothing");
    }
}

#[test]
fn a_source_that_is_told_of_no_disks_keeps_the_vm() {
    let model = Handoff { unaware: true, ..Handoff::disks(1, 1, None) };
    let checker = model.checker().threads(THREADS).spawn_bfs().join();
    for property in checker.model().properties() {
        let found = checker.discovery(property.name);
        let failed = found.is_some() && property.expectation == stateright::Expectation::Always;
        assert!(!failed, "{}: {found:?}", property.name);
    }
}

#[test]
fn no_invariant_fails_when_an_operator_takes_a_vm_back() {
    for (operator, copies) in
        [(Operator::Truthful, Copies::Postcopy), (Operator::Lying, Copies::Postcopy)]
    {
        let model = Handoff { operator, copies, ..Handoff::new(1, 1, None) };
        let checker = model.checker().threads(THREADS).spawn_bfs().join();
        checker.assert_properties();
        assert!(checker.unique_state_count() > 20_000, "the model has shrunk to nothing");
    }
}

#[test]
fn every_planted_bug_is_caught_by_its_invariant() {
    for bug in ALL_BUGS {
        let model = bug.model();
        if model.tries > 1 && model.faults > 0 {
            // They take their time: `make model` catches them.
            continue;
        }
        let wanted = bug.caught_by();
        let checker = bug
            .model()
            .checker()
            .threads(THREADS)
            .finish_when(HasDiscoveries::AnyOf([wanted].into()))
            .spawn_bfs()
            .join();
        let found = checker.discoveries();
        assert!(found.contains_key(wanted), "{bug:?} ({}) is not caught by {wanted}", bug.what());
    }
}
