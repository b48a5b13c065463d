//! Post-copy between real QEMUs: handed over before the memory, cut and taken up again, taken back.
//!
//! Passed over where the host does not let QEMU's user receive so
//! (`EngineFacts::postcopy_obstacle`).

use std::time::Duration;

use tokio::sync::watch;
use whimbrel_qemu::engine;
use whimbrel_qemu::machine::RunState;
use whimbrel_qemu::migrate::incoming::{self, IncomingSettings, Loaded};
use whimbrel_qemu::migrate::outgoing::{
    self, Cancelled, Outgoing, OutgoingError, OutgoingSettings, Switched, pause_postcopy, take_back,
};
use whimbrel_qemu::migrate::{LiveChange, MigrationStatus, Postcopy, Statistics, Stream};

use crate::rig::{Engine, Guest, Lab, listening, moved, pairs, soon, to};
use crate::tls::{client, server};

const BOUND: Duration = Duration::from_secs(20);

/// Slow enough for what is done to it meanwhile.
const SLOW_BYTES_PER_SECOND: u64 = 512 << 10;

/// Two guests of which one sends to the other in post-copy.
struct Two {
    lab: Lab,
    source: Guest,
    destination: Guest,
    outgoing: Outgoing,
    rounds: u32,
}

/// The pairs between which there can be post-copy on this host.
async fn able_pairs() -> Vec<(Engine, Engine)> {
    let mut able = Vec::new();
    for (from, onto) in pairs() {
        let facts = soon(engine::probe(&onto.binary, onto.user(), None)).await.unwrap();
        match facts.postcopy_obstacle {
            None => able.push((from, onto)),
            Some(obstacle) => {
                let required = std::env::var_os(crate::rig::REQUIRE).is_some();
                assert!(!required, "{onto:?}: {obstacle}");
            }
        }
    }
    able
}

fn stream(preempt: bool) -> Stream {
    Stream { postcopy: Some(Postcopy { preempt }), ..Stream::default() }
}

impl Two {
    /// At pre-switchover, by order and long before all is sent.
    async fn stopped(from: &Engine, onto: &Engine, preempt: bool, tls: bool) -> Self {
        let lab = Lab::new();
        let dirs = lab.tls(["host-a", "host-b", "host-c"]);
        let source = lab.start_writing(from, "source").await;
        let destination = lab.start_spec(onto, lab.writer("destination", true)).await;
        let own = tls.then(|| server(&dirs[1])).flatten();
        let settings = IncomingSettings { stream: stream(preempt), ..listening(own) };
        let address = destination.listens_as(&settings).await;
        let own = tls.then(|| client(&dirs[0], "host-b.qemu.whimbrel")).flatten();
        let settings = OutgoingSettings {
            stream: stream(preempt),
            max_bandwidth_bytes_per_second: SLOW_BYTES_PER_SECOND,
            max_postcopy_bandwidth_bytes_per_second: SLOW_BYTES_PER_SECOND,
            ..to(address, own)
        };
        let mut outgoing = Outgoing::start(&source.machine, &settings).await.unwrap();
        outgoing.wait_connected(BOUND).await.unwrap();
        outgoing.control().start_postcopy().await.unwrap();
        soon(outgoing.wait_pre_switchover(&watch::Sender::default())).await.unwrap();
        assert_eq!(source.run_state().await, RunState::FinishMigrate);
        assert_eq!(incoming::loaded(&destination.machine).await.unwrap(), None);
        let rounds = if from.fake { 0 } else { source.rounds_beyond(0).await };
        Self { lab, source, destination, outgoing, rounds }
    }

    /// The state has been sent and loaded; the guest stands still on both sides.
    async fn begun(from: &Engine, onto: &Engine, preempt: bool, tls: bool) -> Self {
        let mut two = Self::stopped(from, onto, preempt, tls).await;
        if from.fake {
            let order = |guest: &Guest, faults: &str| {
                let path = format!("{}.faults", guest.spec.qmp_socket.display());
                std::fs::write(path, faults).unwrap();
            };
            order(&two.source, "postcopy-ms=600000");
        }
        let switched = two.outgoing.continue_to_postcopy(BOUND).await.unwrap();
        assert!(matches!(switched, Switched::Postcopy(_)), "{switched:?}");
        let loaded = soon(incoming::wait_loaded(&two.destination.machine)).await.unwrap();
        let Loaded { whole, run_state, .. } = loaded;
        assert_eq!((whole, run_state), (false, RunState::Paused));
        two
    }

