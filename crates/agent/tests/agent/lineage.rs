//! Snapshots, templates and clones, with real images: what a disk reads is what it read then, and nothing is left over.

use std::collections::{BTreeSet, HashSet};
use std::path::PathBuf;
use std::process::Command;
use std::sync::Arc;

use whimbrel_agent::host::Host;
use whimbrel_agent::storage::space::{self, Wanted};
use whimbrel_agent::{sweep, vm};
use whimbrel_api::agent::VmReport;
use whimbrel_api::lineage::{Origin, is_own};
use whimbrel_api::vm::{ImageFormat, StoragePath, VmAction, VmDefinition, VmState};
use whimbrel_api::{ApiError, ErrorCode, Name, VmId};

use crate::place::{Place, definition, eventually, in_namespace, start, storage_name};

const CHUNK_BYTES: usize = 64 << 10;

fn name(text: &str) -> Name {
    text.parse().unwrap()
}

fn at(place: &Place, file: &StoragePath) -> PathBuf {
    place.dir().join("storage").join(&file.path)
}

/// Fills the beginning of a VM's disk, as its guest would.
fn write(place: &Place, vm: &VmDefinition, byte: u8) {
    let disk = &vm.disks[0];
    let order = format!("write -P {byte} 0 {CHUNK_BYTES}");
    let mut io = Command::new("qemu-io");
    io.args(["-f", disk.format.as_str(), "-c", &order]).arg(at(place, &disk.file));
    let done = io.output().unwrap();
    assert!(done.status.success(), "{done:?}");
}

/// What its guest would read there: by the definition's own layers, and by what the headers say, which is the same.
fn read(place: &Place, vm: &VmDefinition) -> u8 {
    let disk = &vm.disks[0];
    let mut below = serde_json::Value::Null;
    let own = (disk.file.clone(), disk.format);
    let layers = disk.layers.iter().map(|layer| (layer.file.clone(), layer.format));
    for (file, format) in std::iter::once(own).chain(layers).collect::<Vec<_>>().iter().rev() {
        let mut node = serde_json::json!({
            "driver": format.as_str(), "file": { "driver": "file", "filename": at(place, file) },
        });
        if *format == ImageFormat::Qcow2 {
            node["backing"] = below;
        }
        below = node;
    }
    let by_header = at(place, &disk.file);
    let named = [format!("json:{below}"), by_header.to_str().unwrap().to_owned()];
    let bytes = named.map(|source| {
        let flat = place.dir().join("flat.raw");
        let done =
            Command::new("qemu-img").args(["convert", "-O", "raw", &source]).arg(&flat).output();
        assert!(done.as_ref().unwrap().status.success(), "{done:?}");
        let content = std::fs::read(&flat).unwrap();
        assert!(content[..CHUNK_BYTES].iter().all(|byte| *byte == content[0]));
        content[0]
    });
    assert_eq!(bytes[0], bytes[1]);
    bytes[0]
}

/// The files in a VM's folder are those that its definition names, and no more.
fn assert_files(place: &Place, vm: &VmDefinition) {
    let folder = place.dir().join(format!("storage/vms/{}", vm.id));
    let found: BTreeSet<PathBuf> =
        std::fs::read_dir(&folder).unwrap().map(|entry| entry.unwrap().path()).collect();
    let frozen = vm.snapshots.iter().flat_map(|s| &s.disks).flat_map(|disk| &disk.layers);
    let layers = vm.disks.iter().flat_map(|disk| &disk.layers).chain(frozen);
    let files = vm.disks.iter().map(|disk| &disk.file).chain(layers.map(|layer| &layer.file));
    let own: BTreeSet<PathBuf> =
        files.filter(|file| is_own(vm.id, file)).map(|file| at(place, file)).collect();
    assert_eq!(found, own);
}

async fn made(host: &Arc<Host>, text: &str) -> VmDefinition {
    let asked = VmDefinition { name: name(text), ..definition() };
    vm::create(host, asked).await.unwrap().definition
}

async fn take(host: &Host, vm: VmId, snapshot: &str) -> VmDefinition {
    host.vms.take_snapshot(vm, name(snapshot)).await.unwrap().definition
}

async fn back(host: &Host, vm: VmId, snapshot: &str) -> VmDefinition {
    host.vms.revert(vm, name(snapshot)).await.unwrap().definition
}

