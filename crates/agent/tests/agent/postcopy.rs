//! Post-copy between two fake QEMUs: the guest moves first, and what can go wrong until the rest has followed.

use std::time::Duration;

use whimbrel_api::agent::{IncomingReport, OutgoingEnd, OutgoingReport, RecoverOrder};
use whimbrel_api::migration::{
    MigrationAction, Postcopy, PostcopyBegin, PostcopySetting, PostcopyState, Timeout,
    TimeoutAction,
};
use whimbrel_api::vm::{VmAction, VmState};
use whimbrel_api::{ErrorCode, Phase, VmId};
use whimbrel_migration::handoff::Standing;

use crate::pair::{Pair, Try, Way, with_pair, with_pair_of};
use crate::place::{Life, eventually, kill, state};

/// Copying that never ends, and a rest that takes its time.
pub(crate) const ENDLESS: &str = "copying-ms=20000 postcopy-ms=3000";

pub(crate) fn postcopy(begin: PostcopyBegin) -> Way {
    let mut way = Way::default();
    let (preempt, bandwidth_bytes_per_s) = (false, None);
    way.strategy.postcopy = Some(PostcopySetting { begin, preempt, bandwidth_bytes_per_s });
    way.options.postcopy = Some(Postcopy::default());
    way
}

pub(crate) async fn standing(life: &Life, vm: VmId) -> Option<Standing> {
    life.host.ledger.current(vm).await.unwrap().map(|record| record.standing)
}

impl Pair {
    pub(crate) async fn act(
        &self,
        one: &Try,
        action: MigrationAction,
    ) -> Result<OutgoingReport, ErrorCode> {
        let told = match action {
            MigrationAction::Recover => {
                self.client(&self.a).recover_outgoing(one.id, &RecoverOrder::default()).await
            }
            _ => self.client(&self.a).outgoing_action(one.id, action).await,
        };
        told.map_err(|error| error.code)
    }

    /// Begins at `a`, and orders post-copy as soon as that can be.
    pub(crate) async fn begin_postcopy(&self, one: &Try) {
        self.a.faults(ENDLESS);
        self.begin_by(one, &self.a, &self.b, postcopy(PostcopyBegin::WhenOrdered)).await;
        eventually(async || self.act(one, MigrationAction::Postcopy).await.is_ok()).await;
    }

    /// The guest runs at `b`, and the rest does not come before the faults are taken away.
    pub(crate) async fn serving(&self, vm: VmId, a: &Life) -> Try {
        let one = self.try_to_move(vm, a);
        self.begin_postcopy(&one).await;
        self.phase(&one, &self.a, Phase::Postcopy).await;
        self.a.faults("postcopy-ms=600000");
        one
    }

    pub(crate) async fn postcopy_state(
        &self,
        one: &Try,
        wanted: impl Fn(&PostcopyState) -> bool,
    ) -> u64 {
        let mut recoveries = 0;
        eventually(async || {
            let Ok(report) = self.client(&self.a).outgoing(one.id).await else { return false };
            let Some(postcopy) = report.postcopy else { return false };
            recoveries = postcopy.recoveries;
            wanted(&postcopy.state)
        })
        .await;
        recoveries
    }

    pub(crate) fn ends_moved(&self, one: &Try, (a, b): (&Life, &Life)) {
        self.a.faults("");
        self.b.faults("");
        let end = self.calls.block_on(self.end(one, &self.a));
        assert_eq!(end, OutgoingEnd::Moved);
        self.assert_runs_on(one.vm, b);
        self.assert_clean(&self.a, a);
        assert_eq!(self.b.processes().len(), 1);
        self.calls.block_on(async {
            eventually(async || standing(b, one.vm).await == Some(Standing::Owned)).await;
            let report = self.client(&self.a).outgoing(one.id).await.unwrap();
            assert_eq!(report.postcopy.unwrap().state, PostcopyState::Done);
            let reported = self.client(&self.b).incoming(one.id).await.unwrap();
            assert!(matches!(reported, IncomingReport::Owned { .. }), "{reported:?}");
        });
    }

