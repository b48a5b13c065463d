//! A lab as one thing: set up, opened again, asked, disturbed, taken down.
//!
//! ```text
//! nothing ──record written──▶ incomplete ──all hosts ready──▶ complete ──down──▶ nothing
//!                                 │ error, Cancel, or the next up or down after a kill -9 │
//!                                 └──────────────────▶ nothing ◀──────────────────────────┘
//! ```
//! The record (`lab.json`) stands before anything of the lab exists and goes after everything of it has gone.

use std::fs::{self, File, Permissions};
use std::io;
use std::net::Ipv4Addr;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::thread;
use std::time::{Duration, Instant};

use rustix::process::Signal;

use crate::cancel::Cancel;
use crate::error::LabError;
use crate::namespace::{Namespace, NamespaceId};
use crate::network::{self, Cut};
use crate::plan::{CLIENT, CONTROLLER, Folder, HostPlan, LabConfig, Plan, Rate};
use crate::probe::Probe;
use crate::processes::{self, Process};
use crate::witness::Witness;
use crate::{image, pool};

/// How long a process that was killed may take to be gone.
const END_MAX: Duration = Duration::from_secs(20);
/// How long a lab that is locked is waited for: the copies of a killed command's lock are gone by then.
const LOCK_MAX: Duration = Duration::from_secs(1);
/// How long between two tries.
const LOCK_PAUSE: Duration = Duration::from_millis(20);
/// What `scripts/setup` fills in the lab's default folder before there is a lab.
const CACHE: &str = "cache";

/// A lab that is up.
#[derive(Clone, Debug)]
pub struct Lab {
    folder: Folder,
    plan: Plan,
}

impl Lab {
    /// Sets a lab up; what an earlier one left in the folder after a kill -9 is removed first.
    ///
    /// `on_step` is told, in a few words, what happens next. On any error, and after [`Cancel::cancel`], nothing is left
    /// of the lab but its logs.
    ///
    /// # Errors
    /// Any [`LabError`]; [`LabError::AlreadyUp`], [`LabError::Busy`] and [`LabError::InTheWay`] leave the folder as it was.
    pub fn up(
        config: &LabConfig,
        cancel: &Cancel,
        on_step: &mut dyn FnMut(&str),
    ) -> Result<Self, LabError> {
        let plan = Plan::new(config)?;
        check_machine(&plan)?;
        let folder = Folder(config.dir.clone());
        let _lock = prepare_folder(&folder)?;
        if let Some(old) = read_record(&folder)? {
            if old.complete && !all_processes(&folder).is_empty() {
                return Err(LabError::AlreadyUp { dir: folder.0 });
            }
            on_step("removing what an interrupted lab left");
            take_down(&folder)?;
        }
        if let Some(path) = folder.contents().find(|path| path.symlink_metadata().is_ok()) {
            return Err(LabError::InTheWay { path });
        }
        let lab = Self { folder, plan };
        match lab.make(cancel, on_step) {
            Ok(plan) => Ok(Self { plan, ..lab }),
            Err(error) => {
                if let Err(worse) = take_down(&lab.folder) {
                    tracing::error!(error = %worse, "the unfinished lab could not be removed");
                }
                Err(error)
            }
        }
    }

    /// The lab that is up in a folder.
    ///
    /// # Errors
    /// [`LabError::NotUp`], [`LabError::NotRoot`], or an unreadable record.
    pub fn open(dir: &Path) -> Result<Self, LabError> {
        check_root()?;
        let folder = Folder(dir.to_owned());
        let not_up = || LabError::NotUp { dir: dir.to_owned() };
        let plan = read_record(&folder)?.filter(|plan| plan.complete).ok_or_else(not_up)?;
        Ok(Self { folder, plan })
    }

    /// Takes down whatever of a lab is in a folder, finished or not. Its logs and the cache stay. Returns whether there was
    /// anything.
    ///
    /// # Errors
    /// [`LabError::Busy`] while another lab command is at work; whatever could not be removed.
    pub fn down(dir: &Path) -> Result<bool, LabError> {
        check_root()?;
        let folder = Folder(dir.to_owned());
        if !folder.record().exists() {
            return Ok(false);
        }
        let _lock = lock(&folder)?;
        take_down(&folder)?;
        Ok(true)
    }

    /// The lab's folder.
    #[must_use]
    pub fn dir(&self) -> &Path {
        &self.folder.0
    }