async fn without(host: &Host, vm: VmId, snapshot: &str) -> VmDefinition {
    host.vms.delete_snapshot(vm, name(snapshot)).await.unwrap().definition
}

async fn clone(
    host: &Arc<Host>,
    of: VmId,
    linked: bool,
    snapshot: Option<&str>,
) -> Result<VmReport, ApiError> {
    let origin = Origin { vm: of, snapshot: snapshot.map(name), linked };
    let mut asked = VmDefinition { name: name("copy"), origin: Some(origin), ..definition() };
    if !linked {
        asked.disks[0].format = ImageFormat::Raw;
    }
    vm::create(host, asked).await
}

fn refused<T: std::fmt::Debug>(code: ErrorCode, told: Result<T, ApiError>) {
    assert_eq!(told.unwrap_err().code, code);
}

#[test]
fn a_disk_reads_as_it_did_at_each_snapshot() {
    in_namespace(|| {
        let place = Place::with_fake();
        place.life(async |host| {
            let vm = made(&host, "web01").await;
            let id = vm.id;
            write(&place, &vm, 1);
            write(&place, &take(&host, id, "one").await, 2);
            write(&place, &take(&host, id, "two").await, 3);
            assert_eq!(read(&place, &back(&host, id, "one").await), 1);
            let other = take(&host, id, "other").await;
            write(&place, &other, 4);
            assert_files(&place, &other);
            let two = back(&host, id, "two").await;
            assert_eq!((read(&place, &two), &two.snapshot), (2, &Some(name("two"))));
            assert_files(&place, &two);
            refused(ErrorCode::Exists, host.vms.take_snapshot(id, name("two")).await);
            refused(ErrorCode::NotFound, host.vms.revert(id, name("three")).await);

            let less = without(&host, id, "one").await;
            assert_eq!(read(&place, &less), 2);
            assert_eq!(read(&place, &back(&host, id, "other").await), 1);
            write(&place, &back(&host, id, "two").await, 5);
            let less = without(&host, id, "other").await;
            assert_files(&place, &less);
            let last = without(&host, id, "two").await;
            assert_eq!(read(&place, &last), 5);
            assert_eq!(last.disks[0].layers, [], "what nothing else needs is merged");
            assert_files(&place, &last);

            start(&host, id).await;
            refused(ErrorCode::WrongState, host.vms.take_snapshot(id, name("live")).await);
            host.vms.act(id, VmAction::Stop, true).await.unwrap();
            take(&host, id, "again").await;
            host.vms.delete(id).await.unwrap();
            assert!(!place.dir().join(format!("storage/vms/{id}")).exists());
            place.assert_clean(&host).await;
        });
    });
}

#[test]
fn a_snapshot_that_breaks_off_leaves_the_vm_as_it_was() {
    in_namespace(|| {
        let place = Place::with_fake();
        let before = place.life(async |host| {
            let vm = made(&host, "web01").await;
            let vm = take(&host, vm.id, "one").await;
            place.failpoints("vm.images.note=error");
            host.vms.take_snapshot(vm.id, name("two")).await.unwrap_err();
            host.vms.revert(vm.id, name("one")).await.unwrap_err();
            host.vms.delete_snapshot(vm.id, name("one")).await.unwrap_err();
            assert_eq!(host.vms.report(vm.id).unwrap().definition, vm);
            assert_files(&place, &vm);
            assert_eq!(host.ledger.journaled().await.unwrap(), []);
            place.failpoints("vm.images.note=stall");
            vm
        });
        let life = place.live();
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let (host, id) = (Arc::clone(&life.host), before.id);
        let files = || std::fs::read_dir(place.dir().join(format!("storage/vms/{id}"))).unwrap();
        let there = files().count();
        runtime.block_on(async {
            let taking = async move { drop(host.vms.take_snapshot(id, name("two")).await) };
            let begun = life.spawn(async move { drop(tokio::spawn(taking)) });
            begun.await;
            eventually(async || files().count() > there).await;
        });
        place.failpoints("");
        life.kill();
        place.life(async |host| {
            assert_eq!(host.vms.report(id).unwrap().definition, before);
            assert_files(&place, &before);
            assert_files(&place, &take(&host, id, "two").await);
            place.assert_clean(&host).await;
        });
    });
}

