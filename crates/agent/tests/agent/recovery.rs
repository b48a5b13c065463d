//! Post-copy where a word, a session or an agent is lost on the way: nobody waits for ever, and nothing is forgotten.

use std::net::SocketAddr;
use std::time::Duration;

use tokio::net::{TcpListener, TcpStream};
use whimbrel_api::VmId;
use whimbrel_api::agent::{ListenAgain, OutgoingEnd, OutgoingRequest, RecoverOrder};
use whimbrel_api::migration::{
    MigrationAction, PostcopyReport, PostcopyState, ReclaimRequest, Statement, Stay,
};
use whimbrel_api::vm::VmState;

use crate::pair::{Pair, Try, with_pair, with_pair_of};
use crate::place::{Life, eventually, kill, state};

const VERSIONS: [(&str, &str); 2] = [("7.2", "7.2"), ("10.0", "10.0")];
/// The rest of the memory does not come while this stands.
const SLOW: &str = "postcopy-ms=600000";

impl Pair {
    async fn told(&self, one: &Try) -> PostcopyReport {
        self.client(&self.a).outgoing(one.id).await.unwrap().postcopy.unwrap()
    }

    async fn is_active(&self, one: &Try) -> u64 {
        self.postcopy_state(one, |state| *state == PostcopyState::Active).await
    }

    /// The connection is lost, and made again.
    async fn recovers(&self, one: &Try) {
        let before = self.told(one).await.recoveries;
        self.a.faults("refuse:postcopy");
        tokio::time::sleep(Duration::from_millis(300)).await;
        self.a.faults(SLOW);
        eventually(async || self.told(one).await.recoveries > before).await;
        self.is_active(one).await;
    }

    /// What the source's ledger has of a migration.
    async fn noted(&self, one: &Try, a: &Life) -> OutgoingRequest {
        let rows = a.host.ledger.migrations(whimbrel_agent::ledger::Side::Outgoing).await.unwrap();
        let row = rows.into_iter().find(|row| row.id == one.id).unwrap();
        serde_json::from_value(row.request).unwrap()
    }
}

fn is_held(state: &PostcopyState) -> bool {
    matches!(state, PostcopyState::Paused { by_hand: true, .. })
}

async fn crashes(b: &Life, vm: VmId) {
    eventually(async || {
        b.host.vms.report(vm).is_ok_and(|told| matches!(told.state, VmState::Crashed { .. }))
    })
    .await;
}

#[test]
fn a_session_that_ends_at_the_destination_is_opened_anew() {
    with_pair(|pair, a, b| {
        let vm = pair.vm_on(&a);
        let one = pair.calls.block_on(pair.serving(vm, &a));
        assert!(pair.b.cut_sessions() > 0);
        pair.ends_moved(&one, (&a, &b));
    });
}

#[test]
fn a_session_that_ends_at_the_source_is_opened_anew() {
    with_pair(|pair, a, b| {
        let vm = pair.vm_on(&a);
        let one = pair.calls.block_on(async {
            let one = pair.serving(vm, &a).await;
            for _ in 0..2 {
                assert!(pair.a.cut_sessions() > 0 && pair.b.cut_sessions() > 0);
                pair.recovers(&one).await;
            }
            one
        });
        pair.ends_moved(&one, (&a, &b));
    });
}

#[test]
fn a_guest_of_which_a_device_waits_for_lost_memory_is_ended() {
    for versions in VERSIONS {
        with_pair_of(versions, |pair, a, b| {
            let vm = pair.vm_on(&a);
            let one = pair.calls.block_on(pair.serving(vm, &a));
            pair.b.faults("silent:in-band");
            kill(pair.a.processes()[0]);
            pair.calls.block_on(async {
                assert_eq!(pair.end(&one, &pair.a).await, OutgoingEnd::Moved);
                crashes(&b, vm).await;
            });
            pair.assert_clean(&pair.a, &a);
            pair.assert_clean(&pair.b, &b);
        });
    }
}

#[test]
fn a_guest_that_believes_in_a_source_that_is_gone_is_ended() {
    with_pair(|pair, a, b| {
        let vm = pair.vm_on(&a);
        let one = pair.calls.block_on(pair.serving(vm, &a));
        // It does not see the end of the connection.
        pair.b.faults("stall:postcopy");
        std::thread::sleep(Duration::from_millis(100));
        kill(pair.a.processes()[0]);
        pair.calls.block_on(async {
            assert_eq!(pair.end(&one, &pair.a).await, OutgoingEnd::Moved);
            crashes(&b, vm).await;
        });
        pair.assert_clean(&pair.b, &b);
    });
}

