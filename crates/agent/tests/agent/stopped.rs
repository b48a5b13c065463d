//! VMs that stand still when they move: stopped ones, of which only the definition goes, and paused ones.

use std::sync::Arc;

use whimbrel_api::agent::{IncomingReport, OutgoingEnd};
use whimbrel_api::migration::{MigrateOptions, Mode, Stay, Strategy};
use whimbrel_api::vm::{VmAction, VmState};
use whimbrel_api::{Epoch, ErrorCode, Phase, VmId};
use whimbrel_migration::handoff::{Intent, Standing};

use crate::pair::{Pair, Try, Way, with_pair, with_pair_of};
use crate::place::{Life, Place, definition, eventually, start, state};

const VERSIONS: [(&str, &str); 2] = [("7.2", "7.2"), ("10.0", "10.0")];

fn offline() -> Way {
    let options = MigrateOptions { mode: Mode::Offline, ..MigrateOptions::default() };
    Way { options, ..Way::default() }
}

fn suspended() -> Way {
    let options = MigrateOptions { suspend: true, ..MigrateOptions::default() };
    Way { options, ..Way::default() }
}

/// A VM that has never run.
fn stopped_on(pair: &Pair, life: &Life) -> VmId {
    let host = Arc::clone(&life.host);
    let made = life.spawn(async move { whimbrel_agent::vm::create(&host, definition()).await });
    pair.calls.block_on(made).unwrap().definition.id
}

fn move_by(pair: &Pair, vm: VmId, (from, life): (&Place, &Life), to: &Place, way: Way) -> Try {
    let one = pair.try_to_move(vm, life);
    pair.calls.block_on(async {
        pair.begin_by(&one, from, to, way).await;
        assert_eq!(pair.end(&one, from).await, OutgoingEnd::Moved);
    });
    one
}

fn start_on(pair: &Pair, vm: VmId, life: &Life) {
    let host = Arc::clone(&life.host);
    pair.calls.block_on(life.spawn(async move { start(&host, vm).await }));
}

fn stop_on(pair: &Pair, vm: VmId, life: &Life) {
    let host = Arc::clone(&life.host);
    let stopped = life.spawn(async move { host.vms.act(vm, VmAction::Stop, true).await });
    assert_eq!(pair.calls.block_on(stopped).unwrap().state, VmState::Stopped);
}

fn standing(pair: &Pair, vm: VmId, life: &Life) -> Standing {
    pair.calls.block_on(life.host.ledger.current(vm)).unwrap().unwrap().standing
}

/// The VM is stopped on one host, no other has it, and it can be started there.
fn assert_stopped_and_startable(pair: &Pair, vm: VmId, at: &Life, other: &Life) {
    pair.calls.block_on(eventually(async || {
        at.host.vms.report(vm).is_ok_and(|report| report.state == VmState::Stopped)
    }));
    assert!(!other.host.vms.has(vm));
    start_on(pair, vm, at);
    stop_on(pair, vm, at);
}

#[test]
fn a_stopped_vm_moves_there_and_back_and_starts_only_where_it_is() {
    with_pair(|pair, a, b| {
        let vm = stopped_on(pair, &a);
        let there = move_by(pair, vm, (&pair.a, &a), &pair.b, offline());
        assert_stopped_and_startable(pair, vm, &b, &a);
        assert_eq!(b.host.vms.report(vm).unwrap().epoch, Epoch(2));
        let reported = pair.calls.block_on(pair.client(&pair.b).incoming(there.id)).unwrap();
        assert_eq!(reported, IncomingReport::Owned { epoch: Epoch(2), vm: VmState::Stopped });
        let not_there = pair.calls.block_on(pair.client(&pair.a).vm_action(vm, VmAction::Start));
        assert_eq!(not_there.unwrap_err().code, ErrorCode::NotFound);

        move_by(pair, vm, (&pair.b, &b), &pair.a, offline());
        assert_stopped_and_startable(pair, vm, &a, &b);
        assert_eq!(a.host.vms.report(vm).unwrap().epoch, Epoch(3));
        pair.assert_clean(&pair.a, &a);
        pair.assert_clean(&pair.b, &b);
    });
}

#[test]
fn a_stopped_vm_is_there_after_a_restart_of_its_new_host() {
    with_pair(|pair, a, b| {
        let vm = stopped_on(pair, &a);
        let options = MigrateOptions { dname: "web02".parse().ok(), ..offline().options };
        move_by(pair, vm, (&pair.a, &a), &pair.b, Way { options, ..offline() });
        b.kill();
        let b = pair.b.live();
        assert_eq!(b.host.vms.report(vm).unwrap().definition.name.as_str(), "web02");
        assert_stopped_and_startable(pair, vm, &b, &a);
    });
}

