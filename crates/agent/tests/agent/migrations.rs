//! Two agents pass a VM from one fake QEMU to another, by a plain copy.

use std::time::Duration;

use whimbrel_agent::ledger::{MigrationRow, Side};
use whimbrel_api::agent::{
    Handoff, IncomingReport, IncomingRequest, KnockConnect, KnockListen, OutgoingEnd, Reach,
    Receive,
};
use whimbrel_api::migration::Stay;
use whimbrel_api::vm::{VmAction, VmState};
use whimbrel_api::{Epoch, ErrorCode, Phase, VmId};
use whimbrel_migration::handoff::{Body, Claim, Message, Standing};

use crate::pair::{Try, with_pair};
use crate::place::{PATIENCE, eventually, state};

#[test]
fn a_vm_moves_there_and_back_and_there_again() {
    with_pair(|pair, a, b| {
        let vm = pair.vm_on(&a);
        let disk = pair.pool.dir().join(format!("storage/vms/{vm}/vda.qcow2"));
        for round in 0..3 {
            let there = pair.move_it(vm, (&pair.a, &a), &pair.b);
            pair.assert_runs_on(vm, &b);
            assert_eq!(b.host.vms.report(vm).unwrap().epoch, Epoch(2 + 2 * round));
            assert!(a.host.vms.report(vm).is_err());
            pair.assert_clean(&pair.a, &a);
            let reported = pair.calls.block_on(pair.client(&pair.b).incoming(there.id)).unwrap();
            assert!(matches!(reported, IncomingReport::Owned { .. }), "{reported:?}");
            let back = pair.move_it(vm, (&pair.b, &b), &pair.a);
            pair.assert_runs_on(vm, &a);
            pair.assert_clean(&pair.b, &b);
            pair.calls.block_on(async {
                pair.client(&pair.a).delete_outgoing(there.id).await.unwrap();
                pair.client(&pair.b).delete_outgoing(back.id).await.unwrap();
            });
            assert!(disk.exists());
        }
    });
}

#[test]
fn a_paused_vm_arrives_paused() {
    with_pair(|pair, a, b| {
        let vm = pair.vm_on(&a);
        pair.calls.block_on(a.host.vms.act(vm, VmAction::Pause, false)).unwrap();
        pair.move_it(vm, (&pair.a, &a), &pair.b);
        pair.calls.block_on(eventually(async || b.host.vms.report(vm).is_ok()));
        assert_eq!(state(&b.host, vm), VmState::Paused);
        pair.assert_clean(&pair.a, &a);

        // And back: kept here by a cancel at first, which leaves QEMU 7.2 unwilling to send it.
        let one = pair.try_to_move(vm, &b);
        pair.calls.block_on(async {
            pair.b.faults("stall:pre-switchover");
            pair.begin(&one, &pair.b, &pair.a).await;
            pair.phase(&one, &pair.b, Phase::Switchover).await;
            pair.client(&pair.b).cancel_outgoing(one.id).await.unwrap();
            let end = pair.end(&one, &pair.b).await;
            assert_eq!(end, OutgoingEnd::Stayed { why: Stay::Cancelled });
        });
        pair.b.faults("");
        pair.settle(&one, &pair.a);
        assert_eq!(state(&b.host, vm), VmState::Paused);
        pair.move_it(vm, (&pair.b, &b), &pair.a);
        pair.calls.block_on(eventually(async || a.host.vms.report(vm).is_ok()));
        let resumed = pair.calls.block_on(a.host.vms.act(vm, VmAction::Resume, false)).unwrap();
        assert_eq!(resumed.state, VmState::Running);
        pair.assert_clean(&pair.b, &b);
    });
}

