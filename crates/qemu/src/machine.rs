//! Typed commands to one running QEMU: what the agent asks of a VM outside a migration.
//!
//! Each call is one question or order with a bounded wait; nothing is remembered here but
//! whether post-copy was ordered, since the truth is QEMU's. Migrations have a room of their own ([`crate::migrate`]).

mod dirty_rate;

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use serde_json::{Value, json};
use uuid::Uuid;

pub use self::dirty_rate::{
    DIRTY_RATE_SECONDS_MAX, DIRTY_RATE_SECONDS_MIN, DirtyRate, DirtyRateMode, DirtyRateStatus,
};
use crate::engine::EngineFacts;
use crate::event::Events;
use crate::process::ProcessIdentity;
use crate::qmp::{ConnectError, Qmp, QmpError};
use crate::schema::Features;

/// A QEMU that answers. Clones share its session.
#[derive(Debug, Clone)]
pub struct Machine {
    qmp: Qmp,
    features: Features,
    postcopy: Arc<AtomicBool>,
}

/// Why the QEMU behind a socket can not be used as the expected VM.
#[derive(Debug, thiserror::Error)]
pub enum MachineError {
    /// No session.
    #[error("no session with QEMU on {}", socket.display())]
    Connect {
        /// The socket.
        socket: PathBuf,
        /// The reason.
        #[source]
        source: ConnectError,
    },
    /// QEMU can not say what it is.
    #[error("QEMU does not tell what it is")]
    Describe(#[source] QmpError),
    /// Another process listens on the socket.
    #[error("{} belongs to process {found:?}, not to {expected}", socket.display())]
    ForeignProcess {
        /// The socket.
        socket: PathBuf,
        /// The process that was expected.
        expected: u32,
        /// The process that listens, where the kernel tells.
        found: Option<u32>,
    },
    /// It is another VM.
    #[error("QEMU runs VM {found:?}, not {expected}")]
    ForeignVm {
        /// The VM that was expected.
        expected: Uuid,
        /// The VM that QEMU names.
        found: Option<Uuid>,
    },
}

/// QEMU's run state.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum RunState {
    /// The guest runs.
    Running,
    /// Stopped by `stop` (or, on a destination started with `-S`, loaded and not yet let go).
    Paused,
    /// Not started yet (`-S`).
    Prelaunch,
    /// Waits for, or loads, an incoming migration.
    InMigrate,
    /// The source after a completed migration: stopped, for good unless somebody sends `cont`.
    PostMigrate,
    /// The source in the last stage of a migration: stopped.
    FinishMigrate,
    /// The guest is off; QEMU stays (`-no-shutdown`).
    Shutdown,
    /// Being saved.
    SaveVm,
    /// Being restored.
    RestoreVm,
    /// Suspended by the guest.
    Suspended,
    /// The guest panicked.
    GuestPanicked,
    /// Stopped by a disk error.
    IoError,
    /// Stopped by an error inside QEMU.
    InternalError,
    /// Stopped by the watchdog.
    Watchdog,
    /// Under a debugger.
    Debug,
    /// The secondary of a COLO pair.
    Colo,
    /// A state that we do not know.
    Unknown(String),
}

impl RunState {
    /// Reads QEMU's word.
    #[must_use]
    pub fn from_wire(word: &str) -> Self {
        match word {
            "running" => Self::Running,
            "paused" => Self::Paused,
            "prelaunch" => Self::Prelaunch,
            "inmigrate" => Self::InMigrate,
            "postmigrate" => Self::PostMigrate,
            "finish-migrate" => Self::FinishMigrate,
            "shutdown" => Self::Shutdown,
            "save-vm" => Self::SaveVm,
            "restore-vm" => Self::RestoreVm,
            "suspended" => Self::Suspended,
            "guest-panicked" => Self::GuestPanicked,
            "io-error" => Self::IoError,
            "internal-error" => Self::InternalError,
            "watchdog" => Self::Watchdog,
            "debug" => Self::Debug,
            "colo" => Self::Colo,
            other => Self::Unknown(other.to_owned()),
        }
    }

