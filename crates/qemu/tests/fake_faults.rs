//! The fake goes wrong exactly where it is told to, and is whole again afterwards.
//!
//! That it behaves like QEMU otherwise is what `tests/real_qemu` shows.

#![allow(clippy::unwrap_used, reason = "a test that can not go on has failed")]

#[allow(dead_code, reason = "the real ones use all of it")]
#[path = "real_qemu/certificates.rs"]
mod certificates;
#[allow(dead_code, reason = "the real ones use all of it")]
#[path = "real_qemu/rig.rs"]
mod rig;

use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::time::Duration;

use tokio::sync::watch;
use whimbrel_qemu::machine::RunState;
use whimbrel_qemu::migrate::incoming::{self, IncomingError};
use whimbrel_qemu::migrate::outgoing::{Cancelled, Outgoing, OutgoingError};
use whimbrel_qemu::migrate::{MigrationStatus, Statistics};
use whimbrel_qemu::process::Exit;

use crate::rig::{Engine, Guest, Lab, engines, moved, soon, to};

const BOUND: Duration = Duration::from_secs(20);

/// Long enough to see that nothing happens.
const MOMENT: Duration = Duration::from_millis(100);

fn fake() -> Engine {
    engines().into_iter().find(|engine| engine.fake && engine.version == "10.0").unwrap()
}

fn order(guest: &Guest, faults: &str) {
    let mut path = guest.spec.qmp_socket.clone().into_os_string();
    path.push(".faults");
    std::fs::write(path, faults).unwrap();
}

async fn two(lab: &Lab) -> (Guest, Guest) {
    let source = lab.start_running(&fake(), "source").await;
    (source, lab.start(&fake(), "destination", true).await)
}

async fn started(source: &Guest, destination: &Guest) -> Outgoing {
    let address = destination.listens(None).await;
    Outgoing::start(&source.machine, &to(address, None)).await.unwrap()
}

async fn at_pre_switchover(source: &Guest, destination: &Guest) -> Outgoing {
    let mut outgoing = started(source, destination).await;
    soon(outgoing.wait_pre_switchover(&watch::Sender::default())).await.unwrap();
    outgoing
}

#[tokio::test]
async fn commands_are_refused_stalled_lied_about_and_left_unanswered() {
    let lab = Lab::new();
    let guest = lab.start(&fake(), "web01", false).await;
    order(&guest, "refuse:cont");
    assert!(guest.machine.cont().await.unwrap_err().is_refusal());
    order(&guest, "lie:cont");
    guest.machine.cont().await.unwrap();
    assert_eq!(guest.run_state().await, RunState::Prelaunch);

    for fault in ["stall:query-status", "silent:qmp"] {
        order(&guest, fault);
        let unanswered = tokio::time::timeout(MOMENT, guest.machine.status()).await;
        assert!(unanswered.is_err(), "{fault}: {unanswered:?}");
        order(&guest, "");
        assert_eq!(guest.run_state().await, RunState::Prelaunch);
    }

    order(&guest, "die:stop");
    guest.machine.cont().await.unwrap();
    assert!(guest.machine.stop().await.unwrap_err().is_disconnected());
    assert_eq!(soon(guest.process.wait_exit()).await, Exit::Signal(9));
}

#[tokio::test]
async fn what_we_do_not_send_is_refused() {
    let lab = Lab::new();
    let guest = lab.start(&fake(), "web01", false).await;
    let qmp = guest.machine.qmp();
    assert!(qmp.execute("query-fish", serde_json::Value::Null).await.unwrap_err().is_refusal());
    let strange = serde_json::json!({ "strange": 1 });
    assert!(qmp.execute("cont", strange).await.unwrap_err().is_refusal());
}

