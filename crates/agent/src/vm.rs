//! The VMs of this host: one task each, a queue of orders in front of it, and a typed refusal at once where an order
//! cannot be taken.
//!
//! ```text
//!              start                    lend
//!   Stopped ----------> Running --------------------> Lent  (a migration has the RunningVm, by value)
//!      ^  ^               |  ^ \                        |
//!      |  '--- stopped ---'  |  \ QMP is silent         | give_back / give_back_ended / forget
//!      |                     |   v                      v
//!   Crashed <--- QEMU ended -+  Silent                Running, Stopped, Crashed, or no VM any more
//! ```
//!
//! The task is the only writer of the VM's rows in the ledger and the only one who talks to its QEMU; while the VM is
//! lent, both are the migration's. [`spawn`] makes and takes down QEMUs with all that belongs to them, [`found`] finds
//! them again after a restart of the agent. Who may run a guest is read from the ledger and not decided here.

mod clone;
pub mod console;
mod create;
pub mod found;
pub(crate) mod kept;
pub(crate) mod lineage;
mod mobility;
mod order;
pub mod running;
pub mod spawn;
mod start_up;
pub(crate) mod take_back;
mod task;

use std::collections::{BTreeSet, HashMap};
use std::future::Future;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::{mpsc, oneshot, watch};
use tokio::task::JoinSet;
use whimbrel_api::agent::{Mobility, VmReport};
use whimbrel_api::vm::{Boot, StateFile, VmAction, VmDefinition, VmState};
use whimbrel_api::{ApiError, ErrorCode, MigrationId, Name, VmId};
use whimbrel_migration::handoff::Ownership;
use whimbrel_qemu::machine::Machine;

pub use create::create;
pub use running::{RunDir, RunningVm, Spawned};
pub use start_up::find_all;
pub(crate) use start_up::own_run;

use crate::host::Host;
use crate::ledger::RunRecord;
use order::{ImageChange, Order, Published};

/// Orders that may wait for a VM's task; one more is refused as `busy`.
const WAITING_ORDERS_MAX: usize = 8;

/// How long the end of the agent waits for its tasks, in seconds.
const CLOSE_SECONDS: u64 = 5;

/// A VM's task, seen from outside.
#[derive(Debug, Clone)]
struct Handle {
    orders: mpsc::Sender<Order>,
    published: watch::Receiver<Published>,
}

/// All VMs of a host.
#[derive(Debug, Default)]
pub struct Vms {
    tasks: Mutex<HashMap<VmId, Handle>>,
    /// The tasks themselves: to wait for their end.
    running: Mutex<JoinSet<()>>,
    consoles: console::Consoles,
}

impl Vms {
    /// How every VM is, by name.
    #[must_use]
    pub fn reports(&self) -> Vec<VmReport> {
        let mut reports: Vec<VmReport> =
            self.tasks().values().map(|task| task.published.borrow().report.clone()).collect();
        reports.sort_by(|a, b| a.definition.name.cmp(&b.definition.name));
        reports
    }

    /// How one VM is.
    ///
    /// # Errors
    /// `not-found`.
    pub fn report(&self, vm: VmId) -> Result<VmReport, ApiError> {
        self.task(vm).map(|task| task.published.borrow().report.clone())
    }

    /// The names of the VMs whose definition fulfils something.
    pub fn names_where(&self, wanted: impl Fn(&VmDefinition) -> bool) -> Vec<Name> {
        let reports = self.reports();
        let definitions = reports.into_iter().map(|report| report.definition);
        definitions.filter(|found| wanted(found)).map(|found| found.name).collect()
    }

    /// Starts, stops, pauses or resumes a VM.
    ///
    /// # Errors
    /// A refusal with nothing begun, or what failed.
    pub async fn act(&self, vm: VmId, action: VmAction, force: bool) -> Result<VmReport, ApiError> {
        self.order(vm, |reply| match action {
            VmAction::Start => Order::Start(reply),
            VmAction::Stop => Order::Stop { force, reply },
            VmAction::Pause => Order::Pause(reply),
            VmAction::Resume => Order::Resume(reply),
        })
        .await?
    }

    /// Saves a VM's whole state to a new file and ends its QEMU. On success the VM is stopped, and goes on from the file only;
    /// on failure it is as it was.
    ///
    /// # Errors
    /// A refusal with nothing begun, or what failed.
    pub async fn save(&self, vm: VmId, to: StateFile) -> Result<VmReport, ApiError> {
        self.order(vm, |reply| Order::Save { to, reply }).await?
    }

