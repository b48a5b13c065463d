//! A migration borrows a VM by value, and takes a VM in.

use whimbrel_agent::vm::spawn::{self, Purpose};
use whimbrel_agent::vm::{self, RunningVm};
use whimbrel_api::vm::{VmAction, VmState};
use whimbrel_api::{Epoch, ErrorCode, MigrationId};
use whimbrel_migration::handoff::{Intent, Ownership, Standing};

use crate::place::{Place, definition, eventually, in_namespace, running, state};

#[test]
fn a_lent_vm_takes_no_other_orders_and_comes_back() {
    in_namespace(|| {
        let place = Place::with_fake();
        place.life(async |host| {
            let id = running(&host).await.definition.id;
            let migration = MigrationId::new();
            let lent = host.vms.lend(id, migration).await.unwrap();
            assert_eq!(state(&host, id), VmState::Migrating { migration });
            for action in [VmAction::Start, VmAction::Stop, VmAction::Pause, VmAction::Resume] {
                let refused = host.vms.act(id, action, true).await.unwrap_err();
                assert_eq!(refused.code, ErrorCode::Migrating, "{action:?}");
            }
            assert_eq!(host.vms.delete(id).await.unwrap_err().code, ErrorCode::Migrating);
            let twice = host.vms.lend(id, MigrationId::new()).await.unwrap_err();
            assert_eq!(twice.code, ErrorCode::Migrating);
            assert!(host.vms.open_console(id).await.is_ok());
            let ask = "host-b".parse().unwrap();
            host.vms.loan_news(id, VmState::Unresolved { migration, ask }).await;
            assert_eq!(state(&host, id).word(), "unresolved");

            // It stayed: the ledger has a later epoch by then.
            let record =
                Ownership { epoch: Epoch(3), migration: Some(migration), ..lent.ownership.clone() };
            host.ledger.persist(&record).await.unwrap();
            host.vms.give_back(lent).await;
            let report = host.vms.report(id).unwrap();
            assert_eq!((report.state, report.epoch), (VmState::Running, Epoch(3)));
            host.vms.act(id, VmAction::Stop, false).await.unwrap();
            place.assert_clean(&host).await;
        });
    });
}

#[test]
fn a_qemu_that_ends_during_the_loan_is_a_crash() {
    in_namespace(|| {
        let place = Place::with_fake();
        place.life(async |host| {
            let id = running(&host).await.definition.id;
            let lent = host.vms.lend(id, MigrationId::new()).await.unwrap();
            lent.qemu.process.kill_and_wait(crate::place::PATIENCE).await.unwrap();
            assert_eq!(state(&host, id).word(), "migrating");
            host.vms.give_back_ended(id, Some("it fell over".to_owned())).await;
            assert_eq!(state(&host, id), VmState::Crashed { why: "it fell over".to_owned() });
            place.assert_clean(&host).await;
        });
    });
}

#[test]
fn a_vm_that_has_moved_is_forgotten_and_its_disk_kept() {
    in_namespace(|| {
        let place = Place::with_fake();
        let id = place.life(async |host| {
            let id = running(&host).await.definition.id;
            let migration = MigrationId::new();
            host.vms.forget(id).await;
            assert_eq!(state(&host, id), VmState::Running, "what is not lent is not forgotten");
            let lent = host.vms.lend(id, migration).await.unwrap();
            spawn::destroy(&host, &lent.qemu).await.unwrap();
            let gone = Ownership {
                epoch: Epoch(2),
                migration: Some(migration),
                standing: Standing::Gone { to: "host-b".parse().unwrap() },
                ..lent.ownership
            };
            host.ledger.persist(&gone).await.unwrap();
            host.vms.forget(id).await;
            host.vms.forget(id).await;
            assert_eq!(host.vms.report(id).unwrap_err().code, ErrorCode::NotFound);
            place.assert_clean(&host).await;
            assert!(place.dir().join(format!("storage/vms/{id}/vda.qcow2")).exists());
            id
        });
        place.life(async |host| assert!(host.vms.report(id).is_err()));
    });
}

#[test]
fn an_arriving_vm_is_taken_in_or_taken_down() {
    in_namespace(|| {
        let place = Place::with_fake();
        place.life(async |host| {
            let made = vm::create(&host, definition()).await.unwrap();
            let arriving = made.definition;
            host.vms.delete(arriving.id).await.unwrap();
            let file = place.dir().join("storage").join(&arriving.disks[0].file.path);
            std::fs::create_dir_all(file.parent().unwrap()).unwrap();
            std::fs::write(&file, "").unwrap();
            nix::unistd::chown(&file, Some(65534.into()), Some(65534.into())).unwrap();

            // A failed try and the next one do not meet.
            let first = MigrationId::new();
            let failed = spawn::spawn(&host, &arriving, Purpose::Receive(first)).await.unwrap();
            let second = MigrationId::new();
            let spawned = spawn::spawn(&host, &arriving, Purpose::Receive(second)).await.unwrap();
            assert_ne!(failed.run, spawned.run);
            spawn::destroy(&host, &failed).await.unwrap();
            assert_eq!(place.run_folders(), std::slice::from_ref(&spawned.run));
            assert!(host.vms.report(arriving.id).is_err());

            let ownership = Ownership {
                vm: arriving.id,
                epoch: Epoch(2),
                migration: Some(second),
                intent: Intent::Run,
                standing: Standing::Owned,
            };
            host.ledger.persist(&ownership).await.unwrap();
            let pid = spawned.process.identity().pid;
            host.vms.adopt_incoming(&host, RunningVm { qemu: spawned, ownership }).await.unwrap();
            let report = host.vms.report(arriving.id).unwrap();
            assert_eq!((report.epoch, report.engine.unwrap().pid), (Epoch(2), pid));
            host.vms.act(arriving.id, VmAction::Stop, true).await.unwrap();
            eventually(async || state(&host, arriving.id) == VmState::Stopped).await;
            place.assert_clean(&host).await;
        });
    });
}
