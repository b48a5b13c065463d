//! A host for a test: its folder, its identity, and agents that live and die on it.

use std::fs::Permissions;
use std::future::Future;
use std::net::SocketAddr;
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
use whimbrel_pki::files::{ControllerIdentity, HostIdentity};

/// How long a test waits for what must come.
pub(crate) const PATIENCE: Duration = Duration::from_secs(60);

/// A pool without its controller: an authority, a storage that all hosts share, and a folder for all of it.
pub(crate) struct Pool {
    dir: tempfile::TempDir,
    pub(crate) authority: Authority,
    pub(crate) controller: ControllerIdentity,
}

/// One host of a pool.
pub(crate) struct Place {
    pub(crate) pool: Arc<Pool>,
    pub(crate) config: AgentConfig,
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

impl Pool {
    pub(crate) fn new() -> Arc<Self> {
        let dir = tempfile::Builder::new().prefix("wb").tempdir().unwrap();
        for (folder, mode) in [(".", 0o755), ("storage", 0o755), ("watch", 0o777)] {
            let path = dir.path().join(folder);
            std::fs::create_dir_all(&path).unwrap();
            std::fs::set_permissions(&path, Permissions::from_mode(mode)).unwrap();
        }
        let authority = Authority::create().unwrap();
        let controller = ControllerIdentity::issue(&authority).unwrap();
        Arc::new(Self { dir, authority, controller })
    }

    pub(crate) fn dir(&self) -> &Path {
        self.dir.path()
    }

    /// A host whose QEMU is the fake.
    pub(crate) fn host(self: &Arc<Self>, name: &str, port: u16) -> Place {
        self.host_of_version(name, port, "7.2")
    }

    /// A host whose QEMU is the fake of a version.
    pub(crate) fn host_of_version(self: &Arc<Self>, name: &str, port: u16, version: &str) -> Place {
        // A copy within reach of QEMU's user, behind a script that tells the fake of its test.
        let program = self.dir().join("fake-qemu");
        if !program.exists() {
            std::fs::copy(fake_qemu(), &program).unwrap();
        }
        let engine = self.dir().join(format!("{name}-qemu"));
        let place = self.host_with_engine(name, port, &engine);
        let script = format!(
            "#!/bin/sh\nexport FAKE_QEMU_VERSION={version} FAKE_QEMU_WATCH_DIR={} FAKE_QEMU_FAULTS_FILE={}\nexec {} \"$@\"\n",
            self.dir().join("watch").display(),
            place.faults_file().display(),
            program.display(),
        );
        std::fs::write(&engine, script).unwrap();
        std::fs::set_permissions(&engine, Permissions::from_mode(0o755)).unwrap();
        place
    }

    fn host_with_engine(self: &Arc<Self>, name: &str, port: u16, engine: &Path) -> Place {
        let listen = SocketAddr::from(([127, 0, 0, 1], port));
        let mut config = AgentConfig::new(self.dir().join(name), name.parse().unwrap(), listen);
        config.engines = vec![engine.to_owned()];
        config.accelerator = AcceleratorChoice::Tcg;
        HostIdentity::issue(&self.authority, name).unwrap().save(&config.pki_dir()).unwrap();
        Place { pool: Arc::clone(self), config }
    }
}

impl Place {
    /// A host in a pool of its own, whose QEMU is the fake.
    pub(crate) fn with_fake() -> Self {
        Pool::new().host("a", 7440)
    }

    /// A host in a pool of its own, with this QEMU.
    pub(crate) fn with_engine(engine: &Path) -> Self {
        Pool::new().host_with_engine("a", 7440, engine)
    }

    /// The folder of the whole pool.
    pub(crate) fn dir(&self) -> &Path {
        self.pool.dir()
    }

    /// What goes wrong in every fake of this host.
    pub(crate) fn faults_file(&self) -> PathBuf {
        self.dir().join(format!("{}-faults", self.config.name))
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

    /// Ends the sessions between this host's agent and its QEMUs, which both live on.
    pub(crate) fn cut_sessions(&self) -> usize {
        use nix::sys::socket::{Shutdown, UnixAddr, getpeername, shutdown};
        let run_dir = self.config.run_dir();
        let of_this_host = |fd: &i32| {
            let peer = getpeername::<UnixAddr>(*fd).ok();
            peer.and_then(|peer| Some(peer.path()?.starts_with(&run_dir))).unwrap_or_default()
        };
        let open = std::fs::read_dir("/proc/self/fd").unwrap();
        let open = open.filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok());
        let sessions: Vec<i32> = open.filter(of_this_host).collect();
        for session in &sessions {
            shutdown(*session, Shutdown::Both).unwrap();
        }
        sessions.len()
    }

    pub(crate) fn failpoints(&self, orders: &str) {
        std::fs::write(self.config.dir.join("failpoints"), orders).unwrap();
    }

    /// One life of the agent: it takes up what was there, `during` happens, and it dies without a word.
    pub(crate) fn life<T, F: Future<Output = T>>(&self, during: impl FnOnce(Arc<Host>) -> F) -> T {
        let runtime = runtime();
        let outcome = runtime.block_on(async {
            let agent = self.prepare().await;
            during(Arc::clone(&agent.host)).await
        });
        runtime.shutdown_timeout(PATIENCE);
        outcome
    }

    /// One life of the agent with its door open, until it is killed.
    pub(crate) fn live(&self) -> Life {
        let runtime = runtime();
        let host = runtime.block_on(async {
            let agent = self.prepare().await;
            let host = Arc::clone(&agent.host);
            tokio::spawn(agent.serve(std::future::pending()));
            let listen = self.config.listen;
            eventually(async || tokio::net::TcpStream::connect(listen).await.is_ok()).await;
            host
        });
        Life { host, runtime }
    }

    async fn prepare(&self) -> Agent {
        let agent = Agent::prepare(self.config.clone()).await.unwrap();
        agent.host.storages.put(self.storage());
        agent.host.ledger.put_storage(&self.storage()).await.unwrap();
        agent
    }

    pub(crate) fn storage(&self) -> Storage {
        let path = self.dir().join("storage");
        Storage { name: storage_name(), path: path.to_str().unwrap().to_owned(), shared: true }
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
        assert!(!self.dir().join("watch/violations").exists());
    }
}

/// An agent that lives.
pub(crate) struct Life {
    pub(crate) host: Arc<Host>,
    runtime: tokio::runtime::Runtime,
}

impl Life {
    /// Lets something happen in the agent's own runtime.
    pub(crate) async fn spawn<T: Send + 'static>(
        &self,
        work: impl Future<Output = T> + Send + 'static,
    ) -> T {
        self.runtime.spawn(work).await.unwrap()
    }

    /// Ends the agent without a word, as `kill -9` would.
    pub(crate) fn kill(self) {
        drop(self.host);
        self.runtime.shutdown_timeout(PATIENCE);
    }
}

fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap()
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
        layers: Vec::new(),
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
        saved: None,
        origin: None,
        template: false,
        snapshots: Vec::new(),
        snapshot: None,
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