    /// Lets a saved VM go on from its file, which is used up by that.
    ///
    /// # Errors
    /// A refusal with nothing begun, or what failed; the VM is saved as before then, or runs.
    pub async fn restore(&self, vm: VmId, from: StateFile) -> Result<VmReport, ApiError> {
        self.order(vm, |reply| Order::Restore { from, reply }).await?
    }

    /// Deletes a stopped VM with its disks. On success this host has only old ownership records of it.
    ///
    /// # Errors
    /// A refusal with nothing begun, or what failed; the VM is stopped then, some of its disks may be gone.
    pub async fn delete(&self, vm: VmId) -> Result<(), ApiError> {
        self.order(vm, Order::Delete).await??;
        self.tasks().remove(&vm);
        Ok(())
    }

    /// Makes a stopped VM a template, or a template a VM again.
    ///
    /// # Errors
    /// A refusal with nothing changed, or what failed.
    pub async fn set_template(&self, vm: VmId, template: bool) -> Result<VmReport, ApiError> {
        self.change_images(vm, ImageChange::Template(template)).await
    }

    /// Takes a snapshot of a stopped VM's disks. On failure the VM is as before.
    ///
    /// # Errors
    /// A refusal with nothing begun, or what failed.
    pub async fn take_snapshot(&self, vm: VmId, name: Name) -> Result<VmReport, ApiError> {
        self.change_images(vm, ImageChange::Take(name)).await
    }

    /// Lets a stopped VM's disks go on from a snapshot; what was written since is lost. On failure the VM is as before.
    ///
    /// # Errors
    /// A refusal with nothing begun, or what failed.
    pub async fn revert(&self, vm: VmId, to: Name) -> Result<VmReport, ApiError> {
        self.change_images(vm, ImageChange::Revert(to)).await
    }

    /// Deletes a snapshot of a stopped VM, and what only it needs. The caller knows that no clone stands on it.
    ///
    /// # Errors
    /// A refusal with nothing begun, or what failed.
    pub async fn delete_snapshot(&self, vm: VmId, name: Name) -> Result<VmReport, ApiError> {
        self.change_images(vm, ImageChange::DeleteSnapshot(name)).await
    }

    async fn change_images(&self, vm: VmId, change: ImageChange) -> Result<VmReport, ApiError> {
        self.order(vm, |reply| Order::Images { change, reply }).await?
    }

    /// Lends a running VM to a migration, by value. Until it is given back, all other orders are refused as
    /// `migrating`, and its rows in the ledger and its QEMU are the migration's. To be called from a task that nobody
    /// cancels: a loan that gets lost comes back with the agent's next start only.
    ///
    /// # Errors
    /// A refusal with nothing changed: not found, not running, lent already, or not this host's.
    pub async fn lend(&self, vm: VmId, migration: MigrationId) -> Result<RunningVm, ApiError> {
        self.order(vm, |reply| Order::Lend { migration, reply }).await?
    }

    /// Lends a VM that has no QEMU to a migration: its definition is what moves. As with [`Vms::lend`], everything else is
    /// refused until it is given back, and its rows in the ledger are the migration's. The answer is this host's word on it.
    ///
    /// # Errors
    /// A refusal with nothing changed: not found, not stopped, lent already.
    pub async fn lend_stopped(
        &self,
        vm: VmId,
        migration: MigrationId,
    ) -> Result<Ownership, ApiError> {
        self.order(vm, |reply| Order::LendStopped { migration, reply }).await?
    }

    /// Takes a lent VM back that has no QEMU. The ledger says `Owned` already. Afterwards it is stopped, or crashed, as
    /// before.
    pub async fn give_back_stopped(&self, vm: VmId) {
        log_if_failed(vm, self.order_in_turn(vm, Order::GiveBackStopped).await);
    }

    /// Says how a lent VM is, for reports: `Migrating` (as from the beginning) or `Unresolved`.
    pub async fn loan_news(&self, vm: VmId, news: VmState) {
        let told = self.order_in_turn(vm, |reply| Order::LoanNews { news, reply }).await;
        log_if_failed(vm, told);
    }

    /// Takes a lent VM back. The ledger says `Owned` already, and its QEMU is as the record's intent wants it. Afterwards
    /// the VM is its task's again.
    pub async fn give_back(&self, running: RunningVm) {
        let vm = running.id();
        let running = Box::new(running);
        let order = |reply| Order::GiveBack { running, reply };
        log_if_failed(vm, self.order_in_turn(vm, order).await);
    }

    /// Takes back a lent VM whose QEMU has ended during the loan, and takes down what was made for it. Afterwards the VM
    /// is crashed, with the reason, or stopped, if the guest had powered itself off (`crashed` is `None`).
    pub async fn give_back_ended(&self, vm: VmId, crashed: Option<String>) {
        let order = |reply| Order::GiveBackEnded { crashed, reply };
        log_if_failed(vm, self.order_in_turn(vm, order).await);
    }

