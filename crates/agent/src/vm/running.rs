//! A QEMU with everything that was made for it: what a migration borrows by value, and what is swept as one.

use std::path::{Path, PathBuf};

use whimbrel_api::vm::{RunningEngine, VmDefinition};
use whimbrel_api::{ApiError, ErrorCode, MigrationId, VmId};
use whimbrel_migration::handoff::Ownership;
use whimbrel_qemu::machine::Machine;
use whimbrel_qemu::process::Process;

use crate::in_hand::Hold;
use crate::ledger::RunRecord;

/// The folder in a run's folder that QEMU may write to.
const QEMU_FOLDER: &str = "q";
/// Longest path of a unix socket, in bytes (Linux' `sun_path` is 108 with the closing zero).
pub(crate) const SOCKET_PATH_BYTES_MAX: usize = 107;

/// The folder of one QEMU, `DIR/run/NAME`.
///
/// ```text
/// NAME/            root's, 0711: QEMU can pass, and change nothing
///   qemu.log       what QEMU prints (root's; QEMU holds it open)
///   tls/           QEMU's certificates during a migration (made by `crate::migrate`)
///   q/             QEMU's own, 0700
///     qmp.sock  serial.sock  console.log
/// ```
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RunDir(PathBuf);

impl RunDir {
    /// The folder of the run `name` under `run`, whether it exists or not.
    #[must_use]
    pub fn new(run: &Path, name: &str) -> Self {
        Self(run.join(name))
    }

    /// The folder itself.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.0
    }

    /// The folder that QEMU may write to.
    #[must_use]
    pub fn qemu_folder(&self) -> PathBuf {
        self.0.join(QEMU_FOLDER)
    }

    /// Where QEMU listens for QMP.
    #[must_use]
    pub fn qmp_socket(&self) -> PathBuf {
        self.qemu_folder().join("qmp.sock")
    }

    /// Where QEMU listens for a reader of the serial console.
    #[must_use]
    pub fn serial_socket(&self) -> PathBuf {
        self.qemu_folder().join("serial.sock")
    }

    /// What the guest wrote on its serial console.
    #[must_use]
    pub fn console_log(&self) -> PathBuf {
        self.qemu_folder().join("console.log")
    }

    /// What QEMU itself printed.
    #[must_use]
    pub fn qemu_log(&self) -> PathBuf {
        self.0.join("qemu.log")
    }

    /// Where the certificates for a migration belong (see `whimbrel_pki::qemu_credentials`).
    #[must_use]
    pub fn tls_folder(&self) -> PathBuf {
        self.0.join("tls")
    }
}

/// A QEMU that this agent has spawned or found again, and what belongs to it. Its guest does not run unless somebody
/// has said `cont`. Dropping this does nothing to the QEMU: the ledger still names it, and the sweep takes it if it is
/// nobody's.
#[derive(Debug, Clone)]
pub struct Spawned {
    /// What it runs.
    pub definition: VmDefinition,
    /// The name of its run: unique for every spawning.
    pub run: String,
    /// Its folder.
    pub dir: RunDir,
    /// The migration that it was spawned to receive, if any.
    pub migration: Option<MigrationId>,
    /// The session with it.
    pub machine: Machine,
    /// Its process.
    pub process: Process,
    /// What runs it.
    pub engine: RunningEngine,
    /// Its taps, in the order of its NICs.
    pub taps: Vec<String>,
    /// Whoever has it, the sweep leaves it alone.
    pub(crate) _hold: Hold,
}

impl Spawned {
    /// As the ledger keeps it.
    #[must_use]
    pub fn record(&self) -> RunRecord {
        RunRecord {
            name: self.run.clone(),
            definition: self.definition.clone(),
            migration: self.migration,
            process: self.process.identity().clone(),
            engine: self.engine.clone(),
            taps: self.taps.clone(),
        }
    }
}

/// A VM that this host owns and runs. There is one of it per VM: whoever has it by value may tell its QEMU what to do.
///
/// `Clone` is missing on purpose. A migration gets it from [`crate::vm::Vms::lend`] and must bring it back by
/// [`crate::vm::Vms::give_back`], or end it by [`crate::vm::Vms::forget`].
#[derive(Debug)]
pub struct RunningVm {
    /// Its QEMU.
    pub qemu: Spawned,
    /// This host's word on it at the time of the loan: epoch, and whether its user wants it to run.
    pub ownership: Ownership,
}

impl RunningVm {
    /// The VM.
    #[must_use]
    pub fn id(&self) -> VmId {
        self.qemu.definition.id
    }
}

/// How a QEMU ended, in a sentence for people.
#[must_use]
pub fn describe_end(process: &Process, exit: whimbrel_qemu::process::Exit) -> String {
    use whimbrel_qemu::process::Exit;
    let how = match exit {
        Exit::Code(code) => format!("QEMU ended by itself with status {code}"),
        Exit::Signal(signal) => format!("QEMU was ended by signal {signal}"),
        Exit::Unseen => "QEMU ended".to_owned(),
    };
    match process.last_words().last() {
        Some(word) => {
            format!("{how}; its last words: {}", word.chars().take(300).collect::<String>())
        }
        None => how,
    }
}

/// QEMU refused or did not answer.
#[must_use]
pub fn engine_error(doing: &str, error: &dyn std::error::Error) -> ApiError {
    ApiError::new(ErrorCode::Engine, format!("{doing}: {}", whimbrel_api::error::chain(error)))
}
