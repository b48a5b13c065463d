//! What a VM's task does when it is told to.

use std::time::Duration;

use tokio::sync::oneshot;
use tokio::time::Instant;
use whimbrel_api::vm::VmState;
use whimbrel_api::{ApiError, ErrorCode, MigrationId};
use whimbrel_migration::handoff::{Intent, Ownership, Standing};
use whimbrel_qemu::process::{AdoptError, Process};

use super::super::found::has_ended;
use super::super::running::{RunDir, RunningVm, engine_error as engine};
use super::super::spawn::{self, Purpose};
use super::super::{console, create};
use super::{Reply, State, Task, Watched};

/// How long the answer to a graceful stop waits for the guest, in seconds: less than a client waits for the answer.
const STOP_ANSWER_SECONDS: u64 = 20;

impl Task {
    /// Starts the VM. On success its guest runs; otherwise it is stopped as before, and nothing is left.
    pub(super) async fn start(&mut self) -> Result<(), ApiError> {
        if !matches!(self.state, State::Stopped | State::Crashed { .. }) {
            return Err(self.refuse("stopped"));
        }
        self.own().await?;
        self.refuse_if_saved()?;
        self.refuse_if_template()?;
        self.intend(Intent::Run).await?;
        let spawned = spawn::spawn(&self.host, &self.definition, Purpose::Start).await?;
        let begun = async {
            self.host.ledger.set_running(&self.definition, &spawned.run).await?;
            self.host.failpoints.hit("vm.start.cont").await?;
            let watched = Watched::new(spawned.clone());
            spawned
                .machine
                .cont()
                .await
                .map_err(|error| engine("the guest was not started", &error))?;
            Ok::<_, ApiError>(watched)
        };
        match begun.await {
            Ok(watched) => {
                self.state = State::Running(Box::new(watched));
                tracing::info!(vm = %self.definition.name, run = spawned.run, "started");
                Ok(())
            }
            Err(error) => {
                if let Err(left) = spawn::destroy(&self.host, &spawned).await {
                    tracing::error!(vm = %self.definition.name, error = %left, "a failed start left something behind");
                }
                self.note_end(None).await;
                self.state = State::Stopped;
                Err(error)
            }
        }
    }

    /// Asks the guest to power off, or ends QEMU. The answer to the former comes when the guest has obeyed, or after a
    /// while in which it has not.
    pub(super) async fn stop(&mut self, force: bool, reply: Reply) {
        if force {
            let outcome = self.stop_by_force().await;
            return self.answer(reply, outcome);
        }
        let outcome = match &mut self.state {
            State::Running(watched) => match watched.qemu.machine.system_powerdown().await {
                Ok(()) => {
                    let by = Instant::now() + Duration::from_secs(STOP_ANSWER_SECONDS);
                    watched.answer_by.get_or_insert(by);
                    watched.stopping.push(reply);
                    return;
                }
                Err(error) => Err(engine("the guest was not asked to power off", &error)),
            },
            State::Stopped => Ok(()),
            _ => Err(self.refuse("running")),
        };
        self.answer(reply, outcome);
    }

    async fn stop_by_force(&mut self) -> Result<(), ApiError> {
        match &self.state {
            State::Running(watched) => {
                let qemu = watched.qemu.clone();
                spawn::end(&self.host, &qemu.process).await?;
                self.end_run(None).await;
                Ok(())
            }
            // Asked for by an operator, of a process that is known for sure.
            State::Silent { record } => {
                let record = record.clone();
                let log = RunDir::new(&self.host.config.run_dir(), &record.name).qemu_log();
                match Process::adopt(&record.process, &log) {
                    Ok(process) => spawn::end(&self.host, &process).await?,
                    Err(AdoptError::Gone { .. }) => {}
                    Err(error) => return Err(ApiError::internal("QEMU was not ended", &error)),
                }
                spawn::sweep_run(&self.host, &record.name, &record.taps).await;
                self.note_end(None).await;
                self.state = State::Stopped;
                Ok(())
            }
            State::Crashed { .. } => {
                self.note_end(None).await;
                self.state = State::Stopped;
                self.give_up_saved().await
            }
            State::Stopped => self.give_up_saved().await,
            _ => Err(self.refuse("running")),
        }
    }

