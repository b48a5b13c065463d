//! One open migration: its record, which only this page writes, and the way in for whoever wants to cancel it.
//!
//! No step of a migration is here (they are in [`super`]); this is what the steps are written with.

use std::collections::HashMap;
use std::pin::pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use jiff::Timestamp;
use tokio::sync::{mpsc, oneshot};
use whimbrel_api::agent::{OutgoingEnd, OutgoingReport};
use whimbrel_api::client::AgentClient;
use whimbrel_api::event::Event;
use whimbrel_api::migration::{
    DECISIONS_MAX, Migration, MigrationState, MigrationStatistics, PhaseStart, Reclaim, Stay,
};
use whimbrel_api::policy::Policy;
use whimbrel_api::vm::VmDefinition;
use whimbrel_api::{ApiError, Epoch, ErrorCode, MigrationId, Name, Phase};
use whimbrel_migration::forecast::facts::Measurements;
use whimbrel_migration::preflight::ENGINE_OVERHEAD_BYTES;
use whimbrel_pki::grant::SignedGrant;

use crate::controller::MovedPlacement;
use crate::hosts::Member;
use crate::plan::{Effort, gather, note_rate, subject};
use crate::{Controller, policies};

/// Wishes of one migration that may wait.
const WISHES_MAX: usize = 128;
/// How long a wish waits for its answer, in seconds.
const WISH_SECONDS: u64 = 15;
/// How long until an end that could not be written is written again, in milliseconds.
const WRITE_AGAIN_MS: u64 = 500;
/// How long the hosts may take to tell what was seen over time, in seconds: the end is not held up for it, and it is not kept then.
const STATISTICS_SECONDS: u64 = 1;

pub(super) type Answer = oneshot::Sender<Result<(), ApiError>>;

/// What somebody wants of an open migration.
pub(super) enum Wish {
    /// It ends where it is.
    Cancel(Answer),
    /// The VM is taken back from a destination that never returns.
    Reclaim(Reclaim, Answer),
}

/// The open pages.
#[derive(Debug, Default)]
pub(crate) struct Running(Mutex<HashMap<MigrationId, Open>>);

#[derive(Debug)]
struct Open {
    wishes: mpsc::Sender<Wish>,
    destination: Name,
    /// Memory set aside for a QEMU that the destination's own figures do not count yet.
    reserved_bytes: u64,
}

impl Running {
    fn open(&self) -> MutexGuard<'_, HashMap<MigrationId, Open>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Asks a page for something; the answer is the page's. `false`: there is no such page.
    pub(super) async fn ask(
        &self,
        id: MigrationId,
        wish: impl FnOnce(Answer) -> Wish,
    ) -> Result<bool, ApiError> {
        let Some(wishes) = self.open().get(&id).map(|open| open.wishes.clone()) else {
            return Ok(false);
        };
        let (answer, answered) = oneshot::channel();
        if wishes.send(wish(answer)).await.is_err() {
            return Ok(true);
        }
        match tokio::time::timeout(Duration::from_secs(WISH_SECONDS), answered).await {
            Ok(Ok(answer)) => answer.map(|()| true),
            // The page has ended in between: its record says how.
            Ok(Err(_)) => Ok(true),
            Err(_) => Err(ApiError::new(
                ErrorCode::Busy,
                format!("that was not answered within {WISH_SECONDS} s"),
            )
            .hint("it is still being worked on: `whimbrel migration show` tells how it ends")),
        }
    }

    /// Memory set aside on a host by other migrations, in bytes.
    fn reserved_bytes(&self, host: &Name, except: MigrationId) -> u64 {
        let open = self.open();
        let others = open.iter().filter(|(id, open)| **id != except && open.destination == *host);
        others.map(|(_, open)| open.reserved_bytes).sum()
    }

    fn set_reserved(&self, id: MigrationId, bytes: u64) {
        if let Some(open) = self.open().get_mut(&id) {
            open.reserved_bytes = bytes;
        }
    }
}

/// What is known of the destination from preflight; not known any more after a restart.
#[derive(Debug, Clone, Copy)]
pub(super) struct Room {
    pub(super) memory_available_bytes: u64,
}

/// An open migration.
pub(super) struct Page {
    pub(super) controller: Arc<Controller>,
    pub(super) record: Migration,
    source: Arc<Member>,
    destination: Arc<Member>,
    /// The generation of the definition that travels.
    pub(super) generation: u64,
    /// Whether the placement has moved.
    pub(super) placed: bool,
    room: Option<Room>,
    wishes: mpsc::Receiver<Wish>,
}