#[tokio::test]
async fn a_source_fails_stalls_dies_and_lies_at_its_stages() {
    for (fault, at_the_end) in [("refuse:copying", false), ("refuse:device", true)] {
        let lab = Lab::new();
        let (source, destination) = two(&lab).await;
        order(&source, fault);
        let error = if at_the_end {
            let mut outgoing = at_pre_switchover(&source, &destination).await;
            outgoing.continue_to_completed(BOUND).await.unwrap_err()
        } else {
            let mut outgoing = started(&source, &destination).await;
            soon(outgoing.wait_pre_switchover(&watch::Sender::default())).await.unwrap_err()
        };
        assert!(
            matches!(&error, OutgoingError::Failed { run_state: RunState::Running, .. }),
            "{fault}: {error:?}"
        );
        // The second try succeeds.
        order(&source, "");
        let destination = lab.start(&fake(), "second-try", true).await;
        let address = destination.listens(None).await;
        moved(&source, &destination, &to(address, None)).await;
    }

    let lab = Lab::new();
    let (source, destination) = two(&lab).await;
    order(&source, "stall:device");
    let mut outgoing = at_pre_switchover(&source, &destination).await;
    let error = outgoing.continue_to_completed(MOMENT).await.unwrap_err();
    assert!(matches!(error, OutgoingError::TookTooLong { .. }), "{error:?}");
    let end = outgoing.cancel(BOUND).await.unwrap();
    assert_eq!(end, Cancelled::Stopped { run_state: RunState::Running });

    let lab = Lab::new();
    let (source, destination) = two(&lab).await;
    order(&source, "die:device");
    let mut outgoing = at_pre_switchover(&source, &destination).await;
    let error = outgoing.continue_to_completed(BOUND).await.unwrap_err();
    assert!(matches!(&error, OutgoingError::Query(cause) if cause.is_disconnected()), "{error:?}");
    let error = soon(incoming::wait_loaded(&destination.machine)).await.unwrap_err();
    assert!(matches!(error, IncomingError::Failed { .. }), "{error:?}");

    let lab = Lab::new();
    let (source, destination) = two(&lab).await;
    order(&source, "lie:completed");
    let mut outgoing = at_pre_switchover(&source, &destination).await;
    outgoing.continue_to_completed(BOUND).await.unwrap();
    let error = soon(incoming::wait_loaded(&destination.machine)).await.unwrap_err();
    assert!(matches!(error, IncomingError::Failed { .. }), "{error:?}");
}

