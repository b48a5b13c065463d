//! Makes a QEMU for a definition, with its folder and taps, and takes it down again as one.
//!
//! The same code for a fresh start and for the receiving end of a migration, so that both build the same machine. Every
//! thing is in the journal before it exists and until it is gone (I22); whatever fails, nothing is left that the journal
//! does not name. No guest runs after [`spawn`]: QEMU is always started stopped.

use std::fs::{DirBuilder, Permissions};
use std::os::unix::fs::{DirBuilderExt, PermissionsExt, chown};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use uuid::Uuid;
use whimbrel_api::vm::{Boot, Firmware, ImageFormat, RunningEngine, StoragePath, VmDefinition};
use whimbrel_api::{ApiError, ErrorCode, MigrationId};
use whimbrel_qemu::command_line::{self, Cache, CpuSpec, DiskFormat, LayerSpec, VmSpec};
use whimbrel_qemu::engine::EngineFacts;
use whimbrel_qemu::machine::Machine;
use whimbrel_qemu::process::{Inherited, Launch, Process};

use super::found::has_ended;
use super::running::{RunDir, SOCKET_PATH_BYTES_MAX, Spawned};
use crate::host::Host;
use crate::in_hand::Hold;
use crate::ledger::Resource;
use crate::network::{Tap, tap_name};
use crate::storage::{self, Aside};
use crate::validate;

/// How long a new QEMU may take until it answers, in seconds; on a loaded machine it is slow to load its libraries.
const ANSWER_SECONDS: u64 = 20;
/// How long a killed QEMU may take to be gone, in seconds; it can hang in dead storage.
const KILL_SECONDS: u64 = 10;
/// The number of the first tap's descriptor in QEMU.
const TAP_FIRST_NUMBER: i32 = 10;
/// Mode of a run's folder: QEMU's user can pass, and change nothing.
const RUN_FOLDER_MODE: u32 = 0o711;
/// Mode of the folder in it that is QEMU's.
const QEMU_FOLDER_MODE: u32 = 0o700;
/// Hexadecimal digits that tell the runs of a VM apart.
const RUN_DIGITS: usize = 8;

/// UEFI's code, where distributions put it: its format raw, its variables beside it.
const OVMF: [(&str, &str); 2] = [
    ("/usr/share/OVMF/OVMF_CODE_4M.fd", "/usr/share/OVMF/OVMF_VARS_4M.fd"),
    ("/usr/share/OVMF/OVMF_CODE.fd", "/usr/share/OVMF/OVMF_VARS.fd"),
];

/// What a QEMU is spawned for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Purpose {
    /// A fresh guest.
    Start,
    /// To receive this migration (`-incoming defer`).
    Receive(MigrationId),
    /// To go on from a saved state (`-incoming defer`).
    Restore,
}

/// Spawns a QEMU for a definition. On success it answers, its guest stands still, and ledger and journal name all of it.
///
/// # Errors
/// A refusal or a failure; nothing is left, or the journal names it and the next sweep takes it.
pub async fn spawn(
    host: &Arc<Host>,
    definition: &VmDefinition,
    purpose: Purpose,
) -> Result<Spawned, ApiError> {
    validate::definition(definition)?;
    let engine = host.engine_for(&definition.machine)?;
    let run = run_name(definition, purpose);
    let dir = RunDir::new(&host.config.run_dir(), &run);
    check_socket_path(&dir)?;
    let files = Files::resolve(host, definition).await?;
    // Until it is known what belongs to whom, the sweep passes by.
    let hold = host.in_hand.hold(&run);
    let taps: Vec<String> = (0..definition.nics.len()).map(|index| tap_name(&run, index)).collect();

    let mut journal = vec![Resource::Run { name: run.clone() }];
    journal.extend(taps.iter().map(|name| Resource::Tap { name: name.clone(), run: run.clone() }));
    host.ledger.journal(&run, &journal).await?;

    let plan = Plan { host, definition, purpose, engine, run, dir, files, taps };
    let process = match plan.launch().await {
        Ok(process) => process,
        Err(error) => {
            sweep_run(host, &plan.run, &plan.taps).await;
            return Err(error);
        }
    };
    match plan.get_to_know(&process, hold).await {
        Ok(spawned) => Ok(spawned),
        Err(error) => {
            // Nothing is taken from under a QEMU that lives.
            match end(host, &process).await {
                Ok(()) => sweep_run(host, &plan.run, &plan.taps).await,
                Err(left) => {
                    tracing::error!(run = plan.run, error = %left, "a QEMU is left to the next sweep");
                }
            }
            Err(error)
        }
    }
}

