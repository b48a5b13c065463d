//! Engines, guests and migrations for the tests against real QEMUs.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr};
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde_json::json;
use tempfile::TempDir;
use tokio::sync::watch;
use uuid::Uuid;
use whimbrel_qemu::command_line::{
    self, Boot, Cache, ConsoleSpec, CpuSpec, DiskFormat, DiskSpec, VmSpec,
};
use whimbrel_qemu::engine::Accelerator;
use whimbrel_qemu::event::{EventError, EventKind, Events, Timestamp};
use whimbrel_qemu::machine::{Machine, RunState};
use whimbrel_qemu::migrate::Stream;
use whimbrel_qemu::migrate::incoming::{self, IncomingSettings, IncomingTls};
use whimbrel_qemu::migrate::outgoing::{Outgoing, OutgoingSettings, OutgoingTls};
use whimbrel_qemu::process::{Launch, Process, UnprivilegedUser};

use crate::certificates::Pool;

/// Set where a missing engine is a failure instead of a test passed over.
pub(crate) const REQUIRE: &str = "WHIMBREL_REQUIRE_ENGINES";

/// Where the versions are unpacked; 7.2 may also be the system's own.
const ENGINES_DIR: &str = "/var/tmp/whimbrel-lab/cache/engines";
const SYSTEM_ENGINE: &str = "/usr/bin/qemu-system-x86_64";

/// The user that the real QEMUs run as (`nobody`).
const USER: UnprivilegedUser = UnprivilegedUser { uid: 65534, gid: 65534 };

const MEMORY_BYTES: u64 = 64 * 1024 * 1024;

/// No wait of a test is longer.
const PATIENCE: Duration = Duration::from_secs(60);

/// A boot sector whose guest writes into each page from 1 to 60 MiB, for ever: in 32-bit mode, it
/// counts the rounds, and writes the round's number.
const WRITER: &[u8] = b"\xfa\x31\xc0\x8e\xd8\xe4\x92\x0c\x02\xe6\x92\x66\x0f\x01\x16\x60\
    \x7c\x0f\x20\xc0\x0c\x01\x0f\x22\xc0\x66\xea\x21\x7c\0\0\x08\0\x66\xb8\x10\0\x8e\
    \xd8\xbb\0\0\0\0\x43\xbf\0\0\x10\0\x89\x1f\x81\xc7\0\x10\0\0\x81\xff\0\0\xc0\x03\
    \x72\xf0\xeb\xe8";

/// What follows it: its segments, flat (code, then data), and where they are.
const WRITER_SEGMENTS: (usize, &[u8]) =
    (0x48, b"\0\0\0\0\0\0\0\0\xff\xff\0\0\0\x9a\xcf\0\xff\xff\0\0\0\x92\xcf\0\x17\0\x48\x7c\0\0");

/// One QEMU, installed or imitated.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Engine {
    pub(crate) version: &'static str,
    pub(crate) binary: PathBuf,
    pub(crate) fake: bool,
}

impl Engine {
    /// The user that it runs as. The imitations stay ours: they may lie in a folder that nobody
    /// else can enter.
    pub(crate) fn user(&self) -> Option<UnprivilegedUser> {
        (!self.fake && rustix::process::getuid().is_root()).then_some(USER)
    }
}

/// The engines that are here: the real ones, and with the feature `fake` the imitations, so that
/// what is tried on the one holds for the other.
pub(crate) fn engines() -> Vec<Engine> {
    [real_engines(), fakes::engines()].concat()
}

/// The real engines that are here, oldest first.
pub(crate) fn real_engines() -> Vec<Engine> {
    let found: Vec<Engine> = ["7.2", "10.0"].into_iter().filter_map(engine).collect();
    assert!(
        found.len() == 2 || std::env::var_os(REQUIRE).is_none(),
        "{REQUIRE} is set, but of QEMU 7.2 and 10.0 there is only {found:?}"
    );
    found
}

fn engine(version: &'static str) -> Option<Engine> {
    let unpacked = Path::new(ENGINES_DIR).join(version).join("qemu-system-x86_64");
    if unpacked.exists() {
        return Some(Engine { version, binary: unpacked, fake: false });
    }
    let output = std::process::Command::new(SYSTEM_ENGINE).arg("--version").output().ok()?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let is_it = text.contains(&format!("version {version}."));
    is_it.then(|| Engine { version, binary: SYSTEM_ENGINE.into(), fake: false })
}

/// Every pair of engines that guests are moved between, as (source, destination).
pub(crate) fn pairs() -> Vec<(Engine, Engine)> {
    let mut pairs = Vec::new();
    for engines in [real_engines(), fakes::engines()] {
        for (index, source) in engines.iter().enumerate() {
            for destination in &engines[index..] {
                pairs.push((source.clone(), destination.clone()));
            }
        }
    }
    pairs
}

#[cfg(not(feature = "fake"))]
mod fakes {
    pub(super) fn engines() -> Vec<super::Engine> {
        Vec::new()
    }
}