#[test]
fn a_destination_that_is_silent_in_the_handshake_does_not_hold_the_guest() {
    with_pair(|pair, a, b| {
        let vm = pair.vm_on(&a);
        let one = pair.try_to_move(vm, &a);
        pair.calls.block_on(async {
            let mut offer = pair.prepare(&one, &pair.a, &pair.b).await.unwrap();
            // As if the QEMU there had been stopped: the kernel still lets clients connect.
            let silent = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
            offer.address = silent.local_addr().unwrap();
            pair.send(&one, &pair.a, &pair.b, offer).await.unwrap();
            let ended = tokio::time::timeout(PATIENCE / 3, pair.end(&one, &pair.a)).await;
            assert!(matches!(ended.unwrap(), OutgoingEnd::Stayed { .. }));
        });
        pair.settle(&one, &pair.b);
        pair.assert_runs_on(vm, &a);
        pair.assert_clean(&pair.b, &b);
        pair.move_it(vm, (&pair.a, &a), &pair.b);
    });
}

#[test]
fn a_sleeping_guest_is_left_to_sleep_when_it_stays() {
    with_pair(|pair, a, b| {
        let vm = pair.vm_on(&a);
        pair.a.faults("stall:copying,sleep:guest");
        let one = pair.try_to_move(vm, &a);
        pair.calls.block_on(async {
            pair.begin(&one, &pair.a, &pair.b).await;
            pair.phase(&one, &pair.a, Phase::Precopy).await;
            pair.client(&pair.a).cancel_outgoing(one.id).await.unwrap();
            let end = pair.end(&one, &pair.a).await;
            assert_eq!(end, OutgoingEnd::Stayed { why: Stay::Cancelled });
        });
        pair.settle(&one, &pair.b);
        pair.assert_runs_on(vm, &a);
        pair.assert_clean(&pair.b, &b);
    });
}

#[test]
fn a_host_that_a_vm_comes_back_to_forgets_what_it_was_there() {
    with_pair(|pair, a, b| {
        let vm = pair.vm_on(&a);
        pair.move_it(vm, (&pair.a, &a), &pair.b);
        pair.assert_clean(&pair.a, &a);
        // As if the VM's row had outlived its move.
        let definition = b.host.vms.report(vm).unwrap().definition;
        let back = pair.try_to_move(vm, &b);
        pair.calls.block_on(async {
            a.host.ledger.set_running(&definition, "an-old-run").await.unwrap();
            pair.prepare(&back, &pair.b, &pair.a).await.unwrap();
            assert_eq!(a.host.ledger.vms().await.unwrap(), []);
        });
        pair.settle(&back, &pair.a);
        pair.move_it(vm, (&pair.b, &b), &pair.a);
        pair.assert_runs_on(vm, &a);
    });
}

#[test]
fn a_port_that_somebody_else_listens_on_by_now_keeps_no_guest_waiting() {
    with_pair(|pair, a, b| {
        let vm = pair.vm_on(&a);
        let one = pair.try_to_move(vm, &a);
        pair.calls.block_on(async {
            let offer = pair.prepare(&one, &pair.a, &pair.b).await.unwrap();
            let address = offer.address;
            pair.a.faults("stall:copying");
            pair.send(&one, &pair.a, &pair.b, offer).await.unwrap();
            // As the next QEMU that waits for a guest does, once the first has its stream.
            let mut next = None;
            eventually(async || {
                next = std::net::TcpListener::bind(address).ok();
                next.is_some()
            })
            .await;
            pair.a.faults("");
            assert_eq!(pair.end(&one, &pair.a).await, OutgoingEnd::Moved);
        });
        pair.assert_runs_on(vm, &b);
        pair.assert_clean(&pair.a, &a);
    });
}

#[test]
fn a_cancelled_vm_stays_and_the_next_try_moves_it() {
    with_pair(|pair, a, b| {
        let vm = pair.vm_on(&a);
        pair.a.faults("stall:copying");
        let one = pair.try_to_move(vm, &a);
        pair.calls.block_on(async {
            pair.begin(&one, &pair.a, &pair.b).await;
            pair.phase(&one, &pair.a, Phase::Precopy).await;
            let refused = a.host.vms.act(vm, VmAction::Stop, true).await.unwrap_err();
            assert_eq!(refused.code, ErrorCode::Migrating);
            pair.a.faults("");
            pair.client(&pair.a).cancel_outgoing(one.id).await.unwrap();
            let end = pair.end(&one, &pair.a).await;
            assert_eq!(end, OutgoingEnd::Stayed { why: Stay::Cancelled });
            // Too late is told, and changes nothing.
            let _ = pair.client(&pair.a).cancel_outgoing(one.id).await;
        });
        pair.settle(&one, &pair.b);
        pair.assert_runs_on(vm, &a);
        pair.assert_clean(&pair.b, &b);
        pair.move_it(vm, (&pair.a, &a), &pair.b);
        pair.assert_runs_on(vm, &b);
        pair.assert_clean(&pair.a, &a);
    });
}