    /// QEMU's word.
    #[must_use]
    pub fn as_wire(&self) -> &str {
        match self {
            Self::Running => "running",
            Self::Paused => "paused",
            Self::Prelaunch => "prelaunch",
            Self::InMigrate => "inmigrate",
            Self::PostMigrate => "postmigrate",
            Self::FinishMigrate => "finish-migrate",
            Self::Shutdown => "shutdown",
            Self::SaveVm => "save-vm",
            Self::RestoreVm => "restore-vm",
            Self::Suspended => "suspended",
            Self::GuestPanicked => "guest-panicked",
            Self::IoError => "io-error",
            Self::InternalError => "internal-error",
            Self::Watchdog => "watchdog",
            Self::Debug => "debug",
            Self::Colo => "colo",
            Self::Unknown(word) => word,
        }
    }
}

impl std::fmt::Display for RunState {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.write_str(self.as_wire())
    }
}

/// The answer to `query-status`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Status {
    /// The state.
    pub run_state: RunState,
    /// Whether the vCPUs run.
    pub running: bool,
}

/// One block node that has a device, from `query-block`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BlockDevice {
    /// The device's id or QOM path.
    pub device: String,
    /// The node under it; `None` for an empty drive.
    pub node: Option<String>,
    /// The format driver, e.g. `qcow2`.
    pub driver: Option<String>,
    /// Whether the guest can write.
    pub read_only: Option<bool>,
    /// `ok`, `failed` or `nospace`: whether a disk error has stopped the guest.
    pub io_status: Option<String>,
    /// The size that the guest sees, in bytes.
    pub virtual_size_bytes: Option<u64>,
}

/// Rounds of announcements, as QEMU's own defaults for migrations have them (7.2, 10.0).
const ANNOUNCE_INITIAL_MILLISECONDS: u64 = 50;
const ANNOUNCE_MAX_MILLISECONDS: u64 = 550;
const ANNOUNCE_ROUNDS: u64 = 5;
const ANNOUNCE_STEP_MILLISECONDS: u64 = 100;

impl Machine {
    /// Connects to a QEMU, which may still be starting, and asks for its features.
    ///
    /// # Errors
    ///
    /// [`MachineError::Connect`] and [`MachineError::Describe`].
    pub async fn connect(socket: &Path, deadline: Duration) -> Result<Self, MachineError> {
        Self::of(reach(socket, deadline).await?, None).await
    }

    /// Connects to a QEMU that is expected to be this process and this VM. The folder of the
    /// socket is writable for QEMU, so a hostile one could have put a link to another VM's there.
    ///
    /// # Errors
    ///
    /// [`MachineError`]; nothing has been changed in whatever listens there.
    pub async fn connect_to(
        socket: &Path,
        process: &ProcessIdentity,
        vm: Uuid,
        deadline: Duration,
    ) -> Result<Self, MachineError> {
        let qmp = reach(socket, deadline).await?;
        Self::of(expect(qmp, socket, process, vm).await?, None).await
    }

    /// As [`Machine::connect_to`], for a QEMU started from an engine that has been probed: if it
    /// is the same build, its features are known, which spares a question of some 50 ms.
    ///
    /// # Errors
    ///
    /// As [`Machine::connect_to`].
    pub async fn connect_to_engine(
        socket: &Path,
        process: &ProcessIdentity,
        vm: Uuid,
        engine: &EngineFacts,
        deadline: Duration,
    ) -> Result<Self, MachineError> {
        let qmp = reach(socket, deadline).await?;
        Self::of(expect(qmp, socket, process, vm).await?, Some(engine)).await
    }

    async fn of(qmp: Qmp, engine: Option<&EngineFacts>) -> Result<Self, MachineError> {
        let greeting = qmp.greeting();
        let same_build = |engine: &&EngineFacts| {
            engine.version == greeting.version && engine.package == greeting.package
        };
        let features = match engine.filter(same_build) {
            Some(engine) => engine.features.clone(),
            None => Features::query(&qmp).await.map_err(MachineError::Describe)?,
        };
        Ok(Self { qmp, features, postcopy: Arc::default() })
    }

    /// The session, for commands that have no method here.
    #[must_use]
    pub fn qmp(&self) -> &Qmp {
        &self.qmp
    }

    /// Notes whether this session has ordered post-copy of the migration under way, for when QEMU cannot be asked.
    pub(crate) fn note_postcopy(&self, ordered: bool) {
        self.postcopy.store(ordered, Ordering::SeqCst);
    }

    /// Whether post-copy was ordered, as [`Machine::note_postcopy`] has it. A session that was made anew has forgotten.
    pub(crate) fn postcopy_ordered(&self) -> bool {
        self.postcopy.load(Ordering::SeqCst)
    }