    /// Pauses the guest, durably: it stays paused over restarts of the agent and migrations.
    pub(super) async fn pause(&mut self) -> Result<(), ApiError> {
        let State::Running(watched) = &self.state else { return Err(self.refuse("running")) };
        let machine = watched.qemu.machine.clone();
        machine.stop().await.map_err(|error| engine("the guest was not paused", &error))?;
        let noted = self.intend(Intent::Pause).await;
        if noted.is_err() {
            // What could not be noted must not be believed either.
            machine.cont().await.map_err(|error| engine("the guest was not resumed", &error))?;
        }
        noted
    }

    /// Lets the guest run again, after a pause or after a disk error.
    pub(super) async fn resume(&mut self) -> Result<(), ApiError> {
        let State::Running(watched) = &self.state else { return Err(self.refuse("paused")) };
        let machine = watched.qemu.machine.clone();
        self.intend(Intent::Run).await?;
        machine.cont().await.map_err(|error| engine("the guest was not resumed", &error))?;
        if let State::Running(watched) = &mut self.state {
            watched.halted = None;
        }
        // A guest that came here paused has not been told to the network, which sends to where it was.
        if let Err(error) = machine.announce_self().await {
            tracing::debug!(vm = %self.definition.name, %error, "the guest's place was not announced");
        }
        Ok(())
    }

    /// Deletes the VM with its disks.
    pub(super) async fn delete(&mut self) -> Result<(), ApiError> {
        if !matches!(self.state, State::Stopped | State::Crashed { .. }) {
            return Err(self.refuse("stopped"));
        }
        self.own().await?;
        self.refuse_if_stood_on()?;
        create::delete_files(&self.host, &self.definition).await?;
        self.host.ledger.remove_vm(self.definition.id).await?;
        tracing::info!(vm = %self.definition.name, "deleted");
        Ok(())
    }

    /// Gives the VM to a migration by value.
    pub(super) fn lend(
        &mut self,
        migration: MigrationId,
        reply: oneshot::Sender<Result<RunningVm, ApiError>>,
    ) {
        let refused = match &self.state {
            State::Running(watched) if watched.halted.is_none() => None,
            _ => Some(self.refuse("running or paused")),
        };
        if let Some(refused) = refused {
            let _ = reply.send(Err(refused));
            return;
        }
        self.answer_stops();
        let State::Running(watched) = std::mem::replace(&mut self.state, State::Between) else {
            return;
        };
        let running = RunningVm { qemu: watched.qemu, ownership: self.ownership.clone() };
        self.state = State::Lent {
            migration,
            news: VmState::Migrating { migration },
            console: Some(console::Place::of(&running.qemu)),
            machine: Some(running.qemu.machine.clone()),
        };
        self.publish();
        // A caller that has gone away must not take the VM with it.
        if let Err(Ok(running)) = reply.send(Ok(running)) {
            self.state = State::Running(Box::new(Watched::new(running.qemu)));
        }
    }

    /// Gives a VM without QEMU to a migration.
    pub(super) fn lend_stopped(
        &mut self,
        migration: MigrationId,
        reply: oneshot::Sender<Result<Ownership, ApiError>>,
    ) {
        if !matches!(self.state, State::Stopped | State::Crashed { .. }) {
            let _ = reply.send(Err(self.refuse("stopped")));
            return;
        }
        let news = VmState::Migrating { migration };
        let lent = State::Lent { migration, news, console: None, machine: None };
        let before = std::mem::replace(&mut self.state, lent);
        self.publish();
        // A caller that has gone away must not take the VM with it.
        if reply.send(Ok(self.ownership.clone())).is_err() {
            self.state = before;
        }
    }