#[test]
fn a_source_that_stays_tells_the_destination_itself() {
    with_pair(|pair, a, b| {
        let vm = pair.vm_on(&a);
        // The destination's QEMU does not notice that its source has gone away.
        pair.b.faults("stall:accepted");
        let one = pair.try_to_move(vm, &a);
        pair.calls.block_on(async {
            pair.begin(&one, &pair.a, &pair.b).await;
            pair.phase(&one, &pair.a, Phase::Switchover).await;
            pair.client(&pair.a).cancel_outgoing(one.id).await.unwrap();
            assert!(matches!(pair.end(&one, &pair.a).await, OutgoingEnd::Stayed { .. }));
            // Without the controller's word, and long before the lease ends.
            let told = eventually(async || {
                let report = pair.client(&pair.b).incoming(one.id).await.unwrap();
                matches!(report, IncomingReport::Refused { .. })
            });
            tokio::time::timeout(PATIENCE / 3, told).await.expect("the destination is told");
        });
        pair.assert_runs_on(vm, &a);
        pair.assert_clean(&pair.b, &b);
    });
}

#[test]
fn a_release_that_cannot_be_written_and_nobody_answers_is_told() {
    with_pair(|pair, a, b| {
        let vm = pair.vm_on(&a);
        pair.a.failpoints("source.before-release=stall");
        let one = pair.try_to_move(vm, &a);
        pair.calls.block_on(async {
            pair.begin(&one, &pair.a, &pair.b).await;
            pair.phase(&one, &pair.a, Phase::Switchover).await;
            tokio::time::sleep(Duration::from_millis(300)).await;
        });
        b.kill();
        pair.a.failpoints("source.before-release=error;ledger.persist=error");
        pair.calls.block_on(eventually(async || {
            matches!(state(&a.host, vm), VmState::Unresolved { .. })
        }));
        pair.a.failpoints("");
        let end = pair.calls.block_on(pair.end(&one, &pair.a));
        assert!(matches!(end, OutgoingEnd::Stayed { .. }), "{end:?}");
        pair.assert_runs_on(vm, &a);
        let b = pair.b.live();
        pair.settle(&one, &pair.b);
        pair.assert_clean(&pair.b, &b);
        pair.move_it(vm, (&pair.a, &a), &pair.b);
    });
}

#[test]
fn a_ledger_that_hangs_at_the_source_is_told_and_waited_for() {
    with_pair(|pair, a, b| {
        let vm = pair.vm_on(&a);
        pair.a.faults("stall:copying");
        let one = pair.try_to_move(vm, &a);
        pair.calls.block_on(async {
            pair.begin(&one, &pair.a, &pair.b).await;
            pair.phase(&one, &pair.a, Phase::Precopy).await;
            pair.a.failpoints("ledger.persist=stall");
            pair.a.faults("");
            eventually(async || matches!(state(&a.host, vm), VmState::Unknown { .. })).await;
            let client = pair.client(&pair.a);
            let report = client.outgoing(one.id).await.unwrap();
            let ask = pair.a.config.name.clone();
            assert_eq!(
                (report.phase, report.end),
                (Phase::Handoff, OutgoingEnd::Unresolved { ask })
            );
            // Neither written nor failed: nobody may end it, and it is not said that it has.
            let refused = client.cancel_outgoing(one.id).await.unwrap_err();
            assert_eq!(refused.code, ErrorCode::Busy, "{refused}");
            pair.a.failpoints("");
            assert_eq!(pair.end(&one, &pair.a).await, OutgoingEnd::Moved);
        });
        pair.assert_runs_on(vm, &b);
        pair.assert_clean(&pair.a, &a);
    });
}

