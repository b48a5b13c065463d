//! What a VM's task does about what QEMU does by itself: the guest powers off, panics, meets a disk error; QEMU ends.

use std::time::Duration;

use whimbrel_migration::handoff::{Intent, Standing};
use whimbrel_pki::qemu_credentials::remove_qemu_credentials;
use whimbrel_qemu::event::{Event, EventError, EventKind};
use whimbrel_qemu::machine::RunState;
use whimbrel_qemu::process::Exit;

use super::super::found::{Found, has_ended};
use super::super::running::describe_end;
use super::super::{spawn, take_back};
use super::{State, Task, Watched};

/// How long QEMU may take to end after it was told to, in seconds: it flushes the disks first.
const QUIT_SECONDS: u64 = 10;
/// How long the end of a process may come after the end of its session, in milliseconds.
const END_MILLISECONDS: u64 = 1_000;

impl Task {
    /// Once at the beginning: a VM that was handed over running is looked at.
    pub(super) async fn settle_in(&mut self) {
        if matches!(self.state, State::Running(_)) {
            self.look().await;
        }
    }

    /// An event says that it is time to look.
    pub(super) async fn notice(&mut self, event: Result<Event, EventError>) {
        match event {
            Ok(Event { kind: EventKind::GuestPanicked { .. }, .. }) => self.panicked().await,
            Ok(Event { kind: EventKind::Reset { guest, reason }, .. }) => {
                tracing::info!(vm = %self.definition.name, guest, reason, "reset");
            }
            Ok(Event {
                kind:
                    EventKind::Shutdown { .. }
                    | EventKind::Stop
                    | EventKind::Resume
                    | EventKind::BlockIoError { .. },
                ..
            })
            | Err(EventError::Lagged { .. }) => self.look().await,
            Ok(_) => {}
            Err(EventError::Closed) => self.lose_sight().await,
        }
    }

    /// Asks QEMU how the guest is, and does what follows from it.
    pub(super) async fn look(&mut self) {
        let Some(mut run_state) = self.ask_run_state().await else { return };
        if self.is_to_run() && stands_still(&run_state) {
            // Nobody asked for it, or an order to run was not carried out: once more, and what does not help is told.
            self.reconcile().await;
            let Some(after) = self.ask_run_state().await else { return };
            run_state = after;
        }
        let is_to_run = self.is_to_run();
        let State::Running(watched) = &mut self.state else { return };
        watched.halted = match run_state {
            RunState::Shutdown => return self.powered_off().await,
            RunState::GuestPanicked => return self.panicked().await,
            RunState::IoError => {
                Some("a disk error has stopped the guest; `vm resume` lets it try again".to_owned())
            }
            RunState::InternalError => Some("an error in QEMU has stopped the guest".to_owned()),
            RunState::Watchdog => Some("the guest's watchdog has stopped it".to_owned()),
            state if is_to_run && stands_still(&state) => Some(format!(
                "the guest stands still ({state}) and cannot be let run; `vm resume` tries again"
            )),
            _ => None,
        };
        self.publish();
    }

    async fn ask_run_state(&self) -> Option<RunState> {
        let State::Running(watched) = &self.state else { return None };
        match watched.qemu.machine.status().await {
            Ok(status) => Some(status.run_state),
            Err(error) => {
                tracing::warn!(vm = %self.definition.name, %error, "QEMU does not say how the guest is");
                None
            }
        }
    }

    /// Whether the guest is this host's, and its user wants it to run.
    fn is_to_run(&self) -> bool {
        self.ownership.standing == Standing::Owned && self.ownership.intent == Intent::Run
    }

    /// The guest has powered itself off: QEMU, which waits (`-no-shutdown`), is let go.
    async fn powered_off(&mut self) {
        let State::Running(watched) = &self.state else { return };
        let qemu = watched.qemu.clone();
        if let Err(error) = qemu.machine.quit().await {
            tracing::warn!(vm = %self.definition.name, %error, "QEMU was not told to quit");
        }
        let ended =
            tokio::time::timeout(Duration::from_secs(QUIT_SECONDS), qemu.process.wait_exit());
        drop(ended.await);
        // Kills only what has not ended by itself.
        if let Err(error) = spawn::end(&self.host, &qemu.process).await {
            tracing::error!(vm = %self.definition.name, %error, "QEMU does not end");
            return;
        }
        tracing::info!(vm = %self.definition.name, "the guest has powered off");
        self.end_run(None).await;
    }

    async fn panicked(&mut self) {
        let State::Running(watched) = &self.state else { return };
        let process = watched.qemu.process.clone();
        if let Err(error) = spawn::end(&self.host, &process).await {
            tracing::error!(vm = %self.definition.name, %error, "QEMU does not end");
            return;
        }
        self.end_run(Some("the guest panicked; its console log has ended with it".to_owned()))
            .await;
    }