    /// It stayed, runs, and moves with the next try.
    pub(crate) fn stays_and_moves_then(&self, one: &Try, (a, b): (&Life, &Life)) {
        let end = self.calls.block_on(self.end(one, &self.a));
        assert!(matches!(end, OutgoingEnd::Stayed { .. }), "{end:?}");
        self.a.faults("");
        self.b.faults("");
        self.settle(one, &self.b);
        self.assert_runs_on(one.vm, a);
        self.assert_clean(&self.b, b);
        let next = self.try_to_move(one.vm, a);
        self.calls.block_on(async {
            self.begin_postcopy(&next).await;
            self.phase(&next, &self.a, Phase::Postcopy).await;
        });
        self.ends_moved(&next, (a, b));
    }
}

#[test]
fn a_vm_moves_before_its_memory_has() {
    for versions in [("7.2", "7.2"), ("10.0", "10.0"), ("7.2", "10.0")] {
        with_pair_of(versions, |pair, a, b| {
            let vm = pair.vm_on(&a);
            let one = pair.calls.block_on(async {
                let one = pair.serving(vm, &a).await;
                let to = pair.b.config.name.clone();
                let from = pair.a.config.name.clone();
                assert_eq!(standing(&a, vm).await, Some(Standing::Serving { to }));
                assert_eq!(standing(&b, vm).await, Some(Standing::Fetching { from }));
                let report = pair.client(&pair.a).outgoing(one.id).await.unwrap();
                assert!(report.downtime.is_some_and(|downtime| downtime.total_us > 0));
                assert_eq!(report.decisions.len(), 1, "{:?}", report.decisions);
                let refused = pair.client(&pair.a).cancel_outgoing(one.id).await.unwrap_err();
                assert_eq!(refused.code, ErrorCode::HandedOver);
                one
            });
            pair.ends_moved(&one, (&a, &b));
        });
    }
}

#[test]
fn postcopy_begins_by_itself_after_the_first_pass_or_in_time() {
    with_pair(|pair, a, b| {
        let vm = pair.vm_on(&a);
        let one = pair.try_to_move(vm, &a);
        pair.calls.block_on(async {
            pair.a.faults(&format!("{ENDLESS} dirty-sync-count=2"));
            let way = postcopy(PostcopyBegin::AfterFirstPass);
            pair.begin_by(&one, &pair.a, &pair.b, way).await;
            pair.phase(&one, &pair.a, Phase::Postcopy).await;
        });
        pair.ends_moved(&one, (&a, &b));
    });
    with_pair(|pair, a, b| {
        let vm = pair.vm_on(&a);
        let one = pair.try_to_move(vm, &a);
        pair.calls.block_on(async {
            pair.a.faults(ENDLESS);
            let mut way = postcopy(PostcopyBegin::WhenOrdered);
            way.options.timeout = Some(Timeout { seconds: 1, then: TimeoutAction::Postcopy });
            pair.begin_by(&one, &pair.a, &pair.b, way).await;
            pair.phase(&one, &pair.a, Phase::Postcopy).await;
        });
        pair.ends_moved(&one, (&a, &b));
    });
}

#[test]
fn a_paused_vm_moves_before_its_memory_and_stays_paused() {
    for versions in [("7.2", "7.2"), ("10.0", "10.0")] {
        with_pair_of(versions, |pair, a, b| {
            let vm = pair.vm_on(&a);
            pair.calls.block_on(a.host.vms.act(vm, VmAction::Pause, false)).unwrap();
            let one = pair.calls.block_on(pair.serving(vm, &a));
            pair.a.faults("");
            assert_eq!(pair.calls.block_on(pair.end(&one, &pair.a)), OutgoingEnd::Moved);
            pair.calls.block_on(eventually(async || {
                b.host.vms.report(vm).is_ok_and(|report| report.state == VmState::Paused)
            }));
            pair.assert_clean(&pair.a, &a);
            let resumed = pair.calls.block_on(b.host.vms.act(vm, VmAction::Resume, false));
            assert_eq!(resumed.unwrap().state, VmState::Running);
        });
    }
}

