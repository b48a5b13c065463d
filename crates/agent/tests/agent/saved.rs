//! A VM's state in a file: gone on from once, and never after its guest has run on.

use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::sync::Arc;

use whimbrel_agent::host::Host;
use whimbrel_agent::vm;
use whimbrel_api::agent::VmReport;
use whimbrel_api::vm::{StateFile, StoragePath, VmAction, VmState};
use whimbrel_api::{ApiError, ErrorCode, VmId};

use crate::place::{
    Place, Pool, definition, eventually, in_namespace, running, state, storage_name,
};

const VERSIONS: [&str; 2] = ["7.2", "10.0"];

fn at(path: &str) -> StateFile {
    StateFile { file: StoragePath::new(storage_name(), path).unwrap() }
}

fn file_of(place: &Place) -> PathBuf {
    place.dir().join("storage/web01.state")
}

async fn save(host: &Host, vm: VmId) -> Result<VmReport, ApiError> {
    host.vms.save(vm, at("web01.state")).await
}

async fn restore(host: &Host, vm: VmId) -> Result<VmReport, ApiError> {
    host.vms.restore(vm, at("web01.state")).await
}

fn refused<T: std::fmt::Debug>(told: Result<T, ApiError>) {
    assert_eq!(told.unwrap_err().code, ErrorCode::WrongState);
}

async fn act(host: &Host, vm: VmId, action: VmAction) -> Result<VmReport, ApiError> {
    host.vms.act(vm, action, action == VmAction::Stop).await
}

/// The VM is saved, no QEMU of it is left, and it goes on from its file.
async fn assert_saved(place: &Place, host: &Arc<Host>, vm: VmId) {
    let report = host.vms.report(vm).unwrap();
    assert_eq!(report.state, VmState::Stopped);
    assert_eq!(report.definition.saved.unwrap().file, at("web01.state").file);
    assert!(file_of(place).exists());
    place.assert_clean(host).await;
    assert_eq!(restore(host, vm).await.unwrap().state, VmState::Running);
    assert!(!file_of(place).exists());
}

/// The VM runs, and nothing is left from which it could go on.
async fn assert_runs_and_forgets(place: &Place, host: &Host, vm: VmId) {
    assert_eq!(state(host, vm), VmState::Running);
    assert_eq!(host.vms.report(vm).unwrap().definition.saved, None);
    assert!(!file_of(place).exists());
    act(host, vm, VmAction::Stop).await.unwrap();
    refused(restore(host, vm).await);
    assert!(!place.dir().join("watch/violations").exists());
}

#[test]
fn a_saved_vm_goes_on_once() {
    for version in VERSIONS {
        in_namespace(move || {
            let place = Pool::new().host_of_version("a", 7440, version);
            place.life(async |host| {
                let vm = running(&host).await.definition.id;
                let saved = save(&host, vm).await.unwrap();
                assert_eq!(saved.definition.saved.unwrap().mapped, version == "10.0");
                let mode = file_of(&place).metadata().unwrap().permissions().mode();
                assert_eq!(mode & 0o777, 0o600);
                refused(save(&host, vm).await);
                refused(act(&host, vm, VmAction::Start).await);
                refused(host.vms.restore(vm, at("another.state")).await);
                assert_saved(&place, &host, vm).await;
                refused(restore(&host, vm).await);
                assert_runs_and_forgets(&place, &host, vm).await;
            });
        });
    }
}

#[test]
fn a_vm_that_was_paused_is_so_when_it_is_restored() {
    in_namespace(|| {
        let place = Place::with_fake();
        let vm = place.life(async |host| {
            let vm = running(&host).await.definition.id;
            act(&host, vm, VmAction::Pause).await.unwrap();
            save(&host, vm).await.unwrap();
            vm
        });
        place.life(async |host| {
            assert_eq!(restore(&host, vm).await.unwrap().state, VmState::Paused);
            assert_eq!(act(&host, vm, VmAction::Resume).await.unwrap().state, VmState::Running);
        });
    });
}