/// Opens the page of a recorded migration and lets it go on by itself.
///
/// Without one of its hosts nobody can say how it stands: it is told to be unresolved, and taken up by the next controller.
pub(super) fn open(controller: &Arc<Controller>, record: Migration, room: Option<Room>) {
    let hosts = controller.hosts();
    let (source, destination) = match (hosts.get(&record.source), hosts.get(&record.destination)) {
        (Ok(source), Ok(destination)) => (source, destination),
        (Err(error), _) => return orphaned(controller, record.source.clone(), record, &error),
        (_, Err(error)) => return orphaned(controller, record.destination.clone(), record, &error),
    };
    let (sender, wishes) = mpsc::channel(WISHES_MAX);
    let open = Open { wishes: sender, destination: record.destination.clone(), reserved_bytes: 0 };
    controller.running().open().insert(record.id, open);
    let (controller, id) = (controller.clone(), record.id);
    controller.events().publish(Event::Migration { migration: record.clone() });
    tokio::spawn(async move {
        let page = Page {
            controller: controller.clone(),
            record,
            source,
            destination,
            generation: 0,
            placed: false,
            room,
            wishes,
        };
        tokio::select! {
            () = super::carry(page) => controller.running().open().remove(&id).map_or((), drop),
            // The next controller takes it up; the agents go on meanwhile.
            () = controller.closing() => {}
        }
    });
}

/// A host of the migration is not in the pool: that is told, and nothing is guessed.
fn orphaned(controller: &Arc<Controller>, ask: Name, record: Migration, error: &ApiError) {
    tracing::error!(migration = %record.id, %error,
        "a migration cannot be led on; when that host has joined again, restart the controller");
    let state = MigrationState::Unresolved { ask };
    if record.state == state {
        return;
    }
    let controller = controller.clone();
    tokio::spawn(async move {
        let record = Migration { state, ..record };
        if let Err(error) = controller.save_migration(&record).await {
            tracing::error!(migration = %record.id, %error, "the record cannot be written");
        }
    });
}

fn nothing_to_take_back() -> ApiError {
    ApiError::new(ErrorCode::WrongState, "the VM is not with a host that does not answer")
        .hint("`whimbrel migration show` tells how the migration is")
}

/// A failure in a phase, for the record.
pub(super) fn failed(phase: Phase, error: &ApiError) -> Stay {
    Stay::Failed { phase, code: error.code.as_str().to_owned(), message: error.message.clone() }
}

impl Page {
    /// The source's agent, as it is to be called now: address and certificates may change while a migration is open.
    pub(super) fn source(&self) -> AgentClient {
        self.source.agent()
    }

    /// The destination's agent, likewise.
    pub(super) fn destination(&self) -> AgentClient {
        self.destination.agent()
    }

    /// Records that a phase begins, before anything of it is asked for.
    pub(super) async fn enter(&mut self, phase: Phase) -> Result<(), Stay> {
        self.take_cancels().await?;
        // An earlier controller may have heard it and died.
        if self.record.cancel_requested {
            return Err(Stay::Cancelled);
        }
        self.mark_phase(phase);
        let saved = self.controller.save_migration(&self.record).await;
        saved.map_err(|error| failed(phase, &error))
    }

    fn mark_phase(&mut self, phase: Phase) {
        if self.record.phase == phase && self.record.phases.iter().any(|start| start.phase == phase)
        {
            return;
        }
        // A restarted controller may begin anew: what came later then has not been.
        self.record.phases.retain(|start| start.phase < phase);
        self.record.phase = phase;
        self.record.phases.push(PhaseStart { phase, at: Timestamp::now() });
    }

    pub(super) async fn save(&self) {
        if let Err(error) = self.controller.save_migration(&self.record).await {
            tracing::error!(migration = %self.record.id, %error, "the record cannot be written; the agents have theirs");
        }
    }

    /// Sets the guest's memory aside, so that two migrations at once do not both count on the same.
    pub(super) fn reserve_memory(&mut self) -> Result<(), Stay> {
        let Some(room) = self.room else { return Ok(()) };
        let needed = self.record.memory_bytes.saturating_add(ENGINE_OVERHEAD_BYTES);
        let running = self.controller.running();
        running.set_reserved(self.record.id, needed);
        let others = running.reserved_bytes(&self.record.destination, self.record.id);
        if needed.saturating_add(others) <= room.memory_available_bytes {
            return Ok(());
        }
        let message = format!(
            "{} has {} bytes of memory free, of which {others} are set aside for other migrations; {needed} are needed",
            self.record.destination, room.memory_available_bytes
        );
        Err(failed(Phase::Reservation, &ApiError::new(ErrorCode::NoResources, message)))
    }

    /// The policy under which it goes. One that has gone meanwhile cannot be: it is kept as long as this is active.
    pub(super) async fn policy(&self) -> Result<Policy, Stay> {
        let Some(name) = &self.record.policy else { return Ok(Policy::default()) };
        let found = policies::get(&self.controller, name).await;
        Ok(found.map_err(|error| failed(Phase::Precopy, &error))?.policy)
    }