#[test]
fn a_running_vm_does_not_move_offline_and_a_stopped_one_not_live() {
    with_pair(|pair, a, _b| {
        let vm = pair.vm_on(&a);
        let refused = |way: Way| {
            let one = pair.try_to_move(vm, &a);
            pair.calls.block_on(async {
                let offer = pair.prepare_for(&one, &pair.a, &pair.b, &way).await.unwrap();
                let told = pair.send_by(&one, &pair.a, &pair.b, offer, way).await.unwrap_err();
                assert_eq!(told.code, ErrorCode::WrongState, "{told}");
                pair.client(&pair.b).delete_incoming(one.id).await.unwrap();
            });
        };
        refused(offline());
        assert_eq!(state(&a.host, vm), VmState::Running);
        stop_on(pair, vm, &a);
        refused(Way::default());
        assert_eq!(state(&a.host, vm), VmState::Stopped);
    });
}

#[test]
fn a_stopped_vm_stays_where_the_new_host_dies_before_it_is_given_away() {
    with_pair(|pair, a, b| {
        let vm = stopped_on(pair, &a);
        pair.a.failpoints("source.before-release=stall");
        let one = pair.try_to_move(vm, &a);
        pair.calls.block_on(async {
            pair.begin_by(&one, &pair.a, &pair.b, offline()).await;
            pair.phase(&one, &pair.a, Phase::Switchover).await;
        });
        let told = pair.calls.block_on(pair.client(&pair.a).vm_action(vm, VmAction::Start));
        assert_eq!(told.unwrap_err().code, ErrorCode::Migrating);
        b.kill();
        let b = pair.b.live();
        pair.a.failpoints("");
        let end = pair.calls.block_on(pair.end(&one, &pair.a));
        assert!(matches!(end, OutgoingEnd::Stayed { .. }), "{end:?}");
        pair.settle(&one, &pair.b);
        assert!(matches!(standing(pair, vm, &b), Standing::Refused { .. }));
        assert_stopped_and_startable(pair, vm, &a, &b);
        move_by(pair, vm, (&pair.a, &a), &pair.b, offline());
        assert_stopped_and_startable(pair, vm, &b, &a);
    });
}

#[test]
fn a_stopped_vm_stays_where_its_host_dies_before_the_release() {
    with_pair(|pair, a, b| {
        let vm = stopped_on(pair, &a);
        pair.a.failpoints("source.before-release=stall");
        let one = pair.try_to_move(vm, &a);
        pair.calls.block_on(async {
            pair.begin_by(&one, &pair.a, &pair.b, offline()).await;
            pair.phase(&one, &pair.a, Phase::Switchover).await;
        });
        a.kill();
        pair.a.failpoints("");
        let a = pair.a.live();
        let end = pair.calls.block_on(pair.end(&one, &pair.a));
        assert!(matches!(end, OutgoingEnd::Stayed { .. }), "{end:?}");
        pair.settle(&one, &pair.b);
        assert_stopped_and_startable(pair, vm, &a, &b);
        move_by(pair, vm, (&pair.a, &a), &pair.b, offline());
        assert_stopped_and_startable(pair, vm, &b, &a);
    });
}

#[test]
fn a_stopped_vm_arrives_although_its_host_dies_after_the_release() {
    with_pair(|pair, a, b| {
        let vm = stopped_on(pair, &a);
        // The destination cannot write that it owns the VM, so the source asks again and again.
        let one = pair.try_to_move(vm, &a);
        pair.a.failpoints("source.before-release=stall");
        pair.calls.block_on(async {
            pair.begin_by(&one, &pair.a, &pair.b, offline()).await;
            pair.phase(&one, &pair.a, Phase::Switchover).await;
        });
        pair.b.failpoints("ledger.persist=error");
        pair.a.failpoints("");
        pair.calls.block_on(eventually(async || {
            matches!(
                a.host.ledger.current(vm).await.unwrap().unwrap().standing,
                Standing::Released { .. }
            )
        }));
        a.kill();
        let a = pair.a.live();
        assert!(matches!(standing(pair, vm, &b), Standing::Expected { .. }));
        pair.b.failpoints("");
        assert_eq!(pair.calls.block_on(pair.end(&one, &pair.a)), OutgoingEnd::Moved);
        assert_stopped_and_startable(pair, vm, &b, &a);
    });
}