#[test]
fn a_qemu_that_is_silent_when_its_agent_is_back_is_told_at_the_source() {
    with_pair(|pair, a, b| {
        let vm = pair.vm_on(&a);
        let one = pair.calls.block_on(pair.serving(vm, &a));
        a.kill();
        pair.a.faults_of_running("silent:in-band");
        let a = pair.a.live();
        let end = async || pair.client(&pair.a).outgoing(one.id).await.unwrap().end;
        let ask = pair.a.config.name.clone();
        pair.calls.block_on(async {
            eventually(async || end().await == OutgoingEnd::Unresolved { ask: ask.clone() }).await;
            assert!(matches!(state(&a.host, vm), VmState::Unknown { .. }));
            pair.a.faults_of_running("");
            eventually(async || end().await == OutgoingEnd::Open).await;
        });
        pair.ends_moved(&one, (&a, &b));
    });
}

#[test]
fn a_qemu_that_is_silent_when_its_agent_is_back_is_told_at_the_destination() {
    with_pair(|pair, a, b| {
        let vm = pair.vm_on(&a);
        let one = pair.calls.block_on(pair.serving(vm, &a));
        b.kill();
        pair.b.faults_of_running("silent:in-band");
        let b = pair.b.live();
        let is = async |wanted: fn(&VmState) -> bool| {
            eventually(async || b.host.vms.report(vm).is_ok_and(|told| wanted(&told.state))).await;
        };
        pair.calls.block_on(async {
            is(|state| matches!(state, VmState::Unknown { .. })).await;
            pair.b.faults_of_running("");
            is(|state| matches!(state, VmState::Migrating { .. })).await;
        });
        pair.ends_moved(&one, (&a, &b));
    });
}

#[test]
fn a_postcopy_that_is_held_stays_held_over_a_restart_of_the_agent() {
    with_pair(|pair, a, b| {
        let vm = pair.vm_on(&a);
        let (one, before) = pair.calls.block_on(async {
            let one = pair.serving(vm, &a).await;
            pair.recovers(&one).await;
            pair.act(&one, MigrationAction::Pause).await.unwrap();
            pair.postcopy_state(&one, is_held).await;
            let before = pair.client(&pair.a).outgoing(one.id).await.unwrap();
            (one, before)
        });
        a.kill();
        let a = pair.a.live();
        pair.calls.block_on(async {
            pair.postcopy_state(&one, is_held).await;
            // Longer than it takes to make a lost connection again.
            tokio::time::sleep(Duration::from_millis(1_500)).await;
            pair.postcopy_state(&one, is_held).await;
            let (told, before_told) = (pair.told(&one).await, before.postcopy.unwrap());
            assert_eq!((told.begun, told.recoveries), (before_told.begun, before_told.recoveries));
            let downtime = pair.client(&pair.a).outgoing(one.id).await.unwrap().downtime;
            assert!(downtime.is_some() && downtime == before.downtime, "{downtime:?}");
            pair.act(&one, MigrationAction::Resume).await.unwrap();
            pair.is_active(&one).await;
        });
        // What was let go on goes on after the next restart, too.
        a.kill();
        let a = pair.a.live();
        pair.calls.block_on(pair.is_active(&one));
        pair.ends_moved(&one, (&a, &b));
    });
}

#[test]
fn where_the_stream_goes_after_a_recovery_is_known_and_noted() {
    with_pair(|pair, a, b| {
        let vm = pair.vm_on(&a);
        let one = pair.calls.block_on(pair.serving(vm, &a));
        let by = pair.calls.block_on(async {
            pair.act(&one, MigrationAction::Pause).await.unwrap();
            pair.postcopy_state(&one, is_held).await;
            let (there, ask) = (pair.client(&pair.b), ListenAgain::default());
            let listening = there.listen_again(one.id, &ask).await.unwrap();
            let by = relay(listening.address).await;
            let order = RecoverOrder { address: Some(by) };
            pair.client(&pair.a).recover_outgoing(one.id, &order).await.unwrap();
            pair.is_active(&one).await;
            eventually(async || pair.noted(&one, &a).await.offer.address == by).await;
            by
        });
        assert!(is_connected(pair.a.processes()[0], by.port()), "{by}");
        pair.ends_moved(&one, (&a, &b));
    });
}