    /// Its hosts.
    #[must_use]
    pub fn hosts(&self) -> &[HostPlan] {
        &self.plan.hosts
    }

    /// The link rate that the lab was set up with.
    #[must_use]
    pub fn link(&self) -> Option<Rate> {
        self.plan.link
    }

    /// The operator's client configuration: what `WHIMBREL_CLIENT` is to be set to.
    #[must_use]
    pub fn client_config(&self) -> PathBuf {
        self.folder.client_config()
    }

    /// The definition of the VM `web01`, for `whimbrel vm create -f`.
    #[must_use]
    pub fn vm_file(&self) -> PathBuf {
        self.folder.vm()
    }

    /// The folder of the storage `shared`, the same on all hosts.
    #[must_use]
    pub fn shared(&self) -> PathBuf {
        self.folder.shared()
    }

    /// The log of the controller, or of a host's agent.
    #[must_use]
    pub fn log(&self, name: &str) -> PathBuf {
        self.folder.log(name)
    }

    /// A `whimbrel` command with the operator's rights in this pool, to be run by the caller.
    #[must_use]
    pub fn operator_command(&self, args: &[&str]) -> Command {
        pool::operator_command(&self.folder, &self.plan, args)
    }

    /// Runs a `whimbrel` command with the operator's rights in this pool, and returns what it prints.
    ///
    /// # Errors
    /// [`LabError::Tool`] with its words if it fails.
    pub fn whimbrel(&self, args: &[&str]) -> Result<String, LabError> {
        pool::whimbrel(&self.folder, &self.plan, args)
    }

    /// Starts a command in the network of a host, of [`crate::CONTROLLER`] or of [`crate::CLIENT`].
    ///
    /// # Errors
    /// [`LabError::UnknownHost`], [`LabError::Spawn`].
    pub fn spawn(&self, place: &str, command: &mut Command) -> Result<Child, LabError> {
        let program = command.get_program().to_string_lossy().into_owned();
        self.run(place, || command.spawn())?.map_err(|source| LabError::Spawn { program, source })
    }

    /// Runs something in a thread in the network of a host, of [`crate::CONTROLLER`] or of [`crate::CLIENT`]; sockets made
    /// there stay there.
    ///
    /// # Errors
    /// [`LabError::UnknownHost`], [`LabError::Namespace`].
    pub fn run<T: Send>(
        &self,
        place: &str,
        work: impl FnOnce() -> T + Send,
    ) -> Result<T, LabError> {
        self.namespace(place)?.run(work).map_err(LabError::namespace("enter", place))
    }

    /// The processes in the network of a host, of [`crate::CONTROLLER`] or of [`crate::CLIENT`].
    ///
    /// # Errors
    /// [`LabError::UnknownHost`].
    pub fn processes(&self, place: &str) -> Result<Vec<Process>, LabError> {
        let id = self.namespace(place)?.id();
        Ok(id
            .into_iter()
            .flat_map(|id| processes::in_namespaces(&[id]).into_values().flatten())
            .collect())
    }

    /// The QEMUs that run on a host.
    ///
    /// # Errors
    /// [`LabError::UnknownHost`].
    pub fn qemus(&self, host: &str) -> Result<Vec<Process>, LabError> {
        let is_qemu = |process: &Process| {
            let program = process.command.split(' ').next().unwrap_or_default();
            program.rsplit('/').next().is_some_and(|name| name.starts_with("qemu-system"))
        };
        Ok(self.processes(host)?.into_iter().filter(is_qemu).collect())
    }

    /// The agent of a host, or the controller, if it runs.
    #[must_use]
    pub fn daemon(&self, name: &str) -> Option<Process> {
        pool::daemon(&self.folder, name)
    }

    /// Kills a process as kill -9 does, and returns when it is gone.
    ///
    /// # Errors
    /// [`LabError::Undying`].
    pub fn kill(&self, process: &Process) -> Result<(), LabError> {
        process.signal(Signal::KILL);
        processes::wait_for_end(process, Instant::now() + END_MAX);
        if process.is_alive() { Err(LabError::Undying { pids: vec![process.pid] }) } else { Ok(()) }
    }

    /// Makes a process stand still (SIGSTOP), or go on (SIGCONT).
    pub fn freeze(&self, process: &Process, frozen: bool) {
        process.signal(if frozen { Signal::STOP } else { Signal::CONT });
    }