#[test]
fn a_ledger_that_hangs_at_the_destination_leaves_nobody_waiting() {
    with_pair(|pair, a, b| {
        let vm = pair.vm_on(&a);
        let one = pair.try_to_move(vm, &a);
        pair.calls.block_on(async {
            let offer = pair.prepare(&one, &pair.a, &pair.b).await.unwrap();
            let ticket = offer.ticket.clone();
            pair.b.failpoints("ledger.persist=stall");
            pair.send(&one, &pair.a, &pair.b, offer).await.unwrap();
            eventually(async || matches!(state(&a.host, vm), VmState::Unresolved { .. })).await;
            let client = pair.client(&pair.b);
            assert_eq!(client.incoming(one.id).await.unwrap(), IncomingReport::Waiting);
            let claim = Claim { vm, migration: one.id, epoch: one.epoch };
            let message = Message { claim, body: Body::AskLoaded };
            let handoff = Handoff { ticket, message, resumed: None };
            // With the source's own questions more than wait in the queue of the destination's task.
            for _ in 0..2 {
                let unanswered = (0..5).map(|_| client.handoff(one.id, &handoff));
                for answer in futures::future::join_all(unanswered).await {
                    assert_eq!(answer.unwrap_err().code, ErrorCode::Busy);
                }
            }
            pair.b.failpoints("");
            assert_eq!(pair.end(&one, &pair.a).await, OutgoingEnd::Moved);
        });
        pair.assert_runs_on(vm, &b);
        pair.assert_clean(&pair.a, &a);
    });
}

#[test]
fn a_guest_whose_qemu_is_not_heard_any_more_during_the_copy_stays() {
    with_pair(|pair, a, b| {
        let vm = pair.vm_on(&a);
        pair.a.faults("stall:copying");
        let one = pair.try_to_move(vm, &a);
        pair.calls.block_on(async {
            pair.begin(&one, &pair.a, &pair.b).await;
            pair.phase(&one, &pair.a, Phase::Precopy).await;
            assert_ne!(pair.a.cut_sessions(), 0);
            let end = pair.end(&one, &pair.a).await;
            assert!(matches!(end, OutgoingEnd::Stayed { .. }), "{end:?}");
        });
        pair.a.faults("");
        pair.settle(&one, &pair.b);
        pair.assert_runs_on(vm, &a);
        pair.assert_clean(&pair.b, &b);
        pair.move_it(vm, (&pair.a, &a), &pair.b);
    });
}

#[test]
fn a_guest_that_is_owned_runs_though_the_session_with_its_qemu_was_lost() {
    with_pair(|pair, a, b| {
        let vm = pair.vm_on(&a);
        pair.b.faults("stall:cont");
        let one = pair.try_to_move(vm, &a);
        pair.calls.block_on(async {
            pair.begin(&one, &pair.a, &pair.b).await;
            let owned = async || {
                let word = b.host.ledger.current(vm).await.unwrap();
                word.is_some_and(|word| word.standing == Standing::Owned)
            };
            eventually(owned).await;
            tokio::time::sleep(Duration::from_millis(300)).await;
            assert_ne!(pair.b.cut_sessions(), 0);
            pair.b.faults("");
            assert_eq!(pair.end(&one, &pair.a).await, OutgoingEnd::Moved);
        });
        pair.assert_runs_on(vm, &b);
        pair.assert_clean(&pair.a, &a);
    });
}

#[test]
fn a_refusal_that_is_not_written_yet_is_not_forgotten() {
    with_pair(|pair, a, b| {
        let vm = pair.vm_on(&a);
        let one = pair.try_to_move(vm, &a);
        pair.calls.block_on(async {
            pair.prepare(&one, &pair.a, &pair.b).await.unwrap();
            pair.b.failpoints("ledger.persist=error");
            let client = pair.client(&pair.b);
            let dropping = tokio::spawn(async move { client.delete_incoming(one.id).await });
            eventually(async || {
                let report = pair.client(&pair.b).incoming(one.id).await.unwrap();
                matches!(report, IncomingReport::Refused { .. })
            })
            .await;
            tokio::time::sleep(Duration::from_millis(300)).await;
            assert!(!dropping.is_finished(), "it is not over");
        });
        b.kill();
        pair.b.failpoints("");
        let b = pair.b.live();
        pair.settle(&one, &pair.b);
        pair.assert_clean(&pair.b, &b);
        pair.move_it(vm, (&pair.a, &a), &pair.b);
        pair.assert_runs_on(vm, &b);
    });
}

