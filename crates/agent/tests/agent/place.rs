//! A host for a test: its folder, its identity, and agents that live and die on it.

use std::future::Future;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use whimbrel_agent::Agent;
use whimbrel_agent::config::{AcceleratorChoice, AgentConfig};
use whimbrel_agent::host::Host;
use whimbrel_api::agent::VmReport;
use whimbrel_api::pool::Storage;
use whimbrel_api::vm::{Boot, Disk, ImageFormat, StoragePath, VmAction, VmDefinition, VmState};
use whimbrel_api::{Name, VmId};
use whimbrel_pki::authority::Authority;
use whimbrel_pki::files::HostIdentity;

/// How long a test waits for what must come.
pub(crate) const PATIENCE: Duration = Duration::from_secs(60);

pub(crate) struct Place {
    pub(crate) dir: tempfile::TempDir,
    pub(crate) config: AgentConfig,
    pub(crate) authority: Authority,
}

/// Runs a test on a thread with a network namespace of its own, which vanishes with it.
pub(crate) fn in_namespace(test: impl FnOnce() + Send + 'static) {
    let thread = std::thread::spawn(move || {
        nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNET).expect("root");
        let up = std::process::Command::new("ip").args(["link", "set", "lo", "up"]).status();
        assert!(up.unwrap().success());
        test();
    });
    thread.join().unwrap();
}

/// The fake, which cargo builds with the tests.
fn fake_qemu() -> PathBuf {
    let own = std::env::current_exe().unwrap();
    let fake = own.parent().unwrap().parent().unwrap().join("examples/fake-qemu");
    assert!(fake.exists(), "{} is built with the tests", fake.display());
    fake
}

impl Place {
    /// A host whose QEMU is the fake.
    pub(crate) fn with_fake() -> Self {
        let place = Self::with_engine(Path::new("/set/below"));
        // A copy within reach of QEMU's user, behind a script that tells the fake of its test.
        let program = place.dir.path().join("fake-qemu");
        std::fs::copy(fake_qemu(), &program).unwrap();
        let watch = place.dir.path().join("watch");
        std::fs::create_dir(&watch).unwrap();
        std::fs::set_permissions(&watch, std::fs::Permissions::from_mode(0o777)).unwrap();
        let script = format!(
            "#!/bin/sh\nexport FAKE_QEMU_VERSION=7.2 FAKE_QEMU_WATCH_DIR={} FAKE_QEMU_FAULTS_FILE={}\nexec {} \"$@\"\n",
            watch.display(),
            place.faults_file().display(),
            program.display(),
        );
        let engine = &place.config.engines[0];
        std::fs::write(engine, script).unwrap();
        std::fs::set_permissions(engine, std::fs::Permissions::from_mode(0o755)).unwrap();
        place
    }

    /// A host with this QEMU, or with a script that is yet to be written in its folder.
    pub(crate) fn with_engine(engine: &Path) -> Self {
        let dir = tempfile::Builder::new().prefix("wb").tempdir().unwrap();
        std::fs::set_permissions(dir.path(), std::fs::Permissions::from_mode(0o755)).unwrap();
        std::fs::create_dir(dir.path().join("storage")).unwrap();
        let authority = Authority::create().unwrap();
        let listen = "127.0.0.1:7440".parse().unwrap();
        let mut config = AgentConfig::new(dir.path().join("a"), "host-a".parse().unwrap(), listen);
        config.engines =
            vec![if engine.exists() { engine.to_owned() } else { dir.path().join("qemu") }];
        config.accelerator = AcceleratorChoice::Tcg;
        HostIdentity::issue(&authority, "host-a").unwrap().save(&config.pki_dir()).unwrap();
        Self { dir, config, authority }
    }

    /// What goes wrong in every fake of this host.
    pub(crate) fn faults_file(&self) -> PathBuf {
        self.dir.path().join("faults")
    }

    pub(crate) fn faults(&self, faults: &str) {
        std::fs::write(self.faults_file(), faults).unwrap();
    }

    /// What goes wrong in the one QEMU that runs, and in no other.
    pub(crate) fn faults_of_running(&self, faults: &str) {
        let run = self.run_folders().pop().unwrap();
        let file = self.config.run_dir().join(run).join("q/qmp.sock.faults");
        std::fs::write(file, faults).unwrap();
    }