#[test]
fn no_file_is_overwritten_and_none_outside_is_made() {
    in_namespace(|| {
        let place = Place::with_fake();
        place.life(async |host| {
            let vm = running(&host).await.definition.id;
            std::fs::write(file_of(&place), "somebody else's").unwrap();
            assert_eq!(save(&host, vm).await.unwrap_err().code, ErrorCode::Exists);
            std::os::unix::fs::symlink("/tmp", place.dir().join("storage/out")).unwrap();
            let out = host.vms.save(vm, at("out/web01.state")).await;
            assert_eq!(out.unwrap_err().code, ErrorCode::BadPath);
            assert_eq!(state(&host, vm), VmState::Running);
        });
        place.life(async |_host| {
            assert_eq!(std::fs::read(file_of(&place)).unwrap(), b"somebody else's");
        });
    });
}

#[test]
fn a_vm_that_cannot_be_saved_runs_on() {
    in_namespace(|| {
        let place = Place::with_fake();
        place.life(async |host| {
            let vm = running(&host).await.definition.id;
            place.failpoints("ledger.saved=error");
            save(&host, vm).await.unwrap_err();
            place.failpoints("");
            assert_eq!(state(&host, vm), VmState::Running);
            assert!(!file_of(&place).exists());
            save(&host, vm).await.unwrap();
            // One that is given up is gone, and the VM starts anew.
            act(&host, vm, VmAction::Stop).await.unwrap();
            assert!(!file_of(&place).exists());
            refused(restore(&host, vm).await);
            assert_eq!(act(&host, vm, VmAction::Start).await.unwrap().state, VmState::Running);
            assert_runs_and_forgets(&place, &host, vm).await;
        });
    });
}

#[test]
fn an_agent_that_dies_while_saving_leaves_a_guest_that_runs_or_a_state() {
    // (where it dies, whether the VM is saved)
    for (point, saved) in [("ledger.saved", false), ("vm.end", true)] {
        in_namespace(move || {
            let place = Place::with_fake();
            let vm = place.life(async |host| {
                let vm = running(&host).await.definition.id;
                place.failpoints(&format!("{point}=stall"));
                let at_work = Arc::clone(&host);
                let saving = tokio::spawn(async move { save(&at_work, vm).await });
                let there = async || {
                    let rows = host.ledger.vms().await.unwrap();
                    let noted = rows.iter().any(|row| row.definition.saved.is_some());
                    file_of(&place).metadata().is_ok_and(|file| file.len() > 0) && noted == saved
                };
                eventually(there).await;
                saving.abort();
                vm
            });
            assert_eq!(place.processes().len(), 1);
            place.failpoints("");
            place.life(async |host| {
                if saved {
                    assert_saved(&place, &host, vm).await;
                }
                eventually(async || state(&host, vm) == VmState::Running).await;
                assert_runs_and_forgets(&place, &host, vm).await;
            });
        });
    }
}

#[test]
fn an_agent_that_dies_while_restoring_leaves_a_state_or_a_guest_that_runs() {
    // (where it dies, whether the VM is still saved)
    for (point, saved) in [("vm.restore.note", true), ("vm.restore.cont", false)] {
        in_namespace(move || {
            let place = Place::with_fake();
            let vm = place.life(async |host| {
                let vm = running(&host).await.definition.id;
                save(&host, vm).await.unwrap();
                place.failpoints(&format!("{point}=stall"));
                let at_work = Arc::clone(&host);
                let restoring = tokio::spawn(async move { restore(&at_work, vm).await });
                let there = async || {
                    let rows = host.ledger.vms().await.unwrap();
                    let noted = rows.iter().any(|row| row.definition.saved.is_some());
                    place.processes().len() == 1 && noted == saved
                };
                eventually(there).await;
                restoring.abort();
                vm
            });
            place.failpoints("");
            place.life(async |host| {
                if saved {
                    assert_saved(&place, &host, vm).await;
                }
                eventually(async || state(&host, vm) == VmState::Running).await;
                assert_runs_and_forgets(&place, &host, vm).await;
            });
        });
    }
}

#[test]
fn a_saved_vm_is_deleted_with_its_state() {
    in_namespace(|| {
        let place = Place::with_fake();
        place.life(async |host| {
            let vm = vm::create(&host, definition()).await.unwrap().definition.id;
            refused(save(&host, vm).await);
            act(&host, vm, VmAction::Start).await.unwrap();
            save(&host, vm).await.unwrap();
            host.vms.delete(vm).await.unwrap();
            assert!(!file_of(&place).exists());
        });
    });
}