#[test]
fn a_migration_that_breaks_off_is_told_and_taken_up_by_the_next_agent() {
    with_pair(|pair, a, b| {
        let vm = pair.vm_on(&a);
        let one = pair.try_to_move(vm, &a);
        pair.calls.block_on(async {
            let offer = pair.prepare(&one, &pair.a, &pair.b).await.unwrap();
            pair.a.failpoints("source.before-release=panic");
            pair.send(&one, &pair.a, &pair.b, offer).await.unwrap();
            eventually(async || matches!(state(&a.host, vm), VmState::Unknown { .. })).await;
        });
        a.kill();
        pair.a.failpoints("");
        let a = pair.a.live();
        let end = pair.calls.block_on(pair.end(&one, &pair.a));
        assert!(matches!(end, OutgoingEnd::Stayed { .. }), "{end:?}");
        pair.settle(&one, &pair.b);
        pair.assert_runs_on(vm, &a);
        pair.assert_clean(&pair.b, &b);
    });
}

#[test]
fn whatever_fails_before_the_release_leaves_the_vm_where_it_was() {
    with_pair(|pair, a, b| {
        let vm = pair.vm_on(&a);
        let faults = [
            (&pair.a, "refuse:migrate"),
            (&pair.a, "refuse:copying"),
            (&pair.a, "refuse:pre-switchover"),
            (&pair.b, "die:accepted"),
            (&pair.b, "die:loading"),
            (&pair.b, "refuse:loading"),
        ];
        for (place, fault) in faults {
            let one = pair.try_to_move(vm, &a);
            pair.calls.block_on(async {
                let offer = pair.prepare(&one, &pair.a, &pair.b).await.unwrap();
                place.faults(fault);
                pair.send(&one, &pair.a, &pair.b, offer).await.unwrap();
                let end = pair.end(&one, &pair.a).await;
                assert!(matches!(end, OutgoingEnd::Stayed { .. }), "{fault}: {end:?}");
            });
            place.faults("");
            pair.settle(&one, &pair.b);
            pair.assert_runs_on(vm, &a);
            pair.assert_clean(&pair.b, &b);
        }
        pair.move_it(vm, (&pair.a, &a), &pair.b);
        pair.assert_runs_on(vm, &b);
        pair.assert_clean(&pair.a, &a);
    });
}

#[test]
fn a_destination_that_does_not_come_up_is_swept() {
    with_pair(|pair, a, b| {
        let vm = pair.vm_on(&a);
        for fault in ["refuse:start", "refuse:migrate-incoming", "die:migrate-incoming"] {
            pair.b.faults(fault);
            let one = pair.try_to_move(vm, &a);
            let refused = pair.calls.block_on(pair.prepare(&one, &pair.a, &pair.b)).unwrap_err();
            assert_eq!(refused.code, ErrorCode::Engine, "{fault}: {refused}");
            pair.b.faults("");
            pair.settle(&one, &pair.b);
            pair.assert_clean(&pair.b, &b);
        }
        pair.assert_runs_on(vm, &a);
        pair.move_it(vm, (&pair.a, &a), &pair.b);
    });
}

#[test]
fn a_killed_source_agent_keeps_the_vm_during_the_copy() {
    with_pair(|pair, a, b| {
        let vm = pair.vm_on(&a);
        pair.a.faults("stall:copying");
        let one = pair.try_to_move(vm, &a);
        pair.calls.block_on(async {
            pair.begin(&one, &pair.a, &pair.b).await;
            pair.phase(&one, &pair.a, Phase::Precopy).await;
        });
        a.kill();
        pair.a.faults("");
        let a = pair.a.live();
        let end = pair.calls.block_on(pair.end(&one, &pair.a));
        assert!(matches!(end, OutgoingEnd::Stayed { .. }), "{end:?}");
        pair.settle(&one, &pair.b);
        pair.assert_runs_on(vm, &a);
        pair.assert_clean(&pair.b, &b);
        pair.move_it(vm, (&pair.a, &a), &pair.b);
        pair.assert_runs_on(vm, &b);
    });
}