    /// What the way was chosen by, as far as it is still at hand; nothing is measured for it.
    pub(super) async fn measurements(&self) -> Option<Measurements> {
        self.record.forecast.as_ref()?;
        let row = self.controller.find_vm(self.record.vm.to_string().as_str()).await.ok()?;
        let (source, destination) = (&self.source, &self.destination);
        let of = subject(&self.controller, &row, source, destination, &self.record.options);
        Some(gather(&self.controller, &of, Effort::None).await.measurements)
    }

    /// The definition that travels, as the source has it, under the name that the VM is to have.
    pub(super) async fn definition(&mut self) -> Result<VmDefinition, Stay> {
        let report = self.source().vm(self.record.vm).await;
        let report = report.map_err(|error| failed(Phase::Preparation, &error))?;
        let mut definition = report.definition;
        self.generation = definition.generation;
        if let Some(name) = &self.record.options.dname {
            definition.name = name.clone();
        }
        Ok(definition)
    }

    /// The permission that both agents are shown.
    pub(super) fn grant(&self) -> Result<SignedGrant, Stay> {
        let source_epoch = Epoch(self.record.epoch.0.saturating_sub(1));
        self.controller
            .grant(&self.record, source_epoch)
            .map_err(|error| failed(Phase::Preparation, &error))
    }

    /// Waits for something, unless somebody cancels first: then that is why the VM stays.
    pub(super) async fn unless_cancelled<T>(
        &mut self,
        work: impl Future<Output = T>,
    ) -> Result<T, Stay> {
        let mut work = pin!(work);
        loop {
            tokio::select! {
                biased;
                wish = self.next_wish() => self.accept(wish).await?,
                done = &mut work => return Ok(done),
            }
        }
    }

    async fn take_cancels(&mut self) -> Result<(), Stay> {
        while let Ok(wish) = self.wishes.try_recv() {
            self.accept(wish).await?;
        }
        Ok(())
    }

    /// Does what is wished before the source has been asked: a cancel ends it, and is written down before it is answered, for
    /// only this record knows of it.
    async fn accept(&mut self, wish: Wish) -> Result<(), Stay> {
        match wish {
            Wish::Cancel(answer) => {
                self.record.cancel_requested = true;
                self.save().await;
                // Whoever asked may have gone.
                let _gone = answer.send(Ok(()));
                Err(Stay::Cancelled)
            }
            Wish::Reclaim(_, answer) => {
                let _gone = answer.send(Err(nothing_to_take_back()));
                Ok(())
            }
        }
    }

    /// The next wish; never resolves when there can be none any more.
    pub(super) async fn next_wish(&mut self) -> Wish {
        match self.wishes.recv().await {
            Some(wish) => wish,
            None => std::future::pending().await,
        }
    }

    /// Passes a wish on to the source, whose word counts from the moment when it has been asked to send.
    pub(super) async fn pass_on(&mut self, wish: Wish) {
        match wish {
            Wish::Cancel(answer) => self.cancel_at_source(answer).await,
            Wish::Reclaim(word, answer) => {
                let told = self.reclaim(word).await;
                let _gone = answer.send(told);
            }
        }
    }

    async fn cancel_at_source(&mut self, answer: Answer) {
        let told = self.source().cancel_outgoing(self.record.id).await.map(|_| ());
        if told.is_ok() {
            self.record.cancel_requested = true;
        }
        let _gone = answer.send(told);
    }

    /// Waits a moment; a wish that comes meanwhile goes to the source at once.
    pub(super) async fn pause(&mut self, duration: Duration) {
        tokio::select! {
            () = tokio::time::sleep(duration) => {}
            wish = self.next_wish() => self.pass_on(wish).await,
        }
    }

    /// Takes over what the source says. Figures are told to whoever watches; phases and outcomes are written down.
    pub(super) async fn note(&mut self, report: &OutgoingReport) {
        if report.progress.is_some() {
            self.record.progress = report.progress.clone();
            // QEMU runs on the destination by now, and is in the destination's own figures.
            self.controller.running().set_reserved(self.record.id, 0);
        }
        self.record.downtime = report.downtime.or(self.record.downtime);
        let state = match &report.end {
            OutgoingEnd::Unresolved { ask } => MigrationState::Unresolved { ask: ask.clone() },
            _ => MigrationState::Running,
        };
        // A restarted source has forgotten how far it was; it never goes back.
        let further = report.phase > self.record.phase;
        let decided = self.note_decisions(report);
        let new = further || decided || self.record.state != state;
        self.record.state = state;
        if further {
            self.mark_phase(report.phase);
            if report.phase == Phase::Postcopy {
                self.runs_there();
            }
        }
        if new {
            self.save().await;
        } else {
            self.controller.events().publish(Event::Migration { migration: self.record.clone() });
        }
    }

