//! A VM's life on one host.

use whimbrel_agent::vm;
use whimbrel_api::ErrorCode;
use whimbrel_api::vm::{ImageFormat, Import, StoragePath, VmAction, VmState};

use crate::place::{
    Place, definition, eventually, in_namespace, kill, running, start, state, storage_name,
};

#[test]
fn created_started_stopped_deleted() {
    in_namespace(|| {
        let place = Place::with_fake();
        let image = place.dir().join("storage/image.raw");
        std::fs::write(image, vec![1_u8; 1 << 20]).unwrap();
        place.life(async |host| {
            let mut asked = definition();
            let mut imported = asked.disks[0].clone();
            imported.name = "vdb".parse().unwrap();
            imported.size_bytes = 0;
            imported.import = Some(Import {
                file: StoragePath::new(storage_name(), "image.raw").unwrap(),
                format: ImageFormat::Raw,
            });
            asked.disks.push(imported);
            let made = vm::create(&host, asked.clone()).await.unwrap();
            let id = made.definition.id;
            assert_eq!(made.state, VmState::Stopped);
            assert_eq!(made.definition.machine, "pc-q35-7.2");
            assert_eq!(made.definition.disks[1].size_bytes, 1 << 20);
            let folder = place.dir().join(format!("storage/vms/{id}"));
            assert!(folder.join("vda.qcow2").exists() && folder.join("vdb.qcow2").exists());
            // The same request again is the same VM; another one with its id is refused.
            assert_eq!(vm::create(&host, asked.clone()).await.unwrap(), made);
            asked.vcpus = 2;
            let other = vm::create(&host, asked).await.unwrap_err();
            assert_eq!(other.code, ErrorCode::Exists);

            let report = start(&host, id).await;
            let engine = report.engine.unwrap();
            assert_eq!((engine.version.as_str(), engine.accelerator.as_str()), ("7.2.22", "tcg"));
            assert_eq!(place.processes(), [engine.pid]);
            let twice = host.vms.act(id, VmAction::Start, false).await.unwrap_err();
            assert_eq!(twice.code, ErrorCode::WrongState);
            assert_eq!(host.vms.delete(id).await.unwrap_err().code, ErrorCode::WrongState);

            let stopped = host.vms.act(id, VmAction::Stop, false).await.unwrap();
            assert_eq!(stopped.state, VmState::Stopped);
            place.assert_clean(&host).await;
            start(&host, id).await;
            let stopped = host.vms.act(id, VmAction::Stop, true).await.unwrap();
            assert_eq!(stopped.state, VmState::Stopped);
            place.assert_clean(&host).await;

            host.vms.delete(id).await.unwrap();
            assert!(!folder.exists());
            assert_eq!(host.vms.report(id).unwrap_err().code, ErrorCode::NotFound);
            assert_eq!(host.vms.delete(id).await.unwrap_err().code, ErrorCode::NotFound);
            let again = definition();
            let again = whimbrel_api::vm::VmDefinition { id, ..again };
            assert_eq!(vm::create(&host, again).await.unwrap_err().code, ErrorCode::Exists);
        });
    });
}

#[test]
fn what_cannot_be_made_leaves_nothing() {
    in_namespace(|| {
        let place = Place::with_fake();
        place.life(async |host| {
            let mut cases = Vec::new();
            let mut case = definition();
            case.machine = "pc-q35-99.9".to_owned();
            cases.push((ErrorCode::Engine, case));
            let mut case = definition();
            case.cpu = "Skylake-Client".to_owned();
            cases.push((ErrorCode::Engine, case));
            let mut case = definition();
            case.memory_bytes = 1;
            cases.push((ErrorCode::OutOfRange, case));
            let mut case = definition();
            case.disks[0].file.storage = "elsewhere".parse().unwrap();
            cases.push((ErrorCode::NotFound, case));
            for (path, code) in
                [("absent.raw", ErrorCode::BadPath), ("bad.raw", ErrorCode::BadImage)]
            {
                std::fs::write(place.dir().join("storage/bad.raw"), b"QFI\xfb....").unwrap();
                let mut case = definition();
                // The second disk is looked at before the first one is made.
                let mut second = case.disks[0].clone();
                second.name = "vdb".parse().unwrap();
                second.import = Some(Import {
                    file: StoragePath::new(storage_name(), path).unwrap(),
                    format: ImageFormat::Raw,
                });
                case.disks.push(second);
                cases.push((code, case));
            }
            for (code, case) in cases {
                let id = case.id;
                let refused = vm::create(&host, case).await.unwrap_err();
                assert_eq!(refused.code, code, "{refused}");
                assert!(host.vms.report(id).is_err());
                assert!(!place.dir().join(format!("storage/vms/{id}")).exists());
            }
            place.assert_clean(&host).await;
        });
    });
}

#[test]
fn orders_that_do_not_fit_are_refused() {
    in_namespace(|| {
        let place = Place::with_fake();
        place.life(async |host| {
            let made = vm::create(&host, definition()).await.unwrap();
            let id = made.definition.id;
            for action in [VmAction::Pause, VmAction::Resume] {
                let refused = host.vms.act(id, action, false).await.unwrap_err();
                assert_eq!(refused.code, ErrorCode::WrongState, "{action:?}");
            }
            let lend = host.vms.lend(id, whimbrel_api::MigrationId::new()).await.unwrap_err();
            assert_eq!(lend.code, ErrorCode::WrongState);
            assert_eq!(host.vms.open_console(id).await.unwrap_err().code, ErrorCode::WrongState);
            // Stopping what is stopped is what was asked for.
            host.vms.act(id, VmAction::Stop, false).await.unwrap();
        });
    });
}