#[test]
fn a_migration_that_cannot_be_taken_up_again_is_not_begun_anew() {
    with_pair(|pair, a, _b| {
        let vm = pair.vm_on(&a);
        pair.a.faults("stall:copying");
        let one = pair.try_to_move(vm, &a);
        pair.calls.block_on(async {
            pair.begin(&one, &pair.a, &pair.b).await;
            pair.phase(&one, &pair.a, Phase::Precopy).await;
            let rows = a.host.ledger.migrations(Side::Outgoing).await.unwrap();
            let [row] = rows.as_slice() else { panic!("{rows:?}") };
            let unreadable = MigrationRow { request: "what is this".into(), ..row.clone() };
            a.host.ledger.put_migration(&unreadable).await.unwrap();
        });
        a.kill();
        let a = pair.a.live();
        assert!(matches!(state(&a.host, vm), VmState::Unknown { .. }));
        pair.calls.block_on(async {
            let client = pair.client(&pair.a);
            let offer = pair.prepare(&one, &pair.a, &pair.b).await.unwrap();
            let refused = [
                client.outgoing(one.id).await.unwrap_err(),
                pair.send(&one, &pair.a, &pair.b, offer).await.unwrap_err(),
                client.cancel_outgoing(one.id).await.unwrap_err(),
                client.delete_outgoing(one.id).await.unwrap_err(),
            ];
            for error in refused {
                assert_eq!(error.code, ErrorCode::WrongState, "{error:?}");
                assert!(error.message.contains("could not be taken up"), "{error:?}");
            }
        });
    });
}

#[test]
fn a_killed_destination_agent_gives_the_vm_up_during_the_copy() {
    with_pair(|pair, a, b| {
        let vm = pair.vm_on(&a);
        pair.a.faults("stall:copying");
        let one = pair.try_to_move(vm, &a);
        pair.calls.block_on(async {
            pair.begin(&one, &pair.a, &pair.b).await;
            pair.phase(&one, &pair.a, Phase::Precopy).await;
        });
        b.kill();
        let b = pair.b.live();
        pair.a.faults("");
        let end = pair.calls.block_on(pair.end(&one, &pair.a));
        match end {
            // Both are right: a destination that was found again may go on.
            OutgoingEnd::Moved => {
                pair.assert_runs_on(vm, &b);
                pair.assert_clean(&pair.a, &a);
            }
            OutgoingEnd::Stayed { .. } => {
                pair.assert_runs_on(vm, &a);
                pair.assert_clean(&pair.b, &b);
                pair.move_it(vm, (&pair.a, &a), &pair.b);
            }
            other => panic!("{other:?}"),
        }
    });
}

#[test]
fn a_source_agent_killed_at_the_release_settles_with_the_destination() {
    with_pair(|pair, a, b| {
        let vm = pair.vm_on(&a);
        pair.a.failpoints("source.before-release=stall");
        let one = pair.try_to_move(vm, &a);
        pair.calls.block_on(async {
            pair.begin(&one, &pair.a, &pair.b).await;
            pair.phase(&one, &pair.a, Phase::Switchover).await;
            tokio::time::sleep(Duration::from_millis(300)).await;
        });
        a.kill();
        pair.a.failpoints("");
        let a = pair.a.live();
        let end = pair.calls.block_on(pair.end(&one, &pair.a));
        // Nothing was released: the guest resumes where it was.
        assert!(matches!(end, OutgoingEnd::Stayed { .. }), "{end:?}");
        pair.settle(&one, &pair.b);
        pair.assert_runs_on(vm, &a);
        pair.assert_clean(&pair.b, &b);
    });
}