    /// What this QEMU can do.
    #[must_use]
    pub fn features(&self) -> &Features {
        &self.features
    }

    /// A reader of the events from now on.
    #[must_use]
    pub fn events(&self) -> Events {
        self.qmp.events()
    }

    /// The VM's uuid.
    ///
    /// # Errors
    ///
    /// [`QmpError`].
    pub async fn uuid(&self) -> Result<Option<Uuid>, QmpError> {
        uuid_of(&self.qmp).await
    }

    /// The run state.
    ///
    /// # Errors
    ///
    /// [`QmpError`]; `Malformed` where QEMU tells no state.
    pub async fn status(&self) -> Result<Status, QmpError> {
        const COMMAND: &str = "query-status";
        let answer = self.qmp.execute(COMMAND, Value::Null).await?;
        let word = answer.get("status").and_then(Value::as_str);
        let run_state =
            RunState::from_wire(word.ok_or_else(|| QmpError::malformed(COMMAND, "no status"))?);
        let running = answer.get("running").and_then(Value::as_bool);
        Ok(Status { running: running.unwrap_or(run_state == RunState::Running), run_state })
    }

    /// Lets the guest run. On a destination this also takes the disks (`late-block-activate`).
    ///
    /// Only for a destination that has loaded: before that QEMU (7.2, 10.0) answers with success
    /// and lets the guest run by itself as soon as it is loaded, whoever owns it then.
    ///
    /// # Errors
    ///
    /// [`QmpError`]. After a refusal the guest stays stopped: QEMU opens the disks first. After a
    /// timeout it may run at any later time.
    pub async fn cont(&self) -> Result<(), QmpError> {
        self.order("cont", Value::Null).await
    }

    /// Stops the vCPUs and flushes the disks.
    ///
    /// # Errors
    ///
    /// [`QmpError`].
    pub async fn stop(&self) -> Result<(), QmpError> {
        self.order("stop", Value::Null).await
    }

    /// Presses the power button; a guest may ignore it.
    ///
    /// # Errors
    ///
    /// [`QmpError`].
    pub async fn system_powerdown(&self) -> Result<(), QmpError> {
        self.order("system_powerdown", Value::Null).await
    }

    /// Presses the reset button.
    ///
    /// # Errors
    ///
    /// [`QmpError`].
    pub async fn system_reset(&self) -> Result<(), QmpError> {
        self.order("system_reset", Value::Null).await
    }

    /// Asks QEMU to end. It flushes the disks it still owns, answers, and exits soon after.
    ///
    /// # Errors
    ///
    /// [`QmpError`]; a session that ends before the answer counts as success.
    pub async fn quit(&self) -> Result<(), QmpError> {
        match self.order("quit", Value::Null).await {
            Err(QmpError::Disconnected { .. }) => Ok(()),
            other => other,
        }
    }

    /// The drives and what is in them.
    ///
    /// # Errors
    ///
    /// [`QmpError`].
    pub async fn query_block(&self) -> Result<Vec<BlockDevice>, QmpError> {
        let answer = self.qmp.execute("query-block", Value::Null).await?;
        Ok(answer
            .as_array()
            .map(|list| list.iter().map(block_device).collect())
            .unwrap_or_default())
    }

    /// The guest's memory, in bytes.
    ///
    /// # Errors
    ///
    /// [`QmpError`].
    pub async fn query_memory_bytes(&self) -> Result<Option<u64>, QmpError> {
        let answer = self.qmp.execute("query-memory-size-summary", Value::Null).await?;
        Ok(answer.get("base-memory").and_then(Value::as_u64))
    }

    /// Tells the network where the guest's addresses are now (gratuitous ARP/RARP), several times.
    ///
    /// # Errors
    ///
    /// [`QmpError`].
    pub async fn announce_self(&self) -> Result<(), QmpError> {
        let arguments = json!({
            "initial": ANNOUNCE_INITIAL_MILLISECONDS,
            "max": ANNOUNCE_MAX_MILLISECONDS,
            "rounds": ANNOUNCE_ROUNDS,
            "step": ANNOUNCE_STEP_MILLISECONDS,
        });
        self.order("announce-self", arguments).await
    }

