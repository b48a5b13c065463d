//! The witness in a real QEMU, of each version that the lab has: it must boot, hold, and be able to fail.
//! Needs what `scripts/setup` and `scripts/guest` provide; no root.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

use std::fs::{self, File};
use std::io::{BufRead, BufReader, Write};
use std::net::{Ipv4Addr, TcpListener};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use whimbrel_lab::report::{self, Damage, Report};
use whimbrel_lab::{LabConfig, Witness, cache_dir, find_witness, write_initramfs};

const WAIT_MAX: Duration = Duration::from_secs(120);
/// Where the guest's console and QEMU's monitor are, in the guest's folder.
const CONSOLE: &str = "console";
const MONITOR: &str = "monitor";

/// A guest under QEMU with user networking, whose control port is forwarded to this machine.
struct Guest {
    folder: PathBuf,
    port: u16,
    qemu: Child,
}

impl Guest {
    fn boot(name: &str, engine: &str, options: &str) -> Self {
        let folder = std::env::temp_dir()
            .join(format!("whimbrel-witness-{}-{name}-{engine}", std::process::id()));
        fs::create_dir(&folder).unwrap();
        let kernel = cache_dir().join("kernel");
        let (initramfs, disk) = (folder.join("initramfs"), folder.join("disk"));
        write_initramfs(&initramfs, &find_witness().unwrap(), &kernel).unwrap();
        File::create(&disk).unwrap().set_len(8 << 20).unwrap();
        // Free for the moment, which is long enough on a loopback interface with thousands of ports.
        let port =
            TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap().local_addr().unwrap().port();
        let path = |name: &str| folder.join(name).display().to_string();
        let qemu = Command::new(LabConfig::new(&folder, Path::new("/")).engine(engine))
            .args([
                "-nodefaults",
                "-display",
                "none",
                "-machine",
                "pc-q35-7.2,accel=tcg",
                "-m",
                "256",
            ])
            .args([
                "-kernel",
                &kernel.join("vmlinuz").display().to_string(),
                "-initrd",
                &initramfs.display().to_string(),
            ])
            .args(["-append", &format!("console=ttyS0 quiet witness.ip=10.0.2.15/24 {options}")])
            .args(["-blockdev", &format!("driver=file,node-name=disk,filename={}", disk.display())])
            .args(["-device", "virtio-blk-pci,drive=disk"])
            .args([
                "-netdev",
                &format!("user,id=net,restrict=on,hostfwd=tcp:127.0.0.1:{port}-:7070"),
            ])
            .args(["-device", "virtio-net-pci,netdev=net"])
            .args(["-serial", &format!("unix:{},server=on,wait=off", path(CONSOLE))])
            .args(["-qmp", &format!("unix:{},server=on,wait=off", path(MONITOR))])
            .stdin(Stdio::null())
            .spawn()
            .unwrap();
        Self { folder, port, qemu }
    }

    /// Connects to the witness, once it answers.
    fn witness(&self) -> (Witness, Report) {
        let began = Instant::now();
        loop {
            // QEMU accepts before the guest does, and then closes.
            let answered = Witness::connect_local(self.port)
                .and_then(|mut witness| Ok((witness.status()?, witness)));
            match answered {
                Ok((report, witness)) => return (witness, report),
                Err(error) => assert!(began.elapsed() < WAIT_MAX, "{error:?}"),
            }
            thread::sleep(Duration::from_millis(100));
        }
    }

    /// The witness once it has filled its memory and written a few records.
    fn settled_witness(&self) -> (Witness, Report) {
        let (mut witness, report) = self.witness();
        let report = wait_for(&mut witness, report, |report| {
            let disk = report.disk.as_ref().unwrap();
            report.memory.filled_pages == report.memory.pages && disk.acknowledged > 5
        });
        (witness, report)
    }

    fn socket(&self, name: &str) -> UnixStream {
        let stream = UnixStream::connect(self.folder.join(name)).unwrap();
        stream.set_read_timeout(Some(WAIT_MAX)).unwrap();
        stream
    }

    fn wait_for_end(&mut self) {
        let began = Instant::now();
        while self.qemu.try_wait().unwrap().is_none() {
            assert!(began.elapsed() < WAIT_MAX, "QEMU does not end");
            thread::sleep(Duration::from_millis(20));
        }
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ended = self.qemu.kill();
        self.qemu.wait().unwrap();
        fs::remove_dir_all(&self.folder).unwrap();
    }
}