/// Whether a definition could be started on this host: an engine, its networks, its files. Nothing is made.
///
/// # Errors
/// What is missing.
pub(crate) async fn could_start(
    host: &Arc<Host>,
    definition: &VmDefinition,
) -> Result<(), ApiError> {
    validate::definition(definition)?;
    host.engine_for(&definition.machine)?;
    for nic in &definition.nics {
        if host.networks.get(&nic.network).is_none() {
            return Err(ApiError::not_found("network", &nic.network));
        }
    }
    Files::resolve(host, definition).await.map(drop)
}

/// Ends a QEMU at once and takes down all that was made for it.
///
/// # Errors
/// `internal` where the process does not end or something cannot be removed; the journal still names it.
pub async fn destroy(host: &Host, spawned: &Spawned) -> Result<(), ApiError> {
    end(host, &spawned.process).await?;
    take_down(host, &spawned.run, &spawned.taps).await
}

/// Kills a process and waits until it is gone.
///
/// # Errors
/// `internal` where it does not end.
pub(crate) async fn end(host: &Host, process: &Process) -> Result<(), ApiError> {
    host.failpoints.hit("vm.end").await?;
    let ended = process.kill_and_wait(Duration::from_secs(KILL_SECONDS)).await;
    ended.map_err(|error| ApiError::internal("QEMU was not ended", &error))?;
    if has_ended(process.identity()) {
        return Ok(());
    }
    Err(ApiError::new(ErrorCode::Internal, "QEMU was not ended: its end was told, and it lives"))
}

/// Takes down what was made for a run whose process is gone.
///
/// # Errors
/// `internal` where something cannot be removed; the journal still names it.
pub(crate) async fn take_down(host: &Host, run: &str, taps: &[String]) -> Result<(), ApiError> {
    host.failpoints.hit("vm.take-down").await?;
    for tap in taps {
        host.networks.remove(tap).await?;
    }
    let path = host.config.run_dir().join(run);
    match tokio::fs::remove_dir_all(&path).await {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            return Err(ApiError::internal(&format!("cannot remove {}", path.display()), &error));
        }
        _ => {}
    }
    host.ledger.remove_run(run).await?;
    Ok(())
}

/// As [`take_down`], for a caller who has another error to tell: what fails here is left to the next sweep.
pub(crate) async fn sweep_run(host: &Host, run: &str, taps: &[String]) {
    if let Err(error) = take_down(host, run, taps).await {
        tracing::warn!(run, %error, "something is left to the next sweep");
    }
}

/// Where UEFI's code and its pristine variables are on this host.
///
/// # Errors
/// `engine` where OVMF is not installed.
pub(super) fn ovmf() -> Result<(PathBuf, PathBuf), ApiError> {
    let pairs =
        OVMF.iter().map(|(code, variables)| (PathBuf::from(code), PathBuf::from(variables)));
    pairs.into_iter().find(|(code, variables)| code.is_file() && variables.is_file()).ok_or_else(
        || {
            ApiError::new(ErrorCode::Engine, "UEFI firmware is not installed on this host")
                .hint("install the package `ovmf`")
        },
    )
}

/// Where a VM's UEFI variables are: beside its first disk.
pub(super) fn variables_file(definition: &VmDefinition) -> Result<StoragePath, ApiError> {
    let disk = definition.disks.first().ok_or_else(|| {
        ApiError::new(
            ErrorCode::BadRequest,
            "a VM that boots by UEFI needs a disk, beside which its variables are kept",
        )
    })?;
    Ok(StoragePath {
        storage: disk.file.storage.clone(),
        path: format!("{}/ovmf-variables.raw", storage::vm_folder(definition.id)),
    })
}

struct Plan<'a> {
    host: &'a Arc<Host>,
    definition: &'a VmDefinition,
    purpose: Purpose,
    engine: &'a EngineFacts,
    run: String,
    dir: RunDir,
    files: Files,
    taps: Vec<String>,
}

