//! The task of one VM: takes its orders one after the other, and watches its QEMU in between.
//!
//! What it knows for sure it has from the ledger, the process and QEMU's answers; events only say that it is time to
//! look. Actions live in `task/actions.rs`, what QEMU does by itself in `task/watch.rs`.

mod actions;
mod saved;
mod snapshots;
mod watch;

use std::sync::Arc;

use tokio::sync::{mpsc, watch as channel};
use tokio::time::Instant;
use whimbrel_api::agent::VmReport;
use whimbrel_api::vm::{VmDefinition, VmState};
use whimbrel_api::{ApiError, Epoch, ErrorCode, MigrationId, Name};
use whimbrel_migration::handoff::{Intent, Ownership, Standing};
use whimbrel_qemu::event::{Event, EventError, Events};
use whimbrel_qemu::machine::Machine;
use whimbrel_qemu::process::Exit;

use super::console;
use super::found::{Found, find_again};
use super::order::{Order, Published, Reply};
use super::running::{RunDir, RunningVm, Spawned};
use super::{Handle, WAITING_ORDERS_MAX};
use crate::host::Host;
use crate::ledger::RunRecord;

/// What a task begins with.
#[derive(Debug)]
pub(super) enum Beginning {
    /// No QEMU.
    Stopped,
    /// No QEMU; the last one had ended without being asked.
    Crashed { why: String },
    /// An earlier life of the agent had spawned this; it is to be found again.
    Find { record: Box<RunRecord> },
    /// It runs.
    Running { running: Box<RunningVm> },
    /// A migration was open when the agent ended, and will take it up again.
    Lent { migration: MigrationId, news: VmState, record: Option<Box<RunRecord>> },
}

/// Starts the task of a VM that runs.
pub(super) fn run_with(
    host: &Arc<Host>,
    definition: VmDefinition,
    ownership: Ownership,
    running: RunningVm,
) -> Handle {
    run(host, definition, ownership, Beginning::Running { running: Box::new(running) })
}

/// Starts a VM's task.
pub(super) fn run(
    host: &Arc<Host>,
    definition: VmDefinition,
    ownership: Ownership,
    beginning: Beginning,
) -> Handle {
    let (orders, waiting) = mpsc::channel(WAITING_ORDERS_MAX);
    let state = State::from(beginning, host);
    let first = published(&definition, &ownership, &state);
    let (shown, published) = channel::channel(first);
    let task = Task { host: Arc::clone(host), definition, ownership, state, waiting, shown };
    host.vms.spawn(task.run());
    Handle { orders, published }
}

/// One VM.
struct Task {
    host: Arc<Host>,
    definition: VmDefinition,
    /// This host's word on the VM; during a loan as it was before.
    ownership: Ownership,
    state: State,
    waiting: mpsc::Receiver<Order>,
    shown: channel::Sender<Published>,
}

enum State {
    Stopped,
    Crashed {
        why: String,
    },
    /// Its process lives, or may live, and is to be found.
    Silent {
        record: Box<RunRecord>,
    },
    Running(Box<Watched>),
    Lent {
        migration: MigrationId,
        news: VmState,
        console: Option<console::Place>,
        machine: Option<Machine>,
    },
    /// A state is being left; seen by nobody.
    Between,
}

/// A QEMU that this task watches.
struct Watched {
    qemu: Spawned,
    events: Events,
    /// Who waits for the guest to power itself off, and until when.
    stopping: Vec<Reply>,
    answer_by: Option<Instant>,
    /// Why the guest stands still though nobody asked for it.
    halted: Option<String>,
}

impl Watched {
    fn new(qemu: Spawned) -> Self {
        let events = qemu.machine.events();
        Self { qemu, events, stopping: Vec::new(), answer_by: None, halted: None }
    }
}

/// What a task wakes up for.
enum Happening {
    Order(Option<Order>),
    Event(Result<Event, EventError>),
    Exit(Exit),
    AnswerNow,
    Found(Found),
}

