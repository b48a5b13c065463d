//! How a copy under way is steered: by what is seen of it, by the clock, and by orders.

use rustix::fs::{FlockOperation, flock};
use rustix::process::{Resource, Rlimit, setrlimit};
use whimbrel_api::agent::{OutgoingEnd, OutgoingReport, RecoverOrder};
use whimbrel_api::migration::{
    LiveSettings, MigrationAction, Postcopy, PostcopyBegin, PostcopySetting, Rung, Stay,
    ThrottleSetting, Timeout, TimeoutAction,
};
use whimbrel_api::policy::Consent;
use whimbrel_api::{ErrorCode, Phase, VmId};

use crate::pair::{Pair, Try, Way, with_pair};
use crate::place::eventually;

/// A pause that the aim reaches after a few passes.
fn short_pauses() -> Way {
    let mut way = Way::default();
    way.strategy.max_downtime_ms = 2;
    way.policy.max_downtime_ms = 4;
    way
}

impl Pair {
    /// Whether the guest stands still on both hosts.
    fn stands_still(&self, vm: VmId) -> bool {
        let lock = std::fs::File::open(self.pool.dir().join(format!("watch/{vm}"))).unwrap();
        flock(&lock, FlockOperation::NonBlockingLockExclusive).is_ok()
    }

    pub(crate) async fn report(&self, one: &Try) -> OutgoingReport {
        self.client(&self.a).outgoing(one.id).await.unwrap()
    }

    /// Lets the guest write as much as is sent, pass after pass, until something comes of it.
    async fn stall(&self, one: &Try, also: &str, until: impl Fn(&OutgoingReport) -> bool) {
        let mut pass = self.report(one).await.progress.map_or(2, |progress| progress.passes + 1);
        eventually(async || {
            self.a.faults(&format!("copying-ms=200000 dirty-sync-count={pass} {also}"));
            let seen = eventually(async || {
                let progress = self.report(one).await.progress;
                progress.is_some_and(|progress| progress.passes >= pass)
                    || until(&self.report(one).await)
            });
            seen.await;
            pass += 1;
            until(&self.report(one).await)
        })
        .await;
    }

    async fn cancel_and_stay(&self, one: &Try) {
        self.client(&self.a).cancel_outgoing(one.id).await.unwrap();
        let end = self.end(one, &self.a).await;
        assert_eq!(end, OutgoingEnd::Stayed { why: Stay::Cancelled });
    }
}

fn steps(report: &OutgoingReport) -> usize {
    report.decisions.len()
}

#[test]
fn a_copy_that_stalls_is_helped_by_one_step_after_the_other() {
    with_pair(|pair, a, b| {
        let vm = pair.vm_on(&a);
        let one = pair.try_to_move(vm, &a);
        let mut way = short_pauses();
        way.strategy.throttle = Some(ThrottleSetting::RESERVE);
        (way.policy.allow_throttle, way.policy.allow_static) = (Consent::Yes, Consent::Yes);
        pair.calls.block_on(async {
            pair.a.faults("copying-ms=200000 dirty-sync-count=1");
            pair.begin_by(&one, &pair.a, &pair.b, way).await;
            pair.stall(&one, "", |report| steps(report) == 1).await;
            let now = pair.report(&one).await.strategy.unwrap();
            assert_eq!((now.rung, now.max_downtime_ms), (Rung::Downtime, 4));
            pair.stall(&one, "", |report| steps(report) == 2).await;
            let now = pair.report(&one).await.strategy.unwrap();
            assert_eq!(now.throttle, Some(ThrottleSetting::STANDARD));
            assert!(!pair.stands_still(vm));
            pair.stall(&one, "throttle=99", |report| steps(report) == 3).await;
            assert_eq!(pair.report(&one).await.strategy.unwrap().rung, Rung::Static);
            eventually(async || pair.stands_still(vm)).await;
            pair.cancel_and_stay(&one).await;
        });
        pair.assert_runs_on(vm, &a);
        assert!(!pair.stands_still(vm), "a guest that was stopped for its move runs again");
        pair.a.faults("");
        pair.settle(&one, &pair.b);
        pair.move_it(vm, (&pair.a, &a), &pair.b);
        pair.assert_runs_on(vm, &b);
        pair.assert_clean(&pair.a, &a);
    });
}

