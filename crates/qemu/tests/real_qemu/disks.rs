//! Disks copied between QEMUs over TLS, moved on one, put in layers, and what becomes of a copy when things
//! go wrong.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use serde_json::json;
use whimbrel_qemu::command_line::{Cache, DiskFormat, DiskSpec, VmSpec};
use whimbrel_qemu::disks::jobs::{JobError, Obstacle};
use whimbrel_qemu::disks::layers::{self, Overlay};
use whimbrel_qemu::disks::mirror::{self, Extent, MirrorSettings, Standing};
use whimbrel_qemu::disks::server::{self, ServerError, ServerSettings};
use whimbrel_qemu::disks::target::{self, Remote};
use whimbrel_qemu::disks::{bitmaps, jobs, nodes, snapshots, statistics};
use whimbrel_qemu::machine::RunState;

use crate::rig::{Engine, Guest, Lab, engines, moved, pairs, real_engines, soon, to};
use crate::tls;

const MIB: u64 = 1 << 20;
const SIZE: u64 = 32 * MIB;

/// No job of a test takes longer.
const BOUND: Duration = Duration::from_secs(30);

/// Long enough to see that nothing happens.
const MOMENT: Duration = Duration::from_millis(300);

fn make(lab: &Lab, path: &Path, format: DiskFormat, bytes: u64) {
    match format {
        DiskFormat::Raw => std::fs::File::create(path).unwrap().set_len(bytes).unwrap(),
        DiskFormat::Qcow2 => {
            let mut command = Command::new("qemu-img");
            command.args(["create", "-q", "-f", "qcow2"]).arg(path).arg(bytes.to_string());
            assert!(command.status().unwrap().success());
        }
    }
    lab.hand_over(path);
}

fn disk(lab: &Lab, name: &str, file: &str, format: DiskFormat) -> DiskSpec {
    DiskSpec {
        node: name.to_owned(),
        path: lab.dir.path().join(file),
        format,
        read_only: false,
        serial: None,
        cache: Cache::WriteBack,
        layers: Vec::new(),
    }
}

/// A guest with new disks `vda`, `vdb`, …
fn with_disks(lab: &Lab, name: &str, formats: &[DiskFormat], incoming: bool) -> VmSpec {
    let mut spec = lab.spec(name, incoming);
    for (letter, format) in ('a'..).zip(formats) {
        let image = disk(lab, &format!("vd{letter}"), &format!("{name}-vd{letter}"), *format);
        make(lab, &image.path, *format, SIZE);
        spec.disks.push(image);
    }
    spec
}

/// Does what a guest would: QEMU's own tool at the guest's device. An imitation has no such tool, nor
/// contents.
async fn io(guest: &Guest, engine: &Engine, name: &str, what: &str) {
    if engine.fake {
        return;
    }
    let device = format!("/machine/peripheral/{name}-device/virtio-backend");
    let line = json!({ "command-line": format!("qemu-io -d {device} \"{what}\"") });
    let told = guest.machine.qmp().execute("human-monitor-command", line).await.unwrap();
    assert_eq!(told.as_str().unwrap().trim(), "", "{what}");
}

fn same(engine: &Engine, left: &DiskSpec, right: &DiskSpec) -> bool {
    if engine.fake {
        return true;
    }
    let mut command = Command::new("qemu-img");
    command.args(["compare", "-q", "-f", left.format.as_wire(), "-F", right.format.as_wire()]);
    command.arg(&left.path).arg(&right.path).status().unwrap().success()
}

fn allocated(path: &Path) -> u64 {
    use std::os::unix::fs::MetadataExt;
    std::fs::metadata(path).unwrap().blocks() * 512
}

fn serving(dir: Option<&PathBuf>) -> ServerSettings {
    let address = IpAddr::V4(Ipv4Addr::LOCALHOST);
    let tls = dir.and_then(|dir| tls::server(dir));
    ServerSettings { address, ports: 49152..=49215, tls }
}

fn remote(server: SocketAddr, dir: Option<&PathBuf>) -> Remote {
    Remote { server, tls: dir.and_then(|dir| tls::client(dir, "host-b.qemu.whimbrel")) }
}

