//! What a guest does by itself in the middle of its migration: it reboots, powers itself off, or panics.

use whimbrel_api::agent::OutgoingEnd;
use whimbrel_api::migration::{PostcopyBegin, Stay};
use whimbrel_api::vm::VmState;

use crate::pair::{Pair, Try, Way, with_pair_of};
use crate::place::{Life, Place, eventually, start, state};
use crate::postcopy::{ENDLESS, postcopy};

const VERSIONS: [(&str, &str); 2] = [("7.2", "7.2"), ("10.0", "10.0")];

fn begin(pair: &Pair, a: &Life, faults: &str, way: Way) -> Try {
    let one = pair.try_to_move(pair.vm_on(a), a);
    pair.a.faults(faults);
    pair.calls.block_on(pair.begin_by(&one, &pair.a, &pair.b, way));
    one
}

fn becomes(pair: &Pair, one: &Try, at: &Life, wanted: impl Fn(&VmState) -> bool) {
    pair.calls.block_on(eventually(async || {
        at.host.vms.report(one.vm).is_ok_and(|report| wanted(&report.state))
    }));
}

/// Nothing of the migration is left, and what is left of the VM can be started and moved.
fn starts_and_moves_then(
    pair: &Pair,
    one: &Try,
    (from, a): (&Place, &Life),
    (to, b): (&Place, &Life),
) {
    from.faults("");
    to.faults("");
    pair.assert_clean(from, a);
    pair.assert_clean(to, b);
    pair.calls.block_on(start(&a.host, one.vm));
    pair.move_it(one.vm, (from, a), to);
    pair.assert_runs_on(one.vm, b);
}

#[test]
fn a_guest_that_reboots_moves() {
    for versions in VERSIONS {
        with_pair_of(versions, |pair, a, b| {
            let one = begin(pair, &a, "copying-ms=200 reset:copying", Way::default());
            assert_eq!(pair.calls.block_on(pair.end(&one, &pair.a)), OutgoingEnd::Moved);
            pair.assert_runs_on(one.vm, &b);
        });
    }
}

#[test]
fn a_guest_that_powers_itself_off_stays_and_is_stopped() {
    let stages = ["copying", "pre-switchover", "device", "completed"];
    for (versions, stage) in VERSIONS.into_iter().flat_map(|v| stages.map(|stage| (v, stage))) {
        with_pair_of(versions, move |pair, a, b| {
            let one = begin(pair, &a, &format!("power-off:{stage}"), Way::default());
            let end = pair.calls.block_on(pair.end(&one, &pair.a));
            assert_eq!(end, OutgoingEnd::Stayed { why: Stay::GuestPoweredOff }, "{stage}");
            pair.settle(&one, &pair.b);
            becomes(pair, &one, &a, |state| *state == VmState::Stopped);
            starts_and_moves_then(pair, &one, (&pair.a, &a), (&pair.b, &b));
        });
    }
}

#[test]
fn a_guest_that_panics_stays_and_has_crashed() {
    for (versions, stage) in VERSIONS.into_iter().flat_map(|v| ["copying"].map(|stage| (v, stage)))
    {
        with_pair_of(versions, move |pair, a, b| {
            let one = begin(pair, &a, &format!("panic:{stage}"), Way::default());
            let end = pair.calls.block_on(pair.end(&one, &pair.a));
            let told = |why: &Stay| matches!(why, Stay::Failed { message, .. } if message.contains("panicked"));
            assert!(matches!(&end, OutgoingEnd::Stayed { why } if told(why)), "{end:?}");
            pair.settle(&one, &pair.b);
            becomes(
                pair,
                &one,
                &a,
                |state| matches!(state, VmState::Crashed { why } if why.contains("panicked")),
            );
            starts_and_moves_then(pair, &one, (&pair.a, &a), (&pair.b, &b));
        });
    }
}

#[test]
fn a_guest_that_is_off_before_postcopy_has_it_stays() {
    for (versions, stage) in
        VERSIONS.into_iter().flat_map(|v| ["copying", "pre-switchover", "device"].map(|s| (v, s)))
    {
        with_pair_of(versions, move |pair, a, b| {
            let faults = format!("{ENDLESS} dirty-sync-count=2 power-off:{stage}");
            let one = begin(pair, &a, &faults, postcopy(PostcopyBegin::AfterFirstPass));
            let end = pair.calls.block_on(pair.end(&one, &pair.a));
            assert_eq!(end, OutgoingEnd::Stayed { why: Stay::GuestPoweredOff }, "{stage}");
            pair.settle(&one, &pair.b);
            becomes(pair, &one, &a, |state| *state == VmState::Stopped);
            starts_and_moves_then(pair, &one, (&pair.a, &a), (&pair.b, &b));
        });
    }
}

#[test]
fn what_a_guest_does_while_its_memory_follows_is_its_new_hosts_matter() {
    for versions in VERSIONS {
        for deed in ["reset", "power-off", "panic"] {
            with_pair_of(versions, move |pair, a, b| {
                let vm = pair.vm_on(&a);
                let one = pair.calls.block_on(pair.serving(vm, &a));
                pair.b.faults(&format!("{deed}:postcopy"));
                let migration = one.id;
                std::thread::sleep(std::time::Duration::from_millis(100));
                assert_eq!(state(&b.host, vm), VmState::Migrating { migration }, "{deed}");
                pair.a.faults("");
                assert_eq!(pair.calls.block_on(pair.end(&one, &pair.a)), OutgoingEnd::Moved);
                becomes(pair, &one, &b, |state| match deed {
                    "reset" => *state == VmState::Running,
                    "power-off" => *state == VmState::Stopped,
                    _ => matches!(state, VmState::Crashed { why } if why.contains("panicked")),
                });
                pair.assert_clean(&pair.a, &a);
            });
        }
    }
}