#[test]
fn clones_have_what_the_other_had_and_change_nothing_of_it() {
    in_namespace(|| {
        let place = Place::with_fake();
        place.life(async |host| {
            let golden = made(&host, "golden").await;
            write(&place, &golden, 7);
            refused(ErrorCode::WrongState, clone(&host, golden.id, true, None).await);
            refused(ErrorCode::NotFound, clone(&host, golden.id, true, Some("none")).await);
            host.vms.set_template(golden.id, true).await.unwrap();
            let act = |vm, action| host.vms.act(vm, action, action == VmAction::Stop);
            refused(ErrorCode::WrongState, act(golden.id, VmAction::Start).await);
            refused(ErrorCode::WrongState, host.vms.take_snapshot(golden.id, name("s")).await);

            let linked = clone(&host, golden.id, true, None).await.unwrap().definition;
            assert_eq!((read(&place, &linked), linked.disks[0].layers.len()), (7, 1));
            assert_eq!(vm::create(&host, linked.clone()).await.unwrap().definition, linked);
            let full = clone(&host, golden.id, false, None).await.unwrap().definition;
            assert_eq!((read(&place, &full), &full.disks[0].layers), (7, &vec![]));
            assert_eq!(full.disks[0].size_bytes, golden.disks[0].size_bytes);
            let second = take(&host, linked.id, "mine").await;
            write(&place, &second, 8);
            let third = clone(&host, linked.id, true, Some("mine")).await.unwrap().definition;
            assert_eq!((read(&place, &third), third.disks[0].layers.len()), (7, 2));
            assert_eq!(read(&place, &golden), 7);

            for standing in [golden.id, linked.id] {
                refused(ErrorCode::InUse, host.vms.delete(standing).await);
            }
            refused(ErrorCode::InUse, host.vms.set_template(golden.id, false).await);
            assert_eq!(act(third.id, VmAction::Start).await.unwrap().state, VmState::Running);
            act(third.id, VmAction::Stop).await.unwrap();
            for gone in [third.id, linked.id, full.id, golden.id] {
                host.vms.delete(gone).await.unwrap();
            }
            assert_eq!(std::fs::read_dir(place.dir().join("storage/vms")).unwrap().count(), 0);
            place.assert_clean(&host).await;
        });
    });
}

#[test]
fn a_vm_that_runs_is_cloned_by_its_snapshot_alone() {
    in_namespace(|| {
        let place = Place::with_fake();
        place.life(async |host| {
            let vm = made(&host, "web01").await;
            write(&place, &vm, 1);
            let full = clone(&host, vm.id, false, None).await.unwrap().definition;
            assert_eq!(read(&place, &full), 1);
            write(&place, &take(&host, vm.id, "one").await, 2);
            start(&host, vm.id).await;
            refused(ErrorCode::WrongState, clone(&host, vm.id, false, None).await);
            for linked in [true, false] {
                let copy = clone(&host, vm.id, linked, Some("one")).await.unwrap().definition;
                assert_eq!(read(&place, &copy), 1);
            }
        });
    });
}

#[test]
fn room_that_is_spoken_for_is_not_given_again() {
    in_namespace(|| {
        let place = Place::with_fake();
        place.life(async |host| {
            let reports = host.storages.reports(&host).await;
            let most = reports[0].available_bytes / 5 * 3;
            let file = StoragePath::new(storage_name(), "vms/x/vda.raw").unwrap();
            let wanted = [Wanted { file, bytes: most }];
            let hold = host.in_hand.hold("first");
            space::reserve(&host, "first", &wanted).await.unwrap();
            refused(ErrorCode::NoResources, space::reserve(&host, "second", &wanted).await);
            assert_eq!(host.storages.reports(&host).await[0].reserved_bytes, most);

            // What is written already is not counted twice.
            std::fs::create_dir_all(place.dir().join("storage/vms/x")).unwrap();
            std::fs::write(place.dir().join("storage/vms/x/vda.raw"), vec![1; 1 << 20]).unwrap();
            let left = host.storages.reports(&host).await[0].reserved_bytes;
            assert!(left <= most - (1 << 20), "{left}");

            sweep::once(&host, &mut HashSet::new()).await.unwrap();
            refused(ErrorCode::NoResources, space::reserve(&host, "second", &wanted).await);
            drop(hold);
            sweep::once(&host, &mut HashSet::new()).await.unwrap();
            space::reserve(&host, "second", &wanted).await.unwrap();
        });
        // Nobody has it in hand after a restart.
        place.life(async |host| {
            assert_eq!(host.storages.reports(&host).await[0].reserved_bytes, 0);
        });
    });
}
