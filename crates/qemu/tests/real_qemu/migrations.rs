//! Migrations between real QEMUs without TLS: to the end, cancelled, broken, and tried again.

use std::net::TcpListener;
use std::time::Duration;

use rustix::process::Signal;
use tokio::sync::watch;
use whimbrel_qemu::command_line::{Cache, DiskFormat, DiskSpec};
use whimbrel_qemu::event::EventKind;
use whimbrel_qemu::machine::RunState;
use whimbrel_qemu::migrate::incoming::{self, IncomingError, IncomingSettings};
use whimbrel_qemu::migrate::outgoing::{self, Cancelled, Outgoing, OutgoingError};
use whimbrel_qemu::migrate::{MigrationStatus, Statistics, Stream};

use crate::rig::{Guest, Lab, event, listening, moved, pairs, real_engines, slowly_to, soon, to};

const BOUND: Duration = Duration::from_secs(20);

async fn at_pre_switchover(source: &Guest, destination: &Guest) -> Outgoing {
    let address = destination.listens(None).await;
    let mut outgoing = Outgoing::start(&source.machine, &to(address, None)).await.unwrap();
    soon(outgoing.wait_pre_switchover(&watch::Sender::default())).await.unwrap();
    outgoing
}

async fn copying(source: &Guest, destination: &Guest) -> Outgoing {
    let address = destination.listens(None).await;
    let outgoing = Outgoing::start(&source.machine, &slowly_to(address)).await.unwrap();
    soon(async {
        while outgoing.statistics().await.unwrap().status != MigrationStatus::Active {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    })
    .await;
    outgoing
}

async fn second_try_succeeds(lab: &Lab, source: &Guest, engine: &crate::rig::Engine) {
    outgoing::reset(&source.machine).await.unwrap();
    let destination = lab.start(engine, "second-try", true).await;
    let address = destination.listens(None).await;
    moved(source, &destination, &to(address, None)).await;
    destination.machine.cont().await.unwrap();
    assert_eq!(destination.run_state().await, RunState::Running);
}

#[tokio::test]
async fn a_guest_moves_and_is_stopped_only_between_stop_and_resume() {
    for (from, onto) in pairs() {
        let lab = Lab::new();
        let source = lab.start_running(&from, "source").await;
        let destination = lab.start(&onto, "destination", true).await;
        assert_eq!(destination.run_state().await, RunState::InMigrate);
        let address = destination.listens(None).await;
        assert!((49152..=49215).contains(&address.port()), "{address}");
        assert_eq!(incoming::loaded(&destination.machine).await.unwrap(), None);

        let mut events = destination.machine.events();
        let stopped = moved(&source, &destination, &to(address, None)).await;
        destination.machine.cont().await.unwrap();
        let resumed = event(&mut events, &EventKind::Resume).await;
        assert!(resumed.since(stopped).is_some(), "{stopped:?} {resumed:?}");
        destination.machine.announce_self().await.unwrap();
        let end = Outgoing::reattach(&source.machine).cancel(BOUND).await.unwrap();
        assert_eq!(end, Cancelled::AlreadyCompleted);
        outgoing::reset(&source.machine).await.unwrap();
        assert_eq!(source.run_state().await, RunState::PostMigrate);
        source.machine.quit().await.unwrap();
        soon(source.process.wait_exit()).await;
        assert_eq!(destination.run_state().await, RunState::Running);

        // And on: what was set up as a destination works as a source.
        let third = lab.start(&onto, "third", true).await;
        let address = third.listens(None).await;
        moved(&destination, &third, &to(address, None)).await;
        third.machine.cont().await.unwrap();
    }
}

#[tokio::test]
async fn progress_is_told() {
    for (from, onto) in pairs() {
        let lab = Lab::new();
        let source = lab.start_running(&from, "source").await;
        let destination = lab.start(&onto, "destination", true).await;
        let mut outgoing = copying(&source, &destination).await;
        let progress = watch::Sender::<Statistics>::default();
        let mut told = progress.subscribe();
        {
            let waiting = outgoing.wait_pre_switchover(&progress);
            let seen = async {
                let seen = told.wait_for(|figures| figures.ram.transferred_bytes > Some(0)).await;
                seen.unwrap().clone()
            };
            // Giving up the wait does nothing to the migration.
            let figures = tokio::select! {
                result = waiting => panic!("{result:?}"),
                figures = soon(seen) => figures,
            };
            assert_eq!(figures.status, MigrationStatus::Active);
            assert!(figures.ram.remaining_bytes > Some(0), "{figures:?}");
        }
        assert_eq!(outgoing.statistics().await.unwrap().status, MigrationStatus::Active);
        // As a restarted agent does.
        let mut outgoing = Outgoing::reattach(&source.machine);
        let end = outgoing.cancel(BOUND).await.unwrap();
        assert_eq!(end, Cancelled::Stopped { run_state: RunState::Running });
    }
}

#[tokio::test]
async fn a_cancel_leaves_the_guest_running_and_the_next_try_succeeds() {
    for (from, onto) in pairs() {
        let lab = Lab::new();
        let source = lab.start_running(&from, "source").await;
        let destination = lab.start(&onto, "destination", true).await;
        let mut outgoing = copying(&source, &destination).await;
        for _ in 0..2 {
            let end = outgoing.cancel(BOUND).await.unwrap();
            assert_eq!(end, Cancelled::Stopped { run_state: RunState::Running });
        }
        let error = soon(outgoing.wait_pre_switchover(&watch::Sender::default())).await;
        assert!(matches!(error, Err(OutgoingError::Cancelled { .. })), "{error:?}");
        let error = soon(incoming::wait_loaded(&destination.machine)).await.unwrap_err();
        assert_load_failed(&error, onto.version);
        second_try_succeeds(&lab, &source, &onto).await;
    }
}

/// 7.2 ends when it can not load; 10.0 was told to stay and say so.
fn assert_load_failed(error: &IncomingError, version: &str) {
    match version {
        "7.2" => assert!(matches!(error, IncomingError::Ended(_)), "{error:?}"),
        _ => assert!(matches!(error, IncomingError::Failed { reason: Some(_) }), "{error:?}"),
    }
}

#[tokio::test]
async fn a_cancel_at_pre_switchover_lets_the_guest_run_again() {
    for (from, onto) in pairs() {
        let lab = Lab::new();
        let source = lab.start_running(&from, "source").await;
        let destination = lab.start(&onto, "destination", true).await;
        let mut outgoing = at_pre_switchover(&source, &destination).await;
        // Neither order changes anything here, on any version.
        assert!(source.machine.cont().await.unwrap_err().is_refusal());
        source.machine.stop().await.unwrap();
        assert_eq!(source.run_state().await, RunState::FinishMigrate);
        let end = outgoing.cancel(BOUND).await.unwrap();
        assert_eq!(end, Cancelled::Stopped { run_state: RunState::Running });
        let error = outgoing.continue_to_completed(BOUND).await.unwrap_err();
        assert!(matches!(error, OutgoingError::Cancelled { .. }), "{error:?}");
        second_try_succeeds(&lab, &source, &onto).await;
    }
}

#[tokio::test]
async fn a_destination_killed_while_copying_leaves_the_guest_running() {
    for (from, onto) in pairs() {
        let lab = Lab::new();
        let source = lab.start_running(&from, "source").await;
        let destination = lab.start(&onto, "destination", true).await;
        let mut outgoing = copying(&source, &destination).await;
        destination.killed().await;
        let error = incoming::wait_loaded(&destination.machine).await.unwrap_err();
        assert!(matches!(error, IncomingError::Ended(_)), "{error:?}");
        let error = soon(outgoing.wait_pre_switchover(&watch::Sender::default())).await;
        let error = error.unwrap_err();
        assert!(
            matches!(&error, OutgoingError::Failed { run_state: RunState::Running, .. }),
            "{error:?}"
        );
        second_try_succeeds(&lab, &source, &onto).await;
    }
}

#[tokio::test]
async fn a_destination_killed_at_the_switchover_lets_the_guest_run_again() {
    for (from, onto) in pairs() {
        let lab = Lab::new();
        let source = lab.start_running(&from, "source").await;
        let destination = lab.start(&onto, "destination", true).await;
        let mut outgoing = at_pre_switchover(&source, &destination).await;
        destination.killed().await;
        assert_eq!(source.run_state().await, RunState::FinishMigrate);
        let error = outgoing.continue_to_completed(BOUND).await.unwrap_err();
        assert!(
            matches!(&error, OutgoingError::Failed { run_state: RunState::Running, .. }),
            "{error:?}"
        );
        second_try_succeeds(&lab, &source, &onto).await;
    }
}

#[tokio::test]
async fn a_destination_that_hangs_in_the_last_stage_can_be_cancelled_and_loaded_proves_nothing() {
    for (from, onto) in pairs() {
        let lab = Lab::new();
        let source = lab.start_running(&from, "source").await;
        let destination = lab.start(&onto, "destination", true).await;
        let mut outgoing = at_pre_switchover(&source, &destination).await;
        destination.signal(Signal::STOP);
        let error = outgoing.continue_to_completed(Duration::from_millis(300)).await.unwrap_err();
        assert!(matches!(error, OutgoingError::TookTooLong { .. }), "{error:?}");
        assert_eq!(source.run_state().await, RunState::FinishMigrate);
        let end = outgoing.cancel(BOUND).await.unwrap();
        assert_eq!(end, Cancelled::Stopped { run_state: RunState::Running });

        // The guest runs on the source, and yet the destination says that it holds all of it.
        destination.signal(Signal::CONT);
        let loaded = soon(incoming::wait_loaded(&destination.machine)).await.unwrap();
        assert_eq!(loaded.run_state, RunState::Paused);
        destination.killed().await;
        second_try_succeeds(&lab, &source, &onto).await;
    }
}

#[tokio::test]
async fn a_destination_with_other_devices_refuses_and_the_guest_runs_again() {
    for (from, onto) in pairs() {
        let lab = Lab::new();
        let source = lab.start_spec(&from, with_disk(&lab, "source", false)).await;
        source.machine.cont().await.unwrap();
        let destination = lab.start(&onto, "destination", true).await;
        let mut outgoing = at_pre_switchover(&source, &destination).await;
        let error = outgoing.continue_to_completed(BOUND).await.unwrap_err();
        assert!(
            matches!(&error, OutgoingError::Failed { run_state: RunState::Running, .. }),
            "{error:?}"
        );
        let error = soon(incoming::wait_loaded(&destination.machine)).await.unwrap_err();
        assert_load_failed(&error, onto.version);
        let words = destination.process.last_words().join("\n");
        assert!(words.contains("Unknown savevm section"), "{words}");
    }
}

#[tokio::test]
async fn another_vm_is_refused_by_its_uuid() {
    for (from, onto) in pairs() {
        let lab = Lab::new();
        let other = Lab::new();
        let source = lab.start_running(&from, "source").await;
        let destination = other.start(&onto, "destination", true).await;
        let address = destination.listens(None).await;
        let mut outgoing = Outgoing::start(&source.machine, &to(address, None)).await.unwrap();
        let error = soon(incoming::wait_loaded(&destination.machine)).await.unwrap_err();
        assert_load_failed(&error, onto.version);
        let words = destination.process.last_words().join("\n");
        assert!(words.contains("UUID"), "{words}");
        let end = outgoing.cancel(BOUND).await.unwrap();
        assert_eq!(end, Cancelled::Stopped { run_state: RunState::Running });
    }
}

#[tokio::test]
async fn a_paused_guest_stays_paused_whatever_happens() {
    for (from, onto) in pairs() {
        let lab = Lab::new();
        let source = lab.start_running(&from, "source").await;
        source.machine.stop().await.unwrap();
        let destination = lab.start(&onto, "destination", true).await;
        let mut outgoing = at_pre_switchover(&source, &destination).await;
        let end = outgoing.cancel(BOUND).await.unwrap();
        // 7.2 shows the state of a guest that has left.
        let shown = if from.version == "7.2" { RunState::PostMigrate } else { RunState::Paused };
        assert_eq!(end, Cancelled::Stopped { run_state: shown });

        // And 7.2 takes that for a reason not to migrate, until the guest has run again.
        let destination = lab.start(&onto, "second-try", true).await;
        let mut outgoing = at_pre_switchover(&source, &destination).await;
        let completed = outgoing.continue_to_completed(BOUND).await.unwrap();
        assert_eq!(completed.stopped_at, None);
        let loaded = soon(incoming::wait_loaded(&destination.machine)).await.unwrap();
        assert_eq!(loaded.run_state, RunState::Paused);
    }
}

#[tokio::test]
async fn taken_ports_are_passed_over() {
    for (from, onto) in pairs() {
        let lab = Lab::new();
        // Any free port: the range starts at it, and it is taken.
        let taken = TcpListener::bind("127.0.0.1:0").unwrap();
        let first = taken.local_addr().unwrap().port();
        let range = IncomingSettings { ports: first..=first.saturating_add(20), ..listening(None) };
        let destination = lab.start(&onto, "destination", true).await;
        let address = destination.listens_as(&range).await;
        assert!(address.port() > first, "{address}");
        let source = lab.start_running(&from, "source").await;
        moved(&source, &destination, &to(address, None)).await;

        let only = IncomingSettings { ports: first..=first, ..listening(None) };
        let destination = lab.start(&onto, "no-port", true).await;
        let error = incoming::prepare(&destination.machine, &only).await.unwrap_err();
        assert!(matches!(error, IncomingError::Listen { .. }), "{error:?}");
    }
}

#[tokio::test]
async fn several_connections_move_a_guest() {
    for (from, onto) in pairs() {
        let lab = Lab::new();
        let source = lab.start_running(&from, "source").await;
        let destination = lab.start(&onto, "destination", true).await;
        let stream = Stream { multifd_channels: Some(2), ..Stream::default() };
        let settings = IncomingSettings { stream, ..listening(None) };
        let address = destination.listens_as(&settings).await;
        let mut settings = to(address, None);
        settings.stream = stream;
        moved(&source, &destination, &settings).await;
    }
}

/// With no round at all QEMU frees what the next reset of the guest needs, and dies by it.
#[tokio::test]
async fn a_destination_announces_once_by_itself() {
    for engine in real_engines() {
        let lab = Lab::new();
        let destination = lab.start(&engine, "destination", true).await;
        destination.listens(None).await;
        let qmp = destination.machine.qmp();
        let parameters = qmp.execute("query-migrate-parameters", serde_json::Value::Null).await;
        assert_eq!(parameters.unwrap()["announce-rounds"], 1);
    }
}

/// A VM with one small raw disk, which both ends share.
fn with_disk(lab: &Lab, name: &str, incoming: bool) -> whimbrel_qemu::command_line::VmSpec {
    let path = lab.dir.path().join("disk.raw");
    if !path.exists() {
        std::fs::File::create(&path).unwrap().set_len(16 << 20).unwrap();
        lab.hand_over(&path);
    }
    let mut spec = lab.spec(name, incoming);
    spec.disks.push(DiskSpec {
        node: "disk0".to_owned(),
        path,
        format: DiskFormat::Raw,
        read_only: false,
        serial: Some("web01-0".to_owned()),
        cache: Cache::WriteBack,
        layers: Vec::new(),
    });
    spec
}

#[tokio::test]
async fn a_guest_that_arrived_paused_goes_on_paused() {
    for (from, onto) in pairs() {
        let lab = Lab::new();
        let mut source = lab.start_spec(&from, with_disk(&lab, "first", false)).await;
        source.machine.cont().await.unwrap();
        source.machine.stop().await.unwrap();
        // 7.2 fails an assertion over disks that were never active since the guest arrived.
        for (name, engine) in [("second", &from), ("third", &onto)] {
            let destination = lab.start_spec(engine, with_disk(&lab, name, true)).await;
            let mut outgoing = at_pre_switchover(&source, &destination).await;
            outgoing.continue_to_completed(BOUND).await.unwrap();
            let loaded = soon(incoming::wait_loaded(&destination.machine)).await.unwrap();
            assert_eq!(loaded.run_state, RunState::Paused);
            source.killed().await;
            source = destination;
        }
        source.machine.cont().await.unwrap();
        assert_eq!(source.run_state().await, RunState::Running);
    }
}

#[tokio::test]
async fn a_shared_disk_is_taken_by_the_first_that_runs() {
    for (from, onto) in pairs() {
        let lab = Lab::new();
        let source = lab.start_spec(&from, with_disk(&lab, "source", false)).await;
        source.machine.cont().await.unwrap();
        let block = source.machine.query_block().await.unwrap();
        assert_eq!(block.len(), 1, "{block:?}");
        assert_eq!(block[0].node.as_deref(), Some("disk0"));
        assert_eq!(block[0].driver.as_deref(), Some("raw"));
        assert_eq!(block[0].virtual_size_bytes, Some(16 << 20));

        // Loaded, and refused: the source may go back to its disk while the destination is there.
        let destination = lab.start_spec(&onto, with_disk(&lab, "destination", true)).await;
        let address = destination.listens(None).await;
        moved(&source, &destination, &to(address, None)).await;
        source.machine.cont().await.unwrap();
        let error = destination.machine.cont().await.unwrap_err();
        assert!(error.is_refusal(), "{error:?}");
        assert_eq!(destination.run_state().await, RunState::Paused);
        destination.killed().await;

        // Handed over: the source can not.
        let destination = lab.start_spec(&onto, with_disk(&lab, "second-try", true)).await;
        let address = destination.listens(None).await;
        moved(&source, &destination, &to(address, None)).await;
        destination.machine.cont().await.unwrap();
        let error = source.machine.cont().await.unwrap_err();
        assert!(error.is_refusal(), "{error:?}");
        assert_eq!(source.run_state().await, RunState::PostMigrate);
        assert_eq!(destination.run_state().await, RunState::Running);
    }
}
