//! A VM's whole state in a file: saved, and gone on from.
//!
//! ```text
//!  save:     stop ─► write the file ─► fsync ─► the row: saved, no run ─► end QEMU
//!  restore:  a stopped QEMU reads the file ─► the row: its run, not saved ─► cont ─► remove the file
//! ```
//!
//! What is saved is a guest's memory as it was when its disks were as they are. Once a guest has run on, that memory must never
//! run again (I7), and so **the row in the ledger alone says whether a file may be gone on from**: it names the file from the
//! moment when the file is whole on the disk and the guest stands still for good, until the moment before the guest runs again.
//! A file that it does not name is waste, and the journal has it removed; a QEMU whose run it does not name is ended.
//!
//! | the agent dies | then |
//! |---|---|
//! | before the row says saved | the guest is found again and runs on; the file is removed |
//! | after it | its QEMU is ended; the VM is saved |
//! | before the row says that it runs | that QEMU is ended; the VM is saved as before |
//! | after it | the guest is found again and let go; the file is removed |
//!
//! The file is made new, 0600, opened beneath its storage, and handed to QEMU as a descriptor. Who may run the guest is asked of
//! the ownership record as ever. Not here: how QEMU writes and reads it ([`whimbrel_qemu::migrate::state_file`]).

use std::fs::File;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;
use tokio::time::timeout;
use whimbrel_api::error::chain;
use whimbrel_api::vm::{SavedState, StateFile, StoragePath, VmDefinition};
use whimbrel_api::{ApiError, ErrorCode, VmId};
use whimbrel_migration::handoff::Intent;
use whimbrel_qemu::machine::Machine;
use whimbrel_qemu::migrate::outgoing::Outgoing;
use whimbrel_qemu::migrate::state_file::{self, Layout};
use whimbrel_qemu::migrate::{Statistics, incoming};

use super::super::running::Spawned;
use super::super::running::engine_error as engine;
use super::super::spawn::{self, Purpose};
use super::{State, Task, Watched};
use crate::host::Host;
use crate::ledger::Resource;

/// How long QEMU may take to write or read a state, in seconds; less than a client waits.
const STATE_SECONDS: u64 = 3_000;
/// How long it may take to give up writing, in seconds.
const CANCEL_SECONDS: u64 = 10;

impl Task {
    /// Saves the VM to a new file. On success it is stopped and saved; otherwise as before, and the file is gone.
    pub(super) async fn save(&mut self, to: &StateFile) -> Result<(), ApiError> {
        let State::Running(watched) = &self.state else {
            return Err(self.refuse("running or paused"));
        };
        if watched.halted.is_some() {
            return Err(self.refuse("running or paused"));
        }
        let qemu = watched.qemu.clone();
        self.own().await?;
        let owner = owner(self.definition.id);
        let _alone = self.host.in_hand.wait_alone(&owner).await?;
        let file = create(&self.host, &to.file).await?;
        // Not before: a file that was there is not ours, and must not be swept. An empty one may be left.
        let resource = Resource::StateFile { vm: self.definition.id, file: to.file.clone() };
        let journaled = self.host.ledger.journal(&owner, &[resource]).await;
        let layout = layout_of(&qemu.machine);
        let saved = SavedState { file: to.file.clone(), mapped: layout != Layout::Stream };
        let done = match journaled {
            Ok(()) => self.write_and_note(&qemu, file, layout, saved).await,
            Err(error) => Err(error.into()),
        };
        match done {
            Ok(definition) => {
                self.definition = definition;
                self.end_saved(&qemu).await;
                self.unjournal(&owner).await;
                Ok(())
            }
            Err(error) => {
                self.run_on(&qemu, &to.file, &owner).await;
                Err(error)
            }
        }
    }

    /// The guest stands still, its state is on the disk, and the row says so: in this order.
    async fn write_and_note(
        &self,
        qemu: &Spawned,
        file: File,
        layout: Layout,
        saved: SavedState,
    ) -> Result<VmDefinition, ApiError> {
        let machine = &qemu.machine;
        let failed = |error: &dyn std::error::Error| engine("the state was not saved", error);
        machine.stop().await.map_err(|error| failed(&error))?;
        let progress = watch::Sender::new(Statistics::default());
        let saving = state_file::save(machine, &file, layout, &progress);
        match timeout(Duration::from_secs(STATE_SECONDS), saving).await {
            Ok(done) => drop(done.map_err(|error| failed(&error))?),
            Err(_) => {
                let within = Duration::from_secs(CANCEL_SECONDS);
                if let Err(error) = Outgoing::reattach(machine).cancel(within).await {
                    tracing::warn!(vm = %self.definition.name, error = chain(&error), "QEMU did not give up saving");
                }
                let message = format!("the state was not saved within {STATE_SECONDS} s");
                return Err(ApiError::new(ErrorCode::Engine, message));
            }
        }
        make_durable(&self.host, file, &saved.file).await?;
        let definition = self.changed(Some(saved));
        self.host.ledger.set_saved(&definition, &qemu.run).await?;
        Ok(definition)
    }