#[test]
fn a_guest_that_fetches_is_told_and_left_alone() {
    with_pair(|pair, a, b| {
        let vm = pair.vm_on(&a);
        let one = pair.calls.block_on(pair.serving(vm, &a));
        pair.calls.block_on(async {
            let migration = one.id;
            eventually(async || b.host.vms.report(vm).is_ok()).await;
            assert_eq!(state(&b.host, vm), VmState::Migrating { migration });
            assert_eq!(b.host.vms.report(vm).unwrap().epoch, one.epoch);
            for (action, force) in
                [(VmAction::Pause, false), (VmAction::Stop, false), (VmAction::Stop, true)]
            {
                let refused = b.host.vms.act(vm, action, force).await.unwrap_err();
                assert_eq!(refused.code, ErrorCode::Migrating, "{refused}");
            }
            b.host.vms.open_console(vm).await.unwrap();
            let offered = pair.prepare(&pair.try_to_move(vm, &b), &pair.b, &pair.a).await;
            assert_eq!(offered.unwrap_err().code, ErrorCode::Migrating);
        });
        pair.ends_moved(&one, (&a, &b));
    });
}

#[test]
fn a_lost_connection_is_made_again_as_often_as_need_be() {
    for versions in [("7.2", "7.2"), ("10.0", "10.0")] {
        with_pair_of(versions, |pair, a, b| {
            let vm = pair.vm_on(&a);
            let one = pair.calls.block_on(async {
                let one = pair.serving(vm, &a).await;
                for round in 1..=3 {
                    pair.a.faults("refuse:postcopy refuse:recovering");
                    let paused = |state: &PostcopyState| {
                        matches!(state, PostcopyState::Paused { by_hand: false, .. })
                    };
                    pair.postcopy_state(&one, paused).await;
                    pair.a.faults("postcopy-ms=600000");
                    let active = |state: &PostcopyState| *state == PostcopyState::Active;
                    assert!(pair.postcopy_state(&one, active).await >= round);
                }
                one
            });
            pair.ends_moved(&one, (&a, &b));
        });
    }
}

#[test]
fn postcopy_is_held_and_taken_up_again_by_order() {
    with_pair(|pair, a, b| {
        let vm = pair.vm_on(&a);
        let one = pair.calls.block_on(async {
            let one = pair.serving(vm, &a).await;
            for action in [MigrationAction::Resume, MigrationAction::Recover] {
                assert_eq!(pair.act(&one, action).await, Err(ErrorCode::WrongState), "{action:?}");
            }
            for action in [MigrationAction::Resume, MigrationAction::Recover] {
                pair.act(&one, MigrationAction::Pause).await.unwrap();
                let held = |state: &PostcopyState| {
                    matches!(state, PostcopyState::Paused { by_hand: true, .. })
                };
                pair.postcopy_state(&one, held).await;
                // Longer than it takes to make a lost connection again.
                tokio::time::sleep(Duration::from_millis(1_500)).await;
                pair.postcopy_state(&one, held).await;
                pair.act(&one, action).await.unwrap();
                pair.postcopy_state(&one, |state| *state == PostcopyState::Active).await;
            }
            for action in [MigrationAction::Postcopy, MigrationAction::ForceComplete] {
                assert_eq!(pair.act(&one, action).await, Err(ErrorCode::WrongState), "{action:?}");
            }
            one
        });
        pair.ends_moved(&one, (&a, &b));
    });
}

#[test]
fn agents_that_die_in_postcopy_find_it_again() {
    for versions in [("7.2", "7.2"), ("10.0", "10.0")] {
        with_pair_of(versions, |pair, a, b| {
            let vm = pair.vm_on(&a);
            let one = pair.calls.block_on(pair.serving(vm, &a));
            let pids = (pair.a.processes(), pair.b.processes());
            a.kill();
            let a = pair.a.live();
            pair.calls.block_on(pair.phase(&one, &pair.a, Phase::Postcopy));
            b.kill();
            let b = pair.b.live();
            pair.calls.block_on(async {
                let migration = one.id;
                eventually(async || {
                    let told = b.host.vms.report(vm).map(|report| report.state);
                    told == Ok(VmState::Migrating { migration })
                })
                .await;
            });
            assert_eq!((pair.a.processes(), pair.b.processes()), pids);
            pair.ends_moved(&one, (&a, &b));
            assert_eq!(pair.b.processes(), pids.1);
        });
    }
}