    pub(crate) fn failpoints(&self, orders: &str) {
        std::fs::write(self.config.dir.join("failpoints"), orders).unwrap();
    }

    /// One life of the agent: it takes up what was there, `during` happens, and it dies without a word.
    pub(crate) fn life<T, F: Future<Output = T>>(&self, during: impl FnOnce(Arc<Host>) -> F) -> T {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(2)
            .enable_all()
            .build()
            .unwrap();
        let outcome = runtime.block_on(async {
            let agent = Agent::prepare(self.config.clone()).await.unwrap();
            agent.host.storages.put(self.storage());
            agent.host.ledger.put_storage(&self.storage()).await.unwrap();
            during(Arc::clone(&agent.host)).await
        });
        runtime.shutdown_timeout(PATIENCE);
        outcome
    }

    pub(crate) fn storage(&self) -> Storage {
        let path = self.dir.path().join("storage");
        Storage { name: storage_name(), path: path.to_str().unwrap().to_owned(), shared: false }
    }

    /// The folders of QEMUs that are there.
    pub(crate) fn run_folders(&self) -> Vec<String> {
        let entries = std::fs::read_dir(self.config.run_dir()).unwrap();
        entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect()
    }

    /// The QEMUs of this host that live: those whose arguments name its folder.
    pub(crate) fn processes(&self) -> Vec<u32> {
        let marker = self.config.run_dir().to_str().unwrap().to_owned();
        let of_this_host = |pid: &u32| {
            let arguments = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
            String::from_utf8_lossy(&arguments).contains(&marker)
        };
        let entries = std::fs::read_dir("/proc").unwrap();
        let pids = entries.filter_map(|entry| entry.unwrap().file_name().to_str()?.parse().ok());
        pids.filter(of_this_host).collect()
    }

    /// Nothing is left of any run, and no guest has ever run twice at once.
    pub(crate) async fn assert_clean(&self, host: &Host) {
        eventually(async || self.processes().is_empty()).await;
        assert_eq!(self.run_folders(), Vec::<String>::new());
        assert_eq!(host.ledger.runs().await.unwrap(), []);
        assert_eq!(host.ledger.journaled().await.unwrap(), []);
        assert!(!self.dir.path().join("watch/violations").exists());
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        // Only what this test's agents have started is ended, also when the test fails.
        for pid in self.processes() {
            kill(pid);
        }
    }
}

pub(crate) fn kill(pid: u32) {
    let pid = rustix::process::Pid::from_raw(i32::try_from(pid).unwrap()).unwrap();
    let _ = rustix::process::kill_process(pid, rustix::process::Signal::KILL);
}

pub(crate) fn storage_name() -> Name {
    "local".parse().unwrap()
}

/// A VM with one small disk.
pub(crate) fn definition() -> VmDefinition {
    let disk = Disk {
        name: "vda".parse().unwrap(),
        file: StoragePath::new(storage_name(), "to/be-pinned").unwrap(),
        format: ImageFormat::Qcow2,
        size_bytes: 1 << 20,
        read_only: false,
        import: None,
    };
    VmDefinition {
        id: VmId::new(),
        generation: 0,
        name: "web01".parse().unwrap(),
        vcpus: 1,
        memory_bytes: 64 << 20,
        cpu: "qemu64".to_owned(),
        machine: String::new(),
        boot: Boot::default(),
        disks: vec![disk],
        nics: Vec::new(),
    }
}

/// A VM that runs.
pub(crate) async fn running(host: &Arc<Host>) -> VmReport {
    let made = whimbrel_agent::vm::create(host, definition()).await.unwrap();
    start(host, made.definition.id).await
}

pub(crate) async fn start(host: &Host, vm: VmId) -> VmReport {
    let report = host.vms.act(vm, VmAction::Start, false).await.unwrap();
    assert_eq!(report.state, VmState::Running);
    report
}

pub(crate) fn state(host: &Host, vm: VmId) -> VmState {
    host.vms.report(vm).unwrap().state
}

/// Waits for what must come some day.
pub(crate) async fn eventually(mut come: impl AsyncFnMut() -> bool) {
    let waiting = async {
        while !come().await {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    tokio::time::timeout(PATIENCE, waiting).await.expect("it must come");
}