fn names(guest: &Guest) -> Vec<String> {
    guest.spec.disks.iter().map(|disk| disk.node.clone()).collect()
}

fn mirroring(disk: &str, target: &str) -> MirrorSettings {
    MirrorSettings {
        disk: disk.to_owned(),
        source: disk.to_owned(),
        target: target.to_owned(),
        extent: Extent::Whole,
        write_blocking: false,
        max_bytes_per_second: 0,
    }
}

async fn serves(destination: &Guest, dir: Option<&PathBuf>) -> SocketAddr {
    let address = server::start(&destination.machine, &serving(dir)).await.unwrap();
    for name in names(destination) {
        server::export(&destination.machine, &name, &name).await.unwrap();
    }
    address
}

/// Begins to copy every disk.
async fn copies(source: &Guest, remote: &Remote) {
    remote.prepare(&source.machine).await.unwrap();
    for name in names(source) {
        remote.add(&source.machine, &name).await.unwrap();
        let settings = mirroring(&name, &target::node_name(&name));
        mirror::start(&source.machine, &settings).await.unwrap();
    }
}

async fn ready(source: &Guest) {
    for name in names(source) {
        mirror::wait_ready(&source.machine, &name, BOUND).await.unwrap();
    }
}

/// Lets go of what was copied to.
async fn parts(source: &Guest, destination: &Guest) {
    for name in names(source) {
        target::remove(&source.machine, &name).await.unwrap();
    }
    target::forget_credentials(&source.machine).await.unwrap();
    server::stop(&destination.machine, BOUND).await.unwrap();
    server::forget_credentials(&destination.machine).await.unwrap();
}

async fn standing(guest: &Guest, name: &str) -> Standing {
    mirror::standing(&guest.machine, name).await.unwrap()
}