#[test]
fn a_destination_that_is_silent_while_it_fetches_is_told_until_it_is_heard_again() {
    with_pair(|pair, a, b| {
        pair.a.failpoints("source.silent-soon=error");
        let vm = pair.vm_on(&a);
        let one = pair.calls.block_on(pair.serving(vm, &a));
        let migration = one.id;
        assert_eq!(state(&a.host, vm), VmState::Migrating { migration });
        let ask = pair.b.config.name.clone();
        let end = async || pair.client(&pair.a).outgoing(one.id).await.unwrap().end;
        let mut b = b;
        // As often as it falls silent.
        for _ in 0..2 {
            // Neither its agent nor its QEMU takes anything.
            b.kill();
            pair.a.faults("refuse:postcopy");
            pair.calls.block_on(eventually(async || {
                end().await == OutgoingEnd::Unresolved { ask: ask.clone() }
            }));
            b = pair.b.live();
            pair.a.faults("postcopy-ms=600000");
            pair.calls.block_on(eventually(async || end().await == OutgoingEnd::Open));
        }
        pair.ends_moved(&one, (&a, &b));
    });
}

#[test]
fn a_connection_that_is_lost_while_an_agent_is_away_is_made_again() {
    with_pair(|pair, a, b| {
        let vm = pair.vm_on(&a);
        let one = pair.calls.block_on(pair.serving(vm, &a));
        a.kill();
        pair.a.faults("refuse:postcopy");
        std::thread::sleep(Duration::from_millis(300));
        pair.a.faults("postcopy-ms=600000");
        let a = pair.a.live();
        pair.calls.block_on(eventually(async || {
            pair.postcopy_state(&one, |state| *state == PostcopyState::Active).await > 0
        }));
        pair.ends_moved(&one, (&a, &b));
    });
}

#[test]
fn an_end_that_an_agent_did_not_see_is_found() {
    with_pair(|pair, a, b| {
        let vm = pair.vm_on(&a);
        let one = pair.calls.block_on(pair.serving(vm, &a));
        a.kill();
        b.kill();
        pair.a.faults("");
        std::thread::sleep(Duration::from_millis(500));
        let (a, b) = (pair.a.live(), pair.b.live());
        pair.ends_moved(&one, (&a, &b));
    });
}

#[test]
fn a_state_that_does_not_load_leaves_the_guest_where_it_was() {
    for versions in [("7.2", "7.2"), ("10.0", "10.0")] {
        for fault in ["die:loading", "refuse:loading"] {
            with_pair_of(versions, move |pair, a, b| {
                let vm = pair.vm_on(&a);
                let one = pair.try_to_move(vm, &a);
                pair.calls.block_on(async {
                    pair.b.faults("stall:loading");
                    pair.begin_postcopy(&one).await;
                    eventually(async || {
                        let report = pair.client(&pair.a).outgoing(one.id).await.unwrap();
                        report.postcopy.is_some()
                    })
                    .await;
                    pair.b.faults(fault);
                });
                pair.stays_and_moves_then(&one, (&a, &b));
            });
        }
    }
}

#[test]
fn a_destination_that_never_says_that_it_holds_the_state_is_left() {
    for versions in [("7.2", "7.2"), ("10.0", "10.0")] {
        with_pair_of(versions, |pair, a, b| {
            let vm = pair.vm_on(&a);
            let one = pair.try_to_move(vm, &a);
            pair.b.faults("stall:loading");
            pair.calls.block_on(pair.begin_postcopy(&one));
            pair.stays_and_moves_then(&one, (&a, &b));
        });
    }
}

#[test]
fn a_cancel_between_state_and_release_takes_the_guest_back() {
    for versions in [("7.2", "7.2"), ("10.0", "10.0")] {
        with_pair_of(versions, |pair, a, b| {
            let vm = pair.vm_on(&a);
            let one = pair.try_to_move(vm, &a);
            pair.b.faults("stall:loading");
            pair.calls.block_on(async {
                pair.begin_postcopy(&one).await;
                eventually(async || {
                    let report = pair.client(&pair.a).outgoing(one.id).await.unwrap();
                    report.postcopy.is_some()
                })
                .await;
                pair.client(&pair.a).cancel_outgoing(one.id).await.unwrap();
            });
            pair.stays_and_moves_then(&one, (&a, &b));
        });
    }
}