#[test]
fn a_destination_agent_killed_before_it_owns_is_asked_until_it_answers() {
    with_pair(|pair, a, b| {
        let vm = pair.vm_on(&a);
        let one = pair.try_to_move(vm, &a);
        pair.calls.block_on(async {
            let offer = pair.prepare(&one, &pair.a, &pair.b).await.unwrap();
            // GO finds the destination before its own word is on the disk.
            pair.b.failpoints("ledger.persist=stall");
            pair.send(&one, &pair.a, &pair.b, offer).await.unwrap();
            let released = async || {
                let current = a.host.ledger.current(vm).await.unwrap().unwrap();
                matches!(current.standing, Standing::Released { .. })
            };
            eventually(released).await;
        });
        b.kill();
        assert_eq!(pair.a.processes().len(), 1, "the source is kept while it is in doubt");
        pair.b.failpoints("");
        let b = pair.b.live();
        let end = pair.calls.block_on(pair.end(&one, &pair.a));
        assert!(matches!(end, OutgoingEnd::Moved | OutgoingEnd::Stayed { .. }), "{end:?}");
        let (owner, life, other, other_life) = match end {
            OutgoingEnd::Moved => (&pair.b, &b, &pair.a, &a),
            _ => (&pair.a, &a, &pair.b, &b),
        };
        pair.assert_runs_on(vm, life);
        assert_eq!(owner.processes().len(), 1);
        pair.assert_clean(other, other_life);
    });
}

#[test]
fn a_migration_needs_the_controllers_word_for_exactly_this() {
    with_pair(|pair, a, b| {
        let vm = pair.vm_on(&a);
        let one = pair.try_to_move(vm, &a);
        let other = Try { vm: VmId::new(), ..pair.try_to_move(vm, &a) };
        pair.calls.block_on(async {
            let definition = pair.client(&pair.a).vm(vm).await.unwrap().definition;
            let request = |grant| IncomingRequest {
                definition: definition.clone(),
                source: pair.a.config.name.clone(),
                epoch: one.epoch,
                receive: Receive::default(),
                grant,
            };
            let grants = [
                pair.grant(&other, &pair.a, &pair.b),
                pair.grant(&one, &pair.b, &pair.a),
                pair.grant(&Try { epoch: one.epoch.next(), ..one }, &pair.a, &pair.b),
            ];
            for grant in grants {
                let client = pair.client(&pair.b);
                let refused = client.put_incoming(one.id, &request(grant)).await.unwrap_err();
                assert_eq!(refused.code, ErrorCode::NotAllowed, "{refused}");
            }
        });
        pair.assert_clean(&pair.b, &b);
        pair.assert_runs_on(vm, &a);
    });
}

#[test]
fn the_way_is_tried_beforehand() {
    with_pair(|pair, _a, b| {
        pair.calls.block_on(async {
            let listen = KnockListen { from: pair.a.config.name.clone(), listen: None };
            let address = pair.client(&pair.b).knock_listen(&listen).await.unwrap();
            for (at, code) in [
                ("no-such-host.invalid", ErrorCode::NotFound),
                ("192.0.2.77", ErrorCode::NoResources),
            ] {
                let listen = KnockListen { listen: Some(at.to_owned()), ..listen.clone() };
                let refused = pair.client(&pair.b).knock_listen(&listen).await.unwrap_err();
                assert_eq!(refused.code, code, "{refused}");
                assert!(refused.message.contains(at), "{refused}");
            }
            let mut connect = KnockConnect { to: pair.b.config.name.clone(), address };
            let reach = pair.client(&pair.a).knock_connect(&connect).await.unwrap();
            assert!(matches!(reach, Reach::Open { .. }), "{reach:?}");
            connect.address.host = "no-such-host.invalid".to_owned();
            let reach = pair.client(&pair.a).knock_connect(&connect).await.unwrap();
            assert!(matches!(reach, Reach::Unresolvable { .. }), "{reach:?}");
            connect.address.host = "127.0.0.1".to_owned();
            connect.address.port = 1;
            let reach = pair.client(&pair.a).knock_connect(&connect).await.unwrap();
            assert!(matches!(reach, Reach::Closed { .. }), "{reach:?}");
        });
        b.kill();
    });
}
