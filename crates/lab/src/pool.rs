//! Starts the lab's pool, as an operator would: `whimbrel pool init`, the controller, an agent on every host, then a
//! network and a storage. Only the public command line is used, so this is also the shortest account of how to set one up.

use std::fs::{self, File, OpenOptions, Permissions};
use std::io::{Read, Seek, SeekFrom};
use std::net::SocketAddr;
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use crate::cancel::Cancel;
use crate::command;
use crate::error::LabError;
use crate::image;
use crate::namespace::Namespace;
use crate::plan::{
    AGENT_PORT, CONTROLLER, CONTROLLER_ADDRESS, CONTROLLER_PORT, Folder, HostPlan, PREFIX, Plan,
    QEMU_USER, guest_address,
};
use crate::processes::Process;

/// The environment variable that tells `whimbrel` which pool to talk to, and as whom.
const CLIENT_VARIABLE: &str = "WHIMBREL_CLIENT";
/// The network and the storage that the lab's pool has.
pub const NETWORK: &str = "lab";
/// See [`NETWORK`].
pub const STORAGE: &str = "shared";
/// The VM bridge on every host.
const BRIDGE: &str = "br-lab";
/// Its uplink.
const UPLINK: &str = "eth1";

/// How much of its memory web01's witness fills: enough to be worth moving, and filled within about 2 s under TCG.
const FILLED_MIB: u32 = 256;

/// How long the controller may take to answer.
const CONTROLLER_START_MAX: Duration = Duration::from_secs(30);
/// How long all hosts may take to be ready.
const HOSTS_READY_MAX: Duration = Duration::from_secs(60);
const POLL: Duration = Duration::from_millis(50);
/// How much of a log's end is shown when its process has died.
const LOG_TAIL_BYTES: u64 = 4096;

/// Starts everything, and returns when every host is ready.
pub(crate) fn start(
    folder: &Folder,
    plan: &Plan,
    cancel: &Cancel,
    on_step: &mut dyn FnMut(&str),
) -> Result<(), LabError> {
    on_step("starting the controller");
    init(folder, plan)?;
    start_controller(folder, plan)?;
    wait_for_controller(folder, cancel)?;
    on_step("starting the agents");
    for host in &plan.hosts {
        cancel.check()?;
        let token = whimbrel(folder, plan, &["pool", "join-token"])?;
        start_agent(folder, plan, host, Some(token.trim()))?;
    }
    wait_for_hosts(folder, plan, cancel)?;
    on_step("making the network, the storage and the test guest");
    whimbrel(
        folder,
        plan,
        &["network", "create", NETWORK, "--bridge", BRIDGE, "--uplink", UPLINK],
    )?;
    fill_storage(folder, plan)?;
    let shared = folder.shared();
    whimbrel(
        folder,
        plan,
        &["storage", "create", STORAGE, "--path", &shared.to_string_lossy(), "--shared"],
    )?;
    let definition = vm_definition("web01", 0, FILLED_MIB);
    fs::write(folder.vm(), definition).map_err(LabError::file("write", folder.vm()))
}

/// Runs a `whimbrel` command with the operator's rights in the lab's pool, and returns what it prints.
pub(crate) fn whimbrel(folder: &Folder, plan: &Plan, args: &[&str]) -> Result<String, LabError> {
    run_whimbrel(folder, &mut operator_command(folder, plan, args))
}

/// Runs in the controller's namespace: if this process is killed, its child is still found, and not left to write into a
/// folder that the next command is about to remove.
fn run_whimbrel(folder: &Folder, command: &mut Command) -> Result<String, LabError> {
    Namespace::at(folder.namespace(CONTROLLER))
        .run(|| command::run(command, ""))
        .map_err(LabError::namespace("enter", CONTROLLER))?
}

/// A `whimbrel` command with the operator's rights in the lab's pool.
pub(crate) fn operator_command(folder: &Folder, plan: &Plan, args: &[&str]) -> Command {
    let mut command = Command::new(&plan.binary);
    command.args(args).env(CLIENT_VARIABLE, folder.client_config());
    command
}

