//! Migrations over QEMU's TLS: who is let in, and by which name.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::time::Duration;

use tokio::sync::watch;
use whimbrel_qemu::machine::RunState;
use whimbrel_qemu::migrate::incoming::IncomingTls;
use whimbrel_qemu::migrate::outgoing::{self, Outgoing, OutgoingError, OutgoingTls};
use whimbrel_qemu::migrate::state_file::{self, Layout};

use crate::rig::{Engine, Guest, Lab, listening, moved, pairs, soon, to};

pub(crate) fn server(dir: &Path) -> Option<IncomingTls> {
    Some(IncomingTls { credentials_dir: dir.to_owned(), authorized_dn: "CN=host-a".to_owned() })
}

pub(crate) fn client(dir: &Path, hostname: &str) -> Option<OutgoingTls> {
    Some(OutgoingTls { credentials_dir: dir.to_owned(), hostname: hostname.to_owned() })
}

async fn succeeds(lab: &Lab, source: &Guest, onto: &Engine, dirs: &[PathBuf; 3], name: &str) {
    let destination = lab.start(onto, name, true).await;
    let address = destination.listens(server(&dirs[1])).await;
    let tls = client(&dirs[0], "host-b.qemu.whimbrel");
    moved(source, &destination, &to(address, tls)).await;
    destination.machine.cont().await.unwrap();
    if onto.version == "10.0" && !onto.fake {
        // What a guest came by (TLS) must not stand in the way of what it leaves by.
        destination.machine.stop().await.unwrap();
        let file = File::create(lab.dir.path().join("state")).unwrap();
        let (layout, progress) = (Layout::Mapped { channels: None }, watch::Sender::default());
        soon(state_file::save(&destination.machine, &file, layout, &progress)).await.unwrap();
    }
}

#[tokio::test]
async fn a_guest_moves_between_the_named_hosts_with_one_and_more_connections() {
    for (from, onto) in pairs() {
        let lab = Lab::new();
        let dirs = lab.tls(["host-a", "host-b", "host-c"]);
        let source = lab.start_running(&from, "source").await;
        succeeds(&lab, &source, &onto, &dirs, "destination").await;
        assert!(dirs[1].join("dh-params.pem").exists());
        let objects = source.machine.objects().await.unwrap();
        assert!(objects.iter().any(|id| id == "migration-tls"), "{objects:?}");
        outgoing::reset(&source.machine).await.unwrap();
        let objects = source.machine.objects().await.unwrap();
        assert!(!objects.iter().any(|id| id.starts_with("migration")), "{objects:?}");

        let source = lab.start_running(&from, "source-2").await;
        let destination = lab.start(&onto, "destination-2", true).await;
        let mut incoming = listening(server(&dirs[1]));
        incoming.stream.multifd_channels = Some(2);
        let address = destination.listens_as(&incoming).await;
        let mut settings = to(address, client(&dirs[0], "host-b.qemu.whimbrel"));
        settings.stream.multifd_channels = Some(2);
        moved(&source, &destination, &settings).await;
    }
}

#[tokio::test]
async fn a_destination_that_is_silent_in_the_handshake_is_cut_off() {
    for (from, onto) in pairs() {
        let lab = Lab::new();
        let dirs = lab.tls(["host-a", "host-b", "host-c"]);
        let source = lab.start_running(&from, "source").await;
        // Nobody accepts; the kernel lets clients connect all the same.
        let silent = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let address = silent.local_addr().unwrap();
        let settings = to(address, client(&dirs[0], "host-b.qemu.whimbrel"));
        let mut outgoing = Outgoing::start(&source.machine, &settings).await.unwrap();
        let error = outgoing.wait_connected(Duration::from_millis(500)).await.unwrap_err();
        assert!(matches!(error, OutgoingError::TookTooLong { .. }), "{error:?}");
        assert_eq!(source.process.cut(address.port()).unwrap(), 1);
        soon(outgoing.cancel(Duration::from_secs(20))).await.unwrap();
        source.reaches(&RunState::Running).await;
        outgoing::reset(&source.machine).await.unwrap();
        succeeds(&lab, &source, &onto, &dirs, "destination").await;
    }
}

/// To whatever point the migration gets, it must not complete.
async fn refused(source: &Guest, settings: &whimbrel_qemu::migrate::outgoing::OutgoingSettings) {
    let mut outgoing = Outgoing::start(&source.machine, settings).await.unwrap();
    let error = match soon(outgoing.wait_pre_switchover(&watch::Sender::default())).await {
        Err(error) => error,
        // A client that is refused may have filled the connection's buffers with a small guest.
        Ok(_) => outgoing.continue_to_completed(Duration::from_secs(20)).await.unwrap_err(),
    };
    assert!(
        matches!(&error, OutgoingError::Failed { run_state: RunState::Running, .. }),
        "{error:?}"
    );
}

#[tokio::test]
async fn another_host_of_the_pool_is_not_let_in() {
    for (from, onto) in pairs() {
        let lab = Lab::new();
        let dirs = lab.tls(["host-a", "host-b", "host-c"]);
        let source = lab.start_running(&from, "source").await;
        let destination = lab.start(&onto, "destination", true).await;
        let address = destination.listens(server(&dirs[1])).await;
        refused(&source, &to(address, client(&dirs[2], "host-b.qemu.whimbrel"))).await;
        let words = destination.process.last_words().join("\n");
        assert!(words.contains("CN=host-c"), "{words}");
        destination.killed().await;
        succeeds(&lab, &source, &onto, &dirs, "second-try").await;
    }
}

#[tokio::test]
async fn a_host_of_another_pool_is_not_let_in() {
    for (from, onto) in pairs() {
        let lab = Lab::new();
        let other = Lab::new();
        let dirs = lab.tls(["host-a", "host-b", "host-c"]);
        let foreign = other.tls(["host-a", "host-b", "host-c"]);
        let source = lab.start_running(&from, "source").await;
        let destination = lab.start(&onto, "destination", true).await;
        let address = destination.listens(server(&dirs[1])).await;
        refused(&source, &to(address, client(&foreign[0], "host-b.qemu.whimbrel"))).await;
        destination.killed().await;
        succeeds(&lab, &source, &onto, &dirs, "second-try").await;
    }
}

#[tokio::test]
async fn a_destination_with_another_name_gets_nothing() {
    for (from, onto) in pairs() {
        let lab = Lab::new();
        let dirs = lab.tls(["host-a", "host-b", "host-c"]);
        let source = lab.start_running(&from, "source").await;
        let destination = lab.start(&onto, "destination", true).await;
        let address = destination.listens(server(&dirs[1])).await;
        refused(&source, &to(address, client(&dirs[0], "host-c.qemu.whimbrel"))).await;
        destination.killed().await;
        succeeds(&lab, &source, &onto, &dirs, "second-try").await;
    }
}

#[tokio::test]
async fn a_source_without_tls_is_not_let_in() {
    for (from, onto) in pairs() {
        let lab = Lab::new();
        let dirs = lab.tls(["host-a", "host-b", "host-c"]);
        let source = lab.start_running(&from, "source").await;
        let destination = lab.start(&onto, "destination", true).await;
        let address = destination.listens(server(&dirs[1])).await;
        refused(&source, &to(address, None)).await;
        destination.killed().await;
        succeeds(&lab, &source, &onto, &dirs, "second-try").await;
    }
}