fn wait_for(witness: &mut Witness, mut report: Report, is_so: impl Fn(&Report) -> bool) -> Report {
    let began = Instant::now();
    while !is_so(&report) {
        assert!(began.elapsed() < WAIT_MAX, "{report:?}");
        thread::sleep(Duration::from_millis(50));
        report = witness.status().unwrap();
    }
    report
}

fn damage(witness: &mut Witness, what: Damage) {
    witness.command(report::Command::Corrupt { what }).unwrap();
}

/// A faithful guest says so, while its memory is dirtied; then each kind of damage is seen, and only that.
fn holds_and_can_fail(engine: &str) {
    let guest = Guest::boot("holds", engine, "witness.memory=96 witness.journal=50");
    let (mut witness, report) = guest.settled_witness();
    assert!(report.healthy && report.errors.is_empty(), "{report:?}");
    assert_eq!(
        (report.memory.pages, report.address),
        (96 * 256, Some(Ipv4Addr::new(10, 0, 2, 15)))
    );

    let report = witness.command(report::Command::Dirty { mb_per_s: 100 }).unwrap();
    let goal = report.memory.dirtied_pages + 20_000;
    wait_for(&mut witness, report, |report| report.memory.dirtied_pages > goal);
    let report = witness.verify().unwrap();
    assert!(report.healthy && report.memory.verified_pages >= 96 * 256, "{report:?}");
    assert!(report.disk.as_ref().unwrap().verified_records > 5, "{report:?}");

    damage(&mut witness, Damage::Page);
    let report = witness.verify().unwrap();
    assert_eq!(
        (report.healthy, report.memory.mismatches, report.mismatches()),
        (false, 1, 1),
        "{report:?}"
    );
    damage(&mut witness, Damage::Block);
    let report = witness.verify().unwrap();
    assert_eq!(
        (report.disk.as_ref().unwrap().mismatches, report.mismatches()),
        (1, 2),
        "{report:?}"
    );
    damage(&mut witness, Damage::Clock);
    let report = witness.status().unwrap();
    let report = wait_for(&mut witness, report, |report| report.clock.realtime_steps > 0);
    assert_eq!((report.clock.realtime_steps, report.mismatches()), (1, 3), "{report:?}");
    assert!((4_900_000..5_100_000).contains(&report.clock.largest_step_us), "{report:?}");
}

/// After a restart it is another boot with the same journal; its console answers; its power button works.
fn restarts_answers_and_ends(engine: &str) {
    let mut guest = Guest::boot("restarts", engine, "witness.memory=16 witness.nonsense=1");
    let (witness, before) = guest.settled_witness();
    assert!(!before.healthy && before.errors[0].contains("witness.nonsense"), "{before:?}");
    witness.end(report::Command::Reboot).unwrap();
    let after = wait_for_reboot(&guest, &before);
    let (old, new) = (before.disk.unwrap(), after.disk.unwrap());
    assert!(new.acknowledged >= old.acknowledged && new.mismatches == 0, "{old:?} {new:?}");

    let mut console = guest.socket(CONSOLE);
    console.write_all(b"hello, guest\n").unwrap();
    let mut lines = BufReader::new(console).lines().map(Result::unwrap);
    assert!(lines.any(|line| line.trim_end() == "echo: hello, guest"));

    let mut monitor = guest.socket(MONITOR);
    monitor
        .write_all(b"{\"execute\":\"qmp_capabilities\"}\n{\"execute\":\"system_powerdown\"}\n")
        .unwrap();
    guest.wait_for_end();
}

fn wait_for_reboot(guest: &Guest, before: &Report) -> Report {
    let began = Instant::now();
    loop {
        let (_, report) = guest.witness();
        if report.boot_id != before.boot_id {
            return report;
        }
        assert!(began.elapsed() < WAIT_MAX, "it does not restart");
        thread::sleep(Duration::from_millis(100));
    }
}

#[test]
fn holds_and_can_fail_on_qemu_7_2() {
    holds_and_can_fail("7.2");
}

#[test]
fn holds_and_can_fail_on_qemu_10_0() {
    holds_and_can_fail("10.0");
}

#[test]
fn restarts_answers_and_ends_on_qemu_10_0() {
    restarts_answers_and_ends("10.0");
}