/// The imitations: the program behind one script a version.
#[cfg(feature = "fake")]
mod fakes {
    use std::fs;
    use std::os::unix::fs::PermissionsExt;
    use std::path::Path;

    use super::Engine;

    pub(super) fn engines() -> Vec<Engine> {
        let dir = Path::new(env!("CARGO_TARGET_TMPDIR"));
        let engine = |version| {
            let binary = dir.join(format!("fake-qemu-{version}"));
            let program = env!("CARGO_BIN_EXE_fake-qemu");
            let text = format!("#!/bin/sh\nFAKE_QEMU_VERSION={version} exec {program} \"$@\"\n");
            if fs::read_to_string(&binary).ok().as_ref() != Some(&text) {
                // Renamed into place, as another test may be about to run it.
                let new = tempfile::NamedTempFile::new_in(dir).unwrap();
                fs::write(new.path(), &text).unwrap();
                fs::set_permissions(new.path(), fs::Permissions::from_mode(0o755)).unwrap();
                new.into_temp_path().persist(&binary).unwrap();
            }
            Engine { version, binary, fake: true }
        };
        ["7.2", "10.0"].map(engine).to_vec()
    }
}

/// Bounds a wait.
pub(crate) async fn soon<T>(future: impl Future<Output = T>) -> T {
    tokio::time::timeout(PATIENCE, future).await.expect("took too long")
}

/// A folder that QEMU's user can write, and one identity for all guests in it.
pub(crate) struct Lab {
    pub(crate) dir: TempDir,
    pub(crate) uuid: Uuid,
}

impl Lab {
    pub(crate) fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let lab = Self { dir, uuid: Uuid::new_v4() };
        lab.hand_over(lab.dir.path());
        lab
    }

    /// Gives a file or folder to QEMU's user.
    pub(crate) fn hand_over(&self, path: &Path) {
        if rustix::process::getuid().is_root() {
            std::os::unix::fs::chown(path, Some(USER.uid), Some(USER.gid)).unwrap();
        }
    }

    pub(crate) fn spec(&self, name: &str, incoming: bool) -> VmSpec {
        let path = |kind: &str| self.dir.path().join(format!("{name}.{kind}"));
        VmSpec {
            name: name.to_owned(),
            uuid: self.uuid,
            machine_type: "pc-q35-7.2".to_owned(),
            accelerator: Accelerator::Tcg,
            cpu: CpuSpec { model: "Nehalem".to_owned(), features: BTreeMap::new() },
            vcpus: 1,
            memory_bytes: MEMORY_BYTES,
            boot: Boot::SeaBios,
            disks: Vec::new(),
            nics: Vec::new(),
            console: ConsoleSpec { socket: path("console"), log: path("serial") },
            qmp_socket: path("qmp"),
            incoming,
        }
    }

    /// Starts a guest, stopped.
    pub(crate) async fn start(&self, engine: &Engine, name: &str, incoming: bool) -> Guest {
        self.start_spec(engine, self.spec(name, incoming)).await
    }

    pub(crate) async fn start_spec(&self, engine: &Engine, spec: VmSpec) -> Guest {
        let log = self.dir.path().join(format!("{}.log", spec.name));
        let process = Process::spawn(Launch {
            binary: engine.binary.clone(),
            arguments: command_line::arguments(&spec).unwrap(),
            user: engine.user(),
            inherited: Vec::new(),
            log,
        })
        .unwrap();
        let identity = process.identity().clone();
        let machine = Machine::connect_to(&spec.qmp_socket, &identity, self.uuid, PATIENCE).await;
        match machine {
            Ok(machine) => Guest { spec, machine, _killed: Killed(process.clone()), process },
            Err(error) => panic!("{error:?}, QEMU said {:?}", process.last_words()),
        }
    }

    pub(crate) async fn start_running(&self, engine: &Engine, name: &str) -> Guest {
        let guest = self.start(engine, name, false).await;
        guest.machine.cont().await.unwrap();
        guest
    }

    /// A VM with a disk, which both ends share, and from which it runs [`WRITER`].
    pub(crate) fn writer(&self, name: &str, incoming: bool) -> VmSpec {
        let path = self.dir.path().join("writer.raw");
        if !path.exists() {
            let mut sector = vec![0; 1 << 20];
            sector[..WRITER.len()].copy_from_slice(WRITER);
            let (at, segments) = WRITER_SEGMENTS;
            sector[at..at + segments.len()].copy_from_slice(segments);
            sector[510..512].copy_from_slice(b"\x55\xaa");
            std::fs::write(&path, sector).unwrap();
            self.hand_over(&path);
        }
        let mut spec = self.spec(name, incoming);
        spec.disks.push(DiskSpec {
            node: "disk0".to_owned(),
            path,
            format: DiskFormat::Raw,
            read_only: false,
            serial: None,
            cache: Cache::WriteBack,
            layers: Vec::new(),
        });
        spec
    }

    /// Starts a guest that writes, and waits until it does.
    pub(crate) async fn start_writing(&self, engine: &Engine, name: &str) -> Guest {
        let guest = self.start_spec(engine, self.writer(name, false)).await;
        guest.machine.cont().await.unwrap();
        if !engine.fake {
            guest.rounds_beyond(0).await;
        }
        guest
    }

    pub(crate) fn tls(&self, hosts: [&str; 3]) -> [PathBuf; 3] {
        let pool = Pool::new();
        hosts.map(|host| {
            let dir = pool.credentials(self.dir.path(), host);
            for entry in std::fs::read_dir(&dir).unwrap() {
                self.hand_over(&entry.unwrap().path());
            }
            self.hand_over(&dir);
            dir
        })
    }
}