/// Starts the controller, which knows its pool from its folder.
pub(crate) fn start_controller(folder: &Folder, plan: &Plan) -> Result<Process, LabError> {
    let mut command = Command::new(&plan.binary);
    command.arg("controller").arg("--dir").arg(folder.controller());
    start_daemon(folder, CONTROLLER, &mut command)
}

/// Starts a host's agent, with a token if it is to join.
pub(crate) fn start_agent(
    folder: &Folder,
    plan: &Plan,
    host: &HostPlan,
    token: Option<&str>,
) -> Result<Process, LabError> {
    let mut command = Command::new(&plan.binary);
    command.arg("agent").arg("--dir").arg(folder.host(&host.name));
    command.args([
        "--name",
        &host.name,
        "--listen",
        &SocketAddr::from((host.address, AGENT_PORT)).to_string(),
    ]);
    command.args(["--qemu-user", QEMU_USER, "--engine"]).arg(&host.engine);
    if let Some(token) = token {
        command.args(["--join", token]);
    }
    start_daemon(folder, &host.name, &mut command)
}

/// A VM for the lab: the witness with a disk and a network card, 1 GiB.
///
/// `number` sets its address apart from other guests' (see [`guest_address`]), `memory_mib` is how much of its memory the
/// witness fills.
#[must_use]
pub fn vm_definition(name: &str, number: u8, memory_mib: u32) -> String {
    let address = guest_address(number);
    let seed = u32::from(number) + 1;
    format!(
        r#"# A guest that watches itself: its init verifies memory, disk and clocks, and answers on {address}.
name = "{name}"
vcpus = 1
memory = "1GiB"
# Without `machine`, it is the newest type that the QEMUs of all hosts have, so that the VM can move between them.

[boot.kernel]
kernel = "{STORAGE}/boot/vmlinuz"
initrd = "{STORAGE}/boot/witness.initramfs"
cmdline = "console=ttyS0 quiet witness.ip={address}/{PREFIX} witness.seed={seed} witness.memory={memory_mib}"

[[disk]]
storage = "{STORAGE}"
size = "64MiB"

[[nic]]
network = "{NETWORK}"
"#
    )
}

fn init(folder: &Folder, plan: &Plan) -> Result<(), LabError> {
    let mut command = Command::new(&plan.binary);
    command.args(["pool", "init", "--name", "lab", "--dir"]).arg(folder.controller());
    command
        .args(["--listen", &SocketAddr::from((CONTROLLER_ADDRESS, CONTROLLER_PORT)).to_string()]);
    command.arg("--socket").arg(folder.socket());
    run_whimbrel(folder, &mut command)?;
    let (made, wanted) = (folder.controller().join("client.toml"), folder.client_config());
    // Copied with its permissions: it is a secret.
    fs::copy(made, &wanted).map(drop).map_err(LabError::file("write", wanted))
}

fn wait_for_controller(folder: &Folder, cancel: &Cancel) -> Result<(), LabError> {
    wait(folder, cancel, "an answer of the controller", CONTROLLER_START_MAX, &[CONTROLLER], || {
        Ok(UnixStream::connect(folder.socket()).is_ok())
    })
}

fn wait_for_hosts(folder: &Folder, plan: &Plan, cancel: &Cancel) -> Result<(), LabError> {
    let daemons: Vec<&str> =
        plan.hosts.iter().map(|host| host.name.as_str()).chain([CONTROLLER]).collect();
    wait(folder, cancel, "the readiness of all hosts", HOSTS_READY_MAX, &daemons, || {
        let list = whimbrel(folder, plan, &["host", "list", "--json"])?;
        Ok(list.lines().filter(|line| is_ready(line)).count() == plan.hosts.len())
    })
}

fn is_ready(host: &str) -> bool {
    serde_json::from_str::<serde_json::Value>(host).is_ok_and(|host| host["state"] == "ready")
}