#[test]
fn a_copy_that_stalls_ends_in_postcopy_where_that_is_ready() {
    with_pair(|pair, a, b| {
        let vm = pair.vm_on(&a);
        let one = pair.try_to_move(vm, &a);
        let mut way = short_pauses();
        way.options.postcopy = Some(Postcopy::default());
        way.strategy.postcopy = Some(PostcopySetting {
            begin: PostcopyBegin::WhenStalled,
            preempt: false,
            bandwidth_bytes_per_s: None,
        });
        pair.calls.block_on(async {
            pair.a.faults("copying-ms=200000 dirty-sync-count=1");
            pair.begin_by(&one, &pair.a, &pair.b, way).await;
            pair.stall(&one, "", |report| steps(report) == 2).await;
            assert_eq!(pair.report(&one).await.strategy.unwrap().rung, Rung::Postcopy);
            assert_eq!(pair.end(&one, &pair.a).await, OutgoingEnd::Moved);
        });
        pair.assert_runs_on(vm, &b);
        pair.assert_clean(&pair.a, &a);
    });
}

#[test]
fn a_copy_for_which_nothing_more_is_allowed_goes_on_and_says_so_once() {
    with_pair(|pair, a, b| {
        let vm = pair.vm_on(&a);
        let one = pair.try_to_move(vm, &a);
        let mut way = short_pauses();
        way.policy.allow_throttle = Consent::Never;
        way.policy.max_downtime_ms = 2;
        pair.calls.block_on(async {
            pair.a.faults("copying-ms=200000 dirty-sync-count=1");
            pair.begin_by(&one, &pair.a, &pair.b, way).await;
            pair.stall(&one, "", |report| steps(report) == 1).await;
            let later = pair.report(&one).await.progress.unwrap().passes + 6;
            let passes = |report: &OutgoingReport| report.progress.as_ref().unwrap().passes;
            pair.stall(&one, "", |report| passes(report) >= later).await;
            assert_eq!(steps(&pair.report(&one).await), 1);
            // What is set by hand is a new beginning.
            let longer = LiveSettings { max_downtime_ms: Some(8), ..LiveSettings::default() };
            pair.client(&pair.a).put_outgoing_settings(one.id, &longer).await.unwrap();
            pair.stall(&one, "", |report| steps(report) == 2).await;
            pair.cancel_and_stay(&one).await;
        });
        pair.assert_runs_on(vm, &a);
        pair.settle(&one, &pair.b);
        pair.assert_clean(&pair.b, &b);
    });
}

#[test]
fn the_guest_is_stopped_when_time_is_up_or_on_order() {
    with_pair(|pair, a, b| {
        let vm = pair.vm_on(&a);
        pair.a.faults("copying-ms=4000");
        let one = pair.try_to_move(vm, &a);
        let mut way = Way::default();
        way.options.timeout = Some(Timeout { seconds: 1, then: TimeoutAction::Suspend });
        pair.calls.block_on(async {
            pair.begin_by(&one, &pair.a, &pair.b, way).await;
            eventually(async || steps(&pair.report(&one).await) == 1).await;
            eventually(async || pair.stands_still(vm)).await;
            assert_eq!(pair.report(&one).await.phase, Phase::Precopy);
            assert_eq!(pair.end(&one, &pair.a).await, OutgoingEnd::Moved);
        });
        pair.assert_runs_on(vm, &b);
        pair.assert_clean(&pair.a, &a);

        pair.b.faults("copying-ms=4000");
        let back = pair.try_to_move(vm, &b);
        pair.calls.block_on(async {
            pair.begin(&back, &pair.b, &pair.a).await;
            let order = async || {
                let client = pair.client(&pair.b);
                client.outgoing_action(back.id, MigrationAction::ForceComplete).await.is_ok()
            };
            eventually(order).await;
            eventually(async || pair.stands_still(vm)).await;
            assert_eq!(pair.end(&back, &pair.b).await, OutgoingEnd::Moved);
        });
        pair.assert_runs_on(vm, &a);
        pair.assert_clean(&pair.b, &b);
    });
}