impl Plan<'_> {
    /// Makes what QEMU needs, and its process last.
    async fn launch(&self) -> Result<Process, ApiError> {
        let host = self.host;
        self.make_folders().map_err(|error| {
            ApiError::internal(&format!("cannot make {}", self.dir.path().display()), &error)
        })?;
        let mut inherited = Vec::new();
        for ((name, nic), number) in
            self.taps.iter().zip(&self.definition.nics).zip(TAP_FIRST_NUMBER..)
        {
            let Tap { descriptor, .. } = host.networks.make_tap(name, nic).await?;
            inherited.push(Inherited { descriptor, number });
        }
        let arguments = command_line::arguments(&self.spec())
            .map_err(|error| ApiError::new(ErrorCode::BadRequest, error.to_string()))?;
        host.failpoints.hit("vm.start.spawn").await?;
        Process::spawn(Launch {
            binary: self.engine.binary.clone(),
            arguments,
            user: Some(host.qemu_user()),
            inherited,
            log: self.dir.qemu_log(),
        })
        .map_err(|error| ApiError::new(ErrorCode::Engine, whimbrel_api::error::chain(&error)))
    }

    /// Notes the new process and opens a session with it.
    async fn get_to_know(&self, process: &Process, hold: Hold) -> Result<Spawned, ApiError> {
        self.host.failpoints.hit("vm.spawned").await?;
        let socket = self.dir.qmp_socket();
        let vm = *self.definition.id.as_uuid();
        let deadline = Duration::from_secs(ANSWER_SECONDS);
        let session = Machine::connect_to(&socket, process.identity(), vm, deadline);
        // The ledger's fsync and QEMU's start-up take their time at once. Until the process is noted its guest cannot
        // have run, so a crash in between leaves an orphan that the sweep knows by its socket's path.
        let record = self.record(process);
        let (noted, machine) = tokio::join!(self.host.ledger.put_run(&record), async {
            tokio::select! {
                session = session => session.map_err(|error| self.failed(process, &whimbrel_api::error::chain(&error))),
                exit = process.wait_exit() => Err(self.failed(process, &format!("it ended at once ({exit:?})"))),
            }
        });
        noted?;
        Ok(Spawned {
            definition: record.definition,
            run: record.name,
            dir: self.dir.clone(),
            migration: record.migration,
            machine: machine?,
            process: process.clone(),
            engine: record.engine,
            taps: record.taps,
            _hold: hold,
        })
    }

    fn record(&self, process: &Process) -> crate::ledger::RunRecord {
        let (major, minor, micro) = self.engine.version;
        crate::ledger::RunRecord {
            name: self.run.clone(),
            definition: self.definition.clone(),
            migration: match self.purpose {
                Purpose::Start | Purpose::Restore => None,
                Purpose::Receive(migration) => Some(migration),
            },
            process: process.identity().clone(),
            engine: RunningEngine {
                version: format!("{major}.{minor}.{micro}"),
                accelerator: self.engine.accelerator.as_wire().to_owned(),
                pid: process.identity().pid,
            },
            taps: self.taps.clone(),
        }
    }

    fn failed(&self, process: &Process, why: &str) -> ApiError {
        let words = process.last_words().join("; ");
        let said = if words.is_empty() { String::new() } else { format!("; it said: {words}") };
        ApiError::new(
            ErrorCode::Engine,
            format!("QEMU for VM `{}` did not come up: {why}{said}", self.definition.name),
        )
    }

    fn make_folders(&self) -> std::io::Result<()> {
        let user = self.host.qemu_user();
        DirBuilder::new().mode(RUN_FOLDER_MODE).create(self.dir.path())?;
        // The umask may have taken the right to pass.
        std::fs::set_permissions(self.dir.path(), Permissions::from_mode(RUN_FOLDER_MODE))?;
        let own = self.dir.qemu_folder();
        DirBuilder::new().mode(QEMU_FOLDER_MODE).create(&own)?;
        chown(&own, Some(user.uid), Some(user.gid))
    }

    fn spec(&self) -> VmSpec {
        let definition = self.definition;
        let disks = definition.disks.iter().zip(&self.files.disks);
        let nics = definition.nics.iter().zip(TAP_FIRST_NUMBER..).enumerate();
        VmSpec {
            name: definition.name.to_string(),
            uuid: *definition.id.as_uuid(),
            machine_type: definition.machine.clone(),
            accelerator: self.engine.accelerator,
            cpu: CpuSpec { model: definition.cpu.clone(), features: Default::default() },
            vcpus: u16::try_from(definition.vcpus).unwrap_or(u16::MAX),
            memory_bytes: definition.memory_bytes,
            boot: self.files.boot.clone(),
            disks: disks
                .map(|(disk, DiskFiles { path, cache, layers })| command_line::DiskSpec {
                    node: disk.name.to_string(),
                    path: path.clone(),
                    format: format(disk.format),
                    read_only: disk.read_only,
                    serial: Some(
                        disk.name
                            .as_str()
                            .chars()
                            .take(command_line::DISK_SERIAL_BYTES_MAX)
                            .collect(),
                    ),
                    cache: *cache,
                    layers: layers.clone(),
                })
                .collect(),
            nics: nics
                .map(|(index, (nic, number))| command_line::NicSpec {
                    id: format!("nic{index}"),
                    mac: nic.mac.clone(),
                    tap_descriptor: number,
                })
                .collect(),
            console: command_line::ConsoleSpec {
                socket: self.dir.serial_socket(),
                log: self.dir.console_log(),
            },
            qmp_socket: self.dir.qmp_socket(),
            incoming: self.purpose != Purpose::Start,
        }
    }
}

