//! A destination that never returns, and the VM that an operator takes back from it.

use whimbrel_api::agent::{OutgoingEnd, Superseded};
use whimbrel_api::migration::{ReclaimRequest, Statement, Stay};
use whimbrel_api::vm::VmState;
use whimbrel_api::{ErrorCode, Phase, VmId};
use whimbrel_migration::handoff::Standing;

use crate::pair::{Pair, Try, with_pair};
use crate::place::{Life, eventually, kill, start, state};

const STATEMENT: Statement = Statement::AcceptDataLoss;
const WORD: ReclaimRequest = ReclaimRequest { statement: STATEMENT };

/// A migration whose destination has written that it owns the VM, and nobody has heard of it.
fn in_doubt(pair: &Pair, vm: VmId, (a, b): (&Life, &Life)) -> Try {
    let one = pair.try_to_move(vm, a);
    pair.b.faults("stall:cont");
    pair.calls.block_on(async {
        pair.begin(&one, &pair.a, &pair.b).await;
        eventually(async || matches!(state(&a.host, vm), VmState::Unresolved { .. })).await;
        let word = b.host.ledger.current(vm).await.unwrap().unwrap();
        assert_eq!(word.standing, Standing::Owned);
    });
    one
}

async fn take_back(pair: &Pair, one: &Try, a: &Life) {
    pair.a.failpoints("source.reclaim-waits=error");
    pair.client(&pair.a).reclaim_outgoing(one.id, &WORD).await.unwrap();
    let why = Stay::Reclaimed { statement: STATEMENT };
    assert_eq!(pair.end(one, &pair.a).await, OutgoingEnd::Stayed { why });
    eventually(async || matches!(state(&a.host, one.vm), VmState::Crashed { .. })).await;
    let word = a.host.ledger.current(one.vm).await.unwrap().unwrap();
    assert_eq!((word.standing, word.epoch), (Standing::Owned, one.epoch.next()));
}

fn superseded(pair: &Pair, one: &Try) -> Superseded {
    let owner = pair.a.config.name.clone();
    Superseded { vm: one.vm, epoch: one.epoch.next(), owner }
}

#[test]
fn a_vm_taken_back_starts_where_it_was_and_never_where_it_went() {
    with_pair(|pair, a, b| {
        let vm = pair.vm_on(&a);
        let one = in_doubt(pair, vm, (&a, &b));
        pair.calls.block_on(async {
            let refused = pair.client(&pair.a).reclaim_outgoing(one.id, &WORD).await.unwrap_err();
            assert_eq!(refused.code, ErrorCode::Busy, "it was heard of a moment ago: {refused}");
        });
        // Its power is cut.
        b.kill();
        pair.b.processes().into_iter().for_each(kill);
        pair.calls.block_on(async {
            take_back(pair, &one, &a).await;
            assert_eq!(start(&a.host, vm).await.state, VmState::Running);
        });

        pair.b.faults("");
        let b = pair.b.live();
        pair.calls.block_on(async {
            let there = pair.client(&pair.b);
            eventually(async || !matches!(state(&b.host, vm), VmState::Unknown { .. })).await;
            assert!(!matches!(state(&b.host, vm), VmState::Running), "{:?}", state(&b.host, vm));
            let again = pair.try_to_move(vm, &a);
            let refused = pair.prepare(&again, &pair.a, &pair.b).await.unwrap_err();
            assert_eq!(refused.code, ErrorCode::Exists, "it does not know yet: {refused}");

            for _ in 0..2 {
                let told = there.superseded(one.id, &superseded(pair, &one)).await.unwrap();
                assert!(!told.guest_was_there);
            }
            assert!(b.host.vms.report(vm).is_err(), "forgotten");
            there.delete_incoming(one.id).await.unwrap();
        });
        pair.assert_clean(&pair.b, &b);
        let there = pair.move_it(vm, (&pair.a, &a), &pair.b);
        pair.assert_runs_on(vm, &b);
        pair.assert_clean(&pair.a, &a);
        pair.calls.block_on(async {
            let late = pair.client(&pair.b).superseded(one.id, &superseded(pair, &one)).await;
            assert!(!late.unwrap().guest_was_there, "it is the owner again");
            let over = pair.client(&pair.a).reclaim_outgoing(there.id, &WORD).await.unwrap_err();
            assert_eq!(over.code, ErrorCode::WrongState, "{over}");
        });
        pair.assert_runs_on(vm, &b);
    });
}

#[test]
fn a_guest_that_was_there_against_the_word_is_ended() {
    with_pair(|pair, a, b| {
        let vm = pair.vm_on(&a);
        let one = in_doubt(pair, vm, (&a, &b));
        // Only its agent is away: its QEMU has the guest, and goes on with it.
        b.kill();
        pair.calls.block_on(take_back(pair, &one, &a));
        pair.b.faults("");
        let b = pair.b.live();
        pair.assert_runs_on(vm, &b);
        pair.calls.block_on(async {
            let told = pair.client(&pair.b).superseded(one.id, &superseded(pair, &one)).await;
            assert!(told.unwrap().guest_was_there);
        });
        pair.assert_clean(&pair.b, &b);
        pair.calls.block_on(start(&a.host, vm));
        pair.assert_runs_on(vm, &a);
    });
}

#[test]
fn before_the_handoff_nothing_is_taken_back() {
    with_pair(|pair, a, b| {
        let vm = pair.vm_on(&a);
        pair.a.failpoints("source.reclaim-waits=error");
        pair.a.faults("stall:copying");
        let one = pair.try_to_move(vm, &a);
        pair.calls.block_on(async {
            pair.begin(&one, &pair.a, &pair.b).await;
            pair.phase(&one, &pair.a, Phase::Precopy).await;
            let refused = pair.client(&pair.a).reclaim_outgoing(one.id, &WORD).await.unwrap_err();
            assert_eq!(refused.code, ErrorCode::WrongState, "{refused}");
            pair.a.faults("");
            assert_eq!(pair.end(&one, &pair.a).await, OutgoingEnd::Moved);
        });
        pair.assert_runs_on(vm, &b);
    });
}