#[test]
fn a_guest_that_is_to_stand_still_meanwhile_does_and_runs_again() {
    with_pair(|pair, a, b| {
        let vm = pair.vm_on(&a);
        let still = || {
            let mut way = Way::default();
            (way.strategy.rung, way.strategy.stop_first) = (Rung::Static, true);
            way
        };
        let one = pair.try_to_move(vm, &a);
        pair.calls.block_on(async {
            pair.a.faults("copying-ms=200000");
            pair.begin_by(&one, &pair.a, &pair.b, still()).await;
            eventually(async || pair.stands_still(vm)).await;
            pair.cancel_and_stay(&one).await;
        });
        pair.assert_runs_on(vm, &a);
        assert!(!pair.stands_still(vm));
        pair.a.faults("");
        pair.settle(&one, &pair.b);

        let next = pair.try_to_move(vm, &a);
        pair.calls.block_on(async {
            pair.begin_by(&next, &pair.a, &pair.b, still()).await;
            assert_eq!(pair.end(&next, &pair.a).await, OutgoingEnd::Moved);
        });
        pair.assert_runs_on(vm, &b);
        assert!(!pair.stands_still(vm));
        pair.assert_clean(&pair.a, &a);
    });
}

#[test]
fn what_does_not_fit_is_refused_and_changes_nothing() {
    with_pair(|pair, a, b| {
        let vm = pair.vm_on(&a);
        let one = pair.try_to_move(vm, &a);
        pair.calls.block_on(async {
            pair.a.faults("copying-ms=200000");
            pair.begin(&one, &pair.a, &pair.b).await;
            pair.phase(&one, &pair.a, Phase::Precopy).await;
            let client = pair.client(&pair.a);
            let set = async |settings: LiveSettings| {
                client.put_outgoing_settings(one.id, &settings).await.map_err(|error| error.code)
            };
            let bandwidth = |rate| LiveSettings {
                bandwidth_bytes_per_s: Some(rate),
                ..LiveSettings::default()
            };
            eventually(async || set(bandwidth(1 << 20)).await.is_ok()).await;
            assert_eq!(set(bandwidth(1)).await.unwrap_err(), ErrorCode::OutOfRange);
            // Post-copy was not made ready, and there is none to hold, to go on with, or to recover.
            for action in MigrationAction::ALL {
                let told = match action {
                    MigrationAction::ForceComplete => continue,
                    MigrationAction::Recover => {
                        client.recover_outgoing(one.id, &RecoverOrder::default()).await
                    }
                    _ => client.outgoing_action(one.id, action).await,
                };
                assert_eq!(told.unwrap_err().code, ErrorCode::WrongState, "{action:?}");
            }
            assert_eq!(steps(&pair.report(&one).await), 0);
            client.outgoing_action(one.id, MigrationAction::ForceComplete).await.unwrap();
            let again = client.outgoing_action(one.id, MigrationAction::ForceComplete).await;
            assert_eq!(again.unwrap_err().code, ErrorCode::WrongState);
            pair.cancel_and_stay(&one).await;
            assert_eq!(set(bandwidth(1 << 20)).await.unwrap_err(), ErrorCode::WrongState);
        });
        pair.assert_runs_on(vm, &a);
        pair.settle(&one, &pair.b);
        pair.assert_clean(&pair.b, &b);
    });
}

/// Whether an agent may raise limits depends on where it runs: either it does, or it says so while nothing is begun.
#[test]
fn where_memory_may_not_be_locked_zero_copy_is_refused_and_nothing_is_begun() {
    with_pair(|pair, a, b| {
        let vm = pair.vm_on(&a);
        let one = pair.try_to_move(vm, &a);
        let mut way = Way::default();
        (way.strategy.zerocopy, way.strategy.channels, way.strategy.tls) = (true, Some(2), false);
        way.options.tls = false;
        pair.a.faults("copying-ms=200000");
        pair.calls.block_on(async {
            let offer = pair.prepare_for(&one, &pair.a, &pair.b, &way).await.unwrap();
            let unlimited = Rlimit { current: None, maximum: None };
            let may = setrlimit(Resource::Memlock, unlimited).is_ok();
            match pair.send_by(&one, &pair.a, &pair.b, offer, way).await {
                Ok(_) => {
                    assert!(may);
                    pair.cancel_and_stay(&one).await;
                }
                Err(error) => {
                    assert!(!may, "{error:?}");
                    assert_eq!(error.code, ErrorCode::NoResources);
                    assert!(error.hint.unwrap().contains("--zerocopy"));
                }
            }
        });
        pair.assert_runs_on(vm, &a);
        pair.a.faults("");
        pair.settle(&one, &pair.b);
        pair.move_it(vm, (&pair.a, &a), &pair.b);
        pair.assert_runs_on(vm, &b);
        pair.assert_clean(&pair.a, &a);
    });
}