#[test]
fn an_agent_that_dies_before_the_release_takes_the_guest_back() {
    for versions in [("7.2", "7.2"), ("10.0", "10.0")] {
        with_pair_of(versions, |pair, a, b| {
            let vm = pair.vm_on(&a);
            let one = pair.try_to_move(vm, &a);
            pair.a.failpoints("source.before-release=stall");
            pair.calls.block_on(async {
                pair.begin_postcopy(&one).await;
                eventually(async || {
                    let report = pair.client(&pair.a).outgoing(one.id).await.unwrap();
                    report.postcopy.is_some()
                })
                .await;
            });
            a.kill();
            pair.a.failpoints("");
            let a = pair.a.live();
            pair.stays_and_moves_then(&one, (&a, &b));
        });
    }
}

#[test]
fn a_guest_that_was_refused_and_not_taken_back_in_time_is_taken_back_later() {
    for versions in [("7.2", "7.2"), ("10.0", "10.0")] {
        with_pair_of(versions, |pair, a, b| {
            let vm = pair.vm_on(&a);
            let one = pair.try_to_move(vm, &a);
            pair.b.faults("stall:cont");
            pair.calls.block_on(async {
                pair.begin_postcopy(&one).await;
                eventually(async || {
                    matches!(standing(&a, vm).await, Some(Standing::Serving { .. }))
                })
                .await;
                // The record that it stays is written, and QEMU cannot be told.
                pair.a.faults_of_running("silent:qmp");
                pair.b.faults("refuse:cont");
                eventually(async || standing(&a, vm).await == Some(Standing::Owned)).await;
            });
            a.kill();
            pair.a.faults_of_running("");
            let a = pair.a.live();
            pair.stays_and_moves_then(&one, (&a, &b));
        });
    }
}

#[test]
fn a_guest_whose_destination_dies_in_postcopy_has_crashed_there() {
    with_pair(|pair, a, b| {
        let vm = pair.vm_on(&a);
        let one = pair.calls.block_on(pair.serving(vm, &a));
        kill(pair.b.processes()[0]);
        let end = pair.calls.block_on(pair.end(&one, &pair.a));
        assert_eq!(end, OutgoingEnd::Moved);
        pair.calls.block_on(eventually(async || {
            b.host.vms.report(vm).is_ok_and(|told| matches!(told.state, VmState::Crashed { .. }))
        }));
        pair.assert_clean(&pair.a, &a);
        pair.assert_clean(&pair.b, &b);
        pair.calls.block_on(crate::place::start(&b.host, vm));
    });
}

#[test]
fn a_guest_whose_destination_dies_while_its_agent_is_away_has_crashed_there() {
    with_pair(|pair, a, b| {
        let vm = pair.vm_on(&a);
        let one = pair.calls.block_on(pair.serving(vm, &a));
        b.kill();
        kill(pair.b.processes()[0]);
        let b = pair.b.live();
        let end = pair.calls.block_on(pair.end(&one, &pair.a));
        assert_eq!(end, OutgoingEnd::Moved);
        pair.calls.block_on(eventually(async || {
            b.host.vms.report(vm).is_ok_and(|told| matches!(told.state, VmState::Crashed { .. }))
        }));
        pair.assert_clean(&pair.a, &a);
        pair.assert_clean(&pair.b, &b);
        pair.calls.block_on(crate::place::start(&b.host, vm));
    });
}

#[test]
fn a_guest_that_can_never_have_its_rest_is_ended() {
    with_pair(|pair, a, b| {
        let vm = pair.vm_on(&a);
        let one = pair.calls.block_on(pair.serving(vm, &a));
        kill(pair.a.processes()[0]);
        let end = pair.calls.block_on(pair.end(&one, &pair.a));
        assert_eq!(end, OutgoingEnd::Moved);
        pair.calls.block_on(eventually(async || {
            b.host.vms.report(vm).is_ok_and(|told| matches!(told.state, VmState::Crashed { .. }))
        }));
        pair.assert_clean(&pair.a, &a);
        pair.assert_clean(&pair.b, &b);
    });
}
