//! The agent dies at any moment, and another life of it finds what is there.

use std::sync::Arc;
use std::time::Duration;

use whimbrel_agent::vm;
use whimbrel_agent::vm::spawn::{self, Purpose};
use whimbrel_api::vm::{VmAction, VmState};
use whimbrel_api::{Epoch, ErrorCode, MigrationId};
use whimbrel_migration::handoff::{Intent, Ownership, Standing};

use crate::place::{Place, definition, eventually, in_namespace, kill, running, start, state};

#[test]
fn vms_run_on_and_are_found_again() {
    in_namespace(|| {
        let place = Place::with_fake();
        let (id, pid) = place.life(async |host| {
            let report = running(&host).await;
            (report.definition.id, report.engine.unwrap().pid)
        });
        assert_eq!(place.processes(), [pid]);
        // As if the agent had died between a migration's end and the removal of its certificates.
        let left = place.config.run_dir().join(&place.run_folders()[0]).join("tls");
        std::fs::create_dir(&left).unwrap();
        place.life(async |host| {
            let report = host.vms.report(id).unwrap();
            assert_eq!(report.state, VmState::Running);
            assert_eq!(report.engine.unwrap().pid, pid);
            assert!(!left.exists());
            let paused = host.vms.act(id, VmAction::Pause, false).await.unwrap();
            assert_eq!(paused.state, VmState::Paused);
        });
        place.life(async |host| {
            assert_eq!(state(&host, id), VmState::Paused);
            let resumed = host.vms.act(id, VmAction::Resume, false).await.unwrap();
            assert_eq!(resumed.state, VmState::Running);
        });
        place.life(async |host| {
            assert_eq!(state(&host, id), VmState::Running);
            let stopped = host.vms.act(id, VmAction::Stop, false).await.unwrap();
            assert_eq!(stopped.state, VmState::Stopped);
            place.assert_clean(&host).await;
        });
    });
}

#[test]
fn a_qemu_that_died_meanwhile_is_a_crash_and_is_not_started_again() {
    in_namespace(|| {
        let place = Place::with_fake();
        let (id, pid) = place.life(async |host| {
            let report = running(&host).await;
            (report.definition.id, report.engine.unwrap().pid)
        });
        kill(pid);
        place.life(async |host| {
            eventually(async || matches!(state(&host, id), VmState::Crashed { .. })).await;
            place.assert_clean(&host).await;
            start(&host, id).await;
        });
    });
}

#[test]
fn a_silent_qemu_is_neither_alive_nor_dead() {
    in_namespace(|| {
        let place = Place::with_fake();
        let (id, pid) = place.life(async |host| {
            let report = running(&host).await;
            (report.definition.id, report.engine.unwrap().pid)
        });
        place.faults_of_running("silent:qmp");
        place.life(async |host| {
            assert!(matches!(state(&host, id), VmState::Unknown { .. }));
            for action in [VmAction::Start, VmAction::Stop, VmAction::Pause] {
                let refused = host.vms.act(id, action, false).await.unwrap_err();
                assert_eq!(refused.code, ErrorCode::WrongState, "{action:?}");
            }
            assert_eq!(place.processes(), [pid]);
            place.faults_of_running("");
            eventually(async || state(&host, id) == VmState::Running).await;
        });
        place.faults_of_running("silent:qmp");
        place.life(async |host| {
            host.vms.act(id, VmAction::Stop, true).await.unwrap();
            assert_eq!(state(&host, id), VmState::Stopped);
            place.assert_clean(&host).await;
        });
    });
}

#[test]
fn a_start_that_was_cut_off_is_swept_or_ended() {
    in_namespace(|| {
        let place = Place::with_fake();
        let id =
            place.life(async |host| vm::create(&host, definition()).await.unwrap().definition.id);
        // The process is there and not noted: nobody has let its guest run, so it is swept.
        place.failpoints("vm.spawned=stall");
        place.life(async |host| {
            let starting = {
                let host = Arc::clone(&host);
                tokio::spawn(async move { host.vms.act(id, VmAction::Start, false).await })
            };
            eventually(async || place.processes().len() == 1).await;
            starting.abort();
        });
        assert_eq!(place.processes().len(), 1);
        place.failpoints("");
        place.life(async |host| {
            assert_eq!(state(&host, id), VmState::Stopped);
            place.assert_clean(&host).await;
        });
        // It is noted and was asked for: the start is brought to its end.
        place.failpoints("vm.start.cont=stall");
        place.life(async |host| {
            let starting = {
                let host = Arc::clone(&host);
                tokio::spawn(async move { host.vms.act(id, VmAction::Start, false).await })
            };
            eventually(async || {
                host.ledger.vms().await.unwrap().iter().any(|row| row.run.is_some())
            })
            .await;
            starting.abort();
        });
        place.failpoints("");
        place.life(async |host| {
            assert_eq!(state(&host, id), VmState::Running);
            assert_eq!(place.processes().len(), 1);
        });
    });
}