#[test]
fn a_stopped_vm_that_was_released_comes_home_where_the_new_host_forgot_it() {
    with_pair(|pair, a, b| {
        let vm = stopped_on(pair, &a);
        let one = pair.try_to_move(vm, &a);
        pair.a.failpoints("source.before-release=stall");
        pair.calls.block_on(async {
            pair.begin_by(&one, &pair.a, &pair.b, offline()).await;
            pair.phase(&one, &pair.a, Phase::Switchover).await;
        });
        pair.b.failpoints("ledger.persist=error");
        pair.a.failpoints("");
        pair.calls.block_on(eventually(async || {
            matches!(
                a.host.ledger.current(vm).await.unwrap().unwrap().standing,
                Standing::Released { .. }
            )
        }));
        // It dies in between: what it was ready for is refused, for ever.
        b.kill();
        pair.b.failpoints("");
        let b = pair.b.live();
        let end = pair.calls.block_on(pair.end(&one, &pair.a));
        assert!(
            matches!(&end, OutgoingEnd::Stayed { why: Stay::DestinationRefused { .. } }),
            "{end:?}"
        );
        assert_stopped_and_startable(pair, vm, &a, &b);
        pair.settle(&one, &pair.b);
        move_by(pair, vm, (&pair.a, &a), &pair.b, offline());
        assert_stopped_and_startable(pair, vm, &b, &a);
    });
}

#[test]
fn a_paused_vm_arrives_paused_and_so_does_one_that_is_to() {
    for versions in VERSIONS {
        with_pair_of(versions, |pair, a, b| {
            let vm = pair.vm_on(&a);
            move_by(pair, vm, (&pair.a, &a), &pair.b, suspended());
            let arrived = |life: &Life| {
                pair.calls.block_on(eventually(async || {
                    life.host.vms.report(vm).is_ok_and(|report| report.state == VmState::Paused)
                }));
                let word = pair.calls.block_on(life.host.ledger.current(vm)).unwrap().unwrap();
                assert_eq!((word.standing, word.intent), (Standing::Owned, Intent::Pause));
            };
            arrived(&b);
            // Paused by its user now, as it were: it stays so, stopped first or not.
            move_by(pair, vm, (&pair.b, &b), &pair.a, Way::default());
            arrived(&a);
            let stop_first = Strategy { stop_first: true, ..Strategy::plain(300) };
            let static_way = || Way { strategy: stop_first.clone(), ..Way::default() };
            move_by(pair, vm, (&pair.a, &a), &pair.b, static_way());
            arrived(&b);
            pair.calls.block_on(pair.client(&pair.b).vm_action(vm, VmAction::Resume)).unwrap();
            move_by(pair, vm, (&pair.b, &b), &pair.a, static_way());
            pair.assert_runs_on(vm, &a);
        });
    }
}

#[test]
fn a_vm_that_was_to_arrive_paused_and_stays_runs_on() {
    with_pair(|pair, a, b| {
        let vm = pair.vm_on(&a);
        let one = pair.try_to_move(vm, &a);
        pair.a.failpoints("source.before-release=error");
        pair.calls.block_on(async {
            pair.begin_by(&one, &pair.a, &pair.b, suspended()).await;
            let end = pair.end(&one, &pair.a).await;
            assert!(matches!(end, OutgoingEnd::Stayed { .. }), "{end:?}");
        });
        pair.a.failpoints("");
        pair.assert_runs_on(vm, &a);
        assert!(!b.host.vms.has(vm));
    });
}

#[test]
fn a_vm_leaves_its_definition_where_that_is_asked_for_and_only_a_definition() {
    with_pair(|pair, a, b| {
        let vm = pair.vm_on(&a);
        let left = pair.a.config.dir.join(format!("kept/{vm}.json"));
        let copy = || {
            let options = MigrateOptions { copy: true, ..MigrateOptions::default() };
            Way { options, ..Way::default() }
        };
        pair.a.failpoints("source.before-release=error");
        let one = pair.try_to_move(vm, &a);
        pair.calls.block_on(async {
            pair.begin_by(&one, &pair.a, &pair.b, copy()).await;
            assert!(left.exists());
            let end = pair.end(&one, &pair.a).await;
            assert!(matches!(end, OutgoingEnd::Stayed { .. }), "{end:?}");
        });
        assert!(!left.exists(), "it has not left");
        pair.a.failpoints("");

        move_by(pair, vm, (&pair.a, &a), &pair.b, copy());
        let kept = std::fs::read_to_string(&left).unwrap();
        let kept: whimbrel_api::vm::VmDefinition = serde_json::from_str(&kept).unwrap();
        assert_eq!(kept, b.host.vms.report(vm).unwrap().definition);
        assert!(!a.host.vms.has(vm));
        a.kill();
        let a = pair.a.live();
        assert!(left.exists() && !a.host.vms.has(vm));

        move_by(pair, vm, (&pair.b, &b), &pair.a, Way::default());
        assert!(!left.exists(), "the VM itself is back");
    });
}