    /// Makes an object; `properties` without `qom-type` and `id`.
    ///
    /// # Errors
    ///
    /// [`QmpError`]; refused where the id is taken.
    pub async fn object_add(
        &self,
        qom_type: &str,
        id: &str,
        properties: Value,
    ) -> Result<(), QmpError> {
        let mut arguments = json!({ "qom-type": qom_type, "id": id });
        if let (Value::Object(arguments), Value::Object(properties)) = (&mut arguments, properties)
        {
            arguments.extend(properties);
        }
        self.order("object-add", arguments).await
    }

    /// Removes an object if it is there.
    ///
    /// # Errors
    ///
    /// [`QmpError`]; refused where it is in use.
    pub async fn object_del(&self, id: &str) -> Result<(), QmpError> {
        if !self.objects().await?.iter().any(|present| present == id) {
            return Ok(());
        }
        self.order("object-del", json!({ "id": id })).await
    }

    /// The ids of the objects made by the user (memory back ends, credentials, …).
    ///
    /// # Errors
    ///
    /// [`QmpError`].
    pub async fn objects(&self) -> Result<Vec<String>, QmpError> {
        let answer = self.qmp.execute("qom-list", json!({ "path": "/objects" })).await?;
        let name = |entry: &Value| {
            let kind = entry.get("type").and_then(Value::as_str)?;
            let name = entry.get("name").and_then(Value::as_str)?;
            kind.starts_with("child<").then(|| name.to_owned())
        };
        Ok(answer.as_array().map(|list| list.iter().filter_map(name).collect()).unwrap_or_default())
    }

    /// A command whose answer carries nothing.
    pub(crate) async fn order(&self, command: &str, arguments: Value) -> Result<(), QmpError> {
        self.qmp.execute(command, arguments).await.map(drop)
    }
}

async fn reach(socket: &Path, deadline: Duration) -> Result<Qmp, MachineError> {
    Qmp::connect(socket, deadline)
        .await
        .map_err(|source| MachineError::Connect { socket: socket.to_owned(), source })
}

/// Refuses a session with another process or another VM.
async fn expect(
    qmp: Qmp,
    socket: &Path,
    process: &ProcessIdentity,
    vm: Uuid,
) -> Result<Qmp, MachineError> {
    let found = qmp.greeting().peer_pid;
    if found != Some(process.pid) {
        let socket = socket.to_owned();
        return Err(MachineError::ForeignProcess { socket, expected: process.pid, found });
    }
    let found = uuid_of(&qmp).await.map_err(MachineError::Describe)?;
    if found != Some(vm) {
        return Err(MachineError::ForeignVm { expected: vm, found });
    }
    Ok(qmp)
}

async fn uuid_of(qmp: &Qmp) -> Result<Option<Uuid>, QmpError> {
    let answer = qmp.execute("query-uuid", Value::Null).await?;
    Ok(answer.get("UUID").and_then(Value::as_str).and_then(|text| text.parse().ok()))
}

fn text(value: &Value, pointer: &str) -> Option<String> {
    value.pointer(pointer).and_then(Value::as_str).map(str::to_owned)
}

fn block_device(entry: &Value) -> BlockDevice {
    let id = text(entry, "/device").filter(|id| !id.is_empty());
    BlockDevice {
        device: id.or_else(|| text(entry, "/qdev")).unwrap_or_default(),
        node: text(entry, "/inserted/node-name"),
        driver: text(entry, "/inserted/drv"),
        read_only: entry.pointer("/inserted/ro").and_then(Value::as_bool),
        io_status: text(entry, "/io-status"),
        virtual_size_bytes: entry.pointer("/inserted/image/virtual-size").and_then(Value::as_u64),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_run_state_keeps_its_word() {
        let words = [
            "running",
            "paused",
            "prelaunch",
            "inmigrate",
            "postmigrate",
            "finish-migrate",
            "shutdown",
            "save-vm",
            "restore-vm",
            "suspended",
            "guest-panicked",
            "io-error",
            "internal-error",
            "watchdog",
            "debug",
            "colo",
            "dreaming",
        ];
        for word in words {
            let state = RunState::from_wire(word);
            assert_eq!(state.as_wire(), word);
            assert_eq!(matches!(state, RunState::Unknown(_)), word == "dreaming", "{word}");
        }
    }

    #[test]
    fn entries_without_their_fields_are_still_entries() {
        let bare = block_device(&json!({}));
        assert_eq!((bare.device.as_str(), bare.node, bare.read_only), ("", None, None));
        let by_path = block_device(&json!({ "device": "", "qdev": "/machine/x" }));
        assert_eq!(by_path.device, "/machine/x");
    }
}