    /// Ends the QEMU of a guest that is saved. What cannot be ended is left to the sweep; its guest stands still.
    async fn end_saved(&mut self, qemu: &Spawned) {
        tracing::info!(vm = %self.definition.name, "saved");
        self.answer_stops();
        match spawn::end(&self.host, &qemu.process).await {
            Ok(()) => spawn::sweep_run(&self.host, &qemu.run, &qemu.taps).await,
            Err(error) => {
                tracing::error!(vm = %self.definition.name, %error, "the QEMU of a saved VM is left to the next sweep");
            }
        }
        self.state = State::Stopped;
    }

    /// The guest was not saved, and runs on: once nothing can be gone on from any more. The row may name the file all the same, if
    /// its writing has failed; one of file and row goes, or the guest stands still.
    async fn run_on(&mut self, qemu: &Spawned, file: &StoragePath, owner: &str) {
        let removed = remove(&self.host, file).await;
        match &removed {
            Ok(()) => self.unjournal(owner).await,
            Err(error) => {
                tracing::error!(vm = %self.definition.name, %error, "a saved state is left to the next sweep");
            }
        }
        let noting = async {
            self.host.ledger.put_run(&qemu.record()).await?;
            self.host.ledger.set_running(&self.definition, &qemu.run).await
        };
        let noted = noting.await;
        if let Err(error) = &noted {
            let error = chain(error);
            tracing::error!(vm = %self.definition.name, error, "the ledger does not know that the VM was not saved");
        }
        if self.ownership.intent == Intent::Run
            && (removed.is_ok() || noted.is_ok())
            && let Err(error) = qemu.machine.cont().await
        {
            tracing::error!(vm = %self.definition.name, error = chain(&error), "the guest does not run on; `vm resume` tries again");
        }
        self.look().await;
    }

    /// Lets a saved VM go on. On success its guest runs, or stands still if it did when it was saved. On failure it is saved as
    /// before; or it is here and stands still, if only the last step failed.
    pub(super) async fn restore(&mut self, from: &StateFile) -> Result<(), ApiError> {
        if !matches!(self.state, State::Stopped | State::Crashed { .. }) {
            return Err(self.refuse("saved"));
        }
        self.own().await?;
        let saved = self.saved_in(from)?;
        let owner = owner(self.definition.id);
        let _alone = self.host.in_hand.wait_alone(&owner).await?;
        let file = open(&self.host, &saved.file).await?;
        // The sweep lets it be for as long as the row names it.
        let resource = Resource::StateFile { vm: self.definition.id, file: saved.file.clone() };
        self.host.ledger.journal(&owner, &[resource]).await?;
        let definition = self.changed(None);
        let qemu = match self.load(&definition, &file, layout_in(&saved)).await {
            Ok(qemu) => qemu,
            Err(error) => {
                self.unjournal(&owner).await;
                return Err(error);
            }
        };
        self.definition = definition;
        self.state = State::Running(Box::new(Watched::new(qemu.clone())));
        // From here on the file is of no use to anybody.
        let begun = self.go_on(&qemu.machine).await;
        match remove(&self.host, &saved.file).await {
            Ok(()) => self.unjournal(&owner).await,
            Err(error) => {
                tracing::warn!(vm = %self.definition.name, %error, "a state that was used is left to the next sweep");
            }
        }
        begun
    }

    async fn go_on(&mut self, machine: &Machine) -> Result<(), ApiError> {
        tracing::info!(vm = %self.definition.name, "restored");
        if self.ownership.intent == Intent::Run {
            self.host.failpoints.hit("vm.restore.cont").await?;
            machine.cont().await.map_err(|error| engine("the guest was not let go", &error))?;
            if let Err(error) = machine.announce_self().await {
                tracing::debug!(error = chain(&error), "the guest's place was not announced");
            }
        }
        Ok(())
    }

    /// A QEMU that holds the saved guest, stopped, and is the VM's own by the ledger, which names the file no longer. On failure
    /// nothing is left of it.
    async fn load(
        &mut self,
        definition: &VmDefinition,
        file: &File,
        layout: Layout,
    ) -> Result<Spawned, ApiError> {
        let failed = |error: &dyn std::error::Error| engine("the state was not restored", error);
        let qemu = spawn::spawn(&self.host, definition, Purpose::Restore).await?;
        let loaded = async {
            let reading = async {
                state_file::restore(&qemu.machine, file, layout).await?;
                incoming::wait_loaded(&qemu.machine).await
            };
            match timeout(Duration::from_secs(STATE_SECONDS), reading).await {
                Ok(loaded) => drop(loaded.map_err(|error| failed(&error))?),
                Err(_) => {
                    let message = format!("the state was not restored within {STATE_SECONDS} s");
                    return Err(ApiError::new(ErrorCode::Engine, message));
                }
            }
            self.host.failpoints.hit("vm.restore.note").await?;
            Ok(self.host.ledger.set_running(definition, &qemu.run).await?)
        };
        if let Err(error) = loaded.await {
            let words = qemu.process.last_words().join("; ");
            tracing::warn!(vm = %definition.name, %error, words, "a saved state was not restored");
            if let Err(left) = spawn::destroy(&self.host, &qemu).await {
                tracing::error!(vm = %definition.name, error = %left, "a failed restore left something behind");
            }
            // Its guest has not run, so the file is as good as before, whatever a failed write has left.
            if let Err(error) = self.host.ledger.set_definition(&self.definition).await {
                tracing::error!(vm = %definition.name, error = chain(&error), "the ledger may not know that the VM is saved");
            }
            self.note_end(None).await;
            return Err(error);
        }
        Ok(qemu)
    }