#[test]
fn a_task_that_breaks_off_is_told_and_mended_by_a_restart() {
    in_namespace(|| {
        let place = Place::with_fake();
        let id = place.life(async |host| {
            let id = vm::create(&host, definition()).await.unwrap().definition.id;
            place.failpoints("vm.start.cont=panic");
            for _ in 0..2 {
                let broken = host.vms.act(id, VmAction::Start, false).await.unwrap_err();
                assert_eq!(broken.code, ErrorCode::Internal, "{broken}");
            }
            id
        });
        place.failpoints("");
        place.life(async |host| assert_eq!(state(&host, id), VmState::Running));
    });
}

#[test]
fn a_creation_that_was_cut_off_leaves_no_file() {
    in_namespace(|| {
        let place = Place::with_fake();
        let asked = definition();
        let id = asked.id;
        let folder = place.dir().join(format!("storage/vms/{id}"));
        place.life(async |host| {
            // As if it had died after the first file: named in the journal, without a VM.
            let made = vm::create(&host, asked.clone()).await.unwrap();
            let disk = &made.definition.disks[0];
            let file = whimbrel_agent::ledger::Resource::DiskFile {
                vm: id,
                storage: disk.file.storage.clone(),
                path: disk.file.path.clone(),
            };
            host.ledger.journal(&id.to_string(), &[file]).await.unwrap();
            host.ledger.remove_vm(id).await.unwrap();
        });
        assert!(folder.exists());
        place.life(async |host| {
            assert!(!folder.exists());
            place.assert_clean(&host).await;
        });
    });
}

#[test]
fn what_is_another_hosts_is_ended_and_forgotten() {
    in_namespace(|| {
        let place = Place::with_fake();
        let id = place.life(async |host| {
            let report = running(&host).await;
            let record = Ownership {
                vm: report.definition.id,
                epoch: report.epoch.next(),
                migration: Some(MigrationId::new()),
                intent: Intent::Run,
                standing: Standing::Gone { to: "host-b".parse().unwrap() },
            };
            host.ledger.persist(&record).await.unwrap();
            report.definition.id
        });
        place.life(async |host| {
            assert_eq!(host.vms.report(id).unwrap_err().code, ErrorCode::NotFound);
            place.assert_clean(&host).await;
            let disk = place.dir().join(format!("storage/vms/{id}/vda.qcow2"));
            assert!(disk.exists(), "the disk is the new owner's");
        });
    });
}

#[test]
fn a_vm_that_had_just_arrived_is_found_by_its_migration() {
    in_namespace(|| {
        let place = Place::with_fake();
        let (id, pid) = place.life(async |host| {
            let made = vm::create(&host, definition()).await.unwrap();
            let arriving = made.definition.clone();
            host.ledger.remove_vm(arriving.id).await.unwrap();
            let migration = MigrationId::new();
            let spawned =
                spawn::spawn(&host, &arriving, Purpose::Receive(migration)).await.unwrap();
            let owned = Ownership {
                vm: arriving.id,
                epoch: Epoch(2),
                migration: Some(migration),
                intent: Intent::Pause,
                standing: Standing::Owned,
            };
            host.ledger.persist(&owned).await.unwrap();
            (arriving.id, spawned.process.identity().pid)
        });
        place.life(async |host| {
            let report = host.vms.report(id).unwrap();
            assert_eq!(report.state, VmState::Paused);
            assert_eq!((report.epoch, report.engine.unwrap().pid), (Epoch(2), pid));
        });
    });
}

#[test]
fn a_vm_of_an_open_migration_is_nobodys_to_touch() {
    in_namespace(|| {
        let place = Place::with_fake();
        let (id, pid, migration) = place.life(async |host| {
            let report = running(&host).await;
            let migration = MigrationId::new();
            let record = Ownership {
                vm: report.definition.id,
                epoch: report.epoch.next(),
                migration: Some(migration),
                intent: Intent::Run,
                standing: Standing::Released { to: "host-b".parse().unwrap() },
            };
            host.ledger.persist(&record).await.unwrap();
            (report.definition.id, report.engine.unwrap().pid, migration)
        });
        place.life(async |host| {
            let ask = "host-b".parse().unwrap();
            assert_eq!(state(&host, id), VmState::Unresolved { migration, ask });
            for (action, force) in
                [(VmAction::Start, false), (VmAction::Resume, false), (VmAction::Stop, true)]
            {
                let refused = host.vms.act(id, action, force).await.unwrap_err();
                assert_eq!(refused.code, ErrorCode::WrongState, "{action:?}");
            }
            tokio::time::sleep(Duration::from_millis(100)).await;
            assert_eq!(place.processes(), [pid]);
        });
    });
}

#[test]
fn two_agents_on_one_folder_are_one_too_many() {
    in_namespace(|| {
        let place = Place::with_fake();
        place.life(async |_host| {
            let second = whimbrel_agent::Agent::prepare(place.config.clone()).await;
            assert!(matches!(second, Err(whimbrel_agent::AgentError::Taken { .. })), "{second:?}");
        });
    });
}