    /// Lets memory flow to the end.
    async fn completes(&mut self, fake: bool) {
        if fake {
            let path = format!("{}.faults", self.source.spec.qmp_socket.display());
            std::fs::write(path, "").unwrap();
        }
        let fast = LiveChange {
            max_postcopy_bandwidth_bytes_per_second: Some(0),
            ..LiveChange::default()
        };
        self.outgoing.control().set_live(&fast).await.unwrap();
        let progress = watch::Sender::default();
        let completed = soon(self.outgoing.wait_postcopy_done(&progress)).await.unwrap();
        assert!(completed.statistics.ram.postcopy_bytes > Some(0), "{completed:?}");
        assert!(completed.stopped_at.is_some());
        let whole = soon(incoming::wait_whole(&self.destination.machine, &progress)).await;
        let whole = whole.unwrap();
        assert_eq!(whole.status, MigrationStatus::Completed);
        assert_eq!(whole.postcopy_vcpu_blocktime_ms.len(), 1, "{whole:?}");
        self.source.reaches(&RunState::PostMigrate).await;
        outgoing::reset(&self.source.machine).await.unwrap();
    }
}

async fn status(guest: &Guest) -> MigrationStatus {
    Statistics::query(guest.machine.qmp()).await.unwrap().status
}

async fn reaches(guest: &Guest, wanted: MigrationStatus) {
    soon(async {
        while status(guest).await != wanted {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    })
    .await;
}

#[tokio::test]
async fn a_guest_is_handed_over_before_its_memory() {
    for (from, onto) in able_pairs().await {
        for preempt in [false, true] {
            let mut two = Two::begun(&from, &onto, preempt, preempt).await;
            two.destination.machine.cont().await.unwrap();
            assert_eq!(two.destination.run_state().await, RunState::Running);
            assert_eq!(status(&two.source).await, MigrationStatus::PostcopyActive);
            // Nothing of it can be ended now.
            let error = two.outgoing.cancel(BOUND).await.unwrap_err();
            assert!(matches!(error, OutgoingError::Postcopy), "{error:?}");
            two.completes(from.fake).await;
            if !from.fake {
                two.destination.rounds_beyond(two.rounds + 3).await;
            }
            // And on, as a source.
            let third = two.lab.start_spec(&onto, two.lab.writer("third", true)).await;
            let address = third.listens(None).await;
            moved(&two.destination, &third, &to(address, None)).await;
        }
    }
}

#[tokio::test]
async fn a_cut_postcopy_is_taken_up_again_and_again() {
    for (from, onto) in able_pairs().await {
        for preempt in [false, true] {
            let mut two = Two::begun(&from, &onto, preempt, true).await;
            for round in 0..3 {
                // Pages that a running guest waits for know no limit: it would be over soon.
                if round == 2 {
                    two.destination.machine.cont().await.unwrap();
                }
                // By the network, and by order of either side.
                match round {
                    0 => {
                        let port = two.peer_port();
                        assert!(two.source.process.cut(port).unwrap() > 0);
                    }
                    1 => pause_postcopy(&two.source.machine).await.unwrap(),
                    _ => pause_postcopy(&two.destination.machine).await.unwrap(),
                }
                reaches(&two.source, MigrationStatus::PostcopyPaused).await;
                let listens = two.listens_again().await;
                // Nobody listens there.
                let wrong = std::net::SocketAddr::new(listens.ip(), 1);
                let nowhere = two.outgoing.recover(wrong, Duration::from_millis(300)).await;
                nowhere.unwrap_err();
                let again = two.outgoing.recover(listens, BOUND).await;
                assert!(again.is_ok(), "{from:?} {onto:?} {preempt} {round}: {again:?}");
                reaches(&two.destination, MigrationStatus::PostcopyActive).await;
            }
            two.completes(from.fake).await;
            if !from.fake {
                two.destination.rounds_beyond(two.rounds + 3).await;
            }
        }
    }
}

impl Two {
    /// The port of the destination to which the source is connected.
    fn peer_port(&self) -> u16 {
        let table = std::fs::read_to_string("/proc/self/net/tcp").unwrap();
        let own = sockets_of(self.destination.process.identity().pid);
        let local = |line: &str| {
            let columns: Vec<&str> = line.split_ascii_whitespace().collect();
            let is_it = own.iter().any(|inode| columns[9] == inode);
            let port = columns[1].rsplit(':').next().unwrap();
            is_it.then(|| u16::from_str_radix(port, 16).unwrap())
        };
        table.lines().skip(1).find_map(local).expect("no connection")
    }

    /// Makes the destination listen again, once it has noticed.
    async fn listens_again(&self) -> std::net::SocketAddr {
        let Guest { machine, process, .. } = &self.destination;
        let IncomingSettings { address, ports, .. } = listening(None);
        let recovered = soon(incoming::recover(machine, process, address, ports)).await;
        match recovered {
            Ok(listening) => listening.address,
            Err(error) => panic!("{error:?}, QEMU said {:?}", process.last_words()),
        }
    }
}

fn sockets_of(pid: u32) -> Vec<String> {
    let links = std::fs::read_dir(format!("/proc/{pid}/fd")).unwrap();
    let targets = links.filter_map(|link| std::fs::read_link(link.unwrap().path()).ok());
    let inode = |target: std::path::PathBuf| {
        let name = target.to_str()?.strip_prefix("socket:[")?.strip_suffix(']')?.to_owned();
        Some(name)
    };
    targets.filter_map(inode).collect()
}

#[tokio::test]
async fn a_guest_that_was_not_handed_over_is_taken_back() {
    for (from, onto) in able_pairs().await {
        for (preempt, dies) in [(false, true), (true, false)] {
            let mut two = Two::begun(&from, &onto, preempt, true).await;
            if dies {
                two.destination.killed().await;
                reaches(&two.source, MigrationStatus::PostcopyPaused).await;
            }
            let error = two.outgoing.continue_to_completed(BOUND).await.unwrap_err();
            assert!(matches!(error, OutgoingError::Postcopy), "{error:?}");
            let socket = two.lab.dir.path().join("stand-in");
            for _ in 0..2 {
                take_back(&two.source.machine, &socket, from.user(), BOUND).await.unwrap();
            }
            assert!(!socket.exists());
            assert_eq!(two.source.run_state().await, RunState::PostMigrate);
            two.destination.killed().await;
            two.source.machine.cont().await.unwrap();
            assert_eq!(two.source.run_state().await, RunState::Running);
            if !from.fake {
                two.source.rounds_beyond(two.rounds + 3).await;
            }

            outgoing::reset(&two.source.machine).await.unwrap();
            let second = two.lab.start_spec(&onto, two.lab.writer("second-try", true)).await;
            let address = second.listens(None).await;
            moved(&two.source, &second, &to(address, None)).await;
            second.machine.cont().await.unwrap();
            assert_eq!(second.run_state().await, RunState::Running);
        }
    }
}

#[tokio::test]
async fn a_cancel_before_the_state_is_sent_leaves_the_guest_to_its_owner() {
    for (from, onto) in able_pairs().await {
        let mut two = Two::stopped(&from, &onto, true, false).await;
        let end = two.outgoing.cancel(BOUND).await.unwrap();
        // 7.2 forgets that it ran.
        let left = if from.version == "7.2" { RunState::PostMigrate } else { RunState::Running };
        assert_eq!(end, Cancelled::Stopped { run_state: left });
        two.source.machine.cont().await.unwrap();
        assert_eq!(two.source.run_state().await, RunState::Running);
        outgoing::reset(&two.source.machine).await.unwrap();
        let second = two.lab.start_spec(&onto, two.lab.writer("second-try", true)).await;
        let address = second.listens(None).await;
        moved(&two.source, &second, &to(address, None)).await;
    }
}