    /// Starts the agent of a host, or the controller, again.
    ///
    /// # Errors
    /// [`LabError::UnknownHost`]; [`LabError::AlreadyUp`] if it runs; whatever prevents its start.
    pub fn start_daemon(&self, name: &str) -> Result<Process, LabError> {
        if self.daemon(name).is_some() {
            return Err(LabError::AlreadyUp { dir: self.folder.0.clone() });
        }
        if name == CONTROLLER {
            return pool::start_controller(&self.folder, &self.plan);
        }
        let host = self
            .plan
            .hosts
            .iter()
            .find(|host| host.name == name)
            .ok_or_else(|| self.unknown(name))?;
        pool::start_agent(&self.folder, &self.plan, host, None)
    }

    /// Drops packets on a host's management and migration link, until [`Lab::restore`].
    ///
    /// # Errors
    /// [`LabError::UnknownHost`], [`LabError::Tool`].
    pub fn cut(&self, host: &str, cut: Cut) -> Result<(), LabError> {
        self.namespace(host)?;
        network::cut(&self.folder, host, cut)
    }

    /// Undoes [`Lab::cut`].
    ///
    /// # Errors
    /// As [`Lab::cut`].
    pub fn restore(&self, host: &str) -> Result<(), LabError> {
        self.namespace(host)?;
        network::restore(&self.folder, host)
    }

    /// Changes the rate of a host's management and migration link, both ways; none is as fast as the machine.
    ///
    /// # Errors
    /// As [`Lab::cut`].
    pub fn set_link(&self, host: &str, rate: Option<Rate>) -> Result<(), LabError> {
        self.namespace(host)?;
        network::shape(&self.folder, host, rate)
    }

    /// Connects to the witness in a guest.
    ///
    /// # Errors
    /// [`LabError::Guest`] if it does not answer (yet).
    pub fn witness(&self, guest: Ipv4Addr) -> Result<Witness, LabError> {
        self.run(CLIENT, || Witness::connect_guest(guest))?
    }

    /// Begins to watch a guest from the client's network.
    ///
    /// # Errors
    /// [`LabError::Guest`] if it does not answer (yet).
    pub fn probe(&self, guest: Ipv4Addr) -> Result<Probe, LabError> {
        self.run(CLIENT, || Probe::start(guest))?
            .map_err(|source| LabError::Guest { address: guest, source })
    }

    fn make(&self, cancel: &Cancel, on_step: &mut dyn FnMut(&str)) -> Result<Plan, LabError> {
        write_record(&self.folder, &self.plan)?;
        let namespaces = self.folder.namespace("");
        if self.folder.logs().exists() {
            fs::remove_dir_all(self.folder.logs())
                .map_err(LabError::file("empty", self.folder.logs()))?;
        }
        for folder in [namespaces, self.folder.logs()] {
            fs::create_dir_all(&folder).map_err(LabError::file("make", &folder))?;
        }
        on_step("joining the hosts' networks");
        network::build(&self.folder, &self.plan)?;
        cancel.check()?;
        pool::start(&self.folder, &self.plan, cancel, on_step)?;
        cancel.check()?;
        let complete = Plan { complete: true, ..self.plan.clone() };
        write_record(&self.folder, &complete)?;
        Ok(complete)
    }

    fn namespace(&self, place: &str) -> Result<Namespace, LabError> {
        let is_known = self.plan.namespaces().any(|name| name == place);
        if is_known {
            Ok(Namespace::at(self.folder.namespace(place)))
        } else {
            Err(self.unknown(place))
        }
    }

    fn unknown(&self, name: &str) -> LabError {
        let known: Vec<&str> = self.plan.namespaces().skip(1).collect();
        LabError::UnknownHost { name: name.to_owned(), known: known.join(", ") }
    }
}

fn check_root() -> Result<(), LabError> {
    if rustix::process::geteuid().is_root() { Ok(()) } else { Err(LabError::NotRoot) }
}

/// Everything that `up` needs and does not make, looked at before anything is changed.
fn check_machine(plan: &Plan) -> Result<(), LabError> {
    check_root()?;
    let kernel = plan.cache.join("kernel");
    let needed = [plan.binary.clone(), kernel.join("vmlinuz"), kernel.join("modules.load")];
    let engines = plan.hosts.iter().map(|host| host.engine.clone());
    if let Some(path) = needed.into_iter().chain(engines).find(|path| !path.is_file()) {
        return Err(LabError::NotSetUp { path });
    }
    image::find_witness().map(drop)
}