    /// Forgets a lent VM that is another host's now: its row and its task go; ownership records and disks stay. Whoever
    /// has its QEMU ends it with [`spawn::destroy`], before or after. Unknown VMs are no error.
    pub async fn forget(&self, vm: VmId) {
        match self.order_in_turn(vm, Order::Forget).await {
            Ok(true) => drop(self.tasks().remove(&vm)),
            Ok(false) => tracing::error!(%vm, "a VM that is not lent was to be forgotten"),
            Err(error) if error.code == ErrorCode::NotFound => {}
            Err(error) => log_if_failed(vm, Err(error)),
        }
    }

    /// Takes in a VM that a migration has brought: the ledger says `Owned` already. Afterwards it has a task of its own.
    ///
    /// # Errors
    /// `internal` where the ledger cannot be written; the VM has its task all the same, and a restarted agent finds the
    /// run by its migration.
    pub async fn adopt_incoming(
        &self,
        host: &Arc<Host>,
        running: RunningVm,
    ) -> Result<(), ApiError> {
        let qemu = &running.qemu;
        let noted = host.ledger.set_running(&qemu.definition, &qemu.run).await;
        let (id, definition) = (running.id(), running.qemu.definition.clone());
        let ownership = running.ownership.clone();
        self.insert(id, task::run_with(host, definition, ownership, running));
        Ok(noted?)
    }

    /// Takes in a stopped VM that a migration has brought: ledger and row say so already. Afterwards it has a task of its
    /// own.
    pub fn adopt_stopped(&self, host: &Arc<Host>, definition: VmDefinition, ownership: Ownership) {
        let id = definition.id;
        self.insert(id, task::run(host, definition, ownership, task::Beginning::Stopped));
    }

    /// Takes in a VM whose guest has come before all of its memory: the ledger says `Fetching` already. It has a task from
    /// now on, and is lent to the migration that brings the rest, as by [`Vms::lend`]. `run` is what its QEMU is found by,
    /// unless that has ended.
    ///
    /// # Errors
    /// As [`Vms::adopt_incoming`].
    pub(crate) async fn adopt_lent(
        &self,
        host: &Arc<Host>,
        definition: &VmDefinition,
        (ownership, migration): (Ownership, MigrationId),
        run: Option<RunRecord>,
    ) -> Result<(), ApiError> {
        let noted = match &run {
            Some(run) => host.ledger.set_running(definition, &run.name).await,
            None => host.ledger.set_ended(definition.id, None).await,
        };
        let news = VmState::Migrating { migration };
        let record = run.map(Box::new);
        let beginning = task::Beginning::Lent { migration, news, record };
        let vm = definition.id;
        self.insert(vm, task::run(host, definition.clone(), ownership, beginning));
        Ok(noted?)
    }

    /// Opens a VM's console.
    ///
    /// # Errors
    /// `not-found`; `wrong-state` where nothing runs; `engine` where QEMU's socket cannot be reached.
    pub async fn open_console(&self, vm: VmId) -> Result<console::Reader, ApiError> {
        let published = self.task(vm)?.published.borrow().clone();
        let Some(place) = published.console else {
            let state = published.report.state.word();
            let message = format!("the VM is {state}: there is no console");
            return Err(ApiError::new(ErrorCode::WrongState, message));
        };
        self.consoles.open(&place).await
    }

    /// How a VM is, and the session with its QEMU, for measurements: questions that change nothing of the guest.
    ///
    /// # Errors
    /// `not-found`.
    pub(crate) fn session(&self, vm: VmId) -> Result<(VmReport, Option<Machine>), ApiError> {
        let Published { report, machine, .. } = self.task(vm)?.published.borrow().clone();
        Ok((report, machine))
    }

    /// What of a VM matters to whoever wants to move it.
    ///
    /// # Errors
    /// `not-found`, or `engine` where QEMU does not answer.
    pub async fn mobility(&self, vm: VmId) -> Result<Mobility, ApiError> {
        let Published { report, machine, .. } = self.task(vm)?.published.borrow().clone();
        let Some(machine) = machine else {
            return Ok(Mobility {
                vm: report,
                cpu_features: BTreeSet::new(),
                blockers: Vec::new(),
                abilities: None,
            });
        };
        mobility::ask(report, &machine).await
    }

    /// Bounds the logs of all consoles.
    pub fn bound_console_logs(&self) {
        let tasks: Vec<Handle> = self.tasks().values().cloned().collect();
        for task in tasks {
            let place = task.published.borrow().console.clone();
            if let Some(place) = place {
                place.bound_log();
            }
        }
    }