    /// Takes over what the source has decided, and how it goes on; whether any of it is new. What the source does not tell (any
    /// more) was decided before it was asked, or before it was restarted.
    fn note_decisions(&mut self, report: &OutgoingReport) -> bool {
        let record = &mut self.record;
        let before = (record.decisions.clone(), record.strategy.clone(), record.postcopy.clone());
        if !report.decisions.is_empty() {
            record.decisions.retain(|earlier| !report.decisions.contains(earlier));
            record.decisions.extend(report.decisions.iter().cloned());
            if let Some(too_many) = record.decisions.len().checked_sub(DECISIONS_MAX) {
                record.decisions.drain(DECISIONS_MAX / 2..DECISIONS_MAX / 2 + too_many);
            }
        }
        record.strategy = report.strategy.clone().or(record.strategy.take());
        record.postcopy = report.postcopy.clone().or(record.postcopy.take());
        before != (record.decisions.clone(), record.strategy.clone(), record.postcopy.clone())
    }

    /// The guest runs on the destination as from now.
    fn runs_there(&mut self) {
        let total = Timestamp::now().duration_since(self.record.started).as_millis();
        self.record.total_ms.get_or_insert(u64::try_from(total).unwrap_or(0));
    }

    /// Moves the placement, and gives the VM the name under which it has arrived.
    pub(super) async fn move_placement(&self, moved: &MovedPlacement) -> Result<(), ApiError> {
        if let Some(name) = &self.record.options.dname {
            self.controller.store().rename_vm(moved.vm, name).await?;
        }
        self.controller.move_placement(moved).await.map(|_| ())
    }

    /// Keeps what was seen over time, before the agents forget it. Not worth an error: the record has the rest.
    pub(super) async fn keep_statistics(&mut self) {
        let id = self.record.id;
        let kept = tokio::time::timeout(Duration::from_secs(STATISTICS_SECONDS), async {
            let mut statistics: MigrationStatistics = self.source().outgoing_statistics(id).await?;
            let agent = self.destination();
            if let Some(postcopy) = &mut self.record.postcopy {
                let there = agent.incoming_statistics(id).await?;
                postcopy.blocktime_ms = there.postcopy_blocktime_ms.or(postcopy.blocktime_ms);
                if !there.postcopy_vcpu_blocktime_ms.is_empty() {
                    postcopy.vcpu_blocktime_ms = there.postcopy_vcpu_blocktime_ms;
                }
                statistics.destination_raw = there.raw;
            }
            self.controller.store().save_statistics(id, &statistics).await?;
            Ok::<(), ApiError>(())
        });
        match kept.await {
            Ok(Ok(())) => {}
            Ok(Err(error)) => {
                tracing::debug!(migration = %id, %error, "its statistics are not kept")
            }
            Err(_) => {
                tracing::warn!(migration = %id, "a host is silent: its statistics are not kept")
            }
        }
    }

    /// Tells that nobody knows yet how it ended.
    pub(super) async fn unresolved(&mut self, ask: Name) {
        let state = MigrationState::Unresolved { ask };
        if self.record.state != state {
            self.record.state = state;
            self.save().await;
        }
    }

    /// Writes down how it was settled, before both sides are swept.
    pub(super) async fn settled(&mut self, state: MigrationState) {
        if state == MigrationState::Moved {
            self.mark_phase(Phase::Retirement);
            self.record.ended.get_or_insert_with(Timestamp::now);
            self.runs_there();
        }
        self.record.settled = Some(state);
        self.save().await;
    }

    /// Writes the end down and tells it. Not without the record: until it says so, the migration holds the VM.
    pub(super) async fn end(&mut self, state: MigrationState) {
        self.wishes.close();
        while let Ok(wish) = self.wishes.try_recv() {
            let (told, answer) = match wish {
                Wish::Cancel(answer) if state == MigrationState::Moved => {
                    (Err(super::handed_over(&self.record)), answer)
                }
                Wish::Cancel(answer) => (Ok(()), answer),
                Wish::Reclaim(_, answer) => (Err(nothing_to_take_back()), answer),
            };
            let _gone = answer.send(told);
        }
        self.record.ended.get_or_insert_with(Timestamp::now);
        self.record.settled = None;
        self.record.state = state;
        self.controller.metrics().ended(&self.record);
        note_rate(&self.controller, &self.record);
        while let Err(error) = self.controller.save_migration(&self.record).await {
            tracing::error!(migration = %self.record.id, %error, "the end cannot be written; trying again");
            tokio::time::sleep(Duration::from_millis(WRITE_AGAIN_MS)).await;
        }
    }
}