    /// The state that the VM goes on from, if it is in this file.
    fn saved_in(&self, from: &StateFile) -> Result<SavedState, ApiError> {
        let name = &self.definition.name;
        match &self.definition.saved {
            Some(saved) if saved.file == from.file => Ok(saved.clone()),
            Some(saved) => Err(ApiError::new(
                ErrorCode::WrongState,
                format!("VM `{name}` is saved in {}, not in {}", saved.file, from.file),
            )),
            None => Err(ApiError::new(
                ErrorCode::WrongState,
                format!("there is no state from which VM `{name}` could go on: it was not saved, or has run since"),
            )
            .hint("a saved state is good for one `vm restore`; `vm start` boots the VM")),
        }
    }

    /// A saved VM is not started anew: its disks are as a running guest has left them.
    pub(super) fn refuse_if_saved(&self) -> Result<(), ApiError> {
        let Some(saved) = &self.definition.saved else { return Ok(()) };
        let name = &self.definition.name;
        let message = format!("VM `{name}` is saved in {}", saved.file);
        Err(ApiError::new(ErrorCode::WrongState, message).hint(
            "`vm restore` lets it go on; `vm stop --force` gives the saved state up, like pulling the plug",
        ))
    }

    /// Gives the saved state up, if there is one.
    pub(super) async fn give_up_saved(&mut self) -> Result<(), ApiError> {
        let Some(saved) = self.definition.saved.clone() else { return Ok(()) };
        self.own().await?;
        let owner = owner(self.definition.id);
        let _alone = self.host.in_hand.wait_alone(&owner).await?;
        let resource = Resource::StateFile { vm: self.definition.id, file: saved.file.clone() };
        self.host.ledger.journal(&owner, &[resource]).await?;
        let definition = self.changed(None);
        self.host.ledger.set_definition(&definition).await?;
        self.definition = definition;
        remove(&self.host, &saved.file).await?;
        self.unjournal(&owner).await;
        Ok(())
    }

    /// The definition with another state to go on from.
    fn changed(&self, saved: Option<SavedState>) -> VmDefinition {
        let generation = self.definition.generation.saturating_add(1);
        VmDefinition { saved, generation, ..self.definition.clone() }
    }

    async fn unjournal(&self, owner: &str) {
        if let Err(error) = self.host.ledger.unjournal(owner).await {
            tracing::warn!(vm = %self.definition.name, error = chain(&error), "the journal still names a saved state; the sweep looks after it");
        }
    }
}

/// Under which name the journal has a VM's saved state.
fn owner(vm: VmId) -> String {
    format!("state of {vm}")
}

/// How this QEMU writes: each page in its place, where it knows that.
fn layout_of(machine: &Machine) -> Layout {
    let features = machine.features();
    let can_map = features.mapped_ram && features.file_transport;
    if can_map { Layout::Mapped { channels: None } } else { Layout::Stream }
}

fn layout_in(saved: &SavedState) -> Layout {
    if saved.mapped { Layout::Mapped { channels: None } } else { Layout::Stream }
}

async fn create(host: &Arc<Host>, file: &StoragePath) -> Result<File, ApiError> {
    let (at, file) = (Arc::clone(host), file.clone());
    let making = host.storages.aside(move |aside| {
        Ok(at.storages.folder(aside, &file.storage)?.create_file(&file.path, at.qemu_user())?)
    });
    making.await
}

async fn open(host: &Arc<Host>, file: &StoragePath) -> Result<File, ApiError> {
    let (at, file) = (Arc::clone(host), file.clone());
    let opening = host
        .storages
        .aside(move |aside| Ok(at.storages.folder(aside, &file.storage)?.open_file(&file.path)?));
    opening.await
}

/// The bytes and the name are on the disk afterwards.
async fn make_durable(host: &Arc<Host>, file: File, at_path: &StoragePath) -> Result<(), ApiError> {
    let (at, path) = (Arc::clone(host), at_path.clone());
    let syncing = host.storages.aside(move |aside| {
        file.sync_all()
            .map_err(|error| ApiError::internal("cannot sync the saved state", &error))?;
        let parent = Path::new(&path.path).parent().and_then(Path::to_str).unwrap_or_default();
        let parent = if parent.is_empty() { "." } else { parent };
        Ok(at.storages.folder(aside, &path.storage)?.sync_folder(parent)?)
    });
    syncing.await
}

async fn remove(host: &Arc<Host>, file: &StoragePath) -> Result<(), ApiError> {
    let (at, file) = (Arc::clone(host), file.clone());
    let removing = host.storages.aside(move |aside| {
        Ok(at.storages.folder(aside, &file.storage)?.remove_file(&file.path)?)
    });
    removing.await
}