    /// Waits until the QEMUs of an earlier life of the agent are found again or known to be gone, or some time has passed:
    /// then the tasks go on looking by themselves.
    pub async fn wait_found(&self, at_most: Duration) {
        let tasks: Vec<Handle> = self.tasks().values().cloned().collect();
        let all = async {
            for mut task in tasks {
                let known = |now: &Published| !matches!(now.report.state, VmState::Unknown { .. });
                // A task that has ended has nothing to be found.
                let _ = task.published.wait_for(known).await;
            }
        };
        if tokio::time::timeout(at_most, all).await.is_err() {
            tracing::warn!("not every QEMU has answered yet");
        }
    }

    /// Ends all tasks and waits until they have let go; QEMUs go on.
    pub async fn close(&self) {
        self.tasks().clear();
        let mut running = std::mem::take(&mut *self.running());
        let all = async { while running.join_next().await.is_some() {} };
        if tokio::time::timeout(Duration::from_secs(CLOSE_SECONDS), all).await.is_err() {
            tracing::warn!("a VM's task was in the middle of something when the agent ended");
        }
    }

    /// Whether a VM has a task.
    #[must_use]
    pub fn has(&self, vm: VmId) -> bool {
        self.tasks().contains_key(&vm)
    }

    fn spawn(&self, task: impl Future<Output = ()> + Send + 'static) {
        let mut running = self.running();
        while running.try_join_next().is_some() {}
        running.spawn(task);
    }

    fn running(&self) -> MutexGuard<'_, JoinSet<()>> {
        self.running.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn insert(&self, vm: VmId, task: Handle) {
        self.tasks().insert(vm, task);
    }

    /// Gives an order, or refuses at once where too many wait: for users, who try again.
    async fn order<T>(
        &self,
        vm: VmId,
        order: impl FnOnce(oneshot::Sender<T>) -> Order,
    ) -> Result<T, ApiError> {
        let task = self.task(vm)?;
        let (reply, answer) = oneshot::channel();
        task.orders.try_send(order(reply)).map_err(|error| match error {
            mpsc::error::TrySendError::Full(_) => {
                ApiError::new(ErrorCode::Busy, "the VM has too many orders waiting; try again")
            }
            mpsc::error::TrySendError::Closed(_) => self.no_task(vm),
        })?;
        answer.await.map_err(|_| self.no_task(vm))
    }

    /// Gives an order that must not get lost: for migrations. A task that has lent its VM refuses everything else at once,
    /// so the turn comes soon.
    async fn order_in_turn<T>(
        &self,
        vm: VmId,
        order: impl FnOnce(oneshot::Sender<T>) -> Order,
    ) -> Result<T, ApiError> {
        let task = self.task(vm)?;
        let (reply, answer) = oneshot::channel();
        task.orders.send(order(reply)).await.map_err(|_| self.no_task(vm))?;
        answer.await.map_err(|_| self.no_task(vm))
    }

    /// Why a VM's task does not answer: the VM was deleted meanwhile, or the task has a defect.
    fn no_task(&self, vm: VmId) -> ApiError {
        if self.has(vm) {
            let message = format!("the task of VM {vm} has broken off; its QEMU, if any, runs on");
            return ApiError::new(ErrorCode::Internal, message)
                .hint("restart the agent: it finds the VM again");
        }
        ApiError::not_found("VM", vm)
    }

    fn task(&self, vm: VmId) -> Result<Handle, ApiError> {
        self.tasks().get(&vm).cloned().ok_or_else(|| ApiError::not_found("VM", vm))
    }

    fn tasks(&self) -> MutexGuard<'_, HashMap<VmId, Handle>> {
        // Each change is one call, so the map is whole even after a panic.
        self.tasks.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The storages that a definition names.
#[must_use]
pub fn storages_of(definition: &VmDefinition) -> BTreeSet<Name> {
    let files = lineage::files(definition).into_iter().map(|file| file.storage);
    let mut storages: BTreeSet<Name> = files.collect();
    if let Boot::Kernel { kernel, initrd, .. } = &definition.boot {
        storages.insert(kernel.storage.clone());
        storages.extend(initrd.iter().map(|file| file.storage.clone()));
    }
    storages.extend(definition.saved.iter().map(|saved| saved.file.storage.clone()));
    storages
}

fn log_if_failed(vm: VmId, outcome: Result<(), ApiError>) {
    if let Err(error) = outcome {
        tracing::error!(%vm, %error, "the VM's task did not take an order of its migration");
    }
}