#[test]
fn a_qemu_that_dies_is_a_crash_that_stays_told() {
    in_namespace(|| {
        let place = Place::with_fake();
        let id = place.life(async |host| {
            let report = running(&host).await;
            let id = report.definition.id;
            kill(report.engine.unwrap().pid);
            eventually(async || matches!(state(&host, id), VmState::Crashed { .. })).await;
            let VmState::Crashed { why } = state(&host, id) else { unreachable!() };
            assert!(why.contains("signal 9"), "{why}");
            eventually(async || place.run_folders().is_empty()).await;
            id
        });
        place.life(async |host| {
            assert!(matches!(state(&host, id), VmState::Crashed { .. }));
            start(&host, id).await;
            host.vms.act(id, VmAction::Stop, true).await.unwrap();
            place.assert_clean(&host).await;
        });
    });
}

#[test]
fn a_qemu_whose_session_is_lost_is_found_again_by_its_task() {
    in_namespace(|| {
        let place = Place::with_fake();
        place.life(async |host| {
            let report = running(&host).await;
            let (id, pid) = (report.definition.id, report.engine.unwrap().pid);
            for _ in 0..2 {
                place.faults("silent:qmp");
                assert_ne!(place.cut_sessions(), 0);
                eventually(async || matches!(state(&host, id), VmState::Unknown { .. })).await;
                let refused = host.vms.act(id, VmAction::Pause, false).await.unwrap_err();
                assert_eq!(refused.code, ErrorCode::WrongState);
                place.faults("");
                eventually(async || state(&host, id) == VmState::Running).await;
                assert_eq!(place.processes(), [pid]);
            }
            host.vms.act(id, VmAction::Pause, false).await.unwrap();
            host.vms.act(id, VmAction::Stop, true).await.unwrap();
            place.assert_clean(&host).await;
        });
    });
}

#[test]
fn a_guest_that_stands_still_unasked_is_let_run_or_told() {
    in_namespace(|| {
        let place = Place::with_fake();
        place.life(async |host| {
            let id = running(&host).await.definition.id;
            host.vms.act(id, VmAction::Pause, false).await.unwrap();
            place.faults("lie:cont");
            host.vms.act(id, VmAction::Resume, false).await.unwrap();
            assert_ne!(place.cut_sessions(), 0);
            eventually(async || matches!(state(&host, id), VmState::Crashed { .. })).await;
            let VmState::Crashed { why } = state(&host, id) else { unreachable!() };
            assert!(why.contains("stands still (paused)"), "{why}");
            place.faults("");
            let resumed = host.vms.act(id, VmAction::Resume, false).await.unwrap();
            assert_eq!(resumed.state, VmState::Running);
            host.vms.act(id, VmAction::Stop, true).await.unwrap();
            place.assert_clean(&host).await;
        });
    });
}

#[test]
fn a_start_that_fails_leaves_nothing_and_the_next_one_works() {
    in_namespace(|| {
        let place = Place::with_fake();
        place.life(async |host| {
            let id = vm::create(&host, definition()).await.unwrap().definition.id;
            for point in ["vm.start.spawn", "vm.spawned", "vm.start.cont"] {
                place.failpoints(&format!("{point}=error"));
                let failed = host.vms.act(id, VmAction::Start, false).await.unwrap_err();
                assert_eq!(failed.code, ErrorCode::Internal, "{point}");
                assert_eq!(state(&host, id), VmState::Stopped, "{point}");
                place.assert_clean(&host).await;
            }
            place.failpoints("");
            for fault in ["refuse:start", "die:start", "refuse:cont", "die:cont"] {
                place.faults(fault);
                let failed = host.vms.act(id, VmAction::Start, false).await.unwrap_err();
                assert_eq!(failed.code, ErrorCode::Engine, "{fault}: {failed}");
                assert_eq!(state(&host, id), VmState::Stopped, "{fault}");
                place.assert_clean(&host).await;
            }
            place.faults("");
            start(&host, id).await;
        });
    });
}

#[test]
fn a_guest_that_ignores_the_power_button_runs_on() {
    in_namespace(|| {
        let place = Place::with_fake();
        place.life(async |host| {
            let id = running(&host).await.definition.id;
            place.faults("lie:system_powerdown");
            let stopping = host.vms.act(id, VmAction::Stop, false);
            tokio::pin!(stopping);
            // While it is waited for, the VM takes other orders; a forced stop ends both.
            tokio::select! {
                early = &mut stopping => panic!("{early:?}"),
                paused = host.vms.act(id, VmAction::Pause, false) => {
                    assert_eq!(paused.unwrap().state, VmState::Paused);
                }
            }
            let forced = host.vms.act(id, VmAction::Stop, true).await.unwrap();
            assert_eq!(forced.state, VmState::Stopped);
            assert_eq!(stopping.await.unwrap().state, VmState::Stopped);
            place.assert_clean(&host).await;
        });
    });
}