async fn held(guest: &Guest, name: &str) -> Obstacle {
    soon(async {
        loop {
            if let Standing::Held { obstacle, .. } = standing(guest, name).await {
                return obstacle;
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    })
    .await
}

#[tokio::test]
async fn a_guest_moves_with_its_disks_which_stay_sparse() {
    use DiskFormat::{Qcow2, Raw};
    for (from, onto) in pairs() {
        let lab = Lab::new();
        let dirs = lab.tls(["host-a", "host-b", "host-c"]);
        let spec = with_disks(&lab, "source", &[Raw, Qcow2, Raw], false);
        let source = lab.start_spec(&from, spec).await;
        source.machine.cont().await.unwrap();
        io(&source, &from, "vda", "write -P 7 1M 3M").await;
        io(&source, &from, "vda", "write -P 0 8M 8M").await;
        io(&source, &from, "vdb", "write -P 8 4M 2M").await;
        // Another format at the destination.
        let mut spec = with_disks(&lab, "destination", &[Raw, Qcow2, Qcow2], true);
        spec.machine_type = source.spec.machine_type.clone();
        let destination = lab.start_spec(&onto, spec).await;

        // A port that is taken is passed over.
        let _taken = std::net::TcpListener::bind("127.0.0.1:49152");
        let address = serves(&destination, Some(&dirs[1])).await;
        copies(&source, &remote(address, Some(&dirs[0]))).await;
        ready(&source).await;
        io(&source, &from, "vda", "write -P 9 20M 1M").await;

        let listening = destination.listens(None).await;
        let mut outgoing = soon(whimbrel_qemu::migrate::outgoing::Outgoing::start(
            &source.machine,
            &to(listening, None),
        ))
        .await
        .unwrap();
        soon(outgoing.wait_pre_switchover(&tokio::sync::watch::Sender::default())).await.unwrap();
        mirror::settle(&source.machine, &names(&source), BOUND).await.unwrap();
        parts(&source, &destination).await;
        assert_eq!(jobs::query(&source.machine).await.unwrap(), []);
        outgoing.continue_to_completed(BOUND).await.unwrap();
        soon(whimbrel_qemu::migrate::incoming::wait_loaded(&destination.machine)).await.unwrap();
        destination.machine.cont().await.unwrap();
        assert_eq!(destination.run_state().await, RunState::Running);
        source.killed().await;
        destination.machine.quit().await.unwrap();
        soon(destination.process.wait_exit()).await;
        for (left, right) in source.spec.disks.iter().zip(&destination.spec.disks) {
            assert!(same(&from, left, right), "{from:?} {onto:?} {}", left.node);
            assert!(
                onto.fake || allocated(&right.path) < 8 * MIB,
                "{onto:?} {}",
                allocated(&right.path)
            );
        }
    }
}

#[tokio::test]
async fn only_the_named_host_may_write_and_only_to_the_named_one() {
    for engine in engines() {
        let lab = Lab::new();
        let dirs = lab.tls(["host-a", "host-b", "host-c"]);
        let spec = with_disks(&lab, "source", &[DiskFormat::Raw], false);
        let source = lab.start_spec(&engine, spec).await;
        let spec = with_disks(&lab, "destination", &[DiskFormat::Raw], true);
        let destination = lab.start_spec(&engine, spec).await;
        let address = serves(&destination, Some(&dirs[1])).await;

        let good = remote(address, Some(&dirs[0]));
        let other_name =
            Remote { tls: tls::client(&dirs[0], "host-c.qemu.whimbrel"), ..good.clone() };
        let refused = [remote(address, Some(&dirs[2])), other_name, remote(address, None)];
        for bad in refused {
            bad.prepare(&source.machine).await.unwrap();
            let error = bad.add(&source.machine, "vda").await.unwrap_err();
            assert!(error.is_refusal(), "{bad:?}: {error:?}");
        }
        // What is not exported is not there, and nobody listens twice.
        good.prepare(&source.machine).await.unwrap();
        assert!(good.add(&source.machine, "vdb").await.unwrap_err().is_refusal());
        let again = server::start(&destination.machine, &serving(None)).await.unwrap_err();
        assert!(matches!(again, ServerError::Listen { source: Some(_), .. }), "{again:?}");
        // After all that the right one is let in.
        good.add(&source.machine, "vda").await.unwrap();
        good.reach(&source.machine, "vda").await.unwrap();
        parts(&source, &destination).await;
        server::stop(&destination.machine, BOUND).await.unwrap();
        target::remove(&source.machine, "vda").await.unwrap();
    }
}

#[tokio::test]
async fn a_copy_that_was_cut_goes_on_where_it_stood() {
    for engine in engines() {
        let lab = Lab::new();
        let dirs = lab.tls(["host-a", "host-b", "host-c"]);
        let spec = with_disks(&lab, "source", &[DiskFormat::Raw], false);
        let source = lab.start_spec(&engine, spec).await;
        source.machine.cont().await.unwrap();
        io(&source, &engine, "vda", "write -P 7 0 24M").await;
        let spec = with_disks(&lab, "destination", &[DiskFormat::Raw], true);
        let destination = lab.start_spec(&engine, spec).await;
        let address = serves(&destination, Some(&dirs[1])).await;
        let remote = remote(address, Some(&dirs[0]));
        remote.prepare(&source.machine).await.unwrap();
        remote.add(&source.machine, "vda").await.unwrap();
        let slowly = MirrorSettings {
            max_bytes_per_second: 8 * MIB,
            ..mirroring("vda", &target::node_name("vda"))
        };
        mirror::start(&source.machine, &slowly).await.unwrap();

        assert!(source.process.cut(address.port()).unwrap() > 0);
        assert_eq!(held(&source, "vda").await, Obstacle::Failed);
        assert_eq!(source.run_state().await, RunState::Running);
        io(&source, &engine, "vda", "write -P 8 1M 1M").await;
        let waiting = mirror::wait_ready(&source.machine, "vda", BOUND).await.unwrap_err();
        assert!(matches!(waiting, JobError::Held { .. }), "{waiting:?}");
        let settled = mirror::settle(&source.machine, &names(&source), BOUND).await.unwrap_err();
        assert!(matches!(settled, JobError::Held { .. }), "{settled:?}");

        server::renew(&destination.machine, "vda", "vda", BOUND).await.unwrap();
        soon(async {
            while remote.reach(&source.machine, "vda").await.is_err() {
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        })
        .await;
        mirror::set_speed(&source.machine, "vda", 0).await.unwrap();
        mirror::resume(&source.machine, "vda").await.unwrap();
        ready(&source).await;
        source.machine.stop().await.unwrap();
        mirror::settle(&source.machine, &names(&source), BOUND).await.unwrap();
        parts(&source, &destination).await;
        destination.killed().await;
        source.killed().await;
        assert!(same(&engine, &source.spec.disks[0], &destination.spec.disks[0]));
    }
}

#[tokio::test]
async fn a_destination_that_is_gone_or_hangs_is_given_up() {
    for engine in engines() {
        for hangs in [false, true] {
            let lab = Lab::new();
            let spec = with_disks(&lab, "source", &[DiskFormat::Raw], false);
            let source = lab.start_spec(&engine, spec).await;
            source.machine.cont().await.unwrap();
            io(&source, &engine, "vda", "write -P 7 0 24M").await;
            let spec = with_disks(&lab, "destination", &[DiskFormat::Raw], true);
            let destination = lab.start_spec(&engine, spec).await;
            let address = serves(&destination, None).await;
            let remote = remote(address, None);
            copies(&source, &remote).await;
            ready(&source).await;
            if hangs {
                destination.signal(rustix::process::Signal::STOP);
            } else {
                destination.killed().await;
            }
            io(&source, &engine, "vda", "write -P 8 0 4M").await;
            // A guest that waits in QEMU for a lost target does not end the copy by waiting.
            let bound = if hangs { MOMENT } else { BOUND };
            let error = mirror::settle(&source.machine, &names(&source), bound).await;
            assert!(error.is_err(), "{engine:?} {hangs}");
            mirror::abandon(&source.machine, &names(&source), BOUND).await.unwrap();
            mirror::abandon(&source.machine, &names(&source), BOUND).await.unwrap();
            target::forget_credentials(&source.machine).await.unwrap();
            assert_eq!(jobs::query(&source.machine).await.unwrap(), []);
            assert_eq!(standing(&source, "vda").await, Standing::None);
            assert!(!nodes::names(&source.machine).await.unwrap().contains("vda-copy"));
            assert_eq!(source.run_state().await, RunState::Running);
            destination.killed().await;

            // The second try succeeds.
            let spec = with_disks(&lab, "second-try", &[DiskFormat::Raw], true);
            let destination = lab.start_spec(&engine, spec).await;
            let address = serves(&destination, None).await;
            copies(&source, &self::remote(address, None)).await;
            ready(&source).await;
            source.machine.stop().await.unwrap();
            mirror::settle(&source.machine, &names(&source), BOUND).await.unwrap();
            parts(&source, &destination).await;
            destination.killed().await;
            source.killed().await;
            assert!(same(&engine, &source.spec.disks[0], &destination.spec.disks[0]));
        }
    }
}

#[tokio::test]
async fn a_target_of_another_size_is_refused() {
    for engine in engines() {
        for bytes in [SIZE - 512, SIZE + 512, SIZE / 2] {
            let lab = Lab::new();
            let spec = with_disks(&lab, "source", &[DiskFormat::Raw], false);
            let source = lab.start_spec(&engine, spec).await;
            let mut image = disk(&lab, "vda-2", "other", DiskFormat::Raw);
            make(&lab, &image.path, DiskFormat::Raw, bytes);
            nodes::add_image(&source.machine, &image, None).await.unwrap();
            mirror::start(&source.machine, &mirroring("vda", "vda-2")).await.unwrap();
            let error = mirror::wait_ready(&source.machine, "vda", BOUND).await.unwrap_err();
            assert!(matches!(error, JobError::Failed { .. }), "{error:?}");
            let error = mirror::settle(&source.machine, &names(&source), BOUND).await.unwrap_err();
            assert!(matches!(error, JobError::Failed { .. }), "{error:?}");
            mirror::abandon(&source.machine, &names(&source), BOUND).await.unwrap();
            nodes::remove(&source.machine, "vda-2").await.unwrap();
            image.path = lab.dir.path().join("nothing");
            assert!(nodes::add_image(&source.machine, &image, None).await.is_err());
        }
    }
}

#[tokio::test]
async fn a_disk_moves_to_another_file_under_its_guest() {
    for engine in engines() {
        let lab = Lab::new();
        let spec = with_disks(&lab, "source", &[DiskFormat::Qcow2], false);
        let guest = lab.start_spec(&engine, spec).await;
        guest.machine.cont().await.unwrap();
        io(&guest, &engine, "vda", "write -P 7 0 4M").await;
        let taken = nodes::names(&guest.machine).await.unwrap();
        let name = nodes::fresh_name("vda", &taken).unwrap();
        assert_eq!(name, "vda-2");
        let image = disk(&lab, &name, "elsewhere", DiskFormat::Raw);
        make(&lab, &image.path, DiskFormat::Raw, SIZE);
        nodes::add_image(&guest.machine, &image, None).await.unwrap();
        mirror::start(&guest.machine, &mirroring("vda", &name)).await.unwrap();
        assert!(nodes::remove(&guest.machine, &name).await.unwrap_err().is_refusal());
        mirror::wait_ready(&guest.machine, "vda", BOUND).await.unwrap();
        let features = guest.machine.features();
        assert_eq!(features.mirror_mode_changes, engine.version == "10.0");
        if features.mirror_mode_changes {
            mirror::write_blocking(&guest.machine, "vda").await.unwrap();
            soon(async {
                while !matches!(
                    standing(&guest, "vda").await,
                    Standing::Ready { in_step: true, .. }
                ) {
                    tokio::time::sleep(Duration::from_millis(5)).await;
                }
            })
            .await;
        }
        mirror::pivot(&guest.machine, "vda", BOUND).await.unwrap();
        let drives = nodes::drives(&guest.machine).await.unwrap();
        assert_eq!((drives[0].disk.as_str(), drives[0].node.as_str()), ("vda", "vda-2"));
        assert_eq!((drives[0].driver.as_str(), drives[0].virtual_size_bytes), ("raw", SIZE));
        nodes::remove(&guest.machine, "vda").await.unwrap();
        nodes::remove(&guest.machine, "vda").await.unwrap();
        io(&guest, &engine, "vda", "write -P 9 1M 1M").await;
        io(&guest, &engine, "vda", "read -P 7 2M 2M").await;
        assert!(statistics::query(&guest.machine).await.unwrap().iter().any(|it| it.disk == "vda"));
        assert_eq!(guest.run_state().await, RunState::Running);
    }
}

#[tokio::test]
async fn layers_are_put_on_and_made_one_again() {
    for engine in real_engines() {
        let lab = Lab::new();
        let formats = [DiskFormat::Qcow2, DiskFormat::Qcow2];
        let guest = lab.start_spec(&engine, with_disks(&lab, "source", &formats, false)).await;
        guest.machine.cont().await.unwrap();
        io(&guest, &engine, "vda", "write -P 7 0 4M").await;
        let mut overlays = Vec::new();
        for name in names(&guest) {
            let image =
                disk(&lab, &format!("{name}-2"), &format!("{name}-layer"), DiskFormat::Qcow2);
            make(&lab, &image.path, DiskFormat::Qcow2, SIZE);
            nodes::add_image(&guest.machine, &image, None).await.unwrap();
            overlays.push(Overlay { node: name, overlay: image.node });
        }
        // All or none.
        let mut wrong = overlays.clone();
        wrong[1].overlay = "nothing".to_owned();
        assert!(layers::put_on(&guest.machine, &wrong).await.unwrap_err().is_refusal());
        assert_eq!(nodes::drives(&guest.machine).await.unwrap()[0].node, "vda");
        layers::put_on(&guest.machine, &overlays).await.unwrap();
        let drives = nodes::drives(&guest.machine).await.unwrap();
        assert_eq!([&drives[0].node, &drives[1].node], ["vda-2", "vdb-2"]);
        io(&guest, &engine, "vda", "write -P 8 1M 1M").await;
        // One downwards, one upwards.
        layers::push(&guest.machine, "vda", ("vda-2", "vda-2", "vda"), BOUND).await.unwrap();
        layers::pull(&guest.machine, "vdb", "vdb-2", None).await.unwrap();
        jobs::finish(&guest.machine, "vdb", BOUND).await.unwrap();
        let drives = nodes::drives(&guest.machine).await.unwrap();
        assert_eq!([&drives[0].node, &drives[1].node], ["vda", "vdb-2"]);
        nodes::remove(&guest.machine, "vda-2").await.unwrap();
        nodes::remove(&guest.machine, "vdb").await.unwrap();
        nodes::resize(&guest.machine, "vda", 2 * SIZE).await.unwrap();
        assert_eq!(nodes::drives(&guest.machine).await.unwrap()[0].virtual_size_bytes, 2 * SIZE);
    }
}

#[tokio::test]
async fn bitmaps_and_snapshots_are_kept_in_the_image() {
    for engine in real_engines() {
        let lab = Lab::new();
        let formats = [DiskFormat::Qcow2];
        let guest = lab.start_spec(&engine, with_disks(&lab, "source", &formats, false)).await;
        guest.machine.cont().await.unwrap();
        let machine = &guest.machine;
        bitmaps::add(machine, "vda", "monday", true).await.unwrap();
        assert!(bitmaps::add(machine, "vda", "monday", true).await.unwrap_err().is_refusal());
        io(&guest, &engine, "vda", "write -P 7 0 64k").await;
        let listed = bitmaps::list(machine).await.unwrap();
        let bitmap = &listed["vda"][0];
        assert!(bitmap.persistent && bitmap.recording && !bitmap.busy && !bitmap.inconsistent);
        assert_eq!((bitmap.name.as_str(), bitmap.dirty_bytes), ("monday", 65536));
        bitmaps::remove(machine, "vda", "monday").await.unwrap();
        assert!(bitmaps::list(machine).await.unwrap().is_empty());

        let all = ["vda".to_owned()];
        snapshots::save(machine, "before", &all, BOUND).await.unwrap();
        let error = snapshots::save(machine, "before", &all, BOUND).await.unwrap_err();
        assert!(matches!(error, JobError::Failed { .. }), "{error:?}");
        assert_eq!(guest.run_state().await, RunState::Running);
        let listed = snapshots::list(machine).await.unwrap();
        assert_eq!((listed[0].name.as_str(), listed[0].node.as_str()), ("before", "vda"));
        assert!(listed[0].memory_bytes > 0 && listed.len() == 1, "{listed:?}");
        snapshots::load(machine, "before", &all, BOUND).await.unwrap();
        guest.reaches(&RunState::Running).await;
        snapshots::load(machine, "never", &all, BOUND).await.unwrap_err();
        assert_eq!(guest.run_state().await, RunState::RestoreVm);
        machine.cont().await.unwrap();
        snapshots::delete(machine, "before", &all, BOUND).await.unwrap();
        assert_eq!(snapshots::list(machine).await.unwrap(), []);
    }
}

/// What holds the order of [`whimbrel_qemu::disks`] is that order alone: QEMU says yes to its breach.
#[tokio::test]
async fn qemu_itself_does_not_mind_a_mirror_that_was_not_settled() {
    for engine in real_engines() {
        let lab = Lab::new();
        let spec = with_disks(&lab, "source", &[DiskFormat::Raw], false);
        let source = lab.start_spec(&engine, spec).await;
        source.machine.cont().await.unwrap();
        let spec = with_disks(&lab, "destination", &[DiskFormat::Raw], true);
        let destination = lab.start_spec(&engine, spec).await;
        let address = serves(&destination, None).await;
        copies(&source, &remote(address, None)).await;
        ready(&source).await;
        let listening = destination.listens(None).await;
        moved(&source, &destination, &to(listening, None)).await;
        assert!(matches!(standing(&source, "vda").await, Standing::Ready { .. }));
        assert_eq!(server::exports(&destination.machine).await.unwrap(), ["vda"]);
        destination.machine.cont().await.unwrap();
        assert_eq!(destination.run_state().await, RunState::Running);
    }
}