impl State {
    fn from(beginning: Beginning, host: &Host) -> Self {
        match beginning {
            Beginning::Stopped => State::Stopped,
            Beginning::Crashed { why } => State::Crashed { why },
            Beginning::Find { record } => State::Silent { record },
            Beginning::Running { running } => State::Running(Box::new(Watched::new(running.qemu))),
            Beginning::Lent { migration, news, record } => {
                let place = |record: Box<RunRecord>| console::Place {
                    dir: RunDir::new(&host.config.run_dir(), &record.name),
                    pid: record.process.pid,
                };
                State::Lent { migration, news, console: record.map(place), machine: None }
            }
        }
    }
}

impl Task {
    /// Until the VM is deleted, forgotten, or the agent lets go of it.
    async fn run(mut self) {
        self.settle_in().await;
        loop {
            self.publish();
            let go_on = match self.next().await {
                Happening::Order(None) => false,
                Happening::Order(Some(order)) => self.obey(order).await,
                Happening::Event(event) => {
                    self.notice(event).await;
                    true
                }
                Happening::Exit(exit) => {
                    self.ended(exit).await;
                    true
                }
                Happening::AnswerNow => {
                    self.answer_stops();
                    true
                }
                Happening::Found(found) => {
                    self.found(found).await;
                    true
                }
            };
            if !go_on {
                return;
            }
        }
    }

    async fn next(&mut self) -> Happening {
        match &mut self.state {
            State::Running(watched) => {
                let process = watched.qemu.process.clone();
                let far = Instant::now() + std::time::Duration::from_secs(3600);
                let answer_by = watched.answer_by.unwrap_or(far);
                let waits = watched.answer_by.is_some();
                tokio::select! {
                    // The end first: after it QEMU's last events say nothing more.
                    biased;
                    exit = process.wait_exit() => Happening::Exit(exit),
                    event = watched.events.next() => Happening::Event(event),
                    () = tokio::time::sleep_until(answer_by), if waits => Happening::AnswerNow,
                    order = self.waiting.recv() => Happening::Order(order),
                }
            }
            State::Silent { record } => tokio::select! {
                order = self.waiting.recv() => Happening::Order(order),
                found = find_again(&self.host, record) => Happening::Found(found),
            },
            _ => Happening::Order(self.waiting.recv().await),
        }
    }

    /// Carries an order out; `false` when the VM is no more.
    async fn obey(&mut self, order: Order) -> bool {
        match order {
            Order::Start(reply) => {
                let outcome = self.start().await;
                self.answer(reply, outcome);
            }
            Order::Stop { force, reply } => self.stop(force, reply).await,
            Order::Pause(reply) => {
                let outcome = self.pause().await;
                self.answer(reply, outcome);
            }
            Order::Resume(reply) => {
                let outcome = self.resume().await;
                self.answer(reply, outcome);
            }
            Order::Save { to, reply } => {
                let outcome = self.save(&to).await;
                self.answer(reply, outcome);
            }
            Order::Restore { from, reply } => {
                let outcome = self.restore(&from).await;
                self.answer(reply, outcome);
            }
            Order::Images { change, reply } => {
                let outcome = self.change_images(change).await;
                self.answer(reply, outcome);
            }
            Order::Clone { asked, reply } => drop(reply.send(self.clone_as(*asked).await)),
            Order::Delete(reply) => {
                let outcome = self.delete().await;
                let gone = outcome.is_ok();
                let _ = reply.send(outcome);
                return !gone;
            }
            Order::Lend { migration, reply } => self.lend(migration, reply),
            Order::LendStopped { migration, reply } => self.lend_stopped(migration, reply),
            Order::GiveBackStopped(reply) => {
                self.take_back_stopped().await;
                self.publish();
                let _ = reply.send(());
            }
            Order::LoanNews { news, reply } => {
                if let State::Lent { news: shown, .. } = &mut self.state {
                    *shown = news;
                }
                self.publish();
                let _ = reply.send(());
            }
            Order::GiveBack { running, reply } => {
                self.take_back(*running).await;
                self.publish();
                let _ = reply.send(());
            }
            Order::GiveBackEnded { crashed, reply } => {
                self.take_back_ended(crashed).await;
                self.publish();
                let _ = reply.send(());
            }
            Order::Forget(reply) => {
                let lent = matches!(self.state, State::Lent { .. });
                if lent {
                    self.forget().await;
                }
                let _ = reply.send(lent);
                return !lent;
            }
        }
        true
    }

    /// Answers an action with how the VM is now.
    fn answer(&mut self, reply: Reply, outcome: Result<(), ApiError>) {
        self.publish();
        let _ = reply.send(outcome.map(|()| self.shown.borrow().report.clone()));
    }

