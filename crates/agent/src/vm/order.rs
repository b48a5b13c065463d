//! What a VM's task can be told, and what it says of itself.

use tokio::sync::oneshot;
use whimbrel_api::agent::VmReport;
use whimbrel_api::vm::{StateFile, VmDefinition, VmState};
use whimbrel_api::{ApiError, MigrationId, Name};
use whimbrel_migration::handoff::Ownership;
use whimbrel_qemu::machine::Machine;

use super::console;
use super::running::RunningVm;

/// Where the answer of an action goes.
pub(super) type Reply = oneshot::Sender<Result<VmReport, ApiError>>;

/// An order with its answer's address. The methods of [`super::Vms`] say what each means.
#[derive(Debug)]
pub(super) enum Order {
    Start(Reply),
    Stop {
        force: bool,
        reply: Reply,
    },
    Pause(Reply),
    Resume(Reply),
    Save {
        to: StateFile,
        reply: Reply,
    },
    Restore {
        from: StateFile,
        reply: Reply,
    },
    Images {
        change: ImageChange,
        reply: Reply,
    },
    /// Answered with the clone, of which this VM is the original.
    Clone {
        asked: Box<VmDefinition>,
        reply: Reply,
    },
    Delete(oneshot::Sender<Result<(), ApiError>>),
    Lend {
        migration: MigrationId,
        reply: oneshot::Sender<Result<RunningVm, ApiError>>,
    },
    /// Answered with this host's word on the VM.
    LendStopped {
        migration: MigrationId,
        reply: oneshot::Sender<Result<Ownership, ApiError>>,
    },
    GiveBackStopped(oneshot::Sender<()>),
    LoanNews {
        news: VmState,
        reply: oneshot::Sender<()>,
    },
    GiveBack {
        running: Box<RunningVm>,
        reply: oneshot::Sender<()>,
    },
    GiveBackEnded {
        crashed: Option<String>,
        reply: oneshot::Sender<()>,
    },
    /// Answered with whether the VM was lent, and so is forgotten.
    Forget(oneshot::Sender<bool>),
}

/// What becomes of a stopped VM's images.
#[derive(Debug)]
pub(super) enum ImageChange {
    /// It is a template from now on, or no more.
    Template(bool),
    Take(Name),
    Revert(Name),
    DeleteSnapshot(Name),
}

/// What a task shows of its VM at any moment.
#[derive(Debug, Clone)]
pub(super) struct Published {
    pub(super) report: VmReport,
    /// Where the console is, while there is a QEMU.
    pub(super) console: Option<console::Place>,
    /// The session with QEMU, while there is one: for questions, never for orders.
    pub(super) machine: Option<Machine>,
}
