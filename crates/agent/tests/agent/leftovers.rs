//! What could not be taken down when it was time is taken down later, and nothing else is.

use std::collections::HashSet;
use std::sync::Arc;

use whimbrel_agent::host::Host;
use whimbrel_agent::ledger::Resource;
use whimbrel_agent::{metrics, sweep, vm};
use whimbrel_api::VmId;
use whimbrel_api::pool::Network;
use whimbrel_api::vm::{VmAction, VmDefinition, VmState};

use crate::place::{Place, definition, eventually, in_namespace, running, start, state};

async fn sweep(host: &Arc<Host>) {
    sweep::once(host, &mut HashSet::new()).await.unwrap();
}

async fn left_by_metrics(host: &Arc<Host>) -> Option<String> {
    let text = metrics::scrape(host).await.text();
    text.lines().find_map(|line| line.strip_prefix("whimbrel_agent_sweep_left ").map(str::to_owned))
}

/// A second VM beside that of [`definition`].
fn another() -> VmDefinition {
    VmDefinition { name: "web02".parse().unwrap(), ..definition() }
}

#[test]
fn what_was_not_taken_down_is_swept_while_the_agent_lives() {
    in_namespace(|| {
        let place = Place::with_fake();
        let life = place.live();
        let host = Arc::clone(&life.host);
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let id = life.spawn(async move { running(&host).await.definition.id }).await;
            place.failpoints("vm.take-down=error");
            let stopped = life.host.vms.act(id, VmAction::Stop, true).await.unwrap();
            assert_eq!(stopped.state, VmState::Stopped);
            assert_eq!(place.run_folders().len(), 1);
            place.failpoints("");
            eventually(async || place.run_folders().is_empty()).await;
            place.assert_clean(&life.host).await;
        });
        life.kill();
    });
}

#[test]
fn a_qemu_that_was_not_ended_keeps_what_it_has_until_it_is() {
    in_namespace(|| {
        let place = Place::with_fake();
        place.life(async |host| {
            let id = vm::create(&host, definition()).await.unwrap().definition.id;
            for (point, fault) in [("vm.spawned=error;", ""), ("", "refuse:cont")] {
                place.failpoints(&format!("{point}vm.end=error"));
                place.faults(fault);
                host.vms.act(id, VmAction::Start, false).await.unwrap_err();
                place.faults("");
                let (run, pid) = (place.run_folders(), place.processes());
                assert_eq!((run.len(), pid.len()), (1, 1), "{point}{fault}");
                if point.is_empty() {
                    sweep(&host).await;
                    assert_eq!((place.run_folders(), place.processes()), (run, pid));
                    assert_eq!(left_by_metrics(&host).await.as_deref(), Some("1"));
                }
                place.failpoints("");
                sweep(&host).await;
                assert_eq!(left_by_metrics(&host).await.as_deref(), Some("0"));
                place.assert_clean(&host).await;
            }
            start(&host, id).await;
        });
    });
}

#[test]
fn what_somebody_has_or_makes_is_not_swept() {
    in_namespace(|| {
        let place = Place::with_fake();
        place.life(async |host| {
            let blue =
                Network { name: "blue".parse().unwrap(), bridge: "wb0".to_owned(), uplink: None };
            host.put_network(&blue).await.unwrap();
            let id = running(&host).await.definition.id;
            let lent = host.vms.lend(id, whimbrel_api::MigrationId::new()).await.unwrap();
            // In the midst of a start: its process is noted nowhere yet.
            let second = vm::create(&host, another()).await.unwrap().definition.id;
            place.failpoints("vm.spawned=stall");
            let starting = {
                let host = Arc::clone(&host);
                tokio::spawn(async move { host.vms.act(second, VmAction::Start, false).await })
            };
            eventually(async || place.processes().len() == 2).await;
            sweep(&host).await;
            assert_eq!((place.processes().len(), place.run_folders().len()), (2, 2));
            place.failpoints("");
            starting.await.unwrap().unwrap();
            host.vms.give_back(lent).await;
            sweep(&host).await;
            for vm in [id, second] {
                assert_eq!(state(&host, vm), VmState::Running);
            }
            assert_eq!(place.processes().len(), 2);
            assert!(host.networks.bridge_exists("wb0").await.unwrap());
        });
    });
}

#[test]
fn files_and_bridges_of_what_never_was_are_swept() {
    in_namespace(|| {
        let place = Place::with_fake();
        place.life(async |host| {
            let (id, path) = (VmId::new(), "vms/x/vda.qcow2".to_owned());
            let file = place.dir().join("storage").join(&path);
            std::fs::create_dir_all(file.parent().unwrap()).unwrap();
            std::fs::write(&file, "").unwrap();
            let storage = place.storage().name;
            let left = Resource::DiskFile { vm: id, storage, path };
            host.ledger.journal(&id.to_string(), &[left]).await.unwrap();
            // The network's first bridge is nobody's once it has another.
            let mut blue =
                Network { name: "blue".parse().unwrap(), bridge: "wb0".to_owned(), uplink: None };
            host.put_network(&blue).await.unwrap();
            blue.bridge = "wb1".to_owned();
            host.put_network(&blue).await.unwrap();
            {
                let _creating = host.in_hand.hold(&id.to_string());
                sweep(&host).await;
                assert!(file.exists(), "somebody is creating it");
            }
            sweep(&host).await;
            assert!(!file.exists());
            assert!(!host.networks.bridge_exists("wb0").await.unwrap());
            assert!(host.networks.bridge_exists("wb1").await.unwrap());
            let left = host.ledger.journaled().await.unwrap();
            assert_eq!(left.len(), 1, "the present bridge alone: {left:?}");
        });
    });
}

#[test]
fn a_creation_that_is_asked_for_again_waits_for_the_first() {
    in_namespace(|| {
        let place = Place::with_fake();
        place.life(async |host| {
            let asked = definition();
            let (first, second) =
                tokio::join!(vm::create(&host, asked.clone()), vm::create(&host, asked.clone()));
            assert_eq!(first.unwrap(), second.unwrap());
            start(&host, asked.id).await;
        });
    });
}
