//! Once with the real QEMU: 64 MiB, a card in a bridge, a disk without a system on it.

use std::path::Path;

use whimbrel_agent::vm;
use whimbrel_api::pool::Network;
use whimbrel_api::vm::{Nic, VmAction, VmState};

use crate::place::{Place, definition, in_namespace, start, state};

#[test]
fn the_real_qemu_starts_survives_the_agent_and_stops() {
    let engine = Path::new("/usr/bin/qemu-system-x86_64");
    assert!(engine.exists(), "install the package qemu-system-x86");
    in_namespace(|| {
        let place = Place::with_engine(Path::new("/usr/bin/qemu-system-x86_64"));
        let (id, pid) = place.life(async |host| {
            let network =
                Network { name: "blue".parse().unwrap(), bridge: "wb0".to_owned(), uplink: None };
            host.put_network(&network).await.unwrap();
            let mut asked = definition();
            asked.nics =
                vec![Nic { network: network.name.clone(), mac: "52:54:00:00:00:01".to_owned() }];
            let made = vm::create(&host, asked).await.unwrap();
            let id = made.definition.id;
            let report = start(&host, id).await;
            let used = host.delete_network(&network.name).await.unwrap_err();
            assert_eq!(used.code, whimbrel_api::ErrorCode::InUse);
            assert_eq!(links().iter().filter(|link| link.starts_with("wt")).count(), 1);
            let mobility = host.vms.mobility(id).await.unwrap();
            assert!(mobility.blockers.is_empty(), "{mobility:?}");
            assert!(mobility.cpu_features.contains("sse2"), "{mobility:?}");
            let facts = host.report().await;
            assert!(facts.engines[0].machines.iter().any(|machine| machine == "pc-q35-7.2"));
            assert_eq!(facts.networks, [network.name]);
            (id, report.engine.unwrap().pid)
        });
        place.life(async |host| {
            let report = host.vms.report(id).unwrap();
            assert_eq!(report.state, VmState::Running);
            assert_eq!(report.engine.unwrap().pid, pid);
            let paused = host.vms.act(id, VmAction::Pause, false).await.unwrap();
            assert_eq!(paused.state, VmState::Paused);
        });
        place.life(async |host| {
            assert_eq!(state(&host, id), VmState::Paused);
            host.vms.act(id, VmAction::Resume, false).await.unwrap();
            let stopped = host.vms.act(id, VmAction::Stop, true).await.unwrap();
            assert_eq!(stopped.state, VmState::Stopped);
            assert!(links().iter().all(|link| !link.starts_with("wt")), "{:?}", links());
            host.vms.delete(id).await.unwrap();
            host.delete_network(&"blue".parse().unwrap()).await.unwrap();
            assert!(!links().contains(&"wb0".to_owned()));
            place.assert_clean(&host).await;
        });
    });
}

/// The interfaces of this namespace.
fn links() -> Vec<String> {
    let shown = std::process::Command::new("ip").args(["-o", "link"]).output().unwrap();
    let text = String::from_utf8(shown.stdout).unwrap();
    let name = |line: &str| line.split([':', '@']).nth(1).unwrap().trim().to_owned();
    text.lines().map(name).collect()
}