    fn publish(&mut self) {
        self.shown.send_replace(published(&self.definition, &self.ownership, &self.state));
    }

    /// The refusal of an order in a state that does not allow it; `wanted` says which would.
    fn refuse(&self, wanted: &str) -> ApiError {
        let name = &self.definition.name;
        match &self.state {
            State::Lent { migration, news: VmState::Unresolved { ask, .. }, .. } => ApiError::new(
                ErrorCode::WrongState,
                format!(
                    "VM `{name}` was given to host {ask}, which has not confirmed yet (migration {migration})"
                ),
            ),
            State::Lent { migration, .. } => ApiError::new(
                ErrorCode::Migrating,
                format!(
                    "VM `{name}` is being migrated (migration {migration}); only the migration may change it"
                ),
            ),
            State::Silent { .. } => ApiError::new(
                ErrorCode::WrongState,
                format!("the QEMU of VM `{name}` lives and does not answer: its state is unknown"),
            )
            .hint("wait for it, or `vm stop --force` to end it"),
            _ => {
                let state = self.shown.borrow().report.state.word();
                ApiError::new(
                    ErrorCode::WrongState,
                    format!("VM `{name}` is {state}, not {wanted}"),
                )
            }
        }
    }
}

fn published(definition: &VmDefinition, ownership: &Ownership, state: &State) -> Published {
    let paused = ownership.intent == Intent::Pause;
    let (shown, qemu) = match state {
        State::Stopped | State::Between => (VmState::Stopped, None),
        State::Crashed { why } => (VmState::Crashed { why: why.clone() }, None),
        State::Silent { .. } => {
            let why = "its QEMU is there and has not answered yet".to_owned();
            (VmState::Unknown { why }, None)
        }
        State::Running(watched) => {
            let shown = match &watched.halted {
                Some(why) => VmState::Crashed { why: why.clone() },
                None if paused => VmState::Paused,
                None => VmState::Running,
            };
            (shown, Some(&watched.qemu))
        }
        State::Lent { news, .. } => (news.clone(), None),
    };
    let (console, machine) = match (state, qemu) {
        (State::Lent { console, machine, .. }, _) => (console.clone(), machine.clone()),
        (_, Some(qemu)) => (Some(console::Place::of(qemu)), Some(qemu.machine.clone())),
        _ => (None, None),
    };
    let report = VmReport {
        definition: definition.clone(),
        state: shown,
        epoch: owned_epoch(ownership),
        engine: qemu.map(|qemu| qemu.engine.clone()),
    };
    Published { report, console, machine }
}

/// The epoch in which the VM is this host's. An open migration's record is about the one that may be given away: told as
/// ours, it would outrank the word of the host that takes it.
fn owned_epoch(ownership: &Ownership) -> Epoch {
    match ownership.standing {
        // Epochs between were only tried.
        Standing::Leaving { .. } | Standing::Released { .. } | Standing::Serving { .. } => {
            Epoch(ownership.epoch.0.saturating_sub(1))
        }
        _ => ownership.epoch,
    }
}

/// How a record of an open migration reads in a report.
pub(super) fn news_of(record: &Ownership) -> Option<(MigrationId, VmState)> {
    let migration = record.migration?;
    let ask = |to: &Name| VmState::Unresolved { migration, ask: to.clone() };
    match &record.standing {
        Standing::Leaving { .. } => Some((migration, VmState::Migrating { migration })),
        Standing::Released { to } | Standing::Serving { to } => Some((migration, ask(to))),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use whimbrel_api::VmId;

    use super::*;

    #[test]
    fn an_epoch_that_may_be_given_away_is_not_told_as_ours() {
        let owned = Ownership { epoch: Epoch(4), ..Ownership::created(VmId::new(), Intent::Run) };
        let to: Name = "host-b".parse().unwrap();
        let open = |standing| Ownership { epoch: Epoch(5), standing, ..owned.clone() };
        assert_eq!(owned_epoch(&owned), Epoch(4));
        assert_eq!(owned_epoch(&open(Standing::Leaving { to: to.clone() })), Epoch(4));
        assert_eq!(owned_epoch(&open(Standing::Released { to })), Epoch(4));
    }
}