/// Another way to an address, for one connection.
async fn relay(to: SocketAddr) -> SocketAddr {
    let listener = TcpListener::bind(("127.0.0.1", 0)).await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move {
        let mut near = listener.accept().await.unwrap().0;
        let mut far = TcpStream::connect(to).await.unwrap();
        let _over = tokio::io::copy_bidirectional(&mut near, &mut far).await;
    });
    address
}

/// Whether a process of this namespace has a connection to a port, by the kernel's table.
fn is_connected(pid: u32, port: u16) -> bool {
    let table = std::fs::read_to_string(format!("/proc/{pid}/net/tcp")).unwrap();
    let to = format!(":{port:04X}");
    table.lines().skip(1).any(|line| {
        let mut columns = line.split_ascii_whitespace().skip(2);
        columns.next().is_some_and(|remote| remote.ends_with(&to)) && columns.next() == Some("01")
    })
}

#[test]
fn a_vm_that_was_taken_back_is_told_so_by_the_next_agent() {
    with_pair(|pair, a, b| {
        let vm = pair.vm_on(&a);
        let one = pair.calls.block_on(pair.serving(vm, &a));
        b.kill();
        pair.b.processes().into_iter().for_each(kill);
        pair.a.failpoints("source.reclaim-waits=error; source.before-end=stall");
        let statement = Statement::AcceptDataLoss;
        pair.calls.block_on(async {
            let word = ReclaimRequest { statement };
            pair.client(&pair.a).reclaim_outgoing(one.id, &word).await.unwrap();
            eventually(async || {
                let word = a.host.ledger.current(vm).await.unwrap().unwrap();
                word.may_run() && word.epoch > one.epoch
            })
            .await;
        });
        a.kill();
        pair.a.failpoints("");
        let a = pair.a.live();
        let end = pair.calls.block_on(pair.end(&one, &pair.a));
        assert_eq!(end, OutgoingEnd::Stayed { why: Stay::Reclaimed { statement } });
        assert!(!matches!(state(&a.host, vm), VmState::Running));
    });
}

#[test]
fn a_qemu_that_waits_for_a_guest_and_is_silent_when_its_agent_is_back_is_ended() {
    with_pair(|pair, a, b| {
        let vm = pair.vm_on(&a);
        let one = pair.try_to_move(vm, &a);
        pair.a.faults("stall:copying");
        pair.calls.block_on(pair.begin(&one, &pair.a, &pair.b));
        b.kill();
        pair.b.faults_of_running("silent:in-band");
        pair.b.failpoints("destination.silent-soon=error");
        let b = pair.b.live();
        let end = pair.calls.block_on(pair.end(&one, &pair.a));
        assert!(matches!(end, OutgoingEnd::Stayed { .. }), "{end:?}");
        pair.a.faults("");
        pair.settle(&one, &pair.b);
        pair.assert_runs_on(vm, &a);
        pair.assert_clean(&pair.b, &b);
        pair.move_it(vm, (&pair.a, &a), &pair.b);
    });
}

#[test]
fn what_qemu_keeps_of_a_migration_that_is_over_is_told() {
    with_pair(|pair, a, b| {
        let vm = pair.vm_on(&a);
        let one = pair.try_to_move(vm, &a);
        pair.a.faults("copying-ms=20000");
        pair.calls.block_on(async {
            pair.begin(&one, &pair.a, &pair.b).await;
            // Memory goes: what QEMU is told before has been told.
            eventually(async || pair.report(&one).await.progress.is_some()).await;
            pair.a.faults("copying-ms=20000 refuse:migrate-set-capabilities");
            pair.client(&pair.a).cancel_outgoing(one.id).await.unwrap();
            assert_eq!(pair.end(&one, &pair.a).await, OutgoingEnd::Stayed { why: Stay::Cancelled });
            let report = pair.client(&pair.a).outgoing(one.id).await.unwrap();
            let told = report.decisions.iter().any(|told| told.measured.contains("settings"));
            assert!(told, "{:?}", report.decisions);
        });
        pair.a.faults("");
        pair.settle(&one, &pair.b);
        pair.move_it(vm, (&pair.a, &a), &pair.b);
        pair.assert_runs_on(vm, &b);
    });
}