/// Puts the test guest's kernel and initramfs into the shared storage.
fn fill_storage(folder: &Folder, plan: &Plan) -> Result<(), LabError> {
    let boot = folder.shared().join("boot");
    fs::create_dir_all(&boot).map_err(LabError::file("make", &boot))?;
    // QEMU runs unprivileged, and reads what is in here.
    for open in [folder.shared(), boot.clone()] {
        fs::set_permissions(&open, Permissions::from_mode(0o755))
            .map_err(LabError::file("open", &open))?;
    }
    let kernel = plan.cache.join("kernel");
    let (vmlinuz, initramfs) = (boot.join("vmlinuz"), boot.join("witness.initramfs"));
    fs::copy(kernel.join("vmlinuz"), &vmlinuz).map_err(LabError::file("write", &vmlinuz))?;
    image::write_initramfs(&initramfs, &image::find_witness()?, &kernel)
        .map_err(LabError::file("write", &initramfs))?;
    for file in [vmlinuz, initramfs] {
        fs::set_permissions(&file, Permissions::from_mode(0o644))
            .map_err(LabError::file("open", &file))?;
    }
    Ok(())
}

/// Starts a process that outlives this one, in the namespace of its name, and writes down which it is.
fn start_daemon(folder: &Folder, name: &str, command: &mut Command) -> Result<Process, LabError> {
    let path = folder.log(name);
    let log = OpenOptions::new().create(true).append(true).mode(0o600).open(&path);
    let log = log.map_err(LabError::file("open", &path))?;
    let errors = log.try_clone().map_err(LabError::file("open", &path))?;
    // Its own process group: an interrupt on the terminal is for the lab's command, which takes the lab down in order.
    command.stdin(Stdio::null()).stdout(log).stderr(errors).process_group(0);
    let namespace = Namespace::at(folder.namespace(name));
    let child = namespace
        .run(|| command.spawn())
        .map_err(LabError::namespace("enter", name))?
        .map_err(|source| LabError::Spawn {
            program: command.get_program().to_string_lossy().into_owned(),
            source,
        })?;
    let died = || LabError::Died { name: name.to_owned(), log: path.clone(), tail: tail(&path) };
    let process = i32::try_from(child.id()).ok().and_then(Process::with_id).ok_or_else(died)?;
    let record = folder.daemon(name);
    let text = serde_json::to_vec(&process)
        .map_err(|source| LabError::Record { path: record.clone(), source })?;
    fs::write(&record, text).map_err(LabError::file("write", &record))?;
    Ok(process)
}

/// The process that was last started under a name, if it runs.
pub(crate) fn daemon(folder: &Folder, name: &str) -> Option<Process> {
    let record = fs::read(folder.daemon(name)).ok()?;
    serde_json::from_slice(&record).ok().filter(Process::is_alive)
}

/// Waits until something is so, at most for a time, and only as long as the processes that it hangs on run.
pub(crate) fn wait(
    folder: &Folder,
    cancel: &Cancel,
    what: &str,
    within: Duration,
    daemons: &[&str],
    mut is_so: impl FnMut() -> Result<bool, LabError>,
) -> Result<(), LabError> {
    let began = Instant::now();
    loop {
        cancel.check()?;
        if is_so()? {
            return Ok(());
        }
        if let Some(name) = daemons.iter().find(|name| daemon(folder, name).is_none()) {
            let log = folder.log(name);
            return Err(LabError::Died { name: (*name).to_owned(), tail: tail(&log), log });
        }
        if began.elapsed() > within {
            return Err(LabError::TooSlow { what: what.to_owned(), within });
        }
        thread::sleep(POLL);
    }
}

fn tail(log: &Path) -> String {
    let read = || {
        let mut file = File::open(log)?;
        let length = file.metadata()?.len();
        file.seek(SeekFrom::Start(length.saturating_sub(LOG_TAIL_BYTES)))?;
        let mut bytes = Vec::new();
        file.take(LOG_TAIL_BYTES).read_to_end(&mut bytes)?;
        std::io::Result::Ok(String::from_utf8_lossy(&bytes).trim().to_owned())
    };
    read().unwrap_or_else(|error| format!("(it cannot be read: {error})"))
}