    /// QEMU is said to have ended, and nobody here had asked for it.
    pub(super) async fn ended(&mut self, exit: Exit) {
        let State::Running(watched) = &self.state else { return };
        let process = watched.qemu.process.clone();
        if has_ended(process.identity()) {
            let why = describe_end(&process, exit);
            tracing::warn!(vm = %self.definition.name, why, "QEMU ended without being asked");
            return self.end_run(Some(why)).await;
        }
        self.look_anew();
    }

    /// The session has ended. Most often the process has, too, and its watcher tells how a moment later.
    async fn lose_sight(&mut self) {
        let State::Running(watched) = &self.state else { return };
        let process = watched.qemu.process.clone();
        let moment = Duration::from_millis(END_MILLISECONDS);
        match tokio::time::timeout(moment, process.wait_exit()).await {
            Ok(exit) => self.ended(exit).await,
            Err(_) => self.look_anew(),
        }
    }

    /// The process lives, as far as is known, and cannot be heard: it is looked for anew.
    fn look_anew(&mut self) {
        let State::Running(watched) = &self.state else { return };
        tracing::warn!(vm = %self.definition.name, "the session with QEMU has ended");
        let record = Box::new(watched.qemu.record());
        self.answer_stops();
        self.state = State::Silent { record };
    }

    /// A QEMU was found again, or is known to be gone.
    pub(super) async fn found(&mut self, found: Found) {
        let State::Silent { record } = &self.state else { return };
        let (run, taps) = (record.name.clone(), record.taps.clone());
        match found {
            Found::Gone { why } => {
                spawn::sweep_run(&self.host, &run, &taps).await;
                self.note_end(Some(why.clone())).await;
                self.state = State::Crashed { why };
            }
            Found::Alive(qemu) => {
                tracing::info!(vm = %self.definition.name, run, "found its QEMU again");
                self.state = State::Running(Box::new(Watched::new(*qemu)));
                self.reconcile().await;
                self.look().await;
            }
        }
    }

    /// Brings the guest to what its user wants, where the agent died between noting and doing it.
    pub(super) async fn reconcile(&mut self) {
        let State::Running(watched) = &self.state else { return };
        if self.ownership.standing != Standing::Owned {
            return;
        }
        // No migration is open: what is left of an ended one would be in the next one's way.
        if let Err(error) = remove_qemu_credentials(&watched.qemu.dir.tls_folder()) {
            let error = whimbrel_api::error::chain(&error);
            tracing::warn!(vm = %self.definition.name, error, "certificates of an ended migration are left");
        }
        let machine = watched.qemu.machine.clone();
        // A guest that was refused, or never released, may still be in the middle of it.
        take_back::from_postcopy(&self.host, &watched.qemu).await;
        let Ok(status) = machine.status().await else { return };
        let done = match self.ownership.intent {
            Intent::Run if stands_still(&status.run_state) => {
                tracing::info!(vm = %self.definition.name, state = %status.run_state, "lets the guest run");
                let done = machine.cont().await;
                if let Err(error) = machine.announce_self().await {
                    tracing::warn!(vm = %self.definition.name, %error, "the guest's place was not announced");
                }
                done
            }
            Intent::Pause if status.running => machine.stop().await,
            _ => Ok(()),
        };
        if let Err(error) = done {
            tracing::error!(vm = %self.definition.name, %error, "the guest is not as its user wants it");
        }
    }

    /// Takes down what was made for the run that has just ended, and tells whoever waited for it.
    pub(super) async fn end_run(&mut self, crashed: Option<String>) {
        let State::Running(watched) = std::mem::replace(&mut self.state, State::Between) else {
            return;
        };
        let Watched { qemu, stopping, .. } = *watched;
        spawn::sweep_run(&self.host, &qemu.run, &qemu.taps).await;
        self.note_end(crashed.clone()).await;
        self.state = match crashed {
            Some(why) => State::Crashed { why },
            None => State::Stopped,
        };
        for reply in stopping {
            self.answer(reply, Ok(()));
        }
    }

    /// Notes that the VM has no QEMU any more.
    pub(super) async fn note_end(&mut self, crashed: Option<String>) {
        if let Err(error) = self.host.ledger.set_ended(self.definition.id, crashed).await {
            tracing::error!(vm = %self.definition.name, %error, "the end of a run was not noted");
        }
    }

    /// Answers those who wait for the guest to power off: it has not yet.
    pub(super) fn answer_stops(&mut self) {
        let State::Running(watched) = &mut self.state else { return };
        watched.answer_by = None;
        for reply in std::mem::take(&mut watched.stopping) {
            self.answer(reply, Ok(()));
        }
    }
}

/// Whether a guest stands still without a reason of its own: `cont` lets it run.
fn stands_still(run_state: &RunState) -> bool {
    matches!(
        run_state,
        RunState::Paused | RunState::Prelaunch | RunState::PostMigrate | RunState::FinishMigrate
    )
}