/// Makes the folder, such that QEMU reaches into it, and locks it.
fn prepare_folder(folder: &Folder) -> Result<File, LabError> {
    if !folder.0.exists() {
        fs::create_dir_all(&folder.0).map_err(LabError::file("make", &folder.0))?;
        fs::set_permissions(&folder.0, Permissions::from_mode(0o755))
            .map_err(LabError::file("open", &folder.0))?;
    }
    if let Some(path) = foreign(folder)? {
        return Err(LabError::InTheWay { path });
    }
    for ancestor in folder.0.ancestors() {
        let mode = fs::metadata(ancestor)
            .map_err(LabError::file("look at", ancestor))?
            .permissions()
            .mode();
        if mode & 0o001 == 0 {
            return Err(LabError::NotTraversable { path: ancestor.to_owned() });
        }
    }
    lock(folder)
}

/// What is in a folder in which no lab has ever been, besides the cache that `scripts/setup` fills: it is somebody's, and
/// a lab would empty its logs and lie among it.
fn foreign(folder: &Folder) -> Result<Option<PathBuf>, LabError> {
    if folder.lock().exists() {
        return Ok(None);
    }
    let unreadable = || LabError::file("look into", &folder.0);
    for entry in fs::read_dir(&folder.0).map_err(unreadable())? {
        let entry = entry.map_err(unreadable())?;
        if entry.file_name() != CACHE {
            return Ok(Some(entry.path()));
        }
    }
    Ok(None)
}

/// The lock is the kernel's, so a killed command never leaves it behind, at least not for long: a child that it was just
/// starting has a copy of it until it runs its program.
fn lock(folder: &Folder) -> Result<File, LabError> {
    let path = folder.lock();
    let file = File::create(&path).map_err(LabError::file("open", &path))?;
    let by = Instant::now() + LOCK_MAX;
    loop {
        match file.try_lock() {
            Ok(()) => return Ok(file),
            Err(fs::TryLockError::WouldBlock) if Instant::now() < by => thread::sleep(LOCK_PAUSE),
            Err(fs::TryLockError::WouldBlock) => {
                return Err(LabError::Busy { dir: folder.0.clone() });
            }
            Err(fs::TryLockError::Error(source)) => {
                return Err(LabError::file("lock", path)(source));
            }
        }
    }
}

pub(crate) fn read_record(folder: &Folder) -> Result<Option<Plan>, LabError> {
    let path = folder.record();
    match fs::read(&path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(LabError::file("read", path)(error)),
        Ok(text) => serde_json::from_slice(&text)
            .map(Some)
            .map_err(|source| LabError::Record { path, source }),
    }
}

/// Written beside and renamed, so that a killed command leaves the old record or the new one.
fn write_record(folder: &Folder, plan: &Plan) -> Result<(), LabError> {
    let (path, beside) = (folder.record(), folder.0.join(".lab.json.new"));
    let text = serde_json::to_vec_pretty(plan)
        .map_err(|source| LabError::Record { path: path.clone(), source })?;
    fs::write(&beside, text).map_err(LabError::file("write", &beside))?;
    fs::rename(&beside, &path).map_err(LabError::file("write", &path))
}

/// The lab's namespaces that exist: found in its folder, so that no record needs to be believed.
fn namespaces(folder: &Folder) -> Vec<Namespace> {
    let Ok(entries) = fs::read_dir(folder.namespace("")) else { return Vec::new() };
    entries.flatten().map(|entry| Namespace::at(entry.path())).collect()
}

fn all_processes(folder: &Folder) -> Vec<Process> {
    let ids: Vec<NamespaceId> = namespaces(folder).iter().filter_map(Namespace::id).collect();
    processes::in_namespaces(&ids).into_values().flatten().collect()
}

/// Processes first, for they hold the rest; the record last, for it says that there is something to take down.
fn take_down(folder: &Folder) -> Result<(), LabError> {
    let namespaces = namespaces(folder);
    let ids: Vec<NamespaceId> = namespaces.iter().filter_map(Namespace::id).collect();
    processes::kill_all(&ids)?;
    for namespace in namespaces {
        namespace.remove().map_err(LabError::file("remove", namespace.path()))?;
    }
    for path in folder.contents().chain([folder.record()]) {
        remove(&path).map_err(LabError::file("remove", &path))?;
    }
    Ok(())
}

fn remove(path: &Path) -> io::Result<()> {
    match path.symlink_metadata() {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(error) => Err(error),
        Ok(metadata) if metadata.is_dir() => fs::remove_dir_all(path),
        Ok(_) => fs::remove_file(path),
    }
}