/// A definition's files on this host.
struct Files {
    boot: command_line::Boot,
    disks: Vec<DiskFiles>,
}

/// A disk's images on this host.
struct DiskFiles {
    path: PathBuf,
    cache: Cache,
    layers: Vec<LayerSpec>,
}

impl Files {
    /// Opens each file beneath its storage and looks at it.
    async fn resolve(host: &Arc<Host>, definition: &VmDefinition) -> Result<Self, ApiError> {
        let (at, definition) = (Arc::clone(host), definition.clone());
        host.storages.aside(move |aside| Self::look(&at, aside, &definition)).await
    }

    fn look(host: &Host, aside: &Aside, definition: &VmDefinition) -> Result<Self, ApiError> {
        let path = |file: &StoragePath| host.storages.existing_file(aside, file);
        let boot = match &definition.boot {
            Boot::Kernel { kernel, initrd, cmdline } => command_line::Boot::Kernel {
                kernel: path(kernel)?,
                initrd: initrd.as_ref().map(path).transpose()?,
                command_line: cmdline.clone(),
            },
            Boot::Firmware(Firmware::Seabios) => command_line::Boot::SeaBios,
            Boot::Firmware(Firmware::Ovmf) => command_line::Boot::Ovmf {
                code: ovmf()?.0,
                variables: path(&variables_file(definition)?)?,
            },
        };
        let mut disks = Vec::new();
        for disk in &definition.disks {
            let (found, cache) = look_at_image(host, aside, &disk.file)?;
            let layers = disk.layers.iter().map(|layer| {
                let (path, cache) = look_at_image(host, aside, &layer.file)?;
                Ok(LayerSpec { path, format: format(layer.format), cache })
            });
            let layers = layers.collect::<Result<_, ApiError>>()?;
            disks.push(DiskFiles { path: found, cache, layers });
        }
        Ok(Self { boot, disks })
    }
}

fn look_at_image(
    host: &Host,
    aside: &Aside,
    file: &StoragePath,
) -> Result<(PathBuf, Cache), ApiError> {
    let found = host.storages.existing_file(aside, file)?;
    let shared = host.storages.get(&file.storage)?.shared;
    let cache = if shared && takes_direct(&found) { Cache::None } else { Cache::WriteBack };
    Ok((found, cache))
}

fn format(format: ImageFormat) -> DiskFormat {
    match format {
        ImageFormat::Qcow2 => DiskFormat::Qcow2,
        ImageFormat::Raw => DiskFormat::Raw,
    }
}

/// Whether a file can be opened past the page cache, so that two hosts never see different bytes. Some file systems
/// (tmpfs before Linux 6.6) cannot.
fn takes_direct(path: &std::path::Path) -> bool {
    use rustix::fs::{Mode, OFlags};
    let flags = OFlags::RDONLY | OFlags::DIRECT | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    rustix::fs::open(path, flags, Mode::empty()).is_ok()
}

fn run_name(definition: &VmDefinition, purpose: Purpose) -> String {
    let id = match purpose {
        Purpose::Start | Purpose::Restore => Uuid::new_v4(),
        Purpose::Receive(migration) => *migration.as_uuid(),
    };
    let id = id.simple().to_string();
    // The last digits: the first ones of a migration's id are its time.
    let digits = id.get(id.len() - RUN_DIGITS..).unwrap_or_default();
    format!("{}.{digits}", definition.id)
}

fn check_socket_path(dir: &RunDir) -> Result<(), ApiError> {
    let bytes = dir.serial_socket().as_os_str().len();
    if bytes <= SOCKET_PATH_BYTES_MAX {
        return Ok(());
    }
    Err(ApiError::new(
        ErrorCode::BadPath,
        format!(
            "the agent's folder has too long a path: a socket in it would have {bytes} bytes, Linux takes {SOCKET_PATH_BYTES_MAX}"
        ),
    ))
}