    /// Takes a lent VM back that has no QEMU. How its last run had ended stands in its row, which a loan leaves alone.
    pub(super) async fn take_back_stopped(&mut self) {
        let before = self.ownership.clone();
        self.reread_ownership(&before).await;
        let rows = self.host.ledger.vms().await.unwrap_or_else(|error| {
            tracing::error!(vm = %self.definition.name, %error, "how its last run ended is not known");
            Vec::new()
        });
        let row = rows.into_iter().find(|row| row.definition.id == self.definition.id);
        self.state = match row.and_then(|row| row.crashed) {
            Some(why) => State::Crashed { why },
            None => State::Stopped,
        };
    }

    /// Takes a lent VM back.
    pub(super) async fn take_back(&mut self, running: RunningVm) {
        self.reread_ownership(&running.ownership).await;
        self.state = State::Running(Box::new(Watched::new(running.qemu)));
        // What happened during the loan was not seen here.
        self.reconcile().await;
        self.look().await;
    }

    /// Takes a lent VM back whose QEMU has ended.
    pub(super) async fn take_back_ended(&mut self, crashed: Option<String>) {
        let before = self.ownership.clone();
        self.reread_ownership(&before).await;
        self.sweep_own_run().await;
        self.note_end(crashed.clone()).await;
        self.state = match crashed {
            Some(why) => State::Crashed { why },
            None => State::Stopped,
        };
    }

    /// Forgets a VM that is another host's now.
    pub(super) async fn forget(&mut self) {
        self.sweep_own_run().await;
        if let Err(error) = self.host.ledger.remove_vm(self.definition.id).await {
            tracing::error!(vm = %self.definition.name, %error, "a VM that has moved was not forgotten; the next start of the agent does it");
        }
        tracing::info!(vm = %self.definition.name, "forgotten: it is another host's");
    }

    /// Takes down what is left of the VM's own run, if its process is gone.
    async fn sweep_own_run(&self) {
        let id = self.definition.id;
        let rows = match (self.host.ledger.vms().await, self.host.ledger.runs().await) {
            (Ok(vms), Ok(runs)) => (vms, runs),
            (Err(error), _) | (_, Err(error)) => {
                tracing::error!(vm = %self.definition.name, %error, "what is left of a run was not looked for");
                return;
            }
        };
        let own = rows.0.into_iter().find(|row| row.definition.id == id).and_then(|row| row.run);
        let Some(record) = rows.1.into_iter().find(|run| Some(&run.name) == own.as_ref()) else {
            return;
        };
        if has_ended(&record.process) {
            spawn::sweep_run(&self.host, &record.name, &record.taps).await;
        } else {
            // Whoever ends it takes the rest down.
            tracing::debug!(run = record.name, "the QEMU of a run that is over is still there");
        }
    }

    /// Makes sure, from the ledger, that this host owns the VM and no migration is open.
    pub(super) async fn own(&mut self) -> Result<(), ApiError> {
        let current = self.host.ledger.current(self.definition.id).await?;
        match current {
            Some(record) if record.standing == Standing::Owned => {
                self.ownership = record;
                Ok(())
            }
            _ => Err(ApiError::new(
                ErrorCode::WrongState,
                format!("host {} does not own VM `{}`", self.host.name(), self.definition.name),
            )),
        }
    }

    /// Notes durably whether the user wants the guest to run.
    pub(super) async fn intend(&mut self, intent: Intent) -> Result<(), ApiError> {
        if self.ownership.intent == intent {
            return Ok(());
        }
        let record = Ownership { intent, ..self.ownership.clone() };
        self.host.ledger.persist(&record).await?;
        self.ownership = record;
        Ok(())
    }

    async fn reread_ownership(&mut self, otherwise: &Ownership) {
        let current = self.host.ledger.current(self.definition.id).await;
        self.ownership = current.ok().flatten().unwrap_or_else(|| otherwise.clone());
    }
}