/// One running QEMU; killed with the value.
pub(crate) struct Guest {
    pub(crate) spec: VmSpec,
    pub(crate) machine: Machine,
    pub(crate) process: Process,
    _killed: Killed,
}

/// Kills a process when it goes, so that a failing test leaves nothing.
pub(crate) struct Killed(Process);

impl Drop for Killed {
    fn drop(&mut self) {
        self.0.kill().unwrap();
    }
}

impl Guest {
    /// Drops every handle, as the end of an agent does.
    pub(crate) fn let_go(self) -> Killed {
        self._killed
    }

    pub(crate) async fn run_state(&self) -> RunState {
        self.machine.status().await.unwrap().run_state
    }

    /// Waits for a run state.
    pub(crate) async fn reaches(&self, wanted: &RunState) {
        soon(async {
            while self.run_state().await != *wanted {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        })
        .await;
    }

    /// Waits until a guest that writes has done more rounds than that; tells how many.
    pub(crate) async fn rounds_beyond(&self, rounds: u32) -> u32 {
        soon(async {
            loop {
                let look = json!({ "command-line": "xp /1wd 0x100000" });
                let told = self.machine.qmp().execute("human-monitor-command", look).await.unwrap();
                let told = told.as_str().unwrap().split(": ").nth(1).unwrap().trim().parse();
                let now: u32 = told.unwrap();
                if now > rounds {
                    return now;
                }
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        })
        .await
    }

    pub(crate) async fn killed(&self) {
        self.process.kill_and_wait(PATIENCE).await.unwrap();
    }

    pub(crate) fn signal(&self, signal: rustix::process::Signal) {
        let pid = i32::try_from(self.process.identity().pid).unwrap();
        let pid = rustix::process::Pid::from_raw(pid).unwrap();
        rustix::process::kill_process(pid, signal).unwrap();
    }

    pub(crate) async fn listens(&self, tls: Option<IncomingTls>) -> std::net::SocketAddr {
        self.listens_as(&listening(tls)).await
    }

    pub(crate) async fn listens_as(&self, settings: &IncomingSettings) -> std::net::SocketAddr {
        match soon(incoming::prepare(&self.machine, settings)).await {
            Ok(listening) => listening.address,
            Err(error) => panic!("{error:?}"),
        }
    }
}

pub(crate) fn listening(tls: Option<IncomingTls>) -> IncomingSettings {
    IncomingSettings {
        address: IpAddr::V4(Ipv4Addr::LOCALHOST),
        ports: 49152..=49215,
        stream: Stream::default(),
        tls,
    }
}

pub(crate) fn to(address: std::net::SocketAddr, tls: Option<OutgoingTls>) -> OutgoingSettings {
    OutgoingSettings::to(address, tls)
}

/// Starts a migration that reaches its last stage only after many seconds: the guest's empty
/// pages need about 600 KiB.
pub(crate) fn slowly_to(address: std::net::SocketAddr) -> OutgoingSettings {
    OutgoingSettings {
        max_bandwidth_bytes_per_second: 16 * 1024,
        max_downtime_ms: 1,
        ..to(address, None)
    }
}

/// From the beginning to `completed` on both sides.
pub(crate) async fn moved(
    source: &Guest,
    destination: &Guest,
    settings: &OutgoingSettings,
) -> Timestamp {
    let mut outgoing = Outgoing::start(&source.machine, settings).await.unwrap();
    let progress = watch::Sender::default();
    soon(outgoing.wait_pre_switchover(&progress)).await.unwrap();
    assert_eq!(source.run_state().await, RunState::FinishMigrate);
    let completed = outgoing.continue_to_completed(PATIENCE).await.unwrap();
    // A moment after the status.
    source.reaches(&RunState::PostMigrate).await;
    let loaded = soon(incoming::wait_loaded(&destination.machine)).await.unwrap();
    assert_eq!(loaded.run_state, RunState::Paused);
    let ram = completed.statistics.ram;
    assert!(ram.total_bytes > Some(MEMORY_BYTES) && ram.remaining_bytes == Some(0), "{ram:?}");
    completed.stopped_at.expect("the STOP event was missed")
}

/// Waits for one kind of event.
pub(crate) async fn event(events: &mut Events, wanted: &EventKind) -> Timestamp {
    soon(async {
        loop {
            match events.next().await {
                Ok(event) if event.kind == *wanted => return event.at,
                Ok(_) | Err(EventError::Lagged { .. }) => {}
                Err(EventError::Closed) => panic!("the session ended before {wanted:?}"),
            }
        }
    })
    .await
}