#[tokio::test]
async fn a_failure_is_told_once_the_guest_has_settled() {
    let lab = Lab::new();
    let (source, destination) = two(&lab).await;
    let mut outgoing = at_pre_switchover(&source, &destination).await;
    order(&source, "refuse:device stall:settling");
    let settled = async {
        while outgoing_status(&source).await != MigrationStatus::Failed {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        assert_eq!(source.run_state().await, RunState::FinishMigrate);
        tokio::time::sleep(MOMENT).await;
        order(&source, "");
    };
    let (end, ()) = tokio::join!(outgoing.continue_to_completed(BOUND), soon(settled));
    let error = end.unwrap_err();
    assert!(
        matches!(&error, OutgoingError::Failed { run_state: RunState::Running, .. }),
        "{error:?}"
    );
}

async fn outgoing_status(source: &Guest) -> MigrationStatus {
    Statistics::query(source.machine.qmp()).await.unwrap().status
}

#[tokio::test]
async fn a_cancel_is_told_to_a_qemu_that_says_nothing_unless_post_copy_was_ordered() {
    for (postcopy, after) in
        [(false, MigrationStatus::Cancelled), (true, MigrationStatus::PreSwitchover)]
    {
        let lab = Lab::new();
        let (source, destination) = two(&lab).await;
        let mut outgoing = at_pre_switchover(&source, &destination).await;
        order(&source, "silent:qmp");
        if postcopy {
            let ordered = outgoing.control();
            let _unanswered = tokio::time::timeout(MOMENT, ordered.start_postcopy()).await;
        }
        let error = outgoing.cancel(10 * MOMENT).await.unwrap_err();
        assert!(matches!(error, OutgoingError::TookTooLong { .. }), "{error:?}");
        order(&source, "");
        let becomes = async {
            while outgoing_status(&source).await != after {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        };
        soon(becomes).await;
    }
}

#[tokio::test]
async fn a_destination_fails_stalls_dies_and_lies_at_its_stages() {
    for fault in ["refuse:accepted", "refuse:loading", "die:loading", "die:accepted"] {
        let lab = Lab::new();
        let (source, destination) = two(&lab).await;
        order(&destination, fault);
        let mut outgoing = started(&source, &destination).await;
        let error = match soon(outgoing.wait_pre_switchover(&watch::Sender::default())).await {
            Err(error) => error,
            Ok(_) => outgoing.continue_to_completed(BOUND).await.unwrap_err(),
        };
        assert!(
            matches!(&error, OutgoingError::Failed { run_state: RunState::Running, .. }),
            "{fault}: {error:?}"
        );
        let error = soon(incoming::wait_loaded(&destination.machine)).await.unwrap_err();
        let as_ordered = match error {
            IncomingError::Failed { .. } => fault.starts_with("refuse"),
            IncomingError::Ended(_) => fault.starts_with("die"),
            _ => false,
        };
        assert!(as_ordered, "{fault}");
    }

    let lab = Lab::new();
    let (source, destination) = two(&lab).await;
    order(&destination, "stall:loading");
    let mut outgoing = at_pre_switchover(&source, &destination).await;
    let error = outgoing.continue_to_completed(MOMENT).await.unwrap_err();
    assert!(matches!(error, OutgoingError::TookTooLong { .. }), "{error:?}");
    order(&destination, "");
    outgoing.continue_to_completed(BOUND).await.unwrap();
    soon(incoming::wait_loaded(&destination.machine)).await.unwrap();

    let lab = Lab::new();
    let (source, destination) = two(&lab).await;
    order(&destination, "lie:loaded");
    let outgoing = at_pre_switchover(&source, &destination).await;
    soon(incoming::wait_loaded(&destination.machine)).await.unwrap();
    assert_eq!(outgoing.statistics().await.unwrap().status, MigrationStatus::PreSwitchover);
}

#[tokio::test]
async fn the_pace_and_the_figures_can_be_set() {
    let lab = Lab::new();
    let (source, destination) = two(&lab).await;
    order(&source, "copying-ms=60000 dirty-pages-rate=77");
    let outgoing = started(&source, &destination).await;
    let figures: Statistics = soon(async {
        loop {
            let figures = outgoing.statistics().await.unwrap();
            if figures.ram.transferred_bytes > Some(0) {
                return figures;
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    })
    .await;
    assert_eq!(figures.status, MigrationStatus::Active);
    assert_eq!(figures.ram.dirty_pages_rate, Some(77));
    assert!(figures.ram.remaining_bytes > Some(0), "{figures:?}");
}

#[tokio::test]
async fn a_guest_that_runs_twice_is_seen() {
    let lab = Lab::new();
    let watch = lab.dir.path().join("watch");
    std::fs::create_dir(&watch).unwrap();
    let binary = lab.dir.path().join("fake-qemu-watched");
    let program = env!("CARGO_BIN_EXE_fake-qemu");
    let script =
        format!("#!/bin/sh\nFAKE_QEMU_WATCH_DIR={} exec {program} \"$@\"\n", watch.display());
    std::fs::write(&binary, script).unwrap();
    std::fs::set_permissions(&binary, std::fs::Permissions::from_mode(0o755)).unwrap();
    let engine = Engine { binary, ..fake() };
    let violations: PathBuf = watch.join("violations");

    let source = lab.start_running(&engine, "source").await;
    let destination = lab.start(&engine, "destination", true).await;
    let address = destination.listens(None).await;
    moved(&source, &destination, &to(address, None)).await;
    destination.machine.cont().await.unwrap();
    assert!(!violations.exists());

    // Nothing in QEMU holds back a source whose guest has left.
    source.machine.cont().await.unwrap();
    let text = std::fs::read_to_string(violations).unwrap();
    assert_eq!(text, format!("{} runs twice\n", lab.uuid));
}
